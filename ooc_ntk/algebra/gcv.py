"""How well ridge regression generalises, told from the train samples: GCV and leave-one-out over a grid of ridges.

Generalised cross-validation as in Wei, Hu and Steinhardt 2022 (arXiv 2203.06176, eq. 4; Golub, Heath and Wahba 1979):
``GCV(λ) = (1/n) ‖y − K a‖² / ((1/n) tr λ(K + λI)⁻¹)²``, and leave-one-out ``(1/n) Σ (a_i / [(K + λI)⁻¹]_ii)²``. As
``y − K a = λ a``, λ falls out of both, which so hold for λ = 0 as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import scipy.special
from numpy.typing import NDArray

from ooc_ntk.errors import InputError

from .entries import Entries, ViewEntries
from .path import DenseSpectrum, RidgePath, require_positive, solve_path
from .precondition import Preconditioner
from .ridge import Solution, SolveOptions

#: Probes for traces and diagonals of the inverse (a choice: the preconditioner leaves them little to estimate).
PROBES: Final = 16

#: Bytes of the blocks on the diagonal of the inverse for several ridges at once (a choice).
BLOCKS_BYTES: Final = 2**26

#: Samples left out one by one, of every probe (a choice), and resamples of their interval.
LEFT_OUT: Final = 3
RESAMPLES: Final = 999

#: Coverage of the error bars.
COVERAGE: Final = 0.95


@dataclass(frozen=True, repr=False)
class GcvCurve:
    """Estimates of the test error over a grid of ridges; mean squared errors are means over samples and targets.

    Attributes:
        ridges: (ridges,) as given, without those that were dropped.
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

    def __repr__(self) -> str:
        return (
            f"<GcvCurve {len(self.ridges)} ridges by {self.method}: least {self.gcv[self.best]:.4g} at "
            f"{self.best_ridge:.4g}, {self.solution.ridge_ratio:.2g} of the mean diagonal>"
        )

    @property
    def dropped(self) -> tuple[float, ...]:
        """Ridges that were left out, as they do not make the kernel positive definite."""
        return self.path.dropped

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
            "dropped": list(self.dropped),
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
    entries: Entries,
    y: NDArray[np.float64],
    ridges: NDArray[np.float64],
    options: SolveOptions,
    probes: int = PROBES,
    rows_per_sample: int = 1,
    spectrum: DenseSpectrum | None = None,
) -> GcvCurve:
    """GCV and leave-one-out over a grid of ridges; those that do not make the kernel positive definite are left out.

    From all eigenpairs where they fit. Otherwise from stochastic probes, whose systems share the passes of the targets:
    ``tr (K + λI)⁻¹`` is the preconditioner's, which is known, and Hutchinson's estimate of the difference to it. Its
    diagonal, for leave-one-out, is computed for three times as many random rows, and the mean over all is told from
    them by what the preconditioner's diagonal gives for both (a ratio estimate).

    Of a centred kernel the mean of the targets is refitted with every sample that is left out, and costs its one degree
    of freedom: ``(HKH + λI)⁻¹`` is that of a regression with an intercept and ``1 1ᵀ/(nλ)``, which is taken off. Of a
    full kernel a sample is left out with all its rows.

    Args:
        entries: of the kernel.
        y: (train,) or (train, targets), checked.
        ridges: checked.
        options: how; the method is ``auto``, ``spectrum`` or ``cg``.
        probes: random vectors of signs, at least 2.
        rows_per_sample: kernel rows of one sample.
        spectrum: all eigenpairs, where they are known.

    Returns:
        The curve.

    Raises:
        InputError: as :func:`~ooc_ntk.algebra.path.solve_path`; for fewer than 2 probes.
        BudgetError: if the spectrum is asked for and does not fit.
    """
    if probes < 2:
        raise InputError(f"probes must be at least 2, for the error bars, got {probes}")
    intercept = isinstance(entries, ViewEntries) and entries.means is not None
    if intercept:
        require_positive(ridges, "GCV of a centred kernel, which is singular,")
        y = y - y.mean(0)
    if options.method == "cg" and spectrum is None:
        require_positive(ridges, "GCV from probes")
    drawn = _Drawn(entries.size, probes, rows_per_sample, options.seed, intercept=intercept)
    path = solve_path(entries, y, ridges, options, drawn, spectrum, drop=True)
    if path.spectrum is not None:
        return _exact(path, len(y), rows_per_sample, intercept=intercept)
    return _estimated(path, drawn)


def _exact(path: RidgePath, size: int, rows: int, *, intercept: bool) -> GcvCurve:
    assert path.spectrum is not None
    zeros, columns, values = np.zeros(len(path)), [], path.spectrum.values
    if intercept:
        # The direction of 1 has eigenvalue 0, and what centring has left of it is rounding. What is as small is set to
        # 0: beside a small ridge it would change what is taken off, and with it all digits of 1 less the leverage.
        noise = abs(float(values @ (path.spectrum.vectors.sum(0) ** 2))) / size
        values = np.where(abs(values) <= 10 * noise + size * np.finfo(np.float64).eps * abs(values).max(), 0.0, values)
    inverse = np.array([1.0 / (values + solution.ridge) for solution in path.solutions])
    for solution, weights, blocks in zip(path.solutions, inverse, _blocks(path.spectrum, inverse, rows), strict=True):
        trace = float(weights.sum())
        off = 1.0 / (size * solution.ridge) if intercept else 0.0
        squares = _squares(solution)
        left_out = _left_out(solution, blocks - off)
        columns.append(
            (
                float(squares.mean() / (trace / size - off) ** 2),
                float(left_out.mean()),
                float(solution.ridge**2 * squares.mean()),
                float(size - solution.ridge * trace),
            )
        )
    gcv, loo, train, dimension = np.array(columns).T
    lean = replace(path, spectrum=None)
    return GcvCurve(path.ridges, gcv, loo, train, dimension, zeros, zeros, zeros, lean, "spectrum")


def _blocks(spectrum: DenseSpectrum, weights: NDArray[np.float64], rows: int) -> Iterator[NDArray[np.float64]]:
    """:func:`_inverse_blocks` of one row of weights after the other, as many at once as :data:`BLOCKS_BYTES` hold."""
    step = max(1, BLOCKS_BYTES // (8 * weights.shape[1] * rows))
    for start in range(0, len(weights), step):
        yield from _inverse_blocks(spectrum, weights[start : start + step], rows)


def _inverse_blocks(spectrum: DenseSpectrum, weights: NDArray[np.float64], rows: int) -> NDArray[np.float64]:
    """Blocks on the diagonal of ``V diag(weights) Vᵀ`` for several weights, (weights, samples, rows, rows).

    Some samples at a time, for all weights: LAPACK leaves eigenvectors in columns, whose rows are copied once.

    Args:
        spectrum: all n eigenpairs.
        weights: (weights, n).
        rows: of a block.
    """
    size = weights.shape[1]
    found = np.empty((len(weights), size // rows, rows, rows))
    step = max(1, 512 // rows)
    for start in range(0, size // rows, step):
        vectors = np.ascontiguousarray(spectrum.vectors[start * rows : (start + step) * rows])
        if rows == 1:
            found[:, start : start + step, 0, 0] = weights @ np.square(vectors).T
            continue
        vectors = vectors.reshape(-1, rows, size)
        for each, blocks in zip(weights, found, strict=True):
            blocks[start : start + step] = (vectors * each) @ vectors.transpose(0, 2, 1)
    return found


def _left_out(solution: Solution, blocks: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squared errors of every sample that is left out, the mean over its rows and the targets, (samples,)."""
    rows = blocks.shape[1]
    coefficients = solution.coefficients.reshape(len(blocks), rows, -1)
    errors = coefficients / blocks if rows == 1 else np.linalg.solve(blocks, coefficients)
    return np.asarray((errors**2).mean((1, 2)))


def _squares(solution: Solution) -> NDArray[np.float64]:
    """Squared coefficients of every row, the mean over the targets, (n,)."""
    values: NDArray[np.float64] = (solution.coefficients.reshape(len(solution.coefficients), -1) ** 2).mean(1)
    return values


class _Drawn:
    """Probes of one curve: signs for the trace, unit vectors for samples that are left out; see :class:`Probes`.

    Attributes:
        traces: by ridge: estimates of the inverse's trace, one per vector of signs.
        blocks: by ridge: blocks of the inverse of the samples that are left out, (samples, rows, rows).
        diagonals: by ridge: the preconditioner's diagonal.
    """

    def __init__(self, size: int, probes: int, rows: int, seed: int, *, intercept: bool) -> None:
        """Draw them, from a stream of their own: they must not depend on the preconditioner's columns."""
        random = np.random.default_rng((seed, 1))
        self.size, self.probes, self.rows, self.intercept = size, probes, rows, intercept
        self._signs = random.integers(0, 2, (size, probes)).astype(np.float64) * 2 - 1
        samples = size // rows
        count = min(max(2, LEFT_OUT * probes // rows), samples)
        self.chosen = random.choice(samples, count, replace=False)
        self.traces: dict[float, NDArray[np.float64]] = {}
        self.blocks: dict[float, NDArray[np.float64]] = {}
        self.diagonals: dict[float, NDArray[np.float64]] = {}

    @property
    def _places(self) -> NDArray[np.int64]:
        """Kernel rows of the samples that are left out."""
        return np.asarray((self.chosen[:, None] * self.rows + np.arange(self.rows)).reshape(-1))

    def columns(self) -> NDArray[np.float64]:
        """See :class:`Probes`."""
        found = np.zeros((self.size, self.probes + len(self._places)))
        found[:, : self.probes] = self._signs
        found[self._places, self.probes + np.arange(len(self._places))] = 1.0
        return found

    def observe(self, ridge: float, solved: NDArray[np.float64], preconditioner: Preconditioner | None) -> None:
        """See :class:`Probes`."""
        signs = self._signs
        if preconditioner is None or not preconditioner.rank:
            # Of the inverse itself the ridge's part is known: (K + λI)⁻¹ = 1/λ − K(K + λI)⁻¹/λ.
            shifted, known, base = ridge, self.size / ridge, np.full(self.size, 1.0 / ridge)
            rest = solved[:, : self.probes] - signs / ridge
        else:
            # Outside its basis the preconditioner knows the mean eigenvalue, which may be far above the ridge: without
            # it the probes would have to estimate a difference larger than the trace itself (measured on 1,000 digits,
            # a ridge of 1e-4 of the mean diagonal: half widths of 4% of GCV instead of 5,000%).
            shifted = ridge + preconditioner.outside
            known, base = preconditioner.inverse_trace(shifted), preconditioner.inverse_diagonal(shifted)
            rest = solved[:, : self.probes] - preconditioner.apply(signs, shifted, -1.0)
        values = solved[self._places, self.probes :].reshape(len(self.chosen), self.rows, len(self.chosen), self.rows)
        each = np.arange(len(self.chosen))
        off = 1.0 / (self.size * ridge) if self.intercept else 0.0
        if self.intercept:  # in the direction of 1 both inverses are known, 1/λ, and it is left out
            known, signs, rest = known - 1.0 / shifted, signs - signs.mean(0), rest - rest.mean(0)
        self.traces[ridge] = known + (signs * rest).sum(0)
        self.blocks[ridge] = values[each, :, each, :] - off
        self.diagonals[ridge] = np.maximum(base - (1.0 / (self.size * shifted) if self.intercept else 0.0), 1e-300)


def _estimated(path: RidgePath, drawn: _Drawn) -> GcvCurve:
    size, probes = drawn.size, drawn.probes
    wide, rows = _student(probes), []
    for solution in path.solutions:
        ridge, squares = solution.ridge, _squares(solution)
        traces = drawn.traces[ridge]
        trace, spread = float(traces.mean()), float(traces.std(ddof=1) / np.sqrt(probes))
        # By convexity it is at least size / (ridge + mean diagonal): an estimate below is noise.
        mean = ridge / solution.ridge_ratio if solution.ridge_ratio else 0.0
        trace = max(trace, (size - drawn.intercept) / (ridge + mean))
        value = float(squares.mean() / (trace / size) ** 2)
        likely = squares / drawn.diagonals[ridge] ** 2
        likely = likely.reshape(-1, drawn.rows).mean(1)
        some = (drawn.chosen[:, None] * drawn.rows + np.arange(drawn.rows)).reshape(-1)
        picked = replace(solution, coefficients=solution.coefficients[some])
        out, half = _leave_one_out(_left_out(picked, drawn.blocks[ridge]), likely, drawn.chosen)
        rows.append(
            (
                value,
                out,
                float(ridge**2 * squares.mean()),
                size - ridge * trace - float(drawn.intercept),
                wide * 2 * value * spread / trace,
                half,
                wide * ridge * spread,
            )
        )
    gcv, loo, train, dimension, gcv_error, loo_error, dimension_error = np.array(rows).T
    return GcvCurve(path.ridges, gcv, loo, train, dimension, gcv_error, loo_error, dimension_error, path, "cg", probes)


def _student(count: float) -> float:
    """Half width, in standard errors, of the interval that covers the mean of so many draws."""
    return float(scipy.special.stdtrit(max(1.0, count - 1), 0.5 + COVERAGE / 2))


def _leave_one_out(
    wanted: NDArray[np.float64], likely: NDArray[np.float64], chosen: NDArray[np.int64]
) -> tuple[float, float]:
    """Leave-one-out error and half of its interval, from the samples whose error is known.

    The ratio estimate of Cochran, Sampling Techniques (1977), ch. 6, without replacement. Errors of single samples are
    skewed, so that the interval is a symmetric bootstrap-t one (Efron 1982; measured on kernels of digits: 91 to 95%
    hold the exact value, where Student's t has 86 to 91%).

    Args:
        wanted: (m,) squared errors of some samples that are left out.
        likely: (samples,) what the preconditioner makes of all.
        chosen: (m,) the samples.
    """
    size, count, near = len(likely), len(chosen), likely[chosen]
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
    spread = np.sqrt(((wanted - ratio * near) ** 2).sum(-1) / max(1, count - 1) / count) / base[..., 0]
    return ratio[..., 0], spread
