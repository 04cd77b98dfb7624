import numpy as np
import pytest

from datasets.synthetic import FACTORS, SPLITS, draw_flowers, flower_factors, flower_labels

SPECIES_FACTORS = FACTORS[FACTORS.index("petals") : FACTORS.index("petal_red")]


def factor(split: str, name: str) -> np.ndarray:
    return flower_factors(split)[:, FACTORS.index(name)]


# Sizes and labels.


@pytest.mark.parametrize(("split", "size"), [("train", 1020), ("val", 1020), ("test", 6149)])
def test_a_split_has_the_size_that_it_has_in_flowers102(split, size):
    assert flower_labels(split).shape == (size,)
    assert flower_factors(split).shape == (size, len(FACTORS))


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
    assert np.array_equal(
        draw_flowers("val", indices=range(70)), draw_flowers("val", indices=range(70))
    )


def test_a_picture_does_not_depend_on_the_others_drawn_nor_on_their_order():
    # More than one chunk at this resolution, and the chosen ones come from several chunks.
    together = draw_flowers("train", indices=range(150))
    chosen = [140, 3, 3, 77]
    assert np.array_equal(draw_flowers("train", indices=chosen), together[chosen])


def test_without_indices_the_whole_split_is_drawn():
    every = draw_flowers("train", (8, 8))
    assert len(every) == 1020
    assert np.array_equal(every[-5:], draw_flowers("train", (8, 8), range(1015, 1020)))


def test_no_indices_draw_no_pictures():
    assert draw_flowers("train", (16, 24), []).shape == (0, 16, 24, 3)


def test_no_two_flowers_have_the_same_factors_within_or_across_splits():
    factors = np.concatenate([flower_factors(split) for split in SPLITS])
    positions = factors[:, [FACTORS.index("x"), FACTORS.index("y")]]
    assert len(np.unique(positions, axis=0)) == 1020 + 1020 + 6149


def test_no_two_backgrounds_are_alike_within_or_across_splits():
    pictures = np.concatenate([draw_flowers(split, (16, 16), range(200)) for split in SPLITS])
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
    flowers = draw_flowers(split, indices=range(0, 480, 60))
    assert flowers.mean(axis=(1, 2, 3)) == pytest.approx(means, abs=0.1)


def test_single_pixels_are_those_of_every_version_before():
    pixels = draw_flowers("train", indices=[7, 500])[[0, 1], [16, 4], [16, 20]].astype(int)
    assert np.abs(pixels - [[91, 45, 19], [9, 25, 5]]).max() <= 1


def test_pictures_are_bytes_that_use_the_whole_range():
    pictures = draw_flowers("train", indices=range(0, 1020, 10))
    assert (pictures.shape, pictures.dtype) == ((102, 32, 32, 3), np.uint8)
    assert pictures.min() < 5
    assert pictures.max() > 250


def test_means_and_spreads_of_the_channels_are_near_those_of_flowers102():
    pixels = draw_flowers("train", (16, 16)) / 255
    assert pixels.mean(axis=(0, 1, 2)) == pytest.approx([0.47, 0.40, 0.32], abs=0.03)
    assert pixels.std(axis=(0, 1, 2)) == pytest.approx([0.27, 0.23, 0.26], abs=0.03)


def test_a_flower_at_64_pixels_reduced_to_32_is_the_flower_at_32_pixels():
    indices = range(0, 1020, 20)
    small = draw_flowers("train", (32, 32), indices)
    large = draw_flowers("train", (64, 64), indices).reshape(-1, 32, 2, 32, 2, 3).mean((2, 4))
    error = np.abs(large - small).mean(axis=(1, 2, 3))
    error_of_another = np.abs(large - np.roll(small, 1, axis=0)).mean(axis=(1, 2, 3))
    assert error.max() < 5 < 15 < error_of_another.min()


def test_a_wider_picture_shows_the_same_flower_and_more_around_it():
    square = draw_flowers("test", (32, 32), range(8)).astype(int)
    for wide in (
        draw_flowers("test", (32, 48), range(8))[:, :, 8:-8],
        draw_flowers("test", (48, 32), range(8))[:, 8:-8],
    ):
        assert np.abs(wide - square).max() <= 1


# Factors.


@pytest.fixture(scope="module")
def read_from_pixels() -> np.ndarray:
    """The factors of val as a ridge regression, fitted to train, reads them from the pixels."""
    train, val = (draw_flowers(split, (12, 12)).reshape(1020, -1) / 255 for split in SPLITS[:2])
    factors, mean = flower_factors("train"), train.mean(axis=0)
    gram = (train - mean).T @ (train - mean) + 10 * np.eye(train.shape[1])
    weights = np.linalg.solve(gram, (train - mean).T @ (factors - factors.mean(axis=0)))
    return (val - mean) @ weights


@pytest.mark.parametrize(
    "name",
    [
        "x",
        "y",
        "radius",
        "brightness",
        "light_x",
        "light_y",
        "petal_red",
        "petal_green",
        "tip_blue",
    ],
)
def test_a_factor_can_be_read_from_the_pixels(read_from_pixels, name):
    read = read_from_pixels[:, FACTORS.index(name)]
    assert np.corrcoef(read, factor("val", name))[0, 1] > 0.55


def test_the_disc_in_its_colour_and_light_is_where_x_and_y_say():
    indices = np.arange(0, 6149, 60)
    f = dict(zip(FACTORS, flower_factors("test")[indices].T, strict=True))
    rows, columns = (np.round((f[name] + 1) * 32 - 0.5).astype(int) for name in ("y", "x"))
    pictures = draw_flowers("test", (64, 64), indices) / 255
    seen = pictures[np.arange(len(indices)), rows, columns]
    light = f["brightness"] * (1 + 0.25 * (f["x"] * f["light_x"] + f["y"] * f["light_y"]))
    disc = np.stack([f["disc_red"], f["disc_green"], f["disc_blue"]], axis=1)
    assert np.abs(seen - np.minimum(1.1 * disc * light[:, None], 1)).mean() < 0.04


def test_factors_of_the_species_are_the_same_for_all_its_pictures_in_all_splits():
    columns = [FACTORS.index(name) for name in SPECIES_FACTORS]
    factors = np.concatenate([flower_factors(split) for split in SPLITS])[:, columns]
    labels = np.concatenate([flower_labels(split) for split in SPLITS])
    assert len(np.unique(np.column_stack([labels, factors]), axis=0)) == 102
    assert len(np.unique(factors, axis=0)) == 102


@pytest.mark.parametrize("name", FACTORS[: FACTORS.index("petals")])
def test_factors_of_the_picture_differ_within_a_species(name):
    assert factor("train", name)[:10].std() > 0


def test_the_rotation_is_less_than_the_angle_between_two_petals():
    rotation = factor("test", "rotation") * factor("test", "petals") / (2 * np.pi)
    assert 0 <= rotation.min() < 0.01
    assert 0.99 < rotation.max() < 1.0001


def test_pictures_of_one_species_resemble_each_other_more_than_those_of_others():
    train, val = (draw_flowers(split, (12, 12))[:, 3:9, 3:9] / 255 for split in SPLITS[:2])
    labels = flower_labels("train")
    means = np.stack([train[labels == species].mean(axis=0) for species in range(102)])
    distances = ((val[:, None] - means) ** 2).sum(axis=(2, 3, 4))
    # One in 102 would be chance.
    assert (distances.argmin(axis=1) == flower_labels("val")).mean() > 10 / 102


# Errors.


@pytest.mark.parametrize("function", [flower_labels, flower_factors, draw_flowers])
def test_an_unknown_split_is_refused(function):
    with pytest.raises(ValueError, match=r"'training'.*train, val, test"):
        function("training")


@pytest.mark.parametrize("index", [-1021, 1020, 0.5])
def test_an_index_outside_of_the_split_is_refused(index):
    with pytest.raises(IndexError):
        draw_flowers("train", indices=[index])
