"""The page that ``explore`` writes, opened from disk in a headless Chromium."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributions import MultivariateNormal

from datasets.preprocessing import read_photograph
from vae.latent import variation_per_dimension
from vae.training.checkpoint import load_model, save_checkpoint, save_latents
from vae.vae import VAE
from vae_inference import main

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--dump-dom"),
    "--allow-file-access-from-files",
]
PHONE = (812, 375)
"""Pixels of a phone on its side."""
Z = [1.5, -1.0, 0.35, -2.95, 0.0, 0.0, 0.0, 0.0, 0.0, 4.0]
"""Where the address moves the sliders to."""
SIZES = {"plain": (16, 24), "batch-norm": (24, 16), "picture": (16, 16)}
"""Of each page's model. The last page is made for a picture, the others are opened at ``Z``."""
PAGES = tuple(SIZES)
MOMENTS = ("loaded", "moved", "random", "prior", "reset", "address", "nonsense")

# Appended to the page: plays the reader, and leaves what there is to see in an attribute.
READER = """
<script>
const picture = () => ({
  z: inputs.map((input) => input.valueAsNumber),
  shown: inputs.map((input) => input.nextElementSibling.value),
  image: Array.from(decode(inputs.map((input) => input.valueAsNumber))),
  small: Array.from(small.getContext("2d").getImageData(0, 0, width, height).data),
  hash: location.hash,
});
const whole = () => canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
const press = (id) => document.getElementById(id).click();
const box = (element) => {
  const { left, top, right, bottom } = element.getBoundingClientRect();
  return [left, top, right, bottom];
};
const visit = (hash) => {
  location.hash = hash;
  dispatchEvent(new HashChangeEvent("hashchange"));
};
const report = { labels: Array.from(document.querySelectorAll("label"), (l) => l.textContent) };
report.buttons = Array.from(document.querySelectorAll("button"), (button) => button.textContent);
report.ranges = inputs.map((input) => [input.min, input.max, input.step]);
report.viewport = [innerWidth, innerHeight];
report.boxes = [canvas, ...document.querySelectorAll("input")].map(box);
report.size = [canvas.height, canvas.width];
report.canvas = [0, 1, 2, 3].map((channel) =>
  whole().reduce((sum, value, i) => sum + (i % 4 === channel ? value : 0), 0) / whole().length * 4);
report.line = Array.from(whole().slice(0, 4 * canvas.width)).filter((_, i) => i % 4 === 0);
report.loaded = picture();
inputs[1].value = "2.5";
inputs[1].dispatchEvent(new Event("input"));
inputs[1].dispatchEvent(new Event("change"));
report.moved = picture();
report.normal = Array.from({ length: 20000 }, normal);
report.fitted = Array.from({ length: 5000 }, fitted);
const random = Math.random;
Math.random = () => 0.5;  // What the buttons draw with it is known.
report.noise = normal();
press("random");
report.random = picture();
press("prior");
report.prior = picture();
Math.random = random;
press("reset");
report.reset = picture();
visit("#z=-4,4");
report.address = picture();
visit("#z=99,-99,flower,,Infinity,NaN");
report.nonsense = picture();
HTMLAnchorElement.prototype.click = function () {
  report.download = { name: this.download, address: this.href };
};
press("download");
document.body.dataset.report = JSON.stringify(report);
</script>
"""

# Opens all pages in frames, and gathers what their readers have seen.
FRAMES = """<!DOCTYPE html>
<body>
{}
<script>
onload = () => {{
  const frames = Array.from(document.querySelectorAll("iframe"));
  const report = ({{ contentDocument: page }}) => page && page.body.dataset.report || "null";
  document.body.dataset.report = `[${{frames.map(report)}}]`;
}};
</script>
"""


class Page(NamedTuple):
    """A model and its page."""

    model: VAE
    latents: MultivariateNormal
    path: Path

    def exported(self) -> dict[str, Any]:
        """Return the values that the page is made with."""
        return json.loads(re.search('id="model">(.*?)</script>', self.path.read_text(), re.S)[1])


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """PyTorch's random numbers follow from ``seed`` inside, and go on afterwards as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def write_model(path: Path, size: tuple[int, int], batch_norm: bool) -> Path:
    """Write a model with all that training leaves in a layer."""
    with seeded():
        model = VAE(size, len(Z), 3, batch_norm)
        for layer in (model.encoder.fcm, model.decoder.fc):
            layer.weight.data *= 20
        if batch_norm:
            for norm in (model.decoder.norm1, model.decoder.norm2):
                for value in (norm.weight.data, norm.bias.data, norm.running_mean):
                    value.uniform_(0.2, 2)
                norm.running_var.uniform_(0.2, 2)
        root = 0.3 * torch.randn(len(Z), len(Z))
    config = {"image_resolution": size, "image_channels": 3, "latent_size": len(Z)}
    save_checkpoint(
        {"model": model.state_dict(), "config": config | {"batch_norm": batch_norm}}, path
    )
    covariance = root @ root.T + 0.01 * torch.eye(len(Z))
    save_latents(MultivariateNormal(torch.linspace(-1, 1, len(Z)), covariance), path)
    return path


@pytest.fixture(scope="module")
def photograph(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "a.png"
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    Image.fromarray(pixels).resize((50, 40), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture(scope="module")
def pages(tmp_path_factory, photograph) -> dict[str, Page]:
    """All pages by name."""
    folder, pages = tmp_path_factory.mktemp("pages"), {}
    for name in PAGES:
        checkpoint = write_model(folder / f"{name}.pt", SIZES[name], name == "batch-norm")
        images = [str(photograph)] if name == "picture" else []
        path = folder / f"{name}.html"
        main(["explore", *images, "--checkpoint", str(checkpoint), "--output", str(path)])
        model, _, latents = load_model(checkpoint)
        pages[name] = Page(model.requires_grad_(False), latents, path)
    return pages


@pytest.fixture(scope="module")
def seen(pages) -> dict[str, dict[str, Any]]:
    """What the reader sees of each page in the browser."""
    if CHROMIUM is None:
        pytest.skip("no Chromium: install the package chromium to test the page in a browser")
    frames = []
    for name, page in pages.items():
        read = page.path.with_suffix(".read.html")
        read.write_text(page.path.read_text().replace("</body>", f"{READER}</body>"))
        address = read.as_uri() + ("" if name == "picture" else f"#z={','.join(map(str, Z))}")
        width, height = PHONE
        frames.append(f'<iframe src="{address}" width="{width}" height="{height}"></iframe>')
    folder = pages["plain"].path.parent
    (folder / "all.html").write_text(FRAMES.format("\n".join(frames)))
    profile = f"--user-data-dir={folder / 'profile'}"
    done = subprocess.run(
        [CHROMIUM, *FLAGS, profile, (folder / "all.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
    )
    found = re.search('data-report="([^"]*)"', done.stdout)
    assert found, done.stdout[-500:] + done.stderr[-500:]
    reports = dict(zip(pages, json.loads(html.unescape(found[1])), strict=True))
    assert all(reports.values()), "an error stopped a page's script"
    return reports


@pytest.fixture
def plain(seen) -> dict[str, Any]:
    """What the reader sees of the first page."""
    return seen["plain"]


def decode(model: VAE, z: list[float]) -> np.ndarray:
    return model.decoder(torch.tensor([z], dtype=torch.float32))[0].numpy()


def on_slider(z: torch.Tensor | np.ndarray) -> Any:
    """Return what sliders show of latent vectors: they move in steps of 0.05."""
    return pytest.approx(np.asarray(z), abs=0.0251)


def reach(page: Page) -> list[int]:
    """Return how far each slider goes: to the start, and to four standard deviations, at least."""
    start = np.abs(page.exported()["start"])
    far = page.latents.mean.abs() + 4 * page.latents.stddev
    return np.ceil(np.max([4 + 0 * start, start, far.numpy()], axis=0)).astype(int).tolist()


def address_of(z: list[float]) -> str:
    return "#z=" + ",".join(f"{value:g}" for value in z)


# The page as it is written.


@pytest.mark.parametrize("name", PAGES)
def test_the_page_needs_nothing_but_itself(pages, name):
    text = pages[name].path.read_text()
    assert "default-src 'none'" in text
    assert not re.search(r"https?:|src=|url\(|@import|\bimport\b|fetch\(", text)
    assert "{{" not in text


def test_the_page_starts_at_a_pictures_latent_mean(pages, photograph):
    mean, _ = pages["picture"].model.encoder(read_photograph(photograph, SIZES["picture"]))
    assert pages["picture"].exported()["start"] == mean[0].tolist()
    assert mean.std() > 0.1


def test_the_page_starts_at_a_draw_of_the_fitted_latents_where_no_picture_is_given(pages):
    with seeded():
        start = pages["plain"].latents.sample()
    assert pages["plain"].exported()["start"] == pytest.approx(start.tolist(), abs=1e-6)


def test_another_seed_starts_the_page_elsewhere(pages, tmp_path):
    page = pages["plain"]._replace(path=tmp_path / "other.html")
    checkpoint = str(pages["plain"].path.with_suffix(".pt"))
    main(["explore", "--seed", "1", "--checkpoint", checkpoint, "--output", str(page.path)])
    assert page.exported()["start"] != pages["plain"].exported()["start"]


# The page in the browser.


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", PAGES)
def test_the_browser_decodes_as_pytorch_does(pages, seen, name, moment):
    expected = decode(pages[name].model, seen[name][moment]["z"])
    difference = np.array(seen[name][moment]["image"]).reshape(expected.shape) - expected
    assert np.abs(difference).max() < 1e-4
    assert expected.std() > 0.01


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", PAGES)
def test_the_decoded_picture_is_drawn(pages, seen, name, moment):
    expected = 255 * np.moveaxis(decode(pages[name].model, seen[name][moment]["z"]), 0, -1)
    drawn = np.array(seen[name][moment]["small"], np.uint8).reshape(*SIZES[name], 4)
    assert np.abs(drawn[..., :3] - expected).max() < 0.51
    assert (drawn[..., 3] == 255).all()


@pytest.mark.parametrize("name", PAGES)
def test_the_canvas_shows_the_whole_picture_enlarged(pages, seen, name):
    expected = 255 * decode(pages[name].model, seen[name]["loaded"]["z"]).mean(axis=(1, 2))
    sizes = {"plain": [512, 768], "batch-norm": [768, 512], "picture": [512, 512]}
    assert seen[name]["size"] == sizes[name]
    assert seen[name]["canvas"] == pytest.approx([*expected, 255], abs=1)


def test_the_picture_is_enlarged_smoothly(plain):
    changes = np.count_nonzero(np.diff(plain["line"]))
    # As blocks, a line of 24 pixels changes at most 23 times.
    assert changes > 100


@pytest.mark.parametrize("name", PAGES)
def test_each_slider_goes_from_minus_4_to_4_or_as_far_as_the_latents_do(pages, seen, name):
    ends = reach(pages[name])
    assert min(ends) == 4 < max(ends)
    assert seen[name]["ranges"] == [[str(-end), str(end), "0.05"] for end in ends]


def test_the_page_opens_at_its_start(pages, seen):
    start = pages["picture"].exported()["start"]
    assert seen["picture"]["loaded"]["z"] == on_slider(start)
    assert seen["picture"]["loaded"]["hash"] == ""


def test_the_address_moves_the_sliders_when_the_page_opens(plain):
    assert plain["loaded"]["z"] == Z
    assert plain["loaded"]["shown"] == [f"{value:.2f}" for value in Z]


def test_moving_a_slider_changes_the_picture_and_the_address(plain):
    z = [1.5, 2.5, *Z[2:]]
    assert plain["moved"]["z"] == z
    assert plain["moved"]["shown"][1] == "2.50"
    assert plain["moved"]["hash"] == address_of(z)
    assert plain["moved"]["image"] != plain["loaded"]["image"]


def test_an_address_that_is_changed_moves_the_sliders(plain):
    assert plain["address"]["z"] == [-4, 4, *[0] * 8]


def test_what_is_no_latent_vector_in_the_address_is_0_or_the_nearest_end(pages, plain):
    first, second, *_ = reach(pages["plain"])
    assert plain["nonsense"]["z"] == [first, -second, *[0] * 8]


def test_there_is_a_button_for_each_way_to_move(plain):
    buttons = ["Random flower", "Random from the prior", "Reset", "Download picture"]
    assert plain["buttons"] == buttons


def test_a_random_flower_is_a_draw_from_the_fitted_latents(pages, plain):
    latents = pages["plain"].latents
    noise = torch.full((len(Z),), plain["noise"])
    z = latents.mean + latents.scale_tril @ noise
    assert plain["random"]["z"] == on_slider(z)
    assert plain["random"]["hash"] == address_of(plain["random"]["z"])


def test_random_from_the_prior_is_a_draw_from_the_normal_distribution(plain):
    assert plain["noise"] == pytest.approx(-np.sqrt(2 * np.log(2)))
    assert plain["prior"]["z"] == on_slider(np.full(len(Z), plain["noise"]))
    assert plain["prior"]["hash"] == address_of(plain["prior"]["z"])


@pytest.mark.parametrize("name", PAGES)
def test_reset_goes_back_to_the_start(pages, seen, name):
    assert seen[name]["reset"]["z"] == on_slider(pages[name].exported()["start"])
    assert seen[name]["reset"]["hash"] == address_of(seen[name]["reset"]["z"])


# Six standard errors from what is expected: two runs in a thousand million would fail.


def test_normal_draws_have_mean_0_and_standard_deviation_1(plain):
    draws = np.array(plain["normal"])
    error = 6 / np.sqrt(len(draws))
    assert draws.mean() == pytest.approx(0, abs=error)
    assert draws.std() == pytest.approx(1, abs=error / np.sqrt(2))
    assert (np.abs(draws) < 1).mean() == pytest.approx(0.6827, abs=error * 0.4655)
    assert (np.abs(draws) < 2).mean() == pytest.approx(0.9545, abs=error * 0.2084)


def test_fitted_draws_have_the_latents_mean_and_covariance(pages, plain):
    latents = pages["plain"].latents
    draws = torch.tensor(plain["fitted"])
    # Where the latents are N(0, I), all dimensions have the same error.
    white = torch.linalg.solve_triangular(latents.scale_tril, (draws - latents.mean).T, upper=False)
    error = 6 / len(draws) ** 0.5
    assert white.mean(dim=1).abs().max() < error
    assert (white.cov() - torch.eye(len(Z))).abs().max() < error * 2**0.5


def test_the_large_picture_can_be_downloaded(plain):
    assert plain["download"]["name"] == "flower.png"
    kind, content = plain["download"]["address"].split(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
        assert picture.size == tuple(plain["size"][::-1])


def test_sliders_are_labelled_with_their_share_the_largest_first(pages, seen):
    with seeded():
        shares = variation_per_dimension(pages["picture"].model, pages["picture"].latents)
    found = [re.fullmatch(r"z(\d+) \((\d+)%\)", label) for label in seen["picture"]["labels"]]
    assert [int(match[1]) for match in found] == shares.argsort(descending=True).tolist()
    for match in found:
        assert abs(int(match[2]) - 100 * shares[int(match[1])]) <= 0.51


@pytest.mark.parametrize("name", PAGES)
def test_picture_and_ten_sliders_are_all_in_sight_on_a_phone_on_its_side(seen, name):
    assert seen[name]["viewport"] == list(PHONE)
    left, top, right, bottom = np.array(seen[name]["boxes"]).T
    assert len(left) == 1 + 10
    assert (right - left > 100).all()
    assert min(left.min(), top.min()) >= 0
    assert right.max() <= PHONE[0]
    assert bottom.max() <= PHONE[1]
