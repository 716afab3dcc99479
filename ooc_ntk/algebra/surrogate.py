"""Kernel surrogates of a network (Engel et al. 2023, arXiv 2305.14585): fitted to kernel rows, judged beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from ooc_ntk.errors import InputError, unknown_name
from ooc_ntk.planning.budget import Budget

from .classes import one_hot
from .faithfulness import ClassOutputs, Estimate, accuracy, compared, log_odds, softmax
from .kernel import Kernel
from .logistic import TOLERANCE, solve_logistic

Array = NDArray[np.float64]

#: Surrogates there are: kernel ridge regression and kernel logistic regression.
KINDS: Final = ("ridge", "logistic")

#: What a surrogate is fitted to: the class labels (as Engel et al. do), or what the network says of the train samples,
#: its scores (ridge) or probabilities (logistic).
TARGETS: Final = ("labels", "outputs")

#: Ridge over the mean diagonal of the train square (a usual small value; not tuned).
RIDGE_RATIO: Final = 1e-3


@dataclass(frozen=True)
class Surrogate:
    """A surrogate of a network, and how close to it it is on the test samples.

    Attributes:
        kernel: the kernel, in words.
        kind: ``ridge`` or ``logistic``.
        targets: ``labels`` or ``outputs``.
        ridge: absolute ridge.
        ridge_ratio: the ridge over the mean diagonal of the train square.
        coefficients: (train samples, classes) float64.
        bias: (classes,) float64; scores are the kernel times the coefficients, plus the bias.
        train_scores: (train samples, classes) float64.
        test_scores: (test samples, classes) float64.
        log_odds: (test samples,) of each one's own class, ``log(p/(1 − p))`` for p the softmax of the scores.
        network_log_odds: the same of the network.
        train_accuracy: on the train samples.
        accuracy: on the test samples.
        accuracy_difference: the network's accuracy minus the surrogate's, on the test samples.
        kendall_tau: Kendall's τ-b between the network's and the surrogate's probability of each test sample's own
            class.
        r_squared: R² of the line that tells the network's log-odds of each test sample's own class best from the
            surrogate's.
        solver: figures of the fit: of a logistic one passes, loss, the share of it that it is at most above the least
            one, and whether that is within the tolerance; of a ridge the relative residual.
        notes: what a reader must know.
    """

    kernel: str
    kind: str
    targets: str
    ridge: float
    ridge_ratio: float
    coefficients: Array = field(repr=False)
    bias: Array = field(repr=False)
    train_scores: Array = field(repr=False)
    test_scores: Array = field(repr=False)
    log_odds: Array = field(repr=False)
    network_log_odds: Array = field(repr=False)
    train_accuracy: float
    accuracy: Estimate
    accuracy_difference: Estimate
    kendall_tau: Estimate
    r_squared: Estimate
    solver: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Kernel and kind."""
        return f"{self.kernel} {self.kind}"

    @property
    def probability(self) -> Array:
        """The surrogate's probability of each test sample's own class."""
        return np.asarray(expit(self.log_odds))

    @property
    def network_probability(self) -> Array:
        """The network's probability of each test sample's own class."""
        return np.asarray(expit(self.network_log_odds))

    def figures(self) -> dict[str, Any]:
        """What is kept as JSON."""
        return {
            **{name: getattr(self, name) for name in ("kernel", "kind", "targets", "ridge", "ridge_ratio")},
            "train_accuracy": self.train_accuracy,
            "accuracy": self.accuracy.figures(),
            "accuracy_difference": self.accuracy_difference.figures(),
            "kendall_tau": self.kendall_tau.figures(),
            "r_squared": self.r_squared.figures(),
            "solver": self.solver,
            "notes": list(self.notes),
        }

    def arrays(self) -> dict[str, Array]:
        """What is kept as arrays, by names that no other surrogate has."""
        prefix = f"{self.kernel}.{self.kind}".replace(" ", "_")
        names = ("coefficients", "bias", "train_scores", "test_scores", "log_odds")
        return {f"{prefix}.{name}": getattr(self, name) for name in names}


@dataclass(frozen=True)
class SurrogateReport:
    """Surrogates of one network by several kernels, beside the network.

    Attributes:
        surrogates: every kernel by every kind, those of the run's own kernel first.
        network: outputs of the network.
    """

    surrogates: tuple[Surrogate, ...]
    network: ClassOutputs = field(repr=False)

    def figures(self) -> dict[str, Any]:
        """What is kept as JSON."""
        return {
            "network": {
                "train_accuracy": self.network.train_accuracy,
                "accuracy": self.network.accuracy,
                "classes": self.network.classes,
                "train_samples": len(self.network.train_labels),
                "test_samples": len(self.network.test_labels),
            },
            "surrogates": [each.figures() for each in self.surrogates],
        }

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What is kept as arrays: the network's scores and log-odds, labels, and all arrays of the surrogates."""
        names = ("train_scores", "test_scores", "train_labels", "test_labels")
        found: dict[str, NDArray[Any]] = {f"network.{name}": getattr(self.network, name) for name in names}
        found["network.log_odds"] = log_odds(self.network.test_scores, self.network.test_labels)
        for each in self.surrogates:
            found.update(each.arrays())
        return found


def fit_surrogate(
    kernel: Kernel,
    network: ClassOutputs,
    kind: str,
    *,
    name: str,
    targets: str = "labels",
    ridge_ratio: float = RIDGE_RATIO,
    tolerance: float = TOLERANCE,
    budget: Budget | None = None,
    seed: int = 0,
    advance: Callable[[int, float], None] = lambda passes, share: None,  # noqa: ARG005
) -> Surrogate:
    """Fit a surrogate to kernel rows of the train samples, and compare it with the network on the test samples.

    A ridge surrogate is ``(K + ridge·I) A = T − mean T`` for T the labels, one column each class, or the network's
    outputs. A logistic one is :meth:`~ooc_ntk.algebra.regression.Regression.logistic` of the labels or of the
    network's probabilities.

    Args:
        kernel: of train and test samples, one row a sample.
        network: outputs of the network for the same samples.
        kind: one of :data:`KINDS`.
        name: of the kernel, in words.
        targets: one of :data:`TARGETS`.
        ridge_ratio: ridge over the mean diagonal of the train square, above 0.
        tolerance: of a logistic fit: the share of its loss that it may be above the least one.
        budget: host memory of the whole process, and disk; a limit that is None takes 80% of what is free.
        seed: of the bootstrap.
        advance: told of every pass of a logistic fit.

    Returns:
        The surrogate.

    Raises:
        InputError: for another kind or target, a ridge ratio that is not above 0, no test rows, a ``full`` kernel, or
            labels that do not fit the kernel.
        BudgetError: if arrays do not fit in memory, or no method of solving does.
        StorageError: if a tile cannot be read.
    """
    _check(kernel, network, kind, targets, ridge_ratio)
    ridge = ridge_ratio * float(kernel.sample_diagonal()[: kernel.shape[1]].mean())
    if not ridge > 0:
        raise InputError(f"the mean diagonal of the kernel {name!r} is zero: it tells no samples apart")
    notes: tuple[str, ...] = ()
    if kind == "ridge":
        labels = one_hot(network.train_labels, network.classes, most=None)  # no larger than the scores
        wanted = labels if targets == "labels" else network.train_scores
        bias = wanted.mean(0)
        solved = kernel.solve(wanted - bias, ridge, budget=budget)
        coefficients = solved.coefficients
        train_scores = wanted - ridge * coefficients  # what the equation says, up to its residual, without a pass
        solver: dict[str, Any] = {"residual": solved.residual}
    else:
        given: NDArray[Any] = network.train_labels if targets == "labels" else softmax(network.train_scores)
        found = solve_logistic(
            kernel, given, ridge, classes=network.classes, tolerance=tolerance, budget=budget, advance=advance
        )
        coefficients, bias, train_scores = found.coefficients, found.bias, found.train_scores
        share = found.gap / found.loss if found.loss else 0.0
        solver = {"passes": found.passes, "loss": found.loss, "gap": share, "converged": found.converged}
        if not found.converged:
            notes = (f"the logistic fit stopped after {found.passes} passes, its loss up to {share:.1e} too large",)
    test_scores = kernel.matmat(coefficients, rows="test") + bias
    estimates, more = compared(test_scores, network, seed)
    return Surrogate(
        kernel=name,
        kind=kind,
        targets=targets,
        ridge=ridge,
        ridge_ratio=float(ridge_ratio),
        coefficients=coefficients,
        bias=bias,
        train_scores=train_scores,
        test_scores=test_scores,
        log_odds=log_odds(test_scores, network.test_labels),
        network_log_odds=log_odds(network.test_scores, network.test_labels),
        train_accuracy=accuracy(train_scores, network.train_labels),
        solver=solver,
        notes=(*notes, *more),
        **estimates,
    )


def _check(kernel: Kernel, network: ClassOutputs, kind: str, targets: str, ridge_ratio: float) -> None:
    """Refuse what no surrogate can be made of."""
    check_settings([kind], targets, ridge_ratio)
    check_kernel(kernel)
    counts = (len(network.train_labels), len(network.test_labels))
    if counts != kernel.samples:
        raise InputError(
            f"the network's outputs are of {counts[0]:,} train and {counts[1]:,} test samples, the kernel's rows of "
            f"{kernel.samples[0]:,} and {kernel.samples[1]:,}"
        )


def check_settings(kinds: Sequence[str], targets: str, ridge_ratio: float) -> None:
    """Refuse names that are not known, and a ratio that gives no ridge.

    Raises:
        InputError: for one of these, or no kind at all.
    """
    if not kinds:
        raise InputError(f"no kind of surrogate is given; give one or more of {', '.join(KINDS)}")
    for kind in kinds:
        if kind not in KINDS:
            raise unknown_name("kind of surrogate", kind, KINDS)
    if targets not in TARGETS:
        raise unknown_name("targets of a surrogate", targets, TARGETS)
    if not 0 < ridge_ratio < np.inf:
        raise InputError(f"ridge ratio must be above 0 and finite, got {ridge_ratio}; the default is {RIDGE_RATIO:g}")


def check_kernel(kernel: Kernel) -> None:
    """Refuse a kernel without test rows, or with several rows a sample.

    Raises:
        InputError: for one of these.
    """
    kernel.row_range("test")
    if kernel.entries_per_sample > 1:
        raise InputError(
            f"a surrogate needs one kernel row a sample, and a full kernel has {kernel.entries_per_sample}; run the "
            "job with kernel='trace' or 'pseudo'"
        )
