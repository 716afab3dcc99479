"""Executors of one task list: a plain loop, a Dask graph on the threaded scheduler, and the workers of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from dask.callbacks import Callback
from dask.local import SynchronousExecutor
from dask.task_spec import Task as GraphTask
from dask.task_spec import TaskRef
from dask.threaded import get as threaded_get

from ooc_ntk.errors import InputError, unknown_name
from ooc_ntk.planning.plan import Plan
from ooc_ntk.planning.tasks import Task
from ooc_ntk.storage.manifest import Receipt

from .context import RunContext
from .ledger import Ledger
from .work import perform

if TYPE_CHECKING:
    from .prepare import PreparedJob

#: Runs one task, given the receipts of the tasks it waited for.
Perform = Callable[..., Receipt]
#: The tasks that a task must wait for, among those that are still to be run.
Waits = Callable[[Task], Sequence[Task]]
#: Called by the driver's thread with every receipt, before anything that depends on it starts.
Commit = Callable[[Receipt], None]


@dataclass(frozen=True)
class Work:
    """What is to be done in a session, and what an executor needs for it.

    Attributes:
        context: what task bodies share in this process.
        prepared: the job, loaded.
        tasks: tasks to run, each after everything it waits for.
        waits: direct dependencies among them.
        commit: takes every receipt, in the driver's thread.
        ledger: told how tasks get on.
        say: tells people what goes on beside the tasks.
    """

    context: RunContext
    prepared: PreparedJob
    tasks: Sequence[Task]
    waits: Waits
    commit: Commit
    ledger: Ledger
    say: Callable[[str], None]


class Executor(Protocol):
    """Runs tasks so that each starts after everything it waits for is committed.

    Attributes:
        processes: worker processes that run tasks beside this one; 0 runs them here.
    """

    @property
    def processes(self) -> int:
        """See the class."""

    def run(self, work: Work) -> None:
        """Run every task; the first exception of a task ends the run and is raised."""

    def reach(self) -> None:
        """Make sure that whoever runs tasks is there, before anything is written.

        Raises:
            InputError: if a cluster that someone else started is not.
        """

    def check(self, plan: Plan) -> None:
        """Refuse a plan that cannot be followed this way.

        Raises:
            RunConflictError: saying what to do.
        """

    def close(self) -> None:
        """End what was started; nothing is run any more."""


#: Runs a task list in this process: tasks, what each waits for, the task body and the commit.
Loop = Callable[[Sequence[Task], Waits, Perform, Commit], None]


@dataclass(frozen=True)
class InProcess:
    """Runs tasks one after the other in this process. See :class:`Executor`.

    Attributes:
        loop: how.
    """

    loop: Loop
    processes: int = 0

    def run(self, work: Work) -> None:
        """See :meth:`Executor.run`."""
        context, ledger = work.context, work.ledger

        def body(task: Task, *upstream: Receipt) -> Receipt:
            ledger.begin(task)
            context.advance = lambda phase, amount: ledger.add(task, amount)  # noqa: ARG005
            return perform(context, task, *upstream)

        self.loop(work.tasks, work.waits, body, work.commit)

    def reach(self) -> None:
        """See :meth:`Executor.reach`; this process is."""

    def check(self, plan: Plan) -> None:
        """See :meth:`Executor.check`; any plan can."""

    def close(self) -> None:
        """See :meth:`Executor.close`."""


def run_serially(tasks: Sequence[Task], waits: Waits, perform: Perform, commit: Commit) -> None:
    """The reference executor: one task after another in this thread. See :data:`Loop`."""
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
    """Dask's threaded scheduler with the calling thread as its one task thread. See :data:`Loop`.

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


#: Executors in this process, by name.
EXECUTORS: Final[dict[str, Executor]] = {"serial": InProcess(run_serially), "threads": InProcess(run_threaded)}


def executor_of(scheduler: Any) -> Executor:
    """The executor that a caller asks for.

    Args:
        scheduler: None or ``threads``, ``serial``; the address of a scheduler, a ``distributed.Client``, or a
            :class:`~ooc_ntk.execution.cluster.Cluster`.

    Raises:
        InputError: for a name that is not known.
    """
    if scheduler is None:
        return EXECUTORS["threads"]
    if isinstance(scheduler, str) and "://" not in scheduler:
        if scheduler not in EXECUTORS:
            raise unknown_name("scheduler", scheduler, [*EXECUTORS, "tcp://HOST:PORT"])
        return EXECUTORS[scheduler]
    from .cluster.executor import ClusterExecutor  # takes a second, and most runs need none
    from .cluster.options import Cluster

    if isinstance(scheduler, Cluster):
        return ClusterExecutor(scheduler)
    if isinstance(scheduler, str) or ClusterExecutor.is_client(scheduler):
        return ClusterExecutor(Cluster(scheduler))
    raise InputError(
        f"scheduler must be 'threads', 'serial', an address such as 'tcp://host:8786', a Cluster or a Client, got "
        f"{type(scheduler).__name__}"
    )
