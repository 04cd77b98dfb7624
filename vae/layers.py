"""The three blocks of the variational autoencoder: encoder, latent sampler and decoder."""

import torch
from torch import Tensor, nn


def check_sizes(image_resolution: tuple[int, int], image_channels: int, latent_size: int) -> None:
    """Raise ``ValueError`` unless the network can be built for these sizes."""
    height, width = image_resolution
    if height < 8 or width < 8 or height % 8 or width % 8:
        raise ValueError(
            f"image resolution is {height}x{width} (height x width): both need to be positive "
            "multiples of 8, because three poolings halve them three times"
        )
    if image_channels < 1:
        raise ValueError(f"image_channels is {image_channels}: at least 1 is needed")
    if latent_size < 1:
        raise ValueError(f"latent_size is {latent_size}: at least 1 is needed")


class Encoder(nn.Module):
    """The approximate posterior q(z | x): a diagonal Gaussian for each image.

    Three blocks of convolution, pooling and ReLU halve the resolution three times; two linear
    layers read the mean and the log-variance off the result (the post, "Layers"). The ReLU stands
    behind the pooling, not before it as in the post: a maximum and a ReLU commute, so outputs and
    gradients are the same to the bit, and the ReLU has a quarter of the values to look at.

    Args:
        image_resolution: (height, width), positive multiples of 8.
        image_channels: 3 for RGB images.
        latent_size: the number of latent dimensions.
        batch_norm: normalise each convolution's output over the batch (Ioffe & Szegedy 2015).

    Raises:
        ValueError: for sizes that the network cannot be built for.
    """

    def __init__(
        self,
        image_resolution: tuple[int, int],
        image_channels: int,
        latent_size: int,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(image_resolution, image_channels, latent_size)
        height, width = image_resolution
        features = 64 * (height // 8) * (width // 8)
        self.image_shape = (image_channels, height, width)

        self.conv1 = nn.Conv2d(image_channels, 16, kernel_size=3, padding="same")
        self.norm1 = nn.BatchNorm2d(16) if batch_norm else nn.Identity()
        self.pool1 = nn.MaxPool2d(kernel_size=2)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3, padding="same")
        self.norm2 = nn.BatchNorm2d(32) if batch_norm else nn.Identity()
        self.pool2 = nn.MaxPool2d(kernel_size=2)
        self.act2 = nn.ReLU()
        self.conv3 = nn.Conv2d(32, 64, kernel_size=3, padding="same")
        self.norm3 = nn.BatchNorm2d(64) if batch_norm else nn.Identity()
        self.pool3 = nn.MaxPool2d(kernel_size=2)
        self.act3 = nn.ReLU()
        self.flatten = nn.Flatten()
        self.fcm = nn.Linear(features, latent_size)
        self.fcv = nn.Linear(features, latent_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the posterior's mean and log-variance, each [batch, latent].

        Args:
            x: images in [0, 1], [batch, channels, height, width].

        Raises:
            ValueError: if ``x`` is not a batch of images of the encoder's resolution.
            TypeError: if ``x`` is of another dtype than the weights.
        """
        if x.ndim != 4 or x.shape[1:] != self.image_shape:
            channels, height, width = self.image_shape
            raise ValueError(
                f"the encoder was given a tensor of shape {list(x.shape)}: it needs "
                f"[batch, {channels}, {height}, {width}] (batch, channels, height, width)"
            )
        if x.dtype != self.conv1.weight.dtype:
            raise TypeError(
                f"the encoder was given {x.dtype}: it needs {self.conv1.weight.dtype}, in [0, 1]"
            )
        x = self.act1(self.pool1(self.norm1(self.conv1(x))))
        x = self.act2(self.pool2(self.norm2(self.conv2(x))))
        x = self.act3(self.pool3(self.norm3(self.conv3(x))))
        x = self.flatten(x)
        return self.fcm(x), self.fcv(x)


class SampleLatent(nn.Module):
    """Draw z from the posterior by the reparameterisation trick.

    z = mean + exp(log_var / 2) * epsilon with epsilon from N(0, I): the randomness enters from
    outside, so gradients reach mean and log-variance (Kingma & Welling 2014, section 2.4).

    Args:
        latent_size: the number of latent dimensions.

    Raises:
        ValueError: if ``latent_size`` is below 1.
    """

    def __init__(self, latent_size: int) -> None:
        super().__init__()
        if latent_size < 1:
            raise ValueError(f"latent_size is {latent_size}: at least 1 is needed")
        self.latent_size = latent_size

    def forward(
        self, mean: Tensor, log_var: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return one latent vector for each row, [batch, latent].

        Args:
            mean: the posterior's mean, [batch, latent].
            log_var: the logarithm of its variance, [batch, latent].
            generator: where the noise comes from, on the device of ``mean``; PyTorch's default
                generator if not given.

        Raises:
            ValueError: if the two are not both [batch, latent].
        """
        if mean.ndim != 2 or mean.shape[1] != self.latent_size or mean.shape != log_var.shape:
            raise ValueError(
                f"mean has shape {list(mean.shape)} and log_var {list(log_var.shape)}: both need "
                f"to be [batch, {self.latent_size}]"
            )
        epsilon = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return mean + torch.exp(0.5 * log_var) * epsilon


class Decoder(nn.Module):
    """The likelihood p(x | z): the mean image for each latent vector.

    One linear layer and three transposed convolutions that double the resolution; a sigmoid keeps
    the pixels in [0, 1] (the post, "Layers").

    Args:
        image_resolution: (height, width), positive multiples of 8.
        image_channels: 3 for RGB images.
        latent_size: the number of latent dimensions.
        batch_norm: normalise the first two transposed convolutions' outputs over the batch.

    Raises:
        ValueError: for sizes that the network cannot be built for.
    """

    def __init__(
        self,
        image_resolution: tuple[int, int],
        image_channels: int,
        latent_size: int,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(image_resolution, image_channels, latent_size)
        height, width = image_resolution
        self.latent_size = latent_size
        self.feature_shape = (64, height // 8, width // 8)

        self.fc = nn.Linear(latent_size, 64 * (height // 8) * (width // 8))
        self.deconv1 = nn.ConvTranspose2d(64, 32, kernel_size=2, stride=2)
        self.norm1 = nn.BatchNorm2d(32) if batch_norm else nn.Identity()
        self.act1 = nn.ReLU()
        self.deconv2 = nn.ConvTranspose2d(32, 16, kernel_size=2, stride=2)
        self.norm2 = nn.BatchNorm2d(16) if batch_norm else nn.Identity()
        self.act2 = nn.ReLU()
        self.deconv3 = nn.ConvTranspose2d(16, image_channels, kernel_size=2, stride=2)
        self.act3 = nn.Sigmoid()

    def forward(self, z: Tensor) -> Tensor:
        """Return images in [0, 1], [batch, channels, height, width].

        Args:
            z: latent vectors, [batch, latent].

        Raises:
            ValueError: if ``z`` has another shape.
        """
        if z.ndim != 2 or z.shape[1] != self.latent_size:
            raise ValueError(
                f"the decoder was given a tensor of shape {list(z.shape)}: it needs "
                f"[batch, {self.latent_size}]"
            )
        x = self.fc(z)
        x = x.reshape(-1, *self.feature_shape)
        x = self.act1(self.norm1(self.deconv1(x)))
        x = self.act2(self.norm2(self.deconv2(x)))
        return self.act3(self.deconv3(x))
