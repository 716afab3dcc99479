"""How absolute residuals fall off: their survival function, and whether an exponential or a normal tail lies nearer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_ndtr

#: Tails are fitted from this survival on, down to that at which so many residuals are left (choices).
TAIL_START, TAIL_RESIDUALS = 0.1, 10

#: A fit is called better if the other's misfit is so many times as large (a choice).
CLEARLY = 1.2

#: Points of a survival function.
SURVIVAL_POINTS = 60


@dataclass(frozen=True)
class Tail:
    """How a distribution of absolute residuals falls off, and which two-parameter tail lies nearer.

    Attributes:
        values: at which the survival function was read.
        survival: share of residuals above each.
        rate: of ``A·exp(-rate·x)``.
        exponential_log: log A of it.
        exponential_misfit: root mean square over the tail of the difference of log10 survival.
        spread: of ``A·erfc(x / (spread·√2))``.
        normal_log: log A of it.
        normal_misfit: the same.
    """

    values: tuple[float, ...]
    survival: tuple[float, ...]
    rate: float
    exponential_log: float
    exponential_misfit: float
    spread: float
    normal_log: float
    normal_misfit: float

    @property
    def better(self) -> str:
        """Which of both lies nearer; ``alike`` where their misfits do not differ by a factor of :data:`CLEARLY`."""
        worse, better = sorted((self.exponential_misfit, self.normal_misfit), reverse=True)
        if worse < CLEARLY * better:
            return "alike"
        return "exponential" if self.exponential_misfit < self.normal_misfit else "normal"

    def __str__(self) -> str:
        """The nearer one with both misfits, exponential first."""
        return f"{self.better} ({self.exponential_misfit:.3f}/{self.normal_misfit:.3f})"


def fit_tail(values: NDArray[np.float64]) -> Tail:
    """Fit both tails to the survival function of absolute residuals, each with a free scale and a free factor.

    Fitted is log survival at points evenly spread in it, by least squares, from :data:`TAIL_START` on.

    Args:
        values: (n,) absolute residuals.

    >>> normal = np.abs(np.random.default_rng(0).standard_normal(200_000))
    >>> fit_tail(normal).better, fit_tail(np.random.default_rng(0).exponential(size=200_000)).better
    ('normal', 'exponential')
    """
    last = max(TAIL_RESIDUALS / len(values), 1e-9)
    survival = np.geomspace(1.0, min(last, TAIL_START / 2), SURVIVAL_POINTS)
    points = np.quantile(values, 1 - survival)
    x, wanted = points[survival <= TAIL_START], np.log(survival[survival <= TAIL_START])
    slope, level = np.polyfit(x, wanted, 1)

    def normal(log_spread: float) -> tuple[NDArray[np.float64], float]:
        shape = np.log(2) + log_ndtr(-x / np.exp(log_spread))
        factor = float((wanted - shape).mean())
        return shape + factor - wanted, factor

    middle = float(np.log(x.mean()))
    best = minimize_scalar(
        lambda log_spread: float(np.square(normal(log_spread)[0]).sum()),
        bounds=(middle - 4, middle + 4),
        method="bounded",
    )
    misfit, factor = normal(float(best.x))
    return Tail(
        tuple(points.tolist()),
        tuple(survival.tolist()),
        float(-slope),
        float(level),
        float(np.sqrt(np.square(slope * x + level - wanted).mean()) / np.log(10)),
        float(np.exp(best.x)),
        factor,
        float(np.sqrt(np.square(misfit).mean()) / np.log(10)),
    )
