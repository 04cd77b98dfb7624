"""Whatever the public pieces are given: the right result, or an error that says what is wrong."""

import contextlib
import io
from dataclasses import fields

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vae_training
from datasets.pictures import Pictures, Splits, augment
from vae.layers import Decoder, Encoder, SampleLatent
from vae.losses import LIKELIHOODS, ELBOLoss
from vae.vae import VAE
from vae_training import Options, flag, main

settings.register_profile("quick", max_examples=40, deadline=None)
settings.load_profile("quick")

sizes = st.integers(-8, 40)
few = st.integers(-1, 4)
dtypes = st.sampled_from(
    [torch.float32, torch.float64, torch.float16, torch.uint8, torch.int64, torch.bool]
)
shapes = st.lists(st.integers(0, 9), max_size=5)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@given(height=sizes, width=sizes, latent=few, channels=few, batch=st.integers(0, 3))
def test_a_vae_of_any_size_works_or_says_what_is_wrong(height, width, latent, channels, batch):
    possible = (
        min(height, width) >= 8 and height % 8 == width % 8 == 0 and latent >= 1 and channels >= 1
    )
    if not possible:
        with pytest.raises(ValueError, match=r"needed|need to be"):
            VAE((height, width), latent, channels)
        return
    model = VAE((height, width), latent, channels)
    x = torch.rand(batch, channels, height, width, generator=seeded())
    reconstruction, mean, log_var = model(x, seeded())
    assert reconstruction.shape == x.shape
    assert mean.shape == log_var.shape == (batch, latent)
    assert reconstruction.isfinite().all()
    assert ((reconstruction >= 0) & (reconstruction <= 1)).all()


@given(shape=shapes, dtype=dtypes)
def test_an_encoder_takes_its_images_and_nothing_else(shape, dtype):
    encoder = Encoder((8, 8), 3, 2)
    x = torch.zeros(shape).to(dtype)
    if len(shape) == 4 and shape[1:] == [3, 8, 8] and dtype == torch.float32:
        assert encoder(x)[0].shape == (shape[0], 2)
    else:
        with pytest.raises((ValueError, TypeError), match="the encoder was given"):
            encoder(x)


@given(shape=shapes)
def test_a_decoder_takes_its_latents_and_nothing_else(shape):
    decoder = Decoder((8, 16), 3, 4)
    if len(shape) == 2 and shape[1] == 4:
        assert decoder(torch.zeros(shape)).shape == (shape[0], 3, 8, 16)
    else:
        with pytest.raises(ValueError, match="the decoder was given"):
            decoder(torch.zeros(shape))


@given(
    mean=st.floats(-1e6, 1e6), log_var=st.floats(-50, 50), likelihood=st.sampled_from(LIKELIHOODS)
)
def test_log_variances_from_minus_50_to_50_give_finite_losses_and_gradients(
    mean, log_var, likelihood
):
    model = VAE((8, 8), 3, 3)
    means = torch.full((2, 3), mean, requires_grad=True)
    log_vars = torch.full((2, 3), log_var, requires_grad=True)
    z = SampleLatent(3)(means, log_vars, seeded())
    x = torch.rand(2, 3, 8, 8, generator=seeded())
    _, kl, reconstruction, total = ELBOLoss(1.0, likelihood)(x, model.decode(z), means, log_vars)
    total.backward()
    assert kl >= 0
    assert torch.stack((kl, reconstruction, total)).isfinite().all()
    assert means.grad.isfinite().all()
    assert log_vars.grad.isfinite().all()


@given(
    original=st.floats(0, 1),
    reconstruction=st.floats(-2, 2),
    likelihood=st.sampled_from(LIKELIHOODS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_a_loss_of_finite_images_is_finite(original, reconstruction, likelihood, dtype):
    x = torch.full((2, 3, 8, 8), original, dtype=dtype)
    y = torch.full((2, 3, 8, 8), reconstruction, dtype=dtype)
    latent = torch.zeros(2, 1)
    assert ELBOLoss(1.0, likelihood)(x, y, latent, latent)[3].isfinite()


@given(shapes=st.lists(shapes, min_size=4, max_size=4))
def test_a_loss_of_other_shapes_is_refused(shapes):
    with pytest.raises(ValueError, match="need"):
        ELBOLoss(1.0)(*[torch.zeros(shape) for shape in shapes])


@given(shape=shapes, dtype=dtypes, labels=shapes)
def test_pictures_are_uint8_images_with_a_label_each_or_refused(shape, dtype, labels):
    pixels, targets = torch.zeros(shape).to(dtype), torch.zeros(labels, dtype=torch.long)
    if len(shape) == 4 and dtype == torch.uint8 and labels == shape[:1]:
        assert len(Pictures(pixels, targets)) == shape[0]
    else:
        with pytest.raises(ValueError, match="are needed"):
            Pictures(pixels, targets)


@given(batch=st.integers(0, 5), height=st.integers(1, 9), shift=st.integers(0, 12))
def test_augmentation_only_moves_values_within_their_image(batch, height, shift):
    images = torch.arange(batch).float()[:, None, None, None].expand(batch, 3, height, 7)
    assert torch.equal(augment(images, shift, seeded()), images)


words = st.sampled_from(
    [
        flag(each.name)
        for each in fields(Options)
        if each.name not in ("log_dir", "data_root", "dataset")
    ]
    + ["--no-augment", "--preset", "--overwrite", "--resume", "--help", "--nonsense"]
    + ["0", "1", "2", "8", "16", "-1", "0.5", "1e-3", "nan", "inf", "1e400", "best", "post", "cpu"]
    + ["linear", "cyclical", "sigma", "bernoulli", "cosine", "", "..", "a/b", "é", "x" * 300, "\0"]
)


@pytest.fixture
def splits() -> Splits:
    pixels = torch.randint(256, (12, 8, 8, 3), dtype=torch.uint8, generator=seeded())
    pictures = Pictures(pixels, torch.zeros(12, dtype=torch.long))
    return Splits(pictures, pictures, pictures, "synthetic", None)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(line=st.lists(words, max_size=6))
def test_any_command_line_is_help_a_run_or_one_line(line, splits, tmp_path, monkeypatch):
    # Only loading is replaced, by twelve pictures of the size asked for.
    monkeypatch.setattr(vae_training, "load_splits", lambda *_: splits)
    errors = io.StringIO()
    # One epoch of tiny pictures first: whatever the line says later counts.
    start = ["--log-dir", str(tmp_path), "--epochs", "1", "--image-size", "8"]
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main(start + line)
        except SystemExit as stopped:
            status = stopped.code
    assert status in (0, 2)
    if status == 2:
        assert errors.getvalue().count("\n") == 1
