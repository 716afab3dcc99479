"""Planning for worker processes: what each may take, what all take together, and how long several need."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ooc_ntk.errors import BudgetError, InputError
from ooc_ntk.planning.budget import DRIVER_BYTES, WORKER_BYTES, Limits
from ooc_ntk.planning.layout import IN_MEMORY
from ooc_ntk.planning.memory import LIBRARY_GROWTH_BYTES
from ooc_ntk.planning.plan import Plan
from ooc_ntk.planning.planner import Preferences, make_plan
from ooc_ntk.planning.rates import UNCALIBRATED
from tests.planning.strategies import MIB, ample, limits_around, small_workload, workloads
from tests.planning.test_planner import GENTLE, suggested


def plan_for(workers, workload=None, limits=None, **preferences):
    return make_plan(
        workload or small_workload(), limits or ample(), UNCALIBRATED, Preferences(workers=workers, **preferences)
    )


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_the_promise_is_that_of_every_process_and_of_the_driver(workers):
    workload = small_workload()
    plan = plan_for(workers)
    driver = workload.baseline_bytes + LIBRARY_GROWTH_BYTES + DRIVER_BYTES
    assert plan.workers == workers
    assert plan.promised.host_bytes == workers * plan.process_bytes + driver
    assert plan.process_bytes == sum(plan.host_terms.values())
    assert plan.process_bytes > workload.baseline_bytes + WORKER_BYTES
    assert plan.limits == ample(), "the budget is that of the machine"


def test_what_planning_took_is_the_drivers_alone():
    plan = plan_for(2, small_workload(planning_bytes=900 * MIB))
    assert plan.promised.host_bytes == 2 * plan.process_bytes + 900 * MIB + DRIVER_BYTES
    assert plan.process_bytes == plan_for(2).process_bytes


def test_no_dataflow_keeps_tiles_in_the_memory_of_one_process():
    assert make_plan(small_workload(), ample(), UNCALIBRATED).dataflow in IN_MEMORY
    plan = plan_for(2)
    assert plan.dataflow not in IN_MEMORY
    assert not plan.layout.in_memory
    for dataflow in IN_MEMORY:
        with pytest.raises(InputError, match=rf"dataflow '{dataflow}' keeps tiles in the memory of one process"):
            plan_for(2, dataflow=dataflow)


@pytest.mark.parametrize("workers", [0, -1])
def test_a_number_of_workers_is_a_whole_one_from_1(workers):
    with pytest.raises(InputError, match="workers"):
        Preferences(workers=workers)


@GENTLE
@given(st.data(), st.integers(1, 5))
def test_a_plan_fits_the_machine_or_the_refusal_names_what_would_do(data, workers):
    workload = data.draw(workloads())
    limits = data.draw(limits_around(workload))
    try:
        plan = plan_for(workers, workload, limits)
    except BudgetError as refusal:
        said = str(refusal)
        assert f"for {workers} worker process" in said
        enough = dataclasses.replace(limits, **suggested(refusal))
        assert any(getattr(enough, name) > getattr(limits, name) for name in ("host", "device", "disk"))
        plan, limits = plan_for(workers, workload, enough), enough
    assert plan.promised.host_bytes <= limits.host
    assert plan.promised.disk_bytes <= limits.disk
    assert plan.promised.device_bytes <= limits.device


@pytest.mark.parametrize("size", [600, 10])
def test_a_refusal_names_the_limit_of_the_machine_as_it_was_typed(size):
    limits = Limits(host=size * MIB, device=0, disk=2**40)
    with pytest.raises(BudgetError, match=rf"for 2 worker processes: .*the budget is {size}(\.0)? MiB"):
        plan_for(2, limits=limits)


def test_a_machine_smaller_than_the_driver_alone_has_nothing_for_workers():
    with pytest.raises(BudgetError) as refusal:
        plan_for(2, limits=Limits(host=10 * MIB, device=0, disk=2**40))
    enough = suggested(refusal.value)["host"]
    assert plan_for(2, limits=Limits(host=enough, device=0, disk=2**40)).promised.host_bytes <= enough


def test_a_plan_for_workers_is_kept_in_its_file():
    plan = plan_for(3)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert (again.workers, again.process_bytes) == (3, plan.process_bytes)
    old = {
        name: value for name, value in json.loads(plan.to_json()).items() if name not in ("workers", "process_bytes")
    }
    assert Plan.from_json(json.dumps(old)).workers == 0, "files of before there were workers"


def test_the_digest_does_not_cover_the_number_of_workers():
    plan = plan_for(3, tile_samples=20)
    other = dataclasses.replace(plan, workers=1, process_bytes=plan.process_bytes + 1)
    assert other.digest == plan.digest, "so that any number of workers goes on with it"
    assert dataclasses.replace(plan, threads=plan.threads + 1).digest != plan.digest


def test_more_workers_are_faster_until_there_is_a_task_for_each():
    # A disk that nobody ever waits for.
    fast = dataclasses.replace(UNCALIBRATED, disk_read=1e15, disk_write=1e15)
    workload = small_workload(train_samples=2000)
    alone = plan_with(fast, workload, 1)
    rows, tiles = 20, 210
    assert (alone.sample_grid.row_tiles, alone.sample_grid.kernel_tile_count) == (rows, tiles)
    for workers in (2, 3, 4, 7, 50, 500):
        promised = plan_with(fast, workload, workers).promised
        # Every worker does whole tasks, and the last of them may be alone.
        assert promised.rows_seconds == pytest.approx(alone.promised.rows_seconds * math.ceil(rows / workers) / rows)
        assert promised.kernel_seconds == pytest.approx(
            alone.promised.kernel_seconds * math.ceil(tiles / workers) / tiles
        )


def plan_with(rates, workload, workers):
    preferences = Preferences(dataflow="spill", tile_samples=100, superblock_tiles=1, workers=workers)
    return make_plan(workload, ample(), rates, preferences)


def test_host_bytes_of_another_number_of_workers():
    plan = plan_for(2)
    assert plan.host_bytes(2) == plan.host_bytes(0) == plan.promised.host_bytes
    assert plan.host_bytes(5) == plan.promised.host_bytes + 3 * plan.process_bytes
    alone = make_plan(small_workload(), ample(), UNCALIBRATED, Preferences(dataflow="spill"))
    assert alone.host_bytes(0) == alone.promised.host_bytes
    assert alone.host_bytes(2) >= 2 * (alone.promised.host_bytes + WORKER_BYTES)


def test_the_plan_says_how_many_and_what_each_takes():
    text = str(plan_for(2))
    assert "in each of 2 worker processes" in text
    assert "in 1 worker process" in str(plan_for(1))
    assert "worker" not in str(make_plan(small_workload(), ample(), UNCALIBRATED))


def test_every_worker_has_files_of_its_own_on_the_disk():
    from ooc_ntk.planning.layout import Layout
    from ooc_ntk.planning.memory import FOLDED_SPANS, memory_need
    from ooc_ntk.planning.tiles import Range

    workload = small_workload()
    columns = max(1, workload.columns // (2 * FOLDED_SPANS))
    layout = Layout("spill", 8, columns, (Range(0, 1),), (), "square", 4)
    layout = dataclasses.replace(layout, passes=(Range(0, len(layout.spans(workload))),))
    need = {workers: memory_need(dataclasses.replace(workload, workers=workers), layout).disk for workers in (0, 1, 4)}
    term = "sums of a superblock in float64"
    assert need[0][term] > 0
    assert need[1] == need[0]
    assert need[4][term] == 4 * need[0][term]
    assert {name: size for name, size in need[4].items() if name != term} == {
        name: size for name, size in need[0].items() if name != term
    }, "tiles and kernel are there once"


def test_live_data_are_pickled_in_the_driver_alone():
    without, live = plan_for(3), plan_for(3, small_workload(live_bytes=800 * MIB))
    assert live.promised.host_bytes - without.promised.host_bytes == 1000 * MIB
    assert live.process_bytes == without.process_bytes


def test_a_cluster_of_unknown_size_is_never_given_one_task():
    # Where reading is dear, one superblock of everything would be the fastest for the one worker that is planned for.
    slow = dataclasses.replace(UNCALIBRATED, disk_read=1e6)
    workload = small_workload(train_samples=4000, test_samples=0)
    preferences = Preferences(workers=1, tile_samples=100)
    assert len(make_plan(workload, ample(), slow, preferences).superblocks) >= 32
    alone = make_plan(workload, ample(), slow, dataclasses.replace(preferences, workers=None, dataflow="spill"))
    assert len(alone.superblocks) == 1
