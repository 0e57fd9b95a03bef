"""Hypergradient estimators: ``init`` / ``update`` pairs that turn theta into a gradient for optax."""

from ._alternating import alternating
from ._bda import bda
from ._envelope import gap_function, meha
from ._error import ErrorEstimate
from ._estimator import Hypergradient, Info
from ._finite_difference import finite_difference, rank_one
from ._hoag import hoag
from ._hodl import hodl
from ._meta import anil, fomaml, imaml, maml, reptile
from ._multiplier import bamm, bamm_rate
from ._pessimistic import pessimistic
from ._soba import soba
from ._through import through, warm_started
from ._value_function import bome, bvfsm, pbgd

__all__ = [
    "ErrorEstimate",
    "Hypergradient",
    "Info",
    "alternating",
    "anil",
    "bamm",
    "bamm_rate",
    "bda",
    "bome",
    "bvfsm",
    "finite_difference",
    "fomaml",
    "gap_function",
    "hoag",
    "hodl",
    "imaml",
    "maml",
    "meha",
    "pbgd",
    "pessimistic",
    "rank_one",
    "reptile",
    "soba",
    "through",
    "warm_started",
]
