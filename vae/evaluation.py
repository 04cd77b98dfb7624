"""How good a trained model is on pictures it has not seen, and how far PCA gets with as little."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from vae.latent import prior
from vae.losses import ELBOLoss, kl_per_dimension
from vae.vae import VAE

MOST_COMPARED = 2000  # images of each kind whose neighbours are looked for: time grows as n * n
ROWS = 250  # of a table of distances at a time: all 2000 x 2000 would take 32 MB, and twice over
FEWEST_COMPARED = 500  # of each kind, from which on precision and recall are steady

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
        reconstruction, mean, log_var, *_ = model(x)
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
                rows = self.centred(x)
                product = product + rows.T @ (rows @ directions)
            directions = product
        self.directions = torch.linalg.svd(directions, full_matrices=False).U[:, :count]

    def encode(self, images: Iterable[Tensor]) -> Tensor:
        """Return the codes of all images, which come in batches, [n, components]."""
        return torch.cat([self.centred(x) @ self.directions for x in images])

    def centred(self, x: Tensor) -> Tensor:
        """Return images as rows, without their mean, [n, values]."""
        return x.flatten(1).to(self.centre.dtype) - self.centre

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


def precision_and_recall(real: Tensor, drawn: Tensor, k: int = 3) -> tuple[float, float]:
    """Return how much of what is drawn lies among real images, and how much of those it reaches.

    *Precision* is the share of drawn features that lie nearer to some real one than that one's k-th
    nearest real neighbour; *recall* is the same with the two changed about: the share of real ones
    that lie that near to a drawn one (Kynkäänniemi et al. 2019, section 2, with k = 3).
    Safe averages have a high precision and a low recall. Both sets are [n, features]; only figures
    of an equal n compare.
    """
    real, drawn = real.double(), drawn.double()
    precision = share_near(drawn, real, neighbour_distances(real, k))
    recall = share_near(real, drawn, neighbour_distances(drawn, k))
    return precision, recall


def share_near(features: Tensor, others: Tensor, reach: Tensor) -> float:
    """Return the share of features that lie within the reach of some of the others.

    ``features`` are [n, values], ``others`` [m, values], each with a distance of its own in
    ``reach``, [m].
    """
    near = [(torch.cdist(rows, others) <= reach).any(dim=1) for rows in features.split(ROWS)]
    return torch.cat(near).double().mean().item()


def neighbour_distances(features: Tensor, k: int) -> Tensor:
    """Return each feature's distance to its k-th nearest neighbour among the others, [n]."""
    # The nearest of all is the feature itself.
    nearest = [torch.cdist(rows, features).kthvalue(k + 1).values for rows in features.split(ROWS)]
    return torch.cat(nearest)


def compare(
    drawn: Mapping[str, Iterable[Tensor]], test: Batches, features: PCA
) -> dict[str, dict[str, float]]:
    """Hold sets of images against the test images.

    The dictionary has for each set its ``frechet`` distance (lower is better), and from 1,000 test
    images on its ``precision`` and ``recall`` (1 is best), with up to 2,000 images of each: with
    500 of each they scatter by 0.03, with fewer by more. Beside the sets stands ``real``: what one
    half of the test images has, held against the other half.

    Features are the test images' 64 leading principal components. So the distance is not the FID,
    whose features a network computes, and it compares only between equal images of equal size.
    """
    real = features.encode(test())
    # Every other one, so that both halves are alike, and the same on every machine.
    half, other_half = real[::2], real[1::2]
    count = min(len(other_half), MOST_COMPARED)
    measured: dict[str, dict[str, float]] = {"frechet": {}}
    codes = {name: features.encode(images) for name, images in drawn.items()}
    for name, code in codes.items():
        measured["frechet"][name] = frechet_distance(code, real)
    if count < FEWEST_COMPARED:
        return measured
    measured |= {"precision": {}, "recall": {}}
    for name, code in (codes | {"real": other_half}).items():
        precision, recall = precision_and_recall(spread_out(half, count), spread_out(code, count))
        measured["precision"][name] = precision
        measured["recall"][name] = recall
    return measured


def spread_out(features: Tensor, count: int) -> Tensor:
    """Return so many of the features, from all over, [count, features]."""
    return features[torch.arange(count) * len(features) // count]


def evaluate_real(train: Batches, test: Batches, features: PCA) -> dict[str, dict[str, float]]:
    """Measure what models are held against: pictures that are no model's.

    ``mean_picture`` has the ``squared_error`` of the mean training image, per test image, ``real``
    the ``frechet`` distance of the training images to the test images: what a perfect model has.
    """
    images, total = 0, torch.zeros(())
    for x in train():
        images += len(x)
        total = total + x.double().sum(dim=0)
    errors = [torch.square(x - total / images).flatten(1).sum(dim=1) for x in test()]
    distance = frechet_distance(features.encode(train()), features.encode(test()))
    return {
        "mean_picture": {"squared_error": torch.cat(errors).mean().item()},
        "real": {"frechet": distance},
    }


def evaluate_pca(train: Batches, test: Batches, components: int, features: PCA) -> dict[str, Any]:
    """Measure PCA with as many components as a latent has dimensions.

    It is fitted to the images of ``train``. The dictionary has its ``squared_error`` per test
    image, and what ``compare`` measures of ``samples`` from the Gaussian of the training images'
    codes, clipped to [0, 1].
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
        **compare({"samples": samples}, test, features),
    }


@torch.no_grad()
def evaluate_samples(
    model: VAE, latents: MultivariateNormal, test: Batches, features: PCA
) -> dict[str, dict[str, float]]:
    """Measure how much the pictures that a model draws are like test images.

    The model is in ``eval()`` mode, ``latents`` are what ``vae.latent.fit_latents`` returns. The
    dictionary has what ``compare`` measures of ``reconstructions`` of the test images (what this
    decoder can do at best), and of as many samples drawn from the ``fitted`` latents, and from the
    ``prior``.
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
    return compare(drawn, test, features)
