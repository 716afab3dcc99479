"""Spans: what a tile of the Jacobian is cut into, and the arrays in which each is held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from .factors import TOKEN_BYTES, LayerFactors
from .tiles import ColumnGrid

Representation = Literal["dense", "factored", "tokens", "projected"]
Contraction = Literal["gemm", "pairwise", "matching", "tensorsketch"]


@dataclass(frozen=True)
class Choice:
    """How one parameter block is held and contracted.

    Attributes:
        representation: ``dense`` (gradients), ``factored`` (layer inputs and output gradients) or ``tokens``
            (row numbers and output gradients of an embedding); of a projected job ``projected``, as nothing is held.
        contraction: ``gemm`` (of gradients, expanded just before where factored), ``pairwise`` (Gram matrices of both
            factors, multiplied position by position) or ``matching`` (equal tokens only); ``tensorsketch`` for weights
            that are projected from their factors.
    """

    representation: Representation
    contraction: Contraction

    @property
    def name(self) -> str:
        """In the words of ``--representation``: ``factored`` is expanded and multiplied, ``pairwise`` never expanded.

        >>> Choice("factored", "pairwise").name, Choice("factored", "gemm").name
        ('pairwise', 'factored')
        """
        return self.contraction if self.contraction in ("pairwise", "tensorsketch") else self.representation


DENSE: Final = Choice("dense", "gemm")
FACTORED: Final = Choice("factored", "gemm")
PAIRWISE: Final = Choice("factored", "pairwise")
TOKENS: Final = Choice("tokens", "matching")

#: Gradients are multiplied with R piece by piece, or a weight is sketched from its factors; nothing of them is held.
PROJECTED: Final = Choice("projected", "gemm")
TENSOR_SKETCHED: Final = Choice("projected", "tensorsketch")


@dataclass(frozen=True)
class Span:
    """A run of dense columns, or one block that is held as factors.

    Attributes:
        index: its number within the layout.
        start: first column, counted over the columns of dense blocks only.
        stop: one past the last; both 0 for factors.
        block: index of the block that is held as factors, None for dense columns.
    """

    index: int
    start: int
    stop: int
    block: int | None = None

    @property
    def columns(self) -> int:
        """Dense columns."""
        return self.stop - self.start


@dataclass(frozen=True)
class Part:
    """One array in which tiles of a span are held: (samples, items).

    Attributes:
        span: index of its span.
        name: ``dense``, ``inputs`` or ``gradients``.
        items: elements per sample.
        padded: elements per sample on disk, where the last dense span is padded to the width of the others.
        item_bytes: bytes of an element.
        tokens: whether the elements are whole numbers.
    """

    span: int
    name: Literal["dense", "inputs", "gradients"]
    items: int
    padded: int
    item_bytes: int
    tokens: bool = False

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample in memory."""
        return self.items * self.item_bytes

    @property
    def stored_bytes(self) -> int:
        """Bytes of one sample on disk."""
        return self.padded * self.item_bytes


@dataclass(frozen=True)
class BlockShape:
    """What spans need to know of a block: its columns and the shapes of its factors."""

    columns: int
    factors: LayerFactors | None = None


@dataclass(frozen=True)
class Cut:
    """A Jacobian cut into spans, with what each of them takes.

    Attributes:
        spans: every span, in the order of the model's blocks.
        parts: the arrays that hold each span.
        held: bytes of one sample in each span, in memory.
        stored: bytes of one sample in each span on disk, where the last dense span is padded.
    """

    spans: tuple[Span, ...]
    parts: tuple[tuple[Part, ...], ...]
    held: tuple[int, ...]
    stored: tuple[int, ...]

    @classmethod
    def of(
        cls, blocks: Sequence[BlockShape], choices: Sequence[Choice], rows: int, item_bytes: int, span_columns: int
    ) -> Cut:
        """Cut blocks as their choices ask for; see :func:`lay_spans` and :func:`span_parts`."""
        spans = lay_spans(blocks, choices, span_columns)
        parts = tuple(span_parts(span, blocks, rows, item_bytes, span_columns) for span in spans)
        return cls(
            spans,
            parts,
            tuple(sum(part.sample_bytes for part in found) for found in parts),
            tuple(sum(part.stored_bytes for part in found) for found in parts),
        )


def lay_spans(blocks: Sequence[BlockShape], choices: Sequence[Choice], span_columns: int) -> tuple[Span, ...]:
    """Cut blocks into spans: dense columns into equal widths, every other block into a span of its own.

    Spans are in the order of the model's blocks, so that a pass over some of them touches neighbouring layers.

    Args:
        blocks: every block, in column order.
        choices: how each is held.
        span_columns: dense columns per span.

    Returns:
        Spans; every dense column is in exactly one, every other block has one.

    >>> shapes = (BlockShape(6), BlockShape(50), BlockShape(4))
    >>> [(s.start, s.stop, s.block) for s in lay_spans(shapes, (DENSE, FACTORED, DENSE), 5)]
    [(0, 5, None), (0, 0, 1), (5, 10, None)]
    """
    found: list[tuple[int, int, int, int | None]] = []
    dense = [index for index, choice in enumerate(choices) if choice.representation == "dense"]
    grid = ColumnGrid(sum(blocks[index].columns for index in dense), span_columns)
    edges, position = [], 0
    for index in dense:
        position += blocks[index].columns
        edges.append((position, index))
    cursor = 0
    for number in range(grid.spans):
        columns = grid.range(number)
        while edges[cursor][0] < columns.stop:
            cursor += 1
        found.append((edges[cursor][1], columns.start, columns.stop, None))
    found += [(index, 0, 0, index) for index, choice in enumerate(choices) if choice.representation != "dense"]
    found.sort(key=lambda entry: (entry[0], entry[1]))
    return tuple(Span(number, start, stop, block) for number, (_, start, stop, block) in enumerate(found))


def span_parts(
    span: Span, blocks: Sequence[BlockShape], rows: int, item_bytes: int, span_columns: int
) -> tuple[Part, ...]:
    """The arrays that hold a span.

    Args:
        span: the span.
        blocks: every block.
        rows: Jacobian rows per sample.
        item_bytes: bytes of an element in the plan's precision.
        span_columns: dense columns per span.

    Returns:
        One part for dense columns, inputs and gradients for factors.
    """
    if span.block is None:
        return (Part(span.index, "dense", rows * span.columns, rows * span_columns, item_bytes),)
    factors = blocks[span.block].factors
    assert factors is not None  # only such blocks are ever held as factors
    tokens = factors.kind == "tokens"
    inputs, gradients = factors.input_items, rows * factors.gradient_items
    return (
        Part(span.index, "inputs", inputs, inputs, TOKEN_BYTES if tokens else item_bytes, tokens),
        Part(span.index, "gradients", gradients, gradients, item_bytes),
    )
