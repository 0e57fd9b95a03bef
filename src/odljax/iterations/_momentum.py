"""Momentum: extrapolation before or after the step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from .. import _tree
from .._checks import coefficient
from .._types import Coefficient, State, Step, Theta, X
from ..operators import Operator
from ._iteration import Iteration, iteration_of


class Restarted(NamedTuple):
    """The previous iterate, the state of the iteration below, and the steps since the last restart."""

    previous: Any
    inner: State
    age: Array


def _fista_momentum(k: Step) -> Any:
    count = k.astype(float)
    return count / (count + 3.0)


def nesterov(
    iteration: Iteration[X, Theta] | Operator[X, Theta] | Callable[[X, Theta], X],
    momentum: Coefficient = _fista_momentum,
    *,
    restart: bool = False,
) -> Iteration[X, Theta]:
    r"""Returns the iteration with Nesterov's extrapolation before each step.

    .. math:: v_k = x_k + \beta_k (x_k - x_{k-1}), \quad x_{k+1} = \operatorname{step}(v_k)

    When: gradient or proximal gradient steps on a convex problem with step size at most 1/L: the rate becomes
    :math:`O(1/k^2)`; with strong convexity m, the constant
    :math:`\beta = (\sqrt{L} - \sqrt{m}) / (\sqrt{L} + \sqrt{m})` gives a linear rate. Where m is unknown, or only
    local, ``restart`` finds about that rate: momentum is dropped, and its schedule begins anew, whenever it points
    uphill,
    :math:`\langle v_k - x_{k+1}, x_{k+1} - x_k \rangle > 0`. The iterates need not be monotone.

    Around ``krasnoselskii_mann`` this is the inertial iteration of Krasnoselskii and Mann,
    :math:`x_{k+1} = v_k + \alpha (T v_k - v_k)`. For a T that is only non-expansive it needs a small constant momentum:
    non-decreasing :math:`\beta_k < 1/3` with :math:`\alpha = 1/2`.

    Args:
        iteration: an iteration, an operator, or a function ``(x, theta) -> x``.
        momentum: :math:`\beta_k` in [0, 1), a number, a schedule of k or a function of theta; default :math:`k/(k+3)`.
        restart: whether momentum that points uphill is dropped; a schedule then counts k from the last such step.

    Raises:
        ValueError: a momentum outside [0, 1).

    Cost: that of the iteration; one more copy of x; one inner product for the restart.

    Source: Nesterov (1983); Beck and Teboulle (2009); :math:`k/(k+3)`: Su, Boyd and Candes (2016), r = 3; restart:
    O'Donoghue and Candes (2015), the gradient scheme; inertial: Alvarez and Attouch (2001), Mainge (2008).

    Example:
        >>> import odljax as odl
        >>> walk = odl.nesterov(odl.gradient_descent(lambda x, theta: 0.5 * (x - theta) ** 2, step_size=0.5))
        >>> round(float(odl.for_steps(walk, 60)(0.0, 2.0).x), 3)
        2.0
    """
    iteration = iteration_of("nesterov", "iteration", iteration)
    beta = coefficient("nesterov", "momentum", momentum, high=1.0, closed=True)

    def step(x: X, state: State, theta: Theta, k: Step) -> tuple[X, State]:
        previous, inner = state
        ahead = _tree.add_scaled(x, beta(theta, k), _tree.subtract(x, previous))
        target, inner = iteration.step(ahead, inner, theta, k)
        return target, (x, inner)

    def restarted(x: X, state: Restarted, theta: Theta, k: Step) -> tuple[X, Restarted]:
        ahead = _tree.add_scaled(x, beta(theta, state.age), _tree.subtract(x, state.previous))
        target, inner = iteration.step(ahead, state.inner, theta, k)
        pair = (_tree.subtract(ahead, target), _tree.subtract(target, x))
        uphill = _tree.vdot(*(_tree.unscaled(one, _tree.magnitude(one)) for one in pair)) > 0
        age = jnp.where(uphill, jnp.zeros_like(state.age), state.age + 1)
        return target, Restarted(_tree.where(uphill, target, x), inner, age)

    def young(x: X, theta: Theta) -> Restarted:
        return Restarted(x, iteration.init(x, theta), jnp.zeros((), int))

    def young_again(x: X, state: Restarted, theta: Theta) -> Restarted:
        return Restarted(x, iteration.forget(x, state.inner, theta), jnp.zeros_like(state.age))

    init, step, again = (young, restarted, young_again) if restart else (_remember(iteration), step, _forget(iteration))
    return dataclasses.replace(iteration, init=init, step=step, restart=again, name=f"nesterov({iteration.name})")


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
    iteration = iteration_of("heavy_ball", "iteration", iteration)
    beta = coefficient("heavy_ball", "momentum", momentum, high=1.0, closed=True)

    def step(x: X, state: State, theta: Theta, k: Step) -> tuple[X, State]:
        previous, inner = state
        target, inner = iteration.step(x, inner, theta, k)
        return _tree.add_scaled(target, beta(theta, k), _tree.subtract(x, previous)), (x, inner)

    init, again, name = _remember(iteration), _forget(iteration), f"heavy_ball({iteration.name})"
    return dataclasses.replace(iteration, init=init, step=step, restart=again, name=name)


def _remember(iteration: Iteration[X, Theta]) -> Callable[[X, Theta], State]:
    return lambda x, theta: (x, iteration.init(x, theta))


def _forget(iteration: Iteration[X, Theta]) -> Callable[[X, State, Theta], State]:
    return lambda x, state, theta: (x, iteration.forget(x, state[1], theta))
