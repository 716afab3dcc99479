"""The cost model: seconds and bytes moved of a layout, and the lower bound that bytes are held against."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from ooc_ntk.units import partial_products

from .layers import layer_names
from .layout import CONTRACTION_COLUMNS, Layout
from .memory import DEVICE_POSITIONS, fixed_host_bytes, folds, group_rows, slab_rows, store_bytes
from .rates import CALIBRATED_DEPTH, MachineRates
from .spans import Choice
from .superblocks import kept_panels, panel_loads
from .tiles import SampleGrid, count_tiles
from .workload import ParameterBlock, Workload

#: Seconds to hand out, fill, check and store one slab of rows, beside the copying itself (measured: 20–35 µs).
SLAB_SECONDS: Final = 3.5e-5

#: Seconds to start one product and hand over its buffers, beside the product itself (measured: 0.05–0.2 ms).
PRODUCT_SECONDS: Final = 1e-4

#: Seconds per entry of a kernel tile to clear, check, convert, mirror and hand over (measured: 5–13 ns).
ENTRY_SECONDS: Final = 1e-8

#: Samples of the sub-tiles in which pairwise contractions of several positions are made: about this many positions.
PAIRWISE_POSITIONS: Final = 512

#: Share of the rates of products that expanding and multiplying in turns reaches (measured on MLP, ResNet, ViT and a
#: small convolutional network, 64 to 625 samples per tile: 0.63 to 0.77).
EXPANDED_SHARE: Final = 0.7


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
        moved_bytes: bytes that cross the disk→host level while contracting (Q): tiles read, kernel written; of a spill
            layout, otherwise 0.
        bound_bytes: fewest bytes that any schedule moves there (LB), otherwise 0.
    """

    rows_seconds: float
    kernel_seconds: float
    longest_task_seconds: float
    flops: int
    bytes_read: int
    bytes_written: int
    moved_bytes: int = 0
    bound_bytes: float = 0.0

    @property
    def io_ratio(self) -> float | None:
        """``Q/LB``, None where nothing is spilled."""
        return self.moved_bytes / self.bound_bytes if self.bound_bytes else None

    @property
    def seconds(self) -> float:
        """Seconds of the whole run."""
        return self.rows_seconds + self.kernel_seconds


@dataclass(frozen=True)
class _TileClass:
    """Kernel tiles that cost the same: samples of rows and columns, Gram or not, mirrored or not."""

    rows: int
    columns: int
    symmetric: bool
    mirrored: bool

    @property
    def pairs(self) -> float:
        """Pairs of samples to contract."""
        return self.rows * self.columns / (2 if self.symmetric else 1)

    @property
    def panels(self) -> int:
        """Samples whose factors are expanded."""
        return self.rows + (0 if self.symmetric else self.columns)


@lru_cache(maxsize=1024)
def _kernel_tile_classes(grid: SampleGrid) -> Counter[_TileClass]:
    """Count the kernel tiles of each class; not to be changed."""
    classes: Counter[_TileClass] = Counter()
    last = grid.column_tiles - 1
    for i in range(grid.row_tiles):
        rows = len(grid.rows(i))
        if i <= last:
            classes[_TileClass(rows, rows, symmetric=True, mirrored=False)] += 1
        whole = min(i, last)
        if whole:
            mirrored = grid.mirror_rows(i) > 0
            classes[_TileClass(rows, grid.tile, symmetric=False, mirrored=mirrored)] += whole
        if i > last:
            classes[_TileClass(rows, len(grid.columns(last)), symmetric=False, mirrored=False)] += 1
    return classes


def spread(tasks: int, workers: int) -> float:
    """Share of the time of so many equal tasks that several workers need, who each do whole ones.

    >>> spread(10, 4), spread(3, 1), spread(0, 2)
    (0.3, 1.0, 1.0)
    """
    return math.ceil(tasks / workers) / tasks if tasks and workers > 1 else 1.0


def block_flops(workload: Workload, block: ParameterBlock, choice: Choice, panels: float | None = None) -> int:
    """FLOPs to contract one block, the symmetric part counted once.

    Args:
        workload: the measured job.
        block: the block.
        choice: how it is held and contracted.
        panels: samples whose factors are expanded, once per kernel tile that needs them; None for each once.

    Returns:
        FLOPs. A dense block costs ``N²·C·a·b`` (DESIGN: parameter block), with test rows more; three times that in
        ``bf16x3``, whose expanding is in float32.
    """
    rows, entries = workload.rows_per_sample, workload.entries_per_sample
    pairs = workload.pairs * partial_products(workload.precision)
    if choice.contraction == "gemm":
        product = int(pairs * 2 * block.columns * rows * entries)
        if choice.representation == "dense" or block.factors is None:
            return product
        return product + int((workload.samples if panels is None else panels) * block.factors.expand_flops(rows))
    assert block.factors is not None
    return int(pairs * block.factors.pairwise_pair_flops(rows, entries))


def contraction_flops(workload: Workload, layout: Layout) -> int:
    """FLOPs to contract the Jacobian into the kernel as a layout does it, the square part counted once per pair.

    >>> from .workload import Derivation, ParameterBlock
    >>> d = Derivation("loop", 1, 0.1, 0.1, 0, 0)
    >>> w = Workload("trace", 100, 0, 10, 10, 1, (ParameterBlock("fc", ("fc.weight",), 0, 50),), 4, 0, 0, d)
    >>> contraction_flops(w, Layout("resident", 100, 50, ())) == 100 * 100 * 10 * 50
    True
    """
    panels = sum(tile.panels * count for tile, count in _kernel_tile_classes(layout.sample_grid(workload)).items())
    choices = layout.block_choices(workload)
    return sum(
        block_flops(workload, block, choice, panels) for block, choice in zip(workload.blocks, choices, strict=True)
    )


def expand_seconds(workload: Workload, block: ParameterBlock, rates: MachineRates) -> float:
    """Seconds to expand the factors of one sample into dense gradients, as timed in the probe or by the rates."""
    if block.factors is None:
        return 0.0
    if block.expand_seconds is not None:
        return block.expand_seconds
    return rates.expand_seconds(block.factors.expand_flops(workload.rows_per_sample), workload.precision)


def pair_seconds(workload: Workload, block: ParameterBlock, choice: Choice, rates: MachineRates, edge: int) -> float:
    """Seconds to contract one pair of samples of a block that is held as factors, without expanding it.

    Args:
        workload: the measured job.
        block: the block.
        choice: ``gemm``, ``pairwise`` or ``matching``.
        rates: the machine's rates.
        edge: samples per tile.

    Returns:
        Seconds per (unordered) pair.
    """
    rows, entries, factors = workload.rows_per_sample, workload.entries_per_sample, block.factors
    assert factors is not None
    if choice.contraction == "gemm":
        seconds = rates.gemm_seconds(1, 1, block.columns * rows * entries, workload.precision, edge=edge * entries)
        return seconds / EXPANDED_SHARE
    if choice.contraction == "pairwise" and block.pairwise_seconds is not None:
        return block.pairwise_seconds
    flops = factors.pairwise_pair_flops(rows, entries)
    sub = PAIRWISE_POSITIONS if workload.device == "cpu" else DEVICE_POSITIONS[0]
    sub = edge * entries if factors.single else sub
    seconds = rates.gemm_seconds(1, 1, flops // 2, workload.precision, edge=sub)
    return seconds + rates.element_seconds(factors.pairwise_elements(entries))


def _slabs(workload: Workload, layout: Layout) -> int:
    """Slabs of rows handed to the store in all passes: one per group of rows and span."""
    rows = workload.samples * workload.rows_per_sample
    dense, whole = 0, 0
    for span in layout.spans(workload):
        if span.block is None:
            dense += 1
        else:
            whole += 2
    batches = count_tiles(workload.samples, workload.derivation.batch_size)
    if not dense:
        return batches * whole
    width = sum(span.columns for span in layout.spans(workload)) // len(layout.passes)
    per_group = group_rows(layout.span_columns, max(1, width), workload.item_bytes)
    if workload.derivation.method != "loop":
        per_group = workload.derivation.batch_size * workload.rows_per_sample
    if not layout.in_memory:
        per_group = min(per_group, slab_rows(layout.span_columns, workload.item_bytes))
    return count_tiles(rows, per_group) * dense + batches * whole


@dataclass(frozen=True)
class _Blocks:
    """A layout's blocks summed up: what one sample or one pair of samples costs.

    Attributes:
        dense_columns: columns held as gradients.
        materialise: seconds per sample to expand what a rule derives and the layout holds dense.
        expand: seconds per sample to expand what is held as factors, once per kernel tile and side.
        pair: seconds per pair of samples to contract what is held as factors.
        expanded_columns: columns that are expanded.
    """

    dense_columns: int
    materialise: float
    expand: float
    pair: float
    expanded_columns: int


def _sum_up(workload: Workload, layout: Layout, rates: MachineRates) -> _Blocks:
    dense, materialise, expand, pair, expanded = 0, 0.0, 0.0, 0.0, 0
    for block, choice in zip(workload.blocks, layout.block_choices(workload), strict=True):
        if choice.representation == "dense":
            dense += block.columns
            materialise += expand_seconds(workload, block, rates)
            continue
        pair += pair_seconds(workload, block, choice, rates, layout.tile_samples)
        if choice.contraction == "gemm":
            expand += expand_seconds(workload, block, rates) / EXPANDED_SHARE
            expanded += block.columns
    return _Blocks(dense, materialise, expand, pair, expanded)


def _contraction_seconds(
    workload: Workload, layout: Layout, rates: MachineRates, blocks: _Blocks, tile: _TileClass
) -> float:
    """Seconds to contract one kernel tile over all columns, from tiles in memory."""
    entries = workload.entries_per_sample
    depth_per_column = workload.rows_per_sample // entries
    rows, columns = tile.rows * entries, tile.columns * entries
    spans = count_tiles(blocks.dense_columns, layout.span_columns)
    products = spans * count_tiles(layout.span_columns * depth_per_column, CONTRACTION_COLUMNS)
    depth = blocks.dense_columns * depth_per_column
    seconds = 0.0
    if depth:
        seconds = rates.gemm_seconds(rows, columns, depth, workload.precision, symmetric=tile.symmetric)
    seconds += tile.pairs * blocks.pair + tile.panels * blocks.expand
    # The rates include one addition to the float64 sum per CALIBRATED_DEPTH columns; narrower spans add more often.
    # An addition reads 16 bytes an entry and writes 12, at about the rate of copying rows, whose norms are taken too.
    factored = len(workload.blocks) - sum(c.representation == "dense" for c in layout.block_choices(workload))
    more = (products - depth / CALIBRATED_DEPTH) * 28 + factored * 28
    if layout.superblock_tiles > 1:
        # Products are added to float32 sums, 12 bytes an entry; those of factors to a sum of their own before.
        more = products * 12 - depth / CALIBRATED_DEPTH * 28 + factored * 52
    return seconds + max(0.0, more) * rows * columns / (3 * rates.copy) + (products + factored) * PRODUCT_SECONDS


def lower_bound_bytes(workload: Workload, fast_bytes: int, sample_bytes: int | None = None) -> float:
    """Fewest bytes any schedule can move between disk and ``fast_bytes`` of memory.

    ``max(N·P·s_J, N²·P·s_J·√(s_K/(2S)) + 2·M·N·P·s_J·√(s_K/S)) + bytes of K``: the SYRK bound of Beaumont et al.
    2022 (arXiv 2202.10217) for the train square and the matrix-product bound for the test rectangle. For a store of
    factors P becomes the held size.

    Args:
        workload: the measured job; rows are samples × entries, columns are parameters × the contracted outputs.
        fast_bytes: bytes of fast memory (S).
        sample_bytes: bytes held of one sample; None for dense gradients.

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
    item, entries = workload.item_bytes, workload.entries_per_sample
    if sample_bytes is None:
        sample_bytes = workload.columns * workload.rows_per_sample * workload.held_item_bytes
    train, test = workload.train_samples, workload.test_samples
    once = (train + test) * sample_bytes
    syrk = train * train * entries * sample_bytes * math.sqrt(item / (2 * fast_bytes))
    gemm = 2 * test * train * entries * sample_bytes * math.sqrt(item / fast_bytes)
    return max(once, syrk + gemm) + workload.kernel_bytes


def _rows_seconds(workload: Workload, layout: Layout, rates: MachineRates, blocks: _Blocks) -> float:
    """Seconds of all ``rows`` tasks."""
    derivation, passes = workload.derivation, len(layout.passes)
    seconds = layout.sample_grid(workload).row_tiles * passes * rates.commit_seconds
    uncovered = sum(block.columns for block in workload.blocks if block.source != "rule")
    shrinking = derivation.seconds_per_sample - derivation.chain_seconds_per_sample
    for index in range(passes):
        derived = [workload.blocks[number] for number in layout.pass_blocks(workload, index)]
        others = sum(block.columns for block in derived if block.source != "rule")
        if others:
            seconds += workload.samples * (derivation.chain_seconds_per_sample + others / uncovered * shrinking)
        if any(block.source == "rule" for block in derived):
            seconds += workload.samples * derivation.capture_seconds_per_sample
        for number, block in zip(layout.pass_blocks(workload, index), derived, strict=True):
            if block.source == "rule" and layout.block_choices(workload)[number].representation == "dense":
                seconds += workload.samples * expand_seconds(workload, block, rates)
    # The squared norms of test samples, which the kernel itself does not hold.
    seconds += workload.test_samples * blocks.expand
    held = sum(layout.cut(workload).held) * workload.samples
    # Only the memory of the widest pass is ever touched for the first time; later passes use it again.
    fresh = store_bytes(workload, layout) if layout.in_memory else 0
    seconds += fresh / rates.fill + max(0, held - fresh) / rates.copy
    seconds += _slabs(workload, layout) * SLAB_SECONDS
    if not layout.in_memory:
        seconds += held / rates.disk_write
    return seconds


def price(workload: Workload, layout: Layout, rates: MachineRates, host_limit: int) -> Cost:
    """Price a layout on a machine.

    Args:
        workload: the measured job.
        layout: tiles, spans, passes and the choice of every block.
        rates: the machine's rates.
        host_limit: host budget in bytes, which sets the fast memory of the lower bound.

    Returns:
        The cost.
    """
    grid, item, entries = layout.sample_grid(workload), workload.item_bytes, workload.entries_per_sample
    passes, blocks = len(layout.passes), _sum_up(workload, layout, rates)
    features_only = workload.sketch is not None and workload.sketch.features_only
    tiles = Counter[_TileClass]() if features_only else _kernel_tile_classes(grid)
    tile_bytes = (layout.tile_samples * entries) ** 2 * item
    layers = len(layer_names(workload.blocks)) if workload.by_layer else 0
    loads = _loads(workload, layout, tiles)
    kernel_seconds, longest, computed, written = 0.0, 0.0, 0.0, 0
    for tile, count in tiles.items():
        seconds = _contraction_seconds(workload, layout, rates, blocks, tile)
        stored = tile_bytes * (2 if tile.mirrored else 1) + (passes - 1) * tile_bytes
        if layers:
            stored += layers * tile_bytes * (2 if tile.mirrored else 1)
            # Every block's part is taken out, added to two sums and converted.
            seconds += (len(workload.blocks) + layers) * tile.rows * tile.columns * entries**2 * ENTRY_SECONDS
        if workload.device != "cpu" and layout.in_memory:
            seconds = max(seconds, loads.bytes_per_tile / rates.host_to_device)
        computed += count * seconds
        written += count * stored
        rest = passes * tile.rows * tile.columns * entries**2 * ENTRY_SECONDS
        rest += (stored + (passes - 1) * tile_bytes) / rates.disk_write
        if layout.superblock_tiles == 1:
            rest += passes * rates.commit_seconds
        longest = max(longest, (seconds + rest) / passes)
        kernel_seconds += count * rest
    read = sum(tiles.values()) * (passes - 1) * tile_bytes
    folded = folds(layout, len(layout.spans(workload))) * sum(tiles.values()) * tile_bytes * 8 // item
    read, written = read + folded, written + folded
    kernel_seconds += folded / rates.disk_read + folded / rates.disk_write
    if not layout.in_memory:
        read += loads.bytes
        # While some panels are multiplied the next ones are read.
        computed = max(computed, loads.bytes / rates.disk_read)
        if workload.device != "cpu":  # each panel is copied once for all tiles of a superblock
            computed = max(computed, loads.bytes / rates.host_to_device)
        if tiles:
            longest = max(longest * loads.tiles_per_task, loads.bytes / rates.disk_read / loads.tasks)
    if layout.superblock_tiles > 1:
        kernel_seconds += loads.tasks * rates.commit_seconds
    kernel_seconds += computed
    moved, bound = 0, 0.0
    if not layout.in_memory:
        moved, bound = read + written, _bound(workload, layout, host_limit)
    rows_seconds = _rows_seconds(workload, layout, rates, blocks)
    if workload.workers > 1:
        # They share the work, in whole tasks, and the disk.
        rows_seconds = max(
            spread(grid.row_tiles, workload.workers) * rows_seconds, _stored(workload, layout) / rates.disk_write
        )
        tasks = loads.tasks if not layout.in_memory else sum(tiles.values())
        through_disk = read / rates.disk_read + written / rates.disk_write
        kernel_seconds = max(spread(tasks, workload.workers) * kernel_seconds, through_disk)
    if not layout.in_memory:
        written += _stored(workload, layout)
    return Cost(
        rows_seconds=rows_seconds,
        kernel_seconds=kernel_seconds,
        longest_task_seconds=longest,
        flops=contraction_flops(workload, layout),
        bytes_read=read,
        bytes_written=written,
        moved_bytes=moved,
        bound_bytes=bound,
    )


def _stored(workload: Workload, layout: Layout) -> int:
    """Bytes of all tiles as they are stored."""
    grid = layout.sample_grid(workload)
    return grid.row_tiles * layout.tile_samples * sum(layout.cut(workload).stored)


def _bound(workload: Workload, layout: Layout, host_limit: int) -> float:
    """The lower bound of what a layout holds, with all memory beside the process itself as the fast one."""
    fast = max(1, host_limit - fixed_host_bytes(workload))
    return lower_bound_bytes(workload, fast, sum(layout.cut(workload).held))


@dataclass(frozen=True)
class _Loads:
    """What is read of spilled tiles.

    Attributes:
        bytes: bytes read in all.
        bytes_per_tile: bytes that one kernel tile needs, read or kept; of tiles in memory those sent to a device.
        tasks: kernel tasks of one pass.
        tiles_per_task: most kernel tiles of one of them.
    """

    bytes: int
    bytes_per_tile: int
    tasks: int
    tiles_per_task: int


def _loads(workload: Workload, layout: Layout, tiles: Counter[_TileClass]) -> _Loads:
    sizes = [layout.tile_samples * stored for stored in layout.cut(workload).stored]
    panel = sum(sizes)
    if not tiles:
        return _Loads(0, 2 * panel, 0, 1)
    found, saved = layout.grouping(workload), 0
    if layout.kept_bytes:
        loads = panel_loads(layout.superblocks(layout.sample_grid(workload)))
        saved = kept_panels(loads, sizes, layout.kept_bytes).saved_bytes
    moved = found.loads * panel - saved
    if layout.in_memory:  # nothing is read, but a device is sent as much
        return _Loads(0, moved // sum(tiles.values()), sum(tiles.values()), 1)
    return _Loads(moved, 2 * panel, found.tasks, found.tiles)
