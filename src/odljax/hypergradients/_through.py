"""Hypergradients through a differentiable solver, from a fixed start or from the last solution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from .. import _tree
from .._checks import differentiable, is_a, is_callable
from .._types import State, Status, Theta, X
from ..derivatives._implicit import negligible, pull_back, reach
from ..linear import identity
from ..operators import Operator
from ..solvers import Solution, Solver
from ._error import estimate_error
from ._estimator import Hypergradient, Info, Outer, advance_outer, keep_finite, loss_at, start_outer, step_of, told
from ._start import check_start, first_start, started

OuterLoss = Callable[..., Any]


class WarmState(NamedTuple):
    """The inner start, the guess of the adjoint (None: zero) and the outer walk."""

    x: Any
    adjoint: Any
    outer: Outer


class Trust(NamedTuple):
    """What to do about a failed adjoint solve, and whether to estimate the error."""

    on_adjoint_failure: str = "keep"
    error_estimate: bool = False


def through(
    solver: Solver[X, Theta],
    outer: OuterLoss,
    *,
    start: Callable[[Theta], X] | None = None,
    on_adjoint_failure: str = "keep",
    error_estimate: bool = False,
) -> Hypergradient[X, Theta]:
    r"""Returns the estimator that differentiates the outer loss through the solver, each time from the same start.

    .. math:: g = \nabla_\theta \ell(x(\theta), \theta)

    When: a solver with a derivative is at hand; the estimator adds what plain ``jax.grad`` cannot return, the truth
    about inner and adjoint solve. With ``start``, a few steps from a start that theta holds or computes (a learned
    initialisation, amortised solves): the gradient then also goes through :math:`x_0(\theta)`.

    Args:
        solver: with any derivative: ``implicit``, ``one_step``, ``unrolled``, ``truncated``, or bare ``for_steps``.
        outer: :math:`\ell`, ``(x, theta, *data) -> scalar``; data comes from ``update(theta, state, *data)``.
        start: :math:`x_0(\theta)`, ``theta -> x``, the learned start; the x0 of ``init`` is then not used and may be
            None. None: the x0 of ``init``, which has no derivative.
        on_adjoint_failure: what becomes of the gradient where the adjoint solve failed, which ``info.status`` tells in
            any case: "keep" it, "zero" (so that a training loop stands still), or "one_step", the gradient that
            ``one_step`` would give.
        error_estimate: fill ``info.error``, as ``diagnostics.hypergradient_error`` estimates it; off by default
            because it costs three loose linear solves.

    Raises:
        TypeError: ``solver`` or ``start`` is none; at trace time, an outer loss that is not a real scalar, a theta that
            is not floating point, a bare ``until_converged``.
        ValueError: a learned start for a derivative that does not see it; an unknown policy, or one for a derivative
            without an adjoint solve; an error estimate for an iteration without an operator.

    Cost: the solve, one gradient of the outer loss, and what the derivative costs.

    Source: Pedregosa (2016) for the implicit, Franceschi et al. (2017) for the unrolled form; for the learned start:
    Finn, Abbeel and Levine (2017).

    Example:
        >>> import odljax as odl
        >>> inner = odl.gradient_descent(lambda x, theta: 0.5 * (x - theta["goal"]) ** 2, step_size=0.5)
        >>> solver, outer = odl.for_steps(inner, 2), lambda x, theta: x
        >>> hyper = odl.hypergradients.through(solver, outer, start=lambda theta: theta["start"])
        >>> theta = {"goal": 1.0, "start": 0.0}
        >>> gradient, state, info = hyper.update(theta, hyper.init(theta, None))
        >>> float(gradient["goal"]), float(gradient["start"])
        (0.75, 0.25)
    """
    is_a("through", "solver", solver, Solver, "Make one with for_steps or until_converged.")
    is_callable("through", "outer", outer)
    check_start("through", start, solver)
    trust = check_trust("through", solver, on_adjoint_failure, error_estimate)

    def update(theta: Theta, state: WarmState, *data: Any) -> tuple[Theta, State, Info]:
        gradient, _, info, walk = advance("through", solver, outer, theta, state, data, trust, start)
        return gradient, WarmState(state.x, None, walk), info

    inner = None if start else step_of(solver.iteration)
    return Hypergradient(cold_start("through", start), update, f"through({solver.name})", inner)


def warm_started(
    solver: Solver[X, Theta], outer: OuterLoss, *, on_adjoint_failure: str = "keep", error_estimate: bool = False
) -> Hypergradient[X, Theta]:
    r"""Returns the estimator that starts inner and adjoint solve from those of the last update.

    When: theta moves little from one update to the next, so that few inner steps and few adjoint products are left to
    do. With an unrolled solver only the inner iterate is warm. A solve that ended in NaN or infinity is reported in
    the status and not used as a start.

    Args:
        solver: with any derivative; ``implicit`` has an adjoint to be warm; ``unrolled`` and ``forward`` of
            ``for_steps`` only.
        outer: :math:`\ell`, ``(x, theta, *data) -> scalar``.
        on_adjoint_failure: as in ``through``.
        error_estimate: as in ``through``.

    Raises:
        TypeError: as ``through``.
        ValueError: as ``through``; ``unrolled`` or ``forward`` over ``until_converged``, whose warm start meets the
            tolerance.

    Cost: as ``through``, from a better start; the state holds x and the adjoint vector.

    Source: Pedregosa (2016), HOAG; Ji, Yang and Liang (2021) for the warm adjoint.

    Example:
        >>> import odljax as odl
        >>> inner = odl.gradient_descent(lambda x, theta: 0.5 * (x - theta) ** 2, step_size=0.5)
        >>> solver = odl.implicit(odl.until_converged(inner, tol=1e-5, max_steps=100))
        >>> hyper = odl.hypergradients.warm_started(solver, lambda x, theta: (x - 1.0) ** 2)
        >>> state = hyper.init(3.0, 0.0)
        >>> _, state, first = hyper.update(3.0, state)
        >>> _, state, second = hyper.update(3.0, state)
        >>> int(first.num_steps) > 10, int(second.num_steps)
        (True, 0)
    """
    is_a("warm_started", "solver", solver, Solver, "Make one with for_steps or until_converged.")
    is_callable("warm_started", "outer", outer)

    # From a start that meets the tolerance such a solver takes no step, and a gradient through no steps is zero.
    if solver.tolerance is not None and solver.derivative in ("unrolled", "forward"):
        raise ValueError(
            f"warm_started: the last solution meets the tolerance, so that {solver.derivative} would differentiate no "
            f"steps and the gradient through x would be zero. Unroll for_steps, or use implicit or truncated."
        )
    trust = check_trust("warm_started", solver, on_adjoint_failure, error_estimate)

    def init(theta: Theta, x0: X, *data: Any) -> WarmState:
        return warm(cold_start("warm_started")(theta, x0), solver)

    def update(theta: Theta, state: WarmState, *data: Any) -> tuple[Theta, State, Info]:
        return keep_warm(state, *advance("warm_started", solver, outer, theta, state, data, trust))

    return Hypergradient(init, update, f"warm_started({solver.name})", step_of(solver.iteration))


def warm(state: WarmState, solver: Solver) -> WarmState:
    """The state with room for the adjoint, if the solver has one."""
    return state if solver.adjoint is None else state._replace(adjoint=_tree.zeros_like(state.x))


def keep_warm(state: WarmState, gradient: Any, adjoint: Any, info: Info, walk: Outer) -> tuple[Any, WarmState, Info]:
    """What the update returns, the new solutions kept as the next start if they are finite."""
    x = keep_finite(info.x, state.x)
    if state.adjoint is not None:
        adjoint = keep_finite(adjoint, state.adjoint)
    return gradient, WarmState(x, adjoint, walk), info


def check_trust(who: str, solver: Solver, on_adjoint_failure: str, error_estimate: bool) -> Trust:
    """The options, checked against each other and the solver."""
    if on_adjoint_failure not in ("keep", "zero", "one_step"):
        raise ValueError(
            f"{who}: on_adjoint_failure must be 'keep', 'zero' or 'one_step'; {on_adjoint_failure!r} came."
        )
    if on_adjoint_failure != "keep" and solver.adjoint is None:
        raise ValueError(
            f"{who}: on_adjoint_failure is {on_adjoint_failure!r}, but {solver.name} solves no adjoint system that "
            f"could fail. Leave it out, or use implicit."
        )
    if error_estimate and solver.iteration.operator is None:
        raise ValueError(
            f"{who}: error_estimate compares with the gradient at the fixed point, and {solver.iteration.name} has no "
            f"operator. Leave it out."
        )
    return Trust(on_adjoint_failure, error_estimate)


def cold_start(who: str, start: Any = None) -> Callable[[Any, Any], WarmState]:
    def init(theta: Any, x0: Any, *data: Any) -> WarmState:
        differentiable(who, theta)
        return WarmState(first_start(who, start, x0), None, start_outer(theta))

    return init


def advance(
    who: str,
    solver: Solver,
    outer: OuterLoss,
    theta: Any,
    state: WarmState,
    data: tuple[Any, ...],
    trust: Trust,
    start: Callable[[Any], Any] | None = None,
) -> tuple[Any, Any, Info, Outer]:
    """Gradient, adjoint vector (None without an adjoint system), info and the advanced outer walk."""
    differentiable(who, theta)
    solver = solver.quiet or solver  # the info says what failed

    def loss(x: Any, theta: Any) -> Any:
        return loss_at(who, "outer", outer, x, theta, *data)

    def direct(theta: Any) -> tuple[Any, Solution]:
        solution = solver(started(who, start, theta, state.x), theta)
        return loss(solution.x, theta), solution

    if solver.adjoint is None:
        (value, solution), gradient = jax.value_and_grad(direct, has_aux=True)(theta)
        adjoint, residual, status = None, None, solution.status
    else:
        # The same mathematics as jax.grad of the implicit solver, spelled out because only so can the adjoint solve
        # start warm and report its residual.
        solution = solver(state.x, theta)  # with its derivative, which a level above may want
        value, (x_gradient, theta_gradient) = jax.value_and_grad(loss, argnums=(0, 1))(solution.x, theta)
        moved, adjoint, linear = solver.adjoint.pull_back(solution.x, theta, x_gradient, state.adjoint)
        # An adjoint that the loss does not need, to the accuracy that x has, is exact whatever became of its solve.
        size = jnp.maximum(jnp.abs(value), _tree.norm(theta) * _tree.norm(theta_gradient).astype(value.dtype))
        needless = negligible(x_gradient, reach(state.x, solution.x), size, solution.relative_residual)
        adjoint_status = jnp.where(needless, int(Status.CONVERGED), linear.status)
        failed = adjoint_status >= Status.STEP_BUDGET_SPENT
        if trust.on_adjoint_failure == "one_step":
            operator = cast(Operator, solver.iteration.operator)  # an adjoint comes from an operator
            moved = jax.lax.cond(
                failed, lambda: pull_back(operator, identity(), solution.x, theta, x_gradient)[0], lambda: moved
            )
        gradient = _tree.add(theta_gradient, moved)
        if trust.on_adjoint_failure == "zero":
            gradient = _tree.where(failed, _tree.zeros_like(gradient), gradient)
        residual, status = linear.residual, jnp.maximum(solution.status, adjoint_status)
    status = told(status, value, gradient)
    walk, change = advance_outer(state.outer, theta)
    error = None
    if trust.error_estimate:
        operator = cast(Operator, solver.iteration.operator)  # as check_trust has seen to
        error = estimate_error(operator, loss, solution.x, theta, gradient, adjoint).error
    info = Info(
        value, solution.residual, residual, status, solution.num_steps, change, solution.history, solution.x, error
    )
    return gradient, adjoint, info, walk
