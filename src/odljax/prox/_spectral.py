"""Functions of eigenvalues and singular values whose derivatives are right at repeated and at zero ones.

The derivative of Q diag(f(w)) Q' in the direction E is Q (F * (Q' E Q)) Q' with the divided differences F_ij =
(f(w_i) - f(w_j)) / (w_i - w_j), or f' where w_i = w_j (Löwner; Lewis, 1996). For the piecewise linear functions here
they are ratios without cancellation. That of eigenvectors, which does not exist at ties, is never taken: the
derivative is a linear primitive with a derivative of its own. Third derivatives would take it, and are refused.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .._moving import moving


def positive_part(x: Array) -> Array:
    """Return the nearest positive semi-definite matrices to symmetric ones [..., n, n]; at kinks that of the cone."""
    return _symmetric(x)


def shrink_singular_values(x: Array, threshold: Array) -> Array:
    """Return U diag(max(s - t, 0)) V' for matrices [..., m, n] = U diag(s) V' and t >= 0 [..., 1, 1]."""
    if x.shape[-2] < x.shape[-1]:
        return shrink_singular_values(x.mT, threshold).mT
    return _singular(x, threshold, "ramp")


# ---- divided differences of max(w, 0) and of its derivative, whose value at the kink is `kink` -----------------------


def _is_positive(w: Array, kink: int) -> Array:
    return w >= 0 if kink else w > 0


def _ramp_first(a: Array, b: Array, kink: int) -> Array:
    up, down = _is_positive(a, kink), _is_positive(b, kink)
    width = jnp.abs(a) + jnp.abs(b)
    mixed = jnp.maximum(jnp.maximum(a, b), 0) / jnp.where(width == 0, 1, width)
    return jnp.where(up == down, up.astype(a.dtype), mixed)


def _ramp_second(a: Array, b: Array, c: Array, kink: int) -> Array:
    low, high = jnp.minimum(jnp.minimum(a, b), c), jnp.maximum(jnp.maximum(a, b), c)
    middle = jnp.maximum(jnp.minimum(a, b), jnp.minimum(jnp.maximum(a, b), c))
    bottom, between, top = (_is_positive(w, kink) for w in (low, middle, high))
    numerator = jnp.where(between, -low, high)
    denominator = (high - low) * jnp.where(between, middle - low, high - middle)
    mixed = (bottom != top) & (denominator != 0)
    return jnp.where(mixed, numerator / jnp.where(mixed, denominator, 1), 0)


def _step_first(a: Array, b: Array, kink: int) -> Array:
    apart = _is_positive(a, kink) != _is_positive(b, kink)
    width = jnp.where(apart & (a != b), jnp.abs(a - b), 1)
    return jnp.where(apart & (a != b), 1 / width, 0)


def _odd_first(kind: str, a: Array, b: Array, t: Array) -> Array:
    """Of the odd function that is max(w - t, 0), or minus its slope, for w >= 0."""
    if kind == "ramp":
        return _ramp_first(a - t, b - t, 1) + _ramp_first(-a - t, -b - t, 0)
    return -_step_first(a - t, b - t, 1) - _step_first(-a - t, -b - t, 0)


# ---- symmetric matrices ----------------------------------------------------------------------------------------------


def _conjugate(q: Array, x: Array) -> Array:
    return q @ x @ q.mT


def _second(table: Array, q: Array, a: Array, b: Array) -> Array:
    """The second derivative in the directions a and b, given the second divided differences [..., i, k, j]."""
    a, b = _conjugate(q.mT, a), _conjugate(q.mT, b)
    inner = jnp.einsum("...ikj,...ik,...kj->...ij", table, a, b)
    return _conjugate(q, inner + jnp.einsum("...ikj,...ik,...kj->...ij", table, b, a))


def _too_often(who: str) -> NotImplementedError:
    return NotImplementedError(f"{who}: third derivatives are not defined; differentiate twice at most.")


def _differentiated_twice(x: Array, who: str) -> Array:
    """x, of which no further derivative can be taken."""

    def refuse(*_: Any) -> Array:
        raise _too_often(who)

    return moving(jax.lax.stop_gradient(x), x, refuse)


def _triples(w: Array) -> tuple[Array, Array, Array]:
    return w[..., :, None, None], w[..., None, :, None], w[..., None, None, :]


@jax.custom_jvp
def _symmetric(x: Array) -> Array:
    w, q = jnp.linalg.eigh(x)
    return (q * jnp.maximum(w, 0)[..., None, :]) @ q.mT


@_symmetric.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (x,), (e,) = primals, tangents
    w, q = jax.lax.stop_gradient(jnp.linalg.eigh(jax.lax.stop_gradient(x)))
    return _symmetric(x), _apply("symmetric", (x, w, q), (e + e.mT) / 2)


def _symmetric_first(x: Array, w: Array, q: Array, e: Array) -> Array:
    return _conjugate(q, _ramp_first(w[..., :, None], w[..., None, :], 0) * _conjugate(q.mT, e))


def _symmetric_second(x: Array, w: Array, q: Array, e: Array, change: Array) -> Array:
    w, q = jnp.linalg.eigh(_differentiated_twice(x, "prox.psd_cone"))
    return _second(_ramp_second(*_triples(w), 0), q, e, (change + change.mT) / 2)


# ---- singular values, of matrices at least as high as wide -----------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _singular(x: Array, t: Array, kind: str) -> Array:
    u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    return (u * _of_values(kind, s, t)) @ vt


def _of_values(kind: str, s: Array, t: Array) -> Array:
    s = s[..., None, :]
    return jnp.maximum(s - t, 0) if kind == "ramp" else -((s >= t) & (s > 0)).astype(s.dtype)


@_singular.defjvp
def _(kind: str, primals: Any, tangents: Any) -> Any:
    (x, t), (e, t_dot) = primals, tangents
    u, s, vt = jax.lax.stop_gradient(jnp.linalg.svd(jax.lax.stop_gradient(x), full_matrices=False))
    tangent = _apply(kind, (x, t, u, s, vt), e)
    if kind == "ramp":  # the slope is constant in t
        tangent = tangent + _singular(x, t, "step") * t_dot
    return _singular(x, t, kind), tangent


def _singular_first(kind: str, x: Array, t: Array, u: Array, s: Array, vt: Array, e: Array) -> Array:
    inner = u.mT @ e @ vt.mT
    a, b = jnp.broadcast_arrays(s[..., :, None], s[..., None, :])
    along, across = _odd_first(kind, a, b, t), _odd_first(kind, a, -b, t)
    middle = along * (inner + inner.mT) / 2 + across * (inner - inner.mT) / 2
    s = s[..., None, :]
    outside = (e @ vt.mT - u @ inner) * _odd_first(kind, s, jnp.zeros_like(s), t)
    return (u @ middle + outside) @ vt


def _singular_second(x: Array, t: Array, e: Array, change: Array) -> Array:
    """By the symmetric matrix [[0, x], [x', 0]], whose eigenvalues are s, -s and zeros."""
    m, n = x.shape[-2:]
    u, s, vt = jnp.linalg.svd(_differentiated_twice(x, "prox.nuclear"), full_matrices=True)
    v, half = vt.mT, jnp.asarray(0.5**0.5, x.dtype)
    w = jnp.concatenate([s, -s, jnp.zeros((*s.shape[:-1], m - n), s.dtype)], axis=-1)
    upper = jnp.concatenate([half * u[..., :n], half * u[..., :n], u[..., n:]], axis=-1)
    lower = jnp.concatenate([half * v, -half * v, jnp.zeros((*s.shape[:-1], n, m - n), s.dtype)], axis=-1)
    q = jnp.concatenate([upper, lower], axis=-2)
    (i, k, j), t = _triples(w), t[..., None]
    table = _ramp_second(i - t, k - t, j - t, 1) - _ramp_second(-i - t, -k - t, -j - t, 0)
    e, change = (
        jnp.concatenate(
            [
                jnp.concatenate([jnp.zeros((*a.shape[:-2], m, m), a.dtype), a], axis=-1),
                jnp.concatenate([a.mT, jnp.zeros((*a.shape[:-2], n, n), a.dtype)], axis=-1),
            ],
            axis=-2,
        )
        for a in (e, change)
    )
    return _second(table, q, e, change)[..., :m, m:]


# ---- the primitive: first(kind, known, e), linear and self-adjoint in e ----------------------------------------------


def _first(*operands: Any, kind: str) -> Array:
    if kind == "symmetric":
        return _symmetric_first(*operands)
    return _singular_first(kind, *operands)


def _apply(kind: str, known: tuple[Array, ...], e: Array) -> Array:
    return _primitive().bind(*known, e, kind=kind)


@functools.cache
def _primitive() -> Any:
    """A linear map whose derivative in what it depends on is known in closed form, and not that of eigenvectors."""
    from jax.extend.core import Primitive  # costs 30 ms, so not on import
    from jax.interpreters import ad, batching, mlir

    primitive = Primitive("odljax_spectral_derivative")
    jitted: Callable[..., Array] = jax.jit(_first, static_argnames="kind")
    primitive.def_impl(jitted)
    primitive.def_abstract_eval(lambda *operands, kind: operands[-1].update(weak_type=False))
    mlir.register_lowering(primitive, mlir.lower_fun(_first, multiple_results=False))

    def batch(operands: Any, axes: Any, *, kind: str) -> Any:
        size = next(o.shape[a] for o, a in zip(operands, axes, strict=True) if a is not None)
        moved = [
            jnp.broadcast_to(o, (size, *o.shape)) if a is None else jnp.moveaxis(o, a, 0)
            for o, a in zip(operands, axes, strict=True)
        ]
        return primitive.bind(*moved, kind=kind), 0

    def differentiate(primals: Any, tangents: Any, *, kind: str) -> Any:
        *known, e = primals
        moved, e_dot = tangents[0], tangents[-1]
        t_dot = tangents[1] if kind != "symmetric" else None
        out = primitive.bind(*primals, kind=kind)
        tangent = jnp.zeros_like(out)
        if type(e_dot) is not ad.Zero:
            tangent = tangent + primitive.bind(*known, e_dot, kind=kind)
        if type(moved) is not ad.Zero:
            if kind == "symmetric":
                x, w, q = known
                tangent = tangent + _symmetric_second(x, w, q, e, moved)
            elif kind == "ramp":
                tangent = tangent + _singular_second(known[0], known[1], e, moved)
            else:
                raise _too_often("prox.nuclear")
        if t_dot is not None and type(t_dot) is not ad.Zero and kind == "ramp":
            tangent = tangent + primitive.bind(*known, e, kind="step") * t_dot
        return out, tangent

    def transpose(cotangent: Any, *operands: Any, kind: str) -> Any:
        *known, _ = operands
        return [None] * len(known) + [
            cotangent if type(cotangent) is ad.Zero else primitive.bind(*known, cotangent, kind=kind)
        ]

    batching.primitive_batchers[primitive] = batch
    ad.primitive_jvps[primitive] = differentiate
    ad.primitive_transposes[primitive] = transpose
    return primitive
