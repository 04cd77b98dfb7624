"""One experiment: options, presets, schedules. Without PyTorch: ``--help`` comes at once."""

import math
import os
import re
from argparse import SUPPRESS, BooleanOptionalAction
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from vae.training.command_line import ROOT, RUNS, Parser


def one_of(*choices: str) -> tuple[str, Callable[[Any], object]]:
    """Return what an option's value has to be, here one of a few: in words, and as a check."""
    return f"one of {', '.join(choices)}", lambda value: value in choices


LIKELIHOOD = one_of("gaussian", "bernoulli", "sigma")
BETA_SCHEDULE = one_of("constant", "linear", "cyclical")
LR_SCHEDULE = one_of("constant", "cosine")
DATASET = one_of("auto", "flowers102", "synthetic")
COUNT = ("1 to 1000000", lambda value: 1 <= value <= 10**6)
SIZE = ("a multiple of 8", lambda value: value >= 8 and value % 8 == 0)
WEIGHT = ("a number of at least 0", lambda value: 0 <= value < math.inf)
RATE = ("a number above 0", lambda value: 0 < value < math.inf)
SEED = ("0 to 2**32 - 1", lambda value: 0 <= value < 2**32)
DEVICE = (
    "auto, cpu, cuda, cuda:1, mps or xpu",
    re.compile(r"auto|(cpu|cuda|mps|xpu)(:\d+)?").fullmatch,
)
NAME = (
    "letters, digits and _ . + = - with no dot first or last",
    re.compile(r"(?!\.)[\w.+=-]*(?<!\.)").fullmatch,
)


def option(group: str, default: Any, help: str, needed: Any = ("", lambda value: True)) -> Any:
    """Declare one option: a field of ``Options`` and a line of ``--help``."""
    return field(default=default, metadata={"group": group, "help": help, "needed": needed})


def flag(name: str) -> str:
    """Return the command-line spelling of a field of ``Options``."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Options:
    """One experiment; the defaults are the post's. ``ValueError`` for a value that cannot be."""

    image_size: int = option("model", 32, "height and width in pixels", SIZE)
    latent_size: int = option("model", 10, "latent dimensions", COUNT)
    batch_norm: bool = option("model", False, "batch normalisation in encoder and decoder")

    likelihood: str = option("loss", "gaussian", "reconstruction loss", LIKELIHOOD)
    beta: float = option("loss", 0.1, "weight of the KL divergence; 1 is the ELBO", WEIGHT)
    beta_schedule: str = option("loss", "constant", "schedule of beta", BETA_SCHEDULE)
    warmup_epochs: int = option("loss", 100, "length of the linear warm-up from 0")
    cycles: int = option("loss", 4, "cycles of the cyclical schedule", COUNT)

    epochs: int = option("training", 500, "passes over the training pictures", COUNT)
    batch_size: int = option("training", 64, "pictures in a batch", COUNT)
    learning_rate: float = option("training", 1e-4, "learning rate of Adam", RATE)
    lr_schedule: str = option("training", "constant", "cosine: falls to 0", LR_SCHEDULE)
    augment: bool = option("training", False, "flip, shift, turn, zoom and tint at random")
    seed: int = option("training", 0, "of weights, order and noise; a run repeats exactly", SEED)
    device: str = option("training", "auto", "cpu, cuda, mps ...; auto: an accelerator", DEVICE)

    dataset: str = option("data", "auto", "auto: flowers102, or synthetic if offline", DATASET)
    data_root: str = option("data", str(ROOT / "datasets"), "folder that holds flowers-102")

    log_dir: str = option("output", str(RUNS), "folder of all runs")
    run_name: str = option("output", "", "folder of this run (default: date and time)", NAME)
    checkpoint_every: int = option("output", 10, "epochs between two checkpoints", COUNT)

    def __post_init__(self) -> None:
        """Check every value, so that nothing starts that cannot end well."""
        for each in fields(self):
            kind: Any = each.type
            given, (words, holds) = getattr(self, each.name), each.metadata["needed"]
            try:
                # NumPy's numbers and paths become plain values, as a checkpoint needs them.
                value = os.fspath(given) if kind is str else given
                plain = kind(value)
                fits = plain == value and holds(plain)
            except (TypeError, ValueError, OverflowError, RuntimeError):
                fits = False
            if not fits:
                needed = words or kind.__name__
                raise ValueError(f"{flag(each.name)} is {given!r}: {needed} is needed")
            object.__setattr__(self, each.name, plain)
        object.__setattr__(self, "data_root", os.path.abspath(self.data_root))  # from anywhere
        if self.beta_schedule == "linear" and not 0 <= self.warmup_epochs <= self.epochs:
            needed = f"0 to {self.epochs} (--epochs) is needed"
            raise ValueError(f"--warmup-epochs is {self.warmup_epochs}: {needed}")

    def beta_at(self, epoch: int) -> float:
        """Return the weight of the KL divergence in an epoch, counted from 0."""
        if self.beta_schedule == "linear":  # up from 0 in the warm-up (Bowman et al. 2016)
            return self.beta * min(1.0, epoch / self.warmup_epochs if self.warmup_epochs else 1.0)
        if self.beta_schedule == "cyclical":  # in the first half of each cycle (Fu et al. 2019)
            return self.beta * min(1.0, 2 * (epoch / self.epochs * self.cycles % 1))
        return self.beta

    def learning_rate_at(self, epoch: int) -> float:
        """Return Adam's learning rate in an epoch, counted from 0."""
        if self.lr_schedule == "cosine":
            return self.learning_rate * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
        return self.learning_rate


PRESETS: dict[str, dict[str, Any]] = {
    "post": {},
    # Chosen on the validation split; results/practical_aspects.md has what each part buys.
    "best": {"epochs": 1500, "learning_rate": 2e-3, "lr_schedule": "cosine", "augment": True},
}


class Command(NamedTuple):
    """What the command line asks for; ``given`` are the options that it or its preset names."""

    options: Options
    given: dict[str, Any]
    start: str
    folder: Path


def read_command_line(description: str, arguments: Sequence[str] | None = None) -> Command:
    """Read the options of a run, where it starts and how: "new", "overwrite" or "resume"."""
    parser = Parser(description=description, usage="%(prog)s [options]")
    parser.add_argument("--preset", choices=PRESETS, default="post", help="default: post")
    groups: dict[str, Any] = {}
    for each in fields(Options):
        name, text, (words, _) = (each.metadata[part] for part in ("group", "help", "needed"))
        group = groups.setdefault(name, parser.add_argument_group(name))
        how: Any = {"action": BooleanOptionalAction} if each.type is bool else {"type": each.type}
        if each.default != "":
            text += f" ({words + '; ' if words else ''}default: {each.default})"
        group.add_argument(flag(each.name), default=SUPPRESS, help=text, **how)
    output = groups["output"].add_mutually_exclusive_group()
    output.add_argument("--overwrite", action="store_true", help="replace a run of the same name")
    output.add_argument("--resume", metavar="RUN", help="go on with a run: its name or its folder")
    given = vars(parser.parse_args(arguments))
    preset, overwrite, resume = (given.pop(name) for name in ("preset", "overwrite", "resume"))
    given = PRESETS[preset] | given
    try:
        options = Options(**given)
        name = resume or options.run_name or f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
        folder, start = Path(options.log_dir) / name, "overwrite" if overwrite else "new"
        if resume is not None:
            # A run on synthetic flowers has that in its name.
            known = (folder, folder.with_name(f"{folder.name}-synthetic"))
            folder = next((each for each in known if each.is_dir()), Path(resume))
            start = "resume"
        check_folder(folder, start)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return Command(options, given, start, folder)


def check_folder(folder: Path, start: str) -> None:
    """Raise ``ValueError`` unless a run can start in ``folder`` as ``start`` says."""
    # A run that ended before its first checkpoint has left its lock.
    content = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if start not in ("new", "resume", "overwrite"):
        raise ValueError(f"start is {start!r}: new, resume or overwrite is needed")
    if start == "resume" and "checkpoint.pt" not in content:
        missing = f"{folder}/checkpoint.pt does not exist"
        raise ValueError(f"{missing}: a checkpoint.pt of a run is needed")
    if start == "new" and content - {".lock"}:
        ways = "another --run-name, --resume to go on with it, or --overwrite to replace it"
        raise ValueError(f"{folder} exists already: give {ways}")
    if start == "overwrite" and content and not content & {"checkpoint.pt", ".lock"}:
        raise ValueError(f"{folder} is not a run (no checkpoint.pt in it): it is not replaced")


def resumed_options(config: dict[str, Any], given: dict[str, Any]) -> Options:
    """Return an interrupted run's options, with what may change as given now; else refuse."""
    known = config.keys() & Options.__dataclass_fields__
    before = Options(**{name: config[name] for name in known})
    free = {"data_root", "log_dir", "device", "checkpoint_every"}
    constant = before.beta_schedule == before.lr_schedule == "constant"
    if constant and given.get("epochs", before.epochs) >= before.epochs:
        free.add("epochs")
    changes = [
        f"{flag(name)} {value} (the run has {getattr(before, name)})"
        for name, value in given.items()
        if name not in free and value != getattr(before, name)
    ]
    if changes:
        refusal = f"a resumed run stays the same experiment: leave out {', '.join(changes)}"
        raise ValueError(f"{refusal} (--epochs may grow where both schedules are constant)")
    return replace(before, **given)
