"""Differentiation through the steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from .. import _tree
from .._checks import count, is_a
from .._moving import hoisted
from .._types import Status, Theta, X
from ..solvers import Solution, Solver
from ..solvers._solver import (
    check_layers,
    checked_step,
    finish,
    scan_body,
    start_state,
    stopping,
    stopping_finish,
)
from ._failure import check_policy, with_alarm


def unrolled(
    solver: Solver[X, Theta],
    *,
    checkpoint_every: int | None = None,
    memory_budget: int | None = None,
    on_failure: str = "warn",
) -> Solver[X, Theta]:
    r"""Returns the solver differentiated through all its steps, in forward and reverse mode.

    For ``until_converged`` the loop becomes a scan over the whole step budget in which an element that is done stays
    where it is (by selection, not by a branch: a branch would keep a copy of all data for each step). It costs
    max_steps + 1 steps whenever it stops, and the memory of a plain scan. It takes one step at least: a start that
    meets the tolerance has no derivative in theta. Under ``vmap`` each element cuts its own finished steps off, so the
    derivative in a theta that all share is formed element by element.

    When: the number of steps is part of the model; the fixed point is not unique or not differentiable; the iteration
    has no operator. The derivative tends to the implicit one as the steps grow, on any contraction.

    Args:
        solver: from ``for_steps`` or ``until_converged``, or another derivative of one.
        checkpoint_every: steps a segment, at least 1; reverse mode then stores one iterate a segment and recomputes one
            segment at a time. About the square root of the number of steps is best. None: every step is stored.
        memory_budget: bytes, at least 1, that reverse mode may store between its forward and its backward pass;
            segments are then nested to as few levels as fit. Counted are checkpoints (x and state) and what the steps
            of one innermost segment need, by their shapes; the working memory of a single step comes on top, and
            under ``vmap`` the budget is that of one element. None: no bound.
        on_failure: what a solve that diverged, or worse, does to a derivative, as in ``implicit``; one that ran out of
            steps has the derivative of its steps.

    Returns:
        A solver with the same solutions.

    Raises:
        ValueError: a segment length or budget below 1, or both; an unknown ``on_failure``; at trace time, a budget that
            the deepest nesting does not meet.
        TypeError: ``solver`` is none.

    Cost: reverse mode stores what each step needs, K times. With segments of c steps it stores K/c iterates and c
    steps, for one forward pass more; with L levels of checkpoints about :math:`L K^{1/(L+1)}`, for L passes more, down
    to :math:`O(\log K)`.

    Source: Griewank and Walther (2008), chapters 3 and 12, where levels are uniform (12.2); Franceschi et al. (2017).

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
    if memory_budget is not None:
        memory_budget = count("unrolled", "memory_budget", memory_budget)
        if checkpoint_every is not None:
            raise ValueError(
                "unrolled: memory_budget chooses the segments that checkpoint_every fixes; both came. Drop one of them."
            )
    iteration, num_steps, history, record = solver.iteration, solver.num_steps, solver.history, solver.record

    def scan(body: Callable[..., Any], carry: Any, length: int) -> tuple[Any, Any]:
        return _scan(f"unrolled({iteration.name})", body, carry, length, checkpoint_every, memory_budget)

    def fixed(x0: X, theta: Theta) -> Solution:
        check_layers(iteration, theta, num_steps)
        body = scan_body(iteration, history, record)
        (x, state), rows = scan(
            lambda carry, k: body(carry, theta, k),
            (x0, start_state(iteration, x0, theta)),
            num_steps,
        )
        return finish(iteration, x0, x, state, theta, num_steps, rows)

    def until(x0: X, theta: Theta) -> Solution:
        tolerance = solver.tolerance
        assert tolerance is not None
        options = (iteration, tolerance, num_steps, history, record)
        start, body = stopping(*options, x0, theta, differentiated=True)
        carry, rows = scan(lambda carry, k: body(carry), start, num_steps + 1)
        return stopping_finish(carry, jax.tree.map(lambda column: column[:num_steps], rows))

    solve = fixed if solver.tolerance is None else until
    options = {"checkpoint_every": checkpoint_every, "memory_budget": memory_budget, "on_failure": on_failure}
    again = partial(unrolled, **options)
    steps = dataclasses.replace(solver, solve=solve, derivative="unrolled", adjoint=None, differentiate=again)
    return with_alarm(steps, check_policy("unrolled", on_failure), Status.STALLED)


def truncated(solver: Solver[X, Theta], *, num_steps: int, on_failure: str = "warn") -> Solver[X, Theta]:
    r"""Returns the solver differentiated through its last steps only.

    For ``for_steps`` these are the last J of its K steps. For ``until_converged`` they are J further steps at the
    solution, whose derivative is taken and whose value is not: the point stays the same. There, J Picard steps equal
    ``implicit(solver, linear_solver=odl.linear.neumann(J - 1))``.

    When: many steps, little memory, and a contraction: the bias falls like the contraction rate to the power J.

    Args:
        solver: from ``for_steps`` or ``until_converged``.
        num_steps: J, at least 1, at most the steps of ``for_steps``.
        on_failure: what a failed solve does to a derivative, as in ``implicit``.

    Raises:
        ValueError: J below 1 or above the number of steps, an unknown ``on_failure``.
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
        def walk(solution: Solution) -> X:
            def step(carry: Any, i: Any) -> Any:
                x, state = carry
                return checked_step(iteration, x, state, theta, solution.num_steps + i), None

            return jax.lax.scan(step, (solution.x, solution.state), jnp.arange(last))[0][0]

        return from_the_solution(solver, x0, theta, walk)

    solve = fixed if solver.tolerance is None else stopping
    steps = dataclasses.replace(solver, solve=solve, derivative="truncated", adjoint=None, differentiate=None)
    return with_alarm(steps, check_policy("truncated", on_failure))


def from_the_solution(solver: Solver, x0: Any, theta: Any, walk: Callable[[Solution], Any]) -> Solution:
    """The solution, without its own derivative, with that of a walk that starts there; the value stays."""
    solution = stopped(solver.solve, x0, theta)
    x = walk(solution)
    return solution._replace(x=_tree.add(solution.x, _tree.subtract(x, jax.lax.stop_gradient(x))))


def _scan(
    who: str, body: Callable[..., Any], carry: Any, length: int, checkpoint_every: int | None, memory_budget: int | None
) -> tuple[Any, Any]:
    """A scan over ``arange(length)``, in segments that reverse mode recomputes."""
    segments = [] if checkpoint_every is None else [checkpoint_every]
    if memory_budget is not None:
        carried = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(carry))
        segments = plan_segments(who, length, carried, _bytes_of_a_step(body, carry), memory_budget)
    return _nested(body, carry, length, segments)


def _nested(body: Callable[..., Any], carry: Any, length: int, segments: list[int], first: Any = 0) -> tuple[Any, Any]:
    """A scan over ``first + arange(length)`` in segments of the first length, which are scans in segments of the
    second, and so on; each level counts its own steps, so that no level holds as many numbers as there are steps."""
    while segments and segments[0] >= length:
        segments = segments[1:]
    if not segments:
        return jax.lax.scan(body, carry, first + jnp.arange(length))
    size, *inner = segments
    count, rest = divmod(length, size)

    def segment(length: int) -> Callable[..., tuple[Any, Any]]:
        return lambda carry, first: _nested(body, carry, length, inner, first)

    inside_scan = jax.checkpoint(segment(size), prevent_cse=False)
    carry, rows = jax.lax.scan(inside_scan, carry, first + size * jnp.arange(count))
    rows = jax.tree.map(lambda column: column.reshape(count * size, *column.shape[2:]), rows)
    if not rest:
        return carry, rows
    carry, last = jax.checkpoint(segment(rest))(carry, first + jnp.asarray(count * size))
    return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), rows, last)


def _stored(length: int, carried: int, a_step: int, segments: list[int]) -> int:
    """The most bytes that reverse mode holds at once in ``_nested``: carries at segment starts, and the last segment's
    steps."""
    while segments and segments[0] >= length:
        segments = segments[1:]
    if not segments:
        return length * a_step
    first, *inner = segments
    count, rest = divmod(length, first)
    last = carried + _stored(rest, carried, a_step, inner) if rest else 0
    return count * carried + max(last, _stored(first, carried, a_step, inner))


def plan_segments(who: str, length: int, carried: int, a_step: int, budget: int) -> list[int]:
    """The segment lengths of the fewest levels, each of which recomputes all steps once, that fit into the budget."""
    least = None
    for levels in range(1, max(length - 1, 1).bit_length() + 2):
        plans = [_balanced(length, innermost, levels) for innermost in _innermost(length)] if levels > 1 else [[]]
        sized = [(_stored(length, carried, a_step, segments), segments) for segments in plans]
        stored, segments = min(sized)
        if stored <= budget:
            return segments
        least = stored if least is None else min(least, stored)
    raise ValueError(
        f"{who}: reverse mode through {length} steps stores at least {least} bytes, with checkpoints at every level "
        f"({carried} a checkpoint, {a_step} a step); memory_budget is {budget}. Raise it, take fewer steps, or use "
        f"forward, truncated or implicit."
    )


def _innermost(length: int) -> list[int]:
    """Lengths of the innermost segments worth trying: the shortest for each number of them."""
    root = math.isqrt(length)
    return sorted({*range(1, root + 1), *(-(-length // count) for count in range(1, root + 2))})


def _balanced(length: int, innermost: int, levels: int) -> list[int]:
    """Segment lengths, outermost first: a tree of ``levels`` levels, equally wide above its leaves."""
    segments, count = [innermost], -(-length // innermost)
    for above in range(levels - 1, 1, -1):
        width = max(1, math.ceil(count ** (1 / above) - 1e-9))
        segments.insert(0, segments[0] * width)
        count = -(-count // width)
    return segments


def _bytes_of_a_step(body: Callable[..., Any], carry: Any) -> int:
    """What reverse mode through a scan stores for each step: the growth of its residuals from two steps to three."""
    carry = jax.lax.stop_gradient(carry)
    function, captured = hoisted(body, carry, jnp.zeros((), int))
    leaves, structure = jax.tree.flatten((carry, captured))
    floating = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]

    def stored(num_steps: int) -> int:
        def residuals(*leaves: Any) -> Any:
            def run(*moved: Any) -> Any:
                all_leaves = list(leaves)
                for i, leaf in zip(floating, moved, strict=True):
                    all_leaves[i] = leaf
                carry, captured = jax.tree.unflatten(structure, all_leaves)
                return jax.lax.scan(lambda carry, k: function(carry, k, *captured), carry, jnp.arange(num_steps))

            return jax.vjp(run, *(leaves[i] for i in floating))[1]

        jaxpr = jax.make_jaxpr(residuals)(*shapes).jaxpr
        kept = {id(var): var.aval for var in jaxpr.outvars}
        return sum(aval.size * aval.dtype.itemsize for aval in kept.values())

    return stored(3) - stored(2)


def stopped(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)`` without a derivative, neither in the arguments nor in tracers that it closes over."""
    run, captured = hoisted(function, *arguments)
    return jax.lax.stop_gradient(run(*jax.lax.stop_gradient((*arguments, *captured))))
