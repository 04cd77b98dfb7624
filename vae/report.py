"""What a run shows beyond the post: validation, pairs, samples, HParams, Projector, metrics."""

import json
import math
import platform
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid, save_image

from datasets.labels import names_of
from datasets.memory import InMemory
from vae.checkpoint import as_plain, replace_atomically
from vae.evaluation import PCA, evaluate, evaluate_pca, evaluate_real, evaluate_samples
from vae.latent import fit_latents
from vae.losses import ELBOLoss
from vae.page import changed_options, warning_if_it_fails, write_page
from vae.run import Run
from vae.summary import advice
from vae.vae import VAE


class Splits(NamedTuple):
    """The pictures of an experiment: to train, to choose settings by, and to test."""

    train: InMemory
    val: InMemory
    test: InMemory


# What TensorBoard shows of a run's progress, and compares between runs.
ALWAYS_SHOWN = ("beta", "epochs", "learning_rate")  # options, in HParams
COMPARED = ("squared_error", "squared_error_mean", "kl", "active_units", "total_loss")


def opening_text(run: Run, model: VAE, splits: Splits, epoch: int, steps_per_epoch: int) -> str:
    """Return what a run says at its start: on what it is trained, where, and from which epoch."""
    options = run.options
    train, val, test = (f"{len(split):,}" for split in splits)
    parameters = sum(weight.numel() for weight in model.parameters())
    length = f"{options.epochs} epochs ({options.epochs * steps_per_epoch:,} steps)"
    going = f"is trained for {length}"
    if epoch == options.epochs:
        going = f"has ended after its {epoch} epochs: only its report is made again"
    elif epoch:
        going = f"goes on at epoch {epoch} of {length}"
    return (
        f"{options.dataset}: {train} training, {val} validation and {test} test pictures "
        f"of {options.image_size}x{options.image_size}\n"
        f"A VAE of {parameters:,} parameters {going} on {run.device}\n"
        f"Its folder: {run.folder}"
    )


# While it trains.


@torch.no_grad()
def write_validation(
    writer: SummaryWriter, model: VAE, loss: ELBOLoss, splits: Splits, epoch: int
) -> None:
    """Write validation metrics, test pairs and samples to TensorBoard.

    Nothing is written if the loss is not finite.
    """
    train, val, test = splits
    metrics = evaluate(model, val.batches(), loss)
    if not math.isfinite(metrics["total_loss"]):
        return
    for name in COMPARED:
        writer.add_scalar(f"validation/{name}", metrics[name], epoch)
    # A group of its own, whose name comes behind the post's "loss".
    for number, kl in enumerate(metrics["kl_per_dimension"]):
        writer.add_scalar(f"validation_kl/z{number}", kl, epoch)
    # A quarter of the training pictures are enough for a look.
    latents = fit_latents(model, (x[::4] for x in train.batches(256)))
    # Few and small: TensorBoard takes its time over each byte of a picture.
    writer.add_image("samples", make_grid(model.decoder(latents.sample((16,)))), epoch)
    writer.add_image("samples_prior", make_grid(model.sample(16)), epoch)
    writer.add_image("test_pairs", pairs_grid(model, test, 16), epoch)


def pairs_grid(model: VAE, test: InMemory, count: int) -> Tensor:
    """Return a grid: odd rows test pictures, even rows their reconstructions, as in the post."""
    width = min(8, len(test))
    count = min(count, len(test)) // width * width  # whole rows
    every = len(test) // count
    originals = test.images(slice(None, None, every))[:count]
    originals = originals.to(next(model.parameters()).device)
    reconstructions, *_ = model(originals)
    rows: list[Tensor] = []
    for pair in zip(originals.split(width), reconstructions.split(width), strict=True):
        rows.extend(pair)
    return make_grid(torch.cat(rows), nrow=width)


# When it has ended.


@torch.no_grad()
def write_report(
    run: Run, writer: SummaryWriter, model: VAE, loss: ELBOLoss, splits: Splits
) -> dict[str, Any]:
    """Measure the trained model; leave latents, metrics and pictures; return the metrics.

    The model is in ``eval()`` mode, ``loss`` the one that it was trained with, at its final beta.
    What fails of TensorBoard's HParams and Projector, or of report.html, is a warning.
    ``FloatingPointError`` if the loss is not finite.
    """
    run.in_epoch = False  # wherever the loop ended: from here on a signal stops at once
    train, _, test = splits
    metrics = describe(run, model)
    metrics |= measure_splits(model, loss, splits)
    for split in splits._fields:
        run.check_loss(run.epochs_done - 1, metrics[split]["total_loss"])
    latents = fit_latents(model, train.batches())
    metrics |= measure_samples(model, latents, train, test)
    metrics["test_pictures"] = len(test)
    metrics["advice"] = advice(metrics, run.history)
    # The result comes first, so that nothing that is only shown can cost it. With latents in it, a
    # checkpoint is that of a run which has ended
    covariance = latents.covariance_matrix.cpu()
    run.save(latents={"mean": latents.mean.cpu(), "covariance": covariance})
    content = json.dumps(metrics, indent=2, default=str)
    with replace_atomically(run.folder / "metrics.json") as file:
        file.write(content.encode())
    save_pictures(run.folder, model, latents, test)
    with warning_if_it_fails("TensorBoard's HParams"):
        write_hparams(writer, run.options, metrics["test"])
    with warning_if_it_fails("TensorBoard's Projector"):
        write_projector(writer, model, test, run.epochs_done)
    with warning_if_it_fails("report.html"):
        write_page(run, model, splits, metrics)
    return json.loads(content)  # as everybody reads them: a list in place of each tuple


def measure_splits(model: VAE, loss: ELBOLoss, splits: Splits) -> dict[str, Any]:
    """Return what ``evaluate`` measures on each split."""
    return {
        name: evaluate(model, split.batches(), loss) for name, split in splits._asdict().items()
    }


def measure_samples(
    model: VAE, latents: MultivariateNormal, train: InMemory, test: InMemory
) -> dict[str, Any]:
    """Return how near new pictures are to test pictures, and how far PCA gets."""
    features = PCA(test.batches, 64)
    samples = evaluate_samples(model, latents, test.batches, features)
    pca = evaluate_pca(train.batches, test.batches, model.latent_size, features)
    real = evaluate_real(train.batches, test.batches, features)
    return {"samples": samples, "pca": pca, **real}


def describe(run: Run, model: VAE) -> dict[str, Any]:
    """Return what was run: options, architecture, versions, device, time."""
    versions = {"python": platform.python_version()}
    for package in (torch, torchvision):
        versions[package.__name__] = package.__version__
    return {
        "dataset": run.options.dataset,
        "epochs": run.epochs_done,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "seconds": run.seconds,
        "device": str(run.device),
        "versions": versions,
        "options": as_plain(asdict(run.options)),
        "architecture": as_plain(run.architecture),
    }


def save_pictures(folder: Path, model: VAE, latents: MultivariateNormal, test: InMemory) -> None:
    """Write pairs of test pictures and reconstructions, and samples of both kinds, as PNG files."""
    grids = {
        "reconstructions": pairs_grid(model, test, 32),
        "samples": make_grid(model.decoder(latents.sample((64,)))),
        "samples_prior": make_grid(model.sample(64)),
    }
    for name, grid in grids.items():
        with replace_atomically(folder / f"{name}.png") as file:
            save_image(grid, file, format="png")


def write_hparams(writer: SummaryWriter, options: Any, metrics: dict[str, Any]) -> None:
    """Write the options and the test metrics to TensorBoard's HParams, to compare runs by.

    Its table opens with five options in alphabetical order, so that only those are written that
    matter: ``ALWAYS_SHOWN``, and what is not as usual.
    """
    changed = {name for name, *_ in changed_options(options)}
    experiment = {
        name.replace("_", " "): as_shown(value)
        for name, value in asdict(options).items()
        if name in ALWAYS_SHOWN or name in changed
    }
    compared = {f"test/{name}": metrics[name] for name in COMPARED}
    writer.add_hparams(experiment, compared, run_name=".")


def as_shown(value: Any) -> int | float | str:
    """Return an option's value as HParams can show it: a number, or text."""
    if isinstance(value, bool):
        return "yes" if value else "no"  # it would show 1.0000 and 0.0000
    return value if isinstance(value, int | float | str) else str(value)


def write_projector(writer: SummaryWriter, model: VAE, test: InMemory, epoch: int) -> None:
    """Write test latents with thumbnails and species to TensorBoard's Projector."""
    # The Projector shows up to 8,192 x 8,192 pixels of thumbnails; five hundred are enough.
    most = min(500, (8192 // model.image_resolution[0]) ** 2)
    every = math.ceil(len(test) / most)
    pictures, labels = test.images(slice(None, None, every)), test.labels[::every]
    device = next(model.parameters()).device
    means = torch.cat([model.encoder(batch.to(device))[0] for batch in pictures.split(64)])
    thumbnails = pictures[:, : 3 if pictures.shape[1] >= 3 else 1]  # as many as it can show
    names = names_of(labels, test.classes)
    # TensorBoard warns of what an earlier report of this epoch has left.
    shutil.rmtree(Path(writer.log_dir) / f"{epoch:05}" / "test_latents", ignore_errors=True)
    writer.add_embedding(means, names, thumbnails, epoch, "test_latents")
