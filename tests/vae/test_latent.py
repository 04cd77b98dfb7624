import math

import numpy as np
import pytest
import torch
from helpers import seeded
from torch.distributions import MultivariateNormal

from vae.latent import fit_latents, main_directions, near, prior, variation_per_dimension
from vae.vae import VAE

MEAN = torch.tensor([[3.0, -2.0]])
"""Of one picture's posterior."""
LATENTS = MultivariateNormal(torch.tensor([1.0, 0.5]), torch.tensor([[2.0, -0.9], [-0.9, 0.5]]))
DRAWS = 100_000


@pytest.fixture
def model() -> VAE:
    """A small model whose latents differ from picture to picture."""
    with seeded():
        model = VAE((8, 8), 3, 3).eval().requires_grad_(False)
        for weight in (model.encoder.fcm.weight, model.encoder.fcv.weight, model.decoder.fc.weight):
            weight.mul_(20)
    return model


@pytest.fixture
def images() -> torch.Tensor:
    with seeded(1):
        return torch.rand(40, 3, 8, 8)


# The prior, and the distribution of all latents.


def test_the_prior_is_the_standard_normal_distribution(model):
    assert torch.equal(prior(model).mean, torch.zeros(3))
    assert torch.equal(prior(model).covariance_matrix, torch.eye(3))


def test_latents_are_fitted_by_the_moments_of_the_aggregate_posterior(model, images):
    means, log_vars = (each.double().numpy() for each in model.encoder(images))
    latents = fit_latents(model, images.split(16))
    covariance = np.cov(means.T, bias=True) + np.diag(np.exp(log_vars).mean(axis=0))
    assert np.abs(np.corrcoef(means.T)[0, 1:]).max() > 0.1
    assert np.allclose(latents.mean, means.mean(axis=0), rtol=1e-5)
    assert np.allclose(latents.covariance_matrix, covariance, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_latents_on_a_line_and_without_width_can_still_be_drawn(model, images, scale):
    model.encoder.fcv.bias.fill_(-100)
    model.encoder.fcm.weight[1:] = model.encoder.fcm.weight[0]
    model.encoder.fcm.weight.mul_(scale)
    z = fit_latents(model, [images]).sample((100,))
    assert z.isfinite().all()


# Near one picture.


def test_at_spread_0_each_draw_is_exactly_the_pictures_mean():
    mean = torch.tensor([[0.1, 1e-9]])
    assert torch.equal(near(mean, LATENTS, 3, 0.0), mean.repeat(3, 1))


def test_at_spread_1_draws_are_exactly_those_of_the_latents():
    with seeded():
        z = near(MEAN, LATENTS, 100, 1.0)
    with seeded():
        assert torch.equal(z, LATENTS.sample((100,)))


@pytest.mark.parametrize("spread", [0.3, 0.6])
def test_in_between_mean_and_covariance_are_as_documented(spread):
    with seeded():
        z = near(MEAN, LATENTS, DRAWS, spread)
    mean = LATENTS.mean + math.sqrt(1 - spread**2) * (MEAN[0] - LATENTS.mean)
    assert torch.allclose(z.mean(dim=0), mean, atol=0.02)
    assert torch.allclose(z.T.cov(), spread**2 * LATENTS.covariance_matrix, atol=0.02)


# Along one dimension.


def test_a_dimension_that_the_decoder_ignores_has_no_share_of_the_variation(model):
    model.decoder.fc.weight[:, 2] = 0
    model.decoder.fc.weight[:, 1] *= 5
    with seeded():
        shares = variation_per_dimension(model, prior(model))
    assert shares[2] == 0
    assert shares.argmax() == 1
    assert 0.9 < shares.sum() < 2


class Known(VAE):
    """A model whose decoder draws a known image of z."""

    def __init__(self, draw) -> None:
        super().__init__((8, 8), 3, 3)
        self.decoder.forward = lambda z: draw(z)[:, None, None, None]


WHITE = MultivariateNormal(torch.zeros(3), torch.eye(3))


def test_the_shares_of_a_sum_are_those_of_its_terms_variances():
    with seeded():
        shares = variation_per_dimension(Known(lambda z: 3 * z[:, 0] + z[:, 1]), WHITE, DRAWS)
    assert torch.allclose(shares, torch.tensor([0.9, 0.1, 0.0]), atol=0.02)


def test_dimensions_vary_around_where_the_latents_are_and_as_much_as_they_do():
    latents = MultivariateNormal(
        torch.tensor([0.0, 2.0, 0.0]), torch.diag(torch.tensor([1.0, 9, 1]))
    )
    with seeded():
        shares = variation_per_dimension(Known(lambda z: z[:, 0] + z[:, 1]), latents, DRAWS)
        products = variation_per_dimension(Known(lambda z: z[:, 0] * z[:, 1]), latents, DRAWS)
    assert torch.allclose(shares, torch.tensor([0.1, 0.9, 0.0]), atol=0.02)
    # Var(ab) is E[a^2] E[b^2] = 1 * (4 + 9); what z1 alone explains is E[a^2] Var(b) = 9 of it.
    assert torch.allclose(products, torch.tensor([1, 9 / 13, 0]), atol=0.05)


def test_a_decoder_that_always_draws_the_same_has_no_variation():
    shares = variation_per_dimension(Known(lambda z: 0 * z[:, 0]), WHITE)
    assert torch.equal(shares, torch.zeros(3))


# The directions in which pictures vary most.


def test_of_a_linear_decoder_the_main_directions_are_those_of_its_variance():
    latents = MultivariateNormal(torch.tensor([5.0, 0, 0]), torch.diag(torch.tensor([1.0, 4, 1])))
    # In units of the latents' own: 3 along the first dimension, 2 * 2 along the second.
    model = Known(lambda z: torch.stack((3 * z[:, 0], 2 * z[:, 1]), dim=1).sum(dim=1))
    with seeded():
        directions, shares = main_directions(model, latents, 2)
    expected = torch.tensor([3.0, 4.0, 0]) / 5
    assert torch.allclose(directions[0].abs(), expected, atol=1e-3)
    assert torch.allclose(shares, torch.tensor([1.0, 0.0]), atol=1e-3)


def test_main_directions_are_unit_vectors_at_right_angles(model):
    with seeded():
        directions, shares = main_directions(model, prior(model), 3)
    assert torch.allclose(directions @ directions.T, torch.eye(3), atol=1e-4)
    assert shares.sum() == pytest.approx(1, abs=1e-4)
    assert shares.tolist() == sorted(shares.tolist(), reverse=True)
