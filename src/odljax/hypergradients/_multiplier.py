"""One loop on the average of both losses, with a multiplier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .. import _tree
from .._checks import coefficient, number
from .._types import Coefficient, Scalar, State, Step, Theta, X
from ._descent import constraint, stationarity, step_along
from ._estimator import (
    Hypergradient,
    Info,
    Outer,
    both,
    conclude,
    keep_finite,
    losses,
    pair,
    relative,
    slope_of,
    start_inner,
    start_outer,
)

TAU = 1 / 40


class BAMMState(NamedTuple):
    """The inner iterate, the multiplier and the outer walk."""

    x: Any
    adjoint: Any
    outer: Outer


def _weight(k: Step) -> Array:
    return 0.9 * (k.astype(float) + 1.0) ** -0.1


def bamm(
    inner: Callable[..., Any],
    outer: Callable[..., Any],
    *,
    step_size: Coefficient = 0.1,
    adjoint_step_size: Coefficient | None = None,
    weight: Coefficient = _weight,
    projection: Callable[[X, Theta], X] | None = None,
) -> Hypergradient[X, Theta]:
    r"""Returns sl-BAMM: one loop in which x descends an average of both losses and v follows its Newton system.

    .. math::
        \psi_k &= \mu_k F + (1 - \mu_k) f \\
        x &\mathrel{-}= s\, \nabla_x \psi_k, \quad
        v \mathrel{-}= \eta_k\, (\nabla^2_{xx} \psi_k\, v - \nabla_x F), \quad
        g = \nabla_\theta F - \nabla^2_{\theta x} \psi_k\, v

    all three evaluated at the old :math:`(x, v, \theta)`.

    When: the inner loss is convex, but not strictly: as :math:`\mu_k \to 0` slowly, the outer loss chooses among the
    inner solutions. Assumes F strongly convex in x; :math:`s (L_f + L_F) < 2`. For a constant weight
    the fixed point is that of the averaged problem, off by the order of :math:`\mu`; ``weight=0`` is deterministic
    SOBA with the opposite sign of v.

    Args:
        inner: f, ``(x, theta, inner_data) -> scalar``; without data ``(x, theta)``.
        outer: F, ``(x, theta, outer_data) -> scalar``, likewise.
        step_size: s > 0, a number, a schedule of the update number k, or a function of theta.
        adjoint_step_size: :math:`\eta_k > 0`, likewise. None: :math:`s\, (k + 1)^{-\tau / 2}` with
            :math:`\tau = 1/40`, as in the paper.
        weight: :math:`\mu_k` in [0, 1), likewise; default :math:`0.9\, (k + 1)^{-1/10}`, the paper's.
        projection: ``(x, theta) -> x``, onto the constraint set of x. None: no constraint.

    The outer step belongs to optax; ``optax.sgd(odl.hypergradients.bamm_rate())`` is the paper's.

    Raises:
        ValueError: a step size that is not positive, a weight outside [0, 1).
        TypeError: a loss that is no function; at trace time, a loss that is not a real scalar, data that is not a pair.

    Cost: one gradient of each loss, and one Hessian-vector and cross product of their average; the state holds x and v.

    Source: Liu, Liu, Yao, Zeng and Zhang (2023), arXiv 2302.03407, algorithm 1.

    Example:
        >>> import jax, jax.numpy as jnp, odljax as odl
        >>> f = lambda x, theta: 0.5 * x[0] ** 2 - theta * x[0]  # x[1] is free
        >>> F = lambda x, theta: 0.5 * jnp.sum((x - 1.0) ** 2)
        >>> hyper = odl.hypergradients.bamm(f, F, step_size=0.5)
        >>> update, theta, state = jax.jit(hyper.update), 0.0, hyper.init(0.0, jnp.zeros(2))
        >>> for _ in range(600):
        ...     gradient, state, info = update(theta, state)
        ...     theta = theta - 0.1 * gradient
        >>> round(float(theta), 2), round(float(state.x[1]), 2)
        (1.0, 1.0)
    """
    who = "bamm"
    inner_loss, outer_loss = losses(who, inner, outer)
    step = coefficient(who, "step_size", step_size)
    weigh = coefficient(who, "weight", weight, high=1.0, closed=True)
    project = constraint(who, projection)

    def default_adjoint_step(theta: Any, k: Step) -> Array:
        decay = (k.astype(float) + 1.0) ** (-TAU / 2)
        return jnp.asarray(step(theta, k)).astype(decay.dtype) * decay

    adjoint_step = coefficient(
        who, "adjoint_step_size", default_adjoint_step if adjoint_step_size is None else adjoint_step_size
    )

    def init(theta: Theta, x0: X, *data: Any) -> BAMMState:
        pair(who, data)
        x = start_inner(who, theta, x0)
        return BAMMState(x, _tree.zeros_like(x), start_outer(theta))

    def update(theta: Theta, state: BAMMState, *data: Any) -> tuple[Theta, State, Info]:
        inner_data, outer_data = pair(who, data)
        x, v, t = state.x, state.adjoint, state.outer.t
        mu, s = weigh(theta, t), step(theta, t)

        def slopes(x: X, theta: Theta) -> Any:
            """grad_x psi; and, beside it, what else the losses give on the way."""
            slope = jax.grad(inner_loss)(x, theta, *inner_data)
            value, x_gradient, theta_gradient = both(outer_loss, x, theta, outer_data)
            mixed = _tree.add_scaled(_tree.scale(1 - mu, slope), mu, x_gradient)
            return mixed, (slope, value, x_gradient, theta_gradient)

        mixed, pull, (slope, value, x_gradient, theta_gradient) = jax.vjp(slopes, x, theta, has_aux=True)
        curvature, cross = pull(v)
        miss = _tree.subtract(curvature, x_gradient)
        gradient, walk, info = conclude(
            who, _tree.subtract(theta_gradient, cross), theta, state.outer,
            value=value,
            x=step_along(x, s, mixed, theta, project),
            inner_residual=stationarity(x, slope, theta, s, project),
            adjoint_residual=relative(_tree.norm(miss), _tree.norm(x_gradient)),
        )  # fmt: skip
        v = keep_finite(_tree.add_scaled(v, -adjoint_step(theta, t), miss), v)
        return gradient, BAMMState(keep_finite(info.x, x), v, walk), info

    return Hypergradient(init, update, who, slope_of(who, inner, outer, projection))


def bamm_rate(scale: Scalar = 0.1, *, tau: Scalar = TAU) -> Callable[[Any], Array]:
    r"""Returns the outer step of sl-BAMM as an optax schedule.

    .. math:: \alpha_k = s\, (k + 1)^{-3 \tau / 2} \mu_k^3, \quad \mu_k = 0.9\, (k + 1)^{-1/10}

    Args:
        scale: s > 0; the paper takes the step of x.
        tau: :math:`\tau` in (0, 1).

    Raises:
        ValueError: an argument out of range.

    Source: Liu, Liu, Yao, Zeng and Zhang (2023), arXiv 2302.03407.

    Example:
        >>> import odljax as odl
        >>> round(float(odl.hypergradients.bamm_rate()(0)), 4)
        0.0729
    """
    number("bamm_rate", "scale", scale)
    number("bamm_rate", "tau", tau, high=1.0)

    def rate(count: Any) -> Array:
        k = jnp.asarray(count)
        return scale * (k.astype(float) + 1.0) ** (-1.5 * tau) * _weight(k) ** 3

    return rate
