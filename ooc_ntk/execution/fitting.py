"""Kernel regression of a run on its labels or on targets of a file: the ridge by GCV, errors and accuracies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ooc_ntk.algebra.classes import one_hot
from ooc_ntk.algebra.gcv import GcvCurve
from ooc_ntk.algebra.kernel import Kernel
from ooc_ntk.algebra.operator import KernelOperator
from ooc_ntk.algebra.path import PATH_METHODS, free_bytes, spectrum_fits
from ooc_ntk.algebra.ridge import SOLVERS, Advance, Solution, SolveOptions
from ooc_ntk.errors import InputError
from ooc_ntk.inputs.job import Job
from ooc_ntk.planning.budget import Budget

from .labels import Labels, run_labels
from .targets import given_targets

#: Ridges that GCV chooses from, over the mean diagonal: 4 per decade. (A choice: curves are smooth in the logarithm.)
RIDGE_RATIOS: Final = tuple(float(each) for each in np.logspace(-6, 1, 29))


@dataclass(frozen=True)
class Targets:
    """What is fitted, in the rows of the kernel.

    Attributes:
        train: (train rows,) or (train rows, targets) float64.
        test: of the test rows, or None where they are not known.
        labels: class labels they were made from, or None.
    """

    train: NDArray[np.float64]
    test: NDArray[np.float64] | None
    labels: Labels | None = None


@dataclass(frozen=True, repr=False)
class Fit:
    """Kernel regression of a run.

    Attributes:
        path: the run directory.
        view: what the kernel was seen as: ``kernel``, ``cosine``, ``centered`` or both.
        targets: what was fitted.
        solution: the coefficients that are kept.
        curve: GCV over all ridges; None where one ridge was asked for.
        predicted: (test rows,) or (test rows, targets); None without test rows.
        test_errors: (ridges,) mean squared error on the test rows for every ridge; empty where it is not known.
        accuracies: (ridges,) share of the test samples that are classified right; empty where it is not known.
        train_accuracy: of the train samples, or None.
    """

    path: Path
    view: str
    targets: Targets
    solution: Solution
    curve: GcvCurve | None
    predicted: NDArray[np.float64] | None
    test_errors: NDArray[np.float64]
    accuracies: NDArray[np.float64]
    train_accuracy: float | None

    def __repr__(self) -> str:
        right = "" if self.accuracy is None else f", {self.accuracy:.2%} right"
        return f"<Fit of {self.path} ({self.view}): {self.solution!r}{right}>"

    @property
    def chosen(self) -> int:
        """Number of the ridge that is kept."""
        return 0 if self.curve is None else self.curve.best

    @property
    def test_error(self) -> float | None:
        """Mean squared error on the test rows."""
        return float(self.test_errors[self.chosen]) if len(self.test_errors) else None

    @property
    def accuracy(self) -> float | None:
        """Share of the test samples that are classified right."""
        return float(self.accuracies[self.chosen]) if len(self.accuracies) else None

    def figures(self) -> dict[str, Any]:
        """Everything but the arrays, in values that JSON has."""
        solution = self.solution
        return {
            "view": self.view,
            "targets": "labels" if self.targets.labels is not None else "given",
            "ridge": solution.ridge,
            "ridge_ratio": solution.ridge_ratio,
            "method": solution.method,
            "residual": solution.residual,
            "iterations": solution.iterations,
            "passes": solution.passes,
            "seconds": solution.seconds,
            "test_error": self.test_error,
            "accuracy": self.accuracy,
            "train_accuracy": self.train_accuracy,
            "test_errors": self.test_errors,
            "accuracies": self.accuracies,
            "curve": None if self.curve is None else self.curve.figures(),
        }

    def arrays(self) -> dict[str, ArrayLike]:
        """Coefficients, targets and predictions."""
        found: dict[str, ArrayLike] = {"coefficients": self.solution.coefficients, "targets": self.targets.train}
        if self.predicted is not None:
            found["predicted"] = self.predicted
        if self.targets.test is not None:
            found["test_targets"] = self.targets.test
        return found


@dataclass(frozen=True)
class FitSettings:
    """What is asked of a fit.

    Attributes:
        targets: an array, a NumPy file, or None for the labels of the data.
        ridge: one absolute ridge; None lets GCV choose.
        ridge_ratio: one ridge over the mean diagonal; None lets GCV choose.
        ridges: absolute ridges that GCV chooses from; None for 1e-6 to 10 of the mean diagonal, four per decade, or one
            where the spectrum does not fit.
        centered: whether the kernel is centred, and the targets likewise, which fits an intercept.
        cosine: whether the kernel is divided by the roots of its diagonal.
        method: of the solver; with a grid ``spectrum``, ``cg`` or ``auto``.
        probes: of GCV's estimates.
        budget: of the solver.
        seed: of everything random.
        device: torch device that multiplies.
    """

    targets: str | Path | ArrayLike | None = None
    ridge: float | None = None
    ridge_ratio: float | None = None
    ridges: ArrayLike | None = None
    centered: bool = False
    cosine: bool = False
    method: str = "auto"
    probes: int = 16
    budget: Budget | None = None
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Refuse two answers to one question."""
        given = [name for name in ("ridge", "ridge_ratio", "ridges") if getattr(self, name) is not None]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} both say what the ridge is; give one of them")


def fit_run(kernel: Kernel, settings: FitSettings, job: Callable[[], Job | None], advance: Advance | None) -> Fit:
    """Fit a run's kernel.

    Args:
        kernel: of the run.
        settings: what is asked for.
        job: the run's job, for its labels; called only where they are needed.
        advance: told what is being done.

    Returns:
        The fit.

    Raises:
        InputError: for wrong targets or ridges, data without labels, or a matrix that is not positive definite.
        BudgetError: if no method fits.
        StorageError: if files cannot be read.
    """
    seen: KernelOperator = kernel.cosine() if settings.cosine else kernel
    seen = seen.centered() if settings.centered else seen
    targets = _targets(kernel, settings.targets, job)
    shift = targets.train.mean(0) if settings.centered else np.zeros(targets.train.shape[1:])
    y, mean = targets.train - shift, float(seen.entries.diagonal().mean())
    common: dict[str, Any] = {"budget": settings.budget, "seed": settings.seed, "device": settings.device}
    curve = None
    one = settings.ridge if settings.ridge_ratio is None else settings.ridge_ratio * mean
    if one is not None:
        solutions = [seen.solve(y, one, method=settings.method, advance=advance, **common)]
    else:
        if settings.method not in PATH_METHODS and settings.method in SOLVERS:
            raise InputError(
                f"method {settings.method!r} solves for one ridge; give one (--ridge, --ridge-ratio), or leave the "
                "method out: GCV chooses the ridge by spectrum or cg"
            )
        ridges = _grid(seen, settings) * mean if settings.ridges is None else settings.ridges
        curve = seen.gcv(y, ridges, method=settings.method, probes=settings.probes, advance=advance, **common)
        solutions = list(curve.path.solutions)
    chosen = solutions[0 if curve is None else curve.best]
    test = _predictions(seen, solutions, shift, settings.device)
    return Fit(
        path=kernel.path,
        view=" ".join(name for name in ("cosine", "centered") if getattr(settings, name)) or "kernel",
        targets=targets,
        solution=chosen,
        curve=curve,
        predicted=None if test is None else test[0 if curve is None else curve.best],
        test_errors=_test_errors(test, targets),
        accuracies=_accuracies(test, targets, kernel.entries_per_sample),
        train_accuracy=_train_accuracy(chosen, targets, kernel.entries_per_sample),
    )


def _grid(seen: KernelOperator, settings: FitSettings) -> NDArray[np.float64]:
    """Ridges over the mean diagonal: one per decade where every one costs systems of its own."""
    found = np.asarray(RIDGE_RATIOS)
    fits = spectrum_fits(seen.entries, free_bytes(SolveOptions(budget=settings.budget)))
    return found if settings.method == "spectrum" or (fits and settings.method == "auto") else found[::4]


def class_targets(labels: NDArray[np.int64], classes: int, rows_per_sample: int) -> NDArray[np.float64]:
    """Labels as targets less 1/classes: (samples, classes), or of a full kernel (samples · classes,)."""
    found = one_hot(labels, classes) - 1.0 / classes
    return found.reshape(-1) if rows_per_sample > 1 else found


def _targets(kernel: Kernel, given: str | Path | ArrayLike | None, job: Callable[[], Job | None]) -> Targets:
    if given is not None:
        values, train = given_targets(given, kernel.shape), kernel.shape[1]
        return Targets(values[:train], values[train:] if len(values) > train else None)
    labels = run_labels(kernel.path, job())
    if labels is None:
        raise InputError(
            f"the data of the run in {kernel.path} have no class labels; give targets (--targets FILE.npy)"
        )
    rows = kernel.entries_per_sample
    if rows > 1 and rows != labels.classes:
        raise InputError(
            f"this full kernel has {rows} rows per sample, and the data have {labels.classes} classes; give targets, "
            "one for each row (--targets FILE.npy)"
        )
    test = class_targets(labels.test, labels.classes, rows) if kernel.test_samples else None
    return Targets(class_targets(labels.train, labels.classes, rows), test, labels)


def _predictions(
    seen: KernelOperator, solutions: list[Solution], shift: NDArray[np.float64], device: str
) -> NDArray[np.float64] | None:
    """(ridges, test rows) or (ridges, test rows, targets), by one pass; None without test rows."""
    if seen.shape[0] == seen.shape[1]:
        return None
    stacked = np.stack([each.coefficients for each in solutions], axis=1)
    found = seen.matmat(stacked.reshape(len(stacked), -1), rows="test", device=device)
    return np.asarray(np.moveaxis(found.reshape(len(found), *stacked.shape[1:]), 1, 0) + shift)


def _test_errors(test: NDArray[np.float64] | None, targets: Targets) -> NDArray[np.float64]:
    if test is None or targets.test is None:
        return np.empty(0)
    return np.asarray(((test - targets.test) ** 2).reshape(len(test), -1).mean(1))


def _accuracies(test: NDArray[np.float64] | None, targets: Targets, rows: int) -> NDArray[np.float64]:
    if test is None or targets.labels is None:
        return np.empty(0)
    scores = test.reshape(len(test), len(targets.labels.test), -1) if rows > 1 else test
    return np.asarray((scores.argmax(2) == targets.labels.test).mean(1))


def _train_accuracy(solution: Solution, targets: Targets, rows: int) -> float | None:
    """Of the fit, which is ``y − ridge · a`` as ``(K + ridge·I) a = y``."""
    if targets.labels is None:
        return None
    fitted = targets.train - solution.ridge * solution.coefficients
    scores = fitted.reshape(len(targets.labels.train), -1) if rows > 1 else fitted
    return float((scores.argmax(1) == targets.labels.train).mean())
