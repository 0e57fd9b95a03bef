"""Differentiation through the steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .. import _tree
from .._checks import count, is_a
from .._types import Theta, X
from ..solvers import Solution, Solver
from ..solvers._solver import (
    check_layers,
    checked_step,
    finish,
    scan_body,
    start_state,
    stopping_body,
    stopping_finish,
    stopping_start,
)


def unrolled(solver: Solver[X, Theta], *, checkpoint_every: int | None = None) -> Solver[X, Theta]:
    r"""Returns the solver differentiated through all its steps, in forward and reverse mode.

    For ``until_converged`` the loop becomes a scan over the whole step budget in which an element that is done stays
    where it is (by selection, not by a branch: a branch would keep a copy of all data for each step). It costs
    max_steps + 1 steps whenever it stops, and the memory of a plain scan.

    When: the number of steps is part of the model; the fixed point is not unique or not differentiable; the iteration
    has no operator. The derivative tends to the implicit one as the steps grow, on any contraction.

    Args:
        solver: from ``for_steps`` or ``until_converged``, or another derivative of one.
        checkpoint_every: steps a segment, at least 1; reverse mode then stores one iterate a segment and recomputes one
            segment at a time. About the square root of the number of steps is best. None: every step is stored.

    Returns:
        A solver with the same solutions.

    Raises:
        ValueError: a segment length below 1.
        TypeError: ``solver`` is none.

    Cost: reverse mode stores what each step needs, K times; with segments of c steps K/c + c times, for one forward
    pass more.

    Source: Griewank and Walther (2008), chapters 3 and 12; Franceschi et al. (2017).

    Example:
        >>> import jax, odljax as odl
        >>> line = odl.fixed_point(lambda x, theta: 0.5 * x + theta)
        >>> solver = odl.unrolled(odl.for_steps(line, 4), checkpoint_every=2)
        >>> float(jax.grad(lambda theta: solver(0.0, theta).x)(1.0))
        1.875
    """
    is_a("unrolled", "solver", solver, Solver, "Make one with for_steps or until_converged.")
    if checkpoint_every is not None:
        checkpoint_every = count("unrolled", "checkpoint_every", checkpoint_every)
    iteration, num_steps, history, record = solver.iteration, solver.num_steps, solver.history, solver.record

    def fixed(x0: X, theta: Theta) -> Solution:
        check_layers(iteration, theta, num_steps)
        body = scan_body(iteration, history, record)
        (x, state), rows = _scan(
            lambda carry, k: body(carry, theta, k),
            (x0, start_state(iteration, x0, theta)),
            num_steps,
            checkpoint_every,
        )
        return finish(iteration, x0, x, state, theta, num_steps, rows)

    def stopping(x0: X, theta: Theta) -> Solution:
        tolerance = solver.tolerance
        assert tolerance is not None
        body = stopping_body(iteration, tolerance, num_steps, theta, history, record)
        start = stopping_start(iteration, x0, theta)
        carry, rows = _scan(lambda carry, k: body(carry), start, num_steps + 1, checkpoint_every)
        return stopping_finish(carry, jax.tree.map(lambda column: column[:num_steps], rows))

    solve = fixed if solver.tolerance is None else stopping
    return dataclasses.replace(solver, solve=solve, derivative="unrolled", adjoint=None)


def truncated(solver: Solver[X, Theta], *, num_steps: int) -> Solver[X, Theta]:
    r"""Returns the solver differentiated through its last steps only.

    For ``for_steps`` these are the last J of its K steps. For ``until_converged`` they are J further steps at the
    solution, whose derivative is taken and whose value is not: the point stays the same. There, J Picard steps equal
    ``implicit(solver, linear_solver=odl.linear.neumann(J - 1))``.

    When: many steps, little memory, and a contraction: the bias falls like the contraction rate to the power J.

    Args:
        solver: from ``for_steps`` or ``until_converged``.
        num_steps: J, at least 1, at most the steps of ``for_steps``.

    Raises:
        ValueError: J below 1 or above the number of steps.
        TypeError: ``solver`` is none.

    Cost: reverse mode stores J steps.

    Source: Shaban et al. (2019).

    Example:
        >>> import jax, odljax as odl
        >>> line = odl.fixed_point(lambda x, theta: 0.5 * x + theta)
        >>> solver = odl.truncated(odl.for_steps(line, 50), num_steps=2)
        >>> float(jax.grad(lambda theta: solver(0.0, theta).x)(1.0))  # the truth is 2
        1.5
    """
    is_a("truncated", "solver", solver, Solver, "Make one with for_steps or until_converged.")
    last = count("truncated", "num_steps", num_steps)
    iteration, total = solver.iteration, solver.num_steps
    if solver.tolerance is None and last > total:
        raise ValueError(
            f"truncated: num_steps is {last}, but the solver takes {total} steps. Ask for at most {total}."
        )
    body = scan_body(iteration, solver.history, solver.record)

    def run(carry: Any, theta: Theta, first: int, stop: int) -> Any:
        steps = jnp.arange(first, stop)
        return jax.lax.scan(lambda carry, k: body(carry, theta, k), carry, steps)

    def fixed(x0: X, theta: Theta) -> Solution:
        check_layers(iteration, theta, total)

        def head(x0: X, theta: Theta) -> Any:
            return run((x0, start_state(iteration, x0, theta)), theta, 0, total - last)

        carry, rows = stopped(head, x0, theta)
        (x, state), more = run(carry, theta, total - last, total)
        rows = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), rows, more)
        return finish(iteration, x0, x, state, theta, total, rows)

    def stopping(x0: X, theta: Theta) -> Solution:
        solution = stopped(solver.solve, x0, theta)

        def step(carry: Any, i: Any) -> Any:
            x, state = carry
            return checked_step(iteration, x, state, theta, solution.num_steps + i), None

        steps = jnp.arange(last)
        (x, _), _ = jax.lax.scan(step, (solution.x, solution.state), steps)
        return solution._replace(x=_tree.add(solution.x, _tree.subtract(x, jax.lax.stop_gradient(x))))

    solve = fixed if solver.tolerance is None else stopping
    return dataclasses.replace(solver, solve=solve, derivative="truncated", adjoint=None)


def _scan(body: Callable[..., Any], carry: Any, length: int, checkpoint_every: int | None) -> tuple[Any, Any]:
    """A scan over ``arange(length)``, in segments that reverse mode recomputes."""
    steps = jnp.arange(length)
    if checkpoint_every is None:
        return jax.lax.scan(body, carry, steps)
    whole = length - length % checkpoint_every

    def segment(carry: Any, steps: Any) -> tuple[Any, Any]:
        return jax.lax.scan(body, carry, steps)

    inside_scan = jax.checkpoint(segment, prevent_cse=False)
    carry, rows = jax.lax.scan(inside_scan, carry, steps[:whole].reshape(whole // checkpoint_every, checkpoint_every))
    rows = jax.tree.map(lambda column: column.reshape(whole, *column.shape[2:]), rows)
    if whole == length:
        return carry, rows
    carry, rest = jax.checkpoint(segment)(carry, steps[whole:])
    return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), rows, rest)


def stopped(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)`` without a derivative, neither in the arguments nor in tracers that it closes over."""
    run, captured = jax.closure_convert(function, *arguments)
    return jax.lax.stop_gradient(run(*jax.lax.stop_gradient((*arguments, *captured))))
