"""Reverse mode through momentum steps that are undone exactly, instead of stored."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from .. import _tree
from .._checks import as_inner, coefficient, count, differentiable, is_callable, number
from .._types import Coefficient, Scalar, State, Status, Theta, X
from ._estimator import Hypergradient, Info, WalkState, conclude, losses, of_theta, pair, slope_of, start_outer
from ._start import first_start, started

_WORD = 16  # bits of one word of the buffer: a word times a denominator fits into 32 bits
_LARGEST = 1 << 15


class Walk(NamedTuple):
    """Where the walk stands: iterate and velocity as whole numbers of the resolution, and the digits set aside."""

    x: Any
    velocity: Any
    buffer: Any


class Sweep(NamedTuple):
    """The carry of the loop that goes to the last iterate and comes back; ``push`` moves the walk in the next turn."""

    walk: Walk
    push: Any
    last: Any
    value: Array
    x_bar: Any
    velocity_bar: Any
    theta_bar: Any
    finite: Array
    inside: Array


def reversible(
    inner: Callable[..., Any],
    outer: Callable[..., Any],
    *,
    step_size: Coefficient,
    momentum: Scalar | Fraction = 0.9,
    num_steps: int,
    fraction_bits: int | None = None,
    start: Callable[[Theta], X] | None = None,
) -> Hypergradient[X, Theta]:
    r"""Returns the estimator that reverses K momentum steps by undoing them, so that no step is stored.

    .. math::
        u_{k+1} &= \tfrac{n}{d}\, u_k - [\gamma_k \nabla_x f(x_k, \theta)], \qquad x_{k+1} = x_k + u_{k+1} \\
        \bar u &\mathrel{+}= \bar x, \quad
        \bar x \mathrel{-}= \partial_x (\gamma_k \nabla_x f)^\top \bar u, \quad
        \bar\theta \mathrel{-}= \partial_\theta (\gamma_k \nabla_x f)^\top \bar u, \quad
        \bar u \mathrel{=} \tfrac{n}{d}\, \bar u

    the second line for k = K - 1, ..., 0, at the iterates that inverting the first line gives back. x and u are whole
    multiples of :math:`2^{-b}`, brackets round to them, and the digits that the product with n/d would lose go into a
    buffer, so each step is undone bit for bit. One loop goes there and back: both ways run the same compiled gradient.

    When: gradient of a long training run with momentum in its hyperparameters or learned start, where one step needs
    much memory. It is the derivative of ``unrolled`` steps of ``heavy_ball(gradient_descent(f))`` at iterates that
    rounding moves by about :math:`2^{-b}` a step; steps below the resolution are lost.

    Args:
        inner: f, ``(x, theta, inner_data) -> scalar``, twice differentiable; without data ``(x, theta)``.
        outer: :math:`\ell`, ``(x, theta, outer_data) -> scalar``, likewise.
        step_size: :math:`\gamma_k > 0`, a number, a schedule of k, a function of theta, or of (theta, k); it is
            differentiated, too.
        momentum: n/d in (0, 1), a fraction, or a float that is one with a denominator of at most 1000; static.
        num_steps: K, at least 1, static.
        fraction_bits: b, at least 1. Default: 20 for leaves of up to 32 bits, which are kept in 32-bit words (so that
            it works without x64; numbers up to 1024), and 40 for float64, kept in 64 bits (numbers up to 4e6). At most
            28 and 60.
        start: :math:`x_0(\theta)`, ``theta -> x``, a learned start; the x0 of ``init`` is then not used and may be
            None. None: the x0 of ``init``, rounded.

    Returns:
        An estimator. A walk that leaves the range of the numbers is DIVERGED, and value and gradient are NaN; they are
        NaN, too, and the status NON_FINITE, should the walk back not end exactly where it started.

    Raises:
        ValueError: a step size that is not positive, a step count below 1; a momentum outside (0, 1), or no such
            fraction; at trace time, more fraction bits than a leaf's words have.
        TypeError: a loss or ``start`` that is no function, a traced momentum; at trace time, a loss that is not a real
            scalar, data that is not a pair.

    Cost: 2 K gradients and K products with the derivatives of the gradient; memory of one step, six copies of x, and a
    buffer of :math:`K \log_2(d/n)` bits an entry of x (0.15 K at 0.9), whose words all take part in each step.

    Source: Maclaurin, Duvenaud and Adams (2015), algorithms 2 and 3. Differs: the velocity is that of heavy ball,
    :math:`x_{k+1} - x_k`, so it alone is scaled and rounded; the rate multiplies the gradient.

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> inner = lambda x, theta: 0.5 * jnp.exp(theta) * x**2
        >>> hyper = odl.hypergradients.reversible(
        ...     inner, lambda x, theta: x, step_size=0.5, momentum=0.5, num_steps=2)
        >>> gradient, state, info = hyper.update(0.0, hyper.init(0.0, 1.0))
        >>> float(info.x), float(gradient)  # x_2 = (1 - a)(3/2 - a) - 1/2 with a = exp(theta) / 2
        (0.0, -0.75)
    """
    who = "reversible"
    inner_loss, outer_loss = losses(who, inner, outer)
    gamma = coefficient(who, "step_size", step_size)
    num_steps = count(who, "num_steps", num_steps)
    ratio = _fraction(who, momentum)
    if fraction_bits is not None:
        fraction_bits = count(who, "fraction_bits", fraction_bits)
    if start is not None:
        is_callable(who, "start", start, "theta")

    def init(theta: Theta, x0: X, *data: Any) -> WalkState:
        differentiable(who, theta)
        x0 = as_inner(who, "x0", x0) if start is None else x0  # its whole-number arithmetic knows real numbers only
        return WalkState(first_start(who, start, x0), start_outer(theta))

    def update(theta: Theta, state: WalkState, *data: Any) -> tuple[Theta, State, Info]:
        differentiable(who, theta)
        theta = _tree.strong(theta)
        inner_data, outer_data = pair(who, data)
        x0, pull_start = jax.vjp(lambda theta: as_inner(who, "x0", started(who, start, theta, state.x)), theta)

        def slope(x: Any) -> Any:
            return jax.grad(inner_loss)(x, theta, *inner_data)

        def move(k: Any) -> Callable[[Any, Any], Any]:
            return lambda x, theta: _tree.scale(gamma(theta, k), jax.grad(inner_loss)(x, theta, *inner_data))

        def seed(x: Any) -> Any:
            return jax.value_and_grad(outer_loss, argnums=(0, 1))(x, theta, *outer_data)

        grid = make_grid(who, x0, fraction_bits)
        sweep, exact = there_and_back(grid, move, seed, x0, theta, ratio, num_steps)
        (of_start,) = pull_start(sweep.x_bar)
        sound = jnp.where(sweep.finite & sweep.inside & exact, 1.0, jnp.nan)
        gradient, value, x = _tree.scale(sound, (_tree.add(sweep.theta_bar, of_start), sweep.value, sweep.last))
        gradient, walk, info = conclude(
            who, gradient, theta, state.outer,
            value=value, x=x, inner_residual=_tree.norm(slope(x)), num_steps=num_steps,
        )  # fmt: skip
        diverged = sweep.finite & ~sweep.inside
        status = jnp.where(diverged, jnp.full_like(info.status, Status.DIVERGED), info.status)
        return gradient, WalkState(state.x, walk), info._replace(status=status)

    return Hypergradient(init, update, who, slope_of(who, inner, outer, start, of_theta(step_size)))


def _fraction(who: str, momentum: Any) -> Fraction:
    if isinstance(momentum, Tracer):
        raise TypeError(f"{who}: momentum fixes the program and must be a number; a traced value came. Close over it.")
    number(who, "momentum", momentum, high=1.0)
    ratio = momentum if isinstance(momentum, Fraction) else Fraction(float(momentum)).limit_denominator(1000)
    if abs(float(ratio) - float(momentum)) > 1e-9 or ratio <= 0 or ratio.denominator >= _LARGEST:
        raise ValueError(
            f"{who}: momentum must be a fraction n/d, with d up to 1000 for a float and below {_LARGEST} for a "
            f"fractions.Fraction; {momentum!r} came. Round it, for instance to Fraction(9, 10)."
        )
    return ratio


class Grid(NamedTuple):
    """The whole multiples of the resolution that stand for x: fraction bits, shape and dtype of each leaf."""

    bits: Any
    like: Any

    def encode(self, x: Any) -> tuple[Any, Array]:
        """The nearest whole numbers, and whether all of them lie inside the range."""

        def one(leaf: Array, bits: int) -> tuple[Array, Array]:
            real, whole = _types(leaf)
            scaled = jnp.round(leaf.astype(real) * jnp.asarray(2.0**bits, real))
            # A comparison with NaN is false; what does not fit is told, and the number itself no longer matters.
            fits = jnp.abs(scaled) < 2.0 ** (8 * real.itemsize - 2)
            return jnp.where(fits, scaled, jnp.zeros_like(scaled)).astype(whole), jnp.all(fits)

        pairs = jax.tree.map(one, x, self.bits)
        whole, fits = jax.tree.transpose(jax.tree.structure(self.like), jax.tree.structure((0, 0)), pairs)
        return whole, jnp.all(jnp.stack(jax.tree.leaves(fits)))

    def decode(self, whole: Any) -> Any:
        def one(number: Array, bits: int, like: Any) -> Array:
            real, _ = _types(like)
            return (number.astype(real) * jnp.asarray(2.0**-bits, real)).astype(like.dtype)

        return jax.tree.map(one, whole, self.bits, self.like)

    def inside(self, whole: Any) -> Array:
        def one(number: Array) -> Array:
            bound = 2 ** (8 * number.dtype.itemsize - 2)
            return jnp.all((-bound < number) & (number < bound))

        return jnp.all(jnp.stack([one(number) for number in jax.tree.leaves(whole)]))


def make_grid(who: str, x: Any, fraction_bits: int | None) -> Grid:
    def bits_of(leaf: Array) -> int:
        wide = leaf.dtype.itemsize == 8
        bits, most = fraction_bits or (40 if wide else 20), 60 if wide else 28
        if bits > most:
            raise ValueError(
                f"{who}: fraction_bits is {bits}, but a leaf of {leaf.dtype} is kept in {64 if wide else 32} bits. "
                f"Ask for at most {most}{'' if wide else ', or pass x0 in float64 with x64 on'}."
            )
        return bits

    return Grid(jax.tree.map(bits_of, x), jax.eval_shape(lambda: x))


def _types(leaf: Any) -> tuple[Any, Any]:
    """The real and the whole numbers in which a leaf is computed."""
    wide = leaf.dtype.itemsize == 8
    return jnp.dtype(jnp.float64 if wide else jnp.float32), jnp.dtype(jnp.int64 if wide else jnp.int32)


def buffer_words(ratio: Fraction, num_steps: int) -> int:
    """Words for the largest number that may stand in the buffer: below d ((d/n)^K) / (d - n), and d times that."""
    n, d = ratio.numerator, ratio.denominator
    bits = num_steps * math.log2(d / n) + 2 * math.log2(d) - math.log2(d - n)
    return math.ceil((bits + 1) / _WORD)


def rescale(number: Array, buffer: Array, n: Array, d: Array) -> tuple[Array, Array]:
    """``number * n / d`` to rounding, in whole numbers, with the digits that are lost set aside in the buffer.

    Undone exactly by ``rescale(number, buffer, d, n)``. The buffer is one number an entry, in words along the first
    axis, the lowest first.
    """
    signed_n, signed_d = n.astype(number.dtype), d.astype(number.dtype)
    digit = (number % signed_d).astype(jnp.uint32)

    def multiply(carry: Array, word: Array) -> tuple[Array, Array]:
        total = word.astype(jnp.uint32) * d + carry
        return total >> _WORD, (total & 0xFFFF).astype(jnp.uint16)

    def divide(rest: Array, word: Array) -> tuple[Array, Array]:
        total = (rest << _WORD) | word.astype(jnp.uint32)
        return total % n, (total // n).astype(jnp.uint16)

    _, buffer = jax.lax.scan(multiply, digit, buffer)
    digit, buffer = jax.lax.scan(divide, jnp.zeros_like(digit), buffer, reverse=True)
    return (number // signed_d) * signed_n + digit.astype(number.dtype), buffer


def take_step(walk: Walk, push: Any, ratio: Fraction, backward: Array) -> Walk:
    """One step ahead, ``u = n/d u - push; x = x + u``, or the same step undone."""
    n, d = (jnp.asarray(part, jnp.uint32) for part in (ratio.numerator, ratio.denominator))
    up, down = jnp.where(backward, d, n), jnp.where(backward, n, d)

    def one(x: Array, u: Array, buffer: Array, push: Array) -> tuple[Array, Array, Array]:
        back = x - u
        none = jnp.zeros_like(push)
        u, buffer = rescale(u + jnp.where(backward, push, none), buffer, up, down)
        u = u - jnp.where(backward, none, push)
        return jnp.where(backward, back, x + u), u, buffer

    triples = jax.tree.map(one, *walk, push)
    return Walk(*jax.tree.transpose(jax.tree.structure(walk.x), jax.tree.structure((0, 0, 0)), triples))


def there_and_back(
    grid: Grid, move: Any, seed: Any, x0: Any, theta: Any, ratio: Fraction, num_steps: int
) -> tuple[Sweep, Array]:
    """K steps ahead, the gradient of the outer loss there, and K steps back; whether the start was met exactly.

    One loop of 2 K turns rather than two loops: the compiler might round two copies of the gradient differently, and
    one unit of difference is not to be undone.
    """
    words = buffer_words(ratio, num_steps)
    x, fits = grid.encode(x0)
    buffer = jax.tree.map(lambda leaf: jnp.zeros((words, *leaf.shape), jnp.uint16), x)
    origin = Walk(x, _tree.zeros_like(x), buffer)
    zeros = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), grid.like)
    value = jax.eval_shape(seed, zeros)[0]
    sweep = Sweep(
        walk=origin, push=_tree.zeros_like(x), last=zeros, value=jnp.zeros((), value.dtype),
        x_bar=zeros, velocity_bar=zeros, theta_bar=_tree.zeros_like(theta),
        finite=_tree.all_finite(x0), inside=fits,
    )  # fmt: skip

    def turn(carry: tuple[Sweep, Array], _: None) -> tuple[tuple[Sweep, Array], None]:
        sweep, i = carry

        def begin_return(sweep: Sweep) -> Sweep:
            last = grid.decode(sweep.walk.x)
            value, (x_bar, theta_bar) = seed(last)
            return sweep._replace(last=last, value=value, x_bar=x_bar, theta_bar=theta_bar)

        # The push of the turn before, from the carry: a compiler may compute a value twice, for two users, with two
        # roundings, but what the loop carries is one array. In the first turn all is zero, and stays.
        walk = take_step(sweep.walk, sweep.push, ratio, i > num_steps)
        inside = sweep.inside & (grid.inside(walk.x) & grid.inside(walk.velocity) | (i > num_steps))
        sweep = jax.lax.cond(i == num_steps, begin_return, lambda sweep: sweep, sweep._replace(walk=walk))
        backward = i >= num_steps
        k = jnp.where(backward, 2 * num_steps - 1 - i, i)
        at = grid.decode(_tree.where(backward, _tree.subtract(walk.x, walk.velocity), walk.x))
        push, pull = jax.vjp(move(k), at, theta)
        whole, fits = grid.encode(push)

        def go_back(sweep: Sweep) -> Sweep:
            velocity_bar = _tree.add(sweep.velocity_bar, sweep.x_bar)
            of_x, of_theta = pull(velocity_bar)
            return sweep._replace(
                x_bar=_tree.subtract(sweep.x_bar, of_x),
                velocity_bar=_tree.scale(float(ratio), velocity_bar),
                theta_bar=_tree.subtract(sweep.theta_bar, of_theta),
            )

        sweep = jax.lax.cond(backward, go_back, lambda sweep: sweep, sweep)
        finite = sweep.finite & _tree.all_finite(push)
        sweep = sweep._replace(push=whole, finite=finite, inside=inside & (fits | backward))
        return (sweep, i + 1), None

    (sweep, _), _ = jax.lax.scan(turn, (sweep, jnp.zeros((), int)), length=2 * num_steps)
    walk = take_step(sweep.walk, sweep.push, ratio, jnp.asarray(True))
    same = jax.tree.map(lambda a, b: jnp.all(a == b), walk, origin)
    return sweep, jnp.all(jnp.stack(jax.tree.leaves(same)))
