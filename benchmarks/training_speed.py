"""Measure how fast training is, on Linux: ``python benchmarks/training_speed.py`` (40 minutes).

This repository, the plain way of most tutorials, and pythae (if it is installed) train the post's
network in turns, each in a new process. ``--runs 0`` leaves out whole runs: 10 minutes.
"""

import sys
import time

import torch

# ruff: noqa: E402 - the clock starts before the other imports, and a path leads to some of them
BEGAN = time.perf_counter()

import argparse
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from importlib import metadata, util
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from torch.optim import Adam, optimizer
from torch.utils.tensorboard import SummaryWriter
from torchvision.datasets import Flowers102
from torchvision.transforms import Compose, Resize, ToTensor
from torchvision.utils import make_grid

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from datasets import DATASETS, find_dataset
from datasets.preprocessing import InMemory
from vae.losses import ELBOLoss
from vae.run import one_line_errors
from vae.vae import VAE
from vae_training import Options, train

SIZE, ROUNDS, EPOCHS = (32, 32), 5, 11
NOTES = "<!-- notes -->"
# What may be at most how many times what else.
TARGETS = (
    ("process, whole run here", "process, whole run plain", 0.38),
    ("epoch, steps alone here", "epoch, steps alone plain", 0.70),
    ("epoch, here", "epoch, pythae", 0.85),
    ("MiB, here", "MiB, plain", 1.15),
    ("KiB for each picture more", "1", 8),
    ("start, here", "1", 1.6),
)


def plain_vae() -> VAE:
    """Return the same network with each ReLU before its pooling, as in the post."""
    model = VAE(SIZE, latent_size=10, image_channels=3)
    for number in (1, 2, 3):
        setattr(model.encoder, f"pool{number}", torch.nn.ReLU())
        setattr(model.encoder, f"act{number}", torch.nn.MaxPool2d(2))
    return model


def train_plainly(options: Options, logs: Path) -> None:
    """Train as the post and most tutorials do: decode each picture anew, log at every step."""
    transform = Compose([Resize(SIZE), ToTensor()])
    data, test_data = (Flowers102(options.data_root, each, transform) for each in ("train", "test"))
    loader = torch.utils.data.DataLoader(data, options.batch_size, shuffle=True)
    test_loader = torch.utils.data.DataLoader(test_data, 5, shuffle=True)
    model, loss = plain_vae(), ELBOLoss(beta=0.1)
    optimiser = Adam(model.parameters(), lr=1e-4)
    with SummaryWriter(logs) as writer:
        for epoch in range(options.epochs):
            for step, (x, _) in enumerate(loader, epoch * len(loader)):
                optimiser.zero_grad()
                _, kl, squares, total = loss(x, *model(x))
                writer.add_scalars("loss", {"KL": kl, "squares": squares, "total": total}, step)
                total.backward()
                optimiser.step()
            x, _ = next(iter(test_loader))
            writer.add_image("originals", make_grid(x), epoch)
            writer.add_image("reconstructions", make_grid(model(x)[0]), epoch)
            print(f"{epoch}: {squares:.2f}, {kl:.2f}, {total:.2f}")


def train_here(options: Options, logs: Path) -> None:
    """Train with this repository, everything on."""
    train(options, logs)


class EightTimes(Flowers102):
    """The training pictures eight times over."""

    def __len__(self) -> int:
        """Return the number of pictures."""
        return super().__len__() * (8 if self._split == "train" else 1)

    def __getitem__(self, index: int) -> Any:
        """Return a picture and its label."""
        return super().__getitem__(index % super().__len__())


def train_eight_times_as_many(options: Options, logs: Path) -> None:
    """Train with this repository on eight times as many pictures."""
    DATASETS["eight"] = EightTimes
    train(replace(options, dataset="eight"), logs)


def training_pictures(options: Options) -> InMemory:
    """Return Flowers102's training pictures in memory; they are decoded once for all runs."""
    dataset = find_dataset("flowers102", options.data_root)
    pipeline = Compose([Resize(SIZE), ToTensor()])
    return InMemory(dataset(split="train", transform=pipeline), progress=False)


def train_with_pythae(options: Options, logs: Path) -> None:
    """Train the plain network with pythae, whose batch size and learning rate are the post's."""
    from pythae import models, pipelines, trainers

    network, output = plain_vae(), models.base.base_utils.ModelOutput
    model = models.VAE(models.VAEConfig((3, *SIZE), latent_dim=10))
    model.encoder, model.decoder = network.encoder, network.decoder
    model.encoder.register_forward_hook(lambda _, x, y: output(embedding=y[0], log_covariance=y[1]))
    model.decoder.register_forward_hook(lambda _, z, x: output(reconstruction=x))
    config = trainers.BaseTrainerConfig(str(logs), num_epochs=options.epochs, no_cuda=True)
    images = training_pictures(options).images(slice(None))
    pipelines.TrainingPipeline(model, config)(images.contiguous())


def take_steps(options: Options, logs: Path, plain: bool = False) -> None:
    """Take an epoch's steps on a batch that lies ready: forward, loss, backward, optimiser."""
    torch.empty(2**25 - 2**13, dtype=torch.uint8)  # freed at once, as in vae/run.py
    order = torch.contiguous_format if plain else torch.channels_last
    model = (plain_vae() if plain else VAE(SIZE, 10, 3)).to(memory_format=order)
    loss, optimiser = ELBOLoss(beta=0.1), Adam(model.parameters(), lr=1e-4, fused=not plain)
    x = torch.rand(options.batch_size, 3, *SIZE).contiguous(memory_format=order)
    for _ in range(16 * options.epochs):
        optimiser.zero_grad()
        loss(x, *model(x))[-1].backward()
        optimiser.step()


def watch(trainer: Callable[..., None], options: Options) -> dict[str, float]:
    """Train, and return an epoch's seconds (from first step to first step), peak and start."""
    times: list[float] = []
    hook = optimizer.register_optimizer_step_post_hook(lambda *_: times.append(time.perf_counter()))
    with hook, TemporaryDirectory() as logs, redirect_stdout(sys.stderr):
        trainer(options, Path(logs))
    epoch = (times[-(len(times) // options.epochs)] - times[0]) / (options.epochs - 1)
    # Not getrusage: it gives a new process the peak of the one that started it.
    peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
    return {"epoch": epoch, "MiB": int(peak) / 1024, "start": times[0] - BEGAN}


def ratio_row(measured: dict[str, list[float]], name: str, other: str, target: float) -> str:
    """Compare what was measured, round by round, with a target."""
    ones, others = measured.get(name, []), measured.get(other, [])
    ratios = [one / two for one, two in zip(ones, others, strict=False)]
    if not ratios:
        return f"| {name} / {other} | - | - | - | - | ≤ {target} | not measured |"
    cells = " | ".join(f"{cell(ratios):.3g}" for cell in (median, min, max))
    verdict = "met" if median(ratios) <= target else "**not met**"
    return f"| {name} / {other} | {median(ones):.3g} | {cells} | ≤ {target} | {verdict} |"


def main() -> None:
    """Measure, print a table in Markdown, and write it into the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", default=Options.data_root, help="folder of flowers-102")
    parser.add_argument("--runs", type=int, default=5, help="pairs of whole runs (default: 5)")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "training_speed.md")
    given = parser.parse_args()
    choose = partial(Options, dataset="flowers102", data_root=given.data_root, device="cpu")
    short, whole = choose(epochs=EPOCHS), choose()
    # Decoded here, and kept for all runs.
    with TemporaryDirectory() as logs:
        train(replace(short, epochs=1), Path(logs))
        train_eight_times_as_many(replace(short, epochs=1), Path(logs, "eight"))
    ways: list[tuple[str, Callable[..., None], Options]] = [
        ("here", train_here, short),
        ("here with 8,160", train_eight_times_as_many, short),
        ("plain", train_plainly, short),
        ("steps alone here", take_steps, short),
        ("steps alone plain", partial(take_steps, plain=True), short),
    ]
    if util.find_spec("pythae"):
        ways.append(("pythae", train_with_pythae, short))
    pair = [("whole run here", train_here, whole), ("whole run plain", train_plainly, whole)]
    measured = {"1": [1.0] * ROUNDS}
    spawn = torch.multiprocessing.get_context("spawn")
    for way, trainer, options in [*ways * ROUNDS, *pair * given.runs]:
        began = time.perf_counter()
        with ProcessPoolExecutor(1, spawn) as pool:
            figures = pool.submit(watch, trainer, options).result()
        figures["process"] = time.perf_counter() - began
        for figure, value in figures.items():
            measured.setdefault(f"{figure}, {way}", []).append(value)
    peaks = zip(measured["MiB, here with 8,160"], measured["MiB, here"], strict=True)
    measured["KiB for each picture more"] = [(more - few) * 1024 / 7140 for more, few in peaks]
    cpu = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].split("\n")[0]
    names = [name for name in ("torch", "torchvision", "pythae") if util.find_spec(name)]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    table = f"""- Machine: {cpu}, {torch.get_num_threads()} threads; flowers102
- Versions: Python {sys.version.split()[0]}, {versions}
- Measured: {time.strftime("%Y-%m-%d %H:%M")} by `python {" ".join(sys.argv)}`

| | median | ratio | lowest | highest | target | |
| --- | --- | --- | --- | --- | --- | --- |
"""
    table += "\n".join(ratio_row(measured, *target) for target in TARGETS)
    print(table)
    notes = given.output.read_text().partition(NOTES)[2] if given.output.exists() else "\n"
    given.output.write_text(f"# Training speed\n\n{table}\n\n{NOTES}{notes}")


if __name__ == "__main__":
    with one_line_errors():
        main()
