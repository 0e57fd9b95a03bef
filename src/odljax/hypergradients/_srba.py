"""SARAH recursions of a bilevel problem, one loop for the three variables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array

from .. import _tree
from .._checks import coefficient, count
from .._types import Coefficient, Theta, X
from ._directions import Directions, directions, refresh_period, refreshed_or, sarah
from ._estimator import Hypergradient, Info, Outer, finish, losses, slope_of, start_inner, start_outer
from ._minibatches import minibatches


class SRBAState(NamedTuple):
    """The inner and the adjoint iterate, those before, the three directions there, the samplers, the outer walk."""

    x: Any
    adjoint: Any
    last_x: Any
    last_adjoint: Any
    memory: Any
    batches: Any
    outer: Outer


def srba(
    inner: Callable[..., Any],
    outer: Callable[..., Any],
    *,
    step_size: Coefficient,
    adjoint_step_size: Coefficient | None = None,
    refresh_every: int | None = None,
    batch_size: int | tuple[int, int] | None = None,
    fixed_batches: bool = False,
    key: Array | None = None,
) -> Hypergradient[X, Theta]:
    r"""Returns SRBA: SOBA with SARAH recursions, whose noise vanishes as it converges, without tables.

    With :math:`z = (x, v, \theta)` and :math:`D(z)` the three directions of SOBA,

    .. math:: d_t = D(z_t) \text{ on all rows, where } q \text{ divides } t, \qquad
        d_t = d_{t-1} + D_i(z_t) - D_i(z_{t-1}) \text{ on one minibatch else}

    and the three variables move along their parts of :math:`d_t`; the gradient is that of theta.

    When: finite data, a smooth inner loss that is strongly convex in x. With constant steps, of theta too, it converges
    as the full-batch method does, linearly where that does; near-optimal in the number of gradients. Without batches
    it is SOBA. The data must be the same at each update.

    Args:
        inner: f, ``(x, theta, inner_data) -> scalar``, the mean over the rows it gets; without data ``(x, theta)``.
        outer: F, ``(x, theta, outer_data) -> scalar``, likewise.
        step_size: a > 0, a number, a schedule of the update number, or a function of theta; constant in the source,
            below 1/L with L the largest smoothness of a minibatch.
        adjoint_step_size: b > 0, likewise; None: that of x.
        refresh_every: q, at least 1, static; None: the number of rows over that of the rows of a draw, both of inner
            and outer data together, rounded down, at least 1.
        batch_size: rows of an inner and an outer minibatch, at least 1, or a pair. None: all rows.
        fixed_batches: draw one of the n / b contiguous batches of b rows instead of rows from everywhere: memory is
            read in one piece, which is some times faster where a minibatch is small. b must divide n; shuffle sorted
            data beforehand.
        key: of the draws; default ``jax.random.key(0)``.

    Raises:
        ValueError: a step size that is not positive, a count or batch size out of range.
        TypeError: a loss that is no function; at trace time, a loss that is not a real scalar, data that is not a pair.

    Cost: two gradients, two Hessian-vector and two cross products of f, two gradients of F, on minibatches, and once
    in q updates one of each on all rows; the state holds five copies of x and one of theta.
    ``info.inner_residual`` is the norm of the direction that x takes.

    Source: Dagreou, Moreau, Vaiter and Ablin (2023), algorithm 1.

    Example:
        >>> import jax, odljax as odl
        >>> p = odl.problems.finite_sum()
        >>> hyper = odl.hypergradients.srba(p.inner, p.outer, step_size=p.step_size / 2, batch_size=4)
        >>> def step(carry, _):
        ...     theta, state = carry
        ...     gradient, state, _ = hyper.update(theta, state, p.inner_data, p.outer_data)
        ...     return (theta - 0.05 * gradient, state), None
        >>> state = hyper.init(p.theta, p.x0, p.inner_data, p.outer_data)
        >>> (theta, _), _ = jax.lax.scan(step, (p.theta, state), length=1000)
        >>> bool(abs(theta - p.minimiser).max() < 1e-4)
        True
    """
    who = "srba"
    inner_loss, outer_loss = losses(who, inner, outer)
    step = coefficient(who, "step_size", step_size)
    adjoint_step = step if adjoint_step_size is None else coefficient(who, "adjoint_step_size", adjoint_step_size)
    if refresh_every is not None:
        count(who, "refresh_every", refresh_every)
    batches = minibatches(who, batch_size, key, fixed_batches=fixed_batches)

    def init(theta: Theta, x0: X, *data: Any) -> SRBAState:
        x, walk = start_inner(who, theta, x0), start_outer(theta)
        v = _tree.zeros_like(x)
        memory = (v, v, _tree.zeros_like(walk.theta))  # never read: the first update refreshes it
        return SRBAState(x, v, x, v, memory, batches.start(data), walk)

    def update(theta: Theta, state: SRBAState, *data: Any) -> tuple[Theta, SRBAState, Info]:
        theta = _tree.strong(theta)
        x, v, t = state.x, state.adjoint, state.outer.t

        def whole(draws: Any) -> tuple[Directions, Any]:
            return directions(inner_loss, outer_loss, x, v, theta, *batches.whole(data)), draws

        def recursion(draws: Any) -> tuple[Directions, Any]:
            inner_data, draws = batches.inner(draws, data)
            outer_data, draws = batches.outer(draws, data)
            new = directions(inner_loss, outer_loss, x, v, theta, inner_data, outer_data)
            old = directions(
                inner_loss, outer_loss, state.last_x, state.last_adjoint, state.outer.theta, inner_data, outer_data
            )
            x_part, v_part, theta_part = sarah(state.memory, tuple(new[:3]), tuple(old[:3]))
            return Directions(x_part, v_part, theta_part, new.value, new.scale), draws

        period = refresh_period(who, refresh_every, batches, data)
        d, draws = refreshed_or(period, t, whole, recursion, state.batches)
        new_x = _tree.add_scaled(x, -step(theta, t), d.inner)
        new_v = _tree.add_scaled(v, -adjoint_step(theta, t), d.adjoint)
        return finish(
            who, d.outer, theta, state, SRBAState(new_x, new_v, x, v, tuple(d[:3]), draws, state.outer),
            value=d.value, x=new_x, inner_residual=_tree.norm(d.inner), adjoint_residual=d.residual,
        )  # fmt: skip

    return Hypergradient(init, update, who, slope_of(who, inner, outer))
