from functools import cache

import numpy as np
import pytest
import torch
from torchvision.transforms import ToTensor

from datasets.memory import InMemory
from datasets.synthetic import SPLITS, SyntheticFlowers


@cache
def draw(split: str, side: int) -> np.ndarray:
    """Draw all pictures of a split."""
    flowers = SyntheticFlowers(split=split, side=side)
    return np.stack([np.asarray(flowers[index][0]) for index in range(len(flowers))])


@pytest.mark.parametrize(("split", "size"), [("train", 1020), ("val", 1020), ("test", 6149)])
def test_a_split_has_the_size_that_it_has_in_flowers102_and_all_species(split, size):
    flowers = SyntheticFlowers(split=split, side=4)
    counts = np.bincount([flowers[i][1] for i in range(len(flowers))])
    assert len(flowers) == counts.sum() == size
    assert len(counts) == len(flowers.classes) == 102 and np.ptp(counts) <= 1


def test_it_takes_what_torchvisions_classes_take(tmp_path):
    flowers = SyntheticFlowers(tmp_path, "val", ToTensor(), download=True, side=8)
    image, label = flowers[107]
    assert label == 5
    assert torch.allclose(image, ToTensor()(draw("val", 8)[107]), atol=0.005)
    assert not list(tmp_path.iterdir())
    assert SyntheticFlowers().side == 32


def test_in_memory_gives_the_same_pictures_and_labels():
    flowers = InMemory(SyntheticFlowers("", "train", ToTensor(), side=8), progress=False)
    assert np.array_equal(flowers.pixels, draw("train", 8))
    assert flowers.labels[100:104] == [100, 101, 0, 1]


def test_no_two_backgrounds_are_alike_within_or_across_splits():
    pictures = np.concatenate([draw(split, 8)[:200] for split in SPLITS])
    edges = pictures[:, 0].reshape(len(pictures), -1)
    assert len(np.unique(edges, axis=0)) == 600


def test_the_flowers_are_always_the_same():
    # Means, so that a processor's last bit of a sine does not count.
    means = draw("val", 32)[0:480:60].mean(axis=(1, 2, 3))
    assert means == pytest.approx(
        [121.74, 163.23, 93.66, 78.43, 141.53, 81.68, 152.56, 95.24], abs=0.1
    )


def test_a_flower_at_32_pixels_reduced_to_16_is_the_flower_at_16_pixels():
    small = draw("val", 16)
    large = draw("val", 32).reshape(-1, 16, 2, 16, 2, 3).mean((2, 4))
    error = np.abs(large - small).mean(axis=(1, 2, 3))
    error_of_another = np.abs(large - np.roll(small, 1, axis=0)).mean(axis=(1, 2, 3))
    assert error.max() < 10 < 20 < error_of_another.min()


def test_pictures_of_one_species_resemble_each_other_more_than_those_of_others():
    train, val = (draw(split, 12)[:, 3:9, 3:9] / 255 for split in ("train", "val"))
    means = train.reshape(10, 102, -1).mean(axis=0)
    distances = ((val.reshape(1020, 1, -1) - means) ** 2).sum(axis=2)
    # One in 102 would be chance.
    assert (distances.argmin(axis=1) == np.arange(1020) % 102).mean() > 10 / 102
