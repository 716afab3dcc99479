"""Committed files read and compared with what was committed, wherever they lie."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from ooc_ntk.errors import StorageError, TransientStorageError

from .atomic import FileRecord, raw_bytes
from .files import Files
from .local import files_of
from .reading import PIECE_BYTES, differs, missing
from .retries import storage_error


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
