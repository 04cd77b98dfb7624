"""The pictures that the model learns: every data set is a class like torchvision's."""

import shutil
import socket
import sys
from collections.abc import Callable
from functools import partial
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.error import URLError

from torchvision.datasets import DTD, Flowers102

from datasets.folder import PictureFolder
from datasets.preprocessing import UserError
from datasets.synthetic import SyntheticFlowers

# Each takes (root, split, transform, download), with the splits "train", "val" and "test", as most
# of torchvision's do. A data set of your own is one more entry.
DATASETS: dict[str, Callable[..., Any]] = {
    "flowers102": Flowers102,
    "dtd": DTD,
    "synthetic": SyntheticFlowers,
}
TIMEOUT = 10.0  # seconds for which a server may be silent


def find_dataset(name: str, root: Path | str) -> tuple[str, Callable[..., Any]]:
    """Return a name and what it stands for, to be called with a split and a transform.

    The name is one of ``DATASETS`` or a folder's whole path; for ``"auto"`` it is flowers102 or, if
    offline, synthetic. What is not in ``root`` is downloaded to it. ``UserError`` for what there is
    not, ``ConnectionError`` for what cannot be downloaded.
    """
    if name == "auto":
        try:
            return find_dataset("flowers102", root)
        except ConnectionError as error:
            print(f"warning: {error}. Training on SYNTHETIC flowers", file=sys.stderr)
            return find_dataset("synthetic", root)
    if name not in DATASETS:
        folder, names = Path(name).expanduser().absolute(), ", ".join(DATASETS)
        if not folder.is_dir():
            raise UserError(f"--dataset is {name}: no such folder, and none of auto, {names}")
        return str(folder), partial(PictureFolder, folder)
    root = Path(root).expanduser()
    dataset = partial(DATASETS[name], root=root)
    try:
        dataset(split="train")
    except RuntimeError as error:
        if "download" not in str(error):  # which all of torchvision's say where files are missing
            raise
        download(name, root)
        dataset(split="train")
    return name, dataset


def download(name: str, root: Path) -> None:
    """Let torchvision download a data set, and move it to ``root`` when it is complete."""
    print(f"Downloading {name} to {root}", file=sys.stderr)
    root.mkdir(parents=True, exist_ok=True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        with TemporaryDirectory(prefix=".downloading-", dir=root) as folder:
            DATASETS[name](root=Path(folder), split="train", download=True)
            for path in Path(folder).iterdir():
                if (root / path.name).exists():
                    taken = f"{root / path.name} is there, damaged or from a run beside this one"
                    raise UserError(f"{taken}: try again, or move it away")
                shutil.move(path, root / path.name)
    except (URLError, HTTPException, ConnectionError, TimeoutError) as error:
        advice = "give the folder that holds it to --data-root, or take --dataset synthetic"
        reason = f"its server cannot be reached ({' '.join(str(error).split())})"
        raise ConnectionError(f"{name} is not in {root} and {reason}: {advice}") from None
    except RuntimeError as error:  # torchvision's, for another checksum than it knows
        raise UserError(f"the download of {name} is damaged ({error}): try again") from None
    finally:
        socket.setdefaulttimeout(before)
