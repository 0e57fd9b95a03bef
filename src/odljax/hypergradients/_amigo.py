"""Some inner steps, some adjoint steps, one gradient: the adjoint warm-started, or a truncated Neumann series."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array

from .. import _tree
from .._checks import coefficient, count
from .._types import Coefficient, Theta, X
from ._directions import Point, implicit_directions, inner_walk
from ._estimator import Hypergradient, Info, Outer, finish, losses, slope_of, start_inner, start_outer
from ._minibatches import minibatches


class AmIGOState(NamedTuple):
    """The inner and the adjoint iterate (None without warm start), the samplers and the outer walk."""

    x: Any
    adjoint: Any
    batches: Any
    outer: Outer


def _double_loop(
    who: str, inner: Any, outer: Any, step_size: Any, adjoint_step_size: Any, *,
    num_steps: Any, num_adjoint_steps: Any, batch_size: Any, fixed_batches: Any, key: Any, warm_adjoint: bool,
) -> Hypergradient[Any, Any]:  # fmt: skip
    inner_loss, outer_loss = losses(who, inner, outer)
    step = coefficient(who, "step_size", step_size)
    adjoint_step = step if adjoint_step_size is None else coefficient(who, "adjoint_step_size", adjoint_step_size)
    num_steps = count(who, "num_steps", num_steps)
    num_adjoint_steps = count(who, "num_adjoint_steps", num_adjoint_steps)
    batches = minibatches(who, batch_size, key, fixed_batches=fixed_batches)

    def init(theta: Any, x0: Any, *data: Any) -> AmIGOState:
        x = start_inner(who, theta, x0)
        return AmIGOState(x, _tree.zeros_like(x) if warm_adjoint else None, batches.start(data), start_outer(theta))

    def update(theta: Any, state: AmIGOState, *data: Any) -> tuple[Any, AmIGOState, Info]:
        t = state.outer.t
        x, draws = inner_walk(inner_loss, batches, state.x, theta, state.batches, data, step(theta, t), num_steps)
        (d,), (v,), draws = implicit_directions(
            inner_loss, outer_loss, batches, (Point(x, theta),), draws, data,
            step=adjoint_step(theta, t), num_steps=num_adjoint_steps, warm=state.adjoint,
        )  # fmt: skip
        new = AmIGOState(x, v if warm_adjoint else None, draws, state.outer)
        return finish(
            who, d.outer, theta, state, new, value=d.value, x=x,
            inner_residual=_tree.norm(d.inner), adjoint_residual=d.residual, num_steps=num_steps,
        )  # fmt: skip

    return Hypergradient(init, update, who, slope_of(who, inner, outer))


def amigo(
    inner: Callable[..., Any],
    outer: Callable[..., Any],
    *,
    step_size: Coefficient,
    adjoint_step_size: Coefficient | None = None,
    num_steps: int = 10,
    num_adjoint_steps: int = 10,
    batch_size: int | tuple[int, int] | None = None,
    fixed_batches: bool = False,
    key: Array | None = None,
) -> Hypergradient[X, Theta]:
    r"""Returns AmIGO: K inner and J adjoint steps from where the last update left them, then the gradient.

    .. math:: x &\mathrel{-}= a \nabla_x f(x, \theta) \quad (K \text{ times}), \qquad
        v \mathrel{-}= b\,(\nabla^2_{xx} f\, v + \nabla_x F) \quad (J \text{ times, at the new } x) \\
        g &= \nabla^2_{\theta x} f\, v + \nabla_\theta F

    with a fresh inner minibatch for each step and for g, and one outer minibatch for all of :math:`\nabla F`.

    When: large data, a smooth inner loss that is strongly convex in x. Both warm starts carry over what was learned, so
    that few steps do. With constant steps and minibatches it ends at a noise floor proportional to them; without
    batches it converges linearly to the minimiser, whatever K and J.

    Args:
        inner: f, ``(x, theta, inner_data) -> scalar``, the mean over the rows it gets; without data ``(x, theta)``.
        outer: F, ``(x, theta, outer_data) -> scalar``, likewise.
        step_size: a > 0, a number, a schedule of the update number, or a function of theta; below 2/L, constant in
            the source.
        adjoint_step_size: b > 0, likewise; None: that of x.
        num_steps: K, at least 1.
        num_adjoint_steps: J, at least 1.
        batch_size: rows of an inner and an outer minibatch, at least 1, or a pair. None: all rows.
        fixed_batches: draw one of the n / b contiguous batches of b rows instead of rows from everywhere: memory is
            read in one piece, which is some times faster where a minibatch is small. b must divide n; shuffle sorted
            data beforehand.
        key: of the draws; default ``jax.random.key(0)``.

    Raises:
        ValueError: a step size that is not positive, a count or batch size out of range.
        TypeError: a loss that is no function; at trace time, a loss that is not a real scalar, data that is not a pair.

    Cost: K + 1 gradients, J + 1 Hessian-vector products and one cross product of f, one gradient of F, on minibatches;
    the state holds x and v.

    Source: Arbel and Mairal (2022), algorithm 1 with SGD for both systems.

    Example:
        >>> import jax, odljax as odl
        >>> hyper = odl.hypergradients.amigo(
        ...     lambda x, theta: 0.5 * (x - theta) ** 2, lambda x, theta: 0.5 * (x - 1.0) ** 2, step_size=0.5)
        >>> theta, state, update = 0.0, hyper.init(0.0, 0.0), jax.jit(hyper.update)
        >>> for _ in range(50):
        ...     gradient, state, info = update(theta, state)
        ...     theta = theta - 0.2 * gradient
        >>> round(float(theta), 3)
        1.0
    """
    return _double_loop(
        "amigo", inner, outer, step_size, adjoint_step_size,
        num_steps=num_steps, num_adjoint_steps=num_adjoint_steps, batch_size=batch_size,
        fixed_batches=fixed_batches, key=key, warm_adjoint=True,
    )  # fmt: skip


def stocbio(
    inner: Callable[..., Any],
    outer: Callable[..., Any],
    *,
    step_size: Coefficient,
    adjoint_step_size: Coefficient | None = None,
    num_steps: int = 10,
    num_adjoint_steps: int = 10,
    batch_size: int | tuple[int, int] | None = None,
    fixed_batches: bool = False,
    key: Array | None = None,
) -> Hypergradient[X, Theta]:
    r"""Returns StocBiO: K warm-started inner steps, then a Neumann series of Q stochastic Hessian products.

    .. math:: x \mathrel{-}= a \nabla_x f(x, \theta) \quad (K \text{ times}), \qquad
        v = -b \sum_{q=0}^{Q} \prod_{j=1}^{q} (I - b \nabla^2_{xx} f_j)\, \nabla_x F, \qquad
        g = \nabla^2_{\theta x} f\, v + \nabla_\theta F

    with a fresh inner minibatch for each step, each factor and g, and one outer minibatch.

    When: large data, a smooth inner loss that is strongly convex in x. Besides the noise floor of constant steps it
    has a bias that no step size takes away: :math:`v` misses :math:`(I - b H)^{Q+1}` of the adjoint, at most
    :math:`(1 - b \mu)^{Q+1}` of its size.

    Args:
        inner: f, ``(x, theta, inner_data) -> scalar``, the mean over the rows it gets; without data ``(x, theta)``.
        outer: F, ``(x, theta, outer_data) -> scalar``, likewise.
        step_size: a > 0, a number, a schedule of the update number, or a function of theta; below 2/L, constant in
            the source.
        adjoint_step_size: b > 0, likewise, below 2/L; None: that of x.
        num_steps: K, at least 1.
        num_adjoint_steps: Q, at least 1; of the order of the condition number times the digits wanted.
        batch_size: rows of an inner and an outer minibatch, at least 1, or a pair. None: all rows.
        fixed_batches: draw one of the n / b contiguous batches of b rows instead of rows from everywhere: memory is
            read in one piece, which is some times faster where a minibatch is small. b must divide n; shuffle sorted
            data beforehand.
        key: of the draws; default ``jax.random.key(0)``.

    Raises:
        ValueError: a step size that is not positive, a count or batch size out of range.
        TypeError: a loss that is no function; at trace time, a loss that is not a real scalar, data that is not a pair.

    Cost: K + 1 gradients, Q + 1 Hessian-vector products and one cross product of f, one gradient of F, on minibatches;
    the state holds x.

    Source: Ji, Yang and Liang (2021), algorithms 2 and 3; the sum is built from its inside out, so that the
    factors of the q-th product are the last drawn, not the first; the minibatches all have one size.

    Example:
        >>> import jax, odljax as odl
        >>> hyper = odl.hypergradients.stocbio(
        ...     lambda x, theta: 0.5 * (x - theta) ** 2, lambda x, theta: 0.5 * (x - 1.0) ** 2, step_size=0.5)
        >>> theta, state, update = 0.0, hyper.init(0.0, 0.0), jax.jit(hyper.update)
        >>> for _ in range(50):
        ...     gradient, state, info = update(theta, state)
        ...     theta = theta - 0.2 * gradient
        >>> round(float(theta), 3)
        1.0
    """
    return _double_loop(
        "stocbio", inner, outer, step_size, adjoint_step_size,
        num_steps=num_steps, num_adjoint_steps=num_adjoint_steps, batch_size=batch_size,
        fixed_batches=fixed_batches, key=key, warm_adjoint=False,
    )  # fmt: skip
