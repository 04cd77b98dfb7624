"""What each of the post's "Practical Aspects" buys: ``python benchmarks/practical_aspects.py``.

Trains one change at a time from the post's setting, several seeds each, and writes a table and
two figures. Runs that are finished are not trained again, so it can be stopped at any time.
"""

import argparse
import io
import json
import os
import shlex
import statistics
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from datasets.pictures import Pictures, Splits, load_splits  # noqa: E402
from vae_training import PRESETS, Options, find_checkpoint, resumed_options, train  # noqa: E402

# One change at a time from the post's setting.
SETTINGS: dict[str, dict[str, Any]] = {
    "the post": {},
    "Bernoulli likelihood, beta 1": {"likelihood": "bernoulli", "beta": 1.0},
    "sigma likelihood, beta 1": {"likelihood": "sigma", "beta": 1.0},
    "beta 1": {"beta": 1.0},
    "beta 10": {"beta": 10.0},
    "beta 10, linear warm-up": {"beta": 10.0, "beta_schedule": "linear", "warmup_epochs": 150},
    "linear warm-up": {"beta_schedule": "linear", "warmup_epochs": 150},
    "cyclical beta": {"beta_schedule": "cyclical"},
    "batch normalisation": {"batch_norm": True},
    "augmentation": {"augment": True},
    "learning rate 1e-3": {"learning_rate": 1e-3},
    "learning rate 1e-3, cosine": {"learning_rate": 1e-3, "lr_schedule": "cosine"},
    "learning rate 1e-3, cosine, augmentation": {
        "learning_rate": 1e-3,
        "lr_schedule": "cosine",
        "augment": True,
    },
    "64x64 pictures": {"image_size": 64},
}
# Three fifths of the post's epochs, for all alike; the preset is run as it is, with all 500.
SETTINGS = {name: {"epochs": 300} | changes for name, changes in SETTINGS.items()}
SETTINGS["--preset best"] = PRESETS["best"]
COLUMNS = {
    "squared_error": "squared error, z sampled",
    "squared_error_mean": "through the mean",
    "psnr": "PSNR, dB",
    "kl": "KL, nats",
    "elbo_per_dimension": "ELBO, nats per dimension",
    "active_units": "active units",
}


def train_setting(name: str, seed: int, folder: Path, data_root: str, quick: bool) -> None:
    """Train one setting with one seed in ``folder``, going on where it stopped before."""
    # Two runs of one thread each get more done on two cores than one run of two threads.
    torch.set_num_threads(1)
    shorter = {"epochs": 10, "warmup_epochs": 5} if quick else {}
    dataset = "synthetic" if quick else "flowers102"
    changes = {"seed": seed, "data_root": data_root, "dataset": dataset}
    options = Options(**SETTINGS[name] | changes | shorter)
    checkpoint = find_checkpoint(folder) if (folder / "checkpoint.pt").exists() else None
    if checkpoint is not None:
        # Also where a setting has been edited since: then this says what differs, and stops.
        given = {k: v for k, v in vars(options).items() if k not in ("log_dir", "run_name")}
        resumed_options(checkpoint["config"], given)
    if (folder / "metrics.json").exists():
        return
    size = (options.image_size, options.image_size)
    splits = load_splits(dataset, Path(data_root), size, progress=False)
    if quick:
        few = [Pictures(split.pixels[::16], split.labels[::16]) for split in splits[:3]]
        splits = Splits(*few, *splits[3:])
    folder.mkdir(parents=True, exist_ok=True)
    train(options, splits, folder, checkpoint, progress=False)
    print(f"{name}, seed {seed}: done", flush=True)


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return the Markdown table: mean and standard deviation over the seeds, on the test split."""
    lines = [
        "| setting | epochs | " + " | ".join(COLUMNS.values()) + " | train, z sampled | minutes |",
        "| --- |" + " ---: |" * (len(COLUMNS) + 3),
    ]
    for name, runs in results.items():
        cells = [spread(run["test"][column] for run in runs) for column in COLUMNS]
        cells.append(spread(run["train"]["squared_error"] for run in runs))
        cells.append(spread(run["seconds"] / 60 for run in runs))
        lines.append(f"| {name} | {runs[0]['epochs']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(results: dict[str, list[dict[str, Any]]], command: str) -> str:
    """Return the results file: how the numbers were made, and the table."""
    first = next(iter(results.values()))[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    return f"""# The practical aspects, measured

`{command}`, {len(results["the post"])} seeds each (mean ± standard deviation), on
{first["dataset"]}, {os.cpu_count()} CPU cores, each run on one thread beside another, {versions}.
Errors are squared errors per test image, summed over all its values; PCA with
{first["pca"]["components"]} components has {first["pca"]["test"]:.1f} at 32x32. At 64x64 there are
four times as many values. Bernoulli's ELBO is of grey values taken for probabilities: it compares
with itself alone. Sigma's takes its one variance from the split that it is measured on.

{table(results)}
"""


def spread(values: Iterable[float | None]) -> str:
    """Return mean and standard deviation of the values that there are."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = statistics.mean(known)
    digits = 1 if abs(mean) >= 2 else 2
    deviation = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{mean:.{digits}f}{deviation}"


def plot_errors(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw each setting's held-out error (a dot for each seed) beside PCA's."""
    figure, axes = pyplot.subplots(figsize=(8, 0.35 * len(results) + 1.2), layout="constrained")
    names = list(results)
    for row, name in enumerate(names):
        if results[name][0]["config"]["image_size"] != 32:
            names[row] += " (÷ 4)"
        values = [error_at_32(run, "squared_error") for run in results[name]]
        axes.plot(values, [row] * len(values), "o", color="tab:blue", alpha=0.7)
    pca = results["the post"][0]["pca"]
    axes.axvline(pca["test"], color="tab:red", linestyle="--")
    axes.text(pca["test"], -0.8, f" PCA, {pca['components']} components", color="tab:red")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("squared error per test image (z sampled; sum over 3,072 values)")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def error_at_32(run: dict[str, Any], metric: str) -> float:
    """Return a test error as if it were summed over 32x32 pixels, so that sizes compare."""
    return run["test"][metric] * (32 / run["config"]["image_size"]) ** 2


def plot_kl_story(constant: Path, warmup: Path, path: Path) -> None:
    """Draw KL and error over the epochs, and reconstructions, with and without warm-up."""
    figure, axes = pyplot.subplots(3, 2, figsize=(10, 6.5), layout="constrained")
    for column, (title, folder) in enumerate(
        (("beta 10 from the start", constant), ("linear warm-up to beta 10", warmup))
    ):
        # size_guidance 0: keep every point.
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
        kl = events.Scalars("validation/kl")
        error = events.Scalars("validation/squared_error")
        epochs = [event.step for event in kl]
        axes[0, column].plot(epochs, [event.value for event in kl], color="tab:green")
        axes[0, column].set(title=title, ylabel="KL, nats", yscale="log", ylim=(0.1, 200))
        axes[1, column].plot(epochs, [event.value for event in error], color="tab:blue")
        axes[1, column].set(xlabel="epoch", ylabel="squared error per image", ylim=(60, 260))
        # Each second row of the pairs is what the model drew; the first one is of eight pictures.
        drawn = [
            np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))[34:70]
            for event in events.Images("pairs")
            if event.step in (30, 100, 200, 300) or epochs == [event.step]
        ]
        axes[2, column].imshow(np.concatenate(drawn))
        axes[2, column].set(xticks=[], yticks=[], xlabel="reconstructions of eight test pictures")
        axes[2, column].set_ylabel("epochs 30, 100,\n200, 300", rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Train what is missing, then write the table and the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each setting (default: 3)")
    parser.add_argument("--data-root", default=Options.data_root, help="holds flowers-102")
    parser.add_argument("--log-dir", type=Path, default=ROOT / "vae" / "runs" / "practical_aspects")
    parser.add_argument("--output", type=Path, help="default: results/; with --quick: --log-dir")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--quick", action="store_true", help="a minute on synthetic flowers")
    options = parser.parse_args()
    matplotlib.use("Agg")
    seeds = range(1 if options.quick else options.seeds)
    if options.quick:
        options.log_dir /= "quick"
    options.output = options.output or (options.log_dir if options.quick else ROOT / "results")

    def folder(name: str, seed: int) -> Path:
        return options.log_dir / "".join(c if c.isalnum() else "-" for c in name) / str(seed)

    with ProcessPoolExecutor(options.processes) as pool:
        jobs = [
            pool.submit(
                train_setting, name, seed, folder(name, seed), options.data_root, options.quick
            )
            for seed in seeds
            for name in SETTINGS
        ]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise

    results = {
        name: [json.loads((folder(name, seed) / "metrics.json").read_text()) for seed in seeds]
        for name in SETTINGS
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "practical_aspects.md").write_text(
        report(results, shlex.join(["python", *sys.argv]))
    )
    plot_errors(results, options.output / "practical_aspects.png")
    plot_kl_story(
        folder("beta 10", 0), folder("beta 10, linear warm-up", 0), options.output / "kl_story.png"
    )
    print(f"Wrote practical_aspects.md, practical_aspects.png and kl_story.png to {options.output}")


if __name__ == "__main__":
    main()
