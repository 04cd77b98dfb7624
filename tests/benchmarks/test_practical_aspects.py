"""The study, with the small Flowers102 and runs of half a second."""

import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import practical_aspects
from datasets.preprocessing import UserError
from vae_training import Options

NAMES = (*("the post", "the post, 500 epochs", "beta 1", "beta 10", "64x64 pictures"),)
CURVES = ("beta 3", "2 dimensions", "2 dimensions, best", "10 dimensions, best")
# Enough at this learning rate to be told apart in the table's first decimal.
SHORT = {"epochs": 10, "learning_rate": 1e-2}


@pytest.fixture
def study(data_root, tmp_path, monkeypatch) -> Path:
    """What the study left: two seeds of some settings, on the small Flowers102."""
    for part, names in (("SETTINGS", NAMES), ("CURVES", CURVES)):
        changes = {name: getattr(practical_aspects, part)[name] | SHORT for name in names}
        monkeypatch.setattr(practical_aspects, part, changes)
    monkeypatch.setattr(practical_aspects, "BETAS", (3.0,))
    monkeypatch.setattr(practical_aspects, "SIZES", (2,))
    monkeypatch.setattr(practical_aspects, "SHOWN", (5, 10))
    monkeypatch.setattr("vae.report.LOOK_EVERY", 5)
    # Another process would not know of the small Flowers102.
    monkeypatch.setattr(practical_aspects, "ProcessPoolExecutor", ThreadPoolExecutor)
    command = ["practical_aspects.py", "--seeds", "2", "--processes", "1"]
    command += ["--data-root", str(data_root), "--log-dir", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(tmp_path)])
    practical_aspects.main()
    return tmp_path


def trained(study: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in study.glob("runs/*/*/metrics.json")}


def is_drawn(path: Path) -> bool:
    with Image.open(path) as figure:
        return min(figure.size) > 200 and np.asarray(figure.convert("L")).std() > 10


@pytest.mark.slow
def test_a_study_leaves_its_table_and_figures_and_trains_nothing_twice(study):
    before = trained(study)
    assert len(before) == 2 * len(NAMES + CURVES)
    table = (study / "practical_aspects.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line[:2] == "| "][2:]
    assert [row[0] for row in rows] == [*NAMES]
    assert len({row[1] for row in rows}) > 2
    for name, error, _, fitted, _ in rows:
        folder = study / "runs" / name.replace(" ", "-").replace(",", "-")
        runs = [json.loads((folder / seed / "metrics.json").read_text()) for seed in "01"]
        values = [run["test"]["squared_error"] for run in runs]
        distances = [run["samples"]["frechet"]["fitted"] for run in runs]
        assert fitted == practical_aspects.spread(distances)
        assert error == f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
        for changed, value in practical_aspects.SETTINGS[name].items():
            assert [run["config"][changed] for run in runs] == [value, value]
    figures = ("practical_aspects", "rate_distortion", "latent_size")
    for name in (*figures, "flowers102_losses", "flowers102_pictures"):
        assert is_drawn(study / f"{name}.png")

    practical_aspects.main()
    assert trained(study) == before
    assert (study / "practical_aspects.md").read_text() == table

    practical_aspects.SETTINGS["beta 10"]["beta"] = 9.0
    with pytest.raises(ValueError, match=r"--beta 9.0 \(the run has 10.0\)"):
        practical_aspects.main()


@pytest.mark.parametrize("name", practical_aspects.SETTINGS)
def test_each_setting_is_an_experiment_and_only_the_post_is_the_posts(name):
    post = vars(Options(epochs=200))
    options = vars(Options(**{"epochs": 200} | practical_aspects.SETTINGS[name]))
    assert (options == post) == (name == "the post")


@pytest.mark.parametrize("option", ["--seeds", "--processes"])
def test_nothing_to_do_or_nobody_to_do_it_is_refused(monkeypatch, option):
    monkeypatch.setattr(sys, "argv", ["practical_aspects.py", option, "0"])
    with pytest.raises(UserError, match="1 or more"):
        practical_aspects.main()
