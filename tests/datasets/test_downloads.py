"""Downloads from a real server on 127.0.0.1: complete or not at all, by one run at a time."""

import gzip
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from conftest import FolderServer, served
from layouts import md5, qmnist
from torchvision.datasets import MNIST, PCAM, QMNIST, CelebA, FGVCAircraft, Flowers102

from datasets import downloads
from datasets.downloads import COMPLETE, INCOMPLETE, LOCK, open_all
from datasets.errors import UserError

ARCHIVE = "102flowers.tgz"
FILES = (ARCHIVE, "imagelabels.mat", "setid.mat")
TRAIN, TEST = {"train": True}, {"train": False}


def names_in(folder: Path) -> set[str]:
    """What is in a folder, but the lock."""
    return {path.name for path in folder.iterdir() if path.name != LOCK}


def open_flowers(root: Path) -> None:
    """Find the training pictures of Flowers102, or download them."""
    open_all("flowers102", root, Flowers102, [{"split": "train"}])


def stall(server, handler) -> None:
    """Send the beginning of a file, and then nothing."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    handler.wfile.write(bytes(1000))
    server.say_nothing(handler)


# Complete or not at all.


def test_a_download_leaves_the_flowers_unpacked_and_nothing_else(server, tmp_path, capsys):
    root = tmp_path / "some" / "data"
    before = socket.getdefaulttimeout()
    open_flowers(root)
    assert socket.getdefaulttimeout() == before != downloads.TIMEOUT
    assert capsys.readouterr().err.count(f"Downloading flowers102 to {root}\n") == 1
    assert names_in(root) == {"flowers-102"}
    assert names_in(root / "flowers-102") == {*FILES, "jpg"}
    assert len(list((root / "flowers-102" / "jpg").iterdir())) == 60


@pytest.mark.parametrize("part", ["jpg", "imagelabels.mat"])
def test_flowers_that_lack_a_part_are_named_and_not_touched(server, data_root, part):
    folder = data_root / "flowers-102"
    path = folder / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = names_in(folder)
    with pytest.raises(UserError, match=f"{folder} is there, damaged or .*move it away"):
        open_flowers(data_root)
    assert names_in(folder) == before
    assert names_in(data_root) == {"flowers-102"}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", ["cut_off", "garble"])
def test_after_a_damaged_download_nothing_is_left_and_the_next_succeeds(
    server, tmp_path, name, fault
):
    server.faults[name] = getattr(server, fault)
    with pytest.raises(UserError, match="the download of flowers102 is damaged"):
        open_flowers(tmp_path)
    assert names_in(tmp_path) == set()
    server.faults.clear()
    open_flowers(tmp_path)
    assert len(Flowers102(tmp_path, "train")) == 20


@pytest.mark.parametrize("name", [ARCHIVE, "setid.mat"])
@pytest.mark.parametrize("fault", ["say_nothing", "stall", "fail", "speak_another_language"])
def test_a_server_that_does_not_answer_counts_as_unreachable(
    server, tmp_path, monkeypatch, name, fault
):
    monkeypatch.setattr(downloads, "TIMEOUT", 0.3)
    server.faults[name] = partial(stall, server) if fault == "stall" else getattr(server, fault)
    with pytest.raises(ConnectionError, match="cannot be reached") as error:
        open_flowers(tmp_path)
    assert "\n" not in str(error.value)
    assert names_in(tmp_path) == set()


def test_where_all_is_there_nothing_is_written_not_even_the_lock(server, data_root):
    open_flowers(data_root)
    assert server.asked_for == []
    assert {path.name for path in data_root.iterdir()} == {"flowers-102"}


def test_what_a_killed_run_had_half_downloaded_goes_with_the_next_download(server, tmp_path):
    (tmp_path / f"{INCOMPLETE}abc" / "files").mkdir(parents=True)
    open_flowers(tmp_path)
    assert names_in(tmp_path) == {"flowers-102"}


# Where a picture is missing the class says nothing of it.
@pytest.mark.parametrize("names", [("jpg", "setid.mat"), ("jpg/image_00007.jpg",)])
def test_what_a_killed_run_had_not_moved_to_its_place_is_moved_by_the_next(
    server, data_root, names
):
    place, left = data_root / "flowers-102", data_root / COMPLETE / "flowers-102"
    (left / names[0]).parent.mkdir(parents=True)
    for name in names:
        (place / name).rename(left / name)
    open_flowers(data_root)
    assert server.asked_for == []
    assert names_in(data_root) == {"flowers-102"}
    assert names_in(place) == {"imagelabels.mat", "jpg", "setid.mat"}
    assert len(names_in(place / "jpg")) == 60


# Split by split.


@pytest.fixture
def qmnist_server(tmp_path, monkeypatch) -> Iterator[FolderServer]:
    """A server of a small QMNIST, whose splits are files of their own."""
    folder = tmp_path / "served"
    qmnist(folder, monkeypatch)
    with served(folder / "QMNIST" / "raw") as server:
        resources = {}
        for split in ("train", "test"):
            resources[split] = []
            for url, _ in QMNIST.resources[split]:
                path = folder / "QMNIST" / "raw" / Path(url).name
                path.write_bytes(gzip.compress(path.with_suffix("").read_bytes()))
                resources[split].append((server.url + path.name, md5(path)))
        monkeypatch.setattr(QMNIST, "resources", resources)
        yield server


def test_both_splits_are_downloaded_at_once(qmnist_server, tmp_path, capsys):
    train, test = open_all("QMNIST", tmp_path / "data", QMNIST, [TRAIN, TEST])
    assert (len(train), len(test)) == (30, 20)
    assert capsys.readouterr().err.count("Downloading QMNIST") == 1


def test_a_split_that_is_missing_is_downloaded_beside_the_one_that_is_there(
    qmnist_server, tmp_path
):
    open_all("QMNIST", tmp_path / "data", QMNIST, [TRAIN])
    before = names_in(tmp_path / "data" / "QMNIST" / "raw")
    qmnist_server.asked_for.clear()
    train, test = open_all("QMNIST", tmp_path / "data", QMNIST, [TRAIN, TEST])
    assert (len(train), len(test)) == (30, 20)
    assert {"-test-" in name for name in qmnist_server.asked_for} == {True}
    assert before < names_in(tmp_path / "data" / "QMNIST" / "raw")
    assert names_in(tmp_path / "data") == {"QMNIST"}


def test_after_a_second_split_that_came_damaged_the_first_one_is_not_there_either(
    qmnist_server, tmp_path
):
    qmnist_server.faults["qmnist-test-labels-idx2-int.gz"] = qmnist_server.garble
    with pytest.raises(UserError, match="the download of QMNIST is damaged"):
        open_all("QMNIST", tmp_path / "data", QMNIST, [TRAIN, TEST])
    assert names_in(tmp_path / "data") == set()


# Two runs at once.


def test_of_two_runs_one_downloads_and_the_other_waits_for_it(server, tmp_path, capsys):
    begun = threading.Event()

    def slowly(handler) -> None:
        begun.set()
        time.sleep(0.3)
        content = Path(handler.translate_path(handler.path)).read_bytes()
        handler.answer(content, len(content))

    server.faults[ARCHIVE] = slowly
    first = threading.Thread(target=open_flowers, args=(tmp_path,))
    first.start()
    assert begun.wait(10)
    open_flowers(tmp_path)
    first.join()
    # torchvision asks for each file twice, first whether it has moved
    assert sorted(server.asked_for) == sorted(2 * FILES)
    said = capsys.readouterr().err
    assert said.count("Downloading flowers102") == 1
    assert f"Waiting for another run that downloads to {tmp_path}\n" in said


# What torchvision says in its own ways.


def test_the_servers_of_mnist_are_named_in_one_line_where_none_answers(
    no_server, tmp_path, monkeypatch
):
    monkeypatch.setattr(MNIST, "mirrors", [no_server, no_server])
    with pytest.raises(ConnectionError, match=r"cannot be reached \(.*refused") as error:
        open_all("MNIST", tmp_path, MNIST, [TRAIN])
    assert str(error.value).startswith(f"MNIST is not in {tmp_path} and its server")
    assert "\n" not in str(error.value)


def test_half_an_archive_without_a_checksum_is_a_damaged_download(tmp_path, monkeypatch):
    (tmp_path / "planes").mkdir()
    (tmp_path / "planes" / "all").write_bytes(bytes(range(256)) * 400)
    archive = shutil.make_archive(str(tmp_path / "fgvc"), "gztar", tmp_path / "planes")
    with served(tmp_path) as server:
        server.faults["fgvc.tar.gz"] = server.cut_off
        monkeypatch.setattr(FGVCAircraft, "_URL", server.url + Path(archive).name)
        with pytest.raises(UserError, match="the download of FGVCAircraft is damaged"):
            open_all("FGVCAircraft", tmp_path / "data", FGVCAircraft, [{"split": "train"}])
    assert names_in(tmp_path / "data") == set()


@pytest.mark.parametrize("kind", ["gdown.exceptions.DownloadError", "requests.ConnectionError"])
def test_what_googles_server_says_no_with_counts_as_unreachable(tmp_path, kind):
    module, _, name = kind.rpartition(".")
    error = type(name, (Exception,), {"__module__": module})

    def download(*_: object) -> None:
        raise error("Too many users\nhave viewed this file")

    # gdown itself is none of this project's packages
    faces = type("Faces", (CelebA,), {"download": download})
    with pytest.raises(ConnectionError, match=r"\(Too many users have viewed this file\)"):
        open_all("CelebA", tmp_path, faces, [{"split": "train"}])


@pytest.fixture
def without(monkeypatch) -> Callable[[str], None]:
    """As if a package were not installed."""
    return lambda package: monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.parametrize(("package", "dataset"), [("gdown", CelebA), ("h5py", PCAM)])
def test_a_package_that_is_missing_is_no_damaged_download(without, tmp_path, package, dataset):
    without(package)
    with pytest.raises(RuntimeError, match=f"pip install {package}"):
        open_all("it", tmp_path, dataset, [{"split": "train"}])
    assert names_in(tmp_path) == set()


def test_a_file_in_the_way_of_what_is_moved_is_named_and_not_touched(server, tmp_path):
    (tmp_path / "flowers-102").write_text("mine")
    with pytest.raises(UserError, match=f"{tmp_path / 'flowers-102'} is there"):
        open_flowers(tmp_path)
    assert (tmp_path / "flowers-102").read_text() == "mine"
    assert names_in(tmp_path) == {"flowers-102"}
