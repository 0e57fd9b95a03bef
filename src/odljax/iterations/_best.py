"""The best iterate so far."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .. import _tree
from .._checks import is_callable, scalar
from .._types import State, Step, Theta, X
from ..operators import Operator
from ..operators._gradient import Objective
from ..operators._operator import residual
from ._iteration import Iteration, iteration_of, restart_by


class BestState(NamedTuple):
    """The iterate that walks on, the state of its iteration, and the least measure seen."""

    walk: Any
    inner: State
    least: Array


def best_so_far(
    iteration: Iteration[X, Theta] | Operator[X, Theta] | Callable[[X, Theta], X], objective: Objective | None = None
) -> Iteration[X, Theta]:
    r"""Returns the iteration whose iterate is the best one that it has passed.

    .. math:: w_{k+1} = \operatorname{step}(w_k), \qquad
        x_{k+1} = w_{k+1} \text{ where } \mu(w_{k+1}) < \mu(x_k), \text{ else } x_k

    The walk itself is not touched. The measure is the operator's residual, or an objective.

    When: methods that are not monotone (momentum, Anderson, Adam, subgradients, noisy steps) are cut short. Outermost:
    a transform around it would walk from the best.

    The derivative is that of the iterate that was kept. ``truncated`` sees nothing move where the best came before the
    steps it looks at. A walk that overflows after its best is not stopped, and the status does not tell: x is the best
    all the same, but the derivative through the steps is NaN (zero times infinity); ``implicit`` does not see the walk.

    Args:
        iteration: an iteration, an operator, or a function ``(x, theta) -> x``.
        objective: ``(x, theta) -> scalar``, the measure. None: the residual of the iteration's operator.

    Raises:
        TypeError: no objective, and an iteration without an operator.

    Cost: that of the iteration, and one residual or objective a step; two more copies of x.

    Source: the best iterate of subgradient methods: Shor (1985); Nesterov (2018), section 3.2.3.

    Example:
        >>> import odljax as odl
        >>> wild = odl.gradient_descent(lambda x, theta: 0.5 * (x - theta) ** 2, step_size=3.0)
        >>> [float(odl.for_steps(walk, 4)(0.0, 1.0).x) for walk in (wild, odl.best_so_far(wild))]
        [-15.0, 0.0]
    """
    iteration = iteration_of("best_so_far", "iteration", iteration)
    if objective is not None:
        is_callable("best_so_far", "objective", objective, "x, theta")
    elif iteration.operator is None:
        raise TypeError(
            f"best_so_far: iterates are compared by the residual of an operator, and {iteration.name} has none. "
            f"Pass an objective."
        )

    def measure(x: X, theta: Theta) -> Array:
        x, theta = jax.lax.stop_gradient((x, theta))
        if objective is not None:
            value = scalar("best_so_far", "the objective", objective(x, theta))
        else:
            assert iteration.operator is not None
            value = residual(iteration.operator, x, theta)
        return jax.lax.stop_gradient(value)

    def init(x: X, theta: Theta) -> BestState:
        return BestState(x, iteration.init(x, theta), measure(x, theta))

    def step(x: X, state: BestState, theta: Theta, k: Step) -> tuple[X, BestState]:
        walk, inner = iteration.step(state.walk, state.inner, theta, k)
        value = measure(walk, theta)
        # Written so that a walk that has become NaN is not hidden where nothing finite was ever seen.
        better = (value < state.least) | ~jnp.isfinite(state.least)
        return _tree.where(better, walk, x), BestState(walk, inner, jnp.where(better, value, state.least))

    name = f"best_so_far({iteration.name})"
    return dataclasses.replace(iteration, init=init, step=step, restart=restart_by(init), name=name)
