"""What few pictures of your own are enough for: ``python -m benchmarks.few_pictures``.

Trains on 100, 200 and 500 of Flowers102's test photographs, as a reader's folder of pictures, and
measures on its validation photographs, which no model has seen. Prints the table of "Few pictures"
in results/practical_aspects.md. Stopped at any time, it goes on where it was.
"""

import shutil
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
import tyro
from torchvision.datasets import Flowers102

from benchmarks.latent_size import flowers
from benchmarks.practical_aspects import Job, run_folder, train_run
from datasets import find_dataset
from datasets.sources import picture_files
from vae.checkpoint import load_model
from vae.command_line import INCLUDED, one_line_errors
from vae.evaluation import evaluate
from vae.losses import ELBOLoss
from vae.run import own_random
from vae_training import BEST, DATASETS, Options

COUNTS = (100, 200, 500)  # photographs in the folder

# The rows of the table.
WAYS = {
    "`--preset best`, 1,500 epochs": BEST,
    "the same with `--batch-size 16`, about four times the steps": replace(BEST, batch_size=16),
    "`--preset best --start-from ten --learning-rate 0.0005 --epochs 300`": replace(
        BEST, start_from=INCLUDED["ten"], learning_rate=0.0005, epochs=300
    ),
}

Errors = dict[tuple[str, int], float]  # by the way of training and the number of photographs


def copy_photographs(count: int, data_root: Path, folder: Path) -> None:
    """Copy so many of the test photographs into a folder; more of them are those and others."""
    files = picture_files(Flowers102(data_root, "test"))
    assert files is not None, "Flowers102 tells its files"
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))
    folder.mkdir(parents=True, exist_ok=True)
    for index in order[:count].tolist():
        shutil.copy(files[index], folder)


def error_after_training(job: Job, data_root: Path) -> float:
    """Return the error on a validation photograph, through the mean; train first what is missing.

    It is a squared error, summed over the photograph's values.
    """
    train_run(job)
    model, options, _ = load_model(job.folder / "checkpoint.pt")
    val = flowers("val", model.image_resolution, data_root)
    with own_random():
        return evaluate(model, val.batches(), ELBOLoss(options["beta"]))["squared_error_mean"]


def train_all(
    ways: dict[str, Options],
    counts: tuple[int, ...],
    data_root: Path,
    log_dir: Path,
    pool: Executor,
) -> Errors:
    """Train each way with each number of photographs, and return the errors."""
    jobs = {}
    for count in counts:
        photographs = log_dir / f"photos-{count}"
        copy_photographs(count, data_root, photographs)
        for name, way in ways.items():
            folder = run_folder(log_dir, f"{count} {name}", seed=0)
            options = replace(way, dataset=str(photographs.absolute()), seed=0)
            jobs[name, count] = Job(name, options, folder)
    errors = pool.map(error_after_training, jobs.values(), [data_root] * len(jobs))
    return dict(zip(jobs, errors, strict=True))


def table(errors: Errors) -> str:
    """Return the table in Markdown: a row for each way, a column for each number."""
    ways = dict.fromkeys(name for name, _ in errors)
    counts = dict.fromkeys(count for _, count in errors)
    lines = [
        f"| | {' | '.join(str(count) for count in counts)} |",
        f"| --- |{' ---: |' * len(counts)}",
    ]
    for name in ways:
        cells = [f"{errors[name, count]:.1f}" for count in counts]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(
    data_root: Path = BEST.data_root,  # folder of flowers-102, downloaded to it if missing
    log_dir: Path = Path("benchmarks/runs/few_pictures"),  # folder of all runs and photographs
) -> None:
    """Train what is missing, then print the table."""
    find_dataset("flowers102", data_root, DATASETS)  # downloads it once, before all run at once
    with ProcessPoolExecutor() as pool:
        print(table(train_all(WAYS, COUNTS, data_root, log_dir, pool)))


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, prog="python -m benchmarks.few_pictures", description=__doc__)
