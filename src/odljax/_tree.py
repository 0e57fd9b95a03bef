"""Vector arithmetic on pytrees that keeps each leaf's dtype, whatever the dtype of the coefficient."""

from __future__ import annotations

import functools
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ._types import Scalar

T = TypeVar("T")


def _cast(coefficient: Scalar | Array, leaf: Array) -> Array:
    return jnp.asarray(coefficient).astype(leaf.dtype)


def scale(coefficient: Scalar | Array, x: T) -> T:
    """``coefficient * x``."""
    return jax.tree.map(lambda leaf: _cast(coefficient, leaf) * leaf, x)


def divide(x: T, denominator: Scalar | Array) -> T:
    """``x / denominator``."""
    return jax.tree.map(lambda leaf: leaf / _cast(denominator, leaf), x)


def add_scaled(x: T, coefficient: Scalar | Array, direction: T) -> T:
    """``x + coefficient * direction``."""
    return jax.tree.map(lambda a, d: a + _cast(coefficient, a) * d.astype(a.dtype), x, direction)


def add(x: T, y: T) -> T:
    """``x + y``."""
    return jax.tree.map(jnp.add, x, y)


def subtract(x: T, y: T) -> T:
    """``x - y``."""
    return jax.tree.map(jnp.subtract, x, y)


def negative(x: T) -> T:
    """``-x``."""
    return jax.tree.map(jnp.negative, x)


def interpolate(x: T, y: T, weight: Scalar | Array) -> T:
    """``x + weight * (y - x)``; exactly ``y`` where the weight is a Python 1."""
    if isinstance(weight, (int, float)) and weight == 1:
        return y
    return add_scaled(x, weight, subtract(y, x))


def where(condition: Array, x: T, y: T) -> T:
    """``x`` where the scalar condition holds, ``y`` elsewhere."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), x, y)


def zeros_like(x: T) -> T:
    """Zeros of the same structure, shapes and dtypes."""
    return jax.tree.map(jnp.zeros_like, x)


def conjugate(x: T) -> T:
    """The complex conjugate; real leaves as they are."""
    return jax.tree.map(lambda leaf: jnp.conj(leaf) if jnp.iscomplexobj(leaf) else leaf, x)


def real_size(x: object) -> int:
    """How many real numbers the leaves hold; a complex one is two."""
    return sum(leaf.size * (2 if jnp.iscomplexobj(leaf) else 1) for leaf in jax.tree.leaves(x))


def is_complex(x: object) -> bool:
    """Whether a leaf is complex."""
    return any(jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(x))


def strong(x: T) -> T:
    """The same arrays without weak types, so that a loop's carry keeps its type."""
    return jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, jnp.asarray(leaf).dtype), x)


def accumulation_dtype(x: object) -> np.dtype:
    """The widest real dtype of the leaves, float32 at least: sums over leaves are taken in it."""
    kinds = (jnp.finfo(leaf.dtype).dtype for leaf in jax.tree.leaves(x))
    return np.result_type(np.float32, *(kind for kind in kinds if kind.itemsize >= 4))


def vdot(x: T, y: T) -> Array:
    """``<x, y>`` over all leaves, accumulated in float32 at least; complex numbers are pairs of real ones.

    Products of entries under- and overflow at the root of the dtype's range: where units may be anything, divide by
    ``magnitude`` first.

    Product, then sum: a contraction over a sharded axis is ambiguous under explicit sharding.
    """
    dtype = accumulation_dtype((x, y))
    products = jax.tree.map(lambda a, b: jnp.sum(_product(a, b).astype(dtype)), _widen(x), _widen(y))
    return sum(jax.tree.leaves(products), start=jnp.zeros((), dtype))


def _product(a: Array, b: Array) -> Array:
    return a.real * b.real + a.imag * b.imag if jnp.iscomplexobj(a) else a * b


def _widen(x: T) -> T:
    return jax.tree.map(lambda leaf: leaf.astype(np.float32) if leaf.dtype.itemsize < 4 else leaf, x)


def norm(x: object) -> Array:
    """The Euclidean norm over all leaves, whatever their units; its derivative at zero is zero, not NaN.

    Entries are scaled by a power of two before they are squared: nothing under- or overflows whose norm does not, and
    no digit differs from the plain root of the sum where that is representable.
    """
    scale = magnitude(x)
    squared = vdot(*(unscaled(x, scale),) * 2)
    positive = squared > 0
    return jnp.where(positive, scale * jnp.sqrt(jnp.where(positive, squared, jnp.ones_like(squared))), squared)


def magnitude(x: object) -> Array:
    """A power of two within a factor of two below the largest entry, without a derivative; 1 where there is none.

    ``unscaled(x, magnitude(x))`` has entries of size 1, so that its squares and inner products are safe.
    """
    dtype = accumulation_dtype(x)
    sizes = [jnp.max(jnp.abs(leaf), initial=0).astype(dtype) for leaf in jax.tree.leaves(jax.lax.stop_gradient(x))]
    return power_of_two(functools.reduce(jnp.maximum, sizes, jnp.zeros((), dtype)))


def power_of_two(size: Array) -> Array:
    """The power of two within a factor of two below a positive number; 1 for zero, a NaN or an infinity.

    It is held within a factor of four of the ends of the dtype, so that it and its inverse are normal numbers.
    """
    info = jnp.finfo(size.dtype)
    bits, exponent = (np.int64, 0x7FF << 52) if info.bits == 64 else (np.int32, 0xFF << 23)
    held = jnp.clip(size, 4 * info.tiny, 0.25 / info.tiny)
    held = jnp.where((size > 0) & jnp.isfinite(size), held, jnp.ones_like(size))
    whole = jax.lax.bitcast_convert_type(held, bits) & np.asarray(exponent, bits)
    return jax.lax.bitcast_convert_type(whole, size.dtype)


def unscaled(x: T, scale: Array) -> T:
    """``x / scale`` for a power of two, in the dtype of the scale; exact where nothing underflows."""
    inverse = 1 / scale

    def divided(leaf: Array) -> Array:
        kind = np.result_type(leaf.dtype, scale.dtype) if jnp.iscomplexobj(leaf) else scale.dtype
        return leaf.astype(kind) * inverse.astype(kind)

    return jax.tree.map(divided, x)


def per_unit(x: T, unit: Array) -> T:
    """``x / unit`` for a power of two, in the dtypes of x."""
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), unscaled(x, unit), x)


def rounding(x: object) -> float:
    """The rounding unit of the leaf with the fewest digits."""
    return max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(x))


def all_finite(x: object) -> Array:
    """Whether no leaf holds a NaN or an infinity."""
    flags = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(x)]
    return jnp.all(jnp.stack(flags)) if flags else jnp.asarray(True)
