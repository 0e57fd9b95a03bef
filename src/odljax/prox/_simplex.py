"""Projections onto the simplex."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from .._types import Float, PyTree
from ._leafwise import flatten, leafwise


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
    for path, leaf in flatten("prox.simplex", v)[0]:
        if jnp.shape(leaf)[-1:] == (0,):
            raise ValueError(
                f"prox.simplex needs rows of at least one entry; v{jax.tree_util.keystr(path)} has shape "
                f"{jnp.shape(leaf)}; the empty row has no projection: leave the leaf out."
            )
    return leafwise("prox.simplex", _project, v, rows=True, scale=parameter)


def _project(x: Array, scale: Array) -> Array:
    x = x - jnp.max(jax.lax.stop_gradient(x), axis=-1, keepdims=True)  # changes no answer, and keeps small sums exact
    # The support is found without derivative; given the support, tau is a mean, and plain autodiff of it is right.
    sums = jnp.cumsum(jnp.sort(jax.lax.stop_gradient(x), axis=-1, descending=True), axis=-1)
    counts = 1 + jax.lax.broadcasted_iota(x.dtype, x.shape, x.ndim - 1)
    bound = jnp.max((sums - jax.lax.stop_gradient(scale)) / counts, axis=-1, keepdims=True)
    support = ~(x < bound)  # and not x >= bound: a row of NaN is its own support, and comes out
    total = jnp.sum(jnp.where(support, x, 0), axis=-1, keepdims=True)
    tau = (total - scale) / jnp.sum(support, axis=-1, keepdims=True, dtype=x.dtype)
    y = jnp.where(support, x - tau, 0)
    return y + jax.lax.stop_gradient(jnp.maximum(-y, 0))  # a tie may round to -1e-17
