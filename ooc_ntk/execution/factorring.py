"""Factors on their way from the device to the host: the next batch is captured while the last one is copied."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ooc_ntk.compute.streams import Mark, Queues
from ooc_ntk.planning.memory import FACTOR_SLOTS
from ooc_ntk.storage.reading import padded

from .stores import TileStore


@dataclass(eq=False)
class FactorSlot:
    """Room for the factors of one batch on the device and on the host.

    Attributes:
        memory: on the device, (bytes,) uint8.
        locked: on the host, page-locked.
        samples: of the batch in it.
        position: first row of the batch in its tile.
        numbers: of its samples.
        copied: when it is all on the host.
    """

    memory: Tensor
    locked: Tensor
    samples: int = 0
    position: int = 0
    numbers: Sequence[int] = ()
    copied: Mark = None


class FactorRing:
    """Two slots in turn: one is captured into, while the other is copied out and handed to the store."""

    def __init__(self, queues: Queues, store: TileStore, spans: Sequence[int], batch: int) -> None:
        """Allocate.

        Args:
            queues: of the device.
            store: what knows the parts of tiles.
            spans: the factored spans.
            batch: most samples of a batch.
        """
        self._queues, self._store, self._batch = queues, store, batch
        self._spans = tuple(spans)
        size = sum(padded(batch * p.items * store.dtype(p).itemsize) for s in spans for p in store.parts[s])
        self._norms = size
        size += 8 * batch * store.plan.rows_per_sample
        self._free = deque(FactorSlot(queues.device_bytes(size), queues.host_bytes(size)) for _ in range(FACTOR_SLOTS))
        self._all = tuple(self._free)

    def fits(self, spans: Sequence[int], batch: int) -> bool:
        """Whether it is made for these spans and batches."""
        return self._spans == tuple(spans) and self._batch == batch

    def begin(self, samples: int) -> FactorSlot:
        """The next slot, for so many samples."""
        slot = self._free.popleft()
        slot.samples = samples
        return slot

    def views(self, slot: FactorSlot, *, host: bool = False) -> dict[int, tuple[Tensor, ...]]:
        """Its factors by span, one (samples, items) tensor per part, on the device or on the host."""
        memory, position, found = slot.locked if host else slot.memory, 0, {}
        for span in self._spans:
            tile = []
            for part in self._store.parts[span]:
                size = self._batch * part.items * self._store.dtype(part).itemsize
                values = memory[position : position + size].view(self._store.kind(part))
                tile.append(values.view(self._batch, part.items)[: slot.samples])
                position += padded(size)
            found[span] = tuple(tile)
        return found

    def norms(self, slot: FactorSlot, *, host: bool = False) -> Tensor:
        """Room for squared norms of its rows: (samples, rows) float64."""
        memory, rows = slot.locked if host else slot.memory, self._store.plan.rows_per_sample
        return memory[self._norms :].view(torch.float64).view(self._batch, rows)[: slot.samples]

    def send(self, slot: FactorSlot) -> None:
        """What was to be captured so far goes to the host."""
        self._queues.wait("out", self._queues.record("compute"))
        self._queues.copy("out", slot.locked, slot.memory)
        slot.copied = self._queues.record("out")

    def arrive(self, slot: FactorSlot) -> None:
        """Have the host wait for a slot that was sent."""
        self._queues.synchronize(slot.copied)

    def give_back(self, slot: FactorSlot) -> None:
        """A slot was read on the host and may be used again."""
        self._free.append(slot)

    def drain(self) -> None:
        """Have the host wait for everything, and take all slots back, after an error."""
        self._queues.finish()
        self._queues.synchronize(self._queues.record("out"))
        self._free = deque(self._all)
