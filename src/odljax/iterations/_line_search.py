"""Step lengths that are found: line searches, backtracking, Polyak's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .. import _tree
from .._checks import coefficient, count, is_callable, number, same_as
from .._types import Coefficient, Scalar, State, Step, Theta, X
from ..operators import Operator, forward_backward, gradient
from ..operators._gradient import Objective, Prox, value_and_gradient
from ._iteration import Iteration, first, iteration_of, stateless

Line = Callable[[Array], tuple[Array, Array]]


def line_search(
    iteration: Iteration[X, Theta] | Operator[X, Theta] | Callable[[X, Theta], X],
    objective: Objective,
    rule: str = "armijo",
    *,
    decrease: float = 0.1,
    curvature: float = 0.9,
    shrink: float = 0.5,
    max_trials: int = 30,
) -> Iteration[X, Theta]:
    r"""Returns the iteration with the length of each step searched along it.

    .. math:: d_k = \operatorname{step}(x_k) - x_k, \qquad x_{k+1} = x_k + t_k d_k, \qquad
        \varphi(t) = f(x_k + t d_k, \theta)

    "armijo" takes the first t of 1, shrink, shrink^2, ... with :math:`\varphi(t) \le \varphi(0) + \delta t
    \varphi'(0)`. "hager_zhang" starts at 1, too, but goes further where the slope still falls, and also wants
    :math:`\varphi'(t) \ge \sigma \varphi'(0)`: with the former, Wolfe's conditions. Where :math:`\varphi(t)` and
    :math:`\varphi(0)` agree to half their digits, both rules replace the first condition by that on the slope,
    :math:`\varphi'(t) \le (2 \delta - 1) \varphi'(0)`, the approximate condition of Hager and Zhang, which is the same
    on a quadratic and keeps its digits: the search works down to rounding, in float32, too.

    When: the right step size is unknown or changes: gradient steps of any size, Newton and Gauss-Newton steps, the
    directions of an optax optimiser. A step that climbs is searched backwards (Newton's where the Hessian is not
    positive definite does); where no length descends, x stays, and ``until_converged`` ends STALLED.

    The derivative through the steps takes :math:`t_k` as a constant. For "armijo" it is one, piecewise; for
    "hager_zhang" a term proportional to the step is left out, which vanishes at the solution but not before.

    Args:
        iteration: an iteration, an operator, or a function ``(x, theta) -> x``, whose step is a direction of descent.
        objective: f, ``(x, theta) -> scalar``.
        rule: "armijo" or "hager_zhang". For the zoom search of optax: ``from_optax(objective, optax.chain(...,
            optax.scale_by_zoom_linesearch(...)))``.
        decrease: :math:`\delta` in (0, 1/2).
        curvature: :math:`\sigma` in [decrease, 1), of "hager_zhang" alone.
        shrink: factor in (0, 1), of "armijo" alone.
        max_trials: at least 1.

    Raises:
        ValueError: an unknown rule, a number out of its range.
        TypeError: objective is no function; at trace time, it is no real scalar.

    Cost: that of the iteration, one gradient, and a value with its gradient a trial; one trial where the first length
    is right. No state.

    Source: Armijo (1966); Hager and Zhang (2005), section 4, with their interval updates, but one secant or bisection
    a trial in the place of their double secant.

    Example:
        >>> import odljax as odl
        >>> f = lambda x, theta: 50.0 * (x - theta) ** 2
        >>> walk = odl.line_search(odl.gradient_descent(f, step_size=1.0), f)  # a step a hundred times too long
        >>> round(float(odl.until_converged(walk, tol=1e-3)(0.0, 2.0).x), 4)
        2.0
    """
    iteration = iteration_of("line_search", "iteration", iteration)
    is_callable("line_search", "objective", objective, "x, theta")
    if rule not in ("armijo", "hager_zhang"):
        raise ValueError(f"line_search: rule must be 'armijo' or 'hager_zhang'; {rule!r} came.")
    number("line_search", "decrease", decrease, high=0.5)
    number("line_search", "curvature", curvature, low=decrease, high=1.0, closed=True)
    number("line_search", "shrink", shrink, high=1.0)
    max_trials = count("line_search", "max_trials", max_trials)
    next_trial = _shrinking(shrink) if rule == "armijo" else _bracketing
    flattest = None if rule == "armijo" else curvature

    def step(x: X, state: State, theta: Theta, k: Step) -> tuple[X, State]:
        target, state = iteration.step(x, state, theta, k)
        direction = _tree.subtract(target, x)

        unit = _tree.magnitude(direction)

        def line(t: Array) -> tuple[Array, Array]:
            return value_and_slope("line_search", objective, _tree.add_scaled(x, t, direction), theta, direction, unit)

        size = _tree.norm(direction)
        rest = size <= 10 * jnp.finfo(size.dtype).eps * _tree.norm(x)
        search = lambda line: _search(line, unit, next_trial, decrease, flattest, max_trials)  # noqa: E731
        t = _constant(search, line, jnp.zeros_like(size))
        t = jnp.where(jax.lax.stop_gradient(rest), jnp.ones_like(t), t)
        return _tree.add_scaled(x, t, direction), state

    return dataclasses.replace(iteration, step=step, name=f"line_search({iteration.name})")


def _constant(search: Callable[[Any], Array], line: Callable[[Array], Any], example: Array) -> Array:
    """The outcome of a search in which nothing that the line closes over has a derivative: the loop inside it has no
    reverse mode."""
    converted, captured = jax.closure_convert(line, example)
    captured = jax.lax.stop_gradient(captured)
    return jax.lax.stop_gradient(search(lambda t: converted(t, *captured)))


def value_and_slope(
    who: str, objective: Objective, x: Any, theta: Any, direction: Any, unit: Array
) -> tuple[Array, Array]:
    """The objective and its slope along ``direction / unit``, of the size of a gradient: nothing is squared.

    By the gradient, not by a tangent: an objective may have reverse mode alone (a rule by hand, a checkpointed loop).
    """
    value, gradient = value_and_gradient(who, objective, x, theta)
    along = jax.tree.map(lambda d, leaf: d.astype(leaf.dtype), _tree.unscaled(direction, unit), x)
    return value, _tree.vdot(gradient, along).astype(value.dtype)


def _close(a: Array, b: Array) -> Array:
    """Whether slopes tell more than the difference of two values of the objective: these agree to half their digits, or
    the one at x, b, over- or underflows."""
    info = jnp.finfo(b.dtype)
    beyond = jnp.isinf(b) | (jnp.abs(b) < float(info.tiny) / float(info.eps))
    return (jnp.abs(a - b) <= float(info.eps) ** 0.5 * jnp.abs(b)) | beyond


class Bracket(NamedTuple):
    """A length that is short enough, one that is too long, their slopes (zero: not known), and the next trial."""

    short: Array
    slope: Array
    long: Array
    rise: Array
    trial: Array


def _search(
    line: Line,
    unit: Array,
    next_trial: Callable[..., Bracket],
    decrease: float,
    flattest: float | None,
    max_trials: int,
) -> Array:
    """The first trial that meets the conditions; zero if none does. Slopes are those along the direction per unit."""
    zero, one = jnp.zeros_like(unit), jnp.ones_like(unit)
    value, slope = line(zero)
    forwards = jnp.where(slope > 0, -one, one)  # what climbs is searched backwards
    slope = forwards.astype(slope.dtype) * slope

    def running(carry: Any) -> Array:
        _, found, trials = carry
        return ~found & (trials < max_trials)

    def body(carry: Any) -> Any:
        bracket, _, trials = carry
        t = bracket.trial
        new_value, new_slope = line(forwards * t)
        new_slope = forwards.astype(slope.dtype) * new_slope
        near = _close(new_value, value)
        fall = decrease * t.astype(value.dtype) * slope * unit.astype(value.dtype)
        low = jnp.where(near, new_slope <= (2 * decrease - 1) * slope, new_value <= value + fall)
        steep = new_slope >= flattest * slope if flattest is not None else True
        found = low & steep
        # What is too high, or no number, is too long, whatever its slope says.
        further = (near | (new_value <= value)) & (new_slope < 0)
        after = next_trial(bracket, further, new_slope.astype(t.dtype))
        return after._replace(trial=jnp.where(found, t, after.trial)), found, trials + 1

    start = Bracket(zero, slope.astype(zero.dtype), jnp.full_like(zero, jnp.inf), zero, one)
    carry = (start, jnp.zeros((), bool), jnp.where(slope < 0, 0, max_trials))
    bracket, found, _ = jax.lax.while_loop(running, body, carry)
    return jnp.where(found, forwards * bracket.trial, jnp.where(jnp.isnan(value), jnp.nan, 0).astype(zero.dtype))


def _shrinking(factor: float) -> Callable[..., Bracket]:
    return lambda bracket, further, slope: bracket._replace(trial=factor * bracket.trial)


def _bracketing(bracket: Bracket, further: Array, slope: Array) -> Bracket:
    """The interval with the trial as its new end; next a secant, the middle where that shrinks too slowly, or, while
    there is no upper end, a length five times as great."""
    t = bracket.trial
    rising = jnp.where(slope >= 0, slope, jnp.zeros_like(slope))
    short, low = jnp.where(further, t, bracket.short), jnp.where(further, slope, bracket.slope)
    long, rise = jnp.where(further, bracket.long, t), jnp.where(further, bracket.rise, rising)
    width, before = long - short, bracket.long - bracket.short
    known = (rise > 0) & (low < 0) & (width <= 0.66 * before)
    secant = short - low * width / jnp.where(known, rise - low, jnp.ones_like(rise))
    inside = jnp.where(known, secant, 0.5 * (short + long))
    return Bracket(short, low, long, rise, jnp.where(jnp.isinf(long), 5 * t, inside))


class BacktrackingState(NamedTuple):
    """The step length that was found last, in multiples of the step size."""

    fraction: Array


def backtracking(
    objective: Objective,
    prox: Prox | None = None,
    *,
    step_size: Coefficient,
    shrink: float = 0.5,
    grow: float = 1.2,
    max_trials: int = 50,
) -> Iteration:
    r"""Returns (proximal) gradient descent whose step length adapts to the curvature it meets.

    .. math:: x_{k+1} = p(x_k) = \operatorname{prox}_{\gamma h}(x_k - \gamma \nabla f(x_k, \theta)), \qquad
        f(p) \le f(x_k) + \langle \nabla f(x_k), p - x_k \rangle + \tfrac{1}{2 \gamma} \|p - x_k\|^2

    The length in multiples of the step size is the state: it starts at one; each step tries ``grow`` times the last one
    first and shrinks it until the test holds. With ``grow`` 1 it never lengthens. Where the two values of f agree to
    half their digits, the test compares gradients instead, :math:`\langle \nabla f(p) - \nabla f(x_k), p - x_k \rangle
    \le \|p - x_k\|^2 / \gamma`, which is the same on a quadratic: rounding does not shrink the step. Where x rests, the
    length stays.

    When: f + h is convex and its Lipschitz constant is unknown. ``nesterov(backtracking(...))`` is FISTA with
    backtracking (its proof wants ``grow`` 1). The length is piecewise constant, and the derivative through the steps
    takes it so; lengths that grow beyond 2/L, which shallow directions allow, delay its convergence.

    Args:
        objective: f, ``(x, theta) -> scalar``, smooth.
        prox: ``(v, theta, step_size) -> v`` of ``step_size * h``; None: h = 0.
        step_size: :math:`\gamma > 0`, the first trial, a number, a schedule of k or a function of theta. The operator
            uses that of k = 0.
        shrink: factor in (0, 1) of each trial.
        grow: factor of the length before each search, at least 1.
        max_trials: shrinkings a step, at least 1.

    Raises:
        ValueError: a number out of its range.
        TypeError: at trace time, an objective that is not a real scalar, a prox that changes structure, shape or dtype.

    Cost: one gradient a step, and for each trial a prox and a value with its gradient.

    Source: Beck and Teboulle (2009), section 4 (the step size only shrinks); growing: Scheinberg, Goldfarb and Bai
    (2014); the test by gradients: Becker, Candes and Grant (2011).

    Example:
        >>> import odljax as odl
        >>> lasso = odl.backtracking(lambda x, lam: 5.0 * (x - 3.0) ** 2, odl.prox.l1, step_size=1.0)
        >>> round(float(odl.for_steps(lasso, 30)(0.0, 1.0).x), 3)
        2.9
    """
    who = "backtracking"
    is_callable(who, "objective", objective, "x, theta")
    if prox is not None:
        is_callable(who, "prox", prox, "v, theta, step_size")
    step_at = coefficient(who, "step_size", step_size)
    number(who, "shrink", shrink, high=1.0)
    number(who, "grow", grow, low=1.0, closed=True)
    max_trials = count(who, "max_trials", max_trials)
    longest = first(step_at)
    operator = gradient(objective, longest) if prox is None else forward_backward(objective, prox, longest)

    def init(x: Any, theta: Any) -> BacktrackingState:
        return BacktrackingState(jnp.ones((), _tree.accumulation_dtype(x)))

    def step(x: Any, state: BacktrackingState, theta: Any, k: Step) -> tuple[Any, BacktrackingState]:
        value, slope = value_and_gradient(who, objective, x, theta)

        def reached(fraction: Array) -> tuple[Any, Array]:
            size = fraction * jnp.asarray(step_at(theta, k)).astype(fraction.dtype)
            forward = _tree.add_scaled(x, -size, slope)
            return forward if prox is None else same_as(who, "the prox", prox(forward, theta, size), x), size

        def test(fraction: Array) -> Array:
            point, size = reached(fraction)
            move = _tree.subtract(point, x)
            unit = _tree.magnitude(move)
            ahead = _tree.unscaled(move, unit)
            new, rise = value_and_slope(who, objective, _tree.add(x, move), theta, move, unit)
            start, room = _tree.vdot(slope, ahead), _tree.vdot(ahead, ahead) * (unit / size)
            by_value = (new - value).astype(start.dtype) <= unit * (start + 0.5 * room)
            return jnp.where(_close(new, value), rise.astype(start.dtype) - start <= room, by_value)

        def search(test: Callable[[Array], Array]) -> Array:
            whole = jax.lax.stop_gradient(state.fraction) * grow
            shorter = lambda carry: (shrink * carry[0], test(shrink * carry[0]), carry[2] + 1)  # noqa: E731
            start = (whole, test(whole), jnp.zeros((), jnp.int32))
            return jax.lax.while_loop(lambda carry: ~carry[1] & (carry[2] < max_trials), shorter, start)[0]

        fraction = _constant(search, test, state.fraction)
        new = reached(fraction)[0]
        moved = _tree.norm(jax.lax.stop_gradient(_tree.subtract(new, x)))
        rest = moved <= 10 * jnp.finfo(moved.dtype).eps * _tree.norm(jax.lax.stop_gradient(x))
        return new, BacktrackingState(jnp.where(rest, jnp.minimum(fraction, state.fraction), fraction))

    return Iteration(init, step, operator, who)


def polyak(objective: Objective, optimum: Scalar | Callable[[Any], Any] = 0.0) -> Iteration:
    r"""Returns gradient descent with Polyak's step, which needs to know the least value of f.

    .. math:: x_{k+1} = x_k - \frac{f(x_k, \theta) - f^\star(\theta)}{\|\nabla f(x_k, \theta)\|^2} \nabla f(x_k, \theta)

    When: f is convex, smooth or not, and its least value is known: zero for systems of equations, feasibility and
    models that interpolate. No other constant is needed; the distance to every minimiser falls. With a least value that
    is not zero the difference loses half the digits. Where f is below ``optimum``, x stays.

    Differentiate it by ``implicit``: the length is a ratio of vanishing numbers, whose derivative through the steps is
    exact but need not settle while the iterates do.

    Args:
        objective: f, ``(x, theta) -> scalar``.
        optimum: :math:`f^\star`, a number or a function of theta.

    Raises:
        TypeError: an optimum that is neither; at trace time, an objective that is not a real scalar.

    Cost: one gradient a step; no state.

    Source: Polyak (1969), Polyak (1987).

    Example:
        >>> import odljax as odl
        >>> walk = odl.polyak(lambda x, theta: 7.0 * (x - theta) ** 2)  # halves the error whatever the curvature
        >>> float(odl.for_steps(walk, 3)(0.0, 8.0).x)
        7.0
    """
    is_callable("polyak", "objective", objective, "x, theta")
    least = coefficient("polyak", "optimum", optimum, low=-jnp.inf)

    def step(x: Any, state: State, theta: Any, k: Step) -> tuple[Any, State]:
        value, slope = value_and_gradient("polyak", objective, x, theta)
        unit = _tree.magnitude(slope)
        slope = _tree.unscaled(slope, unit)
        squared = _tree.vdot(slope, slope)
        above = value.astype(squared.dtype) - jnp.asarray(least(theta, k)).astype(squared.dtype)
        # At rest both vanish; a NaN in either still comes out.
        rest = (squared == 0) | (above < 0)
        length = jnp.where(rest, jnp.zeros_like(above), above) / jnp.where(rest, jnp.ones_like(squared), squared)
        return _tree.add_scaled(x, -length / unit, slope), state

    return Iteration(stateless, step, gradient(objective, 1.0), "polyak")
