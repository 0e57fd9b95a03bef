"""Quadratic programs: the splitting of OSQP, its polish, and the special cases with equalities or a box alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from .. import _tree
from .._checks import as_inner, coefficient_of_theta, count, describe, is_a, is_callable, number, same_as
from .._types import Coefficient, Scalar, Status, Theta
from ..linear import LinearSolver, cg, differentiable_solve, gmres
from ._operator import Operator
from ._weights import solve_definite


class QuadraticProgram(NamedTuple):
    r"""The data of :math:`\min_x \tfrac12 x^\top P x + q^\top x` subject to :math:`l \le A x \le u`.

    Attributes:
        P: [n, n], positive semidefinite; its symmetric part is used. A function ``v -> P v``, or None for P = 0 (a
            linear program).
        q: [n].
        A: [m, n], or a linear function ``v -> A v``, whose transpose is derived.
        lower: l [m], -inf where there is no bound.
        upper: u [m], inf where there is no bound; equal to l for an equality.
    """

    P: Any
    q: Any
    A: Any
    lower: Any
    upper: Any


class QPVariables(NamedTuple):
    """The variables of a quadratic program.

    Attributes:
        x: [n], the primal variable: the answer.
        z: [m], the image ``A x``, kept between the bounds.
        y: [m], the multiplier: ``P x + q + A' y = 0``; positive at an upper bound, negative at a lower one.
    """

    x: Any
    z: Any
    y: Any

    @classmethod
    def zeros(cls, num_variables: int, num_constraints: int, dtype: Any = float) -> QPVariables:
        """The usual start."""
        return cls(*(jnp.zeros(size, dtype) for size in (num_variables, num_constraints, num_constraints)))


Program = QuadraticProgram | Callable[[Any], QuadraticProgram]


class Problem(NamedTuple):
    """A quadratic program in the dtype of the variables, as products; the arrays are None where a function came."""

    hessian: Callable[[Array], Array]
    forward: Callable[[Array], Array]
    transpose: Callable[[Array], Array]
    q: Array
    lower: Array
    upper: Array
    P: Array | None
    A: Array | None


def quadratic_program(
    program: Program,
    *,
    penalty: Coefficient = 0.1,
    regularization: Coefficient | None = None,
    relaxation: Scalar = 1.6,
    linear_solver: LinearSolver | None = None,
    infeasibility_tol: Scalar | None = None,
) -> Operator:
    r"""Returns the ADMM operator of OSQP on ``QPVariables(x, z, y)``.

    For :math:`\min_x \tfrac12 x^\top P x + q^\top x` subject to :math:`l \le A x \le u`, with
    :math:`M = P + \sigma I + A^\top R A` and :math:`R = \operatorname{diag}(\rho)`,

    .. math::
        \tilde x &= x - M^{-1} (P x + q + A^\top (y + R (A x - z))), \quad \tilde z = A \tilde x \\
        x^+ &= \alpha \tilde x + (1 - \alpha) x \\
        z^+ &= \Pi_{[l, u]}(\alpha \tilde z + (1 - \alpha) z + R^{-1} y) \\
        y^+ &= y + R (\alpha \tilde z + (1 - \alpha) z - z^+)

    Its fixed points are the points that satisfy the optimality conditions, whatever :math:`\rho`, :math:`\sigma` and
    :math:`\alpha`. The system is solved for the correction of x, which vanishes at a fixed point: the accuracy of the
    solution is that of the products with P and A, in float32, too.

    When: a convex quadratic or linear program of moderate size, above all as a layer with a derivative. Converges for
    every :math:`\rho, \sigma > 0` and :math:`\alpha` in (0, 2), but how fast depends on :math:`\rho`:
    ``odl.quadratic_program`` adapts it on the way. Where the program has no solution the displacement converges to a
    proof of that, and ``until_converged`` ends with PRIMAL_INFEASIBLE or DUAL_INFEASIBLE.

    Non-expansive: with the metric :math:`G = \operatorname{diag}(\sigma I, R, R^{-1})`, which it carries, and not in
    the identity: for all pairs of points with :math:`\alpha = 1`; with :math:`\alpha` in [1, 2) from its own outcomes
    on (that is, between points at which y lies in the normal cone of the box at z).

    Derivative: where strict complementarity and linear independence of the active constraints hold, that of the
    solution in all data. At a weakly active constraint (z at its bound, y = 0) it is that of the active side, finite.
    Where multipliers are not unique, the implicit system is singular; add the missing curvature or drop the constraint.

    Shapes: x [n], z and y [m].

    Args:
        program: a ``QuadraticProgram``, or a function of theta that returns one; cast to the dtype of x. l <= u is
            assumed where the bounds are traced.
        penalty: :math:`\rho > 0` of inequalities, a number or a function of theta; equalities get 1e3 times, rows
            without a bound 1e-3 times as much.
        regularization: :math:`\sigma > 0`, a number or a function of theta. None: 1e-6 in float64, else 1e-3.
        relaxation: :math:`\alpha` in (0, 2).
        linear_solver: for M, symmetric positive definite: from ``odl.linear``. None: a Cholesky factor where P and A
            are arrays, which the compiler computes once for a loop; else conjugate gradients. As the correction
            vanishes, an inexact solve (``cg(tol=1e-3)``) still has the exact fixed points.
        infeasibility_tol: a certificate must prove that no solution has a norm below 1/tol times that of the iterate
            and its step (at least 1). None: 1e-6 in float64, else 1e-3.

    Raises:
        ValueError: a penalty or regularisation that is not positive, a relaxation outside (0, 2); a lower bound above
            the upper one (where they are not traced).
        TypeError: program is none, its shapes do not fit each other, x is no ``QPVariables`` of these shapes.

    Cost: one product with P, two with A, one with its transpose, and two triangular solves; the factor once.

    Source: Stellato et al. (2020), algorithm 1 and section 5.2; certificates: Banjac et al. (2019); metric: He and Yuan
    (2012).

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> program = odl.operators.QuadraticProgram(
        ...     P=jnp.eye(2), q=jnp.array([-3.0, 1.0]), A=jnp.eye(2), lower=jnp.full(2, 0.5), upper=jnp.ones(2)
        ... )
        >>> T = odl.operators.quadratic_program(program)
        >>> solution = odl.until_converged(odl.fixed_point(T), tol=1e-6)(odl.operators.QPVariables.zeros(2, 2), None)
        >>> [round(float(entry), 3) for entry in solution.x.x], [round(float(entry), 3) for entry in solution.x.y]
        ([1.0, 0.5], [2.0, -1.5])
    """
    who = "quadratic_program"
    read = reader(who, program)
    split = splitting(who, read, penalty, regularization, relaxation, linear_solver)
    weights = weights_of(who, penalty, regularization)
    certificate = _certificate(who, read, infeasibility_tol)

    def metric(v: QPVariables, theta: Any) -> QPVariables:
        sigma, rho = weights(read(v, theta), theta)
        return type(v)(sigma * v.x, rho * v.z, v.y / rho)

    def metric_inverse(v: QPVariables, theta: Any) -> QPVariables:
        sigma, rho = weights(read(v, theta), theta)
        return type(v)(v.x / sigma, v.z / rho, v.y * rho)

    return Operator(
        apply=lambda u, theta: split(u, theta)[1],
        displacement=lambda u, theta: split(u, theta)[0],
        metric=metric,
        metric_inverse=metric_inverse,
        readout=lambda u, theta: u.x,
        certificate=certificate,
        name=who,
    )


def reader(who: str, program: Program) -> Callable[[Any, Any], Problem]:
    """``(u, theta) -> Problem`` after checks: of a constant program at construction, of all shapes at trace time."""
    if callable(program):
        is_callable(who, "program", program, "theta")
    else:
        _check_program(who, program)

    def read(u: Any, theta: Any) -> Problem:
        data = program(theta) if callable(program) else program
        if callable(program):
            _check_program(who, data)
        is_a(who, "x", u, QPVariables, "Start from odl.operators.QPVariables.zeros(n, m).")
        wanted = {"x": data.q, "z": data.lower, "y": data.lower}
        for name, like in wanted.items():
            if jnp.shape(getattr(u, name)) != jnp.shape(like):
                raise TypeError(
                    f"{who}: x.{name} must have the shape {jnp.shape(like)} of the program; "
                    f"{describe(getattr(u, name))} came. Start from odl.operators.QPVariables.zeros(n, m)."
                )
        return _products(data, as_inner(who, "x", u).x.dtype)

    return read


def _check_program(who: str, program: Any) -> None:
    is_a(
        who,
        "program",
        program,
        QuadraticProgram,
        "Pass QuadraticProgram(P, q, A, lower, upper) or a function of theta.",
    )
    n, m = jnp.shape(program.q), jnp.shape(program.lower)
    wanted: dict[str, tuple[Any, ...]] = {"q": (n[:1] or ("n",)), "lower": (m[:1] or ("m",)), "upper": m}
    if program.P is not None and not callable(program.P):
        wanted["P"] = (*n, *n)
    if not callable(program.A):
        wanted["A"] = (*m, *n)
    for name, shape in wanted.items():
        value = getattr(program, name)
        if jnp.shape(value) != shape:
            letters = {"P": "[n, n]", "q": "[n]", "A": "[m, n]", "lower": "[m]", "upper": "[m]"}[name]
            came = ", ".join(f"{part} {_shape_of(getattr(program, part))}" for part in program._fields)
            raise TypeError(f"{who}: {name} must be {letters}; came {came}. Reshape {name} to {list(shape)}.")
    bounds = (program.lower, program.upper)
    if not any(isinstance(bound, Tracer) for bound in bounds):
        lower, upper = (np.asarray(bound) for bound in bounds)
        if (lower > upper).any():
            first = int(np.argmax(lower > upper))
            raise ValueError(
                f"{who}: lower must not exceed upper; at row {first} they are {lower[first]} and {upper[first]}. "
                f"Swap them, or relax the row."
            )


def _shape_of(value: Any) -> str:
    return "a function" if callable(value) else "None" if value is None else str(list(jnp.shape(value)))


def _products(program: QuadraticProgram, dtype: Any) -> Problem:
    q, lower, upper = (jnp.asarray(part).astype(dtype) for part in (program.q, program.lower, program.upper))
    P = A = None
    hessian: Any = program.P
    forward: Any = program.A
    if program.P is None:
        P, hessian = jnp.zeros((q.size, q.size), dtype), jnp.zeros_like
    elif not callable(program.P):
        half = jnp.asarray(program.P).astype(dtype) / 2
        P = half + half.T
        hessian = partial(jnp.matmul, P)
    if not callable(program.A):
        A = jnp.asarray(program.A).astype(dtype)
        return Problem(hessian, partial(jnp.matmul, A), partial(jnp.matmul, A.T), q, lower, upper, P, A)

    def transpose(w: Array) -> Array:
        return jax.linear_transpose(forward, q)(w)[0]

    return Problem(hessian, forward, transpose, q, lower, upper, P, A)


def weights_of(
    who: str, penalty: Coefficient, regularization: Coefficient | None
) -> Callable[[Problem, Any], tuple[Array, Array]]:
    """``(problem, theta) -> (sigma, rho)``, rho one for each constraint."""
    rho_of = coefficient_of_theta(who, "penalty", penalty)
    sigma_of = None if regularization is None else coefficient_of_theta(who, "regularization", regularization)

    def weights(problem: Problem, theta: Any) -> tuple[Array, Array]:
        lower, upper = problem.lower, problem.upper
        dtype = lower.dtype
        default = 1e-6 if dtype.itemsize == 8 else 1e-3
        sigma = jnp.asarray(default if sigma_of is None else sigma_of(theta)).astype(dtype)
        free = jnp.where(jnp.isinf(lower) & jnp.isinf(upper), 1e-3, 1.0)
        kind = jnp.where(lower == upper, 1e3, free).astype(dtype)
        return sigma, kind * jnp.asarray(rho_of(theta)).astype(dtype)

    return weights


Split = Callable[..., tuple[QPVariables, QPVariables, Array]]


def splitting(
    who: str,
    read: Callable[[Any, Any], Problem],
    penalty: Coefficient,
    regularization: Coefficient | None,
    relaxation: Scalar,
    linear_solver: LinearSolver | None,
) -> Split:
    """``(u, theta, scale) -> (displacement, outcome, imbalance)``: scale multiplies rho, None is 1.

    The imbalance is the ratio of the relative residuals, primal over dual; NaN where no scale came.
    """
    number(who, "relaxation", relaxation, high=2.0)
    weights = weights_of(who, penalty, regularization)
    if linear_solver is not None:
        is_a(who, "linear_solver", linear_solver, LinearSolver, "Make one with odl.linear, for instance cg().")

    def split(u: QPVariables, theta: Any, scale: Array | None = None) -> tuple[QPVariables, QPVariables, Array]:
        problem = read(u, theta)
        sigma, base = weights(problem, theta)
        rho = base if scale is None else base * scale.astype(base.dtype)
        alpha = jnp.asarray(relaxation).astype(base.dtype)
        x, z, y = u
        image = same_as(who, "A", problem.forward(x), z, "z")
        bent = same_as(who, "P", problem.hessian(x), x)
        gap = image - z
        if scale is None:
            pull, imbalance = problem.transpose(y + rho * gap), jnp.full((), jnp.nan, x.dtype)
        else:
            held = problem.transpose(y)
            pull = held + problem.transpose(rho * gap)
            primal = _ratio(_largest(gap), _largest(image, z))
            dual = _ratio(_largest(bent + problem.q + held), _largest(bent, held, problem.q))
            settled = jnp.maximum(primal, dual) < 100 * jnp.finfo(x.dtype).eps
            imbalance = jnp.where(settled | (dual == 0), jnp.ones_like(dual), _ratio(primal, dual))
        solve = _system(problem, sigma, base, scale, linear_solver)
        correction = solve(-(bent + problem.q + pull))
        shift = alpha * correction
        drift = alpha * (gap + problem.forward(correction))
        new_z = project(z + drift + y / rho, problem.lower, problem.upper)
        rise = new_z - z
        lift = rho * (drift - rise)
        return type(u)(-shift, -rise, -lift), type(u)(x + shift, new_z, y + lift), imbalance

    return split


def _system(
    problem: Problem, sigma: Array, base: Array, scale: Array | None, linear_solver: LinearSolver | None
) -> Callable[[Array], Array]:
    """``b -> (P + sigma I + scale A' R A)^-1 b``, differentiated as a linear system: no factor carries a derivative."""
    rho = base if scale is None else base * scale.astype(base.dtype)

    def product(v: Array) -> Array:
        return problem.hessian(v) + sigma * v + problem.transpose(rho * problem.forward(v))

    if linear_solver is None and problem.P is not None and problem.A is not None:
        direct = _factored(jax.lax.stop_gradient((problem.P, problem.A, sigma, base, scale)))
        return lambda b: differentiable_solve(product, b, lambda _, b: direct(b), symmetric=True)
    if linear_solver is None:
        return lambda b: solve_definite(product, b, cg())
    # One that was given may be loose on purpose: the correction vanishes, whatever its digits.
    return lambda b: differentiable_solve(product, b, lambda matvec, b: linear_solver(matvec, b)[0], symmetric=True)


def _factored(parts: Any) -> Callable[[Array], Array]:
    """The dense solve. One decomposition serves every scale: it does not depend on it, so a loop computes it once."""
    dtype = parts[0].dtype
    P, A, sigma, base, scale = jax.tree.map(lambda part: part.astype(_tree.accumulation_dtype(part)), parts)
    coupling = A.T @ (base[:, None] * A)
    factor = jnp.linalg.cholesky(P + sigma * jnp.eye(len(P), dtype=P.dtype) + coupling)
    if scale is None:
        return lambda b: jax.scipy.linalg.cho_solve((factor, True), b.astype(factor.dtype)).astype(dtype)
    # L^-1 (A' R A) L^-T = Q D Q' makes L (I + (scale - 1) Q D Q') L' of the matrix.
    half = jax.scipy.linalg.solve_triangular(factor, coupling, lower=True)
    eigenvalues, vectors = jnp.linalg.eigh(jax.scipy.linalg.solve_triangular(factor, half.T, lower=True))
    basis = jax.scipy.linalg.solve_triangular(factor, vectors, lower=True, trans="T")
    spread = 1 + (scale - 1) * jnp.clip(eigenvalues, 0, 1)
    return lambda b: (basis @ ((basis.T @ b.astype(basis.dtype)) / spread)).astype(dtype)


def project(w: Array, lower: Array, upper: Array) -> Array:
    """The projection onto the box; on its boundary the derivative is that of the boundary, and NaN bounds show."""
    unknown = jnp.isnan(lower) | jnp.isnan(upper)
    inside = jnp.where(w <= lower, lower, jnp.where(w >= upper, upper, w))
    return jnp.where(unknown, jnp.full_like(w, jnp.nan), inside)


def _largest(*vectors: Array) -> Array:
    """The largest magnitude, 0 of nothing."""
    return jnp.max(jnp.concatenate([jnp.abs(vector) for vector in vectors]), initial=0)


def _ratio(size: Array, of: Array) -> Array:
    return size / jnp.where(of > 0, of, jnp.ones_like(of))


def _certificate(
    who: str, read: Callable[[Any, Any], Problem], tol: Scalar | None
) -> Callable[[QPVariables, QPVariables, Any], Array]:
    """Whether a displacement proves that there is no solution: exact inequalities, up to the rounding of their sums.

    Every feasible x has ``(A'v)'x = v'Ax <= sup of v'z over the box``, so where the support of v is below
    ``-r |A'v|`` there is none of norm up to r; likewise a dual solution for a direction of descent. That A'v is small
    is also asked in the scale of A: far away is not nowhere.
    """
    if tol is not None:
        number(who, "infeasibility_tol", tol, high=1.0)

    def certificate(u: QPVariables, displacement: QPVariables, theta: Any) -> Array:
        problem = read(u, theta)
        lower, upper = problem.lower, problem.upper
        wide = jnp.finfo(u.x.dtype)
        limit = jnp.asarray((1e-6 if wide.bits == 64 else 1e-4) if tol is None else tol).astype(u.x.dtype)
        none, slack = jnp.zeros_like(lower), 100 * float(wide.eps)

        def reach(*vectors: Array) -> Array:
            return jnp.maximum(1.0, _tree.norm(vectors)).astype(u.x.dtype) / limit

        def scale(matrix: Array | None, product: Callable[[Array], Array], length: int) -> Array:
            if matrix is not None:
                return _largest(matrix.ravel())
            return _tree.norm(product(jnp.ones(length, u.x.dtype))).astype(u.x.dtype) / max(length, 1) ** 0.5

        size_A = scale(problem.A, problem.forward, u.x.size)
        size_P = scale(problem.P, problem.hessian, u.x.size)

        def proves(terms: Array, error: Array) -> Array:
            return jnp.sum(terms) + slack * jnp.sum(jnp.abs(terms)) + error < 0

        v = -displacement.y  # into the directions in which the box is bounded
        v = jnp.where(jnp.isinf(upper), jnp.minimum(v, 0), v)
        v = jnp.where(jnp.isinf(lower), jnp.maximum(v, 0), v)
        support = jnp.where(v > 0, jnp.where(v > 0, upper, none) * v, jnp.where(v < 0, lower, none) * v)
        pulled = _tree.norm(problem.transpose(v)).astype(v.dtype)
        primal = proves(support, reach(u.x, u.z, displacement.x, displacement.z) * pulled)
        primal = primal & (pulled <= limit * size_A * _tree.norm(v).astype(v.dtype)) | jnp.any(lower > upper)

        d = -displacement.x
        image = problem.forward(d)
        outside = jnp.where(jnp.isfinite(upper), jnp.maximum(image, 0), none)
        outside = outside + jnp.where(jnp.isfinite(lower), jnp.maximum(-image, 0), none)
        bent, length, outside = (_tree.norm(part).astype(d.dtype) for part in (problem.hessian(d), d, outside))
        dual = proves(problem.q * d, reach(u.x, displacement.x) * bent + reach(u.y, displacement.y) * outside)
        dual = dual & (bent <= limit * size_P * length) & (outside <= limit * size_A * length)

        code = jnp.where(dual, jnp.int32(Status.DUAL_INFEASIBLE), jnp.int32(-1))
        return jnp.where(primal, jnp.int32(Status.PRIMAL_INFEASIBLE), code)

    return certificate


def equilibrate_quadratic_program(
    program: Program, *, num_steps: int = 10
) -> tuple[Callable[[Theta], QuadraticProgram], Callable[[QPVariables, Theta], QPVariables]]:
    r"""Returns the program in variables of comparable scale, and the map of its solution back to the given variables.

    With diagonal D and E and a number c, found by ``num_steps`` of Ruiz's scaling of the matrix of the optimality
    conditions,

    .. math:: \hat P = c D P D, \quad \hat q = c D q, \quad \hat A = E A D, \quad \hat l = E l, \quad \hat u = E u

    When: rows or columns of very different size, where ADMM is slow. D, E and c carry no derivative: the solution that
    comes back has the derivative in all data as if nothing had been scaled.

    Args:
        program: P and A arrays (or P None), or a function of theta that returns such.
        num_steps: at least 1, static; 10 is usual.

    Returns:
        ``(scaled, restore)``: a function of theta that returns the scaled program, for ``quadratic_program``, and
        ``restore(variables, theta)``, the variables of the given one.

    Raises:
        TypeError: program is none, shapes that do not fit each other, P or A is a function.
        ValueError: a step count below 1; a lower bound above the upper one (where they are not traced).

    Cost: num_steps passes over P and A; loop-invariant, so once a solve.

    Source: Ruiz (2001); Stellato et al. (2020), algorithm 2.

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> P, q, A = jnp.diag(jnp.array([1e4, 1.0])), jnp.array([-1e4, 1.0]), jnp.eye(2)
        >>> program = odl.operators.QuadraticProgram(P, q, A, jnp.full(2, 0.5), jnp.full(2, 3.0))
        >>> scaled, restore = odl.operators.equilibrate_quadratic_program(program)
        >>> solver = odl.until_converged(odl.quadratic_program(scaled), tol=1e-6)
        >>> u = restore(solver(odl.operators.QPVariables.zeros(2, 2), None).x, None)
        >>> [round(float(entry), 3) for entry in u.x]
        [1.0, 0.5]
    """
    who = "equilibrate_quadratic_program"
    num_steps = count(who, "num_steps", num_steps)
    if callable(program):
        is_callable(who, "program", program, "theta")
    else:
        _check_program(who, program)

    def scales(theta: Any) -> tuple[QuadraticProgram, Array, Array, Array]:
        data = program(theta) if callable(program) else program
        if callable(program):
            _check_program(who, data)
        if callable(data.P) or callable(data.A):
            raise TypeError(f"{who}: needs P and A as arrays; a function came. Scale the functions yourself.")
        q, A = jnp.asarray(data.q), jnp.asarray(data.A)
        P = jnp.zeros((q.size, q.size), q.dtype) if data.P is None else jnp.asarray(data.P)
        data = data._replace(P=P, q=q, A=A)
        P, q, A = jax.lax.stop_gradient((P, q, A))

        def body(_: Any, carry: Any) -> Any:
            d, e, c = carry
            scaled_P, scaled_A = c * d[:, None] * P * d[None], e[:, None] * A * d[None]
            columns = jnp.maximum(jnp.max(jnp.abs(scaled_P), axis=0), jnp.max(jnp.abs(scaled_A), axis=0, initial=0))
            d, e = d / _root(columns), e / _root(jnp.max(jnp.abs(scaled_A), axis=1))
            typical = jnp.mean(jnp.max(jnp.abs(c * d[:, None] * P * d[None]), axis=0))
            size = jnp.maximum(typical, jnp.max(jnp.abs(c * d * q)))
            return d, e, c / jnp.where(size > 0, size, jnp.ones_like(size))

        ones = jnp.ones(q.size, q.dtype), jnp.ones(A.shape[0], q.dtype), jnp.ones((), q.dtype)
        return data, *jax.lax.fori_loop(0, num_steps, body, ones)

    def scaled(theta: Theta) -> QuadraticProgram:
        data, d, e, c = scales(theta)
        lower, upper = (e * jnp.asarray(bound) for bound in (data.lower, data.upper))
        P, A = c * d[:, None] * data.P * d[None], e[:, None] * data.A * d[None]
        return QuadraticProgram(P, c * d * data.q, A, lower, upper)

    def restore(u: QPVariables, theta: Theta) -> QPVariables:
        _, d, e, c = scales(theta)
        d, e, c = (part.astype(u.x.dtype) for part in (d, e, c))
        return type(u)(d * u.x, u.z / e, e * u.y / c)

    return scaled, restore


def _root(size: Array) -> Array:
    """The root by which a row is divided; a row of zeros stays."""
    return jnp.sqrt(jnp.where(size > 0, size, jnp.ones_like(size)))


# ---- exact solutions of linear systems -------------------------------------------------------------------------------


def polish_quadratic_program(
    program: Program, *, num_refinements: int = 3
) -> Callable[[QPVariables, Theta], QPVariables]:
    r"""Returns the function ``(variables, theta) -> variables`` that solves for the solution on the active constraints.

    With the rows a of A that are active at an approximate solution, and their bounds b,

    .. math:: \begin{pmatrix} P & A_a^\top \\ A_a & 0 \end{pmatrix} \begin{pmatrix} x \\ y_a \end{pmatrix} =
        \begin{pmatrix} -q \\ b \end{pmatrix}

    When: ADMM has found the active constraints, to three digits say, and more digits are wanted. It is kept only if it
    satisfies the optimality conditions as well as the given point, up to rounding. Its derivative is that of this
    system, exact in forward and reverse mode: ``polish(jax.lax.stop_gradient(u), theta)`` is a differentiable solution
    without ``implicit``. Where it is not kept (the active constraints were not found yet) the derivative is NaN.

    Args:
        program: that of the operator; P and A arrays (or P None).
        num_refinements: steps of iterative refinement, at least 0, which remove the regularisation that lets dependent
            constraints pass.

    Raises:
        TypeError: as in ``quadratic_program``; P or A is a function.

    Cost: one dense solve of n + m unknowns.

    Source: Stellato et al. (2020), section 4.

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> program = odl.operators.QuadraticProgram(
        ...     P=jnp.eye(2), q=jnp.array([-3.0, 1.0]), A=jnp.eye(2), lower=jnp.full(2, 0.5), upper=jnp.ones(2)
        ... )
        >>> rough = odl.for_steps(odl.quadratic_program(program), 10)(odl.operators.QPVariables.zeros(2, 2), None).x
        >>> odl.operators.polish_quadratic_program(program)(rough, None).x.tolist()
        [1.0, 0.5]
    """
    who = "polish_quadratic_program"
    read = reader(who, program)

    def polish(u: QPVariables, theta: Any) -> QPVariables:
        problem = read(u, theta)
        if problem.P is None or problem.A is None:
            raise TypeError(f"{who}: needs P and A as arrays; a function came. Solve to a smaller tolerance instead.")
        lower, upper = problem.lower, problem.upper
        z, y = jax.lax.stop_gradient((u.z, u.y))
        low, high = (z - lower < -y) | (lower == upper), upper - z < y
        bound = jnp.where(low, lower, jnp.where(high, upper, jnp.zeros_like(upper)))
        active = (low | high).astype(bound.dtype)
        x, y = _active_set_solution(problem, active, bound, num_refinements)
        image = problem.forward(x)
        polished = type(u)(x, jnp.where(low | high, bound, image), y)
        terms = (problem.hessian(x), problem.q, problem.transpose(jnp.abs(y)), polished.z, y)
        rounding = 100 * float(jnp.finfo(x.dtype).eps) * _largest(*terms)
        better = jax.lax.stop_gradient(_violation(problem, polished) <= _violation(problem, u) + rounding)
        # What is not kept has no derivative here, which must not pass for zero: a root at zero has the derivative NaN.
        data = (problem.P, problem.q, problem.A, jnp.where(low | high, bound, jnp.zeros_like(bound)))
        root = jnp.sqrt(jnp.where(better, 1, 0 * sum(jnp.sum(part) for part in data)))
        unknown = jax.tree.map(lambda leaf: leaf + (root - jax.lax.stop_gradient(root)), jax.lax.stop_gradient(u))
        return _tree.where(better, polished, unknown)

    return polish


def _active_set_solution(problem: Problem, active: Array, bound: Array, num_refinements: int) -> tuple[Array, Array]:
    """x and y of the optimality conditions with the active rows as equalities and no multiplier elsewhere."""

    n = problem.q.size

    # One vector rather than two: no symbolic zero of one of them meets the linear solve.
    def conditions(v: Array) -> Array:
        x, y = v[:n], v[n:]
        slope = problem.hessian(x) + problem.transpose(active * y)
        return jnp.concatenate([slope, active * problem.forward(x) - (1 - active) * y])

    P, A, rows = jax.lax.stop_gradient((problem.P, problem.A, active))
    assert P is not None
    assert A is not None
    coupling = rows[:, None] * A
    matrix = jnp.block([[P, coupling.T], [coupling, -jnp.diag(1 - rows)]])
    tiny = float(jnp.finfo(P.dtype).eps) ** 0.5 * jnp.max(jnp.abs(matrix))
    nudge = tiny * jnp.concatenate([jnp.ones(n, P.dtype), -rows])
    factors = jax.scipy.linalg.lu_factor(matrix + jnp.diag(nudge))

    def solve(matvec: Callable[[Array], Array], b: Array) -> Array:
        v = jax.scipy.linalg.lu_solve(factors, b)
        for _ in range(num_refinements):
            v = v + jax.scipy.linalg.lu_solve(factors, b - matvec(v))
        return v

    v = differentiable_solve(conditions, jnp.concatenate([-problem.q, active * bound]), solve, symmetric=True)
    return v[:n], v[n:]


def _violation(problem: Problem, u: QPVariables) -> Array:
    """The largest violation of the optimality conditions: ``P x + q + A'y = 0`` and ``A x = proj(A x + y)``."""
    image = problem.forward(u.x)
    stationary = problem.hessian(u.x) + problem.q + problem.transpose(u.y)
    return _largest(stationary, image - project(image + u.y, problem.lower, problem.upper))


def equality_quadratic_program(
    P: Any, q: Any, A: Any, b: Any, *, linear_solver: LinearSolver | None = None
) -> QPVariables:
    r"""Returns the solution of a quadratic program with equalities only, by one linear solve.

    .. math:: \min_x \tfrac12 x^\top P x + q^\top x \ \text{subject to}\ A x = b: \qquad
        \begin{pmatrix} P & A^\top \\ A & 0 \end{pmatrix} \begin{pmatrix} x \\ y \end{pmatrix} =
        \begin{pmatrix} -q \\ b \end{pmatrix}

    Differentiable in all its data, forward and reverse, to any order.

    When: P is positive definite on the null space of A, and the rows of A are independent. Where they are not, the
    result is not finite (dense) or what the linear solver makes of it.

    Args:
        P: [n, n], its symmetric part is used; or a function ``v -> P v``, symmetric.
        q: [n].
        A: [m, n], or a linear function ``v -> A v``.
        b: [m].
        linear_solver: for the symmetric indefinite system, from ``odl.linear``. None: a dense factor where P and A are
            arrays, else GMRES.

    Returns:
        ``QPVariables``: x, z = b and the multiplier y.

    Raises:
        TypeError: shapes that do not fit each other.

    Cost: one solve of n + m unknowns.

    Source: Nocedal and Wright (2006), section 16.1.

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> P, q, A = jnp.eye(2), jnp.zeros(2), jnp.ones((1, 2))
        >>> odl.operators.equality_quadratic_program(P, q, A, jnp.array([2.0])).x.tolist()
        [1.0, 1.0]
    """
    who = "equality_quadratic_program"
    program = QuadraticProgram(P, q, A, b, b)
    _check_program(who, program)
    if linear_solver is not None:
        is_a(who, "linear_solver", linear_solver, LinearSolver, "Make one with odl.linear, for instance gmres().")
        if linear_solver.symmetric:
            raise TypeError(
                f"{who}: {linear_solver.name} needs a positive-definite matrix; that of the optimality conditions is "
                f"indefinite. Use gmres, bicgstab or dense."
            )
    q = jnp.asarray(q)
    problem = _products(program, q.dtype)
    rhs, n = jnp.concatenate([-q, problem.lower]), q.size
    if linear_solver is None and problem.P is not None and problem.A is not None:
        zero = jnp.zeros((problem.lower.size,) * 2, q.dtype)
        matrix = jnp.block([[problem.P, problem.A.T], [problem.A, zero]])
        v = jnp.linalg.solve(matrix, rhs)
        return QPVariables(v[:n], problem.lower, v[n:])
    inner = linear_solver or gmres()

    def conditions(v: Array) -> Array:
        return jnp.concatenate([problem.hessian(v[:n]) + problem.transpose(v[n:]), problem.forward(v[:n])])

    v = solve_definite(conditions, rhs, inner)
    return QPVariables(v[:n], problem.lower, v[n:])


# ---- the box alone ---------------------------------------------------------------------------------------------------


def box_quadratic_program(P: Any, q: Any, lower: Any, upper: Any) -> Operator:
    r"""Returns the operator of one cyclic sweep of coordinate descent for a quadratic program over a box.

    For :math:`\min_x \tfrac12 x^\top P x + q^\top x` subject to :math:`l \le x \le u`, for j = 1, ..., n in turn,

    .. math:: x_j \leftarrow \Pi_{[l_j, u_j]}(x_j - (P x + q)_j / P_{jj})

    When: the box is the only constraint (duals of support vector machines, non-negative least squares). It descends the
    objective and converges linearly for positive-definite P; no step size is needed. Without finite bounds it is the
    Gauss-Seidel sweep, non-expansive in the metric P; with them in general in neither P nor the identity, so it carries
    no metric. (``forward_backward`` with ``odl.prox.box`` is non-expansive in the identity.)

    Shapes: x [n].

    Args:
        P: [n, n], positive semidefinite, its symmetric part is used; this and the others may be functions of theta.
        q: [n].
        lower: l [n], -inf where there is no bound.
        upper: u [n], inf where there is no bound.

    Raises:
        TypeError: at trace time, shapes that do not fit each other.
        ValueError: a lower bound above the upper one (where they are not traced).

    Cost: one product with P and a sweep that costs another, in n updates that follow each other.

    Source: Hildreth (1957); Hsieh et al. (2008) for support vector machines.

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> P, q = jnp.array([[2.0, 1.0], [1.0, 2.0]]), jnp.array([-3.0, 1.0])
        >>> sweep = odl.operators.box_quadratic_program(P, q, jnp.zeros(2), jnp.ones(2))
        >>> odl.until_converged(odl.fixed_point(sweep), tol=1e-6)(jnp.zeros(2), None).x.tolist()
        [1.0, 0.0]
    """
    who = "box_quadratic_program"
    for name, part in (("P", P), ("q", q), ("lower", lower), ("upper", upper)):
        if callable(part):
            is_callable(who, name, part, "theta")

    def sweep(x: Any, theta: Any) -> tuple[Array, Array]:
        values = [part(theta) if callable(part) else part for part in (P, q, lower, upper)]
        if not hasattr(x, "ndim") or x.ndim != 1:
            came = describe(x) if hasattr(x, "ndim") else f"a {type(x).__name__}"
            raise TypeError(f"{who}: x must be one vector [n]; {came} came. Ravel it into one array.")
        as_inner(who, "x", x)  # comparisons with bounds are for real numbers
        _check_program(who, QuadraticProgram(values[0], values[1], jnp.eye(x.size), values[2], values[3]))
        curvatures, linear, low, high = (jnp.asarray(value).astype(x.dtype) for value in values)
        curvatures = (curvatures + curvatures.T) / 2
        diagonal = jnp.diagonal(curvatures)
        steps = 1 / jnp.where(diagonal > 0, diagonal, jnp.ones_like(diagonal))

        def update(slope: Array, row: Any) -> tuple[Array, tuple[Array, Array]]:
            j, old, column, step_size, least, most = row
            shift = step_size * slope[j]
            forward = old - shift
            new = project(forward, least, most)
            move = (forward - new) + shift
            return slope - column * move, (move, new)

        rows = (jnp.arange(x.size), x, curvatures, steps, low, high)
        _, (moves, new) = jax.lax.scan(update, curvatures @ x + linear, rows)
        return moves, new

    return Operator(lambda x, theta: sweep(x, theta)[1], lambda x, theta: sweep(x, theta)[0], name=who)
