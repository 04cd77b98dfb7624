"""The notebook: committed with its outputs, and runs from top to bottom."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "experiments.ipynb", as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_committed_outputs_are_of_synthetic_flowers(notebook):
    assert 'DATASET = "synthetic"' in code_cells(notebook)[0].source


def test_the_committed_notebook_was_run_once_in_order_without_errors_or_warnings(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [each for each in outputs if each.output_type == "error"]
    assert not [each for each in outputs if each.get("name") == "stderr"]


def test_the_committed_notebook_shows_pictures_and_names_no_machine(notebook):
    cells = code_cells(notebook)
    pictures = [o for cell in cells for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) >= 10
    assert not re.search(r"/(home|root|work|tmp|Users)/", nbformat.writes(notebook))


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(notebook):
    first = code_cells(notebook)[0]
    assert "EPOCHS = 100" in first.source
    # The same cells with a tenth of the training.
    first.source = first.source.replace("EPOCHS = 100", "EPOCHS = 10")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    printed = "".join(
        output.text
        for cell in code_cells(notebook)
        for output in cell.outputs
        if output.output_type == "stream"
    )
    assert "65,831 parameters in all" in printed
    assert re.search(r"by hand +(\S+) +(\S+) +(\S+)\nELBOLoss +\1 +\2 +\3\n", printed)
