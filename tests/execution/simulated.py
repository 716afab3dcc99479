"""A device that is none: queues run in any order that events allow, and as late as an adversary may wish."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from ooc_ntk.compute.streams import Mark, Queue, Queues

#: Which queue runs first where several can, at every point where something must run.
ORDERS = (("in", "compute", "out"), ("compute", "in", "out"), ("out", "in", "compute"), ("compute", "out", "in"))


class Point:
    """A point of a queue."""

    def __init__(self) -> None:
        self.reached = False


class Simulated(Queues):
    """Queues in host memory. Nothing runs before it must, or at random if there is a seed.

    Attributes:
        log: what the host did: (operation, queue or "", thread).
    """

    def __init__(
        self,
        order: tuple[Queue, ...] = ("in", "compute", "out"),
        seed: int | None = None,
        ignoring: tuple[str, str] | None = None,
    ) -> None:
        """A device whose queues run in an order of preference.

        Args:
            order: of preference.
            seed: of a schedule at random, in place of that.
            ignoring: an operation, ``wait`` of a queue or ``synchronize`` of a thread (``main`` or ``reader``), that
                does nothing: the event is removed.
        """
        self.order, self.ignoring = order, ignoring
        self._random = None if seed is None else random.Random(seed)
        self._lock = threading.RLock()
        self._running = False
        self._queues: dict[str, deque[tuple[str, object]]] = {name: deque() for name in ("in", "compute", "out")}
        self.log: list[tuple[str, str, str]] = []

    def _put(self, operation: str, queue: str, what: object) -> None:
        with self._lock:
            self.log.append((operation, queue, _thread()))
            self._queues[queue].append((operation, what))
            if self._random is not None:
                for _ in range(self._random.randrange(3)):
                    self._step()

    def launch(self, work: Callable[[], None]) -> None:
        self._put("launch", "compute", work)

    def copy(self, queue: Queue, target: Tensor, source: Tensor) -> None:
        assert target.shape == source.shape
        self._put("copy", queue, lambda: target.copy_(source))

    def record(self, queue: Queue) -> Mark:
        point = Point()
        self._put("record", queue, point)
        return point

    def wait(self, queue: Queue, mark: Mark) -> None:
        assert isinstance(mark, Point)
        if self.ignoring != ("wait", queue):
            self._put("wait", queue, mark)

    def synchronize(self, mark: Mark) -> None:
        assert isinstance(mark, Point)
        with self._lock:
            self.log.append(("synchronize", "", _thread()))
            if self.ignoring == ("synchronize", _thread()):
                return
            while not mark.reached:
                assert self._step(), "the queues wait for each other"

    def _step(self) -> bool:
        """Run one operation; whether any could."""
        assert not self._running, "what runs on the device puts nothing into its queues"
        able = [name for name in self.order if self._queues[name] and self._may(*self._queues[name][0])]
        if not able:
            return False
        operation, what = self._queues[able[0] if self._random is None else self._random.choice(able)].popleft()
        if isinstance(what, Point):
            what.reached = what.reached or operation == "record"
        elif callable(what):
            self._running = True
            try:
                what()
            finally:
                self._running = False
        return True

    @staticmethod
    def _may(operation: str, what: object) -> bool:
        return operation != "wait" or (isinstance(what, Point) and what.reached)

    def device_bytes(self, size: int) -> Tensor:
        """All ones: what is read too early is no number."""
        return torch.full((size,), 255, dtype=torch.uint8)

    host_bytes = device_bytes


def _thread() -> str:
    return "main" if threading.current_thread() is threading.main_thread() else "reader"
