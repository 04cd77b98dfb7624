"""The loss of the variational autoencoder: the negative evidence lower bound, in two parts."""

import math

import torch
from torch import Tensor, nn

LIKELIHOODS = ("gaussian", "bernoulli", "sigma")
BETA_SCHEDULES = ("constant", "linear", "cyclical")


class ELBOLoss(nn.Module):
    """Reconstruction loss + beta * KL(q(z | x) || p(z)), mean over the batch.

    With beta 1 and a proper likelihood it is the negative ELBO of Kingma & Welling (2014,
    equation 3) with one z for each image; another beta is Higgins et al. (2017).

    Args:
        beta: the weight of the KL divergence, 0 or more. Assign to ``loss.beta`` to anneal it.
        likelihood: what -log p(x | z) stands for the reconstruction loss.

            - ``"gaussian"``: the squared error summed over the image, as in the post: a Gaussian
              of variance 1/2 without its constants, so not comparable in nats.
            - ``"bernoulli"``: the binary cross-entropy summed over the image, in nats; outputs
              nearer to 0 and 1 than 1e-7 count as 1e-7 away.
            - ``"sigma"``: a Gaussian whose one variance is the batch's mean squared error, its
              maximum-likelihood value (Rybkin et al. 2021, section 3); constants included, in
              nats. No beta has to be chosen: 1 is right.

    Raises:
        ValueError: for a negative or non-finite beta or an unknown likelihood.
    """

    def __init__(self, beta: float, likelihood: str = "gaussian") -> None:
        super().__init__()
        if not (math.isfinite(beta) and beta >= 0):
            raise ValueError(f"beta is {beta}: a finite number of at least 0 is needed")
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood is {likelihood!r}: one of {', '.join(LIKELIHOODS)}")
        self.beta = beta
        self.likelihood = likelihood

    def forward(
        self, original: Tensor, reconstruction: Tensor, latent_mean: Tensor, latent_log_var: Tensor
    ) -> tuple[float, Tensor, Tensor, Tensor]:
        """Return beta, the KL loss, the reconstruction loss and the total loss.

        Args:
            original: images in [0, 1], [batch, channels, height, width].
            reconstruction: the decoder's output in [0, 1], the same shape.
            latent_mean: the posterior's mean, [batch, latent].
            latent_log_var: the logarithm of its variance, [batch, latent].

        Returns:
            ``(beta, kl_loss, reconstruction_loss, total_loss)``: a number and three scalars, the
            KL loss in nats per image, the reconstruction loss per image in the likelihood's unit.

        Raises:
            ValueError: if the shapes do not fit together.
        """
        if original.ndim != 4 or original.shape != reconstruction.shape or not len(original):
            raise ValueError(
                f"original has shape {list(original.shape)} and reconstruction "
                f"{list(reconstruction.shape)}: both need the same "
                "[batch, channels, height, width] with at least one image"
            )
        shape = latent_mean.shape
        if len(shape) != 2 or shape != latent_log_var.shape or shape[0] != len(original):
            raise ValueError(
                f"latent_mean has shape {list(shape)} and latent_log_var "
                f"{list(latent_log_var.shape)}: both need to be [{len(original)}, latent]"
            )
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
            # Finite for outputs of exactly 0 and 1; NaN stays NaN, for whoever trains to stop at.
            p = reconstruction.clamp(1e-7, 1 - 1e-7)
            entropy = -(original * p.log() + (1 - original) * torch.log1p(-p))
            return entropy.sum(dim=(1, 2, 3)).mean()
        squared_error = torch.square(original - reconstruction).sum(dim=(1, 2, 3))
        if self.likelihood == "gaussian":
            return squared_error.mean()
        pixels = original[0].numel()
        # Below a variance of 1e-6 (a thousandth of the grey scale) the logarithm would run away.
        variance = (squared_error.mean() / pixels).clamp(min=1e-6)
        return 0.5 * (squared_error.mean() / variance + pixels * torch.log(2 * math.pi * variance))


def kl_per_dimension(mean: Tensor, log_var: Tensor) -> Tensor:
    """Return KL(N(mean, exp(log_var)) || N(0, 1)) in nats for each element, the inputs' shape."""
    # expm1 keeps the digits that 1 + log_var - exp(log_var) loses next to zero.
    return 0.5 * (torch.square(mean) + torch.expm1(log_var) - log_var)


def beta_at(progress: float, schedule: str, warmup: float = 0.0, cycles: int = 1) -> float:
    """Return the share of the full beta, 0 to 1, that a schedule gives at a point of the training.

    Args:
        progress: the share of the training that is done, 0 to 1.
        schedule: ``"constant"``; ``"linear"``: from 0 up to 1 over the warm-up, then 1 (Bowman et
            al. 2016); ``"cyclical"``: in each cycle from 0 up to 1 over its first half, then 1
            (Fu et al. 2019).
        warmup: the share of the training that the linear warm-up takes, 0 to 1.
        cycles: how many cycles, at least 1.

    Raises:
        ValueError: for an unknown schedule, a warm-up longer than the training, or no cycle.
    """
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        if not 0 <= warmup <= 1:
            raise ValueError(f"the warm-up takes {warmup} of the training: 0 to 1 is needed")
        return min(1.0, progress / warmup) if warmup else 1.0
    if schedule == "cyclical":
        if cycles < 1:
            raise ValueError(f"{cycles} cycles: at least 1 is needed")
        return min(1.0, 2 * (progress * cycles % 1))
    raise ValueError(f"schedule is {schedule!r}: one of {', '.join(BETA_SCHEDULES)} is needed")
