"""Meta-learning: the hyper-variable is where the tasks start from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .. import _tree
from .._checks import coefficient, count, differentiable, is_a, is_callable
from .._types import Coefficient, State, Theta, X
from ..derivatives import unrolled
from ..iterations import gradient_descent
from ..linear import LinearSolver, cg
from ..sampling import num_samples
from ..solvers import Solver, for_steps
from ._estimator import Hypergradient, Info, Outer, conclude, losses, pair, start_outer
from ._start import started


class MetaState(NamedTuple):
    """Tasks start anew each update: only the outer walk is remembered."""

    outer: Outer


class _Report(NamedTuple):
    """What one task tells of itself."""

    value: Array
    x: Any
    inner_residual: Array
    adjoint_residual: Any = None
    status: Any = None


Loss = Callable[[Any, Any], Array]


def _meta(
    who: str,
    inner: Any,
    outer: Any,
    start: Any,
    num_steps: int,
    prepare: Callable[[Loss, Loss, Any, Array], Any],
    surrogate: Callable[[Loss, Loss, Any, Array, Any], tuple[Array, _Report]],
) -> Hypergradient:
    """The estimator whose gradient is that of the mean of ``surrogate(f, F, theta, t, prepare(f, F, theta, t))``.

    What ``prepare`` returns is held while the gradient is taken, yet moves with theta for whoever differentiates the
    update.
    """
    inner_loss, outer_loss = losses(who, inner, outer)
    if start is not None:
        is_callable(who, "start", start, "theta")

    def task_axes(data: tuple[Any, ...]) -> None:
        sides = pair(who, data)
        if data:
            names = ("the inner data", "the outer data")
            sizes = [num_samples(who, name, side) for name, side in zip(names, sides, strict=True)]
            if not sizes[0]:
                raise ValueError(f"{who}: the mean over no task is no number; the data hold 0. Give at least one.")
            if sizes[0] != sizes[1]:
                raise ValueError(
                    f"{who}: the leading axis of the data is the task; the inner data hold {sizes[0]}, the outer data "
                    f"{sizes[1]}. Give each task its inner and its outer data."
                )

    def over_tasks(function: Callable[[Loss, Loss, Any], Any], data: tuple[Any, ...], held: Any) -> Any:
        def one(held: Any, *data: Any) -> Any:
            inner_data, outer_data = data[:1], data[1:]
            return function(
                lambda x, theta: inner_loss(x, theta, *inner_data),
                lambda x, theta: outer_loss(x, theta, *outer_data),
                held,
            )

        return jax.vmap(one)(held, *data) if data else one(held)

    def init(theta: Theta, x0: X | None = None, *data: Any) -> MetaState:
        differentiable(who, theta)
        started(who, start or _itself, theta, None)
        task_axes(data)
        return MetaState(start_outer(theta))

    def update(theta: Theta, state: MetaState, *data: Any) -> tuple[Theta, State, Info]:
        task_axes(data)
        t = state.outer.t
        held = over_tasks(lambda f, F, _: prepare(f, F, theta, t), data, None)

        def total(theta: Theta) -> tuple[Array, _Report]:
            values, report = over_tasks(lambda f, F, held: surrogate(f, F, theta, t, held), data, held)
            return jnp.mean(values), report

        gradient, report = jax.grad(total, has_aux=True)(theta)
        gradient, walk, info = conclude(
            who, gradient, theta, state.outer,
            value=jnp.mean(report.value), x=report.x, inner_residual=jnp.max(report.inner_residual),
            adjoint_residual=None if report.adjoint_residual is None else jnp.max(report.adjoint_residual),
            num_steps=num_steps,
        )  # fmt: skip
        if report.status is not None:
            info = info._replace(status=jnp.maximum(info.status, jnp.max(report.status)))
        return gradient, MetaState(walk), info

    return Hypergradient(init, update, who)


def _itself(theta: Any) -> Any:
    return theta


def _from(who: str, start: Any, theta: Any) -> Any:
    """Where the tasks start."""
    return started(who, start or _itself, theta, None)


def _walk(f: Loss, step_size: Coefficient, num_steps: int, checkpoint_every: int | None = None) -> Solver:
    steps = for_steps(gradient_descent(f, step_size), num_steps)
    return unrolled(steps, checkpoint_every=checkpoint_every, on_failure="ignore")  # the info says what failed


def _slope(f: Loss, x: Any, theta: Any) -> Array:
    return _tree.norm(jax.grad(f)(*jax.lax.stop_gradient((x, theta))))


def _nothing(f: Loss, F: Loss, theta: Any, t: Array) -> None:
    return None


def maml(
    inner: Callable[..., Any],
    outer: Callable[..., Any],
    *,
    num_steps: int,
    step_size: Coefficient,
    start: Callable[[Theta], X] | None = None,
    checkpoint_every: int | None = None,
) -> Hypergradient[X, Theta]:
    r"""Returns MAML: the gradient through the inner steps of each task to their shared start.

    .. math:: x_0 = \theta, \quad x_{k+1} = x_k - s\, \nabla_x f_i(x_k, \theta), \quad
        g = \frac{d}{d\theta} \frac1n \sum_i F_i(x_K^i(\theta), \theta)

    When: many small tasks, a few inner steps each, and a start from which these few steps go far. Smooth inner losses;
    nothing need converge.

    Args:
        inner: f, ``(x, theta, inner_data) -> scalar``, of one task; without data ``(x, theta)``, the only task. It may
            depend on theta beside the start (learned features, penalties).
        outer: F, ``(x, theta, outer_data) -> scalar``, likewise.
        num_steps: K, at least 1, static.
        step_size: s > 0, a number, a schedule of the inner step, or a function of theta (then learned with it) or of
            both.
        start: ``theta -> x``, the part of theta that the tasks start from. None: all of it.
        checkpoint_every: as in ``unrolled``.

    Shapes: every leaf of inner and outer data has the task as leading axis; tasks are vmapped and their losses
    averaged. ``info.x`` has the task axis, too; ``info.inner_residual`` is that of the worst task. The x0 of ``init``
    is not used and may be None.

    Raises:
        ValueError: a step size that is not positive, a count below 1; at trace time, different numbers of inner and
            outer tasks.
        TypeError: a loss or start that is no function; at trace time, a loss that is not a real scalar, data that is
            not a pair.

    Cost: num_steps gradients and Hessian-vector products of f and one gradient of F a task; memory num_steps times
    what one step needs, all tasks at once. The state holds theta and a counter.

    Source: Finn, Abbeel and Levine (2017), algorithm 1.

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> distance = lambda x, theta, goal: 0.5 * (x - goal) ** 2
        >>> hyper = odl.hypergradients.maml(distance, distance, num_steps=1, step_size=0.5)
        >>> goals = jnp.array([1.0, 3.0])
        >>> gradient, state, info = hyper.update(0.0, hyper.init(0.0, None), goals, goals)
        >>> float(gradient), info.x.tolist()  # (1 - s)^2 times minus the mean goal
        (-0.5, [0.5, 1.5])
    """
    return _through_steps("maml", inner, outer, num_steps, step_size, start, checkpoint_every)


def anil(
    inner: Callable[..., Any],
    outer: Callable[..., Any],
    *,
    start: Callable[[Theta], X],
    num_steps: int,
    step_size: Coefficient,
    checkpoint_every: int | None = None,
) -> Hypergradient[X, Theta]:
    r"""Returns ANIL: MAML in which only the head adapts, on a body that all tasks share.

    .. math:: x_0 = \operatorname{head}(\theta), \quad x_{k+1} = x_k - s\, \nabla_x f_i(x_k, \theta), \quad
        g = \frac{d}{d\theta} \frac1n \sum_i F_i(x_K^i(\theta), \theta)

    The losses read the body from theta and the head from x; the gradient reaches both.

    When: as ``maml``, with a body too large to be adapted for each task: Hessian-vector products of the head only.

    Args:
        inner: f, ``(x, theta, inner_data) -> scalar``, x the head, of one task; without data ``(x, theta)``.
        outer: F, ``(x, theta, outer_data) -> scalar``, likewise.
        start: ``theta -> x``, the head.
        num_steps: K, at least 1, static.
        step_size: s > 0, a number, a schedule of the inner step, or a function of theta or of both.
        checkpoint_every: as in ``unrolled``.

    Shapes: as ``maml``; the adapted heads are ``info.x``.

    Raises:
        ValueError: as ``maml``.
        TypeError: as ``maml``.

    Cost: as ``maml``, the inner gradients and Hessian-vector products in the head only.

    Source: Raghu, Raghu, Bengio and Vinyals (2020).

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> fit = lambda head, theta, goal: 0.5 * (theta["body"] * head - goal) ** 2
        >>> hyper = odl.hypergradients.anil(fit, fit, start=lambda theta: theta["head"], num_steps=1, step_size=0.5)
        >>> theta, goals = {"body": 1.0, "head": 0.0}, jnp.array([1.0, 3.0])
        >>> gradient, state, info = hyper.update(theta, hyper.init(theta, None), goals, goals)
        >>> info.x.tolist(), float(gradient["head"])
        ([0.5, 1.5], -0.5)
    """
    is_callable("anil", "start", start, "theta")
    return _through_steps("anil", inner, outer, num_steps, step_size, start, checkpoint_every)


def _through_steps(
    who: str, inner: Any, outer: Any, num_steps: int, step_size: Any, start: Any, checkpoint_every: int | None
) -> Hypergradient:
    num_steps = count(who, "num_steps", num_steps)
    step = coefficient(who, "step_size", step_size)
    if checkpoint_every is not None:
        count(who, "checkpoint_every", checkpoint_every)

    def surrogate(f: Loss, F: Loss, theta: Any, t: Array, held: None) -> tuple[Array, _Report]:
        x = _walk(f, step, num_steps, checkpoint_every)(_from(who, start, theta), theta).x
        value = F(x, theta)
        return value, _Report(value, x, _slope(f, x, theta))

    return _meta(who, inner, outer, start, num_steps, _nothing, surrogate)


def fomaml(
    inner: Callable[..., Any],
    outer: Callable[..., Any],
    *,
    num_steps: int,
    step_size: Coefficient,
    start: Callable[[Theta], X] | None = None,
) -> Hypergradient[X, Theta]:
    r"""Returns first-order MAML: the inner gradients are held, as if each task only shifted its start.

    .. math:: g = \frac1n \sum_i \Bigl(\frac{\partial x_0}{\partial \theta}\Bigr)^{\!\top} \nabla_x F_i(x_K^i, \theta)
        + \nabla_\theta F_i(x_K^i, \theta)

    When: as ``maml``, where Hessian-vector products are too dear and K s is small: with inner Hessians H, MAML has the
    factor :math:`(I - s H)^K` where this has the identity. Whatever reaches the inner losses through theta itself
    (features, penalties) gets no gradient: a theta that enters only there needs ``maml``.

    Args:
        inner: f, ``(x, theta, inner_data) -> scalar``, of one task; without data ``(x, theta)``.
        outer: F, ``(x, theta, outer_data) -> scalar``, likewise.
        num_steps: K, at least 1, static.
        step_size: s > 0, a number, a schedule of the inner step, or a function of theta or of both.
        start: ``theta -> x``, the part of theta that the tasks start from. None: all of it.

    Shapes: as ``maml``.

    Raises:
        ValueError: as ``maml``.
        TypeError: as ``maml``.

    Cost: num_steps gradients of f and one of F a task; memory of one step.

    Source: Finn, Abbeel and Levine (2017), section 5.2; Nichol, Achiam and Schulman (2018).

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> distance = lambda x, theta, goal: 0.5 * (x - goal) ** 2
        >>> hyper = odl.hypergradients.fomaml(distance, distance, num_steps=1, step_size=0.5)
        >>> goals = jnp.array([1.0, 3.0])
        >>> gradient, state, info = hyper.update(0.0, hyper.init(0.0, None), goals, goals)
        >>> float(gradient)  # maml: -0.5
        -1.0
    """
    who = "fomaml"
    num_steps = count(who, "num_steps", num_steps)
    step = coefficient(who, "step_size", step_size)

    def prepare(f: Loss, F: Loss, theta: Any, t: Array) -> tuple[Any, Any]:
        x0 = _from(who, start, theta)
        return x0, _walk(f, step, num_steps)(x0, theta).x

    def surrogate(f: Loss, F: Loss, theta: Any, t: Array, held: Any) -> tuple[Array, _Report]:
        x0, x = held
        value = F(_tree.add(x, _tree.subtract(_from(who, start, theta), x0)), theta)
        return value, _Report(value, x, _slope(f, x, theta))

    return _meta(who, inner, outer, start, num_steps, prepare, surrogate)


def reptile(
    inner: Callable[..., Any],
    outer: Callable[..., Any],
    *,
    num_steps: int,
    step_size: Coefficient,
    start: Callable[[Theta], X] | None = None,
) -> Hypergradient[X, Theta]:
    r"""Returns Reptile: from the shared start towards where the tasks ended.

    .. math:: g = \frac1n \sum_i \Bigl(\frac{\partial x_0}{\partial \theta}\Bigr)^{\!\top} (x_0(\theta) - x_K^i)

    When: as ``fomaml``, without a split into inner and outer data. With one step it is s times the gradient of the
    mean inner loss; with more it also raises the inner product of gradients of different steps. It is no gradient of
    the outer loss, which is evaluated for ``info.value`` alone. SGD at rate r moves theta by r of the way.

    Args:
        inner: f, ``(x, theta, inner_data) -> scalar``, of one task; without data ``(x, theta)``.
        outer: F, ``(x, theta, outer_data) -> scalar``, reported only.
        num_steps: K, at least 1, static.
        step_size: s > 0, a number, a schedule of the inner step, or a function of theta or of both.
        start: ``theta -> x``, the part of theta that the tasks start from; the rest gets no gradient. None: all of it.

    Shapes: as ``maml``.

    Raises:
        ValueError: as ``maml``.
        TypeError: as ``maml``.

    Cost: num_steps gradients of f and one value of F a task; memory of one step.

    Source: Nichol, Achiam and Schulman (2018), algorithm 2 (batched).

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> distance = lambda x, theta, goal: 0.5 * (x - goal) ** 2
        >>> hyper = odl.hypergradients.reptile(distance, distance, num_steps=1, step_size=0.5)
        >>> goals = jnp.array([1.0, 3.0])
        >>> gradient, state, info = hyper.update(0.0, hyper.init(0.0, None), goals, goals)
        >>> float(gradient)
        -1.0
    """
    who = "reptile"
    num_steps = count(who, "num_steps", num_steps)
    step = coefficient(who, "step_size", step_size)

    def prepare(f: Loss, F: Loss, theta: Any, t: Array) -> Any:
        return _walk(f, step, num_steps)(_from(who, start, theta), theta).x

    def surrogate(f: Loss, F: Loss, theta: Any, t: Array, x: Any) -> tuple[Array, _Report]:
        away = _tree.subtract(_from(who, start, theta), x)
        return 0.5 * _tree.vdot(away, away), _Report(F(x, theta), x, _slope(f, x, theta))

    return _meta(who, inner, outer, start, num_steps, prepare, surrogate)


def imaml(
    inner: Callable[..., Any],
    outer: Callable[..., Any],
    *,
    num_steps: int,
    step_size: Coefficient,
    penalty: Coefficient,
    start: Callable[[Theta], X] | None = None,
    linear_solver: LinearSolver | None = None,
) -> Hypergradient[X, Theta]:
    r"""Returns implicit MAML: tasks are tied to their shared start by a proximal term, and solved.

    .. math:: x_i(\theta) = \arg\min_x f_i(x, \theta) + \tfrac\lambda2 \|x - x_0(\theta)\|^2, \quad
        (\nabla^2_{xx} f_i + \lambda I)\, v_i = \nabla_x F_i, \quad
        g = \frac1n \sum_i \lambda \Bigl(\frac{\partial x_0}{\partial \theta}\Bigr)^{\!\top} v_i
        - \nabla^2_{\theta x} f_i\, v_i + \nabla_\theta F_i

    When: inner problems that take many steps; memory does not grow with them. Assumes
    :math:`\nabla^2_{xx} f_i + \lambda I` positive definite at the solution, which a large :math:`\lambda` ensures, and
    that the steps solve the problem: look at ``info.inner_residual``.

    Args:
        inner: f, ``(x, theta, inner_data) -> scalar``, of one task; without data ``(x, theta)``. Without the proximal
            term.
        outer: F, ``(x, theta, outer_data) -> scalar``, likewise.
        num_steps: gradient steps on f and the proximal term from the start, at least 1, static.
        step_size: s > 0, a number, a schedule of the inner step, or a function of theta; below
            :math:`2 / (L + \lambda)`.
        penalty: :math:`\lambda > 0`, a number, a schedule of the update number, or a function of theta (then learned).
        start: ``theta -> x``, the part of theta that the tasks start from. None: all of it.
        linear_solver: from ``odl.linear``, for symmetric positive-definite systems. None: ``cg()``.

    Shapes: as ``maml``. ``info`` holds the largest residuals and the worst status of all tasks: ``inner_residual`` the
    gradient of the inner loss with its proximal term, ``adjoint_residual`` that of the system in v, relative.

    Raises:
        ValueError: a step size or penalty that is not positive, a count below 1; at trace time, different numbers of
            inner and outer tasks.
        TypeError: as ``maml``; a ``linear_solver`` that is none.

    Cost: num_steps gradients of f, one Hessian-vector product a step of the linear solver, one cross product and one
    gradient of F a task; memory of one step.

    Source: Rajeswaran, Finn, Kakade and Levine (2019), algorithms 1 and 2.

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> distance = lambda x, theta, goal: 0.5 * (x - goal) ** 2
        >>> hyper = odl.hypergradients.imaml(distance, distance, num_steps=30, step_size=0.4, penalty=1.0)
        >>> goals = jnp.array([1.0, 3.0])
        >>> gradient, state, info = hyper.update(0.0, hyper.init(0.0, None), goals, goals)
        >>> round(float(gradient), 4), [round(float(x), 4) for x in info.x]
        (-0.5, [0.5, 1.5])
    """
    who = "imaml"
    num_steps = count(who, "num_steps", num_steps)
    step = coefficient(who, "step_size", step_size)
    weight = coefficient(who, "penalty", penalty)
    linear_solver = cg() if linear_solver is None else linear_solver
    is_a(who, "linear_solver", linear_solver, LinearSolver, "Make one with odl.linear, for instance cg().")

    def tied(f: Loss, t: Array) -> Loss:
        def loss(x: Any, theta: Any) -> Array:
            value, away = f(x, theta), _tree.subtract(x, _from(who, start, theta))
            proximal = 0.5 * _tree.vdot(away, away)
            return value + (jnp.asarray(weight(theta, t)).astype(proximal.dtype) * proximal).astype(value.dtype)

        return loss

    def prepare(f: Loss, F: Loss, theta: Any, t: Array) -> Any:
        loss = tied(f, t)
        x = _walk(loss, step, num_steps)(_from(who, start, theta), theta).x
        slope, matvec = jax.linearize(lambda x: jax.grad(loss)(x, theta), x)
        v, linear = linear_solver(matvec, jax.grad(F)(x, theta))
        return x, v, _tree.norm(slope), linear

    def surrogate(f: Loss, F: Loss, theta: Any, t: Array, held: Any) -> tuple[Array, _Report]:
        x, v, residual, linear = held
        value, slope = F(x, theta), jax.grad(tied(f, t))(x, theta)
        report = _Report(value, x, residual, linear.residual, linear.status)
        return value - _tree.vdot(v, slope).astype(value.dtype), report

    return _meta(who, inner, outer, start, num_steps, prepare, surrogate)
