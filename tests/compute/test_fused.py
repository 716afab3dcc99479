"""The fused pairwise contraction: its arithmetic, its kernel by Triton's interpreter, and when it is used."""

import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ooc_ntk.compute import contract, pairwise
from ooc_ntk.compute.fused import can_fuse, load_fused, sum_windows
from ooc_ntk.compute.taps import lowest_tap, tap_count
from ooc_ntk.errors import InputError
from ooc_ntk.planning.factors import LayerFactors
from tests.compute.fused_cases import CASES, WHOLE, grams, tiles, wanted
from tests.compute.test_contraction import BY_PIXELS
from tests.oracle import error

#: Relative Frobenius errors: contraction in float32 and float64 (DESIGN: run), and with Gram matrices that bf16 rounds.
BOUNDS = {"float32": 5e-7, "float64": 1e-13, "bf16": 1e-2}
#: The kernel alone sums what bf16 holds in float32.
KERNEL_BOUNDS = {**BOUNDS, "bf16": 5e-7}

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def child(what, names, **variables):
    command = [sys.executable, "-m", "tests.compute.fused_child", what, *names]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --- the kernel ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreted():
    """All cases in one process: Triton reads the variable when it is imported."""
    return child("interpreted", CASES, TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_by_its_definition(name, interpreted):
    precision = CASES[name].precision
    assert interpreted[name]["kernel"] <= KERNEL_BOUNDS[precision]
    assert ("contraction" in interpreted[name]) == (name in WHOLE)
    assert interpreted[name].get("contraction", 0) <= BOUNDS[precision]


@needs_triton
@pytest.mark.slow
def test_the_kernel_compiles_without_a_device(tmp_path):
    names = ["pixels, square", "pixels, cube", "pixels, wide padding, bf16", "pixels, line, float64", "positions"]
    loads = child("compiled", names, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert set(loads) == set(names)
    assert all(count > 0 for count in loads.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_on_a_gpu(name):
    case = CASES[name]
    if not can_fuse(case.factors, "cuda"):
        pytest.skip("Triton is not installed")
    inputs, gradients = grams(case)
    sizes = case.factors, case.rows, case.columns, case.entries
    once, again = (sum_windows(inputs.cuda(), gradients.cuda(), *sizes) for _ in range(2))
    assert torch.equal(once, again)
    exact = wanted(case, inputs.double(), gradients.double())
    assert error(once.cpu(), exact.numpy()) <= KERNEL_BOUNDS[case.precision]


# --- what it is made of, without Triton ------------------------------------------------------------------------------


@given(
    output=st.integers(0, 12),
    taps=st.integers(1, 7),
    size=st.integers(1, 20),
    stride=st.integers(1, 4),
    dilation=st.integers(1, 4),
    before=st.integers(-3, 6),
)
def test_taps_within_the_input(output, taps, size, stride, dilation, before):
    found = range(lowest_tap(output, stride, dilation, before), tap_count(output, taps, size, stride, dilation, before))
    within = [tap for tap in range(taps) if 0 <= output * stride + tap * dilation - before < size]
    assert list(found) == within


@pytest.mark.parametrize("name", [name for name in CASES if "pixels" in name])
def test_the_definition_is_the_unfused_way(name):
    """The oracle of the kernel beside the reference in torch."""
    case = CASES[name]
    sides = case.rows, case.columns
    inputs, gradients = (gram.double() for gram in grams(case))
    exact = wanted(case, inputs, gradients)
    summed = pairwise._InputProduct(case.factors).summed(inputs.clone(), *sides)
    found = pairwise.sum_positions(summed, gradients.clone(), *sides, case.factors.positions, case.entries)
    assert error(found, exact.numpy()) <= 1e-13


@pytest.mark.parametrize("name", ["pixels, square", "pixels, line, full", "positions"])
def test_blocks_are_given_to_the_kernel_as_they_are_multiplied(name, monkeypatch):
    """The whole contraction with the kernel replaced by its definition, in blocks of a sample or two."""
    case = CASES[name]
    monkeypatch.setattr("ooc_ntk.planning.memory.ROW_POSITIONS", 40)
    monkeypatch.setattr("ooc_ntk.planning.memory.COLUMN_POSITIONS", 20)

    def by_definition(inputs, gradients, factors, rows, columns, entries):
        return wanted(type(case)(factors, entries, rows=rows, columns=columns), inputs, gradients)

    monkeypatch.setattr(pairwise, "sum_windows", by_definition)
    left, right = (tuple(part.double() for part in side) for side in tiles(case))
    found = [torch.zeros(case.rows * case.entries, case.columns * case.entries).double() for _ in range(2)]
    for total, chosen in zip(found, (True, False), strict=True):

        def put(block, row, column, total=total):
            total[row : row + block.shape[0], column : column + block.shape[1]] += block

        pairwise.contract_pairwise(case.factors, left, right, case.entries, put, fused=chosen)
    assert error(found[0], found[1].numpy()) <= 1e-13


# --- when it is used -------------------------------------------------------------------------------------------------


def test_it_is_for_several_positions_on_a_cuda_device(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    several, one = BY_PIXELS["square"], LayerFactors("linear", 1, 5, 4)
    assert can_fuse(several, "cuda:1")
    assert not can_fuse(several, "cpu")
    assert not can_fuse(one, "cuda")
    assert not can_fuse(LayerFactors("tokens", 12, 50, 4), "cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not can_fuse(several, "cuda")
    with pytest.raises(
        InputError, match="a kernel that needs Triton, which is not installed; run: .*pip install triton"
    ):
        load_fused()


def measured(monkeypatch, kernel):
    """Seconds by the kernel, where it may be tried, on the CPU."""
    monkeypatch.setattr(contract, "can_fuse", lambda factors, device: True)
    monkeypatch.setattr(pairwise, "sum_windows", kernel)
    return contract.measure_fused(BY_PIXELS["square"], 2, 1, "float32", "cpu", 6)


def test_the_kernel_is_timed_for_a_pair_of_samples(monkeypatch):
    def slow(inputs, gradients, factors, rows, columns, entries):
        time.sleep(0.05)
        return torch.zeros(rows, columns)

    assert 0.05 / 36 <= measured(monkeypatch, slow) < 1


def test_a_kernel_that_cannot_be_compiled_is_not_used(monkeypatch, caplog):
    def broken(*arguments):
        raise RuntimeError("Failed to find C compiler")

    caplog.set_level("INFO")
    assert measured(monkeypatch, broken) == math.inf
    assert "the fused kernel is not used: RuntimeError: Failed to find C compiler" in caplog.text


def test_the_cpu_never_fuses():
    assert contract.measure_fused(BY_PIXELS["square"], 2, 1, "float32", "cpu", 6) == math.inf
    assert can_fuse(BY_PIXELS["square"], torch.device("cpu")) is False
