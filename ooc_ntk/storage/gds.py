"""Reading tiles straight into device memory with KvikIO (GPUDirect Storage), where that is asked for.

The interface is tested with a stand-in for KvikIO; on a GPU this was never run. It is therefore off unless the
environment says ``OOC_NTK_GDS=1``. Two things make it less than it could be. Every read is checked as ever, which takes
the bytes back to the host, piece by piece, in the reading thread: a checksum of the device's own would spare that. And
the read buffers are device memory that no plan counts.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from ooc_ntk.extras import require

from .atomic import FileRecord
from .reading import PIECE_BYTES, differs, missing
from .retries import note_retry, retried, storage_error

#: Environment variable that asks for it.
ASKED: Final = "OOC_NTK_GDS"


def wanted() -> bool:
    """Whether it is asked for.

    Raises:
        InputError: if KvikIO is missing then.
    """
    if os.environ.get(ASKED, "") not in ("1", "true", "yes"):
        return False
    require("kvikio", f"{ASKED}=1", f"unset {ASKED}")
    return True


class DeviceReader:
    """Reads committed files into device memory. See :class:`ooc_ntk.storage.reading.Reader`."""

    def __init__(self, root: Path, to_host: Callable[[Any], NDArray[np.uint8]], wait: Callable[[], None]) -> None:
        """Read below ``root``.

        Args:
            root: run directory.
            to_host: copies device bytes to the host.
            wait: waits for what the device still does with a buffer.
        """
        self._root, self._to_host, self._wait = root, to_host, wait
        self._kvikio: Any = importlib.import_module("kvikio")

    def read(self, record: FileRecord, buffer: Any) -> None:
        """Fill the front of a device buffer with a whole file, and check it on the host.

        Args:
            record: the file as it was committed.
            buffer: bytes on the device with the CUDA array interface.

        Raises:
            DamagedFileError: if the file is missing or is not what was committed.
            StorageError: if it cannot be read.
        """
        path = self._root / record.path
        self._wait()
        try:
            for number in range(2):
                count = retried(lambda: self._fill(path, buffer[: record.size]), "reading", path)
                if count == record.size and self._checksum(buffer, record.size) == record.crc32c:
                    return
                if not number:
                    note_retry(f"checking {path}", "it differs from its checksum", 1, 0.0)
        except FileNotFoundError as error:
            raise missing(path, record) from error
        except OSError as error:
            raise storage_error("reading", path, error) from error
        raise differs(path, record)

    def _fill(self, path: Path, target: Any) -> int:
        if path.stat().st_size < len(target):  # KvikIO raises errors of its own at the end of a file
            return 0
        with self._kvikio.CuFile(path, "r") as file:
            return int(file.read(target))

    def _checksum(self, buffer: Any, size: int) -> int:
        crc = 0
        for start in range(0, size, PIECE_BYTES):
            crc = google_crc32c.extend(crc, self._to_host(buffer[start : min(start + PIECE_BYTES, size)]))
        return int(crc)
