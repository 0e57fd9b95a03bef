"""Projections onto norm balls and their spheres."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from .._types import Float, Inexact, PyTree
from ._leafwise import fit, flatten, leafwise, length_and_direction, widened, widest
from ._separable import _clip
from ._simplex import floor, simplex_threshold


def hypercube(
    v: PyTree[ArrayLike], parameter: PyTree[ArrayLike] = 1.0, step_size: object = 1.0
) -> PyTree[Float[Array, "..."]]:
    """Return min(max(v, 0), scale): the projection onto the cube 0 <= x <= scale.

    For probabilities, masks and grey values. h is the indicator of the cube, so that the step size plays no part.

    Shapes: any tree of any shapes, entry by entry; scale is a scalar, an array that broadcasts to the leaf, or a tree
        of these that is a prefix of v.
    Args:
        v: tree of floating-point arrays.
        parameter: scale >= 0; inf for no upper bound.
        step_size: ignored.
    Returns: a tree like v.
    Raises: TypeError where a leaf of v is not real floating-point or scale not a real number; ValueError where the
        structure or shape of scale does not fit v, or it is a negative Python or NumPy number.
    At kinks: the derivative on a bound is that of the bound (0 in v, 1 in scale on the upper one).
    Cost: one pass.
    Source: Parikh and Boyd, 2014, section 6.2.4.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.hypercube(jnp.array([2.0, -3.0, 0.5])).tolist()
        [1.0, 0.0, 0.5]
    """
    return leafwise("prox.hypercube", lambda x, scale: _clip(x, jnp.zeros_like(x), scale), v, scale=parameter)


def linf_ball(
    v: PyTree[ArrayLike], parameter: PyTree[ArrayLike] = 1.0, step_size: object = 1.0
) -> PyTree[Float[Array, "..."]]:
    """Return min(max(v, -radius), radius): the projection onto {|x_i| <= radius for all i}.

    For a bound on the largest entry; the dual variable of an l1 penalty lives here. h is the indicator of the ball, so
    that the step size plays no part.

    Shapes: any tree of any shapes, entry by entry; the radius is a scalar, an array that broadcasts to the leaf, or a
        tree of these that is a prefix of v.
    Args:
        v: tree of floating-point arrays.
        parameter: radius >= 0; inf for no bound.
        step_size: ignored.
    Returns: a tree like v.
    Raises: TypeError where a leaf of v is not real floating-point or the radius not a real number; ValueError where
        the structure or shape of the radius does not fit v, or it is a negative Python or NumPy number.
    At kinks: where |v_i| = radius the derivative is that of the bound: 0 in v, sign(v_i) in the radius (1 at v_i = 0).
    Cost: one pass.
    Source: Parikh and Boyd, 2014, section 6.2.4.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.linf_ball(jnp.array([2.0, -3.0, 0.5])).tolist()
        [1.0, -1.0, 0.5]
    """
    return leafwise("prox.linf_ball", lambda x, radius: _clip(x, -radius, radius), v, radius=parameter)


def l1_ball(v: PyTree[ArrayLike], parameter: ArrayLike = 1.0, step_size: object = 1.0) -> PyTree[Float[Array, "..."]]:
    """Return sign(v) max(|v| - tau, 0), tau = 0 inside: the projection onto the ball of trees with |x|_1 <= radius.

    For sparse x with a budget instead of a penalty. The norm runs over all entries of all leaves (batch by `vmap`). h
    is the indicator of the ball, so that the step size plays no part.

    Shapes: any tree of any shapes; the radius is a scalar.
    Args:
        v: tree of floating-point arrays; computed in the widest of their dtypes, float32 at least.
        parameter: radius >= 0; inf for no bound.
        step_size: ignored.
    Returns: a tree like v; v itself, to the bit, inside the ball.
    Raises: TypeError where a leaf of v is not real floating-point or the radius is not a real number; ValueError where
        the radius is not a scalar, or is a negative Python or NumPy number.
    At kinks: where |v|_1 = radius the derivative is that of the outside, I - s s' / |S| on S = {i: |v_i| >= tau,
        v_i != 0} with s = sign(v), and s / |S| in the radius; an entry that ties with tau is in S.
    Cost: one sort of all entries.
    Source: Duchi, Shalev-Shwartz, Singer and Chandra, 2008; tau as in the projection onto the simplex.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.l1_ball(jnp.array([3.0, -2.0, 0.5]), 3.0).tolist()
        [2.0, -1.0, 0.0]
    """

    def project(x: Array, radius: Array) -> Array:
        size, peak = jnp.abs(x), jnp.max(jnp.abs(jax.lax.stop_gradient(x)))
        inside = jnp.sum(size) < radius
        shown = jnp.where(size == 0, -1 - peak, size) - peak  # zeros take no part, whatever the radius
        tau, support = simplex_threshold(shown, jnp.where(inside, 0, radius))
        return jnp.where(inside, x, jnp.sign(x) * floor(jnp.where(support, shown - tau, 0)))

    return _whole("prox.l1_ball", project, v, parameter)


def l1_sphere(v: PyTree[ArrayLike], parameter: ArrayLike = 1.0, step_size: object = 1.0) -> PyTree[Float[Array, "..."]]:
    """Return sign(v) max(|v| - tau, 0) with |x|_1 = radius: a projection onto the l1 sphere of trees.

    The sphere is not convex: the nearest point is unique unless a zero of v becomes non-zero. The norm runs over all
    entries of all leaves (batch by `vmap`). h is the indicator of the sphere, so that the step size plays no part.

    Shapes: any tree of any shapes; the radius is a scalar.
    Args:
        v: tree of floating-point arrays; computed in the widest of their dtypes, float32 at least.
        parameter: radius >= 0.
        step_size: ignored.
    Returns: a tree like v; where v_i = 0 becomes non-zero, the positive one of the two nearest.
    Raises: TypeError where a leaf of v is not real floating-point or the radius is not a real number; ValueError where
        the radius is not a scalar, or is a negative Python or NumPy number; or v has leaves but no entry.
    At kinks: that of the outside, I - s s' / |S| on S = {i: |v_i| >= tau} and s / |S| in the radius, with s = sign(v)
        and sign(0) = 1; an entry that ties with tau is in S.
    Cost: one sort of all entries.
    Source: as for the l1 ball, with tau < 0 inside.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.l1_sphere(jnp.array([0.25, -0.25])).tolist()
        [0.5, -0.5]
    """

    def project(x: Array, radius: Array) -> Array:
        sign = jnp.where(x < 0, -1, jnp.ones_like(x))
        size = sign * x  # and not abs, whose derivative at 0 is 0
        size = size - jnp.max(jax.lax.stop_gradient(size))  # changes no answer, and keeps small sums exact
        tau, support = simplex_threshold(size, radius)
        return sign * floor(jnp.where(support, size - tau, 0))

    _refuse_no_entries("prox.l1_sphere", v)
    return _whole("prox.l1_sphere", project, v, parameter)


def l2_sphere(v: PyTree[ArrayLike], parameter: ArrayLike = 1.0, step_size: object = 1.0) -> PyTree[Float[Array, "..."]]:
    """Return radius v / |v|: a projection onto the Euclidean sphere of trees with |x| = radius.

    For directions and normalised filters. The sphere is not convex: at v = 0 all its points are nearest. The norm runs
    over all entries of all leaves (batch by `vmap`). h is the indicator of the sphere, so that the step size plays no
    part.

    Shapes: any tree of any shapes; the radius is a scalar.
    Args:
        v: tree of floating-point arrays; computed in the widest of their dtypes, float32 at least.
        parameter: radius >= 0.
        step_size: ignored.
    Returns: a tree like v; at v = 0 the point whose entries are all equal and positive.
    Raises: TypeError where a leaf of v is not real floating-point or the radius is not a real number; ValueError where
        the radius is not a scalar, or is a negative Python or NumPy number; or v has leaves but no entry.
    At kinks: at v = 0 the derivative in v is 0.
    Cost: three passes.
    Source: the gradient of |x - v|^2 on the sphere vanishes where x is a multiple of v.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> [round(x, 4) for x in prox.l2_sphere(jnp.array([3.0, 4.0])).tolist()]
        [0.6, 0.8]
    """

    def project(x: Array, radius: Array) -> Array:
        length, (direction,) = length_and_direction([x])
        return radius * jnp.where(length == 0, x.size**-0.5, direction)

    _refuse_no_entries("prox.l2_sphere", v)
    return _whole("prox.l2_sphere", project, v, parameter)


def l2_ball(v: PyTree[ArrayLike], parameter: ArrayLike = 1.0, step_size: object = 1.0) -> PyTree[Inexact[Array, "..."]]:
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
    entries, structure = flatten("prox.l2_ball", v, or_complex=True)
    dtypes = [jnp.result_type(leaf) for _, leaf in entries]
    dtype = widest(*(jnp.finfo(own).dtype for own in dtypes))
    xs = [widened(leaf, dtype) for _, leaf in entries]
    radius = fit("prox.l2_ball", "the radius", parameter, dtype, ())
    if not xs:
        return v
    length, directions = length_and_direction(xs)
    inside = length < radius
    held = jnp.where(inside, 0, radius)
    ys = [jnp.where(inside, x, held.astype(x.dtype) * along) for x, along in zip(xs, directions, strict=True)]
    return jax.tree.unflatten(structure, [y.astype(own) for y, own in zip(ys, dtypes, strict=True)])


def _refuse_no_entries(who: str, v: PyTree) -> None:
    """A tree without leaves stays what it is; one of empty leaves is a mistake, as no sphere lies in it."""
    entries, _ = flatten(who, v)
    if entries and not any(jnp.size(leaf) for _, leaf in entries):
        path, leaf = entries[0]
        raise ValueError(
            f"{who} needs at least one entry; v{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}; no sphere "
            "lies in a space without dimensions: pass entries."
        )


def _whole(who: str, project: Callable[[Array, Array], Array], v: PyTree, radius: ArrayLike) -> PyTree:
    """`project(x, radius)` of all entries of v in one vector; v itself where it has none."""
    entries, structure = flatten(who, v)
    dtypes = [jnp.result_type(leaf) for _, leaf in entries]
    dtype, shapes = widest(*dtypes), [jnp.shape(leaf) for _, leaf in entries]
    radius = fit(who, "the radius", radius, dtype, ())
    if not sum(jnp.size(leaf) for _, leaf in entries):
        return v
    parts = [jnp.asarray(leaf, dtype).ravel() for _, leaf in entries]
    ends = [sum(part.size for part in parts[: i + 1]) for i in range(len(parts) - 1)]
    y = jnp.split(project(jnp.concatenate(parts), radius), ends)
    leaves = [part.reshape(shape).astype(own) for part, shape, own in zip(y, shapes, dtypes, strict=True)]
    return jax.tree.unflatten(structure, leaves)
