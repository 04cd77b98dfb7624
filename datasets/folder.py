"""A folder of pictures as a data set: the reader's own."""

import hashlib
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch.utils.data import Dataset

from datasets.errors import UserError
from datasets.preprocessing import read_heic, read_picture

SPLITS = ("train", "val", "test")


class PictureFile(NamedTuple):
    """A picture below the folder: where it is, what it shows, and which split it is in."""

    path: Path
    species: str
    split: str


class PictureFolder(Dataset):
    """All pictures below a folder, at any depth, with their subfolders as labels.

    Subfolders ``train``, ``val`` and ``test`` are the splits where all three are there. Else each
    picture goes to one (80, 10 and 10 %) by a hash of its path below the folder, so that it stays
    there when others are added, and on every machine. What is no picture is passed over. The
    transform is applied to upright RGB images. ``UserError`` if the split has no pictures.

    ``paths`` and ``labels`` have one entry for each picture of the split. A label is a place in
    ``classes``, the species of all splits together, so that it means the same in each split.
    """

    def __init__(
        self, root: Path | str, split: str = "train", transform: Callable[..., Any] | None = None
    ) -> None:
        root = Path(root)
        missing = [name for name in SPLITS if not (root / name).is_dir()]
        if 0 < len(missing) < len(SPLITS) and split == "train":  # said once, not for each split
            given = f"{root} has no subfolder {' and '.join(missing)}"
            print(f"warning: {given}: its pictures are divided anew", file=sys.stderr)
        pictures = pictures_divided_by_hash(root) if missing else pictures_divided_by_folder(root)
        chosen = [picture for picture in pictures if picture.split == split]
        if not chosen:
            given = f"{root} has {len(pictures)} pictures, none of them for the {split} split"
            raise UserError(f"{given}: some 30 are needed, or subfolders train, val and test")
        self._split = split
        self.transform = transform
        self.classes = sorted({picture.species for picture in pictures})
        self.paths = [picture.path for picture in chosen]
        self.labels = [self.classes.index(picture.species) for picture in chosen]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return a picture as the transform makes it, and its label."""
        image = read_picture(self.paths[index])
        if self.transform:
            image = self.transform(image)
        return image, self.labels[index]


def pictures_divided_by_folder(root: Path) -> list[PictureFile]:
    """Return the pictures below ``train``, ``val`` and ``test``, which are their splits."""
    return [
        PictureFile(path, species_of(path.relative_to(root / split), root), split)
        for split in SPLITS
        for path in find_pictures(root / split)
    ]


def pictures_divided_by_hash(root: Path) -> list[PictureFile]:
    """Return the pictures below ``root``, each with the split that its path falls into."""
    pictures = []
    for path in find_pictures(root):
        name = path.relative_to(root)
        pictures.append(PictureFile(path, species_of(name, root), split_of(name.as_posix())))
    return pictures


def species_of(name: Path, root: Path) -> str:
    """Return what a picture shows: its subfolder or, where it lies in none, the whole folder."""
    return name.parent.as_posix() if len(name.parts) > 1 else root.name


def split_of(name: str) -> str:
    """Return the split that a picture's path below the folder falls into."""
    name = unicodedata.normalize("NFC", name)  # Macs write an umlaut as two characters
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    share = int.from_bytes(digest[:4], "big") / 2**32  # from 0 to 1
    if share < 0.8:
        return "train"
    return "val" if share < 0.9 else "test"


def find_pictures(root: Path) -> list[Path]:
    """Return the files below ``root`` whose endings are those of pictures, in order.

    What is hidden, or in a hidden folder, is passed over. So is HEIC where nothing reads it, with a
    warning.
    """
    can_read_heic = read_heic()
    seen = [path for path in root.rglob("*") if not is_hidden(path.relative_to(root))]
    heic = [path for path in seen if path.suffix.lower() in (".heic", ".heif")]
    if heic and not can_read_heic:
        how = "pip install pillow-heif reads them"
        print(f"warning: HEIC pictures passed over: {len(heic)} ({how})", file=sys.stderr)
    endings = picture_endings()
    return sorted(path for path in seen if path.suffix.lower() in endings and path.is_file())


def is_hidden(name: Path) -> bool:
    """Return whether a file, or a folder on the way to it, has a name that begins with a dot."""
    return any(part.startswith(".") for part in name.parts)


def picture_endings() -> set[str]:
    """Return the endings, such as ``.jpg``, of the kinds of files that Pillow reads."""
    endings = Image.registered_extensions()
    return {ending for ending, kind in endings.items() if kind in Image.OPEN}
