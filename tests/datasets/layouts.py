"""Small data sets in the layouts of torchvision's classes, in the place of downloads.

Each function writes the files of one class below a data root. Where the class knows the checksums
of the real files, ``patch`` gives it those of the small ones, and nothing else is changed.
"""

import bz2
import csv
import hashlib
import json
import pickle
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torchvision.datasets as torchvisions
from helpers import write_photograph
from PIL import Image
from pytest import MonkeyPatch

TRAIN, VAL, TEST = 30, 10, 20  # pictures in the splits that a class has
WHOLE = 40  # pictures of a class that has no splits


def md5(path: Path) -> str:
    """The checksum that torchvision compares."""
    return hashlib.md5(path.read_bytes()).hexdigest()


def pixels(name: str, count: int, *shape: int) -> np.ndarray:
    """Noise of its own for each name, [count, *shape] uint8."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    return generator.integers(0, 256, (count, *shape), np.uint8)


def photograph(path: Path, size: tuple[int, int] = (50, 40)) -> Path:
    """Write a picture, another one for each name of a file and of the folders around it."""
    return write_photograph(path, size, zlib.crc32("/".join(path.parts[-3:]).encode()))


def text(path: Path, *lines: str) -> Path:
    """Write a text file, and the folders that it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def idx(path: Path, array: np.ndarray) -> None:
    """Write an array as MNIST's files are: its type and sizes, big-endian, then its values."""
    kind = {"uint8": 8, "int32": 12}[array.dtype.name]
    path.parent.mkdir(parents=True, exist_ok=True)
    head = np.array([256 * kind + array.ndim, *array.shape], ">i4").tobytes()
    path.write_bytes(head + array.astype(array.dtype.newbyteorder(">")).tobytes())


# Arrays in one file.


def mnist(root: Path, patch: MonkeyPatch, name: str = "MNIST") -> None:
    raw = root / name / "raw"
    for prefix, count in {"train": TRAIN, "t10k": TEST}.items():
        idx(raw / f"{prefix}-images-idx3-ubyte", pixels(prefix, count, 28, 28))
        idx(raw / f"{prefix}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)


def fashion_mnist(root: Path, patch: MonkeyPatch) -> None:
    mnist(root, patch, "FashionMNIST")


def kmnist(root: Path, patch: MonkeyPatch) -> None:
    mnist(root, patch, "KMNIST")


def qmnist(root: Path, patch: MonkeyPatch) -> None:
    for split, count in {"train": TRAIN, "test": TEST}.items():
        prefix = root / "QMNIST" / "raw" / f"qmnist-{split}"
        idx(Path(f"{prefix}-images-idx3-ubyte"), pixels(split, count, 28, 28))
        labels = np.zeros((count, 8), np.int32)
        labels[:, 0] = np.arange(count) % 10
        idx(Path(f"{prefix}-labels-idx2-int"), labels)


def emnist(root: Path, patch: MonkeyPatch) -> None:
    for split, count in {"train": TRAIN, "test": TEST}.items():
        prefix = root / "EMNIST" / "raw" / f"emnist-letters-{split}"
        idx(Path(f"{prefix}-images-idx3-ubyte"), pixels(split, count, 28, 28))
        idx(Path(f"{prefix}-labels-idx1-ubyte"), 1 + np.arange(count, dtype=np.uint8) % 26)


def cifar10(root: Path, patch: MonkeyPatch) -> None:
    cifar(torchvisions.CIFAR10, "labels", root, patch)


def cifar100(root: Path, patch: MonkeyPatch) -> None:
    cifar(torchvisions.CIFAR100, "fine_labels", root, patch)


def cifar(dataset: type, labels: str, root: Path, patch: MonkeyPatch) -> None:
    folder = root / dataset.base_folder
    folder.mkdir()

    def write(name: str, content: object) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return md5(folder / name)

    def batch(name: str, count: int) -> dict[str, object]:
        return {"data": pixels(name, count, 3072), labels: [label % 10 for label in range(count)]}

    parts = [name for name, _ in dataset.train_list]
    train = [[name, write(name, batch(name, TRAIN // len(parts)))] for name in parts]
    test = [[name, write(name, batch(name, TEST))] for name, _ in dataset.test_list]
    names = write(dataset.meta["filename"], {dataset.meta["key"]: [f"kind {n}" for n in range(10)]})
    patch.setattr(dataset, "train_list", train)
    patch.setattr(dataset, "test_list", test)
    patch.setattr(dataset, "meta", dataset.meta | {"md5": names})


def stl10(root: Path, patch: MonkeyPatch) -> None:
    folder, dataset = root / "stl10_binary", torchvisions.STL10
    text(folder / "class_names.txt", *(f"kind {number}" for number in range(10)))
    for split, count in {"train": TRAIN, "test": TEST, "unlabeled": 3}.items():
        (folder / f"{split}_X.bin").write_bytes(pixels(split, count, 3, 96, 96).tobytes())
        (folder / f"{split}_y.bin").write_bytes(bytes(1 + n % 10 for n in range(count)))
    for part in ("train_list", "test_list"):
        names = [name for name, _ in getattr(dataset, part)]
        patch.setattr(dataset, part, [[name, md5(folder / name)] for name in names])


def svhn(root: Path, patch: MonkeyPatch) -> None:
    from scipy.io import savemat

    files = {}
    for split, count in {"train": TRAIN, "test": TEST}.items():
        path = root / f"{split}_32x32.mat"
        labels = 1 + np.arange(count)[:, None] % 10
        savemat(path, {"X": pixels(split, count, 32, 32, 3).transpose(1, 2, 3, 0), "y": labels})
        url, name, _ = torchvisions.SVHN.split_list[split]
        files[split] = [url, name, md5(path)]
    patch.setattr(torchvisions.SVHN, "split_list", torchvisions.SVHN.split_list | files)


def usps(root: Path, patch: MonkeyPatch) -> None:
    for name, count in {"usps.bz2": TRAIN, "usps.t.bz2": TEST}.items():
        rows = pixels(name, count, 256) / 127.5 - 1
        lines = [
            " ".join([str(1 + row % 10), *(f"{n + 1}:{value}" for n, value in enumerate(values))])
            for row, values in enumerate(rows)
        ]
        (root / name).write_bytes(bz2.compress("\n".join(lines).encode()))


def semeion(root: Path, patch: MonkeyPatch) -> None:
    one_hot = np.eye(10, dtype=int)[np.arange(WHOLE) % 10]
    np.savetxt(root / "semeion.data", np.hstack([pixels("all", WHOLE, 256) // 128, one_hot]))
    patch.setattr(torchvisions.SEMEION, "md5_checksum", md5(root / "semeion.data"))


def fer2013(root: Path, patch: MonkeyPatch) -> None:
    files = {}
    for split, count in {"train": TRAIN, "test": TEST}.items():
        path = root / "fer2013" / f"{split}.csv"
        path.parent.mkdir(exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["emotion", "pixels"] if split == "train" else ["pixels"])
            for number, picture in enumerate(pixels(split, count, 48 * 48)):
                row = [" ".join(map(str, picture))]
                writer.writerow([number % 7, *row] if split == "train" else row)
        files[split] = (path.name, md5(path))
    resources = torchvisions.FER2013._RESOURCES | files
    patch.setattr(torchvisions.FER2013, "_RESOURCES", resources)


def pcam(root: Path, patch: MonkeyPatch) -> None:
    import h5py

    (root / "pcam").mkdir()
    for split, count in {"train": TRAIN, "val": VAL, "test": TEST}.items():
        files = torchvisions.PCAM._FILES[split]
        with h5py.File(root / "pcam" / files["images"][0], "w") as file:
            file["x"] = pixels(split, count, 96, 96, 3)
        with h5py.File(root / "pcam" / files["targets"][0], "w") as file:
            file["y"] = np.arange(count).reshape(-1, 1, 1, 1) % 2


# A file for each picture, and what is in it stands in another.


def food101(root: Path, patch: MonkeyPatch) -> None:
    folder = root / "food-101"
    for split, count in {"train": TRAIN, "test": TEST}.items():
        names: dict[str, list[str]] = {"apple_pie": [], "waffles": []}
        for number in range(count):
            kind = ("apple_pie", "waffles")[number % 2]
            names[kind].append(f"{kind}/{split}{number}")
            photograph(folder / "images" / f"{kind}/{split}{number}.jpg")
        text(folder / "meta" / f"{split}.json", json.dumps(names))


def fgvc_aircraft(root: Path, patch: MonkeyPatch) -> None:
    folder = root / "fgvc-aircraft-2013b" / "data"
    text(folder / "variants.txt", "707-320", "A300B4 of two words")
    first = 0
    for split, count in {"train": TRAIN, "val": VAL, "test": TEST}.items():
        numbers = range(first, first + count)
        kinds = ["707-320", "A300B4 of two words"]
        lines = [f"{number:07} {kinds[number % 2]}" for number in numbers]
        text(folder / f"images_variant_{split}.txt", *lines)
        for number in numbers:
            photograph(folder / "images" / f"{number:07}.jpg")
        first += count


def dtd(root: Path, patch: MonkeyPatch) -> None:
    folder = root / "dtd" / "dtd"
    for split, count in {"train": TRAIN, "val": VAL, "test": TEST}.items():
        kinds = ("banded", "dotted")
        names = [f"{kinds[n % 2]}/{kinds[n % 2]}_{split}{n}.jpg" for n in range(count)]
        text(folder / "labels" / f"{split}1.txt", *names)
        for name in names:
            photograph(folder / "images" / name)


def oxford_iiit_pet(root: Path, patch: MonkeyPatch) -> None:
    folder = root / "oxford-iiit-pet"
    for split, count in {"trainval": TRAIN, "test": TEST}.items():
        names = [f"{('Abyssinian', 'beagle')[n % 2]}_{split}{n}" for n in range(count)]
        lines = [f"{name} {1 + n % 2} {1 + n % 2} 1" for n, name in enumerate(names)]
        text(folder / "annotations" / f"{split}.txt", *lines)
        for name in names:
            photograph(folder / "images" / f"{name}.jpg")


def gtsrb(root: Path, patch: MonkeyPatch) -> None:
    folder = root / "gtsrb"
    for number in range(TRAIN):
        kind = folder / "GTSRB" / "Training" / f"{number % 3:05}"
        photograph(kind / f"{number:05}.ppm")
    for number in range(TEST):
        photograph(folder / "GTSRB/Final_Test/Images" / f"{number:05}.ppm")
    lines = [f"{number:05}.ppm;{number % 3}" for number in range(TEST)]
    text(folder / "GT-final_test.csv", "Filename;ClassId", *lines)


def celeba(root: Path, patch: MonkeyPatch) -> None:
    folder = root / "celeba"
    counts = {"train": TRAIN, "valid": VAL, "test": TEST}
    names = [f"{number:06}.jpg" for number in range(sum(counts.values()))]
    parts = [part for part, count in enumerate(counts.values()) for _ in range(count)]
    for name in names:
        photograph(folder / "img_align_celeba" / name)
    rows = {
        "list_eval_partition.txt": ([], "{part}"),
        "identity_CelebA.txt": ([], "7"),
        "list_bbox_celeba.txt": (["60", "x_1 y_1 width height"], "1 2 3 4"),
        "list_landmarks_align_celeba.txt": (["60", "a b"], "5 6"),
        "list_attr_celeba.txt": (["60", "Smiling Young"], "1 -1"),
    }
    for file, (head, row) in rows.items():
        lines = [f"{name} {row.format(part=part)}" for name, part in zip(names, parts, strict=True)]
        text(folder / file, *head, *lines)
    files = [
        (number, md5(folder / file) if file in rows else checksum, file)
        for number, checksum, file in torchvisions.CelebA.file_list
    ]
    patch.setattr(torchvisions.CelebA, "file_list", files)


def stanford_cars(root: Path, patch: MonkeyPatch) -> None:
    from scipy.io import savemat

    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array(["A", "B"], object)})
    files = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
    for split, count in {"train": TRAIN, "test": TEST}.items():
        rows = [(f"{number:05}.jpg", 1 + number % 2) for number in range(count)]
        kinds = np.array(rows, [("fname", object), ("class", object)])
        savemat(folder / files[split], {"annotations": kinds})
        for name, _ in rows:
            photograph(folder / f"cars_{split}" / name)


def places365(root: Path, patch: MonkeyPatch) -> None:
    dataset = torchvisions.Places365
    categories = text(root / "categories_places365.txt", "/a/airfield 0", "/z/zoo 1")
    patch.setattr(dataset, "_CATEGORIES_META", (categories.name, md5(categories)))
    files = dict(dataset._FILE_LIST_META)
    folders = {"train-standard": "data_large_standard", "val": "val_large", "test": "test_large"}
    for split, count in zip(folders, (TRAIN, VAL, TEST), strict=True):
        label = {"test": ""}.get(split, " 1")  # the test pictures have none
        names = [f"/{number:08}.jpg" for number in range(count)]
        path = text(root / files[split][0], *(name + label for name in names))
        files[split] = (path.name, md5(path))
        for name in names:
            photograph(root / folders[split] / name[1:])
    patch.setattr(dataset, "_FILE_LIST_META", files)


def clevr(root: Path, patch: MonkeyPatch) -> None:
    folder = root / "clevr" / "CLEVR_v1.0"
    for split, count in {"train": TRAIN, "val": VAL, "test": TEST}.items():
        names = [f"CLEVR_{split}_{number:06}.png" for number in range(count)]
        for name in names:
            photograph(folder / "images" / split / name)
        scenes = [{"image_filename": name, "objects": [{}, {}]} for name in names]
        file = folder / "scenes" / f"CLEVR_{split}_scenes.json"
        text(file, json.dumps({"scenes": scenes}))


def lfw_people(root: Path, patch: MonkeyPatch) -> None:
    folder, dataset = root / "lfw-py", torchvisions.LFWPeople
    files = [text(folder / "lfw-names.txt", f"Ada\t{TRAIN}", f"Bob\t{TEST}")]
    for part, who, count in [("Train", "Ada", TRAIN), ("Test", "Bob", TEST)]:
        files.append(text(folder / f"peopleDev{part}.txt", "1", f"{who}\t{count}"))
        for number in range(1, count + 1):
            photograph(folder / "lfw_funneled" / who / f"{who}_{number:04}.jpg")
    archive = text(folder / "lfw-funneled.tgz", "the archive, which has been unpacked")
    kinds = dataset.file_dict | {"funneled": ("lfw_funneled", archive.name, md5(archive))}
    patch.setattr(dataset, "file_dict", kinds)
    patch.setattr(dataset, "checksums", {file.name: md5(file) for file in files})


# A folder for each kind of picture.


def caltech101(root: Path, patch: MonkeyPatch) -> None:
    folder = root / "caltech101" / "101_ObjectCategories"
    for number in range(WHOLE):
        kind = ("accordion", "BACKGROUND_Google", "airplanes")[number % 3]
        path = photograph(folder / kind / f"image_{number // 3 + 1:04}.jpg")
        if number == 0:  # a few of the real ones are grey
            Image.open(path).convert("L").save(path)


def caltech256(root: Path, patch: MonkeyPatch) -> None:
    for number in range(WHOLE):
        kind = root / "caltech256" / "256_ObjectCategories" / f"{1 + number % 2:03}.kind"
        name = f"{1 + number % 2:03}_{number // 2 + 1:04}.jpg"
        photograph(kind / name)


def euro_sat(root: Path, patch: MonkeyPatch) -> None:
    for number in range(WHOLE):
        kind = ("Forest", "River")[number % 2]
        path = root / "eurosat" / "2750" / kind / f"{kind}_{number}.jpg"
        photograph(path, size=(64, 64))


def sun397(root: Path, patch: MonkeyPatch) -> None:
    text(root / "SUN397" / "ClassName.txt", "/a/abbey", "/z/zen_garden")
    for number in range(WHOLE):
        kind = ("a/abbey", "z/zen_garden")[number % 2]
        photograph(root / "SUN397" / kind / f"sun_{number:04}.jpg")


def omniglot(root: Path, patch: MonkeyPatch) -> None:
    folder = root / "omniglot-py"
    for number in range(WHOLE):
        kind = folder / "images_background" / "Greek" / f"character{1 + number % 2:02}"
        path = photograph(kind / f"{number:04}_01.png", size=(105, 105))
        Image.open(path).convert("1").save(path)
    with zipfile.ZipFile(folder / "images_background.zip", "w") as archive:
        archive.writestr("it", "has been unpacked")
    checksums = {"images_background": md5(folder / "images_background.zip")}
    patch.setattr(torchvisions.Omniglot, "zips_md5", checksums)


def inaturalist(root: Path, patch: MonkeyPatch) -> None:
    for number in range(WHOLE):
        kind = f"{number % 2:05}_Animalia_Chordata_Aves_Order_Family_Genus_species"
        photograph(root / "2021_train" / kind / f"{number:04}.jpg")


def country211(root: Path, patch: MonkeyPatch) -> None:
    for split, count in {"train": TRAIN, "valid": VAL, "test": TEST}.items():
        for number in range(count):
            kind = root / "country211" / split / ("AD", "ZW")[number % 2]
            photograph(kind / f"{number}.jpg")


def rendered_sst2(root: Path, patch: MonkeyPatch) -> None:
    for split, count in {"train": TRAIN, "valid": VAL, "test": TEST}.items():
        for number in range(count):
            kind = root / "rendered-sst2" / split / ("negative", "positive")[number % 2]
            photograph(kind / f"{number}.png")


def imagenette(root: Path, patch: MonkeyPatch) -> None:
    for split, count in {"train": TRAIN, "val": VAL}.items():
        for number in range(count):
            kind = root / "imagenette2" / split / ("n01440764", "n03888257")[number % 2]
            photograph(kind / f"{number}.JPEG")


def imagenet(root: Path, patch: MonkeyPatch) -> None:
    names = {"n01440764": ("tench", "Tinca tinca"), "n03888257": ("parachute", "chute")}
    torch.save((names, []), root / "meta.bin")
    for split, count in {"train": TRAIN, "val": VAL}.items():
        for number in range(count):
            photograph(root / split / [*names][number % 2] / f"{number}.JPEG")


# What each class makes of its layout: the sizes of train, val and test.
OWN = (TRAIN, VAL, TEST)
NO_VAL = (TRAIN - TRAIN // 10, TRAIN // 10, TEST)
NO_TEST = (TRAIN - TRAIN // 10, VAL, TRAIN // 10)
NO_SPLITS = (WHOLE - 2 * (WHOLE // 10), WHOLE // 10, WHOLE // 10)
LAYOUTS = {
    "MNIST": (mnist, NO_VAL),
    "FashionMNIST": (fashion_mnist, NO_VAL),
    "KMNIST": (kmnist, NO_VAL),
    "QMNIST": (qmnist, NO_VAL),
    "CIFAR10": (cifar10, NO_VAL),
    "CIFAR100": (cifar100, NO_VAL),
    "STL10": (stl10, NO_VAL),
    "SVHN": (svhn, NO_VAL),
    "USPS": (usps, NO_VAL),
    "SEMEION": (semeion, NO_SPLITS),
    "FER2013": (fer2013, NO_VAL),
    "PCAM": (pcam, OWN),
    "Food101": (food101, NO_VAL),
    "FGVCAircraft": (fgvc_aircraft, OWN),
    "DTD": (dtd, OWN),
    "OxfordIIITPet": (oxford_iiit_pet, NO_VAL),
    "GTSRB": (gtsrb, NO_VAL),
    "CelebA": (celeba, OWN),
    "StanfordCars": (stanford_cars, NO_VAL),
    "Places365": (places365, OWN),
    "CLEVRClassification": (clevr, OWN),
    "LFWPeople": (lfw_people, NO_VAL),
    "Caltech101": (caltech101, (21, 3, 3)),  # of 27, without a folder that is no kind
    "Caltech256": (caltech256, NO_SPLITS),
    "EuroSAT": (euro_sat, NO_SPLITS),
    "SUN397": (sun397, NO_SPLITS),
    "Omniglot": (omniglot, NO_SPLITS),
    "INaturalist": (inaturalist, NO_SPLITS),
    "Country211": (country211, OWN),
    "RenderedSST2": (rendered_sst2, OWN),
    "Imagenette": (imagenette, NO_TEST),
    "ImageNet": (imagenet, NO_TEST),
}
