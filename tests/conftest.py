"""What the tests share: a small Flowers102 of real files, a server for it, and small splits."""

import functools
import hashlib
import shutil
import socket
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch.utils.data import Dataset
from torchvision.datasets import Flowers102
from torchvision.transforms import ToTensor

from datasets.memory import InMemory
from datasets.preprocessing import read_heic
from vae_training import DATASETS

SIZES = {"train": 20, "val": 6, "test": 34}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # On tensors as small as the tests', threads only wait for each other.
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _cache_outside_of_the_repository(tmp_path_factory) -> Iterator[None]:
    """Tests, and the programs that they start, keep pictures in a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def cache_folder(tmp_path, monkeypatch) -> Path:
    """An empty cache of the test's own."""
    monkeypatch.setenv("DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def draw_picture(index: int) -> Image.Image:
    """One picture of noise, soft enough for JPEG; sizes and colour modes differ."""
    rng = np.random.default_rng(index)
    width, height = [(1, 1), (64, 64), (50, 67), (333, 21), (7, 90), (32, 32)][index % 6]
    rough = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
    mode = {4: "L", 9: "CMYK"}.get(index % 10, "RGB")
    return rough.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


@pytest.fixture(scope="session")
def flowers_files(tmp_path_factory) -> tuple[Path, dict[str, tuple[str, str]]]:
    """A folder with the files of a small Flowers102, and torchvision's list of them."""
    folder, count = tmp_path_factory.mktemp("flowers"), sum(SIZES.values())
    (folder / "jpg").mkdir()
    for number in range(1, count + 1):
        draw_picture(number).save(folder / "jpg" / f"image_{number:05d}.jpg", quality=90)
    with tarfile.open(folder / "102flowers.tgz", "w:gz") as archive:
        archive.add(folder / "jpg", "jpg")
    # Shuffled, as the real one's are: an error of order must show.
    numbers = np.random.default_rng(0).permutation(np.arange(1, count + 1))
    train, val, test = np.split(numbers, np.cumsum(list(SIZES.values()))[:-1])
    savemat(folder / "setid.mat", {"trnid": train, "valid": val, "tstid": test})
    savemat(folder / "imagelabels.mat", {"labels": 1 + np.arange(count) % 102})
    names = {"image": "102flowers.tgz", "label": "imagelabels.mat", "setid": "setid.mat"}
    md5 = {part: hashlib.md5((folder / name).read_bytes()) for part, name in names.items()}
    return folder, {part: (name, md5[part].hexdigest()) for part, name in names.items()}


@pytest.fixture
def flowers(flowers_files, monkeypatch) -> Path:
    """The files of the small Flowers102, which torchvision takes for the real one."""
    folder, files = flowers_files
    monkeypatch.setattr(Flowers102, "_file_dict", files)
    return folder


@pytest.fixture
def data_root(flowers, tmp_path) -> Path:
    """A data root in which the small Flowers102 is already unpacked."""
    folder = tmp_path / "data" / "flowers-102"
    return shutil.copytree(flowers, folder, ignore=shutil.ignore_patterns("*.tgz")).parent


class FolderHandler(SimpleHTTPRequestHandler):
    """Serves a folder, and breaks where the test asks for it."""

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        self.server.asked_for.append(name)
        fault = self.server.faults.get(name)
        super().do_GET() if fault is None else fault(self)

    def answer(self, content: bytes, promised: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(promised))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


class FolderServer(ThreadingHTTPServer):
    """A server on 127.0.0.1; ``faults`` maps file names to what happens instead of an answer."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(FolderHandler, directory=folder))
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.asked_for: list[str] = []
        self.faults: dict[str, Callable[[FolderHandler], None]] = {}
        self.stopping = threading.Event()

    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that hang up."""

    def say_nothing(self, _: FolderHandler) -> None:
        """Accept the request and leave it at that."""
        self.stopping.wait(30)

    @staticmethod
    def cut_off(handler: FolderHandler) -> None:
        """Promise the file and hang up halfway."""
        content = Path(handler.translate_path(handler.path)).read_bytes()
        handler.answer(content[: len(content) // 2], len(content))

    @staticmethod
    def garble(handler: FolderHandler) -> None:
        """Send other bytes than the file's."""
        handler.answer(b"no flowers today", 16)

    @staticmethod
    def fail(handler: FolderHandler) -> None:
        """Answer with an internal error."""
        handler.send_error(500)

    @staticmethod
    def speak_another_language(handler: FolderHandler) -> None:
        """Answer with what is no HTTP."""
        handler.wfile.write(b"220 flowers.example ESMTP ready\r\n")


@contextmanager
def served(folder: Path) -> Iterator[FolderServer]:
    """A server of the files in a folder, which is asked directly, past any proxy."""
    with pytest.MonkeyPatch.context() as patch, FolderServer(folder) as server:
        patch.setenv("no_proxy", "*")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.stopping.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def server(flowers, monkeypatch) -> Iterator[FolderServer]:
    """A server of the small Flowers102, in the place of the university's."""
    with served(flowers) as server:
        monkeypatch.setattr(Flowers102, "_download_url_prefix", server.url)
        yield server


@pytest.fixture
def no_server(flowers, monkeypatch) -> str:
    """Flowers102's address, where every connection is refused."""
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/"
    monkeypatch.setattr(Flowers102, "_download_url_prefix", url)
    return url


@pytest.fixture
def no_heic(monkeypatch) -> Iterator[None]:
    """As if the package pillow-heif were not installed."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    endings = {end: kind for end, kind in Image.registered_extensions().items() if kind != "HEIF"}
    monkeypatch.setattr(Image, "EXTENSION", endings)
    monkeypatch.setattr(Image, "ID", [kind for kind in Image.ID if kind != "HEIF"])
    read_heic.cache_clear()
    yield
    read_heic.cache_clear()


class SmallPictures(Dataset):
    """Random pictures of 8x8, the same at each call, in the form that torchvision has."""

    sizes: ClassVar[dict[str, int]] = SIZES

    def __init__(self, root="", split="train", transform=None, download=False) -> None:
        self._split, self.transform = split, transform
        self.pixels = np.random.default_rng(1 + len(split)).integers(
            0, 256, (self.sizes[split], 8, 8, 3), np.uint8
        )

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int):
        return self.transform(Image.fromarray(self.pixels[index])), index % 102


@pytest.fixture(scope="session", autouse=True)
def _small_pictures() -> Iterator[None]:
    """``--dataset small``: three batches of 8 in an epoch, the last one of 4."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "small", SmallPictures)
        yield


@pytest.fixture(scope="session")
def splits() -> tuple[InMemory, InMemory, InMemory]:
    """The small pictures as training has them."""
    train, val, test = (
        InMemory(SmallPictures(split=split, transform=ToTensor()), progress=False)
        for split in SIZES
    )
    return train, val, test
