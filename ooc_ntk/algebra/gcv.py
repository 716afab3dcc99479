"""How well ridge regression generalises, told from the train samples: GCV and leave-one-out over a grid of ridges.

Generalised cross-validation as in Wei, Hu and Steinhardt 2022 (arXiv 2203.06176, eq. 4; Golub, Heath and Wahba 1979):
``GCV(λ) = (1/n) ‖y − K a‖² / ((1/n) tr λ(K + λI)⁻¹)²``, and leave-one-out ``(1/n) Σ (a_i / [(K + λI)⁻¹]_ii)²``. As
``y − K a = λ a``, λ falls out of both, which so hold for λ = 0 as well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import scipy.stats
from numpy.typing import NDArray

from ooc_ntk.errors import InputError

from .entries import Entries
from .path import DenseSpectrum, RidgePath, require_positive, solve_path
from .precondition import Preconditioner
from .ridge import Solution, SolveOptions

#: Probes for traces and diagonals of the inverse (a choice: the preconditioner leaves them little to estimate).
PROBES: Final = 16

#: Samples left out one by one, of every probe (a choice), and resamples of their interval.
LEFT_OUT: Final = 3
RESAMPLES: Final = 999

#: Coverage of the error bars.
COVERAGE: Final = 0.95


@dataclass(frozen=True)
class GcvCurve:
    """Estimates of the test error over a grid of ridges; mean squared errors are means over samples and targets.

    Attributes:
        ridges: (ridges,) as given.
        gcv: (ridges,) generalised cross-validation.
        loo: (ridges,) leave-one-out.
        train: (ridges,) mean squared error on the train samples.
        effective_dimension: (ridges,) ``tr K(K + λI)⁻¹``.
        gcv_error: (ridges,) half of the 95% interval of ``gcv``; 0 where it is exact.
        loo_error: (ridges,) of ``loo``.
        effective_dimension_error: (ridges,) of ``effective_dimension``.
        path: the solutions.
        method: ``spectrum`` (exact) or ``cg`` (stochastic traces).
        probes: that were used, 0 where it is exact.
    """

    ridges: NDArray[np.float64]
    gcv: NDArray[np.float64]
    loo: NDArray[np.float64]
    train: NDArray[np.float64]
    effective_dimension: NDArray[np.float64]
    gcv_error: NDArray[np.float64]
    loo_error: NDArray[np.float64]
    effective_dimension_error: NDArray[np.float64]
    path: RidgePath
    method: str
    probes: int = 0

    @property
    def best(self) -> int:
        """Number of the ridge whose ``gcv`` is least."""
        return int(np.argmin(self.gcv))

    @property
    def best_ridge(self) -> float:
        """The ridge whose ``gcv`` is least."""
        return float(self.ridges[self.best])

    @property
    def solution(self) -> Solution:
        """The solution with that ridge."""
        return self.path[self.best]

    def figures(self) -> dict[str, Any]:
        """Everything but the coefficients, in values that JSON has."""
        return {
            "method": self.method,
            "probes": self.probes,
            "best_ridge": self.best_ridge,
            "best_ridge_ratio": self.solution.ridge_ratio,
            **{
                name: getattr(self, name).tolist()
                for name in (
                    *("ridges", "gcv", "gcv_error", "loo", "loo_error", "train"),
                    *("effective_dimension", "effective_dimension_error"),
                )
            },
        }


def gcv_curve(
    entries: Entries, y: NDArray[np.float64], ridges: NDArray[np.float64], options: SolveOptions, probes: int = PROBES
) -> GcvCurve:
    """GCV and leave-one-out over a grid of ridges.

    From all eigenpairs where they fit. Otherwise from stochastic probes, whose systems share the passes of the targets:
    ``tr (K + λI)⁻¹`` is the preconditioner's, which is known, and Hutchinson's estimate of the difference to it. Its
    diagonal, for leave-one-out, is computed for three times as many random samples, and the mean over all is told from
    them by what the preconditioner's diagonal gives for both (a ratio estimate).

    Args:
        entries: of the kernel.
        y: (train,) or (train, targets), checked.
        ridges: checked.
        options: how; the method is ``auto``, ``spectrum`` or ``cg``.
        probes: random vectors of signs, at least 2.

    Returns:
        The curve.

    Raises:
        InputError: as :func:`~ooc_ntk.algebra.path.solve_path`; for fewer than 2 probes.
        BudgetError: if the spectrum is asked for and does not fit.
    """
    if probes < 2:
        raise InputError(f"probes must be at least 2, for the error bars, got {probes}")
    # A stream of their own: probes must not depend on the columns that the preconditioner drew.
    random = np.random.default_rng((options.seed, 1))
    signs: NDArray[np.float64] = random.integers(0, 2, (entries.size, probes)).astype(np.float64) * 2 - 1
    chosen = random.choice(entries.size, min(LEFT_OUT * probes, entries.size), replace=False)
    units = np.zeros((entries.size, len(chosen)))
    units[chosen, np.arange(len(chosen))] = 1.0
    path = solve_path(entries, y, ridges, options, np.concatenate([signs, units], axis=1))
    if path.spectrum is not None:
        return _exact(path, y)
    require_positive(ridges, "GCV from probes")
    return _estimated(path, signs, chosen)


def _exact(path: RidgePath, y: NDArray[np.float64]) -> GcvCurve:
    assert path.spectrum is not None
    size, zeros = len(y), np.zeros(len(path))
    found: dict[str, list[float]] = {"gcv": [], "loo": [], "train": [], "dimension": []}
    for solution in path.solutions:
        weights = 1.0 / (path.spectrum.values + solution.ridge)
        squares = _squares(solution)
        diagonal = _inverse_diagonal(path.spectrum, weights)
        found["gcv"].append(float(squares.mean() / weights.mean() ** 2))
        found["loo"].append(float((squares / diagonal**2).mean()))
        found["train"].append(float(solution.ridge**2 * squares.mean()))
        found["dimension"].append(float(size - solution.ridge * weights.sum()))
    gcv, loo, train, dimension = (np.asarray(found[name]) for name in ("gcv", "loo", "train", "dimension"))
    lean = replace(path, spectrum=None)
    return GcvCurve(path.ridges, gcv, loo, train, dimension, zeros, zeros, zeros, lean, "spectrum")


def _inverse_diagonal(spectrum: DenseSpectrum, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Diagonal of ``V diag(weights) Vᵀ``, some rows at a time."""
    found = np.empty(len(weights))
    for start in range(0, len(weights), 512):
        found[start : start + 512] = spectrum.vectors[start : start + 512] ** 2 @ weights
    return found


def _squares(solution: Solution) -> NDArray[np.float64]:
    """Squared coefficients of every sample, the mean over the targets, (n,)."""
    values: NDArray[np.float64] = (solution.coefficients.reshape(len(solution.coefficients), -1) ** 2).mean(1)
    return values


def _estimated(path: RidgePath, signs: NDArray[np.float64], chosen: NDArray[np.int64]) -> GcvCurve:
    assert path.probe_solutions is not None
    size, probes = signs.shape
    wide = _student(probes)
    columns: dict[str, list[float]] = {name: [] for name in ("gcv", "ge", "loo", "le", "train", "dim", "de")}
    for number, solution in enumerate(path.solutions):
        ridge, squares, solved = solution.ridge, _squares(solution), path.probe_solutions[number]
        known, base, rest = _rest(path.preconditioner, signs, solved[:, :probes], ridge)
        traces = known + (signs * rest).sum(0)
        trace, spread = float(traces.mean()), float(traces.std(ddof=1) / np.sqrt(probes))
        value = float(squares.mean() / (trace / size) ** 2)
        diagonal = solved[chosen, probes + np.arange(len(chosen))]
        out, out_half = _leave_one_out(squares, base, chosen, diagonal)
        columns["gcv"].append(value)
        columns["ge"].append(wide * 2 * value * spread / trace)
        columns["loo"].append(out)
        columns["le"].append(out_half)
        columns["train"].append(float(ridge**2 * squares.mean()))
        columns["dim"].append(size - ridge * trace)
        columns["de"].append(wide * ridge * spread)
    gcv, ge, loo, le, train, dim, de = (np.asarray(columns[name]) for name in columns)
    lean = replace(path, probe_solutions=None, preconditioner=None)
    return GcvCurve(path.ridges, gcv, loo, train, dim, ge, le, de, lean, "cg", probes)


def _student(count: float) -> float:
    """Half width, in standard errors, of the interval that covers the mean of so many draws."""
    return float(scipy.stats.t.ppf(0.5 + COVERAGE / 2, max(1.0, count - 1)))


def _rest(
    preconditioner: Preconditioner | None, signs: NDArray[np.float64], solved: NDArray[np.float64], ridge: float
) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """Trace and diagonal of the preconditioner's inverse, and what the inverse does to the probes beyond it."""
    if preconditioner is None or not preconditioner.rank:
        # Of the inverse itself the ridge's part is known: (K + λI)⁻¹ = 1/λ − K(K + λI)⁻¹/λ.
        return len(signs) / ridge, np.full(len(signs), 1.0 / ridge), solved - signs / ridge
    # Outside its basis the preconditioner knows the mean eigenvalue, which may be far above the ridge: without it the
    # probes would have to estimate a difference larger than the trace itself (measured on 1,000 digits, a ridge of 1e-4
    # of the mean diagonal: half widths of 4% of GCV instead of 5,000%).
    shifted = ridge + preconditioner.outside
    known, base = preconditioner.inverse_trace(shifted), preconditioner.inverse_diagonal(shifted)
    return known, base, solved - preconditioner.apply(signs, shifted, -1.0)


def _leave_one_out(
    squares: NDArray[np.float64],
    base: NDArray[np.float64],
    chosen: NDArray[np.int64],
    diagonal: NDArray[np.float64],
) -> tuple[float, float]:
    """Leave-one-out error and half of its interval, from the samples whose diagonal is known.

    The ratio estimate of Cochran, Sampling Techniques (1977), ch. 6, without replacement. Errors of single samples are
    skewed, so that the interval is a symmetric bootstrap-t one (Efron 1982; measured on kernels of digits: 91 to 95%
    hold the exact value, where Student's t has 86 to 91%).

    Args:
        squares: (n,) squared coefficients.
        base: (n,) the preconditioner's diagonal.
        chosen: (m,) samples.
        diagonal: (m,) diagonal of the inverse there.
    """
    size, count = len(squares), len(chosen)
    wanted, likely = squares[chosen] / diagonal**2, squares / base**2
    near = likely[chosen]
    if not near.mean() > 0:  # the targets are zero
        return 0.0, 0.0
    ratio, spread = _ratio(wanted, near)
    draws = np.random.default_rng(count).integers(0, count, (RESAMPLES, count))
    ratios, spreads = _ratio(wanted[draws], near[draws])
    studentised = np.divide(abs(ratios - ratio), spreads, out=np.zeros(RESAMPLES), where=spreads > 0)
    wide = max(_student(count), float(np.quantile(studentised, COVERAGE)))
    half = wide * float(spread) * np.sqrt(max(0.0, 1 - count / size))
    return float(ratio * likely.mean()), float(half * likely.mean())


def _ratio(wanted: NDArray[np.float64], near: NDArray[np.float64]) -> tuple[Any, Any]:
    """Ratio of two means along the last axis, and its standard error."""
    base = near.mean(-1, keepdims=True)
    base = np.where(base > 0, base, np.inf)
    ratio = wanted.mean(-1, keepdims=True) / base
    count = wanted.shape[-1]
    spread = np.sqrt(((wanted - ratio * near) ** 2).sum(-1) / (count - 1) / count) / base[..., 0]
    return ratio[..., 0], spread
