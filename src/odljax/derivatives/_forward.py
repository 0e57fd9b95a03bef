"""Differentiation through the steps by forward accumulation: the Jacobian travels with the iterate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .. import _tree
from .._checks import coupling, is_a, uncoupled
from .._moving import Hoisted, hoisted, recomputed
from .._types import Status, Theta, X
from ..iterations import Iteration
from ..solvers import Solution, Solver, for_steps
from ..solvers._solver import stopping, stopping_loop
from ._failure import check_policy, with_alarm


def forward(solver: Solver[X, Theta], *, on_failure: str = "warn") -> Solver[X, Theta]:
    r"""Returns the solver differentiated through all its steps in one forward pass, whatever mode asks.

    .. math:: Z_0 = \frac{d x_0}{d \theta}, \qquad Z_{k+1} = \partial_x \Phi_k(x_k, \theta)\, Z_k
        + \partial_\theta \Phi_k(x_k, \theta), \qquad \frac{d x_K}{d \theta} = Z_K

    The Jacobian :math:`Z_k` travels with the iterate, one column a number that is differentiated: entries of theta, of
    the start x0, and of tracers that the iteration closes over, each only where a derivative is asked for. Reverse mode
    transposes the finished Jacobian, not the steps, so it works for a loop that stops by itself, too. Forward mode and
    derivatives of any order work: the Jacobian is accumulated in the same way.

    When: few hyperparameters and many steps. The derivative is that of ``unrolled``.

    Args:
        solver: from ``for_steps`` or ``until_converged``, or another derivative of one. As in ``unrolled`` the latter
            takes one step at least.
        on_failure: what a solve that diverged, or worse, does to a derivative, as in ``unrolled``.

    Returns:
        A solver with the same solutions; all fields but x carry no derivative.

    Raises:
        TypeError: ``solver`` is none.
        ValueError: an unknown ``on_failure``.

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

    def run(x0: X, theta: Theta) -> tuple[X, Any]:
        solution = _steps(solver, x0, theta)
        return solution.x, solution._replace(x=None)

    def solve(x0: X, theta: Theta) -> Solution:
        function, captured = hoisted(run, x0, theta)
        refuse = partial(_alone, solver.iteration, function, x0, theta)
        x, rest = _accumulated(function, (x0, theta, *captured), refuse)
        return rest._replace(x=x)

    again = partial(forward, on_failure=on_failure)
    steps = dataclasses.replace(solver, solve=solve, derivative="forward", adjoint=None, differentiate=again)
    return with_alarm(steps, check_policy("forward", on_failure), Status.STALLED)


def _steps(solver: Solver, x0: Any, theta: Any) -> Solution:
    """The solver's steps, without a derivative transform."""
    if solver.tolerance is None:
        bare = for_steps(solver.iteration, solver.num_steps, history=solver.history, record=solver.record)
        return bare.solve(x0, theta)
    options = (solver.iteration, solver.tolerance, solver.num_steps, solver.history, solver.record)
    loop = stopping(*options, x0, theta, differentiated=True)
    return stopping_loop(*loop, solver.num_steps if solver.history else 0)


def _alone(iteration: Iteration, function: Hoisted, x0: Any, theta: Any) -> None:
    """Refuses steps that tell other elements of a vmapped axis of what moves: a column has no tangent of theirs."""
    if coupling(function.jaxpr.effects):
        start = (x0, iteration.init(x0, theta), theta, jnp.zeros((), int))
        jaxpr = jax.make_jaxpr(iteration.step)(*start).jaxpr
        uncoupled(f"forward({iteration.name})", jaxpr, len(jaxpr.invars))


def _accumulated(
    function: Callable[..., Any], operands: tuple[Any, ...], refuse: Callable[[], None]
) -> tuple[Any, Any]:
    """``function(*operands)``, a pair of what is differentiated, by forward accumulation, and of what is not."""
    structure = jax.tree.structure(operands)
    y, rest = jax.lax.stop_gradient(function(*jax.lax.stop_gradient(operands)))

    def rule(y: Any, operands: Any, tangents: list[Any]) -> Any:
        refuse()
        moving = {i: t for i, t in enumerate(tangents) if t is not None}

        def with_jacobian(*operands: Any) -> Any:
            leaves = jax.tree.leaves(operands)

            def along(*moved: Any) -> Any:
                all_leaves = list(leaves)
                for i, leaf in zip(moving, moved, strict=True):
                    all_leaves[i] = leaf
                return function(*jax.tree.unflatten(structure, all_leaves))

            at = [jnp.asarray(leaves[i]) for i in moving]
            push = lambda direction: jax.jvp(along, at, direction, has_aux=True)  # noqa: E731
            y, jacobian, rest = jax.vmap(push, out_axes=(None, 0, None))(_basis(at))
            return (y, jacobian), rest

        # Accumulated again: a second derivative accumulates the Jacobian's Jacobian, and transposes no loop.
        (y, jacobian), rest = _accumulated(with_jacobian, operands, refuse)
        return (y, rest), jax.tree.map(lambda columns: _combine(columns, list(moving.values())), jacobian)

    return recomputed(y, rest, operands, rule)


def _basis(leaves: list[Array]) -> list[Array]:
    """One unit tangent a real number in the leaves, along a new leading axis."""
    total, first, basis = _tree.real_size(leaves), 0, []
    for leaf in leaves:
        unit = jnp.eye(total, leaf.size, -first, leaf.dtype)
        if jnp.iscomplexobj(leaf):
            unit = unit + 1j * jnp.eye(total, leaf.size, -first - leaf.size, leaf.dtype)
        basis.append(unit.reshape(total, *leaf.shape))
        first += _tree.real_size(leaf)
    return basis


def _combine(columns: Array, tangents: list[Array]) -> Array:
    """The Jacobian times the tangents; product, then sum: a contraction over a sharded axis is ambiguous."""
    parts = [part for t in tangents for part in ((t.real, t.imag) if jnp.iscomplexobj(t) else (t,))]
    weights = jnp.concatenate([jnp.ravel(part).astype(columns.dtype) for part in parts])
    return jnp.sum(columns * weights.reshape(-1, *(1,) * (columns.ndim - 1)), axis=0)
