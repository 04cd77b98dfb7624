"""From image files to tensors: decode every picture once, in parallel, and keep the result."""

import hashlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import functional
from tqdm.contrib.concurrent import thread_map

CACHE_FOLDER = Path(__file__).parent / "cache"


@contextmanager
def open_picture(path: Path) -> Iterator[Image.Image]:
    """Open an image file; whatever goes wrong while it is open is a ValueError with its name."""
    try:
        # Opening a FIFO would wait for somebody to write to it, and a device need not end.
        if path.exists() and not path.is_file():
            raise ValueError("it is not a regular file")
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except Exception as error:  # Pillow raises almost anything for a damaged file
        reason = "too little memory is free" if isinstance(error, MemoryError) else error
        raise ValueError(f"{path} cannot be read as a picture: {reason}") from None


def read_photograph(
    path: Path, image_resolution: tuple[int, int], centre_crop: bool = False
) -> Tensor:
    """Read a user's photograph of any size and kind: [1, 3, height, width] float32 in [0, 1].

    It is squeezed into ``image_resolution`` as the training pictures are or, with ``centre_crop``,
    loses what stands over. EXIF data turn it upright, and what is transparent becomes white.
    """
    with warnings.catch_warnings():
        # Pillow warns of odd metadata, and of over 89 million pixels, which still fit in memory.
        warnings.filterwarnings("ignore", module="PIL")
        with open_picture(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode == "F":
                raise ValueError("its pixels are floating-point numbers; save it as PNG or JPEG")
            if image.mode.startswith("I"):  # 16 bits, which Pillow's own conversion clips to 8
                pixels = np.clip(np.asarray(image) / 257, 0, 255).round().astype(np.uint8)
                image = Image.fromarray(pixels)
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            image = image.convert("RGB")
            if centre_crop:
                image = ImageOps.fit(image, image_resolution[::-1], Image.Resampling.BILINEAR)
            return functional.to_tensor(functional.resize(image, list(image_resolution)))[None]


def decode_pictures(
    paths: Sequence[Path], image_resolution: tuple[int, int], caption: str | None = None
) -> np.ndarray:
    """Decode and resize pictures as torchvision's ``Resize`` does: [n, height, width, 3] uint8.

    ``ToTensor`` of one is bit for bit what the post's transformation pipeline gives.
    """
    pixels = np.empty((len(paths), *image_resolution, 3), dtype=np.uint8)

    def decode(number: int) -> None:
        with open_picture(paths[number]) as image:
            pixels[number] = functional.resize(image.convert("RGB"), list(image_resolution))

    map_in_parallel(decode, range(len(paths)), caption)
    return pixels


def map_in_parallel(
    function: Callable[[Any], Any], items: Sequence[Any], caption: str | None, unit: str = "picture"
) -> list[Any]:
    """Return ``function`` of each item; it runs on all cores, and the first error stops the rest.

    Threads are enough: Pillow and NumPy let go of the interpreter's lock while they work. A
    ``caption`` goes to stderr, with a progress bar in ``unit`` below it on terminals.
    """
    if caption:
        print(caption, file=sys.stderr)
    return thread_map(function, items, unit=unit, disable=None if caption else True, leave=False)


def fingerprint(paths: Sequence[Path]) -> str:
    """Return what identifies decoded pictures: their files, Pillow's version and this module."""
    state = hashlib.sha256(PIL.__version__.encode() + Path(__file__).read_bytes())
    for path in paths:
        status = path.stat() if path.exists() else os.stat_result([0] * 10)
        state.update(repr((path.absolute(), status.st_size, status.st_mtime_ns)).encode())
    return state.hexdigest()


def compute_once(name: str, key: str, compute: Callable[[], np.ndarray]) -> Tensor:
    """Return ``compute()`` as a tensor, from the file that an earlier call kept where there is one.

    A kept file that is damaged is made again, and one of the same name and another key (see
    ``fingerprint``) makes room. A ``CACHE_FOLDER`` that cannot be written to costs a warning and
    the time of the next run.
    """
    path = CACHE_FOLDER / f"{name}-{key}.npz"
    try:
        if path.is_file():
            with np.load(path) as kept:
                # What is not compressed is no zip bomb; NumPy alone may stop before the checksum.
                if any(part.compress_type for part in kept.zip.infolist()) or kept.zip.testzip():
                    raise ValueError("compressed, or a checksum is wrong")
                return torch.from_numpy(kept["pixels"])
    except Exception as error:  # NumPy's zip reader raises almost anything for a damaged file
        warnings.warn(f"{path} is damaged and made again ({type(error).__name__})", stacklevel=2)
    pixels = compute()
    temporary = path.with_suffix(f".{os.getpid()}.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(temporary, pixels=pixels)
        temporary.replace(path)
    except OSError as error:
        if not path.is_file():  # Where it is, another run was faster with the same pictures.
            warnings.warn(f"decoded pictures are not kept for the next run: {error}", stacklevel=2)
    with suppress(OSError):  # Files of other keys go, and what killed and failed runs left.
        for outdated in set(path.parent.glob(f"{name}-*")) - {path}:
            outdated.unlink()
    return torch.from_numpy(pixels)
