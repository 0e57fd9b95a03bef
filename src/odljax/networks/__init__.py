"""Flax modules made for solvers: networks that set an operator's parameters, and layers of unrolled networks."""

from ._dladmm import DLADMMLayer, DLADMMVariables
from ._pixel_weights import PixelWeights, neighbourhoods

__all__ = ["DLADMMLayer", "DLADMMVariables", "PixelWeights", "neighbourhoods"]
