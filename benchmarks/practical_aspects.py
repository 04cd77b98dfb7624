"""What each of the post's "Practical Aspects" buys: ``python -m benchmarks.practical_aspects``.

Trains Flowers102 with one change at a time from the post's setting, and with several betas, a few
seeds each; prints a table and draws figures. Stopped at any time, it goes on where it was.
"""

import io
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from matplotlib import pyplot
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator

from datasets import find_dataset
from datasets.errors import UserError
from vae.checkpoint import as_plain
from vae.command_line import check, one_line_errors
from vae.run import FREE
from vae_training import BEST, DATASETS, Options, train

POST = Options(dataset="flowers102", epochs=200)  # enough epochs to tell the settings apart
POST_500 = replace(POST, epochs=500)
FAST = replace(POST, learning_rate=1e-3)
COSINE = replace(FAST, lr_schedule="cosine")
# What --preset best is made of, without its number of epochs.
BEST_RATE = replace(POST_500, learning_rate=BEST.learning_rate)
BEST_RATE_COSINE = replace(BEST_RATE, lr_schedule=BEST.lr_schedule)
BEST_500 = replace(BEST_RATE_COSINE, augment=BEST.augment)

# The rows of the table: changes to the post's setting, one at a time, then several together.
SETTINGS = {
    "the post": POST,
    "the post, 500 epochs": POST_500,
    "Bernoulli likelihood, beta 1": replace(POST, likelihood="bernoulli", beta=1.0),
    "fitted variance (sigma), beta 1": replace(POST, likelihood="sigma", beta=1.0),
    "beta 1": replace(POST, beta=1.0),
    "beta 10": replace(POST, beta=10.0),
    "beta 10, linear warm-up": replace(POST, beta=10.0, beta_schedule="linear"),
    "linear warm-up": replace(POST, beta_schedule="linear"),
    "cyclical beta": replace(POST, beta_schedule="cyclical"),
    "batch normalisation": replace(POST, batch_norm=True),
    "augmentation": replace(POST, augment=True),
    "learning rate 1e-3": FAST,
    "learning rate 1e-3, cosine": COSINE,
    "learning rate 1e-3, cosine, augmentation": replace(COSINE, augment=True),
    "2 dimensions": replace(POST, latent_size=2),
    "20 dimensions": replace(POST, latent_size=20),
    "20 dimensions, learning rate 1e-3": replace(FAST, latent_size=20),
    "64x64 pictures": replace(POST, image_size=64),
    "learning rate 2e-3, 500 epochs": BEST_RATE,
    "learning rate 2e-3, cosine, 500 epochs": BEST_RATE_COSINE,
    "learning rate 2e-3, cosine, augmentation, 500 epochs": BEST_500,
    "--preset best": replace(BEST, dataset="flowers102"),
}

# The points of the figure of betas: the post's setting, with each of these.
POINTS = {
    "beta 0.003": replace(POST, beta=0.003),
    "beta 0.01": replace(POST, beta=0.01),
    "beta 0.03": replace(POST, beta=0.03),
    "the post": POST,
    "beta 0.3": replace(POST, beta=0.3),
    "beta 1": replace(POST, beta=1.0),
    "beta 3": replace(POST, beta=3.0),
    "beta 10": replace(POST, beta=10.0),
}

# The run whose pictures are shown, and after how many epochs: the post's 30, when it changes most,
# and the end.
PICTURED = "the post, 500 epochs"
SHOWN = (30, 50, 150, 500)

Metrics = dict[str, Any]  # what a run has in metrics.json
Results = dict[str, list[Metrics]]  # of each setting, by its name: the metrics of its seeds


# Training.


@dataclass(frozen=True)
class Job:
    """One run of the study."""

    name: str  # of its setting
    options: Options
    folder: Path


def run_folder(log_dir: Path, name: str, seed: int) -> Path:
    """Return the folder of a run."""
    return log_dir / re.sub(r"\W", "-", name) / str(seed)


def train_all(
    settings: Mapping[str, Options], seeds: int, data_root: Path, log_dir: Path, pool: Executor
) -> Results:
    """Train what is missing of each setting's seeds, and return the metrics of all."""
    jobs = []
    for seed in range(seeds):
        for name, setting in settings.items():
            options = replace(setting, data_root=data_root, seed=seed)
            jobs.append(Job(name, options, run_folder(log_dir, name, seed)))

    results: Results = {name: [] for name in settings}
    for job, metrics in zip(jobs, pool.map(train_run, jobs), strict=True):
        results[job.name].append(metrics)
    return results


def train_run(job: Job) -> Metrics:
    """Return a run's metrics; train first what is missing of it.

    ``UserError`` if its folder has a run with other options.
    """
    # Two runs of one thread each get more done on two cores than one run of two threads.
    torch.set_num_threads(1)
    path = job.folder / "metrics.json"
    if not path.exists():
        unfinished = (job.folder / "checkpoint.pt").exists()
        train(job.options, job.folder, resume=unfinished, progress=False)
        print(f"{job.folder} is trained", flush=True)
    metrics = json.loads(path.read_text())
    if not was_trained_with(job.options, metrics):
        raise UserError(f"{job.folder} was trained with other options: move it away")
    return metrics


def was_trained_with(options: Options, metrics: Metrics) -> bool:
    """Return whether a run had these options, apart from what changes nothing of its result."""
    # In JSON and back, as those of the run were.
    expected = json.loads(json.dumps(as_plain(asdict(options)), default=str))
    return all(
        name in FREE or metrics["options"].get(name) == value for name, value in expected.items()
    )


# The table.


def columns(metrics: Metrics) -> dict[str, float]:
    """Return what the table has of a run, by the names of its columns."""
    distances = metrics["samples"]["frechet"]
    return {
        "error, test": metrics["test"]["squared_error"],
        "error, training": metrics["train"]["squared_error"],
        "distance, fitted": distances["fitted"],
        "distance, prior": distances["prior"],
        "KL": metrics["test"]["kl"],
    }


def means(runs: list[Metrics]) -> dict[str, float]:
    """Return each column's mean over the seeds of a setting."""
    seeds = [columns(metrics) for metrics in runs]
    return {name: float(np.mean([seed[name] for seed in seeds])) for name in seeds[0]}


def with_deviation(values: Sequence[float], digits: int = 1) -> str:
    """Return the mean and the standard deviation over the seeds, which one seed has not."""
    text = f"{np.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.{digits}f}"
    return text


def table(results: Results) -> str:
    """Return the table in Markdown, mean and standard deviation over the seeds.

    Its last rows are what models of the first setting's size are held against: PCA with as many
    components as its latent has dimensions, the mean training picture, and real training pictures.
    """
    first_run = next(iter(results.values()))[0]
    names = columns(first_run)
    lines = [
        f"| setting | {' | '.join(names)} |",
        f"| --- |{' ---: |' * len(names)}",
    ]
    for setting, runs in results.items():
        seeds = [columns(metrics) for metrics in runs]
        cells = [with_deviation([seed[name] for seed in seeds]) for name in names]
        lines.append(f"| {setting} | {' | '.join(cells)} |")

    pca = first_run["pca"]
    error = f"{pca['squared_error']:.1f}"
    distance = f"{pca['frechet']['samples']:.1f}"
    lines.append(f"| PCA, {pca['components']} components | {error} | | {distance} | | |")
    mean_error = f"{first_run['mean_picture']['squared_error']:.1f}"
    lines.append(f"| the mean training picture | {mean_error} | | | | |")
    real_distance = f"{first_run['real']['frechet']:.1f}"
    lines.append(f"| real training photographs | | | {real_distance} | | |")
    return "\n".join(lines)


# The figures.


def plot_betas(results: dict[float, list[Metrics]], path: Path) -> None:
    """Draw error and Fréchet distances against the KL divergence, a point for each beta.

    ``results`` are the metrics of each beta's seeds.
    """
    points = [means(runs) for runs in results.values()]
    kl = [point["KL"] for point in points]
    error = [point["error, test"] for point in points]
    prior = [point["distance, prior"] for point in points]
    fitted = [point["distance, fitted"] for point in points]

    figure, (top, bottom) = pyplot.subplots(2, sharex=True, figsize=(7, 7), layout="constrained")
    top.semilogx(kl, error, "o-")
    for beta, x, y in zip(results, kl, error, strict=True):
        top.annotate(f"β = {beta:g}", (x, y), (4, 6), textcoords="offset points", rotation=40)
    top.set(xmargin=0.14, ymargin=0.2, ylabel="distortion: squared error\nper test picture")
    bottom.plot(kl, prior, "o-", label="from the prior")
    bottom.plot(kl, fitted, "o-", label="from the fitted Gaussian")
    bottom.set_ylabel("Fréchet distance of samples\nto the test pictures")
    bottom.set_xlabel("rate: KL divergence per test picture, nats")
    bottom.legend()
    figure.savefig(path)
    pyplot.close(figure)


def plot_pictures(folder: Path, epochs: Sequence[int], path: Path) -> None:
    """Draw a run's reconstructions and samples after so many epochs; no photographs.

    ``folder`` is the run's, with pictures of 32x32 in TensorBoard's events.
    """
    size = (3.5 * len(epochs), 2.6)
    figure, (top, bottom) = pyplot.subplots(
        2, len(epochs), squeeze=False, figsize=size, layout="constrained"
    )
    pairs = read_pictures(folder, "test_pairs")
    samples = read_pictures(folder, "samples")
    for column, epoch in enumerate(epochs):
        top[column].imshow(without_photographs(pairs[epoch]))
        top[column].set(xticks=[], yticks=[], title=f"reconstructions, epoch {epoch}")
        bottom[column].imshow(samples[epoch])
        bottom[column].set(xticks=[], yticks=[], title=f"samples, epoch {epoch}")
    figure.savefig(path)
    pyplot.close(figure)


def read_pictures(folder: Path, tag: str) -> dict[int, np.ndarray]:
    """Return the pictures that a run shows in TensorBoard, by how many epochs it had."""
    events = EventAccumulator(str(folder), {IMAGES: 0}).Reload()  # 0: all of them
    return {
        event.step + 1: imread(io.BytesIO(event.encoded_image_string))
        for event in events.Images(tag)
    }


def without_photographs(grid: np.ndarray) -> np.ndarray:
    """Return the second and fourth row of a grid of pairs, which are reconstructions.

    A grid is [height, width, channels]: each picture has 32 pixels, and 2 of frame around it.
    """
    second_row = grid[36:70]
    fourth_row = grid[104:138]
    return np.concatenate([second_row, fourth_row])


def main(
    seeds: int = 3,  # runs of each setting, at least two
    data_root: Path = POST.data_root,  # folder of flowers-102, downloaded to it if missing
    log_dir: Path = Path("benchmarks/runs/practical_aspects"),  # folder of all runs
    output: Path = Path("results"),  # folder of the figures
) -> None:
    """Train what is missing, then print the table and draw the figures."""
    check("--seeds", seeds, low=2)  # one has no deviation
    settings = POINTS | SETTINGS
    for name in {options.dataset for options in settings.values()}:
        find_dataset(name, data_root, DATASETS)  # downloads it once, before all run at once
    with ProcessPoolExecutor() as pool:
        results = train_all(settings, seeds, data_root, log_dir, pool)
    print(table({name: results[name] for name in SETTINGS}))
    points = {options.beta: results[name] for name, options in POINTS.items()}
    plot_betas(points, output / "rate_distortion.png")
    pictured = run_folder(log_dir, PICTURED, seed=0)
    plot_pictures(pictured, SHOWN, output / "flowers102_pictures.png")


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, prog="python -m benchmarks.practical_aspects", description=__doc__)
