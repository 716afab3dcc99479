"""The projection's loops compiled by numba: the backend of CPUs.

Every row of the result is summed by one thread in one order, so that its bits do not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numba
import numpy as np
import torch
from numba import njit, prange
from numpy.typing import NDArray
from torch import Tensor

from ooc_ntk.planning.memory import KEPT_SIGNS_BYTES
from ooc_ntk.planning.projection import SMALL_BLOCK, Projection
from ooc_ntk.planning.projectionkind import FACTORS, GAUSSIAN, SHIFT_SIGNS, SHIFTS, SIGNS, SJLT

from .backends import TorchBackend
from .entries import Outer
from .philox import key_of

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_MASK, _32, _1 = np.uint64(0xFFFFFFFF), np.uint64(32), np.uint64(1)

#: Parameters that one thread makes at a time.
_CHUNK: Final = 4096


@njit(inline="always")
def _philox(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1 & _MASK, (p0 >> _32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


@njit(parallel=True, cache=True)
def _sjlt_table(base, inner, key, block, out):  # type: ignore[no-untyped-def]
    """Rows by hash of the parameters ``base[i] + inner[j]``; 32-bit ``inner`` halve the time of 64-bit ones."""
    count, width = out.shape[0], len(inner)
    for r in prange(len(base)):
        start = base[r]
        for j in range(count):
            number, places = np.uint64(j), out[j, r * width : (r + 1) * width]
            for i in range(width):
                q = np.uint64(start + inner[i])
                w0, w1, _, _ = _philox(q & _MASK, q >> _32, number, np.uint64(SJLT), key[0], key[1])
                places[i] = np.uint32(((w0 * block) >> _32) << _1 | (w1 & _1))


@njit(cache=True)
def _factor_table(index, key, second, purpose, side, block, out):  # type: ignore[no-untyped-def]
    for j in range(out.shape[0]):
        number = np.uint64(2 * j) + side
        for i in range(out.shape[1]):
            w0, w1, _, _ = _philox(np.uint64(index[i]), second, number, purpose, key[0], key[1])
            out[j, i] = ((w0 * block) >> _32) << _1 | (w1 & _1)


@njit(parallel=True, cache=True)
def _shift_table(p, key, block, out):  # type: ignore[no-untyped-def]
    count, n = out.shape
    for chunk in prange((n + _CHUNK - 1) // _CHUNK):
        start, stop = chunk * _CHUNK, min(n, (chunk + 1) * _CHUNK)
        shifts = np.zeros(count, dtype=np.uint64)
        known = np.int64(-1)
        for i in range(start, stop):
            q = np.uint64(p[i])
            here = q // block
            if np.int64(here) != known:
                known = np.int64(here)
                for j in range(count):
                    w0, _, _, _ = _philox(here & _MASK, here >> _32, np.uint64(j), np.uint64(SHIFTS), key[0], key[1])
                    shifts[j] = (w0 * block) >> _32
            bits, _, _, _ = _philox(q & _MASK, q >> _32, np.uint64(0), np.uint64(SHIFT_SIGNS), key[0], key[1])
            inside = q - here * block
            for j in range(count):
                row = inside + shifts[j]
                if row >= block:
                    row -= block
                out[j, i] = row << _1 | (bits >> np.uint64(j) & _1)


@njit(parallel=True, cache=True)
def _scatter(values, stride, table, block, total, total_stride, rows):  # type: ignore[no-untyped-def]
    """Plus and minus are summed apart, so that the inner loop is one addition."""
    count, n = table.shape
    for r in prange(rows):
        row = values[r * stride : r * stride + n]
        sums = np.zeros(2 * block, dtype=values.dtype)
        for j in range(count):
            places = table[j]
            sums[:] = 0
            for i in range(n):
                sums[places[i]] += row[i]
            first = r * total_stride + j * block
            out = total[first : first + block]
            for k in range(block):
                out[k] += sums[2 * k] - sums[2 * k + 1]


@njit(parallel=True, cache=True)
def _scatter_few(values, stride, table, block, total, total_stride, rows):  # type: ignore[no-untyped-def]
    """The same for fewer parameters than rows of R: nothing is summed apart."""
    count, n = table.shape
    for r in prange(rows):
        for j in range(count):
            for i in range(n):
                place = table[j, i]
                value = np.float64(values[r * stride + i])
                total[r * total_stride + j * block + (place >> 1)] += -value if place & 1 else value


@njit(parallel=True, cache=True)
def _shifted(values, stride, starts, stops, places, signs, block, total, total_stride, rows):  # type: ignore[no-untyped-def]
    """Runs of parameters within a block of columns each, added where they are shifted to.

    ``starts`` and ``stops`` are the (runs,) columns of the values, ``places`` (nonzeros, runs) where the first of a run
    goes, ``signs`` (nonzeros, n) ±1.
    """
    count, runs = places.shape
    for r in prange(rows):
        row = values[r * stride : r * stride + signs.shape[1]]
        sums = np.zeros((count, block), dtype=values.dtype)
        for run in range(runs):
            start, stop = starts[run], stops[run]
            for j in range(count):
                first = places[j, run]
                wrap = min(stop, start + block - first)
                sign, out = signs[j], sums[j]
                head, x, s = out[first : first + wrap - start], row[start:wrap], sign[start:wrap]
                for t in range(wrap - start):
                    head[t] += s[t] * x[t]
                x, s = row[wrap:stop], sign[wrap:stop]
                for t in range(stop - wrap):
                    out[t] += s[t] * x[t]
        for j in range(count):
            for k in range(block):
                total[r * total_stride + j * block + k] += sums[j, k]


@njit(parallel=True, cache=True)
def _sign_tile(p, key, out):  # type: ignore[no-untyped-def]
    n, dim = out.shape
    for i in prange(n):
        low, high = np.uint64(p[i]) & _MASK, np.uint64(p[i]) >> _32
        for group in range((dim + 127) // 128):
            words = _philox(low, high, np.uint64(group), np.uint64(SIGNS), key[0], key[1])
            for number in range(4):
                word = np.uint32(words[number])
                start = group * 128 + number * 32
                for bit in range(min(32, dim - start)):
                    out[i, start + bit] = 1 - 2 * np.int32(word >> np.uint32(bit) & np.uint32(1))


@njit(parallel=True, cache=True)
def _gaussian_tile(p, key, out):  # type: ignore[no-untyped-def]
    n, dim = out.shape
    for i in prange(n):
        low, high = np.uint64(p[i]) & _MASK, np.uint64(p[i]) >> _32
        for group in range((dim + 3) // 4):
            words = _philox(low, high, np.uint64(group), np.uint64(GAUSSIAN), key[0], key[1])
            for number in range(min(4, dim - group * 4)):
                word = words[number]
                word = word - (word >> _1 & np.uint64(0x55555555))
                word = (word & np.uint64(0x33333333)) + (word >> np.uint64(2) & np.uint64(0x33333333))
                word = word + (word >> np.uint64(4)) & np.uint64(0x0F0F0F0F)
                word = (word * np.uint64(0x01010101) & _MASK) >> np.uint64(24)
                out[i, group * 4 + number] = np.int64(word) - 16


def _key(projection: Projection) -> NDArray[np.uint64]:
    return np.array(key_of(projection.seed), dtype=np.uint64)


def _flat(matrix: Tensor) -> tuple[NDArray[Any], int]:
    """The memory behind a matrix, from its first element to its last, and the distance between its rows."""
    assert matrix.shape[1] == 1 or matrix.stride(1) == 1  # the loops step through memory
    stride = matrix.stride(0) if len(matrix) > 1 else matrix.shape[1]
    size = (len(matrix) - 1) * stride + matrix.shape[1]
    return matrix.as_strided((size,), (1,)).numpy(), stride


class NumbaBackend:
    """Loops compiled on first use and kept for later processes. See :class:`~.backends.Backend`."""

    name = "numba"

    def __init__(self) -> None:
        """Run with as many threads as torch does."""
        most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
        threads = torch.get_num_threads()
        numba.set_num_threads(min(threads, most))
        torch.set_num_threads(threads)  # numba's threads are started by OpenMP, whose number they set to their own
        self._tile: NDArray[np.float32] = np.empty(0, dtype=np.float32)
        self._by_formula = TorchBackend()
        self._known_runs: dict[object, tuple[NDArray[Any], ...]] = {}

    def table(self, projection: Projection, p: Tensor, outers: Sequence[Outer]) -> Tensor:
        """See :meth:`~.backends.Backend.table`."""
        return self.table_at(projection, 0, torch.zeros(1, dtype=torch.int64), p, outers)

    def table_at(
        self, projection: Projection, start: int, outer: Tensor, inner: Tensor, outers: Sequence[Outer]
    ) -> Tensor:
        """See :meth:`~.backends.Backend.table_at`."""
        if not projection.about.compiled:
            return self._by_formula.table_at(projection, start, outer, inner, outers)
        base, within, block = start + outer.numpy(), inner.numpy(), np.uint64(projection.block)
        small = projection.block <= SMALL_BLOCK
        out: NDArray[Any] = np.empty(
            (projection.nonzeros, len(base) * len(within)), dtype=np.uint16 if small else np.uint32
        )
        if projection.kind == "shift":
            _shift_table((base[:, None] + within).reshape(-1), _key(projection), block, out)
            return torch.from_numpy(out)
        narrow = within.astype(np.uint32) if len(within) and within.max() < 2**32 else within
        _sjlt_table(base, narrow, _key(projection), block, out)
        if projection.about.structured:
            for each in outers:
                self._structured(projection, each, (base[:, None] + within).reshape(-1), out)
        return torch.from_numpy(out)

    def _structured(self, projection: Projection, outer: Outer, index: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Overwrite the part of a table that a tensor sketch's hashes make."""
        inside = (index >= outer.start) & (index < outer.stop)
        if not inside.any():
            return
        there = index[inside] - outer.start
        left = self._hashed(projection, outer, 0, there // outer.inputs).astype(np.int64)
        right = self._hashed(projection, outer, 1, there % outer.inputs).astype(np.int64)
        rows = ((left >> 1) + (right >> 1)) % projection.block
        out[:, inside] = (2 * rows + ((left ^ right) & 1)).astype(out.dtype)

    def hashes(self, projection: Projection, outer: Outer, side: int, index: Tensor) -> Tensor:
        """See :meth:`~.backends.Backend.hashes`."""
        return torch.from_numpy(self._hashed(projection, outer, side, index.numpy()))

    @staticmethod
    def _hashed(projection: Projection, outer: Outer, side: int, index: NDArray[np.int64]) -> NDArray[Any]:
        low, high = outer.start & 0xFFFFFFFF, outer.start >> 32
        out: NDArray[Any] = np.empty((projection.nonzeros, len(index)), dtype=np.uint32)
        purpose = np.uint64(FACTORS + (high << 8))
        _factor_table(
            index, _key(projection), np.uint64(low), purpose, np.uint64(side), np.uint64(projection.block), out
        )
        return out

    def scatter(self, values: Tensor, table: Tensor, projection: Projection, total: Tensor) -> None:
        """See :meth:`~.backends.Backend.scatter`."""
        few = 2 * table.shape[1] < projection.block
        (_scatter_few if few else _scatter)(*_flat(values), table.numpy(), projection.block, *_flat(total), len(values))

    def shifted(self, values: Tensor, start: int, projection: Projection, total: Tensor) -> bool:
        """See :meth:`~.backends.Backend.shifted`."""
        runs = self._runs(projection, start, values.shape[1], values.dtype)
        starts, stops, places, signs = runs
        _shifted(*_flat(values), starts, stops, places, signs, projection.block, *_flat(total), len(values))
        return True

    def _runs(self, projection: Projection, start: int, n: int, dtype: torch.dtype) -> tuple[NDArray[Any], ...]:
        """Runs of parameters within blocks, where they go, and signs: kept while there are few of them."""
        key = (projection, start, n, dtype)
        if key not in self._known_runs:
            block = projection.block
            edges = np.unique(np.concatenate([[0, n], np.arange(-start % block, n, block)]))
            table = self.table(projection, torch.arange(start, start + n), ()).numpy()
            signs = 1 - 2 * (table & 1).astype(np.float64 if dtype == torch.float64 else np.float32)
            places = (table[:, edges[:-1]] >> 1).astype(np.int64)
            runs = edges[:-1], edges[1:], places, signs
            size = sum(array.nbytes for known in (runs, *self._known_runs.values()) for array in known)
            if size > KEPT_SIGNS_BYTES:
                self._known_runs.clear()
            self._known_runs[key] = runs
        return self._known_runs[key]

    def tile(self, projection: Projection, p: Tensor, dtype: torch.dtype) -> Tensor:
        """See :meth:`~.backends.Backend.tile`."""
        assert projection.dim is not None
        if not projection.about.compiled:
            return self._by_formula.tile(projection, p, dtype)
        if self._tile.size < len(p) * projection.dim:
            self._tile = np.empty(len(p) * projection.dim, dtype=np.float32)
        out = self._tile[: len(p) * projection.dim].reshape(len(p), projection.dim)
        (_sign_tile if projection.kind == "rademacher" else _gaussian_tile)(p.numpy(), _key(projection), out)
        return torch.from_numpy(out).to(dtype)
