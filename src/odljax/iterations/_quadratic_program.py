"""The splitting of OSQP with a penalty that balances its residuals."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .._checks import count
from .._types import Coefficient, Scalar, State, Step
from ..linear import LinearSolver
from ..operators import QPVariables
from ..operators import quadratic_program as quadratic_program_operator
from ..operators._quadratic_program import Program, reader, splitting
from ._iteration import Iteration, stateless


def quadratic_program(
    program: Program,
    *,
    penalty: Coefficient = 0.1,
    regularization: Coefficient | None = None,
    relaxation: Scalar = 1.6,
    adapt_every: int | None = 25,
    linear_solver: LinearSolver | None = None,
    infeasibility_tol: Scalar | None = None,
) -> Iteration:
    r"""Returns the ADMM of OSQP for a quadratic program, on ``QPVariables(x, z, y)``, with an adaptive penalty.

    .. math:: \min_x \tfrac12 x^\top P x + q^\top x \quad\text{subject to}\quad l \le A x \le u

    Its steps are those of ``operators.quadratic_program``. Every ``adapt_every`` steps the penalty is multiplied by the
    power of two nearest to :math:`\sqrt{r_p / r_d}`, the relative primal over the relative dual residual, if that is
    at least 4 or at most 1/4. Powers of two are locally constant in theta: the derivative of the steps is exact, though
    the choice has none. Operator, residual and implicit derivative are those of the first penalty, whose fixed points
    are the same.

    When: the one call for quadratic and linear programs. ``solution.x.x`` is the primal solution, ``solution.x.y`` the
    multipliers; ``polish_quadratic_program`` gives them all digits. A program without a solution ends with the status
    PRIMAL_INFEASIBLE or DUAL_INFEASIBLE under ``until_converged``. Badly scaled data: ``equilibrate`` first.

    Args:
        program: a ``QuadraticProgram``, or a function of theta that returns one.
        penalty: :math:`\rho > 0` to begin with, a number or a function of theta; 1e3 times as much for equalities.
        regularization: :math:`\sigma > 0`, a number or a function of theta. None: 1e-6 in float64, else 1e-3.
        relaxation: :math:`\alpha` in (0, 2).
        adapt_every: steps between two looks at the residuals, at least 1, static. None: the penalty stays.
        linear_solver: from ``odl.linear``. None: dense where P and A are arrays, else conjugate gradients.
        infeasibility_tol: see ``operators.quadratic_program``.

    Raises:
        ValueError: a penalty or regularisation that is not positive, a relaxation outside (0, 2), adapt_every below 1,
            a lower bound above the upper one (where they are not traced).
        TypeError: program is none, shapes that do not fit each other, x is no ``QPVariables``.

    Cost: two products each with A and its transpose, one with P and two with a dense n by n matrix a step; once, a
    Cholesky factor and a symmetric eigendecomposition, which serve every penalty. The state is one number.

    Source: Stellato et al. (2020), algorithm 1 and section 5.2, where the matrix is factored anew for each penalty.

    Example:
        >>> import jax, jax.numpy as jnp, odljax as odl
        >>> P, A = jnp.array([[4.0, 1.0], [1.0, 2.0]]), jnp.array([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
        >>> def program(budget):  # the share of two assets, none above 0.7
        ...     lower, upper = jnp.stack([budget, 0.0, 0.0]), jnp.stack([budget, 0.7, 0.7])
        ...     return odl.operators.QuadraticProgram(P, jnp.ones(2), A, lower, upper)
        >>> solver = odl.implicit(odl.until_converged(odl.quadratic_program(program), tol=1e-5))
        >>> start = odl.operators.QPVariables.zeros(2, 3)
        >>> [round(float(share), 2) for share in solver(start, jnp.array(1.0)).x.x]
        [0.3, 0.7]
        >>> round(float(jax.grad(lambda budget: solver(start, budget).x.x[0])(jnp.array(1.0))), 2)
        1.0
    """
    who = "quadratic_program"
    options = {"penalty": penalty, "regularization": regularization, "relaxation": relaxation}
    options = {**options, "linear_solver": linear_solver}
    operator = quadratic_program_operator(program, **options, infeasibility_tol=infeasibility_tol)
    if adapt_every is None:
        return Iteration(stateless, lambda u, state, theta, k: (operator(u, theta), state), operator, who)
    every = count(who, "adapt_every", adapt_every)
    split = splitting(who, reader(who, program), **options)

    def init(u: QPVariables, theta: Any) -> Array:
        return jnp.ones((), u.x.dtype)

    def step(u: QPVariables, scale: State, theta: Any, k: Step) -> tuple[QPVariables, State]:
        _, u, imbalance = split(u, theta, scale)
        doublings = jnp.round(0.5 * jnp.log2(jax.lax.stop_gradient(imbalance)))
        due = ((k + 1) % every == 0) & (jnp.abs(doublings) >= 2)
        bounded = jnp.clip(scale * jnp.exp2(jnp.clip(doublings, -20, 20)), 2.0**-20, 2.0**20)
        return u, jnp.where(due, bounded, scale)

    return Iteration(init, step, operator, who)
