"""Hard thresholding with adaptive steps and conjugate gradients on the support."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .. import _support, _tree
from .._checks import coefficient_of_theta, count, is_callable
from .._types import Coefficient, State, Step
from ..operators import hard_thresholding
from ..operators._gradient import Objective, value_and_gradient
from ._iteration import Iteration, stateless


def accelerated_hard_thresholding(
    objective: Objective, num_nonzeros: int, step_size: Coefficient, *, num_refinements: int = 3, rows: bool = False
) -> Iteration:
    r"""Returns accelerated iterative hard thresholding: steps by exact line search, then a few on the support alone.

    .. math::
        \tilde x &= H_k(x - \mu g), \quad g = \nabla_x f(x, \theta), \quad
        \mu = \frac{\|g_S\|^2}{g_S^\top \nabla^2 f(x)\, g_S}, \quad S = \operatorname{supp}(x) \\
        x^+ &= \tilde x + d, \quad d \text{: steps of conjugate gradients on } f(\tilde x + d),\
        \operatorname{supp}(d) \subseteq \operatorname{supp}(\tilde x)

    A step is taken only if it does not raise f and, where entries enter the support,
    :math:`0.99\, \|\tilde x - x\|^2 \ge \mu \langle \nabla f(\tilde x) - \nabla f(x), \tilde x - x \rangle`; else
    ``step_size`` is used, which descends. The refinement, too, is kept only if it does not raise f.

    When: sparse recovery and best-subset regression, where the plain iteration is slow: on the support it converges at
    the rate of conjugate gradients. The operator, and so residual and implicit derivative, is that of
    ``hard_thresholding`` with ``step_size``.

    Args:
        objective: f, ``(x, theta) -> scalar``, twice differentiable.
        num_nonzeros: k, at least 1, static.
        step_size: :math:`\gamma > 0`, below 1/L for an L-Lipschitz gradient: a number or a function of theta.
        num_refinements: conjugate-gradient steps on the support, at least 0, static; with 0 it is normalised IHT.
        rows: keep k entries in each row (along the last axis of each leaf) rather than k in the whole tree.

    Raises:
        ValueError: num_nonzeros below 1, a step size that is not positive, a negative number of refinements.
        TypeError: num_nonzeros or num_refinements is traced; at trace time, an objective that is not a real scalar.

    Cost: three gradients, two more values and num_refinements + 1 Hessian products a step; no state.

    Source: normalised steps: Blumensath and Davies (2010), algorithm 1, which shrinks a refused step gradually instead;
    acceleration: Blumensath (2012), section 3; conjugate gradients on the support: Blanchard, Tanner and Wei (2015).

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> A, truth = jnp.array([[2.0, 0.0, 1.0], [0.0, 1.0, 0.5]]), jnp.array([0.0, 3.0, 0.0])
        >>> f = lambda x, theta: 0.5 * jnp.sum((A @ (x - truth)) ** 2)
        >>> walk = odl.accelerated_hard_thresholding(f, 1, step_size=0.18)
        >>> solution = odl.until_converged(walk, tol=1e-5)(jnp.zeros(3), None)
        >>> [round(float(entry), 3) for entry in solution.x]
        [0.0, 3.0, 0.0]
    """
    who = "accelerated_hard_thresholding"
    is_callable(who, "objective", objective, "x, theta")
    num_nonzeros = count(who, "num_nonzeros", num_nonzeros)
    safe_step = coefficient_of_theta(who, "step_size", step_size)
    operator = hard_thresholding(objective, num_nonzeros, step_size, rows=rows)
    num_refinements = count(who, "num_refinements", num_refinements, least=0)

    def step(x: Any, state: State, theta: Any, k: Step) -> tuple[Any, State]:
        def slope_of(x: Any) -> tuple[Any, Array]:
            value, slope = value_and_gradient(who, objective, x, theta)
            return slope, value

        def select(step_size: Any) -> tuple[Any, Any]:
            v = _tree.add_scaled(x, -step_size, slope)
            mask = _support.largest(v, num_nonzeros, rows=rows)
            return _support.keep(v, mask), mask

        slope, bend, value = jax.linearize(slope_of, x, has_aux=True)
        nonzero = jax.tree.map(lambda leaf: leaf != 0, x)
        # At x = 0 the entries with the largest gradients stand in for a support.
        stand_in = _support.largest(slope, num_nonzeros, rows=rows)
        along = _support.keep(slope, _tree.where(_any(nonzero), nonzero, stand_in))
        along = _tree.per_unit(along, _tree.magnitude(along))
        safe = jnp.asarray(safe_step(theta)).astype(_tree.accumulation_dtype(x))
        mu = _ratio(_tree.vdot(along, along), _tree.vdot(along, bend(along)), safe)
        tried, mask = select(mu)
        change = _tree.subtract(tried, x)
        new_slope, new_value = slope_of(tried)
        unit = _tree.magnitude(change)
        ahead = _tree.per_unit(change, unit)
        curvature = _tree.vdot(_tree.subtract(new_slope, slope), ahead)
        bounded = mu * curvature <= 0.99 * unit * _tree.vdot(ahead, ahead)
        rounding = 10 * jnp.finfo(value.dtype).eps * jnp.abs(value)
        entered = _any(jax.tree.map(lambda after, before: after & ~before, mask, nonzero))
        safely, safe_mask = select(safe)
        accepted = (bounded | ~entered) & (new_value <= value + rounding)
        x, mask = _tree.where(accepted, tried, safely), _tree.where(accepted, mask, safe_mask)
        return (refined(x, mask, theta) if num_refinements else x), state

    def refined(x: Any, mask: Any, theta: Any) -> Any:
        """Conjugate gradients on the support, kept where they do not raise the objective."""
        slope, bend = jax.linearize(lambda x: value_and_gradient(who, objective, x, theta)[1], x)
        rest = _support.keep(_tree.negative(slope), mask)
        unit = _tree.magnitude(rest)
        rest = _tree.per_unit(rest, unit)
        zero = jnp.zeros((), _tree.accumulation_dtype(x))

        def improve(carry: Any, _: None) -> Any:
            d, rest, along, size = carry
            image = _support.keep(bend(along), mask)
            alpha = _ratio(size, _tree.vdot(along, image), zero)
            d, rest = _tree.add_scaled(d, alpha, along), _tree.add_scaled(rest, -alpha, image)
            new = _tree.vdot(rest, rest)
            return (d, rest, _tree.add_scaled(rest, _ratio(new, size, zero), along), new), None

        start = (_tree.zeros_like(x), rest, rest, _tree.vdot(rest, rest))
        (d, *_), _ = jax.lax.scan(improve, start, length=num_refinements)
        better = _tree.add_scaled(x, unit, d)
        return _tree.where(objective(better, theta) <= objective(x, theta), better, x)

    return Iteration(stateless, step, operator, who)


def _any(mask: Any) -> Array:
    return jnp.any(jnp.stack([jnp.any(leaf) for leaf in jax.tree.leaves(mask)]))


def _ratio(numerator: Array, denominator: Array, otherwise: Array) -> Array:
    """The ratio where the denominator is positive, NaN where it is NaN."""
    sound = ~(denominator <= 0)
    return jnp.where(sound, numerator / jnp.where(sound, denominator, jnp.ones_like(denominator)), otherwise)
