"""First-order only: the difference of a penalised and a plain inner solution stands for the adjoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .. import _tree
from .._checks import coefficient, count, number
from .._types import Coefficient, Step, Theta, X
from ._estimator import Hypergradient, Info, Outer, finish, losses, slope_of, start_inner, start_outer
from ._minibatches import minibatches


class F2SAState(NamedTuple):
    """The inner solution, the penalised one, the penalty, the samplers and the outer walk."""

    x: Any
    penalised: Any
    penalty: Array
    batches: Any
    outer: Outer


def _decaying(k: Step) -> Any:
    return 0.1 / (k.astype(float) + 1.0) ** (1 / 7)


def f2sa(
    inner: Callable[..., Any],
    outer: Callable[..., Any],
    *,
    step_size: Coefficient,
    penalised_step_size: Coefficient | None = None,
    num_steps: int = 10,
    penalty: Any = 1.0,
    penalty_increment: Coefficient = _decaying,
    batch_size: int | tuple[int, int] | None = None,
    fixed_batches: bool = False,
    key: Array | None = None,
) -> Hypergradient[X, Theta]:
    r"""Returns F2SA: K steps of a plain and of a penalised inner variable, whose difference gives the hypergradient.

    .. math:: w &\mathrel{-}= a \nabla_x f(w, \theta), \qquad
        y \mathrel{-}= a' (\lambda \nabla_x f + \nabla_x F)(y, \theta) \qquad (K \text{ times}) \\
        g &= \nabla_\theta F(y, \theta) + \lambda\,(\nabla_\theta f(y, \theta) - \nabla_\theta f(w, \theta)), \qquad
        \lambda \mathrel{+}= \delta_t

    When: second derivatives are not to be had or too costly; a smooth inner loss that is strongly convex in x. g is
    the gradient of a penalised problem and misses the hypergradient by :math:`O(1/\lambda)`; in float32 the difference
    loses :math:`\lambda` times the rounding error, so let the penalty end at some hundreds. The source lets the steps
    decay: a and that of theta like :math:`t^{-4/7}`, a' like :math:`t^{-5/7}`.

    Args:
        inner: f, ``(x, theta, inner_data) -> scalar``, the mean over the rows it gets; without data ``(x, theta)``.
        outer: F, ``(x, theta, outer_data) -> scalar``, likewise.
        step_size: a > 0, a number, a schedule of the update number, or a function of theta; below 2/L.
        penalised_step_size: a' > 0, likewise, below :math:`2/(\lambda L + L_F)`; None: :math:`a / \lambda`, which
            remains stable as the penalty grows.
        num_steps: K, at least 1.
        penalty: the first lambda > 0; above :math:`2 L_F/\mu` in the source.
        penalty_increment: delta, at least 0, likewise; default :math:`0.1\,(t + 1)^{-1/7}`. 0 keeps the penalty;
            increments like :math:`(t + 1)^{-6/7}` make it grow like :math:`t^{1/7}`, as the source's rates ask for.
        batch_size: rows of an inner and an outer minibatch, at least 1, or a pair. None: all rows.
        fixed_batches: draw one of the n / b contiguous batches of b rows instead of rows from everywhere: memory is
            read in one piece, which is some times faster where a minibatch is small. b must divide n; shuffle sorted
            data beforehand.
        key: of the draws; default ``jax.random.key(0)``.

    Raises:
        ValueError: a step size or penalty that is not positive, a negative increment, a count or batch size out of
            range.
        TypeError: a loss that is no function; at trace time, a loss that is not a real scalar, data that is not a pair.

    Cost: 2 (K + 1) gradients of f and K + 1 of F, on minibatches, and nothing of second order; the state holds two
    copies of x. ``info.x`` is w, ``info.value`` is F at y; there is no adjoint.

    Source: Kwon, Kwon, Wright and Nowak (2023), algorithm 1; y and w see the same inner minibatches, so that the noise
    of g does not grow with the penalty.

    Example:
        >>> import jax, odljax as odl
        >>> hyper = odl.hypergradients.f2sa(
        ...     lambda x, theta: 0.5 * (x - theta) ** 2, lambda x, theta: 0.5 * (x - 1.0) ** 2, step_size=0.5)
        >>> theta, state, update = 0.0, hyper.init(0.0, 0.0), jax.jit(hyper.update)
        >>> for _ in range(100):
        ...     gradient, state, info = update(theta, state)
        ...     theta = theta - 0.2 * gradient
        >>> round(float(theta), 3)
        1.0
    """
    who = "f2sa"
    inner_loss, outer_loss = losses(who, inner, outer)
    step = coefficient(who, "step_size", step_size)
    if penalised_step_size is not None:
        penalised_step = coefficient(who, "penalised_step_size", penalised_step_size)
    else:
        penalised_step = None
    number(who, "penalty", penalty)
    increment = coefficient(who, "penalty_increment", penalty_increment, closed=True)
    num_steps = count(who, "num_steps", num_steps)
    batches = minibatches(who, batch_size, key, fixed_batches=fixed_batches)

    def init(theta: Theta, x0: X, *data: Any) -> F2SAState:
        x = start_inner(who, theta, x0)
        weight = jnp.asarray(penalty, _tree.accumulation_dtype(x))
        return F2SAState(x, x, weight, batches.start(data), start_outer(theta))

    def update(theta: Theta, state: F2SAState, *data: Any) -> tuple[Theta, F2SAState, Info]:
        t, weight = state.outer.t, state.penalty
        size = step(theta, t)
        penalised_size = (
            jnp.asarray(size).astype(weight.dtype) / weight if penalised_step is None else penalised_step(theta, t)
        )
        slope = jax.grad(inner_loss)

        def body(carry: Any, _: None) -> Any:
            w, y, draws = carry
            rows, draws = batches.inner(draws, data)
            outer_rows, draws = batches.outer(draws, data)
            direction = _tree.add_scaled(jax.grad(outer_loss)(y, theta, *outer_rows), weight, slope(y, theta, *rows))
            moved = _tree.add_scaled(w, -size, slope(w, theta, *rows))
            return (moved, _tree.add_scaled(y, -penalised_size, direction), draws), None

        (w, y, draws), _ = jax.lax.scan(body, (state.x, state.penalised, state.batches), length=num_steps)
        rows, draws = batches.inner(draws, data)
        outer_rows, draws = batches.outer(draws, data)
        value, partial = jax.value_and_grad(outer_loss, argnums=1)(y, theta, *outer_rows)
        x_slope, at_w = jax.grad(inner_loss, argnums=(0, 1))(w, theta, *rows)
        at_y = jax.grad(inner_loss, argnums=1)(y, theta, *rows)
        total = _tree.add_scaled(partial, weight, _tree.subtract(at_y, at_w))
        grown = weight + jnp.asarray(increment(theta, t)).astype(weight.dtype)
        return finish(
            who, total, theta, state, F2SAState(w, y, grown, draws, state.outer),
            value=value, x=w, inner_residual=_tree.norm(x_slope), num_steps=num_steps,
        )  # fmt: skip

    return Hypergradient(init, update, who, slope_of(who, inner, outer))
