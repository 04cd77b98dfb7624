"""One picture read, and a batch of them changed at random."""

import math
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize, ToTensor

from datasets.errors import DamagedPicture

# How far ``augment`` goes, chosen on the validation split (the trials
# were not kept); 0 switches a change off.
SHIFT = 0.09  # largest shift each way, in heights and widths of the picture
ROTATION = 25.0  # largest rotation each way, in degrees
ZOOM = 0.25  # largest zoom in and out, as a share: 1 / 1.25 to 1.25
COLOUR = 0.3  # largest change of a colour channel's brightness, as a share: 0.7 to 1.3

# What may be white in a picture of more than 8 bits: the largest numbers of 8 to 16 bits.
WHITES = (255, 1023, 4095, 16383, 65535)
WHITE_IS_ZERO = 0  # in TIFF files
HEIC_ENDINGS = {".heic", ".heif", ".hif"}


def read_picture(path: Path, side: int | None = None) -> Image.Image:
    """Read a picture of any size and kind that Pillow reads, as RGB.

    EXIF data turn it upright, what is transparent becomes white, 16 bits become 8 (see
    ``as_8_bits``), and of several pictures in a file the first is taken. iPhone's HEIC is read
    where the package ``pillow-heif`` is installed. A JPEG is decoded at a half, a quarter or an
    eighth where ``side`` pixels each way are left, in a fraction of the time and memory.
    ``DamagedPicture`` names what cannot be read.
    """
    with open_picture(path) as opened:
        try:
            if side is not None:
                opened.draft(None, (side, side))
            refuse_dark_colours(opened)
            ImageOps.exif_transpose(opened, in_place=True)
            return as_rgb(opened)
        except Exception as error:  # Pillow raises almost anything for a damaged file
            raise damaged(path, error) from None


def pixels_held(path: Path, side: int | None = None) -> int:
    """Return how many pixels are in memory while ``read_picture`` reads a picture."""
    with open_picture(path) as opened:
        pixels = opened.width * opened.height
        # A progressive JPEG is held whole until its last pass, whatever comes out.
        if side is not None and "progressive" not in opened.info:
            opened.draft(None, (side, side))
            pixels = opened.width * opened.height
        return pixels


def open_picture(path: Path) -> Image.Image:
    """Open a picture's file, without reading its pixels; ``DamagedPicture`` if that fails."""
    read_heic()
    silence_pillow()
    try:
        return Image.open(path)
    except Exception as error:  # as above
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception) -> DamagedPicture:
    """Return the error that names a picture, and says why it cannot be read."""
    reason = str(error) or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        reason = f"it has more than {most:,} pixels, the most that Pillow reads: make it smaller"
    elif Path(path).suffix.lower() in HEIC_ENDINGS and not read_heic():
        reason = "HEIC pictures need the package pillow-heif: pip install pillow-heif"
    return DamagedPicture(f"{path} cannot be read as a picture: {reason}")


def side_needed(transform: Any) -> int | None:
    """Return how many pixels each way of a picture a transform makes use of; None for all of them.

    One that first averages pictures down, as ``Resize`` does, gets four times its size: then what
    a JPEG's decoder has averaged before it differs by hardly one of 255 levels.
    """
    first = next(iter(getattr(transform, "transforms", [transform])), None)
    if not isinstance(first, Resize) or first.interpolation is InterpolationMode.NEAREST:
        return None
    sides = [first.size] if isinstance(first.size, int) else first.size
    return 4 * max(sides)


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture to 8-bit RGB, white where it is transparent."""
    if image.mode.startswith(("I", "F")):
        image = as_8_bits(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def as_8_bits(image: Image.Image) -> Image.Image:
    """Convert a grey picture of larger whole numbers, or of fractions, to 8 bits.

    Black is 0. White is the largest number of 8, 10, 12, 14 or 16 bits, the least of these that no
    pixel exceeds: of how many bits they are files seldom tell. For fractions white is 1.
    ``ValueError`` for all others: numbers below 0 or of more bits, fractions above 1.
    """
    pixels = np.asarray(image)
    lowest, highest = pixels.min(), pixels.max()
    fractions = image.mode == "F" and (highest <= 1 or not np.array_equal(pixels, pixels.round()))
    possible = [white for white in ((1,) if fractions else WHITES) if highest <= white]
    if not possible or not lowest >= 0:  # which NaN is not, either
        given = f"its pixels are numbers from {lowest:g} to {highest:g}"
        raise ValueError(f"{given}: 0 to 65535, or fractions from 0 to 1, are needed")
    scaled = pixels.astype(np.float32)
    scaled *= 255 / possible[0]
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO:
        scaled = 255 - scaled
    grey = scaled.round().astype(np.uint8)
    grey[pixels == image.info.get("transparency")] = 255  # one value may be that, and is then white
    return Image.fromarray(grey)


def refuse_dark_colours(opened: Image.Image) -> None:
    """Raise ``ValueError`` for colours of 10, 12 or 14 bits that are kept in 16 bits each.

    Pillow reads the upper 8 of these 16, with which such a picture is nearly black.
    """
    deep = any(";16" in str(tile) for tile in getattr(opened, "tile", []))
    if deep and opened.mode.startswith("RGB"):
        brightest = np.asarray(opened)[..., :3].max()
        if 0 < brightest < 64:
            raise ValueError("its colours fill less than their 16 bits: save it with 8 bits each")


@cache
def silence_pillow() -> None:
    """Let Pillow not warn of odd metadata, and of over 89 million pixels, which still fit.

    It is told once and for all: pictures are read in threads, where no filter of warnings can be
    set for one of them.
    """
    warnings.filterwarnings("ignore", module="PIL")


@cache
def read_heic() -> bool:
    """Let Pillow read HEIC, if ``pillow-heif`` is installed; return whether it is."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def image_pipeline(resolution: tuple[int, int], crop: bool = False) -> Compose:
    """Return the transform from a picture to the model's input.

    It squeezes the picture into (height, width), as in the post, or with ``crop`` keeps its middle
    in the right proportions, and makes a tensor of it, [channels, height, width] in [0, 1]. It runs
    once for each picture, so nothing in it may be random.
    """
    if crop:
        return Compose([Resize(max(resolution)), CenterCrop(resolution), ToTensor()])
    return Compose([Resize(resolution), ToTensor()])


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
