"""Which tiles of a grown kernel are kept, against a count entry by entry."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ooc_ntk.planning.growth import Grown, kept_rows, kept_share, kept_tiles, old_samples, tile_sizes_beside
from ooc_ntk.planning.tiles import Range, SampleGrid

sizes = st.tuples(st.integers(1, 40), st.integers(0, 12), st.integers(0, 20), st.integers(1, 15))


@given(sizes)
def test_kept_tiles_are_those_whose_every_sample_was_there(given_sizes):
    old, test, more, tile = given_sizes
    grid, grown = SampleGrid(old + more, test, tile), Grown(old, test)
    new = set(range(old, old + more))
    expected = {
        (i, j)
        for i, j in grid.kernel_tiles()
        if new.isdisjoint(range(grid.rows(i).start, grid.rows(i).stop))
        and new.isdisjoint(range(grid.columns(j).start, grid.columns(j).stop))
        # samples that are old, but of which some are train and some test, have no common shift
        and (more == 0 or not grid.rows(i).start < old + more < grid.rows(i).stop)
    }
    assert kept_tiles(grid, grown) == expected or more == 0
    assert {i for i, _ in kept_tiles(grid, grown)} <= kept_rows(grid, grown)


@given(sizes)
def test_old_samples_are_the_same_samples(given_sizes):
    old, test, more, tile = given_sizes
    grid, grown = SampleGrid(old + more, test, tile), Grown(old, test)
    names_old = [("train", n) for n in range(old)] + [("test", n) for n in range(test)]
    names_new = [("train", n) for n in range(old + more)] + [("test", n) for n in range(test)]
    for row in kept_rows(grid, grown):
        here = grid.rows(row)
        there = old_samples(here, grid, grown)
        assert names_old[there.start : there.stop] == names_new[here.start : here.stop]


@given(sizes)
def test_shares_lie_between_none_and_all(given_sizes):
    old, test, more, tile = given_sizes
    shares = kept_share(SampleGrid(old + more, test, tile), Grown(old, test))
    assert all(0 <= share <= 1 for share in shares)
    assert more == 0 or all(share < 1 for share in shares)


@given(st.integers(1, 5000), st.integers(1, 6000))
def test_a_tile_size_beside_a_run_wastes_little_at_its_edge(train, tile):
    found = list(tile_sizes_beside(train, tile))
    assert found == sorted(set(found), reverse=True)
    assert 1 <= found[-1] <= found[0] <= tile
    count = -(-train // min(tile, train))
    assert train - found[0] * count < count  # fewer samples left over than there are tiles
    if train % tile == 0:
        assert found[0] == tile


def test_nothing_is_kept_of_a_plan_that_goes_on_from_none():
    grid = SampleGrid(20, 4, 4)
    assert kept_tiles(grid, None) == frozenset()
    assert kept_rows(grid, None) == frozenset()
    assert kept_share(grid, None) == (0.0, 0.0)


def test_a_range_that_reaches_into_new_samples_was_not_there():
    grid, grown = SampleGrid(12, 4, 4), Grown(10, 4)
    assert old_samples(Range(8, 12), grid, grown) is None
    assert old_samples(Range(10, 12), grid, grown) is None
    assert old_samples(Range(12, 16), grid, grown) == Range(10, 14)
    with pytest.raises(dataclasses.FrozenInstanceError):
        grown.train = 3
