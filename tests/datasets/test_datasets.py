from pathlib import Path

import pytest
import torch
from helpers import write_photograph
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, DTD, FakeData, Flowers102
from torchvision.transforms import Compose, Resize, ToTensor

from datasets import find_dataset
from datasets.downloads import LOCK
from datasets.errors import UserError
from datasets.folder import PictureFolder
from datasets.memory import InMemory
from datasets.synthetic import SyntheticFlowers

DATASETS = {"flowers102": Flowers102, "dtd": DTD, "synthetic": SyntheticFlowers}

ARCHIVE = "102flowers.tgz"
PIPELINE = Compose([Resize((8, 8)), ToTensor()])


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


@pytest.mark.parametrize("name", ["roses", __file__])
def test_another_name_is_refused_in_one_line_that_has_all_names(tmp_path, name):
    with pytest.raises(UserError, match=f"--dataset is {name}: no such folder") as error:
        find_dataset(name, tmp_path, DATASETS)
    assert all(name in str(error.value) for name in DATASETS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "near"),
    [("cifar", "CIFAR10 or CIFAR100"), ("fashion-mnist", "FashionMNIST"), ("flower", "flowers102")],
)
def test_a_name_that_is_nearly_right_is_told_the_right_one(tmp_path, name, near):
    with pytest.raises(UserError, match=rf"is it {near}\?$"):
        find_dataset(name, tmp_path, DATASETS)


@pytest.mark.parametrize("name", ["Flowers102", "FLOWERS102"])
def test_a_name_may_be_written_in_upper_and_lower_case(data_root, name):
    assert find_dataset(name, data_root, DATASETS)[0] == "flowers102"


def test_a_folder_that_is_called_as_a_data_set_is_not_taken_for_it_and_said(
    data_root, tmp_path, monkeypatch, capsys
):
    (tmp_path / "flowers102").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_dataset("flowers102", data_root, DATASETS)[0] == "flowers102"
    line = f"note: flowers102 is the data set, and {tmp_path / 'flowers102'} the folder\n"
    assert capsys.readouterr().err == line


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
    assert {path.name for path in tmp_path.iterdir()} - {LOCK} == {"stamps"}
    pictures = InMemory(dataset(split="val", transform=PIPELINE))
    assert pictures.pixels[:, 0, 0, 0].tolist() == [3, 4, 5]
    assert pictures.labels == [0, 1, 2]


def test_a_split_that_the_readers_own_class_lacks_is_downloaded(tmp_path):
    class Page(Stamps):
        """It downloads the split that it is called with, and no other."""

        def __init__(self, root, split="train", transform=None, download=False) -> None:
            if download:
                path = Path(root) / "stamps" / split / "1.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (9, 9)).save(path)
            super().__init__(root, split, transform)

    (tmp_path / "stamps" / "train").mkdir(parents=True)
    _, dataset = find_dataset("page", tmp_path, {"page": Page})
    assert [len(dataset(split=split)) for split in ("train", "val", "test")] == [0, 1, 1]


def test_an_error_in_the_readers_own_class_keeps_its_traceback(tmp_path):
    class Broken(Dataset):
        def __init__(self, root, split="train", transform=None, download=False) -> None:
            raise RuntimeError("sizes do not match")

    with pytest.raises(RuntimeError, match="sizes do not match"):
        find_dataset("broken", tmp_path, {"broken": Broken})


def untouched(*_: object, **__: object) -> None:
    raise AssertionError("something was read")


OTHER_CALLS = {
    "takes no split:": lambda root, transform=None: untouched(),
    "takes no transform:": lambda split="train": untouched(),
    "takes no split and no transform:": lambda root: untouched(),
    "needs table, too:": lambda table, split="train", transform=None: untouched(),
}


@pytest.mark.parametrize(("message", "own"), OTHER_CALLS.items(), ids=OTHER_CALLS)
def test_a_class_that_cannot_be_called_is_told_so_before_anything_is_read(tmp_path, message, own):
    with pytest.raises(UserError, match=f"the class of own {message} the top of datasets/__init"):
        find_dataset("own", tmp_path, {"own": own})


def test_a_class_upon_torchvisions_that_takes_train_is_told_that_split_is_needed(tmp_path):
    class Mine(CIFAR10):
        """A class of the reader's own, in spite of what it is made of."""

        def __init__(self, root, train=True, **more) -> None:
            untouched()

    with pytest.raises(UserError, match="the class of mine takes no split"):
        find_dataset("mine", tmp_path, {"mine": Mine})


def test_an_object_in_the_place_of_a_class_is_told_so(tmp_path):
    with pytest.raises(UserError, match="own stands for an object of FakeData: give the class"):
        find_dataset("own", tmp_path, {"own": FakeData()})


def test_a_class_may_have_just_a_split_and_a_transform_without_defaults(tmp_path):
    def own(split, transform):
        return [(split, transform)]

    _, dataset = find_dataset("own", tmp_path, {"own": own})
    assert dataset(split="val", transform=3) == [("val", 3)]


def test_whatever_takes_more_is_called_with_all_that_a_data_set_takes(tmp_path):
    def own(**more):
        return sorted(more)

    _, dataset = find_dataset("own", tmp_path, {"own": own})
    assert dataset(split="val", transform=3) == ["root", "split", "transform"]
