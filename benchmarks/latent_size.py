"""What more latent dimensions buy: ``python -m benchmarks.latent_size``.

Trains Flowers102 with the best setting and 2 to 128 latent dimensions, and with larger
pictures. Prints the tables of results/latent_size.md, by one of which ``--preset petals`` was
chosen, and draws a figure. Stopped at any time, it goes on where it was.
"""

from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import tyro
from matplotlib import pyplot
from matplotlib.image import imread
from torch import Tensor
from torch.distributions import MultivariateNormal
from torchvision.datasets import Flowers102
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize
from torchvision.utils import make_grid

from benchmarks.practical_aspects import Metrics, Results, run_folder, train_all, with_deviation
from datasets import find_dataset
from datasets.memory import InMemory
from datasets.preprocessing import image_pipeline
from vae.checkpoint import load_model
from vae.command_line import check, one_line_errors
from vae.evaluation import PCA, evaluate, precision_and_recall
from vae.losses import ELBOLoss
from vae.run import own_random
from vae.vae import VAE
from vae_training import BEST, DATASETS, PETALS, Options

SIZES = (2, 5, 10, 20, 32, 64, 128)  # latent dimensions

# What else was tried for --preset petals, one seed each: what it is now, and with more numbers.
LARGE = {
    "64x64, 64 numbers": replace(PETALS, dataset="flowers102"),
    "64x64, 128 numbers": replace(PETALS, dataset="flowers102", latent_size=128),
}

# The post's setting, for the figure of reconstructions.
POST = {"the post": replace(Options(), dataset="flowers102")}
# The rows of that figure: a preset, its run here, and what it is.
PRESETS = (
    ("the post", "the post", "10 numbers, 32x32"),
    ("best", "10 numbers", "10 numbers, 32x32"),
    ("petals", "64x64, 64 numbers", "64 numbers, 64x64"),
)
SHOWN = 12  # test photographs whose reconstructions it shows, from all over the split

COMPARED = 32  # pixels on each side of the pictures that precision and recall are measured on


def best_with(sizes: Sequence[int]) -> dict[str, Options]:
    """Return the rows of the first table: the best setting with so many latent dimensions."""
    return {f"{n} numbers": replace(BEST, dataset="flowers102", latent_size=n) for n in sizes}


# The first table: on the test pictures.


def columns(metrics: Metrics) -> dict[str, float]:
    """Return what the first table has of a run, by the names of its columns."""
    samples, pca = metrics["samples"], metrics["pca"]
    return {
        "error": metrics["test"]["squared_error"],
        "through the mean": metrics["test"]["squared_error_mean"],
        "PCA": pca["squared_error"],
        "precision": samples["precision"]["fitted"],
        "recall": samples["recall"]["fitted"],
        "distance": samples["frechet"]["fitted"],
        "PCA's": pca["frechet"]["samples"],
        "KL": metrics["test"]["kl"],
    }


def table(results: Results) -> str:
    """Return the first table in Markdown, mean and standard deviation over the seeds.

    Its last row is what other real photographs have.
    """
    names = columns(next(iter(results.values()))[0])
    lines = [f"| | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    for setting, runs in results.items():
        seeds = [columns(metrics) for metrics in runs]
        cells = []
        for name in names:
            digits = 2 if name in ("precision", "recall") else 1
            cells.append(with_deviation([seed[name] for seed in seeds], digits))
        lines.append(f"| {setting} | {' | '.join(cells)} |")
    samples = next(iter(results.values()))[0]["samples"]
    real = f"{samples['precision']['real']:.2f} | {samples['recall']['real']:.2f}"
    lines.append(f"| other real photographs | | | | {real} | | | |")
    return "\n".join(lines)


# The second table: on the validation pictures, by which the preset was chosen.


def validate(folder: Path, data_root: Path) -> dict[str, float]:
    """Return what the second table has of a run: figures of its model on the validation pictures.

    Pictures of any size are compared as such of 32x32 pixels.
    """
    torch.set_num_threads(1)
    model, options, latents = load_model(folder / "checkpoint.pt")
    assert latents is not None, f"{folder} has not ended"
    size = model.image_resolution
    train, val = flowers("train", size, data_root), flowers("val", size, data_root)
    small = flowers("val", (COMPARED, COMPARED), data_root)
    with own_random(), torch.no_grad():
        torch.manual_seed(0)
        error = evaluate(model, val.batches(), ELBOLoss(options["beta"]))["squared_error_mean"]
        precision, recall = precision_and_recall_of_samples(model, latents, small)
        pca = PCA(train.batches, model.latent_size)
        errors = [(x - pca.decode(pca.encode([x]))).square().sum() for x in val.batches()]
    return {
        "error": error,
        "PCA": torch.stack(errors).sum().item() / len(val),
        "precision": precision,
        "recall": recall,
    }


def precision_and_recall_of_samples(
    model: VAE, latents: MultivariateNormal, small: InMemory
) -> tuple[float, float]:
    """Return the means over four sets of as many samples as there are pictures, of 32x32 pixels."""
    features = PCA(small.batches, 64)
    real = features.encode(small.batches())
    measured = []
    for _ in range(4):
        z = latents.sample((len(small),))
        drawn = (reduced(model.decoder(batch)) for batch in z.split(64))
        measured.append(precision_and_recall(real, features.encode(drawn)))
    precisions, recalls = zip(*measured, strict=True)
    return fmean(precisions), fmean(recalls)


def flowers(split: str, size: tuple[int, int], data_root: Path) -> InMemory:
    """Return a split of the photographs."""
    return InMemory(Flowers102(data_root, split, image_pipeline(size)), progress=False)


def reduced(images: Tensor) -> Tensor:
    """Return images of 32x32 pixels, reduced as photographs are."""
    return resize(images, [COMPARED, COMPARED], antialias=True)


def trials_table(results: Results, log_dir: Path, data_root: Path, pool: Executor) -> str:
    """Return the second table: a line for each run, and whether it is below PCA, as the rule asks.

    The rule: of the settings with an error below PCA's, the one whose smaller figure of precision
    and recall is the largest. Those within 0.03 of it, which is chance, count as equal: then the
    one of the largest pictures, and of those the one that takes the least time.
    """
    runs = [(setting, metrics) for setting, seeds in results.items() for metrics in seeds]
    folders = [
        run_folder(log_dir, setting, metrics["options"]["seed"]) for setting, metrics in runs
    ]
    figures = pool.map(validate, folders, [data_root] * len(folders))
    lines = [
        "| setting | seed | error | PCA | precision | recall | smaller of both |",
        "| --- |" + " ---: |" * 6,
    ]
    for (setting, metrics), found in zip(runs, figures, strict=True):
        seed = metrics["options"]["seed"]
        smaller = f"{min(found['precision'], found['recall']):.2f}"
        if found["error"] >= found["PCA"]:
            smaller = "not below PCA"
        lines.append(
            f"| {setting} | {seed} | {found['error']:.1f} | {found['PCA']:.1f} "
            f"| {found['precision']:.2f} | {found['recall']:.2f} | {smaller} |"
        )
    return "\n".join(lines)


# The figure.


def plot(results: Results, log_dir: Path, path: Path) -> None:
    """Draw errors, precision and recall against the latent dimensions, and a row of samples each.

    ``results`` are those of ``best_with``.
    """
    means = []
    for runs in results.values():
        seeds = [columns(metrics) for metrics in runs]
        means.append({name: np.mean([seed[name] for seed in seeds]) for name in seeds[0]})
    sizes = [runs[0]["options"]["latent_size"] for runs in results.values()]
    real = next(iter(results.values()))[0]["samples"]

    figure = pyplot.figure(figsize=(11, 6.2), layout="constrained")
    curves, rows = figure.subfigures(1, 2, squeeze=False, width_ratios=(1, 1.15))[0]
    top, bottom = curves.subplots(2, sharex=True)
    top.plot(sizes, [mean["through the mean"] for mean in means], "o-", label="the model")
    top.plot(sizes, [mean["PCA"] for mean in means], "s--", label="PCA, as many components")
    top.set(ylim=(0, None), ylabel="squared error per test picture\n(through the mean)")
    top.legend()
    bottom.plot(sizes, [mean["precision"] for mean in means], "o-", label="precision")
    bottom.plot(sizes, [mean["recall"] for mean in means], "s-", label="recall")
    bottom.axhline(
        real["recall"]["real"], color="grey", linestyle=":", label="recall of real photographs"
    )
    bottom.set(ylim=(0, 1.03), xscale="log", xlabel="latent dimensions", ylabel="new pictures")
    bottom.set_xticks(sizes, [str(size) for size in sizes])
    bottom.minorticks_off()
    bottom.legend()

    axes = rows.subplots(len(results), squeeze=False)[:, 0]
    for axis, (setting, size) in zip(axes, zip(results, sizes, strict=True), strict=True):
        grid = imread(run_folder(log_dir, setting, 0) / "samples.png")
        axis.imshow(grid[: 2 + COMPARED + 2], interpolation="bicubic")  # the first row of eight
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(str(size), rotation=0, ha="right", va="center")
    rows.suptitle("new pictures with so many latent dimensions", fontsize="medium")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


@torch.no_grad()
def plot_reconstructions(checkpoints: dict[str, Path], data_root: Path, path: Path) -> None:
    """Draw a row of reconstructions of the same test photographs by each model; no photographs."""
    figure, axes = pyplot.subplots(
        len(checkpoints), squeeze=False, figsize=(11, 0.92 * len(checkpoints)), layout="constrained"
    )
    for axis, (name, checkpoint) in zip(axes[:, 0], checkpoints.items(), strict=True):
        model = load_model(checkpoint).model
        test = flowers("test", model.image_resolution, data_root)
        mean, _ = model.encoder(test.images(torch.linspace(0, len(test) - 1, SHOWN).long()))
        large = resize(model.decoder(mean), [128, 128], InterpolationMode.BICUBIC).clamp(0, 1)
        axis.imshow(make_grid(large, nrow=SHOWN, padding=4, pad_value=1).movedim(0, -1).numpy())
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(
    seeds: int = 3,  # runs of each row of the first table
    sizes: tuple[int, ...] = SIZES,  # latent dimensions, a row for each; 10 among them
    data_root: Path = BEST.data_root,  # folder of flowers-102, downloaded to it if missing
    log_dir: Path = Path("benchmarks/runs/latent_size"),  # folder of all runs
    output: Path = Path("results"),  # folder of the figure
) -> None:
    """Train what is missing, then print both tables and draw the figure."""
    check("--seeds", seeds, low=1)
    find_dataset("flowers102", data_root, DATASETS)  # downloads it once, before all run at once
    with ProcessPoolExecutor() as pool:
        small = train_all(best_with(sizes), seeds, data_root, log_dir, pool)
        train_all(POST, 1, data_root, log_dir, pool)
        large = train_all(LARGE, 1, data_root, log_dir, pool)
        print(table(small), "", sep="\n")
        print(trials_table(small | large, log_dir, data_root, pool))
    plot(small, log_dir, output / "latent_size.png")
    rows = {f"{name}\n({setting})": run_folder(log_dir, run, 0) for name, run, setting in PRESETS}
    checkpoints = {name: folder / "checkpoint.pt" for name, folder in rows.items()}
    plot_reconstructions(checkpoints, data_root, output / "reconstructed.png")


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, prog="python -m benchmarks.latent_size", description=__doc__)
