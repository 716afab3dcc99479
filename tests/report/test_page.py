"""The report as a browser reads it: whole, escaped, without a word to the network, the same when it is made again."""

import base64
import gzip
import hashlib
import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

import ooc_ntk
from ooc_ntk import api
from ooc_ntk.errors import StorageError
from ooc_ntk.report.embed import _data
from ooc_ntk.report.page import make_page, render_page, write_page
from ooc_ntk.report.tables import info_table
from ooc_ntk.report.words import number
from ooc_ntk.storage.manifest import Manifest
from ooc_ntk.storage.results import write_result
from tests.cases import case

from .reading import Page

pytestmark = pytest.mark.usefixtures("one_thread", "frozen")

NETS = ""

EVIL = "<script>alert('x')</script> & \"quoted\""


@pytest.fixture
def run(finished, memory_path):
    """A run directory whose name is hostile."""
    folder = memory_path / "<b>run & co"
    shutil.copytree(finished, folder)
    return folder


def nearest_figures(**more):
    neighbour = {"index": 5, "label": 3, "text": EVIL, "value": 0.75, "same_class": False}
    shown = [{"index": 2, "label": 4, "text": "a <i>text</i>", "neighbours": [neighbour]}]
    same = {"nearest": 0.5, "all_k": 0.25, "by_chance": 0.1}
    hubs = [{"train_sample": 5, "of_samples": 6}]
    found = {"k": 1, "by": "cosine", "rows": "test", "samples": 7, "same_class": same, "near_to_most": hubs}
    return {**found, "note": "", "shown": shown, **more}


def test_everything_that_is_there_is_shown(exact):
    page = Page(render_page(exact))
    assert page.headings == [
        *("computed", "map", "diagonal", "spectrum", "regression", "surrogates", "nearest"),
        *("promised", "timeline", "verification", "provenance"),
    ]
    assert page.figures == [
        *("map", "classes", "diagonal", "within", "spectrum", "shares", "gcv", "accuracy", "promises", "timeline"),
    ]
    assert "This command makes it" not in page.text
    info = api.info(exact)
    for label, value in info.plan.summary()[:2]:
        assert [label, value] in page.rows
    console = Console(width=300, file=io.StringIO())
    console.print(info_table(info))
    lines = console.file.getvalue().splitlines()
    measured = [row for row in page.rows if row[0] in ("time", "rows", "peak host memory", "bytes written")]
    assert len(measured) == 4
    for row in measured:
        assert any(line.split() == " ".join(row).split() for line in lines), "as 'ooc-ntk info' shows it"
    assert ["train data", "digits[0:60]"] in page.rows
    assert ["digest of the plan", info.plan.digest] in page.rows
    assert ["digest of the data", info.job_digests["data"]] in page.rows
    assert any(row[0] == "machine" and "Python" in row[1] for row in page.rows)
    checks = [row for row in page.rows if len(row) == 3 and row[1] == "passed"]
    assert {row[0] for row in checks} >= {"checksums", "symmetry", "entries recomputed in float64"}


def test_raw_keys_are_words(exact):
    text = Page(render_page(exact)).text
    for key in ("ridge_ratio", "same_class", "near_to_most", "effective_dimension", "target_shares", "test_errors"):
        assert key not in text
    for words in ("ridge ratio", "near to most", "target shares", "rows by"):
        assert words not in text, "a key is not a word"


def test_figures_have_the_numbers_of_the_results(exact):
    items = {item["target_id"]: item for item in json.loads(Page(render_page(exact)).scripts[0])["items"]}
    fit = json.loads((exact / "fit" / "fit.json").read_text())
    text = json.dumps(items["figure-gcv"])
    for name in ("gcv", "loo", "train"):
        values = [value for _, value in sorted(zip(fit["curve"]["ridges"], fit["curve"][name], strict=True))]
        assert json.dumps(values) in text
    assert json.dumps(fit["accuracies"]) in json.dumps(items["figure-accuracy"])
    spectrum = json.loads((exact / "spectrum" / "spectrum.json").read_text())
    assert json.dumps([value for value in spectrum["values"] if value > 0]) in json.dumps(items["figure-spectrum"])
    (data,) = [each["array"]["data"] for each in _inside(items["figure-map"]) if each.get("shape") == [80, 60]]
    content = base64.b64decode(data)
    content = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content  # as newer releases of Bokeh do
    means = np.frombuffer(content, dtype="<f4").reshape(80, 60)
    labels, kernel = api.run_labels(exact), api.open(exact)
    order = np.argsort(labels.train, kind="stable")
    np.testing.assert_array_equal(means[:60], kernel[:60, :][order][:, order])
    np.testing.assert_array_equal(means[60:], kernel[60:, :][np.argsort(labels.test, kind="stable")][:, order])


def _inside(value):
    """Every object in a figure's description."""
    if isinstance(value, dict):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _inside(each)


def test_pictures_of_similar_samples_are_inside(exact):
    page = Page(render_page(exact))
    kept = json.loads((exact / "nearest" / "nearest.json").read_text())
    images = page.all("img")
    assert len(images) == sum(1 + len(row["neighbours"]) for row in kept["shown"])
    source = api.Job(nn.Identity(), "digits[0:60]", "digits[60:80]").test_source()
    kind, _, content = images[0]["src"].partition(",")
    assert kind == "data:image/png;base64"
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(content, validate=True))))
    sample = source.fetch(kept["shown"][0]["index"], kept["shown"][0]["index"] + 1).args[0].reshape(8, 8).numpy()
    assert pixels.shape == (8, 8)
    assert np.corrcoef(pixels.ravel(), sample.ravel())[0, 1] > 0.9999
    assert images[0]["alt"].startswith(f"test {kept['shown'][0]['index']}")


def test_nothing_refers_to_the_network_and_nothing_else_may_run(exact):
    text = render_page(exact)
    page = Page(text)
    assert not {tag for tag, _ in page.elements} & {"link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"{tag} {name} would run something"
            if name in ("src", "href", "action", "data", "srcset", "poster"):
                assert value.startswith(("data:image/png;base64,", "#")), f"{tag} {name}={value[:40]}"
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    allowed = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert allowed["default-src"] == "'none'"
    assert allowed["img-src"] == "data:"
    wanted = [
        f"'sha256-{base64.b64encode(hashlib.sha256(each.encode()).digest()).decode()}'" for each in page.scripts[1:]
    ]
    assert allowed["script-src"].split() == wanted, "by what they are, and no others"
    targets = {attributes.get("id") for _, attributes in page.elements}
    assert {link["href"][1:] for link in page.all("a")} <= targets
    for name in page.figures:
        assert f"figure-{name}" in targets
    for plot in (attributes for tag, attributes in page.elements if attributes.get("class") == "plot"):
        assert plot["role"] == "img"
        assert len(plot["aria-label"]) > 20


def test_text_is_escaped(run):
    write_result(run, "nearest", nearest_figures(note=EVIL))
    write_result(run, "fit", {"ridge": 0.1, "note": EVIL})
    text = render_page(run)
    assert "<script>alert" not in text
    assert "<b>run" not in text
    assert "<i>text" not in text
    page = Page(text)
    assert page.text.count("alert('x')") == 2, "of the note and of a sample"
    assert "a <i>text</i>" in page.text
    assert run.name in page.text
    title = text[text.index("<title>") : text.index("</title>")]
    assert title == "<title>&lt;b&gt;run &amp; co · ooc-ntk"


def test_the_data_of_figures_cannot_end_their_script():
    assert json.loads(_data(["</script><script>"])) == ["</script><script>"]
    assert "<" not in _data({"</script>": "<!--"})


def test_neighbours_in_words(run):
    write_result(run, "nearest", nearest_figures())
    text = Page(render_page(run)).text
    assert "Of the same class: 50.0% of the nearest, 25.0% of all 1, 10.0% by chance." in text
    assert "train 5 · 0.7500 · class 3 ✗" in text
    assert "largest cosine" in text


def test_what_is_not_there_says_what_makes_it(run):
    commands = re.findall(r"ooc-ntk \w+ '[^']*'", Page(render_page(run)).text)
    assert [each for each in commands if "verify" not in each] == [
        f"ooc-ntk {name} '{run}'" for name in ("spectrum", "fit")
    ]
    write_result(run, "fit", {"ridge": 0.1, "ridge_ratio": 0.01, "test_error": 0.5})
    text = Page(render_page(run)).text
    assert "One ridge was fitted, 0.1000; mean squared error of the test samples 0.5000." in text


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "null"])
def test_a_result_that_cannot_be_read_is_as_if_it_were_not_there(run, content):
    (run / "fit").mkdir()
    (run / "fit" / "fit.json").write_text(content)
    assert "ooc-ntk fit" in Page(render_page(run)).text


def test_made_again_it_is_the_same_to_the_byte(exact, copied):
    run = copied(exact)
    first = write_page(run).read_bytes()
    assert write_page(run).read_bytes() == first
    shutil.rmtree(run / "fit")
    assert write_page(run).read_bytes() != first


def test_a_projected_run_shows_residuals_beside_error_bars(projected, copied):
    page = Page(render_page(projected))
    assert {"residuals", "scores"} <= set(page.figures)
    kept = json.loads((projected / "audit.json").read_text())["compared"]
    kernel = api.open(projected)
    assert len(kept["rows"]) == 144
    stored = [float(kernel[row, column]) for row, column in zip(kept["rows"], kept["columns"], strict=True)]
    np.testing.assert_allclose(kept["stored"], stored, rtol=1e-6)
    errors = kernel.errors(kept["rows"][:1], kept["columns"][:12])
    np.testing.assert_allclose(kept["standard_errors"][:12], errors[0], rtol=1e-9)
    scores = (np.array(kept["stored"]) - kept["exact"]) / kept["standard_errors"]
    share = (np.abs(scores) <= 1.959964).mean()
    assert f"{share:.0%} of 144 recomputed entries are within their 95% error bars" in page.text
    assert f"root mean square is {np.sqrt(np.mean(scores**2)):.2f} predicted standard errors" in page.text
    run = copied(projected)
    (run / "audit.json").unlink()
    page = Page(render_page(run))
    assert "residuals" not in page.figures
    assert "verify" in page.text


def test_many_recomputed_entries_are_drawn_from(make_run, digits_job):
    full = make_run("full", digits_job("digits[0:12]", "digits[12:16]", kernel="full"))
    found = api.verify(full, samples=6)
    assert found.compared is not None
    assert len(found.compared.rows) == 1000
    kernel = api.open(full)
    for place in range(0, 1000, 97):
        row, column = found.compared.rows[place], found.compared.columns[place]
        assert kernel[row, column] == found.compared.stored[place]
        assert found.compared.exact[place] == pytest.approx(found.compared.stored[place], rel=1e-4, abs=1e-5)
    page = Page(render_page(full))
    assert "10 outputs, within a class by output" in page.text


def test_layers_have_shares(make_run, digits_job):
    run = make_run("layers", digits_job(test=None, by="layer"))
    page = Page(render_page(run))
    assert "layers" in page.figures
    traces = api.info(run).layer_traces
    most = max(traces, key=traces.get)
    assert f"most, {traces[most] / sum(traces.values()):.0%}, is of {most}" in page.text
    api.spectrum(run, layers=True)
    assert "alignment" in Page(render_page(run)).figures


def test_runs_without_labels_of_one_sample_and_of_one_class(make_run, finished):
    images = torch.randn(6, 8)
    text = Page(render_page(make_run("one", ooc_ntk.Job(nn.Linear(8, 3), images[:1])))).text
    assert "No statistics by class: without labels (the run in" in text
    assert "rows and columns in the order of the data" in text
    data = torch.utils.data.TensorDataset(images, torch.zeros(6, dtype=torch.long))
    job = ooc_ntk.Job(nn.Linear(8, 3), data)
    page = Page(render_page(make_run("same", job), job))
    assert "No statistics by class: there is one class only." in page.text
    assert "of one class, 0" in page.text
    assert "classes" not in page.figures
    assert "classes" in Page(render_page(finished, case("smooth-mlp").job())).figures, (
        "labels of live data, by their job"
    )


def test_an_unfinished_run_has_a_page_too(run):
    manifest = Manifest(run)
    manifest.withdraw([key for key in manifest.keys() if key.startswith("kernel")])  # noqa: SIM118
    manifest.close()
    page = Page(render_page(run))
    assert "not finished: run the same command again to go on" in page.text
    assert page.headings == ["computed", "promised", "timeline", "provenance"]
    assert page.figures[-1] == "timeline"


def test_checkpoints_have_a_page_of_their_drift(memory_path):
    torch.manual_seed(0)
    weights = [nn.Linear(8, 3).state_dict() for _ in range(3)]
    job = ooc_ntk.Job(nn.Linear(8, 3), torch.randn(6, 8))
    found = ooc_ntk.run_checkpoints(job, memory_path / "several", weights, progress=False)
    found.mean()
    page = Page(write_page(memory_path / "several").read_text())
    assert page.figures == ["drift", "distances"]
    drift = found.drift()
    assert [found.names[2], number(float(drift.norms[2]))] == [row[:2] for row in page.rows if len(row) == 4][-1]
    with pytest.raises(StorageError, match="is the mean of the kernels in .*; report on"):
        render_page(memory_path / "several" / "mean")


def test_a_run_is_reported_on_from_its_store(digits_job, memory_path, rates):
    place, url = memory_path / "papers", f"file://{memory_path}/store"
    ooc_ntk.run(digits_job(), place, progress=False, store=url)
    assert "map" in Page(render_page(place)).figures
    shutil.rmtree(place)
    with pytest.raises(ooc_ntk.InputError, match="say where the report of file:///.* goes: --out"):
        write_page(url)
    page = Page(write_page(url, memory_path / "store.html").read_text())
    assert {"map", "timeline"} <= set(page.figures)
    assert ["run directory", url] in page.rows


def test_the_command(cli, exact):
    shutil.copytree(exact, "r")
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


def test_without_bokeh_the_extra_is_named(cli, exact, monkeypatch):
    monkeypatch.setitem(sys.modules, "bokeh", None)
    for arguments in (("report", exact), ("report", exact, exact), ("demo", "--out", "d")):
        result = cli(*arguments)
        assert result.exit_code == 2
        assert "a report needs Bokeh, which is not installed; run: python -m pip install 'ooc-ntk[report]'" in " ".join(
            result.output.split()
        )
    assert not Path("d").exists()


def test_a_page_of_a_run_is_small(exact):
    assert len(render_page(exact).encode()) < 3_000_000
    assert make_page(exact).sections[0].name == "computed"
