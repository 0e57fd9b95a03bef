"""What the stochastic estimators share: products of one linearisation, walks on fresh minibatches, recursions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from .. import _tree
from ..sampling import num_samples
from ._estimator import both, pair, relative
from ._minibatches import Arguments, Minibatches

T = TypeVar("T")
Loss = Callable[..., Array]


class Directions(NamedTuple):
    """The five quantities of a bilevel problem at (x, v, theta), added up to three directions, and its outer value.

    Attributes:
        inner: G = grad_x f.
        adjoint: H v + grad_x F.
        outer: J'v + grad_theta F.
        value: F.
        scale: ``||grad_x F||``.
    """

    inner: Any
    adjoint: Any
    outer: Any
    value: Array
    scale: Array

    @property
    def residual(self) -> Array:
        """``||H v + grad_x F|| / ||grad_x F||``."""
        return relative(_tree.norm(self.adjoint), self.scale)


class Point(NamedTuple):
    """Where the two losses are evaluated."""

    x: Any
    theta: Any


# ---- products -------------------------------------------------------------------------------------------------------


def linearised(inner_loss: Loss, x: Any, v: Any, theta: Any, data: Arguments) -> tuple[Any, Any, Any]:
    """G, H v and J'v from one linearisation of grad_x f."""
    slope, pull = jax.vjp(lambda x, theta: jax.grad(inner_loss)(x, theta, *data), x, theta)
    curvature, cross = pull(v)
    return slope, curvature, cross


def hessian_product(inner_loss: Loss, x: Any, v: Any, theta: Any, data: Arguments) -> Any:
    """H v alone, forward over reverse."""
    return jax.jvp(lambda x: jax.grad(inner_loss)(x, theta, *data), (x,), (v,))[1]


def cross_product(inner_loss: Loss, x: Any, v: Any, theta: Any, data: Arguments) -> Any:
    """J'v alone: the theta-gradient of the derivative of f along v."""

    def along(theta: Any) -> Array:
        return jax.jvp(lambda x: inner_loss(x, theta, *data), (x,), (v,))[1]

    return jax.grad(along)(theta)


def directions(
    inner_loss: Loss, outer_loss: Loss, x: Any, v: Any, theta: Any, inner_data: Arguments, outer_data: Arguments
) -> Directions:
    """All of them from one linearisation of grad_x f and one gradient of F."""
    slope, curvature, cross = linearised(inner_loss, x, v, theta, inner_data)
    value, x_gradient, theta_gradient = both(outer_loss, x, theta, outer_data)
    adjoint = _tree.add(curvature, x_gradient)
    return Directions(slope, adjoint, _tree.add(cross, theta_gradient), value, _tree.norm(x_gradient))


# ---- walks ----------------------------------------------------------------------------------------------------------


def inner_walk(
    inner_loss: Loss, batches: Minibatches, x: Any, theta: Any, draws: Any, data: Arguments, step: Any, num_steps: int
) -> tuple[Any, Any]:
    """SGD on f, a fresh minibatch a step: ``(x, draws)``."""

    def body(carry: Any, _: None) -> Any:
        x, draws = carry
        rows, draws = batches.inner(draws, data)
        return (_tree.add_scaled(x, -step, jax.grad(inner_loss)(x, theta, *rows)), draws), None

    return jax.lax.scan(body, (x, draws), length=num_steps)[0]


def implicit_directions(
    inner_loss: Loss,
    outer_loss: Loss,
    batches: Minibatches,
    points: tuple[Point, ...],
    draws: Any,
    data: Arguments,
    *,
    step: Any,
    num_steps: int,
    warm: Any = None,
    truncation: Array | None = None,
) -> tuple[tuple[Directions, ...], tuple[Any, ...], Any]:
    r"""The directions at each of the points, all on the same minibatches, with an adjoint found by products alone.

    The adjoint steps are :math:`v \mathrel{-}= b (H_j v + \nabla_x F)`, a fresh minibatch each: ``num_steps`` of them
    from ``warm``, or from :math:`-b \nabla_x F`, where they add up the first ``num_steps + 1`` terms of the Neumann
    series. With a ``truncation`` q below ``num_steps`` they are :math:`v \mathrel{-}= b H_j v`, q of them from
    :math:`-b N \nabla_x F` with N = ``num_steps``: for a q uniform on 0 .. N - 1 the mean is the first N terms.

    Returns:
        the directions, the adjoints and the draws.
    """
    outer_data, draws = batches.outer(draws, data)
    outers = [both(outer_loss, *point, outer_data) for point in points]
    forced = truncation is None
    if warm is not None:
        starts = (warm,)
    else:
        size = -step if forced else -(num_steps * step)
        starts = tuple(_tree.scale(size, x_gradient) for _, x_gradient, _ in outers)

    def moved(carry: Any) -> Any:
        adjoints, draws = carry
        rows, draws = batches.inner(draws, data)
        after = []
        for (x, theta), v, (_, x_gradient, _) in zip(points, adjoints, outers, strict=True):
            change = hessian_product(inner_loss, x, v, theta, rows)
            after.append(_tree.add_scaled(v, -step, _tree.add(change, x_gradient) if forced else change))
        return tuple(after), draws

    def body(carry: Any, k: Array) -> Any:
        # A branch, not a traced bound: it costs q products, too, and reverse mode takes it.
        return moved(carry) if truncation is None else jax.lax.cond(k < truncation, moved, lambda c: c, carry), None

    (adjoints, draws), _ = jax.lax.scan(body, (starts, draws), jnp.arange(num_steps))
    rows, draws = batches.inner(draws, data)
    found = []
    for (x, theta), v, (value, x_gradient, theta_gradient) in zip(points, adjoints, outers, strict=True):
        slope, curvature, cross = linearised(inner_loss, x, v, theta, rows)
        adjoint, outer = _tree.add(curvature, x_gradient), _tree.add(cross, theta_gradient)
        found.append(Directions(slope, adjoint, outer, value, _tree.norm(x_gradient)))
    return tuple(found), adjoints, draws


def truncation_length(key: Array, num_terms: int) -> tuple[Array, Array]:
    """A length uniform on 0 .. num_terms - 1, and the next key."""
    key, now = jax.random.split(key)
    return jax.random.randint(now, (), 0, num_terms), key


def own_key(key: Array | None) -> Array:
    """A key for draws that are not minibatches, independent of the two that the samplers split off."""
    return jax.random.fold_in(jax.random.key(0) if key is None else key, 2)


# ---- recursions -----------------------------------------------------------------------------------------------------


def sarah(memory: T, new: T, old: T) -> T:
    """``memory + new - old``, new and old from the same minibatch."""
    return jax.tree.map(lambda m, n, o: m + (n - o), memory, new, old)


def storm(memory: T, new: T, old: T, fresh: Any) -> T:
    """``new + (1 - fresh) (memory - old)``, new and old from the same minibatch."""
    return _tree.add_scaled(new, 1 - fresh, _tree.subtract(memory, old))


def first_fresh(fresh: Any, t: Array) -> Array:
    """The weight of the fresh gradient: 1 at the first update, so that the memory starts from that gradient."""
    return jnp.where(t == 0, 1.0, fresh)


def refresh_period(who: str, refresh_every: int | None, batches: Minibatches, data: Arguments) -> int:
    """The updates from one full refresh to the next: by default as many as see all the rows once, at least 1."""
    if refresh_every is not None:
        return refresh_every
    sampled = [
        (num_samples(who, "the data", side), sampler.batch_size)
        for side, sampler in zip(pair(who, data), batches.samplers(data), strict=True)
        if sampler is not None
    ]
    rows, drawn = sum(n for n, _ in sampled), sum(b for _, b in sampled)
    return max(1, rows // max(1, drawn))


def refreshed_or(
    period: int, t: Array, whole: Callable[[Any], Any], recursion: Callable[[Any], Any], draws: Any
) -> Any:
    """``whole(draws)`` at every ``period``-th update, the first among them, else ``recursion(draws)``."""
    return whole(draws) if period == 1 else jax.lax.cond(t % period == 0, whole, recursion, draws)
