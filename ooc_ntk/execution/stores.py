"""Where tiles live between being derived and being contracted: in memory or on disk."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from ooc_ntk.compute import held
from ooc_ntk.compute.contract import HELD_TORCH_DTYPE
from ooc_ntk.compute.rownorms import squared_norms
from ooc_ntk.compute.split import Parts
from ooc_ntk.planning.memory import STAGING_BYTES
from ooc_ntk.planning.plan import Plan, PlannedBlock
from ooc_ntk.planning.spans import Part, Span
from ooc_ntk.storage.arrays import TileArray
from ooc_ntk.storage.atomic import FileRecord
from ooc_ntk.storage.files import Files, Staged
from ooc_ntk.storage.local import LocalFiles
from ooc_ntk.storage.reading import Reader, aligned_buffer, padded
from ooc_ntk.units import HELD_DTYPE, STORED_DTYPE, TOKEN_DTYPE

#: Name of the Zarr array of dense tiles: (samples, rows per sample, columns).
JACOBIAN: str = "tiles/jacobian.zarr"

#: Folder of the Zarr arrays of factors, one for the inputs and one for the gradients of every block: (samples, items).
FACTORS: str = "tiles/factors"

#: Name of the Zarr array of features, and of that of the heaviest parameters' gradients.
FEATURES: str = "features.zarr"
HEAVY: str = "heavy.zarr"

Matrix = NDArray[np.generic]

#: A tile of one span: one matrix per part, (samples, items).
Tile = tuple[Matrix, ...]


#: A tile of one span as it is contracted, on the host or the device: a matrix per part, (samples, items); of a dense
#: one in ``bf16x3`` perhaps its parts, (samples · entries, depth).
DeviceTile: TypeAlias = tuple[Matrix | torch.Tensor | Parts, ...]


class RowWriter(ABC):
    """Takes the tiles of one sample tile, front to back, span by span."""

    @abstractmethod
    def slab(self, span: int, rows: int) -> Matrix:
        """Memory for the next ``rows`` Jacobian rows of a dense span: (rows, columns), to be filled by the caller."""

    @abstractmethod
    def done(self, span: int, rows: int) -> None:
        """The slab handed out last for ``span`` is filled."""

    @abstractmethod
    def factor_slabs(self, span: int, samples: int) -> Tile:
        """Memory for the next ``samples`` samples of a factored span: one (samples, items) per part, to be filled."""

    @abstractmethod
    def factors_done(self, span: int, samples: int) -> None:
        """The slabs handed out last for ``span`` are filled."""

    @abstractmethod
    def finish(self) -> list[Staged]:
        """All rows are there; returns files to be published (none in memory)."""

    @abstractmethod
    def discard(self) -> None:
        """Give up what was written."""


class TileStore(ABC):
    """Tiles by (pass, row tile, span).

    A dense tile is (samples, rows per sample · columns) in C order, which is contracted as (samples, rows · columns)
    or, for the full kernel, as (samples · rows, columns): reshapes without a copy. A factored one is its inputs and its
    gradients, (samples, positions · rows · outputs).
    """

    def __init__(self, plan: Plan) -> None:
        """Make an empty store for a plan."""
        self.plan = plan
        cut = plan.layout.cut(plan)
        self.spans, self.parts = cut.spans, cut.parts

    def dtype(self, part: Part) -> np.dtype[np.generic]:
        """NumPy dtype of a part (bf16 as its bits)."""
        return np.dtype(TOKEN_DTYPE if part.tokens else HELD_DTYPE[self.plan.precision])

    def kind(self, part: Part) -> torch.dtype:
        """The dtype of a part in torch."""
        return torch.int32 if part.tokens else HELD_TORCH_DTYPE[self.plan.precision]

    @abstractmethod
    def writer(self, generation: int, row: int) -> RowWriter:
        """Start writing the tiles of one row tile for the spans of one pass."""

    @abstractmethod
    def holds(self, generation: int, row: int) -> bool:
        """Whether the tiles of a row tile are there."""

    @abstractmethod
    def load(self, generation: int, row: int, span: int, buffer: Matrix | None) -> Tile:
        """The tile of a span, one (samples, items) matrix per part.

        Args:
            generation: pass.
            row: row tile.
            span: span.
            buffer: bytes to read into, as :meth:`buffer` makes them; not used in memory.

        Raises:
            StorageError: if the tile is missing or damaged.
        """

    @abstractmethod
    def fill(self, generation: int, row: int, span: int, room: torch.Tensor) -> None:
        """Load the tile of a span into host memory, laid out as :meth:`views` finds it.

        Args:
            generation: pass.
            row: row tile.
            span: span.
            room: :meth:`buffer_bytes` of the span, uint8.

        Raises:
            StorageError: if the tile is missing or damaged.
        """

    @abstractmethod
    def shape(self, part: Part, samples: int) -> tuple[int, int]:
        """Rows and width of a part as it is laid out in a buffer."""

    def views(self, row: int, span: int, memory: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tile of a span in memory into which it was loaded: one (samples, items) tensor per part, on its device.

        Args:
            row: row tile.
            span: span.
            memory: uint8; every part begins on a page.
        """
        samples, found, position = len(self.plan.sample_grid.rows(row)), [], 0
        for part in self.parts[span]:
            rows, width = self.shape(part, samples)
            size = rows * width * self.dtype(part).itemsize
            found.append(memory[position : position + size].view(self.kind(part)).view(rows, width)[:samples])
            position += padded(size)
        return tuple(found)

    def buffer_bytes(self, span: int | None = None) -> int:
        """Bytes of a buffer for one span or for any, every part from a page on."""
        wanted = self.parts if span is None else (self.parts[span],)
        samples = self.plan.tile_samples
        return max(
            sum(padded(math.prod(self.shape(part, samples)) * self.dtype(part).itemsize) for part in parts)
            for parts in wanted
        )

    @abstractmethod
    def buffer(self, span: int | None = None) -> Matrix | None:
        """A buffer for :meth:`load` of one span or of any, or None if none is needed."""

    @abstractmethod
    def load_bytes(self, span: int) -> int:
        """Bytes that one :meth:`load` reads from disk."""

    @abstractmethod
    def release(self, generation: int) -> None:
        """Give up all tiles of a pass."""


def as_tensor(matrix: Matrix | torch.Tensor) -> torch.Tensor:
    """A tensor over the same memory; bits of bf16 become bf16."""
    if isinstance(matrix, torch.Tensor):  # loaded into device memory
        return matrix
    tensor = torch.from_numpy(matrix)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


class MemoryStore(TileStore):
    """Tiles in the memory of this process."""

    def __init__(self, plan: Plan) -> None:
        """See :class:`TileStore`."""
        super().__init__(plan)
        self._tiles: dict[tuple[int, int], dict[int, Tile]] = {}
        self._spare: list[Matrix] = []

    def writer(self, generation: int, row: int) -> RowWriter:
        """See :meth:`TileStore.writer`."""
        spans = self.plan.passes[generation]
        samples = len(self.plan.sample_grid.rows(row))
        tiles = {
            span: tuple(self._take(part, samples) for part in self.parts[span])
            for span in range(spans.start, spans.stop)
        }
        return _MemoryWriter(self._tiles, (generation, row), tiles, self.spans)

    def _take(self, part: Part, samples: int) -> Matrix:
        """Memory for a tile: one given back by an earlier pass if it is large enough, otherwise fresh.

        Fresh memory comes from torch: NumPy asks for huge pages, whose first touch was slower (measured on two virtual
        machines: 0.5–2 GB/s against 1.7, and 0.4–0.6 against 2–2.7), and touched memory takes 5 GB/s.
        """
        dtype = self.dtype(part)
        count = samples * part.items
        for index, spare in enumerate(self._spare):
            if spare.size >= count and spare.dtype == dtype:
                return self._spare.pop(index)[:count].reshape(samples, part.items)
        kind = self.kind(part)
        fresh = torch.empty(count, dtype=kind)
        flat: Matrix = (fresh.view(torch.uint16) if kind == torch.bfloat16 else fresh).numpy()
        return flat.reshape(samples, part.items)

    def holds(self, generation: int, row: int) -> bool:
        """See :meth:`TileStore.holds`."""
        return (generation, row) in self._tiles

    def load(self, generation: int, row: int, span: int, buffer: Matrix | None) -> Tile:  # noqa: ARG002
        """See :meth:`TileStore.load`; views, nothing is copied."""
        return self._tiles[generation, row][span]

    def fill(self, generation: int, row: int, span: int, room: torch.Tensor) -> None:
        """See :meth:`TileStore.fill`."""
        for target, matrix in zip(self.views(row, span, room), self._tiles[generation, row][span], strict=True):
            target.copy_(as_tensor(matrix))

    def shape(self, part: Part, samples: int) -> tuple[int, int]:
        """See :meth:`TileStore.shape`."""
        return samples, part.items

    def buffer(self, span: int | None = None) -> Matrix | None:  # noqa: ARG002
        """See :meth:`TileStore.buffer`."""
        return None

    def load_bytes(self, span: int) -> int:  # noqa: ARG002
        """See :meth:`TileStore.load_bytes`."""
        return 0

    def release(self, generation: int) -> None:
        """See :meth:`TileStore.release`; the memory is kept for the next pass, if there is one."""
        for key in [key for key in self._tiles if key[0] == generation]:
            tiles = self._tiles.pop(key)
            if generation + 1 < len(self.plan.passes):
                self._spare.extend(_whole(matrix) for tile in tiles.values() for matrix in tile)


def _whole(tile: Matrix) -> Matrix:
    """The flat buffer that a tile is a view of."""
    return tile if tile.base is None or not isinstance(tile.base, np.ndarray) else _whole(tile.base)


class _MemoryWriter(RowWriter):
    """Hands out views of the tiles themselves."""

    def __init__(
        self,
        tiles: dict[tuple[int, int], dict[int, Tile]],
        key: tuple[int, int],
        target: dict[int, Tile],
        spans: Sequence[Span],
    ) -> None:
        self._tiles, self._key, self._target, self._spans = tiles, key, target, spans
        self._position = dict.fromkeys(target, 0)

    def slab(self, span: int, rows: int) -> Matrix:
        tile, start = self._target[span][0], self._position[span]
        return tile.reshape(-1, self._spans[span].columns)[start : start + rows]

    def done(self, span: int, rows: int) -> None:
        self._position[span] += rows

    def factor_slabs(self, span: int, samples: int) -> Tile:
        start = self._position[span]
        return tuple(matrix[start : start + samples] for matrix in self._target[span])

    def factors_done(self, span: int, samples: int) -> None:
        self._position[span] += samples

    def finish(self) -> list[Staged]:
        self._tiles[self._key] = self._target
        return []

    def discard(self) -> None:
        self._target = {}


class DiskStore(TileStore):
    """Tiles as raw chunk files of Zarr arrays among the files of the run."""

    def __init__(self, plan: Plan, files: Files, records: dict[str, FileRecord], *, direct: bool = False) -> None:
        """See :class:`TileStore`.

        Args:
            plan: the plan.
            files: the files of the run.
            records: committed files by path; the driver adds to it as tasks are committed.
            direct: whether to read past the page cache.
        """
        super().__init__(plan)
        self.files = files
        self._reader: Reader = files.reader(direct=direct)
        self._records = records
        dense = max((span.stop for span in self.spans if span.block is None), default=0)
        self._dense = TileArray(
            files,
            JACOBIAN,
            (plan.samples, plan.rows_per_sample, dense),
            (plan.tile_samples, plan.rows_per_sample, plan.span_columns),
            HELD_DTYPE[plan.precision],
        )
        self._has_dense = dense > 0

    def array(self, part: Part) -> TileArray:
        """The Zarr array of a part."""
        if part.name == "dense":
            return self._dense
        return TileArray(
            self.files,
            f"{FACTORS}/{part.span}-{part.name}.zarr",
            (self.plan.samples, part.items),
            (self.plan.tile_samples, part.items),
            self.dtype(part).str,
        )

    def create(self, provenance: Mapping[str, Any]) -> None:
        """Write the metadata of every array.

        Args:
            provenance: attributes of arrays that outlive the run.

        Raises:
            StorageError: if arrays of other shapes are there.
        """
        del provenance
        attributes = logical_dtype(self.plan)
        if self._has_dense:
            self._dense.create(attributes)
        for parts in self.parts:
            for part in parts:
                if part.name != "dense":
                    self.array(part).create({} if part.tokens else attributes)

    def path(self, part: Part, row: int) -> str:
        """Path of the chunk of one row tile."""
        if part.name == "dense":
            number = self.spans[part.span].start // self.plan.span_columns
            return self._dense.chunk_path((row, 0, number))
        return self.array(part).chunk_path((row, 0))

    def chunk_bytes(self, part: Part) -> int:
        """Bytes of one chunk."""
        return self.plan.tile_samples * part.padded * self.dtype(part).itemsize

    def writer(self, generation: int, row: int) -> RowWriter:
        """See :meth:`TileStore.writer`."""
        return _DiskWriter(self, generation, row)

    def holds(self, generation: int, row: int) -> bool:
        """See :meth:`TileStore.holds`."""
        spans = self.plan.passes[generation]
        return all(
            self.path(part, row) in self._records
            for span in range(spans.start, spans.stop)
            for part in self.parts[span]
        )

    def load(self, generation: int, row: int, span: int, buffer: Matrix | None) -> Tile:  # noqa: ARG002
        """See :meth:`TileStore.load`; every read is checked against its checksum. Parts begin on a page."""
        whole: Any = self.buffer() if buffer is None else buffer
        samples = len(self.plan.sample_grid.rows(row))
        found, position = [], 0
        for part in self.parts[span]:
            size = self.chunk_bytes(part)
            room = whole[position : position + padded(size)]
            self._reader.read(self._records[self.path(part, row)], room)
            chunk = self.typed(room[:size], part)
            if part.name == "dense":
                # The last span is padded to the width of the others; zeros add nothing to a product.
                found.append(chunk.reshape(self.plan.tile_samples, -1)[:samples])
            else:
                found.append(chunk.reshape(self.plan.tile_samples, part.items)[:samples])
            position += len(room)
        return tuple(found)

    def fill(self, generation: int, row: int, span: int, room: torch.Tensor) -> None:
        """See :meth:`TileStore.fill`."""
        self.load(generation, row, span, room.numpy())

    def shape(self, part: Part, samples: int) -> tuple[int, int]:  # noqa: ARG002
        """See :meth:`TileStore.shape`; whole chunks, edges and narrower spans padded."""
        return self.plan.tile_samples, part.padded

    def buffer(self, span: int | None = None) -> Matrix:
        """See :meth:`TileStore.buffer`."""
        return aligned_buffer(self.buffer_bytes(span))

    def typed(self, chunk: Matrix, part: Part) -> Matrix:
        """Bytes of a chunk as elements of a part."""
        return chunk.view(self.dtype(part))

    def load_bytes(self, span: int) -> int:
        """See :meth:`TileStore.load_bytes`."""
        return sum(self.chunk_bytes(part) for part in self.parts[span])

    def release(self, generation: int) -> None:
        """See :meth:`TileStore.release`; the driver deletes the files once the release is committed."""


class _DiskWriter(RowWriter):
    """Gathers rows in one staging slab, and factors in one buffer per part, and appends them to one file each."""

    def __init__(self, store: DiskStore, generation: int, row: int) -> None:
        plan = store.plan
        self._store, self._plan = store, plan
        spans = plan.passes[generation]
        dtype = np.dtype(HELD_DTYPE[plan.precision])
        self._staging = np.empty(max(plan.span_columns, STAGING_BYTES // dtype.itemsize), dtype=dtype)
        self._files: dict[int, list[Staged]] = {}
        self._buffers: dict[int, list[Matrix]] = {}
        try:
            for span in range(spans.start, spans.stop):
                self._files[span] = []
                for part in store.parts[span]:
                    self._files[span].append(store.files.stage(store.path(part, row)))
        except BaseException:
            self.discard()
            raise

    def slab(self, span: int, rows: int) -> Matrix:
        width = self._plan.span_columns
        slab = self._staging[: rows * width].reshape(rows, width)
        used = self._store.spans[span].columns
        slab[:, used:] = 0
        return slab[:, :used]

    def done(self, span: int, rows: int) -> None:
        self._files[span][0].append(self._staging[: rows * self._plan.span_columns])

    def factor_slabs(self, span: int, samples: int) -> Tile:
        parts = self._store.parts[span]
        if span not in self._buffers or len(self._buffers[span][0]) < samples:
            self._buffers[span] = [np.empty((samples, part.items), dtype=self._store.dtype(part)) for part in parts]
        return tuple(buffer[:samples] for buffer in self._buffers[span])

    def factors_done(self, span: int, samples: int) -> None:
        for file, buffer in zip(self._files[span], self._buffers[span], strict=True):
            file.append(buffer[:samples])

    def finish(self) -> list[Staged]:
        self._buffers = {}
        self._staging[:] = 0
        zeros = self._staging.view(np.uint8)
        for span, files in self._files.items():
            for file, part in zip(files, self._store.parts[span], strict=True):
                missing = self._store.chunk_bytes(part) - file.size
                while missing:
                    count = min(missing, zeros.size)
                    file.append(zeros[:count])
                    missing -= count
        found, self._files = [file for files in self._files.values() for file in files], {}
        return found

    def discard(self) -> None:
        for files in self._files.values():
            for file in files:
                file.discard()


class FeatureStore(DiskStore):
    """The features of a projected job: one Zarr array of (samples · rows, dim), which stays when the run is done."""

    def __init__(self, plan: Plan, files: Files, records: dict[str, FileRecord], *, direct: bool = False) -> None:
        """See :class:`DiskStore`."""
        super().__init__(plan, files, records, direct=direct)
        assert plan.projection is not None
        assert plan.projection.dim is not None
        self._dense = TileArray(
            files,
            FEATURES,
            (plan.samples * plan.rows_per_sample, plan.projection.dim),
            (plan.tile_samples * plan.rows_per_sample, plan.span_columns),
            HELD_DTYPE[plan.precision],
        )

    def create(self, provenance: Mapping[str, Any]) -> None:
        """See :meth:`DiskStore.create`; features say what they are of."""
        self._dense.create({**provenance, **logical_dtype(self.plan)})
        if self.plan.heavy:
            heavy_array(self.files, self.plan).create({"parameters": list(self.plan.heavy)})

    def path(self, part: Part, row: int) -> str:
        """See :meth:`DiskStore.path`."""
        return self._dense.chunk_path((row, self.spans[part.span].start // self.plan.span_columns))


def heavy_array(files: Files, plan: Plan) -> TileArray:
    """Gradients of the heaviest parameters beside the features: (samples · rows, parameters)."""
    rows = plan.rows_per_sample
    return TileArray(
        files,
        HEAVY,
        (plan.samples * rows, len(plan.heavy)),
        (plan.tile_samples * rows, len(plan.heavy)),
        STORED_DTYPE[plan.precision],
    )


def logical_dtype(plan: Plan) -> dict[str, str]:
    """What Zarr cannot say of a tile's elements: that their bits are those of bf16."""
    return {"logical_dtype": "bfloat16"} if plan.precision == "bf16" else {}


def factors_of(plan: Plan, block: PlannedBlock, tile: DeviceTile) -> held.Tile:
    """The factors that a tile of a block holds; views.

    Args:
        plan: the plan.
        block: a block that the plan holds as factors.
        tile: its matrices: inputs (samples, input items) and gradients (samples, rows · gradient items).

    Returns:
        Inputs (samples, input items), or (samples, positions · inputs) if rows are looked up as well, and gradients
        (samples, positions, rows, outputs); then the digits of the rows that are looked up (samples, lookups, digits)
        and their gradients (samples, lookups, rows, inputs), if there are any.
    """
    assert block.factors is not None  # the plan holds no other block as factors
    inputs, gradients = (as_tensor(matrix) for matrix in tile if not isinstance(matrix, Parts))
    return held.as_tile(block.factors, inputs, gradients, plan.rows_per_sample, block.contraction)


def slab_norms(slab: Matrix) -> NDArray[np.float64]:
    """Squared norms of the rows of a slab, (rows,); bf16 is widened first."""
    return squared_norms(as_tensor(slab).float().numpy() if slab.dtype == np.uint16 else slab)


def row_matrix(tile: Matrix | torch.Tensor, entries: int) -> torch.Tensor:
    """A dense tile as it is contracted: (samples · entries, depth)."""
    return as_tensor(tile).view(tile.shape[0] * entries, -1)


def store_of(plan: Plan, files: Files, records: dict[str, FileRecord], *, direct: bool = False) -> TileStore:
    """The store that a plan asks for.

    Args:
        plan: the plan.
        files: the files of the run.
        records: committed files by path; the driver adds to it as tasks are committed.
        direct: whether to read tiles past the page cache.
    """
    from .devicestore import DeviceStore, on_device  # it builds on this module

    if plan.projection is not None:
        return FeatureStore(plan, files, records, direct=direct)
    if plan.layout.in_memory:
        return MemoryStore(plan)
    if on_device(plan) and isinstance(files, LocalFiles):
        return DeviceStore(plan, files, records)
    return DiskStore(plan, files, records, direct=direct)
