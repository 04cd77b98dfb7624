"""What the tests of training share: small runs, signals in the middle, and two runs compared."""

import json
import pkgutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import IMAGES, SCALARS, EventAccumulator

from vae.run import load_checkpoint
from vae.vae import VAE
from vae_training import Options, train

ROOT = Path(__file__).parents[1]
LOSSES = ("KL Loss", "Reconstruction Loss", "Total Loss")
# With 20 training pictures, an epoch has three steps, the last one on 4 pictures.
SMALL = {
    **{"dataset": "small", "image_size": 8, "latent_size": 2},
    **{"batch_size": 8, "epochs": 3, "device": "cpu"},
}
EVERYTHING = {
    **{"batch_norm": True, "augment": True, "likelihood": "bernoulli"},
    **{"beta_schedule": "linear", "warmup_epochs": 2, "lr_schedule": "cosine"},
}

# Functions that a run calls in each step, and after its last one.
STEP = "vae.losses.ELBOLoss.forward"
REPORT = "vae.report.evaluate_pca"


def train_small(folder: Path, resume: bool = False, **changes: Any) -> dict[str, Any]:
    """Train on the small pictures and return the metrics."""
    _, metrics = train(Options(**SMALL | changes), folder, resume, progress=False)
    return metrics


def through_mean(model: VAE, x: torch.Tensor) -> torch.Tensor:
    """Reconstruct images without noise."""
    return model.decoder(model.encoder(x)[0])


def seed_as(seed: int, epoch: int) -> None:
    """Seed PyTorch as a run of that seed does before an epoch, and before its report."""
    torch.manual_seed(int(np.random.SeedSequence((seed, 1 + epoch)).generate_state(1)[0]))


@contextmanager
def interruption(*signals: int, at: str = STEP, call: int = 1) -> Iterator[None]:
    """Send this process signals when a function is called, at that call, counted from 1."""
    function, calls = pkgutil.resolve_name(at), 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        for number in signals if calls == call else ():
            signal.raise_signal(number)
        return function(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(at, interrupted)
        yield


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
    checkpoints = [load_checkpoint(run / "checkpoint.pt") for run in (folder, other)]
    for part in ("model", "latents"):
        tensors, others = (checkpoint[part] for checkpoint in checkpoints)
        assert tensors.keys() == others.keys()
        for name, value in tensors.items():
            assert torch.equal(value, others[name]), name
    points, others = (
        {run: {tag: sorted(set(tags[tag])) for tag in tags} for run, tags in events.items()}
        for events in map(read_events, (folder, other))
    )
    assert points == others  # one that was replayed stands twice, if it is the same
    metrics, others = (json.loads((run / "metrics.json").read_bytes()) for run in (folder, other))
    changing = {"seconds": None, "config": None}
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


def write_checkpoint(path: Path, model: VAE, fitted: bool = True, **config: Any) -> Path:
    """Write a model's checkpoint as training leaves it; call it inside ``seeded``."""
    # Untrained encoders and decoders give nearly the same whatever they are given.
    for layer in (model.encoder.fcm, model.decoder.fc):
        layer.weight.data *= 40
    size, normed = model.latent_size, isinstance(model.decoder.norm1, torch.nn.BatchNorm2d)
    shape = {"image_resolution": list(model.image_resolution), "batch_norm": normed}
    shape |= {"image_channels": model.encoder.conv1.in_channels, "latent_size": size}
    root = 0.3 * torch.randn(size, size)
    latents = {"mean": torch.linspace(-1, 1, size), "covariance": root @ root.T}
    latents["covariance"].diagonal().add_(0.01)
    checkpoint = {"model": model.state_dict(), "config": {"dataset": "auto"} | shape | config}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint | ({"latents": latents} if fitted else {}), path)
    return path


def write_photograph(path: Path, size: tuple[int, int] = (50, 40), seed: int = 0) -> Path:
    """Write a picture of soft noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)
    return path
