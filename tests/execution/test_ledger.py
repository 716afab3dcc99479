"""Progress adds up to what receipts stand for, however often tasks are begun."""

from collections import Counter

import pytest

import ooc_ntk
from ooc_ntk.execution.ledger import Ledger, amount_of
from ooc_ntk.planning.tasks import Task
from tests.cases import case


@pytest.fixture(scope="module")
def plan(rates):
    return ooc_ntk.plan(
        case("smooth-mlp").job(),
        ooc_ntk.Budget(host="16GiB", disk="1GiB"),
        preferences=ooc_ntk.Preferences(dataflow="spill", tile_samples=10),
        rates=rates,
    )


def test_attempts_are_counted_once(plan):
    told = Counter()
    ledger = Ledger(plan, lambda phase, amount: told.update({phase: amount}))
    task = Task("rows", 0, 0)
    ledger.begin(task)
    ledger.add(task, 4)
    assert told["rows"] == 4
    ledger.begin(task)  # the worker died: from the front again
    ledger.add(task, 3)
    assert told["rows"] == 4, "not further than before"
    ledger.add(task, 3)
    assert told["rows"] == 6
    ledger.add(task, 100)
    assert told["rows"] == 10, "not more than the task is"
    ledger.finished(task)
    ledger.reached(task, 7)  # another attempt, that comes too late
    assert told["rows"] == 10
    other = Task("rows", 0, 1)
    ledger.finished(other)  # nothing was told of it before
    assert told["rows"] == 20


def test_all_tasks_are_all_samples_and_all_tiles(plan):
    totals = Counter()
    for task in plan.graph.tasks():
        totals[task.kind] += amount_of(plan, task)
    assert totals["rows"] == plan.samples
    assert totals["kernel"] == pytest.approx(plan.sample_grid.kernel_tile_count)
    assert totals["release"] == 0
