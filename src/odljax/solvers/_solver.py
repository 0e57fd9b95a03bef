"""The solver and solution records, and the two ways to stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from .. import _tree
from .._checks import as_inner, count, forward_only, is_a, is_callable, number, record, same_as
from .._types import STATUS_MESSAGES, Scalar, State, Status, Step, Theta, X
from ..iterations import Iteration
from ..operators import Operator
from ..operators._operator import displacement

_DIVERGENCE = 1e6
_RUNNING = -1
_PATIENCE = 25

Record = Callable[[Any, Any, Step], Any]


class History(NamedTuple):
    """Row k belongs to the iterate from which step k starts; rows past ``num_steps`` are NaN (zero for integers).

    ``residual`` is None where the iteration has no operator, ``recorded`` None where nothing was asked for.
    """

    residual: Array | None
    recorded: Any


class Solution(NamedTuple):
    """What a solver returns; every field is an array or a pytree of arrays, one per element under ``vmap``.

    Counts, residuals and status carry no derivative; x does, and so do recorded rows and state where the steps
    themselves are differentiated.

    Attributes:
        x: the last iterate.
        num_steps: steps taken.
        residual: ``||x - T(x, theta)||`` at the x that is returned; None where the iteration has no operator.
        relative_residual: the same divided by ``||x||``; the residual itself where x is zero.
        status: a code of ``odl.Status``; ``odl.check`` raises on the bad ones.
        history: rows recorded on the way, or None.
        state: the iteration's last state.
    """

    x: Any
    num_steps: Array
    residual: Array | None
    relative_residual: Array | None
    status: Array
    history: History | None
    state: Any


@record
class Adjoint:
    """The backward half of an implicit derivative, for those who want the truth about the adjoint solve.

    Args:
        pull_back: ``(x, theta, cotangent, guess) -> (theta cotangent, adjoint vector, LinearInfo)``; differentiable.
        name: what messages call it.
    """

    pull_back: Callable[[Any, Any, Any, Any], tuple[Any, Any, Any]]
    name: str = "adjoint"


@record
class Solver(Generic[X, Theta]):
    """An iteration that was told when to stop. Call it with ``(x0, theta)``.

    Made by ``for_steps`` and ``until_converged``; ``odljax.derivatives`` return new ones.

    Args:
        solve: ``(x0, theta) -> Solution``.
        iteration: what is iterated.
        num_steps: steps taken, or their bound if there is a tolerance.
        tolerance: (absolute, relative) or None.
        history: whether residuals are recorded.
        record: ``(x, theta, k) -> pytree``, recorded at each iterate, or None.
        derivative: the name of its differentiation rule.
        adjoint: for implicit rules, the pull-back with its adjoint system; else None.
        differentiate: puts the same rule, where it is one of the steps, on another solver; else None.
    """

    solve: Callable[[X, Theta], Solution]
    iteration: Iteration[X, Theta]
    num_steps: int
    tolerance: tuple[Any, Any] | None = None
    history: bool = False
    record: Record | None = None
    derivative: str = "none"
    adjoint: Adjoint | None = None
    differentiate: Callable[[Solver[Any, Any]], Solver[Any, Any]] | None = None

    def __call__(self, x0: X, theta: Theta) -> Solution:
        return self.solve(as_inner(self.name, "x0", x0, or_complex=True), theta)

    @property
    def name(self) -> str:
        kind = "for_steps" if self.tolerance is None else "until_converged"
        inside = f"{kind}({self.iteration.name})"
        return inside if self.derivative == "none" else f"{self.derivative}({inside})"


def for_steps(
    iteration: Iteration[X, Theta], num_steps: int, *, history: bool = False, record: Record | None = None
) -> Solver[X, Theta]:
    r"""Returns the solver that takes a fixed number of steps, on ``lax.scan``.

    When: the number of steps is part of the model (unrolled networks, HODL), or forward and reverse mode through the
    steps are wanted. Without a derivative transform it differentiates through all its steps, as ``unrolled`` does.

    Args:
        iteration: what to iterate.
        num_steps: at least 1, static.
        history: record the residual at each iterate.
        record: ``(x, theta, k) -> pytree``, recorded at each iterate; implies history.

    Returns:
        A solver. Its status is COMPLETED, or DIVERGED (residual beyond 1e6 times the largest of the first residual,
        \|x0\| and 1; not where there is no operator) or NON_FINITE.

    Raises:
        TypeError: iteration is none (wrap a function in ``fixed_point``); at trace time, a step that changes structure,
            shape or dtype.
        ValueError: a step count below 1; at trace time, more steps than untied layers.

    Cost: num_steps steps, and one application of the operator each for first and last residual where they are looked
    at.

    Example:
        >>> import odljax as odl
        >>> halve = odl.fixed_point(lambda x, theta: 0.5 * x + theta)
        >>> solution = odl.for_steps(halve, 3)(0.0, 1.0)
        >>> float(solution.x), float(solution.residual), odl.Status(int(solution.status)).name
        (1.75, 0.125, 'COMPLETED')
    """
    _check_iteration("for_steps", iteration)
    num_steps = count("for_steps", "num_steps", num_steps)
    history = history or record is not None
    if record is not None:
        is_callable("for_steps", "record", record)
    body = scan_body(iteration, history, record)

    def solve(x0: X, theta: Theta) -> Solution:
        check_layers(iteration, theta, num_steps)
        carry = (x0, start_state(iteration, x0, theta))
        steps = jnp.arange(num_steps)
        (x, state), rows = jax.lax.scan(lambda carry, k: body(carry, theta, k), carry, steps)
        return finish(iteration, x0, x, state, theta, num_steps, rows)

    return Solver(solve, iteration, num_steps, None, history, record)


def until_converged(
    iteration: Iteration[X, Theta],
    *,
    tol: Scalar = 1e-6,
    max_steps: int = 1000,
    relative_tol: Scalar = 0.0,
    history: bool = False,
    record: Record | None = None,
) -> Solver[X, Theta]:
    r"""Returns the solver that stops once the operator's residual is small, on ``lax.while_loop``.

    .. math:: \|x - T(x, \theta)\| \le \mathrm{tol} + \mathrm{relative\_tol} \cdot \|x\|

    When: a solution is wanted rather than a number of steps, above all under ``implicit``. On its own it has forward
    mode only; reverse mode needs a derivative transform. Under ``vmap`` the batch runs until its slowest element is
    done.

    Args:
        iteration: what to iterate; it needs an operator, whose residual is tested.
        tol: absolute tolerance, at least 0, on the residual.
        max_steps: at least 1, static.
        relative_tol: tolerance relative to \|x\|, at least 0; not both tolerances may be 0.
        history: record the residual at each iterate.
        record: ``(x, theta, k) -> pytree``, recorded at each iterate; implies history.

    Returns:
        A solver. Its status is CONVERGED, STEP_BUDGET_SPENT, STALLED (25 steps without a smaller residual, at 100
        rounding units of x), DIVERGED (residual beyond 1e6 times the largest of the first residual, \|x0\| and 1),
        PRIMAL_INFEASIBLE or DUAL_INFEASIBLE (where the operator has a certificate: quadratic programs) or NON_FINITE
        (which x then shows, whether it came in with x0 or theta or appeared on the way).

    Raises:
        TypeError: iteration is none, or has no operator; a step that changes structure, shape or dtype; reverse mode.
        ValueError: a step budget below 1, a negative tolerance, both tolerances zero.

    Cost: the steps, the residual (free where the step applies the same operator at the same point: the compiler shares
    it) and one application more for the test that ends the loop.

    Example:
        >>> import odljax as odl
        >>> halve = odl.fixed_point(lambda x, theta: 0.5 * x + theta)
        >>> solution = odl.until_converged(halve, tol=1e-3, max_steps=100)(0.0, 1.0)
        >>> round(float(solution.x), 2), int(solution.num_steps), odl.Status(int(solution.status)).name
        (2.0, 10, 'CONVERGED')
    """
    _check_iteration("until_converged", iteration)
    if iteration.operator is None:
        raise TypeError(
            f"until_converged: the residual of an operator is tested, and {iteration.name} has no operator. "
            f"Use for_steps."
        )
    number("until_converged", "tol", tol, closed=True)
    number("until_converged", "relative_tol", relative_tol, closed=True)
    if all(isinstance(t, (int, float)) and t == 0 for t in (tol, relative_tol)):
        raise ValueError("until_converged: tol and relative_tol are both 0, which no residual meets. Set one of them.")
    max_steps = count("until_converged", "max_steps", max_steps)
    history = history or record is not None
    if record is not None:
        is_callable("until_converged", "record", record)
    tolerance = (tol, relative_tol)

    def solve(x0: X, theta: Theta) -> Solution:
        body = stopping_body(iteration, tolerance, max_steps, theta, history, record)
        carry = stopping_start(iteration, x0, theta)
        rows = None
        if history:
            shapes = jax.eval_shape(lambda carry: body(carry)[1], carry)
            rows = jax.tree.map(lambda one: jnp.zeros((max_steps, *one.shape), one.dtype), shapes)

        def step(loop: Any) -> Any:
            before, rows = loop
            after, row = body(before)
            rows = jax.tree.map(lambda column, one: column.at[before.k].set(one, mode="drop"), rows, row)
            return after, rows

        carry, rows = jax.lax.while_loop(lambda loop: loop[0].status == _RUNNING, step, (carry, rows))
        solution = stopping_finish(carry, rows)
        message = (
            f"{solver.name}: a loop that stops by itself has no reverse mode. Wrap the solver: implicit(solver), "
            f"unrolled(solver), forward(solver), truncated(solver, num_steps=...) or one_step(solver)."
        )
        return forward_only(solution, message)

    solver = Solver(solve, iteration, max_steps, tolerance, history, record)
    return solver


def check(solution: Any, *, name: str = "solver") -> Any:
    """Returns its argument if every status in it is good, and raises outside compiled code otherwise.

    Args:
        solution: a ``Solution``, a hypergradient's ``Info``, or anything with a ``status`` field; batched or not.
        name: what the message calls it.

    Raises:
        RuntimeError: a status of STEP_BUDGET_SPENT or worse; the message says which elements and what to do.
        TypeError: the status is traced: call ``check`` outside ``jit``.

    Example:
        >>> import odljax as odl
        >>> grow = odl.fixed_point(lambda x, theta: 3.0 * x + theta)
        >>> odl.check(odl.until_converged(grow, max_steps=100)(0.0, 1.0))
        Traceback (most recent call last):
        RuntimeError: solver: DIVERGED: the residual grew beyond 1e6 times the scale of its start; ...
    """
    if not hasattr(solution, "status"):
        raise TypeError(
            f"check: needs a Solution, an Info or anything with a status; a {type(solution).__name__} came."
        )
    if isinstance(solution.status, Tracer):
        raise TypeError("check: the status is traced; return the solution and check it outside the compiled function.")
    codes = np.atleast_1d(np.asarray(solution.status))
    worst = Status(int(codes.max()))
    if worst >= Status.STEP_BUDGET_SPENT:
        where = ""
        if np.ndim(solution.status):
            bad = np.argwhere(codes == worst)
            where = f" in {len(bad)} of {codes.size} elements, first at index {tuple(map(int, bad[0]))}"
        raise RuntimeError(f"{name}: {worst.name}{where}: {STATUS_MESSAGES[worst]}.")
    return solution


# ---- the loop bodies, which the derivatives share -------------------------------------------------------------------


def _check_iteration(who: str, iteration: Any) -> None:
    is_a(who, "iteration", iteration, Iteration, "Wrap a map T(x, theta) in odl.fixed_point(T).")


def check_layers(iteration: Iteration, theta: Any, num_steps: int) -> None:
    """Refuses more steps than untied layers."""
    if iteration.num_layers is not None and (layers := iteration.num_layers(theta)) < num_steps:
        raise ValueError(
            f"for_steps: num_steps is {num_steps}, but theta holds {layers} layers for {iteration.name}. "
            f"An untied network cannot go on past its last layer; ask for at most {layers} steps."
        )


def start_state(iteration: Iteration, x: Any, theta: Any) -> State:
    return _tree.strong(iteration.init(x, theta))


def checked_step(iteration: Iteration, x: Any, state: State, theta: Any, k: Step) -> tuple[Any, State]:
    """One step whose outcome is known to fit the loop's carry."""
    new_x, new_state = iteration.step(x, state, theta, k)
    new_state = same_as(iteration.name, "the step's state", new_state, state, "the state before")
    return same_as(iteration.name, "the step", new_x, x), new_state


def _row(iteration: Iteration, record: Record | None, x: Any, theta: Any, k: Step, size: Array | None) -> History:
    return History(size, None if record is None else record(x, theta, k))


def scan_body(iteration: Iteration, history: bool, record: Record | None) -> Callable[..., Any]:
    """The body of a plain scan: ``(carry, theta, k) -> (carry, row)``."""

    def body(carry: Any, theta: Any, k: Step) -> Any:
        x, state = carry
        row = None
        if history:
            row = _row(iteration, record, x, theta, k, residual_at(iteration, x, theta))
        return checked_step(iteration, x, state, theta, k), row

    return body


def residual_at(iteration: Iteration, x: Any, theta: Any) -> Array | None:
    """The residual of the iteration's operator, without a derivative; None where there is no operator."""
    return None if iteration.operator is None else jnp.asarray(_tree.norm(_move_at(iteration.operator, x, theta)))


def _move_at(operator: Operator, x: Any, theta: Any) -> Any:
    return jax.lax.stop_gradient(displacement(operator, *jax.lax.stop_gradient((x, theta))))


def finish(
    iteration: Iteration, x0: Any, x: Any, state: State, theta: Any, num_steps: int, rows: History | None
) -> Solution:
    """The solution of a fixed number of steps."""
    first, final = residual_at(iteration, x0, theta), residual_at(iteration, x, theta)
    finite, status = _tree.all_finite(x), _code(Status.COMPLETED)
    if first is not None and final is not None:
        scale = jnp.maximum(jnp.maximum(1.0, _tree.norm(jax.lax.stop_gradient(x0))), first)
        status = jnp.where(final > _DIVERGENCE * scale, _code(Status.DIVERGED), status)
        finite = finite & jnp.isfinite(final)
    status = jnp.where(finite, status, _code(Status.NON_FINITE))
    return Solution(x, jnp.asarray(num_steps, int), final, _relative(final, x), status, rows, state)


def _relative(size: Array | None, x: Any) -> Array | None:
    if size is None:
        return None
    of_x = _tree.norm(jax.lax.stop_gradient(x))
    return size / jnp.where(of_x > 0, of_x, jnp.ones_like(of_x))


def _code(status: int) -> Array:
    return jnp.asarray(int(status), jnp.int32)


class Progress(NamedTuple):
    """The carry of a loop that stops by itself."""

    x: Any
    state: State
    k: Array
    status: Array
    residual: Array
    reference: Array
    best: Array
    best_at: Array


def stopping_start(iteration: Iteration, x0: Any, theta: Any) -> Progress:
    scale = jnp.maximum(1.0, _tree.norm(jax.lax.stop_gradient(x0)))
    unknown = jnp.full_like(scale, jnp.inf)
    zero = jnp.zeros((), int)
    return Progress(x0, start_state(iteration, x0, theta), zero, _code(_RUNNING), unknown, scale, unknown, zero)


def stopping_body(
    iteration: Iteration, tolerance: tuple[Any, Any], max_steps: int, theta: Any, history: bool, record: Any
) -> Callable[[Progress], tuple[Progress, History | None]]:
    """Tests the residual at the current iterate and steps on only while running: what is done stays where it is.

    Test and step see the same iterate, so the compiler evaluates the operator once where the step applies it.
    """
    absolute, relative = tolerance

    def body(carry: Progress) -> tuple[Progress, History | None]:
        x, state, k = carry.x, carry.state, carry.k
        size = _tree.norm(jax.lax.stop_gradient(x))
        assert iteration.operator is not None
        move = _move_at(iteration.operator, x, theta)
        measure = jnp.asarray(_tree.norm(move))
        limit = jnp.asarray(absolute).astype(size.dtype) + jnp.asarray(relative).astype(size.dtype) * size
        reference = jnp.where(k == 0, jnp.maximum(carry.reference, measure), carry.reference)
        better = measure < carry.best
        best_at = jnp.where(better, k, carry.best_at)
        rounding = 100 * float(jnp.finfo(_lowest_dtype(x)).eps) * size
        tests = [
            (~(jnp.isfinite(measure) & jnp.isfinite(size)), _code(Status.NON_FINITE)),
            (measure <= limit, _code(Status.CONVERGED)),
            (measure > _DIVERGENCE * reference, _code(Status.DIVERGED)),
            ((k - best_at >= _PATIENCE) & (measure <= rounding), _code(Status.STALLED)),
            (k >= max_steps, _code(Status.STEP_BUDGET_SPENT)),
        ]
        if iteration.operator.certificate is not None:
            verdict = iteration.operator.certificate(*jax.lax.stop_gradient((x, move, theta)))
            tests.insert(2, (verdict != _RUNNING, verdict.astype(jnp.int32)))
        status = jnp.select([test for test, _ in tests], [code for _, code in tests], _code(_RUNNING))
        status = jnp.where(carry.status == _RUNNING, status, carry.status)
        running = status == _RUNNING
        # What is not finite is let through by one more step, so that x shows it and no derivative hides it.
        moving = running | ((carry.status == _RUNNING) & (status == Status.NON_FINITE))
        new_x, new_state = checked_step(iteration, x, state, theta, jnp.minimum(k, max_steps - 1))
        new = Progress(
            _tree.where(moving, new_x, x),
            _tree.where(moving, new_state, state),
            jnp.where(running, k + 1, k),
            status,
            measure,
            reference,
            jnp.where(better, measure, carry.best),
            best_at,
        )
        return new, _row(iteration, record, x, theta, k, measure) if history else None

    return body


def stopping_finish(carry: Progress, rows: History | None) -> Solution:
    """The solution of a loop that stopped by itself; rows that no step started from are blanked."""

    def blank(column: Array) -> Array:
        filler = jnp.nan if jnp.issubdtype(column.dtype, jnp.inexact) else 0
        used = jnp.arange(len(column)) < carry.k
        return jnp.where(jnp.expand_dims(used, tuple(range(1, column.ndim))), column, jnp.full_like(column, filler))

    return Solution(
        carry.x,
        carry.k,
        carry.residual,
        _relative(carry.residual, carry.x),
        carry.status,
        jax.tree.map(blank, rows),
        carry.state,
    )


def _lowest_dtype(x: Any) -> np.dtype:
    return max((leaf.dtype for leaf in jax.tree.leaves(x)), key=lambda dtype: float(jnp.finfo(dtype).eps))
