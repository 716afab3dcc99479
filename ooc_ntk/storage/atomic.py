"""Files that are either whole or not there: written aside, synced, renamed; with size and checksum."""

from __future__ import annotations

import os
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import google_crc32c

from ooc_ntk.errors import TransientStorageError

from . import retries
from .retries import UNWRITTEN, note_retry, retried, storage_error

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Mark of files that are being written; whatever bears it after a crash is swept away.
TEMPORARY: Final = ".tmp-"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What is known of a file that a task wrote.

    Attributes:
        path: relative to the run directory, with ``/``.
        size: bytes.
        crc32c: CRC-32C (Castagnoli) of the content.
    """

    path: str
    size: int
    crc32c: int


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def raw_bytes(data: NDArray[np.generic]) -> NDArray[np.uint8]:
    """The bytes of a C-contiguous array, without a copy."""
    return data.reshape(-1).view("u1")


class StagedFile:
    """A file written aside, front to back, that appears under its name only when published.

    Use: ``append`` any number of times, ``seal`` (sync), ``publish`` (rename), or ``discard``.
    """

    def __init__(self, root: Path, path: str) -> None:
        """Open a temporary file beside ``root / path``, making folders as needed.

        Raises:
            StorageError: if it cannot be made.
        """
        self.path = path
        self._final = root / path
        self._temporary = self._final.with_name(f"{self._final.name}{TEMPORARY}{uuid.uuid4().hex[:8]}")
        self.size = 0
        self._crc = 0
        try:
            self._final.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise storage_error("creating", self._final, error) from error

    def append(self, data: NDArray[np.generic]) -> None:
        """Write the bytes of a C-contiguous array at the end.

        Raises:
            StorageError: if the disk is full or the write fails.
        """
        raw = raw_bytes(data)
        view = raw.data
        try:
            while view:
                rest = view
                done = retried(lambda: os.write(self._descriptor, rest), "writing", self._final, UNWRITTEN)  # noqa: B023
                view = view[done:]
        except OSError as error:
            raise storage_error("writing", self._final, error) from error
        self._crc = google_crc32c.extend(self._crc, raw)
        self.size += raw.nbytes

    @property
    def crc32c(self) -> int:
        """CRC-32C of what was written so far."""
        return int(self._crc)

    def seal(self) -> FileRecord:
        """Sync and close the temporary file; once that is done, only say what it is.

        Returns:
            What the published file will be.

        Raises:
            StorageError: if syncing fails. What the system had not written yet may be lost then: write it all again.
        """
        if self._descriptor < 0:
            return FileRecord(self.path, self.size, self._crc)
        descriptor, self._descriptor = self._descriptor, -1
        try:
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise storage_error("syncing", self._final, error) from error
        return FileRecord(self.path, self.size, self._crc)

    def publish(self) -> None:
        """Rename to the final name, replacing what is there, and make that durable."""
        try:
            self._temporary.replace(self._final)
            sync_folder(self._final.parent)
        except OSError as error:
            raise storage_error("publishing", self._final, error) from error

    def discard(self) -> None:
        """Close and delete the temporary file."""
        descriptor, self._descriptor = self._descriptor, -1
        with suppress(OSError):
            if descriptor >= 0:
                os.close(descriptor)
        with suppress(OSError):
            self._temporary.unlink()


def write_whole(root: Path, path: str, data: bytes) -> FileRecord:
    """Write a small file atomically and durably.

    Args:
        root: run directory.
        path: relative path.
        data: content.

    Returns:
        Its record.
    """
    for number, delay in enumerate(retries.CALL_DELAYS, start=1):
        try:
            return _write_once(root, path, data)
        except TransientStorageError as error:
            note_retry(f"writing {root / path}", error, number, delay)
        time.sleep(delay)
    return _write_once(root, path, data)


def _write_once(root: Path, path: str, data: bytes) -> FileRecord:
    import numpy as np  # heavy, and not needed to see that a run is done

    staged = StagedFile(root, path)
    try:
        staged.append(np.frombuffer(data, dtype=np.uint8))
        record = staged.seal()
        staged.publish()
    except BaseException:
        staged.discard()
        raise
    return record
