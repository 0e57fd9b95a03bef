"""What every benchmark shares: rows measured in turn, their report as JSON, the table.

A row is one way to compute one thing: problem x method x derivative x library. Rows that compute the same thing form a
group with a reference row, the floor. The rows of a group are timed in turn in one process, the floor before each of
them (A A, A B, A C, A A, A B, ...), and every time is also given as a ratio to the floor's time just before it, so that
a slow spell of the machine hits both sides of the ratio. The ratio is the median over the rounds; the floor's own, of
two calls of the same function, shows the noise that is left.
"""

from __future__ import annotations

import datetime
import functools
import gc
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

SCHEMA = 1
PACKAGES = ("jax", "jaxlib", "odljax", "numpy", "jaxopt", "optimistix", "lineax", "equinox")


class Traces:
    """Counts how often JAX traces the user's function: ``traces(f)`` is f, counted."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(*arguments: Any, **keywords: Any) -> Any:
            self.count += 1
            return function(*arguments, **keywords)

        return counted


@dataclass(frozen=True)
class Row:
    """One way to compute ``(value, gradient, ...)``.

    Attributes:
        method: what is run, in the words of its library.
        library: "jax" for hand-written code, "odljax", or the name of a peer.
        build: takes a ``Traces``, wraps the user's objective in it and returns a fresh, unjitted function of the
            group's arguments. A peer's row that raises is reported as skipped.
        eager: what ``build`` returns runs as it is, without JAX: a row of a PyTorch library. It has no compile time;
            its bytes come from its attribute ``memory``, a function without arguments.
    """

    method: str
    library: str
    build: Callable[[Traces], Callable[..., Any]]
    eager: bool = False


@dataclass(frozen=True)
class Group:
    """Rows that compute the same thing from the same arguments; the first is the floor.

    Attributes:
        problem: its name and sizes.
        derivative: how the solve is differentiated.
        rows: the floor first.
        arguments: what the jitted function is called with. Large data belongs here: a closed-over array would become a
            constant of the program.
        errors: names of error measures and float64 references of the gradient; each error is ``|g - r| / |r|``.
    """

    problem: str
    derivative: str
    rows: Sequence[Row]
    arguments: tuple[Any, ...]
    errors: dict[str, np.ndarray]


@dataclass(frozen=True)
class Effort:
    """How long to measure: seconds of timed calls a group within a range of rounds, and rounds of compilation.

    Without a round of compilation the times of the first one stand, which found the caches as they were.
    """

    seconds: float = 12.0
    rounds: tuple[int, int] = (7, 60)
    compile_rounds: int = 3


SMOKE = Effort(seconds=0.0, rounds=(2, 2), compile_rounds=0)


@dataclass
class Compiled:
    """A compiled row and what its compilation cost.

    Attributes:
        seconds: tracing, lowering and compiling, by the clock.
        lowering: the part before the compiler.
        processor: the same as ``seconds`` in processor time of all threads, which other processes disturb less.
    """

    call: Callable[..., Any]
    seconds: float
    lowering: float
    processor: float
    traces: int


def compile_row(row: Row, arguments: tuple[Any, ...], empty_caches: bool = True) -> Compiled:
    """Builds, traces, lowers and compiles a fresh function, with empty caches if its times are to be compared."""
    if empty_caches:
        jax.clear_caches()
        gc.collect()
    traces = Traces()
    if row.eager:
        return Compiled(row.build(traces), 0.0, 0.0, 0.0, 0)
    function = jax.jit(row.build(traces))
    begin, start = time.process_time(), time.perf_counter()
    lowered = function.lower(*arguments)
    middle = time.perf_counter()
    call = lowered.compile()
    end, finish = time.perf_counter(), time.process_time()
    return Compiled(call, end - start, middle - start, finish - begin, traces.count)


def memory(call: Any) -> dict[str, int | None]:
    """Bytes of a compiled function, arguments not counted; None where the platform does not tell."""
    analysis = call.memory_analysis()
    parts = {name: getattr(analysis, f"{name}_size_in_bytes", None) for name in ("temp", "output", "generated_code")}
    known = [size for size in parts.values() if size is not None]
    return {**parts, "total": sum(known) if known else None, "peak": getattr(analysis, "peak_memory_in_bytes", None)}


def relative_error(got: Any, reference: np.ndarray) -> float:
    """``|got - reference| / |reference|`` in float64."""
    difference = np.asarray(got, np.float64) - reference
    return float(np.linalg.norm(difference) / np.linalg.norm(reference))


def reason(error: Exception) -> str:
    """The first line of an error, for the report."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def in_pairs(
    floor: Callable[[], float], tasks: Sequence[Callable[[], float]], seconds: float, rounds: tuple[int, int]
) -> list[list[tuple[float, float]]]:
    """Runs the floor before each task, task after task, round after round; returns (floor, task) pairs of each task.

    The floor runs twice and counts once: after a task that fills the caches, its first call would be slow.
    Stops when the seconds are spent, but not before the least and not after the greatest number of rounds.
    """
    results: list[list[tuple[float, float]]] = [[] for _ in tasks]
    start = time.perf_counter()
    least, greatest = rounds
    for number in range(greatest):
        if number >= least and time.perf_counter() - start > seconds:
            break
        for task, pairs in zip(tasks, results, strict=True):
            floor()
            pairs.append((floor(), task()))
    return results


def ratios(pairs: Sequence[tuple[float, float]]) -> list[float]:
    """The quartiles of second / first; the middle one is the median."""
    return [float(quartile) for quartile in np.quantile([b / a for a, b in pairs], (0.25, 0.5, 0.75))]


def compilation(floor: Sequence[Compiled], fresh: Sequence[Compiled], eager: bool) -> dict[str, float | None]:
    """What the report says of compiling a row; nothing for a row that is not compiled."""
    names = ("compile_ms", "lowering_ms", "compile_ratio", "compile_processor_ms", "compile_processor_ratio")
    if eager:
        return dict.fromkeys(names)
    _, slower, _ = ratios([(a.seconds, b.seconds) for a, b in zip(floor, fresh, strict=True)])
    processor = [min(item.processor for item in items) for items in (floor, fresh)]
    seconds = statistics.median(item.seconds for item in fresh), statistics.median(item.lowering for item in fresh)
    values = (1e3 * seconds[0], 1e3 * seconds[1], slower, 1e3 * processor[1], processor[1] / processor[0])
    return dict(zip(names, values, strict=True))


def measure(group: Group, effort: Effort) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Measures a group; returns its rows and the rows that were skipped, as JSON has them."""
    ready: list[tuple[Row, Compiled, Any]] = []
    skipped = []
    for row in group.rows:
        try:
            compiled = compile_row(row, group.arguments, empty_caches=False)
            output = jax.block_until_ready(compiled.call(*group.arguments))
        except Exception as error:
            # A missing peer, or one that cannot do this here, is reported; our own rows have to run.
            if row.library in ("jax", "odljax"):
                raise
            name = {"problem": group.problem, "derivative": group.derivative, "method": row.method}
            skipped.append({**name, "library": row.library, "reason": reason(error)})
            continue
        ready.append((row, compiled, output))

    def timed(call: Callable[..., Any]) -> float:
        start = time.perf_counter()
        jax.block_until_ready(call(*group.arguments))
        return time.perf_counter() - start

    calls = [functools.partial(timed, item.call) for _, item, _ in ready]
    runs = in_pairs(calls[0], calls, effort.seconds, effort.rounds)
    compiles: list[list[Compiled]] = [[] for _ in ready]
    for _ in range(effort.compile_rounds):
        for fresh, (row, _, _) in zip(compiles, ready, strict=True):
            fresh.append(compile_row(row, group.arguments))
    if not effort.compile_rounds:
        compiles = [[item] for _, item, _ in ready]

    rows = []
    for (row, compiled, output), pairs, fresh in zip(ready, runs, compiles, strict=True):
        low, middle, high = ratios(pairs)
        rows.append(
            {
                "problem": group.problem,
                "derivative": group.derivative,
                "method": row.method,
                "library": row.library,
                "floor": row is group.rows[0],
                "run_ms": 1e3 * statistics.median(seconds for _, seconds in pairs),
                "run_best_ms": 1e3 * min(seconds for _, seconds in pairs),
                "run_ratio": middle,
                "run_ratio_quartiles": [low, high],
                "rounds": len(pairs),
                **compilation(compiles[0], fresh, row.eager),
                "compile_rounds": effort.compile_rounds,
                "bytes": compiled.call.memory() if row.eager else memory(compiled.call),
                "traces": None if row.eager else compiled.traces,
                **{name: relative_error(output[1], reference) for name, reference in group.errors.items()},
            }
        )
    return rows, skipped


# ---- the report ------------------------------------------------------------------------------------------------------


def version(package: str) -> str | None:
    """The installed version; "source" for a package that is imported without being installed; None if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "source" if package in sys.modules else None


def checkout(variable: str) -> Path:
    """The folder of a peer that is no package: a checkout named by an environment variable, put on the import path.

    Raises:
        ImportError: the variable is not set, or names no folder.
    """
    folder = Path(os.environ.get(variable, ""))
    if not os.environ.get(variable) or not folder.is_dir():
        raise ImportError(f"set {variable} to a checkout of this peer")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return folder


def commit(folder: Path | None = None) -> str | None:
    """The git commit of a checkout, by default this one, marked if files differ from it; None outside git."""
    where = Path(__file__).parent if folder is None else folder
    status = ["git", "status", "--porcelain", "--", *(["..", ":!results"] if folder is None else ["."])]
    try:
        run = functools.partial(subprocess.run, cwd=where, capture_output=True, text=True, check=True)
        head = run(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        return head + (" (modified)" if run(status).stdout else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(arguments: Sequence[str], packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Where and with what the numbers were taken."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "machine": platform.machine(),
        "cores": cores(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
        "x64": bool(jax.config.jax_enable_x64),
        "matmul_precision": jax.config.jax_default_matmul_precision,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks", *arguments]),
        "commit": commit(),
    }


_start = time.perf_counter()


def progress(text: str) -> None:
    """One line on the error stream, so that the output stays a table."""
    print(f"[{time.perf_counter() - _start:4.0f} s] {text}", file=sys.stderr, flush=True)


def write_json(report: dict[str, Any], path: Path) -> None:
    """Writes the report, non-finite numbers as null."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        if isinstance(value, list):
            return [clean(item) for item in value]
        return None if isinstance(value, float) and not np.isfinite(value) else value

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(clean(report), indent=1, allow_nan=False) + "\n")


def significant(value: float | None, digits: int = 3) -> str:
    """A number in a few digits, without an exponent where it is of ordinary size."""
    if value is None:
        return "-"
    if value == 0 or not 1e-3 <= abs(value) < 1e6:
        return f"{value:.1e}"
    decimals = max(0, digits - 1 - int(np.floor(np.log10(abs(value)))))
    return f"{value:.{decimals}f}"


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table: by rich on a terminal that has it, else plain; piped, it is Markdown."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass
        else:
            table = Table(title=title, title_justify="left")
            for index, column in enumerate(columns):
                table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
            for row in rows:
                table.add_row(*row)
            Console().print(table)
            return
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"

    print(f"\n{title}\n")
    print(line(columns))
    print("|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|")
    for row in rows:
        print(line(row))


# Okabe and Ito's colours, told apart by every kind of colour vision; the markers repeat what they say.
LOOKS = {
    "jax": ("#000000", "s"),
    "odljax": ("#D55E00", "o"),
    "jaxopt": ("#0072B2", "^"),
    "optimistix": ("#009E73", "D"),
    "hypertorch": ("#0072B2", "^"),
    "torchopt": ("#009E73", "D"),
    "boat": ("#CC79A7", "v"),
    "benchmark_bilevel": ("#0072B2", "^"),
}


def caption(report: dict[str, Any]) -> str:
    """Where and when, for the head of a figure."""
    where = report["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
    return f"{where['platform']} ({where['device']}), {where['cores']} cores, {where['date'][:10]}; {versions}"
