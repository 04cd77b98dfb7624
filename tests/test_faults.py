"""kill -9 and full disks: what was there stays whole, and a resumed run ends as it would have."""

import hashlib
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

from datasets.pictures import Pictures, Splits
from datasets.preprocessing import compute_once
from vae.checkpoint import load_checkpoint, replace_atomically
from vae_training import Options, find_checkpoint, leave_to_main, train

DISK_FULL = 28
OPTIONS = Options(epochs=12, image_size=8, batch_size=16, checkpoint_every=1, augment=True)


def small_splits() -> Splits:
    pixels = torch.randint(
        256, (64, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    pictures = Pictures(pixels, torch.zeros(64, dtype=torch.long))
    return Splits(pictures, pictures, pictures, "synthetic", None)


def run(
    folder: Path, resume: bool, options: Options = OPTIONS, file_size: int | None = None
) -> None:
    """Train in a process of its own; no file may grow over ``file_size`` bytes."""
    torch.set_num_threads(1)
    if file_size is not None:
        threading.excepthook = leave_to_main
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    checkpoint = find_checkpoint(folder) if resume else None
    try:
        train(options, small_splits(), folder, checkpoint, progress=False)
    except OSError:
        sys.exit(DISK_FULL)


def weights(folder: Path) -> str:
    model = load_checkpoint(folder / "checkpoint.pt")["model"]
    return hashlib.sha256(b"".join(w.numpy().tobytes() for w in model.values())).hexdigest()


@pytest.fixture(scope="module")
def processes():
    # A server that has imported PyTorch once: each run starts in milliseconds, with threads of
    # its own, and can be killed like any other process.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vae_training", "tests.test_faults"])
    return context


@pytest.fixture(scope="module")
def reference(processes, tmp_path_factory) -> tuple[str, float]:
    folder = tmp_path_factory.mktemp("reference")
    process = processes.Process(target=run, args=(folder, False))
    process.start()
    process.join()
    timed = tmp_path_factory.mktemp("timed")
    process = processes.Process(target=run, args=(timed, False))
    started = time.perf_counter()
    process.start()
    process.join()
    assert process.exitcode == 0
    return weights(folder), time.perf_counter() - started


@pytest.mark.kill
@pytest.mark.parametrize("seed", range(30))
def test_a_killed_run_ends_with_the_reference_weights(seed, processes, reference, tmp_path):
    expected, duration = reference
    moment = random.Random(seed).uniform(0.05, 1.0) * duration
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        process = processes.Process(target=run, args=(folder, False))
        process.start()
        time.sleep(moment)
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            break
        moment /= 2  # The run had ended already.
    assert process.exitcode == -signal.SIGKILL

    kept = [folder / name for name in ("checkpoint.pt", "checkpoint.previous.pt")]
    for path in filter(Path.exists, kept):
        load_checkpoint(path)
    resume = kept[0].exists()
    process = processes.Process(target=run, args=(folder, resume))
    process.start()
    process.join()

    assert process.exitcode == 0
    assert weights(folder) == expected
    assert (folder / "metrics.json").exists()


@pytest.mark.parametrize("file_size", [0, 1000, 100_000])
def test_a_full_disk_leaves_the_checkpoint_before_it_whole(
    file_size, processes, reference, tmp_path
):
    def end(options: Options, resume: bool, file_size: int | None = None) -> int:
        process = processes.Process(target=run, args=(tmp_path, resume, options, file_size))
        process.start()
        process.join()
        return process.exitcode

    assert end(replace(OPTIONS, epochs=3), resume=False) == 0
    before = weights(tmp_path)
    assert end(OPTIONS, resume=True, file_size=file_size) == DISK_FULL
    assert weights(tmp_path) == before
    assert not list(tmp_path.glob(".checkpoint*"))
    assert end(OPTIONS, resume=True) == 0
    assert weights(tmp_path) == reference[0]


def write_more_than_fits(path: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    with pytest.raises(OSError), replace_atomically(path) as file:
        file.write(bytes(5000))
    with pytest.warns(UserWarning, match="not kept for the next run"):
        compute_once("pictures", "0" * 64, lambda: np.zeros((9, 8, 8, 3), np.uint8), path.parent)


def test_a_full_disk_leaves_pictures_metrics_and_cache_as_they_were(processes, tmp_path):
    path = tmp_path / "samples.png"
    path.write_bytes(b"before")
    process = processes.Process(target=write_more_than_fits, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
