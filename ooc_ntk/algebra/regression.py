"""Ridge and logistic regression with a kernel on disk, as methods of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ooc_ntk.errors import InputError
from ooc_ntk.planning.budget import Budget
from ooc_ntk.planning.solving import SolvePlan

from .gcv import PROBES, GcvCurve, gcv_curve
from .logistic import MAX_ITERATIONS, TOLERANCE, LogisticSolution, solve_logistic
from .multiplying import MultipliedKernel
from .path import DenseSpectrum, RidgePath, checked_ridges, solve_path
from .ridge import ITERATIONS, Advance, Solution, SolveOptions, checked_ridge, checked_targets
from .solvers import solve_ridge

if TYPE_CHECKING:
    from .spectrum import Spectrum


class Regression(MultipliedKernel):
    """What a kernel answers about targets of its train rows."""

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
        found = solve_ridge(self.entries, self._targets(y), checked_ridge(ridge), options)
        return replace(found, kernel=self.identity)

    def ridge_path(
        self,
        y: ArrayLike,
        ridges: ArrayLike,
        *,
        method: str = "auto",
        spectrum: Spectrum | None = None,
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
            spectrum: all eigenpairs of this kernel, where they are known (:meth:`eigh`).
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
        known = self._dense(spectrum)
        return self._named(solve_path(self.entries, self._targets(y), checked_ridges(ridges), options, None, known))

    def gcv(
        self,
        y: ArrayLike,
        ridges: ArrayLike,
        *,
        method: str = "auto",
        spectrum: Spectrum | None = None,
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

        Exact from the spectrum where it fits. Of a centred view an intercept is refitted, of a full kernel a sample is
        left out with all its rows; ridges that do not make the kernel positive definite are left out (``.dropped``).
        Otherwise traces come from random probes, whose systems share the passes
        of the targets, with 95% error bars.

        Args:
            y: as for :meth:`solve`.
            ridges: absolute ridges.
            method: as for :meth:`ridge_path`.
            spectrum: as for :meth:`ridge_path`.
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
        rows, known = self.entries_per_sample, self._dense(spectrum)
        found = gcv_curve(self.entries, self._targets(y), checked_ridges(ridges), options, probes, rows, known)
        return replace(found, path=self._named(found.path))

    def _named(self, path: RidgePath) -> RidgePath:
        """A path whose solutions say which kernel they are of."""
        return replace(path, solutions=tuple(replace(each, kernel=self.identity) for each in path.solutions))

    def _dense(self, spectrum: Spectrum | None) -> DenseSpectrum | None:
        """All eigenpairs, of a spectrum that has them all."""
        if spectrum is None:
            return None
        if not spectrum.complete or spectrum.size != self.shape[1]:
            raise InputError(
                f"the spectrum holds {len(spectrum.values):,} eigenpairs of a square of {spectrum.size:,} rows; here "
                f"all of {self.shape[1]:,} are needed: kernel.eigh()"
            )
        return DenseSpectrum(spectrum.values, spectrum.vectors)

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
            InputError: if the run has no test rows, or the solution is of another kernel or view.
        """
        if not isinstance(solution, Solution):
            raise InputError(
                f"predict takes what solve returned, got {type(solution).__name__}; for coefficients use "
                f"kernel.matmat(a, rows={rows!r})"
            )
        if solution.kernel != self.identity and solution.kernel and self.identity:
            raise InputError(
                f"the solution is of another kernel or view ({solution.kernel}) than this one ({self.identity}); "
                "predict with the one that solved"
            )
        return self.matmat(solution.coefficients, rows=rows, device=device)

    def logistic(
        self,
        targets: ArrayLike,
        ridge: float,
        *,
        classes: int | None = None,
        tolerance: float = TOLERANCE,
        max_iterations: int = MAX_ITERATIONS,
        budget: Budget | None = None,
        device: str = "cpu",
    ) -> LogisticSolution:
        """Kernel logistic regression on the train square: class scores ``f = K W + 1 bᵀ``, out of core.

        Minimises ``Σ_i CE(softmax f_i, target_i) + (ridge/2)·tr(Wᵀ K W)``, b unpenalised, by one pass over the tiles an
        iteration; see :func:`~ooc_ntk.algebra.logistic.solve_logistic`. Scores of the test rows are
        ``kernel.matmat(found.coefficients, rows="test") + found.bias``.

        Args:
            targets: class labels (train rows,), or probabilities (train rows, classes).
            ridge: absolute, above 0.
            classes: how many there are; None takes one more than the largest label.
            tolerance: the loss may be above the least one by this share of it.
            max_iterations: steps after which the solution is returned as it is.
            budget: host memory of the whole process; a limit that is None takes 80% of what is free.
            device: torch device that multiplies.

        Returns:
            The solution, with a proven bound of what its loss is above the least one.

        Raises:
            InputError: for wrong targets, a ridge or a tolerance that is not above 0, or a class without targets.
            BudgetError: if arrays of (train rows, classes) do not fit in memory.
            StorageError: if a tile cannot be read, or is not what was committed.
        """
        return solve_logistic(
            self,
            targets,
            ridge,
            classes=classes,
            tolerance=tolerance,
            max_iterations=max_iterations,
            budget=budget,
            device=device,
        )
