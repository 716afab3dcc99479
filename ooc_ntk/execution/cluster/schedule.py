"""Which task a worker takes next: its own stretch of the plan's order, then from the others'."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Final

from ooc_ntk.planning.tasks import Task

#: Key of the tasks whose worker has gone.
_NOBODY: Final = object()


class Schedule:
    """Tasks of one pass, shared out.

    Every worker is given a stretch of the rows and a stretch of the superblocks in the plan's order, in which those
    that follow each other need the same panels: a worker finds them in the memory or page cache where it read them
    last. A worker that has nothing left takes the rear half of what the one with most has ready.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        waits: Callable[[Task], Sequence[Task]],
        weight: Callable[[Task], float],
        workers: Iterable[Hashable],
    ) -> None:
        """Share out.

        Args:
            tasks: the tasks, in the plan's order.
            waits: what each waits for; what is not among the tasks is done already.
            weight: how much work a task is, to be spread evenly.
            workers: names of the workers that are there.
        """
        self._tasks = list(tasks)
        self._place = {task: number for number, task in enumerate(self._tasks)}
        self._blocked, self._next = [0] * len(tasks), [list[int]() for _ in tasks]
        for number, task in enumerate(self._tasks):
            for earlier in waits(task):
                before = self._place.get(earlier)
                if before is not None:
                    self._blocked[number] += 1
                    self._next[before].append(number)
        self._ready: dict[Hashable, list[int]] = {_NOBODY: []}
        for worker in workers:
            self._ready[worker] = []
        self._owners = self._stretches(weight)
        self._over = bytearray(len(tasks))
        self.left = len(tasks)
        for number, count in enumerate(self._blocked):
            if not count:
                self._make_ready(number)

    def _stretches(self, weight: Callable[[Task], float]) -> list[Hashable]:
        """The owner of every task: stretches of equal weight, rows and superblocks each for themselves."""
        workers: list[Hashable] = [worker for worker in self._ready if worker is not _NOBODY] or [_NOBODY]
        totals: dict[str, float] = {}
        for task in self._tasks:
            totals[task.kind] = totals.get(task.kind, 0.0) + weight(task)
        owners, done = [], dict.fromkeys(totals, 0.0)
        for task in self._tasks:
            share = (done[task.kind] + weight(task) / 2) / totals[task.kind] if totals[task.kind] else 0.0
            owners.append(workers[min(len(workers) - 1, int(share * len(workers)))])
            done[task.kind] += weight(task)
        return owners

    def _make_ready(self, number: int) -> None:
        owner = self._owners[number]
        insort(self._ready[owner if owner in self._ready else _NOBODY], number)

    def joined(self, worker: Hashable) -> None:
        """A worker has come: it takes from the others."""
        self._ready.setdefault(worker, [])

    def gone(self, worker: Hashable) -> None:
        """A worker has gone for good: what was its own anyone takes."""
        for number in self._ready.pop(worker, []):
            insort(self._ready[_NOBODY], number)

    def take(self, worker: Hashable) -> Task | None:
        """The next task of a worker, None where nothing is ready."""
        own = self._ready[worker]
        while own and self._over[own[0]]:  # put back, and then its receipt came
            own.pop(0)
        if not own:
            most = max(self._ready.values(), key=len)
            half = len(most) - len(most) // 2
            own[:], most[len(most) - half :] = most[len(most) - half :], []
            own[:] = [number for number in own if not self._over[number]]
        return self._tasks[own.pop(0)] if own else None

    def put_back(self, task: Task) -> None:
        """A task that was taken came to nothing: whoever has nothing else to do takes it."""
        if not self._over[self._place[task]]:
            insort(self._ready[_NOBODY], self._place[task])

    def finished(self, task: Task) -> None:
        """A task is committed: what waited for it alone is ready. Said again, it changes nothing."""
        place = self._place[task]
        if self._over[place]:
            return
        self._over[place] = True
        self.left -= 1
        for number in self._next[place]:
            self._blocked[number] -= 1
            if not self._blocked[number]:
                self._make_ready(number)
