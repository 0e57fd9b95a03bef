"""Tseng's splitting of a monotone inclusion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import _tree
from .._checks import coefficient_of_theta, is_callable, same_as
from .._types import Coefficient
from ._gradient import Prox
from ._operator import Operator, Residual


def forward_backward_forward(
    monotone: Callable[[Any, Any], Any], prox: Prox | None = None, *, step_size: Coefficient
) -> Operator:
    r"""Returns Tseng's forward-backward-forward operator, whose fixed points are the zeros of :math:`\partial h + B`.

    .. math:: T(x, \theta) = p - \gamma (B(p, \theta) - B(x, \theta)), \qquad
        p = \operatorname{prox}_{\gamma h}(x - \gamma B(x, \theta))

    When: B is monotone and L-Lipschitz but not a gradient, where forward-backward may diverge: saddle points
    (:math:`B = (\nabla_x \mathcal L, -\nabla_y \mathcal L)`), games, and, with h the indicator of a set C,
    variational inequalities: find x in C with :math:`\langle B(x), z - x \rangle \ge 0` for all z in C. With
    :math:`0 < \gamma < 1/L` every application comes nearer to every fixed point x* in the identity metric,
    :math:`|T x - x^*|^2 \le |x - x^*|^2 - (1 - \gamma^2 L^2) |x - p|^2`, so it converges without relaxation; between
    other pairs of points T may expand.

    Shapes: x any pytree; B returns one like it.

    Args:
        monotone: B, ``(x, theta) -> B(x)``, like x.
        prox: ``(v, theta, step_size) -> v``, of ``step_size * h``. None: h = 0, the extragradient step.
        step_size: :math:`\gamma > 0`, a number or a function of theta.

    Raises:
        ValueError: a step size that is not positive.
        TypeError: an argument that must be a function and is none; at trace time, a B or prox that changes structure,
            shape or dtype.

    Cost: B twice, one prox.

    Source: Tseng (2000); without h it is the extragradient method of Korpelevich (1976).

    Example:
        >>> import jax, odljax as odl
        >>> L = lambda x, y, theta: x * y - theta * x + y  # its saddle point is (-1, theta)
        >>> field = lambda u, theta: (jax.grad(L, 0)(*u, theta), -jax.grad(L, 1)(*u, theta))
        >>> T = odl.operators.forward_backward_forward(field, step_size=0.5)
        >>> solver = odl.until_converged(odl.fixed_point(T), tol=1e-5, max_steps=500)
        >>> [round(float(entry), 3) for entry in solver((0.0, 0.0), 2.0).x]
        [-1.0, 2.0]
    """
    who = "forward_backward_forward"
    is_callable(who, "monotone", monotone, "x, theta")
    if prox is not None:
        is_callable(who, "prox", prox, "v, theta, step_size")
    step = coefficient_of_theta(who, "step_size", step_size)

    def push(x: Any, theta: Any) -> Any:
        return _tree.scale(step(theta), same_as(who, "monotone", monotone(x, theta), x))

    def pieces(x: Any, theta: Any) -> tuple[Any, Any, Any]:
        """The first push, the point after it and p."""
        first = push(x, theta)
        forward = _tree.subtract(x, first)
        if prox is None:
            return first, forward, forward
        return first, forward, same_as(who, "the prox", prox(forward, theta, step(theta)), x)

    def displacement(x: Any, theta: Any) -> Any:
        # x - p is the bracket and the first push, and that push cancels against the correction.
        _, forward, backward = pieces(x, theta)
        corrected = push(backward, theta)
        return corrected if prox is None else _tree.add(_tree.subtract(forward, backward), corrected)

    def residual(x: Any, theta: Any) -> tuple[Residual, ...]:
        first, forward, backward = pieces(x, theta)
        return (Residual(_tree.divide(_tree.add(_tree.subtract(forward, backward), first), step(theta))),)

    return Operator(
        apply=lambda x, theta: _tree.subtract(x, displacement(x, theta)),
        displacement=displacement,
        step_size=step,
        natural_residual=residual,
        name=who,
    )
