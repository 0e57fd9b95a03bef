"""Hypergradient estimators: ``init`` / ``update`` pairs that turn theta into a gradient for optax."""

from ._bda import bda
from ._error import ErrorEstimate
from ._estimator import Hypergradient, Info
from ._finite_difference import finite_difference, rank_one
from ._hoag import hoag
from ._hodl import hodl
from ._meta import anil, fomaml, imaml, maml, reptile
from ._soba import soba
from ._through import through, warm_started

__all__ = [
    "ErrorEstimate",
    "Hypergradient",
    "Info",
    "anil",
    "bda",
    "finite_difference",
    "fomaml",
    "hoag",
    "hodl",
    "imaml",
    "maml",
    "rank_one",
    "reptile",
    "soba",
    "through",
    "warm_started",
]
