"""SAGA memories of a bilevel problem: each fixed batch remembers its gradients and products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .. import _tree
from .._checks import coefficient
from .._types import Coefficient, Theta, X
from ._directions import Directions, linearised
from ._estimator import Hypergradient, Info, Outer, both, finish, losses, pair, slope_of, start_inner, start_outer
from ._minibatches import minibatches


class Memory(NamedTuple):
    """What each batch gave when it was last seen, and the mean over the batches."""

    table: Any
    mean: Any


class SABAState(NamedTuple):
    """The inner and the adjoint iterate, the memories (None where all rows are taken), samplers and outer walk."""

    x: Any
    adjoint: Any
    inner_memory: Memory | None
    outer_memory: Memory | None
    batches: Any
    outer: Outer


def _remembered(quantities: Callable[[Array], Any], num_batches: int) -> Memory:
    table = jax.lax.map(quantities, jnp.arange(num_batches))
    return Memory(table, jax.tree.map(lambda rows: jnp.mean(rows, axis=0), table))


class _Exchange(NamedTuple):
    """A row of the memory and what replaces it, ``old + change``."""

    old: Any
    change: Any


def _exchanged(memory: Memory, batch: Array, new: Any) -> tuple[Any, _Exchange]:
    """The variance-reduced quantities, new - remembered + mean, and the exchange that the memory is to see."""
    # A branch that is always taken, which the compiler does not know, and a row that is written as old + change: read
    # and write are kept apart, and the tables stay in place. Otherwise XLA fuses the read into the write and copies all
    # of the tables at each update. A branch has a derivative in reverse mode.
    read = lambda table: jax.tree.map(  # noqa: E731
        lambda rows: jax.lax.dynamic_index_in_dim(rows, batch, keepdims=False), table
    )
    old = jax.lax.cond(batch >= 0, read, lambda _: _tree.zeros_like(new), memory.table)
    change = _tree.subtract(new, old)
    return _tree.add(change, memory.mean), _Exchange(old, change)


def _written(memory: Memory | None, batch: Any, exchange: _Exchange | None, sound: Array) -> Memory | None:
    """The memory after a sound exchange; otherwise its old row is put back, which leaves the tables in place, too."""
    if memory is None or exchange is None:
        return memory
    old, change = exchange
    num_batches = len(jax.tree.leaves(memory.table)[0])
    row = _tree.where(sound, _tree.add(old, change), old)
    mean = _tree.where(sound, _tree.add_scaled(memory.mean, 1 / num_batches, change), memory.mean)
    put = jax.lax.dynamic_update_index_in_dim
    return Memory(jax.tree.map(lambda rows, row: put(rows, row, batch, 0), memory.table, row), mean)


def saba(
    inner: Callable[..., Any],
    outer: Callable[..., Any],
    *,
    step_size: Coefficient,
    adjoint_step_size: Coefficient | None = None,
    batch_size: int | tuple[int, int] | None = None,
    key: Array | None = None,
) -> Hypergradient[X, Theta]:
    r"""Returns SABA: SOBA with SAGA memories, which takes away the noise of the minibatches as it converges.

    Each of the five quantities :math:`\nabla_x f, \nabla^2_{xx} f\, v, \nabla^2_{\theta x} f\, v, \nabla_x F,
    \nabla_\theta F`, seen on batch i, is replaced by

    .. math:: q_i(x, v, \theta) - m_i + \tfrac1B \textstyle\sum_j m_j, \qquad m_i \leftarrow q_i(x, v, \theta)

    and the three variables move as in SOBA.

    When: finite data whose memories fit, a smooth inner loss that is strongly convex in x. With constant steps, of
    theta too, it converges as the full-batch method does, linearly where that does, at the price of one minibatch.
    Without batches it is SOBA. The data must be the same at each update.

    Args:
        inner: f, ``(x, theta, inner_data) -> scalar``, the mean over the rows it gets; without data ``(x, theta)``.
        outer: F, ``(x, theta, outer_data) -> scalar``, likewise.
        step_size: a > 0, a number, a schedule of the update number, or a function of theta; constant in the source,
            at most 1/(3 L) with L the largest smoothness of a batch.
        adjoint_step_size: b > 0, likewise; None: that of x.
        batch_size: rows of an inner and an outer minibatch, or a pair; each must divide the number of rows, for the
            batches are fixed and contiguous (shuffle sorted data beforehand). None: all rows.
        key: of the draws; default ``jax.random.key(0)``.

    Raises:
        ValueError: a step size that is not positive, a batch size out of range or that does not divide the rows.
        TypeError: a loss that is no function; at trace time, a loss that is not a real scalar, data that is not a pair.

    Cost: one gradient, one Hessian-vector and one cross product of f, one gradient of F, on minibatches; ``init``
    takes them once of all batches. With :math:`B_f` inner and :math:`B_F` outer batches the state holds
    :math:`(2 B_f + B_F)` copies of x and :math:`(B_f + B_F)` of theta.
    ``info.inner_residual`` is the norm of the direction that x takes.

    Source: Dagreou, Ablin, Vaiter and Moreau (2022), algorithm 1 with SAGA directions.

    Example:
        >>> import jax, odljax as odl
        >>> p = odl.problems.finite_sum()
        >>> hyper = odl.hypergradients.saba(p.inner, p.outer, step_size=p.step_size / 3, batch_size=4)
        >>> def step(carry, _):
        ...     theta, state = carry
        ...     gradient, state, _ = hyper.update(theta, state, p.inner_data, p.outer_data)
        ...     return (theta - 0.05 * gradient, state), None
        >>> state = hyper.init(p.theta, p.x0, p.inner_data, p.outer_data)
        >>> (theta, _), _ = jax.lax.scan(step, (p.theta, state), length=1000)
        >>> bool(abs(theta - p.minimiser).max() < 1e-4)
        True
    """
    who = "saba"
    inner_loss, outer_loss = losses(who, inner, outer)
    step = coefficient(who, "step_size", step_size)
    adjoint_step = step if adjoint_step_size is None else coefficient(who, "adjoint_step_size", adjoint_step_size)
    batches = minibatches(who, batch_size, key, fixed_batches=True)

    def init(theta: Theta, x0: X, *data: Any) -> SABAState:
        x, walk = start_inner(who, theta, x0), start_outer(theta)
        v, start = _tree.zeros_like(x), walk.theta
        draws, (inner_sampler, outer_sampler) = batches.start(data), batches.samplers(data)
        inner_data, outer_data = pair(who, data)
        inner_memory = outer_memory = None
        if inner_sampler is not None:
            inner_memory = _remembered(
                lambda i: linearised(inner_loss, x, v, start, (inner_sampler.take(inner_data[0], i),)),
                inner_sampler.num_batches,
            )
        if outer_sampler is not None:
            outer_memory = _remembered(
                lambda i: both(outer_loss, x, start, (outer_sampler.take(outer_data[0], i),))[1:],
                outer_sampler.num_batches,
            )
        return SABAState(x, v, inner_memory, outer_memory, draws, walk)

    def update(theta: Theta, state: SABAState, *data: Any) -> tuple[Theta, SABAState, Info]:
        theta = _tree.strong(theta)
        x, v, t = state.x, state.adjoint, state.outer.t
        inner_batch, inner_data, draws = batches.numbered_inner(state.batches, data)
        outer_batch, outer_data, draws = batches.numbered_outer(draws, data)
        products = linearised(inner_loss, x, v, theta, inner_data)
        value, *gradients = both(outer_loss, x, theta, outer_data)
        gradients, inner_exchange, outer_exchange = tuple(gradients), None, None
        if state.inner_memory is not None:
            products, inner_exchange = _exchanged(state.inner_memory, inner_batch, products)
        if state.outer_memory is not None:
            gradients, outer_exchange = _exchanged(state.outer_memory, outer_batch, gradients)
        (slope, curvature, cross), (x_gradient, theta_gradient) = products, gradients
        adjoint, total = _tree.add(curvature, x_gradient), _tree.add(cross, theta_gradient)
        d = Directions(slope, adjoint, total, value, _tree.norm(x_gradient))
        x = _tree.add_scaled(x, -step(theta, t), d.inner)
        v = _tree.add_scaled(v, -adjoint_step(theta, t), d.adjoint)
        # Not finish's choice between two states, which would read and write all of the tables.
        sound = _tree.all_finite(jax.lax.stop_gradient((x, v, inner_exchange, outer_exchange, theta)))
        inner_memory = _written(state.inner_memory, inner_batch, inner_exchange, sound)
        outer_memory = _written(state.outer_memory, outer_batch, outer_exchange, sound)
        return finish(
            who, d.outer, theta, state, SABAState(x, v, inner_memory, outer_memory, draws, state.outer),
            sound=sound, settled=("inner_memory", "outer_memory"),
            value=d.value, x=x, inner_residual=_tree.norm(d.inner), adjoint_residual=d.residual,
        )  # fmt: skip

    return Hypergradient(init, update, who, slope_of(who, inner, outer))
