"""What is timed of blocks on a device, and a run whose plan says that the fused kernel won."""

import dataclasses
import importlib.util
import math
from types import SimpleNamespace

import numpy as np
import pytest

import ooc_ntk
from ooc_ntk.compute import pairwise
from ooc_ntk.errors import InputError
from ooc_ntk.execution import context, measure
from ooc_ntk.planning.factors import LayerFactors, Window
from ooc_ntk.planning.workload import ParameterBlock
from tests.cases import case
from tests.oracle import case_jacobian, error, kernel

WINDOW = Window((4, 4), (3, 3), (1, 1), (1, 1), (1, 1), (1, 1))

#: With ten rows: FLOPs speak for pairs by far, for neither by far, and for gradients by far; the last has one position.
BLOCKS = {
    "late": LayerFactors("convolution", 16, 9 * 512, 512, window=WINDOW),
    "middle": LayerFactors("linear", 20, 192, 576),
    "early": LayerFactors("linear", 1024, 27, 64),
    "head": LayerFactors("linear", 1, 512, 10),
    "norm": None,
}


def timed(device, monkeypatch, rows=10, samples=60_000, fused=1.5):
    """Blocks with what a timing says of each: the samples of its tile."""
    calls = {}

    def measure_block(factors, rows, entries, precision, device, tile):
        calls[factors] = tile
        return 1.0, 2.0

    def measure_fused(factors, *more):
        assert more[-1] == calls[factors]
        return fused

    monkeypatch.setattr(measure, "measure_block", measure_block)
    monkeypatch.setattr(measure, "measure_fused", measure_fused)
    job = SimpleNamespace(kernel="trace", precision="float32")
    prepared = SimpleNamespace(job=job, device=device, reader=range(samples))
    blocks = [ParameterBlock(name, (name,), 0, 1, "rule", "", factors) for name, factors in BLOCKS.items()]
    found = measure._with_timings(blocks, prepared, rows)
    assert [block.name for block in found] == list(BLOCKS)
    for block in found:
        seconds = (1.0, min(2.0, fused), fused < 2) if block.factors in calls else (None, None, False)
        assert (block.expand_seconds, block.pairwise_seconds, block.fused) == seconds
    return {block.name: calls[block.factors] for block in found if block.factors in calls}


def test_on_a_cpu_only_what_flops_leave_open_is_timed(monkeypatch):
    assert timed("cpu", monkeypatch, fused=math.inf) == {"middle": 1024 // 20}


def test_nothing_is_timed_where_all_pairs_take_no_longer_than_a_timing(monkeypatch):
    assert timed("cpu", monkeypatch, samples=2, fused=math.inf) == {}
    assert "middle" in timed("cuda", monkeypatch, samples=2)


def test_on_a_device_all_that_may_be_contracted_pairwise_is_timed(monkeypatch):
    """On blocks as contractions make them, but never on factors of many gigabytes."""
    assert timed("cuda", monkeypatch) == {"middle": 4096 // 20, "late": 4096 // 16}
    found = timed("cuda", monkeypatch, rows=1000)
    assert 2 <= found["late"] <= measure.DEVICE_TIMED_BYTES // BLOCKS["late"].held_bytes(1000, 4) < 4096 // 16
    assert timed("cuda:1", monkeypatch, samples=20, fused=3.0)["late"] == 20


@pytest.fixture
def fused_plan(rates):
    """A plan on the CPU whose pairwise blocks are fused."""
    job = case("cnn").job()
    wanted = ooc_ntk.Preferences(representation="pairwise", tile_samples=11)
    plan = ooc_ntk.plan(job, ooc_ntk.Budget(host="16GiB", disk="1GiB"), preferences=wanted, rates=rates)
    assert not any(block.fused for block in plan.blocks), "never on a CPU"
    convolutions = [block.name for block in plan.blocks if block.factors and block.factors.window]
    assert len(convolutions) == 2
    blocks = [dataclasses.replace(block, fused=block.name in convolutions) for block in plan.blocks]
    return job, dataclasses.replace(plan, blocks=tuple(blocks))


def test_a_run_follows_its_plan(fused_plan, tmp_path, monkeypatch):
    """The kernel of Triton replaced by the unfused way, which is called for both convolutions and nothing else."""
    job, plan = fused_plan
    called = set()

    def unfused(inputs, gradients, factors, rows, columns, entries):
        called.add(factors)
        summed = pairwise._InputProduct(factors).summed(inputs, rows, columns)
        return pairwise.sum_positions(summed, gradients, rows, columns, factors.positions, entries)

    monkeypatch.setattr(pairwise, "sum_windows", unfused)
    monkeypatch.setattr(context, "load_fused", lambda: None)
    found = ooc_ntk.run(job, tmp_path / "run", plan=plan, progress=False, proof=False)
    assert called == {block.factors for block in plan.blocks if block.fused}
    chosen = case("cnn")
    assert error(np.asarray(found), kernel(case_jacobian("cnn"), len(chosen.train))) <= chosen.bound


def test_without_triton_it_is_refused_before_anything_is_derived(fused_plan, tmp_path, monkeypatch):
    job, plan = fused_plan
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "triton" else find_spec(name))
    with pytest.raises(InputError, match="by a kernel that needs Triton, which is not installed"):
        ooc_ntk.run(job, tmp_path / "run", plan=plan, progress=False, proof=False)
    assert not (tmp_path / "run/receipts.jsonl").exists()
