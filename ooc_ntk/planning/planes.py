"""Sets that hold every pair of things once: the lines of finite planes, from which triangle blocks are made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

#: Row tiles for which planes give triangles that waste nothing, and the side of these: q² and q² + q + 1 row tiles for
#: q = 2, 3, 4, 5, 7, 8, 9, 11 (q points, or q + 1, on every line).
PLANES: Final = {
    7: 3,
    9: 3,
    13: 4,
    16: 4,
    21: 5,
    25: 5,
    31: 6,
    49: 7,
    57: 8,
    64: 8,
    73: 9,
    81: 9,
    91: 10,
    121: 11,
    133: 12,
}

#: Finite fields that are no residues: characteristic, and what x to the degree is equal to, lowest coefficient first.
_FIELDS: Final = {
    4: (2, (1, 1)),
    8: (2, (1, 1, 0)),
    9: (3, (2, 0)),
    16: (2, (1, 1, 0, 0)),
}


@lru_cache(maxsize=64)
def cover(count: int, size: int) -> tuple[tuple[int, ...], ...]:
    """Sets of at most ``size`` of ``count`` things, so that every pair is in exactly one set.

    ``k`` groups of ``q`` things, numbered by a field: the sets ``{a + b·u of group u}`` for all a and b, and with
    ``k = q + 1`` one more group of the b's, hold every pair from two different groups once (the triangle blocks of
    Beaumont et al. 2022; the lines of a plane). Pairs within a group are covered in the same way, one more thing joined
    to all groups where there is room. Things beyond ``count`` are left out.

    >>> cover(7, 3)
    ((0, 2, 4), (1, 3, 4), (0, 3, 5), (1, 2, 5), (0, 1, 6), (2, 3, 6), (4, 5, 6))
    >>> cover(3, 4)
    ((0, 1, 2),)
    """
    if count <= size:
        return (tuple(range(count)),) if count > 1 else ()
    if size == 2:
        return tuple((i, j) for j in range(count) for i in range(j))
    order = size - 1
    while not (_has_field(order, count) and _reach(order, size) >= count):
        order += 1
    if order >= count:  # one group would hold everything
        return cover(count, size - 1)
    extra = [count - 1] if count == order * size + 1 and order == size - 1 else []
    add, times = _field(order)
    found = []
    for slope in range(order):
        for start in range(order):
            line = (add[start][times[slope][u]] if u < order else slope for u in range(size))
            found.append(tuple(m for m in (place + u * order for u, place in enumerate(line)) if m < count))
    for u in range(size):
        group = [*range(u * order, min((u + 1) * order, count - len(extra))), *extra]
        found += [tuple(group[index] for index in inner) for inner in cover(len(group), size)]
    return tuple(members for members in found if len(members) > 1)


def _has_field(order: int, count: int) -> bool:
    """Whether sets are made of the field: 16 is for whole planes alone, as stored plans made other sizes without it."""
    return _is_prime(order) or (order in _FIELDS and (order != 16 or count in (16 * 16, 16 * 17 + 1)))


def _reach(order: int, size: int) -> int:
    """Things that groups of a field's size take in."""
    return order * size + (1 if order == size - 1 else 0)


@lru_cache(maxsize=64)
def _field(order: int) -> tuple[list[list[int]], list[list[int]]]:
    """Tables of addition and multiplication of a finite field, its elements numbered from 0."""
    if order not in _FIELDS:
        elements = range(order)
        return [[(a + b) % order for b in elements] for a in elements], [
            [a * b % order for b in elements] for a in elements
        ]
    prime, rest = _FIELDS[order]
    degree = len(rest)
    digits = [tuple(number // prime**place % prime for place in range(degree)) for number in range(order)]

    def number(coefficients: Sequence[int]) -> int:
        return sum(value % prime * prime**place for place, value in enumerate(coefficients))

    def product(a: Sequence[int], b: Sequence[int]) -> int:
        found = [0] * (2 * degree - 1)
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                found[i + j] += x * y
        for place in range(2 * degree - 2, degree - 1, -1):
            for lower, value in enumerate(rest):
                found[place - degree + lower] += found[place] * value
        return number(found[:degree])

    sums = [[number([x + y for x, y in zip(a, b, strict=True)]) for b in digits] for a in digits]
    return sums, [[product(a, b) for b in digits] for a in digits]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, math.isqrt(number) + 1))
