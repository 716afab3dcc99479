"""Rows tasks: derive the Jacobian rows of one sample range, store them, and add up the norms of test samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from torch import Tensor

from ooc_ntk.compute.capture import Captured
from ooc_ntk.compute.finite import all_finite
from ooc_ntk.compute.jacobian import METHODS, ModelBatch
from ooc_ntk.compute.rownorms import factor_norms, squared_norms
from ooc_ntk.errors import DataChangedError
from ooc_ntk.inputs.samples import Samples, digest_samples
from ooc_ntk.planning.columns import PassColumns, pass_columns
from ooc_ntk.planning.memory import expanded_items, group_rows, rule_samples, slab_rows
from ooc_ntk.planning.plan import Plan
from ooc_ntk.planning.tasks import Task
from ooc_ntk.planning.tiles import Range
from ooc_ntk.storage.arrays import TileArray
from ooc_ntk.storage.checked import read_checked
from ooc_ntk.storage.files import Staged
from ooc_ntk.units import held_item_bytes, item_bytes

from .blame import check_finite_factor, failing_on, named_errors, not_finite, where
from .context import Outcome, RunContext
from .features import ProjectedRows
from .returning import ReturningFactors
from .stores import Matrix, RowWriter, as_tensor, factors_of, slab_norms


def derive_rows(context: RunContext, task: Task, known_digest: str | None) -> Outcome:
    """Derive every row of a sample tile for the spans of one pass; add up the diagonal.

    Args:
        context: what the tasks of this process share.
        task: a ``rows`` task.
        known_digest: digest of the same samples as they were read before, or None.

    Returns:
        Staged files (spilled tiles and the diagonal) and the digest of the samples.

    Raises:
        DataChangedError: if the samples differ from ``known_digest``.
        NonFiniteError: if inputs or gradients are not finite.
        RunInterrupted: if the run should stop.
    """
    plan = context.plan
    tile = plan.sample_grid.rows(task.row)
    digest = hashlib.blake2b(digest_size=16)
    writer = context.store.writer(task.generation, task.row)
    rows: _PassRows | ProjectedRows | None = None
    staged: list[Staged] = []
    try:
        rows = _PassRows(context, task, writer) if plan.projection is None else ProjectedRows(context, task, writer)
        for numbers, found in _batches(context, tile):
            with context.phase("read"):
                digest.update(digest_samples(found).encode())
                batch = context.batch(found)
            rows.derive(batch, numbers)
            context.settle()
            context.advance("rows", len(numbers))
        if known_digest is not None and digest.hexdigest() != known_digest:
            raise DataChangedError(
                f"{where(plan, tile)} are not the same as when they were read before; a data set must return the same "
                "sample for the same index: switch off shuffling and random augmentation"
            )
        if isinstance(rows, _PassRows):
            rows.finish()
        staged = writer.finish()
        if isinstance(rows, ProjectedRows):
            staged += rows.finish()
        if rows.norms is None or task.key in context.tiles_only:
            return Outcome(staged, digest=digest.hexdigest())
        diagonal, replaces = _diagonal_file(context, task, rows.norms)
        return Outcome([*staged, diagonal], digest=digest.hexdigest(), replaces=replaces)
    except BaseException:
        writer.discard()
        if rows is not None:
            rows.discard()
        for file in staged:
            file.discard()
        raise


def _batches(context: RunContext, tile: Range) -> Iterator[tuple[Sequence[int], Samples]]:
    """Batches of a tile with the numbers of their samples, in the order in which they are stored."""
    plan = context.plan
    if plan.by_length:
        yield from context.reader.by_length(tile, context.batch_size)
        return
    for samples, found in context.reader.pieces(tile, context.batch_size, ahead=True):
        yield range(samples.start, samples.stop), found


class _PassRows:
    """Derives batches of one sample tile for the spans of one pass, by rules and by torch.func.

    Attributes:
        norms: squared norms of the tile's rows, (rows,) float64; None if all its samples are train samples, whose norms
            the kernel's own diagonal brings.
    """

    def __init__(self, context: RunContext, task: Task, writer: RowWriter) -> None:
        plan = context.plan
        self._context, self._writer = context, writer
        self._tile = plan.sample_grid.rows(task.row)
        self._columns = pass_columns(plan, context.function.sizes, task.generation)
        source = {name: block.source for block in plan.blocks for name in block.parameters}
        self._ruled = [name for name in self._columns.names if source[name] == "rule"]
        self._others = [name for name in self._columns.names if source[name] != "rule"]
        ruled = [block for block in plan.blocks if not set(self._ruled).isdisjoint(block.parameters)]
        self._step = rule_samples(expanded_items(ruled, plan.rows_per_sample) * item_bytes(plan.precision))
        self._factored = {
            span.index: plan.blocks[span.block]
            for span in plan.layout.pass_spans(plan, task.generation)
            if span.block is not None
        }
        names = [*self._ruled, *(name for block in self._factored.values() for name in block.parameters)]
        self._capture = context.capture(names) if names else None
        self._position = 0
        self.norms: np.ndarray | None = None
        if not plan.sample_grid.is_train(task.row):
            self.norms = np.zeros(len(self._tile) * plan.rows_per_sample)
        self._returning: ReturningFactors | None = None
        if context.queues.overlapping and self._factored and self._capture is not None:
            self._returning = ReturningFactors(context, writer, self._capture, self._factored, self.norms)

    def derive(self, batch: ModelBatch, samples: Sequence[int]) -> None:
        """Derive one batch and store it.

        Raises:
            NonFiniteError: if gradients are not finite.
            InputError: if the model fails on it.
            RunInterrupted: if the run should stop.
        """
        context, plan = self._context, self._context.plan
        before, wanted = self._position, len(samples) * plan.rows_per_sample
        captured = None
        if self._capture is not None and self._returning is None:
            places = {
                block.parameters[0]: factors_of(plan, block, self._writer.factor_slabs(span, len(samples)))
                for span, block in self._factored.items()
            }
            with context.phase("capture"), failing_on(where(plan, samples)):
                captured = self._capture.run(batch, places.get)
            self._keep_factors(captured, samples)
        elif self._returning is not None:
            later = self._returning.capture(batch, samples, self._position)
            if self._columns.names:
                captured = later()
        if not self._columns.names:
            self._position += wanted
            return
        for group in self._groups(batch, captured, where(plan, samples)):
            context.check_stop()
            with context.phase("store"):
                self._position += _store_group(
                    context, self._writer, self._columns, group, self.norms, self._position, (before, samples)
                )
            coming = sum(part.untyped_storage().nbytes() for part in group if part.device.type == "cpu")
            del group  # before rules derive the next: both at once are not what is promised of them
            context.settle(coming)
        if self._position - before != wanted:
            raise RuntimeError(f"internal error: {self._position - before} rows derived, {wanted} expected")

    def finish(self) -> None:
        """Hand over what is still on its way from the device.

        Raises:
            NonFiniteError: if it is not finite.
        """
        if self._returning is not None:
            self._returning.flush()

    def discard(self) -> None:
        """Give up what is on its way, after an error."""
        if self._returning is not None:
            self._returning.discard()

    def _keep_factors(self, captured: Captured, samples: Sequence[int]) -> None:
        """Check factors, add up the norms of their rows where those are wanted, and hand them to the store."""
        context, plan = self._context, self._context.plan
        for span, block in self._factored.items():
            (tile,) = captured.factors[block.parameters[0]]
            with context.phase("store"):
                for part in tile:
                    check_finite_factor(plan, part, block.name, samples)
                self._writer.factors_done(span, len(samples))
            if self.norms is not None:
                assert block.factors is not None
                with context.phase("norms"):
                    norms = factor_norms(block.factors, tile)
                self.norms[self._position : self._position + norms.numel()] += norms.reshape(-1).cpu().numpy()

    def _groups(self, batch: ModelBatch, captured: Captured | None, samples: str) -> Iterator[list[Tensor]]:
        """Groups of consecutive rows of all dense parameters of the pass, in column order."""
        context, plan, columns = self._context, self._context.plan, self._columns
        wanted = dict(zip(columns.names, columns.wanted, strict=True))
        rows = plan.rows_per_sample
        if not self._others:
            for start in range(0, len(batch), self._step):
                with context.phase("expand"):
                    found = self._by_rules(captured, slice(start, min(start + self._step, len(batch))), wanted)
                yield [found.pop(name) for name in columns.names]  # nothing is held here: see derive
            return
        width = sum(part.stop - part.start for name, part in wanted.items() if name in self._others)
        gathered = group_rows(plan.span_columns, width, item_bytes(plan.precision))
        if self._ruled:
            gathered = -(-gathered // rows) * rows  # whole samples, as rules derive them
        method = METHODS[plan.method](context.function)
        groups = method.derive(batch, self._others, [wanted[name] for name in self._others], gathered)
        sample = 0
        for group in named_errors(_timed(context, groups), samples):
            if not self._ruled:
                yield group
                continue
            count = group[0].shape[0] // rows
            for start in range(0, count, self._step):
                stop = min(start + self._step, count)
                with context.phase("expand"):
                    found = self._by_rules(captured, slice(sample + start, sample + stop), wanted)
                parts = (part[start * rows : stop * rows] for part in group)
                found.update(zip(self._others, parts, strict=True))
                yield [found.pop(name) for name in columns.names]
            sample += count

    def _by_rules(self, captured: Captured | None, samples: slice, wanted: Mapping[str, slice]) -> dict[str, Tensor]:
        """Dense gradients of the parameters that rules derive: (rows, wanted columns) by name."""
        assert captured is not None
        assert self._capture is not None
        return {
            name: self._capture.dense(captured, name, samples).flatten(0, 1)[:, wanted[name]] for name in self._ruled
        }


def _timed(context: RunContext, groups: Iterator[list[Tensor]]) -> Iterator[list[Tensor]]:
    """Count the time that groups take to derive."""
    while True:
        with context.phase("torch.func"):
            group = next(groups, None)
        if group is None:
            return
        yield group


def _store_group(
    context: RunContext,
    writer: RowWriter,
    columns: PassColumns,
    group: list[Tensor],
    norms: np.ndarray | None,
    position: int,
    batch: tuple[int, Sequence[int]],
) -> int:
    """Copy a group of rows into the spans, slab by slab, taking norms while they are in the cache.

    ``batch`` is the position of its first row, and the numbers of its samples.
    """
    rows, step = group[0].shape[0], slab_rows(context.plan.span_columns, held_item_bytes(context.plan.precision))
    for span, pieces in columns.spans:
        for start in range(0, rows, step):
            count = min(step, rows - start)
            slab = writer.slab(span, count)
            view = as_tensor(slab)
            for piece in pieces:
                view[:, piece.target].copy_(group[piece.parameter][start : start + count, piece.source])
            found = slab_norms(slab)
            if not np.isfinite(found).all():
                row = position + start + int(np.flatnonzero(~np.isfinite(found))[0]) - batch[0]
                found = _judge_overflow(context, slab, columns, group, batch[1][row // context.plan.rows_per_sample])
            if norms is not None:
                norms[position + start : position + start + count] += found
            writer.done(span, count)
    return rows


def _judge_overflow(
    context: RunContext, slab: Matrix, columns: PassColumns, group: list[Tensor], sample: int
) -> np.ndarray:
    """Norms in float64 if only the squares overflowed; otherwise name the block whose gradient is not finite."""
    for block, gradient in zip(columns.blocks, group, strict=True):
        if not all_finite(gradient):
            raise not_finite(context.plan, block, sample)
    return squared_norms(as_tensor(slab).double().numpy())


def _diagonal_file(context: RunContext, task: Task, norms: np.ndarray) -> tuple[Staged, tuple[str, ...]]:
    """Stage the diagonal of a sample tile, this pass added to those before."""
    plan, array = context.plan, context.diagonal_array
    order = context.stored_order(task.row)
    if order is not None:
        norms = norms.reshape(len(order), -1)[np.argsort(order)].reshape(-1)
    values = norms.reshape(-1, plan.rows_per_sample // plan.entries_per_sample).sum(1)
    replaces: tuple[str, ...] = ()
    if task.generation:
        before = np.empty(array.chunks, dtype="<f8")
        path = diagonal_path(array, plan, task.generation - 1, task.row)
        read_checked(context.directory.files, context.records[path], before)
        values = values + before[: values.size]
        replaces = (path,)
    if task.generation == len(plan.passes) - 1:
        values = values / divisor(plan)
    return stage_diagonal(context, diagonal_path(array, plan, task.generation, task.row), values), replaces


def stage_diagonal(context: RunContext, path: str, values: np.ndarray) -> Staged:
    """Stage the diagonal of one sample tile, padded to a whole chunk."""
    padded = np.full(context.diagonal_array.chunks, np.nan, dtype="<f8")
    padded[: values.size] = values
    file = context.directory.files.stage(path)
    try:
        file.append(padded)
    except BaseException:
        file.discard()
        raise
    return file


def diagonal_path(array: TileArray, plan: Plan, generation: int, row: int) -> str:
    """Path of the diagonal of one sample tile after ``generation``; the last generation is the array itself."""
    if generation == len(plan.passes) - 1:
        return array.chunk_path((row,))
    return f"tiles/diagonal-{generation}/{row}"


def divisor(plan: Plan) -> float:
    """What ``scale='mean'`` divides by: the number of outputs."""
    return float(plan.outputs) if plan.scale == "mean" else 1.0
