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
from torch.utils.tensorboard import SummaryWriter
from torchvision.datasets import DTD, Flowers102
from torchvision.transforms import Compose, ToTensor
from torchvision.utils import make_grid
from tqdm import tqdm

from datasets import find_dataset
from datasets.errors import UserError
from datasets.memory import InMemory
from datasets.preprocessing import augment, resize_to
from datasets.synthetic import SyntheticFlowers
from vae.checkpoint import load_checkpoint, saved_options
from vae.command_line import check, check_choices, new_folder, one_line_errors, run_to_resume
from vae.losses import ELBOLoss, annealed_beta
from vae.report import opening, report, summary, write_validation
from vae.run import Run
from vae.vae import VAE

ROOT = Path(__file__).parent

# What --dataset may name, besides a folder of pictures. Each is a class like torchvision's, made
# with (root, split, transform, download), where split is "train", "val" or "test"; one of your own
# is one more entry.
DATASETS = {"flowers102": Flowers102, "dtd": DTD, "synthetic": SyntheticFlowers}

VALIDATE_EVERY = 10  # epochs between two looks at the validation pictures


@dataclass(frozen=True)
class Options:
    """One experiment; the defaults are the post's."""

    # flowers102, dtd, synthetic or a folder of pictures; auto: flowers102, or synthetic if offline
    dataset: str = "auto"
    data_root: Path = ROOT / "datasets"  # folder of flowers-102, downloaded to it if missing
    image_size: int = 32  # height and width in pixels, a multiple of 8
    crop: bool = False  # keep the middle square of each picture, do not squeeze it
    augment: bool = False  # flip, shift, turn, zoom and tint the training pictures at random

    latent_size: int = 10  # latent dimensions
    batch_norm: bool = False  # batch normalisation in encoder and decoder
    # squared error; cross-entropy; sigma: a Gaussian with the best variance, made for beta 1
    likelihood: Literal["gaussian", "bernoulli", "sigma"] = "gaussian"
    beta: float = 0.1  # weight of the KL divergence; 1 is the weight in the ELBO
    beta_schedule: Literal["constant", "linear", "cyclical"] = "constant"  # the others rise from 0
    warmup_epochs: int = 100  # linear: in how many epochs beta rises
    cycles: int = 4  # cyclical: how many times beta rises

    epochs: int = 500  # passes over the training pictures
    batch_size: int = 64  # pictures in a batch
    learning_rate: float = 0.0001  # of Adam
    lr_schedule: Literal["constant", "cosine"] = "constant"  # cosine: it falls to 0
    seed: int = 0  # of weights, order and noise: a run repeats exactly
    device: str = "auto"  # cpu, cuda, cuda:1, mps or xpu; auto: an accelerator, if there is one
    checkpoint_every: int = 10  # epochs between two checkpoints

    def __post_init__(self) -> None:
        """Raise ``UserError`` for an impossible value."""
        check_choices(self)
        for name in ("latent_size", "cycles", "epochs", "batch_size", "checkpoint_every"):
            check(f"--{name.replace('_', '-')}", getattr(self, name), 1)
        for name in ("warmup_epochs", "beta", "learning_rate"):
            check(f"--{name.replace('_', '-')}", getattr(self, name), 0)
        check("--seed", self.seed, 0, 2**32 - 1)
        if self.learning_rate == 0:
            raise UserError("--learning-rate is 0.0: more than 0 is needed")
        if self.image_size < 8 or self.image_size % 8:
            raise UserError(f"--image-size is {self.image_size}: a multiple of 8 is needed")


# Chosen on the validation split; results/practical_aspects.md has what each part buys.
BEST = Options(epochs=1500, learning_rate=0.002, lr_schedule="cosine", augment=True)


def learning_rate_schedule(optimiser: torch.optim.Optimizer, options: Options) -> LRScheduler:
    """Return the scheduler that --lr-schedule names, for a step after every epoch."""
    if options.lr_schedule == "cosine":
        return CosineAnnealingLR(optimiser, T_max=options.epochs)
    return ConstantLR(optimiser, factor=1.0)


def train(
    options: Options, folder: Path | str, resume: bool = False, progress: bool = True
) -> tuple[VAE, dict[str, Any]]:
    """Run the post's training loop in ``folder``; ``resume`` goes on with the run there.

    Returns the model and what is in ``metrics.json``. ``UserError`` if options, pictures and folder
    do not fit together, ``FloatingPointError`` if a loss or weight stops being finite.
    """
    size, num_epochs = options.image_size, options.epochs
    # Flowers102, or what else --dataset names; downloaded, if it is missing
    name, dataset = find_dataset(options.dataset, options.data_root, DATASETS)
    options = replace(options, dataset=name)

    # A run holds its folder and the seeds of all random numbers, and lets Ctrl-C wait for an epoch
    with Run(options, folder, resume) as run:
        # Image preprocessing pipeline: a square of size x size pixels, as a tensor. It runs once
        # for each picture, so nothing in it may be random: that belongs into the loop, as augment()
        pipeline = Compose([resize_to((size, size), options.crop), ToTensor()])
        # Read each picture once and keep it in memory, which takes less time than in every epoch
        training_data = InMemory(dataset(split="train", transform=pipeline), progress)
        validation_data = InMemory(dataset(split="val", transform=pipeline), progress)
        test_data = InMemory(dataset(split="test", transform=pipeline), progress)
        splits = training_data, validation_data, test_data

        # Shuffle and batch the data
        train_dataloader = DataLoader(training_data, batch_size=options.batch_size, shuffle=True)
        test_dataloader = DataLoader(test_data, batch_size=5, shuffle=True)

        # Initialize model, loss and optimiser. What the model is built of stands in its checkpoint,
        # from which it is built again
        picture, _ = training_data[0]
        architecture: dict[str, Any] = {
            "image_resolution": (size, size),
            "latent_size": options.latent_size,
            "image_channels": len(picture),  # 3 for RGB
            "batch_norm": options.batch_norm,
        }
        model = VAE(**architecture).to(run.device)
        model.to(memory_format=torch.channels_last)  # an order in which convolutions are faster
        loss = ELBOLoss(options.beta, options.likelihood)
        # fused: one step for all weights together, which is faster
        optimiser = torch.optim.Adam(model.parameters(), lr=options.learning_rate, fused=True)
        scheduler = learning_rate_schedule(optimiser, options)

        # Whatever has a state_dict and stands here is saved, and goes on in a resumed run
        state = {"model": model, "loss": loss, "optimiser": optimiser, "scheduler": scheduler}
        first_epoch = run.begin(state, architecture, splits)
        if progress:
            print(opening(run, model, splits, first_epoch))

        # Main training loop
        batch_num = first_epoch * len(train_dataloader)
        with SummaryWriter(folder) as writer:
            for epoch in tqdm(
                range(first_epoch, num_epochs),
                initial=first_epoch,
                total=num_epochs,
                dynamic_ncols=True,
                disable=None if progress else True,  # None: a bar on terminals only
            ):
                run.seed(epoch)  # so that a resumed run draws the same as an unbroken one
                # The post's advice of a low beta at first, if --beta-schedule asks for it
                loss.beta = annealed_beta(
                    options.beta,
                    options.beta_schedule,
                    epoch,
                    num_epochs,
                    options.warmup_epochs,
                    options.cycles,
                )
                writer.add_scalar("schedule/beta", loss.beta, epoch)
                learning_rate = optimiser.param_groups[0]["lr"]
                writer.add_scalar("schedule/learning_rate", learning_rate, epoch)

                model.train()
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
                    # Step 3: calculate the loss
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
                scheduler.step()

                # At the end of every epoch, create reconstructions of one batch of test data; it is
                # shuffled, so that each epoch shows other pictures
                model.eval()
                test_features, _ = next(iter(test_dataloader))
                with torch.no_grad():
                    reconstructions, means, log_vars = model(test_features.to(run.device))
                writer.add_image("originals", make_grid(test_features), epoch)
                writer.add_image("reconstructions", make_grid(reconstructions), epoch)

                loss.beta = options.beta  # whatever is measured, is measured with the final one
                if (epoch + 1) % VALIDATE_EVERY == 0:
                    write_validation(writer, model, loss, splits, epoch)
                if progress:
                    tqdm.write(
                        f"Epoch: {epoch}, Reconstruction Loss: {reconstruction_loss:.2f}, "
                        f"KL Loss: {kl_loss:.2f}, Total Loss: {total_loss:.2f}"
                    )
                run.end_epoch(epoch)  # saves, if --checkpoint-every or Ctrl-C asks for it

            run.seed(num_epochs)  # the report draws the same, resumed or not
            model.eval()
            return model, report(run, writer, model, loss, splits)


@dataclass(frozen=True)
class Command:
    """Train a variational autoencoder, as in the post or as the options say."""

    experiment: tyro.conf.OmitArgPrefixes[Options] = Options()
    preset: Literal["post", "best"] = "post"  # the other options' defaults
    log_dir: Path = ROOT / "vae" / "runs"  # folder of all runs
    run_name: str = ""  # folder of this run; if none is given: date and time
    resume: str = ""  # name or folder of a run to go on with, for more --epochs too


def read_command_line(arguments: Sequence[str] | None) -> Command:
    """Return what the command line says.

    The defaults of what it does not say are the preset's, or those of the run to resume. Which of
    them is on the command line too, so it is read once for that, and once more with those defaults.
    """
    parse = partial(tyro.cli, Command, prog="vae_training.py", args=arguments)
    command = parse()
    if command.resume:
        if command.preset != "post" or command.run_name:
            raise UserError("a resumed run keeps its own: leave out --preset and --run-name")
        path = run_to_resume(command.log_dir, command.resume) / "checkpoint.pt"
        return parse(default=Command(saved_options(Options, load_checkpoint(path), path)))
    if command.preset == "best":
        return parse(default=Command(BEST))
    return command


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says, and say how good the model is."""
    with one_line_errors():
        command = read_command_line(arguments)
        options = command.experiment
        place: AbstractContextManager[Path]
        if command.resume:
            place = nullcontext(run_to_resume(command.log_dir, command.resume))
        elif command.run_name:
            place = nullcontext(command.log_dir / command.run_name)
        else:
            # Where Flowers102 is not to be had, the folder's name says what is taken instead
            name, _ = find_dataset(options.dataset, options.data_root, DATASETS)
            options = replace(options, dataset=name)
            place = new_folder(command.log_dir, name)
        with place as folder:
            _, metrics = train(options, folder, resume=bool(command.resume))
            print(summary(metrics, folder))


if __name__ == "__main__":
    main()
