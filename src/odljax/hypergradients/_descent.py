"""What the estimators of first-order kind share: constrained inner steps, both gradients of a loss, stationarity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .. import _tree
from .._checks import is_callable, same_as
from .._types import Scalar

Projection = Callable[[Any, Any], Any]


def constraint(who: str, projection: Projection | None) -> Projection | None:
    """The projection ``(x, theta) -> x``, checked to keep x as it is; None where there is no constraint."""
    if projection is None:
        return None
    is_callable(who, "projection", projection, "x, theta")
    return lambda x, theta: same_as(who, "projection", projection(x, theta), x)


def step_along(x: Any, step: Scalar, direction: Any, theta: Any, project: Projection | None) -> Any:
    """``P(x - step * direction)``."""
    x = _tree.add_scaled(x, -step, direction)
    return x if project is None else project(x, theta)


def gradient_walk(
    loss: Callable[..., Array],
    x: Any,
    theta: Any,
    data: tuple[Any, ...],
    num_steps: int,
    step: Callable[[Any, Any], Any],
    project: Projection | None,
) -> Any:
    """x after ``num_steps`` projected gradient steps on the loss."""

    def body(x: Any, k: Array) -> tuple[Any, None]:
        return step_along(x, step(theta, k), jax.grad(loss)(x, theta, *data), theta, project), None

    return jax.lax.scan(body, x, jnp.arange(num_steps))[0] if num_steps else x


def stationarity(x: Any, slope: Any, theta: Any, step: Scalar, project: Projection | None) -> Array:
    """``||slope||``; under a constraint that of the gradient mapping, ``||x - P(x - step * slope)|| / step``."""
    if project is None:
        return _tree.norm(slope)
    moved = _tree.norm(_tree.subtract(x, step_along(x, step, slope, theta, project)))
    return moved / like(step, moved)


def like(coefficient: Any, value: Array) -> Array:
    """The coefficient in the dtype of the value."""
    return jnp.asarray(coefficient).astype(value.dtype)
