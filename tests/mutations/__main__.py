"""Changes single lines of the source, one at a time, and says which of them the tests notice.

Run by hand from the root of the project, ``python tests/mutations``; with ``--match hodl`` only the changes whose file,
text or tests hold the word, with ``--verify`` no test, only that each old text still stands in its file exactly once.
The work is done in a copy; the tree that is being worked on is never touched. A change counts as caught if the tests
named beside it in ``changes.toml`` pass without it and fail with it.
"""

import argparse
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
PARTS = ("src", "tests", "docs", "benchmarks", "notebooks", "README.md", "CHANGELOG.md", "pyproject.toml", "Makefile")


def listed(words):
    """(file, old text, new text, tests) of the changes that hold one of the words; of all, where none came."""
    changes = tomllib.loads((HERE / "changes.toml").read_text())
    rows = [(file, *change) for file, rows in changes.items() for change in rows]
    return [row for row in rows if not words or any(word in part for word in words for part in row)]


def misplaced(rows):
    """The changes that cannot be made: their old text stands nowhere or more than once, or the new one is no Python."""
    for file, old, new, _ in rows:
        text = (ROOT / "src" / "odljax" / file).read_text()
        if text.count(old) != 1:
            yield f"{file}: {old!r} stands there {text.count(old)} times"
            continue
        try:
            compile(text.replace(old, new), file, "exec")
        except SyntaxError as error:
            yield f"{file}: {new!r} is no Python: {error}"


def copied(folder):
    folder.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / part).exists():
            shutil.copy(ROOT / part, folder / part)
    return folder


def written(path, text, seconds):
    path.write_text(text)
    os.utime(path, (seconds, seconds))  # Python tells stale bytecode by whole seconds and sizes


def exit_code(tree, tests, limit):
    """That of pytest; None if it ran out of time."""
    # Without JAX's compilation cache: the warnings of failed solves are not for programs that are kept.
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "JAX_COMPILATION_CACHE_DIR": ""}
    file, *options = shlex.split(tests)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--no-header"]
    command += [f"tests/{file}", *options]
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return None
    return done.returncode


def verdicts(rows, tree, options):
    """A word on each change, as it is known."""
    sound = {}
    for i, (file, old, new, tests) in enumerate(rows):
        if tests not in sound:
            sound[tests] = options.trusted or exit_code(tree, tests, options.limit) == 0
        if not sound[tests]:
            yield "TESTS FAIL WITHOUT IT"
            continue
        path = tree / "src" / "odljax" / file
        text = path.read_text()
        written(path, text.replace(old, new), 1e9 + 2 * i)
        code = exit_code(tree, tests, options.limit)
        written(path, text, 1e9 + 2 * i + 1)
        yield {1: "caught", 2: "caught", 0: "SURVIVED", None: "OUT OF TIME"}.get(code, f"PYTEST SAYS {code}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--match", action="append", help="only changes that hold this word; may be repeated")
    parser.add_argument("--verify", action="store_true", help="only look whether all changes can be made")
    parser.add_argument("--trusted", action="store_true", help="do not run the tests without a change first")
    parser.add_argument("--limit", type=float, default=600, help="seconds that the tests of one change may take")
    options = parser.parse_args()
    rows = listed(options.match)
    if faults := list(misplaced(rows)):
        sys.exit("\n".join(faults))
    print(f"{len(rows)} changes in {len({file for file, *_ in rows})} files")
    if options.verify:
        return
    with tempfile.TemporaryDirectory() as folder:
        tree, caught, start = copied(pathlib.Path(folder) / "tree"), 0, time.monotonic()
        for row, verdict in zip(rows, verdicts(rows, tree, options), strict=True):
            caught += verdict == "caught"
            print(f"{time.monotonic() - start:5.0f} s  {verdict:<8}  {'  |  '.join(row)}", flush=True)
    print(f"caught {caught} of {len(rows)}")
    sys.exit(caught < len(rows))


if __name__ == "__main__":
    main()
