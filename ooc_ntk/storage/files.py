"""Where the files of a run lie: one set of calls, whether that is a folder or an object store.

A file is written aside, sealed, and appears under its name whole or not at all; it is read at an offset, or as a whole
against its checksum. A folder, on a disk or a shared file system, is in :mod:`~ooc_ntk.storage.local`, object stores
are in :mod:`~ooc_ntk.storage.objects`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from .atomic import FileRecord
from .reading import Reader

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


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

    def read_whole(self, path: str) -> bytes:
        """All of a file.

        Raises:
            StorageError: if it cannot be read.
        """
        import numpy as np  # heavy, and not needed to see that a run is done

        target = np.empty(self.size(path), dtype=np.uint8)
        file, done = self.open(path), 0
        try:
            while done < target.size and (count := file.read_at(target[done:], done)):
                done += count
        finally:
            file.close()
        return target[:done].tobytes()

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
