import io
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vae_inference
from datasets.preprocessing import picture_to_pixels, read_photograph
from vae.latent import near, spherical_steps, variation_per_dimension
from vae.training.checkpoint import load_model, save_checkpoint
from vae.training.options import Options
from vae.vae import VAE
from vae_inference import main

COMMANDS = ("similar", "sample", "reconstruct", "interpolate", "traverse", "explore")
CELL = 128
GAP = 4


def write_checkpoint(path: Path, seed: int = 0, **options: int | bool) -> Path:
    """Write the checkpoint of a freshly initialised small model, as training writes it."""
    options = Options(**{"image_size": 16, "latent_size": 4} | options)
    size = [options.image_size, options.image_size]
    config = asdict(options) | {"image_resolution": size, "image_channels": 3}
    with seeded(seed):
        model = VAE(tuple(size), options.latent_size, 3, options.batch_norm)
    # Untrained decoders draw grey whatever z is.
    model.decoder.fc.weight.data *= 20
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint({"model": model.state_dict(), "config": config}, path)
    return path


def write_photograph(path: Path, size: tuple[int, int] = (50, 40), seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "checkpoint.pt")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with two photographs in it."""
    write_photograph(tmp_path / "a.png")
    write_photograph(tmp_path / "b.jpg", (31, 77), seed=1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def arguments(command: str) -> list[str]:
    pictures = {"sample": [], "explore": [], "interpolate": ["a.png", "b.jpg"]}
    return [command, *pictures.get(command, ["a.png"])]


def cell(path: str, row: int, column: int, left: int = 0, top: int = 20) -> np.ndarray:
    """Return one picture of a grid, scaled back to the model's 16x16."""
    pixels = np.asarray(Image.open(path))
    y, x = top + GAP + row * (CELL + GAP), left + GAP + column * (CELL + GAP)
    picture = pixels[y : y + CELL, x : x + CELL]
    assert picture.shape == (CELL, CELL, 3)
    return picture[:: CELL // 16, :: CELL // 16]


def to_pixels(image: torch.Tensor) -> np.ndarray:
    return image.mul(255).round().byte().movedim(0, -1).numpy()


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """PyTorch's random numbers follow from ``seed`` inside, and go on afterwards as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


# Photographs


def test_a_photograph_that_needs_nothing_is_read_as_training_reads_it(tmp_path):
    path = write_photograph(tmp_path / "a.jpg")
    expected = torch.from_numpy(picture_to_pixels(path, (16, 24)).copy()).movedim(-1, 0) / 255
    assert torch.equal(read_photograph(path, (16, 24))[0], expected)


@pytest.mark.parametrize("kind", ["L", "P", "1", "CMYK", "YCbCr"])
def test_photographs_of_other_colour_modes_are_read_as_rgb(tmp_path, kind):
    path = tmp_path / ("a.jpg" if kind in ("CMYK", "YCbCr") else "a.png")
    Image.new("RGB", (20, 20), "white").convert(kind).save(path)
    x = read_photograph(path, (16, 16))
    assert x.shape == (1, 3, 16, 16)
    assert x.min() > 0.98


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_a_photograph_is_turned_as_its_exif_data_say(tmp_path, orientation, turns):
    stored = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    x = read_photograph(tmp_path / "a.png", (16, 16))
    assert np.array_equal(to_pixels(x[0]), np.rot90(stored, turns))


def save_transparent(kind: str, path: Path) -> None:
    """Write a picture whose left half is transparent, over black, and whose right half is red."""
    alpha = Image.new("L", (32, 32))
    alpha.paste(255, (16, 0, 32, 32))
    image = Image.new("RGB", (32, 32))
    image.paste("red", (16, 0, 32, 32))
    image.putalpha(alpha)
    if kind == "P":
        indices = np.repeat(np.array([[0, 1]], np.uint8), 16, axis=1).repeat(32, axis=0)
        image = Image.fromarray(indices)
        image.putpalette([0, 0, 0, 255, 0, 0])
        image.save(path, transparency=0)
    elif kind == "RGB":
        image.convert("RGB").save(path, transparency=(0, 0, 0))
    else:
        image.save(path)


@pytest.mark.parametrize("kind", ["RGBA", "P", "RGB"])
def test_what_is_transparent_becomes_white(tmp_path, kind):
    save_transparent(kind, tmp_path / "a.png")
    x = read_photograph(tmp_path / "a.png", (32, 32))[0]
    assert torch.equal(x[:, :, :16], torch.ones(3, 32, 16))
    assert torch.equal(x[:, 5, 20], torch.tensor([1.0, 0.0, 0.0]))


def test_half_transparent_grey_is_blended_with_white(tmp_path):
    Image.new("LA", (16, 16), (0, 128)).save(tmp_path / "a.png")
    x = read_photograph(tmp_path / "a.png", (16, 16))
    assert x.unique().item() == pytest.approx(127 / 255)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_grey_of_16_bits_is_scaled_and_not_clipped(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.full((16, 16), 100 * 257, np.uint16)).save(path)
    assert read_photograph(path, (16, 16)).unique().item() == pytest.approx(100 / 255)


def test_floating_point_pixels_are_refused(tmp_path):
    Image.new("F", (16, 16), 0.5).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif .*floating-point"):
        read_photograph(tmp_path / "a.tif", (16, 16))


def test_a_photograph_is_squeezed_or_cropped_to_its_middle(tmp_path):
    image = Image.new("RGB", (90, 30), "blue")
    image.paste("red", (30, 0, 60, 30))
    image.save(tmp_path / "a.png")
    red = torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 16, 16)
    assert not torch.equal(read_photograph(tmp_path / "a.png", (16, 16))[0], red)
    cropped = read_photograph(tmp_path / "a.png", (16, 16), centre_crop=True)[0]
    assert torch.equal(cropped[:, :, 1:-1], red[:, :, 1:-1])


def test_a_crop_has_the_shape_of_a_model_that_is_not_square(tmp_path):
    write_photograph(tmp_path / "a.png")
    assert read_photograph(tmp_path / "a.png", (16, 24), centre_crop=True).shape == (1, 3, 16, 24)


# Latent vectors


def test_flowers_at_spread_0_are_the_reconstruction():
    mean, log_var = torch.randn(2, 1, 4)
    assert torch.equal(near(mean, log_var, 3, 0.0), mean.repeat(3, 1))


def test_flowers_at_spread_1_are_drawn_from_the_prior():
    mean, log_var = torch.tensor([[3.0, -2.0]]), torch.zeros(1, 2)
    with seeded():
        z = near(mean, log_var, 100_000, 1.0)
    assert torch.allclose(z.mean(0), torch.zeros(2), atol=0.02)
    assert torch.allclose(z.std(0), torch.ones(2), atol=0.02)


def test_flowers_in_between_have_the_documented_mean_and_variance():
    mean, log_var = torch.tensor([[3.0, -2.0]]), torch.tensor([[-4.0, 0.0]])
    with seeded():
        z = near(mean, log_var, 100_000, 0.6)
    assert torch.allclose(z.mean(0), 0.8 * mean[0], atol=0.02)
    assert torch.allclose(z.var(0), 0.36 + 0.64 * 0.36 * log_var[0].exp(), atol=0.02)


def test_spherical_steps_keep_the_distance_from_the_origin():
    start, end = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 2.0]])
    z = spherical_steps(start, end, 5)
    assert torch.allclose(z[[0, -1]], torch.cat((start, end)), atol=1e-6)
    assert torch.allclose(z.norm(dim=1), torch.full((5,), 2.0))
    angles = torch.acos(torch.cosine_similarity(z[1:], z[:-1]))
    assert torch.allclose(angles, torch.full((4,), math.pi / 8), atol=1e-3)


@pytest.mark.parametrize("factor", [1.0, 0.5, -1.0, 0.0])
def test_spherical_steps_between_vectors_on_one_line_are_finite(factor):
    start = torch.tensor([[1.0, 2.0]])
    z = spherical_steps(start, factor * start, 4)
    assert torch.allclose(z[[0, -1]], torch.cat((start, factor * start)), atol=1e-6)
    assert z.isfinite().all()


def test_a_dimension_that_the_decoder_ignores_has_no_share_of_the_variation(checkpoint):
    model, *_ = load_model(checkpoint)
    model.decoder.fc.weight.data[:, 2] = 0
    model.decoder.fc.weight.data[:, 1] *= 5
    with seeded(), torch.no_grad():
        shares = variation_per_dimension(model)
    assert shares[2] == 0
    assert shares.argmax() == 1
    assert 0.9 < shares.sum() < 2


# The command line


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_writes_one_file_and_prints_its_path(folder, checkpoint, capsys, command):
    before = set(folder.iterdir())
    assert main([*arguments(command), "--checkpoint", str(checkpoint)]) is None
    name = f"{command}.{'html' if command == 'explore' else 'png'}"
    assert set(folder.iterdir()) - before == {folder / name}
    assert capsys.readouterr() == (f"{name}\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_seed_repeats_exactly(folder, checkpoint, command):
    for name in ("first", "second"):
        main([*arguments(command), "--checkpoint", str(checkpoint), "--output", name])
    assert (folder / "first").read_bytes() == (folder / "second").read_bytes()


@pytest.mark.parametrize("command", ["similar", "sample"])
def test_another_seed_draws_other_flowers(folder, checkpoint, command):
    for seed in ("0", "1"):
        options = ["--checkpoint", str(checkpoint), "--output", seed, "--seed", seed]
        main([*arguments(command), *options])
    assert (folder / "0").read_bytes() != (folder / "1").read_bytes()


def test_similar_shows_picture_reconstruction_and_new_flowers(folder, checkpoint):
    options = ["--count", "3", "--checkpoint", str(checkpoint)]
    main(["similar", "a.png", "b.jpg", *options])
    assert Image.open("similar.png").size == (5 * (CELL + GAP) + GAP, 2 * (CELL + GAP) + GAP + 20)
    model, *_ = load_model(checkpoint)
    for row, name in enumerate(("a.png", "b.jpg")):
        x = read_photograph(Path(name), (16, 16))
        assert np.array_equal(cell("similar.png", row, 0), to_pixels(x[0]))
        reconstruction = to_pixels(model.reconstruct(x).detach()[0])
        shown = [cell("similar.png", row, column) for column in range(1, 5)]
        assert np.abs(shown[0].astype(int) - reconstruction).max() <= 1
        assert len({flower.tobytes() for flower in shown}) == 4


def test_similar_at_spread_0_repeats_the_reconstruction(folder, checkpoint):
    main(["similar", "a.png", "--spread", "0", "--count", "2", "--checkpoint", str(checkpoint)])
    shown = [cell("similar.png", 0, column) for column in (1, 2, 3)]
    assert all(np.array_equal(flower, shown[0]) for flower in shown)


def test_sample_draws_as_many_flowers_as_asked_for(folder, checkpoint):
    main(["sample", "--count", "7", "--checkpoint", str(checkpoint)])
    shown = [cell("sample.png", i // 3, i % 3, top=0) for i in range(9)]
    assert len({flower.tobytes() for flower in shown[:7]}) == 7
    assert all((flower == 255).all() for flower in shown[7:])


def test_reconstruct_shows_pairs(folder, checkpoint):
    main(["reconstruct", "a.png", "b.jpg", "--checkpoint", str(checkpoint)])
    model, *_ = load_model(checkpoint)
    for row, name in enumerate(("a.png", "b.jpg")):
        x = read_photograph(Path(name), (16, 16))
        assert np.array_equal(cell("reconstruct.png", row, 0), to_pixels(x[0]))
        difference = cell("reconstruct.png", row, 1) - to_pixels(model.reconstruct(x).detach()[0])
        assert np.abs(difference.astype(np.int8)).max() <= 1


def test_interpolate_begins_and_ends_with_the_two_reconstructions(folder, checkpoint):
    options = ["--checkpoint", str(checkpoint)]
    main(["reconstruct", "a.png", "b.jpg", *options])
    main(["interpolate", "a.png", "b.jpg", "--steps", "4", *options])
    for row, column, place in [(0, 0, 0), (0, 1, 1), (1, 1, 4), (1, 0, 5)]:
        difference = cell("reconstruct.png", row, column) - cell("interpolate.png", 0, place)
        assert np.abs(difference.astype(np.int8)).max() <= 1
    shown = [cell("interpolate.png", 0, place) for place in range(6)]
    assert len({image.tobytes() for image in shown}) == 6


def test_traverse_moves_one_dimension_in_each_row_the_most_informative_first(folder, checkpoint):
    main(["traverse", "a.png", "--steps", "3", "--checkpoint", str(checkpoint)])
    model, *_ = load_model(checkpoint)
    with seeded(), torch.no_grad():
        order = variation_per_dimension(model).argsort(descending=True).tolist()
        mean, _ = model.encoder(read_photograph(Path("a.png"), (16, 16)))
        assert sorted(order) == [0, 1, 2, 3]
        for row, dimension in enumerate(order):
            for column, value in enumerate((-3.0, 0.0, 3.0)):
                z = mean.clone()
                z[0, dimension] = value
                expected = to_pixels(model.decoder(z)[0]).astype(int)
                shown = cell("traverse.png", row, column, left=80)
                assert np.abs(shown - expected).max() <= 1


def test_centre_crop_changes_what_the_model_sees(folder, checkpoint):
    options = ["--checkpoint", str(checkpoint)]
    main(["reconstruct", "b.jpg", *options, "--output", "squeezed.png"])
    main(["reconstruct", "b.jpg", *options, "--output", "cropped.png", "--centre-crop"])
    assert not np.array_equal(cell("squeezed.png", 0, 0), cell("cropped.png", 0, 0))


def test_pictures_of_a_model_with_batch_norm_and_another_size_are_drawn(folder):
    path = write_checkpoint(folder / "run" / "checkpoint.pt", image_size=24, batch_norm=True)
    for command in COMMANDS:
        assert main([*arguments(command), "--checkpoint", str(path)]) is None


def test_the_newest_run_is_the_default_and_is_named(folder, capsys):
    runs = folder / "runs"
    for age, name in enumerate(("new", "old", "older")):
        path = write_checkpoint(runs / name / "checkpoint.pt", seed=age)
        os.utime(path, (1e9 - age, 1e9 - age))
    (runs / "empty").mkdir()
    main(["sample", "--log-dir", str(runs), "--output", "default.png"])
    assert f"newest run: {runs / 'new' / 'checkpoint.pt'}" in capsys.readouterr().err
    main(["sample", "--checkpoint", str(runs / "new" / "checkpoint.pt")])
    assert (folder / "default.png").read_bytes() == (folder / "sample.png").read_bytes()


def test_the_script_runs_from_any_folder(folder, checkpoint):
    script = Path(vae_inference.__file__)
    command = [sys.executable, script, "sample", "--checkpoint", checkpoint, "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("sample.png\n", "")
    assert (folder / "sample.png").is_file()


# What goes wrong


def fails(arguments: list[str], capsys, status: int = 2) -> str:
    """Run the command line, check that it fails as it should, and return its one line."""
    before = {path: path.stat().st_mtime_ns for path in Path.cwd().rglob("*")}
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == status
    assert {path: path.stat().st_mtime_ns for path in Path.cwd().rglob("*")} == before
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    program, _, message = captured.err.partition(": error: ")
    assert program.startswith(Path(sys.argv[0]).name) and message
    return captured.err


def broken_picture(kind: str) -> bytes:
    """Return a file that is no picture, or not a whole or a safe one."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8)
    if kind == "bomb":
        Image.new("1", (14_000, 14_000)).save(file, "PNG")
        return file.getvalue()
    Image.fromarray(noise).save(file, "JPEG")
    content = file.getvalue()
    return {"text": b"not a picture", "empty": b"", "truncated": content[: len(content) // 2]}[kind]


@pytest.mark.parametrize("kind", ["text", "empty", "truncated", "bomb"])
def test_a_file_that_is_no_picture_is_named(folder, checkpoint, capsys, kind):
    (folder / "broken.png").write_bytes(broken_picture(kind))
    options = ["--checkpoint", str(checkpoint)]
    line = fails(["similar", "a.png", "broken.png", *options], capsys)
    assert "broken.png cannot be read as a picture" in line


def test_a_missing_picture_is_named(folder, checkpoint, capsys):
    line = fails(["traverse", "missing.png", "--checkpoint", str(checkpoint)], capsys)
    assert "missing.png does not exist" in line


def test_a_folder_in_the_place_of_a_picture_is_named(folder, checkpoint, capsys):
    line = fails(["reconstruct", str(folder), "--checkpoint", str(checkpoint)], capsys)
    assert f"{folder} cannot be read as a picture" in line


class RunsCode:
    """Unpickled by someone careless, it makes a file."""

    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("kind", ["text", "empty", "truncated", "pickle", "foreign"])
def test_a_file_that_is_no_checkpoint_is_named(folder, checkpoint, capsys, kind):
    content = checkpoint.read_bytes()
    broken = folder / "broken.pt"
    contents = {"text": b"no", "empty": b"", "truncated": content[: len(content) // 2]}
    broken.write_bytes(contents.get(kind, pickle.dumps(RunsCode())))
    if kind == "foreign":
        torch.save({"state_dict": {}}, broken)
    assert str(broken) in fails(["sample", "--checkpoint", str(broken)], capsys)


def test_a_missing_checkpoint_is_named(folder, capsys):
    assert "none.pt does not exist" in fails(["sample", "--checkpoint", "none.pt"], capsys)


def test_a_folder_without_runs_is_named(folder, capsys):
    line = fails(["sample", "--log-dir", "nowhere"], capsys)
    assert "nowhere holds no run" in line
    assert "vae_training.py" in line


def test_a_model_of_grey_images_is_refused(folder, capsys):
    config = {"image_resolution": [8, 8], "image_channels": 1, "latent_size": 2}
    model = VAE((8, 8), 2, 1)
    config["batch_norm"] = False
    save_checkpoint({"model": model.state_dict(), "config": config}, folder / "grey.pt")
    assert "grey.pt is of a model" in fails(["explore", "--checkpoint", "grey.pt"], capsys)


@pytest.mark.parametrize(
    ("output", "named"), [("nowhere/flowers.png", "nowhere"), (".", "is not a file")]
)
def test_an_output_that_cannot_be_written_is_named(folder, checkpoint, capsys, output, named):
    line = fails(["sample", "--output", output, "--checkpoint", str(checkpoint)], capsys, status=1)
    assert str(folder) in line
    assert named in line


def test_neither_picture_nor_checkpoint_is_replaced_by_the_output(folder, checkpoint, capsys):
    for output in ("a.png", str(checkpoint)):
        options = ["--output", output, "--checkpoint", str(checkpoint)]
        assert f"{output} would be replaced" in fails(["similar", "a.png", *options], capsys)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["sample", "--count", "0"], "--count: 0 given, 1 to 1000 needed"),
        (["sample", "--count", "many"], "--count: many given"),
        (["sample", "--count", "1001"], "--count: 1001 given"),
        (["sample", "--seed", "-1"], "--seed: -1 given"),
        (["sample", "--device", "abacus"], "device abacus"),
        (["sample", "--device", "meta"], "device meta"),
        (["similar", "a.png", "--spread", "1.1"], "--spread: 1.1 given, 0 to 1 needed"),
        (["similar", "a.png", "--spread", "nan"], "--spread: nan given"),
        (["interpolate", "a.png"], "IMAGE"),
        (["interpolate", "a.png", "b.jpg", "--steps", "1"], "--steps: 1 given, 2 to 100 needed"),
        (["traverse", "a.png", "b.jpg"], "b.jpg"),
        (["similar"], "IMAGE"),
        (["paint"], "paint"),
        ([], "COMMAND"),
    ],
)
def test_a_wrong_command_line_is_told_in_one_line(folder, checkpoint, capsys, wrong, named):
    arguments = [*wrong, "--checkpoint", str(checkpoint)] if len(wrong) > 1 else wrong
    assert named in fails(arguments, capsys)
