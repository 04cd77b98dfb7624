"""Train the post's variational autoencoder: ``python vae_training.py``."""

import argparse
import gc
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torchvision
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.datasets import Flowers102
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from datasets.pictures import DATASETS, Pictures, Splits, augment, load_splits, shuffled_loader
from vae.checkpoint import is_finite, load_checkpoint, replace_atomically, save_checkpoint
from vae.evaluation import evaluate, pca_squared_error
from vae.losses import BETA_SCHEDULES, LIKELIHOODS, ELBOLoss, beta_at
from vae.vae import VAE, find_device, first_line

ROOT = Path(__file__).parent
EVALUATE_EVERY = 10
"""Epochs between two looks at the validation split."""


def option(group: str, default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    """Declare one option: a field of ``Options`` and a line of ``--help``."""
    metadata = {"group": group, "help": help, "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Options:
    """One experiment. The defaults are the post's.

    Raises:
        ValueError: for a value that no experiment can have.
    """

    image_size: int = option("model", 32, "height and width in pixels, a multiple of 8")
    latent_size: int = option("model", 10, "latent dimensions")
    batch_norm: bool = option("model", False, "batch normalisation in encoder and decoder")

    likelihood: str = option("loss", "gaussian", "reconstruction loss", LIKELIHOODS)
    beta: float = option("loss", 0.1, "weight of the KL divergence; 1 is the ELBO")
    beta_schedule: str = option("loss", "constant", "how beta gets there", BETA_SCHEDULES)
    warmup_epochs: int = option("loss", 100, "length of the linear warm-up from 0")
    cycles: int = option("loss", 4, "cycles of the cyclical schedule")

    epochs: int = option("training", 500, "passes over the training pictures")
    batch_size: int = option("training", 64, "pictures in a batch")
    learning_rate: float = option("training", 1e-4, "of Adam")
    lr_schedule: str = option("training", "constant", "cosine: down to 0", ("constant", "cosine"))
    augment: bool = option("training", False, "random flips, and shifts by 1/16 of the size")
    seed: int = option("training", 0, "of weights, order and noise; a run repeats exactly")
    device: str = option("training", "auto", "cpu, cuda, mps ...; auto: an accelerator if any")

    dataset: str = option("data", "auto", "auto: flowers102, or synthetic if offline", DATASETS)
    data_root: str = option("data", str(ROOT / "datasets"), "folder that holds flowers-102")

    log_dir: str = option("output", str(ROOT / "vae" / "runs"), "folder of all runs")
    run_name: str = option("output", "", "folder of this run (default: date and time)")
    checkpoint_every: int = option("output", 10, "epochs between two checkpoints")

    def __post_init__(self) -> None:
        """Check every value, so that nothing starts that cannot end well."""
        for each in fields(self):
            value, choices = getattr(self, each.name), each.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(
                    f"{flag(each.name)} is {value!r}: choose from {', '.join(choices)}"
                )
        if self.image_size < 8 or self.image_size % 8:
            raise ValueError(f"--image-size is {self.image_size}: a multiple of 8 is needed")
        for name in ("latent_size", "epochs", "batch_size", "cycles", "checkpoint_every"):
            if not 1 <= getattr(self, name) <= 10**6:
                raise ValueError(f"{flag(name)} is {getattr(self, name)}: 1 to 1000000 is needed")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"--learning-rate is {self.learning_rate}: a number above 0 is needed")
        if not (math.isfinite(self.beta) and self.beta >= 0):
            raise ValueError(f"--beta is {self.beta}: a number of at least 0 is needed")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed is {self.seed}: 0 to 2**32 - 1 is needed")
        if self.beta_schedule == "linear" and not 0 <= self.warmup_epochs <= self.epochs:
            raise ValueError(
                f"--warmup-epochs is {self.warmup_epochs}: 0 to {self.epochs} (--epochs) is needed"
            )
        if (
            not re.fullmatch(r"[\w.+=-]*", self.run_name)
            or self.run_name.strip(".") != self.run_name
        ):
            raise ValueError(
                f"--run-name is {self.run_name!r}: letters, digits and _ . + = - are needed, "
                "with no dot first or last"
            )


PRESETS: dict[str, dict[str, Any]] = {
    "post": {},
    # Chosen on the validation split; results/practical_aspects.md has what each part buys.
    "best": {"learning_rate": 2e-3, "lr_schedule": "cosine", "augment": True},
}


class Training:
    """What changes while a run goes on: model, optimiser, random states and position.

    Args:
        options: the experiment.
        splits: the pictures, of ``options.image_size``.

    Raises:
        ValueError: if the device is not there or the pictures have another size.
    """

    def __init__(self, options: Options, splits: Splits) -> None:
        height, width, channels = splits.train.pixels.shape[1:]
        if (height, width) != (options.image_size, options.image_size):
            raise ValueError(
                f"the pictures are {height}x{width}, --image-size is {options.image_size}: "
                "load the pictures at the size of the model"
            )
        # A block that nothing touches: once one of 32 MB has been freed, glibc keeps the memory of
        # a step's activations for the next step, which else takes and faults it in anew each time.
        torch.empty(2**25 - 2**13, dtype=torch.uint8)
        self.options = options
        self.device = find_device(options.device)
        self.splits = Splits(*(split.to(self.device) for split in splits[:3]), *splits[3:])
        self.checksum = pictures_checksum(splits)
        self.config = asdict(options) | {
            "image_resolution": [height, width],
            "image_channels": channels,
            "dataset": splits.dataset,
        }

        # Weights, noise and order each get a seed of their own: equal ones would be correlated.
        seeds = torch.Generator().manual_seed(options.seed)
        weights, noise, shuffle, looks = torch.randint(2**32, (4,), generator=seeds).tolist()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(weights)
            model = VAE((height, width), options.latent_size, channels, options.batch_norm)
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.loss = ELBOLoss(options.beta, options.likelihood)
        self.optimiser = torch.optim.Adam(
            self.model.parameters(), lr=options.learning_rate, fused=True
        )
        self.noise = torch.Generator(self.device).manual_seed(noise)
        self.shuffle = torch.Generator().manual_seed(shuffle)
        self.looks_seed = looks
        self.loader = shuffled_loader(self.splits.train, options.batch_size, self.shuffle)
        self.epoch_batches = len(self.loader)

        self.epoch = self.batch = 0
        self.epoch_order = self.shuffle.get_state()
        self.started = time.perf_counter()

    @property
    def step(self) -> int:
        """Batches trained on since the start of the run."""
        return self.epoch * self.epoch_batches + self.batch

    def batches(self) -> Iterator[Tensor]:
        """Yield the images of the epoch's batches that have not been trained on yet."""
        self.shuffle.set_state(self.epoch_order)
        for images, _ in islice(self.loader, self.batch, None):
            if self.options.augment:
                images = augment(images, self.options.image_size // 16, self.noise)
            yield images

    def follow_schedules(self) -> None:
        """Set beta and the learning rate for the next step."""
        options = self.options
        progress = self.step / (options.epochs * self.epoch_batches)
        warmup = options.warmup_epochs / options.epochs
        share = beta_at(progress, options.beta_schedule, min(warmup, 1.0), options.cycles)
        self.loss.beta = options.beta * share
        if options.lr_schedule == "cosine":
            rate = options.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
            self.optimiser.param_groups[0]["lr"] = rate

    def end_epoch(self) -> None:
        """Move to the start of the next epoch."""
        self.epoch, self.batch = self.epoch + 1, 0
        self.epoch_order = self.shuffle.get_state()

    def evaluate(self, pictures: Pictures) -> dict[str, Any]:
        """Return the metrics of ``vae.evaluation`` for a split, at the full beta."""
        loss = ELBOLoss(self.options.beta, self.options.likelihood)
        return evaluate(self.model, pictures.batches(), loss, self.look())

    def bar(self, show: bool) -> tqdm:
        """Return a progress bar over the epochs; none where nobody looks at a terminal."""
        total = self.options.epochs
        return tqdm(total=total, initial=self.epoch, unit="epoch", disable=None if show else True)

    def look(self) -> torch.Generator:
        """Return noise for looking at the model, the same each time, apart from the training's."""
        return torch.Generator(self.device).manual_seed(self.looks_seed)

    def save(self, folder: Path) -> None:
        """Write ``checkpoint.pt`` and keep the one before it as ``checkpoint.previous.pt``.

        Raises:
            FloatingPointError: if a weight is not finite; the checkpoint stays as it was.
            OSError: if the folder cannot be written to; the checkpoint stays as it was.
        """
        if not is_finite(self.model):
            raise FloatingPointError(f"a weight is no longer finite after epoch {self.epoch - 1}")
        path = folder / "checkpoint.pt"
        if path.exists():
            with replace_atomically(folder / "checkpoint.previous.pt") as file:
                file.write(path.read_bytes())
        events = {
            str(file.relative_to(folder)): file.stat().st_size
            for file in folder.rglob("events.out.tfevents.*")
        }
        checkpoint = {
            "model": self.model.state_dict(),
            "config": self.config,
            "optimiser": self.optimiser.state_dict(),
            "epoch": self.epoch,
            "batch": self.batch,
            "random": {"noise": self.noise.get_state(), "order": self.epoch_order},
            "seconds": time.perf_counter() - self.started,
            "pictures": self.checksum,
            "device": self.device.type,
            "events": events,
        }
        save_checkpoint(checkpoint, path)

    def begin(self, folder: Path, checkpoint: dict[str, Any] | None) -> SummaryWriter:
        """Go on from ``checkpoint``, or write the first one; return TensorBoard's writer."""
        if checkpoint is None:
            self.save(folder)
        else:
            self.restore(checkpoint, folder)
            # If it was the one before a damaged one, the next save must not keep that instead.
            save_checkpoint(checkpoint, folder / "checkpoint.pt")
        return SummaryWriter(folder)

    def restore(self, checkpoint: dict[str, Any], folder: Path) -> None:
        """Go on in ``folder`` from ``checkpoint`` as if there had been no interruption.

        Raises:
            ValueError: if it is damaged, or from training on other pictures.
        """
        if checkpoint.get("device") != self.device.type:
            raise ValueError(
                f"the run began on {checkpoint.get('device')} and its random numbers go on only "
                f"there: --device {self.device.type} cannot"
            )
        if checkpoint.get("pictures") != self.checksum:
            raise ValueError(
                "the checkpoint is from training on other pictures: give --data-root the folder "
                "that the run began with"
            )
        try:
            self.model.load_state_dict(checkpoint["model"])
            self.optimiser.load_state_dict(checkpoint["optimiser"])
            self.noise.set_state(checkpoint["random"]["noise"])
            self.epoch_order = checkpoint["random"]["order"]
            self.shuffle.set_state(self.epoch_order)
            self.epoch, self.batch = int(checkpoint["epoch"]), int(checkpoint["batch"])
            self.started = time.perf_counter() - checkpoint["seconds"]
            events = {name: int(size) for name, size in checkpoint["events"].items()}
            if self.epoch < 0 or not 0 <= self.batch < self.epoch_batches:
                raise ValueError(f"epoch {self.epoch}, batch {self.batch} is not in the run")
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise ValueError(f"the checkpoint cannot be resumed from: {reason}") from None
        if not is_finite(self.model):
            raise ValueError("the checkpoint holds weights that are not finite")
        drop_later_events(folder, events)
        for temporary in folder.glob(".*.*.*"):
            temporary.unlink()


def train(
    options: Options,
    splits: Splits,
    folder: Path,
    checkpoint: dict[str, Any] | None = None,
    progress: bool = True,
) -> tuple[VAE, dict[str, Any]]:
    """Run the post's training loop and leave its results in ``folder``.

    Args:
        options: the experiment.
        splits: the pictures, of ``options.image_size``.
        folder: receives TensorBoard events, checkpoints, ``metrics.json`` and pictures.
        checkpoint: what an interrupted run in the same folder left, to go on from there.
        progress: print a line for each epoch above a progress bar.

    Returns:
        The trained model, and the metrics that are in ``metrics.json``.

    Raises:
        ValueError: if the options, the pictures and the checkpoint do not fit together.
        FloatingPointError: if a loss or weight stops being finite; the last good checkpoint stays.
        StoppedError: after SIGINT or SIGTERM, once a checkpoint is written.
        Timeout: if another run holds the lock of ``folder`` (an ``OSError``, of ``filelock``).
        OSError: if ``folder`` cannot be written to.
    """
    training = Training(options, splits)
    model, loss, optimiser = training.model, training.loss, training.optimiser
    on_cpu = training.device.type == "cpu"

    with (
        run_lock(folder),
        training.begin(folder, checkpoint) as writer,
        StopRequest() as stop,
        training.bar(progress) as bar,
    ):
        test_batches = islice(test_pictures(training), training.epoch, None)
        while training.epoch < options.epochs:
            losses = []
            model.train()
            for train_features in training.batches():
                training.follow_schedules()
                # Step 1: zero the gradients
                optimiser.zero_grad()
                # Step 2: forward pass through the model
                reconstructions, means, log_vars = model(train_features, training.noise)
                # Step 3: calculate the loss
                _, kl_loss, reconstruction_loss, total_loss = loss(
                    train_features, reconstructions, means, log_vars
                )
                # Step 4: keep the losses for TensorBoard, on the device until the epoch ends
                losses.append(torch.stack((kl_loss, reconstruction_loss, total_loss)).detach())
                # Step 5: compute the gradients
                total_loss.backward()
                # Step 6: take the gradient descent step
                optimiser.step()
                training.batch += 1
                # Only on the CPU is the loss there to look at without waiting for the device.
                if stop.requested or (on_cpu and not math.isfinite(total_loss.item())):
                    break

            last_losses = write_losses(writer, training, losses)
            if training.batch == training.epoch_batches:
                # At the end of every epoch, create reconstructions of one batch of test data
                write_test_batch(writer, training, next(test_batches))
                writer.add_scalar("beta", loss.beta, training.step - 1)
                if progress:
                    bar.write(epoch_line(training.epoch, *last_losses))
                    bar.update()
                training.end_epoch()
                if training.epoch % EVALUATE_EVERY == 0:
                    write_evaluation(writer, training)
            # Once, because a signal may come between two looks.
            stopped_by = stop.requested
            if stopped_by or training.epoch % options.checkpoint_every == 0:
                writer.flush()
                training.save(folder)
            if stopped_by:
                raise StoppedError(stopped_by)

        if training.epoch % options.checkpoint_every:
            writer.flush()
            training.save(folder)
        return model, write_results(writer, training, folder)


def test_pictures(training: Training) -> Iterator[Tensor]:
    """Yield shuffled batches of 5 test pictures without end, in the same order for a seed."""
    order = torch.Generator().manual_seed(training.looks_seed)
    loader = shuffled_loader(training.splits.test, 5, order)
    while True:
        for images, _ in loader:
            yield images


def epoch_line(epoch: int, kl: float, reconstruction: float, total: float) -> str:
    """Return the line that the post prints for each epoch: the losses of its last batch."""
    return (
        f"Epoch: {epoch}, Reconstruction Loss: {reconstruction:.2f}, "
        f"KL Loss: {kl:.2f}, Total Loss: {total:.2f}"
    )


def write_losses(
    writer: SummaryWriter, training: Training, losses: list[Tensor]
) -> tuple[float, float, float]:
    """Write one point for each batch to TensorBoard and return the last batch's three losses.

    Raises:
        FloatingPointError: if one of them is not finite; it names the epoch and the batch.
    """
    first_batch = training.batch - len(losses)
    first_step = training.step - len(losses)
    for number, (kl, reconstruction, total) in enumerate(torch.stack(losses).tolist()):
        if not math.isfinite(total):
            raise FloatingPointError(
                f"the loss is {total} in epoch {training.epoch}, batch {first_batch + number} "
                f"(KL {kl}, reconstruction {reconstruction}): lower --learning-rate"
            )
        points = {"KL Loss": kl, "Reconstruction Loss": reconstruction, "Total Loss": total}
        writer.add_scalars("loss", points, first_step + number)
    return kl, reconstruction, total


@torch.no_grad()
def write_test_batch(writer: SummaryWriter, training: Training, test_features: Tensor) -> None:
    """Write a batch of test pictures and their reconstructions to TensorBoard."""
    training.model.eval()
    reconstructions, _, _ = training.model(test_features, training.look())
    writer.add_image("originals", make_grid(test_features), training.epoch)
    writer.add_image("reconstructions", make_grid(reconstructions), training.epoch)


@torch.no_grad()
def write_evaluation(writer: SummaryWriter, training: Training) -> None:
    """Write the validation metrics, test pairs and samples to TensorBoard."""
    metrics = training.evaluate(training.splits.val)
    for name in ("squared_error", "squared_error_mean", "psnr", "kl", "active_units"):
        writer.add_scalar(f"validation/{name}", metrics[name], training.epoch)
    for dimension, kl in enumerate(metrics["kl_per_dimension"]):
        writer.add_scalar(f"kl_per_dimension/{dimension:03}", kl, training.epoch)
    # Few and small: TensorBoard takes its time over each byte of a picture.
    writer.add_image("pairs", test_pairs(training, 16), training.epoch)
    samples = training.model.sample(16, training.look())
    writer.add_image("samples", make_grid(samples), training.epoch)


@torch.no_grad()
def test_pairs(training: Training, count: int) -> Tensor:
    """Return a grid: odd rows test pictures, even rows their reconstructions, as in the post."""
    test = training.splits.test
    originals = test[:: max(1, len(test) // count)][0][:count]
    training.model.eval()
    reconstructions, _, _ = training.model(originals, training.look())
    rows = zip(originals.split(8), reconstructions.split(8), strict=True)
    return make_grid(torch.cat([row for pair in rows for row in pair]))


def write_results(writer: SummaryWriter, training: Training, folder: Path) -> dict[str, Any]:
    """Measure the trained model and leave metrics and pictures in ``folder``.

    Returns:
        The metrics, as they are in ``metrics.json``.

    Raises:
        OSError: if ``folder`` cannot be written to.
    """
    options, model, splits = training.options, training.model.eval(), training.splits
    seconds = time.perf_counter() - training.started
    components = options.latent_size
    pca_error = pca_squared_error(splits.train.batches(), splits.test.batches(), components)
    metrics = {
        "dataset": splits.dataset,
        "epochs": training.epoch,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "train": training.evaluate(splits.train),
        "val": training.evaluate(splits.val),
        "test": training.evaluate(splits.test),
        "pca": {"components": components, "test": pca_error},
        "seconds": seconds,
        "device": str(training.device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        "config": training.config,
    }
    with replace_atomically(folder / "metrics.json") as file:
        file.write(json.dumps(metrics, indent=2).encode())
    with torch.no_grad():
        samples = make_grid(model.sample(64, training.look()))
    for name, grid in (("reconstructions", test_pairs(training, 32)), ("samples", samples)):
        with replace_atomically(folder / f"{name}.png") as file:
            save_image(grid, file, format="png")

    experiment = {
        each.name: getattr(options, each.name)
        for each in fields(Options)
        if each.metadata["group"] in ("model", "loss", "training")
    }
    compared = ("squared_error", "squared_error_mean", "psnr", "kl", "active_units")
    scores = {f"test/{name}": metrics["test"][name] for name in compared}
    writer.add_hparams(experiment | {"dataset": splits.dataset}, scores, run_name=".")
    write_latents(writer, training)
    return metrics


@torch.no_grad()
def write_latents(writer: SummaryWriter, training: Training) -> None:
    """Write test latents with thumbnails and species to TensorBoard's Projector."""
    test = training.splits.test
    # The Projector shows up to 8,192 x 8,192 pixels of thumbnails; a thousand are enough.
    count = min(1000, (8192 // training.options.image_size) ** 2)
    pictures, labels = test[:: max(1, -(-len(test) // count))]
    means = torch.cat([training.model.encode(batch)[0] for batch in pictures.split(64)])
    names = Flowers102.classes if training.splits.dataset == "flowers102" else range(102)
    species = [str(names[label]) for label in labels.tolist()]
    shutil.rmtree(Path(writer.log_dir) / "00000", ignore_errors=True)
    writer.add_embedding(means, metadata=species, label_img=pictures, tag="test_latents")


def pictures_checksum(splits: Splits) -> int:
    """Return a checksum of the training and test pictures."""
    train, test = (split.pixels.cpu().contiguous().numpy() for split in (splits.train, splits.test))
    return zlib.crc32(train, zlib.crc32(test))


def drop_later_events(folder: Path, events: dict[str, int]) -> None:
    """Cut TensorBoard's event files back to what they held at a checkpoint.

    Args:
        folder: the run's folder.
        events: the size in bytes of each event file at the checkpoint.
    """
    # TensorBoard's own way, purge_step, knows one step for all tags: pictures count in epochs,
    # losses in batches, and the files behind add_scalars are not told of it at all.
    for file in folder.rglob("events.out.tfevents.*"):
        size = events.get(str(file.relative_to(folder)))
        if size is None:
            file.unlink()
        elif size < file.stat().st_size:
            os.truncate(file, size)


class StoppedError(Exception):
    """Training was asked to stop, and stopped after a checkpoint."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_status = 128 + number

    def __str__(self) -> str:
        """Return the name of the signal."""
        return signal.Signals(self.args[0]).name


class StopRequest:
    """Remembers SIGINT and SIGTERM until the step is done; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.requested = 0
        self.handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        """Begin to listen. Signals reach only a program's main thread."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self.remember)
        return self

    def remember(self, number: int, _: Any) -> None:
        """Note the signal, and let a second SIGINT through."""
        self.requested = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_: object) -> None:
        """Give the signals back to whoever had them before."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def flag(name: str) -> str:
    """Return the command-line spelling of a field of ``Options``."""
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> None:
        """Print one line and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def parser() -> Parser:
    """Return the command line: one option for each field of ``Options``, and the run's name."""
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, default="post", help="default: post")
    groups: dict[str, Any] = {}
    for each in fields(Options):
        name, text = each.metadata["group"], each.metadata["help"]
        group = groups.setdefault(name, parser.add_argument_group(name))
        if each.default != "":
            text += f" (default: {each.default})"
        kind = (
            {"action": argparse.BooleanOptionalAction}
            if each.type is bool
            else {"type": each.type, "choices": each.metadata["choices"]}
        )
        group.add_argument(flag(each.name), default=argparse.SUPPRESS, help=text, **kind)
    output = groups["output"]
    output.add_argument("--overwrite", action="store_true", help="replace a run of the same name")
    output.add_argument("--resume", metavar="RUN", help="go on with a run: its name or its folder")
    return parser


def new_folder(options: Options, name: str, overwrite: bool) -> Path:
    """Return a new, empty folder for a run.

    Raises:
        ValueError: if a run of this name exists and is not to be replaced, or is being written to.
    """
    folder = Path(options.log_dir) / name
    if folder.exists():
        if not overwrite:
            raise ValueError(
                f"{folder} exists already: give another --run-name, --resume {name} to go on "
                "with it, or --overwrite to replace it"
            )
        # A run that ended before its first checkpoint has left its lock, or events beside it.
        if any(folder.iterdir()) and not any(
            (folder / name).exists() for name in ("checkpoint.pt", ".lock")
        ):
            raise ValueError(f"{folder} is not a run (no checkpoint.pt in it): it is not replaced")
        with run_lock(folder):
            shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def run_lock(folder: Path) -> FileLock:
    """Return the lock that whoever writes to a run's folder holds; a crash lets go of it."""
    return FileLock(folder / ".lock", timeout=0)


def find_checkpoint(folder: Path) -> dict[str, Any]:
    """Return a run's newest checkpoint that can be read.

    Raises:
        ValueError: if there is none.
    """
    try:
        return load_checkpoint(folder / "checkpoint.pt")
    except ValueError as error:
        if not (folder / "checkpoint.previous.pt").exists():
            raise
        print(f"warning: {error}; going on from the one before it", file=sys.stderr)
        return load_checkpoint(folder / "checkpoint.previous.pt")


def resumed_options(config: dict[str, Any], given: dict[str, Any]) -> Options:
    """Return the options of an interrupted run, with what may change as given now.

    Raises:
        ValueError: if ``given`` would make it another experiment.
    """
    known = {each.name for each in fields(Options)}
    try:
        before = Options(**{name: value for name, value in config.items() if name in known})
    except (TypeError, AttributeError) as error:
        raise ValueError(f"the checkpoint's options are not those of a run: {error}") from None
    free = {"data_root", "log_dir", "device", "checkpoint_every"}
    if before.beta_schedule == before.lr_schedule == "constant" and (
        given.get("epochs", before.epochs) >= before.epochs
    ):
        free.add("epochs")
    changes = [
        f"{flag(name)} {value} (the run has {getattr(before, name)})"
        for name, value in given.items()
        if name not in free and value != getattr(before, name)
    ]
    if changes:
        raise ValueError(
            f"a resumed run stays the same experiment, but was given {', '.join(changes)}: leave "
            "this out, or start a new run (--epochs may grow where both schedules are constant)"
        )
    return replace(before, **given)


def summary(metrics: dict[str, Any], folder: Path) -> str:
    """Return what a run prints at its end: how good the model is, and where to look."""
    test, pca = metrics["test"], metrics["pca"]
    better = pca["test"] - test["squared_error"]
    return (
        f"Test pictures: squared error {test['squared_error']:.1f} per image "
        f"({test['squared_error_mean']:.1f} through the mean, PSNR {test['psnr']:.1f} dB), "
        f"KL {test['kl']:.1f} nats, {test['active_units']} active latent dimensions.\n"
        f"PCA with {pca['components']} components: {pca['test']:.1f}; the model is "
        f"{abs(better):.1f} {'better' if better > 0 else 'worse'}.\n"
        f"{metrics['epochs']} epochs in {metrics['seconds']:.0f} s. Pictures, metrics and the "
        f"model are in {folder}\n"
        f"Look at the run with: tensorboard --logdir {shlex.quote(str(folder.parent))}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    command = parser()
    given = vars(command.parse_args(arguments))
    preset, overwrite, resume = (given.pop(name) for name in ("preset", "overwrite", "resume"))
    if overwrite and resume is not None:
        command.error("--resume goes on with a run and --overwrite replaces it: give one of them")
    try:
        checkpoint = None
        if resume is not None:
            folder = Path(given.get("log_dir", Options.log_dir)) / resume
            folder = folder if folder.is_dir() else Path(resume)
            checkpoint = find_checkpoint(folder)
            options = resumed_options(checkpoint["config"], PRESETS[preset] | given)
        else:
            options = Options(**PRESETS[preset] | given)
            name = options.run_name or datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
            if not overwrite and (Path(options.log_dir) / name).exists():
                new_folder(options, name, overwrite)
        find_device(options.device)
        size = (options.image_size, options.image_size)
        splits = load_splits(options.dataset, Path(options.data_root), size)
        if splits.fallback:
            print(f"warning: {fallback_notice(splits)}", file=sys.stderr)
        if resume is None:
            options = replace(options, dataset=splits.dataset)
            if splits.dataset == "synthetic" and "synthetic" not in name:
                name += "-synthetic"
            folder = new_folder(options, name, overwrite)
    except Timeout:
        command.error(f"another run is writing to {name}: wait for it, or stop it")
    except (ValueError, OSError) as error:
        command.error(str(error))

    try:
        _, metrics = train(options, splits, folder, checkpoint)
    except Timeout:
        command.error(f"another run is writing to {folder}: wait for it, or stop it")
    except ValueError as error:
        command.error(str(error))
    except (FloatingPointError, OSError) as error:
        kept = (folder / "checkpoint.pt").exists()
        after = f"The last good checkpoint is in {folder}" if kept else "There is no checkpoint yet"
        print(f"error: {error}. {after}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        print(f"error: {first_line(error)}: take a smaller model or batch", file=sys.stderr)
        return 1
    except StoppedError as stopped:
        again = shlex.join([sys.executable, sys.argv[0], "--resume", str(folder)])
        print(f"Stopped by {stopped}. Go on with:\n{again}")
        return stopped.exit_status
    print(summary(metrics, folder))
    if splits.fallback:
        print(f"warning: {fallback_notice(splits)}")
    return 0


def fallback_notice(splits: Splits) -> str:
    """Return what to say where the synthetic flowers stand in for the real ones."""
    return f"{splits.fallback}. This run is on SYNTHETIC flowers, not on photographs."


def leave_to_main(error: threading.ExceptHookArgs) -> None:
    """Keep a full disk in TensorBoard's thread to the one line that ``main`` prints of it."""
    if not isinstance(error.exc_value, OSError):
        threading.__excepthook__(error)


if __name__ == "__main__":
    # What was imported stays to the end, where looking it through for garbage takes a second.
    gc.freeze()
    threading.excepthook = leave_to_main
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("Stopped at once. --resume goes on from a run's last checkpoint", file=sys.stderr)
        sys.exit(130)
