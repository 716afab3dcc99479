"""The cost model: seconds and bytes moved of a layout, and the lower bound that bytes are held against."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Final

from .layout import CONTRACTION_COLUMNS, Layout
from .memory import fixed_host_bytes, group_rows, slab_rows, store_bytes
from .rates import CALIBRATED_DEPTH, MachineRates
from .tiles import count_tiles
from .workload import Workload, contraction_flops

#: Seconds to hand out, fill, check and store one slab of rows, beside the copying itself (measured: 20–35 µs).
SLAB_SECONDS: Final = 3.5e-5

#: Seconds to start one product and hand over its buffers, beside the product itself (measured: 0.05–0.2 ms).
PRODUCT_SECONDS: Final = 1e-4


#: Seconds per entry of a kernel tile to clear, check, convert, mirror and hand over (measured: 5–13 ns).
ENTRY_SECONDS: Final = 1e-8


@dataclass(frozen=True)
class Cost:
    """What running a layout costs.

    Attributes:
        rows_seconds: deriving all rows in all passes, with storing them.
        kernel_seconds: contracting, with reading and writing.
        longest_task_seconds: the longest single kernel task.
        flops: contraction FLOPs, symmetric part counted once.
        bytes_read: bytes read from disk.
        bytes_written: bytes written to disk.
        io_ratio: ``Q/LB`` of the disk→host level for a spill layout, otherwise None.
    """

    rows_seconds: float
    kernel_seconds: float
    longest_task_seconds: float
    flops: int
    bytes_read: int
    bytes_written: int
    io_ratio: float | None

    @property
    def seconds(self) -> float:
        """Seconds of the whole run."""
        return self.rows_seconds + self.kernel_seconds


@dataclass(frozen=True)
class _TileClass:
    """Kernel tiles that cost the same: kernel rows and columns, Gram or not, mirrored or not."""

    rows: int
    columns: int
    symmetric: bool
    mirrored: bool


def _kernel_tile_classes(workload: Workload, layout: Layout) -> Counter[_TileClass]:
    """Count the kernel tiles of each class."""
    grid, entries = layout.sample_grid(workload), workload.entries_per_sample
    classes: Counter[_TileClass] = Counter()
    last = grid.column_tiles - 1
    for i in range(grid.row_tiles):
        rows = len(grid.rows(i)) * entries
        if i <= last:
            classes[_TileClass(rows, rows, symmetric=True, mirrored=False)] += 1
        whole = min(i, last)
        if whole:
            mirrored = grid.mirror_rows(i) > 0
            classes[_TileClass(rows, layout.tile_samples * entries, symmetric=False, mirrored=mirrored)] += whole
        if i > last:
            classes[_TileClass(rows, len(grid.columns(last)) * entries, symmetric=False, mirrored=False)] += 1
    return classes


def _slabs(workload: Workload, layout: Layout) -> int:
    """Slabs of rows handed to the store in all passes: one per group of rows and span."""
    spans = layout.column_grid(workload).spans
    rows = workload.samples * workload.rows_per_sample
    per_group = group_rows(layout.span_columns, workload.columns // len(layout.passes), workload.item_bytes)
    if workload.derivation.method == "vmap":
        per_group = workload.derivation.batch_size * workload.rows_per_sample
    if not layout.in_memory:
        per_group = min(per_group, slab_rows(layout.span_columns, workload.item_bytes))
    return count_tiles(rows, per_group) * spans


def _contraction_seconds(workload: Workload, layout: Layout, rates: MachineRates, tile: _TileClass) -> float:
    """Seconds to contract one kernel tile over all columns, from tiles in memory."""
    depth_per_column = workload.rows_per_sample // workload.entries_per_sample
    spans = layout.column_grid(workload).spans
    blocks = spans * count_tiles(layout.span_columns * depth_per_column, CONTRACTION_COLUMNS)
    depth = workload.columns * depth_per_column
    seconds = rates.gemm_seconds(tile.rows, tile.columns, depth, workload.precision, symmetric=tile.symmetric)
    # The rates include one addition to the float64 sum per CALIBRATED_DEPTH columns; narrower spans add more often.
    # An addition reads 16 bytes an entry and writes 12, at about the rate of copying rows, whose norms are taken too.
    more = max(0.0, blocks - depth / CALIBRATED_DEPTH)
    return seconds + more * tile.rows * tile.columns * 28 / (3 * rates.copy) + blocks * PRODUCT_SECONDS


def lower_bound_bytes(workload: Workload, fast_bytes: int) -> float:
    """Fewest bytes any schedule can move between disk and ``fast_bytes`` of memory.

    ``max(N·P·s_J, N²·P·s_J·√(s_K/(2S)) + 2·M·N·P·s_J·√(s_K/S)) + bytes of K``: the SYRK bound of Beaumont et al.
    2022 (arXiv 2202.10217) for the train square and the matrix-product bound for the test rectangle.

    Args:
        workload: the measured job; rows are samples × entries, columns are parameters × the contracted outputs.
        fast_bytes: bytes of fast memory (S).

    Returns:
        Bytes.

    >>> from .workload import Derivation, ParameterBlock
    >>> w = Workload("trace", 1000, 0, 1, 1, 1, (ParameterBlock("b", ("p",), 0, 500),), 4, 0, 0,
    ...     Derivation("loop", 1, 1, 1, 0, 0))
    >>> lower_bound_bytes(w, 10**9) == 1000 * 500 * 4 + 1000 * 1000 * 4
    True
    >>> round(lower_bound_bytes(w, 8 * 10**3) / 1e6)
    36
    """
    item = workload.item_bytes
    train = workload.train_samples * workload.entries_per_sample
    test = workload.test_samples * workload.entries_per_sample
    columns = workload.columns * workload.rows_per_sample // workload.entries_per_sample
    once = (train + test) * columns * item
    syrk = train * train * columns * item * math.sqrt(item / (2 * fast_bytes))
    gemm = 2 * test * train * columns * item * math.sqrt(item / fast_bytes)
    return max(once, syrk + gemm) + workload.kernel_bytes


def price(workload: Workload, layout: Layout, rates: MachineRates, host_limit: int) -> Cost:
    """Price a layout on a machine.

    Args:
        workload: the measured job.
        layout: tiles, spans and passes.
        rates: the machine's rates.
        host_limit: host budget in bytes, which sets the fast memory of the lower bound.

    Returns:
        The cost.
    """
    grid, columns = layout.sample_grid(workload), layout.column_grid(workload)
    item, per_sample = workload.item_bytes, workload.rows_per_sample * workload.item_bytes
    derivation = workload.derivation
    passes = len(layout.passes)

    rows_seconds = grid.row_tiles * passes * rates.commit_seconds
    shrinking = derivation.seconds_per_sample - derivation.chain_seconds_per_sample
    for index in range(passes):
        share = layout.derived_columns(workload, index) / workload.columns
        rows_seconds += workload.samples * (derivation.chain_seconds_per_sample + share * shrinking)
    # Only the memory of the widest pass is ever touched for the first time; later passes use it again.
    fresh = store_bytes(workload, layout) if layout.in_memory else 0
    rows_seconds += fresh / rates.fill + (workload.jacobian_bytes - fresh) / rates.copy
    rows_seconds += _slabs(workload, layout) * SLAB_SECONDS
    if not layout.in_memory:
        rows_seconds += workload.jacobian_bytes / rates.disk_write

    tiles = _kernel_tile_classes(workload, layout)
    panel_bytes = layout.tile_samples * per_sample * columns.spans * layout.span_columns
    tile_bytes = (layout.tile_samples * workload.entries_per_sample) ** 2 * item
    kernel_seconds, longest, read, written = 0.0, 0.0, 0, 0
    for tile, count in tiles.items():
        seconds = _contraction_seconds(workload, layout, rates, tile)
        loaded = panel_bytes * (1 if tile.symmetric else 2)
        if workload.device != "cpu":
            seconds = max(seconds, loaded / rates.host_to_device)
        if not layout.in_memory:
            seconds = max(seconds, loaded / rates.disk_read)
            read += count * loaded
        stored = tile_bytes * (2 if tile.mirrored else 1) + (passes - 1) * tile_bytes
        read += count * (passes - 1) * tile_bytes
        written += count * stored
        seconds += passes * tile.rows * tile.columns * ENTRY_SECONDS
        seconds += (stored + (passes - 1) * tile_bytes) / rates.disk_write + passes * rates.commit_seconds
        longest = max(longest, seconds / passes)
        kernel_seconds += count * seconds
    ratio = None
    if not layout.in_memory:
        fast = max(1, host_limit - fixed_host_bytes(workload))
        # Q counts what moves while contracting: every read of a tile and the kernel written (DESIGN: dataflows).
        ratio = (read + workload.kernel_bytes) / lower_bound_bytes(workload, fast)
        written += grid.row_tiles * panel_bytes
    return Cost(
        rows_seconds=rows_seconds,
        kernel_seconds=kernel_seconds,
        longest_task_seconds=longest,
        flops=contraction_flops(workload),
        bytes_read=read,
        bytes_written=written,
        io_ratio=ratio,
    )
