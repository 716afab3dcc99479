"""The panels of a superblock: read once per span, ahead into reused buffers or to the device, or kept in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import Any

import torch

from ooc_ntk.compute.split import SplitProducts, parts_in_place, split_in_place
from ooc_ntk.compute.streams import Slot
from ooc_ntk.planning.superblocks import Superblock
from ooc_ntk.storage.ahead import ReadAhead

from .context import RunContext
from .devicestore import DeviceStore
from .stores import DeviceTile, row_matrix


class Panels(ABC):
    """The panels of a superblock, each read once per span.

    A context manager.

    Attributes:
        bytes_read: bytes read from disk so far.
    """

    def __init__(self, context: RunContext, generation: int, block: Superblock, start: int) -> None:
        """Begin reading.

        Args:
            context: what the tasks of this process share.
            generation: pass.
            block: the superblock.
            start: first span that is wanted.
        """
        spans = context.plan.passes[generation]
        self._context, self._generation, self._block = context, generation, block
        self._held: dict[int, DeviceTile] = {}
        self._kept, self._first = context.kept, spans.start
        self.bytes_read = 0
        keys = [(s, r) for s in range(start, spans.stop) for r in block.panels if (s, r) not in self._kept]
        wanted = block.live if context.frugal else block.buffers
        self._ahead: ReadAhead[tuple[int, int], Any, Any] = ReadAhead(
            keys, self._load, self._buffers(min(wanted, len(keys))), self._stays
        )

    @abstractmethod
    def _buffers(self, count: int) -> list[Any]:
        """Reused buffers to read into; none where panels are in memory already."""

    @abstractmethod
    def _load(self, key: tuple[int, int], buffer: Any) -> Any:
        """Read a panel; in the thread that reads ahead."""

    @abstractmethod
    def _ready(self, key: tuple[int, int], loaded: Any) -> DeviceTile:
        """A panel that was read, as it is contracted."""

    def _give_back(self, key: tuple[int, int]) -> None:
        self._ahead.give_back(key)

    def _stays(self, key: tuple[int, int]) -> bool:
        span, row = key
        return not self._context.frugal and self._context.plan.kept_panels.holds(row, span - self._first)

    def get(self, span: int, row: int) -> DeviceTile:
        """A panel; it must be asked for in the order of the superblock's tiles."""
        found = self._held.get(row)
        if found is None:
            found = self._kept.get((span, row))
            if found is None:
                with self._context.phase("wait for tiles"):
                    loaded = self._ahead.take()
                found = self._ready((span, row), loaded)
                self.bytes_read += self._context.store.load_bytes(span)
                if self._stays((span, row)):
                    self._kept[span, row] = found
            self._held[row] = found
        return found

    def contracted(self, span: int, number: int) -> None:
        """Tile ``number`` of the superblock is contracted: panels that no later one needs may go."""
        for row in set(self._block.tiles[number]):
            if self._block.last_uses[row] == number:
                del self._held[row]
                self._give_back((span, row))

    def __enter__(self) -> Panels:
        return self

    def __exit__(self, *error: object) -> None:
        self._ahead.__exit__(None, None, None)


class HostPanels(Panels):
    """Panels in host memory, or read into the device's by the store itself."""

    def _buffers(self, count: int) -> list[Any]:
        return list(self._context.panel_buffers(count))

    def _load(self, key: tuple[int, int], buffer: Any) -> Any:
        store, (span, row) = self._context.store, key
        if buffer is None and self._stays(key):
            buffer = store.buffer(span)
        return store.load(self._generation, row, span, buffer)

    def _ready(self, key: tuple[int, int], loaded: Any) -> DeviceTile:  # noqa: ARG002
        found: DeviceTile = loaded
        return found


class DevicePanels(Panels):
    """Panels that a thread reads, from disk or from tiles in memory, and a device copies while it multiplies others."""

    def __init__(self, context: RunContext, generation: int, block: Superblock, start: int) -> None:
        """See :class:`Panels`."""
        self._feed = context.feed()
        self._taken: dict[tuple[int, int], Slot] = {}
        #: Token numbers, by which the host decides what is multiplied.
        self._tokens: dict[tuple[int, int], dict[int, torch.Tensor]] = {}
        plan = context.plan
        split = SplitProducts(plan.device) if plan.precision == "bf16x3" and not plan.layers else None
        self._split = split if split is not None and split.dtype == torch.bfloat16 else None
        super().__init__(context, generation, block, start)

    def _buffers(self, count: int) -> list[Any]:
        return list(self._feed.slots(count))

    def _load(self, key: tuple[int, int], buffer: Any) -> Any:
        store, (span, row) = self._context.store, key
        size = store.buffer_bytes(span)
        slot = self._feed.own(size) if buffer is None else buffer

        def load(room: torch.Tensor) -> None:
            store.fill(self._generation, row, span, room)
            parts = store.parts[span]
            if any(part.tokens for part in parts):
                views = store.views(row, span, room)
                self._tokens[key] = {i: views[i].clone() for i, part in enumerate(parts) if part.tokens}

        self._feed.fill(slot, size, load)
        return slot

    def _ready(self, key: tuple[int, int], loaded: Any) -> DeviceTile:
        context, (span, row) = self._context, key
        slot: Slot = loaded
        self._feed.take(slot)
        if not self._stays(key):
            self._taken[key] = slot
        tile: list[torch.Tensor] = list(context.store.views(row, span, slot.memory))
        for index, numbers in self._tokens.pop(key, {}).items():
            tile[index] = numbers
        if self._split is None or context.store.spans[span].block is not None:
            return tuple(tile)
        # Once for all that it is multiplied with, in its own memory.
        rows = row_matrix(tile[0], context.plan.entries_per_sample)
        context.queues.launch(partial(split_in_place, rows))
        return (parts_in_place(rows),)

    def _give_back(self, key: tuple[int, int]) -> None:
        slot = self._taken.pop(key, None)
        if slot is not None:
            self._feed.release(slot)
        super()._give_back(key)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if error[0] is not None:  # otherwise every panel was taken, and who wants the sums waits for the products
            self._feed.drain()


def panels_of(context: RunContext, generation: int, block: Superblock, start: int) -> Panels:
    """The panels of a superblock on the plan's device."""
    if context.queues.overlapping and not isinstance(context.store, DeviceStore):
        return DevicePanels(context, generation, block, start)
    return HostPanels(context, generation, block, start)
