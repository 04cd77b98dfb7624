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
from vae.checkpoint import load_model
from vae.latent import variation_per_dimension
from vae.layers import Decoder
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
DRAWS = 1500  # how often each button for a random flower is pressed
MOMENTS = ("loaded", "moved", "random", "prior", "reset", "address", "nonsense")

# Put before the page's own script: keeps the pixels that it puts onto a canvas, before they are
# enlarged.
WATCHER = """
<script>
{
  const put = CanvasRenderingContext2D.prototype.putImageData;
  CanvasRenderingContext2D.prototype.putImageData = function (image, ...place) {
    document.pixels = Array.from(image.data);
    put.call(this, image, ...place);
  };
}
</script>
"""

# Appended to the page: plays the reader, who sees only what the document shows, and leaves what
# there is to see in an attribute.
READER = """
<script>
{
  const inputs = Array.from(document.querySelectorAll("#sliders input"));
  inputs.sort((one, other) => one.id.slice(1) - other.id.slice(1));  // z0, z1, ...
  const canvas = document.querySelector("canvas");
  const z = () => inputs.map((input) => input.valueAsNumber);
  const picture = () => ({
    z: z(),
    shown: inputs.map((input) => document.querySelector(`output[for=${input.id}]`).value),
    pixels: document.pixels,
    hash: location.hash,
  });
  const press = (id) => { document.getElementById(id).click(); return picture(); };
  const visit = (hash) => {
    location.hash = hash;
    dispatchEvent(new HashChangeEvent("hashchange"));
    return picture();
  };
  const report = {};
  report.labels = Array.from(document.querySelectorAll("label"), (label) => label.textContent);
  report.ranges = inputs.map((input) => [input.min, input.max, input.step]);
  report.viewport = [innerWidth, innerHeight];
  report.boxes = [canvas, ...inputs].map((element) => element.getBoundingClientRect());
  report.size = [canvas.height, canvas.width];
  const all = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  report.canvas = [0, 1, 2, 3].map((channel) =>
    all.reduce((sum, value, i) => sum + (i % 4 === channel ? value : 0), 0) / all.length * 4);

  report.loaded = picture();
  inputs[1].value = "2.5";
  inputs[1].dispatchEvent(new Event("input"));
  inputs[1].dispatchEvent(new Event("change"));
  report.moved = picture();
  report.random = press("random");
  report.prior = press("prior");
  report.reset = press("reset");
  report.address = visit("#z=-4,4");
  report.nonsense = visit("#z=99,-99,flower,,Infinity,NaN");
  HTMLAnchorElement.prototype.click = function () { report.download = [this.download, this.href]; };
  press("download");

  // Many draws: without their pictures, which take long, and without the address, which Chromium
  // would not change so often.
  CanvasRenderingContext2D.prototype.putImageData = () => {};
  CanvasRenderingContext2D.prototype.drawImage = () => {};
  history.replaceState = () => {};
  const draws = (id) => Array.from({ length: DRAWS }, () => press(id).z);
  report.draws = { random: draws("random"), prior: draws("prior") };
  document.body.dataset.report = JSON.stringify(report);
}
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
            for norm in model.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    for value in norm.state_dict().values():  # all different, as after training
                        value.copy_(value + 2 * torch.rand(value.shape))
            if name == "grey":
                model.encoder.fcm.bias.data[0] = 30  # farther than the latents are
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
        draws = str(DRAWS if name == "plain" else 1)
        reader = READER.replace("DRAWS", draws)
        text = page.path.read_text()
        text = text.replace("<body>", f"<body>{WATCHER}").replace("</body>", f"{reader}</body>")
        read.write_text(text)
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


def start(page: Page) -> Tensor:
    """Return the latent mean of the picture that the page is made for, [latent]."""
    picture = read_picture(page.path.parent / "a.png").convert("L")
    mean, _ = page.model.encoder(Compose([Resize((16, 16)), ToTensor()])(picture)[None])
    return mean[0]


def reach(page: Page, start: Tensor) -> list[int]:
    """Return how far each slider goes: to the start, and to four standard deviations, at least."""
    far = page.latents.mean.abs() + 4 * page.latents.stddev
    return torch.maximum(start.abs(), far).ceil().clamp(min=4).int().tolist()


def whitened(z: Tensor, latents: MultivariateNormal) -> Tensor:
    """Return draws, [n, latent], moved to where draws from these latents would be N(0, I)."""
    roots = latents.scale_tril
    return torch.linalg.solve_triangular(roots, (z - latents.mean).T, upper=False).T


# A page of more latent dimensions than it has sliders


def written_sliders(path: Path) -> list[dict[str, Any]]:
    """The sliders of a page, as they are written into it."""
    (exported,) = re.findall(r'id="model">(.*?)</script>', path.read_text())
    return json.loads(exported)["sliders"]


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> tuple[VAE, MultivariateNormal, list[dict[str, Any]]]:
    """A model of 24 latent dimensions, its latents, and the sliders of its page."""
    folder = tmp_path_factory.mktemp("many")
    with seeded():
        checkpoint = write_checkpoint(folder / "many.pt", VAE((16, 16), 24, 3))
    photograph = str(write_photograph(folder / "a.png"))
    output = str(folder / "many.html")
    main(["explore", photograph, "--checkpoint", str(checkpoint), "--output", output])
    model, _, latents = load_model(checkpoint)
    return model.requires_grad_(False), latents, written_sliders(folder / "many.html")


def test_many_dimensions_have_ten_sliders_the_largest_share_first(many):
    _, _, sliders = many
    shares = [slider["share"] for slider in sliders]
    assert [slider["name"] for slider in sliders] == [f"d{i}" for i in range(1, 11)]
    assert shares == sorted(shares, reverse=True)
    assert 10 / 24 < sum(shares) < 1


def test_a_slider_reads_its_own_move_and_no_others(many):
    _, _, sliders = many
    moves = torch.tensor([slider["direction"] for slider in sliders])
    readings = torch.tensor([slider["reading"] for slider in sliders])
    assert torch.allclose(readings @ moves.T, torch.eye(10), atol=1e-4)


def test_along_the_first_slider_pictures_change_more_than_along_the_last_and_by_chance(many):
    model, latents, sliders = many
    with seeded():
        z = latents.sample((64,))
        by_chance = latents.sample((64,)) - latents.mean
    by_chance = by_chance / whitened(by_chance + latents.mean, latents).norm(dim=1, keepdim=True)

    def change(move: Tensor) -> Tensor:
        return torch.square(model.decoder(z + 0.1 * move) - model.decoder(z)).sum()

    first, last = (torch.tensor(sliders[i]["direction"]) for i in (0, -1))
    assert change(first) > max(change(last), change(by_chance))


# The page as it is written


def test_the_page_needs_nothing_but_itself(written):
    text = written["plain"].path.read_text()
    assert "default-src 'none'" in text
    assert not re.search(r"https?:|src=|url\(|@import|\bimport\b|fetch\(", text)
    assert "{{" not in text


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


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_browser_draws_what_pytorch_decodes(page, moment):
    expected = 255 * np.moveaxis(page.decode(moment), 0, -1)
    drawn = np.array(page.seen[moment]["pixels"]).reshape(*expected.shape[:2], 4)
    assert expected.std() > 0.01 * 255
    # So many rounded values show an error of a ten-thousandth.
    assert np.abs(drawn[..., :3] - expected).max() < 0.51
    assert (drawn[..., 3] == 255).all()


def test_the_canvas_shows_the_whole_picture_enlarged(page):
    colour = 255 * page.decode("loaded").mean(axis=(1, 2)) * np.ones(3)
    height, width = page.model.image_resolution
    assert page.seen["size"] == [512 * height // 16, 512 * width // 16]
    assert page.seen["canvas"] == pytest.approx([*colour, 255], abs=1)


def test_each_slider_goes_from_minus_4_to_4_or_as_far_as_the_latents_do(plain):
    ends = reach(plain, torch.tensor(plain.seen["reset"]["z"]))
    assert min(ends) == 4 < max(ends)
    assert plain.seen["ranges"] == [[str(-end), str(end), "0.05"] for end in ends]


def test_each_slider_goes_as_far_as_the_picture_that_the_page_is_made_for(pages):
    grey = pages["grey"]
    ends = reach(grey, start(grey))
    assert ends != reach(grey, torch.zeros(len(Z)))
    assert grey.seen["ranges"] == [[str(-end), str(end), "0.05"] for end in ends]


def test_the_page_of_a_picture_opens_at_the_pictures_latent_mean(pages):
    loaded = pages["grey"].seen["loaded"]
    assert loaded["z"] == on_slider(start(pages["grey"]))
    assert loaded["hash"] == ""


def test_the_page_of_no_picture_starts_at_a_draw_from_the_latents(plain):
    z = torch.tensor([plain.seen["reset"]["z"]]).float()
    # A sum of ten squares: one draw in a million is beyond one of these.
    assert 0.3 < whitened(z, plain.latents).square().sum() < 45


def test_the_page_opens_where_the_address_says(plain):
    loaded = plain.seen["loaded"]
    assert (loaded["z"], loaded["shown"]) == (Z, [f"{value:.2f}" for value in Z])


def test_a_slider_moves_one_dimension_and_shows_its_value(plain):
    moved = plain.seen["moved"]
    assert (moved["z"], moved["shown"][1]) == ([1.5, 2.5, *Z[2:]], "2.50")


def test_an_address_that_is_changed_moves_the_sliders_whatever_it_is(plain):
    (_, first, _), (_, second, _), *_ = plain.seen["ranges"]
    z = [plain.seen[moment]["z"] for moment in ("address", "nonsense")]
    assert z == [[-4, 4, *[0] * 8], [int(first), -int(second), *[0] * 8]]


@pytest.mark.parametrize("moment", ["moved", "random", "prior", "reset"])
def test_the_address_follows_sliders_and_buttons(page, moment):
    z = ",".join(f"{value:g}" for value in page.seen[moment]["z"])
    assert page.seen[moment]["hash"] == f"#z={z}"


def test_reset_moves_back_to_the_start(pages):
    assert pages["grey"].seen["reset"]["z"] == on_slider(start(pages["grey"]))


def test_the_buttons_draw_from_the_latents_or_from_the_prior(plain):
    prior = MultivariateNormal(torch.zeros(len(Z)), torch.eye(len(Z)))
    for button, distribution in (("random", plain.latents), ("prior", prior)):
        z = whitened(torch.tensor(plain.seen["draws"][button]).float(), distribution)
        # Six standard errors: two runs in a thousand million would fail.
        error = 6 / DRAWS**0.5
        assert z.mean(dim=0).abs().max() < error
        assert (z.T.cov() - torch.eye(len(Z))).abs().max() < error * 2**0.5


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
