"""Mirror steps: gradients taken in the geometry of a Bregman distance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .. import _tree
from .._checks import as_inner, coefficient_of_theta, is_callable, same_as
from .._types import Coefficient
from ._gradient import Objective, value_and_gradient
from ._operator import Operator, Residual


def mirror(
    objective: Objective,
    to_dual: Callable[[Any, Any], Any],
    to_primal: Callable[[Any, Any], Any],
    step_size: Coefficient,
) -> Operator:
    r"""Returns the mirror (Bregman gradient) operator of a Legendre function :math:`\phi`.

    .. math:: T(x, \theta) = \nabla \phi^*(\nabla \phi(x) - \gamma \nabla_x f(x, \theta))

    When: f is convex and smooth relative to :math:`\phi`: :math:`L \phi - f` is convex, and :math:`\gamma \le 1/L`. T
    is then non-expansive in no fixed metric, so ``metric`` is None and ``expansion`` may show a factor above one; what
    falls, at every step and towards every minimiser, is the Bregman distance :math:`D_\phi(x^*, x) = \phi(x^*) -
    \phi(x) - \langle \nabla \phi(x), x^* - x \rangle`, and f. With a constraint or a term h, let ``to_primal`` be the
    minimiser of :math:`\phi(x) + \gamma h(x) - \langle v, x \rangle`.

    The implicit derivative holds where x* is in the interior of the domain of :math:`\phi`: there :math:`I - T' =
    \gamma \nabla^2 \phi(x^*)^{-1} \nabla^2 f(x^*)`, or that on the tangent space of the constraint.

    Args:
        objective: f, ``(x, theta) -> scalar``.
        to_dual: :math:`\nabla \phi`, ``(x, theta) -> v``, for instance ``lambda x, theta: jnp.log(x)`` for the entropy
            on positive numbers.
        to_primal: :math:`\nabla \phi^*`, ``(v, theta) -> x``, its inverse: there ``jnp.exp``.
        step_size: :math:`\gamma > 0`, a number or a function of theta.

    Raises:
        ValueError: a step size that is not positive.
        TypeError: an argument that must be a function and is none; at trace time, an objective that is not a real
            scalar, maps that change structure, shape or dtype.

    Cost: one gradient of f and both maps.

    Source: Nemirovski and Yudin (1983); Beck and Teboulle (2003); relative smoothness: Bauschke, Bolte and Teboulle
    (2017), Lu, Freund and Nesterov (2018).

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> T = odl.operators.mirror(  # positive numbers nearest to theta in the Kullback-Leibler sense
        ...     lambda x, theta: jnp.sum(x * jnp.log(x / theta) - x), lambda x, theta: jnp.log(x),
        ...     lambda v, theta: jnp.exp(v), step_size=1.0)
        >>> [round(float(entry), 4) for entry in T(jnp.ones(2), jnp.array([0.5, 3.0]))]
        [0.5, 3.0]
    """
    who = "mirror"
    is_callable(who, "objective", objective, "x, theta")
    is_callable(who, "to_dual", to_dual, "x, theta")
    is_callable(who, "to_primal", to_primal, "v, theta")
    step = coefficient_of_theta(who, "step_size", step_size)

    def apply(x: Any, theta: Any) -> Any:
        _, slope = value_and_gradient(who, objective, x, theta)
        dual = same_as(who, "to_dual", to_dual(x, theta), x)
        return to_primal(_tree.add_scaled(dual, -step(theta), slope), theta)

    return Operator(apply, step_size=step, name=who)


def entropic(objective: Objective, step_size: Coefficient, scale: Coefficient = 1.0) -> Operator:
    r"""Returns the exponentiated-gradient operator: the mirror step of the entropy on the simplex.

    .. math:: T(x, \theta)_i = \frac{s\, x_i\, e^{-\gamma g_i}}{\sum_j x_j\, e^{-\gamma g_j}}, \qquad
        g = \nabla_x f(x, \theta)

    When: x is a distribution (a portfolio, mixture weights, a strategy) and f is convex with
    :math:`|\partial_{ij} f| \le L` for all i, j: then, with :math:`\gamma \le 1/(L s)`, the Kullback-Leibler divergence
    from x to every minimiser falls at every step, and so does f. T is non-expansive in no fixed metric; ``metric`` is
    None. An entry that is zero stays zero: start inside, for instance at the uniform distribution. Steps depend on the
    number of entries through its logarithm only; minimisers on the boundary are approached, never met.

    The implicit derivative, with GMRES as ``implicit`` takes it, is that of the solution on the simplex: T maps onto
    the rows of sum s, so that :math:`I - T'` is invertible although a mirror step has no place to normalise in; at a
    minimiser on the boundary entries with :math:`g_i` above the multiplier are held at zero. It is not invertible where
    f is flat along a direction of the face, or an entry is zero with no multiplier of its own.

    Shapes: each leaf [..., n], a distribution along the last axis (a leaf without axes is a row of one).

    Args:
        objective: f, ``(x, theta) -> scalar``.
        step_size: :math:`\gamma > 0`, a number or a function of theta.
        scale: s > 0, the sum of each row, a number or a function of theta.

    Raises:
        ValueError: a step size or scale that is not positive.
        TypeError: at trace time, an objective that is not a real scalar.

    Cost: one gradient of f, one exponential and one logarithm; slopes of any size overflow nothing.

    Source: Kivinen and Warmuth (1997); as mirror descent: Beck and Teboulle (2003), section 5.

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> T = odl.operators.entropic(lambda x, theta: 0.5 * jnp.sum(theta * x**2), step_size=1.0)
        >>> solver = odl.until_converged(odl.fixed_point(T), tol=1e-6, max_steps=500)
        >>> theta = jnp.array([1.0, 2.0, 2.0])
        >>> [round(float(entry), 4) for entry in solver(jnp.ones(3) / 3, theta).x]  # proportional to 1 / theta
        [0.5, 0.25, 0.25]
    """
    who = "entropic"
    is_callable(who, "objective", objective, "x, theta")
    step = coefficient_of_theta(who, "step_size", step_size)
    total = coefficient_of_theta(who, "scale", scale)

    def apply(x: Any, theta: Any) -> Any:
        x = as_inner(who, "x", x)  # logarithms of distributions: real numbers
        _, slope = value_and_gradient(who, objective, x, theta)
        return jax.tree.map(lambda a, g: _exponentiated(a, g, step(theta), total(theta)), x, slope)

    def residual(x: Any, theta: Any) -> tuple[Residual, ...]:
        # x - T(x) over the step, as the step goes to zero: x (slope - its mean under x), and the sum that is not s.
        x = as_inner(who, "x", x)
        _, slope = value_and_gradient(who, objective, x, theta)
        sums = jax.tree.map(lambda a: _row_sum(a), x)
        own = jax.tree.map(jnp.multiply, x, slope)
        mean = jax.tree.map(lambda a, push, whole: a * (_row_sum(push) / whole), x, own, sums)
        wanted = jax.tree.map(lambda whole: jnp.full_like(whole, total(theta)), sums)
        return (
            Residual(_tree.subtract(own, mean), (own, mean)),
            Residual(_tree.subtract(sums, wanted), (wanted,)),
        )

    return Operator(apply, natural_residual=residual, name=who)


def _row_sum(x: Array) -> Array:
    if x.ndim == 0:
        return x
    return jnp.sum(x, axis=-1, keepdims=True, dtype=_tree.accumulation_dtype(x)).astype(x.dtype)


def _exponentiated(x: Array, slope: Array, step_size: Any, scale: Any) -> Array:
    like, wide = x, _tree.accumulation_dtype(x)
    x, slope = jnp.atleast_1d(x).astype(wide), jnp.atleast_1d(slope).astype(wide)
    powers = -jnp.asarray(step_size).astype(x.dtype) * slope
    held = jax.lax.stop_gradient(x)
    zero = held == 0
    # The largest term of the sum becomes one; the choice changes no answer, hence it has no derivative.
    logarithms = jnp.where(zero, -jnp.inf, jnp.log(jnp.where(zero, 1, held)) + jax.lax.stop_gradient(powers))
    powers = powers - jnp.max(logarithms, axis=-1, keepdims=True)
    # The factor of an entry that is zero, and no other, could overflow; the entry stays zero.
    ceiling = 0.5 * math.log(float(jnp.finfo(x.dtype).max))
    terms = x * jnp.exp(jnp.where(zero, jnp.minimum(powers, ceiling), powers))
    total = jnp.sum(terms, axis=-1, keepdims=True)
    return (jnp.asarray(scale).astype(x.dtype) / total * terms).astype(like.dtype).reshape(like.shape)
