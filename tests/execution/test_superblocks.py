"""Superblocks end to end: kernels summed up many tiles at once equal those summed up tile by tile, and the oracle."""

import json
from dataclasses import replace

import numpy as np
import pytest

import ooc_ntk
import ooc_ntk.api
from ooc_ntk.execution import sums
from ooc_ntk.planning import memory, planner
from ooc_ntk.planning.plan import Plan
from ooc_ntk.planning.superblocks import panel_loads
from ooc_ntk.planning.triangles import Triangles
from tests import oracle, zoo
from tests.zoo import zoo_case

#: Kernel tiles of 6 samples: 5 row tiles of train samples at least, the last one mixed with test samples.
TILE = 3


def spilled(name, tmp_path, order, capacity, kept=0, triangles=None, tile=TILE, **settings):
    """The kernel of a case with its tiles on disk, in superblocks of so many kernel tiles."""
    job = zoo_case(name).job(**settings)
    preferences = ooc_ntk.Preferences(dataflow="spill", tile_samples=tile, span_columns=64)
    plan = ooc_ntk.plan(job, ooc_ntk.Budget("16GiB", disk="1GiB"), preferences=preferences, out=tmp_path)
    plan = replace(plan, order=order, superblock_tiles=capacity, kept_bytes=kept, triangles=triangles)
    out = tmp_path / f"{order}-{capacity}-{kept}"
    return ooc_ntk.run(job, out, plan=plan, progress=False)


SHAPES = [("square", 4), ("triangle", 4), ("square", 1000)]


@pytest.mark.parametrize(("order", "capacity"), SHAPES)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mobilenet", {}),
        ("gpt", {"kernel": "full"}),
        ("lstm", {"kernel": "pseudo", "scale": "mean"}),
        ("uncovered", {"kernel": "output:1"}),
    ],
)
def test_every_kernel_in_superblocks(name, settings, order, capacity, tmp_path):
    found = spilled(name, tmp_path, order, capacity, **settings)
    alone = spilled(name, tmp_path, "square", 1, **settings)
    assert len(found.plan.superblocks) < len(alone.plan.superblocks)
    # Every sum of a span is rounded to float32, 3e-8 each; those of a small network may all be rounded to the same.
    assert oracle.error(found, np.asarray(alone)) < 2e-7
    assert np.array_equal(np.asarray(found)[: found.shape[1]], np.asarray(found)[: found.shape[1]].T)
    assert ooc_ntk.verify(found.path, zoo_case(name).job(**settings)).passed
    assert found.plan.digest != alone.plan.digest


def test_triangles_with_a_strip_below_them(tmp_path):
    """A plane over the first seven row tiles, the others in rectangles, test samples in rectangles of their own."""
    triangles = Triangles(7, 3, 7)
    found = spilled("gpt", tmp_path, "triangle", 4, triangles=triangles, tile=1)
    assert found.plan.sample_grid.column_tiles > triangles.tiles + 1
    assert Plan.from_json(found.plan.to_json()) == found.plan
    assert oracle.error(found, np.asarray(spilled("gpt", tmp_path, "square", 1, tile=1))) < 2e-7
    assert found.plan.digest != replace(found.plan, triangles=None).digest


@pytest.mark.parametrize(("order", "capacity"), [("square", 4), ("square", 1000)])
def test_normalised_kernels(order, capacity, tmp_path):
    found = spilled("mobilenet", tmp_path, order, capacity, normalize="cosine")
    assert oracle.error(found, np.asarray(spilled("mobilenet", tmp_path, "square", 1, normalize="cosine"))) < 2e-7
    assert np.abs(np.diagonal(np.asarray(found)) - 1).max() < 1e-6


def test_float64_is_summed_up_in_float64(tmp_path):
    found = spilled("gpt", tmp_path, "triangle", 4, precision="float64")
    assert oracle.error(found, zoo.kernel("gpt", "trace")) < 1e-12


@pytest.mark.parametrize(("order", "capacity"), [("square", 1), ("square", 4), ("triangle", 4)])
def test_panels_that_are_kept_are_read_once_and_change_no_bits(order, capacity, tmp_path):
    without = spilled("mobilenet", tmp_path, order, capacity)
    plan = without.plan
    panel = sum(plan.tile_samples * stored for stored in plan.layout.cut(plan).stored)
    # Two row tiles whole, and some spans of a third.
    some = spilled("mobilenet", tmp_path, order, capacity, kept=2 * panel + panel // 2)
    kept = some.plan.kept_panels
    assert len(kept.rows) == 2
    assert kept.partial is not None
    assert np.asarray(some).tobytes() == np.asarray(without).tobytes()
    assert some.plan.digest == without.plan.digest
    read = {each: ooc_ntk.info(each.path).bytes_read for each in (without, some)}
    assert read[without] == panel_loads(plan.superblocks).total() * panel
    assert read[without] - read[some] == kept.saved_bytes > 2 * panel


@pytest.mark.parametrize(("name", "kind"), [("mobilenet", "trace"), ("gpt", "full")])
def test_sums_are_added_up_in_float64_on_disk_before_they_grow_inexact(name, kind, tmp_path, monkeypatch):
    without = spilled(name, tmp_path / "without", "square", 4, kernel=kind)
    monkeypatch.setattr(sums, "FOLDED_SPANS", 3)
    found = spilled(name, tmp_path / "folded", "square", 4, kernel=kind)
    assert len(found.plan.passes[0]) > 6
    assert 0 < oracle.error(found, np.asarray(without)) < 2e-7
    folds = (len(found.plan.passes[0]) - 1) // 3
    edge = found.plan.tile_samples * found.plan.entries_per_sample
    more = ooc_ntk.info(found.path).bytes_written - ooc_ntk.info(without.path).bytes_written
    # Eight bytes an entry each time; the last row tile and the last column tile are narrower.
    assert 0.7 < more / (8 * folds * edge**2 * found.plan.sample_grid.kernel_tile_count) <= 1
    assert ooc_ntk.info(found.path).bytes_read - ooc_ntk.info(without.path).bytes_read == more
    assert list(found.path.glob("tiles/*")) == []


@pytest.mark.parametrize("scheduler", ["serial", "threads"])
def test_a_run_that_stops_between_superblocks_goes_on_to_the_same_bits(tmp_path, scheduler):
    whole = spilled("mobilenet", tmp_path, "square", 4)
    job, out = zoo_case("mobilenet").job(), tmp_path / "stopped"
    seen = []

    def advance(phase, amount):
        if phase == "kernel" and len(seen) == 1:
            stops.append(amount)
            if len(stops) == stops_at:
                raise KeyboardInterrupt

    observer = ooc_ntk.api.Observer(lambda totals, remaining: seen.append(totals["kernel"]), advance)
    spans = len(whole.plan.passes[0])
    stops, stops_at = [], spans * (len(whole.plan.superblocks[0].tiles) + 1)  # within the second superblock
    with pytest.raises(ooc_ntk.OocNtkError, match="stopped"):
        ooc_ntk.run(job, out, plan=whole.plan, scheduler=scheduler, progress=observer)
    info = ooc_ntk.info(out)
    assert info.kernel_tiles_done == len(whole.plan.superblocks[0].tiles)
    assert info.io_ratio is None
    again = ooc_ntk.run(job, out, scheduler=scheduler, progress=observer)
    assert seen[1] == (info.kernel_tiles_done, whole.plan.sample_grid.kernel_tile_count)
    assert np.asarray(again).tobytes() == np.asarray(whole).tobytes()


@pytest.mark.parametrize("damage", [None, "flipped", "cut", "other"])
@pytest.mark.parametrize("folded", [400, 3])
def test_sums_that_were_saved_are_gone_on_with(tmp_path, monkeypatch, damage, folded):
    monkeypatch.setattr(sums, "FOLDED_SPANS", folded)
    monkeypatch.setattr(sums, "SAVED_SECONDS", 0.0)
    monkeypatch.setattr(sums, "SAVED_SHARE", 0.0)
    whole = spilled("mobilenet", tmp_path, "square", 4)
    plan = replace(whole.plan, saves_sums=True)
    job, out, stops = zoo_case("mobilenet").job(), tmp_path / "stopped", []
    first = plan.superblocks[0]
    stop_at = (len(plan.passes[0]) - 2) * len(first.tiles)

    def advance(phase, amount):
        stops.append(phase)
        if stops.count("kernel") == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(ooc_ntk.OocNtkError, match="stopped"):
        ooc_ntk.run(job, out, plan=plan, progress=ooc_ntk.api.Observer(advance=advance))
    (saved,) = out.glob("tiles/sums-*")
    content = bytearray(saved.read_bytes())
    if damage == "flipped":
        content[len(content) // 3] ^= 4
    elif damage == "cut":
        del content[10:20]
    elif damage == "other":
        content = content.replace(plan.digest.encode(), b"0" * len(plan.digest))
    saved.write_bytes(content)
    again = ooc_ntk.run(job, out, progress=False)
    assert np.asarray(again).tobytes() == np.asarray(whole).tobytes()
    read = {path: _read(path, first) for path in (whole.path, out)}
    if damage is None:
        assert read[out] < read[whole.path] / 2, "what was contracted before is read again"
    else:
        assert read[out] == read[whole.path]
    assert list(out.glob("tiles/*")) == []


def _read(path, block):
    """Bytes that the task of a superblock read."""
    receipts = [json.loads(line) for line in (path / "receipts.jsonl").read_text().splitlines()]
    return next(r["bytes_read"] for r in receipts if r["key"] == f"kernel-0-{block.name[0]}-{block.name[1]}")


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("mobilenet", {"superblock_tiles": 4}),
        ("mobilenet", {"superblock_tiles": 4, "order": "triangle"}),
        ("gpt", {"superblock_tiles": 9}),
        ("gpt", {"superblock_tiles": 1}),
        ("lstm", {}),
    ],
)
def test_as_much_is_moved_as_was_promised(name, wanted, kept, tmp_path, monkeypatch):
    monkeypatch.setattr(sums, "FOLDED_SPANS", 5)
    monkeypatch.setattr(memory, "FOLDED_SPANS", 5)
    if not kept:
        monkeypatch.setattr(planner, "keeping", lambda workload, limits, layout: layout)
    preferences = ooc_ntk.Preferences(dataflow="spill", tile_samples=TILE, span_columns=64, **wanted)
    job = zoo_case(name).job()
    plan = ooc_ntk.plan(job, ooc_ntk.Budget("16GiB", disk="1GiB"), preferences=preferences, out=tmp_path)
    assert (plan.kept_bytes > 0) == (kept and len(plan.superblocks) > 1)
    info = ooc_ntk.info(ooc_ntk.run(job, tmp_path / "run", plan=plan, progress=False).path)
    assert abs(info.moved_bytes / plan.moved_bytes - 1) < 0.05
    assert abs(info.io_ratio / plan.io_ratio - 1) < 0.05
