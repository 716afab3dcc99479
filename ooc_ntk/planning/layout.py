"""A layout: one concrete way to run a workload (dataflow, tiles, spans, passes), not yet priced."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Final, Literal

from ooc_ntk.units import format_count

from .spans import DENSE, Choice, Cut, Span
from .superblocks import Grouping, Order, Superblock, superblocks
from .tiles import Range, SampleGrid, count_tiles, even_size
from .triangles import Triangles
from .workload import Workload

if TYPE_CHECKING:
    from .plan import Plan

Dataflow = Literal["resident", "recompute", "spill"]
DATAFLOWS: Final[tuple[Dataflow, ...]] = ("resident", "recompute", "spill")

#: Those that keep tiles in the memory of one process.
IN_MEMORY: Final[tuple[Dataflow, ...]] = ("resident", "recompute")

#: Columns contracted in float32 before the partial sum moves to the float64 accumulator. Measured: at 2e6 columns the
#: float32-only accumulator is off by 8e-8 and grows as the square root; with the float64 one 3e-8 at any length.
CONTRACTION_COLUMNS: Final = 65_536

#: Most elements of one stored tile (DESIGN: storage), so that every index fits 32 bits.
MAX_TILE_ELEMENTS: Final = 2**30

#: Stored tiles this small save no memory worth having by being narrower, if there are enough of them to cut passes from
#: (choices: a few buffers of them stay below what the allocator rounds away).
SMALLEST_CHUNK_BYTES: Final = 2**20
ENOUGH_SPANS: Final = 128

#: More passes than this are not made equal: the last one is a small part of the work anyway.
EVENED_PASSES: Final = 64

#: Most tasks of one graph (DESIGN: run).
MAX_TASKS: Final = 100_000


@dataclass(frozen=True)
class Layout:
    """Tiles, spans and passes of one way to run a workload.

    Attributes:
        dataflow: ``resident`` (all tiles in memory, one pass), ``recompute`` (tiles of one group of spans in memory at
            a time, one pass per group) or ``spill`` (tiles on disk, one pass).
        tile_samples: samples per tile, along rows and columns.
        span_columns: Jacobian columns per span.
        passes: the range of spans of each pass.
        choices: how every block is held and contracted; empty means all dense.
        order: how kernel tiles are grouped into superblocks (``spill`` only).
        superblock_tiles: most kernel tiles of one superblock.
        kept_bytes: memory for panels that stay once they were read, until all tiles are contracted.
        triangles: how the train square is cut into triangles; None if it is not, or by a plane that takes in all of it.
    """

    dataflow: Dataflow
    tile_samples: int
    span_columns: int
    passes: tuple[Range, ...]
    choices: tuple[Choice, ...] = ()
    order: Order = "square"
    superblock_tiles: int = 1
    kept_bytes: int = 0
    triangles: Triangles | None = None

    @property
    def in_memory(self) -> bool:
        """Whether tiles are held in the memory of the process."""
        return self.dataflow in IN_MEMORY

    def sample_grid(self, workload: Workload) -> SampleGrid:
        """The grid of sample tiles."""
        return SampleGrid(workload.train_samples, workload.test_samples, self.tile_samples)

    def superblocks(self, grid: SampleGrid) -> tuple[Superblock, ...]:
        """Kernel tiles grouped into what one task contracts."""
        return superblocks(grid, self.order, self.superblock_tiles, triangles=self.triangles)

    def grouping(self, workload: Workload) -> Grouping:
        """The same in numbers."""
        return Grouping.of(self.sample_grid(workload), self.order, self.superblock_tiles, self.triangles)

    def block_choices(self, workload: Workload | Plan) -> tuple[Choice, ...]:
        """How every block is held and contracted."""
        return self.choices or (DENSE,) * len(workload.blocks)

    def cut(self, workload: Workload | Plan) -> Cut:
        """The Jacobian cut into spans; kept with the job, as planning asks for the same few cuts thousands of times."""
        known: dict[tuple[tuple[Choice, ...], int], Cut] = workload.__dict__.setdefault("_cuts", {})
        found = known.get((self.choices, self.span_columns))
        if found is None:
            found = known[self.choices, self.span_columns] = Cut.of(
                workload.held_shapes,
                self.block_choices(workload),
                workload.rows_per_sample,
                workload.held_item_bytes,
                self.span_columns,
            )
        return found

    def spans(self, workload: Workload | Plan) -> tuple[Span, ...]:
        """Every span, in the order of the model's blocks."""
        return self.cut(workload).spans

    def pass_spans(self, workload: Workload | Plan, index: int) -> tuple[Span, ...]:
        """The spans of pass ``index``."""
        spans = self.passes[index]
        return self.spans(workload)[spans.start : spans.stop]

    def pass_bytes(self, workload: Workload | Plan, index: int) -> int:
        """Bytes of one sample in all spans of pass ``index``, as held in memory."""
        spans = self.passes[index]
        return sum(self.cut(workload).held[spans.start : spans.stop])

    def pass_blocks(self, workload: Workload, index: int) -> tuple[int, ...]:
        """Indices of the blocks that pass ``index`` derives: whole ones, even where it keeps only a part of them."""
        spans = self.pass_spans(workload, index)
        found = {span.block for span in spans if span.block is not None}
        # Spans are in column order, so the dense ones of a pass are one run of columns.
        dense = [span for span in spans if span.block is None]
        first, last = (dense[0].start, dense[-1].stop) if dense else (0, 0)
        position = 0
        for number, (block, choice) in enumerate(zip(workload.blocks, self.block_choices(workload), strict=True)):
            if choice.representation == "dense":
                if first < position + block.columns and position < last:
                    found.add(number)
                position += block.columns
        return tuple(sorted(found))

    def task_count(self, workload: Workload) -> int:
        """Tasks of the whole graph: rows, kernel tiles and one release per pass; rows alone where only features are."""
        grid = self.sample_grid(workload)
        if workload.sketch is not None and workload.sketch.features_only:
            return grid.row_tiles
        return len(self.passes) * (grid.row_tiles + self.grouping(workload).tasks + 1)

    def describe(self) -> str:
        """One phrase for tables."""
        passes = f", {len(self.passes)} passes" if len(self.passes) > 1 else ""
        if self.superblock_tiles > 1:
            passes = f", superblocks of {self.superblock_tiles}"
        held = sum(choice.representation != "dense" for choice in self.choices)
        if not held:
            return f"{self.dataflow}, tiles of {self.tile_samples} × {format_count(self.span_columns)}{passes}"
        return f"{self.dataflow}, tiles of {self.tile_samples}, {held} of {len(self.choices)} blocks factored{passes}"


def tile_sizes(workload: Workload, wanted: int | None = None, counts: Iterable[int] = ()) -> list[int]:
    """Sample tile sizes worth pricing: even cuts of the samples, from everything at once down to 16 at a time.

    Args:
        workload: the measured job.
        wanted: a size the user asked for; then only that one (capped at the number of samples).
        counts: numbers of tiles of the train samples that are worth pricing as well.

    Returns:
        Distinct sizes, largest first, none of them above :data:`MAX_TILE_ELEMENTS` kernel entries.
    """
    if wanted is not None:
        return [min(wanted, workload.samples)]
    sizes = set()
    largest = workload.samples
    while True:
        size = even_size(workload.samples, largest)
        if (size * workload.entries_per_sample) ** 2 <= MAX_TILE_ELEMENTS:
            sizes.add(size)
        if size <= 16:
            break
        largest = max(16, int(largest / 1.25))
    smallest = min(sizes, default=1)
    for count in counts:
        size = count_tiles(workload.train_samples, count)
        if size > smallest and count_tiles(workload.train_samples, size) == count:
            sizes.add(size)
    return sorted(sizes, reverse=True)


def span_sizes(workload: Workload, tile: int, columns: int | None = None, wanted: int | None = None) -> list[int]:
    """Span widths worth pricing, from sixteen contraction blocks of columns down to tiles of about a MiB.

    Args:
        workload: the measured job.
        tile: samples per tile, which bounds the width by :data:`MAX_TILE_ELEMENTS`.
        columns: columns of dense blocks; None for all columns.
        wanted: a width the user asked for; then only that one (capped at the number of columns).

    Returns:
        Distinct widths, largest first.
    """
    columns = max(1, workload.columns if columns is None else columns)
    if wanted is not None:
        return [min(wanted, columns)]
    per_column = workload.rows_per_sample // workload.entries_per_sample
    widths: set[int] = set()
    depth = 16 * CONTRACTION_COLUMNS
    while depth >= 256:
        enough = widths and count_tiles(columns, min(widths)) >= ENOUGH_SPANS
        if enough and min(widths) * tile * workload.rows_per_sample * workload.held_item_bytes <= SMALLEST_CHUNK_BYTES:
            break
        largest = max(1, min(depth // per_column, MAX_TILE_ELEMENTS // (tile * workload.rows_per_sample)))
        widths.add(even_size(columns, largest))
        depth //= 2
    return sorted(widths, reverse=True)


def pass_ranges(sample_bytes: Sequence[int], store_bytes: int) -> tuple[Range, ...] | None:
    """Cut spans into the fewest consecutive passes of which each fits in memory, as equal as that allows.

    Args:
        sample_bytes: bytes of every span, all samples together.
        store_bytes: bytes that the tiles of one pass may take.

    Returns:
        The range of spans of each pass, or None if not even one span fits.

    >>> [str(r) for r in pass_ranges([3, 3, 3, 3], 7)]
    ['[0:2]', '[2:4]']
    >>> pass_ranges([8, 1], 7) is None
    True
    """
    largest = max(sample_bytes, default=0)
    if not sample_bytes or largest > store_bytes:
        return None
    ends = list(accumulate(sample_bytes))
    if ends[-1] <= store_bytes:
        return (Range(0, len(ends)),)
    filled = _fill(ends, store_bytes)
    fewest = len(filled)
    if fewest > EVENED_PASSES:
        return filled
    # The smallest limit that needs no more passes makes them as equal as can be.
    low, high = largest, store_bytes
    while low < high:
        middle = (low + high) // 2
        if len(_fill(ends, middle)) <= fewest:
            high = middle
        else:
            low = middle + 1
    return _fill(ends, low)


def _fill(ends: Sequence[int], limit: int) -> tuple[Range, ...]:
    """Take consecutive sizes, given by their running sums, together as long as they stay within a limit."""
    found, start, before = [], 0, 0
    while start < len(ends):
        stop = max(start + 1, bisect_right(ends, before + limit, lo=start))
        found.append(Range(start, stop))
        start, before = stop, ends[stop - 1]
    return tuple(found)
