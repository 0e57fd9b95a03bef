"""The skeleton that the operators fill in: checked leaves, coefficients cast and shaped to them, a norm safe at 0."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from .._tree import power_of_two
from .._types import PyTree

ARRAYS = get_args(ArrayLike)  # as a tuple: a tracer is an instance of a member, not of the union
STATIC = int | float | np.generic | np.ndarray  # values that are known without asking a device


def leafwise(
    who: str,
    rule: Callable[..., Array],
    v: PyTree,
    *,
    rows: bool = False,
    signed: bool = False,
    or_complex: bool = False,
    **coefficients: PyTree,
) -> PyTree:
    """Return `rule(x, *coefficients)` for every leaf x of v, computed in float32 at least, in the dtype of the leaf.

    A coefficient is a tree prefix of v. It must broadcast to the leaf, and must not be negative unless `signed`.
    With `rows`, rule works along the last axis (a 0-d leaf is a row of one) and each row has one coefficient; a leaf
    without entries is returned as it is.
    Complex leaves are refused unless `or_complex`; coefficients are real in any case.
    """
    entries, structure = flatten(who, v, or_complex=or_complex)
    columns = [spread(who, name, value, v) for name, value in coefficients.items()]
    results = []
    for (path, leaf), *values in zip(entries, *columns, strict=True):
        dtype, shape = jnp.result_type(leaf), jnp.shape(leaf)
        real = widest(jnp.finfo(dtype).dtype)
        x = widened(leaf, real)
        x = jnp.atleast_1d(x) if rows else x
        fitted = [
            fit(who, name + jax.tree_util.keystr(path), value, real, x.shape[:-1] if rows else shape, signed=signed)
            for name, value in zip(coefficients, values, strict=True)
        ]
        fitted = [c[..., None] if rows and c.ndim else c for c in fitted]
        y = x if rows and x.size == 0 else rule(x, *fitted)
        results.append(y.astype(dtype).reshape(shape))
    return jax.tree.unflatten(structure, results)


def flatten(who: str, v: PyTree, *, or_complex: bool = False) -> tuple[list[tuple[Any, Any]], Any]:
    """Return (path, leaf) pairs and the structure of v, whose leaves must be arrays of real (or complex) numbers."""
    entries, structure = jax.tree_util.tree_flatten_with_path(v)
    kind, wanted = (jnp.inexact, "real or complex") if or_complex else (jnp.floating, "real")
    for path, leaf in entries:
        if not _is_array(leaf, kind):
            raise TypeError(
                f"{who} needs {wanted} floating-point leaves in v; v{jax.tree_util.keystr(path)} is {describe(leaf)}; "
                "convert it, for example with x.astype(float)."
            )
    return entries, structure


def fit(who: str, name: str, value: Any, dtype: Any, shape: tuple[int, ...], *, signed: bool = False) -> Array:
    """Return a coefficient in `dtype`: a scalar as it is, an array, which must broadcast to `shape`, at its rank."""
    if not (_is_array(value, jnp.floating) or _is_array(value, jnp.integer)):
        raise TypeError(f"{who} needs a real number or array for {name}; it is {describe(value)}; pass a float.")
    if not signed and isinstance(value, STATIC) and np.any(np.asarray(value) < 0):
        raise ValueError(
            f"{who} needs {name} >= 0; it is {value}; a negative one defines no proximal operator: pass >= 0."
        )
    static = isinstance(value, STATIC)
    value = jnp.asarray(value, dtype)
    if not (signed or static):
        value = jnp.where(value < 0, jnp.nan, value)  # no proximal operator either, but known too late to raise
    try:
        fits = np.broadcast_shapes(value.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{who} needs {name} that broadcasts to shape {shape}; it is {describe(value)}; "
            "pass a scalar, an array of that shape, or a tree of these that is a prefix of v."
        )
    return value.reshape((1,) * (len(shape) - value.ndim) + value.shape) if value.ndim else value


def pair(who: str, names: str, parameter: Any) -> tuple[Any, Any]:
    """Return the two members of a parameter that must be a pair."""
    if not (isinstance(parameter, tuple | list) and len(parameter) == 2):
        raise ValueError(
            f"{who} needs parameter = {names}; it is {describe(parameter)}; pass a tuple of two, each of them "
            "a number, an array or a tree prefix of v."
        )
    return parameter[0], parameter[1]


def widened(leaf: Any, real: Any) -> Array:
    """Return the leaf in the dtype `real`, or in the complex dtype of that precision."""
    return jnp.asarray(leaf, np.result_type(real, np.complex64) if jnp.iscomplexobj(leaf) else real)


def widest(*dtypes: Any) -> Any:
    """Return the widest of float32 and the given dtypes: what sums are accumulated in."""
    return max((jnp.dtype("float32"), *dtypes), key=lambda dtype: jnp.finfo(dtype).bits)


def norm(xs: Sequence[Array], axis: int | None = None) -> Array:
    """Return the Euclidean norm over xs (along axis, kept), in any unit: derivative 0 at 0."""
    return length_and_direction(xs, axis)[0]


def length_and_direction(xs: Sequence[Array], axis: int | None = None) -> tuple[Array, list[Array]]:
    """Return the Euclidean norm over xs (along axis, kept) and xs divided by it, in any unit: 0, derivative 0, at 0."""
    keep = axis is not None
    peaks = [jnp.max(jnp.abs(x), axis=axis, keepdims=keep, initial=0) for x in jax.lax.stop_gradient(xs)]
    unit = power_of_two(functools.reduce(jnp.maximum, peaks))  # neither result depends on it: no derivative
    scaled = [x * (1 / unit).astype(x.dtype) for x in xs]
    square = sum(jnp.sum(_squared_modulus(x), axis=axis, keepdims=keep) for x in scaled)
    zero = square == 0
    length = jnp.sqrt(jnp.where(zero, 1, square))
    directions = [jnp.where(zero, 0, x / length.astype(x.dtype)) for x in scaled]
    return unit * jnp.where(zero, 0, length), directions


def shrink_length(x: Array, length: Array, direction: Array, threshold: Array) -> Array:
    """Return x with its length shortened by threshold, 0 where it is shorter; at length 0 = threshold it is x."""
    gone = length < threshold
    return jnp.where(gone, 0, x - jnp.where(gone, 0, threshold).astype(x.dtype) * direction)


def modulus(x: Array) -> Array:
    """Return |x| entry by entry: derivative 0 at 0, and no overflow, for complex numbers too."""
    return phase(x)[0] if jnp.iscomplexobj(x) else jnp.abs(x)


def phase(x: Array) -> tuple[Array, Array]:
    """Return |x| and x / |x| entry by entry, of complex numbers in any unit: 0, derivative 0, at 0."""
    length, (direction,) = length_and_direction([x[..., None]], axis=-1)
    return length[..., 0], direction[..., 0]


def nan_unless(sound: Array, y: Array, *inputs: Array) -> Array:
    """Return y [..., n], and NaN with a NaN for the derivative in every input in rows that are not sound [...].

    A cotangent that is zero goes back as zero, so that such rows can be masked.
    """
    total = sum((jnp.sum(x) for x in inputs), jnp.zeros((), y.dtype))
    lost = _lost().bind(jnp.broadcast_to(total, y.shape), jnp.broadcast_to(sound, y.shape))
    return jnp.where(sound, y, lost)


@functools.cache
def _lost() -> Any:
    from jax.extend.core import Primitive  # costs 30 ms, so not on import
    from jax.interpreters import ad, batching, mlir

    def lost(x: Array, sound: Array) -> Array:
        return jnp.where(sound, x, jnp.nan)

    def differentiate(primals: Any, tangents: Any) -> Any:
        moved = tangents[0]
        return primitive.bind(*primals), moved if type(moved) is ad.Zero else primitive.bind(moved, primals[1])

    def transpose(cotangent: Any, x: Any, sound: Any) -> Any:
        still = type(cotangent) is ad.Zero
        return [cotangent if still else jnp.where(sound | (cotangent == 0), cotangent, jnp.nan), None]

    primitive = Primitive("odljax_lost")
    primitive.def_impl(jax.jit(lost))
    primitive.def_abstract_eval(lambda x, sound: x.update(weak_type=False))
    mlir.register_lowering(primitive, mlir.lower_fun(lost, multiple_results=False))
    batching.defbroadcasting(primitive)
    ad.primitive_jvps[primitive] = differentiate
    ad.primitive_transposes[primitive] = transpose
    return primitive


def _squared_modulus(x: Array) -> Array:
    return jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else jnp.square(x)


def spread(who: str, name: str, value: PyTree, v: PyTree) -> list[Any]:
    """Return one coefficient for each leaf of v."""
    try:
        return jax.tree.leaves(jax.tree.broadcast(value, v))
    except ValueError:
        raise ValueError(
            f"{who} needs {name} to be a scalar, an array or a tree prefix of v; {name} has structure "
            f"{jax.tree.structure(value)} and v has {jax.tree.structure(v)}; give {name} the structure of v."
        ) from None


def _is_array(leaf: Any, kind: Any) -> bool:
    return isinstance(leaf, ARRAYS) and jnp.issubdtype(jnp.result_type(leaf), kind)


def describe(leaf: Any) -> str:
    if isinstance(leaf, ARRAYS):
        return f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"
    return f"a {type(leaf).__name__}" + (f" of length {len(leaf)}" if isinstance(leaf, tuple | list) else "")
