"""Anderson acceleration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .. import _tree
from .._checks import coefficient, count, number
from .._types import Coefficient, Scalar, State, Step, Theta, X
from ..operators import Operator
from ._iteration import Iteration, iteration_of


class Guard(NamedTuple):
    """The plain step from the iterate before, the residual there, and whether the fast step was taken instead."""

    plain: object
    residual: Array
    fast: Array


def start_guard(x: object, safeguard: Scalar | None) -> Guard | tuple[()]:
    """The state of a safeguard; nothing where there is none."""
    if safeguard is None:
        return ()
    return Guard(x, jnp.asarray(jnp.inf, _tree.accumulation_dtype(x)), jnp.zeros((), bool))


def guarded(safeguard: Scalar | None, guard: Any, change: Any, fast: X, plain: X) -> tuple[X, Any]:
    """The fast step; or, where the last one has led to a larger residual, the plain step from where it came."""
    if safeguard is None:
        return fast, guard
    size = jax.lax.stop_gradient(jnp.asarray(_tree.norm(change)))
    worse = guard.fast & ~(size <= jnp.asarray(safeguard).astype(size.dtype) * guard.residual)
    return _tree.where(worse, guard.plain, fast), Guard(plain, size, ~worse)


class AndersonState(NamedTuple):
    """The last iterates, their steps, the Gram matrix of the steps (type II), the state of the iteration below, and
    that of the safeguard, if there is one."""

    iterates: object
    steps: object
    gram: Array | tuple[()]
    inner: State
    guard: Guard | tuple[()]


def anderson(
    iteration: Iteration[X, Theta] | Operator[X, Theta] | Callable[[X, Theta], X],
    memory: int = 5,
    *,
    kind: int = 2,
    mixing: Coefficient = 1.0,
    regularization: Scalar = 1e-10,
    safeguard: Scalar | None = None,
) -> Iteration[X, Theta]:
    r"""Returns the iteration with Anderson acceleration over the last steps.

    .. math:: r_i = \operatorname{step}(x_i) - x_i, \qquad x_{k+1} = \sum_i \alpha_i (x_i + \beta_k r_i), \qquad
        1^\top \alpha = 1

    Type II has the weights of the least combined residual, type I those whose combined residual is orthogonal to the
    differences of the iterates:

    .. math::
        \text{II: } \min_{1^\top \alpha = 1} \Big\|\sum_i \alpha_i r_i\Big\|^2 + \lambda \|\alpha\|^2, \qquad
        \text{I: } (S^\top Y + \lambda I) \alpha_{\ne k} = S^\top r_k, \quad
        s_i = x_i - x_k, \; y_i = r_k - r_i

    When: the step is smooth near the fixed point and a linear rate is too slow; on linear problems type II is GMRES in
    disguise, type I the full orthogonalisation method (FOM). Type I is a quasi-Newton method of Broyden's first kind
    and the more daring of the two. Far from the solution of a non-smooth problem either may cycle or leave the basin:
    set ``safeguard``, over a step that is averaged (``krasnoselskii_mann`` makes it so).

    The regularisation has an absolute floor, ten rounding units of x squared, so that value and derivative stay finite
    once the iteration has converged and all steps are zero. Below that floor the weights are ratios of rounding errors:
    ``implicit`` is the derivative of choice, ``unrolled`` is exact as long as the steps were above it, and
    ``truncated`` at the solution is not accurate.

    Args:
        iteration: an iteration, an operator, or a function ``(x, theta) -> x``.
        memory: how many steps are combined, at least 1 (which changes nothing); 3 to 10 is usual.
        kind: the type, 1 or 2.
        mixing: :math:`\beta_k` in (0, 2), a number, a schedule of k or a function of theta.
        regularization: :math:`\lambda` relative to the largest entry of its matrix (II: the largest step squared);
            raised to ten rounding units of the dtype.
        safeguard: D > 0. A combined step that leads to a residual above D times the one before is taken back: the plain
            step is taken from there. With D < 1 the residual of an averaged step that has a fixed point tends to zero,
            whatever the combinations do; 1 is usual. None: never taken back.

    Raises:
        ValueError: memory below 1, an unknown kind, mixing outside (0, 2), a negative regularisation, a safeguard that
            is not positive.

    Cost: that of the iteration, 2 * memory copies of x, one memory-sized dense solve a step; memory inner products,
    type I: memory squared. The safeguard: one more copy, and one lost step each time.

    Source: Anderson (1965); Walker and Ni (2011), section 1; types: Fang and Saad (2009); regularisation: Scieur,
    d'Aspremont and Bach (2016); a safeguard by residuals: Zhang, O'Donoghue and Boyd (2020), whose test is another.

    Example:
        >>> import odljax as odl
        >>> slow = lambda x, theta: 0.99 * x + 0.01 * theta
        >>> round(float(odl.for_steps(odl.anderson(slow), 5)(0.0, 2.0).x), 3)
        2.0
    """
    iteration = iteration_of("anderson", "iteration", iteration)
    memory = count("anderson", "memory", memory)
    mix = coefficient("anderson", "mixing", mixing, high=2.0)
    number("anderson", "regularization", regularization, closed=True)
    if kind not in (1, 2):
        raise ValueError(f"anderson: kind must be 1 or 2; {kind!r} came.")
    if safeguard is not None:
        number("anderson", "safeguard", safeguard)

    def init(x: X, theta: Theta) -> AndersonState:
        empty = jax.tree.map(lambda leaf: jnp.zeros((memory, *leaf.shape), leaf.dtype), x)
        gram = jnp.zeros((memory, memory), _tree.accumulation_dtype(x)) if kind == 2 else ()
        return AndersonState(empty, empty, gram, iteration.init(x, theta), start_guard(x, safeguard))

    def step(x: X, state: AndersonState, theta: Theta, k: Step) -> tuple[X, AndersonState]:
        target, inner = iteration.step(x, state.inner, theta, k)
        change = _tree.subtract(target, x)
        slot = k % memory
        iterates, steps = _store(state.iterates, x, slot), _store(state.steps, change, slot)
        filled, size = jnp.arange(memory, dtype=k.dtype) <= k, _tree.vdot(x, x)
        if isinstance(state.gram, Array):
            row = jax.vmap(lambda past: _tree.vdot(past, change))(steps)
            gram = state.gram.at[slot, :].set(row).at[:, slot].set(row)
            weights = _weights(gram, filled, size, regularization)
        else:
            gram = ()
            weights = _oblique_weights(iterates, steps, x, change, filled, slot, size, regularization)
        beta = mix(theta, k)

        def mixed(past: Array, moves: Array) -> Array:
            return past + jnp.asarray(beta).astype(past.dtype) * moves

        fast = combine(weights, jax.tree.map(mixed, iterates, steps))
        new, guard = guarded(safeguard, state.guard, change, fast, target)
        return new, AndersonState(iterates, steps, gram, inner, guard)

    return dataclasses.replace(iteration, init=init, step=step, name=f"anderson({iteration.name})")


def _store(history: object, x: object, slot: Array) -> object:
    return jax.tree.map(lambda past, leaf: past.at[slot].set(leaf), history, x)


def combine(weights: Array, stack: X) -> X:
    """The weighted sum over the leading axis of each leaf."""

    def one(leaf: Array) -> Array:
        return jnp.sum(weights.astype(leaf.dtype).reshape((-1,) + (1,) * (leaf.ndim - 1)) * leaf, axis=0)

    return jax.tree.map(one, stack)


def _floors(x_squared: Array) -> tuple[Array, Array]:
    """Ten rounding units, and the least squared step that is more than rounding of x."""
    info = jnp.finfo(x_squared.dtype)
    # The absolute part is for rest at x = 0; its inverse, which the derivative multiplies by zero, must not overflow.
    return jnp.asarray(10 * info.eps, x_squared.dtype), (10 * info.eps) ** 2 * x_squared + info.tiny**0.4


def _oblique_weights(
    iterates: Any,
    steps: Any,
    x: Any,
    change: Any,
    filled: Array,
    slot: Array,
    size: Array,
    regularization: Scalar,
) -> Array:
    """The weights of type I, from differences to the current iterate: no digits are lost as they shrink."""
    moves = jax.tree.map(lambda past, now: past - now[None], iterates, x)
    falls = jax.tree.map(lambda past, now: now[None] - past, steps, change)
    each = lambda f, stack: jax.vmap(f)(stack)  # noqa: E731
    cross = each(lambda move: each(lambda fall: _tree.vdot(move, fall), falls), moves)
    right = each(lambda move: _tree.vdot(move, change), moves)
    others = filled & (jnp.arange(len(filled), dtype=slot.dtype) != slot)
    eps, floor = _floors(size)
    used = jnp.where(others[:, None] & others[None, :], cross, jnp.zeros_like(cross))
    largest = jnp.max(jnp.abs(used))
    ridge = jnp.maximum(jnp.asarray(regularization).astype(cross.dtype), eps)
    identity = jnp.eye(len(filled), dtype=cross.dtype)
    own = jnp.where(others, ridge * largest + floor, largest + floor)
    right = jnp.where(others, right, jnp.zeros_like(right)) / (largest + floor)
    past = jnp.linalg.solve((used + own[:, None] * identity) / (largest + floor), right)
    return past.at[slot].set(1 - jnp.sum(past))


def _weights(gram: Array, filled: Array, size: Array, regularization: Scalar) -> Array:
    """The weights, summing to one over the filled slots."""
    eps, floor = _floors(size)
    ridge = jnp.maximum(jnp.asarray(regularization).astype(gram.dtype), eps)
    pair = filled[:, None] & filled[None, :]
    identity = jnp.eye(len(filled), dtype=gram.dtype)
    used = jnp.where(pair, gram, jnp.zeros_like(gram))
    largest = jnp.max(used)
    system = jnp.where(pair, (used + (ridge * largest + floor) * identity) / (largest + floor), identity)
    raw = jnp.linalg.solve(system, filled.astype(gram.dtype))
    return raw / jnp.sum(raw)
