"""The manifest: one SQLite file, written by the driver alone, that says which tasks are finished."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from ooc_ntk.errors import StorageError, newer

from . import retries
from .atomic import FileRecord
from .files import Files
from .local import LocalFiles
from .retries import TRANSIENT, note_retry, storage_error

#: Version of the manifest's tables.
MANIFEST_VERSION: Final = 1

#: Version of everything else that a run directory holds: names, the job file, receipts, attributes of arrays, what a
#: tile's bytes mean. Raised with every change that an earlier version would misread; see CONTRIBUTING.md. (Runs of
#: before it was noted are of format 1.)
RUN_FORMAT: Final = 1

#: Name of the manifest's note of it.
FORMAT: Final = "format"

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
        retries: how often something was tried again, the task itself included.
        batch_size: samples derived together where the device had no room for as many as planned; 0 as planned.
        started: when the task began, in seconds since the epoch by the clock of the machine that ran it.
        worker: name of the worker process that ran it; empty for the driver itself.
        plan: digest of the plan that it was done for, which covers the job.
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
    retries: int = 0
    batch_size: int = 0
    started: float = 0.0
    worker: str = ""
    plan: str = ""

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


#: SQLite's errors that are about the disk and not about what is on it, and those of them that may pass.
_OF_THE_DISK: Final = frozenset(
    (
        *(sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM),
        *(sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED),
    )
)
_PASSING: Final = frozenset((sqlite3.SQLITE_IOERR,))  # a busy one was waited for already


def _primary(error: sqlite3.Error) -> int:
    """SQLite's primary result code of an error; 0 for one of the binding's own."""
    return int(getattr(error, "sqlite_errorcode", 0) or 0) & 0xFF


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

    def __init__(self, root: Path, files: Files | None = None, *, read_only: bool = False) -> None:
        """Open the manifest of a run directory, making it if it is not there.

        Args:
            root: the run directory.
            files: where the files lie that it speaks of; None is the run directory itself.
            read_only: whether nothing is written.

        Raises:
            StorageError: if it is damaged, from a newer version, or missing when ``read_only``.
        """
        self._root, self._files = root, files or LocalFiles(root)
        path = root / "manifest"
        if read_only and not path.exists():
            raise StorageError(f"{root} holds no run: there is no manifest in it")
        try:
            self._database = _connect(path, read_only=read_only)
            version = int(self._database.execute("PRAGMA user_version").fetchone()[0])
            if version > MANIFEST_VERSION:
                self._database.close()
                raise newer(f"the manifest {path}", version, MANIFEST_VERSION)
            if not read_only:
                self._database.execute("PRAGMA synchronous = FULL")
                if version == 0:
                    self._write(self._make_tables)
            if version:  # one without tables is of a run that was cut off before it made them
                self._check_format()
        except sqlite3.DatabaseError as error:
            if _primary(error) in _OF_THE_DISK:
                raise self._failure(error) from error
            raise StorageError(
                f"cannot read the manifest {path} ({error}); move the run directory away and run again"
            ) from error

    def _check_format(self) -> None:
        if self.format > RUN_FORMAT:
            found = self.format
            self._database.close()
            raise newer(f"the run {self._root}", found, RUN_FORMAT)

    @property
    def format(self) -> int:
        """Version of the run's format, see :data:`RUN_FORMAT`."""
        rows = self._database.execute("SELECT value FROM meta WHERE name = ?", (FORMAT,)).fetchall()
        return int(rows[0][0]) if rows else 1

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def _make_tables(self) -> None:
        for statement in _TABLES.split(";"):
            self._database.execute(statement)
        self._database.execute("INSERT INTO meta VALUES (?, ?)", (FORMAT, str(RUN_FORMAT)))
        self._database.execute(f"PRAGMA user_version = {MANIFEST_VERSION}")

    def _write(self, work: Callable[[], object]) -> None:
        """Do some work as one transaction, all or nothing; after an error that may pass, all of it again.

        Raises:
            StorageError: if the database or a file that it should record cannot be written or read.
        """
        for number, delay in enumerate((*retries.CALL_DELAYS, None), start=1):
            try:
                self._database.execute("BEGIN IMMEDIATE")
                try:
                    work()
                    self._database.execute("COMMIT")
                except BaseException:
                    with suppress(sqlite3.Error):  # what failed is what is said; the next to open it rolls back
                        if self._database.in_transaction:  # a full disk has rolled it back already
                            self._database.execute("ROLLBACK")
                    raise
            except StorageError:  # of an object store, which was tried again already
                raise
            except (sqlite3.Error, OSError) as error:
                passing = error.errno in TRANSIENT if isinstance(error, OSError) else _primary(error) in _PASSING
                if delay is None or not passing:
                    raise self._failure(error) from error
                note_retry(f"writing {self._root / 'manifest'}", error, number, delay)
                time.sleep(delay)
            else:
                return

    def set_meta(self, name: str, value: str) -> None:
        """Keep a named text."""
        self.set_metas({name: value})

    def set_metas(self, texts: Mapping[str, str]) -> None:
        """Keep several texts by name, as one transaction: each is synced to the disk by itself."""
        statement = "INSERT OR REPLACE INTO meta VALUES (?, ?)"
        self._write(lambda: self._database.executemany(statement, list(texts.items())))

    def _read(self, statement: str, *values: str) -> list[Any]:
        """Rows of a query.

        Raises:
            StorageError: if the database is damaged.
        """
        try:
            return self._database.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            if _primary(error) in _OF_THE_DISK:
                raise self._failure(error, "read") from error
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
            StorageError: if the database cannot be written, or a file cannot be looked at.
        """

        def record() -> None:
            stamps = self._files.stamps([record.path for record in receipt.files])
            self._database.execute(
                "INSERT OR REPLACE INTO tasks VALUES (?, ?, ?)", (receipt.key, receipt.to_json(), time.time())
            )
            self._database.executemany("DELETE FROM files WHERE path = ?", [(path,) for path in receipt.replaces])
            self._database.executemany(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)",
                [
                    (record.path, receipt.key, record.size, record.crc32c, stamps[record.path])
                    for record in receipt.files
                ],
            )

        self._write(record)

    def _failure(self, error: sqlite3.Error | OSError, action: str = "write") -> StorageError:
        """Say that the database could not be written or read, and what to do about it."""
        path, kept = self._root / "manifest", "finished tiles are kept, run again"
        if isinstance(error, OSError):
            return storage_error("writing", path, error)
        primary = _primary(error)
        if primary == sqlite3.SQLITE_FULL or "full" in str(error):
            return storage_error("writing", path, OSError(errno.ENOSPC, str(error)))
        if primary in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
            return StorageError(f"cannot {action} the manifest {path} ({error}); make the folder writable, {kept}")
        return StorageError(f"cannot {action} the manifest in {self._root}: {error}; {kept}")

    def withdraw(self, keys: Iterable[str]) -> None:
        """Forget that tasks are finished, with their files."""
        gone = [(key,) for key in keys]

        def forget() -> None:
            self._database.executemany("DELETE FROM tasks WHERE key = ?", gone)
            self._database.executemany("DELETE FROM files WHERE task = ?", gone)

        self._write(forget)

    def distrust(self, paths: Iterable[str]) -> None:
        """Have files compared with their checksums at the next run, although nothing seems to have touched them."""
        named = [(path,) for path in paths]
        self._write(lambda: self._database.executemany("UPDATE files SET stamp = '' WHERE path = ?", named))

    def forget_files(self, folder: str) -> None:
        """Forget every file below ``folder`` (a released pass); its tasks stay finished."""
        self._write(lambda: self._database.execute("DELETE FROM files WHERE path GLOB ?", (f"{folder}/*",)))

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

        Raises:
            StorageError: if an object store cannot be reached.
        """
        found = Damage()
        rows = self._read("SELECT path, task, size, crc32c, stamp FROM files ORDER BY path")
        stamps = {} if thorough else self._files.known_stamps([path for path, *_ in rows])
        for path, task, size, crc, stamp in rows:
            if not thorough and stamps.get(path) == stamp:
                continue
            reason = self._reason(path, size, crc)
            if reason is not None:
                found.reasons[path] = reason
                found.tasks.add(task)
        return found

    def _reason(self, path: str, size: int, crc: int) -> str | None:
        try:
            actual = self._files.size(path)
            if actual != size:
                return f"has {actual:,} bytes instead of {size:,}"
            if self._files.checksum(path) != crc:
                return "differs from its checksum"
        except FileNotFoundError:
            return "is missing"
        except StorageError:  # of an object store that cannot be reached: nothing is known of the file
            raise
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        return None

    def copy_to(self, path: Path) -> None:
        """Copy the database as it is between two commits, whole.

        Raises:
            StorageError: if it cannot be written or read.
        """
        try:
            path.unlink(missing_ok=True)
            copy = sqlite3.connect(path)
            try:
                self._database.backup(copy)
            finally:
                copy.close()
        except (sqlite3.Error, OSError) as error:
            raise StorageError(f"cannot copy the manifest of {self._root} to {path}: {error}") from error
