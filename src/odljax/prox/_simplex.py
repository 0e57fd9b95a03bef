"""Projections onto the simplex and its relatives."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from .._checks import count
from .._types import Float, PyTree
from ._leafwise import describe, fit, flatten, leafwise, nan_unless, pair, spread, widest


def simplex(
    v: PyTree[ArrayLike], parameter: PyTree[ArrayLike] = 1.0, step_size: object = 1.0
) -> PyTree[Float[Array, "..."]]:
    """Return max(v - tau, 0) with tau such that rows sum to scale: the projection onto {x >= 0, sum x = scale}.

    For weights, mixtures and attention that may be exactly zero. Like softmax it works along the last axis, row by row,
    and an entry of -inf is a masked one. h is the indicator of the simplex, so that the step size plays no part.

    Shapes: v [..., n], n >= 1, any tree of these (a 0-d leaf is a row of one); scale is a scalar, an array that
        broadcasts to [...], or a tree of these that is a prefix of v.
    Args:
        v: tree of floating-point arrays; a row that holds NaN or +inf comes out as NaN.
        parameter: scale > 0, the sum of each row (0 gives zeros).
        step_size: ignored.
    Returns: a tree like v.
    Raises: TypeError where a leaf of v is not real floating-point or scale not a real number; ValueError where a row
        is empty, the structure or shape of scale does not fit v, or it is a negative Python or NumPy number.
    At kinks: with S = {i: v_i >= tau} the derivative in v is the centring matrix I - 1 1' / |S| on S and 0 off it, and
        that in scale 1 / |S| on S; an entry that ties with tau is in S.
    Cost: one sort, O(n log n) a row.
    Source: Held, Wolfe and Crowder, 1974; tau is the greatest of (sum of the k largest - scale) / k over k.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.simplex(jnp.array([[0.5, 1.0, -1.0], [0.0, 0.0, -jnp.inf]])).tolist()
        [[0.25, 0.75, 0.0], [0.5, 0.5, 0.0]]
    """
    _refuse_empty_rows("prox.simplex", v)
    return leafwise("prox.simplex", _project, v, rows=True, scale=parameter)


def sparse_simplex(
    v: PyTree[ArrayLike], parameter: PyTree[ArrayLike], step_size: object = 1.0
) -> PyTree[Float[Array, "..."]]:
    """Return a projection onto {x >= 0, sum x = scale, at most k entries of x non-zero}, row by row.

    For weights of which only a few may be used. The k largest entries of a row are projected onto the simplex, the
    others are zero; the set is not convex, and among equal entries the first ones are kept.

    Shapes: v [..., n], n >= 1, any tree of these (a 0-d leaf is a row of one); scale is a scalar, an array that
        broadcasts to [...], or a tree of these that is a prefix of v.
    Args:
        v: tree of floating-point arrays; a row that holds NaN or +inf comes out as NaN.
        parameter: (k, scale): k >= 1 a Python int, of which more than n is no restriction; scale > 0.
        step_size: ignored.
    Returns: a tree like v.
    Raises: TypeError where a leaf of v is not real floating-point, scale not a real number, or k traced; ValueError
        where parameter is not a pair, k is no whole number of at least 1, a row is empty, the structure or shape of
        scale does not fit v, or it is a negative Python or NumPy number.
    At kinks: that of the simplex on the entries that are kept, 0 off them.
    Cost: a selection of the k largest, O(n log n) a row.
    Source: Kyrillidis, Becker, Cevher and Koch, 2013, "Sparse projections onto the simplex".

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.sparse_simplex(jnp.array([0.5, 1.0, 0.75, -1.0]), (2, 1.0)).tolist()
        [0.0, 0.625, 0.375, 0.0]
    """
    who = "prox.sparse_simplex"
    k, scale = pair(who, "(k, scale)", parameter)
    k = count(who, "k", k)
    _refuse_empty_rows(who, v)

    def project(x: Array, scale: Array) -> Array:
        if k >= x.shape[-1]:
            return _project(x, scale)
        order = jnp.argsort(jax.lax.stop_gradient(x), axis=-1, stable=True, descending=True)
        rank = jnp.argsort(order, axis=-1)
        return _project(jnp.where((rank < k) | jnp.isnan(x), x, -jnp.inf), scale)

    return leafwise(who, project, v, rows=True, scale=scale)


def box_section(
    v: PyTree[ArrayLike],
    parameter: PyTree[ArrayLike],
    step_size: object = 1.0,
) -> PyTree[Float[Array, "..."]]:
    """Return clip(v + tau w, lower, upper) with <w, x> = total: the projection onto a slice of a box, row by row.

    For budgets: the continuous quadratic knapsack, the dual of a support vector machine with bias, the simplex and its
    capped relatives. h is the indicator of the slice, so that the step size plays no part.

    Shapes: v [..., n], any tree of these (a 0-d leaf is a row of one); lower, upper and weights are scalars or arrays
        that broadcast to the leaf, total is a scalar or an array that broadcasts to [...]; or trees of these that are
        prefixes of v.
    Args:
        v: tree of floating-point arrays.
        parameter: (lower, upper, weights, total): lower <= upper, infinite bounds allowed; weights of any sign, of
            which a zero leaves its entry to its bounds alone.
        step_size: ignored.
    Returns: a tree like v; NaN in a row whose slice is empty (total out of reach by more than rounding).
    Raises: TypeError where a leaf of v is not real floating-point or a coefficient not a real number; ValueError where
        parameter has not four members or the structure or shape of one does not fit v.
    At kinks: entries that meet a bound exactly count as free unless lower = upper. Where no entry of non-zero weight is
        free (total at an extreme), the derivative in total is 0.
    Cost: one sort of the 2n breakpoints and log2(2n) sums over the row.
    Source: Brucker, 1984; Kiwiel, 2008, "Breakpoint searching algorithms for the continuous quadratic knapsack
        problem"; here by bisection in the sorted breakpoints, then exact on the free entries.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.box_section(jnp.array([0.5, 2.0, 0.0]), (0.0, 1.0, 1.0, 2.0)).tolist()
        [0.75, 1.0, 0.25]
    """
    who = "prox.box_section"
    if not (isinstance(parameter, tuple | list) and len(parameter) == 4):
        raise ValueError(
            f"{who} needs parameter = (lower, upper, weights, total); it is {describe(parameter)}; pass a tuple of "
            "four, each of them a number, an array or a tree prefix of v."
        )
    _refuse_empty_rows(who, v)
    names = ("lower", "upper", "weights", "total")
    entries, structure = flatten(who, v)
    columns = [spread(who, name, value, v) for name, value in zip(names, parameter, strict=True)]
    results = []
    for (path, leaf), *values in zip(entries, *columns, strict=True):
        dtype, shape = jnp.result_type(leaf), jnp.shape(leaf)
        x = jnp.atleast_1d(jnp.asarray(leaf, widest(dtype)))
        shapes = [shape, shape, shape, x.shape[:-1]]
        fitted = [
            fit(who, name + jax.tree_util.keystr(path), value, x.dtype, own, signed=True)
            for name, value, own in zip(names, values, shapes, strict=True)
        ]
        lower, upper, weights = (jnp.broadcast_to(side if side.ndim else side[None], x.shape) for side in fitted[:3])
        total = jnp.broadcast_to(fitted[3], x.shape[:-1])
        results.append(_cut(x, lower, upper, weights, total[..., None]).astype(dtype).reshape(shape))
    return jax.tree.unflatten(structure, results)


@functools.partial(jax.jit, inline=True)
def _cut(x: Array, lower: Array, upper: Array, w: Array, total: Array) -> Array:
    free, at_lower, at_upper, tau = jax.lax.stop_gradient(_pieces(*jax.lax.stop_gradient((x, lower, upper, w, total))))
    fixed = jnp.where(at_lower, lower, jnp.where(at_upper, upper, x))
    # On the right piece tau is a ratio, and plain autodiff of it is right; the first guess keeps its sums small.
    y = jnp.where(free, x + tau * w, fixed)
    square = jnp.sum(jnp.square(jnp.where(free, w, 0)), axis=-1, keepdims=True)
    rest = total - jnp.sum(w * y, axis=-1, keepdims=True)
    y = y + jnp.where(free, rest / jnp.where(square == 0, 1, square) * w, 0)
    held, low, high, weights, goal = jax.lax.stop_gradient((y, lower, upper, w, total))
    y = y + jnp.clip(held, low, high) - held  # rounding may carry a free entry over its bound
    miss = jnp.abs(jnp.sum(weights * held, axis=-1, keepdims=True) - goal)
    size = jnp.sum(jnp.abs(weights * held), axis=-1, keepdims=True) + jnp.abs(goal)
    reached = miss <= 100 * jnp.finfo(x.dtype).eps * x.shape[-1] ** 0.5 * size
    broken = jnp.any(jnp.isnan(x) | jnp.isnan(lower) | jnp.isnan(upper), axis=-1, keepdims=True)
    return nan_unless(reached & ~broken, y, x, lower, upper, w, total)


def _pieces(x: Array, lower: Array, upper: Array, w: Array, total: Array) -> tuple[Array, Array, Array, Array]:
    """Which entries are free, at their lower and at their upper bound, and a tau on the piece where <w, x> = total."""
    idle, slope = w == 0, jnp.where(w == 0, 1, w)
    first, last = jnp.where(w > 0, lower, upper), jnp.where(w > 0, upper, lower)  # where tau begins, and ends
    start, end = (first - x) / slope, (last - x) / slope
    breaks = jnp.sort(jnp.where(jnp.concatenate([idle, idle], -1), jnp.inf, jnp.concatenate([start, end], -1)), -1)

    def reached(tau: Array) -> Array:
        y = jnp.where(tau <= start, first, jnp.where(tau >= end, last, x + tau * w))
        return jnp.sum(jnp.where(idle, 0, w * y), axis=-1, keepdims=True)

    def halve(_: Array, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        below, above = bracket  # the sum at break `below` is at most the total; -1: at none
        middle = (below + above) // 2
        low = reached(jnp.take_along_axis(breaks, middle, axis=-1)) <= total
        return jnp.where(low, middle, below), jnp.where(low, above, middle)

    size = breaks.shape[-1]
    bracket = jnp.full_like(total, -1, int), jnp.full_like(total, size, int)
    below, above = jax.lax.fori_loop(0, size.bit_length(), halve, bracket)
    left = jnp.where(below < 0, -jnp.inf, jnp.take_along_axis(breaks, jnp.maximum(below, 0), axis=-1))
    right = jnp.where(above >= size, jnp.inf, jnp.take_along_axis(breaks, jnp.minimum(above, size - 1), axis=-1))
    movable = ~idle & (lower < upper)
    free = movable & (start <= left) & (end >= right)
    done = end <= left
    at_lower = ~free & jnp.where(idle, x < lower, done == (w < 0))
    at_upper = ~free & ~at_lower & (~idle | (x > upper))
    tau = jnp.where(jnp.isfinite(left), left, jnp.where(jnp.isfinite(right), right, 0))
    return free, at_lower, at_upper, tau


def _refuse_empty_rows(who: str, v: PyTree) -> None:
    for path, leaf in flatten(who, v)[0]:
        if jnp.shape(leaf)[-1:] == (0,):
            raise ValueError(
                f"{who} needs rows of at least one entry; v{jax.tree_util.keystr(path)} has shape "
                f"{jnp.shape(leaf)}; the empty row has no projection: leave the leaf out."
            )


def _project(x: Array, scale: Array) -> Array:
    x = x - jnp.max(jax.lax.stop_gradient(x), axis=-1, keepdims=True)  # changes no answer, and keeps small sums exact
    tau, support = simplex_threshold(x, scale)
    return floor(jnp.where(support, x - tau, 0))


def simplex_threshold(x: Array, scale: Array) -> tuple[Array, Array]:
    """Return tau [..., 1] with sum max(x - tau, 0) = scale along the last axis, and the support, where x >= tau.

    tau is the greatest of (sum of the k largest - scale) / k over k. Its derivative is that of a mean over the support,
    but its value is not taken from there: compiled twice, the support of an entry that ties with tau may differ between
    sum and count. Such an entry is in the support. x should be at most 0 or so, for small sums to be exact.
    """
    sums = jnp.cumsum(jnp.sort(jax.lax.stop_gradient(x), axis=-1, descending=True), axis=-1)
    counts = 1 + jax.lax.broadcasted_iota(x.dtype, x.shape, x.ndim - 1)
    bound = jnp.max((sums - jax.lax.stop_gradient(scale)) / counts, axis=-1, keepdims=True)
    support = ~(x < bound)  # and not x >= bound: a row of NaN is its own support, and comes out
    moved = jnp.sum(jnp.where(support, x - jax.lax.stop_gradient(x), 0), axis=-1, keepdims=True)
    change = (moved - (scale - jax.lax.stop_gradient(scale))) / jnp.sum(support, axis=-1, keepdims=True, dtype=x.dtype)
    return bound + change, support


def floor(y: Array) -> Array:
    """Return y without what a tie rounds to, such as -1e-17, and with its derivative."""
    return y + jax.lax.stop_gradient(jnp.maximum(-y, 0))
