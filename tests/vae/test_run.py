import builtins
import errno
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from conftest import SmallPictures
from filelock import FileLock
from helpers import (
    REPORT,
    SMALL,
    STEP,
    assert_same_run,
    interruption,
    read_events,
    read_losses,
    through_mean,
    train_small,
    write_checkpoint,
)
from torch import nn

from datasets.preprocessing import UserError
from vae.run import (
    Run,
    Stopped,
    command_line,
    find_device,
    load_checkpoint,
    load_model,
    one_line_errors,
    quote,
    replace_atomically,
    saved_options,
)
from vae.vae import VAE
from vae_training import Options, main

SIGNALS = (signal.SIGINT, signal.SIGTERM)
START = "vae_training.VAE"


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "runs" / "run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a small run that has ended, to look at."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train_small(folder)
    return folder


@pytest.fixture
def finished(whole, folder) -> Path:
    """The folder of a small run that has ended, to go on with."""
    return shutil.copytree(whole, folder)


@pytest.fixture
def path(tmp_path) -> Path:
    """A good checkpoint."""
    return write_checkpoint(tmp_path / "checkpoint.pt", VAE((8, 8), 2, 3))


def open_run(folder: Path, **changes: Any) -> Run:
    return Run(Options(**SMALL | changes), folder)


def content(folder: Path) -> dict[str, bytes]:
    """Everything in a folder but the lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Write a checkpoint anew with a change."""
    checkpoint = load_checkpoint(path)
    edit(checkpoint)
    torch.save(checkpoint, path)


# The folder.

HOLD = "from filelock import *; it = FileLock({!r}); it.acquire(); print(1, flush=True); input()"


def test_a_folder_that_another_process_writes_to_is_left_alone_until_it_ends(finished):
    command = [sys.executable, "-c", HOLD.format(str(finished / ".lock"))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    before = content(finished)
    with subprocess.Popen(command, **pipes) as holder:
        assert holder.stdout.readline() == b"1\n"
        with pytest.raises(UserError, match=f"another run is writing to {finished}: wait for it"):
            train_small(finished, True, epochs=4)
        assert content(finished) == before
        holder.kill()
    train_small(finished, True, epochs=4)


def test_a_run_holds_its_lock_to_the_end_and_no_longer(folder):
    with open_run(folder), pytest.raises(UserError, match="another run is writing to"):
        train_small(folder)
    with FileLock(folder / ".lock", timeout=0) as lock:
        assert lock.is_locked


@pytest.mark.parametrize("name", ["precious.txt", "events.out.tfevents.1"])
def test_a_new_run_begins_in_no_folder_that_holds_anything(finished, folder, name):
    before = content(finished)
    with pytest.raises(UserError, match=r"is not empty: take another \(--run-name\) or --resume"):
        train_small(finished)
    assert content(finished) == before
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / name).touch()
    with pytest.raises(UserError, match="is not empty"):
        train_small(folder)
    with pytest.raises(UserError, match=r"has no checkpoint\.pt: give the folder of a run"):
        train_small(folder, True)
    assert [path.name for path in folder.iterdir()] == [name]


def test_paths_in_a_runs_options_are_whole_so_that_it_is_resumed_from_any_folder(
    folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    options = open_run(folder, dataset="pictures", data_root="data").options
    assert (options.dataset, options.data_root) == (f"{tmp_path}/pictures", f"{tmp_path}/data")


@pytest.mark.parametrize("name", ["cuda:99", "xpu", "mps", "cpu:x", "meta", "toaster", ""])
def test_a_device_that_is_not_there_is_refused_in_one_line(name):
    with pytest.raises(UserError, match=f"device {name} is not available here: .+") as error:
        find_device(name)
    assert "\n" not in str(error.value)


def test_the_device_is_an_accelerator_if_there_is_one():
    assert (find_device("auto").type == "cpu") == (not torch.accelerator.is_available())
    assert find_device("cpu") == torch.device("cpu")


# Signals.


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("step", [1, 5, 6])
def test_a_signal_waits_for_the_end_of_the_epoch_and_its_checkpoint(folder, number, step):
    with interruption(number, call=step), pytest.raises(Stopped) as stopped:
        train_small(folder)
    epochs = 1 + (step - 1) // 3
    assert stopped.value.args == (number, folder)
    assert len(read_losses(folder)) == 3 * epochs
    assert [epoch for epoch, _ in read_events(folder)["."]["originals"]] == list(range(epochs))
    assert load_checkpoint(folder / "checkpoint.pt")["epoch"] == epochs


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_of_any_kind_stops_at_once(folder, first, second):
    with interruption(first, second, call=5), pytest.raises(Stopped) as stopped:
        train_small(folder, checkpoint_every=1)
    assert stopped.value.args == (second, folder)
    assert load_checkpoint(folder / "checkpoint.pt")["epoch"] == 1


@pytest.mark.parametrize("at", [START, STEP])
def test_a_run_that_ended_before_its_first_checkpoint_may_begin_anew(folder, whole, at):
    with interruption(*SIGNALS, at=at), pytest.raises(Stopped):
        train_small(folder)
    assert not (folder / "checkpoint.pt").exists()
    train_small(folder)
    assert_same_run(folder, whole)


def test_a_signal_during_the_report_stops_at_once_and_the_report_is_made_again(folder, whole):
    with interruption(signal.SIGINT, at=REPORT), pytest.raises(Stopped):
        train_small(folder)
    assert not (folder / "metrics.json").exists()
    train_small(folder, True)
    assert_same_run(folder, whole)


@pytest.mark.parametrize("at", [None, START, STEP, REPORT])
def test_signals_and_random_numbers_are_given_back_after_a_run(folder, at):
    before = [signal.getsignal(number) for number in SIGNALS]
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    if at is None:
        train_small(folder, augment=True)
    else:
        with interruption(signal.SIGTERM, at=at), pytest.raises(Stopped):
            train_small(folder)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert torch.equal(torch.rand(3), expected)


def test_a_run_in_another_thread_leaves_signals_to_the_main_thread(folder):
    before, during = [signal.getsignal(number) for number in SIGNALS], []

    def run() -> None:
        with open_run(folder):
            during.extend(signal.getsignal(number) for number in SIGNALS)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert during == before


def test_stopped_says_how_to_go_on_and_survives_pickling(folder):
    stopped = pickle.loads(pickle.dumps(Stopped(signal.SIGTERM, folder)))
    assert stopped.args == (signal.SIGTERM, folder)
    again = "train(options, folder, resume=True) goes on"
    assert str(stopped) == f"Stopped by SIGTERM; {again} with {folder}"


# Random numbers and schedules.


def draw(folder: Path, epoch: int, seed: int = 0, before: int = 0) -> list[float]:
    with open_run(folder, seed=seed) as run:
        torch.rand(before)
        run.seed(epoch)
        return torch.rand(4).tolist()


def test_all_chance_follows_from_seed_and_epoch_and_no_two_of_them_draw_the_same(folder):
    assert draw(folder, epoch=2) == draw(folder, epoch=2, before=7)
    seeds = [0, 1, 2, 2**32 - 1]
    drawn = {tuple(draw(folder, epoch, seed)) for epoch in range(4) for seed in seeds}
    torch.manual_seed(0)
    assert len(drawn | {tuple(torch.rand(4).tolist())}) == 17


def test_the_linear_schedule_of_beta_rises_from_0_and_stays(folder):
    run = open_run(folder, beta=0.5, beta_schedule="linear", warmup_epochs=4)
    assert [run.beta_at(epoch) for epoch in range(6)] == [0, 0.125, 0.25, 0.375, 0.5, 0.5]
    assert open_run(folder, beta_schedule="linear", warmup_epochs=0).beta_at(0) == 0


def test_the_cyclical_schedule_of_beta_rises_in_the_first_half_of_each_cycle(folder):
    run = open_run(folder, beta=0.5, beta_schedule="cyclical", cycles=2, epochs=16)
    assert [run.beta_at(epoch) for epoch in range(16)] == [0, 0.125, 0.25, 0.375, *4 * [0.5]] * 2
    run = open_run(folder, beta_schedule="cyclical", cycles=50, epochs=100)
    assert run.beta_at(58) == 0  # which floating-point numbers would make the end of a cycle


def test_the_cosine_schedule_of_the_learning_rate_falls_to_0(folder):
    run = open_run(folder, learning_rate=0.2, lr_schedule="cosine", epochs=100)
    rates = [run.learning_rate_at(epoch) for epoch in (0, 50, 100)]
    assert rates == pytest.approx([0.2, 0.1, 0])
    assert run.beta_at(50) == 0.1  # without a schedule


# Saving and going on.


def test_checkpoints_are_written_when_due_and_at_the_end(folder, monkeypatch):
    written = []

    def save(checkpoint: dict, file: BinaryIO, real: Any = torch.save) -> None:
        written.append((checkpoint["epoch"], "latents" in checkpoint))
        real(checkpoint, file)

    monkeypatch.setattr(torch, "save", save)
    train_small(folder, epochs=5, checkpoint_every=2)
    assert written == [(2, False), (4, False), (5, False), (5, True)]


def test_a_checkpoint_holds_all_that_a_run_goes_on_from(finished):
    checkpoint = load_checkpoint(finished / "checkpoint.pt")
    assert checkpoint["model"].keys() == VAE((8, 8), 2, 3).state_dict().keys()
    assert [moments["step"].item() for moments in checkpoint["optimiser"].values()] == [9.0] * 18
    assert checkpoint["epoch"] == 3
    expected = asdict(Options(**SMALL))
    assert checkpoint["config"] == expected | {"image_resolution": [8, 8], "image_channels": 3}
    assert vars(saved_options(Options, finished)) == expected


def test_weights_that_are_not_finite_are_not_saved(folder, finished):
    # The validation split is looked at after the tenth epoch.
    train_small(folder, True, epochs=9)
    edit = {"learning_rate": 1e300}
    change(folder / "checkpoint.pt", lambda checkpoint: checkpoint["config"].update(edit))
    with pytest.raises(FloatingPointError, match="not finite in epoch 9: lower --learning"):
        train_small(folder, True, **edit, epochs=10)
    assert load_checkpoint(folder / "checkpoint.pt")["epoch"] == 9


def test_a_stopped_run_may_be_moved_and_renamed(folder, whole, tmp_path):
    with interruption(signal.SIGINT), pytest.raises(Stopped):
        train_small(folder)
    moved = folder.rename(tmp_path / "moved")
    train_small(moved, True)
    assert_same_run(moved, whole)


def test_a_finished_run_that_grows_ends_as_if_it_had_been_longer(finished, tmp_path):
    metrics = [train_small(finished, True, epochs=4), train_small(tmp_path / "whole", epochs=4)]
    for name in ("train", "val", "test", "samples", "pca"):
        assert metrics[0][name] == metrics[1][name]
    assert (read_losses(finished) == read_losses(tmp_path / "whole")).all()


def test_a_finished_run_is_measured_again_and_is_the_same(folder, tmp_path):
    train_small(folder, batch_norm=True)
    before = shutil.copytree(folder, tmp_path / "before")
    train_small(folder, True, batch_norm=True)
    assert_same_run(folder, before)


def test_time_counts_on_in_a_resumed_run(finished):
    change(finished / "checkpoint.pt", lambda checkpoint: checkpoint.update(seconds=1000.0))
    assert 1000 < train_small(finished, True, epochs=4)["seconds"] < 1060


CHANGED = {
    "beta": ({"epochs": 4, "beta": 1.0}, r"stays the same .*--beta 1\.0 \(the run has 0\.1\)"),
    "epochs": ({"epochs": 2}, r"--epochs 2 \(the run has 3\)"),
}


@pytest.mark.parametrize(("changes", "message"), CHANGED.values(), ids=CHANGED)
def test_a_resumed_run_stays_the_same_experiment(finished, changes, message):
    before = content(finished)
    with pytest.raises(UserError, match=message):
        train_small(finished, True, **changes)
    assert content(finished) == before


@pytest.mark.parametrize("schedule", [{"lr_schedule": "cosine"}, {"beta_schedule": "cyclical"}])
def test_a_run_with_a_schedule_does_not_grow(folder, schedule):
    train_small(folder, **schedule)
    with pytest.raises(
        UserError, match=r"may grow with constant schedules\): leave out --epochs 4"
    ):
        train_small(folder, True, epochs=4, **schedule)


def test_other_pictures_are_refused(finished, monkeypatch):
    monkeypatch.setattr(SmallPictures, "sizes", SmallPictures.sizes | {"val": 7})
    with pytest.raises(UserError, match="pictures were added, removed or changed since"):
        train_small(finished, True, epochs=4)


REFUSED = {
    "no optimiser": lambda it: it.update(optimiser=None),
    "a parameter without moments": lambda it: it["optimiser"].pop(3),
    "a moment of another shape": lambda it: it["optimiser"][0].update(exp_avg=torch.zeros(2)),
    "a weight that is missing": lambda it: it["model"].pop("encoder.fcm.bias"),
    "an epoch too late": lambda it: it.update(epoch=5),
    "an epoch that is none": lambda it: it.update(epoch=0.5),
    "a time in words": lambda it: it.update(seconds="long"),
    **{
        f"nothing for {part}": lambda it, part=part: it.pop(part)
        for part in ("optimiser", "epoch", "seconds", "pictures", "model", "config")
    },
}


@pytest.mark.parametrize("edit", REFUSED.values(), ids=REFUSED)
def test_a_checkpoint_that_no_run_can_go_on_from_is_refused_in_one_line(finished, edit):
    checkpoint = load_checkpoint(finished / "checkpoint.pt")
    edit(checkpoint)
    torch.save(checkpoint, finished / "checkpoint.pt")
    before = content(finished)
    with pytest.raises(UserError, match=r"checkpoint\.pt is|changed since|same exp") as refused:
        train_small(finished, True, epochs=4)
    assert "\n" not in str(refused.value)
    assert content(finished) == before


def test_a_checkpoint_with_options_of_another_version_is_refused_in_one_line(finished, capsys):
    change(finished / "checkpoint.pt", lambda checkpoint: checkpoint["config"].pop("crop"))
    with pytest.raises(SystemExit) as stop:
        main(["--resume", str(finished)])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# Checkpoints.


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error), replace_atomically(path) as file:
        file.write(b"half of the new")
        file.flush()
        assert path.read_bytes() == b"old"
        raise error
    assert content(tmp_path) == {"file": b"old"}


def test_what_a_link_points_to_is_replaced_and_what_is_no_file_is_not(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with replace_atomically(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"new"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="is not a file"), replace_atomically(tmp_path / "folder"):
        pass


@pytest.mark.parametrize("make", [lambda path: None, os.mkdir, os.mkfifo])
def test_a_checkpoint_that_is_no_file_is_refused(tmp_path, make):
    make(tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match=r"checkpoint\.pt is not a file"):
        load_checkpoint(tmp_path / "checkpoint.pt")


DAMAGES = {
    "empty": lambda content: b"",
    "cut off": lambda content: content[:-1000],
    "another file": lambda content: b"\xff\xd8\xff\xe0" + bytes(5000),
    "flipped bits": lambda content: content[:9000] + bytes([content[9000] ^ 255]) + content[9001:],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_one_line_that_names_it(path, damage):
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"checkpoint\.pt is damaged, or no ch.*: .") as refused:
        load_checkpoint(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [3, [1], torch.ones(2), {}, {"model": {}}, {"config": {}}])
def test_a_foreign_checkpoint_is_refused(path, content):
    torch.save(content, path)
    with pytest.raises(UserError, match=r"checkpoint\.pt is damaged, or no checkpoint of this"):
        load_checkpoint(path)


class CreatesFile:
    """Unpickled carelessly, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(path, tmp_path):
    torch.save({"model": CreatesFile(tmp_path / "victim"), "config": {}}, path)
    with pytest.raises(UserError, match=r"checkpoint\.pt is damaged, or no checkpoint"):
        load_checkpoint(path)
    assert not (tmp_path / "victim").exists()


def test_a_slip_in_the_layers_is_not_taken_for_a_damaged_checkpoint(path, monkeypatch):
    for slip, error in ((lambda: None, TypeError), (lambda *_: nn.Sigmod(), AttributeError)):
        monkeypatch.setattr("vae.vae.Decoder", slip)
        with pytest.raises(error):
            load_model(path)
    monkeypatch.delattr("vae.vae.Decoder")
    with pytest.raises(NameError):
        load_model(path)


@pytest.mark.parametrize(
    ("size", "latent_size", "channels", "batch_norm"),
    [((16, 24), 2, 3, False), ((8, 8), 7, 1, False), ((8, 16), 2, 3, True)],
)
def test_a_model_is_rebuilt_ready_for_inference(tmp_path, size, latent_size, channels, batch_norm):
    model = VAE(size, latent_size, channels, batch_norm)
    x = torch.rand(4, channels, *size)
    model(x)  # gives batch norm statistics of its own
    path = write_checkpoint(tmp_path / "checkpoint.pt", model, beta=0.3)
    rebuilt, config, latents = load_model(path)
    assert config["beta"] == 0.3
    assert not rebuilt.training
    assert torch.equal(through_mean(rebuilt, x), through_mean(model.eval(), x))
    saved = load_checkpoint(path)["latents"]
    assert torch.equal(latents.mean, saved["mean"])
    assert torch.equal(latents.covariance_matrix, saved["covariance"])


def test_before_a_runs_end_a_checkpoint_has_no_latents(path):
    change(path, lambda checkpoint: checkpoint.pop("latents"))
    assert load_model(path)[2] is None


MISFITS = {
    "latent size": lambda it: it["config"].update(latent_size=3),
    "a huge latent size": lambda it: it["config"].update(latent_size=10**30),
    "resolution": lambda it: it["config"].update(image_resolution=8),
    "batch norm": lambda it: it["config"].update(batch_norm=True),
    "no channels": lambda it: it["config"].pop("image_channels"),
    "a foreign weight": lambda it: it["model"].update(more=torch.zeros(2)),
    "an infinite weight": lambda it: it["model"]["encoder.fcm.bias"].fill_(float("inf")),
    "latents of another size": lambda it: it["latents"].update(mean=torch.zeros(3)),
    "a covariance of none": lambda it: it["latents"].update(covariance=-torch.eye(2)),
    "no covariance": lambda it: it["latents"].pop("covariance"),
    "latents in words": lambda it: it.update(latents="N(0, I)"),
}


@pytest.mark.parametrize("edit", MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_the_model_is_refused_in_one_line(path, edit):
    change(path, edit)
    with pytest.raises(UserError, match=r"checkpoint\.pt is damaged, or no ch.*: .") as refused:
        load_model(path)
    assert "\n" not in str(refused.value)


# A program's last line.


def ending(error: BaseException, capsys) -> tuple[int, str]:
    """The exit status and the last words of a program in which ``error`` is raised."""
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise error
    return stop.value.code, capsys.readouterr().err


MEMORY = "error: too little memory, take a smaller model or batch"
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a")
ENDINGS = [
    (UserError("--epochs is 0"), 2, "error: --epochs is 0"),
    (FloatingPointError("the loss is nan"), 1, "error: the loss is nan"),
    (FULL, 1, "error: [Errno 28] No space left on device: 'runs/a'"),
    (MemoryError(), 1, f"{MEMORY} (MemoryError)"),
    (torch.OutOfMemoryError("CUDA out of memory.\nGPU 0"), 1, f"{MEMORY} (CUDA out of memory.)"),
    (KeyboardInterrupt(), 130, "Stopped"),
    (Stopped(signal.SIGINT, Path("nowhere")), 130, "Stopped by SIGINT."),
    (Stopped(signal.SIGTERM, Path("nowhere")), 143, "Stopped by SIGTERM."),
]


@pytest.mark.parametrize(("error", "status", "line"), ENDINGS, ids=[repr(it[0]) for it in ENDINGS])
def test_what_a_user_can_change_becomes_one_line_and_an_exit_status(error, status, line, capsys):
    assert ending(error, capsys) == (status, f"{line}\n")


@pytest.mark.parametrize("error", [ValueError, TypeError, RuntimeError, KeyError, AssertionError])
def test_a_mistake_in_the_code_keeps_its_traceback(error):
    with pytest.raises(error), one_line_errors():
        raise error("a mistake")


def test_a_stopped_program_prints_the_command_that_goes_on(path, capsys, monkeypatch):
    monkeypatch.chdir(path.parent.parent)
    status, text = ending(Stopped(signal.SIGINT, Path(path.parent.name)), capsys)
    first, command = text.splitlines()
    assert (status, first) == (130, "Stopped by SIGINT. Go on with:")
    assert shlex.split(command) == [sys.executable, sys.argv[0], "--resume", str(path.parent)]


def test_a_command_works_in_a_terminal_and_in_ipython(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["my code/vae_training.py", "--epochs=3"])
    words = ["my code/vae_training.py", "--resume", "my runs/it's"]
    assert shlex.split(command_line(*words[1:])) == [sys.executable, *words]
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)
    run, *rest = shlex.split(command_line(*words[1:]))
    assert (run, rest) == ("%run", words)


def test_a_command_is_quoted_for_the_shell_of_the_system(monkeypatch):
    assert quote(["a b", "c"]) == "'a b' c"
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        quoted = quote(["a b", "c"])
    assert quoted == '"a b" c'
