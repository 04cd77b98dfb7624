"""What the tests of data sets share: pictures on disk, and random numbers that repeat."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]


def write_photograph(path: Path, size: tuple[int, int] = (50, 40), seed: int = 0) -> Path:
    """Write a picture of soft noise, and the folders that it lies in."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def fill(folder: Path, *names: str) -> Path:
    """Write another picture for each name below a folder."""
    for seed, name in enumerate(names):
        write_photograph(folder / name, seed=seed)
    return folder


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """PyTorch's random numbers follow from ``seed`` inside, and go on afterwards as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
