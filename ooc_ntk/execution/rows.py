"""Rows tasks: derive the Jacobian rows of one sample range, store them, and add up the diagonal."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ooc_ntk.compute.contract import squared_norms
from ooc_ntk.errors import DataChangedError, InputError, NonFiniteError, OocNtkError
from ooc_ntk.inputs.samples import digest_samples
from ooc_ntk.planning.columns import PassColumns, pass_columns
from ooc_ntk.planning.memory import group_rows, slab_rows
from ooc_ntk.planning.plan import Plan
from ooc_ntk.planning.tasks import Task
from ooc_ntk.planning.tiles import Range
from ooc_ntk.storage.arrays import TileArray
from ooc_ntk.storage.atomic import StagedFile, read_checked
from ooc_ntk.units import item_bytes

from .context import Outcome, RunContext
from .stores import Matrix, RowWriter


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
    plan, function = context.plan, context.function
    columns = pass_columns(plan, function.sizes, task.generation)
    width = plan.layout.pass_columns(plan, task.generation)
    gathered = group_rows(plan.span_columns, width, item_bytes(plan.precision))
    tile = plan.sample_grid.rows(task.row)
    norms = np.zeros(len(tile) * plan.rows_per_sample)
    digest = hashlib.blake2b(digest_size=16)
    writer = context.store.writer(task.generation, task.row)
    staged: list[StagedFile] = []
    try:
        position = 0
        for samples, found in context.reader.pieces(tile, plan.batch_size):
            digest.update(digest_samples(found).encode())
            batch = context.batch(found)
            before = position
            for group in _named_errors(
                context.method.derive(batch, columns.names, columns.wanted, gathered), where(plan, samples)
            ):
                context.check_stop()
                position += _store_group(context, writer, columns, group, norms, position, tile.start)
            wanted = len(samples) * plan.rows_per_sample
            if position - before != wanted:
                raise RuntimeError(f"internal error: {position - before} rows derived, {wanted} expected")
            context.advance("rows", len(samples))
        if known_digest is not None and digest.hexdigest() != known_digest:
            raise DataChangedError(
                f"{where(plan, tile)} are not the same as when they were read before; a data set must return the same "
                "sample for the same index: switch off shuffling and random augmentation"
            )
        staged = writer.finish()
        if task.key in context.tiles_only:
            return Outcome(staged, digest=digest.hexdigest())
        diagonal, replaces = _diagonal_file(context, task, norms)
        return Outcome([*staged, diagonal], digest=digest.hexdigest(), replaces=replaces)
    except BaseException:
        writer.discard()
        for file in staged:
            file.discard()
        raise


def _named_errors(groups: Iterator[list[Tensor]], samples: str) -> Iterator[list[Tensor]]:
    """Say of which samples it is that the model fails on."""
    try:
        yield from groups
    except InputError as error:
        raise InputError(f"{error} (in {samples})") from error
    except (OocNtkError, MemoryError):
        raise
    except Exception as error:
        raise InputError(
            f"the model failed on {samples} ({type(error).__name__}: {error}); "
            "check that these samples have the shape and dtype that the model takes"
        ) from error


def where(plan: Plan, samples: Range) -> str:
    """Name a range of samples as the user counts them: train and test each from 0."""
    train = plan.train_samples
    kind, shift = ("train", 0) if samples.start < train else ("test", train)
    if len(samples) == 1:
        return f"{kind} sample {samples.start - shift}"
    return f"{kind} samples {Range(samples.start - shift, samples.stop - shift)}"


def _store_group(
    context: RunContext,
    writer: RowWriter,
    columns: PassColumns,
    group: list[Tensor],
    norms: np.ndarray,
    position: int,
    first_sample: int,
) -> int:
    """Copy a group of rows into the spans, slab by slab, taking norms while they are in the cache."""
    rows, step = group[0].shape[0], slab_rows(context.plan.span_columns, item_bytes(context.plan.precision))
    for span, pieces in columns.spans:
        for start in range(0, rows, step):
            count = min(step, rows - start)
            slab = writer.slab(span, count)
            view = torch.from_numpy(slab)
            for piece in pieces:
                view[:, piece.target].copy_(group[piece.parameter][start : start + count, piece.source])
            found = squared_norms(slab)
            if not np.isfinite(found).all():
                row = position + start + int(np.flatnonzero(~np.isfinite(found))[0])
                found = _judge_overflow(
                    context, slab, columns, group, first_sample + row // context.plan.rows_per_sample
                )
            norms[position + start : position + start + count] += found
            writer.done(span, count)
    return rows


def _judge_overflow(
    context: RunContext, slab: Matrix, columns: PassColumns, group: list[Tensor], sample: int
) -> np.ndarray:
    """Norms in float64 if only the squares overflowed; otherwise name the block whose gradient is not finite."""
    for block, gradient in zip(columns.blocks, group, strict=True):
        if not bool(torch.isfinite(gradient).all()):
            raise NonFiniteError(
                f"the gradient of block {block or '(model)'!r} is NaN or infinite in "
                f"{where(context.plan, Range(sample, sample + 1))}; "
                "check that sample and the weights, or use precision='float64'"
            )
    return squared_norms(slab.astype(np.float64))


def _diagonal_file(context: RunContext, task: Task, norms: np.ndarray) -> tuple[StagedFile, tuple[str, ...]]:
    """Stage the diagonal of a sample tile, this pass added to those before."""
    plan, array = context.plan, context.diagonal_array
    values = norms.reshape(-1, plan.rows_per_sample // plan.entries_per_sample).sum(1)
    replaces: tuple[str, ...] = ()
    if task.generation:
        before = np.empty(array.chunks, dtype="<f8")
        path = diagonal_path(array, plan, task.generation - 1, task.row)
        read_checked(context.directory.root, context.records[path], before)
        values = values + before[: values.size]
        replaces = (path,)
    if task.generation == len(plan.passes) - 1:
        values = values / divisor(plan)
    padded = np.full(array.chunks, np.nan, dtype="<f8")
    padded[: values.size] = values
    file = StagedFile(context.directory.root, diagonal_path(array, plan, task.generation, task.row))
    try:
        file.append(padded)
    except BaseException:
        file.discard()
        raise
    return file, replaces


def diagonal_path(array: TileArray, plan: Plan, generation: int, row: int) -> str:
    """Path of the diagonal of one sample tile after ``generation``; the last generation is the array itself."""
    if generation == len(plan.passes) - 1:
        return array.chunk_path((row,))
    return f"tiles/diagonal-{generation}/{row}"


def divisor(plan: Plan) -> float:
    """What ``scale='mean'`` divides by: the number of outputs."""
    return float(plan.outputs) if plan.scale == "mean" else 1.0
