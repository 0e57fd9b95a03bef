"""Aliases and status codes that every other module shares."""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from jax import Array

# The import of jaxtyping is a tenth of ours, and annotations are checked only where somebody has loaded it to that end.
if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Float, Inexact, Int, PyTree
else:

    class _Unchecked:
        def __class_getitem__(cls, item: Any) -> Any:
            return Any

    Float = Inexact = Int = PyTree = _Unchecked

X = TypeVar("X")
"""The inner variable: a pytree of floating-point arrays; complex ones are pairs of real numbers."""

Theta = TypeVar("Theta")
"""The hyper-variable: a pytree; its floating-point leaves are differentiated."""

State = Any
"""What an iteration or an estimator remembers between two steps: a pytree of arrays."""

Data = PyTree
"""What is observed: a batch, a measurement."""

Step = Int[Array, ""]
"""The number of the step, counted from zero by the loop that owns it."""

Scalar = float | int | Float[Array, ""] | Int[Array, ""] | np.floating | np.integer
"""A number: a Python or NumPy scalar, or an array without axes, traced or not."""

Coefficient = Scalar | Callable[..., Any]
"""A number, or a function of ``theta``, of ``k``, or of ``(theta, k)``; every optax schedule is one."""


class Status(enum.IntEnum):
    """How a solve ended, sorted by severity; every solution and every linear solve carries one per element."""

    CONVERGED = 0
    COMPLETED = 1
    STEP_BUDGET_SPENT = 2
    ILL_CONDITIONED = 3
    STALLED = 4
    DIVERGED = 5
    PRIMAL_INFEASIBLE = 6
    DUAL_INFEASIBLE = 7
    NON_FINITE = 8


STATUS_MESSAGES: dict[Status, str] = {
    Status.CONVERGED: "the residual is within the tolerance",
    Status.COMPLETED: "all the steps asked for were taken (no tolerance was set)",
    Status.STEP_BUDGET_SPENT: (
        "the step budget was spent before the residual was small; raise max_steps or num_steps, loosen tol or use a "
        "faster iteration"
    ),
    Status.ILL_CONDITIONED: (
        "the residual of a linear solve is as small as was asked for, but the system is so ill-conditioned that the "
        "solution has lost its digits to rounding; solve in float64, rescale or regularise the problem"
    ),
    Status.STALLED: (
        "the residual stopped falling above the tolerance: at the rounding level of this dtype (loosen tol, or solve "
        "in float64) or, in a linear solve, because the matrix is singular or not positive definite"
    ),
    Status.DIVERGED: "the residual grew without bound; take a smaller step size",
    Status.PRIMAL_INFEASIBLE: (
        "the constraints contradict each other: the steps converge to a proof that no point meets them; relax them"
    ),
    Status.DUAL_INFEASIBLE: (
        "the objective falls without bound on the constraints: the steps converge to a direction along which it does; "
        "bound the variables or make the objective strongly convex"
    ),
    Status.NON_FINITE: (
        "a NaN or an infinity came in with x0 or theta, or appeared on the way; look at them, then at the step size"
    ),
}
"""The one table of messages behind the codes."""
