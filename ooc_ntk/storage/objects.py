"""Files of a run as objects of an S3-compatible store, through obstore.

An object appears whole or not at all, and there is no rename. So a file is gathered in a local scratch file, which
bounds the memory and can be sent again, and is uploaded when it is sealed: under its own name, since nobody looks at an
object before it is committed in the manifest. What a run that stopped has uploaded and not committed is written again,
with the same bits, by the same task; it is never deleted, as another worker may have finished that task.

Every call is tried again after errors that may pass: twice by obstore, within seconds, and all that as often as
:data:`~ooc_ntk.storage.retries.CALL_DELAYS` says. Credentials are read from the environment or the machine's profile
by obstore alone, and are in nothing that is kept or printed.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, Final, TypeVar

import google_crc32c
import numpy as np
import obstore
from numpy.typing import NDArray
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import S3Store

from ooc_ntk.errors import StorageError, TransientStorageError

from . import retries
from .atomic import TEMPORARY, FileRecord, raw_bytes
from .files import Files
from .objecterrors import object_error
from .reading import PIECE_BYTES, Reader, differs, missing
from .retries import note_retry, storage_error

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

#: Tries of obstore itself beside the first, and how long they may go on. (Choices: a part of a large object is sent
#: again by itself, and an endpoint that is down is noticed within seconds.)
_RETRIES: Final[Any] = {
    "max_retries": 2,
    "retry_timeout": timedelta(seconds=30),
    "backoff": {"init_backoff": timedelta(milliseconds=50), "max_backoff": timedelta(seconds=1), "base": 2},
}

#: Seconds for one request, of at most a part, unless the environment says otherwise. (Choices.)
_TIMEOUTS: Final = {"connect_timeout": "5s", "timeout": "120s"}

#: Options of the HTTP client that the environment may set, as AWS_ALLOW_HTTP=true.
_CLIENT: Final = (
    *("allow_http", "allow_invalid_certificates", "connect_timeout", "timeout", "pool_idle_timeout"),
    *("pool_max_idle_per_host", "proxy_url", "proxy_ca_certificate", "proxy_excludes", "user_agent"),
)

#: Bytes of one part of a large upload, how many are on their way at once, and how many S3 allows.
PART_BYTES: Final = 2**23
_PARTS_AT_ONCE: Final = 4
_MOST_PARTS: Final = 9_000

#: Requests of this process that read at once (a choice: one request of S3 takes 30 ms and some 80 MB/s).
_READS_AT_ONCE: Final = 4

#: Least bytes of a request when a piece is read by several.
_LEAST_BYTES: Final = 2**19

#: Bytes between rows that are read along with them rather than asked for apart.
_GAP_BYTES: Final = 2**18

#: From so many files on their stamps are found by listing the store, 1,000 a request, and not one by one.
_LISTED: Final = 100


class ObjectFiles(Files):
    """Objects below a prefix of a bucket. See :class:`Files`.

    Attributes:
        url: ``s3://bucket/prefix``.
    """

    def __init__(self, url: str, scratch: Callable[[], Path] | None = None) -> None:
        """Name the store; nothing is asked of it.

        Args:
            url: its URL, checked to carry no secret.
            scratch: gives the local folder for files until they are uploaded; None is that of :mod:`tempfile`.

        Raises:
            StorageError: if the environment holds settings that obstore does not take.
        """
        self.url, self._scratch = url, scratch
        client: Any = {**_TIMEOUTS}
        client |= {name: os.environ[f"AWS_{name.upper()}"] for name in _CLIENT if f"AWS_{name.upper()}" in os.environ}
        try:
            self.store = S3Store.from_url(url, client_options=client, retry_config=_RETRIES)
        except (BaseError, ValueError, TypeError) as error:
            reason = type(error).__name__
            failed = StorageError(f"cannot use {url} ({reason}); check the AWS_… settings of the environment")
        else:
            return
        raise failed

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectFiles) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __repr__(self) -> str:
        return f"ObjectFiles({self.url!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process reads its own environment."""
        return ObjectFiles, (self.url,)

    def call(self, action: str, path: str, work: Callable[[], Result]) -> Result:
        """Ask something of the store; again, a bounded number of times, after an error that may pass.

        Args:
            action: what it does, for messages.
            path: of the object.
            work: the call, which may be repeated.

        Raises:
            FileNotFoundError: if there is no such object.
            StorageError: if the call failed.
        """
        for number, delay in enumerate((*retries.CALL_DELAYS, None), start=1):
            try:
                return work()
            except (BaseError, FileNotFoundError) as error:
                failed = object_error(action, self.place(path), error)
            # Raised outside the handler: the error of obstore, which may quote what it was asked, goes no further.
            if delay is None or not isinstance(failed, TransientStorageError):
                raise failed
            note_retry(f"{action} {self.place(path)}", "the store does not answer", number, delay)
            time.sleep(delay)
        raise AssertionError

    def scratch(self) -> Path | None:
        """Local folder for files until they are uploaded."""
        return None if self._scratch is None else self._scratch()

    def place(self, path: str) -> str:
        """See :class:`Files`."""
        return f"{self.url}/{path}" if path else self.url

    def stage(self, path: str) -> StagedObject:
        """See :class:`Files`."""
        return StagedObject(self, path)

    def write_whole(self, path: str, data: bytes) -> FileRecord:
        """See :class:`Files`."""
        self.call("writing", path, lambda: obstore.put(self.store, path, data))
        return FileRecord(path, len(data), int(google_crc32c.value(data)))

    def write_new(self, path: str, data: bytes) -> bool:
        """See :class:`Files`."""

        def put() -> bool:
            try:
                obstore.put(self.store, path, data, mode="create")
            except AlreadyExistsError:
                return False
            return True

        return self.call("writing", path, put)

    def open(self, path: str) -> OpenObject:
        """See :class:`Files`; whether it is there is seen when it is read."""
        return OpenObject(self, path)

    def reader(self, *, direct: bool = False) -> Reader:  # noqa: ARG002 - there is no page cache
        """See :class:`Files`."""
        return ObjectReader(self)

    def read_bytes(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes of an object, as many as there are.

        Args:
            path: the object.
            start: first byte.
            stop: the byte after the last; None for all.

        Raises:
            FileNotFoundError: if it is not there.
            StorageError: if it cannot be read.
        """
        file, window = self.open(path), _READS_AT_ONCE * PIECE_BYTES
        parts: list[bytes] = []
        if stop is None:  # most are small: one request tells
            buffer = np.empty(PIECE_BYTES, dtype=np.uint8)
            count = file.read_piece(buffer, start)
            parts.append(buffer[:count].tobytes())
            if count < buffer.size:
                return parts[0]
            start += count
        while stop is None or start < stop:
            buffer = np.empty(window if stop is None else min(stop - start, window), dtype=np.uint8)
            count = file.read_at(buffer, start)
            parts.append(buffer[:count].tobytes())
            start += count
            if count < buffer.size:
                break
        return b"".join(parts)

    def read_text(self, path: str) -> str:
        """See :class:`Files`."""
        return self.read_bytes(path).decode()

    def head(self, path: str) -> dict[str, Any]:
        """What the store knows of an object.

        Raises:
            FileNotFoundError: if it is not there.
            StorageError: if the store cannot be asked.
        """
        return dict(self.call("looking at", path, lambda: obstore.head(self.store, path)))

    def forget(self, path: str) -> None:
        """See :class:`Files`: nothing is cached."""

    def size(self, path: str) -> int:
        """See :class:`Files`."""
        return int(self.head(path)["size"])

    def checksum(self, path: str) -> int:
        """See :class:`Files`."""
        buffer, file = np.empty(_READS_AT_ONCE * PIECE_BYTES, dtype=np.uint8), self.open(path)
        crc = done = 0
        while count := file.read_at(buffer, done):
            crc = google_crc32c.extend(crc, buffer[:count])
            done += count
            if count < buffer.size:
                break
        return int(crc)

    def stamp(self, path: str) -> str:
        """See :class:`Files`: its size and entity tag."""
        return _stamp(self.head(path))

    def stamps(self, paths: Collection[str]) -> dict[str, str]:
        """See :class:`Files`."""
        return dict(zip(paths, _pool().map(self.stamp, paths), strict=True))

    def known_stamps(self, paths: Collection[str]) -> dict[str, str]:
        """See :class:`Files`."""
        if len(paths) >= _LISTED:
            wanted = set(paths)
            return {meta["path"]: _stamp(meta) for meta in self.listed() if meta["path"] in wanted}

        def known(path: str) -> str | None:
            try:
                return self.stamp(path)
            except FileNotFoundError:
                return None

        found = zip(paths, _pool().map(known, paths), strict=True)
        return {path: stamp for path, stamp in found if stamp is not None}

    def listed(self, folder: str = "") -> list[dict[str, Any]]:
        """What the store knows of all objects below a path.

        Raises:
            StorageError: if they cannot be listed.
        """

        def metas() -> list[dict[str, Any]]:
            return [
                dict(meta) for batch in obstore.list(self.store, f"{folder}/" if folder else None) for meta in batch
            ]

        return self.call("listing", folder, metas)

    def matrix(self, path: str, dtype: np.dtype[Any], shape: tuple[int, int]) -> ObjectMatrix:
        """See :class:`Files`; rows are asked for when they are wanted."""
        return ObjectMatrix(self, path, dtype, shape)

    def delete(self, *paths: str) -> None:
        """See :class:`Files`."""
        try:
            if paths:
                with suppress(FileNotFoundError):
                    self.call("deleting", paths[0], lambda: obstore.delete(self.store, list(paths)))
        except StorageError as error:
            logger.warning("%s; it is left there", error)

    def delete_folder(self, path: str) -> None:
        """See :class:`Files`."""
        try:
            self.delete(*(meta["path"] for meta in self.listed(path)))
        except StorageError as error:
            logger.warning("%s; it is left there", error)

    def names(self, folder: str = "") -> list[str]:
        """See :class:`Files`."""
        prefix = f"{folder}/" if folder else None
        found = self.call("listing", folder, lambda: obstore.list_with_delimiter(self.store, prefix))
        below: Iterable[str] = [*found["common_prefixes"], *(meta["path"] for meta in found["objects"])]
        return sorted(name.rstrip("/").rpartition("/")[2] for name in below)

    def sweep(self) -> int:
        """See :class:`Files`: nothing that is being written has a name.

        Parts of uploads that were cut off stay hidden in the store, which has to be told to expire them.
        """
        return 0

    def size_bytes(self) -> int:
        """See :class:`Files`."""
        return sum(int(meta["size"]) for meta in self.listed())

    def free_bytes(self) -> None:
        """See :class:`Files`: no store says."""

    def zarr_store(self, *, read_only: bool = False) -> Any:
        """See :class:`Files`."""
        from .objectzarr import ZarrObjects  # it builds on this module

        return ZarrObjects(self, read_only=read_only)


def _stamp(meta: dict[str, Any]) -> str:
    """What changes when an object does: its size and its entity tag, or where there is none its time."""
    return f"{meta['size']}:{meta.get('e_tag') or meta['last_modified'].isoformat()}"


@lru_cache(maxsize=2)
def _pool_of(process: int) -> ThreadPoolExecutor:
    del process  # a child of this process has none of its threads
    return ThreadPoolExecutor(_READS_AT_ONCE, thread_name_prefix="ooc-ntk-objects")


def _pool() -> ThreadPoolExecutor:
    """The threads that ask a store several things at once."""
    return _pool_of(os.getpid())


class StagedObject:
    """An object that is gathered in a local file without a name, and uploaded when it is sealed."""

    def __init__(self, files: ObjectFiles, path: str) -> None:
        """Open the local file.

        Raises:
            StorageError: if it cannot be made.
        """
        self.path, self.size = path, 0
        self._files, self._crc, self._sealed = files, 0, False
        self._folder = files.scratch() or Path(tempfile.gettempdir())
        self._file: IO[bytes] | None = None
        try:
            self._file = tempfile.TemporaryFile(dir=self._folder, prefix=f"object{TEMPORARY}", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise storage_error("creating a file in", self._folder, error) from error

    @property
    def crc32c(self) -> int:
        """CRC-32C of what was written so far."""
        return int(self._crc)

    def append(self, data: NDArray[np.generic]) -> None:
        """Write the bytes of a C-contiguous array at the end.

        Raises:
            StorageError: if the local disk is full or fails.
        """
        assert self._file is not None
        raw = raw_bytes(data)
        view = raw.data
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            raise storage_error("writing into", self._folder / "a scratch file", error) from error
        self._crc = google_crc32c.extend(self._crc, raw)
        self.size += raw.nbytes

    def seal(self) -> FileRecord:
        """Upload it, whole or not at all; once that is done, only say what it is.

        Raises:
            StorageError: if that fails.
        """
        if not self._sealed:
            file, part = self._file, max(PART_BYTES, -(-self.size // _MOST_PARTS))
            assert file is not None

            def put() -> None:
                file.seek(0)
                obstore.put(self._files.store, self.path, file, chunk_size=part, max_concurrency=_PARTS_AT_ONCE)

            try:
                self._files.call("writing", self.path, put)
            except StorageError:
                raise
            except OSError as error:
                raise storage_error("uploading from", self._folder, error) from error
            self._sealed = True
            self.discard()
        return FileRecord(self.path, self.size, int(self._crc))

    def publish(self) -> None:
        """It is there already."""

    def discard(self) -> None:
        """Close the local file, which deletes it."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.close()


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
        step = min(PIECE_BYTES, max(_LEAST_BYTES, -(-target.size // _READS_AT_ONCE)))
        starts = range(0, target.size, step)
        if len(starts) < 2:
            return self.read_piece(target, offset)
        asked = [_pool().submit(self.read_piece, target[at : at + step], offset + at) for at in starts]
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
            part = buffer[done : min(done + _READS_AT_ONCE * PIECE_BYTES, record.size)]
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
        step = max(1, _READS_AT_ONCE * PIECE_BYTES // self._row_bytes)
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
