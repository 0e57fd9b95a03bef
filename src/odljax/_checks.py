"""Checks at construction and at trace time; each message says who needs what, what came and what to do."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from . import _tree
from ._types import Coefficient, Step

T = TypeVar("T")


@dataclass_transform(frozen_default=True, eq_default=False)
def record(cls: type[T]) -> type[T]:
    """A frozen dataclass of pure functions, static to JAX: no leaves, equal only to itself.

    So it may be an attribute of a module, a value in a tree of settings, an argument of ``jit``.
    """
    cls = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    cls.__repr__ = lambda self: f"{cls.__name__}({getattr(self, 'name')})"  # noqa: B009
    _RECORDS.add(cls)
    return jax.tree_util.register_static(cls)


_RECORDS: set[type] = set()


def is_record(value: Any) -> bool:
    """Whether it is a record of this library: callable, some of them, and yet no map."""
    return type(value) in _RECORDS


def compiled_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled at its first call for arguments of each shape where nothing else compiles it.

    Inside ``jit``, ``scan`` and the like it is called as it is, and so it is with arguments that are no arrays.
    """
    jitted = jax.jit(function)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        kinds = (Array, np.ndarray, np.inexact, float, complex)
        arrays = all(isinstance(leaf, kinds) for leaf in jax.tree.leaves(arguments))
        staged = isinstance(jnp.zeros(()), Tracer)
        return jitted(*arguments) if arrays and not staged else function(*arguments)

    return call


def leaf_name(path: Any) -> str:
    """The path of a leaf as the user would index it; the empty path is the value itself."""
    return jax.tree_util.keystr(path) or "(itself)"


def describe(leaf: Any) -> str:
    """Dtype and shape, as in ``float32[3,4]``."""
    if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
        return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    return f"{type(leaf).__name__}"


def outline(tree: Any) -> str:
    """What the leaves of a tree are, the first of them by name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    told = [f"{jax.tree_util.keystr(path)} {describe(leaf)}".strip() for path, leaf in leaves[:6]]
    return ", ".join(told) + (f" and {len(leaves) - 6} more" if len(leaves) > 6 else "") or "no leaves"


def as_inner(who: str, name: str, x: T, *, or_complex: bool = False) -> T:
    """``x`` as strongly typed arrays; refuses an empty tree and leaves that are not real (or complex) floating point.

    Complex leaves are for what treats them as pairs of real numbers: gradients are conjugated, inner products real.
    """
    kind, wanted = (jnp.inexact, "real or complex") if or_complex else (jnp.floating, "real")
    leaves, structure = jax.tree_util.tree_flatten_with_path(x)
    if isinstance(x, list) and x and all(isinstance(entry, (int, float, complex)) for entry in x):
        raise TypeError(
            f"{who}: {name} is a list of numbers, which to JAX are as many variables and no vector. Pass "
            f"jnp.array({name}), or a tuple if separate variables are meant."
        )
    if not leaves:
        raise TypeError(f"{who}: {name} needs at least one floating-point leaf; an empty tree came.")
    arrays = []
    for path, leaf in leaves:
        if not isinstance(leaf, (jax.Array, np.ndarray, numbers.Number, np.generic)):
            raise TypeError(
                f"{who}: {name} must hold arrays; leaf {leaf_name(path)} is a {type(leaf).__name__}. "
                f"Pass a pytree of floating-point arrays."
            )
        array = jnp.asarray(leaf)
        if not jnp.issubdtype(array.dtype, kind):
            raise TypeError(
                f"{who}: {name} must be {wanted} floating point; leaf {leaf_name(path)} is {describe(array)}. "
                f"Cast it, for instance with .astype(float), or close over it if it is not solved for."
            )
        arrays.append(array)
    return _tree.strong(jax.tree_util.tree_unflatten(structure, arrays))


def same_as(who: str, what: str, got: Any, want: T, name: str = "x") -> T:
    """``got``, strongly typed, after checking that structure, shapes and dtypes are those of ``want``, called name."""
    got_structure, want_structure = jax.tree.structure(got), jax.tree.structure(want)
    if got_structure != want_structure:
        raise TypeError(
            f"{who}: {what} must keep the structure of {name}; it came back as {got_structure}, {name} is "
            f"{want_structure}. Return the same containers with the same keys."
        )
    wanted, _ = jax.tree_util.tree_flatten_with_path(want)
    for (path, expected), actual in zip(wanted, jax.tree.leaves(got), strict=True):
        actual = actual if hasattr(actual, "dtype") else jnp.asarray(actual)
        weak = getattr(actual, "weak_type", False) and jnp.issubdtype(actual.dtype, jnp.floating)
        if actual.shape != expected.shape or (actual.dtype != expected.dtype and not weak):
            raise TypeError(
                f"{who}: {what} must keep the shapes and dtypes of {name}; leaf {leaf_name(path)} came back as "
                f"{describe(actual)}, {name} has {describe(expected)}. Reshape or cast it (astype) inside the function."
            )
    return jax.tree.map(lambda leaf, like: jax.lax.convert_element_type(leaf, like.dtype), got, want)


def scalar(who: str, what: str, value: Any) -> Array:
    """``value`` after checking that it is a real floating-point number without axes."""
    if jax.tree.structure(value) != jax.tree.structure(0):
        raise TypeError(f"{who}: {what} must return a scalar; a {type(value).__name__} came back. Return one number.")
    value = jnp.asarray(value)
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"{who}: {what} must return a real scalar; {describe(value)} came back. "
            f"Reduce it, for instance with jnp.sum or jnp.mean."
        )
    return value


def differentiable(who: str, theta: Any) -> None:
    """Refuses a theta that a gradient cannot be taken in."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(theta)
    for path, leaf in leaves:
        leaf = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"{who}: theta is differentiated and must be real floating point; leaf {leaf_name(path)} is "
                f"{describe(leaf)}. Cast it, or close over what is not differentiated."
            )


def enters(function: Callable[[Any], Any], theta: Any) -> bool:
    """Whether the result of the function depends on theta, by its program; true where that is not known."""
    from jax.interpreters import partial_eval  # its import costs more than ours

    leaves, structure = jax.tree.flatten(theta)
    if not leaves:
        return True
    try:
        jaxpr = jax.make_jaxpr(lambda leaves: function(structure.unflatten(leaves)))(leaves).jaxpr
    except NameError:  # a collective over an axis that is mapped elsewhere: not known
        return True
    return any(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[1])


def is_callable(who: str, name: str, value: Any, arguments: str = "") -> None:
    """Refuses what cannot be called, or not with the positional arguments of the convention, such as ``"x, theta"``."""
    convention = f"a function of ({arguments})" if arguments else "a function"
    if not callable(value):
        raise TypeError(f"{who}: {name} must be {convention}; {value!r} came.")
    if type(value).__name__ in ("Solver", "Iteration", "Hypergradient") and is_record(value):
        raise TypeError(
            f"{who}: {name} must be {convention}; {value!r} came. Of a solver take its iteration, solver.iteration, or "
            f"its answer, lambda x, theta: solver(x, theta).x."
        )
    if arguments:
        wanted = arguments.split(", ")
        try:
            signature = inspect.signature(value)
            bound = signature.bind(*wanted)
        except TypeError:
            raise TypeError(f"{who}: {name} must be {convention}; it takes {inspect.signature(value)}.") from None
        except ValueError:  # no signature to be had: trust it
            return
        _no_default(who, name, value, signature, list(bound.arguments), convention, arguments)


def _no_default(
    who: str, name: str, value: Any, signature: inspect.Signature, filled: list[str], convention: str, arguments: str
) -> None:
    """Refuses a function of the user's, one that the convention would overwrite a default of."""
    defaults = [key for key in filled if signature.parameters[key].default is not inspect.Parameter.empty]
    if defaults and not _is_library(value):
        raise TypeError(
            f"{who}: {name} must be {convention}; it takes {signature}, and whether {', '.join(defaults)} is to keep "
            f"its default is ambiguous. Say which: lambda {arguments}: f(...)."
        )


def _is_library(function: Any) -> bool:
    """Whether the function follows a convention of ours, defaults included, as the operators of ``odljax.prox`` do."""
    return (getattr(function, "__module__", None) or "").split(".")[0] in ("odljax", "jax", "jaxlib", "optax", "numpy")


def a(noun: str) -> str:
    """The noun behind its article."""
    return f"{'an' if noun[:1] in 'AEIOUaeiou' else 'a'} {noun}"


def is_a(who: str, name: str, value: Any, kind: type, hint: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{who}: {name} must be {a(kind.__name__)}; {a(type(value).__name__)} came. {hint}")


def count(who: str, name: str, value: Any, least: int = 1) -> int:
    """A static whole number of at least ``least``."""
    if isinstance(value, Tracer):
        raise TypeError(
            f"{who}: {name} fixes the program and must be a Python int; a traced value came. Close over it."
        )
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{who}: {name} must be a whole number of at least {least}; {value!r} came.")
    return int(value)


def number(who: str, name: str, value: Any, low: float = 0.0, high: float = math.inf, closed: bool = False) -> Any:
    """A number between ``low``, included if ``closed``, and ``high``, which is not; a traced one outside is NaN."""
    if isinstance(value, Tracer):
        return held(value, low, high, closed)
    try:
        numeric = float("no" if isinstance(value, (str, bytes, bool, np.bool_)) else value)
    except (TypeError, ValueError):
        raise TypeError(f"{who}: {name} must be a number; {value!r} came.") from None
    above = numeric >= low if closed else numeric > low
    if not (above and numeric < high):
        interval = f"{'[' if closed else '('}{low:g}, {high:g})"
        raise ValueError(f"{who}: {name} must lie in {interval}; {value!r} came.")
    return value


def held(value: Any, low: float, high: float, closed: bool = False) -> Any:
    """A computed number or array of them, NaN where outside the range: what it enters then shows it."""
    value = jnp.asarray(value)
    inside = (value >= low) if closed else (value > low)
    if high < math.inf:
        inside = inside & ((value <= high) if closed else (value < high))
    # The comparison has no derivative, and a factor of NaN would give one to the right values: select. A whole number
    # becomes a weak float, which widens no half precision.
    with jax.numpy_dtype_promotion("standard"):
        return jnp.where(inside, value, jnp.nan)


def coupling(effects: Any) -> set[Any]:
    """The vmapped axes over which a program, or an equation of it, talks to other elements, from its effects."""
    named = {name for effect in effects if (name := getattr(effect, "name", None)) is not None}
    return named - set(jax.sharding.get_abstract_mesh().axis_names)


def uncoupled(who: str, jaxpr: Any, moving: int) -> None:
    """Refuses a program that tells the other elements of a vmapped axis of its first arguments, so many of them."""
    moved, axes = set(jaxpr.invars[:moving]), set()
    for equation in jaxpr.eqns if coupling(jaxpr.effects) else ():
        if any(isinstance(variable, type(jaxpr.invars[0])) and variable in moved for variable in equation.invars):
            axes |= coupling(equation.effects)
            moved |= set(equation.outvars)
    if axes:
        raise TypeError(
            f"{who}: the iteration talks to other elements of the vmapped axis {', '.join(map(repr, sorted(axes)))} (a "
            f"collective), so the batch is one problem, and a derivative that is formed element by element would be "
            f"wrong. Solve it as one: let x hold the whole axis, and take sums over it in the place of the collective."
        )


_SCHEDULE_NAMES = ("k", "count", "step")


def coefficient(
    who: str,
    name: str,
    value: Coefficient,
    low: float = 0.0,
    high: float = math.inf,
    closed: bool = False,
) -> Callable[[Any, Step], Any]:
    """The coefficient as a function of ``(theta, k)``.

    A callable with two arguments is called with ``(theta, k)``, and its second must be named ``k``, ``count`` or
    ``step``, as optax names it. One with a single argument is called with theta if that argument is named ``theta``,
    and with k if it has one of those names; others are refused, because guessing could be silently wrong. What a
    function returns outside the range becomes NaN; a schedule may come as near to its ends as they are.
    """
    if not callable(value):
        constant = number(who, name, value, low, high, closed)
        if np.shape(constant) != ():
            raise ValueError(f"{who}: {name} must be a scalar; {describe(constant)} came.")
        return lambda theta, k: constant
    is_callable(who, name, value)
    names = _required_arguments(value)
    if len(names) == 2 and names[1] in _SCHEDULE_NAMES and names[0] not in _SCHEDULE_NAMES:
        call = value
    elif names == ["theta"]:
        call = lambda theta, k: value(theta)  # noqa: E731
    elif len(names) == 1 and names[0] in _SCHEDULE_NAMES:
        call = lambda theta, k: value(k)  # noqa: E731
        with jax.ensure_compile_time_eval():
            number(who, f"{name} at k = 0", value(jnp.zeros((), int)), low, high, closed)
    else:
        raise TypeError(
            f"{who}: {name} came as a function of {names}; name its one argument theta (the hyper-variable) or k (the "
            f"step, as in an optax schedule), or let it take (theta, k), in that order."
        )
    of_theta_alone = names == ["theta"]

    def checked(theta: Any, k: Step) -> Any:
        result = call(theta, k)
        if np.shape(result) != ():
            raise TypeError(f"{who}: {name} must return a scalar; {describe(result)} came back.")
        return held(result, low, high, closed or not of_theta_alone)

    return checked


def _required_arguments(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind in positional]


def coefficient_of_theta(who: str, name: str, value: Coefficient, **interval: Any) -> Callable[[Any], Any]:
    """The coefficient of an operator, which has no steps: a number, or a function whose one argument is theta."""
    if callable(value) and (names := _required_arguments(value)) != ["theta"]:
        raise TypeError(
            f"{who}: {name} came as a function of {names}, but an operator has no steps: pass a number, or a function "
            f"whose one argument is named theta. Schedules of k belong to iterations."
        )
    function = coefficient(who, name, value, **interval)
    return lambda theta: function(theta, jnp.zeros((), int))


@functools.cache
def _forward_only() -> Any:
    """An identity whose transpose raises: the one way to refuse reverse mode in our own words and keep forward mode."""
    from jax.extend.core import Primitive  # costs 30 ms, so not on import
    from jax.interpreters import ad, batching, mlir

    identity = Primitive("odljax_forward_only")
    identity.def_impl(lambda x, *, message: x)
    identity.def_abstract_eval(lambda x, *, message: x)
    mlir.register_lowering(identity, lambda ctx, x, *, message: [x])
    batching.defvectorized(identity)
    ad.deflinear2(identity, lambda cotangent, x, *, message: _refuse(message))
    return identity


def _refuse(message: str) -> Any:
    raise TypeError(message)


def forward_only(x: T, message: str) -> T:
    """``x``, differentiable by forward mode only; reverse mode raises a TypeError with the message."""
    return jax.tree.map(lambda leaf: _forward_only().bind(leaf, message=message), x)
