"""The study, with the small pictures and runs of half a second."""

import json
import shutil
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid

from benchmarks import practical_aspects
from benchmarks.practical_aspects import (
    PICTURED,
    POINTS,
    POST,
    POST_500,
    SETTINGS,
    SHOWN,
    main,
    plot_betas,
    plot_pictures,
    run_folder,
    table,
    train_all,
)
from datasets.errors import UserError
from vae_training import BEST, VALIDATE_EVERY

# Enough at this learning rate to be told apart in the table's first decimal.
SHORT = {
    name: replace(SETTINGS[name], dataset="small", epochs=VALIDATE_EVERY, learning_rate=1e-2)
    for name in (PICTURED, "beta 10", "64x64 pictures")
}


def train_short(log_dir: Path, settings=SHORT):
    """Train two seeds of each setting, where they are missing."""
    # Other processes would not know of the small pictures; two threads would share one generator.
    with ThreadPoolExecutor(1) as pool:
        return train_all(settings, 2, Path(), log_dir, pool)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The runs of a whole study, for tests that do not change them."""
    log_dir = tmp_path_factory.mktemp("study")
    train_short(log_dir)
    return log_dir


@pytest.fixture
def own_copy(trained, tmp_path) -> Path:
    """The same, for a test that changes them."""
    return shutil.copytree(trained, tmp_path / "study")


def read_metrics(log_dir: Path, name: str, seed: int) -> dict:
    return json.loads((run_folder(log_dir, name, seed) / "metrics.json").read_text())


def is_drawn(path: Path) -> bool:
    with Image.open(path) as figure:
        return min(figure.size) > 200 and np.asarray(figure.convert("L")).std() > 10


def test_the_table_has_mean_and_deviation_of_each_settings_seeds(trained):
    lines = table(train_short(trained)).splitlines()
    header, _, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    cells = {name: row for name, *row in rows}
    assert header[1:] == [
        "error, test",
        "error, training",
        "distance, fitted",
        "distance, prior",
        "KL",
    ]
    yardsticks = [
        "PCA, 10 components",
        "the mean training picture",
        "real training photographs",
    ]
    assert [*cells] == [*SHORT, *yardsticks]
    assert len({row[0] for row in cells.values()}) > 2
    for name in SHORT:
        runs = [read_metrics(trained, name, seed) for seed in (0, 1)]
        columns = [
            [run["test"]["squared_error"] for run in runs],
            [run["train"]["squared_error"] for run in runs],
            [run["samples"]["frechet"]["fitted"] for run in runs],
            [run["samples"]["frechet"]["prior"] for run in runs],
            [run["test"]["kl"] for run in runs],
        ]
        assert cells[name] == [
            f"{statistics.mean(seeds):.1f} ± {statistics.stdev(seeds):.1f}" for seeds in columns
        ]
    first_run = read_metrics(trained, PICTURED, 0)
    errors = [cells[name][0] for name in yardsticks]
    distances = [cells[name][2] for name in yardsticks]
    assert errors == [
        f"{first_run['pca']['squared_error']:.1f}",
        f"{first_run['mean_picture']['squared_error']:.1f}",
        "",
    ]
    assert distances == [
        f"{first_run['pca']['frechet']['samples']:.1f}",
        "",
        f"{first_run['real']['frechet']:.1f}",
    ]


def test_each_run_has_its_settings_options_and_its_seed(trained):
    for name, setting in SHORT.items():
        for seed in (0, 1):
            options = read_metrics(trained, name, seed)["options"]
            expected = {"beta": setting.beta, "image_size": setting.image_size, "seed": seed}
            assert expected.items() <= options.items()


def test_the_command_prints_the_table_draws_both_figures_and_trains_nothing_twice(
    trained, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(practical_aspects, "SETTINGS", SHORT)
    points = {name: SHORT[name] for name in (PICTURED, "beta 10")}
    monkeypatch.setattr(practical_aspects, "POINTS", points)
    monkeypatch.setattr(practical_aspects, "SHOWN", (VALIDATE_EVERY,))
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    main(2, Path(), trained, tmp_path)
    # The processes that it starts would print what they train.
    assert capfd.readouterr().out == table(train_short(trained)) + "\n"
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before
    assert is_drawn(tmp_path / "rate_distortion.png")
    assert is_drawn(tmp_path / "flowers102_pictures.png")


def test_a_run_that_was_stopped_goes_on_from_its_checkpoint(own_copy):
    without_time = {"seconds": None}
    before = read_metrics(own_copy, "beta 10", 1) | without_time
    metrics = run_folder(own_copy, "beta 10", 1) / "metrics.json"
    metrics.unlink()
    train_short(own_copy)
    assert read_metrics(own_copy, "beta 10", 1) | without_time == before


def test_a_run_with_other_options_is_refused(own_copy):
    other = SHORT | {"beta 10": replace(SHORT["beta 10"], beta=9.0)}
    with pytest.raises(UserError, match=r"beta-10.*trained with other options"):
        train_short(own_copy, other)


def test_the_figure_of_betas_has_a_point_for_each(tmp_path):
    path = tmp_path / "figure.png"
    plot_betas({0.1: [invented_metrics(20.0)], 10.0: [invented_metrics(2.0)]}, path)
    assert is_drawn(path)


def invented_metrics(kl: float) -> dict:
    return {
        "test": {"squared_error": 100 - kl, "kl": kl},
        "train": {"squared_error": 90 - kl},
        "samples": {"frechet": {"fitted": 30 + kl, "prior": 40 + kl}},
    }


def test_the_figure_shows_reconstructions_of_each_epoch_and_no_photographs(tmp_path):
    red = torch.tensor([1.0, 0, 0])[:, None, None].expand(8, 3, 32, 32)
    blue = red.flip(1)
    with SummaryWriter(tmp_path) as writer:
        for epoch in (10, 20):
            reconstructions = blue * epoch / 20
            pairs = make_grid(torch.cat([red, reconstructions, red, reconstructions]))
            writer.add_image("test_pairs", pairs, epoch - 1)
            writer.add_image("samples", make_grid(blue), epoch - 1)
    plot_pictures(tmp_path, (10, 20), tmp_path / "figure.png")
    pixels = {tuple(pixel) for pixel in imread(tmp_path / "figure.png")[..., :3].reshape(-1, 3)}
    assert not any(r > 0.9 and g < 0.1 for r, g, _ in pixels)
    assert (0, 0, 1) in pixels
    assert any(r == g == 0 and abs(b - 0.5) < 0.01 for r, g, b in pixels)


def test_the_run_whose_pictures_are_shown_has_looked_at_them():
    assert SETTINGS[PICTURED] == POST_500
    assert all(epoch % VALIDATE_EVERY == 0 for epoch in SHOWN)
    assert max(SHOWN) == POST_500.epochs


def test_settings_differ_and_only_the_post_is_the_posts():
    assert len(set(SETTINGS.values())) == len(SETTINGS)
    assert [name for name, options in SETTINGS.items() if options == POST] == ["the post"]


def test_the_rows_of_2e_3_lead_from_the_posts_setting_to_the_best_but_for_its_epochs():
    rows = [options for name, options in SETTINGS.items() if "2e-3" in name]
    changed = [
        {name for name, value in asdict(options).items() if value != asdict(POST_500)[name]}
        for options in rows
    ]
    assert changed == [
        {"learning_rate"},
        {"learning_rate", "lr_schedule"},
        {"learning_rate", "lr_schedule", "augment"},
    ]
    assert replace(rows[-1], epochs=BEST.epochs) == SETTINGS["--preset best"]


def test_the_points_differ_in_beta_alone_and_rise():
    betas = [options.beta for options in POINTS.values()]
    assert betas == sorted(set(betas))
    assert all(replace(options, beta=POST.beta) == POST for options in POINTS.values())


def test_settings_and_points_of_one_name_are_one_run():
    for name in POINTS.keys() & SETTINGS.keys():
        assert POINTS[name] == SETTINGS[name]
