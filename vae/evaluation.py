"""How good a trained model is on pictures it has not seen, and how far PCA gets with as little."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from vae.latent import prior
from vae.losses import ELBOLoss, kl_per_dimension
from vae.vae import VAE

Batches = Callable[[], Iterable[Tensor]]  # called for each pass; images on the CPU


@torch.no_grad()
def evaluate(model: VAE, batches: Iterable[Tensor], loss: ELBOLoss) -> dict[str, Any]:
    """Measure ``model`` on held-out images, batches of [batch, channels, height, width] in [0, 1].

    The model is in ``eval()`` mode. The dictionary has

    - ``squared_error``: squared error per image with z sampled, summed over its values;
    - ``squared_error_mean``: the same through the posterior's mean;
    - ``kl``: nats per image, and ``kl_per_dimension``: a list in the latent's order;
    - ``reconstruction_loss``, ``total_loss``: per image, as ``loss`` defines them;
    - ``active_units``: latent dimensions whose mean varies over the data by more than 0.01
      (Burda et al. 2016, section 4.2).
    """
    sums: dict[str, Tensor] = {}
    count = 0
    device = next(model.parameters()).device
    for x in batches:
        x = x.to(device)
        reconstruction, mean, log_var = model(x)
        measured = {
            "squared_error": torch.square(x - reconstruction).sum(dim=(1, 2, 3)),
            "squared_error_mean": torch.square(x - model.decoder(mean)).sum(dim=(1, 2, 3)),
            "reconstruction_loss": loss.reconstruction_loss(x, reconstruction).expand(len(x)),
            "kl_per_dimension": kl_per_dimension(mean, log_var),
            "latent_means": mean,
            "latent_squares": mean.square(),
        }
        # Sums, not columns: small tensors that stay would scatter over the memory of large ones.
        for name, values in measured.items():
            sums[name] = sums.get(name, torch.zeros(())) + values.cpu().double().sum(dim=0)
        count += len(x)
    variances = sums.pop("latent_squares") / count - (sums.pop("latent_means") / count).square()
    metrics: dict[str, Any] = {name: (total / count).tolist() for name, total in sums.items()}
    metrics["kl"] = sum(metrics["kl_per_dimension"])
    metrics["total_loss"] = metrics["reconstruction_loss"] + loss.beta * metrics["kl"]
    metrics["active_units"] = int((variances > 0.01).sum())
    return metrics


class PCA:
    """Principal component analysis, the best linear autoencoder: the yardstick for another one.

    It is fitted by block power iteration (Halko, Martinsson & Tropp 2011, algorithm 4.4), which
    holds one batch at a time: the memory it takes does not grow with the number of images.
    ``components`` is how many directions of most variance it keeps, at most all there are.
    """

    def __init__(self, batches: Batches, components: int) -> None:
        images, total = 0, torch.zeros(())
        for x in batches():
            images, total = images + len(x), total + x.flatten(1).sum(dim=0)
        self.shape, self.centre = x.shape[1:], total / images
        pixels = len(self.centre)
        count = min(components, images - 1, pixels)
        # Some directions more than asked for, and ten passes: errors are exact to a thousandth.
        directions = torch.randn(pixels, min(count + 10, pixels))
        for _ in range(10):
            directions, _ = torch.linalg.qr(directions)
            rows = ((x.flatten(1) - self.centre) for x in batches())
            directions = sum((row.T @ (row @ directions) for row in rows), torch.zeros(()))
        self.directions = torch.linalg.svd(directions, full_matrices=False).U[:, :count]

    def encode(self, images: Iterable[Tensor]) -> Tensor:
        """Return the codes of all images, which come in batches, [n, components]."""
        return torch.cat([(x.flatten(1) - self.centre) @ self.directions for x in images])

    def decode(self, z: Tensor) -> Tensor:
        """Return the images of codes, [n, components]."""
        return (self.centre + z @ self.directions.T).unflatten(1, self.shape)


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Return the squared Fréchet distance between Gaussians fitted to two sets of features.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the formula of the FID (Heusel et al. 2017). The
    sets are [n, features] and [m, features].
    """
    one, other = one.double(), other.double()
    shift = torch.square(one.mean(dim=0) - other.mean(dim=0)).sum()
    covariances = [each.T.cov(correction=0).view(2 * one.shape[1:]) for each in (one, other)]
    # The product is similar to a symmetric matrix, so its eigenvalues are real and not negative.
    roots = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt()
    return (shift + sum(each.trace() for each in covariances) - 2 * roots.sum()).item()


def frechet_distances(
    drawn: Mapping[str, Iterable[Tensor]], test: Batches, features: PCA
) -> dict[str, float]:
    """Return the Fréchet distance of each set of images to the test images.

    Features are the test images' 64 leading principal components. Lower is better. It is not the
    FID, whose features a network computes, and compares only between equal images of equal size.
    """
    images = features.encode(test())
    return {name: frechet_distance(features.encode(each), images) for name, each in drawn.items()}


def evaluate_pca(train: Batches, test: Batches, components: int, features: PCA) -> dict[str, Any]:
    """Measure PCA with as many components as a latent has dimensions.

    It is fitted to the images of ``train``. The dictionary has its ``squared_error`` per test
    image, and the Fréchet distance of ``samples`` from the Gaussian of the training images' codes,
    clipped to [0, 1].
    """
    pca = PCA(train, components)
    codes, test_codes = pca.encode(train()), pca.encode(test())
    errors = (torch.square(x - pca.decode(pca.encode([x]))).sum() for x in test())
    drawn = codes.mean(dim=0) + torch.randn_like(test_codes) * codes.std(dim=0, correction=0)
    samples = (pca.decode(z).clamp(0, 1) for z in drawn.split(64))
    return {
        "components": components,
        "squared_error": sum(errors, torch.zeros(())).item() / len(test_codes),
        "frechet": frechet_distances({"samples": samples}, test, features),
    }


@torch.no_grad()
def evaluate_samples(
    model: VAE, latents: MultivariateNormal, test: Batches, features: PCA
) -> dict[str, float]:
    """Measure how much the pictures that a model draws are like test images.

    The model is in ``eval()`` mode, ``latents`` are what ``vae.latent.fit_latents`` returns. The
    dictionary has the Fréchet distances of as many ``reconstructions`` of the test images (what
    this decoder can do at best), samples drawn from the ``fitted`` latents, and from the ``prior``.
    """
    device = next(model.parameters()).device
    count = sum(len(x) for x in test())
    drawn = {"reconstructions": (model(x.to(device))[0].cpu() for x in test())}
    for name, distribution in {"fitted": latents, "prior": prior(model)}.items():
        drawn[name] = (model.decoder(z).cpu() for z in distribution.sample((count,)).split(64))
    return frechet_distances(drawn, test, features)
