"""The spectrum of a kernel: eigenpairs, how they decay, how targets lie along them, how many of them a ridge leaves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ooc_ntk.errors import InputError

from .krylov import rounding_floor
from .powerlaw import Exponent, fit_power_law

#: Leading share of a complete spectrum that is fitted: what follows is bent down, as the samples end. (Seen on networks
#: over digits, where the bend begins at about 0.3.)
FITTED_SHARE: Final = 0.25

#: Share of a target's energy below which its tail is rounding of the sums it is left over from. (Guessed.)
TAIL_ROUNDING: Final = 1e-12


class Bounds(NamedTuple):
    """What a quantity lies between; both are the same where it is known.

    Attributes:
        lower: it is at least this.
        upper: it is at most this.
    """

    lower: float
    upper: float


@dataclass(frozen=True)
class TargetAlignment:
    """How targets lie along the eigenvectors of a kernel.

    Attributes:
        shares: (k,) float64, ``Σ_t (v_iᵀ y_t)² / ‖Y‖²`` of each eigenvector, summed over the targets t.
        complete: whether the eigenvectors span everything, so that the shares sum up to 1.
    """

    shares: NDArray[np.float64]
    complete: bool

    @property
    def cumulative(self) -> NDArray[np.float64]:
        """(k,) share of the energy in the first eigenvectors, up to and with each (Canatar et al. 2021: C(ρ))."""
        return np.cumsum(self.shares)

    @property
    def tail(self) -> NDArray[np.float64]:
        """(k,) share of the energy beyond each eigenvector, ``Σ_{j>i}``; of what is not known as what is left over."""
        if self.complete:
            return np.append(np.cumsum(self.shares[:0:-1])[::-1], 0.0)
        return np.maximum(0.0, 1.0 - self.cumulative)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Leading eigenpairs of the train square of a kernel, or all of them; ``values, vectors = kernel.eigh(50)``.

    Attributes:
        values: (k,) float64, descending.
        vectors: (n, k) float64, orthonormal columns.
        residuals: (k,) float64, ``‖K v − μ v‖`` over the largest eigenvalue: some eigenvalue is no further off.
        trace: of the whole square, from its diagonal.
        size: n, rows of the square.
        method: what found them: ``full``, ``krylov`` or ``lobpcg``.
        passes: over the kernel.
        tolerance: that was asked for, of a residual over its own eigenvalue.
        resolution: unit roundoff of the stored entries: eigenvalues below this share of the largest are rounding.
    """

    values: NDArray[np.float64]
    vectors: NDArray[np.float64]
    residuals: NDArray[np.float64]
    trace: float
    size: int
    method: str
    passes: int
    tolerance: float
    resolution: float

    def __iter__(self) -> Iterator[NDArray[np.float64]]:
        """Values, then vectors, as NumPy's ``eigh`` returns them (but descending)."""
        return iter((self.values, self.vectors))

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        return (
            f"<Spectrum {len(self):,} of {self.size:,} eigenpairs by {self.method}, {self.explained:.1%} of the trace, "
            f"{self.passes} passes>"
        )

    @property
    def complete(self) -> bool:
        """Whether all eigenpairs are there."""
        return len(self.values) == self.size

    @property
    def explained(self) -> float:
        """Share of the trace that these eigenvalues make up; 1 of a kernel of zeros."""
        return float(self.values.sum()) / self.trace if self.trace > 0 else 1.0

    @property
    def within_tolerance(self) -> int:
        """Eigenpairs whose residual is within the tolerance, or at the rounding of the products."""
        largest = float(np.abs(self.values).max(initial=0.0))
        # A measured residual holds the rounding of the decomposition and of the check.
        floor = 4 * rounding_floor(self.size, largest)
        return int((self.residuals * largest <= np.maximum(self.tolerance * np.abs(self.values), floor)).sum())

    @property
    def converged(self) -> bool:
        """Whether all eigenpairs are within the tolerance."""
        return self.within_tolerance == len(self.values)

    def decay(self, window: tuple[int, int] | None = None) -> Exponent:
        """The exponent α of ``μ_i ~ i^−α``, by least squares of ``log μ_i`` on ``log i``.

        This is the capacity of Cui et al. 2021 (arXiv 2105.15004); Wei, Hu and Steinhardt 2022 (arXiv 2203.06176) fit
        empirical kernels of networks likewise.

        Args:
            window: first and last rank, counted from 1, both taken; None leaves out the first tenth or ten ranks,
                eigenvalues that are rounding of the entries, and of a complete spectrum the last three quarters.

        Raises:
            InputError: if fewer than three ranks are left, or the window is outside the spectrum.
        """
        return fit_power_law(self.values, "the eigenvalues", window, self._usable())

    def _usable(self) -> int:
        """Leading ranks whose eigenvalues are above rounding, and not at the end of the samples."""
        largest = float(self.values.max(initial=0.0))
        below = self.values <= max(self.resolution * largest, rounding_floor(self.size, largest))
        count = int(np.argmax(below)) if below.any() else len(self.values)
        return min(count, max(1, int(FITTED_SHARE * self.size))) if self.complete else count

    def alignment(self, y: ArrayLike) -> TargetAlignment:
        """How targets lie along the eigenvectors.

        Args:
            y: (n,) or (n, targets); centre them first if the kernel is centred.

        Returns:
            Shares of the targets' energy by eigenvector.

        Raises:
            InputError: for targets of another length, without energy, or not finite.
        """
        targets = np.asarray(y, dtype=np.float64)
        if targets.ndim not in (1, 2) or targets.shape[0] != self.size:
            raise InputError(
                f"y must have {self.size:,} rows, one per train row of the kernel, got shape {targets.shape}"
            )
        if not np.isfinite(targets).all():
            raise InputError("y holds NaN or infinity")
        energy = float((targets**2).sum())
        if energy == 0:
            raise InputError("y is zero everywhere: there is no energy to be shared")
        along = self.vectors.T @ targets.reshape(self.size, -1)
        return TargetAlignment((along**2).sum(1) / energy, self.complete)

    def target_exponent(self, y: ArrayLike, window: tuple[int, int] | None = None) -> Exponent:
        """The exponent β of the target's tail, ``Σ_{j>i} Σ_t (v_jᵀ y_t)² ~ i^−β``, by least squares in logarithms.

        The energy beyond rank i is what no predictor in the span of the first i eigenvectors can fit. In the source and
        capacity conditions of Cui et al. 2021 (arXiv 2105.15004), where the energy along eigenvector i falls as
        ``i^−(1+2αr)``, ``β = 2αr``, so that the source is ``r = β/(2α)`` with α of :meth:`decay`. The pair (α, β) is
        what the scaling of the risk by GCV is explained with in Wei, Hu and Steinhardt 2022 (arXiv 2203.06176).
        Empirical eigenvectors stand for eigenfunctions; noise in the targets (labels that are wrong) flattens the tail.

        Args:
            y: (n,) or (n, targets).
            window: first and last rank, counted from 1, both taken; None as for :meth:`decay`, and where the tail ends.

        Raises:
            InputError: as :meth:`decay` and :meth:`alignment`.
        """
        tail = self.alignment(y).tail
        ended = tail <= TAIL_ROUNDING
        usable = min(self._usable(), int(np.argmax(ended)) if ended.any() else len(tail))
        return fit_power_law(tail, "the target's tail", window, usable)

    def effective_dimension(self, ridge: float) -> Bounds:
        """Effective dimension ``Σ_i μ_i/(μ_i + ridge)``, the trace of ``K (K + ridge·I)⁻¹``.

        Of an incomplete spectrum between bounds: the n − k eigenvalues that are not known lie in ``[0, μ_k]`` and sum
        up to the rest R of the trace. As ``μ/(μ + ridge)`` is concave, they add least where R lies in eigenvalues of
        size μ_k, ``R/(μ_k + ridge)``, and most where it is spread evenly, ``(n − k)·R/(R + (n − k)·ridge)``. (Negative
        eigenvalues, which rounding makes, count as 0.)

        Args:
            ridge: absolute, above 0.

        Raises:
            InputError: for a ridge that is not above 0.
        """
        if not ridge > 0 or not np.isfinite(ridge):
            raise InputError(f"the ridge of an effective dimension must be above 0, got {ridge}")
        values = np.maximum(self.values, 0.0)
        known = float((values / (values + ridge)).sum())
        left, last = self.size - len(values), float(values[-1])
        if left == 0:
            return Bounds(known, known)
        rest = min(max(0.0, self.trace - float(self.values.sum())), left * last)
        return Bounds(known + rest / (last + ridge), known + left * rest / (rest + left * ridge))
