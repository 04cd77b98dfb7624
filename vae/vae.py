"""The variational autoencoder: encoder, latent sampler and decoder in a row."""

import torch
from torch import Tensor, nn

from vae.layers import Decoder, Encoder, SampleLatent


class VAE(nn.Module):
    """The variational autoencoder of Kingma & Welling (2014), as the post builds it.

    65,831 parameters at the post's setting (32x32 RGB, 10 latent dimensions).

    Args:
        image_resolution: (height, width), positive multiples of 8.
        latent_size: the number of latent dimensions.
        image_channels: 3 for RGB images.
        batch_norm: batch normalisation between convolution and activation; without it the
            parameters are the post's.

    Raises:
        ValueError: for sizes that the network cannot be built for.
    """

    def __init__(
        self,
        image_resolution: tuple[int, int],
        latent_size: int,
        image_channels: int,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.latent_size = latent_size
        self.encoder = Encoder(image_resolution, image_channels, latent_size, batch_norm)
        self.sample_latent = SampleLatent(latent_size)
        self.decoder = Decoder(image_resolution, image_channels, latent_size, batch_norm)

    def forward(
        self, x: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode, draw one z for each image, decode.

        Args:
            x: images in [0, 1], [batch, channels, height, width].
            generator: where the noise for z comes from; PyTorch's default if not given.

        Returns:
            The reconstructions, [batch, channels, height, width] in [0, 1], and the posterior's
            mean and log-variance, each [batch, latent].

        Raises:
            ValueError: if ``x`` is not a batch of images of the model's resolution.
        """
        mean, log_var = self.encoder(x)
        z = self.sample_latent(mean, log_var, generator)
        reconstruction = self.decoder(z)
        return reconstruction, mean, log_var

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the posterior's mean and log-variance for images ``x``, each [batch, latent]."""
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        """Return images in [0, 1], [batch, channels, height, width], for ``z``, [batch, latent]."""
        return self.decoder(z)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Return ``x`` encoded to the posterior's mean, without noise, and decoded."""
        mean, _ = self.encoder(x)
        return self.decoder(mean)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Return ``n`` new images, [n, channels, height, width] in [0, 1], with z from N(0, I).

        Args:
            n: how many, at least 1.
            generator: where z comes from, on the model's device; PyTorch's default if not given.

        Raises:
            ValueError: if ``n`` is below 1.
        """
        if n < 1:
            raise ValueError(f"asked for {n} samples: at least 1 is needed")
        weight = self.decoder.fc.weight
        z = torch.randn(
            n, self.latent_size, generator=generator, device=weight.device, dtype=weight.dtype
        )
        return self.decoder(z)


def find_device(name: str) -> torch.device:
    """Return the device of that name; ``"auto"`` is the accelerator if there is one, else the CPU.

    Raises:
        ValueError: if there is no such device here.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"device {name} is not to be had here: {first_line(error)}") from None
    return torch.device(name)


def first_line(error: Exception) -> str:
    """Return an error's message without what PyTorch adds below its first line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
