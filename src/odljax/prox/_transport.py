"""Projections of matrices onto the transport polytope, Euclidean and Kullback-Leibler, by Newton's method on a dual."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from .._tree import power_of_two
from .._types import Float, PyTree
from ..derivatives import implicit
from ..iterations import Iteration
from ..linear import LinearSolver
from ..operators import Operator
from ..solvers import until_converged
from ._leafwise import fit, flatten, nan_unless, pair, spread, widest
from ._proximal_point import Penalty, proximal_point
from ._simplex import floor, simplex_threshold

# (scores, column sums) -> (plan, the weights of the dual's Hessian, the dual's terms)
Columns = Callable[[Array, Array], tuple[Array, Array, Array]]

_STEPS = 400
_HALVINGS = 10


def transport(
    v: PyTree[ArrayLike], parameter: PyTree[ArrayLike], step_size: object = 1.0
) -> PyTree[Float[Array, "..."]]:
    """Return max(v + f 1' + 1 g', 0) with given row and column sums: the projection onto the transport polytope.

    For sparse transport plans and couplings, matrix by matrix. h is the indicator of {x >= 0, x 1 = row sums, x' 1 =
    column sums}, so that the step size plays no part.

    Shapes: v [..., m, n], any tree of these; the row sums broadcast to [..., m], the column sums to [..., n] (or trees
        of these that are prefixes of v).
    Args:
        v: tree of floating-point arrays; an entry of -inf is a forbidden one.
        parameter: (row_sums, column_sums), both >= 0, of equal totals: both are scaled to the geometric mean of the
            two, which is of no account where they differ by rounding.
        step_size: ignored.
    Returns: a tree like v, that meets one side's sums to rounding and the other's to a hundred rounding units of
        1 + max |v| / total (of 1 + max |v| in the Kullback-Leibler case), 1 % at worst; NaN where the totals differ by
        more than 1 %, or the method has not come that far in 400 steps, as where no plan avoids the forbidden entries.
    Raises: TypeError where a leaf of v is not real floating-point or a sum not a real number; ValueError where
        parameter is not a pair, a leaf has fewer than two axes, the structure or shape of a sum does not fit v, or it
        is a negative Python or NumPy number.
    At kinks: an entry that ties with 0 counts as positive; where the graph of the positive entries falls apart, the
        derivative in the sums is the least-squares one.
    Cost: some ten to forty Newton steps, each O(m n log m + min(m, n)^3).
    Source: the semi-dual of Blondel, Seguy and Rolet, 2018, "Smooth and sparse optimal transport", solved by a
        semismooth Newton method (Li, Sun and Toh, 2020), from proximal points of the dual where these come near, else
        with continuation in the scale of v.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> v = jnp.array([[1.0, 0.0], [0.0, 0.0]])
        >>> sums = (jnp.array([0.5, 0.5]), jnp.array([0.25, 0.75]))
        >>> [[round(x, 4) for x in row] for row in prox.transport(v, sums).tolist()]
        [[0.25, 0.25], [0.0, 0.5]]
    """
    rows, columns = pair("prox.transport", "(row_sums, column_sums)", parameter)
    return _on_matrices("prox.transport", _simplex_columns, v, rows, columns)


def birkhoff(
    v: PyTree[ArrayLike], parameter: PyTree[ArrayLike] = 1.0, step_size: object = 1.0
) -> PyTree[Float[Array, "..."]]:
    """Return the projection onto the Birkhoff polytope: max(v + f 1' + 1 g', 0) with all row and column sums scale.

    For relaxed permutations and matchings, matrix by matrix. h is the indicator of the polytope, so that the step size
    plays no part.

    Shapes: v [..., n, n], any tree of these; scale is a scalar, an array that broadcasts to [...], or a tree of these
        that is a prefix of v.
    Args:
        v: tree of floating-point arrays; an entry of -inf is a forbidden one.
        parameter: scale >= 0, the sum of each row and column.
        step_size: ignored.
    Returns: a tree like v, as `transport` does.
    Raises: TypeError where a leaf of v is not real floating-point or scale not a real number; ValueError where a leaf
        has no square matrices on its last two axes, the structure or shape of scale does not fit v, or it is a negative
        Python or NumPy number.
    At kinks: as `transport`.
    Cost: as `transport`.
    Source: Birkhoff, 1946; solved as `transport`.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> v = jnp.array([[0.75, 0.0], [0.0, 0.25]])
        >>> [[round(x, 4) for x in row] for row in prox.birkhoff(v).tolist()]
        [[0.75, 0.25], [0.25, 0.75]]
    """
    return _on_square_matrices("prox.birkhoff", _simplex_columns, v, parameter)


def kl_transport(
    v: PyTree[ArrayLike], parameter: PyTree[ArrayLike], step_size: object = 1.0
) -> PyTree[Float[Array, "..."]]:
    """Return exp(v + f 1' + 1 g') with given row and column sums: the Kullback-Leibler projection of exp(v).

    For entropic transport plans, matrix by matrix: with v = -cost / epsilon it is what Sinkhorn's algorithm converges
    to. It minimises KL(x | exp(v)) over the transport polytope and is no proximal operator in the Euclidean sense; the
    step size plays no part.

    Shapes: v [..., m, n], any tree of these; the row sums broadcast to [..., m], the column sums to [..., n] (or trees
        of these that are prefixes of v).
    Args:
        v: tree of floating-point arrays, however spread out; an entry of -inf is a forbidden one.
        parameter: (row_sums, column_sums), both >= 0, of equal totals: both are scaled to the geometric mean of the
            two, which is of no account where they differ by rounding.
        step_size: ignored.
    Returns: a tree like v, that meets one side's sums to rounding and the other's to a hundred rounding units of
        1 + max |v| / total (of 1 + max |v| in the Kullback-Leibler case), 1 % at worst; NaN where the totals differ by
        more than 1 %, or the method has not come that far in 400 steps, as where no plan avoids the forbidden entries.
    Raises: TypeError where a leaf of v is not real floating-point or a sum not a real number; ValueError where
        parameter is not a pair, a leaf has fewer than two axes, the structure or shape of a sum does not fit v, or it
        is a negative Python or NumPy number.
    At kinks: there are none; where entries underflow and the graph of the others falls apart, the derivative in the
        sums is the least-squares one.
    Cost: some ten to forty Newton steps, each O(m n min(m, n)).
    Source: Cuturi, 2013; the semi-dual of Cuturi and Peyre, 2016, solved by Newton's method with continuation in the
        scale of v rather than by Sinkhorn's algorithm, whose rate tends to 1 as v spreads.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> v = jnp.array([[1.0, 0.0], [0.0, 0.0]])
        >>> [[round(x, 4) for x in row] for row in prox.kl_transport(v, (0.5, 0.5)).tolist()]
        [[0.3112, 0.1888], [0.1888, 0.3112]]
    """
    rows, columns = pair("prox.kl_transport", "(row_sums, column_sums)", parameter)
    return _on_matrices("prox.kl_transport", _softmax_columns, v, rows, columns)


def kl_birkhoff(
    v: PyTree[ArrayLike], parameter: PyTree[ArrayLike] = 1.0, step_size: object = 1.0
) -> PyTree[Float[Array, "..."]]:
    """Return exp(v + f 1' + 1 g') with all row and column sums scale: doubly stochastic scaling of exp(v).

    For soft permutations and matchings, matrix by matrix; the Kullback-Leibler projection of exp(v) onto the Birkhoff
    polytope. It is no proximal operator in the Euclidean sense; the step size plays no part.

    Shapes: v [..., n, n], any tree of these; scale is a scalar, an array that broadcasts to [...], or a tree of these
        that is a prefix of v.
    Args:
        v: tree of floating-point arrays, however spread out; an entry of -inf is a forbidden one.
        parameter: scale >= 0, the sum of each row and column.
        step_size: ignored.
    Returns: a tree like v, as `kl_transport` does.
    Raises: TypeError where a leaf of v is not real floating-point or scale not a real number; ValueError where a leaf
        has no square matrices on its last two axes, the structure or shape of scale does not fit v, or it is a negative
        Python or NumPy number.
    At kinks: as `kl_transport`.
    Cost: as `kl_transport`.
    Source: Sinkhorn, 1964; solved as `kl_transport`.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> v = jnp.array([[1.0, 0.0], [0.0, 0.0]])
        >>> [[round(x, 4) for x in row] for row in prox.kl_birkhoff(v).tolist()]
        [[0.6225, 0.3775], [0.3775, 0.6225]]
    """
    return _on_square_matrices("prox.kl_birkhoff", _softmax_columns, v, parameter)


def _on_square_matrices(who: str, columns: Columns, v: PyTree, scale: PyTree) -> PyTree:
    entries, _ = flatten(who, v)
    for path, leaf in entries:
        shape = jnp.shape(leaf)
        if len(shape) < 2 or shape[-1] != shape[-2]:
            raise ValueError(
                f"{who} needs square matrices on the last two axes; v{jax.tree_util.keystr(path)} has shape {shape}; "
                "for others use transport."
            )
    sums = []
    for (path, leaf), value in zip(entries, spread(who, "scale", scale, v), strict=True):
        shape, dtype = jnp.shape(leaf), widest(jnp.result_type(leaf))
        value = fit(who, "scale" + jax.tree_util.keystr(path), value, dtype, shape[:-2])
        sums.append(jnp.broadcast_to(value[..., None] if value.ndim else value, shape[:-1]))
    each = jax.tree.unflatten(jax.tree.structure(v), sums)
    return _on_matrices(who, columns, v, each, each)


def _on_matrices(who: str, columns: Columns, v: PyTree, row_sums: PyTree, column_sums: PyTree) -> PyTree:
    entries, structure = flatten(who, v)
    sides = zip(entries, spread(who, "row_sums", row_sums, v), spread(who, "column_sums", column_sums, v), strict=True)
    results = []
    for (path, leaf), rows, cols in sides:
        dtype, shape, at = jnp.result_type(leaf), jnp.shape(leaf), jax.tree_util.keystr(path)
        if len(shape) < 2 or 0 in shape[-2:]:
            raise ValueError(
                f"{who} needs matrices on the last two axes; v{at} has shape {shape}; give it two axes, none of them "
                "empty."
            )
        x = jnp.asarray(leaf, widest(dtype))
        by_row, by_column = shape[:-1], (*shape[:-2], shape[-1])
        rows = jnp.broadcast_to(_as_rank(fit(who, f"row_sums{at}", rows, x.dtype, by_row), len(by_row)), by_row)
        cols = jnp.broadcast_to(
            _as_rank(fit(who, f"column_sums{at}", cols, x.dtype, by_column), len(by_column)), by_column
        )
        flat = (x.reshape(-1, *shape[-2:]), rows.reshape(-1, shape[-2]), cols.reshape(-1, shape[-1]))
        plan = _plans(who, columns, *flat)
        results.append(plan.reshape(shape).astype(dtype))
    return jax.tree.unflatten(structure, results)


def _as_rank(value: Array, rank: int) -> Array:
    return value.reshape((1,) * (rank - value.ndim) + value.shape)


# ---- one matrix ----------------------------------------------------------------------------------------------------


class _Semidual(NamedTuple):
    """What a plan is made of: scores, row and column sums."""

    v: Array
    rows: Array
    columns: Array


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _plans(who: str, columns: Columns, *matrices: Array) -> Array:
    return jax.vmap(functools.partial(_plan, who, columns))(*matrices)


def _plan(who: str, columns: Columns, v: Array, rows: Array, cols: Array) -> Array:
    if v.shape[0] > v.shape[1]:  # the dual has one variable a row
        return _plan(who, columns, v.T, cols, rows).T
    totals = jnp.sum(rows), jnp.sum(cols)
    balanced = jnp.abs(totals[0] - totals[1]) <= 0.01 * jnp.maximum(*totals)
    empty = (totals[0] == 0) | (totals[1] == 0)
    common = jnp.sqrt(jnp.where(empty, 1, totals[0] * totals[1]))
    # Shares of the total, and scores in units of it, so that tolerances mean the same everywhere.
    shares = [side / jnp.where(empty, 1, total) for side, total in zip((rows, cols), totals, strict=True)]
    spread_out = v / common if columns is _simplex_columns else v
    spread_out = spread_out - jnp.max(jax.lax.stop_gradient(spread_out), axis=0, keepdims=True)
    # A row without mass has no potential: it is taken out here, and comes back as zeros.
    blank = shares[0] == 0
    theta = _Semidual(jnp.where(blank[:, None], -jnp.inf, spread_out), *shares)
    # Rounding is that of the scores: nothing better than this can be asked for.
    finite = jax.lax.stop_gradient(jnp.where(jnp.isfinite(theta.v), jnp.abs(theta.v), 0))
    tol = jnp.minimum(10 * jnp.finfo(v.dtype).eps * (1 + jnp.max(finite)), 1e-3)
    iteration = _newton(who, columns)
    solver = implicit(until_converged(iteration, tol=tol, max_steps=_STEPS), _pseudo_inverse(), on_failure="ignore")
    start = jnp.zeros_like(rows)
    if columns is _simplex_columns:
        held = jax.lax.stop_gradient(theta)
        found = _row_potentials(*held)
        gap = jnp.sum(columns(held.v + found[:, None], held.columns)[0], axis=1) - held.rows
        start = jnp.where(jnp.linalg.norm(gap) <= 1e-6 * jnp.max(held.rows), found, start)
    f = solver(start, theta).x
    plan, *_ = columns(theta.v + f[:, None], theta.columns)
    miss = jnp.max(jnp.abs(jnp.sum(jax.lax.stop_gradient(plan), axis=1) - jax.lax.stop_gradient(theta.rows)))
    sound = balanced & (miss <= 10 * tol)
    plan = jnp.where(empty, 0 * v, common * plan)
    return nan_unless(balanced & (empty | sound), plan, v, rows, cols)


def _row_potentials(v: Array, rows: Array, columns: Array) -> Array:
    """f of the plan max(v + f 1' + 1 g', 0), by proximal points of the dual: whatever the sums."""
    m, n = v.shape
    allowed = jnp.isfinite(v)
    finite = jnp.where(allowed, v, 0)
    unit = power_of_two(jnp.maximum(jnp.max(jnp.abs(finite)), jnp.max(rows)))
    along, across = n**-0.5, m**-0.5  # equations of length 1

    def apply(x: Array) -> Array:
        x = jnp.where(allowed, x.reshape(m, n), 0)
        return jnp.concatenate([along * jnp.sum(x, axis=1), across * jnp.sum(x, axis=0), -x.ravel()])

    def adjoint(u: Array) -> Array:
        x = along * u[:m, None] + across * u[None, m : m + n] - u[m + n :].reshape(m, n)
        return jnp.where(allowed, x, 0).ravel()

    def project(p: Array) -> Array:
        return jnp.where((jnp.arange(p.size) < m + n) | (p > 0), p, 0)

    def solve(p: Array, sigma: Array, r: Array) -> Array:
        inverse = 1 / (1 + jnp.where(p[m + n :] > 0, sigma, 0))
        shown = jnp.where(allowed, inverse.reshape(m, n), 0)
        inner = jnp.block(
            [
                [jnp.diag(along**2 * jnp.sum(shown, axis=1)), along * across * shown],
                [along * across * shown.T, jnp.diag(across**2 * jnp.sum(shown, axis=0))],
            ]
        )
        inner = inner + jnp.eye(m + n, dtype=v.dtype) / sigma
        both = jnp.linalg.solve(inner, apply(inverse * r)[: m + n])
        return inverse * (r - adjoint(jnp.concatenate([both, jnp.zeros(m * n, v.dtype)])))

    sides = jnp.concatenate([along * rows, across * columns, jnp.zeros(m * n, v.dtype)]) / unit
    penalty = Penalty(apply, sides, adjoint, project, solve)
    point = proximal_point((finite / unit).ravel(), jnp.zeros_like(sides), penalty)
    return -unit * along * point.w[:m]


def _simplex_columns(scores: Array, sums: Array) -> tuple[Array, Array, Array]:
    """The projection of each column onto the simplex of its sum; where it is positive; the dual's terms."""
    peak = jnp.max(jax.lax.stop_gradient(scores), axis=0)
    scores = (scores - jnp.max(jax.lax.stop_gradient(scores), axis=0, keepdims=True)).T
    tau, support = simplex_threshold(scores, sums[:, None])
    plan = jnp.where(support, scores - tau, 0)
    plan = floor(plan)
    terms = peak * sums + jnp.sum(jnp.where(plan > 0, plan * (scores - plan / 2), 0), axis=1)
    return plan.T, support.T.astype(scores.dtype), terms


def _softmax_columns(scores: Array, sums: Array) -> tuple[Array, Array, Array]:
    plan = jax.nn.softmax(scores, axis=0) * sums[None]
    return plan, plan, sums * jax.nn.logsumexp(scores, axis=0)


def _simplex_rows(v: Array, f: Array, plan: Array, theta: _Semidual) -> Array:
    """What f moves by so that the row sums are met while the columns' potentials g stand still."""
    peak = jnp.argmax(plan, axis=0)[None]
    g = jnp.take_along_axis(plan, peak, axis=0) - jnp.take_along_axis(v + f[:, None], peak, axis=0)
    scores = v + f[:, None] + g
    peak = jnp.max(scores, axis=1, keepdims=True)
    return -(peak + simplex_threshold(scores - peak, theta.rows[:, None])[0])[:, 0]


def _softmax_rows(v: Array, f: Array, plan: Array, theta: _Semidual) -> Array:
    g = jnp.log(theta.columns)[None] - jax.nn.logsumexp(v + f[:, None], axis=0, keepdims=True)
    return jnp.where(theta.rows > 0, jnp.log(theta.rows) - jax.nn.logsumexp(v + f[:, None] + g, axis=1), 0)


def _newton(who: str, columns: Columns) -> Iteration[Array, _Semidual]:
    """Newton's method for the semi-dual, whose gradient in the rows' potentials f is the excess of the row sums.

    It starts with scores scaled down until they differ by one unit or so, where the dual is benign, and scales up as
    fast as it can solve. Its Hessian diag(sum_j w_ij) - w diag(1 / sum_i w_ij) w' is a weighted Laplacian.
    """

    def excess(f: Array, theta: _Semidual) -> Array:
        return jnp.sum(columns(theta.v + f[:, None], theta.columns)[0], axis=1) - theta.rows

    rows = _simplex_rows if columns is _simplex_columns else _softmax_rows

    def scaled(theta: _Semidual, scale: Array) -> _Semidual:
        return theta._replace(v=jnp.where(theta.v == -jnp.inf, theta.v, theta.v * scale))

    def init(f: Array, theta: _Semidual) -> Array:
        finite = jnp.where(jnp.isfinite(theta.v), theta.v, 0)
        unit = 1.0 if columns is _softmax_columns else 1.0 / theta.v.shape[0]
        least = jnp.minimum(1, unit / jnp.maximum(jnp.max(jnp.abs(finite)), unit)).astype(f.dtype)
        near = jnp.linalg.norm(excess(f, theta)) <= 1e-6 * jnp.max(theta.rows)
        return jnp.where(near, jnp.ones_like(least), least)

    def step(f: Array, scale: Array, theta: _Semidual, k: Array) -> tuple[Array, Array]:
        own = scaled(theta, scale)
        plan, weights, terms = columns(own.v + f[:, None], own.columns)
        value = jnp.sum(terms) - jnp.sum(own.rows * f)
        gap = jnp.sum(plan, axis=1) - own.rows
        size = jnp.linalg.norm(gap)
        masses = jnp.sum(weights, axis=0)
        hessian = jnp.diag(jnp.sum(weights, axis=1)) - (weights / jnp.where(masses == 0, 1, masses)[None]) @ weights.T
        largest = jnp.max(jnp.diag(hessian))
        shift = (0.01 * jnp.minimum(size, 1) + 10 * jnp.finfo(f.dtype).eps) * jnp.where(largest == 0, 1, largest)
        direction = -jnp.linalg.solve(hessian + shift * jnp.eye(f.size, dtype=f.dtype) + largest / f.size, gap)

        slope = jnp.sum(gap * direction)

        def halve(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            t, halvings, _ = carry
            ahead = f + t / 2 * direction
            plan, _, terms = columns(own.v + ahead[:, None], own.columns)
            lower = jnp.sum(terms) - jnp.sum(own.rows * ahead) <= value + 1e-3 * t / 2 * slope
            nearer = jnp.linalg.norm(jnp.sum(plan, axis=1) - own.rows) <= 0.5 * size  # where values only round
            return t / 2, halvings + 1, lower | nearer

        # The verdict is carried: computed again in the condition, compiled another way, it may differ, and never end.
        start = (2 * jnp.ones_like(size), jnp.full((), -1), jnp.zeros((), bool))
        t, _, found = jax.lax.while_loop(lambda carry: ~carry[2] & (carry[1] < _HALVINGS), halve, start)
        # Where Newton's direction is of no use, one sweep of coordinate descent (Sinkhorn's) never is of none; and only
        # that brings in a row of which no entry is positive.
        f = jnp.where(found, f + t * direction, f)
        plan = columns(own.v + f[:, None], own.columns)[0]
        swept = f + rows(own.v, f, plan, own)
        lost = jnp.any((jnp.sum(plan, axis=1) == 0) & (own.rows > 0))
        f = jnp.where(~found | lost, swept, f)
        solved = jnp.linalg.norm(excess(f, own)) <= 0.1 * jnp.max(theta.rows)
        larger = jnp.where(solved, jnp.minimum(1, 4 * scale), scale)
        return f * (larger / scale), larger

    return Iteration(init, step, Operator(lambda f, theta: f - excess(f, theta), excess, symmetric=True), who)


def _pseudo_inverse() -> LinearSolver:
    """For a Laplacian, which is singular: potentials are known up to a constant a component."""

    def run(matvec: Any, b: Array, guess: Any) -> tuple[Array, Array, None]:
        matrix = jax.vmap(matvec, out_axes=1)(jnp.eye(b.size, dtype=b.dtype))
        return jnp.linalg.pinv(matrix, hermitian=True) @ b, jnp.asarray(b.size, jnp.int32), None

    return LinearSolver(run, "pseudo_inverse", symmetric=True)
