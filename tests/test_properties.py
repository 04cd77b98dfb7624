"""Whatever the public pieces are given: the right result, or an error that says what is wrong."""

import contextlib
import io
import math
from tempfile import mkdtemp

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from datasets.preprocessing import COLOUR, augment
from vae.layers import Decoder, Encoder, SampleLatent
from vae.losses import LIKELIHOODS, ELBOLoss
from vae.vae import VAE
from vae_training import Options, main

settings.register_profile("quick", max_examples=40, deadline=None)
settings.load_profile("quick")

sizes = st.integers(-8, 40)
few = st.integers(-1, 4)
dtypes = st.sampled_from(
    [torch.float32, torch.float64, torch.float16, torch.uint8, torch.int64, torch.bool]
)
shapes = st.lists(st.integers(0, 9), max_size=5)


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
    x = torch.rand(batch, channels, height, width)
    reconstruction, mean, log_var = model(x)
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
        with pytest.raises((RuntimeError, ValueError)):
            encoder(x)


@given(shape=shapes)
def test_a_decoder_takes_its_latents_and_nothing_else(shape):
    assume(len(shape) == 2 or 0 not in shape)  # there is nothing to refuse in nothing
    assume(len(shape) == 2 or shape[-1:] != [4] or math.prod(shape[1:-1]) > 1)  # the same values
    decoder = Decoder((8, 16), 3, 4)
    if len(shape) == 2 and shape[1] == 4:
        assert decoder(torch.zeros(shape)).shape == (shape[0], 3, 8, 16)
    else:
        with pytest.raises((RuntimeError, ValueError)):
            decoder(torch.zeros(shape))


@given(mean=shapes, log_var=shapes)
def test_latents_are_sampled_for_pairs_of_their_size_and_nothing_else(mean, log_var):
    sample = SampleLatent(4)
    if len(mean) == 2 and mean[1] == 4 and mean == log_var:
        assert sample(torch.zeros(mean), torch.zeros(log_var)).shape == (mean[0], 4)
    else:
        with pytest.raises((ValueError, TypeError), match=r"need to be|len\(\) of a 0-d tensor"):
            sample(torch.zeros(mean), torch.zeros(log_var))


@given(
    mean=st.floats(-1e6, 1e6), log_var=st.floats(-50, 50), likelihood=st.sampled_from(LIKELIHOODS)
)
def test_log_variances_from_minus_50_to_50_give_finite_losses_and_gradients(
    mean, log_var, likelihood
):
    torch.manual_seed(0)
    model = VAE((8, 8), 3, 3)
    means = torch.full((2, 3), mean, requires_grad=True)
    log_vars = torch.full((2, 3), log_var, requires_grad=True)
    z = SampleLatent(3)(means, log_vars)
    x = torch.rand(2, 3, 8, 8)
    _, kl, reconstruction, total = ELBOLoss(1.0, likelihood)(x, model.decoder(z), means, log_vars)
    total.backward()
    assert kl >= 0
    assert torch.stack((kl, reconstruction, total)).isfinite().all()
    assert means.grad.isfinite().all()
    assert log_vars.grad.isfinite().all()


@given(
    original=st.floats(0, 1),
    reconstruction=st.floats(0, 1),
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
    assume(shapes[0] != shapes[1] or shapes[2] != shapes[3])
    with pytest.raises(ValueError, match="need"):
        ELBOLoss(1.0)(*[torch.zeros(shape) for shape in shapes])


@given(
    batch=st.integers(1, 4),
    channels=st.integers(1, 4),
    height=st.integers(2, 12),
    width=st.integers(2, 12),
    level=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_augmentation_keeps_shape_type_and_range(
    batch, channels, height, width, level, dtype, seed
):
    torch.manual_seed(seed)
    images = torch.rand(batch, channels, height, width, dtype=dtype) * level
    before = images.clone()
    augmented = augment(images)
    assert (augmented.shape, augmented.dtype) == (images.shape, dtype)
    assert ((augmented >= 0) & (augmented <= min(1, (1 + COLOUR) * level + 1e-6))).all()
    assert torch.equal(images, before)


FLAGS = [f"--{name.replace('_', '-')}" for name in Options.__dataclass_fields__]
FLAGS += ["--run-name", "--resume", "--no-augment", "--preset", "--help", "--nonsense"]
words = st.sampled_from(
    [name for name in FLAGS if name not in ("--data-root", "--dataset")]
    + ["0", "1", "2", "8", "16", "-1", "0.5", "1e-3", "nan", "inf", "1e400", "best", "post", "cpu"]
    + ["linear", "cyclical", "sigma", "bernoulli", "cosine", "", "..", "a/b", "é", "x" * 300]
)
possible = st.sampled_from(
    [
        *("--epochs=2", "--latent-size=3", "--batch-size=5", "--beta=0.5", "--likelihood=sigma"),
        *("--likelihood=bernoulli", "--learning-rate=1e30", "--lr-schedule=cosine", "--cycles=2"),
        *("--beta-schedule=cyclical", "--beta-schedule=linear", "--warmup-epochs=1", "--augment"),
        *("--crop", "--batch-norm", "--seed=9", "--run-name=é", "--checkpoint-every=1"),
    ]
)
lines = st.lists(possible, max_size=4) | st.lists(possible | words, max_size=6)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(line=lines)
def test_any_command_line_is_help_a_run_or_an_error_without_traceback(line, tmp_path):
    errors = io.StringIO()
    # One epoch of tiny pictures first: whatever the line says later counts.
    start = ["--log-dir", mkdtemp(dir=tmp_path), "--dataset=small", "--device=cpu"]
    start += ["--epochs=1", "--image-size=8"]
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            main(start + line)
            status = 0
        except SystemExit as stopped:
            status = stopped.code
    # 1: a loss or a weight was not finite any more, or the system refused a name.
    assert status in (0, 1, 2)
    if status:
        *_, last = [text for text in errors.getvalue().splitlines() if text.strip()]
        assert last.startswith("error: ") or "For full helptext" in last
