"""Whole splits in memory, and batches drawn from them."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from datasets import flowers102, synthetic
from datasets.preprocessing import compute_in_parallel, compute_once, decode_pictures, fingerprint

SPLITS = ("train", "val", "test")
DATASETS = ("auto", "flowers102", "synthetic")


class Pictures(Dataset):
    """A split as uint8 in memory (3,072 bytes a picture at 32x32), indexed without Python loops.

    Args:
        pixels: [n, height, width, channels] uint8.
        labels: [n] int64.

    Raises:
        ValueError: if the two do not fit together.
    """

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        if pixels.ndim != 4 or pixels.dtype != torch.uint8 or labels.shape != pixels.shape[:1]:
            raise ValueError(
                f"pixels are {list(pixels.shape)} of {pixels.dtype} and labels "
                f"{list(labels.shape)}: [n, height, width, channels] of torch.uint8 and [n] are "
                "needed"
            )
        self.pixels = pixels
        self.labels = labels

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.pixels)

    def __getitem__(self, index: int | slice | Tensor) -> tuple[Tensor, Tensor]:
        """Return images and labels for one index, a slice, or a tensor of indices.

        The images are float32 in [0, 1], [channels, height, width] for one index and
        [batch, channels, height, width] (channels last in memory) for more: bit for bit
        ``ToTensor`` of the pixels.
        """
        if isinstance(index, Tensor):
            pixels, labels = self.pixels.index_select(0, index), self.labels.index_select(0, index)
        else:
            pixels, labels = self.pixels[index], self.labels[index]
        return pixels.movedim(-1, -3).float().div_(255), labels

    def batches(self, size: int = 64) -> Iterator[Tensor]:
        """Yield all images in order, [batch, channels, height, width] float32 in [0, 1]."""
        for start in range(0, len(self), size):
            yield self[start : start + size][0]

    def to(self, device: torch.device | str) -> "Pictures":
        """Return the same pictures on ``device``."""
        return Pictures(self.pixels.to(device), self.labels.to(device))


class ShuffledBatches(Sampler[Tensor]):
    """Batches of indices in a new random order each epoch, on the pictures' own device."""

    def __init__(self, pictures: Pictures, batch_size: int, generator: torch.Generator) -> None:
        self.pictures = pictures
        self.batch_size = batch_size
        self.generator = generator

    def __len__(self) -> int:
        """Return the number of batches in an epoch, a last smaller one included."""
        return -(-len(self.pictures) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield index tensors of ``batch_size``, the last one of what is left."""
        order = torch.randperm(len(self.pictures), generator=self.generator)
        yield from order.to(self.pictures.pixels.device).split(self.batch_size)


def shuffled_loader(pictures: Pictures, batch_size: int, generator: torch.Generator) -> DataLoader:
    """Return a ``DataLoader`` of shuffled batches; each batch is a single index operation.

    Args:
        pictures: the split to draw from.
        batch_size: pictures in a batch.
        generator: where the order comes from, on the CPU.
    """
    batches = ShuffledBatches(pictures, batch_size, generator)
    # batch_size=None: the sampler's batches go to the pictures whole, not one index at a time.
    return DataLoader(pictures, batch_size=None, sampler=batches, generator=generator)


def augment(images: Tensor, max_shift: int, generator: torch.Generator) -> Tensor:
    """Mirror every second image and shift each by a few pixels, drawn at random.

    Args:
        images: [batch, channels, height, width].
        max_shift: the largest shift up, down, left and right, in pixels; edges are repeated.
        generator: where the draws come from, on the images' device.

    Returns:
        The same shape, in one index operation for the whole batch.
    """
    batch, _, height, width = images.shape

    def draw(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (batch, 1), generator=generator, device=images.device)

    rows = torch.arange(height, device=images.device) + draw(-max_shift, max_shift + 1)
    columns = torch.arange(width, device=images.device) + draw(-max_shift, max_shift + 1)
    columns = torch.where(draw(0, 2) == 1, width - 1 - columns, columns)
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    which = torch.arange(batch, device=images.device)
    pixels = images.movedim(1, -1)[which[:, None, None], rows[:, :, None], columns[:, None, :]]
    return pixels.movedim(-1, 1)


class Splits(NamedTuple):
    """The three official splits of one data set, and which it is."""

    train: Pictures
    val: Pictures
    test: Pictures
    dataset: str
    """``"flowers102"`` or ``"synthetic"``."""
    fallback: str | None
    """Why the synthetic flowers stand in for the real ones, if they do."""


def load_splits(
    dataset: str = "auto",
    data_root: Path = Path(__file__).parent,
    image_resolution: tuple[int, int] = (32, 32),
    progress: bool = True,
) -> Splits:
    """Load all three splits, downloading and decoding what is not there yet.

    Args:
        dataset: ``"flowers102"``, ``"synthetic"``, or ``"auto"``: Flowers102 if it is on disk or
            its server can be reached, else the synthetic flowers.
        data_root: the folder that holds, or is to hold, ``flowers-102``.
        image_resolution: (height, width).
        progress: show progress bars while pictures are decoded.

    Raises:
        ValueError: for an unknown data set, damaged files, pictures that do not fit in memory, or
            Flowers102 that was asked for and is neither there nor to be had.
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset is {dataset!r}: one of {', '.join(DATASETS)} is needed")
    _check_memory(image_resolution)
    fallback = None
    if dataset != "synthetic" and not flowers102.is_on_disk(data_root):
        try:
            print(f"Downloading Flowers102 to {data_root}", file=sys.stderr)
            flowers102.download(data_root)
        except flowers102.ServerUnreachableError as error:
            fallback = (
                f"Flowers102 is not in {data_root}, and its server cannot be reached ({error})"
            )
            if dataset == "flowers102":
                raise ValueError(
                    f"{fallback}. Put its files into {data_root / 'flowers-102'}, name another "
                    "folder with --data-root, or take --dataset synthetic"
                ) from None
        except OSError as error:
            raise ValueError(
                f"Flowers102 cannot be kept in {data_root}: {error}. Name another folder with "
                "--data-root, or take --dataset synthetic"
            ) from None
    if dataset == "synthetic" or fallback:
        splits = [_load_synthetic(split, image_resolution, progress) for split in SPLITS]
        return Splits(*splits, "synthetic", fallback)
    splits = [_load_flowers102(data_root, split, image_resolution, progress) for split in SPLITS]
    return Splits(*splits, "flowers102", None)


def _check_memory(image_resolution: tuple[int, int]) -> None:
    """Raise ``ValueError`` if all pictures, and what PCA makes of 1,020, will not fit in memory."""
    height, width = image_resolution
    # A byte a value for all pictures; as floats, three times over, for the training pictures.
    needed = height * width * 3 * (8189 + 12 * 1020)
    available = psutil.virtual_memory().available
    if needed > available:
        raise ValueError(
            f"pictures of {height}x{width} need {needed / 1e9:.1f} GB of memory and "
            f"{available / 1e9:.1f} GB are free: take smaller ones (--image-size)"
        )


def _load_flowers102(
    data_root: Path, split: str, image_resolution: tuple[int, int], progress: bool
) -> Pictures:
    paths, labels = flowers102.find_pictures(data_root, split)
    pixels = compute_once(
        f"flowers102-{split}-{image_resolution[0]}x{image_resolution[1]}",
        fingerprint(paths, image_resolution),
        lambda: decode_pictures(
            paths, image_resolution, f"Decoding {split} pictures" if progress else None
        ),
    )
    return Pictures(pixels, torch.tensor(labels))


def _load_synthetic(split: str, image_resolution: tuple[int, int], progress: bool) -> Pictures:
    labels = torch.from_numpy(synthetic.flower_labels(split))

    def draw() -> np.ndarray:
        pixels = np.empty((len(labels), *image_resolution, 3), np.uint8)
        compute_in_parallel(
            lambda run: synthetic.draw_flowers(split, image_resolution, run),
            pixels,
            f"Drawing {split} flowers" if progress else None,
        )
        return pixels

    key = fingerprint([Path(synthetic.__file__)], split, image_resolution)
    name = f"synthetic-{split}-{image_resolution[0]}x{image_resolution[1]}"
    return Pictures(compute_once(name, key, draw), labels)
