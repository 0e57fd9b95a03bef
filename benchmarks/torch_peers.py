"""What does a hypergradient cost beside PyTorch: the same steps in odljax, hypertorch, TorchOpt and BOAT.

Logistic regression with one penalty per coefficient, theta being its logarithm; gradient descent with a fixed number of
steps from zero, then the hypergradient of a held-out loss, implicit by conjugate gradients or through the steps. All
rows take the same steps in float32 on the same number of threads, and the conjugate gradients the same number of
products: those that the common relative tolerance needs, where a library stops by another test. Errors are taken
against NumPy in float64. The floor is hand-written JAX.

hypertorch is no package: ``HYPERTORCH`` names a checkout of its repository.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from . import _harness, _torch
from ._harness import Group, Row, Traces
from .hypergradient_cost import (
    CG_STEPS,
    CG_TOL,
    Problem,
    cost_table,
    hand_implicit,
    hand_unrolled,
    make_problem,
    ours,
    ours_through,
)

PACKAGES = ("jax", "jaxlib", "odljax", "numpy", "torch", "torchopt", "boat-torch", "higher")
TARGET = 5.0

Function = Callable[..., Any]


# ---- the problem, in PyTorch -----------------------------------------------------------------------------------------


def torch_loss(w: Any, theta: Any, X: Any, y: Any) -> Any:
    """Mean logistic loss of labels in {-1, 1}, and the penalty."""
    import torch

    return torch.nn.functional.softplus(-y * (X @ w)).mean() + 0.5 * (torch.exp(theta) * w * w).sum()


def torch_outer(w: Any, X: Any, y: Any) -> Any:
    import torch

    return torch.nn.functional.softplus(-y * (X @ w)).mean()


def tensors(problem: Problem) -> tuple[Any, ...]:
    """theta, start and the four arrays of the data, on PyTorch's side."""
    torch = _torch.start()
    return tuple(torch.from_numpy(array.copy()) for array in (problem.theta, problem.start, *problem.data))


# ---- the rows --------------------------------------------------------------------------------------------------------


def with_hypertorch(problem: Problem, derivative: str, method: str, _: Traces) -> Function:
    _harness.checkout("HYPERTORCH")
    theta, start, X, y, X_outer, y_outer = tensors(problem)
    import hypergrad

    theta.requires_grad_()
    step = hypergrad.GradientDescent(lambda w, theta: torch_loss(w[0], theta[0], X, y), problem.step_size)

    def outer(w: Any, _: Any) -> Any:
        return torch_outer(w[0], X_outer, y_outer)

    def compute() -> Any:
        w, history = [start.clone().requires_grad_()], []
        for _ in range(problem.num_steps):
            history.append(w)
            w = step(w, [theta], create_graph=method == "reverse_unroll")
            if method != "reverse_unroll":
                w = [part.detach().requires_grad_() for part in w]
        if method == "reverse_unroll":
            gradient = hypergrad.reverse_unroll(w, [theta], outer, set_grad=False)
        elif method == "reverse":
            maps = [step] * problem.num_steps
            gradient = hypergrad.reverse([*history, w], [theta], maps, outer, set_grad=False)
        else:
            gradient = hypergrad.CG(w, [theta], problem.cg_products, step, outer, tol=0.0, set_grad=False)
        return outer(w, None).item(), gradient[0].numpy()

    return _torch.Eager(compute)


def with_torchopt(problem: Problem, derivative: str, method: str, _: Traces) -> Function:
    torch = _torch.start()
    import torchopt

    theta, start, X, y, X_outer, y_outer = tensors(problem)
    theta.requires_grad_()

    def steps(w: Any, theta: Any, differentiable: bool) -> Any:
        optimiser = torchopt.sgd(lr=problem.step_size)
        w = w.clone().requires_grad_()
        state = optimiser.init(w)
        for _ in range(problem.num_steps):
            with torch.enable_grad():
                loss = torch_loss(w, theta, X, y)
            gradient = torch.autograd.grad(loss, w, create_graph=differentiable)[0]
            updates, state = optimiser.update(gradient, state, inplace=False)
            w = torchopt.apply_updates(w, updates, inplace=False)
            w = w if differentiable else w.detach().requires_grad_()
        return w

    solve = torchopt.linear_solve.solve_cg(maxiter=CG_STEPS, rtol=CG_TOL)
    optimality = torch.func.grad(lambda w, theta: torch_loss(w, theta, X, y))
    rooted = torchopt.diff.implicit.custom_root(optimality, argnums=1, solve=solve)
    solver = rooted(lambda w, theta: steps(w, theta, False))

    def compute() -> Any:
        w = solver(start, theta) if derivative == "implicit" else steps(start, theta, True)
        value = torch_outer(w, X_outer, y_outer)
        return value.item(), torch.autograd.grad(value, theta)[0].numpy()

    return _torch.Eager(compute)


def _boat_weights(model: Any, params: Any) -> Any:
    return next(iter(model.parameters() if params is None else params))


def boat_lower(data: Any, upper_model: Any, lower_model: Any, params: Any = None) -> Any:
    """The inner loss as BOAT calls it, by its import path."""
    return torch_loss(_boat_weights(lower_model, params), _boat_weights(upper_model, None), data["X"], data["y"])


def boat_upper(data: Any, upper_model: Any, lower_model: Any, params: Any = None) -> Any:
    """The outer loss as BOAT calls it."""
    return torch_outer(_boat_weights(lower_model, params), data["X"], data["y"])


def with_boat(problem: Problem, derivative: str, method: str, _: Traces) -> Function:
    torch = _torch.start()
    import boat_torch

    theta, start, X, y, X_outer, y_outer = tensors(problem)

    class Model(torch.nn.Module):
        def __init__(self, values: Any) -> None:
            super().__init__()
            self.values = torch.nn.Parameter(values)

    lower, upper = Model(start), Model(theta)
    config = {
        "fo_op": None,
        "gm_op": ["NGD"],
        "na_op": [method],
        "lower_level_model": lower,
        "upper_level_model": upper,
        "lower_level_var": list(lower.parameters()),
        "upper_level_var": list(upper.parameters()),
        "lower_level_opt": torch.optim.SGD(lower.parameters(), lr=problem.step_size),
        "upper_level_opt": torch.optim.SGD(upper.parameters(), lr=1.0),
        "lower_iters": problem.num_steps,
        "device": "cpu",
        "loss_log_path": os.devnull,
        "accumulate_grad": False,
        "return_grad": True,
        "copy_last_param": False,
        "CG": {"k": problem.cg_products, "tolerance": 0.0},
        # Read whether used or not.
        "GDA": {"alpha_init": 0.0, "alpha_decay": 1.0},
        "RGT": {"truncate_iter": 0},
    }
    losses = {f"{side}_level_loss": {"function": f"{__name__}.boat_{side}"} for side in ("lower", "upper")}
    boat = boat_torch.Problem(config, losses)
    boat.build_ll_solver()
    boat.build_ul_solver()
    inner_data, outer_data = {"X": X, "y": y}, {"X": X_outer, "y": y_outer}

    def compute() -> Any:
        # It adds to the gradient that is there.
        upper.values.grad = None
        gradient, _ = boat.run_iter(inner_data, outer_data, 0)
        return None, gradient[0].numpy()

    return _torch.Eager(compute)


def groups(problem: Problem) -> list[Group]:
    """One group a derivative."""
    reference, bind = problem.reference, functools.partial
    iterates = reference.descent(problem.start, problem.step_size, problem.num_steps)
    exact = reference.implicit(reference.minimiser(iterates[-1]))
    arguments = tuple(jax.tree.map(jnp.asarray, (problem.theta, problem.start, problem.data)))

    def peer(build: Function, derivative: str, name: str, library: str, method: str = "") -> Row:
        return Row(name, library, bind(build, problem, derivative, method or name), eager=True)

    implicit = [
        Row("scan, CG", "jax", bind(hand_implicit, problem)),
        Row("implicit", "odljax", bind(ours, problem, "implicit", "warn")),
        Row("through(implicit)", "odljax", bind(ours_through, problem, "implicit")),
        peer(with_hypertorch, "implicit", "CG", "hypertorch"),
        peer(with_torchopt, "implicit", "custom_root, CG", "torchopt"),
        peer(with_boat, "implicit", "NGD, CG", "boat", "CG"),
    ]
    unrolled = [
        Row("scan", "jax", bind(hand_unrolled, problem)),
        Row("unrolled", "odljax", bind(ours, problem, "unrolled", "warn")),
        Row("through(unrolled)", "odljax", bind(ours_through, problem, "unrolled")),
        peer(with_hypertorch, "unrolled", "reverse_unroll", "hypertorch"),
        peer(with_hypertorch, "unrolled", "reverse", "hypertorch"),
        peer(with_torchopt, "unrolled", "sgd", "torchopt"),
        peer(with_boat, "unrolled", "NGD, RAD", "boat", "RAD"),
    ]
    references = (reference.implicit(iterates[-1]), reference.unrolled(iterates, problem.step_size))
    return [
        Group(problem.name, derivative, rows, arguments, {"error": own, "distance_to_exact": exact})
        for derivative, rows, own in zip(("implicit", "unrolled"), (implicit, unrolled), references, strict=True)
    ]


# ---- the run, its table and its figure -------------------------------------------------------------------------------


def run(smoke: bool) -> dict[str, Any]:
    """Measures everything; ``smoke`` takes small sizes and hardly measures."""
    effort = _harness.SMOKE if smoke else _harness.Effort(seconds=40.0, rounds=(7, 40), compile_rounds=1)
    problem = make_problem("logistic", 60, 8, 30, 0.1) if smoke else make_problem("logistic", 2000, 300, 200, 3e-3)
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for group in groups(problem):
        _harness.progress(f"{group.problem}, {group.derivative}: {len(group.rows)} rows")
        some, missing = _harness.measure(group, effort)
        rows += some
        skipped += missing
    return {
        "targets": {"times_faster": TARGET},
        "cg": {"tol": CG_TOL, "max_steps": CG_STEPS, "products": problem.cg_products},
        "threads": _harness.cores(),
        "rows": rows,
        "skipped": skipped,
    }


def table(report: dict[str, Any]) -> None:
    """Prints the report."""
    cost_table(report)
    for line in [] if report["smoke"] else misses(report):
        print(f"target missed: {line}")


def misses(report: dict[str, Any]) -> list[str]:
    """Which PyTorch row is less than ``TARGET`` times slower than which of ours, in words."""
    found = []
    for row in report["rows"]:
        if row["library"] != "odljax":
            continue
        for peer in report["rows"]:
            times = peer["run_ratio"] / row["run_ratio"]
            if peer["derivative"] == row["derivative"] and peer["library"] not in ("jax", "odljax") and times < TARGET:
                rival = f"{peer['library']}: {peer['method']}"
                found.append(f"{row['derivative']}: {row['method']} is {times:.1f} times faster than {rival}")
    return found


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """The figure of a report, by name."""
    from matplotlib.figure import Figure

    keys = list(dict.fromkeys(row["derivative"] for row in report["rows"]))
    members = [[row for row in report["rows"] if row["derivative"] == key] for key in keys]
    figure = Figure(figsize=(8.5, 1.0 + sum(0.5 + 0.32 * len(rows) for rows in members)), layout="constrained")
    axes = figure.subplots(len(keys), 1, sharex=True, squeeze=False, height_ratios=[1 + len(rows) for rows in members])
    for ax, key, rows in zip(axes[:, 0], keys, members, strict=True):
        best = min(row["run_ratio"] for row in rows if row["library"] == "odljax")
        for y, row in enumerate(rows):
            colour = _harness.LOOKS[row["library"]][0]
            ax.barh(y, row["run_ms"], color=colour, height=0.7)
            text = f" {_harness.significant(row['run_ms'])} ms, {row['run_ratio'] / best:.1f} x"
            ax.text(row["run_ms"], y, text, va="center", fontsize=8, color="0.3")
        ax.set_yticks(range(len(rows)), [f"{row['library']}: {row['method']}" for row in rows])
        ax.invert_yaxis()
        ax.tick_params(axis="y", length=0)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.set_title(key, loc="left", fontsize=10, fontweight="bold")
        ax.margins(x=0.25)
    axes[-1, 0].set_xlabel("median time of one hypergradient, ms; x: ratio to the fastest row of odljax")
    problem = report["rows"][0]["problem"]
    figure.suptitle(f"{problem}, float32\n{_harness.caption(report)}", x=0.01, ha="left", fontsize=8)
    return {"torch_peers": figure}
