"""The kernel as an operator: products with vectors, and views of it that are centred or of cosines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse.linalg import LinearOperator

from ooc_ntk.errors import InputError, unknown_name

from .entries import Entries, ViewEntries
from .krylov import TOLERANCE
from .products import rows_product, square_product

if TYPE_CHECKING:
    from .krylov import Progress
    from .spectrum import Spectrum

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

    def eigh(
        self,
        k: int | None = None,
        *,
        method: str = "auto",
        tolerance: float = TOLERANCE,
        memory: int | str | None = None,
        seed: int = 0,
        device: str = "cpu",
        advance: Callable[[Progress], None] | None = None,
    ) -> Spectrum:
        """Eigenpairs of the train square: all of them in memory, or the leading ones by products with blocks.

        ``krylov`` is randomised block Krylov (Musco and Musco 2015): block Lanczos from k + 10 random directions (at
        most 128) with full reorthogonalisation, restarted where the basis would exceed the memory; every step is one
        pass over the tiles. ``lobpcg`` is SciPy's, with two to three times as many passes. ``full`` is LAPACK's on the
        dense square in float64. ``auto`` is ``full`` where it fits and is small or much of it is wanted, otherwise
        ``krylov``. Of more than 118 eigenpairs, ``krylov`` may miss copies of one that is there more than 128 times.

        Args:
            k: leading eigenpairs; None for all.
            method: ``auto``, ``full``, ``krylov`` or ``lobpcg``.
            tolerance: a pair is done when ``‖K v − μ v‖`` is at most this share of μ, or rounding; μ is then no further
                off.
            memory: bytes that may be taken, as a number or ``"4GiB"``; None is 80% of what is free.
            seed: of the random start.
            device: torch device that multiplies.
            advance: told of the progress after each pass.

        Returns:
            The spectrum, which unpacks as ``values, vectors``, values descending. Where the passes do not suffice, it
            comes with a warning, and its residuals say how far it got.

        Raises:
            InputError: for a k that is not from 1 to n, or a wrong method or tolerance.
            BudgetError: if it does not fit the memory; says what would do.
            StorageError: if a tile cannot be read, or is not what was committed.
        """
        from .eigen import eigh  # SciPy's eigensolvers are imported when they are needed

        return eigh(
            self,
            k,
            method=method,
            tolerance=tolerance,
            memory=memory,
            seed=seed,
            device=device,
            advance=advance,
        )

    def cka(self, other: KernelOperator, *, centered: bool = True, check_data: bool = True) -> float:
        """Centred kernel alignment with another kernel of the same samples (Kornblith et al. 2019).

        ``⟨HKH, HLH⟩ / (‖HKH‖ ‖HLH‖)`` over the train squares, by one pass over both; their tiles may be of different
        sizes.

        Args:
            other: the other kernel: of another run, a layer, a view.
            centered: whether both are centred; otherwise ``⟨K, L⟩ / (‖K‖ ‖L‖)``.
            check_data: whether kernels of runs whose data differ are refused. Train and test data have one digest, so
                that runs with the same train and other test data differ, too.

        Returns:
            From 0 (of positive semi-definite kernels) to 1: the same up to a factor.

        Raises:
            InputError: for another number of rows, or a kernel that is zero.
            RunConflictError: for kernels of other data.
            StorageError: if a tile cannot be read, or is not what was committed.
        """
        from .alignment import cka

        return cka(self, other, centered=centered, check_data=check_data)

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

    @property
    def data_digest(self) -> str:
        """See :class:`KernelOperator`."""
        return self._kernel.data_digest

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
