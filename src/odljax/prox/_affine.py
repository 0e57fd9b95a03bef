"""Projections onto sets that linear equations and inequalities describe."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from .._tree import magnitude, power_of_two
from .._types import Float, PyTree
from ._leafwise import describe, fit, flatten, nan_unless, norm, pair, spread, widest
from ._proximal_point import Penalty, proximal_point


def hyperplane(
    v: PyTree[ArrayLike], parameter: PyTree[ArrayLike], step_size: object = 1.0
) -> PyTree[Float[Array, "..."]]:
    """Return v - a (<a, v> - b) / |a|^2: the projection onto the trees with <a, x> = b.

    For one linear equation on the whole of x: the inner product runs over all entries of all leaves (batch by `vmap`).
    h is the indicator of the hyperplane, so that the step size plays no part.

    Shapes: any tree of any shapes; a is a scalar, an array that broadcasts to the leaf, or a tree of these that is a
        prefix of v; b is a scalar.
    Args:
        v: tree of floating-point arrays; computed in the widest of their dtypes, float32 at least.
        parameter: (a, b).
        step_size: ignored.
    Returns: a tree like v; where a = 0, v itself if b = 0 and NaN if not (there is no such x).
    Raises: TypeError where a leaf of v is not real floating-point, or a or b not real numbers; ValueError where
        parameter is not a pair, b is not a scalar, or the structure or shape of a does not fit v.
    At kinks: there are none; where a = 0 and b = 0 the derivative is I in v, 0 in a and b.
    Cost: three passes.
    Source: Parikh and Boyd, 2014, section 6.2.2.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.hyperplane(jnp.array([3.0, 1.0]), (jnp.array([1.0, 1.0]), 2.0)).tolist()
        [2.0, 0.0]
    """
    return _across("prox.hyperplane", v, parameter, lambda excess: excess)


def halfspace(
    v: PyTree[ArrayLike], parameter: PyTree[ArrayLike], step_size: object = 1.0
) -> PyTree[Float[Array, "..."]]:
    """Return v - a max(<a, v> - b, 0) / |a|^2: the projection onto the trees with <a, x> <= b.

    For one linear inequality on the whole of x: the inner product runs over all entries of all leaves (batch by
    `vmap`). h is the indicator of the halfspace, so that the step size plays no part.

    Shapes: any tree of any shapes; a is a scalar, an array that broadcasts to the leaf, or a tree of these that is a
        prefix of v; b is a scalar.
    Args:
        v: tree of floating-point arrays; computed in the widest of their dtypes, float32 at least.
        parameter: (a, b); b = inf for no bound.
        step_size: ignored.
    Returns: a tree like v; where a = 0, v itself if b >= 0 and NaN if not (there is no such x).
    Raises: TypeError where a leaf of v is not real floating-point, or a or b not real numbers; ValueError where
        parameter is not a pair, b is not a scalar, or the structure or shape of a does not fit v.
    At kinks: where <a, v> = b the derivative is that of the hyperplane, I - a a' / |a|^2; where a = 0 it is I in v.
    Cost: three passes.
    Source: Parikh and Boyd, 2014, section 6.2.3.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.halfspace(jnp.array([[3.0, 1.0], [0.0, 0.0]]), (1.0, 2.0)).tolist()
        [[2.5, 0.5], [-0.5, -0.5]]
    """
    return _across("prox.halfspace", v, parameter, lambda excess: jnp.where(excess < 0, 0, excess))


def span(v: PyTree[ArrayLike], parameter: PyTree[ArrayLike], step_size: object = 1.0) -> PyTree[Float[Array, "..."]]:
    """Return a <a, v> / |a|^2: the projection onto the line of all multiples of a.

    For the component along a direction, over all entries of all leaves (batch by `vmap`). h is the indicator of the
    line, so that the step size plays no part.

    Shapes: any tree of any shapes; a is a scalar, an array that broadcasts to the leaf, or a tree of these that is a
        prefix of v.
    Args:
        v: tree of floating-point arrays; computed in the widest of their dtypes, float32 at least.
        parameter: a; where a = 0 the line is the point 0.
        step_size: ignored.
    Returns: a tree like v.
    Raises: TypeError where a leaf of v is not real floating-point, or a not a real number; ValueError where the
        structure or shape of a does not fit v.
    At kinks: at a = 0 the derivative is 0.
    Cost: three passes.
    Source: Parikh and Boyd, 2014, section 6.2.2 (the complement of a hyperplane through 0).

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.span(jnp.array([3.0, 1.0]), jnp.array([1.0, 1.0])).tolist()
        [2.0, 2.0]
    """
    xs, normals, _, back = _with_normals("prox.span", v, parameter)
    inner, square = _products(xs, normals)
    zero = square == 0
    along = jnp.where(zero, 0, inner) / jnp.where(zero, 1, square)
    return back([a * along for a in normals])


def affine_set(
    v: PyTree[ArrayLike], parameter: PyTree[ArrayLike], step_size: object = 1.0
) -> PyTree[Float[Array, "..."]]:
    """Return v - A^+ (A v - b): the projection of each row onto {x: A x = b}.

    For linear conservation laws, fixed moments and boundary values. A may have any rank: with the pseudo-inverse A^+
    redundant equations do no harm, and contradictory ones are met in the least-squares sense. h is the indicator of the
    set, so that the step size plays no part.

    Shapes: v [..., n], any tree of these; A [m, n], or [..., m, n] with one for each row; b is a scalar or broadcasts
        to [..., m]; or trees of these that are prefixes of v.
    Args:
        v: tree of floating-point arrays.
        parameter: (A, b), each equation in a unit of its own; of these, singular values below 4 sqrt(max(m, n))
            rounding units of the largest count as zero.
        step_size: ignored.
    Returns: a tree like v.
    Raises: TypeError where a leaf of v is not real floating-point, or A or b not real numbers; ValueError where
        parameter is not a pair, or the structure or shape of A or b does not fit v.
    At kinks: there are none in v and b; the derivative in A is that along matrices of the same rank.
    Cost: one singular value decomposition of A, O(m n min(m, n)), and two products a row.
    Source: Parikh and Boyd, 2014, section 6.2.2; the derivative of A^+ is that of Golub and Pereyra, 1973.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> A, b = jnp.array([[1.0, 1.0, 0.0]]), jnp.array([2.0])
        >>> [round(x, 4) for x in prox.affine_set(jnp.array([3.0, 1.0, 5.0]), (A, b)).tolist()]
        [2.0, 0.0, 5.0]
    """
    who = "prox.affine_set"
    A, b = pair(who, "(A, b)", parameter)
    entries, structure = flatten(who, v)
    results = []
    for (path, leaf), own_A, own_b in zip(entries, spread(who, "A", A, v), spread(who, "b", b, v), strict=True):
        at = jax.tree_util.keystr(path)
        x, own_A, own_b = _system(who, at, ("A", "b"), leaf, own_A, own_b)
        y = _solve_rows(_to_affine, x, own_A, own_b)
        results.append(y.astype(jnp.result_type(leaf)).reshape(jnp.shape(leaf)))
    return jax.tree.unflatten(structure, results)


def polyhedron(
    v: PyTree[ArrayLike], parameter: PyTree[ArrayLike], step_size: object = 1.0
) -> PyTree[Float[Array, "..."]]:
    """Return the projection of each row onto {x: A x = b, G x <= h}.

    For any set that linear constraints describe; small quadratic programs with an identity Hessian. The constraints
    that hold with equality are found by an inner method; given them x is the projection onto an affine set, and so is
    its derivative. What comes out is checked against all constraints and against the inner method's own point. h is the
    indicator of the polyhedron, so that the step size plays no part.

    Shapes: v [..., n], any tree of these; A [m, n] and G [k, n], or with leading axes, one for each row; b and h are
        scalars or broadcast to [..., m] and [..., k]; or trees of these that are prefixes of v.
    Args:
        v: tree of floating-point arrays.
        parameter: (A, b, G, h); None for both A and b where there are no equations; redundant constraints do no harm,
            and h = inf is no constraint.
        step_size: ignored.
    Returns: a tree like v; NaN, and a derivative of NaN, in a row where the polyhedron is empty, the result violates a
        constraint by more than 10 rounding units of its terms, or the inner method did not confirm it, as may be in
        float32 where there are many constraints.
    Raises: TypeError where a leaf of v is not real floating-point, or a member of the parameter not a real number;
        ValueError where parameter has not four members, or the structure or shape of one does not fit v.
    At kinks: a constraint that holds with equality but is not needed (its multiplier is zero) counts as absent.
    Cost: some tens of Newton steps, each a linear system; one singular value decomposition of the active constraints.
    Source: proximal points of the dual, Rockafellar, 1976, each found by a semismooth Newton method, Li, Sun and Toh,
        2020.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> G, h = jnp.array([[1.0, 1.0], [-1.0, 0.0]]), jnp.array([1.0, 0.0])
        >>> [round(x, 4) for x in prox.polyhedron(jnp.array([1.0, 2.0]), (None, None, G, h)).tolist()]
        [0.0, 1.0]
    """
    who = "prox.polyhedron"
    if not (isinstance(parameter, tuple | list) and len(parameter) == 4):
        raise ValueError(
            f"{who} needs parameter = (A, b, G, h); it is {describe(parameter)}; pass a tuple of four, the first two "
            "None where there are no equations."
        )
    A, b, G, h = parameter
    if (A is None) != (b is None):
        raise ValueError(f"{who} needs both of A and b, or neither; one is None; pass (None, None, G, h) or both.")
    entries, structure = flatten(who, v)
    nothing = [None] * len(entries)
    equations = (
        zip(nothing, nothing, strict=True)
        if A is None
        else zip(spread(who, "A", A, v), spread(who, "b", b, v), strict=True)
    )
    inequalities = zip(spread(who, "G", G, v), spread(who, "h", h, v), strict=True)
    results = []
    for (path, leaf), (own_A, own_b), (own_G, own_h) in zip(entries, equations, inequalities, strict=True):
        at = jax.tree_util.keystr(path)
        if own_A is None:
            n = (jnp.shape(leaf) or (1,))[-1]
            own_A, own_b = jnp.zeros((0, n), jnp.float32), jnp.zeros(0, jnp.float32)
        x, own_A, own_b = _system(who, at, ("A", "b"), leaf, own_A, own_b)
        _, own_G, own_h = _system(who, at, ("G", "h"), leaf, own_G, own_h)
        y = _solve_rows(_to_polyhedron, x, own_A, own_b, own_G, own_h)
        results.append(y.astype(jnp.result_type(leaf)).reshape(jnp.shape(leaf)))
    return jax.tree.unflatten(structure, results)


# ---- one vector ----------------------------------------------------------------------------------------------------


def _with_normals(who: str, v: PyTree, normal: PyTree) -> tuple[list[Array], list[Array], Array, Any]:
    """The leaves of v, those of a in units of its largest entry, that unit, and the way back to the tree."""
    entries, structure = flatten(who, v)
    dtypes = [jnp.result_type(leaf) for _, leaf in entries]
    dtype = widest(*dtypes)
    xs = [jnp.asarray(leaf, dtype) for _, leaf in entries]
    normals = [
        jnp.broadcast_to(fit(who, "a" + jax.tree_util.keystr(path), a, dtype, x.shape, signed=True), x.shape)
        for (path, _), a, x in zip(entries, spread(who, "a", normal, v), xs, strict=True)
    ]
    # a and b may be in any unit: this one keeps the squares in range
    peaks = [jnp.max(jnp.abs(jax.lax.stop_gradient(a)), initial=0) for a in normals]
    peak = functools.reduce(jnp.maximum, peaks, jnp.zeros((), dtype))
    unit = jnp.where((peak > 0) & (peak < jnp.inf), peak, 1)
    normals = [a / unit for a in normals]

    def back(ys: list[Array]) -> PyTree:
        return jax.tree.unflatten(structure, [y.astype(own) for y, own in zip(ys, dtypes, strict=True)])

    return xs, normals, unit, back


def _products(xs: list[Array], normals: list[Array]) -> tuple[Array, Array]:
    inner = sum((jnp.sum(a * x) for a, x in zip(normals, xs, strict=True)), jnp.zeros((), xs[0].dtype if xs else None))
    square = sum((jnp.sum(a * a) for a in normals), jnp.zeros((), xs[0].dtype if xs else None))
    return inner, square


def _across(who: str, v: PyTree, parameter: Any, counted: Any) -> PyTree:
    """v less what `counted` says of its excess over the hyperplane."""
    normal, level = pair(who, "(a, b)", parameter)
    xs, normals, unit, back = _with_normals(who, v, normal)
    dtype = xs[0].dtype if xs else jnp.float32
    level = fit(who, "b", level, dtype, (), signed=True)
    if not xs:
        return v
    inner, square = _products(xs, normals)
    zero = square == 0
    excess = counted(inner - level / unit)
    along = jnp.where(zero, 0, excess) / jnp.where(zero, 1, square)
    there = ~zero | (excess == 0)
    return back([nan_unless(there, x - a * along, x, a, level) for x, a in zip(xs, normals, strict=True)])


def _system(who: str, at: str, names: tuple[str, str], leaf: Any, matrix: Any, side: Any) -> tuple[Array, Array, Array]:
    """The leaf as [..., n], the matrix and the right side in its dtype, checked to fit."""
    x = jnp.atleast_1d(jnp.asarray(leaf, widest(jnp.result_type(leaf))))
    shape = jnp.shape(matrix)
    if len(shape) < 2 or shape[-1] != x.shape[-1]:
        raise ValueError(
            f"{who} needs {names[0]}{at} of shape [..., m, {x.shape[-1]}], a column for each entry of a row of v; it "
            f"is {describe(matrix)}; transpose or reshape it."
        )
    batch = x.shape[:-1]
    matrix = fit(who, names[0] + at, matrix, x.dtype, (*batch, *shape[-2:]), signed=True)
    side = fit(who, names[1] + at, side, x.dtype, (*batch, shape[-2]), signed=True)
    return x, matrix.reshape(shape), side


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _solve_rows(project: Any, x: Array, *systems: Array) -> Array:
    """`project(x, *systems)` row by row; what all rows share is not copied."""
    if not x.size:
        return x
    batch, axes, flat = x.shape[:-1], [], []
    for i, value in enumerate(systems):
        core = 1 if i % 2 else 2
        own = systems[i - 1].shape[-2:-1] if i % 2 else value.shape[-2:]
        shared = value.ndim <= core
        axes.append(None if shared else 0)
        whole = own if shared else (math.prod(batch), *own)
        flat.append(jnp.broadcast_to(value, own if shared else (*batch, *own)).reshape(whole))
    return jax.vmap(project, in_axes=(0, *axes))(x.reshape(-1, x.shape[-1]), *flat).reshape(x.shape)


def _to_affine(x: Array, A: Array, b: Array) -> Array:
    if 0 in A.shape:
        return x
    unit = power_of_two(jnp.max(jnp.abs(jax.lax.stop_gradient(A)), axis=1))  # each equation has a unit of its own
    A, b = A / unit[:, None], b / unit
    inverse = jnp.linalg.pinv(A, rtol=4 * jnp.finfo(x.dtype).eps * max(A.shape) ** 0.5)
    x = x - inverse @ (A @ x - b)
    return x - inverse @ (A @ x - b)  # once more, against rounding


def _to_polyhedron(x: Array, A: Array, b: Array, G: Array, h: Array) -> Array:
    if not A.shape[0] + G.shape[0]:
        return x
    held = jax.lax.stop_gradient((x, A, b, G, h))
    active, near, reach = _active(*held)
    held_G, held_h = jnp.where(active[:, None], G, 0), jnp.where(active, h, 0)
    y = _to_affine(x, jnp.concatenate([A, held_G]), jnp.concatenate([b, held_h]))
    # Feasible, and where the dual says: a point that is both is the projection.
    miss = jnp.max(jnp.abs(jax.lax.stop_gradient(y) - near))
    eps = jnp.finfo(x.dtype).eps
    sound = miss <= 1000 * eps * max(active.size, x.size) ** 0.5 * reach + 10 * eps * jnp.max(jnp.abs(held[0]))
    return nan_unless(sound & _satisfies(held[0], jax.lax.stop_gradient(y), *held[1:]), y, x, A, b, G, h)


def _satisfies(x: Array, y: Array, A: Array, b: Array, G: Array, h: Array) -> Array:
    slack = 10 * jnp.finfo(y.dtype).eps
    size = jnp.maximum(jnp.abs(x), jnp.abs(y))  # y is x and a move, and has the rounding of both

    def allowed(matrix: Array, side: Array) -> Array:
        return slack * (jnp.abs(matrix) @ size + jnp.where(jnp.isfinite(side), jnp.abs(side), 0))

    equal = jnp.abs(A @ y - b) <= allowed(A, b)
    return jnp.all(equal) & jnp.all(G @ y - h <= allowed(G, h)) & ~jnp.any(jnp.isnan(G))


def _active(x: Array, A: Array, b: Array, G: Array, h: Array) -> tuple[Array, Array, Array]:
    """Which inequalities the projection needs, those with a positive multiplier; the projection; its distance from x.

    By proximal points of the dual, around x, for rows of length 1, in units of the largest violation.
    """
    rows, sides = jnp.concatenate([A, G]), jnp.concatenate([b, h])
    lengths = norm([rows], axis=1)[:, 0]
    idle = (lengths == 0) | ~jnp.isfinite(sides)
    lengths = jnp.where(idle, 1, lengths)
    rows = jnp.where(idle[:, None], 0, rows / lengths[:, None])
    room = jnp.where(idle, 0, sides / lengths - rows @ x)
    equal = jnp.arange(sides.size) < b.size
    unit = magnitude(jnp.where(equal, room, jnp.minimum(room, 0)))
    room = room / unit

    def project(p: Array) -> Array:
        return jnp.where(equal | (p > 0), p, 0)

    def solve(p: Array, sigma: Array, r: Array) -> Array:
        used = jnp.where((equal | (p > 0))[:, None], rows, 0)
        if sides.size <= x.size:
            inner = jnp.eye(sides.size, dtype=x.dtype) / sigma + used @ used.T
            return r - used.T @ jax.scipy.linalg.solve(inner, used @ r, assume_a="pos")
        return jax.scipy.linalg.solve(jnp.eye(x.size, dtype=x.dtype) + sigma * (used.T @ used), r, assume_a="pos")

    penalty = Penalty(lambda z: rows @ z, room, lambda u: rows.T @ u, project, solve)
    point = proximal_point(jnp.zeros_like(x), jnp.zeros_like(sides), penalty)
    return (point.p > 0)[b.size :] & ~idle[b.size :], x + unit * point.x, unit * norm([point.x])
