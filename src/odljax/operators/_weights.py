"""What the metrics of the splittings are made of: weights of one leaf or entry, linear maps and their adjoints."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from .. import _tree, linear
from .._checks import describe, held, is_callable, same_as
from .._types import Scalar, Status

Weight = Scalar | Array | np.ndarray | Callable[..., Any]
"""A scalar, an array broadcastable to the leaves (a diagonal matrix), or a function of theta that returns either."""


class PrimalDual(NamedTuple):
    """The variables of a primal-dual operator: primal ``x`` and dual ``y``, the multiplier of A x."""

    x: Any
    y: Any


def expect(who: str, u: Any, kind: type) -> Any:
    """The variables of an operator, after checking that they are a named tuple with the fields of that kind."""
    wanted = kind._fields  # pyright: ignore[reportAttributeAccessIssue]
    if getattr(u, "_fields", None) != wanted:
        fields = ", ".join(wanted)
        came = describe(u) if hasattr(u, "shape") else f"a {type(u).__name__}"
        raise TypeError(
            f"{who}: x must be the variables {kind.__name__}({fields}); {came} came. Start from "
            f"odl.operators.{kind.__name__}, for instance of zeros in the shapes that the docstring says."
        )
    return u


def given(value: Any, theta: Any) -> Any:
    """The value, or what the function of theta returns."""
    return value(theta) if callable(value) else value


def weight_of_theta(who: str, name: str, value: Weight, *, closed: bool = False) -> Callable[[Any], Any]:
    """The weight as a function of theta, checked to be positive, or not negative if ``closed``; NaN where it is not."""
    if callable(value) or isinstance(value, Tracer):
        if callable(value):
            is_callable(who, name, value, "theta")
        return lambda theta: held(given(value, theta), 0.0, math.inf, closed)
    entries = np.asarray(value)
    if not jnp.issubdtype(entries.dtype, jnp.integer) and not jnp.issubdtype(entries.dtype, jnp.floating):
        raise TypeError(f"{who}: {name} must hold numbers, or be a function of theta; {value!r} came.")
    if not np.all(entries >= 0 if closed else entries > 0):
        raise ValueError(f"{who}: {name} must {'not be negative' if closed else 'be positive'}; {value!r} came.")
    return lambda theta: value


def as_weight(weight: Any, leaf: Array) -> Array:
    """The weight in the dtype and shape of the leaf."""
    return jnp.broadcast_to(jnp.asarray(weight).astype(leaf.dtype), leaf.shape)


def weigh(weight: Any, x: Any) -> Any:
    """``weight * x``, entry by entry."""
    return jax.tree.map(lambda leaf: as_weight(weight, leaf) * leaf, x)


def unweigh(weight: Any, x: Any) -> Any:
    """``x / weight``, entry by entry."""
    return jax.tree.map(lambda leaf: leaf / as_weight(weight, leaf), x)


def with_adjoint(map_linear: Callable[[Any], Any], x: Any) -> tuple[Any, Callable[[Any], Any]]:
    """``A x`` and the adjoint ``y -> A^* y``."""
    image, transpose = jax.vjp(map_linear, x)
    return image, lambda y: _tree.conjugate(transpose(_tree.conjugate(y))[0])


class Preconditioner(NamedTuple):
    """A positive-definite map P and its inverse, ``(v, theta) -> v``; where it is diagonal, its diagonal too."""

    apply: Callable[[Any, Any], Any]
    inverse: Callable[[Any, Any], Any] | None
    diagonal: Callable[[Any], Any] | None


def preconditioner_of(who: str, name: str, value: Any, *, closed: bool = False) -> Preconditioner:
    """P from a weight (a diagonal) or from a linear map ``(v, theta) -> P v``."""
    if callable(value) and _takes(value, 2):
        if _takes(value, 1):
            raise TypeError(
                f"{who}: {name} came as a function that may be called with theta (a diagonal) or with (v, theta) (a "
                f"linear map): {inspect.signature(value)}. Say which: lambda theta: f(...) or lambda v, theta: f(...)."
            )

        def mapped(v: Any, theta: Any) -> Any:
            return same_as(who, name, value(v, theta), v, "v")

        return Preconditioner(mapped, None, None)
    weight = weight_of_theta(who, name, value, closed=closed)
    return Preconditioner(lambda v, theta: weigh(weight(theta), v), lambda v, theta: unweigh(weight(theta), v), weight)


def _takes(function: Callable[..., Any], number: int) -> bool:
    try:
        inspect.signature(function).bind(*range(number))
    except TypeError:
        return False
    return True


def solve_definite(matvec: Callable[[Any], Any], b: Any, solver: linear.LinearSolver) -> Any:
    """``A^-1 b`` for a positive-definite A, NaN where the solver left a residual, differentiable in all it touches."""

    def solve(matvec: Callable[[Any], Any], b: Any) -> Any:
        v, info = solver(matvec, b)
        solved = (info.status < Status.STEP_BUDGET_SPENT) | (info.status == Status.ILL_CONDITIONED)
        return _tree.scale(jnp.where(solved, 1.0, jnp.nan), v)

    return linear.differentiable_solve(matvec, b, solve, symmetric=True)
