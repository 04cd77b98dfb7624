from functools import partial

import pytest
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, EMNIST, FakeData, ImageNet, VisionDataset

from datasets.calls import call, is_torchvisions, needed, parameters_of, unwrapped


class Base(Dataset):
    def __init__(self, root, transform=None) -> None:
        self.given = (root, transform)


class Upon(Base):
    def __init__(self, split="train", **more) -> None:
        super().__init__(**more)


class As(Upon):
    """It has the ``__init__`` of another class."""


def own(split, transform=None, *others):
    return split, transform


PARAMETERS = {
    "a class": (Base, {"root", "transform"}),
    "a class upon another": (Upon, {"split", "root", "transform"}),
    "a class with the init of another": (As, {"split", "root", "transform"}),
    "a function": (own, {"split", "transform"}),
    "a partial": (partial(Upon, transform=3), {"split", "root"}),
    "a partial without its first": (partial(own, "val"), {"transform"}),
    "a partial of a partial": (partial(partial(Upon, root=1), split=2), {"transform"}),
    "whatever takes more": (lambda **more: more, {"root", "split", "transform", "download"}),
    "a class without an init": (Dataset, set()),
}


@pytest.mark.parametrize(("dataset", "names"), PARAMETERS.values(), ids=PARAMETERS)
def test_parameters_are_those_that_can_still_be_given(dataset, names):
    assert set(parameters_of(dataset)) == names


def test_a_parameters_default_is_that_of_the_class_that_names_it_first():
    class Other(Upon):
        def __init__(self, transform=7, **more) -> None:
            super().__init__(transform=transform, **more)

    assert parameters_of(Other)["transform"] == 7


def test_a_call_leaves_out_what_is_not_taken():
    assert call(own, root=1, split="val", transform=3, download=False) == ("val", 3)
    assert call(Base, root=1, split="val").given == (1, None)


def test_needed_is_what_has_no_default_and_is_not_given():
    assert needed(EMNIST, {}) == ["split"]
    assert needed(EMNIST, {"split"}) == needed(partial(EMNIST, split="letters"), {}) == []
    assert needed(own, {}) == ["split"]


def test_torchvisions_are_its_data_sets_and_what_has_their_init():
    class Mine(CIFAR10):
        """Other files than the real ones, perhaps."""

    class Own(VisionDataset):
        """A reader's own, with the base class of torchvision's."""

    for dataset in (CIFAR10, ImageNet, FakeData, Mine, partial(EMNIST, split="letters")):
        assert is_torchvisions(dataset)
    for dataset in (VisionDataset, Own, Base, own, Dataset):
        assert not is_torchvisions(dataset)
    assert unwrapped(partial(EMNIST, split="letters")) is EMNIST
