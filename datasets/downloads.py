"""Files of data sets, downloaded where they are missing: completely or not at all.

They go into a hidden folder inside the data root, which gets another name at once when all are
there, and from it to their places. One run at a time downloads to a data root; others wait for it.
"""

import shutil
import socket
import sys
import tarfile
import traceback
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.error import URLError

from filelock import FileLock, Timeout

from datasets.calls import DatasetClass, call, is_torchvisions, parameters_of
from datasets.errors import UserError

TIMEOUT = 10.0  # seconds for which a server may be silent

LOCK = ".downloading.lock"
INCOMPLETE = ".downloading-"  # how a folder's name begins while files come in
COMPLETE = ".downloaded"  # its name from when all are there until the last is in its place

# What torchvision raises for another checksum than it knows, and Python for half an archive.
DAMAGED = (RuntimeError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error)

# What a class is called with for one of its splits, such as {"split": "train"}.
Choice = dict[str, Any]


def open_all(name: str, root: Path, dataset: DatasetClass, choices: Sequence[Choice]) -> list[Any]:
    """Return what a class gives for each choice, after a download of what is not in ``root``.

    ``ConnectionError`` if a server cannot be reached; ``UserError`` if what came is damaged, if
    something in ``root`` is in its way, or if the class cannot download.
    """
    opened = [open_if_here(name, root, dataset, choice) for choice in choices]
    if all(each is not None for each in opened) and not (root / COMPLETE).exists():
        return opened
    root.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(root):
        move_to_places(root)  # what was complete when its run was killed
        missing = [each for each in choices if open_if_here(name, root, dataset, each) is None]
        if missing:
            download(name, root, dataset, missing)
    return [call(dataset, root=root, download=False, **choice) for choice in choices]


def open_if_here(name: str, root: Path, dataset: DatasetClass, choice: Choice) -> Any | None:
    """Return what a class gives for a choice; None if its files have to be downloaded."""
    try:
        # Said each time, since two of torchvision's classes download unasked
        return call(dataset, root=root, download=False, **choice)
    except Exception as error:
        if not says_missing(error, dataset):
            raise
        if "download" not in parameters_of(dataset):
            raise cannot_download(name, root, root, error) from None
        return None


def says_missing(error: Exception, dataset: DatasetClass) -> bool:
    """Return whether a class says by an error that its files are missing.

    Most of torchvision's do so by a ``RuntimeError`` with the word "download", and a class of one's
    own has to. Some of torchvision's have other words, or just fail to open a file.
    """
    if says_package(error):
        return False
    if is_torchvisions(dataset):
        kinds = RuntimeError | FileNotFoundError
        return isinstance(error, kinds) or "No such file" in str(error)  # as lmdb's error has it
    takes_download = "download" in parameters_of(dataset)
    return takes_download and isinstance(error, RuntimeError) and "download" in str(error)


def says_package(error: Exception) -> bool:
    """Return whether an error is torchvision's for a package that is not installed."""
    return isinstance(error, RuntimeError) and "pip install" in str(error)


def cannot_download(name: str, root: Path, folder: Path, error: Exception) -> UserError:
    """Return what to say of a class that has no download, and why.

    Besides the class's own words these are the places where it looks for files: what it had noted
    down of paths below ``folder``, in which it was called, when it gave up.
    """
    places: dict[Path, None] = {}  # each once, in order
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for value in getattr(frame.f_locals.get("self"), "__dict__", {}).values():
            if isinstance(value, str | Path) and Path(value).is_relative_to(folder):
                places[root / Path(value).relative_to(folder)] = None
    where = ", ".join(str(place) for place in places if place != root) or f"its files in {root}"
    given = f"{name} is not in {root}, and its class does not download it"
    return UserError(f"{given} ({in_one_line(error)}): it looks for {where}")


def download(name: str, root: Path, dataset: DatasetClass, choices: Sequence[Choice]) -> None:
    """Let a class download its files for some choices, and move them to ``root`` when all are here.

    The caller holds the lock. Raises what ``open_all`` raises, and then nothing is left behind.
    """
    print(f"Downloading {name} to {root}", file=sys.stderr)
    for abandoned in root.glob(f"{INCOMPLETE}*"):  # of runs that were killed
        shutil.rmtree(abandoned, ignore_errors=True)
    with TemporaryDirectory(prefix=INCOMPLETE, dir=root) as temporary:
        folder = Path(temporary) / "files"
        folder.mkdir()
        with named_failures(name, root, folder), server_timeout(TIMEOUT):
            for choice in choices:
                call(dataset, root=folder, download=True, **choice)
        refuse_if_taken(folder, root)
        folder.rename(root / COMPLETE)
    move_to_places(root)


@contextmanager
def named_failures(name: str, root: Path, folder: Path) -> Iterator[None]:
    """Say what failed in a download to ``folder``: the server, the file, or the class itself."""
    try:
        yield
    except Exception as error:
        if says_package(error) or isinstance(error, UserError):
            raise
        if isinstance(error, ValueError) and "download" in str(error):
            raise cannot_download(name, root, folder, error) from None
        if says_unreachable(error):
            reason = f"its server cannot be reached ({in_one_line(error)})"
            advice = (
                "give the folder in which its own folder stands to --data-root, or take "
                "--dataset synthetic"
            )
            raise ConnectionError(f"{name} is not in {root} and {reason}: {advice}") from None
        if isinstance(error, DAMAGED):
            damage = f"the download of {name} is damaged ({in_one_line(error)})"
            raise UserError(f"{damage}: try again") from None
        raise


def says_unreachable(error: Exception) -> bool:
    """Return whether an error is one of the network, not of the file that came through it."""
    if isinstance(error, URLError | HTTPException | ConnectionError | TimeoutError):
        return True
    if type(error).__module__.split(".")[0] in ("gdown", "requests", "urllib3"):
        return True
    # MNIST and its like try several servers, and tell as text what each said
    text = str(error)
    return text.startswith("Error downloading") and "corrupted" not in text


@contextmanager
def server_timeout(seconds: float) -> Iterator[None]:
    """Give up servers that are silent for so long, as torchvision does not by itself."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextmanager
def one_at_a_time(root: Path) -> Iterator[None]:
    """Hold the lock of a data root, after other runs that download to it."""
    lock = FileLock(root / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"Waiting for another run that downloads to {root}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def refuse_if_taken(folder: Path, root: Path) -> None:
    """Raise ``UserError`` if a file that is to be moved from ``folder`` to ``root`` is there."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if (root / name).exists() and not (path.is_dir() and (root / name).is_dir()):
            taken = f"{root / name.parts[0]} is there, damaged or incomplete"
            raise UserError(f"{taken}: move it away, and try again")


def move_to_places(root: Path) -> None:
    """Move a complete download, if there is one, to its places below ``root``."""
    folder = root / COMPLETE
    if folder.exists():
        refuse_if_taken(folder, root)
        merge(folder, root)
        shutil.rmtree(folder)


def merge(folder: Path, target: Path) -> None:
    """Move what is in a folder to another one, into the folders that are there."""
    for path in list(folder.iterdir()):
        if (target / path.name).is_dir():
            merge(path, target / path.name)
        else:
            path.rename(target / path.name)


def in_one_line(error: Exception) -> str:
    """Return an error's words in one line."""
    return " ".join(str(error).split())
