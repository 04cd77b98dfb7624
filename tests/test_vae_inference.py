import io
import os
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, seeded, train_small, write_checkpoint, write_photograph
from PIL import Image
from torch import Tensor
from torch.distributions import MultivariateNormal
from torchvision.transforms import Compose, Resize, ToTensor

import vae_inference
import vae_training
from datasets.preprocessing import read_picture
from vae.checkpoint import load_model
from vae.latent import near, prior, variation_per_dimension
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
    return load_model(checkpoint).model.requires_grad_(False)


@pytest.fixture
def latents(checkpoint) -> MultivariateNormal:
    return load_model(checkpoint).latents


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with two photographs in it."""
    write_photograph(tmp_path / "a.png")
    write_photograph(tmp_path / "b.jpg", (31, 77), seed=1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(line: str, checkpoint: str | Path) -> None:
    """Do what a command line says, with this model."""
    main([*line.split(), "--checkpoint", str(checkpoint)])


def drawn_by(checkpoint: str | Path) -> str:
    """Return the line that says which model has drawn."""
    return f"drawn by the model in {checkpoint} (auto)\n"


@pytest.fixture
def draw(folder, checkpoint) -> Callable[..., np.ndarray]:
    """Does what a command line says, with the small model or another; returns what is drawn."""

    def draw(line: str, path: str | Path = checkpoint) -> np.ndarray:
        command(f"{line} --output drawn.png", path)
        return np.asarray(Image.open("drawn.png"))

    return draw


def photograph(name: str) -> Tensor:
    """Return a picture of the current folder as the small model needs it."""
    return Compose([Resize((16, 16)), ToTensor()])(read_picture(Path(name)))[None]


def read(*grid: Any) -> np.ndarray:
    """Return the pixels that ``draw_grid`` writes."""
    file = io.BytesIO()
    draw_grid(file, *grid)
    return np.asarray(Image.open(file))


def place(column: int, row: int = 0, left: int = 0, top: int = 0) -> tuple[slice, slice]:
    """Return where a picture is in a grid."""
    y, x = top + GAP + row * (CELL + GAP), left + GAP + column * (CELL + GAP)
    return slice(y, y + CELL), slice(x, x + CELL)


def cells(pixels: np.ndarray, left: int = 0, top: int = 0) -> np.ndarray:
    """Return all pictures in a grid, [rows, columns, height, width, 3]."""
    rows, columns = (
        (pixels.shape[0] - top) // (CELL + GAP),
        (pixels.shape[1] - left) // (CELL + GAP),
    )
    return np.stack([[pixels[place(x, y, left, top)] for x in range(columns)] for y in range(rows)])


def enlarged(image: Tensor) -> np.ndarray:
    """Return one with a shorter side of 16 as a grid shows it."""
    large = F.interpolate(image[None], scale_factor=8, mode="bicubic").clamp(0, 1)[0]
    return large.mul(255).round().byte().movedim(0, -1).numpy()


def assert_shows(pixels: np.ndarray, *grid: Any) -> None:
    """A file shows this grid, with its texts; a value may be rounded the other way."""
    expected = read(*grid)
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).max() <= 1


def assert_drawn_from(pictures: np.ndarray, images: Tensor) -> None:
    """Pictures, [n, height, width, 3], vary as the images do, as far as chance tells."""
    # Every sixteenth pixel: neighbours are nearly the same.
    one = pictures[:, ::16, ::16].astype(float)
    other = np.stack([enlarged(image)[::16, ::16] for image in images]).astype(float)
    error = np.sqrt(one.var(axis=0) / len(one) + other.var(axis=0) / len(other))
    assert (np.abs(one.mean(axis=0) - other.mean(axis=0)) < 6 * error + 0.5).all()
    assert one.var(axis=0).sum() == pytest.approx(other.var(axis=0).sum(), rel=0.5)


# The command line


@pytest.mark.parametrize("line", COMMANDS)
def test_each_command_writes_one_file_and_prints_its_path_and_its_model(
    folder, checkpoint, capsys, line
):
    before = set(folder.iterdir())
    command(line, checkpoint)
    name = f"{line.split()[0]}.{'html' if line == 'explore' else 'png'}"
    assert set(folder.iterdir()) - before == {folder / name}
    assert capsys.readouterr() == (f"{name}\n", drawn_by(checkpoint))


@pytest.mark.parametrize("line", COMMANDS)
def test_each_command_repeats_exactly(folder, checkpoint, line):
    command(f"{line} --output once", checkpoint)
    command(f"{line} --output again", checkpoint)
    assert Path("again").read_bytes() == Path("once").read_bytes()


@pytest.mark.parametrize("line", [SAMPLE, "similar a.png", "explore"])
def test_another_seed_draws_other_flowers(folder, checkpoint, line):
    command(f"{line} --output once", checkpoint)
    command(f"{line} --seed 1 --output other", checkpoint)
    assert Path("other").read_bytes() != Path("once").read_bytes()


@pytest.mark.parametrize("line", COMMANDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_model_of_grey_or_colour_with_batch_norm_and_of_any_shape_draws(folder, channels, line):
    path = write_small("run/checkpoint.pt", shape=((24, 16), 4, channels, True))
    command(f"{line} --output drawn", path)
    if line != "explore":
        pixels = np.asarray(Image.open("drawn"))
        above, on_the_left = pixels.shape[0] % (192 + GAP), pixels.shape[1] % (128 + GAP)
        text = {"similar": (20, 0), "sample": (0, 0), "interpolate": (20, 0), "traverse": (20, 90)}
        assert (above - GAP, on_the_left - GAP) == text[line.split()[0]]
        assert (pixels == pixels[..., :1]).all() == (channels == 1)


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


def test_similar_draws_each_picture_its_reconstruction_and_new_flowers(draw, model):
    # With a spread of 0 each new flower is the reconstruction.
    rows = []
    for x in (photograph("a.png"), photograph("b.jpg")):
        reconstruction = model.decoder(model.encoder(x)[0])
        rows += [x, *[reconstruction] * 4]
    captions = ["picture", "reconstruction", "new flowers"]
    pixels = draw("similar a.png b.jpg --count 3 --spread 0")
    assert_shows(pixels, torch.cat(rows), 5, captions)


@pytest.mark.parametrize("spread", [0.3, 0.9])
def test_similars_flowers_lie_around_the_picture_as_far_as_the_spread_says(
    draw, model, latents, spread
):
    ((_, _, *flowers),) = cells(draw(f"similar a.png --count 60 --spread {spread}"), top=20)
    mean, _ = model.encoder(photograph("a.png"))
    with seeded(1):
        expected = model.decoder(near(mean, latents, 300, spread))
    assert_drawn_from(np.stack(flowers), expected)


@pytest.mark.parametrize("source", ["data", "prior"])
def test_sample_draws_from_where_the_pictures_are_or_from_the_prior(draw, model, latents, source):
    flowers = np.concatenate(cells(draw(f"sample --from {source} --count 60"))[:5])
    distribution = {"data": latents, "prior": prior(model)}[source]
    with seeded(1):
        expected = model.decoder(distribution.sample((300,)))
    assert_drawn_from(flowers, expected)


def test_sample_draws_from_where_the_pictures_are_unless_told_otherwise(draw):
    assert np.array_equal(draw(SAMPLE), draw(f"{SAMPLE} --from data"))


def test_similar_draws_8_flowers_unless_told_otherwise(draw):
    (row,) = cells(draw("similar a.png"), top=20)
    assert len({picture.tobytes() for picture in row}) == 1 + 1 + 8


@pytest.mark.parametrize(
    ("line", "rows", "columns"), [("sample", 5, 10), ("sample --count 8", 2, 4)]
)
def test_sample_draws_50_or_as_many_as_asked_for_twice_as_wide_as_high(draw, line, rows, columns):
    flowers = cells(draw(line))
    assert flowers.shape[:2] == (rows, columns)
    assert len({picture.tobytes() for row in flowers for picture in row}) == rows * columns


def test_interpolate_draws_the_way_between_two_reconstructions_and_the_pictures(draw, model):
    a, b = photograph("a.png"), photograph("b.jpg")
    start, end = model.encoder(a)[0], model.encoder(b)[0]
    z = torch.cat([start + share * (end - start) for share in (0, 0.25, 0.5, 0.75, 1)])
    captions = ["from", "reconstruction", "", "", "", "reconstruction", "to"]
    pixels = draw("interpolate a.png b.jpg --steps 5")
    assert_shows(pixels, torch.cat((a, model.decoder(z), b)), 7, captions)


def test_traverse_moves_one_dimension_in_each_row_the_largest_share_first(draw, model, latents):
    with seeded():  # as --seed says, which is 0
        shares = variation_per_dimension(model, latents)
    x = photograph("a.png")
    mean, _ = model.encoder(x)
    own = (mean[0] - latents.mean) / latents.stddev
    images, names = [], []
    for i in shares.argsort(descending=True):
        names.append(f"z{i} ({shares[i]:.0%})\nis {own[i]:.2f} sd")
        images += [x, model.decoder(mean)]
        for step in (-3.0, -1.5, 0.0, 1.5, 3.0):
            z = mean.clone()
            z[0, i] = latents.mean[i] + step * latents.stddev[i]
            images.append(model.decoder(z))
    captions = ["picture", "reconstruction", "-3 sd", "-1.5 sd", "0 sd", "1.5 sd", "3 sd"]
    pixels = draw("traverse a.png --steps 5")
    assert_shows(pixels, torch.cat(images), 7, captions, names)


# What the model sees


def seen(pixels: np.ndarray, shape: tuple[int, int] = (16, 16)) -> np.ndarray:
    """Return what ``similar`` shows first: the picture as the model has it."""
    height, width = (8 * side for side in shape)
    return pixels[20 + GAP : 20 + GAP + height, GAP : GAP + width]


@pytest.fixture(params=[(16, 16), (24, 16)])
def shape(request, folder) -> tuple[int, int]:
    """A model's shape, and a photograph in the current folder whose middle of that shape is red."""
    height, width = request.param
    image = Image.new("RGB", (4 * width, 2 * height), "blue")
    image.paste("red", (width, 0, 3 * width, 2 * height))
    image.save("red.png")
    return request.param


def test_crop_takes_the_middle_in_the_models_shape(draw, shape):
    path = write_small("run.pt", shape=(shape, 4, 3))
    cropped = seen(draw("similar red.png --crop", path), shape)
    assert np.abs(cropped - np.array([255.0, 0, 0])).max() < 0.15 * 255  # the edges are blurred


def test_a_model_that_was_trained_with_crop_crops_by_itself(draw, shape):
    cropped = draw("similar red.png --crop", write_small("run.pt", shape=(shape, 4, 3)))
    trained_so = write_small("cropped.pt", shape=(shape, 4, 3), crop=True)
    assert np.array_equal(draw("similar red.png", trained_so), cropped)


def test_without_crop_the_whole_picture_is_squeezed_into_the_models_shape(draw, shape):
    path = write_small("run.pt", shape=(shape, 4, 3))
    squeezed = Compose([Resize(shape), ToTensor()])(read_picture(Path("red.png")))
    assert np.array_equal(seen(draw("similar red.png", path), shape), enlarged(squeezed))


def test_a_model_of_grey_pictures_sees_them_grey(draw):
    pixels = draw("similar a.png", write_small("grey.pt", shape=((16, 16), 4, 1)))
    grey = Compose([Resize((16, 16)), ToTensor()])(read_picture(Path("a.png")).convert("L"))
    assert np.array_equal(seen(pixels), enlarged(grey.expand(3, -1, -1)))


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


def test_captions_and_labels_leave_the_pictures_as_they_are():
    images = torch.rand(6, 3, 16, 16)
    pixels = cells(read(images, 3, ["a", "b", "c"], ["first", "second"]), left=90, top=20)
    for i, image in enumerate(images):
        assert np.array_equal(pixels[i // 3, i % 3], enlarged(image))


@pytest.mark.parametrize("column", [0, 2])
def test_a_caption_stands_above_the_middle_of_its_column(column):
    captions = ["", "", ""]
    captions[column] = "flower"
    pixels = read(torch.rand(6, 3, 16, 16), 3, captions)
    _, x = np.nonzero((pixels[:20] < 128).all(axis=-1))
    _, columns = place(column)
    assert columns.start < x.min() < x.max() < columns.stop
    assert x.min() + x.max() == pytest.approx(columns.start + columns.stop, abs=8)


@pytest.mark.parametrize("row", [0, 1])
def test_a_label_stands_to_the_left_of_the_middle_of_its_row(row):
    labels = ["", ""]
    labels[row] = "z12 (100%)\nis -12.34"
    pixels = read(torch.rand(6, 3, 16, 16), 3, [], labels)
    y, x = np.nonzero((pixels[:, :90] < 128).all(axis=-1))
    lines, _ = place(0, row)
    assert lines.start < y.min() < y.max() < lines.stop
    assert y.min() + y.max() == pytest.approx(lines.start + lines.stop, abs=16)
    assert x.max() < 88


# Which model draws


def write_run(name: str, age: int = 0, ended: bool = True) -> Path:
    """Write the checkpoint of a run in ``runs`` that was saved so many seconds ago."""
    path = write_small(f"runs/{name}/checkpoint.pt", seed=age, fitted=ended)
    os.utime(path, (1e9 - age, 1e9 - age))
    if ended:
        path.with_name("metrics.json").write_text("{}")
    return path


def test_the_newest_run_that_has_ended_is_the_default(folder, capsys):
    write_run("old", age=3)
    newest = write_run("a folder of/new", age=2)
    write_run("unfinished", age=1, ended=False)
    main([*SAMPLE.split(), "--log-dir", "runs", "--output", "default.png"])
    assert capsys.readouterr() == ("default.png\n", drawn_by(newest))
    command(SAMPLE, newest)
    assert Path("default.png").read_bytes() == Path("sample.png").read_bytes()


@pytest.mark.parametrize("name", ["a/new", "runs/a/new", "runs/a/new/checkpoint.pt"])
def test_a_model_is_named_by_its_run_its_folder_or_its_file(folder, capsys, name):
    path = write_run("a/new")
    write_run("newer", age=-1)
    main([*SAMPLE.split(), "--log-dir", "runs", "--checkpoint", name])
    assert capsys.readouterr().err == drawn_by(path)


@pytest.mark.parametrize(("name", "file"), [("petals", "petals.pt"), ("ten", "trained.pt")])
def test_the_models_that_come_with_the_repository_have_names(folder, capsys, name, file):
    command("sample --count 1", name)
    path = ROOT / "results" / file
    assert capsys.readouterr().err == f"drawn by the model in {path} (flowers102)\n"


def test_a_home_folder_is_found_behind_an_equals_sign(folder, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    path = write_run("a")
    main([*SAMPLE.split(), "--log-dir=~/runs"])
    assert capsys.readouterr().err == drawn_by(folder / path)


def test_by_default_runs_are_looked_for_where_training_writes_them():
    written = vae_training.Command().log_dir
    assert vae_inference.Settings().log_dir == vae_inference.RUNS == written


@pytest.fixture
def usual(folder, monkeypatch) -> Path:
    """An empty folder in the place of the usual folder of runs."""
    monkeypatch.setattr(vae_inference, "RUNS", folder / "usual")
    return folder / "usual"


@pytest.mark.parametrize(
    ("line", "file"),
    [(SAMPLE, "petals.pt"), ("similar a.png", "petals.pt"), ("traverse a.png", "trained.pt")],
)
def test_without_a_run_a_model_that_comes_with_the_repository_draws(usual, capsys, line, file):
    main([*line.split(), "--log-dir", "usual"])
    path = ROOT / "results" / file
    assert capsys.readouterr().err == f"drawn by the model in {path} (flowers102)\n"


def test_the_first_run_takes_the_place_of_the_model_that_comes_with_the_repository(usual, capsys):
    path = write_run("a")
    Path("runs").rename("usual")
    main([*SAMPLE.split(), "--log-dir", "usual"])
    assert capsys.readouterr().err == drawn_by("usual" / path.relative_to("runs"))


@pytest.mark.parametrize("name", ["nowhere", "runs"])
def test_another_folder_without_a_run_that_has_ended_is_refused(folder, capsys, name):
    write_run("unfinished", ended=False)
    line = fails(f"sample --log-dir {name}", capsys)
    assert f"{name} has no run that has ended: train one, or name another" in line


def test_of_a_run_that_has_not_ended_the_prior_stands_in_with_a_warning(draw, capsys):
    path = write_small("run.pt", fitted=False)
    pixels = draw(SAMPLE, path)
    warning = capsys.readouterr().err
    said = "warning: its run has not ended: drawn from the prior, so worse\n"
    assert warning == said + drawn_by(path)
    assert np.array_equal(pixels, draw(f"{SAMPLE} --from prior", path))


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
        ("sample --checkpoint none", "none: no file, no run in "),
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


USUAL_NAMES = pytest.mark.parametrize(
    ("line", "name"), [(SAMPLE, "sample.png"), ("explore", "explore.html")]
)


@USUAL_NAMES
def test_a_usual_name_is_not_replaced_if_it_is_somebodys_own(
    folder, checkpoint, capsys, line, name
):
    Path(name).write_bytes(b"somebody's own")
    error = fails(f"{line} --checkpoint {checkpoint}", capsys)
    assert f"{name} is not this script's: name it with --output" in error


@USUAL_NAMES
def test_a_usual_name_is_replaced_if_it_was_written_here(folder, checkpoint, line, name):
    command(f"{line} --seed 1", checkpoint)
    before = Path(name).read_bytes()
    command(line, checkpoint)
    assert Path(name).read_bytes() != before


@USUAL_NAMES
def test_a_name_that_is_given_is_replaced_whoever_wrote_it(folder, checkpoint, line, name):
    Path(name).write_bytes(b"somebody's own")
    command(f"{line} --output {name}", checkpoint)
    assert Path(name).read_bytes() != b"somebody's own"


# Runs side by side


def test_compare_writes_a_page_of_the_runs_that_are_named(folder, capsys):
    for name in ("one", "other"):
        train_small(Path("runs") / name)
    main(["compare", "one", "runs/other", "--log-dir", "runs"])
    assert capsys.readouterr().out.endswith("compare.html\n")
    page = Path("compare.html").read_text()
    assert "by one" in page and "by other" in page


def test_compare_takes_the_newest_twelve_runs_that_have_ended(folder):
    train_small(Path("runs/0"))
    for age in range(1, 14):
        copied = shutil.copytree("runs/0", f"runs/{age}")
        os.utime(f"{copied}/checkpoint.pt", (1e9 - age, 1e9 - age))
    write_run("unfinished", ended=False)
    main(["compare", "--log-dir", "runs"])
    page = Path("compare.html").read_text()
    shown = {int(name) for name in re.findall(r"New pictures by (\d+)", page)}
    assert shown == set(range(12))
    main(["compare", "--log-dir", "runs"])  # its own page is replaced


def test_compare_without_a_run_is_told_in_one_line(folder, capsys):
    assert "nowhere has no run that has ended" in fails("compare --log-dir nowhere", capsys)
