"""How good a trained model is on pictures it has not seen, and how far PCA gets with as little."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vae.losses import ELBOLoss, kl_per_dimension
from vae.vae import VAE


@torch.no_grad()
def evaluate(
    model: VAE, batches: Iterable[Tensor], loss: ELBOLoss, generator: torch.Generator
) -> dict[str, Any]:
    """Measure ``model`` on held-out images.

    The model is evaluated as it is used (``eval()``), and left in the mode that it was in.

    Args:
        model: the model.
        batches: images in [0, 1], each [batch, channels, height, width].
        loss: says the likelihood and beta.
        generator: where the noise for z comes from, on the model's device.

    Returns:
        A dictionary of

        - ``squared_error``: squared error per image with z sampled, summed over its values;
        - ``squared_error_mean``: the same through the posterior's mean;
        - ``psnr``: peak signal-to-noise ratio through the mean, dB, mean over the images;
        - ``kl``: nats per image, and ``kl_per_dimension``: a list in the latent's order;
        - ``reconstruction_loss``, ``total_loss``: per image, as ``loss`` defines them;
        - ``elbo_per_dimension``: the ELBO in nats per pixel value, beta 1; None for the
          ``"gaussian"`` likelihood, which is not a normalised one;
        - ``active_units``: latent dimensions whose mean varies over the data by more than 0.01
          (Burda et al. 2016, section 4.2).

    Raises:
        ValueError: if there are no images.
    """
    was_training = model.training
    model.eval()
    means, squared, squared_mean, psnr, cross_entropy = [], [], [], [], []
    kl = torch.zeros(model.latent_size)
    for x in batches:
        reconstruction, mean, log_var = model(x, generator)
        through_mean = model.decode(mean)
        means.append(mean)
        squared.append(torch.square(x - reconstruction).sum(dim=(1, 2, 3)))
        squared_mean.append(torch.square(x - through_mean).sum(dim=(1, 2, 3)))
        psnr.append(-10 * torch.log10(squared_mean[-1] / x[0].numel()))
        kl += kl_per_dimension(mean, log_var).sum(dim=0).cpu()
        if loss.likelihood == "bernoulli":
            cross_entropy.append(loss.reconstruction_loss(x, reconstruction) * len(x))
        pixels = x[0].numel()
    model.train(was_training)
    if not means:
        raise ValueError("there are no images to evaluate on: at least one is needed")

    latent_means = torch.cat(means).cpu()
    count = len(latent_means)
    squared_error = torch.cat(squared).mean().item()
    kl = kl / count
    reconstruction_loss = {
        "gaussian": squared_error,
        "bernoulli": sum(value.item() for value in cross_entropy) / count,
        # The one variance of the whole split, as the loss takes that of the batch.
        "sigma": 0.5 * pixels * (1 + math.log(2 * math.pi * max(squared_error / pixels, 1e-6))),
    }[loss.likelihood]
    proper = loss.likelihood != "gaussian"
    return {
        "squared_error": squared_error,
        "squared_error_mean": torch.cat(squared_mean).mean().item(),
        "psnr": torch.cat(psnr).mean().item(),
        "kl": kl.sum().item(),
        "reconstruction_loss": reconstruction_loss,
        "total_loss": reconstruction_loss + loss.beta * kl.sum().item(),
        "elbo_per_dimension": -(reconstruction_loss + kl.sum().item()) / pixels if proper else None,
        "active_units": int((latent_means.var(dim=0, correction=0) > 0.01).sum()),
        "kl_per_dimension": kl.tolist(),
    }


def pca_squared_error(train: Iterable[Tensor], test: Iterable[Tensor], components: int) -> float:
    """Return PCA's squared error per test image with as many components as a latent has dimensions.

    PCA is the best linear autoencoder: the yardstick that a nonlinear one has to beat.

    Args:
        train: batches of images that the components are fitted on, each
            [batch, channels, height, width].
        test: batches of images that the error is measured on, likewise.
        components: how many; more than ``train`` spans count as all that it spans.

    Raises:
        ValueError: if there are no images or ``components`` is below 1.
    """
    if components < 1:
        raise ValueError(f"asked for {components} components: at least 1 is needed")
    x = [batch.flatten(1) for batch in train if len(batch)]
    if not x:
        raise ValueError("there are no images to fit PCA on: at least one is needed")
    x = torch.cat(x)
    centre = x.mean(dim=0)
    x -= centre
    # The smaller of the two products has the same components as the SVD, in a fraction of its
    # time and memory; those that are rounding and nothing else are left out.
    wide = x.shape[0] < x.shape[1]
    values, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    vectors = vectors[:, values > 1e-6 * values[-1]][:, -components:]
    directions = torch.nn.functional.normalize(vectors.T @ x) if wide else vectors.T
    errors = []
    for batch in test:
        residual = batch.flatten(1) - centre
        residual -= residual @ directions.T @ directions
        errors.append(torch.square(residual).sum(dim=1))
    if not errors:
        raise ValueError("there are no images to measure PCA on: at least one is needed")
    return torch.cat(errors).mean().item()
