"""Inner, adjoint and outer variable one after the other, the outer direction with a recursive momentum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array

from .. import _tree
from .._checks import coefficient
from .._types import Coefficient, Theta, X
from ._directions import cross_product, first_fresh, hessian_product, storm
from ._estimator import Hypergradient, Info, Outer, finish, losses, relative, slope_of, start_inner, start_outer
from ._minibatches import minibatches


class FSLAState(NamedTuple):
    """The inner and the adjoint iterate, the outer direction, the samplers and the outer walk."""

    x: Any
    adjoint: Any
    memory: Any
    batches: Any
    outer: Outer


def fsla(
    inner: Callable[..., Any],
    outer: Callable[..., Any],
    *,
    step_size: Coefficient,
    adjoint_step_size: Coefficient | None = None,
    momentum: Coefficient | None = None,
    batch_size: int | tuple[int, int] | None = None,
    fixed_batches: bool = False,
    key: Array | None = None,
) -> Hypergradient[X, Theta]:
    r"""Returns FSLA: an inner step, an adjoint step at the new x, then the gradient with a recursive momentum.

    .. math:: x_{t+1} &= x_t - a \nabla_x f(x_t, \theta_t), \quad
        v_{t+1} = v_t - b\,(\nabla^2_{xx} f\, v_t + \nabla_x F)(x_{t+1}, \theta_t) \\
        d_t &= g(x_{t+1}, v_{t+1}, \theta_t) + (1 - \eta)\,(d_{t-1} - g(x_t, v_t, \theta_{t-1})), \quad
        g = \nabla^2_{\theta x} f\, v + \nabla_\theta F

    each line on minibatches of its own, both g on the same; the gradient is :math:`d_t`, and :math:`d_0 = g`.

    When: large data, a smooth inner loss that is strongly convex in x. The momentum takes noise from the direction of
    theta, not from those of x and v: with constant steps it ends at a noise floor; the source lets all steps decay
    like :math:`t^{-1/2}`. Without batches it is a deterministic single loop, which converges linearly.

    Args:
        inner: f, ``(x, theta, inner_data) -> scalar``, the mean over the rows it gets; without data ``(x, theta)``.
        outer: F, ``(x, theta, outer_data) -> scalar``, likewise.
        step_size: a > 0, a number, a schedule of the update number, or a function of theta; below 2/L.
        adjoint_step_size: b > 0, likewise; None: that of x.
        momentum: eta, the weight of the fresh gradient, in (0, 1], likewise; 1 forgets the past. None: that of x,
            which must then be at most 1.
        batch_size: rows of an inner and an outer minibatch, at least 1, or a pair. None: all rows.
        fixed_batches: draw one of the n / b contiguous batches of b rows instead of rows from everywhere: memory is
            read in one piece, which is some times faster where a minibatch is small. b must divide n; shuffle sorted
            data beforehand.
        key: of the draws; default ``jax.random.key(0)``.

    Raises:
        ValueError: a coefficient or a batch size out of range.
        TypeError: a loss that is no function; at trace time, a loss that is not a real scalar, data that is not a pair.

    Cost: one gradient, one Hessian-vector and two cross products of f, three gradients of F, on minibatches; the state
    holds x, v and one copy of theta.

    Source: Li, Gu and Huang (2022), algorithm 1; the memory starts from the first gradient.

    Example:
        >>> import jax, odljax as odl
        >>> hyper = odl.hypergradients.fsla(
        ...     lambda x, theta: 0.5 * (x - theta) ** 2, lambda x, theta: 0.5 * (x - 1.0) ** 2, step_size=0.5)
        >>> theta, state, update = 0.0, hyper.init(0.0, 0.0), jax.jit(hyper.update)
        >>> for _ in range(100):
        ...     gradient, state, info = update(theta, state)
        ...     theta = theta - 0.1 * gradient
        >>> round(float(theta), 3)
        1.0
    """
    who = "fsla"
    inner_loss, outer_loss = losses(who, inner, outer)
    step = coefficient(who, "step_size", step_size)
    adjoint_step = step if adjoint_step_size is None else coefficient(who, "adjoint_step_size", adjoint_step_size)
    weight, name = (step_size, "step_size, here the momentum too,") if momentum is None else (momentum, "momentum")
    fresh = coefficient(who, name, weight, high=1 + 1e-9)
    batches = minibatches(who, batch_size, key, fixed_batches=fixed_batches)

    def init(theta: Theta, x0: X, *data: Any) -> FSLAState:
        x, walk = start_inner(who, theta, x0), start_outer(theta)
        return FSLAState(x, _tree.zeros_like(x), _tree.zeros_like(walk.theta), batches.start(data), walk)

    def update(theta: Theta, state: FSLAState, *data: Any) -> tuple[Theta, FSLAState, Info]:
        theta = _tree.strong(theta)
        t, draws = state.outer.t, state.batches
        rows, draws = batches.inner(draws, data)
        slope = jax.grad(inner_loss)(state.x, theta, *rows)
        x = _tree.add_scaled(state.x, -step(theta, t), slope)

        rows, draws = batches.inner(draws, data)
        outer_rows, draws = batches.outer(draws, data)
        x_gradient = jax.grad(outer_loss)(x, theta, *outer_rows)
        adjoint = _tree.add(hessian_product(inner_loss, x, state.adjoint, theta, rows), x_gradient)
        v = _tree.add_scaled(state.adjoint, -adjoint_step(theta, t), adjoint)

        rows, draws = batches.inner(draws, data)
        outer_rows, draws = batches.outer(draws, data)
        value, partial = jax.value_and_grad(outer_loss, argnums=1)(x, theta, *outer_rows)
        last = (state.x, state.adjoint, state.outer.theta)
        old_partial = jax.grad(outer_loss, argnums=1)(state.x, state.outer.theta, *outer_rows)
        new = _tree.add(cross_product(inner_loss, x, v, theta, rows), partial)
        old = _tree.add(cross_product(inner_loss, *last, rows), old_partial)
        memory = storm(state.memory, new, old, first_fresh(fresh(theta, t), t))
        return finish(
            who, memory, theta, state, FSLAState(x, v, memory, draws, state.outer),
            value=value, x=x, inner_residual=_tree.norm(slope),
            adjoint_residual=relative(_tree.norm(adjoint), _tree.norm(x_gradient)),
        )  # fmt: skip

    return Hypergradient(init, update, who, slope_of(who, inner, outer))
