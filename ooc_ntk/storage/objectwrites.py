"""Objects on their way into a store: gathered in a local file without a name, and uploaded when they are whole."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

import google_crc32c
import numpy as np
import obstore
from numpy.typing import NDArray

from ooc_ntk.errors import StorageError

from .atomic import TEMPORARY, FileRecord, raw_bytes
from .retries import storage_error

if TYPE_CHECKING:
    from .objects import ObjectFiles

#: Bytes of one part of a large upload, how many are on their way at once, and how many S3 allows.
PART_BYTES: Final = 2**23
_PARTS_AT_ONCE: Final = 4
_MOST_PARTS: Final = 9_000


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
