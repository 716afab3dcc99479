"""The kernel as an operator: products with vectors, and views of it that are centred or of cosines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse.linalg import LinearOperator

from ooc_ntk.errors import InputError, unknown_name
from ooc_ntk.planning.budget import Budget
from ooc_ntk.planning.solving import SolvePlan

from .entries import Entries, ViewEntries
from .gcv import PROBES, GcvCurve, gcv_curve
from .path import RidgePath, checked_ridges, solve_path
from .products import rows_product, square_product
from .ridge import ITERATIONS, Advance, Solution, SolveOptions, checked_ridge, checked_targets, solve_ridge

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
    @abstractmethod
    def workspace(self) -> Path | None:
        """Folder for what is computed on disk and deleted after; None if there is none."""

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

    def solve(
        self,
        y: ArrayLike,
        ridge: float,
        *,
        method: str = "auto",
        budget: Budget | None = None,
        tolerance: float | None = None,
        iterations: int = ITERATIONS,
        rank: int | None = None,
        seed: int = 0,
        workspace: str | Path | None = None,
        device: str = "cpu",
        advance: Advance | None = None,
    ) -> Solution:
        """Kernel ridge regression on the train square: coefficients of ``(K + ridge·I) a = y``.

        ``cholesky`` factorises in memory; ``cg`` solves for all targets at once by block conjugate gradients,
        preconditioned by randomly pivoted Cholesky (Díaz et al. 2023, arXiv 2304.12465), in a few passes over the
        tiles; ``tiles`` factorises on disk, for many targets. ``auto`` takes the fastest that fits;
        :meth:`plan_solve` shows what each would take.

        Args:
            y: targets of the train rows, (train · entries,) or (train · entries, targets).
            ridge: absolute ridge, at least 0, added to the diagonal. No jitter is added silently.
            method: ``auto``, ``cholesky``, ``cg`` or ``tiles``.
            budget: host memory of the whole process, and disk; a limit that is None takes 80% of what is free.
            tolerance: relative residual that ``cg`` goes on to; None is 1e-8, and 1e-10 of a float64 kernel.
            iterations: steps after which ``cg`` gives up.
            rank: columns of its preconditioner; None for as many as pay, 0 for none.
            seed: of the choice of these columns.
            workspace: folder for a factor on disk, deleted after; None is the run directory.
            device: torch device that multiplies in passes.
            advance: told what is being done, how much of it is done, and of how much.

        Returns:
            The coefficients, with the ridge's ratio to the mean diagonal, the residual and the iterations.

        Raises:
            InputError: for targets of another length or that are not finite, a negative ridge, a matrix that is not
                positive definite (says the smallest ridge that would do), or where ``cg`` does not converge.
            BudgetError: if no method fits.
            StorageError: if a tile cannot be read, or is not what was committed.
        """
        options = SolveOptions(
            method=method,
            tolerance=tolerance,
            iterations=iterations,
            rank=rank,
            seed=seed,
            budget=budget,
            workspace=self.workspace if workspace is None else Path(workspace),
            device=device,
            advance=advance,
        )
        return solve_ridge(self.entries, self._targets(y), checked_ridge(ridge), options)

    def ridge_path(
        self,
        y: ArrayLike,
        ridges: ArrayLike,
        *,
        method: str = "auto",
        budget: Budget | None = None,
        tolerance: float | None = None,
        iterations: int = ITERATIONS,
        rank: int | None = None,
        seed: int = 0,
        device: str = "cpu",
        advance: Advance | None = None,
    ) -> RidgePath:
        """Ridge regressions with several ridges, from one spectrum, or with one preconditioner and shared passes.

        Args:
            y: as for :meth:`solve`.
            ridges: absolute ridges.
            method: ``spectrum`` (all eigenpairs, in memory), ``cg``, or ``auto``: the spectrum where it fits and has at
                most 11,000 rows.
            budget: as for :meth:`solve`, like the others.
            tolerance: relative residual.
            iterations: steps after which ``cg`` gives up.
            rank: columns of the preconditioner.
            seed: of their choice.
            device: torch device that multiplies in passes.
            advance: told what is being done.

        Returns:
            The solutions, in the order of the ridges; index it for one.

        Raises:
            InputError: as :meth:`solve`.
            BudgetError: if the spectrum is asked for and does not fit.
        """
        options = SolveOptions(method, tolerance, iterations, rank, seed, budget, None, device, advance)
        return solve_path(self.entries, self._targets(y), checked_ridges(ridges), options)

    def gcv(
        self,
        y: ArrayLike,
        ridges: ArrayLike,
        *,
        method: str = "auto",
        probes: int = PROBES,
        budget: Budget | None = None,
        tolerance: float | None = None,
        iterations: int = ITERATIONS,
        rank: int | None = None,
        seed: int = 0,
        device: str = "cpu",
        advance: Advance | None = None,
    ) -> GcvCurve:
        """Generalised cross-validation and leave-one-out over a grid of ridges (Wei et al. 2022, arXiv 2203.06176).

        Exact from the spectrum where it fits. Otherwise traces come from random probes, whose systems share the passes
        of the targets, with 95% error bars.

        Args:
            y: as for :meth:`solve`.
            ridges: absolute ridges.
            method: as for :meth:`ridge_path`.
            probes: random vectors of signs; three times as many samples are left out.
            budget: as for :meth:`solve`, like the others.
            tolerance: relative residual.
            iterations: steps after which ``cg`` gives up.
            rank: columns of the preconditioner.
            seed: of probes and columns.
            device: torch device that multiplies in passes.
            advance: told what is being done.

        Returns:
            The curve: ``.gcv``, ``.loo``, ``.train``, ``.effective_dimension``, each with its error; ``.best_ridge``
            and its ``.solution``.

        Raises:
            InputError: as :meth:`solve`.
            BudgetError: if the spectrum is asked for and does not fit.
        """
        options = SolveOptions(method, tolerance, iterations, rank, seed, budget, None, device, advance)
        return gcv_curve(self.entries, self._targets(y), checked_ridges(ridges), options, probes)

    def _targets(self, y: ArrayLike) -> NDArray[np.float64]:
        return checked_targets(y, self.shape[1], self.entries_per_sample)

    def plan_solve(self, targets: int = 1, *, ridge: float = 1.0, budget: Budget | None = None) -> SolvePlan:
        """What every way of solving would take in memory, disk and time, and which one ``solve`` would take.

        Args:
            targets: right-hand sides.
            ridge: without one nothing preconditions conjugate gradients.
            budget: as for :meth:`solve`.

        Returns:
            The prices; ``print`` shows them.

        Raises:
            BudgetError: if no method fits.
        """
        return SolveOptions(budget=budget, workspace=self.workspace).plan(self.entries, targets, ridge)

    def predict(self, solution: Solution, *, rows: str = "test", device: str = "cpu") -> NDArray[np.float64]:
        """Predictions of a ridge solution, read tile by tile.

        Args:
            solution: what :meth:`solve` returned.
            rows: ``test``, or ``train`` for the fit.
            device: torch device that multiplies.

        Returns:
            (rows,) or (rows, targets) float64.

        Raises:
            InputError: if the run has no test rows.
        """
        return self.matmat(solution.coefficients, rows=rows, device=device)

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
    def workspace(self) -> Path | None:
        """See :class:`KernelOperator`."""
        return self._kernel.workspace

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
