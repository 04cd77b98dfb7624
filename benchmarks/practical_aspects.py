"""What each of the post's "Practical Aspects" buys: ``python benchmarks/practical_aspects.py``.

Trains one change at a time from the post's setting, several betas, and several latent sizes, a few
seeds each, and writes a table and four figures. Runs that are finished are not trained again, so it
can be stopped at any time.
"""

import argparse
import json
import os
import re
import shlex
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.training_progress import read_events, read_grid  # noqa: E402
from datasets.pictures import load_splits  # noqa: E402
from vae.training.options import PRESETS, Options, resumed_options  # noqa: E402
from vae_training import train  # noqa: E402

Runs = list[dict[str, Any]]
"""The metrics of a setting's seeds."""

EPOCHS = 200
"""Of every run but the preset's: enough to tell the settings apart."""
LINEAR = {"beta_schedule": "linear", "warmup_epochs": 100}
COSINE = {"learning_rate": 1e-3, "lr_schedule": "cosine"}
# One change at a time from the post's setting.
SETTINGS: dict[str, dict[str, Any]] = {
    "the post": {},
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
    "--preset best": PRESETS["best"],
}
BETAS = (0.003, 0.01, 0.03, 0.3, 3.0)
SIZES = (2, 5, 20, 50)
SHORT_BEST = PRESETS["best"] | {"epochs": EPOCHS}
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
        resumed_options(metrics["config"], vars(options))
        return metrics
    size = (options.image_size, options.image_size)
    splits = load_splits(options.dataset, Path(options.data_root), size, progress=False)
    start = "resume" if (folder / "checkpoint.pt").exists() else "overwrite"
    _, metrics = train(options, splits, folder, start, progress=False)
    print(f"{folder} is trained", flush=True)
    return metrics


def report(results: dict[str, Runs]) -> str:
    """Return the table, and how its numbers were made."""
    first = results["the post"][0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    rows = []
    for name in SETTINGS:
        cells = [spread([column(run) for run in results[name]]) for column in COLUMNS.values()]
        rows.append(f"| {name} | {' | '.join(cells)} |\n")
    return f"""# The practical aspects, measured

`{shlex.join(["python", *sys.argv])}`,
{first["dataset"]}, {first["epochs"]} epochs (`--preset best`: {PRESETS["best"]["epochs"]}),
{len(results["the post"])} seeds each (mean ± standard deviation), one thread a run; {versions}.

- *Error*: squared error per picture, summed over its values, z sampled. PCA with
  {first["pca"]["components"]} components has {first["pca"]["test"]:.1f} on the test split at 32x32;
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
    axes.axvline(pca["test"], color="tab:red", linestyle="--")
    axes.text(pca["test"], -0.8, f" PCA, {pca['components']} components", color="tab:red")
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
    error.margins(0.1, 0.2)
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
    axes.plot(sizes, [runs[0]["pca"]["test"] for runs in post], "s--", color="tab:red", label="PCA")
    for label, rows in (("the post's setting", post), ("the best setting, as long", best)):
        axes.plot(sizes, [mean(runs, "error, test") for runs in rows], "o-", label=label)
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set(xlabel="latent dimensions (PCA: components)")
    axes.set_ylabel(f"squared error per test picture\n(z sampled, {EPOCHS} epochs)")
    axes.legend()
    axes.grid(alpha=0.3)


def plot_kl_story(folders: dict[str, Path], figure: Figure) -> None:
    """Draw KL and error over the epochs, and reconstructions, of two runs side by side."""
    columns = figure.subplots(3, 2).T
    for (title, folder), (kl, error, drawn) in zip(folders.items(), columns, strict=True):
        events = read_events(folder)
        for panel, tag in ((kl, "kl"), (error, "squared_error")):
            points = events.Scalars(f"validation/{tag}")
            panel.plot([point.step + 1 for point in points], [point.value for point in points])
        kl.set(title=title, ylabel="KL, nats", yscale="log", ylim=(0.03, 10))
        error.set(xlabel="epoch", ylabel="squared error", ylim=(100, 220))
        draw_looks(drawn, events.Images("test_pairs"))


def draw_looks(axes: Axes, looks: list[Any]) -> None:
    """Draw what the model made of eight test pictures at four epochs."""
    looks = [looks[max(0, round(share * len(looks)) - 1)] for share in (0.05, 0.25, 0.5, 1)]
    # The second row of the pairs is what the model drew of the first one's eight pictures.
    axes.imshow(np.concatenate([read_grid(look)[34:70] for look in looks]))
    axes.set(xticks=[], yticks=[], xlabel="reconstructions of eight test pictures")
    label = "epochs {}, {},\n{}, {}".format(*(1 + look.step for look in looks))
    axes.set_ylabel(label, rotation=0, ha="right", va="center")


def main() -> None:
    """Train what is missing, then write the table and the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each setting (default: 3)")
    parser.add_argument("--data-root", default=Options.data_root, help="holds flowers-102")
    parser.add_argument("--log-dir", type=Path, help="default: benchmarks/runs/practical_aspects")
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="default: results/")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time")
    command = parser.parse_args()
    log_dir = command.log_dir or ROOT / "benchmarks" / "runs" / "practical_aspects"
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
    story = {name: folders[name] / "0" for name in ("beta 10", "beta 10, linear warm-up")}
    for name, size, plot in (
        ("practical_aspects", (8, 6.5), partial(plot_errors, results)),
        ("rate_distortion", (7, 7), partial(plot_betas, results)),
        ("latent_size", (7, 4), partial(plot_sizes, results)),
        ("kl_story", (10, 6.5), partial(plot_kl_story, story)),
    ):
        figure = Figure(figsize=size, layout="constrained")
        plot(figure)
        figure.savefig(command.output / f"{name}.png", dpi=110)
    print(f"Wrote practical_aspects.md and four figures to {command.output}")


if __name__ == "__main__":
    main()
