"""Which files a data set's pictures come from, as far as that is known."""

import os
from collections.abc import Iterator
from typing import Any

from torch.utils.data import ConcatDataset, Subset

from datasets.folder import PictureFolder

PathLike = str | os.PathLike[str]


def known_sources(dataset: Any) -> list[PathLike] | None:
    """Return the files that the pictures come from, or None where nothing tells all of them.

    A data set tells if it has a file for each picture (see ``picture_files``); then these count,
    and other files that its attributes name. Or its class has a method ``depends_on()`` that
    returns the files, an empty list if there are none. A ``Subset`` or ``ConcatDataset`` tells if
    what it is made of does.
    """
    if type(dataset) is Subset:
        return known_sources(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return joined([known_sources(part) for part in dataset.datasets])
    if hasattr(dataset, "depends_on"):
        return list(dataset.depends_on())
    if picture_files(dataset) is None:
        return None
    return list(files_in_attributes(dataset))


def picture_files(dataset: Any) -> list[PathLike] | None:
    """Return the file of each picture, in order, or None where a data set does not tell them.

    It tells them by an attribute: a list of as many existing files as it has pictures, or of pairs
    (file, label). ``PictureFolder``, Flowers102, DTD and ``ImageFolder`` have one. A ``Subset`` or
    ``ConcatDataset`` tells them if what it is made of does.
    """
    if type(dataset) is Subset:
        files = picture_files(dataset.dataset)
        return None if files is None else [files[index] for index in dataset.indices]
    if type(dataset) is ConcatDataset:
        return joined([picture_files(part) for part in dataset.datasets])
    for value in attributes(dataset):
        files = files_in_list(value)
        if files and len(files) == len(dataset):
            return files
    return None


def reads_in_threads(dataset: Any) -> bool:
    """Return whether several pictures may be read at once.

    They may where each is a file of its own and the class is ours or one of torchvision's, which
    open it anew. Another class may have one open file for all pictures: then threads that move
    about in it get each other's.
    """
    if type(dataset) is Subset:
        return reads_in_threads(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return all(reads_in_threads(part) for part in dataset.datasets)
    ours = type(dataset) is PictureFolder
    torchvisions = type(dataset).__module__.startswith("torchvision.datasets.")
    return (ours or torchvisions) and picture_files(dataset) is not None


def files_in_attributes(dataset: Any) -> Iterator[PathLike]:
    """Yield every file that an attribute names, alone or in a list."""
    for value in attributes(dataset):
        if is_file(value):
            yield value
        yield from files_in_list(value) or []


def files_in_list(value: Any) -> list[PathLike] | None:
    """Return the files of a list of files, or of pairs (file, label); None if it is none."""
    if not isinstance(value, list):
        return None
    files = [item[0] if isinstance(item, tuple) and item else item for item in value]
    return files if all(map(is_file, files)) else None


def is_file(value: Any) -> bool:
    """Return whether a value is the path of a file that exists."""
    return isinstance(value, str | os.PathLike) and os.path.isfile(value)


def attributes(dataset: Any) -> list[Any]:
    """Return the values of a data set's own attributes."""
    return list(getattr(dataset, "__dict__", {}).values())


def joined(parts: list[list[PathLike] | None]) -> list[PathLike] | None:
    """Join lists of files, or return None if one of them is not known."""
    files: list[PathLike] = []
    for part in parts:
        if part is None:
            return None
        files.extend(part)
    return files
