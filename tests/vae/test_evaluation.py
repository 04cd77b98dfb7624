import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from vae.evaluation import evaluate, pca_squared_error
from vae.losses import LIKELIHOODS, ELBOLoss
from vae.vae import VAE


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """PyTorch's random numbers follow from ``seed`` inside, and go on afterwards as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


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
            squared_mean.append((batch - model.reconstruct(batch)) ** 2)
    assert metrics["squared_error"] == pytest.approx(torch.cat(squared).sum().item() / 11, rel=1e-5)
    expected = torch.cat(squared_mean).sum().item() / 11
    assert metrics["squared_error_mean"] == pytest.approx(expected, rel=1e-5)
    expected = torch.cat(kl).mean(dim=0)
    assert metrics["kl_per_dimension"] == pytest.approx(expected.tolist(), rel=1e-4)
    assert metrics["kl"] == pytest.approx(expected.sum().item(), rel=1e-4)


def test_psnr_is_the_mean_over_the_images_of_the_ratio_in_decibels(model, images):
    metrics = evaluate(model, images.split(4), ELBOLoss(1))
    errors = (images - model.reconstruct(images)).detach().double().square().mean(dim=(1, 2, 3))
    expected = sum(10 * math.log10(1 / error) for error in errors.tolist()) / 11
    assert metrics["psnr"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_losses_are_those_of_the_loss_itself_over_the_whole_split(model, images, likelihood):
    loss = ELBOLoss(0.3, likelihood)
    with seeded(1):
        metrics = evaluate(model, [images], loss)
    with seeded(1):
        _, kl, reconstruction, total = loss(images, *model(images))
    assert metrics["kl"] == pytest.approx(kl.item(), rel=1e-4)
    assert metrics["reconstruction_loss"] == pytest.approx(reconstruction.item(), rel=1e-4)
    assert metrics["total_loss"] == pytest.approx(total.item(), rel=1e-4)


def test_sigma_takes_one_variance_for_all_batches(model, images):
    metrics = evaluate(model, images.split(4), ELBOLoss(1, "sigma"))
    variance = metrics["squared_error"] / 192
    expected = 96 * (1 + math.log(2 * math.pi * variance))
    assert metrics["reconstruction_loss"] == pytest.approx(expected, rel=1e-6)


def test_bernoulli_weighs_a_smaller_last_batch_by_its_images(model, images):
    loss = ELBOLoss(1, "bernoulli")
    with seeded(1):
        metrics = evaluate(model, images.split(4), loss)
    with seeded(1):
        losses = [len(batch) * loss(batch, *model(batch))[2].item() for batch in images.split(4)]
    assert metrics["reconstruction_loss"] == pytest.approx(sum(losses) / 11, rel=1e-5)


@pytest.mark.parametrize("likelihood", ["bernoulli", "sigma"])
def test_the_elbo_is_in_nats_per_pixel_value_and_has_beta_1(model, images, likelihood):
    metrics = evaluate(model, [images], ELBOLoss(0.3, likelihood))
    expected = -(metrics["reconstruction_loss"] + metrics["kl"]) / 192
    assert metrics["elbo_per_dimension"] == pytest.approx(expected)


def test_the_squared_error_alone_gives_no_elbo(model, images):
    assert evaluate(model, [images], ELBOLoss(1))["elbo_per_dimension"] is None


def test_active_units_are_the_dimensions_whose_mean_varies_over_the_data(model, images):
    with torch.no_grad():
        model.encoder.fcm.weight[1] = 0
        model.encoder.fcm.weight[3] *= 1e-4
    assert evaluate(model, images.split(4), ELBOLoss(1))["active_units"] == 2


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_its_mode(model, images, training):
    model.train(training)
    evaluate(model, [images], ELBOLoss(1))
    assert {module.training for module in model.modules()} == {training}


def test_batch_norm_is_evaluated_with_its_running_statistics_and_leaves_them_alone(images):
    model = VAE((8, 8), 4, 3, batch_norm=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    together = evaluate(model, [images], ELBOLoss(1))
    apart = evaluate(model, images.split(1), ELBOLoss(1))
    assert together["squared_error_mean"] == pytest.approx(apart["squared_error_mean"], rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_images_are_refused(model):
    with pytest.raises(ValueError, match="no images to evaluate on: at least one"):
        evaluate(model, [], ELBOLoss(1))


# pca_squared_error().


def images_of_known_spectrum(count: int, seed: int) -> Tensor:
    """Images whose standard deviation along the i-th of 192 fixed directions is 1 / i."""
    with seeded(0):
        directions = torch.linalg.qr(torch.randn(192, 192))[0]
    with seeded(seed):
        weights = torch.randn(count, 192) / torch.arange(1, 193)
    return (0.5 + weights @ directions.T).view(count, 3, 8, 8)


def exact_pca_error(train: Tensor, test: Tensor, components: int) -> float:
    """What NumPy's SVD in float64 leaves over of each test image."""
    x = train.flatten(1).double().numpy()
    y = test.flatten(1).double().numpy() - x.mean(axis=0)
    directions = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)[2][:components]
    return ((y - y @ directions.T @ directions) ** 2).sum(axis=1).mean()


@pytest.mark.parametrize("components", [1, 5, 10])
def test_the_pca_error_is_what_numpys_svd_leaves_over(components):
    train, test = images_of_known_spectrum(300, seed=1), images_of_known_spectrum(60, seed=2)
    with seeded():
        error = pca_squared_error(train.split(64), test.split(64), components)
    # Two power iterations (niter=2, PyTorch's default) would be 1 % off with 10 components.
    assert error == pytest.approx(exact_pca_error(train, test, components), rel=1e-3)


def test_with_as_many_components_as_they_span_training_images_are_exact():
    train = torch.rand(5, 1, 4, 4)
    assert pca_squared_error([train], [train], 4) < 1e-9
    assert pca_squared_error([train], [train], 3) > 1e-3


@pytest.mark.parametrize("components", [5, 500])
@pytest.mark.parametrize("copies", [1, 4])
def test_more_components_than_training_images_span_count_as_all_that_they_span(components, copies):
    # Five images span four directions around their mean, however often they come.
    train, test = torch.rand(5, 1, 4, 4), torch.rand(3, 1, 4, 4)
    expected = exact_pca_error(train, test, 4)
    error = pca_squared_error([train.repeat(copies, 1, 1, 1)], [test], components)
    assert error == pytest.approx(expected, rel=1e-3)


def test_the_images_that_pca_is_measured_on_stay_as_they_are():
    train, test = torch.rand(5, 1, 4, 4), torch.rand(3, 1, 4, 4)
    before = train.clone(), test.clone()
    pca_squared_error([train], [test], 2)
    assert torch.equal(train, before[0])
    assert torch.equal(test, before[1])


def test_less_than_one_component_is_refused():
    with pytest.raises(ValueError, match="asked for 0 components: at least 1"):
        pca_squared_error([torch.rand(5, 1, 4, 4)], [torch.rand(5, 1, 4, 4)], 0)
