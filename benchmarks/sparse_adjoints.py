"""What does the adjoint of a sparse solution cost: on the support or not, beside jaxopt and sparho.

Squared loss on training rows, a penalty ``alpha (rho |x|_1 + (1 - rho)/2 |x|^2)`` with rho = 1 (lasso) or 1/2 (elastic
net), the hypergradient in alpha of the validation loss along a path of 20 penalties. *Adjoint*: the solutions are
given, exact to rounding (coordinate descent, then the linear system of the support), and only the hypergradients are
computed. *Solve and adjoint*: one penalty of the path, from zero, with the same number of accelerated proximal gradient
steps in odljax and jaxopt, and with celer, to its own tolerance, in sparho.

Equal accuracy: each method takes the loosest tolerance of a ladder with which the gradients of the whole path are as
accurate as the target; errors are relative, against LAPACK on the support in NumPy. All in float64. The floor is
hand-written JAX: gather the columns, build the Gram matrix, factorise it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import odljax as odl

from . import _harness
from ._harness import Group, Row, Traces

PACKAGES = ("jax", "jaxlib", "odljax", "numpy", "jaxopt", "sparho", "celer", "scikit-learn")
TARGET = 1e-6
LADDER = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10, 1e-11, 1e-12, 1e-13)

Function = Callable[..., Any]


# ---- the problems ----------------------------------------------------------------------------------------------------


def diabetes() -> tuple[np.ndarray, ...]:
    """scikit-learn's diabetes, standardised, in two halves."""
    from sklearn.datasets import load_diabetes

    X, y = load_diabetes(return_X_y=True)
    X, y = (X - X.mean(0)) / X.std(0), (y - y.mean()) / y.std()
    return X[::2], y[::2], X[1::2], y[1::2]


def correlated(num_rows: int, num_columns: int, correlation: float, num_true: int) -> tuple[np.ndarray, ...]:
    """Neighbouring columns correlate; few of them matter; as many rows for validation."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2 * num_rows, num_columns))
    X = np.empty_like(noise)
    X[:, 0] = noise[:, 0]
    for j in range(1, num_columns):
        X[:, j] = correlation * X[:, j - 1] + np.sqrt(1 - correlation**2) * noise[:, j]
    truth = np.zeros(num_columns)
    truth[rng.choice(num_columns, num_true, replace=False)] = rng.choice([-1.0, 1.0], num_true)
    y = X @ truth
    y = y + 0.3 * y.std() * rng.standard_normal(2 * num_rows)
    return X[:num_rows], y[:num_rows], X[num_rows:], y[num_rows:]


@dataclass(frozen=True)
class Problem:
    """A path of solved problems.

    Attributes:
        data: training and validation rows and targets.
        rho: the share of the l1 norm.
        alphas: the penalties.
        x: the solutions, one row each.
        values: validation losses.
        gradients: their derivatives in the penalties.
        step_size: one over the Lipschitz constant.
    """

    name: str
    data: tuple[np.ndarray, ...]
    rho: float
    alphas: np.ndarray
    x: np.ndarray
    values: np.ndarray
    gradients: np.ndarray
    step_size: float

    @property
    def capacity(self) -> int:
        """Room for the largest support of the path."""
        return int(np.count_nonzero(self.x, axis=1).max())


def make_problem(name: str, data: tuple[np.ndarray, ...], rho: float, num_alphas: int, least: float) -> Problem:
    """Solves the path and differentiates it in NumPy."""
    from sklearn.linear_model import ElasticNet

    X, y, X_outer, y_outer = data
    largest = np.abs(X.T @ y).max() / len(y) / rho
    alphas = largest * np.geomspace(0.9, least, num_alphas)
    solver = ElasticNet(l1_ratio=rho, fit_intercept=False, tol=1e-14, max_iter=200_000, warm_start=True)
    rows, values, gradients = [], [], []
    for alpha in alphas:
        support = np.flatnonzero(solver.set_params(alpha=alpha).fit(X, y).coef_)
        signs, on = np.sign(solver.coef_[support]), X[:, support]
        matrix = on.T @ on / len(y) + alpha * (1 - rho) * np.eye(len(support))
        x = np.zeros(X.shape[1])
        x[support] = np.linalg.solve(matrix, on.T @ y / len(y) - alpha * rho * signs)
        if (np.sign(x[support]) != signs).any():
            raise RuntimeError(f"{name}: the support at {alpha} is not that of the solution")
        left = X_outer @ x - y_outer
        moved = -np.linalg.solve(matrix, rho * signs + (1 - rho) * x[support])
        rows.append(x)
        values.append(0.5 * np.mean(left**2))
        gradients.append((X_outer[:, support].T @ left / len(left)) @ moved)
    step = float(len(y) / np.linalg.norm(X, 2) ** 2)
    return Problem(name, data, rho, alphas, np.stack(rows), np.array(values), np.array(gradients), step)


def inner(rho: float, step_size: float, traces: Function, X: Any, y: Any) -> odl.Iteration:
    """Proximal gradient steps from the columns that are given."""

    def loss(x: Any, alpha: Any) -> Any:
        return 0.5 * jnp.mean((X @ x - y) ** 2)

    def prox(v: Any, alpha: Any, step: Any) -> Any:
        return odl.prox.elastic_net(v, (alpha * rho, (1 - rho) / rho), step)

    return odl.proximal_gradient(traces(loss), prox, step_size)


def outer_and_gradient(x: Any, X_outer: Any, y_outer: Any) -> tuple[Any, Any]:
    left = X_outer @ x - y_outer
    return 0.5 * jnp.mean(left**2), X_outer.T @ left / len(y_outer)


# ---- the adjoint alone -----------------------------------------------------------------------------------------------


def along_the_path(one: Function) -> Function:
    """``one(x, alpha, data) -> (value, gradient)``, penalty after penalty."""

    def compute(alphas: Any, x: Any, *data: Any) -> Any:
        return jax.lax.map(lambda pair: one(*pair, data), (x, alphas))

    return compute


def by_hand(problem: Problem, traces: Traces) -> Function:
    """The floor: Gram matrix of the gathered columns, LU."""
    m, rho = problem.capacity, problem.rho

    def one(x: Any, alpha: Any, data: Any) -> Any:
        X, y, X_outer, y_outer = data
        value, cotangent = outer_and_gradient(x, X_outer, y_outer)
        (support,) = jnp.nonzero(x, size=m, fill_value=0)
        valid = jnp.arange(m) < jnp.sum(x != 0)
        on = jnp.where(valid, X[:, support], 0)
        gram = on.T @ on / len(y) + jnp.diag(jnp.where(valid, alpha * (1 - rho), 1.0))
        part = jnp.where(valid, x[support], 0)
        v = jnp.linalg.solve(gram, jnp.where(valid, cotangent[support], 0))
        return value, -v @ (rho * jnp.sign(part) + (1 - rho) * part)

    traces.count += 1  # there is no function of the user's
    return along_the_path(one)


def ours(problem: Problem, derivative: Function, traces: Traces) -> Function:
    """The pull-back of a derivative; ``derivative(solver, restrict, capacity) -> solver``."""
    rho, step_size = problem.rho, problem.step_size

    def one(x: Any, alpha: Any, data: Any) -> Any:
        X, y, X_outer, y_outer = data
        value, cotangent = outer_and_gradient(x, X_outer, y_outer)
        solver = odl.for_steps(inner(rho, step_size, traces, X, y), 1)

        def restrict(indices: Any) -> Any:
            return inner(rho, step_size, traces, X[:, indices], y).operator

        gradient, _, _ = derivative(solver, restrict, problem.capacity).adjoint.pull_back(x, alpha, cotangent, None)
        return value, gradient

    return along_the_path(one)


def with_jaxopt(problem: Problem, tol: float | None, traces: Traces) -> Function:
    """The adjoint of jaxopt's proximal gradient: conjugate gradients on the normal equations, its default."""
    import jaxopt

    rho = problem.rho
    solve = jaxopt.linear_solve.solve_normal_cg
    if tol is not None:
        solve = functools.partial(solve, tol=tol, maxiter=10_000)

    def one(x: Any, alpha: Any, data: Any) -> Any:
        X, y, X_outer, y_outer = data
        value, cotangent = outer_and_gradient(x, X_outer, y_outer)
        prox = jaxopt.prox.prox_lasso
        if rho < 1:
            prox = lambda v, alpha, scaling: jaxopt.prox.prox_elastic_net(v, (alpha * rho, (1 - rho) / rho), scaling)  # noqa: E731
        loss = traces(lambda x: 0.5 * jnp.mean((X @ x - y) ** 2))
        solver = jaxopt.ProximalGradient(loss, prox, stepsize=problem.step_size)
        pulled = jaxopt.implicit_diff.root_vjp(solver.optimality_fun, x, (alpha,), cotangent, solve=solve)
        return value, pulled[0]

    return along_the_path(one)


class Eager:
    """A row that runs NumPy and tells nothing of its bytes."""

    def __init__(self, compute: Function) -> None:
        self.compute = compute

    def __call__(self, *_: Any) -> Any:
        return self.compute()

    def memory(self) -> dict[str, int | None]:
        return dict.fromkeys(("temp", "output", "generated_code", "total", "peak"))


def sparho_problem(problem: Problem) -> Any:
    import sparho

    X, y, _, _ = problem.data
    penalty = sparho.L1() if problem.rho == 1 else sparho.ElasticNet(problem.rho)
    return sparho.Problem(sparho.SquaredLoss(), penalty, np.asfortranarray(X), y)


def with_sparho(problem: Problem, tol: float, _: Traces) -> Function:
    """sparho's implicit_forward: conjugate gradients on the support, of its true size, by SciPy."""
    import sparho

    made = sparho_problem(problem)
    _, _, X_outer, y_outer = problem.data
    solutions = [sparho.SolverResult(x, np.flatnonzero(x).astype(np.int32), 0.0, 0) for x in problem.x]

    def compute() -> Any:
        values, gradients = [], []
        for alpha, solution in zip(problem.alphas, solutions, strict=True):
            left = X_outer @ solution.coef - y_outer
            cotangent = X_outer.T @ left / len(left)
            values.append(0.5 * np.mean(left**2))
            gradients.append(sparho.implicit_forward(made, float(alpha), solution, cotangent, tol=tol))
        return np.array(values), np.array(gradients)

    return Eager(compute)


# ---- with the solve --------------------------------------------------------------------------------------------------


def ours_solved(problem: Problem, derivative: Function, num_steps: int, traces: Traces) -> Function:
    """Value and gradient as a user has them, from zero."""
    rho, step_size = problem.rho, problem.step_size

    def compute(alpha: Any, _: Any, X: Any, y: Any, X_outer: Any, y_outer: Any) -> Any:
        solver = odl.for_steps(odl.nesterov(inner(rho, step_size, traces, X, y)), num_steps)

        def restrict(indices: Any) -> Any:
            return inner(rho, step_size, traces, X[:, indices], y).operator

        solver = derivative(solver, restrict, problem.capacity)
        start = jnp.zeros(X.shape[1])
        return jax.value_and_grad(lambda a: outer_and_gradient(solver(start, a).x, X_outer, y_outer)[0])(alpha[0])

    return compute


def with_jaxopt_solved(problem: Problem, num_steps: int, tol: float | None, traces: Traces) -> Function:
    """jaxopt as a user has it: accelerated proximal gradient, its implicit derivative."""
    import jaxopt

    rho = problem.rho
    solve = None if tol is None else functools.partial(jaxopt.linear_solve.solve_normal_cg, tol=tol, maxiter=10_000)

    def compute(alpha: Any, _: Any, X: Any, y: Any, X_outer: Any, y_outer: Any) -> Any:
        prox = jaxopt.prox.prox_lasso
        if rho < 1:
            prox = lambda v, alpha, scaling: jaxopt.prox.prox_elastic_net(v, (alpha * rho, (1 - rho) / rho), scaling)  # noqa: E731
        solver = jaxopt.ProximalGradient(
            traces(lambda x: 0.5 * jnp.mean((X @ x - y) ** 2)),
            prox,
            stepsize=problem.step_size,
            maxiter=num_steps,
            tol=0.0,
            implicit_diff_solve=solve,
        )
        start = jnp.zeros(X.shape[1])
        value = lambda a: outer_and_gradient(solver.run(start, a).params, X_outer, y_outer)[0]  # noqa: E731
        return jax.value_and_grad(value)(alpha[0])

    return compute


def with_sparho_solved(problem: Problem, tol: float, _: Traces) -> Function:
    """sparho with the solver that it comes with: celer, to its own tolerance."""
    import sparho
    from sparho.adapters.celer import CelerElasticNet, CelerLasso

    made = sparho_problem(problem)
    _, _, X_outer, y_outer = problem.data
    solver = (CelerLasso if problem.rho == 1 else CelerElasticNet)(tol=1e-12)

    def compute() -> Any:
        alpha = float(problem.alphas[0])
        solution = solver(made, alpha)
        left = X_outer @ solution.coef - y_outer
        gradient = sparho.implicit_forward(made, alpha, solution, X_outer.T @ left / len(left), tol=tol)
        return 0.5 * np.mean(left**2), np.asarray(gradient)

    return Eager(compute)


# ---- the rows --------------------------------------------------------------------------------------------------------


def linear_row(make: Function, on: str) -> Function:
    """``tol -> derivative``: one of ours with a linear solver of that tolerance."""

    def at(tol: float) -> Function:
        def derivative(solver: Any, restrict: Function, capacity: int) -> Any:
            if on == "all":
                return odl.implicit(solver, make(tol))
            options = {"restrict": restrict} if on == "restricted" else {}
            return odl.on_support(solver, capacity, make(tol), symmetric=True, **options)

        return derivative

    return at


OURS = {
    "on_support, restrict, cg": linear_row(lambda tol: odl.linear.cg(tol=tol), "restricted"),
    "on_support, restrict, dense": linear_row(lambda tol: odl.linear.dense(), "restricted"),
    "on_support, cg": linear_row(lambda tol: odl.linear.cg(tol=tol), "support"),
    "implicit, gmres": linear_row(lambda tol: odl.linear.gmres(tol=tol, max_steps=3000), "all"),
    "implicit, bicgstab": linear_row(lambda tol: odl.linear.bicgstab(tol=tol, max_steps=3000), "all"),
}


def loosest(
    build: Callable[[float], Function], arguments: tuple[Any, ...], want: np.ndarray, ladder: tuple[float, ...]
) -> float | None:
    """The loosest tolerance of the ladder that meets the target; None if none does."""
    for tol in ladder:
        function = build(tol)(Traces())
        function = function if isinstance(function, Eager) else jax.jit(function)
        if _harness.relative_error(function(*arguments)[1], want) <= TARGET:
            return tol
    return None


def groups(
    problem: Problem, whole: Problem | None, num_steps: int, ladder: tuple[float, ...]
) -> tuple[list[Group], list[dict[str, str]]]:
    """The adjoints along the path and, at one penalty, the solve with its adjoint; and what cannot be had."""
    bind = functools.partial
    ways: list[tuple[str, str, Function, Function]] = [
        (
            method,
            "odljax",
            lambda tol, at=at: bind(ours, problem, at(tol)),
            lambda tol, at=at: bind(ours_solved, whole, at(tol), num_steps),
        )
        for method, at in OURS.items()
    ]
    ways += [
        (
            "normal CG",
            "jaxopt",
            lambda tol: bind(with_jaxopt, problem, tol),
            lambda tol: bind(with_jaxopt_solved, whole, num_steps, tol),
        ),
        (
            "implicit_forward",
            "sparho",
            lambda tol: bind(with_sparho, problem, tol),
            lambda tol: bind(with_sparho_solved, whole, tol),
        ),
    ]
    arguments = tuple(jax.tree.map(jnp.asarray, (problem.alphas, problem.x, *problem.data)))
    rows, solved = [Row("Gram matrix, LU", "jax", bind(by_hand, problem))], []
    skipped = []
    for method, library, adjoint, both in ways:
        reason = f"no tolerance down to {ladder[-1]:.0e} gives an error of {TARGET:.0e}"
        try:
            tol = loosest(adjoint, arguments, problem.gradients, ladder)
        except ImportError as error:
            tol, reason = None, _harness.reason(error)
        if tol is None:
            about = {"problem": problem.name, "derivative": "adjoint", "method": method, "library": library}
            skipped.append({**about, "reason": reason})
            continue
        label = method if "dense" in method else f"{method}, tol {tol:.0e}"
        rows.append(Row(label, library, adjoint(tol), eager=library == "sparho"))
        solved.append(Row(label, library, both(tol), eager=library == "sparho"))
    rows.append(Row("default", "jaxopt", bind(with_jaxopt, problem, None)))
    made = [Group(problem.name, "adjoint", rows, arguments, {"error": problem.gradients})]
    if whole is not None:
        solved.append(Row("default", "jaxopt", bind(with_jaxopt_solved, whole, num_steps, None)))
        arguments = tuple(jax.tree.map(jnp.asarray, (whole.alphas, whole.x, *whole.data)))
        made.append(Group(whole.name, "solve and adjoint", solved, arguments, {"error": whole.gradients[0]}))
    return made, skipped


# ---- the run, its table and its figure -------------------------------------------------------------------------------


def problems(smoke: bool) -> list[tuple[Problem, Problem | None]]:
    """Each path, and the penalty in its middle alone for the whole time."""
    shapes: dict[str, tuple[Function, float]] = {"diabetes": (diabetes, 0.01)}
    if smoke:
        shapes["synthetic 20x40"] = (lambda: correlated(20, 40, 0.5, 4), 0.3)
    else:
        shapes["synthetic 100x1000"] = (lambda: correlated(100, 1000, 0.5, 10), 0.15)
        shapes["synthetic 38x7129"] = (lambda: correlated(38, 7129, 0.8, 8), 0.2)
    made = []
    for name, (data, least) in shapes.items():
        rows = data()
        for penalty, rho in (("lasso", 1.0), ("elastic net", 0.5)):
            path = make_problem(f"{penalty}, {name}", rows, rho, 3 if smoke else 20, least)
            middle = len(path.alphas) // 2
            cut = {key: getattr(path, key)[middle : middle + 1] for key in ("alphas", "x", "values", "gradients")}
            whole = Problem(path.name, path.data, rho, step_size=path.step_size, **cut)
            made.append((path, whole if rho == 1 else None))
    return made


def run(smoke: bool) -> dict[str, Any]:
    """Measures everything; ``smoke`` takes small sizes and hardly measures."""
    effort = _harness.SMOKE if smoke else _harness.Effort(seconds=20.0, rounds=(5, 40), compile_rounds=1)
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    supports = {}
    with jax.enable_x64(True):
        for path, whole in problems(smoke)[:: 3 if smoke else 1]:
            supports[path.name] = np.count_nonzero(path.x, axis=1).tolist()
            _harness.progress(f"{path.name}: tolerances")
            made, absent = groups(path, whole, 400 if smoke else 4000, LADDER[9:] if smoke else LADDER)
            skipped += absent
            for group in made:
                _harness.progress(f"{group.problem}, {group.derivative}: {len(group.rows)} rows")
                some, missing = _harness.measure(group, effort)
                rows += some
                skipped += missing
    return {"target": TARGET, "supports": supports, "rows": rows, "skipped": skipped}


def table(report: dict[str, Any]) -> None:
    """Prints a table a group, and what was skipped."""
    number = _harness.significant
    for problem, derivative in dict.fromkeys((row["problem"], row["derivative"]) for row in report["rows"]):
        cells = [
            [
                f"{row['library']}: {row['method']}",
                number(row["run_ms"]),
                number(row["run_ratio"]),
                number(row["bytes"]["total"] and row["bytes"]["total"] / 1e6),
                "-" if row["error"] is None else f"{row['error']:.0e}",
            ]
            for row in report["rows"]
            if (row["problem"], row["derivative"]) == (problem, derivative)
        ]
        sizes = report["supports"][problem]
        title = f"{problem}: {derivative} (supports of {min(sizes)} to {max(sizes)})"
        _harness.show(title, ["row", "run ms", "x floor", "MB", "error"], cells)
    for missing in report["skipped"]:
        where = f"{missing['problem']}, {missing['derivative']}"
        print(f"skipped: {where}, {missing['library']}: {missing['method']}: {missing['reason']}")


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """Time of the adjoints of a path, a panel a problem."""
    from matplotlib.figure import Figure

    chosen = [row for row in report["rows"] if row["derivative"] == "adjoint"]
    keys = list(dict.fromkeys(row["problem"] for row in chosen))
    members = [[row for row in chosen if row["problem"] == key] for key in keys]
    figure = Figure(figsize=(9.0, 1.0 + sum(0.6 + 0.3 * len(rows) for rows in members)), layout="constrained")
    axes = figure.subplots(len(keys), 1, sharex=True, squeeze=False, height_ratios=[1 + len(rows) for rows in members])
    for ax, key, rows in zip(axes[:, 0], keys, members, strict=True):
        for y, row in enumerate(rows):
            ax.barh(y, row["run_ms"], color=_harness.LOOKS.get(row["library"], ("0.5", "v"))[0], height=0.7)
            error = "failed" if row["error"] is None else f"error {row['error']:.0e}"
            text = f" {_harness.significant(row['run_ms'])} ms, {error}"
            ax.text(row["run_ms"], y, text, va="center", fontsize=8, color="0.3")
        ax.set_yticks(range(len(rows)), [f"{row['library']}: {row['method']}" for row in rows])
        ax.invert_yaxis()
        ax.set_xscale("log")
        ax.tick_params(axis="y", length=0)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.set_title(key, loc="left", fontsize=10, fontweight="bold")
        ax.margins(x=0.3)
    axes[-1, 0].set_xlabel("median time of the hypergradients of the whole path at given solutions, ms")
    figure.suptitle(f"Adjoints of sparse solutions, float64\n{_harness.caption(report)}", x=0.01, ha="left", fontsize=8)
    return {"sparse_adjoints": figure}
