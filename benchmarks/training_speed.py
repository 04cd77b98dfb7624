"""How fast training is, on Linux: ``python -m benchmarks.training_speed`` (an hour).

This repository, the plain way of the post and most tutorials, and pythae (where it is installed)
train the post's network in turns, each in a new process.
"""

import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from importlib import util
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import tyro
from torch.optim import Adam, optimizer
from torch.utils.data import ConcatDataset, DataLoader
from torch.utils.tensorboard import SummaryWriter
from torchvision.datasets import Flowers102
from torchvision.transforms import Compose, Resize, ToTensor
from torchvision.utils import make_grid

from datasets import DATASETS
from datasets.preprocessing import InMemory
from vae.losses import ELBOLoss
from vae.run import one_line_errors
from vae.vae import VAE
from vae_training import Options, train

ROUNDS, EPOCHS = 15, 11
PIPELINE = Compose([Resize((32, 32)), ToTensor()])
# What is compared, of which ways, and how much of the other's the first one's may be
ROWS = (
    ("whole run of 500 epochs, s", "run", "whole", "whole plain", 0.40),
    ("an epoch's steps alone, s", "epoch", "steps", "steps plain", 0.70),
    ("an epoch, beside pythae's, s", "epoch", "here", "pythae", 0.85),
    ("peak memory, MiB", "MiB", "here", "plain", 1.15),
)


def plain_vae() -> VAE:
    """Return the same network with each ReLU before its pooling, as in the post."""
    model = VAE((32, 32), latent_size=10, image_channels=3)
    for number in (1, 2, 3):
        setattr(model.encoder, f"pool{number}", torch.nn.ReLU())
        setattr(model.encoder, f"act{number}", torch.nn.MaxPool2d(2))
    return model


def train_plainly(options: Options, logs: Path) -> None:
    """Train as the post and most tutorials do: decode each picture anew, log at every step."""
    data, test = (Flowers102(options.data_root, each, PIPELINE) for each in ("train", "test"))
    loader, test_loader = DataLoader(data, 64, shuffle=True), DataLoader(test, 5, shuffle=True)
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


def eight_times(root: str, split: str, transform: Any = None) -> Any:
    """Return a split of Flowers102, the training pictures eight times over."""
    return ConcatDataset([Flowers102(root, split, transform)] * (8 if split == "train" else 1))


DATASETS["eight"] = eight_times


def train_with_pythae(options: Options, logs: Path) -> None:
    """Train the plain network with pythae, whose batch size and learning rate are the post's."""
    from pythae import models, pipelines, trainers

    network, output = plain_vae(), models.base.base_utils.ModelOutput
    model = models.VAE(models.VAEConfig((3, 32, 32), latent_dim=10))
    model.encoder, model.decoder = network.encoder, network.decoder
    model.encoder.register_forward_hook(lambda _, x, y: output(embedding=y[0], log_covariance=y[1]))
    model.decoder.register_forward_hook(lambda _, z, x: output(reconstruction=x))
    config = trainers.BaseTrainerConfig(str(logs), num_epochs=options.epochs, no_cuda=True)
    data = InMemory(Flowers102(options.data_root, "train", PIPELINE), progress=False)
    pipelines.TrainingPipeline(model, config)(data.images(slice(None)).contiguous())


def take_steps(options: Options, logs: Path, plain: bool = False) -> None:
    """Take an epoch's steps on a batch that lies ready: forward, loss, backward, optimiser."""
    torch.empty(2**25 - 2**13, dtype=torch.uint8)  # freed at once, as in vae/run.py
    order = torch.contiguous_format if plain else torch.channels_last
    model = (plain_vae() if plain else VAE((32, 32), 10, 3)).to(memory_format=order)
    loss, optimiser = ELBOLoss(beta=0.1), Adam(model.parameters(), lr=1e-4, fused=not plain)
    x = torch.rand(64, 3, 32, 32).contiguous(memory_format=order)
    for _ in range(16 * options.epochs):
        optimiser.zero_grad()
        loss(x, *model(x))[-1].backward()
        optimiser.step()


def watch(way: Any, options: Options) -> dict[str, float]:
    """Train; return the peak of memory and an epoch's seconds, from first step to first step."""
    times: list[float] = []
    hook = optimizer.register_optimizer_step_post_hook(lambda *_: times.append(time.perf_counter()))
    with hook, TemporaryDirectory() as logs, redirect_stdout(sys.stderr):
        way(options, Path(logs))
    epoch = (times[-(len(times) // options.epochs)] - times[0]) / (options.epochs - 1)
    # Not getrusage: it gives a new process the peak of the one that started it.
    peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
    return {"epoch": epoch, "MiB": int(peak) / 1024}


WAYS: dict[str, Any] = {
    "whole": train,
    "whole plain": train_plainly,
    "here": train,
    "eight": train,
    "plain": train_plainly,
    "steps": take_steps,
    "steps plain": partial(take_steps, plain=True),
    "pythae": train_with_pythae,
}


def row(name: str, here: list[float], other: list[float], most: float) -> str:
    """Compare what was measured in the same rounds."""
    ratios = [one / two for one, two in zip(here, other, strict=True)]
    numbers = median(here), median(other), median(ratios), min(ratios), max(ratios), most
    return f"| {name} | {' | '.join(f'{number:.3g}' for number in numbers)} |"


def main(
    data_root: str = Options.data_root,  # folder that holds flowers-102
    runs: int = 5,  # pairs of whole runs
) -> None:
    """Measure, and print a table in Markdown."""
    short = Options("flowers102", data_root, epochs=EPOCHS, device="cpu")
    eight, long = replace(short, dataset="eight"), replace(short, epochs=500)
    for options in (short, eight):  # pictures are read here, and kept for all runs
        watch(train, replace(options, epochs=2))
    ways = [n for n in WAYS if "whole" not in n and (n != "pythae" or util.find_spec("pythae"))]
    measured: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name in ways * ROUNDS + ["whole", "whole plain"] * runs:
        options = {"eight": eight, "whole": long, "whole plain": long}.get(name, short)
        began = time.perf_counter()
        with ProcessPoolExecutor(1, torch.multiprocessing.get_context("spawn")) as pool:
            figures = pool.submit(watch, WAYS[name], options).result()
        for figure, value in (figures | {"run": time.perf_counter() - began}).items():
            measured[name][figure].append(value)

    print("| median of what | here | other way | ratio | lowest | highest | at most |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for what, figure, here, other, most in ROWS:
        if here in measured and other in measured:
            print(row(what, measured[here][figure], measured[other][figure], most))
    pairs = zip(measured["eight"]["MiB"], measured["here"]["MiB"], strict=True)
    growth = [(eight - here) * 1024 / 7140 for eight, here in pairs]
    print(row("memory for each picture more, KiB", growth, [1.0] * ROUNDS, 8))


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, prog="python -m benchmarks.training_speed", description=__doc__)
