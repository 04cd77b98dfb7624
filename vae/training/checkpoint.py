"""A run's checkpoint: written whole or not at all, read without running code."""

import hashlib
import os
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from vae.training.command_line import first_line
from vae.vae import VAE

MARK = b"SHA-256:"  # stands between a checkpoint and its digest; zip readers skip both


@contextmanager
def replace_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that takes the place of ``path`` once the block has ended well.

    Whoever reads ``path`` meanwhile sees the old file or the new one, never half of one; after an
    error the old one is still there. Of a link, the file that it points to is replaced; what is
    neither a file nor missing is an ``OSError``.
    """
    path = Path(os.path.realpath(path))  # which, unlike resolve(), bears a link to itself
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a file and is not replaced by one")
    if not path.parent.is_dir():
        raise OSError(f"{path.parent} is not a folder")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write tensors and plain values to ``path`` atomically, with a digest of it all at the end."""
    buffer = BytesIO()
    torch.save(checkpoint, buffer)
    content = buffer.getvalue()
    with replace_atomically(path) as file:
        file.write(content + MARK + hashlib.sha256(content).digest())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Only tensors and plain values are read (``weights_only=True``), so that a checkpoint from a
    stranger cannot run code.

    Raises:
        ValueError: if the file is missing, damaged, or not a checkpoint of this model.
        OSError: if it may not be read.
    """
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise ValueError(f"{path} {what}: a checkpoint.pt of a run is needed")
    try:
        content, mark, digest = path.read_bytes().rpartition(MARK)
        # Checkpoints of an older form have no digest.
        content = content if mark else digest
        if mark and digest != hashlib.sha256(content).digest():
            raise ValueError("its digest is of other content")
        with zipfile.ZipFile(BytesIO(content)) as archive:
            # PyTorch does not compress: what would unpack to more than the file is no checkpoint.
            if sum(entry.file_size for entry in archive.infolist()) > len(content):
                raise ValueError("it unpacks to more than its size")
            if archive.testzip():
                raise ValueError("a checksum is wrong")
        with warnings.catch_warnings():
            # What PyTorch makes of strange files is said below, in one line.
            warnings.simplefilter("ignore")
            checkpoint = torch.load(BytesIO(content), map_location="cpu", weights_only=True)
            if not all(isinstance(checkpoint[part], dict) for part in ("model", "config")):
                raise TypeError("its 'model' and 'config' are not dictionaries")
    except OSError:
        raise
    except Exception as error:
        # Whatever PyTorch's reader stumbles over in a foreign file: it has no exception of its own.
        raise ValueError(
            f"{path} is not a checkpoint of this model: it is damaged, or holds something other "
            f"than tensors and plain values, which could run code ({first_line(error)})"
        ) from None
    return checkpoint


def save_latents(latents: MultivariateNormal, path: Path) -> None:
    """Add the fitted distribution of the latents to a checkpoint (see ``vae.latent``)."""
    fitted = {"mean": latents.mean.cpu(), "covariance": latents.covariance_matrix.cpu()}
    save_checkpoint(load_checkpoint(path) | {"latents": fitted}, path)


def load_model(
    path: Path, device: torch.device | str = "cpu"
) -> tuple[VAE, dict[str, Any], MultivariateNormal | None]:
    """Rebuild the model that a checkpoint holds, ready for inference.

    It comes with its config and the fitted distribution of its latents (None before a run's end).
    What is raised is as in ``load_checkpoint``.
    """
    checkpoint = load_checkpoint(path)
    config, fitted = checkpoint["config"], checkpoint.get("latents")
    latents = None
    try:
        model = VAE(
            image_resolution=tuple(config["image_resolution"]),
            latent_size=config["latent_size"],
            image_channels=config["image_channels"],
            batch_norm=config["batch_norm"],
        )
        load_weights(model, checkpoint["model"])
        if fitted:
            shapes = {"mean": torch.empty(model.latent_size)}
            shapes["covariance"] = torch.empty(2 * shapes["mean"].shape)
            if not all(same_kind(fitted[name], like) for name, like in shapes.items()):
                raise ValueError("its latents are of another shape or type, or not finite")
            mean, covariance = (fitted[name].to(device) for name in shapes)
            latents = MultivariateNormal(mean, covariance)
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{path} does not hold this model: {first_line(error)}") from None
    return model.to(device).eval(), config, latents


def load_weights(model: VAE, weights: dict[str, Tensor]) -> None:
    """Give ``model`` the weights of a checkpoint; ``ValueError`` for what does not fit it."""
    for name, own in model.state_dict().items():
        if not same_kind(weights.get(name), own):
            raise ValueError(f"{name} is missing, of another shape or type, or not finite")
    model.load_state_dict(weights)


def same_kind(value: Any, own: Tensor) -> bool:
    """Return whether ``value`` is a finite tensor of the shape and type of ``own``."""
    return (
        isinstance(value, Tensor)
        and (value.shape, value.dtype) == (own.shape, own.dtype)
        and bool(value.isfinite().all())
    )
