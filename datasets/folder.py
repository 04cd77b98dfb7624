"""A folder of pictures as a data set: the reader's own."""

import hashlib
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from datasets.errors import DamagedPicture, UserError
from datasets.preprocessing import pixels_held, read_heic, read_picture, side_needed
from datasets.search import find_pictures, passed_over_text

SPLITS = ("train", "val", "test")
# What the folders of the splits may be called, in small letters.
SPLIT_OF_FOLDER = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
FEWEST = 2  # pictures of a split: one alone has no variance, and every distance to it is 0
# So many pictures are divided into splits of at least FEWEST in 99 of 100 folders (72 would do).
ENOUGH = 80
BIG = 16_000_000  # pixels in memory; Pillow takes 4 bytes for each, and as much for every copy


class PictureFile(NamedTuple):
    """A picture below the folder: where it is, what it shows, and which split it is in."""

    path: Path
    species: str
    split: str


class PictureFolder(Dataset):
    """All pictures below a folder, at any depth, with their subfolders as labels.

    Subfolders ``train`` (or ``training``), ``val`` (``valid``, ``validation``, ``dev``) and
    ``test`` (``testing``), in large or small letters, are the splits; two of one split count
    together. Where either ``val`` or ``test`` is missing, it is a tenth of the training pictures.
    In all other folders each picture goes to one split (80, 10 and 10 %) by a hash of its path
    below the folder, so that it stays there when others are added, and on every machine.

    Links are followed, but no picture is taken twice. With the training split it is printed what
    was passed over, and what becomes of a missing split. ``UserError`` if one of the splits has
    fewer than ``FEWEST`` pictures.

    The transform is applied to upright RGB images. Where it begins with a ``Resize``, big JPEGs
    come to it at a half, a quarter or an eighth of their size (see ``side_needed``).

    ``paths`` and ``labels`` have one entry for each picture of the split. A label is a place in
    ``classes``, the species of all splits together, so that it means the same in each split.
    ``name`` is what messages call the data set: folder and split.
    """

    def __init__(
        self, root: Path | str, split: str = "train", transform: Callable[..., Any] | None = None
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}: one of {', '.join(SPLITS)} is needed")
        root = Path(root)
        paths, passed_over = find_pictures(root)
        given = split_folders(root)
        if is_divided(given):
            pictures = pictures_divided_by_folder(root, paths, given)
        else:
            pictures = pictures_divided_by_hash(root, paths)
        if len(pictures) < len(paths):
            passed_over["beside the splits"] = len(paths) - len(pictures)
        if split == "train":  # once, not for each split
            print_remarks(root, given, passed_over)
        refuse_too_few(root, pictures)
        chosen = [picture for picture in pictures if picture.split == split]
        self._split = split
        self.name = f"{root} ({split})"
        self.transform = transform
        self.reads_heic = read_heic()  # what is kept on disk depends on it, too
        self.classes = sorted({picture.species for picture in pictures})
        places = {species: place for place, species in enumerate(self.classes)}
        self.paths = [picture.path for picture in chosen]
        self.labels = [places[picture.species] for picture in chosen]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return a picture as the transform makes it, and its label."""
        image = read_picture(self.paths[index], side_needed(self.transform))
        if self.transform:
            image = self.transform(image)
        return image, self.labels[index]

    def is_big(self, index: int) -> bool:
        """Return whether a picture takes so much memory that it should be read by itself."""
        try:
            return pixels_held(self.paths[index], side_needed(self.transform)) > BIG
        except DamagedPicture:
            return False


def given_split(name: str) -> str | None:
    """Return the split that a subfolder is by its name, or None."""
    return SPLIT_OF_FOLDER.get(name.lower())


def split_folders(root: Path) -> dict[str, list[str]]:
    """Return the names of the subfolders that are called like a split, for each split."""
    given: dict[str, list[str]] = {}
    for path in sorted(root.glob("*")):
        split = given_split(path.name)
        if split and path.is_dir():
            given.setdefault(split, []).append(path.name)
    return given


def is_divided(given: Collection[str]) -> bool:
    """Return whether a folder has splits of its own: one to train, and another one."""
    return "train" in given and len(given) > 1


def pictures_divided_by_folder(
    root: Path, paths: list[Path], given: Collection[str]
) -> list[PictureFile]:
    """Return the pictures in the subfolders that are splits.

    One that is not ``given`` gets the training pictures that a hash of their path puts there.
    """
    pictures = []
    for path in paths:
        name = path.relative_to(root)
        split = given_split(name.parts[0]) if len(name.parts) > 1 else None
        if split is None:
            continue
        by_hash = split_of(name.as_posix())
        if split == "train" and by_hash not in given:
            split = by_hash
        species = species_of(name.relative_to(name.parts[0]), root)
        pictures.append(PictureFile(path, species, split))
    return pictures


def pictures_divided_by_hash(root: Path, paths: list[Path]) -> list[PictureFile]:
    """Return the pictures, each with the split that its path below ``root`` falls into."""
    pictures = []
    for path in paths:
        name = path.relative_to(root)
        pictures.append(PictureFile(path, species_of(name, root), split_of(name.as_posix())))
    return pictures


def species_of(name: Path, root: Path) -> str:
    """Return what a picture shows: its subfolder or, where it lies in none, the whole folder.

    Bytes of its name that are no UTF-8 stand there as numbers, so that it can be printed.
    """
    species = name.parent.as_posix() if len(name.parts) > 1 else root.name
    return os.fsencode(species).decode("utf-8", "backslashreplace")


def split_of(name: str) -> str:
    """Return the split that a picture's path below the folder falls into."""
    name = unicodedata.normalize("NFC", name)  # Macs write an umlaut as two characters
    digest = hashlib.sha256(os.fsencode(name)).digest()
    share = int.from_bytes(digest[:4], "big") / 2**32  # from 0 to 1
    if share < 0.8:
        return "train"
    return "val" if share < 0.9 else "test"


def print_remarks(root: Path, given: dict[str, list[str]], passed_over: Counter[str]) -> None:
    """Print what was passed over, and how splits are made that have no subfolder, or several."""
    if passed_over:
        print(f"{root}: passed over: {passed_over_text(passed_over)}", file=sys.stderr)
    missing = " and ".join(split for split in SPLITS if split not in given)
    if is_divided(given):
        for split, names in given.items():
            if len(names) > 1:
                print(
                    f"{root}: its {split} split is {' and '.join(names)} together", file=sys.stderr
                )
        if missing:
            taken = "a tenth of its training pictures is taken"
            print(f"{root} has no subfolder {missing}: {taken}", file=sys.stderr)
    elif given:
        anew = "its pictures are divided anew"
        print(f"warning: {root} has no subfolder {missing}: {anew}", file=sys.stderr)


def refuse_too_few(root: Path, pictures: list[PictureFile]) -> None:
    """Raise ``UserError`` if a split has too few pictures."""
    counts = Counter(picture.split for picture in pictures)
    if any(counts[split] < FEWEST for split in SPLITS):
        given = f"{root} has {len(pictures)} pictures, {counts['train']} of them to train, "
        given += f"{counts['val']} for validation and {counts['test']} to test"
        needed = f"{FEWEST} of each are needed: some {ENOUGH} in all"
        raise UserError(f"{given}: {needed}, or subfolders train, val and test")
