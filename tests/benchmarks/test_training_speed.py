"""The speed table, with invented figures, and with the small Flowers102 and epochs of moments."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from benchmarks import training_speed
from benchmarks.training_speed import (
    CHANNELS_LAST,
    FUSED,
    IN_MEMORY,
    KEPT_MEMORY,
    PARTS,
    Figures,
    compare,
    compare_parts,
    eight_times,
    growth_per_picture,
    measure_here,
    measure_in_new_process,
    peak_memory,
    row,
    take_steps,
    take_steps_plainly,
    train_plainly,
    train_with_pythae,
    train_without,
)
from vae_training import Options, train

# What is measured of each way: seconds of a run, seconds of an epoch, MiB.
INVENTED = {
    train: Figures(run=10, epoch=2, memory=300),
    train_plainly: Figures(run=40, epoch=5, memory=400),
    take_steps: Figures(run=11, epoch=3, memory=0),
    take_steps_plainly: Figures(run=11, epoch=4, memory=0),
    train_with_pythae: Figures(run=12, epoch=8, memory=0),
}
SHORT = Options(dataset="flowers102", epochs=2, device="cpu")


def invented(way, options: Options) -> Figures:
    if options.dataset == "eight":
        return Figures(run=0, epoch=0, memory=321)
    return INVENTED[way]


def rows_of(table: str) -> dict[str, list[str]]:
    """The rows of a table in Markdown, below its header."""
    _, _, *lines = table.splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines]
    return {name: numbers for name, *numbers in rows}


def test_each_row_compares_what_its_name_says():
    table = compare(SHORT, rounds=2, runs=1, with_pythae=True, measure=invented)
    more = f"{21 * 1024 / 7140:.3g}"
    assert rows_of(table) == {
        "whole run of 500 epochs, s": ["10", "40", "0.25", "0.25", "0.25", "0.43"],
        "an epoch's steps alone, s": ["3", "4", "0.75", "0.75", "0.75", "0.78"],
        "an epoch, beside pythae's, s": ["2", "8", "0.25", "0.25", "0.25", "0.85"],
        "peak memory, MiB": ["300", "400", "0.75", "0.75", "0.75", "1.15"],
        "memory for each picture more, KiB": [more, "1", more, more, more, "8"],
    }


def test_without_whole_runs_and_pythae_their_rows_are_left_out():
    table = compare(SHORT, rounds=1, runs=0, with_pythae=False, measure=invented)
    assert [*rows_of(table)] == [
        "an epoch's steps alone, s",
        "peak memory, MiB",
        "memory for each picture more, KiB",
    ]


def test_ways_are_measured_in_turns_after_the_pictures_were_read():
    measured = []

    def note(way, options: Options) -> Figures:
        measured.append((way, options.dataset))
        return invented(way, options)

    compare(SHORT, rounds=2, runs=0, with_pythae=False, measure=note)
    here, here_eight = (train, "flowers102"), (train, "eight")
    one_round = [
        here,
        here_eight,
        (train_plainly, "flowers102"),
        (take_steps, "flowers102"),
        (take_steps_plainly, "flowers102"),
    ]
    assert measured == [here, here_eight, *one_round, *one_round]


def test_whole_runs_have_the_posts_500_epochs_both_ways():
    measured = []

    def note(way, options: Options) -> Figures:
        measured.append((way, options.epochs))
        return invented(way, options)

    compare(SHORT, rounds=1, runs=1, with_pythae=False, measure=note)
    assert measured[-2:] == [(train, 500), (train_plainly, 500)]


def test_all_ways_can_be_measured(data_root):
    options = Options(dataset="flowers102", data_root=data_root, epochs=2, device="cpu")
    table = compare(options, rounds=1, runs=0, with_pythae=False, measure=measure_here)
    rows = rows_of(table)
    assert all(len(numbers) == 6 for numbers in rows.values())
    for name in ("an epoch's steps alone, s", "peak memory, MiB"):
        assert all(float(number) > 0 for number in rows[name])


def test_the_second_table_compares_training_with_all_parts_and_without_each():
    without = iter([2.0, 4.0, 2.5, 2.0, 5.0])  # all of them, then one left out after the other
    table = compare_parts(SHORT, 1, lambda way, _: Figures(run=0, epoch=next(without), memory=0))
    ratios = {part: numbers[2] for part, numbers in rows_of(table).items()}
    assert ratios == dict(zip(PARTS, ["0.5", "0.8", "1", "0.4"], strict=True))


def test_training_without_each_part_can_be_measured(data_root):
    options = Options(data_root=data_root, epochs=2)
    rows = rows_of(compare_parts(options, 1, measure_here))
    assert [*rows] == [*PARTS]
    assert all(float(number) > 0 for numbers in rows.values() for number in numbers)


@pytest.mark.parametrize("part", PARTS)
def test_what_is_left_out_is_only_that_part(part, data_root, tmp_path, monkeypatch):
    used = set()
    monkeypatch.setattr(training_speed, "keep_freed_memory", lambda: used.add(KEPT_MEMORY))

    def note(weights, lr: float, fused: bool) -> torch.optim.Optimizer:
        weights = list(weights)
        if weights[0].is_contiguous(memory_format=torch.channels_last):
            used.add(CHANNELS_LAST)
        used.update({FUSED} if fused else ())
        return torch.optim.Adam(weights, lr=lr, fused=fused)

    monkeypatch.setattr(training_speed, "Adam", note)
    in_memory = lambda data, progress: used.add(IN_MEMORY) or data  # noqa: E731
    monkeypatch.setattr(training_speed, "InMemory", in_memory)
    train_without(part, Options(data_root=data_root, epochs=1), tmp_path)
    assert used == {*PARTS} - {part}


def test_a_new_process_has_its_own_peak_of_memory_and_its_start_counts():
    torch.ones(2**29, dtype=torch.uint8)  # 512 MiB, freed at once
    new = measure_in_new_process(take_steps_plainly, Options(epochs=2))
    assert new.memory < peak_memory() - 200
    assert new.run > 2 * new.epoch + 0.5  # the imports alone take longer


def test_the_plain_way_logs_the_three_losses_at_every_step_and_two_pictures_an_epoch(
    data_root, tmp_path, monkeypatch
):
    written = []
    for kind in ("add_scalars", "add_image"):
        note = lambda _, tag, what, step, kind=kind: written.append((kind, tag, step))  # noqa: E731
        monkeypatch.setattr(SummaryWriter, kind, note)
    train_plainly(Options(data_root=data_root, epochs=2), tmp_path)
    # The twenty pictures are one batch.
    assert written == [
        entry
        for epoch in (0, 1)
        for entry in (
            ("add_scalars", "loss", epoch),
            ("add_image", "originals", epoch),
            ("add_image", "reconstructions", epoch),
        )
    ]


def test_eight_times_as_many_are_the_training_pictures_over_and_over(data_root):
    assert len(eight_times(data_root, "val")) == 6
    assert len(eight_times(data_root, "train")) == 8 * 20
    assert eight_times(data_root, "train")[25][1] == eight_times(data_root, "train")[5][1]


def test_an_epoch_is_timed_from_its_first_step_to_the_next_ones(monkeypatch):
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    seconds = iter([0, 100, 110, 120, 130, 140, 150, 999])  # the start, six steps, the end
    monkeypatch.setattr(training_speed, "time", SimpleNamespace(perf_counter=seconds.__next__))

    def six_steps(options: Options, folder: Path) -> None:
        for _ in range(6):
            optimiser.step()

    figures = measure_here(six_steps, Options(epochs=3))
    assert (figures.run, figures.epoch) == (999, 20)


def test_ratios_are_taken_within_a_round():
    assert row("a", [2.0, 9.0, 4.0], [4.0, 3.0, 4.0], 1.0) == "| a | 4 | 4 | 1 | 0.5 | 3 | 1 |"


def test_growth_is_between_the_peaks_of_a_round_for_the_pictures_more():
    assert growth_per_picture([100, 300], [170, 286]) == [70 * 1024 / 7140, -14 * 1024 / 7140]
