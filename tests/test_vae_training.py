import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_splits
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import IMAGES, SCALARS, EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import vae_training
from datasets.pictures import Splits
from vae.checkpoint import load_checkpoint, load_model, save_checkpoint
from vae.losses import ELBOLoss
from vae_training import Options, StoppedError, Training, main, train

ROOT = Path(__file__).parents[1]
LOSSES = ("KL Loss", "Reconstruction Loss", "Total Loss")
# With 20 training pictures, an epoch has three steps, the last one on 4 pictures.
SMALL = {"image_size": 8, "latent_size": 2, "batch_size": 8, "epochs": 3, "device": "cpu"}
EVERYTHING = {
    **{"batch_norm": True, "augment": True, "likelihood": "sigma"},
    **{"beta_schedule": "linear", "warmup_epochs": 2, "lr_schedule": "cosine"},
}


def train_small(
    folder: Path, splits: Splits, checkpoint: dict | None = None, **changes: Any
) -> dict[str, Any]:
    """Train on small splits and return the metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    options = Options(**SMALL | changes)
    _, metrics = train(options, splits, folder, checkpoint, progress=False)
    return metrics


def read_events(folder: Path, keep: Sequence[str] = (SCALARS, IMAGES)) -> dict[str, dict[str, Any]]:
    """Return what TensorBoard shows of each sub-run: {sub-run: {tag: [(step, value), ...]}}."""
    events = {}
    for run in sorted({path.parent for path in folder.rglob("events.out.tfevents.*")}):
        reader = EventAccumulator(
            str(run), size_guidance=dict.fromkeys(keep, 0), purge_orphaned_data=False
        ).Reload()
        scalars = {
            tag: [(event.step, event.value) for event in reader.Scalars(tag)]
            for tag in reader.Tags()[SCALARS]
        }
        images = {
            tag: [(event.step, event.encoded_image_string) for event in reader.Images(tag)]
            for tag in reader.Tags()[IMAGES]
        }
        events[str(run.relative_to(folder))] = scalars | images
    return events


def assert_same_weights(folder: Path, other: Path) -> None:
    one, two = (load_checkpoint(run / "checkpoint.pt") for run in (folder, other))
    assert one["model"].keys() == two["model"].keys()
    for name, value in one["model"].items():
        assert torch.equal(value, two["model"][name]), name


def assert_same_run(folder: Path, other: Path) -> None:
    """Weights, TensorBoard points, metrics and pictures are the same to the bit."""
    assert_same_weights(folder, other)
    assert read_events(folder) == read_events(other)
    metrics, others = (json.loads((run / "metrics.json").read_bytes()) for run in (folder, other))
    changing = {"seconds": None, "config": None}
    assert metrics | changing == others | changing
    for name in ("reconstructions.png", "samples.png"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()


@contextmanager
def interruption(step: int, *numbers: int) -> Iterator[None]:
    """Send this process signals while it computes the loss of a step, counted from 1."""
    steps = 0

    class InterruptedLoss(ELBOLoss):
        def forward(self, *arguments):
            nonlocal steps
            steps += 1
            for number in numbers if steps == step else ():
                os.kill(os.getpid(), number)
            return super().forward(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae_training, "ELBOLoss", InterruptedLoss)
        yield


def tiles(grid: np.ndarray, size: int = 8) -> np.ndarray:
    """Cut a grid of pictures with frames of 2 pixels: [rows, columns, size, size, 3]."""
    rows, columns = ((side - 2) // (size + 2) for side in grid.shape[:2])
    grid = grid[2:, 2:].reshape(rows, size + 2, columns, size + 2, 3)
    return grid.swapaxes(1, 2)[:, :, :size, :size]


@pytest.fixture(scope="module")
def run(tmp_path_factory, splits) -> Path:
    """The folder of a small run of three epochs."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train_small(folder, splits)
    return folder


@pytest.fixture
def command(data_root, tmp_path) -> list[str]:
    """The arguments of a run on the small Flowers102."""
    folders = ["--data-root", str(data_root), "--log-dir", str(tmp_path / "runs")]
    small = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    return [*folders, *small, "--epochs=2", "--run-name=run"]


@pytest.fixture
def refused(capsys):
    """Run a command line that has to be refused, and return its one line."""

    def refuse(arguments: list[str]) -> str:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        *others, line = capsys.readouterr().err.splitlines()
        assert not [other for other in others if "Traceback" in other or ": error: " in other]
        assert re.match(r"\S+: error: ", line)
        return line

    return refuse


# The post's experiment.


def test_the_defaults_are_the_posts():
    options = Options()
    assert (options.image_size, options.latent_size, options.beta) == (32, 10, 0.1)
    assert (options.learning_rate, options.batch_size, options.epochs) == (1e-4, 64, 500)
    assert (options.likelihood, options.beta_schedule, options.lr_schedule) == (
        "gaussian",
        "constant",
        "constant",
    )
    assert (options.batch_norm, options.augment, options.seed) == (False, False, 0)
    assert vae_training.PRESETS["post"] == {}


def test_training_is_the_posts_loop(run, splits):
    training = Training(Options(**SMALL), splits)
    model, loss = training.model, ELBOLoss(beta=0.1)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-4)
    losses = []
    for _ in range(3):
        for x, _ in training.loader:
            optimiser.zero_grad()
            reconstruction, mean, log_var = model(x, training.noise)
            _, *values = loss(x, reconstruction, mean, log_var)
            values[-1].backward()
            optimiser.step()
            losses.append([value.item() for value in values])
    events = read_events(run)
    for name, column in zip(LOSSES, zip(*losses, strict=True), strict=True):
        _, seen = zip(*events[f"loss_{name}"]["loss"], strict=True)
        assert seen == pytest.approx(column, rel=1e-5)


def test_every_batch_of_an_epoch_is_another_one_and_epochs_differ(splits):
    training = Training(Options(**SMALL), splits)
    epochs = []
    for _ in range(2):
        epochs.append(torch.cat(list(training.batches())))
        training.end_epoch()
    in_order = splits.train[:][0].flatten(1)
    for epoch in epochs:
        # Each of the 20 pictures is there once: distances of 0 form a permutation.
        same = torch.cdist(epoch.flatten(1), in_order) < 1e-3
        assert same.sum(dim=0).tolist() == same.sum(dim=1).tolist() == [1] * 20
    assert not torch.equal(*epochs)


def test_training_leaves_the_global_random_state_alone(splits, tmp_path):
    before = torch.get_rng_state()
    train_small(tmp_path, splits, epochs=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_same_seed_repeats_a_run_bit_for_bit(run, splits, tmp_path):
    torch.rand(7)  # whatever else the process draws
    train_small(tmp_path, splits)
    assert_same_run(tmp_path, run)


def test_another_seed_gives_another_run(run, splits, tmp_path):
    train_small(tmp_path, splits, seed=1)
    one, other = (read_events(folder)["loss_Total Loss"]["loss"] for folder in (run, tmp_path))
    assert all(a != b for a, b in zip(one, other, strict=True))


def test_the_trained_model_and_its_metrics_are_returned(splits, tmp_path):
    model, metrics = train(Options(**SMALL), splits, tmp_path, progress=False)
    saved, _ = load_model(tmp_path / "checkpoint.pt")
    images = splits.test[:][0]
    assert not model.training
    assert torch.equal(model.reconstruct(images), saved.reconstruct(images))
    assert metrics == json.loads((tmp_path / "metrics.json").read_bytes())


@pytest.mark.parametrize(
    "changes", [{"batch_size": 1000}, {"latent_size": 1}, {"latent_size": 512}, EVERYTHING]
)
def test_unusual_sizes_and_all_options_train(splits, tmp_path, changes):
    metrics = train_small(tmp_path, splits, **{"epochs": 2} | changes)
    assert np.isfinite(metrics["test"]["total_loss"])


def test_pictures_of_256_pixels_train(tmp_path):
    splits = make_splits(train=3, val=1, test=5, size=256)
    metrics = train_small(tmp_path, splits, epochs=1, image_size=256)
    assert np.isfinite(metrics["test"]["total_loss"])


def test_a_last_batch_of_one_picture_trains_with_batch_norm(tmp_path):
    metrics = train_small(tmp_path, make_splits(train=9), epochs=1, batch_norm=True)
    assert np.isfinite(metrics["test"]["total_loss"])


def test_schedules_reach_the_optimiser_and_the_loss(splits):
    training = Training(Options(**SMALL | EVERYTHING), splits)
    rates, betas = [], []
    for step in range(9):
        training.epoch, training.batch = divmod(step, 3)
        training.follow_schedules()
        rates.append(training.optimiser.param_groups[0]["lr"])
        betas.append(training.loss.beta)
    assert rates == pytest.approx([5e-5 * (1 + np.cos(np.pi * step / 9)) for step in range(9)])
    assert betas == pytest.approx([0.1 * min(1, step / 6) for step in range(9)])


def test_pictures_of_another_size_than_the_models_are_refused(splits, tmp_path):
    with pytest.raises(ValueError, match="pictures are 8x8, --image-size is 16"):
        train_small(tmp_path, splits, image_size=16)


# TensorBoard.


def test_each_loss_has_a_point_for_every_batch_under_the_posts_tag(run):
    events = read_events(run)
    for name in LOSSES:
        assert list(events[f"loss_{name}"]) == ["loss"]
        assert [step for step, _ in events[f"loss_{name}"]["loss"]] == list(range(9))
    assert {name for name in events if name.startswith("loss")} == {f"loss_{n}" for n in LOSSES}


def test_the_total_loss_is_the_sum_of_the_two_others(run):
    events = read_events(run)
    kl, reconstruction, total = (
        np.array([value for _, value in events[f"loss_{name}"]["loss"]]) for name in LOSSES
    )
    assert total == pytest.approx(0.1 * kl + reconstruction, rel=1e-6)


def test_every_epoch_shows_five_test_pictures_and_their_reconstructions(run, splits):
    events, pixels = read_events(run)["."], splits.test.pixels.numpy().astype(int)
    for tag in ("originals", "reconstructions"):
        assert [step for step, _ in events[tag]] == [0, 1, 2]
    shown = []
    for (_, originals), (_, reconstructions) in zip(
        events["originals"], events["reconstructions"], strict=True
    ):
        assert Image.open(io.BytesIO(reconstructions)).size == (5 * 10 + 2, 12)
        (row,) = tiles(np.asarray(Image.open(io.BytesIO(originals))))
        # TensorBoard rounds down, by one step of grey at most.
        same = (np.abs(row[:, None] - pixels) <= 1).all(axis=(2, 3, 4))
        shown += [int(index) for index in np.nonzero(same)[1]]
    assert len(shown) == len(set(shown)) == 15


def test_test_pictures_come_each_once_and_then_again_without_end():
    training = Training(Options(**SMALL), make_splits(test=7))
    batches = list(islice(vae_training.test_pictures(training), 6))
    assert [len(batch) for batch in batches] == [5, 2] * 3
    everything = training.splits.test[:][0].flatten(1)
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        same = torch.cdist(torch.cat((first, second)).flatten(1), everything) < 1e-3
        assert same.sum(dim=0).tolist() == [1] * 7


def test_more_epochs_than_test_batches_train(tmp_path):
    train_small(tmp_path, make_splits(test=7), epochs=5)
    assert [step for step, _ in read_events(tmp_path)["."]["originals"]] == [0, 1, 2, 3, 4]


def test_test_pictures_record_no_gradients(splits, tmp_path):
    training, outputs = Training(Options(**SMALL), splits), []
    training.model.register_forward_hook(lambda _, __, output: outputs.append(output[0]))
    with SummaryWriter(tmp_path) as writer:
        vae_training.write_test_batch(writer, training, splits.test[:5][0])
        vae_training.write_evaluation(writer, training)
    assert len(outputs) >= 3
    assert not any(output.requires_grad for output in outputs)


def test_looking_at_the_model_draws_nothing_from_the_training_and_changes_no_weight(
    splits, tmp_path
):
    training = Training(Options(**SMALL | EVERYTHING), splits)
    state = {name: value.clone() for name, value in training.model.state_dict().items()}
    noise, shuffle = training.noise.get_state(), training.shuffle.get_state()
    with SummaryWriter(tmp_path) as writer:
        vae_training.write_test_batch(writer, training, splits.test[:5][0])
        vae_training.write_evaluation(writer, training)
        vae_training.write_results(writer, training, tmp_path)
    assert torch.equal(training.noise.get_state(), noise)
    assert torch.equal(training.shuffle.get_state(), shuffle)
    for name, value in training.model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_the_validation_split_is_looked_at_every_ten_epochs(splits, tmp_path):
    train_small(tmp_path, splits, epochs=20, batch_size=20)
    events = read_events(tmp_path)["."]
    for name in ("squared_error", "squared_error_mean", "psnr", "kl", "active_units"):
        assert [step for step, _ in events[f"validation/{name}"]] == [10, 20]
    assert [step for step, _ in events["samples"]] == [10, 20]


# What a run leaves.


def test_a_run_leaves_checkpoints_metrics_pictures_and_events(run):
    names = {path.name for path in run.iterdir() if "tfevents" not in path.name}
    assert names >= {
        *("checkpoint.pt", "checkpoint.previous.pt", "metrics.json"),
        *("reconstructions.png", "samples.png"),
        *(f"loss_{name}" for name in LOSSES),
    }
    assert not [name for name in names if "tmp" in name or name.startswith(".checkpoint")]


def test_the_checkpoint_holds_model_config_and_position(run):
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    assert (checkpoint["epoch"], checkpoint["batch"]) == (3, 0)
    assert checkpoint["config"]["image_resolution"] == [8, 8]
    assert checkpoint["config"]["image_channels"] == 3
    for each in fields(Options):
        expected = SMALL.get(each.name, each.default)
        if each.name != "dataset":
            assert checkpoint["config"][each.name] == expected
    assert checkpoint["config"]["dataset"] == "synthetic"


def test_the_metrics_are_of_the_whole_splits(run, splits):
    metrics = json.loads((run / "metrics.json").read_bytes())
    model, _ = load_model(run / "checkpoint.pt")
    for name in ("train", "val", "test"):
        images = getattr(splits, name)[:][0]
        squared_error = (images - model.reconstruct(images)).square().sum().item() / len(images)
        assert metrics[name]["squared_error_mean"] == pytest.approx(squared_error, rel=1e-4)
        mean, log_var = model.encode(images)
        kl = ELBOLoss(1).kl_loss(mean, log_var).item()
        assert metrics[name]["kl"] == pytest.approx(kl, rel=1e-3)


def test_the_metrics_say_what_was_run(run):
    metrics = json.loads((run / "metrics.json").read_bytes())
    model, config = load_model(run / "checkpoint.pt")
    assert metrics["config"] == config
    assert metrics["dataset"] == "synthetic"
    assert metrics["epochs"] == 3
    assert metrics["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert metrics["pca"]["components"] == 2
    assert metrics["versions"]["torch"] == torch.__version__
    assert 0 < metrics["seconds"] < 600
    assert metrics["device"] == "cpu"


def test_odd_rows_are_test_pictures_and_even_rows_their_reconstructions(run, splits):
    grid = tiles(np.asarray(Image.open(run / "reconstructions.png")))
    assert grid.shape[:2] == (8, 8)
    pixels = splits.test.pixels.numpy()
    originals = grid[::2].reshape(32, 8, 8, 3)
    assert np.array_equal(originals, pixels[: len(originals)])
    model, _ = load_model(run / "checkpoint.pt")
    with torch.no_grad():
        through_mean = model.reconstruct(splits.test[:32][0]).movedim(1, -1).numpy() * 255
    # The pictures' z is sampled, so they are near to those through the mean and not the same.
    reconstructions = grid[1::2].reshape(32, 8, 8, 3)
    assert np.abs(reconstructions - through_mean).mean() < 15


def test_samples_are_64_pictures(run):
    assert tiles(np.asarray(Image.open(run / "samples.png"))).shape[:2] == (8, 8)


# The command line.


def test_a_command_trains_and_prints_the_posts_line_for_each_epoch(command, tmp_path, capsys):
    assert main(command) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Epoch")]
    events = read_events(tmp_path / "runs" / "run")
    kl, reconstruction, total = (
        [value for _, value in events[f"loss_{name}"]["loss"]][2::3] for name in LOSSES
    )
    assert lines == [
        f"Epoch: {epoch}, Reconstruction Loss: {reconstruction[epoch]:.2f}, "
        f"KL Loss: {kl[epoch]:.2f}, Total Loss: {total[epoch]:.2f}"
        for epoch in range(2)
    ]


def test_a_command_ends_with_the_result_and_how_to_look_at_it(command, tmp_path, capsys):
    main(command)
    output = capsys.readouterr().out
    metrics = json.loads((tmp_path / "runs" / "run" / "metrics.json").read_bytes())
    assert f"squared error {metrics['test']['squared_error']:.1f} per image" in output
    assert f"PCA with 2 components: {metrics['pca']['test']:.1f}" in output
    assert f"tensorboard --logdir {tmp_path / 'runs'}" in output
    assert metrics["dataset"] == "flowers102"


def test_every_option_of_a_command_reaches_the_run(command, tmp_path):
    values = EVERYTHING | {"beta": 0.2, "learning_rate": 1e-3, "seed": 3, "checkpoint_every": 1}
    flags = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in values.items()
    ]
    assert main([*command, *flags]) == 0
    _, config = load_model(tmp_path / "runs" / "run" / "checkpoint.pt")
    assert {name: config[name] for name in values} == values


def test_a_run_is_named_by_date_and_time_if_not_otherwise(command, tmp_path):
    main([argument for argument in command if "--run-name" not in argument])
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", folder.name)


def test_help_shows_every_option_in_its_group_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for each in fields(Options):
        assert f"--{each.name.replace('_', '-')}" in text
        assert each.default == "" or f"(default: {each.default})" in text
    for group in ("model", "loss", "training", "data", "output"):
        assert f" {group}: --" in text


@pytest.mark.parametrize("preset", vae_training.PRESETS)
def test_a_preset_sets_options_which_the_command_can_change(command, tmp_path, preset):
    assert main([*command, "--preset", preset, "--beta", "0.7"]) == 0
    _, config = load_model(tmp_path / "runs" / "run" / "checkpoint.pt")
    given = {**SMALL, "epochs": 2, "beta": 0.7}
    for name, value in (vae_training.PRESETS[preset] | given).items():
        assert config[name] == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--image-size 0", "--image-size is 0: a multiple of 8 is needed"),
        ("--image-size 30", "--image-size is 30: a multiple of 8 is needed"),
        ("--image-size -8", "--image-size is -8: a multiple of 8 is needed"),
        ("--image-size 32.0", "--image-size: invalid int value: '32.0'"),
        ("--latent-size 0", "--latent-size is 0: 1 to 1000000 is needed"),
        ("--epochs 0", "--epochs is 0: 1 to 1000000 is needed"),
        ("--epochs -3", "--epochs is -3: 1 to 1000000 is needed"),
        ("--epochs many", "--epochs: invalid int value: 'many'"),
        ("--epochs", "--epochs: expected one argument"),
        ("--batch-size 0", "--batch-size is 0: 1 to 1000000 is needed"),
        ("--checkpoint-every 0", "--checkpoint-every is 0: 1 to 1000000 is needed"),
        ("--cycles 0", "--cycles is 0: 1 to 1000000 is needed"),
        ("--learning-rate 0", "--learning-rate is 0.0: a number above 0 is needed"),
        ("--learning-rate nan", "--learning-rate is nan: a number above 0 is needed"),
        ("--learning-rate inf", "--learning-rate is inf: a number above 0 is needed"),
        ("--beta -1", "--beta is -1.0: a number of at least 0 is needed"),
        ("--beta nan", "--beta is nan: a number of at least 0 is needed"),
        ("--seed -1", "--seed is -1: 0 to 2**32 - 1 is needed"),
        ("--seed 4294967296", "--seed is 4294967296: 0 to 2**32 - 1 is needed"),
        ("--likelihood poisson", "invalid choice: 'poisson'"),
        ("--beta-schedule square", "invalid choice: 'square'"),
        ("--lr-schedule step", "invalid choice: 'step'"),
        ("--dataset mnist", "invalid choice: 'mnist'"),
        ("--preset worst", "invalid choice: 'worst'"),
        ("--beta-schedule linear --warmup-epochs 2", "--warmup-epochs is 2: 0 to 1 (--epochs)"),
        ("--beta-schedule linear --warmup-epochs -1", "--warmup-epochs is -1: 0 to 1 (--epochs)"),
        ("--device toaster", "device toaster is not to be had here"),
        ("--device cuda:99", "device cuda:99 is not to be had here"),
        ("--device meta", "device meta is not to be had here"),
        ("--run-name ../elsewhere", "--run-name is '../elsewhere': letters, digits"),
        ("--run-name a/b", "--run-name is 'a/b': letters, digits"),
        ("--run-name .hidden", "--run-name is '.hidden': letters, digits"),
        ("--run-name 'two words'", "--run-name is 'two words': letters, digits"),
        ("--epoch 3", "unrecognized arguments: --epoch 3"),
        ("--what", "unrecognized arguments: --what"),
        ("flowers", "unrecognized arguments: flowers"),
        ("--resume nowhere", "nowhere/checkpoint.pt does not exist"),
    ],
)
def test_a_bad_option_is_refused_in_one_line_before_any_work(
    refused, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    small = shlex.split("--log-dir runs --data-root data --dataset synthetic --image-size 8")
    assert message in refused([*small, "--epochs=1", *shlex.split(arguments)])
    assert not list(tmp_path.iterdir())


def test_options_from_python_are_checked_as_well():
    with pytest.raises(ValueError, match="--epochs is 0"):
        Options(epochs=0)
    with pytest.raises(ValueError, match="--likelihood is 'poisson': choose from gaussian"):
        Options(likelihood="poisson")


def test_a_run_name_that_exists_is_refused_and_its_run_left_as_it_is(
    command, refused, tmp_path, monkeypatch
):
    main(command)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
    line = refused(command)
    assert "run exists already: give another --run-name, --resume run" in line
    assert "--overwrite" in line
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}


def test_overwrite_replaces_a_run_whole(command, tmp_path):
    main(command)
    folder = tmp_path / "runs" / "run"
    (folder / "notes.txt").write_text("of the first run")
    assert main([*command, "--overwrite", "--epochs=1"]) == 0
    assert not (folder / "notes.txt").exists()
    assert len(read_events(folder)["loss_Total Loss"]["loss"]) == 3


def test_overwrite_does_not_replace_a_folder_that_is_no_run(command, refused, tmp_path):
    precious = tmp_path / "runs" / "run" / "precious.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("not a run")
    assert "is not a run (no checkpoint.pt in it)" in refused([*command, "--overwrite"])
    assert precious.read_text() == "not a run"


def test_a_log_folder_that_cannot_be_made_is_refused(command, refused, tmp_path):
    (tmp_path / "runs").write_text("a file where the folder should be")
    assert "runs" in refused(command)


def test_damaged_pictures_are_named_and_no_run_begins(command, refused, data_root, tmp_path):
    picture = data_root / "flowers-102" / "jpg" / "image_00008.jpg"
    picture.write_bytes(b"")
    assert f"{picture} cannot be read as a picture" in refused(command)
    assert not (tmp_path / "runs").exists()


# Where Flowers102 cannot be reached.


def test_auto_falls_back_loudly_at_the_start_and_in_the_last_line(
    command, no_server, tmp_path, capsys
):
    (tmp_path / "empty").mkdir()
    assert main([*command, "--data-root", str(tmp_path / "empty")]) == 0
    out, err = capsys.readouterr()
    assert "warning: Flowers102 is not in" in err
    assert "SYNTHETIC flowers, not on photographs" in err
    assert "SYNTHETIC flowers, not on photographs" in out.splitlines()[-1]
    folder = tmp_path / "runs" / "run-synthetic"
    metrics = json.loads((folder / "metrics.json").read_bytes())
    assert metrics["dataset"] == metrics["config"]["dataset"] == "synthetic"
    assert load_checkpoint(folder / "checkpoint.pt")["config"]["dataset"] == "synthetic"


def test_flowers102_is_refused_instead_and_nothing_created(command, refused, no_server, tmp_path):
    arguments = ["--dataset", "flowers102", "--data-root", str(tmp_path / "empty")]
    line = refused([*command, *arguments])
    assert str(tmp_path / "empty" / "flowers-102") in line
    assert "--dataset synthetic" in line
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "empty").exists()


# Runs that diverge.


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli", "sigma"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_diverging_run_stops_with_epoch_and_batch_and_keeps_what_was_good(
    command, tmp_path, capsys, likelihood, batch_norm
):
    options = ["--learning-rate=1e30", f"--likelihood={likelihood}", "--checkpoint-every=1"]
    assert main([*command, *options, *["--batch-norm"] * batch_norm]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert re.search(r"epoch \d, batch \d", line)
    folder = tmp_path / "runs" / "run"
    assert str(folder) in line
    load_model(folder / "checkpoint.pt")  # refuses weights that are not finite
    assert not (folder / "metrics.json").exists()


def test_pictures_that_cannot_be_reconstructed_finitely_stop_at_the_first_bad_batch(
    splits, tmp_path
):
    with pytest.raises(FloatingPointError, match="the loss is nan in epoch 0, batch 1"):
        train_small(tmp_path, splits, learning_rate=1e30)
    assert [step for step, _ in read_events(tmp_path)["loss_Total Loss"]["loss"]] == [0]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_weights_that_the_last_step_of_all_made_infinite_are_not_saved(splits, tmp_path):
    with pytest.raises(FloatingPointError, match="a weight is no longer finite after epoch 0"):
        train_small(tmp_path, splits, learning_rate=1e300, batch_size=1000, epochs=1)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == 0
    load_model(tmp_path / "checkpoint.pt")


# Interrupted and resumed.


@pytest.fixture
def _evaluate_every_epoch(monkeypatch) -> None:
    monkeypatch.setattr(vae_training, "EVALUATE_EVERY", 1)


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory, splits) -> dict[bool, Path]:
    """Runs that nothing interrupted, without and with everything that has a state."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae_training, "EVALUATE_EVERY", 1)
        train_small(folder / "False", splits)
        train_small(folder / "True", splits, **EVERYTHING)
    return {False: folder / "False", True: folder / "True"}


@pytest.mark.usefixtures("_evaluate_every_epoch")
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize(
    ("step", "number"),
    [(1, signal.SIGINT), (3, signal.SIGTERM), (5, signal.SIGINT), (9, signal.SIGTERM)],
)
def test_a_run_stopped_at_any_step_ends_as_if_it_had_not_been(
    whole_runs, splits, tmp_path, step, number, everything
):
    changes = EVERYTHING if everything else {}
    with interruption(step, number), pytest.raises(StoppedError) as stopped:
        train_small(tmp_path, splits, **changes)
    assert stopped.value.exit_status == 128 + number
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pt")
    assert (checkpoint["epoch"], checkpoint["batch"]) == divmod(step, 3)
    train_small(tmp_path, splits, checkpoint, **changes)
    assert_same_run(tmp_path, whole_runs[everything])


@pytest.mark.usefixtures("_evaluate_every_epoch")
def test_a_run_stopped_again_and_again_ends_as_if_it_had_not_been(whole_runs, splits, tmp_path):
    checkpoint = None
    for _ in range(4):
        with interruption(2, signal.SIGINT), pytest.raises(StoppedError):
            train_small(tmp_path, splits, checkpoint, **EVERYTHING)
        checkpoint = load_checkpoint(tmp_path / "checkpoint.pt")
    train_small(tmp_path, splits, checkpoint, **EVERYTHING)
    assert_same_run(tmp_path, whole_runs[True])


@pytest.mark.usefixtures("_evaluate_every_epoch")
def test_a_run_that_died_goes_on_from_its_last_checkpoint_without_a_double_step(
    whole_runs, splits, tmp_path
):
    # The second signal kills at once: what the run wrote since epoch 2 has to be undone.
    with interruption(8, signal.SIGINT, signal.SIGINT), pytest.raises(KeyboardInterrupt):
        train_small(tmp_path, splits, checkpoint_every=2)
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pt")
    assert (checkpoint["epoch"], checkpoint["batch"]) == (2, 0)
    train_small(tmp_path, splits, checkpoint, checkpoint_every=2)
    assert_same_run(tmp_path, whole_runs[False])


def test_a_signal_stops_after_its_step_with_a_checkpoint_and_whole_events(splits, tmp_path):
    with interruption(5, signal.SIGINT), pytest.raises(StoppedError):
        train_small(tmp_path, splits)
    events = read_events(tmp_path)
    for name in LOSSES:
        assert [step for step, _ in events[f"loss_{name}"]["loss"]] == [0, 1, 2, 3, 4]


def test_a_second_sigint_stops_at_once(splits, tmp_path):
    with interruption(2, signal.SIGINT, signal.SIGINT), pytest.raises(KeyboardInterrupt):
        train_small(tmp_path, splits)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == 0


def test_signals_are_given_back_after_a_run(splits, tmp_path):
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    with interruption(1, signal.SIGTERM), pytest.raises(StoppedError):
        train_small(tmp_path, splits)
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_prints_the_command_that_goes_on(
    command, tmp_path, capsys, number, status
):
    with interruption(2, number):
        assert main(command) == status
    folder = tmp_path / "runs" / "run"
    *_, line = capsys.readouterr().out.splitlines()
    assert shlex.split(line)[0] == sys.executable
    assert shlex.split(line)[2:] == ["--resume", str(folder)]
    assert main(shlex.split(line)[2:]) == 0
    assert main([*command, "--run-name=whole"]) == 0
    assert_same_run(folder, tmp_path / "runs" / "whole")


@pytest.mark.parametrize("where", ["run", "{runs}/run"])
def test_a_run_is_resumed_by_its_name_or_its_path(command, tmp_path, where):
    with interruption(2, signal.SIGINT):
        main(command)
    where = where.format(runs=tmp_path / "runs")
    assert main(["--log-dir", str(tmp_path / "runs"), "--resume", where]) == 0
    assert load_checkpoint(tmp_path / "runs" / "run" / "checkpoint.pt")["epoch"] == 2


def resume(tmp_path: Path, *arguments: str) -> list[str]:
    return ["--log-dir", str(tmp_path / "runs"), "--resume", "run", *arguments]


def test_a_finished_run_may_grow_by_epochs_and_is_then_the_longer_run(command, tmp_path):
    main(command)
    assert main(resume(tmp_path, "--epochs=4")) == 0
    main([*command, "--epochs=4", "--run-name=longer"])
    assert_same_run(tmp_path / "runs" / "run", tmp_path / "runs" / "longer")


def test_resuming_a_finished_run_changes_nothing(command, tmp_path):
    main(command)
    main([*command, "--run-name=again"])
    assert main(resume(tmp_path)) == 0
    assert_same_run(tmp_path / "runs" / "run", tmp_path / "runs" / "again")


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        (["--beta=1"], "--beta 1.0 (the run has 0.1)"),
        (["--learning-rate=0.1"], "--learning-rate 0.1 (the run has 0.0001)"),
        (["--seed=1"], "--seed 1 (the run has 0)"),
        (["--image-size=16"], "--image-size 16 (the run has 8)"),
        (["--epochs=1"], "--epochs 1 (the run has 2)"),
        (["--batch-norm"], "--batch-norm True (the run has False)"),
        (["--dataset=synthetic"], "--dataset synthetic (the run has flowers102)"),
        (["--lr-schedule=cosine", "--epochs=3"], "--lr-schedule cosine (the run has constant)"),
    ],
)
def test_a_resumed_run_refuses_to_become_another_experiment(
    command, refused, tmp_path, arguments, difference
):
    main(command)
    before = (tmp_path / "runs" / "run" / "checkpoint.pt").read_bytes()
    assert difference in refused(resume(tmp_path, *arguments))
    assert (tmp_path / "runs" / "run" / "checkpoint.pt").read_bytes() == before


def test_options_that_stay_the_same_may_be_repeated(command, tmp_path):
    with interruption(2, signal.SIGINT):
        main([*command, "--beta=0.3"])
    assert main(resume(tmp_path, "--beta=0.3", "--seed=0", "--checkpoint-every=1")) == 0


@pytest.mark.parametrize("schedule", ["--lr-schedule=cosine", "--beta-schedule=cyclical"])
def test_epochs_may_not_grow_under_a_schedule_that_depends_on_them(
    command, refused, tmp_path, schedule
):
    main([*command, schedule])
    assert "--epochs 3 (the run has 2)" in refused(resume(tmp_path, "--epochs=3"))


def test_a_resumed_run_refuses_other_pictures(command, refused, data_root, tmp_path):
    main(command)
    jpg = data_root / "flowers-102" / "jpg"
    for number in range(1, 61):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(jpg / f"image_{number:05d}.jpg")
    assert "from training on other pictures" in refused(resume(tmp_path, "--epochs=3"))


# Damage.


def damage_truncated(checkpoint: Path) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])


def damage_empty(checkpoint: Path) -> None:
    checkpoint.write_bytes(b"")


def damage_missing(checkpoint: Path) -> None:
    checkpoint.unlink()


def damage_in_a_weight(checkpoint: Path) -> None:
    content = bytearray(checkpoint.read_bytes())
    weights = load_checkpoint(checkpoint)["model"]["encoder.fcm.weight"].numpy().tobytes()
    content[content.index(weights) + 40] ^= 0x10
    checkpoint.write_bytes(content)


@pytest.mark.parametrize(
    "damage", [damage_truncated, damage_empty, damage_missing, damage_in_a_weight]
)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(
    command, tmp_path, capsys, damage
):
    with interruption(5, signal.SIGINT):
        main([*command, "--checkpoint-every=1"])
    main([*command, "--run-name=whole"])
    capsys.readouterr()
    damage(tmp_path / "runs" / "run" / "checkpoint.pt")
    assert main(resume(tmp_path)) == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "checkpoint.pt" in warning
    assert_same_run(tmp_path / "runs" / "run", tmp_path / "runs" / "whole")


def test_a_damaged_checkpoint_never_takes_the_place_of_the_good_one_before_it(command, tmp_path):
    folder = tmp_path / "runs" / "run"
    main(command)
    damage_truncated(folder / "checkpoint.pt")
    main(resume(tmp_path))
    load_checkpoint(folder / "checkpoint.previous.pt")


def test_two_damaged_checkpoints_are_refused(command, refused, tmp_path):
    folder = tmp_path / "runs" / "run"
    main(command)
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        damage_truncated(folder / name)
    assert "checkpoint.previous.pt cannot be read" in refused(resume(tmp_path))


def test_a_checkpoint_whose_weights_are_not_finite_is_refused(command, refused, tmp_path):
    path = tmp_path / "runs" / "run" / "checkpoint.pt"
    main(command)
    for name in (path, path.with_name("checkpoint.previous.pt")):
        checkpoint = load_checkpoint(path)
        checkpoint["model"]["encoder.fcm.bias"][0] = float("nan")
        save_checkpoint(checkpoint, name)
    assert "not finite" in refused(resume(tmp_path, "--epochs=3"))


@pytest.mark.parametrize(
    "changes",
    [
        {"optimiser": None},
        {"optimiser": {}},
        {"random": None},
        {"random": {"noise": torch.zeros(3), "order": torch.zeros(3)}},
        {"random": {"noise": torch.Generator().get_state(), "order": torch.zeros(3)}},
        {"epoch": None},
        {"epoch": "two"},
        {"batch": -1},
        {"batch": 1000},
        {"epoch": -1},
        {"seconds": "long"},
        {"events": None},
        {"events": [1]},
        {"pictures": 0},
        {"model": {}},
        {"config": None},
        {"config": {"image_size": "large"}},
        {"config": {"seed": 0.5}},
    ],
    ids=lambda changes: re.sub(r"tensor.*?\]\)|\W+", "-", str(changes)),
)
def test_a_checkpoint_of_other_content_is_refused_in_one_line(command, refused, tmp_path, changes):
    path = tmp_path / "runs" / "run" / "checkpoint.pt"
    main(command)
    save_checkpoint(load_checkpoint(path) | changes, path)
    path.with_name("checkpoint.previous.pt").unlink()
    refused(resume(tmp_path, "--epochs=3"))


@pytest.mark.parametrize(
    "missing", ["optimiser", "epoch", "batch", "random", "events", "seconds", "pictures"]
)
def test_a_checkpoint_that_lacks_something_is_refused_in_one_line(
    command, refused, tmp_path, missing
):
    path = tmp_path / "runs" / "run" / "checkpoint.pt"
    main(command)
    checkpoint = load_checkpoint(path)
    del checkpoint[missing]
    save_checkpoint(checkpoint, path)
    path.with_name("checkpoint.previous.pt").unlink()
    refused(resume(tmp_path, "--epochs=3"))


def test_a_result_that_cannot_be_written_is_an_error_and_keeps_the_checkpoint(
    command, tmp_path, capsys
):
    folder = tmp_path / "runs" / "run"
    with interruption(2, signal.SIGINT):
        main(command)
    (folder / "metrics.json").mkdir()
    assert main(resume(tmp_path)) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "metrics.json" in line
    assert load_checkpoint(folder / "checkpoint.pt")["epoch"] == 2


# The lock.

HOLD = """
import sys
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def locked(command, tmp_path) -> Iterator[subprocess.Popen]:
    """A finished run whose folder another process holds."""
    main(command)
    lock = str(tmp_path / "runs" / "run" / ".lock")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD, lock], text=True, **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        yield holder
        holder.kill()


def test_a_run_that_another_process_writes_to_is_not_resumed(locked, refused, tmp_path):
    assert "another run is writing to" in refused(resume(tmp_path, "--epochs=3"))


def test_a_run_that_another_process_writes_to_is_not_overwritten(
    command, locked, refused, tmp_path
):
    assert "another run is writing to" in refused([*command, "--overwrite"])
    assert (tmp_path / "runs" / "run" / "metrics.json").exists()


def test_a_crash_leaves_no_lock_behind(locked, tmp_path):
    locked.kill()
    locked.wait()
    assert main(resume(tmp_path, "--epochs=3")) == 0


# The script as a process of its own.


@pytest.mark.slow
def test_the_script_runs_from_any_folder_and_leaves_a_run(tmp_path):
    arguments = ["--dataset=synthetic", "--image-size=8", "--epochs=1", "--log-dir=runs"]
    result = subprocess.run(
        [sys.executable, ROOT / "vae_training.py", *arguments, "--run-name=first"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert re.search(
        r"^Epoch: 0, Reconstruction Loss: \d+\.\d\d, KL Loss: \d+\.\d\d, Total Loss: \d+\.\d\d$",
        result.stdout,
        re.MULTILINE,
    )
    folder = tmp_path / "runs" / "first-synthetic"
    assert len(read_events(folder)["loss_Total Loss"]["loss"]) == 16
    assert json.loads((folder / "metrics.json").read_bytes())["dataset"] == "synthetic"


@pytest.mark.slow
def test_the_script_answers_a_bad_option_with_one_line_and_status_2(tmp_path):
    result = subprocess.run(
        [sys.executable, ROOT / "vae_training.py", "--epochs=0", "--log-dir=runs"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr == "vae_training.py: error: --epochs is 0: 1 to 1000000 is needed\n"
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())


SCRIPT_ON_SMALL_FLOWERS = """
import sys
from pathlib import Path

sys.path.insert(0, {root!r})
from torchvision.datasets import Flowers102
from datasets import preprocessing

Flowers102._file_dict = {files!r}
preprocessing.CACHE_FOLDER = Path({cache!r})
__file__ = {root!r} + "/vae_training.py"
exec(compile(Path(__file__).read_text(), __file__, "exec"))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signalled_process_is_resumed_by_the_command_that_it_prints(
    command, flowers_files, tmp_path, number, status
):
    script = tmp_path / "small_training.py"
    values = {"root": str(ROOT), "files": flowers_files[1], "cache": str(tmp_path / "cache")}
    script.write_text(SCRIPT_ON_SMALL_FLOWERS.format(**values))
    arguments = [*command, "--epochs=60"]
    # As many threads as this process has: another number rounds differently.
    options = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "text": True}
    with subprocess.Popen(
        [sys.executable, "-u", script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    ) as process:
        while not process.stdout.readline().startswith("Epoch: 2,"):
            assert process.poll() is None
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in errors
    again = shlex.split(output.splitlines()[-1])
    resumed = subprocess.run(again, capture_output=True, timeout=60, **options)
    assert (resumed.returncode, "Traceback" in resumed.stderr) == (0, False)
    main([*arguments, "--run-name=whole"])
    assert_same_run(tmp_path / "runs" / "run", tmp_path / "runs" / "whole")
