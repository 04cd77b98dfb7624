"""What is kept of a run, and how it is read back: from a stranger's file, too."""

import io
import os
import pickle
import types
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from enum import Enum
from inspect import signature
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.optim import Optimizer

from datasets.errors import UserError
from vae.vae import VAE

# What a checkpoint holds of every model; a run's has more, to go on from.
PARTS = ("architecture", "options", "state")

# With these, building a model fails for a slip in the layers alone, not for a size in the file.
SMALL_SIZES = {"image_resolution": (8, 8), "latent_size": 2, "image_channels": 3}

# What torch.compile puts into the names of the weights of what it has compiled.
COMPILED = "_orig_mod."


class TrainedModel(NamedTuple):
    """A model that was read from a checkpoint, ready for inference."""

    model: VAE
    options: dict[str, Any]  # of the run that trained it, as plain values
    latents: MultivariateNormal | None  # fitted to the training pictures; None before a run's end


# Reading and writing.


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; only tensors and plain values, so that it can run no code.

    ``UserError`` if it is missing, damaged, or was not made by this code.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file: a checkpoint.pt of a run is needed")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # PyTorch does not look at the checksums
                raise ValueError(f"the checksum of {damaged} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError:  # its message is advice on how to run a stranger's code
        reason = "it holds more than tensors and plain values"
        raise UserError(f"{path} is damaged, or no checkpoint: {reason}") from None
    except Exception as error:  # PyTorch's reader has no exception of its own
        raise UserError(f"{path} is damaged, or no checkpoint: {in_one_line(error)}") from None
    if isinstance(checkpoint, dict) and "config" in checkpoint:
        raise UserError(f"{path} is of an earlier version of this repository: train a new run")
    with made_by_this_code(path):
        if not isinstance(checkpoint, dict):
            raise TypeError(f"it holds no dictionary, but {type(checkpoint).__name__}")
        for part in PARTS:
            if not isinstance(checkpoint[part], dict):
                raise TypeError(f"its {part} is no dictionary")
    return checkpoint


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint that takes the place of the one before in the moment it is whole.

    ``TypeError`` as in ``serialise``.
    """
    content = serialise(checkpoint)
    with replace_atomically(path) as file:
        file.write(content)


def serialise(checkpoint: dict[str, Any]) -> memoryview:
    """Return the bytes of a checkpoint's file.

    ``TypeError`` names what could not be read back: that would be found too late.
    """
    buffer = io.BytesIO()
    try:
        torch.save(checkpoint, buffer)
        buffer.seek(0)
        torch.load(buffer, map_location="cpu", weights_only=True)
    except (pickle.PickleError, TypeError, AttributeError) as error:
        strange = ", ".join(strange_values(checkpoint, "checkpoint")) or in_one_line(error)
        kinds = "tensors, numbers, texts, and lists and dictionaries of them"
        raise TypeError(f"a checkpoint can keep {kinds}, but {strange}") from error
    return buffer.getbuffer()


def strange_values(value: Any, place: str) -> Iterator[str]:
    """Yield where something stands that is neither tensor nor plain value, and of what type."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from strange_values(each, f"{place}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from strange_values(each, f"{place}[{index}]")
    elif not (isinstance(value, Tensor) or type(value) in (bool, int, float, str, type(None))):
        yield f"{place} is of type {type(value).__name__}"


@contextmanager
def replace_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that takes the place of ``path`` once the block has ended well.

    Of a link, the file that it points to is replaced; what is no file is not (``OSError``).
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a file and is not replaced by one")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def made_by_this_code(path: Path) -> Iterator[None]:
    """Turn what PyTorch says of a checkpoint that does not fit the code into a ``UserError``."""
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise UserError(f"{path} was made by other code: {in_one_line(error)}") from error


def in_one_line(error: Exception) -> str:
    """Return an error's message in one line of at most 300 characters, or else its kind."""
    message = " ".join(str(error).split())[:300]
    if isinstance(error, KeyError):
        message = f"it has no {message}"
    return message or type(error).__name__


# The model.


def load_model(path: Path, device: torch.device | str = "cpu") -> TrainedModel:
    """Rebuild the model that a checkpoint holds, with its run's options and fitted latents.

    It is built as the checkpoint's ``architecture`` says: ``VAE(**architecture)``. What is raised
    is as in ``load_checkpoint``; a slip in the layers keeps its traceback.
    """
    checkpoint = load_checkpoint(path)
    architecture = checkpoint["architecture"]
    with made_by_this_code(path):
        weights = checkpoint["state"]["model"]
        signature(VAE).bind(**architecture)
        check_sizes(architecture, weights)
    model = VAE(**architecture)
    with made_by_this_code(path):
        model.load_state_dict(weights)
        if not all_finite(model):
            raise ValueError("its weights are not finite")
        latents = as_distribution(checkpoint.get("latents"), model.latent_size, device)
    return TrainedModel(model.to(device).eval(), checkpoint["options"], latents)


def load_weights(model: VAE, architecture: dict[str, Any], path: Path) -> None:
    """Give a model of this architecture the weights that a checkpoint holds.

    ``UserError`` if they are of another architecture, and as in ``load_checkpoint``.
    """
    checkpoint = load_checkpoint(path)
    its = checkpoint["architecture"]
    names = [*architecture, *(name for name in its if name not in architecture)]
    differences = [
        f"{name} is {its.get(name)} there and {architecture.get(name)} here"
        for name in names
        if its.get(name) != architecture.get(name)
    ]
    if differences:
        needed = "a model of the same architecture is needed to start from"
        raise UserError(f"{path}: {needed}, but {', '.join(differences)}")
    with made_by_this_code(path):
        model.load_state_dict(checkpoint["state"]["model"])
        if not all_finite(model):
            raise ValueError("its weights are not finite")


def check_sizes(architecture: dict[str, Any], weights: Any) -> None:
    """Raise ``RuntimeError`` if a model of this architecture has weights of other shapes.

    It is built on PyTorch's "meta" device, where a weight has a shape and takes no memory: a
    forged file may ask for any size. ``ValueError`` for a size of which no model can be built.
    """
    try:
        model = build_without_memory(architecture)
    except Exception as error:
        try:
            build_without_memory(architecture | SMALL_SIZES)
        except Exception:
            return  # a slip, or a layer that cannot be built there: building it for real tells
        raise ValueError(f"no model has its sizes: {in_one_line(error)}") from error
    shapes = {name: torch.empty(value.shape, device="meta") for name, value in weights.items()}
    model.load_state_dict(shapes, assign=True)


def build_without_memory(architecture: dict[str, Any]) -> VAE:
    """Return a model whose weights have shapes, but no values."""
    with torch.device("meta"):
        return VAE(**architecture)


def as_distribution(
    latents: dict[str, Tensor] | None, latent_size: int, device: torch.device | str
) -> MultivariateNormal | None:
    """Return the Gaussian whose ``mean`` and ``covariance`` a checkpoint has, if it has any."""
    if not latents:
        return None
    if latents["mean"].shape != (latent_size,):
        raise ValueError(f"its latents' mean has the shape {list(latents['mean'].shape)}")
    mean, covariance = latents["mean"].to(device), latents["covariance"].to(device)
    # validate_args, since torch.compile() turns these checks off for all that comes after it
    return MultivariateNormal(mean, covariance, validate_args=True)


def all_finite(module: nn.Module) -> bool:
    """Return whether no weight is infinite or not a number; a buffer may be, such as a mask."""
    return all(weight.isfinite().all() for weight in module.parameters())


# The state of a run: whatever has a state_dict.


def state_dicts(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the state of each object, with its weights under their plain names."""
    plain = {}
    for name, each in state.items():
        values = each.state_dict()
        plain[name] = {plain_name(key): as_plain(value) for key, value in values.items()}
    return plain


def load_state_dicts(state: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Put each object into the state that ``state_dicts`` returned of it.

    ``ValueError`` for values that no optimiser could have left there; and whatever the objects
    themselves raise.
    """
    for name, each in state.items():
        if not isinstance(saved[name], dict):
            raise TypeError(f"its {name} is no dictionary")
        if isinstance(each, Optimizer):
            check_groups(each, saved[name])
        own_names = {plain_name(key): key for key in each.state_dict()}
        each.load_state_dict({own_names.get(key, key): x for key, x in saved[name].items()})
        if isinstance(each, Optimizer):
            check_optimiser(each)


def settings_of(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what each object of a run's state is, and with which values it was made.

    Asked before the first step, an optimiser tells its learning rate, a scheduler its length, and
    so on. Loading a state puts the old values back: this is how a change of them is noticed.
    """
    settings = {}
    for name, each in state.items():
        original = getattr(each, "_orig_mod", each)  # of what torch.compile has made of it
        values: dict[str, Any] = {"kind": type(original).__name__}
        if not isinstance(each, nn.Module):  # whose weights are drawn, and no settings
            values |= dict(plain_values(as_plain(each.state_dict())))
        settings[name] = values
    return settings


def plain_values(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all values but tensors in dictionaries and lists, each with where it stands."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from plain_values(each, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from plain_values(each, f"{place}[{index}]")
    elif not isinstance(value, Tensor):
        yield place, value


def check_same_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ``UserError`` if a run's state was made otherwise than ``settings_of`` says it was.

    What only one of the two has is left alone: another version of PyTorch may have more.
    """
    missing = [name for name in now if name not in before]
    surplus = [name for name in before if name not in now]
    changes = []
    for name in now.keys() & before.keys():
        for place, value in now[name].items():
            if place in before[name] and not is_same(before[name][place], value):
                changes.append(f"{name}: {place} is {value} (the run has {before[name][place]})")
    changes += [f"{name} is in the state (the run has none)" for name in missing]
    changes += [f"{name} is not in the state (the run has one)" for name in surplus]
    if changes:
        raise UserError(f"a resumed run stays the same experiment: {'; '.join(sorted(changes))}")


def check_groups(optimiser: Optimizer, saved: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless an optimiser has as many groups of parameters as were saved."""
    own, its = len(optimiser.param_groups), len(saved["param_groups"])
    if own != its:
        advice = "a group that is added while it trains has to be there from the start"
        raise ValueError(f"its optimiser has {its} groups of parameters, this one {own}: {advice}")


def check_state(state: Mapping[str, Any]) -> None:
    """Raise ``UserError`` for what a resumed run could not go on from.

    That is an object without a ``state_dict``, and a parameter which an optimiser changes and no
    module in the state saves.
    """
    if "model" not in state:
        raise UserError(f"the state has {', '.join(state)}: the model is needed, as 'model'")
    saved: set[Tensor] = set()
    for name, each in state.items():
        if not (hasattr(each, "state_dict") and hasattr(each, "load_state_dict")):
            advice = "put a tensor into an nn.Module, such as nn.ParameterList([...])"
            raise UserError(f"state[{name!r}] has no state_dict and load_state_dict: {advice}")
        if isinstance(each, nn.Module):
            saved.update(each.parameters())
    for name, each in state.items():
        if not isinstance(each, Optimizer):
            continue
        for weight in weights_of(each):
            if weight not in saved:
                given = f"the {name} changes a parameter of shape {list(weight.shape)}"
                raise UserError(f"{given} that is in no module of the state: add its module there")


def weights_of(optimiser: Optimizer) -> list[Tensor]:
    """Return the parameters that an optimiser changes, of all its groups."""
    return [weight for group in optimiser.param_groups for weight in group["params"]]


def plain_name(key: Any) -> Any:
    """Return a weight's name as it is without ``torch.compile``."""
    return key.replace(COMPILED, "") if isinstance(key, str) else key


def check_optimiser(optimiser: Optimizer) -> None:
    """Raise ``ValueError`` for a state that no step of an optimiser could have left.

    Fused steps trust what they find: a tensor that is smaller than its parameter would let them
    read memory that is not theirs.
    """
    for group in optimiser.param_groups:
        for weight in group["params"]:
            for name, value in optimiser.state.get(weight, {}).items():
                if not isinstance(value, Tensor):
                    continue
                if not value.isfinite().all():
                    raise ValueError(f"the optimiser's {name} is not finite")
                fits = value.ndim == 0 or value.shape == weight.shape
                if group.get("fused") and not fits:
                    sizes = f"{list(value.shape)}, its parameter {list(weight.shape)}"
                    raise ValueError(f"the optimiser's {name} has the shape {sizes}")


def is_same(one: Any, other: Any) -> bool:
    """Return whether two values are equal, or both not a number."""
    return one == other or (one != one and other != other)


# Options: of any kind that a command line reads.


def map_values(change: Callable[[Any], Any], value: Any) -> Any:
    """Return a value in which ``change`` was made to each one in dictionaries, lists and tuples."""
    if isinstance(value, dict):
        return {key: map_values(change, each) for key, each in value.items()}
    if isinstance(value, list):
        return [map_values(change, each) for each in value]
    if isinstance(value, tuple):
        return tuple(map_values(change, each) for each in value)
    return change(value)


def as_plain(value: Any) -> Any:
    """Return a value as a checkpoint holds it.

    Paths are texts there, members of an ``Enum`` their names, NumPy's numbers Python's.
    """

    def plain(each: Any) -> Any:
        if isinstance(each, os.PathLike):
            return os.fspath(each)
        if isinstance(each, Enum):
            return each.name
        return each.item() if isinstance(each, np.generic) else each

    return map_values(plain, value)


def as_declared(value: Any, hint: Any) -> Any:
    """Return a plain value as an option's type hint has it: a text as a path, where that is meant.

    ``hint`` is for instance Path, ``Path | None``, ``tuple[Path, ...]``, an ``Enum``, a data class.
    """
    is_union = get_origin(hint) in (Union, types.UnionType)
    kinds = get_args(hint) if is_union else (hint,)
    if str in kinds and isinstance(value, str):
        return value
    for kind in kinds:
        origin, inner = get_origin(kind), get_args(kind)
        if kind is Path and isinstance(value, str):
            return Path(value)
        if isinstance(kind, type) and issubclass(kind, Enum) and isinstance(value, str):
            return kind[value]
        if is_dataclass(kind) and isinstance(value, dict):
            return options_of(kind, value)
        if hasattr(kind, "_fields") and isinstance(value, tuple):  # a NamedTuple
            parts = zip(value, get_type_hints(kind).values(), strict=True)
            return kind(*(as_declared(*part) for part in parts))
        if origin is dict and isinstance(value, dict):
            return {key: as_declared(each, inner[1]) for key, each in value.items()}
        if origin is list and isinstance(value, list):
            return [as_declared(each, inner[0]) for each in value]
        if origin is tuple and isinstance(value, tuple):
            hints = inner[:1] * len(value) if inner[-1] is ... else inner
            return tuple(as_declared(*pair) for pair in zip(value, hints, strict=True))
    return value


def options_of(kind: Any, values: Mapping[str, Any]) -> Any:
    """Return an instance of the data class ``kind`` with these plain values."""
    hints = get_type_hints(kind)
    given = {}
    for each in fields(kind):
        if each.init and each.name in values:  # the others it derives by itself
            given[each.name] = as_declared(values[each.name], hints[each.name])
    return kind(**given)


def saved_options(kind: type, checkpoint: dict[str, Any], path: Path) -> Any:
    """Return the options, of the data class ``kind``, of the run whose checkpoint is in ``path``.

    An option that the class has since then has its default. ``UserError`` names one that the class
    no longer has.
    """
    saved = checkpoint["options"]
    known = {each.name for each in fields(kind)}
    gone = [f"{name} = {value!r}" for name, value in saved.items() if name not in known]
    if gone:
        raise UserError(f"{path} has options that this code has not: {', '.join(gone)}")
    with made_by_this_code(path):
        return options_of(kind, saved)
