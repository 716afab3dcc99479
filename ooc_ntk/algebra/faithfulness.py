"""How close a surrogate comes to a network on test samples: figures with their standard errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: Resamples of the test samples for standard errors: they are then good to 5% (1/√(2·200)).
RESAMPLES: Final = 200


@dataclass(frozen=True)
class ClassOutputs:
    """What a network says of the samples of a run, and what they are.

    Attributes:
        train_scores: (train samples, classes) float64, the network's outputs before the softmax.
        test_scores: (test samples, classes) float64.
        train_labels: (train samples,) int64.
        test_labels: (test samples,) int64.
    """

    train_scores: Array
    test_scores: Array
    train_labels: NDArray[np.int64]
    test_labels: NDArray[np.int64]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.train_scores.shape[1])

    @property
    def train_accuracy(self) -> float:
        """Share of the train samples that the network classifies rightly."""
        return accuracy(self.train_scores, self.train_labels)

    @property
    def accuracy(self) -> float:
        """Share of the test samples that the network classifies rightly."""
        return accuracy(self.test_scores, self.test_labels)


@dataclass(frozen=True)
class Estimate:
    """A figure over the test samples.

    Attributes:
        value: the figure; NaN where it is not defined.
        error: its standard error, by the bootstrap over test samples; NaN where it is not defined.
    """

    value: float
    error: float

    def figures(self) -> dict[str, float]:
        """As JSON has it."""
        return {"value": self.value, "error": self.error}


def compared(scores: Array, network: ClassOutputs, seed: int) -> tuple[dict[str, Estimate], tuple[str, ...]]:
    """All figures over the test samples, each with its standard error by the same resamples, and notes.

    Kendall's τ-b is taken of log-odds: they are in the order of the probabilities, which Engel et al. compare, and are
    not tied where these are 1 to the last digit.
    """
    labels = network.test_labels
    right, theirs = scores.argmax(1) == labels, network.test_scores.argmax(1) == labels
    mine, own = log_odds(scores, labels), log_odds(network.test_scores, labels)

    def figures(chosen: Any) -> tuple[float, ...]:
        difference = float(theirs[chosen].mean() - right[chosen].mean())
        pair = own[chosen], mine[chosen]
        return float(right[chosen].mean()), difference, kendall_tau(*pair), r_squared(*pair)

    values = figures(slice(None))
    random, count = np.random.default_rng(seed), len(labels)
    resampled = np.array([figures(random.integers(0, count, count)) for _ in range(RESAMPLES)])
    errors = [float(np.nan)] * len(values)
    for index, value in enumerate(values):
        drawn = resampled[np.isfinite(resampled[:, index]), index]
        if np.isfinite(value) and len(drawn) > 1:
            errors[index] = float(drawn.std(ddof=1))
    names = ("accuracy", "accuracy_difference", "kendall_tau", "r_squared")
    found = {name: Estimate(value, error) for name, value, error in zip(names, values, errors, strict=True)}
    if np.isfinite(values[2]):
        return found, ()
    side = "network's" if np.ptp(own) == 0 else "surrogate's"
    return found, (
        f"Kendall's τ and R² are not defined: the {side} probability of the own class is the same for all test samples",
    )


def accuracy(scores: Array, labels: NDArray[np.int64]) -> float:
    """Share of rows whose largest score is their label's."""
    return float((scores.argmax(1) == labels).mean())


def softmax(scores: Array) -> Array:
    """Probabilities of scores, row by row."""
    found = np.exp(scores - scores.max(1, keepdims=True))
    return np.asarray(found / found.sum(1, keepdims=True))


def log_odds(scores: Array, labels: NDArray[np.int64]) -> Array:
    """``log(p/(1 − p))`` of the softmax p of every row at its label, which does not cancel where p is nearly 1.

    Args:
        scores: (rows, classes), at least two classes.
        labels: (rows,).

    Returns:
        (rows,).
    """
    rows = np.arange(len(labels))
    others = scores.copy()
    others[rows, labels] = -np.inf
    largest = others.max(1)
    return np.asarray(scores[rows, labels] - largest - np.log(np.exp(others - largest[:, None]).sum(1)))


def kendall_tau(x: Array, y: Array) -> float:
    """Kendall's τ-b, which counts ties (Kendall 1945); NaN where one side is constant."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    from scipy.stats import kendalltau  # takes half a second

    return float(kendalltau(x, y, variant="b").statistic)


def r_squared(x: Array, y: Array) -> float:
    """R² of the least-squares line that tells y from x, the squared correlation; NaN where one side is constant."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) ** 2 / ((x @ x) * (y @ y)))
