r"""Solvers of linear systems ``A v = b`` given the product ``v -> A v``, each returning its residual and status.

They serve the adjoint systems of implicit derivatives, :math:`A = I - \partial_x T` or its transpose, and work on
pytrees.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from . import _tree
from ._checks import count, is_callable, number, record, same_as
from ._types import Scalar, Status

__all__ = [
    "LinearInfo",
    "LinearSolver",
    "Preconditioner",
    "Report",
    "bicgstab",
    "cg",
    "dense",
    "from_lineax",
    "gmres",
    "identity",
    "neumann",
    "nystrom",
    "nystrom_preconditioner",
]

MatVec = Callable[[Any], Any]


class LinearInfo(NamedTuple):
    """The truth about a linear solve.

    Attributes:
        residual: ``||b - A v|| / ||b||``, recomputed at the end rather than taken from a recurrence; 0 where b is zero.
        num_steps: products with A that the method took.
        status: a code of ``odl.Status``: CONVERGED (within the tolerance, but for the rounding of the products);
            COMPLETED for methods without a stop test; STEP_BUDGET_SPENT; ILL_CONDITIONED (the residual is as small as
            was asked for, and v is not: by ``error`` it has lost its digits); STALLED (breakdown, singular matrix,
            indefinite matrix for CG, no more progress); DIVERGED (a series that does not converge); NON_FINITE (v is
            NaN where a stop test was cut short).
        error: an estimate of ``||v - A^-1 b|| / ||v||``, from what the method saw of A without a product more. It errs
            by a factor of a few; it is blind to a direction that b lacks to rounding, and infinite where nothing is
            known (``from_lineax``).
    """

    residual: Array
    num_steps: Array
    status: Array
    error: Array


class Report(NamedTuple):
    """What a method says of its own end, in the units of the system that it was given.

    Attributes:
        inverse: ``r -> `` an estimate of ``||A^-1 r||``.
        limit: the relative tolerance; None without a stop test.
        spent: whether the budget ended it.
        left: the norm of the residual by the method's own account; None: the true one.
        stretch: a lower bound of ``||A||``, or 0.
        condition: an estimate of the condition number.
        failed: the status of a failure.
    """

    inverse: Callable[[Any], Array]
    limit: Array | None = None
    spent: Array | bool = False
    left: Array | None = None
    stretch: Array | float = 0.0
    condition: Array | float = 1.0
    failed: Array | Status = Status.STALLED


@record
class LinearSolver:
    """A way to solve ``A v = b``: call it with ``(matvec, b)`` and, for a warm start, a guess.

    Units do not matter: the method sees a right side of order one. A right side of zero has the solution zero,
    whatever the product says. A guess that is no better than zero is not used.

    Args:
        run: ``(matvec, b, size) -> (v, num_steps, report)`` from v = 0, for b of order one, or what a guess left of
            it; ``size`` is the norm that tolerances are relative to. The report is a ``Report``, or None: no stop test,
            nothing known.
        name: what messages call it.
        symmetric: whether it is right only for symmetric positive-definite matrices.
        preconditioner: the function ``v -> M^-1 v`` that it was given, if it was given one.
        preconditioned: the same solver with another such function; None where it takes none.
        warm: whether a guess is of use to it; else it is not looked at.

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> v, info = odl.linear.cg()(lambda v: 2.0 * v, jnp.array([2.0, 4.0]))
        >>> v.tolist(), odl.Status(int(info.status)).name
        ([1.0, 2.0], 'CONVERGED')
    """

    run: Callable[[MatVec, Any, Array], tuple[Any, Array, Report | None]]
    name: str
    symmetric: bool = False
    preconditioner: MatVec | None = None
    preconditioned: Callable[[MatVec], LinearSolver] | None = None
    warm: bool = False

    def __call__(self, matvec: MatVec, b: Any, guess: Any = None) -> tuple[Any, LinearInfo]:
        if not _tree.real_size(b):
            nothing = jnp.zeros((), _tree.accumulation_dtype(b))
            none = jnp.zeros((), jnp.int32)  # products, and CONVERGED
            return b, LinearInfo(nothing, none, none, nothing)
        unit = _tree.magnitude(b)
        right = _tree.per_unit(b, unit)
        size, start, rest = _tree.norm(right), None, right
        if guess is not None and self.warm:
            start = _tree.per_unit(guess, unit)
            left = _tree.subtract(right, matvec(start))
            nearer = _tree.norm(left) <= size
            start, rest = _tree.where(nearer, (start, left), (_tree.zeros_like(start), right))
        v, num_steps, report = self.run(matvec, rest, size)
        v = v if start is None else _tree.add(start, v)
        v = _tree.where(size == 0, _tree.zeros_like(v), _tree.per_unit(v, 1 / unit))
        miss = _tree.per_unit(_tree.subtract(b, matvec(v)), unit)
        lengths = size, _tree.norm(miss), _tree.norm(v) / unit
        residual, status, error = _judged(report or Report(lambda r: jnp.full_like(size, jnp.inf)), b, miss, *lengths)
        return v, LinearInfo(residual, num_steps, status, error)


_DIGITS = 1e-4  # a relative error of v above it is not told as success


def _judged(report: Report, b: Any, miss: Any, size: Array, off: Array, length: Array) -> tuple[Array, Array, Array]:
    """Relative residual, status and relative error of a v of the given length whose residual is ``miss``."""

    def code(status: Array | Status) -> Array:
        return jnp.asarray(status, jnp.int32)

    zero = size == 0
    size, length = jnp.where(zero, 1, size), jnp.where(length > 0, length, 1)
    residual = jnp.where(zero, 0, off / size)
    # What the recurrence knows of lies in the directions that A treats worst. What it does not is the rounding of the
    # products, which lies in all of them: on matrices of many spectra its part grows with the root of the condition.
    whole, left = report.inverse(miss) / length, off if report.left is None else jnp.minimum(report.left, off)
    share = _safe_ratio(left, off)
    known, rounded = whole * share, 8 * whole * (1 - share) * jax.lax.rsqrt(jnp.maximum(report.condition, 1))
    error = known + rounded
    if report.left is not None:  # a guess that was good enough showed nothing of A
        error = jnp.maximum(error, left / size)
    error = jnp.where(zero, 0, jnp.where(jnp.isnan(error), jnp.inf, error))
    if report.limit is None:
        status = jnp.where(residual < 1, code(Status.COMPLETED), code(report.failed))
    else:
        eps = _tree.rounding(b)
        # The recurrence drifts from the true residual by the rounding of ||A|| ||v||, far above that of ||b|| where A
        # is ill-conditioned.
        rounding = jnp.minimum(10 * eps * (1 + report.stretch * length / size), eps ** (1 / 3))
        allowed = report.limit + jnp.where(report.spent, 0, rounding)
        # A tolerance that was loosened asks for no digits: the error is that of the default.
        gone = known * jnp.minimum(1, _default_tolerance(size.dtype) / report.limit) + rounded
        blurred = jnp.isfinite(gone) & (gone > jnp.maximum(_DIGITS, 100 * jnp.maximum(report.limit, eps)))
        good = jnp.where(blurred, code(Status.ILL_CONDITIONED), code(Status.CONVERGED))
        short = jnp.where(report.spent, code(Status.STEP_BUDGET_SPENT), code(report.failed))
        status = jnp.where(residual <= allowed, good, short)
    status = jnp.where(jnp.isfinite(residual), status, code(Status.NON_FINITE))
    return residual, jnp.where(zero, code(Status.CONVERGED), status), error


@record
class Preconditioner:
    """A preconditioner that is built anew for each system, inside the solve, from the matrix itself.

    One that is known beforehand needs no record: ``cg``, ``gmres`` and ``bicgstab`` also take the plain function
    ``v -> M^-1 v``.

    Args:
        build: ``(matvec, b) -> (v -> M^-1 v, products with A that it took)``.
        name: what messages call it.

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> A = jnp.array([[4.0, 1.0], [1.0, 9.0]])
        >>> def diagonal(matvec, b):
        ...     entries = jnp.diag(A)
        ...     return lambda v: v / entries, 0
        >>> solver = odl.linear.cg(preconditioner=odl.linear.Preconditioner(diagonal, "diagonal"))
        >>> v, info = solver(lambda v: A @ v, jnp.array([5.0, 10.0]))
        >>> [round(float(entry), 5) for entry in v]
        [1.0, 1.0]
    """

    build: Callable[[MatVec, Any], tuple[MatVec, int]]
    name: str = "preconditioner"


def _checked_preconditioner(who: str, preconditioner: Preconditioner | MatVec | None) -> None:
    if preconditioner is not None and not isinstance(preconditioner, Preconditioner):
        is_callable(who, "preconditioner", preconditioner, "v")


def _function_of(preconditioner: Preconditioner | MatVec | None) -> MatVec | None:
    return None if isinstance(preconditioner, Preconditioner) else preconditioner


def _with(constructor: Callable[..., LinearSolver], preconditioner: MatVec, **options: Any) -> LinearSolver:
    return constructor(preconditioner=preconditioner, **options)


def _preconditioned(preconditioner: Preconditioner | MatVec | None, matvec: MatVec, b: Any) -> tuple[MatVec, int]:
    """``v -> M^-1 v``, the identity for None, and the products with A that building it took."""
    if preconditioner is None:
        return lambda v: v, 0
    apply, products = (
        preconditioner.build(matvec, b) if isinstance(preconditioner, Preconditioner) else (preconditioner, 0)
    )
    return lambda v: same_as("the linear solver", "the preconditioner", apply(v), v, "v"), products


def differentiable_solve(
    matvec: MatVec, b: Any, solve: Callable[[MatVec, Any], Any], *, symmetric: bool, has_aux: bool = False
) -> Any:
    """``solve(matvec, b)`` with the derivatives of a linear system, whichever leaves a tangent or cotangent reaches.

    With ``has_aux`` it returns ``(v, aux)``, and aux carries no derivative. The barriers make symbolic zeros real:
    ``custom_linear_solve`` wants all leaves of b, of v and of the products' derivatives, or none.
    """
    b = jax.lax.optimization_barrier(b)
    product = matvec
    if len(jax.tree.leaves(b)) > 1:
        product = lambda v: jax.lax.optimization_barrier(matvec(v))  # noqa: E731
    # JAX transposes without conjugation, so the transpose of a self-adjoint map of complex numbers is another map.
    symmetric = symmetric and not _tree.is_complex(b)
    solved = jax.lax.custom_linear_solve(product, b, solve, solve, symmetric=symmetric, has_aux=has_aux)
    return (jax.lax.optimization_barrier(solved[0]), solved[1]) if has_aux else jax.lax.optimization_barrier(solved)


def _default_tolerance(dtype: Any) -> float:
    return 1e-12 if np.dtype(dtype).itemsize == 8 else 1e-6


def _tolerance(who: str, tol: Scalar | None) -> Callable[[Any], Array]:
    """The tolerance in the accumulation dtype of b; a traced one that answers zero to all is NaN."""
    if tol is not None:
        number(who, "tol", tol, high=1.0)

    def limit_of(b: Any) -> Array:
        dtype = _tree.accumulation_dtype(b)
        limit = jnp.asarray(_default_tolerance(dtype) if tol is None else tol).astype(dtype)
        return jnp.where((limit > 0) & (limit < 1), limit, jnp.nan)

    return limit_of


def _nan_unless(sound: Array, v: Any) -> Any:
    """A loop that stopped at a NaN may have left zeros behind: they must not pass for a solution."""
    return _tree.scale(jnp.where(sound, 1.0, jnp.nan), v)


def _safe_ratio(numerator: Array, denominator: Array) -> Array:
    return jnp.where(
        denominator == 0, jnp.zeros_like(numerator), numerator / jnp.where(denominator == 0, 1, denominator)
    )


def cg(
    *,
    tol: Scalar | None = None,
    max_steps: int | None = None,
    preconditioner: Preconditioner | MatVec | None = None,
) -> LinearSolver:
    r"""Returns conjugate gradients, for symmetric positive-definite matrices.

    When: the operator is a gradient step and the objective strongly convex at the solution. It is refused where the
    operator's Jacobian is not declared symmetric. Stops at the first direction whose curvature is negative, or zero to
    rounding: the matrix is not positive definite (STALLED).

    Args:
        tol: on ``||b - A v|| / ||b||``; default 1e-12 in float64, 1e-6 in float32.
        max_steps: at least 1; default ten times the number of unknowns, and 100 at least.
        preconditioner: ``v -> M^-1 v`` with M symmetric positive definite, or a ``Preconditioner`` that builds it;
            None: the identity. It may close over traced values, which have no derivative there.

    Raises:
        ValueError: a tolerance outside (0, 1), a step budget below 1.
        TypeError: a preconditioner that is no function of v; at trace time, one that changes structure, shape or dtype.

    Cost: one product a step, two inner products, four copies of v; one product more for the final residual; with a
    preconditioner one application of it a step, and what it costs to build.

    Source: Hestenes and Stiefel (1952); preconditioned: Golub and Van Loan (2013), section 11.5.

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> A = jnp.array([[2.0, 1.0], [1.0, 3.0]])
        >>> v, info = odl.linear.cg()(lambda v: A @ v, jnp.array([3.0, 4.0]))
        >>> [round(float(entry), 5) for entry in v]
        [1.0, 1.0]
    """
    limit_of = _tolerance("cg", tol)
    _checked_preconditioner("cg", preconditioner)
    if max_steps is not None:
        max_steps = count("cg", "max_steps", max_steps)

    def run(matvec: MatVec, b: Any, size: Array) -> tuple[Any, Array, Report]:
        limit = limit_of(b)
        budget = max_steps or max(100, 10 * _tree.real_size(b))
        precondition, products = _preconditioned(preconditioner, matvec, b)
        target = (limit * size) ** 2
        z = precondition(b)
        if preconditioner is not None:
            # M in units in which its first answer is of order one.
            scale, apply = _tree.magnitude(z), precondition
            precondition = lambda r: _tree.per_unit(apply(r), scale)  # noqa: E731
            z = _tree.per_unit(z, scale)
        rr, rz = _tree.vdot(b, b), _tree.vdot(b, z)
        eps = jnp.finfo(rr.dtype).eps

        def running(carry: Any) -> Array:
            *_, rr, _, k, broken, _, _, _ = carry
            return (rr > target) & (k < budget) & ~broken

        def body(carry: Any) -> Any:
            v, r, p, rr, rz, k, _, unit, largest, packed = carry
            q = _tree.per_unit(matvec(p), unit)
            curvature = _tree.vdot(p, q)
            # The first quotient of Rayleigh gives the unit of A.
            change = jnp.where(k == 0, _tree.power_of_two(jnp.abs(curvature) / rz), 1)
            q, curvature, unit = _tree.per_unit(q, change), curvature / change, unit * change
            # 1 / alpha never exceeds the largest eigenvalue (it sits on the diagonal of Lanczos' matrix) of M^-1 A.
            largest = jnp.maximum(largest, curvature / rz)
            stretch = largest if preconditioner is None else curvature / _tree.vdot(p, p)
            broken = ~((curvature > eps * largest * rz) & (rz > 0))
            alpha = jnp.where(broken, jnp.zeros_like(rr), rz / curvature)
            v, r = _tree.add_scaled(v, alpha, p), _tree.add_scaled(r, -alpha, q)
            z = precondition(r)
            new = _tree.vdot(r, z)
            p = _tree.add_scaled(z, new / rz, p)
            packed = jnp.stack(_Walk(*packed).after(stretch, alpha, new / rz, new))
            return v, r, p, _tree.vdot(r, r), new, k + 1, broken, unit, largest, packed

        zero = jnp.zeros_like(rr)
        packed = jnp.stack(_Walk(zero, rz, zero, zero, rz, zero))  # one array, which the loop hands on faster
        none, broken = jnp.zeros((), jnp.int32), jnp.zeros((), bool)
        start = (_tree.zeros_like(b), b, z, rr, rz, none, broken, zero + 1, zero, packed)
        v, _, _, rr, rz, k, broken, unit, largest, packed = jax.lax.while_loop(running, body, start)
        seen = _Walk(*packed)
        inverse = 1.5 * jnp.sqrt(seen.inverse)  # on matrices of many spectra it is seldom above two, or below one
        report = Report(
            lambda r: inverse / unit * _tree.norm(precondition(r)),
            limit,
            spent=(k >= budget) & ~broken & (rr > target),
            left=jnp.sqrt(rr),
            stretch=seen.stretch * unit,
            condition=largest * inverse,
        )
        return _nan_unless(jnp.isfinite(rr + rz + limit), _tree.per_unit(v, unit)), k + products, report

    given = _function_of(preconditioner)
    return LinearSolver(run, "cg", True, given, partial(_with, cg, tol=tol, max_steps=max_steps), warm=True)


class _Walk(NamedTuple):
    """What conjugate gradients see of the norms of A and A^-1 M on the way, in the unit of A; lengths are squared.

    The steps since the residual was last a tenth of what it had been before add up to A^-1 of what it lost, and their
    length follows from the coefficients alone (Hestenes and Stiefel, 1952, theorem 5:3; Strakos and Tichy, 2002).
    """

    stretch: Array
    direction: Array
    walked: Array  # since the start of this stretch of steps
    overlap: Array  # of what was walked with the direction
    first: Array  # the residual at its start
    inverse: Array

    def after(self, stretch: Array, alpha: Array, beta: Array, rz: Array) -> _Walk:
        """After a step of length alpha that leaves a residual rz."""
        walked = self.walked + 2 * alpha * self.overlap + alpha**2 * self.direction
        fresh = rz < 0.01 * self.first
        return _Walk(
            stretch=jnp.maximum(self.stretch, stretch),
            direction=rz + beta**2 * self.direction,
            walked=jnp.where(fresh, 0, walked),
            overlap=jnp.where(fresh, 0, beta * (self.overlap + alpha * self.direction)),
            first=jnp.where(fresh, rz, self.first),
            inverse=jnp.maximum(self.inverse, _safe_ratio(walked, self.first + rz)),
        )


def bicgstab(
    *, tol: Scalar | None = None, max_steps: int = 1000, preconditioner: Preconditioner | MatVec | None = None
) -> LinearSolver:
    r"""Returns BiCGStab, for general matrices with short recurrences.

    When: the Jacobian is not symmetric and memory is short; less robust than GMRES.

    Args:
        tol: on ``||b - A v|| / ||b||``; default 1e-12 in float64, 1e-6 in float32.
        max_steps: products with A, at least 1 (two a step).
        preconditioner: ``v -> M^-1 v``, or a ``Preconditioner`` that builds it; None: the identity. It acts from the
            right, :math:`A M^{-1} u = b`, so the residual is that of A. The transposed (adjoint) system gets the same
            M, not its transpose: a preconditioner that is far from symmetric changes the number of steps there, never
            the answer. It may close over traced values, which have no derivative there.

    Raises:
        ValueError: a tolerance outside (0, 1), a step budget below 1.
        TypeError: a preconditioner that is no function of v; at trace time, one that changes structure, shape or dtype.

    Cost: two products a step and two applications of the preconditioner, seven copies of v; one product more for the
    final residual.

    Source: van der Vorst (1992).

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> A = jnp.array([[2.0, 1.0], [0.0, 3.0]])
        >>> v, info = odl.linear.bicgstab()(lambda v: A @ v, jnp.array([3.0, 3.0]))
        >>> [round(float(entry), 5) for entry in v]
        [1.0, 1.0]
    """
    limit_of = _tolerance("bicgstab", tol)
    max_steps = count("bicgstab", "max_steps", max_steps)
    _checked_preconditioner("bicgstab", preconditioner)

    def run(matvec: MatVec, b: Any, size: Array) -> tuple[Any, Array, Report]:
        limit = limit_of(b)
        precondition, products = _preconditioned(preconditioner, matvec, b)
        target = (limit * size) ** 2

        def running(carry: Any) -> Array:
            *_, rr, k, broken, _ = carry
            return (rr > target) & (k < max_steps) & ~broken

        def body(carry: Any) -> Any:
            v, r, p, rho, _, k, _, seen = carry
            along = precondition(p)
            q = _tree.per_unit(matvec(along), seen.unit)
            overlap = _tree.vdot(b, q)
            # The first overlap, of b and A M^-1 b, gives the unit of A.
            unit = jnp.where(k == 0, _tree.power_of_two(jnp.abs(overlap) / rho), 1)
            q, overlap, unit = _tree.per_unit(q, unit), overlap / unit, seen.unit * unit
            alpha = _safe_ratio(rho, overlap)
            s = _tree.add_scaled(r, -alpha, q)
            then = precondition(s)
            t = _tree.per_unit(matvec(then), unit)
            length, shortened = _tree.vdot(t, t), _tree.vdot(s, s)
            omega = _safe_ratio(_tree.vdot(t, s), length)
            v = _tree.add_scaled(_tree.add_scaled(v, alpha, along), omega, then)
            r = _tree.add_scaled(s, -omega, t)
            new = _tree.vdot(b, r)
            beta = _safe_ratio(new, rho) * _safe_ratio(alpha, omega)
            stretches = jnp.stack([_safe_ratio(_tree.vdot(q, q), _tree.vdot(p, p)), _safe_ratio(length, shortened)])
            p = _tree.add_scaled(r, beta, _tree.add_scaled(p, -omega, q))
            most, least = jnp.max(stretches), jnp.min(jnp.where(stretches > 0, stretches, jnp.inf))
            stretch = most if preconditioner is None else _safe_ratio(length, _tree.vdot(then, then))
            seen = _Stretches(
                unit, jnp.maximum(seen.most, most), jnp.minimum(seen.least, least), jnp.maximum(seen.stretch, stretch)
            )
            rr = _tree.vdot(r, r)
            broken = (alpha == 0) | (omega == 0) | (new == 0) & (rr > target)
            return v, r, p, new, rr, k + 2, broken, seen

        rr = _tree.vdot(b, b)
        zero = jnp.zeros_like(rr)
        seen = _Stretches(zero + 1, zero, zero + jnp.inf, zero)
        start = (_tree.zeros_like(b), b, b, rr, rr, jnp.zeros((), jnp.int32), jnp.zeros((), bool), seen)
        v, _, _, _, rr, k, broken, seen = jax.lax.while_loop(running, body, start)
        inverse = 2 * jax.lax.rsqrt(seen.least)  # as it stands it is a lower bound
        report = Report(
            lambda r: inverse / seen.unit * _tree.norm(precondition(r)),
            limit,
            spent=(k >= max_steps) & ~broken & (rr > target),
            left=jnp.sqrt(rr),
            stretch=jnp.sqrt(seen.stretch) * seen.unit,
            condition=jnp.sqrt(seen.most) * inverse,
        )
        return _nan_unless(jnp.isfinite(rr + limit), _tree.per_unit(v, seen.unit)), k + products, report

    given = _function_of(preconditioner)
    options = {"tol": tol, "max_steps": max_steps}
    return LinearSolver(run, "bicgstab", False, given, partial(_with, bicgstab, **options), warm=True)


class _Stretches(NamedTuple):
    """Of the vectors that were multiplied, in the unit of A: the squares of how A M^-1 stretched them, and A."""

    unit: Array
    most: Array
    least: Array
    stretch: Array


def gmres(
    *,
    tol: Scalar | None = None,
    max_steps: int = 1000,
    restart: int = 30,
    preconditioner: Preconditioner | MatVec | None = None,
) -> LinearSolver:
    r"""Returns restarted GMRES, for general matrices.

    .. math:: v_m = \arg\min_{v \in v_0 + K_m(A, r_0)} \|b - A v\|

    When: the Jacobian is not symmetric: proximal, ADMM and network maps. The default there. The basis is orthogonalised
    twice, and a subspace that is exhausted early is handled by the minimum-norm least-squares solution.

    Args:
        tol: on ``||b - A v|| / ||b||``, tested after each cycle; default 1e-12 in float64, 1e-6 in float32.
        max_steps: products with A, at least 1, rounded up to whole cycles.
        restart: size of the Krylov space, at least 1; cut to the number of unknowns.
        preconditioner: ``v -> M^-1 v``, or a ``Preconditioner`` that builds it; None: the identity. It acts from the
            right, :math:`A M^{-1} u = b`, so the residual is that of A. The transposed (adjoint) system gets the same
            M, not its transpose: a preconditioner that is far from symmetric changes the number of steps there, never
            the answer. It may close over traced values, which have no derivative there.

    Raises:
        ValueError: a tolerance outside (0, 1), a step budget or restart below 1.
        TypeError: a preconditioner that is no function of v; at trace time, one that changes structure, shape or dtype.

    Cost: one product a step and, a cycle of m = restart steps, one more; as many applications of the preconditioner;
    m + 1 copies of v.

    Source: Saad and Schultz (1986); orthogonalised twice: Giraud, Langou and Rozloznik (2005); preconditioned from the
    right: Saad (2003), section 9.3.

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> A = jnp.array([[2.0, 1.0], [0.0, 3.0]])
        >>> v, info = odl.linear.gmres()(lambda v: A @ v, jnp.array([3.0, 3.0]))
        >>> [round(float(entry), 5) for entry in v]
        [1.0, 1.0]
    """
    limit_of = _tolerance("gmres", tol)
    max_steps = count("gmres", "max_steps", max_steps)
    restart = count("gmres", "restart", restart)
    _checked_preconditioner("gmres", preconditioner)

    def run(matvec: MatVec, b: Any, size: Array) -> tuple[Any, Array, Report]:
        limit = limit_of(b)
        precondition, products = _preconditioned(preconditioner, matvec, b)
        m = min(restart, _tree.real_size(b))
        target = limit * size

        def combine(coefficients: Array, basis: Any) -> Any:
            def one(leaf: Array) -> Array:
                weights = coefficients.astype(leaf.dtype).reshape((-1,) + (1,) * (leaf.ndim - 1))
                return jnp.sum(weights * leaf[: len(coefficients)], axis=0)

            return jax.tree.map(one, basis)

        def normalised(r: Any, size: Array) -> Any:
            return _tree.scale(_safe_ratio(jnp.ones_like(size), size), r)

        def cycle(v: Any, r: Any, size: Array, unit: Array) -> tuple[Any, ...]:
            basis = jax.tree.map(
                lambda leaf: jnp.zeros((m + 1, *leaf.shape), leaf.dtype).at[0].set(leaf), normalised(r, size)
            )
            hessenberg = jnp.zeros((m + 1, m), size.dtype)

            def arnoldi(j: Array, carry: Any) -> Any:
                basis, hessenberg, stretch, unit = carry
                z = precondition(jax.tree.map(lambda leaf: leaf[j], basis))
                w = matvec(z)
                length = _tree.norm(w)
                stretch = jnp.maximum(stretch, _safe_ratio(length, _tree.norm(z)))
                unit = jnp.where(unit > 0, unit, _tree.power_of_two(length))  # that of A: its first product's
                w = _tree.per_unit(w, unit)
                column = jnp.zeros(m + 1, size.dtype)
                for _ in range(2):
                    overlap = jax.vmap(lambda direction, w=w: _tree.vdot(direction, w))(basis)
                    w = _tree.subtract(w, combine(overlap, basis))
                    column = column + overlap
                rest = _tree.norm(w)
                rest = jnp.where(rest > 10 * jnp.finfo(rest.dtype).eps * length / unit, rest, jnp.zeros_like(rest))
                basis = jax.tree.map(lambda leaf, new: leaf.at[j + 1].set(new), basis, normalised(w, rest))
                return basis, hessenberg.at[:, j].set(column.at[j + 1].set(rest)), stretch, unit

            start = (basis, hessenberg, jnp.zeros_like(size), unit)
            basis, hessenberg, stretch, unit = jax.lax.fori_loop(0, m, arnoldi, start)
            first = jnp.zeros(m + 1, size.dtype).at[0].set(size)
            y, _, _, values = jnp.linalg.lstsq(hessenberg, first)
            v = _tree.add(v, _tree.per_unit(precondition(combine(y, basis)), unit))
            r = _tree.subtract(b, matvec(v))
            # Singular values of A M^-1 on the Krylov space lie between its own; those of no direction are zero.
            kept = values > m * jnp.finfo(values.dtype).eps * values[0]
            bounds = values[0], jnp.min(jnp.where(kept, values, jnp.inf))
            return v, r, _tree.norm(r), stretch, unit, bounds

        def running(carry: Any) -> Array:
            _, _, size, k, stuck, _ = carry
            return (size > target) & (k < max_steps) & ~stuck

        def body(carry: Any) -> Any:
            v, r, size, k, _, (stretch, unit, most, least) = carry
            new_v, new_r, new_size, new_stretch, unit, bounds = cycle(v, r, size, unit)
            better = new_size < size
            return (
                _tree.where(better, new_v, v),
                _tree.where(better, new_r, r),
                jnp.where(better, new_size, size),
                k + m,
                ~(new_size < 0.99 * size),
                (jnp.maximum(stretch, new_stretch), unit, jnp.maximum(most, bounds[0]), jnp.minimum(least, bounds[1])),
            )

        left = _tree.norm(b)
        zero = jnp.zeros_like(left)
        seen = (zero, zero, zero, zero + jnp.inf)
        start = (_tree.zeros_like(b), b, left, jnp.zeros((), jnp.int32), jnp.zeros((), bool), seen)
        v, _, left, k, stuck, (stretch, unit, most, least) = jax.lax.while_loop(running, body, start)
        report = Report(
            lambda r: _tree.norm(precondition(r)) / (least * jnp.where(unit > 0, unit, 1)),
            limit,
            spent=(k >= max_steps) & ~stuck & (left > target),
            left=left,
            stretch=stretch,
            condition=most / least,
        )
        return _nan_unless(jnp.isfinite(left + stretch + limit), v), k + products, report

    options = {"tol": tol, "max_steps": max_steps, "restart": restart}
    return LinearSolver(run, "gmres", False, _function_of(preconditioner), partial(_with, gmres, **options), warm=True)


def neumann(terms: int, tol: Scalar | None = None) -> LinearSolver:
    r"""Returns the truncated Neumann series.

    .. math:: v = \sum_{i=0}^{\mathrm{terms}} (I - A)^i b

    When: :math:`I - A` (the Jacobian of T) is a contraction with rate q and an error of order
    :math:`q^{\mathrm{terms}+1}` is good enough; it equals differentiating ``terms + 1`` Picard steps at the solution.
    With a tolerance the series ends once its next term, which is the residual, is small: a stationary iteration, which
    also starts from a guess; without one a guess is not used.

    Args:
        terms: the highest power, at least 0; 0 is the identity. With a tolerance: at most so many.
        tol: on ``||b - A v|| / ||b||``. None: all terms, without a test, and the status COMPLETED. With it: CONVERGED;
            STEP_BUDGET_SPENT after all terms; DIVERGED where the terms have grown to 1e6 times the right side, so that
            :math:`I - A` is no contraction. Without one it is DIVERGED where the residual is not below 1.

    Raises:
        ValueError: a negative number of terms, a tolerance outside (0, 1).

    Cost: ``terms`` products at most, and one more for the residual where it is looked at.

    Source: Neumann (1877); as a hypergradient: Lorraine, Vicol and Duvenaud (2020).

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> v, info = odl.linear.neumann(2)(lambda v: 0.5 * v, jnp.array([1.0]))
        >>> float(v[0]), float(info.residual)
        (1.75, 0.125)
        >>> v, info = odl.linear.neumann(100, tol=1e-2)(lambda v: 0.5 * v, jnp.array([1.0]))
        >>> int(info.num_steps), odl.Status(int(info.status)).name
        (7, 'CONVERGED')
    """
    terms = count("neumann", "terms", terms, least=0)
    if tol is not None:
        limit_of = _tolerance("neumann", tol)
        return LinearSolver(partial(_stopping_series, terms, limit_of), f"neumann({terms}, tol)", warm=True)

    def run(matvec: MatVec, b: Any, size: Array) -> tuple[Any, Array, Report]:
        def body(_: Array, v: Any) -> Any:
            return _tree.add(b, _tree.subtract(v, matvec(v)))

        v = jax.lax.fori_loop(0, terms, body, b) if terms else b
        return v, jnp.asarray(terms, jnp.int32), _of_a_series(size, terms)

    return LinearSolver(run, f"neumann({terms})")


def _of_a_series(size: Array, terms: int) -> Report:
    """The residual of a truncated series is its next term; a geometric one goes on at the same rate."""

    def inverse(r: Any) -> Array:
        left = _tree.norm(r)
        rate = (left / size) ** (1 / (terms + 1))
        return jnp.where(rate < 1, left / (1 - rate), jnp.inf)

    return Report(inverse, failed=Status.DIVERGED)


def _stopping_series(
    terms: int, limit_of: Callable[[Any], Array], matvec: MatVec, b: Any, size: Array
) -> tuple[Any, Array, Report]:
    """Terms are added until the next, which is the residual, is small; that one comes along for nothing."""
    limit = limit_of(b)

    def running(carry: Any) -> Array:
        _, _, left, _, k = carry
        return (left > limit * size) & (left < 1e6 * size) & (k < terms)

    def body(carry: Any) -> Any:
        v, r, old, _, k = carry
        v, r = _tree.add(v, r), _tree.subtract(r, matvec(r))
        left = _tree.norm(r)
        return v, r, left, left / old, k + 1

    left = _tree.norm(b)
    start = (_tree.zeros_like(b), b, left, jnp.zeros_like(left), jnp.zeros((), jnp.int32))
    v, r, left, rate, k = jax.lax.while_loop(running, body, start)
    sound, grown = jnp.isfinite(left + limit), left >= 1e6 * size
    report = Report(
        lambda r: jnp.where(rate < 1, _tree.norm(r) / (1 - rate), jnp.inf),
        limit,
        spent=(k >= terms) & (left > limit * size) & ~grown,
        stretch=1.0,
        failed=jnp.where(grown, Status.DIVERGED, Status.STALLED),
    )
    return _nan_unless(sound, _tree.add(v, r)), k, report


def identity() -> LinearSolver:
    """Returns the solver that takes ``v = b``: the one-step (Jacobian-free) derivative.

    When: the Jacobian of T is small, or a biased but cheap hypergradient is good enough.

    Cost: nothing, and one product for the residual where it is looked at.

    Source: Bolte, Pauwels and Vaiter (2023); Fung et al. (2022).

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> v, info = odl.linear.identity()(lambda v: 0.5 * v, jnp.array([1.0]))
        >>> float(v[0]), float(info.residual)
        (1.0, 0.5)
    """
    return LinearSolver(lambda matvec, b, size: (b, jnp.zeros((), jnp.int32), _of_a_series(size, 0)), "identity")


def dense() -> LinearSolver:
    """Returns the direct solver, which builds the matrix from its columns and factorises it (LU).

    When: few unknowns, or a reference. In float32 it loses digits in proportion to the condition number.

    Cost: n products at once, n^2 numbers, n^3 operations for n unknowns.

    Source: LAPACK gesv through ``jnp.linalg.solve``.

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> v, info = odl.linear.dense()(lambda v: 4.0 * v, jnp.array([2.0]))
        >>> float(v[0])
        0.5
    """

    def run(matvec: MatVec, b: Any, size: Array) -> tuple[Any, Array, Report]:
        flat, product, narrow = _flattened(matvec, b)
        matrix = jax.vmap(product, out_axes=1)(jnp.eye(flat.size, dtype=flat.dtype))
        unit = _tree.magnitude(matrix)
        factor = jax.scipy.linalg.lu_factor(matrix / unit)

        def solve(right: Array) -> Array:
            return jax.scipy.linalg.lu_solve(factor, right) / unit

        limit = jnp.asarray(8 * jnp.finfo(flat.dtype).eps, flat.dtype)
        # Twice, for the residual is rounded as the solution is.
        report = Report(lambda r: 2 * _tree.norm(solve(_widened(r)[0])), limit, stretch=_tree.norm(matrix))
        return narrow(solve(flat)), jnp.asarray(flat.size, jnp.int32), report

    return LinearSolver(run, "dense")


def nystrom(rank: int, regularisation: Scalar = 1e-2, key: Array | None = None) -> LinearSolver:
    r"""Returns the Nystrom approximation of the inverse, from some columns of the matrix.

    .. math:: v = (C W^+ C^\top + \rho I)^{-1} b, \qquad C = A_{:, S}, \quad W = A_{S, S}

    for r columns S drawn without replacement. It is solved in the eigenbasis of the sketch, which is Woodbury's formula
    without its differences of large numbers.

    When: A is symmetric positive semidefinite with a spectrum that falls fast, up to the :math:`\rho I` that is meant
    to be there (regularised losses of large models); or many right sides. It is refused where the operator's Jacobian
    is not declared symmetric. The answer is biased, and ``info.residual`` says how much: with all n columns it is
    exactly :math:`(A + \rho I)^{-1} b`, whose residual is at most :math:`\rho / (\lambda_{\min} + \rho)`; with
    fewer, what lies outside the span of the columns is divided by :math:`\rho` alone. A warm-start guess is not used.

    Args:
        rank: r, the columns, at least 1; cut to the number of unknowns.
        regularisation: :math:`\rho > 0`, on the scale of the matrix.
        key: of the draw, the same at each solve; default ``jax.random.key(0)``.

    Raises:
        ValueError: a rank below 1, a regularisation that is not positive.

    Cost: r products at once, r n numbers, r^2 n operations; one product more for the residual.

    Source: Hataya and Yamada (2023), equations 5 and 6; the pseudo-inverse drops what is zero to rounding, or negative:
    that of a matrix that is not positive semidefinite.

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> A = jnp.array([[2.0, 1.0], [1.0, 3.0]])
        >>> v, info = odl.linear.nystrom(2, 1e-3)(lambda v: A @ v, jnp.array([3.0, 4.0]))
        >>> [round(float(entry), 2) for entry in v], float(info.residual) < 1e-3
        ([1.0, 1.0], True)
    """
    rank = count("nystrom", "rank", rank)
    number("nystrom", "regularisation", regularisation)
    key = jax.random.key(0) if key is None else key

    def run(matvec: MatVec, b: Any, size: Array) -> tuple[Any, Array, Report]:
        flat, product, narrow = _flattened(matvec, b)
        n, rho = flat.size, jnp.asarray(regularisation).astype(flat.dtype)
        r = min(rank, n)
        chosen = jax.random.permutation(key, n)[:r]
        units = jnp.zeros((r, n), flat.dtype).at[jnp.arange(r), chosen].set(1)
        columns = jax.vmap(product, out_axes=1)(units)
        unit = _tree.magnitude((columns, rho))
        columns, rho = columns / unit, rho / unit
        sizes, vectors = jnp.linalg.eigh(columns[chosen], symmetrize_input=True)
        kept = sizes > n * jnp.finfo(flat.dtype).eps * jnp.max(jnp.abs(sizes))
        roots = jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, sizes, 1)), 0)
        # The sketch is Q diag(stretch^2) Q^T.
        Q, stretch, _ = jnp.linalg.svd((columns @ vectors) * roots[None, :], full_matrices=False)

        def solve(right: Array) -> Array:
            inside = Q.T @ right
            v = Q @ (inside / (stretch**2 + rho))
            if r < n:
                outside = right - Q @ inside
                v = v + (outside - Q @ (Q.T @ outside)) / rho
            return v / unit

        def inverse(miss: Any) -> Array:
            rate = _tree.norm(miss) / size
            return jnp.where(rate < 1, _tree.norm(solve(_widened(miss)[0])) / (1 - rate), jnp.inf)

        return narrow(solve(flat)), jnp.asarray(r, jnp.int32), Report(inverse)

    return LinearSolver(run, f"nystrom({rank})", symmetric=True)


def nystrom_preconditioner(rank: int, regularisation: Scalar = 0.0, key: Array | None = None) -> Preconditioner:
    r"""Returns the randomised Nystrom preconditioner, for ``cg`` and the others.

    .. math:: M^{-1} = (\hat\lambda_r + \mu)\, U (\hat\Lambda + \mu I)^{-1} U^\top + (I - U U^\top), \qquad
        A - \mu I \approx U \hat\Lambda U^\top = Y (\Omega^\top Y)^{-1} Y^\top, \quad Y = (A - \mu I) \Omega

    for r orthonormal random directions :math:`\Omega`. It takes the r largest eigenvalues out of the spectrum; where r
    is a few times the effective dimension of :math:`A - \mu I` at :math:`\mu`, the condition number that is left is
    bounded, whatever that of A.

    When: A is symmetric positive definite, its spectrum falls fast, and the system is ill-conditioned: adjoint systems
    of ridge, kernel and logistic regression. Unlike ``nystrom`` it leaves no bias, only fewer steps.

    Args:
        rank: r, at least 1; cut to the number of unknowns.
        regularisation: :math:`\mu \ge 0`, the multiple of the identity that is known to be part of A, on the scale of
            A: for a gradient step of size :math:`\gamma` on a loss with penalty :math:`\rho/2 \|x\|^2` it is
            :math:`\gamma \rho`.
        key: of the directions, the same at each solve; default ``jax.random.key(0)``.

    Raises:
        ValueError: a rank below 1, a negative regularisation.

    Cost: r products at once, r n numbers, r^2 n operations for each system; 2 r n operations a step.

    Source: Frangella, Tropp and Udell (2023), algorithm 2.1 and section 5; directions that are zero to rounding, or
    negative, are left out.

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> spectrum = jnp.append(10.0 ** jnp.arange(3, 8) / 1e3, jnp.ones(45))
        >>> plain = odl.linear.cg()(lambda v: spectrum * v, jnp.ones(50))[1]
        >>> nystrom = odl.linear.nystrom_preconditioner(6, regularisation=1.0)
        >>> better = odl.linear.cg(preconditioner=nystrom)(lambda v: spectrum * v, jnp.ones(50))[1]
        >>> int(plain.num_steps) - 1 > int(better.num_steps) - 6  # without the products of the sketch
        True
    """
    rank = count("nystrom_preconditioner", "rank", rank)
    number("nystrom_preconditioner", "regularisation", regularisation, closed=True)
    key = jax.random.key(0) if key is None else key

    def build(matvec: MatVec, b: Any) -> tuple[MatVec, int]:
        flat, product, _ = _flattened(matvec, b)
        n, mu = flat.size, jnp.asarray(regularisation).astype(flat.dtype)
        r, eps = min(rank, n), jnp.finfo(flat.dtype).eps
        directions, _ = jnp.linalg.qr(jax.random.normal(key, (n, r), flat.dtype))
        sketch = jax.vmap(product, in_axes=1, out_axes=1)(directions) - mu * directions
        unit = _tree.magnitude((sketch, mu))
        sketch, mu = sketch / unit, mu / unit
        # The shift keeps the small matrix positive definite in the face of rounding, and is taken off again.
        shift = jnp.sqrt(jnp.asarray(n, flat.dtype)) * eps * _tree.norm(sketch)
        sketch = sketch + shift * directions
        sizes, vectors = jnp.linalg.eigh(directions.T @ sketch, symmetrize_input=True)
        sound = sizes > n * eps * jnp.max(jnp.abs(sizes))
        roots = jnp.where(sound, jax.lax.rsqrt(jnp.where(sound, sizes, 1)), 0)
        U, stretch, _ = jnp.linalg.svd((sketch @ vectors) * roots[None, :], full_matrices=False)
        values = stretch**2 - shift
        kept = (values > n * eps * jnp.max(values)) & (values + mu > 0)
        least = jnp.min(jnp.where(kept, values, jnp.inf))
        weights = jnp.where(kept, (least + mu) / jnp.where(kept, values + mu, 1) - 1, 0)

        def apply(v: Any) -> Any:
            wide, narrow = _widened(v)
            return narrow(wide + U @ (weights * (U.T @ wide)))

        return apply, r

    return Preconditioner(build, f"nystrom_preconditioner({rank})")


def _flattened(matvec: MatVec, b: Any) -> tuple[Array, Callable[[Array], Array], Callable[[Array], Any]]:
    """b as one real vector in the accumulation dtype, the product on such vectors, and the way back."""
    flat, narrow = _widened(b)
    return flat, lambda v: _widened(matvec(narrow(v)))[0], narrow


def _widened(b: Any) -> tuple[Array, Callable[[Array], Any]]:
    """b as one real vector in the accumulation dtype, and the way back."""
    dtype = _tree.accumulation_dtype(b)

    def widened(leaf: Array) -> Any:
        parts = (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,)
        return [part.astype(dtype) for part in parts]

    def narrowed(like: Array, parts: list[Array]) -> Array:
        return (parts[0] if len(parts) == 1 else jax.lax.complex(*parts)).astype(like.dtype)

    flat, unravel = ravel_pytree(jax.tree.map(widened, b))
    return flat, lambda v: jax.tree.map(narrowed, b, unravel(v))


def from_lineax(solver: Any, *, tags: Any = ()) -> LinearSolver:
    """Returns any lineax solver in this form.

    Args:
        solver: a ``lineax.AbstractLinearSolver``, for instance ``lineax.GMRES(rtol=1e-8, atol=1e-8)``.
        tags: lineax tags of the matrix, for instance ``lineax.positive_semidefinite_tag``, which ``lineax.CG`` wants.

    Raises:
        ImportError: lineax is not installed.

    Cost: that of the solver, and one product for the residual.

    Source: lineax, Rader, Lyons and Kidger (2023).

    Example:
        >>> import jax.numpy as jnp, lineax, odljax as odl
        >>> solver = odl.linear.from_lineax(lineax.GMRES(rtol=1e-5, atol=1e-5))
        >>> v, info = solver(lambda v: 2.0 * v, jnp.array([2.0, 4.0]))
        >>> [round(float(entry), 4) for entry in v]
        [1.0, 2.0]
    """
    try:
        import lineax
    except ImportError as error:
        raise ImportError("from_lineax: lineax is not installed; run pip install lineax.") from error

    def run(matvec: MatVec, b: Any, size: Array) -> tuple[Any, Array, Report]:
        operator = lineax.FunctionLinearOperator(matvec, jax.eval_shape(lambda: b), tags)
        solution = lineax.linear_solve(operator, b, solver, throw=False)
        steps = solution.stats.get("num_steps", 0)
        rtol = getattr(solver, "rtol", 100 * jnp.finfo(size.dtype).eps)
        spent = solution.result == lineax.RESULTS.max_steps_reached
        value = _nan_unless(_tree.all_finite(_tree.subtract(b, matvec(solution.value))), solution.value)
        report = Report(
            lambda r: jnp.full_like(size, jnp.inf), jnp.asarray(rtol).astype(size.dtype), jnp.asarray(spent)
        )
        return value, jnp.asarray(steps, jnp.int32), report

    name = type(solver).__name__
    return LinearSolver(run, f"lineax.{name}", symmetric=name == "CG", warm=True)
