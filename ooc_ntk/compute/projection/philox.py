"""Philox4x32-10, counter-based random words (Salmon et al. 2011), by one source for NumPy and torch.

Words are held in int64 of either library: products of two 32-bit words wrap, and masking brings back what is wanted of
them. The CUDA source in ``kernels.cu`` and the compiled loops give the same bits.
"""

from __future__ import annotations

from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

#: int64 words of NumPy or torch.
Words = TypeVar("Words", NDArray[np.int64], Tensor)

_MASK: Final = 0xFFFFFFFF
_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_WEYL: Final = (0x9E3779B9, 0xBB67AE85)
_ROUNDS: Final = 10


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Four random words per counter.

    Args:
        counter: four arrays of words below 2³², which broadcast.
        key: two words.

    Returns:
        Four arrays of words below 2³², int64.

    >>> ones = np.full(1, 0xFFFFFFFF)
    >>> [hex(int(word[0])) for word in philox((ones, ones, ones, ones), (0xFFFFFFFF, 0xFFFFFFFF))]
    ['0x408f276d', '0x41c83b0e', '0xa20bc7c6', '0x6d5451fd']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(words: Words, by: int) -> tuple[Words, Words]:
    """High and low word of a product; bits above 2⁶³ wrap into the sign, which the mask takes off."""
    product = words * by
    return (product >> 32) & _MASK, product & _MASK


def key_of(seed: int) -> tuple[int, int]:
    """The key of a 64-bit seed: low and high word."""
    return seed & _MASK, seed >> 32 & _MASK


def split(numbers: Words) -> tuple[Words, Words]:
    """Low and high words of numbers below 2⁶³."""
    return numbers & _MASK, numbers >> 32
