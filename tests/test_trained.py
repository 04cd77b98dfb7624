"""The model that comes with the repository does what results/trained.md says of it."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torchvision.datasets import Flowers102
from torchvision.transforms import Compose, Resize, ToTensor

from datasets.memory import InMemory
from datasets.synthetic import SyntheticFlowers
from vae.checkpoint import load_checkpoint, load_model
from vae.evaluation import evaluate
from vae.losses import ELBOLoss
from vae_training import BEST, Options

ROOT = Path(__file__).parents[1]
TRAINED = ROOT / "results" / "trained.pt"
PAGE = (ROOT / "results" / "trained.md").read_text()


@pytest.mark.parametrize(
    ("dataset", "row"),
    [(SyntheticFlowers, "synthetic flowers, validation"), (Flowers102, "validation photographs")],
)
def test_its_error_is_the_one_that_is_stated(dataset, row):
    model = load_model(TRAINED).model
    pipeline = Compose([Resize(model.image_resolution), ToTensor()])
    try:
        val = InMemory(dataset(ROOT / "datasets", "val", pipeline), progress=False)
    except RuntimeError as error:  # torchvision's, where the photographs are not
        pytest.skip(str(error))
    error = evaluate(model, val.batches(), ELBOLoss(0.1))["squared_error_mean"]
    (stated,) = re.findall(rf"\| {row}.*\| +([\d.]+) \|", PAGE)
    assert error == pytest.approx(float(stated), abs=0.01)


def test_it_holds_weights_options_and_latents_and_nothing_of_the_machine_that_trained_it():
    checkpoint = load_checkpoint(TRAINED)
    assert checkpoint.keys() == {"architecture", "options", "state", "latents"}
    assert checkpoint["state"].keys() == {"model"}
    assert not {"data_root", "device", "log_dir", "run_name"} & checkpoint["options"].keys()
    assert TRAINED.stat().st_size < 300_000


def test_it_is_the_best_setting():
    options = load_model(TRAINED).options
    best, post = asdict(BEST), asdict(Options())
    chosen = {name for name in best if best[name] != post[name]} | {"beta", "latent_size"}
    assert {name: options[name] for name in chosen} == {name: best[name] for name in chosen}


def test_the_explorer_page_is_of_this_model():
    page = (ROOT / "results" / "explore.html").read_text()
    (exported,) = re.findall(r'id="model">(.*?)</script>', page)
    latents = load_model(TRAINED).latents
    assert torch.tensor(json.loads(exported)["centre"]).allclose(latents.mean)
