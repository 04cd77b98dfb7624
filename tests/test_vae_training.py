import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_splits
from helpers import (
    EVERYTHING,
    LOSSES,
    ROOT,
    SMALL,
    assert_same_run,
    interruption,
    read_events,
    read_losses,
    seed_as,
    tiles,
    train_small,
)
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader

from datasets.pictures import augment
from vae.losses import ELBOLoss
from vae.training.checkpoint import load_checkpoint, load_model
from vae.training.options import Options
from vae.training.run import Stopped
from vae.vae import VAE
from vae_training import main, train

ALL = pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["post", "everything"])


@pytest.fixture(scope="module", autouse=True)
def _look_every_epoch() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vae.training.report.LOOK_EVERY", 1)
        yield


@pytest.fixture(scope="module")
def whole_runs(_look_every_epoch, tmp_path_factory, splits) -> dict[str, Path]:
    """Runs that nothing interrupted: the post's, and one of all options."""
    folder = tmp_path_factory.mktemp("whole")
    train_small(folder / "post", splits)
    train_small(folder / "everything", splits, **EVERYTHING)
    return {"post": folder / "post", "everything": folder / "everything"}


@pytest.fixture
def run(whole_runs) -> Path:
    """The folder of a small run of three epochs."""
    return whole_runs["post"]


@pytest.fixture
def command(data_root, tmp_path) -> list[str]:
    """The arguments of a run on the small Flowers102."""
    folders = ["--data-root", str(data_root), "--log-dir", str(tmp_path / "runs")]
    small = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    return [*folders, *small, "--epochs=2", "--run-name=run"]


@pytest.fixture
def ended(capsys):
    """Run a command line that has to end early; return its exit status and its last words."""

    def end(arguments: list[str]) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        error = capsys.readouterr().err
        assert "Traceback" not in error
        (words,) = re.findall(rf"^{re.escape(Path(sys.argv[0]).name)}: (.*)", error, re.S | re.M)
        return stop.value.code, words

    return end


# The post's experiment.


@ALL
def test_training_is_the_posts_loop(whole_runs, splits, changes):
    options = Options(**SMALL | changes)
    torch.manual_seed(0)
    model = VAE((8, 8), 2, 3, options.batch_norm)
    loss = ELBOLoss(0.1, options.likelihood)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-4)
    losses = []
    for epoch in range(3):
        seed_as(0, epoch)
        loss.beta = options.beta_at(epoch)
        optimiser.param_groups[0]["lr"] = options.learning_rate_at(epoch)
        for x, _ in DataLoader(list(splits.train), batch_size=8, shuffle=True):
            x = augment(x) if options.augment else x
            optimiser.zero_grad()
            reconstruction, mean, log_var = model(x)
            _, *values = loss(x, reconstruction, mean, log_var)
            values[-1].backward()
            optimiser.step()
            losses.append([value.item() for value in values])
    folder = whole_runs["everything" if changes else "post"]
    assert read_losses(folder) == pytest.approx(np.array(losses), rel=1e-4)
    for name, weight in load_checkpoint(folder / "checkpoint.pt")["model"].items():
        # Looking at the model has changed nothing, the averages of batch norm included. (Biases in
        # front of batch norm have no gradient but rounding, which Adam takes steps of 1e-4 along.)
        own = model.state_dict()[name]
        assert torch.allclose(weight, own, rtol=1e-3, atol=2e-3 if changes else 1e-5), name


def test_every_epoch_shows_each_picture_once_in_an_order_of_its_own(splits, tmp_path, monkeypatch):
    seen, forward = [], ELBOLoss.forward

    def watch(loss, original, *others):
        seen.append(original)
        return forward(loss, original, *others)

    monkeypatch.setattr(ELBOLoss, "forward", watch)
    train_small(tmp_path, splits, epochs=2)
    assert [len(batch) for batch in seen] == [8, 8, 4, 8, 8, 4]
    epochs = torch.cat(seen[:3]), torch.cat(seen[3:])
    in_order = splits.train[:][0].flatten(1)
    for epoch in epochs:
        # Distances of 0 form a permutation.
        same = torch.cdist(epoch.flatten(1), in_order) < 1e-3
        assert same.sum(dim=0).tolist() == same.sum(dim=1).tolist() == [1] * 20
    assert not torch.equal(*epochs)


def test_learning_rate_and_beta_follow_their_schedules(splits, tmp_path):
    rates = []
    hook = register_optimizer_step_pre_hook(
        lambda optimiser, *_: rates.append(optimiser.param_groups[0]["lr"])
    )
    train_small(tmp_path, splits, **EVERYTHING)
    hook.remove()
    assert rates == pytest.approx(np.repeat([1e-4, 0.75e-4, 0.25e-4], 3).tolist())
    (steps, betas) = zip(*read_events(tmp_path)["."]["schedule/beta"], strict=True)
    assert (steps, betas) == ((0, 1, 2), pytest.approx((0, 0.05, 0.1)))
    kl, reconstruction, total = read_losses(tmp_path).T
    assert total == pytest.approx(np.repeat(betas, 3) * kl + reconstruction, rel=1e-6)


@ALL
def test_the_same_seed_repeats_a_run_bit_for_bit(whole_runs, splits, tmp_path, changes):
    torch.rand(7)  # whatever else the process draws
    train_small(tmp_path, splits, **changes)
    assert_same_run(tmp_path, whole_runs["everything" if changes else "post"])


def test_another_seed_gives_another_run(run, splits, tmp_path):
    train_small(tmp_path, splits, seed=1)
    assert (read_losses(tmp_path) != read_losses(run)).all()


def test_the_trained_model_and_its_metrics_are_returned(splits, tmp_path):
    model, metrics = train(Options(**SMALL), splits, str(tmp_path), progress=False)
    saved, *_ = load_model(tmp_path / "checkpoint.pt")
    images = splits.test[:][0]
    assert not model.training
    assert torch.allclose(model.reconstruct(images), saved.reconstruct(images), atol=1e-6)
    assert metrics == json.loads((tmp_path / "metrics.json").read_bytes())


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({"batch_size": 1000}, {}),
        ({"latent_size": 1}, {}),
        ({"latent_size": 512}, {}),
        ({"image_size": 128}, {"train": 3, "val": 1, "test": 5, "size": 128}),
        ({"batch_norm": True}, {"train": 9}),  # whose last batch is of one picture
        ({"epochs": 4}, {"val": 1, "test": 1}),  # fewer test pictures than epochs
    ],
)
def test_unusual_sizes_train(tmp_path, changes, sizes):
    metrics = train_small(tmp_path, make_splits(**sizes), **{"epochs": 1} | changes)
    assert np.isfinite(metrics["test"]["total_loss"])


# TensorBoard.


def test_each_loss_has_a_point_for_every_batch_under_the_posts_tag(run):
    events = read_events(run)
    for name in LOSSES:
        assert [step for step, _ in events[f"loss_{name}"]["loss"]] == list(range(9))
    assert set(events) == {".", *(f"loss_{name}" for name in LOSSES)}


def test_every_epoch_shows_five_test_pictures_and_their_reconstructions(run, splits):
    events, pixels = read_events(run)["."], splits.test.pixels.numpy().astype(int)
    shown = []
    for epoch in range(3):
        (step, originals), (other, reconstructions) = (
            events[tag][epoch] for tag in ("originals", "reconstructions")
        )
        assert step == other == epoch
        assert Image.open(io.BytesIO(reconstructions)).size == (5 * 10 + 2, 12)
        (row,) = tiles(np.asarray(Image.open(io.BytesIO(originals))))
        # TensorBoard rounds down, by one step of grey at most.
        same = (np.abs(row[:, None] - pixels) <= 1).all(axis=(2, 3, 4))
        assert same.sum(axis=1).tolist() == [1] * 5
        shown.append(same.argmax(axis=1).tolist())
    assert all(len(set(row)) == 5 for row in shown)
    assert shown[0] != shown[1] != shown[2]


# What a run leaves.


def test_a_run_leaves_its_checkpoint_metrics_pictures_and_events_and_nothing_else(run):
    names = {path.name for path in run.iterdir() if "tfevents" not in path.name}
    assert names == {
        *(".lock", "checkpoint.pt", "metrics.json"),
        *("reconstructions.png", "samples.png", "samples_prior.png"),
        *("00003", "projector_config.pbtxt", *(f"loss_{name}" for name in LOSSES)),
    }


# The command line.


def test_a_command_trains_and_prints_the_posts_line_for_each_epoch(command, tmp_path, capsys):
    assert main(command) is None
    output = capsys.readouterr().out
    folder = tmp_path / "runs" / "run"
    lines = [line for line in output.splitlines() if line.startswith("Epoch")]
    assert lines == [
        f"Epoch: {epoch}, Reconstruction Loss: {reconstruction:.2f}, KL Loss: {kl:.2f}, "
        f"Total Loss: {total:.2f}"
        for epoch, (kl, reconstruction, total) in enumerate(read_losses(folder)[2::3].tolist())
    ]
    metrics = json.loads((folder / "metrics.json").read_bytes())
    assert f"squared error {metrics['test']['squared_error']:.1f} per image" in output
    assert f"from the prior {metrics['samples']['frechet']['prior']:.1f};" in output
    assert output.endswith(f"tensorboard --logdir {tmp_path / 'runs'}\n")
    assert metrics["dataset"] == "flowers102"


def test_every_option_of_a_command_reaches_the_run(command, tmp_path):
    values = EVERYTHING | {"beta": 0.2, "learning_rate": 1e-3, "seed": 3, "checkpoint_every": 1}
    flags = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in values.items()
    ]
    main([*command, *flags])
    _, config, _ = load_model(tmp_path / "runs" / "run" / "checkpoint.pt")
    assert config.items() >= (SMALL | values | {"epochs": 2, "dataset": "flowers102"}).items()


def test_a_run_that_exists_is_only_replaced_if_that_is_said(command, ended, tmp_path):
    main(command)
    status, words = ended([*command, "--epochs=1"])
    assert (status, "run exists already: give another --run-name" in words) == (2, True)
    assert len(read_losses(tmp_path / "runs" / "run")) == 6
    main([*command, "--epochs=1", "--overwrite"])
    assert len(read_losses(tmp_path / "runs" / "run")) == 3


def test_damaged_pictures_are_named_and_no_run_begins(command, ended, data_root, tmp_path):
    picture = data_root / "flowers-102" / "jpg" / "image_00008.jpg"
    picture.write_bytes(b"")
    status, words = ended(command)
    assert (status, f"{picture} cannot be read as a picture" in words) == (2, True)
    assert not (tmp_path / "runs").exists()


# Where Flowers102 cannot be reached.


def test_auto_falls_back_loudly_at_the_start_and_in_the_last_line(
    command, no_server, tmp_path, capsys
):
    (tmp_path / "empty").mkdir()
    main([*command, "--data-root", str(tmp_path / "empty")])
    out, err = capsys.readouterr()
    assert "warning: Flowers102 is not in" in err
    assert "SYNTHETIC flowers, not on photographs" in err
    assert "SYNTHETIC flowers, not on photographs" in out.splitlines()[-1]
    folder = tmp_path / "runs" / "run-synthetic"
    metrics = json.loads((folder / "metrics.json").read_bytes())
    assert metrics["dataset"] == metrics["config"]["dataset"] == "synthetic"
    assert load_checkpoint(folder / "checkpoint.pt")["config"]["dataset"] == "synthetic"


def test_flowers102_is_refused_instead_and_nothing_created(command, ended, no_server, tmp_path):
    arguments = ["--dataset", "flowers102", "--data-root", str(tmp_path / "empty")]
    status, words = ended([*command, *arguments])
    assert status == 2
    assert str(tmp_path / "empty" / "flowers-102") in words
    assert "--dataset synthetic" in words
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "empty").exists()


# Runs that diverge.


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli", "sigma"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_diverging_run_stops_with_epoch_and_batch_and_keeps_what_was_good(
    command, ended, tmp_path, likelihood, batch_norm
):
    options = ["--learning-rate=1e30", f"--likelihood={likelihood}", "--checkpoint-every=1"]
    status, words = ended([*command, *options, *["--batch-norm"] * batch_norm])
    folder = tmp_path / "runs" / "run"
    assert status == 1
    assert re.match(r"error: the loss is \S+ in epoch \d, batch \d \(KL ", words)
    assert words.endswith(f"lower --learning-rate. The last good checkpoint is in {folder}\n")
    load_model(folder / "checkpoint.pt")  # refuses weights that are not finite
    assert not (folder / "metrics.json").exists()


# Interrupted and resumed.


@ALL
@pytest.mark.parametrize(
    ("step", "number"),
    [(1, signal.SIGINT), (3, signal.SIGTERM), (5, signal.SIGINT), (9, signal.SIGTERM)],
)
def test_a_run_stopped_in_any_epoch_ends_as_if_it_had_not_been(
    whole_runs, splits, tmp_path, step, number, changes
):
    with interruption(number, call=step), pytest.raises(Stopped):
        train_small(tmp_path, splits, **changes)
    train_small(tmp_path, splits, "resume", **changes)
    assert_same_run(tmp_path, whole_runs["everything" if changes else "post"])


@ALL
def test_a_run_that_died_again_and_again_ends_as_if_it_had_not(
    whole_runs, splits, tmp_path, changes
):
    # The second signal ends it at once: what it wrote since its checkpoint has to be undone.
    at_once = (signal.SIGINT, signal.SIGTERM)
    for start, step in (("new", 2), ("resume", 8), ("resume", 2)):
        with interruption(*at_once, call=step), pytest.raises(Stopped):
            train_small(tmp_path, splits, start, checkpoint_every=2, **changes)
    train_small(tmp_path, splits, "resume", **changes)
    assert_same_run(tmp_path, whole_runs["everything" if changes else "post"])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_ends_with_the_command_that_goes_on(
    command, ended, tmp_path, number, status
):
    folder = tmp_path / "runs" / "run"
    with interruption(number):
        stopped, words = ended(command)
    assert (stopped, words.startswith(f"Stopped by {number.name}. Go on with:\n")) == (status, True)
    again = shlex.split(words.splitlines()[1])
    assert again == [sys.executable, sys.argv[0], "--resume", str(folder)]
    main(again[2:])
    main([*command, "--run-name=whole"])
    assert_same_run(folder, tmp_path / "runs" / "whole")


def test_a_finished_run_may_grow_by_epochs_and_is_then_the_longer_run(command, tmp_path):
    main(command)
    main(["--log-dir", str(tmp_path / "runs"), "--resume", "run", "--epochs=4"])
    main([*command, "--epochs=4", "--run-name=longer"])
    assert_same_run(tmp_path / "runs" / "run", tmp_path / "runs" / "longer")


def test_a_resumed_command_does_not_become_another_experiment(command, ended, tmp_path):
    main(command)
    status, words = ended(["--log-dir", str(tmp_path / "runs"), "--resume=run", "--beta=1"])
    assert (status, "--beta 1.0 (the run has 0.1)" in words) == (2, True)


# The script as a process of its own.


# As many threads as this process has: another number rounds differently.
PROCESS = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "text": True}


SCRIPT = [sys.executable, "-u", ROOT / "vae_training.py"]


@pytest.mark.slow
def test_the_script_runs_from_any_folder_and_leaves_a_run(tmp_path):
    arguments = ["--dataset=synthetic", "--image-size=8", "--epochs=1", "--log-dir=runs"]
    script = [*SCRIPT, *arguments, "--run-name=first"]
    result = subprocess.run(script, cwd=tmp_path, capture_output=True, **PROCESS)
    assert result.returncode == 0, result.stderr
    line = r"^Epoch: 0, Reconstruction Loss: \d+\.\d\d, KL Loss: \d+\.\d\d, Total Loss: \d+\.\d\d$"
    assert re.search(line, result.stdout, re.MULTILINE)
    folder = tmp_path / "runs" / "first-synthetic"
    assert len(read_losses(folder)) == 16
    assert json.loads((folder / "metrics.json").read_bytes())["dataset"] == "synthetic"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signalled_process_is_resumed_by_the_command_that_it_prints(tmp_path, number, status):
    arguments = ["--dataset=synthetic", "--image-size=8", "--epochs=12", f"--log-dir={tmp_path}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*SCRIPT, *arguments, "--run-name=one"], **pipes, **PROCESS) as process:
        while not process.stdout.readline().startswith("Epoch: 2,"):
            assert process.poll() is None
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in errors
    again = shlex.split(errors.splitlines()[-1])
    for command in (again, [*SCRIPT, *arguments, "--run-name=other"]):
        assert subprocess.run(command, capture_output=True, timeout=90, **PROCESS).returncode == 0
    assert_same_run(tmp_path / "one-synthetic", tmp_path / "other-synthetic")
