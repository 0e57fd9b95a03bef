"""Pessimistic trajectory truncation: reverse from the iterate at which the outer loss is worst."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from .. import _tree
from .._checks import differentiable, is_a, is_callable
from .._types import State, Step, Theta, X
from ..iterations import Iteration
from ..operators import Operator
from ..operators._operator import displacement
from ..solvers import Solver, for_steps
from ..solvers._solver import checked_step, residual_at, start_state
from ._estimator import Hypergradient, Info, WalkState, advance_outer, loss_at, start_outer, step_of, told
from ._start import check_start, first_start, started


class Trajectory(NamedTuple):
    """The iterate, and the one so far at which the outer loss is worst."""

    x: Any
    worst: Any


class _Found(NamedTuple):
    """The state of the inner walk, the worst outer loss so far and its step number."""

    inner: State
    value: Any
    k: Any


_REASONS = {
    "implicit": "differentiates at a solution, and the worst iterate is none",
    "on_support": "differentiates at a solution, and the worst iterate is none",
    "one_step": "differentiates at a solution, and the worst iterate is none",
    "phantom": "differentiates at a solution, and the worst iterate is none",
    "truncated": "differentiates the last steps only, which lie behind the worst iterate",
}


def pessimistic(
    solver: Solver[X, Theta], outer: Callable[..., Any], *, start: Callable[[Theta], X] | None = None
) -> Hypergradient[X, Theta]:
    r"""Returns the estimator that differentiates the outer loss at the iterate at which it is worst.

    .. math:: k^\star = \arg\max_{1 \le k \le K} \ell(x_k(\theta), \theta), \qquad
        g = \nabla_\theta\, \ell(x_{k^\star}(\theta), \theta)

    The first of equals counts; losses are compared without a derivative. The worst loss over the walk bounds that of
    the last iterate, and tends to that of the solution where the walk converges.

    When: the inner problem is not convex in x, so that the last iterate may be no better than earlier ones, and its
    start matters; with ``start`` this is the initialisation auxiliary of the source. Composes with any iteration, as
    ``aggregate``, and with ``unrolled``, its checkpoints, or ``forward``.

    Args:
        solver: from ``for_steps``, bare or under ``unrolled`` or ``forward``.
        outer: :math:`\ell`, ``(x, theta, *data) -> scalar``.
        start: :math:`x_0(\theta)`, ``theta -> x``, a learned start; the x0 of ``init`` is then not used and may be
            None. None: the x0 of ``init``, which has no derivative.

    Returns:
        An estimator. ``info.num_steps`` is :math:`k^\star`, ``info.value`` the worst loss, ``info.x`` and
        ``info.inner_residual`` those of :math:`x_{k^\star}`. A loss that is NaN counts as the worst.

    Raises:
        ValueError: a solver with a tolerance; a derivative at the solution, or of the last steps only.
        TypeError: ``solver``, ``outer`` or ``start`` is none; at trace time, an outer loss that is not a real scalar, a
            theta that is not floating point.

    Cost: as ``through``, K evaluations of the outer loss more and a second copy of x; steps behind :math:`k^\star` are
    differentiated, too, with zeros.

    Source: Liu, Liu, Zeng and Zhang (2021), arXiv 2110.00455, algorithm 1 (IAPTT-GM). Differs: the start is one more
    part of theta, so any optax optimiser moves it.

    Example:
        >>> import odljax as odl
        >>> inner = odl.gradient_descent(lambda x, theta: 0.5 * (x - theta) ** 2, step_size=0.5)
        >>> hyper = odl.hypergradients.pessimistic(odl.for_steps(inner, 9), lambda x, theta: -(x - 1.4) ** 2)
        >>> gradient, state, info = hyper.update(2.0, hyper.init(2.0, 0.0))
        >>> int(info.num_steps), float(info.x)  # of 1, 1.5, 1.75, ... the farther the worse, up to k = 9
        (2, 1.5)
    """
    who = "pessimistic"
    is_a(who, "solver", solver, Solver, "Make one with for_steps.")
    is_callable(who, "outer", outer)
    if solver.tolerance is not None:
        raise ValueError(
            f"{who}: the worst of a fixed number of iterates is looked for, and {solver.name} stops by itself, near "
            f"one solution. Use for_steps."
        )
    if solver.derivative in _REASONS:
        raise ValueError(
            f"{who}: reverses the steps that lead to the worst iterate, and {solver.name} "
            f"{_REASONS[solver.derivative]}. Use unrolled, forward or a bare for_steps."
        )
    check_start(who, start, solver)
    record = solver.record
    recorded = None if record is None else (lambda walk, theta, k: record(walk.x, theta, k))

    def init(theta: Theta, x0: X, *data: Any) -> WalkState:
        differentiable(who, theta)
        return WalkState(first_start(who, start, x0), start_outer(theta))

    def update(theta: Theta, state: WalkState, *data: Any) -> tuple[Theta, State, Info]:
        differentiable(who, theta)

        def loss(x: Any, theta: Any) -> Any:
            return loss_at(who, "outer", outer, x, theta, *data)

        walk = for_steps(_watching(solver.iteration, loss), solver.num_steps, history=solver.history, record=recorded)
        if solver.differentiate is not None:
            walk = solver.differentiate(walk)
            walk = walk.quiet or walk  # the info says what failed

        def value_of(theta: Theta) -> Any:
            x0 = started(who, start, theta, state.x)
            solution = walk(Trajectory(x0, x0), theta)
            return loss(solution.x.worst, theta), solution

        (value, solution), gradient = jax.value_and_grad(value_of, has_aux=True)(theta)
        x = solution.x.worst
        status = told(solution.status, value, gradient)
        outer_walk, change = advance_outer(state.outer, theta)
        residual = residual_at(solver.iteration, x, theta)
        info = Info(value, residual, None, status, solution.state.k, change, solution.history, x)
        return gradient, WalkState(state.x, outer_walk), info

    return Hypergradient(init, update, f"{who}({solver.name})", None if start else step_of(solver.iteration))


def _watching(iteration: Iteration[X, Theta], loss: Callable[[Any, Any], Any]) -> Iteration[Trajectory, Theta]:
    """The iteration that remembers the worst of its iterates after the start."""

    def init(walk: Trajectory, theta: Theta) -> _Found:
        value = jax.eval_shape(loss, walk.x, theta)
        return _Found(start_state(iteration, walk.x, theta), jnp.full((), -jnp.inf, value.dtype), jnp.zeros((), int))

    def step(walk: Trajectory, state: _Found, theta: Theta, k: Step) -> tuple[Trajectory, _Found]:
        x, inner = checked_step(iteration, walk.x, state.inner, theta, k)
        value = jax.lax.stop_gradient(loss(*jax.lax.stop_gradient((x, theta))))
        # So written, a NaN is worse than any number, and stays.
        worse = ~(value <= state.value) & ~jnp.isnan(state.value)
        found = _Found(inner, jnp.where(worse, value, state.value), jnp.where(worse, k + 1, state.k))
        return Trajectory(x, _tree.where(worse, x, walk.worst)), found

    operator, base = None, cast(Any, iteration.operator)
    if base is not None:
        operator = Operator(
            lambda walk, theta: Trajectory(base(walk.x, theta), walk.worst),
            displacement=lambda walk, theta: Trajectory(
                displacement(base, walk.x, theta), _tree.zeros_like(walk.worst)
            ),
            name=base.name,
        )
    return Iteration(init, step, operator, iteration.name, iteration.num_layers)
