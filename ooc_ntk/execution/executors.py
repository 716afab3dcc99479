"""Two executors of one task list: a plain loop, and a Dask graph on the threaded scheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from dask.callbacks import Callback
from dask.local import SynchronousExecutor
from dask.task_spec import Task as GraphTask
from dask.task_spec import TaskRef
from dask.threaded import get as threaded_get

from ooc_ntk.errors import InputError, unknown_name
from ooc_ntk.planning.tasks import Task
from ooc_ntk.storage.manifest import Receipt

#: Runs one task, given the receipts of the tasks it waited for.
Perform = Callable[..., Receipt]
#: The tasks that a task must wait for, among those that are still to be run.
Waits = Callable[[Task], Sequence[Task]]
#: Called by the driver's thread with every receipt, before anything that depends on it starts.
Commit = Callable[[Receipt], None]


class Executor(Protocol):
    """Runs tasks so that each starts after everything it waits for is committed."""

    def __call__(self, tasks: Sequence[Task], waits: Waits, perform: Perform, commit: Commit) -> None:
        """Run every task; the first exception of a task ends the run and is raised."""


def run_serially(tasks: Sequence[Task], waits: Waits, perform: Perform, commit: Commit) -> None:
    """The reference executor: one task after another in this thread. See :class:`Executor`."""
    receipts: dict[Task, Receipt] = {}
    for task in tasks:
        receipt = perform(task, *(receipts[earlier] for earlier in waits(task)))
        receipts[task] = receipt
        commit(receipt)


def build_graph(tasks: Sequence[Task], waits: Waits, perform: Perform) -> dict[str, GraphTask]:
    """The Dask graph of a task list: coordinates and receipts flow through it, data does not.

    Args:
        tasks: tasks to run, each after everything it waits for.
        waits: direct dependencies among them.
        perform: the task body, called as ``perform(task, *receipts)``.

    Returns:
        Graph tasks by key.
    """
    return {
        task.key: GraphTask(task.key, perform, task, *(TaskRef(earlier.key) for earlier in waits(task)))
        for task in tasks
    }


def run_threaded(tasks: Sequence[Task], waits: Waits, perform: Perform, commit: Commit) -> None:
    """Dask's threaded scheduler with the calling thread as its one task thread. See :class:`Executor`.

    BLAS and OpenMP inside a task use all cores. A thread of its own for the tasks would give OpenMP a second team of
    threads, whose waiting it then throttles: rows of a ResNet took up to twice as long (measured).

    As there is one thread, every task also waits for the one listed before it: the plan counts on that order for the
    panels that stay in memory, and Dask would start kernel tiles between rows.
    """
    if not tasks:
        return
    before = dict(zip(tasks[1:], tasks, strict=False))

    def in_order(task: Task) -> Sequence[Task]:
        found = waits(task)
        return found if task not in before or before[task] in found else (*found, before[task])

    def perform_one(task: Task, *receipts: Receipt) -> Receipt:
        return perform(task, *receipts[: len(waits(task))])

    graph = build_graph(tasks, in_order, perform_one)

    def posttask(key: str, receipt: Receipt, *_: Any) -> None:  # noqa: ARG001 - Dask's signature
        commit(receipt)

    with Callback(posttask=posttask):  # type: ignore[no-untyped-call]
        threaded_get(graph, list(graph), pool=SynchronousExecutor())


EXECUTORS: dict[str, Executor] = {"serial": run_serially, "threads": run_threaded}


def executor_named(name: str | None) -> Executor:
    """The executor of a name; None means ``threads``.

    Raises:
        InputError: for a name that is not known, or a scheduler address.
    """
    if name is None:
        return run_threaded
    if "://" in name:
        raise InputError(f"scheduler {name!r}: running on a cluster is not available in this version; use 'threads'")
    if name not in EXECUTORS:
        raise unknown_name("scheduler", name, EXECUTORS)
    return EXECUTORS[name]
