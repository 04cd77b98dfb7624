"""The loss of the variational autoencoder: the negative evidence lower bound, in two parts."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ELBOLoss(nn.Module):
    """Reconstruction loss + beta * KL(q(z | x) || p(z)), mean over the batch.

    With beta 1 and a proper likelihood it is the negative ELBO of Kingma & Welling (2014,
    equation 3) with one z for each image; another beta is Higgins et al. (2017). Assign to
    ``loss.beta`` to anneal it. The likelihood says what -log p(x | z) is the reconstruction loss:

    - ``"gaussian"``: the squared error summed over the image, as in the post: a Gaussian of
      variance 1/2 without its constants, so not comparable in nats;
    - ``"bernoulli"``: the binary cross-entropy summed over the image, in nats; no value counts for
      more than 100.

    ``ValueError`` for a negative or non-finite beta or an unknown likelihood.
    """

    def __init__(self, beta: float, likelihood: str = "gaussian") -> None:
        super().__init__()
        if not (math.isfinite(beta) and beta >= 0):
            raise ValueError(f"beta is {beta}: a finite number of at least 0 is needed")
        if likelihood not in ("gaussian", "bernoulli"):
            raise ValueError(f"likelihood is {likelihood!r}: gaussian or bernoulli is needed")
        self.beta = beta
        self.likelihood = likelihood

    def forward(
        self, original: Tensor, reconstruction: Tensor, latent_mean: Tensor, latent_log_var: Tensor
    ) -> tuple[float, Tensor, Tensor, Tensor]:
        """Return beta, the KL loss, the reconstruction loss and the total loss.

        That is a number and three scalars, all per image, the KL loss in nats. Originals and
        reconstructions are [batch, channels, height, width] in [0, 1], means and log-variances of
        the posteriors [batch, latent]. ``ValueError`` for other shapes, which PyTorch would
        broadcast silently.
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
            # The function refuses NaN; here it stays NaN, for whoever trains to stop at.
            p = reconstruction.nan_to_num(0.5)
            entropy = F.binary_cross_entropy(p, original, reduction="none")
            return entropy.sum(dim=(1, 2, 3)).mean() + 0 * reconstruction.sum()
        return torch.square(original - reconstruction).sum(dim=(1, 2, 3)).mean()


def kl_per_dimension(mean: Tensor, log_var: Tensor) -> Tensor:
    """Return KL(N(mean, exp(log_var)) || N(0, 1)) in nats for each element, the inputs' shape."""
    # expm1 keeps the digits that 1 + log_var - exp(log_var) loses next to zero.
    return 0.5 * (torch.square(mean) + torch.expm1(log_var) - log_var)
