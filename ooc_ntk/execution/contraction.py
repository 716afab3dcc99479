"""Kernel tasks: contract two panels of Jacobian tiles into one kernel tile and write it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from ooc_ntk.compute.contract import KernelAccumulator
from ooc_ntk.errors import NonFiniteError
from ooc_ntk.planning.plan import Plan
from ooc_ntk.planning.spans import Span
from ooc_ntk.planning.tasks import Task
from ooc_ntk.storage.arrays import TileArray
from ooc_ntk.storage.atomic import StagedFile, read_checked, read_stripes

from .context import Outcome, RunContext
from .layers import LayerSums, layers_array
from .prefetch import Loaded, prefetched
from .rows import diagonal_path, divisor, stage_diagonal
from .stores import Matrix, Tile, as_tensor, factors_of, row_matrix


def kernel_path(array: TileArray, plan: Plan, generation: int, row: int, column: int) -> str:
    """Path of a kernel tile after ``generation``; the last generation is the kernel itself."""
    if generation == len(plan.passes) - 1:
        return array.chunk_path((row, column))
    return f"tiles/partial-{generation}/{row}.{column}"


def contract_tile(context: RunContext, task: Task) -> Outcome:
    """Stream both panels through the accumulator, add the generation before, stage the tile and its mirror image.

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
    plan, store, array = context.plan, context.store, context.kernel_array
    spans = plan.passes[task.generation]
    symmetric = task.row == task.column
    entries = plan.entries_per_sample
    rows = len(plan.sample_grid.rows(task.row)) * entries
    columns = len(plan.sample_grid.columns(task.column)) * entries
    accumulator = context.accumulator()
    accumulator.begin(rows, rows if symmetric else columns)
    train = len(plan.sample_grid.columns(task.column))

    def load(span: int, buffers: tuple[Matrix | None, ...]) -> tuple[int, Tile, Tile | None]:
        left = store.load(task.generation, task.row, span, buffers[0])
        if symmetric:
            return span, left, None
        right = store.load(task.generation, task.column, span, buffers[1])
        return span, left, tuple(matrix[:train] for matrix in right)

    sides = 1 if symmetric else 2
    share = 1.0 / len(spans) / len(plan.passes)
    read = 0
    keys = range(spans.start, spans.stop)
    staged: list[StagedFile] = []
    try:
        sums = None
        if plan.layers:
            sums = LayerSums(
                plan,
                (rows, rows if symmetric else columns),
                lambda layer, part: staged.extend(_stage_layer(context, task, layer, part)),
            )
        for span, left, right in _waited(context, prefetched(keys, load, store.buffer, sides)):
            context.check_stop()
            if sums is None:
                _add_span(context, accumulator, store.spans[span], left, right)
            else:
                _add_runs(context, accumulator, store.spans[span], left, right, sums)
            read += sides * store.load_bytes(span)
            context.advance("kernel", share)
        tile = accumulator.result().numpy() if sums is None else sums.total
        if symmetric:
            mirror_lower(tile)
        tile = _natural(context, task, tile[:, :columns])

        replaces: tuple[str, ...] = ()
        if task.generation:
            path = kernel_path(array, plan, task.generation - 1, task.row, task.column)
            _add_partial(context, array, path, tile)
            read += array.chunk_bytes
            replaces = (path,)
        staged += _stage_tile(context, task, tile)
    except BaseException:
        for file in staged:
            file.discard()
        raise
    return Outcome(staged, bytes_read=read, replaces=replaces)


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
    left: Tile,
    right: Tile | None,
    sums: LayerSums,
) -> None:
    """Contract one span of both sides layer by layer."""
    rows, columns = sums.total.shape
    for run in sums.runs[span.index]:
        accumulator.begin(rows, columns)
        _add_span(context, accumulator, span, left, right, run.columns)
        with context.phase("layers"):
            sums.add(span.index, run, accumulator.result().numpy())


def _stage_layer(context: RunContext, task: Task, layer: int, part: np.ndarray) -> list[StagedFile]:
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
    staged: list[StagedFile] = []
    try:
        for place, values in places:
            staged.append(array.stage(array.chunk_path(place), values))
            staged[-1].seal()  # closed at once: a deep network has more layers than a process may have open files
    except BaseException:
        for file in staged:
            file.discard()
        raise
    return staged


def _waited(context: RunContext, loaded: Iterator[Loaded]) -> Iterator[Loaded]:
    """Count the time that the reading thread is waited for."""
    while True:
        with context.phase("wait for tiles"):
            found = next(loaded, None)
        if found is None:
            return
        yield found


def _add_span(
    context: RunContext,
    accumulator: KernelAccumulator,
    span: Span,
    left: Tile,
    right: Tile | None,
    columns: slice | None = None,
) -> None:
    """Contract one span of both sides the way the plan says; of a dense one perhaps only some columns."""
    plan, entries = context.plan, context.plan.entries_per_sample

    def dense(tile: Tile) -> Tensor:
        found = as_tensor(row_matrix(tile[0], entries))
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
            accumulator.add_pairwise(factors, one, other, entries)
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
    for rows in read_stripes(context.directory.root, context.records[path], stripe):
        count = max(0, min(len(rows), tile.shape[0] - start))
        tile[start : start + count] += rows[:count, : tile.shape[1]]
        start += len(rows)


def _stage_tile(context: RunContext, task: Task, tile: np.ndarray) -> list[StagedFile]:
    """Scale, normalise and stage a kernel tile and, below the diagonal, its mirror image."""
    plan, array = context.plan, context.kernel_array
    last = task.generation == len(plan.passes) - 1
    diagonal: np.ndarray | None = None
    if last:
        tile /= divisor(plan)
        if task.row == task.column and plan.sample_grid.is_train(task.row):
            diagonal = tile.diagonal().copy()
        if plan.normalize == "cosine":
            _normalise(context, task, tile, diagonal)
    if not np.isfinite(tile.sum()) and not np.isfinite(tile).all():
        rows = plan.sample_grid.rows(task.row)
        columns = plan.sample_grid.columns(task.column)
        raise NonFiniteError(
            f"the kernel of samples {rows} × {columns} is not finite: gradients are too large for {plan.precision}; "
            "use precision='float64'"
        )
    staged: list[StagedFile] = []
    try:
        staged.append(array.stage(kernel_path(array, plan, task.generation, task.row, task.column), tile))
        if diagonal is not None:
            path = diagonal_path(context.diagonal_array, plan, task.generation, task.row)
            staged.append(stage_diagonal(context, path, diagonal))
        mirrored = plan.sample_grid.mirror_rows(task.row) * plan.entries_per_sample
        if last and task.row != task.column and mirrored:
            staged.append(array.stage(array.chunk_path((task.column, task.row)), tile[:mirrored].T))
    except BaseException:
        for file in staged:
            file.discard()
        raise
    return staged


def _normalise(context: RunContext, task: Task, tile: np.ndarray, diagonal: np.ndarray | None) -> None:
    """Divide by the square roots of the diagonal, in place; 0 where a diagonal entry is 0.

    Args:
        context: what the tasks of this process share.
        task: a ``kernel`` task of the last pass.
        tile: its tile.
        diagonal: the tile's own diagonal if it brings that of its samples, otherwise None.
    """
    plan, array = context.plan, context.diagonal_array
    inverse = []
    for index, count in ((task.row, tile.shape[0]), (task.column, tile.shape[1])):
        if diagonal is None:
            values = np.empty(array.chunks, dtype="<f8")
            path = diagonal_path(array, plan, len(plan.passes) - 1, index)
            read_checked(context.directory.root, context.records[path], values)
        else:
            values = diagonal
        roots = np.sqrt(np.maximum(values[:count], 0))
        inverse.append(np.divide(1.0, roots, out=np.zeros_like(roots), where=roots > 0))
    tile *= inverse[0][:, None]
    tile *= inverse[1][None, :]
