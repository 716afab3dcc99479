"""How kernel tiles of a spilled layout are grouped: the largest superblocks that memory holds, and panels that stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

from ooc_ntk.errors import InputError

from .budget import Limits
from .layout import Layout
from .memory import (
    ALLOCATOR_SHARE,
    DEVICE_LIBRARY_BYTES,
    FOLDED_SPANS,
    PANEL_PAGES_BYTES,
    STRIPE_BYTES,
    device_room,
    fixed_host_bytes,
    kernel_room,
    panel_bytes,
    read_buffers,
    stored_tile_bytes,
)
from .superblocks import AHEAD, Grouping, Order, kept_panels, panel_loads
from .tiles import SampleGrid, count_tiles
from .triangles import COVERS, Triangles
from .workload import Workload

#: Superblocks of a plan for a cluster whose number of workers is not known, at least (a choice).
CLUSTER_TASKS: Final = 32

#: Most row tiles of a point of triangles that are worth pricing: smaller tiles fill memory no better (a choice).
MOST_TOGETHER: Final = 8

#: The largest share of row tiles in the strip of rectangles below triangles: with more of them there is always a cover
#: of more points that reads less (found by counting at 90 sizes of memory).
STRIP_SHARE: Final = 0.25

#: Columns of the narrowest spans that are priced, and bytes of a panel that is worth reading by itself: between them
#: lie the panels that tile sizes are made for (choices).
NARROW_COLUMNS: Final = 256
READ_BYTES: Final = 2**20


def check_superblocks(workload: Workload, order: str | None) -> None:
    """Refuse superblocks that a kernel cannot have.

    Raises:
        InputError: for a kernel by layer, and for triangles of a normalised one.
    """
    if workload.by_layer:
        raise InputError("layer-wise kernels are summed up tile by tile; leave order and superblock_tiles out")
    if workload.normalize is not None and order == "triangle":
        raise InputError(
            "tiles of a normalised kernel are divided by those on the diagonal, which triangles do not finish first; "
            "use order='square'"
        )


def grouped(
    workload: Workload, limits: Limits, layout: Layout, order: str | None = None, tiles: int | None = None
) -> Iterator[Layout]:
    """A layout with its kernel tiles one by one, and in the largest superblocks that there is memory for.

    A kernel by layer is summed up tile by tile.

    Args:
        workload: the measured job.
        limits: budget in bytes.
        layout: with single kernel tiles.
        order: ``square`` or ``triangle`` if asked for.
        tiles: kernel tiles of a superblock if asked for.
    """
    grid = layout.sample_grid(workload)
    yield layout
    if layout.dataflow != "spill" or grid.row_tiles == 1 or workload.by_layer:
        return
    if tiles is not None:
        tiles = min(tiles, grid.kernel_tile_count)
        if tiles > 1:
            found: Order = "triangle" if order == "triangle" else "square"
            yield replace(layout, order=found, superblock_tiles=tiles)
        return
    for found, capacity, triangles in _capacities(workload, limits, layout, grid, order):
        yield replace(layout, order=found, superblock_tiles=capacity, triangles=triangles)


def keeping(workload: Workload, limits: Limits, layout: Layout) -> Layout:
    """The same layout with the memory that is left for panels that stay: of the device, or of the host on a CPU.

    In several processes none do: each of them contracts some of the tiles.
    """
    if workload.workers > 1 or (layout.in_memory and (workload.device == "cpu" or len(layout.passes) > 1)):
        return layout
    loads = panel_loads(layout.superblocks(layout.sample_grid(workload)))
    sizes = [layout.tile_samples * stored for stored in layout.cut(workload).stored]
    if workload.device == "cpu":
        room = kernel_room(workload, layout, limits.host)
    else:
        sizes = [size + PANEL_PAGES_BYTES for size in sizes]
        room = device_room(workload, layout, limits.device)
    kept = kept_panels(loads, sizes, max(0, room))
    return replace(layout, kept_bytes=kept.bytes)


def triangle_counts(workload: Workload, limits: Limits) -> list[int]:
    """Numbers of tiles of the train samples with which triangles fill the memory.

    Of every cover, with one row tile to a point and with more, the largest tiles that memory holds: its points take in
    the first row tiles, and the strip below them what is left.
    """
    if workload.device == "cpu":
        room = limits.host - fixed_host_bytes(workload) - workload.loader_bytes
    else:
        room = limits.device - workload.model_bytes - DEVICE_LIBRARY_BYTES
    variable = room / (1 + ALLOCATOR_SHARE) - 2 * STRIPE_BYTES
    entry = workload.item_bytes * workload.entries_per_sample**2
    row = workload.rows_per_sample * workload.held_item_bytes
    # Narrow spans take less memory, but sums of very many of them are added up on disk.
    widths = {NARROW_COLUMNS, max(NARROW_COLUMNS, count_tiles(workload.columns, FOLDED_SPANS))}
    found = set[int]()
    for points, size in COVERS.items():
        for each in range(1, MOST_TOGETHER + 1):
            triangles = Triangles(points, size, each * points)
            tile, buffers = 3 * entry + triangles.largest * entry, triangles.live + AHEAD
            # tile · t² + buffers · (a panel of t rows) = memory; a panel is narrow, or of a size worth reading.
            for line, flat in (*((buffers * row * columns, 0) for columns in widths), (0, buffers * READ_BYTES)):
                left = variable - flat
                edge = int((math.sqrt(line**2 + 4 * tile * left) - line) / (2 * tile)) if left > 0 else 0
                count = count_tiles(workload.train_samples, edge) if edge else 0
                if triangles.tiles * (1 - STRIP_SHARE / 8) <= count <= triangles.tiles / (1 - STRIP_SHARE):
                    found.add(max(count, triangles.tiles))
    return sorted(found)


def shared_squares(workers: int, train: int) -> list[int]:
    """Kernel tiles of squares of which there are about one, two and four times as many as workers.

    A plan for one worker is for a cluster of any size: there are about 32 of them.

    Args:
        workers: worker processes.
        train: column tiles.

    >>> shared_squares(2, 20), shared_squares(1, 20), shared_squares(4, 2)
    ([100, 49, 25], [9], [])
    """
    found = []
    for tasks in (workers, 2 * workers, 4 * workers) if workers > 1 else (CLUSTER_TASKS,):
        groups = next(number for number in range(1, tasks + 1) if number * (number + 1) // 2 >= tasks)
        side = count_tiles(train, groups)
        if side > 1 and groups > 1:
            found.append(side * side)
    return list(dict.fromkeys(found))


def _capacities(
    workload: Workload, limits: Limits, layout: Layout, grid: SampleGrid, wanted: str | None
) -> Iterator[tuple[Order, int, Triangles | None]]:
    """The largest superblocks for which there is memory: everything at once, squares, triangles."""
    tile = stored_tile_bytes(workload, layout)
    panel, base = panel_bytes(workload, layout), read_buffers(workload, layout)
    if workload.device == "cpu":
        room = kernel_room(workload, layout, limits.host)
    else:
        room = device_room(workload, layout, limits.device)

    def fits(tiles: int, live: int) -> bool:
        return tiles * tile + (live + AHEAD - base) * panel <= room

    train = grid.column_tiles
    if wanted != "triangle" and workload.workers:
        yield from (
            ("square", tiles, None)
            for tiles in shared_squares(workload.workers, train)
            if fits(tiles, math.isqrt(tiles) + 1)
        )
        if workload.workers == 1:
            return
    if wanted != "triangle":
        if fits(grid.kernel_tile_count, train):
            yield "square", grid.kernel_tile_count, None
            return
        for groups in range(1, train):
            side = count_tiles(train, groups)
            tiles = side * side if groups > 1 else train * (train + 1) // 2
            if tiles > 1 and fits(tiles, side + 1 if groups > 1 else train):
                yield "square", tiles, None
                break
    # A tile is divided by diagonal tiles, which triangles do not finish first.
    if wanted != "square" and workload.normalize is None:
        able = (_largest_triangles(grid, points, size, fits) for points, size in COVERS.items())
        found = [triangles for triangles in able if triangles is not None]
        if found:
            best = min(found, key=lambda each: Grouping.of(grid, "triangle", each.largest, each).loads)
            yield "triangle", best.largest, best


def _largest_triangles(grid: SampleGrid, points: int, size: int, fits: Callable[[int, int], bool]) -> Triangles | None:
    """Triangles over a cover whose points are as large as memory allows; None if too much is left for the strip."""
    train = grid.column_tiles
    most = min(train // points, MOST_TOGETHER)
    for each in range(most, 0, -1):
        found = Triangles(points, size, each * points)
        if train - found.tiles > STRIP_SHARE * train:
            return None
        grouping = Grouping.of(grid, "triangle", found.largest, found)
        if fits(grouping.tiles, grouping.buffers - AHEAD):
            return found
    return None
