"""Secant methods: Broyden's, and the squared extrapolation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .. import _tree
from .._checks import count, number
from .._types import Scalar, State, Step, Theta, X
from ..operators import Operator
from ._anderson import Guard, combine, guarded, start_guard, unit
from ._iteration import Iteration, iteration_of, restart_by


class BroydenState(NamedTuple):
    """The last iterate and its step, the terms of the inverse Jacobian (free of units) and how many there are, the
    state of the iteration below, and that of the safeguard."""

    previous: Any
    change: Any
    columns: Any
    rows: Any
    used: Array
    inner: State
    guard: Guard | tuple[()]


def _resolved(x: Any, length: Array) -> Array:
    """Whether a length is far enough above the rounding of x for ratios of such lengths to mean something."""
    return jax.lax.stop_gradient(length > float(jnp.finfo(length.dtype).eps) ** 0.75 * _tree.norm(x))


def broyden(
    iteration: Iteration[X, Theta] | Operator[X, Theta] | Callable[[X, Theta], X],
    memory: int = 10,
    *,
    safeguard: Scalar | None = 1.0,
) -> Iteration[X, Theta]:
    r"""Returns Broyden's quasi-Newton method on the residual of the iteration.

    .. math::
        x_{k+1} = x_k - H_k g_k, \quad g_k = x_k - \operatorname{step}(x_k), \qquad
        H_{k+1} = H_k + \frac{(s - H_k y)\, s^\top H_k}{s^\top H_k y}, \quad s = x_{k+1} - x_k, \; y = g_{k+1} - g_k

    It starts from :math:`H_0 = I`, the plain step, and starts again from there when its memory is full. An update is
    left out where :math:`s^\top H y` vanishes, or s is rounding: value and derivative stay finite after convergence.

    When: a smooth step whose linear rate is too slow, with a solution that is wanted to many digits: superlinear near
    it. Anderson combines the same differences by least squares and is the more robust; Broyden needs no dense solve. As
    with ``anderson``, a memory of earlier iterates in the iteration is emptied after each step.
    Below the last update, near rounding, ``truncated`` is not accurate: ``implicit`` is the derivative of choice.

    Args:
        iteration: an iteration, an operator, or a function ``(x, theta) -> x``.
        memory: how many updates are kept before a new start, at least 1; 5 to 30 is usual.
        safeguard: as that of ``anderson``: D > 0, or None for always the quasi-Newton step.

    Raises:
        ValueError: memory below 1, a safeguard that is not positive.

    Cost: that of the iteration, 6 * memory inner products and sums, 2 * memory + 3 copies of x.

    Source: Broyden (1965), the first ("good") method; limited memory by restarts: Kelley (1995), chapter 7.

    Example:
        >>> import odljax as odl
        >>> slow = lambda x, theta: 0.99 * x + 0.01 * theta
        >>> round(float(odl.for_steps(odl.broyden(slow), 3)(0.0, 2.0).x), 3)
        2.0
    """
    iteration = iteration_of("broyden", "iteration", iteration)
    memory = count("broyden", "memory", memory)
    if safeguard is not None:
        number("broyden", "safeguard", safeguard)

    def init(x: X, theta: Theta) -> BroydenState:
        empty = jax.tree.map(lambda leaf: jnp.zeros((memory, *leaf.shape), leaf.dtype), x)
        guard = start_guard(x, safeguard)
        start = (x, _tree.zeros_like(x), empty, empty, jnp.zeros((), jnp.int32))
        return BroydenState(*start, iteration.init(x, theta), guard)

    def step(x: X, state: BroydenState, theta: Theta, k: Step) -> tuple[X, BroydenState]:
        target, inner = iteration.step(x, state.inner, theta, k)
        change = _tree.subtract(target, x)
        s, y = _tree.subtract(x, state.previous), _tree.subtract(state.change, change)
        length = _tree.norm(s)
        one = unit(x, length)
        s, y = _tree.per_unit(s, one), _tree.per_unit(y, one)
        full = state.used == memory
        used = jnp.where(full, jnp.zeros_like(state.used), state.used)
        columns, rows = _tree.where(full, *_emptied(state.columns)), _tree.where(full, *_emptied(state.rows))
        mapped, pulled = _add_terms(y, columns, rows), _add_terms(s, rows, columns)  # H y and H^T s
        size, curvature = _tree.vdot(s, s), _tree.vdot(pulled, y)
        sound = jnp.abs(curvature) > jnp.finfo(size.dtype).eps ** 0.5 * size
        update = jax.lax.stop_gradient(sound & (k > 0)) & _resolved(x, length)
        column = _tree.scale(1 / jnp.where(update, curvature, jnp.ones_like(size)), _tree.subtract(s, mapped))
        columns, rows = (
            jax.tree.map(lambda stack, new: stack.at[used].set(jnp.where(update, new, stack[used])), stack, new)
            for stack, new in ((columns, column), (rows, pulled))
        )
        used = used + update.astype(used.dtype)
        fast = _tree.add(x, _add_terms(change, columns, rows))
        new, guard = guarded(safeguard, state.guard, change, fast, target)
        return new, BroydenState(x, change, columns, rows, used, iteration.forget(new, inner, theta), guard)

    return dataclasses.replace(
        iteration, init=init, step=step, restart=restart_by(init), name=f"broyden({iteration.name})"
    )


def _emptied(stack: Any) -> tuple[Any, Any]:
    return _tree.zeros_like(stack), stack


def _add_terms(v: X, columns: Any, rows: Any) -> X:
    """``(I + sum of column row^T) v``; terms that are not there yet are zero."""
    return _tree.add(v, combine(jax.vmap(lambda row: _tree.vdot(row, v))(rows), columns))


def squarem(
    iteration: Iteration[X, Theta] | Operator[X, Theta] | Callable[[X, Theta], X], max_step: Scalar = 100.0
) -> Iteration[X, Theta]:
    r"""Returns the squared extrapolation (SQUAREM, third scheme) of the iteration, stabilised.

    .. math::
        r = T x_k - x_k, \quad v = T^2 x_k - T x_k - r, \quad a = \frac{\|r\|}{\|v\|}, \qquad
        x_{k+1} = T(x_k + 2 a r + a^2 v)

    with a kept in [1, max_step]; where :math:`a = 1` the bracket is :math:`T^2 x_k`. T is one step of the iteration; a
    memory of earlier iterates in it is emptied before each. If the extrapolated point has a
    larger residual than x_k had, :math:`T^2 x_k` is taken instead, so the residual does not grow where T is
    non-expansive.

    When: slow, smooth, monotone fixed-point maps of statistics (EM, MM, Sinkhorn) of any size: no inner products but
    two norms, no memory, nothing to tune.

    Args:
        iteration: an iteration, an operator, or a function ``(x, theta) -> x``; its step is taken three times a step,
            with the numbers 3k, 3k + 1 and 3k + 2.
        max_step: the greatest a, above 1.

    Raises:
        ValueError: a greatest step that is not above 1.

    Cost: three steps of the iteration; no memory.

    Source: Varadhan and Roland (2008), scheme SqS3, stabilised by the third step; the fall-back is ours and costs
    nothing.

    Example:
        >>> import odljax as odl
        >>> slow = lambda x, theta: 0.99 * x + 0.01 * theta
        >>> round(float(odl.for_steps(odl.squarem(slow), 2)(0.0, 2.0).x), 3)
        2.0
    """
    iteration = iteration_of("squarem", "iteration", iteration)
    number("squarem", "max_step", max_step, low=1.0)

    def one(x: X, state: State, theta: Theta, k: Step) -> tuple[X, State]:
        new, state = iteration.step(x, state, theta, k)
        return new, iteration.forget(new, state, theta)

    def step(x: X, state: State, theta: Theta, k: Step) -> tuple[X, State]:
        once, state = one(x, state, theta, 3 * k)
        twice, state = one(once, state, theta, 3 * k + 1)
        r = _tree.subtract(once, x)
        v = _tree.subtract(_tree.subtract(twice, once), r)
        first, second = _tree.norm(r), _tree.norm(v)
        sound = _resolved(x, second)
        ratio = jnp.where(sound, first, jnp.ones_like(first)) / jnp.where(sound, second, jnp.ones_like(second))
        a = jnp.clip(ratio, 1.0, jnp.asarray(max_step).astype(ratio.dtype))
        ahead = _tree.add_scaled(_tree.add_scaled(x, 2 * a, r), a * a, v)
        target, state = iteration.step(ahead, iteration.forget(ahead, state, theta), theta, 3 * k + 2)
        better = jax.lax.stop_gradient(_tree.norm(_tree.subtract(target, ahead)) <= first)
        new = _tree.where(better, target, twice)
        return new, iteration.forget(new, state, theta)

    return dataclasses.replace(iteration, step=step, name=f"squarem({iteration.name})")
