"""Where the entries of a kernel come from: tiles on disk, features, an array; and views of them without a copy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import zarr
from numpy.typing import NDArray

from ooc_ntk.storage.arrays import TileArray, TileRows
from ooc_ntk.storage.atomic import FileRecord
from ooc_ntk.storage.files import Files
from ooc_ntk.storage.local import files_of
from ooc_ntk.storage.stripes import TileStripes

from .features import Features

#: Bytes of a block of entries that are not stored in tiles (a choice, of the size of a stripe).
BLOCK_BYTES: Final = 2**23

#: Rows of a block of entries that are products of features (a choice: features of the columns are read once for them).
ROWS_AT_ONCE: Final = 4096


@dataclass(frozen=True)
class Block:
    """Some entries.

    Attributes:
        rows: of the kernel.
        columns: of the kernel.
        values: (rows, columns), float32 or float64, valid until the next block is asked for.
    """

    rows: range
    columns: range
    values: NDArray[Any]

    @property
    def on_diagonal(self) -> bool:
        """Whether rows and columns are the same samples; otherwise no entry of the block is on the diagonal."""
        return self.rows == self.columns


class Entries(ABC):
    """Entries of a kernel, train rows first, handed out in blocks.

    Attributes:
        shape: (rows, columns); the first ``columns`` rows are the train square, which is symmetric.
        dtype: float32 or float64.
    """

    shape: tuple[int, int]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        """Rows of the train square."""
        return self.shape[1]

    @property
    @abstractmethod
    def buffer_bytes(self) -> int:
        """Memory that is held while blocks are handed out."""

    @property
    def bytes_read(self) -> int:
        """Bytes read from disk so far, where that is known."""
        return 0

    @abstractmethod
    def blocks(self, rows: range, *, lower: bool = False, columns: range | None = None) -> Iterator[Block]:
        """Entries of some rows, each once.

        Args:
            rows: a range of rows.
            columns: a range of columns; None for all.
            lower: of the train square, only what is on or below the diagonal; blocks on it are square, so that they
                hold what is above it as well.

        Yields:
            Blocks, those of the same rows one after another.

        Raises:
            DamagedFileError: if a tile is not what was committed. What was yielded must then be dropped.
            TransientStorageError: if a tile was misread once; the same must then be dropped.
        """

    @abstractmethod
    def rows(self, index: NDArray[np.int64]) -> NDArray[np.float64]:
        """Whole rows by their numbers, (rows, columns) float64."""

    def region(self, rows: range, columns: range) -> NDArray[Any]:
        """Some rows and columns, float32 or float64; of tiles on disk without a look at their checksums."""
        return self.rows(np.arange(rows.start, rows.stop))[:, columns.start : columns.stop]

    @property
    def tiling(self) -> tuple[object, ...] | None:
        """What kernels share whose blocks have the same rows and columns; None where entries are in no tiles."""
        return None

    @abstractmethod
    def diagonal(self) -> NDArray[np.float64]:
        """Diagonal of the train square, (columns,) float64."""


class TileEntries(Entries):
    """Entries in tiles on disk: read ahead by a thread, each tile checked the first time it is read."""

    def __init__(
        self,
        where: Files | Path,
        name: str,
        array: zarr.Array[Any],
        records: Mapping[str, FileRecord] | None,
        layer: tuple[int, ...] = (),
    ) -> None:
        """Open an array of tiles.

        Args:
            where: the files of the run.
            name: name of the array among them.
            array: the array as Zarr sees it.
            records: committed files by path; None where no checksums are kept.
            layer: coordinates of the tiles along axes before the last two.
        """
        files = files_of(where)
        self._tiles = TileArray(files, name, array.shape, array.chunks, np.dtype(array.dtype).str)
        self._stripes = TileStripes(self._tiles, records, layer)
        self._rows = TileRows(files, name, layer)
        self.shape = (int(array.shape[-2]), int(array.shape[-1]))
        self.dtype = np.dtype(array.dtype)
        self._height, self._width = (int(edge) for edge in array.chunks[-2:])

    @property
    def buffer_bytes(self) -> int:
        """See :class:`Entries`."""
        return self._stripes.buffer_bytes

    @property
    def bytes_read(self) -> int:
        """See :class:`Entries`."""
        return self._stripes.bytes_read

    def blocks(self, rows: range, *, lower: bool = False, columns: range | None = None) -> Iterator[Block]:
        """See :meth:`Entries.blocks`."""
        columns = range(self.shape[1]) if columns is None else columns
        wanted = [
            (i, j)
            for i in range(rows.start // self._height, -(-rows.stop // self._height))
            for j in range(columns.start // self._width, -(-columns.stop // self._width))
            if not lower or j * self._width < min(rows.stop, (i + 1) * self._height)
        ]
        for stripe, values in self._stripes.read(wanted):
            top, left = stripe.tile[0] * self._height + stripe.start, stripe.tile[1] * self._width
            first, last = max(rows.start, top), min(rows.stop, top + len(values))
            if first >= last:
                continue
            begin, end = max(columns.start, left), min(columns.stop, left + values.shape[1])
            part = values[first - top : last - top, begin - left : end - left]
            yield from _split(range(first, last), begin, part, lower=lower)

    def rows(self, index: NDArray[np.int64]) -> NDArray[np.float64]:
        """See :meth:`Entries.rows`."""
        return self._rows[index].astype(np.float64)

    def region(self, rows: range, columns: range) -> NDArray[Any]:
        """See :meth:`Entries.region`."""
        return self._rows.region(rows, columns)

    @property
    def tiling(self) -> tuple[object, ...]:
        """See :attr:`Entries.tiling`."""
        return (*self.shape, self._height, self._width, self.dtype.itemsize)

    def diagonal(self) -> NDArray[np.float64]:
        """See :meth:`Entries.diagonal`."""
        return self._rows.diagonal(self.size)


class ArrayEntries(Entries):
    """Entries of anything that is indexed like an array: features whose products are entries, an array in memory."""

    def __init__(self, array: Any) -> None:
        """Take an array of two axes with ``shape``, ``dtype`` and slices."""
        self._array = array
        self.shape = (int(array.shape[0]), int(array.shape[1]))
        self.dtype = np.dtype(array.dtype)

    @property
    def buffer_bytes(self) -> int:
        """See :class:`Entries`."""
        rows, columns = self._steps()
        return 2 * 8 * rows * columns

    def _steps(self) -> tuple[int, int]:
        """Rows and columns of a block."""
        chunks = getattr(self._array, "chunks", None)
        if chunks:
            return int(chunks[0]), int(chunks[1])
        return max(1, BLOCK_BYTES // max(1, 8 * self.shape[1])), self.shape[1]

    def blocks(self, rows: range, *, lower: bool = False, columns: range | None = None) -> Iterator[Block]:
        """See :meth:`Entries.blocks`."""
        columns, (step, width) = range(self.shape[1]) if columns is None else columns, self._steps()
        for start in range(rows.start, rows.stop, step):
            part = range(start, min(start + step, rows.stop))
            last = min(part.stop, columns.stop) if lower else columns.stop
            for left in range(columns.start, last, width):
                found = self._array[part.start : part.stop, left : min(left + width, last)]
                yield from _split(part, left, np.asarray(found), lower=lower)

    def rows(self, index: NDArray[np.int64]) -> NDArray[np.float64]:
        """See :meth:`Entries.rows`."""
        rows = self._array[index] if isinstance(self._array, np.ndarray) else self._array[index, :]
        return np.asarray(rows, dtype=np.float64)

    def region(self, rows: range, columns: range) -> NDArray[Any]:
        """See :meth:`Entries.region`."""
        return np.asarray(self._array[_slice(rows), _slice(columns)])

    def diagonal(self) -> NDArray[np.float64]:
        """See :meth:`Entries.diagonal`."""
        if isinstance(self._array, np.ndarray):
            return np.asarray(self._array.diagonal()[: self.size], dtype=np.float64)
        parts = []
        for start in range(0, self.size, 1024):
            stop = min(start + 1024, self.size)
            parts.append(np.asarray(self._array[start:stop, start:stop], dtype=np.float64).diagonal())
        return np.concatenate(parts)


class FeatureEntries(ArrayEntries):
    """Entries as products of features; the kernel times vectors is ``Φ (Φᵀ X)``, and no entry is formed."""

    def __init__(self, features: Features) -> None:
        """Take the features of train and test samples."""
        super().__init__(features.kernel())
        self.features, self.dtype = features, np.dtype(np.float64)
        self._scale: NDArray[np.float64] | None = None

    @property
    def buffer_bytes(self) -> int:
        """See :class:`Entries`: a block twice, and the features of its rows and columns, read and in float64."""
        features, (rows, columns) = self.features, self._steps()
        return 3 * BLOCK_BYTES + 5 * 8 * (rows + columns) * features.outputs * features.dim

    def _steps(self) -> tuple[int, int]:
        """Samples along both sides of a block: few columns of many rows, so that features are read rarely."""
        entries, panel = self.features.entries, len(next(self.features.panels()))
        rows = max(1, min(panel, ROWS_AT_ONCE // entries))
        return rows, max(1, min(panel, BLOCK_BYTES // (8 * rows * entries) // entries))

    @property
    def product_bytes(self) -> int:
        """Bytes of features that are read for one product with the train square."""
        features = self.features
        itemsize = np.dtype(features.array.dtype).itemsize
        return int(2 * features.train_samples * features.outputs * features.dim * itemsize)

    def diagonal(self) -> NDArray[np.float64]:
        """See :meth:`Entries.diagonal`."""
        found = self.features.diagonal()[: self.size]
        return np.where(found > 0, 1.0, 0.0) if self.features.cosine else found

    def blocks(self, rows: range, *, lower: bool = False, columns: range | None = None) -> Iterator[Block]:
        """See :meth:`Entries.blocks`. Products of features are formed in float64, as :meth:`product` does."""
        columns = range(self.shape[1]) if columns is None else columns
        height, width = self._steps()
        for left, values in self._panels(rows, height):
            part = range(left, left + len(values))
            stop = min(columns.stop, part.stop) if lower else columns.stop
            for first, right in self._panels(range(columns.start, max(columns.start, stop)), width):
                found = (values @ right.T).numpy()
                found *= self._row_scale()[part.start : part.stop, None]
                found *= self._row_scale()[first : first + len(right)]
                yield from _split(part, first, found, lower=lower)

    def rows(self, index: NDArray[np.int64]) -> NDArray[np.float64]:
        """See :meth:`Entries.rows`."""
        features = self.features
        samples, place = np.unique(index // features.entries, return_inverse=True)
        chosen = self._wide(features.read(samples)).view(len(samples), features.entries, -1)
        left = chosen[torch.from_numpy(place), torch.from_numpy(index % features.entries)]
        found = np.empty((len(index), self.size))
        for first, right in self._panels(range(self.size)):
            found[:, first : first + len(right)] = (left @ right.T).numpy()
        found *= self._row_scale()[index, None]
        found *= self._row_scale()[: self.size]
        return found

    def region(self, rows: range, columns: range) -> NDArray[np.float64]:
        """See :meth:`Entries.region`."""
        found = np.empty((len(rows), len(columns)))
        for block in self.blocks(rows, columns=columns):
            top, left = block.rows.start - rows.start, block.columns.start - columns.start
            found[top : top + len(block.rows), left : left + len(block.columns)] = block.values
        return found

    def _wide(self, values: NDArray[Any]) -> torch.Tensor:
        """Features of some samples in float64, (kernel rows, what is multiplied)."""
        width = self.features.dim if self.features.full else self.features.dim * self.features.outputs
        return torch.from_numpy(values.reshape(-1, width)).double()

    def _panels(self, rows: range, samples_at_once: int | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """Features of a range of kernel rows, some at a time: the first row, and (rows, width) float64."""
        entries, step = self.features.entries, samples_at_once or len(next(self.features.panels()))
        samples = range(rows.start // entries, -(-rows.stop // entries))
        for start in range(samples.start, samples.stop, step):
            part = range(start, min(start + step, samples.stop))
            first, last = max(rows.start, part.start * entries), min(rows.stop, part.stop * entries)
            values = self._wide(self.features.read(part))
            yield first, values[first - part.start * entries : last - part.start * entries]

    def product(self, rows: range, vectors: NDArray[np.float64], device: str) -> NDArray[np.float64]:
        """Some rows of the kernel times vectors, by two sweeps over the features."""
        scale = self._row_scale()
        given = torch.from_numpy(np.ascontiguousarray(vectors * scale[: self.size, None])).to(device)
        inner: torch.Tensor | None = None
        for first, values in self._panels(range(self.size)):
            part = values.to(device).T @ given[first : first + len(values)]
            inner = part if inner is None else inner.add_(part)
        assert inner is not None
        found = np.empty((len(rows), given.shape[1]))
        for first, values in self._panels(rows):
            top = first - rows.start
            found[top : top + len(values)] = (values.to(device) @ inner).cpu().numpy()
        found *= scale[rows.start : rows.stop, None]
        return found

    def _row_scale(self) -> NDArray[np.float64]:
        """What rows and columns of the kernel are multiplied with: the divisor, or the roots of the diagonal."""
        if self._scale is None:
            features = self.features
            if features.cosine:
                norms = features.diagonal() * features.divisor
                self._scale = np.divide(1.0, np.sqrt(norms), out=np.zeros_like(norms), where=norms > 0)
            else:
                self._scale = np.full(self.shape[0], features.divisor**-0.5)
        return self._scale


class ViewEntries(Entries):
    """A kernel seen centred, or divided by the roots of its diagonal; computed block by block, nothing is copied.

    ``s_i K_ij s_j − m_i − c_j + g``: m the mean of a (scaled) row over the train columns, c
    of a train column, g of all.
    """

    def __init__(self, base: Entries, scale: NDArray[np.float64] | None, means: NDArray[np.float64] | None) -> None:
        """View entries.

        Args:
            base: the entries.
            scale: (rows,) what rows, and columns likewise, are multiplied with; None for nothing.
            means: (rows,) mean of every scaled row over the train columns; None leaves the kernel uncentred.
        """
        self.base, self.scale, self.means = base, scale, means
        self.shape, self.dtype = base.shape, np.dtype(np.float64)
        self._grand = 0.0 if means is None else float(means[: self.size].mean())

    @property
    def buffer_bytes(self) -> int:
        """See :class:`Entries`."""
        return 3 * self.base.buffer_bytes

    @property
    def bytes_read(self) -> int:
        """See :class:`Entries`."""
        return self.base.bytes_read

    def blocks(self, rows: range, *, lower: bool = False, columns: range | None = None) -> Iterator[Block]:
        """See :meth:`Entries.blocks`."""
        for block in self.base.blocks(rows, lower=lower, columns=columns):
            found = self._seen(block.values, _slice(block.rows), _slice(block.columns))
            yield Block(block.rows, block.columns, found)

    def rows(self, index: NDArray[np.int64]) -> NDArray[np.float64]:
        """See :meth:`Entries.rows`."""
        return self._seen(self.base.rows(index), index, slice(0, self.size))

    def region(self, rows: range, columns: range) -> NDArray[np.float64]:
        """See :meth:`Entries.region`."""
        return self._seen(self.base.region(rows, columns), _slice(rows), _slice(columns))

    @property
    def tiling(self) -> tuple[object, ...] | None:
        """See :attr:`Entries.tiling`."""
        return self.base.tiling

    def diagonal(self) -> NDArray[np.float64]:
        """See :meth:`Entries.diagonal`."""
        found = self.base.diagonal()
        if self.scale is not None:
            found = found * self.scale[: self.size] ** 2
        return found if self.means is None else found - 2 * self.means[: self.size] + self._grand

    def _seen(self, values: NDArray[Any], rows: Any, columns: slice) -> NDArray[np.float64]:
        found = values.astype(np.float64)
        if self.scale is not None:
            found *= self.scale[rows, None]
            found *= self.scale[columns]
        if self.means is not None:
            found -= self.means[rows, None]
            found -= self.means[columns] - self._grand
        return found


def _split(rows: range, left: int, values: NDArray[Any], *, lower: bool) -> Iterator[Block]:
    """Blocks of a stripe; of the lower triangle what is below the diagonal, and a square on it.

    Args:
        rows: of the stripe.
        left: its first column.
        values: (rows, columns) its entries.
        lower: whether only the lower triangle is wanted.
    """
    right = left + values.shape[1]
    if not lower:
        yield Block(rows, range(left, right), values)
        return
    below = min(right, rows.start)
    if below > left:
        yield Block(rows, range(left, below), values[:, : below - left])
    first, last = max(rows.start, left), min(rows.stop, right)
    if first >= last:
        return
    # Rows of the stripe above the square that begins at its first column hold nothing of the lower triangle.
    square = values[first - rows.start : last - rows.start, first - left : last - left]
    yield Block(range(first, last), range(first, last), square)
    if last < rows.stop:  # the tile ends left of the last rows
        yield Block(range(last, rows.stop), range(first, last), values[last - rows.start :, first - left : last - left])


def _slice(numbers: range) -> slice:
    return slice(numbers.start, numbers.stop)
