import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import seeded, write_checkpoint, write_photograph
from PIL import Image
from torch import Tensor
from torch.distributions import MultivariateNormal
from torchvision.transforms import CenterCrop, Compose, Resize, ToTensor

import vae_inference
from datasets.folder import PictureFolder
from datasets.preprocessing import InMemory, read_picture
from vae.latent import fit_latents, near, prior, spherical_steps, variation_per_dimension
from vae.run import load_checkpoint, load_model, save_checkpoint
from vae.vae import VAE
from vae_inference import draw_grid, main

COMMANDS = ("similar", "sample", "reconstruct", "interpolate", "traverse", "explore")
CELL = 128
GAP = 4


def write_small(
    path: Path,
    seed: int = 0,
    size: tuple[int, int] = (16, 16),
    channels: int = 3,
    batch_norm: bool = False,
    **more: Any,
) -> Path:
    """Write the checkpoint of a small model with four latent dimensions."""
    with seeded(seed):
        return write_checkpoint(path, VAE(size, 4, channels, batch_norm), **more)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_small(tmp_path_factory.mktemp("run") / "checkpoint.pt")


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
    return Compose([Resize((16, 16)), ToTensor()])(read_picture(Path(name)))[None]


def place(column: int, row: int = 0, left: int = 0, top: int = 0) -> tuple[slice, slice]:
    """Return where a picture is in a grid."""
    y, x = top + GAP + row * (CELL + GAP), left + GAP + column * (CELL + GAP)
    return slice(y, y + CELL), slice(x, x + CELL)


def enlarged(image: Tensor) -> np.ndarray:
    """Return one of 16x16 as a grid shows it."""
    return to_pixels(F.interpolate(image[None], scale_factor=8, mode="bicubic").clamp(0, 1)[0])


def to_pixels(image: Tensor) -> np.ndarray:
    return image.mul(255).round().byte().movedim(0, -1).numpy()


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


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_with_batch_norm_of_another_shape_draws(folder, command):
    path = write_small(folder / "run" / "checkpoint.pt", size=(24, 40), batch_norm=True)
    assert main([*arguments(command), "--checkpoint", str(path)]) is None


def test_the_callers_random_numbers_go_on_as_before(folder, checkpoint):
    with seeded(5):
        expected = torch.rand(3)
    with seeded(5):
        main([*arguments("sample"), "--checkpoint", str(checkpoint)])
        assert torch.equal(torch.rand(3), expected)


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


def test_sample_draws_50_flowers_if_nothing_else_is_said(folder, checkpoint, grids):
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
    known = load_checkpoint(checkpoint)
    known["model"]["encoder.fcm.weight"].zero_()
    known["model"]["encoder.fcm.bias"] = torch.tensor([-5.0, 1.0, 3.0, 17.0])
    known["latents"] = {"mean": torch.ones(4), "covariance": 4 * torch.eye(4)}
    save_checkpoint(known, folder / "known.pt")
    main(["traverse", "a.png", "--steps", "7", "--checkpoint", "known.pt"])
    # In standard deviations -3, 0, 1 and 8. The first column's middle is 0.5, that of -3 is 1.5,
    # and that of 3, 7.5.
    expected = {"z0": 1.5, "z1": 4.5, "z2": 5.5, "z3": 7.5}
    marks = {row[:2]: mark for row, mark in zip(grids[0].rows, grids[0].marks, strict=True)}
    assert marks == pytest.approx(expected)


def test_crop_takes_the_middle_square_and_squeezes_nothing(folder, checkpoint, grids):
    image = Image.new("RGB", (90, 30), "blue")
    image.paste("red", (30, 0, 60, 30))
    image.save("a.png")
    for options in ([], ["--crop"]):
        main(["reconstruct", "a.png", *options, "--checkpoint", str(checkpoint)])
    red = torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 16, 16)
    assert torch.equal(grids[0].images[:1], photograph("a.png"))
    assert torch.equal(grids[1].images[0], red)


def test_a_crop_has_the_shape_of_a_model_that_is_not_square(folder, grids):
    image = Image.new("RGB", (48, 48), "blue")
    image.paste("red", (0, 8, 48, 40))  # the middle, three wide for two high
    image.save("a.png")
    path = write_small(folder / "wide.pt", size=(16, 24))
    main(["reconstruct", "a.png", "--crop", "--checkpoint", str(path)])
    red = torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 16, 24)
    assert torch.equal(grids[0].images[0], red)


def test_a_model_of_grey_pictures_sees_and_draws_grey(folder, grids):
    path = write_small(folder / "grey.pt", channels=1)
    for command in COMMANDS[:-1]:
        main([*arguments(command), "--checkpoint", str(path)])
    grey = read_picture(Path("a.png")).convert("L")
    x = Compose([Resize((16, 16)), ToTensor()])(grey)
    assert torch.equal(grids[0].images[0], x)
    pixels = read(Path("reconstruct.png").read_bytes())
    assert np.array_equal(pixels[place(0, top=20)], enlarged(x.expand(3, -1, -1)))


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
        path = write_small(folder / "runs" / name / "checkpoint.pt", seed=age)
        os.utime(path, (1e9 - age, 1e9 - age))
    (folder / "runs" / "empty").mkdir()
    newest = Path("runs", "new", "checkpoint.pt")
    main([*arguments("sample"), "--log-dir", "runs", "--output", "default.png"])
    assert capsys.readouterr() == ("default.png\n", f"drawn by the model in {newest} (auto)\n")
    main([*arguments("sample"), "--checkpoint", str(newest)])
    assert (folder / "default.png").read_bytes() == (folder / "sample.png").read_bytes()


@pytest.fixture
def usual(folder, monkeypatch) -> list[str]:
    """Options for the usual folder of all runs, which is not there yet."""
    monkeypatch.setattr(vae_inference, "RUNS", folder / "usual")
    return ["--log-dir", str(folder / "usual")]


@pytest.fixture
def trained(folder, monkeypatch) -> Path:
    """The model that comes with the repository."""
    monkeypatch.setattr(vae_inference, "TRAINED", folder / "trained.pt")
    return write_small(folder / "trained.pt", seed=1)


def test_without_a_run_the_model_that_comes_with_the_repository_draws(usual, trained, capsys):
    main([*arguments("sample"), *usual, "--output", "default.png"])
    assert capsys.readouterr().err == f"drawn by the model in {trained} (auto)\n"
    main([*arguments("sample"), "--checkpoint", str(trained)])
    assert Path("default.png").read_bytes() == Path("sample.png").read_bytes()


def test_a_run_comes_before_the_model_that_comes_with_the_repository(usual, trained, capsys):
    run = write_small(Path(usual[1]) / "a" / "checkpoint.pt")
    main([*arguments("sample"), *usual])
    assert capsys.readouterr().err == f"drawn by the model in {run} (auto)\n"


def test_a_folder_without_runs_that_was_asked_for_is_refused(usual, trained, capsys):
    line = fails(["sample", "--log-dir", "nowhere"], capsys)
    assert "nowhere holds no run with a checkpoint.pt" in line
    assert "vae_training.py" in line


def test_with_neither_a_run_nor_the_repositorys_model_a_checkpoint_is_asked_for(
    usual, trained, capsys
):
    trained.unlink()
    line = fails(["sample", *usual], capsys)
    assert f"{trained} is not a file: a checkpoint.pt of a run is needed" in line


# A checkpoint without latents: its run has not ended


def assert_refitted(path: Path, train: InMemory, grid: Grid) -> None:
    """``sample --count 5`` drew from the latents of these pictures."""
    model, _, latents = load_model(path)
    assert latents is None
    with seeded(), torch.no_grad():
        z = fit_latents(model, train.batches()).sample((5,))
        assert torch.equal(grid.images, model.decoder(z))


def test_latents_are_refitted_to_the_pictures_of_the_run(folder, splits, grids):
    options = {"dataset": "small", "data_root": "nowhere"}
    path = write_small(folder / "checkpoint.pt", size=(8, 8), fitted=False, **options)
    main(["sample", "--count", "5", "--checkpoint", str(path)])
    assert_refitted(path, splits[0], grids[0])


def test_latents_are_refitted_to_a_folder_of_pictures_cropped_as_in_training(folder, grids):
    for split in ("train", "val", "test"):
        (folder / "own" / split).mkdir(parents=True)
        for seed in range(4):
            write_photograph(folder / "own" / split / f"{seed}.png", (60, 20), seed)
    options = {"dataset": str(folder / "own"), "data_root": "nowhere", "crop": True}
    path = write_small(folder / "checkpoint.pt", fitted=False, **options)
    main(["sample", "--count", "5", "--checkpoint", str(path)])
    pipeline = Compose([Resize(16), CenterCrop(16), ToTensor()])
    assert_refitted(path, InMemory(PictureFolder(folder / "own", "train", pipeline)), grids[0])


@pytest.mark.parametrize("command", COMMANDS)
def test_without_the_pictures_the_prior_stands_in_with_a_warning_where_latents_are_needed(
    folder, capsys, command
):
    options = {"dataset": "flowers102", "data_root": "nowhere"}
    path = write_small(folder / "checkpoint.pt", fitted=False, **options)
    main([*arguments(command), "--checkpoint", str(path)])
    line = capsys.readouterr().err
    if command in ("reconstruct", "interpolate"):
        assert line == ""
    else:
        assert line.startswith("warning: the checkpoint has no fitted latents")
        assert line.endswith("the prior stands in for them\n")
        assert line.count("\n") == 1


def test_the_prior_that_stands_in_is_the_one_of_from_prior(folder, grids):
    path = write_small(folder / "checkpoint.pt", fitted=False)
    for source in ("data", "prior"):
        main([*arguments("sample"), "--from", source, "--checkpoint", str(path)])
    assert torch.equal(grids[0].images, grids[1].images)


# What goes wrong


def fails(arguments: list[str], capsys, status: int = 2) -> str:
    """Run the command line, check that it fails and changes no file; return its one line."""
    before = {path: path.stat().st_mtime_ns for path in Path.cwd().rglob("*")}
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == status
    assert {path: path.stat().st_mtime_ns for path in Path.cwd().rglob("*")} == before
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_picture_that_cannot_be_read_is_named(folder, checkpoint, capsys):
    Path("broken.png").write_text("no picture")
    for name, reason in [("broken.png", "cannot be read as a picture"), ("no.png", "not exist")]:
        line = fails(["similar", "a.png", name, "--checkpoint", str(checkpoint)], capsys)
        assert name in line
        assert reason in line


def test_a_file_that_is_no_checkpoint_is_named(folder, capsys):
    Path("broken.pt").write_text("no checkpoint")
    for name, reason in [("broken.pt", "damaged"), ("none.pt", "not a file")]:
        line = fails(["sample", "--checkpoint", name], capsys)
        assert name in line
        assert reason in line


def test_an_output_that_cannot_be_written_is_named(folder, checkpoint, capsys):
    Path("taken").mkdir()
    for output in ("nowhere/flowers.png", "taken"):
        options = ["--output", output, "--checkpoint", str(checkpoint)]
        assert output in fails([*arguments("sample"), *options], capsys, status=1)


def test_neither_picture_nor_checkpoint_is_replaced_by_the_output(folder, checkpoint, capsys):
    Path("link.png").symlink_to("a.png")
    for output in ("a.png", "link.png", str(checkpoint)):
        options = ["--output", output, "--checkpoint", str(checkpoint)]
        assert f"{output} would be replaced" in fails(["similar", "a.png", *options], capsys)


@pytest.mark.parametrize("command", ["sample", "explore"])
def test_a_file_of_the_usual_name_is_replaced_only_if_it_was_written_here(
    folder, checkpoint, capsys, command
):
    usual = Path("sample.png" if command == "sample" else "explore.html")
    model = ["--checkpoint", str(checkpoint)]
    main([command, *model])
    main([command, *model])
    usual.write_bytes(b"somebody's own")
    capsys.readouterr()
    line = fails([command, *model], capsys)
    assert f"{usual} is not this script's: name it with --output" in line
    main([command, *model, "--output", str(usual)])
    assert usual.read_bytes() != b"somebody's own"


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (["sample", "--count", "0"], "--count is 0: 1 to 1000 is needed"),
        (["similar", "a.png", "--count", "1001"], "--count is 1001: 1 to 1000 is needed"),
        (["similar", "a.png", "--spread", "1.1"], "--spread is 1.1: 0 to 1 is needed"),
        (["similar", "a.png", "--spread", "nan"], "--spread is nan: 0 to 1 is needed"),
        (["traverse", "a.png", "--steps", "101"], "--steps is 101: 2 to 100 is needed"),
        (["interpolate", "a.png", "b.jpg", "--steps", "1"], "--steps is 1: 2 to 100 is needed"),
        (["similar"], "the number of pictures is 0: 1 to 1000 is needed"),
        (["reconstruct"], "the number of pictures is 0: 1 to 1000 is needed"),
        (["sample", "--device", "abacus"], "device abacus is not available here"),
        (["sample", "--device", "meta"], "device meta is not available here"),
        (["sample", "--seed", "99999999999999999999"], "--seed is 99999999999999999999"),
    ],
)
def test_a_value_that_cannot_be_is_told_in_one_line(folder, checkpoint, capsys, wrong, line):
    assert line in fails([*wrong, "--checkpoint", str(checkpoint)], capsys)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["sample", "--count", "many"], "--count"),
        (["sample", "--from", "nowhere"], "nowhere"),
        (["explore", "a.png", "b.jpg"], "b.jpg"),
        (["traverse", "a.png", "b.jpg"], "b.jpg"),
        (["interpolate", "a.png"], "IMAGES"),
        (["traverse"], "IMAGE"),
        (["paint"], "paint"),
        ([], "similar, sample, reconstruct"),
    ],
)
def test_a_command_line_that_cannot_be_read_names_what_is_wrong(folder, capsys, wrong, named):
    with pytest.raises(SystemExit) as stopped:
        main(wrong)
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} == {"a.png", "b.jpg"}
