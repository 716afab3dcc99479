"""Tiles cover everything exactly once."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ooc_ntk.planning.tiles import ColumnGrid, SampleGrid, count_tiles, even_ranges, even_size

grids = st.builds(SampleGrid, train=st.integers(1, 40), test=st.integers(0, 25), tile=st.integers(1, 50))


@given(grids)
def test_kernel_tiles_and_mirrors_cover_every_entry_once(grid):
    covered = np.zeros((grid.train + grid.test, grid.train), dtype=int)
    count = 0
    for i, j in grid.kernel_tiles():
        rows, columns = grid.rows(i), grid.columns(j)
        covered[rows.start : rows.stop, columns.start : columns.stop] += 1
        if i != j:
            covered[columns.start : columns.stop, rows.start : rows.start + grid.mirror_rows(i)] += 1
        count += 1
    assert (covered == 1).all()
    assert count == grid.kernel_tile_count


@given(grids)
def test_row_and_column_tiles_cover_their_samples_in_order(grid):
    rows = [index for i in range(grid.row_tiles) for index in range(grid.rows(i).start, grid.rows(i).stop)]
    columns = [index for j in range(grid.column_tiles) for index in range(grid.columns(j).start, grid.columns(j).stop)]
    assert rows == list(range(grid.train + grid.test))
    assert columns == list(range(grid.train))
    assert sum(grid.mirror_rows(i) for i in range(grid.row_tiles)) == grid.train


@given(st.integers(1, 500), st.integers(1, 200), st.integers(1, 60))
def test_spans_and_passes_cover_every_column_once(columns, span, passes):
    grid = ColumnGrid(columns, span)
    ranges = [grid.range(index) for index in range(grid.spans)]
    assert [index for each in ranges for index in range(each.start, each.stop)] == list(range(columns))
    groups = even_ranges(grid.spans, passes)
    assert [index for group in groups for index in range(group.start, group.stop)] == list(range(grid.spans))
    assert len(groups) == min(passes, grid.spans)
    assert max(map(len, groups)) - min(map(len, groups)) <= 1


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_even_tiles_are_the_fewest_and_as_equal_as_can_be(total, largest):
    size = even_size(total, largest)
    assert 1 <= size <= largest
    assert count_tiles(total, size) == count_tiles(total, largest)
    # A size smaller by one would need one more tile.
    assert size == 1 or count_tiles(total, size - 1) > count_tiles(total, size)
