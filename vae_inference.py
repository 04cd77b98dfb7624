"""See what a trained model has learnt: ``python vae_inference.py similar photograph.jpg``."""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from PIL import ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torch import Tensor
from torch.distributions import MultivariateNormal
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
from vae.explore import page_of_sliders
from vae.latent import near, prior, variation_per_dimension
from vae.run import find_device, own_random
from vae.vae import VAE

ROOT = Path(__file__).parent
RUNS = ROOT / "vae" / "runs"
# The data sets of flowers: what a model of another one draws is called a picture.
FLOWERS = ("flowers102", "synthetic")
SIGNATURE = "vae_inference.py"  # stands in every file that is written here


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


def similar(settings: Settings, pictures: Pictures, count: Count = 8, spread: Spread = 0.5) -> None:
    """A picture, its reconstruction, and new flowers near it."""
    check("the number of pictures", len(pictures), 1, 1000)
    check("--count", count, 1, 1000)
    check("--spread", spread, 0, 1)
    with drawing(settings, "similar.png", pictures) as (file, model, latents, images, _):
        rows = []
        for x in images:
            mean, _ = model.encoder(x)
            z = near(mean, latents, count, spread)
            rows += [x, model.decoder(torch.cat((mean, z)))]
        draw_grid(file, torch.cat(rows), 2 + count, ["picture", "reconstruction", "new flowers"])


def sample(settings: Settings, count: Count = 50, source: Source = "data") -> None:
    """New flowers."""
    check("--count", count, 1, 1000)
    with drawing(settings, "sample.png") as (file, model, latents, *_):
        distribution = latents if source == "data" else prior(model)
        images = model.decoder(distribution.sample((count,)))
        twice_as_wide_as_high = math.ceil(math.sqrt(2 * count))
        draw_grid(file, images, columns=twice_as_wide_as_high)


def interpolate(settings: Settings, pictures: tuple[Path, Path], steps: Steps = 8) -> None:
    """The way from one picture's reconstruction to another's, between the two pictures."""
    check("--steps", steps, 2, 100)
    with drawing(settings, "interpolate.png", pictures) as (file, model, _, (start, end), _):
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
    with drawing(settings, "traverse.png", [picture], "ten") as (file, model, latents, (x,), _):
        mean, _ = model.encoder(x)
        places = ((mean[0] - latents.mean) / latents.stddev).tolist()
        moves = torch.linspace(-3, 3, steps, device=mean.device)
        shares, order = variation_per_dimension(model, latents).sort(descending=True)
        reconstruction = model.decoder(mean)
        rows, row_names = [], []
        for share, i in zip(shares.tolist(), order.tolist(), strict=True):
            z = mean.repeat(steps, 1)
            z[:, i] = latents.mean[i] + moves * latents.stddev[i]
            rows += [x, reconstruction, model.decoder(z)]
            row_names.append(f"z{i} ({share:.0%})\nis {places[i]:.2f} sd")
        captions = ["picture", "reconstruction", *(f"{move:.3g} sd" for move in moves.tolist())]
        draw_grid(file, torch.cat(rows), 2 + steps, captions, row_names)


def explore(settings: Settings, picture: Positional[Path | None] = None) -> None:
    """A web page with up to ten sliders, on which photographs can be chosen, too.

    It needs nothing but itself. A picture that is given stands in it, as the model sees it.
    """
    pictures = [picture] if picture else []
    with drawing(settings, "explore.html", pictures) as (file, model, latents, images, options):
        noun = "flower" if options.get("dataset") in FLOWERS else "picture"
        start = images[0] if images else None
        page = page_of_sliders(model, latents, start, options["crop"], noun)
        file.write(page.encode())


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
    options: dict[str, Any]  # the model's, when it was trained; ``crop`` also as it is asked for


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
        options = options | {"crop": settings.crop or bool(options.get("crop"))}
        to_input = as_in_training(model, options["crop"])
        images = [to_input(read_picture(path))[None].to(device) for path in pictures]
        torch.manual_seed(settings.seed % 2**64)
        with replace_atomically(output) as file, torch.inference_mode():
            yield Drawing(file, model, latents, images, options)
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
