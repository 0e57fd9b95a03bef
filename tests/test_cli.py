"""The command line, against an application that is made up here."""

import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

import odljax
from odljax import cli

ROOT = Path(__file__).parents[1]

INTERRUPTIBLE = """
import signal, sys, time, types
import jax.numpy as jnp
from odljax import cli, training

def main(steps, methods, seed, out, resume):
    trained = training.fit(
        lambda total, step, batch: (total + step.astype(jnp.float32), {"loss": total}),
        jnp.zeros((), jnp.float32),
        num_steps=steps,
        batches=lambda step: time.sleep(0 if resume else 0.02),
        checkpoint_directory=out / "one",
        resume=resume,
        log_every=1,
    )
    print(trained.num_steps, float(trained.state))
    return 130 if trained.interrupted else 0

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the tests with it ignored
sys.modules["toy"] = types.SimpleNamespace(SUMMARY="a toy", main=main)
cli.APPLICATIONS["toy"] = "toy"
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def calls(monkeypatch):
    """An application "toy" that notes how it is called, and returns what it is told to."""
    noted = []

    def main(**given):
        noted.append(given)
        if isinstance(toy.answer, BaseException):
            raise toy.answer
        return toy.answer

    toy = types.SimpleNamespace(SUMMARY="a toy", METHODS=("hodl", "plain"), main=main, answer=0)
    monkeypatch.setitem(sys.modules, "toy_application", toy)
    monkeypatch.setattr(cli, "APPLICATIONS", {"toy": "toy_application", "no": "toy_missing"})
    noted.append(toy)
    return noted


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_train_hands_the_options_on(calls, tmp_path):
    assert cli.main(["train", "toy"]) == 0
    words = "train toy --steps 7 --method plain --method hodl --method plain --seed 3 --resume --out"
    assert cli.main([*words.split(), str(tmp_path)]) == 0
    assert calls[1:] == [
        {"steps": None, "methods": None, "seed": 0, "out": Path("runs/toy"), "resume": False},
        {"steps": 7, "methods": ["plain", "hodl"], "seed": 3, "out": tmp_path, "resume": True},
    ]


def test_train_returns_the_status_of_the_application(calls):
    calls[0].answer = 1
    assert cli.main(["train", "toy"]) == 1


@pytest.mark.parametrize("answer", [130, KeyboardInterrupt()])
def test_an_interrupted_run_says_how_to_go_on(calls, capsys, answer):
    calls[0].answer = answer
    assert cli.main(["train", "toy", "--steps", "9", "--method", "hodl", "--seed", "2", "--out", "my runs"]) == 130
    err = capsys.readouterr().err
    assert "Interrupted. The checkpoints are in my runs;" in err
    assert err.endswith("\n  odljax train toy --steps 9 --method hodl --seed 2 --out 'my runs' --resume\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("train what", "odljax train: error: unknown application 'what'; the known ones: toy, no"),
        ("train toy --steps 0", "argument --steps: a whole number of at least 1 is needed; '0' came"),
        ("train toy --steps -3", "argument --steps"),
        ("train toy --steps 1.5", "argument --steps: a whole number of at least 1 is needed; '1.5' came"),
        ("train toy --seed -1", "argument --seed"),
        ("train toy --seed 4294967296", "a whole number from 0 to 2^32 - 1 is needed; '4294967296' came"),
        ("train toy --method magic", "unknown method 'magic' of toy; the known ones: hodl, plain"),
        ("train toy --resume --out no/where", "--resume needs the directory of an interrupted run; no/where does not"),
        (f"train toy --out {__file__}", "test_cli.py is a file"),
        ("train", "the following arguments are required: NAME"),
        ("tarin", "invalid choice: 'tarin'"),
    ],
)
def test_wrong_arguments_are_refused(calls, capsys, arguments, words):
    assert words in refused(capsys, *arguments.split())
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("module", "package"),
    [("skimage.data", "scikit-image"), ("orbax.checkpoint", "orbax-checkpoint"), ("rich", "rich")],
)
def test_a_missing_extra_is_one_line(calls, capsys, module, package):
    calls[0].answer = ModuleNotFoundError(f"No module named {module!r}", name=module)
    assert cli.main(["train", "toy"]) == 1
    how = "in the checkout of odljax: pip install '.[demo]'"
    assert capsys.readouterr() == ("", f"odljax train toy needs {package}; {how}\n")


def test_any_other_import_error_is_a_bug_and_stays_visible(calls):
    for error in (ModuleNotFoundError("No module named 'odd'", name="odd"), ImportError("cannot import name")):
        calls[0].answer = error
        with pytest.raises(ImportError):
            cli.main(["train", "toy"])
    with pytest.raises(ModuleNotFoundError):
        cli.main(["train", "no"])


def test_list_names_every_application(calls, capsys, monkeypatch):
    def find(name):
        if name == "toy_missing":
            raise ModuleNotFoundError("No module named 'skimage'", name="skimage")
        return calls[0]

    monkeypatch.setattr(cli.importlib, "import_module", find)
    assert cli.main(["list"]) == 0
    assert capsys.readouterr().out == (
        "toy  a toy\nno   (needs scikit-image; in the checkout of odljax: pip install '.[demo]')\n"
    )


def test_doctor_reports_versions_devices_and_precision(capsys, monkeypatch):
    version = cli.importlib.metadata.version

    def without_figures(package):
        if package == "matplotlib":
            raise cli.importlib.metadata.PackageNotFoundError
        return version(package)

    monkeypatch.setattr(cli.importlib.metadata, "version", without_figures)
    assert cli.main(["doctor"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if "device" not in line)
    assert {"odljax", "python", "jax", "jaxlib", "optax", "flax", "orbax-checkpoint", "numpy"} <= lines.keys()
    assert {"scikit-image", "scikit-learn", "rich"} <= lines.keys()
    assert lines["jax"] == jax.__version__
    assert lines["matplotlib"] == "not installed"
    assert lines["float64"].startswith("on (switch off with JAX_ENABLE_X64=0")
    assert lines["self-check"] == "passed: an implicit derivative is -0.250000, exactly -0.25"


def test_doctor_names_the_devices(capsys):
    cli.main(["doctor"])
    out = capsys.readouterr().out
    device = jax.devices()[0]
    assert re.search(rf"^device {device.id} +{device.platform}, kind {device.device_kind}, memory \S+", out, re.M)
    assert re.search(rf"^default device +{re.escape(str(device))}$", out, re.M)


def test_doctor_reports_a_broken_installation(capsys, monkeypatch):
    monkeypatch.setattr(odljax, "gradient_descent", lambda *a, **k: 1 / 0)
    assert cli.main(["doctor"]) == 1
    assert "failed: ZeroDivisionError: division by zero" in capsys.readouterr().out


def run(*command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.Popen(
        [sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_python_m_is_the_command():
    process = run("-m", "odljax", "--version")
    assert re.fullmatch(r"odljax \S.*\n", process.communicate(timeout=60)[0])
    assert process.returncode == 0


def test_ctrl_c_exits_with_130_and_the_words_it_prints_go_on(tmp_path):
    process = run("-c", INTERRUPTIBLE, "train", "toy", "--steps", "300", "--out", str(tmp_path))
    for line in process.stderr:
        if " step 4/" in line:
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    broken_at = int(out.split()[0])
    assert 4 <= broken_at < 300
    assert "Traceback" not in err
    assert f"checkpoint: {tmp_path / 'one' / str(broken_at)}" in err
    words = err.splitlines()[-1].split()
    assert words == f"odljax train toy --steps 300 --out {tmp_path} --resume".split()
    process = run("-c", INTERRUPTIBLE, *words[1:])
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.split() == ["300", str(float(sum(range(300))))]
