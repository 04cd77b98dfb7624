import io
import json
import platform
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import make_splits
from helpers import LOSSES, SMALL, read_events, read_losses, seed_as, tiles, train_small
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import HISTOGRAMS, EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter
from torchvision.datasets import Flowers102

from vae.evaluation import evaluate, pca_squared_error
from vae.losses import ELBOLoss
from vae.training import report
from vae.training.checkpoint import load_model
from vae.training.options import Options
from vae.vae import VAE

COMPARED = ("squared_error", "squared_error_mean", "psnr", "kl", "active_units")
SPECIES = {"flowers102": Flowers102.classes, "synthetic": [str(label) for label in range(102)]}


@pytest.fixture(scope="module")
def run(tmp_path_factory, splits) -> Path:
    """The folder of a small run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train_small(folder, splits, learning_rate=1e-2)
    return folder


@pytest.fixture
def model() -> VAE:
    torch.manual_seed(0)
    return VAE((8, 8), 2, 3).eval()


# The losses of an epoch.


def test_each_loss_has_a_point_for_every_batch_under_the_posts_tag(tmp_path):
    losses = torch.arange(12.0).view(4, 3)
    with SummaryWriter(tmp_path) as writer:
        last = report.write_losses(writer, list(losses[:2]), epoch=0)
        assert last == (3, 4, 5)
        last = report.write_losses(writer, list(losses[2:]), epoch=1)
        assert last == (9, 10, 11)
    assert np.array_equal(read_losses(tmp_path), losses)
    events = read_events(tmp_path)
    assert set(events) == {".", *(f"loss_{name}" for name in LOSSES)}
    for name in LOSSES:
        assert list(events[f"loss_{name}"]) == ["loss"]
        assert [step for step, _ in events[f"loss_{name}"]["loss"]] == [0, 1, 2, 3]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_its_epoch_and_batch(tmp_path, value):
    losses = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, value, value])]
    message = rf"the loss is {value} in epoch 7, batch 1 \(KL 4.0, reconstruction {value}\)"
    with SummaryWriter(tmp_path) as writer, pytest.raises(FloatingPointError, match=message):
        report.write_losses(writer, losses, epoch=7)
    assert read_losses(tmp_path).tolist() == [[1, 2, 3]]


# The look at the validation split.


def test_the_curves_are_of_the_validation_split(model, splits, tmp_path):
    loss = ELBOLoss(0.1)
    with SummaryWriter(tmp_path) as writer:
        torch.manual_seed(3)
        report.write_validation(writer, model, loss, splits, epoch=9)
    torch.manual_seed(3)
    expected = evaluate(model, splits.val.batches(), loss)
    events = read_events(tmp_path)["."]
    for name in COMPARED:
        assert events[f"validation/{name}"] == [(9, pytest.approx(expected[name]))]
    reader = EventAccumulator(str(tmp_path), {HISTOGRAMS: 0}).Reload()
    (histogram,) = reader.Histograms("validation/kl_per_dimension")
    assert histogram.histogram_value.num == 2
    assert histogram.histogram_value.sum == pytest.approx(expected["kl"], rel=1e-5)


def test_the_look_shows_test_pairs_and_samples(model, splits, tmp_path):
    with SummaryWriter(tmp_path) as writer:
        report.write_validation(writer, model, ELBOLoss(0.1), splits, epoch=9)
    events = read_events(tmp_path)["."]
    for tag, rows in (("test_pairs", 4), ("samples", 2)):
        ((step, png),) = events[tag]
        assert step == 9
        assert tiles(np.asarray(Image.open(io.BytesIO(png)))).shape[:2] == (rows, 8)


def test_the_look_comes_every_ten_epochs(model, splits, tmp_path):
    with SummaryWriter(tmp_path) as writer:
        for epoch in range(31):
            report.write_validation(writer, model, ELBOLoss(0.1), splits, epoch)
    assert [step for step, _ in read_events(tmp_path)["."]["validation/kl"]] == [9, 19, 29]


def test_weights_that_are_not_finite_are_left_to_the_checkpoint_to_refuse(model, splits, tmp_path):
    model.decoder.fc.bias.data[0] = float("nan")
    with SummaryWriter(tmp_path) as writer:
        report.write_validation(writer, model, ELBOLoss(0.1), splits, epoch=9)
    assert read_events(tmp_path) == {".": {}}


# Pairs of pictures.


@pytest.mark.parametrize(
    ("test", "shown"), [(34, range(0, 32, 2)), (100, range(0, 96, 6)), (8, range(8))]
)
def test_odd_rows_are_test_pictures_and_even_rows_their_reconstructions(model, test, shown):
    pictures = make_splits(test=test).test
    torch.manual_seed(5)
    grid = tiles(report.test_pairs(model, pictures, 16).movedim(0, -1).detach().numpy())
    originals = pictures[:][0][list(shown)]
    rows = len(originals) // 8
    torch.manual_seed(5)
    reconstructions = model(originals)[0].detach()
    for first, expected in ((0, originals), (1, reconstructions)):
        seen = grid[first::2].reshape(-1, 8, 8, 3)
        assert grid.shape[:2] == (2 * rows, 8)
        assert seen == pytest.approx(expected.movedim(1, -1).numpy(), abs=1e-6)


# The files of a run.


def test_the_metrics_are_of_pca_and_of_the_whole_splits(run, splits):
    metrics = json.loads((run / "metrics.json").read_bytes())
    model, *_ = load_model(run / "checkpoint.pt")
    seed_as(0, SMALL["epochs"])
    expected = pca_squared_error(splits.train.batches(), splits.test.batches(), components=2)
    assert metrics["pca"] == {"components": 2, "test": pytest.approx(expected)}
    for name in ("train", "val", "test"):
        expected = evaluate(model, getattr(splits, name).batches(), ELBOLoss(0.1))
        assert metrics[name].pop("elbo_per_dimension") is expected.pop("elbo_per_dimension")
        assert metrics[name] == {
            key: pytest.approx(value, rel=1e-5) for key, value in expected.items()
        }


def test_the_metrics_say_what_was_run(run):
    metrics = json.loads((run / "metrics.json").read_bytes())
    model, config, _ = load_model(run / "checkpoint.pt")
    assert metrics["config"] == config
    assert (metrics["dataset"], metrics["epochs"], metrics["device"]) == ("synthetic", 3, "cpu")
    assert metrics["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert metrics["versions"] == {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    assert 0 < metrics["seconds"] < 600


def test_the_pictures_are_pairs_of_test_pictures_and_64_samples(run, splits):
    pairs = tiles(np.asarray(Image.open(run / "reconstructions.png")))
    assert np.array_equal(pairs[::2].reshape(32, 8, 8, 3), splits.test.pixels[:32])
    model, *_ = load_model(run / "checkpoint.pt")
    with torch.no_grad():
        through_mean = model.reconstruct(splits.test[:32][0]).movedim(1, -1).numpy() * 255
    # The pictures' z is sampled, so they are near to those through the mean and not the same.
    assert np.abs(pairs[1::2].reshape(32, 8, 8, 3) - through_mean).mean() < 15
    samples = tiles(np.asarray(Image.open(run / "samples.png")))
    assert samples.shape[:2] == (8, 8)
    assert len(np.unique(samples.reshape(64, -1), axis=0)) == 64


# What TensorBoard compares.


def test_hparams_hold_the_experiment_and_the_scores_of_the_test_split(run):
    reader = EventAccumulator(str(run)).Reload()
    content = reader.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    start = HParamsPluginData.FromString(content).session_start_info
    shown = {
        name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()
    }
    assert shown.pop("dataset") == "synthetic"
    experiment = {**SMALL, "learning_rate": 1e-2, "beta": 0.1, "batch_norm": False}
    assert shown.items() >= experiment.items()
    assert not shown.keys() & {"log_dir", "data_root", "run_name", "checkpoint_every"}
    assert set(shown) < set(Options.__dataclass_fields__)

    metrics = json.loads((run / "metrics.json").read_bytes())
    for name in COMPARED:
        ((_, score),) = read_events(run)["."][f"test/{name}"]
        assert score == pytest.approx(metrics["test"][name])
        assert score != pytest.approx(metrics["val"][name]) or name == "active_units"


@pytest.mark.parametrize("dataset", SPECIES)
def test_the_projector_shows_each_test_picture_with_its_own_species(tmp_path, dataset):
    splits = make_splits(test=34)._replace(dataset=dataset)
    splits.test.labels[:] = torch.arange(34).flip(0) * 3
    train_small(tmp_path, splits, epochs=1)
    folder = tmp_path / "00000" / "test_latents"
    species = (folder / "metadata.tsv").read_text().splitlines()
    assert species == [SPECIES[dataset][label] for label in splits.test.labels.tolist()]
    model, *_ = load_model(tmp_path / "checkpoint.pt")
    with torch.no_grad():
        means, _ = model.encoder(splits.test[:][0])
    latents = np.loadtxt(folder / "tensors.tsv", delimiter="\t")
    assert latents == pytest.approx(means.numpy(), abs=1e-5)
    sprite = np.asarray(Image.open(folder / "sprite.png"))
    thumbnails = sprite.reshape(6, 8, 6, 8, 3).swapaxes(1, 2).reshape(36, 8, 8, 3)[:34]
    assert np.abs(thumbnails - splits.test.pixels.numpy().astype(int)).max() <= 1


def test_the_projector_shows_a_thousand_pictures_of_all_species_at_most(model, tmp_path):
    splits = make_splits(test=2500)
    with SummaryWriter(tmp_path) as writer, torch.no_grad():
        report.write_latents(writer, model, splits)
    species = (tmp_path / "00000" / "test_latents" / "metadata.tsv").read_text().split()
    assert species == [str(label % 102) for label in range(0, 2500, 3)]


# The last words.


def test_the_summary_says_how_good_the_model_is_and_where_to_look():
    metrics = {
        "test": {
            **{"squared_error": 81.26, "squared_error_mean": 75.04, "psnr": 16.25, "kl": 12.34},
            "active_units": 9,
        },
        **{"pca": {"components": 10, "test": 90.0}, "epochs": 500, "seconds": 65.4},
    }
    assert report.summary(metrics, Path("my runs/first")) == (
        "Test pictures: squared error 81.3 per image (75.0 through the mean, PSNR 16.2 dB), "
        "KL 12.3 nats, 9 active latent dimensions.\n"
        "PCA with 10 components: 90.0; the model is 8.7 better.\n"
        "500 epochs in 65 s. Pictures, metrics and the model are in my runs/first\n"
        "Look at the run with: tensorboard --logdir 'my runs'"
    )
    metrics["pca"]["test"] = 80.0
    assert "the model is 1.3 worse.\n" in report.summary(metrics, Path("my runs/first"))
