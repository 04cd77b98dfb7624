"""See what a trained model has learnt: ``python vae_inference.py similar photograph.jpg``."""

from vae.run import RUNS, one_line_errors, read_inference_line, take_terminal

if __name__ == "__main__":
    take_terminal()
    read_inference_line(__doc__)  # --help and mistakes are answered before PyTorch is loaded

import argparse
import base64
import io
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.utils import make_grid

from datasets.flowers102 import is_on_disk
from datasets.pictures import load_splits
from datasets.preprocessing import read_photograph
from vae.latent import fit_latents, near, prior, spherical_steps, variation_per_dimension
from vae.layers import Decoder
from vae.training.checkpoint import load_model, replace_atomically
from vae.training.run import find_device
from vae.vae import VAE

ROOT = Path(__file__).parent
TRAINED = ROOT / "results" / "trained.pt"  # the model that comes with the repository
SIGNATURE = b"vae_inference.py"  # stands in every file that is written here
SMALLEST_SIDE = 128  # pixels that each picture of a grid has at least on its shorter side


def similar(model: VAE, latents: MultivariateNormal, options: argparse.Namespace) -> bytes:
    """Draw one row for each picture: the picture, its reconstruction, new flowers near it."""
    images = []
    for x in photographs(model, options):
        mean, _ = model.encoder(x)
        z = near(mean, latents, options.count, options.spread)
        images += [x, model.decoder(torch.cat((mean, z)))]
    captions = ["picture", "reconstruction", "new flowers"]
    return draw_grid(torch.cat(images), options.count + 2, captions)


def sample(model: VAE, latents: MultivariateNormal, options: argparse.Namespace) -> bytes:
    """Draw new flowers from where the training pictures' latents are, or from the prior."""
    source = latents if options.source == "data" else prior(model)
    images = model.decoder(source.sample((options.count,)))
    return draw_grid(images, math.ceil(math.sqrt(2 * options.count)))  # twice as wide as high


def reconstruct(model: VAE, _: MultivariateNormal, options: argparse.Namespace) -> bytes:
    """Draw each picture beside its reconstruction."""
    x = torch.cat(photographs(model, options))
    pairs = torch.stack((x, model.reconstruct(x)), dim=1).flatten(0, 1)
    return draw_grid(pairs, 2, ["picture", "reconstruction"])


def interpolate(model: VAE, _: MultivariateNormal, options: argparse.Namespace) -> bytes:
    """Draw the way from one picture's reconstruction to another's, between the two pictures."""
    start, end = photographs(model, options)
    z = spherical_steps(model.encoder(start)[0], model.encoder(end)[0], options.steps)
    between = [""] * (options.steps - 2)
    captions = ["from", "reconstruction", *between, "reconstruction", "to"]
    return draw_grid(torch.cat((start, model.decoder(z), end)), len(captions), captions)


def traverse(model: VAE, latents: MultivariateNormal, options: argparse.Namespace) -> bytes:
    """Draw one row for each latent dimension, which alone moves by -3 to 3 standard deviations."""
    (x,) = photographs(model, options)
    mean, _ = model.encoder(x)
    shares, order = variation_per_dimension(model, latents).sort(descending=True)
    steps = torch.linspace(-3, 3, options.steps, device=x.device)
    # The first column is the picture's own reconstruction.
    z = mean.repeat(model.latent_size, 1 + options.steps, 1)
    for row, dimension in enumerate(order):
        z[row, 1:, dimension] = latents.mean[dimension] + steps * latents.stddev[dimension]
    own = ((mean[0] - latents.mean) / latents.stddev)[order]
    rows = [
        f"z{dimension} ({share:.0%})\nis {step:.2f} sd"
        for dimension, share, step in zip(order, shares, own, strict=True)
    ]
    captions = ["reconstruction", *(f"{step:.3g} sd" for step in steps.tolist())]
    marks = 1.5 + (own.clamp(-3, 3) + 3) / 6 * (options.steps - 1)
    return draw_grid(model.decoder(z.flatten(0, 1)), len(captions), captions, rows, marks.tolist())


def explore(model: VAE, latents: MultivariateNormal, options: argparse.Namespace) -> bytes:
    """Write a web page that needs nothing but itself: sliders that move the decoder's picture."""
    pictures = photographs(model, options)
    start = model.encoder(pictures[0])[0] if pictures else latents.sample((1,))
    exported = {
        "features": model.decoder.feature_shape,
        "variation": variation_per_dimension(model, latents).tolist(),
        "start": start[0].tolist(),
        "centre": latents.mean.tolist(),
        "scale": latents.scale_tril.tolist(),
        "layers": [
            {"weight": base64_float32(weight), "bias": base64_float32(bias)}
            for weight, bias in (layer.parameters() for layer in layers_of(model.decoder))
        ],
    }
    template = (ROOT / "vae" / "explore.html").read_text(encoding="utf-8")
    return template.replace("{{model}}", json.dumps(exported)).encode()


def layers_of(decoder: Decoder) -> list[nn.Linear | nn.ConvTranspose2d]:
    """Return the decoder's linear layer and its transposed convolutions, batch norms folded in."""
    layers: list[nn.Linear | nn.ConvTranspose2d] = [decoder.fc]
    for deconv, norm in ((decoder.deconv1, decoder.norm1), (decoder.deconv2, decoder.norm2)):
        if isinstance(norm, nn.BatchNorm2d):
            deconv = fuse_conv_bn_eval(deconv, norm, transpose=True)
        layers.append(deconv)
    return [*layers, decoder.deconv3]


def base64_float32(values: Tensor) -> str:
    """Return the values in order, as little-endian float32 in base64."""
    return base64.b64encode(values.detach().cpu().numpy().astype("<f4").tobytes()).decode()


def photographs(model: VAE, options: argparse.Namespace) -> list[Tensor]:
    """Read the pictures of the command line, each [1, 3, height, width] as the model needs it."""
    size, device = model.image_resolution, model.decoder.fc.weight.device
    return [read_photograph(path, size, options.centre_crop).to(device) for path in options.images]


def draw_grid(
    images: Tensor,
    columns: int,
    captions: Sequence[str] = (),
    rows: Sequence[str] = (),
    marks: Sequence[float] = (),
) -> bytes:
    """Return a PNG file of images, [n, 3, height, width] in [0, 1], row by row, with captions.

    They are enlarged smoothly: as blocks, few pixels hardly make a flower. ``rows`` stand to the
    left of the rows; ``marks`` say where to mark each row's lower edge, counted in columns.
    """
    factor = math.ceil(SMALLEST_SIDE / min(images.shape[-2:]))
    large = F.interpolate(images, scale_factor=factor, mode="bicubic").clamp(0, 1)
    pixels = large.mul(255).round().byte().cpu()
    grid = make_grid(pixels, nrow=columns, padding=4, pad_value=255)
    left, top = 90 if rows else 0, 20 if captions else 0
    canvas = Image.new("RGB", (left + grid.shape[2], top + grid.shape[1]), "white")
    canvas.paste(Image.fromarray(grid.movedim(0, -1).numpy()), (left, top))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(15)
    height, width = (size + 4 for size in pixels.shape[-2:])
    for column, caption in enumerate(captions):
        draw.text((left + (column + 0.5) * width, 2), caption, "black", font, anchor="ma")
    for row, caption in enumerate(rows):
        draw.text((4, top + (row + 0.5) * height), caption, "black", font, anchor="lm")
    for row, mark in enumerate(marks):
        x, y = left + mark * width + 2, top + (row + 1) * height
        draw.polygon([(x, y - 12), (x - 8, y + 3), (x + 8, y + 3)], "#c2407e", "white")
    file = io.BytesIO()
    signature = PngInfo()
    signature.add_text("Software", SIGNATURE.decode())
    canvas.save(file, "PNG", pnginfo=signature)
    return file.getvalue()


def find_checkpoint(log_dir: Path) -> Path:
    """Return the checkpoint that was written last in ``log_dir``, else the repository's own."""
    found = list(log_dir.glob("*/checkpoint.pt"))
    if not found and log_dir.absolute() != RUNS.absolute():
        needed = "train a model with vae_training.py, or name a checkpoint with --checkpoint"
        raise ValueError(f"{log_dir} holds no run with a checkpoint.pt: {needed}")
    return max(found, key=lambda path: path.stat().st_mtime, default=TRAINED)


def refit_latents(model: VAE, config: dict[str, Any]) -> MultivariateNormal:
    """Fit the latents of a run that has not ended, where its pictures are at hand."""
    dataset, data_root = config.get("dataset"), Path(str(config.get("data_root")))
    if dataset == "synthetic" or (dataset == "flowers102" and is_on_disk(data_root)):
        train = load_splits(dataset, data_root, model.image_resolution).train
        return fit_latents(model, train.to(model.decoder.fc.weight.device).batches())
    lacks = "the checkpoint has no fitted latents (its run has not ended)"
    instead = "its pictures are not at hand: the prior stands in for them"
    print(f"warning: {lacks} and {instead}", file=sys.stderr)
    return prior(model)


COMMANDS = {
    each.__name__: each for each in (similar, sample, reconstruct, interpolate, traverse, explore)
}


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says and write one file."""
    options = read_inference_line(__doc__, arguments)
    checkpoint = options.checkpoint or find_checkpoint(options.log_dir)
    output = options.output or options.usual_output
    if not options.output and output.is_file() and SIGNATURE not in output.read_bytes():
        raise ValueError(f"{output} is not this script's: name it with --output to replace it")
    sources = [os.path.realpath(each) for each in (checkpoint, *options.images)]
    if os.path.realpath(output) in sources:
        raise ValueError(f"{output} would be replaced: name another file with --output")
    model, config, latents = load_model(checkpoint, find_device(options.device))
    if config["image_channels"] != 3:
        raise ValueError(f"{checkpoint} is of a model whose images are not RGB: choose another")
    with torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(options.seed)
        if not latents:
            unused = options.command in ("reconstruct", "interpolate")
            latents = prior(model) if unused else refit_latents(model, config)
        content = COMMANDS[options.command](model, latents, options)
    with replace_atomically(output) as file:
        file.write(content)
    if not options.checkpoint:
        print(f"drawn by the model in {checkpoint} ({config.get('dataset')})", file=sys.stderr)
    print(output)


if __name__ == "__main__":
    main()
