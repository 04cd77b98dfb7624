"""The study of latent dimensions, with invented figures and a small Flowers102."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import seeded, write_checkpoint
from matplotlib.image import imread
from PIL import Image
from scipy.io import loadmat
from torchvision.utils import save_image

from benchmarks.latent_size import (
    LARGE,
    PRESETS,
    SIZES,
    best_with,
    plot,
    plot_reconstructions,
    table,
    trials_table,
    validate,
)
from benchmarks.practical_aspects import run_folder
from vae.checkpoint import load_model
from vae.vae import VAE
from vae_training import BEST, PETALS


def invented(size: int, seed: int = 0) -> dict[str, Any]:
    """Metrics of a run: each figure is another one, and grows with the seed."""
    test = {"squared_error": 60.0 + seed, "squared_error_mean": 50.0 + seed, "kl": 40.0}
    samples = {
        "precision": {"fitted": 0.6 + seed / 10, "real": 0.7},
        "recall": {"fitted": 0.5, "real": 0.65},
        "frechet": {"fitted": 9.0},
    }
    pca = {"squared_error": 55.0, "frechet": {"samples": 12.0}}
    options = {"latent_size": size, "seed": seed}
    return {"test": test, "samples": samples, "pca": pca, "options": options, "seconds": 1800.0}


def cells(text: str) -> list[list[str]]:
    """The cells of a Markdown table, without the line below its header."""
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
    ]
    return [header, *rows]


def test_the_rows_differ_from_the_best_setting_in_the_number_of_dimensions_alone():
    small = best_with(SIZES)
    assert [options.latent_size for options in small.values()] == [*SIZES]
    for name, options in small.items():
        assert name == f"{options.latent_size} numbers"
        assert replace(options, dataset=BEST.dataset, latent_size=BEST.latent_size) == BEST


def test_the_preset_petals_is_one_of_the_trials():
    tried = [replace(options, dataset="auto") for options in (best_with(SIZES) | LARGE).values()]
    assert PETALS in tried
    assert len(set(tried)) == len(tried)


def test_the_table_has_mean_and_deviation_of_each_size_and_the_real_photographs():
    text = table({"10 numbers": [invented(10), invented(10, 1)], "64 numbers": [invented(64)]})
    header, ten, many, real = cells(text)
    assert dict(zip(header[1:], ten[1:], strict=True)) == {
        "error": "60.5 ± 0.7",
        "through the mean": "50.5 ± 0.7",
        "PCA": "55.0 ± 0.0",
        "precision": "0.65 ± 0.07",
        "recall": "0.50 ± 0.00",
        "distance": "9.0 ± 0.0",
        "PCA's": "12.0 ± 0.0",
        "KL": "40.0 ± 0.0",
    }
    assert many[:3] == ["64 numbers", "60.0", "50.0"]
    assert [cell for cell in real if cell] == ["other real photographs", "0.70", "0.65"]


@pytest.fixture
def log_dir(tmp_path) -> Path:
    """The models of two runs, of 16x16 and of 40x40 pixels."""
    for name, side in (("small", 16), ("large", 40)):
        with seeded():
            path = run_folder(tmp_path / "runs", name, 0) / "checkpoint.pt"
            write_checkpoint(path, VAE((side, side), 3, 3), beta=0.1)
    return tmp_path / "runs"


def test_validation_repeats_exactly_and_is_of_the_photographs(log_dir, data_root):
    folder = run_folder(log_dir, "small", 0)
    before = validate(folder, data_root)
    assert before["error"] > 0 < before["PCA"]
    assert 0 <= before["precision"] <= 1 >= before["recall"] >= 0
    assert validate(folder, data_root) == before
    for path in (data_root / "flowers-102" / "jpg").iterdir():
        Image.open(path).rotate(180).save(path)
    assert validate(folder, data_root) != before


def test_the_table_of_trials_says_which_are_not_below_pca(log_dir, data_root):
    results = {name: [invented(3)] for name in ("small", "large")}
    with ThreadPoolExecutor(1) as pool:
        header, *rows = cells(trials_table(results, log_dir, data_root, pool))
    for row in rows:
        found = validate(run_folder(log_dir, row[0], 0), data_root)
        named = dict(zip(header, row, strict=True))
        assert named["error"] == f"{found['error']:.1f}"
        assert found["error"] > found["PCA"]  # it was not trained
        assert named["smaller of both"] == "not below PCA"


def test_the_figure_has_curves_and_a_row_of_samples_for_each_size(tmp_path):
    results = {f"{size} numbers": [invented(size)] for size in (2, 10)}
    for name in results:
        folder = run_folder(tmp_path, name, 0)
        folder.mkdir(parents=True)
        red = torch.zeros(3, 36, 274)
        red[0] = 1
        save_image(red, folder / "samples.png")
    plot(results, tmp_path, tmp_path / "figure.png")
    pixels = imread(tmp_path / "figure.png")[..., :3]
    is_red = (pixels == (1, 0, 0)).all(axis=-1)
    rows_of_pictures = np.diff(is_red.any(axis=1).astype(int)).clip(0).sum()
    assert rows_of_pictures == 2


def test_the_figure_of_reconstructions_has_a_row_for_each_model_and_no_photographs(
    log_dir, data_root, tmp_path
):
    names = ("small", "large")
    checkpoints = {name: run_folder(log_dir, name, 0) / "checkpoint.pt" for name in names}
    for path in checkpoints.values():  # the decoder draws blue, whatever it is given
        checkpoint = torch.load(path)
        weights = checkpoint["state"]["model"]
        weights["decoder.deconv3.weight"].zero_()
        weights["decoder.deconv3.bias"].copy_(torch.tensor([-30.0, -30.0, 30.0]))
        torch.save(checkpoint, path)
        assert load_model(path).model.sample(1).amin() < 1e-9
    plot_reconstructions(checkpoints, data_root, tmp_path / "figure.png")
    pixels = imread(tmp_path / "figure.png")[..., :3]
    is_blue = (pixels == (0, 0, 1)).all(axis=-1)
    assert is_blue.mean() > 0.2
    is_grey = np.ptp(pixels, axis=-1) < 0.01  # the paper and the text
    between = (pixels[..., 2] >= pixels[..., 0]) & (pixels[..., 0] == pixels[..., 1])  # and edges
    assert (is_blue | is_grey | between).all()


def test_the_rows_of_reconstructions_are_runs_of_the_study():
    studied = {"the post", *best_with(SIZES), *LARGE}
    assert {run for _, run, _ in PRESETS} <= studied


def test_validation_looks_at_no_test_photograph(log_dir, data_root):
    folder, flowers = run_folder(log_dir, "large", 0), data_root / "flowers-102"
    before = validate(folder, data_root)
    for number in loadmat(flowers / "setid.mat")["tstid"].flatten():
        (flowers / "jpg" / f"image_{number:05d}.jpg").write_bytes(b"no picture")
    assert validate(folder, data_root) == before
