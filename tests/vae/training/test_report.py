import io
import json
import platform
from pathlib import Path
from typing import Any

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

from vae.evaluation import evaluate, evaluate_samples, pca_squared_error
from vae.latent import fit_latents
from vae.losses import ELBOLoss
from vae.training import report
from vae.training.checkpoint import load_checkpoint, load_model
from vae.training.options import Options
from vae.vae import VAE
from vae_training import train

COMPARED = ("squared_error", "squared_error_mean", "psnr", "kl", "active_units")
SPECIES = {"flowers102": Flowers102.classes, "synthetic": [str(label) for label in range(102)]}


# It looks at the validation split twice, ends with a beta below its final one, and comes so far
# that samples from the prior differ from those of the fitted latents.
RUN = {
    **{"epochs": 20, "learning_rate": 1e-2, "beta": 0.01},
    **{"beta_schedule": "linear", "warmup_epochs": 20},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, splits) -> Path:
    """The folder of a small run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train_small(folder, splits, **RUN)
    return folder


@pytest.fixture(scope="module")
def again(run, splits) -> dict[str, Any]:
    """What the run's report measured and drew, once more, with its random numbers."""
    model, _, latents = load_model(run / "checkpoint.pt")
    train, val, test = splits[:3]
    loss = ELBOLoss(RUN["beta"])
    seed_as(0, RUN["epochs"])
    with torch.no_grad():
        return {
            "train": evaluate(model, train.batches(), loss),
            "val": evaluate(model, val.batches(), loss),
            "test": evaluate(model, test.batches(), loss),
            "samples": evaluate_samples(model, latents, train.batches, test.batches),
            "pca": pca_squared_error(train.batches, test.batches(), 2),
            "reconstructions.png": model(test[:32][0])[0],
            "samples.png": model.decoder(latents.sample((64,))),
            "samples_prior.png": model.sample(64),
        }


@pytest.fixture
def model() -> VAE:
    """A model whose latents are not where the prior is, and whose pictures differ."""
    torch.manual_seed(0)
    model = VAE((8, 8), 2, 3).eval()
    with torch.no_grad():
        model.encoder.fcm.weight.mul_(30)
        model.encoder.fcm.bias.copy_(torch.tensor([3.0, -2.0]))
        model.encoder.fcv.bias.fill_(-3)
        model.decoder.fc.weight.mul_(20)
    return model


def as_pixels(pictures: torch.Tensor) -> np.ndarray:
    """Images in [0, 1], [batch, channels, height, width], as a picture file has them."""
    return pictures.detach().movedim(1, -1).numpy() * 255


def read_tiles(png: bytes) -> np.ndarray:
    """The pictures in a grid, [count, height, width, channels]."""
    return tiles(np.asarray(Image.open(io.BytesIO(png)))).reshape(-1, 8, 8, 3).astype(float)


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


def test_the_look_shows_test_pairs(model, splits, tmp_path):
    with SummaryWriter(tmp_path) as writer:
        report.write_validation(writer, model, ELBOLoss(0.1), splits, epoch=9)
    ((step, png),) = read_events(tmp_path)["."]["test_pairs"]
    pairs = read_tiles(png).reshape(2, 2, 8, 8, 8, 3)
    assert step == 9
    shown = as_pixels(splits.test[:32:2][0]).reshape(2, 8, 8, 8, 3)
    assert np.abs(pairs[:, 0] - shown).max() <= 1


def test_the_look_shows_samples_of_the_training_pictures_latents_and_of_the_prior(
    model, splits, tmp_path
):
    with SummaryWriter(tmp_path) as writer:
        torch.manual_seed(3)
        report.write_validation(writer, model, ELBOLoss(0.1), splits, epoch=9)
    torch.manual_seed(3)
    evaluate(model, splits.val.batches(), ELBOLoss(0.1))
    latents = fit_latents(model, splits.train.batches())
    events = read_events(tmp_path)["."]
    samples = {
        "samples": model.decoder(latents.sample((16,))),
        "samples_prior": model.sample(16),
    }
    for tag, expected in samples.items():
        ((step, png),) = events[tag]
        assert step == 9
        # TensorBoard rounds down, by one step of grey at most.
        assert np.abs(read_tiles(png) - as_pixels(expected)).max() <= 1.01


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


def test_the_look_bears_latents_that_spread_far_in_few_directions(splits, tmp_path):
    torch.manual_seed(0)
    model = VAE((8, 8), 64, 3).eval()
    with torch.no_grad():
        model.encoder.fcm.weight.mul_(1e5)
        model.encoder.fcv.bias.fill_(-20)
    with SummaryWriter(tmp_path) as writer:
        report.write_validation(writer, model, ELBOLoss(0.1), splits, epoch=9)
    assert {"samples", "samples_prior"} < read_events(tmp_path)["."].keys()


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


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_the_metrics_are_of_the_whole_splits(run, again, split):
    metrics, expected = json.loads((run / "metrics.json").read_bytes())[split], again[split]
    assert metrics.keys() == expected.keys()
    for name in metrics:
        assert metrics[name] == pytest.approx(expected[name], rel=1e-4), name


def test_the_metrics_are_at_the_final_beta_and_not_at_the_last_epochs(run):
    metrics = json.loads((run / "metrics.json").read_bytes())
    assert read_events(run)["."]["schedule/beta"][-1] == (19, pytest.approx(0.01 * 19 / 20))
    for name in ("train", "val", "test"):
        losses = metrics[name]
        expected = losses["reconstruction_loss"] + 0.01 * losses["kl"]
        assert losses["total_loss"] == pytest.approx(expected, rel=1e-7)


def test_the_metrics_have_pca_with_as_many_components_as_latent_dimensions(run, again):
    metrics = json.loads((run / "metrics.json").read_bytes())
    assert metrics["pca"] == {"components": 2, "test": pytest.approx(again["pca"], rel=1e-4)}


def test_the_metrics_say_how_like_and_how_new_the_samples_are(run, again):
    samples = json.loads((run / "metrics.json").read_bytes())["samples"]
    assert samples.keys() == {"frechet", "nearest"}
    assert samples["frechet"].keys() == {"reconstructions", "fitted", "prior"}
    assert samples["nearest"].keys() == {"samples", "test", "train"}
    for name, values in samples.items():
        assert values == pytest.approx(again["samples"][name], rel=1e-4)


def test_the_metrics_say_what_was_run(run):
    metrics = json.loads((run / "metrics.json").read_bytes())
    model, config, _ = load_model(run / "checkpoint.pt")
    assert metrics["config"] == config
    assert (metrics["dataset"], metrics["epochs"], metrics["device"]) == ("synthetic", 20, "cpu")
    assert metrics["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert metrics["versions"] == {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    assert 0 < metrics["seconds"] < 600


def test_the_first_picture_has_pairs_of_test_pictures_and_their_reconstructions(run, again, splits):
    pairs = tiles(np.asarray(Image.open(run / "reconstructions.png")))
    assert np.array_equal(pairs[::2].reshape(32, 8, 8, 3), splits.test.pixels[:32])
    expected = as_pixels(again["reconstructions.png"])
    assert np.abs(pairs[1::2].reshape(32, 8, 8, 3) - expected).max() <= 0.51


@pytest.mark.parametrize("name", ["samples.png", "samples_prior.png"])
def test_the_other_pictures_have_64_samples_of_the_fitted_latents_and_of_the_prior(
    run, again, name
):
    samples = read_tiles((run / name).read_bytes())
    assert np.abs(samples - as_pixels(again[name])).max() <= 0.51
    assert len(np.unique(samples.reshape(64, -1), axis=0)) == 64


# The checkpoint at a run's end.


def test_the_checkpoint_has_the_latents_fitted_to_the_training_pictures(run, splits):
    model, _, latents = load_model(run / "checkpoint.pt")
    expected = fit_latents(model, splits.train.batches())
    assert latents.mean == pytest.approx(expected.mean, rel=1e-4)
    assert latents.covariance_matrix == pytest.approx(expected.covariance_matrix, rel=1e-4)


def test_the_checkpoint_keeps_the_model_that_was_trained(splits, tmp_path):
    model, _ = train(Options(**SMALL), splits, tmp_path, progress=False)
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pt")
    weights = model.state_dict()
    assert checkpoint["model"].keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in checkpoint["model"].items())
    assert checkpoint["epoch"] == 3


# TensorBoard's tags.


def test_the_scalars_tags_begin_with_the_posts_loss(run):
    events = read_events(run)
    for name in LOSSES:
        assert [*events.pop(f"loss_{name}")] == ["loss"]
    assert [*events] == ["."]
    scalars = [tag for tag, points in events["."].items() if not isinstance(points[0][1], bytes)]
    expected = [
        "schedule/beta",
        *(f"test/{name}" for name in sorted(COMPARED)),
        *(f"validation/{name}" for name in sorted(COMPARED)),
    ]
    assert sorted(scalars) == expected
    assert expected[0] > "loss"  # TensorBoard sorts them


def test_the_images_tags_begin_with_the_posts_originals_and_reconstructions(run):
    events = read_events(run)["."]
    images = {tag: points for tag, points in events.items() if isinstance(points[0][1], bytes)}
    expected = ["originals", "reconstructions", "samples", "samples_prior", "test_pairs"]
    assert sorted(images) == expected  # as TensorBoard sorts them
    for tag, points in images.items():
        often = tag in expected[:2]
        assert [step for step, _ in points] == ([*range(20)] if often else [9, 19]), tag


# What TensorBoard compares.


def test_hparams_hold_the_experiment_and_the_scores_of_the_test_split(run):
    reader = EventAccumulator(str(run)).Reload()
    content = reader.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    start = HParamsPluginData.FromString(content).session_start_info
    shown = {
        name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()
    }
    assert shown.pop("dataset") == "synthetic"
    experiment = {**SMALL, **RUN, "batch_norm": False}
    assert shown.items() >= experiment.items()
    assert not shown.keys() & {"log_dir", "data_root", "run_name", "checkpoint_every"}
    assert set(shown) < set(Options.__dataclass_fields__)

    metrics = json.loads((run / "metrics.json").read_bytes())
    for name in COMPARED:
        ((_, score),) = read_events(run)["."][f"test/{name}"]
        assert score == pytest.approx(metrics["test"][name])
        for other in ("train", "val"):
            assert score != pytest.approx(metrics[other][name]) or name == "active_units"


@pytest.mark.parametrize("dataset", SPECIES)
def test_the_projector_shows_each_test_picture_with_its_own_species(tmp_path, dataset):
    splits = make_splits(test=34)._replace(dataset=dataset)
    splits.test.labels[:] = torch.arange(34).flip(0) * 3
    train_small(tmp_path, splits, epochs=1)
    folder = tmp_path / "00001" / "test_latents"  # of the model after one epoch
    species = (folder / "metadata.tsv").read_text().splitlines()
    assert species == [SPECIES[dataset][label] for label in splits.test.labels.tolist()]
    assert species[-1] == {"flowers102": "pink primrose", "synthetic": "0"}[dataset]
    model, *_ = load_model(tmp_path / "checkpoint.pt")
    with torch.no_grad():
        means, _ = model.encoder(splits.test[:][0])
    latents = np.loadtxt(folder / "tensors.tsv", delimiter="\t")
    assert latents == pytest.approx(means.numpy(), abs=1e-5)
    sprite = np.asarray(Image.open(folder / "sprite.png"))
    thumbnails = sprite.reshape(6, 8, 6, 8, 3).swapaxes(1, 2).reshape(36, 8, 8, 3)[:34]
    assert np.abs(thumbnails - splits.test.pixels.numpy().astype(int)).max() <= 1


def test_the_projector_shows_five_hundred_pictures_of_all_species_at_most(model, tmp_path):
    splits = make_splits(test=2500)
    with SummaryWriter(tmp_path) as writer, torch.no_grad():
        report.write_latents(writer, model, splits, epoch=3)
    species = (tmp_path / "00003" / "test_latents" / "metadata.tsv").read_text().split()
    assert species == [str(label % 102) for label in range(0, 2500, 5)]


# The last words.


def test_the_summary_says_how_good_the_model_is_and_where_to_look():
    metrics = {
        "test": {
            **{"squared_error": 81.26, "squared_error_mean": 75.04, "psnr": 16.25, "kl": 12.34},
            "active_units": 9,
        },
        **{"pca": {"components": 10, "test": 90.0}, "epochs": 500, "seconds": 65.4},
        "samples": {"frechet": {"reconstructions": 7.24, "fitted": 9.46, "prior": 18.05}},
    }
    assert report.summary(metrics, Path("my runs/first")) == (
        "Test pictures: squared error 81.3 per image (75.0 through the mean, PSNR 16.2 dB), "
        "KL 12.3 nats, 9 active latent dimensions.\n"
        "PCA with 10 components: 90.0; the model is 8.7 better.\n"
        "Fréchet distance of new flowers to the test pictures (lower is better): drawn from the "
        "fitted latents 9.5, from the prior 18.1; reconstructions have 7.2.\n"
        "500 epochs in 65 s. Pictures, metrics and the model are in my runs/first\n"
        "Look at the run with: tensorboard --logdir 'my runs'"
    )
    metrics["pca"]["test"] = 80.0
    assert "the model is 1.3 worse.\n" in report.summary(metrics, Path("my runs/first"))
