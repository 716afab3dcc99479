"""The lock of a run directory: one process at a time, and none after a crash.

The system drops a ``flock`` with its process. Where a file system has none (some network file systems), a file made
exclusively names the holder by host, process and the time at which that process started, so that a lock left by a crash
is told from one that is held, and taken over. (Hosts, or containers, that share a name but not their processes are not
told apart.)
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Final

from ooc_ntk.errors import RunLockedError

from .atomic import TEMPORARY
from .retries import storage_error

logger = logging.getLogger(__name__)

#: The file that is locked by ``flock``, and the file whose being there is the lock where that is not supported.
LOCK: Final = "lock"
HELD: Final = "lock.held"

#: What ``flock`` fails with where it is not supported.
_UNSUPPORTED: Final = frozenset((errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL))

#: Seconds by which two readings of one process's start may differ (chosen; clocks tick in hundredths).
_SAME_START: Final = 1.0

#: Seconds for which a lock file without content counts as one that is just being written (chosen).
_BEING_WRITTEN: Final = 10.0


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        host: name of the machine.
        pid: number of the process there.
        started: when that process started, seconds since 1970.
        since: when it took the lock, for people.
    """

    host: str
    pid: int
    started: float
    since: str

    @classmethod
    def this_process(cls) -> Holder:
        """This process, now."""
        import psutil  # heavy, and not needed to see that a run is done

        since = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time(), since)

    @property
    def is_here(self) -> bool:
        """Whether it is a process of this machine."""
        return self.host == socket.gethostname()

    @property
    def is_alive(self) -> bool:
        """Whether that process of this machine still runs: another one may have its number by now."""
        import psutil

        try:
            return abs(float(psutil.Process(self.pid).create_time()) - self.started) < _SAME_START
        except psutil.NoSuchProcess:
            return False
        except psutil.Error:
            return True


@contextmanager
def hold(root: Path) -> Iterator[None]:
    """Hold a run directory for this process, making it if it is not there.

    Raises:
        RunLockedError: if another process holds it.
        StorageError: if it cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Unbuffered: on a full disk a buffer would fail once more when the file is closed.
        file: IO[bytes] = (root / LOCK).open("ab+", buffering=0)
    except OSError as error:
        raise storage_error("opening", root / LOCK, error) from error
    with file:
        supported = _flocked(file, root)
        if not supported or (root / HELD).exists():
            _take(root)
        try:
            if supported:
                try:
                    file.truncate(0)
                    file.write(f"{os.getpid()}\n".encode())
                except OSError as error:
                    raise storage_error("writing", root / LOCK, error) from error
            yield
        finally:
            _give_back(root)


def _flocked(file: IO[bytes], root: Path) -> bool:
    """Lock the open file; returns whether the file system can."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            logger.info("%s: no flock on this file system (%s); using %s", root, error.strerror, HELD)
            return False
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN):
            raise storage_error("locking", root / LOCK, error) from error
        file.seek(0)
        holder = file.read().decode().strip() or "unknown"
        raise RunLockedError(
            f"another run (process {holder}) is using {root}; wait for it or choose another --out"
        ) from error
    return True


def _take(root: Path) -> None:
    """Make the lock file, taking over one whose holder is gone."""
    path = root / HELD
    for _ in range(3):
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            _remove_stale(path, root)
            continue
        except OSError as error:
            raise storage_error("creating", path, error) from error
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(json.dumps(asdict(Holder.this_process())) + "\n")
        except OSError as error:
            path.unlink(missing_ok=True)
            raise storage_error("writing", path, error) from error
        return
    raise RunLockedError(f"another run is just starting in {root}; wait for it or choose another --out")


def _remove_stale(path: Path, root: Path) -> None:
    """Remove a lock whose holder is gone.

    Raises:
        RunLockedError: if it is held, or was taken by another process just now, or by another machine.
    """
    try:
        text, age = path.read_text(), time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return
    except OSError as error:
        raise storage_error("reading", path, error) from error
    try:
        holder = Holder(**json.loads(text))
    except (ValueError, TypeError):
        if age < _BEING_WRITTEN:
            raise RunLockedError(f"another run is just starting in {root}; wait for it") from None
        logger.warning("%s was left unfinished by a crash; taking it over", path)
    else:
        if not holder.is_here:
            raise RunLockedError(
                f"process {holder.pid} on {holder.host} is using {root} since {holder.since}, and whether it is still "
                f"alive cannot be seen from here; wait for it, or if it is gone delete {path}"
            )
        if holder.is_alive:
            raise RunLockedError(
                f"another run (process {holder.pid}, since {holder.since}) is using {root}; wait for it or choose "
                "another --out"
            )
        logger.warning("%s was left by process %d, which is gone; taking it over", path, holder.pid)
    # Moved aside first: of two processes that see the same stale lock, only one moves it.
    aside = path.with_name(f"{HELD}{TEMPORARY}{uuid.uuid4().hex[:8]}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    except OSError as error:
        raise storage_error("removing", path, error) from error
    taken = aside.read_text() != text
    if taken:  # another process had replaced it in between: its lock goes back
        with suppress(OSError):
            os.link(aside, path)
    with suppress(OSError):
        aside.unlink()
    if taken:
        raise RunLockedError(f"another run is just starting in {root}; wait for it or choose another --out")


def _give_back(root: Path) -> None:
    """Remove the lock file if it is this process's."""
    with suppress(OSError, ValueError, TypeError):
        holder = Holder(**json.loads((root / HELD).read_text()))
        if holder.is_here and holder.pid == os.getpid():
            (root / HELD).unlink()
