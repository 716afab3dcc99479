"""Which task a worker takes next: each once, after what it waits for, from its own stretch while that lasts."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ooc_ntk.execution.cluster.schedule import Schedule
from ooc_ntk.planning.superblocks import superblocks
from ooc_ntk.planning.tasks import Task, TaskGraph
from ooc_ntk.planning.tiles import SampleGrid


def work(train=12, test=3, tile=2, *, normalised=False, tiles=1):
    grid = SampleGrid(train, test, tile)
    graph = TaskGraph(grid, superblocks(grid, "square", tiles), normalised=normalised)
    return graph, [task for task in graph.tasks() if task.kind != "release"]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), workers=st.integers(1, 6), normalised=st.booleans(), leave=st.booleans())
def test_every_task_is_taken_once_after_what_it_waits_for(seed, workers, normalised, leave):
    chance = random.Random(seed)
    graph, tasks = work(normalised=normalised)
    schedule = Schedule(tasks, graph.dependencies, lambda task: 1.0, range(workers))
    there, flying, finished = list(range(workers)), [], []
    while schedule.left:
        free = [worker for worker in there if sum(1 for who, _ in flying if who == worker) < 2]
        chance.shuffle(free)
        for worker in free:
            task = schedule.take(worker)
            if task is not None:
                assert set(graph.dependencies(task)) <= set(finished)
                flying.append((worker, task))
        assert flying, "nothing is ready and nothing is at work: the run would stand still"
        worker, task = flying.pop(chance.randrange(len(flying)))
        finished.append(task)
        schedule.finished(task)
        if leave and len(there) > 1 and chance.random() < 0.1:
            gone = there.pop()
            schedule.gone(gone)  # what it had at work the dispatcher hands out again: here others count as having it
        if leave and chance.random() < 0.05:
            there.append(100 + len(finished))
            schedule.joined(there[-1])
    assert sorted(map(str, finished)) == sorted(map(str, tasks))


def test_workers_keep_to_stretches_of_the_plan_and_then_take_from_others():
    graph, tasks = work(train=40, test=0, tile=2)
    schedule = Schedule(tasks, graph.dependencies, lambda task: 1.0, ["a", "b"])
    rows = [[schedule.take(worker) for _ in range(10)] for worker in ("a", "b")]
    assert [task.row for task in rows[0]] == list(range(10))
    assert [task.row for task in rows[1]] == list(range(10, 20))
    for task in rows[0] + rows[1]:
        schedule.finished(task)
    kernels = [task for task in tasks if task.kind == "kernel"]
    mine = []
    for _ in kernels:
        mine.append(schedule.take("a"))  # b does nothing
        schedule.finished(mine[-1])
    half = len(kernels) // 2
    assert mine[:half] == kernels[:half], "its own stretch, in the plan's order"
    assert mine[half] == kernels[half + half // 2], "then the rear half of b's, whose front b would have next"
    assert set(mine) == set(kernels)
    assert schedule.left == 0
    assert schedule.take("a") is None


def test_stretches_are_of_equal_work():
    graph, tasks = work(train=24, test=0, tile=1, tiles=9)
    blocks = {task: len(graph.superblock(task).tiles) for task in tasks if task.kind == "kernel"}
    assert len(set(blocks.values())) > 1, "superblocks of several sizes"
    schedule = Schedule(tasks, lambda task: (), lambda task: float(blocks.get(task, 1)), ["a", "b", "c"])
    done = {"a": 0, "b": 0, "c": 0}
    for worker in done:
        ready = [schedule._tasks[number] for number in schedule._ready[worker]]
        done[worker] = sum(blocks.get(task, 0) for task in ready)
    assert max(done.values()) - min(done.values()) <= 2 * max(blocks.values())


def test_what_a_worker_leaves_is_taken_by_others():
    graph, tasks = work(train=8, test=0, tile=2)
    schedule = Schedule(tasks, graph.dependencies, lambda task: 1.0, ["a", "b"])
    schedule.gone("b")
    found = []
    while (task := schedule.take("a")) is not None:
        found.append(task)
        schedule.finished(task)
    assert set(found) == set(tasks)


@pytest.mark.parametrize("workers", [[], ["late"]])
def test_workers_may_come_later(workers):
    graph, tasks = work(train=8, test=0, tile=2)
    schedule = Schedule(tasks, graph.dependencies, lambda task: 1.0, workers)
    schedule.joined("a")
    assert schedule.take("a") == Task("rows", 0, 2), "half is left to the next one"


def test_what_was_put_back_and_then_came_is_not_done_twice():
    graph, tasks = work(train=8, test=0, tile=2)
    schedule = Schedule(tasks, graph.dependencies, lambda task: 1.0, ["a"])
    first = schedule.take("a")
    schedule.put_back(first)  # its worker seemed lost
    schedule.finished(first)  # its receipt was on the way
    schedule.finished(first)
    left, found = schedule.left, []
    assert left == len(tasks) - 1
    while (task := schedule.take("a")) is not None:
        found.append(task)
        schedule.finished(task)
    assert first not in found
    assert schedule.left == 0
    schedule.put_back(first)
    assert schedule.take("a") is None


def test_what_came_to_nothing_is_taken_by_whoever_is_free():
    graph, tasks = work(train=8, test=0, tile=2)
    schedule = Schedule(tasks, graph.dependencies, lambda task: 1.0, ["a", "b"])
    lost = schedule.take("b")
    schedule.gone("b")
    schedule.put_back(lost)
    found = []
    while (task := schedule.take("a")) is not None:
        found.append(task)
        schedule.finished(task)
    assert lost in found
    assert schedule.left == 0
