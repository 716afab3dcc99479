"""Kernel ridge regression in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import scipy.linalg
import zarr
from numpy.typing import ArrayLike, NDArray

from ooc_ntk.compute.machine import free_host_bytes
from ooc_ntk.errors import BudgetError, InputError
from ooc_ntk.units import format_bytes

#: Share of the free memory that a factorisation may take.
MEMORY_SHARE: Final = 0.8


@dataclass(frozen=True)
class Solution:
    """Coefficients of a kernel ridge regression.

    Attributes:
        coefficients: (train,) or (train, targets) float64.
        ridge: the absolute ridge.
        ridge_ratio: the ridge over the mean diagonal of the train square.
        residual: relative residual ``‖(K + ridge·I) a − y‖ / ‖y‖``.
    """

    coefficients: NDArray[np.float64]
    ridge: float
    ridge_ratio: float
    residual: float


def solve_ridge(kernel: zarr.Array[Any], train: int, y: ArrayLike, ridge: float) -> Solution:
    """Solve ``(K + ridge·I) a = y`` by Cholesky in float64, in memory.

    Args:
        kernel: the kernel; its first ``train`` rows and all columns are the square.
        train: rows of the square.
        y: (train,) or (train, targets).
        ridge: at least 0.

    Returns:
        The solution.

    Raises:
        InputError: for targets of another length, a negative ridge, or a matrix that is not positive definite.
        BudgetError: if it does not fit in free memory.
    """
    targets = np.asarray(y, dtype=np.float64)
    if targets.ndim not in (1, 2) or targets.shape[0] != train:
        raise InputError(f"y must have {train} rows, one per train row of the kernel, got shape {targets.shape}")
    if not np.isfinite(targets).all():
        raise InputError("y holds NaN or infinity")
    if not ridge >= 0:
        raise InputError(f"ridge must be at least 0, got {ridge}")
    needed = 8 * train * train + 3 * targets.nbytes
    free = int(MEMORY_SHARE * free_host_bytes())
    if needed > free:
        raise BudgetError(
            f"solving {train} × {train} in memory needs {format_bytes(needed)}, {format_bytes(free)} are free to use; "
            "use fewer train samples or a machine with more memory"
        )
    # The lower triangle alone: entries that are computed on demand need not be symmetric to the last bit.
    matrix = np.zeros((train, train))
    step = kernel.chunks[0]
    for start in range(0, train, step):
        stop = min(start + step, train)
        matrix[start:stop, :stop] = kernel[start:stop, :stop]
    mean = float(matrix.diagonal().mean())
    matrix[np.diag_indices(train)] += ridge
    try:
        factor = scipy.linalg.cholesky(matrix, lower=True, overwrite_a=True, check_finite=False)
    except np.linalg.LinAlgError as error:
        raise InputError(
            f"K + {ridge:g}·I is not positive definite ({error}); raise the ridge, for example to "
            f"{1e-6 * (mean or 1.0):.3g}"
            + (" (a millionth of the mean diagonal)" if mean else "; the diagonal is zero")
        ) from error
    solution = scipy.linalg.cho_solve((factor, True), targets, check_finite=False)
    residual = targets - ridge * solution
    for start in range(0, train, step):
        stop = min(start + step, train)
        entries = np.tril(np.asarray(kernel[start:stop, :stop], dtype=np.float64), start)
        residual[start:stop] -= entries @ solution[:stop]
        residual[:stop] -= np.tril(entries, start - 1).T @ solution[start:stop]
    scale = float(np.linalg.norm(targets)) or 1.0
    return Solution(solution, float(ridge), _ratio(ridge, mean), float(np.linalg.norm(residual)) / scale)


def _ratio(ridge: float, mean: float) -> float:
    """The ridge over the mean diagonal, also of a kernel of zeros."""
    if mean:
        return float(ridge / mean)
    return float("inf") if ridge else 0.0
