"""Labels, which may be anything: no label of a data set stops a run."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import default_collate


def picture_and_label(sample: Any) -> tuple[Any, Any]:
    """Return what a data set gives for an index, as a picture and a label.

    The label is None for a picture alone, and all the rest where there is more than one.
    """
    if not isinstance(sample, tuple | list) or not sample:
        return sample, None
    picture, *rest = sample
    label = rest[0] if len(rest) == 1 else tuple(rest) or None
    return picture, label


def make_batches(labels: list[Any]) -> bool:
    """Return whether a ``DataLoader`` can make a batch of any of these labels."""
    kinds = {type(label) for label in labels}
    try:
        if kinds <= {int, float, bool}:
            default_collate(labels)
        elif kinds != {str}:
            # A batch has to begin with any of them, since its first one decides how it is made
            for label in labels:
                default_collate([labels[0], label])
                default_collate([label, labels[0]])
    except Exception:  # PyTorch raises almost anything for what it cannot put together
        return False
    return len(kinds) == 1 or kinds <= {int, float, bool}


def as_text(label: Any) -> str:
    """Return a label in one line that is not empty, and that any file can hold."""
    if isinstance(label, Tensor):
        label = label.numpy(force=True)
    if isinstance(label, tuple):
        return ", ".join(map(as_text, label)) or "()"
    line = " ".join(str(label).split())
    return line.encode("utf-8", "replace").decode() or '""'


def names_of(labels: list[Any], classes: Any) -> list[str]:
    """Return labels as text: their names in ``classes`` where all of them have one there.

    ``classes`` are names in the order of their labels, or a dictionary from a name to its label.
    Whatever else they are tells nothing.
    """
    labels = [as_plain(label) for label in labels]
    names = names_by_label(classes)
    if all(isinstance(label, int | str) and label in names for label in labels):
        labels = [names[label] for label in labels]
    return [as_text(label) for label in labels]


def names_by_label(classes: Any) -> dict[Any, Any]:
    """Return the name of each label that ``classes`` has."""
    classes = as_plain(classes)
    if isinstance(classes, Mapping):
        pairs = [(as_plain(label), name) for name, label in classes.items()]
        return {label: name for label, name in pairs if isinstance(label, int | str)}
    if isinstance(classes, Sequence | np.ndarray) and not isinstance(classes, str):
        return dict(enumerate(classes))
    return {}


def as_plain(label: Any) -> Any:
    """Return a label as it is, but a number of NumPy's or PyTorch's as one of Python's."""
    if isinstance(label, np.generic | np.ndarray | Tensor) and label.ndim == 0:
        return label.item()
    return label
