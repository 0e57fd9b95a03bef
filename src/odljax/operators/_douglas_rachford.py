"""Splittings on a governing sequence: two proximal operators, and a gradient between them."""

from __future__ import annotations

from typing import Any

from .. import _tree
from .._checks import coefficient_of_theta, is_callable, same_as
from .._types import Coefficient
from ._gradient import Objective, Prox, value_and_gradient
from ._operator import Operator, Residual


def douglas_rachford(prox_g: Prox, prox_h: Prox, step_size: Coefficient) -> Operator:
    r"""Returns the Douglas-Rachford operator on the governing sequence u.

    It solves :math:`\min_x g(x) + h(x)` by

    .. math:: T(u) = u + \operatorname{prox}_{\gamma g}(2 x - u) - x, \qquad x = \operatorname{prox}_{\gamma h}(u)

    and ``answer`` reads x. It is half the sum of the identity and ``peaceman_rachford``.

    When: g and h are convex with cheap proximal operators, neither smooth. Firmly non-expansive in the identity metric
    for every :math:`\gamma > 0`; relaxed by ``averaged`` or ``krasnoselskii_mann`` up to 2. Scaled ADMM is the same
    iteration in other variables (``admm``). The fixed point :math:`u = x + \gamma h'(x)` is unique only as far as the
    subgradient is; x may be so all the same, and GMRES, the default of ``implicit``, then differentiates x. A denoiser
    may stand for either proximal operator: ``lambda v, theta, step_size: denoiser(v, theta)``.

    Shapes: u as x.

    Args:
        prox_g: ``(v, theta, step_size) -> v``, of ``step_size * g``.
        prox_h: the same for h.
        step_size: :math:`\gamma > 0`, a number or a function of theta.

    Raises:
        ValueError: a step size that is not positive.
        TypeError: an argument that must be a function and is none; at trace time, a prox that changes structure, shape
            or dtype.

    Cost: both proximal operators; one more of h to read the answer.

    Source: Lions and Mercier (1979), algorithm II; Eckstein and Bertsekas (1992), section 4.

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> T = odl.operators.douglas_rachford(  # the projection of theta on the simplex, cut at 0.6
        ...     lambda v, theta, step_size: odl.prox.simplex((v + step_size * theta) / (1 + step_size)),
        ...     lambda v, theta, step_size: odl.prox.box(v, (0.0, 0.6)), step_size=1.0)
        >>> solver = odl.until_converged(odl.fixed_point(T), tol=1e-6, max_steps=500)
        >>> theta = jnp.array([1.0, 0.3, 0.1])
        >>> [round(float(entry), 4) for entry in T.answer(solver(jnp.zeros(3), theta).x, theta)]
        [0.6, 0.3, 0.1]
    """
    return _governed("douglas_rachford", None, prox_g, prox_h, step_size, 1.0)


def peaceman_rachford(prox_g: Prox, prox_h: Prox, step_size: Coefficient) -> Operator:
    r"""Returns the Peaceman-Rachford operator on the governing sequence u: the composition of the reflections.

    .. math:: T(u) = R_g(R_h(u)), \qquad R = 2 \operatorname{prox}_\gamma - I

    It has the fixed points, and the ``answer``, of ``douglas_rachford``.

    When: g or h is strongly convex and smooth, where it converges, and faster than Douglas-Rachford; in general
    it is only non-expansive in the identity metric, and may turn in circles: relax it by ``krasnoselskii_mann``.

    Shapes: u as x.

    Args:
        prox_g: ``(v, theta, step_size) -> v``, of ``step_size * g``.
        prox_h: the same for h.
        step_size: :math:`\gamma > 0`, a number or a function of theta.

    Raises:
        ValueError: a step size that is not positive.
        TypeError: an argument that must be a function and is none; at trace time, a prox that changes structure, shape
            or dtype.

    Cost: both proximal operators; one more of h to read the answer.

    Source: Lions and Mercier (1979), algorithm I.

    Example:
        >>> import odljax as odl
        >>> T = odl.operators.peaceman_rachford(  # (x - theta)^2 / 2 + x^2 / 2, whose minimiser is theta / 2
        ...     lambda v, theta, step_size: (v + step_size * theta) / (1 + step_size),
        ...     lambda v, theta, step_size: v / (1 + step_size), step_size=0.5)
        >>> solver = odl.until_converged(odl.fixed_point(T), tol=1e-6, max_steps=100)
        >>> round(float(T.answer(solver(0.0, 3.0).x, 3.0)), 4)
        1.5
    """
    return _governed("peaceman_rachford", None, prox_g, prox_h, step_size, 2.0)


def davis_yin(objective: Objective, prox_g: Prox, prox_h: Prox, step_size: Coefficient) -> Operator:
    r"""Returns the Davis-Yin (three-operator) splitting on the governing sequence u.

    It solves :math:`\min_x f(x) + g(x) + h(x)` by

    .. math:: T(u) = u + \operatorname{prox}_{\gamma g}(2 x - u - \gamma \nabla_x f(x, \theta)) - x, \qquad
        x = \operatorname{prox}_{\gamma h}(u)

    and ``answer`` reads x.

    When: f is convex with L-Lipschitz gradient, g and h are convex with cheap proximal operators: a loss under two
    constraints, or one constraint and a penalty. With :math:`0 < \gamma < 2/L` averaged, with constant :math:`2 / (4 -
    \gamma L)`, in the identity metric. Of the uniqueness of u see ``douglas_rachford``, which is the case f = 0;
    with h = 0 it is ``forward_backward``.

    Shapes: u as x.

    Args:
        objective: f, ``(x, theta) -> scalar``.
        prox_g: ``(v, theta, step_size) -> v``, of ``step_size * g``.
        prox_h: the same for h.
        step_size: :math:`\gamma > 0`, a number or a function of theta.

    Raises:
        ValueError: a step size that is not positive.
        TypeError: an argument that must be a function and is none; at trace time, an objective that is not a real
            scalar, a prox that changes structure, shape or dtype.

    Cost: one gradient of f, both proximal operators; one more of h to read the answer.

    Source: Davis and Yin (2017), algorithm 1; the constant: proposition 2.1.

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> T = odl.operators.davis_yin(  # the least squares of three weights, on the simplex and none above 0.6
        ...     lambda x, theta: 0.5 * jnp.sum((x - theta) ** 2), lambda v, theta, step_size: odl.prox.simplex(v),
        ...     lambda v, theta, step_size: odl.prox.box(v, (0.0, 0.6)), step_size=1.0)
        >>> solver = odl.until_converged(odl.fixed_point(T), tol=1e-6, max_steps=500)
        >>> theta = jnp.array([1.0, 0.3, 0.1])
        >>> [round(float(entry), 4) for entry in T.answer(solver(jnp.zeros(3), theta).x, theta)]
        [0.6, 0.3, 0.1]
    """
    is_callable("davis_yin", "objective", objective, "x, theta")
    return _governed("davis_yin", objective, prox_g, prox_h, step_size, 1.0)


def _governed(
    who: str, objective: Objective | None, prox_g: Prox, prox_h: Prox, step_size: Coefficient, stretch: float
) -> Operator:
    is_callable(who, "prox_g", prox_g, "v, theta, step_size")
    is_callable(who, "prox_h", prox_h, "v, theta, step_size")
    step = coefficient_of_theta(who, "step_size", step_size)

    def readout(u: Any, theta: Any) -> Any:
        return same_as(who, "prox_h", prox_h(u, theta, step(theta)), u)

    def pieces(u: Any, theta: Any) -> tuple[Any, Any, Any, Any]:
        """x, x minus the other proximal point, and its two brackets: what h and f, and what g, push."""
        # Brackets that are exactly zero, in value and Jacobian, where their proximal operator is locally the identity.
        x = readout(u, theta)
        forward = _tree.add(x, _tree.subtract(x, u))
        gap = _tree.subtract(u, x)
        if objective is not None:
            shift = _tree.scale(step(theta), value_and_gradient(who, objective, x, theta)[1])
            forward, gap = _tree.subtract(forward, shift), _tree.add(gap, shift)
        other = same_as(who, "prox_g", prox_g(forward, theta, step(theta)), u)
        rest = _tree.subtract(forward, other)
        return x, _tree.add(gap, rest), gap, rest

    def displacement(u: Any, theta: Any) -> Any:
        return _tree.scale(stretch, pieces(u, theta)[1])

    def residual(u: Any, theta: Any) -> tuple[Residual, ...]:
        x, apart, *pushes = pieces(u, theta)
        forces = [_tree.divide(push, step(theta)) for push in (apart, *pushes)]
        return Residual(forces[0], tuple(forces[1:])), Residual(apart, (x,))

    return Operator(
        apply=lambda u, theta: _tree.subtract(u, displacement(u, theta)),
        displacement=displacement,
        readout=readout,
        natural_residual=residual,
        name=who,
    )
