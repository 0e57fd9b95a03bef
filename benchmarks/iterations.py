"""Which iteration: residual against applications and time on four problems, compile time against loops by hand.

Applications are evaluations of T, of f or r with its derivative, and products of a linear solver; those of searches and
of conjugate gradients are counted as they come. All in float64.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import odljax as odl

from . import _harness

PACKAGES = ("jax", "jaxlib", "odljax", "numpy", "optax", "optimistix", "scikit-learn")


@dataclass(frozen=True)
class Setting:
    """A problem and the methods for it.

    Attributes:
        name: with its sizes.
        measure: ``(x, theta) -> scalar``, the residual that all methods are judged by.
        x0, theta: the start, and the data.
        methods: names and makers; a maker gets the functions of ``parts`` and returns an iteration.
        parts: what is counted: functions ``(x, theta) -> ...``.
        cost: applications a step, where they are known; the other methods are counted as they run.
        products: ``(x, theta) -> number`` of products of the linear solver in the step from x.
    """

    name: str
    measure: Callable[[Any, Any], Any]
    x0: Any
    theta: Any
    methods: dict[str, Callable[..., odl.Iteration]]
    parts: tuple[Callable[..., Any], ...]
    cost: dict[str, float]
    products: dict[str, Callable[[Any, Any], Any]]


def run(smoke: bool) -> dict[str, Any]:
    """Runs the four problems and the compile times."""
    with jax.enable_x64(True):
        problems = []
        for make in (logistic, lasso, total_variation, exponentials):
            setting = make(smoke)
            _harness.progress(setting.name)
            names = list(setting.methods)[len(problems) :: 5] if smoke else list(setting.methods)
            curves = [curve(setting, name, smoke) for name in names]
            problems.append({"problem": setting.name, "curves": curves})
        rows = []
        for name in list(by_hand(1))[:: 5 if smoke else 1]:
            _harness.progress(f"compile {name}")
            rows += compile_time(name, smoke)
    return {"problems": problems, "rows": rows}


# ---- the problems ----------------------------------------------------------------------------------------------------


def _accelerated(T: Any, memory: int = 5) -> dict[str, Callable[..., odl.Iteration]]:
    """The transforms, of an operator."""
    return {
        "anderson": lambda *_: odl.anderson(T, memory),
        "anderson, type I": lambda *_: odl.anderson(T, memory, kind=1, safeguard=1.0),
        "anderson, safeguarded": lambda *_: odl.anderson(T, memory, safeguard=1.0),
        "broyden": lambda *_: odl.broyden(T, 2 * memory),
        "squarem": lambda *_: odl.squarem(T),
    }


def _rows(data: Any, smoke: bool) -> tuple[np.ndarray, np.ndarray]:
    """Standardised features and the target of a data set of scikit-learn."""
    X, y = data(return_X_y=True)
    X = (X - X.mean(axis=0)) / X.std(axis=0)
    return (X[:60, :5], y[:60]) if smoke else (X, y)


def logistic(smoke: bool) -> Setting:
    """Smooth, ill-conditioned: breast cancer, 30 correlated features, a small penalty."""
    from sklearn.datasets import load_breast_cancer

    X, y = _rows(load_breast_cancer, smoke)
    signs, penalty = 2.0 * y - 1.0, 1e-3
    top = float(np.linalg.eigvalsh(X.T @ X / len(X))[-1]) / 4 + penalty
    kappa = top / penalty

    def f(x: Any, data: Any) -> Any:
        X, signs = data
        return jnp.mean(jax.nn.softplus(-signs * (X @ x))) + 0.5 * penalty * jnp.sum(x**2)

    def newton_products(x: Any, data: Any) -> Any:
        slope, hessian = jax.linearize(lambda x: jax.grad(f)(x, data), x)
        return odl.linear.cg()(hessian, slope)[1].num_steps

    descent = odl.gradient_descent(f, 1 / top)
    beta = (kappa**0.5 - 1) / (kappa**0.5 + 1)
    methods = {
        "gradient_descent": lambda f: descent,
        "nesterov": lambda f: odl.nesterov(descent),
        "nesterov, m known": lambda f: odl.nesterov(descent, momentum=beta),
        "nesterov, restart": lambda f: odl.nesterov(descent, restart=True),
        "heavy_ball": lambda f: odl.heavy_ball(odl.gradient_descent(f, 1 / top), 0.9),
        "backtracking": lambda f: odl.backtracking(f, step_size=8 / top),
        "line_search, armijo": lambda f: odl.line_search(odl.gradient_descent(f, 8 / top), f),
        "line_search, hager_zhang": lambda f: odl.line_search(odl.gradient_descent(f, 1 / top), f, "hager_zhang"),
        "lbfgs (optax)": lambda f: odl.from_optax(f, optax.lbfgs()),
        "newton, line_search": lambda f: odl.line_search(odl.newton(f), f),
        **_accelerated(descent),
    }
    fixed = ("gradient_descent", "nesterov", "nesterov, m known", "nesterov, restart", "heavy_ball")
    cost = {**dict.fromkeys(fixed, 1.0), **_transform_costs()}
    theta = (jnp.asarray(X), jnp.asarray(signs))
    measure = lambda x, data: jnp.linalg.norm(jax.grad(f)(x, data))  # noqa: E731
    name = f"logistic regression, {X.shape[0]} x {X.shape[1]}"
    products = {"newton, line_search": newton_products}
    return Setting(name, measure, jnp.zeros(X.shape[1]), theta, methods, (f,), cost, products)


def _transform_costs() -> dict[str, float]:
    ones = ("anderson", "anderson, type I", "anderson, safeguarded", "broyden")
    return {**dict.fromkeys(ones, 1.0), "squarem": 3.0}


def lasso(smoke: bool) -> Setting:
    """Kinks: diabetes and all products of its features."""
    from sklearn.datasets import load_diabetes

    X, y = _rows(load_diabetes, smoke)
    first, second = np.triu_indices(X.shape[1])
    X = np.concatenate([X, X[:, first] * X[:, second]], axis=1)
    X, y = (X - X.mean(axis=0)) / X.std(axis=0), (y - y.mean()) / y.std()
    step = len(X) / float(np.linalg.norm(X, 2) ** 2)
    penalty = 0.02 * float(np.abs(X.T @ y).max()) / len(X)

    def f(x: Any, data: Any) -> Any:
        X, y = data
        return 0.5 * jnp.mean((X @ x - y) ** 2)

    def prox(v: Any, data: Any, step_size: Any) -> Any:
        return odl.prox.l1(v, penalty, step_size)

    descent = odl.proximal_gradient(f, prox, step)
    methods = {
        "proximal_gradient": lambda f: descent,
        "nesterov": lambda f: odl.nesterov(descent),
        "nesterov, restart": lambda f: odl.nesterov(descent, restart=True),
        "backtracking": lambda f: odl.backtracking(f, prox, step_size=8 * step),
        "nesterov, restart, backtracking": lambda f: odl.nesterov(
            odl.backtracking(f, prox, step_size=8 * step), restart=True
        ),
        **_accelerated(descent),
    }
    cost = {**dict.fromkeys(("proximal_gradient", "nesterov", "nesterov, restart"), 1.0), **_transform_costs()}
    T = odl.operators.forward_backward(f, prox, step)
    measure = lambda x, data: jnp.linalg.norm(x - T(x, data)) / step  # noqa: E731
    theta = (jnp.asarray(X), jnp.asarray(y))
    name = f"lasso, {X.shape[0]} x {X.shape[1]}"
    return Setting(name, measure, jnp.zeros(X.shape[1]), theta, methods, (f,), cost, {})


def total_variation(smoke: bool) -> Setting:
    """Only non-expansive, in a metric: denoising of a signal by linearised ADMM."""
    n = 40 if smoke else 400
    rng = np.random.default_rng(0)
    clean = np.repeat(rng.standard_normal(n // 20), 20)
    data = jnp.asarray(clean + 0.2 * rng.standard_normal(n))

    def fit(v: Any, data: Any, step_size: Any) -> Any:
        return (v + step_size * data) / (1 + step_size)

    def shrink(v: Any, data: Any, step_size: Any) -> Any:
        return odl.prox.l1(v, 0.5, step_size)

    operator = odl.operators.linearized_admm(
        lambda z, data: jnp.diff(z), fit, shrink, jnp.zeros(n - 1), proximal_weight=4.01
    )
    walk = odl.fixed_point(operator)
    start = odl.operators.ADMMVariables(data, jnp.zeros(n - 1), jnp.zeros(n - 1))
    methods = {
        "fixed_point": lambda T: walk,
        "krasnoselskii_mann": lambda T: odl.krasnoselskii_mann(walk, 0.5),
        "nesterov(krasnoselskii_mann)": lambda T: odl.nesterov(odl.krasnoselskii_mann(walk, 0.9), momentum=0.3),
        "halpern": lambda T: odl.halpern(walk),
        "best_so_far(anderson)": lambda T: odl.best_so_far(odl.anderson(walk)),
        **_accelerated(walk, 8),
    }
    ones = ("fixed_point", "krasnoselskii_mann", "nesterov(krasnoselskii_mann)", "halpern")
    cost = {**dict.fromkeys(ones, 1.0), "best_so_far(anderson)": 2.0, **_transform_costs()}

    def measure(u: Any, data: Any) -> Any:
        gaps = jax.tree.map(jnp.subtract, u, operator(u, data))
        return jnp.sqrt(sum(jnp.sum(gap**2) for gap in jax.tree.leaves(gaps)))

    return Setting(f"total variation, {n} points", measure, start, data, methods, (operator,), cost, {})


def exponentials(smoke: bool) -> Setting:
    """Nonlinear least squares, badly scaled: two decays and a constant."""
    t = jnp.linspace(0.0, 4.0, 20 if smoke else 200)
    truth = np.array([2.0, 0.4, 1.5, 2.5, 0.3])
    noise = 0.02 * np.random.default_rng(1).standard_normal(t.size)

    def model(x: Any) -> Any:
        return x[0] * jnp.exp(-x[1] * t) + x[2] * jnp.exp(-x[3] * t) + x[4]

    data = model(jnp.asarray(truth)) + noise
    start = jnp.array([1.0, 0.2, 1.0, 1.5, 0.0])

    def r(x: Any, data: Any) -> Any:
        return model(x) - data

    def half(r: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, data: 0.5 * jnp.sum(r(x, data) ** 2)

    jacobian = jax.jacobian(r)(start, data)
    step = 0.2 / float(jnp.linalg.norm(jacobian, 2) ** 2)
    dense = odl.linear.dense()
    descent = odl.gradient_descent(half(r), step)

    def bfgs(r: Callable[..., Any]) -> odl.Iteration:
        import optimistix

        return odl.from_optimistix(optimistix.BFGS(rtol=1e-14, atol=1e-14), half(r), "minimise")

    methods = {
        "gradient_descent": lambda r: descent,
        "nesterov, restart": lambda r: odl.nesterov(descent, restart=True),
        "polyak": lambda r: odl.polyak(half(r), optimum=float(0.5 * np.sum(noise**2)) * 0.97),
        "line_search, hager_zhang": lambda r: odl.line_search(
            odl.gradient_descent(half(r), step), half(r), "hager_zhang"
        ),
        "lbfgs (optax)": lambda r: odl.from_optax(half(r), optax.lbfgs()),
        "bfgs (optimistix)": bfgs,
        "gauss_newton, line_search": lambda r: odl.line_search(odl.gauss_newton(r, dense), half(r)),
        "levenberg_marquardt": lambda r: odl.levenberg_marquardt(r, dense),
        "newton, damped": lambda r: odl.line_search(
            odl.newton(half(r), dense, damping=lambda k: 0.1 * 0.5**k), half(r)
        ),
        **_accelerated(descent),
    }
    columns = dict.fromkeys(
        ("gauss_newton, line_search", "levenberg_marquardt", "newton, damped"), lambda x, data: jnp.asarray(5)
    )
    cost = {**dict.fromkeys(("gradient_descent", "nesterov, restart", "polyak"), 1.0), **_transform_costs()}
    measure = lambda x, data: jnp.linalg.norm(jax.grad(half(r))(x, data))  # noqa: E731
    return Setting(f"two exponentials, {t.size} points", measure, start, data, methods, (r,), cost, columns)


GOAL = 1e-6  # of the first residual: what the table looks for


# ---- residual against applications and time --------------------------------------------------------------------------


def curve(setting: Setting, name: str, smoke: bool) -> dict[str, Any]:
    """The residual at each iterate, the applications it took, and the seconds of a step on average."""
    iteration = setting.methods[name](*setting.parts)
    quick = name.startswith(("newton", "gauss", "levenberg", "lbfgs", "bfgs"))
    num_steps = 8 if smoke else 60 if quick else 1500
    solver = odl.for_steps(iteration, num_steps, record=lambda x, theta, k: (x, setting.measure(x, theta)))
    recorded = jax.jit(solver)(setting.x0, setting.theta).history.recorded
    iterates, residuals = recorded

    plain = jax.jit(lambda x0, theta: odl.for_steps(iteration, num_steps)(x0, theta).x)
    jax.block_until_ready(plain(setting.x0, setting.theta))
    times = []
    for _ in range(2 if smoke else 7):
        begin = time.perf_counter()
        jax.block_until_ready(plain(setting.x0, setting.theta))
        times.append(time.perf_counter() - begin)

    if name in setting.cost:
        applications = setting.cost[name] * np.arange(num_steps)
    else:
        counted = evaluations(setting, name, 3 if smoke else min(num_steps, 60))
        tail = np.full(num_steps - len(counted), np.mean(counted[-10:]))
        each = np.concatenate([counted, tail])
        if name in setting.products:
            products = jax.jit(jax.lax.map, static_argnums=0)
            each = each + np.asarray(products(lambda x: setting.products[name](x, setting.theta), iterates))
        applications = np.concatenate([[0.0], np.cumsum(each)[:-1]])
    steps, least = falls(np.asarray(residuals, float))
    return {
        "method": name,
        "step": steps.tolist(),
        "residual": least.tolist(),
        "applications": applications[steps].tolist(),
        "ms_a_step": 1e3 * statistics.median(times) / num_steps,
    }


def falls(residuals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The steps at which the least residual so far has fallen by an eighth, or to the goal, and that residual."""
    least = np.fmin.accumulate(residuals)
    kept = [0]
    for k in range(1, len(least)):
        reached = least[k] <= GOAL * least[0] < least[k - 1]
        if reached or least[k] < 0.875 * least[kept[-1]] or k == len(least) - 1:
            kept.append(k)
    return np.asarray(kept), least[kept]


def evaluations(setting: Setting, name: str, num_steps: int) -> np.ndarray:
    """How often each of the first steps evaluates what is counted: each evaluation calls the host."""
    calls: list[int] = []

    def counted(part: Callable[..., Any]) -> Callable[..., Any]:
        def function(x: Any, theta: Any) -> Any:
            jax.debug.callback(lambda: calls.append(1))
            return part(x, theta)

        return function

    iteration = setting.methods[name](*map(counted, setting.parts))
    compiled = jax.jit(iteration.step)
    x, state, each = setting.x0, iteration.init(setting.x0, setting.theta), []
    for k in range(num_steps):
        jax.effects_barrier()
        calls.clear()
        x, state = jax.block_until_ready(compiled(x, state, setting.theta, jnp.asarray(k)))
        jax.effects_barrier()
        each.append(float(len(calls)))
    return np.asarray(each)


# ---- compile time against loops by hand ------------------------------------------------------------------------------


def by_hand(num_steps: int) -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """Name: (our iteration of (f, step size), the same mathematics as ``(x, matrix, rhs) -> x`` on one array)."""

    def gradient(x: Any, A: Any, b: Any) -> Any:
        return jax.grad(lambda x: 0.5 * x @ (A @ x) - b @ x)(x)

    def value(x: Any, A: Any, b: Any) -> Any:
        return 0.5 * x @ (A @ x) - b @ x

    def loop(start: Callable[..., Any], step: Callable[..., Any]) -> Callable[..., Any]:
        """A scan of ``(carry, k, A, b) -> carry`` whose first entry is x, and the last residual."""

        def solve(x: Any, A: Any, b: Any) -> Any:
            body = lambda carry, k: (step(carry, k, A, b), None)  # noqa: E731
            x = jax.lax.scan(body, start(x), jnp.arange(num_steps))[0][0]
            return jnp.linalg.norm(gradient(x, A, b)), x

        return solve

    def descent(x: Any, A: Any, b: Any) -> Any:
        return x - gradient(x, A, b)

    def plain(carry: Any, k: Any, A: Any, b: Any) -> Any:
        return (descent(carry[0], A, b),)

    def relaxed(carry: Any, k: Any, A: Any, b: Any) -> Any:
        return (0.5 * carry[0] + 0.5 * descent(carry[0], A, b),)

    def anchored(carry: Any, k: Any, A: Any, b: Any) -> Any:
        x, anchor = carry
        weight = 1.0 / (k.astype(float) + 2.0)
        return weight * anchor + (1 - weight) * descent(x, A, b), anchor

    def fast(carry: Any, k: Any, A: Any, b: Any) -> Any:
        x, previous = carry
        count = k.astype(float)
        return descent(x + count / (count + 3.0) * (x - previous), A, b), x

    def restarted(carry: Any, k: Any, A: Any, b: Any) -> Any:
        x, previous, age = carry
        count = age.astype(float)
        v = x + count / (count + 3.0) * (x - previous)
        new = descent(v, A, b)
        uphill = jnp.vdot(v - new, new - x) > 0
        return new, jnp.where(uphill, new, x), jnp.where(uphill, 0, age + 1)

    def heavy(carry: Any, k: Any, A: Any, b: Any) -> Any:
        x, previous = carry
        return descent(x, A, b) + 0.5 * (x - previous), x

    memory = 4

    def mixed(carry: Any, k: Any, A: Any, b: Any) -> Any:
        x, X, R, gram = carry
        r, slot = descent(x, A, b) - x, k % memory
        X, R = X.at[slot].set(x), R.at[slot].set(r)
        row = R @ r
        gram = gram.at[slot].set(row).at[:, slot].set(row)
        filled = jnp.arange(memory) <= k
        used = jnp.where(filled[:, None] & filled[None], gram, 0.0)
        largest = jnp.max(used) + 1e-300
        shift = jnp.where(filled, 1e-10 * largest, largest)
        raw = jnp.linalg.solve((used + jnp.diag(shift)) / largest, filled.astype(float))
        return (raw / raw.sum()) @ (X + R), X, R, gram

    def oblique(carry: Any, k: Any, A: Any, b: Any) -> Any:
        x, X, R = carry
        r, slot = descent(x, A, b) - x, k % memory
        X, R = X.at[slot].set(x), R.at[slot].set(r)
        S, Y = X - x, r - R
        others = (jnp.arange(memory) <= k) & (jnp.arange(memory) != slot)
        cross = jnp.where(others[:, None] & others[None], S @ Y.T, 0.0)
        largest = jnp.max(jnp.abs(cross)) + 1e-300
        shift = jnp.where(others, 1e-10 * largest, largest)
        past = jnp.linalg.solve((cross + jnp.diag(shift)) / largest, jnp.where(others, S @ r, 0.0) / largest)
        return past.at[slot].set(1 - past.sum()) @ (X + R), X, R

    def secant(carry: Any, k: Any, A: Any, b: Any) -> Any:
        x, last_x, last_r, U, V, used = carry
        r = descent(x, A, b) - x
        s, y = x - last_x, last_r - r
        full = used == memory
        used, U, V = jnp.where(full, 0, used), jnp.where(full, 0.0, U), jnp.where(full, 0.0, V)
        Hy, Hs = y + (V @ y) @ U, s + (U @ s) @ V
        curvature = Hs @ y
        update = (k > 0) & (jnp.abs(curvature) > 1e-8 * s @ s)
        u = (s - Hy) / jnp.where(update, curvature, 1.0)
        U = U.at[used].set(jnp.where(update, u, U[used]))
        V = V.at[used].set(jnp.where(update, Hs, V[used]))
        return x + r + (V @ r) @ U, x, r, U, V, used + update

    def squared(carry: Any, k: Any, A: Any, b: Any) -> Any:
        (x,) = carry
        once = descent(x, A, b)
        twice = descent(once, A, b)
        r = once - x
        v = twice - once - r
        vv = v @ v
        a = jnp.sqrt(jnp.clip(r @ r / jnp.where(vv > 0, vv, 1.0), 1.0, 1e4))
        ahead = x + 2 * a * r + a * a * v
        target = descent(ahead, A, b)
        return (jnp.where(jnp.sum((target - ahead) ** 2) <= r @ r, target, twice),)

    def searched(carry: Any, k: Any, A: Any, b: Any) -> Any:
        (x,) = carry
        d = -4.0 * gradient(x, A, b)
        line = lambda t: jax.jvp(lambda t: value(x + t * d, A, b), (t,), (1.0,))  # noqa: E731
        start, slope = line(0.0)

        def enough(t: Any) -> Any:
            at, steep = line(t)
            close = jnp.abs(at - start) <= 1.5e-8 * jnp.abs(start)
            return jnp.where(close, steep <= -0.8 * slope, at <= start + 0.1 * t * slope)

        shorter = lambda carry: (0.5 * carry[0], enough(0.5 * carry[0]), carry[2] + 1)  # noqa: E731
        t, found, _ = jax.lax.while_loop(lambda c: ~c[1] & (c[2] < 30), shorter, (1.0, enough(1.0), 1))
        return (x + jnp.where(found, t, 0.0) * d,)

    def shrinking(carry: Any, k: Any, A: Any, b: Any) -> Any:
        x, size = carry
        start, slope = value(x, A, b), gradient(x, A, b)

        def enough(size: Any) -> Any:
            move = -size * slope
            new, rise = jax.jvp(lambda t: value(x + t * move, A, b), (1.0,), (1.0,))
            first, room = slope @ move, move @ move / size
            close = jnp.abs(new - start) <= 1.5e-8 * jnp.abs(start)
            return jnp.where(close, rise - first <= room, new - start <= first + 0.5 * room)

        shorter = lambda carry: (0.5 * carry[0], enough(0.5 * carry[0]), carry[2] + 1)  # noqa: E731
        size, _, _ = jax.lax.while_loop(lambda c: ~c[1] & (c[2] < 50), shorter, (size, enough(size), 0))
        return x - size * slope, size

    def polyak(carry: Any, k: Any, A: Any, b: Any) -> Any:
        (x,) = carry
        g = gradient(x, A, b)
        gg = g @ g
        return (x - (value(x, A, b) + 10.0) / jnp.where(gg > 0, gg, 1.0) * g,)

    def newton(carry: Any, k: Any, A: Any, b: Any) -> Any:
        (x,) = carry
        g, hessian = jax.linearize(lambda x: gradient(x, A, b), x)
        return (x - jax.scipy.sparse.linalg.cg(hessian, g, tol=1e-12)[0],)

    def marquardt(carry: Any, k: Any, A: Any, b: Any) -> Any:
        x, damping = carry
        residual = lambda x: A @ x - b  # noqa: E731
        r, push = jax.linearize(residual, x)
        pull = jax.linear_transpose(push, x)
        slope = pull(r)[0]
        d = -jax.scipy.sparse.linalg.cg(lambda v: pull(push(v))[0] + damping * v, slope, tol=1e-12)[0]
        ahead = residual(x + d)
        gain = (r @ r - ahead @ ahead) / (damping * d @ d - slope @ d)
        factor = jnp.where(gain > 0.75, 1 / 3, jnp.where(gain >= 0.25, 1.0, 2.0))
        return jnp.where(gain > 1e-4, x + d, x), damping * factor

    def best(carry: Any, k: Any, A: Any, b: Any) -> Any:
        x, walk, previous, least = carry
        new = descent(walk, A, b) + 0.5 * (walk - previous)
        size = jnp.linalg.norm(gradient(new, A, b))
        return jnp.where(size < least, new, x), new, walk, jnp.minimum(size, least)

    alone = lambda x: (x,)  # noqa: E731
    twice = lambda x: (x, x)  # noqa: E731
    table = lambda x: jnp.zeros((memory, x.size))  # noqa: E731
    infinite = lambda x: (x, x, x, jnp.asarray(jnp.inf))  # noqa: E731
    f = lambda x, data: value(x, *data)  # noqa: E731
    r = lambda x, data: data[0] @ x - data[1]  # noqa: E731
    ours = odl.gradient_descent(f, 1.0)
    return {
        "gradient_descent": (ours, loop(alone, plain)),
        "krasnoselskii_mann": (odl.krasnoselskii_mann(ours), loop(alone, relaxed)),
        "halpern": (odl.halpern(ours), loop(twice, anchored)),
        "nesterov": (odl.nesterov(ours), loop(twice, fast)),
        "nesterov, restart": (
            odl.nesterov(ours, restart=True),
            loop(lambda x: (x, x, jnp.zeros((), int)), restarted),
        ),
        "heavy_ball": (odl.heavy_ball(ours, 0.5), loop(twice, heavy)),
        "anderson": (
            odl.anderson(ours, memory),
            loop(lambda x: (x, table(x), table(x), jnp.zeros((memory, memory))), mixed),
        ),
        "anderson, type I": (
            odl.anderson(ours, memory, kind=1),
            loop(lambda x: (x, table(x), table(x)), oblique),
        ),
        "broyden": (
            odl.broyden(ours, memory, safeguard=None),
            loop(lambda x: (x, x, 0 * x, table(x), table(x), jnp.zeros((), int)), secant),
        ),
        "squarem": (odl.squarem(ours), loop(alone, squared)),
        "line_search, armijo": (odl.line_search(odl.gradient_descent(f, 4.0), f), loop(alone, searched)),
        "backtracking": (
            odl.backtracking(f, step_size=4.0),
            loop(lambda x: (x, jnp.asarray(4.0)), shrinking),
        ),
        "polyak": (odl.polyak(f, optimum=-10.0), loop(alone, polyak)),
        "newton": (odl.newton(f), loop(alone, newton)),
        "levenberg_marquardt": (
            odl.levenberg_marquardt(r, damping=1.0),
            loop(lambda x: (x, jnp.asarray(1.0)), marquardt),
        ),
        "best_so_far(heavy_ball)": (odl.best_so_far(odl.heavy_ball(ours, 0.5)), loop(infinite, best)),
    }


def compile_time(name: str, smoke: bool) -> list[dict[str, Any]]:
    """The loop by hand, which is the floor, and ours: run time, compile time, and how much the answers differ."""
    size, num_steps = (10, 3) if smoke else (100, 20)
    rows = np.random.default_rng(0).standard_normal((4 * size, size))
    matrix = rows.T @ rows
    matrix = jnp.asarray(matrix / np.linalg.eigvalsh(matrix)[-1])
    rhs = jnp.asarray(np.random.default_rng(1).standard_normal(size))
    iteration, loop = by_hand(num_steps)[name]

    def ours(x0: Any, matrix: Any, rhs: Any) -> Any:
        solution = odl.for_steps(iteration, num_steps)(x0, (matrix, rhs))
        return solution.residual, solution.x

    arguments = (jnp.ones(size), matrix, rhs)
    reference = np.asarray(jax.jit(loop)(*arguments)[1])
    group = _harness.Group(
        name,
        "none",
        [
            _harness.Row("by hand", "jax", lambda traces: loop),
            _harness.Row(name, "odljax", lambda traces: ours),
        ],
        arguments,
        {"difference": reference},
    )
    measured, _ = _harness.measure(group, _harness.SMOKE if smoke else _harness.Effort(2.0, (7, 60), 5))
    return measured


# ---- the report ------------------------------------------------------------------------------------------------------


def at_goal(curve: dict[str, Any]) -> int | None:
    """The first recorded place at which the residual is down to the goal."""
    values = curve["residual"]
    return next((i for i, value in enumerate(values) if value <= GOAL * values[0]), None)


def table(report: dict[str, Any]) -> None:
    """Applications and milliseconds to a millionth of the first residual; compile times."""
    for problem in report["problems"]:
        rows = []
        for one in problem["curves"]:
            i = at_goal(one)
            least = min(one["residual"]) / one["residual"][0]
            k = None if i is None else one["step"][i]
            cells = (None, None, None) if k is None else (k, one["applications"][i], one["ms_a_step"] * k)
            texts = ["-" if value is None else _harness.significant(float(value)) for value in cells]
            rows.append([one["method"], *texts, _harness.significant(least)])
        columns = ["method", "steps", "applications", "ms", "least residual"]
        _harness.show(f"{problem['problem']}: to 1e-6 of the first residual", columns, rows)
    rows = [
        [
            row["method"],
            *(_harness.significant(row[key]) for key in ("compile_ms", "compile_ratio", "run_ratio", "difference")),
        ]
        for row in report["rows"]
        if row["library"] == "odljax"
    ]
    _harness.show("Against a loop by hand", ["method", "compile ms", "ratio", "run ratio", "difference"], rows)


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """A column a problem: the residual against applications above, against time below; each method has one look."""
    from matplotlib.figure import Figure

    problems = report["problems"]
    figure = Figure(figsize=(5.2 * len(problems), 9.5), layout="constrained")
    axes = figure.subplots(2, len(problems), squeeze=False)
    colours = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#999999"]
    names = list(dict.fromkeys(one["method"] for problem in problems for one in problem["curves"]))
    looks = {name: (colours[i % 8], ("-", "--", ":")[i // 8 % 3]) for i, name in enumerate(names)}
    for column, problem in enumerate(problems):
        for one in problem["curves"]:
            colour, style = looks[one["method"]]
            values = np.asarray(one["residual"])
            values = np.where(values > 0, values / values[0], np.nan)
            applications = np.asarray(one["applications"]) + 1
            milliseconds = (np.asarray(one["step"]) + 1) * one["ms_a_step"]
            for ax, where in zip(axes[:, column], (applications, milliseconds), strict=True):
                ax.loglog(where, values, style, color=colour, lw=1.4, label=one["method"])
        axes[0, column].set_title(problem["problem"], fontsize=10, fontweight="bold", loc="left")
        for ax, label in zip(axes[:, column], ("applications, plus one", "milliseconds"), strict=True):
            ax.set_xlabel(label, fontsize=8)
            ax.set_ylim(1e-12, 1e2)
            ax.tick_params(which="both", labelsize=7)
            ax.grid(color="0.92")
            ax.spines[["top", "right"]].set_visible(False)
        axes[0, column].legend(frameon=False, fontsize=6, loc="lower left")
    for ax in axes[:, 0]:
        ax.set_ylabel("least residual so far, relative to the first", fontsize=8)
    figure.suptitle(_harness.caption(report), x=0.01, ha="left", fontsize=8)
    return {"iterations": figure}
