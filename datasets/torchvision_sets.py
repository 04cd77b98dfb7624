"""Any labelled picture data set of torchvision's, by its class, in the splits train, val and test.

No table says which splits a class has: it is asked. A split that it lacks is a tenth of its
training pictures, the same ones on every machine.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import torchvision.datasets
from PIL import Image
from torch.utils.data import Dataset, Subset
from torchvision.transforms import Compose

from datasets.calls import DatasetClass, call, is_torchvisions, needed, parameters_of, unwrapped
from datasets.downloads import Choice, open_all, says_package
from datasets.errors import UserError
from datasets.preprocessing import as_rgb

SPLITS = ("train", "val", "test")

# Their labels are boxes or masks in the picture, which nothing tells before they are downloaded.
NO_LABELS = {
    "Cityscapes",
    "CocoDetection",
    "Kitti",
    "VOCDetection",
    "VOCSegmentation",
    "WIDERFace",
}


class Part(NamedTuple):
    """The pictures of a split: what a class is called with, and which tenths of what it gives."""

    choice: Choice
    first: int  # tenth, counted from 0
    end: int  # the tenth after the last


def torchvision_class(name: str) -> type | None:
    """Return torchvision's data set of a name, in upper or lower case; None if there is none.

    ``ImageFolder`` does not count, since it reads a folder of one's own.
    """
    for known in torchvision.datasets.__all__:
        if known.lower() == name.lower():
            found = getattr(torchvision.datasets, known)
            return found if suits_a_name(found) else None
    return None


def find_torchvisions(name: str, root: Path, dataset: DatasetClass) -> Callable[..., Dataset]:
    """Return a data set of torchvision's, to be called with a split and a transform.

    Each split is the class's own where it has one (``val`` under any name that begins so, as
    ``valid``). One that it lacks is a tenth of the training pictures. What is not in ``root`` is
    downloaded to it. The transform gets RGB pictures, or grey ones if all are grey.

    ``UserError`` for a class without labels, one that needs more than a split, a missing package,
    and what ``open_all`` refuses; ``ConnectionError`` as there.
    """
    refuse_without_labels(name, dataset)
    with named_packages(name):
        own = own_splits(name, root, dataset)
        refuse_without_choice(name, root, dataset, own["train"])
        train, *_ = open_all(name, root, dataset, list(own.values()))
        grey = is_grey(train)
    return partial(open_split, dataset, root, divide(own), grey)


def open_split(
    dataset: DatasetClass,
    root: Path,
    parts: dict[str, Part],
    grey: bool,
    split: str,
    transform: Callable[..., Any] | None = None,
) -> Dataset:
    """Return the pictures of a split, all of what the class gives or a ``Subset`` of it."""
    choice, first, end = parts[split]
    steps = [partial(as_grey_or_rgb, grey=grey), *([transform] if transform else [])]
    whole = call(dataset, root=root, transform=Compose(steps), download=False, **choice)
    if (first, end) == (0, 10):
        return whole
    return Subset(whole, places_of_tenths(whole, root, first, end))


# Which splits there are.


def own_splits(name: str, root: Path, dataset: DatasetClass) -> dict[str, Choice]:
    """Return what a class is called with for those splits that it has; "train" is one always."""
    parameters = parameters_of(dataset)
    if isinstance(parameters.get("train"), bool):
        return {"train": {"train": True}, "test": {"train": False}}
    parameter = split_parameter(parameters)
    if parameter is None:
        return {"train": {}}
    values = valid_values(dataset, root, parameter)
    if not values:  # some look for their files first
        open_all(name, root, dataset, [{}])
        values = valid_values(dataset, root, parameter) or list(SPLITS)
    own = {}
    for split in SPLITS:
        named = [value for value in values if value.startswith(split)]
        if named:
            own[split] = {parameter: split if split in named else named[0]}
    if "train" not in own:
        raise UserError(f"{name} has no training split, only {', '.join(values)}: take another")
    return own


def split_parameter(parameters: dict[str, Any]) -> str | None:
    """Return the parameter that chooses the split; None if there is none.

    It is called "split", or its default is a name of the training split.
    """
    for name, default in parameters.items():
        if name == "split" or str(default).startswith("train"):
            return name
    return None


def valid_values(dataset: DatasetClass, root: Path, parameter: str) -> list[str]:
    """Return the values that a class takes for a parameter, as it says itself of a wrong one.

    None are returned where it does not say so.
    """
    try:
        call(dataset, root=root, download=False, **{parameter: "?"})
    except (ValueError, RuntimeError, OSError) as error:
        said = re.search(rf"argument {parameter}\. Valid values are {{(.*)}}", str(error))
        return re.findall(r"'([^']+)'", said[1]) if said else []
    return []


def divide(own: dict[str, Choice]) -> dict[str, Part]:
    """Return each split's part: what the class has of its own, else a tenth of what is to train."""
    lacking = [split for split in SPLITS if split not in own]
    rest = 10 - len(lacking)
    parts = {split: Part(choice, 0, 10) for split, choice in own.items()}
    parts["train"] = Part(own["train"], 0, rest)
    for tenth, split in enumerate(lacking, start=rest):
        parts[split] = Part(own["train"], tenth, tenth + 1)
    return parts


def places_of_tenths(dataset: Any, root: Path, first: int, end: int) -> list[int]:
    """Return where the pictures of some tenths stand in a data set.

    Which tenth a picture is in follows from the hash of its name, the same on every machine, and so
    does the order of the places: by name.
    """
    names = picture_names(dataset, root)

    def by_hash(place: int) -> bytes:
        return hashlib.sha256(names[place].encode("utf-8", "surrogateescape")).digest()

    shuffled = sorted(range(len(names)), key=by_hash)
    chosen = shuffled[len(names) * first // 10 : len(names) * end // 10]
    return sorted(chosen, key=names.__getitem__)


def picture_names(dataset: Any, root: Path) -> list[str]:
    """Return a name for each picture that is the same on every machine.

    That is its file below ``root`` where an attribute has one for each picture, alone or in a pair.
    (Some classes list files in the order in which the disk has them.) Else it is its place.
    """
    for values in vars(dataset).values():
        if isinstance(values, list) and len(values) == len(dataset):
            names = [file_in(value).removeprefix(str(root)).replace("\\", "/") for value in values]
            if len(set(names)) == len(names):
                return names
    return [f"{place:09}" for place in range(len(dataset))]


def file_in(value: Any) -> str:
    """Return a file's name, which may be in a tuple; an empty text if there is none."""
    for each in value if isinstance(value, tuple) else (value,):
        if isinstance(each, str | Path):
            return str(each)
    return ""


# What the pictures are.


def is_grey(dataset: Any) -> bool:
    """Return whether all pictures are grey, as some ten from all over tell.

    One would not do: photographs in colour may have a few grey ones among them. A damaged one tells
    nothing here; it is named when all are read.
    """
    modes = set()
    for place in range(0, len(dataset), max(1, len(dataset) // 10)):
        with suppress(OSError):
            picture, _ = dataset[place]
            modes.add(getattr(picture, "mode", ""))
    return bool(modes) and modes <= {"1", "L"}


def as_grey_or_rgb(image: Any, grey: bool) -> Any:
    """Return a picture in grey or in RGB; what is no picture of Pillow's stays as it is."""
    if not isinstance(image, Image.Image):
        return image
    return image.convert("L") if grey else as_rgb(image)


# What cannot be used.


def suits_a_name(found: Any) -> bool:
    """Return whether something in ``torchvision.datasets`` is a data set of its own pictures."""
    is_class = isinstance(found, type) and is_torchvisions(found)
    return is_class and found.__module__ != "torchvision.datasets.folder"


def refuse_without_labels(name: str, dataset: DatasetClass) -> None:
    """Raise ``UserError`` for a class that does not give pairs of a picture and its label."""
    whole = unwrapped(dataset)
    takes_transform = "transform" in parameters_of(whole)
    if whole.__name__ in NO_LABELS or not takes_transform or not gives_pairs(whole):
        given = f"{name} does not give pictures with a label each"
        raise UserError(f"{given}: take another, or give its pictures as a folder to --dataset")


def refuse_without_choice(name: str, root: Path, dataset: DatasetClass, choice: Choice) -> None:
    """Raise ``UserError`` for a class that needs something that only the reader can choose."""
    for parameter in needed(dataset, choice):
        values = valid_values(dataset, root, parameter)
        some = f" ({', '.join(values)})" if values else ""
        example = repr(values[0]) if values else "..."
        class_name = unwrapped(dataset).__name__
        line = f'"{name.lower()}": partial({class_name}, {parameter}={example})'
        raise UserError(
            f"{name} needs a value for {parameter}{some}: choose it by a line in DATASETS, {line}"
        )


def gives_pairs(dataset: Any) -> bool:
    """Return whether a class says that it gives pairs, or says nothing of it."""
    given = get_type_hints(dataset.__getitem__).get("return", Any)
    return given is Any or (get_origin(given) is tuple and len(get_args(given)) == 2)


@contextmanager
def named_packages(name: str) -> Iterator[None]:
    """Say which package a class of torchvision's lacks, as ``UserError``."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise UserError(f"{name} needs a package: pip install {package}") from None
    except RuntimeError as error:
        if not says_package(error):
            raise
        raise UserError(f"{name} needs a package: {error}") from None
