"""Projections onto norm balls."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from .._types import Float, PyTree
from ._leafwise import fit, flatten, norm, widest


def l2_ball(v: PyTree[ArrayLike], parameter: ArrayLike = 1.0, step_size: object = 1.0) -> PyTree[Float[Array, "..."]]:
    """Return v min(1, radius / |v|): the projection onto the Euclidean ball of all trees with |x| <= radius.

    For a bound on the whole of x: the norm runs over all entries of all leaves (batch by `vmap`). h is the indicator of
    the ball, so that the step size plays no part.

    Shapes: any tree of any shapes; the radius is a scalar.
    Args:
        v: tree of floating-point arrays; computed in the widest of their dtypes, float32 at least.
        parameter: radius >= 0; inf for no bound.
        step_size: ignored.
    Returns: a tree like v; v itself, to the bit, inside the ball.
    Raises: TypeError where a leaf of v is not real floating-point or the radius is not a real number; ValueError where
        the radius is not a scalar, or is a negative Python or NumPy number.
    At kinks: where |v| = radius > 0 the derivative is that of the outside, I - v v' / |v|^2; at v = 0 with radius 0 it
        is 0.
    Cost: three passes.
    Source: Parikh and Boyd, 2014, section 6.5.1.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.l2_ball({"a": jnp.array([3.0]), "b": jnp.array(4.0)}, 2.5)["a"].tolist()
        [1.5]
    """
    entries, structure = flatten("prox.l2_ball", v)
    dtypes = [jnp.result_type(leaf) for _, leaf in entries]
    dtype = widest(*dtypes)
    xs = [jnp.asarray(leaf, dtype) for _, leaf in entries]
    radius = fit("prox.l2_ball", "the radius", parameter, dtype, ())
    length = norm(xs) if xs else jnp.zeros((), dtype)
    inside = length < radius
    scale = jnp.where(inside, 1, radius) / jnp.where(inside | (length == 0), 1, length)
    return jax.tree.unflatten(structure, [(x * scale).astype(own) for x, own in zip(xs, dtypes, strict=True)])
