"""The page that ``explore`` writes, opened from disk in a headless Chromium."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vae.latent import variation_per_dimension
from vae.training.checkpoint import load_model, save_checkpoint
from vae.vae import VAE
from vae_inference import main

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--dump-dom"),
]
Z = [1.5, -1.0, 0.35, -2.95, 0.0]
"""Where the address moves the sliders to."""

# Appended to the page: plays the reader, and leaves what there is to see in an attribute.
READER = """
<script>
const pixel = (column, row) => Array.from(canvas.getContext("2d").getImageData(
  (column + 0.5) * canvas.width / width, (row + 0.5) * canvas.height / height, 1, 1).data);
const picture = () => ({
  z: inputs.map((input) => input.valueAsNumber),
  shown: inputs.map((input) => input.nextElementSibling.value),
  image: Array.from(decode(inputs.map((input) => input.valueAsNumber))),
  canvas: Array.from({ length: width * height }, (_, i) => pixel(i % width, Math.floor(i / width))),
  hash: location.hash,
});
const press = (id) => document.getElementById(id).click();
const report = { labels: Array.from(document.querySelectorAll("label"), (l) => l.textContent) };
report.size = [canvas.height, canvas.width];
report.loaded = picture();
inputs[1].value = "2.5";
inputs[1].dispatchEvent(new Event("input"));
inputs[1].dispatchEvent(new Event("change"));
report.moved = picture();
press("random");
report.random = picture();
press("reset");
report.reset = picture();
HTMLAnchorElement.prototype.click = function () {
  report.download = { name: this.download, start: this.href.slice(0, 22) };
};
press("download");
document.body.dataset.report = JSON.stringify(report);
</script>
"""


def write_page(folder: Path, batch_norm: bool) -> tuple[VAE, Path]:
    """Write the page of a model that is not square, with all that training leaves in a layer."""
    torch.manual_seed(0)
    model = VAE((16, 24), len(Z), 3, batch_norm)
    model.decoder.fc.weight.data *= 20
    if batch_norm:
        for norm in (model.decoder.norm1, model.decoder.norm2):
            for values in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
                values.uniform_(0.2, 2)
    config = {"image_resolution": [16, 24], "image_channels": 3, "latent_size": len(Z)}
    checkpoint = {"model": model.state_dict(), "config": config | {"batch_norm": batch_norm}}
    save_checkpoint(checkpoint, folder / "checkpoint.pt")
    page = folder / "explore.html"
    main(["explore", "--checkpoint", str(folder / "checkpoint.pt"), "--output", str(page)])
    return load_model(folder / "checkpoint.pt")[0], page


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "batch-norm"])
def page(request, tmp_path_factory) -> tuple[VAE, Path]:
    """The model and its page."""
    return write_page(tmp_path_factory.mktemp("page"), request.param)


@pytest.fixture(scope="module")
def seen(page) -> tuple[VAE, dict[str, Any]]:
    """The model, and what the reader sees of its page in the browser."""
    if CHROMIUM is None:
        pytest.skip("no Chromium: install the package chromium to test the page in a browser")
    model, path = page
    read = path.with_name("read.html")
    read.write_text(path.read_text().replace("</body>", f"{READER}</body>"))
    profile = f"--user-data-dir={path.parent / 'profile'}"
    address = f"{read.as_uri()}#z={','.join(map(str, Z))}"
    done = subprocess.run(
        [CHROMIUM, *FLAGS, profile, address], capture_output=True, text=True, timeout=60
    )
    found = re.search('data-report="([^"]*)"', done.stdout)
    assert found, done.stdout[-500:] + done.stderr[-500:]
    return model, json.loads(html.unescape(found[1]))


def decode(model: VAE, z: list[float]) -> np.ndarray:
    with torch.no_grad():
        return model.decoder(torch.tensor([z], dtype=torch.float32))[0].numpy()


def on_canvas(report: dict[str, Any], moment: str) -> np.ndarray:
    """Return the canvas in the model's resolution, [16, 24, 4]."""
    return np.array(report[moment]["canvas"], np.uint8).reshape(16, 24, 4)


def test_the_page_needs_nothing_but_itself(page):
    text = page[1].read_text()
    assert "default-src 'none'" in text
    assert not re.search(r"https?:|src=|url\(|@import|\bimport\b|fetch\(", text)
    assert "{{" not in text


def test_the_address_moves_the_sliders_when_the_page_opens(seen):
    _, report = seen
    assert report["loaded"]["z"] == Z
    assert report["loaded"]["shown"] == ["1.50", "-1.00", "0.35", "-2.95", "0.00"]


@pytest.mark.parametrize("moment", ["loaded", "moved", "random", "reset"])
def test_the_browser_decodes_as_pytorch_does(seen, moment):
    model, report = seen
    expected = decode(model, report[moment]["z"])
    difference = np.array(report[moment]["image"]).reshape(expected.shape) - expected
    assert np.abs(difference).max() < 1e-4
    assert expected.std() > 0.01


@pytest.mark.parametrize("moment", ["loaded", "moved", "random", "reset"])
def test_the_canvas_shows_the_decoded_picture(seen, moment):
    model, report = seen
    expected = 255 * np.moveaxis(decode(model, report[moment]["z"]), 0, -1)
    shown = on_canvas(report, moment)
    assert np.abs(shown[..., :3] - expected).max() < 0.51
    assert (shown[..., 3] == 255).all()
    assert report["size"] == [512, 768]


def test_moving_a_slider_changes_the_picture_and_the_address(seen):
    _, report = seen
    assert report["moved"]["z"] == [1.5, 2.5, 0.35, -2.95, 0]
    assert report["moved"]["shown"][1] == "2.50"
    assert report["moved"]["hash"] == "#z=1.5,2.5,0.35,-2.95,0"
    assert (on_canvas(report, "moved") != on_canvas(report, "loaded")).any()


def test_random_moves_all_sliders_and_reset_moves_them_back_to_0(seen):
    _, report = seen
    assert all(-3 <= value <= 3 for value in report["random"]["z"])
    assert len(set(report["random"]["z"])) > 1
    assert report["random"]["z"] != report["moved"]["z"]
    assert report["reset"]["z"] == [0] * len(Z)


def test_the_picture_can_be_downloaded(seen):
    _, report = seen
    assert report["download"] == {"name": "flower.png", "start": "data:image/png;base64,"}


def test_sliders_are_labelled_with_their_share_the_most_informative_first(seen):
    model, report = seen
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        shares = variation_per_dimension(model)
    dimensions = shares.argsort(descending=True).tolist()
    found = [re.fullmatch(r"z(\d+) \((\d+)%\)", label) for label in report["labels"]]
    assert [int(match[1]) for match in found] == dimensions
    for match in found:
        assert abs(int(match[2]) - 100 * shares[int(match[1])]) <= 0.51
