"""What the scripts' command lines share: errors in one line, what options may be, which folder."""

import builtins
import io
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from datasets.errors import UserError
from vae.run import Stopped

# The models that come with the repository, by their names on command lines.
RESULTS = Path(__file__).parents[1] / "results"
INCLUDED = {"petals": RESULTS / "petals.pt", "ten": RESULTS / "trained.pt"}


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End a program with one line and an exit status for what its user can change.

    2 for a ``UserError``, 1 for what broke on the way (``OSError``, too little memory, a loss that
    is not finite), 130 for Ctrl-C. Everything else keeps its traceback.

    A letter of a name that the console cannot show is printed as its number, and ends nothing.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr has it by itself
    try:
        yield
        return
    except UserError as error:
        status, line = 2, f"error: {error}"
    except (FloatingPointError, OSError) as error:
        status, line = 1, f"error: {error}"
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        status, line = 1, f"error: too little memory, take a smaller model or batch ({reason})"
    except Stopped as stopped:
        status, line = 128 + stopped.number, f"Stopped by {stopped.name}."
        if (stopped.folder / "checkpoint.pt").exists():
            line += f" Go on with:\n{command_line('--resume', str(stopped.folder.absolute()))}"
    except KeyboardInterrupt:
        status, line = 130, "Stopped"
    print(line, file=sys.stderr)
    sys.exit(status)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether Python's or PyTorch's memory ran out, on the CPU or on a device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # Plain RuntimeErrors on the CPU, and on a Mac's GPU.
    return "DefaultCPUAllocator" in str(error) or "out of memory" in str(error)


def command_line(*arguments: str) -> str:
    """Return this script's command with other arguments, as it works where it is printed."""
    program = "%run" if getattr(builtins, "__IPYTHON__", False) else sys.executable
    return quote([program, sys.argv[0], *arguments])


def with_home(arguments: Sequence[str] | None) -> list[str]:
    """Return the command line, or else the program's own, with ``~`` as the home folder.

    The shell itself does that for ``--log-dir ~/runs``, but not for ``--log-dir=~/runs``.
    """
    words = []
    for word in sys.argv[1:] if arguments is None else arguments:
        name, equals, value = word.partition("=")
        is_option = name.startswith("--") and equals
        words.append(f"{name}={os.path.expanduser(value)}" if is_option else word)
    return words


def quote(words: list[str]) -> str:
    """Return a command as the shell of this system reads it."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def check(name: str, given: float, low: float, high: float = math.inf) -> None:
    """Raise ``UserError`` unless an option's value is finite and from ``low`` to ``high``."""
    if not low <= given <= high or given == math.inf:
        needed = f"{low} or more" if high == math.inf else f"{low} to {high}"
        raise UserError(f"{name} is {given}: {needed} is needed")


def check_choices(options: Any) -> None:
    """Raise ``UserError`` for a value that is none of its option's choices, its ``Literal``.

    The command line refuses it by itself; this is for options that are made in Python.
    """
    for name, hint in get_type_hints(type(options)).items():
        choices = get_args(hint)
        given = getattr(options, name)
        if get_origin(hint) is Literal and given not in choices:
            raise UserError(f"{name} is {given!r}: one of {choices} is needed")


def run_to_resume(log_dir: Path, name: str) -> Path:
    """Return the folder of a run that is given by its name in ``log_dir``, or by its folder."""
    in_log_dir, anywhere = log_dir / name, Path(name)
    if anywhere.is_dir() and not in_log_dir.is_dir():
        return anywhere
    return in_log_dir


def find_checkpoint(option: str, name: str, log_dir: Path) -> Path:
    """Return the file of a model that an option names.

    The name is one in ``INCLUDED``, a checkpoint's file, or a run's folder or name in ``log_dir``;
    ``UserError`` if it is none of them.
    """
    if name in INCLUDED:
        return INCLUDED[name]
    for path in (Path(name), run_to_resume(log_dir, name) / "checkpoint.pt"):
        if path.is_file():
            return path
    known = ", ".join(INCLUDED)
    raise UserError(f"{option} is {name}: no file, no run in {log_dir}, and none of {known}")


@contextmanager
def new_folder(log_dir: Path, dataset: str) -> Iterator[Path]:
    """Make a run's folder that is called after the time, and after the data set if not flowers102.

    It is made at once, so that a run which begins in the same second takes another one (``-2``);
    where nothing has been written into it in the end, it goes again.
    """
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    if dataset != "flowers102":
        name += "-" + re.sub(r"[^\w-]+", "-", Path(dataset).name)
    log_dir.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        folder = log_dir / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            break
    try:
        yield folder
    finally:
        with suppress(OSError):  # it is not empty: the usual case
            if [path.name for path in folder.iterdir()] == [".lock"]:
                (folder / ".lock").unlink()  # of a run that ended before it wrote anything
            folder.rmdir()
