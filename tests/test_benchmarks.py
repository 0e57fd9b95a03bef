"""The benchmarks run: the harness by its parts, each file by a smoke run whose numbers, times aside, are checked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import _harness, hyper_cleaning, hypergradient_cost, stochastic  # noqa: E402


def group(*rows):
    errors = {"error": np.array([2.0, 4.0])}
    return _harness.Group("square", "exact", rows, (jnp.array([1.0, 2.0]),), errors)


def square(traces):
    loss = traces(lambda x: jnp.sum(x**2))
    return lambda x: (loss(x), 2 * x)


def twice(traces):
    loss = traces(lambda x: jnp.sum(x**2))
    return lambda x: (loss(x), 1.01 * 2 * x + 0 * loss(x))


def absent(traces):
    raise ImportError("no module named peer")


def test_measure_reports_each_row():
    rows = [_harness.Row("once", "jax", square), _harness.Row("twice", "odljax", twice)]
    measured, skipped = _harness.measure(group(*rows, _harness.Row("gone", "peer", absent)), _harness.SMOKE)
    once, other = measured
    assert [row["traces"] for row in measured] == [1, 2]
    assert [row["floor"] for row in measured] == [True, False]
    assert once["error"] == 0
    np.testing.assert_allclose(other["error"], 0.01, rtol=1e-5)
    assert once["bytes"]["output"] >= 12
    assert skipped == [
        {
            "problem": "square",
            "derivative": "exact",
            "method": "gone",
            "library": "peer",
            "reason": "ImportError: no module named peer",
        }
    ]


def test_our_rows_must_run():
    with pytest.raises(ImportError, match="no module named peer"):
        _harness.measure(group(_harness.Row("gone", "odljax", absent)), _harness.SMOKE)


def test_pairs_put_the_floor_before_each_task():
    order = []

    def task(name, result):
        return lambda: order.append(name) or result

    pairs = _harness.in_pairs(task("A", 2.0), [task("A", 2.0), task("B", 4.0)], seconds=0.0, rounds=(2, 9))
    assert "".join(order) == "AAA" + "AAB" + "AAA" + "AAB"  # the first of each three warms up
    assert pairs == [[(2.0, 2.0)] * 2, [(2.0, 4.0)] * 2]
    assert _harness.ratios(pairs[1]) == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (1.0, "1.00"), (0.05, "0.0500"), (123.4, "123"), (2e-7, "2.0e-07")]
)
def test_significant(value, text):
    assert _harness.significant(value) == text


@pytest.mark.parametrize("kind", ["logistic", "ridge"])
def test_reference_against_finite_differences(kind):
    problem = hypergradient_cost.make_problem(kind, 40, 5, 30, 0.3)
    data, theta = problem.data, problem.theta.astype(np.float64)

    def reference(theta):
        made = hypergradient_cost.Reference(kind, data, problem.theta)
        made.weights = np.exp(theta)
        return made

    def outer(w):
        X, y = (np.asarray(part, np.float64) for part in data[2:])
        losses = np.logaddexp(0, -y * (X @ w)) if kind == "logistic" else 0.5 * (X @ w - y) ** 2
        return losses.mean()

    def difference(point):
        steps = 1e-5 * np.eye(5)
        return np.array([outer(point(theta + step)) - outer(point(theta - step)) for step in steps]) / 2e-5

    here, start = reference(theta), np.zeros(5)
    solution = here.minimiser(start)
    assert np.linalg.norm(here.gradient(solution)) < 1e-13
    exact = difference(lambda theta: reference(theta).minimiser(start))
    np.testing.assert_allclose(here.implicit(solution), exact, rtol=1e-6, atol=1e-9)
    steps = difference(lambda theta: reference(theta).descent(start, problem.step_size, 30)[-1])
    iterates = here.descent(start, problem.step_size, 30)
    np.testing.assert_allclose(here.unrolled(iterates, problem.step_size), steps, rtol=1e-6, atol=1e-9)


def test_list(capsys):
    assert command.main([]) == 0
    names = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert {"hypergradient_cost", "hyper_cleaning", "stochastic", "torch_peers"} <= names
    with pytest.raises(SystemExit):
        command.main(["no_such_benchmark"])
    assert "hypergradient_cost" in capsys.readouterr().err.split("there are: ")[1]


def smoke_run(name, out):
    """The report of a smoke run, in a process of its own: peers do not live with this suite's strict settings."""
    pytest.importorskip("matplotlib")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    run = [sys.executable, "-m", "benchmarks", name, "--smoke", "--out", str(out)]
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads((out / f"{name}.json").read_text()), done.stdout, out


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return smoke_run("hypergradient_cost", tmp_path_factory.mktemp("benchmarks"))


def test_smoke_schema(smoke):
    report, output, out = smoke
    assert report["schema"] == _harness.SCHEMA
    assert report["smoke"]
    where = report["environment"]
    assert {"platform", "device", "cores", "python", "versions", "x64", "date", "command", "commit"} <= where.keys()
    assert where["versions"]["jax"]
    for row in report["rows"]:
        for name in ("run_ms", "run_ratio", "compile_ms", "compile_ratio", "compile_processor_ratio"):
            assert row[name] > 0, (row["method"], name)
        assert row["traces"] >= 1
        assert {"temp", "output", "generated_code", "total", "peak"} == row["bytes"].keys()
    assert "x floor" in output
    for name in ("hypergradient_cost", "hypergradient_cost_ladder"):
        assert (out / f"{name}.png").stat().st_size > 10_000


def test_smoke_covers_problems_and_libraries(smoke):
    report, _, _ = smoke
    rows = {(row["problem"].split()[0], row["derivative"], row["library"]) for row in report["rows"]}
    for library in ("jax", "odljax"):
        for derivative in ("implicit", "unrolled"):
            assert ("logistic", derivative, library) in rows
            assert ("ridge", derivative, library) in rows
        assert ("ridge", "unrolled, stopping", library) in rows
    for peer in ("jaxopt", "optimistix"):
        entries = [entry for entry in report["skipped"] if entry["library"] == peer]
        if report["environment"]["versions"][peer] is None:
            assert all("ModuleNotFoundError" in entry["reason"] for entry in entries)
            assert entries
        else:
            assert ("ridge", "implicit", peer) in rows
            assert not entries


def test_smoke_gradients_are_right(smoke):
    report, _, _ = smoke
    for row in report["rows"]:
        assert row["error"] < 1e-5, (row["problem"], row["derivative"], row["library"], row["method"])
        assert row["distance_to_exact"] < 0.1
    ours = [rung for rung in report["ladder"] if rung["library"] == "odljax"]
    assert ours
    assert all(rung["error"] < 1e-5 for rung in ours)


def test_smoke_redraws(smoke, capsys):
    _, _, out = smoke
    (out / "hypergradient_cost.png").unlink()
    assert command.main(["hypergradient_cost", "--redraw", "--out", str(out)]) == 0
    assert (out / "hypergradient_cost.png").exists()
    assert "traces" in capsys.readouterr().out


# ---- beside PyTorch --------------------------------------------------------------------------------------------------


def test_torch_peers(tmp_path):
    report, output, out = smoke_run("torch_peers", tmp_path)
    ours = {(row["derivative"], row["method"]) for row in report["rows"] if row["library"] == "odljax"}
    assert ("implicit", "implicit") in ours
    assert ("unrolled", "unrolled") in ours
    for row in report["rows"]:
        assert row["error"] < 1e-5, (row["derivative"], row["library"], row["method"])
        assert row["bytes"]["total"] > 0
    for missing in report["skipped"]:
        assert missing["library"] in ("hypertorch", "torchopt", "boat")
        assert "Error" in missing["reason"]
    assert "odljax: implicit" in output
    assert (out / "torch_peers.png").stat().st_size > 10_000


# ---- data hyper-cleaning ---------------------------------------------------------------------------------------------


def test_pollution_and_f1():
    x = np.zeros((1000, 3), np.float32)
    y = (np.arange(1000) % 10).astype(np.int32)
    task = hyper_cleaning.pollute(hyper_cleaning.Images("made", (x, y), (x, y), (x, y)), 0.7)
    selected, changed = ~task.clean["selected"], ~task.clean["changed"]
    assert selected.sum() == 700
    assert not np.any(changed & ~selected)
    assert 0.85 < changed.sum() / 700 < 0.95  # a random label is the old one once in ten
    np.testing.assert_array_equal(changed, task.train["y"] != y)
    found, true = np.array([True, True, False, False]), np.array([True, False, True, False])
    assert hyper_cleaning.f1(found, true) == 0.5
    assert hyper_cleaning.f1(true, true) == 1.0
    assert hyper_cleaning.f1(np.zeros(4, bool), true) == 0.0


def test_read_idx(tmp_path):
    import gzip

    images = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    head = bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in images.shape)
    (tmp_path / "images.gz").write_bytes(gzip.compress(head + images.tobytes()))
    np.testing.assert_array_equal(hyper_cleaning.read_idx(tmp_path / "images.gz"), images)


def test_hyper_cleaning(tmp_path):
    report, output, out = smoke_run("hyper_cleaning", tmp_path)
    assert report["data"] == "scikit-learn's digits"
    ours = [row for row in report["rows"] if row["library"] == "odljax"]
    assert {row["network"] for row in ours} == {"linear", "64-6-10"}
    for row in ours:
        for score in ("accuracy", "refit", "f1_selected", "f1_changed"):
            assert 0 <= row[score] <= 1, (row["method"], score)
        assert row["run_s"] > 0
        assert row["compile_s"] > 0
        assert row["bytes"]["total"] > 0
    linear = {row["method"]: row for row in ours if row["network"] == "linear"}
    assert linear["unrolled"]["f1_changed"] > 0.8  # all samples taken for clean: 0.71
    for missing in report["skipped"]:
        assert missing["library"] == "boat"
        assert "No module named" in missing["reason"]
    assert "F1 changed" in output
    for name in ("hyper_cleaning_linear", "hyper_cleaning_network"):
        assert (out / f"{name}.png").stat().st_size > 10_000


# ---- stochastic estimators -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: stochastic.quadratics(64, 5, 4), lambda: stochastic.regression(64, 4)])
def test_stochastic_measures(make):
    """Value function and hypergradient against a solve of the very losses, and the minimum against a descent."""
    problem = make()
    inner, outer = (
        {k: jnp.asarray(v, float) for k, v in side.items()} for side in (problem.inner_data, problem.outer_data)
    )
    rng = np.random.default_rng(3)
    theta = problem.theta.astype(float) + 0.3 * rng.standard_normal(problem.theta.shape)

    @jax.jit
    def value(theta):
        slope = jax.grad(lambda x: problem.inner(x, theta, inner))

        def newton(x, _):
            return x - jnp.linalg.solve(jax.jacobian(slope)(x), slope(x)), None

        x, _ = jax.lax.scan(newton, jnp.asarray(problem.x, float), length=20)
        return problem.outer(x, theta, outer)

    found, gradient = problem.measure(theta)
    np.testing.assert_allclose(found, value(theta), rtol=1e-9)
    steps = 1e-5 * np.eye(len(theta))
    expected = np.array([value(theta + step) - value(theta - step) for step in steps]) / 2e-5
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-8)
    assert problem.minimum <= min(found, problem.measure(problem.theta.astype(float))[0])


def test_all_thirteen():
    names = [algorithm.name for algorithm in stochastic.algorithms()]
    assert len(names) == len(set(names)) == 13
    for algorithm in stochastic.algorithms():
        assert algorithm.calls(1000, 1000, 10) > 0


def test_time_to_an_accuracy():
    row = {"squared_norm": [1.0, 1e-2, None, 1e-4], "seconds": [0.0, 1.0, 2.0, 3.0]}
    assert stochastic.time_to(row, 2.0) == 0.0
    np.testing.assert_allclose(stochastic.time_to(row, 1e-1), 0.5)
    np.testing.assert_allclose(stochastic.time_to(row, 1e-2), 1.0)
    assert stochastic.time_to(row, 1e-5) is None


def test_stochastic(tmp_path):
    report, output, out = smoke_run("stochastic", tmp_path)
    ours = [row for row in report["rows"] if row["library"] == "odljax"]
    assert {row["kind"] for row in ours} == {"quadratics", "logistic regression"}
    for row in ours:
        assert len(row["passes"]) == len(row["seconds"]) == len(row["squared_norm"]) == len(row["gap"])
        assert np.all(np.isfinite(row["squared_norm"])), row["method"]
        assert row["squared_norm"][-1] < row["squared_norm"][0], row["method"]
        assert min(row["gap"]) > -1e-9
    for missing in report["skipped"]:
        assert missing["library"] == "benchmark_bilevel"
        assert "Error" in missing["reason"]
    assert "passes" in output
    for name in ("stochastic_quadratics", "stochastic_logistic"):
        assert (out / f"{name}.png").stat().st_size > 10_000


def test_choosing(tmp_path):
    """The errors are those of the methods; times are not looked at."""
    report, output, out = smoke_run("choosing", tmp_path)
    sections = {name: {row["method"]: row for row in rows} for name, rows in report["sections"].items()}
    assert sections["smooth"]["implicit, cg"]["error"] < 1e-9
    assert sections["smooth"]["one_step"]["error"] > 0.1
    assert sections["kinks"]["implicit, gmres"]["error"] < 1e-9
    assert sections["memory"]["reversible"]["kib"] < sections["memory"]["unrolled"]["kib"]
    assert sections["many_updates"]["hoag"]["steps"] < 0.1 * sections["many_updates"]["through"]["steps"]
    assert all(1.0 <= row["ratio"] <= 10.0 for row in sections["trust"].values())
    assert "unique: The inner problem" in output
    assert (out / "choosing.png").stat().st_size > 10_000


def test_sparse_adjoints(tmp_path):
    """Every row has the derivative of the closed form; the whole solves also take their steps to it."""
    report, output, out = smoke_run("sparse_adjoints", tmp_path)
    kinds = {(row["derivative"], row["library"]) for row in report["rows"]}
    assert {("adjoint", "jax"), ("adjoint", "odljax"), ("solve and adjoint", "odljax")} <= kinds
    methods = {row["method"].split(",")[0] for row in report["rows"] if row["library"] == "odljax"}
    assert methods == {"on_support", "implicit"}
    for row in report["rows"]:
        if row["library"] in ("jax", "odljax"):
            assert row["error"] < (1e-6 if row["derivative"] == "adjoint" else 1e-4), (row["problem"], row["method"])
    for missing in report["skipped"]:
        assert missing["library"] in ("jaxopt", "sparho")
    assert "on_support, restrict" in output
    assert (out / "sparse_adjoints.png").stat().st_size > 10_000


# ---- iterations ------------------------------------------------------------------------------------------------------


def test_iterations(tmp_path):
    """A fifth of the methods; loops by hand and ours compute the same."""
    report, output, out = smoke_run("iterations", tmp_path)
    assert len(report["problems"]) == 4
    for problem in report["problems"]:
        assert problem["curves"]
        for curve in problem["curves"]:
            residuals, applications = np.asarray(curve["residual"], float), np.asarray(curve["applications"])
            assert np.nanmin(residuals) < residuals[0], (problem["problem"], curve["method"])
            assert applications[0] == 0
            assert (np.diff(applications) >= 1).all()
            assert curve["ms_a_step"] > 0
    ours = [row for row in report["rows"] if row["library"] == "odljax"]
    assert len(ours) >= 3
    for row in ours:
        assert row["difference"] < 1e-12, row["method"]
        assert row["compile_ratio"] > 0
    assert "Against a loop by hand" in output
    assert (out / "iterations.png").stat().st_size > 10_000
