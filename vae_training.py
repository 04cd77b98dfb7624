"""Train the post's variational autoencoder: ``python vae_training.py``."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms import CenterCrop, Compose, Resize, ToTensor
from torchvision.utils import make_grid
from tqdm import tqdm

from datasets.preprocessing import InMemory, UserError, augment
from vae.losses import ELBOLoss
from vae.report import opening, report, summary, write_validation
from vae.run import Run, check_options, folder_of, one_line_errors, saved_options
from vae.vae import VAE

ROOT = Path(__file__).parent


@dataclass(frozen=True)
class Options:
    """One experiment; the defaults are the post's."""

    # flowers102, dtd, synthetic or a folder of pictures; auto: flowers102, or synthetic if offline
    dataset: str = "auto"
    data_root: str = str(ROOT / "datasets")  # folder of flowers-102, downloaded to it if missing
    image_size: int = 32  # height and width in pixels, a multiple of 8
    crop: bool = False  # keep the middle square of each picture, do not squeeze it
    augment: bool = False  # flip, shift, turn, zoom and tint the training pictures at random

    latent_size: int = 10  # latent dimensions
    batch_norm: bool = False  # batch normalisation in encoder and decoder
    likelihood: Literal["gaussian", "bernoulli"] = "gaussian"  # squared error or cross-entropy
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
        check_options(self)


# Chosen on the validation split; results/practical_aspects.md has what each part buys.
BEST = Options(epochs=1500, learning_rate=0.002, lr_schedule="cosine", augment=True)


def train(
    options: Options, folder: Path | str, resume: bool = False, progress: bool = True
) -> tuple[VAE, dict[str, Any]]:
    """Run the post's training loop in ``folder``; ``resume`` goes on with the run there.

    Returns the model and what is in ``metrics.json``. ``UserError`` if options, pictures and folder
    do not fit together, ``FloatingPointError`` if a loss or weight stops being finite.
    """
    size, num_epochs = options.image_size, options.epochs
    with Run(options, folder, resume) as run:  # locks the folder; lets Ctrl-C wait for an epoch
        # Squeeze every picture into a square, as in the post, or keep only its middle square
        crop = [Resize(size), CenterCrop(size)] if options.crop else [Resize((size, size))]
        pipeline = Compose([*crop, ToTensor()])
        # Load Flowers102, or what --dataset names; decode each picture once, through the pipeline
        training_data = InMemory(run.dataset(split="train", transform=pipeline), progress)
        validation_data = InMemory(run.dataset(split="val", transform=pipeline), progress)
        test_data = InMemory(run.dataset(split="test", transform=pipeline), progress)
        splits = training_data, validation_data, test_data

        # Shuffle and batch the data
        train_dataloader = DataLoader(training_data, batch_size=options.batch_size, shuffle=True)
        test_dataloader = DataLoader(test_data, batch_size=5, shuffle=True)

        # Initialize model, loss and optimiser
        channels = len(training_data[0][0])  # 3 for RGB; an item is a picture and its label
        model = VAE((size, size), options.latent_size, channels, options.batch_norm)
        # For speed alone: channels_last for the convolutions, fused for Adam's step
        model.to(run.device).to(memory_format=torch.channels_last)
        loss = ELBOLoss(options.beta, options.likelihood)
        optimiser = torch.optim.Adam(model.parameters(), lr=options.learning_rate, fused=True)
        first_epoch = run.begin(model, optimiser, *splits)  # 0, or where a resumed run goes on
        writer = run.enter_context(SummaryWriter(folder))  # closed when the run ends
        if progress:
            print(opening(run, model, splits, first_epoch))
        # Main training loop; None shows its progress bar on terminals only
        batch_num = first_epoch * len(train_dataloader)
        bar = {"initial": first_epoch, "total": num_epochs, "disable": None if progress else True}
        for epoch in tqdm(range(first_epoch, num_epochs), dynamic_ncols=True, **bar):
            run.seed(epoch)  # so that a resumed run draws the same noise as an unbroken one
            loss.beta = run.beta_at(epoch)  # constant, as in the post, or --beta-schedule
            optimiser.param_groups[0]["lr"] = run.learning_rate_at(epoch)  # or --lr-schedule
            model.train()
            for train_features, _ in train_dataloader:
                train_features = train_features.to(run.device, memory_format=torch.channels_last)
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
                losses = {"KL Loss": kl_loss, "Reconstruction Loss": reconstruction_loss}
                writer.add_scalars("loss", losses | {"Total Loss": total_loss}, batch_num)
                # Step 5: compute the gradients
                total_loss.backward()
                # Step 6: take the gradient descent step
                optimiser.step()
                batch_num += 1

            # At the end of every epoch, create reconstructions of one batch of test data
            model.eval()
            test_features, _ = next(iter(test_dataloader))  # others in every epoch
            with torch.no_grad():
                reconstructions, means, log_vars = model(test_features.to(run.device))
            writer.add_image("originals", make_grid(test_features), epoch)
            writer.add_image("reconstructions", make_grid(reconstructions), epoch)
            write_validation(writer, model, loss, splits, epoch)  # beyond the post: samples
            if progress:
                tqdm.write(
                    f"Epoch: {epoch}, Reconstruction Loss: {reconstruction_loss:.2f}, "
                    f"KL Loss: {kl_loss:.2f}, Total Loss: {total_loss:.2f}"
                )
            run.save(model, optimiser, epoch + 1)  # if --checkpoint-every or Ctrl-C asks for it
        run.seed(num_epochs)  # the report draws the same, resumed or not
        return model, report(run, writer, model, splits)


@dataclass(frozen=True)
class Command:
    """Train a variational autoencoder, as in the post or as the options say."""

    experiment: tyro.conf.OmitArgPrefixes[Options] = Options()
    preset: Literal["post", "best"] = "post"  # the other options' defaults
    log_dir: Path = ROOT / "vae" / "runs"  # folder of all runs
    run_name: str = ""  # folder of this run; if none is given: date and time
    resume: str = ""  # name or folder of a run to go on with, for more --epochs too


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says, and say how good the model is."""
    with one_line_errors():
        parse = partial(tyro.cli, Command, prog="vae_training.py", args=arguments)
        command = parse()
        if command.resume and (command.preset == "best" or command.run_name):
            raise UserError("a resumed run keeps its own: leave out --preset and --run-name")
        folder = folder_of(command)
        if command.resume or command.preset == "best":  # once more, from other defaults
            start = saved_options(Options, folder) if command.resume else BEST
            command = parse(default=Command(start))
        _, metrics = train(command.experiment, folder, bool(command.resume))
        print(summary(metrics, folder))


if __name__ == "__main__":
    main()
