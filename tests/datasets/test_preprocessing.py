import io
import os
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from torchvision.transforms import Compose, Resize, ToTensor

from datasets import preprocessing
from datasets.pictures import Pictures
from datasets.preprocessing import (
    compute_once,
    decode_pictures,
    fingerprint,
    map_in_parallel,
    open_picture,
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
        assert np.array_equal(pixels, decode_pictures([path], (8, 8))[0])


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


def broken_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def broken_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def broken_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


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
        (broken_folder, "cannot be read as a picture: it is not a regular file"),
        (broken_fifo, "cannot be read as a picture: it is not a regular file"),
        (broken_device, "cannot be read as a picture: it is not a regular file"),
        (broken_loop, "cannot be read as a picture: .*symbolic links"),
        (broken_bomb, "cannot be read as a picture: .*decompression bomb"),
    ],
)
def test_a_picture_that_cannot_be_read_is_named(tmp_path, breaks, message):
    paths = [save_noise(tmp_path / f"image_{n:05d}.jpg") for n in range(50)]
    breaks(paths[33])
    with pytest.raises(ValueError, match=rf"image_00033\.jpg {message}") as error:
        decode_pictures(paths, (8, 8))
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_large_picture_that_fits_in_memory_is_read(tmp_path):
    path = tmp_path / "large.png"
    Image.new("1", (9600, 9600)).save(path)
    with open_picture(path) as image:
        assert image.size == (9600, 9600)


@pytest.mark.parametrize("error", [MemoryError(), SyntaxError("odd"), RuntimeError("odd")])
def test_whatever_goes_wrong_with_an_open_picture_is_one_line_with_its_name(tmp_path, error):
    path = save_noise(tmp_path / "picture.jpg")
    reason = str(error) or "too little memory is free"
    with (
        pytest.raises(ValueError, match=f"^{path} cannot be read as a picture: {reason}$"),
        open_picture(path),
    ):
        raise error


def test_work_in_parallel_keeps_its_order_and_stops_at_the_first_error(capsys):
    def odd_is_late(item: int) -> int:
        time.sleep(0.002 * (item % 2))
        return item**2

    assert map_in_parallel(odd_is_late, range(50), None) == [item**2 for item in range(50)]
    done = []

    def fail_at_once(item: int) -> None:
        done.append(item)
        time.sleep(0.01)
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 0"):
        map_in_parallel(fail_at_once, range(1000), None)
    assert len(done) < 500
    assert capsys.readouterr().err == ""


# What identifies pictures.


def test_the_same_files_have_the_same_fingerprint(tmp_path):
    paths = [save_noise(tmp_path / f"{n}.jpg") for n in range(3)]
    assert fingerprint(paths) == fingerprint(list(paths))


def test_another_order_or_source_has_another_fingerprint(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    paths = [save_noise(tmp_path / f"{n}.jpg") for n in range(3)]
    elsewhere = [save_noise(tmp_path / "elsewhere" / f"{n}.jpg") for n in range(3)]
    fingerprints = {
        fingerprint(paths),
        fingerprint(paths[::-1]),
        fingerprint(paths[:2]),
        fingerprint(elsewhere),
    }
    assert len(fingerprints) == 4


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


def test_another_version_of_pillow_or_of_the_code_has_another_fingerprint(tmp_path, monkeypatch):
    path = save_noise(tmp_path / "picture.jpg")
    before = fingerprint([path])
    with monkeypatch.context() as patch:
        patch.setattr(PIL, "__version__", "0.1")
        older = fingerprint([path])
    edited = tmp_path / "preprocessing.py"
    edited.write_text("# another way")
    monkeypatch.setattr(preprocessing, "__file__", str(edited))
    assert len({before, older, fingerprint([path])}) == 3


def test_a_symlink_loop_is_as_a_missing_file(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    assert len(fingerprint([tmp_path / "loop"])) == 64


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
    computation = Computation()
    for key in ("other", "another", "another", "other"):
        assert np.array_equal(compute_once("pixels", key, computation), PIXELS)
    assert computation.calls == 3


def test_a_byte_damaged_anywhere_never_changes_the_pixels(kept):
    content = kept.read_bytes()
    computation = Computation()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for place in range(0, len(content), 3):
            damaged = bytearray(content)
            damaged[place] ^= 0xFF
            kept.write_bytes(damaged)
            assert np.array_equal(compute_once("pixels", "key", computation), PIXELS)
    assert computation.calls > 30


@pytest.mark.filterwarnings("ignore:.*is damaged and made again")
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
    [{"pixels": torch.from_numpy(PIXELS)}, [1, 2], 3],
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
    np.savez(kept, pixels=np.array([CreatesFile(victim)]))
    with pytest.warns(UserWarning, match=r"is damaged and made again \(ValueError\)"):
        assert np.array_equal(compute_once("pixels", "key", Computation()), PIXELS)
    assert not victim.exists()


@pytest.mark.parametrize("method", [1, 8, 12, 14, 99])
def test_a_flipped_compression_byte_is_computed_again(kept, method):
    content = bytearray(kept.read_bytes())
    for signature, offset in ((b"PK\x01\x02", 10), (b"PK\x03\x04", 8)):
        content[content.index(signature) + offset] = method
    kept.write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged and made again"):
        assert np.array_equal(compute_once("pixels", "key", Computation()), PIXELS)


def test_a_zip_bomb_is_not_unpacked(kept, monkeypatch):
    with zipfile.ZipFile(kept, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("pixels.npy", bytes(50_000_000))
    assert kept.stat().st_size < 100_000
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda _: pytest.fail("it is unpacked"))
    with pytest.warns(UserWarning, match="is damaged and made again"):
        assert np.array_equal(compute_once("pixels", "key", Computation()), PIXELS)


def test_a_header_that_asks_for_more_than_the_memory_is_computed_again(kept):
    pixels = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (2**50,)}
    np.lib.format.write_array_header_1_0(pixels, header)
    with zipfile.ZipFile(kept, "w") as archive:
        archive.writestr("pixels.npy", pixels.getvalue())
    with pytest.warns(UserWarning, match="is damaged and made again"):
        assert np.array_equal(compute_once("pixels", "key", Computation()), PIXELS)


@pytest.mark.parametrize("error", [struct.error("odd"), MemoryError(), NotImplementedError()])
def test_whatever_the_reader_raises_the_pixels_are_computed_again(kept, monkeypatch, error):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(np, "load", fail)
    message = rf"is damaged and made again \({type(error).__name__}\)"
    with pytest.warns(UserWarning, match=message):
        assert np.array_equal(compute_once("pixels", "key", Computation()), PIXELS)


@pytest.mark.parametrize("kind", ["fifo", "loop", "device"])
def test_what_is_no_regular_file_is_replaced(kept, kind):
    kept.unlink()
    {
        "fifo": lambda: os.mkfifo(kept),
        "loop": lambda: kept.symlink_to(kept),
        "device": lambda: kept.symlink_to("/dev/zero"),
    }[kind]()
    computation = Computation()
    for _ in range(2):
        assert np.array_equal(compute_once("pixels", "key", computation), PIXELS)
    assert computation.calls == 1
    assert kept.is_file()
    assert not kept.is_symlink()


def test_outdated_files_and_left_temporaries_of_the_same_pictures_are_removed(kept):
    for name in ("pixels-older.npz", "pixels-key.123.npz", "pixels-old.pt", "others-key.npz"):
        (kept.parent / name).touch()
    compute_once("pixels", "new", Computation())
    left = {path.name for path in kept.parent.iterdir()}
    assert left == {"pixels-new.npz", "others-key.npz"}


def test_a_folder_that_cannot_be_written_to_costs_a_warning_and_no_more(cache_folder):
    cache_folder.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="decoded pictures are not kept for the next run"):
        assert np.array_equal(compute_once("pixels", "key", Computation()), PIXELS)
    assert cache_folder.is_file()


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
    assert kept.name == "pixels-key.npz"
    assert list(kept.parent.iterdir()) == [kept]


BUILDER = """
import sys, time
from pathlib import Path
import numpy as np
from datasets import preprocessing

folder, name = Path(sys.argv[1]), sys.argv[2]
preprocessing.CACHE_FOLDER = folder / "cache"

def compute():
    (folder / name).touch()
    while not all((folder / other).exists() for other in ("one", "two")):
        time.sleep(0.01)
    return np.full((50, 32, 32, 3), 7, np.uint8)

print(int(preprocessing.compute_once("pixels", "key", compute).sum()))
"""


@pytest.mark.slow
def test_two_processes_may_build_the_same_file_at_once(tmp_path, monkeypatch):
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
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["pixels-key.npz"]
    monkeypatch.setattr(preprocessing, "CACHE_FOLDER", tmp_path / "cache")
    kept = compute_once("pixels", "key", Computation())
    assert int(kept.sum()) == total
