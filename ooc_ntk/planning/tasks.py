"""The task list of a plan: coordinates and dependencies, no data. Every executor runs this list."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .tiles import SampleGrid

Kind = Literal["rows", "kernel", "release"]


@dataclass(frozen=True)
class Task:
    """One unit of work, named by its coordinates.

    Attributes:
        kind: ``rows`` derives and stores the tiles of a sample range, ``kernel`` contracts and writes one kernel tile,
            ``release`` gives up the tiles of a finished pass.
        generation: pass number, from 0.
        row: row tile (0 for ``release``).
        column: column tile (0 for ``rows`` and ``release``).

    >>> Task("kernel", 0, 3, 1).key
    'kernel-0-3-1'
    """

    kind: Kind
    generation: int
    row: int = 0
    column: int = 0

    @property
    def key(self) -> str:
        """Name of the task in graph, manifest and receipts."""
        return f"{self.kind}-{self.generation}-{self.row}-{self.column}"


def dependencies(task: Task, grid: SampleGrid, *, in_memory: bool, normalised: int | None = None) -> tuple[Task, ...]:
    """Tasks that must have finished before ``task``.

    Args:
        task: the task.
        grid: the sample grid of its plan.
        in_memory: whether tiles are held in memory, so that a pass must be released before the next one derives.
        normalised: the pass whose kernel tiles are divided by the diagonal, which the diagonal tiles of train samples
            bring; None if none is.

    Returns:
        Its direct dependencies.

    >>> [d.key for d in dependencies(Task("kernel", 1, 1, 0), SampleGrid(4, 0, 2), in_memory=True)]
    ['rows-1-1-0', 'rows-1-0-0', 'kernel-0-1-0']
    >>> [d.key for d in dependencies(Task("kernel", 0, 1, 0), SampleGrid(4, 0, 2), in_memory=True, normalised=0)]
    ['rows-0-1-0', 'rows-0-0-0', 'kernel-0-1-1', 'kernel-0-0-0']
    """
    before = task.generation - 1
    if task.kind == "rows":
        if before < 0:
            return ()
        earlier = (Task("rows", before, task.row),)
        return (*earlier, Task("release", before)) if in_memory else earlier
    if task.kind == "kernel":
        needed = [Task("rows", task.generation, task.row)]
        if task.column != task.row:
            needed.append(Task("rows", task.generation, task.column))
            if task.generation == normalised:
                needed += [
                    Task("kernel", task.generation, index, index)
                    for index in (task.row, task.column)
                    if grid.is_train(index)
                ]
        if before >= 0:
            needed.append(Task("kernel", before, task.row, task.column))
        return tuple(needed)
    return tuple(Task("kernel", task.generation, i, j) for i, j in grid.kernel_tiles())


def task_list(grid: SampleGrid, passes: int, *, features_only: bool = False) -> Iterator[Task]:
    """Yield every task of a plan, each after everything it depends on.

    Args:
        grid: the sample grid.
        passes: number of passes.
        features_only: whether rows are all that is wanted.

    Yields:
        Tasks, pass by pass: rows, kernel tiles (those on the diagonal first), release.

    >>> [t.key for t in task_list(SampleGrid(4, 0, 2), 1)]
    ['rows-0-0-0', 'rows-0-1-0', 'kernel-0-0-0', 'kernel-0-1-1', 'kernel-0-1-0', 'release-0-0-0']
    """
    for generation in range(passes):
        for row in range(grid.row_tiles):
            yield Task("rows", generation, row)
        if features_only:
            continue
        for i, j in sorted(grid.kernel_tiles(), key=lambda tile: (tile[0] != tile[1], tile)):
            yield Task("kernel", generation, i, j)
        yield Task("release", generation)
