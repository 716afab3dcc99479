"""The benchmark of exact kernels on a GPU runs at tiny sizes wherever it is; its checks find what is wrong."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import ooc_ntk
from bench import gpu_checks, gpu_exact, gpu_growth
from bench.gpu_ceilings import Ways
from bench.gpu_networks import SMALL_SUBJECTS, SUBJECTS
from bench.gpu_slices import Limit, Slice
from ooc_ntk.compute import pairwise
from ooc_ntk.compute.machine import limited_threads
from ooc_ntk.compute.rates import rates_path
from ooc_ntk.planning.factors import Window
from ooc_ntk.planning.rates import MachineRates
from ooc_ntk.stopping import EXIT_TERMINATED

ROOT = Path(__file__).parents[1]
without_device = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, which would be measured")


@pytest.fixture(autouse=True)
def _calibrated(rates: MachineRates) -> None:
    with limited_threads(1):  # more threads than free cores would make tiny products take minutes
        rates_path("cpu").write_text(rates.to_json())


def run_bench(*arguments, status=0):
    command = [sys.executable, "-m", "bench.gpu_exact", "--smoke", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180, env=environment)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


@pytest.mark.grid
def test_smoke():
    text = run_bench()
    assert "47 kernels in float32, bf16, float64" in text or "bf16x3" in text
    assert "blocks dense, factored, pairwise, tokens" in text
    assert "FAILED" not in text
    assert "fused pairwise kernel: none here" in text
    for line in ("products, TFLOP/s", "written and synced", "of capture alone", "of its products", "beside these"):
        assert line in text
    for subject in SMALL_SUBJECTS:
        assert f"\n{subject.title}, " in text
        for samples in subject.samples:
            assert f"\n  N = {samples}, " in text
    assert "60 × 48 in float32 by N = 16" in text or "bf16x3" in text
    assert "whole kernel" in text
    assert "MISSED" not in text, "nothing is judged in smoke size"


@pytest.mark.grid
def test_slices_end_in_the_kernel_of_an_undisturbed_run(tmp_path):
    """Two slices that stop after their first task, in processes of their own, and one that ends the run."""
    out = tmp_path / "run"
    arguments = ("--full", "--out", out, "--precision", "float32")
    before = 0
    for _ in range(2):
        text = run_bench(*arguments, "--slice-seconds", 0, status=EXIT_TERMINATED)
        assert "this slice is over (stopped; finished tiles are kept" in text
        assert f"go on: python -m bench.gpu_exact --full --out {out} --precision float32" in text
        receipts = (out / "receipts.jsonl").read_text().count("\n")
        assert receipts > before
        before = receipts
    assert not ooc_ntk.info(out).finished
    text = run_bench(*arguments, "--slice-seconds", 100)
    assert "9 of 9 kernel tiles (100%)" in text
    assert "6 samples computed again in float64" in text
    assert "passed" in text

    subject = SMALL_SUBJECTS[0]
    job = subject.job(*subject.size, "float32", "cpu")
    with limited_threads(1):
        plan = ooc_ntk.Plan.load(out / "plan.json")
        whole = ooc_ntk.run(job, tmp_path / "whole", plan=plan, progress=False, proof=False)
    np.testing.assert_array_equal(np.asarray(whole), np.asarray(ooc_ntk.open(out)))


@without_device
def test_without_a_device_nothing_is_measured(capsys):
    assert gpu_exact.main([]) == 1
    assert capsys.readouterr().out.startswith("no CUDA device: not measured")


def test_what_does_not_go_together(tmp_path, capsys):
    for arguments, said in (
        (["--smoke", "--full"], "--full needs --out"),
        (["--smoke", "--record"], "leave one out"),
        (["--smoke", "--minutes", "-1"], "must not be negative"),
    ):
        with pytest.raises(SystemExit):
            gpu_exact.main(arguments)
        assert said in capsys.readouterr().err


# --- checks ----------------------------------------------------------------------------------------------------------


def test_a_wrong_kernel_ends_it_before_anything_is_timed(monkeypatch, capsys):
    computed = gpu_checks._computed

    def wrong(job, asked):
        found, plan = computed(job, asked)
        if job.kernel == "full":
            found[3, 2] *= 1.01
        return found, plan

    monkeypatch.setattr(gpu_checks, "_computed", wrong)
    monkeypatch.setattr(gpu_exact, "NETWORKS", {"mlp": gpu_checks.NETWORKS["mlp"]})
    monkeypatch.setattr(gpu_exact, "precisions_of", lambda device: ("float32",))
    monkeypatch.setattr(gpu_exact, "ceilings", lambda setting: pytest.fail("it was timed"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with limited_threads(1):
        assert gpu_exact.main(["--smoke"]) == 1
    printed = capsys.readouterr()
    assert "FAILED: full of mlp in float32, planned: relative error" in printed.out
    assert "FAILED: trace" not in printed.out
    assert "kernels are wrong: nothing is timed" in printed.err


def test_a_kernel_of_nan_fails():
    check = gpu_checks.Check("mlp", "float32", "full", "dense", float("nan"), 0.0, 1e-6, frozenset())
    assert not check.passed
    assert any(line.startswith("FAILED: full of mlp") for line in gpu_checks.table_of([check]))


def test_every_kind_is_the_definition():
    """The reference beside loops over samples and outputs."""
    rows = np.random.default_rng(0).standard_normal((4, 3, 5))
    full = gpu_checks.exact_kernel(rows, 2, "full")
    for i in range(4):
        for j in range(2):
            block = rows[i] @ rows[j].T
            np.testing.assert_allclose(full[3 * i : 3 * i + 3, 3 * j : 3 * j + 3], block)
            np.testing.assert_allclose(gpu_checks.exact_kernel(rows, 2)[i, j], np.trace(block))
            np.testing.assert_allclose(gpu_checks.exact_kernel(rows, 2, "pseudo")[i, j], block.sum())
            np.testing.assert_allclose(gpu_checks.exact_kernel(rows, 2, "output:1")[i, j], block[1, 1])
    cosine = gpu_checks.exact_kernel(rows, 4, normalize="cosine")
    np.testing.assert_allclose(cosine.diagonal(), 1)


def test_the_fused_kernel_is_compared_with_shifts_by_padding(monkeypatch):
    """With the kernel replaced by the unfused way, as without a device there is none; then by a wrong one."""
    window = Window((4, 4), (3, 3), (1, 1), (1, 1), (1, 1), (1, 1))

    def unfused(inputs, gradients, factors, rows, columns, entries):
        summed = pairwise._sum_shifts(inputs, window, rows, columns) + 1
        return pairwise.sum_positions(summed, gradients.clone(), rows, columns, 16, entries)

    monkeypatch.setattr(gpu_checks, "can_fuse", lambda factors, device: True)
    for module in (gpu_checks, pairwise):
        monkeypatch.setattr(module, "sum_windows", unfused)
    errors = gpu_checks.check_fused("cpu")
    assert max(errors) <= gpu_checks.FUSED_TOLERANCE
    monkeypatch.setattr(gpu_checks, "sum_windows", lambda *given: unfused(*given) * 1.001)
    assert gpu_checks.check_fused("cpu")[0] > 5e-4


# --- figures ---------------------------------------------------------------------------------------------------------


WAYS = Ways(0.0, 0.0, 1e9, 1e9)


@pytest.fixture(scope="module")
def grown(rates, tmp_path_factory):
    """One run of the small network on as many samples as its whole kernel has."""
    subject = dataclasses.replace(SMALL_SUBJECTS[1], size=(6, 0))
    with limited_threads(1):
        rates_path("cpu").write_text(rates.to_json())
        (run,) = gpu_growth.grow(subject, "float32", "cpu", WAYS, time.perf_counter(), None, lambda text: None)
        return run, gpu_growth.extrapolate(run, "cpu", tmp_path_factory.mktemp("grown"))


def test_a_run_says_of_its_own_kernel_what_it_took(grown):
    run, whole = grown
    assert whole.plan is not None
    assert whole.plan.digest == run.plan.digest
    assert whole.seconds == pytest.approx(run.info.seconds)
    assert run.contracting_seconds < run.info.kernel_seconds
    larger = dataclasses.replace(whole, contracting_seconds=1e6)
    assert larger.seconds == pytest.approx(whole.rows_seconds + whole.other_seconds + 1e6)


def test_bars_are_judged_where_they_count(grown):
    run, whole = grown
    assert "bar" not in "\n".join(gpu_growth.summary([whole], judged=False))
    subject = dataclasses.replace(run.subject, judged=True)
    judged = dataclasses.replace(whole, run=dataclasses.replace(run, subject=subject, precision="tf32", ceiling=1.0))
    text = "\n".join(gpu_growth.summary([judged], judged=True))
    assert "bar at least 0.85: met" in text
    assert "bar at most 240 (of an H200): met" in text
    slow = dataclasses.replace(judged, contracting_seconds=300.0, run=dataclasses.replace(judged.run, ceiling=1e30))
    text = "\n".join(gpu_growth.summary([slow], judged=True))
    assert text.count("MISSED") == 2


def test_the_whole_kernel_is_that_of_cifar_10():
    for subject, outputs in zip(SUBJECTS[:2], (1, 10), strict=True):
        assert subject.size == (50_000, 10_000)
        assert f"{outputs} output" in subject.title
        assert subject.judged == (outputs == 1)


def test_the_record_carries_the_card_and_versions(tmp_path, capsys):
    path = tmp_path / "RESULTS.md"
    path.write_text("# Results\n")
    gpu_exact.record("python -m bench.gpu_exact", "NVIDIA H200", ["against float64", "passed"], path)
    text = path.read_text()
    assert text.startswith("# Results\n\n## `python -m bench.gpu_exact`, NVIDIA H200, 20")
    assert f"torch {torch.__version__}" in text
    assert "\n\nagainst float64\npassed\n```\n" in text


# --- slices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "keys", "in_memory", "stops"),
    [
        (0.0, ["rows-0-0-0"], False, True),
        (0.0, ["rows-0-0-0"], True, False),
        (0.0, ["rows-0-0-0", "kernel-0-0-0"], True, True),
        (0.0, [], False, False),
        (1e6, ["kernel-0-0-0"], False, False),
    ],
)
def test_a_slice_ends_once_something_is_kept(seconds, keys, in_memory, stops, tmp_path, monkeypatch):
    """Rows that are held in memory go with the process: a slice that stopped after them would never get further."""
    sent = []
    monkeypatch.setattr(os, "kill", lambda process, number: sent.append(number))
    layout = type("Layout", (), {"in_memory": in_memory})
    info = type("Info", (), {"plan": type("Plan", (), {"layout": layout})})
    monkeypatch.setattr(ooc_ntk, "info", lambda path: info)
    receipts = tmp_path / "receipts.jsonl"
    receipts.write_text('{"key": "kernel-0-9-9"}\n')  # of a slice before
    wanted = Slice(SMALL_SUBJECTS[0], "float32", "cpu", tmp_path, seconds, time.time(), "again")
    watching = Limit(wanted)
    with receipts.open("a") as file:
        file.writelines(f'{{"key": "{key}"}}\n' for key in keys)
    watching.look()
    watching.look()
    assert len(sent) == stops, "one signal at most: a second one ends the process where it is"
