"""How fast training is, on Linux: ``python -m benchmarks.training_speed`` (an hour).

This repository, the plain way of the post and most tutorials, and pythae (where it is installed)
train the post's network in turns, each in a new process.
"""

import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import tyro
from torch.optim import Adam, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from torchvision.datasets import Flowers102
from torchvision.transforms import Compose, Resize, ToTensor
from torchvision.utils import make_grid

from datasets.memory import InMemory
from vae.command_line import check, one_line_errors
from vae.losses import ELBOLoss
from vae.run import keep_freed_memory
from vae.vae import VAE
from vae_training import DATASETS, Options, train

PIPELINE = Compose([Resize((32, 32)), ToTensor()])
TRAINING_PICTURES = 1020  # of Flowers102
STEPS = 16  # in an epoch of them, with batches of 64
WHOLE_RUN = 500  # epochs, as in the post

# A way of training. It takes the epochs and the folder of the data set from the options, and may
# write to the folder given.
Way = Callable[[Options, Path], Any]


# The ways that are compared; here it is vae_training.train.


def post_network() -> VAE:
    """Return the post's network, untrained."""
    return VAE(image_resolution=(32, 32), latent_size=10, image_channels=3)


def train_plainly(options: Options, folder: Path) -> None:
    """Train as the post and most tutorials do: decode each picture anew, log at every step."""
    training_data = Flowers102(options.data_root, "train", PIPELINE)
    test_data = Flowers102(options.data_root, "test", PIPELINE)
    train_dataloader = DataLoader(training_data, batch_size=64, shuffle=True)
    test_dataloader = DataLoader(test_data, batch_size=5, shuffle=True)

    model = post_network()
    loss = ELBOLoss(beta=0.1)
    optimiser = Adam(model.parameters(), lr=0.0001)
    batch_num = 0
    with SummaryWriter(folder) as writer:
        for epoch in range(options.epochs):
            for train_features, _ in train_dataloader:
                optimiser.zero_grad()
                reconstructions, means, log_vars = model(train_features)
                _, kl_loss, reconstruction_loss, total_loss = loss(
                    train_features, reconstructions, means, log_vars
                )
                losses = {
                    "KL Loss": kl_loss,
                    "Reconstruction Loss": reconstruction_loss,
                    "Total Loss": total_loss,
                }
                writer.add_scalars("loss", losses, batch_num)
                total_loss.backward()
                optimiser.step()
                batch_num += 1

            test_features, _ = next(iter(test_dataloader))
            reconstructions, means, log_vars = model(test_features)
            writer.add_image("originals", make_grid(test_features), epoch)
            writer.add_image("reconstructions", make_grid(reconstructions), epoch)
            print(f"{epoch}: {reconstruction_loss:.2f}, {kl_loss:.2f}, {total_loss:.2f}")


def train_with_pythae(options: Options, folder: Path) -> None:
    """Train the post's layers with pythae, whose batch size and learning rate are the post's."""
    from pythae.models import VAE as PythaeVAE
    from pythae.models import VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.pipelines import TrainingPipeline
    from pythae.trainers import BaseTrainerConfig

    # Our layers return tensors, and pythae asks for them by name.
    def name_posterior(_module: Any, _args: Any, output: Any) -> Any:
        mean, log_var = output
        return ModelOutput(embedding=mean, log_covariance=log_var)

    def name_reconstruction(_module: Any, _args: Any, output: Any) -> Any:
        return ModelOutput(reconstruction=output)

    network = post_network()
    network.encoder.register_forward_hook(name_posterior)
    network.decoder.register_forward_hook(name_reconstruction)
    model = PythaeVAE(VAEConfig((3, 32, 32), latent_dim=10))
    model.encoder = network.encoder
    model.decoder = network.decoder

    training_data = InMemory(Flowers102(options.data_root, "train", PIPELINE), progress=False)
    pictures = training_data.images(slice(None)).contiguous()
    config = BaseTrainerConfig(str(folder), num_epochs=options.epochs, no_cuda=True)
    TrainingPipeline(model, config)(pictures)


def take_steps(options: Options, _: Path) -> None:
    """Take an epoch's steps as they are here, on a batch that lies ready."""
    model = post_network().to(memory_format=torch.channels_last)
    optimiser = Adam(model.parameters(), lr=0.0001, fused=True)
    batch = torch.rand(64, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    take_steps_with(model, optimiser, batch, options.epochs)


def take_steps_plainly(options: Options, _: Path) -> None:
    """Take an epoch's steps as they are in the post, on a batch that lies ready."""
    model = post_network()
    optimiser = Adam(model.parameters(), lr=0.0001)
    batch = torch.rand(64, 3, 32, 32)
    take_steps_with(model, optimiser, batch, options.epochs)


def take_steps_with(model: VAE, optimiser: Optimizer, batch: torch.Tensor, epochs: int) -> None:
    """Take the steps of some epochs: forward, loss, backward, optimiser."""
    keep_freed_memory()
    loss = ELBOLoss(beta=0.1)
    for _ in range(STEPS * epochs):
        optimiser.zero_grad()
        reconstructions, means, log_vars = model(batch)
        _, _, _, total_loss = loss(batch, reconstructions, means, log_vars)
        total_loss.backward()
        optimiser.step()


# What makes it fast, by the name of its row in the second table.
IN_MEMORY = "pictures decoded once, and kept"
CHANNELS_LAST = "channels last in memory"
FUSED = "`Adam(fused=True)`"
KEPT_MEMORY = "a step's memory kept for the next"
PARTS = (IN_MEMORY, CHANNELS_LAST, FUSED, KEPT_MEMORY)


def train_without(part: str, options: Options, _folder: Path) -> None:
    """Train with all ``PARTS`` but one, or with all of them, and log nothing."""
    if part != KEPT_MEMORY:
        keep_freed_memory()
    training_data: Dataset = Flowers102(options.data_root, "train", PIPELINE)
    if part != IN_MEMORY:
        training_data = InMemory(training_data, progress=False)
    order = torch.contiguous_format if part == CHANNELS_LAST else torch.channels_last
    model = post_network().to(memory_format=order)
    optimiser = Adam(model.parameters(), lr=0.0001, fused=part != FUSED)
    loss = ELBOLoss(beta=0.1)
    train_dataloader = DataLoader(training_data, batch_size=64, shuffle=True)
    for _epoch in range(options.epochs):
        for train_features, _labels in train_dataloader:
            train_features = train_features.contiguous(memory_format=order)
            optimiser.zero_grad()
            reconstructions, means, log_vars = model(train_features)
            _, _, _, total_loss = loss(train_features, reconstructions, means, log_vars)
            total_loss.backward()
            optimiser.step()


def eight_times(root: Path | str, split: str, transform: Any = None) -> ConcatDataset:
    """Return a split of Flowers102, the training pictures eight times over."""
    dataset = Flowers102(root, split, transform)
    copies = 8 if split == "train" else 1
    return ConcatDataset([dataset] * copies)


# Here, where every new process comes past: --dataset may name it.
DATASETS["eight"] = eight_times


# What is measured.


@dataclass(frozen=True)
class Figures:
    """What was measured of one process: ``run`` and ``epoch`` in seconds, ``memory`` in MiB."""

    run: float  # from the start of the process to its end
    epoch: float
    memory: float  # its peak


@dataclass
class Measured:
    """What was measured of one way, a figure for each round."""

    run: list[float] = field(default_factory=list)
    epoch: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)

    def add(self, figures: Figures) -> None:
        """Add the figures of one more round."""
        self.run.append(figures.run)
        self.epoch.append(figures.epoch)
        self.memory.append(figures.memory)


# Trains in one way, and returns what was measured of it.
Measure = Callable[[Way, Options], Figures]


def measure_in_new_process(way: Way, options: Options) -> Figures:
    """Train in a process that has done nothing before."""
    began = time.perf_counter()
    # Not forked: a fork would begin with the memory of this process, and with its imports done.
    with ProcessPoolExecutor(1, torch.multiprocessing.get_context("spawn")) as pool:
        figures = pool.submit(measure_here, way, options).result()
    return replace(figures, run=time.perf_counter() - began)


def measure_here(way: Way, options: Options) -> Figures:
    """Train in this process; an epoch is timed from its first step to the next one's."""
    began = time.perf_counter()
    steps: list[float] = []  # when each of them ended
    hook = register_optimizer_step_post_hook(lambda *_: steps.append(time.perf_counter()))
    with hook, TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        way(options, Path(folder))
    run = time.perf_counter() - began

    steps_per_epoch = len(steps) // options.epochs
    epochs = options.epochs - 1  # which have a next one
    first_step = steps[0]
    first_step_of_last_epoch = steps[epochs * steps_per_epoch]
    epoch = (first_step_of_last_epoch - first_step) / epochs
    return Figures(run, epoch, peak_memory())


def peak_memory() -> float:
    """Return the most memory that this process has had at a time so far, in MiB."""
    # Not getrusage: it gives a new process the peak of the one that started it.
    status = Path("/proc/self/status").read_text()
    kibibytes = re.findall(r"VmHWM:\s*(\d+) kB", status)[0]
    return int(kibibytes) / 1024


# The table.


def compare(
    options: Options,
    rounds: int,
    runs: int,
    with_pythae: bool,
    measure: Measure = measure_in_new_process,
) -> str:
    """Measure all ways in turns and return the table in Markdown.

    ``rounds`` is how often each way is measured with the options' epochs, ``runs`` how often
    whole runs are. What was never measured has no row.
    """
    eight = replace(options, dataset="eight")
    whole = replace(options, epochs=WHOLE_RUN)

    # Pictures are read here, and kept for all runs to come.
    measure(train, replace(options, epochs=2))
    measure(train, replace(eight, epochs=2))

    here, here_eight, plain = Measured(), Measured(), Measured()
    steps, plain_steps, pythae = Measured(), Measured(), Measured()
    for _ in range(rounds):
        here.add(measure(train, options))
        here_eight.add(measure(train, eight))
        plain.add(measure(train_plainly, options))
        steps.add(measure(take_steps, options))
        plain_steps.add(measure(take_steps_plainly, options))
        if with_pythae:
            pythae.add(measure(train_with_pythae, options))

    whole_here, whole_plain = Measured(), Measured()
    for _ in range(runs):
        whole_here.add(measure(train, whole))
        whole_plain.add(measure(train_plainly, whole))

    lines = [
        "| median of what | here | other way | ratio | lowest | highest | at most |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    if runs:
        lines.append(row("whole run of 500 epochs, s", whole_here.run, whole_plain.run, 0.43))
    lines.append(row("an epoch's steps alone, s", steps.epoch, plain_steps.epoch, 0.78))
    if with_pythae:
        lines.append(row("an epoch, beside pythae's, s", here.epoch, pythae.epoch, 0.85))
    lines.append(row("peak memory, MiB", here.memory, plain.memory, 1.15))
    # This one has no other way, so that its ratio is the figure itself.
    growth = growth_per_picture(here.memory, here_eight.memory)
    lines.append(row("memory for each picture more, KiB", growth, [1.0] * rounds, 8))
    return "\n".join(lines)


def compare_parts(options: Options, rounds: int, measure: Measure = measure_in_new_process) -> str:
    """Measure training without each of ``PARTS`` in turns and return the table in Markdown."""
    ways = {part: partial(train_without, part) for part in ("", *PARTS)}
    measured = {part: Measured() for part in ways}
    for _ in range(rounds):
        for part, way in ways.items():
            measured[part].add(measure(way, options))

    lines = [
        "| an epoch, s | with it | without | ratio | lowest | highest |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [row(part, measured[""].epoch, measured[part].epoch) for part in PARTS]
    return "\n".join(lines)


def row(name: str, here: list[float], other: list[float], *at_most: float) -> str:
    """Compare what was measured in the same rounds.

    The row has the two medians, the median, lowest and highest of the rounds' ratios, and how much
    of the other way's is aimed for, if anything is.
    """
    ratios = [one / two for one, two in zip(here, other, strict=True)]
    numbers = [
        median(here),
        median(other),
        median(ratios),
        min(ratios),
        max(ratios),
        *at_most,
    ]
    cells = [name, *(f"{number:.3g}" for number in numbers)]
    return f"| {' | '.join(cells)} |"


def growth_per_picture(once: list[float], eightfold: list[float]) -> list[float]:
    """Return by how many KiB a training picture more raises the peak, from peaks in MiB.

    The peaks are those of the same rounds, with the training pictures once and eight times over.
    """
    more_pictures = 7 * TRAINING_PICTURES
    peaks = zip(once, eightfold, strict=True)
    return [(eight - one) * 1024 / more_pictures for one, eight in peaks]


def main(
    data_root: Path = Options.data_root,  # folder of flowers-102, downloaded to it if missing
    runs: int = 5,  # pairs of whole runs
    rounds: int = 15,  # how often all else is measured
) -> None:
    """Measure, and print two tables in Markdown."""
    check("--rounds", rounds, low=1)
    options = Options(dataset="flowers102", data_root=data_root, epochs=11, device="cpu")
    with_pythae = find_spec("pythae") is not None
    print(compare(options, rounds, runs, with_pythae), flush=True)
    print()
    print(compare_parts(options, rounds))


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, prog="python -m benchmarks.training_speed", description=__doc__)
