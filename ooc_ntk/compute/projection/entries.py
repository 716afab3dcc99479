"""Entries of R by their definition, for NumPy and torch alike: what every faster way is compared with.

``R[p, column]`` depends on the seed, the global index p of a parameter and the column alone (DESIGN: projection).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from ooc_ntk.planning.projection import Projection

from .philox import Words, key_of, philox, split

#: Last word of the counter: what the random words are for.
SIGNS: Final = 0
SJLT: Final = 1
GAUSSIAN: Final = 2
SHIFTS: Final = 3
SHIFT_SIGNS: Final = 4
FACTORS: Final = 5


@dataclass(frozen=True)
class Outer:
    """A weight whose columns of R are made of one hash per output and one per input (a tensor sketch).

    Attributes:
        start: global index of its first element.
        outputs: rows of the weight.
        inputs: its columns.
    """

    start: int
    outputs: int
    inputs: int

    @property
    def stop(self) -> int:
        """One past its last element."""
        return self.start + self.outputs * self.inputs


def rows_and_signs(projection: Projection, p: Words, outers: Sequence[Outer] = ()) -> tuple[Words, Words]:
    """Where the non-zeros of a sparse projection are, and their signs.

    Args:
        projection: ``sjlt``, ``shift`` or ``tensorsketch``.
        p: (n,) int64 global parameter indices.
        outers: weights that are sketched from their factors (``tensorsketch`` only).

    Returns:
        Rows within each block, (nonzeros, n), and sign bits (1 is minus), (nonzeros, n); both int64.
    """
    key, block, count = key_of(projection.seed), projection.block, projection.nonzeros
    number = _like(p, range(count))[:, None]
    if projection.kind == "shift":
        low, high = split(p // block)
        words = philox((low[None], high[None], number, _like(p, [[SHIFTS]])), key)
        rows = (p[None] % block + (words[0] * block >> 32)) % block
        low, high = split(p)
        (bits, *_) = philox((low, high, _like(p, [0]), _like(p, [SHIFT_SIGNS])), key)
        return rows, bits[None] >> number & 1
    low, high = split(p)
    words = philox((low[None], high[None], number, _like(p, [[SJLT]])), key)
    rows, signs = words[0] * block >> 32, words[1] & 1
    for outer in outers if projection.kind == "tensorsketch" else ():
        inside = (p >= outer.start) & (p < outer.stop)
        if not bool(inside.any()):
            continue
        there = p[inside] - outer.start
        left = factor_hash(projection, outer, 0, there // outer.inputs)
        right = factor_hash(projection, outer, 1, there % outer.inputs)
        rows[:, inside] = (left[0] + right[0]) % block
        signs[:, inside] = left[1] ^ right[1]
    return rows, signs


def factor_hash(projection: Projection, outer: Outer, side: int, index: Words) -> tuple[Words, Words]:
    """Rows and sign bits of one side of a tensor sketch, (nonzeros, n) each.

    Args:
        projection: the projection.
        outer: the weight.
        side: 0 for outputs, 1 for inputs.
        index: (n,) numbers of outputs or inputs.
    """
    number = 2 * _like(index, range(projection.nonzeros))[:, None] + side
    low, high = outer.start & 0xFFFFFFFF, outer.start >> 32
    words = philox(
        (index[None], _like(index, [[low]]), number, _like(index, [[FACTORS + (high << 8)]])), key_of(projection.seed)
    )
    return words[0] * projection.block >> 32, words[1] & 1


def dense_columns(projection: Projection, p: Words, columns: Words, outers: Sequence[Outer] = ()) -> Any:
    """Entries of R for some parameters and columns, of any kind.

    Args:
        projection: the projection.
        p: (n,) int64 global parameter indices.
        columns: (k,) int64 columns.
        outers: weights that are sketched from their factors.

    Returns:
        (n, k) float64 of the library of ``p``, scaled: ``E[R Rᵀ] = I``.
    """
    assert projection.dim is not None
    key = key_of(projection.seed)
    if projection.kind in ("rademacher", "gaussian"):
        per_counter = 7 if projection.kind == "rademacher" else 2
        kind = SIGNS if projection.kind == "rademacher" else GAUSSIAN
        low, high = split(p)
        words = philox((low[:, None], high[:, None], (columns >> per_counter)[None], _like(p, [[kind]])), key)
        chosen = (columns >> 5 if projection.kind == "rademacher" else columns) & 3
        word = sum(each * (chosen == number)[None] for number, each in enumerate(words))
        if projection.kind == "rademacher":
            found = _real(1 - 2 * (word >> (columns & 31)[None] & 1))
        else:
            found = _real(_ones(word) - 16) / 8**0.5
        return found / projection.dim**0.5
    rows, signs = rows_and_signs(projection, p, outers)
    block = projection.block
    mine = columns // block
    same = (columns % block)[None] == rows[mine].T
    return _real(same * (1 - 2 * signs[mine].T)) / projection.nonzeros**0.5


def _ones(words: Any) -> Any:
    """Bits that are set in 32-bit words."""
    if isinstance(words, np.ndarray):
        return np.bitwise_count(words).astype(np.int64)
    count = words - (words >> 1 & 0x55555555)
    count = (count & 0x33333333) + (count >> 2 & 0x33333333)
    count = count + (count >> 4) & 0x0F0F0F0F
    return (count * 0x01010101 & 0xFFFFFFFF) >> 24


def _real(words: Any) -> Any:
    return words.astype(np.float64) if isinstance(words, np.ndarray) else words.double()


def _like(words: Words, values: Any) -> Any:
    """Constants as int64 of the library and device of ``words``."""
    numbers: NDArray[np.int64] = np.array(values, dtype=np.int64)
    return numbers if isinstance(words, np.ndarray) else torch.from_numpy(numbers).to(words.device)
