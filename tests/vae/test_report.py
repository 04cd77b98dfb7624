import io
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torchvision
from conftest import SIZES, SmallPictures
from helpers import (
    SMALL,
    assert_same_run,
    read_events,
    seed_as,
    seeded,
    tiles,
    train_small,
    write_checkpoint,
    write_photograph,
)
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter

from datasets.memory import InMemory
from vae import report
from vae.checkpoint import load_checkpoint, load_model
from vae.evaluation import PCA, evaluate, evaluate_pca, evaluate_samples
from vae.latent import fit_latents
from vae.losses import ELBOLoss
from vae.run import Run
from vae.vae import VAE
from vae_training import DATASETS, Options

# It looks at the validation split twice, ends with a beta below its final one, and comes so far
# that samples from the prior differ from those of the fitted latents.
RUN = {
    "epochs": 20,
    "learning_rate": 1e-2,
    "beta": 0.01,
    "beta_schedule": "linear",
    "warmup_epochs": 20,
}
FILES = ("reconstructions.png", "samples.png", "samples_prior.png")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a small run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train_small(folder, **RUN)
    return folder


@pytest.fixture(scope="module")
def metrics(run) -> dict[str, Any]:
    return json.loads((run / "metrics.json").read_bytes())


@pytest.fixture(scope="module")
def again(run, splits) -> dict[str, Any]:
    """What the run's report measured and drew, once more, with its random numbers."""
    model, _, latents = load_model(run / "checkpoint.pt")
    train, val, test = splits
    loss = ELBOLoss(RUN["beta"])
    seed_as(0, RUN["epochs"])
    with torch.no_grad():
        scores = {
            name: evaluate(model, split.batches(), loss)
            for name, split in (("train", train), ("val", val), ("test", test))
        }
        features = PCA(test.batches, 64)
        return scores | {
            "samples": evaluate_samples(model, latents, test.batches, features),
            "pca": evaluate_pca(train.batches, test.batches, 2, features),
            "reconstructions.png": model(test.images(slice(32)))[0],
            "samples.png": model.decoder(latents.sample((64,))),
            "samples_prior.png": model.sample(64),
        }


@pytest.fixture
def model(tmp_path) -> VAE:
    """A model whose latents are not where the prior is, and whose pictures differ."""
    with seeded():
        model = VAE((8, 8), 2, 3).eval().requires_grad_(False)
        write_checkpoint(tmp_path / "checkpoint.pt", model)
    model.encoder.fcm.bias.copy_(torch.tensor([3.0, -2.0]))
    model.encoder.fcv.bias.fill_(-3)
    return model


class Pairs(list):
    """A data set whose labels have no names."""


class Named(Pairs):
    """A data set whose labels have names."""

    classes: ClassVar[list[str]] = [f"species {label}" for label in range(34)]


def pictures_of(count: int, dataset: type = Pairs) -> InMemory:
    """Random pictures with labels that count down to 0."""
    images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))
    return InMemory(
        dataset(zip(map(torch.clone, images), reversed(range(count)), strict=True)), progress=False
    )


def as_pixels(pictures: torch.Tensor) -> np.ndarray:
    """Images in [0, 1], [batch, channels, height, width], as a picture file has them."""
    return pictures.movedim(1, -1).numpy() * 255


def read_tiles(png: bytes) -> np.ndarray:
    """The pictures in a grid, [count, height, width, channels]."""
    return tiles(np.asarray(Image.open(io.BytesIO(png)))).reshape(-1, 8, 8, 3).astype(float)


# The look at the validation split.


def look(model: VAE, splits: report.Splits, folder: Path) -> dict[str, list]:
    """What ``write_validation`` writes in epoch 9, by tag."""
    with SummaryWriter(folder) as writer, seeded(3):
        report.write_validation(writer, model, ELBOLoss(0.1), splits, 9)
    return read_events(folder).get(".", {})


def test_the_look_measures_the_validation_split_and_draws_samples(model, splits, tmp_path):
    events = look(model, splits, tmp_path)
    with seeded(3):
        expected = evaluate(model, splits[1].batches(), ELBOLoss(0.1))
        latents = fit_latents(model, [splits[0].images(slice(None, None, 4))])  # a quarter
        samples = {"samples": model.decoder(latents.sample((16,))), "samples_prior": None}
        samples["samples_prior"] = model.sample(16)
    for name in report.COMPARED:
        assert events[f"validation/{name}"] == [(9, pytest.approx(expected[name]))]
    for number, kl in enumerate(expected["kl_per_dimension"]):
        assert events[f"validation_kl/z{number}"] == [(9, pytest.approx(kl))]
    for tag, pictures in samples.items():
        ((step, png),) = events[tag]
        assert step == 9
        # TensorBoard rounds down, by one step of grey at most.
        assert np.abs(read_tiles(png) - as_pixels(pictures)).max() <= 1.01


def test_nothing_is_shown_of_weights_that_are_not_finite(model, splits, tmp_path):
    model.decoder.fc.bias[0] = float("nan")
    assert look(model, splits, tmp_path) == {}


@pytest.mark.parametrize(
    ("count", "shown"),
    [(34, range(0, 32, 2)), (100, range(0, 96, 6)), (8, range(8)), (5, range(5)), (13, range(8))],
)
def test_odd_rows_are_test_pictures_and_even_rows_their_reconstructions(model, count, shown):
    pictures = pictures_of(count)
    originals = pictures.images(torch.tensor(shown))
    with seeded(5):
        grid = tiles(report.pairs_grid(model, pictures, 16).movedim(0, -1).numpy())
    with seeded(5):
        reconstructions = model(originals)[0]
    assert grid.shape[:2] == (2 * len(shown) // min(8, count), min(8, count))
    for first, expected in enumerate((originals, reconstructions)):
        seen = grid[first::2].reshape(-1, 8, 8, 3)
        assert seen == pytest.approx(expected.movedim(1, -1).numpy(), abs=1e-6)


# The files of a run.


def test_the_metrics_are_of_the_whole_splits(metrics, again):
    for split in ("train", "val", "test"):
        assert metrics[split].keys() == again[split].keys()
        for name, value in metrics[split].items():
            assert value == pytest.approx(again[split][name], rel=1e-4), name
    assert metrics["pca"].keys() == again["pca"].keys() - {"codes"}
    for name, value in metrics["pca"].items():
        assert value == pytest.approx(again["pca"][name], rel=1e-4), name
    for name, values in again["samples"].items():
        assert metrics["samples"][name] == pytest.approx(values, rel=1e-4)


def test_the_metrics_say_what_was_run(run, metrics):
    model, options, _ = load_model(run / "checkpoint.pt")
    assert metrics["options"] == options
    architecture = {"image_resolution": [8, 8], "latent_size": 2, "image_channels": 3}
    assert metrics["architecture"] == architecture | {"batch_norm": False}
    assert (metrics["dataset"], metrics["epochs"], metrics["device"]) == ("small", 20, "cpu")
    assert metrics["parameters"] == sum(weight.numel() for weight in model.parameters())
    own = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    assert metrics["versions"] == own | {"python": platform.python_version()}
    assert 0 < metrics["seconds"] < 600


def test_the_pictures_are_pairs_of_test_pictures_and_64_samples_of_each_kind(run, again, splits):
    shown = {name: read_tiles((run / name).read_bytes()) for name in FILES}
    pairs = shown["reconstructions.png"].reshape(4, 2, 8, 8, 8, 3)
    assert np.array_equal(pairs[:, 0].reshape(32, 8, 8, 3), splits[2].pixels[:32])
    shown["reconstructions.png"] = pairs[:, 1].reshape(32, 8, 8, 3)
    for name in FILES:
        assert np.abs(shown[name] - as_pixels(again[name])).max() <= 0.51


def test_the_checkpoint_has_the_latents_fitted_to_the_training_pictures(run, splits):
    model, _, latents = load_model(run / "checkpoint.pt")
    expected = fit_latents(model, splits[0].batches())
    assert latents.mean == pytest.approx(expected.mean, rel=1e-4)
    assert latents.covariance_matrix == pytest.approx(expected.covariance_matrix, rel=1e-4)
    assert load_checkpoint(run / "checkpoint.pt")["epoch"] == 20


# TensorBoard.


def test_the_posts_chart_and_pictures_come_first(run):
    tags = {tag for events in read_events(run).values() for tag in events}
    groups = sorted({tag.partition("/")[0] for tag in tags})  # as TensorBoard orders them
    assert groups[:3] == ["loss", "originals", "reconstructions"]


def hparams(folder: Path) -> dict[str, float | str]:
    """The options that HParams shows of a run, by name."""
    reader = EventAccumulator(str(folder)).Reload()
    content = reader.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    shown = HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in shown.items()}


def test_hparams_hold_the_options_that_matter_and_the_scores_of_the_test_split(run, metrics):
    options = vars(Options(**SMALL | RUN))
    shown = hparams(run)
    always = {"beta", "epochs", "learning rate"}
    unusual = {
        name.replace("_", " ")
        for name, value in options.items()
        if value != getattr(Options(), name) and name != "device"
    }
    assert unusual  # else this shows little
    assert shown.keys() == always | unusual
    assert all(shown[name] == options[name.replace(" ", "_")] for name in always)
    for name in report.COMPARED:
        ((_, score),) = read_events(run)["."][f"test/{name}"]
        assert score == pytest.approx(metrics["test"][name])


@dataclass
class Own:
    """Options of a reader's own."""

    clip: float | None = 1.0
    scales: tuple[int, ...] = (1, 2)
    mirror: bool = False
    as_usual: int = 3


def test_hparams_show_what_is_no_number_as_text_and_nothing_that_is_as_usual(tmp_path):
    own = Own(clip=None, scales=(3,), mirror=True)
    with SummaryWriter(tmp_path) as writer:
        report.write_hparams(writer, own, dict.fromkeys(report.COMPARED, 1.0))
    assert hparams(tmp_path) == {"clip": "None", "scales": "(3,)", "mirror": "yes"}


@pytest.mark.parametrize(("dataset", "name"), [(Pairs, "{}"), (Named, "species {}")])
def test_the_projector_shows_each_test_picture_with_its_own_species(model, tmp_path, dataset, name):
    test = pictures_of(34, dataset)
    with SummaryWriter(tmp_path) as writer:
        report.write_projector(writer, model, test, epoch=1)
    folder = tmp_path / "00001" / "test_latents"
    species = (folder / "metadata.tsv").read_text().splitlines()
    assert species == [name.format(label) for label in test.labels]
    latents = np.loadtxt(folder / "tensors.tsv", delimiter="\t")
    assert latents == pytest.approx(model.encoder(test.images(slice(None)))[0].numpy(), abs=1e-5)
    sprite = np.asarray(Image.open(folder / "sprite.png"))
    thumbnails = sprite.reshape(6, 8, 6, 8, 3).swapaxes(1, 2).reshape(36, 8, 8, 3)[:34]
    assert np.abs(thumbnails - test.pixels.numpy().astype(int)).max() <= 1


def test_the_projector_shows_five_hundred_pictures_from_all_over_at_most(model, tmp_path):
    with SummaryWriter(tmp_path) as writer:
        report.write_projector(writer, model, pictures_of(2500), epoch=3)
    species = (tmp_path / "00003" / "test_latents" / "metadata.tsv").read_text().split()
    assert species == [str(label) for label in range(2499, 0, -5)]


def test_a_report_that_is_made_again_replaces_the_projector_without_a_word(model, tmp_path, capsys):
    for count in (9, 4):
        with SummaryWriter(tmp_path) as writer:
            report.write_projector(writer, model, pictures_of(count), epoch=3)
    (vectors,) = tmp_path.rglob("tensors.tsv")
    assert len(vectors.read_text().splitlines()) == 4
    assert capsys.readouterr().out == ""


def test_a_label_of_several_lines_is_one_line_in_the_projector(model, tmp_path):
    labelled = Pairs(zip(torch.rand(3, 3, 8, 8), ["a\nb\tc", "", None], strict=True))
    with SummaryWriter(tmp_path) as writer:
        report.write_projector(writer, model, InMemory(labelled, progress=False), epoch=1)
    species = (tmp_path / "00001" / "test_latents" / "metadata.tsv").read_text().splitlines()
    assert species == ["a b c", '""', "None"]


# What fails of what is only shown.


class Unspeakable:
    """A class's name that cannot be written down."""

    def __str__(self) -> str:
        raise LookupError("it has\nno name")


class Nameless(SmallPictures):
    """Pictures whose labels have names that cannot be written down."""

    classes: ClassVar[list[Any]] = [Unspeakable()] * 102


def test_a_projector_that_fails_is_a_warning_and_costs_nothing(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(DATASETS, "small", Nameless)
    train_small(tmp_path / "run", **RUN)
    warning = "warning: TensorBoard's Projector is not complete: LookupError: it has no name\n"
    assert capsys.readouterr().err == warning
    assert_same_run(tmp_path / "run", run)


def test_hparams_that_fail_are_a_warning_and_cost_nothing(tmp_path, capsys):
    name = os.fsdecode(b"flo\xffwers")
    try:
        for split in SIZES:
            for seed in range(2):
                write_photograph(tmp_path / name / split / f"{seed}.jpg", seed=seed)
    except OSError:
        pytest.skip("this system's names are all UTF-8")
    metrics = train_small(tmp_path / "run", dataset=str(tmp_path / name), epochs=1)
    assert metrics == json.loads((tmp_path / "run" / "metrics.json").read_bytes())
    *_, latents = load_model(tmp_path / "run" / "checkpoint.pt")
    assert latents is not None
    assert (tmp_path / "run" / "projector_config.pbtxt").exists()
    warning = "warning: TensorBoard's HParams is not complete: UnicodeEncodeError: 'utf-8' codec"
    assert capsys.readouterr().err.startswith(warning)


# The first words.


def test_the_opening_says_on_what_where_how_long_and_from_which_epoch(model, splits, tmp_path):
    run = Run(Options(**SMALL), tmp_path)
    parameters = sum(weight.numel() for weight in model.parameters())
    assert report.opening_text(run, model, splits, 0, 5) == (
        "small: 20 training, 6 validation and 34 test pictures of 8x8\n"
        f"A VAE of {parameters:,} parameters is trained for 3 epochs (15 steps) on cpu\n"
        f"Its folder: {tmp_path}"
    )
    going_on, ended = (report.opening_text(run, model, splits, epoch, 5) for epoch in (2, 3))
    assert "goes on at epoch 2 of 3 epochs (15 steps)" in going_on
    assert "has ended after its 3 epochs: only" in ended
