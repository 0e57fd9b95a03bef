"""Anderson acceleration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .. import _tree
from .._checks import coefficient, count, number
from .._types import Coefficient, Scalar, State, Step, Theta, X
from ..operators import Operator
from ._iteration import Iteration, as_iteration


class AndersonState(NamedTuple):
    """The last iterates, their steps, the Gram matrix of the steps, and the state of the iteration below."""

    iterates: object
    steps: object
    gram: Array
    inner: State


def anderson(
    iteration: Iteration[X, Theta] | Operator[X, Theta] | Callable[[X, Theta], X],
    memory: int = 5,
    *,
    mixing: Coefficient = 1.0,
    regularization: Scalar = 1e-10,
) -> Iteration[X, Theta]:
    r"""Returns the iteration with Anderson acceleration (type II) over the last steps.

    .. math::
        \alpha = \arg\min_{1^\top \alpha = 1} \Big\|\sum_i \alpha_i r_i\Big\|^2 + \lambda \|\alpha\|^2, \quad
        r_i = \operatorname{step}(x_i) - x_i, \qquad x_{k+1} = \sum_i \alpha_i (x_i + \beta_k r_i)

    When: the step is smooth near the fixed point and a linear rate is too slow; on linear problems it is GMRES in
    disguise. No safeguard: far from the solution of a non-smooth problem it may leave the basin.

    The regularisation has an absolute floor, ten rounding units of x squared, so that value and derivative stay finite
    once the iteration has converged and all steps are zero. Below that floor the weights are ratios of rounding errors:
    ``implicit`` is the derivative of choice, ``unrolled`` is exact as long as the steps were above it, and
    ``truncated`` at the solution is not accurate.

    Args:
        iteration: an iteration, an operator, or a function ``(x, theta) -> x``.
        memory: how many steps are combined, at least 1 (which changes nothing); 3 to 10 is usual.
        mixing: :math:`\beta_k` in (0, 2), a number, a schedule of k or a function of theta.
        regularization: :math:`\lambda` relative to the largest step squared; raised to ten rounding units of the dtype.

    Raises:
        ValueError: memory below 1, mixing outside (0, 2), a negative regularisation.

    Cost: that of the iteration, 2 * memory copies of x, one memory-sized dense solve a step.

    Source: Anderson (1965); Walker and Ni (2011), section 1; regularisation: Scieur, d'Aspremont and Bach (2016).

    Example:
        >>> import odljax as odl
        >>> slow = lambda x, theta: 0.99 * x + 0.01 * theta
        >>> round(float(odl.for_steps(odl.anderson(slow), 5)(0.0, 2.0).x), 3)
        2.0
    """
    iteration = as_iteration(iteration)
    memory = count("anderson", "memory", memory)
    mix = coefficient("anderson", "mixing", mixing, high=2.0)
    number("anderson", "regularization", regularization, closed=True)

    def init(x: X, theta: Theta) -> AndersonState:
        empty = jax.tree.map(lambda leaf: jnp.zeros((memory, *leaf.shape), leaf.dtype), x)
        gram = jnp.zeros((memory, memory), _tree.accumulation_dtype(x))
        return AndersonState(empty, empty, gram, iteration.init(x, theta))

    def step(x: X, state: AndersonState, theta: Theta, k: Step) -> tuple[X, AndersonState]:
        target, inner = iteration.step(x, state.inner, theta, k)
        change = _tree.subtract(target, x)
        slot = k % memory
        iterates, steps = _store(state.iterates, x, slot), _store(state.steps, change, slot)
        row = jax.vmap(lambda past: _tree.vdot(past, change))(steps)
        gram = state.gram.at[slot, :].set(row).at[:, slot].set(row)
        weights = _weights(gram, jnp.arange(memory, dtype=k.dtype) <= k, _tree.vdot(x, x), regularization)
        beta = mix(theta, k)

        def combine(past: Array, moves: Array) -> Array:
            alpha = weights.astype(past.dtype).reshape((memory,) + (1,) * (past.ndim - 1))
            return jnp.sum(alpha * (past + jnp.asarray(beta).astype(past.dtype) * moves), axis=0)

        return jax.tree.map(combine, iterates, steps), AndersonState(iterates, steps, gram, inner)

    return dataclasses.replace(iteration, init=init, step=step, name=f"anderson({iteration.name})")


def _store(history: object, x: object, slot: Array) -> object:
    return jax.tree.map(lambda past, leaf: past.at[slot].set(leaf), history, x)


def _weights(gram: Array, filled: Array, size: Array, regularization: Scalar) -> Array:
    """The weights, summing to one over the filled slots."""
    eps = jnp.finfo(gram.dtype).eps
    # The absolute part is for rest at x = 0; its inverse, which the derivative multiplies by zero, must not overflow.
    floor = (10 * eps) ** 2 * size + jnp.finfo(gram.dtype).tiny ** 0.4
    ridge = jnp.maximum(jnp.asarray(regularization).astype(gram.dtype), 10 * eps)
    pair = filled[:, None] & filled[None, :]
    identity = jnp.eye(len(filled), dtype=gram.dtype)
    used = jnp.where(pair, gram, jnp.zeros_like(gram))
    largest = jnp.max(used)
    system = jnp.where(pair, (used + (ridge * largest + floor) * identity) / (largest + floor), identity)
    raw = jnp.linalg.solve(system, filled.astype(gram.dtype))
    return raw / jnp.sum(raw)
