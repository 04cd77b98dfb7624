"""The model's checkpoint: written whole or not at all, read without running code."""

import os
import pickle
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from vae.vae import VAE, first_line


@contextmanager
def replace_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that takes the place of ``path`` once the block has ended well.

    Whoever reads ``path`` meanwhile sees the old file or the new one, never half of one; after an
    error the old one is still there.

    Raises:
        OSError: if the folder cannot be written to or the disk is full.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def save_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write tensors and plain values to ``path`` atomically.

    Raises:
        OSError: if it cannot be written; an earlier checkpoint is still there.
    """
    try:
        with replace_atomically(path) as file:
            torch.save(checkpoint, file)
    except RuntimeError as error:
        # What PyTorch's zip writer says when it closes a file that the disk had no room for.
        raise OSError(f"{path} cannot be written: {first_line(error)}") from None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Only tensors and plain values are read (``weights_only=True``), so that a checkpoint from a
    stranger cannot run code.

    Raises:
        ValueError: if the file is missing, damaged, or not a checkpoint of this model.
    """
    try:
        # The checksums, which PyTorch's reader does not look at: a flipped bit is another weight.
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} in it is damaged")
        with warnings.catch_warnings():
            # What PyTorch makes of strange files is said below, in one line.
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: a checkpoint.pt of a run is needed") from None
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} is not a checkpoint of this model: it is damaged, or holds something other "
            "than tensors and plain values, which is not read because it could run code"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError,
            AssertionError, OverflowError, zipfile.BadZipFile, zlib.error) as error:  # fmt: skip
        raise ValueError(f"{path} cannot be read as a checkpoint: {first_line(error)}") from None
    if not isinstance(checkpoint, dict) or not all(
        isinstance(checkpoint.get(part), dict) for part in ("model", "config")
    ):
        raise ValueError(f"{path} is not a checkpoint of this model: no 'model' and 'config' in it")
    return checkpoint


def load_model(path: Path, device: torch.device | str = "cpu") -> tuple[VAE, dict[str, Any]]:
    """Rebuild the model that a checkpoint holds, ready for inference, with its config.

    Raises:
        ValueError: if the file is missing, damaged, or not a checkpoint of this model.
    """
    checkpoint = load_checkpoint(path)
    config = checkpoint["config"]
    try:
        model = VAE(
            image_resolution=tuple(config["image_resolution"]),
            latent_size=config["latent_size"],
            image_channels=config["image_channels"],
            batch_norm=config["batch_norm"],
        )
        model.load_state_dict(checkpoint["model"])
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{path} does not hold this model: {first_line(error)}") from None
    if not is_finite(model):
        raise ValueError(f"{path} holds weights that are not finite: use an earlier checkpoint")
    return model.to(device).eval(), config


def is_finite(model: VAE) -> bool:
    """Return whether every weight of the model is a finite number."""
    return all(bool(weight.isfinite().all()) for weight in model.state_dict().values())
