import os
import pickle
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributions import MultivariateNormal

from vae.training.checkpoint import (
    MARK,
    load_checkpoint,
    load_model,
    load_weights,
    replace_atomically,
    save_checkpoint,
    save_latents,
)
from vae.vae import VAE

CONFIG = {
    "image_resolution": [8, 8],
    "latent_size": 2,
    "image_channels": 3,
    "batch_norm": False,
    "beta": 0.1,
}


class CreatesFile:
    """Unpickled carelessly, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def checkpoint_of(model: VAE, **changes: object) -> dict:
    return {"model": model.state_dict(), "config": CONFIG | changes, "epoch": 3}


@pytest.fixture
def path(tmp_path) -> Path:
    """A good checkpoint."""
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(checkpoint_of(VAE((8, 8), 2, 3)), path)
    return path


# Writing.


def test_a_checkpoint_reads_as_it_was_written(tmp_path):
    checkpoint = checkpoint_of(VAE((8, 8), 2, 3))
    save_checkpoint(checkpoint, tmp_path / "checkpoint.pt")
    read = load_checkpoint(tmp_path / "checkpoint.pt")
    assert read["config"] == CONFIG
    assert read["epoch"] == 3
    assert all(
        torch.equal(read["model"][name], value) for name, value in checkpoint["model"].items()
    )


def test_pytorch_itself_reads_a_checkpoint_with_weights_only(path):
    assert torch.load(path, weights_only=True)["config"] == CONFIG


def test_a_checkpoint_takes_the_place_of_the_one_before_it_and_leaves_nothing_else(path):
    save_checkpoint({"model": {}, "config": {}}, path)
    assert load_checkpoint(path) == {"model": {}, "config": {}}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error), replace_atomically(path) as file:
        file.write(b"half of the new")
        file.flush()
        raise error
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_until_the_new_file_is_whole_readers_see_the_old_one(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with replace_atomically(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_others_may_read_the_new_file_if_the_user_lets_them(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with replace_atomically(tmp_path / "file") as file:
            file.write(b"new")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


def test_a_folder_that_is_not_there_is_named(tmp_path):
    refused = pytest.raises(OSError, match="nowhere is not a folder")
    with refused, replace_atomically(tmp_path / "nowhere" / "file"):
        pass


def test_what_a_link_points_to_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for content in (b"one", b"two"):
        with replace_atomically(tmp_path / "link") as file:
            file.write(content)
        assert (tmp_path / "file").read_bytes() == content
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_not_replaced_by_one(tmp_path, make):
    make(tmp_path / "other")
    refused = pytest.raises(OSError, match="other is not a file and is not replaced")
    with refused, replace_atomically(tmp_path / "other"):
        pass
    assert list(tmp_path.iterdir()) == [tmp_path / "other"]
    assert not (tmp_path / "other").is_file()


def test_what_cannot_be_saved_leaves_the_checkpoint_before_it(path):
    before = path.read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_checkpoint({"model": lambda: None, "config": {}}, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


# The fitted latents.


MEAN, COVARIANCE = torch.tensor([1.0, -2.0]), torch.tensor([[2.0, 0.5], [0.5, 1.0]])


def test_the_latents_of_a_checkpoint_read_as_they_were_saved(path):
    save_latents(MultivariateNormal(MEAN, COVARIANCE), path)
    _, _, latents = load_model(path)
    assert torch.equal(latents.mean, MEAN)
    assert torch.equal(latents.covariance_matrix, COVARIANCE)


def test_the_latents_leave_the_rest_of_the_checkpoint_as_it_was(path):
    before = load_checkpoint(path)
    save_latents(MultivariateNormal(MEAN, COVARIANCE), path)
    after = load_checkpoint(path)
    assert after.keys() == before.keys() | {"latents"}
    assert plain(after) == plain(before)


def test_latents_saved_again_take_the_place_of_those_before(path):
    save_latents(MultivariateNormal(MEAN, COVARIANCE), path)
    save_latents(MultivariateNormal(-MEAN, torch.eye(2)), path)
    _, _, latents = load_model(path)
    assert torch.equal(latents.mean, -MEAN)
    assert torch.equal(latents.covariance_matrix, torch.eye(2))


def test_before_a_runs_end_a_checkpoint_has_no_latents(path):
    assert load_model(path)[2] is None


LATENTS = {"mean": MEAN, "covariance": COVARIANCE}


@pytest.mark.parametrize(
    "latents",
    [
        LATENTS | {"mean": torch.zeros(3)},
        LATENTS | {"mean": torch.zeros(2, 2)},
        LATENTS | {"mean": MEAN.double()},
        LATENTS | {"mean": torch.tensor([1.0, float("nan")])},
        LATENTS | {"mean": [1.0, -2.0]},
        LATENTS | {"covariance": torch.eye(3)},
        LATENTS | {"covariance": torch.ones(2)},
        LATENTS | {"covariance": COVARIANCE * float("inf")},
        LATENTS | {"covariance": -COVARIANCE},
        LATENTS | {"covariance": torch.tensor([[1.0, 2.0], [2.0, 1.0]])},
        LATENTS | {"covariance": torch.tensor([[2.0, 0.5], [0.0, 1.0]])},
        LATENTS | {"covariance": torch.zeros(2, 2)},
        {"mean": MEAN},
        {"covariance": COVARIANCE},
        [MEAN, COVARIANCE],
        MEAN,
        "N(0, I)",
        3,
    ],
)
def test_latents_that_are_no_gaussian_of_the_models_size_are_refused_in_one_line(path, latents):
    save_checkpoint(load_checkpoint(path) | {"latents": latents}, path)
    with pytest.raises(ValueError, match=r"checkpoint\.pt does not hold this model: .") as error:
        load_model(path)
    assert "\n" not in str(error.value)


# Reading what is no good checkpoint.


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.pt does not exist: a checkpoint\.pt"):
        load_checkpoint(tmp_path / "nowhere.pt")


def make_a_loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, make_a_loop])
def test_what_is_no_file_is_refused_at_once(tmp_path, make):
    make(tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint\.pt (does not exist|is not a file)"):
        load_checkpoint(tmp_path / "checkpoint.pt")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may look into."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def test_a_checkpoint_that_may_not_be_read_is_an_error_of_its_own(path, open_folder):
    unreadable = path.rename(open_folder / "checkpoint.pt")
    unreadable.chmod(0)
    user = os.geteuid()
    os.seteuid(user or 65534)  # root may read everything
    try:
        with pytest.raises(PermissionError, match=r"checkpoint\.pt"):
            load_checkpoint(unreadable)
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_named(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"checkpoint\.pt"):
        load_checkpoint(path)


def plain(checkpoint: dict) -> str:
    """What is in a checkpoint, and of which type."""
    model = [
        (name, weight.dtype, weight.shape, weight.tolist())
        for name, weight in checkpoint["model"].items()
    ]
    return repr([model, *(checkpoint.get(name) for name in ("config", "epoch", "seconds"))])


def test_no_flipped_byte_anywhere_in_a_checkpoint_changes_what_is_read(tmp_path):
    path = tmp_path / "checkpoint.pt"
    model = {"weight": torch.tensor([[0.5, -2.0], [3.0, 1e-9]]), "count": torch.tensor([7])}
    save_checkpoint({"model": model, "config": CONFIG, "epoch": 3, "seconds": 0.25}, path)
    content, expected = path.read_bytes(), plain(load_checkpoint(path))
    refused = 0
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 0xFF if place % 2 else 0x01
        path.write_bytes(damaged)
        try:
            assert plain(load_checkpoint(path)) == expected, place
        except (ValueError, OSError) as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > len(content) / 4


@pytest.mark.parametrize("name", ["encoder.fcm.weight", "decoder.deconv3.bias"])
def test_a_flipped_bit_in_a_weight_is_noticed(path, name):
    content = bytearray(path.read_bytes())
    weight = load_checkpoint(path)["model"][name]
    content[content.index(weight.numpy().tobytes()) + 5] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is not a checkpoint.*it is damaged"):
        load_model(path)


@pytest.mark.parametrize("where", ["content", "digest", "mark"])
def test_a_flipped_bit_outside_of_the_weights_is_noticed_or_harmless(path, where):
    expected, content = plain(load_checkpoint(path)), bytearray(path.read_bytes())
    mark = content.rindex(MARK)
    content[{"content": mark - 30, "digest": mark + 12, "mark": mark + 2}[where]] ^= 0x10
    path.write_bytes(content)
    if where == "mark":  # What stands behind a zip file's end is nobody's.
        assert plain(load_checkpoint(path)) == expected
    else:
        with pytest.raises(ValueError, match="its digest is of other content"):
            load_checkpoint(path)


def test_a_checkpoint_of_the_older_form_without_a_digest_is_read(path):
    checkpoint = load_checkpoint(path)
    torch.save(checkpoint, path)
    assert MARK not in path.read_bytes()
    assert plain(load_checkpoint(path)) == plain(checkpoint)
    assert not load_model(path)[0].training


def test_a_flipped_bit_in_a_checkpoint_of_the_older_form_is_noticed(path):
    checkpoint = load_checkpoint(path)
    torch.save(checkpoint, path)
    content = bytearray(path.read_bytes())
    weight = checkpoint["model"]["encoder.fcm.weight"]
    content[content.index(weight.numpy().tobytes()) + 5] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a checksum is wrong"):
        load_checkpoint(path)


def test_a_file_that_unpacks_to_more_than_its_size_is_refused_unread(path, tmp_path):
    bomb = tmp_path / "bomb.pt"
    with (
        zipfile.ZipFile(path) as archive,
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in archive.infolist():
            packed.writestr(entry.filename, archive.read(entry))
        packed.writestr("checkpoint/data/99", bytes(10**7))
    assert bomb.stat().st_size < 10**6
    with pytest.raises(ValueError, match=r"bomb\.pt is not a checkpoint.*more than its size"):
        load_checkpoint(bomb)


def test_a_tensor_that_is_larger_than_what_is_stored_of_it_is_refused(path):
    many = torch.zeros(1).expand(10**12)
    weights = load_checkpoint(path)["model"] | {"encoder.fcm.bias": many}
    torch.save({"model": weights, "config": CONFIG}, path)
    assert path.stat().st_size < 10**6
    with pytest.raises(ValueError, match=r"encoder\.fcm\.bias is missing, of another shape"):
        load_model(path)


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "picture.jpg"
    path.write_bytes(b"\xff\xd8\xff\xe0" + bytes(5000))
    with pytest.raises(ValueError, match=r"picture\.jpg"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "content", [3, [1, 2], torch.ones(2), {}, {"model": {}}, {"config": {}}, {"state_dict": {}}]
)
def test_a_foreign_checkpoint_is_refused_without_pytorchs_warnings(tmp_path, recwarn, content):
    torch.save(content, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match=r"foreign\.pt is not a checkpoint of this model"):
        load_checkpoint(tmp_path / "foreign.pt")
    assert not recwarn.list


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(tmp_path):
    victim = tmp_path / "victim"
    torch.save({"model": CreatesFile(victim), "config": CONFIG}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt is not a checkpoint.*could run code"):
        load_checkpoint(tmp_path / "evil.pt")
    assert not victim.exists()


def test_a_plain_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path):
    victim = tmp_path / "victim"
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(CreatesFile(victim)))
    with pytest.raises(ValueError, match=r"evil\.pt"):
        load_checkpoint(tmp_path / "evil.pt")
    assert not victim.exists()


# Rebuilding the model.


@pytest.mark.parametrize(
    ("resolution", "latent_size", "channels", "batch_norm"),
    [((8, 8), 2, 3, False), ((16, 24), 2, 3, False), ((8, 8), 7, 1, False), ((8, 16), 2, 3, True)],
)
def test_a_model_is_rebuilt_from_its_config(
    tmp_path, resolution, latent_size, channels, batch_norm
):
    model = VAE(resolution, latent_size, channels, batch_norm)
    x = torch.rand(4, channels, *resolution)
    model(x)  # gives batch norm statistics of its own
    config = {
        "image_resolution": list(resolution),
        "latent_size": latent_size,
        "image_channels": channels,
        "batch_norm": batch_norm,
    }
    save_checkpoint({"model": model.state_dict(), "config": config}, tmp_path / "checkpoint.pt")
    rebuilt, read, _ = load_model(tmp_path / "checkpoint.pt")
    assert read == config
    assert torch.equal(rebuilt.reconstruct(x), model.eval().reconstruct(x))


def test_a_rebuilt_model_is_ready_for_inference(path):
    model, *_ = load_model(path)
    assert not model.training


def test_a_model_is_put_on_the_device_that_was_asked_for(path):
    model, *_ = load_model(path, "meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(path, value):
    model = VAE((8, 8), 2, 3)
    model.state_dict()["encoder.fcm.bias"][1] = value
    save_checkpoint(checkpoint_of(model), path)
    with pytest.raises(ValueError, match=r"checkpoint\.pt does not .*fcm\.bias is .* not finite"):
        load_model(path)


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("encoder.fcm.bias", torch.zeros(3)),
        ("encoder.fcm.bias", torch.zeros(2, dtype=torch.float64)),
        ("encoder.fcm.bias", [0.0, 0.0]),
        ("encoder.fcm.bias", None),
        ("encoder.conv1.weight", torch.zeros(16, 3, 1, 1)),
    ],
)
def test_weights_of_another_shape_or_type_are_refused_and_none_is_taken(name, weight):
    model = VAE((8, 8), 2, 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"^{name} is missing, of another shape or type"):
        load_weights(model, VAE((8, 8), 2, 3).state_dict() | {name: weight})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "changes",
    [
        {"latent_size": 3},
        {"latent_size": 0},
        {"latent_size": "2"},
        {"latent_size": 2.5},
        {"latent_size": None},
        {"latent_size": 10**30},
        {"image_resolution": [8, 9]},
        {"image_resolution": [8]},
        {"image_resolution": 8},
        {"image_resolution": ["8", "8"]},
        {"image_resolution": [8, 8 * 10**18]},
        {"image_channels": 1},
        {"image_channels": []},
        {"batch_norm": True},
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused_in_one_line(path, changes):
    save_checkpoint(checkpoint_of(VAE((8, 8), 2, 3), **changes), path)
    with pytest.raises(ValueError, match=r"checkpoint\.pt does not hold this model") as error:
        load_model(path)
    assert "\n" not in str(error.value)


NO_MODEL = r"checkpoint\.pt (does not hold this model|is not a checkpoint of this model)"


@pytest.mark.parametrize("config", [None, 3, [1], {}, {"latent_size": 2}])
def test_a_config_without_the_models_sizes_is_refused(path, config):
    save_checkpoint({"model": VAE((8, 8), 2, 3).state_dict(), "config": config}, path)
    with pytest.raises(ValueError, match=NO_MODEL):
        load_model(path)


@pytest.mark.parametrize("state", [None, 3, {}, {"encoder.conv1.weight": 1}, {1: torch.ones(1)}])
def test_weights_of_another_kind_are_refused(path, state):
    save_checkpoint({"model": state, "config": CONFIG}, path)
    with pytest.raises(ValueError, match=NO_MODEL):
        load_model(path)
