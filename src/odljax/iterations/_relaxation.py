"""Relaxation and projection of each step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

from .. import _tree
from .._checks import coefficient, is_callable, same_as
from .._types import Coefficient, State, Step, Theta, X
from ..operators import Operator, compose
from ._iteration import Iteration, MeasuredStep, iteration_of


def krasnoselskii_mann(
    iteration: Iteration[X, Theta] | Operator[X, Theta] | Callable[[X, Theta], X], relaxation: Coefficient = 0.5
) -> Iteration[X, Theta]:
    r"""Returns the relaxed iteration of Krasnoselskii and Mann.

    .. math:: x_{k+1} = x_k + \alpha_k (T(x_k, \theta) - x_k)

    When: T is only non-expansive. The residual then falls as
    :math:`\|x_k - T x_k\|_G \le \operatorname{dist}_G(x_0, \operatorname{Fix} T) / \sqrt{\alpha(1-\alpha)(k+1)}`. The
    fixed points, and so the implicit derivative, do not depend on the relaxation.

    Args:
        iteration: an iteration, an operator, or a function ``(x, theta) -> x``.
        relaxation: :math:`\alpha_k` in (0, 2), a number, a schedule of k or a function of theta; above 1 only if T is
            itself averaged.

    Raises:
        ValueError: a relaxation outside (0, 2).

    Cost: that of the iteration.

    Source: Krasnoselskii (1955), Mann (1953); rate: Baillon and Bruck (1996), Cominetti, Soto and Vaisman (2014).

    Example:
        >>> import odljax as odl
        >>> flip = odl.krasnoselskii_mann(lambda x, theta: 2.0 * theta - x, relaxation=0.5)
        >>> float(odl.for_steps(flip, 1)(0.0, 3.0).x)
        3.0
    """
    iteration = iteration_of("krasnoselskii_mann", "iteration", iteration)
    relax = coefficient("krasnoselskii_mann", "relaxation", relaxation, high=2.0)

    def step(x: X, state: State, theta: Theta, k: Step) -> tuple[X, State]:
        target, state = iteration.step(x, state, theta, k)
        return _tree.interpolate(x, target, relax(theta, k)), state

    def measured(x: X, state: State, theta: Theta, k: Step) -> Any:
        target, state, parts = cast(MeasuredStep, iteration.step).measured(x, state, theta, k)
        return _tree.interpolate(x, target, relax(theta, k)), state, parts

    relaxed = MeasuredStep(measured) if isinstance(iteration.step, MeasuredStep) else step
    return dataclasses.replace(iteration, step=relaxed, name=f"krasnoselskii_mann({iteration.name})")


def project(
    iteration: Iteration[X, Theta] | Operator[X, Theta] | Callable[[X, Theta], X], projection: Callable[[X, Theta], X]
) -> Iteration[X, Theta]:
    r"""Returns the iteration with each step projected.

    .. math:: x_{k+1} = P(\operatorname{step}(x_k), \theta)

    This changes the destination openly: the operator becomes :math:`P \circ T`.

    When: the answer must stay in a closed convex set. In the metric of T, P must be the projection in that metric.

    Args:
        iteration: an iteration, an operator, or a function ``(x, theta) -> x``.
        projection: P, ``(x, theta) -> x``, for instance ``lambda x, theta: odl.prox.box(x, (0.0, 1.0))``.

    Raises:
        TypeError: projection is no function; at trace time, it changes structure, shape or dtype.

    Cost: that of the iteration and one projection a step.

    Source: Goldstein (1964), Levitin and Polyak (1966).

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> walk = odl.gradient_descent(lambda x, theta: 0.5 * (x - theta) ** 2, step_size=0.5)
        >>> solver = odl.for_steps(odl.project(walk, lambda x, theta: jnp.clip(x, 0.0, 1.0)), 10)
        >>> float(solver(0.0, 5.0).x)
        1.0
    """
    iteration = iteration_of("project", "iteration", iteration)
    is_callable("project", "projection", projection, "x, theta")
    operator = iteration.operator
    if operator is not None:
        kept = {name: getattr(operator, name) for name in ("metric", "metric_inverse", "readout")}
        operator = dataclasses.replace(
            compose(Operator(projection, name="project"), operator, **kept), step_size=operator.step_size
        )

    def step(x: X, state: State, theta: Theta, k: Step) -> tuple[X, State]:
        x, state = iteration.step(x, state, theta, k)
        return same_as("project", "the projection", projection(x, theta), x), state

    return dataclasses.replace(iteration, step=step, operator=operator, name=f"project({iteration.name})")
