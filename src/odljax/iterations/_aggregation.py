"""Aggregation of the outer descent with the inner step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .. import _tree
from .._checks import coefficient, is_callable, same_as
from .._types import Coefficient, State, Step, Theta, X
from ..operators import Operator
from ..operators._gradient import value_and_gradient
from ._iteration import Iteration, first_step, iteration_of


def aggregate(
    iteration: Iteration[X, Theta] | Operator[X, Theta] | Callable[[X, Theta], X],
    outer: Callable[[X, Theta], Any],
    *,
    weight: Coefficient = 0.5,
    step_size: Coefficient,
    metric_inverse: Callable[[X, Theta], X] | None = None,
) -> Iteration[X, Theta]:
    r"""Returns the iteration whose step is averaged with a descent step of the outer loss.

    .. math:: x_{k+1} = \mu_k (x_k - s_k G_\theta^{-1} \nabla_x \ell(x_k, \theta)) + (1 - \mu_k)
    \operatorname{step}(x_k)

    It approaches, with :math:`s_k \to 0` and :math:`\sum s_k = \infty`, that fixed point of the step that has the least
    outer loss. There is no operator whose fixed point the iterates approach at a fixed step, so ``implicit`` is
    refused.

    The step must suit the outer loss: one that is far below :math:`1 / L_\ell`, the inverse Lipschitz constant of
    :math:`\nabla_x \ell` (of a mean over n numbers it is n times that of their sum), is the plain iteration in effect.
    ``hypergradients.hodl`` and ``bda`` estimate the constant by default.

    When: the inner solution is not unique; see ``hypergradients.hodl``.

    Args:
        iteration: an iteration, an operator, or a function ``(x, theta) -> x``.
        outer: :math:`\ell`, ``(x, theta) -> scalar``.
        weight: :math:`\mu_k` in [0, 1), a number, a schedule of k or a function of theta; 0 leaves the iteration as
            it is.
        step_size: :math:`s_k`, at least 0, a number, a schedule of k or a function of theta.
        metric_inverse: :math:`v \mapsto G_\theta^{-1} v`, ``(v, theta) -> v``. None: the identity.

    Raises:
        ValueError: a weight outside [0, 1), a negative step size.
        TypeError: at trace time, an outer loss that is not a real scalar.

    Cost: that of the iteration, one gradient of the outer loss and one application of the inverse metric.

    Source: Liu et al. (2022), arXiv 2206.07875, algorithm 1; Liu et al. (2020), arXiv 2006.04045 (BDA).

    Example:
        >>> import odljax as odl
        >>> stay = lambda x, theta: x  # every point is a fixed point
        >>> walk = odl.aggregate(stay, lambda x, theta: (x - theta) ** 2, step_size=lambda k: 1.0 / (k + 1.0))
        >>> round(float(odl.for_steps(walk, 50)(0.0, 1.0).x), 2)
        1.0
    """
    iteration = iteration_of("aggregate", "iteration", iteration)
    is_callable("aggregate", "outer", outer, "x, theta")
    if metric_inverse is not None:
        is_callable("aggregate", "metric_inverse", metric_inverse, "v, theta")
    mu = coefficient("aggregate", "weight", weight, high=1.0, closed=True)
    s = coefficient("aggregate", "step_size", step_size, closed=True)
    name = f"aggregate({iteration.name})"
    if isinstance(weight, (int, float)) and weight == 0:
        return dataclasses.replace(iteration, operator=None, name=name)

    def step(x: X, state: State, theta: Theta, k: Step) -> tuple[X, State]:
        below, state = iteration.step(x, state, theta, k)
        _, slope = value_and_gradient("aggregate", outer, x, theta)
        if metric_inverse is not None:
            slope = same_as("aggregate", "metric_inverse", metric_inverse(slope, theta), x)
        above = _tree.add_scaled(x, -s(theta, k), slope)
        return _tree.interpolate(below, above, mu(theta, k)), state

    return dataclasses.replace(iteration, step=step, operator=None, name=name)


def outer_unit(
    who: str,
    iteration: Iteration[X, Theta],
    outer: Callable[[X, Theta], Any],
    metric_inverse: Callable[[X, Theta], X] | None,
    x: X,
    theta: Theta,
) -> Array:
    """The step that suits the outer loss at x: 1/L, the inverse Lipschitz constant of its gradient in the metric.

    Where the loss has no curvature there, a step as long as that of the iteration. No derivative passes through.
    """
    x, theta = jax.lax.stop_gradient((x, theta))

    def slope(x: X) -> X:
        ascent = value_and_gradient(who, outer, x, theta)[1]
        return ascent if metric_inverse is None else same_as(who, "metric_inverse", metric_inverse(ascent, theta), x)

    # The transpose of G^-1 Hess has the same eigenvalues, and reverse mode is all that the walk asks of the loss.
    ascent, transpose = jax.vjp(slope, x)

    def power(_: Array, carry: tuple[X, Array]) -> tuple[X, Array]:
        v, _ = carry
        w = _tree.conjugate(transpose(_tree.conjugate(v))[0])
        size = _tree.norm(w)
        return _tree.divide(w, jnp.where(size > 0, size, jnp.ones_like(size))), size

    leaves, structure = jax.tree.flatten(x)
    # Fixed, and of no pattern that a problem would have.
    waves = [
        jnp.cos(2.4 * jnp.arange(leaf.size).astype(float) + i).reshape(leaf.shape) for i, leaf in enumerate(leaves)
    ]
    v = jax.tree.unflatten(structure, [w.astype(leaf.dtype) for w, leaf in zip(waves, leaves, strict=True)])
    first = _tree.divide(v, _tree.norm(v))
    _, constant = jax.lax.fori_loop(0, 10, power, (first, jnp.zeros_like(_tree.norm(x))))
    below, _ = first_step(iteration, x, theta)
    level = _tree.norm(_tree.subtract(x, below)) / _tree.norm(ascent)
    level = jnp.where(jnp.isfinite(level), level, jnp.zeros_like(level))
    curved = jnp.isfinite(1 / constant) & jnp.isfinite(constant)
    return jax.lax.stop_gradient(jnp.where(curved, 1 / constant, level))
