"""What a run with a store takes of the machine itself: memory for transfers, and disk until files are uploaded."""

from __future__ import annotations

from typing import Final

from ooc_ntk.units import STORED_DTYPE

from .memory import FOLDED_SPANS
from .plan import Plan

#: Host bytes that an object store takes: its library, parts on their way out and pieces on their way in. (Measured: 76
#: MiB with tiles of 200 MiB, the rest is a margin.)
STORE_BYTES: Final = 96 * 2**20


def scratch_bytes(plan: Plan) -> int:
    """Most bytes that a task of a plan has in scratch files at once, on the machine that it runs on.

    The tiles of one sample range are gathered for all spans of a pass before any is whole; kernel tiles are uploaded
    one by one. Sums of superblocks are folded on the local disk, and saved there, with or without a store.

    Args:
        plan: the plan.

    Returns:
        Bytes, without what the run directory holds anyway.
    """
    item = int(STORED_DTYPE[plan.precision][2:])
    rows = 0
    if not plan.layout.in_memory or plan.projection is not None:
        cut = plan.layout.cut(plan)
        rows = plan.tile_samples * max(sum(cut.stored[spans.start : spans.stop]) for spans in plan.passes)
        rows += plan.tile_samples * plan.rows_per_sample * len(plan.heavy) * item
    entries = plan.tile_samples * plan.entries_per_sample
    diagonal, kernel = 8 * entries, 0
    if not plan.features_only:
        kernel = 2 * entries**2 * item  # a tile, and its mirror image
        tiles = plan.superblock_tiles if plan.superblock_tiles > 1 else 0
        folded = 8 * tiles * entries**2 if any(len(spans) > FOLDED_SPANS for spans in plan.passes) else 0
        kernel += folded + (folded + tiles * entries**2 * item if plan.saves_sums else 0)
    return max(rows, kernel) + diagonal
