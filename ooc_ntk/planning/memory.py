"""The memory model: bytes that a layout needs of host, device and disk, term by term."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ooc_ntk.units import partial_products

from .factors import LayerFactors
from .layers import layer_names, layer_runs, open_layers
from .layout import Layout
from .need import MemoryNeed, Terms
from .projection import HEAVY, Projection
from .spans import FACTORED
from .workload import ParameterBlock, Workload

if TYPE_CHECKING:
    from .plan import PlannedBlock

#: Host bytes that libraries take beyond the baseline once tasks run: BLAS workspaces, thread stacks, code pages
#: touched for the first time, SQLite. Measured on torch 2.13 with 2 threads: 20–75 MiB,
#: the most after a network was trained in the same process.
LIBRARY_GROWTH_BYTES: Final = 96 * 2**20

#: Device bytes that libraries take beside what is modelled: cuBLAS workspaces (32 MiB on Hopper, by torch's default),
#: and segments of 2 to 20 MiB that torch's allocator cuts small tensors from (a guess, not measured).
DEVICE_LIBRARY_BYTES: Final = 64 * 2**20

#: What deriving a batch may take over what the probe saw: the allocator keeps freed blocks of one batch beside those of
#: the next (measured: up to 1.5 times on batches of many small gradients).
DERIVING_SHARE: Final = 1.5

#: Terms of host memory that stay whatever is at work; ``DECODERS`` are processes of their own.
PROCESS: Final = "the process itself (Python, torch, model, live data)"
DECODERS: Final = "processes that decode images"
TILES: Final = "Jacobian tiles in memory"
LIBRARIES: Final = "libraries and allocator"
SPENT: Final = "calibration and probe, already spent"
STANDING: Final = frozenset({PROCESS, DECODERS, TILES, LIBRARIES, SPENT})

#: Share added to what is modelled, for allocator rounding and fragmentation. Measured 1–3%.
ALLOCATOR_SHARE: Final = 0.04

#: Bytes of the slab in which rows are gathered before they are written to disk.
STAGING_BYTES: Final = 8 * 2**20

#: Bytes of the rows that the batch-1 loop gathers before storing them, where spans are narrow.
GROUP_BYTES: Final = 16 * 2**20

#: Spans narrower than this are worth gathering rows for: storing one row of one span costs 35 µs beside the copying,
#: in which a second copy moves as many columns (measured at 5 GB/s).
GATHERED_COLUMNS: Final = 43_750

#: Bytes of the stripe in which a finished kernel tile is converted, transposed and written.
STRIPE_BYTES: Final = 2 * 2**20

#: Spans whose products are added up in float32 before the sums of a superblock are added to float64 ones on disk: each
#: addition rounds the sum by 3e-8 (root mean square), n of them by 2e-8·√n, and contraction is to stay within 5e-7.
FOLDED_SPANS: Final = 400

#: Bytes of a manifest row and its receipt, per task (measured 1.1 KiB; rounded up).
TASK_RECORD_BYTES: Final = 2048

#: Elements of one sample's gradients that are expanded at a time: two sides of 128 samples stay within 24 MiB, where
#: the product finds them in the cache (measured at 64 samples: 16,384 take 5% longer, 36,864 as long).
EXPANDED_ITEMS: Final = 36_864

#: Bytes of the buffer of unfolded convolution inputs (measured: larger ones leave the cache and gain nothing).
UNFOLDED_BYTES: Final = 16 * 2**20

#: Positions (or pixels) of one side of a block of Gram matrices: 512 × 1,024 elements stay in the second-level cache
#: (measured: 190 GFLOP/s on 512² blocks, 177 on 256²).
ROW_POSITIONS: Final = 512
COLUMN_POSITIONS: Final = 1024

#: The same of rows and of columns on a device, whose processors small blocks leave idle: 128 MiB each in float32
#: (guessed: a product of 4,096 × 8,192 has some 2,000 pieces of 128 × 128 for some 100 processors).
DEVICE_POSITIONS: Final = (4096, 8192)

#: Gram blocks that a pairwise contraction holds at once: of inputs (three, while shifts are summed one dimension after
#: the other), of gradients, and their product summed.
PAIRWISE_BLOCKS: Final = 5

#: Bytes of the dense gradients that layer rules expand before storing them; more than one sample only below it.
RULE_BYTES: Final = 64 * 2**20


@dataclass(frozen=True)
class SketchChunks:
    """How much is projected at a time: on a CPU what its caches hold, on a device enough to keep it busy.

    Attributes:
        items: elements of one sample's gradients that are expanded at a time.
        unfolded_bytes: of the buffer of unfolded convolution inputs.
        tile_bytes: of the part of a dense R that is made at a time: it is read once per product.
        table_bytes: rows and signs of a sparse R that are kept from batch to batch, at most.
    """

    items: int
    unfolded_bytes: int
    tile_bytes: int
    table_bytes: int

    @staticmethod
    def of(device: str) -> SketchChunks:
        """Of a torch device.

        >>> SketchChunks.of("cpu").table_bytes, SketchChunks.of("cuda:0").table_bytes
        (0, 1073741824)
        """
        return HOST_CHUNKS if device.partition(":")[0] == "cpu" else DEVICE_CHUNKS

    def kept_bytes(self, projection: Projection, columns: int) -> int:
        """Bytes of rows and signs that are kept for so many parameters, each also in the order of rows.

        >>> DEVICE_CHUNKS.kept_bytes(Projection("sjlt", 4096), 10**7)
        387108864
        """
        if not projection.about.sparse:
            return 0
        return min(self.table_bytes, 8 * projection.nonzeros * columns + STARTS_BYTES)


#: On a CPU: see :data:`EXPANDED_ITEMS` and :data:`UNFOLDED_BYTES`; of R 2,048 parameters at 4,096 columns (a choice).
#: Making rows and signs again takes a few percent of multiplying with them.
HOST_CHUNKS: Final = SketchChunks(EXPANDED_ITEMS, UNFOLDED_BYTES, 2**25, 0)

#: On a device every step costs a launch of some microseconds, and sorting rows more than multiplying (guessed).
DEVICE_CHUNKS: Final = SketchChunks(2**18, 2**29, 2**29, 2**30)

#: Bytes of where the parameters of each row begin in kept tables, beside the tables (guessed).
STARTS_BYTES: Final = 2**26

#: Bytes of the signs of a block-shift projection that are kept from batch to batch (a choice).
KEPT_SIGNS_BYTES: Final = 2**27

#: Bytes of what torch makes a dense R from.
TORCH_WORD_BYTES: Final = 2**25

#: Bytes of the spectra that a tensor sketch holds at a time (a choice).
SPECTRUM_BYTES: Final = 2**26

#: Bytes of the gradients that torch.func derives before they are projected, where it goes row by row: making R for them
#: takes ten times as long as multiplying one row with it.
GATHERED_BYTES: Final = 2**26

#: Columns that are split in bf16 parts at a time (a choice: with all products of PRODUCT_COLUMNS on a CPU).
SPLIT_COLUMNS: Final = 4096

#: The same on a device: about as many as are expanded at a time, so that sums in float64 are a small part (a choice).
DEVICE_SPLIT_COLUMNS: Final = 2**15

#: What a panel on a device takes beside its elements at most: each of its two parts, inputs and gradients, fills pages.
PANEL_PAGES_BYTES: Final = 2 * 4096

#: Batches whose factors are on the device and in page-locked memory: one captured, one copied back and stored.
FACTOR_SLOTS: Final = 2

#: Bytes of a panel that are split in bf16 parts in its own memory at a time (a choice).
IN_PLACE_BYTES: Final = 2**24

#: Page-locked buffers through which panels go to a device: one being filled, one being copied (a choice).
PINNED_SLOTS: Final = 2


def page_locked_bytes(size: int) -> int:
    """Bytes that torch locks for a page-locked buffer: its host allocator hands out powers of two.

    >>> page_locked_bytes(2**20), page_locked_bytes(2**20 + 1)
    (1048576, 2097152)
    """
    return 1 << max(0, size - 1).bit_length()


def slab_rows(span_columns: int, item_bytes: int) -> int:
    """Rows of one span that fit the staging slab at once (at least one).

    >>> slab_rows(1024, 4)
    2048
    """
    return max(1, STAGING_BYTES // (span_columns * item_bytes))


def group_rows(span_columns: int, pass_columns: int, item_bytes: int) -> int:
    """Rows that the batch-1 loop gathers before they are stored: one if spans are wide enough.

    Args:
        span_columns: columns per span.
        pass_columns: columns derived in one pass.
        item_bytes: bytes per element.

    Returns:
        At least 1.

    >>> group_rows(100_000, 10**6, 4), group_rows(1000, 2**20, 4)
    (1, 4)
    """
    if span_columns >= GATHERED_COLUMNS:
        return 1
    return max(1, GROUP_BYTES // (pass_columns * item_bytes))


def rule_samples(sample_bytes: int) -> int:
    """Samples whose dense gradients layer rules expand together (at least one).

    >>> rule_samples(2**20), rule_samples(2**30)
    (64, 1)
    """
    return max(1, RULE_BYTES // max(1, sample_bytes))


def accumulator_bytes(workload: Workload, layout: Layout) -> int:
    """Bytes of the accumulators of one kernel tile: a float64 sum and one product in the kernel's precision.

    In ``bf16x3`` there is a second product, of high and low parts, and on some devices one that is yet to be added.

    >>> from .workload import Derivation, ParameterBlock
    >>> w = Workload("trace", 100, 0, 1, 1, 1, (ParameterBlock("b", ("p",), 0, 9),), 4, 0, 0,
    ...     Derivation("loop", 1, 1, 1, 0, 0))
    >>> accumulator_bytes(w, Layout("resident", 10, 9, ())) == 10 * 10 * (8 + 4)
    True
    """
    edge = layout.tile_samples * workload.entries_per_sample
    products = 1
    if partial_products(workload.precision) > 1:
        products = 2 if workload.device == "cpu" else 3
    return edge * edge * (8 + products * workload.item_bytes)


def split_bytes(workload: Workload, layout: Layout) -> int:
    """Bytes of both sides' parts in ``bf16x3``, some columns at a time.

    On a CPU parts are as wide as float32, and splitting a side takes as much again as its parts for a moment; so it may
    be on a device without products of bf16 into float32, which splits as few columns at a time.
    """
    if partial_products(workload.precision) == 1:
        return 0
    rows, edge = workload.rows_per_sample, layout.tile_samples * workload.entries_per_sample
    widened = 3 * 2 * workload.item_bytes
    total = edge * SPLIT_COLUMNS * widened
    if workload.device != "cpu":
        total = max(total, edge * DEVICE_SPLIT_COLUMNS * 2 * workload.item_bytes) + IN_PLACE_BYTES
    pairs = 0
    for block, choice in zip(workload.blocks, layout.block_choices(workload), strict=True):
        if choice.contraction == "pairwise" and block.factors is not None:
            factors = block.factors
            sides = pairwise_steps(factors, workload.entries_per_sample, on_device=workload.device != "cpu")
            # Of the rows inputs and gradients, of the columns one of them; windows may be unfolded.
            most = max(factors.input_items, factors.positions * factors.inputs, rows * factors.gradient_items)
            items = (2 * min(sides[0], layout.tile_samples) + min(sides[1], layout.tile_samples)) * most
            if factors.lookups:
                one, other = crossed_steps(factors, rows)
                items = max(items, 2 * (one + other) * max(factors.positions, rows * factors.lookups) * factors.inputs)
            pairs = max(pairs, items * widened // 2)
    return total + pairs


def superblock_bytes(workload: Workload, layout: Layout) -> int:
    """Bytes of the sums of a superblock's kernel tiles, as they are stored; 0 where tiles are contracted one by one."""
    if layout.superblock_tiles == 1:
        return 0
    return layout.grouping(workload).tiles * stored_tile_bytes(workload, layout)


def folds(layout: Layout, spans: int) -> int:
    """How often the sums of a superblock are added to those on disk, which are float64, before they grow inexact.

    >>> folds(Layout("spill", 10, 9, (), (), "square", 4), 1000), folds(Layout("spill", 10, 9, ()), 1000)
    (2, 0)
    """
    return 0 if layout.superblock_tiles == 1 else (spans - 1) // FOLDED_SPANS


def read_buffers(workload: Workload, layout: Layout) -> int:
    """Panels that are in memory at once while a superblock is contracted, those read ahead among them."""
    return layout.grouping(workload).buffers


def layers_bytes(workload: Workload, layout: Layout) -> int:
    """Bytes of what is summed up layer by layer: open layers, all of them together, and columns of a dense span."""
    edge = layout.tile_samples * workload.entries_per_sample
    spans = layout.spans(workload)
    runs = layer_runs(workload.blocks, layout.block_choices(workload), spans)
    mixed = max((span.columns for span, found in zip(spans, runs, strict=True) if len(found) > 1), default=0)
    copied = 2 * layout.tile_samples * workload.rows_per_sample * mixed * workload.held_item_bytes
    return (open_layers(runs) + 2) * edge * edge * 8 + copied


def gathered_rows(columns: int, item_bytes: int) -> int:
    """Rows of so many columns that are gathered before they are projected (at least one).

    >>> gathered_rows(2**20, 4), gathered_rows(2**30, 4)
    (16, 1)
    """
    return max(1, GATHERED_BYTES // max(1, columns * item_bytes))


def sketch_terms(
    projection: Projection, batch: int, rows: int, item_bytes: int, columns: int, chunks: SketchChunks
) -> dict[str, int]:
    """Bytes that projecting a batch takes beside its gradients and factors.

    Args:
        projection: with its dim.
        batch: samples.
        rows: Jacobian rows per sample.
        item_bytes: bytes of a gradient's element.
        columns: parameters.
        chunks: what is worked on at a time.

    >>> sketch_terms(Projection("gaussian", 4096), 16, 1, 4, 10**6, HOST_CHUNKS)["features of one batch"]
    786432
    """
    assert projection.dim is not None
    features = batch * rows * projection.dim
    terms = {
        # The sum in float64, and what is stored of it.
        "features of one batch": features * (8 + item_bytes)
        + (batch * rows * HEAVY * (8 + item_bytes) if projection.about.signs else 0),
        # A piece of them, and a copy in another order.
        "gradients being projected": 2 * batch * min(rows * columns, chunks.items) * item_bytes,
    }
    if projection.about.sparse:
        # Places of a piece's parameters, their rows and signs.
        piece = min(columns, chunks.items)
        terms["rows and signs of R"] = piece * (16 + 8 * projection.nonzeros) + chunks.kept_bytes(projection, columns)
        if projection.backend == "torch":
            # Part of R as a matrix, or what is added up in its place on a CPU.
            terms["rows and signs of R"] += max(batch * rows, piece) * projection.block * item_bytes
        if projection.kind == "shift" and projection.backend == "numba":
            signs = columns * projection.nonzeros * item_bytes
            terms["rows and signs of R"] += min(signs, KEPT_SIGNS_BYTES) + piece * 16
        if projection.about.structured:
            terms["spectra"] = 4 * SPECTRUM_BYTES
    else:
        terms["a part of R and its product"] = 2 * chunks.tile_bytes + features * item_bytes
        if projection.backend == "torch":
            terms["a part of R and its product"] += TORCH_WORD_BYTES
    if not projection.about.compiled:
        terms["words of R"] = TORCH_WORD_BYTES
    return terms


def pairwise_steps(factors: LayerFactors, entries: int, *, on_device: bool = False) -> tuple[int, int]:
    """Samples of the rows and of the columns of one block of a pairwise contraction (at least one each).

    >>> pairwise_steps(LayerFactors("linear", 64, 3, 5), entries=1)
    (8, 16)
    """
    size = _block_positions(factors, entries)
    rows, columns = DEVICE_POSITIONS if on_device else (ROW_POSITIONS, COLUMN_POSITIONS)
    return max(1, rows // size), max(1, columns // size)


def _block_positions(factors: LayerFactors, entries: int) -> int:
    """Positions of one sample in a block, or pixels where windows are not copied out."""
    return max(factors.positions * entries, factors.window.pixels if factors.window and factors.by_pixels else 0)


def crossed_steps(factors: LayerFactors, rows: int) -> tuple[int, int]:
    """Samples of both sides of a block in which a linear layer meets the embedding of its weight (at least one each).

    >>> crossed_steps(LayerFactors("linear", 64, 3, 5, lookups=32), rows=2)
    (8, 16)
    """
    return max(1, ROW_POSITIONS // factors.positions), max(1, COLUMN_POSITIONS // (factors.lookups * rows))


def pairwise_bytes(
    factors: LayerFactors, tile_samples: int, rows: int, entries: int, item_bytes: int, *, on_device: bool = False
) -> int:
    """Bytes of the Gram blocks of a pairwise contraction, and of what is copied or unfolded for them."""
    sides = [min(step, tile_samples) for step in pairwise_steps(factors, entries, on_device=on_device)]
    blocks = PAIRWISE_BLOCKS * sides[0] * sides[1] * _block_positions(factors, entries) ** 2
    unfolded = 0
    if factors.window is not None and not factors.by_pixels:
        unfolded = 2 * sum(sides) * factors.positions * factors.inputs
    copied = sum(sides) * (factors.input_items + rows * factors.gradient_items) if factors.positions > 1 else 0
    if factors.lookups:
        crossed = math.prod(min(step, tile_samples) for step in crossed_steps(factors, rows))
        # Inner products, the outputs that are looked up, copies of both in another order, and their product.
        blocks = max(blocks, PAIRWISE_BLOCKS * crossed * factors.positions * factors.lookups * rows)
        # The rows looked up, merged by token, and the sorted copy of them.
        copied = max(copied, 4 * tile_samples * rows * factors.lookups * factors.inputs)
    return (blocks + unfolded + copied) * item_bytes


def workspace_bytes(workload: Workload, layout: Layout) -> int:
    """Bytes of the buffers in which factors are expanded or multiplied while one kernel tile is contracted.

    Expanding takes two buffers of :data:`EXPANDED_ITEMS` elements a sample (at least one output at a time), and one for
    unfolded inputs; pairwise contraction takes a few blocks of Gram matrices. Their copies inside torch count as well.
    """
    choices = layout.block_choices(workload)
    if all(choice.representation == "dense" for choice in choices):
        return 0
    tile, item, total = layout.tile_samples, workload.item_bytes, 0
    for block, choice in zip(workload.blocks, choices, strict=True):
        if block.factors is None:
            continue
        if choice == FACTORED:
            # A full kernel's pieces hold all rows at once, at least of one output and one channel.
            taps = block.factors.window.taps if block.factors.window is not None else 1
            least = workload.rows_per_sample * taps if workload.entries_per_sample > 1 else taps
            total = max(total, 2 * tile * max(EXPANDED_ITEMS, least) * item + 2 * UNFOLDED_BYTES)
        elif choice.contraction == "pairwise":
            sizes = tile, workload.rows_per_sample, workload.entries_per_sample, item
            total = max(total, pairwise_bytes(block.factors, *sizes, on_device=workload.device != "cpu"))
        elif choice.representation == "tokens":
            # The rows of a side, merged by token, and the sorted copy of them.
            total = max(total, 4 * tile * workload.rows_per_sample * block.factors.gradient_items * item)
    return total


def store_bytes(workload: Workload, layout: Layout) -> int:
    """Bytes of the tiles that are held at once: of the widest pass in memory, of everything on disk."""
    return workload.samples * max(layout.pass_bytes(workload, index) for index in range(len(layout.passes)))


def fixed_host_bytes(workload: Workload) -> int:
    """Host bytes that every layout needs: the process itself and what its libraries will still take."""
    return workload.baseline_bytes + LIBRARY_GROWTH_BYTES


def memory_need(workload: Workload, layout: Layout) -> MemoryNeed:
    """Bytes that running ``layout`` needs of every memory.

    Tasks run one at a time and no kind leaves to another what it held, so the kind that takes the most counts; what all
    of them keep (the process, resident tiles) counts beside it.

    Args:
        workload: the measured job.
        layout: tiles, spans and passes.

    Returns:
        The need of host, device, pinned memory and disk, by term, of what stays and of every kind of task.
    """
    tasks = {
        "rows": _rows_terms(workload, layout),
        "kernel": _kernel_terms(workload, layout),
        "release": Terms(),  # tiles are given up and files deleted
    }
    for terms in tasks.values():  # every worker has a task
        terms.disk = {name: max(1, workload.workers) * size for name, size in terms.disk.items()}
    stays = Terms(disk=_disk_stays(workload, layout))
    stays.host[PROCESS] = workload.baseline_bytes
    if workload.loader_bytes:
        stays.host[DECODERS] = workload.loader_bytes
    if layout.in_memory:
        stays.host[TILES] = store_bytes(workload, layout)
    if workload.device != "cpu":
        computed = max(terms.total("device") for terms in tasks.values())
        stays.device["the model"] = workload.model_bytes
        stays.device[LIBRARIES] = DEVICE_LIBRARY_BYTES + int(ALLOCATOR_SHARE * computed)
    modelled = stays.total("host") + max(terms.total("host") for terms in tasks.values())
    variable = modelled - workload.baseline_bytes - workload.loader_bytes
    stays.host[LIBRARIES] = LIBRARY_GROWTH_BYTES + int(ALLOCATOR_SHARE * variable)
    spent = workload.planning_bytes - modelled - stays.host[LIBRARIES]
    if spent > 0:
        stays.host[SPENT] = spent
    return MemoryNeed(stays, tasks)


def panel_bytes(workload: Workload, layout: Layout) -> int:
    """Bytes of the largest panel: one row tile in one span, as it is stored; on a device each part begins on a page."""
    pages = 0 if workload.device == "cpu" else PANEL_PAGES_BYTES
    return layout.tile_samples * max(layout.cut(workload).stored) + pages


def device_room(workload: Workload, layout: Layout, limit: int) -> int:
    """Device bytes that a budget leaves to kernel tasks beside what they take; negative where it leaves none."""
    variable = (limit - workload.model_bytes - DEVICE_LIBRARY_BYTES) / (1 + ALLOCATOR_SHARE)
    return int(variable) - _kernel_terms(workload, layout).total("device")


def kernel_room(workload: Workload, layout: Layout, limit: int) -> int:
    """Host bytes that a budget leaves to kernel tasks beside what they take; negative where it leaves none."""
    variable = (limit - fixed_host_bytes(workload) - workload.loader_bytes) / (1 + ALLOCATOR_SHARE)
    resident = store_bytes(workload, layout) if layout.in_memory else 0
    return int(variable) - resident - _kernel_terms(workload, layout).total("host")


def _rows_terms(workload: Workload, layout: Layout) -> Terms:
    """What a rows task takes: a batch of samples, what deriving it takes, and what is gathered of it."""
    on_device = workload.device != "cpu"
    derivation = workload.derivation
    terms = Terms()
    rows = terms.host
    batch = 3 * derivation.batch_size * workload.sample_bytes
    if workload.by_length:  # a tile's texts are read together, and sorted
        batch += layout.tile_samples * workload.sample_bytes
    rows["one batch of samples"] = batch
    widths = [sum(span.columns for span in layout.pass_spans(workload, index)) for index in range(len(layout.passes))]
    row_bytes = max(1, *widths) * workload.item_bytes
    if derivation.method == "loop" and layout.span_columns < GATHERED_COLUMNS and any(widths):
        rows["gathered rows"] = group_rows(layout.span_columns, max(1, *widths), workload.item_bytes) * row_bytes
    if derivation.capture_seconds_per_sample and any(widths):
        rows["gradients by rules"] = max(_rule_bytes(workload, layout, index) for index in range(len(layout.passes)))
        if any(block.factors is not None and block.factors.window is not None for block in workload.blocks):
            rows["unfolded inputs"] = 2 * UNFOLDED_BYTES
    cut = layout.cut(workload)
    held = sum(size for span, size in zip(cut.spans, cut.held, strict=True) if span.block is not None)
    if not layout.in_memory and held:
        rows["factors of one batch"] = min(derivation.batch_size, layout.tile_samples) * held
    if on_device:
        samples = page_locked_bytes(derivation.batch_size * workload.sample_bytes)
        rows["samples on their way"] = terms.pinned["samples on their way"] = 2 * samples
        terms.device["samples"] = 2 * derivation.batch_size * workload.sample_bytes
    if on_device and held:
        at_once = min(derivation.batch_size, layout.tile_samples)
        slot = at_once * (held + 8 * workload.rows_per_sample) + len(cut.spans) * PANEL_PAGES_BYTES
        terms.device["factors"] = FACTOR_SLOTS * slot
        rows["factors on their way"] = terms.pinned["factors on their way"] = FACTOR_SLOTS * page_locked_bytes(slot)
    kept = sum(
        block.factors.held_bytes(workload.rows_per_sample, workload.item_bytes)
        for block, choice in zip(workload.blocks, layout.block_choices(workload), strict=True)
        if block.factors is not None and choice.representation == "dense"
    )
    if kept:
        rows["factors of dense blocks"] = derivation.batch_size * kept
    computed = terms.device if on_device else rows
    computed["deriving one batch"] = int(DERIVING_SHARE * derivation.working_bytes)
    if workload.sketch is not None:
        computed.update(workload.sketch.batch_terms)
    if on_device or not layout.in_memory:
        rows["staging slab"] = STAGING_BYTES
    return terms


def _kernel_terms(workload: Workload, layout: Layout) -> Terms:
    """What a kernel task takes: panels being read, what they are contracted in and with, and the tile being written."""
    on_device = workload.device != "cpu"
    terms = Terms()
    kernel = terms.host
    chunk = panel_bytes(workload, layout)
    kernel["conversion stripes"] = 2 * STRIPE_BYTES
    accumulators = accumulator_bytes(workload, layout)
    computed = terms.device if on_device else kernel
    computed["kernel tile accumulators"] = accumulators
    if layout.superblock_tiles > 1:
        computed["sums of a superblock"] = superblock_bytes(workload, layout)
    workspace = workspace_bytes(workload, layout)
    if workspace:
        computed["expanded factors"] = workspace
    if split := split_bytes(workload, layout):
        computed["bf16 parts"] = split
    if on_device:
        terms.device["panels"] = read_buffers(workload, layout) * chunk
        kernel["finished kernel tile"] = accumulators
        kernel["panels on their way"] = PINNED_SLOTS * page_locked_bytes(chunk)
        terms.pinned["panels on their way"] = kernel["panels on their way"]
    elif not layout.in_memory:
        kernel["read buffers"] = read_buffers(workload, layout) * chunk
    if layout.kept_bytes:
        computed["panels kept"] = layout.kept_bytes
    if workload.by_length:  # a tile is put into the order of its samples
        kernel["a tile in another order"] = 8 * (layout.tile_samples * workload.entries_per_sample) ** 2
    if workload.by_layer:
        kernel["tiles of open layers"] = layers_bytes(workload, layout)
    if folds(layout, len(layout.spans(workload))):
        terms.disk["sums of a superblock in float64"] = 8 * superblock_bytes(workload, layout) // workload.item_bytes
    if len(layout.passes) > 1:
        terms.disk["the tile being replaced"] = 2 * stored_tile_bytes(workload, layout)
    return terms


def expanded_items(blocks: Iterable[ParameterBlock | PlannedBlock], rows: int) -> int:
    """Elements that rules hold while they expand one sample's gradients of dense blocks.

    Blocks are expanded whole, and one at a time is there twice, in the order of its weight as well; of a table, the
    gradients of the rows that are looked up are copied.

    Args:
        blocks: the blocks, all by a rule and held dense.
        rows: Jacobian rows per sample.

    Returns:
        Elements per sample, of all its rows.
    """
    whole, largest = 0, 0
    for block in blocks:
        columns, factors = block.stop - block.start, block.factors
        copied = columns
        if factors is not None and factors.embedding:
            copied += factors.lookups * factors.inputs if factors.lookups else factors.gradient_items
        whole, largest = whole + columns, max(largest, copied)
    return rows * (whole + largest)


def _rule_bytes(workload: Workload, layout: Layout, index: int) -> int:
    """Bytes of the gradients that rules expand at a time for the dense spans of one pass."""
    choices = layout.block_choices(workload)
    derived = ((workload.blocks[number], choices[number]) for number in layout.pass_blocks(workload, index))
    blocks = [block for block, held in derived if held.representation == "dense" and block.source == "rule"]
    per_sample = expanded_items(blocks, workload.rows_per_sample) * workload.item_bytes
    return max(per_sample, min(RULE_BYTES, workload.derivation.batch_size * per_sample))


def stored_tile_bytes(workload: Workload, layout: Layout) -> int:
    """Bytes of one kernel tile as it is stored."""
    edge = layout.tile_samples * workload.entries_per_sample
    return edge * edge * workload.item_bytes


def _disk_stays(workload: Workload, layout: Layout) -> dict[str, int]:
    """Disk bytes by term, of what is kept from task to task; edge tiles are padded to whole ones."""
    grid = layout.sample_grid(workload)
    edge = layout.tile_samples * workload.entries_per_sample
    tile = stored_tile_bytes(workload, layout)
    sketch = workload.sketch
    disk = {
        "kernel": 0 if sketch is not None and sketch.features_only else grid.row_tiles * grid.column_tiles * tile,
        "records, diagonal and weights": (layout.task_count(workload) + grid.kernel_tile_count) * TASK_RECORD_BYTES
        + 2 * grid.row_tiles * edge * 8
        + workload.saved_bytes
        + 2**20,
    }
    if workload.by_layer:
        disk["kernels of single layers"] = (
            len(layer_names(workload.blocks)) * grid.row_tiles * grid.column_tiles * (tile + TASK_RECORD_BYTES)
        )
    if not layout.in_memory:
        stored = sum(layout.cut(workload).stored)
        if sketch is not None and sketch.heavy:
            rows = grid.row_tiles * layout.tile_samples * workload.rows_per_sample
            disk["gradients of the heaviest parameters"] = rows * len(sketch.heavy) * workload.item_bytes
        disk["Jacobian tiles on disk" if sketch is None else "features on disk"] = (
            grid.row_tiles * layout.tile_samples * stored
        )
    return disk
