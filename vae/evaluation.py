"""How good a trained model is on pictures it has not seen, and how far PCA gets with as little."""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from vae.latent import prior
from vae.losses import ELBOLoss, kl_per_dimension, sigma_loss
from vae.vae import VAE

Batches = Callable[[], Iterable[Tensor]]  # called for each pass; images on the CPU


@torch.no_grad()
def evaluate(model: VAE, batches: Iterable[Tensor], loss: ELBOLoss) -> dict[str, Any]:
    """Measure ``model`` on held-out images.

    The model is evaluated as it is used (``eval()``), and left in the mode that it was in.

    Args:
        model: the model.
        batches: images in [0, 1], each [batch, channels, height, width].
        loss: says the likelihood and beta.

    Returns:
        A dictionary of

        - ``squared_error``: squared error per image with z sampled, summed over its values;
        - ``squared_error_mean``: the same through the posterior's mean;
        - ``psnr``: peak signal-to-noise ratio through the mean, dB, mean over the images;
        - ``kl``: nats per image, and ``kl_per_dimension``: a list in the latent's order;
        - ``reconstruction_loss``, ``total_loss``: per image, as ``loss`` defines them;
        - ``active_units``: latent dimensions whose mean varies over the data by more than 0.01
          (Burda et al. 2016, section 4.2).

    Raises:
        ValueError: if there are no images.
    """
    was_training = model.training
    model.eval()
    sums: dict[str, Tensor] = {}
    count = 0
    device = next(model.parameters()).device
    for x in batches:
        x = x.to(device)
        reconstruction, mean, log_var = model(x)
        squared_error_mean = torch.square(x - model.decoder(mean)).sum(dim=(1, 2, 3))
        measured = {
            "squared_error": torch.square(x - reconstruction).sum(dim=(1, 2, 3)),
            "squared_error_mean": squared_error_mean,
            "psnr": -10 * torch.log10(squared_error_mean / x[0].numel()),
            "reconstruction_loss": loss.reconstruction_loss(x, reconstruction).expand(len(x)),
            "kl_per_dimension": kl_per_dimension(mean, log_var),
            "latent_means": mean,
            "latent_squares": mean.square(),
        }
        # Sums, not columns: small tensors that stay would scatter over the memory of large ones.
        for name, values in measured.items():
            sums[name] = sums.get(name, torch.zeros(())) + values.cpu().double().sum(dim=0)
        count += len(x)
    model.train(was_training)
    if not count:
        raise ValueError("there are no images to evaluate on: at least one is needed")

    variances = sums.pop("latent_squares") / count - (sums.pop("latent_means") / count).square()
    metrics: dict[str, Any] = {name: (total / count).tolist() for name, total in sums.items()}
    if loss.likelihood == "sigma":
        # The one variance of the whole split, as the loss takes that of the batch.
        whole = sigma_loss(sums["squared_error"] / count, x[0].numel())
        metrics["reconstruction_loss"] = whole.item()
    metrics["kl"] = sum(metrics["kl_per_dimension"])
    metrics["total_loss"] = metrics["reconstruction_loss"] + loss.beta * metrics["kl"]
    metrics["active_units"] = int((variances > 0.01).sum())
    return metrics


def principal_components(batches: Batches, count: int) -> tuple[Tensor, Tensor]:
    """Return the mean image, [pixels], and the directions of most variance, [pixels, count].

    Block power iteration (Halko, Martinsson & Tropp 2011, algorithm 4.4), which holds one batch at
    a time: the memory it takes does not grow with the number of images. ``batches`` is called for
    each pass and returns images, each [batch, channels, height, width]; a ``count`` of more than
    they span is all that they span.
    """
    images = sum(len(x) for x in batches())
    centre = sum((x.flatten(1).sum(dim=0) for x in batches()), torch.zeros(())) / images
    count = min(count, images - 1, len(centre))
    # Some directions more than asked for, and ten passes: errors are exact to a thousandth.
    directions = torch.randn(len(centre), min(count + 10, len(centre)), device=centre.device)
    for _ in range(10):
        directions, _ = torch.linalg.qr(directions)
        rows = ((x.flatten(1) - centre) for x in batches())
        directions = sum((row.T @ (row @ directions) for row in rows), torch.zeros(()))
    return centre, torch.linalg.svd(directions, full_matrices=False).U[:, :count]


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Return the squared Fréchet distance between Gaussians fitted to two sets of features.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the formula of the FID (Heusel et al. 2017). The
    sets are [n, features] and [m, features].
    """
    one, other = one.cpu().double(), other.cpu().double()
    if not (one.isfinite().all() and other.isfinite().all()):
        return math.nan  # LAPACK may crash the process over such a matrix
    shift = torch.square(one.mean(dim=0) - other.mean(dim=0)).sum()
    covariances = [
        features.T.cov(correction=0).view(2 * one.shape[1:]) for features in (one, other)
    ]
    # The product is similar to a symmetric matrix, so its eigenvalues are real and not negative.
    roots = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt()
    return (shift + sum(each.trace() for each in covariances) - 2 * roots.sum()).item()


def frechet_features(test: Batches) -> Callable[[Iterable[Tensor]], Tensor]:
    """Return a function from images to their 64 leading principal components, those of ``test``."""
    centre, directions = principal_components(test, 64)
    return lambda images: torch.cat([(x.flatten(1) - centre) @ directions for x in images])


def evaluate_pca(
    train: Batches, test: Batches, components: int, features: Callable[[Iterable[Tensor]], Tensor]
) -> dict[str, Any]:
    """Measure PCA with as many components as a latent has dimensions, as ``evaluate_samples`` does.

    PCA is the best linear autoencoder: the yardstick that a nonlinear one has to beat. It is fitted
    on ``train`` (see ``principal_components``). Its ``squared_error`` is per test image; its
    samples come from the Gaussian of the training images' components, clipped to [0, 1].
    """
    centre, directions = principal_components(train, components)
    codes = [
        torch.cat([(x.flatten(1) - centre) @ directions for x in each()]) for each in (train, test)
    ]
    shape = next(iter(test()))[0].shape

    def decode(z: Tensor) -> Iterator[Tensor]:
        return ((centre + part @ directions.T).unflatten(1, shape) for part in z.split(64))

    errors = []
    for batch in test():
        residual = batch.flatten(1) - centre
        residual -= residual @ directions @ directions.T
        errors.append(torch.square(residual).sum(dim=1))
    drawn = codes[0].mean(dim=0) + torch.randn_like(codes[1]) * codes[0].std(dim=0, correction=0)
    images = features(test())
    frechet = {
        "reconstructions": decode(codes[1]),
        "samples": (x.clamp(0, 1) for x in decode(drawn)),
    }
    return {
        "components": components,
        "squared_error": torch.cat(errors).mean().item(),
        "frechet": {
            name: frechet_distance(features(each), images) for name, each in frechet.items()
        },
        "codes": codes,
    }


def probe(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Return the share of test labels that a linear classifier tells from codes, [n, dimensions].

    Linear discriminant analysis (Fisher 1936): the nearest class mean, as far as the covariance
    within the classes of ``train`` counts. Labels are integers, [n].
    """
    classes, index = train_labels.unique(return_inverse=True)
    counts = index.bincount().unsqueeze(1)
    means = torch.zeros(len(classes), train.shape[1]).index_add_(0, index, train) / counts
    within = (train - means[index]).T.cov(correction=0).view(2 * train.shape[1:])
    within.diagonal().add_(1e-6 * (1 + within.trace()))
    weights = torch.linalg.solve(within, means.T)
    scores = test @ weights - 0.5 * (means.T * weights).sum(dim=0) + (counts / len(train)).log().T
    return (classes[scores.argmax(dim=1)] == test_labels).float().mean().item()


@torch.no_grad()
def evaluate_samples(
    model: VAE,
    latents: MultivariateNormal,
    train: Batches,
    test: Batches,
    features: Callable[[Iterable[Tensor]], Tensor],
) -> dict[str, dict[str, float]]:
    """Measure how much the pictures that a model draws are like test images, and how new they are.

    The model is in ``eval()`` mode, ``latents`` are what ``vae.latent.fit_latents`` returns, the
    images come as in ``principal_components``, and ``features`` is ``frechet_features(test)``.

    Returns:
        Two dictionaries:

        - ``frechet``: the Fréchet distance to the test images in their 64 leading principal
          components, of as many ``reconstructions`` of the test images (what this decoder can do
          at best), samples drawn from the ``fitted`` latents, and from the ``prior``. Lower is
          better. It is not the FID, whose features a network computes, and compares only between
          equal images of equal size.
        - ``nearest``: the squared distance to the nearest training image, mean over a thousand
          ``samples`` of the fitted latents, and over a thousand reconstructions of images from
          the ``train`` and the ``test`` split. Samples much nearer than test reconstructions
          would be copies.
    """
    device = next(model.parameters()).device

    def reconstruct(images: Iterable[Tensor]) -> Iterator[Tensor]:
        return (model(x.to(device))[0].cpu() for x in images)

    def nearest(images: Iterable[Tensor]) -> float:
        rows = torch.cat([*images])[:1000].flatten(1)
        distances = [torch.cdist(rows, x.flatten(1)).amin(dim=1) for x in train()]
        return torch.stack(distances).amin(dim=0).square().mean().item()

    def decode(distribution: MultivariateNormal, count: int) -> Iterator[Tensor]:
        return (model.decoder(z).cpu() for z in distribution.sample((count,)).split(64))

    images = features(test())
    drawn = {
        "reconstructions": reconstruct(test()),
        "fitted": decode(latents, len(images)),
        "prior": decode(prior(model), len(images)),
    }
    return {
        "frechet": {name: frechet_distance(features(each), images) for name, each in drawn.items()},
        "nearest": {
            "samples": nearest(decode(latents, 1000)),
            "test": nearest(reconstruct(islice(test(), 16))),
            "train": nearest(reconstruct(islice(train(), 16))),
        },
    }
