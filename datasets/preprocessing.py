"""One picture read, and a batch of them changed at random."""

import math
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, Resize, ToTensor

from datasets.errors import DamagedPicture

# How far ``augment`` goes, chosen on the validation split; 0 switches a change off.
SHIFT = 0.09  # largest shift each way, in heights and widths of the picture
ROTATION = 25.0  # largest rotation each way, in degrees
ZOOM = 0.25  # largest zoom in and out, as a share: 1 / 1.25 to 1.25
COLOUR = 0.3  # largest change of a colour channel's brightness, as a share: 0.7 to 1.3

# Pillow warns of odd metadata, and of over 89 million pixels, which still fit. It is told once to
# be silent: pictures are read in threads, and there a filter around each would not be safe.
warnings.filterwarnings("ignore", module="PIL")


def read_picture(path: Path) -> Image.Image:
    """Read a picture of any size and kind that Pillow reads, as RGB.

    EXIF data turn it upright, what is transparent becomes white, 16 bits become 8. iPhone's HEIC
    is read where the package ``pillow-heif`` is installed. ``DamagedPicture`` names what cannot be
    read.
    """
    can_read_heic = read_heic()
    try:
        with Image.open(path) as opened:
            return as_rgb(ImageOps.exif_transpose(opened))
    except Exception as error:  # Pillow raises almost anything for a damaged file
        reason = str(error)
        if Path(path).suffix.lower() in (".heic", ".heif") and not can_read_heic:
            reason = "HEIC pictures need the package pillow-heif: pip install pillow-heif"
        raise DamagedPicture(f"{path} cannot be read as a picture: {reason}") from None


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture to 8-bit RGB, white where it is transparent.

    ``ValueError`` for pixels that are floating-point numbers: nothing tells what white is.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it as PNG or JPEG")
    if image.mode.startswith("I"):  # 16 bits, which Pillow's own conversion clips to 8
        pixels = np.asarray(image) / 257
        image = Image.fromarray(np.clip(pixels, 0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


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
