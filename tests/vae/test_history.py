import pytest
import torch
from helpers import read_events, read_losses

from vae.history import History, HistoryWriter, still_falls, story_epochs


def test_a_curve_has_the_mean_of_each_epochs_values():
    history = History()
    for epoch, values in enumerate([(1.0, 3.0), (5.0,)]):
        history.epoch = epoch
        for value in values:
            history.add("loss", value)
    assert history.curve("loss") == ([1, 2], [2.0, 5.0])
    assert history.curve("what nobody wrote") == ([], [])


def test_a_history_goes_on_where_it_was_saved():
    whole, stopped, resumed = History(), History(), History()
    for history, epochs in ((whole, range(4)), (stopped, range(2))):
        for history.epoch in epochs:
            history.add("loss", 0.1 + history.epoch)
    resumed.load_state_dict(stopped.state_dict())
    for resumed.epoch in (2, 3):
        resumed.add("loss", 0.1 + resumed.epoch)
    assert resumed.curve("loss") == whole.curve("loss")


def test_the_writer_writes_what_tensorboards_does_and_adds_it_to_the_history(tmp_path):
    history = History()
    loss = torch.tensor(2.5, requires_grad=True)
    with HistoryWriter(tmp_path, history) as writer:
        for history.epoch in (0, 1):
            writer.add_scalar("validation/kl", torch.tensor(1.0), history.epoch)
            names = ("KL Loss", "Reconstruction Loss", "Total Loss")
            writer.add_scalars("loss", dict.fromkeys(names, loss), history.epoch)
    assert read_events(tmp_path)["."]["validation/kl"] == [(0, 1.0), (1, 1.0)]
    assert read_losses(tmp_path).tolist() == [[2.5] * 3] * 2
    assert history.curve("validation/kl") == ([1, 2], [1.0, 1.0])
    assert history.curve("loss/KL Loss") == ([1, 2], [2.5, 2.5])


@pytest.mark.parametrize(
    ("values", "falls"),
    [
        ([100 - i for i in range(50)], True),
        ([100 - i for i in range(30)] + [70] * 20, False),
        ([50 + i for i in range(50)], False),
        ([70 + (-1) ** i for i in range(50)], False),
        ([3, 2, 1], False),  # too few to tell
        ([], False),
    ],
)
def test_a_curve_still_falls_if_its_last_fifth_does(values, falls):
    assert still_falls([float(value) for value in values]) == falls


def test_the_story_is_close_together_at_first_and_ends_with_the_run():
    assert story_epochs(500) == [8, 31, 70, 125, 195, 281, 383, 500]


@pytest.mark.parametrize("epochs", [1, 2, 7, 1500])
def test_the_story_of_any_run_ends_with_it_and_has_at_most_eight_moments(epochs):
    moments = story_epochs(epochs)
    assert moments == sorted(set(moments))
    assert moments[-1] == epochs
    assert 1 <= len(moments) <= 8
