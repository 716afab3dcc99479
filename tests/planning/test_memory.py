"""The memory model: sums done by hand, and promises that only grow with what is asked for."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ooc_ntk.planning.factors import LayerFactors, Window
from ooc_ntk.planning.grouping import keeping
from ooc_ntk.planning.layout import Layout
from ooc_ntk.planning.memory import (
    ALLOCATOR_SHARE,
    DERIVING_SHARE,
    DEVICE_LIBRARY_BYTES,
    LIBRARY_GROWTH_BYTES,
    STAGING_BYTES,
    STRIPE_BYTES,
    accumulator_bytes,
    memory_need,
    page_locked_bytes,
    pairwise_bytes,
    split_bytes,
    store_bytes,
)
from ooc_ntk.planning.need import MemoryNeed, Terms
from ooc_ntk.planning.spans import FACTORED
from ooc_ntk.planning.tiles import ColumnGrid, Range, even_ranges
from ooc_ntk.planning.workload import ParameterBlock
from tests.planning.strategies import MIB, ample, small_workload, workloads


def layout_of(workload, dataflow, tile, span, passes=1):
    return Layout(dataflow, tile, span, even_ranges(ColumnGrid(workload.columns, span).spans, passes))


def test_a_spill_layout_by_hand():
    """200 samples, 4 rows each, tiles of 100 × 10,000 columns: two chunks of 16 MB in flight on either side."""
    workload = small_workload()
    need = memory_need(workload, layout_of(workload, "spill", 100, 10_000))
    chunk = 100 * 4 * 10_000 * 4
    kernel = 2 * STRIPE_BYTES + 100 * 100 * 12 + 2 * 2 * chunk
    assert need.total("host") == 200 * MIB + kernel + LIBRARY_GROWTH_BYTES + int(ALLOCATOR_SHARE * kernel)
    assert need.total("device") == 0
    assert need.disk["Jacobian tiles on disk"] == 200 * 4 * 50_000 * 4
    assert need.disk["kernel"] == 200 * 200 * 4


def test_a_resident_layout_by_hand():
    hungry = dataclasses.replace(small_workload().derivation, method="vmap", working_bytes=30 * MIB)
    workload = small_workload(derivation=hungry)
    layout = layout_of(workload, "resident", 100, 10_000)
    assert store_bytes(workload, layout) == workload.jacobian_bytes == 200 * 4 * 50_000 * 4
    need = memory_need(workload, layout)
    variable = workload.jacobian_bytes + 3 * 8 * 1000 + int(DERIVING_SHARE * 30 * MIB)
    assert need.total("host") == 200 * MIB + variable + LIBRARY_GROWTH_BYTES + int(ALLOCATOR_SHARE * variable)
    assert "Jacobian tiles on disk" not in need.disk


def test_the_larger_phase_counts():
    """Deriving one batch takes more than contracting: then it is in the promise, and the accumulators are not."""
    hungry = dataclasses.replace(small_workload().derivation, method="vmap", working_bytes=900 * MIB)
    workload = small_workload(derivation=hungry)
    need = memory_need(workload, layout_of(workload, "spill", 100, 10_000))
    variable = 3 * 8 * 1000 + int(DERIVING_SHARE * 900 * MIB) + STAGING_BYTES
    assert need.total("host") == 200 * MIB + variable + LIBRARY_GROWTH_BYTES + int(ALLOCATOR_SHARE * variable)
    assert need.largest("host") == "deriving one batch (1.3 GiB, of rows tasks)"
    assert "read buffers" not in need.host


def test_a_pass_holds_its_own_spans_only():
    workload = small_workload()
    assert store_bytes(workload, layout_of(workload, "recompute", 100, 10_000, 2)) == 200 * 4 * 30_000 * 4
    assert store_bytes(workload, layout_of(workload, "recompute", 100, 10_000, 5)) == 200 * 4 * 10_000 * 4


def test_accumulators_are_a_double_and_a_product():
    workload = small_workload(kernel="full", entries_per_sample=4, precision="float64")
    assert accumulator_bytes(workload, Layout("spill", 10, 5, (Range(0, 1),))) == 40 * 40 * 16


@settings(max_examples=80, deadline=None)
@given(
    workloads(),
    st.sampled_from(["resident", "spill", "recompute"]),
    st.integers(1, 200),
    st.integers(1, 70_000),
    st.integers(1, 4),
    st.sampled_from(["train_samples", "test_samples", "baseline_bytes", "model_bytes", "sample_bytes"]),
)
def test_promises_grow_with_the_job(workload, dataflow, tile, span, passes, grown):
    span = min(span, workload.columns)
    layout = layout_of(workload, dataflow, tile, span, passes if dataflow == "recompute" else 1)
    larger = dataclasses.replace(workload, **{grown: 2 * getattr(workload, grown) + 1})
    before, after = memory_need(workload, layout), memory_need(larger, layout)
    for memory in ("host", "device", "disk"):
        assert after.total(memory) >= before.total(memory), memory
    assert all(value >= 0 for memory in (after.host, after.device, after.disk) for value in memory.values())


@settings(max_examples=60, deadline=None)
@given(workloads(), st.sampled_from(["resident", "spill"]), st.integers(1, 100), st.integers(1, 30_000))
def test_promises_grow_with_the_tile(workload, dataflow, tile, span):
    span = min(span, workload.columns)
    small = memory_need(workload, layout_of(workload, dataflow, tile, span))
    large = memory_need(workload, layout_of(workload, dataflow, 2 * tile, span))
    if layout_of(workload, dataflow, tile, span).sample_grid(workload).row_tiles > 2:
        assert large.total("host") >= small.total("host")
        assert large.total("device") >= small.total("device")


@pytest.mark.parametrize("dataflow", ["resident", "spill"])
def test_on_a_device_the_panels_are_the_devices(dataflow):
    """Contracting takes more of the device than deriving here, and only one of them is done at a time."""
    workload = small_workload(device="cuda")
    need = memory_need(workload, layout_of(workload, dataflow, 100, 10_000))
    # Two being multiplied, two read ahead, each of at most two parts that fill pages.
    panels = 4 * (100 * 4 * 10_000 * 4 + 2 * 4096)
    contracting = {"kernel tile accumulators": 100 * 100 * 12, "panels": panels}
    deriving = {"deriving one batch": int(DERIVING_SHARE * 4 * MIB), "samples": 2 * 8 * 1000}
    assert need.tasks["rows"].device == deriving
    assert need.device == {
        "the model": 200_000,
        "libraries and allocator": DEVICE_LIBRARY_BYTES + int(ALLOCATOR_SHARE * sum(contracting.values())),
        **contracting,
    }


@pytest.mark.parametrize("dataflow", ["resident", "spill"])
def test_panels_go_to_a_device_by_page_locked_memory_which_counts_as_host_memory_too(dataflow):
    workload = small_workload(device="cuda")
    need = memory_need(workload, layout_of(workload, dataflow, 100, 10_000))
    # Panels of 16,000,000 bytes: torch locks 2**24 for each of the two on their way, however many the device holds.
    assert need.pinned == {"panels on their way": 2 * 2**24}
    assert need.host["panels on their way"] == need.total("pinned")
    assert "read buffers" not in need.tasks["kernel"].host
    assert memory_need(small_workload(), layout_of(workload, dataflow, 100, 10_000)).total("pinned") == 0


@pytest.mark.parametrize("dataflow", ["resident", "spill"])
def test_factors_and_samples_cross_to_a_device_and_back_by_page_locked_memory(dataflow):
    """Two batches of each, the last two being captured and copied; a norm for every row beside its factors."""
    factors = LayerFactors("linear", 6, 50, 40)
    block = ParameterBlock("fc", ("w",), 0, 2000, "rule", "", factors)
    workload = dataclasses.replace(small_workload(device="cuda"), blocks=(block,))
    layout = Layout(dataflow, 100, 2000, (Range(0, 1),), (FACTORED,))
    need = memory_need(workload, layout).tasks["rows"]
    batch, rows = workload.derivation.batch_size, workload.rows_per_sample
    slot = batch * (6 * 50 + rows * 6 * 40) * 4 + 8 * batch * rows + 2 * 4096
    assert need.device["factors"] == 2 * slot
    assert need.pinned == {
        "samples on their way": 2 * page_locked_bytes(batch * workload.sample_bytes),
        "factors on their way": 2 * page_locked_bytes(slot),
    }
    assert all(need.host[term] == size for term, size in need.pinned.items())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_bf16_parts_count(device):
    """A second product, on a device a third one, and both sides in parts: as float32, one being split, or as bf16."""
    workload = small_workload(device=device, precision="bf16x3")
    layout = layout_of(workload, "spill", 100, 10_000)
    assert accumulator_bytes(workload, layout) == 100 * 100 * (8 + 4 * (2 if device == "cpu" else 3))
    need = memory_need(workload, layout).tasks["kernel"]
    assert need.of("host" if device == "cpu" else "device")["bf16 parts"] == (
        3 * 100 * 4096 * 8 if device == "cpu" else 2 * 100 * 2**15 * 4 + 2**24
    )
    assert split_bytes(small_workload(device=device), layout) == 0


def test_panels_stay_in_the_memory_that_is_left_on_the_device():
    workload = small_workload(device="cuda", train_samples=400)
    layout = layout_of(workload, "resident", 100, 10_000)
    whole = 5 * (100 * 4 * 10_000 * 4 + 2 * 4096)  # all panels of a row tile
    need = memory_need(workload, layout).total("device")
    for room, wanted in ((0, 0), (2.1 * whole, 2 * whole), (100 * whole, 4 * whole)):
        limits = ample(device=int(need + 1.04 * room) + 10)
        found = keeping(workload, limits, layout)
        assert found.kept_bytes == wanted
        assert memory_need(workload, found).total("device") <= limits.device
    several = layout_of(workload, "recompute", 100, 10_000, 5)
    assert keeping(workload, ample(), several) == several


def test_the_kind_of_task_that_takes_the_most_counts_for_each_memory_by_itself():
    stays = Terms(host={"process": 100}, disk={"kernel": 7})
    tasks = {"rows": Terms(host={"batch": 30}, disk={}), "kernel": Terms(host={"sums": 20}, disk={"old tile": 2})}
    need = MemoryNeed(stays, tasks)
    assert dict(need.host) == {"process": 100, "batch": 30}
    assert dict(need.disk) == {"kernel": 7, "old tile": 2}
    assert need.largest("host") == "process (100 B)"
    assert need.largest("disk") == "kernel (7 B)"
    assert MemoryNeed(Terms(), tasks).largest("host") == "batch (30 B, of rows tasks)"


def test_blocks_of_a_convolution_hold_pixels_only_where_windows_are_not_copied_out():
    """8 × 8 pixels in steps of 2 give 16 positions: windows of a few inputs are copied, and blocks are of positions."""
    window = Window((8, 8), (3, 3), (2, 2), (1, 1), (1, 1), (1, 1))
    factors = LayerFactors("convolution", 16, 432, 64, window=window)
    assert not factors.by_pixels
    sides = 512 // 16, 1024 // 16
    blocks = 5 * sides[0] * sides[1] * 16**2
    unfolded = 2 * sum(sides) * 16 * 432
    copied = sum(sides) * (factors.input_items + 6 * factors.gradient_items)
    assert pairwise_bytes(factors, 200, 6, 1, 4) == 4 * (blocks + unfolded + copied)
