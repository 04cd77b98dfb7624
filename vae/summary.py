"""How good a run is, in words and in a table, from what was measured of it."""

import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from vae.command_line import quote
from vae.history import History, still_falls

# With fewer test pictures a distance says more of their number than of the model: the 1,020
# training photographs are at 2 from all test photographs, at 4 from 500 of them, at 9 from 200, at
# 16 from 100 and at 25 from 50.
FEWEST_MEASURED = 500

Metrics = dict[str, Any]  # what a run has in metrics.json


class Reconstruction(NamedTuple):
    """A line of the first table: a way to describe the test pictures."""

    name: str
    squared_error: float  # per test picture
    explained: float | None  # the share of what differs between test pictures, if anything does


class Drawn(NamedTuple):
    """A line of the second table: pictures that are held against the test pictures."""

    name: str
    distance: float
    precision: float | None  # None where they were not measured
    recall: float | None


def reconstruction_rows(metrics: Metrics) -> list[Reconstruction]:
    """Return the lines of the first table, the worst way first."""
    pca, test = metrics["pca"], metrics["test"]
    most = metrics["mean_picture"]["squared_error"]
    errors = {
        "the mean training picture": most,
        f"PCA, {pca['components']} components": pca["squared_error"],
        "the model, z sampled": test["squared_error"],
        "the model, z the mean": test["squared_error_mean"],
    }
    return [
        Reconstruction(name, error, 1 - error / most if most else None)
        for name, error in errors.items()
    ]


def drawn_rows(metrics: Metrics) -> list[Drawn]:
    """Return the lines of the second table; none where test pictures are too few for it."""
    if metrics["test_pictures"] < FEWEST_MEASURED:
        return []
    samples, pca = metrics["samples"], metrics["pca"]

    def row(name: str, distance: float, measured: Metrics, key: str) -> Drawn:
        precision, recall = (measured.get(kind, {}).get(key) for kind in ("precision", "recall"))
        return Drawn(name, distance, precision, recall)

    return [
        row("real pictures", metrics["real"]["frechet"], samples, "real"),
        row("drawn from the fitted latents", samples["frechet"]["fitted"], samples, "fitted"),
        row("drawn from the prior", samples["frechet"]["prior"], samples, "prior"),
        row("drawn with PCA", pca["frechet"]["samples"], pca, "samples"),
    ]


def advice(metrics: Metrics, history: History) -> str:
    """Return what to try next, in one sentence, if what was measured supports one; else nothing."""
    options, test, train = metrics["options"], metrics["test"], metrics["train"]
    error, error_in_training = test["squared_error_mean"], train["squared_error_mean"]
    schedules = {options.get("lr_schedule"), options.get("beta_schedule")}
    _, validation = history.curve("validation/squared_error_mean")
    # With fewer looks a collapse cannot be told from a start.
    has_hardly_begun = len(validation) < 2
    if has_hardly_begun and error >= metrics["mean_picture"]["squared_error"]:
        return "It is not yet better than the mean training picture: try more --epochs."
    if test["active_units"] == 0:
        return "No latent dimension says anything about a picture: try a lower --beta."
    if error > 1.15 * error_in_training and options.get("augment") is False:
        return (
            f"The error on the training pictures is {error_in_training:.1f}, far below "
            f"{error:.1f} on the test pictures: try --augment."
        )
    if still_falls(validation) and schedules == {"constant"}:
        return (
            "The validation error was still falling: go on with --resume and "
            f"--epochs {2 * metrics['epochs']}."
        )
    pca_error = metrics["pca"]["squared_error"]
    pca_is_better = f"PCA does better with as many numbers ({pca_error:.1f} against {error:.1f})"
    as_the_post = options.get("augment") is False and options.get("lr_schedule") == "constant"
    if error > pca_error and as_the_post:
        return f"{pca_is_better}: try --preset best."
    if error > pca_error:
        return (
            f"{pca_is_better}: try more --epochs, or --start-from, which begins with another "
            "model's weights."
        )
    samples = metrics["samples"]
    if "recall" in samples and samples["recall"]["fitted"] < 0.5 * samples["recall"]["real"]:
        return (
            f"New pictures come near only {samples['recall']['fitted']:.0%} of the real ones, "
            f"where other real pictures come near {samples['recall']['real']:.0%}: "
            "try more latent dimensions, as --preset petals has."
        )
    return ""


def summary_text(metrics: Metrics, folder: Path) -> str:
    """Return what a run prints at its end: how good the model is, what to try, where to look."""
    test, latent_size = metrics["test"], metrics["architecture"]["latent_size"]
    lines = [f"{'Reconstructed test pictures':42}{'squared error':>15}{'explained':>12}"]
    for way in reconstruction_rows(metrics):
        line = f"  {way.name:40}{way.squared_error:15.1f}"
        lines.append(line if way.explained is None else f"{line}{way.explained:12.0%}")
    lines.append(
        f"  KL divergence {test['kl']:.1f} nats; "
        f"{test['active_units']} of {latent_size} latent dimensions active"
    )
    drawn = drawn_rows(metrics)
    if drawn:
        lines.append(f"{'New pictures':42}{'distance':>15}{'precision':>12}{'recall':>10}")
    else:
        lines.append(
            f"New pictures: {metrics['test_pictures']} test pictures are too few to measure them by"
            f" ({FEWEST_MEASURED} are needed)"
        )
    for row in drawn:
        line = f"  {row.name:40}{row.distance:15.1f}"
        if row.precision is not None and row.recall is not None:
            line += f"{row.precision:12.0%}{row.recall:10.0%}"
        lines.append(line)
    if metrics["advice"]:
        lines.append(textwrap.fill(metrics["advice"], 80))
    look = ["tensorboard", "--logdir", str(folder.parent), "--samples_per_plugin", "images=1000"]
    took = f"{metrics['epochs']} epochs in {metrics['seconds']:.0f} s"
    lines += [f"{took}: open {folder / 'report.html'}, or", quote(look)]
    return "\n".join(lines)
