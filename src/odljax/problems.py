r"""Small bilevel problems with closed-form answers, for tests, benchmarks and notebooks.

Each has an inner problem with solution :math:`x(\theta)` in closed form and an outer loss; the true hypergradient is
the derivative of the outer loss at that closed form.
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
from ._lineage import LINEAGE, Lineage, lineage_bamm, lineage_iaptt, lineage_l1, lineage_pbgd, lineage_sine
from ._types import Scalar

__all__ = [
    "LINEAGE",
    "PROBLEMS",
    "FiniteSum",
    "Lineage",
    "Problem",
    "Trilevel",
    "finite_sum",
    "lasso",
    "line",
    "lineage_bamm",
    "lineage_iaptt",
    "lineage_l1",
    "lineage_pbgd",
    "lineage_sine",
    "p_c",
    "p_c_minimiser",
    "quadratic",
    "ridge",
    "square_root",
    "tree",
    "trilevel",
]


@record
class Problem:
    """An inner problem, its closed-form solution, and an outer loss.

    Args:
        name: its name.
        T: ``(x, theta) -> x``, a map whose fixed point is the inner solution; a contraction unless the docstring says
        else. outer: ``(x, theta) -> scalar``.
        x0: a start.
        theta: a point at which to differentiate.
        solution: ``theta -> x`` in closed form.
        objective: the smooth inner objective ``(x, theta) -> scalar``, or None where T is not a gradient step.
        prox: the proximal operator ``(v, theta, step_size) -> v`` of the other part, or None.
        step_size: a safe step, 1/L, for objective and prox.
        strong_convexity: the least eigenvalue of the Hessian, or None.
    """

    name: str
    T: Callable[[Any, Any], Any]
    outer: Callable[[Any, Any], Any]
    x0: Any
    theta: Any
    solution: Callable[[Any], Any]
    objective: Callable[[Any, Any], Any] | None = None
    prox: Callable[[Any, Any, Any], Any] | None = None
    step_size: float | None = None
    strong_convexity: float | None = None

    def value(self, theta: Any) -> Array:
        """The outer loss at the inner solution, in closed form."""
        return self.outer(self.solution(theta), theta)

    def hypergradient(self, theta: Any) -> Any:
        """The gradient of ``value``."""
        return jax.grad(self.value)(theta)


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def _float(values: Any, dtype: Any) -> Array:
    return jnp.asarray(values, jnp.asarray(0.0).dtype if dtype is None else dtype)


def ridge(num_samples: int = 20, num_features: int = 6, *, seed: int = 0, dtype: Any = None) -> Problem:
    r"""Returns ridge regression with a learned penalty, judged on a second half of the data.

    .. math:: f(x, \theta) = \tfrac12 \|A x - b\|^2 + \tfrac12 e^\theta \|x\|^2, \quad
        x(\theta) = (A^\top A + e^\theta I)^{-1} A^\top b, \quad \ell = \tfrac12 \|A_v x - b_v\|^2

    Shapes: x (num_features,), theta ().

    Args:
        num_samples: rows of each half, at least 1.
        num_features: columns, at least 1.
        seed: of the Gaussian data.
        dtype: of data, x and theta; default the default float.

    Raises:
        ValueError: a size below 1.

    Source: Hoerl and Kennard (1970).

    Example:
        >>> import odljax as odl
        >>> odl.problems.ridge().solution(0.0).shape
        (6,)
    """
    count("ridge", "num_samples", num_samples)
    count("ridge", "num_features", num_features)
    rows = _normal(seed, 2 * num_samples, num_features) / np.sqrt(num_samples)
    targets = rows @ _normal(seed + 1, num_features) + 0.1 * _normal(seed + 2, 2 * num_samples)
    A, A_v = _float(rows[:num_samples], dtype), _float(rows[num_samples:], dtype)
    b, b_v = _float(targets[:num_samples], dtype), _float(targets[num_samples:], dtype)
    spectrum = np.linalg.eigvalsh(rows[:num_samples].T @ rows[:num_samples])
    theta = _float(-1.0, dtype)
    step = float(1 / (spectrum[-1] + np.exp(-1.0)))
    identity = jnp.eye(num_features, dtype=A.dtype)

    def objective(x: Array, theta: Array) -> Array:
        return 0.5 * jnp.sum((A @ x - b) ** 2) + 0.5 * jnp.exp(theta) * jnp.sum(x**2)

    return Problem(
        name="ridge",
        T=lambda x, theta: x - step * (A.T @ (A @ x - b) + jnp.exp(theta) * x),
        outer=lambda x, theta: 0.5 * jnp.sum((A_v @ x - b_v) ** 2),
        x0=jnp.zeros(num_features, A.dtype),
        theta=theta,
        solution=lambda theta: jnp.linalg.solve(A.T @ A + jnp.exp(theta) * identity, A.T @ b),
        objective=objective,
        step_size=step,
        strong_convexity=float(spectrum[0] + np.exp(-1.0)),
    )


def quadratic(condition: Scalar = 10.0, size: int = 6, *, seed: int = 0, dtype: Any = None) -> Problem:
    r"""Returns a quadratic of chosen condition number.

    .. math:: f(x, \theta) = \tfrac12 x^\top Q x - \theta^\top x, \quad x(\theta) = Q^{-1} \theta, \quad
        \ell = \tfrac12 \|x - 1\|^2 + \tfrac12 \|\theta\|^2

    Shapes: x and theta (size,). Q has eigenvalues spaced evenly in logarithm from 1/condition to 1.

    Args:
        condition: at least 1.
        size: at least 1.
        seed: of the eigenvectors and theta.
        dtype: of x and theta; default the default float.

    Raises:
        ValueError: a condition below 1, a size below 1.

    Example:
        >>> import odljax as odl
        >>> odl.problems.quadratic(condition=100.0).strong_convexity
        0.01
    """
    number("quadratic", "condition", condition, low=1.0, closed=True)
    count("quadratic", "size", size)
    eigenvalues = np.geomspace(1 / float(condition), 1.0, size)
    vectors = np.linalg.qr(_normal(seed, size, size))[0]
    Q = _float((vectors * eigenvalues) @ vectors.T, dtype)
    inverse = _float((vectors / eigenvalues) @ vectors.T, dtype)
    return Problem(
        name="quadratic",
        T=lambda x, theta: x - (Q @ x - theta),
        outer=lambda x, theta: 0.5 * jnp.sum((x - 1) ** 2) + 0.5 * jnp.sum(theta**2),
        x0=jnp.zeros(size, Q.dtype),
        theta=_float(_normal(seed + 1, size), dtype),
        solution=lambda theta: inverse @ theta,
        objective=lambda x, theta: 0.5 * jnp.dot(x, Q @ x) - jnp.dot(theta, x),
        step_size=1.0,
        strong_convexity=float(eigenvalues[0]),
    )


def lasso(num_samples: int = 30, num_features: int = 8, *, seed: int = 0, dtype: Any = None) -> Problem:
    r"""Returns the lasso with a learned penalty, in closed form on its support.

    .. math:: f(x) = \tfrac12 \|A x - b\|^2, \quad h(x, \theta) = e^\theta \|x\|_1, \quad
        x_S(\theta) = (A_S^\top A_S)^{-1} (A_S^\top b - e^\theta \operatorname{sign}(x_S)), \quad \ell = \tfrac12
        \|A_v x - b_v\|^2

    The closed form holds as long as support S and signs are those at the problem's theta.

    Shapes: x (num_features,), theta ().

    Args:
        num_samples: rows of each half, at least num_features.
        num_features: columns, at least 1.
        seed: of the Gaussian data.
        dtype: of data, x and theta; default the default float.

    Raises:
        ValueError: a size out of range.

    Source: Tibshirani (1996); derivative on the support: Bertrand et al. (2022).

    Example:
        >>> import odljax as odl
        >>> problem = odl.problems.lasso()
        >>> 0 < int((problem.solution(problem.theta) != 0).sum()) < 8
        True
    """
    count("lasso", "num_features", num_features)
    count("lasso", "num_samples", num_samples, least=num_features)
    rows = _normal(seed, 2 * num_samples, num_features) / np.sqrt(num_samples)
    truth = _normal(seed + 1, num_features) * (np.arange(num_features) % 2)
    targets = rows @ truth + 0.1 * _normal(seed + 2, 2 * num_samples)
    train, b_train = rows[:num_samples], targets[:num_samples]
    step = float(1 / np.linalg.norm(train, 2) ** 2)
    penalty = 0.1 * np.abs(train.T @ b_train).max()
    x = np.zeros(num_features)
    for _ in range(20_000):
        v = x - step * train.T @ (train @ x - b_train)
        last, x = x, np.sign(v) * np.maximum(np.abs(v) - step * penalty, 0.0)
        if np.abs(x - last).max() <= 1e-15 * np.abs(x).max():
            break
    support, signs = np.flatnonzero(x), np.sign(x[x != 0])
    A, A_v = _float(train, dtype), _float(rows[num_samples:], dtype)
    b, b_v = _float(b_train, dtype), _float(targets[num_samples:], dtype)
    A_s, s = _float(train[:, support], dtype), _float(signs, dtype)

    def solution(theta: Array) -> Array:
        on_support = jnp.linalg.solve(A_s.T @ A_s, A_s.T @ b - jnp.exp(theta) * s)
        return jnp.zeros(num_features, A.dtype).at[support].set(on_support)

    def l1(v: Array, theta: Array, step_size: Any) -> Array:
        return prox.l1(v, jnp.exp(theta), step_size)

    return Problem(
        name="lasso",
        T=lambda x, theta: l1(x - step * (A.T @ (A @ x - b)), theta, step),
        outer=lambda x, theta: 0.5 * jnp.sum((A_v @ x - b_v) ** 2),
        x0=jnp.zeros(num_features, A.dtype),
        theta=_float(np.log(penalty), dtype),
        solution=solution,
        objective=lambda x, theta: 0.5 * jnp.sum((A @ x - b) ** 2),
        prox=l1,
        step_size=step,
        strong_convexity=float(np.linalg.eigvalsh(train.T @ train)[0]),
    )


@record
class FiniteSum:
    """A bilevel problem whose two losses are means over samples, with its closed-form answers.

    Args:
        name: its name.
        inner: ``(x, theta, rows) -> scalar``, the mean over the rows it gets; strongly convex in x.
        outer: likewise.
        inner_data: all inner rows; every leaf has them as leading axis.
        outer_data: likewise.
        x0: a start.
        theta: a start.
        solution: ``theta -> x`` in closed form.
        minimiser: the theta of least outer loss at the solution.
        step_size: a safe inner step, 1/L of every single row.
    """

    name: str
    inner: Callable[[Any, Any, Any], Any]
    outer: Callable[[Any, Any, Any], Any]
    inner_data: Any
    outer_data: Any
    x0: Any
    theta: Any
    solution: Callable[[Any], Any]
    minimiser: Any
    step_size: float

    def value(self, theta: Any) -> Array:
        """The outer loss of all rows at the inner solution, in closed form."""
        return self.outer(self.solution(theta), theta, self.outer_data)

    def hypergradient(self, theta: Any) -> Any:
        """The gradient of ``value``."""
        return jax.grad(self.value)(theta)


def finite_sum(
    num_samples: int = 24, size: int = 3, num_hyper: int = 2, *, noise: Scalar = 1.0, seed: int = 0, dtype: Any = None
) -> FiniteSum:
    r"""Returns a quadratic bilevel problem of finite sums, for the stochastic estimators.

    .. math:: f_i(x, \theta) = \tfrac12 (r_i^\top (x - B \theta) - b_i)^2 + \tfrac12 \|x - B \theta\|^2, \quad
        F_j = \tfrac12 \|x - c_j\|^2 + \tfrac12 \|\theta\|^2

    With :math:`H = I + \tfrac1n \sum r_i r_i^\top` and :math:`z = H^{-1} \tfrac1n \sum r_i b_i` the solution is
    :math:`x = B \theta + z`, and the minimiser :math:`(I + B^\top B)^{-1} B^\top (\bar c - z)`.

    Shapes: x (size,), theta (num_hyper,); rows ``{"r": (n, size), "b": (n,)}`` inside, ``{"c": (n, size)}`` outside.

    Args:
        num_samples: n of each half, at least 1.
        size: of x, at least 1.
        num_hyper: of theta, at least 1.
        noise: at least 0, how much the rows differ; 0 makes every minibatch exact.
        seed: of the Gaussian data.
        dtype: of data, x and theta; default the default float.

    Raises:
        ValueError: a size or noise out of range.

    Example:
        >>> import odljax as odl
        >>> problem = odl.problems.finite_sum()
        >>> float(abs(problem.hypergradient(problem.minimiser)).max()) < 1e-5
        True
    """
    for name, value in (("num_samples", num_samples), ("size", size), ("num_hyper", num_hyper)):
        count("finite_sum", name, value)
    number("finite_sum", "noise", noise, closed=True)
    rows = (_normal(seed, 1, size) + noise * _normal(seed + 1, num_samples, size)) / (2 * np.sqrt(size))
    targets = _normal(seed + 2, 1) + noise * _normal(seed + 3, num_samples)
    centres = 1.0 + _normal(seed + 4, 1, size) + noise * _normal(seed + 5, num_samples, size)
    B = _normal(seed + 6, size, num_hyper) / np.sqrt(size)
    hessian = np.eye(size) + rows.T @ rows / num_samples
    shift = np.linalg.solve(hessian, rows.T @ targets / num_samples)
    minimiser = np.linalg.solve(np.eye(num_hyper) + B.T @ B, B.T @ (centres.mean(0) - shift))
    B, shift = _float(B, dtype), _float(shift, dtype)

    def inner(x: Array, theta: Array, data: dict[str, Array]) -> Array:
        z = x - B @ theta
        return 0.5 * jnp.mean((data["r"] @ z - data["b"]) ** 2) + 0.5 * jnp.sum(z**2)

    def outer(x: Array, theta: Array, data: dict[str, Array]) -> Array:
        return 0.5 * jnp.mean(jnp.sum((x[None] - data["c"]) ** 2, axis=1)) + 0.5 * jnp.sum(theta**2)

    return FiniteSum(
        name="finite_sum",
        inner=inner,
        outer=outer,
        inner_data={"r": _float(rows, dtype), "b": _float(targets, dtype)},
        outer_data={"c": _float(centres, dtype)},
        x0=_float(np.zeros(size), dtype),
        theta=_float(np.zeros(num_hyper), dtype),
        solution=lambda theta: B @ theta + shift,
        minimiser=_float(minimiser, dtype),
        step_size=float(1 / (1 + (rows**2).sum(1).max())),
    )


@record
class Trilevel:
    """Three problems inside one another, with their closed-form answers.

    Args:
        name: its name.
        inner: ``(x, y, theta) -> scalar``, minimised over x.
        middle: ``(x, y, theta) -> scalar``, minimised over y with x the inner solution.
        outer: ``(x, y, theta) -> scalar``, with both.
        x0: a start of x.
        y0: a start of y.
        theta: a point at which to differentiate.
        inner_solution: ``(y, theta) -> x`` in closed form.
        middle_solution: ``theta -> y`` in closed form.
        inner_step_size: a safe step, 1/L, on the inner loss.
        middle_step_size: likewise on the middle loss at the inner solution.
        minimiser: the theta of least outer loss.
    """

    name: str
    inner: Callable[[Any, Any, Any], Any]
    middle: Callable[[Any, Any, Any], Any]
    outer: Callable[[Any, Any, Any], Any]
    x0: Any
    y0: Any
    theta: Any
    inner_solution: Callable[[Any, Any], Any]
    middle_solution: Callable[[Any], Any]
    inner_step_size: float
    middle_step_size: float
    minimiser: Any

    def value(self, theta: Any) -> Array:
        """The outer loss at the solutions of the two problems below, in closed form."""
        y = self.middle_solution(theta)
        return self.outer(self.inner_solution(y, theta), y, theta)

    def hypergradient(self, theta: Any) -> Any:
        """The gradient of ``value``."""
        return jax.grad(self.value)(theta)


def trilevel(size: int = 3, num_middle: int = 3, num_hyper: int = 2, *, seed: int = 0, dtype: Any = None) -> Trilevel:
    r"""Returns a quadratic problem in a quadratic problem in a quadratic problem.

    .. math:: f(x, y, \theta) = \tfrac12 x^\top Q x - x^\top (A y + B \theta), \quad
        g = \tfrac12 \|x - c\|^2 + \tfrac12 y^\top R y - y^\top D \theta, \quad
        F = \tfrac12 \|x - a\|^2 + \tfrac12 \|y - b\|^2 + \tfrac12 \|\theta\|^2

    With :math:`M = Q^{-1} A` and :math:`N = Q^{-1} B` the solutions are :math:`x = M y + N \theta` and
    :math:`y = (M^\top M + R)^{-1} (M^\top c + (D - M^\top N) \theta)`. Q and R have eigenvalues from 1/2 to 1, so
    that gradient descent on f contracts by 1/2 a step.

    Shapes: x (size,), y (num_middle,), theta (num_hyper,).

    Args:
        size: of x, at least 1.
        num_middle: of y, at least 1.
        num_hyper: of theta, at least 1.
        seed: of the matrices.
        dtype: of x, y and theta; default the default float.

    Raises:
        ValueError: a size below 1.

    Example:
        >>> import odljax as odl
        >>> problem = odl.problems.trilevel()
        >>> float(abs(problem.hypergradient(problem.minimiser)).max()) < 1e-5
        True
    """
    for name, value in (("size", size), ("num_middle", num_middle), ("num_hyper", num_hyper)):
        count("trilevel", name, value)

    def spread(number: int, seed: int) -> np.ndarray:
        vectors = np.linalg.qr(_normal(seed, number, number))[0]
        return (vectors * np.linspace(0.5, 1.0, number)) @ vectors.T

    Q, R = spread(size, seed), spread(num_middle, seed + 1)
    A, B = 0.3 * _normal(seed + 2, size, num_middle), _normal(seed + 3, size, num_hyper)
    D, targets = _normal(seed + 4, num_middle, num_hyper), _normal(seed + 5, 2 * size + num_middle)
    c, a, b = np.split(targets, [size, 2 * size])
    M, N = np.linalg.solve(Q, A), np.linalg.solve(Q, B)
    hessian = M.T @ M + R
    P, p = np.linalg.solve(hessian, D - M.T @ N), np.linalg.solve(hessian, M.T @ c)
    S, s = M @ P + N, M @ p  # y = P theta + p, x = S theta + s
    minimiser = np.linalg.solve(S.T @ S + P.T @ P + np.eye(num_hyper), S.T @ (a - s) + P.T @ (b - p))
    inner_step = float(1 / np.linalg.eigvalsh(Q)[-1])
    middle_step = float(1 / np.linalg.eigvalsh(hessian)[-1])
    Q, R, A, B, D, M, N, P, p, c, a, b = (_float(array, dtype) for array in (Q, R, A, B, D, M, N, P, p, c, a, b))

    def outer(x: Array, y: Array, theta: Array) -> Array:
        return 0.5 * (jnp.sum((x - a) ** 2) + jnp.sum((y - b) ** 2) + jnp.sum(theta**2))

    return Trilevel(
        name="trilevel",
        inner=lambda x, y, theta: 0.5 * jnp.dot(x, Q @ x) - jnp.dot(x, A @ y + B @ theta),
        middle=lambda x, y, theta: 0.5 * jnp.sum((x - c) ** 2) + 0.5 * jnp.dot(y, R @ y) - jnp.dot(y, D @ theta),
        outer=outer,
        x0=_float(np.zeros(size), dtype),
        y0=_float(np.zeros(num_middle), dtype),
        theta=_float(_normal(seed + 6, num_hyper), dtype),
        inner_solution=lambda y, theta: M @ y + N @ theta,
        middle_solution=lambda theta: P @ theta + p,
        inner_step_size=inner_step,
        middle_step_size=middle_step,
        minimiser=_float(minimiser, dtype),
    )


def line(*, dtype: Any = None) -> Problem:
    r"""Returns the scalar fixed point of :math:`x = x/2 + \theta`, which is :math:`2\theta`; outer loss :math:`\sin x`.

    Shapes: x and theta ().

    Args:
        dtype: of x and theta; default the default float.

    Example:
        >>> import odljax as odl
        >>> float(odl.problems.line().solution(1.5))
        3.0
    """
    return Problem(
        name="line",
        T=lambda x, theta: 0.5 * x + theta,
        outer=lambda x, theta: jnp.sin(x),
        x0=_float(0.3, dtype),
        theta=_float(0.7, dtype),
        solution=lambda theta: 2 * theta,
    )


def square_root(*, dtype: Any = None) -> Problem:
    r"""Returns Heron's fixed point :math:`x = (x + \theta/x)/2`, which is :math:`\sqrt\theta`.

    The outer loss is :math:`x^3 + \theta x`. The map converges quadratically: its Jacobian vanishes at the
    solution, and one step differentiates exactly.

    Shapes: x and theta (1,).

    Args:
        dtype: of x and theta; default the default float.

    Source: Heron of Alexandria, Metrica.

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> odl.problems.square_root().solution(jnp.array([9.0])).tolist()
        [3.0]
    """
    return Problem(
        name="square_root",
        T=lambda x, theta: 0.5 * (x + theta / x),
        outer=lambda x, theta: jnp.sum(x**3 + theta * x),
        x0=_float([1.0], dtype),
        theta=_float([2.0], dtype),
        solution=jnp.sqrt,
    )


def tree(*, dtype: Any = None, second_dtype: Any = None) -> Problem:
    r"""Returns a linear contraction on a pytree whose two leaves may have different dtypes.

    .. math:: a = \tfrac12 a + \theta_1 + 0.1 \textstyle\sum b, \quad b = \tfrac14 b + \theta_2, \qquad
        b = \tfrac43 \theta_2, \quad a = 2 \theta_1 + 0.2 \textstyle\sum b

    Shapes: x ``{"a": (), "b": (2,)}``, theta ``{"one": (), "two": (2,)}``.

    Args:
        dtype: of a and theta; default the default float.
        second_dtype: of b; default ``dtype``.

    Example:
        >>> import odljax as odl
        >>> problem = odl.problems.tree()
        >>> sorted(problem.solution(problem.theta))
        ['a', 'b']
    """
    first = _float(0.0, dtype).dtype
    second = first if second_dtype is None else second_dtype

    def T(x: dict[str, Array], theta: dict[str, Array]) -> dict[str, Array]:
        a = 0.5 * x["a"] + theta["one"] + 0.1 * jnp.sum(x["b"]).astype(first)
        return {"a": a, "b": 0.25 * x["b"] + theta["two"].astype(second)}

    def solution(theta: dict[str, Array]) -> dict[str, Array]:
        b = 4 / 3 * theta["two"]
        return {"a": 2 * theta["one"] + 0.2 * jnp.sum(b), "b": b.astype(second)}

    return Problem(
        name="tree",
        T=T,
        outer=lambda x, theta: x["a"] ** 2 + jnp.sum(jnp.sin(x["b"])).astype(first) + theta["one"] * x["a"],
        x0={"a": jnp.zeros((), first), "b": jnp.zeros(2, second)},
        theta={"one": jnp.asarray(0.3, first), "two": jnp.asarray([0.2, -0.5], first)},
        solution=solution,
    )


def p_c(c: Scalar = 1.0, copies: int = 1, *, dtype: Any = None) -> Problem:
    r"""Returns the acceptance problem of HODL: an inner problem that is convex, but not strictly.

    .. math:: f(u, w) = \tfrac12 u_1^2 - w u_1, \quad
        \ell(u, w) = \tfrac12 (w - u_2)^2 + \tfrac12 (u_1 - 1)^2 + \tfrac{c}{2} w^2

    u_2 is free; the outer loss chooses it. The truth is :math:`w = u_1 = u_2 = 1/(1 + c)`. T, a gradient step of 1/2,
    is non-expansive and no contraction. ``solution`` is the optimistic one, :math:`u = (w, w)`.

    Shapes: u (2,), w (); for several copies u (copies, 2), w (copies,), and the losses add up.

    Args:
        c: at least 0; c = 1 tells the schedules of HODL apart.
        copies: at least 1.
        dtype: of u and w; default the default float.

    Raises:
        ValueError: a negative c, copies below 1.

    Source: Liu et al. (2023), arXiv 2302.05587; c = 0: Liu et al. (2023), sl-BAMM.

    Example:
        >>> import odljax as odl
        >>> odl.problems.p_c(1.0, copies=3).x0.shape
        (3, 2)
    """
    number("p_c", "c", c, closed=True)
    count("p_c", "copies", copies)
    shape = () if copies == 1 else (copies,)

    def objective(u: Array, w: Array) -> Array:
        return jnp.sum(0.5 * u[..., 0] ** 2 - w * u[..., 0])

    def outer(u: Array, w: Array) -> Array:
        return jnp.sum(0.5 * (w - u[..., 1]) ** 2 + 0.5 * (u[..., 0] - 1) ** 2 + 0.5 * c * w**2)

    def T(u: Array, w: Array) -> Array:
        return u - 0.5 * jnp.stack([u[..., 0] - w, jnp.zeros_like(w)], axis=-1)

    return Problem(
        name="p_c",
        T=T,
        outer=outer,
        x0=_float(np.full((*shape, 2), 0.01), dtype),
        theta=_float(np.full(shape, 0.5), dtype),
        solution=lambda w: jnp.stack([w, w], axis=-1),
        objective=objective,
        step_size=0.5,
    )


def p_c_minimiser(
    c: float,
    num_steps: int,
    *,
    step: float = 0.5,
    relaxation: Any = 0.5,
    weight: Any = 0.5,
    step_size: Any = lambda k: 1 / (k + 1),
    start: tuple[float, float] = (0.01, 0.01),
) -> float:
    r"""Returns the exact minimiser of :math:`\varphi_K(w) = \ell(u_K(w), w)` on one copy of P_c.

    All HODL iterates are affine in w, :math:`u_k = a_k w + b_k`, so :math:`\varphi_K` is a quadratic; plain NumPy, no
    derivative of the library's.

    Args:
        c: of the problem.
        num_steps: K.
        step: of the inner gradient operator.
        relaxation: alpha, a number or a function of k.
        weight: mu, likewise; 0 is the simple variant.
        step_size: s, likewise.
        start: u_0.

    Example:
        >>> import odljax as odl
        >>> round(odl.problems.p_c_minimiser(1.0, 1000, weight=0.0), 6)  # (1 + u_0) / (2 + c): the wrong limit
        0.336667
    """

    def at(value: Any, k: int) -> Any:
        return value(k) if callable(value) else value

    first, second = np.array([0.0, start[0]]), np.array([0.0, start[1]])  # (coefficient of w, constant)
    w, one = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    for k in range(num_steps):
        alpha, mu, s = at(relaxation, k), at(weight, k), at(step_size, k)
        first = mu * (first - s * (first - one)) + (1 - mu) * (first - alpha * step * (first - w))
        second = mu * (second - s * (second - w)) + (1 - mu) * second
    # phi = (w - second)^2 / 2 + (first - 1)^2 / 2 + c w^2 / 2
    gap, miss = w - second, first - one
    return float(-(gap[0] * gap[1] + miss[0] * miss[1]) / (gap[0] ** 2 + miss[0] ** 2 + c))


PROBLEMS: dict[str, Callable[..., Problem]] = {
    "ridge": ridge,
    "quadratic": quadratic,
    "lasso": lasso,
    "line": line,
    "square_root": square_root,
    "tree": tree,
}
"""The problems whose inner solution is unique, by name."""
