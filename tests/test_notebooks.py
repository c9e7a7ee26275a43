"""The notebooks run from top to bottom, and are committed with what they print and draw."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("name", NOTEBOOKS)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def test_there_are_notebooks() -> None:
    assert {"bandit.ipynb", "theory.ipynb"} <= set(NOTEBOOKS)


@every_notebook
def test_it_is_committed_with_its_outputs(name: str) -> None:
    notebook = nbformat.read(FOLDER / name, as_version=4)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    kinds = {kind for cell in cells for output in cell.outputs for kind in output.get("data", {})}
    assert "image/png" in kinds
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]


@every_notebook
@pytest.mark.slow
def test_it_runs_from_top_to_bottom(name: str) -> None:
    notebook = nbformat.read(FOLDER / name, as_version=4)
    committed = [texts(cell) for cell in code_cells(notebook)]
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(FOLDER))
    printed = [texts(cell) for cell in code_cells(notebook)]
    assert [bool(text) for text in printed] == [bool(text) for text in committed]


def texts(cell: nbformat.NotebookNode) -> list[str]:
    """The kinds of what a cell has put out."""
    return [output.output_type for output in cell.outputs]
