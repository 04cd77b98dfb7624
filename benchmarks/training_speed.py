"""Measure how fast training is, on Linux: ``python benchmarks/training_speed.py`` (5 minutes).

This repository, the plain way of most tutorials, and pythae (if it is installed) train the post's
network on the same pictures, in turns, so that whatever else the machine does meets all of them;
ratios are taken within a round. The picture files are made here, of synthetic flowers.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from timeit import timeit

import torch
from PIL import Image
from torch import Tensor
from torch.optim import Adam
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, Subset
from torch.utils.tensorboard import SummaryWriter
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.utils import make_grid

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from datasets import flowers102, preprocessing, synthetic  # noqa: E402
from datasets.pictures import Pictures, Splits, load_splits, whole_batch  # noqa: E402
from vae.losses import ELBOLoss  # noqa: E402
from vae.training.command_line import Parser, one_line_errors  # noqa: E402
from vae.training.options import Options  # noqa: E402
from vae.training.run import find_device  # noqa: E402
from vae.vae import VAE  # noqa: E402
from vae_training import train  # noqa: E402

BATCH = Options.batch_size
SIZE = (32, 32)
# Height and width of the picture files, and the JPEG quality that gives them Flowers102's bytes.
FILES = {"64x64": (64, 64, 75), "500x667": (500, 667, 93)}
HERE, PLAIN = "this repository", "the plain way"
# What may be how many times as much as what else.
CPU_TARGETS = (
    (f"raw steps, {HERE}", f"raw steps, {PLAIN}", 0.70),
    (f"epoch, {HERE}", "epoch, pythae", 0.85),
    (f"epoch, {HERE}", f"epoch, {PLAIN}, 64x64 files", 0.40),
    (f"epoch, {HERE}", f"epoch, {PLAIN}, 500x667 files", 0.09),
    ("decoding on all cores", "decoding one at a time", 0.6),
    ("start to first step, warm cache", "1 s", 1.6),
    (f"peak MiB, {HERE}, 1020 pictures", f"peak MiB, {PLAIN}, 1020 pictures", 1.15),
)
ACCELERATOR_TARGETS = ((f"epoch, {HERE}", "1 s", 10 / 500),)
NOTES = "<!-- notes -->"


def plain_vae() -> VAE:
    """Return the same network with each ReLU before its pooling, as in the post."""
    model = VAE(SIZE, latent_size=10, image_channels=3)
    layers = model.encoder
    layers.pool1, layers.act1 = layers.act1, layers.pool1
    layers.pool2, layers.act2 = layers.act2, layers.pool2
    layers.pool3, layers.act3 = layers.act3, layers.pool3
    return model


def train_plainly(folder: Path, count: int, epochs: int, device: str, log_dir: Path) -> None:
    """Train as the post and most tutorials do: decode each picture anew, log at every step."""
    transform = transforms.Compose([transforms.Resize(SIZE), transforms.ToTensor()])
    pictures = ImageFolder(folder, transform)
    loader = DataLoader(Subset(pictures, range(count)), BATCH, shuffle=True)
    test_loader = DataLoader(pictures, 5, shuffle=True)
    model, loss = plain_vae().to(device), ELBOLoss(beta=0.1)
    optimiser = Adam(model.parameters(), lr=1e-4)
    with SummaryWriter(log_dir) as writer:
        for epoch in range(epochs):
            for step, (x, _) in enumerate(loader, epoch * len(loader)):
                x = x.to(device)
                optimiser.zero_grad()
                _, kl, reconstruction, total = loss(x, *model(x))
                points = {"KL": kl, "reconstruction": reconstruction, "total": total}
                writer.add_scalars("loss", points, step)
                total.backward()
                optimiser.step()
            x = next(iter(test_loader))[0].to(device)
            writer.add_image("originals", make_grid(x), epoch)
            writer.add_image("reconstructions", make_grid(model(x)[0]), epoch)


def train_here(folder: Path, count: int, epochs: int, device: str, log_dir: Path) -> None:
    """Train with this repository, everything on."""
    train(Options(epochs=epochs, device=device), decode_splits(folder, count), log_dir)


def train_with_pythae(folder: Path, count: int, epochs: int, device: str, log_dir: Path) -> None:
    """Train with pythae's ``VAE`` and ``BaseTrainer``; the pictures are in memory, too."""
    from pythae import models, trainers
    from pythae.data.datasets import BaseDataset
    from pythae.models import nn
    from pythae.models.base.base_utils import ModelOutput

    class Encoder(nn.BaseEncoder):
        def forward(self, x: Tensor) -> ModelOutput:
            mean, log_var = self.layers(x)
            return ModelOutput(embedding=mean, log_covariance=log_var)

    class Decoder(nn.BaseDecoder):
        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.layers(z))

    network, encoder, decoder = plain_vae(), Encoder(), Decoder()
    encoder.layers, decoder.layers = network.encoder, network.decoder
    model = models.VAE(models.VAEConfig(input_dim=(3, *SIZE), latent_dim=10), encoder, decoder)
    # Batches of 64 and a learning rate of 1e-4 are its defaults, too.
    config = trainers.BaseTrainerConfig(str(log_dir), num_epochs=epochs, no_cuda=device == "cpu")
    images, labels = decode_splits(folder, count).train[:]
    pictures = BaseDataset(images.contiguous(), labels)
    trainers.BaseTrainer(model, pictures, training_config=config).train()


def make_files(folder: Path, size: str, count: int, drawn: int) -> Path:
    """Fill ``folder`` with JPEG files; those beyond the first ``drawn`` are links to these."""
    (folder / "flowers").mkdir(parents=True)
    paths = [folder / "flowers" / f"{number:05}.jpg" for number in range(count)]
    height, width, quality = FILES[size]
    pictures = synthetic.draw_flowers("train", (height, width), range(drawn))
    for path, picture in zip(paths, pictures, strict=False):
        Image.fromarray(picture).save(path, quality=quality)
    for number in range(drawn, count):
        paths[number].hardlink_to(paths[number % drawn])
    return folder


def decode_splits(folder: Path, count: int) -> Splits:
    """Return ``count`` training pictures, and up to as many others as Flowers102 has."""
    paths = sorted(folder.rglob("*.jpg"))[:count]
    pixels = torch.from_numpy(preprocessing.decode_pictures(paths, SIZE))
    splits = pixels, pixels[:1020], pixels[:1025].repeat(6, 1, 1, 1)
    pictures = (Pictures(split, torch.zeros(len(split)).long()) for split in splits)
    return Splits(*pictures, "synthetic", None)


def time_steps(trainer: Callable, *arguments: object) -> list[float]:
    """Return when each step ended, in seconds, of ``trainer(*arguments, log_dir)``."""
    times: list[float] = []
    hook = register_optimizer_step_post_hook(lambda *_: times.append(time.perf_counter()))
    with TemporaryDirectory() as logs, redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        trainer(*arguments, Path(logs))
    hook.remove()
    return times


def epoch_seconds(trainer: Callable, folder: Path, epochs: int, count: int, device: str) -> float:
    """Return the seconds per epoch, from the end of the first step to that ``epochs`` later."""
    times = time_steps(trainer, folder, count, epochs + 1, device)
    return (times[epochs * -(-count // BATCH)] - times[0]) / epochs


def first_step(began: float, data_root: str, cache: str, size: int, device: str) -> float:
    """Return the seconds from ``began`` to the end of a run's first step on all of Flowers102."""
    preprocessing.CACHE_FOLDER = Path(cache)
    dataset = "flowers102" if flowers102.is_on_disk(Path(data_root)) else "synthetic"
    options = Options(epochs=1, image_size=size, device=device)
    splits = load_splits(dataset, Path(data_root), (size, size), progress=False)
    return time_steps(train, options, splits)[0] - began


def grow(_: float, way: str, folder: str, count: int, device: str) -> tuple[float, float]:
    """Return the seconds per epoch of one way, and this process's peak memory in MiB."""
    trainer = train_here if way == HERE else train_plainly
    seconds = epoch_seconds(trainer, Path(folder), 3, count, device)
    # Not getrusage: it gives a new process the peak of the one that started it.
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return seconds, int(peak[1]) / 1024


def run_apart(quick: bool, function: Callable, *arguments: object) -> float | list[float]:
    """Return ``function(began, *arguments)`` of a new process, ``began`` after ``import torch``.

    A quick run stays in this process.
    """
    if quick:
        return function(time.perf_counter(), *arguments)
    code = (
        "import json, sys, time, torch; began = time.perf_counter(); import training_speed as here;"
        f"print(json.dumps(here.{function.__name__}(began, *json.loads(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    done = subprocess.run(command, cwd=Path(__file__).parent, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def take_steps(model: VAE, optimiser: Adam, batches: list[Tensor]) -> None:
    """Take one step for each batch, [batch, 3, 32, 32], and wait until the last one is done."""
    loss = ELBOLoss(beta=0.1)
    for x in batches:
        optimiser.zero_grad()
        *_, total_loss = loss(x, *model(x))
        total_loss.backward()
        optimiser.step()
    total_loss.item()


def contenders(small: Path, large: Path, count: int, epochs: int, device: str) -> dict:
    """Return what is measured in each round: names and functions that return seconds."""
    torch.empty(2**25 - 2**13, dtype=torch.uint8)  # freed at once, as in vae/training/run.py
    pictures = decode_splits(small, count).train.to(device)
    loader = DataLoader(pictures, BATCH, shuffle=True, collate_fn=whole_batch)
    batches = [x for x, _ in loader]
    model = VAE(SIZE, 10, 3).to(device, memory_format=torch.channels_last)
    steps = partial(take_steps, model, Adam(model.parameters(), lr=1e-4, fused=True), batches)
    model, contiguous = plain_vae().to(device), [x.contiguous() for x in batches]
    plain = partial(take_steps, model, Adam(model.parameters(), lr=1e-4), contiguous)
    steps()
    plain()
    epoch = partial(epoch_seconds, count=count, device=device)
    paths = sorted(large.rglob("*.jpg"))[: count // 4]
    decode = partial(preprocessing.decode_pictures, paths, SIZE)
    decode_one = partial(preprocessing.picture_to_pixels, image_resolution=SIZE)
    pythae = {"epoch, pythae": partial(epoch, train_with_pythae, small, epochs)}
    return {
        f"raw steps, {HERE}": lambda: timeit(steps, number=5) / 5,
        f"raw steps, {PLAIN}": lambda: timeit(plain, number=5) / 5,
        f"epoch, {HERE}": partial(epoch, train_here, small, epochs),
        f"epoch, {PLAIN}, 64x64 files": partial(epoch, train_plainly, small, -(-epochs // 4)),
        f"epoch, {PLAIN}, 500x667 files": partial(epoch, train_plainly, large, 1),
        "decoding on all cores": partial(timeit, decode, number=1),
        "decoding one at a time": lambda: timeit(lambda: list(map(decode_one, paths)), number=1),
    } | (pythae if find_spec("pythae") else {})


def spread(values: list[float]) -> str:
    """Return the cells of the median, the lowest and the highest."""
    return " | ".join(f"{each(values):.3g}" for each in (median, min, max))


def describe_machine(device: str) -> str:
    """Return what was measured on, with what, and when."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    machine = f"{cpu[1] if cpu else os.uname().machine}, {os.cpu_count()} cores"
    if device != "cpu":
        machine += f", {torch.get_device_module(device).get_device_name(device)}"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = filter(find_spec, ("torch", "torchvision", "pythae"))
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    command = shlex.join(["python", "benchmarks/training_speed.py", *sys.argv[1:]])
    return f"""- Machine: {machine}, {memory:.0f} GiB of memory
- Versions: Python {sys.version.split()[0]}, {versions}
- Measured: {time.strftime("%Y-%m-%d %H:%M", time.gmtime())} UTC by `{command}`
"""


def ratio_row(measured: dict[str, list[float]], name: str, other: str, target: float) -> str:
    """Compare what was measured, round by round, with a target."""
    if other not in measured:
        return f"| {name} / {other} | - | - | - | ≤ {target} | not measured |"
    ratios = [one / two for one, two in zip(measured[name], measured[other], strict=True)]
    verdict = "met" if median(ratios) <= target else "**not met**"
    return f"| {name} / {other} | {spread(ratios)} | ≤ {target} | {verdict} |"


def renew(document: str, section: str) -> str:
    """Put ``section`` in the place of the one with its heading; all from the notes on stays."""
    measured, _, notes = document.partition(NOTES)
    title, *sections = re.split(r"^(?=## )", measured, flags=re.MULTILINE)
    by_heading = {each.splitlines()[0]: each for each in [*sections, section]}
    parts = "\n\n".join(part.strip() for part in (title, *by_heading.values()))
    return f"{parts}\n\n{NOTES}{notes}"


@one_line_errors()
def main() -> None:
    """Measure, print a section of Markdown, and write it into the results."""
    parser = Parser(description=__doc__)
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: auto)")
    parser.add_argument("--data-root", default=Options.data_root, help="folder of flowers-102")
    parser.add_argument("--output", type=Path, help="default: results/training_speed.md")
    parser.add_argument("--quick", action="store_true", help="see that it works, and only print")
    options = parser.parse_args()
    device = str(find_device(options.device))
    rounds, epochs, counts, drawn, size = 5, 10, (1020, 4080, 8160), 24, 32
    if options.quick:
        rounds, epochs, counts, drawn, size = 1, 1, (BATCH + 6,), 2, 8
    apart = partial(run_apart, options.quick)

    with TemporaryDirectory() as scratch:
        files = {name: make_files(Path(scratch, name), name, max(counts), drawn) for name in FILES}
        cache, data_root = f"{scratch}/cache", os.path.abspath(options.data_root)
        start = partial(apart, first_step, data_root, cache, size, device)
        work = contenders(*files.values(), counts[0], epochs, device)
        work |= {f"start to first step, {state} cache": start for state in ("no", "warm")}
        measured: dict[str, list[float]] = defaultdict(list)
        for number in range(rounds):
            shutil.rmtree(cache, ignore_errors=True)
            for name, measure in work.items():
                print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr)
                measured[name].append(measure())
        for count in counts:
            for way in (HERE, PLAIN):
                label = f"{way}, {count} pictures"
                print(label, file=sys.stderr)
                seconds, peak = apart(grow, way, str(files["64x64"]), count, device)
                measured[f"µs a picture, {label}"] = [1e6 * seconds / count]
                measured[f"peak MiB, {label}"] = [peak]

    lines = [f"## On {torch.device(device).type}", "", describe_machine(device)]
    lines += ["| seconds, µs or MiB | median | lowest | highest |", "|" + " --- |" * 4]
    lines += [f"| {name} | {spread(values)} |" for name, values in measured.items()]
    lines += ["", "| ratio | median | lowest | highest | target | |", "|" + " --- |" * 6]
    measured["1 s"] = [1.0] * rounds
    targets = CPU_TARGETS if device == "cpu" else ACCELERATOR_TARGETS
    lines += [ratio_row(measured, *target) for target in targets]
    section = "\n".join(lines)
    print(section)
    if options.output or not options.quick:
        output = options.output or ROOT / "results" / "training_speed.md"
        output.parent.mkdir(parents=True, exist_ok=True)
        document = output.read_text() if output.exists() else f"# Training speed\n\n{NOTES}\n"
        output.write_text(renew(document, section))


if __name__ == "__main__":
    main()
