"""Implicit differentiation of sparse solutions: the linear system of the support alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .. import _tree
from .._checks import count, describe, is_a, is_callable, leaf_name
from .._moving import hoisted, moving
from .._types import Status, Theta, X
from ..linear import LinearInfo, LinearSolver, cg, differentiable_solve, gmres
from ..operators import as_operator
from ..operators._operator import displacement
from ..solvers import Adjoint, Solution, Solver
from ._failure import adjoint_failed, check_policy, facts_of, reported, solve_failed, teller, watched
from ._implicit import check_operator, negligible, reach, settled


def on_support(
    solver: Solver[X, Theta],
    capacity: int,
    linear_solver: LinearSolver | None = None,
    *,
    active: Callable[[X, Theta], Any] | None = None,
    rows: bool = False,
    restrict: Callable[..., Any] | None = None,
    symmetric: bool = False,
    on_failure: str = "warn",
) -> Solver[X, Theta]:
    r"""Returns the solver differentiated at its solution through the entries of its support alone.

    .. math:: dx_{\bar S} = (\partial_\theta T\, d\theta)_{\bar S}, \qquad
        (I - \partial_{x_S} T_S)\, dx_S = \partial_\theta T_S\, d\theta + \partial_{x_{\bar S}} T_S\, dx_{\bar S}

    The support S is gathered into vectors of a fixed length, the capacity; what is left over is filled with rows of the
    identity. It is exact, not an approximation, as long as the rows of :math:`\partial_x T` off the support are zero:
    so they are wherever a proximal operator holds an entry at zero, or at a bound, strictly. Then only a system of the
    size of the support is solved, whose condition is that of the support; for the l1 norm and the elastic net it is
    symmetric positive definite, and conjugate gradients may solve it where those of ``implicit`` are refused. Forward
    and reverse mode, Hessians, ``vmap``, ``jit`` and captured tracers work as for ``implicit``.

    When: sparse solutions (lasso, elastic net, group lasso, sparse logistic regression) and bounds that hold (dual
    support vector machines). Zeros must be exact: proximal gradient steps set them; after relaxed steps, or those of
    another splitting, say with ``active`` what counts as one. At a kink (an entry that is about to enter or leave)
    there is no derivative: ``odl.diagnostics.kinks`` looks for it.

    Shapes: x any pytree of n numbers in all; vectors on the support (capacity,), in the widest dtype of the leaves. If
    the leaves have several dtypes, the rounding of the narrow ones may be reported as a failed solve.

    Args:
        solver: from ``for_steps`` or ``until_converged``; its iteration needs an operator.
        capacity: the most entries that the support may have, at least 1, static; cut to n. A support that does not fit
            makes the derivative NaN and the status NON_FINITE, with a warning under plain ``jax.grad``.
        linear_solver: from ``odl.linear``. Default: conjugate gradients if ``symmetric``, else GMRES.
        active: ``(x, theta) -> mask``, booleans like x: the entries that move freely, such as ``(0 < x) & (x < C)`` in
            a box. Off it an entry moves by :math:`\partial_\theta T` alone. None: the entries that are not zero.
        rows: whether the support consists of whole rows along the last axis (the groups of ``prox.group_lasso``), of
            which one active entry makes all active.
        restrict: ``indices -> T_S``, the problem on the support alone: a function or operator ``(x_S, theta) -> x_S``
            with the same x_S where T has x, for instance from the columns ``A[:, indices]``. The indices count the
            entries of x in their order when flattened, leaf after leaf; those left over are 0, and x_S is zero there,
            whatever T_S makes of it. With ``active`` it is ``(indices, rest) -> T_S``, rest being x with zeros on the
            support. None: T itself, of which the rows and columns of the support are taken.
        symmetric: declares that :math:`I - \partial_{x_S} T_S` is symmetric positive definite: true for proximal
            gradient steps on the l1 norm, the elastic net and boxes, and for the gradient of a loss that is smooth on
            the support; not for groups under ``prox.group_lasso``.
        on_failure: what a failed solve does to a derivative, as in ``implicit``.

    Returns:
        A solver with the same solutions; all fields but x carry no derivative. ``through`` and ``warm_started`` report
        the adjoint solve; its vector is full-size, zero off the support, so a support may change between two updates.

    Raises:
        TypeError: the iteration has no operator; ``solver`` or ``linear_solver`` is none; conjugate gradients without
            ``symmetric``; functions of other arguments; at trace time, a mask that is not like x, a T_S that changes
            shape or dtype.
        ValueError: a capacity below 1, an unknown ``on_failure``.

    Cost: one linear solve a derivative direction on vectors of the capacity. Each product is one Jacobian product of T
    or, with ``restrict``, of T_S: for least squares with N samples 2 N capacity numbers in place of 2 N n. Without
    ``restrict`` or with ``active``, two Jacobian products of T beside, and one that looks whether entries off the
    support react to x, in which case the status is STALLED; ``restrict`` alone is taken at its word.

    Source: Bertrand et al. (2022), for separable penalties; at partly smooth points in general: Vaiter et al. (2017);
    what is left at kinks: Bolte et al. (2021).

    Example:
        >>> import jax, jax.numpy as jnp, odljax as odl
        >>> A, b = jnp.array([[2.0, 0.5, 0.0], [0.0, 1.0, 0.1]]), jnp.array([4.0, 0.1])
        >>> def lasso(A):
        ...     loss = lambda x, lam: 0.5 * jnp.sum((A @ x - b) ** 2)
        ...     return odl.proximal_gradient(loss, odl.prox.l1, step_size=0.2)
        >>> solver = odl.on_support(
        ...     odl.until_converged(lasso(A), tol=1e-5, max_steps=200), capacity=2, symmetric=True,
        ...     restrict=lambda indices: lasso(A[:, indices]).operator)
        >>> [round(float(entry), 3) for entry in jax.jacobian(lambda lam: solver(jnp.zeros(3), lam).x)(2.0)]
        [-0.25, 0.0, 0.0]
    """
    operator = check_operator("on_support", solver)
    capacity = count("on_support", "capacity", capacity)
    if linear_solver is None:
        linear_solver = cg() if symmetric else gmres()
    is_a("on_support", "linear_solver", linear_solver, LinearSolver, "Make one with odl.linear, for instance cg().")
    if linear_solver.symmetric and not symmetric:
        raise TypeError(
            f"on_support: {linear_solver.name} needs a symmetric positive-definite system, and that of the support is "
            f"not declared to be one. Use gmres, bicgstab or neumann, or pass symmetric=True if it is."
        )
    if active is not None:
        is_callable("on_support", "active", active, "x, theta")
    if restrict is not None:
        is_callable("on_support", "restrict", restrict, "indices" if active is None else "indices, rest")
    check_policy("on_support", on_failure)
    problem = _Problem(partial(displacement, operator), active, rows, restrict, capacity, linear_solver, symmetric)

    return _on_support(solver, problem, on_failure)


def _on_support(solver: Solver, problem: _Problem, on_failure: str) -> Solver:
    def solve(x0: X, theta: Theta) -> Solution:
        theta = watched("on_support", on_failure, solver.iteration, x0, theta)
        solution = settled(solver, x0, theta)
        return solution._replace(x=_attach(problem, on_failure, x0, solution, theta))

    return dataclasses.replace(
        solver,
        solve=solve,
        derivative="on_support",
        adjoint=Adjoint(partial(_pull_back, problem)),
        differentiate=None,
        quiet=None if on_failure == "ignore" else _on_support(solver, problem, "ignore"),
    )


class _Support(NamedTuple):
    """Where the support is: indices of its entries, which of them count, what is off it, and how many there are."""

    indices: Array
    valid: Array
    off: Array
    size: Array


class _Problem(NamedTuple):
    """What on_support was told."""

    direct: Callable[[Any, Any], Any]
    active: Callable[[Any, Any], Any] | None
    rows: bool
    restrict: Callable[..., Any] | None
    capacity: int
    linear_solver: LinearSolver
    symmetric: bool

    @property
    def moves_off(self) -> bool:
        """Whether entries off the support may move: those at zero do not, and a restriction need not see T."""
        return self.restrict is None or self.active is not None

    def support(self, x: Any, theta: Any) -> _Support:
        """The support at x, which has no derivative."""
        x, theta = jax.lax.stop_gradient((x, theta))
        mask = jax.tree.map(lambda leaf: leaf != 0, x) if self.active is None else self.active(x, theta)
        _check_mask(mask, x)
        if self.rows:
            mask = jax.tree.map(_whole_rows, mask)
        flat = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(mask)])
        length = min(self.capacity, flat.size)
        (indices,) = jnp.nonzero(flat, size=length, fill_value=0)
        size = jnp.sum(flat, dtype=indices.dtype)
        return _Support(indices, jnp.arange(length, dtype=size.dtype) < size, ~flat, size)

    def system(self, x_S: Array, theta: Any, rest: Any, indices: Array, valid: Array) -> Array:
        """What vanishes at the solution's entries on the support; the identity in the places left over."""
        inside = jnp.where(valid, x_S, 0)
        if self.restrict is None:
            x = _tree.add(_scattered(indices, inside, rest), rest)
            left = _flat(self.direct(x, theta))[indices]
        else:
            given = (indices,) if self.active is None else (indices, rest)
            left = displacement(as_operator(self.restrict(*given)), inside, theta)
        return jnp.where(valid, left, x_S)


def _attach(problem: _Problem, on_failure: str, x0: Any, solution: Solution, theta: Any) -> Any:
    """``x`` with the derivative on the support, in theta and in the tracers that the functions close over."""
    x, tell = solution.x, None if on_failure == "ignore" else _teller(on_failure, problem.capacity)
    support = problem.support(x, theta)
    direct, captured = hoisted(problem.direct, x, theta)
    start = (_gathered(support, x), theta, _off(support, x), support.indices, support.valid)
    system, captured_on = hoisted(problem.system, *start)

    def tangent(x: Any, operands: Any, tangents: Any) -> Any:
        (theta, captured, captured_on, support, facts), (d_theta, d_captured, d_captured_on, *_) = operands, tangents
        x_S, rest = _gathered(support, x), _off(support, x)
        d_rest, leak = _tree.zeros_like(x), jnp.zeros((), _tree.accumulation_dtype(x))
        if problem.moves_off:
            at_x = lambda theta, captured: direct(x, theta, *captured)  # noqa: E731
            _, moved = jax.jvp(at_x, (theta, captured), (d_theta, d_captured))
            d_rest = _off(support, _tree.negative(moved))
            leak = _leak(lambda x: direct(x, theta, *captured), x, support) if tell else leak

        def on(x_S: Array, theta: Any, rest: Any, captured_on: Any) -> Array:
            return system(x_S, theta, rest, support.indices, support.valid, *captured_on)

        def solve(matvec: Any, b: Any) -> Any:
            v, info = problem.linear_solver(matvec, b)
            if tell is None:
                return v
            info = _truth(info, support, leak)
            status, residual, size = facts
            adjoint = jnp.where(negligible(b, size, 1.0, residual), 0, info.status)
            full = support.size > support.indices.size
            worst = jnp.where(full, int(Status.NON_FINITE), jnp.maximum(status, adjoint))
            return reported(v, (worst, status, residual, adjoint, info.residual, support.size), tell)

        at_x_S = partial(on, x_S)
        _, moved = jax.jvp(at_x_S, (theta, rest, captured_on), (d_theta, d_rest, d_captured_on))
        _, matvec = jax.linearize(lambda x_S: on(x_S, theta, rest, captured_on), x_S)
        d_S = differentiable_solve(matvec, -moved, solve, symmetric=problem.symmetric)
        return _poisoned(support, _tree.add(_scattered(support.indices, d_S, x), d_rest))

    return moving(x, (theta, captured, captured_on, support, (*facts_of(solution), reach(x0, x))), tangent)


def _pull_back(problem: _Problem, x: Any, theta: Any, cotangent: Any, guess: Any = None) -> tuple[Any, Any, LinearInfo]:
    """The cotangent of theta, the adjoint vector, and the truth about its solve; differentiable once more."""
    support = problem.support(x, theta)

    def on(x_S: Array, theta: Any, rest: Any) -> Array:
        return problem.system(x_S, theta, rest, support.indices, support.valid)

    x_S, rest = _gathered(support, x), _off(support, x)
    _, pull = jax.vjp(lambda x_S: on(x_S, theta, rest), x_S)  # what the loop repeats: nothing of the size of theta
    guess = None if guess is None else jax.lax.stop_gradient(_gathered(support, guess))
    w, info = differentiable_solve(
        lambda v: pull(v)[0],
        _gathered(support, cotangent),
        lambda matvec, b: problem.linear_solver(matvec, b, guess),
        symmetric=problem.symmetric,
        has_aux=True,
    )
    _, pull_others = jax.vjp(partial(on, x_S), theta, rest)
    moved, through_rest = pull_others(-w)
    leak = jnp.zeros_like(info.residual)
    if problem.moves_off:
        # What reaches an entry off the support, directly or over the support, reaches theta by that entry's own row.
        outside = _off(support, _tree.add(cotangent, through_rest))
        _, pull_direct = jax.vjp(partial(problem.direct, x), theta)
        moved = _tree.add(moved, pull_direct(_tree.negative(outside))[0])
        leak = _leak(lambda x: problem.direct(x, theta), x, support)
    adjoint = _scattered(support.indices, w, x)
    return _poisoned(support, moved), _poisoned(support, adjoint), _truth(info, support, leak)


# ---- between x and its support ---------------------------------------------------------------------------------------


def _flat(x: Any) -> Array:
    """The entries of all leaves, in their dtype if they have one in common."""
    leaves = jax.tree.leaves(x)
    common = leaves[0].dtype if len({leaf.dtype for leaf in leaves}) == 1 else _tree.accumulation_dtype(x)
    return jnp.concatenate([jnp.ravel(leaf).astype(common) for leaf in leaves])


def _split(flat: Array, like: Any) -> Any:
    """The parts of a vector in the structure and shapes of a tree, in the vector's dtype."""
    leaves, structure = jax.tree.flatten(like)
    parts = jnp.split(flat, np.cumsum([leaf.size for leaf in leaves])[:-1])
    return structure.unflatten([part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)])


def _gathered(support: _Support, x: Any) -> Array:
    return jnp.where(support.valid, _flat(x)[support.indices], 0)


def _scattered(indices: Array, v: Array, like: Any) -> Any:
    """v, which is zero in the places left over, where it belongs in a tree like the given one."""
    size = sum(leaf.size for leaf in jax.tree.leaves(like))
    parts = _split(jnp.zeros(size, v.dtype).at[indices].add(v), like)
    return jax.tree.map(lambda part, leaf: part.astype(leaf.dtype), parts, like)


def _off(support: _Support, x: Any) -> Any:
    """x off the support, zero on it."""
    return jax.tree.map(lambda off, leaf: jnp.where(off, leaf, 0), _split(support.off, x), x)


def _whole_rows(mask: Array) -> Array:
    return mask if mask.ndim == 0 else jnp.broadcast_to(jnp.any(mask, axis=-1, keepdims=True), mask.shape)


def _check_mask(mask: Any, x: Any) -> None:
    wanted, got = jax.tree.structure(x), jax.tree.structure(mask)
    if got != wanted:
        raise TypeError(f"on_support: active must return a mask like x; it came back as {got}, x is {wanted}.")
    for (path, leaf), like in zip(jax.tree_util.tree_flatten_with_path(mask)[0], jax.tree.leaves(x), strict=True):
        if jnp.shape(leaf) != like.shape or jnp.result_type(leaf) != jnp.bool_:
            raise TypeError(
                f"on_support: active must return booleans of the shape of x; leaf {leaf_name(path)} is "
                f"{describe(leaf)}, x has {describe(like)}. Compare entry by entry, as in x != 0."
            )


# ---- the truth about it ----------------------------------------------------------------------------------------------


def _poisoned(support: _Support, value: Any) -> Any:
    """NaN where the support did not fit: a part of it would pass for the whole."""
    fits = support.size <= support.indices.size
    return _tree.scale(jnp.where(fits, 1.0, jnp.nan), value)


def _leak(residual: Callable[[Any], Any], x: Any, support: _Support) -> Array:
    """How much the entries off the support react to x, along one direction that no structure favours; else zero."""
    entries = jnp.arange(support.off.size, dtype=_tree.accumulation_dtype(x))
    direction = jax.tree.map(lambda part, leaf: part.astype(leaf.dtype), _split(jnp.cos(2.4 * entries), x), x)
    _, left = jax.jvp(residual, (x,), (direction,))
    reaction = _off(support, _tree.subtract(direction, left))
    length = _tree.norm(direction)  # zero where x holds no number
    return jax.lax.stop_gradient(_tree.norm(reaction) / jnp.where(length > 0, length, jnp.ones_like(length)))


def _truth(info: LinearInfo, support: _Support, leak: Array) -> LinearInfo:
    """What is known of the solve, of the capacity and of the entries off the support, in one."""
    residual = jnp.maximum(info.residual, leak.astype(info.residual.dtype))
    status = jnp.where(leak > jnp.finfo(leak.dtype).eps ** 0.5, jnp.maximum(info.status, Status.STALLED), info.status)
    full = support.size > support.indices.size
    residual = jnp.where(full, jnp.nan, residual)
    status = jnp.where(full, Status.NON_FINITE, status).astype(info.status.dtype)
    return info._replace(residual=residual, status=status, error=jnp.where(full, jnp.nan, info.error))


def _teller(on_failure: str, capacity: int) -> Callable[..., None]:
    """Tells the host which of forward solve, capacity and adjoint solve failed."""

    def describe(worst: int, status: int, residual: float, adjoint: int, adjoint_residual: float, size: int) -> str:
        if status >= Status.STEP_BUDGET_SPENT:
            return solve_failed(status, residual)
        if size > capacity:
            return (
                f"the support has {size} entries and the capacity is {capacity}, so the derivative is NaN. "
                f"Raise the capacity, or look whether small entries ought to be zero."
            )
        hint = "; or entries off the support react to x (a kink, or a mask that leaves out entries that move)"
        return adjoint_failed(adjoint, adjoint_residual, hint)

    return teller("on_support", on_failure, describe)
