"""Primal-dual splittings: a linear map between the variable and a non-smooth term, never inverted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import _tree
from .._checks import is_callable, same_as
from ._gradient import Objective, Prox, value_and_gradient
from ._operator import Operator, Residual
from ._weights import PrimalDual, Weight, expect, unweigh, weigh, weight_of_theta, with_adjoint


def chambolle_pock(
    prox_g: Prox,
    prox_h: Prox,
    linear: Callable[[Any, Any], Any],
    *,
    step_size: Weight,
    dual_step_size: Weight,
) -> Operator:
    r"""Returns the Chambolle-Pock (primal-dual hybrid gradient) operator on ``PrimalDual(x, y)``.

    It solves :math:`\min_x g(x) + h(A x)`, which is :math:`\min_x \max_y g(x) + \langle A x, y \rangle - h^*(y)`, by

    .. math::
        x^+ &= \operatorname{prox}_{t g}(x - t A^\top y) \\
        y^+ &= \operatorname{prox}_{s h^*}(y + s A (2 x^+ - x))

    and ``answer`` reads x. The proximal operator of the conjugate follows from that of h (Moreau): :math:`
    \operatorname{prox}_{s h^*}(v) = v - s \operatorname{prox}_{h/s}(v/s)`.

    When: g and h are convex with cheap proximal operators; total variation, linear programmes, optimal transport. With
    :math:`t s \|A\|^2 < 1` it is firmly non-expansive in the metric :math:`G = \begin{pmatrix} I/t & -A^\top \\ -A &
    I/s \end{pmatrix}`, which it carries, and not in the identity. The ratio of the steps is free, and matters: s/t is
    best near the squared ratio of the dual solution's distance to the primal's. Where y is not unique (dependent rows
    of A among the active ones) x may still be: GMRES, the default of ``implicit``, then differentiates x.

    Shapes: x as g wants it; y as A x. A, g, h and the steps may depend on theta.

    Args:
        prox_g: ``(v, theta, step_size) -> v``, of ``step_size * g``; called with step size t.
        prox_h: the same for h, not its conjugate; called with step size 1/s.
        linear: A, ``(x, theta) -> A x``, linear in x; its adjoint is derived.
        step_size: t > 0: a scalar, an array broadcastable to x (diagonal preconditioning, for a prox that takes a step
            size for each entry; the condition is then :math:`\|\operatorname{diag}(s)^{1/2} A
            \operatorname{diag}(t)^{1/2}\| < 1`), or a function of theta.
        dual_step_size: s > 0, the same for y.

    Raises:
        ValueError: a step size that is not positive.
        TypeError: an argument that must be a function and is none; at trace time, parts that change shape or dtype.

    Cost: one product with A, one with its adjoint, both proximal operators.

    Source: Chambolle and Pock (2011), algorithm 1 with :math:`\theta = 1`; metric: He and Yuan (2012); diagonal
    steps: Pock and Chambolle (2011).

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> T = odl.operators.chambolle_pock(  # denoising by total variation, |x - (0, 4)|^2 / 2 + theta |x2 - x1|
        ...     lambda v, theta, step_size: (v + step_size * jnp.array([0.0, 4.0])) / (1 + step_size), odl.prox.l1,
        ...     lambda x, theta: x[1:] - x[:-1], step_size=0.5, dual_step_size=0.5)
        >>> solver = odl.until_converged(odl.fixed_point(T), tol=1e-6, max_steps=500)
        >>> solution = solver(odl.operators.PrimalDual(jnp.zeros(2), jnp.zeros(1)), 0.5)
        >>> [round(float(entry), 4) for entry in T.answer(solution.x, 0.5)]
        [0.5, 3.5]
    """
    return _primal_dual("chambolle_pock", None, prox_g, prox_h, linear, step_size, dual_step_size)


def condat_vu(
    objective: Objective,
    prox_g: Prox,
    prox_h: Prox,
    linear: Callable[[Any, Any], Any],
    *,
    step_size: Weight,
    dual_step_size: Weight,
) -> Operator:
    r"""Returns the Condat-Vu operator on ``PrimalDual(x, y)``: Chambolle-Pock with a smooth term taken by its gradient.

    It solves :math:`\min_x f(x) + g(x) + h(A x)` by

    .. math::
        x^+ &= \operatorname{prox}_{t g}(x - t (\nabla_x f(x, \theta) + A^\top y)) \\
        y^+ &= \operatorname{prox}_{s h^*}(y + s A (2 x^+ - x))

    and ``answer`` reads x.

    When: f is convex with L-Lipschitz gradient, g and h are convex with cheap proximal operators: an inverse problem
    with a constraint (g) and total variation (h after A). With :math:`1/t - s \|A\|^2 \ge L/2` it is non-expansive,
    and above that bound averaged, in the metric of ``chambolle_pock``, which it carries, and not in the identity.

    Shapes: x as f and g want it; y as A x. All of them may depend on theta, and so may the steps.

    Args:
        objective: f, ``(x, theta) -> scalar``.
        prox_g: ``(v, theta, step_size) -> v``, of ``step_size * g``; called with step size t.
        prox_h: the same for h, not its conjugate; called with step size 1/s.
        linear: A, ``(x, theta) -> A x``, linear in x; its adjoint is derived.
        step_size: t > 0: a scalar, an array broadcastable to x, or a function of theta; as in ``chambolle_pock``.
        dual_step_size: s > 0, the same for y.

    Raises:
        ValueError: a step size that is not positive.
        TypeError: an argument that must be a function and is none; at trace time, parts that change shape or dtype, an
            objective that is not a real scalar.

    Cost: that of ``chambolle_pock`` and one gradient of f.

    Source: Condat (2013), algorithm 3.1 with unit relaxation; Vu (2013).

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> T = odl.operators.condat_vu(  # |x - (-1, 4)|^2 / 2 + theta |x2 - x1| over x >= 0
        ...     lambda x, theta: 0.5 * jnp.sum((x - jnp.array([-1.0, 4.0])) ** 2), odl.prox.non_negative, odl.prox.l1,
        ...     lambda x, theta: x[1:] - x[:-1], step_size=0.5, dual_step_size=0.5)
        >>> solver = odl.until_converged(odl.fixed_point(T), tol=1e-6, max_steps=500)
        >>> solution = solver(odl.operators.PrimalDual(jnp.zeros(2), jnp.zeros(1)), 0.5)
        >>> [round(float(entry), 4) for entry in T.answer(solution.x, 0.5)]
        [0.0, 3.5]
    """
    is_callable("condat_vu", "objective", objective, "x, theta")
    return _primal_dual("condat_vu", objective, prox_g, prox_h, linear, step_size, dual_step_size)


def _primal_dual(
    who: str,
    objective: Objective | None,
    prox_g: Prox,
    prox_h: Prox,
    linear: Callable[[Any, Any], Any],
    step_size: Weight,
    dual_step_size: Weight,
) -> Operator:
    is_callable(who, "prox_g", prox_g, "v, theta, step_size")
    is_callable(who, "prox_h", prox_h, "v, theta, step_size")
    is_callable(who, "linear", linear, "x, theta")
    t_of = weight_of_theta(who, "step_size", step_size)
    s_of = weight_of_theta(who, "dual_step_size", dual_step_size)

    def pieces(u: PrimalDual, theta: Any) -> tuple[Any, Any, Any, Any, Any]:
        """x+, the forward point, the step to it from x, the step of y, and the terms of A' y + grad f and of y's."""
        x, y = expect(who, u, PrimalDual)
        t, s = t_of(theta), s_of(theta)

        def image(x: Any) -> Any:
            return same_as(who, "linear", linear(x, theta), y, "y")

        slope = with_adjoint(image, x)[1](y)
        slopes = (slope,)
        if objective is not None:
            own = value_and_gradient(who, objective, x, theta)[1]
            slope, slopes = _tree.add(slope, own), (slope, own)
        shift = weigh(t, slope)
        forward = _tree.subtract(x, shift)
        new = same_as(who, "prox_g", prox_g(forward, theta, t), x)
        reflected = image(_tree.add(new, _tree.subtract(new, x)))
        point = _tree.add(unweigh(s, y), reflected)
        split = same_as(who, "prox_h", prox_h(point, theta, 1 / s), y, "y")
        return new, forward, shift, weigh(s, _tree.subtract(reflected, split)), (slopes, (reflected, split))

    def apply(u: PrimalDual, theta: Any) -> PrimalDual:
        new, _, _, move, _ = pieces(u, theta)
        return type(u)(new, _tree.add(u.y, move))

    def displacement(u: PrimalDual, theta: Any) -> PrimalDual:
        new, forward, shift, move, _ = pieces(u, theta)
        return type(u)(_tree.add(_tree.subtract(forward, new), shift), _tree.negative(move))

    def residual(u: PrimalDual, theta: Any) -> tuple[Residual, ...]:
        # What the steps leave of 0 in dg + grad f + A'y and dh* - A x, and how far they lead, which a large step tells.
        new, forward, shift, move, (slopes, images) = pieces(u, theta)
        gap = _tree.add(_tree.subtract(forward, new), shift)
        return (
            Residual(unweigh(t_of(theta), gap), slopes),
            Residual(_tree.subtract(*images), images),
            Residual(gap, (u.x, new)),
            Residual(move, (u.y, _tree.add(u.y, move))),
        )

    def metric(v: PrimalDual, theta: Any) -> PrimalDual:
        fitted, adjoint = with_adjoint(lambda x: linear(x, theta), v.x)
        x = _tree.subtract(unweigh(t_of(theta), v.x), adjoint(v.y))
        return type(v)(x, _tree.subtract(unweigh(s_of(theta), v.y), fitted))

    return Operator(apply, displacement, metric, readout=lambda u, theta: u.x, natural_residual=residual, name=who)
