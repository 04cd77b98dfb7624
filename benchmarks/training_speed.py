"""Measure how fast training is, on Linux: ``python benchmarks/training_speed.py`` (40 minutes).

This repository, the plain way of most tutorials, and pythae (if it is installed) train the post's
network on the same pictures, in turns, so that whatever else the machine does meets all of them;
ratios are taken within a round. ``--runs 0`` leaves out the whole runs, and takes 5 minutes.
"""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from timeit import timeit
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.optim import Adam
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from torchvision.datasets import Flowers102, ImageFolder
from torchvision.transforms import Compose, Resize, ToTensor
from torchvision.utils import make_grid

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from datasets import flowers102, synthetic  # noqa: E402
from datasets.pictures import Pictures, Splits, whole_batch  # noqa: E402
from datasets.preprocessing import decode_pictures  # noqa: E402
from vae.losses import ELBOLoss  # noqa: E402
from vae.training.command_line import Parser, one_line_errors  # noqa: E402
from vae.training.options import Options  # noqa: E402
from vae.training.run import find_device  # noqa: E402
from vae.vae import VAE  # noqa: E402
from vae_training import train  # noqa: E402

BATCH = Options.batch_size
SIZE = (32, 32)
# What may be how much at most, or how many times as much as what else.
TARGETS = (
    ("whole run, here", "whole run, the plain way", 0.38),
    ("raw steps, here", "raw steps, the plain way", 0.70),
    ("epoch, here", "epoch, pythae", 0.85),
    ("peak MiB, here", "peak MiB, the plain way", 1.15),
    ("KiB a picture from 1,020 to 8,160", "", 8),
    ("start to first step, warm cache", "", 1.6),
)
ACCELERATOR_TARGET = ("epoch on an accelerator", "", 10 / 500)
NOTES = "<!-- notes -->"
# A run that ends with its first step, and prints the seconds since PyTorch was imported.
FIRST_STEP = """
import os, time, torch
began = time.perf_counter()
import vae_training

def stop(*_):
    print(time.perf_counter() - began, flush=True)
    os._exit(0)

torch.optim.optimizer.register_optimizer_step_post_hook(stop)
vae_training.main()
"""


def write_files(folder: Path, count: int | None) -> None:
    """Write ``count`` synthetic flowers of each split, or all, as 64x64 JPEG files."""
    for split in synthetic.SPLITS:
        (folder / split / "flowers").mkdir(parents=True)
        indices = None if count is None else range(count)
        for number, picture in enumerate(synthetic.draw_flowers(split, (64, 64), indices)):
            Image.fromarray(picture).save(folder / split / "flowers" / f"{number:05}.jpg")


def decode_splits(folder: Path, times: int = 1) -> Splits:
    """Return all pictures in memory; those for training are decoded ``times`` times over."""
    splits = []
    for split in synthetic.SPLITS:
        paths = sorted((folder / split).rglob("*.jpg"))
        if flowers102.is_on_disk(folder):
            paths, _ = flowers102.find_pictures(folder, split)
        pixels = torch.from_numpy(decode_pictures(paths * (times if split == "train" else 1), SIZE))
        splits.append(Pictures(pixels, torch.zeros(len(pixels), dtype=torch.int64)))
    return Splits(*splits, "synthetic", None)


def plain_vae() -> VAE:
    """Return the same network with each ReLU before its pooling, as in the post."""
    model = VAE(SIZE, latent_size=10, image_channels=3)
    layers = model.encoder
    layers.pool1, layers.act1 = layers.act1, layers.pool1
    layers.pool2, layers.act2 = layers.act2, layers.pool2
    layers.pool3, layers.act3 = layers.act3, layers.pool3
    return model


def plain_data(folder: Path, split: str) -> Dataset:
    """Return torchvision's data set, which decodes a picture each time it is asked for it."""
    transform = Compose([Resize(SIZE), ToTensor()])
    if flowers102.is_on_disk(folder):
        return Flowers102(folder, split, transform)
    return ImageFolder(folder / split, transform)


def train_plainly(folder: Path, epochs: int, log_dir: Path) -> None:
    """Train as the post and most tutorials do: decode each picture anew, log at every step."""
    loader = DataLoader(plain_data(folder, "train"), BATCH, shuffle=True)
    test_batches = iter(DataLoader(plain_data(folder, "test"), 5, shuffle=True))
    model, loss = plain_vae(), ELBOLoss(beta=0.1)
    optimiser = Adam(model.parameters(), lr=1e-4)
    with SummaryWriter(log_dir) as writer:
        for epoch in range(epochs):
            for step, (x, _) in enumerate(loader, epoch * len(loader)):
                optimiser.zero_grad()
                _, kl, reconstruction, total = loss(x, *model(x))
                points = {"KL": kl, "reconstruction": reconstruction, "total": total}
                writer.add_scalars("loss", points, step)
                total.backward()
                optimiser.step()
            x, _ = next(test_batches)
            writer.add_image("originals", make_grid(x), epoch)
            writer.add_image("reconstructions", make_grid(model(x)[0]), epoch)
            print(f"Epoch {epoch}: {reconstruction:.2f} + {kl:.2f} gives {total:.2f}")


def train_here(
    folder: Path, epochs: int, log_dir: Path, times: int = 1, device: str = "cpu"
) -> None:
    """Train with this repository, everything on."""
    train(Options(epochs=epochs, device=device), decode_splits(folder, times), log_dir)


def train_with_pythae(folder: Path, epochs: int, log_dir: Path) -> None:
    """Train with pythae's ``VAE`` and ``BaseTrainer``; the pictures are in memory, too."""
    from pythae import models, trainers
    from pythae.data.datasets import BaseDataset
    from pythae.models import nn
    from pythae.models.base.base_utils import ModelOutput

    class Encoder(nn.BaseEncoder):
        def forward(self, x: Tensor) -> ModelOutput:
            mean, log_var = self.layers(x)
            return ModelOutput(embedding=mean, log_covariance=log_var)

    class Decoder(nn.BaseDecoder):
        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.layers(z))

    network, encoder, decoder = plain_vae(), Encoder(), Decoder()
    encoder.layers, decoder.layers = network.encoder, network.decoder
    model = models.VAE(models.VAEConfig(input_dim=(3, *SIZE), latent_dim=10), encoder, decoder)
    # Batches of 64 and a learning rate of 1e-4 are its defaults, too.
    config = trainers.BaseTrainerConfig(str(log_dir), num_epochs=epochs, no_cuda=True)
    images, labels = decode_splits(folder).train[:]
    pictures = BaseDataset(images.contiguous(), labels)
    trainers.BaseTrainer(model, pictures, training_config=config).train()


def run_quietly(trainer: Callable[..., None], folder: Path, epochs: int) -> None:
    """Train on the pictures in ``folder``, and keep neither what is printed nor what is written."""
    with TemporaryDirectory() as logs, redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        trainer(folder, epochs, Path(logs))


def epoch_seconds(trainer: Callable[..., None], folder: Path, epochs: int, steps: int) -> float:
    """Return the seconds per epoch of ``steps``, from the first step to that ``epochs`` later."""
    times: list[float] = []
    hook = register_optimizer_step_post_hook(lambda *_: times.append(time.perf_counter()))
    run_quietly(trainer, folder, epochs + 1)
    hook.remove()
    return (times[epochs * steps] - times[0]) / epochs


def peak_mib(trainer: Callable[..., None], folder: Path) -> float:
    """Return this process's peak memory after three epochs."""
    run_quietly(trainer, folder, 3)
    # Not getrusage: it gives a new process the peak of the one that started it.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def run_apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return ``function(*arguments)`` of a new process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def run_script(*command: str) -> str:
    """Return what Python prints in a new process, in which ``command`` trains from the root."""
    with TemporaryDirectory() as logs:
        command = (sys.executable, *command, "--log-dir", logs)
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def take_steps(model: VAE, optimiser: Adam, batches: list[Tensor]) -> None:
    """Take one step for each batch, [batch, 3, 32, 32]."""
    loss = ELBOLoss(beta=0.1)
    for x in batches:
        optimiser.zero_grad()
        *_, total_loss = loss(x, *model(x))
        total_loss.backward()
        optimiser.step()
