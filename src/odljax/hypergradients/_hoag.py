"""Hypergradients whose exactness grows with the outer walk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax.numpy as jnp
from jax import Array

from .. import _tree
from .._checks import coefficient, count, is_a, is_callable
from .._types import Coefficient, Scalar, State, Theta, X
from ..derivatives import implicit
from ..iterations import Iteration
from ..linear import LinearSolver, cg, gmres
from ..solvers import Solver, until_converged
from ..solvers._solver import residual_at
from ._estimator import Hypergradient, Info, step_of
from ._through import OuterLoss, WarmState, advance, check_trust, cold_start, keep_warm, warm


def hoag(
    iteration: Iteration[X, Theta],
    outer: OuterLoss,
    *,
    tol: Coefficient | None = None,
    max_steps: int = 1000,
    linear_solver: Callable[[Scalar], LinearSolver] | None = None,
    on_adjoint_failure: str = "keep",
    error_estimate: bool = False,
) -> Hypergradient[X, Theta]:
    r"""Returns HOAG: inner and adjoint solve are as exact as the outer step deserves, and start from the last ones.

    .. math:: \|x_t - T(x_t, \theta_t)\| \le \varepsilon_t, \quad
        \|(I - \partial_x T)^\top v_t - \nabla_x \ell\| \le \varepsilon_t \|\nabla_x \ell\|, \quad
        g_t = \nabla_\theta \ell + \partial_\theta T^\top v_t

    When: an implicit hypergradient, many outer updates: the first ones need no digits, and with summable
    :math:`\varepsilon_t` the outer walk converges as with exact hypergradients.

    Args:
        iteration: the inner walk; it needs an operator.
        outer: :math:`\ell`, ``(x, theta, *data) -> scalar``.
        tol: :math:`\varepsilon_t > 0`, decreasing and summable, a number, a schedule of the update number, or a
            function of theta; let it end above the rounding of the dtype. None: :math:`0.1 / (t + 1)^2`, but not below
            1000 rounding units, free of units: the inner solve takes it as its ``relative_tol``, and may stop at 1000
            rounding units of the residual it starts from, too, for a solution of zero has no scale.
        max_steps: budget of each inner solve, at least 1.
        linear_solver: ``tolerance -> LinearSolver``, for instance ``lambda tol: odl.linear.bicgstab(tol=tol)``.
            Default: conjugate gradients where the operator is declared symmetric, else GMRES.
        on_adjoint_failure: as in ``through``.
        error_estimate: as in ``through``.

    Raises:
        TypeError: ``iteration`` is none or has no operator; ``linear_solver`` is no function.
        ValueError: a tolerance that is not positive, a step budget below 1, an unknown policy.

    Cost: as ``warm_started`` with an implicit solver; the tolerances are data, so nothing compiles again.

    Source: Pedregosa (2016), algorithm 1. Differs: both tolerances are those of this library, on the operator's
    residual and relative to the right-hand side; the step size of theta belongs to optax.

    Example:
        >>> import jax, odljax as odl
        >>> inner = odl.gradient_descent(lambda x, theta: 0.5 * (x - theta) ** 2, step_size=0.5)
        >>> hyper = odl.hypergradients.hoag(inner, lambda x, theta: 0.5 * (x - 1.0) ** 2)
        >>> theta, state, update = 0.0, hyper.init(0.0, 4.0), jax.jit(hyper.update)
        >>> for _ in range(30):
        ...     gradient, state, info = update(theta, state)
        ...     theta = theta - 0.5 * gradient
        >>> round(float(theta), 2)
        1.0
    """
    who = "hoag"
    is_a(who, "iteration", iteration, Iteration, "Wrap a map T(x, theta) in odl.fixed_point(T).")
    is_callable(who, "outer", outer)
    tolerance = None if tol is None else coefficient(who, "tol", tol)
    max_steps = count(who, "max_steps", max_steps)
    if linear_solver is None:
        symmetric = iteration.operator is not None and iteration.operator.symmetric
        linear_solver = (lambda tol: cg(tol=tol)) if symmetric else (lambda tol: gmres(tol=tol))
    is_callable(who, "linear_solver", linear_solver, "tol")

    def solver_of(tol: Scalar, relative_tol: Scalar, adjoint_tol: Scalar) -> Solver[X, Theta]:
        stopping = until_converged(iteration, tol=tol, relative_tol=relative_tol, max_steps=max_steps)
        return implicit(stopping, linear_solver(adjoint_tol))

    any_one = solver_of(0.5, 0.0, 0.5)
    trust = check_trust(who, any_one, on_adjoint_failure, error_estimate)

    def init(theta: Theta, x0: X, *data: Any) -> WarmState:
        return warm(cold_start(who)(theta, x0), any_one)

    def update(theta: Theta, state: WarmState, *data: Any) -> tuple[Theta, State, Info]:
        walk = state.outer
        if tolerance is not None:
            epsilon = tolerance(theta, walk.t)
            solver = solver_of(epsilon, 0.0, epsilon)
        else:
            floor, first = 1000 * _tree.rounding(state.x), cast(Array, residual_at(iteration, state.x, theta))
            epsilon = jnp.maximum(0.1 / (walk.t.astype(float) + 1.0) ** 2, floor)
            solver = solver_of(jnp.where(first < jnp.inf, floor * first, 0), epsilon, epsilon)
        return keep_warm(state, *advance(who, solver, outer, theta, state, data, trust))

    return Hypergradient(init, update, f"hoag({iteration.name})", step_of(iteration))
