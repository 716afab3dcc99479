"""Which parameters a pass derives as dense gradients, and where each of their columns goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .plan import Plan


@dataclass(frozen=True)
class Piece:
    """A run of columns of one parameter within one span.

    Attributes:
        parameter: index of the parameter in :attr:`PassColumns.names`.
        source: its columns, counted within the part of the parameter that the pass wants.
        target: the same columns, counted within the span.
    """

    parameter: int
    source: slice
    target: slice


@dataclass(frozen=True)
class PassColumns:
    """The dense parameters of one pass and how they fall into its spans.

    Attributes:
        names: parameters to derive, in column order; those that no dense span of the pass touches are left out.
        wanted: the part of each parameter's columns that the pass holds.
        blocks: the block of each.
        spans: per dense span of the pass its index and the pieces that fill it.
    """

    names: tuple[str, ...]
    wanted: tuple[slice, ...]
    blocks: tuple[str, ...]
    spans: tuple[tuple[int, tuple[Piece, ...]], ...]

    @property
    def width(self) -> int:
        """Columns of the pass."""
        return sum(part.stop - part.start for part in self.wanted)


def pass_columns(plan: Plan, sizes: Mapping[str, int], generation: int) -> PassColumns:
    """Lay the dense parameters of a pass out over its spans.

    Args:
        plan: the plan.
        sizes: number of scalars of every chosen parameter, in column order.
        generation: the pass.

    Returns:
        The layout; every column of every dense span is in exactly one piece.
    """
    spans = [span for span in plan.layout.pass_spans(plan, generation) if span.block is None]
    block_of = {name: block.name for block in plan.blocks for name in block.parameters}
    dense = {name for block in plan.blocks if block.representation == "dense" for name in block.parameters}
    names: list[str] = []
    wanted: list[slice] = []
    pieces: dict[int, list[Piece]] = {span.index: [] for span in spans}
    position = 0
    for name, size in sizes.items():
        if name not in dense:
            continue
        touched = [span for span in spans if span.start < position + size and position < span.stop]
        if touched:
            first, last = max(position, touched[0].start), min(position + size, touched[-1].stop)
            names.append(name)
            wanted.append(slice(first - position, last - position))
            for span in touched:
                start, stop = max(first, span.start), min(last, span.stop)
                source, target = slice(start - first, stop - first), slice(start - span.start, stop - span.start)
                pieces[span.index].append(Piece(len(names) - 1, source, target))
        position += size
    return PassColumns(
        tuple(names),
        tuple(wanted),
        tuple(block_of[name] for name in names),
        tuple((index, tuple(found)) for index, found in pieces.items()),
    )
