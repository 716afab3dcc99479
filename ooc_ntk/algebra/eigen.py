"""Eigenpairs of a kernel's train square: of all of it in memory, or the leading ones by products alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from ooc_ntk.errors import InputError, unknown_name
from ooc_ntk.units import parse_bytes

from .dense import dense_square, square_bytes, too_little_memory, usable_bytes
from .entries import Entries, ViewEntries
from .krylov import (
    MAX_PASSES,
    Counted,
    Product,
    Progress,
    RitzPairs,
    Search,
    basis_bytes,
    basis_columns,
    block_krylov,
    column_norms,
    smallest_basis,
)
from .lobpcg import lobpcg_pairs
from .spectrum import Spectrum

if TYPE_CHECKING:
    from .multiplying import MultipliedKernel

METHODS: Final = ("auto", "full", "krylov", "lobpcg")

#: Up to this many rows the dense square is decomposed. (Measured: 50 pairs of 3,000 rows take 0.8 s either way, of
#: 1,500 rows 0.2 s and by block Krylov 0.6 s.)
SMALL: Final = 3000

#: Share of the rows above which the dense square is decomposed for the wanted pairs. (Measured: 240 pairs of 4,800 rows
#: take 4.6 s so and 8.5 s by block Krylov, 50 pairs 7.0 s and 3.2 s.)
LARGE_SHARE: Final = 0.05

#: Matrices of the square's size that LAPACK's drivers hold, the square among them. (Measured at 3,000 rows: 3.12 of all
#: pairs by divide and conquer, which is twice as fast as by MRRR, 2.22; 1.1 and the vectors of some.)
ALL_COPIES: Final = 3.2
SOME_COPIES: Final = 1.2

#: Share of the pairs from which divide and conquer of all is faster than MRRR of some. (Measured: 1,000 of 3,000 rows
#: take 1.7 s by MRRR, all take 1.9 s by divide and conquer.)
EVERY_SHARE: Final = 0.4


def eigh(
    kernel: MultipliedKernel,
    k: int | None,
    *,
    method: str,
    tolerance: float,
    memory: int | str | None,
    seed: int,
    device: str,
    advance: Callable[[Progress], None] | None,
) -> Spectrum:
    """Eigenpairs of the train square; see :meth:`~ooc_ntk.algebra.operator.MultipliedKernel.eigh`."""
    entries, size = kernel.entries, kernel.shape[1]
    allowed = memory if memory is None or memory == 0 else parse_bytes(memory)
    _check(k, size, method, tolerance)
    wanted = size if k is None else int(k)
    chosen = _method(entries, k, method, usable_bytes(allowed))
    search = Search(wanted, tolerance, MAX_PASSES, seed, advance or _silent)
    count = Counted(lambda vectors: kernel.matmat(vectors, device=device))
    if chosen == "full":
        found = _full(entries, wanted, allowed, count)
        search.advance(Progress(found.passes, wanted, wanted, 0.0))
    elif chosen == "krylov":
        columns = basis_columns(size, wanted, usable_bytes(allowed) - entries.buffer_bytes)
        _check_basis(entries, wanted, columns, allowed)
        found = block_krylov(count, size, search, columns)
    else:
        found = lobpcg_pairs(count, size, search, entries.buffer_bytes, allowed)
    largest = float(np.abs(found.values).max(initial=0.0))
    spectrum = Spectrum(
        values=found.values,
        vectors=found.vectors,
        residuals=found.residuals / (largest or 1.0),
        trace=float(entries.diagonal().sum()),
        size=size,
        method=chosen,
        passes=found.passes,
        tolerance=tolerance,
        resolution=_resolution(entries),
    )
    if not spectrum.converged:
        short = wanted - spectrum.within_tolerance
        warnings.warn(
            f"{short} of {wanted} eigenpairs are not within the tolerance of {tolerance:g} after {found.passes} passes "
            f"({chosen}): the largest residual is {spectrum.residuals.max():.1e} of the largest eigenvalue, and no "
            "eigenvalue is further than its residual from a true one; ask for fewer, raise the tolerance or the memory",
            RuntimeWarning,
            stacklevel=3,
        )
    return spectrum


def _silent(progress: Progress) -> None:
    """Tell nobody."""


def _check(k: int | None, size: int, method: str, tolerance: float) -> None:
    """Refuse what cannot be meant.

    Raises:
        InputError: for a wrong number, word or tolerance.
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    if not 0 < tolerance < 1:
        raise InputError(f"tolerance must be above 0 and below 1, a share of an eigenvalue, got {tolerance}")
    if k is None:
        if method in ("krylov", "lobpcg"):
            raise InputError(f"method {method!r} finds leading eigenpairs; say how many: k=50")
        return
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= size:
        raise InputError(f"k must be a whole number from 1 to {size:,}, the rows of the train square, got {k!r}")


def _method(entries: Entries, k: int | None, method: str, allowed: int) -> str:
    """What ``auto`` stands for."""
    if method != "auto":
        return method
    if k is None:
        return "full"
    large = entries.size <= SMALL or k > LARGE_SHARE * entries.size
    return (
        "full" if large and square_bytes(entries, _copies(entries.size, k, allowed, entries)) <= allowed else "krylov"
    )


def _copies(size: int, wanted: int, allowed: int, entries: Entries) -> float:
    """Matrices of the square's size that a decomposition holds."""
    some = SOME_COPIES + wanted / size
    everything = wanted >= EVERY_SHARE * size and square_bytes(entries, ALL_COPIES) <= allowed
    return ALL_COPIES if everything else some


def fits_whole(entries: Entries, memory: int | None = None) -> bool:
    """Whether all eigenpairs fit the memory."""
    allowed = usable_bytes(memory)
    return square_bytes(entries, _copies(entries.size, entries.size, allowed, entries)) <= allowed


def _full(entries: Entries, wanted: int, memory: int | None, count: Counted) -> RitzPairs:
    """Decompose the dense square, and measure the residuals by passes over the kernel."""
    size = entries.size
    copies = _copies(size, wanted, usable_bytes(memory), entries)
    remedy = "ask for the leading eigenpairs alone, k=50" if wanted == size else "use method='krylov'"
    matrix = dense_square(entries, copies=copies, memory=memory, what="the eigenpairs of all", remedy=remedy)
    # The transpose is the same matrix in Fortran order, which LAPACK overwrites.
    if copies == ALL_COPIES:
        values, vectors = scipy.linalg.eigh(matrix.T, overwrite_a=True, check_finite=False, driver="evd")
        if wanted < size:  # a copy, so that the others need not stay
            values, vectors = values[size - wanted :], vectors[:, size - wanted :].copy(order="F")
    else:
        values, vectors = scipy.linalg.eigh(
            matrix.T,
            overwrite_a=True,
            check_finite=False,
            driver="evr",
            subset_by_index=None if wanted == size else [size - wanted, size - 1],
        )
    del matrix
    values = values[::-1].copy()
    for left in range(wanted // 2):  # in place: the vectors of all are as large as the square
        right = wanted - 1 - left
        vectors[:, [left, right]] = vectors[:, [right, left]]
    return RitzPairs(values, vectors, _measured(values, vectors, size, count), 1 + count.passes)


def _measured(
    values: NDArray[np.float64], vectors: NDArray[np.float64], size: int, product: Product
) -> NDArray[np.float64]:
    """Norms of ``K v − μ v``, some vectors at a time, so that no more than half a matrix is held for them."""
    step = max(1, size // 4)
    parts = []
    for start in range(0, len(values), step):
        part = np.ascontiguousarray(vectors[:, start : start + step])
        parts.append(column_norms(product(part) - part * values[start : start + step]))
    return np.concatenate(parts)


def _check_basis(entries: Entries, wanted: int, columns: int, memory: int | None) -> None:
    """Refuse a basis that is too small to make progress.

    Raises:
        BudgetError: says what would do.
    """
    size, least = entries.size, smallest_basis(entries.size, wanted)
    if columns < least:
        needed = basis_bytes(size, wanted, least) + entries.buffer_bytes
        what = f"block Krylov for {wanted:,} eigenpairs of {size:,} rows, a basis of {least:,} vectors,"
        raise too_little_memory(what, needed, memory, "ask for fewer eigenpairs")


def _resolution(entries: Entries) -> float:
    """Unit roundoff of the stored numbers: below this share of the largest, eigenvalues are rounding of entries."""
    base = entries.base if isinstance(entries, ViewEntries) else entries
    return float(np.finfo(base.dtype).eps) / 2
