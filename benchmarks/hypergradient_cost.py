"""What does a hypergradient cost: run time, compile time, bytes, traces and error, against hand-written JAX and peers.

Two inner problems, each with one penalty per coefficient, theta being its logarithm, solved by gradient descent with a
fixed number of steps; the outer loss is that of held-out data. All rows of a group take the same steps in float32, and
the conjugate gradients of the implicit rows the same number of products (same relative tolerance; lineax tests another
norm and is given the number). Errors are taken against NumPy in float64, which shares no code with any row.

The ladder raises the condition number of a ridge problem, starts from its exact solution and takes a linear outer loss,
whose gradient is a given vector: what is left is the error that the adjoint solve makes in float32.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import odljax as odl

from . import _harness
from ._harness import Group, Row, Traces

CG_TOL = 1e-6
CG_STEPS = 50
LADDER = (1e1, 1e2, 1e3, 1e4, 1e5)
LADDER_STEPS = 5000
TARGET_ADJOINT = (1e4, 1e-5)
TARGET_RUN = 1.05
TARGET_COMPILE = 1.2

Function = Callable[..., Any]


# ---- the problems ----------------------------------------------------------------------------------------------------


def penalty(w: Any, theta: Any) -> Any:
    return 0.5 * jnp.sum(jnp.exp(theta) * w * w)


def logistic_loss(w: Any, theta: Any, data: Any) -> Any:
    """Mean logistic loss of labels in {-1, 1}, and the penalty."""
    X, y, _, _ = data
    return jnp.mean(jnp.logaddexp(0.0, -y * (X @ w))) + penalty(w, theta)


def logistic_outer(w: Any, data: Any) -> Any:
    _, _, X, y = data
    return jnp.mean(jnp.logaddexp(0.0, -y * (X @ w)))


def ridge_loss(w: Any, theta: Any, data: Any) -> Any:
    """Half the mean squared error, and the penalty."""
    X, y, _, _ = data
    return 0.5 * jnp.mean((X @ w - y) ** 2) + penalty(w, theta)


def ridge_outer(w: Any, data: Any) -> Any:
    _, _, X, y = data
    return 0.5 * jnp.mean((X @ w - y) ** 2)


def _sigmoid(t: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * t))


class Reference:
    """The same problem in NumPy and float64, derivatives by hand.

    Args:
        kind: "logistic" or "ridge".
        data, theta: in float32, as the rows see them.
    """

    def __init__(self, kind: str, data: tuple[np.ndarray, ...], theta: np.ndarray) -> None:
        self.kind = kind
        self.X, self.y, self.X_outer, self.y_outer = (np.asarray(part, np.float64) for part in data)
        self.weights = np.exp(np.asarray(theta, np.float64))

    def _slope(self, X: np.ndarray, y: np.ndarray, w: np.ndarray) -> np.ndarray:
        link = X @ w
        return X.T @ (link - y if self.kind == "ridge" else -y * _sigmoid(-y * link)) / len(y)

    def _curvature(self, w: np.ndarray) -> np.ndarray:
        if self.kind == "ridge":
            return np.ones_like(self.y) / len(self.y)
        probability = _sigmoid(self.X @ w)
        return probability * (1 - probability) / len(self.y)

    def gradient(self, w: np.ndarray) -> np.ndarray:
        return self._slope(self.X, self.y, w) + self.weights * w

    def hessian(self, w: np.ndarray) -> np.ndarray:
        return self.X.T @ (self._curvature(w)[:, None] * self.X) + np.diag(self.weights)

    def product(self, w: np.ndarray, v: np.ndarray) -> np.ndarray:
        """The Hessian at w times v."""
        return self.X.T @ (self._curvature(w) * (self.X @ v)) + self.weights * v

    def outer_gradient(self, w: np.ndarray) -> np.ndarray:
        return self._slope(self.X_outer, self.y_outer, w)

    def minimiser(self, start: np.ndarray) -> np.ndarray:
        w = np.asarray(start, np.float64)
        for _ in range(50):
            step = np.linalg.solve(self.hessian(w), self.gradient(w))
            w = w - step
            if np.linalg.norm(step) <= 1e-14 * np.linalg.norm(w):
                break
        return w

    def descent(self, start: np.ndarray, step_size: float, num_steps: int) -> list[np.ndarray]:
        """All iterates, the start first."""
        iterates = [np.asarray(start, np.float64)]
        for _ in range(num_steps):
            iterates.append(iterates[-1] - step_size * self.gradient(iterates[-1]))
        return iterates

    def implicit(self, w: np.ndarray) -> np.ndarray:
        """The implicit hypergradient at w, by a direct solve."""
        return -self.weights * w * np.linalg.solve(self.hessian(w), self.outer_gradient(w))

    def unrolled(self, iterates: list[np.ndarray], step_size: float) -> np.ndarray:
        """The derivative through the steps, by the adjoint recursion."""
        adjoint = self.outer_gradient(iterates[-1])
        total = np.zeros_like(adjoint)
        for w in reversed(iterates[:-1]):
            total -= step_size * self.weights * w * adjoint
            adjoint = adjoint - step_size * self.product(w, adjoint)
        return total

    def cg_products(self, w: np.ndarray) -> int:
        """Products that conjugate gradients take to the common tolerance."""
        b = self.outer_gradient(w)
        r, p, rr = b, b, b @ b
        limit = CG_TOL**2 * rr
        for number in range(CG_STEPS):
            if rr <= limit:
                return number
            q = self.product(w, p)
            alpha = rr / (p @ q)
            r = r - alpha * q
            rr, old = r @ r, rr
            p = r + rr / old * p
        return CG_STEPS


@dataclass(frozen=True)
class Problem:
    """An inner problem of fixed size with its data, loss and budget.

    Attributes:
        loss: ``(w, theta, data) -> scalar``.
        outer: ``(w, data) -> scalar``.
        cg_products: what conjugate gradients need for the common tolerance.
    """

    name: str
    loss: Function
    outer: Function
    data: tuple[np.ndarray, ...]
    theta: np.ndarray
    step_size: float
    num_steps: int
    reference: Reference
    cg_products: int

    @property
    def start(self) -> np.ndarray:
        return np.zeros_like(self.theta)


def make_problem(kind: str, num_rows: int, num_columns: int, num_steps: int, weight: float) -> Problem:
    """A problem with Gaussian features of decaying scale, a dense truth and noise."""
    rng = np.random.default_rng(0)
    scales = np.geomspace(1.0, 0.3, num_columns)
    truth = rng.standard_normal(num_columns) / np.sqrt(num_columns)

    def sample(count: int) -> tuple[np.ndarray, np.ndarray]:
        X = rng.standard_normal((count, num_columns)) * scales
        noisy = 3 * X @ truth + rng.standard_normal(count)
        y = noisy if kind == "ridge" else np.where(noisy > 0, 1.0, -1.0)
        return X.astype(np.float32), y.astype(np.float32)

    data = (*sample(num_rows), *sample(num_rows // 2))
    theta = np.full(num_columns, np.log(weight), np.float32)
    reference = Reference(kind, data, theta)
    exact = reference.minimiser(np.zeros(num_columns))
    extremes = np.linalg.eigvalsh(reference.hessian(0 * exact))[[0, -1]]
    # The best fixed step for a quadratic between these curvatures.
    step_size = float(2 / extremes.sum()) if kind == "ridge" else float(1.5 / extremes[1])
    return Problem(
        f"{kind} {num_rows}x{num_columns}, {num_steps} steps",
        {"ridge": ridge_loss, "logistic": logistic_loss}[kind],
        {"ridge": ridge_outer, "logistic": logistic_outer}[kind],
        data,
        theta,
        step_size,
        num_steps,
        reference,
        reference.cg_products(exact),
    )


# ---- the rows: each build returns a fresh (theta, w0, data) -> (value, gradient, ...) --------------------------------


def hand_implicit(problem: Problem, traces: Traces) -> Function:
    loss = traces(problem.loss)

    def hypergradient(theta: Any, w0: Any, data: Any) -> Any:
        def slope(w: Any, theta: Any) -> Any:
            return jax.grad(loss)(w, theta, data)

        def step(w: Any, _: None) -> Any:
            return w - problem.step_size * slope(w, theta), None

        w, _ = jax.lax.scan(step, w0, None, length=problem.num_steps)
        value, b = jax.value_and_grad(problem.outer)(w, data)
        _, hvp = jax.linearize(lambda w: slope(w, theta), w)
        v, _ = jax.scipy.sparse.linalg.cg(hvp, b, tol=CG_TOL, maxiter=CG_STEPS)
        _, pull_back = jax.vjp(lambda theta: slope(w, theta), theta)
        return value, pull_back(-v)[0]

    return hypergradient


def hand_unrolled(problem: Problem, traces: Traces) -> Function:
    loss = traces(problem.loss)

    def value(theta: Any, w0: Any, data: Any) -> Any:
        def step(w: Any, _: None) -> Any:
            return w - problem.step_size * jax.grad(loss)(w, theta, data), None

        w, _ = jax.lax.scan(step, w0, None, length=problem.num_steps)
        return problem.outer(w, data)

    return jax.value_and_grad(value)


def _our_solver(problem: Problem, derivative: str, loss: Function, data: Any, on_failure: str = "warn") -> odl.Solver:
    iteration = odl.gradient_descent(lambda w, theta: loss(w, theta, data), step_size=problem.step_size)
    if derivative == "unrolled, stopping":
        return odl.unrolled(odl.until_converged(iteration, tol=1e-12, max_steps=problem.num_steps))
    solver = odl.for_steps(iteration, problem.num_steps)
    if derivative == "unrolled":
        return odl.unrolled(solver)
    linear_solver = odl.linear.cg(tol=CG_TOL, max_steps=CG_STEPS)
    return odl.implicit(solver, linear_solver=linear_solver, on_failure=on_failure)


def ours(problem: Problem, derivative: str, on_failure: str, traces: Traces) -> Function:
    """A solver is a differentiable function: plain ``jax.value_and_grad``."""
    loss = traces(problem.loss)

    def value(theta: Any, w0: Any, data: Any) -> Any:
        solver = _our_solver(problem, derivative, loss, data, on_failure)
        return problem.outer(solver(w0, theta).x, data)

    return jax.value_and_grad(value)


def ours_through(problem: Problem, derivative: str, traces: Traces) -> Function:
    """The update of a hypergradient, which reports on inner and adjoint solve."""
    loss = traces(problem.loss)

    def update(theta: Any, w0: Any, data: Any) -> Any:
        solver = _our_solver(problem, derivative, loss, data)
        hyper = odl.hypergradients.through(solver, lambda w, theta, data: problem.outer(w, data))
        gradient, _, info = hyper.update(theta, hyper.init(theta, w0), data)
        return info.value, gradient, info

    return update


def with_jaxopt(problem: Problem, derivative: str, default: bool, traces: Traces) -> Function:
    import jaxopt

    loss = traces(problem.loss)
    adjoint = None if default else functools.partial(jaxopt.linear_solve.solve_cg, tol=CG_TOL, maxiter=CG_STEPS)

    def value(theta: Any, w0: Any, data: Any) -> Any:
        solver = jaxopt.GradientDescent(
            loss,
            stepsize=problem.step_size,
            maxiter=problem.num_steps,
            tol=1e-12 if derivative == "unrolled, stopping" else 0.0,
            acceleration=False,
            implicit_diff=derivative == "implicit",
            implicit_diff_solve=adjoint,
        )
        return problem.outer(solver.run(w0, theta, data).params, data)

    return jax.value_and_grad(value)


def with_optimistix(problem: Problem, derivative: str, default: bool, traces: Traces) -> Function:
    import lineax
    import optimistix

    loss = traces(problem.loss)
    if derivative != "implicit":
        adjoint = optimistix.RecursiveCheckpointAdjoint(checkpoints=None if default else problem.num_steps)
    elif default:
        adjoint = optimistix.ImplicitAdjoint()
    else:
        # Its test is another one (two norms, elementwise scales), so the number of products is set instead.
        cg = lineax.CG(rtol=0.0, atol=0.0, stabilise_every=None, max_steps=problem.cg_products)
        adjoint = optimistix.ImplicitAdjoint(cg)
    tol = 1e-12 if derivative == "unrolled, stopping" else 1e-30

    def value(theta: Any, w0: Any, data: Any) -> Any:
        def T(w: Any, arguments: Any) -> Any:
            theta, data = arguments
            return w - problem.step_size * jax.grad(loss)(w, theta, data)

        solution = optimistix.fixed_point(
            T,
            optimistix.FixedPointIteration(rtol=tol, atol=tol),
            w0,
            (theta, data),
            max_steps=problem.num_steps,
            adjoint=adjoint,
            throw=False,
            tags=frozenset() if default else frozenset({lineax.negative_semidefinite_tag}),
        )
        return problem.outer(solution.value, data)

    return jax.value_and_grad(value)


def groups(problem: Problem, smoke: bool = False) -> list[Group]:
    """The groups of a problem: one a derivative. A smoke run leaves out variants of rows, to save their compilation."""
    reference, bind = problem.reference, functools.partial
    iterates = reference.descent(problem.start, problem.step_size, problem.num_steps)
    exact = reference.implicit(reference.minimiser(iterates[-1]))
    unrolled = reference.unrolled(iterates, problem.step_size)
    arguments = tuple(jax.tree.map(jnp.asarray, (problem.theta, problem.start, problem.data)))

    def group(derivative: str, rows: list[Row], own: np.ndarray) -> Group:
        if smoke:
            rows = [row for row in rows if not row.method.endswith(("default", "no warning"))]
            peers = problem.loss is ridge_loss
            rows = [row for row in rows if peers or row.library in ("jax", "odljax")]
        return Group(problem.name, derivative, rows, arguments, {"error": own, "distance_to_exact": exact})

    implicit_rows = [
        Row("scan, CG", "jax", bind(hand_implicit, problem)),
        Row("implicit", "odljax", bind(ours, problem, "implicit", "warn")),
        Row("implicit, no warning", "odljax", bind(ours, problem, "implicit", "ignore")),
        Row("through(implicit)", "odljax", bind(ours_through, problem, "implicit")),
        Row("GradientDescent, CG", "jaxopt", bind(with_jaxopt, problem, "implicit", False)),
        Row("GradientDescent, default", "jaxopt", bind(with_jaxopt, problem, "implicit", True)),
        Row("fixed_point, CG", "optimistix", bind(with_optimistix, problem, "implicit", False)),
        Row("fixed_point, default", "optimistix", bind(with_optimistix, problem, "implicit", True)),
    ]
    unrolled_rows = [
        Row("scan", "jax", bind(hand_unrolled, problem)),
        Row("unrolled", "odljax", bind(ours, problem, "unrolled", "warn")),
        Row("through(unrolled)", "odljax", bind(ours_through, problem, "unrolled")),
        Row("GradientDescent", "jaxopt", bind(with_jaxopt, problem, "unrolled", False)),
        Row("fixed_point, all steps kept", "optimistix", bind(with_optimistix, problem, "unrolled", False)),
        Row("fixed_point, default", "optimistix", bind(with_optimistix, problem, "unrolled", True)),
    ]
    found = [
        group("implicit", implicit_rows, reference.implicit(iterates[-1])),
        group("unrolled", unrolled_rows, unrolled),
    ]
    if problem.loss is ridge_loss:
        stopping = "unrolled, stopping"
        # The tolerance is out of reach within the budget: all rows take the floor's steps and differ in the test alone.
        stopping_rows = [
            Row("scan, no test", "jax", bind(hand_unrolled, problem)),
            Row("unrolled(until_converged)", "odljax", bind(ours, problem, stopping, "warn")),
            Row("GradientDescent", "jaxopt", bind(with_jaxopt, problem, stopping, False)),
            Row("fixed_point, all steps kept", "optimistix", bind(with_optimistix, problem, stopping, False)),
            Row("fixed_point, default", "optimistix", bind(with_optimistix, problem, stopping, True)),
        ]
        found.append(group(stopping, stopping_rows, unrolled))
    return found


# ---- the ladder ------------------------------------------------------------------------------------------------------


def ladder_problem(design: str, condition: float, num_columns: int) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Data (X, y, outer gradient) and theta, in float32, of a ridge problem of largest curvature 1 and given condition.

    The curvatures are spread evenly on a logarithmic scale, by the scales of the features ("scaled") or by correlations
    between them ("correlated": the same singular values in a random basis). The outer gradient is that of a linear
    model on held-out rows.
    """
    rng = np.random.default_rng(1)
    num_rows = 2 * num_columns
    curvature = np.geomspace(1.0, 1 / condition, num_columns)
    weight = 0.5 / condition
    X, _ = np.linalg.qr(rng.standard_normal((num_rows, num_columns)))
    X = X * np.sqrt(num_rows * (curvature - weight))
    if design == "correlated":
        basis, _ = np.linalg.qr(rng.standard_normal((num_columns, num_columns)))
        X = X @ basis
    y = X @ rng.standard_normal(num_columns) + rng.standard_normal(num_rows)
    held_out = rng.standard_normal((num_rows, num_rows)) @ X
    outer = held_out.T @ rng.standard_normal(num_rows)
    parts = X, y, outer / np.linalg.norm(outer)
    return tuple(part.astype(np.float32) for part in parts), np.full(num_columns, np.log(weight), np.float32)


def ladder_loss(w: Any, theta: Any, data: Any) -> Any:
    X, y, _ = data
    return 0.5 * jnp.mean((X @ w - y) ** 2) + penalty(w, theta)


def _ladder_ours(**options: Any) -> Function:
    def value(theta: Any, w: Any, data: Any) -> Any:
        iteration = odl.gradient_descent(lambda w, theta: ladder_loss(w, theta, data), step_size=1.0)
        solver = odl.implicit(odl.for_steps(iteration, 1), on_failure="ignore", **options)
        return jnp.sum(data[2] * solver(w, theta).x)

    return jax.grad(value)


def _ladder_jaxopt(cg: bool) -> Function:
    import jaxopt

    solve = functools.partial(jaxopt.linear_solve.solve_cg, tol=CG_TOL, maxiter=LADDER_STEPS) if cg else None

    def value(theta: Any, w: Any, data: Any) -> Any:
        solver = jaxopt.GradientDescent(
            ladder_loss, stepsize=1.0, maxiter=1, tol=0.0, acceleration=False, implicit_diff_solve=solve
        )
        return jnp.sum(data[2] * solver.run(w, theta, data).params)

    return jax.grad(value)


def _ladder_optimistix(cg: bool) -> Function:
    import lineax
    import optimistix

    if cg:
        adjoint = optimistix.ImplicitAdjoint(lineax.CG(rtol=CG_TOL, atol=CG_TOL, max_steps=LADDER_STEPS))
    else:
        adjoint = optimistix.ImplicitAdjoint()

    def value(theta: Any, w: Any, data: Any) -> Any:
        def T(w: Any, arguments: Any) -> Any:
            return w - jax.grad(ladder_loss)(w, *arguments)

        solution = optimistix.fixed_point(
            T,
            optimistix.FixedPointIteration(rtol=1e-30, atol=1e-30),
            w,
            (theta, data),
            max_steps=1,
            adjoint=adjoint,
            throw=False,
            tags=frozenset({lineax.negative_semidefinite_tag}) if cg else frozenset(),
        )
        return jnp.sum(data[2] * solution.value)

    return jax.grad(value)


LADDER_ROWS: list[tuple[str, str, Callable[[], Function]]] = [
    ("implicit, CG (default)", "odljax", _ladder_ours),
    (
        f"implicit, CG, tol 1e-8, {LADDER_STEPS} steps",
        "odljax",
        lambda: _ladder_ours(linear_solver=odl.linear.cg(tol=1e-8, max_steps=LADDER_STEPS)),
    ),
    ("implicit, dense LU", "odljax", lambda: _ladder_ours(linear_solver=odl.linear.dense())),
    ("GradientDescent, normal CG (default)", "jaxopt", lambda: _ladder_jaxopt(False)),
    ("GradientDescent, CG", "jaxopt", lambda: _ladder_jaxopt(True)),
    ("fixed_point, LU (default)", "optimistix", lambda: _ladder_optimistix(False)),
    ("fixed_point, CG", "optimistix", lambda: _ladder_optimistix(True)),
]


def ladder(design: str, conditions: tuple[float, ...], num_columns: int, smoke: bool) -> tuple[list[Any], list[Any]]:
    """The error of the hypergradient at the exact solution, by method and condition number; and what was skipped.

    The reference takes the solution rounded to float32, as the rows do.
    """
    name = f"ridge ladder {2 * num_columns}x{num_columns}, {design} features"
    rungs = []
    for condition in conditions:
        data, theta = ladder_problem(design, condition, num_columns)
        X, y, outer = data
        reference = Reference("ridge", (X, y, X, y), theta)
        w = reference.minimiser(np.zeros(num_columns)).astype(np.float32)
        adjoint = np.linalg.solve(reference.hessian(w), outer.astype(np.float64))
        rungs.append((condition, (theta, w, data), -reference.weights * w * adjoint))
    rows, skipped = [], []
    # Where a peer stops the run, JAX logs the whole traceback; the report has its first line.
    logging.getLogger("jax._src.callback").setLevel(logging.CRITICAL)
    for method, library, build in LADDER_ROWS:
        if smoke and library != "odljax" and "default" not in method:
            continue
        row = {"problem": name, "method": method, "library": library}
        try:
            gradient = jax.jit(build())
        except ImportError as missing:
            skipped.append({**row, "derivative": "implicit", "reason": _harness.reason(missing)})
            continue
        for condition, arguments, truth in rungs:
            failure, error = None, None
            try:
                error = _harness.relative_error(gradient(*arguments), truth)
            except Exception as raised:
                # Some peers stop the run where their linear solver gives up.
                if library == "odljax":
                    raise
                failure = _harness.reason(raised)
            rows.append({**row, "condition": condition, "error": error, "failure": failure})
    return rows, skipped


# ---- the run, its table and its figures ------------------------------------------------------------------------------


def run(smoke: bool) -> dict[str, Any]:
    """Measures everything; ``smoke`` takes small sizes and hardly measures."""
    if smoke:
        effort, conditions, columns = _harness.SMOKE, (1e1, 1e3), 20
        problems = [make_problem("logistic", 60, 8, 60, 0.1), make_problem("ridge", 60, 20, 30, 0.1)]
    else:
        effort, conditions, columns = _harness.Effort(), LADDER, 400
        problems = [make_problem("logistic", 2000, 300, 200, 3e-3), make_problem("ridge", 2000, 1000, 100, 0.1)]
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for problem in problems:
        for group in groups(problem, smoke):
            _harness.progress(f"{group.problem}, {group.derivative}: {len(group.rows)} rows")
            some, missing = _harness.measure(group, effort)
            rows += some
            skipped += missing
    rungs: list[dict[str, Any]] = []
    for design in ("scaled", "correlated")[: 1 if smoke else 2]:
        _harness.progress(f"ridge ladder, {design} features")
        some, missing = ladder(design, conditions, columns, smoke)
        rungs += some
        skipped += missing
    return {
        "targets": {"run_ratio": TARGET_RUN, "compile_ratio": TARGET_COMPILE, "adjoint": list(TARGET_ADJOINT)},
        "cg": {
            "tol": CG_TOL,
            "max_steps": CG_STEPS,
            "products": {problem.name: problem.cg_products for problem in problems},
        },
        "rows": rows,
        "ladder": rungs,
        "skipped": skipped,
    }


def _keys(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["problem"], row["derivative"]) for row in rows))


def _ladders(report: dict[str, Any]) -> dict[str, dict[tuple[str, str], list[dict[str, Any]]]]:
    """Rungs by problem, then by (library, method)."""
    found: dict[str, dict[tuple[str, str], list[dict[str, Any]]]] = {}
    for rung in report["ladder"]:
        found.setdefault(rung["problem"], {}).setdefault((rung["library"], rung["method"]), []).append(rung)
    return found


def cost_table(report: dict[str, Any]) -> None:
    """Prints the rows of a report, a table a group, and what was skipped."""
    number = _harness.significant
    for problem, derivative in _keys(report["rows"]):
        cells = [
            [
                f"{row['library']}: {row['method']}",
                number(row["run_ms"]),
                number(row["run_ratio"]),
                number(row["compile_ms"]),
                number(row["compile_ratio"]),
                number(row["compile_processor_ratio"]),
                number(row["bytes"]["total"] and row["bytes"]["total"] / 1e6),
                "-" if row["traces"] is None else str(row["traces"]),
                f"{row['error']:.0e}",
            ]
            for row in report["rows"]
            if (row["problem"], row["derivative"]) == (problem, derivative)
        ]
        columns = ["row", "run ms", "x floor", "compile ms", "x floor", "x (CPU)", "MB", "traces", "error"]
        _harness.show(f"{problem}: {derivative}", columns, cells)
    for missing in report["skipped"]:
        print(f"skipped: {missing['problem']}, {missing['library']}: {missing['method']}: {missing['reason']}")


def table(report: dict[str, Any]) -> None:
    """Prints the report."""
    cost_table(report)
    for problem, methods in _ladders(report).items():
        conditions = [f"{rung['condition']:.0e}" for rung in next(iter(methods.values()))]
        cells = [
            [f"{library}: {method}", *("failed" if rung["error"] is None else f"{rung['error']:.0e}" for rung in rungs)]
            for (library, method), rungs in methods.items()
        ]
        _harness.show(f"{problem}: error of the hypergradient by condition number", ["row", *conditions], cells)
    for line in [] if report["smoke"] else misses(report):
        print(f"target missed: {line}")


def misses(report: dict[str, Any]) -> list[str]:
    """Which of our rows miss a target, in words."""
    found = []
    for row in report["rows"]:
        if row["library"] != "odljax":
            continue
        name = f"{row['problem']}, {row['derivative']}: {row['method']}"
        for measure, target in (("run_ratio", TARGET_RUN), ("compile_ratio", TARGET_COMPILE)):
            if row[measure] > target:
                found.append(f"{name}: {measure} {row[measure]:.2f} > {target}")
        peers = [
            peer
            for peer in report["rows"]
            if (peer["problem"], peer["derivative"]) == (row["problem"], row["derivative"])
            and peer["library"] not in ("jax", "odljax")
        ]
        # Slower beyond the noise: the quartiles of the ratios do not overlap.
        faster = [peer for peer in peers if peer["run_ratio_quartiles"][1] < row["run_ratio_quartiles"][0]]
        for peer in faster:
            rival = f"{peer['library']}: {peer['method']}"
            found.append(f"{name}: run_ratio {row['run_ratio']:.2f}, {rival} {peer['run_ratio']:.2f}")
    condition, limit = TARGET_ADJOINT
    for rung in report["ladder"]:
        judged = rung["library"] == "odljax" and "CG" in rung["method"] and rung["condition"] <= condition
        if judged and (rung["error"] is None or rung["error"] > limit):
            name = f"{rung['problem']}: {rung['method']}"
            found.append(f"{name}: error {rung['error']:.1e} > {limit:.0e} at condition {rung['condition']:.0e}")
    return found


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """The figures of a report, by name."""
    return {"hypergradient_cost": _cost_figure(report), "hypergradient_cost_ladder": _ladder_figure(report)}


def _cost_figure(report: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    keys = _keys(report["rows"])
    members = [[row for row in report["rows"] if (row["problem"], row["derivative"]) == key] for key in keys]
    measures = [
        ("run_ratio", "run time / floor", TARGET_RUN),
        ("compile_ratio", "compile time / floor", TARGET_COMPILE),
        ("megabytes", "memory, MB", None),
        ("error", "relative error of the gradient", None),
    ]
    figure = Figure(figsize=(13, 1.2 + sum(0.55 + 0.26 * len(rows) for rows in members)), layout="constrained")
    axes = figure.subplots(
        len(keys), len(measures), sharex="col", squeeze=False, height_ratios=[1 + len(rows) for rows in members]
    )
    for line, ((problem, derivative), rows) in enumerate(zip(keys, members, strict=True)):
        for column, (measure, label, target) in enumerate(measures):
            ax = axes[line, column]
            ax.set_xscale("log")
            if target is not None:
                ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                ax.xaxis.set_minor_formatter(NullFormatter())
            ax.set_ylim(len(rows) - 0.5, -0.5)
            ax.grid(axis="x", color="0.9")
            ax.set_axisbelow(True)
            ax.spines[["top", "right", "left"]].set_visible(False)
            ax.tick_params(axis="y", length=0)
            ax.set_yticks(
                range(len(rows)), [f"{row['library']}: {row['method']}" for row in rows] if column == 0 else []
            )
            if target is not None:
                ax.axvspan(1 / target, target, color="0.85", lw=0)
            for y, row in enumerate(rows):
                value = (
                    row["bytes"]["total"] and row["bytes"]["total"] / 1e6 if measure == "megabytes" else row[measure]
                )
                if not value:
                    continue
                colour, marker = _harness.LOOKS.get(row["library"], ("0.5", "v"))
                ax.plot(value, y, marker, color=colour, ms=6)
                text = {
                    "run_ratio": f"{_harness.significant(row['run_ms'])} ms",
                    "compile_ratio": f"{row['compile_ms'] / 1e3:.2f} s",
                    "megabytes": _harness.significant(value),
                    "error": f"{value:.0e}",
                }[measure]
                ax.annotate(text, (value, y), (7, 0), textcoords="offset points", va="center", fontsize=7, color="0.3")
            ax.margins(x=0.25)
            if line == len(keys) - 1:
                ax.set_xlabel(label)
        axes[line, 0].set_title(f"{problem}: {derivative}", loc="left", fontsize=10, fontweight="bold")
    figure.suptitle(
        f"What does a hypergradient cost? Grey: the target for odljax.\n{_harness.caption(report)}",
        fontsize=9,
        x=0.01,
        ha="left",
    )
    return figure


def _ladder_figure(report: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    ladders = _ladders(report)
    figure = Figure(figsize=(4.6 * len(ladders) + 3.2, 4.4), layout="constrained")
    axes = figure.subplots(1, len(ladders), sharey=True, squeeze=False)[0]
    for ax, (problem, methods) in zip(axes, ladders.items(), strict=True):
        seen: dict[str, int] = {}
        for (library, method), rungs in methods.items():
            colour, marker = _harness.LOOKS.get(library, ("0.5", "v"))
            style = ("-", "--", ":")[seen.get(library, 0) % 3]
            seen[library] = seen.get(library, 0) + 1
            # A failed rung is a gap in the line.
            errors = [np.nan if rung["error"] is None else rung["error"] for rung in rungs]
            label = f"{library}: {method}"
            conditions = [rung["condition"] for rung in rungs]
            ax.loglog(conditions, errors, marker + style, color=colour, ms=5, lw=1.5, label=label)
        ax.plot(*TARGET_ADJOINT, "*", color="0.4", ms=14, zorder=0, ls="", label="target: at most this")
        ax.set_xlabel("condition number of the inner Hessian")
        ax.set_title(problem.split(", ")[-1], fontsize=10, fontweight="bold", loc="left")
        ax.grid(color="0.9")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("relative error of the hypergradient")
    axes[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    sizes = next(iter(ladders)).split(", ")[0]
    title = f"Float32 error of the adjoint solve alone, {sizes}. A gap: the solver stopped the run."
    figure.suptitle(f"{title}\n{_harness.caption(report)}", x=0.01, ha="left", fontsize=8)
    return figure
