"""What the tests of data sets share: folders of pictures."""

from pathlib import Path

from helpers import write_photograph


def fill(folder: Path, *names: str) -> Path:
    """Write another picture for each name below a folder."""
    for seed, name in enumerate(names):
        write_photograph(folder / name, seed=seed)
    return folder
