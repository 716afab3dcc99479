"""Nearest samples: of every row of a kernel its largest entries, exact, by one pass over the tiles."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from ooc_ntk.compute.machine import free_host_bytes
from ooc_ntk.errors import BudgetError, InputError, TransientStorageError, unknown_name
from ooc_ntk.units import format_bytes

from .entries import Block, Entries
from .products import PASSES

if TYPE_CHECKING:
    from .operator import KernelOperator

#: What nearness is measured by: entries of the kernel, or their cosines.
BY: Final = ("kernel", "cosine")

#: What searches: a pass over the entries, or FAISS over projected features.
BACKENDS: Final = ("exact", "faiss")

#: Bytes per neighbour while they are merged: number and value, held, offered, and put in order.
_BYTES_EACH: Final = 64

#: Share of the free memory that the neighbours may take (a choice).
MEMORY_SHARE: Final = 0.5


@dataclass(frozen=True)
class Neighbours:
    """The nearest train samples of some samples.

    Attributes:
        indices: (rows, k) int64, numbers of train samples, the nearest first and the smaller number first of equals;
            −1 where a row has fewer than k entries that are numbers.
        values: (rows, k) float64, kernel entries or cosines, descending; NaN where there is none.
        by: ``kernel`` or ``cosine``.
        rows: whose neighbours they are: ``test`` or ``train``; a train sample is not its own neighbour.
    """

    indices: NDArray[np.int64]
    values: NDArray[np.float64]
    by: str
    rows: str

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def k(self) -> int:
        """Neighbours of each sample."""
        return int(self.indices.shape[1])


def nearest(
    kernel: KernelOperator, k: int = 5, *, by: str = "kernel", rows: str = "test", backend: str = "exact"
) -> Neighbours:
    """The most similar train samples of every test (or train) sample, see :meth:`KernelOperator.nearest`.

    The test rows are read once. Of the train square the lower triangle is read once, half the bytes, and each entry is
    offered to both of its samples; for that the neighbours found so far are held of all rows, which they are anyway.

    Args:
        kernel: a kernel or a view of one.
        k: neighbours of each sample.
        by: ``kernel`` or ``cosine``.
        rows: ``test`` or ``train``.
        backend: ``exact`` or ``faiss``.

    Returns:
        The neighbours.

    Raises:
        InputError: see :meth:`KernelOperator.nearest`.
        BudgetError: if the neighbours, or the index of FAISS, do not fit in memory.
        StorageError: if a tile cannot be read, or is not what was committed.
    """
    k = _checked(kernel, k, by, rows, backend)
    if backend == "faiss":
        from .faiss_search import search_features  # brings FAISS, an extra

        features = getattr(kernel, "features", None)  # of an exact kernel this is an error of its own
        if features is None:
            raise InputError(
                f"{kernel!r} is a view, and FAISS searches features as they are; use backend='exact', or search the "
                "kernel itself (by='cosine' for cosines)"
            )
        indices, values = search_features(features, rows, k, cosine=by == "cosine" or features.cosine)
        return Neighbours(indices, values, by, rows)
    seen = kernel.cosine() if by == "cosine" else kernel
    found = _largest(seen.entries, seen.row_range(rows), k, square=rows == "train")
    return Neighbours(found.columns, found.values, by, rows)


def _checked(kernel: KernelOperator, k: int, by: str, rows: str, backend: str) -> int:
    """Refuse what cannot be searched, before anything is read."""
    for what, got, known in (("by", by, BY), ("rows", rows, ("test", "train")), ("backend", backend, BACKENDS)):
        if got not in known:
            raise unknown_name(what, got, known)
    if kernel.entries_per_sample > 1:
        raise InputError(
            f"nearest samples need one entry per pair of samples, and {kernel!r} is a full kernel of "
            f"{kernel.entries_per_sample} × {kernel.entries_per_sample} entries per pair; compute kernel='trace' "
            "(--kernel trace), whose entries are their traces"
        )
    train, test = kernel.samples
    if rows == "test" and not test:
        raise InputError(
            "the run has no test samples whose neighbours could be found; ask for those of the train samples, "
            "rows='train' (--rows train), or give test data to the job (--test)"
        )
    try:
        count = operator.index(k)
    except TypeError as error:
        raise InputError(f"k must be a whole number, got {k!r}") from error
    most = train if rows == "test" else train - 1
    if isinstance(k, bool) or not 1 <= count <= most:
        others = f"{train:,} train samples" if rows == "test" else f"{most:,} other train samples"
        raise InputError(f"k must be from 1 to {most:,}, as there are {others}, got {k!r}")
    needed = _BYTES_EACH * count * (test if rows == "test" else train)
    free = int(MEMORY_SHARE * free_host_bytes())
    if needed > free:
        raise BudgetError(
            f"{count:,} neighbours of each sample need {format_bytes(needed)} of memory, {format_bytes(free)} are free "
            "to use; ask for a smaller k"
        )
    return count


def _largest(entries: Entries, rows: range, k: int, *, square: bool) -> LargestEntries:
    """One pass, made again where a tile was misread and is whole when it is read again."""
    for _ in range(PASSES - 1):
        try:
            return _pass(entries, rows, k, square=square)
        except TransientStorageError:
            continue
    return _pass(entries, rows, k, square=square)


def _pass(entries: Entries, rows: range, k: int, *, square: bool) -> LargestEntries:
    found = LargestEntries(len(rows), k)
    for block in entries.blocks(rows, lower=square):
        found.offer(
            block.rows.start - rows.start, block.columns.start, _without_self(block) if square else block.values
        )
        if square and not block.on_diagonal:
            found.offer(block.columns.start, block.rows.start, block.values.T)
    found.finish()
    return found


def _without_self(block: Block) -> NDArray[Any]:
    """Entries of a block of the train square, NaN where a sample meets itself."""
    if not block.on_diagonal:
        return block.values
    values = block.values.copy()  # the block is the reader's
    np.fill_diagonal(values, np.nan)
    return values


class LargestEntries:
    """The k largest entries of every row, of those that were offered so far, in any order.

    NaN is never among them, and −∞ is taken for no entry either.

    Attributes:
        values: (rows, k) float64, descending; −∞ where there is none yet.
        columns: (rows, k) int64, the smaller one first of equal values.
    """

    def __init__(self, rows: int, k: int) -> None:
        """Begin with no entries."""
        self.values = np.full((rows, k), -np.inf)
        self.columns = np.full((rows, k), -1)

    def offer(self, top: int, left: int, values: NDArray[Any]) -> None:
        """Take the largest of a block of entries, each of which is offered once.

        Args:
            top: row of the block's first one.
            left: its first column.
            values: (rows, columns), float32 or float64.
        """
        k = self.values.shape[1]
        # Most rows of most blocks reach nothing of what is held: a comparison is all that they cost.
        reached = (values >= self.values[top : top + len(values), -1:]).any(1)
        rows = np.flatnonzero(reached)
        if not rows.size:
            return
        some = values[rows].astype(np.float64)
        some[np.isnan(some)] = -np.inf
        places = _places_of_largest(some, k)
        rows += top
        merged = np.concatenate([self.values[rows], np.take_along_axis(some, places, 1)], axis=1)
        columns = np.concatenate([self.columns[rows], left + places], axis=1)
        order = np.lexsort((columns, -merged))[:, :k]
        self.values[rows] = np.take_along_axis(merged, order, 1)
        self.columns[rows] = np.take_along_axis(columns, order, 1)

    def finish(self) -> None:
        """Mark the places that no entry has taken: column −1, value NaN."""
        empty = self.values == -np.inf
        self.columns[empty], self.values[empty] = -1, np.nan


def _places_of_largest(values: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """Places of the k largest of every row, the first ones of equals, in no order: (rows, min(k, columns))."""
    if values.shape[1] <= k:
        return np.broadcast_to(np.arange(values.shape[1]), values.shape)
    places = np.argpartition(-values, k - 1, axis=1)[:, :k]
    last = np.take_along_axis(values, places, 1).min(1, keepdims=True)
    # A partition takes any of equal values: rows with more of them than places are sorted, which keeps their order.
    tied = np.flatnonzero((values >= last).sum(1) > k)
    if tied.size:
        places[tied] = np.argsort(-values[tied], axis=1, kind="stable")[:, :k]
    return places
