"""Differentiation by the implicit function theorem, and its one-step approximation."""

from __future__ import annotations

import dataclasses
import warnings
from functools import partial
from typing import Any

import jax
import numpy as np

from .. import _tree
from .._checks import is_a
from .._types import STATUS_MESSAGES, Status, Theta, X
from ..linear import LinearInfo, LinearSolver, cg, differentiable_solve, gmres, identity
from ..operators import Operator
from ..operators._operator import displacement
from ..solvers import Adjoint, Solution, Solver
from ._moving import hoisted, moving
from ._unrolled import stopped


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
        on_failure: what a failed adjoint solve does under plain ``jax.grad``, which has no channel for its status:
            "warn" (a RuntimeWarning at run time, with status and residual) or "ignore", which ``jax.export`` needs: it
            takes no host callbacks. It never stops the run. A ``Hypergradient`` reports it in ``info`` instead.

    Returns:
        A solver with the same solutions; all fields but x carry no derivative.

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
    is_a("implicit", "solver", solver, Solver, "Make one with for_steps or until_converged.")
    operator = solver.iteration.operator
    if operator is None:
        raise TypeError(
            f"implicit: the derivative at a fixed point needs an operator, and {solver.iteration.name} has none. "
            f"Use unrolled, which differentiates the steps themselves."
        )
    if linear_solver is None:
        linear_solver = cg() if operator.symmetric else gmres()
    is_a("implicit", "linear_solver", linear_solver, LinearSolver, "Make one with odl.linear, for instance cg().")
    if linear_solver.symmetric and not operator.symmetric:
        raise TypeError(
            f"implicit: {linear_solver.name} needs a symmetric positive-definite Jacobian, and that of "
            f"{operator.name} is not declared symmetric. Use gmres, bicgstab or neumann, or declare "
            f"Operator(T, symmetric=True) if it is."
        )
    if on_failure not in ("warn", "ignore"):
        raise ValueError(f"implicit: on_failure must be 'warn' or 'ignore'; {on_failure!r} came.")

    def solve(x0: X, theta: Theta) -> Solution:
        solution = stopped(solver.solve, x0, theta)
        x = _attach(operator, linear_solver, on_failure == "warn", solution.x, theta)
        return solution._replace(x=x)

    adjoint = Adjoint(partial(pull_back, operator, linear_solver))
    return dataclasses.replace(solver, solve=solve, derivative="implicit", adjoint=adjoint, differentiate=None)


def one_step(solver: Solver[X, Theta]) -> Solver[X, Theta]:
    r"""Returns the solver differentiated through one application of its operator at the solution.

    .. math:: \frac{dx}{d\theta} \approx \partial_\theta T

    When: T contracts fast (Newton steps exactly so), or a cheap biased hypergradient will do; the error is of the
    order of the contraction rate. Equal to ``implicit(solver, linear_solver=odl.linear.identity())``.

    Args:
        solver: from ``for_steps`` or ``until_converged``; its iteration needs an operator.

    Raises:
        TypeError: the iteration has no operator.

    Cost: one Jacobian product of T, no linear solve.

    Source: Bolte, Pauwels and Vaiter (2023).

    Example:
        >>> import jax, odljax as odl
        >>> line = odl.fixed_point(lambda x, theta: 0.1 * x + theta)
        >>> solver = odl.one_step(odl.for_steps(line, 50))
        >>> float(jax.grad(lambda theta: solver(0.0, theta).x)(1.0))  # the truth is 1 / 0.9
        1.0
    """
    return dataclasses.replace(implicit(solver, identity()), derivative="one_step")


def _attach(operator: Operator, linear_solver: LinearSolver, warn: bool, x: Any, theta: Any) -> Any:
    """``x`` with the implicit derivative in theta and in the tracers that the operator closes over."""
    function, captured = hoisted(partial(displacement, operator), x, theta)
    solver_of, held = _hoisted_solver(linear_solver, x)

    def tangent(x: Any, operands: Any, tangents: Any) -> Any:
        theta, captured, held = operands

        def solve(matvec: Any, b: Any) -> Any:
            v, info = solver_of(held)(matvec, b)
            if warn:
                _report(info)
            return v

        _, moved = jax.jvp(lambda theta, captured: function(x, theta, *captured), operands[:2], tangents[:2])
        _, matvec = jax.linearize(lambda x: function(x, theta, *captured), x)
        return differentiable_solve(matvec, _tree.negative(moved), solve, symmetric=linear_solver.symmetric)

    return moving(x, (theta, captured, held), tangent)


def _hoisted_solver(linear_solver: LinearSolver, x: Any) -> tuple[Any, list[Any]]:
    """The solver as a function of the traced values that its preconditioner closes over, and these values."""
    if linear_solver.preconditioner is None or linear_solver.preconditioned is None:
        return lambda held: linear_solver, []
    renew = linear_solver.preconditioned
    function, held = hoisted(linear_solver.preconditioner, x)
    return lambda held: renew(lambda v: function(v, *held)), jax.lax.stop_gradient(held)


def _report(info: LinearInfo) -> None:
    """Warns at run time if the linear solve failed; under ``vmap`` the branch is a select, so the host looks again."""

    def warn(status: Any, residual: Any) -> None:
        for code, size in zip(np.ravel(status), np.ravel(residual), strict=True):
            if code >= Status.STEP_BUDGET_SPENT:
                warnings.warn(
                    f"implicit: the adjoint solve failed ({Status(int(code)).name}, relative residual {size:.1e}): "
                    f"{STATUS_MESSAGES[Status(int(code))]}. The derivative is not to be trusted.",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def tell() -> None:
        jax.debug.callback(warn, info.status, info.residual)

    jax.lax.cond(info.status >= Status.STEP_BUDGET_SPENT, tell, lambda: None)


def pull_back(
    operator: Operator, linear_solver: LinearSolver, x: Any, theta: Any, cotangent: Any, guess: Any = None
) -> tuple[Any, Any, LinearInfo]:
    """The cotangent of theta, the adjoint vector, and the truth about its solve; differentiable once more."""
    # One linearisation for both; the unused half of each product is dead code to the compiler.
    _, pull = jax.vjp(partial(displacement, operator), x, theta)
    # Known to JAX as a linear solve: who differentiates this (a level above) sees the adjoint vector move.
    guess = jax.lax.stop_gradient(guess)
    adjoint, info = differentiable_solve(
        lambda v: pull(v)[0],
        cotangent,
        lambda matvec, b: linear_solver(matvec, b, guess),
        symmetric=operator.symmetric,
        has_aux=True,
    )
    return pull(_tree.negative(adjoint))[1], adjoint, info
