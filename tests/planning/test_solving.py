"""How a ridge regression is priced: what fits is taken, and what is promised of the tile Cholesky is what it does."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ooc_ntk.errors import BudgetError, InputError
from ooc_ntk.planning.rates import UNCALIBRATED
from ooc_ntk.planning.solving import (
    BLOCK_TILES,
    cholesky_bound_bytes,
    plan_solve,
    preconditioner_bytes,
    tile_cholesky_bytes,
    tile_cholesky_edge,
    tile_cholesky_traffic,
)


def planned(size=30_000, targets=10, host=2**30, disk=2**40, **more):
    return plan_solve(size, targets, 2 * size * size, host, disk, UNCALIBRATED, **more)


@given(st.integers(1, 200_000), st.integers(1, 1000), st.integers(0, 2**38), st.integers(0, 2**42))
def test_what_is_chosen_fits_and_is_the_fastest_that_does(size, targets, host, disk):
    try:
        plan = plan_solve(size, targets, 2 * size * size, host, disk, UNCALIBRATED)
    except BudgetError:
        ample = plan_solve(size, targets, 2 * size * size, 2**62, 2**62, UNCALIBRATED).prices
        assert all(price.host_bytes > host or price.disk_bytes > disk for price in ample if price.method != "tiles")
        return
    assert plan.chosen.host_bytes <= host
    assert plan.chosen.disk_bytes <= disk
    fitting = [price for price in plan.prices if price.host_bytes <= host and price.disk_bytes <= disk]
    assert plan.chosen.seconds == min(price.seconds for price in fitting)


def test_more_memory_or_targets_change_the_way():
    assert planned(host=2**30).chosen.method == "cg"
    assert planned(host=2**35, targets=20_000).chosen.method == "cholesky"
    slow_disk = dataclasses.replace(UNCALIBRATED, disk_read=1e6)
    assert plan_solve(4000, 10, 32 * 10**6, 2**31, 2**33, slow_disk).chosen.method == "cholesky"
    few = planned(size=8000, targets=4000, host=600 * 2**20)
    assert few.chosen.method == "tiles", str(few)


def test_a_method_that_is_asked_for_is_taken_or_refused():
    for method in ("cg", "tiles"):
        assert planned(method=method).chosen.method == method
    with pytest.raises(BudgetError, match=r"by cholesky needs 6\.8 GiB of memory, 1\.0 GiB are free to use; raise the"):
        planned(method="cholesky")
    with pytest.raises(BudgetError, match=r"needs .* of disk, 1\.0 KiB are free to use; make room"):
        planned(method="tiles", disk=1024)
    with pytest.raises(InputError, match="unknown method 'lu'"):
        planned(method="lu")
    with pytest.raises(InputError, match="no folder; give one: workspace"):
        plan_solve(100, 1, 20_000, 2**30, 0, UNCALIBRATED, "tiles", disk=False)


def test_without_a_ridge_what_factorises_goes_first():
    assert planned(ridge=0.0).chosen.method == "tiles"
    assert planned(ridge=0.0, method="cg").chosen.method == "cg"


def test_the_preconditioner_shrinks_to_the_memory_and_can_be_left_out():
    tight = planned(host=200 * 2**20).chosen
    assert tight.method == "cg"
    assert 0 < tight.rank < planned().chosen.rank
    assert planned(method="cg", rank=0).chosen.rank == 0
    assert planned(method="cg", rank=77).chosen.rank == 77
    assert planned(size=50, method="cg", rank=77).chosen.rank == 50


def test_a_line_for_every_method():
    lines = str(planned()).splitlines()
    assert len(lines) == 4
    assert sum("chosen" in line for line in lines) == 1
    assert next(line for line in lines if line.startswith("cholesky")).endswith("does not fit")


@given(st.integers(1, 100_000), st.integers(0, 2**36))
def test_blocks_of_the_tile_cholesky_fit(size, host):
    edge = tile_cholesky_edge(size, host)
    assert edge % BLOCK_TILES == 0
    assert edge == BLOCK_TILES or tile_cholesky_bytes(edge) <= host
    assert edge < size + BLOCK_TILES


@given(st.integers(1, 3000), st.integers(1, 40))
def test_traffic_as_counted_strip_by_strip(size, tiles):
    edge = tiles * BLOCK_TILES
    blocks = [(start, min(start + edge, size)) for start in range(0, size, edge)]
    read = written = 0
    for column, (left, right) in enumerate(blocks):
        for row in range(column, len(blocks)):
            top, bottom = blocks[row]
            written += (bottom - top) * (right - left)
            read += left * (bottom - top)
            if row > column:
                read += left * (right - left)
                read += (right - left) ** 2
    found = tile_cholesky_traffic(size, edge)
    assert found[1] == 8 * written
    assert found[0] == 8 * read


def test_large_factorisations_come_near_the_bound():
    for size, host in ((50_000, 2 * 10**9), (100_000, 8 * 10**9)):
        edge = tile_cholesky_edge(size, host)
        ratio = sum(tile_cholesky_traffic(size, edge)) / cholesky_bound_bytes(size, tile_cholesky_bytes(edge))
        assert 1.0 < ratio < 2.6


def test_a_preconditioner_is_mostly_its_factor():
    assert 8 * 30_000 * 1000 < preconditioner_bytes(30_000, 1000) < 1.9 * 8 * 30_000 * 1000
