"""Momentum: extrapolation before or after the step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from .. import _tree
from .._checks import coefficient
from .._types import Coefficient, State, Step, Theta, X
from ..operators import Operator
from ._iteration import Iteration, as_iteration


def _fista_momentum(k: Step) -> Any:
    count = k.astype(float)
    return count / (count + 3.0)


def nesterov(
    iteration: Iteration[X, Theta] | Operator[X, Theta] | Callable[[X, Theta], X],
    momentum: Coefficient = _fista_momentum,
) -> Iteration[X, Theta]:
    r"""Returns the iteration with Nesterov's extrapolation before each step.

    .. math:: v_k = x_k + \beta_k (x_k - x_{k-1}), \quad x_{k+1} = \operatorname{step}(v_k)

    When: gradient or proximal gradient steps on a convex problem with step size at most 1/L: the rate becomes
    :math:`O(1/k^2)`; with strong convexity m, the constant
    :math:`\beta = (\sqrt{L} - \sqrt{m}) / (\sqrt{L} + \sqrt{m})` gives a linear rate. The iterates need not be
    monotone.

    Args:
        iteration: an iteration, an operator, or a function ``(x, theta) -> x``.
        momentum: :math:`\beta_k` in [0, 1), a number, a schedule of k or a function of theta; default :math:`k/(k+3)`.

    Raises:
        ValueError: a momentum outside [0, 1).

    Cost: that of the iteration; one more copy of x.

    Source: Nesterov (1983); Beck and Teboulle (2009); :math:`k/(k+3)`: Chambolle and Dossal (2015), a = 3.

    Example:
        >>> import odljax as odl
        >>> walk = odl.nesterov(odl.gradient_descent(lambda x, theta: 0.5 * (x - theta) ** 2, step_size=0.5))
        >>> round(float(odl.for_steps(walk, 60)(0.0, 2.0).x), 3)
        2.0
    """
    iteration = as_iteration(iteration)
    beta = coefficient("nesterov", "momentum", momentum, high=1.0, closed=True)

    def step(x: X, state: State, theta: Theta, k: Step) -> tuple[X, State]:
        previous, inner = state
        ahead = _tree.add_scaled(x, beta(theta, k), _tree.subtract(x, previous))
        target, inner = iteration.step(ahead, inner, theta, k)
        return target, (x, inner)

    return dataclasses.replace(iteration, init=_remember(iteration), step=step, name=f"nesterov({iteration.name})")


def heavy_ball(
    iteration: Iteration[X, Theta] | Operator[X, Theta] | Callable[[X, Theta], X], momentum: Coefficient = 0.9
) -> Iteration[X, Theta]:
    r"""Returns the iteration with Polyak's heavy-ball momentum after each step.

    .. math:: x_{k+1} = \operatorname{step}(x_k) + \beta_k (x_k - x_{k-1})

    When: strongly convex quadratics, where :math:`\gamma = 4/(\sqrt{L}+\sqrt{m})^2` and
    :math:`\beta = ((\sqrt{L}-\sqrt{m})/(\sqrt{L}+\sqrt{m}))^2` are optimal; it may cycle on other convex problems.

    Args:
        iteration: an iteration, an operator, or a function ``(x, theta) -> x``.
        momentum: :math:`\beta_k` in [0, 1), a number, a schedule of k or a function of theta.

    Raises:
        ValueError: a momentum outside [0, 1).

    Cost: that of the iteration; one more copy of x.

    Source: Polyak (1964).

    Example:
        >>> import odljax as odl
        >>> walk = odl.heavy_ball(odl.gradient_descent(lambda x, theta: 0.5 * (x - theta) ** 2, step_size=0.5), 0.5)
        >>> round(float(odl.for_steps(walk, 60)(0.0, 2.0).x), 4)
        2.0
    """
    iteration = as_iteration(iteration)
    beta = coefficient("heavy_ball", "momentum", momentum, high=1.0, closed=True)

    def step(x: X, state: State, theta: Theta, k: Step) -> tuple[X, State]:
        previous, inner = state
        target, inner = iteration.step(x, inner, theta, k)
        return _tree.add_scaled(target, beta(theta, k), _tree.subtract(x, previous)), (x, inner)

    return dataclasses.replace(iteration, init=_remember(iteration), step=step, name=f"heavy_ball({iteration.name})")


def _remember(iteration: Iteration[X, Theta]) -> Callable[[X, Theta], State]:
    return lambda x, theta: (x, iteration.init(x, theta))
