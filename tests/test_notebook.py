"""The notebook: committed with its outputs, and runs from top to bottom."""

import re
from pathlib import Path

import nbformat
import pytest
from helpers import write_photograph
from nbclient import NotebookClient

PATH = Path(__file__).parents[1] / "experiments.ipynb"


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(PATH, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(each.text for each in outputs(notebook) if each.output_type == "stream")


def number(pattern: str, text: str) -> float:
    return float(re.search(pattern.replace("#", r"(\d+\.\d+)"), text)[1])


def assert_ran_once_in_order_without_errors_or_warnings(notebook: nbformat.NotebookNode) -> None:
    # TensorBoard's cell is for a browser: it would leave a server behind.
    cells = [cell for cell in code_cells(notebook) if "%tensorboard" not in cell.source]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    assert not [each for each in outputs(notebook) if each.output_type == "error"]
    assert not [each for each in outputs(notebook) if each.get("name") == "stderr"]


def test_the_committed_outputs_are_of_synthetic_flowers(notebook):
    assert 'DATASET = "synthetic"' in code_cells(notebook)[0].source
    assert_ran_once_in_order_without_errors_or_warnings(notebook)


def test_the_committed_notebook_is_small_and_names_no_machine(notebook):
    assert PATH.stat().st_size < 1_500_000
    assert not re.search(r"/(home|root|work|tmp|Users)/", PATH.read_text(encoding="utf-8"))


def test_whatever_the_committed_notebook_displays_is_a_picture_too(notebook):
    # A widget alone, such as a progress bar's, is nothing on a page that runs no Python.
    displayed = [each.data for each in outputs(notebook) if each.output_type == "display_data"]
    assert len(displayed) == 4
    assert all("image/png" in data for data in displayed)


def test_the_loss_by_hand_is_elbo_losss(notebook):
    by_hand, by_loss = re.findall(r"^(?:by hand|ELBOLoss): *(.*)$", printed(notebook), re.M)
    assert by_hand == by_loss


def test_in_the_committed_notebook_what_the_texts_call_better_is_better(notebook):
    text = printed(notebook)
    assert number("# one layer more", text) < number("# the post's layers", text)
    assert number("# the better", text) < number("# PCA", text) < number("# the post's", text)
    assert number("distance, fitted: #", text) < number("distance, prior: #", text)


def test_it_runs_from_top_to_bottom_on_pictures_of_ones_own(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path.parent))  # the notebook leaves its runs there
    for number in range(60):
        write_photograph(tmp_path / f"{number}.png", seed=number)
    first = code_cells(notebook)[0]
    first.source, changed = re.subn(r"EPOCHS = \d+", "EPOCHS = 2", first.source)
    assert changed == 2
    first.source += f"\nDATASET = {str(tmp_path)!r}"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": PATH.parent}}).execute()
    assert_ran_once_in_order_without_errors_or_warnings(notebook)
    sliders = outputs(notebook)[-1].data
    assert "image/png" in sliders and "application/vnd.jupyter.widget-view+json" in sliders
