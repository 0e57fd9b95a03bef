"""Every public name is documented in the house form, and its example runs as printed; so does the README's."""

import ast
import doctest
import importlib
import inspect
import pathlib
import pkgutil
import subprocess
import sys

import jax
import pytest

import odljax as odl

ROOT = pathlib.Path(__file__).parents[1]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
PACKAGES = ["odljax.derivatives", "odljax.diagnostics", "odljax.hypergradients", "odljax.iterations", "odljax.linear"]
PACKAGES += [
    "odljax.networks",
    "odljax.operators",
    "odljax.problems",
    "odljax.prox",
    "odljax.sampling",
    "odljax.solvers",
    "odljax.training",
]


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


@pytest.mark.parametrize("name", sorted(OBJECTS))
def test_public_name_is_documented_and_its_example_runs(name):
    value = OBJECTS[name]
    text = inspect.getdoc(value)
    assert text, f"{name} has no docstring"
    assert text.splitlines()[0].rstrip().endswith((".", ":")) or "\n\n" in text
    if inspect.isfunction(value):
        assert "Example" in text or "Example" in (inspect.getdoc(odl.Hypergradient) or ""), name
        parameters = [p for p in inspect.signature(value).parameters if p not in ("self",)]
        if "Args:" in text:
            section = text.split("Args:")[1]
            missing = [p for p in parameters if p not in section]
            assert not missing, f"{name}: Args lacks {missing}"
    run_doctest(text, name)


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
        {"_tree"},
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
