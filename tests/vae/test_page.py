"""report.html, as a run leaves it."""

import base64
import io
import json
import math
import re
import signal
import xml.etree.ElementTree as ElementTree
from copy import copy
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SMALL, interruption, seeded, tiles, train_small
from matplotlib.figure import Figure
from PIL import Image

from vae.checkpoint import load_model
from vae.history import History
from vae.page import (
    CHARTS,
    charts_of,
    draw_chart,
    draw_dimensions,
    extremes,
    keep_moment,
    nearest,
    scale_values,
)
from vae.run import Run, Stopped
from vae.vae import VAE
from vae_training import Options, train

RUN = {"epochs": 20, "learning_rate": 1e-2}


class Parser(HTMLParser):
    """Gathers the texts, the pictures and the table cells of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.pictures: dict[str, np.ndarray] = {}
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append(tag)
        found = dict(attributes)
        if tag == "img":
            _, _, content = found["src"].partition("base64,")
            image = Image.open(io.BytesIO(base64.b64decode(content)))
            self.pictures[" ".join(found["alt"].split())] = np.asarray(image)

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(" ".join(data.split()))


def read_page(folder: Path) -> Parser:
    return Parser((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "<b>my & run"
    train_small(folder, **RUN)
    return folder


@pytest.fixture(scope="module")
def page(run) -> Parser:
    return read_page(run)


def test_the_page_needs_nothing_but_itself(run):
    text = (run / "report.html").read_text(encoding="utf-8")
    addresses = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert addresses
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in addresses)
    assert "<script" not in text


def test_the_page_has_the_runs_figures(run, page):
    metrics = json.loads((run / "metrics.json").read_bytes())
    for error in (
        metrics["mean_picture"]["squared_error"],
        metrics["pca"]["squared_error"],
        metrics["test"]["squared_error"],
        metrics["test"]["squared_error_mean"],
    ):
        assert f"{error:.1f}" in page.texts
    assert "34 test pictures are too few to measure new pictures by." in page.texts


def test_a_name_with_signs_of_html_is_shown_as_it_is(page):
    assert page.texts.count("<b>my & run") == 2  # the title and the heading
    assert "b" not in page.tags


def test_the_page_says_how_many_pictures_there_were(page):
    text = re.sub(r"\s+", " ", " ".join(page.texts))
    assert "20 training, 6 validation and 34 test pictures" in text


def test_the_page_names_the_options_that_are_not_usual(page):
    start = page.texts.index("default") + 1
    cells = page.texts[start : page.texts.index("epochs") + 6]
    assert cells[6:9] == ["latent_size", "2", "10"]
    assert "learning_rate" in page.texts and "beta" not in page.texts


def test_the_story_shows_the_same_test_pictures_and_samples_at_each_moment(run, page, splits):
    _, _, test = splits
    eight = test.images(torch.linspace(0, len(test) - 1, 8).long())
    (row,) = tiles(page.pictures["Eight test pictures"])
    assert np.abs(row / 255 - eight.movedim(1, -1).numpy()).max() < 0.01
    moments = [name for name in page.pictures if "after epoch" in name]
    assert [int(name.split()[-1]) for name in moments] == [1, 3, 5, 8, 11, 15, 20]
    reconstructions, samples = tiles(page.pictures[moments[-1]])
    model, _, _ = load_model(run / "checkpoint.pt")
    with torch.no_grad():
        expected = model.decoder(model.encoder(eight)[0])
    assert np.abs(reconstructions / 255 - expected.movedim(1, -1).numpy()).max() < 0.01
    assert len({sample.tobytes() for sample in samples}) == 8


def test_the_story_costs_the_run_no_random_numbers(run, tmp_path, monkeypatch):
    monkeypatch.setattr("vae_training.keep_moment", lambda *_: None)
    train_small(tmp_path / "without", **RUN)
    metrics = [
        json.loads((folder / "metrics.json").read_bytes()) | {"seconds": 0}
        for folder in (run, tmp_path / "without")
    ]
    assert metrics[0] == metrics[1]


def test_a_resumed_run_has_the_whole_story_and_all_curves(run, tmp_path):
    with interruption(signal.SIGINT, call=20), pytest.raises(Stopped):
        train_small(tmp_path / "run", **RUN)
    early = read_page(tmp_path / "run")
    assert "Stopped by SIGINT." in early.texts
    assert [name for name in early.pictures if "after epoch" in name]
    assert "How good is it?" not in early.texts
    train_small(tmp_path / "run", True, **RUN)
    whole, resumed = (
        (folder / "report.html").read_text(encoding="utf-8") for folder in (run, tmp_path / "run")
    )

    def without_what_differs(text: str) -> str:
        text = re.sub(r"in \d+ s", "", text)
        return text.replace("&lt;b&gt;my &amp; run", "run")

    assert without_what_differs(resumed) == without_what_differs(whole)


def test_a_run_that_diverges_has_its_page_as_far_as_it_got(tmp_path):
    options = Options(**SMALL | {"learning_rate": 1e30, "epochs": 30})
    with pytest.raises(FloatingPointError):
        train(options, tmp_path / "run", progress=False)
    (said,) = [text for text in read_page(tmp_path / "run").texts if text.startswith("Ended: ")]
    assert "not finite after epoch" in said


def test_the_best_and_the_worst_reconstructions_are_those_of_all_test_pictures(run, splits):
    _, _, test = splits
    model, _, _ = load_model(run / "checkpoint.pt")
    images = test.images(slice(None))
    with torch.no_grad():
        error = (images - model.decoder(model.encoder(images)[0])).square().sum(dim=(1, 2, 3))
        shown = extremes(model, test, torch.device("cpu"))
    order = error.argsort()
    for kind, place in (("best", order[0]), ("worst", order[-4])):
        content = base64.b64decode(shown[kind].partition("base64,")[2])
        originals, _ = tiles(np.asarray(Image.open(io.BytesIO(content))))
        expected = images[place].movedim(0, -1).numpy()
        assert np.abs(originals[0] / 255 - expected).max() < 0.01


def test_the_nearest_training_picture_is_looked_for_in_all_of_them(splits):
    train, _, _ = splits
    wanted = train.images(torch.tensor([19, 0, 7]))
    noise = 0.01 * torch.rand(wanted.shape)
    assert torch.equal(nearest(wanted + noise, train), wanted)


@pytest.fixture
def history() -> History:
    history = History()
    for history.epoch in range(30):
        history.add("loss/KL Loss", 1000.0 if history.epoch == 0 else 20.0 + history.epoch)
    return history


def test_a_chart_has_the_texts_colour_named_axes_and_its_curves(history):
    svg = draw_chart(CHARTS[1], history)
    texts = " ".join(ElementTree.fromstring(svg).itertext())
    for words in ("KL divergence", "epoch", "nats per picture", "training"):
        assert words in texts
    assert "validation" not in texts  # which this run has not measured
    assert "currentColor" in svg
    assert "#010203" not in svg


def test_each_latent_dimension_has_a_bar():
    svg = draw_dimensions([3.0, 0.0, 1.0])
    texts = " ".join(ElementTree.fromstring(svg).itertext())
    assert "latent dimension" in texts and "nats per test picture" in texts
    names = [each.get("id") for each in ElementTree.fromstring(svg).iter() if each.get("id")]
    # Three bars, and the paper of the figure and of the axes.
    assert sum(name.startswith("patch_") for name in names) - len(("left", "bottom")) == 5


def test_a_run_without_curves_has_no_chart():
    assert draw_chart(CHARTS[0], History()) is None


def test_a_chart_marks_the_posts_30_epochs_and_none_behind_the_end():
    history = History()
    for history.epoch in range(60):
        history.add("loss/KL Loss", 3.0 + history.epoch)
    texts = list(ElementTree.fromstring(draw_chart(CHARTS[1], history)).itertext())
    assert {"1", "3", "10", "30"} <= set(texts)
    assert "100" not in texts


@pytest.mark.parametrize(
    "values", [[400.0, 1e8, 1e30], [400.0, math.inf], [5.0, 5.0], [78.0, 76.0], [30.0, -4.0]]
)
def test_a_charts_vertical_axis_has_numbers_whatever_the_values(values):
    history = History()
    for history.epoch, value in enumerate(values):
        history.add("loss/Reconstruction Loss", value)
    root = ElementTree.fromstring(draw_chart(CHARTS[0], history))
    ticks = [each for each in root.iter() if (each.get("id") or "").startswith("ytick")]
    assert sum(1 for tick in ticks if "".join(tick.itertext()).strip()) >= 2


def test_a_training_loss_that_is_no_squared_error_is_not_drawn_as_one():
    gaussian, sigma = (charts_of(Options(likelihood=name))[0] for name in ("gaussian", "sigma"))
    assert gaussian == CHARTS[0]
    assert gaussian.tags.keys() - sigma.tags.keys() == {"training"}


@pytest.mark.parametrize(("values", "scale"), [([300.0, 80.0], "log"), ([30.0, -4.0], "linear")])
def test_values_are_shown_on_a_logarithmic_axis_if_all_are_positive(values, scale):
    axis = Figure().subplots()
    axis.plot([1, 2], values)
    scale_values(axis)
    assert axis.get_yscale() == scale


def test_a_curve_that_is_not_finite_has_a_chart(history):
    history.add("loss/KL Loss", float("nan"))
    assert draw_chart(CHARTS[1], history)


def test_below_each_new_picture_stands_the_training_picture_that_is_nearest_to_it(page, splits):
    train, _, _ = splits
    rows = tiles(page.pictures["Eight new pictures above their nearest training pictures"])
    new, below = (torch.from_numpy(row / 255).float().movedim(-1, 1) for row in rows)
    assert (below - nearest(new, train)).abs().max() < 0.01


def test_a_moment_has_two_rows_with_few_test_pictures_too(tmp_path, splits):
    train, val, test = splits
    few = copy(test)
    few.pixels = test.pixels[:3]
    with Run(Options(**SMALL), tmp_path / "run") as run:
        keep_moment(run, VAE((8, 8), 2, 3), (train, val, few), epoch=0)
    (moment,) = (tmp_path / "run" / "story").iterdir()
    assert Image.open(moment).size == (3 * (8 + 2) + 2, 2 * (8 + 2) + 2)


def test_the_storys_samples_are_of_the_same_noise_at_each_moment(tmp_path, splits):
    with seeded():
        model = VAE((8, 8), 2, 3)
    model.decoder.fc.weight.data *= 40  # untrained, it draws nearly the same from all noise
    with Run(Options(**SMALL), tmp_path / "run") as run:
        for epoch in range(3):
            run.seed(epoch)
            keep_moment(run, model, splits, epoch)
    moments = [path.read_bytes() for path in (tmp_path / "run" / "story").iterdir()]
    assert len(moments) == 3
    assert len(set(moments)) == 1  # the model has stayed as it was
