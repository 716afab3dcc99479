"""Rows tasks of a projected job: derive the gradients of a batch, project them piece by piece, store the features."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ooc_ntk.compute.capture import Capture, Captured
from ooc_ntk.compute.finite import all_finite
from ooc_ntk.compute.gradients import GradientPiece, contiguous_pieces, gradient_pieces
from ooc_ntk.compute.jacobian import METHODS, ModelBatch, ModelFunction
from ooc_ntk.compute.projection.backends import load_backend
from ooc_ntk.compute.projection.entries import Outer
from ooc_ntk.compute.projection.sketch import FLOAT32_PARTS, Sketch
from ooc_ntk.compute.rules.base import OuterRule
from ooc_ntk.planning.memory import SketchChunks, gathered_rows, slab_rows
from ooc_ntk.planning.plan import Plan
from ooc_ntk.planning.projection import Projection
from ooc_ntk.planning.tasks import Task
from ooc_ntk.storage.files import Staged
from ooc_ntk.units import held_item_bytes, item_bytes

from .blame import check_finite_factor, failing_on, named_errors, not_finite, where
from .stores import RowWriter, as_tensor, heavy_array, slab_norms

if TYPE_CHECKING:
    from .context import RunContext
    from .prepare import PreparedJob

#: Counts the time of the body under a name.
Phase: TypeAlias = Callable[[str], AbstractContextManager[None]]


class Projector:
    """Derives and projects batches: what a run does for its features, and planning for a pilot.

    Attributes:
        sketch: takes the gradients.
    """

    def __init__(
        self,
        function: ModelFunction,
        projection: Projection,
        structured: Sequence[str],
        from_factors: Sequence[str],
        capture: Capture | None,
        others: Sequence[str],
        method: str,
        precision: str,
        *,
        heavy: Sequence[int] = (),
    ) -> None:
        """Project all chosen parameters of a model.

        Args:
            function: model and chosen parameters on the device.
            projection: with its dim, and the backend that runs it.
            structured: weights whose part of R is made of hashes of both sides.
            from_factors: those of them that are projected from their factors.
            capture: what derives the parameters that rules cover; None if there are none.
            others: the other parameters.
            method: what derives those, ``loop`` or ``vmap``.
            precision: of the gradients.
            heavy: global indices of parameters whose gradients are wanted as they are.
        """
        self._starts = starts = parameter_starts(function)
        self._function, self._projection, self._capture = function, projection, capture
        self._from_factors = frozenset(from_factors)
        self._others, self._method = tuple(others), method
        self._ruled = [] if capture is None else [name for layer in capture.layers for name in layer.parameters]
        self._item_bytes = item_bytes(precision)
        outers = {name: outer_of(function, starts, name) for name in structured}
        parts = 1 if precision == "bf16" else FLOAT32_PARTS
        self._device = next(iter(function.parameters.values())).device
        self._chunks = SketchChunks.of(self._device.type)
        self.sketch = Sketch(
            projection,
            starts,
            load_backend(projection.backend),
            outers,
            heavy=heavy,
            parts=parts,
            chunks=self._chunks,
            columns=sum(function.sizes[name] for name in (*self._ruled, *others)),
        )

    def project(self, batch: ModelBatch, rows: int, phase: Phase | None = None, samples: str = "") -> Tensor:
        """Features of a batch.

        Args:
            batch: samples on the device.
            rows: Jacobian rows per sample.
            phase: counts the time of what is done.
            samples: what errors call the batch.

        Returns:
            (samples, rows, dim) float64, on the device.
        """
        phase = phase or _uncounted
        self.sketch.begin(len(batch), rows, self._device)
        self.captured: Captured | None = None
        if self._capture is not None:
            with phase("capture"), failing_on(samples):
                self.captured = self._capture.run(batch)
            with phase("project"):
                for name in self._ruled:
                    self._add(name, self.captured)
        if self._others:
            self._add_others(batch, rows, phase, samples)
        return self.sketch.result()

    def squares(self, prepared: PreparedJob, samples: Sequence[int], batch: int) -> Tensor:
        """Sum over some samples of the squared gradients of every parameter.

        Args:
            prepared: the job.
            samples: their numbers.
            batch: samples derived together.

        Returns:
            By global index, float32 on the host; of a weight that is used several times the uses' squares are added up.
        """
        size = sum(parameter.numel() for parameter in self._function.module.parameters())
        found = torch.zeros(size)

        def add(name: str, pieces: Iterable[GradientPiece]) -> None:
            for piece in pieces:
                squares = piece.values.square().sum((0, 1)).float().cpu()
                if piece.start is None:
                    found.index_add_(0, piece.columns.cpu() + self._starts[name], squares)
                else:
                    first = self._starts[name] + piece.start
                    found[first : first + len(squares)] += squares

        for start in range(0, len(samples), batch):
            some = prepared.batch_of(samples[start : start + batch])
            if self._capture is not None:
                captured = self._capture.run(some)
                for name in self._ruled:
                    add(name, gradient_pieces(self._capture, captured, name, chunks=self._chunks))
            if self._others:
                for group in METHODS[self._method](self._function).derive(some, self._others):
                    for name, values in zip(self._others, group, strict=True):
                        add(name, contiguous_pieces(values[:, None], slice(0, len(values)), self._chunks))
        return found

    def _add(self, name: str, captured: Captured) -> None:
        """Add a parameter that rules derive."""
        capture, sketch = self._capture, self.sketch
        assert capture is not None
        if name in self._from_factors:
            layer = next(layer for layer in capture.layers if name in layer.parameters)
            for use, tile in zip(layer.uses, captured.factors[name], strict=False):
                assert isinstance(use.rule, OuterRule)
                sketch.add_factors(name, tile, transposed=use.rule.transposed)
            return
        dense = not self._projection.about.sparse
        sketch.add(name, gradient_pieces(capture, captured, name, whole_rows=dense, chunks=self._chunks))

    def _add_others(self, batch: ModelBatch, rows: int, phase: Phase, samples: str) -> None:
        """Add what torch.func derives, some rows at a time."""
        width = sum(self._function.sizes[name] for name in self._others)
        gathered = min(gathered_rows(width, self._item_bytes), len(batch) * rows)
        groups = METHODS[self._method](self._function).derive(batch, self._others, None, gathered)
        position = 0
        for group in named_errors(_timed(phase, groups), samples):
            count = group[0].shape[0]
            with phase("project"):
                for name, values in zip(self._others, group, strict=True):
                    self.sketch.add_rows(name, position, values)
            position += count


def parameter_starts(function: ModelFunction) -> dict[str, int]:
    """Global index of the first element of every parameter of the model, whatever subset is chosen (DESIGN: words)."""
    starts, position = {}, 0
    for name, parameter in function.module.named_parameters():
        starts[name] = position
        position += parameter.numel()
    return starts


def outer_of(function: ModelFunction, starts: dict[str, int], name: str) -> Outer:
    """A weight as a tensor sketch sees it."""
    rows, columns = function.parameters[name].shape
    return Outer(starts[name], rows, columns)


class ProjectedRows:
    """Derives, projects and stores the batches of one sample tile.

    Attributes:
        norms: squared norms of the tile's features, (rows,) float64; None if all its samples are train samples of a
            kernel, whose own diagonal brings them.
    """

    def __init__(self, context: RunContext, task: Task, writer: RowWriter) -> None:
        plan = context.plan
        self._context, self._writer = context, writer
        self._spans = plan.layout.pass_spans(plan, task.generation)
        self._tile = plan.sample_grid.rows(task.row)
        self._projector = context.projector()
        self._position = 0
        self._heavy: Staged | None = None
        self.norms: np.ndarray | None = None
        if plan.features_only or not plan.sample_grid.is_train(task.row):
            self.norms = np.zeros(len(self._tile) * plan.rows_per_sample)

    def derive(self, batch: ModelBatch, samples: Sequence[int]) -> None:
        """Derive, project and store one batch.

        Raises:
            NonFiniteError: if gradients are not finite.
            InputError: if the model fails on it.
            RunInterrupted: if the run should stop.
        """
        context, plan = self._context, self._context.plan
        context.check_stop()
        found = self._projector.project(batch, plan.rows_per_sample, context.phase, where(plan, samples))
        with context.phase("store"):
            features = found.flatten(0, 1).cpu()
            if not all_finite(features):
                self._blame(features, samples)
            self._store(features)
            self._keep_heavy()

    def _keep_heavy(self) -> None:
        """Append the gradients of the heaviest parameters to their file."""
        plan = self._context.plan
        if not plan.heavy:
            return
        array = heavy_array(self._context.directory.files, plan)
        if self._heavy is None:
            place = array.chunk_path((self._tile.start // plan.tile_samples, 0))
            self._heavy = array.files.stage(place)
        found = self._projector.sketch.heavy.flatten(0, 1).cpu().numpy()
        self._heavy.append(np.ascontiguousarray(found, dtype=array.dtype))

    def finish(self) -> list[Staged]:
        """The gradients of the heaviest parameters of the tile, padded to a whole one."""
        if self._heavy is None:
            return []
        plan = self._context.plan
        array = heavy_array(self._context.directory.files, plan)
        missing = (plan.tile_samples - len(self._tile)) * plan.rows_per_sample
        for _ in range(missing):
            self._heavy.append(np.full(array.chunks[1], np.nan, dtype=array.dtype))
        found, self._heavy = self._heavy, None
        return [found]

    def discard(self) -> None:
        """Give up what was written."""
        if self._heavy is not None:
            self._heavy.discard()

    def _store(self, features: Tensor) -> None:
        """Round the features and write them, span by span."""
        plan = self._context.plan
        step = slab_rows(plan.span_columns, held_item_bytes(plan.precision))
        for span in self._spans:
            for start in range(0, len(features), step):
                part = features[start : start + step, span.start : span.stop]
                slab = self._writer.slab(span.index, len(part))
                as_tensor(slab).copy_(part)
                if self.norms is not None:
                    first = self._position + start
                    self.norms[first : first + len(part)] += slab_norms(slab)
                self._writer.done(span.index, len(part))
        self._position += len(features)

    def _blame(self, features: Tensor, samples: Sequence[int]) -> None:
        """Name sample and block of a gradient that is not finite."""
        plan, captured = self._context.plan, self._projector.captured
        for block in plan.blocks if captured is not None else ():
            assert captured is not None
            for tile in captured.factors.get(block.parameters[0], ()):
                for part in tile:
                    check_finite_factor(plan, part, block.name, samples)
            for name in block.parameters:
                if name in captured.rows:
                    check_finite_factor(plan, captured.rows[name], block.name, samples)
        bad = int((~torch.isfinite(features).all(1)).nonzero()[0]) // plan.rows_per_sample
        raise not_finite(plan, "", samples[bad])


def projector_of(plan: Plan, function: ModelFunction, capture: Callable[[Sequence[str]], Capture]) -> Projector:
    """What derives and projects the rows of a plan.

    Args:
        plan: a plan with a projection.
        function: model and chosen parameters on the plan's device.
        capture: makes what derives some parameters by rules.
    """
    assert plan.projection is not None
    ruled = [name for block in plan.blocks if block.source == "rule" for name in block.parameters]
    others = [name for block in plan.blocks if block.source != "rule" for name in block.parameters]
    return Projector(
        function,
        plan.projection,
        plan.structured,
        plan.from_factors,
        capture(ruled) if ruled else None,
        others,
        plan.method,
        plan.precision,
        heavy=plan.heavy,
    )


@contextmanager
def _uncounted(name: str) -> Iterator[None]:
    """Count no time."""
    del name
    yield


def _timed(phase: Phase, groups: Iterator[list[Tensor]]) -> Iterator[list[Tensor]]:
    """Count the time that groups take to derive."""
    while True:
        with phase("torch.func"):
            group = next(groups, None)
        if group is None:
            return
        yield group
