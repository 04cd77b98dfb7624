import builtins
import errno
import io
import os
import shlex
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import Literal

import pytest
import torch
from filelock import FileLock

from datasets.errors import UserError
from vae.command_line import (
    check,
    check_choices,
    command_line,
    new_folder,
    one_line_errors,
    quote,
    run_to_resume,
    with_home,
)
from vae.run import Stopped

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
    (Stopped(SIGINT, Path("nowhere")), 130, "Stopped by SIGINT."),
    (Stopped(SIGTERM, Path("nowhere")), 143, "Stopped by SIGTERM."),
]


@pytest.mark.parametrize(("error", "status", "line"), ENDINGS, ids=[repr(it[0]) for it in ENDINGS])
def test_what_a_user_can_change_becomes_one_line_and_an_exit_status(error, status, line, capsys):
    assert ending(error, capsys) == (status, f"{line}\n")


def test_too_little_memory_on_the_cpu_becomes_one_line(capsys):
    with pytest.raises(RuntimeError) as raised:
        torch.empty(10**15)  # more than a process can address
    status, text = ending(raised.value, capsys)
    assert status == 1
    (line,) = text.splitlines()
    assert line.startswith(f"{MEMORY} (")
    assert "DefaultCPUAllocator" in line


@pytest.mark.parametrize("error", [ValueError, TypeError, RuntimeError, KeyError, AssertionError])
def test_a_mistake_in_the_code_keeps_its_traceback(error):
    with pytest.raises(error), one_line_errors():
        raise error("a mistake")


def test_a_console_without_a_letter_shows_its_number(monkeypatch):
    file = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(file, encoding="ascii", write_through=True))
        with one_line_errors():
            print("runs/beta-\N{GREEK SMALL LETTER BETA}")
        assert file.getvalue().split() == [rb"runs/beta-\u03b2"]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("--log-dir=~/runs", "--log-dir={home}/runs"),
        ("--log-dir=a~b", "--log-dir=a~b"),
        ("--run-name=a=~", "--run-name=a=~"),
        ("~/a.png", "~/a.png"),  # which the shell has replaced, unless it was in quotes
    ],
)
def test_the_home_folder_is_found_behind_an_equals_sign(word, expected, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, "/home/me")
    assert with_home([word]) == [expected.format(home="/home/me")]


def test_a_program_that_ends_well_says_nothing(capsys):
    with one_line_errors():
        pass
    assert capsys.readouterr() == ("", "")


def test_a_stopped_program_prints_the_command_that_goes_on(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "my run"
    folder.mkdir()
    (folder / "checkpoint.pt").touch()
    monkeypatch.chdir(tmp_path)
    status, text = ending(Stopped(SIGINT, Path("my run")), capsys)
    first, command = text.splitlines()
    assert (status, first) == (130, "Stopped by SIGINT. Go on with:")
    assert shlex.split(command) == [sys.executable, sys.argv[0], "--resume", str(folder)]


def test_a_command_works_in_a_terminal_and_in_ipython(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["my code/vae_training.py", "--epochs=3"])
    words = ["my code/vae_training.py", "--resume", "my runs/it's"]
    assert shlex.split(command_line(*words[1:])) == [sys.executable, *words]
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)
    run, *rest = shlex.split(command_line(*words[1:]))
    assert (run, rest) == ("%run", words)


@pytest.mark.parametrize(("system", "quoted"), [("posix", "'a b' c"), ("nt", '"a b" c')])
def test_a_command_is_quoted_for_the_shell_of_the_system(monkeypatch, system, quoted):
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", system)
        given = quote(["a b", "c"])
    assert given == quoted


# What options may be.


@pytest.mark.parametrize("given", [2, 2.5, 7])
def test_a_value_in_its_range_is_taken(given):
    check("--speed", given, 2, 7)


@pytest.mark.parametrize(
    ("given", "high", "message"),
    [
        (1, {}, "--speed is 1: 2 or more is needed"),
        (1.999, {}, "--speed is 1.999: 2 or more is needed"),
        (float("nan"), {}, "--speed is nan: 2 or more is needed"),
        (float("inf"), {}, "--speed is inf: 2 or more is needed"),
        (1, {"high": 7}, "--speed is 1: 2 to 7 is needed"),
        (8, {"high": 7}, "--speed is 8: 2 to 7 is needed"),
        (float("nan"), {"high": 7}, "--speed is nan: 2 to 7 is needed"),
    ],
)
def test_a_value_out_of_its_range_is_refused_with_the_range(given, high, message):
    with pytest.raises(UserError) as refused:
        check("--speed", given, 2, **high)
    assert str(refused.value) == message


@dataclass(frozen=True)
class Choosy:
    colour: Literal["red", "blue"] = "red"
    size: Literal[1, 2] = 1
    name: str = "any"


def test_a_value_that_is_none_of_its_options_choices_is_refused_with_the_choices():
    check_choices(Choosy("blue", 2, "green"))
    with pytest.raises(UserError) as refused:
        check_choices(Choosy("green"))
    assert str(refused.value) == "colour is 'green': one of ('red', 'blue') is needed"
    with pytest.raises(UserError, match=r"size is 3: one of \(1, 2\) is needed"):
        check_choices(Choosy(size=3))


# Folders.


@pytest.mark.parametrize(
    ("there", "given", "expected"),
    [
        (["runs/a"], "a", "runs/a"),
        (["b"], "b", "b"),
        (["runs/c", "c"], "c", "runs/c"),
        ([], "d", "runs/d"),  # which is then named in the refusal
    ],
)
def test_a_run_is_given_by_its_name_or_else_by_its_folder(
    tmp_path, monkeypatch, there, given, expected
):
    monkeypatch.chdir(tmp_path)
    for name in there:
        (tmp_path / name).mkdir(parents=True)
    assert run_to_resume(Path("runs"), given) == Path(expected)


def test_a_runs_whole_path_is_taken_as_it_is(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    expected = tmp_path / "elsewhere"
    assert run_to_resume(tmp_path / "runs", str(expected)) == expected


@pytest.mark.parametrize(
    ("dataset", "ending"),
    [
        ("flowers102", ""),
        ("synthetic", "-synthetic"),
        ("/my pictures/Roses & tulips", "-Roses-tulips"),
        ("/pictures/Blüten_2", "-Blüten_2"),
    ],
)
def test_a_new_runs_folder_is_called_after_its_time_and_its_data_set(tmp_path, dataset, ending):
    before = datetime.now().replace(microsecond=0)
    with new_folder(tmp_path / "runs", dataset) as folder:
        assert folder.is_dir()
    assert folder.parent == tmp_path / "runs"
    time = datetime.strptime(folder.name.removesuffix(ending), "%Y-%m-%d_%H-%M-%S")
    assert before <= time <= datetime.now()


def test_a_run_that_begins_in_the_same_second_as_others_takes_another_folder(tmp_path):
    now = datetime.now()
    names = {f"{now + timedelta(seconds=after):%Y-%m-%d_%H-%M-%S}" for after in range(60)}
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}-2").mkdir()
    with new_folder(tmp_path, "flowers102") as folder:
        assert folder.name.removesuffix("-3") in names
        assert folder.name.endswith("-3")


def test_runs_that_begin_at_once_never_share_a_folder(tmp_path):
    together = threading.Barrier(8)

    def begin(number: int) -> Path:
        together.wait()
        with new_folder(tmp_path / "runs", "flowers102") as folder:
            (folder / f"{number}").touch()
        return folder

    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(begin, range(8)))
    assert len(set(folders)) == 8
    for number, folder in enumerate(folders):
        assert [path.name for path in folder.iterdir()] == [f"{number}"]


def test_a_new_folder_into_which_nothing_was_written_goes_again(tmp_path):
    with new_folder(tmp_path, "flowers102"):
        assert len(list(tmp_path.iterdir())) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [UserError, OSError, KeyboardInterrupt])
def test_a_new_folder_into_which_nothing_was_written_goes_again_after_an_error(tmp_path, error):
    with pytest.raises(error), new_folder(tmp_path, "flowers102"):
        raise error
    assert not list(tmp_path.iterdir())


def test_a_new_folder_in_which_a_run_had_only_its_lock_goes_again(tmp_path):
    with pytest.raises(UserError), new_folder(tmp_path, "flowers102") as folder:
        with FileLock(folder / ".lock"):
            pass
        raise UserError("no pictures")
    assert not list(tmp_path.iterdir())


def test_a_new_folder_into_which_something_was_written_stays_after_an_error(tmp_path):
    with pytest.raises(UserError), new_folder(tmp_path, "flowers102") as folder:
        (folder / "checkpoint.pt").write_bytes(b"weights")
        raise UserError("stopped")
    assert (folder / "checkpoint.pt").read_bytes() == b"weights"
