"""What the tests of data sets share: folders of pictures."""

from pathlib import Path

import pytest
from helpers import write_photograph


def fill(folder: Path, *names: str) -> Path:
    """Write another picture for each name below a folder."""
    for seed, name in enumerate(names):
        write_photograph(folder / name, seed=seed)
    return folder


def link(path: Path, target: Path) -> None:
    """Make a link; the test is skipped on systems where only administrators may."""
    try:
        path.symlink_to(target, target_is_directory=target.is_dir())
    except OSError:
        pytest.skip("this system makes no links")
