"""What each of the post's "Practical Aspects" buys: ``python -m benchmarks.practical_aspects``.

Trains Flowers102 with one change at a time from the post's setting, and with several betas, a few
seeds each; prints a table and draws figures. Stopped at any time, it goes on where it was.
"""

import io
import json
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from matplotlib import pyplot
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datasets.preprocessing import UserError
from vae.run import FREE, one_line_errors
from vae_training import BEST, Options, train

Results = dict[str, list[dict[str, Any]]]  # what metrics.json has of each setting's seeds

POST = Options(dataset="flowers102", epochs=200)  # enough epochs to tell the settings apart
COSINE = replace(POST, learning_rate=1e-3, lr_schedule="cosine")
POST_500 = "the post, 500 epochs"
SHOWN = (30, 200, 350, 500)  # epochs of that run whose pictures are shown, as in the post
# The rows of the table: one change at a time from the post's setting
SETTINGS = {
    "the post": POST,
    POST_500: replace(POST, epochs=500),
    "Bernoulli likelihood, beta 1": replace(POST, likelihood="bernoulli", beta=1.0),
    "beta 1": replace(POST, beta=1.0),
    "beta 10": replace(POST, beta=10.0),
    "beta 10, linear warm-up": replace(POST, beta=10.0, beta_schedule="linear"),
    "linear warm-up": replace(POST, beta_schedule="linear"),
    "cyclical beta": replace(POST, beta_schedule="cyclical"),
    "batch normalisation": replace(POST, batch_norm=True),
    "augmentation": replace(POST, augment=True),
    "learning rate 1e-3": replace(POST, learning_rate=1e-3),
    "learning rate 1e-3, cosine": COSINE,
    "learning rate 1e-3, cosine, augmentation": replace(COSINE, augment=True),
    "2 dimensions": replace(POST, latent_size=2),
    "20 dimensions": replace(POST, latent_size=20),
    "64x64 pictures": replace(POST, image_size=64),
    "--preset best": replace(BEST, dataset="flowers102"),
}
# The points of the figure; the table has some of them as well
BETAS = {beta: f"beta {beta:g}" for beta in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)}
BETAS[POST.beta] = "the post"
RUNS = {name: replace(POST, beta=beta) for beta, name in BETAS.items()} | SETTINGS


def train_run(data_root: str, log_dir: Path, name: str, seed: int) -> dict[str, Any]:
    """Return a run's metrics and folder; train first what is missing of it."""
    # Two runs of one thread each get more done on two cores than one run of two threads.
    torch.set_num_threads(1)
    options = replace(RUNS[name], data_root=data_root, seed=seed)
    folder = log_dir / re.sub(r"\W", "-", name) / str(seed)
    if not (folder / "metrics.json").exists():
        train(options, folder, resume=(folder / "checkpoint.pt").exists(), progress=False)
        print(f"{folder} is trained", flush=True)
    metrics = json.loads((folder / "metrics.json").read_text())
    now = {key: value for key, value in vars(options).items() if key not in FREE}
    if not now.items() <= metrics["config"].items():
        raise UserError(f"{folder} was trained with other options: move it away")
    return metrics | {"folder": folder}


def numbers(runs: list[dict[str, Any]]) -> np.ndarray:
    """Return the table's numbers of a setting, [seeds, columns]."""
    errors = [[run[split]["squared_error"] for split in ("test", "train")] for run in runs]
    distances = [[run["samples"]["frechet"][name] for name in ("fitted", "prior")] for run in runs]
    return np.column_stack([errors, distances, [run["test"]["kl"] for run in runs]])


def table(results: Results) -> str:
    """Return the table in Markdown, mean and standard deviation over the seeds."""
    columns = "error, test | error, training | distance, fitted | distance, prior | KL"
    lines = [f"| setting | {columns} |", f"| --- |{' ---: |' * 5}"]
    for name in SETTINGS:
        seeds = numbers(results[name])
        cells = zip(seeds.mean(axis=0), seeds.std(axis=0, ddof=1), strict=True)
        row = [name, *(f"{mean:.1f} ± {spread:.1f}" for mean, spread in cells)]
        lines.append(f"| {' | '.join(row)} |")
    pca = results["the post"][0]["pca"]
    errors = f"{pca['squared_error']:.1f} | | {pca['frechet']['samples']:.1f}"
    return "\n".join([*lines, f"| PCA, 10 components | {errors} | | |"])


def plot_betas(results: Results, path: Path) -> None:
    """Draw error and Fréchet distances against the KL divergence, a point for each beta."""
    figure, (top, bottom) = pyplot.subplots(2, sharex=True, figsize=(7, 7), layout="constrained")
    points = [numbers(results[name]).mean(axis=0) for name in BETAS.values()]
    error, _, fitted, prior, kl = np.transpose(points)
    top.semilogx(kl, error, "o-")
    for beta, *point in zip(BETAS, kl, error, strict=True):
        top.annotate(f"β = {beta:g}", point, (4, 6), textcoords="offset points", rotation=40)
    top.set(xmargin=0.14, ymargin=0.2, ylabel="distortion: squared error\nper test picture")
    bottom.plot(kl, prior, "o-", label="from the prior")
    bottom.plot(kl, fitted, "o-", label="from the fitted Gaussian")
    bottom.set_ylabel("Fréchet distance of samples\nto the test pictures")
    bottom.set_xlabel("rate: KL divergence per test picture, nats")
    bottom.legend()
    figure.savefig(path)


def plot_pictures(folder: Path, path: Path) -> None:
    """Draw a run's reconstructions and samples; photographs themselves are left out."""
    figure, rows = pyplot.subplots(2, len(SHOWN), figsize=(14, 2.6), layout="constrained")
    events = EventAccumulator(str(folder), {"images": 0}).Reload()
    panels = {"test_pairs": "reconstructions", "samples": "samples"}
    for row, (tag, name) in zip(rows, panels.items(), strict=True):
        grids = {event.step + 1: event.encoded_image_string for event in events.Images(tag)}
        for axes, epoch in zip(row, SHOWN, strict=True):
            grid = imread(io.BytesIO(grids[epoch]))
            # Of a grid of pairs the first and third row, 34 pixels each, show photographs
            axes.imshow(grid[np.r_[36:70, 104:138]] if tag == "test_pairs" else grid)
            axes.set(xticks=[], yticks=[], title=f"{name}, epoch {epoch}")
    figure.savefig(path)


def main(
    seeds: int = 3,  # runs of each setting, at least two
    data_root: str = POST.data_root,  # folder of flowers-102, downloaded to it if missing
    log_dir: Path = Path("benchmarks/runs/practical_aspects"),  # folder of all runs
    output: Path = Path("results"),  # folder of the figures
) -> None:
    """Train what is missing, then print the table and draw the figures."""
    jobs = [(name, seed) for seed in range(seeds) for name in RUNS]
    with ProcessPoolExecutor() as pool:
        runs = [*pool.map(partial(train_run, data_root, log_dir), *zip(*jobs, strict=True))]
    results = {name: runs[i :: len(RUNS)] for i, name in enumerate(RUNS)}
    print(table(results))
    plot_betas(results, output / "rate_distortion.png")
    plot_pictures(results[POST_500][0]["folder"], output / "flowers102_pictures.png")


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, prog="python -m benchmarks.practical_aspects", description=__doc__)
