import os
import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import seeded
from pictures import fill
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms
from torchvision.datasets import FakeData, ImageFolder
from torchvision.transforms import Compose, Resize, ToTensor, v2

from datasets.errors import DamagedPicture, UserError
from datasets.folder import PictureFolder
from datasets.labels import as_text
from datasets.memory import InMemory

SMALL = Compose([Resize((8, 8)), ToTensor()])


class Listed(Dataset):
    """The given pairs of an image and a label; an exception in the place of a pair is raised."""

    def __init__(self, *pairs: object) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int):
        if isinstance(self.pairs[index], Exception):
            raise self.pairs[index]
        return self.pairs[index]


class Squares(Dataset):
    """Pictures of 8-bit noise with a transform, labelled with their index."""

    def __init__(self, transform, count: int = 12) -> None:
        self.transform = transform
        self.pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int):
        return self.transform(Image.fromarray(self.pixels[index])), index


def noise(count: int, channels: int = 3) -> Listed:
    """Images of 8-bit noise, labelled with their index."""
    with seeded():
        pixels = torch.randint(0, 256, (count, channels, 8, 6)) / 255
    return Listed(*zip(pixels, range(count), strict=True))


def read(dataset: Dataset) -> InMemory:
    return InMemory(dataset, progress=False)


# The same pairs.


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pairs_come_back_as_the_data_set_gives_them(channels):
    dataset = noise(70, channels)
    pictures = read(dataset)
    assert pictures[3][0].shape == (channels, 8, 6)
    assert pictures.labels == list(range(70))
    assert all(torch.equal(image, dataset[label][0]) for image, label in pictures)
    assert torch.equal(pictures[-1][0], dataset[69][0])


def test_batches_are_all_images_in_order_and_channels_last():
    dataset = noise(70)
    batches = list(read(dataset).batches(32))
    assert [len(batch) for batch in batches] == [32, 32, 6]
    assert torch.equal(torch.cat(batches), torch.stack([image for image, _ in dataset]))
    assert batches[0].is_contiguous(memory_format=torch.channels_last)


def test_pixels_are_bytes_with_the_channels_last():
    pictures = read(Squares(ToTensor()))
    assert pictures.pixels.dtype == torch.uint8
    assert np.array_equal(pictures.pixels, Squares(ToTensor()).pixels)


def test_a_loader_gives_batches_of_images_and_their_labels():
    pictures = read(noise(150))
    images, labels = zip(*DataLoader(pictures, 64, shuffle=True), strict=True)
    assert [each.shape for each in images] == [(n, 3, 8, 6) for n in (64, 64, 22)]
    labels = torch.cat(labels)
    assert torch.equal(torch.cat(images), pictures.images(labels))
    assert sorted(labels.tolist()) == list(range(150)) != labels.tolist()


def test_a_data_sets_name_and_classes_stay():
    dataset = noise(2)
    assert (read(dataset).name, read(dataset).classes) == ("Listed", None)
    dataset.classes = ["lily", "rose"]
    assert read(dataset).classes == ["lily", "rose"]


def test_numpys_numbers_become_pythons():
    labels = read(Listed((ONE, np.int64(3)), (ONE, np.float32(0.5)))).labels
    assert labels == [3, 0.5]
    assert [type(label) for label in labels] == [int, float]


@pytest.mark.parametrize("label", [{"species": 1}, torch.tensor(3), None, (1, 2), "rose"])
def test_other_labels_come_back_as_they_were(label):
    assert read(Listed((ONE, label), (ONE, label))).labels == [label, label]


def test_a_data_set_of_images_alone_is_taken():
    pictures = read(Listed(ONE, ONE / 2))
    assert pictures.labels == [None, None]
    assert pictures[1][0].max() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("labels", [(None, None), (torch.zeros(2), torch.zeros(3)), (1, "rose")])
def test_a_loader_gets_labels_that_make_no_batch_as_text(labels):
    pictures = read(Listed(*((ONE, label) for label in labels)))
    (_, batch), *_ = DataLoader(pictures, batch_size=2)
    assert list(batch) == [as_text(label) for label in labels]
    assert all(kept is label for kept, label in zip(pictures.labels, labels, strict=True))


def test_a_part_of_a_data_set_has_its_name_and_classes():
    dataset = noise(5)
    dataset.classes = ["lily", "rose"]
    pictures = read(Subset(Subset(dataset, [1, 2, 4]), [0, 2]))
    assert (pictures.name, pictures.classes) == ("Listed", ["lily", "rose"])
    assert pictures.labels == [1, 4]


# What is refused.


ONE = torch.ones(3, 4, 4)
SHAPES = r"Listed has another shape, \{\(., 4, 4\), \(., 4, 4\)\}: its transform needs a Resize"


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "Listed has no pictures that can be read: at least one is needed"),
        ([(Image.new("RGB", (4, 4)), 0)], "picture 0 of Listed is no tensor as ToTensor"),
        ([(ONE, 0), (ONE.byte(), 0)], "picture 1 of Listed is no tensor as"),
        ([(ONE, 0), (ONE[:1], 0)], SHAPES),
        ([(ONE, 0), (2 * ONE, 0)], r"picture 1 of Listed has values outside of \[0, 1\]"),
        ([(-ONE, 0)], "picture 0 of Listed has values outside of"),
        ([(ONE * float("nan"), 0)], "picture 0 of Listed has values outside of"),
    ],
)
def test_what_is_no_data_set_of_pictures_is_refused_in_one_line(pairs, message):
    with pytest.raises(UserError, match=message) as error:
        read(Listed(*pairs))
    assert "\n" not in str(error.value)


def test_an_error_in_a_transform_keeps_its_traceback():
    def slip(image):
        raise AttributeError("no such thing")

    with pytest.raises(AttributeError, match="no such thing"):
        read(Squares(slip))


# Damaged pictures.


@pytest.mark.parametrize("place", [0, 1, 2])
def test_damaged_pictures_are_named_and_left_out_wherever_they_stand(place, capsys):
    pairs = [(ONE * index / 3, index) for index in range(3)]
    pairs[place] = DamagedPicture("odd.jpg does not exist")
    pictures = read(Listed(*pairs))
    left = [index for index in range(3) if index != place]
    assert pictures.labels == left
    assert (3 * pictures.images(slice(None))[:, 0, 0, 0]).tolist() == pytest.approx(left)
    assert capsys.readouterr().err == "warning: odd.jpg does not exist: it is left out\n"


def test_a_data_set_of_damaged_pictures_only_is_refused():
    with pytest.raises(UserError, match="Listed has no pictures that can be read"):
        read(Listed(DamagedPicture("a"), DamagedPicture("b")))


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("damage", ["truncated", "no picture"])
def test_a_damaged_picture_of_torchvisions_classes_is_named_by_its_file(tmp_path, number, damage):
    fill(tmp_path, *(f"rose/{name}.png" for name in range(5)))
    path = tmp_path / "rose" / f"{number}.png"
    path.write_bytes(path.read_bytes()[:-50] if damage == "truncated" else b"no picture")
    with pytest.raises(UserError, match=f"^{path} cannot be read as a picture: "):
        read(ImageFolder(str(tmp_path), transform=SMALL))


# Random numbers.


def numpy_noise(image: Image.Image) -> Image.Image:
    return image.rotate(np.random.normal())


def python_noise(image: Image.Image) -> Image.Image:
    return image.rotate(random.uniform(-9, 9))


DRAWING = [
    transforms.RandomHorizontalFlip(),
    transforms.RandomResizedCrop(8),
    transforms.ColorJitter(0.5),
    transforms.RandomApply([transforms.Grayscale(3)], p=0.01),
    transforms.TrivialAugmentWide(),
    v2.RandomHorizontalFlip(),
    numpy_noise,
    python_noise,
]
STEADY = [
    transforms.Resize((8, 8)),
    transforms.CenterCrop(6),
    transforms.Grayscale(),
    v2.Resize((8, 8)),
    v2.CenterCrop(6),
    v2.Grayscale(),
    v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ToPILImage()]),
]


def name_of(transform) -> str:
    return getattr(
        transform, "__name__", f"{type(transform).__module__}.{type(transform).__name__}"
    )


def random_states() -> tuple:
    name, numbers, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), name, numbers.tolist(), rest


@pytest.mark.parametrize("transform", DRAWING, ids=name_of)
def test_a_transform_that_draws_random_numbers_is_refused(transform):
    before = random_states()
    with pytest.raises(UserError, match="the transform of Squares draws random numbers") as error:
        read(Squares(Compose([transform, ToTensor()])))
    assert "\n" not in str(error.value)
    assert random_states() == before


@pytest.mark.parametrize("transform", STEADY, ids=name_of)
def test_a_transform_that_draws_none_is_taken(transform):
    before = random_states()
    assert len(read(Squares(Compose([transform, ToTensor()])))) == 12
    assert random_states() == before


def test_the_line_of_code_in_the_refusal_does_it():
    with pytest.raises(UserError) as error:
        read(Squares(Compose([transforms.RandomHorizontalFlip(), ToTensor()])))
    code = str(error.value).partition("in the training loop: ")[2]
    images = torch.rand(4, 3, 8, 8)
    names = {"torch": torch, "train_features": images, "change": transforms.RandomVerticalFlip(1)}
    exec(code, names)
    assert torch.equal(names["train_features"], images.flip(-2))


def test_a_drawing_transform_is_refused_after_a_damaged_picture():
    class Damaged(Squares):
        def __getitem__(self, index: int):
            if index == 0:
                raise DamagedPicture("odd.jpg does not exist")
            return super().__getitem__(index)

    with pytest.raises(UserError, match="draws random numbers"):
        read(Damaged(Compose([transforms.RandomHorizontalFlip(), ToTensor()])))


class DrawsFor:
    """A transform that draws a number for the pictures of one colour only."""

    def __init__(self, colour: tuple[int, int, int]) -> None:
        self.colour = colour

    def __call__(self, image: Image.Image) -> torch.Tensor:
        if image.getpixel((0, 0)) == self.colour:
            random.random()
        return ToTensor()(image)


def test_a_transform_that_draws_for_a_late_picture_only_is_refused(tmp_path):
    """One after the other and in threads; and nothing of it is kept for the next run."""
    squares = Squares(None)
    last = tuple(squares.pixels[-1, 0, 0].tolist())
    squares.transform = DrawsFor(last)
    for index, pixels in enumerate(squares.pixels):
        for split in ("train", "val", "test"):
            path = tmp_path / split / f"{index:02d}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(pixels).save(path)
    files = PictureFolder(tmp_path, transform=DrawsFor(last))
    for dataset in (squares, files, files):
        with pytest.raises(UserError, match="draws random numbers"):
            read(dataset)


def test_a_data_set_that_gives_its_random_numbers_back_is_taken():
    fake = FakeData(5, (3, 8, 8), transform=ToTensor())
    assert len(read(fake)) == 5


# Threads.


class OneFile(Dataset):
    """Pictures of one colour each, that lie in one open file one after the other."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(b"".join(bytes([value]) * 48 for value in range(60)))
        self.file = path.open("rb")

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int):
        self.file.seek(48 * index)
        time.sleep(0.0005)  # where threads would take turns
        pixels = np.frombuffer(self.file.read(48), np.uint8).reshape(4, 4, 3).copy()
        return ToTensor()(pixels), index


def test_a_class_with_one_open_file_gets_each_picture_right(tmp_path):
    dataset = OneFile(tmp_path / "all")
    with dataset.file:
        assert read(dataset).pixels[:, 0, 0, 0].tolist() == list(range(60))


class NotesThread:
    """A transform that notes in which threads it is called."""

    def __init__(self) -> None:
        self.threads: set[int] = set()

    def __call__(self, image: Image.Image) -> torch.Tensor:
        self.threads.add(threading.get_ident())
        time.sleep(0.002)
        return SMALL(image)


@pytest.mark.parametrize("kind", [PictureFolder, ImageFolder])
def test_pictures_that_are_files_of_their_own_are_read_in_threads(tmp_path, kind):
    names = [f"{split}/{name}.png" for split in ("train", "val", "test") for name in range(10)]
    transform = NotesThread()
    dataset = kind(str(fill(tmp_path, *names)), transform=transform)
    pictures = read(dataset)
    assert len(transform.threads) > 1
    assert all(torch.equal(pictures[i][0], dataset[i][0]) for i in range(len(dataset)))


def test_another_class_is_read_in_one_thread(tmp_path):
    class Mine(ImageFolder):
        """A reader's own, which may hold anything open."""

    transform = NotesThread()
    read(Mine(str(fill(tmp_path, "rose/1.png", "rose/2.png", "lily/1.png")), transform=transform))
    assert transform.threads == {threading.get_ident()}


# Memory.


class Many(Dataset):
    """Many small pictures, 132 MiB in one array."""

    def __init__(self) -> None:
        self.pixels = np.random.default_rng(0).integers(0, 256, (20_000, 3, 48, 48), np.uint8)

    def depends_on(self) -> list[Path]:
        return []  # so that it is kept on disk

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int):
        return torch.from_numpy(self.pixels[index]) / 255, index


STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def memory_of_process(kind: str) -> int:
    """Bytes that this process has ("VmRSS"), or had at the most ("VmHWM")."""
    (line,) = [each for each in STATUS.read_text().splitlines() if each.startswith(kind)]
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(not os.access(RESET, os.W_OK), reason="only Linux tells memory's peak")
def test_reading_keeping_and_loading_take_little_more_memory_than_the_pixels(cache_folder):
    dataset = Many()
    for wanted in ("read and kept", "loaded"):
        RESET.write_text("5")  # the peak begins anew
        before = memory_of_process("VmRSS")
        pictures = read(dataset)
        peak = memory_of_process("VmHWM") - before
        assert peak < 1.3 * dataset.pixels.nbytes, wanted
        del pictures
    assert len(list(cache_folder.iterdir())) == 1


def test_a_damaged_picture_in_a_part_of_a_data_set_is_named_by_its_file(tmp_path):
    fill(tmp_path, *(f"rose/{name}.png" for name in range(5)))
    path = tmp_path / "rose" / "3.png"
    path.write_bytes(b"no picture")
    with pytest.raises(UserError, match=f"^{path} cannot be read as a picture: "):
        read(Subset(ImageFolder(str(tmp_path), transform=SMALL), [4, 3]))
