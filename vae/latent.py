"""Where a model's latents are, and draws from there: of any picture, or near a given one."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from vae.vae import VAE


def prior(model: VAE) -> MultivariateNormal:
    """Return p(z) = N(0, I), on the model's device."""
    weight = next(model.parameters())
    mean = torch.zeros(model.latent_size, device=weight.device, dtype=weight.dtype)
    identity = torch.eye(model.latent_size, device=weight.device, dtype=weight.dtype)
    return MultivariateNormal(mean, identity)


@torch.no_grad()
def fit_latents(model: VAE, images: Iterable[Tensor]) -> MultivariateNormal:
    """Fit one Gaussian to the latents of all images together, from which to draw new ones.

    Its mean and covariance are those of the aggregate posterior, the mixture of all q(z | x). With
    a small beta, and more so after a short training, that is not the prior: pictures decoded from
    where the prior is and no image ever was look like none. Fitting a density afterwards cures it
    (Ghosh et al. 2020, "ex-post density estimation", section 4). The model is in ``eval()`` mode,
    each batch of ``images`` [batch, channels, height, width] in [0, 1].
    """
    device = next(model.parameters()).device
    posteriors = [model.encoder(x.to(device)) for x in images]
    means = torch.cat([mean for mean, _ in posteriors])
    log_vars = torch.cat([log_var for _, log_var in posteriors])

    # A mixture's covariance: that of the means, and the mean of the covariances.
    centred = means - means.mean(dim=0)
    covariance = centred.T @ centred / len(means) + log_vars.exp().mean(dim=0).diag()
    # A posterior may have no width in some direction: this much more, and float32 can invert it.
    covariance.diagonal().add_(1e-6 * (1 + covariance.trace()))
    return MultivariateNormal(means.mean(dim=0), covariance)


def near(mean: Tensor, latents: MultivariateNormal, count: int, spread: float) -> Tensor:
    """Draw latent vectors around a picture's ``mean``, inside a distribution, [count, latent].

    z = centre + sqrt(1 - spread**2) * (mean - centre) + spread * (draw - centre). What one term
    takes away in variance the other adds, so z stays where the decoder was trained. The posterior
    alone is so narrow that all its flowers look the same. With a ``spread`` of 0 each z is the
    picture's own mean, [1, latent]; with 1 it is any draw.
    """
    kept = math.sqrt(1 - spread**2)
    draws = latents.sample((count,))
    # The formula with its three terms in the centre put together: exact at 0 and at 1.
    return (1 - kept - spread) * latents.mean + kept * mean + spread * draws


def variation_per_dimension(model: VAE, latents: MultivariateNormal, draws: int = 256) -> Tensor:
    """Return each latent dimension's share of the variance of the decoder's pictures, [latent].

    Each dimension varies as it does in ``latents``, by itself. Its share is what is left when all
    others are known (Sobol's total effect, estimated as in Jansen 1999 from ``draws`` pictures): 0
    for one that the decoder ignores. Where dimensions act together the shares sum to more than 1.
    """
    noise = torch.randn(2, draws, model.latent_size, device=latents.mean.device)
    z, other = latents.mean + latents.stddev * noise
    images = model.decoder(z)
    total_variance = images.var(dim=0, correction=0).sum().clamp(min=1e-12)
    shares = []
    for dimension in range(model.latent_size):
        moved = z.clone()
        moved[:, dimension] = other[:, dimension]
        change = 0.5 * torch.square(model.decoder(moved) - images).sum() / draws
        shares.append(change / total_variance)
    return torch.stack(shares)


def main_directions(
    model: VAE, latents: MultivariateNormal, count: int, draws: int = 64
) -> tuple[Tensor, Tensor]:
    """Return the directions in which the decoder's pictures vary most, and the share of each.

    Latents are z = centre + scale_tril @ u, with u from N(0, I). Along a unit vector v of u the
    pictures change by J v, with J the decoder's derivative with respect to u. The best directions
    are the leading eigenvectors of the mean of J'J over the latents (estimated from ``draws`` of
    them), and their eigenvalues' shares say how much of all change they hold. Returned are unit
    vectors of u, [count, latent], and shares, [count].
    """
    step = 0.1  # of u: far enough for float32, near enough for a derivative
    size = model.latent_size
    products = torch.zeros(size, size, device=latents.mean.device)
    for z in latents.sample((draws,)):
        moves = step * latents.scale_tril.T  # one for each unit vector of u
        forward, backward = model.decoder(z + moves), model.decoder(z - moves)
        derivative = (forward - backward).flatten(1) / (2 * step)  # J', [latent, values]
        products += derivative @ derivative.T
    # Eigenvectors are not computed on every device.
    eigenvalues, eigenvectors = torch.linalg.eigh(products.cpu().double())
    shares = eigenvalues.flip(0)[:count] / eigenvalues.sum().clamp(min=1e-12)
    directions = eigenvectors.flip(1)[:, :count].T
    return directions.to(products), shares.to(products)
