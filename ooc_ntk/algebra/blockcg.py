"""Block conjugate gradients for ``(K + λI) X = Y``: all targets share a Krylov space, many ridges share every pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from ooc_ntk.errors import InputError

from .precondition import Preconditioner

#: How often a system is restarted with its true residual where rounding kept the recurrence's from being it.
RESTARTS: Final = 3

#: Backward error, in units of float64's resolution, that counts as rounding (a choice: products of n terms).
BACKWARD: Final = 100.0

#: Share of the mean eigenvalue outside the preconditioner's basis that it adds to the ridge (measured on digits: 0.3
#: saves 7% of the steps at a ridge of 1e-3 of the mean diagonal, and 29% at 1e-6; 1 saves 3 and 25%).
OUTSIDE: Final = 0.3


class NotPositiveDefiniteError(InputError):
    """The matrix has a direction in which it is not positive.

    Attributes:
        ridge: of the system.
    """

    def __init__(self, message: str, ridge: float = 0.0) -> None:
        """Say what was found, and for which ridge."""
        super().__init__(message)
        self.ridge = ridge


class TooSlowError(InputError):
    """The steps that are left are more than it pays to make."""


class BlockSystem:
    """One system ``(K + λI) X = Y`` on its way to a solution.

    Dubrulle's block conjugate gradients with orthonormal residual blocks (2001, Electronic Transactions on Numerical
    Analysis 12, algorithm BCGrQ), which survive targets that depend on each other; preconditioned from both sides by
    ``(F Fᵀ + (λ + σ)I)^-½``, σ a share of the mean eigenvalue that F leaves.

    Attributes:
        solution: (n, targets) so far.
        ridge: λ.
        iterations: products with K so far.
        residuals: (targets,) ``‖r‖ / ‖y‖`` by the recurrence.
    """

    def __init__(
        self, targets: NDArray[np.float64], ridge: float, preconditioner: Preconditioner | None, tolerance: float
    ) -> None:
        """Begin at zero.

        Args:
            targets: (n, targets).
            ridge: at least 0; above 0 with a preconditioner.
            preconditioner: what approximates K; None for plain conjugate gradients.
            tolerance: relative residual that is wanted of every target.
        """
        self.ridge, self.iterations, self._tolerance = ridge, 0, tolerance
        self._preconditioner = preconditioner if preconditioner is not None and preconditioner.rank else None
        self._norms = np.linalg.norm(targets, axis=0)
        self.solution = np.zeros_like(targets)
        self.residuals = np.where(self._norms > 0, 1.0, 0.0)
        self._begin(targets)

    def _begin(self, residual: NDArray[np.float64]) -> None:
        scaled = residual
        if self._preconditioner is not None:
            scaled = self._preconditioner.apply(residual, self._shifted, -0.5)
        self._rest, self._weights = np.linalg.qr(scaled)
        self._given, _ = self._scaled_rest()

    @property
    def _shifted(self) -> float:
        """Ridge of the preconditioner."""
        assert self._preconditioner is not None
        return self.ridge + OUTSIDE * self._preconditioner.outside

    def _scaled_rest(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The residual block scaled by the preconditioner, and norms of the targets' residuals.

        These are of ``M^½ Q W``, Q orthonormal: from its coefficients in the preconditioner's basis and from W alone.
        """
        own = np.linalg.norm(self._weights, axis=0)
        if self._preconditioner is None:
            return self._rest, own
        coefficients = self._preconditioner.coefficients(self._rest)
        given = self._preconditioner.apply_known(self._rest, coefficients, self._shifted, -0.5)
        inside = self._preconditioner.values @ (coefficients @ self._weights) ** 2
        return given, np.sqrt(self._shifted * own**2 + inside)

    @property
    def rank(self) -> int:
        """Columns of the preconditioner."""
        return 0 if self._preconditioner is None else self._preconditioner.rank

    @property
    def done(self) -> bool:
        """Whether every target reached the tolerance."""
        return bool((self.residuals <= self._tolerance).all())

    @property
    def directions(self) -> NDArray[np.float64]:
        """(n, targets) what is to be multiplied by K next."""
        return self._given

    def advance(self, product: NDArray[np.float64]) -> None:
        """One step, given K times the directions.

        Raises:
            NotPositiveDefiniteError: if the matrix is not positive in some direction.
        """
        self.iterations += 1
        image = product + self.ridge * self._given
        square = self._given.T @ image
        try:
            factor = scipy.linalg.cho_factor((square + square.T) / 2, check_finite=True)
        except (np.linalg.LinAlgError, ValueError) as error:
            raise NotPositiveDefiniteError(f"K + {self.ridge:g}·I is not positive definite", self.ridge) from error
        self.solution += self._given @ scipy.linalg.cho_solve(factor, self._weights)
        if self._preconditioner is not None:
            image = self._preconditioner.apply(image, self._shifted, -0.5)
        inverse = scipy.linalg.cho_solve(factor, np.eye(len(square)))
        self._rest, change = np.linalg.qr(self._rest - image @ inverse)
        self._weights = change @ self._weights
        fresh, left = self._scaled_rest()
        # Scaling is linear: directions are kept scaled, and never without.
        self._given = fresh + self._given @ change.T
        self.residuals = np.divide(left, self._norms, out=np.zeros_like(left), where=self._norms > 0)

    def is_rounding(self, targets: NDArray[np.float64], largest: float) -> bool:
        """Whether what is left is what rounding leaves: a backward error of float64's resolution (Higham 2002, ch. 7).

        Args:
            targets: (n, targets).
            largest: a bound of K's largest eigenvalue.
        """
        left = self.residuals * self._norms
        norms = (largest + self.ridge) * np.linalg.norm(self.solution, axis=0) + np.linalg.norm(targets, axis=0)
        return bool((left <= BACKWARD * np.finfo(np.float64).eps * norms).all())

    def correct(self, residual: NDArray[np.float64]) -> None:
        """Go on from the true residual of the solution, where rounding keeps the recurrence's from being it."""
        left = np.linalg.norm(residual, axis=0)
        self.residuals = np.divide(left, self._norms, out=np.zeros_like(left), where=self._norms > 0)
        if not self.done:
            self._begin(residual)


def solve_systems(
    product: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    systems: Sequence[BlockSystem],
    targets: NDArray[np.float64],
    *,
    iterations: int,
    advance: Callable[[float], None] = lambda residual: None,  # noqa: ARG005
) -> int:
    """Bring systems of one kernel and several ridges to their solutions, every pass over the kernel for all of them.

    Args:
        product: K times (n, vectors).
        systems: each begun with the same targets.
        targets: (n, targets).
        iterations: most steps of a system.
        advance: told the largest residual after every step.

    Returns:
        Passes over the kernel, those that compute the true residuals included.

    Raises:
        NotPositiveDefiniteError: if the matrix is not positive in some direction.
    """
    passes, width = 0, targets.shape[1]
    for _ in range(RESTARTS):
        while open_systems := [each for each in systems if not each.done and each.iterations < iterations]:
            blocks = [each.directions for each in open_systems]
            found = product(np.concatenate(blocks, axis=1))
            passes += 1
            # Of more targets than rows a block has as many columns as rows.
            stops = np.cumsum([block.shape[1] for block in blocks])
            for system, image in zip(open_systems, np.split(found, stops[:-1], axis=1), strict=True):
                system.advance(np.ascontiguousarray(image))
            advance(max(float(each.residuals.max(initial=0.0)) for each in systems))
        found = product(np.concatenate([each.solution for each in systems], axis=1))
        passes += 1
        for number, system in enumerate(systems):
            image = found[:, number * width : (number + 1) * width] + system.ridge * system.solution
            system.correct(targets - image)
        if all(each.done or each.iterations >= iterations for each in systems):
            break
    return passes
