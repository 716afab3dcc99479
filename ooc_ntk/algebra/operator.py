"""The kernel as an operator: products with vectors, and views of it that are centred or of cosines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse.linalg import LinearOperator

from ooc_ntk.errors import InputError, unknown_name

from .entries import Entries, ViewEntries
from .neighbours import Neighbours, nearest
from .products import rows_product, square_product

#: Which rows a product is formed of.
ROWS: Final = ("train", "test")


class KernelOperator(ABC):
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
            (rows, train rows) float64; of the train square with the adjoint.
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
        return LinearOperator(shape, matvec=column, matmat=product, dtype=np.float64)

    def nearest(self, k: int = 5, *, by: str = "kernel", rows: str = "test", backend: str = "exact") -> Neighbours:
        """The most similar train samples of every test sample: exact, by one pass over the test rows.

        Of equal entries the smaller number comes first, whatever the tiles are. By ``kernel``, samples with large
        gradients are near to many; by ``cosine`` lengths do not count.

        Args:
            k: neighbours of each sample, at least 1.
            by: ``kernel`` for the largest entries, ``cosine`` for the largest cosines ``K_ij / √(K_ii K_jj)``.
            rows: ``test``, or ``train`` for the neighbours of the train samples, which are not their own.
            backend: ``exact`` reads entries, of features computes them; ``faiss`` searches the projected features in
                memory (extra ``faiss``; see :func:`~ooc_ntk.algebra.faiss_search.search_features` for when it pays).

        Returns:
            Their numbers and values, (rows, k), the nearest first.

        Raises:
            InputError: for a k out of range, an unknown word, a full kernel, a run without test rows; with ``faiss``
                for an exact kernel, a view, or if FAISS is not installed.
            BudgetError: if the neighbours, or the features that FAISS holds, do not fit in memory.
            StorageError: if a tile cannot be read, or is not what was committed.
        """
        return nearest(self, k, by=by, rows=rows, backend=backend)

    def centered(self) -> KernelView:
        """The kernel centred in feature space, ``H K H`` with ``H = I − 1 1ᵀ/n`` over the train rows, without a copy.

        Test rows are centred by the means of the train samples, as scikit-learn's ``KernelCenterer`` does. One pass
        finds the means.
        """
        if isinstance(self, KernelView) and self.entries.means is not None:
            return self
        ones = np.full((self.shape[1], 1), 1.0 / self.shape[1])
        means = [square_product(self.entries, ones)]
        if self.shape[0] > self.shape[1]:
            means.append(rows_product(self.entries, self.row_range("test"), ones))
        base, scale = _base_and_scale(self)
        return KernelView(self, ViewEntries(base, scale, np.concatenate(means)[:, 0]), "centred")

    def cosine(self) -> KernelView:
        """The kernel of cosines ``K_ij / √(K_ii K_jj)``, 0 where a diagonal entry is 0, without a copy.

        Raises:
            InputError: for a centred view; take the cosine first.
        """
        base, scale = _base_and_scale(self)
        if isinstance(self, KernelView):
            if self.entries.means is not None:
                raise InputError("take the cosine first and centre it then: kernel.cosine().centered()")
            return self
        diagonal = self.sample_diagonal()
        scale = np.divide(1.0, np.sqrt(np.maximum(diagonal, 0.0)), out=np.zeros_like(diagonal), where=diagonal > 0)
        return KernelView(self, ViewEntries(base, scale, None), "cosines")


class KernelView(KernelOperator):
    """A kernel seen centred, or as cosines; it answers what the kernel answers, and nothing is copied."""

    def __init__(self, kernel: KernelOperator, entries: ViewEntries, what: str) -> None:
        """View a kernel."""
        self._kernel, self._entries, self._what = kernel, entries, what

    @property
    def entries(self) -> ViewEntries:
        """See :class:`KernelOperator`."""
        return self._entries

    @property
    def samples(self) -> tuple[int, int]:
        """See :class:`KernelOperator`."""
        return self._kernel.samples

    def sample_diagonal(self) -> NDArray[np.float64]:
        """See :class:`KernelOperator`."""
        found, entries = self._kernel.sample_diagonal(), self._entries
        if entries.scale is not None and not isinstance(self._kernel, KernelView):
            found = found * entries.scale**2
        if entries.means is None:
            return found
        return found - 2 * entries.means + float(entries.means[: self.shape[1]].mean())

    def __getitem__(self, index: Any) -> NDArray[np.float64]:
        """Whole rows: an integer, a slice or a list of numbers, then columns as in NumPy."""
        parts = index if isinstance(index, tuple) else (index,)
        numbers = np.arange(self.shape[0])[parts[0]]
        found = self._entries.rows(np.atleast_1d(numbers).astype(np.int64))
        found = found if np.ndim(numbers) else found[0]
        return np.asarray(found[(..., *parts[1:])])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """The whole view in memory."""
        if copy is False:
            raise ValueError("a kernel on disk cannot become an array without a copy")
        return np.asarray(self[:], dtype=dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<KernelView {self._what} of {self._kernel!r}>"


def _base_and_scale(kernel: KernelOperator) -> tuple[Entries, NDArray[np.float64] | None]:
    """Entries below a view, and what they are scaled by."""
    if isinstance(kernel, KernelView):
        return kernel.entries.base, kernel.entries.scale
    return kernel.entries, None
