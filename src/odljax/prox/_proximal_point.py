"""Minimisers of |x - v|^2 / 2 + g(K x) by proximal points of the dual, each of them found by Newton's method.

With u the dual variable and P the projection onto the domain of the conjugate of g, the proximal point of u is
w = P(u + sigma (K x - d)) where x minimises a function that is strongly convex with modulus 1 and piecewise smooth, so
that Newton's method with a line search finds it from anywhere; sigma grows, and with it the steps in u. On return
x = v - K' w to rounding, whatever the conditions; how far K x is from where it ought to be is |w - u| / sigma.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

_STEPS = 300
_HALVINGS = 40


class Penalty(NamedTuple):
    """g(K x) with its dual, all as functions of one vector x and of dual variables u of any one shape."""

    apply: Callable[[Array], Array]  # x -> K x
    sides: Array  # d
    adjoint: Callable[[Array], Array]  # u -> K' u
    project: Callable[[Array], Array]  # P
    solve: Callable[[Array, Array, Array], Array]  # (p, sigma, r) -> (I + sigma K' P'(p) K)^-1 r


class Point(NamedTuple):
    """A proximal point w, its x, and the p = u + sigma (K x - d) of which it is the projection."""

    x: Array
    sigma: Array
    p: Array
    w: Array


def proximal_point(v: Array, u: Array, penalty: Penalty) -> Point:
    """Return the last point; entries of v and of d should be of size 1 or less."""
    kind = jnp.finfo(v.dtype)
    top, rounding = 0.01 / kind.eps, 4 * kind.eps * max(v.size, u.size) ** 0.5

    def at(x: Array, u: Array, sigma: Array) -> tuple[Array, Array, Array]:
        p = u + sigma * (penalty.apply(x) - penalty.sides)
        w = penalty.project(p)
        return p, w, x - v + penalty.adjoint(w)

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        x, u, sigma, before, last, _, k = carry
        p, w, slope = at(x, u, sigma)
        size, direction = jnp.linalg.norm(slope), -penalty.solve(p, sigma, slope)
        fall = jnp.sum(slope * direction)

        def halve(trial: tuple[Array, ...]) -> tuple[Array, ...]:
            low, high, t, halvings, _ = trial  # the function falls along the direction at low, and no more at high
            ahead = at(x + t * direction, u, sigma)[2]
            along = jnp.sum(ahead * direction)
            whole = (t == 1) & ((along <= 0) | (jnp.linalg.norm(ahead) <= 0.5 * size))
            found = whole | ((along <= 0) & (along >= 0.5 * fall))
            low, high = jnp.where(found | (along <= 0), t, low), jnp.where(along <= 0, high, t)
            return low, high, (low + high) / 2, halvings + 1, found

        # The verdict is carried: computed again in the condition, compiled another way, it may differ, and never end.
        nil = jnp.zeros_like(size)
        start = (nil, nil + 1, nil + 1, jnp.zeros((), int), jnp.zeros((), bool))
        t = jax.lax.while_loop(lambda trial: ~trial[4] & (trial[3] < _HALVINGS), halve, start)[0]
        ahead = x + t * direction
        # Rounding in p is sigma times that in K x, and harmless to x: what counts is the step, and then progress.
        small = t * jnp.linalg.norm(direction) <= rounding * (1 + jnp.linalg.norm(x))
        solved = small & ((size == 0) | (size > 0.5 * last))
        apart = jnp.linalg.norm(w - u) / sigma
        slow = solved & (apart > before / 10)
        done = (solved & (apart <= rounding * (1 + jnp.linalg.norm(x)))) | ~jnp.isfinite(size)
        return (
            jnp.where(solved, x, ahead),
            jnp.where(solved & ~done, w, u),
            jnp.where(slow, jnp.minimum(10 * sigma, top), sigma),
            jnp.where(solved, apart, before),
            jnp.where(solved, jnp.inf, size),
            done,
            k + 1,
        )

    def running(carry: tuple[Any, ...]) -> Array:
        return (carry[6] < _STEPS) & ~carry[5]

    no = jnp.zeros((), bool)
    one, far = jnp.ones((), v.dtype), jnp.asarray(jnp.inf, v.dtype)
    start = (v, u, one, far, far, no, jnp.zeros((), int))
    x, u, sigma, *_ = jax.lax.while_loop(running, body, start)
    p, w, _ = at(x, u, sigma)
    return Point(x, sigma, p, w)
