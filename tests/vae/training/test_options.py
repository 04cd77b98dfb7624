import os
import re
import resource
import shlex
import subprocess
import sys
from dataclasses import asdict, fields
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT

from datasets.pictures import DATASETS
from vae.losses import LIKELIHOODS
from vae.training.options import (
    PRESETS,
    Options,
    check_folder,
    flag,
    read_command_line,
    resumed_options,
)

FIELDS = {each.name: each for each in fields(Options)}


def of_type(kind: type) -> list[str]:
    return [name for name, each in FIELDS.items() if each.type is kind]


# The experiment.


def test_the_defaults_are_the_posts():
    options = Options()
    assert (options.image_size, options.latent_size, options.beta) == (32, 10, 0.1)
    assert (options.learning_rate, options.batch_size, options.epochs) == (1e-4, 64, 500)
    assert (options.batch_norm, options.augment, options.seed) == (False, False, 0)
    assert options.likelihood == "gaussian"
    assert options.beta_schedule == options.lr_schedule == "constant"
    assert PRESETS["post"] == {}


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_a_preset_is_of_options_that_can_be(preset):
    assert asdict(Options(**preset)) == asdict(Options()) | preset


@pytest.mark.parametrize(("name", "known"), [("likelihood", LIKELIHOODS), ("dataset", DATASETS)])
def test_the_choices_are_those_that_the_code_knows(name, known):
    words, _ = FIELDS[name].metadata["needed"]
    assert words == f"one of {', '.join(known)}"
    assert [getattr(Options(**{name: value}), name) for value in known] == list(known)


# Values from Python.


@pytest.mark.parametrize("name", of_type(int))
@pytest.mark.parametrize("kind", [np.int64, np.uint8, float, np.float32, torch.tensor, np.array])
def test_a_whole_number_of_any_kind_becomes_an_int(name, kind):
    value = getattr(Options(**{name: kind(16)}), name)
    assert (value, type(value)) == (16, int)


@pytest.mark.parametrize("name", of_type(float))
@pytest.mark.parametrize("kind", [np.float64, np.float32, int, np.int64, torch.tensor])
def test_a_number_of_any_kind_becomes_a_float(name, kind):
    value = getattr(Options(**{name: kind(2)}), name)
    assert (value, type(value)) == (2.0, float)


@pytest.mark.parametrize("name", of_type(bool))
@pytest.mark.parametrize("kind", [np.bool_, int, torch.tensor])
def test_a_truth_value_of_any_kind_becomes_a_bool(name, kind):
    for value in (False, True):
        assert getattr(Options(**{name: kind(value)}), name) is value


@pytest.mark.parametrize("name", ["log_dir", "run_name", "data_root"])
@pytest.mark.parametrize("kind", [Path, np.str_])
def test_a_path_becomes_a_str(name, kind):
    value = getattr(Options(**{name: kind("flowers")}), name)
    expected = os.path.abspath("flowers") if name == "data_root" else "flowers"
    assert (value, type(value)) == (expected, str)


def test_the_folder_of_the_pictures_is_found_again_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = Options(data_root="../flowers")
    assert options.data_root == str(tmp_path.parent / "flowers")
    monkeypatch.chdir("/")
    assert resumed_options(asdict(options), {}) == options


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (int, ["5", 8.5, float("nan"), float("inf"), None, [8], 8j, torch.ones(2), np.ones(2)]),
        (float, ["1", "nan", float("nan"), float("inf"), 10**400, None, [1.0], 1j, torch.ones(2)]),
        (bool, ["", "yes", 2, None, [], np.ones(2, bool), torch.ones(2, dtype=torch.bool)]),
        (str, [5, None, True, b"cpu", ["cpu"], torch.ones(1)]),
    ],
    ids=["int", "float", "bool", "str"],
)
def test_a_value_of_another_kind_is_refused(kind, values):
    for name in of_type(kind):
        for value in values:
            with pytest.raises(ValueError, match=rf"{flag(name)} is .* needed"):
                Options(**{name: value})


def test_a_value_that_cannot_be_is_refused_from_python_as_well():
    with pytest.raises(ValueError, match=r"^--epochs is 0: 1 to 1000000 is needed$"):
        Options(epochs=0)
    message = r"^--likelihood is 'poisson': one of gaussian, bernoulli, sigma is needed$"
    with pytest.raises(ValueError, match=message):
        Options(likelihood="poisson")


# Schedules.


def betas(**changes: object) -> list[float]:
    options = Options(**{"beta": 0.5, "epochs": 8} | changes)
    return [options.beta_at(epoch) for epoch in range(options.epochs)]


def test_a_constant_beta_stays():
    assert betas() == [0.5] * 8


def test_a_linear_beta_rises_from_0_over_the_warm_up_and_stays():
    expected = [0, 0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.5]
    assert betas(beta_schedule="linear", warmup_epochs=4) == pytest.approx(expected)


@pytest.mark.parametrize(("warmup", "first"), [(0, 0.5), (8, 0.0)])
def test_a_warm_up_may_take_no_epoch_or_all_of_them(warmup, first):
    values = betas(beta_schedule="linear", warmup_epochs=warmup)
    assert (values[0], values[-1]) == pytest.approx((first, 0.5 if warmup == 0 else 0.4375))


def test_a_cyclical_beta_rises_in_the_first_half_of_each_cycle():
    expected = [0, 0.25, 0.5, 0.5, 0, 0.25, 0.5, 0.5]
    assert betas(beta_schedule="cyclical", cycles=2) == pytest.approx(expected)


def test_a_constant_learning_rate_stays():
    options = Options(learning_rate=0.1, epochs=3)
    assert [options.learning_rate_at(epoch) for epoch in range(3)] == [0.1] * 3


def test_a_cosine_learning_rate_falls_to_0_at_the_end():
    options = Options(learning_rate=0.1, epochs=4, lr_schedule="cosine")
    expected = [0.1, 0.08535534, 0.05, 0.01464466, 0]
    assert [options.learning_rate_at(epoch) for epoch in range(5)] == pytest.approx(expected)


# The command line.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--image-size 0", "--image-size is 0: a multiple of 8 is needed"),
        ("--image-size 30", "--image-size is 30: a multiple of 8 is needed"),
        ("--image-size -8", "--image-size is -8: a multiple of 8 is needed"),
        ("--image-size 32.0", "argument --image-size: invalid int value: '32.0'"),
        ("--latent-size 0", "--latent-size is 0: 1 to 1000000 is needed"),
        ("--epochs 0", "--epochs is 0: 1 to 1000000 is needed"),
        ("--epochs 1000001", "--epochs is 1000001: 1 to 1000000 is needed"),
        ("--epochs many", "argument --epochs: invalid int value: 'many'"),
        ("--epochs", "argument --epochs: expected one argument"),
        ("--batch-size 0", "--batch-size is 0: 1 to 1000000 is needed"),
        ("--checkpoint-every 0", "--checkpoint-every is 0: 1 to 1000000 is needed"),
        ("--cycles 0", "--cycles is 0: 1 to 1000000 is needed"),
        ("--learning-rate 0", "--learning-rate is 0.0: a number above 0 is needed"),
        ("--learning-rate nan", "--learning-rate is nan: a number above 0 is needed"),
        ("--learning-rate inf", "--learning-rate is inf: a number above 0 is needed"),
        ("--beta -1", "--beta is -1.0: a number of at least 0 is needed"),
        ("--beta nan", "--beta is nan: a number of at least 0 is needed"),
        ("--seed -1", "--seed is -1: 0 to 2**32 - 1 is needed"),
        ("--seed 4294967296", "--seed is 4294967296: 0 to 2**32 - 1 is needed"),
        (
            "--likelihood poisson",
            "--likelihood is 'poisson': one of gaussian, bernoulli, sigma is needed",
        ),
        (
            "--beta-schedule square",
            "--beta-schedule is 'square': one of constant, linear, cyclical is needed",
        ),
        ("--lr-schedule step", "--lr-schedule is 'step': one of constant, cosine is needed"),
        ("--dataset mnist", "--dataset is 'mnist': one of auto, flowers102, synthetic is needed"),
        (
            "--device toaster",
            "--device is 'toaster': auto, cpu, cuda, cuda:1, mps or xpu is needed",
        ),
        ("--device meta", "--device is 'meta': auto, cpu, cuda, cuda:1, mps or xpu is needed"),
        (
            "--beta-schedule linear --warmup-epochs 2",
            "--warmup-epochs is 2: 0 to 1 (--epochs) is needed",
        ),
        (
            "--beta-schedule linear --warmup-epochs -1",
            "--warmup-epochs is -1: 0 to 1 (--epochs) is needed",
        ),
        *(
            (
                f"--run-name={shlex.quote(name)}",
                f"--run-name is {name!r}: letters, digits and _ . + = - with no dot first or last "
                "is needed",
            )
            for name in ("../elsewhere", "a/b", ".hidden", "..", "two words", "dot.", "a\nb")
        ),
        ("--resume nowhere", "nowhere/checkpoint.pt does not exist: a checkpoint.pt of a run is"),
        ("--overwrite --resume run", "argument --resume: not allowed with argument --overwrite"),
        ("--preset worst", "argument --preset: invalid choice: 'worst' (choose from "),
        ("--epoch 3", "unrecognized arguments: --epoch 3"),
        ("--what", "unrecognized arguments: --what"),
        ("flowers", "unrecognized arguments: flowers"),
    ],
)
def test_a_bad_command_is_refused_in_one_line_before_anything_is_made(
    tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        read_command_line("", ["--log-dir=runs", "--epochs=1", *shlex.split(arguments)])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{Path(sys.argv[0]).name}: error: {message}")
    assert not list(tmp_path.iterdir())


def test_every_option_has_a_flag():
    values = {
        **{"image_size": 16, "latent_size": 3, "batch_norm": True, "likelihood": "sigma"},
        **{"beta": 0.5, "beta_schedule": "linear", "warmup_epochs": 2, "cycles": 3, "epochs": 9},
        **{"batch_size": 5, "learning_rate": 1e-3, "lr_schedule": "cosine", "augment": True},
        **{"seed": 7, "device": "cpu", "dataset": "synthetic", "data_root": "/here"},
        **{"log_dir": "there", "run_name": "first", "checkpoint_every": 4},
    }
    assert values.keys() == FIELDS.keys()
    arguments = [
        flag(name) if value is True else f"{flag(name)}={value}" for name, value in values.items()
    ]
    command = read_command_line("", arguments)
    assert asdict(command.options) == command.given == values
    assert (command.start, command.folder) == ("new", Path("there/first"))


def test_nothing_given_is_the_posts_experiment():
    command = read_command_line("", [])
    assert (command.options, command.given, command.start) == (Options(), {}, "new")


def test_a_preset_sets_options_which_the_command_can_change():
    command = read_command_line("", ["--preset=best", "--no-augment", "--seed=3"])
    expected = PRESETS["best"] | {"augment": False, "seed": 3}
    assert command.given == expected
    assert command.options == Options(**expected)


def test_a_run_is_named_by_date_and_time_if_not_otherwise(tmp_path):
    before = datetime.now().replace(microsecond=0)
    folder = read_command_line("", ["--log-dir", str(tmp_path)]).folder
    assert folder.parent == tmp_path
    assert before <= datetime.strptime(folder.name, "%Y-%m-%d_%H-%M-%S") <= datetime.now()


@pytest.mark.parametrize("where", ["first", "{runs}/first"])
@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        (("first",), "first"),
        (("first-synthetic",), "first-synthetic"),
        (("first", "first-synthetic"), "first"),
    ],
)
def test_a_run_is_resumed_by_its_name_or_its_folder(tmp_path, where, runs, expected):
    for name in runs:
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint.pt").touch()
    arguments = ["--log-dir", str(tmp_path), "--resume", where.format(runs=tmp_path)]
    command = read_command_line("", arguments)
    assert (command.start, command.folder) == ("resume", tmp_path / expected)


def test_help_shows_every_option_in_its_group_with_need_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        read_command_line("What it is for.", ["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "What it is for." in text
    for each in FIELDS.values():
        words, _ = each.metadata["needed"]
        assert f"{flag(each.name)}" in text
        assert each.metadata["help"] in text
        assert each.default == "" or re.search(
            rf"\({re.escape(words + '; ' if words else '')}default: {re.escape(str(each.default))}",
            text,
        )
    for group in ("model", "loss", "training", "data", "output"):
        assert f" {group}: --" in text


@pytest.mark.parametrize("arguments", ["--help", "--epochs 0", "--resume nowhere", "--what"])
@pytest.mark.parametrize("script", ["vae_training.py", "vae_inference.py"])
def test_help_and_refusals_come_before_pytorch_is_loaded(script, arguments):
    imports = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / script, *arguments.split()],
        capture_output=True,
        text=True,
    )
    assert imports.returncode == (0 if arguments == "--help" else 2)
    loaded = re.findall(r"^import time:.*\| +(\w+)$", imports.stderr, re.MULTILINE)
    assert "argparse" in loaded
    assert not {"torch", "torchvision", "numpy", "PIL"} & set(loaded)


@pytest.mark.parametrize("script", ["vae_training.py", "vae_inference.py"])
def test_help_takes_half_a_second_of_processor_time_at_most(script):
    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = used()
    subprocess.run([sys.executable, ROOT / script, "--help"], check=True, stdout=subprocess.DEVNULL)
    assert 0 < used() - before < 0.5


# Where a run can start.


def folder_of(tmp_path: Path, *names: str) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("start", ["new", "overwrite"])
@pytest.mark.parametrize("content", [None, (), (".lock",)], ids=["none", "empty", "lock"])
def test_a_run_starts_where_there_is_nothing_but_a_lock(tmp_path, start, content):
    check_folder(tmp_path / "run" if content is None else folder_of(tmp_path, *content), start)


@pytest.mark.parametrize("content", [("checkpoint.pt",), (".lock", "events.1"), ("precious.txt",)])
def test_a_new_run_starts_nowhere_else(tmp_path, content):
    folder = folder_of(tmp_path, *content)
    message = (
        f"{folder} exists already: give another --run-name, --resume to go on with it, or "
        "--overwrite to replace it"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        check_folder(folder, "new")


@pytest.mark.parametrize("content", [("checkpoint.pt", "notes"), (".lock", "events.1")])
def test_a_run_is_overwritten_even_if_it_ended_before_its_first_checkpoint(tmp_path, content):
    check_folder(folder_of(tmp_path, *content), "overwrite")


def test_a_folder_that_is_no_run_is_not_overwritten(tmp_path):
    with pytest.raises(ValueError, match=r"is not a run \(no checkpoint.pt in it\)"):
        check_folder(folder_of(tmp_path, "precious.txt"), "overwrite")


def test_only_a_run_with_a_checkpoint_is_resumed(tmp_path):
    folder = folder_of(tmp_path, ".lock")
    with pytest.raises(ValueError, match=r"checkpoint\.pt does not exist"):
        check_folder(folder, "resume")
    (folder / "checkpoint.pt").touch()
    check_folder(folder, "resume")


@pytest.mark.parametrize("start", ["Resume", "", None, True])
def test_a_start_of_another_name_is_refused_and_never_taken_for_overwrite(tmp_path, start):
    with pytest.raises(ValueError, match="new, resume or overwrite is needed"):
        check_folder(folder_of(tmp_path, "checkpoint.pt"), start)


def test_a_file_in_the_place_of_the_folder_is_an_error_of_one_line(tmp_path, capsys):
    (tmp_path / "run").touch()
    with pytest.raises(SystemExit) as stop:
        read_command_line("", ["--log-dir", str(tmp_path), "--run-name", "run"])
    assert stop.value.code == 2
    assert str(tmp_path / "run") in capsys.readouterr().err


# What a resumed run may change.

CONFIG = asdict(Options(epochs=5, dataset="synthetic")) | {
    "image_resolution": [32, 32],
    "image_channels": 3,
}


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"beta": 0.1, "seed": 0},
        {"epochs": 9},
        {"device": "cuda", "checkpoint_every": 1},
        {"data_root": "/elsewhere", "log_dir": "there"},
    ],
)
def test_a_resumed_run_keeps_its_options_but_for_what_does_not_change_the_experiment(given):
    expected = {name: CONFIG[name] for name in FIELDS} | given
    assert asdict(resumed_options(CONFIG, given)) == expected


@pytest.mark.parametrize(
    ("given", "difference"),
    [
        ({"beta": 1.0}, "--beta 1.0 (the run has 0.1)"),
        ({"learning_rate": 0.1}, "--learning-rate 0.1 (the run has 0.0001)"),
        ({"seed": 1}, "--seed 1 (the run has 0)"),
        ({"image_size": 16}, "--image-size 16 (the run has 32)"),
        ({"epochs": 4}, "--epochs 4 (the run has 5)"),
        ({"batch_norm": True}, "--batch-norm True (the run has False)"),
        ({"dataset": "flowers102"}, "--dataset flowers102 (the run has synthetic)"),
        ({"run_name": "other"}, "--run-name other (the run has )"),
        ({"lr_schedule": "cosine", "epochs": 9}, "--lr-schedule cosine (the run has constant)"),
        (PRESETS["best"], "--learning-rate 0.002 (the run has 0.0001), --lr-schedule cosine"),
    ],
)
def test_a_resumed_run_does_not_become_another_experiment(given, difference):
    with pytest.raises(ValueError, match=re.escape(difference)):
        resumed_options(CONFIG, given)


@pytest.mark.parametrize(
    "schedule", [{"lr_schedule": "cosine"}, {"beta_schedule": "cyclical"}, {"beta": 0.5}]
)
def test_epochs_grow_only_where_no_schedule_depends_on_them(schedule):
    config = CONFIG | schedule
    if "beta" in schedule:
        assert resumed_options(config, {"epochs": 6}).epochs == 6
    else:
        with pytest.raises(ValueError, match=r"--epochs 6 \(the run has 5\)"):
            resumed_options(config, {"epochs": 6})


@pytest.mark.parametrize("config", [{"seed": 0.5}, {"image_size": "large"}, {"beta": None}])
def test_a_config_of_no_run_is_refused(config):
    with pytest.raises(ValueError, match="needed"):
        resumed_options(CONFIG | config, {})


def test_options_hold_whatever_a_checkpoint_can():
    options = Options(epochs=np.int64(5), beta=np.float64(0.5), data_root=Path("here"))
    kinds = {type(value) for value in asdict(options).values()}
    assert kinds == {int, float, bool, str}
