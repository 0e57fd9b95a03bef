"""Entropies, the penalties of probabilities and of positive quantities."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from .._types import Float, PyTree
from ._leafwise import leafwise, pair


def entropy(
    v: PyTree[ArrayLike], parameter: PyTree[ArrayLike], step_size: PyTree[ArrayLike] = 1.0
) -> PyTree[Float[Array, "..."]]:
    """Return the x > 0 with x + t (1 + log x) = v, t = step_size * lam: h = lam (sum of x log x).

    For entropic regularisation. x = t W(exp(v / t - 1) / t) with Lambert's W, computed through the logarithm: no
    overflow for large |v| / t.

    Shapes: any tree of any shapes, entry by entry; lam and step_size are scalars, arrays that broadcast to the
        leaf, or trees of these that are prefixes of v.
    Args:
        v: tree of floating-point arrays.
        parameter: lam >= 0; 0 gives max(v, 0).
        step_size: >= 0; one for each entry gives the operator in that diagonal metric.
    Returns: a tree like v.
    Raises: TypeError where a leaf of v is not real floating-point or a coefficient not a real number; ValueError where
        the structure or shape of a coefficient does not fit v, or it is a negative Python or NumPy number.
    At kinks: at t = 0 the derivative is that of max(v, 0), and 0 at v = 0; where x is 0 by underflow it is 0.
    Cost: four Newton-like steps.
    Source: Combettes and Pesquet, 2011, table 10.2; Fritsch, Shafer and Crowley, 1973, for the steps.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> [round(x, 4) for x in prox.entropy(jnp.array([2.0, 1.0]), 1.0).tolist()]
        [1.0, 0.5671]
    """

    def solve(x: Array, lam: Array, step: Array) -> Array:
        return _relative(x, step * lam, jnp.exp(-jnp.ones_like(x)))  # x log x is x log(x / q) - x with q = 1 / e

    return leafwise("prox.entropy", solve, v, lam=parameter, step_size=step_size)


def kullback_leibler(
    v: PyTree[ArrayLike], parameter: PyTree[ArrayLike], step_size: PyTree[ArrayLike] = 1.0
) -> PyTree[Float[Array, "..."]]:
    """Return the x with x + t log(x / q) = v, t = step_size * lam: h = lam (sum of x log(x/q) - x + q).

    For x near a reference q > 0 in the Kullback-Leibler sense. x = t W(q exp(v / t) / t) with Lambert's W, computed
    through the logarithm: no overflow for large |v| / t.

    Shapes: any tree of any shapes, entry by entry; lam, q and step_size are scalars, arrays that broadcast to the
        leaf, or trees of these that are prefixes of v.
    Args:
        v: tree of floating-point arrays.
        parameter: (lam, q), both >= 0; where q = 0, x is held at 0.
        step_size: >= 0; one for each entry gives the operator in that diagonal metric.
    Returns: a tree like v.
    Raises: TypeError where a leaf of v is not real floating-point or a coefficient not a real number; ValueError where
        parameter is not a pair, the structure or shape of a coefficient does not fit v, or it is a negative Python or
        NumPy number.
    At kinks: at t = 0 the derivative is that of max(v, 0), and 0 at v = 0; where x = 0 (q = 0, or underflow) it is 0.
    Cost: four Newton-like steps.
    Source: Combettes and Pesquet, 2011, table 10.2; Fritsch, Shafer and Crowley, 1973, for the steps.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> [round(x, 4) for x in prox.kullback_leibler(jnp.array([2.0, 0.0]), (1.0, 2.0)).tolist()]
        [2.0, 0.8526]
    """
    lam, q = pair("prox.kullback_leibler", "(lam, q)", parameter)

    def solve(x: Array, lam: Array, q: Array, step: Array) -> Array:
        return _relative(x, *jnp.broadcast_arrays(step * lam + 0 * x, q + 0 * x))

    return leafwise("prox.kullback_leibler", solve, v, lam=lam, q=q, step_size=step_size)


@jax.custom_jvp
def _relative(v: Array, t: Array, q: Array) -> Array:
    """The x with x + t log(x / q) = v."""
    small, kind = t <= 0, jnp.finfo(v.dtype)
    safe = jnp.where(small, 1, t)
    great = v > safe / kind.eps**2  # there v / t may overflow, and one step from x = v is exact
    x = safe * _omega(jnp.where(great, 0, v) / safe + jnp.log(q) - jnp.log(safe))
    far = v - safe * (jnp.log(jnp.where(great, jnp.minimum(v, kind.max), 1)) - jnp.log(q))
    x = jnp.where(great, jnp.where(q > 0, far, 0 * q), x)
    return jnp.where(small, jnp.where(q > 0, jnp.maximum(v, 0), 0 * q), x)


@_relative.defjvp
def _(primals: Any, tangents: Any) -> Any:
    v, t, q = primals
    x = _relative(v, t, q)  # the relation differentiated, itself differentiable
    positive = (x >= jnp.finfo(x.dtype).tiny) & (q > 0)
    safe_x, safe_q, total = (jnp.where(positive, a, 1) for a in (x, q, x + t))
    by_v, by_t = safe_x / total, (jnp.log(safe_q) - jnp.log(safe_x)) * (safe_x / total)
    # x t / (q (x + t)), the greater of x and t first: no product over- or underflows unless the result does
    by_q = jnp.where(safe_x > t, safe_x, t) / total * (jnp.where(safe_x > t, t, safe_x) / safe_q)
    change = by_v * tangents[0] + by_t * tangents[1] + by_q * tangents[2]
    return x, jnp.where(positive, change, jnp.where(jnp.isnan(x), x, 0))


def _omega(c: Array) -> Array:
    """Wright's omega, w + log w = c: four steps of fourth order from a guess that is near everywhere."""
    far = c < -40  # w = exp(c) to rounding
    c_near = jnp.where(far, 0, c)
    exp = jnp.exp(jnp.minimum(c_near, 1))
    w = jnp.where(c_near < 1, exp / (1 + exp), c_near - jnp.log(jnp.maximum(c_near, 1)))
    for _ in range(4):
        r = c_near - w - jnp.log(w)
        q = 2 * (1 + w) * (1 + w + 2 * r / 3)
        w = w * (1 + r / (1 + w) * (q - r) / (q - 2 * r))
    return jnp.where(far, jnp.exp(jnp.minimum(c, 0)), w)
