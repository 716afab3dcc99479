"""Superblocks: kernel tiles that are summed up together, so that a panel of the Jacobian is read once for all of them.

A panel is the part of one row tile in one span. While a superblock is contracted its kernel tiles stay in memory and
its panels stream by; panels that several superblocks need are read several times. How tiles are grouped therefore
decides how many bytes move. Squares of ``b × b`` samples read every panel ``⌈N/b⌉`` times. Triangles, all pairs of
some row tiles, do with √2 times less (Beaumont et al. 2022, arXiv 2202.10217); that every pair is in exactly one
triangle takes a combinatorial design, here the lines of affine and projective planes.
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

from .planes import PLANES, cover
from .tiles import Range, SampleGrid, count_tiles, even_ranges

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
    def of(cls, grid: SampleGrid, order: Order, capacity: int) -> Grouping:
        """Of :func:`superblocks` with the same arguments, without making them where formulas will do.

        >>> Grouping.of(SampleGrid(12, 0, 1), "square", 16)
        Grouping(tasks=6, tiles=16, buffers=7, loads=36)
        """
        train, rows = grid.column_tiles, grid.row_tiles - grid.column_tiles
        half = train * (train + 1) // 2
        if capacity == 1:
            count = grid.kernel_tile_count
            return cls(count, 1, 4 if count > 1 else 2, 2 * count - train)
        if grid.kernel_tile_count <= capacity:
            live = train + (1 if rows else 0)
            return cls(1, grid.kernel_tile_count, live + min(AHEAD, train + rows), train + rows)
        points = plane_of(train, capacity) if order == "triangle" else None
        if points is not None and not rows:
            side = PLANES[points]
            # A plane of order q has a line for every point, or with a point fewer on each q more.
            lines = points if points != side**2 else points + side
            live = side * count_tiles(train, points)
            return cls(lines, triangle_tiles(train, points), live + AHEAD, (points - 1) // (side - 1) * train)
        if order == "triangle":
            found = superblocks(grid, order, capacity)
            return cls(
                len(found),
                max(len(block.tiles) for block in found),
                max(block.buffers for block in found),
                panel_loads(found).total(),
            )
        if half <= capacity:
            square = cls(1, half, train + min(AHEAD, train), train)
        else:
            cuts = count_tiles(train, math.isqrt(capacity))
            high = count_tiles(train, cuts)
            second = high if train - cuts * (high - 1) > 1 else high - 1
            live = high + 1 if second > 1 else max(high, 2)  # of a single row each column is needed once
            square = cls(cuts * (cuts + 1) // 2, max(high * second, high * (high + 1) // 2), live + AHEAD, cuts * train)
        if not rows:
            return square
        height, width = _rectangle(train, rows, capacity)
        down, across = count_tiles(rows, height), count_tiles(train, width)
        high, wide = count_tiles(rows, down), count_tiles(train, across)
        return cls(
            square.tasks + down * across,
            max(square.tiles, high * wide),
            max(square.buffers, min(high, wide) + 1 + AHEAD),
            square.loads + across * rows + down * train,
        )


@lru_cache(maxsize=4)
def superblocks(
    grid: SampleGrid, order: Order = "square", capacity: int = 1, alone: frozenset[KernelTile] = frozenset()
) -> tuple[Superblock, ...]:
    """Group the kernel tiles of a grid.

    Args:
        grid: the sample grid.
        order: ``square`` or ``triangle``, for the train square; the test rows are cut into rectangles.
        capacity: most kernel tiles of one superblock.
        alone: tiles that are superblocks by themselves.

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
        square = _triangles if order == "triangle" else _squares
        groups = square(grid.column_tiles, capacity) + _rectangles(grid, capacity)
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


def _rectangles(grid: SampleGrid, capacity: int) -> list[list[KernelTile]]:
    """Tiles of test rows, in the rectangles that need the fewest panels."""
    train, rows = grid.column_tiles, grid.row_tiles - grid.column_tiles
    if not rows:
        return []

    height, width = _rectangle(train, rows, capacity)
    groups = []
    for high in even_ranges(rows, count_tiles(rows, height)):
        for wide in even_ranges(train, count_tiles(train, width)):
            across, down = range(wide.start, wide.stop), range(train + high.start, train + high.stop)
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


def triangle_tiles(count: int, points: int) -> int:
    """Most kernel tiles of a triangle, where row tiles are put together to the points of a plane.

    >>> triangle_tiles(7, 7), triangle_tiles(14, 7)
    (4, 15)
    """
    side, each = PLANES[points], count_tiles(count, points)
    return side * (side - 1) // 2 * each**2 + each * (each + 1) // 2


def plane_of(count: int, capacity: int) -> int | None:
    """Points of the plane that needs the fewest panels among those whose triangles hold at most so many kernel tiles.

    >>> plane_of(14, 15), plane_of(14, 14), plane_of(5, 10)
    (7, None, None)
    """
    able = (points for points in PLANES if points <= count and triangle_tiles(count, points) <= capacity)
    return min(able, key=lambda points: ((points - 1) // (PLANES[points] - 1), points), default=None)


def _triangles(count: int, capacity: int) -> list[list[KernelTile]]:
    """Tiles on and below the diagonal, in triangles of at most so many tiles.

    Row tiles next to each other are one point of a plane, and every line of it one triangle: all pairs of its points,
    and the pairs within one of them. Where no plane is small enough, sets of single row tiles hold every pair once.
    """
    points = plane_of(count, capacity)
    if points is None:
        side = (1 + math.isqrt(8 * capacity - 7)) // 2
        cuts, sets = even_ranges(count, count), cover(count, side)
    else:
        cuts, sets = even_ranges(count, points), cover(points, PLANES[points])
    homes = _homes(len(cuts), sets)
    groups = []
    for number, members in enumerate(sets):
        pairs = [(a, b) for a in members for b in members if b < a or (b == a and homes.get(a) == number)]
        tiles = [(i, j) for a, b in pairs for i in _of(cuts[a]) for j in _of(cuts[b]) if j <= i]
        groups.append(sorted(tiles))
    alone = [cut for number, cut in enumerate(cuts) if number not in homes]
    return groups + [[(i, j) for i in _of(cut) for j in _of(cut) if j <= i] for cut in alone]


def _of(cut: Range) -> range:
    return range(cut.start, cut.stop)


def _homes(count: int, sets: Sequence[Sequence[int]]) -> dict[int, int]:
    """The set with which the pairs within each member are contracted: no set takes in two, as far as that goes.

    A matching by augmenting paths.
    """
    holding: dict[int, int] = {}
    of: dict[int, list[int]] = {index: [] for index in range(count)}
    for number, members in enumerate(sets):
        for index in members:
            of[index].append(number)

    def place(index: int, tried: set[int]) -> bool:
        for number in of[index]:
            if number in tried:
                continue
            tried.add(number)
            if number not in holding or place(holding[number], tried):
                holding[number] = index
                return True
        return False

    for index in range(count):
        place(index, set())
    return {index: number for number, index in holding.items()}
