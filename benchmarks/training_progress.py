"""Draw a finished run's losses and pictures: ``python benchmarks/training_progress.py RUN``."""

import argparse
import io
import json
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EPOCHS = (30, 200, 350, 500)
TAGS = ("KL Loss", "Reconstruction Loss", "Total Loss")


def read_events(folder: Path) -> EventAccumulator:
    """Return all of TensorBoard's points in a folder (0: no thinning out)."""
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def plot_losses(run: Path, path: Path) -> None:
    """Draw the three losses over the batches, as the post shows them."""
    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for tag in TAGS:
        points = read_events(run / f"loss_{tag}").Scalars("loss")
        axes.plot([point.step for point in points], [point.value for point in points], label=tag)
    axes.set(xlabel="batch (16 an epoch)", ylabel="loss per image", ylim=(0, 260))
    axes.set_title("KL in nats, reconstruction in squared error, one point a batch", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_pictures(run: Path, path: Path, photographs: bool, image_size: int) -> None:
    """Draw reconstructions and samples at four epochs; photographs themselves are left out."""
    height = image_size + 2
    events = read_events(run)
    heights = (2, 2) if photographs else (4, 2)
    figure, axes = pyplot.subplots(
        *(2, len(EPOCHS)),
        figsize=(14, sum(heights) * 0.45 + 0.8),
        height_ratios=heights,
        layout="constrained",
    )
    for row, (tag, title) in enumerate((("pairs", "reconstructions"), ("samples", "samples"))):
        images = {event.step: event.encoded_image_string for event in events.Images(tag)}
        for column, epoch in enumerate(EPOCHS):
            grid = np.asarray(Image.open(io.BytesIO(images[epoch])))
            if tag == "pairs":
                # Odd rows show test pictures, even ones what was drawn of them.
                rows = [grid[start:][:height] for start in range(2, len(grid), height)]
                grid = np.concatenate(rows[1::2] if photographs else rows)
            axes[row, column].imshow(grid)
            axes[row, column].set(xticks=[], yticks=[])
            axes[row, column].set_title(f"{title}, epoch {epoch}")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main() -> None:
    """Write both figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run of 500 epochs")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results")
    options = parser.parse_args()
    matplotlib.use("Agg")
    config = json.loads((options.run / "metrics.json").read_text())["config"]
    if config["epochs"] < max(EPOCHS):
        parser.error(f"{options.run} has {config['epochs']} epochs: {max(EPOCHS)} are needed")
    dataset, size = config["dataset"], config["image_size"]
    plot_losses(options.run, options.output / f"{dataset}_losses.png")
    path = options.output / f"{dataset}_pictures.png"
    plot_pictures(options.run, path, dataset != "synthetic", size)


if __name__ == "__main__":
    main()
