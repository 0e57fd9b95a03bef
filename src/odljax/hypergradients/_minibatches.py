"""How the stochastic estimators draw: one sampler for the inner data, one for the outer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from .._checks import count, record
from ..sampling import Sampler, epochs, num_samples
from ._estimator import pair

Arguments = tuple[Any, ...]


@record
class Minibatches:
    """Draws for the two losses; an empty tuple of arguments where there are no data, all data without a batch size.

    Args:
        start: ``data -> state``.
        inner: ``(state, data) -> (arguments, state)``, a fresh inner minibatch.
        outer: the same for the outer loss.
        numbered_inner: ``(state, data) -> (batch, arguments, state)``, with what the sampler calls the batch; None
            where everything is taken.
        numbered_outer: the same for the outer loss.
        whole: ``data -> (inner arguments, outer arguments)``, all of the data.
        samplers: ``data -> (inner sampler, outer sampler)``; None where everything is taken.
        name: what messages call it.
    """

    start: Callable[[Arguments], Any]
    inner: Callable[[Any, Arguments], tuple[Arguments, Any]]
    outer: Callable[[Any, Arguments], tuple[Arguments, Any]]
    numbered_inner: Callable[[Any, Arguments], tuple[Any, Arguments, Any]]
    numbered_outer: Callable[[Any, Arguments], tuple[Any, Arguments, Any]]
    whole: Callable[[Arguments], tuple[Arguments, Arguments]]
    samplers: Callable[[Arguments], tuple[Sampler | None, Sampler | None]]
    name: str = "minibatches"


def minibatches(
    who: str, batch_size: int | tuple[int, int] | None, key: Array | None, *, fixed_batches: bool = False
) -> Minibatches:
    """The draws of an estimator: ``batch_size`` rows of each data set (a pair: inner, outer), or all of them."""
    sizes = batch_size if isinstance(batch_size, tuple) else (batch_size, batch_size)
    if len(sizes) != 2:
        raise ValueError(f"{who}: batch_size must be one number or (inner, outer); {batch_size!r} came.")
    for size in sizes:
        if size is not None:
            count(who, "batch_size", size)
    names = ("the inner data", "the outer data")

    def samplers(data: Arguments) -> Any:
        sides = pair(who, data)
        if not data and any(size is not None for size in sizes):
            raise TypeError(
                f"{who}: batch_size is {batch_size}, but no data came. Pass inner_data and outer_data, whose leaves "
                f"have the samples as leading axis, to init and update."
            )
        return tuple(
            None if size is None else epochs(num_samples(who, name, side), size, fixed_batches=fixed_batches)
            for size, name, side in zip(sizes, names, sides, strict=True)
        )

    def start(data: Arguments) -> Any:
        keys = jax.random.split(jax.random.key(0) if key is None else key)
        return tuple(None if one is None else one.init(k) for one, k in zip(samplers(data), keys, strict=True))

    def draw(side: int) -> Callable[[Any, Arguments], Any]:
        def drawn(state: Any, data: Arguments) -> Any:
            sampler, arguments = samplers(data)[side], pair(who, data)[side]
            if sampler is None:
                return None, arguments, state
            batch, moved = sampler.draw(state[side])
            state = (moved, state[1]) if side == 0 else (state[0], moved)
            return batch, (sampler.take(arguments[0], batch),), state

        return drawn

    inner, outer = draw(0), draw(1)
    return Minibatches(
        start=start,
        inner=lambda state, data: inner(state, data)[1:],
        outer=lambda state, data: outer(state, data)[1:],
        numbered_inner=inner,
        numbered_outer=outer,
        whole=lambda data: pair(who, data),
        samplers=samplers,
    )
