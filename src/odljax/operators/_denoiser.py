"""Denoisers in the place of priors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import _tree
from .._checks import coefficient_of_theta, is_callable, same_as
from .._types import Coefficient
from ._gradient import Objective, forward_backward_step, value_and_gradient
from ._operator import Operator

Denoiser = Callable[[Any, Any], Any]


def plug_and_play(objective: Objective, denoiser: Denoiser, step_size: Coefficient) -> Operator:
    r"""Returns the plug-and-play operator: forward-backward with a denoiser as its proximal operator.

    .. math:: T(x, \theta) = D(x - \gamma \nabla_x f(x, \theta), \theta)

    When: f measures the misfit and a denoiser is the best prior there is. The fixed points, if there are any, are
    reached if D is averaged in the identity metric and :math:`0 < \gamma < 2/L` for a convex f with L-Lipschitz
    gradient. Of a network N of Lipschitz constant one, :math:`(I + N)/2` and :math:`(I - N)/2` are averaged; a D whose
    residual :math:`I - D` is a contraction converges where f is strongly convex enough. ``odl.diagnostics.expansion``
    probes a given D. No objective need exist; with a D that is linear, symmetric and within (0, I] it does: :math:`f +
    \langle x, (D^{-1} - I) x \rangle / (2 \gamma)`. The fixed points depend on the step size.

    The other splittings take the denoiser in the same way, as a proximal operator that does not look at its step:
    ``douglas_rachford(lambda v, theta, step_size: denoiser(v, theta), prox_of_the_misfit, step_size)``, and ``admm``.

    Args:
        objective: f, ``(x, theta) -> scalar``.
        denoiser: D, ``(v, theta) -> v``: a filter, a network with its weights in theta.
        step_size: :math:`\gamma > 0`, a number or a function of theta.

    Raises:
        ValueError: a step size that is not positive.
        TypeError: an argument that must be a function and is none; at trace time, an objective that is not a real
            scalar, a denoiser that changes structure, shape or dtype.

    Cost: one gradient of f and one application of D.

    Source: Venkatakrishnan, Bouman and Wohlberg (2013); forward-backward: Kamilov, Mansour and Wohlberg (2017);
    conditions: Ryu et al. (2019), theorem 1.

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> smooth = lambda v, theta: (1 - theta) * v + theta * jnp.mean(v)
        >>> T = odl.operators.plug_and_play(
        ...     lambda x, theta: 0.5 * jnp.sum((x - jnp.array([0.0, 4.0])) ** 2), smooth, step_size=1.0)
        >>> [round(float(entry), 4) for entry in T(jnp.zeros(2), 0.5)]
        [1.0, 3.0]
    """
    who = "plug_and_play"
    is_callable(who, "objective", objective, "x, theta")
    is_callable(who, "denoiser", denoiser, "v, theta")
    step = coefficient_of_theta(who, "step_size", step_size)

    def pieces(x: Any, theta: Any) -> tuple[Any, Any, Any]:
        return forward_backward_step(objective, lambda v, theta, step_size: denoiser(v, theta), x, theta, step(theta))

    def displacement(x: Any, theta: Any) -> Any:
        forward, backward, shift = pieces(x, theta)
        return _tree.add(_tree.subtract(forward, backward), shift)

    return Operator(lambda x, theta: pieces(x, theta)[1], displacement, name=who)


def red(objective: Objective, denoiser: Denoiser, step_size: Coefficient, weight: Coefficient = 1.0) -> Operator:
    r"""Returns the operator of regularisation by denoising: a gradient step with the denoiser's residual as gradient.

    .. math:: T(x, \theta) = x - \gamma (\nabla_x f(x, \theta) + \lambda (x - D(x, \theta)))

    When: as ``plug_and_play``, but the fixed points, :math:`\nabla f(x) + \lambda (x - D(x)) = 0`, do not depend on the
    step size, and weigh misfit against prior. With f convex, its gradient L-Lipschitz, D non-expansive and
    :math:`0 < \gamma < 2/(L + 2 \lambda)` it is averaged in the identity metric: a D of Lipschitz constant one will do
    as it is. Only for a D with symmetric Jacobian are these the stationary points of an objective, :math:`f +
    \tfrac\lambda2 \langle x, x - D(x) \rangle` where D is also homogeneous.

    Args:
        objective: f, ``(x, theta) -> scalar``.
        denoiser: D, ``(v, theta) -> v``: a filter, a network with its weights in theta.
        step_size: :math:`\gamma > 0`, a number or a function of theta.
        weight: :math:`\lambda \ge 0`, a number or a function of theta.

    Raises:
        ValueError: a step size that is not positive, a negative weight.
        TypeError: an argument that must be a function and is none; at trace time, an objective that is not a real
            scalar, a denoiser that changes structure, shape or dtype.

    Cost: one gradient of f and one application of D.

    Source: Romano, Elad and Milanfar (2017), steepest descent; conditions: Reehorst and Schniter (2019), Cohen, Elad
    and Milanfar (2021).

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> T = odl.operators.red(
        ...     lambda x, theta: 0.5 * jnp.sum((x - jnp.array([0.0, 4.0])) ** 2), lambda v, theta: jnp.mean(v) + 0 * v,
        ...     step_size=0.5, weight=lambda theta: theta)
        >>> solver = odl.until_converged(odl.fixed_point(T), tol=1e-6, max_steps=100)
        >>> [round(float(entry), 4) for entry in solver(jnp.zeros(2), 1.0).x]
        [1.0, 3.0]
    """
    who = "red"
    is_callable(who, "objective", objective, "x, theta")
    is_callable(who, "denoiser", denoiser, "v, theta")
    step = coefficient_of_theta(who, "step_size", step_size)
    weight_of = coefficient_of_theta(who, "weight", weight, closed=True)

    def displacement(x: Any, theta: Any) -> Any:
        _, slope = value_and_gradient(who, objective, x, theta)
        residual = _tree.subtract(x, same_as(who, "the denoiser", denoiser(x, theta), x))
        return _tree.scale(step(theta), _tree.add_scaled(slope, weight_of(theta), residual))

    return Operator(lambda x, theta: _tree.subtract(x, displacement(x, theta)), displacement, step_size=step, name=who)
