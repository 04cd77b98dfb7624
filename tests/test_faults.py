"""kill -9 and full disks: what was there stays whole, and a resumed run ends as it would have."""

import contextlib
import io
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from conftest import SmallPictures
from helpers import SMALL, assert_same_run, assert_same_tensors, flags

from vae.checkpoint import load_checkpoint, load_model
from vae_training import DATASETS, main

resource = pytest.importorskip("resource", reason="this system has no limits for a process")
if "forkserver" not in multiprocessing.get_all_start_methods():
    pytest.skip("this system has no processes that fork", allow_module_level=True)

EPOCHS = 8


class ManyPictures(SmallPictures):
    """Enough that an epoch takes longer than its checkpoint."""

    sizes: ClassVar[dict[str, int]] = {"train": 64, "val": 6, "test": 34}


def prepare(folder: Path) -> None:
    """What conftest.py does for the tests' own process."""
    torch.set_num_threads(1)
    DATASETS["many"] = ManyPictures
    os.environ["DATASETS_CACHE"] = str(folder.parent / f"{folder.name}-cache")


def run(folder: Path, resume=False, epochs=EPOCHS, file_size=None, kill_at=None, said=None) -> None:
    """Train, or go on; called in a process of its own.

    No file may grow over ``file_size`` bytes; ``kill_at`` (name, time) kills the process where a
    file of that name is written for that time, counted from 1, and about to take its place;
    ``said`` is sent what goes to the terminal.
    """
    prepare(folder)
    options = SMALL | {"dataset": "many", "batch_size": 16, "epochs": epochs, "augment": True}
    place = {"log_dir": folder.parent, "resume" if resume else "run_name": folder.name}
    arguments = flags(options | {"checkpoint_every": 1} | place)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    if kill_at is not None:
        die_before_replacing(*kill_at)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            main(arguments)
    finally:
        if said is not None:
            said.send(errors.getvalue())


def die_before_replacing(name: str, count: int) -> None:
    """Kill this process when a file of that name is whole, for that time, and not yet in place."""
    replace, names = os.replace, []

    def replace_or_die(source, target) -> None:
        names.append(Path(target).name)
        if names.count(name) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = replace_or_die


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


MOMENTS = {
    "the first checkpoint": ("checkpoint.pt", 1),
    "one in the middle": ("checkpoint.pt", 5),
    "the one with the fitted latents": ("checkpoint.pt", EPOCHS + 1),
    "the metrics": ("metrics.json", 1),
    "a picture": ("samples.png", 1),
}


@pytest.mark.parametrize("kill_at", MOMENTS.values(), ids=MOMENTS)
def test_a_run_killed_while_it_writes_a_file_ends_as_if_it_had_not_been(
    kill_at, end, reference, tmp_path
):
    folder = tmp_path / "run"
    assert end(run, folder, kill_at=kill_at) == -signal.SIGKILL
    goes_on(folder, end)
    assert_same_run(folder, reference[0])


def test_the_result_is_there_before_anything_that_is_only_shown(end, tmp_path):
    folder = tmp_path / "run"
    assert end(run, folder, kill_at=("reconstructions.png", 1)) == -signal.SIGKILL
    *_, latents = load_model(folder / "checkpoint.pt")
    assert latents is not None
    assert (folder / "metrics.json").exists()
    assert not list(folder.glob("*.png"))


@pytest.fixture
def refused(processes, end):
    """Go on with a run, which has to break; return the last line that it writes."""

    def refused(folder: Path, **options) -> str:
        receiver, said = processes.Pipe(duplex=False)
        assert end(run, folder, True, said=said, **options) == 1
        *_, last = receiver.recv().splitlines()
        return last

    return refused


def assert_goes_on(folder: Path, before: bytes, end, reference) -> None:
    """A run that found no room has lost nothing, and ends with the weights that it should have."""
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert not list(folder.glob(".*.unfinished"))
    # Its first report, at three epochs, has points and pictures of its own in TensorBoard.
    assert end(run, folder, True) == 0
    ours, others = (load_checkpoint(each / "checkpoint.pt") for each in (folder, reference[0]))
    assert_same_tensors(ours, others)


@pytest.mark.parametrize("file_size", [0, 100_000])
def test_a_file_that_may_not_grow_is_one_line_and_loses_nothing(
    file_size, end, refused, begun, reference, tmp_path
):
    folder = shutil.copytree(begun, tmp_path / "run")
    before = (folder / "checkpoint.pt").read_bytes()
    assert refused(folder, file_size=file_size).startswith("error: [Errno 27] File too large")
    assert_goes_on(folder, before, end, reference)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place]
        mounted = subprocess.run(mount, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"nothing can be mounted here: {error}")
    if mounted.returncode:
        pytest.skip(f"nothing may be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_full_disk_is_one_line_and_loses_nothing(end, refused, begun, reference, small_disk):
    folder = shutil.copytree(begun, small_disk / "run")
    before = (folder / "checkpoint.pt").read_bytes()
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 200_000))
    assert refused(folder).startswith("error: [Errno 28] No space left on device")
    filler.unlink()
    assert_goes_on(folder, before, end, reference)
