"""Filling a new generation of a run with what the finished one has: tiles whose samples were all there before."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ooc_ntk.algebra.layers import LAYERS
from ooc_ntk.errors import DamagedFileError
from ooc_ntk.planning.growth import kept_rows, kept_tiles, old_samples
from ooc_ntk.planning.plan import Plan
from ooc_ntk.planning.tasks import Task
from ooc_ntk.planning.tiles import Range
from ooc_ntk.storage.arrays import TileArray, open_tile_array
from ooc_ntk.storage.atomic import FileRecord
from ooc_ntk.storage.checked import read_checked
from ooc_ntk.storage.files import Staged
from ooc_ntk.storage.local import LocalFiles
from ooc_ntk.storage.manifest import Manifest, Receipt

from .context import Outcome, RunContext
from .contraction import kernel_path
from .layers import layers_array
from .progress import LINE_SECONDS
from .resume import adopt
from .rows import diagonal_path, stage_diagonal
from .stores import FEATURES, HEAVY, FeatureStore, heavy_array
from .work import publish

logger = logging.getLogger(__name__)

#: Name of the phase that receipts of copied tiles have; computed ones have none of that name.
COPY: str = "copy"


@dataclass(frozen=True)
class FinishedRun:
    """A finished run that another generation goes on from.

    Attributes:
        root: its directory.
        plan: its plan.
        records: its committed files by path.
    """

    root: Path
    plan: Plan
    records: dict[str, FileRecord]

    @classmethod
    def open(cls, root: Path) -> FinishedRun:
        """Open one.

        Raises:
            StorageError: if plan or manifest cannot be read.
        """
        manifest = Manifest(root, read_only=True)
        try:
            return cls(root, Plan.load(root / "plan.json"), manifest.files())
        finally:
            manifest.close()

    def array(self, name: str) -> TileArray:
        """One of its arrays, whatever its tiles are."""
        found = open_tile_array(self.root, name)
        return TileArray(LocalFiles(self.root), name, found.shape, found.chunks, np.dtype(found.dtype).str)

    def diagonal(self, rows: Range) -> np.ndarray[Any, np.dtype[np.float64]]:
        """A range of its diagonal, (rows,) float64.

        Raises:
            DamagedFileError: if a file is missing or is not what was committed.
        """
        array = self.array("diagonal")
        (edge,), found = array.chunks, np.empty(len(rows))
        for number in range(rows.start // edge, -(-rows.stop // edge)):
            chunk, path = np.empty(edge), array.chunk_path((number,))
            if path not in self.records:
                raise DamagedFileError(path, f"{self.root / path} was never committed; run again")
            read_checked(self.root, self.records[path], chunk)
            first, last = max(rows.start, number * edge), min(rows.stop, (number + 1) * edge)
            found[first - rows.start : last - rows.start] = chunk[first - number * edge : last - number * edge]
        return found


def seed(context: RunContext, manifest: Manifest, old: FinishedRun, say: Callable[[str], None]) -> int:
    """Copy every tile of a finished run that a grown plan keeps and that is not committed yet.

    Files of the old run are compared with their checksums; a tile that needs one that is damaged is left to be
    computed. Copied tiles are committed as the tasks that would have computed them, a tile of several passes in all.

    Args:
        context: the new generation; its store, arrays and plan.
        manifest: of the new generation.
        old: the finished run.
        say: told how far it is.

    Returns:
        How many tasks were copied now.

    Raises:
        RunInterrupted: if the run should stop.
        StorageError: if files cannot be written.
    """
    plan = context.plan
    context.directory.sweep()
    adopt(context.directory, manifest)
    last = len(plan.passes) - 1
    tasks = list(_kept_tasks(plan))
    _withdraw_damaged(manifest, {task.key for task in tasks}, last)
    finished, copied, said = set(manifest.receipts()), 0, time.monotonic()
    for number, task in enumerate(tasks):
        if task.key in finished:
            continue
        context.check_stop()
        start = time.perf_counter()
        context.phases.clear()
        try:
            with context.phase(COPY):
                outcome = _copied_rows(context, old, task) if task.kind == "rows" else _copied_tile(context, old, task)
        except DamagedFileError as error:
            logger.warning("%s is damaged, so %s is computed anew", old.root / error.path, task.key)
            manifest.withdraw(_earlier(task))
            continue
        try:
            for key in _earlier(task):
                _commit(context, manifest, Receipt(key, 0.0))
        except BaseException:
            for file in outcome.files:
                file.discard()
            raise
        _commit(context, manifest, publish(context, task, outcome, start))
        copied += 1
        if time.monotonic() - said >= LINE_SECONDS:
            said = time.monotonic()
            say(f"copied {number + 1:,} of {len(tasks):,} finished tiles")
    return copied


def _kept_tasks(plan: Plan) -> Iterator[Task]:
    """The tasks that are copied; of those in several passes the last."""
    grid = plan.sample_grid
    if plan.projection is not None:
        for row in sorted(kept_rows(grid, plan.grown)):
            yield Task("rows", 0, row)
    if not plan.features_only:
        for i, j in sorted(kept_tiles(grid, plan.grown), key=lambda tile: (tile[0] != tile[1], tile)):
            yield Task("kernel", len(plan.passes) - 1, i, j)


def _earlier(task: Task) -> list[str]:
    """The same tile in earlier passes, which left nothing that is still needed."""
    return [Task(task.kind, generation, task.row, task.column).key for generation in range(task.generation)]


def _withdraw_damaged(manifest: Manifest, kept: set[str], last: int) -> None:
    """Have copies that were damaged since copied again."""
    for key in manifest.damage(thorough=False).tasks & kept:
        kind, _, row, column = key.split("-")
        manifest.withdraw(f"{kind}-{generation}-{row}-{column}" for generation in range(last + 1))


def _commit(context: RunContext, manifest: Manifest, receipt: Receipt) -> None:
    manifest.commit(receipt)
    context.directory.log_receipt(receipt)
    context.directory.drop_receipt(receipt.key)


def _old_range(context: RunContext, samples: Range) -> Range:
    """Where samples that are all of the old run were there."""
    plan = context.plan
    assert plan.grown is not None
    found = old_samples(samples, plan.sample_grid, plan.grown)
    assert found is not None  # only such tiles are kept
    return found


def _times(samples: Range, rows: int) -> Range:
    return Range(samples.start * rows, samples.stop * rows)


def _copied_tile(context: RunContext, old: FinishedRun, task: Task) -> Outcome:
    """Stage a kernel tile, its mirror image, its part of every layer, and on the diagonal the diagonal."""
    plan, grid, array = context.plan, context.plan.sample_grid, context.kernel_array
    entries, i, j = plan.entries_per_sample, task.row, task.column
    rows = _times(_old_range(context, grid.rows(i)), entries)
    columns = _times(_old_range(context, grid.columns(j)), entries)
    mirrored = grid.mirror_rows(i) * entries if i != j else 0
    staged: list[Staged] = []
    try:
        tile, read = old.array("kernel.zarr").read_region(old.records, rows, columns)
        staged.append(array.stage(kernel_path(array, plan, task.generation, i, j), tile))
        if mirrored:
            staged.append(array.stage(array.chunk_path((j, i)), tile[:mirrored].T))
        if i == j and grid.is_train(i):
            path = diagonal_path(context.diagonal_array, plan, task.generation, i)
            staged.append(stage_diagonal(context, path, old.diagonal(rows)))
        layers = layers_array(array, len(plan.layers))
        for layer in range(len(plan.layers)):
            part, more = old.array(LAYERS).read_region(old.records, rows, columns, (layer,))
            read += more
            staged.append(layers.stage(layers.chunk_path((layer, i, j)), part))
            staged[-1].seal()  # closed at once: a deep network has more layers than a process may have open files
            if mirrored:
                staged.append(layers.stage(layers.chunk_path((layer, j, i)), part[:mirrored].T))
                staged[-1].seal()
    except BaseException:
        for file in staged:
            file.discard()
        raise
    return Outcome(staged, bytes_read=read)


def _copied_rows(context: RunContext, old: FinishedRun, task: Task) -> Outcome:
    """Stage the features of a tile, the gradients of the heaviest parameters, and the diagonal of what needs it."""
    plan, store = context.plan, context.store
    assert isinstance(store, FeatureStore)
    samples = _old_range(context, plan.sample_grid.rows(task.row))
    rows, read = _times(samples, plan.rows_per_sample), 0
    staged: list[Staged] = []
    try:
        for span in store.spans:
            for part in store.parts[span.index]:
                values, more = old.array(FEATURES).read_region(old.records, rows, Range(span.start, span.stop))
                # The last span is padded to the width of the others; zeros add nothing to a product.
                staged.append(store.array(part).stage(store.path(part, task.row), values, fill=0))
                read += more
        if plan.heavy:
            values, more = old.array(HEAVY).read_region(old.records, rows, Range(0, len(plan.heavy)))
            array = heavy_array(context.directory.files, plan)
            staged.append(array.stage(array.chunk_path((task.row, 0)), values))
            read += more
        if plan.features_only or not plan.sample_grid.is_train(task.row):
            values = old.diagonal(_times(samples, plan.entries_per_sample))
            path = diagonal_path(context.diagonal_array, plan, task.generation, task.row)
            staged.append(stage_diagonal(context, path, values))
    except BaseException:
        for file in staged:
            file.discard()
        raise
    return Outcome(staged, bytes_read=read)
