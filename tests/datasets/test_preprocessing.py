import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, seeded, write_photograph
from PIL import Image

from datasets import preprocessing
from datasets.errors import DamagedPicture
from datasets.preprocessing import augment, read_picture

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
