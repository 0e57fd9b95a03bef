"""``python -m benchmarks NAME``: runs one benchmark; without a name, or with ``list``, lists them."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent


def names() -> list[str]:
    """The benchmarks: the modules of this package without a leading underscore."""
    return sorted(module.name for module in pkgutil.iter_modules([str(HERE)]) if not module.name.startswith("_"))


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", nargs="?", default="list", help="a benchmark, or list")
    parser.add_argument("--smoke", action="store_true", help="small sizes, two rounds: does it run?")
    parser.add_argument(
        "--redraw", action="store_true", help="table and figures from the JSON in --out; measures nothing"
    )
    parser.add_argument("--out", type=Path, help="where JSON and figures go (default: benchmarks/results; smoke: runs)")
    options = parser.parse_args(arguments)
    if options.name == "list":
        for name in names():
            doc = importlib.import_module(f"{__package__}.{name}").__doc__ or ""
            print(f"{name:24} {doc.splitlines()[0]}")
        return 0
    if options.name not in names():
        parser.error(f"no benchmark is called {options.name!r}; there are: {', '.join(names())}")
    # A smoke run must not overwrite the numbers of record.
    out = options.out or (Path("runs") / "benchmarks" if options.smoke else HERE / "results")

    import jax

    from . import _harness

    benchmark = importlib.import_module(f"{__package__}.{options.name}")
    path = out / f"{options.name}.json"
    if options.redraw:
        report = json.loads(path.read_text())
    else:
        # The matrix units of GPUs and TPUs round float32 products to fewer bits unless told otherwise: accuracy is
        # compared in float32 proper. A compilation cache on disk would answer instead of the compiler.
        jax.config.update("jax_default_matmul_precision", "highest")
        jax.config.update("jax_enable_compilation_cache", False)
        if options.smoke:
            jax.config.update("jax_disable_most_optimizations", True)
        report = {
            "schema": _harness.SCHEMA,
            "benchmark": options.name,
            "smoke": options.smoke,
            "environment": _harness.environment(arguments, getattr(benchmark, "PACKAGES", _harness.PACKAGES)),
            **benchmark.run(options.smoke),
        }
        _harness.write_json(report, path)
        report = json.loads(path.read_text())
    benchmark.table(report)
    for name, figure in benchmark.figures(report).items():
        figure.savefig(out / f"{name}.png", dpi=150)
    print(f"\nwrote {path} and its figures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
