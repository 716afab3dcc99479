"""Reading ahead: a thread loads the next tiles while the present ones are multiplied."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from ooc_ntk.planning.memory import READ_SLOTS

from .stores import Matrix

Loaded = TypeVar("Loaded")


def prefetched(
    keys: Sequence[int],
    load: Callable[[int, tuple[Matrix | None, ...]], Loaded],
    make_buffer: Callable[[], Matrix | None],
    sides: int,
) -> Iterator[Loaded]:
    """Load every key in order, one ahead of the consumer, through a ring of reused buffers.

    Args:
        keys: what to load.
        load: loads a key into one buffer per side and returns what the consumer wants; its result is valid until
            the consumer asks for the next one.
        make_buffer: allocates a buffer, or returns None where loading needs none (then nothing is threaded).
        sides: buffers per slot.

    Yields:
        The loaded values, in order. An exception of ``load`` is raised here.
    """
    first = make_buffer()
    if first is None:
        for key in keys:
            yield load(key, (None,) * sides)
        return
    slots = [tuple(make_buffer() for _ in range(sides)) for _ in range(min(READ_SLOTS, len(keys)) - 1)]
    slots.append((first, *(make_buffer() for _ in range(sides - 1))))
    free: queue.Queue[tuple[Matrix | None, ...] | None] = queue.Queue()
    for slot in slots:
        free.put(slot)
    ready: queue.Queue[tuple[Loaded, tuple[Matrix | None, ...]] | BaseException] = queue.Queue()

    def read() -> None:
        try:
            for key in keys:
                slot = free.get()
                if slot is None:
                    return
                ready.put((load(key, slot), slot))
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, which raises it
            ready.put(error)

    thread = threading.Thread(target=read, name="ooc-ntk-reader", daemon=True)
    thread.start()
    try:
        for _ in keys:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            value, slot = item
            yield value
            free.put(slot)
    finally:
        free.put(None)
        thread.join()
