"""Entries of R by their definition, for NumPy and torch alike: what every faster way is compared with.

``R[p, column]`` depends on the seed, the global index p of a parameter and the column alone (DESIGN: projection).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ooc_ntk.planning.projection import Projection
from ooc_ntk.planning.projectionkind import FACTORS, Draw

from .philox import Words, key_of, philox, split


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
        projection: of a sparse kind.
        p: (n,) int64 global parameter indices.
        outers: weights that are sketched from their factors (structured kinds only).

    Returns:
        Rows within each block, (nonzeros, n), and sign bits (1 is minus), (nonzeros, n); both int64.
    """
    number = _like(p, range(projection.nonzeros))[:, None]
    rows, signs = projection.about.entries(projection, p[None], number, draws(projection, p))
    for outer in outers if projection.about.structured else ():
        inside = (p >= outer.start) & (p < outer.stop)
        if not bool(inside.any()):
            continue
        there = p[inside] - outer.start
        left = factor_hash(projection, outer, 0, there // outer.inputs)
        right = factor_hash(projection, outer, 1, there % outer.inputs)
        rows[:, inside] = (left[0] + right[0]) % projection.block
        signs[:, inside] = left[1] ^ right[1]
    return rows, signs


def draws(projection: Projection, like: Words) -> Draw:
    """The random words of a projection's seed, of the library and device of ``like``."""
    key = key_of(projection.seed)

    def draw(p: Any, number: Any, purpose: int) -> tuple[Any, Any, Any, Any]:
        low, high = split(p)
        words: tuple[Any, Any, Any, Any] = philox(
            (_array(like, low), _array(like, high), _array(like, number), _array(like, purpose)), key
        )
        return words

    return draw


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
    about = projection.about
    if not about.sparse:
        words = about.entries(projection, p[:, None], columns[None], draws(projection, p))
        return _real(words) / about.unit**0.5 / projection.dim**0.5
    rows, signs = rows_and_signs(projection, p, outers)
    block = projection.block
    mine = columns // block
    same = (columns % block)[None] == rows[mine].T
    return _real(same * (1 - 2 * signs[mine].T)) / projection.nonzeros**0.5


def _real(words: Any) -> Any:
    return words.astype(np.float64) if isinstance(words, np.ndarray) else words.double()


def _like(words: Words, values: Any) -> Any:
    """Constants as int64 of the library and device of ``words``."""
    numbers: NDArray[np.int64] = np.array(values, dtype=np.int64)
    return numbers if isinstance(words, np.ndarray) else torch.from_numpy(numbers).to(words.device)


def _array(like: Words, value: Any) -> Any:
    """A constant as (1, 1) int64 of the library and device of ``like``; an array as it is."""
    return _like(like, [[value]]) if isinstance(value, int) else value
