import math
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from helpers import seeded, through_mean
from scipy.linalg import sqrtm
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.utils._python_dispatch import TorchDispatchMode

from datasets.memory import InMemory
from vae import evaluation
from vae.evaluation import (
    PCA,
    compare,
    evaluate,
    evaluate_pca,
    evaluate_real,
    evaluate_samples,
    frechet_distance,
    precision_and_recall,
    spread_out,
)
from vae.losses import LIKELIHOODS, ELBOLoss
from vae.report import measure_samples
from vae.vae import VAE


@pytest.fixture(scope="module")
def images() -> Tensor:
    with seeded():
        return torch.rand(11, 3, 8, 8)


@pytest.fixture
def model() -> VAE:
    """An untrained model whose latents differ enough between images to count."""
    with seeded():
        model = VAE((8, 8), 4, 3)
    with torch.no_grad():
        model.encoder.fcm.weight.mul_(200)
        model.decoder.fc.weight.mul_(20)
    return model


# evaluate().


def test_the_squared_errors_and_the_kl_are_means_over_the_images_not_over_the_batches(
    model, images
):
    with seeded(1):
        metrics = evaluate(model, images.split(4), ELBOLoss(1))
    squared, squared_mean, kl = [], [], []
    with seeded(1):
        for batch in images.split(4):
            reconstruction, mean, log_var = model(batch)
            kl.append(0.5 * (mean**2 + log_var.exp() - 1 - log_var))
            squared.append((batch - reconstruction) ** 2)
            squared_mean.append((batch - through_mean(model, batch)) ** 2)
    assert metrics["squared_error"] == pytest.approx(torch.cat(squared).sum().item() / 11, rel=1e-5)
    expected = torch.cat(squared_mean).sum().item() / 11
    assert metrics["squared_error_mean"] == pytest.approx(expected, rel=1e-5)
    expected = torch.cat(kl).mean(dim=0)
    assert metrics["kl_per_dimension"] == pytest.approx(expected.tolist(), rel=1e-4)
    assert metrics["kl"] == pytest.approx(expected.sum().item(), rel=1e-4)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_losses_are_those_of_the_loss_itself_and_larger_batches_count_for_more(
    model, images, likelihood
):
    loss = ELBOLoss(0.3, likelihood)
    with seeded(1):
        metrics = evaluate(model, images.split(4), loss)
    expected = torch.zeros(3)
    with seeded(1):
        for batch in images.split(4):
            _, *losses = loss(batch, *model(batch))
            expected += torch.stack(losses).detach() * len(batch) / len(images)
    names = ("kl", "reconstruction_loss", "total_loss")
    assert [metrics[name] for name in names] == pytest.approx(expected.tolist(), rel=1e-4)


class LongerLoss(ELBOLoss):
    """A reader's own loss: a term more, which is returned in between too."""

    def forward(self, *inputs: Tensor) -> tuple:
        beta, kl, reconstruction, total = super().forward(*inputs)
        further = 0.5 * inputs[0].mean() + kl.sqrt()
        return beta, kl, reconstruction, further, total + further


def test_a_further_term_of_the_loss_is_in_the_total_loss_and_in_nothing_else(model, images):
    with seeded(1):
        usual = evaluate(model, [images], ELBOLoss(0.3))
    with seeded(1):
        longer = evaluate(model, [images], LongerLoss(0.3))
    further = 0.5 * images.mean().item() + math.sqrt(usual["kl"])
    total = pytest.approx(usual["total_loss"] + further, rel=1e-5)
    assert longer == usual | {"total_loss": total}


class ReadsFourPixels(nn.Module):
    """An encoder whose means are the image's first four values."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x.flatten(1)[:, :4]
        return mean, torch.zeros_like(mean)


def test_active_units_are_the_dimensions_whose_mean_varies_by_more_than_a_hundredth(model):
    model.encoder = ReadsFourPixels()
    variances = torch.tensor([0.0, 0.0099, 0.0101, 0.2])
    images = torch.full((10, 3, 8, 8), 0.5)
    first_four = images.flatten(1)[:, :4]
    first_four[::2] += variances.sqrt()
    first_four[1::2] -= variances.sqrt()
    assert evaluate(model, images.split(4), ELBOLoss(1))["active_units"] == 2


# PCA and evaluate_pca().


def images_of_known_spectrum(count: int, seed: int) -> Tensor:
    """Images whose standard deviation along the i-th of 192 fixed directions is 1 / i."""
    with seeded(0):
        directions = torch.linalg.qr(torch.randn(192, 192))[0]
    with seeded(seed):
        weights = torch.randn(count, 192) / torch.arange(1, 193)
    return (0.5 + weights @ directions.T).view(count, 3, 8, 8)


def exact_components(images: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The mean image and the directions, in columns, of a full SVD in float64."""
    x = images.flatten(1).double()
    directions = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False).Vh[:count]
    return x.mean(dim=0), directions.T


@pytest.mark.parametrize("count", [1, 5, 10])
def test_principal_components_are_those_of_a_full_svd_up_to_their_sign(count):
    images = images_of_known_spectrum(300, seed=1)
    with seeded():
        pca = PCA(lambda: images.split(64), count)
    exact_centre, exact_directions = exact_components(images, count)
    assert pca.centre == pytest.approx(exact_centre, abs=1e-5)
    assert pca.directions.shape == (192, count)
    cosines = pca.directions.T.double() @ exact_directions
    assert cosines.abs() == pytest.approx(torch.eye(count), abs=1e-2)


@pytest.mark.parametrize(
    ("images", "count", "returned"), [(5, 4, 4), (5, 5, 4), (5, 500, 4), (30, 500, 16), (1, 3, 0)]
)
def test_more_components_than_the_images_span_count_as_all_that_they_span(images, count, returned):
    x = torch.rand(images, 1, 4, 4)
    pca = PCA(lambda: x.split(2), count)
    assert pca.directions.shape == (16, returned)
    assert pca.decode(pca.encode(x.split(2))) == pytest.approx(x, abs=1e-5)


def test_pca_holds_one_batch_at_a_time():
    held = []

    def batches() -> Iterator[Tensor]:
        arrays = []
        for seed in range(6):
            array = np.random.default_rng(seed).random((4, 1, 4, 4), np.float32)
            arrays.append(weakref.ref(array))
            yield torch.from_numpy(array)  # which keeps the array
            del array
            held.append(sum(each() is not None for each in arrays))

    PCA(batches, 2)
    assert max(held) == 1


@pytest.mark.parametrize("components", [1, 5, 10])
def test_pca_is_measured_as_a_full_svd_measures_it(components):
    train, test = images_of_known_spectrum(300, seed=1), images_of_known_spectrum(60, seed=2)
    features = PCA(lambda: [test], 64)
    with seeded():
        pca = evaluate_pca(lambda: train.split(64), lambda: test.split(64), components, features)
    centre, directions = exact_components(train, components)
    codes = [(x.flatten(1) - centre) @ directions for x in (train, test)]
    decoded = (centre + codes[1] @ directions.T).view(test.shape)
    # Two passes would be 1 % off with 10 components.
    expected = torch.square(test - decoded).sum().item() / 60
    assert pca["squared_error"] == pytest.approx(expected, rel=1e-3)
    assert pca["components"] == components


def test_pcas_samples_are_of_the_gaussian_of_the_training_images():
    train, test = images_of_known_spectrum(2000, seed=1), images_of_known_spectrum(2000, seed=2)
    train, test = 0.5 + 0.05 * (train - 0.5), 0.5 + 0.05 * (test - 0.5)  # nothing to clip
    features = PCA(lambda: [test], 64)
    pca = evaluate_pca(lambda: [train], lambda: test.split(64), 150, features)
    far = frechet_distance(features.encode([train + 0.01]), features.encode([test]))
    assert pca["frechet"]["samples"] < far / 20


def test_pcas_samples_are_clipped_to_the_range_of_pictures():
    # Pictures of one grey, all black or all white: PCA's are of any grey, half of them beyond.
    pictures = torch.zeros(20_000, 1, 4, 4)
    pictures[::2] = 1
    with seeded():
        features = PCA(lambda: [pictures], 64)
        pca = evaluate_pca(lambda: [pictures], lambda: pictures.split(5000), 1, features)
        greys = (0.5 + 0.5 * torch.randn(20_000)).clamp(0, 1)
    # Each of 16 pixels counts the squared difference of its standard deviations.
    expected = 16 * (0.5 - greys.std().item()) ** 2
    assert pca["frechet"]["samples"] == pytest.approx(expected, rel=0.1)


# frechet_distance().


def standard_features(count: int, features: int, seed: int = 0) -> Tensor:
    """Features whose mean is exactly 0 and whose covariance is exactly the identity."""
    x = torch.randn(count, features, generator=torch.Generator().manual_seed(seed)).double()
    x -= x.mean(dim=0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / count)).T


def test_standard_deviations_count_their_squared_differences():
    one = standard_features(12, 3, seed=1) * torch.tensor([1, 2, 5])
    other = standard_features(20, 3, seed=2) * torch.tensor([1, 5, 4])
    assert frechet_distance(one, other) == pytest.approx(0 + 9 + 1)
    assert frechet_distance(one, other + 2) == pytest.approx(0 + 9 + 1 + 3 * 4)


def test_the_frechet_distance_is_the_formula_with_scipys_square_root():
    torch.manual_seed(0)
    one, other = torch.randn(40, 6) @ torch.randn(6, 6), torch.randn(90, 6) @ torch.randn(6, 6) + 1
    a, b = (np.cov(each.numpy().T.astype(float), bias=True) for each in (one, other))
    shift = ((one.mean(dim=0) - other.mean(dim=0)) ** 2).sum().item()
    expected = shift + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_have_no_frechet_distance(value):
    one, other = torch.randn(2, 9, 3)
    one[4, 1] = value
    assert math.isnan(frechet_distance(one, other))
    assert math.isnan(frechet_distance(other, one))


# precision_and_recall().


def shares_by_numpy(real: np.ndarray, drawn: np.ndarray, k: int) -> tuple[float, float]:
    """Precision and recall as the paper defines them, one picture after the other."""

    def share(points: np.ndarray, others: np.ndarray) -> float:
        """The share of points within the ball of one of the others, up to its k-th neighbour."""
        inside = 0
        for point in points:
            for other in others:
                radius = np.sort(np.linalg.norm(others - other, axis=1))[k]
                if np.linalg.norm(point - other) <= radius:
                    inside += 1
                    break
        return inside / len(points)

    return share(drawn, real), share(real, drawn)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(("spread", "shift"), [(1, 0), (0.3, 0), (2, 0.5)])
def test_precision_and_recall_are_the_papers(k, spread, shift):
    rng = np.random.default_rng(0)
    real = rng.normal(size=(60, 4))
    drawn = spread * rng.normal(size=(60, 4)) + shift
    measured = precision_and_recall(torch.tensor(real), torch.tensor(drawn), k)
    assert measured == pytest.approx(shares_by_numpy(real, drawn, k))
    assert 0 < min(measured) < 1


def test_precision_and_recall_do_not_depend_on_how_many_rows_are_compared_at_a_time(monkeypatch):
    real, drawn = torch.randn(2, 80, 3, generator=torch.Generator().manual_seed(0))
    at_once = precision_and_recall(real, drawn)
    monkeypatch.setattr(evaluation, "ROWS", 30)  # the last ones are fewer
    assert precision_and_recall(real, drawn) == at_once


class LargestTensor(TorchDispatchMode):
    """Notes how many bytes the largest tensor has that is made meanwhile."""

    bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor):
            self.bytes = max(self.bytes, result.nbytes)
        return result


def test_precision_and_recall_take_little_memory():
    real, drawn = torch.randn(2, 2000, 8)
    with LargestTensor() as largest:
        precision_and_recall(real, drawn)
    assert 0 < largest.bytes < 5e6  # all distances at once would take 32e6


def test_the_third_neighbour_counts_if_nothing_else_is_said():
    real, drawn = torch.randn(2, 80, 3, generator=torch.Generator().manual_seed(0))
    assert precision_and_recall(real, drawn) == precision_and_recall(real, drawn, k=3)
    assert precision_and_recall(real, drawn) != precision_and_recall(real, drawn, k=4)


def test_safe_averages_have_a_high_precision_and_a_low_recall():
    real = torch.randn(500, 5, generator=torch.Generator().manual_seed(0))
    precision, recall = precision_and_recall(real, 0.1 * real)
    assert precision > 0.99
    assert recall < 0.1


def test_the_same_pictures_reach_all_and_others_none():
    real = torch.randn(50, 3)
    assert precision_and_recall(real, real.clone()) == (1, 1)
    assert precision_and_recall(real, real + 100) == (0, 0)


# compare().


def measured_against(count: int, **drawn: Tensor) -> dict[str, dict[str, float]]:
    """What sets of images measure, held against so many test images."""
    test = images_of_known_spectrum(count, seed=3)
    with seeded():
        features = PCA(lambda: test.split(512), 64)
    return compare({name: [x] for name, x in drawn.items()}, lambda: test.split(512), features)


def test_too_few_test_images_have_a_distance_alone():
    drawn = images_of_known_spectrum(999, seed=4)
    assert measured_against(999, drawn=drawn).keys() == {"frechet"}
    assert measured_against(1000, drawn=drawn).keys() == {"frechet", "precision", "recall"}


def test_real_pictures_stand_beside_what_is_drawn_and_are_what_half_of_them_is_to_the_other():
    drawn = images_of_known_spectrum(1200, seed=4)
    measured = measured_against(1200, good=drawn, safe=0.5 + 0.2 * (drawn - 0.5))
    for share in ("precision", "recall"):
        assert measured[share].keys() == {"good", "safe", "real"}
        # As good as real ones: two standard deviations of a share among 600.
        assert measured[share]["good"] == pytest.approx(measured[share]["real"], abs=0.08)
    assert measured["precision"]["safe"] > 0.95
    assert measured["recall"]["safe"] < 0.3


def test_pictures_from_all_over_are_compared_also_where_they_stand_in_order():
    features = torch.arange(1500.0)[:, None]
    assert spread_out(features, 1000).max() == 1498
    assert len(spread_out(features, 1000).unique()) == 1000


def test_what_is_compared_does_not_depend_on_chance():
    drawn = images_of_known_spectrum(1000, seed=4)
    assert measured_against(1000, drawn=drawn) == measured_against(1000, drawn=drawn)


# evaluate_samples().


@pytest.fixture
def latents() -> MultivariateNormal:
    return MultivariateNormal(torch.tensor([3.0, 0, -2, 1]), 0.3 * torch.eye(4) + 0.2)


def test_what_a_model_draws_is_as_far_from_test_images_as_such_draws_are(model, latents):
    test = images_of_known_spectrum(80, seed=3)
    prior = MultivariateNormal(torch.zeros(4), torch.eye(4))
    draws = {
        "fitted": lambda: model.decoder(latents.sample((80,))),
        "prior": lambda: model.decoder(prior.sample((80,))),
        "reconstructions": lambda: model(test)[0],
    }
    with seeded(1), torch.no_grad():
        features = PCA(lambda: test.split(32), 64)
        codes = features.encode([test])
        measured = [
            evaluate_samples(model, latents, lambda: test.split(32), features) for _ in range(30)
        ]
        for name, draw in draws.items():
            distances = torch.tensor([each["frechet"][name] for each in measured])
            expected = torch.tensor(
                [frechet_distance(features.encode([draw()]), codes) for _ in range(30)]
            )
            # Six standard errors.
            error = ((distances.var() + expected.var()) / 30).sqrt()
            assert (distances.mean() - expected.mean()).abs() < 6 * error


def test_of_each_kind_as_many_pictures_are_drawn_as_there_are_test_images(model, latents):
    test = images_of_known_spectrum(80, seed=3)
    features = PCA(lambda: [test], 64)
    drawn = []
    model.decoder.register_forward_hook(lambda _, __, images: drawn.append(len(images)))
    measured = evaluate_samples(model, latents, lambda: test.split(32), features)
    assert measured["frechet"].keys() == {"reconstructions", "fitted", "prior"}
    assert sum(drawn) == 3 * 80


def without_noise(model: VAE) -> VAE:
    """The model with posteriors that have no width."""
    model.encoder.fcv.weight.data.zero_()
    model.encoder.fcv.bias.data.fill_(-100)
    return model


def in_memory(images: Tensor) -> InMemory:
    """Images, in [0, 1], as training keeps them."""
    return InMemory([(image, 0) for image in images], progress=False)


def test_a_run_compares_pictures_in_the_test_pictures_64_leading_components(model, latents):
    train, test = (in_memory(images_of_known_spectrum(80, seed).clamp(0, 1)) for seed in (2, 3))
    with seeded():
        metrics = measure_samples(without_noise(model), latents, train, test)
    pictures = test.images(slice(None))
    centre, directions = exact_components(pictures, 64)
    with torch.no_grad():
        reconstructions = through_mean(model, pictures)
    expected = frechet_distance(
        *((x.flatten(1) - centre) @ directions for x in (reconstructions, pictures))
    )
    assert metrics["samples"]["frechet"]["reconstructions"] == pytest.approx(expected, rel=1e-3)


# Pictures that are no model's.


def test_the_mean_training_picture_and_the_training_pictures_are_held_against_the_test_pictures():
    with seeded():
        train, test = torch.rand(30, 3, 4, 4), 0.7 * torch.rand(25, 3, 4, 4)
    features = PCA(lambda: test.split(8), 5)
    metrics = evaluate_real(lambda: train.split(8), lambda: test.split(8), features)
    error = (test - train.mean(dim=0)).square().sum(dim=(1, 2, 3)).mean()
    assert metrics["mean_picture"]["squared_error"] == pytest.approx(error.item(), rel=1e-5)
    codes = (features.encode(images.split(8)) for images in (train, test))
    assert metrics["real"]["frechet"] == pytest.approx(frechet_distance(*codes))


def test_one_half_of_the_real_pictures_is_held_against_the_other_where_they_are_thinned_out(
    monkeypatch,
):
    monkeypatch.setattr("vae.evaluation.MOST_COMPARED", 500)
    test = images_of_known_spectrum(1200, seed=3)
    with seeded():
        features = PCA(lambda: test.split(512), 64)
    measured = compare({}, lambda: test.split(512), features)
    codes = features.encode([test])
    expected = precision_and_recall(spread_out(codes[::2], 500), spread_out(codes[1::2], 500))
    assert (measured["precision"]["real"], measured["recall"]["real"]) == expected
