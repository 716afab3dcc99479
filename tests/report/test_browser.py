"""Pages as people see them, in headless Chromium: every figure drawn, nothing loaded, nothing too wide, readable.

With ``OOC_NTK_BROWSER=required`` in the environment a browser that is missing is a failure.
"""

import io
import os
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from ooc_ntk.report.compare import write_comparison
from ooc_ntk.report.figures.theme import DARK, LIGHT
from ooc_ntk.report.page import write_page

from .reading import Page

pytestmark = pytest.mark.usefixtures("one_thread", "frozen")

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or "/usr/bin/chromium"

#: What keeps a browser of a test from the network, the screen and the sandbox that root has not.
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}

#: Text and the ground that is behind it, by the colours that the browser has computed.
CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => {
    const part = [r, g, b].map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
  };
  const found = [];
  for (const each of document.body.querySelectorAll("*")) {
    const said = [...each.childNodes].filter((n) => n.nodeType === 3).map((n) => n.textContent.trim()).join("");
    if (!said || !each.checkVisibility() || each.tagName === "SCRIPT") continue;
    let behind = each;
    while (behind && rgba(getComputedStyle(behind).backgroundColor)[3] < 255) behind = behind.parentElement;
    const ground = light(rgba(getComputedStyle(behind ?? document.body).backgroundColor));
    const letters = light(rgba(getComputedStyle(each).color));
    const ratio = (Math.max(ground, letters) + 0.05) / (Math.min(ground, letters) + 0.05);
    found.push([each.tagName, said.slice(0, 40), ratio]);
  }
  return found;
}"""

#: What a hover has to say, wherever Bokeh keeps it.
TOOLTIPS = """() => {
  const found = [];
  const walk = (root) => root.querySelectorAll("*").forEach((each) => {
    if (each.classList?.contains("bk-Tooltip")) found.push((each.shadowRoot ?? each).textContent);
    if (each.shadowRoot) walk(each.shadowRoot);
  });
  walk(document);
  return found.join(" ");
}"""


def missing(why):
    """Skip, or where a browser must be there fail."""
    if os.environ.get("OOC_NTK_BROWSER") == "required":
        pytest.fail(why)
    pytest.skip(why)


@pytest.fixture(scope="module")
def browser():
    """Chromium with a profile of its own."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed")
    if not os.path.exists(BROWSER):
        missing("chromium is not installed")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=BROWSER, args=list(FLAGS))
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(exact, projected, memory_folder):
    """Pages by name: of a run with everything, of a projected one, of both."""
    return {
        "exact": write_page(exact, memory_folder / "exact.html"),
        "projected": write_page(projected, memory_folder / "projected.html"),
        "both": write_comparison(exact, projected, memory_folder / "both.html"),
    }


class Seen:
    """A page in a window, and all that went wrong in it."""

    def __init__(self, browser, path, size, scheme):
        width, height = SIZES[size]
        self.context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.wrong, self.asked = [], []
        self.page.on("console", lambda said: said.type in ("error", "warning") and self.wrong.append(said.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("requestfailed", lambda request: self.wrong.append(request.url))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.drawn(scheme)

    def drawn(self, scheme):
        """Wait until every figure is there in these colours."""
        self.page.wait_for_selector(f"html[data-drawn='{scheme}']", state="attached", timeout=30_000)
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def picture(self, name):
        """(height, width, 3) pixels of a figure as they are on the screen."""
        shot = self.page.locator(f"#figure-{name}").screenshot()
        return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).astype(int)


def ground(scheme):
    colour = (LIGHT if scheme == "light" else DARK)["ground"]
    return np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)])


def ink(picture, scheme):
    """Share of the pixels that are not the ground."""
    return float((np.abs(picture - ground(scheme)).max(2) > 12).mean())


def check_figures(seen, path, scheme):
    names = Page(path.read_text()).figures
    assert names
    for name in names:
        picture = seen.picture(name)
        assert np.abs(picture[1, 1] - ground(scheme)).max() <= 3, f"{name} has the ground of the page"
        inner = picture[picture.shape[0] // 8 : -picture.shape[0] // 8, picture.shape[1] // 5 : -picture.shape[1] // 5]
        assert ink(picture, scheme) > 0.01, f"{name} is empty"
        assert ink(inner, scheme) > 0.002, f"{name} has axes and nothing in them"
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 12, f"{name} has letters and lines"


VIEWS = [
    *[("exact", size, scheme) for size in SIZES for scheme in ("light", "dark")],
    *(("projected", "desktop", "dark"), ("projected", "phone", "light")),
    *(("both", "desktop", "light"), ("both", "phone", "dark")),
]


@pytest.mark.parametrize(("name", "size", "scheme"), VIEWS)
def test_a_page_is_drawn_whole_and_readable(browser, pages, name, size, scheme):
    seen = Seen(browser, pages[name], size, scheme)
    try:
        check_figures(seen, pages[name], scheme)
        wide, window = seen.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide <= window, "the page itself never scrolls to the side"
        contrasts = seen.page.evaluate(CONTRASTS)
        assert len(contrasts) > 100
        assert [each for each in contrasts if each[2] < 4.5] == []
        assert seen.wrong == []
        assert [url for url in seen.asked if not url.startswith("data:")] == [pages[name].as_uri()]
    finally:
        seen.context.close()


def test_figures_follow_the_reader_from_light_to_dark_and_back(browser, pages):
    seen = Seen(browser, pages["exact"], "desktop", "light")
    try:
        before = seen.picture("gcv")
        for scheme in ("dark", "light"):
            seen.page.emulate_media(color_scheme=scheme)
            seen.drawn(scheme)
            check_figures(seen, pages["exact"], scheme)
        assert np.abs(seen.picture("gcv") - before).max() == 0
        assert seen.page.evaluate("document.querySelectorAll('.plot > *').length") == len(
            Page(pages["exact"].read_text()).figures
        ), "the earlier drawings are gone"
        assert seen.wrong == []
    finally:
        seen.context.close()


def test_the_map_says_what_is_below_the_pointer(browser, pages):
    seen = Seen(browser, pages["exact"], "desktop", "light")
    try:
        place = seen.page.locator("#figure-map")
        place.scroll_into_view_if_needed()
        box = place.bounding_box()
        for step in (0, 1):  # a pointer that only appears has not moved
            seen.page.mouse.move(box["x"] + 0.3 * box["width"] + step, box["y"] + 0.3 * box["height"])
        said, until = "", time.monotonic() + 10
        while "entries of these classes" not in said and time.monotonic() < until:
            said = seen.page.evaluate(TOOLTIPS)
        assert "mean entry" in said
        assert "class " in said
    finally:
        seen.context.close()


def test_a_figure_that_is_not_drawn_is_noticed(browser, pages, memory_path):
    broken = memory_path / "broken.html"
    text = pages["projected"].read_text().replace('id="figure-scores"', 'id="figure-other"')
    broken.write_text(text)
    context = browser.new_context()
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(broken.as_uri())
    page.wait_for_selector("#figure-residuals > *", state="attached", timeout=30_000)
    assert page.evaluate("document.documentElement.dataset.drawn") == ""
    context.close()
    assert wrong


@pytest.mark.parametrize("colours", [LIGHT, DARK])
def test_letters_of_figures_have_contrast(colours):
    def light(colour):
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [each / 12.92 if each <= 0.03928 else ((each + 0.055) / 1.055) ** 2.4 for each in parts]
        return float(np.dot((0.2126, 0.7152, 0.0722), linear))

    for role in ("ink", "soft", "accent", "second", "good", "bad"):
        for ground_ in ("ground", "panel"):
            levels = sorted((light(colours[role]), light(colours[ground_])))
            assert (levels[1] + 0.05) / (levels[0] + 0.05) >= 4.5, f"{role} on {ground_}"
    assert len(set(colours.values())) == len(colours), "one is put in the place of the other"
    assert not set(LIGHT) ^ set(DARK)
