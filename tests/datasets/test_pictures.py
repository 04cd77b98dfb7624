import os
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import Flowers102
from torchvision.datasets.utils import calculate_md5
from torchvision.transforms import Compose, Resize, ToTensor
from torchvision.transforms.functional import to_tensor

from datasets import flowers102, pictures, preprocessing
from datasets.pictures import COLOUR, Pictures, augment, load_splits, whole_batch
from datasets.synthetic import draw_flowers, flower_labels


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(count: int, size: int = 8) -> Pictures:
    """Pictures of random pixels, labelled with their index."""
    pixels = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=seeded())
    return Pictures(pixels, torch.arange(count))


# Pictures.


def test_images_are_to_tensor_of_the_pixels_bit_for_bit():
    every_value = torch.arange(256 * 3, dtype=torch.int64).remainder(256).to(torch.uint8)
    pictures = Pictures(every_value.reshape(1, 16, 16, 3), torch.zeros(1, dtype=torch.int64))
    assert torch.equal(pictures[0][0], to_tensor(pictures.pixels[0].numpy()))


def test_one_index_a_slice_and_a_tensor_of_indices_give_the_same_images():
    pictures = numbered(9)
    images, labels = pictures[torch.tensor([7, 2])]
    assert (images.shape, labels.tolist()) == ((2, 3, 8, 8), [7, 2])
    assert torch.equal(images[0], pictures[7][0])
    assert torch.equal(images[1], pictures[2:3][0][0])
    assert pictures[7][1] == 7


def test_batches_of_images_lie_channels_last_in_memory():
    assert numbered(9)[:4][0].is_contiguous(memory_format=torch.channels_last)


def test_reading_images_leaves_the_pixels_as_they_are():
    pictures = numbered(3)
    before = pictures.pixels.clone()
    pictures[:][0].zero_()
    assert torch.equal(pictures.pixels, before)


def test_batches_go_through_all_images_in_order():
    pictures = numbered(10)
    batches = list(pictures.batches(4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert torch.equal(torch.cat(batches), pictures[:][0])


def test_pictures_go_to_a_device_whole():
    moved = numbered(3).to("meta")
    assert moved.pixels.device.type == moved.labels.device.type == "meta"


# Batches.


@pytest.mark.parametrize(("batch_size", "sizes"), [(64, [64, 64, 22]), (5, [5] * 30)])
def test_a_loader_gives_whole_batches_of_images_and_their_labels(batch_size, sizes):
    pictures = numbered(150)
    loader = DataLoader(pictures, batch_size, shuffle=True, collate_fn=whole_batch)
    assert len(loader) == len(sizes)
    seen = []
    for (images, labels), size in zip(loader, sizes, strict=True):
        assert images.shape == (size, 3, 8, 8)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(images, pictures[labels][0])
        seen += labels.tolist()
    assert sorted(seen) == list(range(150)) != seen


# augment().


def matrices(images: Tensor) -> Tensor:
    """Return where in the old image each place of the new one lies, as ``augment`` asks PyTorch."""
    with pytest.MonkeyPatch.context() as patch:
        asked = []
        affine_grid = torch.nn.functional.affine_grid

        def spy(theta: Tensor, *arguments: object, **options: object) -> Tensor:
            asked.append(theta)
            return affine_grid(theta, *arguments, **options)

        patch.setattr(torch.nn.functional, "affine_grid", spy)
        augment(images)
    return asked[0]


def test_shifts_rotations_zooms_and_mirrors_have_the_documented_ranges():
    torch.manual_seed(0)
    (a, b, right), (c, d, down) = matrices(torch.rand(20_000, 3, 2, 2)).permute(1, 2, 0)
    for shift in (right, down):  # in halves of the picture
        assert shift.max() == pytest.approx(0.18, abs=1e-3)
        assert shift.min() == pytest.approx(-0.18, abs=1e-3)
        assert shift.mean() == pytest.approx(0, abs=4e-3)
    zoom = 1 / torch.sqrt((a * d - b * c).abs())
    assert zoom.max() == pytest.approx(1.25, abs=1e-3)
    assert zoom.min() == pytest.approx(0.8, abs=1e-3)
    assert zoom.log().mean() == pytest.approx(0, abs=4e-3)
    angle = torch.rad2deg(torch.atan2(-b, d))
    assert angle.max() == pytest.approx(25, abs=0.1)
    assert angle.min() == pytest.approx(-25, abs=0.1)
    mirrored = a * d - b * c < 0
    assert mirrored.float().mean() == pytest.approx(0.5, abs=0.02)
    # Each is drawn on its own.
    draws = torch.stack([right, down, zoom.log(), angle, mirrored.float()])
    assert (torch.corrcoef(draws) - torch.eye(5)).abs().max() < 0.03


def test_colours_change_by_up_to_their_documented_share_each_channel_on_its_own():
    torch.manual_seed(0)
    tints = augment(torch.full((20_000, 3, 2, 2), 0.5))[:, :, 0, 0].T / 0.5
    assert tints.max() == pytest.approx(1.3, abs=1e-3)
    assert tints.min() == pytest.approx(0.7, abs=1e-3)
    assert tints.mean() == pytest.approx(1, abs=4e-3)
    assert (torch.corrcoef(tints) - torch.eye(3)).abs().max() < 0.03


def still(monkeypatch, **but: float) -> None:
    """Switch all changes off but these; half of the images are still mirrored."""
    for name in ("SHIFT", "ROTATION", "ZOOM", "COLOUR"):
        monkeypatch.setattr(pictures, name, but.get(name, 0.0))


def test_with_all_changes_off_images_are_mirrored_or_left_as_they_are(monkeypatch):
    still(monkeypatch)
    torch.manual_seed(0)
    images = torch.rand(400, 3, 6, 9)
    moved = augment(images)
    same = torch.isclose(moved, images, atol=1e-5).all(dim=(1, 2, 3))
    mirrored = torch.isclose(moved, images.flip(-1), atol=1e-5).all(dim=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert 150 < mirrored.sum() < 250


def test_a_square_keeps_its_shape_in_a_wide_picture_however_it_is_turned(monkeypatch):
    still(monkeypatch, ROTATION=90.0)
    torch.manual_seed(0)
    images = torch.zeros(300, 1, 32, 64)
    images[:, :, 10:22, 26:38] = 1
    assert augment(images).sum(dim=(1, 2, 3)) == pytest.approx([144] * 300, abs=4)


def test_what_moves_in_repeats_the_border(monkeypatch):
    still(monkeypatch, SHIFT=0.5)
    torch.manual_seed(0)
    images = torch.arange(8).repeat(200, 1, 8, 1) / 8  # brighter from left to right
    moved = augment(images)
    # Shifted right or left by up to half: columns of the border's value, and never of black.
    assert moved.min() >= 0
    assert moved.max() == pytest.approx(7 / 8)
    assert (moved.diff(dim=-2).abs() < 1e-6).all()
    rising = moved[:, 0, 0].diff(dim=-1)
    assert ((rising >= -1e-6).all(-1) | (rising <= 1e-6).all(-1)).all()
    assert (rising.abs() < 1e-6).any(-1).float().mean() > 0.65


def test_augmented_images_keep_shape_precision_range_and_memory_format():
    images = torch.rand(50, 3, 8, 16, dtype=torch.float64).to(memory_format=torch.channels_last)
    augmented = augment(images)
    assert (augmented.shape, augmented.dtype) == (images.shape, images.dtype)
    assert augmented.is_contiguous(memory_format=torch.channels_last)
    assert 0 <= augmented.min() < augmented.max() <= 1
    assert augment(torch.ones(99, 3, 2, 2)).max() == 1 < 1 + COLOUR


def test_augmentation_repeats_with_the_seed():
    images = torch.rand(20, 3, 8, 8)

    def augmented(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return augment(images)

    assert torch.equal(augmented(1), augmented(1))
    assert not torch.equal(augmented(1), augmented(2))


# load_splits().


def test_flowers_on_disk_are_loaded_as_torchvision_loads_them(data_root):
    splits = load_splits("flowers102", data_root, (32, 32), progress=False)
    assert (splits.dataset, splits.fallback) == ("flowers102", None)
    transform = Compose([Resize((32, 32)), ToTensor()])
    for name, size in (("train", 20), ("val", 6), ("test", 34)):
        expected = Flowers102(data_root, name, transform=transform)
        pictures = getattr(splits, name)
        assert len(pictures) == len(expected) == size
        for (image, label), (posts_image, posts_label) in zip(pictures, expected, strict=True):
            assert torch.equal(image, posts_image)
            assert label == posts_label


def test_auto_takes_flowers_on_disk_and_asks_no_server(data_root, server):
    for folder in (data_root, str(data_root)):
        assert load_splits("auto", folder, (8, 8), progress=False).dataset == "flowers102"
    assert server.asked_for == []


def test_auto_downloads_what_is_not_on_disk(server, tmp_path):
    splits = load_splits("auto", tmp_path, (8, 8), progress=False)
    assert (splits.dataset, splits.fallback) == ("flowers102", None)
    assert flowers102.is_on_disk(tmp_path)


def test_auto_takes_synthetic_flowers_where_no_server_is_and_says_why(no_server, tmp_path):
    splits = load_splits("auto", tmp_path, (8, 8), progress=False)
    assert splits.dataset == "synthetic"
    assert str(tmp_path) in splits.fallback
    assert no_server in splits.fallback
    assert "refused" in splits.fallback
    assert not list(tmp_path.iterdir())


def test_flowers102_fails_where_no_server_is_and_says_what_to_do(no_server, tmp_path):
    with pytest.raises(ValueError) as error:
        load_splits("flowers102", tmp_path, (8, 8), progress=False)
    for part in (no_server, str(tmp_path / "flowers-102"), "--data-root", "--dataset synthetic"):
        assert part in str(error.value)
    assert not list(tmp_path.iterdir())


def test_synthetic_flowers_need_no_server_and_are_no_fallback(server, tmp_path):
    splits = load_splits("synthetic", tmp_path, (8, 16), progress=False)
    assert (splits.dataset, splits.fallback) == ("synthetic", None)
    assert server.asked_for == []
    assert [len(pictures) for pictures in splits[:3]] == [1020, 1020, 6149]
    assert np.array_equal(splits.val.pixels[-3:], draw_flowers("val", (8, 16))[-3:])
    assert np.array_equal(splits.test.labels, flower_labels("test"))


def test_an_unknown_data_set_is_refused():
    with pytest.raises(ValueError, match="'mnist': one of auto, flowers102, synthetic"):
        load_splits("mnist")


@pytest.mark.parametrize("dataset", ["auto", "flowers102"])
def test_a_data_root_that_cannot_be_written_to_is_refused(server, tmp_path, dataset):
    (tmp_path / "data").write_text("a file where the folder should be")
    with pytest.raises(
        ValueError, match=f"{tmp_path / 'data'} cannot hold Flowers102: .*--data-root"
    ):
        load_splits(dataset, tmp_path / "data", (8, 8), progress=False)


@pytest.mark.parametrize("dataset", ["auto", "flowers102"])
def test_damaged_flowers_are_an_error_and_no_reason_to_fall_back(data_root, no_server, dataset):
    picture = data_root / "flowers-102" / "jpg" / "image_00008.jpg"
    picture.write_bytes(picture.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"image_00008\.jpg cannot be read as a picture"):
        load_splits(dataset, data_root, (8, 8), progress=False)


def test_a_picture_that_is_missing_is_named(data_root):
    (data_root / "flowers-102" / "jpg" / "image_00009.jpg").unlink()
    with pytest.raises(ValueError, match=r"image_00009\.jpg does not exist"):
        load_splits("auto", data_root, (8, 8), progress=False)


def test_a_picture_that_changed_on_disk_is_decoded_anew(data_root, cache_folder):
    before = load_splits("auto", data_root, (8, 8), progress=False)
    jpg = data_root / "flowers-102" / "jpg"
    (jpg / "image_00014.jpg").write_bytes((jpg / "image_00008.jpg").read_bytes())
    after = load_splits("auto", data_root, (8, 8), progress=False)
    changed = sum(
        not torch.equal(one, other)
        for old, new in zip(before[:3], after[:3], strict=True)
        for one, other in zip(old.pixels, new.pixels, strict=True)
    )
    assert changed == 1


def test_each_split_and_size_is_kept_in_a_file_of_its_own(data_root, cache_folder):
    for size in ((8, 8), (16, 8), (8, 8)):
        load_splits("auto", data_root, size, progress=False)
    names = sorted(path.name.rsplit("-", 1)[0] for path in cache_folder.iterdir())
    assert names == [
        f"flowers102-{split}-{size}"
        for split in ("test", "train", "val")
        for size in ("16x8", "8x8")
    ]


# What is said on the way.


@pytest.mark.parametrize("terminal", [True, False])
def test_preparing_is_said_and_bars_are_on_terminals_only(
    data_root, cache_folder, capsys, monkeypatch, terminal
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    load_splits("auto", data_root, (8, 8))
    errors = capsys.readouterr().err
    for split in ("train", "val", "test"):
        assert f"Preparing {split} pictures" in errors
    assert ("picture/s" in errors) == terminal
    load_splits("auto", data_root, (8, 8))
    assert capsys.readouterr().err == ""


def test_without_progress_only_a_download_is_said(server, tmp_path, capsys, cache_folder):
    load_splits("auto", tmp_path, (8, 8), progress=False)
    downloading, unpacking = capsys.readouterr().err.splitlines()
    assert downloading == f"Downloading Flowers102 (345 MB) to {tmp_path}"
    assert unpacking == f"Unpacking {tmp_path / 'flowers-102' / '102flowers.tgz'}"


# What cannot be loaded is said in one line.


def test_pictures_that_do_not_fit_in_memory_are_refused_before_anything_is_done(
    server, tmp_path, monkeypatch
):
    def need(height: int, width: int) -> float:
        return height * width * 3 * 8189 + 3e8  # a byte for each value of 8,189 pictures

    memory = type("Memory", (), {"available": need(1024, 512) - 1})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(
        ValueError, match=r"1024x512 need 13\.2 GB .* 13\.2 GB are free.*--image-size"
    ):
        load_splits("auto", tmp_path, (1024, 512))
    assert server.asked_for == []
    memory.available = need(8, 8)
    splits = load_splits("synthetic", tmp_path, (8, 8), progress=False)
    assert splits.train.pixels.shape == (1020, 8, 8, 3)


@pytest.mark.parametrize("split", ["trnid", "valid", "tstid"])
def test_a_split_without_pictures_is_refused(data_root, monkeypatch, split):
    setid = data_root / "flowers-102" / "setid.mat"
    ids = {"trnid": np.arange(1, 4), "valid": np.arange(4, 7), "tstid": np.arange(7, 10)}
    savemat(setid, ids | {split: []})
    accept(monkeypatch, setid)
    name = {"trnid": "train", "valid": "val", "tstid": "test"}[split]
    with pytest.raises(ValueError, match=f"the {name} split needs pictures"):
        load_splits("auto", data_root, (8, 8), progress=False)


def test_a_label_above_101_is_refused(data_root, monkeypatch):
    path = data_root / "flowers-102" / "imagelabels.mat"
    savemat(path, {"labels": np.full(60, 103)})
    accept(monkeypatch, path)
    with pytest.raises(ValueError, match="labels from 1 to 102"):
        load_splits("auto", data_root, (8, 8), progress=False)


def test_two_channel_files_are_read_as_rgb(data_root):
    path = data_root / "flowers-102" / "jpg" / "image_00008.jpg"
    Image.new("LA", (9, 9), (51, 128)).save(path, "PNG")
    splits = load_splits("auto", data_root, (8, 8), progress=False)
    every = torch.cat([split.pixels for split in splits[:3]])
    assert (every == 51).all(dim=(1, 2, 3)).sum() == 1


@pytest.mark.parametrize("kind", ["fifo", "device", "loop", "folder"])
def test_what_is_no_regular_file_is_refused_at_once(data_root, kind):
    path = data_root / "flowers-102" / "jpg" / "image_00008.jpg"
    path.unlink()
    {
        "fifo": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "loop": lambda: path.symlink_to(path),
        "folder": lambda: path.mkdir(),
    }[kind]()
    reason = "Too many levels" if kind == "loop" else "it is not a regular file"
    with pytest.raises(ValueError, match=rf"image_00008\.jpg cannot be read .*{reason}") as error:
        load_splits("auto", data_root, (8, 8), progress=False)
    assert "\n" not in str(error.value)


def test_too_little_memory_for_one_picture_is_said(data_root, monkeypatch):
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(preprocessing.functional, "resize", fail)
    with pytest.raises(ValueError, match=r"jpg cannot be read .*too little memory is free"):
        load_splits("auto", data_root, (9, 9), progress=False)


def accept(monkeypatch, path: Path) -> None:
    """Have torchvision take ``path`` for the right file of its name."""
    files = {
        part: (name, calculate_md5(path) if name == path.name else md5)
        for part, (name, md5) in Flowers102._file_dict.items()
    }
    monkeypatch.setattr(Flowers102, "_file_dict", files)
