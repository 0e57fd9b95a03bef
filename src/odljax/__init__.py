"""Optimisation problems inside optimisation problems, and the gradient that the outer one needs.

The six nouns: an **operator** has the answer as its fixed point; an **iteration** walks towards it; a **solver**
knows when to stop; a **derivative** says how the solver is differentiated; a **hypergradient** turns theta into a
gradient for optax; an **application** is a real problem built of these.
"""

from . import derivatives, diagnostics, hypergradients, iterations, linear, operators, problems, prox, sampling, solvers
from ._types import STATUS_MESSAGES, Status
from .derivatives import forward, implicit, one_step, phantom, truncated, unrolled
from .hypergradients import Hypergradient, Info
from .iterations import (
    Iteration,
    aggregate,
    anderson,
    fixed_point,
    from_optax,
    gradient_descent,
    heavy_ball,
    krasnoselskii_mann,
    layered,
    nesterov,
    project,
    proximal_gradient,
)
from .operators import Operator
from .solvers import Solution, Solver, check, for_steps, until_converged

__all__ = [
    "STATUS_MESSAGES",
    "Hypergradient",
    "Info",
    "Iteration",
    "Operator",
    "Solution",
    "Solver",
    "Status",
    "aggregate",
    "anderson",
    "check",
    "derivatives",
    "diagnostics",
    "fixed_point",
    "for_steps",
    "forward",
    "from_optax",
    "gradient_descent",
    "heavy_ball",
    "hypergradients",
    "implicit",
    "iterations",
    "krasnoselskii_mann",
    "layered",
    "linear",
    "nesterov",
    "one_step",
    "operators",
    "phantom",
    "problems",
    "project",
    "prox",
    "proximal_gradient",
    "sampling",
    "solvers",
    "truncated",
    "unrolled",
    "until_converged",
]
