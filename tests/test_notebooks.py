"""Every notebook runs from top to bottom, and says the same as its text form."""

import pathlib

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def sources(notebook):
    return [(cell.cell_type, cell.source.strip()) for cell in notebook.cells]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")  # the kernel's own libraries
def test_notebook_runs(path, monkeypatch):
    monkeypatch.delenv("MPLBACKEND")  # the kernel chooses its own, and shows its figures
    notebook = nbformat.read(path, as_version=4)
    assert sources(notebook) == sources(jupytext.read(path.with_suffix(".py")))
    kept = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in kept), "the stored notebook has no figure"
    assert not any(output.output_type == "error" for output in kept)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    fresh = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    figures = [output for output in fresh if "image/png" in output.get("data", {})]
    assert len(figures) == len([output for output in kept if "image/png" in output.get("data", {})])
    assert not any(output.output_type == "stream" and output.name == "stderr" for output in fresh)


def test_there_is_a_notebook():
    assert "01_quickstart" in [path.stem for path in NOTEBOOKS]
