"""Differentiation through a few damped steps at the solution."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from .. import _tree
from .._checks import count, is_a, number
from .._types import Scalar, Theta, X
from ..operators._operator import displacement
from ..solvers import Solution, Solver
from ._failure import check_policy, with_alarm
from ._unrolled import from_the_solution


def phantom(
    solver: Solver[X, Theta], num_steps: int, damping: Scalar = 0.5, *, on_failure: str = "warn"
) -> Solver[X, Theta]:
    r"""Returns the solver differentiated through J damped applications of its operator at the solution.

    .. math:: y_0 = x^\star \text{ (detached)}, \quad y_{j+1} = y_j + \lambda (T(y_j, \theta) - y_j), \qquad
        \frac{dx}{d\theta} \approx \frac{d y_J}{d\theta}
        = \lambda \sum_{j<J} \bigl((1 - \lambda) I + \lambda\, \partial_x T\bigr)^j \partial_\theta T

    The value is that of the solver. With damping 1 it equals ``truncated`` at the solution of a Picard iteration, and
    ``implicit(solver, linear_solver=odl.linear.neumann(J - 1))``.

    When: a cheap biased derivative will do, and the plain series of ``truncated`` grows or oscillates: the damped one
    converges wherever the eigenvalues of :math:`(1 - \lambda) I + \lambda\, \partial_x T` lie inside the unit circle.

    Args:
        solver: from ``for_steps`` or ``until_converged``; its iteration needs an operator.
        num_steps: J, at least 1, static.
        damping: :math:`\lambda` in (0, 2); above 1 only if T is itself averaged.
        on_failure: what a failed solve does to a derivative, as in ``implicit``.

    Raises:
        TypeError: ``solver`` is none; its iteration has no operator.
        ValueError: J below 1, a damping outside (0, 2), an unknown ``on_failure``.

    Cost: J applications of T; reverse mode stores J steps.

    Source: Geng, Zhang, Bai, Wang and Lin (2021), unrolled phantom gradient, equation 9. Differs: the value stays that
    of the solver; it is not moved on by the J steps.

    Example:
        >>> import jax, odljax as odl
        >>> line = odl.fixed_point(lambda x, theta: 0.5 * x + theta)
        >>> solver = odl.phantom(odl.until_converged(line, max_steps=100), 2, damping=0.5)
        >>> float(jax.grad(lambda theta: solver(0.0, theta).x)(1.0))  # 2 (1 - 0.75^2); the truth is 2
        0.875
    """
    is_a("phantom", "solver", solver, Solver, "Make one with for_steps or until_converged.")
    num_steps = count("phantom", "num_steps", num_steps)
    number("phantom", "damping", damping, high=2.0)
    operator = solver.iteration.operator
    if operator is None:
        raise TypeError(
            f"phantom: the steps at the solution are those of an operator, and {solver.iteration.name} has none. "
            f"Use unrolled or truncated, which differentiate the iteration's own steps."
        )

    def solve(x0: X, theta: Theta) -> Solution:
        def walk(solution: Solution) -> X:
            # The damping is no part of the point: its derivative would be that of the residual alone.
            weight = jax.lax.stop_gradient(damping)

            def step(y: X, _: Any) -> tuple[X, None]:
                return _tree.add_scaled(y, -weight, displacement(operator, y, theta)), None

            return jax.lax.scan(step, solution.x, length=num_steps)[0]

        return from_the_solution(solver, x0, theta, walk)

    steps = dataclasses.replace(solver, solve=solve, derivative="phantom", adjoint=None, differentiate=None)
    return with_alarm(steps, check_policy("phantom", on_failure))
