"""Learned initialisation: the inner start as a differentiable function of theta."""

from __future__ import annotations

from typing import Any

from .._checks import as_inner, is_callable
from ..solvers import Solver

_BLIND = {
    "implicit": "differentiates at the solution, whatever the start",
    "on_support": "differentiates at the solution, whatever the start",
    "one_step": "differentiates at the solution, whatever the start",
    "phantom": "differentiates at the solution, whatever the start",
    "truncated": "stops the derivative before it reaches the start",
}


def check_start(who: str, start: Any, solver: Solver) -> None:
    """Refuses a learned start for a derivative that does not see it: its gradient would be zero without a word."""
    if start is None:
        return
    is_callable(who, "start", start, "theta")
    if solver.derivative in _BLIND:
        raise ValueError(
            f"{who}: a learned start needs a derivative that reaches it, and {solver.name} "
            f"{_BLIND[solver.derivative]}. Use unrolled, forward or a bare for_steps, or pass x0 to init."
        )


def first_start(who: str, start: Any, x0: Any) -> Any:
    """What the state remembers of x0: nothing where theta says where to start."""
    return as_inner(who, "x0", x0, or_complex=True) if start is None else None


def started(who: str, start: Any, theta: Any, x0: Any) -> Any:
    """The inner start of one update."""
    return x0 if start is None else as_inner(who, "start(theta)", start(theta), or_complex=True)
