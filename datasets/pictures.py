"""Whole splits in memory, batches drawn from them, and random changes of a batch."""

import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from datasets import flowers102, synthetic
from datasets.preprocessing import compute_once, decode_pictures, fingerprint

DATASETS = ("auto", "flowers102", "synthetic")

# How far ``augment`` goes, chosen on the validation split; 0 switches a change off.
SHIFT = 0.09  # largest shift each way, in heights and widths of the picture
ROTATION = 25.0  # largest rotation each way, in degrees
ZOOM = 0.25  # largest zoom in and out, as a share: 1 / 1.25 to 1.25
COLOUR = 0.3  # largest change of a colour channel's brightness, as a share: 0.7 to 1.3


class Pictures(Dataset):
    """A split as uint8 in memory (3,072 bytes a picture at 32x32), indexed without Python loops.

    ``pixels`` are [n, height, width, channels] uint8 and ``labels`` [n] int64; images are float32
    in [0, 1], bit for bit ``ToTensor`` of the pixels.
    """

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.pixels)

    def __getitem__(self, index: int | slice) -> tuple[Tensor, Tensor]:
        """Return the image, [channels, height, width], and label of an index, or a slice's."""
        return self.pixels[index].movedim(-1, -3).float().div_(255), self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return images, [batch, channels, height, width] channels last in memory, and labels."""
        index = torch.tensor(indices, dtype=torch.int64, device=self.pixels.device)
        return Pictures(self.pixels.index_select(0, index), self.labels.index_select(0, index))[:]

    def batches(self, size: int = 64) -> Iterator[Tensor]:
        """Yield all images in order, [batch, channels, height, width]."""
        for start in range(0, len(self), size):
            yield self[start : start + size][0]

    def to(self, device: torch.device | str) -> "Pictures":
        """Return the same pictures on ``device``."""
        return Pictures(self.pixels.to(device), self.labels.to(device))


def whole_batch(batch: Any) -> Any:
    """Return ``batch``: as ``collate_fn`` for ``Pictures``, whose batches come in one piece."""
    return batch


def augment(images: Tensor) -> Tensor:
    """Mirror half of the images, and shift, rotate, zoom and tint each, all at random.

    Images are [batch, channels, height, width] in [0, 1], before and after (then channels last in
    memory); what moves in from outside repeats the border.
    """
    batch, channels, height, width = images.shape
    draws = 2 * torch.rand(batch, 5 + channels, dtype=images.dtype, device=images.device) - 1
    side, right, down, turn, scale = draws[:, :5].unbind(1)
    mirror = torch.where(side < 0, -1, 1)
    angle, zoom = math.radians(ROTATION) * turn, (1 + ZOOM) ** scale
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    # Where in the old image each place of the new one lies; both coordinates go from -1 to 1.
    x = [mirror * cos, -sin * height / width, 2 * SHIFT * right]
    y = [mirror * sin * width / height, cos, 2 * SHIFT * down]
    matrices = torch.stack(x + y, dim=1).view(batch, 2, 3)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    colours = 1 + COLOUR * draws[:, 5:, None, None]
    tinted = torch.empty_like(moved, memory_format=torch.channels_last)
    return torch.mul(moved, colours, out=tinted).clamp_(0, 1)


class Splits(NamedTuple):
    """The official splits, ``"flowers102"`` or ``"synthetic"``, and why the latter fell in."""

    train: Pictures
    val: Pictures
    test: Pictures
    dataset: str
    fallback: str | None

    def to(self, device: torch.device | str) -> "Splits":
        """Return the same splits on ``device``."""
        train, val, test = (pictures.to(device) for pictures in self[:3])
        return self._replace(train=train, val=val, test=test)


def load_splits(
    dataset: str = "auto",
    data_root: Path | str = Path(__file__).parent,
    image_resolution: tuple[int, int] = (32, 32),
    progress: bool = True,
) -> Splits:
    """Load all three splits, downloading and decoding what is not there yet.

    Args:
        dataset: ``"flowers102"``, ``"synthetic"``, or ``"auto"``: Flowers102 if it is on disk or
            its server can be reached, else the synthetic flowers.
        data_root: the folder that holds, or is to hold, ``flowers-102``.
        image_resolution: (height, width).
        progress: say on stderr which pictures are decoded or drawn, with bars on terminals.

    Raises:
        ValueError: if that cannot be done; the message is one line, and says what to do.
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset is {dataset!r}: one of {', '.join(DATASETS)} is needed")
    data_root, (height, width) = Path(data_root), image_resolution
    needed = height * width * 3 * 8189 + 3e8  # all pixels, and roughly what decoding takes
    free = psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"pictures of {height}x{width} need {needed / 1e9:.1f} GB of memory and "
            f"{free / 1e9:.1f} GB are free: take smaller ones (--image-size)"
        )
    fallback = None
    if dataset != "synthetic" and not flowers102.is_on_disk(data_root):
        advice = "Name another folder with --data-root, or take --dataset synthetic"
        print(f"Downloading Flowers102 (345 MB) to {data_root}", file=sys.stderr)
        try:
            flowers102.download(data_root)
        except ConnectionError as error:
            fallback = f"Flowers102 is not in {data_root}/flowers-102, server unreachable ({error})"
            if dataset == "flowers102":
                raise ValueError(f"{fallback}. {advice}") from None
        except OSError as error:
            raise ValueError(f"{data_root} cannot hold Flowers102: {error}. {advice}") from None
    dataset = "synthetic" if fallback or dataset == "synthetic" else "flowers102"
    splits = []
    for split in synthetic.SPLITS:
        caption = f"Preparing {split} pictures" if progress else None
        if dataset == "flowers102":
            paths, labels = flowers102.find_pictures(data_root, split)
            compute = partial(decode_pictures, paths, image_resolution, caption)
        else:
            paths, labels = [Path(synthetic.__file__)], synthetic.flower_labels(split).tolist()
            compute = partial(synthetic.draw_flowers, split, image_resolution, caption)
        pixels = compute_once(f"{dataset}-{split}-{height}x{width}", fingerprint(paths), compute)
        splits.append(Pictures(pixels, torch.tensor(labels)))
    train, val, test = splits
    return Splits(train, val, test, dataset, fallback)
