"""compare.html, of small runs."""

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import tiles, train_small
from PIL import Image
from test_page import Parser
from test_summary import invented

from datasets.errors import UserError
from vae.compare import comparison_page, figure_row, figure_rows, names_apart

RUNS = {
    "short": {},
    "longer & faster": {"epochs": 30, "learning_rate": 1e-2},
    "larger": {"image_size": 16},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    log_dir = tmp_path_factory.mktemp("runs")
    for name, changes in RUNS.items():
        train_small(log_dir / name, **changes)
    return [log_dir / name for name in RUNS]


@pytest.fixture(scope="module")
def page(folders) -> Parser:
    return Parser(comparison_page(folders))


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_bytes())


def in_order(folders: list[Path]) -> list[Path]:
    """The first two runs, that with the best reconstructions first."""
    return sorted(folders[:2], key=lambda run: metrics_of(run)["test"]["squared_error_mean"])


def test_runs_of_one_data_set_and_size_are_a_group_and_the_best_is_first(folders, page):
    headings = [text for text in page.texts if text.startswith("small, ")]
    assert headings == ["small, 8x8", "small, 16x16"]
    first, second = (page.texts.index(heading) for heading in headings)
    assert page.texts[first + 1 : first + 3] == [run.name for run in in_order(folders)]
    assert page.texts[second + 1] == "larger"


def test_only_options_in_which_they_differ_are_shown(folders, page):
    options = [metrics_of(run)["options"] for run in in_order(folders)]
    expected = []
    for name in ("epochs", "learning_rate"):
        expected += [name, *(str(each[name]) for each in options)]
    start = page.texts.index("Options that differ") + 1
    assert page.texts[start : start + 6] == expected
    assert "beta" not in page.texts
    assert "image_size" not in page.texts  # in which the groups differ


def test_the_figures_are_the_runs_own(folders, page):
    for folder in folders:
        for name in ("squared_error", "squared_error_mean"):
            assert f"{metrics_of(folder)['test'][name]:.1f}" in page.texts


def test_the_same_test_pictures_stand_beside_each_runs_reconstructions(folders, page):
    (originals,) = tiles(page.pictures["Test pictures"], 16)  # those of the last group
    assert len(originals) == 8
    for folder in folders[:2]:
        grid = np.asarray(Image.open(folder / "reconstructions.png"))
        shown = page.pictures[f"Reconstructions of the test pictures by {folder.name}"]
        assert np.array_equal(tiles(shown)[0], tiles(grid)[1])
        grid = np.asarray(Image.open(folder / "samples.png"))
        shown = page.pictures[f"New pictures by {folder.name}"]
        assert np.array_equal(tiles(shown), tiles(grid)[:2])


def test_the_page_needs_nothing_but_itself(folders):
    text = comparison_page(folders)
    addresses = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert addresses
    for address in addresses:
        head, _, content = address.partition("base64,")
        assert head == "data:image/png;"
        Image.open(io.BytesIO(base64.b64decode(content))).verify()


@pytest.mark.parametrize(
    ("name", "values", "best"),
    [
        ("error (lower is better)", [2.0, 1.0, None, 1.0], {1, 3}),
        ("recall, % (higher)", [2.0, 1.0], {0}),
        ("recall, % (higher)", [1.0, 1.0], set()),
        ("KL divergence, nats", [2.0, 1.0], set()),
    ],
)
def test_the_best_figures_of_a_line_are_told(name, values, best):
    assert figure_row(name, values).best == best


def test_real_pictures_and_pcas_are_shown_for_comparison_and_never_the_best():
    kinds = figure_rows([invented(), invented(real__frechet=1.0, pca__frechet__samples=2.0)])
    yardsticks = [kind for kind in kinds if kind.startswith("For comparison")]
    assert yardsticks == ["For comparison: real pictures", "For comparison: drawn with PCA"]
    assert not any(row.best for kind in yardsticks for row in kinds[kind])


def test_runs_of_the_same_name_are_told_apart_by_their_folders(tmp_path):
    one, other, third = tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "c"
    names = names_apart([one, other, third])
    assert names == {one: str(one), other: str(other), third: "c"}


def test_a_run_that_has_not_ended_or_is_of_an_earlier_version_is_named(folders, tmp_path):
    with pytest.raises(UserError, match=r"nowhere has no metrics\.json: a run that has ended"):
        comparison_page([tmp_path / "nowhere"])
    old = shutil.copytree(folders[0], tmp_path / "old")
    metrics = metrics_of(old)
    del metrics["mean_picture"]
    (old / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(UserError, match=r"earlier version: .* vae_training.py --resume .*old"):
        comparison_page([old])


def test_the_best_is_first_and_has_its_own_figures_in_whatever_order_runs_are_given(folders):
    runs = in_order(folders)
    errors = [f"{metrics_of(run)['test']['squared_error_mean']:.1f}" for run in runs]
    for given in (folders, folders[::-1]):
        texts = Parser(comparison_page(given)).texts
        start = texts.index("small, 8x8") + 1
        assert texts[start : start + 2] == [run.name for run in runs]
        start = texts.index("squared error, z the mean (lower is better)", start) + 1
        assert texts[start : start + 2] == errors
