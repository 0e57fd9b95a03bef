"""Methods of multipliers: an augmented Lagrangian is minimised in all of x, then the multiplier moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from .. import _tree
from .._checks import coefficient_of_theta, count, is_a, is_callable, same_as
from .._types import Coefficient
from ..linear import LinearSolver, cg
from ._gradient import Objective, Prox, value_and_gradient
from ._operator import Operator, Residual
from ._weights import (
    PrimalDual,
    Weight,
    expect,
    given,
    preconditioner_of,
    solve_definite,
    unweigh,
    weigh,
    weight_of_theta,
    with_adjoint,
)  # fmt: skip

LinearMap = Callable[[Any, Any], Any]


def proximal_alm(
    objective: Objective | None,
    linear: LinearMap,
    observation: Any,
    *,
    penalty: Coefficient = 1.0,
    proximal_weight: Any = 0.0,
    argmin: Callable[[Any, Any, Any, Any], Any] | None = None,
    num_newton_steps: int = 1,
    linear_solver: LinearSolver | None = None,
) -> Operator:
    r"""Returns the operator of the proximal method of multipliers on ``PrimalDual(x, y)``.

    It solves :math:`\min_x f(x)` subject to :math:`A x = b` by

    .. math::
        x^+ &= \arg\min_z f(z) + \tfrac{\beta}{2} |A z - b + y/\beta|^2 + \tfrac12 |z - x|^2_{G_0} \\
        y^+ &= y + \beta (A x^+ - b)

    and ``answer`` reads x.

    When: f is convex. The operator is then firmly non-expansive in the metric :math:`G = \operatorname{diag}(G_0,
    I/\beta)`, which it carries where :math:`G_0` is definite. Where it is not (0, the classical method of multipliers;
    a diagonal with a zero), x has directions without memory, and no metric is carried; of a function of theta or a
    linear map, which cannot be looked into, it is taken to be. The minimisation must be exact for this.
    By default it is a step of Newton's method from x, its system solved by conjugate gradients: exact where f is
    quadratic. Of any other smooth f it takes ``num_newton_steps``, undamped; whatever their number the fixed
    points, and the derivative there, are exact, because at a fixed point Newton's method starts at its root. An f
    that is not smooth, or has a cheap exact minimisation, brings its own ``argmin``; where only its proximal
    operator is cheap, see ``linearized_alm``.

    Where A has dependent rows y is not unique, but x is what the objective says: GMRES, the default of ``implicit``,
    still differentiates x.

    Shapes: x as f wants it; y and the observation b as A x. All of A, f, b and the weights may depend on theta.

    Args:
        objective: f, ``(x, theta) -> scalar``, smooth; None if ``argmin`` is given.
        linear: A, ``(x, theta) -> A x``, linear in x; its adjoint is derived.
        observation: b, or a function of theta.
        penalty: :math:`\beta > 0`, a number or a function of theta.
        proximal_weight: :math:`G_0 \ge 0`: a scalar, an array broadcastable to x (a diagonal), a function of theta
            that returns either, or a linear map ``(v, theta) -> v``.
        argmin: ``(x, v, theta, penalty) -> the minimiser over z of f(z) + penalty |A z - v|^2 / 2 + |z - x|^2_{G_0} /
            2``; it is called with :math:`v = b - y/\beta`, and differentiated as it stands.
        num_newton_steps: at least 1; one is exact for a quadratic f.
        linear_solver: of Newton's systems, symmetric positive definite; default ``odl.linear.cg()``. A failed
            solve gives NaN.

    Raises:
        ValueError: a penalty that is not positive, a negative weight, no Newton step.
        TypeError: an argument that must be a function and is none, neither or both of ``objective`` and ``argmin``; at
            trace time, parts that change shape or dtype.

    Cost: two products with A and one with its adjoint; each Newton step is a linear solve.

    Source: Rockafellar (1976), proximal method of multipliers; general :math:`G_0`: He, Liao, Han and Yang (2002).

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> T = odl.operators.proximal_alm(  # the nearest point to theta on the line x1 + x2 = 1
        ...     lambda x, theta: 0.5 * jnp.sum((x - theta) ** 2), lambda x, theta: jnp.sum(x), 1.0)
        >>> solver = odl.until_converged(odl.fixed_point(T), tol=1e-6, max_steps=100)
        >>> theta = jnp.array([2.0, 0.0])
        >>> solution = solver(odl.operators.PrimalDual(jnp.zeros(2), jnp.zeros(())), theta)
        >>> [round(float(entry), 4) for entry in T.answer(solution.x, theta)]
        [1.5, -0.5]
    """
    who = "proximal_alm"
    is_callable(who, "linear", linear, "x, theta")
    num_newton_steps = count(who, "num_newton_steps", num_newton_steps)
    beta_of = coefficient_of_theta(who, "penalty", penalty)
    G0 = preconditioner_of(who, "proximal_weight", proximal_weight, closed=True)
    solver = cg() if linear_solver is None else linear_solver
    is_a(who, "linear_solver", solver, LinearSolver, "Make one with odl.linear, for instance cg().")
    if (objective is None) == (argmin is None):
        raise TypeError(
            f"{who}: needs an objective, for Newton's method, or an argmin, which knows it; "
            f"{'neither' if argmin is None else 'both'} came. Give one of them."
        )
    if argmin is not None:
        is_callable(who, "argmin", argmin, "x, v, theta, penalty")
    else:
        is_callable(who, "objective", objective, "x, theta")

    def image(x: Any, y: Any, theta: Any) -> Any:
        return same_as(who, "linear", linear(x, theta), y, "y")

    def newton(x: Any, y: Any, theta: Any, beta: Any, b: Any) -> Any:
        """``x - x+``, which loses no digit to x."""

        def slope(z: Any) -> Any:
            _, own = value_and_gradient(who, objective, z, theta)  # pyright: ignore[reportArgumentType]
            fitted, adjoint = with_adjoint(lambda z: image(z, y, theta), z)
            pull = adjoint(_tree.add_scaled(y, beta, _tree.subtract(fitted, b)))
            return _tree.add(_tree.add(own, pull), G0.apply(_tree.subtract(z, x), theta))

        def step(_: Any, gap: Any) -> Any:
            gradient, hessian = jax.linearize(slope, _tree.subtract(x, gap))
            return _tree.add(gap, solve_definite(hessian, gradient, solver))

        gap = _tree.zeros_like(x)
        return step(0, gap) if num_newton_steps == 1 else jax.lax.fori_loop(0, num_newton_steps, step, gap)

    def pieces(u: PrimalDual, theta: Any) -> tuple[Any, Any, Any, tuple[Any, Any]]:
        """x+, x - x+, the step of y, and A x+ and b."""
        x, y = expect(who, u, PrimalDual)
        beta, b = beta_of(theta), given(observation, theta)
        if argmin is None:
            gap = newton(x, y, theta, beta, b)
            new = _tree.subtract(x, gap)
        else:
            v = _tree.subtract(b, _tree.scale(1 / beta, y))
            new = same_as(who, "argmin", argmin(x, v, theta, beta), x)
            gap = _tree.subtract(x, new)
        fitted = image(new, y, theta)
        return new, gap, _tree.scale(beta, _tree.subtract(fitted, b)), (fitted, b)

    def apply(u: PrimalDual, theta: Any) -> PrimalDual:
        new, _, move, _ = pieces(u, theta)
        return type(u)(new, _tree.add(u.y, move))

    def displacement(u: PrimalDual, theta: Any) -> PrimalDual:
        _, gap, move, _ = pieces(u, theta)
        return type(u)(gap, _tree.negative(move))

    def residual(u: PrimalDual, theta: Any) -> tuple[Residual, ...]:
        new, gap, move, terms = pieces(u, theta)
        dual = _tree.add(u.y, move)
        parts = Residual(_tree.subtract(*terms), terms), Residual(move, (u.y, dual)), Residual(gap, (u.x, new))
        if weightless:
            return parts
        # What the weight leaves of 0 in grad f + A'y, compared with the second term.
        pull = with_adjoint(lambda x: image(x, u.y, theta), new)[1](dual)
        return *parts, Residual(G0.apply(gap, theta), (pull,))

    def metric(v: PrimalDual, theta: Any) -> PrimalDual:
        return type(v)(G0.apply(v.x, theta), _tree.scale(1 / beta_of(theta), v.y))

    # Where G_0 has a zero the form is semidefinite: no metric.
    known = not callable(proximal_weight) and not isinstance(proximal_weight, Tracer)
    weightless = known and not np.any(np.asarray(proximal_weight))
    carried = None if known and not np.all(np.asarray(proximal_weight)) else metric
    return Operator(apply, displacement, carried, readout=lambda u, theta: u.x, natural_residual=residual, name=who)


def linearized_alm(
    prox: Prox,
    linear: LinearMap,
    observation: Any,
    *,
    penalty: Coefficient = 1.0,
    proximal_weight: Weight,
) -> Operator:
    r"""Returns the linearised method of multipliers on ``PrimalDual(x, y)``.

    The proximal method of multipliers for :math:`\min_x f(x)` subject to :math:`A x = b`, with the weight
    :math:`G_0 = r I - \beta A^\top A` that leaves of its minimisation one proximal operator:

    .. math::
        x^+ &= \operatorname{prox}_{f/r}(x - \tfrac1r A^\top (y + \beta (A x - b))) \\
        y^+ &= y + \beta (A x^+ - b)

    ``answer`` reads x.

    When: f is convex with a cheap proximal operator: basis pursuit, optimal transport. With :math:`r > \beta \|A\|^2`
    it is firmly non-expansive in the metric :math:`G = \operatorname{diag}(r I - \beta A^\top A, I/\beta)`, which it
    carries, and not in the identity.

    Shapes: x as f wants it; y and the observation b as A x. All of A, f, b, beta and r may depend on theta.

    Args:
        prox: ``(v, theta, step_size) -> v``, of ``step_size * f``; called with step size 1/r.
        linear: A, ``(x, theta) -> A x``, linear in x; its adjoint is derived.
        observation: b, or a function of theta.
        penalty: :math:`\beta > 0`, a number or a function of theta.
        proximal_weight: r, positive: a scalar, an array broadcastable to x (a diagonal metric, for a prox that takes
            a step size for each entry), or a function of theta.

    Raises:
        ValueError: a penalty or weight that is not positive.
        TypeError: an argument that must be a function and is none; at trace time, parts that change shape or dtype.

    Cost: two products with A, one with its adjoint, one prox.

    Source: Yang and Yuan (2013); as a weighted proximal method of multipliers: He, Liao, Han and Yang (2002).

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> T = odl.operators.linearized_alm(  # the sparsest way to make x1 + 2 x2 = theta
        ...     lambda v, theta, step_size: odl.prox.l1(v, 1.0, step_size),
        ...     lambda x, theta: x[0] + 2.0 * x[1], lambda theta: theta, proximal_weight=6.0)
        >>> solver = odl.until_converged(odl.fixed_point(T), tol=1e-6, max_steps=500)
        >>> solution = solver(odl.operators.PrimalDual(jnp.zeros(2), jnp.zeros(())), jnp.float32(4.0))
        >>> [round(float(entry), 3) for entry in T.answer(solution.x, 4.0)]
        [0.0, 2.0]
    """
    who = "linearized_alm"
    is_callable(who, "prox", prox, "v, theta, step_size")
    is_callable(who, "linear", linear, "x, theta")
    beta_of = coefficient_of_theta(who, "penalty", penalty)
    r_of = weight_of_theta(who, "proximal_weight", proximal_weight)

    def pieces(u: PrimalDual, theta: Any) -> tuple[Any, Any, Any, Any, tuple[Any, Any]]:
        """x+, the forward point, the step to it, the step of y, and A x and b."""
        x, y = expect(who, u, PrimalDual)
        beta, r, b = beta_of(theta), r_of(theta), given(observation, theta)

        def image(x: Any) -> Any:
            return same_as(who, "linear", linear(x, theta), y, "y")

        fitted, adjoint = with_adjoint(image, x)
        shift = unweigh(r, adjoint(_tree.add_scaled(y, beta, _tree.subtract(fitted, b))))
        forward = _tree.subtract(x, shift)
        new = same_as(who, "the prox", prox(forward, theta, 1 / r), x)
        return new, forward, shift, _tree.scale(beta, _tree.subtract(image(new), b)), (fitted, b)

    def apply(u: PrimalDual, theta: Any) -> PrimalDual:
        new, _, _, move, _ = pieces(u, theta)
        return type(u)(new, _tree.add(u.y, move))

    def displacement(u: PrimalDual, theta: Any) -> PrimalDual:
        new, forward, shift, move, _ = pieces(u, theta)
        return type(u)(_tree.add(_tree.subtract(forward, new), shift), _tree.negative(move))

    def residual(u: PrimalDual, theta: Any) -> tuple[Residual, ...]:
        new, forward, shift, move, terms = pieces(u, theta)
        r, kept = r_of(theta), _tree.subtract(forward, new)
        gap = _tree.add(kept, shift)
        return (
            Residual(_tree.subtract(*terms), terms),
            Residual(weigh(r, gap), (weigh(r, shift), weigh(r, kept))),
            Residual(move, (u.y, _tree.add(u.y, move))),
            Residual(gap, (u.x, new)),
        )

    def metric(v: PrimalDual, theta: Any) -> PrimalDual:
        beta = beta_of(theta)
        fitted, adjoint = with_adjoint(lambda x: linear(x, theta), v.x)
        normal = adjoint(_tree.scale(beta, fitted))
        return type(v)(_tree.subtract(weigh(r_of(theta), v.x), normal), _tree.scale(1 / beta, v.y))

    return Operator(apply, displacement, metric, readout=lambda u, theta: u.x, natural_residual=residual, name=who)
