"""Projections onto cones."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from .._moving import moving
from .._types import Float, PyTree
from ._leafwise import flatten, leafwise, length_and_direction
from ._spectral import positive_part


def second_order_cone(
    v: PyTree[ArrayLike], parameter: object = None, step_size: object = 1.0
) -> PyTree[Float[Array, "..."]]:
    """Return the projection of each row (t, x) onto {(t, x): |x| <= t}: (t + |x|) / 2 (1, x / |x|) where |t| <= |x|.

    For norm constraints with a bound that is itself a variable, robust and stochastic programs. The first entry of a
    row is t; a row is kept where |x| <= t and becomes zero where |x| <= -t. h is the indicator of the cone, so that the
    step size plays no part.

    Shapes: v [..., n], n >= 1, any tree of these (a 0-d leaf is a row of one, t alone).
    Args:
        v: tree of floating-point arrays.
        parameter: ignored.
        step_size: ignored.
    Returns: a tree like v.
    Raises: TypeError where a leaf of v is not real floating-point.
    At kinks: where |x| = |t| > 0 the derivative is that of the formula above; at v = 0 it is I / 2.
    Cost: three passes.
    Source: Parikh and Boyd, 2014, section 6.3.2.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.second_order_cone(jnp.array([0.0, 3.0, 4.0])).tolist()
        [2.5, 1.5, 2.0]
    """

    def project(v: Array) -> Array:
        t, x = v[..., :1], v[..., 1:]
        length, (direction,) = length_and_direction([x], axis=-1)
        kept, gone = length < t, length < -t
        edge = jnp.concatenate([t / 2 + length / 2, x / 2 + (t / 2) * direction], axis=-1)
        return jnp.where(kept, v, jnp.where(gone, 0, edge))

    return leafwise("prox.second_order_cone", project, v, rows=True)


def psd_cone(v: PyTree[ArrayLike], parameter: object = None, step_size: object = 1.0) -> PyTree[Float[Array, "..."]]:
    """Return Q diag(max(w, 0)) Q' for (v + v') / 2 = Q diag(w) Q': the projection onto positive semi-definite matrices.

    For covariances, kernels and semi-definite relaxations, matrix by matrix; the nearest symmetric one is taken first.
    h is the indicator of the cone, so that the step size plays no part.

    Shapes: v [..., n, n], any tree of these.
    Args:
        v: tree of floating-point arrays.
        parameter: ignored.
        step_size: ignored.
    Returns: a tree like v, symmetric.
    Raises: TypeError where a leaf of v is not real floating-point; ValueError where a leaf has no square matrices on
        its last two axes; NotImplementedError at third derivatives: it can be differentiated at most twice.
    At kinks: the derivative is right at repeated eigenvalues; an eigenvalue that is exactly 0 counts as negative.
    Cost: one eigendecomposition, O(n^3) a matrix.
    Source: Higham, 1988; the derivative by divided differences: Malick and Sendov, 2006.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> [[round(x, 4) for x in row] for row in prox.psd_cone(jnp.array([[0.0, 1.0], [1.0, 0.0]])).tolist()]
        [[0.5, 0.5], [0.5, 0.5]]
    """
    who = "prox.psd_cone"
    for path, leaf in flatten(who, v)[0]:
        shape = jnp.shape(leaf)
        if len(shape) < 2 or shape[-1] != shape[-2]:
            raise ValueError(
                f"{who} needs square matrices on the last two axes; v{jax.tree_util.keystr(path)} has shape {shape}; "
                "reshape it."
            )
    return leafwise(who, lambda x: positive_part((x + x.mT) / 2), v)


def exponential_cone(
    v: PyTree[ArrayLike], parameter: object = None, step_size: object = 1.0
) -> PyTree[Float[Array, "..."]]:
    """Return the projection of each row (x, y, z) onto the closure of {y > 0, y exp(x / y) <= z}.

    For entropies, logarithms, logistic losses and geometric programs in conic form. On the boundary the row is
    s (r, 1, e^r) with r = x / y the root of one increasing function. h is the indicator of the cone, so that the step
    size plays no part.

    Shapes: v [..., 3], any tree of these.
    Args:
        v: tree of floating-point arrays.
        parameter: ignored.
        step_size: ignored.
    Returns: a tree like v.
    Raises: TypeError where a leaf of v is not real floating-point; ValueError where a last axis is not 3 long.
    At kinks: rows of the cone, its boundary included, have derivative I, rows of the polar cone, its boundary included,
        0 (so has v = 0: I); where x <= 0 and y <= 0 the row is (x, 0, max(z, 0)), with derivative 0 in z at z = 0.
    Cost: a bisection of fixed length and two Newton steps, entry by entry.
    Source: Friberg, 2021, "Projection onto the exponential cone: a univariate root-finding problem"; Parikh and Boyd,
        2014, section 6.3.4.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.exponential_cone(jnp.array([[0.0, 1.0, 2.0], [-1.0, -2.0, 3.0]])).tolist()
        [[0.0, 1.0, 2.0], [-1.0, 0.0, 3.0]]
        >>> [round(entry, 4) for entry in prox.exponential_cone(jnp.array([1.0, 1.0, 1.0])).tolist()]
        [0.4263, 0.7517, 1.3254]
    """
    who = "prox.exponential_cone"
    for path, leaf in flatten(who, v)[0]:
        if jnp.shape(leaf)[-1:] != (3,):
            raise ValueError(
                f"{who} needs rows (x, y, z); v{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}; "
                "give it a last axis of 3."
            )
    return leafwise(who, _project_exponential, v, rows=True)


@functools.partial(jax.jit, inline=True)
def _project_exponential(v: Array) -> Array:
    # The cone is a cone: any unit will do, and this one keeps exponentials and squares in range.
    peak = jnp.max(jnp.abs(jax.lax.stop_gradient(v)), axis=-1, keepdims=True)
    unit = jnp.where((peak > 0) & (peak < jnp.inf), peak, 1)
    x, y, z = jnp.moveaxis(v / unit, -1, 0)
    held_x, held_y, held_z = jax.lax.stop_gradient((x, y, z))
    inside = (held_y > 0) & (held_y * jnp.exp(held_x / jnp.where(held_y > 0, held_y, 1)) <= held_z)
    inside |= (held_y == 0) & (held_x <= 0) & (held_z >= 0)
    # The polar cone is minus the dual one: x > 0 and x exp(y / x) <= -e z, or x = 0, y <= 0 and z <= 0.
    polar = (held_x > 0) & (held_x * jnp.exp(held_y / jnp.where(held_x > 0, held_x, 1) - 1) <= -held_z)
    polar |= (held_x == 0) & (held_y <= 0) & (held_z <= 0)
    corner = (held_x <= 0) & (held_y <= 0)
    plain = inside | polar | corner
    x, y, z = jnp.where(plain, 1, x), jnp.where(plain, 1, y), jnp.where(plain, 1, z)  # any row with a root
    r = moving(_root(*jax.lax.stop_gradient((x, y, z))), (x, y, z), _root_tangent)
    s, d = _multipliers(r, x, y)
    # v = s (r, 1, e^r) + d (e^r, (1 - r) e^r, -1), and d holds e^r d; either side gives the row, one without cancelling
    low = r <= 0
    shrunk, grown = jnp.exp(jnp.where(low, r, 0)), jnp.exp(jnp.where(low, 0, -r))
    entries = (
        jnp.where(low, x - d, s * r),
        jnp.where(low, y - (1 - r) * d, s),
        jnp.where(low, s * shrunk, z + d * grown),
    )
    edge = jnp.stack(entries, axis=-1)
    flat = jnp.stack([v[..., 0], jnp.zeros_like(s), jnp.where(v[..., 2] > 0, v[..., 2], 0)], axis=-1)
    cases = [case[..., None] for case in (inside, polar, corner)]
    y = jnp.where(cases[0], v, jnp.where(cases[1], 0, jnp.where(cases[2], flat, edge * unit)))
    return jnp.where(jnp.any(jnp.isnan(v), axis=-1, keepdims=True), jnp.nan, y)


def _multipliers(r: Array, x: Array, y: Array) -> tuple[Array, Array]:
    """s, and d e^r, of which v in its (x, y) entries is made at the ratio r; both positive at the root."""
    square = r * r - r + 1
    return ((r - 1) * x + y) / square, (x - r * y) / square


def _excess(r: Array, x: Array, y: Array, z: Array) -> Array:
    """e^r s(r) - e^-r d(r) - z, which increases in r and is zero at the root, times e^-|r|."""
    s, d = _multipliers(r, x, y)
    low = r <= 0
    up, down = jnp.exp(jnp.where(low, 2 * r, 0)), jnp.exp(jnp.where(low, 0, -2 * r))
    return s * up - d * down - z * jnp.exp(jnp.where(low, r, -r))


def _root_tangent(r: Array, operands: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]) -> Array:
    _, moved = jax.jvp(lambda *v: _excess(r, *v), operands, tangents)
    _, slope = jax.jvp(lambda r: _excess(r, *operands), (r,), (jnp.ones_like(r),))
    zero = slope == 0  # an underflow: the root sits at an end and the row at 0
    unit = jax.lax.stop_gradient(jnp.where(zero, 1, slope))  # without it the derivative would square a small slope
    return -(moved / unit) / jnp.where(zero, jnp.inf, slope / unit)


def _root(x: Array, y: Array, z: Array) -> Array:
    """The root of the excess between the ratios at which one of the multipliers vanishes."""
    where_s = 1 - y / jnp.where(x == 0, 1, x)  # s > 0 above it where x > 0, below it where x < 0
    where_d = x / jnp.where(y == 0, 1, y)  # d > 0 below it where y > 0, above it where y < 0
    low = jnp.maximum(jnp.where(x > 0, where_s, -jnp.inf), jnp.where(y < 0, where_d, -jnp.inf))
    high = jnp.minimum(jnp.where(x < 0, where_s, jnp.inf), jnp.where(y > 0, where_d, jnp.inf))
    # Farther out than this, from 0 and from the end on that side, e^|r| outgrows all else; the limit keeps r^2 finite.
    kind = jnp.finfo(x.dtype)
    reach, limit = 10 - 2 * jnp.log(jnp.asarray(kind.tiny, x.dtype)), jnp.asarray(kind.max, x.dtype) ** 0.375
    low, high = jnp.clip(low, -limit, limit), jnp.clip(high, -limit, limit)
    low, high = jnp.maximum(low, jnp.minimum(high, 0) - reach), jnp.minimum(high, jnp.maximum(low, 0) + reach)

    def halve(_: Array, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = low + (high - low) / 2
        above = _excess(middle, x, y, z) > 0
        return jnp.where(above, low, middle), jnp.where(above, middle, high)

    low, high = jax.lax.fori_loop(0, jnp.finfo(x.dtype).nmant + 16, halve, (low, high))
    r = low + (high - low) / 2
    for _ in range(2):
        value, slope = jax.jvp(lambda r: _excess(r, x, y, z), (r,), (jnp.ones_like(r),))
        step = value / jnp.where(slope > 0, slope, 1)
        r = jnp.clip(jnp.where(slope > 0, r - step, r), low, high)
    return r
