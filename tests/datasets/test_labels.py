import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from datasets.labels import as_text, make_batches, names_of, picture_and_label

PICTURE = torch.zeros(3, 4, 4)
SAMPLES = {
    "a pair": ((PICTURE, 7), 7),
    "a list": ([PICTURE, 7], 7),
    "a picture alone": (PICTURE, None),
    "a picture alone in a tuple": ((PICTURE,), None),
    "more than a label": ((PICTURE, 7, "rose"), (7, "rose")),
    "a picture and None": ((PICTURE, None), None),
}


@pytest.mark.parametrize(("sample", "label"), SAMPLES.values(), ids=SAMPLES)
def test_a_sample_is_a_picture_and_its_label(sample, label):
    picture, found = picture_and_label(sample)
    assert picture is PICTURE
    assert found == label


# Batches.

TOGETHER = {
    "numbers": [1, 2, 3],
    "numbers of two kinds": [1, 2.5, True],
    "texts": ["rose", "lily"],
    "arrays": [np.zeros(3), np.ones(3)],
    "tensors": [torch.zeros(2, 2), torch.ones(2, 2)],
    "tuples": [(1, "rose"), (2, "lily")],
    "dictionaries": [{"species": 1}, {"species": 2}],
}
APART = {
    "none": [None, None],
    "a number and none": [1, None],
    "a text and a number": ["rose", 1],
    "a number and a text": [1, "rose"],
    "arrays of two sizes": [np.zeros(3), np.ones(2)],
    "tensors of two sizes": [torch.zeros(3), torch.ones(2)],
    "tuples of two lengths": [(1,), (1, 2)],
    "tuples of two kinds": [("rose",), (1,)],
    "dictionaries with other keys": [{"species": 1}, {"colour": 2}],
    "arrays of texts": [np.array(["rose"]), np.array(["lily"])],
    "masks": [Image.new("L", (4, 4)), Image.new("L", (4, 4))],
    "a number that no tensor holds": [1, 10**30],
}


@pytest.mark.parametrize("labels", TOGETHER.values(), ids=TOGETHER)
def test_labels_of_one_kind_make_a_batch(labels):
    assert make_batches(labels)
    default_collate(labels)


@pytest.mark.parametrize("labels", APART.values(), ids=APART)
def test_labels_that_do_not_go_together_make_none(labels):
    assert not make_batches(labels)
    assert not make_batches(labels[::-1])


# Text.

TEXTS = {
    "two\nlines": "two lines",
    "a\ttab": "a tab",
    " \u2028 around \r\n": "around",
    "": '""',
    "\n": '""',
    None: "None",
    3: "3",
    ("tench", "Tinca tinca"): "tench, Tinca tinca",
    (): "()",
    "rosé": "rosé",
    "not UTF-8: \udcff": "not UTF-8: ?",
}


@pytest.mark.parametrize(("label", "text"), TEXTS.items())
def test_a_label_is_one_line_of_text(label, text):
    assert as_text(label) == text


def test_an_array_is_one_line_of_text_however_large_it_is():
    assert as_text(torch.eye(2, dtype=torch.int64)) == as_text(np.eye(2, dtype=int))
    assert as_text(np.eye(2, dtype=int)) == "[[1 0] [0 1]]"
    assert len(as_text(np.zeros((500, 500)))) < 300


# Names.

NAMES = ["lily", "rose"]
CLASSES = {
    "a list": NAMES,
    "a tuple": ("lily", "rose"),
    "an array": np.array(NAMES),
    "a dictionary": {"rose": 1, "lily": 0},
    "a dictionary of NumPy's": {"rose": np.int64(1), "lily": np.int64(0)},
}
NO_CLASSES = {
    "none": None,
    "a number": 3,
    "an array that is a number": np.array(3),
    "a text": "lily",
    "too short a list": ["lily"],
    "an empty dictionary": {},
    "a dictionary of lists": {"lily": [0], "rose": [1]},
    "a function": len,
}


@pytest.mark.parametrize("classes", CLASSES.values(), ids=CLASSES)
@pytest.mark.parametrize(
    "labels", [[0, 1, 1], [np.int64(0), torch.tensor(1), np.array(1)], [False, True, True]]
)
def test_labels_that_are_places_in_classes_have_their_names(classes, labels):
    assert names_of(labels, classes) == ["lily", "rose", "rose"]


@pytest.mark.parametrize("classes", NO_CLASSES.values(), ids=NO_CLASSES)
def test_where_classes_name_not_all_labels_the_labels_themselves_are_shown(classes):
    assert names_of([0, 1], classes) == ["0", "1"]


@pytest.mark.parametrize(
    "labels", [[0, -1], [0, 2], [0, None], [0, "rose"], [0, 1.0], [np.zeros(2), np.ones(2)]]
)
def test_labels_that_are_no_places_in_classes_are_shown_themselves(labels):
    assert names_of(labels, NAMES) == [as_text(label) for label in labels]


def test_names_are_one_line_of_text_too():
    assert names_of([0, 1], [("tench", "Tinca tinca"), "rose\nred"]) == [
        "tench, Tinca tinca",
        "rose red",
    ]
