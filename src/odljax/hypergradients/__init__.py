"""Hypergradient estimators: ``init`` / ``update`` pairs that turn theta into a gradient for optax."""

from ._estimator import Hypergradient, Info
from ._hodl import hodl
from ._through import through, warm_started

__all__ = ["Hypergradient", "Info", "hodl", "through", "warm_started"]
