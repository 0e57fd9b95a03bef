"""What derivative rules are made of: a value that moves by a rule of its own, and functions that capture no tracer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def hoisted(function: Callable[..., Any], *examples: Any) -> tuple[Callable[..., Any], list[Any]]:
    """``function`` as a function of ``(*examples, *captured)``, and the tracers that it closes over.

    ``jax.closure_convert`` does so for floating-point tracers only; a whole number or a flag of an outer loop that a
    loss looks at would stay behind and be out of scope where a rule is applied.
    """
    from jax.extend.core import jaxpr_as_fun  # costs 30 ms, so not on import

    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*examples)
    traced = [i for i, const in enumerate(closed.consts) if isinstance(const, Tracer)]
    consts = [None if i in traced else const for i, const in enumerate(closed.consts)]
    structure = jax.tree.structure(shapes)

    def converted(*arguments: Any) -> Any:
        known, given = arguments[: len(examples)], arguments[len(examples) :]
        merged = list(consts)
        for i, value in zip(traced, given, strict=True):
            merged[i] = value
        run = jaxpr_as_fun(closed.replace(consts=merged))
        return structure.unflatten(run(*jax.tree.leaves(known)))

    return converted, [closed.consts[i] for i in traced]


def moving(x: Any, operands: Any, tangent: Callable[[Any, Any, Any], Any]) -> Any:
    """``x``, whose tangent is ``tangent(x, operands, their tangents)``, linear in the last; x's own is not looked at.

    What ``jax.custom_jvp`` would be for, but inside ``scan`` that loses its rule at the second reverse-mode derivative
    (JAX 0.10 evaluates the loop partially to hoist what does not vary, and inlines the function): a primitive keeps it.
    ``tangent`` may close over no tracer; everything that is traced travels in x and operands.
    """
    x_leaves, x_tree = jax.tree.flatten(x)
    leaves, tree = jax.tree.flatten(operands)
    size = len(x_leaves)

    def rule(arguments: Any, tangents: Any) -> Any:
        x, operands = x_tree.unflatten(arguments[:size]), tree.unflatten(arguments[size:])
        return jax.tree.leaves(tangent(x, operands, tree.unflatten(tangents)))

    return x_tree.unflatten(_moving().bind(*x_leaves, *leaves, rule=rule, size=size))


@functools.cache
def _moving() -> Any:
    from jax.extend.core import Primitive  # costs 30 ms, so not on import
    from jax.interpreters import ad, batching, mlir

    primitive = Primitive("odljax_moving")
    primitive.multiple_results = True
    primitive.def_impl(lambda *arguments, rule, size: list(arguments[:size]))
    primitive.def_abstract_eval(lambda *arguments, rule, size: list(arguments[:size]))
    mlir.register_lowering(primitive, lambda ctx, *arguments, rule, size: arguments[:size])

    def jvp(primals: Any, tangents: Any, *, rule: Any, size: int) -> Any:
        # The primitive again: a second derivative sees how x itself moves.
        x = primitive.bind(*primals, rule=rule, size=size)
        if all(type(t) is ad.Zero for t in tangents[size:]):
            return x, [ad.Zero.from_primal_value(one) for one in x]  # pyright: ignore[reportAttributeAccessIssue]
        real = [
            _no_tangent(operand) if _whole(operand) else ad.instantiate_zeros(t)
            for operand, t in zip(primals[size:], tangents[size:], strict=True)
        ]
        return x, rule([*x, *primals[size:]], real)

    def batch(arguments: Any, axes: Any, *, rule: Any, size: int) -> Any:
        mapped = [axis is not None for axis in axes]
        (length,) = {a.shape[axis] for a, axis, on in zip(arguments, axes, mapped, strict=True) if on}
        front = [jnp.moveaxis(a, axis, 0) if on else a for a, axis, on in zip(arguments, axes, mapped, strict=True)]
        for i in range(size):
            if not mapped[i]:
                front[i] = jnp.broadcast_to(front[i], (length, *front[i].shape))
        places = [0 if i < size or on else None for i, on in enumerate(mapped)]

        def batched(arguments: Any, tangents: Any) -> Any:
            # Whole numbers have no tangent, and their stand-ins cannot be mapped: they are made inside.
            some = [None if _whole(a) else t for a, t in zip(arguments[size:], tangents, strict=True)]
            spots = [None if t is None else place for t, place in zip(some, places[size:], strict=True)]

            # A leaf that is the same for all has a tangent that is, too.
            def one(arguments: Any, some: Any) -> Any:
                tangents = [_no_tangent(a) if t is None else t for a, t in zip(arguments[size:], some, strict=True)]
                return rule(arguments, tangents)

            return jax.vmap(one, in_axes=(places, spots))(arguments, some)

        return primitive.bind(*front, rule=batched, size=size), [0] * size

    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batch
    return primitive


def _whole(leaf: Any) -> bool:
    """Whether a leaf has no derivative."""
    return not jnp.issubdtype(leaf.dtype, jnp.inexact)


def _no_tangent(leaf: Any) -> np.ndarray:
    return np.zeros(np.shape(leaf), jax.dtypes.float0)
