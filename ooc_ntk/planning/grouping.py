"""How kernel tiles of a spilled layout are grouped: the largest superblocks that memory holds, and panels that stay."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from ooc_ntk.errors import InputError

from .budget import Limits
from .layout import Layout
from .memory import PANEL_PAGES_BYTES, device_room, kernel_room, panel_bytes, read_buffers, superblock_bytes
from .planes import PLANES
from .superblocks import AHEAD, Order, kept_panels, panel_loads, triangle_tiles
from .tiles import SampleGrid, count_tiles
from .workload import Workload

#: Superblocks of a plan for a cluster whose number of workers is not known, at least (a choice).
CLUSTER_TASKS: Final = 32

#: Triangles are worth pricing where squares would read every panel so many times (DESIGN: dataflows).
TRIANGLE_TIMES: Final = 3


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
    for found, capacity in _capacities(workload, limits, layout, grid, order):
        yield replace(layout, order=found, superblock_tiles=capacity)


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
) -> Iterator[tuple[Order, int]]:
    """The largest superblocks for which there is memory: everything at once, squares, triangles."""
    tile = superblock_bytes(workload, replace(layout, superblock_tiles=2)) // 2
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
            ("square", tiles) for tiles in shared_squares(workload.workers, train) if fits(tiles, math.isqrt(tiles) + 1)
        )
        if workload.workers == 1:
            return
    if wanted != "triangle":
        if fits(grid.kernel_tile_count, train):
            yield "square", grid.kernel_tile_count
            return
        for groups in range(1, train):
            side = count_tiles(train, groups)
            tiles = side * side if groups > 1 else train * (train + 1) // 2
            if tiles > 1 and fits(tiles, side + 1 if groups > 1 else train):
                yield "square", tiles
                break
    # A tile is divided by diagonal tiles, which triangles do not finish first.
    if wanted != "square" and workload.normalize is None:
        for points, side in PLANES.items():  # the smaller the plane, the fewer panels
            times = (points - 1) // (side - 1)
            live = side * count_tiles(train, points)
            if times >= TRIANGLE_TIMES and points <= train and fits(triangle_tiles(train, points), live):
                yield "triangle", triangle_tiles(train, points)
                break
