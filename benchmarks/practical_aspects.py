"""What each of the post's "Practical Aspects" buys: ``python benchmarks/practical_aspects.py``.

Trains one change at a time from the post's setting, several seeds each, and writes a table and
two figures. Runs that are finished are not trained again, so it can be stopped at any time.
"""

import argparse
import json
import os
import re
import shlex
import statistics
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.training_progress import read_events, read_grid  # noqa: E402
from datasets.pictures import load_splits  # noqa: E402
from vae.training.options import PRESETS, Options, resumed_options  # noqa: E402
from vae_training import train  # noqa: E402

LINEAR = {"beta_schedule": "linear", "warmup_epochs": 150}
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
}
# Three fifths of the post's epochs, for all alike; the preset is run as it is.
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


def report(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return the results file: how the numbers were made, and what they are on the test split."""
    first = results["the post"][0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    rows = []
    for name, runs in results.items():
        cells = [spread(run["test"][column] for run in runs) for column in COLUMNS]
        cells.append(spread(run["train"]["squared_error"] for run in runs))
        cells.append(spread(run["seconds"] / 60 for run in runs))
        rows.append(f"| {name} | {runs[0]['epochs']} | " + " | ".join(cells) + " |")
    return f"""# The practical aspects, measured

`{shlex.join(["python", *sys.argv])}`
on {first["dataset"]}, {len(results["the post"])} seeds each (mean ± standard deviation);
{os.cpu_count()} CPU cores, each run on one thread beside another; {versions}.
Errors are squared errors per test image, summed over all its values; PCA with
{first["pca"]["components"]} components has {first["pca"]["test"]:.1f} at 32x32. At 64x64 there are
four times as many values. Bernoulli's ELBO is of grey values taken for probabilities: it compares
with itself alone. Sigma's takes its one variance from the split that it is measured on.

| setting | epochs | {" | ".join(COLUMNS.values())} | train, z sampled | minutes |
| --- |{" ---: |" * (len(COLUMNS) + 3)}
""" + "".join(f"{row}\n" for row in rows)


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
    figure = Figure(figsize=(8, 0.35 * len(results) + 1.2), layout="constrained")
    axes = figure.subplots()
    names = list(results)
    for row, runs in enumerate(results.values()):
        # As if it were summed over 32x32 pixels, so that sizes compare.
        factor = (runs[0]["config"]["image_size"] // 32) ** 2
        names[row] += f" (÷ {factor})" if factor > 1 else ""
        errors = [run["test"]["squared_error"] / factor for run in runs]
        axes.plot(errors, [row] * len(errors), "o", color="tab:blue", alpha=0.7)
    pca = results["the post"][0]["pca"]
    axes.axvline(pca["test"], color="tab:red", linestyle="--")
    axes.text(pca["test"], -0.8, f" PCA, {pca['components']} components", color="tab:red")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("squared error per test image (z sampled; sum over 3,072 values)")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)


def plot_kl_story(folders: dict[str, Path], path: Path) -> None:
    """Draw KL and error over the epochs, and reconstructions, of two runs side by side."""
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    columns = figure.subplots(3, 2).T
    for (title, folder), (kl, error, drawn) in zip(folders.items(), columns, strict=True):
        events = read_events(folder)
        for panel, tag in ((kl, "kl"), (error, "squared_error")):
            points = events.Scalars(f"validation/{tag}")
            panel.plot([point.step + 1 for point in points], [point.value for point in points])
        kl.set(title=title, ylabel="KL, nats", yscale="log", ylim=(0.1, 200))
        error.set(xlabel="epoch", ylabel="squared error per image", ylim=(60, 260))
        looks = events.Images("test_pairs")
        looks = [looks[max(0, round(share * len(looks)) - 1)] for share in (0.1, 1 / 3, 2 / 3, 1)]
        # The second row of the pairs is what the model drew of the first one's eight pictures.
        drawn.imshow(np.concatenate([read_grid(look)[34:70] for look in looks]))
        drawn.set(xticks=[], yticks=[], xlabel="reconstructions of eight test pictures")
        label = "epochs {}, {},\n{}, {}".format(*(1 + look.step for look in looks))
        drawn.set_ylabel(label, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=110)


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
    folders = {name: log_dir / re.sub(r"\W", "-", name) for name in SETTINGS}
    data = {"dataset": "flowers102", "data_root": command.data_root}
    jobs = [
        (Options(**changes | data, seed=seed), folders[name] / str(seed))
        for seed in range(command.seeds)
        for name, changes in SETTINGS.items()
    ]
    with ProcessPoolExecutor(command.processes) as pool:
        metrics = list(pool.map(train_setting, *zip(*jobs, strict=True)))
    results = {name: metrics[i :: len(SETTINGS)] for i, name in enumerate(SETTINGS)}
    command.output.mkdir(parents=True, exist_ok=True)
    (command.output / "practical_aspects.md").write_text(report(results))
    plot_errors(results, command.output / "practical_aspects.png")
    story = {name: folders[name] / "0" for name in ("beta 10", "beta 10, linear warm-up")}
    plot_kl_story(story, command.output / "kl_story.png")
    print(f"Wrote practical_aspects.md, practical_aspects.png and kl_story.png to {command.output}")


if __name__ == "__main__":
    main()
