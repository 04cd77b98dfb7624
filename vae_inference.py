"""See what a trained model has learnt: ``python vae_inference.py similar photograph.jpg``."""

import json
import math
import sys
from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from PIL import ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.transforms import Compose, Grayscale, ToPILImage
from torchvision.utils import make_grid
from tyro.conf import OmitArgPrefixes, Positional, PositionalRequiredArgs, arg

from datasets.errors import UserError
from datasets.preprocessing import image_pipeline, read_picture
from vae.checkpoint import load_model, replace_atomically
from vae.command_line import (
    INCLUDED,
    check,
    find_checkpoint,
    one_line_errors,
    run_to_resume,
    with_home,
)
from vae.compare import comparison_page
from vae.latent import main_directions, near, prior, variation_per_dimension
from vae.run import find_device, own_random
from vae.vae import VAE

ROOT = Path(__file__).parent
RUNS = ROOT / "vae" / "runs"
SIGNATURE = "vae_inference.py"  # stands in every file that is written here

SLIDERS = 10  # at most, on the page that explore writes
ONE_EACH = (
    "Each slider is one latent dimension. The percentage is the dimension's share of the variation "
    "among the decoder's pictures; where dimensions act together, their shares overlap."
)
LEADING = (
    "The sliders are the ten directions in the latent space along which the decoder's pictures "
    "change most, in standard deviations of the training pictures; the percentage is the share of "
    "all change. What no slider moves stays as it is; Random flower draws all of it."
)


@dataclass(frozen=True)
class Settings:
    """What all commands share."""

    # petals or ten: the models that come with the repository, of 64 and of 10 numbers; or a run's
    # name or folder, or a file. If none is given: the newest run that has ended, else petals
    # (traverse: ten)
    checkpoint: str = ""
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


# The commands.


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
        distribution = latents if source == "data" else prior(model)
        images = model.decoder(distribution.sample((count,)))
        twice_as_wide_as_high = math.ceil(math.sqrt(2 * count))
        draw_grid(file, images, columns=twice_as_wide_as_high)


def interpolate(settings: Settings, pictures: tuple[Path, Path], steps: Steps = 8) -> None:
    """The way from one picture's reconstruction to another's, between the two pictures."""
    check("--steps", steps, 2, 100)
    with drawing(settings, "interpolate.png", pictures) as (file, model, _, (start, end)):
        start_mean, _ = model.encoder(start)
        end_mean, _ = model.encoder(end)
        shares = torch.linspace(0, 1, steps, device=start.device)[:, None]
        z = torch.lerp(start_mean, end_mean, shares)
        images = torch.cat((start, model.decoder(z), end))
        captions = ["from", "reconstruction", *[""] * (steps - 2), "reconstruction", "to"]
        draw_grid(file, images, 2 + steps, captions)


def traverse(settings: Settings, picture: Path, steps: Steps = 7) -> None:
    """What each latent dimension does to a picture, moved by -3 to 3 standard deviations."""
    check("--steps", steps, 2, 100)
    with drawing(settings, "traverse.png", [picture], included="ten") as (
        file,
        model,
        latents,
        (x,),
    ):
        mean, _ = model.encoder(x)
        places = ((mean[0] - latents.mean) / latents.stddev).tolist()
        moves = torch.linspace(-3, 3, steps, device=mean.device)
        shares, order = variation_per_dimension(model, latents).sort(descending=True)
        # A row for each dimension: first the reconstruction, then the dimension moved.
        z = mean.repeat(model.latent_size, 1 + steps, 1)
        row_names = []
        for row, (share, i) in enumerate(zip(shares.tolist(), order.tolist(), strict=True)):
            z[row, 1:, i] = latents.mean[i] + moves * latents.stddev[i]
            row_names.append(f"z{i} ({share:.0%})\nis {places[i]:.2f} sd")
        captions = ["reconstruction", *(f"{move:.3g} sd" for move in moves.tolist())]
        draw_grid(file, model.decoder(z.flatten(0, 1)), 1 + steps, captions, row_names)


def explore(settings: Settings, picture: Positional[Path | None] = None) -> None:
    """A web page with up to ten sliders for a picture, which needs nothing but itself."""
    pictures = [picture] if picture else []
    with drawing(settings, "explore.html", pictures) as (file, model, latents, images):
        layers = layers_of_page(model.decoder, latents.mean + latents.stddev.diag())
        start = model.encoder(images[0])[0] if images else latents.sample((1,))
        if model.latent_size <= SLIDERS:
            sliders, explanation = sliders_of_dimensions(model, latents, start[0]), ONE_EACH
        else:
            sliders, explanation = sliders_of_directions(model, latents, start[0]), LEADING
        exported = {
            "features": model.decoder.feature_shape,
            "sliders": sliders,
            "start": start[0].tolist(),
            "centre": latents.mean.tolist(),
            "scale": latents.scale_tril.tolist(),
            "layers": [{"weight": as_base64(w), "bias": as_base64(b)} for w, b in layers],
        }
        page = (ROOT / "vae" / "explore.html").read_text(encoding="utf-8")
        page = page.replace("{{sliders}}", explanation)
        file.write(page.replace("{{model}}", json.dumps(exported)).encode())


def compare(
    runs: Positional[tuple[str, ...]] = (), log_dir: Path = RUNS, output: Path | None = None
) -> None:
    """Runs side by side on a web page: names or folders; if none is given, the newest twelve."""
    check("the number of runs", len(runs), 0, 12)
    folders = [run_to_resume(log_dir, name) for name in runs]
    folders = folders or [path.parent for path in ended_runs(log_dir)[:12]]
    if not folders:
        raise no_run_in(log_dir)
    file_name = find_output(output, "compare.html", [])
    page = comparison_page(folders)
    with replace_atomically(file_name) as file:
        file.write(page.encode())
    print(file_name)


# What all commands need.


class Drawing(NamedTuple):
    """What a command draws with, and where to."""

    file: BinaryIO
    model: VAE
    latents: MultivariateNormal
    images: list[Tensor]  # the pictures that were given, each [1, channels, height, width]


@contextmanager
def drawing(
    settings: Settings, usual_name: str, pictures: Sequence[Path] = (), included: str = "petals"
) -> Iterator[Drawing]:
    """Open the file that a command writes, with the model and its pictures; name it at the end.

    ``included`` is the model that draws where nobody has trained or named another one. Random
    numbers inside the block are the command's own.
    """
    if settings.checkpoint:
        checkpoint = find_checkpoint("--checkpoint", settings.checkpoint, settings.log_dir)
    else:
        checkpoint = newest_run(settings.log_dir) or INCLUDED[included]
    output = find_output(settings.output, usual_name, [checkpoint, *pictures])
    device = find_device(settings.device)
    with own_random():
        model, options, latents = load_model(checkpoint, device)
        if latents is None:
            print("warning: its run has not ended: drawn from the prior, so worse", file=sys.stderr)
            latents = prior(model)
        to_input = as_in_training(model, settings.crop or options.get("crop", False))
        images = [to_input(read_picture(path))[None].to(device) for path in pictures]
        torch.manual_seed(settings.seed % 2**64)
        with replace_atomically(output) as file, torch.inference_mode():
            yield Drawing(file, model, latents, images)
    print(output)
    dataset = options.get("dataset")
    print(f"drawn by the model in {checkpoint} ({dataset})", file=sys.stderr)


def newest_run(log_dir: Path) -> Path | None:
    """Return the checkpoint of the run that has ended last.

    None where there is none; ``UserError`` for that in a ``--log-dir`` of the reader's own.
    """
    found = ended_runs(log_dir)
    if not found and log_dir.absolute() != RUNS.absolute():
        raise no_run_in(log_dir)
    return found[0] if found else None


def ended_runs(log_dir: Path) -> list[Path]:
    """Return the checkpoints of the runs in ``log_dir`` that have ended, the newest first."""
    ended = [path.with_name("checkpoint.pt") for path in log_dir.rglob("metrics.json")]
    found = [path for path in ended if path.is_file()]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def no_run_in(log_dir: Path) -> UserError:
    """Return what to say of a folder without a run that has ended."""
    return UserError(f"{log_dir} has no run that has ended: train one, or name another")


def find_output(given: Path | None, usual_name: str, inputs: Sequence[Path]) -> Path:
    """Return the file to write: the one that was ``given``, else the usual one.

    ``UserError`` if it would replace one of the inputs, or, unasked, a file of somebody's own.
    """
    output = given or Path(usual_name)
    if not given and output.is_file() and SIGNATURE.encode() not in output.read_bytes():
        raise UserError(f"{output} is not this script's: name it with --output to replace it")
    if output.resolve() in [path.resolve() for path in inputs]:
        raise UserError(f"{output} would be replaced: name another file with --output")
    return output


def as_in_training(model: VAE, crop: bool) -> Compose:
    """Return what makes the model's input, [channels, height, width] in [0, 1], of a picture."""
    grey = [Grayscale()] if model.image_channels == 1 else []
    return Compose([*grey, image_pipeline(model.image_resolution, crop)])


def layers_of_page(decoder: Any, z: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return weight and bias of the decoder's layers as the page needs them.

    That is one linear layer, and three transposed convolutions with kernels of 2x2; batch norms are
    folded into them. ``UserError`` where the page would draw something else from ``z``,
    [batch, latent].
    """
    can = "one linear layer and three transposed convolutions, with batch norms and ReLUs between"
    refusal = UserError(f"this decoder does more than the page can: explore draws {can} them")
    try:
        layers = [
            decoder.fc,
            with_norm_folded_in(decoder.deconv1, decoder.norm1),
            with_norm_folded_in(decoder.deconv2, decoder.norm2),
            decoder.deconv3,
        ]
        kernels = [tuple(layer.weight.shape[2:]) for layer in layers]
        if kernels != [(), (2, 2), (2, 2), (2, 2)]:
            raise refusal
        x = F.linear(z, layers[0].weight, layers[0].bias).unflatten(1, decoder.feature_shape)
        for layer in layers[1:3]:
            x = F.conv_transpose2d(x, layer.weight, layer.bias, stride=2).relu()
        x = F.conv_transpose2d(x, layers[3].weight, layers[3].bias, stride=2).sigmoid()
    except (AttributeError, RuntimeError, TypeError) as error:  # layers of other names or kinds
        raise refusal from error
    images = decoder(z)
    if x.shape != images.shape or not torch.allclose(x, images, atol=1e-3):
        raise refusal
    return [(layer.weight, layer.bias) for layer in layers]


def sliders_of_dimensions(
    model: VAE, latents: MultivariateNormal, start: Tensor
) -> list[dict[str, Any]]:
    """Return a slider for each latent dimension, the one that changes pictures most first.

    Each has its name, its share of the variation, how far it goes, the ``direction`` in which it
    moves z, and how its place follows from z: ``reading`` @ (z - ``origin``).
    """
    # With a small beta the latents reach farther than the prior's -4 to 4.
    reach = torch.maximum(start.abs(), latents.mean.abs() + 4 * latents.stddev)
    shares, order = variation_per_dimension(model, latents).sort(descending=True)
    units = torch.eye(model.latent_size)
    return [
        {
            "name": f"z{i}",
            "share": share,
            "reach": max(4, math.ceil(reach[i].item())),
            "direction": units[i].tolist(),
            "reading": units[i].tolist(),
            "origin": [0.0] * model.latent_size,
        }
        for share, i in zip(shares.tolist(), order.tolist(), strict=True)
    ]


def sliders_of_directions(
    model: VAE, latents: MultivariateNormal, start: Tensor
) -> list[dict[str, Any]]:
    """Return sliders along the directions in which pictures vary most, in standard deviations."""
    directions, shares = main_directions(model, latents, SLIDERS)
    moves = directions @ latents.scale_tril.T
    readings = torch.linalg.solve_triangular(
        latents.scale_tril, directions, upper=False, left=False
    )
    places = readings @ (start - latents.mean)
    return [
        {
            "name": f"d{i + 1}",
            "share": shares[i].item(),
            "reach": max(4, math.ceil(places[i].abs().item())),
            "direction": moves[i].tolist(),
            "reading": readings[i].tolist(),
            "origin": latents.mean.tolist(),
        }
        for i in range(len(directions))
    ]


def with_norm_folded_in(convolution: Any, norm: Any) -> Any:
    """Return a transposed convolution that does what it and its batch norm do together."""
    if isinstance(norm, nn.BatchNorm2d):
        return fuse_conv_bn_eval(convolution, norm, transpose=True)
    return convolution


def as_base64(x: Tensor) -> str:
    """Return a tensor's values, float32 in order, as text for the page."""
    return b64encode(x.cpu().numpy().tobytes()).decode()


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
            {f.__name__: f for f in (similar, sample, interpolate, traverse, explore, compare)},
            prog="vae_inference.py",
            description=__doc__,
            args=with_home(arguments),
            config=(OmitArgPrefixes, PositionalRequiredArgs),
        )


if __name__ == "__main__":
    main()
