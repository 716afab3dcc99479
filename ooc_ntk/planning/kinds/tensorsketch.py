"""``tensorsketch``: large linear layers by hashes of both factors (Pham and Pagh 2013), everything else as ``sjlt``."""

from __future__ import annotations

from ooc_ntk.planning.projectionkind import ProjectionKind, register_projection

from .sjlt import sjlt_entries

register_projection(
    "tensorsketch",
    ProjectionKind(
        "large linear layers sketched from their factors, the rest as sjlt",
        sjlt_entries,
        nonzeros=32,  # error bars come from the spread between blocks, which then have 31 degrees of freedom
        signs=False,
        structured=True,
        least_nonzeros=2,
        compiled=True,
    ),
)
