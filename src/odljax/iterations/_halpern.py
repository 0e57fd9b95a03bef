"""Halpern's anchored iteration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from .. import _tree
from .._checks import coefficient
from .._types import Coefficient, State, Step, Theta, X
from ..operators import Operator
from ._iteration import Iteration, iteration_of


class HalpernState(NamedTuple):
    """The start, to which each step is drawn back, and the state of the iteration below."""

    anchor: Any
    inner: State


def _lieder(k: Step) -> Any:
    return 1.0 / (k.astype(float) + 2.0)


def halpern(
    iteration: Iteration[X, Theta] | Operator[X, Theta] | Callable[[X, Theta], X], weight: Coefficient = _lieder
) -> Iteration[X, Theta]:
    r"""Returns the iteration drawn back towards its start, ever less.

    .. math:: x_{k+1} = \lambda_k x_0 + (1 - \lambda_k) T(x_k, \theta)

    When: T is only non-expansive, not averaged, and a small residual is wanted: with the default weight

    .. math:: \|x_k - T x_k\| \le \frac{2}{k+1} \operatorname{dist}(x_0, \operatorname{Fix} T)

    in the metric of T, which no first-order method improves on, where Krasnoselskii and Mann have
    :math:`1/\sqrt{k+1}`. With :math:`\lambda_k \to 0`, :math:`\sum \lambda_k = \infty` it ends at the fixed point that
    is nearest to the start. On a contraction it is slower than T alone: the error falls like :math:`\lambda_k`.

    Args:
        iteration: an iteration, an operator, or a function ``(x, theta) -> x``.
        weight: :math:`\lambda_k` in [0, 1), a number, a schedule of k or a function of theta; default
            :math:`1/(k+2)`.

    Raises:
        ValueError: a weight outside [0, 1).

    Cost: that of the iteration; one more copy of x.

    Source: Halpern (1967); rate of the default: Lieder (2021), theorem 2.1.

    Example:
        >>> import odljax as odl
        >>> flip = odl.halpern(lambda x, theta: 2.0 * theta - x)  # T alone jumps to and fro
        >>> float(odl.for_steps(flip, 1)(0.0, 3.0).x)
        3.0
    """
    iteration = iteration_of("halpern", "iteration", iteration)
    weight_at = coefficient("halpern", "weight", weight, high=1.0, closed=True)

    def init(x: X, theta: Theta) -> HalpernState:
        return HalpernState(x, iteration.init(x, theta))

    def step(x: X, state: HalpernState, theta: Theta, k: Step) -> tuple[X, HalpernState]:
        target, inner = iteration.step(x, state.inner, theta, k)
        return _tree.interpolate(target, state.anchor, weight_at(theta, k)), HalpernState(state.anchor, inner)

    def restart(x: X, state: HalpernState, theta: Theta) -> HalpernState:
        return HalpernState(state.anchor, iteration.forget(x, state.inner, theta))

    return dataclasses.replace(iteration, init=init, step=step, restart=restart, name=f"halpern({iteration.name})")
