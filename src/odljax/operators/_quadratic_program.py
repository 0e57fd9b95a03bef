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
from ._operator import Operator, Residual
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


class Units(NamedTuple):
    """What the entries are multiplied by to be comparable: ``x / d``, ``e A d``, ``c d P d``."""

    d: Array
    e: Array
    c: Array


class Equilibrated(QuadraticProgram):
    """A program in other units than the given one, in which its residuals are still told."""

    units: Units | None = None


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
    units: Units | None = None


def quadratic_program(
    program: Program,
    *,
    penalty: Coefficient = 0.1,
    regularization: Coefficient | None = None,
    relaxation: Scalar = 1.6,
    scaling: int = 10,
    linear_solver: LinearSolver | None = None,
    infeasibility_tol: Scalar | None = None,
) -> Operator:
    r"""Returns the ADMM operator of OSQP on ``QPVariables(x, z, y)``.

    For :math:`\min_x \tfrac12 x^\top P x + q^\top x` subject to :math:`l \le A x \le u`, with
    :math:`M = P + \Sigma + A^\top R A` and diagonal :math:`\Sigma` and :math:`R`,

    .. math::
        \tilde x &= x - M^{-1} (P x + q + A^\top (y + R (A x - z))), \quad \tilde z = A \tilde x \\
        x^+ &= \alpha \tilde x + (1 - \alpha) x \\
        z^+ &= \Pi_{[l, u]}(\alpha \tilde z + (1 - \alpha) z + R^{-1} y) \\
        y^+ &= y + R (\alpha \tilde z + (1 - \alpha) z - z^+)

    Its fixed points are the points that satisfy the optimality conditions, whatever :math:`R`, :math:`\Sigma` and
    :math:`\alpha`. The system is solved for the correction of x, which vanishes at a fixed point: the accuracy of the
    solution is that of the products with P and A, in float32, too.

    Units do not matter: with the scaling :math:`c D P D, E A D` of Ruiz, whose entries are of size 1, and a number g,

    .. math:: R = \rho g c^{-1} E K E, \quad \Sigma = \sigma g c^{-1} D^{-2}

    so that :math:`\rho` and :math:`\sigma` are pure numbers, and the steps are those on the equilibrated program,
    though x, z, y stay in the given units. K is 1e3 for equalities, 1e-3 for rows without a bound, 1 for others; g is 1
    or, if that is larger, the size of q over that of the bounds (their geometric mean), both equilibrated. None of
    these has a derivative, and none is needed.

    Residual: :math:`A x - z` with :math:`z - \Pi_{[l, u]}(z + y)` (in the equilibrated unit), compared with A x and z;
    :math:`P x + q + A^\top y`, compared with its terms; the gap :math:`x^\top P x + q^\top x + y^\top z`, likewise.

    When: a convex quadratic or linear program of moderate size, above all as a layer with a derivative. Converges for
    every :math:`\rho, \sigma > 0` and :math:`\alpha` in (0, 2), but how fast depends on :math:`\rho`:
    ``odl.quadratic_program`` adapts it on the way. Where the program has no solution the displacement converges to a
    proof of that, and ``until_converged`` ends with PRIMAL_INFEASIBLE or DUAL_INFEASIBLE.

    Non-expansive: with the metric :math:`G = \operatorname{diag}(\Sigma, R, R^{-1})`, which it carries, and not in
    the identity: for all pairs of points with :math:`\alpha = 1`; with :math:`\alpha` in [1, 2) from its own outcomes
    on (that is, between points at which y lies in the normal cone of the box at z).

    Derivative: where strict complementarity and linear independence of the active constraints hold, that of the
    solution in all data. At a weakly active constraint (z at its bound, y = 0) it is that of the active side, finite.
    Where multipliers are not unique, the implicit system is singular; add the missing curvature or drop the constraint.

    Shapes: x [n], z and y [m].

    Args:
        program: a ``QuadraticProgram``, or a function of theta that returns one; cast to the dtype of x. l <= u is
            assumed where the bounds are traced.
        penalty: :math:`\rho > 0`, a number or a function of theta.
        regularization: :math:`\sigma > 0`, a number or a function of theta. None: 1e-5 of the penalty or, if that is
            more, ten rounding units of :math:`\rho\, D A^\top E K E A D`.
        relaxation: :math:`\alpha` in (0, 2).
        scaling: passes of Ruiz's scaling, static; with functions for P or A two numbers are found by as many products.
            0: none, and g = 1: the weights are those that were given, in the units of the program.
        linear_solver: for M, symmetric positive definite: from ``odl.linear``. None: a dense decomposition where P and
            A are arrays; else conjugate gradients. As the correction vanishes, an inexact solve (``cg(tol=1e-3)``)
            still has the exact fixed points.
        infeasibility_tol: a certificate must prove that no solution has a norm below 1/tol times that of the iterate
            and its step, and of the bounds (for the multipliers: q), equilibrated. None: 1e-6 in float64, else 1e-3.

    Raises:
        ValueError: a penalty or regularisation that is not positive, a relaxation outside (0, 2), a negative scaling; a
            lower bound above the upper one (where they are not traced).
        TypeError: program is none, its shapes do not fit each other, x is no ``QPVariables`` of these shapes.

    Cost: one product with P, two with A, one with its transpose, and two with a dense n by n matrix. Once: the scaling,
    a Cholesky factor and a symmetric eigendecomposition, which serve every penalty and every q; while the program is
    traced, where P, A and what bounds are finite or equal are constants, else the compiler takes them out of a loop.

    Source: Stellato et al. (2020), algorithm 1 and section 5; Ruiz (2001); certificates: Banjac et al. (2019); metric:
    He and Yuan (2012).

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
    metric_of = metric_at(who, penalty, regularization, scaling)
    split = splitting(who, read, metric_of, relaxation, linear_solver)
    units_of = metric_of if scaling else metric_at(who, penalty, None, 10)  # a verdict depends on no units
    certificate = _certificate(who, read, units_of, infeasibility_tol)

    def weigh(v: QPVariables, theta: Any) -> QPVariables:
        sigma, rho = metric_of(read(v, theta), theta).weights()
        return type(v)(sigma * v.x, rho * v.z, v.y / rho)

    def unweigh(v: QPVariables, theta: Any) -> QPVariables:
        sigma, rho = metric_of(read(v, theta), theta).weights()
        return type(v)(v.x / sigma, v.z / rho, v.y * rho)

    def natural_residual(u: QPVariables, theta: Any) -> tuple[Residual, ...]:
        problem = read(u, theta)
        return residuals(problem, units_of(problem, theta), u)

    return Operator(
        apply=lambda u, theta: split(u, theta).outcome,
        displacement=lambda u, theta: split(u, theta).displacement,
        metric=weigh,
        metric_inverse=unweigh,
        readout=lambda u, theta: u.x,
        certificate=certificate,
        natural_residual=natural_residual,
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
        return products_of(data, as_inner(who, "x", u).x.dtype)

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


def products_of(program: QuadraticProgram, dtype: Any) -> Problem:
    """The program in a dtype, as products."""
    units = getattr(program, "units", None)
    P = A = None
    hessian: Any = program.P
    forward: Any = program.A
    with jax.ensure_compile_time_eval():  # what is constant stays so, for the decomposition
        q, lower, upper = (jnp.asarray(part).astype(dtype) for part in (program.q, program.lower, program.upper))
        if program.P is None:
            P, hessian = jnp.zeros((q.size, q.size), dtype), jnp.zeros_like
        elif not callable(program.P):
            half = jnp.asarray(program.P).astype(dtype) / 2
            P = half + half.T
            hessian = partial(jnp.matmul, P)
        if not callable(program.A):
            A = jnp.asarray(program.A).astype(dtype)
    if A is not None:
        return Problem(hessian, partial(jnp.matmul, A), partial(jnp.matmul, A.T), q, lower, upper, P, A, units)

    def transpose(w: Array) -> Array:
        return jax.linear_transpose(forward, q)(w)[0]

    return Problem(hessian, forward, transpose, q, lower, upper, P, A, units)


class Metric(NamedTuple):
    """The weights of a program: its units, and what is multiplied by the penalty; only that may have a derivative.

    Attributes:
        units: see ``Units``.
        kind: one number for each constraint.
        gain: g.
        bound: the size of the bounds, equilibrated; 0 where there are none but zeros.
        penalty: rho.
        regularization: sigma over rho.
    """

    units: Units
    kind: Array
    gain: Array
    bound: Array
    penalty: Array
    regularization: Array

    def weights(self, scale: Array | None = None) -> tuple[Array, Array]:
        """The diagonals of Sigma and R, at a multiple of the penalty."""
        d, e, c = self.units
        size = self.penalty * (self.gain / c)
        size = size if scale is None else size * scale.astype(size.dtype)
        return size * (self.regularization / d) / d, size * e * (self.kind * e)

    @property
    def exchange(self) -> Array:
        """The unit of y in that of z, row by row."""
        return (self.gain / self.units.c) * self.units.e**2


def metric_at(
    who: str, penalty: Coefficient, regularization: Coefficient | None, scaling: int
) -> Callable[[Problem, Any], Metric]:
    """``(problem, theta) -> Metric``; what it makes of constants is made while the program is traced."""
    rho_of = coefficient_of_theta(who, "penalty", penalty)
    sigma_of = None if regularization is None else coefficient_of_theta(who, "regularization", regularization)
    scaling = count(who, "scaling", scaling, least=0)

    def metric(problem: Problem, theta: Any) -> Metric:
        dtype = problem.q.dtype
        with jax.ensure_compile_time_eval():
            rho = jnp.asarray(rho_of(theta)).astype(dtype)
            P, A, q, lower, upper = jax.lax.stop_gradient(
                (problem.P, problem.A, problem.q, problem.lower, problem.upper)
            )
            kind = _kinds(lower, upper)
            dense = P is not None and A is not None
            units = _equilibration(P, A, scaling) if dense else _rough_units(problem, scaling)
            if sigma_of is not None:
                sigma = jnp.asarray(sigma_of(theta)).astype(dtype) / rho
            else:
                most = _column_weight(A, kind, units) if dense else jnp.max(kind, initial=1)
                sigma = jnp.maximum(1e-5, 10 * jnp.finfo(_tree.accumulation_dtype(q)).eps * most).astype(dtype)
            gain, bound = _gain(q, lower, upper, P, units)
        return Metric(units, kind, gain if scaling else jnp.ones_like(gain), bound, rho, sigma)

    return metric


@jax.jit
def _kinds(lower: Array, upper: Array) -> Array:
    """How much stiffer than an inequality a row is."""
    free = jnp.isinf(lower) & jnp.isinf(upper)
    return jnp.where(lower == upper, 1e3, jnp.where(free, 1e-3, 1.0)).astype(lower.dtype)


@partial(jax.jit, static_argnames="num_steps")
def _equilibration(P: Array, A: Array, num_steps: int) -> Units:
    """Ruiz's scaling of the matrix of the optimality conditions, with the largest entry of the scaled P at 1."""
    d, e, c = jnp.ones(P.shape[0], P.dtype), jnp.ones(A.shape[0], P.dtype), jnp.ones((), P.dtype)
    if num_steps == 0:
        return Units(d, e, c)
    P, A = jnp.abs(P), jnp.abs(A)
    e, c = e / _or_one(jnp.max(A, initial=0)), c / _or_one(jnp.max(P, initial=0))  # common units, all at once

    def body(_: Any, carry: Any) -> Any:
        d, e, c = carry
        curved, scaled = between(d, P, d), between(e, A, d)
        columns = jnp.maximum(c * jnp.max(curved, axis=0, initial=0), jnp.max(scaled, axis=0, initial=0))
        d, e = d / jnp.sqrt(_or_one(columns)), e / jnp.sqrt(_or_one(jnp.max(scaled, axis=1, initial=0)))
        return d, e, 1 / _or_one(jnp.max(between(d, P, d), initial=0))

    return Units(*jax.lax.fori_loop(0, num_steps, body, (d, e, c)))


def between(left: Array, matrix: Array, right: Array) -> Array:
    """The matrix between two diagonal ones."""
    return (left[:, None] * matrix) * right[None]


def _or_one(size: Array) -> Array:
    """What to divide by: a row of zeros stays."""
    return jnp.where(size == 0, jnp.ones_like(size), size)


def _rough_units(problem: Problem, num_steps: int) -> Units:
    """Two numbers from products with functions: the norms of A and P, by power iteration."""
    n, m, dtype = problem.q.size, problem.lower.size, problem.q.dtype
    v = jnp.cos(jnp.arange(n, dtype=dtype))

    def size(product: Callable[[Array], Array], back: Callable[[Array], Array]) -> Array:
        w, length = v, jnp.zeros((), dtype)
        for _ in range(min(num_steps, 3)):
            image = product(w / _or_one(_tree.norm(w)).astype(dtype))
            length, w = _tree.norm(image).astype(dtype), back(image)
        return _or_one(length)

    a, p = jax.lax.stop_gradient((size(problem.forward, problem.transpose), size(problem.hessian, lambda w: w)))
    return Units(jnp.ones(n, dtype), jnp.full(m, 1 / a), 1 / p)


@jax.jit
def _column_weight(A: Array, kind: Array, units: Units) -> Array:
    """The largest diagonal entry of ``D A' E K E A D``."""
    scaled = between(units.e, A, units.d)
    return jnp.max(jnp.sum(kind[:, None] * scaled**2, axis=0), initial=0)


@jax.jit
def _gain(q: Array, lower: Array, upper: Array, P: Array | None, units: Units) -> tuple[Array, Array]:
    """g, and the size of the bounds: the geometric mean of those that are not zero up to rounding."""
    d, e, c = units
    near = e * jnp.minimum(jnp.abs(lower), jnp.abs(upper))
    some = (near > 0) & ~jnp.isinf(near)
    some = some & (near > jnp.finfo(near.dtype).eps ** 0.5 * jnp.max(jnp.where(some, near, 0), initial=0))
    number = jnp.sum(some).astype(near.dtype)
    mean = jnp.sum(jnp.where(some, jnp.log(jnp.where(some, near, 1)), 0)) / _or_one(number)
    bound = jnp.where(number > 0, jnp.exp(mean), 0)
    slope = jnp.max(jnp.abs(c * (d * q)), initial=0)
    curved = jnp.ones_like(slope) if P is None else jnp.any(P != 0).astype(slope.dtype)
    linear = jnp.where((bound > 0) | (curved == 0), slope / _or_one(bound), 0)
    return _or_one(jnp.maximum(curved, linear)), bound


def residuals(problem: Problem, metric: Metric, u: QPVariables) -> tuple[Residual, ...]:
    """The optimality conditions, part by part: primal, dual, gap."""
    x, z, y = u
    image = same_as("quadratic_program", "A", problem.forward(x), z, "z")
    bent = same_as("quadratic_program", "P", problem.hessian(x), x)
    held = problem.transpose(y)
    held_back = z - project(z + y / metric.exchange, problem.lower, problem.upper)
    primal, dual = image - z, bent + problem.q + held
    gap, *terms = _gap(x, y, primal, dual, (image, z), (bent, problem.q, held))
    parts = (
        Residual((primal, held_back), (image, z)),
        Residual(dual, (bent, problem.q, held)),
        Residual(gap, tuple(terms)),
    )
    if problem.units is None:
        return parts
    d, e, c = problem.units
    return tuple(_told(part, unit) for part, unit in zip(parts, (e, c * d, c), strict=True))


def _told(part: Residual, unit: Array) -> Residual:
    return jax.tree.map(lambda leaf: leaf / unit, part)


def _gap(x: Array, y: Array, primal: Array, dual: Array, images: tuple[Array, ...], slopes: tuple[Array, ...]) -> Any:
    """``x'Px + q'x + y'z``, from residuals, so without cancellation, and its three terms.

    Products that leave the range of the dtype are all held within it by one factor.
    """
    sizes = [_tree.magnitude(part) for part in (x, slopes, y, images)]
    roots = jnp.sqrt(sizes[0]) * jnp.sqrt(sizes[1]), jnp.sqrt(sizes[2]) * jnp.sqrt(sizes[3])
    size, wide = jnp.maximum(*roots), jnp.finfo(sizes[0].dtype)
    held = jnp.clip(size, 2.0**10 * float(wide.tiny) ** 0.5, 2.0**-10 * float(wide.max) ** 0.5)

    def inner(a: Array, b: Array, which: int) -> Array:
        product = _tree.vdot(_tree.unscaled(a, sizes[2 * which]), _tree.unscaled(b, sizes[2 * which + 1]))
        return product * ((roots[which] / size) * held) ** 2

    bent, q, _ = slopes
    return inner(x, dual, 0) - inner(y, primal, 1), inner(x, bent, 0), inner(x, q, 0), inner(y, images[1], 1)


class Split(NamedTuple):
    """What one application gives.

    Attributes:
        displacement, outcome: ``u - T(u)`` and ``T(u)``.
        residuals: the natural ones, at u.
        imbalance: the binary logarithm of the relative primal over the relative dual residual, equilibrated; what is
            below a hundred rounding units counts as these.
    """

    displacement: QPVariables
    outcome: QPVariables
    residuals: tuple[Residual, ...]
    imbalance: Array


def splitting(
    who: str,
    read: Callable[[Any, Any], Problem],
    metric_of: Callable[[Problem, Any], Metric],
    relaxation: Scalar,
    linear_solver: LinearSolver | None,
) -> Callable[..., Split]:
    """``(u, theta, scale) -> Split``: scale multiplies the penalty, None is 1."""
    number(who, "relaxation", relaxation, high=2.0)
    if linear_solver is not None:
        is_a(who, "linear_solver", linear_solver, LinearSolver, "Make one with odl.linear, for instance cg().")

    def split(u: QPVariables, theta: Any, scale: Array | None = None) -> Split:
        problem = read(u, theta)
        metric = metric_of(problem, theta)
        sigma, rho = metric.weights(scale)
        alpha = jnp.asarray(relaxation).astype(rho.dtype)
        parts = residuals(problem, metric, u)
        x, z, y = u
        image, bent = problem.forward(x), problem.hessian(x)
        held, gap = problem.transpose(y), image - z
        slope = bent + problem.q + held
        solve = _system(problem, metric, sigma, rho, scale, linear_solver)
        correction = solve(-(slope + problem.transpose(rho * gap)))
        shift = alpha * correction
        drift = alpha * (gap + problem.forward(correction))
        new_z = project(z + drift + y / rho, problem.lower, problem.upper)
        rise = new_z - z
        lift = rho * (drift - rise)
        d, e, _ = metric.units
        floor = 100 * float(jnp.finfo(x.dtype).eps)
        primal = _ratio(_largest(e * gap), _largest(e * image, e * z))
        dual = _ratio(_largest(d * slope), _largest(d * bent, d * held, d * problem.q))
        imbalance = jnp.log2(jnp.maximum(primal, floor)) - jnp.log2(jnp.maximum(dual, floor))
        outcome = type(u)(x + shift, new_z, y + lift)
        return Split(type(u)(-shift, -rise, -lift), outcome, parts, jax.lax.stop_gradient(imbalance))

    return split


def _system(
    problem: Problem,
    metric: Metric,
    sigma: Array,
    rho: Array,
    scale: Array | None,
    linear_solver: LinearSolver | None,
) -> Callable[[Array], Array]:
    """``b -> (P + Sigma + A' R A)^-1 b``, differentiated as a linear system: no factor carries a derivative."""

    def product(v: Array) -> Array:
        return problem.hessian(v) + sigma * v + problem.transpose(rho * problem.forward(v))

    if linear_solver is None and problem.P is not None and problem.A is not None:
        direct = _direct(problem.P, problem.A, metric, scale)
        return lambda b: differentiable_solve(product, b, lambda _, b: direct(b), symmetric=True)
    if linear_solver is None:
        return lambda b: solve_definite(product, b, cg())
    # One that was given may be loose on purpose: the correction vanishes, whatever its digits.
    return lambda b: differentiable_solve(product, b, lambda matvec, b: linear_solver(matvec, b)[0], symmetric=True)


def _direct(P: Array, A: Array, metric: Metric, scale: Array | None) -> Callable[[Array], Array]:
    """``b -> M^-1 b``, of constants by a constant decomposition."""
    with jax.ensure_compile_time_eval():
        P, A, metric = jax.lax.stop_gradient((P, A, metric))
        basis, eigenvalues = _decomposition(P, A, metric.kind, metric.units, metric.regularization, metric.penalty)
    d, _, c = metric.units
    gain = metric.gain if scale is None else metric.gain * jax.lax.stop_gradient(scale).astype(metric.gain.dtype)
    spread = (1 - eigenvalues) + gain.astype(basis.dtype) * eigenvalues

    def solve(b: Array) -> Array:
        hat = (c * (d * b)).astype(basis.dtype)
        return d * (basis @ ((basis.T @ hat) / spread)).astype(b.dtype)

    return solve


@jax.jit
def _decomposition(P: Array, A: Array, kind: Array, units: Units, sigma: Array, rho: Array) -> tuple[Array, Array]:
    """A basis in which P and ``K = A' R A + Sigma`` are diagonal, equilibrated: one for every penalty and every q."""
    parts = (P, A, kind, *units, sigma, rho)
    P, A, kind, d, e, c, sigma, rho = (part.astype(_tree.accumulation_dtype(part)) for part in parts)
    scaled = between(e, A, d)
    coupling = rho * (scaled.T @ (kind[:, None] * scaled) + sigma * jnp.eye(len(P), dtype=P.dtype))
    factor = jnp.linalg.cholesky(c * between(d, P, d) + coupling)
    # L^-1 K L^-T = Q D Q' makes L (I + (g - 1) Q D Q') L' of P + g K.
    half = jax.scipy.linalg.solve_triangular(factor, coupling, lower=True)
    eigenvalues, vectors = jnp.linalg.eigh(jax.scipy.linalg.solve_triangular(factor, half.T, lower=True))
    eigenvalues = jnp.where(jnp.any(P != 0), jnp.clip(eigenvalues, 0, 1), jnp.ones_like(eigenvalues))
    return jax.scipy.linalg.solve_triangular(factor, vectors, lower=True, trans="T"), eigenvalues


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
    who: str,
    read: Callable[[Any, Any], Problem],
    metric_of: Callable[[Problem, Any], Metric],
    tol: Scalar | None,
) -> Callable[[QPVariables, QPVariables, Any], Array]:
    """Whether a displacement proves that there is no solution: exact inequalities, up to the rounding of their sums.

    Every feasible x has ``(A'v)'x = v'Ax <= sup of v'z over the box``, so where the support of v is below
    ``-r |A'v|`` there is none of norm up to r; likewise a dual solution for a direction of descent. That A'v is small
    is also asked beside v: far away is not nowhere. All of it equilibrated, where A and P have entries of size 1.
    """
    if tol is not None:
        number(who, "infeasibility_tol", tol, high=1.0)

    def certificate(u: QPVariables, displacement: QPVariables, theta: Any) -> Array:
        problem = read(u, theta)
        metric = metric_of(problem, theta)
        (d, e, c), lower, upper, dtype = metric.units, problem.lower, problem.upper, u.x.dtype
        limit = jnp.asarray((1e-6 if jnp.finfo(dtype).bits == 64 else 1e-3) if tol is None else tol).astype(dtype)
        none, slack = jnp.zeros_like(lower), 100 * float(jnp.finfo(dtype).eps)

        def norm(*vectors: Array) -> Array:
            return _tree.norm(vectors).astype(dtype)

        def along(direction: Array, unit: Array) -> Array:  # in the given units, of size 1 in the others
            return direction / _tree.magnitude(direction * unit).astype(dtype)

        def proves(terms: Array, error: Array) -> Array:
            return jnp.sum(terms) + slack * jnp.sum(jnp.abs(terms)) + error < 0

        # The limit of R^-1 times the step of y; y itself grows without bound, and its digits are lost. Then into the
        # directions in which the box is bounded.
        v = along(metric.kind * e * e * (problem.forward(u.x) - u.z), 1 / e)
        v = jnp.where(jnp.isinf(upper), jnp.minimum(v, 0), v)
        v = jnp.where(jnp.isinf(lower), jnp.maximum(v, 0), v)
        support = jnp.where(v > 0, jnp.where(v > 0, upper, none) * v, jnp.where(v < 0, lower, none) * v)
        pulled = norm(d * problem.transpose(v))
        far = jnp.maximum(norm(u.x / d, displacement.x / d, e * u.z, e * displacement.z), metric.bound) / limit
        primal = proves(support, far * pulled) & (pulled <= limit * norm(v / e)) | jnp.any(lower > upper)

        w = along(-displacement.x, 1 / d)
        image = e * problem.forward(w)
        outside = jnp.where(jnp.isfinite(upper), jnp.maximum(image, 0), none)
        outside = norm(outside + jnp.where(jnp.isfinite(lower), jnp.maximum(-image, 0), none))
        bent, length = norm(c * (d * problem.hessian(w))), norm(w / d)
        far = norm(u.x / d, displacement.x / d) / limit
        steep = jnp.maximum(norm(c * (u.y / e), c * (displacement.y / e)), norm(c * (d * problem.q))) / limit
        dual = proves(c * problem.q * w, far * bent + steep * outside)
        dual = dual & (bent <= limit * length) & (outside <= limit * length)

        code = jnp.where(dual, jnp.int32(Status.DUAL_INFEASIBLE), jnp.int32(-1))
        return jnp.where(primal, jnp.int32(Status.PRIMAL_INFEASIBLE), code)

    return certificate


def equilibrate_quadratic_program(
    program: Program, *, num_steps: int = 10
) -> tuple[Callable[[Theta], QuadraticProgram], Callable[[QPVariables, Theta], QPVariables]]:
    r"""Returns the program in variables of comparable scale, and the map of its solution back to the given variables.

    With diagonal D and E and a number c, powers of two near those that ``num_steps`` of Ruiz's scaling of the matrix of
    the optimality conditions find,

    .. math:: \hat P = c D P D, \quad \hat q = c D q, \quad \hat A = E A D, \quad \hat l = E l, \quad \hat u = E u

    When: rows or columns of very different size, for a method that minds (``quadratic_program`` does not: its metric
    holds the same D, E and c). Its residuals are told in the given units. D, E and c carry no derivative: the solution
    that comes back has the derivative in all data as if nothing had been scaled.

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

    def scales(theta: Any) -> tuple[Problem, Units]:
        data = program(theta) if callable(program) else program
        if callable(program):
            _check_program(who, data)
        if callable(data.P) or callable(data.A):
            raise TypeError(f"{who}: needs P and A as arrays; a function came. Scale the functions yourself.")
        problem = products_of(data, jnp.result_type(float, *(part for part in data[:3] if part is not None)))
        P, A, q = jax.lax.stop_gradient((problem.P, problem.A, problem.q))
        d, e, c = _equilibration(P, A, num_steps)
        slope = jnp.max(jnp.abs(d * q), initial=0)
        return problem, Units(*map(_rounded, (d, e, jnp.where(jnp.any(P != 0), c, 1 / _or_one(slope)))))

    def scaled(theta: Theta) -> QuadraticProgram:
        problem, (d, e, c) = scales(theta)
        assert problem.P is not None
        assert problem.A is not None
        P, A = c * between(d, problem.P, d), between(e, problem.A, d)
        program = Equilibrated(P, c * (d * problem.q), A, e * problem.lower, e * problem.upper)
        program.units = Units(d, e, c)
        return program

    def restore(u: QPVariables, theta: Theta) -> QPVariables:
        d, e, c = (unit.astype(u.x.dtype) for unit in scales(theta)[1])
        return type(u)(d * u.x, u.z / e, e * u.y / c)

    return scaled, restore


def _rounded(unit: Array) -> Array:
    """The power of two that is nearest: no digit is lost where it is multiplied by. A NaN is left to the data."""
    return _tree.power_of_two(unit.astype(_tree.accumulation_dtype(unit)) * 2**0.5).astype(unit.dtype)


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
    num_refinements = count(who, "num_refinements", num_refinements, least=0)
    read, metric_of = reader(who, program), metric_at(who, 0.1, None, 10)

    def polish(u: QPVariables, theta: Any) -> QPVariables:
        problem = read(u, theta)
        if problem.P is None or problem.A is None:
            raise TypeError(f"{who}: needs P and A as arrays; a function came. Solve to a smaller tolerance instead.")
        metric = metric_of(problem, theta)
        lower, upper = problem.lower, problem.upper
        z, y = jax.lax.stop_gradient((u.z, u.y / metric.exchange))
        low, high = (z - lower < -y) | (lower == upper), upper - z < y
        bound = jnp.where(low, lower, jnp.where(high, upper, jnp.zeros_like(upper)))
        active = (low | high).astype(bound.dtype)
        x, y = _active_set_solution(problem, metric.units, active, bound, num_refinements)
        image = problem.forward(x)
        polished = type(u)(x, jnp.where(low | high, bound, image), y)
        better = jax.lax.stop_gradient(_no_worse(problem, metric, polished, u))
        # What is not kept has no derivative here, which must not pass for zero: a root at zero has the derivative NaN.
        data = (problem.P, problem.q, problem.A, jnp.where(low | high, bound, jnp.zeros_like(bound)))
        root = jnp.sqrt(jnp.where(better, 1, 0 * sum(jnp.sum(part) for part in data)))
        unknown = jax.tree.map(lambda leaf: leaf + (root - jax.lax.stop_gradient(root)), jax.lax.stop_gradient(u))
        return _tree.where(better, polished, unknown)

    return polish


def _active_set_solution(
    problem: Problem, units: Units, active: Array, bound: Array, num_refinements: int
) -> tuple[Array, Array]:
    """x and y of the optimality conditions with the active rows as equalities and no multiplier elsewhere."""

    n = problem.q.size
    d, e, c = units
    unit = jnp.concatenate([d, e / c])  # of both unknowns; the equations have its inverse, times c

    # One vector rather than two: no symbolic zero of one of them meets the linear solve.
    def conditions(v: Array) -> Array:
        x, y = v[:n], v[n:]
        slope = problem.hessian(x) + problem.transpose(active * y)
        return jnp.concatenate([slope, active * problem.forward(x) - (1 - active) * y * (c / e / e)])

    P, A, rows = jax.lax.stop_gradient((problem.P, problem.A, active))
    assert P is not None
    assert A is not None
    coupling = rows[:, None] * between(e, A, d)
    matrix = jnp.block([[c * between(d, P, d), coupling.T], [coupling, -jnp.diag(1 - rows)]])
    nudge = float(jnp.finfo(P.dtype).eps) ** 0.5 * jnp.concatenate([jnp.ones(n, P.dtype), -rows])
    factors = jax.scipy.linalg.lu_factor(matrix + jnp.diag(nudge))

    def solve(matvec: Callable[[Array], Array], b: Array) -> Array:
        inverse = lambda b: unit * jax.scipy.linalg.lu_solve(factors, c * (unit * b))  # noqa: E731
        v = inverse(b)
        for _ in range(num_refinements):
            v = v + inverse(b - matvec(v))
        return v

    v = differentiable_solve(conditions, jnp.concatenate([-problem.q, active * bound]), solve, symmetric=True)
    return v[:n], v[n:]


def _no_worse(problem: Problem, metric: Metric, new: QPVariables, old: QPVariables) -> Array:
    """Whether no part of the optimality conditions is violated more, up to rounding."""
    small, sound = 100 * float(jnp.finfo(new.x.dtype).eps), jnp.asarray(True)
    points = (u._replace(z=problem.forward(u.x)) for u in (new, old))
    for after, before in zip(*(residuals(problem, metric, u)[:2] for u in points), strict=True):
        terms = [_tree.norm(term) for term in (*(after.scale or ()), *(before.scale or ()))]
        sound = sound & (_tree.norm(after.value) <= _tree.norm(before.value) + small * jnp.max(jnp.stack(terms)))
    return sound


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
    problem = products_of(program, q.dtype)
    dense = linear_solver is None and problem.P is not None and problem.A is not None
    d, e, c = _equilibration(problem.P, problem.A, 10) if dense else _rough_units(problem, 3)
    d, e, c = jax.lax.stop_gradient((d, e, c))
    n, unit = q.size, jnp.concatenate([d, e / c])  # of both unknowns; the equations have its inverse, times c
    rhs = c * (unit * jnp.concatenate([-q, problem.lower]))
    if dense:
        assert problem.P is not None
        assert problem.A is not None
        coupling = between(e, problem.A, d)
        zero = jnp.zeros((problem.lower.size,) * 2, q.dtype)
        matrix = jnp.block([[c * between(d, problem.P, d), coupling.T], [coupling, zero]])
        v = unit * jnp.linalg.solve(matrix, rhs)
        return QPVariables(v[:n], problem.lower, v[n:])
    inner = linear_solver or gmres()

    def conditions(hat: Array) -> Array:
        x, y = (unit * hat)[:n], (unit * hat)[n:]
        return c * (unit * jnp.concatenate([problem.hessian(x) + problem.transpose(y), problem.forward(x)]))

    v = unit * solve_definite(conditions, rhs, inner)
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

    def read(x: Any, theta: Any) -> tuple[Array, ...]:
        values = [part(theta) if callable(part) else part for part in (P, q, lower, upper)]
        if not hasattr(x, "ndim") or x.ndim != 1:
            came = describe(x) if hasattr(x, "ndim") else f"a {type(x).__name__}"
            raise TypeError(f"{who}: x must be one vector [n]; {came} came. Ravel it into one array.")
        as_inner(who, "x", x)  # comparisons with bounds are for real numbers
        _check_program(who, QuadraticProgram(values[0], values[1], jnp.eye(x.size), values[2], values[3]))
        curvatures, linear, low, high = (jnp.asarray(value).astype(x.dtype) for value in values)
        return (curvatures + curvatures.T) / 2, linear, low, high

    def sweep(x: Any, theta: Any) -> tuple[Array, Array]:
        curvatures, linear, low, high = read(x, theta)
        steps = _steps(curvatures)

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

    def natural_residual(x: Any, theta: Any) -> tuple[Residual, ...]:
        curvatures, linear, low, high = read(x, theta)
        bent, steps = curvatures @ x, _steps(curvatures)
        shift = steps * (bent + linear)
        forward = x - shift
        return (Residual(((forward - project(forward, low, high)) + shift) / steps, (bent, linear)),)

    return Operator(
        lambda x, theta: sweep(x, theta)[1],
        lambda x, theta: sweep(x, theta)[0],
        natural_residual=natural_residual,
        name=who,
    )


def _steps(curvatures: Array) -> Array:
    """The step of each coordinate; a flat one takes the longest, and comes to its bound in time."""
    diagonal = jnp.diagonal(curvatures)
    least = jnp.min(jnp.where(diagonal > 0, diagonal, jnp.inf), initial=jnp.inf)
    return 1 / jnp.where(diagonal > 0, diagonal, jnp.where(jnp.isinf(least), jnp.ones_like(least), least))
