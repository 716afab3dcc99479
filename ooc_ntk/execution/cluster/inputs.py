"""Which committed files a task reads: a worker is sent their records with the task, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

from ooc_ntk.execution.context import RunContext
from ooc_ntk.execution.contraction import kernel_path
from ooc_ntk.execution.rows import diagonal_path
from ooc_ntk.execution.stores import DiskStore
from ooc_ntk.planning.tasks import Task
from ooc_ntk.storage.atomic import FileRecord


def records_of(context: RunContext, task: Task) -> dict[str, FileRecord]:
    """Records of the files that a task reads.

    Args:
        context: the driver's, whose records are up to date.
        task: a task whose dependencies are committed.

    Returns:
        Records by path.
    """
    return {path: context.records[path] for path in _paths(context, task)}


def _paths(context: RunContext, task: Task) -> Iterator[str]:
    plan, diagonal, before = context.plan, context.diagonal_array, task.generation - 1
    if task.kind == "rows":
        # Norms of test samples are added up from pass to pass; those of train samples come with the kernel's tiles.
        if before >= 0 and not plan.sample_grid.is_train(task.row) and task.key not in context.tiles_only:
            yield diagonal_path(diagonal, plan, before, task.row)
        return
    assert isinstance(context.store, DiskStore)  # tiles in memory stay in one process
    block, spans = plan.graph.superblock(task), plan.passes[task.generation]
    for row in block.panels:
        for span in range(spans.start, spans.stop):
            for part in context.store.parts[span]:
                yield context.store.path(part, row)
    for row, column in block.tiles:
        if before >= 0:
            yield kernel_path(context.kernel_array, plan, before, row, column)
        if plan.normalize == "cosine" and task.generation == len(plan.passes) - 1:
            for index in {row, column}:
                path = diagonal_path(diagonal, plan, task.generation, index)
                if path in context.records:  # those of the superblock's own diagonal tiles it makes itself
                    yield path
