"""TRAK's attribution scores from features: ``φ(ΦᵀΦ + λ·I)⁻¹Φᵀ``, tile by tile (Park et al. 2023)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Final

import numpy as np
import scipy.linalg
import zarr
from numpy.typing import NDArray

from ooc_ntk.compute.machine import free_host_bytes
from ooc_ntk.errors import BudgetError, InputError
from ooc_ntk.storage.arrays import TileArray
from ooc_ntk.storage.local import LocalFiles
from ooc_ntk.units import format_bytes

from .features import Features

#: Rows and columns of a stored tile of scores (a choice: 4 MiB of float32).
TILE: Final = 1024

#: Share of the free memory that the dim × dim matrix and its factor may take.
MEMORY_SHARE: Final = 0.8


def attribution_scores(features: Features, ridge: float, root: Path, name: str) -> zarr.Array[Any]:
    """Score every sample against every train sample, into a Zarr array; nothing but dim × dim numbers is held.

    Args:
        features: of train and test samples; outputs of a sample are summed up.
        ridge: absolute, at least 0, added to ``ΦᵀΦ`` of the train samples.
        root: folder of the array.
        name: its name there; replaced if it is there.

    Returns:
        (samples, train samples) float32, test rows after train rows.

    Raises:
        InputError: for a full kernel, a negative ridge, or a matrix that is not positive definite.
        BudgetError: if dim × dim does not fit in free memory.
    """
    if features.full:
        raise InputError("attribution scores are one number per pair of samples; use kernel trace, pseudo or output:c")
    if not ridge >= 0:
        raise InputError(f"ridge must be at least 0, got {ridge}")
    needed, free = 8 * features.dim**2 + 2**28, int(MEMORY_SHARE * free_host_bytes())
    if needed > free:
        raise BudgetError(
            f"attribution holds {features.dim:,} × {features.dim:,} numbers, {format_bytes(needed)}; "
            f"{format_bytes(free)} are free to use: take a smaller dim"
        )
    factor = _factor(features, ridge)
    shape = (features.samples, features.train_samples)
    array = TileArray(LocalFiles(root), name, shape, (TILE, TILE), "<f4")
    _forget(root / name)
    array.create({"ridge": ridge, "sketch": features.sketch, "scores": "phi (Phi^T Phi + ridge I)^-1 Phi^T"})
    for top in range(0, shape[0], TILE):
        _write_rows(features, factor, array, range(top, min(top + TILE, shape[0])))
    return array.open()


def _write_rows(features: Features, factor: NDArray[np.float64], array: TileArray, rows: range) -> None:
    """Score one row of tiles, some samples at a time, and append them to the files of all its tiles."""
    width = array.shape[1]
    files = [array.files.stage(array.chunk_path((rows.start // TILE, number))) for number in range(-(-width // TILE))]
    try:
        for panel in _pieces(features, rows):
            left = _solved(features, factor, panel)
            for number, file in enumerate(files):
                stripe = np.full((len(panel), TILE), np.nan, dtype="<f4")
                start = number * TILE
                for columns in _pieces(features, range(start, min(start + TILE, width))):
                    right = features.read(columns).reshape(len(columns), -1)
                    stripe[:, columns.start - start : columns.stop - start] = left @ right.T
                file.append(stripe)
        for file in files:
            for _ in range(TILE - len(rows)):
                file.append(np.full(TILE, np.nan, dtype="<f4"))
            file.seal()
            file.publish()
    except BaseException:
        for file in files:
            file.discard()
        raise


def _factor(features: Features, ridge: float) -> NDArray[np.float64]:
    """Cholesky factor of ``ΦᵀΦ + λ·I`` of the train samples."""
    matrix = np.zeros((features.dim, features.dim))
    for panel in features.panels(features.train_samples):
        rows = features.read(panel).reshape(-1, features.dim).astype(np.float64)
        matrix += rows.T @ rows
    mean = float(matrix.diagonal().mean())
    singular = (
        f"ΦᵀΦ + {ridge:g}·I is not positive definite: there are fewer train rows than columns, or they depend on each "
        f"other; raise the ridge, for example to {1e-6 * (mean or 1.0):.3g}"
    )
    if ridge == 0 and features.train_samples * features.outputs < features.dim:
        # Rounding may let its factorisation pass.
        raise InputError(singular)
    matrix[np.diag_indices(features.dim)] += ridge
    try:
        found = scipy.linalg.cholesky(matrix, lower=True, overwrite_a=True, check_finite=False)
    except np.linalg.LinAlgError as error:
        raise InputError(singular) from error
    return np.asarray(found)


def _solved(features: Features, factor: NDArray[np.float64], panel: range) -> NDArray[np.float32]:
    """``φ(ΦᵀΦ + λ·I)⁻¹`` of some samples, (samples, outputs · dim)."""
    rows = features.read(panel).reshape(-1, features.dim).astype(np.float64)
    found = scipy.linalg.cho_solve((factor, True), rows.T, overwrite_b=True, check_finite=False).T
    return np.ascontiguousarray(found, dtype=np.float32).reshape(len(panel), -1)


def _pieces(features: Features, samples: range) -> list[range]:
    """A range of samples in pieces that are read at once."""
    step = len(next(features.panels()))
    return [range(start, min(start + step, samples.stop)) for start in range(samples.start, samples.stop, step)]


def _forget(folder: Path) -> None:
    """Delete scores that were there, and nothing else.

    Raises:
        InputError: if something else is there.
    """
    if not folder.exists():
        return
    try:
        scores = "scores" in zarr.open_array(folder, mode="r").attrs
    except (FileNotFoundError, ValueError, KeyError, OSError):
        scores = False
    if not scores:
        raise InputError(f"{folder} is there and holds no scores; choose another folder for them, nothing was changed")
    shutil.rmtree(folder)
