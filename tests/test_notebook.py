"""The notebook: committed with its outputs, and runs from top to bottom."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

PATH = Path(__file__).parents[1] / "experiments.ipynb"
FIGURES = 8


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(PATH, as_version=4)


@pytest.fixture(scope="module")
def run_again() -> nbformat.NotebookNode:
    """The same cells, run now with a tenth of the training."""
    notebook = nbformat.read(PATH, as_version=4)
    first = code_cells(notebook)[0]
    assert "EPOCHS = 100" in first.source
    first.source = first.source.replace("EPOCHS = 100", "EPOCHS = 10").replace("= 30", "= 2")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": PATH.parent}}).execute()
    return notebook


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(each.text for each in outputs(notebook) if each.output_type == "stream")


def assert_ran_in_order_without_errors_or_warnings(notebook: nbformat.NotebookNode) -> None:
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [each for each in outputs(notebook) if each.output_type == "error"]
    assert not [each for each in outputs(notebook) if each.get("name") == "stderr"]


def assert_every_figure_has_an_alternative_text(notebook: nbformat.NotebookNode) -> None:
    figures = [each for each in outputs(notebook) if "image/png" in each.get("data", {})]
    assert len(figures) == FIGURES
    # For nbconvert and for what shows text only; each figure has a text of its own.
    texts = [each.metadata["image/png"]["alt"] for each in figures]
    assert texts == [each.data["text/plain"] for each in figures]
    assert min(map(len, texts)) > 60
    assert len(set(texts)) == FIGURES


def assert_by_hand_equals_elbo_loss_and_beta_matters(notebook: nbformat.NotebookNode) -> None:
    lines = re.findall(
        r"^ *(\S+) +(by hand|ELBOLoss) *(\S+) +(\S+) +(\S+)$", printed(notebook), re.M
    )
    by_hand, by_loss = (
        {float(beta): [*map(float, numbers)] for beta, name, *numbers in lines if name == which}
        for which in ("by hand", "ELBOLoss")
    )
    assert list(by_hand) == list(by_loss) == [0.1, 1, 10]
    for beta, (kl, error, total) in by_hand.items():
        assert by_loss[beta] == pytest.approx([kl, error, total], abs=0.02)
        assert total == pytest.approx(error + beta * kl, abs=0.1)
    assert kl > 10
    assert by_hand[10][2] > 2 * by_hand[0.1][2]


def test_the_committed_outputs_are_of_synthetic_flowers(notebook):
    assert 'DATASET = "synthetic"' in code_cells(notebook)[0].source


def test_the_committed_notebook_was_run_once_in_order_without_errors_or_warnings(notebook):
    assert_ran_in_order_without_errors_or_warnings(notebook)


def test_every_committed_figure_has_an_alternative_text(notebook):
    assert_every_figure_has_an_alternative_text(notebook)


def test_the_committed_notebook_is_small_and_names_no_machine(notebook):
    assert PATH.stat().st_size < 1_500_000
    assert not re.search(r"/(home|root|work|tmp|Users)/", PATH.read_text(encoding="utf-8"))


def test_every_chart_has_labelled_axes(notebook):
    charts = [cell.source for cell in code_cells(notebook) if "plt.subplots" in cell.source]
    assert len(charts) == 2
    for source in charts:
        assert re.search(r"axis\.set\(.*xlabel=\"\w.*ylabel=\"\w", source)


def test_by_hand_equals_elbo_loss_in_the_committed_notebook(notebook):
    assert_by_hand_equals_elbo_loss_and_beta_matters(notebook)


def test_in_the_committed_notebook_the_better_setting_is_better(notebook):
    text = printed(notebook)
    names = "the post's setting", "PCA, 10 components", "the better setting"
    post, pca, better = (float(re.search(rf"^{name} +(\S+)", text, re.M)[1]) for name in names)
    assert better < pca < post
    names = "prior", "fitted", "reconstructions"
    prior, fitted, rebuilt = (
        float(re.search(rf"^  {name} +(\S+)", text, re.M)[1]) for name in names
    )
    assert rebuilt < fitted < prior
    assert int(re.search(r"The shares overlap: their sum is (\d+)%", text)[1]) > 100


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(run_again):
    assert_ran_in_order_without_errors_or_warnings(run_again)
    assert_every_figure_has_an_alternative_text(run_again)
    assert_by_hand_equals_elbo_loss_and_beta_matters(run_again)
    assert "65,831 parameters in all" in printed(run_again)
