"""Operators that couple the entries of a group."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from .._moving import moving
from .._tree import magnitude
from .._types import Float, Inexact, PyTree
from ._leafwise import (
    describe,
    fit,
    flatten,
    leafwise,
    length_and_direction,
    nan_unless,
    norm,
    pair,
    shrink_length,
    spread,
    widest,
)
from ._proximal_point import Penalty, proximal_point


def group_lasso(
    v: PyTree[ArrayLike], parameter: PyTree[ArrayLike], step_size: PyTree[ArrayLike] = 1.0
) -> PyTree[Inexact[Array, "..."]]:
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
    return leafwise("prox.group_lasso", _shrink_rows, v, rows=True, or_complex=True, lam=parameter, step_size=step_size)


def overlapping_group_lasso(
    v: PyTree[ArrayLike],
    parameter: tuple[PyTree[ArrayLike], Sequence[Any]],
    step_size: PyTree[ArrayLike] = 1.0,
) -> PyTree[Float[Array, "..."]]:
    """Return the prox of h = sum over groups g of lam_g |x_g|, for groups of any entries of a row, that may overlap.

    For hierarchies, neighbourhoods and pathways. Where every two groups are disjoint or nested, shrinking them from the
    innermost outwards is exact. Otherwise the dual, x = v - sum of u_g with |u_g| <= step_size * lam_g, is solved by
    proximal points and Newton's method, x is finished by Newton's method on the groups that are not 0, and
    differentiated there implicitly.

    Shapes: v [..., n], any tree of these (a 0-d leaf is a row of one); lam is a scalar or an array that broadcasts to
        [..., number of groups], step_size a scalar or one that broadcasts to [...], or trees of these that are prefixes
        of v.
    Args:
        v: tree of floating-point arrays.
        parameter: (lam, groups): lam >= 0; groups a list of lists (or arrays) of indices into a row, known when
            traced, the same for all leaves. An entry in no group stays as it is.
        step_size: >= 0.
    Returns: a tree like v. Where groups overlap, right to rounding, and where a group only just is 0 to 2e-9 |v| in
        float64 and 3e-4 |v| in float32, by a subgradient of that size; else NaN, and so is the derivative.
    Raises: TypeError where a leaf of v is not real floating-point, a coefficient not a real number, or groups traced or
        no integers; ValueError where parameter is not a pair, a group is empty, repeats an index or reaches beyond the
        row, the structure or shape of a coefficient does not fit v, or it is a negative Python or NumPy number.
    At kinks: nested: that of `group_lasso`, group by group. Overlapping: an entry of a group that is 0 has derivative
        0, also where the group is about to leave 0, unless its step_size * lam_g is 0.
    Cost: nested: three passes a group. Overlapping: some tens of Newton steps, each a system of the size of the number
        of groups, and groups x n numbers; a derivative solves one such system.
    Source: Jenatton, Mairal, Obozinski and Bach, 2011 (nested groups; the dual); Li, Sun and Toh, 2018 (proximal points
        of the dual by a semismooth Newton method).

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> y = prox.overlapping_group_lasso(jnp.array([3.0, 4.0, 0.3]), (2.5, [[0, 1], [1], [2]]))
        >>> [round(x, 4) for x in y.tolist()]
        [0.7639, 0.382, 0.0]
    """
    who = "prox.overlapping_group_lasso"
    lam, groups = pair(who, "(lam, groups)", parameter)
    members = [_members(who, group) for group in groups]
    pairs = [(set(a), set(b)) for a, b in itertools.combinations(members, 2)]
    nested = all(a <= b or b <= a or not a & b for a, b in pairs)
    entries, structure = flatten(who, v)
    lams, steps = spread(who, "lam", lam, v), spread(who, "step_size", step_size, v)
    results = []
    for (path, leaf), own_lam, own_step in zip(entries, lams, steps, strict=True):
        dtype, shape, where = jnp.result_type(leaf), jnp.shape(leaf), jax.tree_util.keystr(path)
        x = jnp.atleast_1d(jnp.asarray(leaf, widest(dtype)))
        n, batch = x.shape[-1], x.shape[:-1]
        greatest = max((index for group in members for index in group), default=-1)
        if greatest >= n:
            raise ValueError(
                f"{who} needs groups of indices below the length of the rows; v{where} has {n} entries a row and a "
                f"group holds {greatest}; take it out, or give the leaves operators of their own (prox.separable)."
            )
        own_lam = fit(who, "lam" + where, own_lam, x.dtype, (*batch, len(members)))
        own_step = fit(who, "step_size" + where, own_step, x.dtype, batch)
        t = jnp.broadcast_to(own_lam, (*batch, len(members))) * (own_step[..., None] if own_step.ndim else own_step)
        if nested:
            y = _innermost_first(x, t, members)
        else:
            inside = np.zeros((len(members), n), bool)
            for row, group in zip(inside, members, strict=True):
                row[list(group)] = True
            y = _overlapping(x.reshape(-1, n), t.reshape(-1, len(members)), jnp.asarray(inside)).reshape(x.shape)
        results.append(y.astype(dtype).reshape(shape))
    return jax.tree.unflatten(structure, results)


def _members(who: str, group: Any) -> tuple[int, ...]:
    if isinstance(group, Tracer) or not np.issubdtype(np.asarray(group).dtype, np.integer):
        raise TypeError(
            f"{who} needs groups of integers that are known when traced; a group is {describe(group)}; pass lists of "
            "indices, or NumPy arrays."
        )
    indices = tuple(np.ravel(group).tolist())
    if not indices or len(set(indices)) < len(indices) or min(indices) < 0:
        raise ValueError(
            f"{who} needs groups of distinct indices from 0 on; {list(indices)} came; name each entry of a group once."
        )
    return indices


def _innermost_first(x: Array, t: Array, members: list[tuple[int, ...]]) -> Array:
    for i in sorted(range(len(members)), key=lambda i: len(members[i])):
        at = np.array(members[i])
        x = x.at[..., at].set(_shrink_rows(x[..., at], t[..., i : i + 1], jnp.ones((), x.dtype)))
    return x


class _Row(NamedTuple):
    """A row v with one threshold a group; which entries a group has, and which are not 0 in the solution."""

    v: Array
    t: Array
    inside: Array
    free: Array


@functools.partial(jax.jit, inline=True)
@functools.partial(jax.vmap, in_axes=(0, 0, None))
def _overlapping(v: Array, t: Array, inside: Array) -> Array:
    """One row v [n] with thresholds t [groups]; inside [groups, n]."""
    unit = magnitude(v)
    v, t = v / unit, t / unit
    x, free, sound = _solve(*jax.lax.stop_gradient((v, t)), inside)
    x = moving(x, _Row(v, t, inside, free), _tangent)
    return unit * nan_unless(sound, x, v, t)


def _solve(v: Array, t: Array, inside: Array) -> tuple[Array, Array, Array]:
    """The solution, where it is not 0, and whether it is one: the proof is a small subgradient at it."""
    t = jnp.minimum(t, 2 * norm([v]))  # beyond |v_g| a group is 0 in any case

    def split(p: Array) -> tuple[Array, Array, Array]:
        length, (direction,) = length_and_direction([p], axis=-1)
        return length[:, 0], direction, (length[:, 0] <= t) & (t > 0)

    def project(p: Array) -> Array:
        _, direction, still = split(p)
        return jnp.where(still[:, None], p, t[:, None] * direction)

    def solve(p: Array, sigma: Array, r: Array) -> Array:
        length, direction, still = split(p)
        bent = sigma * t / jnp.where(length == 0, 1, length)
        diagonal = 1 + jnp.where(still, sigma, bent) @ inside.astype(v.dtype)
        return _less_ranks(diagonal, jnp.where(still, 0, bent), direction, r)

    def apply(x: Array) -> Array:
        return jnp.where(inside, x[None], 0)

    def adjoint(u: Array) -> Array:
        return jnp.sum(u, axis=0)

    zero = jnp.zeros(inside.shape, v.dtype)
    point = proximal_point(v, zero, Penalty(apply, zero, adjoint, project, solve))
    eps, whole = float(jnp.finfo(v.dtype).eps), norm([v])

    def finished(level: float) -> tuple[Array, Array, Array]:
        """With groups of a length below `level` taken for 0: x, its free entries, and the size of a subgradient."""
        gone = ((split(point.p)[0] - t) <= level * point.sigma * whole) & (t > 0)
        free = ~jnp.any(inside & gone[:, None], axis=0)
        row = _Row(v, t, inside, free)

        def subgradient(x: Array) -> Array:
            length, (direction,) = length_and_direction([jnp.where(inside, x[None], 0)], axis=-1)
            return x - v + jnp.sum(jnp.where(length > 0, t[:, None] * direction, point.w), axis=0)

        def newton(_: Any, x: Array) -> Array:
            slope = subgradient(x)
            ahead = x - jnp.where(free, _reduced(x, row, jnp.where(free, slope, 0)), 0)
            return jnp.where(norm([subgradient(ahead)]) < norm([slope]), ahead, x)

        x = jax.lax.fori_loop(0, 3, newton, jnp.where(free, point.x, 0))
        slope, shared = subgradient(x), (inside & gone[:, None]).astype(v.dtype)
        # The groups that are 0 have room to take up what is left in their entries; x belongs to thresholds that are
        # greater by what does not fit.
        w = point.w - shared * jnp.where(free, 0, slope / jnp.maximum(jnp.sum(shared, axis=0), 1))[None]
        excess = jnp.where(gone, jnp.maximum(norm([w], axis=1)[:, 0] - t, 0), 0)
        return x, free, norm([jnp.where(free, slope, 0), excess])

    # The objective is strongly convex: a subgradient bounds the distance from the solution. A group that only just is 0
    # comes near 0 slowly, and is told by a coarser level.
    fine, coarse = finished(64 * eps), finished(eps**0.6)
    nearer = fine[2] <= coarse[2]
    x, free, size = (jnp.where(nearer, a, b) for a, b in zip(fine, coarse, strict=True))
    return x, free, size <= eps**0.6 * whole


def _less_ranks(diagonal: Array, weights: Array, rows: Array, r: Array) -> Array:
    """(D - rows' W rows)^-1 r for diagonal matrices D and W, by a system of the number of rows, refined once."""
    inner = jnp.eye(weights.size, dtype=r.dtype) - weights[:, None] * ((rows / diagonal[None]) @ rows.T)

    def solve(r: Array) -> Array:
        solved = r / diagonal
        return solved + (jnp.linalg.solve(inner, weights * (rows @ solved)) @ rows) / diagonal

    x = solve(r)
    return x + solve(r - diagonal * x + (weights * (rows @ x)) @ rows)


def _reduced(x: Array, row: _Row, r: Array) -> Array:
    """H^-1 r for the Hessian H of the objective in the entries that are not 0, where it is smooth."""
    alive = row.inside & row.free[None]
    length, (direction,) = length_and_direction([jnp.where(alive, x[None], 0)], axis=-1)
    bent = jnp.where(length == 0, 0, row.t[:, None] / jnp.where(length == 0, 1, length))
    return _less_ranks(1 + jnp.sum(jnp.where(alive, bent, 0), axis=0), bent[:, 0], direction, r)


def _tangent(x: Array, row: _Row, moved: _Row) -> Array:
    alive = row.inside & row.free[None]
    _, (direction,) = length_and_direction([jnp.where(alive, x[None], 0)], axis=-1)
    return jnp.where(row.free, _reduced(x, row, jnp.where(row.free, moved.v - moved.t @ direction, 0)), 0)


def _shrink_rows(x: Array, lam: Array, step: Array) -> Array:
    length, (direction,) = length_and_direction([x], axis=-1)
    return shrink_length(x, length, direction, step * lam)
