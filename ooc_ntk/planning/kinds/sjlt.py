"""``sjlt``: sparse Johnson–Lindenstrauss transform with one sign in each block of rows (Kane and Nelson 2014)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ooc_ntk.planning.projectionkind import SJLT, Draw, ProjectionKind, register_projection

if TYPE_CHECKING:
    from ooc_ntk.planning.projection import Projection


def sjlt_entries(projection: Projection, p: Any, number: Any, draw: Draw) -> tuple[Any, Any]:
    """Rows and sign bits, see :class:`ProjectionKind`."""
    words = draw(p, number, SJLT)
    return words[0] * projection.block >> 32, words[1] & 1


# Four non-zeros, as Kane and Nelson's analysis suggests.
register_projection(
    "sjlt", ProjectionKind("sparse, a few signs per parameter", sjlt_entries, nonzeros=4, compiled=True)
)
