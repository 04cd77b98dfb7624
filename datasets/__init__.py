"""The pictures that the model learns: every data set is a class like torchvision's.

A class of one's own, or a function, is called as ``Own(split="train", transform=...)``, with "val"
and "test" in the place of "train", and gives the pictures of that split. This is all that it needs:

- It takes ``split`` and ``transform`` by these names. If it takes ``root``, that is the folder of
  all data sets (``--data-root``); other parameters have defaults.
- ``len(own)`` is the number of its pictures, and ``own[index]`` is ``(picture, label)`` or just the
  picture, to which ``transform`` was applied. The same index is the same picture each time.
- A label may be anything: a number, a text, an array, None. It is shown by its name where there is
  an attribute ``classes``, a list of names or a dictionary from names to labels.

For example, two hundred squares, the last forty of which are not to train::

    class Squares:
        PLACES = {"train": range(160), "val": range(160, 180), "test": range(180, 200)}

        def __init__(self, split, transform):
            self.places, self.transform = self.PLACES[split], transform

        def __len__(self):
            return len(self.places)

        def __getitem__(self, index):
            shade = self.places[index]
            picture = Image.new("RGB", (64, 64), (shade, 255 - shade, 128))
            return self.transform(picture), shade > 100

In ``vae_training.py`` it is one more entry in ``DATASETS``, ``"squares": Squares``, and an import;
then ``--dataset squares`` takes it.

What it may have besides:

- Where its files are missing, and it can download them, it raises a ``RuntimeError`` that has the
  word "download". Then it is called again with ``download=True`` and an empty folder as ``root``,
  and what it leaves there is moved to the data root.
- ``depends_on()`` returns the files that its pictures come from. Then they are kept on disk, and
  not read again in each run (see ``datasets/cache.py``).
"""

import sys
from collections.abc import Mapping
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torchvision.datasets

from datasets.calls import DatasetClass, call, is_torchvisions, needed, parameters_of
from datasets.downloads import open_all
from datasets.errors import UserError
from datasets.folder import PictureFolder
from datasets.torchvision_sets import SPLITS, find_torchvisions, torchvision_class


def find_dataset(
    name: str, root: Path | str, datasets: Mapping[str, DatasetClass]
) -> tuple[str, DatasetClass]:
    """Return a name and the data set that it stands for, to be called with a split and a transform.

    The name is one of ``datasets`` or of torchvision's classes, in upper or lower case, or else the
    path of a folder of pictures, which is returned whole. For ``"auto"`` it is flowers102 or, where
    that is neither on disk nor can be downloaded, synthetic. What is not in ``root`` is downloaded
    to it.

    ``UserError`` for a name that stands for nothing, a class that cannot be used and a damaged
    download, ``ConnectionError`` for what cannot be downloaded.
    """
    if name.lower() == "auto":
        try:
            return find_dataset("flowers102", root, datasets)
        except ConnectionError as error:
            print(f"warning: {error}. Training on SYNTHETIC flowers", file=sys.stderr)
            return find_dataset("synthetic", root, datasets)
    folder = Path(name).expanduser().absolute()
    found = find_class(name, datasets)
    if found is None:
        if not folder.is_dir():
            raise unknown(name, datasets)
        return str(folder), partial(PictureFolder, folder)
    known, dataset = found
    refuse_object(known, dataset)
    root = Path(root).expanduser()
    if folder.is_dir() and folder.parent != root.absolute():
        print(f"note: {name} is the data set, and {folder} the folder", file=sys.stderr)
    find = find_torchvisions if is_torchvisions(dataset) else find_own
    return known, find(known, root, dataset)


def find_class(name: str, datasets: Mapping[str, DatasetClass]) -> tuple[str, DatasetClass] | None:
    """Return a class with the name as it is written: one of ``datasets``, else torchvision's."""
    for known, dataset in datasets.items():
        if known.lower() == name.lower():
            return known, dataset
    torchvisions = torchvision_class(name)
    return None if torchvisions is None else (torchvisions.__name__, torchvisions)


def find_own(name: str, root: Path, dataset: DatasetClass) -> DatasetClass:
    """Return a class of the reader's own, to be called with a split and a transform.

    What is not in ``root`` is downloaded to it. ``UserError`` for a class that cannot be called so.
    """
    refuse_other_calls(name, dataset)
    more = {"transform": None} if "transform" in needed(dataset, {"split"}) else {}
    open_all(name, root, dataset, [{"split": split} | more for split in SPLITS])
    return partial(call, dataset, root=root)


def refuse_object(name: str, dataset: Any) -> None:
    """Raise ``UserError`` for what is a data set already, and cannot be called for each split."""
    if not callable(dataset):
        kind = type(dataset).__name__
        raise UserError(f"{name} stands for an object of {kind}: give the class {kind} itself")


def refuse_other_calls(name: str, dataset: DatasetClass) -> None:
    """Raise ``UserError`` for a class of the reader's own that cannot be called as it has to be."""
    rule = "the top of datasets/__init__.py says what a class of your own takes"
    lacking = [each for each in ("split", "transform") if each not in parameters_of(dataset)]
    if lacking:
        raise UserError(f"the class of {name} takes no {' and no '.join(lacking)}: {rule}")
    more = needed(dataset, {"split", "transform"})
    if more:
        raise UserError(f"the class of {name} needs {' and '.join(more)}, too: {rule}")


def unknown(name: str, datasets: Mapping[str, DatasetClass]) -> UserError:
    """Return what to say of a name that is no folder and no data set's."""
    torchvisions = filter(torchvision_class, torchvision.datasets.__all__)
    names = {each.lower(): each for each in (*torchvisions, *datasets)}
    near = [names[each] for each in get_close_matches(name.lower(), names)]
    hint = f"; is it {' or '.join(near)}?" if near else ""
    of_torchvision = "nor a data set of torchvision's, such as MNIST"
    given = f"--dataset is {name}: no such folder, and none of auto, {', '.join(datasets)}"
    return UserError(f"{given}, {of_torchvision}{hint}")
