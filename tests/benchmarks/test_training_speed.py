import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from benchmarks import training_speed
from benchmarks.training_speed import (
    SIZE,
    TARGETS,
    main,
    plain_vae,
    ratio_row,
    take_steps,
    train_here,
    watch,
)
from vae.training.options import Options
from vae.vae import VAE

NOTES = "<!-- notes -->\n\n## What was tried\n\n\nMuch. \n"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    command = ["training_speed.py", *map(str, arguments)]
    monkeypatch.setattr(sys, "argv", command)
    main()


def rows(text: str) -> dict[str, list[str]]:
    """The cells of the table, by the first cell of their row."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if "≤" in line]
    return {name: cells for name, *cells in lines}


@pytest.fixture(autouse=True)
def _without_pythae(monkeypatch) -> None:
    others = SimpleNamespace(find_spec=lambda name: name != "pythae")
    monkeypatch.setattr(training_speed, "util", others)


@pytest.fixture(autouse=True)
def _without_processes(monkeypatch) -> None:
    # Another process would not know of the small Flowers102.
    threads = lambda workers, _: ThreadPoolExecutor(workers)  # noqa: E731
    monkeypatch.setattr(training_speed, "ProcessPoolExecutor", threads)


@pytest.fixture
def figures(monkeypatch) -> list[tuple[str, int]]:
    """What is watched, in its order; each has the figures below, and no process is started."""
    watched = []

    def watch_nothing(trainer, options: Options) -> dict[str, float]:
        watched.append((getattr(trainer, "func", trainer).__name__, options.epochs))
        peak = 800 + 7140 / 1024 * 10 if getattr(trainer, "keywords", {}).get("times") else 800
        return {"epoch": 1.5, "MiB": peak, "start": len(watched)}

    monkeypatch.setattr(training_speed, "watch", watch_nothing)
    return watched


def test_without_runs_it_measures_all_but_whole_runs(data_root, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(training_speed, "ROUNDS", 1)
    monkeypatch.setattr(training_speed, "EPOCHS", 2)
    run(monkeypatch, "--runs", 0, "--data-root", data_root, "--output", tmp_path / "speed.md")
    output = capsys.readouterr().out
    assert output.startswith("- Machine: ")
    assert f"torch {torch.__version__.split('+')[0]}" in output
    table = rows(output)
    assert list(table) == [f"{name} / {other}" for name, other, _ in TARGETS]
    for name, (*numbers, _, verdict) in table.items():
        if any(word in name for word in ("whole run", "pythae")):
            assert verdict == "not measured"
        else:
            middle, lowest, highest = map(float, numbers[1:])
            assert lowest == middle == highest


def test_a_whole_measurement_takes_turns_and_keeps_the_notes(
    data_root, monkeypatch, tmp_path, figures, capsys
):
    path = tmp_path / "speed.md"
    path.write_text(f"# Title\n\nold figures\n\n{NOTES}")
    run(monkeypatch, "--data-root", data_root, "--runs", 2, "--output", path)
    once = ["train_here", "train_here", "train_plainly", "take_steps", "take_steps"]
    assert (
        figures
        == [(name, 11) for name in once] * 5
        + [
            ("train_here", 500),
            ("train_plainly", 500),
        ]
        * 2
    )
    text = path.read_text()
    assert text == f"# Training speed\n\n{capsys.readouterr().out}\n{NOTES}"
    assert "by `python training_speed.py --data-root" in text
    table = rows(text)
    # Starts are numbered: the five of "here" are 1, 6, 11, 16 and 21.
    assert table["start, here / 1"] == ["11", "11", "1", "21", "≤ 1.6", "**not met**"]
    assert table["MiB, here / MiB, plain"] == ["800", "1", "1", "1", "≤ 1.15", "met"]
    assert table["KiB for each picture more / 1"][:2] == ["10", "10"]
    assert table["epoch, here / epoch, pythae"][-1] == "not measured"
    assert table["process, whole run here / process, whole run plain"][-1] != "not measured"


def test_a_target_is_judged_by_the_median_of_the_rounds():
    measured = {"a": [2.0, 9.0, 4.0], "b": [4.0, 3.0, 4.0]}
    assert ratio_row(measured, "a", "b", 1.0) == "| a / b | 4 | 1 | 0.5 | 3 | ≤ 1.0 | met |"
    assert ratio_row(measured, "a", "b", 0.9).endswith("| ≤ 0.9 | **not met** |")
    assert ratio_row(measured, "a", "c", 1) == "| a / c | - | - | - | - | ≤ 1 | not measured |"


def test_an_epoch_is_the_time_between_first_steps(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(training_speed.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(training_speed, "BEGAN", -3.0)
    figures = watch(take_steps, Options(epochs=3, batch_size=2))
    assert figures["epoch"] == 16  # of the steps, each of which lasts one tick
    assert figures["start"] == 3
    # No process that trains with PyTorch gets by with less, nor do two pictures need more.
    assert 100 < figures["MiB"] < 4000


def test_pictures_are_trained_on_several_times_over(splits, monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(training_speed, "load_splits", lambda *_, **__: splits)
    monkeypatch.setattr(training_speed, "train", lambda *arguments: given.append(arguments))
    train_here(Options(), tmp_path, times=3)
    (_, repeated, folder) = given[0]
    assert folder == tmp_path
    assert len(repeated.train) == len(repeated.train.labels) == 3 * len(splits.train)
    assert repeated[1:] == splits[1:]


def test_the_plain_network_has_the_same_mathematics():
    plain, model = plain_vae(), VAE(SIZE, latent_size=10, image_channels=3)
    plain.load_state_dict(model.state_dict())
    x = torch.rand(3, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    for network in (plain, model):
        network.reconstruct(x).square().sum().backward()
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert one.grad is other.grad or torch.equal(one.grad, other.grad)


def test_the_plain_network_rectifies_before_it_pools():
    encoder = plain_vae().encoder
    for number in (1, 2, 3):
        assert isinstance(getattr(encoder, f"pool{number}"), torch.nn.ReLU)
        assert isinstance(getattr(encoder, f"act{number}"), torch.nn.MaxPool2d)
