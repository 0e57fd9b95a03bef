"""Norms of rows that sort their entries, and of matrices."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from .._checks import count
from .._types import Float, Inexact, PyTree
from ._leafwise import fit, flatten, leafwise, pair, spread, widened, widest
from ._pav import isotonic_regression
from ._spectral import shrink_singular_values


def linf(
    v: PyTree[ArrayLike], parameter: PyTree[ArrayLike], step_size: PyTree[ArrayLike] = 1.0
) -> PyTree[Float[Array, "..."]]:
    """Return sign(v) min(|v|, tau) with sum max(|v| - tau, 0) = t = step_size * lam, row by row: h = lam max |x_i|.

    For minimax fits and the dual of an l1 constraint: v minus its projection onto the l1 ball of radius t.

    Shapes: v [..., n], any tree of these (a 0-d leaf is a row of one); lam and step_size are scalars, arrays that
        broadcast to [...], or trees of these that are prefixes of v.
    Args:
        v: tree of floating-point arrays; a row that holds a NaN comes out as NaN.
        parameter: lam >= 0.
        step_size: >= 0.
    Returns: a tree like v.
    Raises: TypeError where a leaf of v is not real floating-point or a coefficient not a real number; ValueError where
        the structure or shape of a coefficient does not fit v, or it is a negative Python or NumPy number.
    At kinks: with S = {i: |v_i| > tau}, or the first of the largest where that is empty, the derivative of sign(v_i)
        y_i is that of the mean (sum of |v| over S - t) / |S| on S and 1 in |v_i| off it: the identity at t = 0. Where
        the sum of |v| is t, it is that of the side that is not 0.
    Cost: one sort, O(n log n) a row.
    Source: Parikh and Boyd, 2014, section 6.5.2, by Moreau's identity.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.linf(jnp.array([4.0, -3.0, 0.5]), 2.0).tolist()
        [2.5, -2.5, 0.5]
    """
    return leafwise("prox.linf", _cut_off, v, rows=True, lam=parameter, step_size=step_size)


def k_largest(v: PyTree[ArrayLike], parameter: Any, step_size: PyTree[ArrayLike] = 1.0) -> PyTree[Float[Array, "..."]]:
    """Return v less sign(v) clip(|v| - mu, 0, t), t = step_size * lam: h = lam (sum of the k largest |x_i| of a row).

    Between the largest entry (k = 1) and the l1 norm (k = n); the penalty of trimmed and of conditional-value-at-risk
    fits. mu >= 0 is the level at which the clipped parts sum to k t, or 0 where they do not reach it.

    Shapes: v [..., n], any tree of these (a 0-d leaf is a row of one); lam and step_size are scalars, arrays that
        broadcast to [...], or trees of these that are prefixes of v.
    Args:
        v: tree of floating-point arrays; a row that holds a NaN comes out as NaN.
        parameter: (lam, k): lam >= 0; k >= 1 a Python int.
        step_size: >= 0.
    Returns: a tree like v.
    Raises: TypeError where a leaf of v is not real floating-point, a coefficient not a real number, or k traced;
        ValueError where parameter is not a pair, k is no whole number of at least 1, the structure or shape of a
        coefficient does not fit v, or it is a negative Python or NumPy number.
    At kinks: an entry with |v_i| = mu counts as smaller, one with |v_i| = mu + t as larger, with derivative 1 in v.
    Cost: one sort of 2n breakpoints and log2(2n) sums over the row.
    Source: the dual norm's ball is {|y_i| <= lam, |y|_1 <= k lam}; Moreau's identity.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.k_largest(jnp.array([4.0, -3.0, 2.5, 0.5]), (1.0, 2)).tolist()
        [3.0, -2.25, 2.25, 0.5]
    """
    lam, k = pair("prox.k_largest", "(lam, k)", parameter)
    k = count("prox.k_largest", "k", k)

    def solve(x: Array, lam: Array, step: Array) -> Array:
        return _lower_largest(x, step * lam, k)

    return leafwise("prox.k_largest", solve, v, rows=True, lam=lam, step_size=step_size)


def slope(
    v: PyTree[ArrayLike], parameter: PyTree[ArrayLike], step_size: PyTree[ArrayLike] = 1.0
) -> PyTree[Float[Array, "..."]]:
    """Return the prox of the sorted l1 norm (SLOPE, OWL): h = sum of w_i times the i-th largest |x| of a row.

    Sparse x whose correlated entries share one value; the weights, sorted downwards, are largest for the largest
    entries. It is the isotonic regression of sorted |v| - step_size * w, cut at 0, in the order and with the signs of
    v. Equal weights give the l1 norm, one non-zero weight the largest entry, two levels of weights OSCAR-like sums.

    Shapes: v [..., n], any tree of these (a 0-d leaf is a row of one); the weights are a scalar or an array that
        broadcasts to [..., n], step_size a scalar or one that broadcasts to [...], or trees of these, prefixes of v.
    Args:
        v: tree of floating-point arrays; a row that holds a NaN comes out as NaN.
        parameter: weights >= 0, in any order: they are sorted.
        step_size: >= 0.
    Returns: a tree like v.
    Raises: TypeError where a leaf of v is not real floating-point or a coefficient not a real number; ValueError where
        the structure or shape of a coefficient does not fit v, or it is a negative Python or NumPy number.
    At kinks: entries that meet without being averaged keep derivatives of their own; where a value reaches 0 the
        derivative is that of the shrinking side. At ties the first entries have the larger weights.
    Cost: two sorts and an isotonic regression, O(n log n) work a row.
    Source: Bogdan, van den Berg, Sabatti, Su and Candes, 2015; Zeng and Figueiredo, 2014.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.slope(jnp.array([1.0, -4.0, 3.5]), jnp.array([2.0, 1.0, 0.5])).tolist()
        [0.5, -2.25, 2.25]
    """
    who = "prox.slope"
    entries, structure = flatten(who, v)
    weights, steps = spread(who, "weights", parameter, v), spread(who, "step_size", step_size, v)
    results = []
    for (path, leaf), w, step in zip(entries, weights, steps, strict=True):
        dtype, shape = jnp.result_type(leaf), jnp.shape(leaf)
        x = jnp.atleast_1d(jnp.asarray(leaf, widest(dtype)))
        w = fit(who, "weights" + jax.tree_util.keystr(path), w, x.dtype, shape)
        step = fit(who, "step_size" + jax.tree_util.keystr(path), step, x.dtype, x.shape[:-1])
        w = jnp.broadcast_to(w if w.ndim else w[None], x.shape[-1:] if w.ndim < 2 else (*w.shape[:-1], x.shape[-1]))
        w = jnp.broadcast_to(w.reshape((1,) * (x.ndim - w.ndim) + w.shape), x.shape)
        y = _sorted_shrink(x, w * (step[..., None] if step.ndim else step)) if x.size else x
        results.append(y.astype(dtype).reshape(shape))
    return jax.tree.unflatten(structure, results)


def nuclear(
    v: PyTree[ArrayLike], parameter: PyTree[ArrayLike], step_size: PyTree[ArrayLike] = 1.0
) -> PyTree[Inexact[Array, "..."]]:
    """Return U diag(max(s - t, 0)) V' for v = U diag(s) V', t = step_size * lam: h = lam (sum of singular values).

    For matrices of low rank: completion, robust principal components, multi-task weights. Matrices are the last two
    axes.

    Shapes: v [..., m, n], any tree of these (a 1-d leaf is a matrix of one row, a 0-d leaf a matrix of one entry); lam
        and step_size are scalars, arrays that broadcast to [...] (one for each matrix), or trees of these that are
        prefixes of v.
    Args:
        v: tree of real or complex floating-point arrays; a matrix that holds a NaN comes out as NaN.
        parameter: lam >= 0.
        step_size: >= 0.
    Returns: a tree like v.
    Raises: TypeError where a leaf of v is not floating-point or a coefficient not a real number; ValueError where
        the structure or shape of a coefficient does not fit v, or it is a negative Python or NumPy number;
        NotImplementedError at third derivatives in v: it can be differentiated at most twice.
    At kinks: repeated and zero singular values are none, first and second derivatives are exact there; where s = t the
        derivative is that of the shrinking side, the identity at t = 0.
    Cost: one singular value decomposition, and for a derivative six products of that size; a second derivative
        decomposes with all m vectors and takes (m + n)^3 numbers.
    Source: Cai, Candes and Shen, 2010; the derivative by divided differences, Lewis, 1996.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.nuclear(jnp.array([[3.0, 0.0], [0.0, -1.0], [0.0, 0.0]]), 2.0).round(5).tolist()
        [[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    """
    who = "prox.nuclear"
    entries, structure = flatten(who, v, or_complex=True)
    lams, steps = spread(who, "lam", parameter, v), spread(who, "step_size", step_size, v)
    results = []
    for (path, leaf), lam, step in zip(entries, lams, steps, strict=True):
        dtype, shape = jnp.result_type(leaf), jnp.shape(leaf)
        x = jnp.atleast_2d(widened(leaf, widest(jnp.finfo(dtype).dtype)))
        lam = fit(who, "lam" + jax.tree_util.keystr(path), lam, jnp.finfo(x.dtype).dtype, x.shape[:-2])
        step = fit(who, "step_size" + jax.tree_util.keystr(path), step, jnp.finfo(x.dtype).dtype, x.shape[:-2])
        threshold = jnp.broadcast_to(lam * step, x.shape[:-2])[..., None, None]
        m, n = x.shape[-2:]
        if jnp.iscomplexobj(x):  # the real matrix of the same map: each singular value comes twice
            whole = jnp.block([[x.real, -x.imag], [x.imag, x.real]])
            whole = shrink_singular_values(whole, threshold)
            y = jax.lax.complex(whole[..., :m, :n], whole[..., m:, :n])
        else:
            y = shrink_singular_values(x, threshold)
        results.append(y.astype(dtype).reshape(shape))
    return jax.tree.unflatten(structure, results)


def _sign(x: Array) -> Array:
    return jnp.where(x < 0, -1, jnp.ones_like(x))  # with |x| = sign(x) x the derivative at 0 is right where t = 0


def _cut_off(x: Array, lam: Array, step: Array) -> Array:
    t, sign = step * lam, _sign(x)
    size = sign * x
    held, held_t = jax.lax.stop_gradient((size, t))
    sums = jnp.cumsum(jnp.sort(held, axis=-1, descending=True), axis=-1)
    counts = 1 + jax.lax.broadcasted_iota(x.dtype, x.shape, x.ndim - 1)
    bound = jnp.max((sums - held_t) / counts, axis=-1, keepdims=True)
    first = jax.lax.broadcasted_iota(int, x.shape, x.ndim - 1) == jnp.argmax(held, axis=-1, keepdims=True)
    above = (held > bound) | first
    mean = (jnp.sum(jnp.where(above, size, 0), axis=-1, keepdims=True) - t) / jnp.sum(
        above, axis=-1, keepdims=True, dtype=x.dtype
    )
    y = jnp.where(above | jnp.isnan(bound), sign * mean, x)
    return jnp.where(jnp.sum(held, axis=-1, keepdims=True) < held_t, 0, y)


@functools.partial(jax.jit, static_argnums=2, inline=True)
def _lower_largest(x: Array, t: Array, k: int) -> Array:
    sign = _sign(x)
    size = sign * x
    held, held_t = jax.lax.stop_gradient((size, t))
    goal = k * held_t
    breaks = jnp.sort(jnp.concatenate([held, held - held_t], axis=-1), axis=-1)

    def clipped(mu: Array) -> Array:
        return jnp.sum(jnp.clip(held - mu, 0, held_t), axis=-1, keepdims=True)

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        below, above = ends  # at the break `below` the parts sum to the goal at least
        middle = (below + above) // 2
        enough = clipped(jnp.take_along_axis(breaks, middle, axis=-1)) >= goal
        return jnp.where(enough, middle, below), jnp.where(enough, above, middle)

    last = breaks.shape[-1] - 1
    start = jnp.zeros((*x.shape[:-1], 1), int)
    _, above = jax.lax.fori_loop(0, last.bit_length(), halve, (start, start + last))
    right = jnp.take_along_axis(breaks, above, axis=-1)
    reached = clipped(jnp.zeros_like(right)) > goal
    high = jnp.where(reached, right, 0)
    lowered = held - held_t >= high
    # Not by a comparison of held - held_t with low: compiled another way than the break it may fall between the two.
    level = ~lowered & jnp.where(reached, held >= high, held > 0)
    total = jnp.sum(jnp.where(level, size, 0) + t * lowered.astype(x.dtype), axis=-1, keepdims=True) - k * t
    mu = jnp.where(reached, total / jnp.maximum(jnp.sum(level, axis=-1, keepdims=True, dtype=x.dtype), 1), 0)
    y = sign * jnp.where(lowered, size - t, jnp.where(level, mu, size))
    return jnp.where(jnp.any(jnp.isnan(held + held_t), axis=-1, keepdims=True), jnp.nan, y)


def _sorted_shrink(x: Array, w: Array) -> Array:
    sign = _sign(x)
    size = sign * x
    order = jnp.argsort(jax.lax.stop_gradient(size), axis=-1, stable=True, descending=True)
    back = jnp.argsort(order, axis=-1)
    fitted = -isotonic_regression(jnp.sort(w, axis=-1, descending=True) - jnp.take_along_axis(size, order, axis=-1))
    return sign * jnp.take_along_axis(jnp.where(fitted < 0, 0, fitted), back, axis=-1)
