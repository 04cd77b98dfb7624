import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, seeded, write_photograph
from PIL import Image, ImageCms
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize, ToTensor

from datasets import preprocessing
from datasets.errors import DamagedPicture
from datasets.preprocessing import (
    as_rgb,
    augment,
    image_pipeline,
    pixels_held,
    read_picture,
    side_needed,
)

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
        (
            lambda path: Image.new("1", (16384, 16384)).save(path, "PNG"),
            "cannot be .*: it has more",
        ),
    ],
    ids=["missing", "empty", "truncated", "text", "folder", "too-large"],
)
def test_a_picture_that_cannot_be_read_is_named_in_one_line(tmp_path, damage, message):
    path = write_photograph(tmp_path / "one.png")
    damage(path)
    with pytest.raises(DamagedPicture, match=f"^{path} {message}") as error:
        read_picture(path)
    assert "\n" not in str(error.value)


# Deep pixels.


def shades(white: float, dtype: str | type) -> np.ndarray:
    """Six shades of grey, from black to white."""
    pixels = np.array([[0, 0.2, 0.4, 0.6, 0.8, 1]]) * white
    return (pixels if white == 1 else pixels.round()).astype(dtype)


GREYS = [0, 51, 102, 153, 204, 255]


@pytest.mark.parametrize(
    ("white", "dtype"),
    [
        (255, np.int32),
        (255, np.uint16),
        (1023, np.uint16),
        (4095, np.uint16),
        (4095, ">u2"),
        (4095, np.int32),
        (16383, np.uint16),
        (65535, np.uint16),
        (65535, np.int32),
        (1, np.float32),
        (65535, np.float32),
    ],
)
def test_white_is_the_largest_number_of_the_bits_that_a_deep_picture_fills(tmp_path, white, dtype):
    pixels = shades(white, dtype)
    Image.fromarray(pixels).save(tmp_path / "one.tif")
    assert np.asarray(read_picture(tmp_path / "one.tif"))[0, :, 1].tolist() == GREYS


@pytest.mark.parametrize("name", ["one.png", "one.jp2"])
def test_16_bits_are_read_from_other_kinds_of_files_too(tmp_path, name):
    Image.fromarray(shades(65535, np.uint16)).save(tmp_path / name)
    assert np.asarray(read_picture(tmp_path / name))[0, :, 1].tolist() == GREYS


@pytest.mark.parametrize(
    ("lowest", "highest", "dtype"),
    [
        (-1000, 1000, np.int32),
        (0, 70_000, np.int32),
        (-0.1, 1, np.float32),
        (0, 1.5, np.float32),
        (0.5, float("nan"), np.float32),
    ],
)
def test_a_deep_picture_of_which_nothing_tells_what_is_white_is_named(
    tmp_path, lowest, highest, dtype
):
    Image.fromarray(np.array([[lowest, highest]], dtype)).save(tmp_path / "one.tif")
    message = "one.tif cannot be read as a picture: its pixels are numbers from .* are needed"
    with pytest.raises(DamagedPicture, match=message):
        read_picture(tmp_path / "one.tif")


def deep_tiff(pixels: np.ndarray, photometric: int) -> bytes:
    """A TIFF file of 16 bits for each value, [height, width, values], as Pillow does not write it.

    ``photometric`` is 0 where white is 0, 1 where black is 0, and 2 for RGB.
    """
    height, width, values = pixels.shape
    data = pixels.astype("<u2").tobytes()
    tags = {256: width, 257: height, 258: 16, 259: 1, 262: photometric, 273: 8, 277: values}
    tags |= {278: height, 279: len(data)}
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()]
    if values == 3:  # three numbers of bits do not fit into the entry: they come last
        place = 8 + len(data) + 2 + 12 * len(tags) + 4
        entries[2] = struct.pack("<HHII", 258, 3, 3, place)
    start = struct.pack("<4sI", b"II*\0", 8 + len(data))
    end = struct.pack("<I", 0) + struct.pack("<HHH", 16, 16, 16)
    return start + data + struct.pack("<H", len(tags)) + b"".join(entries) + end


def test_a_deep_picture_whose_white_is_0_is_no_negative(tmp_path):
    pixels = shades(65535, np.uint16)[..., None]
    for photometric, expected in ((1, GREYS), (0, [255 - grey for grey in GREYS])):
        (tmp_path / "one.tif").write_bytes(deep_tiff(pixels, photometric))
        assert np.asarray(read_picture(tmp_path / "one.tif"))[0, :, 1].tolist() == expected


@pytest.mark.parametrize(("white", "is_read"), [(65535, True), (16383, False), (4095, False)])
def test_colours_of_fewer_bits_than_their_16_are_named_and_not_nearly_black(
    tmp_path, white, is_read
):
    pixels = np.stack([shades(white, np.uint16)] * 3, axis=-1)
    (tmp_path / "one.tif").write_bytes(deep_tiff(pixels, 2))
    if is_read:
        assert np.asarray(read_picture(tmp_path / "one.tif"))[0, -1].tolist() == [255, 255, 255]
        return
    with pytest.raises(DamagedPicture, match="its colours fill less than their 16 bits"):
        read_picture(tmp_path / "one.tif")


def test_a_transparent_value_of_a_deep_picture_becomes_white(tmp_path):
    Image.fromarray(shades(65535, np.uint16)).save(tmp_path / "one.png")
    content = (tmp_path / "one.png").read_bytes()
    chunk = b"tRNS\0\0"  # what is 0 is transparent; not every Pillow writes this
    chunk = struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk))
    place = content.index(b"IDAT") - 4
    (tmp_path / "one.png").write_bytes(content[:place] + chunk + content[place:])
    expected = [255, *GREYS[1:]]
    assert np.asarray(read_picture(tmp_path / "one.png"))[0, :, 1].tolist() == expected


@pytest.mark.parametrize("mode", ["LA", "PA", "RGBA"])
def test_what_is_transparent_is_white_in_each_mode(mode):
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    image.putpixel((1, 0), (10, 10, 10, 255))
    for step in ("P", "PA") if mode == "PA" else (mode,):
        image = image.convert(step)
    if mode == "PA":
        image.putalpha(Image.frombytes("L", (2, 1), bytes([0, 255])))
    assert np.asarray(as_rgb(image))[0, :, 0].tolist() == [255, 10]


def test_colours_of_the_lab_space_are_converted(tmp_path):
    with Image.open(write_photograph(tmp_path / "one.png")) as image:
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB").save(tmp_path / "one.tif")
        difference = np.asarray(read_picture(tmp_path / "one.tif"), float) - np.asarray(image)
    assert np.abs(difference).mean() < 2


def test_of_an_animation_the_first_picture_is_taken(tmp_path):
    first, second = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    first.save(tmp_path / "one.gif", save_all=True, append_images=[second])
    assert np.asarray(read_picture(tmp_path / "one.gif"))[0, 0].tolist() == [255, 0, 0]


# Big JPEGs.


@pytest.mark.parametrize(
    ("side", "expected"),
    [
        (None, (800, 600)),
        (1000, (800, 600)),
        (301, (800, 600)),
        (300, (400, 300)),
        (100, (200, 150)),
        (1, (100, 75)),
    ],
)
def test_a_jpeg_is_decoded_no_smaller_than_asked_for(tmp_path, side, expected):
    path = write_photograph(tmp_path / "one.jpg", (800, 600))
    assert read_picture(path, side).size == expected
    assert pixels_held(path, side) == expected[0] * expected[1]
    if expected == (800, 600):
        with Image.open(path) as image:
            assert np.array_equal(read_picture(path, side), image)


def test_a_reduced_jpeg_is_turned_upright_too(tmp_path):
    image = Image.new("RGB", (400, 200), "red")
    image.getexif()[0x0112] = 6  # the camera was held upright
    image.save(tmp_path / "one.jpg", exif=image.getexif())
    assert read_picture(tmp_path / "one.jpg", 100).size == (100, 200)


def test_a_progressive_jpeg_is_held_whole(tmp_path):
    with Image.open(write_photograph(tmp_path / "one.png", (800, 600))) as image:
        image.save(tmp_path / "one.jpg", progressive=True)
    assert read_picture(tmp_path / "one.jpg", 100).size == (200, 150)
    assert pixels_held(tmp_path / "one.jpg", 100) == 800 * 600


@pytest.mark.parametrize("crop", [False, True])
def test_at_the_models_size_a_reduced_jpeg_is_nearly_the_same(tmp_path, crop):
    with seeded():
        grain = torch.randn(1600, 1200, 3).mul(8).numpy()
    with Image.open(write_photograph(tmp_path / "one.png", (1200, 1600))) as image:
        pixels = (np.asarray(image) + grain).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "one.jpg", quality=90)
    pipeline = image_pipeline((32, 32), crop)
    reduced = read_picture(tmp_path / "one.jpg", side_needed(pipeline))
    assert reduced.size == (150, 200)
    difference = pipeline(reduced) - pipeline(read_picture(tmp_path / "one.jpg"))
    assert 255 * difference.abs().max() <= 2
    assert 255 * difference.abs().mean() < 0.3


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (image_pipeline((32, 64)), 256),
        (image_pipeline((64, 32), crop=True), 256),
        (Resize([40]), 160),
        (Compose([CenterCrop(500), Resize(32)]), None),
        (Resize(32, InterpolationMode.NEAREST), None),
        (ToTensor(), None),
        (Compose([]), None),
        (None, None),
    ],
)
def test_only_a_transform_that_first_averages_down_makes_do_with_less(transform, expected):
    assert side_needed(transform) == expected


# HEIC.


def test_heic_says_which_package_reads_it(tmp_path, no_heic):
    (tmp_path / "one.HEIC").write_bytes(b"some")
    with pytest.raises(DamagedPicture, match="need the package pillow-heif: pip install"):
        read_picture(tmp_path / "one.HEIC")


def test_heic_is_read_where_the_package_is_installed(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    with Image.open(write_photograph(tmp_path / "one.png")) as image:
        expected = np.asarray(image, np.float32)
    pillow_heif.from_pillow(Image.fromarray(expected.astype(np.uint8))).save(tmp_path / "one.heic")
    found = np.asarray(read_picture(tmp_path / "one.heic"), np.float32)
    assert found.shape == (40, 50, 3)
    assert np.abs(found - expected).mean() < 8  # its compression loses a little


READ_ALOUD = """
import sys
from datasets.preprocessing import read_picture
print(read_picture(sys.argv[1]).size)
"""


def test_a_picture_of_many_pixels_is_read_in_silence(tmp_path):
    # In a process of its own, since pytest has warnings of its own.
    Image.new("1", (9600, 9600)).save(tmp_path / "large.png")
    command = [sys.executable, "-c", READ_ALOUD, tmp_path / "large.png"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "(9600, 9600)\n"
    assert "Warning" not in done.stderr


READ_THE_FOLDER = """
import sys
from pathlib import Path
from datasets.folder import PictureFolder
from datasets.memory import read_pictures
from datasets.preprocessing import image_pipeline

def memory(kind):
    (line,) = [each for each in Path("/proc/self/status").read_text().splitlines() if kind in each]
    return int(line.split()[1]) / 1024

folder = PictureFolder(sys.argv[1], transform=image_pipeline((32, 32)))
folder[0]
before = memory("VmRSS")
assert len(read_pictures(folder, False).labels) == 10
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak")
@pytest.mark.parametrize(
    ("name", "most"), [("big.jpg", 60), ("progressive.jpg", 150), ("big.png", 150)]
)
def test_of_big_pictures_no_two_are_in_memory(tmp_path, name, most):
    """Ten pictures of 20 million pixels, of which each whole one takes 60 to 80 MiB."""
    for folder in ("train", "val", "test"):
        for number in range(10 if folder == "train" else 2):
            write_photograph(tmp_path / folder / f"{number}.png")
    image = Image.new("RGB", (4500, 4500), "red")
    image.save(tmp_path / name, progressive=name == "progressive.jpg")
    for number in range(10):
        (tmp_path / "train" / f"{number}.png").unlink()
        os.link(tmp_path / name, tmp_path / "train" / f"{number}{Path(name).suffix}")
    command = [sys.executable, "-c", READ_THE_FOLDER, tmp_path]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert float(done.stdout) < most


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


def test_an_oblong_picture_is_rotated_and_not_sheared(monkeypatch):
    still(monkeypatch, ROTATION=25.0)
    # A round spot, twelve pixels to the right of the centre.
    y, x = np.mgrid[:32, :64] - np.array([15.5, 31.5])[:, None, None]
    spot = torch.from_numpy(np.exp(-((x - 12) ** 2 + y**2) / (2 * 3**2)))
    with seeded():
        moved = augment(spot.expand(200, 1, 32, 64)).squeeze(1).numpy()
    weights = moved / moved.sum(axis=(1, 2), keepdims=True)
    right, down = (weights * x).sum((1, 2)), (weights * y).sum((1, 2))
    assert np.hypot(right, down) == pytest.approx(np.full(200, 12), abs=0.1)
    assert np.abs(down).max() == pytest.approx(12 * np.sin(np.radians(25)), abs=0.2)
    # It stays round: as wide as high, with no slant.
    dx, dy = x - right[:, None, None], y - down[:, None, None]
    width, height, slant = ((weights * each).sum((1, 2)) for each in (dx**2, dy**2, dx * dy))
    assert width / height == pytest.approx(np.ones(200), abs=0.05)
    assert slant / width == pytest.approx(np.zeros(200), abs=0.05)


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
