"""Part of the audit: randomly chosen entries, and the features behind them, recomputed by their definition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from ooc_ntk.algebra.kernel import Kernel
from ooc_ntk.errors import StorageError
from ooc_ntk.planning.plan import Plan

from .audit_features import FeatureReference
from .prepare import PreparedJob
from .reference import Reference, plain_float64

#: Recomputed entries that are kept for people to look at, chosen at random where there are more (a choice).
KEPT_ENTRIES: Final = 1000


@dataclass(frozen=True, eq=False)
class Compared:
    """Some recomputed entries beside the stored ones, each (entries,).

    Attributes:
        rows: of the kernel.
        columns: of the kernel.
        exact: float64, as recomputed.
        stored: float64, as they are in the kernel.
        standard_errors: float64, of a projected kernel what is predicted of ``stored − exact``; None of an exact one.
    """

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    exact: NDArray[np.float64]
    stored: NDArray[np.float64]
    standard_errors: NDArray[np.float64] | None = None

    def figures(self) -> dict[str, list[float] | None]:
        """Columns by name, in values that JSON has."""
        return {
            each.name: None if (found := getattr(self, each.name)) is None else found.tolist() for each in fields(self)
        }


@dataclass(frozen=True)
class Recomputed:
    """What recomputing some entries showed.

    Attributes:
        error: relative Frobenius error of the entries.
        entries: how many there are.
        layers_error: largest error of a layer's entries, relative to the whole kernel's; None if none are kept.
        features_error: of a projected kernel, relative error of the recomputed features.
        features: how many numbers of them.
        predicted: of a projected kernel, the relative error that its error bars predict.
        compared: some of the entries beside the stored ones.
    """

    error: float
    entries: int
    layers_error: float | None = None
    features_error: float = 0.0
    features: int = 0
    predicted: float | None = None
    compared: Compared | None = None


def recompute(root: Path, plan: Plan, prepared: PreparedJob, samples: int, seed: int) -> Recomputed:
    """Relative error of randomly chosen entries, and of the features behind them."""
    random = np.random.default_rng(seed)
    rows = np.sort(random.choice(plan.samples, min(samples, plan.samples), replace=False))
    among = [int(row) for row in rows if row < plan.train_samples][: samples // 2]
    others = random.permutation(np.setdiff1d(np.arange(plan.train_samples), among))[: samples - len(among)]
    columns = np.sort(np.concatenate([np.asarray(among, dtype=np.int64), others.astype(np.int64)]))
    reference = Reference(prepared, plan)
    features = None
    if plan.projection is not None:
        features = FeatureReference(plan, prepared.function, len(rows), seed)
    layers = dict.fromkeys(plan.layers, slice(0))
    layers.update({name: part for name, part in reference.layers().items() if name in layers})
    parts = np.zeros((len(layers), len(rows) * plan.entries_per_sample, len(columns) * plan.entries_per_sample))
    with plain_float64():
        expected = _reference_entries(reference, plan, rows, columns, features, list(layers.values()), parts)
    kernel = Kernel(root)
    entries = plan.entries_per_sample
    row_index = (rows[:, None] * entries + np.arange(entries)).reshape(-1)
    column_index = (columns[:, None] * entries + np.arange(entries)).reshape(-1)
    stored = np.asarray(kernel[row_index, column_index], dtype=np.float64)
    norm = float(np.linalg.norm(expected))
    error = float(np.linalg.norm(stored - expected))
    if not np.isfinite(error):
        raise StorageError("the recomputed entries are not finite; the model's float64 gradients overflow")
    errors = None if features is None else kernel.errors(row_index, column_index)
    compared = _compared(row_index, column_index, expected, stored, errors, random)
    found = Recomputed(error / norm if norm else error, int(expected.size), compared=compared)
    if plan.layers:
        mine = np.stack([np.asarray(kernel.layer(name)[row_index, column_index], np.float64) for name in layers])
        found = replace(found, layers_error=float(np.linalg.norm(mine - parts, axis=(1, 2)).max()) / (norm or 1.0))
    if features is None or errors is None:
        return found
    mine = kernel.features.read(rows)[:, :, features.columns].astype(np.float64)
    scale = float(np.linalg.norm(features.found)) or 1.0
    predicted = float(np.linalg.norm(errors))
    return replace(
        found,
        features_error=float(np.linalg.norm(mine - features.found)) / scale,
        features=int(mine.size),
        predicted=predicted / (norm or 1.0),
    )


def _compared(
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    exact: NDArray[np.float64],
    stored: NDArray[np.float64],
    errors: NDArray[np.float64] | None,
    random: np.random.Generator,
) -> Compared:
    """All recomputed entries, or some of many."""
    chosen = np.arange(exact.size)
    if exact.size > KEPT_ENTRIES:
        chosen = np.sort(random.choice(exact.size, KEPT_ENTRIES, replace=False))
    return Compared(
        rows=rows[chosen // len(columns)],
        columns=columns[chosen % len(columns)],
        exact=exact.reshape(-1)[chosen],
        stored=stored.reshape(-1)[chosen],
        standard_errors=None if errors is None else errors.reshape(-1)[chosen],
    )


def _reference_entries(
    reference: Reference,
    plan: Plan,
    rows: np.ndarray,
    columns: np.ndarray,
    features: FeatureReference | None,
    layers: Sequence[slice],
    parts: np.ndarray,
) -> np.ndarray:
    """Kernel entries by the definitions, in float64: (rows · entries, columns · entries).

    ``parts``, (layers, rows · entries, columns · entries), takes the same of every layer's columns.

    Row gradients are held for one output at a time, so memory is (rows + 1) · parameters · 8 bytes.
    """
    full = plan.kernel == "full"
    entries, outputs = plan.entries_per_sample, plan.rows_per_sample
    if plan.head is not None:  # by every output, whatever rows the engine derived
        outputs = plan.outputs
    result = np.zeros((len(rows), entries, len(columns), entries))
    row_norms, column_norms = np.zeros((len(rows), entries)), np.zeros((len(columns), entries))
    for c in range(outputs):
        held = torch.stack([reference.gradient(reference.scalars(int(row))[c]) for row in rows])
        row_norms[:, c if full else 0] += held.square().sum(1).numpy()
        if features is not None:
            features.add(c, held.numpy())
        for j, column in enumerate(columns):
            scalars = reference.scalars(int(column))
            for d in range(outputs) if full else (c,):
                gradient = reference.gradient(scalars[d])
                first, second = (c, d) if full else (0, 0)
                result[:, first, j, second] += (held @ gradient).numpy()
                for part, there in zip(parts, layers, strict=True):
                    part[first::entries, j * entries + second] += (held[:, there] @ gradient[there]).numpy()
                if c == d:
                    column_norms[j, d if full else 0] += float(gradient @ gradient)
    if plan.scale == "mean":
        result /= plan.outputs
        parts /= plan.outputs
    flat = result.reshape(len(rows) * entries, len(columns) * entries)
    if plan.normalize == "cosine":
        scale = plan.outputs if plan.scale == "mean" else 1
        left, right = np.sqrt(row_norms.reshape(-1) / scale), np.sqrt(column_norms.reshape(-1) / scale)
        flat = flat * np.divide(1, left, out=np.zeros_like(left), where=left > 0)[:, None]
        flat = flat * np.divide(1, right, out=np.zeros_like(right), where=right > 0)[None, :]
    return flat
