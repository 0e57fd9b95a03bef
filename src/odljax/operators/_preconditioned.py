"""Forward-backward in a metric of choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import _tree
from .._checks import is_callable, same_as
from ..linear import cg
from ._gradient import Objective, Prox, value_and_gradient
from ._operator import Operator, Residual
from ._weights import preconditioner_of, solve_definite


def preconditioned_forward_backward(
    objective: Objective,
    prox: Prox,
    preconditioner: Any,
    *,
    preconditioner_inverse: Callable[[Any, Any], Any] | None = None,
) -> Operator:
    r"""Returns the forward-backward operator in the metric of a preconditioner P.

    .. math:: T(x, \theta) = \operatorname{prox}^P_h(x - P^{-1} \nabla_x f(x, \theta)), \qquad
        \operatorname{prox}^P_h(v) = \arg\min_x h(x) + \tfrac12 |x - v|_P^2

    When: f is badly scaled, and a diagonal (or another cheap) P near its Hessian is known: proximal Newton with a
    constant metric. Convex f with :math:`P \succ \tfrac12 \nabla^2 f` everywhere, so :math:`P \ge (L/2) I` suffices,
    makes T averaged, and with equality non-expansive, in the metric P, which it carries, and not in the identity. With
    :math:`P = I/\gamma` it is ``forward_backward``.

    Args:
        objective: f, ``(x, theta) -> scalar``.
        prox: ``(v, theta, step_size) -> v``, the proximal operator of h in the metric P. Of a diagonal P it gets the
            step sizes 1/P: a separable operator of ``odljax.prox`` that takes one for each entry needs no more. Of
            another P it gets step size 1, and must know the metric itself.
        preconditioner: P, positive definite: a scalar, an array broadcastable to x (a diagonal), a function of theta
            that returns either, or a symmetric linear map ``(v, theta) -> P v``.
        preconditioner_inverse: ``(v, theta) -> P^-1 v``, for a P that is a map. None: by conjugate gradients.

    Raises:
        ValueError: a diagonal that is not positive.
        TypeError: an argument that must be a function and is none; an inverse beside a diagonal; at trace time, an
            objective that is not a real scalar, parts that change structure, shape or dtype.

    Cost: one gradient of f, one product with the inverse of P, one prox.

    Source: Chen and Rockafellar (1997); Combettes and Vu (2014).

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> scales = jnp.array([1.0, 100.0])
        >>> T = odl.operators.preconditioned_forward_backward(
        ...     lambda x, theta: 0.5 * jnp.sum(scales * (x - 3.0) ** 2), odl.prox.l1, scales)
        >>> [round(float(entry), 4) for entry in T(jnp.zeros(2), 1.0)]  # the solution, in one step
        [2.0, 2.99]
    """
    who = "preconditioned_forward_backward"
    is_callable(who, "objective", objective, "x, theta")
    is_callable(who, "prox", prox, "v, theta, step_size")
    P = preconditioner_of(who, "preconditioner", preconditioner)
    inverse = P.inverse
    if preconditioner_inverse is not None:
        is_callable(who, "preconditioner_inverse", preconditioner_inverse, "v, theta")
        if P.diagonal is not None:
            raise TypeError(
                f"{who}: preconditioner_inverse goes with a preconditioner that is a linear map; a diagonal came. "
                f"Leave the inverse out."
            )
        inverse = preconditioner_inverse

    def pieces(x: Any, theta: Any) -> tuple[Any, Any, Any]:
        _, slope = value_and_gradient(who, objective, x, theta)
        if inverse is None:
            shift = solve_definite(lambda v: P.apply(v, theta), slope, cg())
        else:
            shift = same_as(who, "preconditioner_inverse", inverse(slope, theta), x)
        forward = _tree.subtract(x, shift)
        step_size = 1.0 if P.diagonal is None else 1 / P.diagonal(theta)
        return same_as(who, "the prox", prox(forward, theta, step_size), x), forward, shift

    def displacement(x: Any, theta: Any) -> Any:
        backward, forward, shift = pieces(x, theta)
        return _tree.add(_tree.subtract(forward, backward), shift)

    def residual(x: Any, theta: Any) -> tuple[Residual, ...]:
        return (Residual(P.apply(displacement(x, theta), theta)),)  # in the unit of the gradient

    return Operator(
        lambda x, theta: pieces(x, theta)[0], displacement, P.apply, inverse, natural_residual=residual, name=who
    )
