"""The executor that runs a task list on worker processes: cluster, session, pass after pass."""

from __future__ import annotations

import logging
from collections import defaultdict
from contextlib import ExitStack, suppress
from typing import Any

from distributed import Client

from ooc_ntk.errors import RunConflictError
from ooc_ntk.execution.calibration import reads_directly
from ooc_ntk.execution.executors import Work
from ooc_ntk.execution.work import perform
from ooc_ntk.extras import how_to_install, is_installed
from ooc_ntk.planning.plan import Plan
from ooc_ntk.planning.tasks import Task

from .dispatch import Dispatcher
from .inputs import records_of
from .options import Cluster
from .start import FORGET_SECONDS, Own, client_of, forget_dead, has_dashboard, register, reported, session_name, tell
from .workers import Sent, Session, perform_there, stop_there

logger = logging.getLogger(__name__)


class ClusterExecutor:
    """Runs tasks on the workers of a cluster. See :class:`ooc_ntk.execution.executors.Executor`.

    A cluster that it starts lives until :meth:`close`, so that several runs share it.
    """

    def __init__(self, options: Cluster) -> None:
        """Nothing is started before there is something to do."""
        self.options = options
        self._opened = ExitStack()
        self._client: Client | None = None
        self._shown = False

    @staticmethod
    def is_client(value: object) -> bool:
        """Whether something is a client of a Dask cluster."""
        return isinstance(value, Client)

    @property
    def processes(self) -> int:
        """See :class:`ooc_ntk.execution.executors.Executor`."""
        return self.options.processes

    def reach(self) -> None:
        """See :meth:`ooc_ntk.execution.executors.Executor.reach`; processes of this machine are begun with the run."""
        if self.options.scheduler is not None:
            self._connected(threads=1)

    def check(self, plan: Plan) -> None:
        """See :meth:`ooc_ntk.execution.executors.Executor.check`.

        Raises:
            RunConflictError: if the plan keeps tiles in the memory of one process.
        """
        if plan.layout.in_memory:
            raise RunConflictError(
                f"the plan keeps tiles in the memory of one process (dataflow {plan.dataflow}), and workers share "
                "tiles on disk; leave --workers, --devices or --scheduler out to go on in one process, or start anew "
                "in another --out"
            )
        if self.options.devices is not None and plan.device not in ("cuda", "cuda:0"):
            raise RunConflictError(
                f"the plan is for {plan.device}, and each process of --devices sees one device, which it calls cuda; "
                "leave --device out, or plan with --device cuda"
            )

    def close(self) -> None:
        """End what was started."""
        self._client = None
        self._opened.close()

    def run(self, work: Work) -> None:
        """See :meth:`ooc_ntk.execution.executors.Executor.run`.

        Tasks of a pass are submitted when all of the pass before is committed, a few at a time.

        Raises:
            InputError: if there is no cluster, or live objects cannot be sent to it.
            ClusterError: if the scheduler or all workers are lost.
            RunInterrupted: if the run should stop.
        """
        plan = work.context.plan
        client = self._connected(plan.threads)
        if not self._shown and has_dashboard(client):
            self._shown = True
            needs = "" if is_installed("bokeh") else f"  (it needs Bokeh; first: {how_to_install('bokeh')})"
            work.say(f"dashboard: {client.dashboard_link}{needs}")
        sent = Sent.of(session_name(client), work, direct=reads_directly(plan.device, plan.promised.disk_bytes))
        passes: dict[int, list[Task]] = defaultdict(list)
        for task in work.tasks:
            passes[task.generation].append(task)
        forget_dead(client)
        own = Own(client if self.options.scheduler is None else None)
        with reported(self.options, client):
            register(client, Session(sent), sent.session, work.context.check_stop)
            try:
                dispatcher = Dispatcher(client, _Job(client, sent.session, work), self.options.patience, own)
                for generation in sorted(passes):
                    tasks = passes[generation]
                    dispatcher.run([task for task in tasks if task.kind != "release"], work.waits)
                    for task in tasks:
                        if task.kind == "release":
                            work.commit(perform(work.context, task))
            finally:
                with suppress(Exception):  # whatever is lost, that is not what should be said
                    client.unsubscribe_topic(sent.session)
                    tell(client.loop, client._unregister_worker_plugin(sent.session)).result(FORGET_SECONDS)

    def _connected(self, threads: int) -> Client:
        if self._client is None:
            self._client = self._opened.enter_context(client_of(self.options, threads))
        return self._client


class _Job:
    """What a dispatcher needs to know of the work. See :class:`ooc_ntk.execution.cluster.dispatch.Job`."""

    def __init__(self, client: Client, session: str, work: Work) -> None:
        self._client, self.session, self._work = client, session, work
        self.function = perform_there

    def weight(self, task: Task) -> float:
        graph = self._work.context.plan.graph
        return float(len(graph.superblock(task).tiles)) if task.kind == "kernel" else 1.0

    def arguments(self, task: Task) -> tuple[Any, ...]:
        context = self._work.context
        self._work.ledger.begin(task)
        return (
            self.session,
            task,
            records_of(context, task),
            context.digests.get(task.row) if task.kind == "rows" else None,
            task.key in context.tiles_only,
        )

    def commit(self, task: Task, receipt: Any) -> None:
        if task.kind == "rows" and receipt.samples_digest is not None:
            self._work.context.digests[task.row] = receipt.samples_digest
        self._work.commit(receipt)

    def reached(self, task: Task, done: float) -> None:
        self._work.ledger.reached(task, done)

    def check_stop(self) -> None:
        self._work.context.check_stop()

    def say(self, text: str) -> None:
        logger.warning("%s", text)

    def stop(self, workers: list[str] | None, key: str | None) -> None:
        # Not waited for: one that is dead or hung does not answer.
        tell(self._client.loop, self._client._run(stop_there, self.session, key, workers=workers, on_error="ignore"))
