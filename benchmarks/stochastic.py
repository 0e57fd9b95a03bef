"""Stochastic bilevel estimators against benchmark_bilevel's solvers, at equal oracle calls and in blocked time.

Two problems of finite sums: quadratics (rank-one Hessians and cross derivatives, drawn at random) and logistic
regression with one penalty per coefficient. Each algorithm runs twice, here as an estimator and an optax step, there as
the solver of benchopt's benchmark_bilevel, with the same losses, minibatch size, steps and decays, for the same number
of updates, from the same start, over several seeds, in turn, in float32.

An oracle call is one gradient, Hessian-vector or cross product of one sample's loss; a pass is as many calls as both
data sets have samples. The measures are exact: at the theta of each checkpoint the inner problem is solved on all data
in float64 by NumPy, which gives the squared norm of the hypergradient and the gap of the value function to its minimum.

benchmark_bilevel is no package: ``BENCHMARK_BILEVEL`` names a checkout of its repository, which needs ``benchopt``.
"""

from __future__ import annotations

import functools
import importlib
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
from .hypergradient_cost import Reference, logistic_loss, make_problem

PACKAGES = ("jax", "jaxlib", "odljax", "optax", "numpy", "benchopt")
BATCH = 64
LOOP = 10
PERIOD = 0.5

Function = Callable[..., Any]


# ---- the problems ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A bilevel problem of finite sums.

    Attributes:
        inner, outer: ``(x, theta, data) -> scalar``, the mean over the rows of data.
        inner_data, outer_data: float32, samples first.
        measure: ``theta -> (value function, hypergradient)`` in float64.
        minimum: of the value function, or a value close above it.
    """

    name: str
    inner: Function
    outer: Function
    inner_data: dict[str, np.ndarray]
    outer_data: dict[str, np.ndarray]
    x: np.ndarray
    theta: np.ndarray
    measure: Function
    minimum: float

    @property
    def sizes(self) -> tuple[int, int]:
        """The numbers of inner and of outer samples."""
        return len(next(iter(self.inner_data.values()))), len(next(iter(self.outer_data.values())))


CURVATURE = 0.1


def quadratic_inner(x: Any, theta: Any, data: Any) -> Any:
    z = data["r"] @ x
    rows = 0.5 * z**2 + (data["u"] @ theta) * (data["q"] @ x) + data["a"] @ x
    return jnp.mean(rows) + 0.5 * CURVATURE * jnp.sum(x**2)


def quadratic_outer(x: Any, theta: Any, data: Any) -> Any:
    rows = 0.5 * (data["r"] @ x) ** 2 + 0.5 * (data["t"] @ theta) ** 2 + data["a"] @ x + data["b"] @ theta
    return jnp.mean(rows) + 0.5 * CURVATURE * (jnp.sum(x**2) + jnp.sum(theta**2))


def quadratics(num_samples: int, size: int, num_hyper: int) -> Problem:
    """Quadratics whose mean inner Hessian has eigenvalues from about 0.1 to 1.1."""
    rng = np.random.default_rng(0)

    def rows(columns: int) -> np.ndarray:
        """Rows whose second moment has eigenvalues spread over (0.01, 1), in a random basis."""
        basis, _ = np.linalg.qr(rng.standard_normal((columns, columns)))
        return rng.standard_normal((num_samples, columns)) @ (np.geomspace(0.1, 1.0, columns)[:, None] * basis)

    coupling = 0.3 * rng.standard_normal((num_hyper, size)) / (np.sqrt(num_hyper) + np.sqrt(size))
    u = rows(num_hyper)
    inner = {"r": rows(size), "u": u, "q": u @ coupling + 0.3 * rows(size), "a": 0.3 * rows(size) + 0.3}
    outer = {"r": rows(size), "t": rows(num_hyper), "a": 0.3 * rows(size) + 0.3, "b": 0.3 * rows(num_hyper) - 0.3}
    inner, outer = ({name: part.astype(np.float32) for name, part in side.items()} for side in (inner, outer))
    f, F = ({name: part.astype(np.float64) for name, part in side.items()} for side in (inner, outer))

    def moment(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a.T @ b / num_samples

    hessian = moment(f["r"], f["r"]) + CURVATURE * np.eye(size)
    cross, linear = moment(f["u"], f["q"]), f["a"].mean(0)
    outer_x = moment(F["r"], F["r"]) + CURVATURE * np.eye(size)
    outer_theta = moment(F["t"], F["t"]) + CURVATURE * np.eye(num_hyper)
    response = -np.linalg.solve(hessian, cross.T)
    shift = -np.linalg.solve(hessian, linear)

    def measure(theta: np.ndarray) -> tuple[float, np.ndarray]:
        x = response @ theta + shift
        slope = outer_x @ x + F["a"].mean(0)
        own = outer_theta @ theta + F["b"].mean(0)
        value = 0.5 * x @ outer_x @ x + F["a"].mean(0) @ x + 0.5 * theta @ outer_theta @ theta + F["b"].mean(0) @ theta
        return float(value), own + response.T @ slope

    curvature = response.T @ outer_x @ response + outer_theta
    origin = np.zeros(num_hyper)
    minimiser = np.linalg.solve(curvature, -measure(origin)[1])
    start = np.zeros(size, np.float32), np.ones(num_hyper, np.float32)
    name = f"quadratics, n {num_samples}, x {size}, theta {num_hyper}"
    return Problem(name, quadratic_inner, quadratic_outer, inner, outer, *start, measure, measure(minimiser)[0])


def regression_inner(x: Any, theta: Any, data: Any) -> Any:
    return logistic_loss(x, theta, (data["x"], data["y"], None, None))


def regression_outer(x: Any, theta: Any, data: Any) -> Any:
    return jnp.mean(jnp.logaddexp(0.0, -data["y"] * (data["x"] @ x)))


def regression(num_samples: int, size: int) -> Problem:
    """Logistic regression on as many training as, by half, validation samples."""
    from scipy.optimize import minimize

    made = make_problem("logistic", num_samples, size, 1, 0.1)
    X, y, X_outer, y_outer = made.data

    reference, last = Reference("logistic", made.data, made.theta), np.zeros(size)

    def measure(theta: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal last
        if not np.all(np.abs(theta) < 50):
            return np.nan, np.full(size, np.nan)
        reference.weights = np.exp(np.asarray(theta, np.float64))
        x = reference.minimiser(last)
        if not np.linalg.norm(reference.gradient(x)) < 1e-9:
            # Newton's method went astray from there.
            x = reference.minimiser(np.zeros(size))
        last = x
        losses = np.logaddexp(0, -reference.y_outer * (reference.X_outer @ x))
        return float(losses.mean()), reference.implicit(x)

    begin, options = made.theta.astype(np.float64), {"maxiter": 200, "gtol": 1e-9, "ftol": 1e-15}
    best = minimize(measure, begin, jac=True, method="L-BFGS-B", bounds=[(-12, 12)] * size, options=options)
    inner, outer = {"x": X, "y": y}, {"x": X_outer, "y": y_outer}
    name = f"logistic regression, n {num_samples}, x {size}, theta {size}"
    return Problem(
        name, regression_inner, regression_outer, inner, outer, made.start, made.theta, measure, float(best.fun)
    )


# ---- the algorithms --------------------------------------------------------------------------------------------------


def _power(size: float, exponent: float) -> Any:
    return (lambda k: size / (k + 1.0) ** exponent) if exponent else size


@dataclass(frozen=True)
class Algorithm:
    """One algorithm, on both sides.

    Attributes:
        name: of our estimator, and of the peer's module.
        decays: exponents of the inner, adjoint and outer steps.
        calls: oracle calls of an update, as a function of (inner samples, outer samples, batch).
        options: of our estimator beyond steps, batch size and key; a function takes the inner step size.
        theirs: the parameters of the peer's solver beyond the shared ones.
        full: takes all samples at each update.
    """

    name: str
    decays: tuple[float, float, float]
    calls: Callable[[int, int, int], float]
    options: dict[str, Any]
    theirs: dict[str, Any]
    full: bool = False


def _refreshed(each: float) -> Callable[[int, int, int], float]:
    """Calls of a method that takes ``each`` samples' calls, and once a period one round on all samples."""

    def calls(n: int, m: int, b: int) -> float:
        period = max(1, int(PERIOD * (n + m) / b))
        return each * b + (3 * n + 2 * m) / period

    return calls


def algorithms() -> list[Algorithm]:
    """All thirteen. The loops have the lengths that benchmark_bilevel gives them."""
    loops, series = {"num_steps": LOOP}, {"num_adjoint_steps": LOOP}
    peer_loops, peer_series, peer_terms = {"n_inner_steps": LOOP}, {"n_shia_steps": LOOP}, {"n_hia_steps": LOOP}
    mean_terms = (LOOP - 1) / 2
    return [
        Algorithm("soba", (0.5, 0.5, 0.5), lambda n, m, b: 5 * b, {}, {}),
        Algorithm("saba", (0, 0, 0), lambda n, m, b: 5 * b, {}, {}),
        Algorithm("srba", (0, 0, 0), _refreshed(10), {}, {"period_frac": PERIOD}),
        Algorithm("fsla", (0.5, 0.5, 0.5), lambda n, m, b: 7 * b, {}, {}),
        Algorithm("amigo", (0, 0, 0), lambda n, m, b: (2 * LOOP + 3) * b, {**loops, **series}, peer_loops),
        Algorithm(
            "stocbio", (0, 0, 0), lambda n, m, b: (2 * LOOP + 3) * b, {**loops, **series}, {**peer_loops, **peer_series}
        ),
        Algorithm(
            "bsa",
            (0.5, 0, 0.5),
            lambda n, m, b: (LOOP + mean_terms + 3) * b,
            {**loops, "num_terms": LOOP},
            {**peer_loops, **peer_terms},
        ),
        Algorithm("ttsa", (0.4, 0, 0.6), lambda n, m, b: (mean_terms + 4) * b, {"num_terms": LOOP}, peer_terms),
        Algorithm(
            "sustain", (1 / 3, 0, 1 / 3), lambda n, m, b: (2 * mean_terms + 8) * b, {"num_terms": LOOP}, peer_terms
        ),
        Algorithm("mrbo", (1 / 3, 0, 1 / 3), lambda n, m, b: (2 * LOOP + 8) * b, series, peer_series),
        Algorithm(
            "vrbo",
            (0, 0, 0),
            _refreshed(LOOP * (2 * LOOP + 8)),
            {**loops, **series},
            {**peer_loops, **peer_series, "period_frac": PERIOD},
        ),
        Algorithm(
            "f2sa",
            (4 / 7, 0, 4 / 7),
            lambda n, m, b: (3 * LOOP + 3) * b,
            {
                **loops,
                "penalised_step_size": lambda size: _power(size, 5 / 7),
                "penalty_increment": lambda size: _power(0.1, 1 / 7),
            },
            {**peer_loops, "lmbda0": 1.0, "delta_lmbda": 0.1},
        ),
        Algorithm(
            "pzobo",
            (0, 0, 0),
            lambda n, m, b: (LOOP + 1) * LOOP * n + 2 * m,
            {**loops, "num_directions": LOOP},
            {**peer_loops, "n_gaussian_vectors": LOOP, "mu": 0.1},
            full=True,
        ),
    ]


SMOKE_STEPS = (0.1, 1.0)
# Inner step and its ratio to the outer step, for both sides: the best of a grid of 35, found on ours; smaller where one
# side diverged with it on another seed.
STEPS: dict[str, dict[str, tuple[float, float]]] = {
    "quadratics": {
        "soba": (0.4, 0.3),
        "saba": (0.2, 0.3),
        "srba": (0.4, 1.0),
        "fsla": (0.4, 1.0),
        "amigo": (0.2, 10.0),
        "stocbio": (0.4, 10.0),
        "bsa": (0.4, 0.1),
        "ttsa": (0.4, 0.3),
        "sustain": (0.4, 1.0),
        "mrbo": (0.4, 0.1),
        "vrbo": (0.2, 1.0),
        "f2sa": (0.4, 3.0),
        "pzobo": (0.4, 1.0),
    },
    "logistic regression": {
        "soba": (1.0, 0.03),
        "saba": (0.3, 0.03),
        "srba": (1.0, 0.03),
        "fsla": (1.0, 0.03),  # its step is its momentum, too, and at most 1
        "amigo": (0.1, 0.003),
        "stocbio": (0.1, 0.003),
        "bsa": (0.3, 0.003),
        "ttsa": (0.3, 0.003),
        "sustain": (0.3, 0.003),
        "mrbo": (2.0, 0.03),
        "vrbo": (0.3, 0.01),
        "f2sa": (0.3, 0.001),
        "pzobo": (0.3, 0.001),
    },
}


@dataclass(frozen=True)
class Plan:
    """How an algorithm runs on a problem: updates a checkpoint, checkpoints, steps."""

    chunk: int
    checkpoints: int
    step_size: float
    ratio: float


Curve = tuple[list[np.ndarray], list[float]]


def ours(algorithm: Algorithm, problem: Problem, plan: Plan) -> tuple[Callable[[int], Curve], float]:
    """``seed -> (theta at each checkpoint, seconds until then)``, compiled, and the seconds that it took."""
    inner_decay, adjoint_decay, outer_decay = algorithm.decays
    size = plan.step_size
    options = {name: option(size) if callable(option) else option for name, option in algorithm.options.items()}
    if "penalised_step_size" not in options and algorithm.name != "pzobo":
        options["adjoint_step_size"] = _power(size, adjoint_decay)
    optimiser = optax.sgd(_power(size / plan.ratio, outer_decay))
    batch = min(BATCH, *problem.sizes)
    # Blocks of contiguous rows are the samples, as in the peer: a block is read at once, rows would be gathered.
    data = tuple(
        {name: jnp.asarray(part).reshape(-1, batch, *part.shape[1:]) for name, part in side.items()}
        for side in (problem.inner_data, problem.outer_data)
    )

    def rows(loss: Function) -> Function:
        return lambda x, theta, data: loss(x, theta, {k: v.reshape(-1, *v.shape[2:]) for k, v in data.items()})

    def estimator(key: Any) -> odl.Hypergradient:
        return getattr(odl.hypergradients, algorithm.name)(
            rows(problem.inner),
            rows(problem.outer),
            step_size=_power(size, inner_decay),
            batch_size=None if algorithm.full else 1,
            key=key,
            **options,
        )

    def begin(key: Any, data: Any) -> Any:
        theta = jnp.asarray(problem.theta)
        return theta, estimator(key).init(theta, jnp.asarray(problem.x), *data), optimiser.init(theta)

    def advance(carry: Any, data: Any) -> Any:
        # The state has the keys by now; the estimator's own is not used again.
        hyper = estimator(jax.random.key(0))

        def step(carry: Any, _: None) -> Any:
            theta, state, moments = carry
            gradient, state, _ = hyper.update(theta, state, *data)
            change, moments = optimiser.update(gradient, moments, theta)
            return (optax.apply_updates(theta, change), state, moments), None

        return jax.lax.scan(step, carry, length=plan.chunk)[0]

    clock = time.perf_counter()
    start = jax.jit(begin).lower(jax.random.key(0), data).compile()
    carry = start(jax.random.key(0), data)
    advanced = jax.jit(advance).lower(carry, data).compile()
    jax.block_until_ready(advanced(carry, data))
    compile_s = time.perf_counter() - clock

    def run(seed: int) -> Curve:
        carry = jax.block_until_ready(start(jax.random.key(seed), data))
        thetas, seconds = [np.asarray(carry[0])], [0.0]
        clock = time.perf_counter()
        for _ in range(plan.checkpoints):
            carry = jax.block_until_ready(advanced(carry, data))
            seconds.append(time.perf_counter() - clock)
            thetas.append(np.asarray(carry[0]))
        return thetas, seconds

    return run, compile_s


def theirs(algorithm: Algorithm, problem: Problem, plan: Plan) -> tuple[Callable[[int], Curve], float]:
    """The same of benchmark_bilevel's solver, through its own ``run``."""
    _harness.checkout("BENCHMARK_BILEVEL")
    solver_class = importlib.import_module(f"solvers.{algorithm.name}").Solver

    def sliced(loss: Function, data: dict[str, np.ndarray]) -> Function:
        data = jax.tree.map(jnp.asarray, data)

        @functools.partial(jax.jit, static_argnames="batch_size")
        def function(x: Any, theta: Any, start: Any = 0, batch_size: int = 1) -> Any:
            take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=batch_size)
            return loss(x, theta, jax.tree.map(take, data))

        return function

    shared: dict[str, Any] = {"step_size": plan.step_size, "outer_ratio": plan.ratio}
    if not algorithm.full:
        shared |= {"batch_size": min(BATCH, *problem.sizes), "eval_freq": plan.chunk}
    solver = solver_class.get_instance(**shared, **algorithm.theirs)
    n, m = problem.sizes
    clock = time.perf_counter()
    # It compiles here, and runs two checkpoints.
    solver.set_objective(
        sliced(problem.inner, problem.inner_data),
        sliced(problem.outer, problem.outer_data),
        n,
        m,
        jnp.asarray(problem.x),
        jnp.asarray(problem.theta),
    )
    compile_s = time.perf_counter() - clock
    updates_a_call = 1 if algorithm.full else plan.chunk

    def run(seed: int) -> Curve:
        solver.random_state = seed
        if not algorithm.full:
            keys = jax.random.split(jax.random.PRNGKey(seed))
            solver.state_inner_sampler = {**solver.state_inner_sampler, "key": keys[0]}
            solver.state_outer_sampler = {**solver.state_outer_sampler, "key": keys[1]}
        thetas, seconds = [problem.theta], [0.0]
        clock, updates = 0.0, 0

        def callback() -> bool:
            nonlocal clock, updates
            if updates == 0:
                clock = time.perf_counter()
            elif updates % plan.chunk == 0:
                theta = jax.block_until_ready(solver.outer_var)
                seconds.append(time.perf_counter() - clock)
                thetas.append(np.asarray(theta))
            updates += updates_a_call
            return len(thetas) <= plan.checkpoints

        solver.run(callback)
        return thetas, seconds

    return run, compile_s


# ---- the run, its table and its figures ------------------------------------------------------------------------------


def compare(
    algorithm: Algorithm, problem: Problem, plan: Plan, seeds: int
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Runs both sides in turn; returns the rows and what was skipped."""
    kind = problem.name.split(",")[0]
    name = {"problem": problem.name, "method": algorithm.name}
    sides: dict[str, tuple[Callable[[int], Curve], float]] = {"odljax": ours(algorithm, problem, plan)}
    skipped = []
    try:
        sides["benchmark_bilevel"] = theirs(algorithm, problem, plan)
    except Exception as error:
        skipped.append({**name, "library": "benchmark_bilevel", "reason": _harness.reason(error)})
    curves: dict[str, list[Curve]] = {library: [] for library in sides}
    for seed in range(seeds):
        for library, (run, _) in sides.items():
            curves[library].append(run(seed))
    n, m = problem.sizes
    passes = plan.chunk * algorithm.calls(n, m, min(BATCH, n, m)) / (n + m)
    rows = []
    for library, runs in curves.items():
        squared, values = [], []
        for thetas, _ in runs:
            found = [problem.measure(theta.astype(np.float64)) for theta in thetas]
            squared.append([float(gradient @ gradient) for _, gradient in found])
            values.append([value for value, _ in found])
        rows.append(
            {
                **name,
                "kind": kind,
                "library": library,
                "step_size": plan.step_size,
                "outer_ratio": plan.ratio,
                "updates": plan.chunk * plan.checkpoints,
                "passes": [passes * number for number in range(plan.checkpoints + 1)],
                "seconds": [statistics.median(moments) for moments in zip(*(s for _, s in runs), strict=True)],
                "run_s": [seconds[-1] for _, seconds in runs],
                "squared_norm": np.median(squared, axis=0).tolist(),
                "squared_norms": [curve[-1] for curve in squared],
                "value": np.median(values, axis=0).tolist(),
                "compile_s": sides[library][1],
            }
        )
    return rows, skipped


def make_plan(algorithm: Algorithm, problem: Problem, total: float, checkpoints: int, smoke: bool = False) -> Plan:
    """As many updates as ``total`` passes allow."""
    n, m = problem.sizes
    updates = total * (n + m) / algorithm.calls(n, m, min(BATCH, n, m))
    # The steps belong to the full sizes.
    steps = SMOKE_STEPS if smoke else STEPS[problem.name.split(",")[0]][algorithm.name]
    return Plan(max(1, round(updates / checkpoints)), checkpoints, *steps)


def run(smoke: bool) -> dict[str, Any]:
    """Runs everything; ``smoke`` takes small sizes, few updates and a few rows."""
    if smoke:
        problems, total, checkpoints, seeds = [quadratics(128, 6, 4), regression(128, 5)], 100.0, 2, 1
    else:
        problems, total, checkpoints, seeds = [quadratics(1024, 100, 100), regression(2048, 50)], 1000.0, 20, 3
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for number, problem in enumerate(problems):
        for algorithm in algorithms()[number::7] if smoke else algorithms():
            _harness.progress(f"{problem.name}: {algorithm.name}")
            some, missing = compare(algorithm, problem, make_plan(algorithm, problem, total, checkpoints, smoke), seeds)
            rows += some
            skipped += missing
        mine = [row for row in rows if row["problem"] == problem.name]
        least = min(problem.minimum, *(float(np.nanmin(row["value"])) for row in mine))
        for row in mine:
            row["gap"] = [value - least for value in row.pop("value")]
    return {"batch": BATCH, "rows": rows, "skipped": skipped}


def _pairs(report: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Our rows, each with the peer's if there is one."""
    peers = {(row["problem"], row["method"]): row for row in report["rows"] if row["library"] != "odljax"}
    mine = [row for row in report["rows"] if row["library"] == "odljax"]
    return [(row, peers.get((row["problem"], row["method"]))) for row in mine]


def time_to(row: dict[str, Any], level: float) -> float | None:
    """Seconds until the squared norm is first at most that, interpolated in time between checkpoints on a log scale."""
    for number, value in enumerate(row["squared_norm"]):
        if value is not None and value <= level:
            if number == 0:
                return 0.0
            before, (early, late) = row["squared_norm"][number - 1], row["seconds"][number - 1 : number + 1]
            share = 1.0 if before is None else np.log(before / level) / np.log(before / value)
            return float(early + share * (late - early))
    return None


def common(row: dict[str, Any], peer: dict[str, Any]) -> tuple[float, float | None, float | None]:
    """The accuracy that both reach, and when they do."""
    level = max(min((v for v in side["squared_norm"] if v is not None), default=np.inf) for side in (row, peer))
    return level, time_to(row, level), time_to(peer, level)


def run_ratio(row: dict[str, Any], peer: dict[str, Any]) -> float:
    """The peer's time for the same updates, in ours: the median over the seeds, which ran in turn."""
    return statistics.median(b / a for a, b in zip(row["run_s"], peer["run_s"], strict=True))


def table(report: dict[str, Any]) -> None:
    """Prints the report."""
    number = _harness.significant
    for problem in dict.fromkeys(row["problem"] for row in report["rows"]):
        cells = []
        for row, peer in _pairs(report):
            if row["problem"] != problem:
                continue
            level, mine, other = common(row, peer) if peer else (None, None, None)
            cells.append(
                [
                    row["method"],
                    str(row["updates"]),
                    f"{row['passes'][-1]:.0f}",
                    *(number(side and side["squared_norm"][-1], 2) for side in (row, peer)),
                    *(number(side and side["gap"][-1], 2) for side in (row, peer)),
                    *(number(side and statistics.median(side["run_s"])) for side in (row, peer)),
                    number(peer and run_ratio(row, peer)),
                    number(level, 2),
                    number(None if not mine or other is None else other / mine),
                    *(number(side and side["compile_s"]) for side in (row, peer)),
                ]
            )
        columns = ["method", "updates", "passes", "g^2", "peer", "gap", "peer", "run s", "peer", "x", "at g^2", "x"]
        _harness.show(problem, [*columns, "compile s", "peer"], cells)
    for missing in report["skipped"]:
        print(f"skipped: {missing['problem']}, {missing['library']}: {missing['method']}: {missing['reason']}")
    for line in [] if report["smoke"] else misses(report):
        print(f"target missed: {line}")


def misses(report: dict[str, Any]) -> list[str]:
    """Where the peer is faster, by the run or to the common accuracy, in words."""
    found = []
    for row, peer in _pairs(report):
        if peer is None:
            continue
        level, mine, other = common(row, peer)
        name = f"{row['problem']}: {row['method']}"
        if run_ratio(row, peer) < 1:
            found.append(f"{name}: the peer takes {run_ratio(row, peer):.2f} of our time for the same updates")
        if mine is not None and other is not None and other < mine:
            found.append(f"{name}: |g|^2 = {level:.1e} in {mine:.2f} s, the peer in {other:.2f} s")
    return found


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """One figure a problem: the squared norm against passes and against seconds, a panel an algorithm."""
    kinds = dict.fromkeys(row["kind"] for row in report["rows"])
    return {f"stochastic_{kind.split()[0]}": _figure(report, kind) for kind in kinds}


def _figure(report: dict[str, Any], kind: str) -> Any:
    from matplotlib.figure import Figure

    rows = [row for row in report["rows"] if row["kind"] == kind]
    names = list(dict.fromkeys(row["method"] for row in rows))
    columns = min(5, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(2.9 * columns, 0.9 + 4.2 * lines), layout="constrained")
    axes = figure.subplots(2 * lines, columns, sharey=True, squeeze=False)
    for place, name in enumerate(names):
        line, column = 2 * (place // columns), place % columns
        for measure, ax in zip(("passes", "seconds"), axes[line : line + 2, column], strict=True):
            for row in rows:
                if row["method"] == name:
                    colour, _ = _harness.LOOKS[row["library"]]
                    values = [np.nan if value is None else value for value in row["squared_norm"]]
                    style = "-" if row["library"] == "odljax" else "--"
                    ax.semilogy(row[measure], values, style, color=colour, lw=1.5, label=row["library"])
            ax.set_xlabel(measure, fontsize=8)
            ax.tick_params(labelsize=7)
            ax.grid(color="0.92")
            ax.spines[["top", "right"]].set_visible(False)
        axes[line, column].set_title(name, fontsize=10, fontweight="bold", loc="left")
    for place in range(len(names), lines * columns):
        for ax in axes[2 * (place // columns) : 2 * (place // columns) + 2, place % columns]:
            ax.set_visible(False)
    for line in axes:
        line[0].set_ylabel("squared norm of the hypergradient", fontsize=7)
    axes[0, 0].legend(frameon=False, fontsize=7)
    figure.suptitle(
        f"{rows[0]['problem']}, batches of {report['batch']}\n{_harness.caption(report)}", x=0.01, ha="left", fontsize=8
    )
    return figure
