"""The notebook: stored with its outputs, and runs from top to bottom.

``PYTHONPATH=. python tests/test_notebook.py`` runs it and stores its outputs anew.
"""

import re
from pathlib import Path

import nbformat
import pytest
from helpers import write_photograph
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parents[1]
PATH = ROOT / "experiments.ipynb"
WIDGET = "application/vnd.jupyter.widget-view+json"
PICTURES = {"image/jpeg", "image/png"}


def run(notebook: NotebookNode) -> None:
    """Run all cells but TensorBoard's, which is for a browser: it would leave a server behind."""
    resources = {"metadata": {"path": ROOT}}
    NotebookClient(notebook, timeout=600, record_timing=False, resources=resources).execute()


def leave_out_widgets(notebook: NotebookNode) -> None:
    """Leave out what shows nothing without Python, and has another number in each run."""
    notebook.metadata.pop("widgets", None)
    for output in outputs(notebook):
        output.get("data", {}).pop(WIDGET, None)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def printed(notebook: NotebookNode) -> str:
    return "".join(each.text for each in outputs(notebook) if each.output_type == "stream")


def displayed(notebook: NotebookNode) -> list[NotebookNode]:
    return [each.data for each in outputs(notebook) if each.output_type == "display_data"]


def number(pattern: str, text: str) -> float:
    return float(re.search(pattern.replace("#", r"(\d+\.\d+)"), text)[1])


def assert_ran_once_in_order_without_errors_or_warnings(notebook: NotebookNode) -> None:
    cells = [cell for cell in code_cells(notebook) if "%tensorboard" not in cell.source]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    assert not [each for each in outputs(notebook) if each.output_type == "error"]
    assert not [each for each in outputs(notebook) if each.get("name") == "stderr"]


@pytest.fixture(scope="module")
def stored() -> NotebookNode:
    return nbformat.read(PATH, as_version=4)


def test_the_stored_outputs_are_of_synthetic_flowers(stored):
    assert 'DATASET = "synthetic"' in code_cells(stored)[0].source
    assert_ran_once_in_order_without_errors_or_warnings(stored)


def test_the_stored_notebook_is_small_and_names_no_machine(stored):
    assert PATH.stat().st_size < 1_000_000
    assert not re.search(r"/(home|root|work|tmp|Users)/", PATH.read_text(encoding="utf-8"))


def test_whatever_is_stored_can_be_seen_on_a_page_that_runs_no_python(stored):
    for data in displayed(stored):
        bar = re.search(r"(\d+)/(\d+)$", data["text/plain"])
        assert PICTURES & data.keys() or bar[1] == bar[2]


def test_what_differs_in_each_run_is_not_stored(stored):
    assert "widgets" not in stored.metadata
    assert not [data for data in displayed(stored) if WIDGET in data]
    assert not [cell for cell in code_cells(stored) if "execution" in cell.metadata]
    assert not re.search(r" at 0x[0-9a-f]+>", str(outputs(stored)))


def test_its_parts_come_in_the_posts_order(stored):
    text = "\n".join(cell.source for cell in stored.cells if cell.cell_type == "markdown")
    headings = re.findall(r"^## (.*)$", text, re.M)
    assert headings[:6] == [
        "Data",
        "Training loop",
        "Model",
        "Layers",
        "Loss",
        "Practical aspects",
    ]
    assert headings[6] == "Results"


def test_the_loss_by_hand_is_elbo_losss(stored):
    by_hand, by_loss = re.findall(r"^(?:by hand|ELBOLoss): *(.*)$", printed(stored), re.M)
    assert by_hand == by_loss


def test_what_the_texts_call_better_is_better(stored):
    text = printed(stored)
    mean, pca, post, better = (
        number(f"error #, .* by {name}", text)
        for name in ("the mean", "PCA", "the post", "the better setting")
    )
    assert better < pca < post < mean
    assert re.findall(r"^Better than .*: (.*)$", text, re.M) == ["yes", "yes"]
    assert number("distance, fitted: #", text) < number("distance, prior: #", text)


def test_tensorboard_takes_a_free_port(stored):
    (cell,) = (cell for cell in code_cells(stored) if "%tensorboard" in cell.source)
    assert "--port 0 " in cell.source


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> tuple[NotebookNode, list[Path]]:
    """The notebook, run on 60 pictures of noise with few steps, and what it has left behind."""
    pictures, temporary = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("temporary")
    for seed in range(60):
        write_photograph(pictures / f"{seed}.png", seed=seed)
    notebook = nbformat.read(PATH, as_version=4)
    settings = code_cells(notebook)[0]
    settings.source, changed = re.subn(r"STEPS = \d+", "STEPS = 3", settings.source)
    assert changed == 4
    settings.source += f"\nDATASET = {str(pictures)!r}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        run(notebook)
    return notebook, list(temporary.iterdir())


def test_it_runs_from_top_to_bottom_on_pictures_of_ones_own(own):
    notebook, _ = own
    assert_ran_once_in_order_without_errors_or_warnings(notebook)


def test_it_leaves_nothing_behind(own):
    _, left = own
    assert left == []


def test_few_pictures_are_trained_for_more_epochs_and_shown_once(own):
    text = printed(own[0])
    training, test, shown = map(
        int, re.search(r"(\d+) training and (\d+) test pictures; \[(\d+),", text).groups()
    )
    assert training <= 64  # one step in an epoch
    assert set(re.findall(r"^Epoch: (\d+)", text, re.M)) == {"2"}
    assert shown == test < 36


def test_a_model_that_is_not_better_than_the_yardstick_is_said_to_be_so(own):
    answers = re.findall(r"^Better than (.*): NO", printed(own[0]), re.M)
    assert "PCA, 10 numbers" in answers


def test_the_sliders_have_a_picture_for_pages_without_python_too(own):
    (data,) = (data for data in displayed(own[0]) if WIDGET in data)
    assert "image/png" in data


def test_the_picture_beside_the_sliders_is_square(own):
    state = own[0].metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
    (flower,) = (each.state for each in state.values() if each.model_name == "ImageModel")
    layout = state[flower.layout.removeprefix("IPY_MODEL_")].state
    assert layout.width == layout.height == "256px"


def store() -> None:
    """Run the notebook, and store it with its outputs."""
    notebook = nbformat.read(PATH, as_version=4)
    run(notebook)
    leave_out_widgets(notebook)
    nbformat.write(notebook, PATH)


if __name__ == "__main__":
    store()
