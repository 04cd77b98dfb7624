"""The pictures that the model learns: every data set is a class like torchvision's."""

import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.error import URLError

from datasets.errors import UserError
from datasets.folder import PictureFolder

# A data set's class, or a function like it. It takes (root, split, transform, download), with the
# splits "train", "val" and "test", as most of torchvision's do.
DatasetClass = Callable[..., Any]

TIMEOUT = 10.0  # seconds for which a server may be silent


def find_dataset(
    name: str, root: Path | str, datasets: Mapping[str, DatasetClass]
) -> tuple[str, DatasetClass]:
    """Return a name and the data set that it stands for, to be called with a split and a transform.

    The name is one of ``datasets`` or the path of a folder of pictures, which is returned whole.
    For ``"auto"`` it is flowers102 or, where that is neither on disk nor can be downloaded,
    synthetic. What is not in ``root`` is downloaded to it.

    ``UserError`` for a name that stands for nothing and for a damaged download,
    ``ConnectionError`` for what cannot be downloaded.
    """
    if name == "auto":
        try:
            return find_dataset("flowers102", root, datasets)
        except ConnectionError as error:
            print(f"warning: {error}. Training on SYNTHETIC flowers", file=sys.stderr)
            return find_dataset("synthetic", root, datasets)
    if name in datasets:
        return name, find_named(name, Path(root).expanduser(), datasets[name])
    folder = Path(name).expanduser().absolute()
    if not folder.is_dir():
        names = ", ".join(datasets)
        raise UserError(f"--dataset is {name}: no such folder, and none of auto, {names}")
    return str(folder), partial(PictureFolder, folder)


def find_named(name: str, root: Path, dataset: DatasetClass) -> DatasetClass:
    """Return a data set with its root, after its files were downloaded if they are missing."""
    rooted = partial(dataset, root=root)
    try:
        rooted(split="train")
    except RuntimeError as error:
        if "download" not in str(error):  # which all of torchvision's say where files are missing
            raise
        download(name, root, dataset)
        rooted(split="train")
    return rooted


def download(name: str, root: Path, dataset: DatasetClass) -> None:
    """Let a data set download its files, and move them to ``root`` when they are complete.

    ``ConnectionError`` if its server cannot be reached, ``UserError`` if what came is damaged, or
    if something of its name is in ``root`` already. Then nothing is left behind.
    """
    print(f"Downloading {name} to {root}", file=sys.stderr)
    root.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(prefix=".downloading-", dir=root) as folder:
            with server_timeout(TIMEOUT):
                dataset(root=Path(folder), split="train", download=True)
            move_contents(Path(folder), root)
    except (URLError, HTTPException, ConnectionError, TimeoutError) as error:
        reason = f"its server cannot be reached ({' '.join(str(error).split())})"
        advice = "give the folder that holds it to --data-root, or take --dataset synthetic"
        raise ConnectionError(f"{name} is not in {root} and {reason}: {advice}") from None
    except RuntimeError as error:  # torchvision's, for another checksum than it knows
        raise UserError(f"the download of {name} is damaged ({error}): try again") from None


@contextmanager
def server_timeout(seconds: float) -> Iterator[None]:
    """Give up servers that are silent for so long, as torchvision does not by itself."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def move_contents(folder: Path, root: Path) -> None:
    """Move what is in a folder to ``root``. ``UserError`` if something there has its name."""
    for path in folder.iterdir():
        target = root / path.name
        if target.exists():
            taken = f"{target} is there, damaged or from a run beside this one"
            raise UserError(f"{taken}: try again, or move it away")
        shutil.move(path, target)
