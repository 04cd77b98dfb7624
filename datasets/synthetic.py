"""Flowers drawn with NumPy: the stand-in for Oxford Flowers102 where it cannot be downloaded."""

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from tqdm.contrib.concurrent import thread_map

SPLITS = {"train": 1020, "val": 1020, "test": 6149}  # pictures, as many as in Flowers102
_SEED = 102

# fmt: off
# Colours are percentages of red, green and blue. Those of the petals lie on a circle.
_PETALS = np.array([
    (99, 98, 96), (99, 93, 66), (100, 86, 10), (100, 58, 5), (99, 52, 40),  # white ... salmon
    (92, 11, 9), (70, 3, 18), (97, 25, 50), (100, 68, 80), (88, 25, 74),  # red ... magenta
    (52, 22, 78), (78, 65, 95), (32, 38, 92), (68, 80, 100),  # violet, lilac, blue, pale blue
]) / 100
_DISCS = np.array([(100, 86, 10), (98, 72, 6), (28, 14, 6), (70, 78, 22)]) / 100
_BACKGROUNDS = np.array([  # the dark and the light shade of foliage, shade, soil, sky and meadow
    [(3, 12, 2), (52, 70, 26)], [(0, 1, 1), (14, 24, 10)], [(14, 10, 7), (68, 60, 48)],
    [(30, 50, 80), (90, 95, 98)], [(20, 30, 5), (90, 88, 55)],
]) / 100
# fmt: on


class SyntheticFlowers(Dataset):
    """Flowers of 102 invented species, in splits of the sizes that Flowers102 has.

    The parameters are torchvision's, of which ``root`` and ``download`` mean nothing here. The
    pictures, ``side`` x ``side`` pixels each, are drawn all at once when one is first asked for.
    """

    classes = tuple(map(str, range(102)))

    def __init__(
        self,
        root: Path | str = "",
        split: str = "train",
        transform: Callable[..., Any] | None = None,
        download: bool = False,
        side: int = 32,
    ) -> None:
        self._split, self.transform, self.side = split, transform, side
        self._labels = [number % 102 for number in range(SPLITS[split])]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return a picture as the transform makes it, and its species, 0 to 101."""
        image = Image.fromarray(self._pictures[index])
        return self.transform(image) if self.transform else image, self._labels[index]

    def depends_on(self) -> list[Path]:
        """Return no files: the pictures follow from this code and the parameters."""
        return []

    @cached_property
    def _pictures(self) -> np.ndarray:
        """Draw the split, [n, side, side, 3] uint8 (sRGB), in threads."""
        draw = partial(_draw, _factors(self._split, self._labels), self.side)
        step = max(1, 2**14 // self.side**2)  # arrays of this size stay in the processor's cache
        parts = [slice(start, start + step) for start in range(0, len(self._labels), step)]
        return np.concatenate(thread_map(draw, parts, disable=None, leave=False, desc="Drawing"))


def _species() -> dict[str, np.ndarray]:
    """Invent the species, each property [102]. Radii are shares of the flower's own."""
    rng, n = np.random.default_rng(_SEED), 102

    def some(share: float, low: float, high: float) -> np.ndarray:
        return np.where(rng.random(n) < share, rng.uniform(low, high, n), 0)

    petals = rng.permutation(np.resize([3, 4, 5, 5, 5, 6, 6, 8, 8, 11, 13, 16, 21], n))
    few, lily = petals < 8, petals == 3
    petal_colour = rng.permutation(np.resize(np.arange(len(_PETALS)), n))
    return {
        "petals": petals,  # in a ring
        "rings": np.where(few, 1 + (lily | (rng.random(n) < 0.3)), rng.integers(1, 4, n)),
        "inner": np.where(lily, 0.95, rng.uniform(0.65, 0.8, n)),  # a ring's radius over the last's
        "width": np.where(lily, rng.uniform(0.4, 0.55, n), rng.uniform(0.5, 0.9, n)),  # see _petals
        "roundness": rng.uniform(1, 3, n),  # exponents of a petal's outline, see _petals
        "fullness": np.where(few, rng.uniform(1.2, 2.5, n), rng.uniform(1.2, 3.5, n)),
        "notch": some(0.4, 0.08, 0.2) * few,  # its depth at a petal's tip
        "twist": some(0.3, -0.7, 0.7),  # radians by which a petal swirls
        "cup": rng.uniform(0, 0.8, n),  # the flower's depth
        "throat": np.maximum(some(0.6, 0.2, 0.5), 0.05),  # radius
        "stripe": some(0.3, 0.4, 0.9),  # strength
        "disc": np.where(few, rng.uniform(0.08, 0.17, n), rng.uniform(0.18, 0.38, n)),  # radius
        "petal_colour": petal_colour,  # places on the circle of colours
        "tip_colour": petal_colour + rng.integers(-1, 2, n),
        "throat_colour": rng.choice([0, 2, 6, 10], n),
        "disc_colour": rng.integers(len(_DISCS), size=n),
    }


def _factors(split: str, labels: list[int]) -> dict[str, np.ndarray]:
    """Draw what makes up each picture: numbers [n], colours [3, n], leaves [16, 7, n].

    Points and directions are complex numbers, x + iy, to the right and down.
    """
    n = len(labels)
    rng = np.random.default_rng((_SEED, 1 + [*SPLITS].index(split)))
    f = {name: values[labels] for name, values in _species().items()}
    f |= {
        # Towards where the flower nods, as long as the sine of the angle; and to the light.
        "tilt": rng.uniform(0, 0.7, n) * np.exp(2j * np.pi * rng.random(n)),
        "light": rng.random(n) * np.exp(2j * np.pi * rng.random(n)),
        "centre": [1, 1j] @ rng.uniform(-0.3, 0.3, (2, n)),  # in halves of the side
        "radius": rng.uniform(0.6, 1.1, n),  # the same, before the tilt
        "rotation": rng.uniform(0, 2 * np.pi, n) / f["petals"],  # of the first petal
        "brightness": rng.uniform(0.7, 1.2, n),  # a factor on all values
        "hue": rng.uniform(-0.5, 0.5, n),  # steps of the petals' colours around their circle
        "shades": _BACKGROUNDS[rng.choice(5, n, p=[0.35, 0.2, 0.15, 0.1, 0.2])].transpose(1, 2, 0),
        "background_light": rng.random(n),  # from the dark shade, 0, to the light one, 1
        "leaves": rng.random((16, 7, n)),
        "disc_colour": _DISCS[f["disc_colour"]].T,
    }
    for name in ("petal_colour", "tip_colour", "throat_colour"):
        at = f[name] + f["hue"]
        f[name] = np.stack([np.interp(at, range(14), each, period=14) for each in _PETALS.T])
    single = {True: np.complex64, False: np.float32}
    return {name: values.astype(single[np.iscomplexobj(values)]) for name, values in f.items()}


def _draw(factors: dict[str, np.ndarray], side: int, part: slice) -> np.ndarray:
    """Draw part of the pictures, [n, side, side, 3] uint8; until the end, colours stand first."""
    f = SimpleNamespace(**{name: each[..., part, None, None] for name, each in factors.items()})
    x = (np.arange(side, dtype=np.float32) + 0.5 - side / 2) * (2 / side)
    point = (x + 1j * x[:, None]).astype(np.complex64)

    # Leaves out of focus, and a few petals of other flowers.
    dark, light = f.shades
    picture = _mix(dark, light, f.background_light)
    for x, y, angle, length, width, shade, kind in f.leaves:
        place = (point - 2.8 * (x - 0.5) - 2.8j * (y - 0.5)) * np.exp(1j * np.pi * angle)
        size = (place.real / (0.3 + 0.5 * length)) ** 2 + (place.imag / (0.12 + 0.3 * width)) ** 2
        leaf = _mix(dark, light, 0.6 * shade + 0.4 * f.background_light)
        colour = np.where(kind < 0.08, 0.85 * f.petal_colour, leaf)
        picture = _mix(picture, colour, 0.9 * np.exp(-(size**2)))

    # From the picture to the plane of the flower, in which its radius is 1.
    place = (point - f.centre) / f.radius
    picture = _darken(picture, 0.6 * np.clip(1.3 - np.abs(place + 0.25 * f.light), 0, 1))
    cosine = np.sqrt(1 - np.abs(f.tilt) ** 2)
    stretch = (place * f.tilt.conj()).real / (cosine + cosine**2) - f.cup * np.abs(place)
    f.place, f.pixel = place + stretch * f.tilt, 2 / side / f.radius
    picture = _centre(_petals(picture, f), f)
    light = f.brightness * (1 + 0.25 * (point * f.light.conj()).real)
    return (np.clip(picture * light, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 3, 0)


def _petals(picture: np.ndarray, f: SimpleNamespace) -> np.ndarray:
    """Lay the petals over the picture, ring by ring.

    The outline of a petal is |s| ** roundness + (r / length) ** fullness = 1, with the radius r and
    with s the angle from its axis, 1 at half the petal's width.
    """
    sector = 2 * np.pi / f.petals
    r = np.abs(f.place) + 1e-4
    turn = (np.angle(f.place) - f.rotation + f.twist * r) / sector
    # No petal is wider than two sectors, so that at most two of a ring meet in a pixel.
    for ring, before in np.ndindex(int(f.rings.max()), 2):
        number = np.floor(turn + ring / 2) + 1 - before
        offset = turn + ring / 2 - number
        s = np.abs(offset) / f.width + 1e-4
        # Petals of one flower differ a little in length.
        length = f.inner**ring * (1 + 0.06 * np.sin(2.4 * np.mod(number, f.petals)))
        length = length * (1 - f.notch * np.exp(-((s / 0.35) ** 2)))
        side, end = s**f.roundness, (r / length) ** f.fullness
        slope = np.hypot(f.roundness * side / (s * f.width * sector), f.fullness * end)
        distance = np.where(f.rings > ring, (1 - side - end) * r / slope, -np.inf)

        along = np.minimum(r / length, 1)
        throat = np.clip(1.5 - r / f.throat, 0, 1)
        stripe = f.stripe * np.exp(-((s / 0.3) ** 2)) * np.minimum(1.4 - 1.2 * along, 1)
        colour = _mix(f.petal_colour, f.tip_colour, along**2)
        colour = _mix(colour, f.throat_colour, np.maximum(throat, stripe))
        lit = f.light * np.exp(-1j * (f.rotation + (number - ring / 2) * sector))
        depth = 0.85 + 0.25 * np.minimum(r, 1) - 0.04 * ring
        midrib = 1 - 0.15 * np.exp(-((s / 0.12) ** 2)) - 0.15 * s**2
        shade = depth * midrib * (1 + 0.15 * lit.real + 0.3 * lit.imag * offset)
        shadow = 0.5 * np.clip(1 + distance / 0.15, 0, 1) * (1 - np.abs(offset))
        coverage = np.clip(0.5 + distance / f.pixel, 0, 1)
        picture = _mix(_darken(picture, shadow), colour * shade, coverage)
    return picture


def _centre(picture: np.ndarray, f: SimpleNamespace) -> np.ndarray:
    """Lay the disc with its seeds over the picture."""
    r, angle = np.abs(f.place), np.angle(f.place)
    near = np.minimum(r / f.disc, 2)
    seeds = near * np.sin(6 * angle + 5 * near) * np.sin(6 * angle - 5 * near)
    lit = (f.place * f.light.conj()).real / f.disc
    colour = f.disc_colour * (1.1 - 0.5 * near**2 + 0.25 * seeds + 0.3 * lit)
    picture = _darken(picture, 0.5 * np.clip(2.2 - 1.2 * near, 0, 1))
    return _mix(picture, colour, np.clip(0.5 + (f.disc - r) / f.pixel, 0, 1))


def _mix(one: np.ndarray, other: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Blend two colours by the weight of the other, 0 to 1."""
    return one + (other - one) * weight


def _darken(picture: np.ndarray, shadow: np.ndarray) -> np.ndarray:
    """Cast a shadow, 0 to 1, that spares bright channels as light through petals does."""
    return picture * (1 - shadow * (1 - 0.5 * picture))
