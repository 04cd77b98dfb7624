"""How good a trained model is on pictures it has not seen, and how far PCA gets with as little."""

from collections.abc import Callable, Iterable, Iterator, Mapping
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

    The model is in ``eval()`` mode, ``loss`` is the one that it is trained with. Returned are

    - ``squared_error``: squared error per image with z sampled, summed over its values;
    - ``squared_error_mean``: the same through the posterior's mean;
    - ``kl``: nats per image, and ``kl_per_dimension``: a list in the latent's order;
    - ``reconstruction_loss``, ``total_loss``: per image, what ``loss`` returns for them;
    - ``active_units``: latent dimensions whose mean varies over the data by more than 0.01
      (Burda et al. 2016, section 5.2).
    """
    device = next(model.parameters()).device
    sums: dict[str, Tensor] = {}
    count = 0
    for x in batches:
        x = x.to(device)
        reconstruction, mean, log_var = model(x)
        # Whatever else the loss returns in between, the total comes last.
        _, _, reconstruction_loss, *_, total_loss = loss(x, reconstruction, mean, log_var)
        batch_sums = {
            "squared_error": torch.square(x - reconstruction).sum(),
            "squared_error_mean": torch.square(x - model.decoder(mean)).sum(),
            "reconstruction_loss": reconstruction_loss * len(x),
            "total_loss": total_loss * len(x),
            "kl_per_dimension": kl_per_dimension(mean, log_var).sum(dim=0),
            "latent_means": mean.sum(dim=0),
            "latent_squares": mean.square().sum(dim=0),
        }
        # Sums, not columns: small tensors that stay would scatter over the memory of large ones.
        for name, value in batch_sums.items():
            sums[name] = sums.get(name, torch.zeros(())) + value.cpu().double()
        count += len(x)

    means = {name: total / count for name, total in sums.items()}
    variances = means.pop("latent_squares") - means.pop("latent_means").square()
    metrics: dict[str, Any] = {name: value.tolist() for name, value in means.items()}
    metrics["kl"] = sum(metrics["kl_per_dimension"])
    metrics["active_units"] = int((variances > 0.01).sum())
    return metrics


class PCA:
    """Principal component analysis, the best linear autoencoder: the yardstick for another one.

    It is fitted by block power iteration (Halko, Martinsson & Tropp 2011, algorithm 4.4), which
    holds one batch at a time: the memory it takes does not grow with the number of images.
    ``components`` is how many directions of most variance it keeps, at most all there are.
    """

    def __init__(self, batches: Batches, components: int) -> None:
        images = 0
        total = torch.zeros(())
        for x in batches():
            images += len(x)
            total = total + x.flatten(1).sum(dim=0)
        self.shape = x.shape[1:]
        self.centre = total / images
        pixels = len(self.centre)
        count = min(components, images - 1, pixels)
        # Some directions more than asked for, and ten passes: errors are exact to a thousandth.
        directions = torch.randn(pixels, min(count + 10, pixels))
        for _ in range(10):
            directions, _ = torch.linalg.qr(directions)
            product = torch.zeros(())  # of the covariance, times the number of images
            for x in batches():
                rows = x.flatten(1) - self.centre
                product = product + rows.T @ (rows @ directions)
            directions = product
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
    mean, other_mean = one.double().mean(dim=0), other.double().mean(dim=0)
    covariance = covariance_matrix(one.double())
    other_covariance = covariance_matrix(other.double())
    shift = torch.square(mean - other_mean).sum()
    # The product is similar to a symmetric matrix, so its eigenvalues are real and not negative.
    eigenvalues = torch.linalg.eigvals(covariance @ other_covariance).real.clamp(min=0)
    trace_of_root = eigenvalues.sqrt().sum()
    return (shift + covariance.trace() + other_covariance.trace() - 2 * trace_of_root).item()


def covariance_matrix(features: Tensor) -> Tensor:
    """Return the covariance of features, [n, features], as a matrix, [features, features]."""
    centred = features - features.mean(dim=0)
    return centred.T @ centred / len(features)


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
    squared_error = 0.0
    count = 0
    for x in test():
        squared_error += torch.square(x - pca.decode(pca.encode([x]))).sum().item()
        count += len(x)

    # Codes are uncorrelated, so their Gaussian is one for each component.
    codes = pca.encode(train())
    noise = torch.randn(count, codes.shape[1])
    spread = (codes - codes.mean(dim=0)).square().mean(dim=0).sqrt()
    drawn = codes.mean(dim=0) + noise * spread
    samples = (pca.decode(z).clamp(0, 1) for z in drawn.split(64))
    return {
        "components": pca.directions.shape[1],  # fewer where there are fewer pictures
        "squared_error": squared_error / count,
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

    def decoded(z: Tensor) -> Iterator[Tensor]:
        return (model.decoder(batch).cpu() for batch in z.split(64))

    drawn = {
        "reconstructions": (model(x.to(device))[0].cpu() for x in test()),
        "fitted": decoded(latents.sample((count,))),
        "prior": decoded(prior(model).sample((count,))),
    }
    return frechet_distances(drawn, test, features)
