"""The solver and solution records, and the two ways to stop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Generic, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from .. import _tree
from .._checks import (
    as_inner,
    compiled_once,
    count,
    coupling,
    forward_only,
    is_a,
    is_callable,
    number,
    outline,
    record,
    same_as,
)
from .._types import STATUS_MESSAGES, Scalar, State, Status, Step, Theta, X
from ..iterations import Iteration
from ..iterations._iteration import MeasuredStep
from ..operators import Operator, Residual
from ..operators._operator import displacement, largest_part, natural_residual

_DIVERGENCE = 1e6  # growth of the residual over a whole walk
_STILL = 1e-3  # a relative residual below which growth is the end of a transient, not divergence
_RUNNING = -1
_PATIENCE = 100  # steps without a residual smaller by a hundredth; and never fewer than it took to get there
_IMPROVEMENT = 0.99

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
        residual: the norm of the operator's natural residual at the x that is returned, ``||x - T(x, theta)||`` for a
            map, the gradient norm for gradient steps; of several parts the largest. None where there is no operator.
        relative_residual: the same relative to the scale of the part, as in ``until_converged``; the residual itself
            where that is zero.
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
        quiet: the same solver, whose derivative tells the host nothing of a failure; None: it is so itself.
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
    quiet: Solver[Any, Any] | None = None

    def __call__(self, x0: X, theta: Theta) -> Solution:
        try:
            return self._compiled(as_inner(self.name, "x0", x0, or_complex=True), theta)
        except Exception as error:  # an error of the user's function names neither: above all where they are swapped
            note = f"{self.name} was called as solver(x0, theta) with x0: {outline(x0)}; theta: {outline(theta)}."
            if note not in getattr(error, "__notes__", ()):
                error.add_note(note)
            raise

    @functools.cached_property
    def _compiled(self) -> Callable[[X, Theta], Solution]:
        return compiled_once(self.solve)

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
        A solver. Its status is COMPLETED, or DIVERGED (the residual grew a million times, and is no small part of what
        it is compared with; not where there is no operator) or NON_FINITE (which x then shows).

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
    r"""Returns the solver that stops once the operator's natural residual is small, on ``lax.while_loop``.

    .. math:: \|r_i(x, \theta)\| \le \mathrm{tol} + \mathrm{relative\_tol} \cdot s_i(x) \quad\text{for each part } i

    The residual depends on no step size, relaxation or penalty: of gradient steps it is the gradient, of proximal
    gradient steps the prox-gradient map :math:`(x - T(x)) / \gamma`, of splittings the violated constraint and the dual
    residual, each in its own unit, and of any other map :math:`x - T(x)`. Its scale s is that of the terms which cancel
    in it, :math:`\|x\|` for a map; a gradient has no such terms, and is compared with
    :math:`\|x\| \max_k \|r_{k+1} - r_k\| / \|x_{k+1} - x_k\|`, the largest slope met, at the start
    and on the walk. So units do not matter to ``relative_tol``.

    When: a solution is wanted rather than a number of steps, above all under ``implicit``. On its own it has forward
    mode only; reverse mode needs a derivative transform. Under ``vmap`` the batch runs until its slowest element is
    done.

    Args:
        iteration: what to iterate; it needs an operator, whose residual is tested.
        tol: absolute tolerance, at least 0, on each part of the residual, in its unit.
        max_steps: at least 1, static.
        relative_tol: tolerance relative to the scale of each part, at least 0; not both tolerances may be 0.
        history: record the residual at each iterate.
        record: ``(x, theta, k) -> pytree``, recorded at each iterate; implies history.

    Returns:
        A solver. Its status is CONVERGED, STEP_BUDGET_SPENT, STALLED (x moves, or a residual that has a scale of its
        own is, within 100 rounding units, and no residual smaller by a hundredth came in 100 steps, nor in as many as
        had been taken until then), DIVERGED (the residual grew by the inverse square of the rounding unit, or, at the
        end of the budget, a million times), PRIMAL_INFEASIBLE or DUAL_INFEASIBLE (where the operator has a
        certificate: quadratic programs) or NON_FINITE (which x then shows, whether it came in with x0 or
        theta or appeared on the way).

    Raises:
        TypeError: iteration is none, or has no operator; a step that changes structure, shape or dtype; reverse mode.
        ValueError: a step budget below 1, a negative tolerance (a traced one is NON_FINITE), both tolerances zero.

    Cost: the steps, the residual (free where the step says it: Picard, gradient and proximal gradient steps, relaxed
    or not; elsewhere the compiler shares it where the step applies the same operator at the same point) and one
    application more for the test that ends the loop; with a relative_tol on a gradient two more, for the first slope.

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
    tol = number("until_converged", "tol", tol, closed=True)
    relative_tol = number("until_converged", "relative_tol", relative_tol, closed=True)
    if all(isinstance(t, (int, float)) and t == 0 for t in (tol, relative_tol)):
        raise ValueError("until_converged: tol and relative_tol are both 0, which no residual meets. Set one of them.")
    max_steps = count("until_converged", "max_steps", max_steps)
    history = history or record is not None
    if record is not None:
        is_callable("until_converged", "record", record)
    tolerance = (tol, relative_tol)

    def solve(x0: X, theta: Theta) -> Solution:
        loop = stopping(iteration, tolerance, max_steps, history, record, x0, theta)
        solution = stopping_loop(*loop, max_steps if history else 0)
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
        RuntimeError: solver: DIVERGED: the residual grew without bound; take a smaller step size.
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
    return checked(iteration, *iteration.step(x, state, theta, k), x, state)


def checked(iteration: Iteration, new_x: Any, new_state: State, x: Any, state: State) -> tuple[Any, State]:
    """The outcome of a step, after checking that it fits the loop's carry."""
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
    """The natural residual of the iteration's operator, without a derivative; None where there is no operator."""
    return None if iteration.operator is None else largest_part(_parts_at(iteration.operator, x, theta))


def _parts_at(operator: Operator, x: Any, theta: Any) -> tuple[Residual, ...]:
    return jax.lax.stop_gradient(natural_residual(operator, *jax.lax.stop_gradient((x, theta))))


class _Sizes(NamedTuple):
    """The norms of the parts of a natural residual, of what a tolerance compares each with, and what is told of it."""

    sizes: list[Array]
    scales: list[Array]
    told: list[Array]

    @property
    def largest(self) -> Array:
        return functools.reduce(jnp.maximum, self.sizes)

    @property
    def relative(self) -> Array:
        """The largest part in multiples of its scale; the part itself where that is zero."""
        ratios = [size / jnp.where(scale > 0, scale, 1) for size, scale in zip(self.sizes, self.told, strict=True)]
        return functools.reduce(jnp.maximum, ratios)


def _measure(operator: Operator, parts: tuple[Residual, ...], x: Any, theta: Any, slopes: tuple[Array, ...]) -> _Sizes:
    """The sizes; what has no scale of its own gets that of its slope.

    Where no slope is known, what is told of it, but no tolerance, is compared with the inverse of the step.
    """
    dtype, size, rest = _tree.accumulation_dtype(x), _tree.norm(x), list(slopes)
    scales, told = [], []
    for part in parts:
        if part.scale is None:
            slope, step = rest.pop(0), 1.0 if operator.step_size is None else operator.step_size(theta)
            scales.append(slope * size)
            told.append(jnp.where(slope > 0, slope, (1 / jnp.asarray(step)).astype(dtype)) * size)
        else:
            norms = [_tree.norm(term).astype(dtype) for term in part.scale]
            scales.append(functools.reduce(jnp.maximum, norms, jnp.zeros((), dtype)))
            told.append(scales[-1])
    return jax.lax.stop_gradient(_Sizes([_tree.norm(part.value).astype(dtype) for part in parts], scales, told))


def _unscaled_parts(parts: tuple[Residual, ...]) -> tuple[Any, ...]:
    return tuple(part.value for part in parts if part.scale is None)


def _slopes(now: tuple[Any, ...], before: tuple[Any, ...], moved: Array) -> tuple[Array, ...]:
    """How much each value changed in proportion to the move of x; zero where x did not move."""
    changes = [_tree.norm(_tree.subtract(a, b)).astype(moved.dtype) for a, b in zip(now, before, strict=True)]
    known = (moved > 0) & jnp.isfinite(moved)
    return tuple(jnp.where(known, change / jnp.where(known, moved, 1), 0) for change in changes)


def _slopes_at(operator: Operator, x: Any, theta: Any) -> tuple[Array, ...]:
    """How much each value changes along x, where no walk has shown it yet: signs and zeros of x are kept."""
    x, width = jax.lax.stop_gradient(x), _tree.rounding(x) ** 0.5
    here, there = (_unscaled_parts(_parts_at(operator, at, theta)) for at in (x, _tree.scale(1 + width, x)))
    slopes = _slopes(there, here, width * _tree.norm(x))
    return tuple(jnp.where(jnp.isfinite(slope), slope, 0) for slope in slopes)


def finish(
    iteration: Iteration, x0: Any, x: Any, state: State, theta: Any, num_steps: int, rows: History | None
) -> Solution:
    """The solution of a fixed number of steps."""
    operator, finite, status = iteration.operator, _tree.all_finite(x), _code(Status.COMPLETED)
    residual = relative = None
    if operator is not None:
        start, end, theta = jax.lax.stop_gradient((x0, x, theta))
        first, last = _parts_at(operator, start, theta), _parts_at(operator, end, theta)
        moved = _tree.norm(_tree.subtract(end, start))
        slopes = _slopes(_unscaled_parts(last), _unscaled_parts(first), moved)
        before, after = (_measure(operator, parts, end, theta, slopes) for parts in (first, last))
        residual, relative = after.largest, after.relative
        grown = residual > _DIVERGENCE * before.largest
        status = jnp.where(grown & (relative > _STILL), _code(Status.DIVERGED), status)
        finite = finite & jnp.isfinite(residual)
    status = jnp.where(finite, status, _code(Status.NON_FINITE))
    return Solution(_shown(x, status), jnp.asarray(num_steps, int), residual, relative, status, rows, state)


def _shown(x: Any, status: Array) -> Any:
    """x, NaN where the status says NON_FINITE and x would not show it."""
    hidden = (status == int(Status.NON_FINITE)) & _tree.all_finite(jax.lax.stop_gradient(x))
    return jax.tree.map(lambda leaf: jnp.where(hidden, jnp.full_like(leaf, jnp.nan), leaf), x)


def _code(status: int) -> Array:
    return jnp.asarray(int(status), jnp.int32)


class Progress(NamedTuple):
    """The carry of a loop that stops by itself."""

    x: Any
    state: State
    k: Array
    status: Array
    residual: Array
    relative: Array
    first: tuple[Array, ...]
    best: Array
    best_at: Array
    moved: Array
    values: tuple[Any, ...]
    slopes: tuple[Array, ...]


def stopping(
    iteration: Iteration,
    tolerance: tuple[Any, Any],
    max_steps: int,
    history: bool,
    record: Any,
    x0: Any,
    theta: Any,
    *,
    differentiated: bool = False,
) -> tuple[Progress, Callable[[Progress], tuple[Progress, History | None]]]:
    """The first carry of a loop that stops by itself, and its body.

    The body tests the residual at the current iterate and steps on only while running: what is done stays where it is.
    Test and step see the same iterate, so the operator is evaluated once: the step says its residual, or the compiler
    finds the two to be one. Where the steps are ``differentiated``, at least one is taken, for a start has no
    derivative of its own; and one that is not taken is cut off: at a solution its derivative need not be finite.
    """
    operator = iteration.operator
    assert operator is not None
    jaxpr, shapes = jax.make_jaxpr(lambda: _parts_at(operator, x0, theta), return_shape=True)()
    values = _tree.zeros_like(_unscaled_parts(shapes))  # sharded as they are
    unknown = jnp.full((), jnp.inf, _tree.accumulation_dtype(x0))
    zero, slopes = jnp.zeros((), int), (jnp.zeros_like(unknown),) * len(values)
    if values and not (isinstance(tolerance[1], (int, float)) and tolerance[1] == 0):
        slopes = _slopes_at(operator, x0, theta)
    start = Progress(
        x=x0,
        state=start_state(iteration, x0, theta),
        k=zero,
        status=_code(_RUNNING),
        residual=unknown,
        relative=unknown,
        first=(jnp.zeros_like(unknown),) * len(shapes),
        best=unknown,
        best_at=zero,
        moved=unknown,
        values=values,
        slopes=slopes,
    )
    cut = differentiated and not coupling(jaxpr.effects)  # others may still look at an element that is done
    absolute, relative = (jnp.asarray(part).astype(unknown.dtype) for part in tolerance)

    def body(carry: Progress) -> tuple[Progress, History | None]:
        x, state, k = carry.x, carry.state, carry.k
        index, ahead = jnp.minimum(k, max_steps - 1), None
        if isinstance(iteration.step, MeasuredStep) and not differentiated:
            new_x, new_state, parts = iteration.step.measured(x, state, theta, index)
            ahead, parts = checked(iteration, new_x, new_state, x, state), jax.lax.stop_gradient(parts)
        else:
            parts = _parts_at(operator, x, theta)
        here, theta_here = jax.lax.stop_gradient((x, theta))
        values = _unscaled_parts(parts)
        steepest = tuple(map(jnp.maximum, carry.slopes, _slopes(values, carry.values, carry.moved)))
        measured = _measure(operator, parts, here, theta_here, steepest)
        size, measure = _tree.norm(here), measured.largest
        within = jnp.asarray(True)
        for part, extent in zip(measured.sizes, measured.scales, strict=True):
            within = within & (part <= absolute + relative * extent)
        # The first size that is not zero: each part grows in its own unit.
        first = tuple(
            jnp.where(known > 0, known, part) for known, part in zip(carry.first, measured.sizes, strict=True)
        )
        better = measure < _IMPROVEMENT * carry.best
        best_at = jnp.where(better, k, carry.best_at)
        eps = _tree.rounding(x)
        rounding = 100 * eps
        # The steepest slope of a walk may lie far behind: what is compared with it may look small and still fall.
        small = measured.relative <= rounding if not values else jnp.asarray(False)
        still = (carry.moved <= rounding * size) | small
        # A part that begins at rounding level may well grow a million times: where there are several, that is no sign.
        growth = jnp.where((k < max_steps) | (len(first) > 1), eps**-2, _DIVERGENCE)
        grown = functools.reduce(
            jnp.logical_or, [part > growth * begun for part, begun in zip(measured.sizes, first, strict=True)]
        )
        tests = [
            (~(jnp.isfinite(measure) & jnp.isfinite(size)) | jnp.isnan(absolute + relative), _code(Status.NON_FINITE)),
            (within & (k >= int(differentiated)), _code(Status.CONVERGED)),
            (grown & (measured.relative > _STILL), _code(Status.DIVERGED)),
            (still & (k - best_at >= jnp.maximum(_PATIENCE, best_at)), _code(Status.STALLED)),
            (k >= max_steps, _code(Status.STEP_BUDGET_SPENT)),
        ]
        if operator.certificate is not None:
            verdict = operator.certificate(here, displacement(operator, here, theta_here), theta_here)
            tests.insert(2, (verdict != _RUNNING, verdict.astype(jnp.int32)))
        status = jnp.select([test for test, _ in tests], [code for _, code in tests], _code(_RUNNING))
        open_still = carry.status == _RUNNING
        status = jnp.where(open_still, status, carry.status)
        running = status == _RUNNING
        # What is not finite is let through by one more step, so that x shows it and no derivative hides it.
        advances = running | (open_still & (status == int(Status.NON_FINITE)))
        if ahead is None:
            before = x, state
            if cut:
                # Zero times an infinite slope is NaN: what is done repeats the first step, which has a derivative.
                before, index = _tree.where(advances, (before, index), ((start.x, start.state), jnp.zeros_like(index)))
            ahead = checked_step(iteration, *before, theta, index)
        new_x, new_state = ahead
        moved = _tree.norm(_tree.subtract(*jax.lax.stop_gradient((new_x, x))))
        new = Progress(
            _tree.where(advances, new_x, x),
            _tree.where(advances, new_state, state),
            jnp.where(running, k + 1, k),
            status,
            jnp.where(open_still, measure, carry.residual),
            jnp.where(open_still, measured.relative, carry.relative),
            first,
            jnp.where(better, measure, carry.best),
            best_at,
            jnp.where(running, moved, carry.moved),
            values,
            steepest,
        )
        return new, _row(iteration, record, x, theta, k, measure) if history else None

    return start, body


def stopping_loop(
    carry: Progress, body: Callable[[Progress], tuple[Progress, History | None]], num_rows: int
) -> Solution:
    """The loop that ``stopping`` has made, as a ``while_loop``; rows, if any, are written where the carry says."""
    rows = None
    if num_rows:
        shapes = jax.eval_shape(lambda carry: body(carry)[1], carry)
        rows = jax.tree.map(lambda one: jnp.zeros((num_rows, *one.shape), one.dtype), shapes)

    def step(loop: Any) -> Any:
        before, rows = loop
        after, row = body(before)
        rows = jax.tree.map(lambda column, one: column.at[before.k].set(one, mode="drop"), rows, row)
        return after, rows

    carry, rows = jax.lax.while_loop(lambda loop: loop[0].status == _RUNNING, step, (carry, rows))
    return stopping_finish(carry, rows)


def stopping_finish(carry: Progress, rows: History | None) -> Solution:
    """The solution of a loop that stopped by itself; rows that no step started from are blanked."""

    def blank(column: Array) -> Array:
        filler = jnp.nan if jnp.issubdtype(column.dtype, jnp.inexact) else 0
        used = jnp.arange(len(column)) < carry.k
        return jnp.where(jnp.expand_dims(used, tuple(range(1, column.ndim))), column, jnp.full_like(column, filler))

    return Solution(
        _shown(carry.x, carry.status),
        carry.k,
        carry.residual,
        carry.relative,
        carry.status,
        jax.tree.map(blank, rows),
        carry.state,
    )
