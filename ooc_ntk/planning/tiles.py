"""Tiles: how samples and columns are cut, and which kernel tiles are computed and which are mirrored."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass


def count_tiles(total: int, size: int) -> int:
    """Number of tiles of ``size`` that cover ``total``.

    >>> count_tiles(10, 4), count_tiles(8, 4), count_tiles(0, 4)
    (3, 2, 0)
    """
    return -(-total // size)


def even_size(total: int, largest: int) -> int:
    """The size not above ``largest`` that cuts ``total`` into the fewest, most equal tiles.

    Equal tiles waste no padding and no arithmetic on a narrow last one.

    >>> even_size(100, 60), even_size(100, 100), even_size(100, 33)
    (50, 100, 25)
    """
    return count_tiles(total, count_tiles(total, min(total, largest)))


@dataclass(frozen=True)
class Range:
    """A half-open range of samples or columns."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"[{self.start}:{self.stop}]"


@dataclass(frozen=True)
class SampleGrid:
    """Samples cut into tiles: rows are train then test samples, columns are train samples.

    Kernel tile ``(i, j)`` covers the samples of row tile i and the train samples of column tile j. Only tiles with
    ``i >= j`` are computed; the train part of one below the diagonal is also stored transposed at ``(j, i)``.

    Attributes:
        train: train samples.
        test: test samples.
        tile: samples per tile.

    >>> grid = SampleGrid(train=5, test=3, tile=2)
    >>> grid.row_tiles, grid.column_tiles
    (4, 3)
    >>> list(grid.kernel_tiles())
    [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (3, 2)]
    >>> grid.mirror_rows(2), grid.mirror_rows(3)
    (1, 0)
    """

    train: int
    test: int
    tile: int

    @property
    def row_tiles(self) -> int:
        """Tiles along the rows (train and test samples)."""
        return count_tiles(self.train + self.test, self.tile)

    @property
    def column_tiles(self) -> int:
        """Tiles along the columns (train samples)."""
        return count_tiles(self.train, self.tile)

    def rows(self, index: int) -> Range:
        """Samples of row tile ``index``."""
        return Range(index * self.tile, min((index + 1) * self.tile, self.train + self.test))

    def columns(self, index: int) -> Range:
        """Train samples of column tile ``index``."""
        return Range(index * self.tile, min((index + 1) * self.tile, self.train))

    @property
    def kernel_tile_count(self) -> int:
        """Number of kernel tiles that are computed."""
        square = self.column_tiles
        return square * (square + 1) // 2 + (self.row_tiles - square) * square

    def kernel_tiles(self) -> Iterator[tuple[int, int]]:
        """Yield every kernel tile that is computed, row by row."""
        for i in range(self.row_tiles):
            for j in range(min(i + 1, self.column_tiles)):
                yield i, j

    def is_train(self, index: int) -> bool:
        """Whether row tile ``index`` holds train samples only: the kernel tile on the diagonal has its norms."""
        return self.rows(index).stop <= self.train

    def mirror_rows(self, index: int) -> int:
        """How many leading rows of row tile ``index`` are train samples and so have a mirrored column."""
        rows = self.rows(index)
        return max(0, min(rows.stop, self.train) - rows.start)


@dataclass(frozen=True)
class ColumnGrid:
    """Jacobian columns cut into spans of equal width (the last may be narrower).

    >>> grid = ColumnGrid(columns=10, span=4)
    >>> [str(grid.range(s)) for s in range(grid.spans)]
    ['[0:4]', '[4:8]', '[8:10]']
    """

    columns: int
    span: int

    @property
    def spans(self) -> int:
        """Number of spans."""
        return count_tiles(self.columns, self.span)

    def range(self, index: int) -> Range:
        """Columns of span ``index``."""
        return Range(index * self.span, min((index + 1) * self.span, self.columns))


def even_ranges(total: int, count: int) -> tuple[Range, ...]:
    """Cut ``total`` things into ``count`` consecutive ranges, as equal as can be.

    >>> [str(r) for r in even_ranges(5, 2)]
    ['[0:3]', '[3:5]']
    """
    base, extra = divmod(total, count)
    edges = [0]
    for index in range(count):
        edges.append(edges[-1] + base + (index < extra))
    return tuple(Range(a, b) for a, b in itertools.pairwise(edges) if b > a)
