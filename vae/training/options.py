"""One experiment: its options, presets and schedules. PyTorch is not imported here.

So ``--help``, and every refusal that needs no data, come before PyTorch has been loaded.
"""

import argparse
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from vae.training.command_line import ROOT, RUNS, Parser


class Needed(NamedTuple):
    """What an option's value has to be: in words, and as a check."""

    words: str
    holds: Callable[[Any], bool]


def one_of(*choices: str) -> Needed:
    """Return the need for one of a few words."""
    return Needed(f"one of {', '.join(choices)}", lambda value: value in choices)


LIKELIHOOD = one_of("gaussian", "bernoulli", "sigma")
BETA_SCHEDULE = one_of("constant", "linear", "cyclical")
LR_SCHEDULE = one_of("constant", "cosine")
DATASET = one_of("auto", "flowers102", "synthetic")
COUNT = Needed("1 to 1000000", lambda value: 1 <= value <= 10**6)
SIZE = Needed("a multiple of 8", lambda value: value >= 8 and value % 8 == 0)
WEIGHT = Needed("a number of at least 0", lambda value: 0 <= value < math.inf)
RATE = Needed("a number above 0", lambda value: 0 < value < math.inf)
SEED = Needed("0 to 2**32 - 1", lambda value: 0 <= value < 2**32)
DEVICE = Needed(
    "auto, cpu, cuda, cuda:1, mps or xpu",
    lambda value: re.fullmatch(r"auto|(cpu|cuda|mps|xpu)(:\d+)?", value),
)
NAME = Needed(
    "letters, digits and _ . + = - with no dot first or last",
    lambda value: re.fullmatch(r"[\w.+=-]*", value) and value.strip(".") == value,
)
ANY = Needed("", lambda value: True)


def option(group: str, default: Any, help: str, needed: Needed = ANY) -> Any:
    """Declare one option: a field of ``Options`` and a line of ``--help``."""
    return field(default=default, metadata={"group": group, "help": help, "needed": needed})


def flag(name: str) -> str:
    """Return the command-line spelling of a field of ``Options``."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Options:
    """One experiment. The defaults are the post's.

    Raises:
        ValueError: for a value that no experiment can have.
    """

    image_size: int = option("model", 32, "height and width in pixels", SIZE)
    latent_size: int = option("model", 10, "latent dimensions", COUNT)
    batch_norm: bool = option("model", False, "batch normalisation in encoder and decoder")

    likelihood: str = option("loss", "gaussian", "reconstruction loss", LIKELIHOOD)
    beta: float = option("loss", 0.1, "weight of the KL divergence; 1 is the ELBO", WEIGHT)
    beta_schedule: str = option("loss", "constant", "how beta gets there", BETA_SCHEDULE)
    warmup_epochs: int = option("loss", 100, "length of the linear warm-up from 0")
    cycles: int = option("loss", 4, "cycles of the cyclical schedule", COUNT)

    epochs: int = option("training", 500, "passes over the training pictures", COUNT)
    batch_size: int = option("training", 64, "pictures in a batch", COUNT)
    learning_rate: float = option("training", 1e-4, "of Adam", RATE)
    lr_schedule: str = option("training", "constant", "cosine: down to 0", LR_SCHEDULE)
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
            value, needed = getattr(self, each.name), each.metadata["needed"]
            plain = as_plain(value, each.type)
            if plain is None or not needed.holds(plain):
                words = needed.words or each.type.__name__
                raise ValueError(f"{flag(each.name)} is {value!r}: {words} is needed")
            # A resumed run finds its pictures from another folder, too.
            plain = os.path.abspath(plain) if each.name == "data_root" else plain
            object.__setattr__(self, each.name, plain)
        if self.beta_schedule == "linear" and not 0 <= self.warmup_epochs <= self.epochs:
            raise ValueError(
                f"--warmup-epochs is {self.warmup_epochs}: 0 to {self.epochs} (--epochs) is needed"
            )

    def beta_at(self, epoch: int) -> float:
        """Return the weight of the KL divergence in an epoch, counted from 0.

        ``"linear"`` rises from 0 to ``beta`` over the warm-up (Bowman et al. 2016);
        ``"cyclical"`` does so over the first half of each cycle (Fu et al. 2019).
        """
        if self.beta_schedule == "linear":
            return self.beta * min(1.0, epoch / self.warmup_epochs if self.warmup_epochs else 1.0)
        if self.beta_schedule == "cyclical":
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


def as_plain(value: Any, kind: type) -> Any:
    """Return NumPy's numbers and paths as plain Python values; None for another kind of value."""
    if kind is str:
        return str(value) if isinstance(value, str | PathLike) else None
    try:
        plain = kind(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return plain if plain == value else None


class Command(NamedTuple):
    """What the command line of ``vae_training.py`` asks for."""

    options: Options
    given: dict[str, Any]
    """The options that were given, those of the preset included."""
    start: str
    """``"new"``, ``"overwrite"`` or ``"resume"``."""
    folder: Path


def read_command_line(description: str, arguments: Sequence[str] | None = None) -> Command:
    """Read the options of a run, and how and where it starts.

    Raises:
        SystemExit: after ``--help``, or with one line and status 2 for what cannot be done.
    """
    parser = Parser(description=description, usage="%(prog)s [options]")
    parser.add_argument("--preset", choices=PRESETS, default="post", help="default: post")
    groups: dict[str, Any] = {}
    for each in fields(Options):
        name, text, needed = (each.metadata[part] for part in ("group", "help", "needed"))
        group = groups.setdefault(name, parser.add_argument_group(name))
        if each.default != "":
            text += f" ({needed.words + '; ' if needed.words else ''}default: {each.default})"
        kind = (
            {"action": argparse.BooleanOptionalAction}
            if each.type is bool
            else {"type": each.type, "metavar": each.type.__name__.upper()}
        )
        group.add_argument(flag(each.name), default=argparse.SUPPRESS, help=text, **kind)
    output = groups["output"].add_mutually_exclusive_group()
    output.add_argument("--overwrite", action="store_true", help="replace a run of the same name")
    output.add_argument("--resume", metavar="RUN", help="go on with a run: its name or its folder")
    given = vars(parser.parse_args(arguments))
    preset, overwrite, resume = (given.pop(name) for name in ("preset", "overwrite", "resume"))
    start = "resume" if resume is not None else "overwrite" if overwrite else "new"
    try:
        options = Options(**PRESETS[preset] | given)
        name = resume or options.run_name or datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        folder = Path(options.log_dir) / name
        if resume is not None:
            # A run on synthetic flowers has that in its name.
            known = (folder, folder.with_name(f"{folder.name}-synthetic"))
            folder = next((each for each in known if each.is_dir()), Path(resume))
        check_folder(folder, start)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return Command(options, PRESETS[preset] | given, start, folder)


def check_folder(folder: Path, start: str) -> None:
    """Raise ``ValueError`` unless a run can start in ``folder`` as ``start`` says."""
    if start not in ("new", "resume", "overwrite"):
        raise ValueError(f"start is {start!r}: new, resume or overwrite is needed")
    content = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if start == "resume":
        if "checkpoint.pt" not in content:
            raise ValueError(
                f"{folder / 'checkpoint.pt'} does not exist: a checkpoint.pt of a run is needed"
            )
    # A run that ended before its first checkpoint has left its lock.
    elif content - {".lock"} and start == "new":
        raise ValueError(
            f"{folder} exists already: give another --run-name, --resume {folder.name} to go on "
            "with it, or --overwrite to replace it"
        )
    elif content and not content & {"checkpoint.pt", ".lock"}:
        raise ValueError(f"{folder} is not a run (no checkpoint.pt in it): it is not replaced")


def resumed_options(config: dict[str, Any], given: dict[str, Any]) -> Options:
    """Return the options of an interrupted run, with what may change as given now.

    Raises:
        ValueError: if ``given`` would make it another experiment.
    """
    known = {each.name for each in fields(Options)}
    before = Options(**{name: value for name, value in config.items() if name in known})
    free = {"data_root", "log_dir", "device", "checkpoint_every"}
    if before.beta_schedule == before.lr_schedule == "constant" and (
        given.get("epochs", before.epochs) >= before.epochs
    ):
        free.add("epochs")
    changes = [
        f"{flag(name)} {value} (the run has {getattr(before, name)})"
        for name, value in given.items()
        if name not in free and value != getattr(before, name)
    ]
    if changes:
        raise ValueError(
            f"a resumed run stays the same experiment, but was given {', '.join(changes)}: leave "
            "this out, or start a new run (--epochs may grow where both schedules are constant)"
        )
    return replace(before, **given)
