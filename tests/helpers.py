"""What the tests of training share: small runs, signals in the middle, and two runs compared."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import IMAGES, SCALARS, EventAccumulator
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from vae.checkpoint import load_checkpoint
from vae.vae import VAE
from vae_training import Options, train

ROOT = Path(__file__).parents[1]
LOSSES = ("KL Loss", "Reconstruction Loss", "Total Loss")
# With 20 training pictures, an epoch has three steps, the last one on 4 pictures.
SMALL = {
    "dataset": "small",
    "image_size": 8,
    "latent_size": 2,
    "batch_size": 8,
    "epochs": 3,
    "device": "cpu",
}
EVERYTHING = {
    "batch_norm": True,
    "augment": True,
    "likelihood": "bernoulli",
    "beta_schedule": "linear",
    "warmup_epochs": 2,
    "lr_schedule": "cosine",
}


def flags(values: dict[str, object]) -> list[str]:
    """Options as they are written on a command line."""
    names = {f"--{name.replace('_', '-')}": value for name, value in values.items()}
    return [name if value is True else f"{name}={value}" for name, value in names.items()]


def train_small(folder: Path, resume: bool = False, **changes: Any) -> dict[str, Any]:
    """Train on the small pictures and return the metrics."""
    _, metrics = train(Options(**SMALL | changes), folder, resume, progress=False)
    return metrics


def through_mean(model: VAE, x: Tensor) -> Tensor:
    """Reconstruct images without noise."""
    return model.decoder(model.encoder(x)[0])


def seed_as(seed: int, epoch: int) -> None:
    """Seed PyTorch as a run of that seed does before an epoch, and before its report."""
    torch.manual_seed(int(np.random.SeedSequence((seed, 1 + epoch)).generate_state(1)[0]))


@contextmanager
def interruption(*signals: int, at: str = "ELBOLoss", call: int = 1) -> Iterator[None]:
    """Send this process signals when a module of a kind is called, at that call, counted from 1.

    The loss is called once in each step of training.
    """
    calls = 0

    def count_calls(module: torch.nn.Module, _: Any) -> None:
        nonlocal calls
        if type(module).__name__ == at:
            calls += 1
            for number in signals if calls == call else ():
                signal.raise_signal(number)

    with register_module_forward_pre_hook(count_calls):
        yield


def tensors_in(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in dictionaries and lists, each with where it stands."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from tensors_in(each, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from tensors_in(each, f"{name}.{index}")


def assert_same_tensors(value: Any, other: Any) -> None:
    """Both have the same tensors in the same places, to the bit."""
    tensors, others = dict(tensors_in(value)), dict(tensors_in(other))
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name


def read_events(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what TensorBoard shows of each sub-run: {sub-run: {tag: [(step, value), ...]}}."""
    events = {}
    for run in sorted({path.parent for path in folder.rglob("events.out.tfevents.*")}):
        size = {SCALARS: 0, IMAGES: 0}
        reader = EventAccumulator(str(run), size, purge_orphaned_data=False).Reload()
        tags = events.setdefault(str(run.relative_to(folder)), {})
        for tag in reader.Tags()[SCALARS]:
            tags[tag] = [(event.step, event.value) for event in reader.Scalars(tag)]
        for tag in reader.Tags()[IMAGES]:
            tags[tag] = [(event.step, event.encoded_image_string) for event in reader.Images(tag)]
    return events


def read_losses(folder: Path) -> np.ndarray:
    """Return the losses of each step in TensorBoard, [steps, 3], in the order of ``LOSSES``."""
    events = read_events(folder)
    return np.array([[value for _, value in events[f"loss_{name}"]["loss"]] for name in LOSSES]).T


def assert_same_run(folder: Path, other: Path) -> None:
    """Weights, latents, TensorBoard points, metrics and pictures are the same to the bit."""
    checkpoint, other_checkpoint = (
        load_checkpoint(run / "checkpoint.pt") for run in (folder, other)
    )
    assert_same_tensors(checkpoint, other_checkpoint)
    points, others = (
        {run: {tag: sorted(set(tags[tag])) for tag in tags} for run, tags in events.items()}
        for events in map(read_events, (folder, other))
    )
    assert points == others  # one that was replayed stands twice, if it is the same
    metrics, others = (json.loads((run / "metrics.json").read_bytes()) for run in (folder, other))
    changing = {"seconds": None, "options": None}
    assert metrics | changing == others | changing
    for name in ("reconstructions.png", "samples.png", "samples_prior.png"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()


def tiles(grid: np.ndarray, size: int = 8) -> np.ndarray:
    """Cut a grid of pictures with frames of 2 pixels: [rows, columns, size, size, 3]."""
    rows, columns = ((side - 2) // (size + 2) for side in grid.shape[:2])
    grid = grid[2:, 2:].reshape(rows, size + 2, columns, size + 2, 3)
    return grid.swapaxes(1, 2)[:, :, :size, :size]


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """PyTorch's random numbers follow from ``seed`` inside, and go on afterwards as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def write_checkpoint(path: Path, model: VAE, fitted: bool = True, **options: Any) -> Path:
    """Write a model's checkpoint as training leaves it; call it inside ``seeded``."""
    # Untrained encoders and decoders give nearly the same whatever they are given.
    model.encoder.fcm.weight.data *= 40
    model.decoder.fc.weight.data *= 40
    checkpoint = {
        "architecture": {
            "image_resolution": model.image_resolution,
            "latent_size": model.latent_size,
            "image_channels": model.image_channels,
            "batch_norm": isinstance(model.decoder.norm1, torch.nn.BatchNorm2d),
        },
        "options": {"dataset": "auto"} | options,
        "state": {"model": model.state_dict()},
    }
    size = model.latent_size
    root = 0.3 * torch.randn(size, size)
    covariance = root @ root.T + 0.01 * torch.eye(size)
    if fitted:
        checkpoint["latents"] = {"mean": torch.linspace(-1, 1, size), "covariance": covariance}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, path)
    return path


def write_photograph(path: Path, size: tuple[int, int] = (50, 40), seed: int = 0) -> Path:
    """Write a picture of soft noise, and the folders that it lies in."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)
    return path
