"""The way every tile is read: raw files, in bounded pieces, into reused page-aligned buffers, each byte checked.

Files are read by ``preadv``. Where calibration found it faster, and tiles would not fit the page cache anyway, they are
read past it (``O_DIRECT``); a file system that refuses that is read through it, silently. Pages that were read are left
in the cache and not dropped: a panel is read several times, and what the cache still holds then comes from memory.
"""

from __future__ import annotations

import errno
import mmap
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import google_crc32c

from ooc_ntk.errors import DamagedFileError

from .atomic import FileRecord
from .retries import note_retry, retried, storage_error

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: What direct reads are aligned to, in memory and in the file: a page, a multiple of every disk's block.
ALIGNMENT: Final = max(4096, mmap.PAGESIZE)

#: Most bytes of one read. (Measured on a virtual disk: direct reads of 256 KiB reach 1.2 GB/s, of 1 to 16 MiB
#: 1.6 to 1.9; buffered ones of up to 4 MiB 2.0 to 2.5, of 16 MiB 0.7 to 1.9. The checksum follows piece by piece.)
PIECE_BYTES: Final = 2**22

#: Flag of reads past the page cache; 0 where the system has none.
O_DIRECT: Final = int(getattr(os, "O_DIRECT", 0))


def padded(size: int) -> int:
    """Bytes rounded up to whole pages.

    >>> padded(1) == padded(ALIGNMENT) == ALIGNMENT
    True
    """
    return -(-size // ALIGNMENT) * ALIGNMENT


def aligned_buffer(size: int) -> NDArray[np.uint8]:
    """Bytes that begin on a page and fill whole pages, uninitialised; they go back to the system when dropped."""
    import numpy as np  # heavy, and not needed to see that a run is done

    return np.frombuffer(_private(padded(max(1, size))), dtype=np.uint8)


def _private(size: int) -> mmap.mmap:
    if hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, size)


class Reader(Protocol):
    """Reads committed files."""

    def read(self, record: FileRecord, buffer: NDArray[np.uint8]) -> None:
        """Fill the front of a buffer with a whole file and check it.

        Args:
            record: the file as it was committed.
            buffer: at least that many bytes; what follows the file up to the next page may be overwritten.

        Raises:
            DamagedFileError: if the file is missing or is not what was committed.
            StorageError: if it cannot be read.
        """


class FileReader:
    """Reads the files of a run directory. See :class:`Reader`."""

    def __init__(self, root: Path, *, direct: bool = False) -> None:
        """Read below ``root``, past the page cache if ``direct`` and the file system allows it."""
        self._root = root
        self._direct = direct and bool(O_DIRECT)

    def read(self, record: FileRecord, buffer: NDArray[np.uint8]) -> None:
        """See :meth:`Reader.read`. What differs is read once more, from the disk, before it is called damaged."""
        path = self._root / record.path
        try:
            if self._read_once(path, record, buffer, self._direct):
                return
            note_retry(f"checking {path}", "it differs from its checksum", 1, 0.0)
            forget_pages(path)
            if self._read_once(path, record, buffer, direct=False):
                return
        except FileNotFoundError as error:
            raise missing(path, record) from error
        except OSError as error:
            raise storage_error("reading", path, error) from error
        raise differs(path, record)

    def _read_once(self, path: Path, record: FileRecord, buffer: NDArray[np.uint8], direct: bool) -> bool:
        """Read a file; returns whether it is what was committed."""
        if record.size > buffer.size:
            return False
        file, direct = open_for_reading(path, direct and _may_be_direct(buffer, record.size))
        try:
            crc, done = 0, 0
            while done < record.size:
                # Past the end of the file a direct read asks for the rest of the page, and gets what there is.
                stop = min(done + PIECE_BYTES, padded(record.size) if direct else record.size)
                try:
                    count = read_at(file, path, buffer[done:stop], done)
                except OSError as error:
                    if not direct or error.errno not in _NOT_DIRECT:
                        raise
                    os.close(file)
                    file, direct = open_for_reading(path, direct=False)
                    continue
                count = min(count, record.size - done)
                if not count:
                    return False
                crc = google_crc32c.extend(crc, buffer[done : done + count])
                done += count
                if direct and count % ALIGNMENT and done < record.size:  # cut short within a page: go on without
                    os.close(file)
                    file, direct = open_for_reading(path, direct=False)
        finally:
            os.close(file)
        return bool(crc == record.crc32c)


#: What opening or reading with O_DIRECT fails with where it is not supported.
_NOT_DIRECT: Final = frozenset((errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP))


def _may_be_direct(buffer: NDArray[np.uint8], size: int) -> bool:
    return buffer.ctypes.data % ALIGNMENT == 0 and buffer.size >= padded(size)


def open_for_reading(path: Path, direct: bool) -> tuple[int, bool]:
    """Open a file for reading front to back; says whether past the page cache."""
    if direct:
        try:
            return retried(lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC | O_DIRECT), "opening", path), True
        except OSError as error:
            if error.errno not in _NOT_DIRECT:
                raise
    file = retried(lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC), "opening", path)
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return file, False


def read_at(file: int, path: Path, target: NDArray[np.uint8], offset: int) -> int:
    """Read bytes of a file into memory; returns how many, 0 at its end."""

    def read() -> int:
        if hasattr(os, "preadv"):
            return os.preadv(file, [target.data], offset)
        os.lseek(file, offset, os.SEEK_SET)  # macOS
        return os.readv(file, [target.data])

    return retried(read, "reading", path)


def forget_pages(path: Path) -> None:
    """Have a file read from the disk next time, as far as the system can."""
    if not hasattr(os, "posix_fadvise"):
        return
    with suppress(OSError):
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def missing(path: Path | str, record: FileRecord) -> DamagedFileError:
    """The error of a file that is not there."""
    return DamagedFileError(record.path, f"{path} is missing; run again: it will be computed anew")


def differs(path: Path | str, record: FileRecord) -> DamagedFileError:
    """The error of a file that is not what was committed."""
    return DamagedFileError(record.path, f"{path} is not what was committed; run again: it will be computed anew")


def checksum_file(path: Path) -> int:
    """CRC-32C of a file, read in pieces.

    Raises:
        OSError: if it cannot be read.
    """
    buffer = aligned_buffer(PIECE_BYTES)
    file, _ = open_for_reading(path, direct=False)
    try:
        crc, done = 0, 0
        while count := read_at(file, path, buffer, done):
            crc = google_crc32c.extend(crc, buffer[:count])
            done += count
    finally:
        os.close(file)
    return int(crc)
