"""The kernel as an operator: products with vectors, and views of it that are centred or of cosines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ooc_ntk.errors import InputError

from .entries import Entries, ViewEntries
from .neighbours import Neighbours, nearest
from .products import rows_product, square_product
from .regression import Regression
from .spectral import Spectral


class KernelOperator(Regression, Spectral):
    """What can be asked of a kernel on disk and of its views: nothing here holds the kernel in memory.

    Rows are train then test samples (times their entries), columns train samples; the train square is symmetric.
    """

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
        """See :class:`~ooc_ntk.algebra.multiplying.MultipliedKernel`."""
        return self._entries

    @property
    def samples(self) -> tuple[int, int]:
        """See :class:`~ooc_ntk.algebra.multiplying.MultipliedKernel`."""
        return self._kernel.samples

    @property
    def workspace(self) -> Path | None:
        """See :class:`~ooc_ntk.algebra.multiplying.MultipliedKernel`."""
        return self._kernel.workspace

    @property
    def identity(self) -> str:
        """See :class:`~ooc_ntk.algebra.multiplying.MultipliedKernel`."""
        return f"{self._kernel.identity}, {self._what}" if self._kernel.identity else ""

    @property
    def data_digest(self) -> str:
        """See :class:`~ooc_ntk.algebra.multiplying.MultipliedKernel`."""
        return self._kernel.data_digest

    def sample_diagonal(self) -> NDArray[np.float64]:
        """See :class:`~ooc_ntk.algebra.multiplying.MultipliedKernel`."""
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
