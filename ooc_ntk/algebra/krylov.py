"""Leading eigenpairs of a symmetric operator by randomised block Krylov, one product per step for a whole block.

Block Lanczos from a random block (Musco and Musco 2015, arXiv 1504.05477) with full reorthogonalisation, restarted with
the leading Ritz vectors where memory ends (thick restart, Wu and Simon 2000, SIAM J. Matrix Anal. Appl. 22, 602).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

Product = Callable[[NDArray[np.float64]], NDArray[np.float64]]

#: A pair is done when its residual is at most this share of its own eigenvalue, which is then as accurate at least.
#: (A choice: eigenvalues are then off by about its square; 1e-6 saves one pass of nine.)
TOLERANCE: Final = 1e-8

#: Passes after which a computation ends as it is. (A choice: kernels took 4 to 25.)
MAX_PASSES: Final = 200

#: Columns of the block beyond the wanted eigenpairs. (Measured for 50 of 1,000 whose values fall as i^-1 and i^-0.5:
#: ten save one pass of twelve against none, twenty at most another one.)
OVERSAMPLING: Final = 10

#: Largest block. (A choice: from here on a pass over tiles on disk is bound by the products; smaller blocks then need
#: fewer of them.)
LARGEST_BLOCK: Final = 128

#: Blocks of the largest basis. (A choice: more would hardly be needed, and T is decomposed after each pass.)
LARGEST_BLOCKS: Final = 12

#: Blocks held beside the basis: one that is multiplied, its product, and what becomes of them; two more of a view.
BESIDE: Final = 6

#: Blocks of the smallest basis that makes progress beside the wanted eigenpairs: one that is kept, one that is new.
SMALLEST_BLOCKS: Final = 2

#: Ritz vectors that are kept at a restart beside the wanted ones, in blocks. (A choice.)
KEPT_BLOCKS: Final = 1

#: Relative size below which what is left of a direction once the basis is taken out of it is rounding: of the largest
#: eigenvalue, times the root of the size. (Guessed; sums in float64 are known to lose about this much.)
ROUNDING: Final = 4 * float(np.finfo(np.float64).eps)

#: Rows of the basis that are rotated at once in a restart, in place.
ROTATED_ROWS: Final = 4096


class Counted:
    """Products with the kernel, each a pass over it."""

    def __init__(self, product: Product) -> None:
        self._product = product
        self.passes = 0

    def __call__(self, vectors: NDArray[np.float64]) -> NDArray[np.float64]:
        """The kernel times some vectors."""
        self.passes += 1
        return self._product(vectors)


@dataclass(frozen=True)
class Progress:
    """Where a computation of eigenpairs is.

    Attributes:
        passes: over the kernel so far.
        converged: eigenpairs within the tolerance.
        wanted: eigenpairs that are wanted.
        residual: largest residual of a wanted pair, over its own eigenvalue or the rounding floor, in units of the
            tolerance: at most 1 when all is done.
    """

    passes: int
    converged: int
    wanted: int
    residual: float


@dataclass(frozen=True)
class Search:
    """What is looked for, and for how long.

    Attributes:
        wanted: eigenpairs, at most as many as rows.
        tolerance: a pair is done when its residual is at most this share of its own eigenvalue, or rounding.
        max_passes: products at most.
        seed: of the random start.
        advance: told after each look at the residuals.
    """

    wanted: int
    tolerance: float
    max_passes: int
    seed: int
    advance: Callable[[Progress], None]


@dataclass(frozen=True)
class RitzPairs:
    """What was found.

    Attributes:
        values: (k,) float64, descending.
        vectors: (n, k) float64, orthonormal.
        residuals: (k,) norms of ``K v − μ v``, from the recurrence.
        passes: products that were formed.
    """

    values: NDArray[np.float64]
    vectors: NDArray[np.float64]
    residuals: NDArray[np.float64]
    passes: int


def block_width(size: int, wanted: int) -> int:
    """Columns of a block: a few more than wanted, so that no eigenvalue is missed for its multiplicity.

    >>> block_width(10_000, 50), block_width(10_000, 1000), block_width(20, 18)
    (60, 128, 20)
    """
    return min(size, wanted + OVERSAMPLING, LARGEST_BLOCK)


def basis_columns(size: int, wanted: int, memory: int) -> int:
    """Columns of the basis that fit a memory, at most as many as are of use.

    Args:
        size: n.
        wanted: eigenpairs.
        memory: bytes for the basis, its projection, blocks beside it and the eigenvectors.

    Returns:
        Columns, or a number below :func:`smallest_basis` if too few fit.
    """
    block = block_width(size, wanted)
    most = min(size, wanted + LARGEST_BLOCKS * block)
    left = memory - 8 * size * (BESIDE * block + wanted)
    return max(0, min(most, left // (8 * size + 4 * 8 * most)))


def basis_bytes(size: int, wanted: int, columns: int) -> int:
    """Memory that a basis of so many columns takes with all beside it: what :func:`basis_columns` counts."""
    block = block_width(size, wanted)
    most = min(size, wanted + LARGEST_BLOCKS * block)
    return 8 * size * (BESIDE * block + wanted) + columns * (8 * size + 4 * 8 * most)


def smallest_basis(size: int, wanted: int) -> int:
    """Columns without which a restart would make no progress.

    >>> smallest_basis(10_000, 50), smallest_basis(20, 18)
    (170, 20)
    """
    return min(size, wanted + SMALLEST_BLOCKS * block_width(size, wanted))


def rounding_floor(size: int, largest: float) -> float:
    """Residual of an eigenpair below which only rounding is seen."""
    return ROUNDING * largest * float(np.sqrt(size))


def column_norms(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Euclidean norms of columns, also of such whose squares underflow.

    >>> column_norms(np.array([[3e-200], [4e-200]])).tolist()
    [5e-200]
    """
    largest = float(np.abs(columns).max(initial=0.0))
    if largest == 0:
        return np.zeros(columns.shape[1])
    return np.asarray(np.linalg.norm(columns / largest, axis=0) * largest)


def block_krylov(product: Product, size: int, search: Search, columns: int) -> RitzPairs:
    """Leading eigenpairs of a symmetric positive semi-definite operator (also of one that is nearly so).

    Args:
        product: the operator times (n, block) vectors.
        size: n.
        search: what is looked for.
        columns: of the basis, at least :func:`smallest_basis`; more are never held.

    Returns:
        The pairs; residuals say how far they got where the passes were not enough.
    """
    wanted = search.wanted
    basis = _Basis(size, columns, search.seed)
    block = block_width(size, wanted)
    basis.append(basis.random(block))
    for passes in range(1, search.max_passes + 1):
        basis.expand(product)
        values, inner, residuals = basis.ritz(wanted)
        largest = float(np.abs(values).max(initial=0.0))
        floor = max(rounding_floor(size, largest), float(np.finfo(np.float64).tiny))
        allowed = np.maximum(search.tolerance * np.abs(values), floor)
        done = int((residuals <= allowed).sum()) if len(values) == wanted else 0
        worst = float((residuals / allowed).max()) if len(values) == wanted else float("inf")
        search.advance(Progress(passes, done, wanted, worst))
        if done == wanted or passes == search.max_passes:
            break
        if basis.filled + basis.next_width > columns:
            basis.restart(wanted + KEPT_BLOCKS * block)
        basis.take_next(block)
    return RitzPairs(values, basis.rotated(inner), residuals, passes)


class _Basis:
    """An orthonormal basis Q, its projection T = QᵀKQ, and what K leads out of it: K Q = Q T + Q' B.

    B has columns of the newest block alone, as all blocks before it lead into it; T of the block Q' that comes next is
    computed when that is multiplied, with its coupling to all that was there.
    """

    def __init__(self, size: int, columns: int, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._all = np.empty((size, columns), order="F")
        self._projection = np.zeros((columns, columns))
        self._size, self._newest = size, range(0)
        self.filled = 0
        self._next = np.empty((size, 0))
        self._coupling = np.empty((0, 0))
        self._largest = 0.0

    @property
    def next_width(self) -> int:
        """Columns of the block that comes next."""
        return int(self._next.shape[1])

    def random(self, width: int) -> NDArray[np.float64]:
        """An orthonormal block of random directions outside the basis."""
        drawn = self._random.standard_normal((self._size, width))
        return self._outside(drawn, rounds=2)

    def append(self, block: NDArray[np.float64]) -> None:
        """Take an orthonormal block into the basis; it is not multiplied yet."""
        start, stop = self.filled, self.filled + block.shape[1]
        self._all[:, start:stop] = block
        self._newest, self.filled = range(start, stop), stop

    def expand(self, product: Product) -> None:
        """Multiply the newest block, complete the projection, and find the directions that lead out of the basis."""
        newest = slice(self._newest.start, self._newest.stop)
        found = product(np.ascontiguousarray(self._all[:, newest]))
        held = self._all[:, : self.filled]
        inner = held.T @ found
        found -= held @ inner
        again = held.T @ found
        found -= held @ again
        inner += again
        # Within the block both triangles were computed; before it, the transpose is the same to rounding.
        inner[newest] = (inner[newest] + inner[newest].T) / 2
        self._projection[: self.filled, newest] = inner
        self._projection[newest, : self.filled] = inner.T
        self._largest = max(self._largest, float(np.linalg.norm(inner[newest], 2)))
        # Directions by size, so that those that are rounding can be told and left out.
        left, sizes, right = scipy.linalg.svd(found, full_matrices=False, overwrite_a=True, check_finite=False)
        kept = int((sizes > rounding_floor(self._size, self._largest)).sum())
        kept = min(kept, self._size - self.filled)
        self._next = self._outside(left[:, :kept], rounds=1)
        self._coupling = sizes[:kept, None] * right[:kept]

    def ritz(self, wanted: int) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Leading Ritz values (descending), their coordinates in the basis, and their residuals."""
        values, inner = scipy.linalg.eigh(self._projection[: self.filled, : self.filled], check_finite=False)
        values, inner = values[::-1][:wanted], inner[:, ::-1][:, :wanted]
        leads_out = self._coupling @ inner[self._newest.start : self._newest.stop]
        return values, inner, column_norms(leads_out)

    def rotated(self, inner: NDArray[np.float64]) -> NDArray[np.float64]:
        """Vectors of some coordinates in the basis, (n, vectors)."""
        return np.asarray(self._all[:, : self.filled] @ inner)

    def restart(self, keep: int) -> None:
        """Keep only leading Ritz vectors; what leads out of the basis is the same, in their coordinates."""
        keep = min(keep, self._all.shape[1] - self.next_width, self.filled)
        values, inner, _ = self.ritz(keep)
        self._coupling = self._coupling @ inner[self._newest.start : self._newest.stop]
        for start in range(0, self._size, ROTATED_ROWS):
            rows = slice(start, start + ROTATED_ROWS)
            self._all[rows, :keep] = self._all[rows, : self.filled] @ inner
        self._projection[:] = 0.0
        self._projection[np.arange(keep), np.arange(keep)] = values
        self._newest, self.filled = range(keep), keep

    def take_next(self, width: int) -> None:
        """Append the block that leads out of the basis, filled up with random directions where it became narrower.

        Where the basis spans an invariant subspace, random directions find what it lacks: eigenvalues of a higher
        multiplicity than the block is wide, or zeros.
        """
        before, block = self.filled, self._next
        self.append(block)
        more = min(width, self._size - before, self._all.shape[1] - before) - block.shape[1]
        if more > 0:
            self.append(self.random(more))
            self._newest = range(before, self.filled)

    def _outside(self, block: NDArray[np.float64], rounds: int) -> NDArray[np.float64]:
        """Orthonormal columns that span what a block of full rank has outside the basis."""
        held = self._all[:, : self.filled]
        for _ in range(rounds):
            block = block - held @ (held.T @ block)
            block = scipy.linalg.qr(block, mode="economic", overwrite_a=True, check_finite=False)[0]
        return block
