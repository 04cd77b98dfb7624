"""Train the post's variational autoencoder: ``python vae_training.py``."""

from vae.training.command_line import take_terminal
from vae.training.options import Options, read_command_line

if __name__ == "__main__":
    take_terminal()  # from here on Ctrl-C is one line
    read_command_line(__doc__)  # --help and mistakes are answered before PyTorch is loaded

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torchvision.utils import make_grid
from tqdm import tqdm

from datasets.pictures import Splits, augment, whole_batch
from vae.losses import ELBOLoss
from vae.training.command_line import one_line_errors
from vae.training.report import opening, report, summary, write_losses, write_validation
from vae.training.run import Run, prepare
from vae.vae import VAE


def train(
    options: Options, splits: Splits, folder: Path | str, start: str = "new", progress: bool = True
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
    # Run: the folder's lock and checkpoints, the seeds, and Ctrl-C
    with Run(options, splits, Path(folder), start) as run:
        # Data: all pictures lie decoded in the device's memory, where a batch is one index away
        splits = splits.to(run.device)
        train_dataloader = DataLoader(
            splits.train, batch_size=options.batch_size, shuffle=True, collate_fn=whole_batch
        )
        test_dataloader = DataLoader(
            splits.test, batch_size=5, shuffle=True, collate_fn=whole_batch
        )

        # Model, loss and optimiser
        torch.manual_seed(options.seed)  # the same first weights for the same seed
        model = VAE(
            image_resolution=(options.image_size, options.image_size),
            image_channels=3,
            latent_size=options.latent_size,
            batch_norm=options.batch_norm,
        ).to(run.device)
        model.to(memory_format=torch.channels_last)  # in which convolutions are faster
        loss = ELBOLoss(beta=options.beta, likelihood=options.likelihood)
        optimiser = torch.optim.Adam(model.parameters(), lr=options.learning_rate, fused=True)

        # TensorBoard's writer, and epoch 0, or the one that a resumed run goes on with
        writer, first_epoch = run.begin(model, optimiser)
        if progress:
            print(opening(run, model, splits, first_epoch))

        # Main training loop
        epochs = range(first_epoch, options.epochs)
        hidden = not progress or None  # None: shown on terminals only
        for epoch in tqdm(
            epochs, initial=first_epoch, total=options.epochs, dynamic_ncols=True, disable=hidden
        ):
            run.seed(epoch)  # so that a resumed run draws what the whole run would have drawn
            # Both stay as they are, as in the post, unless a schedule was asked for
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
                # Step 4: keep the losses for TensorBoard: reading each now would make a GPU wait
                losses.append(torch.stack((kl_loss, reconstruction_loss, total_loss)).detach())
                # Step 5: compute the gradients
                total_loss.backward()
                # Step 6: take the gradient descent step
                optimiser.step()
            # One point for each batch; the last one's losses are printed, as in the post
            kl_loss, reconstruction_loss, total_loss = write_losses(writer, losses, epoch)

            # At the end of every epoch, create reconstructions of one batch of test data
            model.eval()
            test_features, _ = next(iter(test_dataloader))  # shuffled anew, so it cannot run out
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
            run.save(model, optimiser, epoch + 1)  # every ten epochs, and where Ctrl-C ends the run

        if progress:
            print("Measuring the trained model on all pictures")
        run.seed(options.epochs)
        return model, report(run, model, splits)


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says, and say how good the model is."""
    command = read_command_line(__doc__, arguments)
    experiment = prepare(command)
    if experiment is None:
        return  # The run to resume is finished, which has been said.
    options, splits, folder = experiment
    _, metrics = train(options, splits, folder, command.start)
    print(summary(metrics, folder, splits.fallback))


if __name__ == "__main__":
    main()
