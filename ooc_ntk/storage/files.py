"""Where the files of a run lie: one set of calls, whether that is a folder or an object store.

A file is written aside, sealed, and appears under its name whole or not at all; it is read at an offset, or as a whole
against its checksum. :class:`LocalFiles` is a folder, on a disk or a shared file system; object stores are in
:mod:`~ooc_ntk.storage.objects`.
"""

from __future__ import annotations

import math
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from ooc_ntk.errors import StorageError, TransientStorageError

from .atomic import TEMPORARY, FileRecord, StagedFile, raw_bytes, write_whole
from .reading import (
    PIECE_BYTES,
    FileReader,
    Reader,
    checksum_file,
    differs,
    forget_pages,
    missing,
    open_for_reading,
    read_at,
)
from .retries import storage_error

#: Names of metadata that Zarr was writing (it renames them when they are whole).
_ZARR_TEMPORARY = "zarr.*.partial"


class Staged(Protocol):
    """A file that is being written, front to back, and that nobody sees before it is whole.

    Use: ``append`` any number of times, ``seal``, ``publish``, or ``discard``.

    Attributes:
        path: where it will be, relative to the run.
        size: bytes so far.
    """

    path: str
    size: int

    @property
    def crc32c(self) -> int:
        """CRC-32C of what was written so far."""

    def append(self, data: NDArray[np.generic]) -> None:
        """Write the bytes of a C-contiguous array at the end.

        Raises:
            StorageError: if they cannot be written.
        """

    def seal(self) -> FileRecord:
        """Make all of it durable; once that is done, only say what it is.

        Raises:
            StorageError: if that fails; it must be written again then.
        """

    def publish(self) -> None:
        """Have it appear under its name.

        Raises:
            StorageError: if that fails.
        """

    def discard(self) -> None:
        """Give it up."""


class Opened(Protocol):
    """A file that is open for reading."""

    def read_at(self, target: NDArray[np.uint8], offset: int) -> int:
        """Read bytes into memory; returns how many, 0 at the end of the file.

        Raises:
            OSError: if they cannot be read.
        """

    def close(self) -> None:
        """Close it."""


class Files(ABC):
    """The files of a run, by their paths relative to it, with ``/``."""

    @abstractmethod
    def place(self, path: str) -> str:
        """Where a file lies, as messages name it."""

    @abstractmethod
    def stage(self, path: str) -> Staged:
        """Begin to write a file.

        Raises:
            StorageError: if that cannot be begun.
        """

    @abstractmethod
    def write_whole(self, path: str, data: bytes) -> FileRecord:
        """Write a small file, whole or not at all; what was there is replaced.

        Raises:
            StorageError: if it cannot be written.
        """

    @abstractmethod
    def write_new(self, path: str, data: bytes) -> bool:
        """Write a small file unless it is there; of several who try at once one succeeds.

        Returns:
            Whether it was written.

        Raises:
            StorageError: if it cannot be written.
        """

    @abstractmethod
    def open(self, path: str) -> Opened:
        """Open a file for reading.

        Raises:
            FileNotFoundError: if it is not there.
            OSError: if it cannot be opened.
        """

    @abstractmethod
    def reader(self, *, direct: bool = False) -> Reader:
        """What reads whole committed files; past the page cache if ``direct`` and that is possible."""

    @abstractmethod
    def read_text(self, path: str) -> str:
        """A small file of text.

        Raises:
            FileNotFoundError: if it is not there.
            OSError: if it cannot be read.
        """

    @abstractmethod
    def size(self, path: str) -> int:
        """Bytes of a file.

        Raises:
            FileNotFoundError: if it is not there.
            OSError: if that cannot be found out.
        """

    @abstractmethod
    def checksum(self, path: str) -> int:
        """CRC-32C of a file, read in pieces.

        Raises:
            FileNotFoundError: if it is not there.
            OSError: if it cannot be read.
        """

    @abstractmethod
    def stamp(self, path: str) -> str:
        """What changes when a file does, found without reading it.

        Raises:
            FileNotFoundError: if it is not there.
            OSError: if that cannot be found out.
        """

    def stamps(self, paths: Collection[str]) -> dict[str, str]:
        """Stamps of many files at once.

        Raises:
            FileNotFoundError: if one is not there.
            OSError: if one cannot be looked at.
        """
        return {path: self.stamp(path) for path in paths}

    def known_stamps(self, paths: Collection[str]) -> dict[str, str]:
        """Stamps of those of many files that are there and can be looked at.

        Raises:
            StorageError: if an object store cannot be reached.
        """
        found = {}
        for path in paths:
            with suppress(OSError):
                found[path] = self.stamp(path)
        return found

    @abstractmethod
    def forget(self, path: str) -> None:
        """Have a file read from where it lies next time, and not from a cache, as far as that is possible."""

    @abstractmethod
    def matrix(self, path: str, dtype: np.dtype[Any], shape: tuple[int, int]) -> Any:
        """A raw file as a matrix in C order, of which only what is asked for is read.

        Returns:
            What takes ``[rows, columns]``, rows by numbers or a slice and columns by a slice, and has ``diagonal()``.

        Raises:
            StorageError: if it is missing or cannot be read.
        """

    @abstractmethod
    def delete(self, *paths: str) -> None:
        """Delete files; what is not there, or cannot be deleted, is passed over."""

    @abstractmethod
    def delete_folder(self, path: str) -> None:
        """Delete all files below a path likewise."""

    @abstractmethod
    def names(self, folder: str = "") -> list[str]:
        """Names of what is in a folder, sorted; none if there is no such folder.

        Raises:
            StorageError: if it cannot be listed.
        """

    @abstractmethod
    def sweep(self) -> int:
        """Delete what was being written when a run stopped; returns how many files."""

    @abstractmethod
    def size_bytes(self) -> int:
        """Bytes of all files.

        Raises:
            StorageError: if they cannot be listed.
        """

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Bytes that may still be written; None where nothing says.

        Raises:
            StorageError: if that cannot be measured.
        """

    @abstractmethod
    def zarr_store(self, *, read_only: bool = False) -> Any:
        """The files as a Zarr store."""


class LocalFiles(Files):
    """Files in a folder, written by rename, read by raw descriptors. See :class:`Files`.

    Attributes:
        root: the folder.
    """

    def __init__(self, root: str | Path) -> None:
        """Name the folder; nothing is touched."""
        self.root = Path(root)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LocalFiles) and self.root == other.root

    def __hash__(self) -> int:
        return hash(self.root)

    def place(self, path: str) -> str:
        """See :class:`Files`."""
        return str(self.root / path)

    def stage(self, path: str) -> StagedFile:
        """See :class:`Files`."""
        return StagedFile(self.root, path)

    def write_whole(self, path: str, data: bytes) -> FileRecord:
        """See :class:`Files`."""
        return write_whole(self.root, path, data)

    def write_new(self, path: str, data: bytes) -> bool:
        """See :class:`Files`."""
        final = self.root / path
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            with final.open("xb") as file:
                file.write(data)
        except FileExistsError:
            return False
        except OSError as error:
            raise storage_error("writing", final, error) from error
        return True

    def open(self, path: str) -> Opened:
        """See :class:`Files`."""
        return _OpenFile(self.root / path)

    def reader(self, *, direct: bool = False) -> Reader:
        """See :class:`Files`."""
        return FileReader(self.root, direct=direct)

    def read_text(self, path: str) -> str:
        """See :class:`Files`."""
        return (self.root / path).read_text()

    def size(self, path: str) -> int:
        """See :class:`Files`."""
        return (self.root / path).stat().st_size

    def checksum(self, path: str) -> int:
        """See :class:`Files`."""
        return checksum_file(self.root / path)

    def stamp(self, path: str) -> str:
        """See :class:`Files`."""
        return file_stamp(self.root / path)

    def forget(self, path: str) -> None:
        """See :class:`Files`."""
        forget_pages(self.root / path)

    def matrix(self, path: str, dtype: np.dtype[Any], shape: tuple[int, int]) -> Any:
        """See :class:`Files`: mapped, so that only the pages that are used are read."""
        file = self.root / path
        try:
            return np.memmap(file, dtype=dtype, mode="r", shape=shape)
        except (OSError, ValueError) as error:
            raise StorageError(f"cannot read the tile {file} ({error}); run again: it is computed anew") from error

    def delete(self, *paths: str) -> None:
        """See :class:`Files`."""
        for path in paths:
            with suppress(OSError):
                (self.root / path).unlink()

    def delete_folder(self, path: str) -> None:
        """See :class:`Files`."""
        shutil.rmtree(self.root / path, ignore_errors=True)

    def names(self, folder: str = "") -> list[str]:
        """See :class:`Files`."""
        try:
            return sorted(entry.name for entry in (self.root / folder).iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise storage_error("reading", self.root / folder, error) from error

    def sweep(self) -> int:
        """See :class:`Files`."""
        count = 0
        for path in [path for pattern in (f"*{TEMPORARY}*", _ZARR_TEMPORARY) for path in self.root.rglob(pattern)]:
            with suppress(OSError):
                path.unlink()
                count += 1
        return count

    def size_bytes(self) -> int:
        """See :class:`Files`."""
        total = 0
        for path in self.root.rglob("*"):
            with suppress(OSError):
                total += path.stat().st_size if path.is_file() else 0
        return total

    def free_bytes(self) -> int:
        """See :class:`Files`."""
        return free_disk_bytes(self.root)

    def zarr_store(self, *, read_only: bool = False) -> Any:
        """See :class:`Files`."""
        import zarr  # heavy, and not needed to see that a run is done

        return zarr.storage.LocalStore(self.root, read_only=read_only)


class _OpenFile:
    """A descriptor that is read front to back. See :class:`Opened`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor, _ = open_for_reading(path, direct=False)

    def read_at(self, target: NDArray[np.uint8], offset: int) -> int:
        return read_at(self._descriptor, self._path, target, offset)

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with suppress(OSError):
                os.close(descriptor)


def files_of(where: Files | str | Path) -> Files:
    """The files of a run; a path is a folder."""
    return where if isinstance(where, Files) else LocalFiles(where)


def file_stamp(path: Path) -> str:
    """What changes when a local file is touched: size, inode, modification and change times."""
    stat = path.stat()
    return f"{stat.st_size}:{stat.st_ino}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"


def free_disk_bytes(path: Path) -> int:
    """Free bytes on the file system that will hold ``path``.

    Raises:
        StorageError: if they cannot be measured.
    """
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError as error:
        raise StorageError(f"cannot measure the free disk space at {folder}: {error}") from error


def read_checked(where: Files | Path, record: FileRecord, buffer: NDArray[np.generic]) -> None:
    """Fill a C-contiguous buffer with a committed file.

    Raises:
        DamagedFileError: if the file is missing or is not what was committed.
        StorageError: if it cannot be read.
    """
    files_of(where).reader().read(record, raw_bytes(buffer))


def read_stripes(where: Files | Path, record: FileRecord, stripe: NDArray[np.generic]) -> Iterator[NDArray[np.generic]]:
    """Read a committed file front to back through one buffer, and check it at the end.

    Args:
        where: the files of the run.
        record: the file as it was committed.
        stripe: (rows, columns) buffer, overwritten by every stripe.

    Yields:
        The rows read, a view of ``stripe``; the last one may be shorter.

    Raises:
        DamagedFileError: if the file is missing or is not what was committed. What was yielded must then be dropped.
        TransientStorageError: if it was misread, but is whole when read again; the same must then be dropped.
    """
    files = files_of(where)
    place, crc, done = files.place(record.path), 0, 0
    whole = raw_bytes(stripe)
    try:
        file = files.open(record.path)
        try:
            while done < record.size:
                wanted = whole[: record.size - done]
                count = 0
                while count < wanted.size:
                    more = file.read_at(wanted[count : count + PIECE_BYTES], done + count)
                    if not more:
                        break
                    crc = google_crc32c.extend(crc, wanted[count : count + more])
                    count += more
                if count < wanted.size:
                    break
                done += count
                yield stripe[: count // (math.prod(stripe.shape[1:]) * stripe.itemsize)]
        finally:
            file.close()
        if done == record.size and crc == record.crc32c:
            return
        raise_if_misread(files, record)
    except FileNotFoundError as error:
        raise missing(place, record) from error
    except StorageError:
        raise
    except OSError as error:
        raise storage_error("reading", place, error) from error
    raise differs(place, record)


def raise_if_misread(files: Files, record: FileRecord) -> None:
    """Look again at a file that was not what was committed when it was read.

    Raises:
        TransientStorageError: if it is whole now.
        OSError: if it cannot be read.
    """
    files.forget(record.path)
    if files.size(record.path) == record.size and files.checksum(record.path) == record.crc32c:
        raise TransientStorageError(f"{files.place(record.path)} was misread once, and is whole when read again")
