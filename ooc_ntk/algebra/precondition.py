"""A preconditioner for kernel ridge regression: randomly pivoted Cholesky, shared by all ridges.

The partial Cholesky factor ``K ≈ F Fᵀ`` of few columns, drawn by the diagonal of what is left (Chen, Epperly, Tropp
and Webber 2022, arXiv 2207.06503; in blocks with rejection, Epperly, Tropp and Webber 2024, arXiv 2410.03969),
preconditions ``K + λI`` by ``F Fᵀ + λI`` (Díaz, Epperly, Frangella, Tropp and Webber 2023, arXiv 2304.12465).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from ooc_ntk.errors import InputError
from ooc_ntk.planning.solving import ROUND_COLUMNS, ROWS_AT_ONCE

from .entries import Entries

#: Mean eigenvalue, over the ridge, of what may be left of the kernel. (Measured: a dozen steps are then enough.)
ENOUGH: Final = 0.01

#: Share of the largest eigenvalue of FᵀF below which a direction is rounding (the square of float64's resolution of F).
NEGLIGIBLE: Final = 1e-14


@dataclass(frozen=True)
class Preconditioner:
    """``U diag(values) Uᵀ ≈ K``: applies powers of ``U diag(values) Uᵀ + λI`` for any ridge λ.

    Attributes:
        basis: (n, rank) float64.
        rotation: (rank, rank) float64; the columns of ``U = basis · rotation`` are orthonormal.
        values: (rank,) float64, at least 0: eigenvalues of the approximation.
        left: trace of what it leaves of the kernel.
        columns: kernel columns that were read.
    """

    basis: NDArray[np.float64]
    rotation: NDArray[np.float64]
    values: NDArray[np.float64]
    left: float
    columns: int

    @property
    def rank(self) -> int:
        """Columns of the basis."""
        return len(self.values)

    @property
    def outside(self) -> float:
        """Mean eigenvalue of the kernel outside the basis."""
        return self.left / max(1, len(self.basis) - self.rank)

    def apply(self, x: NDArray[np.float64], ridge: float, power: float) -> NDArray[np.float64]:
        """``(U diag(values) Uᵀ + ridge·I)^power x``.

        Args:
            x: (n, vectors).
            ridge: above 0.
            power: −1, −½ or ½.

        Returns:
            (n, vectors) float64.
        """
        return self.apply_known(x, self.coefficients(x), ridge, power)

    def coefficients(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """``Uᵀ x``, (rank, vectors)."""
        found: NDArray[np.float64] = self.rotation.T @ (self.basis.T @ x)
        return found

    def apply_known(
        self, x: NDArray[np.float64], coefficients: NDArray[np.float64], ridge: float, power: float
    ) -> NDArray[np.float64]:
        """:meth:`apply` to vectors whose :meth:`coefficients` are known."""
        outside = ridge**power
        weights = (self.values + ridge) ** power - outside
        found: NDArray[np.float64] = self.basis @ (self.rotation @ (weights[:, None] * coefficients))
        found += outside * x
        return found

    def inverse_trace(self, ridge: float) -> float:
        """Trace of the inverse at a ridge."""
        return float((1.0 / (self.values + ridge)).sum() + (len(self.basis) - self.rank) / ridge)

    def inverse_diagonal(self, ridge: float) -> NDArray[np.float64]:
        """Diagonal of the inverse at a ridge, (n,)."""
        found = np.full(len(self.basis), 1.0 / ridge)
        weights = 1.0 / (self.values + ridge) - 1.0 / ridge
        for start in range(0, len(self.basis), ROWS_AT_ONCE):
            vectors = self.basis[start : start + ROWS_AT_ONCE] @ self.rotation
            found[start : start + ROWS_AT_ONCE] += (vectors**2) @ weights
        return found


def pivoted_cholesky(
    entries: Entries,
    rank: int,
    *,
    ridge: float = 0.0,
    seed: int = 0,
    advance: Callable[[int, int], None] = lambda done, rank: None,  # noqa: ARG005
) -> Preconditioner:
    """Approximate the train square by randomly pivoted Cholesky.

    Rows of the kernel are read where they are chosen, without a checksum: a wrong one makes a worse preconditioner, not
    a wrong solution.

    Args:
        entries: of the kernel.
        rank: columns at most.
        ridge: stop once what is left has a mean eigenvalue of a hundredth of it, as more columns then save no steps.
        seed: of the choice of columns.
        advance: told the columns that are done, of how many.

    Returns:
        The preconditioner.

    Raises:
        InputError: if the kernel has a diagonal that is negative or not finite.
    """
    size = entries.size
    diagonal = entries.diagonal().astype(np.float64)
    if not np.isfinite(diagonal).all() or diagonal.min(initial=0.0) < -1e-6 * abs(diagonal).max(initial=0.0):
        raise InputError("the kernel's diagonal holds negative or non-finite entries: it is no Gram matrix; verify it")
    left = np.maximum(diagonal, 0.0)
    floor = np.finfo(np.float64).eps * left.sum() * size
    # Fortran order: a round appends columns, and what is filled so far is one contiguous matrix.
    factor = np.empty((size, min(rank, size)), order="F")
    done, read, random = 0, 0, np.random.default_rng(seed)
    while done < factor.shape[1] and left.sum() > max(ENOUGH * ridge * size, floor):
        count = min(ROUND_COLUMNS, factor.shape[1] - done)
        proposed = np.unique(random.choice(size, count, p=left / left.sum()))
        random.shuffle(proposed)
        rows = entries.rows(proposed)
        read += len(proposed)
        rows -= factor[proposed, :done] @ factor[:, :done].T
        kept, triangle = _accepted(rows[:, proposed], left[proposed], random)
        if not len(kept):
            continue
        fresh = scipy.linalg.solve_triangular(triangle, rows[kept], lower=True, check_finite=False)
        factor[:, done : done + len(kept)] = fresh.T
        left -= np.einsum("ij,ij->j", fresh, fresh)
        left[proposed[kept]] = 0.0
        np.maximum(left, 0.0, out=left)
        done += len(kept)
        advance(done, factor.shape[1])
    return _orthonormal(factor[:, :done], float(left.sum()), read)


def _accepted(
    square: NDArray[np.float64], weights: NDArray[np.float64], random: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Proposed columns that are kept, each with the share of its diagonal that the ones before it left.

    Args:
        square: (proposed, proposed) what is left of the kernel among them.
        weights: (proposed,) their diagonal when they were proposed.
        random: generator.

    Returns:
        Their places, and the (kept, kept) lower Cholesky factor of their square.
    """
    rest, kept, columns = square.copy(), [], []
    smallest = np.finfo(np.float64).eps * len(square) * max(float(weights.max(initial=0.0)), 0.0)
    for place in range(len(square)):
        pivot = rest[place, place]
        if pivot <= smallest or random.random() * weights[place] >= pivot:
            continue
        column = rest[:, place] / np.sqrt(pivot)
        rest -= np.outer(column, column)
        kept.append(place)
        columns.append(column)
    chosen = np.asarray(kept, dtype=np.int64)
    triangle = np.tril(np.asarray(columns).T[chosen]) if kept else np.empty((0, 0))
    return chosen, triangle


def _orthonormal(factor: NDArray[np.float64], left: float, columns: int) -> Preconditioner:
    """The factor as an orthonormal basis and eigenvalues, by two Cholesky-QR steps in the factor's own memory."""
    if not factor.shape[1]:
        empty = np.empty((len(factor), 0))
        return Preconditioner(empty, np.empty((0, 0)), np.empty(0), left, columns)
    values, vectors = scipy.linalg.eigh(factor.T @ factor, overwrite_a=True, check_finite=False, driver="evd")
    large = values > NEGLIGIBLE * values[-1]
    # First step: directions that are rounding go, the others become nearly orthonormal.
    basis = _times(factor, vectors[:, large] / np.sqrt(values[large]))
    # Second step: orthonormal to rounding (Yamamoto et al. 2015, CholeskyQR2), folded into a small matrix. At the edge
    # of rounding it turns directions a little against their eigenvalues, which a preconditioner may do.
    triangle = scipy.linalg.cholesky(basis.T @ basis, lower=False, overwrite_a=True, check_finite=False)
    rotation = scipy.linalg.solve_triangular(triangle, np.eye(len(triangle)), check_finite=False)
    return Preconditioner(basis, rotation, values[large], left, columns)


def _times(tall: NDArray[np.float64], small: NDArray[np.float64]) -> NDArray[np.float64]:
    """``tall @ small`` in the memory of ``tall``, some rows at a time."""
    width = small.shape[1]
    for start in range(0, len(tall), ROWS_AT_ONCE):
        tall[start : start + ROWS_AT_ONCE, :width] = tall[start : start + ROWS_AT_ONCE] @ small
    return tall[:, :width]
