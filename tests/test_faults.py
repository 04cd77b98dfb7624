"""kill -9 and full disks: what was there stays whole, and a resumed run ends as it would have."""

import contextlib
import io
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from conftest import SmallPictures
from helpers import SMALL, assert_same_run

from datasets import DATASETS, preprocessing
from vae.run import load_model
from vae_training import main

EPOCHS = 8


class ManyPictures(SmallPictures):
    """Enough that an epoch takes longer than its checkpoint."""

    sizes: ClassVar[dict[str, int]] = {"train": 64, "val": 6, "test": 34}


def prepare(folder: Path) -> None:
    """What conftest.py does for the tests' own process."""
    torch.set_num_threads(1)
    DATASETS["many"] = ManyPictures
    preprocessing.CACHE_FOLDER = folder.parent / f"{folder.name}-cache"


def run(folder: Path, resume=False, epochs=EPOCHS, file_size=None, kill_at=None, said=None) -> None:
    """Train in a process of its own.

    No file may grow over ``file_size`` bytes; ``kill_at`` (name, time) kills the process where a
    file of that name is written for that time, counted from 1, and about to take its place;
    ``said`` is sent what goes to the terminal.
    """
    prepare(folder)
    options = SMALL | {"dataset": "many", "batch_size": 16, "epochs": epochs}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    arguments += ["--augment", "--checkpoint-every=1", f"--log-dir={folder.parent}"]
    arguments += [f"--{'resume' if resume else 'run-name'}={folder.name}"]
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    if kill_at is not None:
        (name, count), replace, names = kill_at, os.replace, []

        def replace_or_die(source, target) -> None:
            names.append(Path(target).name)
            if names.count(name) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = replace_or_die
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            main(arguments)
    finally:
        if said is not None:
            said.send(errors.getvalue())


@pytest.fixture(scope="module")
def processes():
    # A server that has imported PyTorch once: each run starts in milliseconds, and can be killed.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["vae_training", "tests.conftest", "tests.helpers", "torch._dynamo"]
    )
    return context


@pytest.fixture(scope="module")
def end(processes):
    """Call a function in a process of its own; return its exit status."""

    def end(function: Callable[..., None], *arguments, **options) -> int:
        process = processes.Process(target=function, args=arguments, kwargs=options)
        process.start()
        process.join()
        return process.exitcode

    return end


@pytest.fixture(scope="module")
def begun(end, tmp_path_factory) -> Path:
    """The folder of a run of three epochs, to go on with."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    assert end(run, folder, epochs=3) == 0
    return folder


@pytest.fixture(scope="module")
def reference(end, begun, tmp_path_factory) -> tuple[Path, float]:
    """The folder of a run that nothing stopped, and how long it took."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    started = time.perf_counter()
    assert end(run, folder) == 0
    return folder, time.perf_counter() - started


def goes_on(folder: Path, end) -> None:
    """Resume a killed run, or begin again where it had not come to its first checkpoint."""
    resume = (folder / "checkpoint.pt").exists()
    if resume:
        load_model(folder / "checkpoint.pt")  # it is whole
    assert end(run, folder, resume) == 0


@pytest.mark.kill
@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(
    seed, processes, end, reference, tmp_path
):
    expected, duration = reference
    moment = random.Random(seed).uniform(0.05, 0.6) * duration
    folder = tmp_path / "run"
    process = processes.Process(target=run, args=(folder,))
    process.start()
    time.sleep(moment)
    process.kill()
    process.join()
    if process.exitcode == 0:
        pytest.skip("it had ended already")
    assert process.exitcode == -signal.SIGKILL
    goes_on(folder, end)
    assert_same_run(folder, expected)


@pytest.mark.parametrize(
    "kill_at",
    # The first checkpoint, one in the middle, the one with the fitted latents.
    [*(("checkpoint.pt", epoch) for epoch in (1, 5, EPOCHS + 1)), ("metrics.json", 1)],
)
def test_a_run_killed_while_it_writes_a_file_ends_as_if_it_had_not_been(
    kill_at, end, reference, tmp_path
):
    folder = tmp_path / "run"
    assert end(run, folder, kill_at=kill_at) == -signal.SIGKILL
    goes_on(folder, end)
    assert_same_run(folder, reference[0])


@pytest.mark.parametrize("file_size", [0, 100_000])
def test_a_full_disk_is_one_line_and_loses_nothing(
    file_size, processes, end, begun, reference, tmp_path
):
    folder = shutil.copytree(begun, tmp_path / "run")
    before = (folder / "checkpoint.pt").read_bytes()
    receiver, said = processes.Pipe(duplex=False)
    assert end(run, folder, True, file_size=file_size, said=said) == 1
    *_, last = receiver.recv().splitlines()
    assert last.startswith("error: [Errno 27] File too large")
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert not list(folder.glob(".*.unfinished"))
    # Its first report, at three epochs, has points and pictures of its own in TensorBoard.
    assert end(run, folder, True) == 0
    ours, others = (load_model(each / "checkpoint.pt")[0] for each in (folder, reference[0]))
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, others.state_dict()[name]), name
