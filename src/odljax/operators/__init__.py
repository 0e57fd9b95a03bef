"""Operators: maps ``T(x, theta) -> x`` whose fixed points are the answers, each with the metric that suits it."""

from ._admm import ADMMVariables, SplitVariables, admm, consensus_admm, linearized_admm, quadratic_argmin
from ._bregman import entropic, mirror
from ._coordinate_descent import block_coordinate_descent, coordinate_descent
from ._denoiser import plug_and_play, red
from ._douglas_rachford import davis_yin, douglas_rachford, peaceman_rachford
from ._forward_backward_forward import forward_backward_forward
from ._gradient import forward_backward, gradient
from ._hard_thresholding import hard_thresholding
from ._multipliers import linearized_alm, proximal_alm
from ._operator import Operator, Residual, as_operator, averaged, compose
from ._preconditioned import preconditioned_forward_backward
from ._primal_dual import chambolle_pock, condat_vu
from ._quadratic_program import (
    QPVariables,
    QuadraticProgram,
    box_quadratic_program,
    equality_quadratic_program,
    equilibrate_quadratic_program,
    polish_quadratic_program,
    quadratic_program,
)
from ._weights import PrimalDual

__all__ = [
    "ADMMVariables",
    "Operator",
    "PrimalDual",
    "QPVariables",
    "QuadraticProgram",
    "Residual",
    "SplitVariables",
    "admm",
    "as_operator",
    "averaged",
    "block_coordinate_descent",
    "box_quadratic_program",
    "chambolle_pock",
    "compose",
    "condat_vu",
    "consensus_admm",
    "coordinate_descent",
    "davis_yin",
    "douglas_rachford",
    "entropic",
    "equality_quadratic_program",
    "equilibrate_quadratic_program",
    "forward_backward",
    "forward_backward_forward",
    "gradient",
    "hard_thresholding",
    "linearized_admm",
    "linearized_alm",
    "mirror",
    "peaceman_rachford",
    "plug_and_play",
    "polish_quadratic_program",
    "preconditioned_forward_backward",
    "proximal_alm",
    "quadratic_argmin",
    "quadratic_program",
    "red",
]
