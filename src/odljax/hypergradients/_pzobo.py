"""The response of the inner solution to theta, from differences along random directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from .. import _tree
from .._checks import coefficient, count
from .._types import Coefficient, Theta, X
from ._directions import own_key
from ._estimator import Hypergradient, Info, Outer, both, finish, losses, slope_of, start_inner, start_outer
from ._minibatches import minibatches

T = TypeVar("T")


class PZOBOState(NamedTuple):
    """The inner iterate, the key of the directions, the samplers and the outer walk."""

    x: Any
    key: Array
    batches: Any
    outer: Outer


def gaussians(key: Array, like: T, num: int) -> tuple[T, Array]:
    """``num`` standard normal directions stacked in front of the axes of each leaf, and the next key."""
    leaves, structure = jax.tree.flatten(like)
    key, *keys = jax.random.split(key, len(leaves) + 1)
    drawn = [jax.random.normal(k, (num, *leaf.shape), leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn), key


def pzobo(
    inner: Callable[..., Any],
    outer: Callable[..., Any],
    *,
    step_size: Coefficient,
    num_steps: int = 10,
    num_directions: int = 10,
    smoothing: Coefficient = 0.1,
    batch_size: int | tuple[int, int] | None = None,
    fixed_batches: bool = False,
    key: Array | None = None,
) -> Hypergradient[X, Theta]:
    r"""Returns PZOBO: K inner steps at theta and at Q random points near it; their differences replace the adjoint.

    .. math:: g = \nabla_\theta F(x_K(\theta), \theta) + \frac1Q \sum_{q=1}^{Q}
        \Big\langle \frac{x_K(\theta + \mu u_q) - x_K(\theta)}{\mu}, \nabla_x F(x_K(\theta), \theta) \Big\rangle u_q,
        \qquad u_q \sim N(0, I)

    all walks from the same start, which is where the last update's ended at theta, and on the same minibatches.

    When: theta has few entries and second derivatives are not to be had. The mean of g is the gradient through K steps
    at theta, smoothed over a Gaussian of width :math:`\mu` and cut at the warm start: it lacks what is older than K
    steps, a share of at most :math:`(1 - a \mu_f)^K` for :math:`a \le 2 / (L + \mu_f)`. Its variance
    grows with the size of theta over Q and vanishes only where :math:`\nabla_x F` does, so that it is
    noisy without minibatches too.

    Args:
        inner: f, ``(x, theta, inner_data) -> scalar``, the mean over the rows it gets; without data ``(x, theta)``.
        outer: F, ``(x, theta, outer_data) -> scalar``, likewise.
        step_size: a > 0, a number, a schedule of the update number, or a function of theta; below 2/L, constant in
            the source.
        num_steps: K, at least 1.
        num_directions: Q, at least 1.
        smoothing: mu > 0, likewise; small against the scale on which x_K bends, large against rounding.
        batch_size: rows of an inner and an outer minibatch, at least 1, or a pair. None: all rows.
        fixed_batches: draw one of the n / b contiguous batches of b rows instead of rows from everywhere: memory is
            read in one piece, which is some times faster where a minibatch is small. b must divide n; shuffle sorted
            data beforehand.
        key: of the draws and the directions; default ``jax.random.key(0)``.

    Raises:
        ValueError: a step size or smoothing that is not positive, a count or batch size out of range.
        TypeError: a loss that is no function; at trace time, a loss that is not a real scalar, data that is not a pair.

    Cost: K (Q + 1) gradients of f, vectorised over the Q + 1 walks, and one of F, on minibatches, nothing of second
    order; the state holds x, an update Q + 1 copies of x and theta. ``info.inner_residual`` belongs to the iterate
    before the last step.

    Source: Sow, Ji and Liang (2022), algorithms 1 and 2.

    Example:
        >>> import jax, odljax as odl
        >>> hyper = odl.hypergradients.pzobo(
        ...     lambda x, theta: 0.5 * (x - theta) ** 2, lambda x, theta: 0.5 * (x - 1.0) ** 2, step_size=0.5)
        >>> theta, state, update = 0.0, hyper.init(0.0, 0.0), jax.jit(hyper.update)
        >>> for _ in range(100):
        ...     gradient, state, info = update(theta, state)
        ...     theta = theta - 0.2 * gradient
        >>> round(float(theta), 3)
        1.0
    """
    who = "pzobo"
    inner_loss, outer_loss = losses(who, inner, outer)
    step = coefficient(who, "step_size", step_size)
    num_steps = count(who, "num_steps", num_steps)
    num_directions = count(who, "num_directions", num_directions)
    width = coefficient(who, "smoothing", smoothing)
    batches = minibatches(who, batch_size, key, fixed_batches=fixed_batches)

    def init(theta: Theta, x0: X, *data: Any) -> PZOBOState:
        x = start_inner(who, theta, x0)
        return PZOBOState(x, own_key(key), batches.start(data), start_outer(theta))

    def update(theta: Theta, state: PZOBOState, *data: Any) -> tuple[Theta, PZOBOState, Info]:
        theta = _tree.strong(theta)
        t = state.outer.t
        size, mu = step(theta, t), width(theta, t)
        directions, next_key = gaussians(state.key, theta, num_directions)
        # Row 0 walks at theta itself.
        near = jax.vmap(lambda u: _tree.add_scaled(theta, mu, u))(directions)
        thetas = jax.tree.map(lambda centre, rows: jnp.concatenate([centre[None], rows]), theta, near)
        starts = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_directions + 1, *leaf.shape)), state.x)

        def body(carry: Any, _: None) -> Any:
            xs, draws = carry
            rows, draws = batches.inner(draws, data)
            slopes = jax.vmap(lambda x, theta: jax.grad(inner_loss)(x, theta, *rows))(xs, thetas)
            residual = _tree.norm(jax.tree.map(lambda leaf: leaf[0], slopes))
            return (_tree.add_scaled(xs, -size, slopes), draws), residual

        (xs, draws), residuals = jax.lax.scan(body, (starts, state.batches), length=num_steps)
        x = jax.tree.map(lambda leaf: leaf[0], xs)
        outer_rows, draws = batches.outer(draws, data)
        value, x_gradient, theta_gradient = both(outer_loss, x, theta, outer_rows)
        moved = jax.tree.map(lambda leaf: leaf[1:] - leaf[:1], xs)
        slopes = jax.vmap(lambda change: _tree.vdot(change, x_gradient))(moved)
        slopes = _tree.scale(1 / (num_directions * mu), slopes)
        response = jax.tree.map(lambda u: jnp.tensordot(slopes.astype(u.dtype), u, axes=1), directions)
        return finish(
            who, _tree.add(theta_gradient, response), theta, state, PZOBOState(x, next_key, draws, state.outer),
            value=value, x=x, inner_residual=residuals[-1], num_steps=num_steps,
        )  # fmt: skip

    return Hypergradient(init, update, who, slope_of(who, inner, outer))
