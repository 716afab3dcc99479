"""Superblocks: every kernel tile once, every pair in one triangle, and how often panels are needed."""

import math
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ooc_ntk.planning.planes import PLANES, cover
from ooc_ntk.planning.superblocks import Grouping, Superblock, panel_loads, superblocks
from ooc_ntk.planning.tiles import SampleGrid
from ooc_ntk.planning.triangles import COVERS, Triangles, plane_of, triangle_tiles

grids = st.builds(SampleGrid, train=st.integers(1, 40), test=st.integers(0, 15), tile=st.integers(1, 20))


@given(grids, st.sampled_from(["square", "triangle"]), st.integers(1, 60))
def test_every_tile_is_in_one_superblock_of_at_most_the_capacity(grid, order, capacity):
    blocks = superblocks(grid, order, capacity)
    assert Counter(tile for block in blocks for tile in block.tiles) == Counter(grid.kernel_tiles())
    assert max(len(block.tiles) for block in blocks) <= capacity
    assert len({block.name for block in blocks}) == len(blocks)


@given(grids, st.integers(2, 60))
def test_squares_have_their_diagonals_first_and_apart(grid, capacity):
    """What normalising needs: a tile's two diagonal tiles are in its own superblock or in an earlier one."""
    done = set()
    for block in superblocks(grid, "square", capacity):
        done |= {i for i, j in block.tiles if i == j}
        for i, j in block.tiles:
            assert j in done
            assert i in done or i >= grid.column_tiles


@given(grids, st.sampled_from(["square", "triangle"]), st.integers(1, 60), st.data())
def test_tiles_that_stay_alone(grid, order, capacity, data):
    alone = frozenset(data.draw(st.sets(st.sampled_from(list(grid.kernel_tiles())))))
    blocks = superblocks(grid, order, capacity, alone)
    assert Counter(tile for block in blocks for tile in block.tiles) == Counter(grid.kernel_tiles())
    for block in blocks:
        assert len(block.tiles) == 1 or not alone & set(block.tiles)


@given(st.integers(1, 140), st.integers(2, 14))
def test_every_pair_is_in_one_set(count, size):
    sets = cover(count, size)
    assert Counter(pair for members in sets for pair in combinations(sorted(members), 2)) == Counter(
        combinations(range(count), 2)
    )
    assert max(map(len, sets), default=0) <= size


@given(grids, st.sampled_from(["square", "triangle"]), st.integers(1, 60))
def test_formulas_count_what_superblocks_hold(grid, order, capacity):
    blocks = superblocks(grid, order, capacity)
    found = Grouping.of(grid, order, capacity)
    assert found.tasks == len(blocks)
    assert found.loads == panel_loads(blocks).total()
    # Points of a plane may be of different sizes: then no triangle may be of the largest ones only.
    points = plane_of(grid.column_tiles, capacity) if order == "triangle" else None
    even = points is None or grid.column_tiles % points == 0
    assert found.tiles - max(len(block.tiles) for block in blocks) in (range(1) if even else range(60))
    assert found.buffers - max(block.buffers for block in blocks) in (range(1) if even else range(20))


@settings(deadline=None)  # grids of some thousand tiles
@given(
    st.sampled_from([entry for entry in COVERS.items() if entry[0] <= 31]),
    st.integers(1, 3),
    st.integers(0, 40),
    st.integers(0, 6),
)
def test_a_strip_takes_in_what_triangles_leave(cover, each, rest, test):
    """Every kernel tile once, none beyond the capacity, and the formulas' numbers, whatever is left below triangles."""
    triangles = Triangles(*cover, cover[0] * each)
    grid, capacity = SampleGrid(triangles.tiles + rest, test, 1), triangles.largest
    blocks = superblocks(grid, "triangle", capacity, triangles=triangles)
    assert Counter(tile for block in blocks for tile in block.tiles) == Counter(grid.kernel_tiles())
    found = Grouping.of(grid, "triangle", capacity, triangles)
    assert found.tasks == len(blocks)
    assert found.loads == panel_loads(blocks).total()
    assert max(len(block.tiles) for block in blocks) <= found.tiles <= capacity
    assert max(block.buffers for block in blocks) <= found.buffers


@pytest.mark.parametrize(("points", "size"), COVERS.items())
def test_covers_worth_pricing_read_little_more_than_the_bound(points, size):
    """With K in all of the memory a triangle block needs N²/√(2S) panels at least (Beaumont et al. 2022)."""
    triangles = Triangles(points, size, points * 4)
    assert triangles.loads <= 1.22 * triangles.tiles**2 / math.sqrt(2 * triangles.largest)
    assert max(map(len, cover(points, size))) == size


@pytest.mark.parametrize("each", [1, 2, 3])
@pytest.mark.parametrize(("points", "size"), PLANES.items())
def test_planes_waste_nothing(points, size, each):
    """Lines of a plane: every panel is needed (v − 1)/(k − 1) times, and each triangle is as large as it may be."""
    capacity = triangle_tiles(points * each, points)
    assert plane_of(points * each, capacity) is not None
    blocks = superblocks(SampleGrid(points * each, 0, 1), "triangle", capacity)
    assert set(panel_loads(blocks).values()) <= {(points - 1) // (size - 1)}
    assert max(len(block.tiles) for block in blocks) <= capacity


@pytest.mark.parametrize(("tiles", "capacity"), [(25, 11), (49, 22), (57, 29), (133, 67)])
def test_triangles_read_less_than_squares_and_near_the_bound(tiles, capacity):
    grid = SampleGrid(tiles, 0, 1)
    loads = {order: sum(panel_loads(superblocks(grid, order, capacity)).values()) for order in ("square", "triangle")}
    assert loads["triangle"] < 0.9 * loads["square"]
    # N²/√(2S) panels of one sample, with K in all of the memory (Beaumont et al. 2022).
    bound = tiles**2 / math.sqrt(2 * capacity)
    assert 1.0 <= loads["triangle"] / bound <= 1.16


@pytest.mark.parametrize("groups", [3, 4, 7])
def test_squares_read_every_panel_once_per_column_of_squares(groups):
    blocks = superblocks(SampleGrid(groups * 5, 0, 1), "square", 25)
    assert set(panel_loads(blocks).values()) == {groups}


def test_what_fits_at_once_is_read_once():
    blocks = superblocks(SampleGrid(10, 4, 2), capacity=15 + 10)
    assert len(blocks) == 1
    assert set(panel_loads(blocks).values()) == {1}


def test_panels_in_memory_at_once():
    square = Superblock(tuple((i, j) for i in (7, 8, 9) for j in (0, 1, 2)))
    assert (square.live, square.buffers) == (4, 6)
    triangle = Superblock(tuple((i, j) for i in range(4) for j in range(i + 1)))
    assert (triangle.live, triangle.buffers) == (4, 6)
    assert (Superblock(((0, 0),)).buffers, Superblock(((1, 0),)).buffers) == (2, 4)
    rectangle = next(b for b in superblocks(SampleGrid(6, 2, 1), capacity=12) if b.tiles[0][0] >= 6)
    assert rectangle.live == 3
