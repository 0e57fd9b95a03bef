"""Differentiation through the steps by forward accumulation: the Jacobian travels with the iterate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero

from .._checks import is_a
from .._types import Theta, X
from ..solvers import Solution, Solver, for_steps, until_converged
from ._moving import hoisted


def forward(solver: Solver[X, Theta]) -> Solver[X, Theta]:
    r"""Returns the solver differentiated through all its steps in one forward pass, whatever mode asks.

    .. math:: Z_0 = \frac{d x_0}{d \theta}, \qquad Z_{k+1} = \partial_x \Phi_k(x_k, \theta)\, Z_k
        + \partial_\theta \Phi_k(x_k, \theta), \qquad \frac{d x_K}{d \theta} = Z_K

    The Jacobian :math:`Z_k` travels with the iterate, one column a number that is differentiated: entries of theta, of
    the start x0, and of tracers that the iteration closes over, each only where a derivative is asked for. Reverse mode
    transposes the finished Jacobian, not the steps, so it works for a loop that stops by itself, too. Forward mode and
    derivatives of any order work: the Jacobian is accumulated in the same way.

    When: few hyperparameters and many steps. The derivative is that of ``unrolled``.

    Args:
        solver: from ``for_steps`` or ``until_converged``, or another derivative of one.

    Returns:
        A solver with the same solutions; all fields but x carry no derivative.

    Raises:
        TypeError: ``solver`` is none.

    Cost: for p numbers that are differentiated, the steps and p Jacobian products of each, memory p + 1 iterates and
    states, whatever the number of steps; a derivative of order n accumulates :math:`p^n` products.

    Source: Griewank and Walther (2008), chapter 3; Franceschi et al. (2017), algorithm 2.

    Example:
        >>> import jax, odljax as odl
        >>> line = odl.fixed_point(lambda x, theta: 0.5 * x + theta)
        >>> solver = odl.forward(odl.until_converged(line, tol=1e-5, max_steps=100))
        >>> round(float(jax.grad(lambda theta: solver(0.0, theta).x)(1.0)), 3)
        2.0
    """
    is_a("forward", "solver", solver, Solver, "Make one with for_steps or until_converged.")
    bare = _bare(solver)

    def run(x0: X, theta: Theta) -> tuple[X, Any]:
        solution = bare.solve(x0, theta)
        return solution.x, solution._replace(x=None)

    def solve(x0: X, theta: Theta) -> Solution:
        function, captured = hoisted(run, x0, theta)
        x, rest = _accumulated(function, (x0, theta, *captured))
        return rest._replace(x=x)

    return dataclasses.replace(solver, solve=solve, derivative="forward", adjoint=None, differentiate=forward)


def _bare(solver: Solver) -> Solver:
    """The solver without a derivative transform."""
    options = {"history": solver.history, "record": solver.record}
    if solver.tolerance is None:
        return for_steps(solver.iteration, solver.num_steps, **options)
    tol, relative_tol = solver.tolerance
    return until_converged(solver.iteration, tol=tol, relative_tol=relative_tol, max_steps=solver.num_steps, **options)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _accumulated(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    """``function(*arguments)``, a pair of what is differentiated, by forward accumulation, and of what is not."""
    return function(*arguments)


@partial(_accumulated.defjvp, symbolic_zeros=True)
def _accumulated_jvp(function: Any, primals: Any, tangents: Any) -> Any:
    structure = jax.tree.structure(primals[0])
    # A symbolic zero is an argument in which no derivative is asked for: it costs no column.
    flat = enumerate(jax.tree.leaves(tangents[0]))
    moving = {i: jnp.asarray(t, t.dtype) for i, t in flat if not isinstance(t, SymbolicZero)}

    def with_jacobian(*arguments: Any) -> Any:
        leaves = jax.tree.leaves(arguments)

        def along(*moved: Any) -> Any:
            all_leaves = list(leaves)
            for i, leaf in zip(moving, moved, strict=True):
                all_leaves[i] = leaf
            return function(*jax.tree.unflatten(structure, all_leaves))

        at = [jnp.asarray(leaves[i], t.dtype) for i, t in moving.items()]
        push = lambda direction: jax.jvp(along, at, direction, has_aux=True)  # noqa: E731
        y, jacobian, rest = jax.vmap(push, out_axes=(None, 0, None))(_basis(at))
        return (y, jacobian), rest

    # Through _accumulated again: a second derivative accumulates the Jacobian's Jacobian, and transposes no loop.
    (y, jacobian), rest = _accumulated(with_jacobian, primals[0])
    tangent = jax.tree.map(lambda columns: _combine(columns, list(moving.values())), jacobian)
    return (y, rest), (tangent, jax.tree.map(_no_tangent, rest))


def _basis(leaves: list[Array]) -> list[Array]:
    """One unit tangent an entry of the leaves, along a new leading axis."""
    total, first, basis = sum(leaf.size for leaf in leaves), 0, []
    for leaf in leaves:
        unit = jnp.eye(total, leaf.size, -first, leaf.dtype)
        basis.append(unit.reshape(total, *leaf.shape))
        first += leaf.size
    return basis


def _combine(columns: Array, tangents: list[Array]) -> Array:
    """The Jacobian times the tangents; product, then sum: a contraction over a sharded axis is ambiguous."""
    weights = jnp.concatenate([t.ravel().astype(columns.dtype) for t in tangents])
    return jnp.sum(columns * weights.reshape(-1, *(1,) * (columns.ndim - 1)), axis=0)


def _no_tangent(leaf: Any) -> Any:
    floating = jnp.issubdtype(leaf.dtype, jnp.inexact)
    return jnp.zeros_like(leaf) if floating else np.zeros(leaf.shape, jax.dtypes.float0)
