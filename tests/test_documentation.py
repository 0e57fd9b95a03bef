"""Every public name is documented in the house form, and its example runs as printed; so does the README's."""

import ast
import doctest
import importlib
import inspect
import pathlib
import pkgutil
import re
import subprocess
import sys

import jax
import pytest

import odljax as odl

ROOT = pathlib.Path(__file__).parents[1]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
PACKAGES = [f"odljax.{module.name}" for module in pkgutil.iter_modules(odl.__path__)]
PACKAGES = [name for name in PACKAGES if hasattr(importlib.import_module(name), "__all__")]


def public_objects():
    seen = {}
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value) or inspect.isclass(value):
                seen.setdefault(f"{package}.{name}", value)
    return seen


OBJECTS = public_objects()


def run_doctest(text, name):
    runner = doctest.DocTestRunner(optionflags=FLAGS, verbose=False)
    test = doctest.DocTestParser().get_doctest(text, {}, name, None, 0)
    output = []
    # Users have neither strict promotion nor, by default, float64.
    jax.config.update("jax_enable_x64", False)
    try:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            runner.run(test, out=output.append)
    finally:
        jax.config.update("jax_enable_x64", True)
    assert runner.failures == 0, "".join(output)
    return runner.tries


def faults_of(value):
    """What the house form of a docstring lacks."""
    text = inspect.getdoc(value)
    if not text:
        return ["a docstring"]
    faults = [] if text.split("\n\n")[0].endswith(".") else ["a first sentence"]
    if inspect.isfunction(value):
        section = text.partition("\nArgs:\n")[2].split("\n\n")[0]
        parameters = list(inspect.signature(value).parameters)
        faults += [f"Args for {p}" for p in parameters if not re.search(rf"^ +\*?{p}:|^ +.*\b{p}\b.*: ", section, re.M)]
        if not any(example.want for example in doctest.DocTestParser().get_examples(text)):
            faults.append("an example that shows a result")
    elif issubclass(value, tuple):
        faults += [f"a word on {field}" for field in value._fields if not re.search(rf"\b{field}\b", text)]
    return faults


def test_what_lacks_a_part_of_its_documentation_is_noticed():
    def sound(x):
        """Returns x.

        Args:
            x: a number.

        Example:
            >>> 1 + 1
            2
        """

    assert faults_of(sound) == []
    text = inspect.getdoc(sound)
    for part, left, fault in (
        (text, "", "a docstring"),
        ("Returns x.", "Returns x", "a first sentence"),
        ("Args:", "", "Args for x"),
        ("x: a number", "y: a number", "Args for x"),
        (">>> 1 + 1", "", "an example that shows a result"),
        ("    2", "", "an example that shows a result"),
    ):
        sound.__doc__ = text.replace(part, left)
        assert faults_of(sound) == [fault]
    assert run_doctest(text, "sound") == 1
    with pytest.raises(AssertionError, match="Expected"):
        run_doctest(text.replace("1 + 1", "1 + 2"), "unsound")


@pytest.mark.parametrize("name", sorted(OBJECTS))
def test_public_name_is_documented_and_its_example_runs(name):
    value = OBJECTS[name]
    assert not (faults := faults_of(value)), f"{name} lacks {', '.join(faults)}"
    tries = run_doctest(inspect.getdoc(value), name)
    assert tries > 0 or inspect.isclass(value)


def test_every_face_lists_its_names():
    for package in [*PACKAGES, "odljax"]:
        module = importlib.import_module(package)
        assert len(set(module.__all__)) == len(module.__all__)
        assert all(hasattr(module, name) for name in module.__all__)


def test_readme_example_runs():
    assert run_doctest((ROOT / "README.md").read_text(), "README.md") > 0


def layer_of(module):
    """The layers of the house, from the ground up; imports point down only."""
    order = [
        {"_types"},
        {"_tree", "_moving"},
        {"_checks", "_support"},
        {"linear", "sampling"},
        {"operators"},
        {"iterations"},
        {"solvers"},
        {"derivatives"},
        {"prox"},
        {"_lineage"},
        {"problems", "networks"},
        {"hypergradients"},
        {"diagnostics"},
        {"training"},
        {"applications"},
        {"cli", "__main__"},
    ]
    return next((level for level, names in enumerate(order) if module in names), None)


def test_imports_point_down_only():
    source = ROOT / "src" / "odljax"
    for path in source.rglob("*.py"):
        relative = path.relative_to(source)
        own = relative.parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        assert layer_of(own) is not None, f"{relative} stands in no layer"
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or node.level == 0:
                continue
            base = list(relative.parts[: len(relative.parts) - node.level])
            names = [node.module.split(".")[0]] if node.module and not base else [a.name for a in node.names]
            targets = base[:1] or names
            for target in targets:
                level = layer_of(target)
                if target == own or level is None:
                    continue
                assert level < layer_of(own), f"{relative} imports {target}, which stands above it or beside it"


def test_the_import_brings_no_optional_package():
    heavy = ("flax", "orbax", "matplotlib", "skimage", "sklearn", "rich", "jaxtyping", "beartype", "lineax")
    code = f"import sys, odljax; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_custom_vjp_and_no_private_source_folder():
    source = ROOT / "src" / "odljax"
    assert not [p for p in source.rglob("*.py") if "custom_vjp" in p.read_text()]
    assert not [m.name for m in pkgutil.iter_modules([str(source)]) if m.name == "_src"]
