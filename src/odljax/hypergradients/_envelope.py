"""Penalties that are differences to a proximal point: the Moreau envelope and the regularised gap function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .. import _tree
from .._checks import as_inner, coefficient, is_callable, number, same_as, scalar
from .._types import Coefficient, Scalar, State, Step, Theta, X
from ._descent import constraint, like, stationarity, step_along
from ._estimator import (
    Hypergradient,
    Info,
    Outer,
    both,
    conclude,
    keep_finite,
    losses,
    pair,
    slope_of,
    start_inner,
    start_outer,
)


class MEHAState(NamedTuple):
    """The inner iterate, the approximate proximal point of it, and the outer walk."""

    x: Any
    proximal_point: Any
    outer: Outer


class GapState(NamedTuple):
    """The inner iterate, its proximal point, the multiplier of the constraints (None: none) and the outer walk."""

    x: Any
    proximal_point: Any
    multiplier: Any
    outer: Outer


def _penalty(k: Step) -> Array:
    return (k.astype(float) + 1.0) ** 0.25


def meha(
    inner: Callable[..., Any],
    outer: Callable[..., Any],
    *,
    step_size: Coefficient,
    proximal_step_size: Coefficient | None = None,
    smoothing: Coefficient = 1.0,
    penalty: Coefficient = _penalty,
    prox: Callable[[X, Theta, Any], X] | None = None,
    nonsmooth: Callable[..., Any] | None = None,
    projection: Callable[[X, Theta], X] | None = None,
) -> Hypergradient[X, Theta]:
    r"""Returns MEHA: a penalty on how far the inner objective lies above its own Moreau envelope.

    With the inner objective :math:`\varphi = f + h`, f smooth, and its envelope :math:`v_\gamma(x, \theta) = \min_w
    \varphi(w, \theta) + \|w - x\|^2 / (2 \gamma)`, the problem is :math:`\min F / c_k + \varphi - v_\gamma`:

    .. math::
        w &\leftarrow \operatorname{prox}_{\eta h}\bigl(w - \eta(\nabla_x f(w, \theta) + (w - x) / \gamma)\bigr) \\
        g &= \nabla_\theta \bigl[F(x, \theta) / c_k + \varphi(x, \theta) - \varphi(w, \theta)\bigr] \\
        x &\leftarrow \operatorname{prox}_{s h}\bigl(x - s(\nabla_x F / c_k + \nabla_x f(x, \theta) - (x - w) /
        \gamma)\bigr)

    By the envelope theorem the theta-derivative of :math:`v_\gamma` is that of :math:`\varphi(w, \theta)` with w held,
    the non-smooth part included. :math:`c_k\, g` approaches the hypergradient as :math:`c_k` grows.

    When: first-order information only; an inner objective that is non-smooth, or weakly convex
    (:math:`\gamma < 1 / (2 \rho)`), with several solutions: the outer loss chooses. Assumes :math:`\eta < 2 / (L + 1 /
    \gamma)`. The inner constraint is violated by the order of :math:`1/c_k`.

    Args:
        inner: f, ``(x, theta, inner_data) -> scalar``, the smooth part; without data ``(x, theta)``.
        outer: F, ``(x, theta, outer_data) -> scalar``, likewise.
        step_size: s > 0, a number, a schedule of the update number k, or a function of theta.
        proximal_step_size: :math:`\eta > 0`, likewise. None: that of x.
        smoothing: :math:`\gamma > 0`, likewise.
        penalty: :math:`c_k > 0`, likewise; default :math:`(k + 1)^{1/4}`. The theory asks for :math:`c_0 (k + 1)^p`, p
            in (0, 1/2).
        prox: of h, ``(v, theta, step_size) -> x``. None: h = 0.
        nonsmooth: h, ``(x, theta) -> scalar``; needed with ``prox``, for its derivative in theta.
        projection: ``(x, theta) -> x``, in place of ``prox``: h is the indicator of a set that must not move with
            theta.

    Returns:
        An estimator whose gradient is scaled as the paper's, by :math:`1/c_k`.

    Raises:
        ValueError: a coefficient that is not positive.
        TypeError: ``prox`` without ``nonsmooth`` or beside ``projection``; a loss that is no function; at trace time, a
            loss that is not a real scalar, data that is not a pair.

    Cost: one gradient of F, two of f in both variables, two proximal steps and a third for the residual; the state
    holds x and w.

    Source: Liu, Liu, Yao, Zeng and Zhang (2024), arXiv 2405.09927, algorithm 1. Differs: x moves at the old theta,
    because the new one is made outside.

    Example:
        >>> import jax, odljax as odl
        >>> hyper = odl.hypergradients.meha(
        ...     lambda x, theta: 0.5 * (x - 3.0) ** 2, lambda x, theta: 0.5 * (x - 1.0) ** 2, step_size=0.1,
        ...     penalty=20.0, prox=odl.prox.l1, nonsmooth=lambda x, theta: theta * abs(x))
        >>> update, theta, state = jax.jit(hyper.update), 0.0, hyper.init(0.0, 0.0)
        >>> for _ in range(1500):
        ...     gradient, state, info = update(theta, state)
        ...     theta = theta - 0.2 * gradient
        >>> round(float(theta), 2)
        2.0
    """
    who = "meha"
    inner_loss, outer_loss = losses(who, inner, outer)
    step = coefficient(who, "step_size", step_size)
    proximal_step = step if proximal_step_size is None else coefficient(who, "proximal_step_size", proximal_step_size)
    smooth_by = coefficient(who, "smoothing", smoothing)
    penalise = coefficient(who, "penalty", penalty)
    project = constraint(who, projection)
    if (prox is None) != (nonsmooth is None):
        raise TypeError(
            f"{who}: prox and nonsmooth describe the same function and come together, because its derivative in theta "
            f"is part of the gradient; {'nonsmooth' if prox is None else 'prox'} came alone. Pass both, or, for the "
            f"indicator of a fixed set, projection."
        )
    if prox is not None:
        if project is not None:
            raise TypeError(f"{who}: prox and projection came; the prox of a sum is not their composition. Pass one.")
        is_callable(who, "prox", prox, "v, theta, step_size")
        is_callable(who, "nonsmooth", nonsmooth, "x, theta")

    def backward(v: X, theta: Theta, size: Any) -> X:
        if prox is not None:
            return same_as(who, "prox", prox(v, theta, size), v)
        return v if project is None else project(v, theta)

    def theta_slope(x: X, theta: Theta, smooth_part: Theta) -> Theta:
        """The derivative of f + h in theta, x held."""
        if nonsmooth is None:
            return smooth_part
        h = nonsmooth
        part = jax.grad(lambda theta: scalar(who, "nonsmooth", h(x, theta)))(theta)
        return _tree.add(smooth_part, part)

    def init(theta: Theta, x0: X, *data: Any) -> MEHAState:
        pair(who, data)
        x = start_inner(who, theta, x0)
        return MEHAState(x, x, start_outer(theta))

    def update(theta: Theta, state: MEHAState, *data: Any) -> tuple[Theta, State, Info]:
        inner_data, outer_data = pair(who, data)
        theta = _tree.strong(theta)
        x, w, t = state.x, state.proximal_point, state.outer.t
        s, eta, c = step(theta, t), proximal_step(theta, t), penalise(theta, t)
        pull_back = 1 / smooth_by(theta, t)
        slope = jax.grad(inner_loss)(w, theta, *inner_data)
        slope = _tree.add_scaled(slope, pull_back, _tree.subtract(w, x))
        w = backward(_tree.add_scaled(w, -eta, slope), theta, eta)
        value, F_x, F_theta = both(outer_loss, x, theta, outer_data)
        _, f_x, f_theta = both(inner_loss, x, theta, inner_data)
        at_w = jax.grad(inner_loss, argnums=1)(w, theta, *inner_data)
        penalty_slope = _tree.subtract(theta_slope(x, theta, f_theta), theta_slope(w, theta, at_w))
        direction = _tree.add_scaled(f_x, 1 / c, F_x)
        direction = _tree.add_scaled(direction, -pull_back, _tree.subtract(x, w))
        residual = _tree.norm(f_x)
        if prox is not None or project is not None:
            residual = _tree.norm(_tree.subtract(x, backward(_tree.add_scaled(x, -s, f_x), theta, s)))
            residual = residual / like(s, residual)
        gradient, walk, info = conclude(
            who, _tree.add_scaled(penalty_slope, 1 / c, F_theta), theta, state.outer,
            value=value, x=backward(_tree.add_scaled(x, -s, direction), theta, s), inner_residual=residual,
        )  # fmt: skip
        return gradient, MEHAState(keep_finite(info.x, x), keep_finite(w, state.proximal_point), walk), info

    return Hypergradient(init, update, who, slope_of(who, inner, outer, prox, projection))


def gap_function(
    inner: Callable[..., Any],
    outer: Callable[..., Any],
    *,
    step_size: Coefficient,
    proximal_step_size: Coefficient | None = None,
    multiplier_step_size: Coefficient | None = None,
    smoothing: Coefficient = 1.0,
    multiplier_smoothing: Coefficient = 1.0,
    penalty: Coefficient = _penalty,
    constraints: Callable[[X, Theta], Any] | None = None,
    projection: Callable[[X, Theta], X] | None = None,
    multiplier_bound: Scalar | None = None,
) -> Hypergradient[X, Theta]:
    r"""Returns BiC-GAFFA: a penalty on the doubly regularised gap of the inner Lagrangian, for inner constraints.

    The inner problem is :math:`\min_x f(x, \theta)` subject to :math:`h(x, \theta) \le 0` and x in C. With the
    Lagrangian :math:`L(x, \theta; z) = f + z^\top h`, the gap

    .. math:: G = \max_{w \in C,\ \lambda \ge 0}\ L(x, \theta; \lambda) - \tfrac{1}{2 \gamma_2} \|\lambda - z\|^2
        - L(w, \theta; z) - \tfrac{1}{2 \gamma_1} \|w - x\|^2

    is never negative, and zero where (x, z) is a saddle point. One update:

    .. math::
        w &\leftarrow P_C\bigl(w - \eta(\nabla_x L(w, \theta; z) + (w - x) / \gamma_1)\bigr), \quad
        \lambda = (z + \gamma_2 h(x, \theta))_+ \\
        g &= \nabla_\theta \bigl[F / c_k + L(x, \theta; \lambda) - L(w, \theta; z)\bigr] \\
        x &\leftarrow P_C\bigl(x - s(\nabla_x F / c_k + \nabla_x L(x, \theta; \lambda) - (x - w) / \gamma_1)\bigr) \\
        z &\leftarrow \bigl(z - r((\lambda - z) / \gamma_2 - h(w, \theta))\bigr)_{[0, b]}

    When: the inner problem is convex with constraints that may move with theta, and only first derivatives are to be
    had. Without ``constraints`` it is ``meha`` on the smooth part over C. :math:`c_k\, g` approaches the hypergradient
    as :math:`c_k` grows; the inner optimality is violated by the order of :math:`1 / c_k`.

    Args:
        inner: f, ``(x, theta, inner_data) -> scalar``; without data ``(x, theta)``.
        outer: F, ``(x, theta, outer_data) -> scalar``, likewise.
        step_size: s > 0, a number, a schedule of the update number k, or a function of theta.
        proximal_step_size: :math:`\eta > 0`, likewise. None: that of x.
        multiplier_step_size: r > 0, likewise. None: that of x.
        smoothing: :math:`\gamma_1 > 0`, likewise.
        multiplier_smoothing: :math:`\gamma_2 > 0`, likewise.
        penalty: :math:`c_k > 0`, likewise; default :math:`(k + 1)^{1/4}`.
        constraints: h, ``(x, theta) -> array or tree``, convex in x. None: none.
        projection: :math:`P_C`, ``(x, theta) -> x``, onto a set that does not move with theta. None: no such set.
        multiplier_bound: b > 0. None: no bound.

    Returns:
        An estimator whose gradient is scaled as the paper's, by :math:`1/c_k`. ``info.inner_residual`` is that of
        :math:`L(\cdot, \theta; \lambda)`.

    Raises:
        ValueError: a coefficient or a bound that is not positive.
        TypeError: a loss that is no function; at trace time, a loss that is not a real scalar, data that is not a pair.

    Cost: one gradient of F, two of f and of h in both variables; the state holds x, w and z.

    Source: Yao, Yin, Zeng and Zhang (2024), arXiv 2406.01992, algorithm 1. Differs: x and z move at the old theta,
    because the new one is made outside.

    Example:
        >>> import jax, odljax as odl
        >>> hyper = odl.hypergradients.gap_function(  # x = theta: the constraint x <= theta is active
        ...     lambda x, theta: 0.5 * (x - 3.0) ** 2, lambda x, theta: 0.5 * (x - 1.0) ** 2,
        ...     step_size=0.1, penalty=20.0, constraints=lambda x, theta: x - theta)
        >>> update, theta, state = jax.jit(hyper.update), 0.0, hyper.init(0.0, 0.0)
        >>> for _ in range(2000):
        ...     gradient, state, info = update(theta, state)
        ...     theta = theta - 0.1 * gradient
        >>> round(float(theta), 2)
        1.0
    """
    who = "gap_function"
    inner_loss, outer_loss = losses(who, inner, outer)
    step = coefficient(who, "step_size", step_size)
    proximal_step = step if proximal_step_size is None else coefficient(who, "proximal_step_size", proximal_step_size)
    multiplier_step = (
        step if multiplier_step_size is None else coefficient(who, "multiplier_step_size", multiplier_step_size)
    )
    smooth_by = coefficient(who, "smoothing", smoothing)
    multiplier_smooth_by = coefficient(who, "multiplier_smoothing", multiplier_smoothing)
    penalise = coefficient(who, "penalty", penalty)
    project = constraint(who, projection)
    if constraints is not None:
        is_callable(who, "constraints", constraints, "x, theta")
    if multiplier_bound is not None:
        number(who, "multiplier_bound", multiplier_bound)

    def positive(z: Any) -> Any:
        bound = jnp.inf if multiplier_bound is None else multiplier_bound
        return jax.tree.map(lambda leaf: jnp.clip(leaf, 0, jnp.asarray(bound).astype(leaf.dtype)), z)

    def levels(x: X, theta: Theta) -> tuple[Any, Callable[[Any], tuple[Any, Any]]]:
        """h(x, theta), and what a multiplier makes of its derivatives in x and theta."""
        h: Any = constraints
        return jax.vjp(lambda x, theta: as_inner(who, "the constraints", h(x, theta)), x, theta)

    def init(theta: Theta, x0: X, *data: Any) -> GapState:
        pair(who, data)
        x = start_inner(who, theta, x0)
        z = None if constraints is None else _tree.zeros_like(levels(x, theta)[0])
        return GapState(x, x, z, start_outer(theta))

    def update(theta: Theta, state: GapState, *data: Any) -> tuple[Theta, State, Info]:
        inner_data, outer_data = pair(who, data)
        theta = _tree.strong(theta)
        x, w, z, t = state.x, state.proximal_point, state.multiplier, state.outer.t
        s, c, pull_back = step(theta, t), penalise(theta, t), 1 / smooth_by(theta, t)

        def lagrangian(x: X, multiplier: Any) -> tuple[Any, Any, Any]:
            """Its gradients in x and theta for a multiplier that may depend on h(x), and that multiplier."""
            _, x_slope, theta_slope = both(inner_loss, x, theta, inner_data)
            if constraints is None:
                return x_slope, theta_slope, None
            h, pull = levels(x, theta)
            chosen = multiplier(h)
            x_part, theta_part = pull(chosen)
            return _tree.add(x_slope, x_part), _tree.add(theta_slope, theta_part), (h, chosen)

        slope, _, _ = lagrangian(w, lambda h: z)
        slope = _tree.add_scaled(slope, pull_back, _tree.subtract(w, x))
        w = step_along(w, proximal_step(theta, t), slope, theta, project)
        g2 = multiplier_smooth_by(theta, t)
        plain = lambda v: jax.tree.map(lambda leaf: jnp.maximum(leaf, 0), v)  # noqa: E731
        value, F_x, F_theta = both(outer_loss, x, theta, outer_data)
        L_x, L_theta, above = lagrangian(x, lambda h: plain(_tree.add_scaled(z, g2, h)))
        _, below_theta, below = lagrangian(w, lambda h: z)
        direction = _tree.add_scaled(L_x, 1 / c, F_x)
        direction = _tree.add_scaled(direction, -pull_back, _tree.subtract(x, w))
        if above is not None and below is not None:
            z_slope = _tree.subtract(_tree.scale(1 / g2, _tree.subtract(above[1], z)), below[0])
            z = positive(_tree.add_scaled(z, -multiplier_step(theta, t), z_slope))
        penalty_slope = _tree.subtract(L_theta, below_theta)
        gradient, walk, info = conclude(
            who, _tree.add_scaled(penalty_slope, 1 / c, F_theta), theta, state.outer,
            value=value, x=step_along(x, s, direction, theta, project),
            inner_residual=stationarity(x, L_x, theta, s, project),
        )  # fmt: skip
        w, z = keep_finite((w, z), (state.proximal_point, state.multiplier))
        return gradient, GapState(keep_finite(info.x, x), w, z, walk), info

    return Hypergradient(init, update, who, slope_of(who, inner, outer, projection, constraints))
