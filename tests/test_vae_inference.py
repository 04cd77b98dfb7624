import io
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.distributions import MultivariateNormal

import vae_inference
from datasets.pictures import Splits, load_splits
from datasets.preprocessing import decode_pictures, read_photograph
from vae.latent import fit_latents, near, prior, spherical_steps, variation_per_dimension
from vae.training import command_line
from vae.training.checkpoint import load_model, save_checkpoint, save_latents
from vae.training.options import Options
from vae.vae import VAE
from vae_inference import draw_grid, main

COMMANDS = ("similar", "sample", "reconstruct", "interpolate", "traverse", "explore")
CELL = 128
GAP = 4


def write_checkpoint(
    path: Path, seed: int = 0, fitted: bool = True, **options: int | str | bool
) -> Path:
    """Write the checkpoint of a freshly initialised small model, as training leaves it."""
    options = Options(**{"image_size": 16, "latent_size": 4} | options)
    size = [options.image_size, options.image_size]
    config = asdict(options) | {"image_resolution": size, "image_channels": 3}
    with seeded(seed):
        model = VAE(tuple(size), options.latent_size, 3, options.batch_norm)
        root = torch.randn(2 * [options.latent_size])
    # Untrained encoders and decoders give nearly the same whatever they are given.
    for layer in (model.encoder.fcm, model.decoder.fc):
        layer.weight.data *= 20
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint({"model": model.state_dict(), "config": config}, path)
    if fitted:
        mean = torch.linspace(-1, 1, options.latent_size)
        save_latents(MultivariateNormal(mean, root @ root.T + 0.1 * torch.eye(len(root))), path)
    return path


def write_photograph(path: Path, size: tuple[int, int] = (50, 40), seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "checkpoint.pt")


@pytest.fixture
def model(checkpoint) -> VAE:
    """The checkpoint's model."""
    return load_model(checkpoint)[0].requires_grad_(False)


@pytest.fixture
def latents(checkpoint) -> MultivariateNormal:
    """The checkpoint's latents."""
    return load_model(checkpoint)[2]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with two photographs in it."""
    write_photograph(tmp_path / "a.png")
    write_photograph(tmp_path / "b.jpg", (31, 77), seed=1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def arguments(command: str) -> list[str]:
    """Return a short command line that is complete but for the model."""
    needed = {"sample": ["--count", "4"], "explore": [], "interpolate": ["a.png", "b.jpg"]}
    return [command, *needed.get(command, ["a.png"])]


class Grid(NamedTuple):
    """What a command draws."""

    images: Tensor
    columns: int
    captions: list[str]
    rows: list[str]
    marks: list[float]


@pytest.fixture
def grids(monkeypatch) -> list[Grid]:
    """All grids that were drawn, in order."""
    drawn = []

    def record(images, columns, captions=(), rows=(), marks=()) -> bytes:
        drawn.append(Grid(images.clone(), columns, list(captions), list(rows), list(marks)))
        return draw_grid(images, columns, captions, rows, marks)

    monkeypatch.setattr(vae_inference, "draw_grid", record)
    return drawn


def photograph(name: str) -> Tensor:
    """Return a picture of the current folder as the small model needs it."""
    return read_photograph(Path(name), (16, 16))


def place(column: int, row: int = 0, left: int = 0, top: int = 0) -> tuple[slice, slice]:
    """Return where a picture is in a grid."""
    y, x = top + GAP + row * (CELL + GAP), left + GAP + column * (CELL + GAP)
    return slice(y, y + CELL), slice(x, x + CELL)


def enlarged(image: Tensor) -> np.ndarray:
    """Return one of 16x16 as a grid shows it."""
    return to_pixels(F.interpolate(image[None], scale_factor=8, mode="bicubic").clamp(0, 1)[0])


def to_pixels(image: Tensor) -> np.ndarray:
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
    expected = torch.from_numpy(decode_pictures([path], (16, 24))[0]).movedim(-1, 0) / 255
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


def test_a_crop_has_the_shape_of_a_model_that_is_not_square_and_squeezes_nothing(tmp_path):
    image = Image.new("RGB", (48, 48), "blue")
    image.paste("red", (0, 8, 48, 40))  # the middle, three wide for two high
    image.save(tmp_path / "a.png")
    cropped = read_photograph(tmp_path / "a.png", (16, 24), centre_crop=True)
    assert cropped.shape == (1, 3, 16, 24)
    red = torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 14, 24)
    assert torch.equal(cropped[0, :, 1:-1], red)


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


def test_pictures_of_a_model_with_batch_norm_and_another_size_are_drawn(folder):
    path = write_checkpoint(folder / "run" / "checkpoint.pt", image_size=24, batch_norm=True)
    for command in COMMANDS:
        assert main([*arguments(command), "--checkpoint", str(path)]) is None


def test_an_output_that_is_a_link_is_written_through(folder, checkpoint):
    (folder / "elsewhere").mkdir()
    for target in ("new.png", "old.png"):
        (folder / "elsewhere" / "old.png").write_text("old")
        (folder / "link.png").unlink(missing_ok=True)
        (folder / "link.png").symlink_to(folder / "elsewhere" / target)
        main([*arguments("sample"), "--output", "link.png", "--checkpoint", str(checkpoint)])
        assert (folder / "link.png").is_symlink()
        assert Image.open(folder / "elsewhere" / target).format == "PNG"


def test_the_script_runs_from_any_folder(folder, checkpoint):
    script = Path(vae_inference.__file__)
    command = [sys.executable, script, "sample", "--checkpoint", checkpoint, "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("sample.png\n", "")
    assert (folder / "sample.png").is_file()


# What the commands draw


def test_similar_draws_picture_reconstruction_and_flowers_near_it(
    folder, checkpoint, model, latents, grids
):
    options = ["--count", "3", "--spread", "0.6", "--checkpoint", str(checkpoint)]
    main(["similar", "a.png", "b.jpg", *options])
    expected = []
    with seeded():
        for x in map(photograph, ("a.png", "b.jpg")):
            mean, _ = model.encoder(x)
            z = near(mean, latents, 3, 0.6)
            expected += [x, model.decoder(torch.cat((mean, z)))]
    assert torch.equal(grids[0].images, torch.cat(expected))
    assert grids[0].columns == 5
    assert grids[0].captions == ["picture", "reconstruction", "new flowers"]


def test_similar_draws_eight_flowers_at_spread_0_3_if_nothing_else_is_said(
    folder, checkpoint, grids
):
    for options in ([], ["--count", "8", "--spread", "0.3"]):
        main(["similar", "a.png", *options, "--checkpoint", str(checkpoint)])
    assert torch.equal(grids[0].images, grids[1].images)
    assert len(grids[0].images.unique(dim=0)) == 10


def test_similar_at_spread_0_repeats_the_reconstruction(folder, checkpoint, grids):
    options = ["--spread", "0", "--count", "2", "--checkpoint", str(checkpoint)]
    main(["similar", "a.png", *options])
    _, reconstruction, *flowers = grids[0].images
    assert all(torch.equal(flower, reconstruction) for flower in flowers)


def test_similar_at_spread_1_draws_the_flowers_of_sample(folder, checkpoint, grids):
    options = ["--count", "5", "--checkpoint", str(checkpoint)]
    main(["similar", "a.png", "--spread", "1", *options])
    main(["sample", *options])
    assert torch.allclose(grids[0].images[2:], grids[1].images, atol=1e-6)


@pytest.mark.parametrize("source", [[], ["--from", "data"]])
def test_sample_draws_from_where_the_training_pictures_are(
    folder, checkpoint, model, latents, grids, source
):
    main(["sample", *source, "--count", "7", "--seed", "3", "--checkpoint", str(checkpoint)])
    with seeded(3):
        assert torch.equal(grids[0].images, model.decoder(latents.sample((7,))))


def test_sample_draws_from_the_prior_if_told_to(folder, checkpoint, model, grids):
    options = ["--count", "7", "--seed", "3", "--checkpoint", str(checkpoint)]
    main(["sample", "--from", "prior", *options])
    with seeded(3):
        assert torch.equal(grids[0].images, model.decoder(prior(model).sample((7,))))


@pytest.mark.parametrize(("count", "columns"), [(1, 2), (8, 4), (50, 10)])
def test_sample_arranges_its_flowers_in_a_rectangle_twice_as_wide_as_high(
    folder, checkpoint, grids, count, columns
):
    main(["sample", "--count", str(count), "--checkpoint", str(checkpoint)])
    assert (len(grids[0].images), grids[0].columns) == (count, columns)


def test_sample_draws_64_flowers_if_nothing_else_is_said(folder, checkpoint, grids):
    main(["sample", "--checkpoint", str(checkpoint)])
    assert len(grids[0].images.unique(dim=0)) == 50


def test_reconstruct_draws_pairs(folder, checkpoint, model, grids):
    main(["reconstruct", "a.png", "b.jpg", "--checkpoint", str(checkpoint)])
    a, b = map(photograph, ("a.png", "b.jpg"))
    expected = torch.cat((a, model.reconstruct(a), b, model.reconstruct(b)))
    assert torch.allclose(grids[0].images, expected, atol=1e-6)
    assert grids[0].columns == 2
    assert grids[0].captions == ["picture", "reconstruction"]


def test_interpolate_draws_the_arc_between_two_reconstructions_between_the_two_pictures(
    folder, checkpoint, model, grids
):
    main(["interpolate", "a.png", "b.jpg", "--steps", "4", "--checkpoint", str(checkpoint)])
    a, b = map(photograph, ("a.png", "b.jpg"))
    z = spherical_steps(model.encoder(a)[0], model.encoder(b)[0], 4)
    assert torch.equal(grids[0].images, torch.cat((a, model.decoder(z), b)))
    assert torch.allclose(grids[0].images[1], model.reconstruct(a)[0], atol=1e-5)
    assert torch.allclose(grids[0].images[-2], model.reconstruct(b)[0], atol=1e-5)
    assert len(grids[0].images.unique(dim=0)) == 6


@pytest.mark.parametrize("steps", [2, 3, 8])
def test_interpolate_captions_the_pictures_and_their_reconstructions(
    folder, checkpoint, grids, steps
):
    options = ["--steps", str(steps), "--checkpoint", str(checkpoint)]
    main(["interpolate", "a.png", "b.jpg", *options])
    first, second, *between, before, last = grids[0].captions
    assert (first, second, before, last) == ("from", "reconstruction", "reconstruction", "to")
    assert between == [""] * (steps - 2)
    assert grids[0].columns == len(grids[0].images) == steps + 2


def test_traverse_moves_one_dimension_in_each_row_after_the_reconstruction(
    folder, checkpoint, model, latents, grids
):
    main(["traverse", "a.png", "--steps", "5", "--checkpoint", str(checkpoint)])
    with seeded():
        order = variation_per_dimension(model, latents).argsort(descending=True)
    mean, _ = model.encoder(photograph("a.png"))
    assert grids[0].columns == 6
    for dimension, row in zip(order, grids[0].images.unflatten(0, (4, 6)), strict=True):
        assert torch.allclose(row[0], model.decoder(mean)[0], atol=1e-6)
        for image, step in zip(row[1:], (-3.0, -1.5, 0.0, 1.5, 3.0), strict=True):
            z = mean.clone()
            z[0, dimension] = latents.mean[dimension] + step * latents.stddev[dimension]
            assert torch.allclose(image, model.decoder(z)[0], atol=1e-6)


def test_traverse_captions_the_columns_with_their_standard_deviations(folder, checkpoint, grids):
    main(["traverse", "a.png", "--steps", "5", "--checkpoint", str(checkpoint)])
    assert grids[0].captions == ["reconstruction", "-3 sd", "-1.5 sd", "0 sd", "1.5 sd", "3 sd"]


def test_traverse_labels_its_rows_with_share_and_own_value_the_largest_share_first(
    folder, checkpoint, model, latents, grids
):
    main(["traverse", "a.png", "--checkpoint", str(checkpoint)])
    with seeded():
        shares = variation_per_dimension(model, latents)
    own = (model.encoder(photograph("a.png"))[0][0] - latents.mean) / latents.stddev
    labels = [f"z{i} ({shares[i]:.0%})\nis {own[i]:.2f} sd" for i in range(4)]
    assert len({label.split()[-2] for label in labels}) == 4
    assert grids[0].rows == [labels[i] for i in shares.argsort(descending=True)]


def test_traverse_marks_the_pictures_own_value_between_the_columns(folder, checkpoint, grids):
    model, config, _ = load_model(checkpoint)
    model.encoder.fcm.weight.data.zero_()
    model.encoder.fcm.bias.data = torch.tensor([-5.0, 1.0, 3.0, 17.0])
    save_checkpoint({"model": model.state_dict(), "config": config}, folder / "known.pt")
    save_latents(MultivariateNormal(torch.ones(4), 4 * torch.eye(4)), folder / "known.pt")
    main(["traverse", "a.png", "--steps", "7", "--checkpoint", "known.pt"])
    # In standard deviations -3, 0, 1 and 8. The first column's middle is 0.5, that of -3 is 1.5,
    # and that of 3, 7.5.
    expected = {"z0": 1.5, "z1": 4.5, "z2": 5.5, "z3": 7.5}
    marks = {row[:2]: mark for row, mark in zip(grids[0].rows, grids[0].marks, strict=True)}
    assert marks == pytest.approx(expected)


def test_centre_crop_changes_what_the_model_sees(folder, checkpoint, grids):
    main(["reconstruct", "b.jpg", "--centre-crop", "--checkpoint", str(checkpoint)])
    expected = read_photograph(folder / "b.jpg", (16, 16), centre_crop=True)
    assert torch.equal(grids[0].images[:1], expected)
    assert not torch.equal(expected, photograph("b.jpg"))


# The grid


@pytest.fixture
def noise() -> Tensor:
    """Six pictures."""
    with seeded():
        return torch.rand(6, 3, 16, 16)


def read(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_a_grid_shows_its_pictures_row_by_row_enlarged_smoothly(noise):
    pixels = read(draw_grid(noise, 3))
    assert pixels.shape == (2 * (CELL + GAP) + GAP, 3 * (CELL + GAP) + GAP, 3)
    for i, image in enumerate(noise):
        assert np.array_equal(pixels[place(i % 3, i // 3)], enlarged(image))


def test_what_is_left_of_the_last_row_is_white(noise):
    pixels = read(draw_grid(noise, 4))
    assert (pixels[place(2, 1)] == 255).all()
    assert (pixels[place(3, 1)] == 255).all()


@pytest.mark.parametrize(
    ("size", "shown"), [((8, 8), (128, 128)), ((24, 40), (144, 240)), ((200, 160), (200, 160))]
)
def test_a_picture_is_enlarged_by_a_whole_number_to_128_pixels_or_more(size, shown):
    pixels = read(draw_grid(torch.rand(2, 3, *size), 1))
    assert pixels.shape == (2 * shown[0] + 3 * GAP, shown[1] + 2 * GAP, 3)


def dark(pixels: np.ndarray) -> np.ndarray:
    return (pixels < 128).all(axis=-1)


@pytest.mark.parametrize("column", [0, 1, 2])
def test_a_caption_stands_above_the_middle_of_its_column(noise, column):
    captions = ["", "", ""]
    captions[column] = "flower"
    pixels = read(draw_grid(noise, 3, captions))
    _, x = np.nonzero(dark(pixels[:20]))
    _, columns = place(column)
    assert columns.start < x.min() < x.max() < columns.stop
    assert (x.min() + x.max()) / 2 == pytest.approx((columns.start + columns.stop) / 2, abs=4)
    assert np.array_equal(pixels[place(column, 1, top=20)], enlarged(noise[3 + column]))


@pytest.mark.parametrize("row", [0, 1])
def test_a_row_is_labelled_to_its_left(noise, row):
    rows = ["", ""]
    rows[row] = "z12 (100%)\nis -12.34"
    pixels = read(draw_grid(noise, 3, (), rows))
    y, x = np.nonzero(dark(pixels[:, :90]))
    lines, _ = place(0, row)
    assert lines.start < y.min() < y.max() < lines.stop
    assert (y.min() + y.max()) / 2 == pytest.approx((lines.start + lines.stop) / 2, abs=8)
    assert x.max() < 88
    assert np.array_equal(pixels[place(2, row, left=90)], enlarged(noise[3 * row + 2]))


@pytest.mark.parametrize("mark", [0.5, 1.5, 2.25])
def test_a_mark_is_a_triangle_at_the_lower_edge_of_its_row(mark):
    pixels = read(draw_grid(torch.zeros(6, 3, 16, 16), 3, (), ["", ""], [1.0, mark])).astype(int)
    pixels = pixels[(CELL + GAP) + GAP :]
    y, x = np.nonzero(pixels[..., 0] - pixels[..., 1] > 100)
    widths = np.bincount(y)[y.min() :]
    assert x.mean() == pytest.approx(90 + 2 + mark * (CELL + GAP), abs=0.51)
    assert widths[0] <= 2 < 12 <= widths[-1]
    assert CELL - 16 < y.min() < y.max() < CELL + GAP


@pytest.mark.parametrize("command", [each for each in COMMANDS if each != "explore"])
def test_the_file_is_the_grid(folder, checkpoint, grids, command):
    main([*arguments(command), "--checkpoint", str(checkpoint)])
    assert (folder / f"{command}.png").read_bytes() == draw_grid(*grids[0])


# Which model draws


def test_the_newest_run_is_the_default_and_is_named(folder, capsys):
    for age, name in enumerate(("new", "old", "older")):
        path = write_checkpoint(folder / "runs" / name / "checkpoint.pt", seed=age)
        os.utime(path, (1e9 - age, 1e9 - age))
    (folder / "runs" / "empty").mkdir()
    newest = Path("runs", "new", "checkpoint.pt")
    main([*arguments("sample"), "--log-dir", "runs", "--output", "default.png"])
    assert capsys.readouterr() == ("default.png\n", f"drawn by the model in {newest} (auto)\n")
    main([*arguments("sample"), "--checkpoint", str(newest)])
    assert (folder / "default.png").read_bytes() == (folder / "sample.png").read_bytes()


@pytest.fixture
def runs(folder, monkeypatch) -> Path:
    """The usual folder of all runs, which is not there yet."""
    for module in (vae_inference, command_line):
        monkeypatch.setattr(module, "RUNS", folder / "usual")
    return folder / "usual"


@pytest.fixture
def trained(folder, monkeypatch) -> Path:
    """The model that comes with the repository."""
    monkeypatch.setattr(vae_inference, "TRAINED", folder / "trained.pt")
    return write_checkpoint(folder / "trained.pt", seed=1)


def test_without_a_run_the_model_that_comes_with_the_repository_draws(runs, trained, capsys):
    main([*arguments("sample"), "--output", "default.png"])
    assert capsys.readouterr().err == f"drawn by the model in {trained} (auto)\n"
    main([*arguments("sample"), "--checkpoint", str(trained)])
    assert Path("default.png").read_bytes() == Path("sample.png").read_bytes()


def test_a_run_comes_before_the_model_that_comes_with_the_repository(runs, trained, capsys):
    run = write_checkpoint(runs / "a" / "checkpoint.pt")
    main(arguments("sample"))
    assert capsys.readouterr().err == f"drawn by the model in {run} (auto)\n"


def test_a_folder_without_runs_that_was_asked_for_is_refused(runs, trained, capsys):
    line = fails(["sample", "--log-dir", "nowhere"], capsys)
    assert "nowhere holds no run" in line
    assert "vae_training.py" in line


def test_with_neither_a_run_nor_the_repositorys_model_a_checkpoint_is_asked_for(
    runs, trained, capsys
):
    trained.unlink()
    line = fails(["sample"], capsys)
    assert f"{trained} does not exist: a checkpoint.pt of a run is needed" in line


# A checkpoint without latents: its run has not ended


def test_latents_are_refitted_to_the_synthetic_flowers(folder, splits, monkeypatch, grids, capsys):
    def load(dataset: str, _: Path, size: tuple[int, int]) -> Splits:
        assert (dataset, size) == ("synthetic", (8, 8))
        return splits

    monkeypatch.setattr(vae_inference, "load_splits", load)
    options = {"fitted": False, "dataset": "synthetic", "image_size": 8}
    path = write_checkpoint(folder / "checkpoint.pt", **options)
    main(["sample", "--count", "5", "--checkpoint", str(path)])
    model, _, latents = load_model(path)
    assert latents is None
    with seeded(), torch.no_grad():
        z = fit_latents(model, splits.train.batches()).sample((5,))
        assert torch.equal(grids[0].images, model.decoder(z))
    assert capsys.readouterr() == ("sample.png\n", "")


def test_latents_are_refitted_to_flowers102_where_it_is_on_disk(folder, data_root, grids):
    options = {"fitted": False, "dataset": "flowers102", "data_root": str(data_root)}
    path = write_checkpoint(folder / "checkpoint.pt", **options)
    main(["sample", "--count", "5", "--checkpoint", str(path)])
    model, *_ = load_model(path)
    train = load_splits("flowers102", data_root, (16, 16)).train
    with seeded(), torch.no_grad():
        z = fit_latents(model, train.batches()).sample((5,))
        assert torch.equal(grids[0].images, model.decoder(z))


def test_without_the_pictures_the_prior_stands_in_with_a_warning(folder, grids, capsys):
    options = {"fitted": False, "dataset": "flowers102", "data_root": "nowhere"}
    path = write_checkpoint(folder / "checkpoint.pt", **options)
    for source in ("data", "prior"):
        main([*arguments("sample"), "--from", source, "--checkpoint", str(path)])
        line = capsys.readouterr().err
        assert line.startswith("warning: the checkpoint has no fitted latents")
        assert line.endswith("the prior stands in for them\n")
        assert line.count("\n") == 1
    assert torch.equal(grids[0].images, grids[1].images)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_warning_is_for_the_commands_that_need_the_fitted_latents(folder, capsys, command):
    options = {"fitted": False, "dataset": "flowers102", "data_root": "nowhere"}
    path = write_checkpoint(folder / "checkpoint.pt", **options)
    main([*arguments(command), "--checkpoint", str(path)])
    warned = "no fitted latents" in capsys.readouterr().err
    assert warned == (command not in ("reconstruct", "interpolate"))


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


def test_a_model_of_grey_images_is_refused(folder, capsys):
    config = {"image_resolution": [8, 8], "image_channels": 1, "latent_size": 2}
    model = VAE((8, 8), 2, 1)
    config["batch_norm"] = False
    save_checkpoint({"model": model.state_dict(), "config": config}, folder / "grey.pt")
    assert "grey.pt is of a model" in fails(["explore", "--checkpoint", "grey.pt"], capsys)


def test_an_output_in_a_folder_that_is_not_there_is_named(folder, checkpoint, capsys):
    options = ["--output", "nowhere/flowers.png", "--checkpoint", str(checkpoint)]
    assert str(folder / "nowhere") in fails([*arguments("sample"), *options], capsys, status=1)


@pytest.mark.parametrize("kind", ["folder", "fifo", "device"])
def test_an_output_that_is_not_a_file_is_not_replaced(folder, checkpoint, capsys, kind):
    controller, terminal = os.openpty()
    path = {"device": Path(os.ttyname(terminal))}.get(kind, folder / "flowers.png")
    {"folder": os.mkdir, "fifo": os.mkfifo}.get(kind, os.stat)(path)
    mode = path.stat().st_mode
    options = ["--output", str(path), "--checkpoint", str(checkpoint)]
    assert f"{path} is not a file" in fails([*arguments("sample"), *options], capsys, status=1)
    assert path.stat().st_mode == mode
    os.close(controller)
    os.close(terminal)


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
        (["sample", "--from", "nowhere"], "--from: invalid choice: 'nowhere'"),
        (["explore", "a.png", "b.jpg"], "b.jpg"),
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


# Files of others.


@pytest.mark.parametrize("command", ["sample", "explore"])
def test_a_file_of_the_usual_name_is_replaced_only_if_it_was_written_here(
    folder, checkpoint, capsys, command
):
    usual = Path("sample.png" if command == "sample" else "explore.html")
    main([command, "--checkpoint", str(checkpoint)])
    main([command, "--checkpoint", str(checkpoint)])
    usual.write_bytes(b"somebody's own")
    with pytest.raises(SystemExit) as stopped:
        main([command, "--checkpoint", str(checkpoint)])
    assert stopped.value.code == 2
    assert f"{usual} is not this script's: name it with --output" in capsys.readouterr().err
    assert usual.read_bytes() == b"somebody's own"
    main([command, "--checkpoint", str(checkpoint), "--output", str(usual)])
    assert usual.read_bytes() != b"somebody's own"
