"""What every kernel on disk answers by products with vectors alone; views, solvers and spectra build on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse.linalg import LinearOperator

from ooc_ntk.errors import InputError, unknown_name

from .entries import Entries
from .products import adjoint_product, rows_product, square_product

#: Which rows a product is formed of.
ROWS: Final = ("train", "test")


class MultipliedKernel(ABC):
    """What can be asked of a kernel on disk and of its views: nothing here holds the kernel in memory.

    Rows are train then test samples (times their entries), columns train samples; the train square is symmetric.
    """

    @property
    @abstractmethod
    def entries(self) -> Entries:
        """Where the entries come from."""

    @property
    @abstractmethod
    def samples(self) -> tuple[int, int]:
        """Train and test samples."""

    @abstractmethod
    def sample_diagonal(self) -> NDArray[np.float64]:
        """Entry of every row with itself, (rows,) float64, test rows included."""

    @property
    @abstractmethod
    def workspace(self) -> Path | None:
        """Folder for what is computed on disk and deleted after; None if there is none."""

    @property
    def identity(self) -> str:
        """Which kernel it is, and how it is seen; empty where that is not known."""
        return ""

    @property
    def data_digest(self) -> str:
        """Digest of the train and test samples that the kernel is of; empty where it is not known."""
        return ""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (train then test samples, times entries) and columns (train samples, times entries)."""
        return self.entries.shape

    @property
    def entries_per_sample(self) -> int:
        """Kernel rows of one sample: the outputs of a ``full`` kernel, otherwise 1."""
        return self.shape[1] // max(1, self.samples[0])

    def row_range(self, rows: str) -> range:
        """Rows of the train or the test samples.

        Raises:
            InputError: for another word, or where there are no test rows.
        """
        if rows not in ROWS:
            raise unknown_name("rows", rows, ROWS)
        height, width = self.shape
        if rows == "train":
            return range(width)
        if height == width:
            raise InputError("the run has no test rows; give test data to the job (--test)")
        return range(width, height)

    def matmat(self, x: ArrayLike, *, rows: str = "train", device: str = "cpu") -> NDArray[np.float64]:
        """The kernel times any number of vectors, by one pass: of the train square over its lower triangle alone.

        Tiles are read ahead in stripes while others are multiplied; float32 entries are multiplied and summed in
        float64. Only the vectors and a few stripes are held.

        Args:
            x: (train rows,) or (train rows, vectors).
            rows: ``train`` for the train square, ``test`` for the test rows.
            device: torch device that multiplies.

        Returns:
            (rows,) or (rows, vectors) float64.

        Raises:
            InputError: for vectors of another length.
            StorageError: if a tile cannot be read, or is not what was committed.
        """
        given = np.asarray(x, dtype=np.float64)
        if given.ndim not in (1, 2) or given.shape[0] != self.shape[1]:
            raise InputError(
                f"x must have {self.shape[1]:,} rows, one per train row of the kernel, got shape {given.shape}"
            )
        wanted = self.row_range(rows)
        vectors = given.reshape(len(given), -1)
        if rows == "train":
            found = square_product(self.entries, vectors, device)
        else:
            found = rows_product(self.entries, wanted, vectors, device)
        return found.reshape(len(wanted), *given.shape[1:])

    def operator(self, rows: str = "train", device: str = "cpu") -> LinearOperator:
        """The kernel as SciPy's linear operator, for its solvers; every product is a pass over the tiles.

        Args:
            rows: ``train`` for the (symmetric) train square, ``test`` for the test rows.
            device: torch device that multiplies.

        Returns:
            (rows, train rows) float64, with its adjoint.
        """

        def product(x: NDArray[Any]) -> NDArray[np.float64]:
            return self.matmat(x, rows=rows, device=device)

        def column(x: NDArray[Any]) -> NDArray[np.float64]:
            return product(np.asarray(x).reshape(-1))

        shape = (len(self.row_range(rows)), self.shape[1])
        if rows == "train":
            return LinearOperator(
                shape, matvec=column, rmatvec=column, matmat=product, rmatmat=product, dtype=np.float64
            )

        def adjoint(x: NDArray[Any]) -> NDArray[np.float64]:
            return adjoint_product(self.entries, self.row_range(rows), np.asarray(x, dtype=np.float64))

        def adjoint_column(x: NDArray[Any]) -> NDArray[np.float64]:
            return adjoint(np.reshape(x, (-1, 1)))[:, 0]

        return LinearOperator(
            shape, matvec=column, rmatvec=adjoint_column, matmat=product, rmatmat=adjoint, dtype=np.float64
        )
