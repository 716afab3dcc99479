"""Kernel tasks: contract two panels of Jacobian tiles into one kernel tile and write it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ooc_ntk.errors import NonFiniteError
from ooc_ntk.planning.memory import STRIPE_BYTES
from ooc_ntk.planning.plan import Plan
from ooc_ntk.planning.tasks import Task
from ooc_ntk.storage.arrays import TileArray
from ooc_ntk.storage.atomic import StagedFile, read_checked, read_stripes

from .context import Outcome, RunContext
from .prefetch import prefetched
from .rows import diagonal_path, divisor
from .stores import Matrix


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

    def load(span: int, buffers: tuple[Matrix | None, ...]) -> tuple[Tensor, Tensor | None]:
        left = torch.from_numpy(store.load(task.generation, task.row, span, buffers[0]))
        if symmetric:
            return left, None
        right = torch.from_numpy(store.load(task.generation, task.column, span, buffers[1]))
        return left, right[:columns]

    sides = 1 if symmetric else 2
    share = 1.0 / len(spans) / len(plan.passes)
    for left, right in prefetched(range(spans.start, spans.stop), load, store.buffer, sides):
        context.check_stop()
        accumulator.add(left, right)
        context.advance("kernel", share)
    read = len(spans) * sides * store.load_bytes()
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
    if last:
        tile /= divisor(plan)
        if plan.normalize == "cosine":
            _normalise(context, task, tile)
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


def _normalise(context: RunContext, task: Task, tile: np.ndarray) -> None:
    """Divide by the square roots of the diagonal, in place; 0 where a diagonal entry is 0."""
    plan, array = context.plan, context.diagonal_array
    inverse = []
    for index, count in ((task.row, tile.shape[0]), (task.column, tile.shape[1])):
        values = np.empty(array.chunks, dtype="<f8")
        path = diagonal_path(array, plan, len(plan.passes) - 1, index)
        read_checked(context.directory.root, context.records[path], values)
        roots = np.sqrt(values[:count])
        inverse.append(np.divide(1.0, roots, out=np.zeros_like(roots), where=roots > 0))
    tile *= inverse[0][:, None]
    tile *= inverse[1][None, :]
