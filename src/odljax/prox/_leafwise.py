"""The skeleton that the operators fill in: checked leaves, coefficients cast and shaped to them, a norm safe at 0."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

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
    value = jnp.asarray(value, dtype)
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
    """Return the Euclidean norm over xs (along axis, kept): derivative 0 at 0, no overflow where the norm has none."""
    keep = axis is not None
    held = jax.lax.stop_gradient(xs)  # the norm does not depend on the unit in which it is computed: no derivative
    peaks = [jnp.max(jnp.abs(x), axis=axis, keepdims=keep, initial=0) for x in held]
    peak = functools.reduce(jnp.maximum, peaks)
    unit = jnp.where((peak > 0) & (peak < jnp.inf), peak, 1)
    square = sum(jnp.sum(_squared_modulus(x / unit.astype(x.dtype)), axis=axis, keepdims=keep) for x in xs)
    zero = square == 0
    return unit * jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))


def shrink_length(x: Array, length: Array, threshold: Array) -> Array:
    """Return x with its length shortened by threshold, 0 where it is shorter; at length 0 = threshold it is x."""
    gone = length < threshold
    ratio = jnp.where(gone, 1, threshold) / jnp.where(gone | (length == 0), 1, length)
    return x * (1 - ratio).astype(x.dtype)


def modulus(x: Array) -> Array:
    """Return |x| entry by entry: derivative 0 at 0, and no overflow, for complex numbers too."""
    if not jnp.iscomplexobj(x):
        return jnp.abs(x)
    return norm([x[..., None]], axis=-1)[..., 0]


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
