"""See what a trained model has learnt: ``python vae_inference.py similar photograph.jpg``."""

import base64
import io
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import tyro
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.transforms import CenterCrop, Compose, Resize, ToTensor
from torchvision.utils import make_grid
from tyro.conf import OmitArgPrefixes, Positional, arg

from datasets import find_dataset
from datasets.preprocessing import InMemory, UserError, read_picture
from vae.latent import fit_latents, near, prior, spherical_steps, variation_per_dimension
from vae.layers import Decoder
from vae.run import find_device, load_model, one_line_errors, own_random_numbers, replace_atomically
from vae.vae import VAE

ROOT = Path(__file__).parent
RUNS = ROOT / "vae" / "runs"
TRAINED = ROOT / "results" / "trained.pt"  # the model that comes with the repository
SIGNATURE = b"vae_inference.py"  # stands in every file that is written here
SMALLEST_SIDE = 128  # pixels that each picture of a grid has at least on its shorter side


@dataclass(frozen=True)
class Settings:
    """What all commands share."""

    checkpoint: Path | None = None  # model; if none is given: the newest in --log-dir
    log_dir: Path = RUNS  # folder of all runs
    output: Path | None = None  # file to write; if none is given: the command's name
    crop: bool = False  # take the middle square of each picture, do not squeeze it
    seed: int = 0  # of all that is drawn
    device: str = "auto"  # cpu, cuda, mps ...; auto: an accelerator, if there is one


Pictures = Positional[Annotated[tuple[Path, ...], arg(name="pictures", metavar="PICTURE ...")]]
Shared = Annotated[OmitArgPrefixes[Settings], arg(help="What all commands share.")]
SETTINGS = Settings()
FROM = "where the training pictures' latents are, or N(0, I)"


def similar(
    images: Pictures,
    settings: Shared = SETTINGS,
    count: Annotated[int, arg(help="new flowers for each picture")] = 8,
    spread: Annotated[float, arg(help="0: the reconstruction; 1: any flower")] = 0.3,
) -> None:
    """A picture, its reconstruction, and new flowers near it."""
    check("the number of pictures", len(images), 1, 1000)
    check("--count", count, 1, 1000)
    check("--spread", spread, 0, 1)
    with open_model(settings, "similar.png", images) as (model, latents):
        rows = []
        for x in photographs(model, images, settings):
            mean, _ = model.encoder(x)
            z = near(mean, latents, count, spread)
            rows += [x, model.decoder(torch.cat((mean, z)))]
        captions = ["picture", "reconstruction", "new flowers"]
        write(draw_grid(torch.cat(rows), count + 2, captions), settings, "similar.png")


def sample(
    settings: Shared = SETTINGS,
    count: Annotated[int, arg(help="new flowers")] = 50,
    source: Annotated[Literal["data", "prior"], arg(name="from", help=FROM)] = "data",
) -> None:
    """New flowers."""
    check("--count", count, 1, 1000)
    with open_model(settings, "sample.png") as (model, latents):
        z = (latents if source == "data" else prior(model)).sample((count,))
        columns = math.ceil(math.sqrt(2 * count))  # twice as wide as high
        write(draw_grid(model.decoder(z), columns), settings, "sample.png")


def reconstruct(
    images: Pictures,
    settings: Shared = SETTINGS,
) -> None:
    """Pictures beside their reconstructions."""
    check("the number of pictures", len(images), 1, 1000)
    with open_model(settings, "reconstruct.png", images, fitted=False) as (model, _):
        x = torch.cat(photographs(model, images, settings))
        pairs = torch.stack((x, model.reconstruct(x)), dim=1).flatten(0, 1)
        write(draw_grid(pairs, 2, ["picture", "reconstruction"]), settings, "reconstruct.png")


def interpolate(
    images: Positional[tuple[Path, Path]],
    settings: Shared = SETTINGS,
    steps: Annotated[int, arg(help="pictures on the way, both ends included")] = 8,
) -> None:
    """The way from one picture's reconstruction to another's, between the two pictures."""
    check("--steps", steps, 2, 100)
    with open_model(settings, "interpolate.png", images, fitted=False) as (model, _):
        start, end = photographs(model, images, settings)
        z = spherical_steps(model.encoder(start)[0], model.encoder(end)[0], steps)
        captions = ["from", "reconstruction", *[""] * (steps - 2), "reconstruction", "to"]
        grid = draw_grid(torch.cat((start, model.decoder(z), end)), len(captions), captions)
        write(grid, settings, "interpolate.png")


def traverse(
    image: Positional[Path],
    settings: Shared = SETTINGS,
    steps: Annotated[int, arg(help="pictures for each dimension")] = 7,
) -> None:
    """What each latent dimension does to a picture, moved by -3 to 3 standard deviations."""
    check("--steps", steps, 2, 100)
    with open_model(settings, "traverse.png", [image]) as (model, latents):
        (x,) = photographs(model, [image], settings)
        mean, _ = model.encoder(x)
        shares, order = variation_per_dimension(model, latents).sort(descending=True)
        moves = torch.linspace(-3, 3, steps, device=x.device)
        # The first column is the picture's own reconstruction.
        z = mean.repeat(model.latent_size, 1 + steps, 1)
        for row, dimension in enumerate(order):
            z[row, 1:, dimension] = latents.mean[dimension] + moves * latents.stddev[dimension]
        own = ((mean[0] - latents.mean) / latents.stddev)[order]
        rows = [
            f"z{dimension} ({share:.0%})\nis {step:.2f} sd"
            for dimension, share, step in zip(order, shares, own, strict=True)
        ]
        captions = ["reconstruction", *(f"{move:.3g} sd" for move in moves.tolist())]
        marks = (1.5 + (own.clamp(-3, 3) + 3) / 6 * (steps - 1)).tolist()
        grid = draw_grid(model.decoder(z.flatten(0, 1)), len(captions), captions, rows, marks)
        write(grid, settings, "traverse.png")


def explore(
    image: Positional[Path | None] = None,
    settings: Shared = SETTINGS,
) -> None:
    """A web page with a slider for each latent dimension, which needs nothing but itself."""
    images = [image] if image else []
    with open_model(settings, "explore.html", images) as (model, latents):
        pictures = photographs(model, images, settings)
        start = model.encoder(pictures[0])[0] if pictures else latents.sample((1,))
        check_page(model, latents.mean + latents.stddev * torch.eye(model.latent_size))
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
        page = template.replace("{{model}}", json.dumps(exported))
        write(page.encode(), settings, "explore.html")


def check(name: str, given: float, low: float, high: float) -> None:
    """Raise ``UserError`` unless an option's value is from ``low`` to ``high``."""
    if not low <= given <= high:
        raise UserError(f"{name} is {given}: {low} to {high} is needed")


def check_page(model: VAE, z: Tensor) -> None:
    """Raise ``UserError`` where the page would draw other pictures than the model does."""
    try:
        fc, *deconvs = layers_of(model.decoder)
        x = fc(z).reshape(len(z), *model.decoder.feature_shape)
        for deconv in deconvs[:-1]:
            x = deconv(x).relu()
        same = torch.allclose(deconvs[-1](x).sigmoid(), model.decoder(z), atol=1e-4)
        same &= all(len([*layer.parameters()]) == 2 for layer in (fc, *deconvs))
    except AttributeError:  # a layer of another name or kind
        same = False
    if not same:
        raise UserError(
            "this decoder does more than the page can: explore draws one linear layer and three "
            "transposed convolutions, with batch norms and ReLUs between them"
        )


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


def photographs(model: VAE, images: Sequence[Path], settings: Settings) -> list[Tensor]:
    """Read pictures as the model needs them, each [1, channels, height, width] in [0, 1]."""
    height, width = model.image_resolution
    to_tensor = Compose([Resize((height, width)), ToTensor()])
    pictures = []
    for path in images:
        picture = read_picture(path)
        if settings.crop:
            share = min(picture.width / width, picture.height / height)
            w, h = round(share * width), round(share * height)
            left, top = (picture.width - w) // 2, (picture.height - h) // 2
            picture = picture.crop((left, top, left + w, top + h))
        if model.encoder.conv1.in_channels == 1:
            picture = picture.convert("L")
        pictures.append(to_tensor(picture)[None].to(next(model.parameters()).device))
    return pictures


def draw_grid(
    images: Tensor,
    columns: int,
    captions: Sequence[str] = (),
    rows: Sequence[str] = (),
    marks: Sequence[float] = (),
) -> bytes:
    """Return a PNG file of images, [n, 3, height, width] in [0, 1], row by row, with captions.

    Grey images, [n, 1, height, width], are shown as well. All are enlarged smoothly: as blocks,
    few pixels hardly make a flower. ``rows`` stand to the left of the rows; ``marks`` say where to
    mark each row's lower edge, counted in columns.
    """
    images = images.expand(-1, 3, -1, -1)
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
        raise UserError(f"{log_dir} holds no run with a checkpoint.pt: {needed}")
    return max(found, key=lambda path: path.stat().st_mtime, default=TRAINED)


@contextmanager
def open_model(
    settings: Settings, usual: str, images: Sequence[Path] = (), fitted: bool = True
) -> Iterator[tuple[VAE, MultivariateNormal]]:
    """Give the model and where its latents are, with random numbers of the command's own.

    ``UserError`` where the file to write would replace one of a user's. ``fitted`` says whether
    the command draws from the latents.
    """
    checkpoint = settings.checkpoint or find_checkpoint(settings.log_dir)
    output = settings.output or Path(usual)
    if not settings.output and output.is_file() and SIGNATURE not in output.read_bytes():
        raise UserError(f"{output} is not this script's: name it with --output to replace it")
    if os.path.realpath(output) in map(os.path.realpath, (checkpoint, *images)):
        raise UserError(f"{output} would be replaced: name another file with --output")
    check("--seed", settings.seed, 0, 2**32 - 1)
    device = find_device(settings.device)
    with own_random_numbers(device):
        model, config, latents = load_model(checkpoint, device)
        if not latents:
            latents = refit_latents(model, config) if fitted else prior(model)
        torch.manual_seed(settings.seed)
        with torch.inference_mode():
            yield model, latents
    if not settings.checkpoint:
        print(f"drawn by the model in {checkpoint} ({config.get('dataset')})", file=sys.stderr)


def write(content: bytes, settings: Settings, usual: str) -> None:
    """Write the file of a command and print its name."""
    output = settings.output or Path(usual)
    with replace_atomically(output) as file:
        file.write(content)
    print(output)


def refit_latents(model: VAE, config: dict[str, Any]) -> MultivariateNormal:
    """Fit the latents of a run that has not ended, where its pictures are at hand."""
    size = model.image_resolution
    crop = [Resize(min(size)), CenterCrop(size)] if config.get("crop") else [Resize(size)]
    pipeline = Compose([*crop, ToTensor()])
    try:
        dataset = find_dataset(config["dataset"], config["data_root"], fetch=False)
        return fit_latents(model, InMemory(dataset(split="train", transform=pipeline)).batches())
    except (KeyError, UserError):
        lacks = "the checkpoint has no fitted latents (its run has not ended)"
        instead = "its pictures are not at hand: the prior stands in for them"
        print(f"warning: {lacks} and {instead}", file=sys.stderr)
        return prior(model)


COMMANDS = (similar, sample, reconstruct, interpolate, traverse, explore)


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says and write one file."""
    with one_line_errors():
        tyro.extras.subcommand_cli_from_dict(
            {each.__name__: each for each in COMMANDS},
            description=__doc__,
            args=arguments,
            prog="vae_inference.py",
        )


if __name__ == "__main__":
    main()
