"""Total variation in one dimension, exactly, and in two, isotropic, to rounding."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from .._moving import moving
from .._tree import magnitude
from .._types import Inexact, PyTree
from ..iterations import Iteration
from ..linear import cg, differentiable_solve
from ..operators import Operator
from ..solvers import until_converged
from ._leafwise import fit, flatten, leafwise, nan_unless, norm, spread, widened, widest


def total_variation_1d(
    v: PyTree[ArrayLike], parameter: PyTree[ArrayLike], step_size: PyTree[ArrayLike] = 1.0
) -> PyTree[Inexact[Array, "..."]]:
    """Return the minimiser of t sum |x_(i+1) - x_i| + |x - v|^2 / 2, t = step_size * lam, row by row.

    For piecewise constant signals, also known as the fused lasso. The result is constant on segments, each the mean of
    v there, shifted by t / length for each end at which x goes up or down.

    Shapes: v [..., n], any tree of these (a 0-d leaf is a row of one); lam and step_size are scalars, arrays that
        broadcast to [...] (one for each row), or trees of these that are prefixes of v.
    Args:
        v: tree of real or complex floating-point arrays; a row that holds NaN comes out as NaN.
        parameter: lam >= 0; inf gives the mean.
        step_size: >= 0.
    Returns: a tree like v.
    Raises: TypeError where a leaf of v is not floating-point or a coefficient not a real number; ValueError where
        the structure or shape of a coefficient does not fit v, or it is a negative Python or NumPy number.
    At kinks: the derivative is that of the formula on the segments found; neighbours that are equal in the result, to
        the bit, share one. At t = 0 it is I in v.
    Cost: O(n) moves of constant cost in practice, one after the other (O(n^2) at worst); rows one after the other too,
        unless batched by `vmap`, where each move costs a pass over the rows.
    Source: Condat, 2013, "A direct algorithm for 1-D total variation denoising".

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.total_variation_1d(jnp.array([0.0, 1.0, 5.0, 6.0]), 1.0).tolist()
        [1.0, 1.0, 5.0, 5.0]
    """

    coefficients = {"lam": parameter, "step_size": step_size}
    return leafwise("prox.total_variation_1d", _signals, v, rows=True, or_complex=True, **coefficients)


def total_variation_2d(
    v: PyTree[ArrayLike], parameter: PyTree[ArrayLike], step_size: PyTree[ArrayLike] = 1.0
) -> PyTree[Inexact[Array, "..."]]:
    """Return the minimiser of t sum_ij |(x_(i+1)j - x_ij, x_i(j+1) - x_ij)| + |x - v|^2 / 2, t = step_size * lam.

    For images with sharp edges (Rudin, Osher and Fatemi), image by image, isotropic; differences across the border
    count as zero. The minimiser is v - D'p with p the solution of the dual problem.

    Shapes: v [..., height, width], any tree of these; lam and step_size are scalars, arrays that broadcast to [...]
        (one for each image), or trees of these that are prefixes of v.
    Args:
        v: tree of real or complex floating-point arrays; an image that holds NaN comes out as NaN.
        parameter: lam >= 0.
        step_size: >= 0.
    Returns: a tree like v, right to about 1e-10 of its range in float64 and 1e-5 in float32; NaN in an image for which
        the method has not come near that (1e-6 and 1e-3) in 20 000 steps.
    Raises: TypeError where a leaf of v is not floating-point or a coefficient not a real number; ValueError where
        a leaf has fewer than two axes, the structure or shape of a coefficient does not fit v, or it is a negative
        Python or NumPy number.
    At kinks: the derivative is implicit, with a pixel whose dual variable has just reached length t counted as flat
        (its differences stay zero). At t = 0 it is I in v.
    Cost: some hundreds of accelerated steps of a few passes each, then Newton steps of some hundred products; each
        derivative direction is one system, solved by conjugate gradients.
    Source: Chambolle, 2004 (the dual); Beck and Teboulle, 2009 (its acceleration), restarted as O'Donoghue and Candes,
        2015; the last digits by a semismooth Newton method on the dual.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> v = jnp.array([[0.0, 0.0], [0.0, 1.0]])
        >>> [[round(x, 3) for x in row] for row in prox.total_variation_2d(v, 0.1).tolist()]
        [[0.067, 0.067], [0.067, 0.8]]
    """
    who = "prox.total_variation_2d"
    entries, structure = flatten(who, v, or_complex=True)
    columns = [spread(who, name, value, v) for name, value in (("lam", parameter), ("step_size", step_size))]
    results = []
    for (path, leaf), *values in zip(entries, *columns, strict=True):
        dtype, shape, at = jnp.result_type(leaf), jnp.shape(leaf), jax.tree_util.keystr(path)
        if len(shape) < 2:
            raise ValueError(
                f"{who} needs images on the last two axes; v{at} has shape {shape}; for signals use total_variation_1d."
            )
        real = widest(jnp.finfo(dtype).dtype)
        names = ("lam", "step_size")
        lam, step = (fit(who, name + at, value, real, shape[:-2]) for name, value in zip(names, values, strict=True))
        t = jnp.broadcast_to(step * lam, shape[:-2]).reshape(-1)
        y = _images(widened(leaf, real).reshape(-1, *shape[-2:]), t)
        results.append(y.reshape(shape).astype(dtype))
    return jax.tree.unflatten(structure, results)


# ---- one signal ----------------------------------------------------------------------------------------------------


def _fuse(v: Array, t: Array, level: Array) -> Array:
    """The solution, with its derivative, given its values without one."""
    n = v.size
    rise = jnp.sign(jnp.diff(level))
    pull = jnp.diff(rise, prepend=jnp.zeros(1, v.dtype), append=jnp.zeros(1, v.dtype))
    shifted = v - level + jnp.where(pull == 0, 0, t) * pull  # deviations from the level: long sums of these are exact
    apart = (rise != 0) | (t == 0)  # at t = 0 it is the identity, with the derivative of one
    segment = jnp.cumsum(jnp.concatenate([jnp.zeros(1, int), apart.astype(int)]))
    sums = jax.ops.segment_sum(shifted, segment, n, indices_are_sorted=True)
    sizes = jax.ops.segment_sum(jnp.ones_like(v), segment, n, indices_are_sorted=True)
    y = level + (sums / jnp.maximum(sizes, 1))[segment]
    return jnp.where(jnp.any(jnp.isnan(v)) | jnp.isnan(t), jnp.nan, y)


@functools.partial(jax.jit, inline=True)
def _signals(x: Array, lam: Array, step: Array) -> Array:
    t = jnp.broadcast_to(step * lam, (*x.shape[:-1], 1)).reshape(-1)
    flat = x.reshape(-1, x.shape[-1])
    if jnp.iscomplexobj(x):  # the two parts of an entry jump together: an image of one row
        return _images(flat[:, None], t).reshape(x.shape)
    # One row after the other: a batched write at a place of its own in each row would copy all of them.
    held = jax.lax.stop_gradient((flat, t))
    levels = jax.lax.stop_gradient(jax.lax.map(lambda row: _taut_string(*row), held))
    return jax.vmap(_fuse)(flat, t, levels).reshape(x.shape)


class _Walk(NamedTuple):
    """The segment from `start` on, tried up to k: its least and greatest values, how far the string is from each bound,
    and where it last touched them."""

    levels: Array  # the value of a finished segment, at its first entry; only written, so that it is changed in place
    start: Array
    k: Array
    touched_low: Array
    touched_high: Array
    low: Array
    high: Array
    over_low: Array
    over_high: Array


def _taut_string(v: Array, t: Array) -> Array:
    n = v.size
    center = jnp.mean(v)
    v = v - center  # keeps the sums small
    t = jnp.minimum(t, jnp.sum(jnp.abs(v)) + 1)  # where nothing is left to flatten

    def move(walk: _Walk) -> _Walk:
        start, k, touched_low, touched_high = walk.start, walk.k, walk.touched_low, walk.touched_high
        last = k >= n - 1
        ahead = v[jnp.minimum(k + 1, n - 1)]
        over_low = jnp.where(last, walk.over_low, walk.over_low + ahead - walk.low)
        over_high = jnp.where(last, walk.over_high, walk.over_high + ahead - walk.high)
        down = over_low < jnp.where(last, 0, -t)
        up = ~down & (over_high > jnp.where(last, 0, t))
        jump, end = down | up, last & ~down & ~up
        # A jump ends the segment where the string last touched the bound, an end the last one at its mean.
        length = (k - start + 1).astype(v.dtype)
        level = jnp.where(down, walk.low, jnp.where(up, walk.high, walk.low + over_low / length))
        place = jnp.where(jump | end, start, n)
        levels = jax.lax.dynamic_update_slice(walk.levels, level[None], (place,))
        fresh = jnp.where(down, touched_low, touched_high) + 1
        y = v[jnp.minimum(fresh, n - 1)]
        # Else the segment grows, and a bound that the string would leave is drawn to it.
        grown = k + 1
        size = (grown - start + 1).astype(v.dtype)
        lifts, sinks = over_low >= t, over_high <= -t
        return _Walk(
            levels,
            jnp.where(jump, fresh, jnp.where(end, n, start)),
            jnp.where(jump, fresh, grown),
            jnp.where(jump & ~(last & up), fresh, jnp.where(~jump & lifts, grown, touched_low)),
            jnp.where(jump & ~(last & down), fresh, jnp.where(~jump & sinks, grown, touched_high)),
            jnp.where(
                jump,
                jnp.where(down, y, jnp.where(last, walk.low, y - 2 * t)),
                jnp.where(lifts, walk.low + (over_low - t) / size, walk.low),
            ),
            jnp.where(
                jump,
                jnp.where(up, y, jnp.where(last, walk.high, y + 2 * t)),
                jnp.where(sinks, walk.high + (over_high + t) / size, walk.high),
            ),
            jnp.where(jump, jnp.where(last & up, y - t - walk.low, t), jnp.where(lifts, t, over_low)),
            jnp.where(jump, jnp.where(last & down, y + t - walk.high, -t), jnp.where(sinks, -t, over_high)),
        )

    zero = jnp.zeros((), int)
    first = _Walk(jnp.full(n + 1, jnp.nan, v.dtype), zero, zero, zero, zero, v[0] - t, v[0] + t, t, -t)
    levels = jax.lax.while_loop(lambda walk: walk.start < n, move, first).levels[:n]
    begins = jnp.where(jnp.isnan(levels), 0, jnp.arange(n))
    return center + levels[jax.lax.cummax(begins)]


# ---- images ------------------------------------------------------------------------------------------------------

_STEP = 1 / 8  # 1 / |D|^2
_MAX_STEPS = 20_000
_NEWTON_STEPS = 8


def _gradient(x: Array) -> Array:
    """D x [2, channels, height, width]: forward differences of x, without the 2, zero across the border."""
    down, right = jnp.diff(x, axis=1), jnp.diff(x, axis=2)
    return jnp.stack([jnp.pad(down, ((0, 0), (0, 1), (0, 0))), jnp.pad(right, ((0, 0), (0, 0), (0, 1)))])


def _transposed(p: Array) -> Array:
    down, right = p[0, :, :-1], p[1, :, :, :-1]
    pad = jnp.pad
    return (
        pad(down, ((0, 0), (1, 0), (0, 0)))
        - pad(down, ((0, 0), (0, 1), (0, 0)))
        + pad(right, ((0, 0), (0, 0), (1, 0)))
        - pad(right, ((0, 0), (0, 0), (0, 1)))
    )


def _lengths(q: Array) -> Array:
    return norm([q.reshape(-1, *q.shape[2:])], axis=0)[None]


def _onto_discs(q: Array, t: Array) -> Array:
    length = _lengths(q)
    outside = length > t
    return q * jnp.where(outside, t / jnp.where(outside, length, 1), 1)


def _ahead(p: Array, v: Array) -> Array:
    """The forward point of the dual's projected gradient step."""
    return p + _STEP * _gradient(v - _transposed(p))


@functools.partial(jax.jit, inline=True)
def _images(v: Array, t: Array) -> Array:
    """Images v [images, height, width] with a threshold each; the parts of complex ones are two channels."""
    if not jnp.iscomplexobj(v):
        return jax.vmap(_denoise)(v[:, None], t)[:, 0]
    y = jax.vmap(_denoise)(jnp.stack([v.real, v.imag], axis=1), t)
    return jax.lax.complex(y[:, 0], y[:, 1])


def _denoise(v: Array, t: Array) -> Array:
    """One image v [channels, height, width], whose channels jump together."""
    unit = magnitude(v)
    v, t = v / unit, t / unit
    center = jnp.mean(jax.lax.stop_gradient(v), axis=(1, 2), keepdims=True)
    size = magnitude(v - center)
    x, t = (v - center) / size, t / size
    p, sound = _dual(*jax.lax.stop_gradient((x, t)))
    p = moving(p, (x, t), _dual_tangent)
    return unit * nan_unless(sound, center + size * (x - _transposed(p)), v, t)


def _dual(v: Array, t: Array) -> tuple[Array, Array]:
    """The dual variable, and whether it is near enough."""

    def displacement(p: Array, theta: tuple[Array, Array]) -> Array:
        return p - _onto_discs(_ahead(p, theta[0]), theta[1])

    def init(p: Array, theta: Any) -> Any:
        return p, jnp.ones((), p.dtype)

    def step(p: Array, state: Any, theta: Any, k: Array) -> Any:
        y, weight = state  # y: the extrapolated point
        new = _onto_discs(_ahead(y, theta[0]), theta[1])
        grown = (1 + jnp.sqrt(1 + 4 * weight**2)) / 2
        turned = jnp.sum((y - new) * (new - p)) > 0  # momentum points uphill: start it anew
        y = jnp.where(turned, new, new + (weight - 1) / grown * (new - p))
        return new, (y, jnp.where(turned, 1, grown))

    accelerated = Iteration(init, step, Operator(lambda p, theta: p - displacement(p, theta), displacement), "dual")
    rough = 1e-5 if v.dtype.itemsize == 8 else 1e-6
    theta = (v, t)
    p = until_converged(accelerated, tol=rough, max_steps=_MAX_STEPS)(jnp.zeros((2, *v.shape), v.dtype), theta).x

    def newton(_: Any, p: Array) -> Array:
        q, move = _ahead(p, v), -displacement(p, theta)
        ahead = p + _newton_move(q, t, move)
        ahead = _onto_discs(_ahead(ahead, v), t)
        better = jnp.linalg.norm(displacement(ahead, theta)) < jnp.linalg.norm(move)
        return jnp.where(better, ahead, p)

    p = jax.lax.fori_loop(0, _NEWTON_STEPS, newton, p)
    limit = 1e-6 if v.dtype.itemsize == 8 else 1e-3
    return p, jnp.linalg.norm(displacement(p, theta)) <= limit * v.size**0.5


def _frame(q: Array, t: Array) -> tuple[Array, Array, Array]:
    """Where the dual variable is on its circle, the direction there, and the square root of t / |q|, 1 elsewhere."""
    length = _lengths(q)
    bent = length > t
    return (
        bent,
        jnp.where(bent, q / jnp.where(bent, length, 1), 0),
        jnp.where(bent, jnp.sqrt(t / jnp.where(bent, length, 1)), 1),
    )


def _solve(q: Array, t: Array, tangential: Array, radial: Array, tol: float | None = None) -> Array:
    """dp with dp = J (dp - step D D' dp) + right side, J the derivative of the projection onto the discs at q.

    With n the direction of q, P = I - n n' and a^2 = t / |q| where q is outside, the radial part of dp is that of the
    right side, and the rest P a u solves a symmetric, positive semi-definite, consistent system; `tangential` is its
    right side.
    """
    bent, n, root = _frame(q, t)
    ridge = 100 * jnp.finfo(q.dtype).eps  # holds the null space, which D' does not see, against rounding

    def across(w: Array) -> Array:
        return w - n * jnp.sum(n * w, axis=(0, 1), keepdims=True)

    def curl(w: Array) -> Array:
        return _STEP * _gradient(_transposed(w))

    def product(u: Array) -> Array:
        stiff = jnp.where(bent, 1 - root**2, 0) + ridge
        return stiff * u + root * across(curl(across(root * u)))

    b = across(tangential) - root * across(curl(radial))

    def solve(matvec: Any, b: Array) -> Array:
        unit = magnitude(b)
        b = b / unit
        u = cg(tol=tol, max_steps=2000)(matvec, b)[0]
        near = norm([matvec(u) - b]) <= 1e-2 * norm([b])
        return unit * jnp.where(near, u, jnp.nan)

    u = differentiable_solve(product, b, solve, symmetric=True)
    return across(root * u) + radial


def _newton_move(q: Array, t: Array, move: Array) -> Array:
    _, n, root = _frame(q, t)
    radial = n * jnp.sum(n * move, axis=(0, 1), keepdims=True)
    return _solve(q, t, (move - radial) / jnp.where(root > 0, root, 1), radial, tol=1e-5)


def _dual_tangent(p: Array, operands: tuple[Array, Array], tangents: tuple[Array, Array]) -> Array:
    (v, t), (moved_v, moved_t) = operands, tangents
    q, still = _ahead(p, v), t == 0  # at t = 0 p is t times the direction of D v, to first order
    ahead = _frame(q, t)[1] * moved_t
    t, moved_v, moved_t = (jnp.where(still, a, b) for a, b in ((1, t), (0, moved_v), (0, moved_t)))
    _, n, root = _frame(q, t)
    return jnp.where(still, ahead, _solve(q, t, root * _STEP * _gradient(moved_v), n * moved_t))
