"""Derivatives: transforms solver -> solver that keep the point and change how it is differentiated."""

from ._implicit import implicit, one_step
from ._unrolled import truncated, unrolled

__all__ = ["implicit", "one_step", "truncated", "unrolled"]
