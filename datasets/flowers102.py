"""Oxford Flowers102 on disk: found, checked, and downloaded where it is missing."""

import shutil
import sys
import tarfile
from http.client import HTTPException
from multiprocessing import TimeoutError as PoolTimeoutError
from multiprocessing.pool import ThreadPool
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from filelock import FileLock
from torchvision.datasets import Flowers102
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm

TIMEOUT = 8.0  # seconds for the server to answer in, and for a download to stand still


def is_on_disk(data_root: Path) -> bool:
    """Return whether ``data_root`` holds Flowers102 (pictures and both .mat files)."""
    parts = ("jpg", "imagelabels.mat", "setid.mat")
    return all((data_root / "flowers-102" / part).exists() for part in parts)


def find_pictures(data_root: Path, split: str) -> tuple[list[Path], list[int]]:
    """Return the paths and labels (0 to 101) of an official split, in torchvision's order."""
    try:
        dataset = Flowers102(data_root, split)
        if not dataset._labels or not set(dataset._labels) <= set(range(102)):
            raise ValueError(f"the {split} split needs pictures, with labels from 1 to 102")
    except Exception as error:  # SciPy and torchvision raise almost anything for damaged files
        files, reason = f"the .mat files in {data_root / 'flowers-102'}", str(error).split("\n")[0]
        raise ValueError(f"{files} are damaged ({reason}): delete them and run again") from None
    return dataset._image_files, dataset._labels


def download(data_root: Path) -> None:
    """Download Flowers102 (345 MB) to ``data_root`` and unpack it.

    What is there already is left alone, and a second process waits until the first one is done.

    Raises:
        ConnectionError: if the server does not answer in time, or answers with an error.
        ValueError: if what came is damaged.
        OSError: if it cannot be written to ``data_root``.
    """
    folder, prefix = data_root / "flowers-102", Flowers102._download_url_prefix
    url = prefix + Flowers102._file_dict["setid"][0]
    try:
        with ThreadPool(1) as pool:  # because looking a name up knows no time-out
            pool.apply_async(urlopen, (url, None, TIMEOUT)).get(TIMEOUT).close()
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            for part, (name, md5) in Flowers102._file_dict.items():
                url = prefix + name
                if part != "image" or not (folder / "jpg").is_dir():
                    _fetch(url, folder / name, md5)
            if not (folder / "jpg").is_dir():
                _unpack(folder / Flowers102._file_dict["image"][0], folder)
    except (URLError, HTTPException, ConnectionError, TimeoutError, PoolTimeoutError) as error:
        reason = str(error).strip() or f"no answer in {TIMEOUT:.0f} s"
        raise ConnectionError(f"{url}: {reason}") from None


def _fetch(url: str, path: Path, md5: str) -> None:
    """Download a file that is not there yet, with a bar on terminals; ``path`` is never partial."""
    if check_integrity(path, md5):
        return
    part = path.with_suffix(".part")
    with urlopen(url, timeout=TIMEOUT) as answer, open(part, "wb") as file:
        bar = {"total": answer.length, "desc": path.name, "disable": None}
        with tqdm.wrapattr(answer, "read", **bar) as content:
            shutil.copyfileobj(content, file)
    if not check_integrity(part, md5):
        raise ValueError(f"{url} came incomplete or damaged: its MD5 sum is not {md5}. Run again")
    part.replace(path)


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack the pictures; ``jpg`` appears in ``folder`` once all of them are there."""
    print(f"Unpacking {archive}", file=sys.stderr)
    unpacked = folder / ".unpacking"
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(unpacked, filter="data")  # which refuses paths that leave the folder
        (unpacked / "jpg").rename(folder / "jpg")
    except (tarfile.TarError, EOFError, FileNotFoundError) as error:
        raise ValueError(f"{archive} cannot be unpacked ({error}): delete it") from None
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
