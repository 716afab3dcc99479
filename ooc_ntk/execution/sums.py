"""The sums of a superblock's kernel tiles, while the panels of one span after the other are contracted."""

from __future__ import annotations

import errno
import logging
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any

import numpy as np
import torch

from ooc_ntk.compute.contract import SUMMED_COLUMNS
from ooc_ntk.planning.memory import FOLDED_SPANS
from ooc_ntk.planning.plan import Plan
from ooc_ntk.planning.superblocks import KernelTile, Superblock
from ooc_ntk.planning.tiles import Range
from ooc_ntk.storage.atomic import TEMPORARY
from ooc_ntk.storage.retries import storage_error

from .context import RunContext
from .savedsums import SAVED_SECONDS, SAVED_SHARE, SavedSums

logger = logging.getLogger(__name__)


def tile_shape(plan: Plan, tile: KernelTile) -> tuple[int, int]:
    """Rows and columns of a tile while it is contracted; one on the diagonal is square, test samples among them."""
    rows = len(plan.sample_grid.rows(tile[0])) * plan.entries_per_sample
    columns = len(plan.sample_grid.columns(tile[1])) * plan.entries_per_sample
    return rows, rows if tile[0] == tile[1] else columns


class TileSums:
    """What the products of the spans are added up in.

    A single tile is summed up in the accumulator, in float64. The sums of several tiles are held as they are stored.
    After :data:`FOLDED_SPANS` spans they are added to float64 sums on disk, before roundings add up: a file without a
    name, which is gone when the process is.

    Attributes:
        folded_bytes: bytes written to that file so far, and read from it once the results are there.
    """

    def __init__(self, context: RunContext, block: Superblock, spans: Range) -> None:
        """Start at zero."""
        self._context, self._block, self._spans = context, block, spans
        self._accumulator = context.accumulator()
        self._several = context.superblock_sums(block)
        self._folds = self._several and self._several[0].dtype == torch.float32
        self._file: IO[bytes] | None = None
        self._folded = False
        self._saved_at = time.perf_counter()
        self.folded_bytes = 0

    def restore(self, key: str) -> int:
        """Go on with sums that an earlier session saved, if there are any and they are whole.

        Args:
            key: the task's key.

        Returns:
            The span to go on with.
        """
        saved = SavedSums(self._context, key)
        if self._several and not self._context.worker:  # other workers are at superblocks of their own
            saved.delete_others()
        if not (self._several and self._context.plan.saves_sums):
            return self._spans.start
        self._saved_at = time.perf_counter()
        found = saved.load(self._several, self._on_disk)
        if found is None:
            return self._spans.start
        span, self._folded = found
        logger.info("%s goes on after %d of %d spans", key, span - self._spans.start, len(self._spans))
        return span

    def save(self, span: int, key: str) -> None:
        """Save the sums after a span if it is time to; what cannot be written is left out.

        Args:
            span: the span that all tiles are contracted for.
            key: the task's key.
        """
        plan = self._context.plan
        if not (self._several and plan.saves_sums) or span + 1 == self._spans.stop:
            return
        if time.perf_counter() - self._saved_at < max(SAVED_SECONDS, SAVED_SHARE * plan.promised.seconds):
            return
        self._context.finish()
        with self._context.phase("save sums"):
            SavedSums(self._context, key).write(self._several, span + 1, self._folded, self._file)
        self._saved_at = time.perf_counter()

    def start(self, span: int, number: int) -> None:
        """The next products are those of a span for a tile of the superblock."""
        shape = tile_shape(self._context.plan, self._block.tiles[number])
        if not self._several:
            if span == self._spans.start:
                self._accumulator.begin(*shape)
        elif self._in_place(span):
            if self._is_first(span):
                self._several[number].zero_()
            self._accumulator.go_on(*shape, self._several[number])
        else:
            self._accumulator.begin(*shape)

    def add(self, span: int, number: int) -> None:
        """They were added to the accumulator."""
        if self._several and not self._in_place(span):
            with self._context.phase("superblock"):
                self._accumulator.add_to(self._several[number], first=self._is_first(span))

    def _is_first(self, span: int) -> bool:
        """Whether sums start at zero with a span."""
        return (span - self._spans.start) % FOLDED_SPANS == 0 if self._folds else span == self._spans.start

    def _in_place(self, span: int) -> bool:
        """Whether a span is one product, so that it need not be summed up by itself first."""
        plan, found = self._context.plan, self._context.store.spans[span]
        return found.block is None and found.columns * plan.rows_per_sample // plan.entries_per_sample <= SUMMED_COLUMNS

    def fold(self, span: int) -> None:
        """A span is contracted for all tiles: add the sums to those on disk if it is time to, and begin anew.

        Raises:
            StorageError: if they cannot be written.
        """
        if not self._folds or span + 1 == self._spans.stop or not self._is_first(span + 1):
            return
        with self._context.phase("fold"):
            for number in range(len(self._block.tiles)):
                self._context.check_stop()
                total = self._total(number)
                self._on_disk(os.pwrite, total.reshape(-1).view(np.uint8).data, number * self._stride)
                self.folded_bytes += total.nbytes
        self._folded = True

    @property
    def _stride(self) -> int:
        return int(self._several[0].numel()) * 8

    def _place(self) -> IO[Any]:
        if self._file is None:
            folder = self._context.directory.scratch
            folder.mkdir(exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, prefix=f"sums{TEMPORARY}")  # noqa: SIM115 - closed by close()
        return self._file

    def _on_disk(self, call: Callable[[int, memoryview, int], int], data: memoryview, place: int) -> None:
        """Read or write all of some bytes at a place of the file.

        Raises:
            StorageError: if that fails; the task is done again where it may help.
        """
        try:
            while data:
                count = call(self._place().fileno(), data, place)
                if not count:
                    raise OSError(errno.EIO, "the file is shorter than what was written")
                data, place = data[count:], place + count
        except OSError as error:
            raise storage_error("adding up in", self._context.directory.scratch, error) from error

    def _total(self, number: int) -> np.ndarray:
        """The sum of a tile in float64, with what is on disk: (rows, columns); a view of the accumulator."""
        self._context.finish()
        shape = tile_shape(self._context.plan, self._block.tiles[number])
        self._accumulator.begin(*shape)
        self._accumulator.take_from(self._several[number])
        total = self._accumulator.result().numpy()
        if self._folded:
            step = max(1, 2**20 // shape[1])
            for row in range(0, shape[0], step):
                part = total[row : row + step]
                place = number * self._stride + row * shape[1] * 8
                before = np.empty_like(part)
                self._on_disk(
                    lambda file, data, at: os.preadv(file, [data], at), before.reshape(-1).view(np.uint8).data, place
                )
                part += before
        return total

    def result(self, number: int) -> np.ndarray:
        """The finished sum of a tile: (rows, columns) float64; a view that the next result overwrites."""
        if self._several:
            return self._total(number)
        self._context.finish()
        return self._accumulator.result().numpy()

    def close(self) -> None:
        """Delete what is on disk."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None
