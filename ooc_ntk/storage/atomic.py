"""Files that are either whole or not there: written aside, synced, renamed; with size and checksum."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from ooc_ntk.errors import DamagedFileError, StorageError
from ooc_ntk.units import format_bytes

#: Mark of files that are being written; whatever bears it after a crash is swept away.
TEMPORARY: Final = ".tmp-"


@dataclass(frozen=True)
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


def storage_error(action: str, path: Path, error: OSError) -> StorageError:
    """Say what failed on which file, and what to do when the disk is full."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = "unknown"
        with suppress(OSError):
            stat = os.statvfs(path.parent)
            free = format_bytes(stat.f_bavail * stat.f_frsize)
        return StorageError(
            f"the disk is full: {action} {path} failed with {free} free; make room and run the same command again, "
            "finished tiles are kept"
        )
    return StorageError(f"{action} {path} failed: {error.strerror or error}")


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def raw_bytes(data: NDArray[np.generic]) -> NDArray[np.uint8]:
    """The bytes of a C-contiguous array, without a copy."""
    return data.reshape(-1).view(np.uint8)


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
        self._crc = google_crc32c.extend(self._crc, raw)
        self.size += raw.nbytes
        view = raw.data
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError as error:
            raise storage_error("writing", self._final, error) from error

    def seal(self) -> FileRecord:
        """Sync and close the temporary file; once that is done, only say what it is.

        Returns:
            What the published file will be.
        """
        if self._descriptor < 0:
            return FileRecord(self.path, self.size, self._crc)
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise storage_error("syncing", self._final, error) from error
        finally:
            os.close(self._descriptor)
            self._descriptor = -1
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
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
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
    staged = StagedFile(root, path)
    try:
        staged.append(np.frombuffer(data, dtype=np.uint8))
        record = staged.seal()
        staged.publish()
    except BaseException:
        staged.discard()
        raise
    return record


def read_stripes(root: Path, record: FileRecord, stripe: NDArray[np.generic]) -> Iterator[NDArray[np.generic]]:
    """Read a committed file front to back through one buffer, and check it at the end.

    Args:
        root: run directory.
        record: the file as it was committed.
        stripe: (rows, columns) buffer, overwritten by every stripe.

    Yields:
        The rows read, a view of ``stripe``; the last one may be shorter.

    Raises:
        DamagedFileError: if the file is missing or is not what was committed. What was yielded must then be dropped.
    """
    path, crc, done = root / record.path, 0, 0
    try:
        with path.open("rb", buffering=0) as file:
            while done < record.size:
                wanted = raw_bytes(stripe)[: record.size - done]
                count = 0
                while count < wanted.size and (more := file.readinto(wanted[count:].data)):
                    count += more
                if count < wanted.size:
                    break
                crc = google_crc32c.extend(crc, wanted)
                done += count
                yield stripe[: count // (stripe.shape[1] * stripe.itemsize)]
    except FileNotFoundError as error:
        raise DamagedFileError(record.path, f"{path} is missing; run again: it will be computed anew") from error
    except OSError as error:
        raise storage_error("reading", path, error) from error
    if done != record.size or crc != record.crc32c:
        raise DamagedFileError(record.path, f"{path} is not what was committed; run again: it will be computed anew")


def read_checked(root: Path, record: FileRecord, buffer: NDArray[np.generic]) -> None:
    """Fill a C-contiguous buffer with a committed file.

    Raises:
        DamagedFileError: if the file is missing or is not what was committed.
    """
    for _ in read_stripes(root, record, buffer.reshape(1, -1)):
        pass


def checksum_file(path: Path) -> int:
    """CRC-32C of a file, read in pieces of 4 MiB."""
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(2**22):
            crc = google_crc32c.extend(crc, piece)
    return int(crc)
