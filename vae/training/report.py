"""What a run shows beyond the post: validation, pairs, samples, HParams, Projector, metrics."""

import json
import math
import platform
import shlex
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.datasets import Flowers102
from torchvision.utils import make_grid, save_image

from datasets.pictures import Pictures, Splits
from vae.evaluation import evaluate, evaluate_samples, pca_squared_error
from vae.latent import fit_latents
from vae.losses import ELBOLoss
from vae.training.checkpoint import replace_atomically, save_latents
from vae.training.options import Options
from vae.training.run import SYNTHETIC, Run
from vae.vae import VAE

LOOK_EVERY = 10  # epochs between two looks at the validation split
COMPARED = ("squared_error", "squared_error_mean", "psnr", "kl", "active_units")


def opening(run: Run, model: VAE, splits: Splits, epoch: int) -> str:
    """Return what a run says at its start: on what it is trained, where, and from which epoch."""
    size = run.options.image_size
    counts = "{:,} training, {:,} validation and {:,} test pictures".format(*map(len, splits[:3]))
    parameters = sum(weight.numel() for weight in model.parameters())
    going = f"goes on at epoch {epoch} of" if epoch else "is trained for"
    return (
        f"{splits.dataset}: {counts} of {size}x{size}\n"
        f"A VAE of {parameters:,} parameters {going} {run.options.epochs} epochs on {run.device}\n"
        f"Its folder: {run.folder}"
    )


def write_losses(
    writer: SummaryWriter, losses: list[Tensor], epoch: int
) -> tuple[float, float, float]:
    """Write one point for each batch of an epoch to TensorBoard; return the last batch's losses.

    ``losses`` are KL, reconstruction and total loss of each batch, [3]. ``FloatingPointError``
    names the epoch and the batch where one is not finite.
    """
    for batch, (kl, reconstruction, total) in enumerate(torch.stack(losses).tolist()):
        if not math.isfinite(total):
            raise FloatingPointError(
                f"the loss is {total} in epoch {epoch}, batch {batch} (KL {kl}, reconstruction "
                f"{reconstruction}): lower --learning-rate. The last good checkpoint is in "
                f"{writer.log_dir}"
            )
        points = {"KL Loss": kl, "Reconstruction Loss": reconstruction, "Total Loss": total}
        writer.add_scalars("loss", points, epoch * len(losses) + batch)
    return kl, reconstruction, total


@torch.no_grad()
def write_validation(
    writer: SummaryWriter, model: VAE, loss: ELBOLoss, splits: Splits, epoch: int
) -> None:
    """Write the validation metrics, test pairs and samples to TensorBoard every ten epochs."""
    if (epoch + 1) % LOOK_EVERY:
        return
    metrics = evaluate(model, splits.val.batches(), loss)
    if not math.isfinite(metrics["total_loss"]):
        return  # A weight is not finite: Run.save stops the run and says so.
    for name in COMPARED:
        writer.add_scalar(f"validation/{name}", metrics[name], epoch)
    writer.add_histogram("validation/kl_per_dimension", Tensor(metrics["kl_per_dimension"]), epoch)
    latents = fit_latents(model, splits.train.batches())
    # Few and small: TensorBoard takes its time over each byte of a picture.
    writer.add_image("samples", make_grid(model.decoder(latents.sample((16,)))), epoch)
    writer.add_image("samples_prior", make_grid(model.sample(16)), epoch)
    writer.add_image("test_pairs", test_pairs(model, splits.test, 16), epoch)


def test_pairs(model: VAE, test: Pictures, count: int) -> Tensor:
    """Return a grid: odd rows test pictures, even rows their reconstructions, as in the post."""
    originals = test[:: max(1, len(test) // count)][0][:count]
    reconstructions, _, _ = model(originals)
    rows = zip(originals.split(8), reconstructions.split(8), strict=True)
    return make_grid(torch.cat([row for pair in rows for row in pair]))


@torch.no_grad()
def report(run: Run, model: VAE, splits: Splits) -> dict[str, Any]:
    """Measure the trained model, leave metrics and pictures in its folder; return the metrics."""
    options, seconds = run.options, time.perf_counter() - run.started
    model.eval()
    loss, components = ELBOLoss(options.beta, options.likelihood), options.latent_size
    latents = fit_latents(model, splits.train.batches())
    metrics: dict[str, Any] = {
        "dataset": splits.dataset,
        "epochs": options.epochs,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "train": evaluate(model, splits.train.batches(), loss),
        "val": evaluate(model, splits.val.batches(), loss),
        "test": evaluate(model, splits.test.batches(), loss),
        "samples": evaluate_samples(model, latents, splits.train.batches, splits.test.batches),
        "pca": {
            "components": components,
            "test": pca_squared_error(splits.train.batches, splits.test.batches(), components),
        },
        "seconds": seconds,
        "device": str(run.device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        "config": run.config,
    }
    with replace_atomically(run.folder / "metrics.json") as file:
        file.write(json.dumps(metrics, indent=2).encode())
    grids = {
        "reconstructions": test_pairs(model, splits.test, 32),
        "samples": make_grid(model.decoder(latents.sample((64,)))),
        "samples_prior": make_grid(model.sample(64)),
    }
    for name, grid in grids.items():
        with replace_atomically(run.folder / f"{name}.png") as file:
            save_image(grid, file, format="png")

    experiment = {
        each.name: getattr(options, each.name)
        for each in fields(Options)
        if each.metadata["group"] in ("model", "loss", "training")
    }
    scores = {f"test/{name}": metrics["test"][name] for name in COMPARED}
    run.writer.add_hparams(experiment | {"dataset": splits.dataset}, scores, run_name=".")
    write_latents(run.writer, model, splits, options.epochs)
    save_latents(latents, run.folder / "checkpoint.pt")  # the last: where they are, all is done
    return metrics


def write_latents(writer: SummaryWriter, model: VAE, splits: Splits, epoch: int) -> None:
    """Write test latents with thumbnails and species to TensorBoard's Projector."""
    # The Projector shows up to 8,192 x 8,192 pixels of thumbnails; five hundred are enough.
    count = min(500, (8192 // model.image_resolution[0]) ** 2)
    pictures, labels = splits.test[:: -(-len(splits.test) // count)]
    means = torch.cat([model.encoder(batch)[0] for batch in pictures.split(64)])
    names = Flowers102.classes if splits.dataset == "flowers102" else range(102)
    species = [str(names[label]) for label in labels.tolist()]
    writer.add_embedding(means, species, pictures, epoch, "test_latents")


def summary(metrics: dict[str, Any], folder: Path, fallback: str | None = None) -> str:
    """Return what a run prints at its end: how good the model is, and where to look.

    ``fallback`` says why the run is on synthetic flowers without having been asked to.
    """
    test, pca, frechet = metrics["test"], metrics["pca"], metrics["samples"]["frechet"]
    better = pca["test"] - test["squared_error"]
    return (
        f"Test pictures: squared error {test['squared_error']:.1f} per image "
        f"({test['squared_error_mean']:.1f} through the mean, PSNR {test['psnr']:.1f} dB), "
        f"KL {test['kl']:.1f} nats, {test['active_units']} active latent dimensions.\n"
        f"PCA with {pca['components']} components: {pca['test']:.1f}; the model is "
        f"{abs(better):.1f} {'better' if better > 0 else 'worse'}.\n"
        f"Fréchet distance of new flowers to the test pictures (lower is better): drawn from the "
        f"fitted latents {frechet['fitted']:.1f}, from the prior {frechet['prior']:.1f}; "
        f"reconstructions have {frechet['reconstructions']:.1f}.\n"
        f"{metrics['epochs']} epochs in {metrics['seconds']:.0f} s. Pictures, metrics and the "
        f"model are in {folder}\n"
        f"Look at the run with: tensorboard --logdir {shlex.quote(str(folder.parent))}"
        + (f"\nwarning: {fallback}. {SYNTHETIC}" if fallback else "")
    )
