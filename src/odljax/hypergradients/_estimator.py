"""The hypergradient record, what its update reports, and what its estimators share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .. import _tree
from .._checks import record
from .._types import State, Theta, X


class Info(NamedTuple):
    """What one update knows of itself; state is for the next step, info for the reader.

    Attributes:
        value: the outer loss at the inner solution.
        inner_residual: ``||x - T(x, theta)||`` at the inner solution; None where there is no operator.
        adjoint_residual: ``||b - A v|| / ||b||`` of the adjoint system; None where the steps themselves are
            differentiated.
        status: the worse code of inner and adjoint solve; ``odl.check(info)`` raises on the bad ones.
        num_steps: inner steps taken.
        outer_change: ``||theta_t - theta_(t-1)|| / ||theta_(t-1)||`` since the last update; infinite at the first.
        history: rows recorded on the inner way, or None.
        x: the inner solution.
    """

    value: Array
    inner_residual: Array | None
    adjoint_residual: Array | None
    status: Array
    num_steps: Array
    outer_change: Array
    history: Any
    x: Any


@record
class Hypergradient(Generic[X, Theta]):
    """A gradient estimator of an outer loss, as a pair of pure functions.

    Args:
        init: ``(theta, x0) -> state``.
        update: ``(theta, state, *data) -> (gradient, state, info)``; the gradient has the structure of theta.
        name: what messages call it.

    Example:
        >>> import jax, optax, odljax as odl
        >>> inner = odl.gradient_descent(lambda x, theta: 0.5 * (x - theta) ** 2, step_size=0.5)
        >>> solver = odl.implicit(odl.until_converged(inner, max_steps=100))
        >>> hyper = odl.hypergradients.through(solver, lambda x, theta: (x - 1.0) ** 2)
        >>> theta, tx = 0.0, optax.sgd(0.25)
        >>> state, opt_state = hyper.init(theta, 0.0), tx.init(theta)
        >>> for _ in range(20):
        ...     gradient, state, info = hyper.update(theta, state)
        ...     updates, opt_state = tx.update(gradient, opt_state)
        ...     theta = optax.apply_updates(theta, updates)
        >>> round(float(theta), 3)
        1.0
    """

    init: Callable[[Theta, X], State]
    update: Callable[..., tuple[Theta, State, Info]]
    name: str = "hypergradient"


class Outer(NamedTuple):
    """Where the outer walk stands: the last theta and the number of updates."""

    theta: Any
    t: Array


def start_outer(theta: Any) -> Outer:
    return Outer(_tree.strong(theta), jnp.zeros((), int))


def advance_outer(outer: Outer, theta: Any) -> tuple[Outer, Array]:
    """The next state and the relative change of theta since the last update."""
    theta = _tree.strong(theta)
    size = _tree.norm(outer.theta)
    change = _tree.norm(_tree.subtract(theta, outer.theta))
    relative = change / jnp.where(size > 0, size, jnp.ones_like(size))
    return Outer(theta, outer.t + 1), jnp.where(outer.t == 0, jnp.full_like(relative, jnp.inf), relative)


def keep_finite(new: Any, old: Any) -> Any:
    """The new warm start unless it is not finite: one bad solve is reported, and does not spoil the next."""
    return _tree.where(_tree.all_finite(jax.lax.stop_gradient(new)), new, old)
