import numpy as np
import pytest

from datasets.synthetic import SPLITS, draw_flowers, flower_labels

# Sizes and labels.


@pytest.mark.parametrize(("split", "size"), [("train", 1020), ("val", 1020), ("test", 6149)])
def test_a_split_has_the_size_that_it_has_in_flowers102(split, size):
    assert flower_labels(split).shape == (size,)
    assert len(draw_flowers(split, (4, 4))) == size


@pytest.mark.parametrize("split", ["train", "val"])
def test_train_and_val_have_ten_pictures_of_each_of_102_species(split):
    assert np.bincount(flower_labels(split)).tolist() == [10] * 102


def test_test_has_20_to_238_pictures_of_each_of_102_species():
    counts = np.bincount(flower_labels("test"))
    assert (len(counts), counts.min(), counts.max()) == (102, 20, 238)


@pytest.mark.parametrize("split", SPLITS)
def test_species_stand_in_flowers102s_order(split):
    labels = flower_labels(split)
    assert labels.dtype == np.int64
    order = labels[np.flatnonzero(np.diff(labels, prepend=-1))]
    assert order.tolist() == [*range(16), 20, *range(16, 20), *range(21, 102)]


# What a picture depends on.


def test_the_same_call_draws_the_same_pictures():
    assert np.array_equal(draw_flowers("val", (8, 8)), draw_flowers("val", (8, 8)))


def test_no_two_backgrounds_are_alike_within_or_across_splits():
    pictures = np.concatenate([draw_flowers(split, (16, 16))[:200] for split in SPLITS])
    edges = pictures[:, 0].reshape(len(pictures), -1)
    assert len(np.unique(edges, axis=0)) == 600


# Pixels.


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
    flowers = draw_flowers(split)[:480:60]
    assert flowers.mean(axis=(1, 2, 3)) == pytest.approx(means, abs=0.1)


def test_single_pixels_are_those_of_every_version_before():
    pixels = draw_flowers("train")[[7, 500], [16, 4], [16, 20]].astype(int)
    assert np.abs(pixels - [[91, 45, 19], [9, 25, 5]]).max() <= 1


def test_pictures_are_bytes_that_use_the_whole_range():
    pictures = draw_flowers("train")
    assert (pictures.shape, pictures.dtype) == ((1020, 32, 32, 3), np.uint8)
    assert pictures.min() < 5
    assert pictures.max() > 250


def test_means_and_spreads_of_the_channels_are_near_those_of_flowers102():
    pixels = draw_flowers("train", (16, 16)) / 255
    assert pixels.mean(axis=(0, 1, 2)) == pytest.approx([0.47, 0.40, 0.32], abs=0.03)
    assert pixels.std(axis=(0, 1, 2)) == pytest.approx([0.27, 0.23, 0.26], abs=0.03)


def test_a_flower_at_64_pixels_reduced_to_32_is_the_flower_at_32_pixels():
    small = draw_flowers("train", (32, 32))[::20]
    large = draw_flowers("train", (64, 64))[::20].reshape(-1, 32, 2, 32, 2, 3).mean((2, 4))
    error = np.abs(large - small).mean(axis=(1, 2, 3))
    error_of_another = np.abs(large - np.roll(small, 1, axis=0)).mean(axis=(1, 2, 3))
    assert error.max() < 5 < 15 < error_of_another.min()


def test_a_wider_picture_shows_the_same_flower_and_more_around_it():
    square = draw_flowers("val", (32, 32)).astype(int)
    for wide in (
        draw_flowers("val", (32, 48))[:, :, 8:-8],
        draw_flowers("val", (48, 32))[:, 8:-8],
    ):
        assert np.abs(wide - square).max() <= 1


def test_pictures_of_one_species_resemble_each_other_more_than_those_of_others():
    train, val = (draw_flowers(split, (12, 12))[:, 3:9, 3:9] / 255 for split in SPLITS[:2])
    labels = flower_labels("train")
    means = np.stack([train[labels == species].mean(axis=0) for species in range(102)])
    distances = ((val[:, None] - means) ** 2).sum(axis=(2, 3, 4))
    # One in 102 would be chance.
    assert (distances.argmin(axis=1) == flower_labels("val")).mean() > 10 / 102
