"""The test for copies, on features and models made for it."""

import numpy as np
import pytest
import torch
from helpers import seeded, through_mean, write_checkpoint
from PIL import Image

from benchmarks.copies import (
    COMPARED,
    CONTROL,
    COUNT,
    NEW,
    TEST,
    copying_score,
    measure,
    nearest,
    photographs,
    plot,
    reduced,
    table,
)
from vae.checkpoint import load_model
from vae.evaluation import PCA, spread_out
from vae.vae import VAE


def distances(count: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    with seeded(seed):
        return scale * (5 + torch.rand(count))


def test_the_distance_is_to_the_nearest_training_picture():
    training = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    features = torch.tensor([[3.0, 4.0], [10.0, 1.0]])
    assert nearest(features, training).tolist() == [5, 1]


@pytest.mark.parametrize(("scale", "low", "high"), [(1, -3, 3), (0.5, -99, -20), (2, 20, 99)])
def test_the_score_is_around_0_low_for_copies_and_high_for_what_is_far_away(scale, low, high):
    score = copying_score(distances(400, 1, scale), distances(300, 2))
    assert low < score < high


def test_the_score_is_the_share_of_pairs_in_standard_deviations():
    drawn, unseen = torch.tensor([1.0, 4.0, 6.0]), torch.tensor([2.0, 3.0, 5.0, 7.0])
    # Of the 12 pairs the drawn one is larger in 0 + 2 + 3; half of them would be 6.
    assert copying_score(drawn, unseen) == pytest.approx(-1 / np.sqrt(3 * 4 * 8 / 12))


@pytest.fixture
def measured() -> dict[str, torch.Tensor]:
    names = (TEST, "validation photographs", NEW, CONTROL)
    scales = (1.0, 1.0, 1.1, 0.1)
    return {
        name: distances(200, seed, scale)
        for seed, (name, scale) in enumerate(zip(names, scales, strict=True))
    }


def test_the_table_has_a_row_for_each_kind_and_copies_stand_out(measured):
    rows = [line.strip("| ").split(" | ") for line in table(measured).splitlines()[2:]]
    assert [row[0] for row in rows] == [*measured]
    assert rows[0][2] == "1.0%"
    assert rows[3][2] == "100.0%"
    assert float(rows[3][3]) < -15 < float(rows[1][3]) < 3 < float(rows[2][3])


def test_the_figure_is_drawn(measured, tmp_path):
    plot(measured, tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as figure:
        assert min(figure.size) > 200
        assert np.asarray(figure.convert("L")).std() > 10


def test_each_kind_of_photographs_is_of_its_own_split(data_root, tmp_path):
    with seeded():
        path = write_checkpoint(tmp_path / "checkpoint.pt", VAE((16, 16), 3, 3))
    measured = measure(path, data_root)
    train, val, test, learnt = (
        photographs(split, size, data_root)
        for split, size in (
            ("train", COMPARED),
            ("val", COMPARED),
            ("test", COMPARED),
            ("train", (16, 16)),
        )
    )
    with seeded(), torch.no_grad():
        features = PCA(train.batches, 64)
        control = reduced(through_mean(load_model(path).model, learnt.images(slice(None))))
    images = {
        TEST: test.images(slice(None)),
        "validation photographs": val.images(slice(None)),
        CONTROL: control,
    }
    training = features.encode(train.batches())
    for name, each in images.items():
        expected = spread_out(nearest(features.encode([each]), training), COUNT)
        assert torch.allclose(measured[name], expected, rtol=1e-3)
