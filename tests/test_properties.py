"""Whatever the public pieces are given: the right result, or an error that says what is wrong."""

import contextlib
import io
from tempfile import mkdtemp

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vae.layers import SampleLatent
from vae.losses import LIKELIHOODS, ELBOLoss
from vae.vae import VAE
from vae_training import Options, main

settings.register_profile("quick", max_examples=40, deadline=None)
settings.load_profile("quick")

sizes = st.integers(-8, 40)
few = st.integers(1, 4)


@given(height=sizes, width=sizes, latent=few, channels=few, batch=st.integers(0, 3))
def test_a_vae_of_any_size_works_or_says_what_is_wrong(height, width, latent, channels, batch):
    if min(height, width) < 8 or height % 8 or width % 8:
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


@given(
    mean=st.floats(-1e6, 1e6),
    log_var=st.floats(-50, 50),
    likelihood=st.sampled_from(LIKELIHOODS),
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


FLAGS = [f"--{name.replace('_', '-')}" for name in Options.__dataclass_fields__]
FLAGS += ["--run-name", "--resume", "--no-augment", "--preset", "--help", "--nonsense"]
# The tests' own pictures stay: others are thousands, or would be downloaded.
NAMES = [name for name in FLAGS if name not in ("--data-root", "--dataset")]
NUMBERS = ["0", "1", "2", "8", "16", "-1", "0.5", "1e-3", "nan", "inf", "1e400"]
CHOICES = ["best", "post", "cpu", "linear", "cyclical", "laplace", "bernoulli", "cosine"]
TEXTS = ["", "..", "a/b", "é", "x" * 300]
words = st.sampled_from(NAMES + NUMBERS + CHOICES + TEXTS)
possible = st.sampled_from(
    [
        "--augment",
        "--batch-norm",
        "--batch-size=5",
        "--beta-schedule=cyclical",
        "--beta-schedule=linear",
        "--beta=0.5",
        "--checkpoint-every=1",
        "--crop",
        "--cycles=2",
        "--epochs=2",
        "--latent-size=3",
        "--learning-rate=1e30",
        "--likelihood=bernoulli",
        "--likelihood=sigma",
        "--lr-schedule=cosine",
        "--run-name=é",
        "--seed=9",
        "--warmup-epochs=1",
    ]
)
lines = st.lists(possible, max_size=4) | st.lists(possible | words, max_size=6)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(line=lines)
def test_any_command_line_is_help_a_run_or_an_error_without_traceback(line, tmp_path):
    errors = io.StringIO()
    # One epoch of tiny pictures first: whatever the line says later counts.
    start = ["--dataset=small", "--device=cpu", "--epochs=1", "--image-size=8"]
    start += ["--log-dir", mkdtemp(dir=tmp_path)]
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
        tyros = ("For full helptext", "Missing value for argument")
        assert last.startswith("error: ") or any(words in last for words in tyros)
