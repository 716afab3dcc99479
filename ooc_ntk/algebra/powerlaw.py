"""Power laws by least squares in logarithms: a slope, its standard error, and over which ranks it was fitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ooc_ntk.errors import InputError

#: Points without which no power law is fitted: two make a line of any data.
FEWEST_POINTS: Final = 3

#: Leading ranks that are left out unless a window is given, at most, and at most this share of all: the first
#: eigenvalues of a kernel are outliers of the law that the others follow. (Guessed from spectra of trained networks.)
LEADING_RANKS: Final = 10
LEADING_SHARE: Final = 0.1


@dataclass(frozen=True)
class Exponent:
    """A power law ``scale · i^−value``, fitted over some ranks.

    Attributes:
        value: the exponent, positive where the quantity decays.
        error: its standard error by ordinary least squares; neighbouring ranks are not independent, so that it says how
            straight the line is and not how well another sample of data would repeat it.
        window: first and last rank of the fit, both counted from 1 and both taken.
        r2: share of the variance of the logarithms that the law explains.
        scale: the law's value at rank 1.
    """

    value: float
    error: float
    window: tuple[int, int]
    r2: float
    scale: float

    def at(self, ranks: NDArray[np.float64] | NDArray[np.int64]) -> NDArray[np.float64]:
        """The law at some ranks, counted from 1."""
        return np.asarray(self.scale * np.asarray(ranks, dtype=np.float64) ** -self.value)

    def figures(self) -> dict[str, object]:
        """Its numbers by name."""
        return {
            "value": self.value,
            "error": self.error,
            "first": self.window[0],
            "last": self.window[1],
            "r2": self.r2,
            "scale": self.scale,
        }


def fit_power_law(quantity: NDArray[np.float64], what: str, window: tuple[int, int] | None, usable: int) -> Exponent:
    """Fit ``quantity[i − 1] ≈ scale · i^−value``.

    Args:
        quantity: by rank, rank 1 first.
        what: names it in errors.
        window: first and last rank, counted from 1, both taken; None is all to ``usable`` but the leading ranks.
        usable: ranks that mean something.

    Returns:
        The exponent.

    Raises:
        InputError: for a window outside the ranks or with fewer than three of them, or numbers that are not positive.
    """
    if window is None:
        first, last = 1 + min(LEADING_RANKS, int(LEADING_SHARE * usable)), usable
    else:
        first, last = _checked(window, len(quantity))
    if last - first + 1 < FEWEST_POINTS:
        raise InputError(
            f"a power law of {what} needs {FEWEST_POINTS} ranks at least, got {max(0, last - first + 1)} that are "
            "above rounding; ask for more eigenpairs, or give a window"
        )
    ranks = np.arange(first, last + 1)
    chosen = quantity[first - 1 : last]
    if not (chosen > 0).all():
        rank = first + int(np.argmax(chosen <= 0))
        raise InputError(
            f"a power law of {what} ends before rank {rank}, where it is not positive; take a window before"
        )
    x, y = np.log(ranks), np.log(chosen)
    centred = x - x.mean()
    spread = float(centred @ centred)
    slope = float(centred @ (y - y.mean())) / spread
    left = y - y.mean() - slope * centred
    rest, total = float(left @ left), float(((y - y.mean()) ** 2).sum())
    return Exponent(
        value=-slope,
        error=float(np.sqrt(rest / (len(x) - 2) / spread)),
        window=(int(first), int(last)),
        r2=1.0 - rest / total if total > 0 else 1.0,
        scale=float(np.exp(y.mean() - slope * x.mean())),
    )


def _checked(window: tuple[int, int], count: int) -> tuple[int, int]:
    """A window that lies within the ranks.

    Raises:
        InputError: if it does not.
    """
    try:
        first, last = (int(rank) for rank in window)
    except (TypeError, ValueError) as error:
        raise InputError(f"a window is its first and its last rank, (10, 100), got {window!r}") from error
    if not 1 <= first < last <= count:
        raise InputError(f"a window is two ranks from 1 to {count:,}, the first one smaller, got {window!r}")
    return first, last
