"""Estimators that need no second derivative: a difference of gradients, and a rank-one Hessian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .. import _tree
from .._checks import coefficient, count
from .._types import Coefficient, State, Theta, X
from ._descent import gradient_walk
from ._estimator import (
    Hypergradient,
    Info,
    WalkState,
    conclude,
    keep_finite,
    losses,
    pair,
    relative,
    slope_of,
    start_inner,
    start_outer,
)


def finite_difference(
    inner: Callable[..., Any],
    outer: Callable[..., Any],
    *,
    step_size: Coefficient,
    num_steps: int = 1,
    radius: Coefficient = 0.01,
) -> Hypergradient[X, Theta]:
    r"""Returns the estimator of DARTS: the gradient through the last inner step, its cross product by a difference.

    With :math:`y` the iterate before the last inner step, :math:`x = y - s \nabla_x f(y, \theta)`,
    :math:`v = \nabla_x F(x, \theta)` and :math:`e = r / \|v\|`,

    .. math:: g = \nabla_\theta F(x, \theta)
        - s\, \frac{\nabla_\theta f(y + e v, \theta) - \nabla_\theta f(y - e v, \theta)}{2 e}

    When: second derivatives are not to be had, or cost too much. For :math:`r \to 0` it is
    ``truncated(solver, num_steps=1)``, with an error of order :math:`r^2` (none for quadratics, rounding apart). One
    step stands for the inverse Hessian, s for :math:`(\nabla^2_{xx} f)^{-1}`: biased by up to :math:`1 - s \mu` of the
    implicit term for a :math:`\mu`-strongly convex f and
    :math:`s \le 2 / (L + \mu)`, however long it runs. Where v = 0 the difference is zero.
    ``info.value`` is F at x; ``info.inner_residual`` is :math:`\|\nabla_x f(y, \theta)\|`, at y, where the difference
    is taken.

    Args:
        inner: f, ``(x, theta, inner_data) -> scalar``; without data ``(x, theta)``.
        outer: F, ``(x, theta, outer_data) -> scalar``, likewise.
        step_size: s > 0, a number, a schedule of the inner step, or a function of theta (whose own derivative is not
            taken); below 2/L.
        num_steps: inner steps an update, at least 1, from the last inner iterate.
        radius: r > 0, how far from y the difference is taken, in the norm of x.

    Raises:
        ValueError: a step size or radius that is not positive, a step count below 1.
        TypeError: a loss that is no function; at trace time, a loss that is not a real scalar, data that is not a pair.

    Cost: ``num_steps`` gradients of f in x, two in theta and one gradient of F; the state holds x.

    Source: Liu, Simonyan and Yang (2019), DARTS, equations 7 and 8. Differs: any number of inner steps, of which the
    last is differentiated.

    Example:
        >>> import odljax as odl
        >>> hyper = odl.hypergradients.finite_difference(
        ...     lambda x, theta: 0.5 * (x - theta) ** 2, lambda x, theta: 0.5 * (x - 1.0) ** 2, step_size=0.5)
        >>> theta, state = 0.0, hyper.init(0.0, 0.0)
        >>> for _ in range(100):
        ...     gradient, state, info = hyper.update(theta, state)
        ...     theta = theta - 0.2 * gradient
        >>> round(float(theta), 2)
        1.0
    """
    who = "finite_difference"
    inner_loss, outer_loss = losses(who, inner, outer)
    step = coefficient(who, "step_size", step_size)
    num_steps = count(who, "num_steps", num_steps)
    radius_at = coefficient(who, "radius", radius)

    def init(theta: Theta, x0: X, *data: Any) -> WalkState:
        pair(who, data)
        return WalkState(start_inner(who, theta, x0), start_outer(theta))

    def update(theta: Theta, state: WalkState, *data: Any) -> tuple[Theta, State, Info]:
        inner_data, outer_data = pair(who, data)
        y = gradient_walk(inner_loss, state.x, theta, inner_data, num_steps - 1, step, None)
        s = step(theta, jnp.asarray(num_steps - 1))
        slope = jax.grad(inner_loss)(y, theta, *inner_data)
        x = _tree.add_scaled(y, -s, slope)
        value, (v, direct) = jax.value_and_grad(outer_loss, argnums=(0, 1))(x, theta, *outer_data)
        size = _tree.norm(v)
        unit = _tree.scale(relative(jnp.ones_like(size), size), v)  # a zero v stays zero
        r = jnp.asarray(radius_at(theta, state.outer.t)).astype(size.dtype)

        def slope_at(distance: Any) -> Any:
            return jax.grad(inner_loss, argnums=1)(_tree.add_scaled(y, distance, unit), theta, *inner_data)

        difference = _tree.subtract(slope_at(r), slope_at(-r))
        weight = jnp.asarray(s).astype(size.dtype) * size / (2 * r)
        gradient, walk, info = conclude(
            who, _tree.add_scaled(direct, -weight, difference), theta, state.outer,
            value=value, x=x, inner_residual=_tree.norm(slope), num_steps=num_steps,
        )  # fmt: skip
        return gradient, WalkState(keep_finite(x, state.x), walk), info

    return Hypergradient(init, update, who, slope_of(who, inner, outer))


def rank_one(
    inner: Callable[..., Any],
    outer: Callable[..., Any],
    *,
    step_size: Coefficient,
    num_steps: int = 1,
) -> Hypergradient[X, Theta]:
    r"""Returns the estimator that takes the inner Hessian for the outer product of the inner gradient with itself.

    .. math:: g = \nabla_\theta F - \frac{\langle \nabla_x F, \nabla_x f \rangle}{\|\nabla_x f\|^2} \nabla_\theta f

    with :math:`\nabla^2_{xx} f \approx \nabla_x f \nabla_x f^\top` and
    :math:`\nabla^2_{\theta x} f \approx \nabla_\theta f \nabla_x f^\top`, all at the inner iterate.

    When: first derivatives only, and a crude direction is enough. Exact where x is one number and f a function of
    :math:`x - x(\theta)` alone; elsewhere only the component of :math:`\nabla_x F` along :math:`\nabla_x f` is passed
    on, a direction that depends on the way the inner iterate came, and no theorem bounds the error. It needs an inner
    problem that is *not* solved: at :math:`\nabla_x f = 0` the quotient is 0/0, the term is left out,
    ``info.inner_residual`` is zero, and :math:`g = \nabla_\theta F` is no hypergradient. Where the least value of f
    depends on theta, :math:`\nabla_\theta f` does not vanish with :math:`\nabla_x f` and g grows without bound.

    Args:
        inner: f, ``(x, theta, inner_data) -> scalar``; without data ``(x, theta)``.
        outer: F, ``(x, theta, outer_data) -> scalar``, likewise.
        step_size: s > 0 of the inner steps, a number, a schedule of the inner step, or a function of theta; below 2/L.
        num_steps: inner steps an update, at least 1, from the last inner iterate.

    Raises:
        ValueError: a step size that is not positive, a step count below 1.
        TypeError: a loss that is no function; at trace time, a loss that is not a real scalar, data that is not a pair.

    Cost: ``num_steps`` gradients of f in x, one full gradient of each loss; the state holds x.

    Source: Liu, Gao, Liu and Fan (2024), Learning with constraint learning (IGA).

    Example:
        >>> import odljax as odl
        >>> hyper = odl.hypergradients.rank_one(
        ...     lambda x, theta: 0.5 * (x - theta) ** 2, lambda x, theta: 0.5 * (x - 1.0) ** 2, step_size=0.5)
        >>> gradient, state, info = hyper.update(0.0, hyper.init(0.0, 0.8))
        >>> round(float(gradient), 4)  # x = 0.4, F' = -0.6, and x(theta) moves with theta
        -0.6
    """
    who = "rank_one"
    inner_loss, outer_loss = losses(who, inner, outer)
    step = coefficient(who, "step_size", step_size)
    num_steps = count(who, "num_steps", num_steps)

    def init(theta: Theta, x0: X, *data: Any) -> WalkState:
        pair(who, data)
        return WalkState(start_inner(who, theta, x0), start_outer(theta))

    def update(theta: Theta, state: WalkState, *data: Any) -> tuple[Theta, State, Info]:
        inner_data, outer_data = pair(who, data)
        x = gradient_walk(inner_loss, state.x, theta, inner_data, num_steps, step, None)
        slope, inner_cross = jax.grad(inner_loss, argnums=(0, 1))(x, theta, *inner_data)
        value, (v, direct) = jax.value_and_grad(outer_loss, argnums=(0, 1))(x, theta, *outer_data)
        squared = _tree.vdot(slope, slope)
        ratio = relative(_tree.vdot(v, slope), squared)  # zero where the slope is
        gradient, walk, info = conclude(
            who, _tree.add_scaled(direct, -ratio, inner_cross), theta, state.outer,
            value=value, x=x, inner_residual=_tree.norm(slope), num_steps=num_steps,
        )  # fmt: skip
        return gradient, WalkState(keep_finite(x, state.x), walk), info

    return Hypergradient(init, update, who, slope_of(who, inner, outer))
