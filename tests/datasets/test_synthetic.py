import numpy as np
import pytest
import torch
from torchvision.transforms import ToTensor

from datasets.preprocessing import InMemory
from datasets.synthetic import SPLITS, SyntheticFlowers, _draw, _factors, flower_labels


def draw(split: str, side: int = 32, part: slice = slice(None)) -> np.ndarray:
    """Draw some pictures of a split, without the rest of it."""
    return _draw(_factors(split), side, part)


@pytest.mark.parametrize(("split", "size"), [("train", 1020), ("val", 1020), ("test", 6149)])
def test_a_split_has_the_size_and_labels_that_it_has_in_flowers102(split, size):
    flowers, labels = SyntheticFlowers(split=split, side=4), flower_labels(split)
    assert len(flowers) == size
    assert [flowers[i][1] for i in range(size)] == labels.tolist()
    order = labels[np.flatnonzero(np.diff(labels, prepend=-1))]
    assert order.tolist() == [*range(16), 20, *range(16, 20), *range(21, 102)]


def test_the_102_species_have_as_many_pictures_as_in_flowers102():
    train, val, test = (np.bincount(flower_labels(split)) for split in SPLITS)
    assert train.tolist() == val.tolist() == [10] * 102
    assert (len(test), test.min(), test.max()) == (102, 20, 238)
    assert len(SyntheticFlowers.classes) == 102


def test_it_takes_what_torchvisions_classes_take(tmp_path):
    flowers = SyntheticFlowers(tmp_path, "val", ToTensor(), download=True, side=8)
    image, label = flowers[17]
    assert label == flower_labels("val")[17]
    assert torch.allclose(image, ToTensor()(draw("val", 8)[17]), atol=0.005)
    assert not list(tmp_path.iterdir())
    assert SyntheticFlowers().side == 32


def test_in_memory_gives_the_same_pictures_and_keeps_them(cache_folder):
    for _ in range(2):
        flowers = InMemory(SyntheticFlowers("", "train", ToTensor(), side=8), progress=False)
        assert np.array_equal(flowers.pixels, draw("train", 8))
        assert flowers.labels == flower_labels("train").tolist()
    assert len(list(cache_folder.iterdir())) == 1


def test_no_two_backgrounds_are_alike_within_or_across_splits():
    pictures = np.concatenate([draw(split, 16, slice(200)) for split in SPLITS])
    edges = pictures[:, 0].reshape(len(pictures), -1)
    assert len(np.unique(edges, axis=0)) == 600


@pytest.mark.parametrize(
    ("split", "means"),
    [
        ("train", [111.33, 127.40, 52.88, 68.52, 62.96, 114.97, 113.89, 65.07]),
        ("val", [112.80, 181.23, 106.32, 94.22, 106.52, 96.46, 134.72, 111.21]),
        ("test", [169.35, 114.76, 94.16, 64.17, 91.61, 101.23, 88.17, 151.19]),
    ],
)
def test_flowers_are_those_of_every_version_before(split, means):
    # Means, so that a processor's last bit of a sine does not count.
    flowers = draw(split, part=slice(0, 480, 60))
    assert flowers.mean(axis=(1, 2, 3)) == pytest.approx(means, abs=0.1)


def test_a_flower_at_64_pixels_reduced_to_32_is_the_flower_at_32_pixels():
    small = draw("train", 32, slice(0, None, 20))
    large = draw("train", 64, slice(0, None, 20)).reshape(-1, 32, 2, 32, 2, 3).mean((2, 4))
    error = np.abs(large - small).mean(axis=(1, 2, 3))
    error_of_another = np.abs(large - np.roll(small, 1, axis=0)).mean(axis=(1, 2, 3))
    assert error.max() < 5 < 15 < error_of_another.min()


def test_pictures_of_one_species_resemble_each_other_more_than_those_of_others():
    train, val = (draw(split, 12)[:, 3:9, 3:9] / 255 for split in SPLITS[:2])
    labels = flower_labels("train")
    means = np.stack([train[labels == species].mean(axis=0) for species in range(102)])
    distances = ((val[:, None] - means) ** 2).sum(axis=(2, 3, 4))
    # One in 102 would be chance.
    assert (distances.argmin(axis=1) == flower_labels("val")).mean() > 10 / 102
