"""Zarr arrays whose chunk is one tile: raw little-endian files that any Zarr reads and the engine writes itself."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import zarr
from numpy.typing import NDArray

from ooc_ntk.errors import DamagedFileError, StorageError
from ooc_ntk.planning.memory import STRIPE_BYTES
from ooc_ntk.planning.tiles import Range

from .atomic import FileRecord
from .checked import read_stripes
from .files import Files, Staged
from .local import files_of
from .retries import storage_error

#: What a missing tile reads as where the dtype has no NaN: bf16's NaN as bits, and no token.
_MISSING: Final = {"<u2": 0x7FC0, "<i4": -1}


@dataclass(frozen=True)
class TileArray:
    """A Zarr v3 array without codec: chunk == tile, C order, missing tiles read as NaN.

    Attributes:
        files: the files of the run; a path is its folder.
        name: name of the array among them.
        shape: shape of the array.
        chunks: shape of one tile; edge tiles are padded to it.
        dtype: little-endian NumPy dtype string.
    """

    files: Files
    name: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        """Take a folder by its path."""
        object.__setattr__(self, "files", files_of(self.files))

    def create(self, attributes: Mapping[str, Any] | None = None) -> None:
        """Write the array's metadata; tiles that are there already stay.

        Raises:
            StorageError: if an array of another shape, tile or dtype is there.
        """
        place, metadata = self.files.place(self.name), f"{self.name}/zarr.json"
        there = None
        try:
            self.files.read_text(metadata)
        except StorageError:  # of an object store that cannot be used
            raise
        except OSError:
            pass  # metadata that cannot be read are written anew
        else:
            with suppress(StorageError):
                there = self.open()
        if there is not None:
            if (there.shape, there.chunks, there.dtype.str) != (self.shape, self.chunks, self.dtype):
                raise StorageError(
                    f"{place} holds an array of {there.shape} in tiles of {there.chunks} ({there.dtype}), "
                    f"expected {self.shape} in {self.chunks} ({self.dtype}); use another run directory"
                )
            return
        try:
            self.files.delete(metadata)
            self._write_metadata(attributes or {})
        except StorageError:
            raise
        except OSError as error:
            raise storage_error("creating", place, error) from error

    def _write_metadata(self, attributes: Mapping[str, Any]) -> None:
        zarr.create_array(
            store=self.files.zarr_store(),
            name=self.name,
            shape=self.shape,
            chunks=self.chunks,
            dtype=self.dtype,
            fill_value=_MISSING.get(self.dtype, float("nan")),
            compressors=None,
            filters=None,
            attributes=dict(attributes),
            config={"write_empty_chunks": True},
        )

    def open(self) -> zarr.Array[Any]:
        """Open the array read-only with Zarr.

        Raises:
            StorageError: if it is not there or cannot be read.
        """
        try:
            self.files.read_text(f"{self.name}/zarr.json")  # which says what is wrong, where Zarr might not
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", category=UserWarning)
                return zarr.open_array(self.files.zarr_store(read_only=True), path=self.name, mode="r", zarr_format=3)
        except (FileNotFoundError, KeyError, ValueError) as error:
            raise StorageError(f"there is no array {self.name} in {self.files.place('')}: {error}") from error
        except StorageError:
            raise
        except OSError as error:
            raise storage_error("reading", self.files.place(self.name), error) from error

    def chunk_path(self, coordinates: Sequence[int]) -> str:
        """Path of one tile relative to the run directory."""
        return "/".join((self.name, "c", *(str(index) for index in coordinates)))

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one tile file."""
        return int(np.prod(self.chunks, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    def empty_chunk(self) -> NDArray[np.generic]:
        """A buffer of one tile, uninitialised."""
        return np.empty(self.chunks, dtype=self.dtype)

    @property
    def stripe_rows(self) -> int:
        """Rows of a tile that are read or written at once."""
        return max(1, STRIPE_BYTES // (self.chunks[-1] * np.dtype(self.dtype).itemsize))

    def stage(
        self,
        path: str,
        values: NDArray[Any],
        fill: float = np.nan,
        check: Callable[[], None] = lambda: None,
    ) -> Staged:
        """Write a tile as one padded chunk, stripe by stripe.

        Args:
            path: where it will be, relative to the run directory.
            values: (rows, columns), no more than the tile has.
            fill: what the rest of the chunk is filled with.
            check: called before every stripe; what it raises ends the writing.

        Returns:
            The file, complete and not yet published.

        Raises:
            StorageError: if it cannot be written.
        """
        file = self.files.stage(path)
        step, (height, width) = self.stripe_rows, self.chunks[-2:]
        try:
            stripe = np.empty((step, width), dtype=self.dtype)
            for start in range(0, height, step):
                check()
                count = min(step, height - start)
                part = values[start : start + count]
                stripe[:] = fill
                stripe[: part.shape[0], : part.shape[1]] = part
                file.append(stripe[:count])
        except BaseException:
            file.discard()
            raise
        return file

    def read_region(
        self, records: Mapping[str, FileRecord], rows: Range, columns: Range, layer: tuple[int, ...] = ()
    ) -> tuple[NDArray[Any], int]:
        """Read entries from the committed chunks that hold them, each checked against its checksum.

        Args:
            records: committed files by path.
            rows: rows wanted, of the last axis but one.
            columns: columns wanted, of the last axis.
            layer: coordinates of the chunks along the axes before these.

        Returns:
            (rows, columns) in the array's dtype, and the bytes read.

        Raises:
            DamagedFileError: if a chunk is missing or is not what was committed.
        """
        found = np.empty((len(rows), len(columns)), dtype=self.dtype)
        height, width = self.chunks[-2:]
        stripe, read = np.empty((self.stripe_rows, width), dtype=self.dtype), 0
        for i in range(rows.start // height, -(-rows.stop // height)):
            for j in range(columns.start // width, -(-columns.stop // width)):
                path = self.chunk_path((*layer, i, j))
                if path not in records:
                    raise DamagedFileError(path, f"{self.files.place(path)} was never committed; run again")
                left, right = max(columns.start, j * width), min(columns.stop, (j + 1) * width)
                position = i * height
                for part in read_stripes(self.files, records[path], stripe):
                    first, last = max(rows.start, position), min(rows.stop, position + len(part))
                    if first < last:
                        target = found[first - rows.start : last - rows.start]
                        target[:, left - columns.start : right - columns.start] = part[
                            first - position : last - position, left - j * width : right - j * width
                        ]
                    position += len(part)
                read += records[path].size
        return found, read


def add_attributes(where: Files | Path, name: str, attributes: Mapping[str, Any]) -> None:
    """Add attributes to an array that is there, whole or not at all.

    Raises:
        StorageError: if its metadata cannot be read or written.
    """
    files, path = files_of(where), f"{name}/zarr.json"
    try:
        metadata = json.loads(files.read_text(path))
    except StorageError:
        raise
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot read {files.place(path)}: {error}") from error
    before = metadata.setdefault("attributes", {})
    if any(before.get(key) != value for key, value in attributes.items()):
        before.update(attributes)
        files.write_whole(path, (json.dumps(metadata, indent=2) + "\n").encode())


def open_tile_array(where: Files | Path, name: str) -> zarr.Array[Any]:
    """Open any array of a run read-only.

    Raises:
        StorageError: if it is not there.
    """
    return TileArray(files_of(where), name, (), (), "<f4").open()


class TileRows:
    """Rows of a two-dimensional array of tiles, read from the raw chunk files without the rest of their chunks.

    Attributes:
        shape: (rows, columns).
        dtype: of the elements.
    """

    def __init__(self, where: Files | Path, name: str, layer: tuple[int, ...] = ()) -> None:
        """Open an array.

        Args:
            where: the files of the run.
            name: name of the array among them.
            layer: coordinates of the tiles along axes before the last two.

        Raises:
            StorageError: if it is not there.
        """
        files = files_of(where)
        array = open_tile_array(files, name)
        self.attributes: Mapping[str, Any] = dict(array.attrs)
        self.shape: tuple[int, int] = (array.shape[-2], array.shape[-1])
        self.dtype = np.dtype(array.dtype)
        self._tiles, self._layer = TileArray(files, name, array.shape, array.chunks, self.dtype.str), layer

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """All rows in memory."""
        if copy is False:
            raise ValueError("rows on disk cannot become an array without a copy")
        return np.asarray(self[:], dtype=dtype)

    def __getitem__(self, index: Any) -> NDArray[Any]:
        """Some rows, (rows, columns), by a slice, numbers or a mask; of a single number (columns,).

        Raises:
            IndexError: for numbers out of range.
            StorageError: if a tile is missing or cannot be read.
        """
        numbers = index_numbers(index, self.shape[0])
        found = np.empty((len(numbers), self.shape[1]), dtype=self.dtype)
        height, width = self._tiles.chunks[-2:]
        for tile in np.unique(numbers // height):
            here = numbers // height == tile
            for number in range(-(-self.shape[1] // width)):
                chunk = self._mapped(int(tile), number)
                columns = slice(number * width, min((number + 1) * width, self.shape[1]))
                found[here, columns] = chunk[numbers[here] - tile * height, : columns.stop - columns.start]
        return found if isinstance(index, slice) or np.ndim(index) else found[0]

    def region(self, rows: range, columns: range) -> NDArray[Any]:
        """Some rows and columns, (rows, columns).

        Raises:
            StorageError: if a tile is missing or cannot be read.
        """
        found = np.empty((len(rows), len(columns)), dtype=self.dtype)
        height, width = self._tiles.chunks[-2:]
        for row in range(rows.start // height, -(-rows.stop // height)):
            top, bottom = max(rows.start, row * height), min(rows.stop, (row + 1) * height)
            for column in range(columns.start // width, -(-columns.stop // width)):
                left, right = max(columns.start, column * width), min(columns.stop, (column + 1) * width)
                found[top - rows.start : bottom - rows.start, left - columns.start : right - columns.start] = (
                    self._mapped(row, column)[
                        top - row * height : bottom - row * height, left - column * width : right - column * width
                    ]
                )
        return found

    def diagonal(self, count: int) -> NDArray[np.float64]:
        """The first entries of the diagonal, (count,) float64; of tiles as high as wide.

        Raises:
            StorageError: if a tile is missing or cannot be read.
        """
        height = self._tiles.chunks[-2]
        parts = [
            self._mapped(tile, tile).diagonal()[: count - tile * height].astype(np.float64)
            for tile in range(-(-count // height))
        ]
        return np.concatenate(parts) if parts else np.empty(0)

    def _mapped(self, row: int, column: int) -> Any:
        """One tile, of which only what is used is read."""
        height, width = self._tiles.chunks[-2:]
        path = self._tiles.chunk_path((*self._layer, row, column))
        return self._tiles.files.matrix(path, self.dtype, (height, width))


def index_numbers(index: Any, size: int) -> NDArray[np.int64]:
    """An index along one axis as numbers.

    Args:
        index: a number, a slice, a list or a mask.
        size: length of the axis.

    Raises:
        IndexError: for numbers out of range.
    """
    if isinstance(index, slice):
        return np.arange(*index.indices(size), dtype=np.int64)
    found = np.atleast_1d(np.asarray(index))
    if found.dtype == bool:
        if found.shape != (size,):
            raise IndexError(f"a mask along this axis has {size} entries, got {found.shape}")
        return np.flatnonzero(found)
    if found.size and not np.issubdtype(found.dtype, np.integer):
        raise IndexError(f"indices are whole numbers, slices or masks, got {index!r}")
    found = found.astype(np.int64).reshape(-1)
    if found.size and (found.min() < -size or found.max() >= size):
        wrong = found[(found < -size) | (found >= size)]
        raise IndexError(f"index {int(wrong[0])} is out of range for {size} rows")
    return np.where(found < 0, found + size, found)
