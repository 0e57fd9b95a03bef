"""The command `odljax`: list the applications, train one, look at the installation."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["APPLICATIONS", "main"]

APPLICATIONS: dict[str, str] = {"denoise": "odljax.applications.denoise"}
"""Name to module. A module has `SUMMARY: str` and `main(steps, methods, seed, out, resume) -> int`, which returns 130
when it was interrupted and can go on; None for `steps` or `methods` means its own. It may name its `METHODS`."""

_INTERRUPTED = 130
_DEMO = {
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "orbax": "orbax-checkpoint",
    "rich": "rich",
}
_CORE = ("jax", "jaxlib", "optax", "flax", "chex", "jaxtyping", "numpy")
_HOW = "in the checkout of odljax: pip install '.[demo]'"
_GIB = 1 << 30


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status of the command `odljax`.

    0: done; 1: a check failed or an extra is missing; 2: the arguments are wrong; 130: interrupted by Ctrl-C.

    Args:
        arguments: The words after `odljax`. None: those of the process.

    Raises:
        SystemExit: For `--help` and `--version` (0) and for wrong arguments (2).

    Example:
        >>> from odljax.cli import main
        >>> main([])
        usage: odljax [-h] [--version] {list,train,doctor} ...
        2
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_usage()
        return 2
    return options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="odljax", description="Differentiate through the solution of an inner problem."
    )
    parser.add_argument("--version", action="version", version=f"odljax {_version('odljax')}")
    commands = parser.add_subparsers(dest="command")

    listing = commands.add_parser("list", help="name the applications")
    listing.set_defaults(run=_list)

    training = commands.add_parser("train", help="train the models of an application and show what they do")
    training.add_argument("name", metavar="NAME", help="an application, as odljax list names them")
    training.add_argument("--steps", type=_positive, metavar="N", help="outer steps (default: the application's own)")
    training.add_argument("--method", action="append", metavar="NAME", help="train this one only; may be repeated")
    training.add_argument("--seed", type=_seed, default=0, metavar="S", help="of all that is random (default: 0)")
    training.add_argument("--out", type=Path, metavar="DIR", help="results and checkpoints (default: runs/NAME)")
    training.add_argument("--resume", action="store_true", help="continue the interrupted run in DIR")
    training.set_defaults(run=_train, refuse=training.error)

    doctor = commands.add_parser("doctor", help="print versions, devices and precision, and check a derivative")
    doctor.set_defaults(run=_doctor)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is needed; {text!r} came")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"a whole number from 0 to 2^32 - 1 is needed; {text!r} came")
    return int(text)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _extra_of(error: ImportError) -> str | None:
    """The package of the demo extra whose absence the error reports; None for any other error."""
    return _DEMO.get((error.name or "").partition(".")[0])


def _list(options: argparse.Namespace) -> int:
    width = max(map(len, APPLICATIONS))
    for name, module in APPLICATIONS.items():
        try:
            summary = importlib.import_module(module).SUMMARY
        except ImportError as error:
            if (extra := _extra_of(error)) is None:
                raise
            summary = f"(needs {extra}; {_HOW})"
        print(f"{name:{width}}  {summary}")
    return 0


def _train(options: argparse.Namespace) -> int:
    name = options.name
    if name not in APPLICATIONS:
        options.refuse(f"unknown application {name!r}; the known ones: {', '.join(APPLICATIONS)}")
    out = options.out or Path("runs") / name
    if out.exists() and not out.is_dir():
        options.refuse(f"--out must be a directory; {out} is a file")
    if options.resume and not out.is_dir():
        options.refuse(f"--resume needs the directory of an interrupted run; {out} does not exist")
    try:
        module = importlib.import_module(APPLICATIONS[name])
        methods = None if options.method is None else list(dict.fromkeys(options.method))
        known = getattr(module, "METHODS", None)
        if unknown := [method for method in methods or [] if known is not None and method not in known]:
            options.refuse(f"unknown method {unknown[0]!r} of {name}; the known ones: {', '.join(known or ())}")
        status = module.main(steps=options.steps, methods=methods, seed=options.seed, out=out, resume=options.resume)
    except ImportError as error:
        if (extra := _extra_of(error)) is None:
            raise
        print(f"odljax train {name} needs {extra}; {_HOW}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        status = _INTERRUPTED
    if status == _INTERRUPTED:
        again = _words_to_resume(options, out)
        print(f"\nInterrupted. The checkpoints are in {out}; to go on from there:\n  {again}", file=sys.stderr)
    return status


def _words_to_resume(options: argparse.Namespace, out: Path) -> str:
    words = ["odljax", "train", options.name]
    words += [] if options.steps is None else ["--steps", str(options.steps)]
    words += [word for method in options.method or [] for word in ("--method", method)]
    words += ["--seed", str(options.seed)] * (options.seed != 0)
    return shlex.join([*words, "--out", str(out), "--resume"])


def _doctor(options: argparse.Namespace) -> int:
    import jax
    import jax.numpy as jnp

    lines: list[tuple[str, Any]] = [("odljax", _version("odljax")), ("python", platform.python_version())]
    lines += [(package, _version(package)) for package in (*_CORE, *_DEMO.values())]
    lines += [("platform", f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores")]
    try:
        lines += [(f"device {device.id}", _describe_device(device)) for device in jax.devices()]
        lines += [("default device", device) for device in jnp.zeros(()).devices()]
    except RuntimeError as error:
        lines += [("devices", f"none: {error}")]
    enabled = jax.config.read("jax_enable_x64")
    how = "off with JAX_ENABLE_X64=0" if enabled else "on with JAX_ENABLE_X64=1"
    lines += [("float64", f"{'on' if enabled else 'off'} (switch {how} or jax.config.update('jax_enable_x64', ...))")]
    healthy, verdict = _self_check()
    lines += [("self-check", verdict)]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:{width}}  {value}")
    return 0 if healthy else 1


def _describe_device(device: Any) -> str:
    try:
        memory = (device.memory_stats() or {}).get("bytes_limit")
    except Exception:  # a backend that does not count its memory says so in its own way
        memory = None
    size = f"{memory / _GIB:.1f} GiB" if memory else "unknown"
    return f"{device.platform}, kind {device.device_kind}, memory {size}"


def _self_check() -> tuple[bool, str]:
    """Whether the implicit derivative of argmin_x theta x^2 / 2 - x, which is 1 / theta, is -1 / theta^2; in words."""
    try:
        import jax

        import odljax as odl

        def solution(theta: jax.Array) -> jax.Array:
            inner = odl.gradient_descent(lambda x, theta: 0.5 * theta * x**2 - x, step_size=0.4)
            return odl.implicit(odl.until_converged(inner, tol=1e-6, max_steps=100))(0.0, theta).x

        derivative = float(jax.jit(jax.grad(solution))(2.0))
    except Exception as error:  # whatever is wrong with the installation is what this command reports
        return False, f"failed: {type(error).__name__}: {error}"
    healthy = abs(derivative + 0.25) < 1e-4
    return healthy, f"{'passed' if healthy else 'failed'}: an implicit derivative is {derivative:.6f}, exactly -0.25"
