"""Projection onto the monotone cone."""

from jax import Array
from jax.typing import ArrayLike

from .._types import Float, PyTree
from ._leafwise import describe, leafwise
from ._pav import isotonic_regression


def isotonic(
    v: PyTree[ArrayLike], parameter: str | None = None, step_size: object = 1.0
) -> PyTree[Float[Array, "..."]]:
    """Return the nearest non-decreasing row, or non-increasing one: isotonic regression, row by row.

    For monotone fits, calibration and ranking. The result is constant on blocks, each the mean of v there. h is the
    indicator of the monotone cone, so that the step size plays no part.

    Shapes: v [..., n], any tree of these (a 0-d leaf is a row of one).
    Args:
        v: tree of floating-point arrays; a row that holds NaN comes out as NaN.
        parameter: "increasing" (so is None) or "decreasing".
        step_size: ignored.
    Returns: a tree like v.
    Raises: TypeError where a leaf of v is not real floating-point; ValueError where the parameter is neither.
    At kinks: the derivative is the averaging within the blocks; equal neighbours that need no averaging stay blocks of
        their own.
    Cost: O(n log n) work a row.
    Source: Best and Chakravarti, 1990, "Active set algorithms for isotonic regression".

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.isotonic(jnp.array([1.0, 3.0, 2.0, 4.0])).tolist()
        [1.0, 2.5, 2.5, 4.0]
    """
    if not (parameter is None or (isinstance(parameter, str) and parameter in ("increasing", "decreasing"))):
        came = repr(parameter) if isinstance(parameter, str) else describe(parameter)
        raise ValueError(
            f'prox.isotonic needs parameter = "increasing" or "decreasing"; it is {came}; the direction fixes the '
            "program: pass one of the two, or None for increasing."
        )
    sign = -1 if parameter == "decreasing" else 1
    return leafwise("prox.isotonic", lambda x: sign * isotonic_regression(sign * x), v, rows=True)
