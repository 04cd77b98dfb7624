"""The study, with the small Flowers102 and runs of half a second."""

import json
import re
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid

from benchmarks import practical_aspects
from benchmarks.practical_aspects import POST, SETTINGS, main, plot_pictures
from datasets.preprocessing import UserError

NAMES = ("the post", "the post, 500 epochs", "beta 10", "64x64 pictures")


@pytest.fixture
def run_study(data_root, tmp_path, monkeypatch):
    """Two seeds of some settings, on the small Flowers102."""
    # Enough at this learning rate to be told apart in the table's first decimal.
    short = {name: replace(SETTINGS[name], epochs=10, learning_rate=1e-2) for name in NAMES}
    monkeypatch.setattr(practical_aspects, "SETTINGS", short)
    monkeypatch.setattr(practical_aspects, "RUNS", short)
    monkeypatch.setattr(practical_aspects, "BETAS", {0.1: "the post", 10.0: "beta 10"})
    monkeypatch.setattr(practical_aspects, "SHOWN", (5, 10))
    monkeypatch.setattr("vae.report.LOOK_EVERY", 5)
    # Another process would not know of the small Flowers102; two threads would share one generator.
    one_thread = partial(ThreadPoolExecutor, 1)
    monkeypatch.setattr(practical_aspects, "ProcessPoolExecutor", one_thread)
    return lambda: main(2, str(data_root), tmp_path / "runs", tmp_path)


def is_drawn(path: Path) -> bool:
    with Image.open(path) as figure:
        return min(figure.size) > 200 and np.asarray(figure.convert("L")).std() > 10


@pytest.mark.slow
def test_a_study_prints_its_table_draws_figures_and_trains_nothing_twice(
    run_study, tmp_path, capsys
):
    run_study()
    runs = {path: json.loads(path.read_text()) for path in tmp_path.glob("runs/*/*/metrics.json")}
    times = {path: path.stat().st_mtime_ns for path in runs}
    table = capsys.readouterr().out
    cells = [line.strip("| ").split(" | ") for line in table.splitlines() if line[:2] == "| "]
    rows = {name: row for name, *row in cells[2:]}
    assert [*rows] == [*NAMES, "PCA, 10 components"]
    assert len({row[0] for row in rows.values()}) > 2
    for name in NAMES:
        seeds = [
            runs[tmp_path / "runs" / re.sub(r"[ ,]", "-", name) / s / "metrics.json"] for s in "01"
        ]
        drawn = [run["samples"]["frechet"]["fitted"] for run in seeds]
        errors = [run["test"]["squared_error"] for run in seeds]
        for cell, values in ((0, errors), (2, drawn)):
            mean, spread = statistics.mean(values), statistics.stdev(values)
            assert rows[name][cell] == f"{mean:.1f} ± {spread:.1f}"
        assert [run["config"]["beta"] for run in seeds] == 2 * [SETTINGS[name].beta]
    assert is_drawn(tmp_path / "rate_distortion.png") and is_drawn(
        tmp_path / "flowers102_pictures.png"
    )

    run_study()
    assert times == {path: path.stat().st_mtime_ns for path in runs}
    assert capsys.readouterr().out == table[table.index("| setting") :]

    stopped, *_ = runs
    stopped.unlink()
    run_study()
    assert stopped.exists()
    practical_aspects.RUNS["beta 10"] = replace(POST, beta=9.0)
    with pytest.raises(UserError, match="trained with other options"):
        run_study()


def test_the_figure_shows_reconstructions_and_no_photographs(tmp_path):
    white, black = torch.ones(8, 3, 32, 32), torch.zeros(8, 3, 32, 32)
    with SummaryWriter(tmp_path) as writer:
        for epoch in practical_aspects.SHOWN:
            pairs = make_grid(torch.cat([white, black, white, black]))
            writer.add_image("test_pairs", pairs, epoch - 1)
            writer.add_image("samples", make_grid(white), epoch - 1)
    plot_pictures(tmp_path, tmp_path / "figure.png")
    reconstructions, *_ = pyplot.gcf().axes
    assert reconstructions.images[0].get_array().max() == 0


def test_settings_differ_and_only_the_post_is_the_posts():
    assert len(set(SETTINGS.values())) == len(SETTINGS)
    assert [name for name, options in SETTINGS.items() if options == POST] == ["the post"]
