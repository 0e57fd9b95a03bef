"""Which estimator for which problem: the measurements behind docs/choosing.md, on problems whose answers are known.

Each section asks one question of the decision tree. At one point: outer value, error of the gradient, time and bytes of
an update, by ``odl.diagnostics.compare``. Over a run: how far theta ends from the known minimiser, and what it cost.
All in float64.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import odljax as odl
from odljax.hypergradients import Hypergradient

from . import _harness

PACKAGES = ("jax", "jaxlib", "odljax", "numpy")
h = odl.hypergradients


def run(smoke: bool) -> dict[str, Any]:
    """Runs every section."""
    sections = {}
    with jax.enable_x64(True):
        for name, section in SECTIONS.items():
            _harness.progress(name)
            sections[name] = section(smoke)
    return {"sections": sections}


def at_one_point(
    estimators: dict[str, Hypergradient], problem: Any, smoke: bool, num_updates: int = 1
) -> list[dict[str, Any]]:
    """Rows of a comparison at the problem's theta against its closed form."""
    table = odl.diagnostics.compare(
        estimators,
        problem.theta,
        problem.x0,
        reference=problem.hypergradient(problem.theta),
        num_updates=num_updates,
        rounds=2 if smoke else 15,
    )
    columns = zip(table.names, table.errors, table.seconds, table.num_bytes, table.statuses, strict=True)
    return [
        {"method": name, "error": error, "ms": 1e3 * seconds, "kib": size and size / 1024, "status": status.name}
        for name, error, seconds, size, status in columns
    ]


def to_the_end(
    hyper: Hypergradient,
    theta: Any,
    x0: Any,
    rate: Any,
    num_updates: int,
    target: Any,
    data: tuple[Any, ...] = (),
    box: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Descent of theta by plain (projected) gradient steps, ``rate`` a number or a function of t: where it ends."""

    @jax.jit
    def walk(theta: Any, data: tuple[Any, ...]) -> Any:
        def body(carry: Any, t: Any) -> Any:
            theta, state = carry
            gradient, state, info = hyper.update(theta, state, *data)
            step = rate(t) if callable(rate) else rate
            theta = theta - step * gradient
            theta = theta if box is None else jnp.clip(theta, *box)
            return (theta, state), (info.num_steps, info.status)

        return jax.lax.scan(body, (theta, hyper.init(theta, x0, *data)), jnp.arange(num_updates))

    theta = jnp.asarray(theta)
    (end, _), (steps, statuses) = jax.block_until_ready(walk(theta, data))
    start = time.perf_counter()
    jax.block_until_ready(walk(theta, data))
    seconds = time.perf_counter() - start
    distance = float(jnp.linalg.norm(jnp.atleast_1d(end - target)))
    return {
        "error": distance,
        "ms": 1e3 * seconds / num_updates,
        "steps": int(steps.sum()),
        "status": odl.Status(int(statuses.max())).name,
    }


# ---- is the inner solution unique? -----------------------------------------------------------------------------------


def unique(smoke: bool) -> list[dict[str, Any]]:
    """The inner problem leaves one direction free; the outer loss must choose. The truth is theta = 1/2."""
    problem = odl.problems.p_c(1.0)
    f, F = problem.objective, problem.outer
    descent = odl.gradient_descent(f, problem.step_size)
    K, updates = (50, 20) if smoke else (1000, 400)
    long = odl.for_steps(odl.krasnoselskii_mann(descent), K)
    estimators: dict[str, tuple[Hypergradient, Any, int]] = {
        "implicit, neumann(100)": (h.through(odl.implicit(long, odl.linear.neumann(100)), F), 0.3, updates),
        "unrolled": (h.through(odl.unrolled(long, checkpoint_every=32), F), 0.3, updates),
        "alternating": (h.alternating(f, F, step_size=0.5), 0.3, updates),
        f"hodl, K = {K // 10}": (h.hodl(descent, F, num_steps=K // 10), 0.3, updates),
        f"hodl, K = {K}": (h.hodl(descent, F, num_steps=K), 0.3, updates),
        "bvfsm": (h.bvfsm(f, F, step_size=0.5), 0.02, 10 * updates),
        "pbgd, value gap": (
            h.pbgd(f, F, step_size=0.5, penalty=lambda k: (k + 1.0) ** 0.5),
            lambda t: 0.5 / (1 + 0.5 * (t + 1.0) ** 0.5),
            20 * updates,
        ),
        "bome": (h.bome(f, F, step_size=0.5), 0.1, 20 * updates),
        "meha": (h.meha(f, F, step_size=0.2), 0.05, 20 * updates),
    }
    rows = []
    for name, (hyper, rate, number) in estimators.items():
        result = to_the_end(hyper, problem.theta, problem.x0, rate, number, 0.5)
        rows.append({"method": name, **result, "updates": number})
    return rows


# ---- smooth, or with kinks? ------------------------------------------------------------------------------------------


def _ours(problem: Any, num_steps: int) -> Any:
    iteration = (
        odl.gradient_descent(problem.objective, problem.step_size)
        if problem.prox is None
        else odl.proximal_gradient(problem.objective, problem.prox, problem.step_size)
    )
    return odl.for_steps(iteration, num_steps)


def smooth(smoke: bool) -> list[dict[str, Any]]:
    """Ridge: a symmetric positive-definite Jacobian."""
    size = 20 if smoke else 300
    problem = odl.problems.ridge(2 * size, size)
    solver = _ours(problem, 200)

    def implicit(linear: odl.linear.LinearSolver) -> Hypergradient:
        return h.through(odl.implicit(solver, linear), problem.outer)

    return at_one_point(
        {
            "implicit, cg": implicit(odl.linear.cg()),
            "implicit, gmres": implicit(odl.linear.gmres()),
            "implicit, bicgstab": implicit(odl.linear.bicgstab()),
            "implicit, dense": implicit(odl.linear.dense()),
            "implicit, neumann(20)": implicit(odl.linear.neumann(20)),
            "one_step": h.through(odl.one_step(solver), problem.outer),
            "phantom, 5 steps": h.through(odl.phantom(solver, num_steps=5, damping=0.5), problem.outer),
            "truncated, 20 steps": h.through(odl.truncated(solver, num_steps=20), problem.outer),
            "unrolled": h.through(odl.unrolled(solver), problem.outer),
            "forward": h.through(odl.forward(solver), problem.outer),
        },
        problem,
        smoke,
    )


def kinks(smoke: bool) -> list[dict[str, Any]]:
    """Lasso: the Jacobian of a proximal gradient step is not symmetric; conjugate gradients are refused."""
    size = 20 if smoke else 300
    problem = odl.problems.lasso(2 * size, size)
    solver = _ours(problem, 300)

    def implicit(linear: odl.linear.LinearSolver) -> Hypergradient:
        return h.through(odl.implicit(solver, linear), problem.outer)

    return at_one_point(
        {
            "implicit, gmres": implicit(odl.linear.gmres()),
            "implicit, bicgstab": implicit(odl.linear.bicgstab()),
            "implicit, dense": implicit(odl.linear.dense()),
            "one_step": h.through(odl.one_step(solver), problem.outer),
            "unrolled": h.through(odl.unrolled(solver), problem.outer),
            "forward": h.through(odl.forward(solver), problem.outer),
        },
        problem,
        smoke,
    )


# ---- how much memory? ------------------------------------------------------------------------------------------------


def memory(smoke: bool) -> list[dict[str, Any]]:
    """The steps themselves are differentiated, and there are many; each unknown has a penalty."""
    n, K = (200, 50) if smoke else (20_000, 1000)
    scale = jnp.linspace(0.5, 1.0, n)

    def f(x: Any, theta: Any) -> Any:
        return jnp.sum(jnp.log(jnp.cosh(scale * x - 1.0)) + 0.5 * jnp.exp(theta) * x**2)

    def F(x: Any, theta: Any) -> Any:
        return 0.5 * jnp.mean((x - 0.3) ** 2)

    solver = odl.for_steps(odl.gradient_descent(f, 0.2), K)
    root = round(K**0.5)
    step = 8 * n
    estimators = {
        "unrolled": odl.unrolled(solver),
        f"unrolled, checkpoint_every={root}": odl.unrolled(solver, checkpoint_every=root),
        f"unrolled, memory_budget={40 * step // 1024} KiB": odl.unrolled(solver, memory_budget=40 * step),
        "truncated, 20 steps": odl.truncated(solver, num_steps=20),
        "implicit": odl.implicit(solver),
    }
    made = {name: h.through(one, F) for name, one in estimators.items()}
    made["reversible"] = h.reversible(f, F, step_size=0.2, num_steps=K)
    theta, x0 = jnp.zeros(n), jnp.zeros(n)
    table = odl.diagnostics.compare(made, theta, x0, rounds=2 if smoke else 5)
    columns = zip(table.names, table.errors, table.seconds, table.num_bytes, table.statuses, strict=True)
    return [
        {"method": name, "error": error, "ms": 1e3 * seconds, "kib": size and size / 1024, "status": status.name}
        for name, error, seconds, size, status in columns
    ]


# ---- first derivatives only? -----------------------------------------------------------------------------------------


def first_order(smoke: bool) -> list[dict[str, Any]]:
    """A strongly convex quadratic: what avoids second derivatives, beside what uses them."""
    problem = odl.problems.finite_sum(24, 20, 10)
    f, F, a = problem.inner, problem.outer, problem.step_size
    data = (problem.inner_data, problem.outer_data)
    updates = 20 if smoke else 20_000

    def constant(penalty: float) -> dict[str, float]:
        return {"step_size": a, "inner_step_size": a, "warm_start": True, "penalty": penalty}

    estimators: dict[str, tuple[Hypergradient, Any]] = {
        "soba (second order)": (h.soba(f, F, step_size=a), 0.05),
        "pbgd, penalty 10": (h.pbgd(f, F, **constant(10.0)), 0.02),
        "pbgd, penalty 100": (h.pbgd(f, F, **constant(100.0)), 0.002),
        "f2sa, penalty 100": (
            h.f2sa(f, F, step_size=a, penalised_step_size=a / 100, penalty=100.0, penalty_increment=0.0),
            0.02,
        ),
        "bome": (h.bome(f, F, step_size=0.2 * a, inner_step_size=a), 0.02),
        "meha": (h.meha(f, F, step_size=0.3 * a), 0.02),
        "finite_difference (a step behind)": (h.finite_difference(f, F, step_size=a), 0.02),
        "alternating": (h.alternating(f, F, step_size=a), 0.02),
    }
    rows = []
    for name, (hyper, rate) in estimators.items():
        result = to_the_end(hyper, problem.theta, problem.x0, rate, updates, problem.minimiser, data)
        rows.append({"method": name, **result, "updates": updates})
    return rows


# ---- many outer updates? ---------------------------------------------------------------------------------------------


def many_updates(smoke: bool) -> list[dict[str, Any]]:
    """Inner steps over a whole run: from a fixed start, from the last solution, with tolerances tied to the step."""
    problem = odl.problems.finite_sum(24, 20, 10)

    def inner(x: Any, theta: Any) -> Any:
        return problem.inner(x, theta, problem.inner_data)

    def outer(x: Any, theta: Any) -> Any:
        return problem.outer(x, theta, problem.outer_data)

    descent = odl.gradient_descent(inner, problem.step_size)
    exact = odl.implicit(odl.until_converged(descent, tol=1e-10, max_steps=1000))

    def schedule(k: Any) -> Any:
        return 0.1 * jnp.exp(-0.1 * k.astype(float)) + 1e-10

    estimators = {
        "through": h.through(exact, outer),
        "warm_started": h.warm_started(exact, outer),
        "hoag": h.hoag(descent, outer, tol=schedule),
        "soba": h.soba(inner, outer, step_size=problem.step_size),
    }
    updates = 20 if smoke else 400
    rows = []
    for name, hyper in estimators.items():
        rate = 0.05 if name == "soba" else 0.2
        result = to_the_end(hyper, problem.theta, problem.x0, rate, updates, problem.minimiser)
        rows.append({"method": name, **result, "updates": updates})
    return rows


# ---- how far to trust it? --------------------------------------------------------------------------------------------


def trust(smoke: bool) -> list[dict[str, Any]]:
    """Cut short, and told by how much: the error estimate against the true error, and what it costs."""
    size = 20 if smoke else 300
    problem = odl.problems.ridge(2 * size, size)
    exact = problem.hypergradient(problem.theta)
    rows = []
    for steps in (5, 20, 80):
        solver = odl.implicit(_ours(problem, steps))
        pair = {flag: h.through(solver, problem.outer, error_estimate=flag) for flag in (False, True)}
        table = odl.diagnostics.compare(
            {str(flag): hyper for flag, hyper in pair.items()},
            problem.theta,
            problem.x0,
            reference=exact,
            rounds=2 if smoke else 15,
        )
        gradient, _, info = jax.jit(pair[True].update)(problem.theta, pair[True].init(problem.theta, problem.x0))
        error = float(jnp.abs(gradient - exact))
        rows.append(
            {
                "method": f"implicit after {steps} steps",
                "error": error / float(jnp.abs(exact)),
                "estimate": float(info.error) / float(jnp.abs(exact)),
                "ratio": float(info.error) / error,
                "ms": 1e3 * table.seconds[0],
                "ms with estimate": 1e3 * table.seconds[1],
            }
        )
    return rows


SECTIONS: dict[str, Callable[[bool], list[dict[str, Any]]]] = {
    "unique": unique,
    "smooth": smooth,
    "kinks": kinks,
    "memory": memory,
    "first_order": first_order,
    "many_updates": many_updates,
    "trust": trust,
}


# ---- the report ------------------------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> None:
    """Prints a table a section."""
    for name, rows in report["sections"].items():
        doc = (SECTIONS[name].__doc__ or "").strip()
        columns = list(rows[0])
        cells = [
            [
                value
                if isinstance(value, str)
                else str(value)
                if isinstance(value, int)
                else f"{value:.1e}"
                if key in ("error", "estimate") and value is not None
                else _harness.significant(value)
                for key, value in row.items()
            ]
            for row in rows
        ]
        _harness.show(f"{name}: {doc}", columns, cells)


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """Error against time of one hypergradient, where Jacobians are symmetric and where they are not; memory."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panels = {"smooth": "ridge, 300 unknowns", "kinks": "lasso, 300 unknowns", "memory": "1000 steps, 20 000 unknowns"}
    figure = Figure(figsize=(15, 5.8), layout="constrained")
    axes = figure.subplots(1, len(panels))
    colours = [
        "#0072B2",
        "#009E73",
        "#56B4E9",
        "#000000",
        "#CC79A7",
        "#D55E00",
        "#E69F00",
        "#999999",
        "#0072B2",
        "#D55E00",
    ]
    for ax, (name, title) in zip(axes, panels.items(), strict=True):
        rows = report["sections"][name]
        for i, row in enumerate(rows):
            x = row["ms"]
            y = row["kib"] if name == "memory" else max(row["error"], 1e-16)
            marker = "osD^vP*Xh<"[i % 10]
            ax.loglog(x, y, marker, color=colours[i % len(colours)], ms=9, label=row["method"], ls="")
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xlabel("time of one hypergradient, ms")
        ax.set_ylabel("memory, KiB" if name == "memory" else "relative error")
        ax.set_title(title, loc="left", fontsize=10, fontweight="bold")
        ax.grid(color="0.9")
        ax.set_axisbelow(True)
        ax.margins(0.15)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8, ncol=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    figure.suptitle(
        f"What one hypergradient costs and what it is worth\n{_harness.caption(report)}", x=0.01, ha="left", fontsize=9
    )
    return {"choosing": figure}
