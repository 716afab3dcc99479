"""The planner: every plan fits, every refusal says what would do, and the choice is what the numbers ask for."""

import dataclasses
import itertools
import math
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ooc_ntk.errors import BudgetError, InputError
from ooc_ntk.planning import planner
from ooc_ntk.planning.layout import MAX_TASKS, MAX_TILE_ELEMENTS
from ooc_ntk.planning.memory import LIBRARY_GROWTH_BYTES, memory_need
from ooc_ntk.planning.planner import (
    EQUALLY_FAST,
    FEWER_BYTES_SHARE,
    RESTART_BYTES,
    Preferences,
    make_plan,
    tolerance,
)
from ooc_ntk.planning.rates import UNCALIBRATED
from ooc_ntk.planning.workload import Derivation
from ooc_ntk.units import parse_bytes
from tests.planning.strategies import MIB, ample, limits_around, small_workload, workloads

FLAGS = {"--host-memory": "host", "--device-memory": "device", "--disk": "disk"}
GENTLE = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def suggested(error):
    """The limits that a BudgetError asks for."""
    found = re.findall(r"(--[a-z-]+) to (\d+MiB)", str(error))
    assert found, f"no flag in: {error}"
    return {FLAGS[flag]: parse_bytes(size) for flag, size in found}


def check_fits(plan, workload, limits):
    # In smaller batches than were probed, where only those fit.
    assert 1 <= plan.batch_size <= workload.derivation.batch_size
    sized = dataclasses.replace(workload, derivation=workload.derivation.at(plan.batch_size))
    need = memory_need(sized, plan.layout)
    for memory, promised in (
        ("host", plan.promised.host_bytes),
        ("device", plan.promised.device_bytes),
        ("disk", plan.promised.disk_bytes),
    ):
        assert promised == need.total(memory)
        assert promised <= getattr(limits, memory), memory
    assert plan.task_count <= MAX_TASKS
    assert (plan.tile_samples * plan.entries_per_sample) ** 2 <= MAX_TILE_ELEMENTS
    assert plan.tile_samples * plan.rows_per_sample * plan.span_columns <= MAX_TILE_ELEMENTS
    assert plan.passes[0].start == 0
    assert plan.passes[-1].stop == len(plan.layout.spans(plan))
    assert (len(plan.passes) > 1) == (plan.dataflow == "recompute")
    assert plan.jacobian_bytes == workload.jacobian_bytes


@GENTLE
@given(st.data())
def test_every_plan_fits_or_the_refusal_says_what_would_do(data):
    workload = data.draw(workloads())
    limits = data.draw(limits_around(workload))
    preferences = data.draw(
        st.sampled_from([None, Preferences(dataflow="spill"), Preferences(tile_samples=7), Preferences("resident")])
    )
    try:
        plan = make_plan(workload, limits, UNCALIBRATED, preferences)
    except BudgetError as refusal:
        asked = suggested(refusal)
    else:
        check_fits(plan, workload, limits)
        return
    enough = dataclasses.replace(limits, **asked)
    assert all(getattr(enough, name) > getattr(limits, name) for name in asked)
    check_fits(make_plan(workload, enough, UNCALIBRATED, preferences), workload, enough)


@settings(GENTLE, max_examples=15)
@given(workloads(largest=120), st.integers(1, 40))
def test_a_refusal_is_not_given_lightly(workload, share):
    """One MiB less than what the refusal asks for is refused again, but for what one start differs from another by."""
    host = workload.baseline_bytes + share * MIB
    try:
        make_plan(workload, ample(host=host), UNCALIBRATED)
    except BudgetError as refusal:
        asked = suggested(refusal)
    else:
        return
    assert set(asked) == {"host"}
    with pytest.raises(BudgetError):
        make_plan(workload, ample(host=asked["host"] - RESTART_BYTES - MIB), UNCALIBRATED)


def hungry_workload(batch=64, each=10 * MIB):
    """What is derived takes most: 10 MiB a sample."""
    whole = batch * each
    derivation = Derivation("vmap", batch, 0.01, 0.004, whole, whole // 2, batch_bytes=whole)
    return small_workload(derivation=derivation)


def test_batches_are_halved_until_a_plan_fits():
    workload = hungry_workload()
    roomy = make_plan(workload, ample(), UNCALIBRATED)
    assert roomy.batch_size == 64
    assert not any("as probed" in note for note in roomy.notes)
    tight = make_plan(workload, ample(host=500 * MIB), UNCALIBRATED)
    assert tight.batch_size == 8  # 16 samples take 240 MiB beside the 200 of the process and 96 of its libraries
    assert tight.promised.host_bytes <= 500 * MIB
    assert any("batches of 8, not of 64 as probed" in note for note in tight.notes)


def test_a_refusal_names_what_a_batch_of_one_needs_whatever_was_probed():
    refusals = []
    for batch in (1, 3, 64):
        with pytest.raises(BudgetError) as refusal:
            make_plan(hungry_workload(batch), ample(host=210 * MIB), UNCALIBRATED)
        refusals.append(suggested(refusal.value)["host"])
    assert len(set(refusals)) == 1
    assert make_plan(hungry_workload(), ample(host=refusals[0] - RESTART_BYTES), UNCALIBRATED).batch_size == 1


def test_the_loop_takes_as_much_for_a_batch_of_any_size():
    derivation = Derivation("loop", 64, 0.01, 0.004, 4 * MIB, 32)
    assert derivation.at(1).working_bytes == 4 * MIB
    assert derivation.at(1).activation_bytes == 1
    assert derivation.at(64) == derivation


@settings(GENTLE, max_examples=20)
@given(workloads(largest=120), st.integers(0, 8))
def test_more_memory_never_makes_a_plan_slower(workload, steps):
    """Up to the shares within which the planner trades time for memory, or of spilled tiles for bytes that move."""
    workload = dataclasses.replace(workload, device="cpu")
    base = workload.baseline_bytes + 90 * MIB
    sizes = [base + (2**step) * 8 * MIB for step in range(steps, steps + 3)]
    plans = []
    for host in sizes:
        try:
            plans.append(make_plan(workload, ample(host=host), UNCALIBRATED))
        except BudgetError:
            assert not plans, "a larger budget is refused where a smaller one was not"
    for before, after in itertools.pairwise(plans):
        share = FEWER_BYTES_SHARE if after.dataflow == "spill" else EQUALLY_FAST
        assert after.promised.seconds <= before.promised.seconds * (1.001 + share)


@GENTLE
@given(workloads(largest=120))
def test_spilling_never_moves_less_than_the_lower_bound(workload):
    for tile in (None, 1 + workload.samples // 5):
        plan = make_plan(workload, ample(), UNCALIBRATED, Preferences("spill", tile))
        assert plan.io_ratio is not None
        assert plan.io_ratio >= 1 - 1e-12
        assert plan.bytes_written >= workload.jacobian_bytes


def test_plans_are_deterministic():
    workload, limits = small_workload(), ample(host=320 * MIB)
    assert make_plan(workload, limits, UNCALIBRATED) == make_plan(workload, limits, UNCALIBRATED)


class TestChoice:
    """160 MB of Jacobian: what is chosen, and the reason given."""

    tight = ample(host=200 * MIB + 140 * MIB)

    @staticmethod
    def costing(seconds):
        derivation = dataclasses.replace(
            small_workload().derivation, seconds_per_sample=seconds, chain_seconds_per_sample=seconds
        )
        return small_workload(derivation=derivation)

    def test_resident_when_memory_is_ample(self):
        plan = make_plan(self.costing(1.0), ample(), UNCALIBRATED)
        assert plan.dataflow == "resident"
        assert plan.io_ratio is None
        assert plan.reason.startswith("fastest that fits")
        assert {entry.dataflow: entry.verdict for entry in plan.alternatives}["resident"] == "chosen"

    def test_recompute_when_deriving_is_cheap(self):
        plan = make_plan(self.costing(1e-5), self.tight, UNCALIBRATED)
        assert plan.dataflow == "recompute"
        assert re.search(r"resident needs \d+ MiB host, limit 340 MiB; spill would take", plan.reason)

    def test_spill_when_deriving_is_expensive(self):
        plan = make_plan(self.costing(1.0), self.tight, UNCALIBRATED)
        assert plan.dataflow == "spill"
        assert re.search(r"resident needs \d+ MiB host.*recompute would take", plan.reason)

    def test_recompute_when_the_disk_is_too_small_to_spill(self):
        limits = dataclasses.replace(self.tight, disk=20 * MIB)
        plan = make_plan(self.costing(1.0), limits, UNCALIBRATED)
        assert plan.dataflow == "recompute"
        assert re.search(r"spill needs \d+ MiB disk, limit 20.0 MiB", plan.reason)

    def test_a_wish_is_kept(self):
        plan = make_plan(self.costing(1.0), ample(), UNCALIBRATED, Preferences("recompute", 40, 5000, 4))
        assert (plan.dataflow, plan.tile_samples, plan.span_columns) == ("recompute", 40, 5000)
        assert len(plan.passes) == 4

    def test_a_wish_that_does_not_fit_is_refused(self):
        workload = dataclasses.replace(self.costing(1.0), baseline_bytes=100 * MIB)
        limits = ample(host=200 * MIB)
        with pytest.raises(BudgetError, match=r"largest term is Jacobian tiles in memory.*--host-memory to"):
            make_plan(workload, limits, UNCALIBRATED, Preferences("resident"))


def test_every_short_memory_is_named():
    workload = small_workload(device="cuda")
    with pytest.raises(BudgetError) as caught:
        make_plan(workload, ample(host=MIB, device=MIB, disk=MIB // 2), UNCALIBRATED)
    assert set(suggested(caught.value)) == {"host", "device", "disk"}
    make_plan(workload, ample(**suggested(caught.value)), UNCALIBRATED)


def test_too_many_tasks_are_refused():
    with pytest.raises(InputError, match=r"100,000 tasks.*--tile-samples"):
        make_plan(small_workload(train_samples=5000, sizes=(2, 2)), ample(), UNCALIBRATED, Preferences(tile_samples=1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataflow": "resdent"}, "did you mean 'resident'"),
        ({"tile_samples": 0}, "tile_samples must be at least 1, got 0"),
        ({"passes": -1}, "passes must be at least 1, got -1"),
        ({"workers": 1.5}, "workers must be a whole number, got 1.5"),
        ({"tile_samples": True}, "tile_samples must be a whole number, got True"),
        ({"dataflow": "spill", "passes": 2}, "makes one pass, got passes=2"),
    ],
)
def test_preferences_are_checked(fields, message):
    with pytest.raises(InputError, match=message):
        Preferences(**fields)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"smooth": True}, 2e-6),
        ({"smooth": False}, 5e-5),
        ({"smooth": True, "cancelling": True}, 1e-5),
        ({"smooth": False, "cancelling": True}, 5e-5),
        ({"precision": "float64"}, 1e-12),
        ({"precision": "float64", "smooth": True}, 1e-12),
        ({"precision": "bf16x3", "smooth": True}, 1.2e-5),
        ({"precision": "bf16x3", "smooth": False}, 6e-5),
        ({"precision": "bf16x3", "smooth": True, "cancelling": True}, 2e-5),
    ],
)
def test_tolerance(changes, wanted):
    assert tolerance(small_workload(**changes)) == pytest.approx(wanted, rel=1e-12)


def test_tf32_is_not_held_to_the_tolerance_of_float32():
    """A product of 10-bit mantissas is off by some 1e-4, so float32's tolerance would fail every such run."""
    assert tolerance(small_workload(precision="tf32", smooth=True, device="cuda")) >= 1e-4


@pytest.mark.parametrize("changes", [{"train_samples": 0}, {"blocks": ()}])
def test_empty_workloads_are_refused(changes):
    with pytest.raises(InputError):
        small_workload(**changes)


@pytest.mark.parametrize(
    ("room", "side", "order", "bar"),
    [
        # N/b for b = √(0.8·S/s_K), and what is moved over the least that can be.
        (300, 3.0, "square", 1.6),
        (300, 3.0, None, 1.6),
        (300, 3.6, "triangle", 1.35),
        (300, 12.0, "triangle", 1.3),
        (300, 12.0, None, 1.3),
        (300, 8.0, "triangle", 1.3),
        (300, 1.7, None, 2.3),
        (300, 2.4, None, 2.3),
        (300, 3.6, None, 2.3),
        (1000, 6.0, None, 2.3),
        (1000, 9.0, None, 2.3),
    ],
)
@pytest.mark.parametrize("columns", [20_000, 300_000])
def test_few_bytes_more_than_the_bound_are_moved(room, side, order, bar, columns):
    samples = int(side * math.sqrt(0.8 * room * 2**20 / 4))
    job = small_workload(train_samples=samples, outputs=1, rows_per_sample=1, sizes=(columns,))
    limits = ample(host=job.baseline_bytes + LIBRARY_GROWTH_BYTES + room * 2**20)
    plan = make_plan(job, limits, UNCALIBRATED, Preferences(dataflow="spill", order=order))
    assert plan.io_ratio <= bar, plan.layout.describe()


@pytest.mark.parametrize("room", [256, 1000])
@pytest.mark.parametrize("side", [8.0, 8.4, 8.8, 9.2, 9.6, 10.0, 11.0, 12.0, 13.5, 15.0, 18.0, 21.0, 25.0, 29.0])
def test_triangles_fill_the_memory_at_every_size(room, side):
    """Between the sizes of planes as well; K is small beside what is read, so that it hides nothing."""
    samples = int(side * math.sqrt(0.85 * room * 2**20 / 4))
    job = small_workload(train_samples=samples, outputs=1, rows_per_sample=1, sizes=(200_000,))
    limits = ample(host=job.baseline_bytes + LIBRARY_GROWTH_BYTES + room * 2**20)
    plan = make_plan(job, limits, UNCALIBRATED, Preferences(dataflow="spill", order="triangle"))
    assert plan.promised.host_bytes <= limits.host
    assert plan.triangles is not None
    largest = max(len(block.tiles) for block in plan.superblocks) * plan.tile_samples**2 * 4
    assert samples / math.sqrt(largest / 4) >= 7.8, "N/b"
    assert plan.io_ratio <= 1.3, (plan.layout.describe(), plan.triangles)


def test_a_job_that_is_over_at_once_is_not_searched(monkeypatch):
    """In tiles of all samples, whatever else there is; and the search finds none that is clearly faster."""
    small = small_workload(sizes=(3000, 2000), derivation=Derivation("vmap", 8, 1e-5, 1e-5, MIB, MIB))
    priced = []
    price = planner.price
    monkeypatch.setattr(planner, "price", lambda *args: priced.append(args[1].tile_samples) or price(*args))
    quick = make_plan(small, ample(), UNCALIBRATED)
    assert quick.promised.seconds <= planner.QUICK_SECONDS
    assert set(priced) == {small.train_samples}
    assert {"resident", "spill"} <= {entry.dataflow for entry in quick.alternatives}

    monkeypatch.setattr(planner, "QUICK_SECONDS", 0.0)
    searched = make_plan(small, ample(), UNCALIBRATED)
    assert len(set(priced)) > 1
    assert quick.promised.seconds <= searched.promised.seconds * (1 + planner.EQUALLY_FAST)


@pytest.mark.parametrize(("share", "searched"), [(0.9, False), (1.2, True)])
def test_a_job_is_searched_from_so_many_seconds_on(share, searched, monkeypatch):
    def planned(sample_seconds):
        derivation = Derivation("vmap", 8, sample_seconds, sample_seconds, MIB, MIB)
        return make_plan(small_workload(sizes=(3000, 2000), derivation=derivation), ample(), UNCALIBRATED)

    base, one = planned(1e-9).promised.seconds, planned(1e-3).promised.seconds
    wanted = share * planner.QUICK_SECONDS
    priced = []
    price = planner.price
    monkeypatch.setattr(planner, "price", lambda *args: priced.append(args[1].tile_samples) or price(*args))
    found = planned((wanted - base) / (one - base) * 1e-3)
    assert found.promised.seconds == pytest.approx(wanted, rel=0.05)
    assert (len(set(priced)) > 1) == searched


@pytest.mark.parametrize(("sample_seconds", "short"), [(0.1, True), (1.0, False)])
def test_memory_that_hardly_differs_cuts_no_short_job_into_many_tasks(sample_seconds, short, monkeypatch):
    derivation = Derivation("vmap", 8, sample_seconds, sample_seconds, MIB, MIB)
    job = small_workload(derivation=derivation)
    found = make_plan(job, ample(), UNCALIBRATED)
    monkeypatch.setattr(planner, "NEGLIGIBLE_BYTES", 0)
    least = make_plan(job, ample(), UNCALIBRATED)
    assert (found == least) == (not short)
    if short:
        assert least.promised.host_bytes < found.promised.host_bytes <= least.promised.host_bytes + 16 * MIB
        assert found.promised.seconds < least.promised.seconds
        assert found.task_count < least.task_count
