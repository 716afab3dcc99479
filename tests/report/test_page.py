"""The report as a browser reads it: whole, escaped, without a word to the network, the same when it is made again."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

import ooc_ntk
from ooc_ntk import api
from ooc_ntk.report.page import RESULTS, render_page, write_page
from ooc_ntk.report.pictures import picture
from ooc_ntk.report.tables import info_table
from ooc_ntk.storage.results import write_result
from tests.cases import case

pytestmark = pytest.mark.usefixtures("one_thread", "frozen")

NETS = ""

EVIL = "<script>alert('x')</script> & \"quoted\""

#: Elements that have no end.
VOID = {"meta", "img", "link", "br", "input"}


class Page(HTMLParser):
    """What is on a page: elements with attributes, text, cells of tables."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.words, self.open, self.rows = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] == "style":
            return
        self.words.append(text)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += text

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def finished(memory_folder, rates):
    folder = memory_folder / "run"
    plan = ooc_ntk.plan(case("smooth-mlp").job(), ooc_ntk.Budget(host="16GiB", disk="1GiB"), rates=rates)
    ooc_ntk.run(case("smooth-mlp").job(), folder, plan=plan, progress=False)
    return folder


@pytest.fixture
def run(finished, memory_path):
    """A run directory whose name is hostile."""
    folder = memory_path / "<b>run & co"
    shutil.copytree(finished, folder)
    return folder


def fill(run):
    """Results as the commands write them, hostile text among them."""
    write_result(
        run,
        "spectrum",
        {"leading": [3.0, 2.0, 1.0], "many": list(range(100)), "method": EVIL, "decay": {"power": 1.23456789}},
    )
    with picture(run / "spectrum" / "spectrum.png", 2, 1) as figure:
        figure.subplots().plot([3, 2, 1])
    neighbour = {"index": 5, "label": 3, "text": EVIL, "value": 0.75, "same_class": False}
    shown = [{"index": 2, "label": 4, "text": "a <i>text</i>", "neighbours": [neighbour]}]
    same = {"nearest": 0.5, "all_k": 0.25, "by_chance": 0.1}
    hubs = [{"train_sample": 5, "of_samples": 6}]
    figures = {"k": 1, "by": "cosine", "rows": "test", "samples": 7, "same_class": same, "near_to_most": hubs}
    write_result(run, "nearest", {**figures, "note": "", "shown": shown})
    with picture(run / "nearest" / "nearest.png", 2, 1) as figure:
        figure.subplots().imshow([[0, 1], [1, 0]])


def test_a_page_of_all_that_is_there(run):
    fill(run)
    info = api.info(run)
    page = Page(write_page(info).read_text())
    for label, value in info.plan.summary():
        assert [label, value] in page.rows
    console = Console(width=300, file=io.StringIO())
    console.print(info_table(info))
    lines = console.file.getvalue().splitlines()
    measured = [row for row in page.rows if row[0] in ("time", "peak host memory", "bytes written")]
    assert len(measured) == 4, "the promised time stands in the summary as well"
    for row in measured[1:]:
        assert any(line.split() == " ".join(row).split() for line in lines), "as 'ooc-ntk info' shows it"
    assert ["plan", info.plan.digest] in page.rows
    assert ["leading", "3, 2, 1"] in page.rows
    assert ["many", "100 entries, in the JSON file"] in page.rows
    assert ["decay, power", "1.2346"] in page.rows
    assert "of the same class: 50.0% of the nearest, 25.0% of all 1, 10.0% by chance" in page.text
    assert ["train 5", "0.75", "3 ✗", EVIL] in page.rows
    assert ["test 2", "", "4", "a <i>text</i>"] in page.rows


def test_pictures_are_inside(run):
    fill(run)
    page = Page(render_page(api.info(run)))
    images = page.all("img")
    for name, image in zip(("spectrum", "nearest"), images, strict=True):
        kind, _, content = image["src"].partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(content, validate=True) == (run / name / f"{name}.png").read_bytes()
        assert image["alt"].startswith(RESULTS[name][0])


def test_nothing_refers_to_the_network_and_nothing_runs(run):
    fill(run)
    text = render_page(api.info(run))
    page = Page(text)
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"{tag} {name} would run something"
            if name in ("src", "href", "action", "data", "srcset", "poster"):
                assert value.startswith(("data:image/png;base64,", "#")), f"{tag} {name}={value[:40]}"
    assert not re.search(r"https?://|url\(|@import", re.sub(r"base64,[^\"]*", "", text))
    policies = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    targets = {attributes.get("id") for _, attributes in page.elements}
    assert {link["href"][1:] for link in page.all("a")} <= targets


def test_text_is_escaped(run):
    fill(run)
    text = render_page(api.info(run))
    assert "<script" not in text
    assert "<b>" not in text
    assert "<i>" not in text
    page = Page(text)
    assert page.text.count("alert('x')") == 2
    assert run.name in page.text
    title = text[text.index("<title>") : text.index("</title>")]
    assert title == "<title>&lt;b&gt;run &amp; co · ooc-ntk"


def test_it_reads_on_a_phone_and_in_the_dark(run):
    text = render_page(api.info(run))
    page = Page(text)
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert "@media (prefers-color-scheme: dark)" in text
    wide = [tag for tag, attributes in page.elements if tag == "table" or attributes.get("class") == "wide"]
    assert wide == ["div", "table"] * (len(wide) // 2), "every table scrolls by itself"


def test_what_is_not_there_says_what_makes_it(run):
    page = Page(render_page(api.info(run)))
    commands = re.findall(r"ooc-ntk \w+ '[^']*'", page.text)
    assert commands == [f"ooc-ntk {name} '{run}'" for name in RESULTS]
    write_result(run, "fit", {"ridge": 0.1})
    page = Page(render_page(api.info(run)))
    assert "ooc-ntk fit" not in page.text
    assert ["ridge", "0.1"] in page.rows


def test_made_again_it_is_the_same_to_the_byte(run):
    fill(run)
    first = write_page(api.info(run)).read_bytes()
    assert write_page(api.info(run)).read_bytes() == first
    write_result(run, "fit", {"ridge": 0.1})
    assert write_page(api.info(run)).read_bytes() != first


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "null"])
def test_a_result_that_cannot_be_read_is_as_if_it_were_not_there(run, content):
    (run / "fit").mkdir()
    (run / "fit" / "fit.json").write_text(content)
    assert "ooc-ntk fit" in Page(render_page(api.info(run))).text


def test_null_figures_and_notes(run):
    write_result(run, "fit", {"best": float("nan"), "used": True, "count": 12345, "note": EVIL})
    page = Page(render_page(api.info(run)))
    for row in (["best", "-"], ["used", "yes"], ["count", "12,345"]):
        assert row in page.rows
    assert f"note: {EVIL}" in page.text


def test_the_command(cli, run):
    shutil.copytree(run, "r")
    result = cli("report", "r")
    assert (result.exit_code, result.output) == (0, "report: r/report.html\n")
    assert Page(Path("r/report.html").read_text()).text.startswith("r · ooc-ntk")
    assert cli("report", "r", "--out", "new/page.html", "-q").output == ""
    assert Path("new/page.html").read_bytes() == Path("r/report.html").read_bytes()
    for arguments, words in ((("nowhere",), ["nowhere", "no run"]), (("r", "--out", "new"), ["new is a folder"])):
        result = cli("report", *arguments)
        assert result.exit_code == 2
        for word in words:
            assert word in result.output


def test_an_unfinished_run_has_a_page_too(cli, run):
    from ooc_ntk.storage.manifest import Manifest

    manifest = Manifest(run)
    manifest.withdraw([key for key in manifest.keys() if key.startswith("kernel")])  # noqa: SIM118
    manifest.close()
    assert "not finished: run the same command again to go on" in Page(render_page(api.info(run))).text


def test_nearest_samples_of_a_real_run_are_on_its_page(finished, memory_path):
    """What ``nearest`` writes is what the page reads, key by key."""
    folder = memory_path / "run"
    shutil.copytree(finished, folder)
    found = api.nearest(folder, 2, show=2, job=case("smooth-mlp").job())
    page = Page(render_page(api.info(folder)))
    for row in found.shown:
        for place, sample in enumerate(row.neighbours):
            mark = "✓" if row.same(place) else "✗"
            cells = [f"train {sample.index}", f"{row.values[place]:.4g}", f"{sample.label} {mark}"]
            assert cells in page.rows
    assert json.loads((folder / "nearest" / "nearest.json").read_text())["same_class"] is not None
    assert "of the same class" in page.text
