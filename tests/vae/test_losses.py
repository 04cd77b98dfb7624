import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

from vae.losses import LIKELIHOODS, ELBOLoss, annealed_beta, kl_per_dimension

SHAPE = (3, 2, 4, 5)
PIXELS = 2 * 4 * 5


def images(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def latents(seed: int, shape: tuple[int, ...] = (3, 6)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# KL divergence.


def test_the_kl_loss_is_the_divergence_of_the_posterior_from_the_prior():
    mean, log_var = 2 * latents(0), 2 * latents(1)
    posterior = Independent(Normal(mean, torch.exp(log_var / 2)), 1)
    prior = Independent(Normal(torch.zeros(6).double(), torch.ones(6).double()), 1)
    expected = kl_divergence(posterior, prior).mean()
    torch.testing.assert_close(ELBOLoss(1).kl_loss(mean, log_var), expected)


def test_a_small_kl_keeps_its_digits_in_float32():
    log_var = torch.tensor([1e-3, -1e-3, 1e-2])
    expected = 0.5 * (torch.exp(log_var.double()) - 1 - log_var.double())
    kl = kl_per_dimension(torch.zeros(3), log_var)
    torch.testing.assert_close(kl.double(), expected, rtol=1e-3, atol=0)


# Reconstruction loss.


def test_gaussian_is_a_normal_of_variance_one_half_without_its_constants():
    x, reconstruction = images(0), images(1)
    density = Independent(Normal(reconstruction, math.sqrt(0.5)), 3).log_prob(x)
    expected = -density.mean() - 0.5 * PIXELS * math.log(math.pi)
    torch.testing.assert_close(ELBOLoss(1).reconstruction_loss(x, reconstruction), expected)


def test_bernoulli_is_the_negative_log_likelihood_of_bernoulli_pixels():
    x, reconstruction = images(0).round(), images(1)
    expected = -Independent(Bernoulli(reconstruction), 3).log_prob(x).mean()
    loss = ELBOLoss(1, "bernoulli").reconstruction_loss(x, reconstruction)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_bernoulli_stays_finite_for_outputs_of_exactly_0_and_1(value):
    x = images(0).float()
    reconstruction = torch.full(SHAPE, value, requires_grad=True)
    loss = ELBOLoss(1, "bernoulli").reconstruction_loss(x, reconstruction)
    loss.backward()
    assert loss.isfinite()
    assert reconstruction.grad.isfinite().all()


def log_density(x: Tensor, reconstruction: Tensor, variance: Tensor) -> Tensor:
    """log p(x | z) in nats per image: a Gaussian of one variance around the reconstruction."""
    return Independent(Normal(reconstruction, variance.sqrt()), 3).log_prob(x).mean()


def test_sigma_is_the_negative_log_density_with_the_mean_squared_error_as_the_variance():
    x, reconstruction = images(0), images(1)
    variance = torch.square(x - reconstruction).mean()
    loss = ELBOLoss(1, "sigma").reconstruction_loss(x, reconstruction)
    torch.testing.assert_close(loss, -log_density(x, reconstruction, variance))


@pytest.mark.parametrize("factor", [0.5, 0.99, 1.01, 2])
def test_no_other_variance_gives_a_lower_loss_than_sigmas(factor):
    x, reconstruction = images(0), images(1)
    variance = torch.square(x - reconstruction).mean()
    loss = ELBOLoss(1, "sigma").reconstruction_loss(x, reconstruction)
    assert loss < -log_density(x, reconstruction, factor * variance)


def test_sigmas_gradient_is_that_of_its_gaussian():
    x, reconstruction = images(0), images(1).requires_grad_()
    variance = torch.square(x - reconstruction).mean()
    # Where a variance is the best one, its own change changes nothing.
    (expected,) = torch.autograd.grad(
        -log_density(x, reconstruction, variance.detach()), reconstruction
    )
    ELBOLoss(1, "sigma").reconstruction_loss(x, reconstruction).backward()
    torch.testing.assert_close(reconstruction.grad, expected)


@pytest.mark.parametrize("error", [0.0, 0.0005])
def test_sigma_takes_a_standard_deviation_of_a_thousandth_at_least(error):
    x = images(0).requires_grad_()
    reconstruction = x.detach() + error
    loss = ELBOLoss(1, "sigma").reconstruction_loss(x, reconstruction)
    expected = -log_density(x, reconstruction, torch.tensor(1e-6).double())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_a_reconstruction_that_is_not_a_number_has_no_loss(likelihood):
    reconstruction = images(1)
    reconstruction[0, 1, 2, 3] = math.nan
    assert ELBOLoss(1, likelihood).reconstruction_loss(images(0), reconstruction).isnan()


# The whole loss.


def test_beta_can_be_assigned_anew():
    loss, arguments = ELBOLoss(0.0), (images(0), images(1), latents(2), latents(3))
    _, kl, reconstruction, total = loss(*arguments)
    assert total == reconstruction
    loss.beta = 2.0
    beta, _, _, total = loss(*arguments)
    assert beta == 2
    assert total == reconstruction + 2 * kl


@pytest.mark.parametrize("beta", [-0.1, math.nan, math.inf, -math.inf])
def test_a_beta_below_0_or_not_finite_is_refused(beta):
    with pytest.raises(ValueError, match=f"beta is {beta}: a finite number of at least 0"):
        ELBOLoss(beta)


def test_an_unknown_likelihood_is_refused():
    message = r"'poisson': one of \('gaussian', 'bernoulli', 'sigma'\) is needed"
    with pytest.raises(ValueError, match=message):
        ELBOLoss(1, "poisson")


@pytest.mark.parametrize(
    "shape", [(3, 2, 4, 1), (1, 2, 4, 5), (3, 1, 4, 5), (2, 4, 5), (3, 2, 5, 4)]
)
def test_images_of_two_shapes_are_refused(shape):
    for original, reconstruction in ((SHAPE, shape), (shape, SHAPE)):
        with pytest.raises(ValueError) as error:
            ELBOLoss(1)(torch.rand(original), torch.rand(reconstruction), latents(0), latents(1))
        assert f"shapes [{list(original)}, {list(reconstruction)}, [3, 6]" in str(error.value)
        assert "the first two need to be alike" in str(error.value)


@pytest.mark.parametrize("shape", [(3, 1), (1, 6), (6,), (1, 3, 6)])
def test_latents_of_two_shapes_are_refused(shape):
    for mean, log_var in (((3, 6), shape), (shape, (3, 6))):
        with pytest.raises(ValueError) as error:
            ELBOLoss(1)(images(0), images(1), torch.zeros(mean), torch.zeros(log_var))
        assert f"{list(mean)}, {list(log_var)}]: the first two" in str(error.value)
        assert "the last two too" in str(error.value)


# Annealing beta.


def betas(schedule: str, epochs: int, warmup_epochs: int = 100, cycles: int = 4) -> list[float]:
    """The weight in each epoch, on the way to 0.5."""
    return [
        annealed_beta(0.5, schedule, epoch, epochs, warmup_epochs, cycles)
        for epoch in range(epochs)
    ]


def test_the_constant_schedule_is_always_beta():
    assert betas("constant", epochs=5) == [0.5] * 5


def test_the_linear_schedule_rises_from_0_and_stays():
    assert betas("linear", epochs=6, warmup_epochs=4) == [0, 0.125, 0.25, 0.375, 0.5, 0.5]


def test_a_warm_up_of_no_epochs_begins_at_0_and_is_over_in_the_next():
    assert betas("linear", epochs=3, warmup_epochs=0) == [0, 0.5, 0.5]


def test_the_cyclical_schedule_rises_in_the_first_half_of_each_cycle():
    assert betas("cyclical", epochs=16, cycles=2) == [0, 0.125, 0.25, 0.375, *4 * [0.5]] * 2


def test_a_cycle_begins_at_0_where_floating_point_numbers_would_make_the_end_of_another():
    assert betas("cyclical", epochs=100, cycles=50)[58] == 0


def test_an_unknown_schedule_is_refused():
    message = r"schedule is 'steep': one of \('constant', 'linear', 'cyclical'\) is needed"
    with pytest.raises(ValueError, match=message):
        betas("steep", epochs=1)
