import math

import pytest
import torch
from helpers import seeded, through_mean
from torch import Tensor, nn
from torch.nn import functional

from vae.latent import fit_latents, prior
from vae.losses import ELBOLoss
from vae.vae import VAE

POST_PARAMETERS = {
    "encoder.conv1.weight": (16, 3, 3, 3),
    "encoder.conv1.bias": (16,),
    "encoder.conv2.weight": (32, 16, 3, 3),
    "encoder.conv2.bias": (32,),
    "encoder.conv3.weight": (64, 32, 3, 3),
    "encoder.conv3.bias": (64,),
    "encoder.fcm.weight": (10, 1024),
    "encoder.fcm.bias": (10,),
    "encoder.fcv.weight": (10, 1024),
    "encoder.fcv.bias": (10,),
    "decoder.fc.weight": (1024, 10),
    "decoder.fc.bias": (1024,),
    "decoder.deconv1.weight": (64, 32, 2, 2),
    "decoder.deconv1.bias": (32,),
    "decoder.deconv2.weight": (32, 16, 2, 2),
    "decoder.deconv2.bias": (16,),
    "decoder.deconv3.weight": (16, 3, 2, 2),
    "decoder.deconv3.bias": (3,),
}


def post_model() -> VAE:
    return VAE(image_resolution=(32, 32), image_channels=3, latent_size=10)


def post_state() -> dict[str, Tensor]:
    """Weights as they are in the middle of a training, under the listing's names."""
    with seeded(3):
        return {
            name: torch.randn(shape) / math.sqrt(max(1, math.prod(shape[1:])))
            for name, shape in POST_PARAMETERS.items()
        }


def post_forward(w: dict[str, Tensor], x: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The post's network written without modules, its ReLU before the pooling."""
    for name in ("encoder.conv1", "encoder.conv2", "encoder.conv3"):
        x = functional.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=1)
        x = functional.max_pool2d(functional.relu(x), 2)
    x = x.flatten(1)
    mean = functional.linear(x, w["encoder.fcm.weight"], w["encoder.fcm.bias"])
    log_var = functional.linear(x, w["encoder.fcv.weight"], w["encoder.fcv.bias"])
    x = mean + epsilon * (log_var / 2).exp()
    x = functional.linear(x, w["decoder.fc.weight"], w["decoder.fc.bias"]).view(-1, 64, 4, 4)
    for name, activation in (
        ("decoder.deconv1", functional.relu),
        ("decoder.deconv2", functional.relu),
        ("decoder.deconv3", torch.sigmoid),
    ):
        weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
        x = activation(functional.conv_transpose2d(x, weight, bias, stride=2))
    return x, mean, log_var


def post_losses(
    x: Tensor, reconstruction: Tensor, mean: Tensor, log_var: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The post's KL, reconstruction and total loss at beta 0.1."""
    kl = -0.5 * (1 + log_var - mean**2 - log_var.exp()).sum(dim=-1).mean()
    squared_error = ((x - reconstruction) ** 2).sum(dim=(1, 2, 3)).mean()
    return kl, squared_error, 0.1 * kl + squared_error


# The post's network.


def test_parameters_have_the_posts_names_shapes_and_order():
    state = {name: tuple(value.shape) for name, value in post_model().state_dict().items()}
    assert list(state.items()) == list(POST_PARAMETERS.items())


def test_a_seed_draws_the_weights_that_it_draws_in_the_posts_order():
    with seeded(7):
        model = post_model()
    with seeded(7):
        layers = [
            *(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.Conv2d(32, 64, 3)),
            *(nn.Linear(1024, 10), nn.Linear(1024, 10), nn.Linear(10, 1024)),
            nn.ConvTranspose2d(64, 32, 2),
            nn.ConvTranspose2d(32, 16, 2),
            nn.ConvTranspose2d(16, 3, 2),
        ]
    expected = [parameter for layer in layers for parameter in layer.parameters()]
    assert all(map(torch.equal, model.parameters(), expected))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_posts_weights_give_the_posts_outputs_losses_and_gradients(memory_format):
    model = post_model()
    model.load_state_dict(post_state())
    model = model.to(memory_format=memory_format)
    x = torch.rand(8, 3, 32, 32)
    with seeded(1):
        outputs = model(x)
    beta, *losses = ELBOLoss(0.1)(x, *outputs)
    losses[-1].backward()

    state = {name: value.requires_grad_() for name, value in post_state().items()}
    with seeded(1):
        epsilon = torch.randn(8, 10)
    expected_outputs = post_forward(state, x, epsilon)
    expected_losses = post_losses(x, *expected_outputs)
    expected_losses[-1].backward()
    assert beta == 0.1
    for value, expected in zip(
        (*outputs, *losses), (*expected_outputs, *expected_losses), strict=True
    ):
        torch.testing.assert_close(value, expected)
    for name, parameter in model.named_parameters():
        gradient = state[name].grad
        rounding = 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=rounding)


# The model in use.


def test_sample_decodes_draws_from_the_prior():
    model = VAE((8, 16), 4, 3)
    with seeded(1):
        samples = model.sample(5)
    with seeded(1):
        z = torch.randn(5, 4)
    assert samples.shape == (5, 3, 8, 16)
    assert torch.equal(samples, model.decoder(z))


def test_samples_are_drawn_on_the_models_device_in_its_precision():
    model = VAE((8, 16), 4, 3).to("meta", torch.float64)
    assert (model.sample(2).device.type, model.sample(2).dtype) == ("meta", torch.float64)


class OwnEncoder(nn.Module):
    """A reader's own encoder: none of its layers has a name of the post's."""

    def __init__(self) -> None:
        super().__init__()
        self.to_mean, self.to_log_var = nn.Linear(3 * 8 * 16, 4), nn.Linear(3 * 8 * 16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flatten(1)
        return self.to_mean(x), self.to_log_var(x)


def test_latents_prior_and_samples_do_not_ask_for_the_names_of_layers():
    model, x = VAE((8, 16), 4, 3), torch.rand(9, 3, 8, 16)
    model.encoder = OwnEncoder()
    latents = fit_latents(model, x.split(4))
    mean, _ = model.encoder(x)
    torch.testing.assert_close(latents.mean, mean.mean(dim=0))
    assert torch.equal(prior(model).covariance_matrix, torch.eye(4))
    assert model.sample(2).shape == (2, 3, 8, 16)


# Batch normalisation.


def test_batch_norm_adds_its_own_parameters_to_the_posts_and_changes_none():
    state = VAE((32, 32), 10, 3, batch_norm=True).state_dict()
    added = {name: tuple(value.shape) for name, value in state.items() if ".norm" in name}
    without = {name: tuple(value.shape) for name, value in state.items() if name not in added}
    assert without == POST_PARAMETERS
    scales = {name: shape for name, shape in added.items() if name.endswith(".weight")}
    assert scales == {
        "encoder.norm1.weight": (16,),
        "encoder.norm2.weight": (32,),
        "encoder.norm3.weight": (64,),
        "decoder.norm1.weight": (32,),
        "decoder.norm2.weight": (16,),
    }


def test_with_batch_norm_an_images_reconstruction_depends_on_its_batch_in_training_only():
    model = VAE((16, 16), 4, 3, batch_norm=True)
    x = torch.rand(6, 3, 16, 16)
    assert not torch.allclose(through_mean(model, x)[:2], through_mean(model, x[:2]))
    model.eval()
    torch.testing.assert_close(through_mean(model, x)[:2], through_mean(model, x[:2]))
