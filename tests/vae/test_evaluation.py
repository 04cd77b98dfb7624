import math
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from helpers import seeded, through_mean
from scipy.linalg import sqrtm
from torch import Tensor
from torch.distributions import MultivariateNormal

from vae.evaluation import PCA, evaluate, evaluate_pca, evaluate_samples, frechet_distance
from vae.losses import ELBOLoss
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


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_the_losses_are_those_of_the_loss_itself_over_the_whole_split(model, images, likelihood):
    loss = ELBOLoss(0.3, likelihood)
    with seeded(1):
        metrics = evaluate(model, [images], loss)
    with seeded(1):
        _, kl, reconstruction, total = loss(images, *model(images))
    assert metrics["kl"] == pytest.approx(kl.item(), rel=1e-4)
    assert metrics["reconstruction_loss"] == pytest.approx(reconstruction.item(), rel=1e-4)
    assert metrics["total_loss"] == pytest.approx(total.item(), rel=1e-4)


def test_active_units_are_the_dimensions_whose_mean_varies_over_the_data(model, images):
    with torch.no_grad():
        model.encoder.fcm.weight[1] = 0
        model.encoder.fcm.weight[3] *= 1e-4
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


# evaluate_samples().


def test_samples_are_compared_with_test_images_in_64_components(model):
    test = images_of_known_spectrum(80, seed=3)
    latents = MultivariateNormal(torch.tensor([3.0, 0, -2, 1]), 0.3 * torch.eye(4) + 0.2)
    with seeded(1):
        features = PCA(lambda: test.split(32), 64)
        frechet = evaluate_samples(model, latents, lambda: test.split(32), features)
    with seeded(1), torch.no_grad():
        pca = PCA(lambda: test.split(32), 64)
        drawn = {
            "fitted": model.decoder(latents.sample((80,))),
            "prior": model.decoder(torch.randn(80, 4)),
            "reconstructions": torch.cat([model(x)[0] for x in test.split(32)]),
        }
    expected = {
        name: frechet_distance(pca.encode([x]), pca.encode([test])) for name, x in drawn.items()
    }
    assert frechet == pytest.approx(expected, rel=1e-3)
    assert len({round(value, 2) for value in frechet.values()}) == 3
