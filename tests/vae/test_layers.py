from functools import partial

import pytest
import torch
from helpers import seeded
from torch import Tensor, nn
from torch.nn import functional

from vae.layers import Decoder, Encoder, SampleLatent

BAD_RESOLUTIONS = [(0, 32), (32, -8), (36, 32), (32, 7)]


# Encoder and decoder.


@pytest.mark.parametrize("block", [Encoder, Decoder])
@pytest.mark.parametrize(("height", "width"), BAD_RESOLUTIONS)
def test_a_resolution_that_cannot_be_halved_three_times_is_refused(block, height, width):
    message = f"image resolution is {height}x{width} .*positive multiples of 8"
    with pytest.raises(ValueError, match=message):
        block((height, width), 3, 10)


# The order of the layers.


def randomise_norms(block: nn.Module) -> None:
    """Give every batch norm weights, some of them negative, that show an error of order."""
    generator = torch.Generator().manual_seed(0)
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for values in (norm.weight.data, norm.bias.data, norm.running_mean):
                values.normal_(generator=generator)
            norm.running_var.uniform_(0.5, 2, generator=generator)


def pooled_before_the_activation(encoder: Encoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the encoder's layers give if each block pools first."""
    for conv, norm in (
        (encoder.conv1, encoder.norm1),
        (encoder.conv2, encoder.norm2),
        (encoder.conv3, encoder.norm3),
    ):
        x = functional.relu(functional.max_pool2d(norm(conv(x)), 2))
    x = x.flatten(1)
    return encoder.fcm(x), encoder.fcv(x)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_encoder_gives_to_the_bit_what_pooling_before_relu_gives(batch_norm):
    encoder = Encoder((16, 24), 3, 4, batch_norm)
    randomise_norms(encoder)
    x = torch.rand(5, 3, 16, 24)
    results = []
    for encode in (encoder, partial(pooled_before_the_activation, encoder)):
        encoder.zero_grad()
        mean, log_var = encode(x)
        (mean.square().sum() + log_var.exp().sum()).backward()
        results.append([mean, log_var, *(weight.grad for weight in encoder.parameters())])
    for value, expected in zip(*results, strict=True):
        assert torch.equal(value, expected)


def test_the_encoder_has_the_posts_order_convolution_batch_norm_activation_pooling():
    # ReLU and largest values can change places; GELU and averages cannot.
    encoder = Encoder((16, 16), 3, 4, batch_norm=True).eval()
    randomise_norms(encoder)
    for name, layer in list(encoder.named_children()):
        if isinstance(layer, nn.ReLU):
            setattr(encoder, name, nn.GELU())
        if isinstance(layer, nn.MaxPool2d):
            setattr(encoder, name, nn.AvgPool2d(2))
    images = torch.rand(3, 3, 16, 16)
    x = images
    for conv, norm in (
        (encoder.conv1, encoder.norm1),
        (encoder.conv2, encoder.norm2),
        (encoder.conv3, encoder.norm3),
    ):
        x = functional.avg_pool2d(functional.gelu(norm(conv(x))), 2)
    torch.testing.assert_close(encoder(images)[0], encoder.fcm(x.flatten(1)))


def test_the_decoder_normalises_between_deconvolution_and_activation_but_not_its_last_layer():
    decoder = Decoder((16, 16), 3, 4, batch_norm=True).eval()
    randomise_norms(decoder)
    z = torch.randn(3, 4)
    x = decoder.fc(z).reshape(3, 64, 2, 2)
    x = functional.relu(decoder.norm1(decoder.deconv1(x)))
    x = functional.relu(decoder.norm2(decoder.deconv2(x)))
    torch.testing.assert_close(decoder(z), decoder.deconv3(x).sigmoid())


@pytest.mark.parametrize(("block", "inputs"), [(Encoder, (2, 3, 16, 16)), (Decoder, (2, 4))])
def test_what_a_hook_on_a_convolution_has_seen_stays_as_it_was(block, inputs):
    block = block((16, 16), 3, 4)
    seen = []
    for layer in block.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            layer.register_forward_hook(lambda _, __, output: seen.append((output, output.clone())))
    block(torch.rand(inputs))
    first, second, third = seen
    assert all(torch.equal(output, copy) for output, copy in (first, second, third))
    assert all((output < 0).any() for output, _ in (first, second))


# SampleLatent.


def test_samples_have_the_posteriors_mean_and_variance():
    n = 200_000
    mean = torch.tensor([0.0, -3.0, 5.0])
    log_var = torch.tensor([0.0, 2.0, -4.0])
    with seeded(0):
        z = SampleLatent(3)(mean.expand(n, 3), log_var.expand(n, 3))
    variance = log_var.exp()
    # Five standard errors.
    assert ((z.mean(dim=0) - mean).abs() < 5 * (variance / n).sqrt()).all()
    assert ((z.var(dim=0) / variance - 1).abs() < 5 * (2 / n) ** 0.5).all()


def test_gradients_reach_mean_and_log_variance_through_the_sample():
    mean = torch.randn(4, 3, requires_grad=True)
    log_var = torch.randn(4, 3, requires_grad=True)
    with seeded(1):
        SampleLatent(3)(mean, log_var).sum().backward()
    with seeded(1):
        epsilon = torch.randn(4, 3)
    torch.testing.assert_close(mean.grad, torch.ones(4, 3))
    torch.testing.assert_close(log_var.grad, 0.5 * epsilon * torch.exp(0.5 * log_var.detach()))


def test_the_noise_is_drawn_in_the_inputs_precision():
    zeros = torch.zeros(100, 3, dtype=torch.float64)
    z = SampleLatent(3)(zeros, zeros)
    assert z.dtype == torch.float64
    assert (z.float().double() != z).all()


def test_the_noise_is_drawn_on_the_inputs_device():
    # Tensors on "meta" have a shape and no values; they mix with no other device.
    zeros = torch.zeros(5, 3, device="meta")
    assert SampleLatent(3)(zeros, zeros).device.type == "meta"


@pytest.mark.parametrize(
    ("mean", "log_var"), [((5, 2), (5, 2)), ((5, 3), (4, 3)), ((5, 3), (3,)), ((3,), (3,))]
)
def test_other_shapes_than_batch_by_latent_are_refused(mean, log_var):
    with pytest.raises(ValueError) as error:
        SampleLatent(3)(torch.zeros(mean), torch.zeros(log_var))
    assert f"mean has shape {list(mean)} and log_var {list(log_var)}" in str(error.value)
    assert "[batch, 3]" in str(error.value)
