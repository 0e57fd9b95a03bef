"""Projections onto sets that linear equations and inequalities describe."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from .._types import Float, PyTree
from ._leafwise import describe, fit, flatten, pair, spread, widest


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
        parameter: (A, b); singular values below 10 max(m, n) rounding units of the largest count as zero.
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
    that hold with equality are found by a finite active-set method; given them x is the projection onto an affine set,
    and so is its derivative. h is the indicator of the polyhedron, so that the step size plays no part.

    Shapes: v [..., n], any tree of these; A [m, n] and G [k, n], or with leading axes, one for each row; b and h are
        scalars or broadcast to [..., m] and [..., k]; or trees of these that are prefixes of v.
    Args:
        v: tree of floating-point arrays.
        parameter: (A, b, G, h); None for both A and b where there are no equations; redundant constraints do no harm,
            and h = inf is no constraint.
        step_size: ignored.
    Returns: a tree like v; NaN in a row where the polyhedron is empty, or the result violates a constraint by more than
        1e-8 (float64; 1e-3 in float32) times the size of its coefficients and of v.
    Raises: TypeError where a leaf of v is not real floating-point, or a member of the parameter not a real number;
        ValueError where parameter has not four members, or the structure or shape of one does not fit v.
    At kinks: a constraint that holds with equality but is not needed (its multiplier is zero) counts as absent.
    Cost: one least-squares problem of size (n + 1, k) for each constraint that enters or leaves, 3 k + 20 at most; one
        singular value decomposition of A and one of the active constraints.
    Source: Lawson and Hanson, 1974, chapter 23: least distance programming by non-negative least squares.

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
    along = jnp.where(zero, jnp.where(excess == 0, 0, jnp.nan), jnp.where(zero, 0, excess) / jnp.where(zero, 1, square))
    return back([x - a * along for x, a in zip(xs, normals, strict=True)])


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


def _solve_rows(project: Any, x: Array, *systems: Array) -> Array:
    """`project(x, *systems)` row by row; what all rows share is not copied."""
    batch, axes, flat = x.shape[:-1], [], []
    for i, value in enumerate(systems):
        core = 1 if i % 2 else 2
        if value.ndim <= core:
            value = jnp.broadcast_to(value, (systems[i - 1].shape[-2],)) if core == 1 else value
            axes.append(None)
            flat.append(value)
        else:
            own = value.shape[-core:] if core == 2 else (systems[i - 1].shape[-2],)
            axes.append(0)
            flat.append(jnp.broadcast_to(value, (*batch, *own)).reshape(-1, *own))
    return jax.vmap(project, in_axes=(0, *axes))(x.reshape(-1, x.shape[-1]), *flat).reshape(x.shape)


def _to_affine(x: Array, A: Array, b: Array) -> Array:
    if 0 in A.shape:
        return x
    inverse = jnp.linalg.pinv(A)
    x = x - inverse @ (A @ x - b)
    return x - inverse @ (A @ x - b)  # once more, against rounding


def _to_polyhedron(x: Array, A: Array, b: Array, G: Array, h: Array) -> Array:
    active, ended = _active(*jax.lax.stop_gradient((x, A, b, G, h)))
    known = jnp.isfinite(h)
    held_G, held_h = jnp.where(active[:, None], G, 0), jnp.where(active, jnp.where(known, h, 0), 0)
    y = _to_affine(x, jnp.concatenate([A, held_G]), jnp.concatenate([b, held_h]))
    return jnp.where(ended & _satisfies(*jax.lax.stop_gradient((x, y, A, b, G, h))), y, jnp.nan)


def _satisfies(x: Array, y: Array, A: Array, b: Array, G: Array, h: Array) -> Array:
    slack = 1e-8 if y.dtype.itemsize == 8 else 1e-3
    largest = jnp.max(jnp.maximum(jnp.abs(x), jnp.abs(y)))  # an entry that ought to be 0 has the rounding of the others

    def size(matrix: Array, side: Array) -> Array:
        return jnp.sum(jnp.abs(matrix), axis=1) * largest + jnp.abs(side) + jnp.finfo(y.dtype).tiny

    equal = jnp.abs(A @ y - b) <= slack * size(A, b)
    below = G @ y - h <= slack * size(G, jnp.where(jnp.isfinite(h), h, 0))
    return jnp.all(equal) & jnp.all(below) & ~jnp.any(jnp.isnan(G)) & ~jnp.any(jnp.isnan(A))


def _active(x: Array, A: Array, b: Array, G: Array, h: Array) -> tuple[Array, Array]:
    """Which inequalities the projection needs: those with a positive multiplier, linearly independent of one another.

    And whether the search has ended.

    In the null space of A, from the nearest point of A x = b, and in units of the largest violation, the question is
    min |z| subject to G z <= h: z = r_x / r_1 with r the residual of min |E u - (0, 1)| over u >= 0, E = (G, h)' up to
    sign.
    """
    start, whole = _to_affine(x, A, b), jnp.sqrt(jnp.sum(G * G, axis=1))
    left = jnp.where(jnp.isfinite(h), h, 0) - G @ start
    if 0 not in A.shape:
        G = G - (G @ jnp.linalg.pinv(A)) @ A
    lengths = jnp.sqrt(jnp.sum(G * G, axis=1))
    # A row that A has already settled is no row, up to the rounding of what it has lost.
    idle = ~(lengths > 100 * jnp.finfo(x.dtype).eps * whole) | ~jnp.isfinite(h)
    lengths = jnp.where(idle, 1, lengths)
    normals = jnp.where(idle[:, None], 0, G / lengths[:, None])
    room = jnp.where(idle, 0, left / lengths)
    unit = jnp.max(-room, initial=0)
    columns = jnp.concatenate([-normals.T, -(room / jnp.where(unit > 0, unit, 1))[None]])
    goal = jnp.zeros(x.size + 1, x.dtype).at[-1].set(1)
    used, done = _non_negative_least_squares(columns, goal, ~idle)
    return used & (unit > 0), done


def _non_negative_least_squares(E: Array, f: Array, allowed: Array) -> tuple[Array, Array]:
    """The columns that min |E u - f| over u >= 0 uses, and whether the search has ended (Lawson and Hanson, 1974)."""
    k = E.shape[1]
    eps = jnp.finfo(E.dtype).eps
    noise = 10 * eps * max(E.shape) * jnp.max(jnp.sum(jnp.abs(E), axis=0), initial=0)

    def least_squares(used: Array) -> Array:
        # unit rows for the columns that are not used make the matrix one of full rank
        matrix = jnp.concatenate([jnp.where(used, E, 0), jnp.diag(jnp.where(used, 0, jnp.ones_like(f, shape=k)))])
        q, r = jnp.linalg.qr(matrix)
        right = q.T @ jnp.concatenate([f, jnp.zeros(k, f.dtype)])
        return jnp.where(used, jax.scipy.linalg.solve_triangular(r, right), 0)

    class Search(NamedTuple):
        used: Array
        u: Array
        settled: Array  # u solves the least-squares problem of the columns used; else columns are still leaving
        refused: Array  # columns that only rounding would let in
        moves: Array
        done: Array

    def running(search: Search) -> Array:
        return (search.moves < 3 * k + 20) & ~search.done

    def body(search: Search) -> Search:
        slope = jnp.where(search.used | search.refused | ~allowed, -jnp.inf, E.T @ (f - E @ search.u))
        enters = (jnp.arange(k) == jnp.argmax(slope)) & search.settled
        done = search.settled & ~(jnp.max(slope) > noise)
        used = search.used | enters
        target = least_squares(used)
        refused = jnp.any(enters & ~(target > 0))
        leaves = used & ~(target > 0)
        ratio = jnp.where(leaves, search.u / jnp.where(leaves, search.u - target, 1), jnp.inf)
        t = jnp.min(ratio)
        settled = ~jnp.any(leaves)
        u = jnp.where(settled, target, search.u + jnp.minimum(t, 1) * (target - search.u))
        kept = used & ~(leaves & (ratio <= t))
        stays = done | refused
        return Search(
            jnp.where(stays, search.used, kept),
            jnp.where(stays, search.u, jnp.where(kept, u, 0)),
            stays | settled,
            jnp.where(refused, search.refused | enters, search.refused & ~settled),
            search.moves + 1,
            done,
        )

    none, no = jnp.zeros(k, bool), jnp.zeros((), bool)
    if k == 0:
        return none, ~no
    search = jax.lax.while_loop(running, body, Search(none, jnp.zeros(k, E.dtype), ~no, none, jnp.zeros((), int), no))
    return search.used, search.done
