"""The manifest: one SQLite file, written by the driver alone, that says which tasks are finished."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from ooc_ntk.errors import StorageError

from .atomic import FileRecord, checksum_file, storage_error

#: Version of the manifest's tables.
MANIFEST_VERSION: Final = 1

_TABLES: Final = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE tasks (key TEXT PRIMARY KEY, receipt TEXT NOT NULL, committed REAL NOT NULL);
CREATE TABLE files (path TEXT PRIMARY KEY, task TEXT NOT NULL, size INTEGER NOT NULL, crc32c INTEGER NOT NULL,
                    stamp TEXT NOT NULL);
CREATE INDEX files_of_task ON files (task);
"""


@dataclass(frozen=True)
class Receipt:
    """What a task returns: coordinates and figures, never arrays.

    Attributes:
        key: the task's key.
        seconds: wall-clock.
        bytes_read: bytes read from disk.
        bytes_written: bytes written to disk.
        peak_host_bytes: highest resident memory of the process so far.
        peak_device_bytes: highest device memory of the process so far.
        files: files that the task published.
        samples_digest: digest of the sample range (``rows`` tasks).
        replaces: files of an earlier generation that may go once this task is committed.
        phases: wall-clock of the phases within the task, by name.
    """

    key: str
    seconds: float
    bytes_read: int = 0
    bytes_written: int = 0
    peak_host_bytes: int = 0
    peak_device_bytes: int = 0
    files: tuple[FileRecord, ...] = ()
    samples_digest: str | None = None
    replaces: tuple[str, ...] = ()
    phases: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """Serialise on one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Receipt:
        """Read what :meth:`to_json` wrote."""
        fields: dict[str, Any] = json.loads(text)
        fields["files"] = tuple(FileRecord(**record) for record in fields["files"])
        fields["replaces"] = tuple(fields["replaces"])
        return cls(**fields)


@dataclass
class Damage:
    """Files that no longer are what was committed, by the task that wrote them.

    Attributes:
        reasons: per file path, what is wrong with it.
        tasks: keys of the tasks to be done again.
    """

    reasons: dict[str, str] = field(default_factory=dict)
    tasks: set[str] = field(default_factory=set)


def file_stamp(path: Path) -> str:
    """What changes when a file is touched: size, inode, modification and change times."""
    stat = path.stat()
    return f"{stat.st_size}:{stat.st_ino}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"


def _connect(path: Path, *, read_only: bool) -> sqlite3.Connection:
    """Open the database.

    Reading alone opens it for writing as well: after a crash SQLite has to roll its journal back before it can read.
    Only where the file system forbids that (or the file is not ours) it is opened read-only.
    """
    if not read_only:
        return sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
    modes = ["rw", "ro"] if os.access(path, os.W_OK) and os.access(path.parent, os.W_OK) else ["ro"]
    for mode in modes:
        try:
            address = f"{path.absolute().as_uri()}?mode={mode}"
            database = sqlite3.connect(address, uri=True, isolation_level=None, check_same_thread=False, timeout=10)
            database.execute("PRAGMA user_version").fetchone()
            database.execute("PRAGMA query_only = ON")
        except sqlite3.OperationalError:
            if mode == modes[-1]:
                raise
        else:
            break
    return database


class Manifest:
    """Finished tasks and their files. One writer; a commit is one transaction."""

    def __init__(self, root: Path, *, read_only: bool = False) -> None:
        """Open the manifest of a run directory, making it if it is not there.

        Raises:
            StorageError: if it is damaged, from a newer version, or missing when ``read_only``.
        """
        self._root = root
        path = root / "manifest"
        if read_only and not path.exists():
            raise StorageError(f"{root} holds no run: there is no manifest in it")
        try:
            self._database = _connect(path, read_only=read_only)
            version = int(self._database.execute("PRAGMA user_version").fetchone()[0])
            if version > MANIFEST_VERSION:
                self._database.close()
                raise StorageError(
                    f"{path} has version {version}, this version of ooc-ntk reads up to {MANIFEST_VERSION}; "
                    "upgrade ooc-ntk"
                )
            if not read_only:
                self._database.execute("PRAGMA synchronous = FULL")
                if version == 0:
                    with self._transaction():
                        for statement in _TABLES.split(";"):
                            self._database.execute(statement)
                        self._database.execute(f"PRAGMA user_version = {MANIFEST_VERSION}")
        except sqlite3.DatabaseError as error:
            raise StorageError(
                f"cannot read the manifest {path} ({error}); move the run directory away and run again"
            ) from error

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing.

        Raises:
            StorageError: if the database or a file that it should record cannot be written or read.
        """
        try:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                if self._database.in_transaction:  # a full disk has rolled it back already
                    self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            raise self._failure(error) from error

    def set_meta(self, name: str, value: str) -> None:
        """Keep a named text."""
        with self._transaction():
            self._database.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    def _read(self, statement: str, *values: str) -> list[Any]:
        """Rows of a query.

        Raises:
            StorageError: if the database is damaged.
        """
        try:
            return self._database.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise StorageError(
                f"cannot read the manifest in {self._root} ({error}); move the run directory away and run again"
            ) from error

    def meta(self, name: str) -> str | None:
        """A named text, or None."""
        rows = self._read("SELECT value FROM meta WHERE name = ?", name)
        return str(rows[0][0]) if rows else None

    def commit(self, receipt: Receipt) -> None:
        """Record a finished task and its files; files that it replaces are forgotten (not deleted).

        Raises:
            StorageError: if the database cannot be written.
        """
        with self._transaction():
            self._database.execute(
                "INSERT OR REPLACE INTO tasks VALUES (?, ?, ?)", (receipt.key, receipt.to_json(), time.time())
            )
            self._database.executemany("DELETE FROM files WHERE path = ?", [(path,) for path in receipt.replaces])
            self._database.executemany(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)",
                [
                    (record.path, receipt.key, record.size, record.crc32c, file_stamp(self._root / record.path))
                    for record in receipt.files
                ],
            )

    def _failure(self, error: sqlite3.Error | OSError) -> StorageError:
        """Say that the database could not be written, and when the disk is full what to do."""
        if isinstance(error, OSError):
            return storage_error("writing", self._root / "manifest", error)
        if "full" in str(error):
            return storage_error("writing", self._root / "manifest", OSError(errno.ENOSPC, str(error)))
        return StorageError(f"cannot write the manifest in {self._root}: {error}; finished tiles are kept, run again")

    def withdraw(self, keys: Iterable[str]) -> None:
        """Forget that tasks are finished, with their files."""
        with self._transaction():
            for key in keys:
                self._database.execute("DELETE FROM tasks WHERE key = ?", (key,))
                self._database.execute("DELETE FROM files WHERE task = ?", (key,))

    def distrust(self, paths: Iterable[str]) -> None:
        """Have files compared with their checksums at the next run, although nothing seems to have touched them."""
        with self._transaction():
            self._database.executemany("UPDATE files SET stamp = '' WHERE path = ?", [(path,) for path in paths])

    def forget_files(self, folder: str) -> None:
        """Forget every file below ``folder`` (a released pass); its tasks stay finished."""
        with self._transaction():
            self._database.execute("DELETE FROM files WHERE path GLOB ?", (f"{folder}/*",))

    def keys(self) -> list[str]:
        """Keys of all finished tasks."""
        return [key for (key,) in self._read("SELECT key FROM tasks")]

    def receipts(self) -> dict[str, Receipt]:
        """Receipts of all finished tasks, by key."""
        rows = self._read("SELECT key, receipt FROM tasks ORDER BY committed")
        return {key: Receipt.from_json(text) for key, text in rows}

    def files(self) -> dict[str, FileRecord]:
        """Every file that should be there, by path."""
        rows = self._read("SELECT path, size, crc32c FROM files ORDER BY path")
        return {path: FileRecord(path, size, crc) for path, size, crc in rows}

    def damage(self, *, thorough: bool) -> Damage:
        """Compare files with what was committed.

        Args:
            thorough: read every file and compare checksums. Otherwise only files whose size, inode or times changed
                since their commit are read.

        Returns:
            What is missing, truncated or altered.
        """
        found = Damage()
        rows = self._read("SELECT path, task, size, crc32c, stamp FROM files ORDER BY path")
        for path, task, size, crc, stamp in rows:
            reason = self._reason(path, size, crc, None if thorough else stamp)
            if reason is not None:
                found.reasons[path] = reason
                found.tasks.add(task)
        return found

    def _reason(self, path: str, size: int, crc: int, stamp: str | None) -> str | None:
        file = self._root / path
        try:
            if stamp is not None and file_stamp(file) == stamp:
                return None
            actual = file.stat().st_size
            if actual != size:
                return f"has {actual:,} bytes instead of {size:,}"
            if checksum_file(file) != crc:
                return "differs from its checksum"
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        return None
