import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
import torchvision
from helpers import ROOT, write_photograph
from pictures import fill
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision.datasets import DTD, Flowers102, ImageFolder
from torchvision.transforms import Compose, Grayscale, Resize, ToTensor

from datasets.cache import cache_folder as folder_of_the_cache
from datasets.cache import fingerprint
from datasets.folder import PictureFolder
from datasets.memory import InMemory
from datasets.synthetic import SyntheticFlowers

SMALL = Compose([Resize((8, 8)), ToTensor()])
PNGS = ("a/1.png", "a/2.png", "b/1.png", "b/2.png")


def read(dataset: Dataset) -> InMemory:
    return InMemory(dataset, progress=False)


@pytest.fixture
def is_read(cache_folder, capsys):
    """Whether the pictures of a data set are read, and not taken from an empty cache's files."""

    def is_read(dataset: Dataset) -> bool:
        capsys.readouterr()
        InMemory(dataset)
        return "Reading" in capsys.readouterr().err

    return is_read


# Data sets of several kinds, made of the same files.


def picture_folder(folder: Path) -> Dataset:
    return PictureFolder(
        fill(folder, *(f"{split}/{name}" for split in ("train", "val", "test") for name in PNGS)),
        transform=SMALL,
    )


def image_folder(folder: Path) -> Dataset:
    return ImageFolder(str(fill(folder, *PNGS)), transform=SMALL)


def textures(folder: Path) -> Dataset:
    fill(folder / "dtd" / "dtd" / "images", *PNGS)
    (folder / "dtd" / "dtd" / "labels").mkdir()
    (folder / "dtd" / "dtd" / "labels" / "train1.txt").write_text("\n".join(PNGS))
    return DTD(folder, "train", transform=SMALL)


def part(folder: Path) -> Dataset:
    return Subset(image_folder(folder), [0, 2, 3])


def joined(folder: Path) -> Dataset:
    return ConcatDataset([image_folder(folder / "one"), image_folder(folder / "other")])


class Files(Dataset):
    """A reader's own class that has a list of its files."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(fill(folder, *PNGS).rglob("*.png"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int):
        with Image.open(self.files[index]) as image:
            return SMALL(image), index


class Archive(Dataset):
    """A reader's own class that says on which file its pictures depend."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "all.npy"
        folder.mkdir()
        self.write(0)

    def write(self, seed: int) -> None:
        np.save(self.path, np.random.default_rng(seed).integers(0, 256, (4, 8, 8, 3), np.uint8))

    def depends_on(self) -> list[Path]:
        return [self.path]

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int):
        return ToTensor()(np.load(self.path)[index]), index


KEPT = [picture_folder, image_folder, textures, part, joined, Files, Archive]


def name_of(make) -> str:
    return make.__name__


@pytest.mark.parametrize("make", KEPT, ids=name_of)
def test_a_second_run_reads_no_picture_where_all_files_are_known(tmp_path, is_read, make):
    dataset = make(tmp_path / "mine")
    assert is_read(dataset)
    first = read(dataset)
    assert not is_read(pickle.loads(pickle.dumps(dataset)))
    second = read(dataset)
    assert torch.equal(second.pixels, first.pixels)
    assert torch.equal(first[1][0], dataset[1][0])
    assert second.labels == first.labels == [label for _, label in dataset]
    assert second.classes == first.classes


@pytest.mark.parametrize("make", KEPT, ids=name_of)
def test_a_file_that_changed_is_read_again(tmp_path, is_read, make):
    dataset = make(tmp_path / "mine")
    read(dataset)
    if make is Archive:
        dataset.write(1)
    else:
        for path in (tmp_path / "mine").rglob("a/1.png"):
            write_photograph(path, seed=9)
    assert is_read(dataset)
    assert torch.equal(read(dataset)[0][0], dataset[0][0])


def test_flowers102_is_kept_under_its_name_and_split(data_root, cache_folder):
    read(Flowers102(data_root, "val", transform=SMALL))
    (path,) = cache_folder.iterdir()
    assert path.name.startswith("Flowers102-val-")


def test_synthetic_flowers_depend_on_their_code_alone_and_are_kept(is_read):
    assert is_read(SyntheticFlowers(split="val", transform=ToTensor(), side=4))
    assert not is_read(SyntheticFlowers(split="val", transform=ToTensor(), side=4))
    assert is_read(SyntheticFlowers(split="val", transform=ToTensor(), side=5))


# What is read in each run.


class OnlyItsFolder(Dataset):
    """A reader's own class that knows its folder, and no file in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = fill(folder, "0.png", "1.png")

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int):
        with Image.open(self.folder / f"{index}.png") as image:
            return SMALL(image), index


class AnArray(Dataset):
    """A reader's own class with its pictures in memory."""

    def __init__(self, folder: Path) -> None:
        self.pixels = np.zeros((4, 8, 8, 3), np.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int):
        return ToTensor()(self.pixels[index]), index


def unknown_part(folder: Path) -> Dataset:
    return Subset(OnlyItsFolder(folder), [1, 0])


def partly_unknown(folder: Path) -> Dataset:
    return ConcatDataset([image_folder(folder / "one"), OnlyItsFolder(folder / "other")])


def not_picklable(folder: Path) -> Dataset:
    dataset = image_folder(folder)
    dataset.transform = lambda image: SMALL(image)
    return dataset


NOT_KEPT = [OnlyItsFolder, AnArray, unknown_part, partly_unknown, not_picklable]


@pytest.mark.parametrize("make", NOT_KEPT, ids=name_of)
def test_what_may_change_unseen_is_read_in_each_run(tmp_path, is_read, cache_folder, make):
    dataset = make(tmp_path / "mine")
    assert is_read(dataset)
    assert is_read(dataset)
    assert not cache_folder.exists()


def test_a_class_from_a_notebook_is_read_in_each_run(tmp_path, is_read, monkeypatch):
    notebook = types.ModuleType("__main__")
    notebook.Files = Files
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    monkeypatch.setattr(Files, "__module__", "__main__")
    dataset = Files(tmp_path / "mine")
    assert is_read(dataset)
    assert is_read(dataset)


def test_a_missing_file_is_left_out_and_looked_for_again(tmp_path, is_read):
    dataset = picture_folder(tmp_path / "mine")
    dataset.paths[0].unlink()
    assert is_read(dataset)
    write_photograph(dataset.paths[0])
    assert is_read(dataset)
    assert len(read(dataset)) == 4


# Labels.


def as_dictionary(label: int) -> dict[str, int]:
    return {"species": label}


def as_none(label: int) -> None:
    return None


def as_flag(label: int) -> bool:
    return label > 0


@pytest.mark.parametrize("change", [as_dictionary, as_none, as_flag, torch.tensor])
def test_labels_that_are_no_numbers_or_texts_are_read_in_each_run(tmp_path, is_read, change):
    dataset = image_folder(tmp_path / "mine")
    dataset.target_transform = change
    for _ in range(2):
        assert is_read(dataset)
        assert read(dataset).labels == [label for _, label in dataset]


def as_text(label: int) -> str:
    return f"blüte {label}\0"


def as_float(label: int) -> float:
    return label / 3


def as_huge(label: int) -> int:
    return 10**30 + label


@pytest.mark.parametrize("change", [as_text, as_float, as_huge, np.int64])
def test_labels_that_are_numbers_or_texts_are_kept_as_they_were(tmp_path, is_read, change):
    dataset = image_folder(tmp_path / "mine")
    dataset.target_transform = change
    first = read(dataset)
    assert not is_read(dataset)
    second = read(dataset)
    assert second.labels == first.labels == [label for _, label in dataset]
    assert [type(label) for label in second.labels] == [type(label) for label in first.labels]


# The files.


@pytest.fixture
def flower_set(tmp_path, cache_folder) -> Dataset:
    return image_folder(tmp_path / "mine")


@pytest.fixture
def kept(flower_set, cache_folder) -> Path:
    """The file in which ``flower_set`` is kept."""
    read(flower_set)
    (path,) = cache_folder.iterdir()
    return path


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_damaged_file_is_made_again_with_a_warning(flower_set, kept, share, capsys):
    whole, pixels = kept.read_bytes(), read(flower_set).pixels
    kept.write_bytes(whole[: int(share * len(whole))])
    assert torch.equal(read(flower_set).pixels, pixels)
    assert f"warning: {kept} is damaged and made again" in capsys.readouterr().err
    read(flower_set)
    assert capsys.readouterr().err == ""


def test_a_cache_that_cannot_be_written_to_costs_a_warning_and_no_more(
    flower_set, cache_folder, capsys
):
    cache_folder.write_text("a file where the folder should be")
    assert len(read(flower_set)) == 4
    assert "warning: pictures are not kept for the next run: " in capsys.readouterr().err


def test_of_all_that_was_ever_kept_the_newest_thirty_stay(flower_set, kept):
    for number in range(40):
        path = kept.with_name(f"{number}.npz")
        path.touch()
        os.utime(path, (number, number))
    read(Subset(flower_set, [1, 2]))
    left = {path.name for path in kept.parent.iterdir()}
    assert len(left) == 30
    assert {kept.name, "39.npz", "12.npz"} <= left


KILLED_WHILE_IT_KEEPS = """
import resource, signal, sys
from torchvision.transforms import ToTensor
from datasets.memory import InMemory
from datasets.synthetic import SyntheticFlowers

# The system ends the process when it has written half of a file.
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
InMemory(SyntheticFlowers(split="val", transform=ToTensor(), side=4), progress=False)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on a file's size")
def test_what_a_killed_run_left_half_written_is_not_taken_and_goes_in_time(
    is_read, cache_folder, capsys
):
    environment = {"PYTHONPATH": str(ROOT), "DATASETS_CACHE": str(cache_folder)}
    command = [sys.executable, "-c", KILLED_WHILE_IT_KEEPS]
    assert subprocess.run(command, env=environment).returncode < 0
    (half,) = cache_folder.iterdir()
    assert 0 < half.stat().st_size <= 20_000
    assert is_read(SyntheticFlowers(split="val", transform=ToTensor(), side=4))
    assert half.exists()  # its run might still be writing
    os.utime(half, (0, 0))
    assert is_read(SyntheticFlowers(split="val", transform=ToTensor(), side=6))
    assert not half.exists()
    assert len(list(cache_folder.iterdir())) == 2


# What identifies pictures.


def test_each_split_and_transform_has_a_fingerprint_of_its_own(data_root):
    grey = Compose([Grayscale(), Resize((8, 8)), ToTensor()])
    large = Compose([Resize((16, 8)), ToTensor()])
    wanted = [(split, how) for split in ("train", "val", "test") for how in (SMALL, grey, large)]
    sets = [Flowers102(data_root, split, transform=how) for split, how in wanted]
    assert len({fingerprint(each) for each in sets} - {None}) == 9


def test_each_part_has_a_fingerprint_of_its_own(tmp_path):
    whole = image_folder(tmp_path)
    parts = [whole, Subset(whole, [0, 1]), Subset(whole, [1, 0]), ConcatDataset([whole, whole])]
    assert len({fingerprint(each) for each in parts} - {None}) == 4


def test_a_files_size_times_and_rights_count(tmp_path):
    dataset = image_folder(tmp_path)
    path = tmp_path / PNGS[0]
    time = path.stat().st_mtime_ns
    prints = [fingerprint(dataset)]
    os.utime(path, ns=(time, time + 1_000_000))
    prints.append(fingerprint(dataset))
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(time, time))
    prints.append(fingerprint(dataset))
    path.chmod(0o400)
    prints.append(fingerprint(dataset))
    assert len({*prints} - {None}) == 4


@pytest.mark.parametrize("package", [np, PIL, torch, torchvision])
def test_the_versions_of_what_decodes_and_changes_pictures_count(tmp_path, monkeypatch, package):
    dataset = image_folder(tmp_path)
    before = fingerprint(dataset)
    monkeypatch.setattr(package, "__version__", "0.1")
    assert fingerprint(dataset) not in (before, None)


CODE = {
    "base.py": "class Base:\n    factor = 1\n    depends_on = lambda self: []\n",
    "mine.py": "from base import Base\nfrom change import change\n"
    "class Mine(Base):\n    transform = None\n"
    "    def __init__(self): self.transform = change\n",
    "change.py": "def change(image): return image\n",
}


@pytest.mark.parametrize("changed", CODE)
def test_the_code_of_a_class_its_base_and_its_transform_count(tmp_path, monkeypatch, changed):
    for name, code in CODE.items():
        (tmp_path / name).write_text(code)
        monkeypatch.delitem(sys.modules, Path(name).stem, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    mine = importlib.import_module("mine")
    before = fingerprint(mine.Mine())
    assert before == fingerprint(mine.Mine()) is not None
    (tmp_path / changed).write_text(CODE[changed] + "# and more\n")
    assert fingerprint(mine.Mine()) not in (before, None)


CHANGES_ITS_OWN_CODE = """
import json, pathlib, datasets
from datasets.cache import fingerprint
from datasets.synthetic import SyntheticFlowers

prints = [fingerprint(SyntheticFlowers())]
for path in sorted(pathlib.Path(datasets.__file__).parent.glob("*.py")):
    path.write_text(path.read_text() + "# and more")
    prints.append(fingerprint(SyntheticFlowers()))
print(json.dumps(prints))
"""


def test_the_code_that_reads_pictures_counts(tmp_path):
    """In a copy of the folder ``datasets``, each file of which changes in turn."""
    names = shutil.ignore_patterns("__pycache__", "cache", "flowers-102")
    shutil.copytree(ROOT / "datasets", tmp_path / "datasets", ignore=names)
    done = subprocess.run(
        [sys.executable, "-c", CHANGES_ITS_OWN_CODE],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        check=True,
    )
    prints = json.loads(done.stdout)
    assert len(prints) == 1 + len(list((tmp_path / "datasets").glob("*.py")))
    assert len(set(prints)) == len(prints)


def test_arrays_and_tensors_count_by_their_values(tmp_path):
    def with_values(values: object) -> Archive:
        dataset = Archive.__new__(Archive)
        dataset.path, dataset.values = tmp_path, values
        return dataset

    for kind in (np.array, torch.tensor):
        one, same, other = (with_values(kind([1.0, x])) for x in (2, 2, 3))
        assert fingerprint(one) == fingerprint(same) != fingerprint(other)
        assert fingerprint(one) is not None


# Where.


@pytest.mark.parametrize("value", [None, ""])
def test_without_the_variable_pictures_are_kept_beside_the_code(monkeypatch, value):
    monkeypatch.delenv("DATASETS_CACHE")
    if value is not None:
        monkeypatch.setenv("DATASETS_CACHE", value)
    assert folder_of_the_cache() == ROOT / "datasets" / "cache"


def test_the_variable_may_begin_with_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATASETS_CACHE", "~/pictures")
    assert folder_of_the_cache() == tmp_path / "pictures"
