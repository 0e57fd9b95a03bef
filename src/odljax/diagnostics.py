"""Probes: is an operator non-expansive here, does a hypergradient match finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from . import _tree
from ._checks import as_inner, count
from ._types import Theta, X
from .operators import Operator, as_operator
from .operators._operator import inverse_metric

__all__ = ["Expansion", "TaylorTest", "expansion", "taylor_test"]


class Expansion(NamedTuple):
    """How much an operator stretches near a point.

    Attributes:
        factor: the largest stretch found, in the operator's metric; a lower bound of the Lipschitz constant at the
            point.
        change: relative change of the factor over the last step of the power iteration; small when it has settled.
        direction: the direction that is stretched most, of unit length in the metric.
    """

    factor: Array
    change: Array
    direction: Any


def expansion(
    operator: Operator[X, Theta] | Callable[[X, Theta], X],
    x: X,
    theta: Theta,
    *,
    key: Array | None = None,
    num_steps: int = 50,
) -> Expansion:
    r"""Returns the local Lipschitz constant of an operator in its metric: T is non-expansive here if it is at most one.

    .. math:: \|J\|_G = \max_v \sqrt{\langle J v, G J v\rangle / \langle v, G v\rangle}, \qquad J = \partial_x T(x,
    \theta)

    by power iteration on :math:`G^{-1} J^\top G J`, with one Jacobian-vector and one vector-Jacobian product a step.

    When: to see whether Krasnoselskii-Mann steps of a learned operator will converge. A power iteration approaches the
    norm from below: a factor above one is a proof, a factor below one is evidence; probe at several points.

    Args:
        operator: an operator, in whose metric the probe measures, or a function ``(x, theta) -> x`` (identity metric).
        x: the point.
        theta: the hyper-variable.
        key: of the random start; default ``jax.random.key(0)``.
        num_steps: of the power iteration, at least 1.

    Raises:
        TypeError: x is not floating point; the operator changes structure, shape or dtype.
        ValueError: a step count below 1.

    Cost: num_steps times one jvp, one vjp, two products with the metric and one with its inverse.

    Source: Golub and Van Loan (2013), section 8.2; in a metric: the generalised eigenproblem.

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> probe = odl.diagnostics.expansion(lambda x, theta: theta * x, jnp.ones(3), 0.5)
        >>> round(float(probe.factor), 4)
        0.5
    """
    operator = as_operator(operator)
    x = as_inner("expansion", "x", x)
    num_steps = count("expansion", "num_steps", num_steps)
    key = jax.random.key(0) if key is None else key

    def metric(v: X) -> X:
        return v if operator.metric is None else operator.metric(v, theta)

    solve_metric = inverse_metric(operator)

    def inverse(v: X) -> X:
        return v if solve_metric is None else solve_metric(v, theta)

    def normalised(v: X) -> X:
        size = jnp.sqrt(_tree.vdot(v, metric(v)))
        return _tree.scale(1 / jnp.where(size > 0, size, jnp.ones_like(size)), v)

    _, push = jax.linearize(lambda x: operator(x, theta), x)
    _, pull = jax.vjp(lambda x: operator(x, theta), x)

    def step(carry: Any, _: None) -> Any:
        v, old, _ = carry
        stretched = push(v)
        weighted = metric(stretched)
        factor = jnp.sqrt(jnp.maximum(_tree.vdot(stretched, weighted), 0.0))
        return (normalised(inverse(pull(weighted)[0])), factor, jnp.abs(factor - old)), None

    zero = jnp.zeros((), _tree.accumulation_dtype(x))
    start = (normalised(_random_like(key, x)), zero, zero)
    (v, factor, change), _ = jax.lax.scan(step, start, None, length=num_steps)
    return Expansion(factor, change / jnp.where(factor > 0, factor, jnp.ones_like(factor)), v)


class TaylorTest(NamedTuple):
    """Whether a gradient belongs to a function.

    Attributes:
        slope: of log remainder against log step: 2 for the right gradient of a smooth function, 1 for a wrong one.
        finite_difference: the central difference along the direction, at the step where it is most exact.
        directional: the inner product of the gradient with the direction.
        relative_error: of the two.
        steps: the steps h.
        remainders: ``|f(theta + h d) - f(theta) - h <gradient, d>|``.
    """

    slope: float
    finite_difference: float
    directional: float
    relative_error: float
    steps: np.ndarray
    remainders: np.ndarray


def taylor_test(
    function: Callable[[Any], Any], theta: Any, gradient: Any = None, *, key: Array | None = None
) -> TaylorTest:
    r"""Returns the Taylor slope of a gradient against finite differences, along a random unit direction.

    .. math:: |\varphi(\theta + h d) - \varphi(\theta) - h \langle g, d \rangle| = O(h^2)

    When: to see whether a hypergradient is that of the function it claims; not inside compiled code. The slope is
    that of the remainders above rounding; where all are below (a linear function, the right gradient) it is reported
    as 2.

    Args:
        function: :math:`\varphi`, ``theta -> scalar``.
        theta: the point, a pytree of floating-point arrays.
        gradient: g, a pytree like theta. None: ``jax.grad(function)(theta)``.
        key: of the random direction; default ``jax.random.key(0)``.

    Raises:
        TypeError: theta is not floating point.

    Cost: 24 evaluations of the function.

    Source: Farrell et al. (2013), section 5.

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> test = odl.diagnostics.taylor_test(lambda theta: jnp.sum(theta**3), jnp.ones(2), 3 * jnp.ones(2))
        >>> round(test.slope, 1)
        2.0
    """
    theta = as_inner("taylor_test", "theta", theta)
    gradient = jax.grad(function)(theta) if gradient is None else gradient
    key = jax.random.key(0) if key is None else key
    direction = _random_like(key, theta)
    direction = _tree.scale(1 / _tree.norm(direction), direction)
    eps = float(jnp.finfo(_tree.accumulation_dtype(theta)).eps)
    scale = max(1.0, float(_tree.norm(theta)))
    steps = scale * np.geomspace(eps**0.5, 0.1, 12)

    evaluate = jax.jit(lambda h: jnp.asarray(function(_tree.add_scaled(theta, h, direction))))
    forward = np.array([float(evaluate(h)) for h in steps])
    backward = np.array([float(evaluate(-h)) for h in steps])
    here, directional = float(evaluate(0.0)), float(_tree.vdot(gradient, direction))
    remainders = np.abs(forward - here - steps * directional)
    usable = remainders > 100 * eps * max(abs(here), abs(directional) * scale, eps)
    # The smallest steps that rounding leaves readable: there the leading term rules.
    chosen = np.flatnonzero(usable)[:6]
    slope = 2.0
    if len(chosen) >= 2:
        slope = float(np.polyfit(np.log(steps[chosen]), np.log(remainders[chosen]), 1)[0])
    central = (forward - backward) / (2 * steps)
    best = int(np.argmin(np.abs(np.diff(central))))
    difference = float(central[best])
    error = abs(difference - directional) / max(abs(difference), abs(directional), eps)
    return TaylorTest(slope, difference, directional, error, steps, remainders)


def _random_like(key: Array, x: X) -> X:
    """Standard normal numbers in the structure of x."""
    leaves, structure = jax.tree.flatten(x)
    keys = jax.random.split(key, len(leaves))
    noise = [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, noise)
