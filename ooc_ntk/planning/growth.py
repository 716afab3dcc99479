"""Growing a finished kernel by train samples: which tiles are kept, and which tile sizes suit those that are there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .tiles import Range, SampleGrid, count_tiles


@dataclass(frozen=True)
class Grown:
    """The finished run that a plan goes on from; its samples come first, its test samples stay last.

    Attributes:
        train: train samples of that run.
        test: its test samples, which are those of the plan.
    """

    train: int
    test: int


def old_samples(samples: Range, grid: SampleGrid, grown: Grown) -> Range | None:
    """Where samples of the grown run were in the old one.

    Args:
        samples: a range of samples of the grown run.
        grid: its grid.
        grown: the old run.

    Returns:
        The same samples by their numbers in the old run; None if some of them are new.

    >>> grid, grown = SampleGrid(train=6, test=4, tile=2), Grown(train=5, test=4)
    >>> [str(old_samples(grid.rows(row), grid, grown)) for row in range(grid.row_tiles)]
    ['[0:2]', '[2:4]', 'None', '[5:7]', '[7:9]']
    """
    if samples.stop <= grown.train:
        return samples
    shift = grid.train - grown.train
    if samples.start >= grid.train and samples.stop - shift <= grown.train + grown.test:
        return Range(samples.start - shift, samples.stop - shift)
    return None


def kept_rows(grid: SampleGrid, grown: Grown | None) -> frozenset[int]:
    """Row tiles that hold samples of the old run alone.

    >>> sorted(kept_rows(SampleGrid(train=6, test=4, tile=2), Grown(train=5, test=4)))
    [0, 1, 3, 4]
    """
    if grown is None:
        return frozenset()
    return frozenset(row for row in range(grid.row_tiles) if old_samples(grid.rows(row), grid, grown) is not None)


def kept_tiles(grid: SampleGrid, grown: Grown | None) -> frozenset[tuple[int, int]]:
    """Kernel tiles whose entries are all in the old run: they are copied, not computed.

    Args:
        grid: the grid of the grown run.
        grown: the old run; None for a plan that goes on from none.

    Returns:
        Row and column of every such tile, among those that are computed (``row >= column``).

    >>> sorted(kept_tiles(SampleGrid(train=6, test=2, tile=2), Grown(train=4, test=2)))
    [(0, 0), (1, 0), (1, 1), (3, 0), (3, 1)]
    >>> kept_tiles(SampleGrid(train=6, test=2, tile=2), None)
    frozenset()
    """
    if grown is None:
        return frozenset()
    columns = [j for j in range(grid.column_tiles) if grid.columns(j).stop <= grown.train]
    return frozenset((i, j) for i in kept_rows(grid, grown) for j in columns if j <= i)


def kept_share(grid: SampleGrid, grown: Grown | None) -> tuple[float, float]:
    """Shares of the samples whose row tiles are kept, and of the computed kernel entries that are.

    >>> kept_share(SampleGrid(train=4, test=0, tile=2), Grown(train=2, test=0))
    (0.5, 0.3333333333333333)
    """
    rows, tiles = kept_rows(grid, grown), kept_tiles(grid, grown)
    samples = grid.train + grid.test

    def entries(pairs: Iterator[tuple[int, int]]) -> int:
        return sum(len(grid.rows(i)) * len(grid.columns(j)) for i, j in pairs)

    kept = entries(iter(tiles))
    return sum(len(grid.rows(row)) for row in rows) / samples, kept / max(1, entries(grid.kernel_tiles()))


def tile_sizes_beside(train: int, tile: int) -> Iterator[int]:
    """Tile sizes under which almost all tiles of a finished run are whole ones of a larger run, largest first.

    The size that the run has, if it cuts its train samples evenly; otherwise the nearest smaller one that does so but
    for a few samples; then halves and smaller parts of that, for budgets that the first does not fit.

    Args:
        train: train samples of the finished run.
        tile: its samples per tile.

    >>> list(tile_sizes_beside(100, 25))[:3], next(tile_sizes_beside(100, 33)), next(tile_sizes_beside(40, 49))
    ([25, 12, 8], 25, 40)
    """
    largest = max(1, train // count_tiles(train, min(tile, train)))
    found = 0
    for parts in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64):
        size = max(1, largest // parts)
        if size != found:
            yield size
        found = size
