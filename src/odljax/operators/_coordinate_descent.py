"""Coordinate descent: sweeps over the coordinates, or over blocks of them, that keep a prediction up to date."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from .. import _tree
from .._checks import as_inner, coefficient_of_theta, describe, is_callable, same_as, scalar
from .._types import Coefficient, Theta
from ._gradient import Prox
from ._operator import Operator, Residual

Loss = Callable[[Any, Any], Any]
Design = ArrayLike | Callable[[Any], Any]


def coordinate_descent(
    loss: Loss,
    design: Design,
    prox: Prox | None = None,
    *,
    lipschitz: Coefficient = 1.0,
    parameter: Callable[[Theta], Any] | None = None,
) -> Operator:
    r"""Returns the operator of one cyclic sweep of (proximal) coordinate descent.

    It minimises :math:`g(A x, \theta) + \sum_j h_j(x_j)`; for j = 1, ..., p in turn, with :math:`a_j` column j of A,

    .. math:: x_j \leftarrow \operatorname{prox}_{h_j / L_j}(x_j - a_j^\top \nabla g(A x, \theta) / L_j), \qquad
        L_j = L \|a_j\|^2

    When: p is not small beside n, and the curvatures of the coordinates differ: each takes the step that suits it. For
    least squares each update is an exact minimisation. The sweep descends the objective, and its fixed points are the
    minimisers, for convex g with an L-Lipschitz gradient and convex :math:`h_j`; it converges linearly where the
    objective is strongly convex.

    Non-expansive: without a prox, for a quadratic g, in the energy metric :math:`A^\top \nabla^2 g A`; not in the
    identity. (Each update is an orthogonal projection in it, relaxed by the curvature of its coordinate over
    :math:`L_j`: 1 for least squares.) The operator carries it, with the curvature of g at a prediction of zero, but
    where A is an array with more columns than rows, and it is singular. With a prox the sweep is in general
    non-expansive in neither and carries none: what is known there is descent, so theory that starts from a
    non-expansive map (averaging, ``hodl``) does not cover it.

    Shapes: x [p], A [n, p], the prediction A x [n]. Only x is the variable: A x is computed once a sweep and then kept
    up to date, O(n) a coordinate.

    Args:
        loss: g, ``(prediction, theta) -> scalar``, cheap beside A x and smooth: :math:`\tfrac12 \|u - b\|^2`, a
            logistic loss, :math:`\tfrac12 \|u\|^2` for the dual of a support vector machine.
        design: A, an array or a function of theta; cast to the dtype of x.
        prox: ``(v, theta, step_size) -> v`` of :math:`h_j`, called with one coordinate (an array without axes). A
            linear term c x is h, too: its prox moves v by -c step_size first. None: no h.
        lipschitz: L > 0, the Lipschitz constant of :math:`\nabla g`, a number or a function of theta: 1 for the least
            squares above, 1/4 for the logistic loss.
        parameter: a function of theta that returns what the prox gets in the place of theta: a pytree whose leaves have
            the leading axis p, one slice for each coordinate (weights of a weighted l1 norm, bounds of a box). None:
            the prox gets theta.

    Raises:
        ValueError: a Lipschitz constant that is not positive.
        TypeError: loss or prox is no function; at trace time, an x that is not one vector, a design whose shape does
            not fit it, a loss that is not a scalar, a prox that changes the shape or dtype of a coordinate.

    Cost: one product with A and a sweep that costs about one with A and one with its transpose; the p updates follow
    each other, so that it shines on a CPU rather than an accelerator.

    Source: Tseng (2001); Friedman, Hastie and Tibshirani (2010); rates: Beck and Tetruashvili (2013).

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> A, b = jnp.array([[1.0, 0.5], [0.0, 1.0], [0.0, 0.0]]), jnp.array([3.0, 0.2, 1.0])
        >>> half_squares = lambda prediction, theta: 0.5 * jnp.sum((prediction - b) ** 2)
        >>> sweep = odl.operators.coordinate_descent(half_squares, A, odl.prox.l1)
        >>> solution = odl.until_converged(odl.fixed_point(sweep), tol=1e-6)(jnp.zeros(2), 0.5)
        >>> [round(float(entry), 3) for entry in solution.x]
        [2.5, 0.0]
    """
    return _descent("coordinate_descent", loss, design, prox, lipschitz, parameter, blocks=False)


def block_coordinate_descent(
    loss: Loss,
    design: Design,
    prox: Prox | None = None,
    *,
    lipschitz: Coefficient = 1.0,
    parameter: Callable[[Theta], Any] | None = None,
) -> Operator:
    r"""Returns the operator of one cyclic sweep of (proximal) block coordinate descent; a block is a row of x.

    For :math:`\min_x g(A x, \theta) + \sum_j h_j(x_j)` over rows :math:`x_j`, for j = 1, ..., p in turn,

    .. math:: x_j \leftarrow \operatorname{prox}_{h_j / L_j}(x_j - A_j^\top \nabla g(A x, \theta) / L_j), \qquad
        L_j = L \|A_j\|^2

    When: entries are to enter the model together. Two layouts: several outcomes that share their features (multi-task,
    multinomial), where A has a column :math:`a_j` for each row of x; and groups of features of one outcome (group
    lasso), where A has a matrix :math:`A_j` for each row, whose squared norm is bounded by its Frobenius norm (exact
    for groups of one). Descent, fixed points and metric are those of ``coordinate_descent``, but where :math:`A_j` has
    several columns an update is a gradient step in its block rather than an exact minimisation.

    Shapes: x [p, k]. Several outcomes: A [n, p], the prediction A x [n, k]. Groups: A [n, p, k], the prediction [n].

    Args:
        loss: g, ``(prediction, theta) -> scalar``, smooth.
        design: A, an array or a function of theta; cast to the dtype of x.
        prox: ``(v, theta, step_size) -> v`` of :math:`h_j`, called with one row, such as ``odl.prox.group_lasso``.
            None: no h.
        lipschitz: L > 0, the Lipschitz constant of :math:`\nabla g`, a number or a function of theta: 1 for half the
            sum of squares, 1/2 for the multinomial logistic loss.
        parameter: a function of theta that returns what the prox gets in the place of theta: a pytree whose leaves have
            the leading axis p, one slice for each row. None: the prox gets theta.

    Raises:
        ValueError: a Lipschitz constant that is not positive.
        TypeError: loss or prox is no function; at trace time, an x that is not one matrix, a design whose shape does
            not fit it, a loss that is not a scalar, a prox that changes the shape or dtype of a row.

    Cost: one product with A and a sweep that costs about one with A and one with its transpose.

    Source: Tseng (2001); Yuan and Lin (2006) for groups; Beck and Tetruashvili (2013).

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> A, b = jnp.eye(2), jnp.array([[3.0, 4.0], [0.3, 0.4]])
        >>> half_squares = lambda prediction, theta: 0.5 * jnp.sum((prediction - b) ** 2)
        >>> sweep = odl.operators.block_coordinate_descent(half_squares, A, odl.prox.group_lasso)
        >>> sweep(jnp.zeros((2, 2)), 2.5).tolist()
        [[1.5, 2.0], [0.0, 0.0]]
    """
    return _descent("block_coordinate_descent", loss, design, prox, lipschitz, parameter, blocks=True)


def _descent(
    who: str,
    loss: Loss,
    design: Design,
    prox: Prox | None,
    lipschitz: Coefficient,
    parameter: Callable[[Any], Any] | None,
    *,
    blocks: bool,
) -> Operator:
    is_callable(who, "loss", loss, "prediction, theta")
    if prox is not None:
        is_callable(who, "prox", prox, "v, theta, step_size")
    if parameter is not None:
        is_callable(who, "parameter", parameter, "theta")
    constant = coefficient_of_theta(who, "lipschitz", lipschitz)

    def sweep(x: Any, theta: Any) -> tuple[Array, Array, Array]:
        """The displacement, the outcome and the step of each row."""
        x = as_inner(who, "x", x)  # a coordinate's step and its prox are for real numbers
        matrix = _matrix(who, design, x, theta, blocks)
        weight = jnp.asarray(constant(theta)).astype(x.dtype)
        columns = jnp.moveaxis(matrix, 1, 0)
        curvature = weight * _sum(columns * columns, tuple(range(1, columns.ndim)))
        # A column of zeros leaves its coordinate to h alone; any step is right there, an infinite one is not.
        steps = 1 / jnp.where(curvature > 0, curvature, jnp.ones_like(curvature))
        slices = None if parameter is None else _sliced(who, parameter(theta), len(x))
        slope_of = jax.grad(lambda u: scalar(who, "the loss", loss(u, theta)))

        def update(prediction: Array, row: Any) -> tuple[Array, tuple[Array, Array]]:
            old, column, step_size, part = row
            shift = step_size * _pull(column, slope_of(prediction))
            forward = old - shift
            if prox is None:
                return prediction - _push(column, shift), (shift, forward)
            new = prox(forward, theta if parameter is None else part, step_size)
            new = same_as(who, "the prox", new, forward, "a coordinate" if not blocks else "a row")
            # (forward - new) vanishes exactly where the prox is the identity: no digit of the step is lost.
            move = (forward - new) + shift
            return prediction - _push(column, move), (move, new)

        _, (moves, new) = jax.lax.scan(update, _predict(matrix, x), (x, columns, steps, slices))
        return moves, new, steps

    def residual(x: Any, theta: Any) -> tuple[Residual, ...]:
        moves, _, steps = sweep(x, theta)
        return (Residual(moves / steps.reshape(-1, *(1,) * (moves.ndim - 1))),)

    def energy(v: Any, theta: Any) -> Any:
        matrix = _matrix(who, design, v, theta, blocks)
        image = _predict(matrix, v)
        slope_of = jax.grad(lambda u: scalar(who, "the loss", loss(u, theta)))
        _, bent = jax.jvp(slope_of, (jnp.zeros_like(image),), (image,))
        return jax.vmap(lambda column: _pull(column, bent))(jnp.moveaxis(matrix, 1, 0))

    # The energy of more unknowns than predictions is semidefinite: no metric.
    n, *of_x = (1,) if callable(design) else (*np.shape(design), 1)
    definite = math.prod(of_x) <= n
    return Operator(
        apply=lambda x, theta: sweep(x, theta)[1],
        displacement=lambda x, theta: sweep(x, theta)[0],
        metric=energy if prox is None and definite else None,
        natural_residual=residual,
        name=who,
    )


def _matrix(who: str, design: Design, x: Any, theta: Any, blocks: bool) -> Array:
    matrix = jnp.asarray(design(theta) if callable(design) else design)
    wanted = "a matrix [p, k]" if blocks else "a vector [p]"
    if not hasattr(x, "ndim") or x.ndim != 1 + blocks:
        came = describe(x) if hasattr(x, "ndim") else f"a {type(x).__name__}"
        raise TypeError(f"{who}: x must be one array, {wanted}; {came} came. Ravel it into one array.")
    shapes = [("n", *x.shape[:1])] + ([("n", *x.shape)] if blocks else [])
    if ("n", *matrix.shape[1:]) not in shapes or not jnp.issubdtype(matrix.dtype, jnp.floating):
        forms = " or ".join(f"[{','.join(map(str, shape))}]" for shape in shapes)
        raise TypeError(
            f"{who}: the design must be a real floating-point array {forms} for x {describe(x)}; "
            f"{describe(matrix)} came. Its second axis runs over the rows of x: transpose it?"
        )
    return matrix.astype(x.dtype)


def _sliced(who: str, tree: Any, length: int) -> Any:
    tree = jax.tree.map(jnp.asarray, tree)
    for leaf in jax.tree.leaves(tree):
        if leaf.shape[:1] != (length,):
            raise TypeError(
                f"{who}: the leaves of parameter(theta) must have the leading axis {length}, one slice for each row of "
                f"x; {describe(leaf)} came. Broadcast it, or leave parameter out: the prox then gets theta."
            )
    return tree


def _sum(products: Array, axes: Any) -> Array:
    wide = _tree.accumulation_dtype(products)
    return jnp.sum(products.astype(wide), axis=axes).astype(products.dtype)


def _predict(matrix: Array, x: Array) -> Array:
    """A x: [n, p] with [p] or [p, k], or [n, p, k] with [p, k]."""
    if matrix.ndim == 3:
        return _sum(matrix * x[None], (1, 2))
    return matrix @ x


def _pull(column: Array, slope: Array) -> Array:
    """A_j' slope: [n] with [n] or [n, k], or [n, k] with [n]."""
    column, slope = _aligned(column, slope)
    return _sum(column * slope, 0)


def _push(column: Array, move: Array) -> Array:
    """A_j move: [n] with a number or [k], or [n, k] with [k]."""
    if column.ndim == 2:
        return _sum(column * move[None], 1)
    return column * move if move.ndim == 0 else column[:, None] * move[None]


def _aligned(column: Array, slope: Array) -> tuple[Array, Array]:
    if column.ndim == slope.ndim:
        return column, slope
    return (column[:, None], slope) if slope.ndim == 2 else (column, slope[:, None])
