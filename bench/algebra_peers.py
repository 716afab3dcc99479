"""Coefficients, largest eigenpairs and a GCV curve of one kernel on disk: ours, SciPy's and Dask's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray

import ooc_ntk
from ooc_ntk.compute.machine import limited_threads

from .contenders import OURS

#: What is asked for.
TASKS: Final = ("solve", "eigh", "gcv")

SCIPY, DASK = "SciPy, kernel in memory", "dask.array.linalg"

#: Rows of Dask's chunks at most.
CHUNK: Final = 1_000

#: What a contender does: from task, kernel, targets, number of eigenpairs and ridges to numbers.
Contender = Callable[[str, ooc_ntk.Kernel, NDArray[np.float64], int, Sequence[float]], NDArray[np.float64]]


def by_ours(
    task: str, kernel: ooc_ntk.Kernel, targets: NDArray[np.float64], count: int, ridges: Sequence[float]
) -> NDArray[np.float64]:
    """What the kernel itself answers."""
    if task == "solve":
        return np.asarray(kernel.solve(targets, ridges[0]).coefficients)
    if task == "eigh":
        return np.asarray(kernel.eigh(count).values)
    return np.asarray(kernel.gcv(targets, list(ridges)).gcv)


def by_scipy(
    task: str, kernel: ooc_ntk.Kernel, targets: NDArray[np.float64], count: int, ridges: Sequence[float]
) -> NDArray[np.float64]:
    """LAPACK on the whole matrix in float64; a GCV curve from one eigendecomposition, whatever the ridges."""
    matrix = np.asarray(kernel[: kernel.train_samples], dtype=np.float64)
    size = len(matrix)
    if task == "solve":
        matrix.flat[:: size + 1] += ridges[0]
        return np.asarray(scipy.linalg.cho_solve(scipy.linalg.cho_factor(matrix, overwrite_a=True), targets))
    if task == "eigh":
        values, _ = scipy.linalg.eigh(matrix, subset_by_index=(size - count, size - 1), overwrite_a=True)
        return np.asarray(values[::-1])
    values, vectors = scipy.linalg.eigh(matrix, overwrite_a=True)
    along = (vectors.T @ targets) ** 2
    curve = [
        ((ridge / (values + ridge)) ** 2 @ along).mean() / size / (ridge / (values + ridge)).mean() ** 2
        for ridge in ridges
    ]
    return np.array(curve)


def by_dask(
    task: str, kernel: ooc_ntk.Kernel, targets: NDArray[np.float64], count: int, ridges: Sequence[float]
) -> NDArray[np.float64]:
    """Dask's solver and its randomised singular values, a thread per task; it has nothing that gives a GCV curve.

    Raises:
        NotImplementedError: if it cannot.
    """
    import dask
    import dask.array as da

    if task == "gcv":
        raise NotImplementedError("refuses: no symmetric eigendecomposition and no diagonal of an inverse")
    size, workers = len(targets), torch.get_num_threads()
    edge = next(edge for edge in range(min(size, CHUNK), 0, -1) if not size % edge)
    matrix = kernel.dask()[:size].rechunk((edge, edge)).astype(np.float64)
    with limited_threads(1), dask.config.set(scheduler="threads", num_workers=workers):
        if task == "solve":
            ridged = matrix + ridges[0] * da.eye(size, chunks=edge)
            given = da.from_array(targets, chunks=(edge, targets.shape[1]))
            return np.asarray(da.linalg.solve(ridged, given, assume_a="pos").compute())
        _, values, _ = da.linalg.svd_compressed(matrix, count, n_power_iter=4, seed=0)
        return np.asarray(values.compute())


CONTENDERS: Final[dict[str, Contender]] = {OURS: by_ours, SCIPY: by_scipy, DASK: by_dask}
