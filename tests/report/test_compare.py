"""Two runs side by side: figures against the kernels themselves, and what is refused."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import ooc_ntk
from ooc_ntk import api
from ooc_ntk.report.compare import make_comparison, write_comparison
from ooc_ntk.report.sections import pair
from ooc_ntk.report.sections.run import open_run
from ooc_ntk.report.words import number

from .reading import Page

pytestmark = pytest.mark.usefixtures("one_thread", "frozen")

NETS = ""


def test_exact_against_projected(exact, projected, memory_path):
    page = Page(write_comparison(exact, projected, memory_path / "page.html").read_text())
    assert page.figures == [
        *("first", "second", "difference", "entries", "residuals", "scores", "spectra", "neighbours"),
    ]
    a, b = (np.asarray(api.open(each)[:60, :], dtype=np.float64) for each in (exact, projected))
    rows = {row[0]: row[-1] for row in page.rows if len(row) == 2}
    difference = np.linalg.norm(b - a) / np.linalg.norm(a)
    assert rows["relative Frobenius difference, ‖B − A‖ / ‖A‖"] == f"{number(100 * difference)}%"
    cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
    assert rows["cosine of both, ⟨A, B⟩ / (‖A‖ ‖B‖)"] == number(cosine, 6)
    cka = api.open(exact).cka(api.open(projected))
    assert number(cka, 6) in rows.values()
    assert f"{difference:.2%}" in page.text
    near = [api.open(each).nearest(5) for each in (exact, projected)]
    common = np.mean([len(set(x) & set(y)) for x, y in zip(near[0].indices, near[1].indices, strict=True)])
    assert f"both kernels have {common:.2f} in common on average" in page.text
    assert "ooc-ntk fit" in page.text, "of the projected run, which has no regression yet"


def test_error_bars_are_those_of_the_projected_kernel_whichever_comes_first(exact, projected):
    for first, second in ((exact, projected), (projected, exact)):
        found = pair.look(open_run(first), open_run(second))
        section = pair.entries(found)
        (scores,) = [each for each in section.figures if each.name == "scores"]
        rows, columns = pair._chosen(found.runs)
        stored, sure = (np.asarray(api.open(each)[rows, columns], dtype=np.float64) for each in (projected, exact))
        expected = (stored - sure) / api.open(projected).errors(rows, columns)
        assert f"{np.sqrt(np.mean(expected**2)):.2f} predicted standard errors" in scores.alt


def test_the_difference_of_equal_kernels_is_nothing(exact, make_run, digits_job):
    other = make_run("other", digits_job())
    found = pair.look(open_run(exact), open_run(other))
    assert found.difference < 1e-6
    assert found.factor == pytest.approx(1.0, abs=1e-6)
    assert found.alignment == pytest.approx(1.0, abs=1e-9)
    np.testing.assert_allclose(found.maps[0].means, found.maps[1].means, rtol=1e-5)
    assert np.abs(found.maps[2].means).max() < 1e-4 * np.abs(found.maps[0].means).max()


def test_checkpoints_side_by_side_by_the_command(cli, memory_path):
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)) for _ in range(2)]
    job = ooc_ntk.Job(nets[0], torch.randn(12, 8))
    found = ooc_ntk.run_checkpoints(job, memory_path / "several", [net.state_dict() for net in nets], progress=False)
    places = [memory_path / "several" / name for name in found.names]
    result = cli("report", *places)
    assert result.exit_code == 0, result.output
    page = Page((places[1] / "comparison.html").read_text())
    assert "residuals" not in page.figures
    assert {"first", "second", "difference", "entries", "spectra", "neighbours"} <= set(page.figures)
    assert page.text.startswith(f"{found.names[1]} against {found.names[0]} · ooc-ntk")
    model = json.loads(api.info(places[0]).to_json())["job"]["model"]
    assert any(model in row for row in page.rows)


def test_runs_that_cannot_be_compared_are_refused_in_a_line(cli, exact, projected, make_run, digits_job, memory_path):
    other = make_run("others", digits_job("digits[1:61]"))
    full = make_run("full", digits_job(kernel="output:1"))
    assert make_comparison(exact, full).facts
    every = make_run("every", digits_job(kernel="full"))
    cases = (
        ((exact, other), "runs of other samples (data digests"),
        ((exact, every), "have other shapes, 80 × 60 and 800 × 600"),
        ((exact, exact), "are the same run"),
        ((exact, memory_path / "nowhere"), "no run"),
        ((exact, projected, "--out", memory_path), "is a folder"),
    )
    for arguments, words in cases:
        result = cli("report", *arguments)
        assert result.exit_code == 2
        assert words in " ".join(result.output.split())
