"""The inner problem as a constraint on its value, f(x, theta) <= min f: barrier, dynamic barrier and penalty."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .. import _tree
from .._checks import coefficient, count
from .._types import Coefficient, State, Step, Theta, X
from ._descent import constraint, gradient_walk, like, stationarity, step_along
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


class BVFSMState(NamedTuple):
    """The inner iterate, the minimiser of the inner loss, and the outer walk."""

    x: Any
    minimiser: Any
    outer: Outer


class ValueGapState(NamedTuple):
    """The inner iterate, the end of the last inner walk (None: it is not kept) and the outer walk."""

    x: Any
    minimiser: Any
    outer: Outer


def _harmonic(k: Step) -> Array:
    return 1.0 / (k.astype(float) + 1.0)


def _barrier(k: Step) -> Array:
    return 0.3 * _harmonic(k) ** 0.5


def _hundredth(k: Step) -> Array:
    return 0.01 * _harmonic(k)


def _ramp(k: Step) -> Array:
    return (k.astype(float) + 1.0) ** 0.5


def bvfsm(
    inner: Callable[..., Any],
    outer: Callable[..., Any],
    *,
    step_size: Coefficient,
    num_steps: int = 50,
    barrier_step_size: Coefficient | None = None,
    num_barrier_steps: int = 25,
    barrier: Coefficient = _barrier,
    slack: Coefficient = _harmonic,
    regularization: Coefficient = _hundredth,
    outer_regularization: Coefficient = _hundredth,
    max_halvings: int = 30,
    projection: Callable[[X, Theta], X] | None = None,
) -> Hypergradient[X, Theta]:
    r"""Returns BVFSM: the outer loss with a logarithmic barrier on the gap of the inner value.

    .. math::
        z &\leftarrow z - a \nabla_z \bigl[f(z, \theta) + m_r \|z\|^2\bigr] \quad (K \text{ times}), \qquad
        f^* = f(z, \theta) + m_r \|z\|^2 \\
        \Phi(x, \theta) &= F(x, \theta) - \sigma_r \log(f^* - f(x, \theta) + \delta_r) + t_r \|x\|^2 \\
        x &\leftarrow x - b \nabla_x \Phi \quad (M \text{ times}), \qquad g = \nabla_\theta \Phi
        = \nabla_\theta F + \frac{\sigma_r}{f^* - f + \delta_r} \nabla_\theta \bigl[f(x, \theta) - f(z, \theta)\bigr]

    z and x are those of the last update at first. An x outside the barrier descends f until the gap is half the slack,
    at most K steps, and failing that starts at z, which is inside. A step of x is halved until it stays inside and the
    barrier function decreases.

    When: first-order information only; several inner solutions, no convexity: the outer loss chooses the best of them.
    At the end of the inner walk z must be a *global* minimiser of f. x stays within :math:`\delta_r` of the inner
    optimum, so that the gradient is off by the order of :math:`\sqrt{\delta_r}` where f is strongly convex. The
    multiplier :math:`\sigma_r / \text{gap}` grows like :math:`\delta_r^{-1/2}`: let the barrier fall like
    :math:`\sqrt{\delta_r}`, and the gap stays in proportion to the slack. Falling faster, x sticks to the wall, and the
    gradient jumps. A slack below the height of the hills between inner solutions keeps x in its basin.

    Args:
        inner: f, ``(x, theta, inner_data) -> scalar``; without data ``(x, theta)``.
        outer: F, ``(x, theta, outer_data) -> scalar``, likewise.
        step_size: a > 0 of z, a number, a schedule of the step k < K, or a function of theta.
        num_steps: K, at least 1, static.
        barrier_step_size: b > 0, the first one tried, a number, a schedule of the update number r, or a function of
            theta. None: a.
        num_barrier_steps: M, at least 1, static.
        barrier: :math:`\sigma_r > 0`, a number, a schedule of r, or a function of theta; default
            :math:`0.3 / \sqrt{r + 1}`.
        slack: :math:`\delta_r > 0`, likewise; default 1 / (r + 1).
        regularization: :math:`m_r \ge 0`, likewise; default 0.01 / (r + 1).
        outer_regularization: :math:`t_r \ge 0`, likewise; default 0.01 / (r + 1).
        max_halvings: of a step of x, at least 0, static; if none will do, x stays.
        projection: ``(x, theta) -> x``, onto the constraint set of x and z. None: no constraint.

    Raises:
        ValueError: a coefficient or count out of range.
        TypeError: a loss that is no function; at trace time, a loss that is not a real scalar, data that is not a pair.

    Cost: K gradients of f; M gradients and at least M values of f and F; two more gradients of f, one of F; the state
    holds x and z. The update has loops that end by themselves, hence no reverse derivative of its own.

    Source: Liu, Liu, Zeng, Zhang and Zhang (2021), arXiv 2110.04974, algorithm 1 with the logarithmic barrier. Differs:
    the steps are halved, and x returns where it is outside; the barrier is on the gap, slackened.

    Example:
        >>> import jax, odljax as odl
        >>> hyper = odl.hypergradients.bvfsm(
        ...     lambda x, theta: 0.5 * (x - theta) ** 2, lambda x, theta: 0.5 * (x - 1.0) ** 2, step_size=0.5)
        >>> update, theta, state = jax.jit(hyper.update), 0.0, hyper.init(0.0, 0.0)
        >>> for _ in range(200):
        ...     gradient, state, info = update(theta, state)
        ...     theta = theta - 0.2 * gradient
        >>> round(float(theta), 1)
        1.0
    """
    who = "bvfsm"
    inner_loss, outer_loss = losses(who, inner, outer)
    walk_step = coefficient(who, "step_size", step_size)
    step = walk_step if barrier_step_size is None else coefficient(who, "barrier_step_size", barrier_step_size)
    sigma_of = coefficient(who, "barrier", barrier)
    slack_of = coefficient(who, "slack", slack)
    m_of = coefficient(who, "regularization", regularization, closed=True)
    t_of = coefficient(who, "outer_regularization", outer_regularization, closed=True)
    num_steps = count(who, "num_steps", num_steps)
    num_barrier_steps = count(who, "num_barrier_steps", num_barrier_steps)
    max_halvings = count(who, "max_halvings", max_halvings, least=0)
    project = constraint(who, projection)

    def init(theta: Theta, x0: X, *data: Any) -> BVFSMState:
        pair(who, data)
        x = start_inner(who, theta, x0)
        return BVFSMState(x, x, start_outer(theta))

    def update(theta: Theta, state: BVFSMState, *data: Any) -> tuple[Theta, State, Info]:
        inner_data, outer_data = pair(who, data)
        theta = _tree.strong(theta)
        r = state.outer.t
        sigma, delta, m, t, b = (of(theta, r) for of in (sigma_of, slack_of, m_of, t_of, step))
        first = jnp.asarray(b)

        def regularised(z: X, theta: Theta) -> Array:
            value = inner_loss(z, theta, *inner_data)
            return value + like(m, value) * like(_tree.vdot(z, z), value)

        z = gradient_walk(regularised, state.minimiser, theta, (), num_steps, walk_step, project)
        best, best_theta_slope = jax.value_and_grad(regularised, argnums=1)(z, theta)

        def gap_of(x: X) -> Array:
            value = inner_loss(x, theta, *inner_data)
            return best - value + like(delta, value)

        def inside(x: X) -> Array:
            """The barrier function; infinite outside."""
            value, gap = outer_loss(x, theta, *outer_data), gap_of(x)
            wall = -like(sigma, value) * like(jnp.log(jnp.where(gap > 0, gap, jnp.ones_like(gap))), value)
            whole = value + wall + like(t, value) * like(_tree.vdot(x, x), value)
            return jnp.where(gap > 0, whole, jnp.full_like(whole, jnp.inf))

        def descend(x: X, _: Any) -> tuple[X, None]:
            value, slope = jax.value_and_grad(inside)(x)

            def candidate(halvings: Array) -> X:
                return step_along(x, first * like(0.5 ** halvings.astype(float), first), slope, theta, project)

            def rejected(halvings: Array) -> Array:
                new = candidate(halvings)
                # Armijo's test: the slope times the move, which is the squared slope times the step without projection.
                promised = like(_tree.vdot(slope, _tree.subtract(new, x)), value)
                return (halvings <= max_halvings) & ~(inside(new) <= value + like(1e-4, value) * promised)

            halvings = jax.lax.while_loop(rejected, lambda halvings: halvings + 1, jnp.zeros((), int))
            return _tree.where(halvings <= max_halvings, candidate(halvings), x), None

        gap_and_slope = jax.value_and_grad(gap_of)
        start_gap, start_slope = gap_and_slope(state.x)
        enough = jnp.where(start_gap > 0, jnp.zeros_like(start_gap), like(delta, start_gap) / 2)

        def outside(carry: Any) -> Array:
            _, gap, _, k = carry
            return (k < num_steps) & (gap <= enough)

        def towards(carry: Any) -> Any:
            x, _, slope, k = carry
            x = step_along(x, -walk_step(theta, k), slope, theta, project)
            return (x, *gap_and_slope(x), k + 1)

        # Theta has moved and the slack has shrunk. z would do, but may lie in another basin, far from where x was. Half
        # the slack, because next to the wall the gradient is huge.
        start = (state.x, start_gap, start_slope, jnp.zeros((), int))
        x, gap, _, _ = jax.lax.while_loop(outside, towards, start)
        x, _ = jax.lax.scan(descend, _tree.where(gap > 0, x, z), length=num_barrier_steps)
        # The gradient spelled out: x and z are held, and f is evaluated once.
        value, _, F_theta = both(outer_loss, x, theta, outer_data)
        f_value, f_x, f_theta = both(inner_loss, x, theta, inner_data)
        pressure = like(sigma, best) / (best - f_value + like(delta, best))
        gradient = _tree.add_scaled(F_theta, pressure, _tree.subtract(f_theta, best_theta_slope))
        gradient, walk, info = conclude(
            who, gradient, theta, state.outer,
            value=value, x=x, inner_residual=stationarity(x, f_x, theta, b, project), num_steps=num_steps,
        )  # fmt: skip
        return gradient, BVFSMState(keep_finite(x, state.x), keep_finite(z, state.minimiser), walk), info

    return Hypergradient(init, update, who, slope_of(who, inner, outer, projection))


def bome(
    inner: Callable[..., Any],
    outer: Callable[..., Any],
    *,
    step_size: Coefficient,
    inner_step_size: Coefficient | None = None,
    num_steps: int = 10,
    control: Coefficient = 0.5,
    barrier: Literal["gradient_norm", "value_gap"] = "gradient_norm",
    projection: Callable[[X, Theta], X] | None = None,
) -> Hypergradient[X, Theta]:
    r"""Returns BOME: descent of the outer loss, bent so that the gap of the inner value keeps shrinking.

    With w the end of T gradient steps on f from x, held constant, and :math:`q = f(x, \theta) - f(w, \theta)`,

    .. math::
        d = \nabla F + \lambda \nabla q, \quad
        \lambda = \frac{(p - \langle \nabla F, \nabla q \rangle)_+}{\|\nabla q\|^2}, \quad
        p = \eta \|\nabla q\|^2 \text{ or } \eta q

    on (x, theta) jointly: x moves by :math:`-s\, d_x`, and the gradient is :math:`d_\theta`.

    When: first-order information only, an inner loss without convexity (one that satisfies a Polyak-Lojasiewicz
    inequality). The paper takes one step size for both variables; an optax rate far above ``step_size`` breaks the
    joint direction. As q goes to 0, :math:`\lambda` grows without bound: with constant steps x and theta end at a
    distance of the order of the step; let both decay.

    Args:
        inner: f, ``(x, theta, inner_data) -> scalar``; without data ``(x, theta)``.
        outer: F, ``(x, theta, outer_data) -> scalar``, likewise.
        step_size: s > 0, a number, a schedule of the update number, or a function of theta.
        inner_step_size: of w, a number, a schedule of the inner step, or a function of theta. None: s.
        num_steps: T, at least 1, static.
        control: :math:`\eta > 0`, a number, a schedule of the update number, or a function of theta.
        barrier: p, ``"gradient_norm"`` for :math:`\eta \|\nabla q\|^2`, ``"value_gap"`` for :math:`\eta q`.
        projection: ``(x, theta) -> x``, onto the constraint set of x and w. None: no constraint.

    Raises:
        ValueError: a coefficient or count out of range, another barrier.
        TypeError: a loss that is no function; at trace time, a loss that is not a real scalar, data that is not a pair.

    Cost: T + 2 gradients of f, one of F; the state holds x.

    Source: Ye, Liu, Wright, Stone and Liu (2022), arXiv 2209.08709, algorithm 1.

    Example:
        >>> import jax, odljax as odl
        >>> hyper = odl.hypergradients.bome(
        ...     lambda x, theta: 0.5 * (x - theta) ** 2, lambda x, theta: 0.5 * (x - 1.0) ** 2, step_size=0.1)
        >>> update, theta, state = jax.jit(hyper.update), 0.0, hyper.init(0.0, 0.0)
        >>> for _ in range(300):
        ...     gradient, state, info = update(theta, state)
        ...     theta = theta - 0.1 * gradient
        >>> round(float(theta), 2)
        1.0
    """
    who = "bome"
    inner_loss, outer_loss = losses(who, inner, outer)
    step = coefficient(who, "step_size", step_size)
    inner_step = step if inner_step_size is None else coefficient(who, "inner_step_size", inner_step_size)
    eta_of = coefficient(who, "control", control)
    num_steps = count(who, "num_steps", num_steps)
    if barrier not in ("gradient_norm", "value_gap"):
        raise ValueError(f"{who}: barrier must be 'gradient_norm' or 'value_gap'; {barrier!r} came.")
    project = constraint(who, projection)

    def init(theta: Theta, x0: X, *data: Any) -> ValueGapState:
        pair(who, data)
        return ValueGapState(start_inner(who, theta, x0), None, start_outer(theta))

    def update(theta: Theta, state: ValueGapState, *data: Any) -> tuple[Theta, State, Info]:
        inner_data, outer_data = pair(who, data)
        theta = _tree.strong(theta)
        x, t = state.x, state.outer.t
        w = gradient_walk(inner_loss, x, theta, inner_data, num_steps, inner_step, project)
        value, F_x, F_theta = both(outer_loss, x, theta, outer_data)
        f_value, f_x, f_theta = both(inner_loss, x, theta, inner_data)
        # w is held: grad_x q is that of f alone, and grad_theta q a difference of partial derivatives.
        w_value, w_theta = jax.value_and_grad(inner_loss, argnums=1)(w, theta, *inner_data)
        q_theta = _tree.subtract(f_theta, w_theta)
        size = _tree.vdot((f_x, q_theta), (f_x, q_theta))
        wall = size if barrier == "gradient_norm" else like(f_value - w_value, size)
        short = jnp.maximum(like(eta_of(theta, t), size) * wall - _tree.vdot((F_x, F_theta), (f_x, q_theta)), 0)
        # Where q has no slope, it asks for nothing.
        bend = jnp.where(size > 0, short / jnp.where(size > 0, size, jnp.ones_like(size)), jnp.zeros_like(size))
        a = step(theta, t)
        gradient, walk, info = conclude(
            who, _tree.add_scaled(F_theta, bend, q_theta), theta, state.outer,
            value=value, x=step_along(x, a, _tree.add_scaled(F_x, bend, f_x), theta, project),
            inner_residual=stationarity(x, f_x, theta, a, project), num_steps=num_steps,
        )  # fmt: skip
        return gradient, ValueGapState(keep_finite(info.x, x), None, walk), info

    return Hypergradient(init, update, f"bome({barrier})", slope_of(who, inner, outer, projection))


def pbgd(
    inner: Callable[..., Any],
    outer: Callable[..., Any],
    *,
    step_size: Coefficient,
    inner_step_size: Coefficient | None = None,
    num_steps: int = 10,
    penalty: Coefficient = _ramp,
    form: Literal["value_gap", "gradient_norm"] = "value_gap",
    warm_start: bool = False,
    projection: Callable[[X, Theta], X] | None = None,
) -> Hypergradient[X, Theta]:
    r"""Returns PBGD: penalty-based descent of the outer loss plus :math:`\gamma_k` times a measure of inner optimality.

    .. math::
        \text{value_gap:} \quad & p = f(x, \theta) - f(w, \theta), \quad w \text{ the end of } T
        \text{ gradient steps on } f, \text{ held} \\
        \text{gradient_norm:} \quad & p = \|\nabla_x f(x, \theta)\|^2, \text{ with its own second derivatives} \\
        x &\leftarrow P\Bigl(x - \frac{s}{1 + \gamma_k} (\nabla_x F + \gamma_k \nabla_x p)\Bigr), \quad
        g = \nabla_\theta F + \gamma_k \nabla_\theta p

    both at the old x.

    When: inner problems that satisfy a Polyak-Lojasiewicz inequality. For a constant :math:`\gamma` the method ends
    at a stationary point of the penalised problem. There x is off by the order of :math:`1/\gamma`, and so is g: with
    f and F quadratic, :math:`H = \nabla^2_{xx} f` and :math:`A = \nabla^2_{xx} F` the value gap gives the hypergradient
    with :math:`(H + A / \gamma)^{-1}` in place of :math:`H^{-1}`. g answers :math:`\gamma` times as strongly as x to a
    move of theta: let the outer rate shrink like :math:`1 / \gamma_k`, or end the ramp.

    Args:
        inner: f, ``(x, theta, inner_data) -> scalar``; without data ``(x, theta)``.
        outer: F, ``(x, theta, outer_data) -> scalar``, likewise.
        step_size: s > 0, a number, a schedule of the update number k, or a function of theta; at most the smaller one
            of 1 / L of F and of p.
        inner_step_size: of w, a number, a schedule of the inner step, or a function of theta. None: s.
        num_steps: T, at least 1, static; not used by the gradient norm.
        penalty: :math:`\gamma_k > 0`, like ``step_size``; default :math:`\sqrt{k + 1}`.
        form: ``"value_gap"`` or ``"gradient_norm"``.
        warm_start: let w walk on from its last end instead of from x. From x it is in the basin of x, and few steps
            leave a bias that no penalty removes; from its last end it has none, where the inner solution is unique.
        projection: P, ``(x, theta) -> x``, onto the constraint set of x and w; the gradient norm has no use for one.

    Raises:
        ValueError: a coefficient or count out of range, another form, a projection or warm start with the gradient
            norm.
        TypeError: a loss that is no function; at trace time, a loss that is not a real scalar, data that is not a pair.

    Cost: one gradient of F and, for the value gap, T + 2 of f; for the gradient norm one of f, one Hessian-vector and
    one cross product. The state holds x, and w where it is warm.

    Source: Shen and Chen (2023), arXiv 2302.05185, algorithm 1 with either of its penalties. Differs: x and theta have
    steps of their own, that of x divided by :math:`1 + \gamma_k`.

    Example:
        >>> import jax, odljax as odl
        >>> hyper = odl.hypergradients.pbgd(
        ...     lambda x, theta: 0.5 * (x - theta) ** 2, lambda x, theta: 0.5 * (x - 1.0) ** 2, step_size=0.5)
        >>> update, theta, state = jax.jit(hyper.update), 0.0, hyper.init(0.0, 0.0)
        >>> for _ in range(300):
        ...     gradient, state, info = update(theta, state)
        ...     theta = theta - 0.05 * gradient
        >>> round(float(theta), 2)
        1.0
    """
    who = "pbgd"
    inner_loss, outer_loss = losses(who, inner, outer)
    step = coefficient(who, "step_size", step_size)
    inner_step = step if inner_step_size is None else coefficient(who, "inner_step_size", inner_step_size)
    gamma_of = coefficient(who, "penalty", penalty)
    num_steps = count(who, "num_steps", num_steps)
    if form not in ("value_gap", "gradient_norm"):
        raise ValueError(f"{who}: form must be 'value_gap' or 'gradient_norm'; {form!r} came.")
    by_norm = form == "gradient_norm"
    if by_norm and (warm_start or projection is not None):
        raise ValueError(
            f"{who}: the gradient norm needs no inner walk and vanishes only at unconstrained minima; warm_start and "
            f"projection belong to form='value_gap'."
        )
    project = constraint(who, projection)

    def init(theta: Theta, x0: X, *data: Any) -> ValueGapState:
        pair(who, data)
        x = start_inner(who, theta, x0)
        return ValueGapState(x, x if warm_start else None, start_outer(theta))

    def update(theta: Theta, state: ValueGapState, *data: Any) -> tuple[Theta, State, Info]:
        inner_data, outer_data = pair(who, data)
        theta = _tree.strong(theta)
        x, w, t = state.x, state.minimiser, state.outer.t
        gamma = gamma_of(theta, t)
        a = jnp.asarray(step(theta, t))
        a = a / (1 + like(gamma, a))
        value, F_x, F_theta = both(outer_loss, x, theta, outer_data)
        if by_norm:
            slope, pull = jax.vjp(lambda x, theta: jax.grad(inner_loss)(x, theta, *inner_data), x, theta)
            p_x, p_theta = pull(_tree.scale(2, slope))
        else:
            w = gradient_walk(inner_loss, x if w is None else w, theta, inner_data, num_steps, inner_step, project)
            _, slope, f_theta = both(inner_loss, x, theta, inner_data)
            w_theta = jax.grad(inner_loss, argnums=1)(w, theta, *inner_data)
            p_x, p_theta = slope, _tree.subtract(f_theta, w_theta)
        gradient, walk, info = conclude(
            who, _tree.add_scaled(F_theta, gamma, p_theta), theta, state.outer,
            value=value, x=step_along(x, a, _tree.add_scaled(F_x, gamma, p_x), theta, project),
            inner_residual=stationarity(x, slope, theta, a, project), num_steps=1 if by_norm else num_steps,
        )  # fmt: skip
        w = keep_finite(w, state.minimiser) if warm_start else None
        return gradient, ValueGapState(keep_finite(info.x, x), w, walk), info

    return Hypergradient(init, update, f"pbgd({form})", slope_of(who, inner, outer, projection))
