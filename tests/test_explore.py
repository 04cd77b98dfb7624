"""The page that ``explore`` writes, opened from disk in a headless Chromium."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import seeded, write_checkpoint, write_photograph
from PIL import Image
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torchvision.transforms import Compose, Resize, ToTensor

import vae.vae
from datasets.preprocessing import read_picture
from vae.latent import variation_per_dimension
from vae.layers import Decoder
from vae.run import load_model
from vae.vae import VAE
from vae_inference import main

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--dump-dom"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
FLAGS += ["--allow-file-access-from-files"]
PHONE = (812, 375)  # pixels of a phone on its side
Z = [1.5, -1.0, 0.35, -2.95, *[0.0] * 5, 4.0]  # where the address moves the sliders to
# Each page's model: resolution, latent size, channels, batch norm. The last page is made for a
# picture, the others are opened at ``Z``.
MODELS = {
    "plain": ((16, 24), len(Z), 3, False),
    "batch-norm": ((24, 16), len(Z), 3, True),
    "grey": ((16, 16), len(Z), 1, False),
}
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
const press = (id) => { document.getElementById(id).click(); return picture(); };
const box = (element) => element.getBoundingClientRect();
const visit = (hash) => {
  location.hash = hash;
  dispatchEvent(new HashChangeEvent("hashchange"));
  return picture();
};
const report = { labels: Array.from(document.querySelectorAll("label"), (l) => l.textContent) };
report.ranges = inputs.map((input) => [input.min, input.max, input.step]);
report.viewport = [innerWidth, innerHeight];
report.boxes = [canvas, ...document.querySelectorAll("input")].map(box);
report.size = [canvas.height, canvas.width];
report.canvas = [0, 1, 2, 3].map((channel) =>
  whole().reduce((sum, value, i) => sum + (i % 4 === channel ? value : 0), 0) / whole().length * 4);
report.loaded = picture();
inputs[1].value = "2.5";
inputs[1].dispatchEvent(new Event("input"));
inputs[1].dispatchEvent(new Event("change"));
report.moved = picture();
report.fitted = Array.from({ length: 5000 }, fitted);
const random = Math.random;
Math.random = () => 0.5;  // What the buttons draw with it is known.
report.noise = normal();
report.random = press("random");
report.prior = press("prior");
Math.random = random;
report.reset = press("reset");
report.address = visit("#z=-4,4");
report.nonsense = visit("#z=99,-99,flower,,Infinity,NaN");
HTMLAnchorElement.prototype.click = function () { report.download = [this.download, this.href]; };
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
    """A page, its model, and what a reader sees of it in the browser."""

    path: Path
    model: VAE
    latents: MultivariateNormal
    seen: dict[str, Any]

    def exported(self) -> dict[str, Any]:
        """Return the values that the page is made with."""
        return json.loads(re.search('id="model">(.*?)</script>', self.path.read_text(), re.S)[1])

    def decode(self, moment: str) -> np.ndarray:
        """Return what PyTorch decodes from the sliders' values, [channels, height, width]."""
        return self.model.decoder(torch.tensor(self.seen[moment]["z"]).float()[None])[0].numpy()


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Page]:
    """All pages by name, not yet seen."""
    folder, pages = tmp_path_factory.mktemp("pages"), {}
    for name, shape in MODELS.items():
        with seeded():
            model = VAE(*shape)
            for norm in (model.decoder.norm1, model.decoder.norm2):
                for value in norm.state_dict().values():  # as training leaves them: all different
                    value.copy_(value + 2 * torch.rand(value.shape))
            checkpoint = write_checkpoint(folder / f"{name}.pt", model)
        images = [str(write_photograph(folder / "a.png"))] if name == "grey" else []
        path = folder / f"{name}.html"
        main(["explore", *images, "--checkpoint", str(checkpoint), "--output", str(path)])
        model, _, latents = load_model(checkpoint)
        pages[name] = Page(path, model.requires_grad_(False), latents, {})
    return pages


@pytest.fixture(scope="module")
def pages(written) -> dict[str, Page]:
    """All pages by name, after one session in the browser."""
    if CHROMIUM is None:
        pytest.skip("no Chromium: install the package chromium to test the page in a browser")
    frames, folder = [], written["plain"].path.parent
    for name, page in written.items():
        read = page.path.with_suffix(".read.html")
        read.write_text(page.path.read_text().replace("</body>", f"{READER}</body>"))
        address = read.as_uri() + ("" if name == "grey" else f"#z={','.join(map(str, Z))}")
        frames.append('<iframe src="{}" width="{}" height="{}"></iframe>'.format(address, *PHONE))
    (folder / "all.html").write_text(FRAMES.format("\n".join(frames)))
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [CHROMIUM, *FLAGS, profile, (folder / "all.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    found = re.search('data-report="([^"]*)"', done.stdout)
    assert found, done.stdout[-500:] + done.stderr[-500:]
    reports = json.loads(html.unescape(found[1]))
    assert all(reports), "an error stopped a page's script"
    seen = dict(zip(written, reports, strict=True))
    return {name: page._replace(seen=seen[name]) for name, page in written.items()}


@pytest.fixture(params=MODELS)
def page(request, pages) -> Page:
    """Each page in turn."""
    return pages[request.param]


@pytest.fixture
def plain(pages) -> Page:
    return pages["plain"]


def on_slider(z: Tensor | np.ndarray | list[float]) -> Any:
    """Return what sliders show of latent vectors: they move in steps of 0.05."""
    return pytest.approx(np.asarray(z), abs=0.0251)


def reach(page: Page) -> list[int]:
    """Return how far each slider goes: to the start, and to four standard deviations, at least."""
    start = torch.tensor(page.exported()["start"]).abs()
    far = page.latents.mean.abs() + 4 * page.latents.stddev
    return torch.maximum(start, far).ceil().clamp(min=4).int().tolist()


# The page as it is written


def test_the_page_needs_nothing_but_itself(written):
    text = written["plain"].path.read_text()
    assert "default-src 'none'" in text
    assert not re.search(r"https?:|src=|url\(|@import|\bimport\b|fetch\(", text)
    assert "{{" not in text


def test_the_page_starts_at_the_pictures_latent_mean_or_else_at_a_draw(written):
    grey, plain = written["grey"], written["plain"]
    picture = read_picture(grey.path.parent / "a.png").convert("L")
    mean, _ = grey.model.encoder(Compose([Resize((16, 16)), ToTensor()])(picture)[None])
    assert grey.exported()["start"] == mean[0].tolist()
    with seeded():
        start = plain.latents.sample()
    assert plain.exported()["start"] == pytest.approx(start.tolist(), abs=1e-6)


class Deeper(Decoder):
    """A reader's decoder, with one layer more."""

    def __init__(self, *sizes: Any) -> None:
        super().__init__(*sizes)
        self.act3 = nn.Sequential(nn.Conv2d(3, 3, kernel_size=3, padding="same"), nn.Sigmoid())


def test_a_decoder_that_the_page_would_draw_otherwise_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vae.vae, "Decoder", Deeper)
    with seeded():
        checkpoint = write_checkpoint(tmp_path / "own.pt", VAE((16, 16), 4, 3))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["explore", "--checkpoint", str(checkpoint)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: this decoder does more than the page can")
    assert [path.name for path in tmp_path.iterdir()] == ["own.pt"]


# The page in the browser


def test_the_browser_decodes_as_pytorch_does_and_draws_it(page):
    for moment in MOMENTS:
        expected = page.decode(moment)
        difference = np.array(page.seen[moment]["image"]).reshape(expected.shape) - expected
        assert np.abs(difference).max() < 1e-4
        assert expected.std() > 0.01
        drawn = np.array(page.seen[moment]["small"]).reshape(*expected.shape[1:], 4)
        assert np.abs(drawn[..., :3] - 255 * np.moveaxis(expected, 0, -1)).max() < 0.51
        assert (drawn[..., 3] == 255).all()


def test_the_canvas_shows_the_whole_picture_enlarged(page):
    colour = 255 * page.decode("loaded").mean(axis=(1, 2)) * np.ones(3)
    height, width = page.model.image_resolution
    assert page.seen["size"] == [512 * height // 16, 512 * width // 16]
    assert page.seen["canvas"] == pytest.approx([*colour, 255], abs=1)


def test_each_slider_goes_from_minus_4_to_4_or_as_far_as_the_latents_do(page):
    ends = reach(page)
    assert min(ends) == 4 < max(ends)
    assert page.seen["ranges"] == [[str(-end), str(end), "0.05"] for end in ends]


def test_the_page_opens_at_its_start_or_where_the_address_says_and_sliders_move(pages):
    grey, plain = pages["grey"], pages["plain"].seen
    assert grey.seen["loaded"]["z"] == on_slider(grey.exported()["start"])
    assert grey.seen["loaded"]["hash"] == ""
    assert (plain["loaded"]["z"], plain["loaded"]["shown"]) == (Z, [f"{value:.2f}" for value in Z])
    assert (plain["moved"]["z"], plain["moved"]["shown"][1]) == ([1.5, 2.5, *Z[2:]], "2.50")


def test_an_address_that_is_changed_moves_the_sliders_whatever_it_is(plain):
    first, second, *_ = reach(plain)
    z = [plain.seen[moment]["z"] for moment in ("address", "nonsense")]
    assert z == [[-4, 4, *[0] * 8], [first, -second, *[0] * 8]]


def test_the_buttons_move_to_a_draw_or_to_the_start_and_the_address_follows(page):
    seen, noise = page.seen, page.seen["noise"]
    assert noise == pytest.approx(-np.sqrt(2 * np.log(2)))
    fitted = page.latents.mean + page.latents.scale_tril @ torch.full((len(Z),), noise)
    assert seen["random"]["z"] == on_slider(fitted)
    assert seen["prior"]["z"] == on_slider([noise] * len(Z))
    assert seen["reset"]["z"] == on_slider(page.exported()["start"])
    for moment in ("moved", "random", "prior", "reset"):
        z = ",".join(f"{value:g}" for value in seen[moment]["z"])
        assert seen[moment]["hash"] == f"#z={z}"


# Six standard errors from what is expected: two runs in a thousand million would fail.


def test_fitted_draws_have_the_latents_mean_and_covariance(plain):
    latents, draws = plain.latents, torch.tensor(plain.seen["fitted"])
    # Where the latents are N(0, I), all dimensions have the same error.
    white = torch.linalg.solve_triangular(latents.scale_tril, (draws - latents.mean).T, upper=False)
    error = 6 / len(draws) ** 0.5
    assert white.mean(dim=1).abs().max() < error
    assert (white.cov() - torch.eye(len(Z))).abs().max() < error * 2**0.5


def test_the_large_picture_can_be_downloaded(plain):
    name, address = plain.seen["download"]
    picture = Image.open(io.BytesIO(base64.b64decode(address.split(";base64,")[1])))
    assert (name, picture.size) == ("flower.png", tuple(plain.seen["size"][::-1]))


def test_sliders_are_labelled_with_their_share_the_largest_first(pages):
    with seeded():
        grey = pages["grey"]
        shares = variation_per_dimension(grey.model, grey.latents)
    found = [re.fullmatch(r"z(\d+) \((\d+)%\)", label) for label in grey.seen["labels"]]
    assert [int(match[1]) for match in found] == shares.argsort(descending=True).tolist()
    for match in found:
        assert abs(int(match[2]) - 100 * shares[int(match[1])]) <= 0.51


def test_picture_and_ten_sliders_are_all_in_sight_on_a_phone_on_its_side(page):
    assert page.seen["viewport"] == list(PHONE)
    assert len(page.seen["boxes"]) == 1 + 10
    for box in page.seen["boxes"]:
        assert box["width"] > 100
        assert 0 <= box["left"] < box["right"] <= PHONE[0]
        assert 0 <= box["top"] < box["bottom"] <= PHONE[1]
