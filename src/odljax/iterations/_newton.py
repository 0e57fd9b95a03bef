"""Steps that solve a linear system: Newton, Gauss-Newton, Levenberg-Marquardt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .. import _tree
from .._checks import coefficient, is_a, is_callable
from .._types import Coefficient, State, Step
from ..linear import LinearSolver, cg, differentiable_solve
from ..operators import Operator, gradient
from ..operators._gradient import Objective, value_and_gradient
from ._iteration import Iteration, stateless

Residual = Callable[[Any, Any], Any]


def _solver(who: str, linear_solver: LinearSolver | None) -> Callable[[Callable[[Any], Any], Any], Any]:
    """``(matvec, b) -> v`` for a symmetric matrix, differentiable."""
    linear_solver = cg() if linear_solver is None else linear_solver
    is_a(who, "linear_solver", linear_solver, LinearSolver, "Make one with odl.linear, for instance dense().")

    def solve(matvec: Callable[[Any], Any], b: Any) -> Any:
        return differentiable_solve(matvec, b, lambda matvec, b: linear_solver(matvec, b)[0], symmetric=True)

    return solve


def newton(objective: Objective, linear_solver: LinearSolver | None = None, damping: Coefficient = 0.0) -> Iteration:
    r"""Returns Newton's method on f.

    .. math:: (\nabla^2 f(x_k, \theta) + \lambda_k I)\, d_k = -\nabla f(x_k, \theta), \qquad x_{k+1} = x_k + d_k

    When: f is smooth and strongly convex near the solution, with a Hessian product that costs little more than a
    gradient: quadratic convergence near it. Far from it a full step may not descend: ``line_search(newton(f), f)``.
    Where the Hessian is not positive definite, conjugate gradients stop with the direction that they have, which may be
    none: damp, or start elsewhere. The solve ignores its own status.

    The operator is the unit gradient step :math:`x - \nabla f`, so the residual is the length of the gradient.

    Args:
        objective: f, ``(x, theta) -> scalar``.
        linear_solver: from ``odl.linear``. Default: ``cg()``; ``dense()`` for a few unknowns.
        damping: :math:`\lambda_k \ge 0`, a number, a schedule of k or a function of theta.

    Raises:
        ValueError: a negative damping.
        TypeError: objective is no function, linear_solver is none; at trace time, an objective that is not a real
            scalar.

    Cost: one gradient and one linear solve a step, each product one Hessian product; no state.

    Source: Nocedal and Wright (2006), sections 3.3 and 7.1.

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> f = lambda x, theta: jnp.sum(jnp.exp(x) - theta * x)
        >>> solution = odl.until_converged(odl.newton(f), tol=1e-5)(jnp.zeros(2), jnp.array([2.0, 3.0]))
        >>> [round(float(entry), 4) for entry in solution.x], int(solution.num_steps)
        ([0.6931, 1.0986], 5)
    """
    is_callable("newton", "objective", objective, "x, theta")
    solve = _solver("newton", linear_solver)
    damping_at = coefficient("newton", "damping", damping, closed=True)

    def step(x: Any, state: State, theta: Any, k: Step) -> tuple[Any, State]:
        slope, hessian = jax.linearize(lambda x: value_and_gradient("newton", objective, x, theta)[1], x)
        shift = damping_at(theta, k)
        direction = solve(lambda v: _tree.add_scaled(hessian(v), shift, v), slope)
        return _tree.subtract(x, direction), state

    return Iteration(stateless, step, gradient(objective, 1.0), "newton")


def half_square(residual: Residual) -> Objective:
    """Half the squared norm of a residual."""

    def objective(x: Any, theta: Any) -> Array:
        r = residual(x, theta)
        return 0.5 * _tree.vdot(r, r)

    return objective


class _Model(NamedTuple):
    """The linear model of a residual in units of its own, so that no square of it under- or overflows: r / a, J / b and
    the damping / b^2, for powers of two a and b of the size of r and of J^T r / a. A step is then in units of a / b."""

    r: Any
    slope: Any
    normal: Callable[[Any], Any]
    a: Array
    b: Array

    def shift(self, damping: Any) -> Array:
        return jnp.asarray(damping).astype(self.b.dtype) / self.b / self.b

    def step(self, direction: Any) -> Any:
        return _tree.scale(self.a / self.b, direction)


def _least_squares(who: str, residual: Residual) -> tuple[Callable[[Any, Any], _Model], Operator]:
    """The linear model of the residual at a point, and the unit gradient step on half its square."""
    is_callable(who, "residual", residual, "x, theta")

    def model(x: Any, theta: Any) -> _Model:
        r, push = jax.linearize(lambda x: residual(x, theta), x)
        transpose = jax.linear_transpose(push, x)
        pull = lambda u: _tree.conjugate(transpose(_tree.conjugate(u))[0])  # noqa: E731
        a = _tree.magnitude(r)
        r = _tree.per_unit(r, a)
        slope = pull(r)
        b = _tree.magnitude(slope)
        normal = lambda v: _tree.per_unit(pull(_tree.per_unit(push(v), b)), b)  # noqa: E731
        return _Model(r, _tree.per_unit(slope, b), normal, a, b)

    return model, gradient(half_square(residual), 1.0)


def gauss_newton(
    residual: Residual, linear_solver: LinearSolver | None = None, damping: Coefficient = 0.0
) -> Iteration:
    r"""Returns the Gauss-Newton method on half the square of a residual.

    .. math:: (J^\top J + \lambda_k I)\, d_k = -J^\top r(x_k, \theta), \qquad x_{k+1} = x_k + d_k, \qquad
        J = \partial_x r(x_k, \theta)

    When: nonlinear least squares with a residual that is small, or nearly linear, at the solution; one step solves a
    linear problem. Far from the solution: ``levenberg_marquardt``, or ``line_search`` around this.

    The linear solver sees the normal equations, whose condition is that of J squared: in float32 directions lose digits
    early, which costs steps, but not digits of the answer, whose gradient :math:`J^\top r` is exact. Where J has
    not full column rank they are singular: damp, or leave it to conjugate gradients; ``dense()`` gives NaN.

    Args:
        residual: r, ``(x, theta) -> pytree`` of any shapes.
        linear_solver: from ``odl.linear``. Default: ``cg()``; ``dense()`` for a few unknowns.
        damping: :math:`\lambda_k \ge 0`, a number, a schedule of k or a function of theta.

    Raises:
        ValueError: a negative damping.
        TypeError: residual is no function, linear_solver is none.

    Cost: one residual, one product with J^T, one linear solve a step, each product one with J and one with J^T; no
    state. The operator, which is the unit gradient step on half the square, costs one gradient.

    Source: Gauss (1809); Nocedal and Wright (2006), section 10.3.

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> t = jnp.arange(4.0)
        >>> fit = odl.gauss_newton(lambda x, data: x["a"] * jnp.exp(x["b"] * t) - data)
        >>> start = {"a": 1.0, "b": 0.0}
        >>> x = odl.until_converged(fit, tol=1e-4)(start, 2.0 * jnp.exp(-0.5 * t)).x
        >>> round(float(x["a"]), 3), round(float(x["b"]), 3)
        (2.0, -0.5)
    """
    model_at, operator = _least_squares("gauss_newton", residual)
    solve = _solver("gauss_newton", linear_solver)
    damping_at = coefficient("gauss_newton", "damping", damping, closed=True)

    def step(x: Any, state: State, theta: Any, k: Step) -> tuple[Any, State]:
        model = model_at(x, theta)
        shift = model.shift(damping_at(theta, k))
        direction = solve(lambda v: _tree.add_scaled(model.normal(v), shift, v), model.slope)
        return _tree.subtract(x, model.step(direction)), state

    return Iteration(stateless, step, operator, "gauss_newton")


class MarquardtState(NamedTuple):
    """The factor by which the damping has changed."""

    factor: Array


def levenberg_marquardt(
    residual: Residual, linear_solver: LinearSolver | None = None, damping: Coefficient = 1e-3
) -> Iteration:
    r"""Returns the method of Levenberg and Marquardt on half the square of a residual.

    .. math:: (J^\top J + \lambda_k I)\, d_k = -J^\top r(x_k, \theta), \qquad
        \rho_k = \frac{\|r(x_k)\|^2 - \|r(x_k + d_k)\|^2}{\|r(x_k)\|^2 - \|r(x_k) + J d_k\|^2}

    The step is taken where :math:`\rho_k > 10^{-4}`; :math:`\lambda` is divided by three where :math:`\rho_k > 3/4`,
    and doubled where :math:`\rho_k < 1/4`, but is not kept below rounding of the curvature along the step,
    :math:`\epsilon\, (-d_k^\top J^\top r) / \|d_k\|^2`. Where the decrease that the model promises is below the
    rounding of the sum of squares, the gain cannot be measured and counts as one.

    When: nonlinear least squares from a start that may be far away. A damping that is small against the eigenvalues of
    :math:`J^\top J` trusts the start, a large one makes short gradient steps first.

    The factors are piecewise constant, and the derivative through the steps takes them so.

    Args:
        residual: r, ``(x, theta) -> pytree`` of any shapes.
        linear_solver: from ``odl.linear``. Default: ``cg()``; ``dense()`` for a few unknowns.
        damping: :math:`\lambda_0 > 0`, a number, a schedule of k or a function of theta.

    Raises:
        ValueError: a damping that is not positive.
        TypeError: residual is no function, linear_solver is none.

    Cost: two residuals and one product with J^T a step, one linear solve; one number of state. The operator is that of
    ``gauss_newton``.

    Source: Levenberg (1944), Marquardt (1963); the gain ratio: Fletcher (1971); Nocedal and Wright (2006), section
    10.3.

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> rosenbrock = lambda x, theta: (10.0 * (x[1] - x[0] ** 2), theta - x[0])
        >>> fit = odl.levenberg_marquardt(rosenbrock, odl.linear.dense())
        >>> solution = odl.until_converged(fit, tol=1e-4, max_steps=100)(jnp.array([-1.2, 1.0]), 1.0)
        >>> [round(float(entry), 3) for entry in solution.x]
        [1.0, 1.0]
    """
    model_at, operator = _least_squares("levenberg_marquardt", residual)
    solve = _solver("levenberg_marquardt", linear_solver)
    damping_at = coefficient("levenberg_marquardt", "damping", damping)

    def init(x: Any, theta: Any) -> MarquardtState:
        return MarquardtState(jnp.ones((), _tree.accumulation_dtype(x)))

    def step(x: Any, state: MarquardtState, theta: Any, k: Step) -> tuple[Any, MarquardtState]:
        model, factor = model_at(x, theta), jax.lax.stop_gradient(state.factor)
        info = jnp.finfo(factor.dtype)
        first = model.shift(damping_at(theta, k))
        shift = factor * first
        back = solve(lambda v: _tree.add_scaled(model.normal(v), shift, v), model.slope)
        trial = _tree.subtract(x, model.step(back))
        ahead = _tree.per_unit(residual(trial, theta), model.a)
        before, squared, fall = _tree.vdot(model.r, model.r), _tree.vdot(back, back), _tree.vdot(model.slope, back)
        promised = shift * squared + fall
        gained = before - _tree.vdot(ahead, ahead)
        measurable = promised > 100 * info.eps * before
        gain = jnp.where(measurable, gained / jnp.where(measurable, promised, jnp.ones_like(promised)), 1)
        change = jnp.where(gain > 0.75, 1 / 3, jnp.where(gain >= 0.25, 1.0, 2.0)).astype(factor.dtype)
        # A residual that is no number at x itself must show.
        taken = jax.lax.stop_gradient((gain > 1e-4) | ~jnp.isfinite(before))
        known = squared > 0
        least = jnp.where(known, info.eps * fall, 0) / jnp.where(known, squared, 1) / first
        factor = jax.lax.stop_gradient(jnp.clip(jnp.maximum(factor * change, least), info.tiny, 0.25 / info.tiny))
        return _tree.where(taken, trial, x), MarquardtState(factor)

    return Iteration(init, step, operator, "levenberg_marquardt")
