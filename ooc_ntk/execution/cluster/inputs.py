"""Which committed files a task reads: a worker is sent their records with the task, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

from ooc_ntk.execution.context import RunContext
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
    if task.kind == "rows":  # of the one pass that there is where tiles are on disk
        return
    assert isinstance(context.store, DiskStore)  # tiles in memory stay in one process
    plan = context.plan
    block, spans = plan.graph.superblock(task), plan.passes[task.generation]
    for row in block.panels:
        for span in range(spans.start, spans.stop):
            for part in context.store.parts[span]:
                yield context.store.path(part, row)
    if plan.normalize != "cosine":
        return
    for index in dict.fromkeys(index for tile in block.tiles for index in tile):
        path = diagonal_path(context.diagonal_array, plan, task.generation, index)
        if path in context.records:  # those of the superblock's own diagonal tiles it makes itself
            yield path
