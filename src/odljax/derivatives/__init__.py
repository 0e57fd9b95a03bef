"""Derivatives: transforms solver -> solver that keep the point and change how it is differentiated."""

from ._forward import forward
from ._implicit import implicit, one_step
from ._maskable import maskable
from ._on_support import on_support
from ._phantom import phantom
from ._unrolled import truncated, unrolled

__all__ = ["forward", "implicit", "maskable", "on_support", "one_step", "phantom", "truncated", "unrolled"]
