import unicodedata
from pathlib import Path

import pytest
from pictures import fill
from torchvision.transforms import Compose, Resize, ToTensor

from datasets.errors import UserError
from datasets.folder import PictureFolder, find_pictures, split_of
from datasets.memory import InMemory

SPLITS = ("train", "val", "test")


def numbers(start: int, stop: int) -> list[str]:
    return [f"{number}.png" for number in range(start, stop)]


def names_of(folder: Path, split: str) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in PictureFolder(folder, split).paths]


# Which files.


def test_pictures_are_found_at_any_depth_in_order(tmp_path):
    tmp_path = tmp_path / ".hidden_itself"
    fill(tmp_path, "b.jpg", "z/y/x/deep.png", "a.jpg", "c/d.webp", "upper.JPG", "e.gif")
    found = [path.relative_to(tmp_path).as_posix() for path in find_pictures(tmp_path)]
    assert found == ["a.jpg", "b.jpg", "c/d.webp", "e.gif", "upper.JPG", "z/y/x/deep.png"]


@pytest.mark.parametrize("name", ["notes.txt", "film.mp4", "flower", "._one.jpg", ".trash/1.jpg"])
def test_what_is_no_picture_or_is_hidden_is_passed_over(tmp_path, name):
    fill(tmp_path, "one.jpg")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"no picture")
    assert find_pictures(tmp_path) == [tmp_path / "one.jpg"]


def test_heic_pictures_are_passed_over_with_a_warning_where_nothing_reads_them(
    tmp_path, capsys, no_heic
):
    fill(tmp_path, "one.jpg")
    for name in ("a.heic", "b.HEIC"):
        (tmp_path / name).write_bytes(b"some")
    assert find_pictures(tmp_path) == [tmp_path / "one.jpg"]
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: HEIC pictures passed over: 2 (pip install pillow-heif")


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


def test_subfolders_train_val_and_test_are_the_splits(tmp_path):
    folder = fill(tmp_path, "train/1.png", "train/a/2.png", "val/3.png", "test/4.png", "5.png")
    assert names_of(folder, "train") == ["train/1.png", "train/a/2.png"]
    assert names_of(folder, "val") == ["val/3.png"]
    assert names_of(folder, "test") == ["test/4.png"]


def test_one_or_two_of_these_subfolders_are_species_and_no_splits_which_is_said(tmp_path, capsys):
    names = [f"{where}/{name}" for where in ("train", "test") for name in numbers(0, 30)]
    folder = fill(tmp_path, *names)
    expected = [name for name in sorted(names) if split_of(name) == "train"]
    assert names_of(folder, "train") == expected
    assert PictureFolder(folder, "val").classes == ["test", "train"]
    (warning,) = capsys.readouterr().err.splitlines()
    assert "has no subfolder val: its pictures are divided anew" in warning


def test_a_split_that_stays_empty_says_how_many_pictures_it_takes(tmp_path):
    fill(tmp_path, "1.png")
    empty = next(split for split in SPLITS if split != split_of("1.png"))
    with pytest.raises(
        UserError, match=rf"has 1 pictures, none of them for the {empty} split"
    ) as error:
        PictureFolder(tmp_path, empty)
    assert "\n" not in str(error.value)


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
    fill(tmp_path, *(f"{split}/{kind}/1.png" for split in SPLITS for kind in kinds[split]))
    for split in SPLITS:
        pictures = PictureFolder(tmp_path, split)
        assert pictures.classes == ["lily", "rose", "tulip"]
        assert [pictures.classes[label] for label in pictures.labels] == list(kinds[split])


# Pictures.


def test_a_damaged_picture_is_named_and_left_out_in_this_run_and_the_next(
    tmp_path, cache_folder, capsys
):
    names = ("1.png", "2.png", "3.png")
    folder = fill(tmp_path / "mine", *(f"{split}/{name}" for split in SPLITS for name in names))
    damaged = folder / "train" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:100])
    transform = Compose([Resize((8, 8)), ToTensor()])
    for _ in range(2):
        pictures = InMemory(PictureFolder(folder, transform=transform), progress=False)
        assert len(pictures) == len(pictures.labels) == 2
        (warning,) = capsys.readouterr().err.splitlines()
        assert warning.startswith(f"warning: {damaged} cannot be read as a picture: ")
        assert warning.endswith(": it is left out")


def test_a_split_of_damaged_pictures_only_is_refused(tmp_path):
    fill(tmp_path, *(f"{split}/1.png" for split in SPLITS))
    (tmp_path / "train" / "1.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="PictureFolder has no pictures that can be read"):
        InMemory(PictureFolder(tmp_path, transform=ToTensor()), progress=False)
