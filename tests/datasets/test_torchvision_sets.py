"""Data sets of torchvision's by their class, with files in the layouts that it reads."""

import importlib.util
import sys
from functools import partial
from pathlib import Path

import layouts
import pytest
import torch
import torchvision.datasets as torchvisions
from layouts import LAYOUTS
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, EMNIST, FakeData, Imagenette, OxfordIIITPet
from torchvision.transforms import Compose, Resize, ToTensor

from datasets import find_dataset
from datasets.errors import UserError
from datasets.memory import InMemory
from datasets.torchvision_sets import own_splits, places_of_tenths

SPLITS = ("train", "val", "test")
SMALL = Compose([Resize((8, 8)), ToTensor()])


def read(name: str, root: Path, own: dict[str, object] | None = None) -> list[InMemory]:
    """The three splits of a data set, as training reads them."""
    _, open_split = find_dataset(name, root, own or {})
    return [InMemory(open_split(split=split, transform=SMALL), progress=False) for split in SPLITS]


def as_set(pictures: torch.Tensor) -> set[bytes]:
    return {picture.numpy().tobytes() for picture in pictures}


@pytest.fixture(params=LAYOUTS)
def name(request, tmp_path, monkeypatch) -> str:
    """The name of a class whose files are in ``tmp_path``."""
    if request.param == "PCAM" and importlib.util.find_spec("h5py") is None:
        pytest.skip("h5py is not installed")
    write, _ = LAYOUTS[request.param]
    write(tmp_path, monkeypatch)
    return request.param


def test_each_class_has_its_own_splits_and_tenths_for_those_that_it_lacks(name, tmp_path):
    splits = read(name, tmp_path)
    assert tuple(map(len, splits)) == LAYOUTS[name][1]
    assert {split.name for split in splits} == {name}
    every = torch.cat([split.pixels for split in splits])
    assert len(as_set(every)) == len(every)  # none is in two splits


def test_the_name_may_be_written_in_upper_and_lower_case(tmp_path, monkeypatch):
    layouts.mnist(tmp_path, monkeypatch)
    for name in ("MNIST", "mnist", "Mnist"):
        assert find_dataset(name, tmp_path, {})[0] == "MNIST"


# Which pictures are in a split.


def test_a_validation_split_is_always_the_same_tenth_of_the_training_pictures(
    tmp_path, monkeypatch
):
    layouts.cifar10(tmp_path, monkeypatch)
    train, val, test = read("CIFAR10", tmp_path)
    whole = InMemory(CIFAR10(tmp_path, train=True, transform=SMALL), progress=False)
    places = [
        place for place in range(30) if as_set(whole.pixels[place, None]) & as_set(val.pixels)
    ]
    assert places == [6, 12, 29]
    assert as_set(train.pixels) | as_set(val.pixels) == as_set(whole.pixels)
    expected = InMemory(CIFAR10(tmp_path, train=False, transform=SMALL), progress=False)
    assert torch.equal(test.pixels, expected.pixels)


def test_a_class_that_lists_files_as_the_disk_has_them_is_divided_by_their_names(
    tmp_path, monkeypatch
):
    layouts.sun397(tmp_path, monkeypatch)
    dataset = torchvisions.SUN397(tmp_path)

    def last_tenth() -> list[Path]:
        places = places_of_tenths(dataset, tmp_path, 9, 10)
        return [dataset._image_files[place] for place in places]

    expected = last_tenth()
    assert expected == sorted(expected) and len(expected) == 4
    dataset._image_files.reverse()  # as on another disk
    assert last_tenth() == expected


def test_the_tenths_do_not_change_with_the_folder_that_the_data_are_in(tmp_path, monkeypatch):
    for place in ("here", "elsewhere"):
        (tmp_path / place).mkdir()
        layouts.euro_sat(tmp_path / place, monkeypatch)
    for split, other in zip(
        read("EuroSAT", tmp_path / "here"), read("EuroSAT", tmp_path / "elsewhere"), strict=True
    ):
        assert torch.equal(split.pixels, other.pixels)


def test_fake_data_have_no_files_and_are_divided(tmp_path):
    fake = partial(FakeData, size=40, image_size=(3, 8, 8))
    assert tuple(map(len, read("fake", tmp_path, {"fake": fake}))) == (32, 4, 4)
    assert not list(tmp_path.iterdir())


# Labels and pictures.


def test_labels_and_classes_are_those_of_the_class(tmp_path, monkeypatch):
    layouts.fgvc_aircraft(tmp_path, monkeypatch)
    for split in read("FGVCAircraft", tmp_path):
        assert split.classes == ["707-320", "A300B4 of two words"]
        assert split.labels == [label % 2 for label in range(len(split))]
    layouts.cifar10(tmp_path, monkeypatch)
    for split in read("CIFAR10", tmp_path):  # the first two are parts of what the class gives
        assert split.classes == [f"kind {number}" for number in range(10)]
        assert all(0 <= label < 10 for label in split.labels)


def test_pictures_that_are_all_grey_have_one_channel(tmp_path, monkeypatch):
    layouts.mnist(tmp_path, monkeypatch)
    assert {split.pixels.shape[3] for split in read("MNIST", tmp_path)} == {1}


@pytest.mark.parametrize("place", [0, 5])
def test_a_grey_photograph_among_colours_is_taken_as_one(tmp_path, monkeypatch, place):
    layouts.caltech101(tmp_path, monkeypatch)
    first, *_ = sorted((tmp_path / "caltech101" / "101_ObjectCategories").iterdir())[1:]
    path = sorted(first.iterdir())[place]
    Image.open(path).convert("L").save(path)
    assert {split.pixels.shape[3] for split in read("Caltech101", tmp_path)} == {3}


def test_colours_are_those_of_the_files(tmp_path, monkeypatch):
    layouts.country211(tmp_path, monkeypatch)
    _, open_split = find_dataset("country211", tmp_path, {})
    picture, _ = open_split(split="val", transform=ToTensor())[0]
    file = tmp_path / "country211" / "valid" / "AD" / "0.jpg"
    assert torch.equal(picture, ToTensor()(Image.open(file)))


@pytest.mark.parametrize("damage", ["truncated", "no picture"])
def test_a_damaged_picture_is_named_even_if_it_is_the_first(tmp_path, monkeypatch, damage):
    layouts.food101(tmp_path, monkeypatch)
    path = tmp_path / "food-101" / "images" / "apple_pie" / "train0.jpg"
    path.write_bytes(path.read_bytes()[:-300] if damage == "truncated" else b"no picture")
    with pytest.raises(UserError, match=f"^{path} cannot be read as a picture: "):
        read("food101", tmp_path)


def test_a_part_of_files_is_kept_for_the_next_run(tmp_path, monkeypatch, cache_folder):
    layouts.euro_sat(tmp_path, monkeypatch)
    first = read("EuroSAT", tmp_path)
    assert len(list(cache_folder.iterdir())) == 3
    for split, other in zip(first, read("EuroSAT", tmp_path), strict=True):
        assert torch.equal(split.pixels, other.pixels)
    assert len(list(cache_folder.iterdir())) == 3


# A choice of the reader's, by a line in DATASETS.


def test_a_class_that_needs_a_choice_says_which_and_a_line_makes_it(tmp_path, monkeypatch):
    layouts.emnist(tmp_path, monkeypatch)
    with pytest.raises(UserError) as error:
        find_dataset("EMNIST", tmp_path, {})
    assert str(error.value) == (
        "EMNIST needs a value for split (byclass, bymerge, balanced, letters, digits, mnist): "
        "choose it by a line in DATASETS, \"emnist\": partial(EMNIST, split='byclass')"
    )
    letters = partial(EMNIST, split="letters")
    train, val, test = read("letters", tmp_path, {"letters": letters})
    assert (len(train), len(val), len(test)) == (27, 3, 20)
    assert train.classes[1:4] == ["a", "b", "c"]


def test_a_line_may_choose_other_labels_and_sizes(tmp_path, monkeypatch):
    layouts.oxford_iiit_pet(tmp_path, monkeypatch)
    pets = partial(OxfordIIITPet, target_types=["category", "binary-category"])
    train, *_ = read("pets", tmp_path, {"pets": pets})
    assert set(train.labels) == {(0, 0), (1, 1)}
    layouts.imagenette(tmp_path, monkeypatch)
    (tmp_path / "imagenette2").rename(tmp_path / "imagenette2-160")
    small = partial(Imagenette, size="160px")
    assert tuple(map(len, read("small", tmp_path, {"small": small}))) == layouts.NO_TEST


# What cannot be used.


WITHOUT_LABELS = [
    *("VOCDetection", "VOCSegmentation", "CocoDetection", "Kitti", "WIDERFace", "Cityscapes"),
    *("SBDataset", "Kinetics", "UCF101", "HMDB51", "MovingMNIST", "PhotoTour", "LFWPairs"),
    *("KittiFlow", "Sintel", "FlyingChairs", "CarlaStereo", "CREStereo"),
]


@pytest.mark.parametrize("name", WITHOUT_LABELS)
def test_a_class_without_a_label_for_each_picture_is_refused_in_one_line(tmp_path, name):
    with pytest.raises(UserError, match=f"^{name} does not give pictures with a label each: "):
        find_dataset(name, tmp_path, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["ImageFolder", "DatasetFolder", "VisionDataset"])
def test_classes_that_have_no_pictures_of_their_own_are_no_names(tmp_path, name):
    with pytest.raises(UserError, match=f"--dataset is {name}: no such folder"):
        find_dataset(name, tmp_path, {})


PACKAGES = {"SVHN": "scipy", "StanfordCars": "scipy", "PCAM": "h5py", "LSUN": "lmdb"}


@pytest.mark.parametrize(("name", "package"), PACKAGES.items())
def test_a_package_that_is_missing_is_named_with_its_installation(
    tmp_path, monkeypatch, name, package
):
    if name in LAYOUTS and name != "PCAM":
        LAYOUTS[name][0](tmp_path, monkeypatch)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"^{name} needs a package: .*pip install {package}"):
        find_dataset(name, tmp_path, {})


def test_the_package_for_googles_server_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(UserError, match=r"^CelebA needs a package: .*pip install gdown"):
        find_dataset("celeba", tmp_path, {})


NOT_DOWNLOADED = {
    "FER2013": r"\(train.csv not found in ROOT/fer2013 or corrupted.*\): it looks for its files in",
    "ImageNet": r"\(The archive ILSVRC2012_devkit_t12.tar.gz is not present .* place it in ROOT",
    "StanfordCars": "it looks for ROOT/stanford_cars, ROOT/stanford_cars/devkit/cars_train_annos.m",
    "LFWPeople": "it looks for ROOT/lfw-py$",
}


@pytest.mark.parametrize(("name", "message"), NOT_DOWNLOADED.items())
def test_a_class_that_cannot_download_says_where_its_files_have_to_be(tmp_path, name, message):
    root = tmp_path / "data"
    whole = f"^{name} is not in ROOT, and its class does not download it .*{message}"
    with pytest.raises(UserError, match=whole.replace("ROOT", str(root))) as error:
        find_dataset(name, root, {})
    assert "\n" not in str(error.value)


def test_a_class_without_a_training_split_says_which_splits_it_has(tmp_path):
    def odd(root, split="spring") -> None:
        torchvisions.utils.verify_str_arg(split, "split", ("spring", "autumn"))

    with pytest.raises(UserError, match="odd has no training split, only spring, autumn"):
        own_splits("odd", tmp_path, odd)


def test_a_readers_class_upon_vision_dataset_is_one_of_the_readers_own(tmp_path):
    class Mine(torchvisions.VisionDataset):
        def __init__(self, root, split="train", transform=None) -> None:
            super().__init__(root, transform=transform)
            self.split = split

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int):
            return self.transform(Image.new("RGB", (8, 8), (index, 0, 0))), self.split

    assert isinstance(Mine(tmp_path), Dataset)
    train, val, test = read("mine", tmp_path, {"mine": Mine})
    assert [split.labels for split in (train, val, test)] == [[name] * 3 for name in SPLITS]
