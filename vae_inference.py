"""See what a trained model has learnt: ``python vae_inference.py similar photograph.jpg``."""

from vae.training.command_line import one_line_errors, read_inference_line

if __name__ == "__main__":
    read_inference_line(__doc__)  # --help and mistakes are answered before PyTorch is loaded

import argparse
import base64
import io
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.utils import make_grid

from datasets.preprocessing import read_photograph
from vae.latent import near, spherical_steps, variation_per_dimension
from vae.layers import Decoder
from vae.training.checkpoint import load_model, replace_atomically
from vae.training.run import find_device
from vae.vae import VAE

ROOT = Path(__file__).parent
SMALLEST_SIDE = 128
"""Pixels that each picture of a grid has at least on its shorter side."""


def similar(model: VAE, options: argparse.Namespace) -> bytes:
    """Draw one row for each picture: the picture, its reconstruction, new flowers near it."""
    images = []
    for x in photographs(model, options):
        mean, log_var = model.encoder(x)
        z = near(mean, log_var, options.count, options.spread)
        images += [x, model.decoder(torch.cat((mean, z)))]
    captions = ["picture", "reconstruction", "new flowers"]
    return draw_grid(torch.cat(images), options.count + 2, captions)


def sample(model: VAE, options: argparse.Namespace) -> bytes:
    """Draw new flowers from the prior."""
    return draw_grid(model.sample(options.count), math.ceil(math.sqrt(options.count)))


def reconstruct(model: VAE, options: argparse.Namespace) -> bytes:
    """Draw each picture beside its reconstruction."""
    x = torch.cat(photographs(model, options))
    pairs = torch.stack((x, model.reconstruct(x)), dim=1).flatten(0, 1)
    return draw_grid(pairs, 2, ["picture", "reconstruction"])


def interpolate(model: VAE, options: argparse.Namespace) -> bytes:
    """Draw the way from one picture to another, between the two pictures."""
    start, end = photographs(model, options)
    z = spherical_steps(model.encoder(start)[0], model.encoder(end)[0], options.steps)
    captions = ["from", *[""] * options.steps, "to"]
    return draw_grid(torch.cat((start, model.decoder(z), end)), len(captions), captions)


def traverse(model: VAE, options: argparse.Namespace) -> bytes:
    """Draw one row for each latent dimension, which alone moves over the prior's -3 to 3."""
    (x,) = photographs(model, options)
    shares, order = variation_per_dimension(model).sort(descending=True)
    values = torch.linspace(-3, 3, options.steps, device=x.device)
    z = model.encoder(x)[0].repeat(model.latent_size, options.steps, 1)
    for row, dimension in enumerate(order):
        z[row, :, dimension] = values
    rows = [f"z{d} ({share:.0%})" for d, share in zip(order.tolist(), shares.tolist(), strict=True)]
    captions = [f"{value:.3g}" for value in values.tolist()]
    return draw_grid(model.decoder(z.flatten(0, 1)), options.steps, captions, rows)


def explore(model: VAE, options: argparse.Namespace) -> bytes:
    """Write a web page that needs nothing but itself: sliders that move the decoder's picture."""
    exported = {
        "features": model.decoder.feature_shape,
        "variation": variation_per_dimension(model).tolist(),
        "layers": [
            {"weight": base64_float32(layer.weight), "bias": base64_float32(layer.bias)}
            for layer in layers_of(model.decoder)
        ],
    }
    template = (ROOT / "vae" / "explore.html").read_text(encoding="utf-8")
    return template.replace("{{model}}", json.dumps(exported)).encode()


def layers_of(decoder: Decoder) -> list[nn.Module]:
    """Return the decoder's linear layer and its transposed convolutions, batch norms folded in."""
    layers = [decoder.fc]
    for deconv, norm in ((decoder.deconv1, decoder.norm1), (decoder.deconv2, decoder.norm2)):
        folded = isinstance(norm, nn.BatchNorm2d)
        layers.append(fuse_conv_bn_eval(deconv, norm, transpose=True) if folded else deconv)
    return [*layers, decoder.deconv3]


def base64_float32(values: Tensor) -> str:
    """Return the values in order, as little-endian float32 in base64."""
    return base64.b64encode(values.detach().cpu().numpy().astype("<f4").tobytes()).decode()


def photographs(model: VAE, options: argparse.Namespace) -> list[Tensor]:
    """Read the pictures of the command line, each [1, 3, height, width] as the model needs it.

    Raises:
        ValueError: if one of them cannot be read; the message names it.
    """
    device = model.decoder.fc.weight.device
    return [
        read_photograph(path, model.image_resolution, options.centre_crop).to(device)
        for path in options.images
    ]


def draw_grid(
    images: Tensor, columns: int, captions: Sequence[str] = (), rows: Sequence[str] = ()
) -> bytes:
    """Return a PNG file of images, magnified so that their pixels can be seen.

    Args:
        images: in [0, 1], [n, 3, height, width], row by row.
        columns: images in a row.
        captions: what to write above the first columns.
        rows: what to write to the left of the rows.
    """
    factor = math.ceil(SMALLEST_SIDE / min(images.shape[-2:]))
    pixels = images.mul(255).round().byte().cpu()
    pixels = pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    grid = make_grid(pixels, nrow=columns, padding=4, pad_value=255)
    left, top = 80 if rows else 0, 20 if captions else 0
    canvas = Image.new("RGB", (left + grid.shape[2], top + grid.shape[1]), "white")
    canvas.paste(Image.fromarray(grid.movedim(0, -1).numpy()), (left, top))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(15)
    height, width = (size + 4 for size in pixels.shape[-2:])
    for column, caption in enumerate(captions):
        draw.text((left + (column + 0.5) * width, 2), caption, "black", font, anchor="ma")
    for row, caption in enumerate(rows):
        draw.text((4, top + (row + 0.5) * height), caption, "black", font, anchor="lm")
    file = io.BytesIO()
    canvas.save(file, "PNG")
    return file.getvalue()


def newest_checkpoint(log_dir: Path) -> Path:
    """Return the checkpoint that was written last of those in ``log_dir``.

    Raises:
        ValueError: if there is none.
    """
    found = list(log_dir.glob("*/checkpoint.pt"))
    if not found:
        raise ValueError(
            f"{log_dir} holds no run with a checkpoint.pt: train a model with vae_training.py, or "
            "name a checkpoint with --checkpoint"
        )
    return max(found, key=lambda path: path.stat().st_mtime)


COMMANDS = {
    each.__name__: each for each in (similar, sample, reconstruct, interpolate, traverse, explore)
}


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says and write one file."""
    options = read_inference_line(__doc__, arguments)
    checkpoint = options.checkpoint or newest_checkpoint(options.log_dir)
    if options.output.resolve() in [each.resolve() for each in (checkpoint, *options.images)]:
        raise ValueError(f"{options.output} would be replaced: name another file with --output")
    model, config = load_model(checkpoint, find_device(options.device))
    if config["image_channels"] != 3:
        raise ValueError(f"{checkpoint} is of a model whose images are not RGB: choose another")
    with torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(options.seed)
        content = COMMANDS[options.command](model, options)
    with replace_atomically(options.output) as file:
        file.write(content)
    if not options.checkpoint:
        print(f"from the newest run: {checkpoint}", file=sys.stderr)
    print(options.output)


if __name__ == "__main__":
    main()
