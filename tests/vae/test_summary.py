"""What a run says at its end, of invented figures."""

import re
from pathlib import Path
from typing import Any

import pytest

from vae.history import History
from vae.summary import FEWEST_MEASURED, advice, drawn_rows, reconstruction_rows, summary_text


def invented(**changes: Any) -> dict[str, Any]:
    """Metrics of a good run, as nothing is to be advised of; ``changes`` as ``test__kl=3``."""
    metrics: dict[str, Any] = {
        "epochs": 500,
        "seconds": 300.0,
        "test_pictures": 6149,
        "architecture": {"latent_size": 10},
        "options": {"augment": False, "lr_schedule": "constant", "beta_schedule": "constant"},
        "mean_picture": {"squared_error": 200.0},
        "train": {"squared_error_mean": 48.0},
        "test": {
            "squared_error": 60.0,
            "squared_error_mean": 50.0,
            "kl": 27.8,
            "active_units": 9,
        },
        "pca": {
            "components": 10,
            "squared_error": 55.0,
            "frechet": {"samples": 40.0},
            "precision": {"samples": 0.9},
            "recall": {"samples": 0.1},
        },
        "real": {"frechet": 1.9},
        "samples": {
            "frechet": {"fitted": 31.0, "prior": 76.0, "reconstructions": 9.0},
            "precision": {"fitted": 0.8, "prior": 0.5, "real": 0.7},
            "recall": {"fitted": 0.6, "prior": 0.5, "real": 0.65},
        },
        "advice": "",
    }
    for name, value in changes.items():
        *parents, last = name.split("__")
        part = metrics
        for parent in parents:
            part = part[parent]
        part[last] = value
    return metrics


def falling(share: float) -> History:
    """A validation error that falls by so much from one look to the next."""
    history = History()
    for history.epoch in range(9, 500, 10):
        history.add("validation/squared_error_mean", 100 * (1 - share) ** history.epoch)
    return history


def test_each_description_explains_a_share_of_what_the_mean_picture_leaves():
    assert [
        (row.name, row.squared_error, row.explained) for row in reconstruction_rows(invented())
    ] == [
        ("the mean training picture", 200.0, 0.0),
        ("PCA, 10 components", 55.0, 0.725),
        ("the model, z sampled", 60.0, 0.7),
        ("the model, z the mean", 50.0, 0.75),
    ]


def test_of_pictures_that_are_all_the_same_nothing_is_explained():
    metrics = invented(mean_picture__squared_error=0.0)
    assert {row.explained for row in reconstruction_rows(metrics)} == {None}
    assert "0%" not in summary_text(metrics, Path("runs/a")).partition("New pictures")[0]


def test_new_pictures_stand_beside_real_ones_and_pcas():
    assert [tuple(row) for row in drawn_rows(invented())] == [
        ("real pictures", 1.9, 0.7, 0.65),
        ("drawn from the fitted latents", 31.0, 0.8, 0.6),
        ("drawn from the prior", 76.0, 0.5, 0.5),
        ("drawn with PCA", 40.0, 0.9, 0.1),
    ]


def test_too_few_test_pictures_measure_no_new_pictures_and_that_is_said():
    metrics = invented(test_pictures=FEWEST_MEASURED - 1)
    assert drawn_rows(metrics) == []
    text = summary_text(metrics, Path("runs/a"))
    assert "499 test pictures are too few to measure them by (500 are needed)" in text
    assert "31.0" not in text


def test_without_precision_and_recall_the_distances_are_still_shown():
    metrics = invented(test_pictures=600)
    for part in ("samples", "pca"):
        del metrics[part]["precision"], metrics[part]["recall"]
    assert {row.precision for row in drawn_rows(metrics)} == {None}
    assert "31.0" in summary_text(metrics, Path("runs/a"))


def test_the_summary_fits_a_console_of_80_columns_and_is_ascii():
    text = summary_text(invented(advice="Try more. " * 20), Path("runs/a"))
    *lines, command = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert text.isascii()
    assert command == "tensorboard --logdir runs --samples_per_plugin images=1000"


def test_the_summary_has_both_tables_what_to_try_and_where_to_look():
    text = summary_text(invented(advice="Try more."), Path("runs/a"))
    text = re.sub(" +", " ", text)
    for words in (
        "the model, z the mean 50.0 75%",
        "KL divergence 27.8 nats; 9 of 10 latent dimensions active",
        "drawn from the fitted latents 31.0 80% 60%",
        "Try more.",
        f"500 epochs in 300 s: open {Path('runs/a/report.html')}",
    ):
        assert words in text


ADVICE = {
    "a good run": ({}, falling(0), ""),
    "a collapsed one": (
        {"mean_picture__squared_error": 49.0, "test__active_units": 0},
        falling(0),
        "a lower --beta",
    ),
    "one that has hardly begun": (
        {"mean_picture__squared_error": 49.0, "test__active_units": 0},
        History(),
        "not yet better than the mean training picture: try more --epochs",
    ),
    "an overfitted one": ({"train__squared_error_mean": 40.0}, falling(0), "try --augment"),
    "one that is augmented": (
        {"train__squared_error_mean": 40.0, "options__augment": True},
        falling(0),
        "",
    ),
    "one that was stopped too early": ({}, falling(1e-3), "--resume and --epochs 1000"),
    "one with a schedule": ({"options__lr_schedule": "cosine"}, falling(1e-3), ""),
    "one that PCA beats": ({"pca__squared_error": 49.0}, falling(0), "--preset best"),
    "one with the best setting that PCA beats": (
        {
            "pca__squared_error": 49.0,
            "options__augment": True,
            "options__lr_schedule": "cosine",
        },
        falling(0),
        "more --epochs, or --start-from",
    ),
    "one of safe averages": ({"samples__recall__fitted": 0.1}, falling(0), "only 10% .* petals"),
}


@pytest.mark.parametrize(("changes", "history", "words"), ADVICE.values(), ids=ADVICE)
def test_what_to_try_next_follows_from_what_was_measured(changes, history, words):
    said = advice(invented(**changes), history)
    assert re.search(words, said), said
    assert bool(said) == bool(words)
