"""Hierarchical optimisation-derived learning: the algorithm that the library is named for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .. import _tree
from .._checks import coefficient, count, differentiable, is_callable
from .._types import Coefficient, State, Step, Theta, X
from ..derivatives import unrolled
from ..iterations import Iteration, aggregate, krasnoselskii_mann, project
from ..iterations._aggregation import outer_unit
from ..iterations._iteration import first_step, iteration_of
from ..operators import Operator
from ..operators._operator import inverse_metric
from ..solvers import History, for_steps
from ..solvers._solver import residual_at
from ._estimator import (
    Hypergradient,
    Info,
    WalkState,
    advance_outer,
    keep_finite,
    loss_at,
    of_theta,
    slope_at,
    start_outer,
    told,
)
from ._start import first_start, started


def hodl(
    operator_or_iteration: Iteration[X, Theta] | Operator[X, Theta] | Callable[[X, Theta], X],
    outer: Callable[..., Any],
    *,
    num_steps: int,
    relaxation: Coefficient = 0.5,
    weight: Coefficient = 0.5,
    step_size: Coefficient | None = None,
    metric_inverse: Callable[[X, Theta], X] | None = None,
    projection: Callable[[X, Theta], X] | None = None,
    warm_start: bool = False,
    checkpoint_every: int | None = None,
    start: Callable[[Theta], X] | None = None,
) -> Hypergradient[X, Theta]:
    r"""Returns the HODL estimator: descend the outer loss over the fixed points of D while walking towards them.

    For k = 0, ..., K - 1, from :math:`u_0`,

    .. math::
        v_\ell &= u_k + \alpha_k (D(u_k, \theta) - u_k) \\
        v_u &= u_k - s_k G_\theta^{-1} \nabla_u \ell(u_k, \theta) \\
        u_{k+1} &= P_{G_\theta}(\mu_k v_u + (1 - \mu_k) v_\ell)

    by default with :math:`s_k = 1 / (L (k + 1))`, L the Lipschitz constant of :math:`G_\theta^{-1} \nabla_u \ell` at
    :math:`u_0`, estimated anew in each update, so that a sum and a mean, or any multiple, of the outer loss have one
    answer; and the gradient is that of :math:`\varphi_K(\theta) = \ell(u_K(\theta), \theta)`, through all K aggregated
    steps. Any optax update, projected if theta is constrained, may follow.

    When: the fixed point of D is not unique, so that the outer loss must choose among them: with :math:`s_k \to 0`,
    :math:`\sum s_k = \infty` the minimisers of :math:`\varphi_K` approach those of the true problem. ``weight=0`` is
    the simple variant, which differentiates the plain iteration and is right only where the fixed point is unique.
    Assumes D(., theta) non-expansive in :math:`G_\theta`, :math:`\ell` smooth and convex in u, :math:`s_k <
    \lambda_{\min}(G) / L_\ell`.

    Where the outer loss needs a ground truth, aggregation is a device of training: apply
    ``for_steps(krasnoselskii_mann(D, relaxation), num_steps)`` to new inputs.

    Args:
        operator_or_iteration: D, an operator, a function ``(u, theta) -> u`` or an iteration.
        outer: :math:`\ell`, ``(u, theta, *data) -> scalar``.
        num_steps: K, at least 1, static.
        relaxation: :math:`\alpha_k` in (0, 2), as in ``krasnoselskii_mann``.
        weight: :math:`\mu_k` in [0, 1).
        step_size: :math:`s_k`, at least 0. None: 1/(L (k + 1)), where L is found by ten power iterations with products
            of the Hessian at :math:`u_0` and has no derivative; where the outer loss has no curvature there (it is
            linear), the first outer move is as long as the inner one. A loss whose curvature grows much along the way
            needs a step of its own.
        metric_inverse: :math:`v \mapsto G_\theta^{-1} v`, ``(v, theta) -> v``. None: that of the operator; if it
            states a metric without an inverse, conjugate gradients; if it states none, the identity.
        projection: P, ``(u, theta) -> u``, the projection on the inner constraint set in the metric. None: no
            constraint.
        warm_start: start each update from the last inner solution instead of :math:`u_0`.
        checkpoint_every: as in ``unrolled``.
        start: :math:`u_0(\theta)`, ``theta -> u``, a learned start through which the gradient goes as well; the x0 of
            ``init`` is then not used and may be None.

    Each coefficient is a number, a schedule of k, a function of theta, or of (theta, k).

    Returns:
        An estimator. ``info.history.residual`` is the inner residual ``||u_k - D(u_k, theta)||`` against k,
        ``info.inner_residual`` that of u_K, ``info.outer_change`` the relative change of theta against t: the two
        curves of joint convergence.

    Raises:
        ValueError: a coefficient outside its range, a step count below 1, a learned start with a warm start.
        TypeError: D, ``outer`` or ``start`` is no function; at trace time, an outer loss that is not a real scalar, a
            theta that is not floating point.

    Cost: K times D, the gradient of the outer loss and the inverse metric, forward and backward; memory K times what
    one step needs, or that of segments.

    Source: Liu, Liu, Zeng, Zhang and Zhang (2023), arXiv 2302.05587; Liu et al. (2022), arXiv 2206.07875, algorithm 1.
    Differs: the metric inverse is applied exactly; warm start is optional.

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> D = odl.operators.gradient(lambda u, theta: 0.5 * u[0] ** 2 - theta * u[0], step_size=1.0)  # u[1] is free
        >>> outer = lambda u, theta: 0.5 * (theta - u[1]) ** 2 + 0.5 * (u[0] - 1.0) ** 2
        >>> hyper = odl.hypergradients.hodl(D, outer, num_steps=50)
        >>> gradient, state, info = hyper.update(0.5, hyper.init(0.5, jnp.array([0.01, 0.01])))
        >>> info.history.residual.shape
        (50,)
    """
    who = "hodl"
    base = iteration_of(who, "operator_or_iteration", operator_or_iteration)
    is_callable(who, "outer", outer)
    num_steps = count(who, "num_steps", num_steps)
    coefficient(who, "relaxation", relaxation, high=2.0)
    coefficient(who, "weight", weight, high=1.0, closed=True)
    if step_size is not None:
        coefficient(who, "step_size", step_size, closed=True)
    if checkpoint_every is not None:
        count(who, "checkpoint_every", checkpoint_every)
    operator = base.operator
    if metric_inverse is not None:
        is_callable(who, "metric_inverse", metric_inverse, "v, theta")
    elif operator is not None:
        metric_inverse = inverse_metric(operator)
    if projection is not None:
        is_callable(who, "projection", projection, "x, theta")
    if start is not None:
        is_callable(who, "start", start, "theta")
        if warm_start:
            raise ValueError(
                "hodl: warm_start begins at the last solution, start at what theta says; both came. Drop one of them."
            )
    # A plain map is watched as it is applied; otherwise the residual costs an application of its own.
    plain = base is not operator_or_iteration and operator is not None and operator.displacement is None
    watched = operator if plain else None
    relaxed = krasnoselskii_mann(base if watched is None else _watched(watched, num_steps), relaxation)

    blind = isinstance(weight, (int, float)) and weight == 0

    def compose(theta: Theta, x0: X, data: tuple[Any, ...]) -> Any:
        def loss(x: X, theta: Theta) -> Any:
            return loss_at(who, "outer", outer, x, theta, *data)

        s = step_size
        if s is None and blind:
            s = 0.0
        elif s is None:
            at = started(who, start, theta, x0)
            unit = outer_unit(who, base, loss, metric_inverse, at, theta)
            s = lambda k: unit / (k + 1).astype(unit.dtype)  # noqa: E731
        walk = aggregate(relaxed, loss, weight=weight, step_size=s, metric_inverse=metric_inverse)
        if projection is not None:
            walk = project(walk, projection)
        record = None if watched is not None else lambda x, theta, k: residual_at(base, x, theta)
        solver = for_steps(walk, num_steps, record=record)
        return unrolled(solver, checkpoint_every=checkpoint_every, on_failure="ignore"), loss  # the info says it

    def init(theta: Theta, x0: X, *data: Any) -> WalkState:
        differentiable(who, theta)
        return WalkState(first_start(who, start, x0), start_outer(theta))

    def update(theta: Theta, state: WalkState, *data: Any) -> tuple[Theta, State, Info]:
        differentiable(who, theta)
        solver, loss = compose(theta, state.x, data)

        def value_of(theta: Theta) -> Any:
            solution = solver(started(who, start, theta, state.x), theta)
            return loss(solution.x, theta), solution

        (value, solution), gradient = jax.value_and_grad(value_of, has_aux=True)(theta)
        walk, change = advance_outer(state.outer, theta)
        history = History(solution.history.recorded if watched is None else solution.state, None)
        final = residual_at(base, solution.x, theta)
        status = told(solution.status, value, gradient)
        info = Info(value, final, None, status, solution.num_steps, change, history, solution.x)
        x = keep_finite(solution.x, state.x) if warm_start else state.x
        return gradient, WalkState(x, walk), info

    def inner(x: X, theta: Theta, *data: Any) -> Any:
        return first_step(base, x, theta), slope_at(who, "outer", outer, x, theta, *data)

    roads = (start, projection, *map(of_theta, (relaxation, weight, step_size)))
    known = all(road is None for road in roads)
    return Hypergradient(init, update, f"hodl({base.name})", inner if known else None)


def _watched(operator: Operator[X, Theta], num_steps: int) -> Iteration[X, Theta]:
    """The Picard iteration of D whose state is the residual at each iterate from which it has stepped."""

    def init(x: X, theta: Theta) -> State:
        return jnp.full(num_steps, jnp.nan, _tree.accumulation_dtype(x))

    def step(x: X, state: State, theta: Theta, k: Step) -> tuple[X, State]:
        target = operator(x, theta)
        size = _tree.norm(jax.lax.stop_gradient(_tree.subtract(x, target)))
        return target, state.at[k].set(size)

    return Iteration(init, step, operator, f"fixed_point({operator.name})")
