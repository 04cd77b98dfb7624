import errno
import os
import re
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from vae.training.command_line import Parser, leave_to_main, number, one_line_errors
from vae.training.run import Stopped

NAME = re.escape(Path(sys.argv[0]).name)


@pytest.fixture
def ended(capsys):
    """Call a function inside ``one_line_errors``; return the exit status and what it printed."""

    def end(function, *arguments) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop, one_line_errors():
            function(*arguments)
        out, err = capsys.readouterr()
        assert out == ""
        return stop.value.code, err

    return end


def fail(error: BaseException) -> None:
    raise error


# Errors at the end of a program.


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("--epochs is 0"), 2, "error: --epochs is 0"),
        (ValueError("first\nsecond"), 2, "error: first"),
        (ValueError(), 2, "error: ValueError"),
        (FloatingPointError("the loss is nan"), 1, "error: the loss is nan"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a"),
            1,
            "error: [Errno 28] No space left on device: 'runs/a'",
        ),
        (KeyboardInterrupt(), 130, "Stopped"),
        (Stopped(signal.SIGINT, Path("nowhere")), 130, "Stopped by SIGINT."),
        (Stopped(signal.SIGTERM, Path("nowhere")), 143, "Stopped by SIGTERM."),
    ],
    ids=repr,
)
def test_an_error_becomes_one_line_and_an_exit_status(ended, error, status, line):
    printed, text = ended(fail, error)
    assert printed == status
    assert re.fullmatch(rf"{NAME}: {re.escape(line)}\n", text)


@pytest.mark.parametrize(
    "allocate",
    [lambda: torch.empty(2**60, dtype=torch.uint8), lambda: np.empty(2**50), lambda: bytes(2**62)],
    ids=["torch", "numpy", "python"],
)
def test_too_little_memory_is_said_in_one_line(ended, allocate):
    status, text = ended(allocate)
    assert status == 1
    assert re.fullmatch(
        rf"{NAME}: error: too little memory \(.+\): take a smaller model or batch\n", text
    )


@pytest.mark.parametrize("error", [TypeError, RuntimeError, KeyError, AssertionError])
def test_a_mistake_in_the_code_keeps_its_traceback(error):
    with pytest.raises(error), one_line_errors():
        raise error("a mistake")


def test_a_program_that_ends_well_prints_nothing_and_exits_as_it_likes(capsys):
    with one_line_errors():
        pass
    with pytest.raises(SystemExit) as stop, one_line_errors():
        sys.exit(7)
    assert stop.value.code == 7
    assert capsys.readouterr() == ("", "")


# Errors in other threads.


def end_thread(error: BaseException) -> None:
    thread = threading.Thread(target=fail, args=(error,))
    thread.start()
    thread.join()


def test_a_full_disk_in_another_thread_is_left_to_the_main_thread(capsys):
    with one_line_errors():
        end_thread(OSError(errno.ENOSPC, "No space left on device"))
    assert capsys.readouterr().err == ""


def test_a_mistake_in_another_thread_is_shown(capsys):
    with one_line_errors():
        end_thread(RuntimeError("a mistake"))
    assert "RuntimeError: a mistake" in capsys.readouterr().err


@pytest.mark.parametrize("error", [None, ValueError("no")])
def test_threads_report_as_before_afterwards(error, monkeypatch):
    def hook(arguments: object) -> None:
        pass

    monkeypatch.setattr(threading, "excepthook", hook)
    try:
        with one_line_errors():
            assert threading.excepthook is leave_to_main
            if error:
                raise error
    except SystemExit:
        assert error
    assert threading.excepthook is hook


# The parser.


def refusal(parser: Parser, arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_a_parser_takes_whole_names_only_and_answers_in_one_line(capsys):
    parser = Parser(prog="flowers")
    parser.add_argument("--epochs", type=int)
    assert parser.parse_args(["--epochs=3"]).epochs == 3
    message = "flowers: error: unrecognized arguments: --epoch=3\n"
    assert refusal(parser, ["--epoch=3"], capsys) == message


def test_a_number_is_within_its_bounds_both_included(capsys):
    parser = Parser(prog="flowers")
    parser.add_argument("--count", type=number(int, 1, 1000))
    parser.add_argument("--spread", type=number(float, 0, 1))
    for text in ("1", "1000"):
        assert parser.parse_args(["--count", text]).count == int(text)
    for text in ("0", "1", "0.25"):
        assert parser.parse_args(["--spread", text]).spread == float(text)
    for text in ("0", "1001", "-1", "2.5", "many", "", "nan", "1e2"):
        message = f"flowers: error: argument --count: {text} given, 1 to 1000 needed\n"
        assert refusal(parser, [f"--count={text}"], capsys) == message
    for text in ("-0.1", "1.1", "nan", "inf", "wide"):
        message = f"flowers: error: argument --spread: {text} given, 0 to 1 needed\n"
        assert refusal(parser, [f"--spread={text}"], capsys) == message
