"""Levels: an estimator and its optimiser as an iteration, on which the solvers of a level above can stand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from .. import _tree
from .._checks import differentiable, is_a, is_callable
from .._types import Status, Step, Theta
from ..iterations import Iteration
from ._estimator import Hypergradient


class Level(NamedTuple):
    """The iterate of a level that descends its own hypergradient.

    Attributes:
        theta: the variable of this level.
        x: the iterate of the level below: where its walk starts, and where it stood at the last update; again a
            ``Level`` if that level descends, too. None for estimators that need no start.
    """

    theta: Any
    x: Any


class LevelState(NamedTuple):
    """What a level remembers between two of its updates, and what it tells.

    Attributes:
        estimator: the state of the estimator.
        optimiser: the state of the optimiser.
        value: this level's loss at the last update; NaN before the first.
        status: the worst code of all updates so far.
    """

    estimator: Any
    optimiser: Any
    value: Array
    status: Array


def descend(
    build: Callable[[Theta], Hypergradient], tx: optax.GradientTransformation, *, data: tuple[Any, ...] = ()
) -> Iteration[Level, Theta]:
    r"""Returns the iteration that descends an estimator's hypergradient: a bilevel problem as the inner problem of one
    more level.

    .. math:: (g, s_{k+1}) = \operatorname{update}_\theta(y_k, s_k), \qquad y_{k+1} = y_k + \operatorname{tx}(g)

    Its variable is ``Level(theta=y, x=x)``: y, which this level chooses, and x, the iterate of the level below. The
    losses of the estimator close over theta, the variable of the level above, which ``build`` is given. ``for_steps``
    over it takes K updates of y for each of theta, and the estimator its own steps of x for each of y: these counts are
    the update frequencies of the levels.

    When: three or more levels of which the middle one is walked, not solved, or takes a stochastic or single-loop
    estimator. Wrap it in ``unrolled(for_steps(...), checkpoint_every=...)`` and hand it to ``through``,
    ``warm_started`` (then y *and* x start where they ended; the memories of estimator and optimiser begin anew), or
    again to ``descend``. The level above differentiates the updates themselves, so its gradient is as exact as this
    estimator's is, and what an estimator holds constant by definition stays so. There is no operator: for an implicit
    derivative of the middle level nest solvers instead, the objective of one holding the solution of the other.

    Args:
        build: ``theta -> Hypergradient``, the estimator for y given the theta of the level above.
        tx: the optimiser of y, an optax gradient transformation.
        data: what the estimator's ``init`` and ``update`` take beside y and state; may be traced.

    Shapes: the iterate is ``Level(y, x)``; start the solver from ``Level(y0, x0)``. ``solution.state`` is a
    ``LevelState``: the value of this level's loss and the worst status of its updates.

    Raises:
        TypeError: ``build`` is no function or returns no estimator, ``tx`` is no gradient transformation; at trace
            time, a start that is no ``Level``.

    Cost: one update of the estimator and of the optimiser a step; reverse mode through K steps differentiates K
    updates.

    Source: Sato, Tanaka and Takeda (2021) for gradient descent through nested levels; Choe et al. (2023) for graphs of
    them.

    Example:
        >>> import jax, optax, odljax as odl
        >>> h = odl.hypergradients
        >>> def build(theta):  # x solves |x - y|^2, y solves |x - theta|^2
        ...     below = odl.gradient_descent(lambda x, y: 0.5 * (x - y) ** 2, step_size=0.5)
        ...     return h.through(odl.unrolled(odl.for_steps(below, 20)), lambda x, y: 0.5 * (x - theta) ** 2)
        >>> solver = odl.for_steps(h.descend(build, optax.sgd(0.5)), 20)
        >>> hyper = h.through(solver, lambda level, theta: (level.theta - 1.0) ** 2 + (theta - 2.0) ** 2)
        >>> gradient, state, info = hyper.update(1.5, hyper.init(1.5, h.Level(0.0, 0.0)))
        >>> round(float(info.x.theta), 4), abs(float(gradient)) < 1e-4
        (1.5, True)
    """
    who = "descend"
    is_callable(who, "build", build, "theta")
    hint = "Build one with optax, for instance optax.sgd(0.1)."
    is_a(who, "tx", tx, optax.GradientTransformation, hint)

    def estimator(theta: Theta) -> Hypergradient:
        hyper = build(theta)
        is_a(who, "what build(theta) returns", hyper, Hypergradient, "Make one with odl.hypergradients.")
        return hyper

    def init(level: Level, theta: Theta) -> LevelState:
        is_a(who, "the iterate", level, Level, "Start the solver from Level(theta=y0, x=x0).")
        differentiable(who, level.theta)
        state = estimator(theta).init(level.theta, level.x, *data)
        unknown = jnp.full((), jnp.nan, _tree.accumulation_dtype(level.theta))
        return LevelState(state, tx.init(level.theta), unknown, jnp.asarray(int(Status.CONVERGED), jnp.int32))

    def step(level: Level, state: LevelState, theta: Theta, k: Step) -> tuple[Level, LevelState]:
        gradient, estimator_state, info = estimator(theta).update(level.theta, state.estimator, *data)
        updates, optimiser = tx.update(gradient, state.optimiser, level.theta)
        moved = Level(optax.apply_updates(level.theta, updates), None if level.x is None else info.x)
        status = jnp.maximum(state.status, info.status.astype(jnp.int32))
        return moved, LevelState(estimator_state, optimiser, info.value.astype(state.value.dtype), status)

    return Iteration(init, step, None, who)
