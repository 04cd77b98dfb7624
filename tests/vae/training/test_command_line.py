import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT

from vae.training.command_line import Parser, number, one_line_errors
from vae.training.run import Stopped
from vae_training import main

NAME = re.escape(Path(sys.argv[0]).name)
SCRIPTS = pytest.mark.parametrize("script", ["vae_training.py", "vae_inference.py"])


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


TOO_LITTLE = [
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    RuntimeError("can't start new thread"),
    RuntimeError("std::bad_alloc"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has"),
]


@pytest.mark.parametrize("error", TOO_LITTLE, ids=repr)
@pytest.mark.parametrize("at", ["vae.training.run.load_splits", "vae_training.VAE"])
def test_too_little_memory_for_pictures_or_model_is_said_in_one_line(
    monkeypatch, tmp_path, splits, ended, at, error
):
    monkeypatch.setattr("vae.training.run.load_splits", lambda *_: splits)
    monkeypatch.setattr(at, lambda *_, **__: fail(error))
    status, text = ended(main, ["--image-size=8", "--device=cpu", f"--log-dir={tmp_path}"])
    assert status == 1
    assert re.fullmatch(rf"{NAME}: error: too little memory \(.+\): take a smaller .+\n", text)


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


# What a script's terminal can be: each in a process of its own.

SMALL = ["--dataset=synthetic", "--image-size=8", "--epochs=1", "--run-name=run"]
TERMINAL = """
import atexit, os, signal, sys, time
from vae.training.command_line import one_line_errors, take_terminal
take_terminal()
"""


def environment(**changes: str) -> dict[str, str]:
    """Streams are buffered as they are for a user, and threads do not wait for each other."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return kept | {"OMP_NUM_THREADS": "1"} | changes


def shell(line: str, *arguments: object, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash, in which "$@" is Python with these arguments."""
    command = ["bash", "-c", line, "bash", sys.executable, *map(str, arguments)]
    variables = environment(**changes)
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)


def start(*arguments: object) -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=environment(), **pipes)


@SCRIPTS
@pytest.mark.parametrize("library", ["_multiarray_umath", "libtorch_python", "PIL/_imaging"])
def test_ctrl_c_during_the_imports_is_one_line(script, library, tmp_path):
    arguments = [*SMALL, "--log-dir", tmp_path] if "training" in script else ["sample"]
    with start(script, *arguments) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        while library not in maps.read_text():
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", f"{script}: Stopped by SIGINT.\n")


@pytest.mark.parametrize(
    "code",
    [
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n    time.sleep(9)",
        "atexit.register(os.kill, os.getpid(), signal.SIGINT)",
        "with one_line_errors():\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(9)",
    ],
    ids=["where exceptions get lost", "at Python's end", "inside"],
)
def test_ctrl_c_is_one_line_at_any_moment(code):
    ended = shell('"$@"', "-c", f"{TERMINAL}print('before')\n{code}")
    line = "-c: Stopped by SIGINT.\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "before\n", line)


# An exception in a finaliser gets lost: Python shows it and goes on.
FINALISER = """
class Picture:
    def __del__(self):
        {}
def finalise():
    Picture()
    print('after')
"""


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        ("KeyboardInterrupt", 130, "Stopped"),
        ("Stopped(signal.SIGTERM, Path('nowhere'))", 143, "Stopped by SIGTERM."),
    ],
)
def test_a_signal_in_a_finaliser_ends_the_program_with_its_line(error, status, line):
    imports = "from pathlib import Path\nfrom vae.training.run import Stopped\n"
    code = TERMINAL + imports + FINALISER.format(f"raise {error}")
    ended = shell('"$@"', "-c", f"{code}with one_line_errors():\n    finalise()")
    assert (ended.returncode, ended.stdout, ended.stderr) == (status, "", f"-c: {line}\n")


def test_a_mistake_in_a_finaliser_is_shown():
    ended = shell('"$@"', "-c", f"{TERMINAL}{FINALISER.format('1 / 0')}finalise()")
    assert (ended.returncode, ended.stdout) == (0, "after\n")
    assert "ZeroDivisionError" in ended.stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [("OSError(28, 'No space left')", False), ("RuntimeError('a mistake')", True)],
)
def test_a_full_disk_in_another_thread_is_left_to_the_main_thread(error, said):
    thread = f"def fail():\n    raise {error}\nthread = threading.Thread(target=fail)\n"
    code = f"{TERMINAL}import threading\n{thread}thread.start()\nthread.join()"
    ended = shell('"$@"', "-c", code)
    assert ended.returncode == 0
    assert ("RuntimeError: a mistake" in ended.stderr) == bool(ended.stderr) == said


@pytest.mark.slow
@pytest.mark.parametrize("pause", [0, 0.02, 0.2])
def test_a_third_ctrl_c_is_no_traceback_either(tmp_path, pause):
    arguments = [*SMALL, "--epochs=100000", "--log-dir", tmp_path]
    with start("-u", "vae_training.py", *arguments) as process:
        while not process.stdout.readline().startswith("Epoch: 2,"):
            assert process.poll() is None
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            time.sleep(pause)
        _, err = process.communicate(timeout=60)
    # At its very end, Python leaves signals to the system: the shell says 130 of that, too.
    assert process.returncode in (130, -signal.SIGINT)
    assert "Stopped by SIGINT." in err
    assert not {"Traceback", "Exception", "Error"} & set(re.findall(r"\w+", err))


FULL = "error: [Errno 28] No space left on device"
GONE = "error: [Errno 32] Broken pipe"
STREAMS = pytest.mark.parametrize(
    ("line", "status", "words"),
    [
        ('"$@" > /dev/full', 1, FULL),
        ('"$@" | true; exit ${PIPESTATUS[0]}', 1, GONE),
        ('"$@" 2>&1 | true; exit ${PIPESTATUS[0]}', 1, ""),
        ('"$@" > /dev/full 2>&1', 1, ""),
        ('"$@" >&-', 0, ""),
        ('"$@" 2>&-', 0, ""),
        ('"$@" >&- 2>&-', 0, ""),
    ],
)


@STREAMS
@pytest.mark.parametrize("unbuffered", ["", "1"])
@SCRIPTS
def test_help_that_cannot_be_written_is_one_line(script, unbuffered, line, status, words):
    ended = shell(line, script, "--help", PYTHONUNBUFFERED=unbuffered)
    assert ended.returncode == status
    assert ended.stderr == (f"{script}: {words}\n" if words else "")


@pytest.mark.parametrize("line", ['"$@" 2>&-', '"$@" > /dev/full', '"$@" >&- 2>&-'])
@SCRIPTS
def test_a_refusal_keeps_its_status_whatever_the_streams_are(script, line):
    ended = shell(line, script, "--nonsense")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("line", ['"$@" 2>&-', '"$@" 2> /dev/full', '"$@" 2>&1 | true'])
def test_an_error_keeps_its_status_whatever_the_streams_are(line):
    code = f"{TERMINAL}print('before')\nwith one_line_errors():\n    raise ValueError('no')"
    ended = shell(f"{line}; exit ${{PIPESTATUS[0]}}", "-c", code)
    assert (ended.returncode, ended.stderr) == (2, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "status", "words"),
    [
        ('"$@" > /dev/full', 1, FULL),
        ('"$@" | head -1; exit ${PIPESTATUS[0]}', 1, GONE),
        ('"$@" 2>&-', 0, ""),
        ('"$@" >&- 2>&-', 0, ""),
    ],
)
def test_training_ends_as_it_should_whatever_its_streams_are(tmp_path, line, status, words):
    # The terminal of ASCII is told of a folder whose name it cannot spell.
    arguments = [*SMALL, "--log-dir", tmp_path / "Blüten"]
    variables = {"PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": "1" if "head" in line else ""}
    ended = shell(line, "vae_training.py", *arguments, **variables)
    assert ended.returncode == status, ended.stderr
    assert not {"Traceback", "Exception"} & set(re.findall(r"\w+", ended.stderr))
    if words:
        assert ended.stderr.endswith(f"vae_training.py: {words}\n")
    else:
        assert (tmp_path / "Blüten" / "run-synthetic" / "metrics.json").exists()
    if line == '"$@" 2>&-':
        assert f"{tmp_path}/Bl\\xfcten/run-synthetic" in ended.stdout


def test_a_terminal_of_ascii_is_told_of_a_folder_that_it_cannot_spell():
    ended = shell('"$@"', "vae_training.py", "--resume=Blüten", PYTHONIOENCODING="ascii")
    expected = "vae_training.py: error: Bl\\xfcten/checkpoint.pt does not exist"
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(expected)


LIMITED = """
import resource, sys
from pathlib import Path
import vae_training
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
limit = used + 2**29  # room for threads, whose native code would crash without; not for the rest
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
vae_training.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("large", ["--latent-size=1000000", "--image-size=448"])
def test_a_process_without_enough_memory_ends_in_one_line(tmp_path, large):
    ended = shell('"$@"', "-c", LIMITED, *SMALL, "--log-dir", tmp_path, large)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("-c: error: too little memory (")
    assert "Traceback" not in ended.stderr
