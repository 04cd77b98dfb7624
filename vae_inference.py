"""See what a trained model has learnt: ``python vae_inference.py similar photograph.jpg``."""

import json
import math
import sys
from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import torch
import torch.nn.functional as F
import tyro
from PIL import ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.transforms import CenterCrop, Compose, Grayscale, Resize, ToPILImage, ToTensor
from torchvision.utils import make_grid
from tyro.conf import OmitArgPrefixes, Positional, PositionalRequiredArgs, arg

from datasets.preprocessing import UserError, read_picture
from vae.latent import near, prior, variation_per_dimension
from vae.run import check, find_device, load_model, one_line_errors, own_random, replace_atomically
from vae.vae import VAE

ROOT = Path(__file__).parent
RUNS = ROOT / "vae" / "runs"
TRAINED = ROOT / "results" / "trained.pt"  # the model that comes with the repository
SIGNATURE = "vae_inference.py"  # stands in every file that is written here


@dataclass(frozen=True)
class Settings:
    """What all commands share."""

    checkpoint: Path | None = None  # model; if none is given: the newest in --log-dir
    log_dir: Path = RUNS  # folder of all runs
    output: Path | None = None  # file to write; if none is given: the command's name
    crop: bool = False  # keep the middle square, as a model trained with --crop does by itself
    seed: int = 0  # of all that is drawn
    device: str = "auto"  # cpu, cuda, mps ...; auto: an accelerator, if there is one


Pictures = Annotated[tuple[Path, ...], arg(metavar="PICTURE ...")]
Count = Annotated[int, arg(help="new flowers, near each picture if any is given")]
Spread = Annotated[float, arg(help="0: the reconstruction; 1: any flower")]
Source = Annotated[Literal["data", "prior"], arg(name="from", help="fitted to data, or N(0, I)")]
Steps = Annotated[int, arg(help="pictures in a row, both ends included")]


def similar(settings: Settings, pictures: Pictures, count: Count = 8, spread: Spread = 0.3) -> None:
    """A picture, its reconstruction, and new flowers near it."""
    check("the number of pictures", len(pictures), 1, 1000)
    check("--count", count, 1, 1000)
    check("--spread", spread, 0, 1)
    with drawing(settings, "similar.png", pictures) as (file, model, latents, images):
        rows = []
        for x in images:
            mean, _ = model.encoder(x)
            z = near(mean, latents, count, spread)
            rows += [x, model.decoder(torch.cat((mean, z)))]
        draw_grid(file, torch.cat(rows), 2 + count, ["picture", "reconstruction", "new flowers"])


def sample(settings: Settings, count: Count = 50, source: Source = "data") -> None:
    """New flowers."""
    check("--count", count, 1, 1000)
    with drawing(settings, "sample.png") as (file, model, latents, _):
        z = (latents if source == "data" else prior(model)).sample((count,))
        draw_grid(file, model.decoder(z), math.ceil(math.sqrt(2 * count)))  # twice as wide as high


def interpolate(settings: Settings, pictures: tuple[Path, Path], steps: Steps = 8) -> None:
    """The way from one picture's reconstruction to another's, between the two pictures."""
    check("--steps", steps, 2, 100)
    with drawing(settings, "interpolate.png", pictures) as (file, model, _, (start, end)):
        shares = torch.linspace(0, 1, steps, device=start.device)[:, None]
        z = torch.lerp(model.encoder(start)[0], model.encoder(end)[0], shares)
        captions = ["from", "reconstruction", *[""] * (steps - 2), "reconstruction", "to"]
        draw_grid(file, torch.cat((start, model.decoder(z), end)), 2 + steps, captions)


def traverse(settings: Settings, picture: Path, steps: Steps = 7) -> None:
    """What each latent dimension does to a picture, moved by -3 to 3 standard deviations."""
    check("--steps", steps, 2, 100)
    with drawing(settings, "traverse.png", [picture]) as (file, model, latents, (x,)):
        mean, _ = model.encoder(x)
        places = ((mean[0] - latents.mean) / latents.stddev).tolist()
        moves = torch.linspace(-3, 3, steps, device=mean.device)
        z = mean.repeat(model.latent_size, 1 + steps, 1)  # first in each row the reconstruction
        rows = []
        shares, order = variation_per_dimension(model, latents).sort(descending=True)
        for row, (share, i) in enumerate(zip(shares.tolist(), order.tolist(), strict=True)):
            z[row, 1:, i] = latents.mean[i] + moves * latents.stddev[i]
            rows.append(f"z{i} ({share:.0%})\nis {places[i]:.2f} sd")
        captions = ["reconstruction", *(f"{move:.3g} sd" for move in moves.tolist())]
        draw_grid(file, model.decoder(z.flatten(0, 1)), 1 + steps, captions, rows)


def explore(settings: Settings, picture: Positional[Path | None] = None) -> None:
    """A web page with a slider for each latent dimension, which needs nothing but itself."""
    pictures = [picture] if picture else []
    with drawing(settings, "explore.html", pictures) as (file, model, latents, images):
        layers = layers_of_page(model.decoder, latents.mean + latents.stddev.diag())
        start = model.encoder(images[0])[0] if images else latents.sample((1,))
        exported = {
            "features": model.decoder.feature_shape,
            "variation": variation_per_dimension(model, latents).tolist(),
            "start": start[0].tolist(),
            "centre": latents.mean.tolist(),
            "scale": latents.scale_tril.tolist(),
            "layers": [each.state_dict() for each in layers],
        }
        page = (ROOT / "vae" / "explore.html").read_text(encoding="utf-8")
        text = json.dumps(exported, default=lambda x: b64encode(x.cpu().numpy()).decode())
        file.write(page.replace("{{model}}", text).encode())


@contextmanager
def drawing(
    settings: Settings, usual: str, pictures: Sequence[Path] = ()
) -> Iterator[tuple[BinaryIO, VAE, MultivariateNormal, list[Tensor]]]:
    """Give what a command needs: a file to write, the model, its latents, and pictures for it.

    Each picture is [1, channels, height, width]; random numbers are the command's own.
    ``UserError`` if the file would replace a user's own.
    """
    checkpoint = settings.checkpoint or find_checkpoint(settings.log_dir)
    output = settings.output or Path(usual)
    if not settings.output and output.is_file() and SIGNATURE.encode() not in output.read_bytes():
        raise UserError(f"{output} is not this script's: name it with --output to replace it")
    if output.resolve() in [path.resolve() for path in (checkpoint, *pictures)]:
        raise UserError(f"{output} would be replaced: name another file with --output")
    device = find_device(settings.device)
    with own_random(device):
        model, config, latents = load_model(checkpoint, device)
        to_input = as_in_training(config, settings.crop)
        images = [to_input(read_picture(path))[None].to(device) for path in pictures]
        if not latents:
            print("warning: its run has not ended: drawn from the prior, so worse", file=sys.stderr)
            latents = prior(model)
        torch.manual_seed(settings.seed % 2**64)
        with replace_atomically(output) as file, torch.inference_mode():
            yield file, model, latents, images
    print(output)
    if not settings.checkpoint:
        print(f"drawn by the model in {checkpoint} ({config.get('dataset')})", file=sys.stderr)


def find_checkpoint(log_dir: Path) -> Path:
    """Return the checkpoint that was written last in ``log_dir``, else the repository's own."""
    found = list(log_dir.glob("*/checkpoint.pt"))
    if not found and log_dir.absolute() != RUNS.absolute():
        raise UserError(f"{log_dir} has no checkpoint.pt of a run: train one, or give --checkpoint")
    return max(found, key=lambda path: path.stat().st_mtime, default=TRAINED)


def as_in_training(config: dict[str, Any], crop: bool) -> Compose:
    """Return what makes the model's input, [channels, height, width] in [0, 1], of a picture."""
    size = tuple(config["image_resolution"])
    grey = [Grayscale()] if config["image_channels"] == 1 else []
    resize = [Resize(max(size)), CenterCrop(size)] if crop or config.get("crop") else [Resize(size)]
    return Compose([*grey, *resize, ToTensor()])


def layers_of_page(decoder: Any, z: Tensor) -> list[nn.Module]:
    """Return the decoder's layers as the page needs them: batch norms folded in, kernels of 2x2.

    ``UserError`` where the page would draw something else from z, [batch, latent].
    """
    images = decoder(z)
    with suppress(AttributeError, RuntimeError):  # a layer of another name or kind
        layers = [decoder.fc, decoder.deconv1, decoder.deconv2, decoder.deconv3]
        for i, norm in ((1, decoder.norm1), (2, decoder.norm2)):
            if isinstance(norm, nn.BatchNorm2d):
                layers[i] = fuse_conv_bn_eval(layers[i], norm, transpose=True)
        x = F.linear(z, layers[0].weight, layers[0].bias).unflatten(1, decoder.feature_shape)
        for layer in layers[1:]:
            x = F.conv_transpose2d(x, layer.weight, layer.bias, stride=2)
            x = x.sigmoid() if layer is layers[-1] else x.relu()
        shapes = [each.shape[2:] for layer in layers for each in layer.parameters()]  # weight, bias
        if shapes == [(), ()] + 3 * [(2, 2), ()] and torch.allclose(x, images, atol=1e-3):
            return layers
    can = "one linear layer and three transposed convolutions, with batch norms and ReLUs between"
    raise UserError(f"this decoder does more than the page can: explore draws {can} them")


def draw_grid(
    file: BinaryIO, images: Tensor, columns: int, captions: Sequence = (), rows: Sequence = ()
) -> None:
    """Write images, [n, 1 or 3, height, width] in [0, 1], to a PNG file, in named columns and rows.

    All are enlarged smoothly: as blocks, few pixels hardly make a flower.
    """
    factor = math.ceil(128 / min(images.shape[-2:]))  # 128 pixels at least on the shorter side
    large = F.interpolate(images, scale_factor=factor, mode="bicubic").clamp(0, 1)
    grid = make_grid(large.mul(255).round().byte().cpu(), nrow=columns, padding=4, pad_value=255)
    left, top = 90 if rows else 0, 20 if captions else 0
    canvas = ImageOps.expand(ToPILImage()(grid), (left, top, 0, 0), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(15)
    height, width = (size + 4 for size in large.shape[-2:])
    for column, caption in enumerate(captions):
        draw.text((left + (column + 0.5) * width, 2), caption, "black", font, anchor="ma")
    for row, name in enumerate(rows):
        draw.text((4, top + (row + 0.5) * height), name, "black", font, anchor="lm")
    signature = PngImagePlugin.PngInfo()
    signature.add_text("Software", SIGNATURE)
    canvas.save(file, "PNG", pnginfo=signature)


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says and write one file."""
    with one_line_errors():
        tyro.extras.subcommand_cli_from_dict(
            {f.__name__: f for f in (similar, sample, interpolate, traverse, explore)},
            prog="vae_inference.py",
            description=__doc__,
            args=arguments,
            config=(OmitArgPrefixes, PositionalRequiredArgs),
        )


if __name__ == "__main__":
    main()
