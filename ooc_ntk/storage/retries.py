"""Errors of file systems: which of them pass by themselves, how often a call is tried again, and what is said."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeVar

from ooc_ntk.errors import StorageError, TransientStorageError
from ooc_ntk.units import format_bytes

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

#: Errors that a network or a busy file system may get over. A full disk or a missing file does not change by itself.
TRANSIENT: Final = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "EAGAIN", "EINTR", "ESTALE", "ETIMEDOUT", "EBUSY", "ENOLCK", "EREMOTEIO", "ENOBUFS", "ENOMEM"),
        *("ECONNRESET", "ECONNABORTED", "ENETDOWN", "ENETUNREACH", "ENETRESET", "EHOSTUNREACH", "EHOSTDOWN", "ETXTBSY"),
    )
    if hasattr(errno, name)
)

#: Those of them after which a write may simply go on. EIO and its like may be about bytes that were written before, and
#: that the system has dropped since: then the whole file is written again, by the task.
UNWRITTEN: Final = frozenset((errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ENOBUFS, errno.ENOMEM))

#: Seconds before each new try of one call (chosen: a hiccup passes, and a broken disk is noticed within a second).
CALL_DELAYS: tuple[float, ...] = (0.05, 0.2, 0.8)

#: Seconds before a task is done again as a whole (chosen: a server that restarts within half a minute is waited for).
TASK_DELAYS: tuple[float, ...] = (0.5, 2.0, 8.0, 16.0)


class _Count:
    """Retries of this process so far; reading ahead retries in a thread of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.value = 0

    def add(self) -> None:
        with self._lock:
            self.value += 1


_count = _Count()


def retries() -> int:
    """How often this process has tried something again so far."""
    return _count.value


def note_retry(what: str, error: object, number: int, delay: float) -> None:
    """Log and count one retry.

    Args:
        what: what is tried again.
        error: why.
        number: which retry it is, from 1.
        delay: seconds until then.
    """
    _count.add()
    logger.warning("%s failed (%s); trying again in %.3g s (retry %d)", what, error, delay, number)


def retried(call: Callable[[], Result], action: str, path: Path, passing: Collection[int] = TRANSIENT) -> Result:
    """Call something that may fail for a moment; back off exponentially between tries.

    Only for what may be repeated as it is. A failed sync is not: it may have dropped the pages that it should have
    written, so the whole file is written again, by the task (:data:`TASK_DELAYS`).

    Args:
        call: the call.
        action: what it does, for the log.
        path: to which file.
        passing: numbers of the errors after which it is tried again.

    Raises:
        OSError: the last one, or at once one that does not pass by itself.
    """
    for number, delay in enumerate(CALL_DELAYS, start=1):
        try:
            return call()
        except OSError as error:
            if error.errno not in passing:
                raise
            note_retry(f"{action} {path}", error.strerror or error, number, delay)
        time.sleep(delay)
    return call()


def storage_error(action: str, path: Path | str, error: OSError) -> StorageError:
    """Say what failed on which file, and what to do about it.

    Returns:
        A :class:`TransientStorageError` where doing the task again may help.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = "unknown"
        with suppress(OSError):
            stat = os.statvfs(Path(path).parent)
            free = format_bytes(stat.f_bavail * stat.f_frsize)
        return StorageError(
            f"the disk is full: {action} {path} failed with {free} free; make room and run the same command again, "
            "finished tiles are kept"
        )
    reason = error.strerror or str(error)
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return StorageError(
            f"{action} {path} failed: {reason}; make it writable and run the same command again, finished tiles are "
            "kept"
        )
    if error.errno in TRANSIENT:
        return TransientStorageError(f"{action} {path} failed: {reason}; run the same command again when it works")
    return StorageError(f"{action} {path} failed: {reason}")
