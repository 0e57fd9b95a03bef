"""Hypergradient estimators: ``init`` / ``update`` pairs that turn theta into a gradient for optax."""

from ._alternating import alternating
from ._amigo import amigo, stocbio
from ._bda import bda
from ._bsa import bsa, ttsa
from ._envelope import gap_function, meha
from ._error import ErrorEstimate
from ._estimator import Hypergradient, Info
from ._f2sa import f2sa
from ._finite_difference import finite_difference, rank_one
from ._fsla import fsla
from ._hoag import hoag
from ._hodl import hodl
from ._levels import Level, descend
from ._meta import anil, fomaml, imaml, maml, reptile
from ._multiplier import bamm, bamm_rate
from ._pessimistic import pessimistic
from ._pzobo import pzobo
from ._reversible import reversible
from ._saba import saba
from ._soba import soba
from ._srba import srba
from ._storm import mrbo, sustain
from ._through import through, warm_started
from ._value_function import bome, bvfsm, pbgd
from ._vrbo import vrbo

__all__ = [
    "ErrorEstimate",
    "Hypergradient",
    "Info",
    "Level",
    "alternating",
    "amigo",
    "anil",
    "bamm",
    "bamm_rate",
    "bda",
    "bome",
    "bsa",
    "bvfsm",
    "descend",
    "f2sa",
    "finite_difference",
    "fomaml",
    "fsla",
    "gap_function",
    "hoag",
    "hodl",
    "imaml",
    "maml",
    "meha",
    "mrbo",
    "pbgd",
    "pessimistic",
    "pzobo",
    "rank_one",
    "reptile",
    "reversible",
    "saba",
    "soba",
    "srba",
    "stocbio",
    "sustain",
    "through",
    "ttsa",
    "vrbo",
    "warm_started",
]
