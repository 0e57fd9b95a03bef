"""A batch of which failed elements can be dropped: no cotangent in, no cotangent out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .._checks import is_a
from .._moving import hoisted
from .._types import Theta, X
from ..solvers import Solution, Solver


def maskable(solver: Solver[X, Theta]) -> Solver[X, Theta]:
    r"""Returns the solver whose derivative is zero, not NaN, where the cotangent of its solution is.

    A solve that failed has a derivative that is not finite, and zero times infinity is NaN: an element of a batch that
    is dropped spoils the gradient in every theta that it shares with the others all the same. Here reverse mode looks
    at the cotangent of x: where all of it is zero, the cotangents of x0, of theta and of tracers that the iteration
    closes over are zero too. Where it is not, nothing changes: a NaN that is used is seen.

    When: many problems under ``vmap`` share a theta, and one of them may fail. Put it outermost, and drop an element
    twice: its x before the loss, ``jnp.where(good, solution.x, 0.0)``, for the loss of a NaN has a cotangent of NaN,
    and the loss itself, as in the example.

    Args:
        solver: with any derivative of reverse mode.

    Returns:
        A solver with the same solutions and derivatives; of its fields x alone has a derivative.

    Raises:
        TypeError: ``solver`` is none.

    Cost: under ``vmap`` the derivative in a shared theta is formed element by element before it is summed, so that one
    can be left out: the memory of a theta for each element, and products of a batch in the place of one product.

    Source: the double ``where`` of JAX's frequently asked questions, at the level of a solve.

    Example:
        >>> import jax, jax.numpy as jnp, odljax as odl
        >>> line = odl.fixed_point(lambda x, theta: 0.5 * x + theta[0] * theta[1])
        >>> solver = odl.maskable(odl.implicit(odl.until_converged(line, max_steps=100)))
        >>> def loss(theta, datum):
        ...     solution = solver(0.0, (theta, datum))
        ...     good = solution.status <= odl.Status.COMPLETED
        ...     x = jnp.where(good, solution.x, 0.0)
        ...     return jnp.where(good, (x - 1.0) ** 2, 0.0)
        >>> data = jnp.array([1.0, jnp.nan, 3.0])
        >>> total = lambda theta: jnp.sum(jax.vmap(loss, in_axes=(None, 0))(theta, data))
        >>> round(float(jax.grad(total)(1.0)), 3)  # 2 (2 - 1) 2 + 2 (6 - 1) 6
        64.0
    """
    is_a("maskable", "solver", solver, Solver, "Make one with for_steps or until_converged.")
    quiet = solver.quiet or solver

    def solve(x0: X, theta: Theta) -> Solution:
        function, captured = hoisted(quiet.solve, x0, theta)
        (x0, theta, captured), link = _gate_in((x0, theta, captured))
        solution = function(x0, theta, *captured)
        still = jax.lax.stop_gradient(solution._replace(x=None))
        return still._replace(x=_gate_out(solution.x, link))

    return dataclasses.replace(
        solver, solve=solve, derivative=f"maskable({solver.derivative})", adjoint=None, differentiate=None, quiet=None
    )


def _gate_in(x: Any) -> tuple[Any, Array]:
    """``x`` and a zero, whose cotangent says whether those of x count."""
    leaves, structure = jax.tree.flatten(x)
    moved = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    if not moved:
        return x, jnp.zeros(())
    *gated, link = _gates()[0].bind(*(jnp.asarray(leaves[i]) for i in moved), batch=())
    for i, leaf in zip(moved, gated, strict=True):
        leaves[i] = leaf
    return structure.unflatten(leaves), link


def _gate_out(x: Any, link: Array) -> Any:
    """``x``, of which the cotangent is looked at on its way back to the gate that the link comes from."""
    leaves, structure = jax.tree.flatten(x)
    return structure.unflatten(_gates()[1].bind(*leaves, link))


@functools.cache
def _gates() -> tuple[Any, Any]:
    from jax.extend.core import Primitive  # costs 30 ms, so not on import
    from jax.interpreters import ad, batching, mlir

    entrance, way_out = Primitive("odljax_gate_in"), Primitive("odljax_gate_out")

    def define(
        primitive: Any, run: Callable[..., Any], transpose: Callable[..., Any], batch: Callable[..., Any]
    ) -> None:
        primitive.multiple_results = True
        primitive.def_impl(run)
        mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=True))
        ad.deflinear2(primitive, transpose)
        batching.fancy_primitive_batchers[primitive] = batch

    def together(axis_data: Any, arguments: Any, axes: Any) -> list[Any]:
        """All with the axis in front: each element has cotangents of its own."""
        size = axis_data.size
        return [
            jnp.broadcast_to(a, (size, *a.shape)) if axis is None else jnp.moveaxis(a, axis, 0)
            for a, axis in zip(arguments, axes, strict=True)
        ]

    def enter(*leaves: Any, batch: tuple[int, ...]) -> list[Any]:
        return [*leaves, jnp.zeros(batch, jnp.float32)]

    def leave(*arguments: Any) -> list[Any]:
        return list(arguments[:-1])

    def enter_back(cotangents: Any, *leaves: Any, batch: tuple[int, ...]) -> list[Any]:
        *found, counts = cotangents
        if type(counts) is ad.Zero:
            return found

        def kept(leaf: Any) -> Any:
            if type(leaf) is ad.Zero:
                return leaf
            mask = jnp.expand_dims(counts > 0, tuple(range(len(batch), leaf.ndim)))
            return jnp.where(mask, leaf, jnp.zeros_like(leaf))

        return [kept(leaf) for leaf in found]

    def leave_back(cotangents: Any, *arguments: Any) -> list[Any]:
        depth = jnp.ndim(arguments[-1].aval if ad.is_undefined_primal(arguments[-1]) else arguments[-1])
        used = [jnp.any(c != 0, axis=tuple(range(depth, c.ndim))) for c in cotangents if type(c) is not ad.Zero]
        return [*cotangents, functools.reduce(jnp.logical_or, used).astype(jnp.float32)]

    def enter_batch(axis_data: Any, leaves: Any, axes: Any, *, batch: tuple[int, ...]) -> Any:
        if all(axis is None for axis in axes):
            return entrance.bind(*leaves, batch=batch), [None] * (len(leaves) + 1)
        out = entrance.bind(*together(axis_data, leaves, axes), batch=(axis_data.size, *batch))
        return out, [0] * len(out)

    def leave_batch(axis_data: Any, arguments: Any, axes: Any) -> Any:
        if all(axis is None for axis in axes):
            return way_out.bind(*arguments), [None] * (len(arguments) - 1)
        out = way_out.bind(*together(axis_data, arguments, axes))
        return out, [0] * len(out)

    entrance.def_abstract_eval(lambda *leaves, batch: [*leaves, jax.typeof(np.zeros(batch, np.float32))])
    way_out.def_abstract_eval(lambda *arguments: list(arguments[:-1]))
    define(entrance, enter, enter_back, enter_batch)
    define(way_out, leave, leave_back, leave_batch)
    return entrance, way_out
