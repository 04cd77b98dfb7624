import importlib
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
import torchvision
from helpers import seeded, write_photograph
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from torchvision.datasets import Flowers102
from torchvision.transforms import Compose, Grayscale, Resize, ToTensor

from datasets import preprocessing
from datasets.preprocessing import (
    DamagedPicture,
    InMemory,
    UserError,
    augment,
    fingerprint,
    read_picture,
)

SMALL = Compose([Resize((8, 8)), ToTensor()])


# read_picture().


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "1", "P", "YCbCr"])
@pytest.mark.parametrize("size", [(1, 1), (37, 53), (301, 3)])
def test_a_picture_of_any_size_and_kind_is_as_pillow_converts_it(tmp_path, size, mode):
    path = tmp_path / ("one.png" if mode in "1P" else "one.jpg")
    with Image.open(write_photograph(tmp_path / "noise.png", size)) as noise:
        noise.convert(mode).save(path)
    with Image.open(path) as image:
        expected = image.convert("RGB")
    assert read_picture(path).mode == "RGB"
    assert np.array_equal(read_picture(path), expected)


def test_a_picture_is_turned_upright_transparent_becomes_white_and_16_bits_become_8(tmp_path):
    image = Image.new("RGB", (4, 2), "red")
    image.getexif()[0x0112] = 6  # the camera was held upright
    image.save(tmp_path / "one.jpg", exif=image.getexif())
    assert read_picture(tmp_path / "one.jpg").size == (2, 4)
    for name in ("two.png", "two.gif"):
        Image.fromarray(np.array([[[0, 0, 0, 0], [0, 0, 0, 255]]], np.uint8)).save(tmp_path / name)
        assert np.asarray(read_picture(tmp_path / name))[0, :, 0].tolist() == [255, 0]
    Image.fromarray(np.array([[0, 257, 200 * 257, 65535]], np.uint16)).save(tmp_path / "3.png")
    assert np.asarray(read_picture(tmp_path / "3.png"))[0, :, 0].tolist() == [0, 1, 200, 255]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "cannot be read as a picture: .*No such file"),
        (lambda path: path.write_bytes(b""), "cannot be read as a picture: "),
        (lambda path: path.write_bytes(path.read_bytes()[:-99]), "cannot be .*: .*truncated"),
        (lambda path: path.write_text("<html>\n</html>"), "cannot be read as a picture: "),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read as a picture: "),
        (lambda path: Image.new("F", (4, 4)).save(path, "TIFF"), "cannot be .*save it as PNG"),
        (lambda path: Image.new("1", (16384, 16384)).save(path, "PNG"), "cannot be .*bomb"),
    ],
    ids=["missing", "empty", "truncated", "text", "folder", "floats", "too-large"],
)
def test_a_picture_that_cannot_be_read_is_named_in_one_line(tmp_path, damage, message):
    path = write_photograph(tmp_path / "one.png")
    damage(path)
    with pytest.raises(DamagedPicture, match=f"^{path} {message}") as error:
        read_picture(path)
    assert "\n" not in str(error.value)


def test_heic_says_which_package_reads_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    (tmp_path / "one.HEIC").write_bytes(b"some")
    with pytest.raises(DamagedPicture, match="need the package pillow-heif: pip install"):
        read_picture(tmp_path / "one.HEIC")


def test_a_picture_of_many_pixels_is_read_in_silence(tmp_path, recwarn):
    Image.new("1", (9600, 9600)).save(tmp_path / "large.png")
    assert read_picture(tmp_path / "large.png").size == (9600, 9600)
    assert not recwarn.list


# InMemory.


class Listed(Dataset):
    """The given pairs of an image and a label; an exception in the place of a pair is raised."""

    def __init__(self, *pairs: object) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int):
        if isinstance(self.pairs[index], Exception):
            raise self.pairs[index]
        return self.pairs[index]


def noise(count: int, channels: int = 3) -> Listed:
    """Pictures of 8-bit noise, labelled with their index."""
    with seeded():
        pixels = torch.randint(0, 256, (count, channels, 8, 6)) / 255
    return Listed(*zip(pixels, range(count), strict=True))


def read(dataset: Dataset) -> InMemory:
    return InMemory(dataset, progress=False)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pairs_come_back_as_the_data_set_gives_them(channels):
    dataset = noise(70, channels)
    pictures = read(dataset)
    assert pictures[3][0].shape == (channels, 8, 6)
    assert pictures.labels == list(range(70))
    assert all(torch.equal(image, dataset[label][0]) for image, label in pictures)
    assert torch.equal(pictures[-1][0], dataset[69][0])
    batches = list(pictures.batches(32))
    assert [len(batch) for batch in batches] == [32, 32, 6]
    assert torch.equal(torch.cat(batches), torch.stack([image for image, _ in dataset]))
    assert batches[0].is_contiguous(memory_format=torch.channels_last)


def test_a_loader_gives_batches_of_images_and_their_labels():
    pictures = read(noise(150))
    images, labels = zip(*DataLoader(pictures, 64, shuffle=True), strict=True)
    assert [each.shape for each in images] == [(n, 3, 8, 6) for n in (64, 64, 22)]
    labels = torch.cat(labels)
    assert torch.equal(torch.cat(images), pictures.images(labels))
    assert sorted(labels.tolist()) == list(range(150)) != labels.tolist()


ONE = torch.ones(3, 4, 4)
SHAPES = r"Listed has another shape, \{\(., 4, 4\), \(., 4, 4\)\}: its transform needs a Resize"


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "Listed has no pictures that can be read"),
        ([(Image.new("RGB", (4, 4)), 0)], "picture 0 of Listed is no tensor as ToTensor"),
        ([(ONE, 0), (ONE.byte(), 0)], "picture 1 of Listed is no tensor as"),
        ([(ONE, 0), (ONE[:1], 0)], SHAPES),
        ([(ONE, 0), (2 * ONE, 0)], r"picture 1 of Listed has values outside of \[0, 1\]"),
        ([(-ONE, 0)], "picture 0 of Listed has values outside of"),
        ([(ONE * float("nan"), 0)], "picture 0 of Listed has values outside of"),
    ],
)
def test_what_is_no_data_set_of_pictures_is_refused_in_one_line(pairs, message):
    with pytest.raises(UserError, match=message) as error:
        read(Listed(*pairs))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_damaged_pictures_are_named_and_left_out_wherever_they_stand(place, capsys):
    pairs = [(ONE, 0), (ONE, 1), (ONE, 2)]
    pairs[place] = DamagedPicture("odd.jpg does not exist")
    assert read(Listed(*pairs)).labels == [each for each in range(3) if each != place]
    assert capsys.readouterr().err == "warning: odd.jpg does not exist: it is left out\n"


@pytest.mark.parametrize("number", [0, 3])
def test_a_damaged_picture_of_torchvisions_is_named(data_root, number):
    flowers = Flowers102(data_root, "val", transform=SMALL)
    path = flowers._image_files[number]
    for content in (path.read_bytes()[:-50], b"no picture"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{path.name}|picture {number} of Flowers102"):
            read(flowers)


# What is kept on disk.


@pytest.fixture
def flower_set(data_root, cache_folder) -> Flowers102:
    return Flowers102(data_root, "val", transform=SMALL)


@pytest.fixture
def kept(flower_set) -> Path:
    """The file in which ``flower_set`` is kept."""
    read(flower_set)
    (path,) = preprocessing.CACHE_FOLDER.iterdir()
    return path


def test_a_second_run_reads_no_picture(flower_set, kept, monkeypatch, capsys):
    pixels = read(flower_set).pixels
    monkeypatch.setattr(Flowers102, "__getitem__", lambda *_: pytest.fail("it is read again"))
    again = InMemory(flower_set)  # which says that it reads pictures, if it does
    assert torch.equal(again.pixels, pixels)
    assert again.labels == flower_set._labels
    assert capsys.readouterr().err == ""
    assert again.classes == Flowers102.classes
    assert kept.name.startswith("Flowers102-val-")


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
    assert len(read(flower_set)) == 6
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


@pytest.mark.parametrize("label", [{"species": 1}, torch.tensor(3), None, (1, 2)])
def test_labels_that_are_no_numbers_or_texts_come_back_as_they_were(cache_folder, label):
    for _ in range(2):
        assert read(Listed((ONE, label), (ONE, label))).labels == [label, label]


# What identifies pictures.


def test_each_split_and_transform_has_a_fingerprint_of_its_own(data_root):
    grey = Compose([Grayscale(), Resize((8, 8)), ToTensor()])
    large = Compose([Resize((16, 8)), ToTensor()])
    wanted = [(split, how) for split in ("train", "val", "test") for how in (SMALL, grey, large)]
    sets = [Flowers102(data_root, split, transform=how) for split, how in wanted]
    assert len({fingerprint(each) for each in sets}) == 9
    assert fingerprint(sets[0]) == fingerprint(pickle.loads(pickle.dumps(sets[0]))) != ""


@pytest.mark.parametrize(
    "made_of", [lambda one: Subset(one, [4]), lambda one: ConcatDataset([one])]
)
def test_a_picture_that_changed_and_what_decodes_it_count(data_root, monkeypatch, made_of):
    flowers = Flowers102(data_root, "val", transform=SMALL)
    path = flowers._image_files[4]
    part, time = made_of(flowers), path.stat().st_mtime_ns
    prints = [fingerprint(part)]
    os.utime(path, ns=(time, time + 1_000_000))
    prints.append(fingerprint(part))
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(time, time))
    prints.append(fingerprint(part))
    path.unlink()
    prints.append(fingerprint(part))
    for module in (PIL, torchvision):
        monkeypatch.setattr(module, "__version__", "0.1")
        prints.append(fingerprint(part))
    assert len(set(prints)) == 6


def test_the_code_that_makes_pictures_counts(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("class Mine: factor = 1")
    monkeypatch.syspath_prepend(tmp_path)
    mine = importlib.import_module("mine")
    before = fingerprint(mine.Mine())
    assert before == fingerprint(mine.Mine()) != ""
    (tmp_path / "mine.py").write_text("class Mine: factor = 2")
    assert fingerprint(mine.Mine()) not in (before, "")


def test_what_is_from_a_notebook_or_cannot_be_pickled_is_read_and_not_kept(
    cache_folder, monkeypatch
):
    dataset = Listed((ONE, 1))
    dataset.transform = lambda image: image
    assert read(dataset).labels == [1]
    notebook = types.ModuleType("__main__")
    notebook.Listed = Listed
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    monkeypatch.setattr(Listed, "__module__", "__main__")
    assert read(Listed((ONE, 1))).labels == [1]
    assert not cache_folder.exists()


# augment().


def test_all_changes_have_the_documented_ranges(monkeypatch):
    affine_grid, asked = torch.nn.functional.affine_grid, []

    def spy(matrices: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        asked.append(matrices)
        return affine_grid(matrices, *arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "affine_grid", spy)
    with seeded():
        augment(torch.rand(20_000, 3, 2, 2))
    # Where in the old image each place of the new one lies.
    (a, b, right), (c, d, down) = asked[0].permute(1, 2, 0)
    for shift in (right, down):  # in halves of the picture
        assert [shift.min(), shift.max()] == pytest.approx([-0.18, 0.18], abs=1e-3)
        assert shift.mean() == pytest.approx(0, abs=4e-3)
    zoom = 1 / torch.sqrt((a * d - b * c).abs())
    assert [zoom.min(), zoom.max()] == pytest.approx([0.8, 1.25], abs=1e-3)
    assert zoom.log().mean() == pytest.approx(0, abs=4e-3)
    angle = torch.rad2deg(torch.atan2(-b, d))
    assert [angle.min(), angle.max()] == pytest.approx([-25, 25], abs=0.1)
    mirrored = a * d - b * c < 0
    assert mirrored.float().mean() == pytest.approx(0.5, abs=0.02)
    with seeded():
        tints = augment(torch.full((20_000, 3, 2, 2), 0.5))[:, :, 0, 0].T / 0.5
    assert [tints.min(), tints.max()] == pytest.approx([0.7, 1.3], abs=1e-3)
    assert tints.mean() == pytest.approx(1, abs=4e-3)
    # Each is drawn on its own.
    draws = torch.stack([right, down, zoom.log(), angle, mirrored.float(), *tints])
    assert (torch.corrcoef(draws) - torch.eye(8)).abs().max() < 0.03


def still(monkeypatch, **but: float) -> None:
    """Switch all changes off but these; half of the images are still mirrored."""
    for name in ("SHIFT", "ROTATION", "ZOOM", "COLOUR"):
        monkeypatch.setattr(preprocessing, name, but.get(name, 0.0))


def test_with_all_changes_off_images_are_mirrored_or_left_as_they_are(monkeypatch):
    still(monkeypatch)
    with seeded():
        images = torch.rand(400, 3, 6, 9)
        moved = augment(images)
    same = torch.isclose(moved, images, atol=1e-5).all(dim=(1, 2, 3))
    mirrored = torch.isclose(moved, images.flip(-1), atol=1e-5).all(dim=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert 150 < mirrored.sum() < 250


def test_what_moves_in_repeats_the_border(monkeypatch):
    still(monkeypatch, SHIFT=0.5)
    with seeded():
        moved = augment(torch.arange(1, 9).repeat(200, 1, 8, 1) / 8)  # brighter to the right
    assert [moved.min(), moved.max()] == pytest.approx([1 / 8, 1])
    rising = moved[:, 0, 0].diff(dim=-1)
    assert ((rising >= -1e-6).all(-1) | (rising <= 1e-6).all(-1)).all()
    assert (rising.abs() < 1e-6).any(-1).float().mean() > 0.65


def test_augmented_images_keep_shape_precision_and_range_and_repeat_with_the_seed():
    images = torch.rand(50, 3, 8, 16, dtype=torch.float64)
    augmented = []
    for seed in (1, 1, 2):
        with seeded(seed):
            augmented.append(augment(images))
    one, again, other = augmented
    assert (one.shape, one.dtype) == (images.shape, images.dtype)
    assert one.is_contiguous(memory_format=torch.channels_last)
    assert 0 <= one.min() < one.max() == 1
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
