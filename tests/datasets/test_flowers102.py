import shutil
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat
from torchvision.datasets import Flowers102

from datasets import flowers102
from datasets.flowers102 import ServerUnreachableError, download, find_pictures, is_on_disk

ARCHIVE = "102flowers.tgz"
FILES = (ARCHIVE, "imagelabels.mat", "setid.mat")


@pytest.fixture(autouse=True)
def _short_time_out(monkeypatch) -> None:
    monkeypatch.setattr(flowers102, "TIMEOUT", 0.5)


def accept(monkeypatch, path: Path) -> None:
    """Have torchvision take ``path`` for the right file of its name."""
    files = {
        part: (name, flowers102_md5(path) if name == path.name else md5)
        for part, (name, md5) in Flowers102._file_dict.items()
    }
    monkeypatch.setattr(Flowers102, "_file_dict", files)


def flowers102_md5(path: Path) -> str:
    from torchvision.datasets.utils import calculate_md5

    return calculate_md5(path)


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
def test_a_damaged_mat_file_is_named(data_root, name):
    path = data_root / "flowers-102" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} is damaged: its MD5 sum.*Delete it"):
        find_pictures(data_root, "train")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        pytest.param("imagelabels.mat", "labels", id="too-few-labels"),
        pytest.param("setid.mat", "something", id="no-splits"),
    ],
)
def test_mat_files_that_do_not_fit_each_other_are_an_error(data_root, monkeypatch, name, key):
    folder = data_root / "flowers-102"
    savemat(folder / name, {key: np.arange(1, 6)})
    accept(monkeypatch, folder / name)
    with pytest.raises(ValueError, match=rf"\.mat files in {folder} do not fit each other"):
        find_pictures(data_root, "test")


# Downloaded.


def test_a_download_leaves_the_flowers_unpacked(server, tmp_path):
    download(tmp_path / "data")
    folder = tmp_path / "data" / "flowers-102"
    assert is_on_disk(tmp_path / "data")
    assert names_in(folder) == {*FILES, "jpg"}
    paths = [
        path
        for split in ("train", "val", "test")
        for path in find_pictures(folder.parent, split)[0]
    ]
    assert sorted(paths) == sorted((folder / "jpg").iterdir())


def test_a_download_shows_its_progress(server, tmp_path, capsys):
    download(tmp_path)
    assert "100%" in capsys.readouterr().err


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
    with pytest.raises(ValueError, match=rf"{name}, downloaded from .*MD5 sum.*Run again"):
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
    with pytest.raises(ServerUnreachableError, match=f"{server.url}{name}: .*500"):
        download(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_a_server_that_accepts_and_says_nothing_is_given_up_in_time(server, tmp_path, name):
    server.faults[name] = server.say_nothing
    start = time.monotonic()
    with pytest.raises(ServerUnreachableError, match=f"{server.url}{name}"):
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
    with pytest.raises(ServerUnreachableError, match=f"{server.url}{ARCHIVE}"):
        download(tmp_path)
    assert time.monotonic() - start < 4


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("name", FILES)
def test_a_server_that_speaks_no_http_counts_as_unreachable(server, tmp_path, name):
    server.faults[name] = server.speak_another_language
    with pytest.raises(ServerUnreachableError, match=f"{server.url}{name}"):
        download(tmp_path)


def test_a_refused_connection_counts_as_unreachable(no_server, tmp_path):
    with pytest.raises(ServerUnreachableError, match=f"{no_server}.*refused"):
        download(tmp_path)
    assert names_in(tmp_path) == set()


def test_a_name_that_does_not_resolve_counts_as_unreachable(flowers, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(Flowers102, "_download_url_prefix", "http://flowers.invalid/")
    start = time.monotonic()
    with pytest.raises(ServerUnreachableError, match=r"http://flowers\.invalid/setid\.mat"):
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
    with pytest.raises(ValueError, match=rf"{ARCHIVE} cannot be unpacked: .*Delete it"):
        download(tmp_path / "data")
    assert names_in(tmp_path) == {"data", "offered"}
    assert names_in(tmp_path / "data") == {"flowers-102"}
    assert names_in(tmp_path / "data" / "flowers-102") == set(FILES)


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
