"""Draw a finished run's losses and pictures: ``python benchmarks/training_progress.py RUN``."""

import argparse
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, ImageEvent

EPOCHS = (30, 200, 350, 500)


def read_events(folder: Path) -> EventAccumulator:
    """Return all of TensorBoard's points in a folder (0: no thinning out)."""
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def read_grid(event: ImageEvent) -> np.ndarray:
    """Return the pixels of a picture in TensorBoard, [height, width, 3] uint8."""
    return np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))


def plot_losses(run: Path, path: Path) -> None:
    """Draw the three losses over the batches, as the post shows them."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for tag in ("KL Loss", "Reconstruction Loss", "Total Loss"):
        points = read_events(run / f"loss_{tag}").Scalars("loss")
        axes.plot([point.step for point in points], [point.value for point in points], label=tag)
    axes.set(xlabel="batch (16 an epoch)", ylabel="loss per image", ylim=(0, 260))
    axes.set_title("KL in nats, reconstruction in squared error, one point a batch", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def plot_pictures(run: Path, path: Path, config: dict[str, Any]) -> None:
    """Draw reconstructions and samples at four epochs; photographs themselves are left out."""
    height, events = config["image_size"] + 2, read_events(run)
    first, step, heights = (0, 1, (4, 2)) if config["dataset"] == "synthetic" else (1, 2, (2, 2))
    figure = Figure(figsize=(14, sum(heights) * 0.45 + 0.8), layout="constrained")
    axes = figure.subplots(2, len(EPOCHS), height_ratios=heights)
    for column, epoch in zip(axes.T, EPOCHS, strict=True):
        for panel, tag in zip(column, ("test_pairs", "samples"), strict=True):
            # TensorBoard's steps are epochs counted from 0.
            (grid,) = (read_grid(event) for event in events.Images(tag) if event.step == epoch - 1)
            if tag == "test_pairs":
                # Odd rows show test pictures, even ones what was drawn of them.
                rows = [grid[start:][:height] for start in range(2, len(grid), height)]
                grid = np.concatenate(rows[first::step])
            panel.imshow(grid)
            name = "reconstructions" if tag == "test_pairs" else tag
            panel.set(xticks=[], yticks=[], title=f"{name}, epoch {epoch}")
    figure.savefig(path, dpi=90)


def main() -> None:
    """Write both figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run of 500 epochs")
    parser.add_argument("--output", type=Path, help="folder of the figures (default: the run's)")
    options = parser.parse_args()
    config = json.loads((options.run / "metrics.json").read_text())["config"]
    if config["epochs"] < max(EPOCHS):
        parser.error(f"{options.run} has {config['epochs']} epochs: {max(EPOCHS)} are needed")
    output = options.output or options.run
    plot_losses(options.run, output / f"{config['dataset']}_losses.png")
    plot_pictures(options.run, output / f"{config['dataset']}_pictures.png", config)


if __name__ == "__main__":
    main()
