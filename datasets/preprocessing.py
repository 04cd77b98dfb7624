"""From pictures to tensors: read any picture, keep a whole data set in memory, change a batch."""

import hashlib
import math
import os
import pickle
import pickletools
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.contrib.concurrent import thread_map

CACHE_FOLDER = Path(__file__).parent / "cache"

# How far ``augment`` goes, chosen on the validation split; 0 switches a change off.
SHIFT = 0.09  # largest shift each way, in heights and widths of the picture
ROTATION = 25.0  # largest rotation each way, in degrees
ZOOM = 0.25  # largest zoom in and out, as a share: 1 / 1.25 to 1.25
COLOUR = 0.3  # largest change of a colour channel's brightness, as a share: 0.7 to 1.3


class UserError(ValueError):
    """What the user has to change: one line says what was given, what is needed, what to do."""


class DamagedPicture(UserError):
    """A picture that cannot be read. ``InMemory`` names it in a warning and leaves it out."""


def read_picture(path: Path) -> Image.Image:
    """Read a picture of any size and kind that Pillow reads, as RGB.

    EXIF data turn it upright, what is transparent becomes white, 16 bits become 8. iPhone's HEIC
    is read where the package ``pillow-heif`` is installed. ``DamagedPicture`` names what cannot be
    read.
    """
    heic = read_heic()
    # Of odd metadata, and of over 89 million pixels, which still fit.
    warnings.filterwarnings("ignore", module="PIL")
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode == "F":
                raise ValueError("its pixels are floating-point numbers; save it as PNG or JPEG")
            if image.mode.startswith("I"):  # 16 bits, which Pillow's own conversion clips to 8
                pixels = np.clip(np.asarray(image) / 257, 0, 255).round().astype(np.uint8)
                image = Image.fromarray(pixels)
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return image.convert("RGB")
    except Exception as error:  # Pillow raises almost anything for a damaged file
        reason = str(error)
        if Path(path).suffix.lower() in (".heic", ".heif") and not heic:
            reason = "HEIC pictures need the package pillow-heif: pip install pillow-heif"
        raise DamagedPicture(f"{path} cannot be read as a picture: {reason}") from None


def read_heic() -> bool:
    """Let Pillow read HEIC, if ``pillow-heif`` is installed; return whether it does."""
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    return ".heic" in Image.registered_extensions()


class InMemory(Dataset):
    """A data set whose pictures are read once, and stay in memory and on disk as bytes.

    It takes any data set like torchvision's, of pairs (image, label) with the image a float tensor
    [channels, height, width] in [0, 1], as ``ToTensor`` makes it, and gives the same pairs back:
    bit for bit for 8-bit pictures, rounded to 8 bits otherwise. What is random in its transform is
    drawn once and stays; random changes belong behind the ``DataLoader`` (see ``augment``).

    Pictures are kept in ``datasets/cache/`` for the next run, unless nothing tells whether they
    are still the same (see ``fingerprint``). ``progress`` shows a bar on terminals. ``UserError``
    if there are no pictures, or they differ in shape, or are not in [0, 1].
    """

    def __init__(self, dataset: Any, progress: bool = True) -> None:
        self.classes = getattr(dataset, "classes", None)
        self.name = type(dataset).__name__
        key = fingerprint(dataset)
        path = CACHE_FOLDER / f"{self.name}-{getattr(dataset, '_split', '')}-{key}.npz"
        if not (key and self._load(path)):
            self._read(dataset, progress)
            if key and {type(label) for label in self.labels} in ({int}, {float}, {str}):
                self._keep(path)
        for message in self.left_out:
            print(f"warning: {message}: it is left out", file=sys.stderr)
        if not len(self):
            raise UserError(f"{self.name} has no pictures that can be read: at least one is needed")

    def _read(self, dataset: Any, progress: bool) -> None:
        """Read all pictures, in threads: Pillow lets go of the interpreter's lock meanwhile."""
        self.left_out: list[str] = []
        shapes = set()

        def read_one(i: int) -> tuple[Tensor, Any] | None:
            this = f"picture {i} of {self.name}"
            try:
                image, label = dataset[i]
            except DamagedPicture as error:
                self.left_out.append(str(error))
                return None
            except OSError as error:
                files = [*files_of(dataset)]
                this = str(files[i]) if len(files) == len(dataset) else this
                raise UserError(f"{this} cannot be read as a picture: {error}") from None
            if not isinstance(image, Tensor) or image.ndim != 3 or not image.is_floating_point():
                raise UserError(f"{this} is no tensor as ToTensor() makes it: end its transform so")
            if not 0 <= image.min() <= image.max() <= 1:
                raise UserError(f"{this} has values outside of [0, 1], which ToTensor() gives")
            shapes.add(tuple(image.shape))
            if len(shapes) > 1:
                raise UserError(f"{this} has another shape, {shapes}: its transform needs a Resize")
            # NumPy's numbers become Python's, which the cache gives back as they were.
            label = label.item() if isinstance(label, np.generic) else label
            return image.mul(255).round_().byte().movedim(0, -1), label

        if progress:
            print(f"Reading {len(dataset):,} pictures of {self.name}", file=sys.stderr)
        bar = {"unit": "picture", "leave": False, "disable": None if progress else True}
        pairs = [pair for pair in thread_map(read_one, range(len(dataset)), **bar) if pair]
        self.pixels = torch.stack([values for values, _ in pairs]) if pairs else torch.empty(0)
        self.labels = [label for _, label in pairs]

    def _load(self, path: Path) -> bool:
        """Take the pictures that an earlier run kept; return whether that could be done."""
        try:
            with np.load(path) as kept:
                self.pixels = torch.from_numpy(kept["pixels"])
                self.labels, self.left_out = kept["labels"].tolist(), kept["left_out"].tolist()
            return True
        except FileNotFoundError:
            return False
        except Exception as error:  # NumPy's zip reader raises almost anything for a damaged file
            print(f"warning: {path} is damaged and made again ({error})", file=sys.stderr)
            return False

    def _keep(self, path: Path) -> None:
        """Keep the pictures for the next run, and of all that was ever kept the newest thirty."""
        new = path.with_suffix(f".{os.getpid()}.npz")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(new, pixels=self.pixels.numpy(), labels=self.labels, left_out=self.left_out)
            new.replace(path)
            for old in sorted(path.parent.glob("*.npz"), key=os.path.getmtime)[:-30]:
                old.unlink()
        except OSError as error:
            print(f"warning: pictures are not kept for the next run: {error}", file=sys.stderr)
            with suppress(OSError):
                new.unlink()

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        """Return an image, [channels, height, width] in [0, 1], and its label."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Any]]:
        """Return several pairs at once: what a ``DataLoader`` asks for, one batch at a time."""
        labels = [self.labels[index] for index in indices]
        return list(zip(self.images(torch.tensor(indices)), labels, strict=True))

    def images(self, index: slice | Tensor) -> Tensor:
        """Return several images, [n, channels, height, width] in [0, 1], channels last."""
        return self.pixels[index].movedim(-1, -3).float().div_(255)

    def batches(self, size: int = 64) -> Iterator[Tensor]:
        """Yield all images in order, [batch, channels, height, width]."""
        for start in range(0, len(self), size):
            yield self.images(slice(start, start + size))


def fingerprint(dataset: Any) -> str:
    """Return what identifies a data set's pictures, or "" where nothing does.

    That is its pickle (parameters, names of files, transform), the code of this module and of each
    that the pickle names, the sizes and times of its files, and the versions of what decodes them.
    Nothing does for what cannot be pickled, is defined in a notebook, or lies in tensors.
    """
    try:
        pickled = pickle.dumps(dataset)
    except Exception:  # pickle raises almost anything for what it cannot take, such as a lambda
        return ""
    state = hashlib.sha256(f"{PIL.__version__} {torchvision.__version__}".encode() + pickled)
    named = {str(argument) for _, argument, _ in pickletools.genops(pickled)}
    for name in sorted((named & sys.modules.keys()) | {__name__}):
        file = getattr(sys.modules[name], "__file__", None) or ""
        if name == "torch._utils" or (name == "__main__" and not file.endswith(".py")):
            return ""  # A tensor is pickled differently each time.
        if file.endswith(".py"):
            state.update(Path(file).read_bytes())
    for path in files_of(dataset):
        status = os.stat(path)
        state.update(f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} ".encode())
    return state.hexdigest()[:32]


def files_of(dataset: Any) -> Iterator[str | os.PathLike[str]]:
    """Yield the files that a data set knows, and those of the data sets that it is made of."""
    for values in getattr(dataset, "__dict__", {}).values():
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, Dataset):
                yield from files_of(value)
            path = value[0] if isinstance(value, tuple) and value else value
            if isinstance(path, str | os.PathLike) and os.path.isfile(path):
                yield path


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
    # Up to the centres of the outer pixels: padding_mode="border" is not there on every device.
    grid[..., 0].clamp_(1 / width - 1, 1 - 1 / width)
    grid[..., 1].clamp_(1 / height - 1, 1 - 1 / height)
    moved = F.grid_sample(images, grid, align_corners=False)
    colours = 1 + COLOUR * draws[:, 5:, None, None]
    return (colours * moved).clamp_(0, 1).contiguous(memory_format=torch.channels_last)
