"""The baseline that ignores how the inner solution answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from .._checks import coefficient, count
from .._types import Coefficient, State, Theta, X
from ._descent import constraint, gradient_walk, stationarity
from ._estimator import (
    Hypergradient,
    Info,
    WalkState,
    conclude,
    keep_finite,
    losses,
    pair,
    slope_of,
    start_inner,
    start_outer,
)


def alternating(
    inner: Callable[..., Any],
    outer: Callable[..., Any],
    *,
    step_size: Coefficient,
    num_steps: int = 1,
    projection: Callable[[X, Theta], X] | None = None,
) -> Hypergradient[X, Theta]:
    r"""Returns alternating descent: a step of x on the inner loss, then the partial derivative of the outer one.

    .. math:: x \leftarrow P(x - a \nabla_x f(x, \theta)), \quad g = \nabla_\theta F(x, \theta)

    When: as a baseline. It ends where :math:`\nabla_x f = 0` and :math:`\nabla_\theta F = 0`, an equilibrium of the
    two players that is not a solution of the bilevel problem: wrong wherever the inner solution moves with theta and
    F depends on it. Right if F does not depend on x at all, or if f = F.

    Args:
        inner: f, ``(x, theta, inner_data) -> scalar``; without data ``(x, theta)``.
        outer: F, ``(x, theta, outer_data) -> scalar``, likewise.
        step_size: a > 0, a number, a schedule of the update number, or a function of theta; below 2/L.
        num_steps: inner steps an update, at least 1, static.
        projection: P, ``(x, theta) -> x``, onto the constraint set of x. None: no constraint.

    Raises:
        ValueError: a step size that is not positive, a count below 1.
        TypeError: a loss that is no function; at trace time, a loss that is not a real scalar, data that is not a pair.

    Cost: ``num_steps`` gradients of f in x and one for ``info.inner_residual``; one of F in theta; the state holds x.

    Source: folklore; its failure is the reason for bilevel methods.

    Example:
        >>> import jax, odljax as odl
        >>> hyper = odl.hypergradients.alternating(
        ...     lambda x, theta: 0.5 * (x - theta) ** 2,
        ...     lambda x, theta: 0.5 * (x - 1.0) ** 2 + 0.5 * theta**2, step_size=0.5)
        >>> update, theta, state = jax.jit(hyper.update), 1.0, hyper.init(1.0, 0.0)
        >>> for _ in range(100):
        ...     gradient, state, info = update(theta, state)
        ...     theta = theta - 0.1 * gradient
        >>> round(float(theta), 3)  # the solution is 0.5
        0.0
    """
    who = "alternating"
    inner_loss, outer_loss = losses(who, inner, outer)
    step = coefficient(who, "step_size", step_size)
    num_steps = count(who, "num_steps", num_steps)
    project = constraint(who, projection)

    def init(theta: Theta, x0: X, *data: Any) -> WalkState:
        pair(who, data)
        return WalkState(start_inner(who, theta, x0), start_outer(theta))

    def update(theta: Theta, state: WalkState, *data: Any) -> tuple[Theta, State, Info]:
        inner_data, outer_data = pair(who, data)
        a = step(theta, state.outer.t)
        x = gradient_walk(inner_loss, state.x, theta, inner_data, num_steps, lambda theta, k: a, project)
        slope = jax.grad(inner_loss)(x, theta, *inner_data)
        value, gradient = jax.value_and_grad(outer_loss, argnums=1)(x, theta, *outer_data)
        gradient, walk, info = conclude(
            who, gradient, theta, state.outer,
            value=value, x=x, inner_residual=stationarity(x, slope, theta, a, project), num_steps=num_steps,
        )  # fmt: skip
        return gradient, WalkState(keep_finite(x, state.x), walk), info

    return Hypergradient(init, update, who, slope_of(who, inner, outer, projection))
