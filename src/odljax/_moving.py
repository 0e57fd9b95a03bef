"""What derivative rules are made of: a value that moves by a rule of its own, and functions that capture no tracer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


class Hoisted:
    """A function that closes over no tracer, and its program."""

    def __init__(self, run: Callable[..., Any], jaxpr: Any):
        self.run, self.jaxpr = run, jaxpr

    def __call__(self, *arguments: Any) -> Any:
        return self.run(*arguments)


def hoisted(function: Callable[..., Any], *examples: Any) -> tuple[Hoisted, list[Any]]:
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

    return Hoisted(converted, closed.jaxpr), [closed.consts[i] for i in traced]


def moving(x: Any, operands: Any, tangent: Callable[[Any, Any, Any], Any]) -> Any:
    """``x``, whose tangent is ``tangent(x, operands, their tangents)``, linear in the last; x's own is not looked at.

    What ``jax.custom_jvp`` would be for, but inside ``scan`` that loses its rule at the second reverse-mode derivative
    (JAX 0.10 evaluates the loop partially to hoist what does not vary, and inlines the function): a primitive keeps it.
    ``tangent`` may close over no tracer; everything that is traced travels in x and operands.
    """

    def rule(x: Any, operands: Any, tangents: list[Any]) -> Any:
        leaves, tree = jax.tree.flatten(operands)
        full = [_zero_tangent(a) if t is None else t for a, t in zip(leaves, tangents, strict=True)]
        return None, tangent(x, operands, tree.unflatten(full))

    return recomputed(x, (), operands, rule)[0]


def recomputed(x: Any, still: Any, operands: Any, rule: Callable[[Any, Any, list[Any]], Any]) -> tuple[Any, Any]:
    """``(x, still)``, of which x moves and the rest does not, by a rule that may compute both again.

    ``rule(x, operands, tangents)`` gets a list of tangents, one a leaf of the operands, None where no derivative is
    asked for; it returns ``((x, still), tangent of x)``, the pair in the place of what is there, or None to keep that.
    """
    x_leaves, x_tree = jax.tree.flatten(x)
    still_leaves, still_tree = jax.tree.flatten(still)
    leaves, tree = jax.tree.flatten(operands)
    sizes = (len(x_leaves), len(still_leaves))

    def on_leaves(arguments: list[Any], tangents: list[Any]) -> Any:
        x, operands = x_tree.unflatten(arguments[: sizes[0]]), tree.unflatten(arguments[sum(sizes) :])
        again, moved = rule(x, operands, tangents)
        return None if again is None else jax.tree.leaves(again), jax.tree.leaves(moved)

    out = _moving().bind(*x_leaves, *still_leaves, *leaves, rule=on_leaves, sizes=sizes)
    return x_tree.unflatten(out[: sizes[0]]), still_tree.unflatten(out[sizes[0] :])


@functools.cache
def _moving() -> Any:
    from jax.extend.core import Primitive  # costs 30 ms, so not on import
    from jax.interpreters import ad, batching, mlir

    primitive = Primitive("odljax_moving")
    primitive.multiple_results = True
    primitive.def_impl(lambda *arguments, rule, sizes: list(arguments[: sum(sizes)]))
    primitive.def_abstract_eval(lambda *arguments, rule, sizes: list(arguments[: sum(sizes)]))
    mlir.register_lowering(primitive, lambda ctx, *arguments, rule, sizes: arguments[: sum(sizes)])

    def zero(value: Any) -> Any:
        return ad.Zero(jax.typeof(value).to_tangent_aval())

    def jvp(primals: Any, tangents: Any, *, rule: Any, sizes: tuple[int, int]) -> Any:
        # The primitive again: a second derivative sees how x itself moves.
        values = primitive.bind(*primals, rule=rule, sizes=sizes)
        asked = zip(primals[sum(sizes) :], tangents[sum(sizes) :], strict=True)
        given = [None if type(t) is ad.Zero or _whole(a) else t for a, t in asked]
        if all(t is None for t in given):
            return values, [zero(value) for value in values]
        again, moved = rule([*values, *primals[sum(sizes) :]], given)
        values = values if again is None else again
        return values, [*moved, *(zero(value) for value in values[sizes[0] :])]

    def batch(axis_data: Any, arguments: Any, axes: Any, *, rule: Any, sizes: tuple[int, int]) -> Any:
        mapped = [axis is not None for axis in axes]
        if not any(mapped):
            return primitive.bind(*arguments, rule=rule, sizes=sizes), [None] * sum(sizes)
        front = [jnp.moveaxis(a, axis, 0) if on else a for a, axis, on in zip(arguments, axes, mapped, strict=True)]
        for i in range(sum(sizes)):
            if not mapped[i]:
                front[i] = jnp.broadcast_to(front[i], (axis_data.size, *front[i].shape))
        places = [0 if i < sum(sizes) or on else None for i, on in enumerate(mapped)]
        # The same axis, so that a collective over it finds its name in the rule too.
        axis = {"axis_name": axis_data.name, "axis_size": axis_data.size, "spmd_axis_name": axis_data.spmd_name}

        def batched(arguments: list[Any], tangents: list[Any]) -> Any:
            # A leaf that is the same for all has a tangent that is, too.
            spots = [None if t is None else place for t, place in zip(tangents, places[sum(sizes) :], strict=True)]
            return jax.vmap(rule, in_axes=(places, spots), **axis)(arguments, tangents)

        return primitive.bind(*front, rule=batched, sizes=sizes), [0] * sum(sizes)

    ad.primitive_jvps[primitive] = jvp
    batching.fancy_primitive_batchers[primitive] = batch
    return primitive


def _whole(leaf: Any) -> bool:
    """Whether a leaf, perhaps a Python number, has no derivative."""
    return not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _zero_tangent(leaf: Any) -> Any:
    """The zero tangent of a leaf; whole numbers have one of their own kind."""
    return np.zeros(np.shape(leaf), jax.dtypes.float0) if _whole(leaf) else jnp.zeros_like(leaf)
