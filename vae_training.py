"""Train the post's variational autoencoder: ``python vae_training.py``."""

from vae.training.command_line import take_terminal
from vae.training.options import Options, read_command_line

if __name__ == "__main__":
    take_terminal()
    read_command_line(__doc__)  # --help and mistakes are answered before PyTorch is loaded

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torchvision.utils import make_grid
from tqdm import tqdm

from datasets.flowers102 import is_on_disk
from datasets.pictures import Splits, augment, load_splits, whole_batch
from vae.losses import ELBOLoss
from vae.training.checkpoint import load_checkpoint
from vae.training.command_line import one_line_errors
from vae.training.options import resumed_options
from vae.training.report import opening, report, summary, write_losses, write_validation
from vae.training.run import Run, find_device
from vae.vae import VAE


def train(
    options: Options, splits: Splits, folder: Path, start: str = "new", progress: bool = True
) -> tuple[VAE, dict[str, Any]]:
    """Run the post's training loop and leave its results in ``folder``.

    Args:
        options: the experiment; its defaults are the post's.
        splits: the pictures, of ``options.image_size``.
        folder: receives TensorBoard's events, the checkpoint, ``metrics.json`` and pictures.
        start: ``"new"``, ``"resume"`` (go on with the run in ``folder``) or ``"overwrite"`` it.
        progress: print the post's line for each epoch above a progress bar.

    Returns:
        The trained model, and the metrics that are in ``metrics.json``.

    Raises:
        ValueError: if options, pictures and folder do not fit together.
        FloatingPointError: if a loss or weight stops being finite; the last good checkpoint stays.
        KeyboardInterrupt: after SIGINT or SIGTERM, once the epoch is done and saved.
        OSError: if ``folder`` cannot be written to.
    """
    with Run(options, splits, folder, start) as run:
        # Data: all pictures lie decoded in the device's memory, where a batch is one index away
        splits = splits.to(run.device)
        train_dataloader = DataLoader(
            splits.train, batch_size=options.batch_size, shuffle=True, collate_fn=whole_batch
        )
        test_dataloader = DataLoader(
            splits.test, batch_size=5, shuffle=True, collate_fn=whole_batch
        )

        # Model, loss and optimiser
        torch.manual_seed(options.seed)
        model = VAE(
            image_resolution=splits.image_resolution,
            image_channels=3,
            latent_size=options.latent_size,
            batch_norm=options.batch_norm,
        ).to(run.device)
        model.to(memory_format=torch.channels_last)  # the convolutions are faster so
        loss = ELBOLoss(beta=options.beta, likelihood=options.likelihood)
        optimiser = torch.optim.Adam(model.parameters(), lr=options.learning_rate, fused=True)

        # TensorBoard's writer, and epoch 0, or the one that a resumed run goes on with
        writer, first_epoch = run.begin(model, optimiser)
        if progress:
            print(opening(run, model, splits, first_epoch))

        # Main training loop
        epochs = range(first_epoch, options.epochs)
        hidden = None if progress else True  # None: shown on terminals only
        for epoch in tqdm(
            epochs, initial=first_epoch, total=options.epochs, dynamic_ncols=True, disable=hidden
        ):
            run.seed(epoch)  # so that a resumed run draws what the whole run would have drawn
            loss.beta = options.beta_at(epoch)
            optimiser.param_groups[0]["lr"] = options.learning_rate_at(epoch)
            losses = []
            model.train()
            for train_features, _ in train_dataloader:
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
                # Step 4: keep the losses for TensorBoard, on the device: to read them is to wait
                losses.append(torch.stack((kl_loss, reconstruction_loss, total_loss)).detach())
                # Step 5: compute the gradients
                total_loss.backward()
                # Step 6: take the gradient descent step
                optimiser.step()
            kl_loss, reconstruction_loss, total_loss = write_losses(writer, losses, epoch)

            # At the end of every epoch, create reconstructions of one batch of test data
            model.eval()
            test_features, _ = next(iter(test_dataloader))
            with torch.no_grad():
                reconstructions, _, _ = model(test_features)
            writer.add_image("originals", make_grid(test_features), epoch)
            writer.add_image("reconstructions", make_grid(reconstructions), epoch)
            writer.add_scalar("schedule/beta", loss.beta, epoch)
            write_validation(writer, model, loss, splits, epoch)
            if progress:
                tqdm.write(
                    f"Epoch: {epoch}, Reconstruction Loss: {reconstruction_loss:.2f}, "
                    f"KL Loss: {kl_loss:.2f}, Total Loss: {total_loss:.2f}"
                )
            run.save(model, optimiser, epoch + 1)  # if due; here Ctrl-C ends the run

        if progress:
            print("Measuring the trained model on all pictures")
        run.seed(options.epochs)
        return model, report(run, model, splits)


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says, and say how good the model is."""
    command = read_command_line(__doc__, arguments)
    options, folder = command.options, command.folder
    if command.start == "resume":
        checkpoint = load_checkpoint(folder / "checkpoint.pt")
        options = resumed_options(checkpoint["config"], command.given)
        if checkpoint.get("epoch") == options.epochs and "latents" in checkpoint:
            print(f"{folder} is finished: {options.epochs} epochs. --epochs NUMBER adds to them.")
            return
        if options.dataset == "flowers102" and not is_on_disk(Path(options.data_root)):
            raise ValueError(f"{options.data_root} has no flowers-102 any more: give --data-root")
    find_device(options.device)
    size = (options.image_size, options.image_size)
    splits = load_splits(options.dataset, Path(options.data_root), size)
    warning = f"warning: {splits.fallback}. This run is on SYNTHETIC flowers, not on photographs."
    if splits.fallback:
        print(warning, file=sys.stderr)
    if splits.dataset == "synthetic" and command.start != "resume":
        folder = folder.with_name(f"{folder.name.removesuffix('-synthetic')}-synthetic")
    _, metrics = train(options, splits, folder, command.start)
    print(summary(metrics, folder))
    if splits.fallback:
        print(warning)


if __name__ == "__main__":
    main()
