import os
import sys
import types
import unicodedata
from pathlib import Path

import pytest
from helpers import write_photograph
from pictures import fill, link
from torchvision.transforms import CenterCrop, Compose, Resize, ToTensor

from datasets.cache import fingerprint
from datasets.errors import UserError
from datasets.folder import ENOUGH, FEWEST, PictureFolder, split_of
from datasets.memory import InMemory
from datasets.preprocessing import read_heic

SMALL = Compose([Resize((8, 8)), ToTensor()])
SPLITS = ("train", "val", "test")


def numbers(start: int, stop: int) -> list[str]:
    return [f"{number}.png" for number in range(start, stop)]


def names_of(folder: Path, split: str) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in PictureFolder(folder, split).paths]


# Splits.


def test_each_picture_is_in_one_split_in_the_documented_shares(tmp_path):
    splits = [split_of(f"holidays/{name}") for name in numbers(0, 3000)]
    shares = [splits.count(split) / len(splits) for split in SPLITS]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.02)
    folder = fill(tmp_path, *numbers(0, 60))
    together = [name for split in SPLITS for name in names_of(folder, split)]
    assert sorted(together) == sorted(numbers(0, 60))


def test_the_splits_are_those_of_every_version_before():
    splits = "".join(split_of(f"a/{n}.jpg")[1] for n in range(40))
    assert splits == "rrreaaraareerrrrrrrrrarrrrrrrrrerarrrrar"


def test_an_umlaut_falls_into_the_same_split_however_it_is_written():
    for number in range(50):
        names = [unicodedata.normalize(form, f"blüte {number}.jpg") for form in ("NFC", "NFD")]
        assert names[0] != names[1]
        assert len({split_of(name) for name in names}) == 1


def parts(*where: str) -> list[str]:
    """Names of two pictures in each of these folders."""
    return [f"{folder}/{name}" for folder in where for name in numbers(0, 2)]


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Train", "Val", "Test"),
        ("training", "validation", "testing"),
        ("TRAINING", "valid", "TEST"),
        ("train", "Dev", "test"),
    ],
)
def test_subfolders_with_the_names_of_splits_are_the_splits(tmp_path, capsys, train, val, test):
    folder = fill(tmp_path, *parts(f"{train}/rose", train, val, test))
    assert sorted(names_of(folder, "train")) == sorted(parts(f"{train}/rose", train))
    assert names_of(folder, "val") == parts(val)
    assert names_of(folder, "test") == parts(test)
    assert capsys.readouterr().err == ""


def test_two_subfolders_of_one_split_count_together_which_is_said(tmp_path, capsys):
    folder = fill(tmp_path, *parts("train/rose", "training/rose", "val", "test"))
    pictures = PictureFolder(folder, "train")
    assert capsys.readouterr().err == f"{folder}: its train split is train and training together\n"
    assert names_of(folder, "train") == parts("train/rose", "training/rose")
    assert {pictures.classes[label] for label in pictures.labels} == {"rose"}


@pytest.mark.parametrize(("given", "missing"), [("test", "val"), ("val", "test")])
def test_a_missing_split_is_a_tenth_of_the_training_pictures_which_is_said(
    tmp_path, capsys, given, missing
):
    train = [f"train/{name}" for name in numbers(0, 60)]
    folder = fill(tmp_path, *train, *parts(given))
    taken = [name for name in sorted(train) if split_of(name) == missing]
    assert 2 <= len(taken) <= 12
    assert names_of(folder, missing) == taken
    assert names_of(folder, given) == parts(given)
    assert sorted(names_of(folder, "train") + taken) == sorted(train)
    (line,) = capsys.readouterr().err.splitlines()
    said = f"has no subfolder {missing}: a tenth of its training pictures is taken"
    assert line == f"{folder} {said}"


def test_what_lies_beside_the_splits_is_passed_over_which_is_said_once(tmp_path, capsys):
    folder = fill(tmp_path, *parts("train", "val", "test", "new"), "5.png")
    (folder / "train" / "notes.txt").touch()
    together = [name for split in SPLITS for name in names_of(folder, split)]
    assert together == parts("train", "val", "test")
    line = f"{folder}: passed over: 3 beside the splits, 1 .txt\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("there", "missing"), [(("val", "test"), "train"), (("train",), "val and test")]
)
def test_without_training_pictures_or_without_others_all_are_divided_anew_which_is_said(
    tmp_path, capsys, there, missing
):
    names = [f"{where}/{name}" for where in (*there, "rose") for name in numbers(0, 40)]
    folder = fill(tmp_path, *names)
    for split in SPLITS:
        assert names_of(folder, split) == [
            name for name in sorted(names) if split_of(name) == split
        ]
    assert PictureFolder(folder, "val").classes == sorted([*there, "rose"])
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.endswith(f"has no subfolder {missing}: its pictures are divided anew")


def test_pictures_in_linked_subfolders_are_in_splits_by_the_links_names(tmp_path):
    fill(tmp_path / "elsewhere", *numbers(0, 80))
    (tmp_path / "mine").mkdir()
    link(tmp_path / "mine" / "album", tmp_path / "elsewhere")
    val = [f"album/{name}" for name in sorted(numbers(0, 80)) if split_of(f"album/{name}") == "val"]
    assert names_of(tmp_path / "mine", "val") == val


# Too few.


def test_a_split_that_is_too_small_is_refused_with_how_many_are_needed(tmp_path):
    folder = fill(tmp_path, *parts("train", "test"), "val/1.png")
    counts = "has 5 pictures, 2 of them to train, 1 for validation and 2 to test"
    for split in SPLITS:
        with pytest.raises(UserError, match=f"^{folder} {counts}: 2 of each are needed") as error:
            PictureFolder(folder, split)
        assert "\n" not in str(error.value)
    fill(folder, "val/2.png")
    assert len(PictureFolder(folder, "val")) == 2


def test_a_folder_of_other_files_says_what_was_passed_over_and_how_many_are_needed(
    tmp_path, capsys
):
    for number in range(60):
        (tmp_path / f"{number}.CR2").write_bytes(b"raw")
    with pytest.raises(UserError, match=r"has 0 pictures, .*: some 80 in all"):
        PictureFolder(tmp_path)
    assert capsys.readouterr().err == f"{tmp_path}: passed over: 60 .cr2\n"


def test_what_is_called_enough_is_enough_in_99_of_100_folders():
    failures = 0
    for folder in range(1000):
        splits = [split_of(f"{folder}/IMG_{number:04d}.jpg") for number in range(ENOUGH)]
        failures += any(splits.count(split) < FEWEST for split in SPLITS)
    assert failures <= 10


def test_another_split_is_a_slip(tmp_path):
    with pytest.raises(ValueError, match="split is 'validation': one of train, val, test"):
        PictureFolder(tmp_path, "validation")


# Labels.


def test_labels_are_the_subfolders(tmp_path):
    names = [f"{where}{name}" for where in ("rose/", "lily/white/", "") for name in numbers(0, 30)]
    folder = fill(tmp_path / "garden", *names)
    for split in SPLITS:
        pictures = PictureFolder(folder, split)
        assert pictures.classes == ["garden", "lily/white", "rose"]
        for path, (_, label) in zip(pictures.paths, pictures, strict=True):
            species = path.parent.relative_to(folder).as_posix()
            assert pictures.classes[label] == species.replace(".", "garden")


def test_a_label_means_the_same_in_all_given_splits(tmp_path):
    kinds = {"train": ("lily", "rose", "tulip"), "val": ("rose",), "test": ("lily", "tulip")}
    fill(tmp_path, *parts(*(f"{split}/{kind}" for split in SPLITS for kind in kinds[split])))
    for split in SPLITS:
        pictures = PictureFolder(tmp_path, split)
        assert pictures.classes == ["lily", "rose", "tulip"]
        species = [pictures.classes[label] for label in pictures.labels]
        assert species == sorted(2 * kinds[split])


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="there all names are text")
def test_names_that_are_no_text_can_be_printed_and_stay_apart(tmp_path):
    names = [os.fsdecode(name) for name in (b"caf\xe9", b"caf\xe8")]
    fill(tmp_path, *parts("val", "test"), *parts(*(f"train/{name}" for name in names)))
    pictures = PictureFolder(tmp_path, transform=SMALL)
    assert pictures.classes == ["caf\\xe8", "caf\\xe9", tmp_path.name]
    assert len(InMemory(pictures, progress=False)) == 4


# Pictures.


def test_the_line_of_reading_names_folder_and_split(tmp_path, capsys):
    fill(tmp_path, *parts(*SPLITS))
    for split in SPLITS:
        InMemory(PictureFolder(tmp_path, split, SMALL))
        assert f"Reading 2 pictures of {tmp_path} ({split})\n" in capsys.readouterr().err


def test_a_damaged_picture_is_named_and_left_out_in_this_run_and_the_next(
    tmp_path, cache_folder, capsys
):
    names = ("1.png", "2.png", "3.png")
    folder = fill(tmp_path / "mine", *(f"{split}/{name}" for split in SPLITS for name in names))
    damaged = folder / "train" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:100])
    for _ in range(2):
        pictures = InMemory(PictureFolder(folder, transform=SMALL), progress=False)
        assert len(pictures) == len(pictures.labels) == 2
        (warning,) = capsys.readouterr().err.splitlines()
        assert warning.startswith(f"warning: {damaged} cannot be read as a picture: ")
        assert warning.endswith(": it is left out")


def test_a_split_of_damaged_pictures_only_is_refused(tmp_path):
    fill(tmp_path, *parts(*SPLITS))
    for path in (tmp_path / "train").iterdir():
        path.write_bytes(b"no picture")
    message = r"\(train\) has no pictures that can be read: at least one is needed"
    with pytest.raises(UserError, match=message):
        InMemory(PictureFolder(tmp_path, transform=ToTensor()), progress=False)


@pytest.mark.parametrize("reduced", [True, False])
def test_a_jpeg_comes_to_a_resize_smaller_and_whole_to_what_else_may_need_it(tmp_path, reduced):
    fill(tmp_path, *parts("val", "test"))
    (tmp_path / "train").mkdir()
    for name in ("1.jpg", "2.jpg"):
        write_photograph(tmp_path / "train" / name, (900, 700))
    sizes = []

    class NotingResize(Resize):
        def forward(self, image):
            sizes.append(image.size)
            return super().forward(image)

    resize = NotingResize((8, 8))
    steps = [resize] if reduced else [CenterCrop(600), resize]
    folder = PictureFolder(tmp_path, transform=Compose([*steps, ToTensor()]))
    assert folder[0][0].shape == (3, 8, 8)
    assert sizes == [(113, 88) if reduced else (600, 600)]


def test_installing_what_reads_heic_lets_pictures_be_read_anew(tmp_path, no_heic, monkeypatch):
    fill(tmp_path, *parts(*SPLITS))
    without = fingerprint(PictureFolder(tmp_path, transform=SMALL))
    assert without == fingerprint(PictureFolder(tmp_path, transform=SMALL)) is not None
    module = types.ModuleType("pillow_heif")
    module.register_heif_opener = lambda: None
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    read_heic.cache_clear()
    assert fingerprint(PictureFolder(tmp_path, transform=SMALL)) not in (without, None)
