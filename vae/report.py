"""What a run shows beyond the post: validation, pairs, samples, HParams, Projector, metrics."""

import json
import math
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid, save_image

from datasets.preprocessing import InMemory
from vae.evaluation import PCA, evaluate, evaluate_pca, evaluate_samples
from vae.latent import fit_latents
from vae.losses import ELBOLoss
from vae.run import FREE, Run, load_checkpoint, quote, replace_atomically
from vae.vae import VAE

Splits = tuple[InMemory, InMemory, InMemory]  # train, val and test

LOOK_EVERY = 10  # epochs between two looks at the validation split
COMPARED = ("squared_error", "squared_error_mean", "kl", "active_units")


def opening(run: Run, model: VAE, splits: Splits, epoch: int) -> str:
    """Return what a run says at its start: on what it is trained, where, and from which epoch."""
    options, parameters = run.options, sum(weight.numel() for weight in model.parameters())
    counts = "{:,} training, {:,} validation and {:,} test pictures".format(*map(len, splits))
    going = f"goes on at epoch {epoch} of" if epoch else "is trained for"
    return (
        f"{options.dataset}: {counts} of {options.image_size}x{options.image_size}\n"
        f"A VAE of {parameters:,} parameters {going} {options.epochs} epochs on "
        f"{run.device}\nIts folder: {run.folder}"
    )


@torch.no_grad()
def write_validation(
    writer: SummaryWriter, model: VAE, loss: ELBOLoss, splits: Splits, epoch: int
) -> None:
    """Write beta, and every ten epochs validation metrics, test pairs and samples."""
    writer.add_scalar("schedule/beta", loss.beta, epoch)
    if (epoch + 1) % LOOK_EVERY:
        return
    train, val, test = splits
    metrics = evaluate(model, val.batches(), loss)
    if not math.isfinite(metrics["total_loss"]):
        return  # Run.save or the report stops the run and says so.
    for name in COMPARED:
        writer.add_scalar(f"validation/{name}", metrics[name], epoch)
    writer.add_histogram("validation/kl_per_dimension", Tensor(metrics["kl_per_dimension"]), epoch)
    latents = fit_latents(model, (x[::4] for x in train.batches(256)))  # enough for a look
    # Few and small: TensorBoard takes its time over each byte of a picture.
    writer.add_image("samples", make_grid(model.decoder(latents.sample((16,)))), epoch)
    writer.add_image("samples_prior", make_grid(model.sample(16)), epoch)
    writer.add_image("test_pairs", test_pairs(model, test, 16), epoch)


def test_pairs(model: VAE, test: InMemory, count: int) -> Tensor:
    """Return a grid: odd rows test pictures, even rows their reconstructions, as in the post."""
    width, device = min(8, len(test)), next(model.parameters()).device
    count = min(count, len(test)) // width * width  # whole rows
    originals = test.images(slice(None, None, len(test) // count))[:count].to(device)
    reconstructions, _, _ = model(originals)
    rows = zip(originals.split(width), reconstructions.split(width), strict=True)
    return make_grid(torch.cat([row for pair in rows for row in pair]), nrow=width)


@torch.no_grad()
def report(run: Run, writer: SummaryWriter, model: VAE, splits: Splits) -> dict[str, Any]:
    """Measure the trained model, leave metrics and pictures in its folder; return the metrics."""
    options, seconds = run.options, time.perf_counter() - run.started
    model.eval()
    train, val, test = splits
    loss = ELBOLoss(options.beta, options.likelihood)
    named = {"train": train, "val": val, "test": test}
    scores = {name: evaluate(model, split.batches(), loss) for name, split in named.items()}
    if not math.isfinite(scores["train"]["total_loss"]):
        raise run.diverged(options.epochs)
    latents = fit_latents(model, train.batches())
    features = PCA(test.batches, 64)
    metrics: dict[str, Any] = {
        "dataset": options.dataset,
        "epochs": options.epochs,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        **scores,
        "samples": {"frechet": evaluate_samples(model, latents, test.batches, features)},
        "pca": evaluate_pca(train.batches, test.batches, options.latent_size, features),
        "seconds": seconds,
        "device": str(run.device),
        "versions": {"python": platform.python_version()}
        | {each.__name__: each.__version__ for each in (torch, torchvision)},
        "config": run.config,
    }
    with replace_atomically(run.folder / "metrics.json") as file:
        file.write(json.dumps(metrics, indent=2).encode())
    grids = {
        "reconstructions": test_pairs(model, test, 32),
        "samples": make_grid(model.decoder(latents.sample((64,)))),
        "samples_prior": make_grid(model.sample(64)),
    }
    for name, grid in grids.items():
        with replace_atomically(run.folder / f"{name}.png") as file:
            save_image(grid, file, format="png")

    experiment = {name: value for name, value in asdict(options).items() if name not in FREE}
    compared = {f"test/{name}": scores["test"][name] for name in COMPARED}
    writer.add_hparams(experiment, compared, run_name=".")
    write_latents(writer, model, test, options.epochs)
    # The last: where they are, all is done.
    fitted = {"mean": latents.mean.cpu(), "covariance": latents.covariance_matrix.cpu()}
    checkpoint = load_checkpoint(run.folder / "checkpoint.pt") | {"latents": fitted}
    with replace_atomically(run.folder / "checkpoint.pt") as file:
        torch.save(checkpoint, file)
    return metrics


def write_latents(writer: SummaryWriter, model: VAE, test: InMemory, epoch: int) -> None:
    """Write test latents with thumbnails and species to TensorBoard's Projector."""
    # The Projector shows up to 8,192 x 8,192 pixels of thumbnails; five hundred are enough.
    step = -(-len(test) // min(500, (8192 // model.image_resolution[0]) ** 2))
    pictures, labels = test.images(slice(None, None, step)), test.labels[::step]
    device = next(model.parameters()).device
    means = torch.cat([model.encoder(batch.to(device))[0] for batch in pictures.split(64)])
    names = test.classes
    if names is not None and all(label in range(len(names)) for label in labels):
        labels = [names[label] for label in labels]
    thumbnails = pictures[:, : 3 if pictures.shape[1] >= 3 else 1]  # as many as it can show
    writer.add_embedding(means, [str(label) for label in labels], thumbnails, epoch, "test_latents")


def summary(metrics: dict[str, Any], folder: Path) -> str:
    """Return what a run prints at its end: how good the model is, and where to look."""
    test, pca, frechet = metrics["test"], metrics["pca"], metrics["samples"]["frechet"]
    better = pca["squared_error"] - test["squared_error"]
    return (
        f"Test pictures of {metrics['dataset']}: squared error {test['squared_error']:.1f} per "
        f"image ({test['squared_error_mean']:.1f} through the mean), "
        f"KL {test['kl']:.1f} nats, {test['active_units']} active latent dimensions.\n"
        f"PCA with {pca['components']} components: {pca['squared_error']:.1f}; the model is "
        f"{abs(better):.1f} {'better' if better > 0 else 'worse'}.\n"
        f"Fréchet distance of new pictures to the test pictures (lower is better): drawn from the "
        f"fitted latents {frechet['fitted']:.1f}, from the prior {frechet['prior']:.1f}; "
        f"reconstructions have {frechet['reconstructions']:.1f}, pictures drawn with PCA "
        f"{pca['frechet']['samples']:.1f}.\n"
        f"{metrics['epochs']} epochs in {metrics['seconds']:.0f} s. Pictures, metrics and the "
        f"model are in {folder}\n"
        f"Look at the run with: {quote(['tensorboard', '--logdir', str(folder.parent)])}"
    )
