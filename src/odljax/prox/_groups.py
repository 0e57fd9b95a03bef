"""Operators that couple the entries of a group."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from .._types import Float, PyTree
from ._leafwise import leafwise, norm


def group_lasso(
    v: PyTree[ArrayLike], parameter: PyTree[ArrayLike], step_size: PyTree[ArrayLike] = 1.0
) -> PyTree[Float[Array, "..."]]:
    """Return v max(1 - t / |v|, 0) for each group, t = step_size * lam: h = lam * (sum of the groups' Euclidean norms).

    For groups of entries that are to vanish together. The groups are the rows v[..., :] along the last axis.

    Shapes: v [..., n], any tree of these (a 1-d leaf is one group, a 0-d leaf a group of one); lam and step_size are
        scalars, arrays that broadcast to [...] (one for each group), or trees of these that are prefixes of v.
    Args:
        v: tree of floating-point arrays.
        parameter: lam >= 0.
        step_size: >= 0.
    Returns: a tree like v.
    Raises: TypeError where a leaf of v is not real floating-point or a coefficient not a real number; ValueError where
        the structure or shape of a coefficient does not fit v, or it is a negative Python or NumPy number.
    At kinks: where |v| = t > 0 the derivative is that of the shrinking side, v v' / |v|^2; it is 0 at v = 0, and I at
        v = 0 where t = 0.
    Cost: three passes.
    Source: Yuan and Lin, 2006.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.group_lasso(jnp.array([[3.0, 4.0], [0.3, 0.4]]), 2.5).tolist()
        [[1.5, 2.0], [0.0, 0.0]]
    """
    return leafwise("prox.group_lasso", _shrink_rows, v, rows=True, lam=parameter, step_size=step_size)


def _shrink_rows(x: Array, lam: Array, step: Array) -> Array:
    threshold, length = step * lam, norm([x], axis=-1)
    gone = length < threshold
    ratio = jnp.where(gone, 1, threshold) / jnp.where(gone | (length == 0), 1, length)
    return x * (1 - ratio)
