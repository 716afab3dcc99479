"""Tables: what the plan's blocks hold, spend and save, and where the time went, readable on a narrow terminal."""

import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console

from ooc_ntk.execution.status import RunInfo
from ooc_ntk.planning.factors import LayerFactors
from ooc_ntk.planning.planner import Preferences, make_plan
from ooc_ntk.planning.rates import UNCALIBRATED
from ooc_ntk.planning.workload import ParameterBlock
from ooc_ntk.report.tables import SHOWN_BLOCKS, info_table, phases_table, plan_table
from tests.planning.strategies import ample, small_workload

CONVOLUTION = LayerFactors("linear", 16, 72, 32, True)
LINEAR = LayerFactors("linear", 1, 200, 100, True)
TOKENS = LayerFactors("tokens", 6, 50, 16, False, matches=2.0)


def blocks_of(*described):
    """Blocks of (name, source, reason, factors); those without factors have 64 columns."""
    found, start = [], 0
    for name, source, reason, factors in described:
        size = 64 if factors is None else factors.columns
        found.append(ParameterBlock(name, (f"{name}.weight",), start, start + size, source, reason, factors))
        start += size
    return tuple(found)


def planned(blocks, notes=(), **preferences):
    return make_plan(small_workload(blocks=blocks, notes=notes), ample(), UNCALIBRATED, Preferences(**preferences))


def lines(table, width=80):
    """What is printed on a terminal of that width, without trailing blanks."""
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(table)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def block_rows(plan, width=80, **options):
    """The cells of every line of the table of blocks, by its first cell, and all lines."""
    printed = lines(plan_table(plan, **options), width)
    printed = printed[printed.index("parameter blocks") + 1 :]
    return {line.split("  ")[0]: line.split() for line in printed}, printed


FOUR = blocks_of(
    ("conv", "rule", "", CONVOLUTION),
    ("norm", "rule", "", None),
    ("own", "torch.func", "no layer rule covers square()", None),
    ("head", "rule", "", LINEAR),
)


@pytest.mark.parametrize("wanted", ["factored", "pairwise", "dense"])
def test_every_block_says_what_derives_it_how_it_is_held_and_what_that_saves(wanted):
    plan = planned(FOUR, representation=wanted)
    rows, printed = block_rows(plan)
    assert printed[0].split() == ["block", "size", "by", "held", "as", "bytes", "saved", "FLOP", "saved"]
    assert {"rule", wanted} <= set(rows["conv"])
    assert {"rule", wanted} <= set(rows["head"])
    assert {"rule", "dense"} <= set(rows["norm"])
    assert {"torch.func", "dense"} <= set(rows["own"])
    for block in plan.blocks:
        if wanted == "dense" or block.factors is None:
            assert rows[block.name].count("-") == 2, "dense gradients save nothing"
    if wanted != "dense":
        held = plan.blocks[0]
        share = 1 - held.held_bytes / held.dense_bytes
        assert f"{share:.0%}" in rows["conv"]
        assert 0.1 < share < 0.95


def test_the_last_line_is_the_total():
    plan = planned(FOUR, representation="pairwise")
    rows, printed = block_rows(plan)
    assert printed[-1].startswith("all 4")
    share = 1 - sum(block.held_bytes for block in plan.blocks) / sum(block.dense_bytes for block in plan.blocks)
    spent = 1 - sum(block.flops for block in plan.blocks) / sum(block.dense_flops for block in plan.blocks)
    shown = [float(cell.removesuffix("%")) for cell in rows["all 4"] if cell.endswith("%")]
    assert shown == pytest.approx([100 * share, 100 * spent], abs=0.51)


def test_an_embedding_holds_tokens():
    rows, _ = block_rows(planned(blocks_of(("embed", "rule", "", TOKENS)), representation="factored"))
    assert "tokens" in rows["embed"]


def test_what_takes_more_than_dense_gradients_says_so():
    plan = planned(FOUR, representation="pairwise")
    more = dataclasses.replace(plan.blocks[0], flops=3 * plan.blocks[0].dense_flops)
    rows, _ = block_rows(dataclasses.replace(plan, blocks=(more, *plan.blocks[1:])))
    assert rows["conv"][-2:] == ["3×", "dense"]
    slightly = dataclasses.replace(more, flops=plan.blocks[0].dense_flops * 6 // 5)
    rows, _ = block_rows(dataclasses.replace(plan, blocks=(slightly, *plan.blocks[1:])))
    assert rows["conv"][-1] == "-20%"


MANY = blocks_of(
    *(
        entry
        for stage in range(20)
        for entry in (
            (f"stages.{stage}.conv", "rule", "", CONVOLUTION),
            (f"stages.{stage}.norm", "rule", "", None),
        )
    ),
    ("odd", "torch.func", "no layer rule covers square()", None),
)


def test_many_blocks_are_folded_by_how_they_are_held():
    plan = planned(MANY, representation="factored")
    rows, printed = block_rows(plan)
    assert len(printed) == 1 + SHOWN_BLOCKS + 3 + 1
    assert {"rule", "factored"} <= set(rows["10 smaller"])
    assert {"rule", "dense"} <= set(rows["20 smaller"])
    assert {"torch.func", "dense"} <= set(rows["odd"])  # alone of its kind, so by name
    assert sum(name.startswith("stages.") for name in rows) == SHOWN_BLOCKS
    everything, _ = block_rows(plan, every_block=True)
    assert {block.name for block in MANY} <= set(everything)


@pytest.mark.parametrize("width", [80, 100])
def test_nothing_is_cut_off_on_a_narrow_terminal(width):
    long = "encoder.layer.11.attention.output.dense"
    plan = planned((*MANY, *moved(blocks_of((long, "rule", "", CONVOLUTION)), MANY[-1].stop)), ("a note",))
    printed = lines(plan_table(plan, every_block=True), width)
    assert max(map(len, printed)) <= width
    assert "…" not in "".join(printed)
    start = next(index for index, line in enumerate(printed) if line.startswith("encoder"))
    assert "".join(line.split(" ")[0] for line in printed[start : start + 3]).startswith(long)


def moved(blocks, start):
    return tuple(dataclasses.replace(b, start=b.start + start, stop=b.stop + start) for b in blocks)


def run_info(phases, rows_seconds=8.0, kernel_seconds=2.0):
    return RunInfo(
        path=Path("run"),
        plan=planned(FOUR),
        kernel_tiles_done=1,
        kernel_tiles=1,
        rows_seconds=rows_seconds,
        kernel_seconds=kernel_seconds,
        host_bytes=0,
        device_bytes=0,
        disk_bytes=0,
        bytes_read=0,
        bytes_written=0,
        job_digests={},
        versions={},
        phases=phases,
    )


def test_phases_and_what_is_between_them_are_all_the_time():
    printed = lines(phases_table(run_info({"capture": 6.0, "pairwise": 1.5, "commit": 0.5})))
    cells = {line.split("  ")[0]: line.split() for line in printed}
    assert {"6.00", "60%"} <= set(cells["capture"])
    assert {"1.50", "15%"} <= set(cells["pairwise"])
    assert {"2.00", "20%"} <= set(cells["between phases"])
    assert max(map(len, printed)) <= 80


def test_a_run_that_has_not_begun_has_no_phases():
    printed = lines(phases_table(run_info({}, rows_seconds=0.0, kernel_seconds=0.0)))
    assert any("between phases" in line and "0%" in line for line in printed)
    assert any("time" in line for line in lines(info_table(run_info({}, 0.0, 0.0))))
