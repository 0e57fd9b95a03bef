"""STORM momentum on the inner and on the outer direction, whose adjoint is a stochastic Neumann series."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array

from .. import _tree
from .._checks import coefficient, count
from .._types import Coefficient, Step, Theta, X
from ._directions import Point, first_fresh, implicit_directions, own_key, storm, truncation_length
from ._estimator import Hypergradient, Info, Outer, finish, losses, slope_of, start_inner, start_outer
from ._minibatches import minibatches


class STORMState(NamedTuple):
    """The inner iterate, the one before, both directions there, the key of the lengths, samplers and outer walk."""

    x: Any
    last_x: Any
    memory: Any
    key: Array
    batches: Any
    outer: Outer


def _decaying(k: Step) -> Any:
    return 0.5 / (k.astype(float) + 1.0) ** (2 / 3)


def _double_momentum(
    who: str, inner: Any, outer: Any, step_size: Any, adjoint_step_size: Any, momentum: Any,
    length_name: str, length: Any, batch_size: Any, fixed_batches: Any, key: Any, random_length: bool,
) -> Hypergradient[Any, Any]:  # fmt: skip
    inner_loss, outer_loss = losses(who, inner, outer)
    step = coefficient(who, "step_size", step_size)
    adjoint_step = step if adjoint_step_size is None else coefficient(who, "adjoint_step_size", adjoint_step_size)
    fresh = coefficient(who, "momentum", momentum, high=1 + 1e-9)
    num_adjoint_steps = count(who, length_name, length)
    batches = minibatches(who, batch_size, key, fixed_batches=fixed_batches)

    def init(theta: Any, x0: Any, *data: Any) -> STORMState:
        x, walk = start_inner(who, theta, x0), start_outer(theta)
        memory = (_tree.zeros_like(x), _tree.zeros_like(walk.theta))  # forgotten by the first update
        return STORMState(x, x, memory, own_key(key), batches.start(data), walk)

    def update(theta: Any, state: STORMState, *data: Any) -> tuple[Any, STORMState, Info]:
        theta = _tree.strong(theta)
        x, t, next_key, truncation = state.x, state.outer.t, state.key, None
        if random_length:
            truncation, next_key = truncation_length(state.key, num_adjoint_steps)
        (new, old), _, draws = implicit_directions(
            inner_loss, outer_loss, batches, (Point(x, theta), Point(state.last_x, state.outer.theta)),
            state.batches, data, step=adjoint_step(theta, t), num_steps=num_adjoint_steps, truncation=truncation,
        )  # fmt: skip
        weight = first_fresh(fresh(theta, t), t)
        memory = storm(state.memory, (new.inner, new.outer), (old.inner, old.outer), weight)
        new_x = _tree.add_scaled(x, -step(theta, t), memory[0])
        return finish(
            who, memory[1], theta, state, STORMState(new_x, x, memory, next_key, draws, state.outer),
            value=new.value, x=new_x,
            inner_residual=_tree.norm(memory[0]), adjoint_residual=new.residual,
        )  # fmt: skip

    return Hypergradient(init, update, who, slope_of(who, inner, outer))


def sustain(
    inner: Callable[..., Any],
    outer: Callable[..., Any],
    *,
    step_size: Coefficient,
    adjoint_step_size: Coefficient | None = None,
    momentum: Coefficient = _decaying,
    num_terms: int = 10,
    batch_size: int | tuple[int, int] | None = None,
    fixed_batches: bool = False,
    key: Array | None = None,
) -> Hypergradient[X, Theta]:
    r"""Returns SUSTAIN: STORM momentum on both directions, the adjoint a Neumann series of random length.

    .. math:: u_t &= \nabla_x f(z_t) + (1 - \eta_t)(u_{t-1} - \nabla_x f(z_{t-1})), \quad
        d_t = g(z_t) + (1 - \eta_t)(d_{t-1} - g(z_{t-1})) \\
        g &= \nabla^2_{\theta x} f\, v + \nabla_\theta F, \quad
        v = -N b \prod_{j=1}^{q} (I - b \nabla^2_{xx} f_j)\, \nabla_x F, \quad q \sim U\{0, \dots, N - 1\}

    with :math:`z = (x, \theta)`, old and new point on the same minibatches and with the same q; x moves by
    :math:`-a u_t`, the gradient is :math:`d_t`, and the memories start from the first gradients.

    When: large data, a smooth inner loss that is strongly convex in x; near-optimal in expectation, where all steps
    decay like :math:`t^{-1/3}`: pass ``step_size=lambda k: a / (k + 1) ** (1 / 3)``, a number as
    ``adjoint_step_size``. The series has a bias of at most :math:`(1 - b \mu)^N` of the adjoint for
    :math:`b \le 2 / (L + \mu)`, and its random length makes noise even without minibatches.

    Args:
        inner: f, ``(x, theta, inner_data) -> scalar``, the mean over the rows it gets; without data ``(x, theta)``.
        outer: F, ``(x, theta, outer_data) -> scalar``, likewise.
        step_size: a > 0, a number, a schedule of the update number, or a function of theta; below 2/L.
        adjoint_step_size: b > 0, likewise, at most 1/L, constant in the source; None: that of x.
        momentum: eta, the weight of the fresh gradient, in (0, 1], likewise; 1 forgets the past. Default
            :math:`0.5\,(t + 1)^{-2/3}`.
        num_terms: N, at least 1.
        batch_size: rows of an inner and an outer minibatch, at least 1, or a pair. None: all rows.
        fixed_batches: draw one of the n / b contiguous batches of b rows instead of rows from everywhere: memory is
            read in one piece, which is some times faster where a minibatch is small. b must divide n; shuffle sorted
            data beforehand.
        key: of the draws and the lengths; default ``jax.random.key(0)``.

    Raises:
        ValueError: a coefficient, a count or a batch size out of range.
        TypeError: a loss that is no function; at trace time, a loss that is not a real scalar, data that is not a pair.

    Cost: two gradients, 2 (q + 1) Hessian-vector and two cross products of f, two gradients of F, on minibatches;
    under ``vmap`` N in place of q, in reverse mode 2 (N + 1) adjoints stored; the state holds three copies of x and one
    of theta.
    ``info.inner_residual`` is the norm of the direction that x takes.

    Source: Khanduri, Zeng, Hong, Wai, Wang and Yang (2021), algorithm 1; one momentum for both directions, and the
    inner gradient shares the minibatch of the cross product.

    Example:
        >>> import jax, odljax as odl
        >>> hyper = odl.hypergradients.sustain(
        ...     lambda x, theta: 0.5 * (x - theta) ** 2, lambda x, theta: 0.5 * (x - 1.0) ** 2, step_size=0.5)
        >>> theta, state, update = 0.0, hyper.init(0.0, 0.0), jax.jit(hyper.update)
        >>> for _ in range(300):
        ...     gradient, state, info = update(theta, state)
        ...     theta = theta - 0.02 * gradient
        >>> bool(abs(theta - 1) < 0.1)
        True
    """
    return _double_momentum(
        "sustain",
        inner,
        outer,
        step_size,
        adjoint_step_size,
        momentum,
        "num_terms",
        num_terms,
        batch_size,
        fixed_batches,
        key,
        True,
    )


def mrbo(
    inner: Callable[..., Any],
    outer: Callable[..., Any],
    *,
    step_size: Coefficient,
    adjoint_step_size: Coefficient | None = None,
    momentum: Coefficient = _decaying,
    num_adjoint_steps: int = 10,
    batch_size: int | tuple[int, int] | None = None,
    fixed_batches: bool = False,
    key: Array | None = None,
) -> Hypergradient[X, Theta]:
    r"""Returns MRBO: STORM momentum on both directions, the adjoint a Neumann series of Q stochastic products.

    .. math:: u_t &= \nabla_x f(z_t) + (1 - \eta_t)(u_{t-1} - \nabla_x f(z_{t-1})), \quad
        d_t = g(z_t) + (1 - \eta_t)(d_{t-1} - g(z_{t-1})) \\
        g &= \nabla^2_{\theta x} f\, v + \nabla_\theta F, \quad
        v = -b \sum_{q=0}^{Q} \prod_{j=1}^{q} (I - b \nabla^2_{xx} f_j)\, \nabla_x F

    with :math:`z = (x, \theta)`, old and new point on the same minibatches; x moves by :math:`-a u_t`, the gradient
    is :math:`d_t`, and the memories start from the first gradients.

    When: large data, a smooth inner loss that is strongly convex in x; near-optimal in expectation, where the steps
    decay like :math:`t^{-1/3}`: pass ``step_size=lambda k: a / (k + 1) ** (1 / 3)``, a number as
    ``adjoint_step_size``. The series has a bias of at most :math:`(1 - b \mu)^{Q+1}` of the adjoint for
    :math:`b \le 2 / (L + \mu)`. Without batches it is exactly the single loop with one inner step and the cut series.

    Args:
        inner: f, ``(x, theta, inner_data) -> scalar``, the mean over the rows it gets; without data ``(x, theta)``.
        outer: F, ``(x, theta, outer_data) -> scalar``, likewise.
        step_size: a > 0, a number, a schedule of the update number, or a function of theta; below 2/L.
        adjoint_step_size: b > 0, likewise, below 2/L, constant in the source; None: that of x.
        momentum: eta, the weight of the fresh gradient, in (0, 1], likewise; 1 forgets the past. Default
            :math:`0.5\,(t + 1)^{-2/3}`.
        num_adjoint_steps: Q, at least 1; of the order of the condition number times the digits wanted.
        batch_size: rows of an inner and an outer minibatch, at least 1, or a pair. None: all rows.
        fixed_batches: draw one of the n / b contiguous batches of b rows instead of rows from everywhere: memory is
            read in one piece, which is some times faster where a minibatch is small. b must divide n; shuffle sorted
            data beforehand.
        key: of the draws; default ``jax.random.key(0)``.

    Raises:
        ValueError: a coefficient, a count or a batch size out of range.
        TypeError: a loss that is no function; at trace time, a loss that is not a real scalar, data that is not a pair.

    Cost: two gradients, 2 (Q + 1) Hessian-vector and two cross products of f, two gradients of F, on minibatches; the
    state holds three copies of x and one of theta.
    ``info.inner_residual`` is the norm of the direction that x takes.

    Source: Yang, Ji and Liang (2021), algorithm 1; one momentum for both directions, and the inner gradient shares
    the minibatch of the cross product.

    Example:
        >>> import jax, odljax as odl
        >>> hyper = odl.hypergradients.mrbo(
        ...     lambda x, theta: 0.5 * (x - theta) ** 2, lambda x, theta: 0.5 * (x - 1.0) ** 2, step_size=0.5)
        >>> theta, state, update = 0.0, hyper.init(0.0, 0.0), jax.jit(hyper.update)
        >>> for _ in range(100):
        ...     gradient, state, info = update(theta, state)
        ...     theta = theta - 0.1 * gradient
        >>> round(float(theta), 3)
        1.0
    """
    return _double_momentum(
        "mrbo", inner, outer, step_size, adjoint_step_size, momentum, "num_adjoint_steps", num_adjoint_steps,
        batch_size, fixed_batches, key, False,
    )  # fmt: skip
