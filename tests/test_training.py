"""The training loop: what it computes, what it keeps, and what an interruption leaves behind."""

import inspect
import io
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import odljax as odl
from odljax import training
from odljax.training import fit, latest_step, load, save

NUM_STEPS = 12
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
SGD = optax.sgd(0.05, momentum=0.9)  # optax.adam does not trace under strict dtype promotion


def initial_state():
    theta = {"w": jnp.linspace(-1, 1, 4, dtype=jnp.float32), "b": jnp.ones((), jnp.float64)}
    kept = {
        "empty": jnp.zeros((0, 3)),
        "none": None,
        "half": jnp.ones(3, jnp.bfloat16),
        "flag": jnp.array(True),
        "n": 2,
    }
    return {"theta": theta, "momentum": SGD.init(theta), "key": jax.random.key(3), "kept": kept}


def slow_batch(step):
    time.sleep(0.02)


def data():
    return jnp.asarray(np.random.default_rng(0).normal(size=(50, 4)), jnp.float32)


def update(state, step, samples):
    rows = jax.random.bits(jax.random.fold_in(state["key"], step), (8,)) % 50

    def loss(theta):
        fitted = samples[rows] @ theta["w"] + theta["b"].astype(jnp.float32)
        return jnp.mean(jnp.square(fitted - jnp.sum(samples[rows], axis=1)))

    value, gradient = jax.value_and_grad(loss)(state["theta"])
    change, momentum = SGD.update(gradient, state["momentum"])
    theta = optax.apply_updates(state["theta"], change)
    return {**state, "theta": theta, "momentum": momentum}, {"loss": value, "step": step, "even": step % 2 == 0}


def update_with_batch(state, step, samples, batch):
    return update(state, step, samples)


def run(num_steps=NUM_STEPS, step=update, **options):
    options = {"progress": None, **options}
    return fit(step, initial_state(), data(), num_steps=num_steps, **options)


def bits(tree):
    plain = jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree)
    return [(str(path), x.dtype, x.shape, np.asarray(x).tobytes()) for path, x in jax.tree.leaves_with_path(plain)]


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture(autouse=True)
def listening():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may start the tests with it ignored
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def unbroken():
    return run()


# What it computes -----------------------------------------------------------------------------------------------------


def test_is_the_plain_loop(unbroken):
    state = jax.tree.map(jnp.asarray, initial_state())
    rows = []
    for k in range(NUM_STEPS):
        state, metrics = jax.jit(update)(state, jnp.asarray(k, jnp.int32), data())
        rows.append(metrics)
    assert bits(unbroken.state) == bits(state)
    assert unbroken.status == "finished"
    assert not unbroken.interrupted
    assert unbroken.num_steps == NUM_STEPS
    assert unbroken.checkpoint is None
    for name, dtype in {"loss": np.float32, "step": np.int32, "even": np.bool_}.items():
        series = unbroken.metrics[name]
        assert isinstance(series, np.ndarray)
        assert series.dtype == dtype
        assert series.shape == (NUM_STEPS,)
        np.testing.assert_array_equal(series, np.stack([row[name] for row in rows]))


def test_traces_once_and_leaves_the_callers_arrays_alone():
    traces = []

    def counted(state, step):
        traces.append(step.dtype)
        return {"x": state["x"] + state["y"], "y": state["x"] + state["y"]}, {"loss": state["x"][0], "y": state["y"][0]}

    shared = jnp.ones(3)
    state = {"x": shared, "y": shared}
    trained = fit(counted, state, num_steps=100, progress=None)
    assert traces == [jnp.int32]
    assert shared.sum() == 3
    assert not trained.state["x"].is_deleted()
    np.testing.assert_array_equal(trained.metrics["loss"], 2.0 ** np.arange(100))


def test_batches_come_by_step():
    def add(total, step, offset, batch):
        return total + batch + offset, {"batch": batch}

    trained = fit(add, 0.0, 0.5, num_steps=4, batches=lambda step: np.asarray(step, float), progress=None)
    assert trained.state == 8
    assert trained.metrics["batch"].tolist() == [0, 1, 2, 3]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    def doomed(x, step):
        return x + 1, {"loss": jnp.where(step >= 13, jnp.nan, x), "psnr": jnp.inf}

    trained = fit(doomed, 0.0, num_steps=40, checkpoint_directory=tmp_path, checkpoint_every=10)
    assert trained.status == "non_finite"
    assert trained.num_steps == 13
    assert trained.state == 13
    assert trained.metrics["loss"].shape == (14,)
    assert np.isnan(trained.metrics["loss"][-1])
    assert trained.checkpoint == tmp_path / "10"
    assert names(tmp_path) == ["10"]
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("training: stopped, because the loss is NaN or infinite, at step 13/40; checkpoint: ")


def test_a_step_whose_new_state_is_not_finite_is_discarded(tmp_path, capsys):
    def broken(state, step, samples):
        bad = jnp.where(step == 13, jnp.nan, 0.0)
        return {"x": state["x"] + 1 + bad, "best": state["best"], "n": state["n"] + 1}, {"loss": state["x"][0]}

    start = {"x": jnp.zeros(2), "best": jnp.array([jnp.inf, jnp.nan]), "n": 0}  # best may stay as it is
    for resume in (False, True):
        trained = fit(
            broken, start, 0.0, num_steps=40, checkpoint_directory=tmp_path, checkpoint_every=10, resume=resume
        )
        assert trained.status == "non_finite"
        assert trained.num_steps == trained.state["n"] == 13
        assert trained.state["x"].tolist() == [13, 13]
        assert trained.metrics["loss"].tolist() == list(range(14))
        assert names(tmp_path) == ["10"]
        assert trained.checkpoint == tmp_path / "10"
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("training: stopped, because state['x'] is NaN or infinite, at step 13/40; checkpoint: ")


def test_metrics_cost_their_bytes():
    row, series = {name: np.array(1.5, np.float32) for name in "abcd"}, {}
    tracemalloc.start()
    try:
        for _ in range(10_000):
            training._append(series, row)
        assert tracemalloc.get_traced_memory()[0] < 5 * 4 * 10_000
    finally:
        tracemalloc.stop()
    assert {name: values.tolist() for name, values in training._series(series).items()} == dict.fromkeys(
        "abcd", [1.5] * 10_000
    )


def test_a_fresh_state_of_an_estimator_may_be_donated():
    inner = odl.gradient_descent(lambda x, theta: 0.5 * jnp.sum((x - theta) ** 2), step_size=0.5)
    solver = odl.implicit(odl.until_converged(inner, max_steps=60))
    hyper = odl.hypergradients.warm_started(solver, lambda x, theta: 0.5 * jnp.sum((x - 1) ** 2))
    theta = jnp.zeros(3)
    state = hyper.init(theta, theta)
    gradient, _, _ = jax.jit(hyper.update, donate_argnums=1)(theta, state)
    np.testing.assert_allclose(gradient, -np.ones(3), rtol=0, atol=1e-5)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.x))
    assert theta.sum() == 0


# Checkpoint and resume ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken_at", [1, 7])
def test_resuming_gives_the_bits_of_an_unbroken_run(unbroken, tmp_path, broken_at):
    first = run(broken_at, checkpoint_directory=tmp_path)
    assert first.checkpoint == tmp_path / str(broken_at)
    assert names(tmp_path) == [str(broken_at)]
    trained = run(checkpoint_directory=tmp_path, resume=True, checkpoint_every=5)
    assert bits(trained.state) == bits(unbroken.state)
    assert bits(trained.metrics) == bits(unbroken.metrics)
    assert names(tmp_path) == [str(NUM_STEPS)]


def test_a_run_that_is_done_is_returned_as_it_is(unbroken, tmp_path, capsys):
    run(checkpoint_directory=tmp_path)

    def never(state, step, samples):
        raise AssertionError

    for num_steps in (NUM_STEPS, NUM_STEPS - 5):
        trained = run(num_steps, never, checkpoint_directory=tmp_path, resume=True, progress="mine")
        assert bits(trained.state) == bits(unbroken.state)
        assert bits(trained.metrics) == bits(unbroken.metrics)
        assert trained.status == "finished"
        assert trained.num_steps == NUM_STEPS
        assert f"mine: nothing left to do at step {NUM_STEPS}/{num_steps}" in capsys.readouterr().err


def interrupt_while_tracing(state, step, samples):
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)  # the twin that a launcher hands on
    return update(state, step, samples)


@pytest.mark.parametrize("moment", ["before", "tracing", "batch", "saving"])
def test_an_interrupt_at_any_moment_leaves_a_checkpoint_to_resume(unbroken, tmp_path, monkeypatch, moment):
    before = signal.getsignal(signal.SIGINT)
    step, options, expected, original, saved = update, {}, {1}, training._step, training._save
    if moment == "before":
        monkeypatch.setattr(
            "odljax.training._step", lambda *given: (signal.raise_signal(signal.SIGINT), original(*given))[1]
        )
        expected = {0}
    elif moment == "tracing":
        step = interrupt_while_tracing
    elif moment == "batch":
        step = update_with_batch
        options = {"batches": lambda k: signal.raise_signal(signal.SIGINT) if k == 4 else None}
        expected = {5}
    else:
        options, expected = {"checkpoint_every": 3}, {3}
        monkeypatch.setattr("odljax.training._save", lambda *given: (signal.raise_signal(signal.SIGINT), saved(*given)))
    trained = run(step=step, checkpoint_directory=tmp_path, **options)
    assert trained.interrupted
    assert {trained.num_steps} == expected == {latest_step(tmp_path)}
    assert names(tmp_path) == [str(trained.num_steps)]
    assert all(len(series) == trained.num_steps for series in trained.metrics.values())
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    resumed = run(checkpoint_directory=tmp_path, resume=True)
    assert bits(resumed.state) == bits(unbroken.state)
    assert bits(resumed.metrics) == bits(unbroken.metrics)


def test_an_ignored_signal_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert run(step=interrupt_while_tracing).status == "finished"


def test_a_second_later_ctrl_c_raises(tmp_path, monkeypatch):
    monkeypatch.setattr("odljax.training._SECONDS_BETWEEN_INTERRUPTS", -1.0)
    with pytest.raises(KeyboardInterrupt):
        run(step=interrupt_while_tracing, checkpoint_directory=tmp_path)
    assert names(tmp_path) == []


def test_an_interrupt_without_a_directory_returns_the_state_and_says_so(capsys):
    trained = run(step=interrupt_while_tracing, progress="mine")
    assert trained.interrupted
    assert trained.num_steps == 1
    assert trained.checkpoint is None
    assert capsys.readouterr().err.endswith(f"mine: interrupted at step 1/{NUM_STEPS}; checkpoint: none\n")
    assert np.isfinite(trained.state["theta"]["w"]).all()


@pytest.mark.usefixtures("optimised")  # as the process that it interrupts is
def test_a_real_ctrl_c_leaves_a_checkpoint_that_resumes_to_the_same_bits(tmp_path):
    process = subprocess.Popen(
        [sys.executable, __file__, str(tmp_path)],
        env={**ENVIRONMENT, "JAX_ENABLE_X64": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if " step 5/" in line:
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    broken_at = int(out)
    assert 5 <= broken_at < 400
    assert names(tmp_path) == [str(broken_at)]
    assert f"training: interrupted at step {broken_at}/400; checkpoint: {tmp_path / str(broken_at)}" in err
    resumed = run(400, checkpoint_directory=tmp_path, resume=True)
    unbroken = run(400)
    assert bits(resumed.state) == bits(unbroken.state)
    assert bits(resumed.metrics) == bits(unbroken.metrics)


@pytest.mark.parametrize("where", ["batches", "saving"])
def test_an_exception_carries_the_last_state_and_leaves_a_checkpoint(unbroken, tmp_path, monkeypatch, where):
    def batches(step):
        if where == "batches" and step == 7:
            raise RuntimeError("no such file")

    def full(*given):
        monkeypatch.undo()
        raise RuntimeError("no space left")

    if where == "saving":
        monkeypatch.setattr("odljax.training._save", full)
    with pytest.raises(RuntimeError) as caught:
        run(7, update, checkpoint_directory=tmp_path) if where == "saving" else run(
            step=update_with_batch, batches=batches, checkpoint_directory=tmp_path
        )
    trained = caught.value.trained
    assert trained.status == "failed"
    assert trained.num_steps == 7
    assert trained.checkpoint == tmp_path / "7"
    np.testing.assert_array_equal(trained.metrics["loss"], unbroken.metrics["loss"][:7])
    assert "the state after 7 steps is the attribute trained.state" in caught.value.__notes__[0]
    assert bits(load(trained.checkpoint, initial_state())) == bits(trained.state)
    resumed = run(checkpoint_directory=tmp_path, resume=True)
    assert bits(resumed.state) == bits(unbroken.state)
    assert bits(resumed.metrics) == bits(unbroken.metrics)


def test_a_state_that_the_device_has_lost_is_not_handed_out(tmp_path):
    def fails(x):
        if x == 12:
            raise RuntimeError("the host fails")
        return x

    def step(x, k):
        return jax.pure_callback(fails, x, x) + 1, {"x": x}

    with pytest.raises(Exception, match="the host fails") as caught:
        fit(step, np.float32(0), num_steps=20, checkpoint_directory=tmp_path, checkpoint_every=5, progress=None)
    assert "the state was lost with the failed step" in caught.value.__notes__[-1]
    assert not hasattr(caught.value, "trained")
    assert names(tmp_path) == ["10"]


# Refusals -------------------------------------------------------------------------------------------------------------


def changed(**changes):
    return {**initial_state(), **changes}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (
            changed(theta={"w": jnp.zeros(4), "b": jnp.ones(())}),
            "theta/w is float32[4] in the checkpoint, float64[4] asked for",
        ),
        (
            changed(theta={"w": jnp.zeros(5, jnp.float32)}),
            "theta/b is float64[] in the checkpoint, missing asked for; theta/w is float32[4] in the",
        ),
        (changed(key=jax.random.key(0, impl="rbg")), "key is uint32[2] in the checkpoint, uint32[4] asked for"),
        (changed(kept={str(k): k for k in range(9)}), "; 8 more. Build the same model, optimiser and precision"),
    ],
)
def test_a_checkpoint_of_another_state_is_refused(tmp_path, state, words):
    run(2, checkpoint_directory=tmp_path)
    with pytest.raises(ValueError, match=re.escape(words)):
        fit(update, state, data(), num_steps=4, checkpoint_directory=tmp_path, resume=True, progress=None)


def test_resuming_refuses_other_metrics(tmp_path):
    run(2, checkpoint_directory=tmp_path)
    words = "holds, ['even bool', 'loss float32', 'step int32']; ['loss float64'] came. Resume with"
    with pytest.raises(ValueError, match=re.escape(words)):
        run(step=lambda s, k, samples: (s, {"loss": 1.0}), checkpoint_directory=tmp_path, resume=True)


def test_checkpoints_come_after_every_so_many_steps(tmp_path, monkeypatch):
    steps, kept = [], training._save
    monkeypatch.setattr(
        training, "_save", lambda who, d, tree, step, *rest: steps.append(step) or kept(who, d, tree, step, *rest)
    )
    fit(
        lambda s, k: (0.9 * s, {"loss": s}),
        1.0,
        num_steps=8,
        checkpoint_directory=tmp_path,
        checkpoint_every=3,
        progress=None,
    )
    assert steps == [3, 6, 8]


def test_missing_and_unexpected_checkpoints_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist\. Check the path"):
        run(checkpoint_directory=tmp_path / "nowhere", resume=True)
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoint\. Check the path"):
        run(checkpoint_directory=tmp_path, resume=True)
    run(2, checkpoint_directory=tmp_path)
    with pytest.raises(FileExistsError, match=r"the checkpoint of step 2 of an earlier run.*Pass resume=True"):
        run(checkpoint_directory=tmp_path)
    assert names(tmp_path) == ["2"]
    (tmp_path / "2024").mkdir()  # no checkpoint, though Orbax would count it
    assert latest_step(tmp_path) == 2
    with pytest.raises(FileExistsError, match="2024 has the name of a checkpoint and is none"):
        run(checkpoint_directory=tmp_path, resume=True)
    with pytest.raises(FileExistsError, match="2024 has the name of a checkpoint and is none"):
        save(tmp_path, {"a": jnp.ones(2)})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_steps": 0}, "fit: num_steps must be a whole number of at least 1; 0 came"),
        ({"num_steps": 2, "checkpoint_every": 0}, "fit: checkpoint_every must be a whole number"),
        ({"num_steps": 2, "log_every": -1}, "fit: log_every must be a whole number"),
        ({"num_steps": 2, "resume": True}, "resume and checkpoint_every need checkpoint_directory; None came"),
        ({"num_steps": True}, "fit: num_steps must be a whole number of at least 1; True came"),
        ({"num_steps": 2, "progress": False}, "fit: progress must be a str; a bool came. It is the name that is shown"),
        ({"num_steps": 2, "resume": "no"}, "fit: resume must be a bool; a str came."),
        ({"num_steps": 2, "batches": 8}, "fit: batches must be a function of (step); 8 came."),
        ({"num_steps": 2, "checkpoint_every": 1}, "resume and checkpoint_every need checkpoint_directory; None came"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises((ValueError, TypeError), match=re.escape(words)):
        # The function itself, without the type checks of the tests.
        inspect.unwrap(fit)(lambda x, k: (x, {}), 0.0, **{"progress": None, **options})


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (lambda x, k: x, "update must return (state, metrics), metrics a flat dict of scalars; float64[2] came"),
        (
            lambda x, k: (x, {"loss": x}),
            "metrics must be a flat dict of scalars; metrics['loss'] is float64[2]. Reduce",
        ),
        (lambda x, k: (x, {"a": {"b": 1}}), "metrics must be a flat dict of scalars; metrics['a'] is dict. Reduce"),
        (lambda x, k: (x[:1], {}), "the state; state is float64[1] returned, float64[2] given. Cast or reshape"),
        (lambda x, k: (x.astype(jnp.float32), {}), "the state; state is float32[2] returned, float64[2] given."),
        (lambda x, k: ((x, x), {}), "state is missing returned, float64[2] given; state/0 is float64[2] returned"),
    ],
)
def test_an_update_that_breaks_the_contract_is_refused(step, words):
    with pytest.raises(TypeError, match=re.escape(words)):
        fit(step, jnp.zeros(2), num_steps=2, progress=None)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (NotADirectoryError, "checkpoint_directory must be a directory that can be written to; "),
        (OSError, "checkpoint_directory must have room for the state, 1,048,600 bytes; "),
        (ModuleNotFoundError, "checkpoints need the package orbax-checkpoint; it is not installed. Install it (pip"),
    ],
)
def test_what_would_fail_after_the_last_step_is_refused_before_the_first(tmp_path, monkeypatch, error, words):
    def never(x, step):
        raise AssertionError

    directory = tmp_path / "file" / "run"
    if error is NotADirectoryError:
        (tmp_path / "file").write_text("")
    elif error is OSError:
        monkeypatch.setattr(training.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1_048_599))
    else:
        monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(error, match=re.escape(f"odljax.training.fit: {words}")):
        fit(never, jnp.zeros(3), num_steps=2, checkpoint_directory=directory, progress=None)


def test_a_state_that_is_not_made_of_arrays_is_refused():
    with pytest.raises(TypeError, match=re.escape("leaf ['f'] is a str. Close over functions and settings")):
        fit(lambda x, k: (x, {}), {"f": "relu"}, num_steps=2, progress=None)


# Progress -------------------------------------------------------------------------------------------------------------


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys):
    run(progress="hodl", log_every=4)
    out, err = capsys.readouterr()
    assert out == ""
    assert not re.search(r"[^\n -~]", err)
    lines = err.splitlines()
    assert [line.split()[2] for line in lines] == ["1/12", "4/12", "8/12", "12/12"]
    assert re.fullmatch(r"hodl  step 8/12  even 0  loss \S+  step 7  \d+ s left", lines[2])


def test_progress_is_ten_lines_by_default_and_none_where_it_is_off(capsys):
    fit(lambda x, k: (x, {}), 0.0, num_steps=100)
    assert len(capsys.readouterr().err.splitlines()) == 11  # and the first, which says that it compiled
    fit(lambda x, k: (x, {}), 0.0, num_steps=100, progress=None)
    assert capsys.readouterr() == ("", "")


def test_progress_is_a_live_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stderr", terminal)
    run(progress="hodl")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert "\x1b[" in terminal.getvalue()
    assert "compiling" in shown
    assert re.search(r"hodl .*12/12 .*loss \S+", shown)


# Saving a model -------------------------------------------------------------------------------------------------------


def test_a_saved_model_comes_back_and_is_replaced_whole(tmp_path):
    model = {"key": jax.random.split(jax.random.key(1)), "layers": (jnp.arange(3.0), [np.ones(2, np.float32)]), "n": 4}
    assert save(tmp_path, model) == tmp_path / "0"
    (tmp_path / "1.orbax-checkpoint-tmp").mkdir()  # what a crash in the middle of a save leaves
    assert latest_step(tmp_path) == 0
    assert save(tmp_path, jax.tree.map(lambda x: x, model)) == tmp_path / "1"
    assert names(tmp_path) == ["1"]
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, model))
    for like in (model, shapes):
        back = load(tmp_path, like)
        assert jax.tree.structure(back) == jax.tree.structure(model)
        assert bits(back) == bits(jax.tree.map(jnp.asarray, model))
    with pytest.raises(ValueError, match=r"step must be above 1, that of the checkpoint in .*; 1 came"):
        save(tmp_path, model, step=1)
    with pytest.raises(ValueError, match="save: step must be a whole number of at least 0; True came"):
        save(tmp_path, model, step=True)
    with pytest.raises(ValueError, match=re.escape("n is int64[] in the checkpoint, float64[] asked for")):
        load(tmp_path, {**model, "n": 4.0})
    with pytest.raises(FileNotFoundError, match=r"odljax\.training\.load: .*none does not exist"):
        load(tmp_path / "none", model)


def test_what_fit_saved_is_loaded_whole_or_in_part(tmp_path, unbroken):
    trained = run(checkpoint_directory=tmp_path)
    for where in (tmp_path, trained.checkpoint, str(trained.checkpoint)):
        assert bits(load(where, initial_state())) == bits(unbroken.state)
    theta = load(trained.checkpoint, initial_state()["theta"], part="theta")
    assert bits(theta) == bits(unbroken.state["theta"])
    assert all(isinstance(leaf, jax.Array) for leaf in theta.values())
    plain = load(trained.checkpoint)
    assert plain["theta"]["w"].tolist() == unbroken.state["theta"]["w"].tolist()
    assert plain["kept"]["empty"] is None
    trace = unbroken.state["momentum"][0].trace  # a named tuple in a tuple, stored as dicts and lists
    assert load(trained.checkpoint, part="momentum/0/trace/b") == trace["b"]
    with pytest.raises(ValueError, match=re.escape("w is float32[4] in the checkpoint, float32[3] asked for")):
        load(trained.checkpoint, {"w": jnp.zeros(3, jnp.float32), "b": 0.0}, part="theta")
    with pytest.raises(ValueError, match=r"load: part must be in .* holds .*theta/w.*; 'theta/v' came"):
        load(trained.checkpoint, part="theta/v")


@pytest.mark.parametrize("tree", [np.arange(3.0), 2.5, ()])
def test_single_leaves_and_empty_trees_are_saved_too(tmp_path, tree):
    save(tmp_path, tree)
    assert np.array_equal(load(tmp_path, tree), tree)


def test_importing_the_loop_imports_neither_orbax_nor_rich():
    code = "import sys, odljax.training; print({'orbax', 'rich', 'flax'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the tests with it ignored
    trained = run(
        400,
        update_with_batch,
        batches=slow_batch,
        checkpoint_directory=sys.argv[1],
        progress="training",
        log_every=1,
    )
    print(trained.num_steps)
    sys.exit(not trained.interrupted)
