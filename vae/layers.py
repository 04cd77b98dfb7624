"""The three blocks of the variational autoencoder: encoder, latent sampler and decoder."""

import torch
from torch import Tensor, nn

HxW = tuple[int, int]  # height and width of an image


class SampleLatent(nn.Module):
    """Draw z from the posterior by the reparameterisation trick.

    z = mean + exp(log_var / 2) * epsilon with epsilon from N(0, I): the randomness enters from
    outside, so gradients reach mean and log-variance (Kingma & Welling 2014, section 2.4).
    """

    def __init__(self, latent_size: int) -> None:
        super().__init__()
        self.latent_size = latent_size

    def forward(self, mean: Tensor, log_var: Tensor) -> Tensor:
        """Return one latent vector for each row of ``mean`` and ``log_var``, [batch, latent] all.

        ``ValueError`` for other shapes, which PyTorch might broadcast silently.
        """
        if mean.shape != log_var.shape or mean.shape != (len(mean), self.latent_size):
            given = f"mean has shape {list(mean.shape)} and log_var {list(log_var.shape)}"
            raise ValueError(f"{given}: both need to be [batch, {self.latent_size}]")
        epsilon = torch.randn_like(mean)
        return torch.exp(0.5 * log_var) * epsilon + mean


class Encoder(nn.Module):
    """The approximate posterior q(z | x): a diagonal Gaussian for each image.

    Three blocks of convolution, ReLU and pooling halve the resolution three times; two linear
    layers read the mean and the log-variance off the result (the post, "Layers").

    ``image_resolution`` is (height, width), ``ValueError`` if that cannot be halved three times.
    ``batch_norm`` normalises each convolution's output over the batch, before its ReLU (Ioffe &
    Szegedy 2015).
    """

    def __init__(
        self, image_resolution: HxW, image_channels: int, latent_size: int, batch_norm: bool = False
    ) -> None:
        super().__init__()
        channels, h, w = feature_shape(image_resolution)
        self.conv1 = nn.Conv2d(image_channels, 16, kernel_size=3, padding="same")
        self.norm1 = nn.BatchNorm2d(16) if batch_norm else nn.Identity()
        self.act1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(kernel_size=2)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3, padding="same")
        self.norm2 = nn.BatchNorm2d(32) if batch_norm else nn.Identity()
        self.act2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(kernel_size=2)
        self.conv3 = nn.Conv2d(32, channels, kernel_size=3, padding="same")
        self.norm3 = nn.BatchNorm2d(channels) if batch_norm else nn.Identity()
        self.act3 = nn.ReLU()
        self.pool3 = nn.MaxPool2d(kernel_size=2)
        self.flatten = nn.Flatten()
        self.fcm = nn.Linear(channels * h * w, latent_size)
        self.fcv = nn.Linear(channels * h * w, latent_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the posterior's mean and log-variance, each [batch, latent].

        ``x`` are images in [0, 1], [batch, channels, height, width].
        """
        x = self.pool1(self.act1(self.norm1(self.conv1(x))))  # [batch, 16, height/2, width/2]
        x = self.pool2(self.act2(self.norm2(self.conv2(x))))  # [batch, 32, height/4, width/4]
        x = self.pool3(self.act3(self.norm3(self.conv3(x))))  # [batch, 64, height/8, width/8]
        x = self.flatten(x)  # [batch, 64 * height/8 * width/8]
        return self.fcm(x), self.fcv(x)


class Decoder(nn.Module):
    """The likelihood p(x | z): the mean image for each latent vector.

    One linear layer and three transposed convolutions that double the resolution; a sigmoid keeps
    the pixels in [0, 1] (the post, "Layers"). It takes and refuses what the encoder does.
    """

    def __init__(
        self, image_resolution: HxW, image_channels: int, latent_size: int, batch_norm: bool = False
    ) -> None:
        super().__init__()
        channels, h, w = self.feature_shape = feature_shape(image_resolution)
        self.fc = nn.Linear(latent_size, channels * h * w)
        self.deconv1 = nn.ConvTranspose2d(channels, 32, kernel_size=2, stride=2)
        self.norm1 = nn.BatchNorm2d(32) if batch_norm else nn.Identity()
        self.act1 = nn.ReLU()
        self.deconv2 = nn.ConvTranspose2d(32, 16, kernel_size=2, stride=2)
        self.norm2 = nn.BatchNorm2d(16) if batch_norm else nn.Identity()
        self.act2 = nn.ReLU()
        self.deconv3 = nn.ConvTranspose2d(16, image_channels, kernel_size=2, stride=2)
        self.act3 = nn.Sigmoid()

    def forward(self, z: Tensor) -> Tensor:
        """Return images in [0, 1], [batch, channels, height, width], of ``z``, [batch, latent]."""
        x = self.fc(z)  # [batch, 64 * height/8 * width/8]
        x = x.reshape(len(z), *self.feature_shape)  # [batch, 64, height/8, width/8]
        x = self.act1(self.norm1(self.deconv1(x)))  # [batch, 32, height/4, width/4]
        x = self.act2(self.norm2(self.deconv2(x)))  # [batch, 16, height/2, width/2]
        return self.act3(self.deconv3(x))


def feature_shape(image_resolution: HxW) -> tuple[int, int, int]:
    """Return [channels, height, width] of the features between the blocks and the linear layers.

    ``ValueError`` for a resolution that cannot be halved three times and doubled back.
    """
    height, width = image_resolution
    if height < 8 or width < 8 or height % 8 or width % 8:
        given = f"image resolution is {height}x{width} (height x width)"
        raise ValueError(f"{given}: both need to be positive multiples of 8, to be halved 3 times")
    return 64, height // 8, width // 8
