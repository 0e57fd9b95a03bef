"""Hypergradient estimators: ``init`` / ``update`` pairs that turn theta into a gradient for optax."""

from ._estimator import Hypergradient, Info
from ._hodl import hodl
from ._soba import soba
from ._through import through, warm_started

__all__ = ["Hypergradient", "Info", "hodl", "soba", "through", "warm_started"]
