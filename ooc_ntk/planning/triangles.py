"""Triangle blocks: all pairs of some row tiles, so that a panel that is read meets every other one there.

Row tiles next to each other are put together to points, and every set of a cover (a line of a plane, where there is
one) is a triangle: all pairs of its points, and the pairs within one of them. Planes come in few sizes; so that a
triangle fills the memory whatever that is, points may take in only the first row tiles, and the others are a strip of
rectangles below them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from .planes import PLANES, cover
from .tiles import Range, count_tiles, even_ranges

#: Points and size of the sets worth pricing: finite planes; of the sizes between them, covers in which some pairs fill
#: no set, found by counting the panels of all covers of up to 450 points at 90 sizes of memory.
COVERS: Final = {
    **PLANES,
    169: 13,
    183: 14,
    256: 16,
    273: 17,
    289: 17,
    307: 18,
    361: 19,
    381: 20,
    12: 4,
    20: 5,
    30: 6,
    56: 8,
    115: 5,
    138: 6,
    174: 6,
}


@dataclass(frozen=True)
class Triangles:
    """How the train square is cut into triangles.

    Attributes:
        points: of the cover.
        size: points of its largest sets.
        tiles: row tiles that the points take in, the first ones.

    >>> Triangles(7, 3, 14).each, Triangles(7, 3, 14).largest, Triangles(7, 3, 14).loads
    (2, 15, 42)
    """

    points: int
    size: int
    tiles: int

    @property
    def each(self) -> int:
        """Row tiles of the largest point."""
        return count_tiles(self.tiles, self.points)

    @property
    def largest(self) -> int:
        """Most kernel tiles of a triangle."""
        return self.size * (self.size - 1) // 2 * self.each**2 + self.each * (self.each + 1) // 2

    @property
    def live(self) -> int:
        """Most panels of a triangle, all of which are in memory at once."""
        return self.size * self.each

    @property
    def loads(self) -> int:
        """Panels that are needed in all, where every point has as many row tiles."""
        return set_members(self.points, self.size)[0] * self.each + len(_alone(self.points, self.size)) * self.each

    @property
    def count(self) -> int:
        """Triangles."""
        return set_members(self.points, self.size)[1] + len(_alone(self.points, self.size))

    def groups(self) -> list[list[tuple[int, int]]]:
        """Kernel tiles of every triangle."""
        cuts, sets = even_ranges(self.tiles, self.points), cover(self.points, self.size)
        homes = _homes(self.points, self.size)
        groups = []
        for number, members in enumerate(sets):
            pairs = [(a, b) for a in members for b in members if b < a or (b == a and homes.get(a) == number)]
            groups.append(sorted((i, j) for a, b in pairs for i in _of(cuts[a]) for j in _of(cuts[b]) if j <= i))
        alone = [cuts[point] for point in _alone(self.points, self.size)]
        return groups + [[(i, j) for i in _of(cut) for j in _of(cut) if j <= i] for cut in alone]

    @staticmethod
    def of(count: int, capacity: int) -> Triangles:
        """Triangles of at most so many kernel tiles whose points take in all row tiles, by a plane where one is small.

        >>> Triangles.of(14, 15), Triangles.of(14, 14)
        (Triangles(points=7, size=3, tiles=14), Triangles(points=14, size=5, tiles=14))
        """
        points = plane_of(count, capacity)
        if points is not None:
            return Triangles(points, PLANES[points], count)
        # A set of single row tiles holds one of the diagonal's tiles beside its pairs.
        return Triangles(count, (1 + math.isqrt(8 * capacity - 7)) // 2, count)


def triangle_tiles(count: int, points: int) -> int:
    """Most kernel tiles of a triangle, where row tiles are put together to the points of a plane.

    >>> triangle_tiles(7, 7), triangle_tiles(14, 7)
    (4, 15)
    """
    return Triangles(points, PLANES[points], count).largest


def plane_of(count: int, capacity: int) -> int | None:
    """Points of the plane that needs the fewest panels among those whose triangles hold at most so many kernel tiles.

    >>> plane_of(14, 15), plane_of(14, 14), plane_of(5, 10)
    (7, None, None)
    """
    able = (points for points in PLANES if points <= count and triangle_tiles(count, points) <= capacity)
    return min(able, key=lambda points: ((points - 1) // (PLANES[points] - 1), points), default=None)


@lru_cache(maxsize=256)
def set_members(points: int, size: int) -> tuple[int, int]:
    """Members of all sets of a cover, each counted as often as it is in one, and sets.

    >>> set_members(7, 3)
    (21, 7)
    """
    sets = cover(points, size)
    return sum(map(len, sets)), len(sets)


def _of(cut: Range) -> range:
    return range(cut.start, cut.stop)


def _alone(points: int, size: int) -> list[int]:
    """Points whose inner pairs no set takes in."""
    homes = _homes(points, size)
    return [point for point in range(points) if point not in homes]


@lru_cache(maxsize=256)
def _homes(count: int, size: int) -> dict[int, int]:
    """The set with which the pairs within each point are contracted: none takes in two, as far as that goes.

    A matching by augmenting paths.
    """
    sets: Sequence[Sequence[int]] = cover(count, size)
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
