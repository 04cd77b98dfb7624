"""The models that come with the repository do what results/trained.md says of it."""

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
from vae.command_line import INCLUDED
from vae.evaluation import evaluate
from vae.losses import ELBOLoss
from vae_training import BEST, PETALS, Options

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "results" / "trained.md").read_text()
# Each model by its name on the page: its setting, and how large its file may be.
MODELS = {"petals": (PETALS, 3_600_000), "ten": (BEST, 300_000)}
EACH = pytest.mark.parametrize("name", MODELS)


@EACH
@pytest.mark.parametrize(
    ("dataset", "row"),
    [(SyntheticFlowers, "synthetic flowers, validation"), (Flowers102, "validation photographs")],
)
def test_its_error_is_the_one_that_is_stated(dataset, row, name):
    model = load_model(INCLUDED[name]).model
    pipeline = Compose([Resize(model.image_resolution), ToTensor()])
    try:
        val = InMemory(dataset(ROOT / "datasets", "val", pipeline), progress=False)
    except RuntimeError as error:  # torchvision's, where the photographs are not
        pytest.skip(str(error))
    error = evaluate(model, val.batches(), ELBOLoss(0.1))["squared_error_mean"]
    _, _, section = PAGE.partition(f"## `{name}`")
    stated, *_ = re.findall(rf"\| {row}.*\| +([\d.]+) \|", section)
    assert error == pytest.approx(float(stated), abs=0.01)


@EACH
def test_it_holds_weights_options_and_latents_and_nothing_of_the_machine_that_trained_it(name):
    checkpoint = load_checkpoint(INCLUDED[name])
    assert checkpoint.keys() == {"architecture", "options", "state", "latents"}
    assert checkpoint["state"].keys() == {"model"}
    assert not {"data_root", "device", "log_dir", "run_name"} & checkpoint["options"].keys()
    _, most = MODELS[name]
    assert INCLUDED[name].stat().st_size < most


@EACH
def test_it_is_its_preset(name):
    options = load_model(INCLUDED[name]).options
    preset, post = asdict(MODELS[name][0]), asdict(Options())
    chosen = {option for option in preset if preset[option] != post[option]}
    chosen |= {"beta", "latent_size", "image_size"}
    assert {option: options[option] for option in chosen} == {
        option: preset[option] for option in chosen
    }


def test_the_explorer_page_is_of_petals():
    page = (ROOT / "results" / "explore.html").read_text()
    (exported,) = re.findall(r'id="model">(.*?)</script>', page)
    latents = load_model(INCLUDED["petals"]).latents
    assert torch.tensor(json.loads(exported)["centre"]).allclose(latents.mean)
