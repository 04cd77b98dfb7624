"""A run: its folder, its lock, its random numbers, Ctrl-C, and the end of each epoch."""

import math
import os
import random
import signal
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import nn

from datasets.errors import UserError
from datasets.memory import InMemory
from vae.checkpoint import (
    all_finite,
    as_plain,
    check_same_settings,
    check_state,
    is_same,
    load_checkpoint,
    load_state_dicts,
    made_by_this_code,
    map_values,
    save_checkpoint,
    saved_options,
    serialise,
    settings_of,
    state_dicts,
)
from vae.history import History

# What may change when a run goes on: where it is computed, and how often it is saved.
FREE = {"data_root", "device", "checkpoint_every"}
# The pictures may have been moved, too: whether they are the same is looked at in any case.
FREE_ON_RESUME = FREE | {"dataset"}


class Stopped(KeyboardInterrupt):
    """Training was stopped by a signal, whose number it has, in the folder of a run."""

    def __init__(self, number: int, folder: Path) -> None:
        super().__init__(number, folder)
        self.number, self.folder = number, folder
        self.name = signal.Signals(number).name

    def __str__(self) -> str:
        """Return what happened, and how the run goes on from Python."""
        again = "train(options, folder, resume=True) goes on with"
        return f"Stopped by {self.name}; {again} {self.folder}"


class Run:
    """A run's folder, open for training: ``with Run(options, folder) as run:``.

    Inside the block nobody else writes to the folder, all random numbers are the run's own (the
    caller's go on afterwards as if nothing had been drawn), and a signal waits for the end of the
    epoch; a second one stops at once. ``options`` are a data class with at least ``seed``,
    ``epochs``, ``device`` and ``checkpoint_every``; its paths become whole ones, so that the run
    can be resumed from any folder. ``UserError`` if options and folder do not fit (a new run needs
    an empty one), or another run is writing there.
    """

    def __init__(self, options: Any, folder: Path | str, resume: bool = False) -> None:
        self.folder, self.resume = Path(folder), resume
        self.device = find_device(options.device)
        self.options = with_whole_paths(options)
        self.started = 0.0
        # What start_or_resume() is given, and what it makes of it
        self.state: dict[str, Any] = {}
        self.architecture: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}
        self.pictures = 0
        self.epochs_done = 0
        self.seconds = 0.0  # that they have taken, with reading the pictures
        self.history = History()
        # What a signal finds
        self.in_epoch = False
        self.signal_received = 0  # the number of the one that waits for the end of the epoch

    def __enter__(self) -> "Run":
        """Take the folder, the random numbers and the signals."""
        self.started = time.perf_counter()
        with ExitStack() as stack:  # gives back what it has, if the rest cannot be had
            stack.enter_context(held_folder(self.folder, self.resume))
            stack.enter_context(own_random())
            stack.enter_context(signals_go_to(self.on_signal))
            seed_everything(self.options.seed)  # the same first weights for the same seed
            keep_freed_memory()
            self.on_exit = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give back the signals, the random numbers and the folder."""
        self.on_exit.__exit__(kind, error, traceback)

    def start_or_resume(
        self, state: dict[str, Any], architecture: dict[str, Any], splits: Sequence[InMemory]
    ) -> int:
        """Return the epoch to begin with: 0, or the one where a resumed run goes on.

        ``state`` has whatever a resumed run goes on from, each with a ``state_dict`` and a
        ``load_state_dict``, the model among them as "model". ``architecture`` are the arguments of
        which the model is built. ``UserError`` if the checkpoint is of another experiment, or the
        state lacks something, ``TypeError`` if something is nothing that a checkpoint can hold.
        """
        check_state(state)
        self.state, self.architecture = state, architecture
        self.settings = settings_of(state)
        self.pictures = checksum(splits)
        serialise(self.checkpoint())  # what cannot be saved is named before the first epoch
        if self.resume:
            self.restore()
        self.in_epoch = self.epochs_done < self.options.epochs
        self.history.epoch = self.epochs_done
        return self.epochs_done

    def seed(self, epoch: int) -> None:
        """Let all random numbers from here on follow from the run's seed and the epoch alone."""
        # NumPy's hash of the two: PyTorch's generator on the CPU takes 32 bits of a seed.
        mixed = np.random.SeedSequence((self.options.seed, 1 + epoch)).generate_state(1)
        seed_everything(int(mixed[0]))

    def end_epoch(self, epoch: int) -> None:
        """End an epoch, counted from 0: check the weights, save if it is due, stop if asked to.

        ``FloatingPointError`` if a weight is not finite, ``Stopped`` if a signal came meanwhile.
        """
        self.check_weights(epoch)
        self.epochs_done = self.history.epoch = epoch + 1
        self.seconds = time.perf_counter() - self.started
        self.in_epoch = self.epochs_done < self.options.epochs
        stop = self.signal_received  # read once: a signal may come between two looks
        if stop or not self.in_epoch or self.epochs_done % self.options.checkpoint_every == 0:
            self.save()
        if stop:
            raise Stopped(stop, self.folder)

    def save(self, **more: Any) -> None:
        """Write the checkpoint from which the run goes on, with something besides."""
        save_checkpoint(self.folder / "checkpoint.pt", self.checkpoint() | more)

    def checkpoint(self) -> dict[str, Any]:
        """Return what is kept of the run as it is now."""
        return {
            "architecture": as_plain(self.architecture),
            "options": as_plain(asdict(self.options)),
            "settings": self.settings,
            "state": state_dicts(self.state),
            "epoch": self.epochs_done,
            "seconds": self.seconds,
            "pictures": self.pictures,
            "history": self.history.state_dict(),
        }

    def restore(self) -> None:
        """Take up the state from the checkpoint."""
        path = self.folder / "checkpoint.pt"
        checkpoint = load_checkpoint(path)
        before = saved_options(type(self.options), checkpoint, path)
        check_same_experiment(with_whole_paths(before), self.options)
        with made_by_this_code(path):
            epoch, self.seconds = checkpoint["epoch"], checkpoint["seconds"]
            if type(epoch) is not int or not 0 <= epoch <= self.options.epochs:
                raise ValueError(f"its epoch is {epoch!r}")
            if checkpoint["pictures"] != self.pictures:
                raise UserError("pictures were added, removed or changed since: train a new run")
            check_same_settings(checkpoint["settings"], self.settings)
            load_state_dicts(self.state, checkpoint["state"])
            self.history.load_state_dict(checkpoint.get("history", {}))
            self.epochs_done = epoch
            self.started -= self.seconds

    def check_weights(self, epoch: int) -> None:
        """Raise ``FloatingPointError`` if a weight is not finite after an epoch."""
        for name, each in self.state.items():
            if isinstance(each, nn.Module) and not all_finite(each):
                raise self.diverged(f"a weight of the {name} is", epoch)

    def check_loss(self, epoch: int, loss: float) -> None:
        """Raise ``FloatingPointError`` if a loss is not finite after an epoch."""
        if not math.isfinite(loss):
            raise self.diverged("the loss is", epoch)

    def diverged(self, what: str, epoch: int) -> FloatingPointError:
        """Return the error for what is not finite after an epoch."""
        message = f"{what} not finite after epoch {epoch}: lower --learning-rate"
        if (self.folder / "checkpoint.pt").exists():
            message += f". The last checkpoint is in {self.folder}"
        return FloatingPointError(message)

    def on_signal(self, number: int, _: Any) -> None:
        """Note a signal for the end of the epoch; stop at once outside of one, or at a second."""
        if not self.in_epoch or self.signal_received:
            raise Stopped(number, self.folder)
        self.signal_received = number
        with suppress(RuntimeError):  # the signal came while something else was being printed
            said = "finishing the epoch, then saving; once more (Ctrl-C) stops at once"
            print(f"\n{signal.Signals(number).name}: {said}", file=sys.stderr, flush=True)


# What a run takes and gives back.


@contextmanager
def held_folder(folder: Path, resume: bool) -> Iterator[None]:
    """Hold the lock of a run's folder, which is made for a new run.

    ``UserError`` if it is not what is needed: a run's to resume, else an empty one, or one in which
    a run ended before its first checkpoint.
    """
    checkpoint = folder / "checkpoint.pt"
    if resume and not checkpoint.exists():
        raise UserError(f"{folder} has no checkpoint.pt: give the folder of a run")
    not_empty = f"{folder} is not empty: take another (--run-name) or --resume it"
    folder.mkdir(parents=True, exist_ok=True)
    is_empty = not any(folder.iterdir())
    was_begun = (folder / ".lock").exists()
    if not (resume or is_empty or was_begun):
        raise UserError(not_empty)
    try:
        lock = FileLock(folder / ".lock", timeout=0).acquire()
    except Timeout:
        raise UserError(f"another run is writing to {folder}: wait for it") from None
    with lock:
        if not resume:
            if checkpoint.exists():  # looked at with the lock: before it, a run might have ended
                raise UserError(not_empty)
            delete_old_events(folder)
        yield


def delete_old_events(folder: Path) -> None:
    """Delete what a run that ended before its first checkpoint has left for TensorBoard.

    TensorBoard would mix it with the new run.
    """
    for path in folder.rglob("events.out.tfevents.*"):
        path.unlink()


@contextmanager
def own_random() -> Iterator[None]:
    """Let PyTorch's, NumPy's and Python's random numbers afterwards go on as if none were drawn.

    Of PyTorch's, that is on the CPU and on all devices: ``torch.manual_seed`` seeds them all.
    """
    numpy_state, python_state = np.random.get_state(), random.getstate()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if accelerator else 0
    device_type = accelerator.type if accelerator else "cuda"  # one has to be named
    try:
        with torch.random.fork_rng(range(count), device_type=device_type):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def seed_everything(seed: int) -> None:
    """Seed PyTorch's, NumPy's and Python's random numbers, with 0 to 2**32 - 1."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@contextmanager
def signals_go_to(handler: Any) -> Iterator[None]:
    """Let SIGINT (Ctrl-C) and SIGTERM call ``handler``, in a program's main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield  # other threads get no signals
        return
    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, its_handler in before.items():
            signal.signal(number, its_handler)


def keep_freed_memory() -> None:
    """Let Linux's C library keep a step's memory for the next one, which saves page faults.

    Once a large block has been freed, glibc takes it as the size up to which it keeps memory:
    32 MB are the most it learns. Elsewhere this does nothing.
    """
    torch.empty(2**25 - 2**13, dtype=torch.uint8)


# What a run asks first.


def find_device(name: str) -> torch.device:
    """Return the device of that name, or refuse; ``"auto"`` is the accelerator, else the CPU."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]  # PyTorch adds advice below
        raise UserError(f"device {name} is not available here: {reason}") from None
    return torch.device(name)


def with_whole_paths(options: Any) -> Any:
    """Return options in which each ``Path`` is whole and has no ``~``."""

    def whole(value: Any) -> Any:
        return Path(os.path.abspath(value.expanduser())) if isinstance(value, Path) else value

    given = [each.name for each in fields(options) if each.init]  # the others it derives by itself
    return replace(options, **{name: map_values(whole, getattr(options, name)) for name in given})


def checksum(splits: Sequence[InMemory]) -> int:
    """Return a number that changes when a picture does."""
    number = 0
    for split in splits:
        number = zlib.crc32(split.pixels.numpy().data, number)
    return number


def check_same_experiment(before: Any, now: Any) -> None:
    """Raise ``UserError`` unless options go on with the run that had those ``before``."""
    may_change = set(FREE_ON_RESUME)
    schedules = (getattr(now, name, "constant") for name in ("beta_schedule", "lr_schedule"))
    if all(schedule == "constant" for schedule in schedules) and now.epochs >= before.epochs:
        may_change.add("epochs")
    changes = [
        f"--{name.replace('_', '-')} {value} (the run has {getattr(before, name)})"
        for name, value in vars(now).items()
        if name not in may_change and not is_same(value, getattr(before, name))
    ]
    if changes:
        rule = "a resumed run stays the same experiment (--epochs may grow with constant schedules)"
        raise UserError(f"{rule}: leave out {', '.join(changes)}")
