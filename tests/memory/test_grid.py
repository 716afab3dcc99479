"""The promise of memory over a grid of jobs, each in processes of its own: measured ≤ promised ≤ budget, no waste.

A few cells are always on; the others are run by ``pytest -m grid``, or printed as a table by ``python -m
bench.memory``.
"""

from __future__ import annotations

import os
from dataclasses import astuple

import pytest

from bench.memory import WASTE, Outcome, format_outcomes, measure_cell
from bench.memory_cells import ALWAYS, BUDGETS, CELLS, DATAFLOWS, FAMILIES, PRECISIONS, SHAPES, Cell, chosen_cells
from tests.rates import keep_rates

MIB = 2**20


@pytest.fixture(scope="module")
def environment(tmp_path_factory, request):
    """A cache with rates for one thread, so that the children do not calibrate."""
    import torch

    folder, threads = tmp_path_factory.mktemp("rates"), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OOC_NTK_CACHE", str(folder))
        torch.set_num_threads(1)
        keep_rates()
        torch.set_num_threads(threads)
    return {"OOC_NTK_CACHE": str(folder)}


def check(cell: Cell, environment: dict[str, str], folder: os.PathLike[str]) -> None:
    found = measure_cell(cell, folder, environment)
    print(format_outcomes([found]))
    assert not found.broken, f"{found.broken}: {found}"


@pytest.mark.slow
@pytest.mark.parametrize("cell", chosen_cells()[:ALWAYS], ids=str)
def test_promises_are_kept_without_waste(cell, environment, tmp_path):
    check(cell, environment, tmp_path)


@pytest.mark.grid
@pytest.mark.parametrize("cell", chosen_cells()[ALWAYS:], ids=str)
def test_promises_are_kept_without_waste_all_over_the_grid(cell, environment, tmp_path):
    check(cell, environment, tmp_path)


def test_the_choice_covers_the_grid():
    cells = chosen_cells()
    assert len(set(cells)) == CELLS
    values = (FAMILIES, DATAFLOWS, BUDGETS, SHAPES, PRECISIONS)
    for place, wanted in enumerate(values):
        assert {astuple(cell)[place] for cell in cells[:ALWAYS]} == set(wanted)
        for other in range(place):
            pairs = {(astuple(cell)[other], astuple(cell)[place]) for cell in cells}
            assert len(pairs) == len(values[other]) * len(wanted)
    assert cells == chosen_cells()  # by its seed
    assert all(Cell.parse(str(cell)) == cell for cell in cells)


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({}, []),
        ({"measured": 401 * MIB}, ["measured > promised"]),
        ({"budget": 399 * MIB}, ["promised > budget"]),
        ({"measured": 266 * MIB}, [f"promised > {WASTE} × measured"]),
        ({"disk_measured": 31 * MIB}, ["disk: measured > promised"]),
        ({"disk_measured": 19 * MIB}, [f"disk: promised > {WASTE} × measured"]),
        ({"disk_measured": 19 * MIB, "cell": "mlp/resident/ample/full/bf16"}, []),
    ],
)
def test_a_broken_promise_is_seen(changes, broken):
    fields = {
        "cell": "mlp/spill/ample/full/bf16",
        "budget": 400 * MIB,
        "smallest": 0,
        "promised": 400 * MIB,
        "measured": 300 * MIB,
        "planned": 290 * MIB,
        "baseline": 280 * MIB,
        "disk_promised": 30 * MIB,
        "disk_measured": 25 * MIB,
        "batch_size": 1,
        "method": "loop",
        "layout": "",
        "terms": {"the process itself": 280 * MIB},
        "seconds": 2.0,
        "task_seconds": 1.0,
        "promised_seconds": 1.0,
        "moved_bytes": 30 * MIB,
    }
    found = Outcome(**{**fields, **changes})
    assert found.broken == broken
    assert format_outcomes([found]).count("BROKEN") == len(broken)
