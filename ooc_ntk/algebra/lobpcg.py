"""Leading eigenpairs by SciPy's LOBPCG (Knyazev 2001), in rounds, with a tolerance for each eigenvalue of its own."""

from __future__ import annotations

import warnings
from typing import Final

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, lobpcg

from ooc_ntk.errors import InputError

from .dense import too_little_memory, usable_bytes
from .krylov import OVERSAMPLING, Counted, Product, Progress, RitzPairs, Search, column_norms, rounding_floor

#: Iterations of LOBPCG between looks at how far it came.
LOBPCG_ROUND: Final = 20

#: Blocks that LOBPCG holds: vectors, residuals, directions, their products, and copies. (Guessed from its source.)
LOBPCG_BLOCKS: Final = 14

#: Rows per column below which SciPy's LOBPCG would form the dense matrix.
LOBPCG_ROWS: Final = 5


def lobpcg_pairs(count: Counted, size: int, search: Search, buffer_bytes: int, memory: int | None) -> RitzPairs:
    """Leading pairs by SciPy's LOBPCG, in rounds, the tolerance of each from the eigenvalues of the last.

    Its own tolerance is one norm for all residuals; ours is a share of each eigenvalue.

    Args:
        count: the operator times (n, block) vectors.
        size: n.
        search: what is looked for.
        buffer_bytes: memory of the products' own.
        memory: bytes that may be taken for these and the blocks; None is a share of what is free.

    Returns:
        The pairs; residuals say how far they got where the passes were not enough.

    Raises:
        InputError: for a kernel so small that SciPy would form it.
        BudgetError: if its blocks do not fit the memory.
    """
    wanted = search.wanted
    if LOBPCG_ROWS * wanted > size:
        raise InputError(
            f"LOBPCG finds at most one in {LOBPCG_ROWS} of the eigenpairs, {size // LOBPCG_ROWS:,} of {size:,}, "
            f"got k={wanted}; use method='full' or 'krylov'"
        )
    width = min(wanted + OVERSAMPLING, size // LOBPCG_ROWS)
    needed = 8 * size * width * LOBPCG_BLOCKS + buffer_bytes
    if needed > usable_bytes(memory):
        what = f"LOBPCG of {wanted:,} eigenpairs of {size:,} rows"
        raise too_little_memory(what, needed, memory, "ask for fewer eigenpairs")
    vectors = np.linalg.qr(np.random.default_rng(search.seed).standard_normal((size, width)))[0]
    vectors = np.linalg.qr(count(vectors))[0]
    values, vectors, residuals = _rayleigh_ritz(count, vectors)
    scale = float(np.abs(values).max(initial=0.0)) or 1.0  # SciPy's inner products of a tiny kernel would underflow

    def product(given: NDArray[np.float64]) -> NDArray[np.float64]:
        return count(given) / scale

    operator = LinearOperator((size, size), matvec=product, matmat=product, dtype=np.float64)
    while True:
        floor = max(rounding_floor(size, float(np.abs(values).max(initial=0.0))), np.finfo(float).tiny)
        allowed = np.maximum(search.tolerance * np.abs(values[:wanted]), floor)
        done, worst = int((residuals[:wanted] <= allowed).sum()), float((residuals[:wanted] / allowed).max())
        search.advance(Progress(count.passes, done, wanted, worst))
        if done == wanted or count.passes >= search.max_passes:
            break
        with warnings.catch_warnings():
            # It ends a round short of its tolerance; ours is looked at above.
            warnings.simplefilter("ignore", UserWarning)
            rounds = min(LOBPCG_ROUND, search.max_passes - count.passes)
            _, vectors = lobpcg(operator, vectors, tol=float(allowed.min()) / scale, maxiter=rounds, largest=True)
        values, vectors, residuals = _rayleigh_ritz(count, np.linalg.qr(vectors)[0])
    return RitzPairs(values[:wanted], vectors[:, :wanted], residuals[:wanted], count.passes)


def _rayleigh_ritz(
    product: Product, vectors: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Ritz values (descending), Ritz vectors and residual norms of a subspace, by one product."""
    found = product(vectors)
    inner = vectors.T @ found
    values, coordinates = scipy.linalg.eigh((inner + inner.T) / 2, check_finite=False)
    values, coordinates = values[::-1], coordinates[:, ::-1]
    vectors, found = vectors @ coordinates, found @ coordinates
    return values, vectors, column_norms(found - vectors * values)
