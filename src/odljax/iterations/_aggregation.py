"""Aggregation of the outer descent with the inner step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from .. import _tree
from .._checks import coefficient, is_callable, same_as
from .._types import Coefficient, State, Step, Theta, X
from ..operators import Operator
from ..operators._gradient import value_and_gradient
from ._iteration import Iteration, iteration_of


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
