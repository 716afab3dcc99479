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
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

import google_crc32c
import numpy as np
import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import S3Store

from ooc_ntk.errors import StorageError, TransientStorageError

from . import retries
from .atomic import FileRecord
from .files import Files
from .objecterrors import object_error
from .objectreads import READS_AT_ONCE, ObjectMatrix, ObjectReader, OpenObject, pool
from .objectwrites import StagedObject
from .reading import PIECE_BYTES, Reader
from .retries import note_retry

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
        file, window = self.open(path), READS_AT_ONCE * PIECE_BYTES
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
        buffer, file = np.empty(READS_AT_ONCE * PIECE_BYTES, dtype=np.uint8), self.open(path)
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
        return dict(zip(paths, pool().map(self.stamp, paths), strict=True))

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

        found = zip(paths, pool().map(known, paths), strict=True)
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
    tag = str(meta.get("e_tag") or meta["last_modified"].isoformat())
    return f"{meta['size']}:" + tag.strip('"')  # listings of some stores leave the quotes out
