"""Superblocks: kernel tiles that are summed up together, so that a panel of the Jacobian is read once for all of them.

A panel is the part of one row tile in one span. While a superblock is contracted its kernel tiles stay in memory and
its panels stream by; panels that several superblocks need are read several times. How tiles are grouped therefore
decides how many bytes move. Squares of ``b × b`` samples read every panel ``⌈N/b⌉`` times. Triangles, all pairs of
some row tiles, do with √2 times less (Beaumont et al. 2022, arXiv 2202.10217); that every pair is in exactly one
triangle takes a combinatorial design, here mostly the lines of affine and projective planes.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Final, Literal

from .tiles import SampleGrid, count_tiles, even_ranges
from .triangles import COVERS, Triangles

Order = Literal["square", "triangle"]
ORDERS: Final[tuple[Order, ...]] = ("square", "triangle")

#: Panels that are read ahead while others are multiplied.
AHEAD: Final = 2

KernelTile = tuple[int, int]


@dataclass(frozen=True)
class Superblock:
    """Kernel tiles that one task contracts together.

    Attributes:
        tiles: kernel tiles (row tile, column tile), in the order in which they are contracted.

    >>> block = Superblock(((4, 0), (4, 1), (5, 0), (5, 1)))
    >>> block.name, block.panels, block.live
    ((4, 0), (4, 0, 1, 5), 3)
    """

    tiles: tuple[KernelTile, ...]

    @property
    def name(self) -> KernelTile:
        """Its first tile, which names its task."""
        return self.tiles[0]

    @cached_property
    def panels(self) -> tuple[int, ...]:
        """Row tiles whose panels it needs, in the order in which they are first needed."""
        return tuple(dict.fromkeys(index for tile in self.tiles for index in tile))

    @cached_property
    def last_uses(self) -> dict[int, int]:
        """Number of the tile after which a panel is not needed any more, by row tile."""
        return {index: number for number, tile in enumerate(self.tiles) for index in tile}

    @cached_property
    def live(self) -> int:
        """Panels that are in memory at once, without those read ahead."""
        held, most = set[int](), 0
        for number, tile in enumerate(self.tiles):
            held |= set(tile)
            most = max(most, len(held))
            held = {index for index in held if self.last_uses[index] > number}
        return most

    @property
    def buffers(self) -> int:
        """Panels that are in memory at once, those read ahead among them."""
        return self.live + min(AHEAD, len(self.panels))


def panel_loads(blocks: Iterable[Superblock]) -> Counter[int]:
    """How often the panels of each row tile are needed."""
    return Counter(index for block in blocks for index in block.panels)


@dataclass(frozen=True)
class KeptPanels:
    """Panels that stay in memory once they were read.

    Attributes:
        rows: row tiles of which all panels stay.
        partial: a row tile of which only the first spans stay, None if there is none.
        spans: how many of them.
        bytes: memory that they take.
        saved_bytes: bytes that need not be read again.
    """

    rows: frozenset[int] = frozenset()
    partial: int | None = None
    spans: int = 0
    bytes: int = 0
    saved_bytes: int = 0

    def holds(self, row: int, span: int) -> bool:
        """Whether a panel stays, by its row tile and its span counted from the first of the pass."""
        return row in self.rows or (row == self.partial and span < self.spans)


def kept_panels(loads: Mapping[int, int], sizes: Sequence[int], room: int) -> KeptPanels:
    """The panels worth keeping: those that are needed most often.

    What is read in turns again and again is of no use to a cache that drops what was used longest ago; here the same
    panels stay from the first to the last superblock.

    Args:
        loads: how often the panels of each row tile are needed.
        sizes: bytes of the panel of each span.
        room: bytes of memory.

    >>> kept = kept_panels({0: 2, 1: 3, 2: 1}, [10, 10], 35)
    >>> sorted(kept.rows), kept.partial, kept.spans, kept.bytes, kept.saved_bytes
    ([1], 0, 1, 30, 50)
    """
    whole, used, saved, rows = sum(sizes), 0, 0, set()
    for row, count in sorted(loads.items(), key=lambda item: (-item[1], item[0])):
        if count < 2:
            break
        if used + whole <= room:
            rows.add(row)
            used, saved = used + whole, saved + (count - 1) * whole
            continue
        ends = list(accumulate(sizes))
        spans = bisect_right(ends, room - used)
        part = ends[spans - 1] if spans else 0
        return KeptPanels(frozenset(rows), row if spans else None, spans, used + part, saved + (count - 1) * part)
    return KeptPanels(frozenset(rows), None, 0, used, saved)


@dataclass(frozen=True)
class Grouping:
    """Superblocks in numbers, for pricing many of them.

    Attributes:
        tasks: superblocks.
        tiles: most kernel tiles of one.
        buffers: most panels that are in memory at once, those read ahead among them.
        loads: panels that are needed in all.
    """

    tasks: int
    tiles: int
    buffers: int
    loads: int

    @classmethod
    @lru_cache(maxsize=4096)
    def of(cls, grid: SampleGrid, order: Order, capacity: int, triangles: Triangles | None = None) -> Grouping:
        """Of :func:`superblocks` with the same arguments, without making them where formulas will do.

        >>> Grouping.of(SampleGrid(12, 0, 1), "square", 16)
        Grouping(tasks=6, tiles=16, buffers=7, loads=36)
        """
        train, rows = grid.column_tiles, grid.row_tiles - grid.column_tiles
        if capacity == 1:
            count = grid.kernel_tile_count
            return cls(count, 1, 4 if count > 1 else 2, 2 * count - train)
        if grid.kernel_tile_count <= capacity:
            live = train + (1 if rows else 0)
            return cls(1, grid.kernel_tile_count, live + min(AHEAD, train + rows), train + rows)
        if order == "triangle":
            return cls._of_triangles(grid, capacity, triangles or Triangles.of(train, capacity))
        square = cls._of_squares(train, capacity)
        return square + cls._of_rectangles(train, rows, capacity) if rows else square

    def __add__(self, other: Grouping) -> Grouping:
        """Superblocks of both."""
        return Grouping(
            self.tasks + other.tasks,
            max(self.tiles, other.tiles),
            max(self.buffers, other.buffers),
            self.loads + other.loads,
        )

    @classmethod
    def _of_squares(cls, train: int, capacity: int) -> Grouping:
        half = train * (train + 1) // 2
        if half <= capacity:
            return cls(1, half, train + min(AHEAD, train), train)
        cuts = count_tiles(train, math.isqrt(capacity))
        high = count_tiles(train, cuts)
        second = high if train - cuts * (high - 1) > 1 else high - 1
        live = high + 1 if second > 1 else max(high, 2)  # of a single row each column is needed once
        return cls(cuts * (cuts + 1) // 2, max(high * second, high * (high + 1) // 2), live + AHEAD, cuts * train)

    @classmethod
    def _of_rectangles(cls, train: int, rows: int, capacity: int) -> Grouping:
        height, width = _rectangle(train, rows, capacity)
        down, across = count_tiles(rows, height), count_tiles(train, width)
        high, wide = count_tiles(rows, down), count_tiles(train, across)
        return cls(down * across, high * wide, min(high, wide) + 1 + AHEAD, across * rows + down * train)

    @classmethod
    def _of_strip(cls, train: int, rows: int, capacity: int) -> Grouping:
        last = _last_columns(train, rows, capacity)
        if last is None:
            return cls._of_rectangles(train, rows, capacity) + cls._of_squares(rows, capacity)
        before = count_tiles(train - last, capacity // rows)
        wide = count_tiles(train - last, before) if before else 0
        tiles = max(wide * rows, last * rows + rows * (rows + 1) // 2)
        return cls(before + 1, tiles, rows + 1 + AHEAD, before * rows + train + rows)

    @classmethod
    def _of_triangles(cls, grid: SampleGrid, capacity: int, triangles: Triangles) -> Grouping:
        if triangles.tiles % triangles.points or COVERS.get(triangles.points) != triangles.size:
            # Triangles are of different sizes.
            made = superblocks(grid, "triangle", capacity, triangles=triangles)
            largest, buffers = max(len(block.tiles) for block in made), max(block.buffers for block in made)
            return cls(len(made), largest, buffers, panel_loads(made).total())
        found = cls(triangles.count, triangles.largest, triangles.live + AHEAD, triangles.loads)
        rest, rows = grid.column_tiles - triangles.tiles, grid.row_tiles - grid.column_tiles
        if rest:
            found += cls._of_strip(triangles.tiles, rest, capacity)
        return found + cls._of_rectangles(grid.column_tiles, rows, capacity) if rows else found


@lru_cache(maxsize=4)
def superblocks(
    grid: SampleGrid,
    order: Order = "square",
    capacity: int = 1,
    alone: frozenset[KernelTile] = frozenset(),
    triangles: Triangles | None = None,
) -> tuple[Superblock, ...]:
    """Group the kernel tiles of a grid.

    Args:
        grid: the sample grid.
        order: ``square`` or ``triangle``, for the train square; the test rows are cut into rectangles.
        capacity: most kernel tiles of one superblock.
        alone: tiles that are superblocks by themselves.
        triangles: how the train square is cut with ``triangle``; None takes a plane whose points take in all of it.

    Returns:
        Superblocks; every kernel tile is in exactly one. With ``square`` those with tiles on the diagonal come first,
        and an off-diagonal one never holds a tile of the diagonal.

    >>> [block.tiles for block in superblocks(SampleGrid(4, 0, 1), capacity=4)]
    ... # doctest: +NORMALIZE_WHITESPACE
    [((0, 0), (1, 0), (1, 1)), ((2, 2), (3, 2), (3, 3)), ((2, 0), (2, 1), (3, 0), (3, 1))]
    >>> len(superblocks(SampleGrid(7, 0, 1), "triangle", capacity=4))
    7
    """
    tiles = list(grid.kernel_tiles())
    groups: list[list[KernelTile]]
    if capacity == 1:
        groups = [[tile] for tile in sorted(tiles, key=_diagonal_first)]
    elif len(tiles) <= capacity:
        groups = [tiles]
    else:
        train = grid.column_tiles
        if order == "triangle":
            triangles = triangles or Triangles.of(train, capacity)
            groups = triangles.groups() + _strip(train, triangles.tiles, capacity)
        else:
            groups = _squares(train, capacity)
        groups += _rectangles(train, range(train, grid.row_tiles), capacity)
    rest = [[tile for tile in group if tile not in alone] for group in groups] if alone else groups
    return tuple(
        Superblock(tuple(group)) for group in [*([tile] for tile in sorted(alone, key=_diagonal_first)), *rest] if group
    )


def _diagonal_first(tile: KernelTile) -> tuple[bool, KernelTile]:
    """Sorts tiles: what others are divided by comes before them."""
    return tile[0] != tile[1], tile


def _squares(count: int, capacity: int) -> list[list[KernelTile]]:
    """Tiles on and below the diagonal, in squares of at most so many tiles; the diagonal ones first."""
    if count * (count + 1) // 2 <= capacity:
        return [[(i, j) for i in range(count) for j in range(i + 1)]]
    cuts = even_ranges(count, count_tiles(count, math.isqrt(capacity)))
    inner = [[(i, j) for i in range(cut.start, cut.stop) for j in range(cut.start, i + 1)] for cut in cuts]
    outer = []
    for number, rows in enumerate(cuts):
        # To and fro, so that the columns read last are the first of the next square.
        others = cuts[:number] if number % 2 else cuts[:number][::-1]
        outer += [
            [(i, j) for i in range(rows.start, rows.stop) for j in range(columns.start, columns.stop)]
            for columns in others
        ]
    return inner + outer


def _strip(count: int, start: int, capacity: int) -> list[list[KernelTile]]:
    """Tiles on and below the diagonal in rows from ``start`` on: rectangles beside it, and squares along it."""
    rows = range(start, count)
    along = [[(start + i, start + j) for i, j in tiles] for tiles in _squares(len(rows), capacity)]
    last = _last_columns(start, len(rows), capacity)
    if last is None:
        return _rectangles(start, rows, capacity) + [tiles for tiles in along if tiles]
    width = capacity // len(rows)
    cuts = even_ranges(start - last, count_tiles(start - last, width)) if last < start else ()
    beside = [[(i, j) for j in range(cut.start, cut.stop) for i in rows] for cut in cuts]
    return [*beside, [*((i, j) for j in range(start - last, start) for i in rows), *along[0]]]


def _last_columns(train: int, rows: int, capacity: int) -> int | None:
    """Columns of a strip's last rectangle, if the rows' own pairs fit it as well and no rectangle more is needed."""
    if not rows or _rectangle(train, rows, capacity)[0] < rows:
        return None
    last = min(train, (capacity - rows * (rows + 1) // 2) // rows)
    width = capacity // rows
    return last if last > 0 and count_tiles(train - last, width) < count_tiles(train, width) else None


def _rectangles(train: int, rows: range, capacity: int) -> list[list[KernelTile]]:
    """Tiles of some rows and the first ``train`` columns, in the rectangles that need the fewest panels."""
    if not rows:
        return []

    height, width = _rectangle(train, len(rows), capacity)
    groups = []
    for high in even_ranges(len(rows), count_tiles(len(rows), height)):
        for wide in even_ranges(train, count_tiles(train, width)):
            across, down = range(wide.start, wide.stop), rows[high.start : high.stop]
            # The longer side streams by while the shorter one is held.
            if len(across) <= len(down):
                groups.append([(i, j) for i in down for j in across])
            else:
                groups.append([(i, j) for j in across for i in down])
    return groups


def _rectangle(train: int, rows: int, capacity: int) -> tuple[int, int]:
    """Height and width, in tiles, of rectangles that need the fewest panels."""

    def loads(height: int) -> int:
        width = min(train, capacity // height)
        return count_tiles(train, width) * rows + count_tiles(rows, height) * train

    height = min(range(1, min(rows, capacity) + 1), key=lambda wanted: (loads(wanted), wanted))
    return height, min(train, capacity // height)
