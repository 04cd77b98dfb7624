import shutil
import socket
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import write_photograph
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import DTD, Flowers102
from torchvision.transforms import Compose, Resize, ToTensor

import datasets
from datasets import download, find_dataset
from datasets.errors import UserError
from datasets.folder import PictureFolder
from datasets.memory import InMemory
from datasets.synthetic import SyntheticFlowers

DATASETS = {"flowers102": Flowers102, "dtd": DTD, "synthetic": SyntheticFlowers}

ARCHIVE = "102flowers.tgz"
FILES = (ARCHIVE, "imagelabels.mat", "setid.mat")
PIPELINE = Compose([Resize((8, 8)), ToTensor()])


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def stall(server, handler) -> None:
    """Send the beginning of a file, and then nothing."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    handler.wfile.write(bytes(1000))
    server.say_nothing(handler)


# The data set "auto".


def test_auto_takes_flowers_on_disk_and_any_other_name_stays(server, data_root, tmp_path):
    assert find_dataset("auto", data_root, DATASETS)[0] == "flowers102"
    for name in ("flowers102", "synthetic", str(tmp_path)):
        assert find_dataset(name, data_root, DATASETS)[0] == name
    assert server.asked_for == []


def test_auto_downloads_what_is_not_on_disk(server, tmp_path):
    assert find_dataset("auto", tmp_path, DATASETS)[0] == "flowers102"
    assert len(Flowers102(tmp_path, "test")) == 34


def test_auto_takes_synthetic_flowers_where_no_server_is_and_says_why(no_server, tmp_path, capsys):
    name, dataset = find_dataset("auto", tmp_path, DATASETS)
    assert (name, len(dataset(split="val"))) == ("synthetic", 1020)
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "warning" in each]
    reason = f"warning: flowers102 is not in {tmp_path} and its server cannot be reached"
    assert line.startswith(reason)
    assert "refused" in line
    assert line.endswith("Training on SYNTHETIC flowers")
    with pytest.raises(ConnectionError, match="--data-root, or take --dataset synthetic"):
        find_dataset("flowers102", tmp_path, DATASETS)


@pytest.mark.parametrize("fault", ["cut_off", "garble"])
def test_a_damaged_download_is_no_reason_to_fall_back(server, tmp_path, fault):
    server.faults[ARCHIVE] = getattr(server, fault)
    with pytest.raises(UserError, match="download of flowers102 is damaged"):
        find_dataset("auto", tmp_path, DATASETS)


# Other names.


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_flowers_are_torchvisions_bit_for_bit(data_root, split):
    _, dataset = find_dataset("flowers102", data_root, DATASETS)
    pictures = InMemory(dataset(split=split, transform=PIPELINE))
    expected = Flowers102(data_root, split, transform=PIPELINE)
    assert len(pictures) == len(expected)
    assert pictures.classes == expected.classes
    for (image, label), (posts_image, posts_label) in zip(pictures, expected, strict=True):
        assert torch.equal(image, posts_image)
        assert label == posts_label


def test_a_folder_is_a_data_set(tmp_path, monkeypatch):
    for split in ("train", "val", "test"):
        for name in ("one.jpg", "two.jpg"):
            write_photograph(tmp_path / "photographs" / split / name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path / "photographs"), "photographs", "~/photographs"):
        _, dataset = find_dataset(name, tmp_path / "elsewhere", DATASETS)
        val = dataset(split="val", transform=PIPELINE)
        assert isinstance(val, PictureFolder)
        assert val[0][0].shape == (3, 8, 8)


@pytest.mark.parametrize("name", ["mnist", __file__])
def test_another_name_is_refused_in_one_line_that_has_all_names(tmp_path, name):
    with pytest.raises(UserError, match=f"--dataset is {name}: no such folder") as error:
        find_dataset(name, tmp_path, DATASETS)
    assert all(name in str(error.value) for name in DATASETS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["auto", "flowers102"])
def test_a_data_root_that_cannot_be_written_to_is_an_error_of_its_own(server, tmp_path, name):
    (tmp_path / "data").write_text("a file where the folder should be")
    with pytest.raises(OSError, match=f"{tmp_path / 'data'}") as error:
        find_dataset(name, tmp_path / "data", DATASETS)
    assert not isinstance(error.value, ConnectionError)


# A data set of the reader's own.


class Stamps(Dataset):
    """A reader's data set, which "downloads" three pictures of a colour for each split."""

    def __init__(self, root, split="train", transform=None, download=False) -> None:
        self.folder, self.transform = Path(root) / "stamps" / split, transform
        for number in range(9 if download else 0):
            name = ("train", "val", "test")[number // 3]
            (Path(root) / "stamps" / name).mkdir(parents=True, exist_ok=True)
            picture = Image.new("RGB", (9, 9), (number, 0, 0))
            picture.save(Path(root) / "stamps" / name / f"{number}.png")
        if not self.folder.is_dir():
            raise RuntimeError("Stamps not found. Use download=True to download them.")
        self.files = sorted(self.folder.iterdir())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int):
        return self.transform(Image.open(self.files[index])), index


def test_a_class_of_the_readers_own_is_one_more_entry(tmp_path):
    _, dataset = find_dataset("stamps", tmp_path, DATASETS | {"stamps": Stamps})
    assert names_in(tmp_path) == {"stamps"}
    pictures = InMemory(dataset(split="val", transform=PIPELINE))
    assert pictures.pixels[:, 0, 0, 0].tolist() == [3, 4, 5]
    assert pictures.labels == [0, 1, 2]


def test_an_error_in_the_readers_own_class_keeps_its_traceback(tmp_path):
    class Broken(Dataset):
        def __init__(self, root, split="train", transform=None, download=False) -> None:
            raise RuntimeError("sizes do not match")

    with pytest.raises(RuntimeError, match="sizes do not match"):
        find_dataset("broken", tmp_path, {"broken": Broken})


# download().


def test_a_download_leaves_the_flowers_unpacked_and_nothing_else(server, tmp_path, capsys):
    root = tmp_path / "some" / "data"
    before = socket.getdefaulttimeout()
    download("flowers102", root, Flowers102)
    assert socket.getdefaulttimeout() == before != datasets.TIMEOUT
    assert f"Downloading flowers102 to {root}\n" in capsys.readouterr().err
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
        find_dataset("flowers102", data_root, DATASETS)
    assert names_in(folder) == before
    assert names_in(data_root) == {"flowers-102"}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", ["cut_off", "garble"])
def test_after_a_damaged_download_nothing_is_left_and_the_next_succeeds(
    server, tmp_path, name, fault
):
    server.faults[name] = getattr(server, fault)
    with pytest.raises(UserError, match="the download of flowers102 is damaged"):
        download("flowers102", tmp_path, Flowers102)
    assert names_in(tmp_path) == set()
    server.faults.clear()
    download("flowers102", tmp_path, Flowers102)
    assert len(Flowers102(tmp_path, "train")) == 20


@pytest.mark.parametrize("name", [ARCHIVE, "setid.mat"])
@pytest.mark.parametrize("fault", ["say_nothing", "stall", "fail", "speak_another_language"])
def test_a_server_that_does_not_answer_counts_as_unreachable(
    server, tmp_path, monkeypatch, name, fault
):
    monkeypatch.setattr(datasets, "TIMEOUT", 0.3)
    server.faults[name] = partial(stall, server) if fault == "stall" else getattr(server, fault)
    with pytest.raises(ConnectionError, match="cannot be reached") as error:
        download("flowers102", tmp_path, Flowers102)
    assert "\n" not in str(error.value)
    assert names_in(tmp_path) == set()
