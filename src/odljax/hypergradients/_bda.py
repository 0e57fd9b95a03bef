"""Bilevel descent aggregation: HODL's walk on a smooth inner loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from .. import _tree
from .._checks import coefficient, count, differentiable, is_callable
from .._types import Coefficient, State, Step, Theta, X
from ..derivatives import unrolled
from ..iterations import aggregate, gradient_descent
from ..iterations._aggregation import outer_unit
from ..solvers import for_steps
from ._estimator import (
    Hypergradient,
    Info,
    WalkState,
    conclude,
    keep_finite,
    losses,
    of_theta,
    pair,
    slope_of,
    start_outer,
)
from ._start import first_start, started


def _decaying(k: Step) -> Any:
    return 0.5 / (k.astype(float) + 1.0)


def bda(
    inner: Callable[..., Any],
    outer: Callable[..., Any],
    *,
    num_steps: int,
    step_size: Coefficient,
    outer_step_size: Coefficient | None = None,
    weight: Coefficient = _decaying,
    warm_start: bool = False,
    checkpoint_every: int | None = None,
    start: Callable[[Theta], X] | None = None,
) -> Hypergradient[X, Theta]:
    r"""Returns BDA: inner steps along a mean of both gradients, differentiated through all of them.

    .. math:: x_{k+1} = x_k - \alpha_k s_k \nabla_x F(x_k, \theta) - (1 - \alpha_k) \gamma_k \nabla_x f(x_k, \theta),
        \qquad g = \frac{d}{d\theta} F(x_K(\theta), \theta)

    ``hodl(gradient_descent(inner, step_size), outer, relaxation=1.0, weight=..., step_size=outer_step_size)``, as an
    estimator of two losses.

    When: the inner problem is smooth and convex and its solution is not unique, so that the outer loss must choose.
    Assumes :math:`\alpha_k \to 0` with a divergent sum of :math:`\alpha_k s_k`, and steps below the inverse Lipschitz
    constants of the gradients. For another operator, a metric, a projection or relaxation: ``hodl``.

    Args:
        inner: f, ``(x, theta, inner_data) -> scalar``; without data ``(x, theta)``.
        outer: F, ``(x, theta, outer_data) -> scalar``, likewise.
        num_steps: K, at least 1, static.
        step_size: :math:`\gamma_k > 0`, the step on f.
        outer_step_size: :math:`s_k`, at least 0, the step on F. None: 1/L, the inverse Lipschitz constant of
            :math:`\nabla_x F` at the start of the update, found as in ``hodl``: a multiple of F changes nothing.
        weight: :math:`\alpha_k` in [0, 1); default 0.5/(k + 1).
        warm_start: start each update from the last inner solution instead of x0.
        checkpoint_every: as in ``unrolled``.
        start: ``theta -> x``, a learned start through which the gradient goes as well; x0 may then be None.

    Each coefficient is a number, a schedule of k, a function of theta, or of (theta, k).

    Raises:
        ValueError: a coefficient outside its range, a step count below 1, a learned start with a warm start.
        TypeError: a loss that is no function; at trace time, a loss that is not a real scalar, data that is not a pair.

    Cost: num_steps gradients of each loss, forward and backward; memory num_steps times what one step needs, or that
    of segments.

    Source: Liu, Mu, Yuan, Zeng and Zhang (2020), arXiv 2006.04045, algorithm 1.

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> inner = lambda x, theta: 0.5 * (x[0] - theta) ** 2  # x[1] is free
        >>> outer = lambda x, theta: 0.5 * (x[1] - theta) ** 2 + 0.5 * (x[0] - 1.0) ** 2
        >>> hyper = odl.hypergradients.bda(inner, outer, num_steps=50, step_size=0.5)
        >>> gradient, state, info = hyper.update(0.5, hyper.init(0.5, jnp.zeros(2)))
        >>> int(info.num_steps), bool(gradient < 0)
        (50, True)
    """
    who = "bda"
    inner_loss, outer_loss = losses(who, inner, outer)
    num_steps = count(who, "num_steps", num_steps)
    coefficient(who, "step_size", step_size)
    coefficient(who, "weight", weight, high=1.0, closed=True)
    if outer_step_size is not None:
        coefficient(who, "outer_step_size", outer_step_size, closed=True)
    if checkpoint_every is not None:
        count(who, "checkpoint_every", checkpoint_every)
    if start is not None:
        is_callable(who, "start", start, "theta")
        if warm_start:
            raise ValueError(
                "bda: warm_start begins at the last solution, start at what theta says; both came. Drop one of them."
            )

    def init(theta: Theta, x0: X, *data: Any) -> WalkState:
        pair(who, data)
        differentiable(who, theta)
        return WalkState(first_start(who, start, x0), start_outer(theta))

    def update(theta: Theta, state: WalkState, *data: Any) -> tuple[Theta, State, Info]:
        inner_data, outer_data = pair(who, data)
        below = lambda x, theta: inner_loss(x, theta, *inner_data)  # noqa: E731
        above = lambda x, theta: outer_loss(x, theta, *outer_data)  # noqa: E731
        descent = gradient_descent(below, step_size)
        s = outer_step_size
        if s is None:
            at = started(who, start, theta, state.x)
            unit = outer_unit(who, descent, above, None, at, theta)
            s = lambda k: unit  # noqa: E731
        walk = aggregate(descent, above, weight=weight, step_size=s)
        solver = unrolled(for_steps(walk, num_steps), checkpoint_every=checkpoint_every, on_failure="ignore")

        def value_of(theta: Theta) -> Any:
            x = solver(started(who, start, theta, state.x), theta).x
            return above(x, theta), x

        (value, x), gradient = jax.value_and_grad(value_of, has_aux=True)(theta)
        gradient, outer_walk, info = conclude(
            who, gradient, theta, state.outer,
            value=value, x=x, inner_residual=_tree.norm(jax.grad(below)(x, theta)), num_steps=num_steps,
        )  # fmt: skip
        kept = keep_finite(x, state.x) if warm_start else state.x
        return gradient, WalkState(kept, outer_walk), info

    others = (start, *map(of_theta, (step_size, weight, outer_step_size)))
    return Hypergradient(init, update, who, slope_of(who, inner, outer, *others))
