"""SARAH recursions along several inner steps, refreshed on all rows from time to time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array

from .. import _tree
from .._checks import coefficient, count
from .._types import Coefficient, Theta, X
from ._directions import Directions, Point, implicit_directions, refresh_period, refreshed_or, sarah
from ._estimator import Hypergradient, Info, Outer, finish, losses, slope_of, start_inner, start_outer
from ._minibatches import minibatches


class VRBOState(NamedTuple):
    """The inner iterate, the one before, both directions there, the samplers and the outer walk."""

    x: Any
    last_x: Any
    memory: Any
    batches: Any
    outer: Outer


class _Pass(NamedTuple):
    """Where an inner pass stands: the directions are those at ``last_x``, from which x came."""

    x: Any
    last_x: Any
    memory: Any
    value: Array
    residual: Array
    draws: Any


def vrbo(
    inner: Callable[..., Any],
    outer: Callable[..., Any],
    *,
    step_size: Coefficient,
    adjoint_step_size: Coefficient | None = None,
    num_steps: int = 10,
    num_adjoint_steps: int = 10,
    refresh_every: int | None = None,
    batch_size: int | tuple[int, int] | None = None,
    fixed_batches: bool = False,
    key: Array | None = None,
) -> Hypergradient[X, Theta]:
    r"""Returns VRBO: K inner steps along SARAH recursions, which carry the hypergradient with them.

    Along the evaluation points :math:`z_0, z_1, \dots` with :math:`z = (x, \theta)`, K an update,

    .. math:: u_k &= u_{k-1} + \nabla_x f_i(z_k) - \nabla_x f_i(z_{k-1}), \quad
        d_k = d_{k-1} + g_i(z_k) - g_i(z_{k-1}), \quad x_{k+1} = x_k - a u_k \\
        g &= \nabla^2_{\theta x} f\, v + \nabla_\theta F, \quad
        v = -b \sum_{q=0}^{Q} \prod_{j=1}^{q} (I - b \nabla^2_{xx} f_j)\, \nabla_x F

    old and new point on the same minibatches; in every :math:`p`-th update, from the first on, the first of the K
    evaluations takes all rows instead. The gradient is the last d of the update.

    When: finite data, a smooth inner loss that is strongly convex in x. With constant steps the noise vanishes as it
    converges, linearly where the full-batch method does: not to the minimiser, but to where the gradient with the cut
    series vanishes, whose adjoint misses at most :math:`(1 - b \mu)^{Q+1}` of the true one for
    :math:`b \le 2 / (L + \mu)`. The data must be the same at each update.

    Args:
        inner: f, ``(x, theta, inner_data) -> scalar``, the mean over the rows it gets; without data ``(x, theta)``.
        outer: F, ``(x, theta, outer_data) -> scalar``, likewise.
        step_size: a > 0, a number, a schedule of the update number, or a function of theta; constant in the source,
            below 1/L with L the largest smoothness of a minibatch.
        adjoint_step_size: b > 0, likewise; None: that of x.
        num_steps: K, at least 1.
        num_adjoint_steps: Q, at least 1; of the order of the condition number times the digits wanted.
        refresh_every: p, at least 1, static; None: the number of rows over that of the rows of a draw, both of inner
            and outer data together, rounded down, at least 1.
        batch_size: rows of an inner and an outer minibatch, at least 1, or a pair. None: all rows.
        fixed_batches: draw one of the n / b contiguous batches of b rows instead of rows from everywhere: memory is
            read in one piece, which is some times faster where a minibatch is small. b must divide n; shuffle sorted
            data beforehand.
        key: of the draws; default ``jax.random.key(0)``.

    Raises:
        ValueError: a step size that is not positive, a count or batch size out of range.
        TypeError: a loss that is no function; at trace time, a loss that is not a real scalar, data that is not a pair.

    Cost: 2 K gradients, 2 K (Q + 1) Hessian-vector and 2 K cross products of f, 2 K gradients of F, on minibatches,
    and once in p updates one such series on all rows; the state holds three copies of x and one of theta.
    ``info.inner_residual`` is the norm of the direction that x takes.

    Source: Yang, Ji and Liang (2021), algorithm 2; x moves after each of K evaluations, so that the gradient belongs
    to the x before the last step, and the refresh takes all rows.

    Example:
        >>> import jax, odljax as odl
        >>> hyper = odl.hypergradients.vrbo(
        ...     lambda x, theta: 0.5 * (x - theta) ** 2, lambda x, theta: 0.5 * (x - 1.0) ** 2, step_size=0.5)
        >>> theta, state, update = 0.0, hyper.init(0.0, 0.0), jax.jit(hyper.update)
        >>> for _ in range(50):
        ...     gradient, state, info = update(theta, state)
        ...     theta = theta - 0.2 * gradient
        >>> round(float(theta), 3)
        1.0
    """
    who = "vrbo"
    inner_loss, outer_loss = losses(who, inner, outer)
    step = coefficient(who, "step_size", step_size)
    adjoint_step = step if adjoint_step_size is None else coefficient(who, "adjoint_step_size", adjoint_step_size)
    num_steps = count(who, "num_steps", num_steps)
    num_adjoint_steps = count(who, "num_adjoint_steps", num_adjoint_steps)
    if refresh_every is not None:
        count(who, "refresh_every", refresh_every)
    batches, everything = minibatches(who, batch_size, key, fixed_batches=fixed_batches), minibatches(who, None, None)

    def init(theta: Theta, x0: X, *data: Any) -> VRBOState:
        x, walk = start_inner(who, theta, x0), start_outer(theta)
        memory = (_tree.zeros_like(x), _tree.zeros_like(walk.theta))  # never read: the first update refreshes it
        return VRBOState(x, x, memory, batches.start(data), walk)

    def update(theta: Theta, state: VRBOState, *data: Any) -> tuple[Theta, VRBOState, Info]:
        theta = _tree.strong(theta)
        t = state.outer.t
        size, adjoint_size = step(theta, t), adjoint_step(theta, t)

        def evaluated(source: Any, points: tuple[Point, ...], draws: Any) -> tuple[tuple[Directions, ...], Any]:
            found, _, draws = implicit_directions(
                inner_loss, outer_loss, source, points, draws, data, step=adjoint_size, num_steps=num_adjoint_steps
            )
            return found, draws

        def moved(x: Any, memory: Any, d: Directions, draws: Any) -> _Pass:
            return _Pass(_tree.add_scaled(x, -size, memory[0]), x, memory, d.value, d.residual, draws)

        def whole(draws: Any) -> _Pass:
            (d,), draws = evaluated(everything, (Point(state.x, theta),), draws)
            return moved(state.x, (d.inner, d.outer), d, draws)

        def recursion(x: Any, last: Point, memory: Any, draws: Any) -> _Pass:
            (new, old), draws = evaluated(batches, (Point(x, theta), last), draws)
            memory = sarah(memory, (new.inner, new.outer), (old.inner, old.outer))
            return moved(x, memory, new, draws)

        def continued(draws: Any) -> _Pass:
            return recursion(state.x, Point(state.last_x, state.outer.theta), state.memory, draws)

        def body(p: _Pass, _: None) -> tuple[_Pass, None]:
            return recursion(p.x, Point(p.last_x, theta), p.memory, p.draws), None

        p = refreshed_or(refresh_period(who, refresh_every, batches, data), t, whole, continued, state.batches)
        p, _ = jax.lax.scan(body, p, length=num_steps - 1)
        slope, direction = p.memory
        return finish(
            who, direction, theta, state, VRBOState(p.x, p.last_x, p.memory, p.draws, state.outer),
            value=p.value, x=p.x,
            inner_residual=_tree.norm(slope), adjoint_residual=p.residual, num_steps=num_steps,
        )  # fmt: skip

    return Hypergradient(init, update, who, slope_of(who, inner, outer))
