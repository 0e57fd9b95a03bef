"""Anderson acceleration."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .. import _tree
from .._checks import coefficient, count, number
from .._types import Coefficient, Scalar, State, Step, Theta, X
from ..operators import Operator
from ._iteration import Iteration, iteration_of, restart_by


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


def unit(x: object, *lengths: Array) -> Array:
    """A power of two of the size of the greatest length, but not below the rounding of x; without a derivative."""
    rounding = 10 * jnp.finfo(_tree.accumulation_dtype(x)).eps * _tree.norm(x)
    return _tree.power_of_two(jax.lax.stop_gradient(functools.reduce(jnp.maximum, lengths, rounding)))


class AndersonState(NamedTuple):
    """The last iterates, their steps with the unit of each, the Gram matrix of the steps in these units (type II), the
    state of the iteration below, and that of the safeguard, if there is one."""

    iterates: object
    steps: object
    units: Array
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

    The regularisation has a floor, ten rounding units of x squared, so that value and derivative stay finite once the
    iteration has converged and all steps are zero. Below that floor the weights are ratios of rounding errors:
    ``implicit`` is the derivative of choice, ``unrolled`` is exact as long as the steps were above it, and
    ``truncated`` at the solution is not accurate. Units do not matter: every number here is relative.

    What is accelerated is a map of x. An iteration that remembers earlier iterates (momentum) forgets them after
    each step, since they are not those it would have walked through: of ``heavy_ball`` the plain step is accelerated.
    Where the lengths of the steps come from such a memory (Adam), it is refused.

    Args:
        iteration: an iteration, an operator, or a function ``(x, theta) -> x``.
        memory: how many steps are combined, at least 1 (the relaxed step); 3 to 10 is usual.
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
        units = jnp.zeros(memory, _tree.accumulation_dtype(x))
        gram = jnp.zeros((memory, memory), units.dtype) if kind == 2 else ()
        return AndersonState(empty, empty, units, gram, iteration.init(x, theta), start_guard(x, safeguard))

    def step(x: X, state: AndersonState, theta: Theta, k: Step) -> tuple[X, AndersonState]:
        target, inner = iteration.step(x, state.inner, theta, k)
        change = _tree.subtract(target, x)
        slot = k % memory
        iterates, steps = _store(state.iterates, x, slot), _store(state.steps, change, slot)
        filled, length = jnp.arange(memory, dtype=k.dtype) <= k, _tree.norm(change)
        own = unit(x, length)
        units = state.units.at[slot].set(jnp.where(length + _tree.norm(x) > 0, own, 0))  # 0: rest in the origin
        if isinstance(state.gram, Array):
            now = _tree.unscaled(change, own)
            others = jnp.where(units > 0, units, jnp.ones_like(units))
            row = jax.vmap(lambda past, unit: _tree.vdot(_tree.unscaled(past, unit), now))(steps, others)
            gram = state.gram.at[slot, :].set(row).at[:, slot].set(row)
            weights = _weights(gram, units, filled, x, regularization)
        else:
            gram = ()
            weights = _oblique_weights(iterates, steps, x, change, filled, slot, regularization)
        beta = mix(theta, k)

        def mixed(past: Array, moves: Array) -> Array:
            return past + jnp.asarray(beta).astype(past.dtype) * moves

        fast = combine(weights, jax.tree.map(mixed, iterates, steps))
        new, guard = guarded(safeguard, state.guard, change, fast, target)
        return new, AndersonState(iterates, steps, units, gram, iteration.forget(new, inner, theta), guard)

    return dataclasses.replace(
        iteration, init=init, step=step, restart=restart_by(init), name=f"anderson({iteration.name})"
    )


def _store(history: object, x: object, slot: Array) -> object:
    return jax.tree.map(lambda past, leaf: past.at[slot].set(leaf), history, x)


def combine(weights: Array, stack: X) -> X:
    """The weighted sum over the leading axis of each leaf."""

    def one(leaf: Array) -> Array:
        return jnp.sum(weights.astype(leaf.dtype).reshape((-1,) + (1,) * (leaf.ndim - 1)) * leaf, axis=0)

    return jax.tree.map(one, stack)


def _rounding(x: object, unit: Array) -> tuple[Array, Array]:
    """Ten rounding units, and the squared rounding of x in that unit: what no step is below."""
    eps = jnp.asarray(10 * jnp.finfo(unit.dtype).eps, unit.dtype)
    return eps, (eps * (_tree.norm(x) / unit)) ** 2


def _oblique_weights(
    iterates: Any, steps: Any, x: Any, change: Any, filled: Array, slot: Array, regularization: Scalar
) -> Array:
    """The weights of type I, from differences to the current iterate: no digits are lost as they shrink."""
    others = filled & (jnp.arange(len(filled), dtype=slot.dtype) != slot)

    def away(past: Array, now: Array) -> Array:
        difference = past - now[None]
        return jnp.where(jnp.expand_dims(others, tuple(range(1, past.ndim))), difference, jnp.zeros_like(difference))

    moves, falls = jax.tree.map(away, iterates, x), _tree.negative(jax.tree.map(away, steps, change))
    one = unit(x, _tree.norm(moves), _tree.norm(falls), _tree.norm(change))
    moves, falls, change = (_tree.unscaled(tree, one) for tree in (moves, falls, change))
    each = lambda f, stack: jax.vmap(f)(stack)  # noqa: E731
    cross = each(lambda move: each(lambda fall: _tree.vdot(move, fall), falls), moves)
    right = each(lambda move: _tree.vdot(move, change), moves)
    eps, floor = _rounding(x, one)
    largest = jnp.max(jnp.abs(cross))
    ridge = jnp.maximum(jnp.asarray(regularization).astype(cross.dtype), eps)
    total = largest + floor
    total = jnp.where(total == 0, jnp.ones_like(total), total)  # at rest in the origin
    own = jnp.where(others & (largest + floor != 0), ridge * largest + floor, total)
    past = jnp.linalg.solve((cross + own[:, None] * jnp.eye(len(filled), dtype=cross.dtype)) / total, right / total)
    return past.at[slot].set(1 - jnp.sum(past))


def _weights(gram: Array, units: Array, filled: Array, x: object, regularization: Scalar) -> Array:
    """The weights, summing to one over the filled slots, of a Gram matrix whose rows are in these units."""
    one = _tree.power_of_two(jnp.max(units))
    eps, floor = _rounding(x, one)
    ridge = jnp.maximum(jnp.asarray(regularization).astype(gram.dtype), eps)
    pair = filled[:, None] & filled[None, :]
    shares = units / one
    used = jnp.where(pair, gram * shares[:, None] * shares[None, :], jnp.zeros_like(gram))
    largest = jnp.max(used)
    total, own = largest + floor, ridge * largest + floor
    total, own = (jnp.where(largest + floor == 0, jnp.ones_like(part), part) for part in (total, own))  # as above
    identity = jnp.eye(len(filled), dtype=gram.dtype)
    raw = jnp.linalg.solve(jnp.where(pair, (used + own * identity) / total, identity), filled.astype(gram.dtype))
    return raw / jnp.sum(raw)
