"""Handing out the tasks of a pass to workers, a few at a time, and dealing with workers that are lost or slow."""

from __future__ import annotations

import logging
import queue
import statistics
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import CancelledError, wait
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from distributed import Client, Future, KilledWorker

from ooc_ntk.errors import ClusterError
from ooc_ntk.planning.tasks import Task
from ooc_ntk.storage.manifest import Receipt

from .faults import BrokenDeviceError, UnknownSessionError
from .schedule import Schedule
from .start import Own, tell

logger = logging.getLogger(__name__)

#: Tasks that a worker has at a time: one at work, one waiting, so that it need not wait for the driver.
DEPTH: Final = 2

#: Seconds between two looks at which workers there are, and at the wish to stop.
LOOK_SECONDS: Final = 1.0
WAKE_SECONDS: Final = 0.2

#: Seconds after which worker processes of this machine that are missing are begun again (chosen: a nanny that restarts
#: one needs five).
REVIVE_SECONDS: Final = 8.0

#: A task that takes longer than so many times the median of its kind, and this many seconds, is started again on a
#: worker that has nothing else to do (a choice: MapReduce's backup tasks).
SLOW_TIMES: Final = 2.0
SLOW_SECONDS: Final = 3.0

#: How many workers may be lost while a task is at work on them, before it is blamed.
MOST_KILLED: Final = 6

#: How often a task is given to another worker because its worker could not use its device.
MOST_BROKEN: Final = 8

#: How often a task meets a worker that does not know of the session.
MOST_UNKNOWN: Final = 100

#: Seconds to wait for an answer of the scheduler (a choice: a busy one takes one).
ANSWER_SECONDS: Final = 60.0

#: Tasks of a kind that must be done before one of them is called slow.
SLOW_AFTER: Final = 3

#: Seconds in which tasks stop when they are asked to.
STOP_SECONDS: Final = 4.0


class Job(Protocol):
    """What a dispatcher needs to know of the work.

    Attributes:
        session: name of the session, which keys begin with.
        function: what is submitted; its result is a receipt.
    """

    session: str
    function: Callable[..., Any]

    def weight(self, task: Task) -> float:
        """How much work a task is."""

    def arguments(self, task: Task) -> tuple[Any, ...]:
        """What the function is called with; its dependencies are committed."""

    def commit(self, task: Task, receipt: Any) -> None:
        """A task is done."""

    def reached(self, task: Task, done: float) -> None:
        """A task has got so far."""

    def check_stop(self) -> None:
        """Raise if the run should stop."""

    def say(self, text: str) -> None:
        """Tell people what happened to workers."""

    def stop(self, workers: list[str] | None, key: str | None) -> None:
        """Have a task stop on some workers, or with None everything on all of them."""


@dataclass
class _Attempt:
    """A task that a worker has."""

    task: Task
    worker: str
    future: Future[Any]
    since: float  # when it came first in its worker's list


@dataclass
class _Flight:
    """A task that is handed out, perhaps twice."""

    attempts: list[_Attempt] = field(default_factory=list)
    killed: int = 0
    broken: int = 0
    unknown: int = 0
    submitted: int = 0


class Dispatcher:
    """Hands tasks to workers and their receipts to the driver. One per session.

    The scheduler holds a few tasks per worker, and none that waits for another: what is next is decided here, after
    every commit. Its memory therefore does not grow with the run.
    """

    def __init__(self, client: Client, job: Job, patience: float, own: Own | None = None) -> None:
        """Begin.

        Args:
            client: of the cluster.
            job: the work.
            patience: seconds to go on without any worker.
            own: looks after worker processes that this one has begun.
        """
        self._client, self._job, self._patience = client, job, patience
        self._own = own or Own(None)
        self._complete_at = time.monotonic()
        self._inbox: queue.SimpleQueue[_Attempt | dict[str, Any]] = queue.SimpleQueue()
        self._retired: set[str] = set()
        self._workers: dict[str, str] = {}  # names by address
        self._held: dict[str, list[Task]] = {}
        self._flights: dict[Task, _Flight] = {}
        self._seconds: dict[str, list[float]] = {"rows": [], "kernel": []}
        self._looked = self._alone_since = 0.0
        self._stopping = False
        self._schedule: Schedule | None = None
        self._by_key: dict[str, Task] = {}
        self._client.subscribe_topic(job.session, lambda event: self._inbox.put(event[1]))

    def run(self, tasks: Sequence[Task], waits: Callable[[Task], Sequence[Task]]) -> None:
        """Run the tasks of one pass.

        Args:
            tasks: in the plan's order.
            waits: what each waits for.

        Raises:
            ClusterError: if the scheduler or all workers are lost, or a task kills every worker.
            RunInterrupted: if the run should stop.
            OocNtkError: whatever a task raises.
        """
        if not tasks:
            return
        try:
            self._wait_for_workers()
            self._schedule = schedule = Schedule(tasks, waits, self._job.weight, list(self._workers))
            self._by_key = {task.key: task for task in tasks}
            while schedule.left:
                self._look()
                self._hand_out()
                self._receive()
                self._job.check_stop()
        except BaseException:
            self._stop()
            raise
        finally:
            self._schedule = None
            self._flights.clear()
            self._held.clear()

    # Workers that come and go

    def _wait_for_workers(self) -> None:
        """Wait until there is a worker, and say so."""
        said = False
        while True:
            self._look(now=True)
            if self._workers:
                return
            if not said:
                self._job.say("waiting for a worker to join the cluster (Ctrl-C ends that)")
                said = True
            self._job.check_stop()
            time.sleep(WAKE_SECONDS)

    def _look(self, *, now: bool = False) -> None:
        """See which workers there are, if it is time to.

        Raises:
            ClusterError: if the scheduler is lost, or no worker was there for too long.
        """
        present = time.monotonic()
        if not now and present - self._looked < LOOK_SECONDS:
            return
        self._looked = present
        try:
            # Not the client's own copy, which it refreshes without workers at any time.
            found = self._ask(self._scheduler.identity(n_workers=-1))["workers"]
        except (OSError, TimeoutError, RuntimeError, CancelledError) as error:
            raise self._scheduler_lost() from error
        if self._client.status != "running":
            raise self._scheduler_lost()
        here = {address: str(each["name"]) for address, each in found.items() if address not in self._retired}
        for address in [address for address in self._workers if address not in here]:
            if self._schedule is not None:
                self._job.say(f"worker {self._workers[address]} ({address}) is gone; others do what it had")
                self._gone(address)
        for address in here:
            if address not in self._workers and self._schedule is not None:
                self._schedule.joined(address)
        self._workers = here
        if len(here) >= self._own.wanted:
            self._complete_at = present
        elif present - self._complete_at > REVIVE_SECONDS:
            self._complete_at = present
            self._own.revive()
        if here or not self._alone_since:
            self._alone_since = present
        elif self._retired and self._own.is_ours and not self._own.wanted:
            raise ClusterError(
                "no worker process of this machine can use its device any more; finished tiles are kept: look at the "
                "devices (nvidia-smi) and run the same command again"
            )
        elif present - self._alone_since > self._patience and (self._own.is_ours or self._schedule is not None):
            raise ClusterError(
                f"there has been no worker for {self._patience:.0f} s; finished tiles are kept: start workers and run "
                "the same command again"
            )

    def _ask(self, call: Coroutine[Any, Any, Any]) -> Any:
        """The scheduler's answer; the run can be stopped meanwhile.

        Raises:
            TimeoutError: if there is none in time.
            RunInterrupted: if the run should stop.
        """
        answer, until = tell(self._client.loop, call), time.monotonic() + ANSWER_SECONDS
        while not answer.done() and time.monotonic() < until:
            wait([answer], timeout=WAKE_SECONDS)
            if not answer.done() and not self._stopping:
                self._job.check_stop()
        if not answer.done():
            answer.cancel()
            raise TimeoutError("the scheduler does not answer")
        return answer.result()

    def _gone(self, address: str) -> None:
        """Let others do what a worker had. The scheduler would only wait for that very worker."""
        assert self._schedule is not None
        self._schedule.gone(address)
        held = self._held.pop(address, [])
        for task in held:
            flight = self._flights[task]
            for attempt in [attempt for attempt in flight.attempts if attempt.worker == address]:
                self._drop(attempt)
            if task == held[0]:  # it was at work
                self._killed(task, flight)
            self._again(task, flight)

    @property
    def _scheduler(self) -> Any:
        """What calls of the scheduler go through."""
        return self._client.scheduler

    def _scheduler_lost(self) -> ClusterError:
        return ClusterError(
            "the connection to the scheduler was lost; finished tiles are kept: start it and its workers and run the "
            "same command again"
        )

    # Handing out

    def _hand_out(self) -> None:
        """Give every worker a task, then a second one; those with none left take over what others are slow with."""
        assert self._schedule is not None
        for depth in range(1, DEPTH + 1):
            for worker in self._workers:
                if len(self._held.setdefault(worker, [])) < depth:
                    task = self._schedule.take(worker)
                    if task is not None:
                        self._submit(task, worker)
        for worker in self._workers:
            if not self._held[worker]:
                self._take_over(worker)

    def _submit(self, task: Task, worker: str) -> None:
        flight = self._flights.setdefault(task, _Flight())
        flight.submitted += 1
        future = self._client.submit(
            self._job.function,
            *self._job.arguments(task),
            key=f"{task.key}~{self._job.session}~{flight.submitted}",
            workers=[worker],
            pure=False,
        )
        attempt = _Attempt(task, worker, future, time.monotonic())
        flight.attempts.append(attempt)
        self._held[worker].append(task)
        future.add_done_callback(lambda _: self._inbox.put(attempt))

    def _take_over(self, worker: str) -> None:
        """A worker that has nothing to do takes what waits behind another task, or does again what takes too long."""
        waiting = [held[-1] for held in self._held.values() if len(held) > 1 and self._single(held[-1])]
        if waiting:
            task = waiting[0]
            (attempt,) = self._flights[task].attempts
            self._drop(attempt)
            self._submit(task, worker)
            return
        now = time.monotonic()
        for task, flight in self._flights.items():
            taken = self._seconds[task.kind]
            if len(taken) < SLOW_AFTER:  # nobody knows yet what is slow
                continue
            limit = max(SLOW_SECONDS, SLOW_TIMES * statistics.median(taken))
            if self._single(task) and now - flight.attempts[0].since > limit and flight.attempts[0].worker != worker:
                logger.info("%s takes long on %s; starting it on %s too", task.key, flight.attempts[0].worker, worker)
                self._submit(task, worker)
                return

    def _single(self, task: Task) -> bool:
        """Whether one worker has a task."""
        return task in self._flights and len(self._flights[task].attempts) == 1

    def _drop(self, attempt: _Attempt) -> None:
        """Take a task from a worker; one that is at work goes on and comes to nothing."""
        self._forget(attempt)
        tell(self._client.loop, self._client._cancel([attempt.future]))

    def _forget(self, attempt: _Attempt) -> None:
        """An attempt is no longer waited for."""
        self._flights[attempt.task].attempts.remove(attempt)
        held = self._held.get(attempt.worker, [])
        if attempt.task in held:
            held.remove(attempt.task)
            for following in self._flights.get(held[0], _Flight()).attempts if held else ():
                if following.worker == attempt.worker:
                    following.since = time.monotonic()

    # What comes back

    def _receive(self) -> None:
        """Wait a moment for news, and take all there are."""
        try:
            news = self._inbox.get(timeout=WAKE_SECONDS)
            while True:
                if isinstance(news, _Attempt):
                    self._done(news)
                else:
                    self._told(news)
                news = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _told(self, event: dict[str, Any]) -> None:
        """What a worker says: a receipt, how a task gets on, or a warning."""
        if "warning" in event:
            logger.warning("%s (worker %s)", event["warning"], event["worker"])
            return
        task = self._by_key.get(event["task"])
        if task is None or task not in self._flights:
            return
        if "receipt" not in event:
            self._job.reached(task, event["done"])
            return
        others = [attempt for attempt in self._flights[task].attempts if not attempt.future.done()]
        for attempt in list(self._flights[task].attempts):
            self._forget(attempt)
        del self._flights[task]
        receipt = Receipt.from_json(event["receipt"])
        if len(others) > 1:  # one of them has just ended
            self._job.stop([attempt.worker for attempt in others], task.key)
        self._job.commit(task, receipt)
        self._seconds[task.kind].append(receipt.seconds)
        if self._schedule is not None:
            self._schedule.finished(task)

    def _done(self, attempt: _Attempt) -> None:
        """An attempt has ended without a receipt that came before, or was lost."""
        flight = self._flights.get(attempt.task)
        if flight is None or attempt not in flight.attempts:
            return
        self._forget(attempt)
        if attempt.future.status == "error":
            self._failed(attempt, flight, attempt.future.exception())
        else:
            self._look(now=True)  # cancelled: perhaps the scheduler is gone
        self._again(attempt.task, flight)

    def _failed(self, attempt: _Attempt, flight: _Flight, error: BaseException) -> None:
        """Raise what no other worker would do better."""
        if isinstance(error, KilledWorker):
            self._killed(attempt.task, flight)
        elif isinstance(error, BrokenDeviceError):
            flight.broken += 1
            if flight.broken >= MOST_BROKEN:
                raise error
            self._retire(attempt.worker, error)
        elif isinstance(error, UnknownSessionError):
            flight.unknown += 1
            if flight.unknown >= MOST_UNKNOWN:
                raise error
            time.sleep(WAKE_SECONDS)  # it has only just joined
        else:
            raise error

    def _killed(self, task: Task, flight: _Flight) -> None:
        """Count a worker that was lost with a task at work."""
        flight.killed += 1
        if flight.killed >= MOST_KILLED:
            raise ClusterError(
                f"task {task.key} took {flight.killed} workers with it, one after the other; most likely the machine "
                "has less memory than the plan promises to need: plan with a smaller --host-memory in another --out"
            )

    def _again(self, task: Task, flight: _Flight) -> None:
        """Give a task that no worker has any more to whoever is free."""
        assert self._schedule is not None
        if not flight.attempts:
            self._schedule.put_back(task)

    def _retire(self, address: str, error: BaseException) -> None:
        """Let a worker go whose device is broken, and with it its process."""
        if address in self._retired:
            return
        self._job.say(f"{error}; it is retired, others go on")
        self._retired.add(address)
        self._own.retire(self._workers.pop(address, address))
        self._gone(address)
        tell(self._client.loop, self._scheduler.retire_workers(workers=[address], close_workers=True))

    # Stopping

    def _stop(self) -> None:
        """Have everything stop, and commit what is finished nevertheless."""
        waiting = [attempt for flight in self._flights.values() for attempt in flight.attempts]
        if self._client.status != "running" or not waiting:
            return
        self._stopping = True
        try:
            self._job.stop(None, None)
            until = time.monotonic() + STOP_SECONDS
            while time.monotonic() < until:
                # A signal to all processes has ended workers as well.
                answer = tell(self._client.loop, self._scheduler.identity(n_workers=-1))
                there = answer.result(max(0.1, until - time.monotonic()))["workers"]
                if all(attempt.future.done() or attempt.worker not in there for attempt in waiting):
                    break
                time.sleep(WAKE_SECONDS)
            with suppress(queue.Empty):
                while True:
                    news = self._inbox.get_nowait()
                    if isinstance(news, dict):
                        self._told(news)
            tell(self._client.loop, self._client._cancel([attempt.future for attempt in waiting], force=True))
        except Exception as error:  # noqa: BLE001 - what stopped the run is what should be said
            logger.info("stopping the workers: %s", error)
