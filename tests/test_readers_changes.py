"""The README's invitation, "Change a line or an option and run it again", taken at its word.

Each case is a change that readers make, in a copy of the repository. It has to train, to go on
after Ctrl-C as if it had not been stopped, and to draw.
"""

import importlib
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import SmallPictures
from helpers import (
    ROOT,
    SMALL,
    assert_same_run,
    assert_same_tensors,
    flags,
    interruption,
    read_events,
    train_small,
)
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import ToTensor

import vae_inference
from datasets.memory import InMemory
from vae.checkpoint import load_checkpoint

Edits = dict[str, list[tuple[str, str]]]  # file: what stands there, what the reader writes

TRAINING, LAYERS, LOSSES = "vae_training.py", "vae/layers.py", "vae/losses.py"

ADAM = "torch.optim.Adam(model.parameters(), lr=options.learning_rate, fused=True)"
SCHEDULER = "scheduler = learning_rate_schedule(optimiser, options)"
MODEL = "model = VAE(**architecture)\n"
LOSS = "loss = ELBOLoss(options.beta, options.likelihood)\n"
STATE = 'state = {"model": model, '
FIRST_EPOCH = "first_epoch = run.start_or_resume("
STEP = "optimiser.step()\n"
BATCH = "                    # Step 1: set the gradients to zero\n"
SEED_OPTION = "    seed: int = 0  #"
TOTAL = "total_loss = self.beta * kl_loss + reconstruction_loss\n"
PREPROCESSING = "datasets/preprocessing.py"
PIPELINE = "Resize(resolution), ToTensor()"


def optimiser(code: str) -> Edits:
    """The change of a line: another optimiser."""
    return {TRAINING: [(ADAM, code)]}


def after(line: str, code: str, indent: int = 8) -> tuple[str, str]:
    """The change of a text: a line more behind one that is there."""
    return line, line + indent * " " + code + "\n"


CHANGES: dict[str, Edits] = {
    # Optimisers.
    "SGD": optimiser("torch.optim.SGD(model.parameters(), lr=1e-4)"),
    "SGD with momentum": optimiser("torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)"),
    "RMSprop": optimiser("torch.optim.RMSprop(model.parameters(), lr=1e-4)"),
    "AdamW with two groups": optimiser(
        "torch.optim.AdamW([{'params': model.encoder.parameters(), 'lr': 1e-3},"
        " {'params': model.decoder.parameters()}], lr=1e-4)"
    ),
    "Adafactor, whose state is smaller than its weights": optimiser(
        "torch.optim.Adafactor(model.parameters(), lr=1e-3)"
    ),
    "an optimiser for the decoder alone": optimiser("torch.optim.Adam(model.decoder.parameters())"),
    "a frozen layer": {TRAINING: [after(MODEL, "model.encoder.conv1.requires_grad_(False)")]},
    "clipped gradients": {
        TRAINING: [
            (STEP, f"torch.nn.utils.clip_grad_norm_(model.parameters(), 1)\n{20 * ' '}{STEP}")
        ]
    },
    # Schedules.
    "StepLR": {
        TRAINING: [(SCHEDULER, "scheduler = torch.optim.lr_scheduler.StepLR(optimiser, 1, 0.5)")]
    },
    "LambdaLR, whose factor is a number of NumPy's": {
        TRAINING: [
            ("import torch\n", "import numpy as np\nimport torch\n"),
            (
                SCHEDULER,
                "scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda e: np.cos(e / 9))",
            ),
        ]
    },
    "OneCycleLR, with a step for every batch": {
        TRAINING: [
            (SCHEDULER, "scheduler = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, 12)"),
            ("                scheduler.step()  # the next", "                # the next"),
            after(STEP, "scheduler.step()", 20),
        ]
    },
    "a second scheduler in the state": {
        TRAINING: [
            after(SCHEDULER + "\n", "warmup = torch.optim.lr_scheduler.LinearLR(optimiser, 0.1)"),
            (STATE, STATE + '"warmup": warmup, '),
            (
                "                scheduler.step()  #",
                "                warmup.step()\n                scheduler.step()  #",
            ),
        ]
    },
    "an average of the weights (EMA)": {
        TRAINING: [
            after(
                SCHEDULER + "\n",
                "ema = torch.optim.swa_utils.AveragedModel("
                "model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))",
            ),
            (STATE, STATE + '"ema": ema, '),
            after(STEP, "ema.update_parameters(model)", 20),
        ]
    },
    # The model.
    "an argument of the model more": {
        "vae/vae.py": [
            ("batch_norm: bool = False\n", 'batch_norm: bool = False, activation: str = "relu"\n'),
            (
                "        self.sample_latent =",
                '        if activation == "gelu":\n            self.encoder.act1 = nn.GELU()\n'
                "        self.sample_latent =",
            ),
        ],
        TRAINING: [
            ('"batch_norm": options.batch_norm,\n', '"batch_norm": True, "activation": "gelu",\n')
        ],
    },
    "torch.compile": {
        TRAINING: [
            (SCHEDULER, f'model = torch.compile(model, backend="eager")\n        {SCHEDULER}')
        ]
    },
    "torch.compile of a part": {
        TRAINING: [
            after(MODEL, 'model.encoder = torch.compile(model.encoder, backend="eager")'),
        ]
    },
    "a layer under another name": {LAYERS: [("self.fcm", "self.to_mean")]},
    "a layer more": {
        LAYERS: [
            (
                "        self.flatten =",
                "        self.conv4 = nn.Conv2d(64, 64, 1)\n        self.flatten =",
            ),
            ("        x = self.flatten(x)", "        x = self.flatten(self.conv4(x))"),
        ]
    },
    "dropout": {
        LAYERS: [
            (
                "        self.flatten = nn.Flatten()",
                "        self.flatten = nn.Sequential(nn.Flatten(), nn.Dropout(0.1))",
            )
        ]
    },
    "a model that returns z, too": {
        "vae/vae.py": [
            (
                "return reconstruction, mean, log_var",
                "return reconstruction, mean, log_var, latent_sample",
            ),
            ("-> tuple[Tensor, Tensor, Tensor]:", "-> tuple[Tensor, ...]:"),
        ],
        TRAINING: [
            ("reconstructions, means, log_vars = ", "reconstructions, means, log_vars, *_ = ")
        ],
    },
    "layers in double precision": {
        LAYERS: [
            ("        x = self.pool1(", "        x = x.double()\n        x = self.pool1("),
            after("        self.fcv = nn.Linear(channels * h * w, latent_size)\n", "self.double()"),
            after("        self.act3 = nn.Sigmoid()\n", "self.double()"),
            ("x = self.fc(z)", "x = self.fc(z.double())"),
        ]
    },
    "a buffer with infinities, such as a mask": {
        LAYERS: [
            after(
                "        self.flatten = nn.Flatten()\n",
                'self.register_buffer("mask", torch.tensor([0, -math.inf]))',
            ),
            ("import torch\n", "import math\n\nimport torch\n"),
        ]
    },
    "a buffer that is not saved": {
        LAYERS: [
            after(
                "        self.act3 = nn.Sigmoid()\n",
                'self.register_buffer("one", torch.ones(()), persistent=False)',
            ),
            ("return self.act3(self.deconv3(x))", "return self.one * self.act3(self.deconv3(x))"),
        ]
    },
    # The loss.
    "a learnt weight in the loss": {
        LOSSES: [
            after(
                "        self.likelihood = likelihood\n",
                "self.log_weight = nn.Parameter(torch.zeros(()))",
            ),
            (TOTAL, "total_loss = kl_loss + self.log_weight.exp() * reconstruction_loss\n"),
        ],
        TRAINING: [(ADAM, "torch.optim.Adam([*model.parameters(), *loss.parameters()])")],
    },
    "one more term in the loss": {
        LOSSES: [(TOTAL, TOTAL + "        total_loss = total_loss + 1000\n")]
    },
    "one more loss returned": {
        LOSSES: [
            (
                "return self.beta, kl_loss, reconstruction_loss, total_loss",
                "return self.beta, kl_loss, reconstruction_loss, kl_loss.sqrt(), total_loss",
            ),
            (
                "tuple[float, Tensor, Tensor, Tensor]",
                "tuple[float, Tensor, Tensor, Tensor, Tensor]",
            ),
        ],
        TRAINING: [
            (
                "_, kl_loss, reconstruction_loss, total_loss",
                "_, kl_loss, reconstruction_loss, _, total_loss",
            )
        ],
    },
    # Options.
    "an option that is a tuple": {
        TRAINING: [(SEED_OPTION, f"    scales: tuple[int, ...] = (1, 2)\n{SEED_OPTION}")]
    },
    "an option that is a path": {
        TRAINING: [(SEED_OPTION, f'    extra: Path = Path("extra")\n{SEED_OPTION}')]
    },
    "an option that may be a number, a path or nothing": {
        TRAINING: [
            (
                SEED_OPTION,
                "    clip: float | None = None\n    mask: Path | None = Path('a')\n"
                f"    folders: tuple[Path, ...] = (Path('b'),)\n{SEED_OPTION}",
            )
        ]
    },
    "an option that is a choice (Enum), one of several (NamedTuple), and a group of options": {
        TRAINING: [
            ("import torch\n", "import enum\n\nimport torch\n"),
            ("from typing import Any,", "from typing import Any, NamedTuple,"),
            (
                "# On the command line each field",
                "class Colour(enum.Enum):\n    red = 1\n    blue = 2\n\n\n"
                "class Size(NamedTuple):\n    width: int\n    place: Path\n\n\n"
                "@dataclass(frozen=True)\nclass Clip:\n    norm: float = 1.0\n"
                "    file: Path = Path('a')\n\n\n# On the command line each field",
            ),
            (
                SEED_OPTION,
                "    colour: Colour = Colour.blue\n    size: Size = Size(3, Path('b'))\n"
                f"    clip: Clip = Clip()\n{SEED_OPTION}",
            ),
        ]
    },
    "an option that follows from another": {
        TRAINING: [
            ("import dataclass, replace", "import dataclass, field, replace"),
            (SEED_OPTION, f"    pixels: int = field(init=False)\n{SEED_OPTION}"),
            (
                "        check_choices(self)  #",
                '        object.__setattr__(self, "pixels", self.image_size**2)\n'
                "        check_choices(self)  #",
            ),
        ]
    },
    # Chance.
    "noise from NumPy": {
        TRAINING: [
            ("import torch\n", "import numpy as np\nimport torch\n"),
            (BATCH, f"                    train_features += 0.1 * np.random.rand()\n{BATCH}"),
        ]
    },
    "noise from Python's random": {
        TRAINING: [
            ("import torch\n", "import random\nimport torch\n"),
            (BATCH, f"                    train_features += 0.1 * random.random()\n{BATCH}"),
        ]
    },
    "torchvision's own random transforms in the loop": {
        TRAINING: [
            ("if options.augment:", "flip = RandomHorizontalFlip()\n                    if True:"),
            (
                "import torch\n",
                "import torch\nfrom torchvision.transforms import RandomHorizontalFlip\n",
            ),
            (
                "train_features = augment(train_features)\n",
                "train_features = torch.stack([flip(x) for x in train_features])\n",
            ),
        ]
    },
    # Pictures.
    "a transform more": {
        PREPROCESSING: [
            ("import CenterCrop,", "import CenterCrop, Grayscale,"),
            (PIPELINE, f"Grayscale(), {PIPELINE}"),
        ]
    },
}


# The repository's own packages and scripts. Others are not imported anew, which takes seconds.
OWN = ("datasets", "vae", "vae_training", "vae_inference")


@contextmanager
def imported_from(folder: Path) -> Iterator[tuple[ModuleType, ModuleType]]:
    """The two scripts of a copy of the repository; afterwards all modules are as before."""

    def forget() -> dict[str, ModuleType]:
        names = [name for name in sys.modules if name.split(".")[0] in OWN]
        return {name: sys.modules.pop(name) for name in names}

    before = forget()
    sys.path.insert(0, str(folder))
    try:
        training = importlib.import_module("vae_training")
        training.DATASETS["small"] = SmallPictures
        yield training, importlib.import_module("vae_inference")
    finally:
        sys.path.remove(str(folder))
        forget()
        sys.modules.update(before)


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the repository's code, to be changed."""
    for pattern in ("*.py", "vae/*.py", "vae/*.html", "datasets/*.py"):
        for path in ROOT.glob(pattern):
            place = tmp_path / "copy" / path.relative_to(ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
    return tmp_path / "copy"


def change(folder: Path, edits: Edits) -> None:
    """Make a reader's change."""
    for name, replacements in edits.items():
        path = folder / name
        text = path.read_text(encoding="utf-8")
        for old, new in replacements:
            assert old in text, f"{name} has no {old!r}"
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("edits", CHANGES.values(), ids=CHANGES)
def test_it_trains_goes_on_as_if_it_had_not_been_stopped_and_draws(edits, copy, tmp_path):
    change(copy, edits)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    with imported_from(copy) as (training, inference):
        options = training.Options(**SMALL | {"epochs": 4})
        training.train(options, whole, progress=False)
        # In the second of four epochs, each with three steps.
        with interruption(signal.SIGINT, call=5), pytest.raises(KeyboardInterrupt):
            training.train(options, stopped, progress=False)
        training.main(["--resume", str(stopped)])
        for run in (whole, stopped):
            settings = inference.Settings(run / "checkpoint.pt", output=run / "drawn.png")
            inference.sample(settings, count=8)
    assert_same_run(stopped, whole)
    assert (stopped / "drawn.png").read_bytes() == (whole / "drawn.png").read_bytes()


def train_changed(copy: Path, edits: Edits, folder: Path, **options: Any) -> dict[str, Any]:
    """Make a reader's change and train with it; return the metrics."""
    change(copy, edits)
    with imported_from(copy) as (training, _):
        _, metrics = training.train(
            training.Options(**SMALL | options), folder, resume=folder.exists(), progress=False
        )
    return metrics


def learning_rates(folder: Path) -> list[float]:
    """What TensorBoard shows of a run's learning rate, an epoch each."""
    return [value for _, value in read_events(folder)["."]["schedule/learning_rate"]]


# What a change is for, is what it does.


def test_step_lr_halves_the_learning_rate(copy, tmp_path):
    train_changed(copy, CHANGES["StepLR"], tmp_path / "run")
    assert learning_rates(tmp_path / "run") == pytest.approx([1e-4, 0.5e-4, 0.25e-4])


def test_cosine_lowers_the_learning_rate_of_each_group(copy, tmp_path):
    two_groups = CHANGES["AdamW with two groups"][TRAINING]
    second = ('optimiser.param_groups[0]["lr"]', 'optimiser.param_groups[1]["lr"]')
    edits = {TRAINING: [*two_groups, second]}
    train_changed(copy, edits, tmp_path / "run", lr_schedule="cosine")
    assert learning_rates(tmp_path / "run") == pytest.approx([1e-4, 0.75e-4, 0.25e-4])


def test_a_frozen_layer_and_what_no_optimiser_has_stay_as_they_were(copy, tmp_path):
    train_changed(copy, {}, tmp_path / "first", epochs=1, learning_rate=1e-30)
    train_changed(copy, CHANGES["a frozen layer"], tmp_path / "frozen", learning_rate=1e-2)
    first, frozen = (
        load_checkpoint(tmp_path / run / "checkpoint.pt")["state"]["model"]
        for run in ("first", "frozen")
    )
    name = "encoder.conv1.weight"
    assert torch.equal(first[name], frozen[name])
    assert not torch.equal(first["encoder.conv2.weight"], frozen["encoder.conv2.weight"])


def test_a_model_is_rebuilt_with_the_arguments_that_it_was_trained_with(copy, tmp_path):
    change(copy, CHANGES["an argument of the model more"])
    with imported_from(copy) as (training, inference):
        options = training.Options(**SMALL | {"learning_rate": 1e-2})
        trained, _ = training.train(options, tmp_path / "run", progress=False)
        rebuilt, *_ = inference.load_model(tmp_path / "run" / "checkpoint.pt")
        x = torch.rand(4, 3, 8, 8)
        assert torch.allclose(trained.encoder(x)[0], rebuilt.encoder(x)[0], atol=1e-6)
        rebuilt.encoder.act1 = torch.nn.ReLU()  # it matters
        assert not torch.allclose(trained.encoder(x)[0], rebuilt.encoder(x)[0], atol=1e-3)


def test_one_more_term_in_the_loss_counts_in_every_measure(copy, tmp_path):
    every_epoch = ("VALIDATE_EVERY = 10", "VALIDATE_EVERY = 1")
    edits = CHANGES["one more term in the loss"] | {TRAINING: [every_epoch]}
    metrics = train_changed(copy, edits, tmp_path / "run")
    for split in ("train", "val", "test"):
        parts = metrics[split]["reconstruction_loss"] + 0.1 * metrics[split]["kl"]
        assert metrics[split]["total_loss"] == pytest.approx(parts + 1000, rel=1e-4)
    shown = read_events(tmp_path / "run")["."]["validation/total_loss"]
    assert [value > 1000 for _, value in shown] == [True] * 3


def test_a_learnt_weight_in_the_loss_is_learnt(copy, tmp_path):
    train_changed(copy, CHANGES["a learnt weight in the loss"], tmp_path / "run")
    weights = load_checkpoint(tmp_path / "run" / "checkpoint.pt")["state"]["loss"]
    assert weights["log_weight"] != 0


def test_after_early_stopping_the_model_that_was_measured_is_the_one_that_is_kept(copy, tmp_path):
    stop = "                run.end_epoch(epoch)\n"
    change(copy, {TRAINING: [after(stop, "if epoch == 1: break", 16)]})
    with imported_from(copy) as (training, inference):
        options = training.Options(**SMALL | {"learning_rate": 1e-2})
        trained, _ = training.train(options, tmp_path / "run", progress=False)
        kept, *_ = inference.load_model(tmp_path / "run" / "checkpoint.pt")
    assert_same_tensors(trained.state_dict(), kept.state_dict())


# Changes between a run and its end.


def test_an_option_that_came_later_has_its_default_in_older_runs(copy, tmp_path):
    train_changed(copy, {}, tmp_path / "run")
    metrics = train_changed(copy, CHANGES["an option that is a path"], tmp_path / "run", epochs=4)
    assert (metrics["epochs"], Path(metrics["options"]["extra"]).name) == (4, "extra")


def test_an_option_that_is_gone_is_named(copy, tmp_path):
    train_small(tmp_path / "run")
    edits = {
        TRAINING: [
            ("    crop: bool = False", "    middle: bool = False"),
            ("options.crop", "False"),
        ]
    }
    with pytest.raises(ValueError, match=r"has options that this code has not: crop = False"):
        train_changed(copy, edits, tmp_path / "run", epochs=4)


OTHER_CODE = {
    "another layer": (
        {LAYERS: CHANGES["a layer more"][LAYERS]},
        r"made by other code: .*Missing key.*encoder\.conv4",
    ),
    "another optimiser": (
        optimiser('torch.optim.SGD([{"params": [x]} for x in model.parameters()], lr=1e-4)'),
        r"same experiment: optimiser: kind is SGD \(the run has Adam\); optimiser: param_gr",
    ),
    "another setting of the optimiser": (
        optimiser("torch.optim.Adam(model.parameters(), options.learning_rate, weight_decay=0.5)"),
        r"param_groups\[0\].weight_decay is 0.5 \(the run has 0\)",
    ),
    "a schedule of another length": (
        {
            TRAINING: [
                (
                    "ConstantLR(optimiser, factor=1.0)",
                    "ConstantLR(optimiser, factor=1.0, total_iters=options.epochs)",
                )
            ]
        },
        r"scheduler: total_iters is 4 \(the run has 5\)",
    ),
    "a group that is added while it trains": (
        {
            TRAINING: [
                (ADAM, ADAM.replace("model", "model.decoder")),
                (
                    FIRST_EPOCH,
                    'optimiser.add_param_group({"params": model.encoder.parameters()})'
                    f"\n        {FIRST_EPOCH}",
                ),
            ]
        },
        "its optimiser has 1 groups of parameters, this one 2: a group that is added while",
    ),
    "something more in the state": (
        CHANGES["an average of the weights (EMA)"],
        r"same experiment: ema is in the state \(the run has none\)",
    ),
    "something less in the state": (
        {TRAINING: [(STATE, "state = {"), ("state = {", 'state = {"model": model, }; _ = {')]},
        "same experiment: loss is not in the state .*; optimiser is not in the state",
    ),
}


@pytest.mark.parametrize(("edits", "message"), OTHER_CODE.values(), ids=OTHER_CODE)
def test_a_run_of_other_code_is_said_to_be_that_in_one_line(edits, message, copy, tmp_path):
    train_small(tmp_path / "run")
    with pytest.raises(ValueError, match=message) as refused:
        train_changed(copy, edits, tmp_path / "run", epochs=4)
    assert "\n" not in str(refused.value)


def test_a_model_of_other_code_is_said_to_be_that_when_it_is_to_draw(copy, tmp_path, capsys):
    train_changed(copy, CHANGES["an argument of the model more"], tmp_path / "run")
    with pytest.raises(SystemExit):
        vae_inference.main(["sample", f"--checkpoint={tmp_path / 'run' / 'checkpoint.pt'}"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("made by other code: got an unexpected keyword argument 'activation'")


@pytest.mark.parametrize("slip", ["nn.Sigmod()", "nn.Sigmoid(1, 2)", "nn.Sigmoid() + 1"])
def test_a_slip_in_the_layers_keeps_its_traceback_when_the_model_is_to_draw(slip, copy, tmp_path):
    train_small(tmp_path / "run")
    change(copy, {LAYERS: [("nn.Sigmoid()", slip)]})
    command = ["sample", f"--checkpoint={tmp_path / 'run' / 'checkpoint.pt'}"]
    with (
        imported_from(copy) as (_, inference),
        pytest.raises((AttributeError, TypeError)) as slipped,
    ):
        inference.main(command)
    assert str(copy / LAYERS) in {str(entry.path) for entry in slipped.traceback}


INCOMPLETE = {
    "a learnt tensor that nothing saves": (
        {
            TRAINING: [
                (
                    ADAM,
                    "torch.optim.Adam([*model.parameters(), torch.zeros(2, requires_grad=True)])",
                )
            ]
        },
        r"the optimiser changes a parameter of shape \[2\] that is in no module of the state",
    ),
    "something without a state": (
        {TRAINING: [(STATE, STATE + '"sigma": torch.zeros(()), ')]},
        r"state\['sigma'\] has no state_dict and load_state_dict: put a tensor into an nn\.Module",
    ),
}


@pytest.mark.parametrize(("edits", "message"), INCOMPLETE.values(), ids=INCOMPLETE)
def test_a_state_from_which_no_run_could_go_on_is_refused_before_it_begins(
    edits, message, copy, tmp_path
):
    with pytest.raises(ValueError, match=message):
        train_changed(copy, edits, tmp_path / "run")
    assert not read_events(tmp_path / "run")


def test_a_slip_in_the_loop_keeps_its_traceback(copy, tmp_path):
    change(copy, {TRAINING: [("_, kl_loss, reconstruction", "kl_loss, reconstruction")]})
    slip = pytest.raises(ValueError, match="too many values to unpack")
    with imported_from(copy) as (training, _), slip as slipped:
        training.main([*flags(SMALL), f"--log-dir={tmp_path}"])
    assert str(copy / TRAINING) in {str(entry.path) for entry in slipped.traceback}


def test_what_cannot_be_kept_is_named_before_the_first_epoch(copy, tmp_path):
    edits = {
        TRAINING: [
            (FIRST_EPOCH, f'architecture["activation"] = torch.nn.GELU\n        {FIRST_EPOCH}')
        ]
    }
    with pytest.raises(TypeError, match=r"\['activation'\] is of type type"):
        train_changed(copy, edits, tmp_path / "run")
    assert not read_events(tmp_path / "run")


# Pictures.


def test_a_random_transform_in_the_pipeline_is_refused_with_the_place_where_it_belongs(
    copy, tmp_path
):
    edits = {
        PREPROCESSING: [
            ("import CenterCrop,", "import CenterCrop, RandomHorizontalFlip,"),
            (PIPELINE, f"RandomHorizontalFlip(), {PIPELINE}"),
        ]
    }
    with pytest.raises(ValueError, match=r"train_features = torch\.stack") as refused:
        train_changed(copy, edits, tmp_path / "run")
    assert "\n" not in str(refused.value)


class KnowsItsFolder(Dataset):
    """A reader's data set that lists its folder at each picture."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return len(list(self.folder.iterdir()))

    def __getitem__(self, index: int):
        return ToTensor()(Image.open(sorted(self.folder.iterdir())[index])), 0


def test_pictures_that_change_in_a_folder_are_seen(tmp_path, cache_folder):
    Image.new("RGB", (8, 8), (1, 0, 0)).save(tmp_path / "a.png")
    folder = tmp_path / "pictures"
    folder.mkdir()
    for red in (1, 2):
        Image.new("RGB", (8, 8), (red, 0, 0)).save(folder / "a.png")
        pictures = InMemory(KnowsItsFolder(folder), progress=False)
        assert pictures.pixels[0, 0, 0].tolist() == [red, 0, 0]


class HasOneOpenFile(Dataset):
    """A reader's data set of 8x8 grey pictures, one after the other in a file that stays open."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("rb")

    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: int):
        self.file.seek(64 * index)
        time.sleep(1e-4)  # a slow disk
        return ToTensor()(Image.frombytes("L", (8, 8), self.file.read(64))), index


def test_a_data_set_with_one_open_file_gives_each_picture_its_own_pixels(tmp_path):
    (tmp_path / "pictures.bin").write_bytes(
        bytes(number for number in range(200) for _ in range(64))
    )
    pictures = InMemory(HasOneOpenFile(tmp_path / "pictures.bin"), progress=False)
    assert pictures.pixels[:, 0, 0, 0].tolist() == list(range(200))
