"""The splitting of OSQP with a penalty that balances its residuals."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from .._checks import count
from .._types import Coefficient, Scalar, State, Step
from ..linear import LinearSolver
from ..operators import QPVariables
from ..operators import quadratic_program as quadratic_program_operator
from ..operators._quadratic_program import Program, metric_at, reader, splitting
from ._iteration import Iteration, MeasuredStep

_LEAST = math.log2(5)  # a penalty within a factor of five of the one that would balance stays


def quadratic_program(
    program: Program,
    *,
    penalty: Coefficient = 0.1,
    regularization: Coefficient | None = None,
    relaxation: Scalar = 1.6,
    scaling: int = 10,
    adapt_every: int | None = 20,
    linear_solver: LinearSolver | None = None,
    infeasibility_tol: Scalar | None = None,
) -> Iteration:
    r"""Returns the ADMM of OSQP for a quadratic program, on ``QPVariables(x, z, y)``, with an adaptive penalty.

    .. math:: \min_x \tfrac12 x^\top P x + q^\top x \quad\text{subject to}\quad l \le A x \le u

    Its steps are those of ``operators.quadratic_program``. Every ``adapt_every`` steps the penalty is multiplied by the
    power of two nearest to :math:`\sqrt{r_p / r_d}`, the geometric mean of the ratio of the relative residuals, primal
    over dual and equilibrated, over the second half of these steps, if that is above 5 or below 1/5; by 64 at most.
    Where it takes back the last change, the steps between two looks double, so that it settles. Powers of two are
    locally constant in theta: the derivative of the steps is exact, though the choice has none. Operator, residual and
    implicit derivative are those of the first penalty, whose fixed points are the same.

    When: the one call for quadratic and linear programs, whatever their units. ``solution.x.x`` is the primal solution,
    ``solution.x.y`` the multipliers; ``polish_quadratic_program`` gives them all digits. A program without a solution
    ends with the status PRIMAL_INFEASIBLE or DUAL_INFEASIBLE under ``until_converged``.

    Args:
        program: a ``QuadraticProgram``, or a function of theta that returns one.
        penalty: :math:`\rho > 0` to begin with, a number or a function of theta.
        regularization: :math:`\sigma > 0`, a number or a function of theta; goes with the penalty. None: see
            ``operators.quadratic_program``.
        relaxation: :math:`\alpha` in (0, 2).
        scaling: see ``operators.quadratic_program``.
        adapt_every: steps before the first look at the residuals, at least 1, static. None: the penalty stays.
        linear_solver: from ``odl.linear``. None: dense where P and A are arrays, else conjugate gradients.
        infeasibility_tol: see ``operators.quadratic_program``.

    Raises:
        ValueError: a penalty or regularisation that is not positive, a relaxation outside (0, 2), adapt_every below 1,
            a negative scaling, a lower bound above the upper one (where they are not traced).
        TypeError: program is none, shapes that do not fit each other, x is no ``QPVariables``.

    Cost: two products each with A and its transpose, one with P and two with a dense n by n matrix a step (under
    ``until_converged`` two more and the products that go with them, for the certificate); once, what
    ``operators.quadratic_program`` prepares. The state is five numbers.

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
    options = {"relaxation": relaxation, "linear_solver": linear_solver}
    weights = {"penalty": penalty, "regularization": regularization, "scaling": scaling}
    operator = quadratic_program_operator(program, **options, **weights, infeasibility_tol=infeasibility_tol)
    split = splitting(who, reader(who, program), metric_at(who, **weights), **options)
    every = None if adapt_every is None else count(who, "adapt_every", adapt_every)

    def init(u: QPVariables, theta: Any) -> State:
        return () if every is None else Penalty.initial(every, u.x.dtype)

    def step(u: QPVariables, state: State, theta: Any, k: Step) -> tuple[QPVariables, State, Any]:
        done = split(u, theta, None if every is None else state.scale)
        return done.outcome, state if every is None else adapted(state, done.imbalance), done.residuals

    return Iteration(init, MeasuredStep(step), operator, who)


class Penalty(NamedTuple):
    """The state: by what the first penalty is multiplied, and what was seen since it was last looked at.

    Attributes:
        scale: a power of two.
        total: the sum of the imbalances in the second half of the wait.
        age: steps since the last look.
        wait: steps between two looks; doubles where a change takes back the one before, so that it settles.
        last: the sign of the last change, 0 before the first.
    """

    scale: Array
    total: Array
    age: Array
    wait: Array
    last: Array

    @classmethod
    def initial(cls, every: int, dtype: Any) -> Penalty:
        number = jnp.asarray(0, int)
        return cls(jnp.ones((), dtype), jnp.zeros((), dtype), number, number + every, jnp.zeros((), dtype))


def adapted(penalty: Penalty, imbalance: Array) -> Penalty:
    """The penalty after one more step, of whose residuals the binary logarithm of the ratio is given."""
    age, wait = penalty.age + 1, penalty.wait
    seen = age > wait // 2
    total = penalty.total + jnp.where(seen, imbalance, 0)
    due = age >= wait
    doublings = 0.5 * total / (wait - wait // 2).astype(total.dtype)
    change = jnp.clip(jnp.round(doublings), -6, 6)
    most = float(jnp.finfo(penalty.scale.dtype).eps) ** -0.5  # beyond it the decomposition has no digits
    change = jnp.where(due & (jnp.abs(doublings) > _LEAST), change, 0)
    return Penalty(
        jnp.clip(jnp.ldexp(penalty.scale, change.astype(jnp.int32)), 1 / most, most),
        jnp.where(due, 0, total),
        jnp.where(due, 0, age),
        jnp.where(change * penalty.last < 0, 2 * wait, wait),
        jnp.where(change == 0, penalty.last, jnp.sign(change)),
    )
