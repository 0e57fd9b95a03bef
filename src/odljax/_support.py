"""Which entries of a vector are the largest."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from . import _tree


def largest(x: Any, k: int, *, rows: bool = False) -> Any:
    """A boolean mask like ``x`` of its k entries of largest magnitude, over the whole tree or in each row.

    Rows run along the last axis; of equal entries the first are taken, leaf by leaf; a NaN counts as the largest. All
    entries where there are k or fewer. The mask is locally constant and carries no derivative.
    """
    sizes = jax.tree.map(lambda leaf: jnp.abs(jax.lax.stop_gradient(leaf)), x)
    if rows:
        return jax.tree.map(lambda leaf: _largest_in_rows(jnp.atleast_1d(leaf), k).reshape(leaf.shape), sizes)
    widest = _tree.accumulation_dtype(sizes)
    flat, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf.astype(widest), sizes))
    mask = unravel(_first(flat, k).astype(widest))
    return jax.tree.map(lambda leaf: leaf > 0, mask)


def _first(flat: Array, k: int) -> Array:
    _, places = jax.lax.top_k(flat, min(k, flat.size))
    return jnp.zeros(flat.size, bool).at[places].set(True)


def _largest_in_rows(leaf: Array, k: int) -> Array:
    rows = leaf.reshape((-1, leaf.shape[-1]))
    return jax.vmap(lambda row: _first(row, k))(rows).reshape(leaf.shape)


def keep(x: Any, mask: Any) -> Any:
    """``x`` on the mask and zero off it."""
    return jax.tree.map(lambda leaf, chosen: jnp.where(chosen, leaf, jnp.zeros_like(leaf)), x, mask)
