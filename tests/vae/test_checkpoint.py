import copy
import math
import os
import pickle
import random
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, make_dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from helpers import assert_same_tensors, seeded, tensors_in, through_mean, write_checkpoint
from torch import nn
from torch.distributions import Distribution

from datasets.errors import UserError
from vae.checkpoint import (
    as_plain,
    check_same_settings,
    load_checkpoint,
    load_model,
    load_state_dicts,
    load_weights,
    replace_atomically,
    save_checkpoint,
    saved_options,
    settings_of,
    state_dicts,
)
from vae.vae import VAE

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def path(tmp_path) -> Path:
    """A good checkpoint."""
    with seeded():
        return write_checkpoint(tmp_path / "checkpoint.pt", VAE((8, 8), 2, 3))


def edit_checkpoint(path: Path, edit: Edit) -> None:
    """Write a checkpoint anew with a change."""
    checkpoint = load_checkpoint(path)
    edit(checkpoint)
    torch.save(checkpoint, path)


def refused(function: Callable[[Path], Any], path: Path) -> str:
    """The one line with which a function refuses a file, without the file's name."""
    with pytest.raises(UserError) as refusal:
        function(path)
    message = str(refusal.value)
    assert "\n" not in message
    assert message.startswith(f"{path} ")
    return message.removeprefix(f"{path} ")


# Files.


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error), replace_atomically(path) as file:
        file.write(b"half of the new")
        file.flush()
        assert path.read_bytes() == b"old"
        raise error
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_link_points_to_is_replaced(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "file")
    with replace_atomically(link) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"


def test_what_is_no_file_is_not_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="is not a file"), replace_atomically(tmp_path / "folder"):
        pass
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]


def test_what_is_saved_is_read_back(tmp_path):
    saved = {
        "architecture": {"latent_size": 2, "image_resolution": (8, 16)},
        "options": {"beta": 0.1, "name": "é", "nothing": None},
        "state": {"model": {"weight": torch.arange(3.0)}, "steps": [torch.ones(2), 7]},
    }
    save_checkpoint(tmp_path / "new folder" / "checkpoint.pt", saved)
    read = load_checkpoint(tmp_path / "new folder" / "checkpoint.pt")
    assert_same_tensors(read, saved)
    assert [read[part] for part in ("architecture", "options")] == [
        saved[part] for part in ("architecture", "options")
    ]
    assert read["state"]["steps"][1] == 7


STRANGE = {"class": nn.ReLU, "module": nn.ReLU(), "path": Path("a"), "function": lambda: 0}


@pytest.mark.parametrize("value", STRANGE.values(), ids=STRANGE)
def test_what_could_not_be_read_back_is_named_and_not_saved(path, value):
    before = path.read_bytes()
    checkpoint = load_checkpoint(path) | {"architecture": {"activation": value}}
    with pytest.raises(TypeError, match="a checkpoint can keep tensors, numbers, texts, ") as error:
        save_checkpoint(path, checkpoint)
    place = "checkpoint['architecture']['activation']"
    assert str(error.value).endswith(f", but {place} is of type {type(value).__name__}")
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


# Files that cannot be read.

mkfifo = pytest.param(
    lambda path: os.mkfifo(path),
    id="a pipe",
    marks=pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes"),
)


@pytest.mark.parametrize(
    "make",
    [pytest.param(lambda path: None, id="nothing"), pytest.param(os.mkdir, id="a folder"), mkfifo],
)
def test_a_checkpoint_that_is_no_file_is_refused(tmp_path, make):
    make(tmp_path / "checkpoint.pt")
    message = refused(load_checkpoint, tmp_path / "checkpoint.pt")
    assert message == "is not a file: a checkpoint.pt of a run is needed"


class CreatesFile:
    """Unpickled carelessly, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def zip_of_text(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("note.txt", "no tensors")


def change_byte(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]


NO_ZIP = "File is not a zip file"
CODE = "it holds more than tensors and plain values"
UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), NO_ZIP),
    "text": (lambda path: path.write_text("weights"), NO_ZIP),
    "a picture": (lambda path: path.write_bytes(b"\xff\xd8\xff\xe0" + bytes(5000)), NO_ZIP),
    "another zip file": (zip_of_text, "file in archive is not in a subdirectory: note.txt"),
    "a changed byte in the middle": (
        lambda path: path.write_bytes(change_byte(path.read_bytes(), path.stat().st_size // 2)),
        "the checksum of checkpoint/data/",
    ),
    "a pickle with code": (
        lambda path: path.write_bytes(pickle.dumps(CreatesFile(path.with_name("victim")))),
        NO_ZIP,
    ),
    "code in a checkpoint": (
        lambda path: torch.save({"state": CreatesFile(path.with_name("victim"))}, path),
        CODE,
    ),
    "code in PyTorch's old format": (
        lambda path: torch.save(
            {"state": CreatesFile(path.with_name("victim"))},
            path,
            _use_new_zipfile_serialization=False,
        ),
        NO_ZIP,
    ),
    "a whole model": (lambda path: torch.save(VAE((8, 8), 2, 3), path), CODE),
}


@pytest.mark.parametrize(("damage", "reason"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_is_said_to_be_damaged_with_the_reason_and_runs_no_code(
    path, damage, reason
):
    damage(path)
    message = refused(load_checkpoint, path)
    assert message.startswith("is damaged, or no checkpoint: ")
    assert reason in message
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("kept", [10, 0.1, 0.5, 0.9, -1000, -1])
def test_a_checkpoint_that_is_cut_off_anywhere_is_said_to_be_damaged(path, kept):
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    assert refused(load_checkpoint, path) == f"is damaged, or no checkpoint: {NO_ZIP}"


def test_a_changed_byte_anywhere_is_noticed_or_changes_nothing(path):
    content, checkpoint = path.read_bytes(), load_checkpoint(path)
    noticed = 0
    for place in random.Random(0).sample(range(len(content)), 40):
        path.write_bytes(change_byte(content, place))
        try:
            read = load_checkpoint(path)
        except UserError:
            noticed += 1
        else:
            assert_same_tensors(read, checkpoint)
            assert read["architecture"] == checkpoint["architecture"]
    assert noticed > 20  # the others lie between the parts of the file


# Files of other code.

EARLIER = "is of an earlier version of this repository: train a new run"
FOREIGN: dict[str, tuple[Any, str]] = {
    "a number": (3, "was made by other code: it holds no dictionary, but int"),
    "a list": ([1], "was made by other code: it holds no dictionary, but list"),
    "a tensor": (torch.ones(2), "was made by other code: it holds no dictionary, but Tensor"),
    "nothing": ({}, "was made by other code: it has no 'architecture'"),
    "weights alone": ({"model": {}}, "was made by other code: it has no 'architecture'"),
    "no options": ({"architecture": {}}, "was made by other code: it has no 'options'"),
    "no state": ({"architecture": {}, "options": {}}, "was made by other code: it has no 'state'"),
    "an architecture in words": (
        {"architecture": "VAE", "options": {}, "state": {}},
        "was made by other code: its architecture is no dictionary",
    ),
    "a state that is a list": (
        {"architecture": {}, "options": {}, "state": []},
        "was made by other code: its state is no dictionary",
    ),
    "this repository's earlier form": ({"model": {}, "config": {"latent_size": 10}}, EARLIER),
}


@pytest.mark.parametrize(("content", "message"), FOREIGN.values(), ids=FOREIGN)
def test_a_checkpoint_of_other_code_is_said_to_be_that(path, content, message):
    torch.save(content, path)
    assert refused(load_checkpoint, path) == message


# The model.


@pytest.mark.parametrize(
    ("size", "latent_size", "channels", "batch_norm"),
    [((16, 24), 2, 3, False), ((8, 8), 7, 1, False), ((8, 16), 2, 3, True)],
)
def test_a_model_is_rebuilt_ready_for_inference(tmp_path, size, latent_size, channels, batch_norm):
    with seeded():
        model = VAE(size, latent_size, channels, batch_norm)
        x = torch.rand(4, channels, *size)
        model(x)  # gives batch norm statistics of its own
        path = write_checkpoint(tmp_path / "checkpoint.pt", model, beta=0.3)
    rebuilt, options, latents = load_model(path)
    assert options["beta"] == 0.3
    assert not rebuilt.training
    assert torch.equal(through_mean(rebuilt, x), through_mean(model.eval(), x))
    saved = load_checkpoint(path)["latents"]
    assert torch.equal(latents.mean, saved["mean"])
    assert torch.equal(latents.covariance_matrix, saved["covariance"])


SMALL_VAE = {"image_resolution": (8, 8), "latent_size": 2, "image_channels": 3, "batch_norm": False}


def test_a_model_takes_the_weights_of_another_of_the_same_architecture(path):
    model = VAE(**SMALL_VAE)
    load_weights(model, SMALL_VAE, path)
    assert_same_tensors(model.state_dict(), load_model(path).model.state_dict())


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"latent_size": 3}, "latent_size is 2 there and 3 here"),
        ({"image_resolution": (16, 8)}, r"image_resolution is \(8, 8\) there and \(16, 8\) here"),
        ({"activation": "gelu"}, "activation is None there and gelu here"),
    ],
)
def test_weights_of_another_architecture_are_refused_with_the_difference(path, changes, difference):
    model = VAE(**SMALL_VAE)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=rf"same architecture.*, but {difference}$"):
        load_weights(model, SMALL_VAE | changes, path)
    assert_same_tensors(model.state_dict(), before)


def test_weights_that_are_not_finite_are_no_start(path):
    edit_checkpoint(
        path, lambda checkpoint: checkpoint["state"]["model"]["encoder.fcm.bias"].fill_(math.nan)
    )
    with pytest.raises(UserError, match="weights are not finite"):
        load_weights(VAE(**SMALL_VAE), SMALL_VAE, path)


def test_before_a_runs_end_a_checkpoint_has_no_latents(path):
    edit_checkpoint(path, lambda checkpoint: checkpoint.pop("latents"))
    assert load_model(path).latents is None


def architecture(**changes: Any) -> Edit:
    """The change of what a checkpoint's model is built of."""
    return lambda checkpoint: checkpoint["architecture"].update(changes)


def weights(**changes: Any) -> Edit:
    return lambda checkpoint: checkpoint["state"]["model"].update(changes)


def first_weight(checkpoint: dict[str, Any]) -> torch.Tensor:
    return next(tensor for _, tensor in tensors_in(checkpoint["state"]["model"]))


def latents(**changes: Any) -> Edit:
    return lambda checkpoint: checkpoint["latents"].update(changes)


OTHER = "Error(s) in loading state_dict for VAE: "
NO_MODEL = "no model has its sizes: "
MISFITS: dict[str, tuple[Edit, str]] = {
    "latent size": (architecture(latent_size=3), f"{OTHER}size mismatch for encoder.fcm.weight"),
    "resolution": (
        architecture(image_resolution=(16, 8)),
        f"{OTHER}size mismatch for encoder.fcm.weight",
    ),
    "channels": (architecture(image_channels=1), f"{OTHER}size mismatch for encoder.conv1.weight"),
    # Built for real, it would ask for terabytes, and fail for that.
    "a huge latent size": (
        architecture(latent_size=10**13),
        f"{OTHER}size mismatch for encoder.fcm.weight",
    ),
    "a latent size of more bytes than there are": (
        architecture(latent_size=10**18),
        f"{NO_MODEL}Storage size calculation overflowed",
    ),
    "a latent size that is no number of a computer": (
        architecture(latent_size=10**30),
        f"{NO_MODEL}empty(): argument 'size' failed to unpack",
    ),
    "a negative latent size": (
        architecture(latent_size=-3),
        f"{NO_MODEL}Trying to create tensor with negative dimension -3",
    ),
    "a latent size in words": (architecture(latent_size="two"), f"{NO_MODEL}empty()"),
    "a resolution that cannot be halved": (
        architecture(image_resolution=(7, 7)),
        f"{NO_MODEL}image resolution is 7x7",
    ),
    "a resolution of one side": (
        architecture(image_resolution=8),
        f"{NO_MODEL}cannot unpack non-iterable int object",
    ),
    "batch norm": (
        architecture(batch_norm=True),
        f'{OTHER}Missing key(s) in state_dict: "encoder.norm1.weight"',
    ),
    "an argument that is gone": (
        architecture(activation="gelu"),
        "got an unexpected keyword argument 'activation'",
    ),
    "an argument that is missing": (
        lambda it: it["architecture"].pop("image_channels"),
        "missing a required argument: 'image_channels'",
    ),
    "no model": (lambda it: it["state"].pop("model"), "it has no 'model'"),
    "a foreign weight": (
        weights(more=torch.zeros(2)),
        f'{OTHER}Unexpected key(s) in state_dict: "more".',
    ),
    "a weight that is a number": (weights(more=3), "'int' object has no attribute 'shape'"),
    "an infinite weight": (
        lambda it: first_weight(it).view(-1)[5].fill_(float("inf")),
        "its weights are not finite",
    ),
    "latents of another size": (
        latents(mean=torch.zeros(3)),
        "its latents' mean has the shape [3]",
    ),
    "a covariance of none": (
        latents(covariance=-torch.eye(2)),
        "Expected parameter covariance_matrix",
    ),
    "no covariance": (lambda it: it["latents"].pop("covariance"), "it has no 'covariance'"),
    "latents in words": (lambda it: it.update(latents="N(0, I)"), "string indices must be"),
}


@pytest.mark.parametrize(("edit", "reason"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_the_model_was_made_by_other_code(path, edit, reason, recwarn):
    edit_checkpoint(path, edit)
    assert refused(load_model, path).startswith(f"was made by other code: {reason}")
    assert not recwarn  # each would be a line more


@pytest.fixture
def without_checks() -> Iterator[None]:
    """PyTorch's distributions check no arguments, as after torch.compile()."""
    Distribution.set_default_validate_args(False)
    yield
    Distribution.set_default_validate_args(True)


def test_a_covariance_of_none_is_seen_after_torch_compile_too(path, without_checks):
    edit_checkpoint(path, latents(covariance=-torch.eye(2)))
    assert "Expected parameter covariance_matrix" in refused(load_model, path)


@pytest.mark.parametrize(
    ("slip", "error"),
    [
        (lambda: None, TypeError),
        (lambda *_: nn.Sigmod(), AttributeError),
        (lambda *_: nn.Conv2d(1, 1, 3, stride=2, padding="same"), ValueError),
        (lambda *_: nn.Linear(-1, 2), RuntimeError),
        (lambda *_: Decodre(), NameError),  # noqa: F821
    ],
)
def test_a_slip_in_the_layers_is_not_blamed_on_the_checkpoint(path, monkeypatch, slip, error):
    monkeypatch.setattr("vae.vae.Decoder", slip)
    with pytest.raises(error) as raised:
        load_model(path)
    assert not isinstance(raised.value, UserError)


# The state of a run.


class Counter:
    """No part of PyTorch's, with a state."""

    def __init__(self, count: int) -> None:
        self.count = count

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda weights: torch.optim.SGD(weights, lr=0.1),
    "SGD with momentum": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9),
    "fused Adam": lambda weights: torch.optim.Adam(weights, lr=0.1, fused=True),
    "Adam": lambda weights: torch.optim.Adam(weights, lr=0.1, amsgrad=True),
    "RMSprop": lambda weights: torch.optim.RMSprop(weights, lr=0.1),
    "Adafactor": lambda weights: torch.optim.Adafactor(weights, lr=0.1),
}


def trained(optimiser: str = "Adam", steps: int = 2) -> dict[str, Any]:
    """The state of a small training of so many steps."""
    with seeded():
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        average = torch.optim.swa_utils.AveragedModel(model)
        steps_of = OPTIMISERS[optimiser](model.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(steps_of, step_size=1, gamma=0.5)
        for _ in range(steps):
            model(torch.rand(8, 3)).square().sum().backward()
            steps_of.step()
            scheduler.step()
            average.update_parameters(model)
    return {
        "model": model,
        "average": average,
        "optimiser": steps_of,
        "scheduler": scheduler,
        "counter": Counter(steps),
    }


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_whatever_has_a_state_dict_is_restored_from_a_file(tmp_path, optimiser):
    state = trained(optimiser)
    saved = {"architecture": {}, "options": {}, "state": state_dicts(state)}
    save_checkpoint(tmp_path / "checkpoint.pt", saved)
    fresh = trained(optimiser, steps=0)
    load_state_dicts(fresh, load_checkpoint(tmp_path / "checkpoint.pt")["state"])
    assert_same_tensors(state_dicts(fresh), state_dicts(state))
    assert fresh["counter"].count == 2
    assert fresh["scheduler"].get_last_lr() == [0.025]
    assert fresh["optimiser"].param_groups[0]["lr"] == 0.025


OTHER_SETTINGS = {
    "something less": (
        lambda it: it.pop("average"),
        "average is not in the state (the run has one)",
    ),
    "something more": (
        lambda it: it.update(ema=it["average"]),
        "ema is in the state (the run has none)",
    ),
    "another optimiser": (
        lambda it: it.update(optimiser=trained("SGD with momentum", steps=0)["optimiser"]),
        "optimiser: kind is SGD (the run has Adam)",
    ),
    "another schedule": (
        lambda it: it["scheduler"].load_state_dict({"step_size": 7}),
        "scheduler: step_size is 7 (the run has 1)",
    ),
    "another learning rate": (
        lambda it: it["optimiser"].param_groups[0].update(lr=0.5),
        "optimiser: param_groups[0].lr is 0.5 (the run has 0.1)",
    ),
    "another model": (
        lambda it: it.update(model=nn.Linear(1, 1)),
        "model: kind is Linear (the run has Sequential)",
    ),
}


@pytest.mark.parametrize(("edit", "change"), OTHER_SETTINGS.values(), ids=OTHER_SETTINGS)
def test_a_state_that_was_made_otherwise_is_named_with_what_is_other(edit, change):
    before, now = trained(steps=0), trained(steps=0)
    edit(now)
    with pytest.raises(UserError, match=re.escape(change)) as refusal:
        check_same_settings(settings_of(before), settings_of(now))
    assert "\n" not in str(refusal.value)


def test_a_state_that_was_made_in_the_same_way_goes_on():
    state = trained(steps=0) | {"model": compiled("all")}
    check_same_settings(settings_of(state), settings_of(state | {"model": compiled("none")}))


def test_a_setting_that_only_another_version_of_pytorch_has_is_left_alone():
    before = settings_of(trained(steps=0))
    now = {name: dict(values) for name, values in before.items()}
    now["optimiser"]["param_groups[0].new"] = True
    check_same_settings(before, now)
    check_same_settings(now, before)


def test_the_state_of_other_layers_is_pytorchs_error():
    saved = state_dicts(trained())
    del saved["model"]["0.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0\.bias"'):
        load_state_dicts(trained(), saved)


def compiled(part: str) -> nn.Module:
    """A model of which ``part`` is compiled: all, one layer, or none."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    if part == "a layer":
        model[1] = torch.compile(model[1], backend="eager")
    return torch.compile(model, backend="eager") if part == "all" else model


@pytest.mark.parametrize("saved_part", ["none", "a layer", "all"])
@pytest.mark.parametrize("loaded_part", ["none", "a layer", "all"])
def test_compiled_weights_are_saved_under_their_plain_names(saved_part, loaded_part):
    model, other = compiled(saved_part), compiled(loaded_part)
    saved = state_dicts({"model": model})
    assert list(saved["model"]) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    load_state_dicts({"model": other}, saved)
    for weight, its_own in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(weight, its_own)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("optimiser", ["SGD with momentum", "fused Adam", "RMSprop"])
def test_an_optimisers_state_that_is_not_finite_is_refused(optimiser, value):
    saved = state_dicts(trained(optimiser))
    tensors = [each for _, each in tensors_in(saved["optimiser"]["state"]) if each.ndim]
    tensors[-1].view(-1)[0] = value
    with pytest.raises(ValueError, match=r"^the optimiser's \w+ is not finite$"):
        load_state_dicts(trained(optimiser), saved)


def moments(saved: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What an optimiser's state has of the first weight, [4, 3]."""
    return saved["optimiser"]["state"][0]


def test_a_fused_optimisers_state_of_another_shape_than_its_weight_is_refused():
    saved = state_dicts(trained("fused Adam"))
    moments(saved)["exp_avg"] = torch.zeros(2)
    message = r"^the optimiser's exp_avg has the shape \[2\], its parameter \[4, 3\]$"
    with pytest.raises(ValueError, match=message):
        load_state_dicts(trained("fused Adam"), saved)


# Options.

Likelihood = Literal["gaussian", "bernoulli"]


@dataclass(frozen=True)
class Own:
    """Options of every kind that a command line reads."""

    count: int = 3
    rate: float = 1e-4
    name: str = "flowers"
    crop: bool = True
    likelihood: Likelihood = "bernoulli"
    scales: tuple[int, ...] = (1, 2, 4)
    size: tuple[int, float] = (1, 0.5)
    root: Path = Path("data")
    mask: Path | None = Path("mask.png")
    no_mask: Path | None = None
    clip: float | None = None
    clipped: float | None = 1.5
    text_or_path: str | Path = "text"
    folders: tuple[Path, ...] = (Path("a"), Path("b"))
    no_folders: tuple[Path, ...] = ()
    pairs: tuple[tuple[Path, int], ...] = ((Path("a"), 1), (Path("b"), 2))
    nested: tuple[tuple[Path, ...], ...] = ((Path("a"), Path("b")), (), (Path("c"),))
    listed: list[Path] | None = None


def saved_own(path: Path, options: Any) -> dict[str, Any]:
    """A checkpoint with these options, written and read."""
    plain = as_plain(asdict(options))
    save_checkpoint(path, {"architecture": {}, "options": plain, "state": {}})
    return load_checkpoint(path)


def kinds(value: Any) -> Any:
    """The types of a value and of all that is in it; 1, 1.0 and True are equal."""
    if isinstance(value, tuple | list):
        return type(value), [kinds(each) for each in value]
    return type(value)


@pytest.mark.parametrize("name", Own.__dataclass_fields__)
def test_options_of_every_kind_come_back_equal_and_of_their_kind(name, tmp_path):
    path = tmp_path / "checkpoint.pt"
    back = saved_options(Own, saved_own(path, Own()), path)
    assert getattr(back, name) == getattr(Own(), name)
    assert kinds(getattr(back, name)) == kinds(getattr(Own(), name))


def test_an_option_that_came_later_has_its_default(tmp_path):
    path = tmp_path / "checkpoint.pt"
    later = make_dataclass("Later", [("tint", float, 0.25)], bases=(Own,), frozen=True)
    options = saved_options(later, saved_own(path, Own(count=7)), path)
    assert (options.tint, options.count) == (0.25, 7)


def test_options_that_are_gone_are_named(tmp_path):
    path = tmp_path / "checkpoint.pt"
    gone = [("tint", float, 0.25), ("hue", str, "red")]
    earlier = make_dataclass("Earlier", gone, bases=(Own,), frozen=True)
    checkpoint = saved_own(path, earlier())
    message = refused(lambda path: saved_options(Own, checkpoint, path), path)
    assert message == "has options that this code has not: tint = 0.25, hue = 'red'"


def test_a_required_option_that_came_later_is_named(tmp_path):
    path = tmp_path / "checkpoint.pt"
    later = make_dataclass("Later", [("tint", float)], frozen=True)
    checkpoint = saved_own(path, make_dataclass("Earlier", [], frozen=True)())
    message = refused(lambda path: saved_options(later, checkpoint, path), path)
    assert message.startswith("was made by other code: ")
    assert message.endswith("missing 1 required positional argument: 'tint'")
