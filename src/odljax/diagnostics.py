"""Probes: is an operator non-expansive or smooth here, is a hypergradient right, how wrong, which estimator to use."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from . import _tree
from ._checks import as_inner, count, differentiable, is_a, is_callable, number, same_as, scalar
from ._types import Scalar, Status, Theta, X
from .hypergradients import ErrorEstimate, Hypergradient
from .hypergradients._error import estimate_error
from .iterations import Iteration
from .linear import LinearSolver
from .operators import Operator, as_operator
from .operators._operator import inverse_metric
from .solvers import Solver

__all__ = [
    "Comparison",
    "Expansion",
    "Kinks",
    "TaylorTest",
    "compare",
    "expansion",
    "hypergradient_error",
    "kinks",
    "taylor_test",
]


class Expansion(NamedTuple):
    """How much an operator stretches near a point.

    Attributes:
        factor: the largest stretch found, in the operator's metric; a lower bound of the Lipschitz constant at the
            point.
        change: relative change of the factor over the last step of the power iteration; small when it has settled.
        direction: the direction that is stretched most, of unit length in the metric.
    """

    factor: Array
    change: Array
    direction: Any


def expansion(
    operator: Operator[X, Theta] | Callable[[X, Theta], X],
    x: X,
    theta: Theta,
    *,
    key: Array | None = None,
    num_steps: int = 50,
) -> Expansion:
    r"""Returns the local Lipschitz constant of an operator in its metric: T is non-expansive here if it is at most one.

    .. math:: \|J\|_G = \max_v \sqrt{\langle J v, G J v\rangle / \langle v, G v\rangle}, \qquad J = \partial_x T(x,
    \theta)

    by power iteration on :math:`G^{-1} J^\top G J`, with one Jacobian-vector and one vector-Jacobian product a step.

    When: to see whether Krasnoselskii-Mann steps of a learned operator will converge. A power iteration approaches the
    norm from below: a factor above one is a proof, a factor below one is evidence; probe at several points.

    Args:
        operator: an operator, in whose metric the probe measures, or a function ``(x, theta) -> x`` (identity metric).
        x: the point.
        theta: the hyper-variable.
        key: of the random start; default ``jax.random.key(0)``.
        num_steps: of the power iteration, at least 1.

    Raises:
        TypeError: x is not floating point; the operator changes structure, shape or dtype.
        ValueError: a step count below 1.

    Cost: num_steps times one jvp, one vjp, two products with the metric and one with its inverse.

    Source: Golub and Van Loan (2013), section 8.2; in a metric: the generalised eigenproblem.

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> probe = odl.diagnostics.expansion(lambda x, theta: theta * x, jnp.ones(3), 0.5)
        >>> round(float(probe.factor), 4)
        0.5
    """
    operator = as_operator(operator)
    x = as_inner("expansion", "x", x, or_complex=True)
    num_steps = count("expansion", "num_steps", num_steps)
    key = jax.random.key(0) if key is None else key

    def metric(v: X) -> X:
        return v if operator.metric is None else operator.metric(v, theta)

    solve_metric = inverse_metric(operator)

    def inverse(v: X) -> X:
        return v if solve_metric is None else solve_metric(v, theta)

    def normalised(v: X) -> X:
        size = jnp.sqrt(_tree.vdot(v, metric(v)))
        return _tree.scale(1 / jnp.where(size > 0, size, jnp.ones_like(size)), v)

    _, push = jax.linearize(lambda x: operator(x, theta), x)
    _, pull = jax.vjp(lambda x: operator(x, theta), x)

    def step(carry: Any, _: None) -> Any:
        v, old, _ = carry
        stretched = push(v)
        weighted = metric(stretched)
        factor = jnp.sqrt(jnp.maximum(_tree.vdot(stretched, weighted), 0.0))
        adjoint = _tree.conjugate(pull(_tree.conjugate(weighted))[0])  # JAX transposes without conjugation
        return (normalised(inverse(adjoint)), factor, jnp.abs(factor - old)), None

    zero = jnp.zeros((), _tree.accumulation_dtype(x))
    start = (normalised(_random_like(key, x)), zero, zero)
    (v, factor, change), _ = jax.lax.scan(step, start, None, length=num_steps)
    return Expansion(factor, change / jnp.where(factor > 0, factor, jnp.ones_like(factor)), v)


class Kinks(NamedTuple):
    """Where an operator has a kink at, or next to, a point.

    Attributes:
        mask: booleans like x: entries of T(x, theta) whose derivative is another on the other side.
        fraction: of the entries.
        gap: like x: the largest ``|a - b| / (|a| + |b|)`` of the two one-sided derivatives; 0 where T is smooth, 1
            where an entry is held on one side and moves on the other.
    """

    mask: Any
    fraction: Array
    gap: Any


def kinks(
    inner: Solver[X, Theta] | Iteration[X, Theta] | Operator[X, Theta] | Callable[[X, Theta], X],
    x: X,
    theta: Theta,
    *,
    radius: Scalar | None = None,
    num_directions: int = 8,
    key: Array | None = None,
) -> Kinks:
    r"""Returns where an operator is not differentiable at a point: the weakly active entries of a sparse solution.

    .. math:: a = \partial_x T(x + r d, \theta)\, d, \qquad b = \partial_x T(x - r d, \theta)\, d, \qquad
        \mathrm{gap}_i = \max_d \frac{|a_i - b_i|}{|a_i| + |b_i|}

    over random directions d with entries of unit size. An entry is reported where the gap exceeds 0.1.

    When: before an implicit derivative (``implicit``, ``on_support``) is believed at a non-smooth solution: at a kink
    the solution has one-sided derivatives only, and what automatic differentiation returns is one of them at best. For
    the lasso these are the entries with :math:`x_i = 0` and :math:`|\nabla_i f| = \lambda`, or with :math:`x_i` next to
    zero. Kinks that a change of theta crosses and no change of x does are not seen.

    Args:
        inner: what has an operator: a solver, an iteration, an operator, or a function ``(x, theta) -> x``.
        x: the point, such as ``solution.x``.
        theta: the hyper-variable.
        radius: r > 0, how far from x a kink still counts, in the units of x; it should exceed the error of x. Kinks in
            the argument v of a prox count if they are within about r of v, which for the lasso is
            :math:`\gamma\, \bigl||\nabla_i f| - \lambda\bigr| < r` with the step size :math:`\gamma`. Default: 1e-6
            (float32: 1e-3) times the largest entry of x, or times 1 where x is zero.
        num_directions: at least 1.
        key: of the directions; default ``jax.random.key(0)``.

    Raises:
        TypeError: no operator; x is not floating point.
        ValueError: a radius that is not positive, a count below 1.

    Cost: two Jacobian products of T a direction.

    Source: the limits of the two Jacobians lie in Clarke's (1983) generalised Jacobian, section 2.6; what weakly active
    entries do to the derivative: Bolte et al. (2021).

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> loss = lambda x, lam: 0.5 * jnp.sum((x - jnp.array([3.0, 1.0, 0.5])) ** 2)
        >>> T = odl.operators.forward_backward(loss, odl.prox.l1, step_size=0.5)
        >>> odl.diagnostics.kinks(T, jnp.array([2.0, 0.0, 0.0]), 1.0).mask.tolist()  # |gradient| is 1 at the second
        [False, True, False]
    """
    who = "kinks"
    operator = _operator_of(who, inner)
    x = as_inner(who, "x", x)
    num_directions = count(who, "num_directions", num_directions)
    dtype = _tree.accumulation_dtype(x)
    if radius is None:
        largest = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)).astype(dtype) for leaf in jax.tree.leaves(x)]))
        radius = (1e-6 if dtype.itemsize == 8 else 1e-3) * jnp.where(largest > 0, largest, jnp.ones_like(largest))
    else:
        number(who, "radius", radius)
    keys = jax.random.split(jax.random.key(0) if key is None else key, num_directions)

    def gaps(key: Array) -> X:
        direction = _random_like(key, x)

        def one_sided(signed: Any) -> X:
            return jax.jvp(lambda x: operator(x, theta), (_tree.add_scaled(x, signed, direction),), (direction,))[1]

        def gap(a: Array, b: Array) -> Array:
            # What both sides hold to rounding is held, not moved a little.
            floor = jnp.asarray(jnp.finfo(a.dtype).eps ** 0.5, a.dtype)
            return jnp.abs(a - b) / (jnp.abs(a) + jnp.abs(b) + floor)

        return jax.tree.map(gap, one_sided(radius), one_sided(-jnp.asarray(radius)))

    largest_gap = jax.tree.map(lambda column: jnp.max(column, axis=0), jax.vmap(gaps)(keys))
    mask = jax.tree.map(lambda gap: ~(gap <= 0.1), largest_gap)  # a NaN is no proof of smoothness
    leaves = jax.tree.leaves(mask)
    fraction = sum(jnp.sum(leaf, dtype=dtype) for leaf in leaves) / sum(leaf.size for leaf in leaves)
    return Kinks(mask, jnp.asarray(fraction), largest_gap)


class TaylorTest(NamedTuple):
    """Whether a gradient belongs to a function.

    Attributes:
        slope: of log remainder against log step: 2 for the right gradient of a smooth function, 1 for a wrong one.
        finite_difference: the central difference along the direction, at the step where it is most exact.
        directional: the inner product of the gradient with the direction.
        relative_error: of the two.
        steps: the steps h.
        remainders: ``|f(theta + h d) - f(theta) - h <gradient, d>|``.
    """

    slope: float
    finite_difference: float
    directional: float
    relative_error: float
    steps: np.ndarray
    remainders: np.ndarray


def taylor_test(
    function: Callable[[Any], Any],
    theta: Any,
    gradient: Any = None,
    *,
    scale: Scalar | None = None,
    key: Array | None = None,
) -> TaylorTest:
    r"""Returns the Taylor slope of a gradient against finite differences, along a random unit direction.

    .. math:: |\varphi(\theta + h d) - \varphi(\theta) - h \langle g, d \rangle| = O(h^2)

    When: to see whether a hypergradient is that of the function it claims; not inside compiled code. The slope is
    that of the remainders above rounding; where all are below (a linear function, the right gradient) it is reported
    as 2.

    Args:
        function: :math:`\varphi`, ``theta -> scalar``.
        theta: the point, a pytree of floating-point arrays.
        gradient: g, a pytree like theta. None: ``jax.grad(function)(theta)``.
        scale: how far theta can go before the function is another, in the units of theta; the steps are from the root
            of the rounding to a tenth of it. Default: the norm of theta, or 1 where theta is zero.
        key: of the random direction; default ``jax.random.key(0)``.

    Raises:
        TypeError: theta is not floating point.
        ValueError: a scale that is not positive.

    Cost: 24 evaluations of the function.

    Source: Farrell et al. (2013), section 5.

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> test = odl.diagnostics.taylor_test(lambda theta: jnp.sum(theta**3), jnp.ones(2), 3 * jnp.ones(2))
        >>> round(test.slope, 1)
        2.0
    """
    theta = as_inner("taylor_test", "theta", theta)
    gradient = jax.grad(function)(theta) if gradient is None else gradient
    key = jax.random.key(0) if key is None else key
    direction = _random_like(key, theta)
    direction = _tree.scale(1 / _tree.norm(direction), direction)
    eps = float(jnp.finfo(_tree.accumulation_dtype(theta)).eps)
    if scale is not None:
        number("taylor_test", "scale", scale)
    scale = float(_tree.norm(theta) if scale is None else scale) or 1.0
    steps = scale * np.geomspace(eps**0.5, 0.1, 12)

    evaluate = jax.jit(lambda h: jnp.asarray(function(_tree.add_scaled(theta, h, direction))))
    forward = np.array([float(evaluate(h)) for h in steps])
    backward = np.array([float(evaluate(-h)) for h in steps])
    here, directional = float(evaluate(0.0)), float(_tree.vdot(gradient, direction))
    remainders = np.abs(forward - here - steps * directional)
    usable = remainders > 100 * eps * max(abs(here), abs(directional) * scale)
    # The smallest steps that rounding leaves readable: there the leading term rules.
    chosen = np.flatnonzero(usable)[:6]
    slope = 2.0
    if len(chosen) >= 2:
        slope = float(np.polyfit(np.log(steps[chosen]), np.log(remainders[chosen]), 1)[0])
    central = (forward - backward) / (2 * steps)
    best = int(np.argmin(np.abs(np.diff(central))))
    difference = float(central[best])
    error = abs(difference - directional) / (max(abs(difference), abs(directional)) or 1.0)
    return TaylorTest(slope, difference, directional, error, steps, remainders)


def hypergradient_error(
    inner: Solver[X, Theta] | Iteration[X, Theta] | Operator[X, Theta] | Callable[[X, Theta], X],
    outer: Callable[..., Any],
    x: X,
    theta: Theta,
    gradient: Theta,
    *data: Any,
    linear_solver: LinearSolver | None = None,
) -> ErrorEstimate:
    r"""Returns an estimate of the error of a hypergradient, from any estimator, at an inexact inner solution.

    Two Newton steps towards the fixed point, the second with the Jacobian of the first, and the adjoint solution there,

    .. math:: \hat x = x - d_1 - d_2, \quad d_i = (I - \partial_x T)^{-1} (x_i - T(x_i, \theta)), \quad
        \hat v = (I - \partial_x T(\hat x))^{-\top} \nabla_x \ell(\hat x, \theta), \quad
        \hat g = \nabla_\theta \ell + \partial_\theta T^\top \hat v

    and :math:`\mathrm{error} = 2 (\|\hat g - g\| + \varepsilon) / (1 - \|d_2\| / \|d_1\|)`, where :math:`\varepsilon`
    is what the adjoint solve, by its own estimate, does not know. Asymptotically the estimate is twice the error,
    whatever the condition that the dtype can hold; a product of a contraction probe and the residuals bounds the error
    too, but overestimates by the condition number wherever a residual does not lie in its worst direction.

    When: to see how far to trust a hypergradient from a solve that was cut short: implicit, one-step, truncated,
    unrolled, or of any other make. Assumes an isolated fixed point with T differentiable there (for a proximal map: the
    active set found). It is an estimate, not a proof: far from the solution, where Newton's steps do not shrink, the
    error is infinite.

    Args:
        inner: what has an operator: a solver, an iteration, an operator, or a function ``(x, theta) -> x``.
        outer: :math:`\ell`, ``(x, theta, *data) -> scalar``.
        x: the inexact inner solution, such as ``info.x``.
        theta: the hyper-variable.
        gradient: g, like theta.
        data: of the outer loss.
        linear_solver: of the corrections. Default: conjugate gradients where the operator is declared symmetric, else
            GMRES. A looser tolerance is cheaper, and blind to directions that are weaker than it in the right side.

    Raises:
        TypeError: no operator; a loss that is not a real scalar; a gradient that is not like theta.

    Cost: three linear solves, three applications of T, one gradient of the outer loss.

    Source: the adjoint-corrected estimates of Pierce and Giles (2000), with the correction evaluated rather than
    linearised; the test of the steps: Deuflhard (2011), section 2.1; sensitivity of inexact hypergradients: Pedregosa
    (2016), theorem 1; Ehrhardt and Roberts (2024).

    Example:
        >>> import odljax as odl
        >>> T = lambda x, theta: 0.5 * x + theta  # the solution is 2 theta
        >>> report = odl.diagnostics.hypergradient_error(T, lambda x, theta: x**2, 1.9, 1.0, 7.6)
        >>> float(report.corrected), round(float(report.error), 3)  # the error of 7.6 is 0.4
        (8.0, 0.8)
    """
    who = "hypergradient_error"
    is_callable(who, "outer", outer)
    operator = _operator_of(who, inner)
    differentiable(who, theta)
    x, theta = as_inner(who, "x", x), _tree.strong(theta)
    gradient = same_as(who, "the gradient", gradient, theta, "theta")

    def loss(x: X, theta: Theta) -> Array:
        return scalar(who, "the outer loss", outer(x, theta, *data))

    return estimate_error(operator, loss, x, theta, gradient, None, linear_solver)


class Comparison(NamedTuple):
    """Several estimators at one point, each entry in the order in which they came; ``print`` shows a table.

    Attributes:
        names: of the estimators.
        values: their outer values.
        gradients: their gradients.
        errors: ``||g - r|| / ||r||``, relative to the reference.
        statuses: codes of ``odl.Status``.
        seconds: median blocked time of one update, after compilation and warm-up.
        compile_seconds: of tracing and compiling.
        num_bytes: temporary, output and code bytes by the compiler's account; None where the platform tells nothing.
    """

    names: list[str]
    values: list[float]
    gradients: list[Any]
    errors: list[float]
    statuses: list[Status]
    seconds: list[float]
    compile_seconds: list[float]
    num_bytes: list[int | None]

    def __str__(self) -> str:
        header = ["estimator", "value", "gradient error", "ms", "compile ms", "KiB", "status"]
        rows = [
            [
                name, f"{value:.6g}", f"{error:.1e}", f"{1e3 * seconds:.3g}", f"{1e3 * compiling:.0f}",
                "-" if size is None else f"{size / 1024:.1f}", status.name,
            ]
            for name, value, error, seconds, compiling, size, status in zip(
                self.names, self.values, self.errors, self.seconds, self.compile_seconds, self.num_bytes, self.statuses,
                strict=True,
            )
        ]  # fmt: skip
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

        def line(row: list[str]) -> str:
            cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            return "  ".join([row[0].ljust(widths[0]), *cells[1:-1], row[-1]])

        return "\n".join(map(line, [header, *rows]))


def compare(
    estimators: Mapping[str, Hypergradient | tuple[Hypergradient, tuple[Any, ...]]],
    theta: Any,
    x0: Any,
    *data: Any,
    reference: Any = None,
    num_updates: int = 1,
    rounds: int = 5,
) -> Comparison:
    r"""Returns what several estimators say at one point, what it cost, and how far they are from a reference.

    When: to choose an estimator for a problem, on the problem. Runs outside compiled code.

    Args:
        estimators: by the names that the table shows; at least one. A pair ``(estimator, data)`` gives it data of its
            own: estimators of solvers hand all data to the outer loss, those of two losses take a pair of data.
        theta: the point.
        x0: the inner start of all of them.
        data: what ``init`` and ``update`` take beyond these.
        reference: the true gradient, a pytree like theta; or the name of one of the estimators. None: the first.
        num_updates: updates at the fixed theta, at least 1, of which the last counts: single-loop estimators approach
            the hypergradient over many. Time and bytes are those of one update.
        rounds: timed calls, at least 1.

    Raises:
        TypeError: an estimator that is none.
        ValueError: no estimator, an unknown reference, a count below 1.

    Cost: for each estimator one compilation and ``num_updates + rounds`` updates.

    Example:
        >>> import odljax as odl
        >>> problem = odl.problems.ridge()
        >>> inner = odl.gradient_descent(problem.objective, problem.step_size)
        >>> solver = odl.until_converged(inner, max_steps=200)
        >>> table = odl.diagnostics.compare(
        ...     {"implicit": odl.hypergradients.through(odl.implicit(solver), problem.outer),
        ...      "one step": odl.hypergradients.through(odl.one_step(solver), problem.outer)},
        ...     problem.theta, problem.x0, reference=problem.hypergradient(problem.theta))
        >>> print(table)  # doctest: +SKIP
        estimator     value  gradient error     ms  compile ms  KiB  status
        implicit   0.154306         1.2e-07  0.012         182  2.1  CONVERGED
        one step   0.154306         2.8e-01  0.010         120  1.8  CONVERGED
        >>> table.errors[0] < 1e-4 < table.errors[1]
        True
    """
    who = "compare"
    num_updates, rounds = count(who, "num_updates", num_updates), count(who, "rounds", rounds)
    if not estimators:
        raise ValueError(f"{who}: needs at least one estimator; none came.")
    pairs = [entry if isinstance(entry, tuple) else (entry, data) for entry in estimators.values()]
    for name, (hyper, _) in zip(estimators, pairs, strict=True):
        is_a(who, f"estimators[{name!r}]", hyper, Hypergradient, "Make one with odl.hypergradients.")
    theta = as_inner(who, "theta", theta)
    reports = [_measure(hyper, theta, x0, own, num_updates, rounds) for hyper, own in pairs]
    gradients = [report[0] for report in reports]
    names = list(estimators)
    if reference is None or isinstance(reference, str):
        reference = names[0] if reference is None else reference
        if reference not in estimators:
            raise ValueError(f"{who}: reference is {reference!r}, but the estimators are {', '.join(names)}.")
        reference = gradients[names.index(reference)]
    reference = same_as(who, "the reference", reference, theta, "theta")
    scale = float(_tree.norm(reference)) or 1.0
    errors = [float(_tree.norm(_tree.subtract(gradient, reference))) / scale for gradient in gradients]
    infos = [report[1] for report in reports]
    return Comparison(
        names,
        [float(info.value) for info in infos],
        gradients,
        errors,
        [Status(int(info.status)) for info in infos],
        *(list(column) for column in zip(*(report[2] for report in reports), strict=True)),
    )


def _measure(
    hyper: Hypergradient, theta: Any, x0: Any, data: tuple[Any, ...], num_updates: int, rounds: int
) -> tuple[Any, Any, tuple[float, float, int | None]]:
    """Gradient and info of the last update, and (seconds, compile seconds, bytes) of one."""
    state = hyper.init(theta, x0, *data)
    start = time.perf_counter()
    update = jax.jit(hyper.update).lower(theta, state, *data).compile()
    compiling = time.perf_counter() - start
    gradient, info = None, None
    for _ in range(num_updates):
        gradient, state, info = update(theta, state, *data)
    jax.block_until_ready(state)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(update(theta, state, *data))
        times.append(time.perf_counter() - start)
    memory = update.memory_analysis()
    size = None
    if memory is not None:
        size = memory.temp_size_in_bytes + memory.output_size_in_bytes + memory.generated_code_size_in_bytes
    return gradient, info, (statistics.median(times), compiling, size)


def _operator_of(who: str, inner: Any) -> Operator:
    """The operator of a solver or an iteration, or that which a function is."""
    walk = inner.iteration if isinstance(inner, Solver) else inner
    if isinstance(walk, Iteration) and walk.operator is None:
        raise TypeError(f"{who}: inner needs an operator, and {walk.name} has none: it has no fixed point.")
    return cast(Operator, walk.operator) if isinstance(walk, Iteration) else as_operator(walk)


def _random_like(key: Array, x: X) -> X:
    """Standard normal numbers in the structure of x."""
    leaves, structure = jax.tree.flatten(x)
    keys = jax.random.split(key, len(leaves))
    noise = [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, noise)
