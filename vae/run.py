"""A run: its folder, lock, random numbers, Ctrl-C and checkpoint; what goes wrong in one line."""

import builtins
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import nn
from torch.distributions import MultivariateNormal
from torch.optim import Optimizer

from datasets import find_dataset
from datasets.preprocessing import InMemory, UserError
from vae.vae import VAE

# What may change when a run goes on: where it is computed, and how often it is saved.
FREE = {"data_root", "device", "checkpoint_every"}

# What a run that ended before its first checkpoint has left; a new one may begin there.
START = ("events.out.tfevents.", "loss_", ".lock", ".checkpoint.pt.")


class Stopped(KeyboardInterrupt):
    """Training was stopped by a signal; its arguments are the signal's number and the folder."""

    def __str__(self) -> str:
        """Return what happened, and how the run goes on from Python."""
        again = "train(options, folder, resume=True) goes on with"
        return f"Stopped by {signal.Signals(self.args[0]).name}; {again} {self.args[1]}"


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End a program with one line and an exit status for what its user can change.

    2 for a ``UserError``, 1 for what broke on the way (``OSError``, too little memory, a loss that
    is not finite), 130 for Ctrl-C. Everything else keeps its traceback.
    """
    try:
        yield
        return
    except (UserError, FloatingPointError, OSError) as error:
        status, line = (2 if isinstance(error, UserError) else 1), f"error: {error}"
    except (MemoryError, RuntimeError) as error:
        kinds = (MemoryError, torch.OutOfMemoryError)
        if not isinstance(error, kinds) and "DefaultCPUAllocator" not in str(error):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        status, line = 1, f"error: too little memory, take a smaller model or batch ({reason})"
    except Stopped as stopped:
        number, folder = stopped.args
        status, line = 128 + number, f"Stopped by {signal.Signals(number).name}."
        if (folder / "checkpoint.pt").exists():
            line += f" Go on with:\n{command_line('--resume', str(folder.absolute()))}"
    except KeyboardInterrupt:
        status, line = 130, "Stopped"
    print(line, file=sys.stderr)
    sys.exit(status)


def command_line(*arguments: str) -> str:
    """Return this script's command with other arguments, as it works where it is printed."""
    program = "%run" if getattr(builtins, "__IPYTHON__", False) else sys.executable
    return quote([program, sys.argv[0], *arguments])


def quote(words: list[str]) -> str:
    """Return a command as the shell of this system reads it."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


class Run(ExitStack):
    """A run's folder, open for training: ``with Run(options, folder) as run:``.

    Inside the block nobody else writes to the folder, PyTorch's random numbers are the run's own
    (the caller's go on afterwards as if nothing had been drawn), and a signal waits for the end of
    the epoch; a second one stops at once. ``UserError`` if options and folder do not fit (a new
    run needs an empty one), or another run is writing there.
    """

    def __init__(self, options: Any, folder: Path | str, resume: bool = False) -> None:
        super().__init__()
        self.folder, self.resume = Path(folder), resume
        self.device = find_device(options.device)
        root = os.path.abspath(os.path.expanduser(options.data_root))  # to resume from any folder
        name, self.dataset = find_dataset(options.dataset, root)
        self.options = replace(options, dataset=name, data_root=root)
        self.started, self.stop_requested, self.in_epoch = time.perf_counter(), 0, False

    def __enter__(self) -> "Run":
        """Take the folder, the random numbers and the signals."""
        self.folder.mkdir(parents=True, exist_ok=True)
        names = [path.name for path in self.folder.iterdir()]
        if self.resume and "checkpoint.pt" not in names:
            raise UserError(f"{self.folder} has no checkpoint.pt: give the folder of a run")
        begun = ".lock" in names and all(name.startswith(START) for name in names)
        if names and not (self.resume or begun):
            raise UserError(f"{self.folder} is not empty: take another (--run-name) or --resume it")
        try:
            self.enter_context(FileLock(self.folder / ".lock", timeout=0))
        except Timeout:
            raise UserError(f"another run is writing to {self.folder}: wait for it") from None
        if not self.resume:  # TensorBoard would mix a new run with one that failed at once
            for path in self.folder.rglob("events.out.tfevents.*"):
                path.unlink()
        self.enter_context(own_random(self.device))
        torch.manual_seed(self.options.seed)  # the same first weights for the same seed
        # Signals reach only a program's main thread.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.callback(signal.signal, number, signal.signal(number, self.on_signal))
        # Once 32 MB have been freed, glibc keeps a step's memory for the next: no page faults.
        torch.empty(2**25 - 2**13, dtype=torch.uint8)
        return self

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

    def beta_at(self, epoch: int) -> float:
        """Return the weight of the KL divergence in an epoch, counted from 0."""
        options = self.options
        if options.beta_schedule == "linear":  # up from 0 in the warm-up (Bowman et al. 2016)
            return options.beta * min(1.0, epoch / max(1, options.warmup_epochs))
        if options.beta_schedule == "cyclical":  # in each cycle's first half (Fu et al. 2019)
            place = epoch * options.cycles % options.epochs / options.epochs
            return options.beta * min(1.0, 2 * place)
        return options.beta

    def learning_rate_at(self, epoch: int) -> float:
        """Return Adam's learning rate in an epoch, counted from 0."""
        options = self.options
        if options.lr_schedule == "cosine":
            return options.learning_rate * 0.5 * (1 + math.cos(math.pi * epoch / options.epochs))
        return options.learning_rate

    def begin(self, model: VAE, optimiser: Optimizer, *splits: InMemory) -> int:
        """Return the epoch to begin with; take up the checkpoint of a run to resume."""
        self.pictures = 0
        for split in splits:
            self.pictures = zlib.crc32(split.pixels.numpy().data, self.pictures)
        channels, *size = splits[0][0][0].shape
        self.config = asdict(self.options) | {"image_resolution": size, "image_channels": channels}
        epoch = self.restore(model, optimiser) if self.resume else 0
        self.in_epoch = epoch < self.options.epochs
        return epoch

    def save(self, model: VAE, optimiser: Optimizer, epoch: int) -> None:
        """Write a checkpoint if it is due after so many epochs; stop if a signal asked for it."""
        if not all_finite(model):
            raise self.diverged(epoch)
        self.in_epoch = epoch < self.options.epochs
        stop = self.stop_requested  # read once: a signal may come between two looks
        if stop or not self.in_epoch or epoch % self.options.checkpoint_every == 0:
            checkpoint = {
                "model": model.state_dict(),
                "config": self.config,
                "optimiser": optimiser.state_dict()["state"],
                "epoch": epoch,
                "seconds": time.perf_counter() - self.started,
                "pictures": self.pictures,
            }
            with replace_atomically(self.folder / "checkpoint.pt") as file:
                torch.save(checkpoint, file)
        if stop:
            raise Stopped(stop, self.folder)

    def diverged(self, epochs: int) -> FloatingPointError:
        """Return the error for a loss or weights that are not finite after so many epochs."""
        message = f"loss or weights are not finite in epoch {epochs - 1}: lower --learning-rate"
        if (self.folder / "checkpoint.pt").exists():
            message += f". The last good checkpoint is in {self.folder}"
        return FloatingPointError(message)

    def restore(self, model: VAE, optimiser: Optimizer) -> int:
        """Take up model and optimiser from the checkpoint; return the epoch to go on with."""
        path = self.folder / "checkpoint.pt"
        checkpoint = load_checkpoint(path)
        check_same_experiment(checkpoint["config"], self.options)
        if checkpoint.get("pictures") != self.pictures:
            raise UserError("pictures were added, removed or changed since: train a new run")
        with named(path):
            epoch, state = checkpoint["epoch"], checkpoint["optimiser"]
            if epoch not in range(self.options.epochs + 1):
                raise ValueError(f"its epoch is {epoch!r}")
            model.load_state_dict(checkpoint["model"])
            # Adam trusts what it is given; in a tensor like the weight it finds what it expects.
            for index, weight in enumerate(model.parameters()):
                for name in ("step", "exp_avg", "exp_avg_sq"):
                    own = torch.tensor(0.0) if name == "step" else torch.empty_like(weight)
                    state[index][name] = own.copy_(state[index][name])
            optimiser.load_state_dict(optimiser.state_dict() | {"state": state})
            self.started -= checkpoint["seconds"]
        return epoch


def check(name: str, given: float, low: float, high: float = math.inf) -> None:
    """Raise ``UserError`` unless an option's value is finite and from ``low`` to ``high``."""
    if not low <= given <= high or given == math.inf:
        needed = f"{low} or more" if high == math.inf else f"{low} to {high}"
        raise UserError(f"{name} is {given}: {needed} is needed")


def check_options(options: Any) -> None:
    """Raise ``UserError`` for an option's value that cannot be."""
    one = ("latent_size", "cycles", "epochs", "batch_size", "checkpoint_every")
    for name in (*one, "warmup_epochs", "beta", "learning_rate"):
        check(f"--{name.replace('_', '-')}", getattr(options, name), int(name in one))
    for name, hint in get_type_hints(type(options)).items():  # from Python; a command line knows
        given, known = getattr(options, name), get_args(hint)
        if get_origin(hint) is Literal and given not in known:
            raise UserError(f"{name} is {given!r}: one of {known} is needed")
    check("--seed", options.seed, 0, 2**32 - 1)
    if options.learning_rate == 0:
        raise UserError("--learning-rate is 0.0: more than 0 is needed")
    if options.image_size < 8 or options.image_size % 8:
        raise UserError(f"--image-size is {options.image_size}: a multiple of 8 is needed")


def folder_of(command: Any) -> Path:
    """Return the folder of the run that a command line names: to resume, or new."""
    if command.resume:
        folder, other = command.log_dir / command.resume, Path(command.resume)
        return other if other.is_dir() and not folder.is_dir() else folder
    now, dataset = f"{datetime.now():%Y-%m-%d_%H-%M-%S}", command.experiment.dataset
    if dataset not in ("auto", "flowers102"):
        now += "-" + re.sub(r"[^\w-]+", "-", Path(dataset).name)
    return command.log_dir / (command.run_name or now)


def saved_options(kind: type, folder: Path) -> Any:
    """Return the options, of that kind, of the run in ``folder``."""
    config = load_checkpoint(folder / "checkpoint.pt")["config"]
    with named(folder / "checkpoint.pt"):
        return kind(**{each.name: config[each.name] for each in fields(kind)})


def check_same_experiment(config: dict[str, Any], options: Any) -> None:
    """Raise ``UserError`` unless ``options`` go on with the experiment of a checkpoint."""
    constant = options.beta_schedule == options.lr_schedule == "constant"
    more = constant and options.epochs >= config.get("epochs", 0)
    changes = [
        f"--{name.replace('_', '-')} {now} (the run has {config.get(name)})"
        for name, now in vars(options).items()
        if now != config.get(name) and name not in FREE and not (more and name == "epochs")
    ]
    if changes:
        rule = "a resumed run stays the same experiment (--epochs may grow with constant schedules)"
        raise UserError(f"{rule}: leave out {', '.join(changes)}")


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


def own_random(device: torch.device) -> Any:
    """Return a context after which PyTorch's random numbers go on as if none had been drawn."""
    own = [] if device.type == "cpu" else [device.index or 0]
    return torch.random.fork_rng(own, device_type="cuda" if device.type == "cpu" else device.type)


@contextmanager
def replace_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that takes the place of ``path`` once the block has ended well.

    Of a link, the file that it points to is replaced; what is no file is not (``OSError``).
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a file and is not replaced by one")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; only tensors and plain values, so that it can run no code.

    ``UserError`` if it is missing, damaged, or not a checkpoint of this model.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file: a checkpoint.pt of a run is needed")
    with named(path), zipfile.ZipFile(path) as archive:
        if archive.testzip():  # PyTorch does not look at the checksums
            raise ValueError("a checksum is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not all(isinstance(checkpoint[part], dict) for part in ("model", "config")):
            raise ValueError("its 'model' and 'config' are not dictionaries")
    return checkpoint


def load_model(
    path: Path, device: torch.device | str = "cpu"
) -> tuple[VAE, dict[str, Any], MultivariateNormal | None]:
    """Rebuild the model that a checkpoint holds, ready for inference.

    It comes with its config and the fitted distribution of its latents (None before a run's end).
    What is raised is as in ``load_checkpoint``.
    """
    checkpoint = load_checkpoint(path)
    config, latents = checkpoint["config"], checkpoint.get("latents") or None
    with named(path):
        height, width = config["image_resolution"]
        shape = config["latent_size"], config["image_channels"], config["batch_norm"]
        torch.empty(height, width, *shape[:2], device="meta")  # refuses what cannot be sizes
    model = VAE((height, width), *shape)  # outside: a slip in the layers is no damage of the file
    with named(path):
        model.load_state_dict(checkpoint["model"])
        if not all_finite(model):
            raise ValueError("its weights are not finite")
        if latents:
            mean, covariance = (latents[part].to(device) for part in ("mean", "covariance"))
            latents = MultivariateNormal(mean.expand(model.latent_size), covariance)
    return model.to(device).eval(), config, latents


def all_finite(model: nn.Module) -> bool:
    """Return whether no weight is infinite or not a number."""
    return all(weight.isfinite().all() for weight in model.state_dict().values())


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Turn what goes wrong with a strange checkpoint into a ``UserError`` with its name."""
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:  # PyTorch's reader has no exception of its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} is damaged, or no checkpoint of this model: {reason}") from None
