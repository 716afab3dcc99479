"""What planning measures of a projected job: weights sketched from factors, what projecting takes, a pilot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from ooc_ntk.algebra.errors import Panel, moments, sketch_shape
from ooc_ntk.compute.capture import Capture
from ooc_ntk.compute.machine import best_seconds, return_free_memory
from ooc_ntk.compute.projection.backends import Backend, backend_name, load_backend
from ooc_ntk.compute.projection.entries import Outer
from ooc_ntk.compute.projection.sketch import FLOAT32_PARTS, Sketch, exact_product, tile_dtype
from ooc_ntk.compute.rules.base import OuterRule
from ooc_ntk.compute.structure import Structure
from ooc_ntk.errors import InputError
from ooc_ntk.planning.factors import LayerFactors
from ooc_ntk.planning.memory import SketchChunks
from ooc_ntk.planning.projection import (
    HEAVY,
    SMALLEST_BLOCK,
    STRUCTURED_RATIO,
    PilotMoments,
    Projection,
    check_smaller,
    fitting_dim,
)
from ooc_ntk.planning.workload import Derivation, ParameterBlock, Sketched

from .features import Projector

if TYPE_CHECKING:
    from .prepare import PreparedJob

#: Samples of the pilot, fewer if they have many outputs: the relative error that it foresees is then off by a tenth or
#: so (the spread over choices of samples on the tests' networks).
PILOT_SAMPLES: Final = 48

#: Jacobian rows of the pilot at most.
PILOT_ROWS: Final = 1024

#: Samples from which the heaviest parameters are found.
HEAVY_SAMPLES: Final = 16

#: Share of the heaviest parameters from which on their squares are taken off (a choice).
SMALLEST_SHARE: Final = 0.3

#: Columns of the pilot's own sketch; what its error adds to the squares is taken off.
PILOT_DIM: Final = 4096

#: Jacobian rows that are projected to time it.
TIMED_ROWS: Final = 32


def measure_sketch(
    prepared: PreparedJob, blocks: Sequence[ParameterBlock], derivation: Derivation, rows: int
) -> Sketched:
    """Measure how a job is projected.

    Args:
        prepared: the job, with a projection.
        blocks: its parameter blocks.
        derivation: how their gradients are derived.
        rows: Jacobian rows per sample.

    Returns:
        The projection with its dim, chosen for the target error if the job asks for one.

    Raises:
        InputError: if the backend is missing, or the dim is not below the number of parameters.
    """
    asked, structure = prepared.job.sketch, prepared.function.structure or Structure()
    assert asked is not None
    columns = blocks[-1].stop
    backend = backend_name(asked.backend, prepared.device)
    if asked.dim is not None:
        check_smaller(asked.dim, columns)
    heavy: tuple[int, ...] = ()
    share = 0.0
    if asked.about.signs:
        heavy, share = _heaviest(prepared, backend, blocks, structure, derivation, rows)
    found = _pilot(prepared, asked, backend, blocks, structure, derivation, rows, heavy, share)
    entries = rows if prepared.job.kernel == "full" else 1
    dim = asked.dim or found.dim_for(asked, len(prepared.reader.train) * entries)
    if dim >= columns:
        raise InputError(
            f"an error of {100 * (asked.target_error or 0):.3g}% needs {dim:,} columns, no fewer than the {columns:,} "
            "parameters: the exact kernel is cheaper; leave the projection out, or accept a larger error"
        )
    projection = replace(asked, dim=dim, target_error=None, backend=backend)
    structured = structured_weights(projection, blocks, structure, prepared)
    engine = load_backend(backend)
    columns_seconds, making = _timed(projection, engine, columns, derivation.batch_size, prepared)
    seconds, plain, chosen = 0.0, columns, []
    for block in blocks:
        name, part = block.parameters[0], block.columns / columns
        if name in structured:
            assert block.factors is not None
            whole = (
                rows * columns_seconds * part + making * part / derivation.batch_size + (block.expand_seconds or 0.0)
            )
            factored = _timed_factors(projection, engine, block.factors, rows, prepared)
            if factored < whole:
                chosen.append(name)
                seconds, plain = seconds + factored / rows, plain - block.columns
    row_seconds = seconds + columns_seconds * plain / columns
    batch_seconds = making * plain / columns
    return_free_memory()
    return Sketched(
        projection,
        structured,
        tuple(chosen),
        row_seconds,
        batch_seconds,
        found,
        heavy=heavy,
        heavy_share=share,
    )


def structured_weights(
    projection: Projection, blocks: Sequence[ParameterBlock], structure: Structure, prepared: PreparedJob
) -> tuple[str, ...]:
    """Names of the weights that a tensor sketch takes from their factors: large matrices of linear layers."""
    if not projection.about.structured:
        return ()
    assert projection.dim is not None
    found = []
    for block in blocks:
        name = block.parameters[0]
        layer, weight = structure.layers.get(name), prepared.function.parameters[name]
        if layer is None or block.factors is None or block.factors.kind != "linear" or block.factors.lookups:
            continue
        plain = all(
            isinstance(use.rule, OuterRule) and type(use.rule).weight_columns is OuterRule.weight_columns
            for use in layer.uses
        )
        if plain and layer.kind == "outer" and weight.ndim == 2 and weight.numel() >= STRUCTURED_RATIO * projection.dim:
            found.append(name)
    return tuple(found)


def _pilot(
    prepared: PreparedJob,
    asked: Projection,
    backend: str,
    blocks: Sequence[ParameterBlock],
    structure: Structure,
    derivation: Derivation,
    rows: int,
    heavy: tuple[int, ...],
    share: float,
) -> PilotMoments:
    """Sketch a few train samples, spread evenly, and take what the error of the whole kernel depends on."""
    kind = asked.kind if asked.about.structured else "sjlt"
    nonzeros = asked.nonzeros if kind == asked.kind else 0
    blank = Projection(kind, PILOT_DIM, asked.seed, nonzeros=0, backend=backend)
    size = fitting_dim(kind, PILOT_DIM, nonzeros or blank.nonzeros)
    projection = replace(blank, dim=size, nonzeros=nonzeros or blank.nonzeros)
    # The weights that the run will sketch from their factors, where its size is known.
    sized = projection if asked.dim is None else asked
    structured = structured_weights(sized, blocks, structure, prepared)
    projector = _projector(prepared, projection, structured, blocks, structure, derivation, rows, heavy)
    train = len(prepared.reader.train)
    count = min(train, PILOT_SAMPLES, max(2, PILOT_ROWS // rows))
    chosen = _spread(train, count)
    features, gradients = [], []
    step = min(derivation.batch_size, count)
    for start in range(0, len(chosen), step):
        batch = prepared.batch_of(chosen[start : start + step])
        features.append(projector.project(batch, rows, samples="the pilot's samples").cpu().numpy())
        gradients.append(projector.sketch.heavy.cpu().numpy())
    every, heaviest = np.concatenate(features), np.concatenate(gradients)
    if not np.isfinite(every).all():
        bad = chosen[int(np.flatnonzero(~np.isfinite(every).all((1, 2)))[0])]
        raise InputError(f"the gradient of train sample {bad} is NaN or infinite; check that sample and the weights")
    panel = Panel(every, heaviest if heavy else None)
    full = prepared.job.kernel == "full"
    return moments(
        panel.by_rows() if full else panel,
        sketch_shape(projection, share),
        outputs=rows if full else 1,
        cosine=prepared.job.normalize == "cosine",
    )


def _heaviest(
    prepared: PreparedJob,
    backend: str,
    blocks: Sequence[ParameterBlock],
    structure: Structure,
    derivation: Derivation,
    rows: int,
) -> tuple[tuple[int, ...], float]:
    """Parameters with the largest mean squared gradients over a few samples, and their share of those squared.

    They are chosen by one half of the samples, which says nothing of their share; products of the means of both
    quarters of the other half are unbiased for the squares.
    """
    smallest = Projection("sjlt", SMALLEST_BLOCK * 4, backend=backend)
    projector = _projector(prepared, smallest, (), blocks, structure, derivation, rows, ())
    chosen = _spread(len(prepared.reader.train), HEAVY_SAMPLES)
    parts = [part for part in (chosen[::2], chosen[1::4], chosen[3::4]) if part]
    squares = [projector.squares(prepared, part, derivation.batch_size) for part in parts]
    first, second, third = squares[0], squares[len(squares) > 1], squares[-1 if len(squares) > 2 else 0]
    count = min(HEAVY, int((first > 0).sum()))
    found = first.topk(count).indices.sort().values
    total = float(second @ third)
    share = float(second[found] @ third[found]) / total if total > 0 else 0.0
    # Where they have little of it there is little to take off, and scaling it up would only add noise.
    return (tuple(found.tolist()), min(1.0, share)) if share >= SMALLEST_SHARE else ((), 0.0)


def _projector(
    prepared: PreparedJob,
    projection: Projection,
    structured: tuple[str, ...],
    blocks: Sequence[ParameterBlock],
    structure: Structure,
    derivation: Derivation,
    rows: int,
    heavy: tuple[int, ...],
) -> Projector:
    """What derives and projects a job's samples."""
    ruled = [name for block in blocks if block.source == "rule" for name in block.parameters]
    others = [name for block in blocks if block.source != "rule" for name in block.parameters]
    return Projector(
        prepared.function,
        projection,
        structured,
        (),
        Capture(prepared.function, structure, ruled, rows) if ruled else None,
        others,
        derivation.method,
        prepared.job.precision,
        heavy=heavy,
    )


def _spread(samples: int, count: int) -> list[int]:
    """Numbers of so many samples, spread evenly."""
    return sorted({round(part * (samples - 1) / max(1, count - 1)) for part in range(min(count, samples))})


def _timed(
    projection: Projection, backend: Backend, columns: int, batch: int, prepared: PreparedJob
) -> tuple[float, float]:
    """Seconds to project one Jacobian row of so many parameters, and to make R for one batch."""
    assert projection.dim is not None
    if not columns:
        return 0.0, 0.0
    like = next(iter(prepared.function.parameters.values()))
    count = min(max(2, batch), TIMED_ROWS)
    chunks = SketchChunks.of(prepared.device)
    if projection.about.sparse:
        size = min(columns, chunks.items)
        values = torch.ones(count, size, dtype=like.dtype, device=like.device)
        p = torch.arange(size, device=like.device)
        total = torch.zeros(count, projection.dim, dtype=torch.float64, device=like.device)
        table = backend.table(projection, p, ())
        first = torch.zeros(1, dtype=torch.int64, device=like.device)
        making = _seconds(lambda: backend.table_at(projection, 0, first, p, ()))
        adding = _seconds(lambda: backend.scatter(values, table, projection, total))
        # Few parameters go another way: what compiling that takes counts as planning's, not as the run's.
        backend.scatter(values[:, :1].contiguous(), backend.table(projection, p[:1], ()), projection, total)
        if chunks.table_bytes >= 8 * projection.nonzeros * columns:
            making = 0.0  # once, for all batches
        return adding / count * columns / size, making * columns / size
    dtype = tile_dtype(like)
    size = min(columns, max(1, chunks.tile_bytes // (projection.dim * dtype.itemsize)))
    values = torch.ones(count, size, dtype=like.dtype, device=like.device)
    p = torch.arange(size, device=like.device)
    tile = backend.tile(projection, p, dtype)
    making = _seconds(lambda: backend.tile(projection, p, dtype))
    parts = 1 if prepared.job.precision == "bf16" else FLOAT32_PARTS
    adding = _seconds(lambda: exact_product(values, tile, parts))
    return adding / count * columns / size, making * columns / size


def _timed_factors(
    projection: Projection, backend: Backend, factors: LayerFactors, rows: int, prepared: PreparedJob
) -> float:
    """Seconds to sketch one sample of a layer from its factors."""
    like = next(iter(prepared.function.parameters.values()))
    outer = Outer(0, factors.outputs, factors.inputs)
    sketch = Sketch(projection, {"weight": 0}, backend, {"weight": outer})
    samples = 2
    sketch.begin(samples, rows, like.device)
    inputs = torch.ones(samples, factors.positions * factors.inputs, dtype=like.dtype, device=like.device)
    gradients = torch.ones(samples, factors.positions, rows, factors.outputs, dtype=like.dtype, device=like.device)
    took = _seconds(lambda: sketch.add_factors("weight", (inputs, gradients), transposed=False))
    return took / samples


def _seconds(work: Callable[[], object]) -> float:
    """Best of a few timings, with the time until a device has done its work."""

    def whole() -> None:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return best_seconds(whole, budget_seconds=0.1)
