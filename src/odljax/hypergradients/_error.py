"""How far a hypergradient is from the true one: one Newton correction of inner and adjoint solution, and the change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .. import _tree
from .._types import Status, Theta, X
from ..linear import LinearSolver, cg, gmres
from ..operators import Operator
from ..operators._operator import displacement

_SAFETY = 2.0


class ErrorEstimate(NamedTuple):
    """What is known of the error of a hypergradient.

    Attributes:
        error: an estimate, on the safe side, of ``||gradient - true hypergradient||``; infinite where a correction
            failed, or lost its digits to the condition.
        corrected: the hypergradient after the correction, more exact than the one that came.
        inner_error: an estimate of ``||x - x(theta)||``.
        status: the worst code of the linear solves of the correction.
    """

    error: Array
    corrected: Any
    inner_error: Array
    status: Array


def estimate_error(
    operator: Operator[X, Theta],
    loss: Callable[[X, Theta], Any],
    x: X,
    theta: Theta,
    gradient: Theta,
    adjoint: X | None = None,
    linear_solver: LinearSolver | None = None,
) -> ErrorEstimate:
    """See ``diagnostics.hypergradient_error``; ``adjoint`` is the adjoint vector, if there is one to be corrected."""
    if linear_solver is None:
        # To the last digit: an ill-conditioned solution lies in directions that hardly show in the right side.
        linear_solver = cg() if operator.symmetric else gmres()
    x, theta, gradient = jax.lax.stop_gradient((x, theta, gradient))

    def miss(x: X, theta: Theta) -> X:
        return displacement(operator, x, theta)

    away, push = jax.linearize(lambda x: miss(x, theta), x)
    step, inner = linear_solver(push, away)
    once = _tree.subtract(x, step)
    # A simplified Newton step: by how much the steps shrink tells what is left, in the norm of x and whatever the
    # condition, which the shrinking of the residual would not.
    rest, again = linear_solver(push, miss(once, theta))
    better = _tree.subtract(once, rest)

    _, pull = jax.vjp(miss, better, theta)
    x_gradient, theta_gradient = jax.grad(loss, argnums=(0, 1))(better, theta)

    def transposed(v: X) -> X:
        return pull(v)[0]

    guess = _tree.zeros_like(x) if adjoint is None else jax.lax.stop_gradient(adjoint)
    # A correction of the guess is solved for, so that the tolerance is relative to what is left to correct.
    correction, outer = linear_solver(transposed, _tree.subtract(x_gradient, transposed(guess)))
    moved = pull(correction)[1]
    corrected = _tree.subtract(theta_gradient, moved)
    if adjoint is not None:
        corrected = _tree.subtract(corrected, pull(guess)[1])

    eps = _tree.rounding((x, gradient))
    first, second = _tree.norm(step), _tree.norm(rest)
    # Steps of the size of rounding cannot shrink.
    shrinking = jnp.where(second <= 100 * eps * _tree.norm(x), 0.0, second / jnp.where(first > 0, first, 1.0))
    change = _tree.norm(_tree.subtract(corrected, gradient)) + 10 * eps * _tree.norm(gradient)
    unknown = outer.error * jnp.where(jnp.isfinite(outer.error), _tree.norm(moved), 1.0)  # no 0 * inf
    error = _SAFETY * (change + unknown) / jnp.maximum(1.0 - shrinking - inner.error * again.error, 0.0)
    status = jnp.maximum(jnp.maximum(inner.status, again.status), outer.status)
    failed = (status >= Status.STEP_BUDGET_SPENT) | ~jnp.isfinite(error)
    error = jnp.where(failed, jnp.full_like(error, jnp.inf), error)
    return ErrorEstimate(error, corrected, _tree.norm(step), status)
