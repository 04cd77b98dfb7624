"""kill -9 at random moments: each run is then resumed, and ends as if nothing had happened."""

import hashlib
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from datasets.pictures import Pictures, Splits
from vae.checkpoint import load_checkpoint
from vae_training import Options, find_checkpoint, run_lock, train

OPTIONS = Options(epochs=6, image_size=8, batch_size=16, checkpoint_every=1, augment=True)


def small_splits() -> Splits:
    pixels = torch.randint(
        256, (64, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    pictures = Pictures(pixels, torch.zeros(64, dtype=torch.long))
    return Splits(pictures, pictures, pictures, "synthetic", None)


def run(folder: Path, resume: bool) -> None:
    torch.set_num_threads(1)
    with run_lock(folder):
        train(OPTIONS, small_splits(), folder, find_checkpoint(folder) if resume else None, False)


def weights(folder: Path) -> str:
    model = load_checkpoint(folder / "checkpoint.pt")["model"]
    return hashlib.sha256(b"".join(w.numpy().tobytes() for w in model.values())).hexdigest()


@pytest.fixture(scope="module")
def processes():
    # A server that has imported PyTorch once: each run starts in milliseconds, with threads of
    # its own, and can be killed like any other process.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vae_training", "tests.test_kill"])
    return context


@pytest.fixture(scope="module")
def reference(processes, tmp_path_factory) -> tuple[str, float]:
    folder = tmp_path_factory.mktemp("reference")
    process = processes.Process(target=run, args=(folder, False))
    process.start()
    process.join()
    (warm := tmp_path_factory.mktemp("timed"))
    process = processes.Process(target=run, args=(warm, False))
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
    process = processes.Process(target=run, args=(tmp_path, False))
    process.start()
    time.sleep(moment)
    os.kill(process.pid, signal.SIGKILL)
    process.join()

    kept = [tmp_path / name for name in ("checkpoint.pt", "checkpoint.previous.pt")]
    for path in filter(Path.exists, kept):
        load_checkpoint(path)
    resume = kept[0].exists()
    process = processes.Process(target=run, args=(tmp_path, resume))
    process.start()
    process.join()

    assert process.exitcode == 0
    assert weights(tmp_path) == expected
    assert (tmp_path / "metrics.json").exists()
