"""Steps along a gradient, alone or followed by a proximal operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from .. import _tree
from .._checks import coefficient_of_theta, is_callable, same_as, scalar
from .._types import Coefficient, Scalar
from ._operator import Operator

Objective = Callable[[Any, Any], Any]
Prox = Callable[[Any, Any, Any], Any]


def value_and_gradient(who: str, objective: Objective, x: Any, theta: Any) -> tuple[jax.Array, Any]:
    """The objective, checked to be a real scalar, and its gradient in x; in complex x the direction of steepest ascent.

    That is twice the Wirtinger derivative in the conjugate of x; ``jax.grad`` returns its conjugate.
    """
    value, gradient = jax.value_and_grad(lambda x: scalar(who, "the objective", objective(x, theta)))(x)
    return value, _tree.conjugate(gradient)


def gradient(objective: Objective, step_size: Coefficient) -> Operator:
    r"""Returns the operator of a gradient step, whose fixed points are the stationary points.

    .. math:: T(x, \theta) = x - \gamma \nabla_x f(x, \theta)

    When: f is smooth; convex with L-Lipschitz gradient and :math:`0 < \gamma \le 2/L` makes T non-expansive in the
    identity metric. Declared symmetric: :math:`I - T' = \gamma \nabla^2 f`, which conjugate gradients can solve where
    f is strongly convex at the solution.

    Args:
        objective: f, ``(x, theta) -> scalar``.
        step_size: :math:`\gamma > 0`, a number or a function of theta.

    Raises:
        ValueError: a step size that is not positive.
        TypeError: at trace time, an objective that is not a real scalar.

    Cost: one gradient of f.

    Source: Cauchy (1847); Nesterov (2018), section 2.1.5.

    Example:
        >>> import odljax as odl
        >>> T = odl.operators.gradient(lambda x, theta: 0.5 * (x - theta) ** 2, step_size=0.5)
        >>> float(T(0.0, 2.0))
        1.0
    """
    is_callable("gradient", "objective", objective, "x, theta")
    step = coefficient_of_theta("gradient", "step_size", step_size)

    def apply(x: Any, theta: Any) -> Any:
        return _tree.subtract(x, displacement(x, theta))

    def displacement(x: Any, theta: Any) -> Any:
        _, slope = value_and_gradient("gradient", objective, x, theta)
        return _tree.scale(step(theta), slope)

    return Operator(apply, displacement, symmetric=True, step_size=step, name="gradient")


def forward_backward(objective: Objective, prox: Prox, step_size: Coefficient) -> Operator:
    r"""Returns the forward-backward (proximal gradient) operator, whose fixed points minimise :math:`f + h`.

    .. math:: T(x, \theta) = \operatorname{prox}_{\gamma h}(x - \gamma \nabla_x f(x, \theta))

    When: f is smooth, h has a cheap proximal operator. Convex f with L-Lipschitz gradient and :math:`0 < \gamma < 2/L`
    makes T averaged, so non-expansive, in the identity metric. Its Jacobian is not symmetric.

    Args:
        objective: f, ``(x, theta) -> scalar``.
        prox: ``(v, theta, step_size) -> v``, the proximal operator of ``step_size * h(., theta)``. The operators in
            ``odljax.prox`` have this form, their parameter in the place of theta; select from a larger theta with
            ``lambda v, theta, step_size: prox.l1(v, theta["penalty"], step_size)``.
        step_size: :math:`\gamma > 0`, a number or a function of theta.

    Raises:
        ValueError: a step size that is not positive.
        TypeError: at trace time, an objective that is not a real scalar, a prox that changes structure, shape or dtype.

    Cost: one gradient of f and one prox.

    Source: Lions and Mercier (1979); Combettes and Wajs (2005), theorem 3.4.

    Example:
        >>> import odljax as odl
        >>> T = odl.operators.forward_backward(lambda x, theta: 0.5 * (x - 3.0) ** 2, odl.prox.l1, step_size=1.0)
        >>> float(T(0.0, 1.0))
        2.0
    """
    is_callable("forward_backward", "objective", objective, "x, theta")
    is_callable("forward_backward", "prox", prox, "v, theta, step_size")
    step = coefficient_of_theta("forward_backward", "step_size", step_size)

    def pieces(x: Any, theta: Any) -> tuple[Any, Any, Any]:
        return forward_backward_step(objective, prox, x, theta, step(theta))

    def displacement(x: Any, theta: Any) -> Any:
        # (p - prox p) + (x - p): where the prox is the identity the first bracket vanishes exactly and no digit of the
        # second is lost, neither in the value nor in the Jacobian.
        forward, backward, shift = pieces(x, theta)
        return _tree.add(_tree.subtract(forward, backward), shift)

    return Operator(lambda x, theta: pieces(x, theta)[1], displacement, step_size=step, name="forward_backward")


def forward_backward_step(
    objective: Objective, prox: Prox, x: Any, theta: Any, step_size: Scalar | jax.Array
) -> tuple[Any, Any, Any]:
    """The forward point, the backward point and the step between x and the forward point."""
    _, slope = value_and_gradient("forward_backward", objective, x, theta)
    shift = _tree.scale(step_size, slope)
    forward = _tree.subtract(x, shift)
    backward = same_as("forward_backward", "the prox", prox(forward, theta, step_size), x)
    return forward, backward, shift
