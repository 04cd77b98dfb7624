"""Which pictures lie below a folder, and what else lies there."""

import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from pathlib import Path

from PIL import Image

from datasets.errors import DamagedPicture
from datasets.preprocessing import HEIC_ENDINGS, open_picture, read_heic

# What systems and network drives leave in folders, besides what is hidden, in small letters.
LEFTOVERS = {
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "@eadir",  # thumbnails of every picture
    "@recycle",
    "__macosx",
    "desktop.ini",
    "ehthumbs.db",
    "icon\r",
    "lost+found",
    "system volume information",
    "thumbs.db",
}
# Kinds of files that Pillow tells apart, but has no picture of.
WITHOUT_PICTURE = {"BUFR", "GRIB", "HDF5", "MPEG"}
MOST_KINDS = 10  # that a line names


def find_pictures(root: Path) -> tuple[list[Path], Counter[str]]:
    """Return the pictures below a folder, in order, and what was passed over: how many of a kind.

    Pictures are the files with the ending of a kind that Pillow reads, and those without an ending
    that it opens. What systems leave behind is neither a picture nor passed over.
    """
    files, passed_over = files_below(root)
    can_read_heic = read_heic()
    endings = picture_endings()
    pictures = []
    for path in files:
        ending = path.suffix.lower()
        if ending in endings or (not ending and can_be_opened(path)):
            pictures.append(path)
        elif ending in HEIC_ENDINGS and not can_read_heic:
            passed_over[f"{ending} (pip install pillow-heif reads them)"] += 1
        else:
            passed_over[ending or "without an ending"] += 1
    return sorted(pictures), passed_over


def files_below(root: Path) -> tuple[list[Path], Counter[str]]:
    """Return the files below a folder, each once, and what of links and folders gave none.

    Links are followed after all else, so that a loop of links ends, and a file that lies below the
    folder has its own name, whatever leads to it as well.
    """
    files: list[Path] = []
    passed_over: Counter[str] = Counter()
    seen: set[str] = set()  # files and folders by their real names, in which there are no links
    ways = deque([str(root)])  # the folder, and the links in it
    while ways:
        way = ways.popleft()
        real_name = os.path.realpath(way)
        if real_name in seen:
            passed_over["linked twice"] += 1
        elif os.path.isdir(way):
            for path, real_name in entries_below(way, seen, passed_over):
                if os.path.islink(path):
                    ways.append(path)
                elif real_name in seen:
                    passed_over["linked twice"] += 1
                elif os.path.isfile(path):
                    seen.add(real_name)
                    files.append(Path(path))
        elif os.path.isfile(way):
            seen.add(real_name)
            files.append(Path(way))
        else:
            passed_over["linked to nothing"] += 1
    return files, passed_over


def entries_below(
    folder: str, seen: set[str], passed_over: Counter[str]
) -> Iterator[tuple[str, str]]:
    """Yield the files and links at any depth below a folder, each with the name of its real place.

    Links are not followed, and folders in ``seen`` not entered; the others are added to it.
    """

    def count(_: OSError) -> None:
        passed_over["that may not be opened"] += 1

    # Links are taken out of the folders to enter. (Without followlinks, Windows' junctions, which
    # are no links to Python, would be left out on the way.)
    for place, folders, files in os.walk(folder, onerror=count, followlinks=True):
        real_place = os.path.realpath(place)
        if real_place in seen:
            folders.clear()
            continue
        seen.add(real_place)
        folders[:] = sorted(name for name in folders if not is_leftover(name))
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        for name in sorted(links + [name for name in files if not is_leftover(name)]):
            yield os.path.join(place, name), os.path.join(real_place, name)
        folders[:] = [name for name in folders if name not in links]


def is_leftover(name: str) -> bool:
    """Return whether a file or folder is hidden, or was left there by a system."""
    return name.startswith(".") or name.lower() in LEFTOVERS


def picture_endings() -> set[str]:
    """Return the endings, such as ``.jpg``, of the kinds of files that Pillow reads."""
    endings = Image.registered_extensions()
    readable = Image.OPEN.keys() - WITHOUT_PICTURE
    return {ending for ending, kind in endings.items() if kind in readable}


def can_be_opened(path: Path) -> bool:
    """Return whether Pillow takes a file for a picture, which its first bytes tell."""
    try:
        open_picture(path).close()
    except DamagedPicture:
        return False
    return True


def passed_over_text(passed_over: Mapping[str, int]) -> str:
    """Return how many of which kind were passed over: "12 .cr2, 3 .txt", the most first."""
    kinds = sorted(passed_over.items(), key=lambda item: (-item[1], item[0]))
    named, others = kinds[:MOST_KINDS], kinds[MOST_KINDS:]
    if others:
        named.append(("others", sum(count for _, count in others)))
    return ", ".join(f"{count:,} {kind}" for kind, count in named)
