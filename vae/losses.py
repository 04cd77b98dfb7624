"""The loss of the variational autoencoder: the negative evidence lower bound, in two parts."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LIKELIHOODS = ("gaussian", "bernoulli", "sigma")
BETA_SCHEDULES = ("constant", "linear", "cyclical")


class ELBOLoss(nn.Module):
    """Reconstruction loss + beta * KL(q(z | x) || p(z)), mean over the batch.

    With beta 1 and a proper likelihood it is the negative ELBO of Kingma & Welling (2014,
    equation 3) with one z for each image; another beta is Higgins et al. (2017). Assign to
    ``loss.beta`` to anneal it. The likelihood says what -log p(x | z) is the reconstruction loss:

    - ``"gaussian"``: the squared error summed over the image, as in the post: a Gaussian of
      variance 1/2 without its constants, so not comparable in nats;
    - ``"bernoulli"``: the binary cross-entropy summed over the image, in nats; no value counts for
      more than 100;
    - ``"sigma"``: a Gaussian with one variance for all values, the batch's mean squared error,
      which is the best there is (Rybkin et al. 2021, section 3), with its constants, in nats. By
      that paper no beta has to be searched for: 1 is right. As each batch has its own variance,
      compare only losses of batches of one size.

    ``ValueError`` for a negative or non-finite beta or an unknown likelihood.
    """

    def __init__(self, beta: float, likelihood: str = "gaussian") -> None:
        super().__init__()
        if not (math.isfinite(beta) and beta >= 0):
            raise ValueError(f"beta is {beta}: a finite number of at least 0 is needed")
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood is {likelihood!r}: one of {LIKELIHOODS} is needed")
        self.beta = beta
        self.likelihood = likelihood

    def forward(
        self, original: Tensor, reconstruction: Tensor, latent_mean: Tensor, latent_log_var: Tensor
    ) -> tuple[float, Tensor, Tensor, Tensor]:
        """Return beta, the KL loss, the reconstruction loss and the total loss.

        That is a number and three scalars, all per image, the KL loss in nats. Originals and
        reconstructions are [batch, channels, height, width] in [0, 1], means and log-variances of
        the posteriors [batch, latent]. ``ValueError`` where the shapes of originals and
        reconstructions differ, or those of means and log-variances: PyTorch would broadcast them
        silently.
        """
        if original.shape != reconstruction.shape or latent_mean.shape != latent_log_var.shape:
            given = original, reconstruction, latent_mean, latent_log_var
            shapes = [list(each.shape) for each in given]
            raise ValueError(f"shapes {shapes}: the first two need to be alike, the last two too")
        kl_loss = self.kl_loss(latent_mean, latent_log_var)
        reconstruction_loss = self.reconstruction_loss(original, reconstruction)
        total_loss = self.beta * kl_loss + reconstruction_loss
        return self.beta, kl_loss, reconstruction_loss, total_loss

    def kl_loss(self, latent_mean: Tensor, latent_log_var: Tensor) -> Tensor:
        """Return KL(q(z | x) || N(0, I)) in nats, mean over the batch (VAE paper, app. B)."""
        return kl_per_dimension(latent_mean, latent_log_var).sum(dim=-1).mean()

    def reconstruction_loss(self, original: Tensor, reconstruction: Tensor) -> Tensor:
        """Return the likelihood's loss, summed over each image, mean over the batch."""
        if self.likelihood == "bernoulli":
            return bernoulli_loss(original, reconstruction)
        squared_error = torch.square(original - reconstruction).sum(dim=(1, 2, 3)).mean()
        if self.likelihood == "sigma":
            return sigma_loss(squared_error, values=original[0].numel())
        if self.likelihood == "gaussian":
            return squared_error
        raise ValueError(f"there is no loss for the likelihood {self.likelihood!r}")


def bernoulli_loss(original: Tensor, reconstruction: Tensor) -> Tensor:
    """Return -log p(x | z) in nats per image, with each value a Bernoulli distribution's mean.

    Both are [batch, channels, height, width] in [0, 1].
    """
    # PyTorch's function raises an error for NaN; here the loss is NaN, as in the other likelihoods.
    entropy = F.binary_cross_entropy(reconstruction.nan_to_num(0.5), original, reduction="none")
    entropy = torch.where(reconstruction.isnan(), math.nan, entropy)
    return entropy.sum(dim=(1, 2, 3)).mean()


def sigma_loss(squared_error: Tensor, values: int) -> Tensor:
    """Return -log p(x | z) in nats per image, with p the Gaussian of the best single variance.

    ``squared_error`` is per image, a mean over the batch; an image has so many ``values``. The best
    variance is the mean squared error of a value (Rybkin et al. 2021, "optimal sigma-VAE").
    """
    # A thousandth of the range of [0, 1] at least: at 0 the logarithm would run away.
    variance = (squared_error / values).clamp(min=1e-3**2)
    return 0.5 * (squared_error / variance + values * torch.log(2 * math.pi * variance))


def kl_per_dimension(mean: Tensor, log_var: Tensor) -> Tensor:
    """Return KL(N(mean, exp(log_var)) || N(0, 1)) in nats for each element, the inputs' shape."""
    # expm1 keeps the digits that 1 + log_var - exp(log_var) loses next to zero.
    return 0.5 * (torch.square(mean) + torch.expm1(log_var) - log_var)


def annealed_beta(
    beta: float, schedule: str, epoch: int, epochs: int, warmup_epochs: int, cycles: int
) -> float:
    """Return the weight of the KL divergence in an ``epoch``, counted from 0, of ``epochs``.

    The post ("Practical Aspects") advises a low weight at first. ``schedule`` is

    - ``"constant"``: always ``beta``;
    - ``"linear"``: up from 0 to ``beta`` in ``warmup_epochs``, then constant (Sønderby et al. 2016,
      "Ladder Variational Autoencoders");
    - ``"cyclical"``: ``cycles`` times up from 0, each time in the first half of the cycle, and
      constant in the second (Fu et al. 2019, "Cyclical Annealing Schedule").

    ``ValueError`` for another schedule.
    """
    if schedule == "constant":
        return beta
    if schedule == "linear":
        return beta * min(1.0, epoch / max(1, warmup_epochs))
    if schedule == "cyclical":
        share_of_cycle = (epoch * cycles % epochs) / epochs  # the remainder is exact: whole numbers
        return beta * min(1.0, 2 * share_of_cycle)
    raise ValueError(f"schedule is {schedule!r}: one of {BETA_SCHEDULES} is needed")
