"""Splittings of a constrained problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.core import Tracer

from .. import _tree
from .._checks import coefficient_of_theta, is_callable, same_as
from .._types import Coefficient, Scalar, Theta
from ._operator import Operator


class ADMMVariables(NamedTuple):
    """The variables of an ADMM operator: code ``z``, slack ``e`` and multiplier ``y``."""

    z: Any
    e: Any
    y: Any


def linearized_admm(
    linear: Callable[[Any, Theta], Any],
    prox_z: Callable[[Any, Theta, Any], Any],
    prox_e: Callable[[Any, Theta, Any], Any],
    observation: Any,
    *,
    penalty: Coefficient = 1.0,
    proximal_weight: Scalar | Array | Callable[[Theta], Any],
) -> Operator:
    r"""Returns the linearised ADMM operator on ``ADMMVariables(z, e, y)``.

    It solves :math:`\min_{z, e} g(z) + h(e)` subject to :math:`A z + e = b` by

    .. math::
        z^+ &= \operatorname{prox}_{g/r}(z - \tfrac{\beta}{r} A^\top (A z + e - b + y/\beta)) \\
        e^+ &= \operatorname{prox}_{h/\beta}(b - A z^+ - y/\beta) \\
        y^+ &= y + \beta (A z^+ + e^+ - b)

    When: g and h are convex with cheap proximal operators and :math:`A^\top A` has no cheap inverse. With
    :math:`r > \beta \|A\|^2` the operator is non-expansive in the metric
    :math:`G = \operatorname{diag}(r I - \beta A^\top A, \beta I, I/\beta)`, which it carries, and not in the
    identity. It is not firmly so for every pair, but from its own outcomes towards a fixed point it is: it converges
    without relaxation.

    Shapes: z as g wants it; e, y and the observation b as A z. A, g and h may depend on theta, and so may r and beta.

    Args:
        linear: A, ``(z, theta) -> A z``, linear in z; its transpose is derived.
        prox_z: ``(v, theta, step_size) -> v``, of ``step_size * g``; called with step size 1/r.
        prox_e: the same for h; called with step size 1/beta.
        observation: b, or a function of theta.
        penalty: beta > 0, a number or a function of theta.
        proximal_weight: r, positive: a scalar, an array broadcastable to z (a diagonal metric), or a function of theta.

    Raises:
        ValueError: a penalty that is not positive.
        TypeError: an argument that must be a function and is none; at trace time, parts that change shape or dtype.

    Cost: A once forward on z, once on the new z, and its transpose once.

    Source: Lin, Liu and Su (2011), algorithm 1; metric: He and Yuan (2012).

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> l1 = lambda v, theta, step_size: odl.prox.l1(v, theta, step_size)
        >>> T = odl.operators.linearized_admm(lambda z, theta: 2.0 * z, l1, l1, jnp.ones(3), proximal_weight=5.0)
        >>> u = odl.operators.ADMMVariables(jnp.zeros(3), jnp.zeros(3), jnp.zeros(3))
        >>> [round(float(part[0]), 3) for part in T(u, 0.1)]
        [0.38, 0.14, -0.1]
    """
    who = "linearized_admm"
    is_callable(who, "linear", linear, "z, theta")
    is_callable(who, "prox_z", prox_z, "v, theta, step_size")
    is_callable(who, "prox_e", prox_e, "v, theta, step_size")
    if callable(proximal_weight):
        is_callable(who, "proximal_weight", proximal_weight, "theta")
    elif not isinstance(proximal_weight, Tracer) and not np.all(np.asarray(proximal_weight) > 0):
        raise ValueError(f"{who}: proximal_weight must be positive; {proximal_weight!r} came.")
    beta_of = coefficient_of_theta(who, "penalty", penalty)

    def given(value: Any, theta: Theta) -> Any:
        return value(theta) if callable(value) else value

    def image(z: Any, e: Any, theta: Theta) -> Any:
        return same_as(who, "linear", linear(z, theta), e, "e")

    def apply(u: ADMMVariables, theta: Theta) -> ADMMVariables:
        z, e, y = u
        beta, r, b = beta_of(theta), given(proximal_weight, theta), given(observation, theta)
        fitted, transpose = jax.vjp(lambda z: image(z, e, theta), z)
        violation = _tree.subtract(_tree.add(fitted, e), b)
        (slope,) = transpose(_tree.add(y, _tree.scale(beta, violation)))
        forward = jax.tree.map(lambda a, s: a - s / _as(r, s), z, slope)
        z = same_as(who, "prox_z", prox_z(forward, theta, 1 / r), z, "z")
        rest = _tree.subtract(b, image(z, e, theta))
        e = same_as(who, "prox_e", prox_e(_tree.add_scaled(rest, -1 / beta, y), theta, 1 / beta), e, "e")
        return type(u)(z, e, _tree.add_scaled(y, beta, _tree.subtract(e, rest)))

    def metric(v: ADMMVariables, theta: Theta) -> ADMMVariables:
        beta, r = beta_of(theta), given(proximal_weight, theta)
        fitted, transpose = jax.vjp(lambda z: linear(z, theta), v.z)
        (normal,) = transpose(_tree.scale(beta, fitted))
        z = jax.tree.map(lambda a, n: _as(r, a) * a - n, v.z, normal)
        return type(v)(z, _tree.scale(beta, v.e), _tree.scale(1 / beta, v.y))

    return Operator(apply, metric=metric, name=who)


def _as(weight: Any, leaf: Array) -> Array:
    return jax.numpy.asarray(weight).astype(leaf.dtype)
