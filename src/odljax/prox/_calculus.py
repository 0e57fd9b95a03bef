"""Operators from operators: the calculus of proximal maps."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from .. import _tree
from .._checks import is_callable, number
from .._moving import hoisted, moving
from .._types import Float, PyTree
from ._leafwise import STATIC, flatten, spread, widest

Prox = Callable[..., Any]


def conjugate(prox: Prox) -> Prox:
    """Return the proximal operator of the convex conjugate h*, v - s prox_{h/s}(v / s) with s = step_size (Moreau).

    For primal-dual methods, whose dual step needs h*. Computed in float32 at least.

    Shapes: those of prox.
    Args:
        prox: `(v, parameter, step_size) -> v` of a convex h (closed, proper); that of h itself, not of step_size * h,
            must be the one of step_size = 1.
    Returns: a function `(v, parameter, step_size=1.0)` with step_size > 0, a scalar or, where prox takes one, a tree of
        scalars that is a prefix of v.
    Raises: TypeError where prox is no such function; when called, TypeError where a leaf of v is not real
        floating-point, ValueError where step_size has a Python or NumPy number that is not positive, or its structure
        does not fit v.
    At kinks: what that of prox implies.
    Cost: that of prox.
    Source: Moreau, 1965; Parikh and Boyd, 2014, section 2.5.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.conjugate(prox.l1)(jnp.array([3.0, -0.5]), 2.0).tolist()  # onto the box |x| <= 2
        [2.0, -0.5]
    """
    is_callable("prox.conjugate", "prox", prox, "v, parameter, step_size")

    def of_conjugate(v: PyTree[ArrayLike], parameter: Any = None, step_size: Any = 1.0) -> PyTree[Float[Array, "..."]]:
        for step in jax.tree.leaves(step_size):
            number("prox.conjugate", "step_size", step)
        wide = _wide("prox.conjugate", v)
        steps = jax.tree.unflatten(jax.tree.structure(v), spread("prox.conjugate", "step_size", step_size, v))
        shrunk = jax.tree.map(lambda s, x: _tree.scale(1 / jnp.asarray(s), x), steps, wide)
        inner = prox(shrunk, parameter, jax.tree.map(lambda s: 1 / jnp.asarray(s), step_size))
        return _like(_tree.subtract(wide, jax.tree.map(_tree.scale, steps, inner)), v)

    return of_conjugate


def scale(prox: Prox, factor: Any) -> Prox:
    """Return the proximal operator of x -> h(factor * x): prox_{factor^2 s h}(factor v) / factor, s = step_size.

    For a penalty in other units.

    Shapes: those of prox.
    Args:
        prox: `(v, parameter, step_size) -> v`.
        factor: a number other than 0, traced or not; negative ones reflect.
    Returns: a function `(v, parameter, step_size=1.0)`, whose step_size is one that prox takes.
    Raises: TypeError where prox is no such function or factor no number; ValueError where it is a Python or NumPy 0.
    At kinks: what that of prox implies.
    Cost: that of prox.
    Source: Parikh and Boyd, 2014, section 2.2.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.scale(prox.l1, 2.0)(jnp.array([3.0, -0.5]), 1.0).tolist()  # h = |2 x|_1
        [1.0, 0.0]
    """
    is_callable("prox.scale", "prox", prox, "v, parameter, step_size")
    number("prox.scale", "factor", factor, low=-np.inf)
    if isinstance(factor, STATIC) and factor == 0:
        raise ValueError("prox.scale: factor must not be 0, for which h(factor * x) is constant; 0 came.")

    def of_scaled(v: PyTree[ArrayLike], parameter: Any = None, step_size: Any = 1.0) -> PyTree[Float[Array, "..."]]:
        wide, a = _wide("prox.scale", v), jnp.asarray(factor)

        def squared(s: Any) -> Array:
            dtype = jnp.result_type(s, float)  # a whole number as well
            return jnp.square(a).astype(dtype) * jnp.asarray(s, dtype)

        step = jax.tree.map(squared, step_size)
        return _like(_tree.scale(1 / a, prox(_tree.scale(a, wide), parameter, step)), v)

    return of_scaled


def translate(prox: Prox, offset: Any) -> Prox:
    """Return the proximal operator of x -> h(x - offset): offset + prox(v - offset).

    For a penalty around another point than 0: x near a reference, sparse deviations, a ball with a centre.

    Shapes: those of prox; offset is a tree like v, or a scalar.
    Args:
        prox: `(v, parameter, step_size) -> v`.
        offset: a number, or a tree of arrays with the structure of v that broadcast to its leaves.
    Returns: a function `(v, parameter, step_size=1.0)`.
    Raises: TypeError where prox is no such function; when called, ValueError where the structure of offset does not
        fit v.
    At kinks: what that of prox implies.
    Cost: that of prox.
    Source: Parikh and Boyd, 2014, section 2.2.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.translate(prox.l2_ball, 1.0)(jnp.array([1.0, 5.0]), 2.0).tolist()
        [1.0, 3.0]
    """
    is_callable("prox.translate", "prox", prox, "v, parameter, step_size")

    def of_translated(v: PyTree[ArrayLike], parameter: Any = None, step_size: Any = 1.0) -> PyTree[Float[Array, "..."]]:
        wide = _wide("prox.translate", v)
        try:
            whole = jax.tree.broadcast(offset, wide)
        except ValueError:
            raise ValueError(
                f"prox.translate needs offset to be a number or a tree like v; offset has structure "
                f"{jax.tree.structure(offset)} and v has {jax.tree.structure(v)}; give offset the structure of v."
            ) from None
        by = jax.tree.map(lambda o, x: jnp.broadcast_to(jnp.asarray(o, x.dtype), x.shape), whole, wide)
        return _like(_tree.add(by, prox(_tree.subtract(wide, by), parameter, step_size)), v)

    return of_translated


def separable(proxes: PyTree) -> Prox:
    """Return the operator that applies to each part of a tree a proximal operator of its own: h is the sum of theirs.

    For x with parts of different kinds: sparse weights beside a free bias, a simplex beside a ball.

    Shapes: those of the operators.
    Args:
        proxes: tree of functions `(v, parameter, step_size) -> v`, a prefix of v.
    Returns: a function `(v, parameter, step_size=1.0)`: parameter has the structure of proxes, with the parameter of
        each operator in its place (None where it has none), or is None for None to each; step_size is a scalar or has
        that structure, too.
    Raises: TypeError where a member of proxes is no such function; when called, ValueError where the structure of v or
        of parameter does not fit proxes.
    At kinks: those of the operators.
    Cost: that of the operators.
    Source: Parikh and Boyd, 2014, section 2.1.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> both = prox.separable({"w": prox.l1, "b": prox.identity})
        >>> y = both({"w": jnp.array([3.0, -0.5]), "b": jnp.array(0.5)}, {"w": 1.0, "b": None})
        >>> y["w"].tolist(), y["b"].tolist()
        ([2.0, 0.0], 0.5)
    """
    operators, structure = jax.tree.flatten(proxes)
    for operator in operators:
        is_callable("prox.separable", "each member of proxes", operator, "v, parameter, step_size")

    def parts(name: str, value: Any) -> list[Any]:
        try:
            return structure.flatten_up_to(value)
        except ValueError as error:
            raise ValueError(
                f"prox.separable needs {name} with the structure of proxes, {structure}; {error}; give each operator "
                f"its {name}."
            ) from None

    def of_parts(v: PyTree[ArrayLike], parameter: Any = None, step_size: Any = 1.0) -> PyTree[Float[Array, "..."]]:
        scalar_step = jax.tree.structure(step_size) == jax.tree.structure(0)
        steps = [step_size] * len(operators) if scalar_step else parts("step_size", step_size)
        parameters = [None] * len(operators) if parameter is None else parts("parameter", parameter)
        columns = zip(operators, parts("v", v), parameters, steps, strict=True)
        return jax.tree.unflatten(structure, [operator(*rest) for operator, *rest in columns])

    return of_parts


def from_projection(projection: Callable[..., Any]) -> Prox:
    """Return a projection as a proximal operator: h is the indicator of its set, and step_size plays no part.

    For projections of one's own or of other libraries, such as `optax.projections`.

    Shapes: those of the projection.
    Args:
        projection: `(v) -> v` or `(v, parameter) -> v`.
    Returns: a function `(v, parameter=None, step_size=1.0)` that hands parameter on unless it is None.
    Raises: TypeError where projection cannot be called.
    At kinks: those of the projection.
    Cost: that of the projection.
    Source: Parikh and Boyd, 2014, section 1.2.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> non_positive = prox.from_projection(lambda v: jnp.minimum(v, 0))
        >>> non_positive(jnp.array([1.0, -2.0]), step_size=0.1).tolist()
        [0.0, -2.0]
    """
    is_callable("prox.from_projection", "projection", projection)

    def of_indicator(v: PyTree[ArrayLike], parameter: Any = None, step_size: object = 1.0) -> PyTree:
        return projection(v) if parameter is None else projection(v, parameter)

    return of_indicator


def moreau_envelope(penalty: Callable[..., Any], prox: Prox) -> Callable[..., Float[Array, ""]]:
    """Return the Moreau envelope of h, (v, parameter, s) -> h(p) + |p - v|^2 / (2 s) with p = prox(v, parameter, s).

    A smooth lower bound of h with the same minimisers. Its derivatives are those of the envelope theorem: (v - p) / s
    in v, that of h at fixed p in the parameter, -|p - v|^2 / (2 s^2) in s = step_size, without differentiating h at its
    kinks or p at all; second derivatives differentiate these, forward or reverse.

    Shapes: v is a tree that prox takes; the value is a scalar (batch by `vmap`).
    Args:
        penalty: `(x, parameter) -> scalar`, h on its domain (an indicator is 0).
        prox: its proximal operator, `(v, parameter, step_size) -> v`.
    Returns: a function `(v, parameter=None, step_size=1.0)` with step_size > 0, a scalar. What penalty and prox close
        over may be differentiated, as the parameter may.
    Raises: TypeError where penalty or prox is no such function; when called, TypeError where a leaf of v is not real
        floating-point, ValueError where step_size is a Python or NumPy number that is not positive.
    At kinks: the value has none where h is convex.
    Cost: that of prox and of penalty.
    Source: Moreau, 1965; Parikh and Boyd, 2014, section 3.1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from odljax import prox
        >>> huber = prox.moreau_envelope(lambda x, lam: lam * jnp.sum(jnp.abs(x)), prox.l1)
        >>> jax.grad(huber)(jnp.array([3.0, -0.5]), 1.0).tolist()
        [1.0, -0.5]
    """
    is_callable("prox.moreau_envelope", "penalty", penalty, "x, parameter")
    is_callable("prox.moreau_envelope", "prox", prox, "v, parameter, step_size")

    def envelope(v: PyTree[ArrayLike], parameter: Any = None, step_size: Any = 1.0) -> Float[Array, ""]:
        number("prox.moreau_envelope", "step_size", step_size)
        wide = _wide("prox.moreau_envelope", v)
        leaves, structure = jax.tree.flatten(parameter)
        moved = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]

        def whole(values: list[Any]) -> Any:  # what is no real number fixes the program, and stays as it is
            filled = list(leaves)
            for i, value in zip(moved, values, strict=True):
                filled[i] = value
            return jax.tree.unflatten(structure, filled)

        def distance(v: Any, p: Any) -> Array:
            gap = _tree.subtract(p, v)
            return _tree.vdot(gap, gap) / 2

        # What penalty and prox close over may be differentiated, too: it travels as an operand.
        values = [jnp.asarray(leaves[i]) for i in moved]
        step = jnp.asarray(step_size, _tree.accumulation_dtype(wide))
        held = jax.lax.stop_gradient((wide, values, step))
        nearest, near = hoisted(lambda v, values, step: prox(v, whole(values), step), *held)
        height, tall = hoisted(lambda p, values: penalty(p, whole(values)), held[0], held[1])

        def value(v: Any, values: list[Any], step: Array, near: list[Any], tall: list[Any]) -> Array:
            p = nearest(v, values, step, *near)
            apart = distance(v, p)
            return jnp.asarray(height(p, values, *tall)).astype(apart.dtype) + apart / step.astype(apart.dtype)

        def tangent(_: Array, operands: Any, tangents: Any) -> Array:
            (v, values, step, near, tall), (v_dot, values_dot, step_dot, _, tall_dot) = operands, tangents
            p = nearest(v, values, step, *near)
            apart = distance(v, p)
            s = step.astype(apart.dtype)
            at_p = functools.partial(height, p)
            by_parameter = jax.jvp(at_p, (values, *tall), (values_dot, *tall_dot))[1]
            along = _tree.vdot(_tree.subtract(v, p), v_dot) / s
            along = along + jnp.asarray(by_parameter).astype(apart.dtype)
            return along - apart / jnp.square(s) * step_dot.astype(apart.dtype)

        operands = (wide, values, step, near, tall)
        return moving(value(*jax.lax.stop_gradient(operands)), operands, tangent)

    return envelope


def _wide(who: str, v: PyTree) -> PyTree:
    """v as arrays in float32 at least."""
    entries, structure = flatten(who, v)
    return jax.tree.unflatten(structure, [jnp.asarray(leaf, widest(jnp.result_type(leaf))) for _, leaf in entries])


def _like(y: PyTree, v: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: a.astype(jnp.result_type(b)), y, v)
