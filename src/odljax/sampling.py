"""Minibatches drawn inside compiled code: epoch after epoch, each sample at most once an epoch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ._checks import count, describe, leaf_name, record

__all__ = ["Sampler", "SamplerState", "epochs", "num_samples"]


class SamplerState(NamedTuple):
    """Where a sampler stands.

    Attributes:
        key: of the next epoch.
        rounds: 32-bit keys that say what this epoch's permutation is.
        position: batches drawn in this epoch.
    """

    key: Array
    rounds: Array
    position: Array


@record
class Sampler:
    """Draws the rows of minibatches; pure, so that it runs inside ``jit`` and ``scan``.

    Args:
        init: ``key -> state``.
        draw: ``state -> (batch, state)``; the batch says which rows: an array of indices, or the number of a fixed
            batch.
        take: ``(data, batch) -> data``, those rows of every leaf.
        num_batches: batches an epoch.
        batch_size: rows a batch.
        name: what messages call it.
    """

    init: Callable[[Array], SamplerState]
    draw: Callable[[SamplerState], tuple[Array, SamplerState]]
    take: Callable[[Any, Array], Any]
    num_batches: int
    batch_size: int
    name: str = "sampler"


def num_samples(who: str, name: str, data: Any) -> int:
    """Returns the common length of the leading axes of all leaves.

    Args:
        who: what the message calls the caller.
        name: what it calls the data.
        data: a pytree of arrays, their leading axis the samples.

    Raises:
        ValueError: there is no leaf, or the leaves have no common leading axis.

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> odl.sampling.num_samples("fit", "data", {"a": jnp.ones((5, 2)), "b": jnp.ones(5)})
        5
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(data)
    lengths = {leaf.shape[0] if getattr(leaf, "ndim", 0) else -1 for _, leaf in leaves}
    if len(lengths) != 1 or -1 in lengths:
        shapes = ", ".join(f"{leaf_name(path)} {describe(leaf)}" for path, leaf in leaves) or "no leaf at all"
        raise ValueError(
            f"{who}: every leaf of {name} needs one common leading axis, the samples; came {shapes}. Stack the samples."
        )
    return lengths.pop()


_ROUNDS = 12  # with 8, the orders of five rows are visibly not equally likely


def _below(size: int, number: Array, key: Array) -> Array:
    """A hash of the number under the key, between 0 and size - 1; size at most 2^16."""
    bits = (number + key) * jnp.uint32(0x9E3779B1)
    bits = (bits ^ (bits >> jnp.uint32(15))) * jnp.uint32(0x85EBCA77)
    return ((bits >> jnp.uint32(16)) * jnp.uint32(size)) >> jnp.uint32(16)


def _permuted(positions: Array, n: int, rounds: Array) -> Array:
    """The entries of a pseudo-random permutation of 0 .. n - 1 at these positions, without the other entries.

    A Feistel network shifts the rows, then the columns, of a grid with at least n cells; what lands on a cell beyond
    n walks on. Sorting random bits, the common way, costs 1 us an entry on a CPU: more than most minibatch gradients.
    """
    height = math.isqrt(n - 1) + 1
    width = -(-n // height)

    def shifted(at: Array, by: Array, size: int) -> Array:
        at = at + by
        return jnp.where(at >= jnp.uint32(size), at - jnp.uint32(size), at)

    def shuffled(cell: Array) -> Array:
        row = jax.lax.div(cell, jnp.uint32(width))
        column = cell - row * jnp.uint32(width)
        for k in range(0, _ROUNDS, 2):
            row = shifted(row, _below(height, column, rounds[k]), height)
            column = shifted(column, _below(width, row, rounds[k + 1]), width)
        return row * jnp.uint32(width) + column

    cell = positions.astype(jnp.uint32)
    if height * width == n:
        return shuffled(cell).astype(int)

    def walk(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        cell, walking = carry
        cell = jnp.where(walking, shuffled(cell), cell)
        return cell, cell >= jnp.uint32(n)

    cell, _ = jax.lax.while_loop(lambda carry: jnp.any(carry[1]), walk, (cell, jnp.ones_like(cell, bool)))
    return cell.astype(int)


def epochs(num_samples: int, batch_size: int, *, fixed_batches: bool = False) -> Sampler:
    r"""Returns the sampler that goes through the data in random order, epoch after epoch, without replacement.

    An epoch has floor(n / b) batches of b rows. Where b does not divide n, the rows that an epoch leaves out are chosen
    anew for each epoch, so that every row is drawn equally often in the long run; no row comes twice in an epoch.

    When: minibatches inside ``jit``, ``scan`` or ``vmap``; the stochastic hypergradient estimators draw theirs so.

    Args:
        num_samples: n, at least 1, static.
        batch_size: b, from 1 to n, static.
        fixed_batches: cut the data once into n / b contiguous batches, whose order alone is random: for methods that
            remember each batch, and a contiguous read. b must divide n; shuffle sorted data beforehand.

    Raises:
        ValueError: a size out of range; fixed batches where b does not divide n.

    Cost: 12 rounds of integer arithmetic on b numbers and one gather a draw, whatever n; no array of length n.

    Source: random reshuffling, as in Mishchenko, Khaled and Richtarik (2020); the permutations are those of a Feistel
    network, pseudo-random and, from n = 5 on, not all of exactly the same probability.

    Example:
        >>> import jax, jax.numpy as jnp, odljax as odl
        >>> sampler = odl.sampling.epochs(6, 2)
        >>> _, drawn = jax.lax.scan(lambda s, _: sampler.draw(s)[::-1], sampler.init(jax.random.key(0)), length=3)
        >>> sorted(drawn.ravel().tolist())
        [0, 1, 2, 3, 4, 5]
    """
    n, b = count("epochs", "num_samples", num_samples), count("epochs", "batch_size", batch_size)
    if b > n:
        raise ValueError(f"epochs: batch_size is {b}, but there are {n} samples. Ask for at most {n}.")
    if fixed_batches and n % b:
        near = max(d for d in range(1, b + 1) if n % d == 0)
        raise ValueError(
            f"epochs: fixed batches need a batch_size that divides the number of samples; {b} does not divide {n}. "
            f"Take {near}, or drop {n % b} samples."
        )
    num_batches = n // b

    def init(key: Array) -> SamplerState:
        return SamplerState(key, jnp.zeros(_ROUNDS, jnp.uint32), jnp.zeros((), int))

    def draw(state: SamplerState) -> tuple[Array, SamplerState]:
        def reshuffled() -> tuple[Array, Array]:
            key, now = jax.random.split(state.key)
            return key, jax.random.bits(now, (_ROUNDS,), jnp.uint32)

        key, rounds = jax.lax.cond(state.position == 0, reshuffled, lambda: (state.key, state.rounds))
        if fixed_batches:
            batch = _permuted(state.position, num_batches, rounds)
        else:
            batch = _permuted(state.position * b + jnp.arange(b), n, rounds)
        return batch, SamplerState(key, rounds, (state.position + 1) % num_batches)

    def take(data: Any, batch: Array) -> Any:
        if fixed_batches:
            return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, batch * b, b), data)
        return jax.tree.map(lambda leaf: leaf[batch], data)

    return Sampler(init, draw, take, num_batches, b, "epochs")
