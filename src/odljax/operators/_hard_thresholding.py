"""Steps along a gradient that keep a given number of entries."""

from __future__ import annotations

from typing import Any

from .. import _support, _tree
from .._checks import coefficient_of_theta, count, is_callable
from .._types import Coefficient
from ._gradient import Objective, forward_backward_step
from ._operator import Operator


def hard_thresholding(
    objective: Objective, num_nonzeros: int, step_size: Coefficient, *, rows: bool = False
) -> Operator:
    r"""Returns the operator of iterative hard thresholding: a gradient step, then all but k entries are set to zero.

    .. math:: T(x, \theta) = H_k(x - \gamma \nabla_x f(x, \theta))

    Its fixed points minimise f on their support S, and no entry off it has a gradient above
    :math:`\min_{i \in S} |x_i| / \gamma` (a local minimiser of f over k-sparse x; a smaller step has more of them).

    When: :math:`\min f` over x with at most k nonzero entries; f with an L-Lipschitz gradient and
    :math:`\gamma < 1/L`, where every step descends. Sparse recovery is exact if the design satisfies a restricted
    isometry of order 3k. For speed: ``accelerated_hard_thresholding``.

    Derivative: with the support held, exactly that of the minimiser of f on S; it jumps where two entries tie.

    Non-expansive: in the identity, up to :math:`\gamma = 2/L`, between points whose steps keep the same entries, so
    near a fixed point without ties; nowhere across a tie, for :math:`H_k` jumps there.

    Args:
        objective: f, ``(x, theta) -> scalar``.
        num_nonzeros: k, at least 1, static: the entries that are kept; ties are broken in favour of the first.
        step_size: :math:`\gamma > 0`, a number or a function of theta.
        rows: keep k entries in each row (along the last axis of each leaf) rather than k in the whole tree.

    Raises:
        ValueError: num_nonzeros below 1, a step size that is not positive.
        TypeError: num_nonzeros is traced; at trace time, an objective that is not a real scalar.

    Cost: one gradient of f and one selection.

    Source: Blumensath and Davies (2009); fixed points: Blumensath and Davies (2008), Beck and Eldar (2013).

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> target = jnp.array([3.0, -1.0, 0.5])
        >>> T = odl.operators.hard_thresholding(lambda x, theta: 0.5 * jnp.sum((x - target) ** 2), 2, step_size=1.0)
        >>> T(jnp.zeros(3), None).tolist()
        [3.0, -1.0, 0.0]
    """
    who = "hard_thresholding"
    is_callable(who, "objective", objective, "x, theta")
    num_nonzeros = count(who, "num_nonzeros", num_nonzeros)
    step = coefficient_of_theta(who, "step_size", step_size)

    def threshold(v: Any, theta: Any, step_size: Any) -> Any:
        return _support.keep(v, _support.largest(v, num_nonzeros, rows=rows))

    def displacement(x: Any, theta: Any) -> Any:
        forward, backward, shift = forward_backward_step(objective, threshold, x, theta, step(theta))
        return _tree.add(_tree.subtract(forward, backward), shift)

    def apply(x: Any, theta: Any) -> Any:
        return forward_backward_step(objective, threshold, x, theta, step(theta))[1]

    return Operator(apply, displacement, step_size=step, name=who)
