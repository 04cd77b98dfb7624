"""From image files to tensors: decode every picture once, in parallel, and keep the result."""

import hashlib
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import functional
from tqdm import tqdm

from vae.checkpoint import save_checkpoint

CACHE_FOLDER = Path(__file__).parent / "cache"


@contextmanager
def open_picture(path: Path) -> Iterator[Image.Image]:
    """Open an image file; what goes wrong while it is open is reported with the file's name.

    Raises:
        ValueError: if it is missing, damaged, no picture, or so large (over 179 million pixels)
            that it may be a decompression bomb. The message names the file.
    """
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from None


def read_picture(path: Path) -> Image.Image:
    """Decode an image file to RGB.

    Raises:
        ValueError: if it cannot be read (see ``open_picture``).
    """
    with open_picture(path) as image:
        return image.convert("RGB")


def read_photograph(
    path: Path, image_resolution: tuple[int, int], centre_crop: bool = False
) -> Tensor:
    """Read a user's photograph of any size and kind: [1, 3, height, width] float32 in [0, 1].

    Beyond what the training pictures need, it is turned upright as its EXIF data say, what is
    transparent becomes white, and 16-bit grey is scaled to 8 bits.

    Args:
        path: the image file.
        image_resolution: (height, width) that it is resized to, as the training pictures are:
            squeezed, not cropped.
        centre_crop: cut the middle out in the shape of ``image_resolution`` instead of squeezing.

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
        ValueError: if the file cannot be read as a picture.
    """
    return np.asarray(functional.resize(read_picture(path), list(image_resolution)))


def compute_in_parallel(
    compute: Callable[[range], np.ndarray], out: np.ndarray, progress: str | None = None
) -> None:
    """Fill ``out[i]`` for every i with what ``compute`` returns for runs of indices, on all cores.

    Threads are enough: Pillow and NumPy let go of the interpreter's lock while they work.

    Args:
        compute: given a range of indices, returns their pictures, [len, height, width, 3].
        out: the array to fill, [n, height, width, 3].
        progress: the progress bar's caption; no bar if None.
    """
    count = len(out)
    runs = [range(start, min(start + 32, count)) for start in range(0, count, 32)]
    bar = tqdm(desc=progress, total=count, unit="picture", disable=progress is None)
    with ThreadPoolExecutor(os.cpu_count()) as pool, bar:
        try:
            for run, pictures in zip(runs, pool.map(compute, runs), strict=True):
                out[run.start : run.stop] = pictures
                bar.update(len(run))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def decode_pictures(
    paths: Sequence[Path], image_resolution: tuple[int, int], progress: str | None = None
) -> np.ndarray:
    """Decode and resize many pictures on all cores: [n, height, width, 3] uint8.

    Raises:
        ValueError: if one of them cannot be read; the message names it.
    """
    pixels = np.empty((len(paths), *image_resolution, 3), np.uint8)
    compute_in_parallel(
        lambda run: np.stack([picture_to_pixels(paths[i], image_resolution) for i in run]),
        pixels,
        progress,
    )
    return pixels


def fingerprint(paths: Sequence[Path], *parts: object) -> str:
    """Return what identifies decoded pictures: their files, and the code that decodes them.

    A file stands in by its path, size and time of change; this module by its text, so that an
    edit of the preprocessing is never answered from an old cache.
    """
    state = hashlib.sha256(Path(__file__).read_bytes())
    state.update(repr((parts, PIL.__version__)).encode())
    for path in paths:
        status = path.stat() if path.exists() else None
        found = status and (status.st_size, status.st_mtime_ns)
        state.update(f"{path.resolve()} {found}\n".encode())
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
    path = (folder or CACHE_FOLDER) / f"{name}-{key[:12]}.pt"
    try:
        kept = torch.load(path, weights_only=True)
        if kept["key"] == key and kept["crc32"] == zlib.crc32(kept["pixels"].numpy()):
            return kept["pixels"]
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError, EOFError, UnpicklingError, LookupError, TypeError, ValueError,
            AttributeError) as error:  # fmt: skip
        warnings.warn(f"{path} is damaged and made again ({type(error).__name__})", stacklevel=2)
    pixels = torch.from_numpy(compute())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        checksum = zlib.crc32(pixels.numpy())
        save_checkpoint({"key": key, "crc32": checksum, "pixels": pixels}, path)
        for outdated in path.parent.glob(f"{name}-*.pt"):
            if outdated != path:
                outdated.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"decoded pictures are not kept for the next run: {error}", stacklevel=2)
    return pixels
