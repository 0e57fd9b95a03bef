"""Iterations: ways to walk towards a fixed point, and transforms that make a new way of an old one."""

from ._aggregation import aggregate
from ._anderson import anderson
from ._best import best_so_far
from ._halpern import halpern
from ._hard_thresholding import accelerated_hard_thresholding
from ._iteration import (
    Iteration,
    as_iteration,
    fixed_point,
    from_optax,
    gradient_descent,
    layered,
    proximal_gradient,
)
from ._line_search import backtracking, line_search, polyak
from ._momentum import heavy_ball, nesterov
from ._newton import gauss_newton, levenberg_marquardt, newton
from ._optimistix import from_optimistix
from ._quadratic_program import quadratic_program
from ._relaxation import krasnoselskii_mann, project
from ._secant import broyden, squarem

__all__ = [
    "Iteration",
    "accelerated_hard_thresholding",
    "aggregate",
    "anderson",
    "as_iteration",
    "backtracking",
    "best_so_far",
    "broyden",
    "fixed_point",
    "from_optax",
    "from_optimistix",
    "gauss_newton",
    "gradient_descent",
    "halpern",
    "heavy_ball",
    "krasnoselskii_mann",
    "layered",
    "levenberg_marquardt",
    "line_search",
    "nesterov",
    "newton",
    "polyak",
    "project",
    "proximal_gradient",
    "quadratic_program",
    "squarem",
]
