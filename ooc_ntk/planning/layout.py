"""A layout: one concrete way to run a workload (dataflow, tiles, spans, passes), not yet priced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from ooc_ntk.units import format_count

from .tiles import ColumnGrid, Range, SampleGrid, count_tiles, even_size
from .workload import Workload

if TYPE_CHECKING:
    from .plan import Plan

Dataflow = Literal["resident", "recompute", "spill"]
DATAFLOWS: Final[tuple[Dataflow, ...]] = ("resident", "recompute", "spill")

#: Columns contracted in float32 before the partial sum moves to the float64 accumulator. Measured: at 2e6 columns the
#: float32-only accumulator is off by 8e-8 and grows as the square root; with the float64 one 3e-8 at any length.
CONTRACTION_COLUMNS: Final = 65_536

#: Most elements of one stored tile (DESIGN: storage), so that every index fits 32 bits.
MAX_TILE_ELEMENTS: Final = 2**30

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
    """

    dataflow: Dataflow
    tile_samples: int
    span_columns: int
    passes: tuple[Range, ...]

    @property
    def in_memory(self) -> bool:
        """Whether tiles are held in the memory of the process."""
        return self.dataflow != "spill"

    def sample_grid(self, workload: Workload) -> SampleGrid:
        """The grid of sample tiles."""
        return SampleGrid(workload.train_samples, workload.test_samples, self.tile_samples)

    def column_grid(self, workload: Workload | Plan) -> ColumnGrid:
        """The grid of column spans."""
        return ColumnGrid(workload.columns, self.span_columns)

    def pass_columns(self, workload: Workload | Plan, index: int) -> int:
        """Jacobian columns of pass ``index``."""
        grid, spans = self.column_grid(workload), self.passes[index]
        return grid.range(spans.stop - 1).stop - grid.range(spans.start).start

    def derived_columns(self, workload: Workload, index: int) -> int:
        """Columns that pass ``index`` derives: whole blocks, even where it keeps only a part of them."""
        grid, spans = self.column_grid(workload), self.passes[index]
        start, stop = grid.range(spans.start).start, grid.range(spans.stop - 1).stop
        return sum(block.columns for block in workload.blocks if block.start < stop and block.stop > start)

    def task_count(self, workload: Workload) -> int:
        """Tasks of the whole graph: rows, kernel tiles and one release per pass."""
        grid = self.sample_grid(workload)
        return len(self.passes) * (grid.row_tiles + grid.kernel_tile_count + 1)

    def describe(self) -> str:
        """One phrase for tables."""
        passes = f", {len(self.passes)} passes" if len(self.passes) > 1 else ""
        return f"{self.dataflow}, tiles of {self.tile_samples} × {format_count(self.span_columns)}{passes}"


def tile_sizes(workload: Workload, wanted: int | None = None) -> list[int]:
    """Sample tile sizes worth pricing: even cuts of the samples, from everything at once down to 16 at a time.

    Args:
        workload: the measured job.
        wanted: a size the user asked for; then only that one (capped at the number of samples).

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
    return sorted(sizes, reverse=True)


def span_sizes(workload: Workload, tile: int, wanted: int | None = None) -> list[int]:
    """Span widths worth pricing, from sixteen contraction blocks of columns downwards.

    Args:
        workload: the measured job.
        tile: samples per tile, which bounds the width by :data:`MAX_TILE_ELEMENTS`.
        wanted: a width the user asked for; then only that one (capped at the number of columns).

    Returns:
        Distinct widths, largest first.
    """
    if wanted is not None:
        return [min(wanted, workload.columns)]
    per_column = workload.rows_per_sample // workload.entries_per_sample
    widths = set()
    depth = 16 * CONTRACTION_COLUMNS
    while depth >= 256:
        largest = max(1, min(depth // per_column, MAX_TILE_ELEMENTS // (tile * workload.rows_per_sample)))
        widths.add(even_size(workload.columns, largest))
        depth //= 2
    return sorted(widths, reverse=True)


def pass_count(workload: Workload, span_columns: int, store_bytes: int) -> int | None:
    """Fewest passes whose tiles fit in memory.

    Args:
        workload: the measured job.
        span_columns: columns per span.
        store_bytes: bytes that the tiles of one pass may take.

    Returns:
        The number of passes, or None if not even one span fits.
    """
    span_bytes = workload.samples * workload.rows_per_sample * span_columns * workload.item_bytes
    spans_per_pass = store_bytes // span_bytes
    if spans_per_pass < 1:
        return None
    return count_tiles(count_tiles(workload.columns, span_columns), spans_per_pass)
