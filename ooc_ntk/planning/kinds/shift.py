"""``shift``: as ``sjlt``, but blocks of as many parameters as R has rows per block are shifted as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ooc_ntk.planning.projectionkind import SHIFT_SIGNS, SHIFTS, Draw, ProjectionKind, register_projection

if TYPE_CHECKING:
    from ooc_ntk.planning.projection import Projection


def shift_entries(projection: Projection, p: Any, number: Any, draw: Draw) -> tuple[Any, Any]:
    """Rows and sign bits, see :class:`ProjectionKind`."""
    block = projection.block
    words = draw(p // block, number, SHIFTS)
    rows = (p % block + (words[0] * block >> 32)) % block
    (bits, *_) = draw(p, 0, SHIFT_SIGNS)
    return rows, bits >> number & 1


register_projection(
    "shift", ProjectionKind("sparse, parameters shifted in blocks", shift_entries, nonzeros=4, compiled=True)
)
