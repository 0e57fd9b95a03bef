"""Isotonic regression, by merging sorted stretches: the size of the program does not depend on the data."""

import functools

import jax
import jax.numpy as jnp
from jax import Array


@functools.partial(jax.jit, inline=True)
def isotonic_regression(y: Array, weights: Array | None = None) -> Array:
    """Return the non-decreasing rows x that minimise sum weights (x - y)^2 along the last axis.

    x is constant on blocks, each the weighted mean of y there; the blocks are found without derivative, and plain
    autodiff of the means is right. Equal neighbours that need no averaging stay blocks of their own. A row with a NaN
    is NaN. weights > 0 broadcast to y. log2(n) rounds, in each of which sorted halves of stretches are merged by
    pooling around their seams; a few passes over y a round.
    """
    shape = y.shape
    rows = y.reshape(-1, shape[-1])
    mass = jnp.ones_like(rows) if weights is None else jnp.broadcast_to(weights, shape).reshape(rows.shape)
    return jax.vmap(_regression)(rows, mass).reshape(shape)


def _regression(y: Array, mass: Array) -> Array:
    if y.size < 2:
        return y
    held = jax.lax.stop_gradient(y)
    x, joined = _levels(held, jax.lax.stop_gradient(mass))
    block = jnp.cumsum(~joined) - 1
    # in deviations from the level, which is near the mean: a long sum of these is exact to rounding
    level = jnp.where(joined | jnp.append(joined[1:], False), x, 0)
    sums = _sum(mass * (y - level), block)
    masses = _sum(mass, block)
    x = level + (sums / jnp.where(masses == 0, 1, masses))[block]
    return jnp.where(jnp.any(jnp.isnan(held)), jnp.nan, x)


def _sum(values: Array, block: Array) -> Array:
    return jax.ops.segment_sum(values, block, values.size, indices_are_sorted=True)


def _levels(y: Array, mass: Array) -> tuple[Array, Array]:
    """Return the isotonic regression, and whether an entry is in one block with the entry before.

    A round merges the two sorted halves of each stretch of twice the length. That changes one run of entries around the
    seam: those on the left above a level c and those on the right below it become c, their mean. c is the root of a
    decreasing, piecewise linear function: Newton's method, within a bracket, ends on the right piece.
    """
    n = y.size
    places = jnp.arange(n)

    def merge(level: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        x, joined = carry
        stretch, on_left = places >> (level + 1), (places >> level) % 2 == 0
        seam = (stretch << (level + 1)) + (1 << level)  # where the right half begins; beyond the end there is none
        low, high = x[jnp.minimum(seam, n - 1)], x[jnp.minimum(seam - 1, n - 1)]
        violated = (seam < n) & (low < high)

        def pooled_at(c: Array) -> Array:
            return violated & jnp.where(on_left, x > c, x < c)

        def step(newton: tuple[Array, ...]) -> tuple[Array, ...]:
            c, low, high, _, k = newton
            pooled = pooled_at(c)
            total = _sum(jnp.where(pooled, mass, 0), stretch)[stretch]
            above = _sum(jnp.where(pooled, mass * (x - c), 0), stretch)[stretch] / jnp.where(total == 0, 1, total)
            low, high = jnp.where(above > 0, c, low), jnp.where(above < 0, c, high)
            mean = c + above
            moving = jnp.any(pooled_at(mean) != pooled)
            next_c = jnp.where((mean > low) & (mean < high), mean, (low + high) / 2)
            return jnp.where(moving, next_c, mean), low, high, moving, k + 1

        start = ((low + high) / 2, low, high, jnp.any(violated), jnp.zeros((), int))
        c = jax.lax.while_loop(lambda newton: newton[3] & (newton[4] < 60), step, start)[0]
        pooled = pooled_at(c)
        inside = pooled & jnp.roll(pooled, 1) & (places != stretch << (level + 1))
        return jnp.where(pooled, c, x), joined | inside

    return jax.lax.fori_loop(0, (n - 1).bit_length(), merge, (y, jnp.zeros(n, bool)))
