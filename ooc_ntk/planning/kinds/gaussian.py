"""``gaussian``: a dense R that is nearly normal, bits set in a word less 16: whole numbers, which every library has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ooc_ntk.planning.projectionkind import GAUSSIAN, Draw, ProjectionKind, register_projection

if TYPE_CHECKING:
    from ooc_ntk.planning.projection import Projection


def gaussian_entries(projection: Projection, p: Any, columns: Any, draw: Draw) -> Any:
    """Bits set, less 16, see :class:`ProjectionKind`."""
    del projection
    chosen = columns & 3
    word = sum(each * (chosen == number) for number, each in enumerate(draw(p, columns >> 2, GAUSSIAN)))
    count = word - (word >> 1 & 0x55555555)
    count = (count & 0x33333333) + (count >> 2 & 0x33333333)
    count = count + (count >> 4) & 0x0F0F0F0F
    return ((count * 0x01010101 & 0xFFFFFFFF) >> 24) - 16


# Bits of a word have variance 1/4 each.
register_projection(
    "gaussian", ProjectionKind("dense, near normal", gaussian_entries, signs=False, unit=8.0, compiled=True)
)
