import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import SmallPictures
from helpers import (
    EVERYTHING,
    LOSSES,
    ROOT,
    SMALL,
    assert_same_run,
    flags,
    interruption,
    read_events,
    read_losses,
    seed_as,
    through_mean,
    tiles,
    train_small,
    write_checkpoint,
    write_photograph,
)
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import DTD, Flowers102

import vae_training
from datasets.preprocessing import augment
from datasets.synthetic import SyntheticFlowers
from vae.checkpoint import load_checkpoint, load_model, saved_options
from vae.losses import ELBOLoss
from vae.run import Stopped
from vae.summary import summary_text
from vae.vae import VAE
from vae_training import BEST, DATASETS, Command, Options, learning_rate_schedule, main, train

USUAL_VALIDATE_EVERY = vae_training.VALIDATE_EVERY
ALL = pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["post", "everything"])


@pytest.fixture(scope="module", autouse=True)
def _validate_every_epoch() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae_training, "VALIDATE_EVERY", 1)
        yield


@pytest.fixture(scope="module")
def whole_runs(_validate_every_epoch, tmp_path_factory) -> dict[str, Path]:
    """Runs that nothing interrupted: the post's, and one of all options."""
    folder = tmp_path_factory.mktemp("whole")
    train_small(folder / "post")
    train_small(folder / "everything", **EVERYTHING)
    return {"post": folder / "post", "everything": folder / "everything"}


@pytest.fixture
def run(whole_runs) -> Path:
    """The folder of a small run of three epochs."""
    return whole_runs["post"]


def options_of(folder: Path) -> dict[str, object]:
    """The options of the run in a folder."""
    path = folder / "checkpoint.pt"
    return asdict(saved_options(Options, load_checkpoint(path), path))


@pytest.fixture
def command(tmp_path) -> list[str]:
    """The arguments of a small run."""
    return [*flags(SMALL), "--epochs=2", f"--log-dir={tmp_path / 'runs'}", "--run-name=run"]


@pytest.fixture
def ended(capsys):
    """Run a command line that has to end early; return its exit status and its last words."""

    def end(arguments: list[str]) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        error = capsys.readouterr().err
        assert "Traceback" not in error
        (words,) = re.findall(r"^(?:error: |Stopped by ).*", error, re.S | re.M)
        return stop.value.code, words

    return end


# The post's experiment.


@ALL
def test_training_is_the_posts_loop(whole_runs, splits, changes):
    folder = whole_runs["everything" if changes else "post"]
    betas, rates = [0.1] * 3, [1e-4] * 3
    if changes:
        betas, rates = [0, 0.05, 0.1], [1e-4, 0.75e-4, 0.25e-4]
    torch.manual_seed(0)
    model = VAE((8, 8), 2, 3, batch_norm=bool(changes))
    loss = ELBOLoss(0.1, changes.get("likelihood", "gaussian"))
    optimiser = torch.optim.Adam(model.parameters())
    losses = []
    for epoch in range(3):
        seed_as(0, epoch)
        loss.beta = betas[epoch]
        optimiser.param_groups[0]["lr"] = rates[epoch]
        for x, _ in DataLoader(splits[0], batch_size=8, shuffle=True):
            x = augment(x) if changes else x
            optimiser.zero_grad()
            reconstruction, mean, log_var = model(x)
            _, *values = loss(x, reconstruction, mean, log_var)
            values[-1].backward()
            optimiser.step()
            losses.append([value.item() for value in values])
    assert read_losses(folder) == pytest.approx(np.array(losses), rel=1e-4)
    for name, weight in load_model(folder / "checkpoint.pt").model.state_dict().items():
        # Looking at the model has changed nothing, the averages of batch norm included. (Biases in
        # front of batch norm have no gradient but rounding, which Adam takes steps of 1e-4 along.)
        own = model.state_dict()[name]
        assert torch.allclose(weight, own, rtol=1e-3, atol=2e-3 if changes else 1e-5), name


@ALL
def test_the_same_seed_repeats_a_run_bit_for_bit(whole_runs, tmp_path, changes):
    torch.rand(7)  # whatever else the process draws
    train_small(tmp_path, **changes)
    assert_same_run(tmp_path, whole_runs["everything" if changes else "post"])


def test_another_seed_gives_another_run(run, tmp_path):
    train_small(tmp_path, seed=1)
    assert (read_losses(tmp_path) != read_losses(run)).all()


def test_the_trained_model_and_its_metrics_are_returned(splits, tmp_path):
    model, metrics = train(Options(**SMALL), str(tmp_path), progress=False)
    saved, *_ = load_model(tmp_path / "checkpoint.pt")
    images = splits[2].images(slice(None))
    assert not model.training
    assert torch.allclose(through_mean(model, images), through_mean(saved, images), atol=1e-6)
    assert metrics == json.loads((tmp_path / "metrics.json").read_bytes())


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({"latent_size": 200}, {}),
        ({"image_size": 64}, {"train": 3, "val": 1, "test": 5}),
        ({"batch_norm": True}, {"train": 9}),  # whose last batch is of one picture
        ({"epochs": 4}, {"val": 1, "test": 1}),  # fewer test pictures than epochs
        ({}, {"train": 1, "val": 1, "test": 1}),
    ],
)
def test_unusual_sizes_train(tmp_path, monkeypatch, changes, sizes):
    monkeypatch.setattr(SmallPictures, "sizes", SmallPictures.sizes | sizes)
    metrics = train_small(tmp_path, **{"epochs": 1} | changes)
    assert np.isfinite(metrics["test"]["total_loss"])


# TensorBoard.


def test_each_loss_has_a_point_for_every_batch_under_the_posts_tag(run):
    events = read_events(run)
    for name in LOSSES:
        assert [step for step, _ in events[f"loss_{name}"]["loss"]] == list(range(9))
    assert set(events) == {".", *(f"loss_{name}" for name in LOSSES)}


def test_every_epoch_shows_five_test_pictures_and_their_reconstructions(run, splits):
    events, pixels = read_events(run)["."], splits[2].pixels.numpy().astype(int)
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


def test_the_reconstructions_shown_are_the_models_and_not_the_originals(run, splits):
    events = read_events(run)["."]
    (originals,), (reconstructions,) = (
        tiles(np.asarray(Image.open(io.BytesIO(events[tag][-1][1]))))
        for tag in ("originals", "reconstructions")
    )
    model = load_model(run / "checkpoint.pt").model
    x = torch.tensor(originals).movedim(-1, 1) / 255
    expected = through_mean(model, x).movedim(1, -1).detach().numpy() * 255
    # Posteriors of three epochs are as wide as the prior, and change what is drawn by little.
    assert np.abs(reconstructions - expected).max() < 30 < np.abs(originals - expected).max()


def test_beta_and_learning_rate_have_a_point_for_every_epoch(whole_runs):
    for run, betas, rates in [
        ("post", [0.1] * 3, [1e-4] * 3),
        ("everything", [0, 0.05, 0.1], [1e-4, 0.75e-4, 0.25e-4]),
    ]:
        events = read_events(whole_runs[run])["."]
        assert events["schedule/beta"] == list(enumerate(map(pytest.approx, betas)))
        assert events["schedule/learning_rate"] == list(enumerate(map(pytest.approx, rates)))


def test_validation_is_looked_at_every_tenth_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(vae_training, "VALIDATE_EVERY", USUAL_VALIDATE_EVERY)
    train_small(tmp_path, epochs=21)
    events = read_events(tmp_path)["."]
    for tag in ("validation/kl", "validation/total_loss", "samples", "samples_prior", "test_pairs"):
        assert [step for step, _ in events[tag]] == [9, 19]


def test_validation_is_measured_with_the_final_beta_whatever_the_schedule(tmp_path):
    train_small(tmp_path, beta=7.0, beta_schedule="linear", warmup_epochs=100, epochs=1)
    events = read_events(tmp_path)["."]
    total, error, kl = (
        events[f"validation/{name}"][0][1] for name in ("total_loss", "squared_error", "kl")
    )
    assert total == pytest.approx(error + 7 * kl, rel=1e-4)


def test_a_run_leaves_its_checkpoint_metrics_pictures_and_events_and_nothing_else(run):
    names = {path.name for path in run.iterdir() if "tfevents" not in path.name}
    assert names == {
        *(".lock", "checkpoint.pt", "metrics.json", "report.html", "story"),
        *("reconstructions.png", "samples.png", "samples_prior.png"),
        *("00003", "projector_config.pbtxt", *(f"loss_{name}" for name in LOSSES)),
    }


# The reader's own pictures.


@pytest.fixture
def train_own(tmp_path, monkeypatch):
    """Register a data set of the reader's own and train on it; return the metrics."""

    def run(pixels, labels=(0, 1), **changes):
        def own(root="", split="train", transform=np.asarray, download=False):
            return [(transform(Image.fromarray(x)), y) for x in pixels for y in labels]

        monkeypatch.setitem(DATASETS, "own", own)
        return train_small(tmp_path / "run", **{"dataset": "own", "epochs": 1} | changes)

    return run


@pytest.mark.parametrize(("shape", "channels"), [((20, 9), 1), ((9, 20, 3), 3), ((8, 8, 4), 4)])
def test_pictures_of_any_number_of_channels_train(train_own, tmp_path, shape, channels):
    metrics = train_own(np.random.default_rng(0).integers(0, 256, (6, *shape), np.uint8))
    assert np.isfinite(metrics["test"]["total_loss"])
    assert metrics["architecture"]["image_channels"] == channels
    model, *_ = load_model(tmp_path / "run" / "checkpoint.pt")
    assert model.sample(2).shape == (2, channels, 8, 8)


LABELS = {
    "negative and huge": [-5, 10**12, 3],
    "names": ["tulip", "rose"],
    "several in one": [torch.tensor([0, 1]), torch.tensor([1, 1])],
    "a dictionary": [{"species": 1}, {"species": 2}],
    "none": [None, None],
    "none for some": [3, None],
    "of two shapes": [np.zeros(2), np.zeros(3)],
    "drawn masks": [Image.new("L", (8, 8)), Image.new("L", (8, 8))],
    "of several lines": ["tulip\nred", "rose\twhite"],
    "empty": ["", "rose"],
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_labels_may_be_anything(train_own, tmp_path, capsys, labels):
    assert train_own(np.zeros((6, 8, 8, 3), np.uint8), labels)["epochs"] == 1
    assert "warning" not in capsys.readouterr().err
    species = tmp_path / "run" / "00001" / "test_latents" / "metadata.tsv"
    assert len(species.read_text().splitlines()) == 6 * len(labels)  # one for each point


class Alone(list):
    """Pictures without labels, whose attribute ``classes`` a test may set."""

    classes: ClassVar[object] = None


@pytest.mark.parametrize("classes", [3, {"rose": 0, "lily": 1}, ["rose"], np.array(3), "rose"])
@pytest.mark.parametrize("labelled", [True, False])
def test_classes_may_be_anything_and_labels_missing(
    tmp_path, monkeypatch, capsys, classes, labelled
):
    def own(split, transform=np.asarray):
        pictures = [transform(Image.new("RGB", (8, 8), (n, 0, 0))) for n in range(8)]
        given = Alone(zip(pictures, range(8), strict=True)) if labelled else Alone(pictures)
        given.classes = classes
        return given

    monkeypatch.setitem(DATASETS, "own", own)
    assert train_small(tmp_path / "run", dataset="own", epochs=1)["epochs"] == 1
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(("crop", "mean"), [(True, 1), (False, 1 / 3)])
def test_crop_takes_the_middle_and_the_post_squeezes(train_own, tmp_path, crop, mean):
    pixels = np.zeros((3, 8, 24, 3), np.uint8)
    pixels[:, :, 8:16] = 255
    train_own(pixels, crop=crop)
    (_, png) = read_events(tmp_path / "run")["."]["originals"][0]
    assert tiles(np.asarray(Image.open(io.BytesIO(png)))).mean() / 255 == pytest.approx(mean, 0.06)


# Where a run starts from.


def test_a_run_may_start_from_another_ones_weights(tmp_path):
    train_small(tmp_path / "first", epochs=30, learning_rate=1e-2)
    first, *_ = load_model(tmp_path / "first" / "checkpoint.pt")
    barely_trained = {"epochs": 1, "learning_rate": 1e-12}
    train_small(tmp_path / "new", **barely_trained)
    path = tmp_path / "first" / "checkpoint.pt"
    train_small(tmp_path / "from first", start_from=path, seed=1, **barely_trained)
    new, *_ = load_model(tmp_path / "new" / "checkpoint.pt")
    again, *_ = load_model(tmp_path / "from first" / "checkpoint.pt")
    for weight, other in zip(again.parameters(), first.parameters(), strict=True):
        assert torch.allclose(weight, other, atol=1e-9)
    weights = zip(new.parameters(), first.parameters(), strict=True)
    assert not all(torch.allclose(weight, other, atol=1e-4) for weight, other in weights)


def test_a_run_with_a_start_resumes_from_its_own_checkpoint_without_it(tmp_path):
    train_small(tmp_path / "first")
    start = shutil.copytree(tmp_path / "first", tmp_path / "start") / "checkpoint.pt"
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train_small(whole, start_from=start)
    with interruption(signal.SIGINT), pytest.raises(Stopped):
        train_small(stopped, start_from=start)
    start.unlink()
    train_small(stopped, True, start_from=start)
    assert_same_run(whole, stopped)


@pytest.mark.parametrize("name", ["first", "{runs}/first", "{runs}/first/checkpoint.pt"])
def test_a_start_is_named_by_its_run_its_folder_or_its_file(command, tmp_path, name):
    main([*command, "--run-name=first"])
    main([*command, "--run-name=second", f"--start-from={name.format(runs=tmp_path / 'runs')}"])
    path = tmp_path / "runs" / "first" / "checkpoint.pt"
    assert options_of(tmp_path / "runs" / "second")["start_from"] == path


def test_a_start_of_another_architecture_or_none_is_told_in_one_line(command, tmp_path, capsys):
    for name, message in (("ten", "latent_size is 10 there and 2 here"), ("none", "no run in")):
        with pytest.raises(SystemExit):
            main([*command, f"--start-from={name}"])
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert line.startswith("error: ") and message in line
    assert not (tmp_path / "runs" / "run" / "checkpoint.pt").exists()


# The options.


def test_the_defaults_are_the_posts():
    options = Options()
    assert (options.image_size, options.latent_size, options.beta) == (32, 10, 0.1)
    assert (options.learning_rate, options.batch_size, options.epochs) == (1e-4, 64, 500)
    assert (options.batch_norm, options.augment, options.crop) == (False, False, False)
    assert options.likelihood == "gaussian"
    assert options.beta_schedule == options.lr_schedule == "constant"


def test_each_name_of_a_data_set_stands_for_its_class():
    expected = {"flowers102": Flowers102, "dtd": DTD, "synthetic": SyntheticFlowers}
    assert {name: DATASETS[name] for name in expected} == expected


def test_the_best_preset_changes_only_how_it_is_trained():
    changed = {"epochs", "learning_rate", "lr_schedule", "augment"}
    post, best = asdict(Options()), asdict(BEST)
    assert {name for name in post if post[name] != best[name]} == changed


def test_the_cosine_schedule_of_the_learning_rate_falls_to_0_and_the_constant_one_stays():
    for schedule, expected in {"cosine": [0.2, 0.1, 0], "constant": [0.2, 0.2, 0.2]}.items():
        options = Options(learning_rate=0.2, lr_schedule=schedule, epochs=100)
        optimiser = torch.optim.SGD([torch.zeros(1)], lr=options.learning_rate)
        scheduler = learning_rate_schedule(optimiser, options)
        rates = []
        for _ in range(101):
            rates.append(optimiser.param_groups[0]["lr"])
            optimiser.step()
            scheduler.step()
        assert rates[::50] == pytest.approx(expected)


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
    assert output.endswith(summary_text(metrics, folder) + "\n")


def test_every_option_of_a_command_reaches_the_run(command, tmp_path):
    values = SMALL | EVERYTHING
    values |= {"beta": 0.2, "learning_rate": 1e-3, "seed": 3, "checkpoint_every": 1, "cycles": 2}
    start = write_checkpoint(tmp_path / "start.pt", VAE((8, 8), 2, 3, batch_norm=True))
    values |= {"crop": True, "data_root": tmp_path, "epochs": 2, "start_from": start}
    assert values.keys() == asdict(Options()).keys()
    main([*command, *flags(values)])
    folder = tmp_path / "runs" / "run"
    assert options_of(folder) == values
    assert load_model(folder / "checkpoint.pt").model.image_resolution == (8, 8)


def test_a_preset_sets_options_which_the_command_can_change(command, tmp_path):
    main([*command, "--preset=best", "--no-augment", "--seed=3"])
    best = asdict(BEST) | SMALL | {"epochs": 2, "augment": False, "seed": 3}
    assert options_of(tmp_path / "runs" / "run") == best


def test_a_run_is_named_by_date_time_and_data_set_if_not_otherwise(command, tmp_path):
    before = datetime.now().replace(microsecond=0)
    main([*command, "--run-name="])
    (folder,) = (tmp_path / "runs").iterdir()
    assert before <= datetime.strptime(folder.name, "%Y-%m-%d_%H-%M-%S-small") <= datetime.now()


def test_a_run_is_resumed_by_its_name_or_folder_as_the_same_experiment(command, ended, tmp_path):
    main(command)
    main([f"--log-dir={tmp_path / 'runs'}", "--resume=run", "--epochs=3"])
    main(["--resume", str(tmp_path / "runs" / "run"), "--epochs=4"])
    assert len(read_losses(tmp_path / "runs" / "run")) == 12
    status, words = ended([f"--log-dir={tmp_path / 'runs'}", "--resume=run", "--beta=1"])
    assert (status, "--beta 1.0 (the run has 0.1)" in words) == (2, True)


def test_help_shows_every_option_with_its_purpose_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for name in (*asdict(Options()), "preset", "log_dir", "run_name", "resume"):
        flag = re.escape(f"--{name.replace('_', '-')}")
        assert re.search(rf" {flag}[ ,][^)]{{9,}}\(default: ", text), name


def test_without_options_a_command_is_the_posts_experiment_in_a_new_folder_of_the_repository():
    expected = Command(preset="post", log_dir=ROOT / "vae" / "runs", experiment=Options())
    assert vae_training.read_command_line([]) == expected
    assert (expected.run_name, expected.resume) == ("", "")


def test_a_run_that_has_ended_says_so_and_makes_only_its_report_again(command, tmp_path, capsys):
    main(command)
    folder = tmp_path / "runs" / "run"
    capsys.readouterr()
    main(["--resume", str(folder)])
    output = capsys.readouterr().out
    assert "has ended after its 2 epochs: only its report is made again" in output
    assert "Epoch:" not in output
    assert "Reconstructed test pictures" in output


def test_auto_is_flowers102_where_it_is(command, data_root, tmp_path):
    main([*command, "--epochs=1", "--dataset=auto", f"--data-root={data_root}"])
    metrics = json.loads((tmp_path / "runs" / "run" / "metrics.json").read_bytes())
    assert metrics["dataset"] == "flowers102"


def test_auto_falls_back_loudly_where_flowers102_is_not(
    command, no_server, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(DATASETS, "synthetic", SmallPictures)  # 8,189 take their time
    main(
        [
            *command,
            "--run-name=",
            "--epochs=1",
            "--dataset=auto",
            f"--data-root={tmp_path / 'empty'}",
        ]
    )
    out, err = capsys.readouterr()
    assert "warning: flowers102 is not in" in err
    assert "Training on SYNTHETIC flowers" in err
    assert "Reconstructed test pictures" in out
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.endswith("-synthetic")
    metrics = json.loads((folder / "metrics.json").read_bytes())
    assert metrics["dataset"] == options_of(folder)["dataset"] == "synthetic"


# Runs that go wrong.


@ALL
def test_a_diverging_run_stops_and_keeps_what_was_good(ended, tmp_path, changes):
    folder = tmp_path / "run"
    train_small(
        folder, epochs=1, **changes | {"beta_schedule": "constant", "lr_schedule": "constant"}
    )
    checkpoint = load_checkpoint(folder / "checkpoint.pt")
    good = load_model(folder / "checkpoint.pt").model.state_dict()
    checkpoint["state"]["optimiser"]["param_groups"][0]["lr"] = 1e30
    torch.save(checkpoint, folder / "checkpoint.pt")
    status, words = ended(["--resume", str(folder), "--epochs=9"])
    assert status == 1
    assert re.match(
        r"error: a weight of the model is not finite after epoch \d: lower --lea", words
    )
    assert words.endswith(f"The last checkpoint is in {folder}\n")
    saved = load_model(folder / "checkpoint.pt")[0].state_dict()
    assert all(torch.equal(saved[name], good[name]) for name in good)


# Interrupted and resumed.


@ALL
def test_a_run_stopped_and_died_again_and_again_ends_as_if_it_had_not(
    whole_runs, tmp_path, changes
):
    with interruption(signal.SIGINT), pytest.raises(Stopped):  # it ends its first epoch
        train_small(tmp_path, **changes)
    # The second signal ends it at once: what it wrote since its checkpoint stands twice.
    for step in (2, 5):
        with interruption(signal.SIGINT, signal.SIGTERM, call=step), pytest.raises(Stopped):
            train_small(tmp_path, True, checkpoint_every=1, **changes)
    train_small(tmp_path, True, **changes)
    assert_same_run(tmp_path, whole_runs["everything" if changes else "post"])


# The script as a process of its own, in any folder.


def test_ctrl_c_ends_a_process_with_the_command_that_goes_on_from_any_folder(tmp_path, monkeypatch):
    photographs = tmp_path / "my photos"  # of two species and of several sizes, and a note
    for seed in range(60):
        species = photographs / ("tulip", "rose")[seed % 2]
        species.mkdir(parents=True, exist_ok=True)
        write_photograph(species / f"{seed}.jpg", (20 + seed, 30), seed)
    (photographs / "notes.txt").touch()
    # As many threads as this process has: another number rounds differently.
    options = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "text": True}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    arguments = ["--dataset=my photos", "--log-dir=my runs"]
    arguments += ["--image-size=8", "--epochs=20", "--device=cpu", "--run-name"]
    command = [sys.executable, "-u", ROOT / "vae_training.py", *arguments, "one"]
    with subprocess.Popen(command, cwd=tmp_path, **options) as process:
        while not process.stdout.readline().startswith("Epoch: 0,"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert re.search(r"^Stopped by SIGINT\. Go on with:$", errors, re.M), errors
    assert load_checkpoint(tmp_path / "my runs/one/checkpoint.pt")["epoch"] < 20
    python, script, *again = shlex.split(errors.splitlines()[-1])
    assert (python, script) == (sys.executable, str(ROOT / "vae_training.py"))
    monkeypatch.setattr(vae_training, "VALIDATE_EVERY", USUAL_VALIDATE_EVERY)
    for folder, words in (("/", again), (tmp_path, [*arguments, "other"])):
        monkeypatch.chdir(folder)
        main(words)
    assert_same_run(tmp_path / "my runs" / "one", tmp_path / "my runs" / "other")
    metrics = json.loads((tmp_path / "my runs" / "one" / "metrics.json").read_bytes())
    assert metrics["dataset"] == str(photographs)
