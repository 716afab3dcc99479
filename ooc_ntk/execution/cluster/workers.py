"""The worker's side: a process loads the job once, by what the driver sent it, then performs tasks and reports."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, Final

from distributed import Worker, get_worker
from distributed.diagnostics.plugin import WorkerPlugin
from distributed.protocol.pickle import dumps, loads

from ooc_ntk.compute.machine import return_device_memory, return_free_memory
from ooc_ntk.compute.rules.table import layer_rule, registered_rules
from ooc_ntk.compute.structure import Structure
from ooc_ntk.errors import (
    BudgetError,
    ClusterError,
    DamagedFileError,
    InputError,
    OocNtkError,
    RunConflictError,
    RunInterrupted,
    StorageError,
)
from ooc_ntk.execution.context import PeakMeter, RunContext, reproducible
from ooc_ntk.execution.executors import Work
from ooc_ntk.execution.prepare import PreparedJob, prepare, with_head
from ooc_ntk.execution.stores import store_of
from ooc_ntk.execution.work import perform
from ooc_ntk.inputs.job import Job
from ooc_ntk.planning.plan import Plan
from ooc_ntk.planning.tasks import Task
from ooc_ntk.stopping import Stop
from ooc_ntk.storage.atomic import FileRecord
from ooc_ntk.storage.directory import RunDirectory

from .faults import BrokenDeviceError, UnknownSessionError, breaks_device

logger = logging.getLogger(__name__)

#: Seconds between two reports of how a task gets on (a choice: a bar that moves, and few messages).
REPORT_SECONDS: Final = 0.5

#: Libraries that must be the same in every process, and those of which a difference may change the last bits.
_SAME: Final = ("ooc-ntk",)
_ALIKE: Final = ("torch", "numpy")

#: Two sessions may be in one process, which has one set of settings for torch, and one memory.
_TURN: Final = threading.Lock()

#: Parts of a job's digest that a worker must find as the driver did; kernel settings come with the plan.
_COMPARED: Final = {"model": "model", "data": "data"}


@dataclass(frozen=True)
class Sent:
    """What a worker is sent once, when it joins a session.

    Attributes:
        session: name of the session.
        plan: the plan, as JSON.
        root: the run directory.
        store: where the files of the run lie, if not there.
        direct: whether tiles are read past the page cache.
        job: description of the job; or the file that holds the pickled job, with the user's layer rules.
        digests: the job's digests as the driver found them.
        structure: what layer rules derive.
        disk_margin: free bytes of disk below which tasks stop.
        batch_size: samples derived together, 0 as planned.
        versions: of what computes in the driver's process.
    """

    session: str
    plan: str
    root: str
    store: str | None
    direct: bool
    job: Mapping[str, object] | str
    digests: Mapping[str, str]
    structure: Structure
    disk_margin: int
    batch_size: int
    versions: Mapping[str, str]

    @classmethod
    def of(cls, session: str, work: Work, *, direct: bool) -> Sent:
        """What workers need for a session.

        Raises:
            InputError: if live objects of the job cannot be sent.
        """
        context, job = work.context, work.prepared.job
        return cls(
            session,
            context.plan.to_json(),
            str(context.directory.root.absolute()),
            context.directory.store,
            direct,
            _described(job, context.directory),
            work.prepared.digests,
            context.structure,
            context.disk_margin,
            context.batch_size if context.batch_size != context.plan.batch_size else 0,
            versions(),
        )


def _described(job: Job, directory: RunDirectory) -> Mapping[str, object] | str:
    """A job in values; or, where it holds live objects, the path of the file that they are pickled into, by its hash.

    What it has opened stays here. The file goes with the tiles when the run is finished.
    """
    if not job.is_live:
        return job.spec()
    try:
        data = bytes(dumps((replace(job), registered_rules())))
    except Exception as error:  # whatever a user's object raises
        raise InputError(
            f"the job's live objects cannot be sent to worker processes ({type(error).__name__}: {error}); give model "
            "and data as specs such as 'file.py:factory', which workers load themselves"
        ) from error
    path = f"tiles/job-{hashlib.blake2b(data, digest_size=16).hexdigest()}.pickle"
    directory.files.write_whole(path, data)
    return path


def _job_of(sent: Sent, plan: Plan, directory: RunDirectory) -> Job:
    """The job as it was sent, on this process's device."""
    if isinstance(sent.job, str):
        found: tuple[Job, dict[Any, Any]] = loads(directory.files.read_whole(sent.job))
        job, rules = found
        for kind, rule in rules.items():
            layer_rule(kind)(rule)
        return replace(job, device=plan.device)
    return Job.from_spec({**sent.job, "device": plan.device})


class Session(WorkerPlugin):
    """One session in one worker: loaded at its first task, in the thread that performs tasks."""

    def __init__(self, sent: Sent) -> None:
        """Made by the driver; nothing is loaded before it has travelled."""
        self.sent = sent
        self.name = sent.session

    def setup(self, worker: Worker) -> None:
        """Called by the worker when the session reaches it."""
        for other in list(worker.plugins.values()):
            if isinstance(other, Session) and other is not self and other.run == self.run:
                other.teardown(worker)  # of a driver that was killed, whose run is gone on with
        self._worker = worker
        self._stop = Stop()
        self._stopped = False
        self._task: Task | None = None
        self._lock = threading.Lock()
        self._opened = ExitStack()
        self._context: RunContext | None = None
        self._reported = 0.0
        self._log = _Forward(worker, self.name)
        self._log.install()

    def teardown(self, worker: Worker) -> None:  # noqa: ARG002 - Dask's signature
        """Called when the session ends: memory goes back, whatever task is at work stops."""
        self.stop(None)
        self._log.remove()
        with self._lock:
            at_work = self._task is not None
        if not at_work:  # otherwise the task gives it back when it has stopped
            self._give_back()

    def _give_back(self) -> None:
        """Give back what the session holds in this process."""
        self._opened.close()
        context, self._context = self._context, None
        if context is not None:
            context.reader.close()
            context.drop_buffers()
            device = context.plan.device
            del context
            return_free_memory()
            return_device_memory(device)

    def stop(self, key: str | None) -> None:
        """Have a task stop at its next step; None is whatever comes, and all that follow."""
        with self._lock:
            self._stopped = self._stopped or key is None
            if self._stopped or (self._task is not None and self._task.key == key):
                self._stop.event.set()

    def perform(self, task: Task, records: Mapping[str, FileRecord], digest: str | None, tiles_only: bool) -> None:
        """Perform a task here, and send its receipt. Arguments as for :func:`perform_there`.

        One at a time: a worker that someone else started may have several threads, and one model, context and memory.
        """
        with _TURN:
            self._perform(task, records, digest, tiles_only)

    def _perform(self, task: Task, records: Mapping[str, FileRecord], digest: str | None, tiles_only: bool) -> None:
        with self._lock:
            self._task, self._stop = task, Stop()
            if self._stopped:
                self._stop.event.set()
        try:
            if self._stop.event.is_set():
                raise RunInterrupted("stopped")
            context = self._loaded()
            context.stop = self._stop
            assert isinstance(context.records, dict)
            context.records.clear()
            context.records.update(records)
            context.tiles_only.clear()
            if tiles_only:
                context.tiles_only.add(task.key)
            if digest is not None:
                context.digests[task.row] = digest
            done = 0.0

            def advance(phase: str, amount: float) -> None:  # noqa: ARG001 - as everywhere
                nonlocal done
                done += amount
                now = time.monotonic()
                if now - self._reported >= REPORT_SECONDS:
                    self._reported = now
                    self._worker.log_event(self.name, {"task": task.key, "done": done})

            context.advance = advance
            with reproducible(context.plan):
                receipt = perform(context, task)
            self._worker.log_event(self.name, {"task": task.key, "receipt": receipt.to_json()})
        finally:
            with self._lock:
                self._task, stopped = None, self._stopped
            if stopped:
                self._give_back()

    def _loaded(self) -> RunContext:
        """The context of this process, made at the first task."""
        if self._context is None:
            self._compare_versions()
            plan = Plan.from_json(self.sent.plan)
            directory = RunDirectory(self.sent.root, self.sent.store)
            if self.sent.store is None:
                self._find(directory, plan)
            job = _job_of(self.sent, plan, directory)
            try:
                prepared = prepare(job)
            except OocNtkError as error:
                raise InputError(
                    f"worker {self._worker.address} cannot load the job: {error}; model and data must be where they "
                    "are on the driver's machine, on a shared file system or copied there"
                ) from error
            if plan.head is not None:
                prepared = with_head(prepared, plan.head.name)
            self._compare(prepared)
            meter = PeakMeter()
            self._opened.enter_context(meter.watching())
            records: dict[str, FileRecord] = {}
            self._context = RunContext(
                plan,
                directory,
                prepared.function,
                prepared.reader,
                store_of(plan, directory.files, records, direct=self.sent.direct),
                self._stop,
                meter,
                lambda phase, amount: None,  # noqa: ARG005 - set for every task
                {},
                records,
                structure=self.sent.structure,
                disk_margin=self.sent.disk_margin,
                batch_size=self.sent.batch_size,
                worker=str(self._worker.name),
            )
        return self._context

    @property
    def run(self) -> tuple[str, str | None, str]:
        """What run a session is of."""
        return self.sent.root, self.sent.store, self.sent.plan

    def _find(self, directory: RunDirectory, plan: Plan) -> None:
        """Refuse to begin where the run directory is not the driver's."""
        try:
            there = Plan.load(directory.plan_path).digest
        except StorageError:
            there = ""
        if there != plan.digest:
            raise InputError(
                f"worker {self._worker.address} does not find the run in {directory.root}: the run directory must lie "
                "on a file system that all workers share under the same path; or keep the tiles in a store with --store"
            )

    def _compare_versions(self) -> None:
        """Refuse another version of this package, and say which libraries differ."""
        here = versions()
        for name in _SAME:
            if here[name] != self.sent.versions[name]:
                raise ClusterError(
                    f"worker {self._worker.address} has {name} {here[name]}, the driver has "
                    f"{self.sent.versions[name]}; install the same version"
                )
        for name in _ALIKE:
            if here[name] != self.sent.versions[name]:
                logger.warning(
                    "%s is %s here and %s at the driver: the last bits may differ",
                    name,
                    here[name],
                    self.sent.versions[name],
                )

    def _compare(self, prepared: PreparedJob) -> None:
        """Refuse a job that is another one here than at the driver."""
        differing = [what for part, what in _COMPARED.items() if prepared.digests[part] != self.sent.digests[part]]
        if differing:
            raise RunConflictError(
                f"worker {self._worker.address} finds another {' and other '.join(differing)} than the driver: files "
                "differ from machine to machine; put them on a shared file system, or copy them anew"
            )


def perform_there(
    session: str, task: Task, records: Mapping[str, FileRecord], digest: str | None, tiles_only: bool
) -> None:
    """Perform a task in a worker. What the scheduler hands out: coordinates and records in, a receipt out.

    The receipt goes to the driver as an event, before the scheduler learns that the task is done. As a result it would
    have to be fetched from the worker, which may be gone by then.

    Args:
        session: name of the session.
        task: the task.
        records: committed files that it reads, by path.
        digest: digest of its samples as they were read before, or None.
        tiles_only: whether it is finished but for its tiles.

    Raises:
        BrokenDeviceError: if the worker can no longer use its device.
        UnknownSessionError: if the session has not reached this worker.
        OocNtkError: as the task body does.
    """
    worker = get_worker()
    plugin = worker.plugins.get(session)
    if not isinstance(plugin, Session):
        raise UnknownSessionError(f"worker {worker.address} does not know of session {session}")
    failure: Exception | None = None
    try:
        plugin.perform(task, records, digest, tiles_only)
    except Exception as error:  # noqa: BLE001 - raised below, as it can travel
        failure = _travelling(error, worker.address)
    if failure is not None:
        raise failure


def stop_there(session: str, key: str | None, dask_worker: Worker) -> None:
    """Have a task of a session stop in a worker, or with None the whole session; run on its event loop."""
    plugin = dask_worker.plugins.get(session)
    if isinstance(plugin, Session):
        plugin.stop(key)


def versions() -> dict[str, str]:
    """What computes in this process."""
    return {name: version(name) for name in (*_SAME, *_ALIKE)}


def _travelling(error: Exception, address: str) -> Exception:
    """An error as the driver can read it: Dask sends what caused it as well, if that can be pickled at all."""
    if breaks_device(error):
        return BrokenDeviceError(f"worker {address} cannot use its device any more: {error}")
    if isinstance(error, StorageError | BudgetError) and not isinstance(error, DamagedFileError):
        error.args = (f"{error} (on worker {address})",)
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


class _Forward(logging.Handler):
    """Sends this package's warnings in a worker to the driver, where people look."""

    def __init__(self, worker: Worker, topic: str) -> None:
        super().__init__(logging.WARNING)
        self._worker, self._topic = worker, topic

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._worker.log_event(self._topic, {"warning": record.getMessage(), "worker": str(self._worker.name)})
        except Exception:  # noqa: BLE001 - the connection is gone, and a warning is no reason to fail
            self.handleError(record)

    def install(self) -> None:
        root = logging.getLogger("ooc_ntk")
        root.addHandler(self)
        root.propagate = False

    def remove(self) -> None:
        root = logging.getLogger("ooc_ntk")
        root.removeHandler(self)
        root.propagate = not any(isinstance(handler, _Forward) for handler in root.handlers)
