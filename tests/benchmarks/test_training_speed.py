"""The speed table, with the small Flowers102 and epochs of milliseconds."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import torch

from benchmarks import training_speed
from benchmarks.training_speed import eight_times, main, plain_vae, row, train_plainly, watch
from vae.vae import VAE
from vae_training import Options, train


def test_it_prints_a_table_of_what_was_measured(data_root, monkeypatch, capsys):
    monkeypatch.setattr(training_speed, "ROUNDS", 1)
    monkeypatch.setattr(training_speed, "EPOCHS", 2)
    monkeypatch.setattr(training_speed, "util", SimpleNamespace(find_spec=lambda _: None))
    # Another process would not know of the small Flowers102.
    threads = lambda workers, _: ThreadPoolExecutor(workers)  # noqa: E731
    monkeypatch.setattr(training_speed, "ProcessPoolExecutor", threads)
    main(str(data_root), runs=0)
    table = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    # Whole runs and pythae were left out.
    assert [name[:12] for name, *_ in table[2:]] == ["an epoch's s", "peak memory,", "memory for e"]
    assert all(len(numbers) == 6 and float(numbers[0]) for _, *numbers in table[2:])


def test_whole_runs_have_the_posts_500_epochs_both_ways(monkeypatch):
    seen = []
    watch = lambda way, options: seen.append((way, options.epochs)) or {"epoch": 1, "MiB": 1}  # noqa: E731
    monkeypatch.setattr(training_speed, "watch", watch)
    monkeypatch.setattr(training_speed, "ProcessPoolExecutor", lambda n, _: ThreadPoolExecutor(n))
    main("", runs=1)
    assert seen[-2:] == [(train, 500), (train_plainly, 500)]


def test_eight_times_as_many_are_the_training_pictures_over_and_over(data_root):
    assert len(eight_times(data_root, "val")) == 6
    assert len(eight_times(data_root, "train")) == 8 * 20
    assert eight_times(data_root, "train")[25][1] == eight_times(data_root, "train")[5][1]


def test_an_epoch_is_timed_from_its_first_step_to_the_next_ones(monkeypatch):
    clock = iter(range(100, 200, 10))  # ten seconds a step
    monkeypatch.setattr(training_speed, "time", SimpleNamespace(perf_counter=clock.__next__))
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    way = lambda *_: [optimiser.step() for _ in range(6)]  # noqa: E731
    assert watch(way, Options(epochs=3))["epoch"] == 20


def test_ratios_are_taken_within_a_round():
    assert row("a", [2.0, 9.0, 4.0], [4.0, 3.0, 4.0], 1.0) == "| a | 4 | 4 | 1 | 0.5 | 3 | 1 |"


def test_the_plain_network_rectifies_before_it_pools_and_has_the_same_mathematics():
    plain, model = plain_vae(), VAE((32, 32), latent_size=10, image_channels=3)
    assert [type(each).__name__ for each in plain.encoder.children()][2:4] == ["ReLU", "MaxPool2d"]
    plain.load_state_dict(model.state_dict())
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for network in (plain, model):
        network.decoder(network.encoder(x)[0]).square().sum().backward()
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert one.grad is other.grad or torch.equal(one.grad, other.grad)
