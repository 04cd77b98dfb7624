"""Train the post's variational autoencoder: ``python vae_training.py``."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler
from torch.utils.data import DataLoader
from torchvision.datasets import DTD, Flowers102
from torchvision.utils import make_grid
from tqdm import tqdm

from datasets import find_dataset
from datasets.errors import UserError
from datasets.memory import InMemory
from datasets.preprocessing import augment, image_pipeline
from datasets.synthetic import SyntheticFlowers
from vae.checkpoint import load_checkpoint, load_weights, saved_options
from vae.command_line import (
    check,
    check_choices,
    find_checkpoint,
    new_folder,
    one_line_errors,
    run_to_resume,
    with_home,
)
from vae.history import HistoryWriter
from vae.losses import ELBOLoss, annealed_beta
from vae.page import keep_moment, page_at_an_early_end
from vae.report import Splits, opening_text, write_report, write_validation
from vae.run import Run
from vae.summary import summary_text
from vae.vae import VAE

ROOT = Path(__file__).parent

# What --dataset may name, besides a folder of pictures and all others of torchvision's classes. A
# class of your own is one more entry; the top of datasets/__init__.py says what it takes and gives.
# So is one of torchvision's with arguments: "letters": partial(EMNIST, split="letters").
DATASETS = {"flowers102": Flowers102, "dtd": DTD, "synthetic": SyntheticFlowers}

VALIDATE_EVERY = 10  # epochs between two looks at the validation pictures, for TensorBoard alone


# On the command line each field is an option, and the comment at it is its help.
@dataclass(frozen=True)
class Options:
    """One experiment; the defaults are the post's."""

    # a folder of pictures; or flowers102, dtd or another of torchvision's data sets of labelled
    # pictures, such as MNIST; or synthetic: drawn by a program; auto: flowers102, or synthetic if
    # that is not here and cannot be downloaded
    dataset: str = "auto"
    # folder in which a data set has its own folder, as flowers-102 or MNIST; downloaded if missing
    data_root: Path = ROOT / "datasets"
    image_size: int = 32  # height and width in pixels, a multiple of 8
    crop: bool = False  # keep the middle square of each picture, do not squeeze it
    augment: bool = False  # flip, shift, turn, zoom and tint the training pictures at random

    latent_size: int = 10  # latent dimensions
    batch_norm: bool = False  # batch normalisation in encoder and decoder
    # gaussian: squared error; bernoulli: cross-entropy; sigma: gaussian with a fitted variance, to
    # be used with beta 1
    likelihood: Literal["gaussian", "bernoulli", "sigma"] = "gaussian"
    beta: float = 0.1  # weight of the KL divergence; 1 is the weight in the ELBO
    beta_schedule: Literal["constant", "linear", "cyclical"] = "constant"  # the others rise from 0
    warmup_epochs: int = 100  # linear: in how many epochs beta rises
    cycles: int = 4  # cyclical: how many times beta rises, at most half as many as --epochs

    epochs: int = 500  # passes over the training pictures
    batch_size: int = 64  # pictures in a batch
    learning_rate: float = 0.0001  # of Adam
    lr_schedule: Literal["constant", "cosine"] = "constant"  # cosine: it falls to 0
    # begin with the weights of another model of the same architecture: petals, ten, a run's name or
    # folder, or a file
    start_from: Path | None = None
    seed: int = 0  # of weights, order and noise: a run repeats exactly
    device: str = "auto"  # cpu, cuda, cuda:1, mps or xpu; auto: an accelerator, if there is one
    checkpoint_every: int = 10  # epochs between two checkpoints

    def __post_init__(self) -> None:
        """Raise ``UserError`` for an impossible value."""
        check_choices(self)  # in Python, too, where nothing else looks at them
        for name in ("latent_size", "cycles", "epochs", "batch_size", "checkpoint_every"):
            check(f"--{name.replace('_', '-')}", getattr(self, name), low=1)
        for name in ("warmup_epochs", "beta", "learning_rate"):
            check(f"--{name.replace('_', '-')}", getattr(self, name), low=0)
        if self.learning_rate == 0:
            raise UserError("--learning-rate is 0.0: more than 0 is needed")
        check("--seed", self.seed, low=0, high=2**32 - 1)  # as far as NumPy's seeds go
        if self.image_size < 8 or self.image_size % 8:  # the encoder halves it three times
            raise UserError(f"--image-size is {self.image_size}: a multiple of 8 is needed")


# Chosen on the validation split; results/practical_aspects.md has what each part buys. (Warm-up and
# batch norm, which the post advises, make no lower error there.)
BEST = Options(epochs=1500, learning_rate=0.002, lr_schedule="cosine", augment=True)

# The same with more numbers and larger pictures: new flowers have petals. Chosen on the validation
# split, too; results/latent_size.md has what was tried.
PETALS = replace(BEST, image_size=64, latent_size=64, epochs=1000)

# What --preset may name.
PRESETS = {"post": Options(), "best": BEST, "petals": PETALS}


def learning_rate_schedule(optimiser: torch.optim.Optimizer, options: Options) -> LRScheduler:
    """Return the scheduler that --lr-schedule names, for a step after every epoch.

    The cosine reaches 0 at the last epoch, so that a run with it cannot be made longer.
    """
    if options.lr_schedule == "constant":
        return ConstantLR(optimiser, factor=1.0)  # changes nothing, so that the loop needs no "if"
    if options.lr_schedule == "cosine":
        return CosineAnnealingLR(optimiser, T_max=options.epochs)
    raise ValueError(f"there is no schedule for --lr-schedule {options.lr_schedule}")


def train(
    options: Options, folder: Path | str, resume: bool = False, progress: bool = True
) -> tuple[VAE, dict[str, Any]]:
    """Run the post's training loop in ``folder``; ``resume`` goes on with the run there.

    Returns the model and what is in ``metrics.json``. ``UserError`` if options, pictures and folder
    do not fit together, ``FloatingPointError`` if weights are not finite at the end of an
    epoch, or the loss at the end of the run.
    """
    size, num_epochs = options.image_size, options.epochs
    # Flowers102, or what else --dataset names, downloaded if it is missing. Its root is set, so
    # that open_split(split=..., transform=...) is all that it needs
    name, open_split = find_dataset(options.dataset, options.data_root, DATASETS)
    options = replace(options, dataset=name)  # "auto" has become a name

    # Run locks the folder, seeds all random numbers, and delays Ctrl-C to the end of the epoch
    with Run(options, folder, resume) as run:
        # Image preprocessing pipeline: Resize to size x size pixels (or, with --crop, the middle
        # square) and ToTensor. It is in datasets/preprocessing.py, since vae_inference.py prepares
        # the pictures that it is given in the same way
        pipeline = image_pipeline((size, size), options.crop)
        # InMemory reads each picture once, which is faster than reading it in every epoch. So the
        # pipeline may not be random: random changes go into the loop, as augment() does
        training_data = InMemory(open_split(split="train", transform=pipeline), progress)
        validation_data = InMemory(open_split(split="val", transform=pipeline), progress)
        test_data = InMemory(open_split(split="test", transform=pipeline), progress)
        splits = Splits(training_data, validation_data, test_data)

        # Shuffle and batch the data
        train_dataloader = DataLoader(training_data, batch_size=options.batch_size, shuffle=True)
        test_dataloader = DataLoader(test_data, batch_size=5, shuffle=True)

        # Initialize model, loss and optimiser. The architecture is saved with the weights, so that
        # the same model can be built again
        picture, _ = training_data[0]
        architecture: dict[str, Any] = {
            "image_resolution": (size, size),
            "latent_size": options.latent_size,
            "image_channels": picture.shape[0],  # 3 for RGB
            "batch_norm": options.batch_norm,
        }
        model = VAE(**architecture)
        if options.start_from and not resume:
            load_weights(model, architecture, options.start_from)
        model.to(run.device)
        # Another order in memory, in which convolutions are faster; shapes stay as they are. (Leave
        # it out for what sees all weights as one vector, such as LBFGS)
        model.to(memory_format=torch.channels_last)
        loss = ELBOLoss(options.beta, options.likelihood).to(run.device)
        # fused: one step for all weights together, which is faster
        optimiser = torch.optim.Adam(model.parameters(), lr=options.learning_rate, fused=True)
        scheduler = learning_rate_schedule(optimiser, options)

        # What a resumed run goes on from: whatever has a state_dict and stands here is saved, and
        # on --resume loaded, if the pictures are still the same. (The loss has weights to save if
        # you give it some.)
        state = {"model": model, "loss": loss, "optimiser": optimiser, "scheduler": scheduler}
        first_epoch = run.start_or_resume(state, architecture, splits)
        if progress:
            print(opening_text(run, model, splits, first_epoch, len(train_dataloader)))

        # Main training loop, with a SummaryWriter for TensorBoard that also keeps the curves for
        # report.html
        batch_num = first_epoch * len(train_dataloader)
        with (
            HistoryWriter(folder, run.history) as writer,
            page_at_an_early_end(run, model, splits),
        ):
            for epoch in tqdm(
                range(first_epoch, num_epochs),
                initial=first_epoch,
                total=num_epochs,
                dynamic_ncols=True,
                disable=None if progress else True,  # None: a bar on terminals only
            ):
                # So that a resumed run draws the same as an unbroken one; a generator of your own
                # is to be seeded here, too
                run.seed(epoch)
                # The post advises a low beta at first; --beta-schedule does that
                loss.beta = annealed_beta(
                    options.beta,
                    options.beta_schedule,
                    epoch=epoch,
                    epochs=num_epochs,
                    warmup_epochs=options.warmup_epochs,
                    cycles=options.cycles,
                )
                writer.add_scalar("schedule/beta", loss.beta, epoch)
                learning_rate = optimiser.param_groups[0]["lr"]
                writer.add_scalar("schedule/learning_rate", learning_rate, epoch)

                model.train()  # batch norm takes each batch's own statistics
                for train_features, _ in train_dataloader:
                    train_features = train_features.to(
                        run.device, memory_format=torch.channels_last
                    )
                    if options.augment:
                        train_features = augment(train_features)
                    # Step 1: set the gradients to zero
                    optimiser.zero_grad()
                    # Step 2: forward pass through the model
                    reconstructions, means, log_vars = model(train_features)
                    # Step 3: calculate the loss (the first value is beta)
                    _, kl_loss, reconstruction_loss, total_loss = loss(
                        train_features, reconstructions, means, log_vars
                    )
                    # Step 4: write the losses to TensorBoard
                    losses = {
                        "KL Loss": kl_loss,
                        "Reconstruction Loss": reconstruction_loss,
                        "Total Loss": total_loss,
                    }
                    writer.add_scalars("loss", losses, batch_num)
                    # Step 5: compute the gradients
                    total_loss.backward()
                    # Step 6: take the gradient descent step
                    optimiser.step()
                    batch_num += 1
                scheduler.step()  # the next epoch's learning rate

                # At the end of every epoch, create reconstructions of one batch of test data: the
                # first one of a new shuffle, so that batches do not run out
                model.eval()  # batch norm takes the statistics of all batches
                test_features, _ = next(iter(test_dataloader))
                with torch.no_grad():
                    reconstructions, means, log_vars = model(test_features.to(run.device))
                writer.add_image("originals", make_grid(test_features), epoch)
                writer.add_image("reconstructions", make_grid(reconstructions), epoch)
                if progress:  # tqdm.write prints above its bar
                    tqdm.write(
                        f"Epoch: {epoch}, Reconstruction Loss: {reconstruction_loss:.2f}, "
                        f"KL Loss: {kl_loss:.2f}, Total Loss: {total_loss:.2f}"
                    )

                # Validation and report measure with the full --beta, whatever the schedule
                loss.beta = options.beta
                if (epoch + 1) % VALIDATE_EVERY == 0:
                    write_validation(writer, model, loss, splits, epoch)
                keep_moment(run, model, splits, epoch)
                # Saves every --checkpoint-every epochs and after the last; after Ctrl-C it saves
                # and stops
                run.end_epoch(epoch)

            # Measure the model, and write metrics and pictures into the folder
            run.seed(num_epochs)  # as before an epoch: the same numbers, resumed or not
            model.eval()  # a resumed run may have had no epoch left
            metrics = write_report(run, writer, model, loss, splits)
        return model, metrics


@dataclass(frozen=True)
class WhichRun:
    """Which run it is; --preset or --resume tells the defaults of all its other options."""

    # post: the post's setting; best: its ten numbers, trained as well as we can; petals: 64
    # numbers and 64x64 pixels, which draw flowers with petals. Other options change what it sets
    preset: Literal["post", "best", "petals"] = "post"
    resume: str = ""  # name or folder of a run to go on with, for more --epochs too
    log_dir: Path = ROOT / "vae" / "runs"  # folder of all runs
    run_name: str = ""  # folder of this run; if none is given: date, time and data set


@dataclass(frozen=True)
class Command(WhichRun):
    """Train a variational autoencoder, as in the post or as the options say."""

    # (Without OmitArgPrefixes they would be called --experiment.epochs and so on.)

    experiment: tyro.conf.OmitArgPrefixes[Options] = Options()  # the preset's or the run's defaults


def read_command_line(arguments: Sequence[str] | None) -> Command:
    """Return what the command line says.

    It is read twice: first for the preset or the run to resume, then for all options, with those of
    that preset or run as defaults (which ``--preset best --help`` shows).
    """
    parse = partial(tyro.cli, prog="vae_training.py", args=with_home(arguments))
    run, _ = parse(WhichRun, return_unknown_args=True, add_help=False)
    defaults = PRESETS[run.preset]
    if run.resume:
        if run.preset != "post" or run.run_name:
            raise UserError("a resumed run keeps its own: leave out --preset and --run-name")
        path = run_to_resume(run.log_dir, run.resume) / "checkpoint.pt"
        defaults = saved_options(Options, load_checkpoint(path), path)
    return parse(Command, default=Command(experiment=defaults))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says, and say how good the model is."""
    with one_line_errors():
        command = read_command_line(arguments)
        options = command.experiment
        if options.start_from and not command.resume:
            path = find_checkpoint("--start-from", str(options.start_from), command.log_dir)
            options = replace(options, start_from=path)
        # Each of the three gives the run's folder; one that new_folder has made goes again if
        # nothing is written to it
        folder_context: AbstractContextManager[Path]
        if command.resume:
            folder_context = nullcontext(run_to_resume(command.log_dir, command.resume))
        elif command.run_name:
            folder_context = nullcontext(command.log_dir / command.run_name)
        else:
            # Before train() does so: the folder is called after what "auto" turns out to be
            name, _ = find_dataset(options.dataset, options.data_root, DATASETS)
            options = replace(options, dataset=name)
            folder_context = new_folder(command.log_dir, name)
        with folder_context as folder:
            _, metrics = train(options, folder, resume=bool(command.resume))
            print(summary_text(metrics, folder))


if __name__ == "__main__":
    main()
