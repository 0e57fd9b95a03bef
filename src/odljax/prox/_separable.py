"""Entry-by-entry operators."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from .._types import Float, Inexact, PyTree
from ._leafwise import STATIC, leafwise, modulus, pair, phase, shrink_length, spread


def identity(v: PyTree[ArrayLike], parameter: object = None, step_size: object = 1.0) -> PyTree[Inexact[Array, "..."]]:
    """Return v: the proximal operator of h = 0.

    Turns a proximal method into its smooth special case without another code path.

    Shapes: any tree of any shapes.
    Args:
        v: tree of floating-point arrays.
        parameter: ignored.
        step_size: ignored.
    Returns: v as arrays.
    Raises: TypeError where a leaf of v is not real floating-point.
    At kinks: there are none.
    Cost: none.
    Source: Moreau, 1965, with h = 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.identity(jnp.array([1.0, -2.0])).tolist()
        [1.0, -2.0]
    """
    return leafwise("prox.identity", lambda x: x, v, or_complex=True)


def non_negative(
    v: PyTree[ArrayLike], parameter: object = None, step_size: object = 1.0
) -> PyTree[Float[Array, "..."]]:
    """Return max(v, 0): the projection onto the non-negative orthant.

    For inner problems with x >= 0. h is the indicator of the orthant, so that the step size plays no part.

    Shapes: any tree of any shapes, entry by entry.
    Args:
        v: tree of floating-point arrays.
        parameter: ignored.
        step_size: ignored.
    Returns: a tree like v.
    Raises: TypeError where a leaf of v is not real floating-point.
    At kinks: the derivative at v = 0 is 0.
    Cost: one pass.
    Source: Parikh and Boyd, 2014, section 6.2.1.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.non_negative(jnp.array([1.0, -2.0])).tolist()
        [1.0, 0.0]
    """
    return leafwise("prox.non_negative", lambda x: _at_least(x, jnp.zeros_like(x)), v)


def box(v: PyTree[ArrayLike], parameter: PyTree[ArrayLike], step_size: object = 1.0) -> PyTree[Float[Array, "..."]]:
    """Return min(max(v, lower), upper): the projection onto the box lower <= x <= upper.

    For bounds on every entry; infinite bounds are allowed, and lower = upper holds an entry fixed. h is the indicator
    of the box, so that the step size plays no part.

    Shapes: any tree of any shapes, entry by entry; each bound is a scalar, an array that broadcasts to the leaf,
        or a tree of these that is a prefix of v.
    Args:
        v: tree of floating-point arrays.
        parameter: (lower, upper) with lower <= upper; where that fails in traced values, upper is returned.
        step_size: ignored.
    Returns: a tree like v.
    Raises: TypeError where a leaf of v is not real floating-point or a bound not a real number; ValueError where
        parameter is not a pair, the structure or shape of a bound does not fit v, or Python or NumPy bounds cross.
    At kinks: the derivative on a bound is that of the bound (0 in v, 1 in the bound).
    Cost: one pass.
    Source: Parikh and Boyd, 2014, section 6.2.4.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.box(jnp.array([2.0, -3.0, 0.5]), (-1.0, 1.0)).tolist()
        [1.0, -1.0, 0.5]
    """
    lower, upper = pair("prox.box", "(lower, upper)", parameter)
    result = leafwise("prox.box", _clip, v, signed=True, lower=lower, upper=upper)
    for low, high in zip(spread("prox.box", "lower", lower, v), spread("prox.box", "upper", upper, v), strict=True):
        if isinstance(low, STATIC) and isinstance(high, STATIC) and np.any(np.asarray(low) > np.asarray(high)):
            raise ValueError(f"prox.box needs lower <= upper; they are {low} and {high}; exchange them.")
    return result


def l1(
    v: PyTree[ArrayLike], parameter: PyTree[ArrayLike], step_size: PyTree[ArrayLike] = 1.0
) -> PyTree[Inexact[Array, "..."]]:
    """Return sign(v) max(|v| - t, 0) with t = step_size * lam: soft thresholding, for h = lam |x|_1.

    For sparse x, as in the lasso and in sparse coding.

    Shapes: any tree of any shapes, entry by entry; lam and step_size are scalars, arrays that broadcast to the leaf,
        or trees of these that are prefixes of v.
    Args:
        v: tree of floating-point arrays.
        parameter: lam >= 0.
        step_size: >= 0; one for each entry gives the operator in that diagonal metric.
    Returns: a tree like v.
    Raises: TypeError where a leaf of v is not real floating-point or a coefficient not a real number; ValueError where
        the structure or shape of a coefficient does not fit v, or it is a negative Python or NumPy number.
    At kinks: where |v| = t the derivative is that of the shrinking side: 1 in v and -sign(v) in t.
    Cost: one pass.
    Source: Daubechies, Defrise and De Mol, 2004.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.l1(jnp.array([3.0, -0.5]), 2.0, step_size=0.5).tolist()
        [2.0, 0.0]
    """
    rule = lambda x, lam, step: _shrink(x, step * lam)  # noqa: E731
    return leafwise("prox.l1", rule, v, or_complex=True, lam=parameter, step_size=step_size)


def ridge(
    v: PyTree[ArrayLike], parameter: PyTree[ArrayLike], step_size: PyTree[ArrayLike] = 1.0
) -> PyTree[Inexact[Array, "..."]]:
    """Return v / (1 + step_size * lam): the proximal operator of h = lam/2 |x|^2.

    For Tikhonov terms that are better taken implicitly than by a gradient step.

    Shapes: any tree of any shapes, entry by entry; lam and step_size are scalars, arrays that broadcast to the leaf,
        or trees of these that are prefixes of v.
    Args:
        v: tree of floating-point arrays.
        parameter: lam >= 0.
        step_size: >= 0; one for each entry gives the operator in that diagonal metric.
    Returns: a tree like v.
    Raises: TypeError where a leaf of v is not real floating-point or a coefficient not a real number; ValueError where
        the structure or shape of a coefficient does not fit v, or it is a negative Python or NumPy number.
    At kinks: there are none.
    Cost: one pass.
    Source: Parikh and Boyd, 2014, section 6.1.1.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.ridge(jnp.array([3.0, -1.0]), 2.0, step_size=0.5).tolist()
        [1.5, -0.5]
    """
    rule = lambda x, lam, step: x / (1 + step * lam).astype(x.dtype)  # noqa: E731
    return leafwise("prox.ridge", rule, v, or_complex=True, lam=parameter, step_size=step_size)


def elastic_net(
    v: PyTree[ArrayLike], parameter: PyTree[ArrayLike], step_size: PyTree[ArrayLike] = 1.0
) -> PyTree[Inexact[Array, "..."]]:
    """Return sign(v) max(|v| - t, 0) / (1 + t gamma), t = step_size * lam: h = lam |x|_1 + lam gamma/2 |x|^2.

    For sparse x where the lasso's solution is not unique or not stable: gamma > 0 makes h strongly convex.

    Shapes: any tree of any shapes, entry by entry; lam, gamma and step_size are scalars, arrays that broadcast to the
        leaf, or trees of these that are prefixes of v.
    Args:
        v: tree of floating-point arrays.
        parameter: (lam, gamma), both >= 0.
        step_size: >= 0; one for each entry gives the operator in that diagonal metric.
    Returns: a tree like v.
    Raises: TypeError where a leaf of v is not real floating-point or a coefficient not a real number; ValueError where
        parameter is not a pair, the structure or shape of a coefficient does not fit v, or it is a negative Python or
        NumPy number.
    At kinks: where |v| = t the derivative is that of the shrinking side.
    Cost: one pass.
    Source: Zou and Hastie, 2005; scaled so that gamma is the ratio of the two terms.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> v = jnp.array([3.0, -0.5])
        >>> prox.elastic_net(v, (1.0, 3.0)).tolist()
        [0.5, 0.0]

        scikit-learn writes alpha l1_ratio |x|_1 + alpha (1 - l1_ratio) / 2 |x|^2: lam = alpha l1_ratio and gamma =
        (1 - l1_ratio) / l1_ratio. Here alpha = 2, l1_ratio = 0.5; at l1_ratio = 0, where gamma has no value, it is
        `ridge`. Two steps, the l1 norm first, take any ratio, 0 included:

        >>> prox.elastic_net(v, (2.0 * 0.5, (1 - 0.5) / 0.5)).tolist()
        [1.0, 0.0]
        >>> alpha, l1_ratio, step = 2.0, 0.0, 0.5
        >>> prox.ridge(prox.l1(v, alpha * l1_ratio, step), alpha * (1 - l1_ratio), step).tolist()
        [1.5, -0.25]
    """
    lam, gamma = pair("prox.elastic_net", "(lam, gamma)", parameter)
    coefficients = {"lam": lam, "gamma": gamma, "step_size": step_size}
    return leafwise("prox.elastic_net", _shrink_and_scale, v, or_complex=True, **coefficients)


def non_negative_l1(
    v: PyTree[ArrayLike], parameter: PyTree[ArrayLike], step_size: PyTree[ArrayLike] = 1.0
) -> PyTree[Float[Array, "..."]]:
    """Return max(v - t, 0), t = step_size * lam: h = lam (sum of x) on x >= 0.

    For sparse non-negative x, as in non-negative sparse coding.

    Shapes: any tree of any shapes, entry by entry; lam and step_size are scalars, arrays that broadcast to the
        leaf, or trees of these that are prefixes of v.
    Args:
        v: tree of floating-point arrays.
        parameter: lam >= 0.
        step_size: >= 0; one for each entry gives the operator in that diagonal metric.
    Returns: a tree like v.
    Raises: TypeError where a leaf of v is not real floating-point or a coefficient not a real number; ValueError where
        the structure or shape of a coefficient does not fit v, or it is a negative Python or NumPy number.
    At kinks: where v = t the derivative is that of the shrinking side: 1 in v and -1 in t.
    Cost: one pass.
    Source: Parikh and Boyd, 2014, section 6.5.2, restricted to x >= 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.non_negative_l1(jnp.array([3.0, -3.0, 0.5]), 1.0).tolist()
        [2.0, 0.0, 0.0]
    """
    return leafwise("prox.non_negative_l1", _shrink_above, v, lam=parameter, step_size=step_size)


def non_negative_ridge(
    v: PyTree[ArrayLike], parameter: PyTree[ArrayLike], step_size: PyTree[ArrayLike] = 1.0
) -> PyTree[Float[Array, "..."]]:
    """Return max(v, 0) / (1 + step_size * lam): h = lam/2 |x|^2 on x >= 0.

    For non-negative least squares with a Tikhonov term.

    Shapes: any tree of any shapes, entry by entry; lam and step_size are scalars, arrays that broadcast to the
        leaf, or trees of these that are prefixes of v.
    Args:
        v: tree of floating-point arrays.
        parameter: lam >= 0.
        step_size: >= 0; one for each entry gives the operator in that diagonal metric.
    Returns: a tree like v.
    Raises: TypeError where a leaf of v is not real floating-point or a coefficient not a real number; ValueError where
        the structure or shape of a coefficient does not fit v, or it is a negative Python or NumPy number.
    At kinks: the derivative at v = 0 is 0.
    Cost: one pass.
    Source: Parikh and Boyd, 2014, sections 6.1.1 and 6.2.1.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.non_negative_ridge(jnp.array([3.0, -1.0]), 2.0, step_size=0.5).tolist()
        [1.5, 0.0]
    """
    return leafwise(
        "prox.non_negative_ridge",
        lambda x, lam, step: _at_least(x, jnp.zeros_like(x)) / (1 + step * lam),
        v,
        lam=parameter,
        step_size=step_size,
    )


def huber(
    v: PyTree[ArrayLike], parameter: PyTree[ArrayLike], step_size: PyTree[ArrayLike] = 1.0
) -> PyTree[Inexact[Array, "..."]]:
    """Return v / (1 + t) where |v| < (1 + t) delta and v - t delta sign(v) beyond, t = step_size * lam.

    h = lam (sum of x^2/2 where |x| <= delta, delta (|x| - delta/2) beyond): quadratic for small entries, linear for
    outliers.

    Shapes: any tree of any shapes, entry by entry; lam, delta and step_size are scalars, arrays that broadcast to the
        leaf, or trees of these that are prefixes of v.
    Args:
        v: tree of real or complex floating-point arrays.
        parameter: (lam, delta), both >= 0; delta = inf is ridge.
        step_size: >= 0; one for each entry gives the operator in that diagonal metric.
    Returns: a tree like v.
    Raises: TypeError where a leaf of v is not real floating-point or a coefficient not a real number; ValueError where
        parameter is not a pair, the structure or shape of a coefficient does not fit v, or it is a negative Python or
        NumPy number.
    At kinks: where |v| = (1 + t) delta the derivative is that of the linear side: 1 in v.
    Cost: one pass.
    Source: Huber, 1964; the minimiser of either piece.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.huber(jnp.array([1.0, -5.0]), (1.0, 1.0)).tolist()
        [0.5, -4.0]
    """
    lam, delta = pair("prox.huber", "(lam, delta)", parameter)
    return leafwise("prox.huber", _huber, v, or_complex=True, lam=lam, delta=delta, step_size=step_size)


def log_barrier(
    v: PyTree[ArrayLike], parameter: PyTree[ArrayLike], step_size: PyTree[ArrayLike] = 1.0
) -> PyTree[Float[Array, "..."]]:
    """Return (v + sqrt(v^2 + 4 t)) / 2, t = step_size * lam: h = -lam (sum of log x).

    For x > 0 in interior-point splittings and Poisson models. Neither large nor very negative v overflows or cancels.

    Shapes: any tree of any shapes, entry by entry; lam and step_size are scalars, arrays that broadcast to the
        leaf, or trees of these that are prefixes of v.
    Args:
        v: tree of floating-point arrays.
        parameter: lam >= 0; 0 gives max(v, 0).
        step_size: >= 0; one for each entry gives the operator in that diagonal metric.
    Returns: a tree like v.
    Raises: TypeError where a leaf of v is not real floating-point or a coefficient not a real number; ValueError where
        the structure or shape of a coefficient does not fit v, or it is a negative Python or NumPy number.
    At kinks: where v = 0 and t = 0 the derivative is 1/2 in v, as for all t > 0, and 0 in t, where it has no limit.
    Cost: one pass.
    Source: Parikh and Boyd, 2014, section 6.1.3; the negative side by the conjugate root.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax import prox
        >>> prox.log_barrier(jnp.array([1.5, 0.0]), 1.0).tolist()
        [2.0, 1.0]
    """
    return leafwise("prox.log_barrier", _barrier, v, lam=parameter, step_size=step_size)


def _shrink_above(x: Array, lam: Array, step: Array) -> Array:
    return jnp.where(x < step * lam, 0, x - step * lam)


def _huber(x: Array, lam: Array, delta: Array, step: Array) -> Array:
    t = step * lam
    inside = modulus(x) < (1 + t) * delta
    sign = phase(x)[1] if jnp.iscomplexobj(x) else jnp.sign(x)
    pull = (t * jnp.where(inside, 0, delta)).astype(x.dtype)  # delta may be inf
    return jnp.where(inside, x / (1 + t).astype(x.dtype), x - sign * pull)


def _barrier(x: Array, lam: Array, step: Array) -> Array:
    t = step * lam
    held, held_t = jax.lax.stop_gradient((x, t))
    unit = jnp.maximum(jnp.abs(held), jnp.sqrt(held_t))  # the root does not depend on the unit it is computed in
    unit = jnp.where((unit > 0) & (unit < jnp.inf), unit, 1)
    square = jnp.square(x / unit) + 4 * (t / unit / unit)
    zero = square == 0
    length = unit * jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))
    negative = x < 0
    return jnp.where(negative, 2 * t / jnp.where(negative, length - x, 1), (x + length) / 2)


def _shrink(x: Array, threshold: Array) -> Array:
    # `<` and this order of the branches: a NaN in either argument comes out, and threshold 0 has derivative 1 even at 0
    if jnp.iscomplexobj(x):
        return shrink_length(x, *phase(x), threshold)
    return jnp.where(jnp.abs(x) < threshold, 0, x - jnp.sign(x) * threshold)


def _shrink_and_scale(x: Array, lam: Array, gamma: Array, step: Array) -> Array:
    return _shrink(x, step * lam) / (1 + step * lam * gamma).astype(x.dtype)


def _at_least(x: Array, bound: Array) -> Array:
    # the tie goes to the bound; maximum, which would halve the derivative there, carries NaN from either argument
    return jnp.where(x <= bound, bound, jnp.maximum(x, bound))


def _clip(x: Array, lower: Array, upper: Array) -> Array:
    return -_at_least(-_at_least(x, lower), -upper)
