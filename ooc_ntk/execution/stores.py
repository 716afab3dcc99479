"""Where Jacobian tiles live between being derived and being contracted: in memory or on disk."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ooc_ntk.compute.contract import TORCH_DTYPE
from ooc_ntk.planning.memory import STAGING_BYTES
from ooc_ntk.planning.plan import Plan
from ooc_ntk.storage.arrays import TileArray
from ooc_ntk.storage.atomic import FileRecord, StagedFile, read_checked
from ooc_ntk.units import STORED_DTYPE

#: Name of the Zarr array that holds spilled Jacobian tiles: (samples, rows per sample, columns).
JACOBIAN: str = "tiles/jacobian.zarr"

Matrix = NDArray[np.generic]


class RowWriter(ABC):
    """Takes the rows of one sample tile, front to back, span by span."""

    @abstractmethod
    def slab(self, span: int, rows: int) -> Matrix:
        """Memory for the next ``rows`` rows of a span: (rows, columns of the span), to be filled by the caller."""

    @abstractmethod
    def done(self, span: int, rows: int) -> None:
        """The slab handed out last for ``span`` is filled."""

    @abstractmethod
    def finish(self) -> list[StagedFile]:
        """All rows are there; returns files to be published (none in memory)."""

    @abstractmethod
    def discard(self) -> None:
        """Give up what was written."""


class TileStore(ABC):
    """Jacobian tiles by (pass, row tile, span).

    A tile is (samples, rows per sample, columns) in C order, seen as a matrix: (samples, rows · columns) when outputs
    are contracted, (samples · rows, columns) for the full kernel; both are reshapes without a copy.
    """

    def __init__(self, plan: Plan) -> None:
        """Make an empty store for a plan."""
        self.plan = plan
        self.dtype = np.dtype(STORED_DTYPE[plan.precision])

    @abstractmethod
    def writer(self, generation: int, row: int) -> RowWriter:
        """Start writing the tiles of one row tile for the spans of one pass."""

    @abstractmethod
    def holds(self, generation: int, row: int) -> bool:
        """Whether the tiles of a row tile are there."""

    @abstractmethod
    def load(self, generation: int, row: int, span: int, buffer: Matrix | None) -> Matrix:
        """A tile as the matrix that is contracted: (samples · entries, columns · outputs contracted).

        Args:
            generation: pass.
            row: row tile.
            span: column span.
            buffer: a whole chunk to read into; not used in memory.

        Raises:
            StorageError: if the tile is missing or damaged.
        """

    @abstractmethod
    def buffer(self) -> Matrix | None:
        """A buffer for :meth:`load`, or None if none is needed."""

    @abstractmethod
    def load_bytes(self) -> int:
        """Bytes that one :meth:`load` reads from disk."""

    @abstractmethod
    def release(self, generation: int) -> None:
        """Give up all tiles of a pass."""

    def _matrix(self, tile: Matrix, samples: int) -> Matrix:
        plan = self.plan
        return tile.reshape(-1)[: samples * tile.size // tile.shape[0]].reshape(samples * plan.entries_per_sample, -1)


class MemoryStore(TileStore):
    """Tiles in the memory of this process."""

    def __init__(self, plan: Plan) -> None:
        """See :class:`TileStore`."""
        super().__init__(plan)
        self._tiles: dict[tuple[int, int], dict[int, Matrix]] = {}
        self._spare: list[Matrix] = []

    def writer(self, generation: int, row: int) -> RowWriter:
        """See :meth:`TileStore.writer`."""
        spans = self.plan.passes[generation]
        samples = len(self.plan.sample_grid.rows(row))
        tiles = {
            span: self._take((samples, self.plan.rows_per_sample, len(self.plan.column_grid.range(span))))
            for span in range(spans.start, spans.stop)
        }
        return _MemoryWriter(self._tiles, (generation, row), tiles)

    def _take(self, shape: tuple[int, ...]) -> Matrix:
        """Memory for a tile: one given back by an earlier pass if it is large enough, otherwise fresh.

        Fresh memory comes from torch: NumPy asks for huge pages, whose first touch was slower (measured on a virtual
        machine: 0.5–2 GB/s against 1.7), and touched memory takes 5 GB/s.
        """
        count = math.prod(shape)
        for index, spare in enumerate(self._spare):
            if spare.size >= count:
                return self._spare.pop(index)[:count].reshape(shape)
        fresh: Matrix = torch.empty(count, dtype=TORCH_DTYPE[self.plan.precision]).numpy()
        return fresh.reshape(shape)

    def holds(self, generation: int, row: int) -> bool:
        """See :meth:`TileStore.holds`."""
        return (generation, row) in self._tiles

    def load(self, generation: int, row: int, span: int, buffer: Matrix | None) -> Matrix:  # noqa: ARG002
        """See :meth:`TileStore.load`; a view, nothing is copied."""
        tile = self._tiles[generation, row][span]
        return self._matrix(tile, tile.shape[0])

    def buffer(self) -> Matrix | None:
        """See :meth:`TileStore.buffer`."""
        return None

    def load_bytes(self) -> int:
        """See :meth:`TileStore.load_bytes`."""
        return 0

    def release(self, generation: int) -> None:
        """See :meth:`TileStore.release`; the memory is kept for the next pass, if there is one."""
        for key in [key for key in self._tiles if key[0] == generation]:
            tiles = self._tiles.pop(key)
            if generation + 1 < len(self.plan.passes):
                self._spare.extend(_whole(tile) for tile in tiles.values())


def _whole(tile: Matrix) -> Matrix:
    """The flat buffer that a tile is a view of."""
    return tile if tile.base is None or not isinstance(tile.base, np.ndarray) else _whole(tile.base)


class _MemoryWriter(RowWriter):
    """Hands out views of the tiles themselves."""

    def __init__(
        self, tiles: dict[tuple[int, int], dict[int, Matrix]], key: tuple[int, int], target: dict[int, Matrix]
    ) -> None:
        self._tiles, self._key, self._target = tiles, key, target
        self._position = dict.fromkeys(target, 0)

    def slab(self, span: int, rows: int) -> Matrix:
        tile = self._target[span]
        start = self._position[span]
        return tile.reshape(-1, tile.shape[2])[start : start + rows]

    def done(self, span: int, rows: int) -> None:
        self._position[span] += rows

    def finish(self) -> list[StagedFile]:
        self._tiles[self._key] = self._target
        return []

    def discard(self) -> None:
        self._target = {}


class DiskStore(TileStore):
    """Tiles as raw chunk files of one Zarr array in the run directory."""

    def __init__(self, plan: Plan, root: Path, records: dict[str, FileRecord]) -> None:
        """See :class:`TileStore`.

        Args:
            plan: the plan.
            root: run directory.
            records: committed files by path; the driver adds to it as tasks are committed.
        """
        super().__init__(plan)
        self.array = TileArray(
            root,
            JACOBIAN,
            (plan.samples, plan.rows_per_sample, plan.columns),
            (plan.tile_samples, plan.rows_per_sample, plan.span_columns),
            STORED_DTYPE[plan.precision],
        )
        self._root = root
        self._records = records

    def writer(self, generation: int, row: int) -> RowWriter:
        """See :meth:`TileStore.writer`."""
        return _DiskWriter(self, generation, row)

    def holds(self, generation: int, row: int) -> bool:
        """See :meth:`TileStore.holds`."""
        spans = self.plan.passes[generation]
        return all(self.array.chunk_path((row, 0, span)) in self._records for span in range(spans.start, spans.stop))

    def load(self, generation: int, row: int, span: int, buffer: Matrix | None) -> Matrix:  # noqa: ARG002
        """See :meth:`TileStore.load`; every read is checked against its checksum."""
        if buffer is None:
            buffer = self.array.empty_chunk()
        read_checked(self._root, self._records[self.array.chunk_path((row, 0, span))], buffer)
        return self._matrix(buffer, len(self.plan.sample_grid.rows(row)))

    def buffer(self) -> Matrix | None:
        """See :meth:`TileStore.buffer`."""
        return self.array.empty_chunk()

    def load_bytes(self) -> int:
        """See :meth:`TileStore.load_bytes`."""
        return self.array.chunk_bytes

    def release(self, generation: int) -> None:
        """See :meth:`TileStore.release`; the driver deletes the files once the release is committed."""


class _DiskWriter(RowWriter):
    """Gathers rows in one staging slab and appends them to one file per span."""

    def __init__(self, store: DiskStore, generation: int, row: int) -> None:
        plan, array = store.plan, store.array
        self._plan = plan
        spans = plan.passes[generation]
        self._files: dict[int, StagedFile] = {}
        self._staging = np.empty(max(plan.span_columns, STAGING_BYTES // store.dtype.itemsize), dtype=store.dtype)
        self._chunk_bytes = array.chunk_bytes
        try:
            for span in range(spans.start, spans.stop):
                self._files[span] = StagedFile(array.root, array.chunk_path((row, 0, span)))
        except BaseException:
            self.discard()
            raise

    def slab(self, span: int, rows: int) -> Matrix:
        width = self._plan.span_columns
        slab = self._staging[: rows * width].reshape(rows, width)
        used = len(self._plan.column_grid.range(span))
        slab[:, used:] = 0
        return slab[:, :used]

    def done(self, span: int, rows: int) -> None:
        self._files[span].append(self._staging[: rows * self._plan.span_columns])

    def finish(self) -> list[StagedFile]:
        self._staging[:] = 0
        for file in self._files.values():
            missing = (self._chunk_bytes - file.size) // self._staging.itemsize
            while missing:
                count = min(missing, self._staging.size)
                file.append(self._staging[:count])
                missing -= count
        files, self._files = list(self._files.values()), {}
        return files

    def discard(self) -> None:
        for file in self._files.values():
            file.discard()
