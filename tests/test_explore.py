"""The page that ``explore`` writes, opened from disk in a headless Chromium."""

import base64
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from browser import Browser, Tab, chromium
from helpers import seeded, write_checkpoint, write_photograph
from PIL import Image, ImageCms
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

import vae.vae
from datasets.preprocessing import read_picture
from vae.checkpoint import load_model
from vae.explore import Layer, as_integers
from vae.latent import variation_per_dimension
from vae.layers import Decoder, Encoder
from vae.vae import VAE
from vae_inference import as_in_training, main

ON_ITS_SIDE = (812, 375)  # pixels of a phone on its side
UPRIGHT = (390, 844)
Z = [1.5, -1.0, 0.35, -2.95, *[0.0] * 5, 4.0]  # where the address moves the sliders to
# Each page's model: resolution, latent size, channels, batch norm, crop. The grey page is made for
# a picture, the others are opened at ``Z``.
MODELS = {
    "plain": ((16, 24), len(Z), 3, False, False),
    "batch-norm": ((24, 16), len(Z), 3, True, True),
    "grey": ((16, 16), len(Z), 1, False, False),
}
DRAWS = 1500  # how often each button for a random picture is pressed
MOMENTS = ("loaded", "moved", "random", "prior", "reset", "address", "nonsense")
SAME = 0.6  # of 255: half for the rounding of pixels, a tenth for that of weights to 16 bits

# Runs before the page's own script: keeps the pixels that are enlarged, with the canvas for which.
WATCHER = """
{
  const draw = CanvasRenderingContext2D.prototype.drawImage;
  CanvasRenderingContext2D.prototype.drawImage = function (image, ...place) {
    if (this.canvas.id) {
      const { data } = image.getContext("2d").getImageData(0, 0, image.width, image.height);
      this.canvas.pixels = Array.from(data);
    }
    draw.call(this, image, ...place);
  };
}
"""

# Plays the reader, who sees only what the document shows, and says what there is to see.
READER = """
(async () => {
  const inputs = Array.from(document.querySelectorAll("#sliders input"));
  inputs.sort((one, other) => one.id.slice(1) - other.id.slice(1));  // z0, z1, ...
  const canvas = document.querySelector("#picture");
  const picture = () => ({
    z: Array.from(z),  // the page's own
    sliders: inputs.map((input) => input.valueAsNumber),
    shown: inputs.map((input) => document.querySelector(`output[for=${input.id}]`).value),
    ranges: inputs.map((input) => [input.min, input.max, input.step]),
    pixels: canvas.pixels,
    caption: document.querySelector("#caption").textContent,
    hash: location.hash,
  });
  const press = (id) => { document.getElementById(id).click(); return picture(); };
  const visit = (hash) => {
    location.hash = hash;
    dispatchEvent(new HashChangeEvent("hashchange"));
    return picture();
  };
  const data = (canvas) => Array.from(
    canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data);
  const small = (canvas) => ({ name: canvas.ariaLabel, pixels: data(canvas) });
  const ends = async () => {
    while (outdated > 0) await new Promise(setTimeout);
    const row = (input) => input.parentElement.querySelectorAll("canvas");
    return inputs.map((input) => Array.from(row(input), small));
  };
  const report = {};
  report.labels = Array.from(document.querySelectorAll("label"), (label) => label.textContent);
  report.viewport = [innerWidth, innerHeight];
  report.boxes = [canvas, ...inputs].map((element) => element.getBoundingClientRect().toJSON());
  report.size = [canvas.height, canvas.width];
  const all = data(canvas);
  report.canvas = [0, 1, 2, 3].map((channel) =>
    all.reduce((sum, value, i) => sum + (i % 4 === channel ? value : 0), 0) / all.length * 4);

  report.loaded = picture();
  report.loaded.ends = await ends();
  inputs[1].value = "2.5";
  inputs[1].dispatchEvent(new Event("input"));
  inputs[1].dispatchEvent(new Event("change"));
  report.moved = picture();
  report.moved.ends = await ends();
  report.random = press("random");
  report.prior = press("prior");
  report.reset = press("reset");
  report.address = visit("#z=-4,4");
  report.nonsense = visit("#z=9,-9,flower,,Infinity,NaN");
  HTMLAnchorElement.prototype.click = function () { report.download = [this.download, this.href]; };
  press("download");

  // Many draws: without their pictures, which take long, and without the address, which Chromium
  // would not change so often.
  CanvasRenderingContext2D.prototype.putImageData = () => {};
  CanvasRenderingContext2D.prototype.drawImage = () => {};
  history.replaceState = () => {};
  const draws = (id) => Array.from({ length: DRAWS }, () => press(id).z);
  report.draws = { random: draws("random"), prior: draws("prior") };
  return report;
})()
"""


class Page(NamedTuple):
    """A page and its model."""

    path: Path
    model: VAE
    latents: MultivariateNormal
    crop: bool = False

    def decode(self, z: list[float] | Tensor) -> np.ndarray:
        """Return what PyTorch decodes, as pixels in 0 to 255, [height, width, channels]."""
        images = self.model.decoder(torch.as_tensor(z).float()[None])
        return 255 * images[0].movedim(0, -1).numpy()

    def pixels(self, values: list[int]) -> np.ndarray:
        """Return a canvas's values as pixels, [height, width, 4]."""
        return np.array(values).reshape(*self.model.image_resolution, 4)

    def input(self, picture: Path) -> Tensor:
        """Return a picture as the model sees it, [1, channels, height, width]."""
        return as_in_training(self.model, self.crop)(read_picture(picture))[None]


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def write_page(folder: Path, name: str, model: VAE, *words: str, crop: bool = False) -> Page:
    """Write the page of a model; call it inside ``seeded``."""
    checkpoint = write_checkpoint(folder / f"{name}.pt", model, crop=crop)
    path = folder / f"{name}.html"
    main(["explore", *words, "--checkpoint", str(checkpoint), "--output", str(path)])
    model, _, latents = load_model(checkpoint)
    return Page(path, model.requires_grad_(False), latents, crop)


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Page]:
    """All pages by name."""
    folder, pages = tmp_path_factory.mktemp("pages"), {}
    photograph = str(write_photograph(folder / "a.png"))
    for name, (*shape, crop) in MODELS.items():
        with seeded():
            model = VAE(*shape)
            for norm in model.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    for value in norm.state_dict().values():  # all different, as after training
                        value.copy_(value + 2 * torch.rand(value.shape))
            if name == "grey":
                model.encoder.fcm.bias.data[0] = 30  # farther than the latents are
            words = [photograph] if name == "grey" else []
            pages[name] = write_page(folder, name, model, *words, crop=crop)
    return pages


@pytest.fixture(scope="module")
def visits(pages, browser) -> dict[str, dict[str, Any]]:
    """What a reader sees of each page, on a phone on its side."""
    seen = {}
    for name, page in pages.items():
        address = page.path.as_uri() + ("" if name == "grey" else f"#z={','.join(map(str, Z))}")
        tab = browser.open(address, ON_ITS_SIDE, WATCHER)
        draws = str(DRAWS if name == "plain" else 1)
        seen[name] = tab.evaluate(READER.replace("DRAWS", draws))
        assert tab.errors() == []
    return seen


@pytest.fixture(params=MODELS)
def name(request) -> str:
    """Each page in turn."""
    return request.param


@pytest.fixture
def page(pages, name) -> Page:
    return pages[name]


@pytest.fixture
def seen(visits, name) -> dict[str, Any]:
    return visits[name]


@pytest.fixture
def plain(visits) -> dict[str, Any]:
    """What is seen of the plain page."""
    return visits["plain"]


@pytest.fixture
def grey(visits) -> dict[str, Any]:
    """What is seen of the grey page, which is made for a picture."""
    return visits["grey"]


def start(page: Page) -> Tensor:
    """Return the latent mean of the picture that the page is made for, [latent]."""
    mean, _ = page.model.encoder(page.input(page.path.parent / "a.png"))
    return mean[0]


def reach(page: Page, z: Tensor | list[float]) -> list[int]:
    """Return how far each slider goes: to z, and to four standard deviations, at least."""
    far = page.latents.mean.abs() + 4 * page.latents.stddev
    return torch.maximum(torch.as_tensor(z).float().abs(), far).ceil().clamp(min=4).int().tolist()


def whitened(z: Tensor, latents: MultivariateNormal) -> Tensor:
    """Return draws, [n, latent], moved to where draws from these latents would be N(0, I)."""
    roots = latents.scale_tril
    return torch.linalg.solve_triangular(roots, (z - latents.mean).T, upper=False).T


# The page as it is written


def exported(path: Path) -> dict[str, Any]:
    """Return what a page knows of its model."""
    (text,) = re.findall(r'id="model">(.*?)</script>', path.read_text())
    return json.loads(text)


def test_the_page_names_no_other_address_and_its_policy_allows_only_its_own_script_and_style(pages):
    text = pages["plain"].path.read_text()
    (policy,) = re.findall(r'Content-Security-Policy"\s+content="(.*?)"', text, re.DOTALL)
    own = r"'sha256-[\w+/]{43}='"
    assert re.fullmatch(
        rf"default-src 'none'; script-src {own}; style-src {own}; "
        r"base-uri 'none'; form-action 'none'",
        " ".join(policy.split()),
    )
    assert not re.search(r"https?:|src=|url\(|@import|\bimport\b|fetch\(", text)
    assert "{{" not in text


@pytest.mark.parametrize(
    ("dataset", "noun"),
    [("flowers102", "flower"), ("synthetic", "flower"), ("dtd", "picture"), ("/own", "picture")],
)
def test_only_a_model_of_flowers_draws_what_is_called_a_flower(tmp_path, dataset, noun):
    with seeded():
        checkpoint = write_checkpoint(tmp_path / "a.pt", VAE((16, 16), 4, 3), dataset=dataset)
    output = tmp_path / "a.html"
    main(["explore", "--checkpoint", str(checkpoint), "--output", str(output)])
    text = output.read_text()
    assert f">Random {noun}<" in text
    assert f'"{noun}.png"' in text
    assert ("flower" in text) == (noun == "flower")


def test_weights_take_two_bytes_and_are_the_same_to_a_65000th_of_their_outputs_largest():
    with seeded():
        layer = Layer(torch.randn(5, 3, 2, 2) * 10.0 ** torch.arange(5)[:, None, None, None], None)
    text = as_integers(layer)
    integers = np.frombuffer(base64.b64decode(text["weight"]), np.int16).reshape(5, 12)
    steps = np.frombuffer(base64.b64decode(text["step"]), np.float32)
    rows = layer.weight.flatten(1).numpy()
    error = np.abs(integers * steps[:, None] - rows).max(axis=1)
    assert (error <= np.abs(rows).max(axis=1) / 65_000).all()
    assert np.frombuffer(base64.b64decode(text["bias"]), np.float32).tolist() == [0.0] * 5


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


class Smooth(Encoder):
    """A reader's encoder, with another activation."""

    def __init__(self, *sizes: Any) -> None:
        super().__init__(*sizes)
        self.act2 = nn.GELU()


class Linear(nn.Module):
    """A reader's encoder, without convolutions."""

    def __init__(self, resolution: tuple[int, int], channels: int, size: int, *_: Any) -> None:
        super().__init__()
        self.fcm = nn.Linear(channels * math.prod(resolution), size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.fcm(x.flatten(1))
        return mean, torch.zeros_like(mean)


@pytest.mark.parametrize("encoder", [Smooth, Linear])
def test_where_the_encoder_is_another_no_photographs_can_be_chosen_and_one_line_says_so(
    browser, tmp_path, monkeypatch, capsys, encoder
):
    monkeypatch.setattr(vae.vae, "Encoder", encoder)
    photograph = write_photograph(tmp_path / "a.png")
    with seeded():
        page = write_page(tmp_path, "own", VAE((16, 16), 4, 3), str(photograph))
    warning, _ = capsys.readouterr().err.splitlines()
    said = "warning: this encoder does more than the page can: no photograph can be chosen on it"
    assert warning == said
    tab = browser.open(page.path.as_uri(), first=WATCHER)
    assert tab.errors() == []
    for hidden in ("choose", "privacy", "invitation"):
        assert tab.evaluate(f"document.querySelector('#{hidden}').offsetParent") is None
    assert_shows(tab, page, photograph)


# The page in the browser


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_browser_draws_what_pytorch_decodes(page, seen, moment):
    expected = page.decode(seen[moment]["z"])
    drawn = page.pixels(seen[moment]["pixels"])
    assert expected.std() > 0.01 * 255
    assert np.abs(drawn[..., :3] - expected).max() < SAME
    assert (drawn[..., 3] == 255).all()


@pytest.mark.parametrize("moment", ["loaded", "moved"])
def test_at_both_ends_of_a_slider_stands_what_it_leads_to(page, seen, moment):
    shown = seen[moment]
    for i, ends in enumerate(shown["ends"]):
        for end, place in zip(ends, map(float, shown["ranges"][i][:2]), strict=True):
            z = list(shown["z"])
            z[i] = place
            drawn = page.pixels(end["pixels"])[..., :3]
            assert np.abs(drawn - page.decode(z)).max() < SAME
            assert end["name"] == f"What z{i} at {place:g} leads to"


def test_the_canvas_shows_the_whole_picture_enlarged(page, seen):
    colour = page.decode(seen["loaded"]["z"]).mean(axis=(0, 1)) * np.ones(3)
    height, width = page.model.image_resolution
    assert seen["size"] == [512 * height // 16, 512 * width // 16]
    assert seen["canvas"] == pytest.approx([*colour, 255], abs=1)


def test_each_slider_goes_from_minus_4_to_4_or_as_far_as_the_latents_do(pages, plain):
    ends = reach(pages["plain"], plain["reset"]["z"])
    assert min(ends) == 4 < max(ends)
    assert plain["reset"]["ranges"] == [[str(-end), str(end), "0.05"] for end in ends]


def test_each_slider_goes_as_far_as_the_picture_that_the_page_is_made_for(pages, grey):
    ends = reach(pages["grey"], start(pages["grey"]))
    assert ends != reach(pages["grey"], torch.zeros(len(Z)))
    assert grey["loaded"]["ranges"] == [[str(-end), str(end), "0.05"] for end in ends]


def test_the_page_of_a_picture_opens_at_the_pictures_latent_mean(pages, grey):
    assert grey["loaded"]["z"] == pytest.approx(start(pages["grey"]).tolist(), abs=1e-4)
    assert grey["loaded"]["hash"] == ""


def test_the_page_of_no_picture_starts_at_a_draw_from_the_latents(pages, plain):
    z = torch.tensor([plain["reset"]["z"]])
    # A sum of ten squares: one draw in a million is beyond one of these.
    assert 0.3 < whitened(z, pages["plain"].latents).square().sum() < 45


def test_the_page_opens_where_the_address_says(plain):
    assert plain["loaded"]["z"] == Z


@pytest.mark.parametrize("moment", MOMENTS)
def test_sliders_show_where_z_is(seen, moment):
    z, shown = seen[moment]["z"], seen[moment]["shown"]
    assert seen[moment]["sliders"] == pytest.approx(z, abs=0.0251)  # they move in steps of 0.05
    assert [float(each) for each in shown] == pytest.approx(z, abs=0.0051)
    assert all(re.fullmatch(r"-?\d+\.\d\d", each) and each != "-0.00" for each in shown)


def test_a_slider_moves_one_dimension(plain):
    assert plain["moved"]["z"] == [1.5, 2.5, *Z[2:]]


def test_an_address_that_is_changed_moves_the_sliders_whatever_it_is(plain):
    assert plain["address"]["z"] == [-4, 4, *[0] * 8]
    assert plain["nonsense"]["z"] == [9, -9, *[0] * 8]
    assert plain["nonsense"]["ranges"][:2] == [["-9", "9", "0.05"]] * 2


@pytest.mark.parametrize("moment", ["moved", "random", "prior", "reset"])
def test_the_address_follows_sliders_and_buttons(seen, moment):
    z = [float(value) for value in seen[moment]["hash"].removeprefix("#z=").split(",")]
    assert z == pytest.approx(seen[moment]["z"], abs=0.00006)


def test_reset_moves_back_to_the_start(grey):
    assert grey["reset"]["z"] == grey["loaded"]["z"]


def test_a_reconstruction_is_called_so_until_a_slider_moves(plain, grey):
    captions = [grey[moment]["caption"] for moment in ("loaded", "moved", "reset")]
    assert captions == ["Its reconstruction", "What the sliders draw", "Its reconstruction"]
    assert plain["reset"]["caption"] == "What the sliders draw"


def test_the_buttons_draw_from_the_latents_or_from_the_prior(pages, plain):
    prior = MultivariateNormal(torch.zeros(len(Z)), torch.eye(len(Z)))
    for button, distribution in (("random", pages["plain"].latents), ("prior", prior)):
        z = whitened(torch.tensor(plain["draws"][button]).float(), distribution)
        # Six standard errors: two runs in a thousand million would fail.
        error = 6 / DRAWS**0.5
        assert z.mean(dim=0).abs().max() < error
        assert (z.T.cov() - torch.eye(len(Z))).abs().max() < error * 2**0.5


def test_the_large_picture_can_be_downloaded(plain):
    name, address = plain["download"]
    picture = Image.open(io.BytesIO(base64.b64decode(address.split(";base64,")[1])))
    assert (name, picture.size) == ("picture.png", tuple(plain["size"][::-1]))


def test_sliders_are_labelled_with_their_share_the_largest_first(pages, grey):
    with seeded():
        shares = variation_per_dimension(pages["grey"].model, pages["grey"].latents)
    found = [re.fullmatch(r"z(\d+) \((\d+)%\)", label) for label in grey["labels"]]
    assert [int(match[1]) for match in found] == shares.argsort(descending=True).tolist()
    for match in found:
        assert abs(int(match[2]) - 100 * shares[int(match[1])]) <= 0.51


# Photographs that are chosen on the page


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Page:
    """The page of a model with more latent dimensions than the page has sliders."""
    folder = tmp_path_factory.mktemp("many")
    photograph = str(write_photograph(folder / "a.png"))
    with seeded():
        return write_page(folder, "many", VAE((16, 16), 24, 3), photograph)


def write_photographs(folder: Path) -> dict[str, Path]:
    """Write a photograph in several forms; return their files by name."""
    image = Image.open(write_photograph(folder / "a.png", (150, 90), seed=1))
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright
    image.save(folder / "turned.jpg", exif=turned, quality=95)
    image.save(folder / "turned.png", exif=turned)
    # A profile in which red and blue are exchanged: who looks at it has other colours.
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace(b"rXYZ", b"____", 1).replace(b"bXYZ", b"rXYZ", 1)
    image.save(folder / "profile.png", icc_profile=profile.replace(b"____", b"bXYZ", 1))
    image.save(folder / "a.webp", quality=90)
    image.convert("L").save(folder / "grey.jpg")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.save(folder / "transparent.png")
    write_photograph(folder / "small.png", (11, 7), seed=2)
    write_photograph(folder / "wide.png", (1501, 21), seed=3)
    # More pixels than the page looks at in one piece.
    write_photograph(folder / "large.jpg", (2600, 1800), seed=4)
    return {path.name: path for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> dict[str, Path]:
    return write_photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="module")
def tabs(browser, pages, many) -> dict[str, tuple[Page, Tab]]:
    """Each page, opened."""
    return {
        name: (page, browser.open(page.path.as_uri(), first=WATCHER))
        for name, page in {**pages, "many": many}.items()
    }


@pytest.fixture(params=[*MODELS, "many"])
def opened(request, tabs) -> tuple[Page, Tab]:
    """Each page in turn, opened."""
    return tabs[request.param]


def wait_for_message(tab: Tab, expected: str) -> None:
    """Wait until the page says this."""
    tab.evaluate(
        f"""(async () => {{
          while (document.querySelector("#message").textContent !== {json.dumps(expected)}) {{
            await new Promise((resolve) => setTimeout(resolve, 10));
          }}
        }})()"""
    )


def choose(tab: Tab, photograph: Path) -> None:
    tab.choose("#file", photograph)
    wait_for_message(tab, f"{photograph.name}: the sliders are where the encoder puts it")


def assert_shows(tab: Tab, page: Page, photograph: Path) -> None:
    """The page shows a photograph and its reconstruction, the same as here to 1/255."""
    x = page.input(photograph)
    mean, _ = page.model.encoder(x)
    for canvas, expected in (
        ("#original", 255 * x[0].movedim(0, -1).numpy()),
        ("#picture", page.decode(mean[0])),
    ):
        shown = page.pixels(tab.evaluate(f"document.querySelector('{canvas}').pixels"))
        assert expected.std() > 0.01 * 255
        assert np.abs(shown[..., :3] - expected).max() <= 1.01
    assert tab.evaluate("document.querySelector('#caption').textContent") == "Its reconstruction"


FORMS = ("a.png", "a.webp", "grey.jpg", "large.jpg", "profile.png", "small.png")
FORMS += ("transparent.png", "turned.jpg", "turned.png", "wide.png")


@pytest.mark.parametrize("form", FORMS)
def test_a_photograph_is_reduced_and_encoded_as_in_training(opened, photographs, form):
    page, tab = opened
    choose(tab, photographs[form])
    assert_shows(tab, page, photographs[form])
    assert tab.errors() == []


def test_all_forms_are_tried(photographs):
    assert sorted(FORMS) == list(photographs)


def test_the_page_draws_what_similar_draws_as_the_reconstruction(browser, tmp_path, photographs):
    names = ["--checkpoint", "ten", "--output"]
    main(["explore", *names, str(tmp_path / "a.html")])
    photograph = str(photographs["turned.jpg"])
    main(["similar", photograph, "--count", "1", *names, str(tmp_path / "a.png")])
    similar = np.asarray(Image.open(tmp_path / "a.png"))[24:152, 136:264]
    tab = browser.open((tmp_path / "a.html").as_uri(), first=WATCHER)
    choose(tab, photographs["turned.jpg"])
    pixels = np.array(tab.evaluate("document.querySelector('#picture').pixels"))
    pixels = torch.tensor(pixels.reshape(1, 32, 32, 4)[..., :3]).movedim(-1, 1).float()
    enlarged = F.interpolate(pixels, scale_factor=4, mode="bicubic")[0].movedim(0, -1)
    # One of each picture's roundings, and what bicubic weights add to it.
    assert np.abs(enlarged.clamp(0, 255).numpy() - similar).max() < 2


def test_a_photograph_can_be_dropped_anywhere(tabs, photographs):
    page, tab = tabs["plain"]
    choose(tab, photographs["a.png"])
    tab.drop(photographs["small.png"], 600, 800)
    wait_for_message(tab, "small.png: the sliders are where the encoder puts it")
    assert_shows(tab, page, photographs["small.png"])


def test_of_two_photographs_the_one_that_was_chosen_last_stays(tabs, photographs):
    page, tab = tabs["plain"]
    names = ("large.jpg", "small.png")  # the second is read sooner than the first
    files = [[name, base64.b64encode(photographs[name].read_bytes()).decode()] for name in names]
    tab.evaluate(
        f"""Promise.all({json.dumps(files)}.map(([name, text]) =>
          encodePhotograph(new File([bytes(text)], name))))"""
    )
    assert_shows(tab, page, photographs["small.png"])


def test_reset_goes_back_to_the_photograph_that_was_chosen(tabs, photographs):
    page, tab = tabs["plain"]
    choose(tab, photographs["a.png"])
    tab.evaluate("document.querySelector('#random').click()")
    tab.evaluate("document.querySelector('#reset').click()")
    assert_shows(tab, page, photographs["a.png"])


def test_a_file_that_is_no_picture_is_named_and_all_stays_as_it_was(tabs, photographs, tmp_path):
    page, tab = tabs["plain"]
    choose(tab, photographs["a.png"])
    broken = tmp_path / "broken.jpg"
    broken.write_text("no picture")
    tab.choose("#file", broken)
    said = "broken.jpg cannot be read here: choose a JPEG, PNG or WebP picture"
    wait_for_message(tab, said)
    assert_shows(tab, page, photographs["a.png"])


def test_nothing_is_requested_but_the_page_itself(tabs):
    page, tab = tabs["grey"]
    requests = [each["request"]["url"] for each in tab.events("Network.requestWillBeSent")]
    assert requests == [page.path.as_uri()]


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "data:,flower"])
def test_the_browser_would_let_nothing_out(tabs, address):
    _, tab = tabs["grey"]
    send = f"fetch('{address}', {{ mode: 'no-cors' }}).then(() => 'sent', () => 'stopped')"
    stopped = (
        "new Promise((stop) => addEventListener('securitypolicyviolation', stop, { once: 1 }))"
    )
    assert (
        tab.evaluate(
            f"(async () => {{ const stop = {stopped}; const s = {send}; await stop; return s; }})()"
        )
        == "stopped"
    )


# Many dimensions


def test_many_dimensions_have_ten_sliders_the_largest_share_first(many):
    sliders = exported(many.path)["sliders"]
    shares = [slider["share"] for slider in sliders]
    assert [slider["name"] for slider in sliders] == [f"d{i}" for i in range(1, 11)]
    assert shares == sorted(shares, reverse=True)
    assert 10 / 24 < sum(shares) < 1


def test_a_slider_reads_its_own_move_and_no_others(many):
    sliders = exported(many.path)["sliders"]
    moves = torch.tensor([slider["direction"] for slider in sliders])
    readings = torch.tensor([slider["reading"] for slider in sliders])
    assert torch.allclose(readings @ moves.T, torch.eye(10), atol=1e-4)


def test_along_the_first_slider_pictures_change_more_than_along_the_last_and_by_chance(many):
    model, latents, sliders = many.model, many.latents, exported(many.path)["sliders"]
    with seeded():
        z = latents.sample((64,))
        by_chance = latents.sample((64,)) - latents.mean
    by_chance = by_chance / whitened(by_chance + latents.mean, latents).norm(dim=1, keepdim=True)

    def change(move: Tensor) -> Tensor:
        return torch.square(model.decoder(z + 0.1 * move) - model.decoder(z)).sum()

    first, last = (torch.tensor(sliders[i]["direction"]) for i in (0, -1))
    assert change(first) > max(change(last), change(by_chance))


# How it is used


def test_picture_and_ten_sliders_are_all_in_sight_on_a_phone_on_its_side(seen):
    assert seen["viewport"] == list(ON_ITS_SIDE)
    assert len(seen["boxes"]) == 1 + 10
    for box in seen["boxes"]:
        assert box["width"] > 100
        assert 0 <= box["left"] < box["right"] <= ON_ITS_SIDE[0]
        assert 0 <= box["top"] < box["bottom"] <= ON_ITS_SIDE[1]


@pytest.fixture
def upright(browser, name, pages) -> Tab:
    """Each page on a phone."""
    return browser.open(pages[name].path.as_uri(), UPRIGHT)


def test_on_a_phone_the_picture_stays_in_sight_beside_the_last_slider(upright):
    assert upright.evaluate("document.documentElement.scrollWidth") <= UPRIGHT[0]
    boxes = upright.evaluate(
        """[...document.querySelectorAll("#sliders input")].at(-1).focus(),
        ["#picture", ":focus"].map((name) =>
          document.querySelector(name).getBoundingClientRect().toJSON())"""
    )
    for box in boxes:
        assert box["width"] > 100
        assert 0 <= box["top"] < box["bottom"] <= UPRIGHT[1]
    picture, slider = boxes
    assert picture["bottom"] < slider["top"]


def test_buttons_and_sliders_are_reached_and_moved_by_the_keyboard(browser, pages):
    tab = browser.open(pages["plain"].path.as_uri(), first=WATCHER)
    order = []
    for _ in range(5 + 10):
        tab.press("Tab")
        order.append(tab.evaluate("document.activeElement.id"))
    assert order[:5] == ["choose", "random", "prior", "reset", "download"]
    assert sorted(order[5:]) == [f"z{i}" for i in range(10)]
    tab.press("End")
    assert tab.evaluate("document.activeElement.valueAsNumber === z[document.activeElement.id[1]]")
    tab.press("ArrowLeft")
    last = tab.evaluate("[Number(document.activeElement.max), z[document.activeElement.id[1]]]")
    assert last[1] == pytest.approx(last[0] - 0.05)


def test_the_sliders_of_many_dimensions_read_0_where_the_latents_mean_is(many):
    latents, sliders = many.latents, exported(many.path)["sliders"]
    z = latents.mean + 2 * torch.tensor(sliders[0]["direction"])
    places = [
        torch.tensor(slider["reading"]) @ (z - torch.tensor(slider["origin"])) for slider in sliders
    ]
    assert torch.allclose(torch.stack(places), torch.tensor([2.0] + [0.0] * 9), atol=1e-4)
