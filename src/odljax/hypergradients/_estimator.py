"""The hypergradient record, what its update reports, and what its estimators share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Generic, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .. import _tree
from .._checks import as_inner, compiled_once, differentiable, enters, is_callable, record, same_as, scalar
from .._types import State, Status, Theta, X
from ..iterations import Iteration
from ..iterations._iteration import first_step
from ..operators import Operator
from ..solvers import Solver


class Info(NamedTuple):
    """What one update knows of itself; state is for the next step, info for the reader.

    Attributes:
        value: the outer loss where the gradient was taken: at the inner solution, for single-loop estimators at the
            inner iterate before its step, for stochastic ones on the minibatch.
        inner_residual: how far the inner problem is from solved there: ``||x - T(x, theta)||`` where a solver is told
            of an operator, ``||grad_x f||`` (of the minibatch, if there is one) where losses are given; None without
            either.
        adjoint_residual: ``||b - A v|| / ||b||`` of the adjoint system; None where there is none.
        status: the worse code of inner and adjoint solve; ``odl.check(info)`` raises on the bad ones. Estimators of two
            losses are DIVERGED where the inner residual and x have both grown a million times since ``init``.
        num_steps: inner steps taken.
        outer_change: ``||theta_t - theta_(t-1)|| / ||theta_(t-1)||`` since the last update; infinite at the first.
        history: rows recorded on the inner way, or None.
        x: the inner solution or the newest inner iterate.
        error: an estimate of ``||gradient - true hypergradient||``, where it was asked for; else None.
    """

    value: Array
    inner_residual: Array | None
    adjoint_residual: Array | None
    status: Array
    num_steps: Array
    outer_change: Array
    history: Any
    x: Any
    error: Array | None = None


@record
class Hypergradient(Generic[X, Theta]):
    """A gradient estimator of an outer loss, as a pair of pure functions.

    Estimators of solvers pass all data to the outer loss. Those of two losses, inner and outer, take either none, or
    one pytree for each: ``update(theta, state, inner_data, outer_data)`` calls ``inner(x, theta, inner_data)`` and
    ``outer(x, theta, outer_data)``.

    Args:
        init: ``(theta, x0, *data) -> state``; the data are those of the update, for the estimators that start from
            them.
        update: ``(theta, state, *data) -> (gradient, state, info)``; the gradient has the structure of theta.
        name: what messages call it.
        inner: ``(x, theta, *data) -> pytree``, what theta must enter for the gradient to be more than that of the outer
            loss alone: a step, or the slopes of both losses in x. ``init`` refuses a theta that does not enter it,
            unless it is called with ``allow_unused=True``. None: nothing is looked at.

    Example:
        >>> import jax, optax, odljax as odl
        >>> inner = odl.gradient_descent(lambda x, theta: 0.5 * (x - theta) ** 2, step_size=0.5)
        >>> solver = odl.implicit(odl.until_converged(inner, max_steps=100))
        >>> hyper = odl.hypergradients.through(solver, lambda x, theta: (x - 1.0) ** 2)
        >>> theta, tx = 0.0, optax.sgd(0.25)
        >>> state, opt_state = hyper.init(theta, 0.0), tx.init(theta)
        >>> for _ in range(20):
        ...     gradient, state, info = hyper.update(theta, state)
        ...     updates, opt_state = tx.update(gradient, opt_state)
        ...     theta = optax.apply_updates(theta, updates)
        >>> round(float(theta), 3)
        1.0
    """

    init: Callable[..., State]
    update: Callable[..., tuple[Theta, State, Info]]
    name: str = "hypergradient"
    inner: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "init", _own(self.init, self.name, self.inner))
        object.__setattr__(self, "update", compiled_once(self.update))


def _own(init: Callable[..., State], who: str, inner: Callable[..., Any] | None) -> Callable[..., State]:
    """``init``, which looks for theta in the inner problem, and whose state shares no buffer with its arguments or
    itself, so that it may be donated."""

    @functools.wraps(init)
    def own(*arguments: Any, allow_unused: bool = False, **named: Any) -> State:
        return jax.tree.map(jnp.copy, init(*arguments, **named))

    if inner is None:
        return own

    @functools.wraps(init)
    def call(theta: Any, x0: Any = None, *data: Any, allow_unused: bool = False) -> State:
        state = own(theta, x0, *data)
        at = _tree.strong(x0)  # None where theta says it
        if at is None or allow_unused or enters(lambda theta: inner(at, theta, *data), theta):
            return state
        raise ValueError(
            f"{who}: theta does not enter the inner problem, so that the gradient through x is zero. A map "
            f"T(x, theta) or a loss f(x, theta) must use its second argument (that of a Flax module may be a "
            f"flag). If it is meant, call init(..., allow_unused=True)."
        )

    return call


class Outer(NamedTuple):
    """Where the outer walk stands: the last theta, the number of updates, and the first sizes of what may diverge."""

    theta: Any
    t: Array
    first: Array  # of the inner residual and of x, 0 until one is known


class WalkState(NamedTuple):
    """All that many estimators remember: the inner start (None where theta says it) and the outer walk."""

    x: Any
    outer: Outer


def start_outer(theta: Any) -> Outer:
    theta = _tree.strong(theta)
    return Outer(theta, jnp.zeros((), int), jnp.zeros(2, _tree.accumulation_dtype(theta)))


def advance_outer(outer: Outer, theta: Any) -> tuple[Outer, Array]:
    """The next state and the relative change of theta since the last update."""
    theta = _tree.strong(theta)
    size = _tree.norm(outer.theta)
    change = _tree.norm(_tree.subtract(theta, outer.theta))
    relative = change / jnp.where(size > 0, size, jnp.ones_like(size))
    return outer._replace(theta=theta, t=outer.t + 1), jnp.where(
        outer.t == 0, jnp.full_like(relative, jnp.inf), relative
    )


def keep_finite(new: Any, old: Any) -> Any:
    """The new warm start unless it is not finite: one bad solve is reported, and does not spoil the next."""
    return _tree.where(_tree.all_finite(jax.lax.stop_gradient(new)), new, old)


def told(status: Array, value: Any, gradient: Any) -> Array:
    """The status of the solves, or NON_FINITE where a loss or a gradient beyond them is not finite."""
    finite = _tree.all_finite(jax.lax.stop_gradient((value, gradient)))
    return jnp.where(finite, status, jnp.asarray(int(Status.NON_FINITE), status.dtype))


def step_of(iteration: Iteration) -> Callable[..., Any]:
    """The first step as what theta must enter."""
    return lambda x, theta, *data: first_step(iteration, x, theta)


def loss_at(who: str, name: str, loss: Callable[..., Any], x: Any, theta: Any, *data: Any) -> Array:
    """The loss, checked to be a scalar and to take as many data as there are."""
    if not _takes(loss, x, theta, *data):
        came = ", ".join(["x", "theta", *("data" for _ in data)])
        raise TypeError(
            f"{who}: the {name} loss takes {inspect.signature(loss)}, and was called with ({came}). What it needs "
            f"beyond x and theta are the arguments of update(theta, state, *data), and of init(theta, x0, *data)."
        )
    return scalar(who, f"the {name} loss", loss(x, theta, *data))


# ---- what the estimators of two losses share ------------------------------------------------------------------------


def losses(who: str, inner: Any, outer: Any) -> tuple[Callable[..., Array], Callable[..., Array]]:
    """The two losses, checked to be scalar functions of ``(x, theta, *data)`` and none of our records of functions."""
    for name, loss in (("inner", inner), ("outer", outer)):
        if isinstance(loss, (Operator, Iteration, Solver, Hypergradient)):
            raise TypeError(
                f"{who}: {name} must be a loss, a function of (x, theta) or (x, theta, data); {loss!r} came. {who} "
                f"takes its own inner steps on a loss inner(x, theta, data), and no walk, solver or estimator in its "
                f"place. Solvers are taken by through, warm_started and pessimistic, operators and iterations by hodl."
            )
        is_callable(who, name, loss)

    def inner_loss(x: Any, theta: Any, *data: Any) -> Array:
        return loss_at(who, "inner", inner, x, theta, *data)

    def outer_loss(x: Any, theta: Any, *data: Any) -> Array:
        return loss_at(who, "outer", outer, x, theta, *data)

    return inner_loss, outer_loss


def pair(who: str, data: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arguments of the inner and those of the outer loss beyond ``(x, theta)``."""
    if len(data) not in (0, 2):
        raise TypeError(
            f"{who}: needs no data, or inner and outer data; {len(data)} came. Call init(theta, x0, inner_data, "
            f"outer_data) and update(theta, state, inner_data, outer_data)."
        )
    return (data[:1], data[1:])


def slope_of(who: str, inner: Callable[..., Any], outer: Callable[..., Any], *others: Any) -> Any:
    """The slopes in x of the two losses as what theta must enter: x follows both, where it is not unique.

    None where one of ``others`` is there, through which theta may enter as well: a prox, a projection, a start.
    """
    if any(other is not None for other in others):
        return None

    def slopes(x: Any, theta: Any, *data: Any) -> Any:
        inner_data, outer_data = pair(who, data)
        below = slope_at(who, "inner", inner, x, theta, *inner_data)
        return below, slope_at(who, "outer", outer, x, theta, *outer_data)

    return slopes


def slope_at(who: str, name: str, loss: Callable[..., Any], x: Any, theta: Any, *data: Any) -> Any:
    """The slope of a loss in x; theta itself where that is not known, because the loss may want more data."""
    if not _takes(loss, x, theta, *data) or (not data and _takes(loss, x, theta, None)):
        return theta
    return jax.grad(functools.partial(loss_at, who, name, loss))(x, theta, *data)


def _takes(function: Callable[..., Any], *arguments: Any) -> bool:
    """Whether it may be called so; true where there is no signature to be had."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:
        pass
    return True


def of_theta(coefficient: Any) -> Any:
    """The coefficient, if it is a function of theta; else None."""
    reads = callable(coefficient) and "theta" in inspect.signature(coefficient).parameters
    return coefficient if reads else None


def start_inner(who: str, theta: Any, x0: Any) -> Any:
    """The inner start, after a look at theta."""
    differentiable(who, theta)
    return as_inner(who, "x0", x0)


def conclude(
    who: str,
    gradient: Any,
    theta: Any,
    walk: Outer,
    *,
    value: Array,
    x: Any,
    inner_residual: Array | None,
    adjoint_residual: Array | None = None,
    num_steps: Any = 1,
    history: Any = None,
) -> tuple[Any, Outer, Info]:
    """The checked gradient, the advanced outer walk and the info of an estimator that takes steps of its own."""
    theta = _tree.strong(theta)
    gradient = same_as(who, "the gradient", gradient, theta, "theta")
    finite = _tree.all_finite((value, gradient, x))
    diverged, walk = _diverged(walk, inner_residual, x)
    status = jnp.where(diverged, Status.DIVERGED, Status.COMPLETED)
    status = jnp.where(finite, status, Status.NON_FINITE).astype(jnp.int32)
    walk, change = advance_outer(walk, theta)
    steps = jnp.asarray(num_steps, int)
    return gradient, walk, Info(value, inner_residual, adjoint_residual, status, steps, change, history, x)


def _diverged(walk: Outer, inner_residual: Array | None, x: Any) -> tuple[Array, Outer]:
    """Whether inner residual and x have both grown a million times against the first that were not zero."""
    if inner_residual is None:
        return jnp.zeros((), bool), walk
    sizes = [size.astype(walk.first.dtype) for size in (inner_residual, _tree.norm(x))]
    now = jax.lax.stop_gradient(jnp.stack(sizes))
    first = jnp.where(walk.first > 0, walk.first, jnp.where(jnp.isfinite(now), now, jnp.zeros_like(now)))
    return jnp.all((first > 0) & (1e-6 * now > first)), walk._replace(first=first)


def finish(
    who: str,
    gradient: Any,
    theta: Any,
    state: Any,
    new: Any,
    *,
    sound: Array | None = None,
    settled: tuple[str, ...] = (),
    **report: Any,
) -> tuple[Any, Any, Info]:
    """What a stochastic update returns: ``conclude``, and the new state if it and theta are finite.

    Otherwise the old state is carried on, for one bad minibatch or theta in a recursion, a memory or a warm start would
    spoil all updates to come; the status tells. Iterates, memories and the theta that they belong to are kept or
    replaced together, the draws advance. So does the number of updates, but not before the first good one, which sets
    the memories.

    Args:
        who: the name of the estimator.
        gradient: the direction of theta.
        theta: where the update was asked for.
        state: the state before, a NamedTuple with ``batches``, ``outer`` and perhaps a ``key``.
        new: the state after, its ``outer`` still that of before.
        sound: whether all that is to be kept is finite; None: seen here.
        settled: fields that ``new`` holds as they are to be, sound or not.
        report: the other arguments of ``conclude``.
    """
    before = state.outer
    gradient, walk, info = conclude(who, gradient, theta, before, **report)
    names = [name for name in new._fields if name not in ("batches", "key", "outer", *settled)]
    moved = {name: getattr(new, name) for name in names}
    if sound is None:
        sound = _tree.all_finite(jax.lax.stop_gradient((moved, walk.theta)))
    kept = _tree.where(sound, moved, {name: getattr(state, name) for name in names})
    last = _tree.where(sound, walk.theta, before.theta)
    outer = Outer(last, jnp.where(sound | (before.t > 0), walk.t, before.t), walk.first)
    status = jnp.where(sound, info.status, jnp.asarray(int(Status.NON_FINITE), info.status.dtype))
    return gradient, new._replace(**kept, outer=outer), info._replace(status=status)


def both(loss: Callable[..., Array], x: Any, theta: Any, data: tuple[Any, ...]) -> tuple[Array, Any, Any]:
    """The loss, its gradient in x and its gradient in theta."""
    value, (x_gradient, theta_gradient) = jax.value_and_grad(loss, argnums=(0, 1))(x, theta, *data)
    return value, x_gradient, theta_gradient


def relative(size: Array, scale: Array) -> Array:
    """``size / scale``, or the size itself where the scale is zero."""
    return size / jnp.where(scale > 0, scale, jnp.ones_like(scale))
