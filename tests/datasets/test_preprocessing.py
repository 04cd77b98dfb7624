import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import Compose, Resize, ToTensor

from datasets.pictures import Pictures
from datasets.preprocessing import (
    compute_in_parallel,
    compute_once,
    decode_pictures,
    fingerprint,
    picture_to_pixels,
    read_picture,
)

PIXELS = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)


def save_noise(
    path: Path, size: tuple[int, int] = (20, 30), mode: str = "RGB", **options: object
) -> Path:
    width, height = size
    noise = np.random.default_rng(width + height).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(path, **options)
    return path


# Decoding.


@pytest.mark.parametrize("resolution", [(32, 32), (16, 48)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("size", [(1, 1), (2, 300), (301, 3), (37, 53), (500, 667), (32, 32)])
def test_a_jpeg_gives_the_posts_tensor_bit_for_bit(tmp_path, size, mode, resolution):
    path = save_noise(tmp_path / "picture.jpg", size, mode)
    with Image.open(path) as image:
        expected = Compose([Resize(resolution), ToTensor()])(image.convert("RGB"))
    pixels = torch.from_numpy(decode_pictures([path], resolution))
    image, _ = Pictures(pixels, torch.zeros(1, dtype=torch.long))[0]
    assert image.shape == (3, *resolution)
    assert torch.equal(image, expected)


def test_pictures_are_decoded_into_the_order_of_their_paths(tmp_path):
    paths = [save_noise(tmp_path / f"{n}.jpg", (n, 9)) for n in range(1, 71)]
    decoded = decode_pictures(paths, (8, 8))
    assert decoded.dtype == np.uint8
    for path, pixels in zip(paths, decoded, strict=True):
        assert np.array_equal(pixels, picture_to_pixels(path, (8, 8)))


def test_no_pictures_decode_to_none():
    assert decode_pictures([], (8, 16)).shape == (0, 8, 16, 3)


def broken_missing(path: Path) -> None:
    path.unlink()


def broken_empty(path: Path) -> None:
    path.write_bytes(b"")


def broken_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def broken_header_only(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def broken_text(path: Path) -> None:
    path.write_text("<html>404 Not Found</html>")


def broken_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def broken_bomb(path: Path) -> None:
    # A grey picture of 16384 x 16384 in a few bytes: the size stands in the header.
    Image.new("1", (16384, 16384)).save(path, "PNG")


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (broken_missing, "does not exist"),
        (broken_empty, "cannot be read as a picture"),
        (broken_truncated, "cannot be read as a picture: .*truncated"),
        (broken_header_only, "cannot be read as a picture"),
        (broken_text, "cannot be read as a picture"),
        (broken_folder, "cannot be read as a picture: .*directory"),
        (broken_bomb, "cannot be read as a picture: .*decompression bomb"),
    ],
)
def test_a_picture_that_cannot_be_read_is_named(tmp_path, breaks, message):
    paths = [save_noise(tmp_path / f"image_{n:05d}.jpg") for n in range(50)]
    breaks(paths[33])
    with pytest.raises(ValueError, match=rf"image_00033\.jpg {message}"):
        decode_pictures(paths, (8, 8))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_large_picture_that_fits_in_memory_is_read(tmp_path):
    path = tmp_path / "large.png"
    Image.new("1", (9600, 9600)).save(path)
    assert read_picture(path).size == (9600, 9600)


def test_work_in_parallel_fills_every_row_once_and_in_place():
    out, seen, lock = np.zeros((100, 1, 1, 3), np.uint8), [], threading.Lock()

    def compute(run: range) -> np.ndarray:
        with lock:
            seen.extend(run)
        return np.array(run, np.uint8)[:, None, None, None].repeat(3, axis=3)

    compute_in_parallel(compute, out)
    assert sorted(seen) == list(range(100))
    assert out[:, 0, 0, 0].tolist() == list(range(100))


# What identifies pictures.


def test_the_same_files_have_the_same_fingerprint(tmp_path):
    paths = [save_noise(tmp_path / f"{n}.jpg") for n in range(3)]
    assert fingerprint(paths, (32, 32)) == fingerprint(paths, (32, 32))


def test_another_size_order_or_source_has_another_fingerprint(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    paths = [save_noise(tmp_path / f"{n}.jpg") for n in range(3)]
    elsewhere = [save_noise(tmp_path / "elsewhere" / f"{n}.jpg") for n in range(3)]
    fingerprints = {
        fingerprint(paths, (32, 32)),
        fingerprint(paths, (64, 64)),
        fingerprint(paths[::-1], (32, 32)),
        fingerprint(paths[:2], (32, 32)),
        fingerprint(elsewhere, (32, 32)),
    }
    assert len(fingerprints) == 5


def test_a_changed_or_missing_file_has_another_fingerprint(tmp_path):
    path = save_noise(tmp_path / "picture.jpg")
    before, time = fingerprint([path]), path.stat().st_mtime_ns
    os.utime(path, ns=(time, time + 1_000_000))
    touched = fingerprint([path])
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(time, time))
    longer = fingerprint([path])
    path.unlink()
    assert len({before, touched, longer, fingerprint([path])}) == 4


# The cache.


class Computation:
    """Returns ``PIXELS`` and counts how often it is asked to."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> np.ndarray:
        self.calls += 1
        return PIXELS


@pytest.fixture
def kept(cache_folder) -> Path:
    """The file in which ``PIXELS`` are kept under the name "pixels" and the key "key"."""
    compute_once("pixels", "key", Computation())
    (path,) = cache_folder.iterdir()
    return path


def test_pixels_are_computed_once(cache_folder):
    computation = Computation()
    for _ in range(3):
        pixels = compute_once("pixels", "key", computation)
        assert pixels.dtype == torch.uint8
        assert np.array_equal(pixels, PIXELS)
    assert computation.calls == 1


def test_another_key_is_computed_on_its_own(kept):
    # The first twelve characters of a key stand in the file's name; the rest counts as well.
    long_key = "0123456789ab"
    computation = Computation()
    for key in ("other", f"{long_key}c", f"{long_key}d", f"{long_key}c"):
        assert np.array_equal(compute_once("pixels", key, computation), PIXELS)
    assert computation.calls == 4


def test_a_byte_damaged_anywhere_never_changes_the_pixels(kept):
    content = kept.read_bytes()
    computation = Computation()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for place in range(0, len(content), 11):
            damaged = bytearray(content)
            damaged[place] ^= 0xFF
            kept.write_bytes(damaged)
            assert np.array_equal(compute_once("pixels", "key", computation), PIXELS)
    assert computation.calls > 10


def test_damaged_pixels_are_computed_again_and_kept(kept):
    content = bytearray(kept.read_bytes())
    content[content.index(PIXELS.tobytes()) + 40] ^= 1
    kept.write_bytes(content)
    computation = Computation()
    for _ in range(2):
        assert np.array_equal(compute_once("pixels", "key", computation), PIXELS)
    assert computation.calls == 1


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_computed_again_with_a_warning(kept, share):
    content = kept.read_bytes()
    kept.write_bytes(content[: int(share * len(content))])
    computation = Computation()
    with pytest.warns(UserWarning, match=f"{kept} is damaged and made again"):
        assert np.array_equal(compute_once("pixels", "key", computation), PIXELS)
    assert computation.calls == 1


@pytest.mark.parametrize(
    "content",
    [{"pixels": torch.from_numpy(PIXELS)}, [1, 2], 3, {"key": "key", "crc32": 0}],
)
def test_a_file_of_another_version_is_computed_again(kept, content):
    torch.save(content, kept)
    with pytest.warns(UserWarning, match="is damaged and made again"):
        assert np.array_equal(compute_once("pixels", "key", Computation()), PIXELS)


class CreatesFile:
    """Unpickled carelessly, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_file_that_would_run_code_is_computed_again_and_runs_none(kept, tmp_path):
    victim = tmp_path / "victim"
    torch.save({"key": "key", "crc32": 0, "pixels": CreatesFile(victim)}, kept)
    with pytest.warns(UserWarning, match=r"is damaged and made again \(UnpicklingError\)"):
        assert np.array_equal(compute_once("pixels", "key", Computation()), PIXELS)
    assert not victim.exists()


@pytest.mark.filterwarnings("ignore:.*is damaged and made again")
def test_a_folder_that_cannot_be_written_to_costs_a_warning_and_no_more(cache_folder):
    cache_folder.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="decoded pictures are not kept for the next run"):
        assert np.array_equal(compute_once("pixels", "key", Computation()), PIXELS)
    assert cache_folder.is_file()


@pytest.mark.filterwarnings("ignore:.*is damaged and made again")
def test_a_folder_in_the_place_of_the_file_costs_a_warning_and_no_more(kept):
    kept.unlink()
    kept.mkdir()
    with pytest.warns(UserWarning, match="decoded pictures are not kept for the next run"):
        assert np.array_equal(compute_once("pixels", "key", Computation()), PIXELS)


def test_an_error_while_computing_keeps_nothing(cache_folder):
    def fail() -> np.ndarray:
        raise ValueError("picture.jpg does not exist")

    with pytest.raises(ValueError, match=r"picture\.jpg"):
        compute_once("pixels", "key", fail)
    assert not cache_folder.exists() or not list(cache_folder.iterdir())


def test_the_kept_file_is_the_only_one_left_in_the_folder(kept):
    assert kept.name == "pixels-key.pt"
    assert list(kept.parent.iterdir()) == [kept]


BUILDER = """
import sys, time
from pathlib import Path
import numpy as np
from datasets.preprocessing import compute_once

folder, name = Path(sys.argv[1]), sys.argv[2]

def compute():
    (folder / name).touch()
    while not all((folder / other).exists() for other in ("one", "two")):
        time.sleep(0.01)
    return np.full((50, 32, 32, 3), 7, np.uint8)

print(int(compute_once("pixels", "key", compute, folder / "cache").sum()))
"""


@pytest.mark.slow
def test_two_processes_may_build_the_same_file_at_once(tmp_path):
    builders = [
        subprocess.Popen(
            [sys.executable, "-c", BUILDER, str(tmp_path), name],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    total = 50 * 32 * 32 * 3 * 7
    assert [builder.communicate(timeout=60) for builder in builders] == [(f"{total}\n", "")] * 2
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["pixels-key.pt"]
    kept = compute_once("pixels", "key", Computation(), tmp_path / "cache")
    assert int(kept.sum()) == total
