"""The kernel on disk: reads like an array, knows where it came from, and solves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numpy.typing import ArrayLike, DTypeLike, NDArray

from ooc_ntk.errors import IncompleteRunError, InputError, StorageError
from ooc_ntk.planning.plan import Plan
from ooc_ntk.storage.arrays import open_tile_array
from ooc_ntk.storage.directory import RunDirectory
from ooc_ntk.storage.manifest import Manifest

from .ridge import Solution, solve_ridge

if TYPE_CHECKING:
    import dask.array


class Kernel:
    """A finished kernel: (samples · entries) × (train samples · entries), train rows first, on disk.

    Attributes:
        path: the run directory.
        plan: the plan that made it.
    """

    def __init__(self, path: str | Path) -> None:
        """Open the kernel of a run directory.

        Args:
            path: the run directory.

        Raises:
            StorageError: if there is no run.
            IncompleteRunError: if the run is not finished.
        """
        self.path = Path(path)
        directory = RunDirectory(self.path)
        if not directory.holds_run:
            raise StorageError(f"{self.path} holds no run: there is no plan.json in it")
        self.plan = Plan.load(directory.plan_path)
        manifest = Manifest(self.path, read_only=True)
        try:
            last = len(self.plan.passes) - 1
            done = sum(key.startswith(f"kernel-{last}-") for key in manifest.receipts())
        finally:
            manifest.close()
        wanted = self.plan.sample_grid.kernel_tile_count
        if done < wanted:
            raise IncompleteRunError(
                f"the run in {self.path} is not finished: {done} of {wanted} kernel tiles are there; "
                "run the same command again to go on"
            )
        self._array = open_tile_array(self.path, "kernel.zarr")

    @property
    def zarr(self) -> zarr.Array[Any]:
        """The kernel as a read-only Zarr array; attributes hold its provenance."""
        return self._array

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (train then test samples, times entries) and columns (train samples, times entries)."""
        return self.plan.kernel_shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy dtype of the entries."""
        return np.dtype(self._array.dtype)

    @property
    def train_samples(self) -> int:
        """Number of train samples (N)."""
        return self.plan.train_samples

    @property
    def test_samples(self) -> int:
        """Number of test samples (M)."""
        return self.plan.test_samples

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> NDArray[Any]:
        """Entries, read from disk: slices and integers as in NumPy, index lists along both axes (orthogonal)."""
        return np.asarray(self._array.oindex[index] if _is_fancy(index) else self._array[index])

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """The whole kernel in memory."""
        if copy is False:
            raise ValueError("a kernel on disk cannot become an array without a copy")
        return np.asarray(self._array[:], dtype=dtype)

    def __repr__(self) -> str:
        rows, columns = self.shape
        return f"<Kernel {self.plan.kernel} {rows} × {columns} {self.dtype} in {self.path}>"

    def dask(self) -> dask.array.Array:
        """The kernel as a Dask array, one chunk per tile, nothing read yet."""
        import dask.array  # heavy, and only here

        return dask.array.from_array(self._array, chunks=self._array.chunks)  # type: ignore

    def diagonal(self) -> NDArray[np.float64]:
        """The diagonal of all samples, train then test, before normalisation.

        Returns:
            (samples · entries,) float64: squared Jacobian norms, scaled as the kernel is.
        """
        return np.asarray(open_tile_array(self.path, "diagonal")[:], dtype=np.float64)

    def solve(self, y: ArrayLike, ridge: float) -> Solution:
        """Kernel ridge regression on the train square: coefficients of ``(K + ridge·I) a = y``.

        Args:
            y: targets of the train rows, (train · entries,) or (train · entries, targets).
            ridge: absolute ridge, at least 0, added to the diagonal. No jitter is added silently.

        Returns:
            The coefficients, with the ridge's ratio to the mean diagonal and the residual.

        Raises:
            InputError: for targets of another length, a negative ridge, or a matrix that is not positive definite.
            BudgetError: if the train square does not fit in free memory.
        """
        return solve_ridge(self._array, self.shape[1], y, ridge)

    def predict(self, solution: Solution) -> NDArray[np.float64]:
        """Predictions of a ridge solution for the test rows, read tile row by tile row.

        Args:
            solution: what :meth:`solve` returned.

        Returns:
            (test · entries,) or (test · entries, targets) float64.

        Raises:
            InputError: if the run has no test rows.
        """
        rows, columns = self.shape
        if rows == columns:
            raise InputError("the run has no test rows to predict; give test data to the job")
        step = self._array.chunks[0]
        parts = [
            np.asarray(self._array[start : min(start + step, rows)], dtype=np.float64) @ solution.coefficients
            for start in range(columns, rows, step)
        ]
        return np.concatenate(parts)


def _is_fancy(index: Any) -> bool:
    """Whether an index holds lists or arrays, for which Zarr has its own indexer."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, list | np.ndarray) for part in parts)
