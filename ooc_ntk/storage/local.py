"""Files of a run in a folder: written by rename, read by raw descriptors."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ooc_ntk.errors import StorageError

from .atomic import TEMPORARY, FileRecord, StagedFile, write_whole
from .files import Files, Opened
from .reading import FileReader, Reader, checksum_file, forget_pages, open_for_reading, read_at
from .retries import storage_error

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Names of metadata that Zarr was writing (it renames them when they are whole).
_ZARR_TEMPORARY: Final = "zarr.*.partial"


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
        import numpy as np  # heavy, and not needed to see that a run is done

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
