"""Ways through the latent space: near a picture, between two, along each dimension."""

import math

import torch
from torch import Tensor

from vae.vae import VAE


def near(mean: Tensor, log_var: Tensor, count: int, spread: float) -> Tensor:
    """Draw latent vectors around one picture, [count, latent].

    z = kept * (mean + spread * posterior std * e1) + spread * prior std * e2 with e1 and e2 from
    N(0, I) and kept = sqrt(1 - spread**2). The posterior's standard deviation alone is so small
    that all flowers look the same, so most of the distance is in the prior's, which is 1; as much
    variance as it adds, ``kept`` takes away, so that z stays where the decoder was trained.

    Args:
        mean: the posterior's mean for the picture, [1, latent].
        log_var: the logarithm of its variance, [1, latent].
        count: how many.
        spread: 0 (each one is the picture's own mean) to 1 (drawn from the prior, nothing of the
            picture left).
    """
    kept = math.sqrt(1 - spread**2)
    std = spread * torch.sqrt(1 + kept**2 * log_var.exp())
    return kept * mean + std * torch.randn_like(mean.repeat(count, 1))


def spherical_steps(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Return latent vectors on the arc from ``start`` to ``end``, both included, [steps, latent].

    A straight line would pass closer to the origin than the prior ever draws (White 2016,
    section 2.1).

    Args:
        start: [1, latent].
        end: [1, latent].
        steps: how many, at least 2.
    """
    share = torch.linspace(0, 1, steps, device=start.device)[:, None]
    angle = torch.cosine_similarity(start, end).clamp(-1, 1).acos()
    if angle.sin() < 1e-4:
        return torch.lerp(start, end, share)
    return (((1 - share) * angle).sin() * start + (share * angle).sin() * end) / angle.sin()


def variation_per_dimension(model: VAE, draws: int = 256) -> Tensor:
    """Return each latent dimension's share of the variance of the decoder's pictures, [latent].

    It is the share that is left when all other dimensions are known (Sobol's total effect,
    estimated as in Jansen 1999): 0 for a dimension that the decoder ignores. Where dimensions act
    together the shares sum to more than 1.

    Args:
        model: the model.
        draws: pictures to compare for each dimension.
    """
    z, other = torch.randn(2, draws, model.latent_size, device=model.decoder.fc.weight.device)
    images = model.decoder(z)
    total = images.var(dim=0, correction=0).sum().clamp(min=1e-12)
    changes = []
    for dimension in range(model.latent_size):
        moved = z.clone()
        moved[:, dimension] = other[:, dimension]
        changes.append(0.5 * torch.square(model.decoder(moved) - images).sum() / draws)
    return torch.stack(changes) / total
