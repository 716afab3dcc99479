"""Factors that are captured on a device: copied back and handed to the store while the next batch is captured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ooc_ntk.compute.capture import Capture, Captured
from ooc_ntk.compute.jacobian import ModelBatch
from ooc_ntk.compute.rownorms import factor_norms
from ooc_ntk.planning.plan import PlannedBlock

from .blame import check_finite_factor, failing_on, where
from .factorring import FactorSlot
from .stores import RowWriter, as_tensor, factors_of

if TYPE_CHECKING:
    from .context import RunContext


class ReturningFactors:
    """Captures the batches of one sample tile on the device."""

    def __init__(
        self,
        context: RunContext,
        writer: RowWriter,
        capture: Capture,
        factored: Mapping[int, PlannedBlock],
        norms: np.ndarray | None,
    ) -> None:
        """Take the ring of the run.

        Args:
            context: what the tasks of this process share.
            writer: takes the factors.
            capture: what derives them.
            factored: blocks that are held as factors, by span.
            norms: squared norms of the tile's rows, added to here; None if they are not wanted.
        """
        self._context, self._writer, self._capture = context, writer, capture
        self._factored, self._norms = factored, norms
        self._ring = context.ring(list(factored))
        self._sent: FactorSlot | None = None

    def capture(self, batch: ModelBatch, samples: Sequence[int], position: int) -> Callable[[], Captured]:
        """Capture a batch and send its factors off; those of the batch before go to the store meanwhile.

        Args:
            batch: samples on the device.
            samples: their numbers.
            position: first row of the batch in its tile.

        Returns:
            What waits for the device and gives all that was captured.

        Raises:
            NonFiniteError: if the factors of the batch before are not finite.
            InputError: if the model fails on this one.
        """
        plan, ring, found = self._context.plan, self._ring, list[Captured]()
        slot = ring.begin(len(samples))
        slot.position, slot.numbers = position, samples
        views = ring.views(slot)
        tiles = {block.parameters[0]: factors_of(plan, block, views[span]) for span, block in self._factored.items()}

        def work() -> None:
            with failing_on(where(plan, samples)):
                found.append(self._capture.run(batch, tiles.get))
            if self._norms is not None:
                norms = ring.norms(slot).zero_()
                for block in self._factored.values():
                    assert block.factors is not None
                    norms += factor_norms(block.factors, tiles[block.parameters[0]])

        def result() -> Captured:
            self._context.finish()
            return found[0]

        with self._context.phase("capture"):
            self._context.queues.launch(work)
            ring.send(slot)
        self.flush()
        self._sent = slot
        return result

    def flush(self) -> None:
        """Hand the factors that were sent last to the store.

        Raises:
            NonFiniteError: if they are not finite.
        """
        slot, ring, context = self._sent, self._ring, self._context
        if slot is None:
            return
        self._sent = None
        with context.phase("wait for the device"):
            ring.arrive(slot)
        views = ring.views(slot, host=True)
        for span, block in self._factored.items():
            with context.phase("store"):
                for part in views[span]:
                    check_finite_factor(context.plan, part, block.name, slot.numbers)
                for room, part in zip(self._writer.factor_slabs(span, slot.samples), views[span], strict=True):
                    as_tensor(room).copy_(part)
                self._writer.factors_done(span, slot.samples)
        if self._norms is not None:
            found = ring.norms(slot, host=True).reshape(-1).numpy()
            self._norms[slot.position : slot.position + found.size] += found
        ring.give_back(slot)

    def discard(self) -> None:
        """Give up what is on its way, after an error."""
        self._sent = None
        self._ring.drain()
