"""The audit: prove a finished kernel without trusting the engine that made it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from ooc_ntk.algebra.features import Features
from ooc_ntk.algebra.kernel import Kernel
from ooc_ntk.algebra.layers import LAYERS
from ooc_ntk.errors import StorageError
from ooc_ntk.planning.plan import Plan
from ooc_ntk.planning.tiles import Range
from ooc_ntk.storage.arrays import open_tile_array
from ooc_ntk.storage.directory import RunDirectory
from ooc_ntk.storage.files import Files
from ooc_ntk.storage.manifest import Manifest

from .prepare import PreparedJob
from .proof import Proof, Prover
from .recompute import Compared, Recomputed, recompute

#: Samples whose rows, and columns, are recomputed by default: 8 × 8 entries (a choice: seconds for a small network).
AUDITED_SAMPLES: Final = 8

#: A projected kernel passes if its residual is at most so many times the predicted one: all entries share R, so that
#: their errors are large together or small together (a choice; on two small networks the largest of 200 seeds was 4.0).
RESIDUAL_TIMES: Final = 6.0


#: Samples whose rows, and columns, take part in a probe by default, if so many seconds last (a choice).
PROBED_SAMPLES: Final = 64
PROBE_SECONDS: Final = 10.0

#: Kernel tiles whose layers are added up (a choice: every layer's tile is read).
SUMMED_TILES: Final = 16

#: Each layer's kernel is rounded once to what is stored, and so is their sum.
LAYERS_TOLERANCE: Final = 1e-6


@dataclass(frozen=True)
class Check:
    """One part of an audit.

    Attributes:
        name: what was checked.
        passed: whether it held.
        detail: figures, or what is wrong.
    """

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Audit:
    """The outcome of an audit.

    Attributes:
        checks: every check, in order.
        relative_error: relative Frobenius error of the recomputed entries; None if none were recomputed.
        entries: number of recomputed entries.
        coverage: recomputed entries over all entries.
        tolerance: the plan's tolerance.
        predicted_error: of a projected kernel, the error that its error bars predict of these entries.
        proof: what matrix-free probes showed, None if there were none.
        compared: some of the recomputed entries beside the stored ones; None if none were recomputed.
    """

    checks: tuple[Check, ...]
    relative_error: float | None
    entries: int
    coverage: float
    tolerance: float
    predicted_error: float | None = None
    proof: Proof | None = None
    compared: Compared | None = None

    @property
    def passed(self) -> bool:
        """Whether every check held."""
        return all(check.passed for check in self.checks)


def audit(
    root: Path,
    plan: Plan,
    prepared: PreparedJob | None,
    samples: int = AUDITED_SAMPLES,
    seed: int = 0,
    advance: Callable[[str], None] = lambda what: None,  # noqa: ARG005
    *,
    full: bool = False,
) -> Audit:
    """Check a finished run: checksums, structure, entries recomputed in float64, and matrix-free probes.

    Args:
        root: run directory.
        plan: its plan.
        prepared: the job, for recomputing entries; None leaves that out.
        samples: samples whose rows and columns are recomputed.
        seed: of the choice of samples.
        advance: told what is being checked.
        full: whether all rows and columns take part in the probe; otherwise some, chosen at random.

    Returns:
        The outcome.
    """
    advance("checksums")
    files = RunDirectory(root).files
    checks = [_checksums(root, files)]
    if checks[0].passed:
        advance("structure")
        if plan.projection is not None:
            checks.append(_finite_features(Kernel(root).features))
        if not plan.features_only:
            checks.extend(_structure(files, plan))
        if plan.layers:
            checks.append(_layers_add_up(files, plan, seed))
    found: Recomputed | None = None
    proof: Proof | None = None
    if prepared is not None and all(check.passed for check in checks):
        advance("recomputing entries in float64")
        found = recompute(root, plan, prepared, samples, seed)
        checks.extend(_judged(plan, found))
        proof = _probed(root, plan, prepared, seed, advance, full=full)
        checks.extend(Check(probe.name, probe.passed, probe.detail) for probe in proof.probes)
    rows, columns = plan.kernel_shape
    if found is None:
        return Audit(tuple(checks), None, 0, 0.0, plan.tolerance)
    coverage = found.entries / (rows * columns)
    return Audit(
        tuple(checks), found.error, found.entries, coverage, plan.tolerance, found.predicted, proof, found.compared
    )


def _probed(
    root: Path, plan: Plan, prepared: PreparedJob, seed: int, advance: Callable[[str], None], *, full: bool
) -> Proof:
    """Matrix-free probes of everything, or of some samples within some seconds."""
    if full:
        advance(f"probing all {plan.samples:,} × {plan.train_samples:,} samples")
        return Prover(root, plan, prepared, seed).whole()
    return Prover(root, plan, prepared, seed, seconds=PROBE_SECONDS).grown(PROBE_SECONDS, PROBED_SAMPLES, advance)


def _judged(plan: Plan, found: Recomputed) -> list[Check]:
    """Verdicts on recomputed entries."""
    if found.predicted is None:
        checks = [
            Check(
                "entries recomputed in float64",
                found.error <= plan.tolerance,
                f"{found.entries} entries, relative error {found.error:.1e}, tolerance {plan.tolerance:.0e}",
            )
        ]
        if found.layers_error is not None:
            checks.append(
                Check(
                    "layers recomputed in float64",
                    found.layers_error <= plan.tolerance,
                    f"{found.entries} entries of each of {len(plan.layers)} layers, largest error "
                    f"{found.layers_error:.1e} of the kernel's norm",
                )
            )
        return checks
    return [
        Check(
            "features recomputed in float64",
            found.features_error <= plan.tolerance,
            f"{found.features:,} numbers, relative error {found.features_error:.1e}, tolerance {plan.tolerance:.0e}",
        ),
        Check(
            "residual of the projection",
            found.error <= RESIDUAL_TIMES * found.predicted + plan.tolerance,
            f"{found.entries} exact entries, relative residual {found.error:.2%}, predicted {found.predicted:.2%}",
        ),
    ]


def _finite_features(features: Features) -> Check:
    """Every feature is a number."""
    bad, count = 0, 0
    for panel in features.panels():
        values = features.read(panel)
        bad, count = bad + int((~np.isfinite(values)).sum()), count + values.size
    return Check("finite features", bad == 0, f"{count:,} numbers" if not bad else f"{bad:,} are NaN or infinite")


def _checksums(root: Path, where: Files) -> Check:
    """Every committed file against its checksum."""
    manifest = Manifest(root, where, read_only=True)
    try:
        files = manifest.files()
        damage = manifest.damage(thorough=True)
    finally:
        manifest.close()
    if damage.reasons:
        with suppress(StorageError):  # a read-only copy can be verified too
            manifest = Manifest(root)
            manifest.distrust(damage.reasons)
            manifest.close()
        shown = "; ".join(f"{path} {reason}" for path, reason in list(damage.reasons.items())[:5])
        more = f" and {len(damage.reasons) - 5} more" if len(damage.reasons) > 5 else ""
        return Check("checksums", False, f"{shown}{more}; 'ooc-ntk run' computes them again")
    return Check("checksums", True, f"{len(files)} files")


def _structure(where: Files, plan: Plan) -> list[Check]:
    """Finite entries, symmetry of the train square, positive diagonal, tile by tile."""
    kernel, diagonal = open_tile_array(where, "kernel.zarr"), open_tile_array(where, "diagonal")
    grid, entries = plan.sample_grid, plan.entries_per_sample
    bad, worst, checked = 0, 0.0, 0
    diagonal_error = 0.0
    diagonals = np.asarray(diagonal[:])
    for i, j in grid.kernel_tiles():
        rows, columns = grid.rows(i), grid.columns(j)
        tile = np.asarray(kernel[_times(rows, entries), _times(columns, entries)])
        bad += int((~np.isfinite(tile)).sum())
        checked += tile.size
        train = grid.mirror_rows(i) * entries
        if train:
            start = rows.start * entries
            other = np.asarray(kernel[_times(columns, entries), start : start + train])
            bad += int((~np.isfinite(other)).sum())
            with np.errstate(invalid="ignore"):
                worst = max(worst, float(np.abs(tile[:train] - other.T).max(initial=0.0)))
        if i == j and plan.normalize is None:
            mine = tile.diagonal()
            stored = diagonals[rows.start * entries :][: mine.size]
            scale = float(np.abs(stored).max(initial=0.0)) or 1.0
            diagonal_error = max(diagonal_error, float(np.abs(mine - stored).max(initial=0.0)) / scale)
    negative = int((diagonals < 0).sum() + (~np.isfinite(diagonals)).sum())
    return [
        Check("finite entries", bad == 0, f"{checked:,} entries" if bad == 0 else f"{bad:,} are NaN or infinite"),
        Check("symmetry", worst == 0.0, "exact" if worst == 0.0 else f"entries differ by up to {worst:.1e}"),
        Check(
            "diagonal",
            negative == 0 and diagonal_error <= max(plan.tolerance, 1e-6 if plan.precision != "float64" else 0.0),
            f"{diagonals.size:,} entries, none negative, {diagonal_error:.1e} from the stored one"
            if negative == 0
            else f"{negative} entries are negative or not finite",
        ),
    ]


def _layers_add_up(where: Files, plan: Plan, seed: int) -> Check:
    """Whether the layers' kernels add up to the kernel, in some tiles, and none of them holds a missing entry."""
    grid, entries = plan.sample_grid, plan.entries_per_sample
    tiles = list(grid.kernel_tiles())
    random = np.random.default_rng(seed)
    chosen = [tiles[index] for index in sorted(random.permutation(len(tiles))[:SUMMED_TILES])]
    kernel, layers = open_tile_array(where, "kernel.zarr"), open_tile_array(where, LAYERS)
    worst, bad = 0.0, 0
    for i, j in chosen:
        rows, columns = _times(grid.rows(i), entries), _times(grid.columns(j), entries)
        wanted = np.asarray(kernel[rows, columns], dtype=np.float64)
        total = np.zeros_like(wanted)
        for layer in range(layers.shape[0]):
            part = np.asarray(layers[layer, rows, columns], dtype=np.float64)
            bad += int((~np.isfinite(part)).sum())
            total += part
        norm = float(np.linalg.norm(wanted)) or 1.0
        worst = max(worst, float(np.linalg.norm(total - wanted)) / norm)
    return Check(
        "layers add up",
        bad == 0 and worst <= LAYERS_TOLERANCE,
        f"{layers.shape[0]} layers, {len(chosen)} of {len(tiles)} tiles, within {worst:.1e}"
        if bad == 0
        else f"{bad:,} entries are NaN or infinite",
    )


def _times(samples: Range, entries: int) -> slice:
    """Kernel rows of a range of samples."""
    return slice(samples.start * entries, samples.stop * entries)
