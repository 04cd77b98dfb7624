"""The speed table, with the small Flowers102 and epochs of milliseconds."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import torch

from benchmarks import training_speed
from benchmarks.training_speed import eight_times, main, plain_vae, row
from vae.vae import VAE


def test_it_writes_its_table_and_keeps_the_notes(data_root, monkeypatch, tmp_path):
    monkeypatch.setattr(training_speed, "ROUNDS", 1)
    monkeypatch.setattr(training_speed, "EPOCHS", 2)
    monkeypatch.setattr(training_speed, "util", SimpleNamespace(find_spec=lambda _: None))
    # Another process would not know of the small Flowers102.
    threads = lambda workers, _: ThreadPoolExecutor(workers)  # noqa: E731
    monkeypatch.setattr(training_speed, "ProcessPoolExecutor", threads)
    path = tmp_path / "speed.md"
    path.write_text("# Title\n\nold figures\n\n<!-- notes -->\n\nMuch. \n")
    main(str(data_root), 0, path)
    text = path.read_text()
    assert text.startswith("# Training speed\n\n`python -m benchmarks.training_speed --runs 0`, 20")
    assert text.endswith("\n\n<!-- notes -->\n\nMuch. \n") and "old figures" not in text
    names = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
    # Whole runs and pythae were left out.
    assert [name[2:8] for name in names[2:]] == ["an epo", "an epo", "peak m", "memory"]


def test_eight_times_as_many_are_the_training_pictures_over_and_over(data_root):
    assert len(eight_times(data_root, "val")) == 6
    assert len(eight_times(data_root, "train")) == 8 * 20
    assert eight_times(data_root, "train")[25][1] == eight_times(data_root, "train")[5][1]


def test_ratios_are_taken_within_a_round():
    assert row("a", [2.0, 9.0, 4.0], [4.0, 3.0, 4.0], 1.0) == "| a | 4 | 4 | 1 | 0.5 | 3 | 1 |\n"


def test_the_plain_network_rectifies_before_it_pools_and_has_the_same_mathematics():
    plain, model = plain_vae(), VAE((32, 32), latent_size=10, image_channels=3)
    assert [type(each).__name__ for each in plain.encoder.children()][2:4] == ["ReLU", "MaxPool2d"]
    plain.load_state_dict(model.state_dict())
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for network in (plain, model):
        network.decoder(network.encoder(x)[0]).square().sum().backward()
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert one.grad is other.grad or torch.equal(one.grad, other.grad)
