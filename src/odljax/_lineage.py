r"""The test problems of the papers on bilevel methods, each with the answer that is known.

The names of the variables are this library's: x is the inner one, theta the hyper-variable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from . import prox
from ._checks import count, number, record
from ._types import Scalar


@record
class Lineage:
    """A bilevel problem of the literature with its known answer.

    Args:
        name: its name.
        inner: ``(x, theta) -> scalar``, the inner objective, or its smooth part.
        outer: ``(x, theta) -> scalar``.
        x0: the published start of x.
        theta: the published start of theta.
        solution: ``theta -> x``, the inner solution; the best for the outer loss where there are several.
        minimiser: the theta of least outer loss at the solution; one of them where there are several.
        theta_range: bounds on theta; None: free.
        x_range: bounds on x; None: free.
        step_size: a safe inner step, 1/L over the bounds.
        prox: the proximal operator ``(v, theta, step_size) -> v`` of the non-smooth inner part, or None.
        nonsmooth: that part, ``(x, theta) -> scalar``, or None.
    """

    name: str
    inner: Callable[[Any, Any], Any]
    outer: Callable[[Any, Any], Any]
    x0: Any
    theta: Any
    solution: Callable[[Any], Any]
    minimiser: Any
    step_size: float
    theta_range: tuple[float, float] | None = None
    x_range: tuple[float, float] | None = None
    prox: Callable[[Any, Any, Any], Any] | None = None
    nonsmooth: Callable[[Any, Any], Any] | None = None

    def value(self, theta: Any) -> Array:
        """The outer loss at the inner solution, in closed form."""
        return self.outer(self.solution(theta), theta)

    def project(self, theta: Any) -> Any:
        """Theta within its bounds."""
        if self.theta_range is None:
            return theta
        low, high = self.theta_range
        return jax.tree.map(lambda leaf: jnp.clip(leaf, low, high), theta)


def _float(value: Any, dtype: Any) -> Array:
    return jnp.asarray(value, jnp.asarray(0.0).dtype if dtype is None else dtype)


def _ones(value: Any, size: int, dtype: Any) -> Array:
    return _float(np.full(size, value), dtype)


def lineage_pbgd(*, dtype: Any = None) -> Lineage:
    r"""Returns the test problem of PBGD: a non-convex inner loss that satisfies a Polyak-Lojasiewicz inequality.

    .. math:: f = (x + \theta)^2 + \theta \sin^2(x + \theta), \quad
        F = \frac{\cos(4 x + 2)}{1 + e^{2 - 4 \theta}} + \tfrac12 \log((4 \theta - 2)^2 + 1), \quad \theta \in [0, 3]

    The inner solution is :math:`x = -\theta`. The outer loss there has three local minima, at 0.38236, 1.21515 and
    2.82964, of value 0.4427, 0.1999 and 1.2435: a local method ends at one of them, alternating descent at none.

    Shapes: x and theta ().

    Args:
        dtype: of x and theta; default the default float.

    Source: Shen and Chen (2023), arXiv 2302.05185. The minima: a grid of 3e5 points.

    Example:
        >>> import jax, odljax as odl
        >>> problem = odl.problems.lineage_pbgd()
        >>> abs(float(jax.grad(problem.value)(problem.minimiser))) < 1e-4
        True
    """

    def inner(x: Array, theta: Array) -> Array:
        return (x + theta) ** 2 + theta * jnp.sin(x + theta) ** 2

    def outer(x: Array, theta: Array) -> Array:
        return jnp.cos(4 * x + 2) * jax.nn.sigmoid(4 * theta - 2) + 0.5 * jnp.log((4 * theta - 2) ** 2 + 1)

    return Lineage(
        name="lineage_pbgd",
        inner=inner,
        outer=outer,
        x0=_float(0.0, dtype),
        theta=_float(1.0, dtype),
        solution=lambda theta: -theta,
        minimiser=_float(1.215145475, dtype),
        step_size=1 / 8,
        theta_range=(0.0, 3.0),
    )


def lineage_sine(size: int = 1, a: Scalar = 2.0, c: Scalar = 2.0, start: Scalar = 0.0, *, dtype: Any = None) -> Lineage:
    r"""Returns the sine problem of BVFSM and MEHA: infinitely many inner minima, all of them global.

    .. math:: f = \sum_i \sin(\theta + x_i - c), \quad F = (\theta - a)^2 + \sum_i (x_i - a - c)^2

    The inner solutions are :math:`x_i = c - \theta - \pi/2 + 2 \pi k`; the best has k = 1 near :math:`\theta = a`.
    With all :math:`x_i` there, :math:`\theta = (a + n (3 \pi / 2 - a)) / (1 + n)`, that is :math:`3 \pi / 4` for n = 1.
    A method that stays on the branch of its start ends at :math:`(a + n ((2 k - 1/2) \pi - a)) / (1 + n)`.

    Shapes: x (size,), theta ().

    Args:
        size: n, at least 1.
        a: the outer target; the closed form holds for 0 < a < 3.
        c: the shift.
        start: of theta and every entry of x; the papers take -6 and 0.
        dtype: of x and theta; default the default float.

    Raises:
        ValueError: a size below 1, a outside (0, 3).

    Source: Liu et al. (2021), arXiv 2110.04974, for c = 2; Liu et al. (2024), arXiv 2405.09927.

    Example:
        >>> import odljax as odl
        >>> round(float(odl.problems.lineage_sine().minimiser), 4)
        2.3562
    """
    count("lineage_sine", "size", size)
    number("lineage_sine", "a", a, high=3.0)

    def solution(theta: Array) -> Array:
        k = jnp.round((a + theta + np.pi / 2) / (2 * np.pi))  # the branch nearest to a + c
        return jnp.full(size, c - theta - np.pi / 2 + 2 * np.pi * k, theta.dtype)

    return Lineage(
        name="lineage_sine",
        inner=lambda x, theta: jnp.sum(jnp.sin(theta + x - c)),
        outer=lambda x, theta: (theta - a) ** 2 + jnp.sum((x - a - c) ** 2),
        x0=_ones(start, size, dtype),
        theta=_float(start, dtype),
        solution=solution,
        minimiser=_float((a + size * (1.5 * np.pi - a)) / (1 + size), dtype),
        step_size=1.0,
    )


def lineage_l1(size: int = 1000, *, dtype: Any = None) -> Lineage:
    r"""Returns the non-smooth problem of MEHA: a penalty for every coordinate.

    .. math:: \varphi = \tfrac12 \|x - a\|^2 + \sum_i \theta_i |x_i|, \quad F = \sum_i x_i, \quad \theta \in [0, 1]^n

    with :math:`a_i = 1/n` in the first half and :math:`-1/n` in the second. The inner solution is :math:`a` shrunk by
    theta; so the first half wants to vanish, the second to stay: :math:`\theta = (1/n, 0)`, :math:`x = (0, -1/n)`, F =
    -1/2. Any :math:`\theta_i \ge 1/n` in the first half is as good.

    Shapes: x and theta (size,).

    Args:
        size: n, even, at least 2.
        dtype: of x and theta; default the default float.

    Raises:
        ValueError: a size below 2 or odd.

    Source: Liu et al. (2024), arXiv 2405.09927.

    Example:
        >>> import odljax as odl
        >>> problem = odl.problems.lineage_l1(10)
        >>> round(float(problem.value(problem.minimiser)), 4)
        -0.5
    """
    count("lineage_l1", "size", size, least=2)
    if size % 2:
        raise ValueError(f"lineage_l1: size must be even; {size} came.")
    signs = np.repeat([1.0, -1.0], size // 2)
    a = _float(signs / size, dtype)
    return Lineage(
        name="lineage_l1",
        inner=lambda x, theta: 0.5 * jnp.sum((x - a) ** 2),
        outer=lambda x, theta: jnp.sum(x),
        x0=jnp.zeros_like(a),
        theta=jnp.full_like(a, 0.5 / size),
        solution=lambda theta: prox.l1(a, theta),
        minimiser=_float((signs > 0) / size, dtype),
        step_size=1.0,
        theta_range=(0.0, 1.0),
        prox=prox.l1,
        nonsmooth=lambda x, theta: jnp.sum(theta * jnp.abs(x)),
    )


def lineage_iaptt(*, dtype: Any = None) -> Lineage:
    r"""Returns the test problem of IAPTT: several inner minima, of which the outer loss wants the lowest.

    .. math:: f = -\sin(\theta x), \quad F = \theta + \theta x, \quad \theta \in [1, 10],\ x \in [-2, 2]

    The inner solutions are :math:`\theta x = \pi/2 + 2 \pi k` within the bounds, the best of them at the largest
    :math:`-k`. The answer is :math:`\theta = 11 \pi / 4, x = -2`, at a corner: F jumps where a lower branch enters.
    The paper walks K = 40 inner steps of 5e-4 and takes outer steps of 0.1, in theta and in the start of x.

    Shapes: x and theta ().

    Args:
        dtype: of x and theta; default the default float.

    Source: Liu, Liu, Zeng and Zhang (2021), arXiv 2110.00455. The answer: a grid of 9e5 points.

    Example:
        >>> import odljax as odl
        >>> problem = odl.problems.lineage_iaptt()
        >>> round(float(problem.value(problem.minimiser)), 4)  # -11 pi / 4
        -8.6394
    """

    def solution(theta: Array) -> Array:
        k = jnp.ceil((-2 * theta - np.pi / 2) / (2 * np.pi) - 1e-6)  # the lowest branch inside
        return (np.pi / 2 + 2 * np.pi * k) / theta

    return Lineage(
        name="lineage_iaptt",
        inner=lambda x, theta: -jnp.sin(theta * x),
        outer=lambda x, theta: theta + theta * x,
        x0=_float(2.0, dtype),
        theta=_float(1.0, dtype),
        solution=solution,
        minimiser=_float(11 * np.pi / 4, dtype),
        step_size=5e-4,
        theta_range=(1.0, 10.0),
        x_range=(-2.0, 2.0),
    )


def lineage_bamm(size: int = 1, *, dtype: Any = None) -> Lineage:
    r"""Returns the strongly convex problem of sl-BAMM, on which every correct method must agree.

    .. math:: f = \tfrac12 \|x\|^2 - \theta^\top x, \quad F = \tfrac12 \|x\|^2 + \tfrac12 \|\theta - 1\|^2

    The inner solution is :math:`x = \theta`, the answer :math:`\theta = 1/2`; alternating descent ends at 1.

    Shapes: x and theta (size,).

    Args:
        size: at least 1.
        dtype: of x and theta; default the default float.

    Raises:
        ValueError: a size below 1.

    Source: Liu, Liu, Yao, Zeng and Zhang (2023), arXiv 2302.03407. Its merely convex one is ``p_c(0.0)``.

    Example:
        >>> import odljax as odl
        >>> odl.problems.lineage_bamm().minimiser.tolist()
        [0.5]
    """
    count("lineage_bamm", "size", size)
    return Lineage(
        name="lineage_bamm",
        inner=lambda x, theta: 0.5 * jnp.sum(x**2) - jnp.sum(theta * x),
        outer=lambda x, theta: 0.5 * jnp.sum(x**2) + 0.5 * jnp.sum((theta - 1) ** 2),
        x0=_ones(2.0, size, dtype),
        theta=_ones(2.0, size, dtype),
        solution=lambda theta: theta,
        minimiser=_ones(0.5, size, dtype),
        step_size=1.0,
    )


LINEAGE: dict[str, Callable[..., Lineage]] = {
    "lineage_bamm": lineage_bamm,
    "lineage_iaptt": lineage_iaptt,
    "lineage_l1": lineage_l1,
    "lineage_pbgd": lineage_pbgd,
    "lineage_sine": lineage_sine,
}
"""The test problems of the literature, by name."""
