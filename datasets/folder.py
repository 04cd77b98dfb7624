"""A folder of pictures as a data set: the reader's own."""

import hashlib
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from datasets.preprocessing import UserError, read_heic, read_picture


class PictureFolder(Dataset):
    """All pictures below a folder, at any depth, with their subfolders as labels.

    Subfolders ``train``, ``val`` and ``test`` are the splits where all three are there. Else each
    picture goes to one (80, 10 and 10 %) by a hash of its path below the folder, so that it stays
    there when others are added, and on every machine. What is no picture is passed over. The
    transform is applied to upright RGB images. ``UserError`` if the split has no pictures.
    """

    def __init__(
        self, root: Path | str, split: str = "train", transform: Callable[..., Any] | None = None
    ) -> None:
        root = Path(root)
        self._split, self.transform = split, transform
        splits = [root / each for each in ("train", "val", "test")]
        missing = [each.name for each in splits if not each.is_dir()]
        if len(missing) in (1, 2) and split == "train":  # once, not for each split
            given = f"{root} has no subfolder {' and '.join(missing)}"
            print(f"warning: {given}: its pictures are divided anew", file=sys.stderr)
        pictures = []  # of all splits, so that a label means the same in each
        for top in [root] if missing else splits:
            for path in find_pictures(top):
                name = path.relative_to(top)
                species = name.parent.as_posix() if len(name.parts) > 1 else root.name
                pictures.append((path, species, split_of(name.as_posix()) if missing else top.name))
        self.classes = sorted({species for _, species, _ in pictures})
        self.paths = [path for path, _, place in pictures if place == split]
        self.labels = [self.classes.index(label) for _, label, place in pictures if place == split]
        if not self.paths:
            given = f"{root} has {len(pictures)} pictures, none of them for the {split} split"
            raise UserError(f"{given}: some 30 are needed, or subfolders train, val and test")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return a picture as the transform makes it, and its label."""
        image = read_picture(self.paths[index])
        return self.transform(image) if self.transform else image, self.labels[index]


def split_of(name: str) -> str:
    """Return the split that a picture's path below the folder falls into."""
    name = unicodedata.normalize("NFC", name)  # Macs write an umlaut as two characters
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    share = int.from_bytes(digest[:4], "big") / 2**32
    return "train" if share < 0.8 else "val" if share < 0.9 else "test"


def find_pictures(root: Path) -> list[Path]:
    """Return the files below ``root`` whose endings are those of pictures, in order."""
    heic = read_heic()
    endings = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    below = (path.relative_to(root).parts for path in root.rglob("*"))
    files = [root.joinpath(*parts) for parts in below if not any(p[0] == "." for p in parts)]
    passed_over = sum(path.suffix.lower() in (".heic", ".heif") for path in files)
    if passed_over and not heic:
        how = "pip install pillow-heif reads them"
        print(f"warning: HEIC pictures passed over: {passed_over} ({how})", file=sys.stderr)
    return sorted(path for path in files if path.suffix.lower() in endings and path.is_file())
