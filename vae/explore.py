"""The page of sliders: a model, written so that a browser can compute it (``explore.html``)."""

import json
import math
import sys
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.nn.utils.fusion import fuse_conv_bn_eval

from datasets.errors import UserError
from vae.latent import main_directions, variation_per_dimension
from vae.vae import VAE

TEMPLATE = Path(__file__).with_name("explore.html")
SLIDERS = 10  # at most
ONE_EACH = (
    "Each slider is one latent dimension. The percentage is the dimension's share of the variation "
    "among the decoder's pictures; where dimensions act together, their shares overlap."
)
LEADING = (
    "The sliders are the ten directions in the latent space along which the decoder's pictures "
    "change most, in standard deviations of the training pictures; the percentage is the share of "
    "all change. What no slider moves stays as it is; Random {{noun}} draws all of it."
)


class Layer(NamedTuple):
    """A linear layer, or a convolution with its batch norm folded into it."""

    weight: Tensor  # [outputs, inputs] or [outputs, inputs, height, width]
    bias: Tensor | None  # [outputs]


def page_of_sliders(
    model: VAE,
    latents: MultivariateNormal,
    picture: Tensor | None = None,
    crop: bool = False,
    noun: str = "picture",
) -> str:
    """Return a web page that draws with a model while its reader moves sliders.

    It opens with ``picture``, [1, channels, height, width] in [0, 1], and its reconstruction, or
    else with a draw from ``latents``. Where ``encoder_layers`` finds any, photographs can be chosen
    on it, and ``crop`` says whether they are cut or squeezed into the model's shape. ``noun`` is
    what the model draws. ``UserError`` for a decoder that the page cannot draw with.
    """
    decoder = decoder_layers(model, latents)
    start = latents.sample((1,)) if picture is None else model.encoder(picture)[0]
    if model.latent_size <= SLIDERS:
        sliders, explanation = sliders_of_dimensions(model, latents), ONE_EACH
    else:
        sliders, explanation = sliders_of_directions(model, latents), LEADING
    encoder = encoder_layers(model)
    if encoder is None:
        reason = "this encoder does more than the page can"
        print(f"warning: {reason}: no photograph can be chosen on it", file=sys.stderr)
    exported = {
        "shape": [model.image_channels, *model.image_resolution],
        "crop": crop,
        "start": start[0].tolist(),
        "original": None if picture is None else as_base64(picture.mul(255).round(), np.uint8),
        "sliders": sliders,
        "centre": latents.mean.tolist(),
        "scale": latents.scale_tril.tolist(),
        "decoder": [as_integers(layer) for layer in decoder],
        "encoder": None if encoder is None else [as_integers(layer) for layer in encoder],
    }
    page = TEMPLATE.read_text(encoding="utf-8")
    page = page.replace("{{sliders}}", explanation).replace("{{noun}}", noun)
    for element in ("script", "style"):
        page = page.replace(f"{{{{hash of {element}}}}}", hash_of_content(page, element))
    return page.replace("{{model}}", json.dumps(exported))


# The layers that the page computes.


def decoder_layers(model: VAE, latents: MultivariateNormal) -> list[Layer]:
    """Return the decoder as the page computes it.

    That is one linear layer, and three transposed convolutions with kernels of 2x2; batch norms are
    folded into them. ``UserError`` where the page would draw something else than the decoder.
    """
    can = "one linear layer and three transposed convolutions, with batch norms and ReLUs between"
    refusal = UserError(f"this decoder does more than the page can: explore draws {can} them")
    decoder: Any = model.decoder
    z = latents.mean + latents.stddev.diag()
    try:
        layers = [
            folded(decoder.fc),
            folded(decoder.deconv1, decoder.norm1),
            folded(decoder.deconv2, decoder.norm2),
            folded(decoder.deconv3),
        ]
        kernels = [tuple(layer.weight.shape[2:]) for layer in layers]
        if kernels != [(), (2, 2), (2, 2), (2, 2)]:
            raise refusal
        x = F.linear(z, *layers[0]).unflatten(1, decoder.feature_shape)
        for layer in layers[1:3]:
            x = F.conv_transpose2d(x, layer.weight, layer.bias, stride=2).relu()
        x = F.conv_transpose2d(x, layers[3].weight, layers[3].bias, stride=2).sigmoid()
    except (AttributeError, RuntimeError, TypeError) as error:  # layers of other names or kinds
        raise refusal from error
    images = decoder(z)
    if x.shape != images.shape or not torch.allclose(x, images, atol=1e-3):
        raise refusal
    return [layers[0], *(Layer(weight.transpose(0, 1), bias) for weight, bias in layers[1:])]


def encoder_layers(model: VAE) -> list[Layer] | None:
    """Return the encoder's way to the mean as the page computes it, or None where it cannot.

    That is three convolutions with kernels of 3x3, each with ReLU and pooling after it, and one
    linear layer; batch norms are folded into them.
    """
    if model.image_channels not in (1, 3):
        return None
    encoder: Any = model.encoder
    device = next(model.parameters()).device
    images = torch.rand(8, model.image_channels, *model.image_resolution, device=device)
    try:
        layers = [
            folded(encoder.conv1, encoder.norm1),
            folded(encoder.conv2, encoder.norm2),
            folded(encoder.conv3, encoder.norm3),
            folded(encoder.fcm),
        ]
        x = images
        for layer in layers[:3]:
            x = F.max_pool2d(F.conv2d(x, layer.weight, layer.bias, padding=1).relu(), 2)
        x = F.linear(x.flatten(1), *layers[3])
    except (AttributeError, RuntimeError, TypeError):  # layers of other names or kinds
        return None
    mean, _ = encoder(images)
    same = x.shape == mean.shape and torch.allclose(x, mean, rtol=1e-3, atol=1e-3)
    return layers if same else None


def folded(layer: Any, norm: Any = None) -> Layer:
    """Return a layer that does what it and the batch norm after it do together."""
    if isinstance(norm, nn.BatchNorm2d):
        layer = fuse_conv_bn_eval(layer, norm, transpose=isinstance(layer, nn.ConvTranspose2d))
    return Layer(layer.weight, layer.bias)


# The sliders.


def sliders_of_dimensions(model: VAE, latents: MultivariateNormal) -> list[dict[str, Any]]:
    """Return a slider for each latent dimension, the one that changes pictures most first.

    Each has its name, its share of the variation, how far it goes, the ``direction`` in which it
    moves z, and how its place follows from z: ``reading`` @ (z - ``origin``).
    """
    # With a small beta the latents reach farther than the prior's -4 to 4.
    reach = latents.mean.abs() + 4 * latents.stddev
    shares, order = variation_per_dimension(model, latents).sort(descending=True)
    units = torch.eye(model.latent_size)
    return [
        {
            "name": f"z{i}",
            "share": share,
            "reach": max(4, math.ceil(reach[i].item())),
            "direction": units[i].tolist(),
            "reading": units[i].tolist(),
            "origin": [0.0] * model.latent_size,
        }
        for share, i in zip(shares.tolist(), order.tolist(), strict=True)
    ]


def sliders_of_directions(model: VAE, latents: MultivariateNormal) -> list[dict[str, Any]]:
    """Return sliders along the directions in which pictures vary most, in standard deviations."""
    directions, shares = main_directions(model, latents, SLIDERS)
    moves = directions @ latents.scale_tril.T
    readings = torch.linalg.solve_triangular(
        latents.scale_tril, directions, upper=False, left=False
    )
    return [
        {
            "name": f"d{i + 1}",
            "share": shares[i].item(),
            "reach": 4,
            "direction": moves[i].tolist(),
            "reading": readings[i].tolist(),
            "origin": latents.mean.tolist(),
        }
        for i in range(len(directions))
    ]


# What stands in the page.


def as_integers(layer: Layer) -> dict[str, str]:
    """Return a layer as text: weights as 16-bit integers, with the size of a step for each output.

    That is half the size of float32. Of the models that come with the repository, and of one of
    64x64 pixels, no value of a picture changed by more than 0.1/255.
    """
    rows = layer.weight.flatten(1)
    steps = rows.abs().amax(dim=1).clamp(min=1e-30) / 32767
    bias = torch.zeros(len(rows)) if layer.bias is None else layer.bias
    return {
        "weight": as_base64((rows / steps[:, None]).round(), np.int16),
        "step": as_base64(steps, np.float32),
        "bias": as_base64(bias, np.float32),
    }


def as_base64(x: Tensor, kind: Any) -> str:
    """Return a tensor's values in order, each of a NumPy ``kind``, as text."""
    return b64encode(x.cpu().numpy().astype(kind).tobytes()).decode()


def hash_of_content(page: str, element: str) -> str:
    """Return the hash by which a Content-Security-Policy lets a page's own script or style run."""
    content = page.split(f"<{element}>")[1].split(f"</{element}>")[0]
    return f"sha256-{b64encode(sha256(content.encode()).digest()).decode()}"
