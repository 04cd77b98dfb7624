"""The pictures of a data set, read once and kept in memory."""

import random
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from datasets.cache import Pictures, cache_path, keep_pictures, load_pictures
from datasets.errors import DamagedPicture, UserError
from datasets.labels import as_text, make_batches, picture_and_label
from datasets.sources import picture_files, reads_in_threads

BLOCK = 1024  # pictures that wait for the threads; the queue of a million would take memory, too


class InMemory(Dataset):
    """A data set whose pictures are read once, and stay in memory as bytes.

    It takes any data set like torchvision's, of pairs (image, label) with the image a float tensor
    [channels, height, width] in [0, 1], as ``ToTensor`` makes it, and gives the same pairs back:
    bit for bit for 8-bit pictures, rounded to 8 bits otherwise. A data set may give images alone:
    then each label is None. NumPy's numbers as labels become Python's. Labels of which a
    ``DataLoader`` can make no batch, such as None, come as text.

    Nothing random may be in the transform, since it would be drawn once for all epochs. Such a
    transform is refused if it draws from PyTorch's, NumPy's or Python's global generator, even for
    one picture alone. A generator of its own is not seen. Random changes belong behind the
    ``DataLoader`` (see ``augment``).

    Where each picture is a file and the class is ours or torchvision's, threads read them, and the
    transform is called from several at once. Where all files are known, or the class tells them by
    ``depends_on()``, the pictures are kept on disk for the next run (see ``datasets/cache.py`` and
    ``known_sources``). All others are read again in each run.

    ``pixels`` are [n, height, width, channels] uint8, ``labels`` a list of n as the data set has
    them, ``name`` is what the data set calls itself, or its class, and ``classes`` its attribute,
    or None; a ``Subset`` has those of the data set that it is a part of. A picture that raises
    ``DamagedPicture`` is named in a warning and left out. ``progress`` shows a bar on terminals.
    ``UserError`` if there are no pictures, or they differ in shape, or are not in [0, 1], or a
    transform draws.
    """

    def __init__(self, dataset: Any, progress: bool = True) -> None:
        self.name = name_of(dataset)
        self.classes = getattr(whole(dataset), "classes", None)
        pictures = load_or_read(dataset, progress)
        self.pixels = pictures.pixels
        self.labels = pictures.labels
        self.labels_as_text = not make_batches(self.labels)
        for message in pictures.left_out:
            print(f"warning: {message}: it is left out", file=sys.stderr)
        if not len(self):
            raise UserError(f"{self.name} has no pictures that can be read: at least one is needed")

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        """Return an image, [channels, height, width] in [0, 1], and its label."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Any]]:
        """Return several pairs at once: what a ``DataLoader`` asks for, one batch at a time."""
        labels = [self.labels[index] for index in indices]
        if self.labels_as_text:
            labels = [as_text(label) for label in labels]
        return list(zip(self.images(torch.tensor(indices)), labels, strict=True))

    def images(self, index: slice | Tensor) -> Tensor:
        """Return several images, [n, channels, height, width] in [0, 1], channels last."""
        return self.pixels[index].movedim(-1, -3).float().div_(255)

    def batches(self, size: int = 64) -> Iterator[Tensor]:
        """Yield all images in order, [batch, channels, height, width]."""
        for start in range(0, len(self), size):
            yield self.images(slice(start, start + size))


def whole(dataset: Any) -> Any:
    """Return the data set that a ``Subset`` is a part of; others are whole themselves."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return dataset


def name_of(dataset: Any) -> str:
    """Return what a data set calls itself by a text, ``name``, or else its class."""
    name = getattr(whole(dataset), "name", None)
    return name if isinstance(name, str) else type(whole(dataset)).__name__


def load_or_read(dataset: Any, progress: bool) -> Pictures:
    """Return a data set's pictures: those that an earlier run kept, else read and then kept."""
    path = cache_path(dataset)
    if path is None:
        return read_pictures(dataset, progress)
    pictures = load_pictures(path)
    if pictures is None:
        pictures = read_pictures(dataset, progress)
        keep_pictures(path, pictures)
    return pictures


def read_pictures(dataset: Any, progress: bool) -> Pictures:
    """Read all pictures of a data set, and leave the caller's random numbers as they were."""
    reader = Reader(dataset)
    states = RandomStates()
    if progress:
        print(f"Reading {len(dataset):,} pictures of {reader.name}", file=sys.stderr)
    bar = tqdm(total=len(dataset), unit="picture", leave=False, disable=None if progress else True)
    try:
        with bar:
            rest = reader.read_first(bar)
            # Most transforms that draw do so at once: nobody need wait for all pictures.
            refuse_if_drawn(states, reader.name)
            if reads_in_threads(dataset):
                reader.read_in_threads(rest, bar)
            else:
                reader.read_in_turn(rest, bar)
            # Some do so for a few pictures only.
            refuse_if_drawn(states, reader.name)
    finally:
        states.restore()
    return reader.result()


class Reader:
    """Reads pictures of one data set into the rows of one array.

    The array has a row for each picture, in order, so that threads may fill it in any order.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.name = name_of(dataset)
        self.shape: torch.Size | None = None  # of each image, which the first one tells
        self.pixels = torch.empty(0, dtype=torch.uint8)
        self.labels: list[Any] = [None] * len(dataset)
        self.damaged: dict[int, str] = {}
        self.big: list[int] = []  # places of pictures that threads leave out

    def read_first(self, bar: tqdm) -> range:
        """Read up to the first picture that can be read, and return the places of the others."""
        count = len(self.labels)
        for index in range(count):
            self.read(index)
            bar.update()
            if index not in self.damaged:
                return range(index + 1, count)
        return range(0)

    def read_in_turn(self, places: Sequence[int], bar: tqdm) -> None:
        """Read the pictures at these places, one after the other."""
        for index in places:
            self.read(index)
            bar.update()

    def read_in_threads(self, places: range, bar: tqdm) -> None:
        """Read the pictures at these places; Pillow lets go of the interpreter's lock meanwhile.

        The big ones (see ``PictureFolder.is_big``) are read at the end, one after the other in this
        thread: so memory is needed for one of them, however many threads there are.
        """
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(places), BLOCK):
                for was_read in pool.map(self.read_unless_big, places[start : start + BLOCK]):
                    bar.update(was_read)
        self.read_in_turn(self.big, bar)

    def read_unless_big(self, index: int) -> bool:
        """Read one picture, or note that it is big; return whether it was read."""
        if hasattr(self.dataset, "is_big") and self.dataset.is_big(index):
            self.big.append(index)
            return False
        self.read(index)
        return True

    def read(self, index: int) -> None:
        """Read one picture into its row, or note that it is damaged."""
        try:
            image, label = picture_and_label(self.dataset[index])
        except DamagedPicture as error:
            self.damaged[index] = str(error)
            return
        except OSError as error:  # as torchvision's raise for a damaged file
            place = self.file_or_place(index)
            raise UserError(f"{place} cannot be read as a picture: {error}") from None
        self.check(index, image)
        if not len(self.pixels):
            self.make_room(image)
        self.pixels[index] = image.mul(255).round_().byte().movedim(0, -1)
        self.labels[index] = label.item() if isinstance(label, np.generic) else label

    def check(self, index: int, image: Any) -> None:
        """Raise ``UserError`` for what is no image, or has not the shape of the first one."""
        place = self.place(index)
        if not isinstance(image, Tensor) or image.ndim != 3 or not image.is_floating_point():
            raise UserError(
                f"{place} is no tensor as ToTensor() makes it: "
                "apply the transform to it, and let that end so"
            )
        lowest, highest = image.aminmax()
        if not 0 <= lowest.item() <= highest.item() <= 1:  # which NaN is not, either
            raise UserError(f"{place} has values outside of [0, 1], which ToTensor() gives")
        if self.shape and image.shape != self.shape:
            shapes = {tuple(self.shape), tuple(image.shape)}
            raise UserError(f"{place} has another shape, {shapes}: its transform needs a Resize")

    def make_room(self, image: Tensor) -> None:
        """Make the array for pictures of the first one's shape, [channels, height, width]."""
        channels, height, width = self.shape = image.shape
        self.pixels = torch.empty(len(self.labels), height, width, channels, dtype=torch.uint8)

    def place(self, index: int) -> str:
        """Return what a message calls a picture."""
        return f"picture {index} of {self.name}"

    def file_or_place(self, index: int) -> str:
        """Return the picture's file, or where that is not known what a message calls it."""
        files = picture_files(self.dataset)
        return self.place(index) if files is None else str(files[index])

    def result(self) -> Pictures:
        """Return what was read, without the damaged pictures."""
        whole = [index for index in range(len(self.labels)) if index not in self.damaged]
        for row, index in enumerate(whole):
            if row != index:  # moved down in place: a copy would take the memory twice
                self.pixels[row] = self.pixels[index]
        labels = [self.labels[index] for index in whole]
        left_out = [self.damaged[index] for index in sorted(self.damaged)]
        return Pictures(self.pixels[: len(whole)], labels, left_out)


class RandomStates:
    """The states of PyTorch's, NumPy's and Python's global generators at one moment."""

    def __init__(self) -> None:
        self.torch = torch.get_rng_state()
        self.numpy = np.random.get_state()
        self.python = random.getstate()

    def differ(self) -> bool:
        """Return whether a number was drawn since that moment."""
        now = RandomStates()
        _, numbers, *rest = self.numpy
        _, numbers_now, *rest_now = now.numpy
        return (
            not torch.equal(self.torch, now.torch)
            or not np.array_equal(numbers, numbers_now)
            or rest != rest_now
            or self.python != now.python
        )

    def restore(self) -> None:
        """Give the generators these states again."""
        torch.set_rng_state(self.torch)
        np.random.set_state(self.numpy)
        random.setstate(self.python)


def refuse_if_drawn(states: RandomStates, name: str) -> None:
    """Raise ``UserError`` if random numbers were drawn while pictures were read."""
    if states.differ():
        given = f"the transform of {name} draws random numbers, but it runs only once per picture"
        code = "train_features = torch.stack([change(x) for x in train_features])"
        raise UserError(f"{given}: take what is random out, and do it in the training loop: {code}")
