"""Objects read in pieces, by several requests at once: whole ones against their checksums, or some rows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import google_crc32c
import numpy as np
import obstore
from numpy.typing import NDArray
from obstore.exceptions import BaseError

from ooc_ntk.errors import StorageError

from .atomic import FileRecord, raw_bytes
from .reading import PIECE_BYTES, differs, missing
from .retries import note_retry

if TYPE_CHECKING:
    from .objects import ObjectFiles

#: Requests of this process that read at once (a choice: one request alone waits for the network).
READS_AT_ONCE: Final = 4

#: Least bytes of a request when a piece is read by several.
_LEAST_BYTES: Final = 2**19

#: Bytes between rows that are read along with them rather than asked for apart.
_GAP_BYTES: Final = 2**18


@lru_cache(maxsize=2)
def _pool_of(process: int) -> ThreadPoolExecutor:
    del process  # a child of this process has none of its threads
    return ThreadPoolExecutor(READS_AT_ONCE, thread_name_prefix="ooc-ntk-objects")


def pool() -> ThreadPoolExecutor:
    """The threads that ask a store several things at once."""
    return _pool_of(os.getpid())


class OpenObject:
    """An object that is read in pieces. See :class:`~ooc_ntk.storage.files.Opened`."""

    def __init__(self, files: ObjectFiles, path: str) -> None:
        """Name it."""
        self._files, self._path = files, path

    def read_at(self, target: NDArray[np.uint8], offset: int) -> int:
        """Read bytes into memory, by several requests at once; returns how many, 0 at the end of the object.

        Raises:
            FileNotFoundError: if it is not there.
            StorageError: if it cannot be read.
        """
        step = min(PIECE_BYTES, max(_LEAST_BYTES, -(-target.size // READS_AT_ONCE)))
        starts = range(0, target.size, step)
        if len(starts) < 2:
            return self.read_piece(target, offset)
        asked = [pool().submit(self.read_piece, target[at : at + step], offset + at) for at in starts]
        wait(asked)  # all of them, whatever becomes of one: the memory is the caller's again after this
        done = 0
        for one, start in zip(asked, starts, strict=True):
            count = one.result()
            if done == start:  # what comes after a short piece is past the end
                done += count
        return done

    def read_piece(self, target: NDArray[np.uint8], offset: int) -> int:
        """As :meth:`read_at`, by one request."""
        if not target.size:
            return 0

        def get() -> Any:
            try:
                return obstore.get_range(self._files.store, self._path, start=offset, length=target.size)
            except BaseError as error:
                if "status code: 416" in str(error):  # it ends before
                    return b""
                raise

        found = np.frombuffer(self._files.call("reading", self._path, get), dtype=np.uint8)
        target[: found.size] = found
        return int(found.size)

    def close(self) -> None:
        """Nothing is open."""


class ObjectReader:
    """Reads committed objects. See :class:`~ooc_ntk.storage.reading.Reader`."""

    def __init__(self, files: ObjectFiles) -> None:
        """Read from a store."""
        self._files = files

    def read(self, record: FileRecord, buffer: NDArray[np.uint8]) -> None:
        """See :meth:`Reader.read`. What differs is read once more before it is called damaged."""
        place = self._files.place(record.path)
        try:
            for attempt in range(2):
                if self._read_once(record, buffer):
                    return
                if not attempt:
                    note_retry(f"checking {place}", "it differs from its checksum", 1, 0.0)
        except FileNotFoundError as error:
            raise missing(place, record) from error
        raise differs(place, record)

    def _read_once(self, record: FileRecord, buffer: NDArray[np.uint8]) -> bool:
        """Read an object; returns whether it is what was committed."""
        if record.size > buffer.size or self._files.size(record.path) != record.size:
            return False
        file, crc, done = self._files.open(record.path), 0, 0
        while done < record.size:
            part = buffer[done : min(done + READS_AT_ONCE * PIECE_BYTES, record.size)]
            if file.read_at(part, done) < part.size:
                return False
            crc = google_crc32c.extend(crc, part)
            done += part.size
        return bool(crc == record.crc32c)


class ObjectMatrix:
    """A raw object as a matrix in C order, of which only the rows that are asked for are read."""

    def __init__(self, files: ObjectFiles, path: str, dtype: np.dtype[Any], shape: tuple[int, int]) -> None:
        """Name it; nothing is read."""
        self._files, self._path, self._dtype, self._shape = files, path, dtype, shape

    def __getitem__(self, index: tuple[slice | NDArray[np.int64], slice]) -> NDArray[Any]:
        """Some rows, by a slice or numbers, of some columns.

        Raises:
            StorageError: if they are missing or cannot be read.
        """
        rows, columns = index
        numbers = np.arange(*rows.indices(self._shape[0])) if isinstance(rows, slice) else rows
        wanted, place = np.unique(numbers, return_inverse=True)
        found = np.empty((len(wanted), len(range(*columns.indices(self._shape[1])))), dtype=self._dtype)
        for run in self._runs(wanted):
            first, last = int(wanted[run.start]), int(wanted[run.stop - 1]) + 1
            found[run] = self._rows(first, last)[wanted[run] - first, columns]
        return found[place]

    def diagonal(self) -> NDArray[Any]:
        """Its diagonal, by all of its rows, some at a time.

        Raises:
            StorageError: if they are missing or cannot be read.
        """
        size = min(self._shape)
        step = max(1, READS_AT_ONCE * PIECE_BYTES // self._row_bytes)
        parts = [self._rows(start, min(start + step, size)).diagonal(start) for start in range(0, size, step)]
        return np.concatenate(parts) if parts else np.empty(0, dtype=self._dtype)

    @property
    def _row_bytes(self) -> int:
        return self._shape[1] * self._dtype.itemsize

    def _runs(self, numbers: NDArray[np.int64]) -> Sequence[slice]:
        """Places of rows that are read together: those with little between them."""
        far = np.flatnonzero((np.diff(numbers) - 1) * self._row_bytes > _GAP_BYTES) + 1
        bounds = [0, *far.tolist(), len(numbers)] if len(numbers) else [0]
        return [slice(start, stop) for start, stop in pairwise(bounds)]

    def _rows(self, first: int, last: int) -> NDArray[Any]:
        found = np.empty((last - first, self._shape[1]), dtype=self._dtype)
        raw, place = raw_bytes(found), self._files.place(self._path)
        try:
            whole = self._files.open(self._path).read_at(raw, first * self._row_bytes) == raw.size
        except FileNotFoundError as error:
            raise StorageError(
                f"cannot read the tile {place}, it is missing; run again: it is computed anew"
            ) from error
        if not whole:
            raise StorageError(f"cannot read the tile {place}, it is too short; run again: it is computed anew")
        return found
