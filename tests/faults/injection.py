"""Faults at the file layer: the k-th call of a kind on the run's files fails, is cut short or ends the process."""

from __future__ import annotations

import builtins
import errno
import io
import itertools
import json
import os
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

Operation = Literal["write", "sync", "rename", "create", "read", "unlink", "statement", "commit"]
Action = Literal["kill-before", "kill-during", "kill-after", "error", "torn", "short"]

#: What fails as well once a lasting error has begun.
LASTING: Final[dict[int, frozenset[str]]] = {
    errno.ENOSPC: frozenset({"write", "create", "statement"}),
    errno.EROFS: frozenset({"write", "create", "rename", "unlink", "statement"}),
    errno.EIO: frozenset({"write", "sync", "read", "rename", "create", "unlink", "statement"}),
}

#: What SQLite says for the same errors.
SQLITE_SAYS: Final = {
    errno.ENOSPC: "database or disk is full",
    errno.EROFS: "attempt to write a readonly database",
    errno.EIO: "disk I/O error",
}

#: Statements that change the manifest; those that read it are left alone, and a rollback cannot fail.
CHANGING: Final = ("BEGIN", "INSERT", "UPDATE", "DELETE", "CREATE", "COMMIT")


@dataclass(frozen=True)
class Injection:
    """One fault at the file layer.

    Attributes:
        operation: what is counted. ``statement`` and ``commit`` are those of the manifest's database.
        action: what happens at that call. ``torn`` does half of it and then fails, ``short`` does half of it and says
            so, as POSIX allows.
        call: which call, from 1.
        error: errno of ``error`` and ``torn``.
        lasting: whether everything that the error concerns fails from then on.
        delay: seconds from the call's beginning to ``kill-during``.
    """

    operation: Operation
    action: Action
    call: int
    error: int = 0
    lasting: bool = False
    delay: float = 0.0

    def to_json(self) -> str:
        """Serialise."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Injection:
        """Read what :meth:`to_json` wrote."""
        return cls(**json.loads(text))


class FileLayer:
    """Stands between this process and the files of a run directory, until the process ends."""

    def __init__(self, root: Path, injection: Injection | None, fired: Path) -> None:
        """Nothing is patched yet.

        Args:
            root: the run directory; files elsewhere are left alone.
            injection: the fault, or None to count calls only.
            fired: a file that is made when the fault strikes.
        """
        self.counts: Counter[str] = Counter()
        self._root = str(root.absolute())
        self._injection, self._fired = injection, fired
        self._descriptors: set[int] = set()
        self._lock = threading.Lock()
        self._failing = False
        self._open, self._kill = os.open, os.kill

    def _ours(self, path: Any) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        text = os.fsdecode(path)
        return text == self._root or text.startswith(self._root + os.sep)

    def _strikes(self, operations: Sequence[str]) -> bool:
        """Count a call; whether the fault strikes at it."""
        with self._lock:
            self.counts.update(operations)
            chosen = self._injection
            return (
                chosen is not None and chosen.operation in operations and self.counts[chosen.operation] == chosen.call
            )

    def around(
        self, operations: Sequence[Operation], act: Callable[[], Any], half: Callable[[], Any] = lambda: None
    ) -> Any:
        """Do one call, or what the fault makes of it.

        Args:
            operations: what the call counts as.
            act: does it.
            half: does half of it.
        """
        chosen = self._injection
        strikes = self._strikes(operations)
        if chosen is None:
            return act()
        if not strikes:
            if self._failing and not LASTING[chosen.error].isdisjoint(operations):
                raise self._error(operations)
            return act()
        os.close(self._open(self._fired, os.O_CREAT | os.O_WRONLY))
        self._failing = chosen.lasting
        if chosen.action == "kill-before":
            self._die()
        if chosen.action == "kill-during":
            threading.Thread(target=self._die, args=(chosen.delay,), daemon=True).start()
        if chosen.action == "short":
            return half()
        if chosen.action == "torn":
            half()
        if chosen.action in ("torn", "error"):
            raise self._error(operations)
        try:
            return act()
        finally:  # a folder that is there already is a call as well
            if chosen.action == "kill-after":
                self._die()

    def _die(self, delay: float = 0.0) -> None:
        end = time.perf_counter() + delay
        while time.perf_counter() < end:
            pass
        self._kill(os.getpid(), signal.SIGKILL)

    def _error(self, operations: Sequence[str]) -> Exception:
        assert self._injection is not None
        number = self._injection.error
        if "statement" in operations:
            return sqlite3.OperationalError(SQLITE_SAYS[number])
        return OSError(number, os.strerror(number))

    def install(self) -> None:
        """Patch ``os``, ``io.open`` and ``sqlite3.connect``."""
        self._install_descriptors()
        self._install_paths()
        opener = self._opener(io.open)
        io.open = builtins.open = opener  # type: ignore[assignment]
        layer = self

        class Database(sqlite3.Connection):
            def execute(self, sql: str, *given: Any) -> sqlite3.Cursor:
                return layer._statement(sql, lambda: super(Database, self).execute(sql, *given))

            def executemany(self, sql: str, *given: Any) -> sqlite3.Cursor:
                return layer._statement(sql, lambda: super(Database, self).executemany(sql, *given))

        connect = sqlite3.connect
        sqlite3.connect = lambda *given, **more: connect(*given, factory=Database, **more)  # type: ignore[assignment]

    def _statement(self, sql: str, act: Callable[[], Any]) -> Any:
        word = sql.split(maxsplit=1)[0].upper() if sql.strip() else ""
        if word not in CHANGING:
            return act()
        return self.around(("statement", "commit") if word == "COMMIT" else ("statement",), act)

    def _install_paths(self) -> None:
        """Calls that name files of the run directory; ``rmtree`` names them relative to an open folder."""
        for name, operation in (
            ("replace", "rename"),
            ("rename", "rename"),
            ("link", "rename"),
            ("unlink", "unlink"),
            ("remove", "unlink"),
            ("mkdir", "create"),
        ):
            original = getattr(os, name)

            def call(
                path: Any, *given: Any, _original: Any = original, _operation: Any = operation, **more: Any
            ) -> Any:
                if not self._ours(path) and more.get("dir_fd") is None:
                    return _original(path, *given, **more)
                return self.around((_operation,), lambda: _original(path, *given, **more))

            setattr(os, name, call)

        def opened(path: Any, flags: int, *given: Any, **more: Any) -> int:
            if not self._ours(path):
                return self._open(path, flags, *given, **more)
            act = lambda: self._open(path, flags, *given, **more)  # noqa: E731
            found: int = self.around(("create",), act) if flags & os.O_CREAT else act()
            self._descriptors.add(found)
            return found

        close = os.close

        def closed(descriptor: int) -> None:
            self._descriptors.discard(descriptor)
            close(descriptor)

        os.open, os.close = opened, closed  # type: ignore[assignment]

    def _install_descriptors(self) -> None:
        """Calls on open files."""
        halves: dict[str, tuple[Operation, Callable[..., Any] | None]] = {
            "write": ("write", lambda call, fd, data: call(fd, memoryview(data).cast("B")[: -(-len(data) // 2)])),
            "pwrite": (
                "write",
                lambda call, fd, data, at: call(fd, memoryview(data).cast("B")[: -(-len(data) // 2)], at),
            ),
            "writev": ("write", lambda call, fd, parts: call(fd, half_of(parts))),
            "pwritev": ("write", lambda call, fd, parts, at, *flags: call(fd, half_of(parts), at, *flags)),
            "read": ("read", lambda call, fd, count: call(fd, aligned_half(count))),
            "pread": ("read", lambda call, fd, count, at: call(fd, aligned_half(count), at)),
            "readv": ("read", lambda call, fd, parts: call(fd, half_of(parts))),
            "preadv": ("read", lambda call, fd, parts, at, *flags: call(fd, half_of(parts), at, *flags)),
            "fsync": ("sync", None),
            "fdatasync": ("sync", None),
        }
        for name, (operation, half) in halves.items():
            if hasattr(os, name):
                setattr(os, name, self._descriptor_call(getattr(os, name), operation, half))

    def _descriptor_call(self, original: Any, operation: Operation, half: Callable[..., Any] | None) -> Any:
        def call(descriptor: int, *given: Any) -> Any:
            if descriptor not in self._descriptors:
                return original(descriptor, *given)
            act = lambda: original(descriptor, *given)  # noqa: E731
            return self.around((operation,), act, act if half is None else lambda: half(original, descriptor, *given))

        return call

    def _opener(self, original: Any) -> Any:
        """``open`` whose files of the run directory read and write through this layer."""
        layer = self

        class File(io.FileIO):
            def readinto(self, buffer: Any) -> Any:
                part = memoryview(buffer).cast("B")
                shorter = part[: max(1, len(part) // 2)]
                read = super().readinto
                return layer.around(("read",), lambda: read(part), lambda: read(shorter))

            def read(self, size: int | None = -1) -> Any:
                act = lambda: super(File, self).read(-1 if size is None else size)  # noqa: E731
                return layer.around(("read",), act, act)

            def readall(self) -> Any:
                act = super().readall
                return layer.around(("read",), act, act)

            def write(self, data: Any) -> Any:
                part = memoryview(data).cast("B")
                write = super().write
                return layer.around(("write",), lambda: write(part), lambda: write(part[: -(-len(part) // 2)]))

        def opened(
            file: Any,
            mode: str = "r",
            buffering: int = -1,
            encoding: str | None = None,
            errors: str | None = None,
            newline: str | None = None,
            closefd: bool = True,
            opener: Any = None,
        ) -> Any:
            if not layer._ours(file):
                return original(file, mode, buffering, encoding, errors, newline, closefd, opener)
            writing = any(letter in mode for letter in "wax+")
            act = lambda: File(file, mode.replace("b", "").replace("t", ""), opener=opener)  # noqa: E731
            raw = layer.around(("create",), act) if writing else act()
            if buffering == 0:
                return raw
            kind = io.BufferedRandom if "+" in mode else io.BufferedWriter if writing else io.BufferedReader
            buffered: Any = kind(raw)
            if "b" in mode:
                return buffered
            text = io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline)
            text.mode = mode  # type: ignore[misc]
            return text

        return opened


def half_of(parts: Sequence[Any]) -> list[memoryview]:
    """Buffers of about half of the bytes."""
    views = [memoryview(part).cast("B") for part in parts]
    left = aligned_half(sum(len(view) for view in views))
    sums = itertools.accumulate((len(view) for view in views), initial=0)
    return [view[: max(0, left - before)] for view, before in zip(views, sums, strict=False) if left > before]


def aligned_half(count: int) -> int:
    """About half of a number of bytes: whole pages, so that reading past the page cache stays possible."""
    return count // 2 // 4096 * 4096 or count
