"""The speed table, with the small Flowers102 and epochs of milliseconds."""

import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import torch

from benchmarks import training_speed
from benchmarks.training_speed import SIZE, TARGETS, EightTimes, main, plain_vae, ratio_row
from vae.vae import VAE

NOTES = "<!-- notes -->\n\n## What was tried\n\n\nMuch. \n"


def test_it_writes_its_table_and_keeps_the_notes(data_root, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(training_speed, "ROUNDS", 1)
    monkeypatch.setattr(training_speed, "EPOCHS", 2)
    monkeypatch.setattr(training_speed, "util", SimpleNamespace(find_spec=lambda _: None))
    # Another process would not know of the small Flowers102.
    threads = lambda workers, _: ThreadPoolExecutor(workers)  # noqa: E731
    monkeypatch.setattr(training_speed, "ProcessPoolExecutor", threads)
    path = tmp_path / "speed.md"
    path.write_text(f"# Title\n\nold figures\n\n{NOTES}")
    command = ["training_speed.py", "--runs", "0", "--data-root", str(data_root)]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(path)])
    main()
    text = path.read_text()
    assert text.startswith("# Training speed\n\n- Machine: ")
    assert text.endswith(NOTES)
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if "≤" in line]
    assert [row[0] for row in rows] == [f"{name} / {other}" for name, other, _ in TARGETS]
    for name, *_, verdict in rows:
        missing = any(word in name for word in ("whole run", "pythae"))
        assert (verdict == "not measured") == missing


def test_eight_times_as_many_are_the_training_pictures_over_and_over(data_root):
    once = EightTimes(data_root, "val")
    assert len(once) == 6
    assert len(EightTimes(data_root, "train")) == 8 * 20
    assert EightTimes(data_root, "train")[25][1] == EightTimes(data_root, "train")[5][1]


def test_a_target_is_judged_by_the_median_of_the_rounds():
    measured = {"a": [2.0, 9.0, 4.0], "b": [4.0, 3.0, 4.0]}
    assert ratio_row(measured, "a", "b", 1.0) == "| a / b | 4 | 1 | 0.5 | 3 | ≤ 1.0 | met |"
    assert ratio_row(measured, "a", "b", 0.9).endswith("| ≤ 0.9 | **not met** |")
    assert ratio_row(measured, "a", "c", 1) == "| a / c | - | - | - | - | ≤ 1 | not measured |"


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
