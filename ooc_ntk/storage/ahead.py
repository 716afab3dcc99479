"""Reading ahead: a thread loads the next pieces while the present ones are multiplied."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Hashable, Sequence
from types import TracebackType
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Loaded = TypeVar("Loaded")
Buffer = TypeVar("Buffer")


class ReadAhead(Generic[Key, Loaded, Buffer]):
    """Loads keys in order, as far ahead of their consumer as there are free buffers.

    A context manager: on leaving, the thread is ended and every buffer free again.
    """

    def __init__(
        self,
        keys: Sequence[Key],
        load: Callable[[Key, Buffer | None], Loaded],
        buffers: Sequence[Buffer],
        stays: Callable[[Key], bool] = lambda key: False,  # noqa: ARG005
    ) -> None:
        """Start reading.

        Args:
            keys: what to load.
            load: loads a key into a buffer and returns what the consumer wants, a view of it.
            buffers: reused buffers; with none (tiles are in memory) loading takes no thread.
            stays: whether a key is loaded into memory of its own, so that it takes no buffer.
        """
        self._keys, self._load, self._stays = list(keys), load, stays
        self._next = 0
        self._threaded = bool(buffers)
        self._holding: dict[Key, Buffer] = {}
        self._free: queue.Queue[Buffer | None] = queue.Queue()
        self._ready: queue.Queue[tuple[Loaded, Buffer | None] | BaseException] = queue.Queue()
        for buffer in buffers:
            self._free.put(buffer)
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        if self._threaded and self._keys:
            self._thread = threading.Thread(target=self._read, name="ooc-ntk-reader", daemon=True)
            self._thread.start()

    def _read(self) -> None:
        try:
            for key in self._keys:
                buffer = None if self._stays(key) else self._free.get()
                if self._ended.is_set():
                    return
                self._ready.put((self._load(key, buffer), buffer))
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, which raises it
            self._ready.put(error)

    def take(self) -> Loaded:
        """The next key's value, in order; an exception of ``load`` is raised here."""
        key = self._keys[self._next]
        self._next += 1
        if not self._threaded:
            return self._load(key, None)
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        value, buffer = item
        if buffer is not None:
            self._holding[key] = buffer
        return value

    def give_back(self, key: Key) -> None:
        """A value that was taken is not needed any more; its buffer is used again."""
        buffer = self._holding.pop(key, None)
        if buffer is not None:
            self._free.put(buffer)

    def __enter__(self) -> ReadAhead[Key, Loaded, Buffer]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._free.put(None)
        if self._thread is not None:
            self._thread.join()
