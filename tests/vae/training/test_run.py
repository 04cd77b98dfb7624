import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_splits
from filelock import FileLock, Timeout
from helpers import (
    BEGIN,
    LOSSES,
    REPORT,
    SMALL,
    STEP,
    assert_same_run,
    interruption,
    read_events,
    read_losses,
    train_small,
)

from vae.training.checkpoint import load_checkpoint, load_model, save_checkpoint
from vae.training.options import Options
from vae.training.run import Run, Stopped, find_device

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "runs" / "run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, splits) -> Path:
    """The folder of a small run that has ended, to look at."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train_small(folder, splits)
    return folder


@pytest.fixture
def finished(whole, folder) -> Path:
    """The folder of a small run that has ended, to go on with."""
    return shutil.copytree(whole, folder)


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Everything in a folder but the lock, and when it was written."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Write a run's checkpoint anew with a change."""
    checkpoint = load_checkpoint(folder / "checkpoint.pt")
    edit(checkpoint)
    save_checkpoint(checkpoint, folder / "checkpoint.pt")


# One run at a time.

HOLD = """
import sys
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(finished) -> Iterator[subprocess.Popen]:
    """Another process that holds the folder of a finished run."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-c", HOLD, finished / ".lock"]
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.parametrize("start", ["resume", "overwrite"])
def test_a_folder_that_another_process_writes_to_is_left_alone(holder, finished, splits, start):
    before = content(finished)
    with pytest.raises(ValueError, match=f"another run is writing to {finished}: wait for it"):
        train_small(finished, splits, start, epochs=4)
    assert content(finished) == before


def test_a_new_run_does_not_join_one_that_has_written_nothing_yet(folder, splits):
    with Run(Options(**SMALL), splits, folder), pytest.raises(ValueError, match="another run is"):
        train_small(folder, splits)
    assert not content(folder)


def test_a_process_that_died_leaves_no_lock(holder, finished, splits):
    holder.kill()
    holder.wait()
    train_small(finished, splits, "resume", epochs=4)
    assert len(read_losses(finished)) == 12


def test_a_run_holds_its_lock_to_the_end_and_no_longer(folder, splits):
    with Run(Options(**SMALL), splits, folder), pytest.raises(Timeout):
        FileLock(folder / ".lock", timeout=0).acquire()
    with FileLock(folder / ".lock", timeout=0) as lock:
        assert lock.is_locked


# Signals.


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("step", [1, 4, 5, 6])
def test_a_signal_waits_for_the_end_of_the_epoch_and_its_checkpoint(folder, splits, number, step):
    with interruption(number, call=step), pytest.raises(Stopped) as stopped:
        train_small(folder, splits)
    epochs = 1 + (step - 1) // 3
    assert stopped.value.exit_status == 128 + number
    assert len(read_losses(folder)) == 3 * epochs
    assert [epoch for epoch, _ in read_events(folder)["."]["originals"]] == list(range(epochs))
    assert load_checkpoint(folder / "checkpoint.pt")["epoch"] == epochs


def test_a_stopped_run_says_how_to_go_on(folder, splits):
    with interruption(signal.SIGTERM), pytest.raises(Stopped) as stopped:
        train_small(folder, splits)
    what, command = str(stopped.value).splitlines()
    assert what == "Stopped by SIGTERM. Go on with:"
    assert shlex.split(command) == [sys.executable, sys.argv[0], "--resume", str(folder)]


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_of_any_kind_stops_at_once(folder, splits, first, second):
    with interruption(first, second, call=5), pytest.raises(Stopped) as stopped:
        train_small(folder, splits, checkpoint_every=1)
    assert stopped.value.exit_status == 128 + second
    assert str(stopped.value).startswith(f"Stopped by {second.name}. Go on with:\n")
    assert len(read_losses(folder)) == 3
    assert load_checkpoint(folder / "checkpoint.pt")["epoch"] == 1


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_before_the_first_checkpoint_stops_at_once(folder, splits, number):
    with interruption(number, at=BEGIN), pytest.raises(Stopped) as stopped:
        train_small(folder, splits)
    assert stopped.value.exit_status == 128 + number
    assert str(stopped.value) == f"Stopped by {number.name}."
    assert not (folder / "checkpoint.pt").exists()
    train_small(folder, splits, "overwrite")
    assert len(read_losses(folder)) == 9


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_during_the_report_stops_at_once_and_the_report_is_made_again(
    folder, splits, whole, number
):
    with interruption(number, at=REPORT), pytest.raises(Stopped) as stopped:
        train_small(folder, splits)
    assert stopped.value.exit_status == 128 + number
    assert "Go on with:" in str(stopped.value)
    assert not (folder / "metrics.json").exists()
    train_small(folder, splits, "resume")
    assert_same_run(folder, whole)


@pytest.mark.parametrize("at", [None, STEP, BEGIN, REPORT])
def test_signals_are_given_back_after_a_run(folder, splits, at):
    before = [signal.getsignal(number) for number in SIGNALS]
    if at is None:
        train_small(folder, splits)
    else:
        with interruption(signal.SIGTERM, at=at), pytest.raises(Stopped):
            train_small(folder, splits)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_run_in_another_thread_leaves_signals_to_the_main_thread(folder, splits):
    before = [signal.getsignal(number) for number in SIGNALS]
    during = []

    def run() -> None:
        with Run(Options(**SMALL), splits, folder):
            during.extend(signal.getsignal(number) for number in SIGNALS)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert during == before


# Random numbers.


def draw(folder: Path, splits, epoch: int, seed: int = 0, before: int = 0) -> list[float]:
    with Run(Options(**SMALL | {"seed": seed}), splits, folder) as run:
        torch.rand(before)
        run.seed(epoch)
        return torch.rand(4).tolist()


def test_all_chance_in_an_epoch_follows_from_seed_and_epoch(folder, splits):
    assert draw(folder, splits, epoch=2) == draw(folder, splits, epoch=2, before=7)


def test_no_two_epochs_and_no_two_seeds_draw_the_same(folder, splits):
    seeds = [0, 1, 2, 2**32 - 1]
    drawn = {tuple(draw(folder, splits, epoch, seed)) for epoch in range(4) for seed in seeds}
    assert len(drawn) == 16


def test_the_first_epoch_does_not_draw_what_the_weights_were_drawn_from(folder, splits):
    torch.manual_seed(0)
    weights = torch.rand(4).tolist()
    assert all(draw(folder, splits, epoch) != weights for epoch in range(4))


@pytest.mark.parametrize("at", [None, STEP, BEGIN, REPORT])
def test_the_callers_random_numbers_go_on_as_if_nothing_had_been_drawn(folder, splits, at):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    if at is None:
        train_small(folder, splits, augment=True)
    else:
        with interruption(signal.SIGINT, at=at), pytest.raises(Stopped):
            train_small(folder, splits)
    assert torch.equal(torch.rand(3), expected)


# Checkpoints.


def test_checkpoints_are_written_at_the_start_when_due_and_at_the_end(folder, splits, monkeypatch):
    written = []

    def save(checkpoint: dict, path: Path) -> None:
        written.append((checkpoint["epoch"], path))
        save_checkpoint(checkpoint, path)

    monkeypatch.setattr(BEGIN, save)
    train_small(folder, splits, epochs=5, checkpoint_every=2)
    assert written == [(epoch, folder / "checkpoint.pt") for epoch in (0, 2, 4, 5)]


def test_a_checkpoint_holds_all_that_a_run_goes_on_from(finished):
    checkpoint = load_checkpoint(finished / "checkpoint.pt")
    model, *_ = load_model(finished / "checkpoint.pt")
    assert checkpoint["model"].keys() == model.state_dict().keys()
    assert [moments["step"].item() for moments in checkpoint["optimiser"].values()] == [9.0] * 18
    assert checkpoint["epoch"] == 3
    assert 0 < checkpoint["seconds"] < 60
    assert set(checkpoint["events"]) < {
        str(path.relative_to(finished)) for path in finished.rglob("events*")
    }
    expected = vars(Options(**SMALL, dataset="synthetic"))
    assert checkpoint["config"] == expected | {"image_resolution": [8, 8], "image_channels": 3}


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("epochs", [1, 10])  # after the tenth the validation split is looked at
def test_weights_that_the_last_step_made_infinite_are_not_saved(folder, splits, epochs):
    if epochs > 1:
        train_small(folder, splits, epochs=epochs - 1, batch_size=20)
        change(folder, lambda checkpoint: checkpoint["config"].update(learning_rate=1e300))
    message = f"a weight is no longer finite after epoch {epochs - 1}: lower --learning-rate"
    changes = {"learning_rate": 1e300, "batch_size": 20, "epochs": epochs}
    with pytest.raises(FloatingPointError, match=message):
        train_small(folder, splits, "resume" if epochs > 1 else "new", **changes)
    assert load_checkpoint(folder / "checkpoint.pt")["epoch"] == epochs - 1
    load_model(folder / "checkpoint.pt")


def test_time_counts_on_in_a_resumed_run(finished, splits):
    change(finished, lambda checkpoint: checkpoint.update(seconds=1000.0))
    assert 1000 < train_small(finished, splits, "resume", epochs=4)["seconds"] < 1060


def test_a_result_that_cannot_be_written_is_an_error_and_keeps_the_checkpoint(finished, splits):
    (finished / "metrics.json").unlink()
    (finished / "metrics.json").mkdir()
    with pytest.raises(OSError, match=r"metrics\.json is not a file and is not replaced by one"):
        train_small(finished, splits, "resume", epochs=4)
    assert load_checkpoint(finished / "checkpoint.pt")["epoch"] == 4


# Options, pictures and folder that do not fit together.


def test_pictures_of_another_size_than_the_models_are_refused(folder, splits):
    with pytest.raises(ValueError, match=r"pictures are 8x8 with 3 channels, --image-size is 16"):
        train_small(folder, splits, image_size=16)
    assert not folder.exists()


@pytest.mark.parametrize("shape", [(8, 16, 3), (8, 8, 1)])
def test_pictures_that_are_not_square_or_not_rgb_are_refused(folder, splits, shape):
    splits.train.pixels, pixels = torch.zeros(20, *shape, dtype=torch.uint8), splits.train.pixels
    try:
        message = "the pictures are {}x{} with {} channels".format(*shape)
        with pytest.raises(ValueError, match=message):
            train_small(folder, splits)
    finally:
        splits.train.pixels = pixels
    assert not folder.exists()


@pytest.mark.parametrize("name", ["cuda:99", "xpu", "mps", "cpu:x", "meta", "toaster", ""])
def test_a_device_that_is_not_there_is_refused_in_one_line(name):
    with pytest.raises(ValueError, match=f"device {name} is not available here: .+") as error:
        find_device(name)
    assert "\n" not in str(error.value)


def test_the_device_is_an_accelerator_if_there_is_one():
    accelerator = torch.accelerator.is_available()
    assert (find_device("auto").type == "cpu") == (not accelerator)
    assert find_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("start", ["new", "Resume"])
def test_a_finished_run_is_only_gone_on_with_if_that_is_said(finished, splits, start):
    before = content(finished)
    with pytest.raises(ValueError, match=r"exists already|resume or overwrite is needed"):
        train_small(finished, splits, start, epochs=4)
    assert content(finished) == before


# Overwriting.


def test_overwriting_replaces_a_run_whole(finished, splits, tmp_path):
    (finished / "notes.txt").write_text("of the first run")
    (finished / "more").mkdir()
    (finished / "more" / "notes.txt").write_text("of the first run")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious.txt").touch()
    (finished / "link").symlink_to(elsewhere)
    train_small(finished, splits, "overwrite", epochs=2)
    assert not {"notes.txt", "more", "link"} & {path.name for path in finished.iterdir()}
    assert (elsewhere / "precious.txt").exists()
    train_small(finished.with_name("whole"), splits, epochs=2)
    assert_same_run(finished, finished.with_name("whole"))


def test_nothing_is_overwritten_before_the_new_run_begins(finished, splits):
    before = content(finished)
    with pytest.raises(RuntimeError), Run(Options(**SMALL), splits, finished, "overwrite"):
        raise RuntimeError("no memory for the model")
    assert content(finished) == before


def test_a_folder_that_is_no_run_is_not_overwritten(folder, splits):
    folder.mkdir(parents=True)
    (folder / "precious.txt").touch()
    with pytest.raises(ValueError, match="is not a run"):
        train_small(folder, splits, "overwrite")
    assert [path.name for path in folder.iterdir()] == ["precious.txt"]


# Resuming.


def test_resuming_removes_only_what_the_run_itself_wrote_after_its_checkpoint(finished, splits):
    users = [
        *(".my.notes.txt", "notes.txt", ".hidden.unfinished.txt", "loss_curve.png"),
        *("profile/events.out.tfevents.1.mine", "mine/loss_a/events.out.tfevents.1.mine"),
    ]
    runs = [
        *("events.out.tfevents.9.later", ".checkpoint.pt.abc.unfinished"),
        *(f"loss_{name}/events.out.tfevents.9.later" for name in LOSSES),
    ]
    for name in users + runs:
        (finished / name).parent.mkdir(parents=True, exist_ok=True)
        (finished / name).write_text("something")
    train_small(finished, splits, "resume", epochs=4)
    for name in users:
        assert (finished / name).read_text() == "something"
    assert not [name for name in runs if (finished / name).exists()]


def test_more_epochs_are_remembered_before_the_first_of_them_is_saved(finished, splits):
    with interruption(*SIGNALS), pytest.raises(Stopped):
        train_small(finished, splits, "resume", epochs=3000)
    checkpoint = load_checkpoint(finished / "checkpoint.pt")
    assert (checkpoint["config"]["epochs"], checkpoint["epoch"]) == (3000, 3)


def test_a_resumed_run_stays_the_same_experiment(finished, splits):
    before = content(finished)
    with pytest.raises(ValueError, match=r"--beta 1\.0 \(the run has 0\.1\)"):
        train_small(finished, splits, "resume", beta=1.0)
    assert content(finished) == before


def test_a_run_may_have_been_moved_and_renamed(finished, splits):
    moved = finished.rename(finished.with_name("moved"))
    train_small(moved, splits, "resume", epochs=4, run_name="moved", log_dir=str(moved.parent))
    assert len(read_losses(moved)) == 12


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_other_pictures_are_refused(finished, split):
    other = make_splits()
    getattr(other, split).pixels[3, 1, 2, 0] ^= 1
    before = content(finished)
    with pytest.raises(ValueError, match=r"began with other pictures: give .* to --data-root"):
        train_small(finished, other, "resume", epochs=4)
    assert content(finished) == before


def test_another_number_of_threads_is_said_in_one_line_and_no_refusal(finished, splits, capfd):
    change(finished, lambda checkpoint: checkpoint.update(place="cpu (threads: 9)"))
    train_small(finished, splits, "resume", epochs=4)
    threads, version = torch.get_num_threads(), torch.__version__
    before, now = "cpu (threads: 9)", f"cpu (threads: {threads}, torch {version})"
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert line.startswith(f"warning: the run was on {before} and is now on {now}: ")
    assert line.endswith("no longer bit for bit the uninterrupted run")
    assert load_checkpoint(finished / "checkpoint.pt")["place"] == now


@pytest.mark.parametrize("edit", [lambda it: None, lambda it: it.pop("place")], ids=["same", "-"])
def test_nothing_is_said_of_the_same_threads_and_device(finished, splits, capfd, edit):
    change(finished, edit)
    train_small(finished, splits, "resume", epochs=4)
    assert "warning" not in capfd.readouterr().err


def test_threads_that_are_really_more_are_noticed(folder, splits, capfd):
    threads = torch.get_num_threads()
    train_small(folder, splits)
    torch.set_num_threads(threads + 1)
    try:
        train_small(folder, splits, "resume", epochs=4)
    finally:
        torch.set_num_threads(threads)
    assert f"now on cpu (threads: {threads + 1}, torch " in capfd.readouterr().err


def test_a_damaged_checkpoint_is_refused_and_nothing_touched(finished, splits):
    path = finished / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    before = content(finished)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is not a checkpoint of this model"):
        train_small(finished, splits, "resume", epochs=4)
    assert content(finished) == before


REFUSED = {
    "no optimiser": lambda it: it.update(optimiser=None),
    "an optimiser without state": lambda it: it.update(optimiser={}),
    "a parameter without state": lambda it: it["optimiser"].pop(3),
    "states under other names": lambda it: it.update(
        optimiser={str(index): state for index, state in it["optimiser"].items()}
    ),
    "states of other parameters": lambda it: it.update(
        optimiser=dict(enumerate([*it["optimiser"].values()][::-1]))
    ),
    "a moment that is missing": lambda it: it["optimiser"][0].pop("exp_avg"),
    "a moment of another shape": lambda it: it["optimiser"][0].update(exp_avg=torch.zeros(2)),
    "a moment of another type": lambda it: it["optimiser"][0].update(
        exp_avg_sq=it["optimiser"][0]["exp_avg_sq"].double()
    ),
    "a moment that is not finite": lambda it: it["optimiser"][0]["exp_avg"].fill_(float("nan")),
    "a moment that is no tensor": lambda it: it["optimiser"][0].update(exp_avg=0.0),
    "a step of another shape": lambda it: it["optimiser"][0].update(step=torch.ones(3)),
    "a step that is not finite": lambda it: it["optimiser"][0]["step"].fill_(float("inf")),
    "no weights": lambda it: it.update(model={}),
    "a weight of another shape": lambda it: it["model"].update(
        {"encoder.fcm.bias": torch.zeros(3)}
    ),
    "a weight that is not finite": lambda it: it["model"]["encoder.fcm.bias"].fill_(float("nan")),
    **{
        f"an epoch that is {epoch!r}": lambda it, epoch=epoch: it.update(epoch=epoch)
        for epoch in (None, "two", -1, 0.5, 5, float("inf"), float("nan"))
    },
    "a time in words": lambda it: it.update(seconds="long"),
    "events that are none": lambda it: it.update(events=None),
    "pictures without a checksum": lambda it: it.update(pictures=None),
    "a config that is empty": lambda it: it.update(config={}),
    "a config of no run": lambda it: it["config"].update(image_size="large"),
    **{
        f"nothing for {part}": lambda it, part=part: it.pop(part)
        for part in ("optimiser", "epoch", "seconds", "events", "pictures", "model", "config")
    },
}


@pytest.mark.parametrize("edit", REFUSED.values(), ids=REFUSED)
def test_a_checkpoint_that_no_run_can_go_on_from_is_refused_in_one_line(finished, splits, edit):
    change(finished, edit)
    before = content(finished)
    reasons = "cannot be resumed from|not a checkpoint|other pictures|same experiment|is needed"
    with pytest.raises(ValueError, match=reasons) as refused:
        train_small(finished, splits, "resume", epochs=4)
    assert "\n" not in str(refused.value)
    assert content(finished) == before


def test_moments_may_lie_in_memory_in_another_order_than_the_weights(finished, splits):
    def reorder(checkpoint: dict) -> None:
        for moments in checkpoint["optimiser"].values():
            for name, value in moments.items():
                moments[name] = value.contiguous()

    change(finished, reorder)
    train_small(finished, splits, "resume", epochs=4)
    train_small(finished.with_name("whole"), splits, epochs=4)
    assert_same_run(finished, finished.with_name("whole"))


def test_what_was_written_after_the_checkpoint_is_cut_off_to_the_byte(finished, splits):
    sizes = load_checkpoint(finished / "checkpoint.pt")["events"]
    for name in sizes:
        with open(finished / name, "ab") as file:
            file.write(b"half an event")
    train_small(finished, splits, "resume", epochs=4)
    assert {name: (finished / name).stat().st_size for name in sizes} == sizes
    assert len(read_losses(finished)) == 12
