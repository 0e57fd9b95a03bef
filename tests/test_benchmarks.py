"""The benchmarks run: the harness by its parts, each file by a smoke run whose numbers, times aside, are checked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import _harness, hypergradient_cost  # noqa: E402


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
    assert "hypergradient_cost" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["no_such_benchmark"])
    assert "there are: hypergradient_cost" in capsys.readouterr().err


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The report of a smoke run, in a process of its own: peers do not live with this suite's strict settings."""
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("benchmarks")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    run = [sys.executable, "-m", "benchmarks", "hypergradient_cost", "--smoke", "--out", str(out)]
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "hypergradient_cost.json").read_text())
    return report, done.stdout, out


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
