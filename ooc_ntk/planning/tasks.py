"""The task list of a plan: coordinates and dependencies, no data. Every executor runs this list."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from .superblocks import KernelTile, Superblock
from .tiles import SampleGrid

Kind = Literal["rows", "kernel", "release"]


@dataclass(frozen=True, slots=True)
class Task:
    """One unit of work, named by its coordinates.

    Attributes:
        kind: ``rows`` derives and stores the tiles of a sample range, ``kernel`` contracts and writes the kernel tiles
            of one superblock, ``release`` gives up the tiles of a finished pass.
        generation: pass number, from 0.
        row: row tile; of ``kernel`` that of the superblock's first tile (0 for ``release``).
        column: column tile of the superblock's first tile (0 for ``rows`` and ``release``).

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

    @property
    def tile(self) -> KernelTile:
        """The kernel tile that names it."""
        return self.row, self.column


class TaskGraph:
    """Every task of a plan, and what each waits for."""

    def __init__(
        self,
        grid: SampleGrid,
        blocks: Sequence[Superblock],
        passes: int = 1,
        *,
        in_memory: bool = False,
        normalised: bool = False,
        features_only: bool = False,
    ) -> None:
        """Describe a graph.

        Args:
            grid: the sample grid.
            blocks: superblocks of kernel tiles; each is one task per pass, named by its first tile.
            passes: number of passes.
            in_memory: whether tiles are held in memory, so that a pass must be released before the next one derives.
            normalised: whether the kernel tiles of the last pass are divided by the diagonal, which the diagonal tiles
                of train samples bring.
            features_only: whether rows are all that is wanted.
        """
        self._grid, self._blocks, self._passes = grid, blocks, passes
        self._in_memory, self._normalised, self._features_only = in_memory, normalised, features_only
        self._by_name = {block.name: block for block in blocks}
        self._of_tile = {tile: block.name for block in blocks for tile in block.tiles}

    def superblock(self, task: Task) -> Superblock:
        """The kernel tiles of a ``kernel`` task."""
        return self._by_name[task.row, task.column]

    def kernel_task(self, generation: int, tile: KernelTile) -> Task:
        """The task that contracts a kernel tile in a pass."""
        return Task("kernel", generation, *self._of_tile[tile])

    def dependencies(self, task: Task) -> tuple[Task, ...]:
        """Tasks that must have finished before ``task``.

        >>> from .superblocks import superblocks
        >>> grid = SampleGrid(4, 0, 2)
        >>> graph = TaskGraph(grid, superblocks(grid), passes=2, in_memory=True)
        >>> [d.key for d in graph.dependencies(Task("kernel", 1, 1, 0))]
        ['rows-1-1-0', 'rows-1-0-0', 'kernel-0-1-0']
        >>> graph = TaskGraph(grid, superblocks(grid), normalised=True)
        >>> [d.key for d in graph.dependencies(Task("kernel", 0, 1, 0))]
        ['rows-0-1-0', 'rows-0-0-0', 'kernel-0-1-1', 'kernel-0-0-0']
        """
        before = task.generation - 1
        if task.kind == "rows":
            if before < 0:
                return ()
            earlier = (Task("rows", before, task.row),)
            return (*earlier, Task("release", before)) if self._in_memory else earlier
        if task.kind == "release":
            return tuple(Task("kernel", task.generation, *block.name) for block in self._blocks)
        block = self.superblock(task)
        needed = [Task("rows", task.generation, index) for index in block.panels]
        if self._normalised and task.generation == self._passes - 1:
            diagonals = dict.fromkeys(index for i, j in block.tiles if i != j for index in (i, j))
            needed += [
                self.kernel_task(task.generation, (index, index))
                for index in diagonals
                if self._grid.is_train(index) and (index, index) not in block.tiles
            ]
        if before >= 0:
            needed.append(Task("kernel", before, task.row, task.column))
        return tuple(dict.fromkeys(needed))

    def tasks(self) -> Iterator[Task]:
        """Yield every task, each after everything it depends on.

        Yields:
            Tasks, pass by pass: rows, superblocks of kernel tiles, release.

        >>> from .superblocks import superblocks
        >>> grid = SampleGrid(4, 0, 2)
        >>> [t.key for t in TaskGraph(grid, superblocks(grid)).tasks()]
        ['rows-0-0-0', 'rows-0-1-0', 'kernel-0-0-0', 'kernel-0-1-1', 'kernel-0-1-0', 'release-0-0-0']
        """
        for generation in range(self._passes):
            for row in range(self._grid.row_tiles):
                yield Task("rows", generation, row)
            if self._features_only:
                continue
            for block in self._blocks:
                yield Task("kernel", generation, *block.name)
            yield Task("release", generation)
