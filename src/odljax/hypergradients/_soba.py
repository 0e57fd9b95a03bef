"""One loop for the three variables: inner, adjoint and outer move together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array

from .. import _tree
from .._checks import coefficient
from .._types import Coefficient, State, Theta, X
from ._directions import directions
from ._estimator import Hypergradient, Info, Outer, finish, losses, slope_of, start_inner, start_outer
from ._minibatches import minibatches


class SOBAState(NamedTuple):
    """The inner iterate, the adjoint iterate, the samplers and the outer walk."""

    x: Any
    adjoint: Any
    batches: Any
    outer: Outer


def soba(
    inner: Callable[..., Any],
    outer: Callable[..., Any],
    *,
    step_size: Coefficient,
    adjoint_step_size: Coefficient | None = None,
    batch_size: int | tuple[int, int] | None = None,
    fixed_batches: bool = False,
    key: Array | None = None,
) -> Hypergradient[X, Theta]:
    r"""Returns SOBA: inner, adjoint and outer variable each take one stochastic step, at the same point.

    .. math:: x \mathrel{-}= a \nabla_x f, \quad v \mathrel{-}= b\,(\nabla^2_{xx} f\, v + \nabla_x F), \quad
        g = \nabla^2_{\theta x} f\, v + \nabla_\theta F

    all three evaluated at the old :math:`(x, v, \theta)`; v approaches :math:`-(\nabla^2_{xx} f)^{-1} \nabla_x F`.

    When: large data, a smooth inner loss that is strongly convex in x. No loop inside a loop and no linear solve: one
    Hessian-vector product an update. With constant steps it ends at a noise floor; let all three decay like
    :math:`t^{-1/2}`. Without batches it is the deterministic single loop, which converges linearly.

    Args:
        inner: f, ``(x, theta, inner_data) -> scalar``, the mean over the rows it gets; without data ``(x, theta)``.
        outer: F, ``(x, theta, outer_data) -> scalar``, likewise.
        step_size: a > 0, a number, a schedule of the update number, or a function of theta; below 2/L.
        adjoint_step_size: b > 0, likewise; None: that of x.
        batch_size: rows of an inner and an outer minibatch, at least 1, or a pair. None: all rows.
        fixed_batches: draw one of the n / b contiguous batches of b rows instead of rows from everywhere: memory is
            read in one piece, which is some times faster where a minibatch is small. b must divide n; shuffle sorted
            data beforehand.
        key: of the draws; default ``jax.random.key(0)``.

    Raises:
        ValueError: a step size that is not positive, a batch size out of range.
        TypeError: a loss that is no function; at trace time, a loss that is not a real scalar, data that is not a pair.

    Cost: one gradient, one Hessian-vector and one cross product of f, one gradient of F, on minibatches; the state
    holds x and v.

    Source: Dagreou, Ablin, Vaiter and Moreau (2022), algorithm 1 with SGD directions.

    Example:
        >>> import jax, odljax as odl
        >>> hyper = odl.hypergradients.soba(
        ...     lambda x, theta: 0.5 * (x - theta) ** 2, lambda x, theta: 0.5 * (x - 1.0) ** 2, step_size=0.5)
        >>> theta, state, update = 0.0, hyper.init(0.0, 0.0), jax.jit(hyper.update)
        >>> for _ in range(100):
        ...     gradient, state, info = update(theta, state)
        ...     theta = theta - 0.1 * gradient
        >>> round(float(theta), 3)
        1.0
    """
    who = "soba"
    inner_loss, outer_loss = losses(who, inner, outer)
    step = coefficient(who, "step_size", step_size)
    adjoint_step = step if adjoint_step_size is None else coefficient(who, "adjoint_step_size", adjoint_step_size)
    batches = minibatches(who, batch_size, key, fixed_batches=fixed_batches)

    def init(theta: Theta, x0: X, *data: Any) -> SOBAState:
        x = start_inner(who, theta, x0)
        return SOBAState(x, _tree.zeros_like(x), batches.start(data), start_outer(theta))

    def update(theta: Theta, state: SOBAState, *data: Any) -> tuple[Theta, State, Info]:
        x, v, t = state.x, state.adjoint, state.outer.t
        inner_data, draws = batches.inner(state.batches, data)
        outer_data, draws = batches.outer(draws, data)
        d = directions(inner_loss, outer_loss, x, v, theta, inner_data, outer_data)
        x = _tree.add_scaled(x, -step(theta, t), d.inner)
        v = _tree.add_scaled(v, -adjoint_step(theta, t), d.adjoint)
        return finish(
            who, d.outer, theta, state, SOBAState(x, v, draws, state.outer),
            value=d.value, x=x, inner_residual=_tree.norm(d.inner), adjoint_residual=d.residual,
        )  # fmt: skip

    return Hypergradient(init, update, who, slope_of(who, inner, outer))
