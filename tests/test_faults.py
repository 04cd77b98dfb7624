"""kill -9 and full disks: what was there stays whole, and a resumed run ends as it would have."""

import multiprocessing
import random
import resource
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_splits
from helpers import assert_same_run

from datasets import preprocessing
from vae.training.checkpoint import replace_atomically
from vae.training.command_line import leave_to_main
from vae.training.options import Options
from vae_training import train

DISK_FULL = 28
OPTIONS = Options(
    epochs=12, image_size=8, batch_size=16, checkpoint_every=1, augment=True, device="cpu"
)


def run(folder: Path, start: str, options: Options = OPTIONS, file_size: int | None = None) -> None:
    """Train in a process of its own; no file may grow over ``file_size`` bytes."""
    torch.set_num_threads(1)
    if file_size is not None:
        threading.excepthook = leave_to_main
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    try:
        train(options, make_splits(train=64), folder, start, progress=False)
    except OSError:
        sys.exit(DISK_FULL)


@pytest.fixture(scope="module")
def processes():
    # A server that has imported PyTorch once: each run starts in milliseconds, with threads of
    # its own, and can be killed like any other process.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vae_training", "tests.conftest", "tests.helpers"])
    return context


@pytest.fixture(scope="module")
def reference(processes, tmp_path_factory) -> tuple[Path, float]:
    """The folder of a run that nothing stopped, and how long it took."""
    for name in ("warm", "timed"):
        folder = tmp_path_factory.mktemp(name)
        process = processes.Process(target=run, args=(folder, "new"))
        started = time.perf_counter()
        process.start()
        process.join()
        assert process.exitcode == 0
    return folder, time.perf_counter() - started


@pytest.mark.kill
@pytest.mark.parametrize("seed", range(30))
def test_a_killed_run_ends_as_if_it_had_not_been(seed, processes, reference, tmp_path):
    expected, duration = reference
    moment = random.Random(seed).uniform(0.05, 1.0) * duration
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        process = processes.Process(target=run, args=(folder, "new"))
        process.start()
        time.sleep(moment)
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            break
        moment /= 2  # The run had ended already.
    assert process.exitcode == -signal.SIGKILL

    # Killed before its first checkpoint, a run has to begin again.
    start = "resume" if (folder / "checkpoint.pt").exists() else "overwrite"
    process = processes.Process(target=run, args=(folder, start))
    process.start()
    process.join()

    assert process.exitcode == 0
    assert_same_run(folder, expected)
    assert not list(folder.glob(".*.unfinished"))


@pytest.mark.parametrize("file_size", [0, 1000, 100_000])
def test_a_full_disk_leaves_the_checkpoint_before_it_whole(
    file_size, processes, reference, tmp_path
):
    def end(options: Options, start: str, file_size: int | None = None) -> int:
        process = processes.Process(target=run, args=(tmp_path, start, options, file_size))
        process.start()
        process.join()
        return process.exitcode

    assert end(replace(OPTIONS, epochs=3), "new") == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    assert end(OPTIONS, "resume", file_size) == DISK_FULL
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob(".*.unfinished"))
    assert end(OPTIONS, "resume") == 0
    assert_same_run(tmp_path, reference[0])


def write_more_than_fits(path: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    with pytest.raises(OSError), replace_atomically(path) as file:
        file.write(bytes(5000))
    preprocessing.CACHE_FOLDER = path.parent
    with pytest.warns(UserWarning, match="not kept for the next run"):
        preprocessing.compute_once("pictures", "0" * 64, lambda: np.zeros((9, 8, 8, 3), np.uint8))


def test_a_full_disk_leaves_pictures_metrics_and_cache_as_they_were(processes, tmp_path):
    path = tmp_path / "samples.png"
    path.write_bytes(b"before")
    process = processes.Process(target=write_more_than_fits, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
