"""Iterations: ways to walk towards a fixed point, and transforms that make a new way of an old one."""

from ._aggregation import aggregate
from ._anderson import anderson
from ._iteration import (
    Iteration,
    as_iteration,
    fixed_point,
    from_optax,
    gradient_descent,
    layered,
    proximal_gradient,
)
from ._momentum import heavy_ball, nesterov
from ._relaxation import krasnoselskii_mann, project

__all__ = [
    "Iteration",
    "aggregate",
    "anderson",
    "as_iteration",
    "fixed_point",
    "from_optax",
    "gradient_descent",
    "heavy_ball",
    "krasnoselskii_mann",
    "layered",
    "nesterov",
    "project",
    "proximal_gradient",
]
