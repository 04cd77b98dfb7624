"""Are new flowers copies of training photographs? ``python -m benchmarks.copies``.

Holds 1,000 pictures that a model draws against the photographs that it learnt from, and asks
whether they lie nearer to them than photographs do which it has never seen. Prints a table and
draws a figure of distances, without photographs.
"""

import math
from pathlib import Path

import torch
import tyro
from matplotlib import pyplot
from scipy.stats import mannwhitneyu
from torch import Tensor
from torchvision.datasets import Flowers102
from torchvision.transforms.functional import resize

from datasets.memory import InMemory
from datasets.preprocessing import image_pipeline
from vae.checkpoint import load_model
from vae.command_line import INCLUDED, one_line_errors
from vae.evaluation import PCA, spread_out
from vae.run import own_random
from vae.vae import VAE
from vae_training import BEST

COUNT = 1000  # pictures of each kind
COMPARED = (32, 32)  # pixels of the pictures that are compared: of any model's as of real ones

TEST = "test photographs"
NEW = "new pictures"
CONTROL = "reconstructions of training photographs"


@torch.no_grad()
def measure(checkpoint: Path, data_root: Path) -> dict[str, Tensor]:
    """Return for each kind of picture the distances to the nearest training photograph, [1000].

    Distances are between the 64 leading principal components of pictures of 32x32 pixels.
    """
    model, _, latents = load_model(checkpoint)
    assert latents is not None, f"{checkpoint} is of a run that has not ended"
    train, val, test = (
        photographs(split, COMPARED, data_root) for split in ("train", "val", "test")
    )
    learnt = photographs("train", model.image_resolution, data_root)
    with own_random():
        torch.manual_seed(0)
        features = PCA(train.batches, 64)
        z = latents.sample((COUNT,))
    codes = {
        TEST: features.encode(test.batches()),
        "validation photographs": features.encode(val.batches()),
        NEW: features.encode(reduced(model.decoder(batch)) for batch in z.split(64)),
        CONTROL: features.encode(reduced(through_mean(model, x)) for x in learnt.batches()),
    }
    training = features.encode(train.batches())
    return {name: nearest(spread_out(code, COUNT), training) for name, code in codes.items()}


def photographs(split: str, size: tuple[int, int], data_root: Path) -> InMemory:
    """Return a split of Flowers102."""
    return InMemory(Flowers102(data_root, split, image_pipeline(size)), progress=False)


def reduced(images: Tensor) -> Tensor:
    """Return images of 32x32 pixels, reduced as photographs are."""
    return resize(images, list(COMPARED), antialias=True)


def through_mean(model: VAE, x: Tensor) -> Tensor:
    """Return images' reconstructions without noise."""
    mean, _ = model.encoder(x)
    return model.decoder(mean)


def nearest(features: Tensor, training: Tensor) -> Tensor:
    """Return each row's distance to the nearest row of ``training``, [n] of [n, features]."""
    return torch.cdist(features.double(), training.double()).amin(dim=1)


def copying_score(distances: Tensor, unseen: Tensor) -> float:
    """Return how many standard deviations farther away pictures are than unseen photographs.

    Both are distances to the nearest training photograph, [n] and [m]. If pictures and photographs
    are alike, the picture's is the larger one in half of all n * m pairs. The score is how far it
    is from that, the z-score of the Mann-Whitney U test: far below 0 for copies, far above 0 for
    pictures unlike any real one (Meehan et al. 2020, "A Non-Parametric Test to Detect Data-Copying
    in Generative Models", section 3, with all pictures in one cell).
    """
    n, m = len(distances), len(unseen)
    larger = mannwhitneyu(distances.numpy(), unseen.numpy()).statistic
    return (larger - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12)


def table(measured: dict[str, Tensor]) -> str:
    """Return the figures of each kind of picture in Markdown."""
    unseen = measured[TEST]
    near = unseen.quantile(0.01)
    lines = [
        f"| | median distance | nearer than {near:.2f} | score |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, distances in measured.items():
        share = (distances < near).double().mean().item()
        score = "" if name == TEST else f"{copying_score(distances, unseen):+.1f}"
        lines.append(f"| {name} | {distances.median():.2f} | {share:.1%} | {score} |")
    return "\n".join(lines)


def plot(measured: dict[str, Tensor], path: Path) -> None:
    """Draw which share of each kind of picture lies within a distance of a training photograph."""
    figure, axis = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for (name, distances), style in zip(measured.items(), ("-", ":", "--", "-."), strict=True):
        axis.ecdf(distances.numpy(), label=name, linestyle=style)
    axis.set(xlim=(0, None), ylim=(0, 1), ylabel="share of the pictures")
    axis.set_xlabel("distance to the nearest training photograph, 64 principal components")
    axis.legend()
    figure.savefig(path)
    pyplot.close(figure)


def main(
    checkpoint: Path = INCLUDED["petals"],  # the model
    data_root: Path = BEST.data_root,  # folder of flowers-102
    output: Path = Path("results/copies.png"),  # the figure
) -> None:
    """Print the table and draw the figure."""
    measured = measure(checkpoint, data_root)
    print(table(measured))
    plot(measured, output)


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, prog="python -m benchmarks.copies", description=__doc__)
