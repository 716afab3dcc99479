"""The cost model against sums done by hand."""

import dataclasses
import math

import pytest

from ooc_ntk.errors import StorageError
from ooc_ntk.planning.cost import contraction_flops, lower_bound_bytes, price
from ooc_ntk.planning.layout import Layout
from ooc_ntk.planning.memory import LIBRARY_GROWTH_BYTES
from ooc_ntk.planning.rates import UNCALIBRATED, MachineRates
from ooc_ntk.planning.tiles import Range, even_ranges
from tests.planning.strategies import small_workload


def workload(**changes):
    fields = {"train_samples": 100, "outputs": 3, "rows_per_sample": 3, "sizes": (40, 10)}
    return small_workload(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "fast", "wanted"),
    [
        # Everything fits: the Jacobian once (100 × 3 × 50 × 4) and the kernel (100 × 100 × 4).
        ({}, 2**30, 60_000 + 40_000),
        # 100 × 100 × 150 × 4 × √(4/1600)
        ({}, 800, 300_000 + 40_000),
        # with 100 test samples: + 2 × 100 × 100 × 150 × 4 × √(4/800), kernel twice as large
        ({"test_samples": 100}, 800, 300_000 + 12_000_000 * math.sqrt(0.005) + 80_000),
        ({"test_samples": 100}, 2**40, 120_000 + 80_000),
        # full: 300 rows of 50 columns, kernel 300 × 300
        ({"kernel": "full", "entries_per_sample": 3}, 2**30, 60_000 + 360_000),
        ({"kernel": "full", "entries_per_sample": 3}, 200, 300 * 300 * 50 * 4 * 0.1 + 360_000),
        # pseudo: one row per sample, in float64
        ({"kernel": "pseudo", "rows_per_sample": 1, "precision": "float64"}, 2**30, 40_000 + 80_000),
    ],
)
def test_lower_bound(changes, fast, wanted):
    assert lower_bound_bytes(workload(**changes), fast) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, 100 * 100 * 150),
        ({"test_samples": 7}, 100 * 100 * 150 + 2 * 7 * 100 * 150),
        ({"kernel": "full", "entries_per_sample": 3}, 300 * 300 * 50),
        ({"kernel": "pseudo", "rows_per_sample": 1}, 100 * 100 * 50),
    ],
)
def test_flops(changes, wanted):
    assert contraction_flops(workload(**changes), Layout("resident", 40, 50, (Range(0, 1),))) == wanted


def test_bytes_of_a_spill_layout():
    """100 train and 20 test samples in tiles of 40, 50 columns in spans of 20: three row tiles and column tiles."""
    job = workload(test_samples=20)
    layout = Layout("spill", 40, 20, (Range(0, 3),))
    limit = job.baseline_bytes + LIBRARY_GROWTH_BYTES + 2**20
    cost = price(job, layout, UNCALIBRATED, limit)
    panel = 40 * 3 * 60 * 4  # one row tile, its last span padded
    tile = 40 * 40 * 4
    # Tiles (0,0) (1,1) (2,2) read one panel, (1,0) (2,0) (2,1) two; these three are mirrored (80..100 are train).
    assert cost.bytes_read == (3 + 6) * panel
    assert cost.bytes_written == 3 * panel + 3 * tile + 3 * 2 * tile
    # The kernel counts as it is written, its edge tiles padded.
    assert cost.io_ratio == pytest.approx((cost.bytes_read + 9 * tile) / lower_bound_bytes(job, 2**20))
    # Held in memory, only the kernel moves.
    resident = price(job, dataclasses.replace(layout, dataflow="resident"), UNCALIBRATED, limit)
    assert (resident.bytes_read, resident.bytes_written, resident.io_ratio) == (0, 9 * tile, None)
    assert resident.seconds < cost.seconds


def test_seconds_of_passes():
    """Two passes pay the forward pass and the backward chain twice, and the block that is cut (40 of 50) as well."""
    derivation = dataclasses.replace(workload().derivation, seconds_per_sample=1.0, chain_seconds_per_sample=0.4)
    job = workload(derivation=derivation)
    free = MachineRates(
        "infinitely fast",
        gemm={"float32": {1: 1e30}},
        syrk={"float32": {1: 1e30}},
        fill=1e30,
        copy=1e30,
        disk_write=1e30,
        disk_read=1e30,
        host_to_device=1e30,
        commit_seconds=0.0,
    )
    one = price(job, Layout("resident", 50, 25, even_ranges(2, 1)), free, 2**40)
    two = price(job, Layout("recompute", 50, 25, even_ranges(2, 2)), free, 2**40)
    # What a slab or a product costs beside its bytes and FLOPs is microseconds here.
    assert one.seconds == pytest.approx(100 * 1.0, rel=1e-4)
    assert two.seconds == pytest.approx(100 * (2 * 0.4 + 0.6 * (40 + 50) / 50), rel=1e-4)
    # Every tile of the first generation is written, and read again by the second.
    tile = 50 * 50 * 4
    assert two.bytes_read == 3 * tile
    assert two.bytes_written == one.bytes_written + 3 * tile


def test_a_panel_is_copied_to_a_device_once_for_all_tiles_of_a_superblock():
    slow = dataclasses.replace(UNCALIBRATED, host_to_device=1e3, disk_read=1e30)
    job = workload(device="cuda")
    alone, together = (Layout("spill", 25, 50, (Range(0, 1),), superblock_tiles=tiles) for tiles in (1, 100))
    panel = 25 * 50 * job.rows_per_sample * 4
    seconds = [price(job, layout, slow, 2**40).kernel_seconds for layout in (alone, together)]
    # Four diagonal tiles of one panel, six of two; or each of the four panels once.
    assert seconds[0] - seconds[1] == pytest.approx((16 - 4) * panel / 1e3, rel=0.02)


def test_what_stays_on_a_device_is_sent_there_once():
    slow = dataclasses.replace(UNCALIBRATED, host_to_device=1e3)
    job = workload(device="cuda")
    layout = Layout("resident", 25, 50, (Range(0, 1),))
    panel = 25 * 50 * job.rows_per_sample * 4
    sent = (
        price(job, layout, slow, 2**40).kernel_seconds,
        price(job, dataclasses.replace(layout, kept_bytes=2**40), slow, 2**40).kernel_seconds,
    )
    assert sent[0] - sent[1] == pytest.approx((16 - 4) * panel / 1e3, rel=0.02)


def test_commits_are_counted():
    slow = dataclasses.replace(UNCALIBRATED, commit_seconds=100.0)
    job, layout = workload(), Layout("resident", 50, 50, (Range(0, 1),))
    more = price(job, layout, slow, 2**40).seconds - price(job, layout, UNCALIBRATED, 2**40).seconds
    assert more == pytest.approx((2 + 3) * (100 - UNCALIBRATED.commit_seconds))


class TestRates:
    def test_json_there_and_back(self):
        assert MachineRates.from_json(UNCALIBRATED.to_json()) == UNCALIBRATED

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"gemm": 3}', '{"gemm": {"float32": {"a": 1}}, "syrk": {}}'])
    def test_garbage_is_refused(self, text):
        with pytest.raises(StorageError, match="ooc-ntk calibrate"):
            MachineRates.from_json(text)

    def test_rates_of_before_there_were_three_products_are_measured_again(self):
        old = dataclasses.replace(UNCALIBRATED, gemm={"float32": UNCALIBRATED.gemm["float32"]})
        with pytest.raises(StorageError, match="without bf16x3"):
            MachineRates.from_json(old.to_json())

    def test_three_products_take_three_times_as_long(self):
        seconds = [UNCALIBRATED.gemm_seconds(64, 64, 1000, precision) for precision in ("float32", "bf16x3")]
        assert seconds[1] == pytest.approx(3 * seconds[0])

    def test_rates_grow_with_the_edge(self):
        seconds = [
            UNCALIBRATED.gemm_seconds(edge, edge, 1000, "float32") / edge**2 for edge in (1, 8, 32, 90, 512, 9999)
        ]
        assert seconds == sorted(seconds, reverse=True)
        assert seconds[-1] == pytest.approx(2 * 1000 / 5e10)

    def test_the_narrower_side_sets_the_rate(self):
        wide = UNCALIBRATED.gemm_seconds(512, 32, 1000, "float32")
        assert wide == pytest.approx(2 * 512 * 32 * 1000 / 1.25e10)
