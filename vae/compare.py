"""compare.html: runs side by side, from what each has left in its folder."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from datasets.errors import UserError
from vae.page import uri_of
from vae.run import FREE
from vae.summary import drawn_rows, reconstruction_rows

FRAME = 2  # pixels around each picture in a run's grids
ROWS = 2  # of samples that are shown of each run


class Row(NamedTuple):
    """A line of a table: a figure or an option, with a cell for each run."""

    name: str
    cells: list[str]
    best: set[int]  # which of them are


class Group(NamedTuple):
    """Runs of the same data set and picture size, which compare, the best reconstructions first."""

    title: str
    names: list[str]
    figures: dict[str, list[Row]]  # by what they are of
    options: list[Row]  # in which they differ
    originals: str  # the test pictures, as the address of a picture
    reconstructions: list[str]  # of each run
    samples: list[str]


def comparison_page(folders: Sequence[Path]) -> str:
    """Return the page that holds the runs in these folders side by side.

    ``UserError`` for a folder without a run that has ended.
    """
    runs = {folder: read_metrics(folder) for folder in folders}
    names = names_apart(folders)
    by_kind: dict[tuple[str, int, int], list[Path]] = {}
    for folder, metrics in runs.items():
        kind = (metrics["dataset"], *metrics["architecture"]["image_resolution"])
        by_kind.setdefault(kind, []).append(folder)
    groups = []
    for (dataset, height, width), members in by_kind.items():
        members.sort(key=lambda folder: runs[folder]["test"]["squared_error_mean"])
        group = [runs[folder] for folder in members]
        pictures = [cut(folder / "reconstructions.png", height) for folder in members]
        groups.append(
            Group(
                title=f"{dataset}, {height}x{width}",
                names=[names[folder] for folder in members],
                figures=figure_rows(group),
                options=option_rows(group),
                originals=pictures[0][0],
                reconstructions=[reconstructions for _, reconstructions in pictures],
                samples=[first_rows(folder / "samples.png", height, ROWS) for folder in members],
            )
        )
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    return environment.get_template("compare.html").render(groups=groups)


def read_metrics(folder: Path) -> dict[str, Any]:
    """Return what a run has measured; ``UserError`` if it has not ended."""
    path = folder / "metrics.json"
    if not path.is_file():
        raise UserError(f"{folder} has no metrics.json: a run that has ended is needed")
    metrics = json.loads(path.read_text(encoding="utf-8"))
    if "mean_picture" not in metrics:
        again = f"python vae_training.py --resume {folder}"
        raise UserError(
            f"{folder} was measured by an earlier version: measure it anew with {again}"
        )
    return metrics


def names_apart(folders: Sequence[Path]) -> dict[Path, str]:
    """Return a name for each folder: its last part, or all of it where two have the same one."""
    last = [folder.resolve().name for folder in folders]
    return {
        folder: name if last.count(name) == 1 else str(folder)
        for folder, name in zip(folders, last, strict=True)
    }


# The tables.


def figure_rows(runs: Sequence[dict[str, Any]]) -> dict[str, list[Row]]:
    """Return what was measured of the runs: by its kind a line for each figure, with the best."""
    kinds: dict[str, dict[str, list[float | None]]] = {}
    for place, metrics in enumerate(runs):
        for kind, figures in figures_of(metrics).items():
            values = kinds.setdefault(kind, {})
            for name, value in figures.items():
                values.setdefault(name, [None] * len(runs))[place] = value
    return {
        kind: [
            figure_row(name, values)
            for name, values in figures.items()
            if any(value is not None for value in values)
        ]
        for kind, figures in kinds.items()
    }


def figures_of(metrics: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Return a run's figures by their kind and name; the names say what is better."""
    mean_picture, pca, sampled, through_mean = reconstruction_rows(metrics)
    kinds: dict[str, dict[str, float | None]] = {
        "Reconstructed test pictures": {
            "squared error, z the mean (lower is better)": through_mean.squared_error,
            "squared error, z sampled (lower)": sampled.squared_error,
            "squared error of PCA, as many components": pca.squared_error,
            f"squared error of {mean_picture.name}": mean_picture.squared_error,
            "explained, z the mean, % (higher)": as_percent(through_mean.explained),
            "explained by PCA, %": as_percent(pca.explained),
            "KL divergence, nats": metrics["test"]["kl"],
        }
    }
    rows = drawn_rows(metrics)
    for row in rows:
        if row.name.startswith("drawn from"):
            kinds[f"New pictures {row.name}"] = {
                "distance (lower)": row.distance,
                "recall, % (higher)": as_percent(row.recall),
                "precision, %": as_percent(row.precision),  # averages have the highest
            }
    for row in rows:
        if not row.name.startswith("drawn from"):
            kinds[f"For comparison: {row.name}"] = {
                "distance": row.distance,
                "recall, %": as_percent(row.recall),
                "precision, %": as_percent(row.precision),
            }
    kinds["Time"] = {"seconds": metrics["seconds"]}
    return kinds


def as_percent(share: float | None) -> float | None:
    """Return a share in hundredths."""
    return None if share is None else 100 * share


def figure_row(name: str, values: list[float | None]) -> Row:
    """Return a line of the table, with the best of its values if there are several."""
    known = [value for value in values if value is not None]
    choose = {"(lower": min, "(higher": max}
    best: set[int] = set()
    for word, best_of in choose.items():
        if word in name and len(set(known)) > 1:
            best = {i for i, value in enumerate(values) if value == best_of(known)}
    return Row(name, ["" if value is None else f"{value:.1f}" for value in values], best)


def option_rows(runs: Sequence[dict[str, Any]]) -> list[Row]:
    """Return the options in which the runs differ."""
    names = dict.fromkeys(name for metrics in runs for name in metrics["options"])
    rows = []
    for name in names:
        cells = [str(metrics["options"].get(name, "")) for metrics in runs]
        if name not in FREE and len(set(cells)) > 1:
            rows.append(Row(name, cells, set()))
    return rows


# The pictures.


def cut(path: Path, height: int) -> tuple[str, str]:
    """Return the first row of a grid of pairs and its reconstructions, as addresses."""
    with Image.open(path) as grid:
        below = height + FRAME  # where the next row begins
        originals = grid.crop((0, 0, grid.width, below + FRAME))
        reconstructions = grid.crop((0, below, grid.width, 2 * below + FRAME))
        return as_address(originals), as_address(reconstructions)


def first_rows(path: Path, height: int, rows: int) -> str:
    """Return the first rows of a grid, as the address of a picture."""
    with Image.open(path) as grid:
        return as_address(grid.crop((0, 0, grid.width, rows * (height + FRAME) + FRAME)))


def as_address(image: Image.Image) -> str:
    """Return a picture as an address that holds it."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return uri_of(file.getvalue())
