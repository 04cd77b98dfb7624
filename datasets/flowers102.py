"""Oxford Flowers102 on disk: found, checked, and downloaded where it is missing."""

import socket
import tarfile
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

from torchvision.datasets import Flowers102
from torchvision.datasets.utils import check_integrity, download_url

TIMEOUT = 8.0
"""Seconds that the server has to answer in, and that a download may stand still for."""


class ServerUnreachableError(Exception):
    """The server of Flowers102 did not answer, or stopped answering."""


def is_on_disk(data_root: Path) -> bool:
    """Return whether ``data_root`` holds Flowers102 (pictures and both .mat files)."""
    folder = data_root / "flowers-102"
    names = [Flowers102._file_dict[part][0] for part in ("label", "setid")]
    return (folder / "jpg").is_dir() and all((folder / name).is_file() for name in names)


def find_pictures(data_root: Path, split: str) -> tuple[list[Path], list[int]]:
    """Return the paths and labels (0 to 101) of an official split, in torchvision's order.

    Args:
        data_root: the folder that holds ``flowers-102``.
        split: ``"train"``, ``"val"`` or ``"test"``.

    Raises:
        ValueError: if a .mat file is damaged or does not fit the others; the message names it.
    """
    folder = data_root / "flowers-102"
    for part in ("label", "setid"):
        name, md5 = Flowers102._file_dict[part]
        if not check_integrity(folder / name, md5):
            raise ValueError(
                f"{folder / name} is damaged: its MD5 sum is not {md5}. "
                "Delete it and run again to download it anew"
            )
    try:
        dataset = Flowers102(data_root, split)
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"the .mat files in {folder} do not fit each other ({type(error).__name__}: {error}). "
            "Delete them and run again to download them anew"
        ) from None
    return dataset._image_files, dataset._labels


def download(data_root: Path) -> None:
    """Download Flowers102 (345 MB) to ``data_root``, with a progress bar, and unpack it.

    Files that are there already and have the right MD5 sum are not downloaded again.

    Raises:
        ServerUnreachableError: if the server cannot be reached in ``TIMEOUT`` seconds, answers
            with an error, or stops answering for as long.
        ValueError: if what came is damaged.
        OSError: if it cannot be written to ``data_root``.
    """
    prefix = Flowers102._download_url_prefix
    folder = data_root / "flowers-102"
    _ask_server(prefix + Flowers102._file_dict["setid"][0])
    folder.mkdir(parents=True, exist_ok=True)
    for part, (name, md5) in Flowers102._file_dict.items():
        if part == "image" and (folder / "jpg").is_dir():
            continue
        try:
            with _socket_timeout(TIMEOUT):
                download_url(prefix + name, folder, md5=md5)
        except (urllib.error.URLError, TimeoutError, ConnectionError, HTTPException) as error:
            raise ServerUnreachableError(f"{prefix + name}: {error}") from None
        except RuntimeError:
            raise ValueError(
                f"{folder / name}, downloaded from {prefix + name}, is incomplete or damaged: its "
                f"MD5 sum is not {md5}. Run again to download it anew"
            ) from None
    if not (folder / "jpg").is_dir():
        _unpack(folder / Flowers102._file_dict["image"][0], folder)


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack the pictures; ``jpg`` appears in ``folder`` once all of them are there."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unpacking-") as unpacked:
        try:
            with tarfile.open(archive) as tar:
                # The "data" filter refuses paths that leave the folder.
                tar.extractall(unpacked, filter="data")
            (Path(unpacked) / "jpg").rename(folder / "jpg")
        except (tarfile.TarError, EOFError, FileNotFoundError) as error:
            raise ValueError(
                f"{archive} cannot be unpacked: {error}. Delete it and run again"
            ) from None


def _ask_server(url: str) -> None:
    """Raise ``ServerUnreachableError`` unless ``url`` answers within ``TIMEOUT`` seconds."""
    failures: list[Exception] = [TimeoutError(f"no answer in {TIMEOUT:.0f} s")]

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=TIMEOUT).close()
            failures.clear()
        except (OSError, HTTPException) as error:
            failures[:] = [error]

    # In a thread of its own, because looking a name up knows no time-out.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(TIMEOUT)
    if failures:
        raise ServerUnreachableError(f"{url}: {failures[0]}")


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Give torchvision's download the time-out that it does not set itself."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
