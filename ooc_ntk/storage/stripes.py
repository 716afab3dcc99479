"""Tiles of an array on disk, streamed in stripes of whole rows: read ahead by a thread, each tile checked once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from ooc_ntk.errors import StorageError

from .ahead import ReadAhead
from .arrays import TileArray
from .atomic import FileRecord
from .checked import raise_if_misread
from .files import Files, Opened
from .reading import aligned_buffer, differs, missing
from .retries import storage_error

#: Bytes of one stripe. (Measured: between 2 and 16 MiB products with a few columns take the same time.)
STRIPE_BYTES: Final = 2**22

#: Stripes that are held at once: one that is multiplied, the others read meanwhile. (A choice.)
STRIPES_AHEAD: Final = 4


@dataclass(frozen=True)
class Stripe:
    """Some whole rows of one tile.

    Attributes:
        tile: coordinates of the tile, of the last two axes.
        start: first row, within the tile.
        rows: number of rows.
    """

    tile: tuple[int, int]
    start: int
    rows: int


class TileStripes:
    """Reads tiles of a two-dimensional array, or of one layer of a three-dimensional one, stripe by stripe.

    Attributes:
        bytes_read: bytes that were read so far.
    """

    def __init__(self, tiles: TileArray, records: Mapping[str, FileRecord] | None, layer: tuple[int, ...] = ()) -> None:
        """Name the tiles; nothing is read.

        Args:
            tiles: the array.
            records: committed files by path, against which every tile is checked the first time it is read; None where
                no checksums are kept.
            layer: coordinates of the tiles along the axes before the last two.
        """
        self._tiles, self._records, self._layer = tiles, records, layer
        self._checked: set[str] = set()
        self.bytes_read = 0

    @property
    def buffer_bytes(self) -> int:
        """Memory of the buffers while tiles are read."""
        return STRIPES_AHEAD * self._rows * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        return self._tiles.chunks[-1] * np.dtype(self._tiles.dtype).itemsize

    @property
    def _rows(self) -> int:
        """Rows of a stripe."""
        return min(self._tiles.chunks[-2], max(1, STRIPE_BYTES // self._row_bytes))

    def read(self, wanted: Sequence[tuple[int, int]]) -> Iterator[tuple[Stripe, NDArray[Any]]]:
        """Tiles in order, in stripes.

        Args:
            wanted: coordinates of the tiles.

        Yields:
            A stripe and its entries, (rows, columns of a tile) in the array's dtype; the padding of tiles at the edge
            of the array is cut off. Valid until the next one is asked for.

        Raises:
            DamagedFileError: if a tile is missing or is not what was committed. What was yielded must then be dropped.
            TransientStorageError: if it was misread, but is whole when read again; the same must then be dropped.
            StorageError: if a file cannot be read.
        """
        stripes = [stripe for tile in wanted for stripe in self._stripes(tile)]
        if not stripes:
            return
        buffers = [aligned_buffer(self._rows * self._row_bytes) for _ in range(min(STRIPES_AHEAD, len(stripes)))]
        file = _OpenTile(self._tiles.files)
        try:
            with ReadAhead(stripes, lambda stripe, buffer: self._load(stripe, buffer, file), buffers) as ahead:
                for stripe in stripes:
                    values = ahead.take()
                    if values.size:
                        yield stripe, values
                    ahead.give_back(stripe)
        finally:
            file.close()

    def _stripes(self, tile: tuple[int, int]) -> Iterator[Stripe]:
        """Stripes of a tile; of one that is checked already without the rows of its padding."""
        height = self._tiles.chunks[-2]
        if self._path(tile) in self._checked or self._records is None:
            height = min(height, self._tiles.shape[-2] - tile[0] * height)
        for start in range(0, height, self._rows):
            yield Stripe(tile, start, min(self._rows, height - start))

    def _path(self, tile: tuple[int, int]) -> str:
        return self._tiles.chunk_path((*self._layer, *tile))

    def _load(self, stripe: Stripe, buffer: NDArray[np.uint8] | None, file: _OpenTile) -> NDArray[Any]:
        """Read one stripe; the last one of a tile that was never checked is yielded only if the tile is whole."""
        assert buffer is not None
        tiles, path = self._tiles, self._path(stripe.tile)
        record = None
        if self._records is not None and path not in self._checked:
            record = self._records.get(path)
            if record is None:
                raise missing(tiles.files.place(path), FileRecord(path, tiles.chunk_bytes, 0))
        where, raw = tiles.files.place(path), buffer[: stripe.rows * self._row_bytes]
        try:
            whole = file.read(path, stripe.start * self._row_bytes, raw, checked=record is not None)
            if not whole:
                raise differs(where, record or FileRecord(path, tiles.chunk_bytes, 0))
            self.bytes_read += raw.size
            if record is not None and stripe.start + stripe.rows == tiles.chunks[-2]:
                self._check(record, file.crc)
        except FileNotFoundError as error:
            raise missing(where, record or FileRecord(path, tiles.chunk_bytes, 0)) from error
        except StorageError:
            raise
        except OSError as error:
            raise storage_error("reading", where, error) from error
        values = raw.view(tiles.dtype).reshape(stripe.rows, tiles.chunks[-1])
        (height, width), (rows, columns) = tiles.chunks[-2:], tiles.shape[-2:]
        top = stripe.tile[0] * height + stripe.start
        return values[: max(0, rows - top), : min(width, columns - stripe.tile[1] * width)]

    def _check(self, record: FileRecord, crc: int) -> None:
        """Compare a tile that was read to its end with what was committed."""
        files = self._tiles.files
        if files.size(record.path) != record.size or crc != record.crc32c:
            raise_if_misread(files, record)
            raise differs(files.place(record.path), record)
        self._checked.add(record.path)


class _OpenTile:
    """The tile that is being read front to back, and the checksum of what was read of it."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._path = ""
        self._file: Opened | None = None
        self.crc = 0

    def read(self, path: str, offset: int, target: NDArray[np.uint8], *, checked: bool) -> bool:
        """Fill ``target`` from a place in a file; returns whether the file has that much."""
        if self._file is None or path != self._path or offset == 0:
            self.close()
            self._file, self._path, self.crc = self._files.open(path), path, 0
        done = 0
        while done < target.size:
            count = self._file.read_at(target[done:], offset + done)
            if not count:
                return False
            if checked:
                self.crc = google_crc32c.extend(self.crc, target[done : done + count])
            done += count
        return True

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
        self._file = None
