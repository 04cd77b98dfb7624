"""The model that comes with the repository does what results/trained.md says of it."""

import json
import re
from pathlib import Path

import pytest
import torch

from datasets.flowers102 import is_on_disk
from datasets.pictures import load_splits
from vae.evaluation import evaluate
from vae.losses import ELBOLoss
from vae.training.checkpoint import load_checkpoint, load_model
from vae.training.options import PRESETS, Options

ROOT = Path(__file__).parents[1]
TRAINED = ROOT / "results" / "trained.pt"
PAGE = (ROOT / "results" / "trained.md").read_text()


@pytest.mark.parametrize(
    ("dataset", "row"),
    [("synthetic", "synthetic flowers, validation"), ("flowers102", "validation photographs")],
)
def test_its_error_is_the_one_that_is_stated(dataset, row):
    if dataset == "flowers102" and not is_on_disk(ROOT / "datasets"):
        pytest.skip("the photographs are not in datasets/")
    model, _, _ = load_model(TRAINED)
    splits = load_splits(dataset, ROOT / "datasets", model.image_resolution, progress=False)
    error = evaluate(model, splits.val.batches(), ELBOLoss(0.1))["squared_error_mean"]
    (stated,) = re.findall(rf"\| {row}.*\| +([\d.]+) \|", PAGE)
    assert error == pytest.approx(float(stated), abs=0.01)


def test_it_holds_weights_options_and_latents_and_nothing_of_the_machine_that_trained_it():
    checkpoint = load_checkpoint(TRAINED)
    assert checkpoint.keys() == {"model", "config", "latents"}
    assert not {"data_root", "log_dir", "run_name"} & checkpoint["config"].keys()
    assert TRAINED.stat().st_size < 300_000


def test_it_is_the_best_setting():
    _, config, _ = load_model(TRAINED)
    best = vars(Options(**PRESETS["best"]))
    assert {name: config[name] for name in PRESETS["best"]} == PRESETS["best"]
    assert (config["beta"], config["latent_size"]) == (best["beta"], best["latent_size"])


def test_the_explorer_page_is_of_this_model():
    page = (ROOT / "results" / "explore.html").read_text()
    (exported,) = re.findall(r'id="model">(.*?)</script>', page)
    _, _, latents = load_model(TRAINED)
    assert torch.tensor(json.loads(exported)["centre"]).allclose(latents.mean)
