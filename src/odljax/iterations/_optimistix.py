"""Optimistix's solvers as iterations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .. import _tree
from .._checks import is_a, is_callable, same_as
from .._types import State, Step
from ..operators import Operator, as_operator, gradient
from ._iteration import Iteration, restart_by
from ._newton import half_square

PROBLEMS = ("minimise", "least_squares", "root_find", "fixed_point")


def from_optimistix(
    solver: Any, function: Callable[[Any, Any], Any], problem: str, *, options: dict[str, Any] | None = None
) -> Iteration:
    r"""Returns the steps of any optimistix solver as an iteration.

    When: BFGS, dogleg and other trust regions, nonlinear conjugate gradients, Nelder-Mead, Chord, bisection. The stop
    test of optimistix, with the tolerances of ``solver``, freezes the iterate; ours ends the loop: ask for no more
    digits than the solver was made for.

    The operator, and so residual and implicit derivative, follow the problem: the unit gradient step for "minimise" and
    (on half the square) "least_squares", :math:`x - r(x)` for "root_find", the function itself for "fixed_point".
    Through the steps there is forward mode, and reverse mode where the solver has no inner loop; methods that only
    compare values, such as bisection and Nelder-Mead, have a derivative of zero there, and so has what is frozen, which
    ``truncated`` and ``phantom`` over ``for_steps`` look at: use ``implicit``. Complex
    unknowns, residuals and maps are given to the solver as pairs of real ones.

    Bisection: say which end is negative, ``flip=False`` for ``f(lower) < 0 < f(upper)``, ``flip=True`` for the reverse.
    Its default, "detect", raises inside compiled code where an element has no root between the ends, and is refused
    here; such an element ends at an end point, STALLED or with its budget spent.

    Args:
        solver: an optimistix solver of this kind of problem, for instance ``optimistix.BFGS(rtol=1e-6, atol=1e-6)``.
        function: ``(x, theta) -> scalar``, residual, or x, as the problem wants it.
        problem: "minimise", "least_squares", "root_find" or "fixed_point".
        options: those of the solver, such as the ``lower`` and ``upper`` of bisection.

    Raises:
        ImportError: optimistix is not installed.
        ValueError: an unknown problem.
        TypeError: solver is none of optimistix, function is none.
        ValueError: a bisection whose ``flip`` is "detect".

    Cost: that of the solver's step.

    Source: optimistix, Rader, Lyons and Kidger (2024).

    Example:
        >>> import optimistix, odljax as odl
        >>> bracket = {"lower": 0.0, "upper": 4.0}
        >>> bisection = optimistix.Bisection(rtol=1e-6, atol=1e-6, flip=False)
        >>> root = odl.from_optimistix(bisection, lambda x, theta: x**3 - theta, "root_find", options=bracket)
        >>> round(float(odl.until_converged(root, tol=1e-4)(1.0, 8.0).x), 4)
        2.0
    """
    try:
        import equinox
        import optimistix
    except ImportError as error:
        raise ImportError("from_optimistix: optimistix is not installed; run pip install optimistix.") from error

    who = "from_optimistix"
    is_callable(who, "function", function, "x, theta")
    hint = "Make one with optimistix, for instance optimistix.BFGS(rtol=1e-6, atol=1e-6)."
    is_a(who, "solver", solver, optimistix.AbstractIterativeSolver, hint)
    if problem not in PROBLEMS:
        raise ValueError(f"{who}: problem must be one of {', '.join(map(repr, PROBLEMS))}; {problem!r} came.")
    if isinstance(solver, optimistix.Bisection) and solver.flip == "detect" and not solver.expand_if_necessary:
        raise ValueError(
            f"{who}: Bisection(flip='detect') raises inside compiled code where there is no root between the ends. Say "
            f"which end is negative: flip=False for f(lower) < 0 < f(upper), flip=True for the reverse."
        )
    fixed: tuple[Any, ...] = (frozenset(),)
    settings = dict(options or {})

    def start(x: Any, theta: Any) -> Any:
        pair = _real_pair(function, x)
        value, aux = jax.eval_shape(pair, _apart(x), theta)
        return solver.init(pair, _apart(x), theta, settings, value, aux, *fixed)

    def init(x: Any, theta: Any) -> State:
        arrays, _ = equinox.partition(start(x, theta), equinox.is_array)
        return tuple(jax.tree.leaves(arrays))

    def step(x: Any, state: State, theta: Any, k: Step) -> tuple[Any, State]:
        pair, parts = _real_pair(function, x), _apart(x)
        # The part of the state that is no array is not carried: it is the same at each step.
        shapes, rest = equinox.partition(
            equinox.filter_eval_shape(start, x, theta), lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
        )
        full = equinox.combine(jax.tree.unflatten(jax.tree.structure(shapes), state), rest)
        done, result = solver.terminate(pair, parts, theta, settings, full, *fixed)
        done = jax.lax.stop_gradient(done | (result != optimistix.RESULTS.successful))
        new, new_full, _ = solver.step(pair, parts, theta, settings, full, *fixed)
        new_state = tuple(jax.tree.leaves(equinox.partition(new_full, equinox.is_array)[0]))
        return _tree.where(done, x, _together(x, new)), _tree.where(
            done, state, same_as(who, "the state", new_state, state)
        )

    if problem == "fixed_point":
        operator = as_operator(function)
    elif problem == "root_find":
        operator = Operator(lambda x, theta: _tree.subtract(x, function(x, theta)), function, name=who)
    else:
        operator = gradient(function if problem == "minimise" else half_square(function), 1.0)
    return Iteration(init, step, operator, who, restart=restart_by(init))


def _apart(x: Any) -> Any:
    """Complex leaves as pairs of real ones."""
    return jax.tree.map(lambda leaf: (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else leaf, x)


def _together(like: Any, parts: Any) -> Any:
    """The inverse: leaves are complex where those of ``like`` are."""
    return jax.tree.map(lambda leaf, part: jax.lax.complex(*part) if jnp.iscomplexobj(leaf) else part, like, parts)


def _real_pair(function: Callable[[Any, Any], Any], like: Any) -> Callable[[Any, Any], tuple[Any, None]]:
    """The function on pairs, with the empty second result that optimistix asks for."""
    return lambda parts, theta: (_apart(function(_together(like, parts), theta)), None)
