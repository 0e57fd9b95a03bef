"""Differentiation by the implicit function theorem, and its one-step approximation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array

from .. import _tree
from .._checks import is_a, uncoupled
from .._moving import hoisted, moving
from .._types import Status, Theta, X
from ..linear import LinearInfo, LinearSolver, cg, differentiable_solve, gmres, identity
from ..operators import Operator
from ..operators._operator import displacement
from ..solvers import Adjoint, Solution, Solver
from ..solvers._solver import residual_at
from ._failure import adjoint_failed, check_policy, facts_of, reported, solve_failed, teller, watched
from ._unrolled import stopped

_NEAR = 1e-3  # a relative residual at which the derivative of a fixed point is still that of the steps


def implicit(
    solver: Solver[X, Theta], linear_solver: LinearSolver | None = None, *, on_failure: str = "warn"
) -> Solver[X, Theta]:
    r"""Returns the solver differentiated at its solution, whatever road led there.

    .. math:: \frac{dx}{d\theta} = (I - \partial_x T)^{-1} \partial_\theta T \quad\text{at}\quad x = T(x, \theta)

    Reverse mode solves the transposed (adjoint) system. Forward mode, Hessians, ``vmap`` and tracers that the iteration
    closes over work; the start x0 has no derivative.

    When: the solver converges to a fixed point at which T is differentiable and :math:`I - \partial_x T` is
    invertible. If the solve is cut short, the derivative belongs to another point: look at ``solution.residual``.

    Args:
        solver: from ``for_steps`` or ``until_converged``; its iteration needs an operator.
        linear_solver: from ``odl.linear``. Default: conjugate gradients where the operator is declared symmetric, else
            GMRES.
        on_failure: what a failed solve, forward or adjoint, does to a derivative under plain ``jax.grad``, which has
            no channel for its status: "warn" (a RuntimeWarning at run time, with status and residual), "raise" (a
            RuntimeError there) or "ignore". It is the derivative that tells: a solve that nobody differentiates has its
            status, and a ``Hypergradient`` says it in ``info``. Programs that are exported, or for JAX's persistent
            compilation cache where that is on, cannot call the host and carry no alarm. An adjoint whose right side
            is zero to the rounding of a loss of order 1 is exact whatever its status, and silent.

    Returns:
        A solver with the same solutions; all fields but x carry no derivative. Of ``for_steps`` the status is
        STEP_BUDGET_SPENT where the residual is neither a thousandth of its scale nor of the first one: the
        derivative is that of a fixed point, which this is not.

    Raises:
        TypeError: the iteration has no operator, ``solver`` or ``linear_solver`` is none; conjugate gradients asked for
            where the Jacobian is not declared symmetric.
        ValueError: an unknown ``on_failure``.

    Cost: one linear solve a derivative direction, each product one Jacobian product of T; memory does not grow with
    steps.

    Source: Krantz and Parks (2002); for solvers: Griewank and Walther (2008), chapter 15; Blondel et al. (2022).

    Example:
        >>> import jax, odljax as odl
        >>> root = odl.fixed_point(lambda x, theta: 0.5 * (x + theta / x))
        >>> solver = odl.implicit(odl.until_converged(root, tol=1e-6, max_steps=30))
        >>> round(float(jax.grad(lambda theta: solver(1.0, theta).x)(4.0)), 4)  # 1 / (2 sqrt(theta))
        0.25
    """
    operator = check_operator("implicit", solver)
    if linear_solver is None:
        linear_solver = cg() if operator.symmetric else gmres()
    is_a("implicit", "linear_solver", linear_solver, LinearSolver, "Make one with odl.linear, for instance cg().")
    if linear_solver.symmetric and not operator.symmetric:
        raise TypeError(
            f"implicit: {linear_solver.name} needs a symmetric positive-definite Jacobian, and that of "
            f"{operator.name} is not declared symmetric. Use gmres, bicgstab or neumann, or declare "
            f"Operator(T, symmetric=True) if it is."
        )
    return _at_the_solution(solver, linear_solver, check_policy("implicit", on_failure), "implicit")


def _at_the_solution(solver: Solver, linear_solver: LinearSolver, on_failure: str, derivative: str) -> Solver:
    operator = cast(Operator, solver.iteration.operator)
    exact = derivative == "implicit"

    def solve(x0: X, theta: Theta) -> Solution:
        theta = watched(derivative, on_failure, solver.iteration, x0, theta)
        solution = settled(solver, x0, theta) if exact else stopped(solver.solve, x0, theta)
        x = _attach(operator, linear_solver, alarm(derivative, on_failure), x0, solution, theta)
        return solution._replace(x=x)

    return dataclasses.replace(
        solver,
        solve=solve,
        derivative=derivative,
        adjoint=Adjoint(partial(pull_back, operator, linear_solver)),
        differentiate=None,
        quiet=None if on_failure == "ignore" else _at_the_solution(solver, linear_solver, "ignore", derivative),
    )


def settled(solver: Solver, x0: Any, theta: Any) -> Solution:
    """The solution without its own derivative; a fixed number of steps must have come near a fixed point."""
    solution = stopped(solver.solve, x0, theta)
    if solver.tolerance is not None:
        return solution
    first = residual_at(solver.iteration, x0, theta)
    relative, residual, first = cast(tuple[Array, Array, Array], (solution.relative_residual, solution.residual, first))
    far = (relative > _NEAR) & (residual > _NEAR * first)
    status = jnp.where(far, jnp.maximum(solution.status, int(Status.STEP_BUDGET_SPENT)), solution.status)
    return solution._replace(status=status.astype(solution.status.dtype))


def one_step(solver: Solver[X, Theta], *, on_failure: str = "warn") -> Solver[X, Theta]:
    r"""Returns the solver differentiated through one application of its operator at the solution.

    .. math:: \frac{dx}{d\theta} \approx \partial_\theta T

    When: T contracts fast (Newton steps exactly so), or a cheap biased hypergradient will do; the error is of the
    order of the contraction rate. Equal to ``implicit(solver, linear_solver=odl.linear.identity())``.

    Args:
        solver: from ``for_steps`` or ``until_converged``; its iteration needs an operator.
        on_failure: what a failed solve does to a derivative, as in ``implicit``.

    Raises:
        TypeError: the iteration has no operator.
        ValueError: an unknown ``on_failure``.

    Cost: one Jacobian product of T, no linear solve.

    Source: Bolte, Pauwels and Vaiter (2023).

    Example:
        >>> import jax, odljax as odl
        >>> line = odl.fixed_point(lambda x, theta: 0.1 * x + theta)
        >>> solver = odl.one_step(odl.for_steps(line, 50))
        >>> float(jax.grad(lambda theta: solver(0.0, theta).x)(1.0))  # the truth is 1 / 0.9
        1.0
    """
    check_operator("one_step", solver)
    return _at_the_solution(solver, identity(), check_policy("one_step", on_failure), "one_step")


def check_operator(who: str, solver: Any) -> Operator:
    """The operator of the solver's iteration; refuses a solver without one."""
    is_a(who, "solver", solver, Solver, "Make one with for_steps or until_converged.")
    operator = solver.iteration.operator
    if operator is None:
        raise TypeError(
            f"{who}: the derivative at a fixed point needs an operator, and {solver.iteration.name} has none. "
            f"Use unrolled, which differentiates the steps themselves."
        )
    return operator


def _attach(
    operator: Operator, linear_solver: LinearSolver, alarm: Alarm | None, x0: Any, solution: Solution, theta: Any
) -> Any:
    """``x`` with the implicit derivative in theta and in the tracers that the operator closes over."""
    x = solution.x
    function, captured = hoisted(partial(displacement, operator), x, theta)
    solver_of, held = _hoisted_solver(linear_solver, x)

    def tangent(x: Any, operands: Any, tangents: Any) -> Any:
        theta, captured, held, facts = operands
        if linear_solver.name != "identity":  # which alone forms no inner product and tests nothing
            uncoupled(f"implicit({operator.name})", function.jaxpr, len(jax.tree.leaves(x)))

        def solve(matvec: Any, b: Any) -> Any:
            v, info = solver_of(held)(matvec, b)
            return v if alarm is None else alarm(v, facts, info, b)

        _, moved = jax.jvp(lambda theta, captured: function(x, theta, *captured), operands[:2], tangents[:2])
        _, matvec = jax.linearize(lambda x: function(x, theta, *captured), x)
        return differentiable_solve(matvec, _tree.negative(moved), solve, symmetric=linear_solver.symmetric)

    return moving(x, (theta, captured, held, (*facts_of(solution), reach(x0, x))), tangent)


Alarm = Callable[[Any, tuple[Array, Array, Array], LinearInfo, Any], Any]


def alarm(who: str, on_failure: str) -> Alarm | None:
    """``(v, facts of the forward solve, info, b) -> v``, which tells the host if one of the two solves failed."""
    if on_failure == "ignore":
        return None

    def describe(worst: int, status: int, residual: float, adjoint: int, adjoint_residual: float) -> str:
        failed = status >= Status.STEP_BUDGET_SPENT
        return solve_failed(status, residual) if failed else adjoint_failed(adjoint, adjoint_residual)

    tell = teller(who, on_failure, describe)

    def sound(v: Any, facts: tuple[Array, Array, Array], info: LinearInfo, b: Any) -> Any:
        status, residual, size = facts
        adjoint = jnp.where(negligible(b, size, 1.0, residual), 0, info.status)
        return reported(v, (jnp.maximum(status, adjoint), status, residual, adjoint, info.residual), tell)

    return sound


def reach(x0: Any, x: Any) -> Array:
    """How large x is, or its way from x0 where it ends near zero."""
    x0, x = jax.lax.stop_gradient((x0, x))
    return jnp.maximum(_tree.norm(x), _tree.norm(_tree.subtract(x, x0)))


def negligible(cotangent: Any, size: Array, value: Any, relative_residual: Any) -> Array:
    """Whether the cotangent of an x of this size is zero as exactly as a loss of this value and a solve can tell."""
    eps = _tree.rounding(cotangent)
    cotangent, value, relative_residual = jax.lax.stop_gradient((cotangent, value, relative_residual))
    # The error of x is its residual times a condition, for which a thousand is allowed.
    exact = jnp.maximum(100 * eps, 1000 * jnp.asarray(relative_residual).astype(size.dtype))
    small = _tree.norm(cotangent) * size <= exact * jnp.abs(jnp.asarray(value)).astype(size.dtype)
    return small & (size > 0)


def _hoisted_solver(linear_solver: LinearSolver, x: Any) -> tuple[Any, list[Any]]:
    """The solver as a function of the traced values that its preconditioner closes over, and these values."""
    if linear_solver.preconditioner is None or linear_solver.preconditioned is None:
        return lambda held: linear_solver, []
    renew = linear_solver.preconditioned
    function, held = hoisted(linear_solver.preconditioner, x)
    return lambda held: renew(lambda v: function(v, *held)), jax.lax.stop_gradient(held)


def pull_back(
    operator: Operator, linear_solver: LinearSolver, x: Any, theta: Any, cotangent: Any, guess: Any = None
) -> tuple[Any, Any, LinearInfo]:
    """The cotangent of theta, the adjoint vector, and the truth about its solve; differentiable once more."""
    # One linearisation for both; the unused half of each product is dead code to the compiler.
    _, pull = jax.vjp(partial(displacement, operator), x, theta)
    # Known to JAX as a linear solve: who differentiates this (a level above) sees the adjoint vector move.
    guess = jax.lax.stop_gradient(guess)
    transposed = lambda v: pull(v)[0]  # noqa: E731
    try:
        adjoint, info = differentiable_solve(
            transposed,
            cotangent,
            lambda matvec, b: linear_solver(matvec, b, guess),
            symmetric=operator.symmetric,
            has_aux=True,
        )
    except (TypeError, ValueError):  # T has reverse mode only: its products cannot be transposed for a level above
        adjoint, info = linear_solver(transposed, cotangent, guess)
    return pull(_tree.negative(adjoint))[1], adjoint, info
