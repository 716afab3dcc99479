"""Progress from receipts: what is told of a run adds up to the same in every executor, whatever became of attempts."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ooc_ntk.planning.plan import Plan
from ooc_ntk.planning.tasks import Task

#: What an observer is told: phase (``rows`` or ``kernel``), amount done just now.
Advance = Callable[[str, float], None]


def amount_of(plan: Plan, task: Task) -> float:
    """What a finished task counts for: samples of ``rows``, tiles over passes of ``kernel``, nothing of ``release``."""
    if task.kind == "rows":
        return float(len(plan.sample_grid.rows(task.row)))
    return len(plan.graph.superblock(task).tiles) / len(plan.passes) if task.kind == "kernel" else 0.0


class Ledger:
    """Tells an observer of work as it gets done, and of the rest of a task when its receipt is there.

    A task that is done again, on another worker or after an error, is not counted twice: only what goes beyond what was
    told of it before is told. Safe to call from any thread.
    """

    def __init__(self, plan: Plan, advance: Advance) -> None:
        """Nothing is done yet.

        Args:
            plan: the plan.
            advance: told phase and amount.
        """
        self._plan, self._advance = plan, advance
        self._lock = threading.Lock()
        self._told: dict[Task, float] = {}
        self._attempt: dict[Task, float] = {}
        self._finished: set[Task] = set()

    def begin(self, task: Task) -> None:
        """An attempt at a task begins."""
        with self._lock:
            self._attempt[task] = 0.0

    def add(self, task: Task, amount: float) -> None:
        """The attempt at a task has got on by an amount."""
        with self._lock:
            done = self._attempt.get(task, 0.0) + amount
            self._attempt[task] = done
        self.reached(task, done)

    def reached(self, task: Task, done: float) -> None:
        """An attempt at a task has got so far."""
        with self._lock:
            before = self._told.get(task, 0.0)
            now = min(done, amount_of(self._plan, task))
            if now <= before or task in self._finished:
                return
            self._told[task] = now
        self._advance(task.kind, now - before)

    def finished(self, task: Task) -> None:
        """A task's receipt is there: whatever was not told of it yet is told now."""
        self.reached(task, amount_of(self._plan, task))
        with self._lock:  # another attempt may still be at work
            self._finished.add(task)
            self._told.pop(task, None)
            self._attempt.pop(task, None)
