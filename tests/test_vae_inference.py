import io
import os
import runpy
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import seeded, write_checkpoint, write_photograph
from PIL import Image
from torch import Tensor
from torch.distributions import MultivariateNormal
from torchvision.transforms import Compose, Resize, ToTensor

import vae_inference
from datasets.preprocessing import read_picture
from vae.latent import near, prior, variation_per_dimension
from vae.run import load_model
from vae.vae import VAE
from vae_inference import draw_grid, main

# One short command line for each command.
SAMPLE = "sample --count 3"
COMMANDS = ("similar a.png", SAMPLE, "interpolate a.png b.jpg", "traverse a.png", "explore")
CELL = 128
GAP = 4


def write_small(
    path: str | Path, seed: int = 0, shape: Any = ((16, 16), 4, 3), **more: Any
) -> Path:
    """Write the checkpoint of a small model."""
    with seeded(seed):
        return write_checkpoint(Path(path), VAE(*shape), **more)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_small(tmp_path_factory.mktemp("run") / "checkpoint.pt")


@pytest.fixture
def model(checkpoint) -> VAE:
    return load_model(checkpoint)[0].requires_grad_(False)


@pytest.fixture
def latents(checkpoint) -> MultivariateNormal:
    return load_model(checkpoint)[2]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with two photographs in it."""
    write_photograph(tmp_path / "a.png")
    write_photograph(tmp_path / "b.jpg", (31, 77), seed=1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# What a command draws.
Grid = namedtuple("Grid", "images columns captions rows")


@pytest.fixture
def draw(folder, checkpoint, monkeypatch) -> Callable[..., Grid]:
    """Does what a command line says, with the small model or another, and returns the grid."""
    grids = [None]

    def record(file, images, columns, captions=(), rows=()) -> None:
        grids.append(Grid(images.clone(), columns, list(captions), list(rows)))
        draw_grid(file, *grids[-1])

    def draw(line: str, path: str | Path = checkpoint) -> Grid:
        main([*line.split(), "--checkpoint", str(path)])
        return grids[-1]

    monkeypatch.setattr(vae_inference, "draw_grid", record)
    return draw


def photograph(name: str) -> Tensor:
    """Return a picture of the current folder as the small model needs it."""
    return Compose([Resize((16, 16)), ToTensor()])(read_picture(Path(name)))[None]


def png(*grid: Any) -> bytes:
    """Return what ``draw_grid`` writes."""
    file = io.BytesIO()
    draw_grid(file, *grid)
    return file.getvalue()


def read(*grid: Any) -> np.ndarray:
    """Return the pixels that ``draw_grid`` writes."""
    return np.asarray(Image.open(io.BytesIO(png(*grid))))


def place(column: int, row: int = 0, left: int = 0, top: int = 0) -> tuple[slice, slice]:
    """Return where a picture is in a grid."""
    y, x = top + GAP + row * (CELL + GAP), left + GAP + column * (CELL + GAP)
    return slice(y, y + CELL), slice(x, x + CELL)


def enlarged(image: Tensor) -> np.ndarray:
    """Return one of 16x16 as a grid shows it."""
    large = F.interpolate(image[None], scale_factor=8, mode="bicubic").clamp(0, 1)[0]
    return large.mul(255).round().byte().movedim(0, -1).numpy()


# The command line


@pytest.mark.parametrize("line", COMMANDS)
def test_each_command_writes_one_file_prints_its_path_and_repeats_exactly(
    folder, draw, capsys, line
):
    before = set(folder.iterdir())
    grid, command = draw(line), line.split()[0]
    name = f"{command}.{'html' if command == 'explore' else 'png'}"
    assert set(folder.iterdir()) - before == {folder / name}
    assert capsys.readouterr() == (f"{name}\n", "")
    assert grid is None or Path(name).read_bytes() == png(*grid)
    draw(f"{line} --output again")
    assert Path("again").read_bytes() == Path(name).read_bytes()


@pytest.mark.parametrize("channels", [1, 3])
def test_models_of_grey_or_colour_with_batch_norm_and_of_any_shape_draw(draw, channels):
    path = write_small("run/checkpoint.pt", shape=((24, 16), 4, channels, True))
    for line in COMMANDS:
        grid = draw(line, path)
        assert grid is None or grid.images.shape[1:] == (channels, 24, 16)


def test_the_callers_random_numbers_go_on_as_before(draw):
    before = torch.get_rng_state()
    draw(SAMPLE)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_script_runs_from_any_folder(folder, checkpoint, monkeypatch):
    words = [vae_inference.__file__, "explore", "--checkpoint", str(checkpoint)]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(words[0], run_name="__main__")
    assert (folder / "explore.html").is_file()


# What the commands draw


def test_similar_draws_picture_reconstruction_and_flowers_near_it(draw, model, latents):
    grid = draw("similar a.png b.jpg --count 3 --spread 0.6")
    expected = []
    with seeded():
        for x in map(photograph, ("a.png", "b.jpg")):
            mean, _ = model.encoder(x)
            z = near(mean, latents, 3, 0.6)
            expected += [x, model.decoder(torch.cat((mean, z)))]
    assert torch.equal(grid.images, torch.cat(expected))
    assert (grid.columns, grid.captions) == (5, ["picture", "reconstruction", "new flowers"])


@pytest.mark.parametrize("source", ["", "--from data", "--from prior"])
def test_sample_draws_from_where_the_pictures_are_or_from_the_prior(draw, model, latents, source):
    grid = draw(f"sample {source} --count 7 --seed 3")
    with seeded(3):
        z = (prior(model) if "prior" in source else latents).sample((7,))
    assert torch.equal(grid.images, model.decoder(z))


def test_similar_draws_8_flowers_and_sample_50_twice_as_wide_as_high(draw):
    assert len(draw("similar a.png").images.unique(dim=0)) == 1 + 1 + 8
    for line, count, columns in [("sample", 50, 10), ("sample --count 8", 8, 4)]:
        grid = draw(line)
        assert (len(grid.images.unique(dim=0)), grid.columns) == (count, columns)


def test_interpolate_draws_the_way_between_two_reconstructions_and_the_pictures(draw, model):
    grid = draw("interpolate a.png b.jpg --steps 5")
    a, b = map(photograph, ("a.png", "b.jpg"))
    start, end = model.encoder(a)[0], model.encoder(b)[0]
    z = torch.cat([start + share * (end - start) for share in (0, 0.25, 0.5, 0.75, 1)])
    assert torch.allclose(grid.images, torch.cat((a, model.decoder(z), b)), atol=1e-6)
    assert grid.captions == ["from", "reconstruction", "", "", "", "reconstruction", "to"]
    assert grid.columns == 7


def test_traverse_moves_one_dimension_in_each_row_the_largest_share_first(draw, model, latents):
    grid = draw("traverse a.png --steps 5")
    with seeded():
        shares = variation_per_dimension(model, latents)
    order = shares.argsort(descending=True)
    mean, _ = model.encoder(photograph("a.png"))
    for dimension, row in zip(order, grid.images.unflatten(0, (4, 6)), strict=True):
        assert torch.allclose(row[0], model.decoder(mean)[0], atol=1e-6)
        for image, step in zip(row[1:], (-3.0, -1.5, 0.0, 1.5, 3.0), strict=True):
            z = mean.clone()
            z[0, dimension] = latents.mean[dimension] + step * latents.stddev[dimension]
            assert torch.allclose(image, model.decoder(z)[0], atol=1e-6)
    own = (mean[0] - latents.mean) / latents.stddev
    assert grid.rows == [f"z{i} ({shares[i]:.0%})\nis {own[i]:.2f} sd" for i in order]
    assert grid.captions == ["reconstruction", "-3 sd", "-1.5 sd", "0 sd", "1.5 sd", "3 sd"]
    assert grid.columns == 6


@pytest.mark.parametrize("shape", [(16, 16), (24, 16)])
def test_crop_takes_the_middle_in_the_models_shape_and_squeezes_nothing(draw, shape):
    path, (height, width) = write_small("run.pt", shape=(shape, 4, 3)), shape
    image = Image.new("RGB", (4 * width, 2 * height), "blue")
    image.paste("red", (width, 0, 3 * width, 2 * height))
    image.save("a.png")
    red = torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, *shape)
    cropped = draw("similar a.png --crop", path).images[0]
    assert torch.allclose(cropped, red, atol=0.15)  # the edges are blurred
    trained_so = write_small("cropped.pt", shape=(shape, 4, 3), crop=True)
    assert torch.equal(draw("similar a.png", trained_so).images[0], cropped)
    squeezed = draw("similar a.png", path).images[0]
    assert torch.equal(squeezed, Compose([Resize(shape), ToTensor()])(image))


def test_a_model_of_grey_pictures_sees_them_grey(draw):
    x = draw("similar a.png", write_small("grey.pt", shape=((16, 16), 4, 1))).images[0]
    grey = read_picture(Path("a.png")).convert("L")
    assert torch.equal(x, Compose([Resize((16, 16)), ToTensor()])(grey))


# The grid


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_shows_its_pictures_row_by_row_enlarged_smoothly_and_ends_white(channels):
    images = torch.rand(6, channels, 16, 16)
    pixels = read(images, 4)
    assert pixels.shape == (2 * (CELL + GAP) + GAP, 4 * (CELL + GAP) + GAP, 3)
    for i, image in enumerate(images):
        assert np.array_equal(pixels[place(i % 4, i // 4)], enlarged(image.expand(3, -1, -1)))
    assert all((pixels[place(column, 1)] == 255).all() for column in (2, 3))


@pytest.mark.parametrize(("size", "shown"), [((24, 40), (144, 240)), ((200, 160), (200, 160))])
def test_a_picture_is_enlarged_by_a_whole_number_to_128_pixels_or_more(size, shown):
    pixels = read(torch.rand(2, 3, *size), 1)
    assert pixels.shape == (2 * shown[0] + 3 * GAP, shown[1] + 2 * GAP, 3)


def test_captions_stand_above_their_columns_and_labels_to_the_left_of_their_rows():
    images = torch.rand(6, 3, 16, 16)
    for column, row in [(0, 0), (2, 1)]:
        captions, rows = ["", "", ""], ["", ""]
        captions[column], rows[row] = "flower", "z12 (100%)\nis -12.34"
        pixels = read(images, 3, captions, rows)
        dark = (pixels < 128).all(axis=-1)
        for i, image in enumerate(images):
            assert np.array_equal(pixels[place(i % 3, i // 3, 90, 20)], enlarged(image))
        lines, columns = place(column, row, 90, 20)
        _, x = np.nonzero(dark[:20])
        assert columns.start < x.min() < x.max() < columns.stop
        assert x.min() + x.max() == pytest.approx(columns.start + columns.stop, abs=8)
        y, x = np.nonzero(dark[20:, :90])
        assert lines.start < 20 + y.min() < 20 + y.max() < lines.stop
        assert y.min() + y.max() + 40 == pytest.approx(lines.start + lines.stop, abs=16)
        assert x.max() < 88


# Which model draws


def test_the_newest_run_is_the_default_and_is_named(draw, capsys):
    for age, name in enumerate(("new", "old", "older")):
        path = write_small(f"runs/{name}/checkpoint.pt", seed=age)
        os.utime(path, (1e9 - age, 1e9 - age))
    Path("runs", "empty").mkdir()
    newest = Path("runs", "new", "checkpoint.pt")
    main([*SAMPLE.split(), "--log-dir", "runs", "--output", "default.png"])
    assert capsys.readouterr() == ("default.png\n", f"drawn by the model in {newest} (auto)\n")
    draw(SAMPLE, newest)
    assert Path("default.png").read_bytes() == Path("sample.png").read_bytes()


def test_without_a_run_the_model_that_comes_with_the_repository_draws(folder, capsys, monkeypatch):
    monkeypatch.setattr(vae_inference, "RUNS", folder / "usual")
    monkeypatch.setattr(vae_inference, "TRAINED", write_small(folder / "trained.pt"))
    main([*SAMPLE.split(), "--log-dir", "usual"])
    assert capsys.readouterr().err == f"drawn by the model in {folder / 'trained.pt'} (auto)\n"
    write_small("usual/a/checkpoint.pt")
    main([*SAMPLE.split(), "--log-dir", "usual"])
    assert capsys.readouterr().err == "drawn by the model in usual/a/checkpoint.pt (auto)\n"
    line = fails("sample --log-dir nowhere", capsys)
    assert "nowhere has no checkpoint.pt of a run: train one, or give --checkpoint" in line


def test_of_a_run_that_has_not_ended_the_prior_stands_in_with_a_warning(draw, capsys):
    path = write_small("run.pt", fitted=False)
    grid = draw(SAMPLE, path)
    warning = capsys.readouterr().err
    assert warning == "warning: its run has not ended: drawn from the prior, so worse\n"
    assert torch.equal(grid.images, draw(f"{SAMPLE} --from prior", path).images)


# What goes wrong


def fails(line: str, capsys, status: int = 2) -> str:
    """Do what a command line says, check that it fails and changes no file; return its one line."""
    before = {path: path.stat().st_mtime_ns for path in Path.cwd().rglob("*")}
    with pytest.raises(SystemExit) as stopped:
        main(line.split())
    assert stopped.value.code == status
    assert {path: path.stat().st_mtime_ns for path in Path.cwd().rglob("*")} == before
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("similar a.png broken.png", "broken.png cannot be read as a picture"),
        ("similar none.png", "none.png cannot be read as a picture: [Errno 2] No such file"),
        ("sample --checkpoint broken.png", "broken.png is damaged"),
        ("sample --checkpoint none.pt", "none.pt is not a file: a checkpoint.pt of a run is ne"),
        ("sample --count 1001", "--count is 1001: 1 to 1000 is needed"),
        ("similar a.png --spread nan", "--spread is nan: 0 to 1 is needed"),
        ("interpolate a.png b.jpg --steps 1", "--steps is 1: 2 to 100 is needed"),
        ("similar", "the number of pictures is 0: 1 to 1000 is needed"),
        ("sample --device meta", "device meta is not available here"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(folder, checkpoint, capsys, line, message):
    Path("broken.png").write_text("neither picture nor checkpoint")
    model = "" if "--checkpoint" in line else f" --checkpoint {checkpoint}"
    assert message in fails(line + model, capsys)


def test_an_output_that_is_no_file_is_named(folder, checkpoint, capsys):
    line = f"sample --output {folder} --checkpoint {checkpoint}"
    assert f"{folder} is not a file" in fails(line, capsys, status=1)


def test_neither_picture_nor_checkpoint_is_replaced_by_the_output(folder, checkpoint, capsys):
    Path("link.png").symlink_to("a.png")
    for output in ("a.png", "link.png", str(checkpoint)):
        line = f"similar a.png --output {output} --checkpoint {checkpoint}"
        assert f"{output} would be replaced" in fails(line, capsys)


@pytest.mark.parametrize("command", [SAMPLE, "explore"])
def test_a_usual_name_is_replaced_only_if_it_was_written_here(draw, checkpoint, capsys, command):
    usual = Path("explore.html" if command == "explore" else "sample.png")
    draw(command)
    draw(command)
    usual.write_bytes(b"somebody's own")
    capsys.readouterr()
    line = fails(f"{command} --checkpoint {checkpoint}", capsys)
    assert f"{usual} is not this script's: name it with --output" in line
    draw(f"{command} --output {usual}")
    assert usual.read_bytes() != b"somebody's own"
