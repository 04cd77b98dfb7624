"""What each of the post's "Practical Aspects" buys: ``python benchmarks/practical_aspects.py``.

Trains one change at a time from the post's setting, several betas, and several latent sizes, a few
seeds each, and writes a table and figures. Runs that are finished are not trained again, so it can
be stopped at any time.
"""

import io
import json
import os
import re
import shlex
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import tyro  # noqa: E402

from datasets.preprocessing import UserError  # noqa: E402
from vae.run import check_same_experiment, one_line_errors  # noqa: E402
from vae_training import BEST, Options, train  # noqa: E402

Runs = list[dict[str, Any]]  # the metrics of a setting's seeds

EPOCHS = 200  # of most runs: enough to tell the settings apart
POST_500 = "the post, 500 epochs"
SHOWN = (30, 200, 350, 500)  # epochs of that run whose pictures are shown, as in the post
LINEAR = {"beta_schedule": "linear", "warmup_epochs": 100}
COSINE = {"learning_rate": 1e-3, "lr_schedule": "cosine"}
BEST_CHANGES = {k: v for k, v in vars(BEST).items() if v != getattr(Options, k, None)}
# One change at a time from the post's setting.
SETTINGS: dict[str, dict[str, Any]] = {
    "the post": {},
    POST_500: {"epochs": 500},
    "Bernoulli likelihood, beta 1": {"likelihood": "bernoulli", "beta": 1.0},
    "sigma likelihood, beta 1": {"likelihood": "sigma", "beta": 1.0},
    "beta 1": {"beta": 1.0},
    "beta 10": {"beta": 10.0},
    "beta 10, linear warm-up": {"beta": 10.0} | LINEAR,
    "linear warm-up": LINEAR,
    "cyclical beta": {"beta_schedule": "cyclical"},
    "batch normalisation": {"batch_norm": True},
    "augmentation": {"augment": True},
    "learning rate 1e-3": {"learning_rate": 1e-3},
    "learning rate 1e-3, cosine": COSINE,
    "learning rate 1e-3, cosine, augmentation": COSINE | {"augment": True},
    "64x64 pictures": {"image_size": 64},
    "--preset best": BEST_CHANGES,
}
BETAS = (0.003, 0.01, 0.03, 0.3, 3.0)
SIZES = (2, 5, 20, 50)
SHORT_BEST = BEST_CHANGES | {"epochs": EPOCHS}
# What the figures need beyond the table.
CURVES = {f"beta {beta:g}": {"beta": beta} for beta in BETAS}
CURVES |= {f"{size} dimensions": {"latent_size": size} for size in SIZES}
CURVES |= {f"{size} dimensions, best": SHORT_BEST | {"latent_size": size} for size in (*SIZES, 10)}

COLUMNS: dict[str, Callable[[dict[str, Any]], float]] = {
    "error, test": lambda run: run["test"]["squared_error"],
    "error, train": lambda run: run["train"]["squared_error"],
    "samples, fitted": lambda run: run["samples"]["frechet"]["fitted"],
    "samples, prior": lambda run: run["samples"]["frechet"]["prior"],
}
NOTES = "<!-- notes -->"


def train_setting(options: Options, folder: Path) -> dict[str, Any]:
    """Return a setting's metrics; train it first in ``folder``, from where it stopped before."""
    # Two runs of one thread each get more done on two cores than one run of two threads.
    torch.set_num_threads(1)
    if (folder / "metrics.json").exists():
        metrics = json.loads((folder / "metrics.json").read_text())
        # A setting that has been edited since is another experiment: this says so.
        check_same_experiment(metrics["config"], options)
        return metrics
    _, metrics = train(options, folder, (folder / "checkpoint.pt").exists(), progress=False)
    print(f"{folder} is trained", flush=True)
    return metrics


def report(results: dict[str, Runs]) -> str:
    """Return the table, and how its numbers were made."""
    first = results["the post"][0]
    pca = first["pca"]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    rows = []
    for name in SETTINGS:
        cells = [spread([column(run) for run in results[name]]) for column in COLUMNS.values()]
        rows.append(f"| {name} | {' | '.join(cells)} |\n")
    return f"""# The practical aspects, measured

`{shlex.join(["python", *sys.argv])}`,
{first["dataset"]}, {first["epochs"]} epochs (`--preset best`: {BEST.epochs}),
{len(results["the post"])} seeds each (mean ± standard deviation), one thread a run; {versions}.

- *Error*: squared error per picture, summed over its values, z sampled. PCA with
  {pca["components"]} components has {pca["squared_error"]:.1f} on the test split at 32x32;
  at 64x64 there are four times as many values.
- *Samples*: Fréchet distance of as many new pictures as the test split has to the test pictures,
  drawn from the Gaussian fitted to the training pictures' latents, or from the prior. Lower is
  better.

| setting | {" | ".join(COLUMNS)} |
| --- |{" ---: |" * len(COLUMNS)}
""" + "".join(rows)


def spread(values: list[float]) -> str:
    """Return mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def mean(runs: Runs, column: str) -> float:
    """Return the mean over seeds."""
    return statistics.mean(COLUMNS[column](run) for run in runs)


def plot_errors(results: dict[str, Runs], figure: Figure) -> None:
    """Draw each setting's held-out error (a dot for each seed) beside PCA's."""
    axes, names = figure.subplots(), list(SETTINGS)
    for row, name in enumerate(SETTINGS):
        # As if it were summed over 32x32 pixels, so that sizes compare.
        factor = (results[name][0]["config"]["image_size"] // 32) ** 2
        names[row] += f" (÷ {factor})" if factor > 1 else ""
        errors = [COLUMNS["error, test"](run) / factor for run in results[name]]
        axes.plot(errors, [row] * len(errors), "o", color="tab:blue", alpha=0.7)
    pca = results["the post"][0]["pca"]
    axes.axvline(pca["squared_error"], color="tab:red", linestyle="--")
    label = f"PCA, {pca['components']} components"
    axes.text(
        pca["squared_error"], 1.01, label, color="tab:red", transform=axes.get_xaxis_transform()
    )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("squared error per test picture (z sampled; sum over 3,072 values)")
    axes.grid(axis="x", alpha=0.3)


def plot_betas(results: dict[str, Runs], figure: Figure) -> None:
    """Draw error and Fréchet distances against the KL divergence, a point for each beta."""
    error, samples = figure.subplots(2, 1, sharex=True)
    betas = {0.1: "the post"} | {beta: f"beta {beta:g}" for beta in (*BETAS, 1, 10)}
    rows = [results[betas[beta]] for beta in sorted(betas)]
    kl = [statistics.mean(run["test"]["kl"] for run in runs) for runs in rows]
    error.plot(kl, [mean(runs, "error, test") for runs in rows], "o-", color="tab:blue")
    for beta, x, runs in zip(sorted(betas), kl, rows, strict=True):
        place = (x, mean(runs, "error, test"))
        error.annotate(f"β = {beta:g}", place, (4, 6), textcoords="offset points", rotation=40)
    error.margins(0.14, 0.2)
    for column in ("samples, prior", "samples, fitted"):
        samples.plot(kl, [mean(runs, column) for runs in rows], "o-", label=column)
    error.set(ylabel="distortion: squared error\nper test picture (z sampled)", xscale="log")
    samples.set(ylabel="Fréchet distance of samples\nto the test pictures")
    samples.set_xlabel("rate: KL divergence per test picture, nats")
    samples.legend()


def plot_sizes(results: dict[str, Runs], figure: Figure) -> None:
    """Draw the error against the number of latent dimensions, beside PCA's."""
    axes, sizes = figure.subplots(), sorted((*SIZES, 10))
    names = [f"{size} dimensions" for size in sizes]
    post = [results["the post" if size == 10 else f"{size} dimensions"] for size in sizes]
    best = [results[f"{name}, best"] for name in names]
    axes.plot(
        sizes,
        [runs[0]["pca"]["squared_error"] for runs in post],
        "s--",
        color="tab:red",
        label="PCA",
    )
    for label, rows in (("the post's setting", post), ("the best setting, as long", best)):
        axes.plot(sizes, [mean(runs, "error, test") for runs in rows], "o-", label=label)
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set(xlabel="latent dimensions (PCA: components)")
    axes.set_ylabel(f"squared error per test picture\n(z sampled, {EPOCHS} epochs)")
    axes.legend()
    axes.grid(alpha=0.3)


def read_events(folder: Path) -> EventAccumulator:
    """Return all of TensorBoard's points in a folder (0: no thinning out)."""
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def plot_losses(run: Path, figure: Figure) -> None:
    """Draw the three losses over the batches, as the post shows them."""
    axes = figure.subplots()
    for tag in ("KL Loss", "Reconstruction Loss", "Total Loss"):
        points = read_events(run / f"loss_{tag}").Scalars("loss")
        axes.plot([point.step for point in points], [point.value for point in points], label=tag)
    axes.set(xlabel="batch (16 an epoch)", ylabel="loss per image", ylim=(0, 260))
    axes.set_title("KL in nats, reconstruction in squared error, one point a batch", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()


def plot_pictures(run: Path, figure: Figure) -> None:
    """Draw reconstructions and samples at four epochs; photographs themselves are left out."""
    events = read_events(run)
    for column, epoch in zip(figure.subplots(2, len(SHOWN)).T, SHOWN, strict=True):
        for panel, tag in zip(column, ("test_pairs", "samples"), strict=True):
            # TensorBoard's steps are epochs counted from 0.
            (event,) = (each for each in events.Images(tag) if each.step == epoch - 1)
            grid = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
            name = tag
            if tag == "test_pairs":
                # Odd rows (34 pixels each) show test pictures, even ones what was drawn of them.
                name, grid = "reconstructions", np.concatenate((grid[36:70], grid[104:138]))
            panel.imshow(grid)
            panel.set(xticks=[], yticks=[], title=f"{name}, epoch {epoch}")


@dataclass(frozen=True)
class Command:
    """What the study is to do."""

    seeds: int = 3  # runs of each setting
    data_root: str = Options.data_root  # holds flowers-102
    log_dir: Path = ROOT / "benchmarks" / "runs" / "practical_aspects"  # of all runs
    output: Path = ROOT / "results"  # receives the table and the figures
    processes: int = os.cpu_count() or 1  # runs at a time


def main() -> None:
    """Train what is missing, then write the table and the figures."""
    command = tyro.cli(Command, description=__doc__)
    if min(command.seeds, command.processes) < 1:
        raise UserError("--seeds and --processes need to be 1 or more")
    log_dir = command.log_dir
    changes = {name: {"epochs": EPOCHS} | each for name, each in (SETTINGS | CURVES).items()}
    folders = {name: log_dir / re.sub(r"\W", "-", name) for name in changes}
    data = {"dataset": "flowers102", "data_root": command.data_root}
    jobs = [(name, seed) for seed in range(command.seeds) for name in changes]
    options = [Options(**changes[name] | data, seed=seed) for name, seed in jobs]
    runs = [folders[name] / str(seed) for name, seed in jobs]
    results: dict[str, Runs] = {name: [] for name in changes}
    with ProcessPoolExecutor(command.processes) as pool:
        for (name, _), metrics in zip(jobs, pool.map(train_setting, options, runs), strict=True):
            results[name].append(metrics)

    command.output.mkdir(parents=True, exist_ok=True)
    document = command.output / "practical_aspects.md"
    notes = document.read_text().partition(NOTES)[2] if document.exists() else "\n"
    document.write_text(f"{report(results)}\n{NOTES}{notes}")
    for name, size, plot in (
        ("practical_aspects", (8, 6.5), partial(plot_errors, results)),
        ("rate_distortion", (7, 7), partial(plot_betas, results)),
        ("latent_size", (7, 4), partial(plot_sizes, results)),
        ("flowers102_losses", (7, 3.5), partial(plot_losses, folders[POST_500] / "0")),
        ("flowers102_pictures", (14, 2.6), partial(plot_pictures, folders[POST_500] / "0")),
    ):
        figure = Figure(figsize=size, layout="constrained")
        plot(figure)
        figure.savefig(command.output / f"{name}.png", dpi=110)
    print(f"Wrote practical_aspects.md and the figures to {command.output}")


if __name__ == "__main__":
    with one_line_errors():
        main()
