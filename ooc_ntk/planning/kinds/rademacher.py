"""``rademacher``: a dense R of signs, 128 from each draw."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ooc_ntk.planning.projectionkind import SIGNS, Draw, ProjectionKind, register_projection

if TYPE_CHECKING:
    from ooc_ntk.planning.projection import Projection


def rademacher_entries(projection: Projection, p: Any, columns: Any, draw: Draw) -> Any:
    """±1, see :class:`ProjectionKind`."""
    del projection
    chosen = columns >> 5 & 3
    word = sum(each * (chosen == number) for number, each in enumerate(draw(p, columns >> 7, SIGNS)))
    return 1 - 2 * (word >> (columns & 31) & 1)


register_projection("rademacher", ProjectionKind("dense signs", rademacher_entries, compiled=True))
