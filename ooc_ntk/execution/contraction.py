"""Kernel tasks: contract two panels of Jacobian tiles into one kernel tile and write it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ooc_ntk.compute.contract import KernelAccumulator
from ooc_ntk.errors import NonFiniteError
from ooc_ntk.planning.memory import STRIPE_BYTES
from ooc_ntk.planning.plan import Plan
from ooc_ntk.planning.spans import Span
from ooc_ntk.planning.tasks import Task
from ooc_ntk.storage.arrays import TileArray
from ooc_ntk.storage.atomic import StagedFile, read_checked, read_stripes

from .context import Outcome, RunContext
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
    for span, left, right in _waited(context, prefetched(keys, load, store.buffer, sides)):
        context.check_stop()
        _add_span(context, accumulator, store.spans[span], left, right)
        read += sides * store.load_bytes(span)
        context.advance("kernel", share)
    tile = accumulator.result().numpy()
    if symmetric:
        mirror_lower(tile)
    tile = tile[:, :columns]

    replaces: tuple[str, ...] = ()
    if task.generation:
        path = kernel_path(array, plan, task.generation - 1, task.row, task.column)
        _add_partial(context, array, path, tile)
        read += array.chunk_bytes
        replaces = (path,)
    return Outcome(_stage_tile(context, task, tile), bytes_read=read, replaces=replaces)


def _waited(context: RunContext, loaded: Iterator[Loaded]) -> Iterator[Loaded]:
    """Count the time that the reading thread is waited for."""
    while True:
        with context.phase("wait for tiles"):
            found = next(loaded, None)
        if found is None:
            return
        yield found


def _add_span(context: RunContext, accumulator: KernelAccumulator, span: Span, left: Tile, right: Tile | None) -> None:
    """Contract one span of both sides the way the plan says."""
    plan, entries = context.plan, context.plan.entries_per_sample
    if span.block is None:
        with context.phase("product"):
            accumulator.add(
                as_tensor(row_matrix(left[0], entries)),
                None if right is None else as_tensor(row_matrix(right[0], entries)),
            )
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


def _stripes(array: TileArray) -> int:
    """Rows of one stripe of a kernel tile."""
    return max(1, STRIPE_BYTES // (array.chunks[1] * np.dtype(array.dtype).itemsize))


def _add_partial(context: RunContext, array: TileArray, path: str, tile: np.ndarray) -> None:
    """Add the tile of the generation before, stripe by stripe."""
    stripe = np.empty((_stripes(array), array.chunks[1]), dtype=array.dtype)
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
        staged.append(_stage(context, array, kernel_path(array, plan, task.generation, task.row, task.column), tile))
        if diagonal is not None:
            path = diagonal_path(context.diagonal_array, plan, task.generation, task.row)
            staged.append(stage_diagonal(context, path, diagonal))
        mirrored = plan.sample_grid.mirror_rows(task.row) * plan.entries_per_sample
        if last and task.row != task.column and mirrored:
            staged.append(_stage(context, array, array.chunk_path((task.column, task.row)), tile[:mirrored].T))
    except BaseException:
        for file in staged:
            file.discard()
        raise
    return staged


def _stage(context: RunContext, array: TileArray, path: str, tile: np.ndarray) -> StagedFile:
    """Write a tile as one padded chunk, stripe by stripe."""
    file = StagedFile(context.directory.root, path)
    step = _stripes(array)
    try:
        stripe = np.empty((step, array.chunks[1]), dtype=array.dtype)
        for start in range(0, array.chunks[0], step):
            count = min(step, array.chunks[0] - start)
            part = tile[start : start + count]
            stripe[:] = np.nan
            stripe[: part.shape[0], : part.shape[1]] = part
            file.append(stripe[:count])
    except BaseException:
        file.discard()
        raise
    return file


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
