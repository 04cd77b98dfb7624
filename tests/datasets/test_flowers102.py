import os
import shutil
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat
from torchvision.datasets import Flowers102
from torchvision.datasets.utils import calculate_md5

from datasets import flowers102
from datasets.flowers102 import download, find_pictures, is_on_disk

ARCHIVE = "102flowers.tgz"
FILES = (ARCHIVE, "imagelabels.mat", "setid.mat")


@pytest.fixture(autouse=True)
def _short_time_out(monkeypatch) -> None:
    monkeypatch.setattr(flowers102, "TIMEOUT", 0.5)


def accept(monkeypatch, path: Path) -> None:
    """Have torchvision take ``path`` for the right file of its name."""
    files = {
        part: (name, calculate_md5(path) if name == path.name else md5)
        for part, (name, md5) in Flowers102._file_dict.items()
    }
    monkeypatch.setattr(Flowers102, "_file_dict", files)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# Found on disk.


def test_unpacked_flowers_are_found(data_root):
    assert is_on_disk(data_root)


@pytest.mark.parametrize("part", ["jpg", "imagelabels.mat", "setid.mat"])
def test_flowers_that_lack_a_part_are_not_found(data_root, part):
    path = data_root / "flowers-102" / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert not is_on_disk(data_root)


def test_an_empty_or_missing_folder_holds_no_flowers(tmp_path):
    assert not is_on_disk(tmp_path)
    assert not is_on_disk(tmp_path / "nowhere")


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_paths_and_labels_are_torchvisions(data_root, split):
    dataset = Flowers102(data_root, split)
    paths, labels = find_pictures(data_root, split)
    assert paths == dataset._image_files
    assert labels == dataset._labels
    assert all(path.is_file() for path in paths)


@pytest.mark.parametrize("name", ["imagelabels.mat", "setid.mat"])
def test_a_damaged_mat_file_is_refused_and_its_folder_named(data_root, name):
    path = data_root / "flowers-102" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"\.mat files in {path.parent} are damaged .*delete them"
    ):
        find_pictures(data_root, "train")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        pytest.param("imagelabels.mat", {"labels": np.arange(1, 6)}, "", id="too-few-labels"),
        pytest.param("setid.mat", {"something": np.arange(1, 6)}, "valid", id="no-splits"),
        pytest.param("setid.mat", {"valid": []}, "the val split needs pictures", id="no-pictures"),
        pytest.param(
            "imagelabels.mat",
            {"labels": np.arange(60) + 44},
            "labels from 1 to 102",
            id="label-103",
        ),
        pytest.param("imagelabels.mat", {"labels": np.zeros(60)}, "1 to 102", id="label-0"),
    ],
)
def test_mat_files_of_other_content_are_an_error(data_root, monkeypatch, name, content, reason):
    folder = data_root / "flowers-102"
    savemat(folder / name, content)
    accept(monkeypatch, folder / name)
    # All pictures are in validation, so that each label counts.
    if name == "imagelabels.mat":
        savemat(folder / "setid.mat", {"valid": np.arange(1, 61)})
        accept(monkeypatch, folder / "setid.mat")
    with pytest.raises(ValueError, match=rf"\.mat files in {folder} are damaged \(.*{reason}") as e:
        find_pictures(data_root, "val")
    assert "\n" not in str(e.value)


# Downloaded.


def test_a_download_leaves_the_flowers_unpacked(server, tmp_path):
    download(tmp_path / "data")
    folder = tmp_path / "data" / "flowers-102"
    assert is_on_disk(tmp_path / "data")
    assert names_in(folder) - {".lock"} == {*FILES, "jpg"}
    paths = [
        path
        for split in ("train", "val", "test")
        for path in find_pictures(folder.parent, split)[0]
    ]
    assert sorted(paths) == sorted((folder / "jpg").iterdir())


@pytest.mark.parametrize("terminal", [True, False])
def test_a_download_says_what_it_does_and_shows_bars_on_terminals(
    server, tmp_path, capsys, monkeypatch, terminal
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    download(tmp_path)
    errors = capsys.readouterr().err
    assert ("100%" in errors) == terminal
    assert f"Unpacking {tmp_path / 'flowers-102' / ARCHIVE}\n" in errors


def test_an_archive_is_not_downloaded_where_it_is_unpacked_already(server, data_root):
    (data_root / "flowers-102" / "setid.mat").unlink()
    download(data_root)
    assert is_on_disk(data_root)
    assert set(server.asked_for) == {"setid.mat"}


def test_two_first_downloads_at_once_download_once(server, tmp_path):
    threads = [threading.Thread(target=download, args=(tmp_path,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [server.asked_for.count(name) for name in FILES] == [1, 1, 3 + 1]
    assert len(find_pictures(tmp_path, "test")[0]) == 34


@pytest.mark.parametrize("name", ["imagelabels.mat", ARCHIVE])
def test_a_fifo_in_the_place_of_a_file_is_replaced(server, tmp_path, name):
    (tmp_path / "flowers-102").mkdir()
    os.mkfifo(tmp_path / "flowers-102" / name)
    download(tmp_path)
    assert is_on_disk(tmp_path)
    assert (tmp_path / "flowers-102" / name).is_file()


def test_what_a_killed_run_left_is_removed(server, tmp_path):
    left = tmp_path / "flowers-102" / ".unpacking" / "jpg"
    left.mkdir(parents=True)
    (left.parents[1] / "setid.part").write_text("half")
    download(tmp_path)
    assert names_in(tmp_path / "flowers-102") - {".lock"} == {*FILES, "jpg"}


def test_files_that_are_there_already_are_not_downloaded_again(server, flowers, tmp_path):
    folder = tmp_path / "flowers-102"
    folder.mkdir()
    shutil.copy(flowers / ARCHIVE, folder)
    download(tmp_path)
    assert ARCHIVE not in server.asked_for
    assert is_on_disk(tmp_path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", ["cut_off", "garble"])
def test_a_file_that_arrives_damaged_is_named(server, tmp_path, name, fault):
    server.faults[name] = getattr(server, fault)
    with pytest.raises(ValueError, match=rf"{server.url}{name} came .*MD5 sum.*Run again"):
        download(tmp_path)
    assert not is_on_disk(tmp_path)


@pytest.mark.parametrize("fault", ["cut_off", "garble"])
def test_after_a_damaged_download_the_next_one_succeeds(server, tmp_path, fault):
    server.faults[ARCHIVE] = getattr(server, fault)
    with pytest.raises(ValueError, match="Run again"):
        download(tmp_path)
    server.faults.clear()
    download(tmp_path)
    assert is_on_disk(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_a_server_that_answers_500_counts_as_unreachable(server, tmp_path, name):
    server.faults[name] = server.fail
    with pytest.raises(ConnectionError, match=f"{server.url}{name}: .*500"):
        download(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_a_server_that_accepts_and_says_nothing_is_given_up_in_time(server, tmp_path, name):
    server.faults[name] = server.say_nothing
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=f"{server.url}{name}"):
        download(tmp_path)
    assert time.monotonic() - start < 4


def test_a_server_that_stops_in_the_middle_is_given_up_in_time(server, tmp_path):
    def stall(handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        handler.wfile.write(bytes(1000))
        server.say_nothing(handler)

    server.faults[ARCHIVE] = stall
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=f"{server.url}{ARCHIVE}"):
        download(tmp_path)
    assert time.monotonic() - start < 4


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("name", FILES)
def test_a_server_that_speaks_no_http_counts_as_unreachable(server, tmp_path, name):
    server.faults[name] = server.speak_another_language
    with pytest.raises(ConnectionError, match=f"{server.url}{name}"):
        download(tmp_path)


def test_a_refused_connection_counts_as_unreachable(no_server, tmp_path):
    with pytest.raises(ConnectionError, match=f"{no_server}.*refused"):
        download(tmp_path)
    assert names_in(tmp_path) == set()


def test_a_name_that_does_not_resolve_counts_as_unreachable(flowers, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(Flowers102, "_download_url_prefix", "http://flowers.invalid/")
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=r"http://flowers\.invalid/setid\.mat"):
        download(tmp_path)
    assert time.monotonic() - start < 4
    assert names_in(tmp_path) == set()


def test_a_folder_that_cannot_be_written_to_is_an_error_of_its_own(server, tmp_path):
    (tmp_path / "flowers-102").write_text("a file where the folder should be")
    with pytest.raises(FileExistsError):
        download(tmp_path)


# Unpacked.


@pytest.fixture
def offer(flowers, server, tmp_path, monkeypatch):
    """Have the server offer an archive of the given members instead of its own."""
    offered = tmp_path / "offered"
    offered.mkdir()

    def make(**members: tarfile.TarInfo) -> None:
        with tarfile.open(offered / ARCHIVE, "w:gz") as archive:
            for member in members.values():
                archive.addfile(member)
        accept(monkeypatch, offered / ARCHIVE)

        def send(handler) -> None:
            content = (offered / ARCHIVE).read_bytes()
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content)

        server.faults[ARCHIVE] = send

    return make


def link_to(name: str, target: str) -> tarfile.TarInfo:
    link = tarfile.TarInfo(name)
    link.type, link.linkname = tarfile.SYMTYPE, target
    return link


@pytest.mark.parametrize(
    "member",
    [
        tarfile.TarInfo("../../escaped"),
        tarfile.TarInfo("jpg/../../../escaped"),
        link_to("jpg", "/etc"),
        link_to("jpg/link", "../../../.."),
    ],
    ids=["up", "up-within", "absolute-link", "link-up"],
)
def test_an_archive_that_leaves_its_folder_is_refused(offer, tmp_path, member):
    offer(member=member)
    with pytest.raises(ValueError, match=rf"{ARCHIVE} cannot be unpacked \(.*delete it"):
        download(tmp_path / "data")
    assert names_in(tmp_path) == {"data", "offered"}
    assert names_in(tmp_path / "data") == {"flowers-102"}
    assert names_in(tmp_path / "data" / "flowers-102") - {".lock"} == set(FILES)


def test_an_archive_without_pictures_is_refused(offer, tmp_path):
    offer(member=tarfile.TarInfo("readme.txt"))
    with pytest.raises(ValueError, match=f"{ARCHIVE} cannot be unpacked"):
        download(tmp_path)
    assert not is_on_disk(tmp_path)


def test_a_file_that_is_no_archive_is_refused(server, tmp_path, monkeypatch):
    no_archive = tmp_path / ARCHIVE
    no_archive.write_bytes(b"no flowers today")
    accept(monkeypatch, no_archive)
    server.faults[ARCHIVE] = server.garble
    with pytest.raises(ValueError, match=f"{ARCHIVE} cannot be unpacked"):
        download(tmp_path / "data")
