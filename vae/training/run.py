"""A run while it is trained: its folder, its random numbers, signals, and its checkpoint."""

import os
import shlex
import shutil
import signal
import sys
import threading
import time
import zlib
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter

from datasets.flowers102 import is_on_disk
from datasets.pictures import Splits, load_splits
from vae.training.checkpoint import load_checkpoint, load_weights, same_kind, save_checkpoint
from vae.training.command_line import first_line
from vae.training.options import Command, Options, check_folder, resumed_options
from vae.vae import VAE

SYNTHETIC = "This run is on SYNTHETIC flowers, not on photographs."


class Stopped(KeyboardInterrupt):
    """Training was asked to stop by SIGINT or SIGTERM."""

    def __init__(self, number: int, folder: Path) -> None:
        self.exit_status = 128 + number
        again = shlex.join([sys.executable, sys.argv[0], "--resume", str(folder)])
        after = f" Go on with:\n{again}" if (folder / "checkpoint.pt").exists() else ""
        super().__init__(f"Stopped by {signal.Signals(number).name}.{after}")


class Run:
    """A run's folder, open for training: ``with Run(options, splits, folder) as run:``.

    Inside the block nobody else writes to the folder, PyTorch's random numbers are the run's own
    (the caller's go on afterwards as if nothing had been drawn), and a signal waits for the end of
    the epoch; a second one stops at once.
    """

    def __init__(self, options: Options, splits: Splits, folder: Path, start: str = "new") -> None:
        shape, size = splits.train.pixels.shape[1:], options.image_size
        if shape != (size, size, 3):
            given = "the pictures are {}x{} with {} channels".format(*shape)
            raise ValueError(f"{given}, --image-size is {size}: RGB of that size is needed")
        check_folder(folder, start)
        self.options = replace(options, dataset=splits.dataset)
        self.folder, self.start = folder, start
        self.device = find_device(options.device)
        self.config = asdict(self.options) | {"image_resolution": [size, size], "image_channels": 3}
        threads = torch.get_num_threads()
        self.place = f"{self.device.type} (threads: {threads}, torch {torch.__version__})"
        self.pictures = 0
        for split in splits[:3]:
            self.pictures = zlib.crc32(split.pixels.cpu().contiguous().numpy().data, self.pictures)
        self.stop_requested, self.in_epoch = 0, False

    def __enter__(self) -> "Run":
        """Take the folder, the random numbers and the signals."""
        with ExitStack() as stack:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(FileLock(self.folder / ".lock", timeout=0))
            except Timeout:
                raise ValueError(f"another run is writing to {self.folder}: wait for it") from None
            check_folder(self.folder, self.start)
            own = [] if self.device.type == "cpu" else [self.device.index or 0]
            stack.enter_context(torch.random.fork_rng(own, device_type=self.device.type))
            # Signals reach only a program's main thread.
            if threading.current_thread() is threading.main_thread():
                for number in (signal.SIGINT, signal.SIGTERM):
                    stack.callback(signal.signal, number, signal.signal(number, self.on_signal))
            # Once 32 MB have been freed, glibc keeps a step's memory for the next: no page faults.
            torch.empty(2**25 - 2**13, dtype=torch.uint8)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Give everything back to whoever had it before."""
        self.stack.close()

    def on_signal(self, number: int, _: Any) -> None:
        """Note a signal for the end of the epoch; stop at once outside of one, or at a second."""
        if not self.in_epoch or self.stop_requested:
            raise Stopped(number, self.folder)
        self.stop_requested = number

    def seed(self, epoch: int) -> None:
        """Let all random numbers from here on follow from the run's seed and the epoch alone."""
        # NumPy's hash of the two: PyTorch's generator on the CPU takes 32 bits of a seed.
        mixed = np.random.SeedSequence((self.options.seed, 1 + epoch)).generate_state(1)
        torch.manual_seed(int(mixed[0]))

    def begin(self, model: VAE, optimiser: Optimizer) -> tuple[SummaryWriter, int]:
        """Save or restore; return TensorBoard's writer, and the epoch to begin or go on with."""
        self.started, epoch = time.perf_counter(), 0
        if self.start == "resume":
            epoch = self.restore(model, optimiser)
        elif self.start == "overwrite":
            # Only now, when nothing can be wrong with the new run any more. The lock stays.
            for path in self.folder.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != ".lock":
                    path.unlink()
        self.writer = self.stack.enter_context(SummaryWriter(self.folder))
        self.write(model, optimiser, epoch)
        self.in_epoch = epoch < self.options.epochs
        return self.writer, epoch

    def save(self, model: VAE, optimiser: Optimizer, epoch: int) -> None:
        """Write a checkpoint if it is due after so many epochs; stop if a signal asked for it."""
        self.in_epoch = epoch < self.options.epochs
        stop = self.stop_requested  # read once: a signal may come between two looks
        if stop or not self.in_epoch or epoch % self.options.checkpoint_every == 0:
            self.write(model, optimiser, epoch)
        if stop:
            raise Stopped(stop, self.folder)

    def write(self, model: VAE, optimiser: Optimizer, epoch: int) -> None:
        """Write a checkpoint; where that is an error, the last one stays as it was."""
        if not all(weight.isfinite().all() for weight in model.state_dict().values()):
            what = f"a weight is no longer finite after epoch {epoch - 1}: lower --learning-rate"
            raise FloatingPointError(f"{what}. The last good checkpoint is in {self.folder}")
        self.writer.flush()
        checkpoint = {
            "model": model.state_dict(),
            "config": self.config,
            "optimiser": optimiser.state_dict()["state"],
            "epoch": epoch,
            "seconds": time.perf_counter() - self.started,
            "place": self.place,
            "pictures": self.pictures,
            "events": {name: file.stat().st_size for name, file in self.event_files().items()},
        }
        save_checkpoint(checkpoint, self.folder / "checkpoint.pt")

    def restore(self, model: VAE, optimiser: Optimizer) -> int:
        """Take up model, optimiser and TensorBoard's events; return the epoch to go on with."""
        checkpoint = load_checkpoint(self.folder / "checkpoint.pt")
        same = {name: value for name, value in asdict(self.options).items() if name != "run_name"}
        resumed_options(checkpoint["config"], same)
        if checkpoint.get("pictures") != self.pictures:
            raise ValueError("the run began with other pictures: give their folder to --data-root")
        try:
            epoch, events, state = (checkpoint[part] for part in ("epoch", "events", "optimiser"))
            if epoch not in range(self.options.epochs + 1):
                raise ValueError(f"its epoch is {epoch!r}")
            # Adam trusts what it is given: moments of another size or order would crash Python.
            for index, weight in enumerate(model.parameters() if state or epoch else ()):
                like = {"step": torch.tensor(0.0), "exp_avg": weight, "exp_avg_sq": weight}
                for name, own in like.items():
                    if not same_kind(state[index][name], own):
                        raise ValueError("the optimiser's state does not fit the model")
                    state[index][name] = torch.empty_like(own.detach()).copy_(state[index][name])
            load_weights(model, checkpoint["model"])
            optimiser.load_state_dict(optimiser.state_dict() | {"state": state})
            self.started -= checkpoint["seconds"]
            # TensorBoard's purge_step is one for all tags: pictures count epochs, losses batches.
            for name, file in self.event_files().items():
                if name in events:
                    os.truncate(file, min(events[name], file.stat().st_size))
                else:
                    file.unlink()
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ValueError(f"the checkpoint cannot be resumed from: {error!r}") from None
        for unfinished in self.folder.glob(".*.unfinished"):
            unfinished.unlink()
        if (place := checkpoint.get("place", self.place)) != self.place:
            moved = f"the run was on {place} and is now on {self.place}"
            print(f"warning: {moved}: no longer bit for bit the uninterrupted run", file=sys.stderr)
        return epoch

    def event_files(self) -> dict[str, Path]:
        """Return TensorBoard's files of this run by their names: its own, and the losses'."""
        name = "events.out.tfevents.*"
        found = [*self.folder.glob(name), *self.folder.glob(f"loss_*/{name}")]
        return {str(file.relative_to(self.folder)): file for file in found}


def prepare(command: Command) -> tuple[Options, Splits, Path] | None:
    """Return the options, pictures and folder of a run; None if the one to resume is finished."""
    options, folder, resume = command.options, command.folder, command.start == "resume"
    if resume:
        checkpoint = load_checkpoint(folder / "checkpoint.pt")
        options = resumed_options(checkpoint["config"], command.given)
        if checkpoint.get("epoch") == options.epochs and "latents" in checkpoint:
            print(f"{folder} is finished: {options.epochs} epochs. A larger --epochs goes on.")
            return None
        if options.dataset == "flowers102" and not is_on_disk(Path(options.data_root)):
            raise ValueError(f"{options.data_root} has no flowers-102 any more: give --data-root")
    find_device(options.device)
    size = (options.image_size, options.image_size)
    splits = load_splits(options.dataset, Path(options.data_root), size)
    if splits.fallback:
        print(f"warning: {splits.fallback}. {SYNTHETIC}", file=sys.stderr)
    if splits.dataset == "synthetic" and not resume:
        folder = folder.with_name(f"{folder.name.removesuffix('-synthetic')}-synthetic")
    return options, splits, folder


def find_device(name: str) -> torch.device:
    """Return the device of that name, or refuse; ``"auto"`` is the accelerator, else the CPU."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"device {name} is not available here: {first_line(error)}") from None
    return torch.device(name)
