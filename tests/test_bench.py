"""The benchmarks run, their contenders agree and their tables are complete. Nothing is timed."""

import doctest
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from bench import bars, exact, growth, table
from bench.bars import BARS, DENSE_ENGINE
from bench.contenders import absent
from bench.floors import capture_seconds
from bench.inputs import as_double
from bench.models import WORKLOADS, build
from bench.peers import Refused, chunks_within, jacobian_contraction, per_sample_loop, plain
from bench.peers.nngeometry_peer import nngeometry_kernel
from bench.sentences import sentences
from bench.table import relative_error
from ooc_ntk.compute.machine import limited_threads
from ooc_ntk.compute.rates import rates_path
from ooc_ntk.planning.rates import MachineRates
from tests.cases import FLOAT64, KINKED

ROOT = Path(__file__).parents[1]
NAMES = ["mlp", "resnet18", "resnet18-c10", "vit"]
NNGEOMETRY = [] if absent("nngeometry") else ["nngeometry"]
OURS = ["ooc-ntk, run", "ooc-ntk, plan + run"]
needs_nngeometry = pytest.mark.skipif(not NNGEOMETRY, reason="nngeometry is not installed: see bench/README.md")


@pytest.fixture(autouse=True)
def _calibrated(rates: MachineRates) -> None:
    with limited_threads(1):  # more threads than free cores would make tiny products take minutes
        rates_path("cpu").write_text(rates.to_json())


def run_bench(module: str, *arguments: str) -> str:
    command = [sys.executable, "-m", module, "--smoke", "--threads", "1", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_contenders_agree_and_the_table_is_complete(tmp_path: Path) -> None:
    record = tmp_path / "exact.json"
    chosen = ["--workloads", ",".join(NAMES), "--peers", "loop,torch.func,nngeometry"]  # others: test_bench_peers
    text = run_bench("bench.exact", *chosen, "--dense", "--profile", "--json", str(record))

    found = json.loads(record.read_text())["comparisons"]
    counts = [(name, samples) for name in NAMES for samples in WORKLOADS[name].smoke.samples]
    assert [(comparison["workload"], comparison["samples"]) for comparison in found] == counts
    for comparison in found:
        rows, refusals = comparison["rows"], comparison["refusals"]
        wanted = ["per-sample loop", "torch.func tutorial", *NNGEOMETRY, "ooc-ntk, dense engine", *OURS]
        allowed = {"ooc-ntk, dense engine": "knows no preference"}
        if comparison["workload"] == "vit":
            allowed["nngeometry"] = "I do not know what to do with layer NonDynamicallyQuantizableLinear"
        for name, reason in refusals.items():
            assert allowed[name] in reason
        assert [row["contender"] for row in rows] == [name for name in wanted if name not in refusals]
        for row in rows:
            assert 0 <= row["error"] <= KINKED, (comparison["title"], row)
            assert 0 <= row["disagreement"] <= KINKED, (comparison["title"], row)
            assert row["seconds"] > 0
            assert row["ratio"] > 0
            assert row["entry_seconds"] == row["seconds"] / comparison["samples"] ** 2
        assert f"\n{comparison['title']}\n" in text
        assert 0 < comparison["floors"]["capture_seconds"] < comparison["dense_floor_seconds"]
        assert comparison["floors"]["flops_per_second"] > 0
        assert comparison["floors"]["capture_seconds"] < comparison["representation_floor_seconds"]
        checks = {check["figure"]: check for check in comparison["checks"]}
        for bar in BARS[comparison["workload"]]:
            assert checks[bar.figure]["limit"] == bar.limit
        assert all(check["value"] > 0 and check["met"] is None for check in checks.values())
        assert (DENSE_ENGINE in checks) == ("ooc-ntk, dense engine" not in refusals)
    for figure in ("floors: capture alone", "run / representation floor = ", "run / dense floor = ", "held / dense"):
        assert text.count(f"\n  {figure}") == len(counts)
    for phases in ("\n  ooc-ntk, by phase", "\n  ooc-ntk: this version records no phases"):
        assert text.count(phases) in (0, len(counts))
    assert text.count("\n  seconds per kernel entry ") == sum(len(WORKLOADS[name].smoke.samples) > 1 for name in NAMES)


def test_ours_and_the_floors_need_no_peers(tmp_path: Path) -> None:
    record = tmp_path / "exact.json"
    text = run_bench(
        "bench.exact",
        "--workloads",
        "mlp",
        "--peers",
        "none",
        "--samples",
        "7",
        "--repeats",
        "2",
        "--json",
        str(record),
    )
    (found,) = json.loads(record.read_text())["comparisons"]
    assert found["samples"] == 7
    assert [row["contender"] for row in found["rows"]] == OURS
    assert all(row["ratio"] is None and row["disagreement"] is None for row in found["rows"])
    assert "run / dense floor" in text
    assert "best peer" not in text


@pytest.mark.grid
def test_growth_of_the_cost(tmp_path: Path) -> None:
    record = tmp_path / "growth.json"
    text = run_bench("bench.growth", "--samples", "40,20", "--json", str(record))
    found = json.loads(record.read_text())
    assert [run["samples"] for run in found["runs"]] == [20, 40]
    assert found["ratio"] > 0
    for run in found["runs"]:
        assert 0 <= run["error"] <= KINKED
        assert 0 < run["peak_bytes"] <= run["promised_host_bytes"]
        assert run["run_seconds"] > 0
        assert f"N = {run['samples']}" in text
    assert "seconds per kernel entry, last / first = " in text


@pytest.mark.parametrize("name", NAMES)
def test_peers_agree_in_chunks_and_refuse_what_does_not_fit(name: str) -> None:
    model, inputs = build(name, 4, True)
    output_bytes = 4 * 4 * sum(parameter.numel() for parameter in model.parameters())
    with pytest.raises(Refused, match="holds the whole Jacobian"):
        jacobian_contraction(model, inputs, memory_bytes=output_bytes)
    model, inputs = model.double(), as_double(inputs)  # in float32 the order of summation would show
    whole = per_sample_loop(model, inputs)
    assert whole.remark == ""
    for memory_bytes in (2 * 2 * output_bytes, 2 * output_bytes // 3):  # one output at a time, then parts of one
        chunked = per_sample_loop(model, inputs, memory_bytes=memory_bytes)
        assert relative_error(chunked.kernel, whole.kernel) < FLOAT64
    assert "chunks of parameters" in chunked.remark


@needs_nngeometry
@pytest.mark.parametrize("name", ["mlp", "resnet18", "resnet18-c10"])
def test_nngeometry_agrees_in_groups_of_layers(name: str) -> None:
    model, inputs = build(name, 4, True)
    wanted = per_sample_loop(model, inputs)
    found = nngeometry_kernel(model, inputs, memory_bytes=12 * 4 * sum(p.numel() for p in model.parameters()) // 4)
    assert relative_error(found.kernel, wanted.kernel) < KINKED
    if name != "mlp":
        assert "chunks" in found.remark


@pytest.mark.parametrize("module", [bars, plain, table])
def test_examples_of_docstrings(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.failed == 0 < result.attempted


def test_chunks_cover_every_column_once() -> None:
    for most_bytes in (1, 40, 4 * 3 * 7, 4 * 3 * 7 * 2, 10**6):
        chunks = chunks_within(3, 5, 7, max(most_bytes, 4 * 3), 4)
        seen = np.zeros((5, 7), int)
        for chunk in chunks:
            seen[chunk.outputs.start : chunk.outputs.stop, chunk.columns.start : chunk.columns.stop] += 1
            assert 3 * 4 * len(chunk.outputs) * len(chunk.columns) <= max(most_bytes, 4 * 3)
        assert (seen == 1).all()


def test_capture_makes_one_backward_pass_per_output() -> None:
    model, inputs = build("vit", 5, True)
    calls = []
    model.norm.register_full_backward_hook(lambda *_: calls.append(1))
    assert capture_seconds(model, inputs, 2) > 0
    assert len(calls) == 3 * 3  # batches of 2, 2 and 1 samples, three outputs


def test_the_vit_hides_nothing_behind_the_fast_path() -> None:
    model, inputs = build("vit", 3, True)
    with torch.no_grad():
        fused = model(inputs)
    assert torch.allclose(model(inputs), fused, atol=1e-6)


def test_the_standard_library_has_enough_sentences() -> None:
    found = list(dict.fromkeys(sentences()))
    assert len(found) > 128
    assert all(sentence[0].isupper() and " " in sentence and "\n" not in sentence for sentence in found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workloads", "mpl"], "unknown workload 'mpl'"),
        (["--peers", "jax"], "unknown peer 'jax'"),
        (["--samples", "12,x"], "--samples takes numbers"),
        (["--samples", "0"], "--samples takes numbers"),
        (["--threads", "0"], "must be above 0"),
        (["--repeats", "0"], "must be above 0"),
    ],
)
def test_wrong_arguments_are_named(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        exact.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_wrong_threads_of_growth_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        growth.main(["--threads", "0"])
    assert "--threads must be at least 1" in capsys.readouterr().err


def test_phases_and_what_lies_beside_them_add_up() -> None:
    assert table.format_phases("ooc-ntk", {"capture": 1.5, "product": 0.3}, 2.0) == [
        "  ooc-ntk, by phase  seconds  share",
        "  capture              1.500    75%",
        "  product              0.300    15%",
        "  beside these         0.200    10%",
    ]


@pytest.mark.grid
def test_savings_agree_whichever_way_they_are_computed() -> None:
    lines = run_bench("bench.savings", "--parts", "checkpoints,head").splitlines()
    assert any(line.startswith("5 checkpoints: ") and "times one run (bar 5)" in line for line in lines)
    rows = [line.split() for line in lines if line.startswith("  ")]
    assert [row[0] for row in rows] == ["part", "checkpoints", "checkpoints", "head", "head"]
    assert [row[-7] if row[0] == "head" else "-" for row in rows[3:]] == ["9", "5"]
    assert all(float(row[-1]) <= KINKED for row in (rows[2], rows[4]))
