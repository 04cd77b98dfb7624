import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, make_dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import SmallPictures
from filelock import FileLock
from helpers import (
    SMALL,
    assert_same_run,
    interruption,
    read_events,
    read_losses,
    tensors_in,
    train_small,
    write_photograph,
)
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from datasets.errors import UserError
from vae.checkpoint import load_checkpoint, saved_options
from vae.run import Run, Stopped, find_device
from vae.vae import VAE
from vae_training import DATASETS, Options, train

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopsWhenRead(SmallPictures):
    """Pictures that send this process SIGTERM when the test split is read, before any epoch."""

    def __getitem__(self, index: int):
        if self._split == "test":
            signal.raise_signal(signal.SIGTERM)
        return super().__getitem__(index)


class BreaksWhenRead(SmallPictures):
    """Pictures whose disk breaks when the test split is read."""

    def __getitem__(self, index: int):
        if self._split == "test":
            raise OSError("the disk is broken")
        return super().__getitem__(index)


@pytest.fixture(scope="module", autouse=True)
def _more_pictures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "stops", StopsWhenRead)
        patch.setitem(DATASETS, "breaks", BreaksWhenRead)
        yield


@dataclass(frozen=True)
class Plain:
    """The options that every run needs."""

    seed: int = 0
    epochs: int = 3
    device: str = "cpu"
    checkpoint_every: int = 10


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


def content(folder: Path) -> dict[str, bytes]:
    """Everything in a folder but the lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def edit_checkpoint(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Write a run's checkpoint anew with a change."""
    checkpoint = load_checkpoint(folder / "checkpoint.pt")
    edit(checkpoint)
    torch.save(checkpoint, folder / "checkpoint.pt")


def stop_in_the_report(folder: Path) -> None:
    # The encoder is called in three steps and for one look in each of three epochs; then measured.
    with interruption(signal.SIGINT, at="Encoder", call=3 * (3 + 1) + 1), pytest.raises(Stopped):
        train_small(folder)


# The folder.

HOLD = "from filelock import *; it = FileLock({!r}); it.acquire(); print(1, flush=True); input()"


def test_a_folder_that_another_process_writes_to_is_left_alone_until_it_ends(finished):
    command = [sys.executable, "-c", HOLD.format(str(finished / ".lock"))]
    before = content(finished)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline().split() == [b"1"]
        refusal = re.escape(f"another run is writing to {finished}: wait for it")
        with pytest.raises(UserError, match=refusal):
            train_small(finished, True, epochs=4)
        assert content(finished) == before
        holder.kill()
    train_small(finished, True, epochs=4)


def test_a_run_holds_its_lock_to_the_end_and_no_longer(folder):
    with Run(Plain(), folder), pytest.raises(UserError, match="another run is writing to"):
        train_small(folder)
    with FileLock(folder / ".lock", timeout=0) as lock:
        assert lock.is_locked


def test_a_new_run_does_not_begin_in_a_runs_folder(finished):
    before = content(finished)
    with pytest.raises(UserError, match=r"is not empty: take another \(--run-name\) or --resume"):
        train_small(finished)
    assert content(finished) == before


@pytest.mark.parametrize("name", ["precious.txt", "events.out.tfevents.1"])
def test_a_run_neither_begins_nor_goes_on_in_a_folder_that_holds_anything_else(folder, name):
    folder.mkdir(parents=True)
    (folder / name).touch()
    with pytest.raises(UserError, match="is not empty"):
        train_small(folder)
    with pytest.raises(UserError, match=r"has no checkpoint\.pt: give the folder of a run"):
        train_small(folder, True)
    assert [path.name for path in folder.iterdir()] == [name]


def test_to_resume_a_folder_that_is_not_there_makes_none(folder):
    with pytest.raises(UserError, match=r"has no checkpoint\.pt: give the folder of a run"):
        train_small(folder, True)
    assert not folder.parent.exists()


def test_paths_in_a_runs_options_are_whole_so_that_it_is_resumed_from_any_folder(
    folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    kind = make_dataclass("WithPaths", [("near", Path), ("home", Path), ("name", str)], frozen=True)
    with_paths = make_dataclass("Own", [], bases=(Plain, kind), frozen=True)
    given = {"near": Path("a/../data"), "home": Path("~/data"), "name": "data"}
    options = Run(with_paths(**given), folder).options
    assert options.near == tmp_path / "data"
    assert options.home == Path.home() / "data"
    assert options.name == "data"


# The device.


MAC = pytest.mark.skipif(torch.backends.mps.is_available(), reason="this is a Mac, which has it")
INTEL = pytest.mark.skipif(torch.xpu.is_available(), reason="an Intel GPU is here")


@pytest.mark.parametrize(
    "name",
    [
        "cuda:99",
        pytest.param("mps", marks=MAC),
        pytest.param("xpu", marks=INTEL),
        "cpu:x",
        "meta",
        "toaster",
        "",
    ],
)
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


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_says_at_once_what_it_waits_for_and_what_a_second_one_does(
    folder, number, capsys
):
    with Run(Plain(), folder) as run:
        run.start_or_resume({"model": nn.Linear(1, 1)}, {}, [])
        signal.raise_signal(number)
        said = capsys.readouterr()
    name = signal.Signals(number).name
    line = f"{name}: finishing the epoch, then saving; once more (Ctrl-C) stops at once\n"
    assert said.err.lstrip("\n") == line  # below the progress bar
    assert not said.out


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_of_any_kind_stops_at_once(folder, first, second):
    with interruption(first, second, call=5), pytest.raises(Stopped) as stopped:
        train_small(folder, checkpoint_every=1)
    assert stopped.value.args == (second, folder)
    assert load_checkpoint(folder / "checkpoint.pt")["epoch"] == 1


def test_a_signal_before_the_first_epoch_stops_at_once_and_the_run_may_begin_anew(folder, whole):
    with pytest.raises(Stopped) as stopped:
        train_small(folder, dataset="stops")
    assert stopped.value.args == (signal.SIGTERM, folder)
    assert not content(folder)
    train_small(folder)
    assert_same_run(folder, whole)


def test_nothing_of_a_start_without_checkpoint_is_left_in_the_run_that_begins_anew(folder, whole):
    with interruption(*SIGNALS, call=2), pytest.raises(Stopped):
        train_small(folder, beta=5.0)
    assert list(read_events(folder)["."]) == ["schedule/beta", "schedule/learning_rate"]
    train_small(folder)
    assert_same_run(folder, whole)
    assert read_events(folder) == read_events(whole)  # which has no point twice


def test_a_signal_during_the_report_stops_at_once_and_the_report_is_made_again(folder, whole):
    stop_in_the_report(folder)
    assert not (folder / "metrics.json").exists()
    train_small(folder, True)
    assert_same_run(folder, whole)


def test_a_run_in_another_thread_leaves_signals_to_the_main_thread(folder):
    before, during = [signal.getsignal(number) for number in SIGNALS], []

    def run() -> None:
        with Run(Plain(), folder):
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


# Random numbers.

GENERATORS = {
    "PyTorch": lambda: torch.rand(4).tolist(),
    "NumPy": lambda: np.random.rand(4).tolist(),
    "Python": lambda: [random.random() for _ in range(4)],
}


def draw_from_all() -> list[list[float]]:
    return [draw() for draw in GENERATORS.values()]


def seed_all(seed: int) -> None:
    """Seed them otherwise than a run does."""
    torch.manual_seed(seed)
    np.random.seed(seed + 1)
    random.seed(seed + 2)


@pytest.mark.parametrize("draw", GENERATORS.values(), ids=GENERATORS)
def test_all_chance_follows_from_seed_and_epoch_and_no_two_of_them_draw_the_same(folder, draw):
    def drawn(epoch: int, seed: int = 0, before: int = 0) -> tuple[float, ...]:
        with Run(Plain(seed=seed), folder) as run:
            for _ in range(before):
                draw_from_all()
            run.seed(epoch)
            return tuple(draw())

    def drawn_first(seed: int) -> tuple[float, ...]:
        with Run(Plain(seed=seed), folder):
            return tuple(draw())

    assert drawn(epoch=2) == drawn(epoch=2, before=7)
    assert drawn_first(1) == drawn_first(1)
    seeds = [0, 1, 2, 2**32 - 1]
    epochs = {drawn(epoch, seed) for epoch in range(4) for seed in seeds}
    assert len(epochs | {drawn_first(seed) for seed in seeds}) == 20


def end_well(folder: Path) -> None:
    train_small(folder, augment=True)


def stop_before_the_first_epoch(folder: Path) -> None:
    with pytest.raises(Stopped):
        train_small(folder, dataset="stops")


def stop_in_a_step(folder: Path) -> None:
    with interruption(*SIGNALS, call=5), pytest.raises(Stopped):
        train_small(folder)


def break_while_pictures_are_read(folder: Path) -> None:
    with pytest.raises(UserError, match="the disk is broken"):
        train_small(folder, dataset="breaks")


def diverge(folder: Path) -> None:
    with pytest.raises(FloatingPointError):
        train_small(folder, learning_rate=1e30)


def fail_at_the_last_thing_that_is_taken(folder: Path) -> object:
    # A seed that PyTorch takes and NumPy does not. Lock, random numbers and signals are taken.
    failure = pytest.raises(ValueError, match="Seed must be between 0")
    with failure as raised, Run(Plain(seed=-1), folder):
        pass
    return raised  # with its frames: what is given back is not given back by forgetting them


def be_refused(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "precious.txt").touch()
    with pytest.raises(UserError, match="is not empty"):
        train_small(folder)


ENDS = [
    end_well,
    stop_before_the_first_epoch,
    stop_in_a_step,
    stop_in_the_report,
    break_while_pictures_are_read,
    diverge,
    fail_at_the_last_thing_that_is_taken,
    be_refused,
]


@pytest.mark.parametrize("end", ENDS, ids=[end.__name__ for end in ENDS])
def test_signals_random_numbers_and_lock_are_given_back_however_a_run_ends(folder, end):
    before = [signal.getsignal(number) for number in SIGNALS]
    seed_all(11)
    expected = draw_from_all()
    seed_all(11)
    kept = end(folder)
    assert draw_from_all() == expected
    assert [signal.getsignal(number) for number in SIGNALS] == before
    with FileLock(folder / ".lock", timeout=0) as lock:
        assert lock.is_locked
    del kept


# Saving.


def test_checkpoints_are_written_when_due_and_at_the_end_and_get_latents_last(folder):
    there = []

    def look(*_: Any) -> None:
        """Note the checkpoint that is there when a module is called."""
        path = folder / "checkpoint.pt"
        checkpoint = load_checkpoint(path) if path.exists() else {"epoch": None}
        there.append((checkpoint["epoch"], "latents" in checkpoint))

    def look_at_the_loss(module: nn.Module, _: Any) -> None:
        if type(module).__name__ == "ELBOLoss":
            look()

    with register_module_forward_pre_hook(look_at_the_loss):
        train_small(folder, epochs=5, checkpoint_every=2)
    assert there[:15] == 6 * [(None, False)] + 6 * [(2, False)] + 3 * [(4, False)]
    assert set(there[15:]) == {(5, False)}  # while the report measures
    look()
    assert there[-1] == (5, True)


def test_a_checkpoint_holds_all_that_a_run_goes_on_from(finished):
    checkpoint = load_checkpoint(finished / "checkpoint.pt")
    state = checkpoint["state"]
    assert state.keys() == {"model", "loss", "optimiser", "scheduler"}
    assert state["model"].keys() == VAE((8, 8), 2, 3).state_dict().keys()
    steps = [x.item() for name, x in tensors_in(state["optimiser"]) if name.endswith(".step")]
    assert steps == [9.0] * 18
    assert checkpoint["epoch"] == state["scheduler"]["last_epoch"] == 3
    assert checkpoint["architecture"] == {
        "image_resolution": (8, 8),
        "latent_size": 2,
        "image_channels": 3,
        "batch_norm": False,
    }
    options = saved_options(Options, checkpoint, finished / "checkpoint.pt")
    assert vars(options) == asdict(Options(**SMALL))


def test_what_a_checkpoint_cannot_hold_is_named_before_the_first_epoch(folder):
    own = make_dataclass("Own", [("activation", type, nn.GELU)], bases=(Plain,), frozen=True)
    message = r"checkpoint\['options'\]\['activation'\] is of type type$"
    with Run(own(), folder) as run, pytest.raises(TypeError, match=message):
        run.start_or_resume({"model": nn.Linear(1, 1)}, {}, [])


def test_weights_that_are_not_finite_are_not_saved(folder):
    # The validation split is looked at after the tenth epoch.
    train_small(folder, epochs=9)

    def learn_too_fast(checkpoint: dict[str, Any]) -> None:
        for group in checkpoint["state"]["optimiser"]["param_groups"]:
            group["lr"] = 1e300

    edit_checkpoint(folder, learn_too_fast)
    refusal = (
        r"a weight of the model is not finite after epoch 9: lower --learning-rate\. The last check"
    )
    with pytest.raises(FloatingPointError, match=refusal):
        train_small(folder, True, epochs=10)
    assert load_checkpoint(folder / "checkpoint.pt")["epoch"] == 9


def test_weights_of_any_module_in_the_state_are_looked_at(folder):
    loss = nn.Linear(1, 1)
    with Run(Plain(), folder) as run:
        run.start_or_resume({"model": nn.Linear(1, 1), "loss": loss}, {}, [])
        run.end_epoch(0)
        loss.bias.data[0] = float("inf")
        with pytest.raises(
            FloatingPointError, match="a weight of the loss is not finite after epoch 1"
        ):
            run.end_epoch(1)


def test_a_loss_that_is_not_finite_in_the_end_has_no_report(folder):
    # One step: its loss is finite, and so are the weights after it. Then no step is left.
    with pytest.raises(FloatingPointError, match="the loss is not finite after epoch 0"):
        train_small(folder, epochs=1, batch_size=64, learning_rate=1e30)
    assert np.isfinite(read_losses(folder)).all()
    tensors = tensors_in(load_checkpoint(folder / "checkpoint.pt"))
    assert all(tensor.isfinite().all() for _, tensor in tensors)
    assert not (folder / "metrics.json").exists()


# Going on.


def test_any_code_goes_on_from_its_state(folder):
    def train_own(epochs: int, resume: bool) -> tuple[int, nn.Module]:
        with Run(Plain(epochs=epochs), folder, resume) as run:
            model = nn.Linear(1, 1, bias=False)
            nn.init.zeros_(model.weight)
            first_epoch = run.start_or_resume({"model": model}, {"size": 1}, [])
            for epoch in range(first_epoch, epochs):
                model.weight.data += 1
                run.end_epoch(epoch)
            return first_epoch, model

    train_own(2, resume=False)
    first_epoch, model = train_own(5, resume=True)
    assert (first_epoch, model.weight.item()) == (2, 5)
    assert load_checkpoint(folder / "checkpoint.pt")["architecture"] == {"size": 1}


def test_a_stopped_run_may_be_moved_and_renamed(folder, whole, tmp_path):
    with interruption(signal.SIGINT), pytest.raises(Stopped):
        train_small(folder)
    moved = folder.rename(tmp_path / "moved")
    train_small(moved, True)
    assert_same_run(moved, whole)


def test_a_finished_run_that_grows_ends_as_if_it_had_been_longer(finished, tmp_path):
    grown, longer = train_small(finished, True, epochs=4), train_small(tmp_path / "4", epochs=4)
    for name in ("train", "val", "test", "samples", "pca"):
        assert grown[name] == longer[name]
    assert (read_losses(finished) == read_losses(tmp_path / "4")).all()


def test_a_finished_run_says_that_it_has_ended_and_makes_only_its_report_again(
    folder, tmp_path, capsys
):
    train_small(folder, batch_norm=True)
    before = shutil.copytree(folder, tmp_path / "before")
    (folder / "metrics.json").unlink()
    train(Options(**SMALL, batch_norm=True), folder, resume=True)
    output = capsys.readouterr().out
    assert " has ended after its 3 epochs: only its report is made again on cpu\n" in output
    assert "Epoch:" not in output
    assert len(read_losses(folder)) == 9
    assert_same_run(folder, before)


def test_a_run_that_goes_on_says_at_which_epoch(finished, capsys):
    train(Options(**SMALL | {"epochs": 4}), finished, resume=True)
    output = capsys.readouterr().out
    assert " goes on at epoch 3 of 4 epochs (12 steps) on cpu\n" in output
    assert re.findall(r"^Epoch: \d+", output, re.M) == ["Epoch: 3"]


def test_time_counts_on_in_a_resumed_run(finished):
    edit_checkpoint(finished, lambda checkpoint: checkpoint.update(seconds=1000.0))
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


@pytest.mark.parametrize(
    "schedule", [{"lr_schedule": "cosine"}, {"beta_schedule": "cyclical", "cycles": 1}]
)
def test_a_run_with_a_schedule_does_not_grow(folder, schedule):
    train_small(folder, **schedule)
    with pytest.raises(
        UserError, match=r"may grow with constant schedules\): leave out --epochs 4"
    ):
        train_small(folder, True, epochs=4, **schedule)


def test_a_run_may_go_on_elsewhere_and_be_saved_at_other_times(finished, tmp_path):
    elsewhere = {"device": "cpu:0", "data_root": tmp_path / "moved", "checkpoint_every": 1}
    assert train_small(finished, True, epochs=5, **elsewhere)["epochs"] == 5
    path = finished / "checkpoint.pt"
    assert vars(saved_options(Options, load_checkpoint(path), path)).items() >= elsewhere.items()


def test_a_run_goes_on_when_its_pictures_have_moved(folder, tmp_path):
    for seed in range(60):
        write_photograph(tmp_path / "here" / f"{seed}.png", seed=seed)
    train_small(folder, dataset=str(tmp_path / "here"))
    there = (tmp_path / "here").rename(tmp_path / "there")
    metrics = train_small(folder, True, dataset=str(there), epochs=4)
    assert (metrics["epochs"], metrics["dataset"]) == (4, str(there))


def test_other_pictures_under_another_name_are_refused(finished, monkeypatch):
    class Other(SmallPictures):
        sizes: ClassVar[dict[str, int]] = SmallPictures.sizes | {"test": 35}

    monkeypatch.setitem(DATASETS, "other", Other)
    with pytest.raises(UserError, match="pictures were added, removed or changed since"):
        train_small(finished, True, dataset="other", epochs=4)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_other_pictures_are_refused(finished, monkeypatch, split):
    one_more = {split: SmallPictures.sizes[split] + 1}
    monkeypatch.setattr(SmallPictures, "sizes", SmallPictures.sizes | one_more)
    with pytest.raises(UserError, match="pictures were added, removed or changed since"):
        train_small(finished, True, epochs=4)


def without(*names: str) -> Callable[[dict[str, Any]], object]:
    """The change of a checkpoint that takes out what is there under these names, in turn."""

    def edit(checkpoint: dict[str, Any]) -> None:
        *parents, last = names
        for name in parents:
            checkpoint = checkpoint[name]
        del checkpoint[last]

    return edit


def optimiser_state(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What the optimiser has of the first weight, [16, 3, 3, 3]."""
    return checkpoint["state"]["optimiser"]["state"][0]


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no architecture": (without("architecture"), "it has no 'architecture'"),
    "no options": (without("options"), "it has no 'options'"),
    "no state": (without("state"), "it has no 'state'"),
    "no epoch": (without("epoch"), "it has no 'epoch'"),
    "no time": (without("seconds"), "it has no 'seconds'"),
    "no pictures": (without("pictures"), "it has no 'pictures'"),
    "no model": (without("state", "model"), "it has no 'model'"),
    "no optimiser": (without("state", "optimiser"), "it has no 'optimiser'"),
    "an optimiser that is nothing": (
        lambda it: it["state"].update(optimiser=None),
        "its optimiser is no dictionary",
    ),
    "an optimiser without groups": (
        without("state", "optimiser", "param_groups"),
        "it has no 'param_groups'",
    ),
    "a moment of another shape": (
        lambda it: optimiser_state(it).update(exp_avg=torch.zeros(2)),
        "the optimiser's exp_avg has the shape [2], its parameter [16, 3, 3, 3]",
    ),
    "a moment that is not finite": (
        lambda it: optimiser_state(it)["exp_avg_sq"].fill_(float("nan")),
        "the optimiser's exp_avg_sq is not finite",
    ),
    "a weight that is missing": (
        without("state", "model", "encoder.fcm.bias"),
        'Missing key(s) in state_dict: "encoder.fcm.bias".',
    ),
    "a weight too much": (
        lambda it: it["state"]["model"].update(more=torch.zeros(2)),
        'Unexpected key(s) in state_dict: "more".',
    ),
    "a weight of another shape": (
        lambda it: it["state"]["model"].update({"encoder.fcm.bias": torch.zeros(3)}),
        "the shape in current model is torch.Size([2]).",
    ),
    "an epoch too late": (lambda it: it.update(epoch=5), "its epoch is 5"),
    "an epoch before the first": (lambda it: it.update(epoch=-1), "its epoch is -1"),
    "an epoch in between": (lambda it: it.update(epoch=0.5), "its epoch is 0.5"),
    "an epoch that is no whole number": (lambda it: it.update(epoch=2.0), "its epoch is 2.0"),
    "an epoch in words": (lambda it: it.update(epoch="three"), "its epoch is 'three'"),
    "a time in words": (
        lambda it: it.update(seconds="long"),
        "unsupported operand type(s) for -=: 'float' and 'str'",
    ),
}


@pytest.mark.parametrize(("edit", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_checkpoint_that_no_run_can_go_on_from_is_refused_in_one_line(finished, edit, reason):
    edit_checkpoint(finished, edit)
    before = content(finished)
    with pytest.raises(UserError) as refused:
        train_small(finished, True, epochs=4)
    message = str(refused.value)
    assert message.startswith(f"{finished / 'checkpoint.pt'} was made by other code: ")
    assert message.endswith(reason)
    assert "\n" not in message
    assert content(finished) == before
