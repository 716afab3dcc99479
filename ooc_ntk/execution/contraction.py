"""Kernel tasks: contract panels of Jacobian tiles into the kernel tiles of a superblock and write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from torch import Tensor

from ooc_ntk.compute.contract import KernelAccumulator
from ooc_ntk.compute.split import Parts
from ooc_ntk.errors import NonFiniteError
from ooc_ntk.planning.layers import LayerRun
from ooc_ntk.planning.plan import Plan
from ooc_ntk.planning.spans import Span
from ooc_ntk.planning.superblocks import KernelTile
from ooc_ntk.planning.tasks import Task
from ooc_ntk.storage.arrays import TileArray
from ooc_ntk.storage.checked import read_checked, read_stripes
from ooc_ntk.storage.files import Staged

from .context import Outcome, RunContext
from .layers import LayerSums, layers_array
from .panels import Panels, panels_of
from .rows import diagonal_path, divisor, stage_diagonal
from .stores import DeviceTile, factors_of, row_matrix
from .sums import TileSums, tile_shape


def kernel_path(array: TileArray, plan: Plan, generation: int, row: int, column: int) -> str:
    """Path of a kernel tile after ``generation``; the last generation is the kernel itself."""
    if generation == len(plan.passes) - 1:
        return array.chunk_path((row, column))
    return f"tiles/partial-{generation}/{row}.{column}"


def contract_superblock(context: RunContext, task: Task) -> Outcome:
    """Stream the panels of a superblock past its kernel tiles, and stage the tiles and their mirror images.

    A single tile is summed up in float64. The sums of several are held as they are stored, the products of one span
    being added up in float64 first.

    Args:
        context: what the tasks of this process share.
        task: a ``kernel`` task.

    Returns:
        Staged files and the bytes read.

    Raises:
        NonFiniteError: if the kernel is not finite.
        StorageError: if a tile is missing or damaged.
        RunInterrupted: if the run should stop.
    """
    plan, spans = context.plan, context.plan.passes[task.generation]
    block = plan.graph.superblock(task)
    share = 1.0 / len(spans) / len(plan.passes)
    accumulator = context.accumulator()
    sums = TileSums(context, block, spans)
    staged: list[Staged] = []
    try:
        layered = (
            LayerSums(plan, tile_shape(plan, task.tile), _stage_layers(context, task, staged)) if plan.layers else None
        )
        start = sums.restore(task.key)
        context.advance("kernel", share * len(block.tiles) * (start - spans.start))
        with panels_of(context, task.generation, block, start) as panels:
            for span in range(start, spans.stop):
                for number, tile in enumerate(block.tiles):
                    context.check_stop()
                    left, right = _sides(plan, panels, span, tile)
                    if layered is not None:
                        _add_runs(context, accumulator, context.store.spans[span], left, right, layered)
                    else:
                        work = partial(_contract, context, sums, accumulator, span, number, left, right)
                        context.queues.launch(work)
                    panels.contracted(span, number)
                    context.advance("kernel", share)
                sums.fold(span)
                sums.save(span, task.key)
        diagonals: dict[int, np.ndarray] = {}
        read, replaces = panels.bytes_read, list[str]()
        # Those on the diagonal first: the others are divided by them.
        for number in sorted(range(len(block.tiles)), key=lambda number: len(set(block.tiles[number]))):
            context.check_stop()
            row, column = block.tiles[number]
            values = sums.result(number) if layered is None else layered.total
            more, path = _finish(context, Task("kernel", task.generation, row, column), values, diagonals, staged)
            read, replaces = read + more, [*replaces, *path]
        sums.close()
    except BaseException:
        sums.close()
        for file in staged:
            file.discard()
        raise
    return Outcome(staged, read + sums.folded_bytes, replaces=tuple(replaces), bytes_aside=sums.folded_bytes)


def _contract(
    context: RunContext,
    sums: TileSums,
    accumulator: KernelAccumulator,
    span: int,
    number: int,
    left: DeviceTile,
    right: DeviceTile | None,
) -> None:
    """Add the products of one span to the sum of tile ``number`` of the superblock."""
    sums.start(span, number)
    _add_span(context, accumulator, context.store.spans[span], left, right)
    sums.add(span, number)


def _sides(plan: Plan, panels: Panels, span: int, tile: KernelTile) -> tuple[DeviceTile, DeviceTile | None]:
    """Both panels of a tile; None for the second where it is the first."""
    row, column = tile
    left = panels.get(span, row)
    if row == column:
        return left, None
    train, entries = len(plan.sample_grid.columns(column)), plan.entries_per_sample
    return left, tuple(
        part.rows(slice(train * entries)) if isinstance(part, Parts) else part[:train]
        for part in panels.get(span, column)
    )


def _finish(
    context: RunContext, task: Task, tile: np.ndarray, diagonals: dict[int, np.ndarray], staged: list[Staged]
) -> tuple[int, list[str]]:
    """Add the generation before to a tile that is summed up, and stage it.

    Args:
        context: what the tasks of this process share.
        task: the kernel task that this tile would be by itself.
        tile: (rows, columns) float64; overwritten.
        diagonals: the diagonals of the superblock's tiles so far, by row tile.
        staged: files, added to here.

    Returns:
        Bytes read, and the files that are replaced.
    """
    plan, array = context.plan, context.kernel_array
    if task.row == task.column:
        mirror_lower(tile)
    tile = _natural(context, task, tile[:, : len(plan.sample_grid.columns(task.column)) * plan.entries_per_sample])
    read, replaces = 0, []
    if task.generation:
        path = kernel_path(array, plan, task.generation - 1, task.row, task.column)
        _add_partial(context, array, path, tile)
        read, replaces = array.chunk_bytes, [path]
    mine = _stage_tile(context, task, tile, diagonals)
    staged.extend(mine)
    for file in mine:
        file.seal()  # closed at once: a superblock has more tiles than a process may have open files
    return read, replaces


def _natural(context: RunContext, task: Task, tile: np.ndarray) -> np.ndarray:
    """A tile whose samples were stored by length, in their own order again."""
    entries = context.plan.entries_per_sample
    places = []
    for index, count in ((task.row, tile.shape[0]), (task.column, tile.shape[1])):
        order = context.stored_order(index)
        if order is None:
            return tile
        # A tile's train samples come before its test samples in either order.
        inverse = np.argsort(order[: count // entries])
        places.append((inverse[:, None] * entries + np.arange(entries)).reshape(-1))
    return np.asarray(tile[np.ix_(*places)])


def _add_runs(
    context: RunContext,
    accumulator: KernelAccumulator,
    span: Span,
    left: DeviceTile,
    right: DeviceTile | None,
    sums: LayerSums,
) -> None:
    """Contract one span of both sides layer by layer."""
    rows, columns = sums.total.shape
    for run in sums.runs[span.index]:

        def work(run: LayerRun = run) -> None:
            accumulator.begin(rows, columns)
            _add_span(context, accumulator, span, left, right, run.columns)

        context.queues.launch(work)
        context.finish()
        with context.phase("layers"):
            sums.add(span.index, run, accumulator.result().numpy())


def _stage_layers(context: RunContext, task: Task, staged: list[Staged]) -> Callable[[int, np.ndarray], None]:
    """What stages the parts of layers as they are summed up."""
    return lambda layer, part: staged.extend(_stage_layer(context, task, layer, part))


def _stage_layer(context: RunContext, task: Task, layer: int, part: np.ndarray) -> list[Staged]:
    """Scale and stage one layer's part of a tile, and of a tile below the diagonal its mirror image."""
    plan = context.plan
    array = layers_array(context.kernel_array, len(plan.layers))
    if task.row == task.column:
        mirror_lower(part)
    part = part[:, : len(plan.sample_grid.columns(task.column)) * plan.entries_per_sample]
    part = _natural(context, task, part) / divisor(plan)
    places = [((layer, task.row, task.column), part)]
    mirrored = plan.sample_grid.mirror_rows(task.row) * plan.entries_per_sample
    if task.row != task.column and mirrored:
        places.append(((layer, task.column, task.row), part[:mirrored].T))
    staged: list[Staged] = []
    try:
        for place, values in places:
            staged.append(array.stage(array.chunk_path(place), values, check=context.check_disk))
            staged[-1].seal()  # closed at once: a deep network has more layers than a process may have open files
    except BaseException:
        for file in staged:
            file.discard()
        raise
    return staged


def _add_span(
    context: RunContext,
    accumulator: KernelAccumulator,
    span: Span,
    left: DeviceTile,
    right: DeviceTile | None,
    columns: slice | None = None,
) -> None:
    """Contract one span of both sides the way the plan says; of a dense one perhaps only some columns."""
    plan, entries = context.plan, context.plan.entries_per_sample

    def dense(tile: DeviceTile) -> Tensor | Parts:
        if isinstance(tile[0], Parts):
            return tile[0]
        found = row_matrix(tile[0], entries)
        if columns is None or columns == slice(0, span.columns):
            return found
        # A sample's outputs stand side by side, on disk each padded to the width of the widest span.
        return found.view(len(found), plan.rows_per_sample // entries, -1)[:, :, columns].flatten(1)

    if span.block is None:
        with context.phase("product"):
            accumulator.add(dense(left), None if right is None else dense(right))
        return
    block = plan.blocks[span.block]
    factors = block.factors
    assert factors is not None  # the plan holds no other block as factors
    one, other = factors_of(plan, block, left), None if right is None else factors_of(plan, block, right)
    with context.phase(block.contraction if block.contraction != "gemm" else "expand and product"):
        if block.contraction == "gemm":
            accumulator.add_factored(factors, one, other, entries)
        elif block.contraction == "pairwise":
            accumulator.add_pairwise(factors, one, other, entries, fused=block.fused)
        else:
            accumulator.add_matching(one, other, entries)


def mirror_lower(tile: np.ndarray) -> None:
    """Copy the lower triangle of a square tile onto the upper one, in place, block by block.

    BLAS computes a Gram matrix as one triangle, a general product does not; either way the kernel is exactly symmetric.

    Args:
        tile: (edge, edge).
    """
    step = 256
    for start in range(0, tile.shape[0], step):
        stop = start + step
        corner = np.tril(tile[start:stop, start:stop])
        tile[start:stop, start:stop] = corner + np.tril(corner, -1).T
        tile[start:stop, stop:] = tile[stop:, start:stop].T


def _add_partial(context: RunContext, array: TileArray, path: str, tile: np.ndarray) -> None:
    """Add the tile of the generation before, stripe by stripe."""
    stripe = np.empty((array.stripe_rows, array.chunks[1]), dtype=array.dtype)
    start = 0
    for rows in read_stripes(context.directory.files, context.records[path], stripe):
        count = max(0, min(len(rows), tile.shape[0] - start))
        tile[start : start + count] += rows[:count, : tile.shape[1]]
        start += len(rows)


def _stage_tile(context: RunContext, task: Task, tile: np.ndarray, diagonals: dict[int, np.ndarray]) -> list[Staged]:
    """Scale, normalise and stage a kernel tile and, below the diagonal, its mirror image."""
    plan, array = context.plan, context.kernel_array
    last = task.generation == len(plan.passes) - 1
    diagonal: np.ndarray | None = None
    if last:
        tile /= divisor(plan)
        if task.row == task.column and plan.sample_grid.is_train(task.row):
            diagonals[task.row] = diagonal = tile.diagonal().copy()
        if plan.normalize == "cosine":
            _normalise(context, task, tile, diagonals)
    if not np.isfinite(tile.sum()) and not np.isfinite(tile).all():
        rows = plan.sample_grid.rows(task.row)
        columns = plan.sample_grid.columns(task.column)
        raise NonFiniteError(
            f"the kernel of samples {rows} × {columns} is not finite: gradients are too large for {plan.precision}; "
            "use precision='float64'"
        )
    staged: list[Staged] = []
    try:
        staged.append(
            array.stage(kernel_path(array, plan, task.generation, *task.tile), tile, check=context.check_disk)
        )
        if diagonal is not None:
            path = diagonal_path(context.diagonal_array, plan, task.generation, task.row)
            staged.append(stage_diagonal(context, path, diagonal))
        mirrored = plan.sample_grid.mirror_rows(task.row) * plan.entries_per_sample
        if last and task.row != task.column and mirrored:
            staged.append(
                array.stage(array.chunk_path((task.column, task.row)), tile[:mirrored].T, check=context.check_disk)
            )
    except BaseException:
        for file in staged:
            file.discard()
        raise
    return staged


def _normalise(context: RunContext, task: Task, tile: np.ndarray, diagonals: Mapping[int, np.ndarray]) -> None:
    """Divide by the square roots of the diagonal, in place; 0 where a diagonal entry is 0.

    Args:
        context: what the tasks of this process share.
        task: a ``kernel`` task of the last pass.
        tile: its tile.
        diagonals: the diagonals of this superblock's tiles so far, by row tile.
    """
    plan, array = context.plan, context.diagonal_array
    inverse = []
    for index, count in ((task.row, tile.shape[0]), (task.column, tile.shape[1])):
        values = diagonals.get(index)
        if values is None:
            values = np.empty(array.chunks, dtype="<f8")
            path = diagonal_path(array, plan, len(plan.passes) - 1, index)
            read_checked(context.directory.files, context.records[path], values)
        roots = np.sqrt(np.maximum(values[:count], 0))
        inverse.append(np.divide(1.0, roots, out=np.zeros_like(roots), where=roots > 0))
    tile *= inverse[0][:, None]
    tile *= inverse[1][None, :]
