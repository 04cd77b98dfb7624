"""report.html in a run's folder: one page that tells the run, and needs nothing but itself."""

import io
import sys
from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from torch import Tensor
from torchvision.utils import make_grid, save_image

from datasets.memory import InMemory
from vae.checkpoint import is_same, replace_atomically
from vae.history import History, story_epochs
from vae.latent import fit_latents
from vae.run import FREE, Run, Stopped
from vae.summary import drawn_rows, reconstruction_rows
from vae.vae import VAE

ACROSS = 8  # pictures in a row of the story, and in a row of samples
EXTREMES = 4  # pictures of each kind: reconstructed best, middling, worst

# What the charts are drawn in. On the page it becomes the colour of its text, light or dark.
INK = "#010203"
INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")


class Chart(NamedTuple):
    """A chart of the page: its title, its vertical axis, and its curves by name."""

    title: str
    unit: str
    scale: Literal["linear", "log"]  # of the vertical axis
    tags: dict[str, str]


TRAINING_ERROR = "loss/Reconstruction Loss"  # a squared error with the Gaussian likelihood
# A run's first errors are many times the later ones, so that their axis is logarithmic.
CHARTS = (
    Chart(
        "Reconstruction",
        "squared error per picture",
        "log",
        {
            "training": TRAINING_ERROR,
            "validation, z sampled": "validation/squared_error",
            "validation, z the mean": "validation/squared_error_mean",
        },
    ),
    Chart(
        "KL divergence",
        "nats per picture",
        "linear",
        {"training": "loss/KL Loss", "validation": "validation/kl"},
    ),
    Chart(
        "Total loss",
        "reconstruction + beta x KL",
        "log",
        {
            "training, with its epoch's beta": "loss/Total Loss",
            "validation, with the full beta": "validation/total_loss",
        },
    ),
)
PLAIN = FuncFormatter(lambda value, _place: f"{value:g}")  # numbers as they are, at the ticks
TICKS = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)  # epochs that have a mark
STYLES = ("-", "--", ":")  # of a chart's curves, so that they differ without colours, too


# The story: what the model could do after some epochs.


@torch.no_grad()
def keep_moment(run: Run, model: VAE, splits: Sequence[InMemory], epoch: int) -> None:
    """Keep pictures of what a model can do after an epoch, if the page shows that one.

    They are reconstructions of test pictures, always the same, and below them samples, always from
    the same noise: it comes from a generator of its own, so that the run's numbers stay.
    """
    if epoch + 1 not in story_epochs(run.options.epochs):
        return
    train, _, test = splits
    originals = some(test, ACROSS).to(run.device)
    mean, _ = model.encoder(originals)
    # A quarter of the training pictures are enough for a look.
    try:
        latents = fit_latents(model, (x[::4] for x in train.batches(256)))
        root = latents.scale_tril
    except (ValueError, torch.linalg.LinAlgError):  # too large or not finite: the run diverges
        return
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(ACROSS, model.latent_size, generator=generator).to(mean)
    z = latents.mean + noise[: len(originals)] @ root.T  # as many: they make a row each
    images = torch.cat((model.decoder(mean), model.decoder(z)))
    folder = run.folder / "story"
    folder.mkdir(exist_ok=True)
    with replace_atomically(folder / f"{epoch + 1:06d}.png") as file:
        save_image(make_grid(images, nrow=len(originals)), file, format="png")


def some(pictures: InMemory, count: int) -> Tensor:
    """Return so many pictures from all over a split, or all there are."""
    places = torch.linspace(0, len(pictures) - 1, min(count, len(pictures)))
    return pictures.images(places.long())


# The page.


@torch.no_grad()
def write_page(
    run: Run,
    model: VAE,
    splits: Sequence[InMemory],
    metrics: dict[str, Any] | None = None,
    ending: str = "",
) -> None:
    """Write ``report.html``; without ``metrics`` for a run that has not ended, but by ``ending``.

    The page shows test pictures, and training pictures beside samples: mind whose they are before
    you give it away.
    """
    train, _, test = splits
    device = run.device
    page: dict[str, Any] = {
        "name": run.folder.resolve().name,
        "dataset": run.options.dataset,
        "epochs": run.epochs_done,
        "counts": [len(split) for split in splits],
        "size": "x".join(str(side) for side in test.pixels.shape[1:3]),
        "ending": ending,
        "metrics": metrics,
        "story": read_story(run.folder),
        "originals": as_uri(make_grid(some(test, ACROSS), nrow=ACROSS)),
        "charts": draw_charts(run),
        "changes": changed_options(run.options),
    }
    if metrics:
        latents = fit_latents(model, train.batches())
        samples = model.decoder(latents.sample((ACROSS,)))
        pairs = torch.cat((samples.cpu(), nearest(samples.cpu(), train)))
        page |= {
            "reconstructions": reconstruction_rows(metrics),
            "drawn": drawn_rows(metrics),
            "samples": as_uri(make_grid(pairs, nrow=ACROSS)),
            "extremes": extremes(model, test, device),
            "dimensions": draw_dimensions(metrics["test"]["kl_per_dimension"]),
        }
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    html = environment.get_template("report.html").render(page)
    with replace_atomically(run.folder / "report.html") as file:
        file.write(html.encode(errors="replace"))  # a folder's name may be no text


def read_story(folder: Path) -> list[tuple[int, str]]:
    """Return the moments that a run has kept: after how many epochs, and the pictures."""
    return [
        (int(path.stem), uri_of(path.read_bytes()))
        for path in sorted((folder / "story").glob("*.png"))
    ]


def changed_options(options: Any) -> list[tuple[str, Any, Any]]:
    """Return the options that are not the usual ones, each with its value and the usual one."""
    usual = type(options)()
    return [
        (name, value, getattr(usual, name))
        for name, value in asdict(options).items()
        if name not in FREE and not is_same(value, getattr(usual, name))
    ]


def extremes(model: VAE, test: InMemory, device: torch.device) -> dict[str, str]:
    """Return the test pictures that are reconstructed best, middlingly and worst, as pictures.

    In each the upper row are the test pictures, the lower one their reconstructions.
    """
    errors = []
    for x in test.batches():
        reconstruction = through_mean(model, x.to(device)).cpu()
        errors.append(torch.square(x - reconstruction).flatten(1).sum(dim=1))
    order = torch.cat(errors).argsort()
    count = min(EXTREMES, len(order))
    middle = (len(order) - count) // 2
    places = {
        "best": order[:count],
        "in the middle": order[middle : middle + count],
        "worst": order[len(order) - count :],
    }
    pictures = {}
    for name, indices in places.items():
        originals = test.images(indices)
        reconstructions = through_mean(model, originals.to(device)).cpu()
        pictures[name] = as_uri(make_grid(torch.cat((originals, reconstructions)), nrow=count))
    return pictures


def through_mean(model: VAE, x: Tensor) -> Tensor:
    """Return images' reconstructions without noise."""
    mean, _ = model.encoder(x)
    return model.decoder(mean)


def nearest(images: Tensor, train: InMemory) -> Tensor:
    """Return each image's nearest training picture, by the squared error between the two."""
    least = torch.full((len(images),), torch.inf)
    found = torch.empty_like(images)
    for x in train.batches():
        distances = torch.cdist(images.flatten(1), x.flatten(1))
        distance, index = distances.min(dim=1)
        nearer = distance < least
        least[nearer], found[nearer] = distance[nearer], x[index[nearer]]
    return found


@contextmanager
def page_at_an_early_end(run: Run, model: VAE, splits: Sequence[InMemory]) -> Iterator[None]:
    """Write the page as far as a run got, if it is stopped or diverges inside the block."""
    try:
        yield
    except (Stopped, FloatingPointError) as error:
        how = f"Stopped by {error.name}" if isinstance(error, Stopped) else f"Ended: {error}"
        with warning_if_it_fails("report.html"):
            write_page(run, model, splits, ending=f"{how}.")
        raise


@contextmanager
def warning_if_it_fails(name: str) -> Iterator[None]:
    """Let a run end well that cannot write all that it shows, and say why it is not there."""
    try:
        yield
    except Exception as error:  # whatever labels and options of the reader's own lead to
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"warning: {name} is not complete: {reason}", file=sys.stderr)


# Pictures and charts, as text of the page.


def as_uri(image: Tensor) -> str:
    """Return a picture, [channels, height, width] in [0, 1], as an address that holds it."""
    file = io.BytesIO()
    save_image(image, file, format="png")
    return uri_of(file.getvalue())


def uri_of(png: bytes) -> str:
    """Return a PNG file's content as an address."""
    return "data:image/png;base64," + b64encode(png).decode()


def draw_charts(run: Run) -> list[Markup]:
    """Return the charts that a run has curves for, as SVG."""
    charts = (draw_chart(chart, run.history) for chart in charts_of(run.options))
    return [svg for svg in charts if svg]


def charts_of(options: Any) -> list[Chart]:
    """Return the charts of a run with these options.

    With another likelihood than the Gaussian one the training loss is no squared error.
    """
    if getattr(options, "likelihood", "gaussian") == "gaussian":
        return list(CHARTS)
    reconstruction, *others = CHARTS
    tags = {name: tag for name, tag in reconstruction.tags.items() if tag != TRAINING_ERROR}
    return [reconstruction._replace(tags=tags), *others]


def draw_chart(chart: Chart, history: History) -> Markup | None:
    """Return a chart as SVG, or None if the run has none of its curves."""
    figure, axis = new_chart(chart.title, "epoch (logarithmic)", chart.unit)
    for (name, tag), style in zip(chart.tags.items(), STYLES, strict=False):
        epochs, values = history.curve(tag)
        if epochs:
            # Dots, where there are too few points for a line to be seen.
            axis.plot(epochs, values, style, label=name, marker="." if len(epochs) < 20 else None)
    if not axis.lines:
        return None
    # Most happens in the first epochs.
    scale_epochs(axis)
    if chart.scale == "log":
        scale_values(axis)
    axis.legend(framealpha=0)
    return as_svg(figure, chart.title)


def scale_epochs(axis: Axes) -> None:
    """Give a chart a logarithmic axis of epochs, to the last one."""
    last = max(np.asarray(line.get_xdata())[-1] for line in axis.lines)
    axis.set_xscale("log")
    axis.set_xlim(0.9, 1.1 * last)
    axis.set_xticks([tick for tick in TICKS if tick <= last])
    axis.xaxis.set_major_formatter(PLAIN)
    axis.minorticks_off()


def scale_values(axis: Axes) -> None:
    """Give a chart a logarithmic axis of values, if all are positive."""
    values = np.concatenate([np.asarray(line.get_ydata()) for line in axis.lines])
    finite = values[np.isfinite(values)]
    if not len(finite) or finite.min() <= 0:
        return
    axis.set_yscale("log")
    if finite.max() < 1000 * finite.min():  # a diverging run's powers of ten are enough
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.yaxis.set_major_formatter(PLAIN)
    axis.minorticks_off()


def draw_dimensions(kl_per_dimension: Sequence[float]) -> Markup:
    """Return a chart of what each latent dimension says of a test picture, as SVG."""
    title = "KL divergence of each latent dimension"
    figure, axis = new_chart(title, "latent dimension", "nats per test picture")
    axis.bar(range(len(kl_per_dimension)), kl_per_dimension)
    return as_svg(figure, title)


def new_chart(title: str, across: str, upwards: str) -> tuple[Figure, Axes]:
    """Return an empty chart, and its axes with their names."""
    style: Any = dict.fromkeys(INKED, INK) | {"axes.facecolor": "none"}
    with rc_context(style):
        figure = Figure(figsize=(6, 3.2), facecolor="none")
        # Margins as wide as the numbers need, which take less time than an automatic layout.
        axis = figure.subplots(
            gridspec_kw={"left": 0.15, "right": 0.98, "bottom": 0.16, "top": 0.9}
        )
    axis.set(title=title, xlabel=across, ylabel=upwards)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def as_svg(figure: Figure, salt: str) -> Markup:
    """Return a chart as SVG in the colour of the page's text."""
    file = io.StringIO()
    # The salt makes names inside of it that no other chart has; the same run writes the same page.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    return Markup(svg[svg.index("<svg") :].replace(INK, "currentColor"))
