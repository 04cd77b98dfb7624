"""What both scripts share: a command line whose every error is one line and an exit status."""

import argparse
import os
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "vae" / "runs"


class Parser(argparse.ArgumentParser):
    """A parser that takes whole option names only, and whose errors are one line."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def print_help(self, file: Any = None) -> None:
        """Print the help, or one line where that cannot be written."""
        with one_line_errors():
            print(self.format_help(), end="", file=file)


def number(kind: Callable[[str], float], low: float, high: float) -> Callable[[str], float]:
    """Return an argparse type for a number from ``low`` to ``high``, both included."""

    def parse(text: str) -> float:
        with suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text} given, {low} to {high} needed")

    return parse


def read_inference_line(description: str, arguments: Sequence[str] | None = None) -> Namespace:
    """Read what ``vae_inference.py`` is to do: one sub-command for each way to look at a model."""
    parser = Parser(description=description)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    def add(name: str, help: str, images: int | str = 0, suffix: str = "png") -> Parser:
        each = commands.add_parser(name, help=help, description=help)
        each.set_defaults(images=[])
        if images:
            each.add_argument("images", nargs=images, type=Path, metavar="IMAGE", help="a picture")
            text = "cut the middle out of a picture that is not square, do not squeeze it"
            each.add_argument("--centre-crop", action="store_true", help=text)
        each.add_argument("--checkpoint", type=Path, help="default: the newest in --log-dir")
        option(each, "--log-dir", Path, RUNS, "folder of all runs")
        usual = Path(f"{name}.{suffix}")
        each.add_argument("--output", type=Path, help=f"file to write (default: {usual})")
        each.set_defaults(usual_output=usual)
        option(each, "--seed", number(int, 0, 2**32 - 1), 0, "random seed")
        option(each, "--device", str, "auto", "cpu, cuda, mps ...; auto: an accelerator if any")
        return each

    def option(each: Parser, name: str, kind: Any, default: Any, help: str, **more: Any) -> None:
        help += " (default: %(default)s)"
        each.add_argument(name, type=kind, default=default, help=help, **more)

    each = add("similar", "a picture, its reconstruction, and new flowers near it", "+")
    option(each, "--count", number(int, 1, 1000), 8, "new flowers for each picture")
    option(each, "--spread", number(float, 0, 1), 0.3, "0: the reconstruction; 1: any flower")
    each = add("sample", "new flowers")
    option(each, "--count", number(int, 1, 1000), 50, "new flowers")
    text = "where the training pictures' latents are, or N(0, I)"
    option(each, "--from", str, "data", text, dest="source", choices=("data", "prior"))
    add("reconstruct", "pictures beside their reconstructions", "+")
    each = add("interpolate", "the way from one picture to another", 2)
    option(each, "--steps", number(int, 2, 100), 8, "pictures on the way, both ends included")
    each = add("traverse", "what each latent dimension does to a picture", 1)
    option(each, "--steps", number(int, 2, 100), 7, "pictures for each dimension")
    add("explore", "a web page with a slider for each latent dimension", "?", "html")
    command = parser.parse_args(arguments)
    if isinstance(command.images, Path):
        command.images = [command.images]
    return command


def take_terminal() -> None:
    """Prepare a script for whatever its terminal is, before it imports what takes its time.

    Ctrl-C is one line from here on, a stream that is closed is written to in vain, and what the
    terminal's encoding lacks is written as its number.
    """
    # At once: an import may swallow an exception, and Python's own end shows its traceback.
    signal.signal(signal.SIGINT, lambda *_: end(130, "Stopped by SIGINT.", os._exit))
    threading.excepthook = leave_to_main
    sys.unraisablehook = end_if_stopped
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115 (open to the end)
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with one line and an exit status where something goes wrong inside.

    2 for what the user has to change (``ValueError``), 1 for what broke on the way (a full disk,
    too little memory, a loss that is not finite), 128 and its number for a signal. A mistake in
    the code keeps its traceback.
    """
    try:
        yield
        sys.stdout.flush()
    except ValueError as error:
        end(2, f"error: {first_line(error)}")
    except (FloatingPointError, OSError) as error:
        end(1, f"error: {error}")
    except (MemoryError, RuntimeError) as error:
        if not any(sign in repr(error).lower() for sign in ("memory", "bad_alloc", "new thread")):
            raise
        end(1, f"error: too little memory ({first_line(error)}): take a smaller model or batch")
    except KeyboardInterrupt as error:
        end(getattr(error, "exit_status", 130), str(error) or "Stopped")


def end_if_stopped(lost: "sys.UnraisableHookArgs") -> None:
    """End the program at once where Ctrl-C comes in a finaliser: nobody above would hear of it."""
    if isinstance(error := lost.exc_value, KeyboardInterrupt):
        end(getattr(error, "exit_status", 130), str(error) or "Stopped", os._exit)
    sys.__unraisablehook__(lost)


def leave_to_main(error: threading.ExceptHookArgs) -> None:
    """Say nothing of a full disk in TensorBoard's thread: the main thread meets it as well."""
    if not isinstance(error.exc_value, OSError):
        threading.__excepthook__(error)


def end(status: int, line: str, leave: Callable[[int], NoReturn] = sys.exit) -> NoReturn:
    """Print the last line of a program and exit."""
    for stream, text in ((sys.stderr, f"{Path(sys.argv[0]).name}: {line}\n"), (sys.stdout, "")):
        try:
            print(text, end="", file=stream, flush=True)
        except (OSError, RuntimeError):
            # Full, gone, or just being written to: Python would try once more, and say so.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    leave(status)


def first_line(error: BaseException) -> str:
    """Return an error's message without what PyTorch adds below its first line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
