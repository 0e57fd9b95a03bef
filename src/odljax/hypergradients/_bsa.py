"""Hypergradients whose adjoint is a Neumann series of random length: unbiased for the series, noisy for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array

from .. import _tree
from .._checks import coefficient, count
from .._types import Coefficient, Theta, X
from ._directions import Point, implicit_directions, inner_walk, own_key, truncation_length
from ._estimator import Hypergradient, Info, Outer, finish, losses, slope_of, start_inner, start_outer
from ._minibatches import minibatches


class BSAState(NamedTuple):
    """The inner iterate, the key of the lengths, the samplers and the outer walk."""

    x: Any
    key: Array
    batches: Any
    outer: Outer


def _randomly_truncated(
    who: str, inner: Any, outer: Any, step_size: Any, adjoint_step_size: Any, num_steps: Any, num_terms: Any,
    batch_size: Any, fixed_batches: Any, key: Any,
) -> Hypergradient[Any, Any]:  # fmt: skip
    inner_loss, outer_loss = losses(who, inner, outer)
    step = coefficient(who, "step_size", step_size)
    adjoint_step = step if adjoint_step_size is None else coefficient(who, "adjoint_step_size", adjoint_step_size)
    num_steps, num_terms = count(who, "num_steps", num_steps), count(who, "num_terms", num_terms)
    batches = minibatches(who, batch_size, key, fixed_batches=fixed_batches)

    def init(theta: Any, x0: Any, *data: Any) -> BSAState:
        x = start_inner(who, theta, x0)
        return BSAState(x, own_key(key), batches.start(data), start_outer(theta))

    def update(theta: Any, state: BSAState, *data: Any) -> tuple[Any, BSAState, Info]:
        t = state.outer.t
        length, next_key = truncation_length(state.key, num_terms)
        x, draws = inner_walk(inner_loss, batches, state.x, theta, state.batches, data, step(theta, t), num_steps)
        (d,), _, draws = implicit_directions(
            inner_loss, outer_loss, batches, (Point(x, theta),), draws, data,
            step=adjoint_step(theta, t), num_steps=num_terms, truncation=length,
        )  # fmt: skip
        return finish(
            who, d.outer, theta, state, BSAState(x, next_key, draws, state.outer), value=d.value, x=x,
            inner_residual=_tree.norm(d.inner), adjoint_residual=d.residual, num_steps=num_steps,
        )  # fmt: skip

    return Hypergradient(init, update, who, slope_of(who, inner, outer))


def bsa(
    inner: Callable[..., Any],
    outer: Callable[..., Any],
    *,
    step_size: Coefficient,
    adjoint_step_size: Coefficient | None = None,
    num_steps: int = 10,
    num_terms: int = 10,
    batch_size: int | tuple[int, int] | None = None,
    fixed_batches: bool = False,
    key: Array | None = None,
) -> Hypergradient[X, Theta]:
    r"""Returns BSA: K inner steps, then a Neumann series cut at a random length, which stands for N of its terms.

    .. math:: x \mathrel{-}= a \nabla_x f(x, \theta) \quad (K \text{ times}), \qquad
        v = -N b \prod_{j=1}^{q} (I - b \nabla^2_{xx} f_j)\, \nabla_x F, \quad q \sim U\{0, \dots, N - 1\}, \qquad
        g = \nabla^2_{\theta x} f\, v + \nabla_\theta F

    with a fresh inner minibatch for each step, each factor and g, and one outer minibatch.

    When: the classical method, to compare with. The mean of v over q is the N-term series, so that its bias is at most
    :math:`(1 - b \mu)^N` of the adjoint for :math:`b \le 2 / (L + \mu)`, for about N/2 products; but
    the length makes it noisy even without minibatches, and
    ``info.adjoint_residual`` is large. The source lets the inner and the outer step decay like
    :math:`t^{-1/2}`: pass ``step_size=lambda k: a / (k + 1) ** 0.5``.

    Args:
        inner: f, ``(x, theta, inner_data) -> scalar``, the mean over the rows it gets; without data ``(x, theta)``.
        outer: F, ``(x, theta, outer_data) -> scalar``, likewise.
        step_size: a > 0, a number, a schedule of the update number, or a function of theta; below 2/L.
        adjoint_step_size: b > 0, likewise, at most 1/L, constant in the source; None: that of x.
        num_steps: K, at least 1.
        num_terms: N, at least 1.
        batch_size: rows of an inner and an outer minibatch, at least 1, or a pair. None: all rows.
        fixed_batches: draw one of the n / b contiguous batches of b rows instead of rows from everywhere: memory is
            read in one piece, which is some times faster where a minibatch is small. b must divide n; shuffle sorted
            data beforehand.
        key: of the draws and the lengths; default ``jax.random.key(0)``.

    Raises:
        ValueError: a step size that is not positive, a count or batch size out of range.
        TypeError: a loss that is no function; at trace time, a loss that is not a real scalar, data that is not a pair.

    Cost: K + 1 gradients, q + 1 Hessian-vector products and one cross product of f, one gradient of F, on minibatches;
    under ``vmap`` N in place of q, in reverse mode N + 1 adjoints stored; the state holds x.

    Source: Ghadimi and Wang (2018), algorithms 2 and 3; the inner iterate is carried on, and K does not grow.

    Example:
        >>> import jax, odljax as odl
        >>> hyper = odl.hypergradients.bsa(
        ...     lambda x, theta: 0.5 * (x - theta) ** 2, lambda x, theta: 0.5 * (x - 1.0) ** 2, step_size=0.5)
        >>> theta, state, update = 0.0, hyper.init(0.0, 0.0), jax.jit(hyper.update)
        >>> for _ in range(300):
        ...     gradient, state, info = update(theta, state)
        ...     theta = theta - 0.05 * gradient
        >>> bool(abs(theta - 1) < 1e-3)
        True
    """
    return _randomly_truncated(
        "bsa", inner, outer, step_size, adjoint_step_size, num_steps, num_terms, batch_size, fixed_batches, key
    )


def ttsa(
    inner: Callable[..., Any],
    outer: Callable[..., Any],
    *,
    step_size: Coefficient,
    adjoint_step_size: Coefficient | None = None,
    num_terms: int = 10,
    batch_size: int | tuple[int, int] | None = None,
    fixed_batches: bool = False,
    key: Array | None = None,
) -> Hypergradient[X, Theta]:
    r"""Returns TTSA: one inner step, then the randomly cut Neumann series at the new x; the two time scales differ.

    .. math:: x \mathrel{-}= a_t \nabla_x f(x, \theta), \qquad
        v = -N b \prod_{j=1}^{q} (I - b \nabla^2_{xx} f_j)\, \nabla_x F, \quad q \sim U\{0, \dots, N - 1\}, \qquad
        g = \nabla^2_{\theta x} f\, v + \nabla_\theta F

    with a fresh inner minibatch for the step, each factor and g, and one outer minibatch.

    When: as ``bsa``, which takes more inner steps; here x keeps up because theta moves ever more slowly than x. The
    source lets the inner step decay like :math:`t^{-2/5}` and the outer one like :math:`t^{-3/5}`: pass
    ``step_size=lambda k: a / (k + 1) ** 0.4``, and a number as ``adjoint_step_size``.

    Args:
        inner: f, ``(x, theta, inner_data) -> scalar``, the mean over the rows it gets; without data ``(x, theta)``.
        outer: F, ``(x, theta, outer_data) -> scalar``, likewise.
        step_size: a > 0, a number, a schedule of the update number, or a function of theta; below 2/L.
        adjoint_step_size: b > 0, likewise, at most 1/L, constant in the source; None: that of x.
        num_terms: N, at least 1.
        batch_size: rows of an inner and an outer minibatch, at least 1, or a pair. None: all rows.
        fixed_batches: draw one of the n / b contiguous batches of b rows instead of rows from everywhere: memory is
            read in one piece, which is some times faster where a minibatch is small. b must divide n; shuffle sorted
            data beforehand.
        key: of the draws and the lengths; default ``jax.random.key(0)``.

    Raises:
        ValueError: a step size that is not positive, a count or batch size out of range.
        TypeError: a loss that is no function; at trace time, a loss that is not a real scalar, data that is not a pair.

    Cost: two gradients, q + 1 Hessian-vector products and one cross product of f, one gradient of F, on minibatches;
    under ``vmap`` N in place of q, in reverse mode N + 1 adjoints stored; the state holds x.

    Source: Hong, Wai, Wang and Yang (2023), algorithm 1.

    Example:
        >>> import jax, odljax as odl
        >>> hyper = odl.hypergradients.ttsa(
        ...     lambda x, theta: 0.5 * (x - theta) ** 2, lambda x, theta: 0.5 * (x - 1.0) ** 2, step_size=0.5)
        >>> theta, state, update = 0.0, hyper.init(0.0, 0.0), jax.jit(hyper.update)
        >>> for _ in range(300):
        ...     gradient, state, info = update(theta, state)
        ...     theta = theta - 0.05 * gradient
        >>> bool(abs(theta - 1) < 1e-3)
        True
    """
    return _randomly_truncated(
        "ttsa", inner, outer, step_size, adjoint_step_size, 1, num_terms, batch_size, fixed_batches, key
    )
