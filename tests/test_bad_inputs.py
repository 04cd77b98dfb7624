"""What cannot be is refused before anything is made, with status 2 and what is needed."""

import shlex
from dataclasses import make_dataclass

import pytest

from vae_training import Options, main

REFUSED = {
    "--epochs 0": "--epochs is 0: 1 or more is needed",
    "--latent-size 0": "--latent-size is 0: 1 or more is needed",
    "--cycles 0": "--cycles is 0: 1 or more is needed",
    "--batch-size 0": "--batch-size is 0: 1 or more is needed",
    "--batch-size -1": "--batch-size is -1: 1 or more is needed",
    "--checkpoint-every 0": "--checkpoint-every is 0: 1 or more is needed",
    "--warmup-epochs -1": "--warmup-epochs is -1: 0 or more is needed",
    "--image-size 0": "--image-size is 0: a multiple of 8 is needed",
    "--image-size -8": "--image-size is -8: a multiple of 8 is needed",
    "--image-size 12": "--image-size is 12: a multiple of 8 is needed",
    "--image-size 30": "--image-size is 30: a multiple of 8 is needed",
    "--beta -0.1": "--beta is -0.1: 0 or more is needed",
    "--beta nan": "--beta is nan: 0 or more is needed",
    "--learning-rate 0": "--learning-rate is 0.0: more than 0 is needed",
    "--learning-rate -1": "--learning-rate is -1.0: 0 or more is needed",
    "--learning-rate inf": "--learning-rate is inf: 0 or more is needed",
    "--seed -1": "--seed is -1: 0 to 4294967295 is needed",
    "--seed 4294967296": "--seed is 4294967296: 0 to 4294967295 is needed",
    "--beta-schedule steep": "invalid choice 'steep' for argument '--beta-schedule'",
    "--lr-schedule steep": "invalid choice 'steep' for argument '--lr-schedule'",
    "--likelihood laplace": "Expected one of ('gaussian', 'bernoulli', 'sigma')",
    "--preset worst": "invalid choice 'worst' for argument '--preset'",
    "--epochs three": "Error parsing --epochs: invalid literal for int() with base 10: 'three'",
    "--device cuda:99": "error: device cuda:99 is not available here: ",
    "--dataset roses": "no such folder, and none of auto, flowers102, dtd, synthetic",
    "--dataset EMNIST": "EMNIST needs a value for split (byclass, bymerge, balanced, letters,",
    "--dataset VOCDetection": "VOCDetection does not give pictures with a label each: take another",
    "--resume nowhere": "RUNS/nowhere/checkpoint.pt is not a file: a checkpoint.pt of a run is ",
    "--resume a --run-name b": "a resumed run keeps its own: leave out --preset and --run-name",
    "--resume a --preset best": "a resumed run keeps its own: leave out --preset and --run-name",
    "--epoch 3": "Perhaps you meant: --epochs INT",
    "flowers": "Unrecognized options: flowers",
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.items(), ids=REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_made(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--dataset=small", f"--log-dir={tmp_path}", *shlex.split(arguments)])
    error = " ".join(capsys.readouterr().err.split())  # tyro breaks its lines
    assert stopped.value.code == 2
    assert message.replace("RUNS", str(tmp_path)) in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["lr_schedule", "beta_schedule", "likelihood"])
def test_a_misspelt_choice_is_refused_from_python_too(option):
    with pytest.raises(ValueError, match=f"{option} is 'cosin': one of .* is needed"):
        Options(**{option: "cosin"})


def test_an_impossible_value_is_refused_from_python_too():
    with pytest.raises(ValueError, match="--epochs is 0: 1 or more is needed"):
        Options(epochs=0)


@pytest.mark.parametrize("size", ["--latent-size=1000000000000", "--image-size=800000000"])
def test_too_little_memory_is_one_line_and_leaves_nothing(size, tmp_path, capsys):
    line = ["--dataset=small", "--image-size=8", "--device=cpu", f"--log-dir={tmp_path}", size]
    with pytest.raises(SystemExit) as stopped:
        main(line)
    *_, last = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 1
    assert last.startswith("error: too little memory, take a smaller model or batch (")
    assert not list(tmp_path.iterdir())


def test_an_option_of_your_own_may_be_left_out():
    own = make_dataclass("Own", [("clip", float | None, None)], bases=(Options,), frozen=True)
    assert (own().clip, own(clip=1.5).clip) == (None, 1.5)


def test_a_file_in_the_place_of_the_runs_folder_is_named_in_one_line(tmp_path, capsys):
    (tmp_path / "run").touch()
    with pytest.raises(SystemExit) as stopped:
        main(["--dataset=small", f"--log-dir={tmp_path}", "--run-name=run"])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 1
    assert line.startswith("error: ") and str(tmp_path / "run") in line
