"""Explanations: every figure is one that the planner gives when it is asked for it by hand."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from ooc_ntk.errors import BudgetError
from ooc_ntk.planning.explain import TARGET_ERRORS, explain
from ooc_ntk.planning.factors import LayerFactors
from ooc_ntk.planning.planner import Preferences, make_plan
from ooc_ntk.planning.projection import EntryMoments, PilotMoments, Projection
from ooc_ntk.planning.rates import UNCALIBRATED
from ooc_ntk.planning.workload import Derivation, ParameterBlock, Sketched
from ooc_ntk.report.explanation import explanation_json, explanation_table
from tests.planning.strategies import MIB, ample, small_workload


def blocks():
    """A linear layer over 16 positions, one over a single position, a norm and something that no rule covers."""
    found, start = [], 0
    for name, source, reason, factors in (
        ("early", "rule", "", LayerFactors("linear", 16, 72, 32, True)),
        ("head", "rule", "", LayerFactors("linear", 1, 200, 100, True)),
        ("norm", "rule", "", None),
        ("own", "torch.func", "no layer rule covers square()", None),
    ):
        size = 64 if factors is None else factors.columns
        found.append(ParameterBlock(name, (f"{name}.weight",), start, start + size, source, reason, factors))
        start += size
    return tuple(found)


def tight(workload):
    """Limits in which the fastest layout does not fit, since tiles in memory do not."""
    free = make_plan(workload, ample(), UNCALIBRATED)
    assert free.dataflow == "resident"
    return ample(host=free.promised.host_bytes - 20 * MIB)


CHEAP = Derivation("vmap", 8, 1e-5, 1e-5, 4 * MIB, MIB)
DEAR = replace(CHEAP, seconds_per_sample=0.005, chain_seconds_per_sample=0.005)
LARGE = small_workload(train_samples=300, sizes=(30_000, 30_000), derivation=DEAR)


def test_ways_of_a_block_are_those_of_the_plan_and_of_dense_gradients():
    workload = small_workload(blocks=blocks())
    found = explain(workload, ample(), UNCALIBRATED)
    by_name = {each.name: each for each in found.blocks}
    for planned in found.plan.blocks:
        chosen, *others = by_name[planned.name].ways
        assert chosen.chosen
        assert (chosen.name, chosen.held_bytes, chosen.flops) == (
            planned.choice.name,
            planned.held_bytes,
            planned.flops,
        )
        dense = next(way for way in (chosen, *others) if way.name == "dense")
        assert (dense.held_bytes, dense.flops) == (planned.dense_bytes, planned.dense_flops)
        assert not any(way.chosen for way in others)
    assert {way.name for way in by_name["early"].ways} == {"dense", "factored", "pairwise"}
    assert "one position" in by_name["head"].reason
    assert "no factors" in by_name["norm"].reason
    assert "square()" in by_name["own"].reason


def test_a_representation_that_was_asked_for_is_the_reason():
    workload = small_workload(blocks=blocks())
    found = explain(workload, ample(), UNCALIBRATED, Preferences(representation="dense"))
    assert found.blocks[0].reason == "--representation dense"
    assert found.blocks[0].ways[0].name == "dense"
    assert min(way.flops for way in found.blocks[1].ways) < found.blocks[1].ways[0].flops / 10


def test_what_takes_half_the_time_makes_the_run_up_to_twice_as_fast():
    found = explain(small_workload(derivation=Derivation("loop", 8, 5.0, 5.0, 4 * MIB, MIB)), ample(), UNCALIBRATED)
    assert found.faster[0].what == "deriving rows"
    assert 1.9 < found.faster[0].factor < 2
    assert all(1 <= each.factor < 1.1 for each in found.faster[1:])
    fast = explain(small_workload(derivation=CHEAP, train_samples=1500), ample(), UNCALIBRATED)
    assert fast.faster[0].what == "products"


def test_more_memory_buys_what_the_planner_says_it_does():
    limits = tight(LARGE)
    found = explain(LARGE, limits, UNCALIBRATED)
    assert found.plan.dataflow != "resident"
    assert found.more[-1].dataflow == "resident"
    for other in found.more:
        assert other.memory == "host"
        assert other.limit_bytes == limits.host + other.added_bytes
        assert other.limit_bytes % MIB == 0
        then = make_plan(LARGE, replace(limits, host=other.limit_bytes), UNCALIBRATED)
        assert (then.dataflow, then.promised.seconds) == (other.dataflow, other.seconds)
        assert other.factor == pytest.approx(found.plan.promised.seconds / other.seconds)
        assert other.factor > 1.05
    assert not explain(LARGE, ample(), UNCALIBRATED).more


def test_less_memory_is_the_smallest_that_works():
    limits = ample()
    less = {other.memory: other for other in explain(LARGE, limits, UNCALIBRATED).less}
    host = less["host"]
    assert host.added_bytes < 0
    assert make_plan(LARGE, replace(limits, host=host.limit_bytes), UNCALIBRATED).promised.seconds == host.seconds
    with pytest.raises(BudgetError) as refusal:
        make_plan(LARGE, replace(limits, host=host.limit_bytes - 20 * MIB), UNCALIBRATED)
    assert -(-refusal.value.smallest["host"] // MIB) * MIB == host.limit_bytes
    assert f"--host-memory to {host.limit_bytes // MIB}MiB" in str(refusal.value)


def pilot(columns=1000):
    moments = PilotMoments(EntryMoments(8.0, 4.0), EntryMoments(4.0, 2.0))
    return replace(LARGE, sketch=Sketched(Projection("sjlt", dim=columns), row_seconds=1e-4, moments=moments))


def test_errors_cost_the_columns_of_the_pilot():
    found = explain(LARGE, ample(), UNCALIBRATED, pilot=pilot())
    assert [each.error for each in found.projected] == list(TARGET_ERRORS)
    for each in found.projected:
        moments = pilot().sketch.moments
        assert moments.error(each.columns, 300) <= each.error < moments.error(each.columns - 8, 300)
        at = replace(pilot().sketch, projection=Projection("sjlt", dim=each.columns))
        then = make_plan(replace(LARGE, sketch=at), ample(), UNCALIBRATED)
        assert then.promised.seconds == each.seconds
        assert each.factor == pytest.approx(found.plan.promised.seconds / each.seconds)
    assert not explain(LARGE, ample(), UNCALIBRATED).projected


def test_an_error_that_needs_more_columns_than_parameters_has_no_price():
    few = small_workload(sizes=(60, 50))
    moments = pilot().sketch.moments
    found = explain(few, ample(), UNCALIBRATED, pilot=replace(few, sketch=replace(pilot(96).sketch, moments=moments)))
    assert [each.seconds for each in found.projected] == [None, None]
    assert "no fewer columns than the 110 parameters" in printed(found)


def test_a_projected_job_is_explained_by_its_own_pilot():
    found = explain(pilot(), ample(), UNCALIBRATED)
    assert found.plan.projection.dim == 1000
    assert not found.blocks
    assert [each.columns for each in found.projected] == [
        each.columns for each in explain(LARGE, ample(), UNCALIBRATED, pilot=pilot()).projected
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_are_explained_with_all_their_memory(workers):
    limits = ample(host=4 * 2**30)
    found = explain(LARGE, limits, UNCALIBRATED, Preferences(workers=workers))
    assert found.plan.workers == workers
    for other in found.less:
        if other.memory == "host":
            then = replace(limits, host=other.limit_bytes)
            assert make_plan(LARGE, then, UNCALIBRATED, Preferences(workers=workers)).promised.seconds == other.seconds


def test_a_device_is_among_the_limits():
    workload = replace(LARGE, device="cuda")
    free = make_plan(workload, ample(), UNCALIBRATED)
    found = explain(workload, ample(device=free.promised.device_bytes), UNCALIBRATED)
    assert "copies to the device" in [each.what for each in found.faster]
    assert {other.memory for other in found.less} >= {"host", "device"}


def printed(found, **options):
    console = Console(file=io.StringIO(), width=160, highlight=False)
    console.print(explanation_table(found, **options))
    return console.file.getvalue()


def test_what_is_printed_names_flags_and_figures():
    found = explain(replace(LARGE, blocks=blocks()), ample(), UNCALIBRATED, pilot=pilot())
    text = printed(found)
    for phrase in ("ways to hold each block", "one position per sample", "limited by", "with less", "sjlt:"):
        assert phrase in text
    for other in (*found.more, *found.less):
        assert f"{other.flag} {other.limit_bytes // MIB}MiB" in text
    assert '"explanation"' in explanation_json(found)


def test_of_many_blocks_the_largest_are_printed():
    workload = small_workload(sizes=tuple(range(100, 125)))
    found = explain(workload, ample(), UNCALIBRATED)
    assert "layer24" in printed(found)
    assert "layer1 " not in printed(found)
    assert "15 smaller" in printed(found)
    assert "layer1 " in printed(found, every_block=True)
