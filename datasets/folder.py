"""A folder of pictures as a data set: the reader's own."""

import hashlib
import os
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from datasets.preprocessing import UserError, read_heic, read_picture

SPLITS = ("train", "val", "test")


class PictureFolder(Dataset):
    """All pictures below a folder, at any depth, with their subfolders as labels.

    Subfolders ``train``, ``val`` and ``test`` are the splits where all three are there. Else each
    picture goes to one (80, 10 and 10 %) by a hash of its path below the folder, so that it stays
    there when others are added, and on every machine. What is no picture is passed over.

    Args:
        root: the folder.
        split: ``"train"``, ``"val"`` or ``"test"``.
        transform: applied to each picture, an upright RGB image.

    Raises:
        UserError: if a split has no pictures.
    """

    def __init__(
        self, root: Path | str, split: str = "train", transform: Callable[..., Any] | None = None
    ) -> None:
        self.root, self._split, self.transform = Path(root), split, transform
        divided = all((self.root / each).is_dir() for each in SPLITS)
        tops = {each: self.root / each if divided else self.root for each in SPLITS}
        found = {top: find_pictures(top) for top in tops.values()}
        top = tops[split]
        self.paths = [path for path in found[top] if divided or split_of(path, top) == split]
        if not self.paths:
            raise UserError(
                f"{root} has {len(found[top])} pictures for its {split} split, too few: some 30 "
                "divide by themselves; for fewer, make subfolders train, val and test"
            )
        # Of all splits, so that a label means the same in each.
        self.classes = sorted(
            {self.species(path, t) for t, paths in found.items() for path in paths}
        )
        self.labels = [self.classes.index(self.species(path, top)) for path in self.paths]

    def species(self, path: Path, top: Path) -> str:
        """Return the subfolder of a picture; the folder's own name where it is in none."""
        return path.parent.relative_to(top).as_posix() if path.parent != top else self.root.name

    def __len__(self) -> int:
        """Return the number of pictures in this split."""
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return a picture as the transform makes it, and its label."""
        image = read_picture(self.paths[index])
        return self.transform(image) if self.transform else image, self.labels[index]


def split_of(path: Path, root: Path) -> str:
    """Return the split that a picture's path below the folder falls into."""
    # Macs write an umlaut as two characters, others as one.
    name = unicodedata.normalize("NFC", path.relative_to(root).as_posix())
    share = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:4])
    return "train" if share < 0.8 * 2**32 else "val" if share < 0.9 * 2**32 else "test"


def find_pictures(root: Path) -> list[Path]:
    """Return the files below ``root`` whose endings are those of pictures, in order."""
    heic = read_heic()
    endings = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = [
        Path(folder, name)
        for folder, _, names in os.walk(root)
        for name in names
        if not any(part.startswith(".") for part in Path(folder, name).relative_to(root).parts)
    ]
    passed_over = sum(path.suffix.lower() in (".heic", ".heif") for path in files)
    if passed_over and not heic:
        how = "pip install pillow-heif, and they are read"
        print(f"warning: {passed_over} HEIC pictures are passed over: {how}", file=sys.stderr)
    return sorted(path for path in files if path.suffix.lower() in endings)
