"""Penalties that are not convex: their operators jump, and where two points are equally good return one, named."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from .._checks import count
from .._types import Float, PyTree
from ._leafwise import leafwise, pair


def l0(
    v: PyTree[ArrayLike], parameter: PyTree[ArrayLike], step_size: PyTree[ArrayLike] = 1.0
) -> PyTree[Float[Array, "..."]]:
    """Return v where |v| >= sqrt(2 t) and 0 elsewhere, t = step_size * lam: h = lam (number of non-zero entries).

    Hard thresholding: sparse x without the bias of the l1 norm.

    Shapes: any tree of any shapes, entry by entry; lam and step_size are scalars, arrays that broadcast to the
        leaf, or trees of these that are prefixes of v.
    Args:
        v: tree of floating-point arrays.
        parameter: lam >= 0.
        step_size: >= 0.
    Returns: a tree like v.
    Raises: TypeError where a leaf of v is not real floating-point or a coefficient not a real number; ValueError where
        the structure or shape of a coefficient does not fit v, or it is a negative Python or NumPy number.
    At kinks: at the jump |v| = sqrt(2 t), where both are minimisers, v is kept; the derivative there is 1 in v, and
        that in t is 0 everywhere, as t moves only the jump.
    Cost: one pass.
    Source: Blumensath and Davies, 2008.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.l0(jnp.array([3.0, -1.0]), 1.0).tolist()
        [3.0, 0.0]
    """
    return leafwise("prox.l0", _keep, v, lam=parameter, step_size=step_size)


def lq(
    v: PyTree[ArrayLike], parameter: PyTree[ArrayLike], step_size: PyTree[ArrayLike] = 1.0
) -> PyTree[Float[Array, "..."]]:
    """Return the minimiser for h = lam (sum of |x|^q), 0 < q < 1: 0 below a jump, beyond it the larger root of (*).

    Sparser than the l1 norm and continuous but for one jump. (*) is x + t q x^(q - 1) = |v|, t = step_size * lam; the
    jump is at |v| = (2 - q) / (2 - 2 q) b, b = (2 t (1 - q))^(1 / (2 - q)). q = 1/2 and 2/3 have closed forms, which
    this agrees with.

    Shapes: any tree of any shapes, entry by entry; lam, q and step_size are scalars, arrays that broadcast to the
        leaf, or trees of these that are prefixes of v.
    Args:
        v: tree of floating-point arrays.
        parameter: (lam, q): lam >= 0 and 0 < q < 1.
        step_size: >= 0.
    Returns: a tree like v.
    Raises: TypeError where a leaf of v is not real floating-point or a coefficient not a real number; ValueError where
        parameter is not a pair, the structure or shape of a coefficient does not fit v, or it is a negative Python or
        NumPy number.
    At kinks: at the jump, where both are minimisers, the root is returned, with its derivative; at v = 0 and t = 0 the
        derivative is 1 in v and 0 in lam and q.
    Cost: Newton's method on the convex side of the root, 12 steps.
    Source: Marjanovic and Solo, 2012.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> [round(x, 4) for x in prox.lq(jnp.array([3.0, -1.0]), (1.0, 0.5)).tolist()]
        [2.6955, 0.0]
    """
    lam, q = pair("prox.lq", "(lam, q)", parameter)
    return leafwise("prox.lq", _lq, v, lam=lam, q=q, step_size=step_size)


def scad(
    v: PyTree[ArrayLike], parameter: PyTree[ArrayLike], step_size: PyTree[ArrayLike] = 1.0
) -> PyTree[Float[Array, "..."]]:
    """Return the minimiser for the smoothly clipped absolute deviation, a penalty with slope lam, then falling, then 0.

    h' = lam for 0 < x <= lam, (a lam - x) / (a - 1) up to a lam, and 0 beyond: sparse without bias on large entries.
    With s = step_size < a - 1 the operator is continuous: the l1 one up to |v| = (1 + s) lam, ((a - 1) v - s a lam
    sign(v)) / (a - 1 - s) up to a lam, and v. With a greater s it jumps from the l1 one to v: at (a + 1 + s) lam / 2,
    or from 0 at sqrt(s (a + 1)) lam where s > a + 1.

    Shapes: any tree of any shapes, entry by entry; lam, a and step_size are scalars, arrays that broadcast to the
        leaf, or trees of these that are prefixes of v.
    Args:
        v: tree of floating-point arrays.
        parameter: (lam, a): lam >= 0, a > 2 (a = 3.7 is customary; inf gives l1).
        step_size: >= 0.
    Returns: a tree like v.
    Raises: TypeError where a leaf of v is not real floating-point or a coefficient not a real number; ValueError where
        parameter is not a pair, the structure or shape of a coefficient does not fit v, or it is a negative Python or
        NumPy number.
    At kinks: that of the side of larger |v|; at the jump, where both are minimisers, v is returned.
    Cost: one pass.
    Source: Fan and Li, 2001, equation 2.8 for s = 1; for a jump, the better of the two minimisers.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.scad(jnp.array([0.5, 1.5, 3.0, 5.0]), (1.0, 3.0)).tolist()
        [0.0, 0.5, 3.0, 5.0]
    """
    lam, a = pair("prox.scad", "(lam, a)", parameter)
    return leafwise("prox.scad", _scad, v, lam=lam, a=a, step_size=step_size)


def mcp(
    v: PyTree[ArrayLike], parameter: PyTree[ArrayLike], step_size: PyTree[ArrayLike] = 1.0
) -> PyTree[Float[Array, "..."]]:
    """Return the minimiser for the minimax concave penalty, the penalty whose slope falls from lam to 0 at gamma lam.

    h = lam |x| - x^2 / (2 gamma) up to |x| = gamma lam, constant beyond: sparse without bias on large entries. With s =
    step_size < gamma the operator is continuous: sign(v) max(|v| - s lam, 0) / (1 - s / gamma) up to |v| = gamma lam,
    and v beyond (firm thresholding). With a greater s it jumps from 0 to v at sqrt(s gamma) lam.

    Shapes: any tree of any shapes, entry by entry; lam, gamma and step_size are scalars, arrays that broadcast to the
        leaf, or trees of these that are prefixes of v.
    Args:
        v: tree of floating-point arrays.
        parameter: (lam, gamma): lam >= 0, gamma > 0.
        step_size: >= 0.
    Returns: a tree like v.
    Raises: TypeError where a leaf of v is not real floating-point or a coefficient not a real number; ValueError where
        parameter is not a pair, the structure or shape of a coefficient does not fit v, or it is a negative Python or
        NumPy number.
    At kinks: that of the side of larger |v|; at the jump, where both are minimisers, v is returned.
    Cost: one pass.
    Source: Zhang, 2010, for s = 1; Gao and Bruce, 1997, for firm thresholding.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.mcp(jnp.array([0.5, 1.5, 3.0]), (1.0, 2.0)).tolist()
        [0.0, 1.0, 3.0]
    """
    lam, gamma = pair("prox.mcp", "(lam, gamma)", parameter)
    return leafwise("prox.mcp", _mcp, v, lam=lam, gamma=gamma, step_size=step_size)


def top_k(v: PyTree[ArrayLike], parameter: Any, step_size: object = 1.0) -> PyTree[Float[Array, "..."]]:
    """Return v with all but the k entries of largest |v| in each row set to 0: a projection onto k-sparse rows.

    For a known sparsity, as in iterative hard thresholding. The set is not convex; among equal entries the first ones
    are kept. h is the indicator of the set, so that the step size plays no part.

    Shapes: v [..., n], any tree of these (a 0-d leaf is a row of one).
    Args:
        v: tree of floating-point arrays; a NaN counts as large.
        parameter: k >= 1, a Python int; of which more than n is no restriction.
        step_size: ignored.
    Returns: a tree like v.
    Raises: TypeError where a leaf of v is not real floating-point or k is traced; ValueError where k is no whole number
        of at least 1.
    At kinks: at a tie the derivative is that of the entries kept: 1 for them, 0 for the others.
    Cost: a selection of the k largest.
    Source: Blumensath and Davies, 2009.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.top_k(jnp.array([1.0, -3.0, 2.0]), 2).tolist()
        [0.0, -3.0, 2.0]
    """
    k = count("prox.top_k", "k", parameter)

    def keep(x: Array) -> Array:
        if k >= x.shape[-1]:
            return x
        chosen = jax.lax.top_k(jnp.abs(jax.lax.stop_gradient(x)), k)[1]
        kept = jnp.put_along_axis(jnp.zeros(x.shape, bool), chosen, True, axis=-1, inplace=False)
        return jnp.where(kept, x, 0)

    return leafwise("prox.top_k", keep, v, rows=True)


def _keep(x: Array, lam: Array, step: Array) -> Array:
    bound = jnp.sqrt(2 * jax.lax.stop_gradient(step * lam))  # t moves the jump only
    return jnp.where(jnp.abs(x) < bound, 0, jnp.where(jnp.isnan(bound), bound, x))


@functools.partial(jax.jit, inline=True)
def _lq(x: Array, lam: Array, q: Array, step: Array) -> Array:
    t, q = step * lam + 0 * x, q + 0 * x
    held_t, held_q = jax.lax.stop_gradient((t, q))
    least = (2 * held_t * (1 - held_q)) ** (1 / (2 - held_q))  # the smallest minimiser that is not 0
    bound = least * (2 - held_q) / (2 - 2 * held_q)
    gone, free = jnp.abs(x) < bound, (x == 0) & (bound == 0)
    plain = gone | free
    root = _lq_root(jnp.where(plain, 1, jnp.abs(x)), jnp.where(plain, 0, t), jnp.where(plain, 0.5, q))
    return jnp.where(gone, 0, jnp.where(free, x, jnp.sign(x) * root))


@jax.custom_jvp
def _lq_root(v: Array, t: Array, q: Array) -> Array:
    """The larger root of x + t q x^(q - 1) = v, from above, where the function is convex and grows."""

    def newton(_: Any, x: Array) -> Array:
        pull = t * q * x ** (q - 1)
        return x - (x + pull - v) / (1 - (1 - q) * pull / x)

    return jax.lax.fori_loop(0, 12, newton, v)


@_lq_root.defjvp
def _(primals: Any, tangents: Any) -> Any:
    v, t, q = primals
    x = _lq_root(v, t, q)
    power = x ** (q - 1)
    change = tangents[0] - q * power * tangents[1] - t * power * (1 + q * jnp.log(x)) * tangents[2]
    return x, change / (1 - (1 - q) * t * q * power / x)


def _scad(x: Array, lam: Array, a: Array, step: Array) -> Array:
    a = jnp.minimum(a, jnp.finfo(a.dtype).max)  # a = inf is l1, and lam = 0 the identity
    size, sign = jnp.abs(x), jnp.sign(x)
    smooth = step < a - 1
    jump = jnp.where(step > a + 1, jnp.sqrt(jnp.where(step > a + 1, step * (a + 1), 1)), (a + 1 + step) / 2)
    first, second = lam * jnp.where(smooth, 1 + step, jump), lam * jnp.where(smooth, a, jump)
    shrunk = jnp.where(size < step * lam, 0, x - sign * step * lam)
    width = jnp.where(smooth, a - 1, 1)
    between = (x - sign * step * lam * (a / width)) / jnp.where(smooth, 1 - step / width, 1)
    return jnp.where(size < first, shrunk, jnp.where(size < second, between, jnp.where(jnp.isnan(second), second, x)))


def _mcp(x: Array, lam: Array, gamma: Array, step: Array) -> Array:
    gamma = jnp.minimum(gamma, jnp.finfo(gamma.dtype).max)  # gamma = inf is l1, and lam = 0 the identity
    size, sign = jnp.abs(x), jnp.sign(x)
    smooth = step < gamma
    jump = jnp.sqrt(jnp.where(smooth, 1, step * gamma))
    first, second = lam * jnp.where(smooth, step, jump), lam * jnp.where(smooth, gamma, jump)
    firm = (x - sign * step * lam) / jnp.where(smooth, 1 - step / jnp.where(smooth, gamma, 1), 1)
    return jnp.where(size < first, 0, jnp.where(size < second, firm, jnp.where(jnp.isnan(second), second, x)))
