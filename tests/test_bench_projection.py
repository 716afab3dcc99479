"""The benchmark of projected kernels runs, its records are complete and its figures agree. Nothing is timed."""

import dataclasses
import doctest
import json
from pathlib import Path

import numpy as np
import pytest

import ooc_ntk
from bench import projection, residual_figures, residuals, tails, throughput, trak_peer, trak_projection
from bench.models import build
from ooc_ntk.compute.machine import limited_threads
from ooc_ntk.compute.rates import rates_path
from ooc_ntk.planning.rates import MachineRates
from tests.cases import FLOAT64

SMOKE = ["--smoke", "--threads", "1", "--repeats", "1"]


@pytest.fixture(autouse=True)
def _calibrated(rates: MachineRates) -> None:
    with limited_threads(1):  # more threads than free cores would make tiny products take minutes
        rates_path("cpu").write_text(rates.to_json())


def test_residuals_of_projected_kernels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residual_figures, "drawing", lambda: False)
    record = tmp_path / "projection.json"
    arguments = [*SMOKE, "--parts", "residual", "--seeds", "2", "--out", str(tmp_path / "figures"), "--json"]
    outcome = projection.main([*arguments, str(record)])
    text = capsys.readouterr().out

    wanted = [
        (kernel, cosine, kind, dim)
        for kernel in ("trace", "pseudo")
        for cosine in (False, True)
        for kind in ("sjlt", "tensorsketch")
        for dim in (128, 512)
    ]
    assert [(r.kernel, r.cosine, r.kind, r.dim) for r in outcome.residuals] == wanted
    for found in outcome.residuals:
        assert len(found.observed) == len(found.predicted) == len(found.inside) == 2
        assert 0.01 < min(found.observed) <= max(found.observed) < 0.5, found
        assert min(found.predicted) > 0
        assert all(0 <= share <= 1 for share in found.inside)
        assert (found.rare is not None) == found.cosine
        for tail in (found.tail, found.standardised):
            assert (np.diff(tail.values) >= 0).all()
            assert tail.rate > 0
            assert tail.spread > 0
            assert tail.better in ("exponential", "normal", "alike")
    assert len(outcome.slopes) == 8
    assert all(slope < 0 for slope in outcome.slopes.values())
    assert len(outcome.tables) == 4
    assert all(text.count(f"\n{title}\n") == 2 for title in outcome.tables)  # once alone and once in the block
    assert "figures are left out: matplotlib is not installed" in text
    assert not (tmp_path / "figures").exists()
    assert "For bench/results/projection.md:\n\n## `python -m bench.projection --smoke" in text
    assert len(json.loads(record.read_text())["residuals"]) == len(wanted)


def test_steps_of_projecting(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = projection.main([*SMOKE, "--parts", "throughput"])
    assert [step.name for step in outcome.steps] == [
        "capture alone",
        "expand, nothing projected",
        *(f"project, {kind}, expanding included" for kind in ("sjlt", "shift", "rademacher")),
    ]
    capture = outcome.steps[0].sample_seconds
    assert all(step.ratio == step.sample_seconds / capture > 0 for step in outcome.steps)
    (check,) = outcome.checks
    assert (check.figure, check.limit, check.at_least, check.met) == (throughput.OVER_CAPTURE, 2, False, None)
    assert str(check) in capsys.readouterr().out


def test_trak_is_left_out_where_it_is_not_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trak_peer, "installed", lambda: False)
    outcome = projection.main([*SMOKE, "--parts", "trak"])
    assert outcome.notes == ["TRAK is left out: traker is not installed; pip install 'ooc-ntk[bench]'"]
    assert outcome.notes[0] in capsys.readouterr().out
    assert outcome.stores == outcome.checks == []


@pytest.mark.skipif(not trak_peer.installed(), reason="traker is not installed: see bench/README.md")
def test_traks_store_is_brought_to_the_exact_scale() -> None:
    outcome = projection.main([*SMOKE, "--parts", "trak"])
    trak, *ours = outcome.stores
    assert [store.name for store in ours] == ["ooc-ntk, sjlt", "ooc-ntk, rademacher"]
    for store in outcome.stores:
        assert 0 < store.residual < 0.5, store
    assert abs(trak.scale * 1179 / 64 - 1) < 0.5  # its store has (k / P)·K
    assert trak.raw_residual > 0.9
    assert outcome.trak is not None
    assert [check.figure for check in outcome.checks] == [throughput.OVER_CAPTURE, trak_projection.TRAK_OVER_OURS]


def test_cosines_of_the_same_features_are_those_of_a_cosine_run(tmp_path: Path) -> None:
    model, inputs = build("mlp", 6, True)
    job = ooc_ntk.Job(model, inputs, projection="sjlt:128", device="cpu")
    entries, errors = residuals.projected(job)[True]
    normalised = dataclasses.replace(job, normalize="cosine")
    preferences = ooc_ntk.Preferences(features_only=True)
    kernel = ooc_ntk.run(normalised, tmp_path / "run", preferences=preferences, progress=False)
    assert np.abs(entries - np.asarray(kernel)).max() < FLOAT64
    assert np.abs(errors - kernel.errors()).max() < FLOAT64


def test_dense_gradients_give_the_exact_kernel(tmp_path: Path) -> None:
    model, inputs = build("mlp", 6, True)
    bench = throughput.bench_of(ooc_ntk.Job(model, inputs, projection="sjlt:128", device="cpu"))
    gradients = trak_projection.dense_gradients(bench).double().numpy().reshape(6, -1)
    exact = ooc_ntk.run(ooc_ntk.Job(model, inputs, device="cpu"), tmp_path / "run", progress=False)
    assert np.allclose(gradients @ gradients.T, np.asarray(exact), rtol=1e-4)


@pytest.mark.parametrize("module", [residuals, tails])
def test_examples_of_docstrings(module: object) -> None:
    assert doctest.testmod(module).failed == 0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "residuals"], "unknown part 'residuals'"),
        (["--threads", "0"], "must be at least 1"),
        (["--seeds", "0"], "must be at least 1"),
        (["--dims", "64,x"], "--dims takes numbers"),
        (["--out", "figures"], "need matplotlib; pip install 'ooc-ntk[bench]'"),
    ],
)
def test_wrong_arguments_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(residual_figures, "drawing", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        projection.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
