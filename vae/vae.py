"""The variational autoencoder: encoder, latent sampler and decoder in a row."""

import torch
from torch import Tensor, nn

from vae.layers import Decoder, Encoder, HxW, SampleLatent


class VAE(nn.Module):
    """The variational autoencoder of Kingma & Welling (2014), as the post builds it.

    65,831 parameters at the post's setting (32x32 RGB, 10 latent dimensions). ``image_resolution``
    is (height, width), positive multiples of 8 (else ``ValueError``); ``batch_norm`` puts a batch
    normalisation between convolution and activation.
    """

    def __init__(
        self, image_resolution: HxW, latent_size: int, image_channels: int, batch_norm: bool = False
    ) -> None:
        super().__init__()
        self.image_resolution = image_resolution
        self.latent_size = latent_size
        self.image_channels = image_channels
        self.encoder = Encoder(image_resolution, image_channels, latent_size, batch_norm)
        self.sample_latent = SampleLatent(latent_size)
        self.decoder = Decoder(image_resolution, image_channels, latent_size, batch_norm)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode images, [batch, channels, height, width] in [0, 1], draw one z for each, decode.

        Returns the reconstructions, and the posterior's mean and log-variance.
        """
        mean, log_var = self.encoder(x)
        # The encoder turns images, [batch, channels, height, width], into the posterior of each:
        # a Gaussian with a mean, [batch, latent], and the logarithm of a variance, [batch, latent]
        latent_sample = self.sample_latent(mean, log_var)
        # One draw from each posterior, [batch, latent], whose dimensions are independent
        reconstruction = self.decoder(latent_sample)
        # The decoder turns each draw into an image, [batch, channels, height, width]
        return reconstruction, mean, log_var

    def sample(self, n: int) -> Tensor:
        """Return ``n`` new images, [n, channels, height, width] in [0, 1], with z from N(0, I)."""
        weight = next(self.parameters())
        z = torch.randn(n, self.latent_size, device=weight.device, dtype=weight.dtype)
        return self.decoder(z)
