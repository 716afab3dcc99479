"""The peer TRAK (package traker): its projector for CPUs on gradients that it is given, and its store on disk.

Its ``BasicProjector`` makes the projection's signs in blocks of 100 columns, P × 100 of them at a time, for every batch
anew. Its CUDA projector is not compared: it needs a device and an extension compiled for it.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor

import ooc_ntk

from .table import relative_error

#: Columns of a block of signs, the default of TRAK's projector.
BLOCK_COLUMNS = 100

#: Blocks that are timed where all would take too long.
TIMED_BLOCKS = 2

#: How the projection that everything is compared with is called in tables.
SJLT = "ooc-ntk, sjlt"


@dataclass(frozen=True)
class Store:
    """Features of one projector at one dim, means over seeds.

    Attributes:
        name: of the projector.
        dim: columns.
        residual: relative Frobenius residual of the kernel as ``open_features`` reads it.
        predicted: what its error bars say.
        raw_residual: of the products of what was stored, as they are.
        scale: mean diagonal of those products over that of the exact kernel.
        sample_seconds: of projecting one sample with all its outputs, the best of the seeds.
    """

    name: str
    dim: int
    residual: float
    predicted: float
    raw_residual: float
    scale: float
    sample_seconds: float


@dataclass(frozen=True)
class BlockTiming:
    """Time of some blocks, scaled to all.

    Attributes:
        blocks: of the whole projection.
        timed: blocks that were timed.
        block_columns: columns of each.
        timed_seconds: of those, for the whole batch.
        sample_seconds: of all blocks, per sample.
    """

    blocks: int
    timed: int
    block_columns: int
    timed_seconds: float
    sample_seconds: float


def installed() -> bool:
    """Whether the package is there."""
    return importlib.util.find_spec("trak") is not None


def projector(parameters: int, dim: int, seed: int, block_columns: int = BLOCK_COLUMNS) -> Any:
    """TRAK's projector with signs, as its own documentation makes it for a CPU."""
    found = importlib.import_module("trak.projectors")
    kind = found.ProjectionType.rademacher
    return found.BasicProjector(parameters, dim, seed, kind, "cpu", block_size=block_columns)


def compare_stores(
    gradients: Tensor,
    exact: NDArray[np.float64],
    dim: int,
    seeds: int,
    folder: Path,
    ours: Mapping[str, Store],
) -> list[Store]:
    """Project gradients with TRAK, write them as TRAK does, and open the store.

    Args:
        gradients: (samples · outputs, parameters), all outputs of a sample next to each other.
        exact: the trace kernel, (samples, samples).
        dim: columns.
        seeds: projections.
        folder: for the stores.
        ours: by kind, what ooc-ntk has at this dim.

    Returns:
        TRAK's figures, then ours.
    """
    parameters, samples = gradients.shape[1], len(exact)
    outputs = len(gradients) // samples
    found = []
    for seed in range(seeds):
        made = projector(parameters, dim, seed)
        start = time.perf_counter()
        features = made.project(gradients, model_id=0)
        seconds = time.perf_counter() - start
        path = folder / f"trak-{dim}-{seed}.mmap"
        store = open_memmap(path, mode="w+", dtype=np.float32, shape=(len(gradients), dim))
        store[:] = (features / parameters**0.5).numpy()  # as TRAKer does before it saves
        store.flush()
        kernel = ooc_ntk.open_features(path, parameters=parameters, outputs=outputs)
        entries = np.asarray(kernel, dtype=np.float64)
        flat = store.reshape(samples, outputs * dim).astype(np.float64)
        raw = flat @ flat.T
        found.append(
            (
                relative_error(entries, exact),
                float(np.linalg.norm(kernel.errors()) / np.linalg.norm(entries)),
                relative_error(raw, exact),
                float(np.trace(raw) / np.trace(exact)),
                seconds / samples,
            )
        )
    figures = np.array(found)
    means = [float(value) for value in figures[:, :4].mean(0)]
    return [Store("TRAK BasicProjector", dim, *means, float(figures[:, 4].min())), *ours.values()]


def time_blocks(
    gradients: Tensor, samples: int, dim: int, make: Callable[[int, int, int, int], Any] = projector
) -> BlockTiming:
    """Time a few blocks of TRAK's projector, or of dattri's, on a batch and scale them to a whole projection.

    Every block makes P × 100 signs and multiplies once, whatever the number of blocks; the last one, if it is narrower,
    makes as many.

    Args:
        gradients: (samples · outputs, parameters).
        samples: number of samples.
        dim: columns of the whole projection.
        make: a projector from parameters, columns, seed and columns of a block.

    Returns:
        The time.
    """
    columns = min(BLOCK_COLUMNS, dim // TIMED_BLOCKS)
    blocks = math.ceil(dim / columns)
    # With a single block TRAK would keep its signs; two are made anew for each batch, as all 41 of 4,096 columns are.
    made = make(gradients.shape[1], TIMED_BLOCKS * columns, 0, columns)
    start = time.perf_counter()
    made.project(gradients, 0)
    seconds = time.perf_counter() - start
    return BlockTiming(blocks, TIMED_BLOCKS, columns, seconds, seconds * blocks / TIMED_BLOCKS / samples)
