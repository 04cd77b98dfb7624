"""What only the tests of data sets use."""

import sys
from collections.abc import Iterator

import pytest
from PIL import Image

from datasets.preprocessing import read_heic


@pytest.fixture(scope="session", autouse=True)
def _small_pictures() -> None:
    """Nothing here trains, so that training's list of data sets is not needed."""


@pytest.fixture
def no_heic(monkeypatch) -> Iterator[None]:
    """As if the package pillow-heif were not installed."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    endings = {end: kind for end, kind in Image.registered_extensions().items() if kind != "HEIF"}
    monkeypatch.setattr(Image, "EXTENSION", endings)
    monkeypatch.setattr(Image, "ID", [kind for kind in Image.ID if kind != "HEIF"])
    read_heic.cache_clear()
    yield
    read_heic.cache_clear()
