"""How alike kernels of the same samples are: centred kernel alignment (CKA), of runs and of layers, in one pass.

``CKA = ⟨HKH, HLH⟩ / (‖HKH‖ ‖HLH‖)`` with ``H = I − 1 1ᵀ/n`` (Cortes, Mohri and Rostamizadeh 2012, JMLR 13; Kornblith et
al. 2019, arXiv 1905.00414), over the train squares; without H the alignment of Cristianini et al. 2001.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ooc_ntk.errors import InputError, RunConflictError, TransientStorageError

from .entries import Entries, ViewEntries
from .multiplying import MultipliedKernel
from .products import PASSES

#: Entries of each kernel that are multiplied at once, in float64: of a few kernels they stay in the cache. (A choice.)
PIECE: Final = 2**16

#: Memory of the stripes of all kernels that are read at the same time; more kernels are read in groups. (A choice.)
BUFFER_BYTES: Final = 2**29

#: Rows from which the constant is estimated that is taken out of each kernel before it is summed up.
SHIFT_ROWS: Final = 4

#: Share of a kernel's energy below which nothing of it is left once centred but rounding.
NOTHING_LEFT: Final = 1e-13


@dataclass(frozen=True)
class LayerAlignment:
    """Alignments of the summands of a kernel, each with each.

    Attributes:
        names: of the layers.
        matrix: (layers, layers) float64, symmetric, 1 on the diagonal; NaN for a layer whose summand is zero, or
            constant where it is centred.
    """

    names: tuple[str, ...]
    matrix: NDArray[np.float64]


def cka(first: MultipliedKernel, second: MultipliedKernel, *, centered: bool, check_data: bool) -> float:
    """Alignment of two kernels; see :meth:`~ooc_ntk.algebra.operator.MultipliedKernel.cka`."""
    if not isinstance(second, MultipliedKernel):
        raise InputError(f"cka compares two kernels, got {type(second).__name__}")
    sizes = first.shape[1], second.shape[1]
    if sizes[0] != sizes[1] or first.samples[0] != second.samples[0]:
        raise InputError(
            f"kernels of {sizes[0]:,} and {sizes[1]:,} train rows cannot be aligned: both must be of the same samples, "
            "with as many rows for each"
        )
    if check_data and first.data_digest and second.data_digest and first.data_digest != second.data_digest:
        raise RunConflictError(
            f"{first!r} and {second!r} are kernels of other data (digests {first.data_digest[:8]} and "
            f"{second.data_digest[:8]}, of train and test samples together); if the train samples are the same, say "
            "check_data=False"
        )
    found = _products([first.entries, second.entries], centered)
    for kernel, energy in zip((first, second), found.diagonal(), strict=True):
        if energy == 0:
            raise InputError(
                f"{kernel!r} is zero" + (" once it is centred" if centered else "") + ": it is aligned with nothing"
            )
    return float(_ratios(found)[0, 1])


def layer_alignment(kernels: Sequence[MultipliedKernel], names: Sequence[str], *, centered: bool) -> LayerAlignment:
    """Alignments of kernels of one run, each with each; so many are read at once as their stripes fit in memory.

    Args:
        kernels: of the same samples.
        names: of the kernels.
        centered: whether they are centred.
    """
    entries = [kernel.entries for kernel in kernels]
    group = max(1, BUFFER_BYTES // max(1, 2 * entries[0].buffer_bytes))
    parts = [range(start, min(start + group, len(entries))) for start in range(0, len(entries), group)]
    found = np.zeros((len(entries), len(entries)))
    if len(parts) <= 2:
        found[:] = _products(entries, centered)
    else:
        for number, left in enumerate(parts):
            for right in parts[number + 1 :]:
                both = np.array([*left, *right])
                found[np.ix_(both, both)] = _products([entries[index] for index in both], centered)
    return LayerAlignment(tuple(names), _ratios(found))


def _ratios(products: NDArray[np.float64]) -> NDArray[np.float64]:
    """Inner products over the roots of their diagonal; NaN where that is zero."""
    roots = np.sqrt(products.diagonal())
    inverse = np.divide(1.0, roots, out=np.full_like(roots, np.nan), where=roots > 0)
    found = products * inverse[:, None] * inverse
    found[np.diag_indices(len(found))] = np.where(roots > 0, 1.0, np.nan)
    return np.clip(found, -1.0, 1.0)


def _products(kernels: Sequence[Entries], centered: bool) -> NDArray[np.float64]:
    """Inner products of (centred) train squares, each with each, by one pass over all of them.

    ``⟨HKH, HLH⟩ = ⟨K, L⟩ − (2/n) (K1)·(L1) + (1ᵀK1)(1ᵀL1)/n²``. A constant is taken out of each kernel first, which
    centring does not see, so that the difference of large sums loses no digits.
    """
    for _ in range(PASSES - 1):
        try:
            return _pass(kernels, centered)
        except TransientStorageError:
            continue
    return _pass(kernels, centered)


def _pass(kernels: Sequence[Entries], centered: bool) -> NDArray[np.float64]:
    size, count = kernels[0].size, len(kernels)
    shifts = np.array([_constant(each) if centered else 0.0 for each in kernels])
    products, sums = np.zeros((count, count)), np.zeros((count, size))
    for rows, columns, values in together(kernels):
        square = rows == columns
        step = max(1, PIECE // len(columns))
        stack = np.empty((count, min(step, len(rows)), len(columns)))
        for start in range(0, len(rows), step):
            stop = min(start + step, len(rows))
            part = stack[:, : stop - start]
            for number, each in enumerate(values):
                np.subtract(each[start:stop], shifts[number], out=part[number], dtype=np.float64)
            flat = part.reshape(count, -1)
            products += (1.0 if square else 2.0) * (flat @ flat.T)
            if centered:
                sums[:, rows.start + start : rows.start + stop] += part.sum(2)
                if not square:
                    sums[:, columns.start : columns.stop] += part.sum(1)
    if not centered:
        return products
    totals = sums.sum(1)
    found = products - (2.0 / size) * (sums @ sums.T) + np.outer(totals, totals) / size**2
    nothing = found.diagonal() <= NOTHING_LEFT * products.diagonal()
    found[nothing] = 0.0
    found[:, nothing] = 0.0
    return np.asarray(found)


def _constant(entries: Entries) -> float:
    """About the mean of a kernel, from a few of its rows on and below the diagonal, where tiles are checked."""
    rows = np.unique(np.linspace(0, entries.size - 1, SHIFT_ROWS).astype(np.int64)).tolist()
    parts = [np.ravel(entries.region(range(row, row + 1), range(row + 1))) for row in rows]
    return float(np.concatenate(parts).mean(dtype=np.float64))


def together(kernels: Sequence[Entries]) -> Iterator[tuple[range, range, list[NDArray[Any]]]]:
    """The lower triangles of several kernels, piece by piece: rows, columns, and entries of each there.

    Kernels in the same tiles are streamed side by side; otherwise the first is, and regions are read of the others,
    whose tiles are checked before.
    """
    size = range(kernels[0].size)
    tiling = kernels[0].tiling
    if tiling is not None and all(each.tiling == tiling for each in kernels):
        for blocks in zip(*(each.blocks(size, lower=True) for each in kernels), strict=True):
            assert all((block.rows, block.columns) == (blocks[0].rows, blocks[0].columns) for block in blocks)
            yield blocks[0].rows, blocks[0].columns, [block.values for block in blocks]
        return
    # Regions of tiles are mapped; what is computed is walked in its own order.
    lead = next((number for number, each in enumerate(kernels) if each.tiling is None), 0)
    for number, each in enumerate(kernels):
        if number != lead:
            _check_tiles(each)
    for block in kernels[lead].blocks(size, lower=True):
        found = [
            block.values if number == lead else _region(each, block.rows, block.columns)
            for number, each in enumerate(kernels)
        ]
        yield block.rows, block.columns, found


def _check_tiles(entries: Entries) -> None:
    """Hold all tiles on and below the diagonal against their checksums, which regions are read without.

    Raises:
        DamagedFileError: if a tile is not what was committed.
        TransientStorageError: if one was misread.
    """
    while isinstance(entries, ViewEntries):
        entries = entries.base
    if entries.tiling is not None:
        for _ in entries.blocks(range(entries.size), lower=True):
            pass


def _region(entries: Entries, rows: range, columns: range) -> NDArray[Any]:
    """Some entries on and below the diagonal; a square on it is mirrored, as no tile above it was checked."""
    found = entries.region(rows, columns)
    return np.tril(found) + np.tril(found, -1).T if rows == columns else found
