"""From image files to tensors: decode every picture once, in parallel, and keep the result."""

import hashlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
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
    """Open an image file; what goes wrong while it is open is reported with the file's name.

    Raises:
        ValueError: if it is missing, damaged, no regular file, no picture, too large for the free
            memory, or so large (over 179 million pixels) that it may be a decompression bomb.
    """
    try:
        # Opening a FIFO would wait for somebody to write to it, and a device need not end.
        if path.exists() and not path.is_file():
            raise ValueError("it is not a regular file")
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    # A damaged file can make Pillow's decoders raise almost anything, SyntaxError included.
    except Exception as error:
        reason = "too little memory is free" if isinstance(error, MemoryError) else error
        raise ValueError(f"{path} cannot be read as a picture: {reason}") from None


def read_photograph(
    path: Path, image_resolution: tuple[int, int], centre_crop: bool = False
) -> Tensor:
    """Read a user's photograph of any size and kind: [1, 3, height, width] float32 in [0, 1].

    Beyond what the training pictures need, it is turned upright as its EXIF data say, what is
    transparent becomes white, and 16-bit grey is scaled to 8 bits.

    Args:
        path: the image file.
        image_resolution: (height, width) that it is squeezed into, as the training pictures are.
        centre_crop: cut the middle out in the shape of ``image_resolution`` instead.

    Raises:
        ValueError: if it cannot be read (see ``open_picture``) or its pixels are float32, whose
            white no file says.
    """
    height, width = image_resolution
    with warnings.catch_warnings():
        # Pillow warns of odd metadata, and of over 89 million pixels, which still fit in memory.
        warnings.filterwarnings("ignore", module="PIL")
        with open_picture(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode == "F":
                raise ValueError("its pixels are floating-point numbers; save it as PNG or JPEG")
            if image.mode.startswith("I"):
                # Pillow's own conversion clips the 16 bits to 8.
                pixels = np.clip(np.asarray(image) / 257, 0, 255).round().astype(np.uint8)
                image = Image.fromarray(pixels)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
            if centre_crop:
                image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
            return functional.to_tensor(functional.resize(image, [height, width])).unsqueeze(0)


def picture_to_pixels(path: Path, image_resolution: tuple[int, int]) -> np.ndarray:
    """Decode and resize one picture as torchvision's ``Resize`` does: [height, width, 3] uint8.

    ``ToTensor`` of it is bit for bit what the post's transformation pipeline gives.

    Raises:
        ValueError: if it cannot be read (see ``open_picture``).
    """
    with open_picture(path) as image:
        return np.asarray(functional.resize(image.convert("RGB"), list(image_resolution)))


def decode_pictures(
    paths: Sequence[Path], image_resolution: tuple[int, int], caption: str | None = None
) -> np.ndarray:
    """Do so with many pictures, see ``map_in_parallel``: [n, height, width, 3] uint8."""
    decode = partial(picture_to_pixels, image_resolution=image_resolution)
    return np.stack(map_in_parallel(decode, paths, caption))


def map_in_parallel(
    function: Callable[[Any], Any], items: Sequence[Any], caption: str | None, unit: str = "picture"
) -> list[Any]:
    """Return ``function`` of each item; it runs on all cores, and the first error stops the rest.

    Threads are enough: Pillow and NumPy let go of the interpreter's lock while they work. A
    ``caption`` goes to stderr, with a progress bar in ``unit`` below it on terminals.
    """
    if caption:
        print(caption, file=sys.stderr)
    bar = {"unit": unit, "disable": None if caption else True, "leave": False}
    return thread_map(function, items, max_workers=os.cpu_count(), **bar)


def fingerprint(paths: Sequence[Path], *parts: object) -> str:
    """Return what identifies decoded pictures: their files, and the code that decodes them.

    A file stands in by its path, size and time of change; Pillow by its version and this module by
    its text, so that another way of decoding is never answered from an old cache.
    """
    state = hashlib.sha256(Path(__file__).read_bytes())
    state.update(repr((parts, PIL.__version__)).encode())
    for path in paths:
        status = path.stat() if path.exists() else os.stat_result([0] * 10)
        state.update(repr((path.absolute(), status.st_size, status.st_mtime_ns)).encode())
    return state.hexdigest()


def compute_once(
    name: str, key: str, compute: Callable[[], np.ndarray], folder: Path | None = None
) -> Tensor:
    """Return ``compute()`` as a tensor, from the file that an earlier call kept where there is one.

    A kept file that is damaged is computed again; one of another key makes room. A folder that
    cannot be written to costs a warning and the time of the next run.

    Args:
        name: the start of the kept file's name.
        key: what identifies the content (see ``fingerprint``).
        compute: makes the array.
        folder: where the file is kept, ``CACHE_FOLDER`` if not given.
    """
    path = (folder or CACHE_FOLDER) / f"{name}-{key[:12]}.npz"
    try:
        if path.is_file():
            with np.load(path, allow_pickle=False) as kept:
                # What is not compressed is no zip bomb; NumPy alone may stop before the checksum.
                if any(part.compress_type for part in kept.zip.infolist()) or kept.zip.testzip():
                    raise ValueError("compressed, or a checksum is wrong")
                if kept["key"] == key:
                    return torch.from_numpy(kept["pixels"])
    # A damaged file can make NumPy and its zip reader raise almost anything.
    except Exception as error:
        warnings.warn(f"{path} is damaged and made again ({type(error).__name__})", stacklevel=2)
    pixels = compute()
    temporary = path.with_suffix(f".{os.getpid()}.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(temporary, key=np.array(key), pixels=pixels)
        temporary.replace(path)
    except FileNotFoundError:
        pass  # Another run was faster with the same pictures, and has cleared this one's file away.
    except OSError as error:
        warnings.warn(f"decoded pictures are not kept for the next run: {error}", stacklevel=2)
    with suppress(OSError):
        # Files of other keys, and what killed and failed runs left.
        for outdated in set(path.parent.glob(f"{name}-*")) - {path}:
            outdated.unlink()
    return torch.from_numpy(pixels)
