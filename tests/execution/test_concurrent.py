"""Time and memory of tasks of several processes, beside counting them moment by moment."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ooc_ntk.execution.concurrent import peak_host_bytes, together, wall_seconds
from ooc_ntk.storage.manifest import Receipt

#: Whole seconds, so that every moment can be looked at.
TASKS = st.lists(st.tuples(st.sampled_from(["", "0", "1", "2"]), st.integers(0, 30), st.integers(1, 9)), max_size=12)


def receipts(tasks):
    return [
        Receipt(f"task-{number}", float(seconds), started=float(start), worker=worker)
        for number, (worker, start, seconds) in enumerate(tasks)
    ]


def at_work(tasks, moment):
    return sum(start <= moment < start + seconds for worker, start, seconds in tasks if worker)


@given(TASKS)
def test_wall_seconds_are_the_moments_at_which_a_worker_was_at_work_and_all_of_the_driver(tasks):
    driver = sum(seconds for worker, _, seconds in tasks if not worker)
    busy = sum(at_work(tasks, moment) > 0 for moment in range(40))
    assert wall_seconds(receipts(tasks)) == driver + busy


@given(TASKS)
def test_as_many_are_together_as_at_the_busiest_moment(tasks):
    assert together(receipts(tasks)) == max(at_work(tasks, moment) for moment in range(40))


@given(TASKS, st.integers(0, 2**32))
def test_nothing_depends_on_the_order_of_receipts(tasks, seed):
    found = receipts(tasks)
    mixed = random.Random(seed).sample(found, len(found))
    assert wall_seconds(mixed) == pytest.approx(wall_seconds(found))
    assert together(mixed) == together(found)


def test_memory_is_that_of_as_many_workers_as_were_there_at_once():
    def of(worker, start, peak):
        return Receipt(f"{worker}-{start}", 2.0, peak_host_bytes=peak, started=start, worker=worker)

    # Worker 2 came when worker 1 had gone, so that two were there at any time; of them the two largest are counted.
    found = [
        of("0", 0.0, 10),
        of("1", 0.0, 30),
        of("0", 5.0, 20),
        of("2", 5.0, 40),
        Receipt("end", 1.0, peak_host_bytes=7),
    ]
    assert peak_host_bytes(found) == 7 + 40 + 30
    assert peak_host_bytes([]) == 0
