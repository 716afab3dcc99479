"""Queues of a device and the rings of memory between them: copies in, products and copies out run beside each other.

What one queue needs of another is said by events: a panel is multiplied once it was copied, its memory is overwritten
once the products that read it are done, and page-locked memory is filled again once it was copied. The host only says
so and goes on; the thread that reads ahead waits for page-locked memory, the one that multiplies never does.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ooc_ntk.planning.memory import PINNED_SLOTS
from ooc_ntk.units import format_bytes

logger = logging.getLogger(__name__)

#: Copies to the device, everything that computes there, and copies back. Each runs in the order in which it was filled.
Queue = Literal["in", "compute", "out"]

#: A point of a queue, reached once all that was put there before is done.
Mark = object


class Queues(ABC):
    """The queues of one device.

    Attributes:
        overlapping: whether they run beside each other and beside the host.
    """

    overlapping: bool = True

    @abstractmethod
    def launch(self, work: Callable[[], None]) -> None:
        """Put what a function computes into the compute queue."""

    @abstractmethod
    def copy(self, queue: Queue, target: Tensor, source: Tensor) -> None:
        """Put a copy into a queue; tensors of one shape, the one on the host page-locked."""

    @abstractmethod
    def record(self, queue: Queue) -> Mark:
        """The point that a queue reaches after all that it holds now."""

    @abstractmethod
    def wait(self, queue: Queue, mark: Mark) -> None:
        """Have what is put into a queue from now on begin after a point of another."""

    @abstractmethod
    def synchronize(self, mark: Mark) -> None:
        """Have the host wait for a point."""

    @abstractmethod
    def device_bytes(self, size: int) -> Tensor:
        """Memory of the device: (size,) uint8, not initialised; what it held before may be in use by its queues."""

    @abstractmethod
    def host_bytes(self, size: int) -> Tensor:
        """Memory of the host that the device copies from and to: (size,) uint8, not initialised."""

    def bring(self, values: Tensor) -> Tensor:
        """Samples on the device, copied beside what is computed; what is computed from now on may read them."""
        return values

    def finish(self) -> None:
        """Have the host wait for everything that was to be computed."""
        self.synchronize(self.record("compute"))


class Immediate(Queues):
    """No device apart from the host: everything is done at once."""

    overlapping = False

    def launch(self, work: Callable[[], None]) -> None:
        """See :meth:`Queues.launch`."""
        work()

    def copy(self, queue: Queue, target: Tensor, source: Tensor) -> None:  # noqa: ARG002
        """See :meth:`Queues.copy`."""
        target.copy_(source)

    def record(self, queue: Queue) -> Mark:  # noqa: ARG002
        """See :meth:`Queues.record`."""
        return None

    def wait(self, queue: Queue, mark: Mark) -> None:
        """See :meth:`Queues.wait`."""

    def synchronize(self, mark: Mark) -> None:
        """See :meth:`Queues.synchronize`."""

    def device_bytes(self, size: int) -> Tensor:
        """See :meth:`Queues.device_bytes`."""
        return torch.empty(size, dtype=torch.uint8)

    host_bytes = device_bytes


class CudaQueues(Queues):
    """Streams and events of a CUDA device. What is computed goes to the stream that is current when this is made."""

    def __init__(self, device: str) -> None:
        """Make the streams.

        Args:
            device: torch device string.
        """
        self._device = torch.device(device)
        self._streams = {
            "in": torch.cuda.Stream(self._device),  # type: ignore[no-untyped-call]
            "compute": torch.cuda.current_stream(self._device),
            "out": torch.cuda.Stream(self._device),  # type: ignore[no-untyped-call]
        }

    def launch(self, work: Callable[[], None]) -> None:
        """See :meth:`Queues.launch`."""
        with torch.cuda.stream(self._streams["compute"]):
            work()

    def copy(self, queue: Queue, target: Tensor, source: Tensor) -> None:
        """See :meth:`Queues.copy`."""
        with torch.cuda.stream(self._streams[queue]):
            target.copy_(source, non_blocking=True)

    def record(self, queue: Queue) -> Mark:
        """See :meth:`Queues.record`."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # who waits for it sleeps
        event.record(self._streams[queue])
        return event

    def wait(self, queue: Queue, mark: Mark) -> None:
        """See :meth:`Queues.wait`."""
        assert isinstance(mark, torch.cuda.Event)
        self._streams[queue].wait_event(mark)

    def synchronize(self, mark: Mark) -> None:
        """See :meth:`Queues.synchronize`."""
        assert isinstance(mark, torch.cuda.Event)
        mark.synchronize()

    def device_bytes(self, size: int) -> Tensor:
        """See :meth:`Queues.device_bytes`."""
        with torch.cuda.stream(self._streams["compute"]):
            return torch.empty(size, dtype=torch.uint8, device=self._device)

    def host_bytes(self, size: int) -> Tensor:
        """See :meth:`Queues.host_bytes`. Plain memory where the system allows no more of it to be locked."""
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            logger.info("copying by way of plain memory, as %s could not be locked: %s", format_bytes(size), error)
            return torch.empty(size, dtype=torch.uint8)

    def bring(self, values: Tensor) -> Tensor:
        """See :meth:`Queues.bring`."""
        if values.device.type != "cpu":
            return values
        try:
            values = values.pin_memory()
        except RuntimeError as error:
            logger.info("samples are copied by way of plain memory: %s", error)
        with torch.cuda.stream(self._streams["in"]):
            found = values.to(self._device, non_blocking=True)
        self.wait("compute", self.record("in"))
        found.record_stream(self._streams["compute"])  # its memory is not handed out again before that is done with it
        return found


def queues_of(device: str) -> Queues:
    """The queues of a torch device."""
    return CudaQueues(device) if torch.device(device).type == "cuda" else Immediate()


@dataclass(eq=False)
class Slot:
    """Memory of the device for one panel.

    Attributes:
        memory: (bytes,) uint8.
        ready: when it was copied.
        free: when it may be overwritten.
    """

    memory: Tensor
    ready: Mark = None
    free: Mark = None


@dataclass(eq=False)
class _Locked:
    """Page-locked memory, and when it may be overwritten."""

    memory: Tensor
    free: Mark = None


class DeviceFeed:
    """Brings panels to the device through a ring of page-locked memory.

    One thread fills slots while another multiplies what they hold.
    """

    def __init__(self, queues: Queues, slot_bytes: int, locked: int = PINNED_SLOTS) -> None:
        """Lock the ring.

        Args:
            queues: of the device.
            slot_bytes: bytes of the largest panel.
            locked: panels that the ring holds.
        """
        self._queues, self._slot_bytes = queues, slot_bytes
        self._ring = deque(_Locked(queues.host_bytes(slot_bytes)) for _ in range(locked))
        self._slots: list[Slot] = []

    def slots(self, count: int) -> list[Slot]:
        """So many slots, the same ones every time."""
        while len(self._slots) < count:
            self._slots.append(self.own(self._slot_bytes))
        return self._slots[:count]

    def own(self, size: int) -> Slot:
        """A slot for a panel that stays on the device."""
        memory = self._queues.device_bytes(size)
        # The allocator hands out what the compute queue may still be at: only later work of that queue is behind it.
        return Slot(memory, free=self._queues.record("compute"))

    def fill(self, slot: Slot, size: int, load: Callable[[Tensor], None]) -> None:
        """Load a panel and have it copied to a slot; for the thread that reads ahead.

        Args:
            slot: one that was released, or is new.
            size: bytes of the panel.
            load: fills (size,) bytes of host memory.
        """
        locked = self._ring.popleft()
        try:
            if locked.free is not None:
                self._queues.synchronize(locked.free)
            load(locked.memory[:size])
            self._queues.wait("in", slot.free)
            self._queues.copy("in", slot.memory[:size], locked.memory[:size])
            locked.free = slot.ready = self._queues.record("in")
        finally:
            self._ring.append(locked)

    def take(self, slot: Slot) -> None:
        """What is computed from now on may read a slot that was filled."""
        self._queues.wait("compute", slot.ready)

    def release(self, slot: Slot) -> None:
        """Nothing that is computed from now on reads a slot; it may be filled again."""
        slot.free = self._queues.record("compute")

    def drain(self) -> None:
        """Have the host wait for all copies and all that was computed, after which memory may go."""
        self._queues.synchronize(self._queues.record("in"))
        self._queues.finish()
