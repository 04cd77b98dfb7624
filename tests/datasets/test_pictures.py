import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.datasets import Flowers102
from torchvision.transforms import Compose, Resize, ToTensor
from torchvision.transforms.functional import to_tensor

from datasets import flowers102
from datasets.pictures import Pictures, ShuffledBatches, augment, load_splits, shuffled_loader
from datasets.synthetic import draw_flowers, flower_labels


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(count: int, size: int = 8) -> Pictures:
    """Pictures of random pixels, labelled with their index."""
    pixels = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=seeded())
    return Pictures(pixels, torch.arange(count))


# Pictures.


def test_images_are_to_tensor_of_the_pixels_bit_for_bit():
    every_value = torch.arange(256 * 3, dtype=torch.int64).remainder(256).to(torch.uint8)
    pictures = Pictures(every_value.reshape(1, 16, 16, 3), torch.zeros(1, dtype=torch.int64))
    assert torch.equal(pictures[0][0], to_tensor(pictures.pixels[0].numpy()))


def test_one_index_a_slice_and_a_tensor_of_indices_give_the_same_images():
    pictures = numbered(9)
    images, labels = pictures[torch.tensor([7, 2])]
    assert (images.shape, labels.tolist()) == ((2, 3, 8, 8), [7, 2])
    assert torch.equal(images[0], pictures[7][0])
    assert torch.equal(images[1], pictures[2:3][0][0])
    assert pictures[7][1] == 7


def test_batches_of_images_lie_channels_last_in_memory():
    assert numbered(9)[:4][0].is_contiguous(memory_format=torch.channels_last)


def test_reading_images_leaves_the_pixels_as_they_are():
    pictures = numbered(3)
    before = pictures.pixels.clone()
    pictures[:][0].zero_()
    assert torch.equal(pictures.pixels, before)


def test_batches_go_through_all_images_in_order():
    pictures = numbered(10)
    batches = list(pictures.batches(4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert torch.equal(torch.cat(batches), pictures[:][0])


def test_pictures_go_to_a_device_whole():
    moved = numbered(3).to("meta")
    assert moved.pixels.device.type == moved.labels.device.type == "meta"


@pytest.mark.parametrize(
    ("pixels", "labels"),
    [
        (torch.zeros(5, 8, 8, 3), torch.zeros(5)),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), torch.zeros(8)),
        (torch.zeros(5, 8, 8, 3, dtype=torch.uint8), torch.zeros(4)),
        (torch.zeros(5, 8, 8, 3, dtype=torch.uint8), torch.zeros(5, 1)),
    ],
)
def test_pixels_and_labels_that_do_not_fit_are_refused(pixels, labels):
    with pytest.raises(ValueError) as error:
        Pictures(pixels, labels)
    assert f"{list(pixels.shape)} of {pixels.dtype}" in str(error.value)
    assert "[n, height, width, channels] of torch.uint8 and [n]" in str(error.value)


# Batches.


@pytest.mark.parametrize(("count", "size"), [(20, 8), (16, 8), (5, 64), (7, 1)])
def test_an_epoch_has_every_index_once(count, size):
    batches = ShuffledBatches(numbered(count), size, seeded())
    indices = list(batches)
    assert len(indices) == len(batches)
    assert [len(batch) for batch in indices[:-1]] == [size] * (len(batches) - 1)
    assert sorted(torch.cat(indices).tolist()) == list(range(count))


def test_epochs_differ_and_a_seed_repeats_them():
    def epochs(seed: int) -> list[list[int]]:
        batches = ShuffledBatches(numbered(50), 8, seeded(seed))
        return [torch.cat(list(batches)).tolist() for _ in range(3)]

    first, second, third = epochs(1)
    assert list(range(50)) != first != second != third != first
    assert epochs(1) == [first, second, third]
    assert epochs(2)[0] != first


@pytest.mark.parametrize(("batch_size", "sizes"), [(64, [64, 64, 22]), (5, [5] * 30)])
def test_the_loader_gives_whole_batches_of_images_and_their_labels(batch_size, sizes):
    pictures = numbered(150)
    loader = shuffled_loader(pictures, batch_size, seeded())
    assert len(loader) == len(sizes)
    seen = []
    for (images, labels), size in zip(loader, sizes, strict=True):
        assert images.shape == (size, 3, 8, 8)
        assert torch.equal(images, pictures[labels][0])
        seen += labels.tolist()
    assert sorted(seen) == list(range(150))


def test_the_loader_takes_its_order_from_its_generator_alone():
    def order(generator: torch.Generator) -> list[int]:
        return [
            index for _, labels in shuffled_loader(numbered(30), 8, generator) for index in labels
        ]

    before = torch.get_rng_state()
    assert order(seeded(1)) == order(seeded(1)) != order(seeded(2))
    assert torch.equal(torch.get_rng_state(), before)


# augment().


def mirrored_and_shifted(image: Tensor, mirror: bool, down: int, right: int) -> Tensor:
    """One image as NumPy moves it, its edges repeated."""
    margin = max(abs(down), abs(right))
    image = image.numpy()[:, :, ::-1] if mirror else image.numpy()
    padded = np.pad(image, ((0, 0), (margin, margin), (margin, margin)), mode="edge")
    _, height, width = image.shape
    rows, columns = margin - down, margin - right
    return torch.from_numpy(padded[:, rows : rows + height, columns : columns + width].copy())


def test_each_image_is_mirrored_or_not_and_shifted_with_its_edges_repeated():
    image = torch.rand(3, 6, 7, generator=seeded())
    moves = [(m, d, r) for m in (False, True) for d in (-1, 0, 1) for r in (-1, 0, 1)]
    moved = torch.stack([mirrored_and_shifted(image, *move) for move in moves])
    augmented = augment(image.expand(1800, 3, 6, 7), 1, seeded(1))
    same = (augmented[:, None] == moved).all(dim=(2, 3, 4))
    assert (same.sum(dim=1) == 1).all()
    # Each of the 18 moves about 100 times in 1,800: five standard deviations are 49.
    counts = same.sum(dim=0)
    assert counts.min() > 50
    assert counts.max() < 150


def test_a_shift_of_0_only_mirrors():
    images = torch.rand(40, 3, 4, 6, generator=seeded())
    augmented = augment(images, 0, seeded(1))
    mirrored = torch.tensor([not torch.equal(a, b) for a, b in zip(images, augmented, strict=True)])
    assert torch.equal(augmented[mirrored], images[mirrored].flip(-1))
    assert 5 < mirrored.sum() < 35


def test_augmented_images_keep_shape_precision_and_memory_format():
    images = torch.rand(2, 3, 8, 16, dtype=torch.float64).to(memory_format=torch.channels_last)
    augmented = augment(images, 3, seeded())
    assert (augmented.shape, augmented.dtype) == (images.shape, images.dtype)
    assert augmented.is_contiguous(memory_format=torch.channels_last)


def test_augmentation_repeats_with_its_generator():
    images = torch.rand(20, 3, 8, 8, generator=seeded())
    assert torch.equal(augment(images, 2, seeded(1)), augment(images, 2, seeded(1)))
    assert not torch.equal(augment(images, 2, seeded(1)), augment(images, 2, seeded(2)))


# load_splits().


def test_flowers_on_disk_are_loaded_as_torchvision_loads_them(data_root):
    splits = load_splits("flowers102", data_root, (32, 32), progress=False)
    assert (splits.dataset, splits.fallback) == ("flowers102", None)
    transform = Compose([Resize((32, 32)), ToTensor()])
    for name, size in (("train", 20), ("val", 6), ("test", 34)):
        expected = Flowers102(data_root, name, transform=transform)
        pictures = getattr(splits, name)
        assert len(pictures) == len(expected) == size
        for (image, label), (posts_image, posts_label) in zip(pictures, expected, strict=True):
            assert torch.equal(image, posts_image)
            assert label == posts_label


def test_auto_takes_flowers_on_disk_and_asks_no_server(data_root, server):
    assert load_splits("auto", data_root, (8, 8), progress=False).dataset == "flowers102"
    assert server.asked_for == []


def test_auto_downloads_what_is_not_on_disk(server, tmp_path):
    splits = load_splits("auto", tmp_path, (8, 8), progress=False)
    assert (splits.dataset, splits.fallback) == ("flowers102", None)
    assert flowers102.is_on_disk(tmp_path)


def test_auto_takes_synthetic_flowers_where_no_server_is_and_says_why(no_server, tmp_path):
    splits = load_splits("auto", tmp_path, (8, 8), progress=False)
    assert splits.dataset == "synthetic"
    assert str(tmp_path) in splits.fallback
    assert no_server in splits.fallback
    assert "refused" in splits.fallback
    assert not list(tmp_path.iterdir())


def test_flowers102_fails_where_no_server_is_and_says_what_to_do(no_server, tmp_path):
    with pytest.raises(ValueError) as error:
        load_splits("flowers102", tmp_path, (8, 8), progress=False)
    for part in (no_server, str(tmp_path / "flowers-102"), "--data-root", "--dataset synthetic"):
        assert part in str(error.value)
    assert not list(tmp_path.iterdir())


def test_synthetic_flowers_need_no_server_and_are_no_fallback(server, tmp_path):
    splits = load_splits("synthetic", tmp_path, (8, 16), progress=False)
    assert (splits.dataset, splits.fallback) == ("synthetic", None)
    assert server.asked_for == []
    assert [len(pictures) for pictures in splits[:3]] == [1020, 1020, 6149]
    assert np.array_equal(splits.val.pixels[-3:], draw_flowers("val", (8, 16), range(1017, 1020)))
    assert np.array_equal(splits.test.labels, flower_labels("test"))


def test_an_unknown_data_set_is_refused():
    with pytest.raises(ValueError, match="'mnist': one of auto, flowers102, synthetic"):
        load_splits("mnist")


@pytest.mark.parametrize("dataset", ["auto", "flowers102"])
def test_a_data_root_that_cannot_be_written_to_is_refused(server, tmp_path, dataset):
    (tmp_path / "data").write_text("a file where the folder should be")
    with pytest.raises(ValueError, match=f"cannot be kept in {tmp_path / 'data'}.*--data-root"):
        load_splits(dataset, tmp_path / "data", (8, 8), progress=False)


@pytest.mark.parametrize("dataset", ["auto", "flowers102"])
def test_damaged_flowers_are_an_error_and_no_reason_to_fall_back(data_root, no_server, dataset):
    picture = data_root / "flowers-102" / "jpg" / "image_00008.jpg"
    picture.write_bytes(picture.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"image_00008\.jpg cannot be read as a picture"):
        load_splits(dataset, data_root, (8, 8), progress=False)


def test_a_picture_that_is_missing_is_named(data_root):
    (data_root / "flowers-102" / "jpg" / "image_00009.jpg").unlink()
    with pytest.raises(ValueError, match=r"image_00009\.jpg does not exist"):
        load_splits("auto", data_root, (8, 8), progress=False)


def test_a_picture_that_changed_on_disk_is_decoded_anew(data_root, cache_folder):
    before = load_splits("auto", data_root, (8, 8), progress=False)
    jpg = data_root / "flowers-102" / "jpg"
    (jpg / "image_00014.jpg").write_bytes((jpg / "image_00008.jpg").read_bytes())
    after = load_splits("auto", data_root, (8, 8), progress=False)
    changed = sum(
        not torch.equal(one, other)
        for old, new in zip(before[:3], after[:3], strict=True)
        for one, other in zip(old.pixels, new.pixels, strict=True)
    )
    assert changed == 1


def test_each_split_and_size_is_kept_in_a_file_of_its_own(data_root, cache_folder):
    for size in ((8, 8), (16, 8), (8, 8)):
        load_splits("auto", data_root, size, progress=False)
    names = sorted(path.name.rsplit("-", 1)[0] for path in cache_folder.iterdir())
    assert names == [
        f"flowers102-{split}-{size}"
        for split in ("test", "train", "val")
        for size in ("16x8", "8x8")
    ]
