"""The pictures of an ``InMemory``, kept on disk so that the next run need not read them again.

They lie in the folder that the environment variable ``DATASETS_CACHE`` names, or in
``datasets/cache``. All of it may be deleted at any time.
"""

import hashlib
import json
import os
import pickle
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePath
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
import torchvision
from torch import Tensor

from datasets.sources import known_sources

NEWEST = 30  # files that stay; each is a split with one transform
ABANDONED = 3600.0  # seconds after which nobody writes on at a file that is not complete


class Pictures(NamedTuple):
    """What was read of a data set.

    ``pixels`` are [n, height, width, channels] uint8, ``labels`` one for each of them, and
    ``left_out`` a line for each picture that could not be read.
    """

    pixels: Tensor
    labels: list[Any]
    left_out: list[str]


def cache_folder() -> Path:
    """Return the folder of all that is kept: ``DATASETS_CACHE``, or ``datasets/cache``."""
    chosen = os.environ.get("DATASETS_CACHE")
    return Path(chosen).expanduser() if chosen else Path(__file__).parent / "cache"


def cache_path(dataset: Any) -> Path | None:
    """Return the file for a data set's pictures; None for one that is read again in each run."""
    key = fingerprint(dataset)
    if key is None:
        return None
    split = getattr(dataset, "_split", "")
    return cache_folder() / f"{type(dataset).__name__}-{split}-{key}.npz"


def load_pictures(path: Path) -> Pictures | None:
    """Return the pictures that an earlier run kept; None if there are none or they are damaged."""
    try:
        with np.load(path) as kept:
            labels, left_out = json.loads(kept["words"].tobytes())
            return Pictures(torch.from_numpy(kept["pixels"]), labels, left_out)
    except FileNotFoundError:
        return None
    except Exception as error:  # NumPy's zip reader raises almost anything for a damaged file
        print(f"warning: {path} is damaged and made again ({error})", file=sys.stderr)
        return None


def keep_pictures(path: Path, pictures: Pictures) -> None:
    """Keep pictures for the next run, where their labels are what a file can give back."""
    if not all(type(label) in (int, float, str) for label in pictures.labels):
        return
    # Under another name until it is complete: a run that is killed leaves no half file at ``path``.
    new = path.with_suffix(f".{os.getpid()}.part")
    words = json.dumps([pictures.labels, pictures.left_out]).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new.open("wb") as file:
            np.savez(file, pixels=pictures.pixels.numpy(), words=np.frombuffer(words, np.uint8))
        new.replace(path)
        tidy(path.parent)
    except OSError as error:
        print(f"warning: pictures are not kept for the next run: {error}", file=sys.stderr)
        with suppress(OSError):
            new.unlink()


def tidy(folder: Path) -> None:
    """Delete all but the newest files, and what killed runs left half written."""
    newest_first = sorted(folder.glob("*.npz"), key=age)
    abandoned = [path for path in folder.glob("*.part") if age(path) > ABANDONED]
    for path in newest_first[NEWEST:] + abandoned:
        path.unlink(missing_ok=True)


def age(path: Path) -> float:
    """Return for how many seconds a file has been as it is."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:  # a run beside this one tidied it away
        return 0.0


# What identifies pictures.


def fingerprint(dataset: Any) -> str | None:
    """Return what identifies a data set's pictures, or None where nothing does.

    That is what the data set holds (its parameters, names of files, transform), the code of its
    class, its transform and of this folder, the sizes and times of its files, and the versions of
    what decodes them.

    Nothing does where its files are not known (see ``known_sources``), and for what cannot be
    pickled or is defined in a notebook. Code that its code calls in other modules does not count;
    a class may name such a module's file in ``depends_on()``.
    """
    files = known_sources(dataset)
    if files is None:
        return None
    pickler = HashingPickler()
    try:
        pickler.dump(dataset)
    except Exception:  # pickle raises almost anything for what it cannot take, such as a lambda
        return None
    code = code_files(pickler.modules)
    if code is None:
        return None
    state = pickler.hash
    for package in (np, PIL, torch, torchvision):
        state.update(f"{package.__name__} {package.__version__} ".encode())
    for path in code:
        state.update(path.read_bytes())
    for file in files:
        status = os.stat(file)
        state.update(f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} ".encode())
    return state.hexdigest()[:32]


class HashingPickler(pickle.Pickler):
    """Pickles into a hash, and notes in ``modules`` whose code it met.

    Nothing is written anywhere, and arrays are hashed where they lie: a data set of any size takes
    no memory.
    """

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self.modules: set[str] = set()
        super().__init__(self, protocol=5, buffer_callback=self.write_array)

    def write(self, piece: bytes) -> None:
        """Take a piece of the pickle, instead of a file."""
        self.hash.update(piece)

    def write_array(self, array: pickle.PickleBuffer) -> None:
        """Take the memory of an array, which the pickle then leaves out."""
        self.hash.update(array.raw())

    def reducer_override(self, value: Any) -> Any:
        """Note the module of a value's code, and let it be pickled as usual.

        A tensor is pickled as an array, since PyTorch's own way differs each time. A path is one
        text: of its parts, pickle would note which are the same object as others.
        """
        if isinstance(value, type):
            self.modules.update(each.__module__ for each in value.__mro__)
        elif isinstance(value, FunctionType):
            self.modules.add(value.__module__)
        if isinstance(value, Tensor):
            return torch.from_numpy, (value.detach().cpu().numpy(),)
        if isinstance(value, PurePath):
            return type(value), (str(value),)
        return NotImplemented


def code_files(modules: Iterable[str]) -> list[Path] | None:
    """Return the Python files of modules and of this folder, or None for code in a notebook."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    for name in sorted(modules):
        file = source_file(sys.modules.get(name))
        if file is not None:
            files.append(file)
        elif name == "__main__":
            return None
    return files


def source_file(module: ModuleType | None) -> Path | None:
    """Return a module's Python file; None if it is compiled, or typed into a notebook.

    A compiled class may name a module that does not exist: None, too.
    """
    file = getattr(module, "__file__", None) or ""
    return Path(file) if file.endswith(".py") else None
