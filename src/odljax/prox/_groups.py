"""Operators that couple the entries of a group."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from .._types import Float, Inexact, PyTree
from ..iterations import fixed_point
from ..linear import cg, differentiable_solve
from ..solvers import until_converged
from ._leafwise import describe, fit, flatten, leafwise, norm, pair, shrink_length, spread, widest


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
    sweeps over its blocks, x is finished by Newton's method on the groups that are not 0, and differentiated there
    implicitly.

    Shapes: v [..., n], any tree of these (a 0-d leaf is a row of one); lam is a scalar or an array that broadcasts to
        [..., number of groups], step_size a scalar or one that broadcasts to [...], or trees of these that are prefixes
        of v.
    Args:
        v: tree of floating-point arrays.
        parameter: (lam, groups): lam >= 0; groups a list of lists (or arrays) of indices into a row, known when
            traced, the same for all leaves. An entry in no group stays as it is.
        step_size: >= 0.
    Returns: a tree like v. Where groups overlap, exact to rounding once the sweeps (2000 at most) tell which groups
        are 0.
    Raises: TypeError where a leaf of v is not real floating-point, a coefficient not a real number, or groups traced or
        no integers; ValueError where parameter is not a pair, a group is empty, repeats an index or reaches beyond the
        row, the structure or shape of a coefficient does not fit v, or it is a negative Python or NumPy number.
    At kinks: nested: that of `group_lasso`, group by group. Overlapping: an entry of a group that is 0 has derivative
        0, also where the group is about to leave 0, unless its step_size * lam_g is 0.
    Cost: nested: three passes a group. Overlapping: a pass a group and sweep, groups x n numbers; a derivative solves a
        positive definite system by conjugate gradients.
    Source: Jenatton, Mairal, Obozinski and Bach, 2011 (nested groups; the dual and its sweeps).

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
            solve = jax.vmap(_overlapping, in_axes=(0, 0, None))
            y = solve(x.reshape(-1, n), t.reshape(-1, len(members)), jnp.asarray(inside)).reshape(x.shape)
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


def _overlapping(v: Array, t: Array, inside: Array) -> Array:
    """One row v [n] with thresholds t [groups]; inside [groups, n]."""
    held, held_t = jax.lax.stop_gradient((v, t))

    def remainder(u: Array, i: Any) -> Array:
        return jnp.where(inside[i], held - jnp.sum(u, axis=0) + u[i], 0)

    def sweep(u: Array, theta: None) -> Array:
        def block(i: Any, u: Array) -> Array:
            r = remainder(u, i)
            length = norm([r])
            return u.at[i].set(r * jnp.minimum(1, held_t[i] / jnp.where(length == 0, 1, length)))

        return jax.lax.fori_loop(0, t.size, block, u)

    tol = 100 * float(jnp.finfo(v.dtype).eps)
    solver = until_converged(fixed_point(sweep), tol=tol, relative_tol=tol, max_steps=2000)
    u = solver(jnp.zeros(inside.shape, v.dtype), None).x
    lengths = jnp.stack([norm([remainder(u, i)]) for i in range(t.size)])
    rounding = 1000 * jnp.finfo(v.dtype).eps * norm([held])
    gone = (lengths <= held_t + rounding) & (held_t > 0)
    free = ~jnp.any(inside & gone[:, None], axis=0)
    alive = inside & free[None]

    def gradient(x: Array) -> Array:  # of the objective in the entries that are not 0, which is smooth there
        lengths = norm([jnp.where(alive, x[None], 0)], axis=-1)
        pull = jnp.where(alive, x[None] * (t[:, None] / jnp.where(lengths == 0, 1, lengths)), 0)
        return jnp.where(free, x - v + jnp.sum(pull, axis=0), x)

    def solve_linear(matvec: Any, b: Array) -> Array:
        return differentiable_solve(matvec, b, lambda matvec, b: cg()(matvec, b)[0], symmetric=True)

    def newton(gradient: Any, x: Array) -> Array:
        for _ in range(3):
            residual, matvec = jax.linearize(gradient, x)
            x = x - cg()(matvec, residual)[0]
        return x

    start = jnp.where(free, held - jnp.sum(u, axis=0), 0)
    return jax.lax.custom_root(gradient, start, newton, solve_linear)


def _shrink_rows(x: Array, lam: Array, step: Array) -> Array:
    return shrink_length(x, norm([x], axis=-1), step * lam)
