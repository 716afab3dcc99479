"""How far projected kernels are from exact ones on real data, and what their own error bars say of it."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import ooc_ntk

from .projection_data import RealData
from .projection_records import Outcome, Residual
from .table import aligned, relative_error
from .tails import fit_tail

#: Standard errors on either side of an entry that hold the exact one with 95%, were the error normal.
BAR_WIDTH = 1.96

#: Share of the residuals that are above the quantile of the table: one of a thousand.
RARE = 1e-3

#: A kernel and its standard errors.
Pair = tuple[NDArray[np.float64], NDArray[np.float64]]


def measure_residuals(data: RealData, folder: Path, outcome: Outcome) -> None:
    """Compute exact and projected kernels of a data set and hold them against each other.

    Args:
        data: network, samples and sizes.
        folder: for run directories, which are removed as they have been read.
        outcome: takes records and tables.
    """
    for kernel in ("trace", "pseudo"):
        exact = ooc_ntk.run(data.job(kernel=kernel), folder / f"{data.name}-{kernel}", progress=False)
        wanted = np.asarray(exact, dtype=np.float64)
        roots = np.sqrt(exact.diagonal())
        references = {False: wanted, True: wanted / (roots[:, None] * roots[None])}
        found: dict[bool, list[Residual]] = {False: [], True: []}
        for kind in data.kinds:
            for dim in data.dims:
                print(f"{data.name}: {kernel} kernel, {kind}:{dim} …", file=sys.stderr, flush=True)
                pairs: dict[bool, list[Pair]] = {False: [], True: []}
                for seed in range(data.seeds):
                    projection = ooc_ntk.Projection(kind, dim, seed=seed)
                    for cosine, pair in projected(data.job(kernel=kernel, projection=projection)).items():
                        pairs[cosine].append(pair)
                for cosine, reference in references.items():
                    record = compare(data.name, kernel, cosine, projection, reference, pairs[cosine])
                    found[cosine].append(record)
        for cosine, records in found.items():
            outcome.residuals += records
            name = f"{kernel} kernel{', cosine' if cosine else ''}"
            lines = residual_table(records)
            for kind in data.kinds:
                mine = [record for record in records if record.kind == kind]
                if len(mine) > 1:
                    slope = log_slope([record.dim for record in mine], [np.mean(record.observed) for record in mine])
                    outcome.slopes[f"{data.name}, {name}, {kind}"] = slope
                    lines.append(f"  {kind}: observed residual falls as dim^{slope:.2f}")
            outcome.table(data.heading(name), lines)


def projected(job: ooc_ntk.Job) -> dict[bool, Pair]:
    """A projected kernel and its standard errors, as it is and (from the same features) cosine-normalised."""
    with tempfile.TemporaryDirectory(prefix="ooc-ntk-bench-") as folder:
        preferences = ooc_ntk.Preferences(features_only=True)
        plain = ooc_ntk.run(job, Path(folder) / "run", preferences=preferences, progress=False)
        cosine = ooc_ntk.Kernel.of_features(plain.path, replace(plain.features, cosine=True))
        return {
            flag: (np.asarray(each, dtype=np.float64), each.errors()) for flag, each in ((False, plain), (True, cosine))
        }


def compare(
    data: str,
    kernel: str,
    cosine: bool,
    projection: ooc_ntk.Projection,
    exact: NDArray[np.float64],
    found: Sequence[Pair],
) -> Residual:
    """Hold projected kernels of several seeds against the exact one.

    Args:
        data: name of the data.
        kernel: its name.
        cosine: whether all are normalised; their diagonals are then 1 and count for nothing.
        projection: kind and size.
        exact: (samples, samples).
        found: by seed the projected kernel and its standard errors.
    """
    pairs, others = np.triu_indices(len(exact), int(cosine)), np.triu_indices(len(exact), 1)
    observed, predicted, inside, absolute, relative = [], [], [], [], []
    for entries, errors in found:
        residual = np.abs(entries - exact)
        observed.append(relative_error(entries, exact))
        predicted.append(float(np.linalg.norm(errors) / np.linalg.norm(entries)))
        inside.append(float((residual <= BAR_WIDTH * errors)[pairs].mean()))
        absolute.append(residual[others])
        known = errors[others] > 0
        relative.append(residual[others][known] / errors[others][known])
    every = np.concatenate(absolute)
    return Residual(
        data,
        kernel,
        cosine,
        projection.kind,
        int(projection.dim or 0),
        tuple(observed),
        tuple(predicted),
        tuple(inside),
        float(np.quantile(every, 1 - RARE)) if cosine else None,
        fit_tail(every),
        fit_tail(np.concatenate(relative)),
    )


def log_slope(dims: Sequence[int], values: Sequence[float]) -> float:
    """Slope of a straight line through logarithms.

    >>> round(log_slope([1, 4, 16], [8.0, 4.0, 2.0]), 6)
    -0.5
    """
    return float(np.polyfit(np.log(dims), np.log(values), 1)[0])


def residual_table(records: Sequence[Residual]) -> list[str]:
    """Lines of a table of one kernel, a line per kind and dim."""
    cells = [("kind:dim", "observed", "predicted", "pred/obs", "in 95%", "99.9% |r|", "tail of |r|", "tail of |r|/SE")]
    for record in records:
        observed, predicted = np.mean(record.observed), np.mean(record.predicted)
        cells.append(
            (
                f"{record.kind}:{record.dim}",
                f"{observed:.4f}",
                f"{predicted:.4f}",
                f"{predicted / observed:.2f}",
                f"{np.mean(record.inside):.1%}",
                "–" if record.rare is None else f"{record.rare:.4f}",
                str(record.tail),
                str(record.standardised),
            )
        )
    return aligned(cells)
