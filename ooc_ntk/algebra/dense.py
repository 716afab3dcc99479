"""The train square in memory, for what needs all of it, checked against what may be taken first; errors that say so."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from ooc_ntk.compute.machine import free_host_bytes, resident_bytes
from ooc_ntk.errors import BudgetError, TransientStorageError
from ooc_ntk.planning.budget import Budget
from ooc_ntk.planning.memory import LIBRARY_GROWTH_BYTES
from ooc_ntk.units import format_bytes

from .entries import Entries
from .products import PASSES

#: Share of the free memory that a dense square may take, with what is computed from it. (A choice.)
MEMORY_SHARE: Final = 0.8

#: Host budgets that errors name are whole multiples of this, and one more of it, as a process does not hold the same
#: twice. (Guessed.)
NAMED_STEP: Final = 32 * 2**20

#: Rows and columns of the pieces that are mirrored at once: both stay in the cache. (A choice: 512 KiB.)
MIRRORED: Final = 256


def usable_bytes(memory: int | None = None) -> int:
    """Memory that a computation may take: what was allowed, or else a share of what is free.

    Args:
        memory: bytes that were allowed; None for nothing said.
    """
    return memory if memory is not None else int(MEMORY_SHARE * free_host_bytes())


def budget_bytes(budget: Budget | None) -> int | None:
    """Memory that a host budget leaves beyond what the process holds; None where it sets no limit.

    Args:
        budget: of the whole process.
    """
    if budget is None or budget.host is None:
        return None
    return max(0, int(budget.host) - resident_bytes() - LIBRARY_GROWTH_BYTES)


def too_little_memory(what: str, needed: int, memory: int | None, remedy: str) -> BudgetError:
    """The error for a computation that does not fit: what it needs, what there is, and what would do.

    Args:
        what: the computation.
        needed: bytes beyond what the process holds.
        memory: bytes that were allowed; None is a share of what is free.
        remedy: what would do in its place.
    """
    held, there = resident_bytes(), max(0, usable_bytes(memory))
    enough = (-(-(needed + held + LIBRARY_GROWTH_BYTES) // NAMED_STEP) + 1) * NAMED_STEP
    return BudgetError(
        f"{what} needs {format_bytes(needed)}; {format_bytes(there)} "
        f"{'are free to use' if memory is None else 'were allowed'}: {remedy}; the process holds {format_bytes(held)} "
        f"already, and a host budget of {enough // 2**20} MiB would do"
    )


def square_bytes(entries: Entries, copies: float = 1.0) -> int:
    """Memory of the dense square.

    Args:
        entries: of the kernel.
        copies: matrices of its size that are held at the same time, the square itself among them.
    """
    return int(8 * entries.size**2 * copies) + entries.buffer_bytes


def dense_square(
    entries: Entries,
    *,
    copies: float = 1.0,
    memory: int | None = None,
    what: str = "the dense train square",
    remedy: str = "use fewer train samples or a machine with more memory",
) -> NDArray[np.float64]:
    """Read the train square into memory: its lower triangle, mirrored, so that it is symmetric to the last bit.

    Args:
        entries: of the kernel.
        copies: matrices of its size that the caller will hold at the same time, this one among them.
        memory: bytes that may be taken; None is a share of what is free.
        what: names the computation in the error.
        remedy: what would do in its place, for the error.

    Returns:
        (n, n) float64, C order and writeable. Its transpose is in Fortran order and the same matrix, which LAPACK
        overwrites without a copy.

    Raises:
        BudgetError: if it does not fit; before anything is read.
        StorageError: if a tile cannot be read, or is not what was committed.
    """
    needed = square_bytes(entries, copies)
    if needed > usable_bytes(memory):
        raise too_little_memory(f"{what}, {entries.size:,} × {entries.size:,} numbers,", needed, memory, remedy)
    found = np.empty((entries.size, entries.size))
    for attempt in range(PASSES):
        try:
            _fill(found, entries)
            break
        except TransientStorageError:
            if attempt == PASSES - 1:
                raise
    _mirror(found)
    return found


def _fill(matrix: NDArray[np.float64], entries: Entries) -> None:
    """Write the lower triangle."""
    for block in entries.blocks(range(entries.size), lower=True):
        matrix[block.rows.start : block.rows.stop, block.columns.start : block.columns.stop] = block.values


def _mirror(matrix: NDArray[np.float64]) -> None:
    """Copy the lower triangle over the upper one, in place and piece by piece."""
    size = len(matrix)
    for top in range(0, size, MIRRORED):
        bottom = min(top + MIRRORED, size)
        for left in range(0, top, MIRRORED):
            matrix[left : left + MIRRORED, top:bottom] = matrix[top:bottom, left : left + MIRRORED].T
        square = matrix[top:bottom, top:bottom]
        upper = np.triu_indices(bottom - top, 1)
        square[upper] = square.T[upper]
