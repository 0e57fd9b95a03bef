"""Operators: maps ``T(x, theta) -> x`` whose fixed points are the answers, each with the metric that suits it."""

from ._gradient import forward_backward, gradient
from ._operator import Operator, as_operator, averaged, compose
from ._splitting import ADMMVariables, linearized_admm

__all__ = [
    "ADMMVariables",
    "Operator",
    "as_operator",
    "averaged",
    "compose",
    "forward_backward",
    "gradient",
    "linearized_admm",
]
