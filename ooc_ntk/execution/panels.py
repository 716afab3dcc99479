"""The panels of a superblock: read once per span, ahead into reused buffers, or kept in memory."""

from __future__ import annotations

from ooc_ntk.planning.superblocks import Superblock
from ooc_ntk.storage.ahead import ReadAhead

from .context import RunContext
from .stores import Matrix, Tile


class Panels:
    """The panels of a superblock, each read once per span: ahead into reused buffers, or kept in memory.

    A context manager.

    Attributes:
        bytes_read: bytes read from disk so far.
    """

    def __init__(self, context: RunContext, generation: int, block: Superblock, start: int) -> None:
        """Begin reading.

        Args:
            context: what the tasks of this process share.
            generation: pass.
            block: the superblock.
            start: first span that is wanted.
        """
        plan, store = context.plan, context.store
        spans = plan.passes[generation]
        self._context, self._block, self._held = context, block, dict[int, Tile]()
        self._kept, self._first = context.kept, spans.start
        self.bytes_read = 0
        keys = [(s, r) for s in range(start, spans.stop) for r in block.panels if (s, r) not in self._kept]

        def load(key: tuple[int, int], buffer: Matrix | None) -> Tile:
            span, row = key
            if buffer is None and self._stays(key):
                buffer = store.buffer(span)
            return store.load(generation, row, span, buffer)

        buffers = context.panel_buffers(min(block.buffers, len(keys)))
        self._ahead = ReadAhead(keys, load, buffers, self._stays)

    def _stays(self, key: tuple[int, int]) -> bool:
        span, row = key
        return self._context.plan.kept_panels.holds(row, span - self._first)

    def get(self, span: int, row: int) -> Tile:
        """A panel; it must be asked for in the order of the superblock's tiles."""
        found = self._held.get(row)
        if found is None:
            found = self._kept.get((span, row))
            if found is None:
                with self._context.phase("wait for tiles"):
                    found = self._ahead.take()
                self.bytes_read += self._context.store.load_bytes(span)
                if self._stays((span, row)):
                    self._kept[span, row] = found
            self._held[row] = found
        return found

    def contracted(self, span: int, number: int) -> None:
        """Tile ``number`` of the superblock is contracted: panels that no later one needs may go."""
        for row in set(self._block.tiles[number]):
            if self._block.last_uses[row] == number:
                del self._held[row]
                self._ahead.give_back((span, row))

    def __enter__(self) -> Panels:
        return self

    def __exit__(self, *error: object) -> None:
        self._ahead.__exit__(None, None, None)
