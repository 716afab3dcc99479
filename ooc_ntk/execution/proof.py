"""The proof: ``K v``, read tile by tile from the finished kernel, against ``J(Jᵀv)`` of a float64 model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from ooc_ntk.algebra.kernel import Kernel
from ooc_ntk.planning.plan import Plan
from ooc_ntk.storage.arrays import TileRows
from ooc_ntk.storage.directory import RunDirectory
from ooc_ntk.units import format_seconds

from .audit_features import FeatureReference
from .prepare import PreparedJob
from .products import FeatureProducts, JacobianProducts, directions_held
from .reference import Reference, plain_float64

#: A probe passes up to so many times the plan's tolerance. An error matrix E and a vector of independent random signs v
#: give ``E‖Ev‖² = ‖E‖_F²``, and no E spreads wider around it than one of rank one, whose ``‖Ev‖`` is above
#: ``t·‖E‖_F`` with probability 2·exp(−t²/2) at most (Hoeffding): 3e-8 for 6.
TIMES: Final = 6.0

#: What rounding leaves in an entry, over the root of both diagonal entries, by precision: where entries cancel, as
#: between samples that have little in common, it is more than the tolerance times the entry (float32: the contraction's
#: bound, DESIGN: run; bf16x3: two Gram matrices multiplied, each as far off as is emulated of tensor cores, see
#: compute/split.py; the others guessed in the same relation to their tolerances).
ROUNDING: Final = {"float32": 5e-7, "tf32": 2e-4, "bf16": 1e-3, "bf16x3": 1e-5, "float64": 1e-14}

#: Samples whose Jacobian rows are this much smaller than the root mean square count less than the others (a choice:
#: their entries are at most 1e-6 of the others', and may underflow).
SMALL: Final = 1e-3

#: Kernel rows that are judged together at least, so that one flipped ReLU is averaged (a choice).
BLOCK_ROWS: Final = 256

#: Columns of sparse features that are judged together.
BLOCK_COLUMNS: Final = 256

#: Bytes of kernel rows that are read at a time, in float64 (a choice).
PANEL_BYTES: Final = 2**23

#: Probe vectors of a whole proof: where one vector happens to cancel in a wrong tile, another does not.
WHOLE_VECTORS: Final = 2

#: Bytes that a batch may take at most (a choice: enough for processors to be busy).
BATCH_BYTES: Final = 2**27

#: Share of the time left that the next probe may be predicted to take.
SAFE_SHARE: Final = 0.8

#: A probe grows by this factor at most, and not by less than the other.
LARGEST_STEP, SMALLEST_STEP = 8.0, 1.5

#: Below this many seconds in all, forward mode would take longer to load than it saves (measured: 0.6 s).
QUICK_SECONDS: Final = 10.0


@dataclass(frozen=True)
class Probe:
    """One comparison.

    Attributes:
        name: of what.
        error: relative error of the worst block.
        allowed: what that block may have.
        detail: what took part.
    """

    name: str
    error: float
    allowed: float
    detail: str

    @property
    def passed(self) -> bool:
        """Whether the error is allowed; NaN is not."""
        return self.error <= self.allowed


@dataclass(frozen=True)
class Proof:
    """What probes of one choice of samples showed.

    Attributes:
        probes: the comparisons.
        rows: samples whose kernel rows took part.
        columns: samples whose kernel columns took part; 0 where only features were kept.
        coverage: entries (of features alone, samples) that took part over all.
        seconds: how long it took.
    """

    probes: tuple[Probe, ...]
    rows: int
    columns: int
    coverage: float
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every comparison passed."""
        return all(probe.passed for probe in self.probes)

    @property
    def worst(self) -> Probe:
        """The comparison that is nearest to its limit, or furthest above it."""
        return max(self.probes, key=lambda probe: np.nan_to_num(probe.error / probe.allowed, nan=np.inf))

    def __str__(self) -> str:
        """One line."""
        worst = self.worst
        return (
            f"{self.scope}, relative error {worst.error:.1e} (allowed {worst.allowed:.1e}), "
            f"{format_seconds(self.seconds)}"
        )

    @property
    def scope(self) -> str:
        """What took part, and how much of everything that is."""
        share = "all" if self.coverage == 1 else f"{100 * self.coverage:.2g}% of all"
        if not self.columns:
            return f"features of {self.rows:,} samples by float64 vjp, {share} samples"
        return f"{self.rows:,} × {self.columns:,} samples by float64 vjp/jvp, {share} entries"


class Prover:
    """Proves a finished kernel on chosen samples. Holds a float64 copy of the model; its memory goes with it."""

    def __init__(
        self,
        root: Path,
        plan: Plan,
        prepared: PreparedJob,
        seed: int,
        *,
        held: int | None = None,
        batch_bytes: int = BATCH_BYTES,
        seconds: float | None = None,
    ) -> None:
        """Copy the model and open the kernel.

        Args:
            root: run directory.
            plan: its plan.
            prepared: the job.
            seed: of samples and vectors.
            held: directions held at a time; None takes what fits in ``DIRECTION_BYTES``.
            batch_bytes: what a batch may take.
            seconds: how much time there is; None for any.
        """
        self._plan, self._prepared, self._seed = plan, prepared, seed
        self._kernel = Kernel(root)
        self._tiles = None if plan.features_only else TileRows(RunDirectory(root).files, "kernel.zarr")
        self._reference = Reference(prepared, plan)
        with plain_float64():
            self.sweep_bytes = self._reference.sweep_bytes(0)
            began = time.perf_counter()
            self._reference.scalars(0)  # once more: the first pass of anything takes several times as long
            self._forward_seconds = time.perf_counter() - began
        batch = max(1, min(plan.batch_size, min(batch_bytes, BATCH_BYTES) // max(1, self.sweep_bytes)))
        quick = seconds is not None and seconds < QUICK_SECONDS
        self._products = JacobianProducts(self._reference, plan, batch, held or directions_held(plan), quick=quick)
        self._features = None if plan.projection is None else FeatureProducts(self._kernel.features)
        roots = np.sqrt(np.maximum(self._kernel.diagonal(), 0.0)).reshape(plan.samples, plan.entries_per_sample)
        self._roots = roots
        floor = SMALL * float(np.sqrt(np.square(roots).mean())) or 1.0
        self._weights = 1 / np.maximum(roots, floor)

    def least_seconds(self) -> float:
        """What a probe of two rows and two columns is predicted to take, from one forward pass."""
        sweeps = 1 if self._plan.projection is not None else self._products.sweeps(1)
        return 14 * sweeps * self._forward_seconds  # two backward passes of 3, two double ones of 4

    def whole(self) -> Proof:
        """All rows and columns, with several vectors."""
        return self._prove(np.arange(self._plan.samples), np.arange(self._plan.train_samples), WHOLE_VECTORS)

    def some(self, size: int) -> Proof:
        """So many rows and columns, or all there are, chosen at random."""
        plan, random = self._plan, np.random.default_rng([self._seed, size])
        rows = np.sort(random.choice(plan.samples, min(size, plan.samples), replace=False))
        columns = np.sort(random.choice(plan.train_samples, min(size, plan.train_samples), replace=False))
        return self._prove(rows, columns, 1)

    def grown(self, seconds: float, largest: int, advance: Callable[[str], None] = lambda what: None) -> Proof:  # noqa: ARG005
        """Probes of growing size, up to ``largest`` rows and columns, as far as ``seconds`` are predicted to last.

        Returns:
            The last of them, which is the largest, or the first that failed.
        """
        began, size = time.perf_counter(), 2
        while True:
            advance(f"probing {size:,} × {size:,} samples")
            found = self.some(size)
            if not found.passed or size >= min(largest, self._plan.samples):
                break
            left = SAFE_SHARE * (seconds - (time.perf_counter() - began))
            # The first probe loads parts of torch, which the next one does not.
            took = min(found.seconds, self.least_seconds()) if size == 2 else found.seconds
            step = min(LARGEST_STEP, left / max(took, 1e-9))
            if step < SMALLEST_STEP:
                break
            size = min(largest, int(size * step))
        return found

    def _prove(self, rows: NDArray[np.int64], columns: NDArray[np.int64], vectors: int) -> Proof:
        plan, began = self._plan, time.perf_counter()
        random = np.random.default_rng([self._seed, len(rows), len(columns)])
        probes = []
        with plain_float64():
            if self._features is not None:
                probes.append(self._probe_features(rows, random))
            if self._tiles is not None:
                probes.append(self._probe_kernel(rows, columns, _signs(random, self._shape(columns, vectors))))
        coverage, width = len(rows) / plan.samples, 0
        if self._tiles is not None:
            coverage, width = coverage * len(columns) / plan.train_samples, len(columns)
        return Proof(tuple(probes), len(rows), width, coverage, time.perf_counter() - began)

    def _shape(self, columns: NDArray[np.int64], vectors: int) -> tuple[int, int, int]:
        return len(columns), self._plan.entries_per_sample, vectors

    def _probe_kernel(self, rows: NDArray[np.int64], columns: NDArray[np.int64], vectors: NDArray[np.float64]) -> Probe:
        """The kernel against what it is made of: gradients, or stored features.

        Both sides are divided by the roots of the diagonal, so that all samples count alike and rounding is alike in
        all entries, and blocks of rows are judged by themselves, so that a wrong tile is not lost in the norm of a
        large kernel.
        """
        plan, cosine = self._plan, self._plan.normalize is not None
        weights, roots = self._weights, self._roots
        inner = np.divide(1.0, roots, out=np.zeros_like(roots), where=roots > 0) if cosine else weights
        product = self._products if self._features is None else self._features
        wanted = inner[rows][:, :, None] * product(rows, columns, inner[columns][:, :, None] * vectors)
        outer = np.ones_like(weights) if cosine else weights
        natural = np.minimum(1.0, weights * roots)  # 1 but for samples that count less
        width, blocks = plan.entries_per_sample, self._blocks(rows)
        worst = (0.0, 0.0, 1.0)
        for block in blocks:
            some = rows[block]
            stored, norm = self._stored(some, columns, outer, vectors)
            difference = float(np.linalg.norm(stored - wanted[block].reshape(len(some) * width, -1)))
            difference /= vectors.shape[2] ** 0.5
            norm = max(norm, float(np.linalg.norm(wanted[block])) / vectors.shape[2] ** 0.5)
            rounding = ROUNDING[plan.precision] * float(
                np.linalg.norm(natural[some]) * np.linalg.norm(natural[columns])
            )
            allowed = TIMES * (plan.tolerance * norm + rounding)
            ratio = difference / allowed if allowed else float(difference > 0)
            if not ratio <= worst[0]:  # NaN is worst
                scale = norm or 1.0
                worst = (ratio, difference / scale, allowed / scale)
            if not np.isfinite(ratio):
                break
        name = "K v against J(Jᵀv)" if self._features is None else "K v against Φ(Φᵀv)"
        every = f"worst of {len(blocks)} blocks of rows: " if len(blocks) > 1 else ""
        times = f" with {vectors.shape[2]} vectors" if vectors.shape[2] > 1 else ""
        detail = (
            f"{len(rows):,} × {len(columns):,} samples{times}, {every}relative error {worst[1]:.1e}, allowed "
            f"{worst[2]:.1e}"
        )
        return Probe(name, worst[1], worst[2], detail)

    def _blocks(self, rows: NDArray[np.int64]) -> list[slice]:
        """Places of the rows that are judged together: whole row tiles of some height; all where few take part."""
        plan = self._plan
        if len(rows) < plan.samples:
            return [slice(0, len(rows))]
        tiles = -(-BLOCK_ROWS // (plan.tile_samples * plan.entries_per_sample))
        step = tiles * plan.tile_samples
        starts = list(range(0, max(1, len(rows) - step // 2), step))
        return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(rows)], strict=True)]

    def _stored(
        self,
        rows: NDArray[np.int64],
        columns: NDArray[np.int64],
        weights: NDArray[np.float64],
        vectors: NDArray[np.float64],
    ) -> tuple[NDArray[np.float64], float]:
        """``K v`` of some rows, and the norm of what took part, both weighted; a few rows are read at a time."""
        assert self._tiles is not None
        width = self._plan.entries_per_sample
        row_index, column_index = _entries(rows, width), _entries(columns, width)
        right = vectors.reshape(-1, vectors.shape[2])
        left_weights, right_weights = weights[rows].reshape(-1), weights[columns].reshape(-1)
        step = max(1, PANEL_BYTES // (8 * self._tiles.shape[1]))
        found, squares = np.empty((len(row_index), right.shape[1])), 0.0
        for start in range(0, len(row_index), step):
            part = slice(start, start + step)
            panel = self._tiles[row_index[part]]
            if len(column_index) < panel.shape[1]:
                panel = panel[:, column_index]
            entries = panel.astype(np.float64)
            entries *= left_weights[part][:, None]
            entries *= right_weights
            found[part] = entries @ right
            squares += float(np.vdot(entries, entries))
        return found, squares**0.5

    def _probe_features(self, samples: NDArray[np.int64], random: np.random.Generator) -> Probe:
        """A weighted sum of stored features against the projection, made anew, of the same sum of gradients."""
        plan, prepared = self._plan, self._prepared
        assert self._features is not None
        norms = self._weights[samples]
        if norms.shape[1] != plan.rows_per_sample:
            norms = np.repeat(norms, plan.rows_per_sample, axis=1)
        weights = norms * _signs(random, (len(samples), plan.rows_per_sample, 1))[:, :, 0]
        anew = FeatureReference(plan, prepared.function, 1, self._seed)
        (direction,) = self._products.pulled(samples, weights[:, :, None], [(None, 0)])
        anew.add(0, torch.cat([part.reshape(-1) for part in direction]).numpy()[None])
        del direction
        wanted = anew.found[0, 0]
        stored, scale = (values[anew.columns] for values in self._features.combined(samples, weights))
        worst = (-1.0, 0.0)
        for start in range(0, len(wanted), BLOCK_COLUMNS):
            part = slice(start, start + BLOCK_COLUMNS)
            norm = max(float(np.linalg.norm(scale[part])), float(np.linalg.norm(wanted[part]))) or 1.0
            error = float(np.linalg.norm(stored[part] - wanted[part])) / norm
            if not error <= worst[0]:
                worst = (error, norm)
            if not np.isfinite(error):
                break
        allowed = TIMES * plan.tolerance
        detail = (
            f"{len(samples):,} samples, {len(wanted):,} columns, relative error {worst[0]:.1e}, allowed {allowed:.1e}"
        )
        return Probe("Φᵀv against Rᵀ(Jᵀv)", worst[0], allowed, detail)


def _signs(random: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Independent numbers of random sign and mean square 1.

    Their sizes differ by up to three, so that in a tile of equal entries and even size they do not cancel exactly.
    """
    sizes = random.uniform(0.5, 1.5, shape) / (1 + 1 / 12) ** 0.5
    return np.asarray(random.choice([-1.0, 1.0], shape) * sizes)


def _entries(samples: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """Kernel rows of some samples."""
    found: NDArray[np.int64] = (samples[:, None] * width + np.arange(width)).reshape(-1)
    return found
