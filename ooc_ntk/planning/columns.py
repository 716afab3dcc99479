"""Which parameters a pass derives, and where each of their columns goes."""

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
    """The parameters of one pass and how they fall into its spans.

    Attributes:
        names: parameters to derive, in column order; those that no span of the pass touches are left out.
        wanted: the part of each parameter's columns that the pass holds.
        blocks: the block of each.
        spans: per span of the pass its index and the pieces that fill it.
    """

    names: tuple[str, ...]
    wanted: tuple[slice, ...]
    blocks: tuple[str, ...]
    spans: tuple[tuple[int, tuple[Piece, ...]], ...]


def pass_columns(plan: Plan, sizes: Mapping[str, int], generation: int) -> PassColumns:
    """Lay the parameters of a pass out over its spans.

    Args:
        plan: the plan.
        sizes: number of scalars of every chosen parameter, in column order.
        generation: the pass.

    Returns:
        The layout; every column of every span is in exactly one piece.
    """
    grid, spans = plan.column_grid, plan.passes[generation]
    first, last = grid.range(spans.start).start, grid.range(spans.stop - 1).stop
    block_of = {name: block.name for block in plan.blocks for name in block.parameters}
    names: list[str] = []
    wanted: list[slice] = []
    pieces: dict[int, list[Piece]] = {span: [] for span in range(spans.start, spans.stop)}
    position = 0
    for name, size in sizes.items():
        start, stop = max(position, first), min(position + size, last)
        offset = start
        if start < stop:
            names.append(name)
            wanted.append(slice(start - position, stop - position))
        while start < stop:
            columns = grid.range(start // grid.span)
            end = min(stop, columns.stop)
            pieces[start // grid.span].append(
                Piece(
                    len(names) - 1,
                    slice(start - offset, end - offset),
                    slice(start - columns.start, end - columns.start),
                )
            )
            start = end
        position += size
    return PassColumns(
        tuple(names),
        tuple(wanted),
        tuple(block_of[name] for name in names),
        tuple((span, tuple(p)) for span, p in pieces.items()),
    )
