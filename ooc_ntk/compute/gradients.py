"""Gradients of one parameter piece by piece, each with its places in the parameter: what a projection takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ooc_ntk.planning.factors import LayerFactors
from ooc_ntk.planning.memory import HOST_CHUNKS, SketchChunks, rule_samples

from .capture import Capture, Captured
from .expand import Piece, expand_piece, pieces
from .held import Tile, some_samples
from .rules.base import Call, OuterRule
from .structure import Use, to_samples


@dataclass(frozen=True)
class GradientPiece:
    """Part of the gradients of one parameter.

    Attributes:
        samples: which samples of the batch.
        rows: which Jacobian rows of each.
        values: (samples, rows, m · k), columns next to each other; valid until the next piece.
        outer: (m,) int64, and
        inner: (k,) int64: column ``i · k + j`` is place ``outer[i] + inner[j]`` of the flat parameter.
        key: names these places within the parameter, the same for every batch; None if they differ from batch to batch.
        start: first of the places, if they follow each other; otherwise None.
    """

    samples: slice
    rows: slice
    values: Tensor
    outer: Tensor
    inner: Tensor
    key: tuple[int, ...] | None
    start: int | None = None

    @property
    def columns(self) -> Tensor:
        """Places in the flat parameter, (n,) int64."""
        return (self.outer[:, None] + self.inner[None]).reshape(-1)


def gradient_pieces(
    capture: Capture,
    captured: Captured,
    name: str,
    *,
    whole_rows: bool = False,
    chunks: SketchChunks = HOST_CHUNKS,
) -> Iterator[GradientPiece]:
    """Yield the gradients of a parameter that layer rules derive; what several pieces have at one place adds up.

    Args:
        capture: what derived the batch.
        captured: what it gave.
        name: the parameter.
        whole_rows: whether pieces hold all rows of a sample, where making their part of a projection is dear.
        chunks: what is worked on at a time.

    Yields:
        Pieces of a few MiB (on a device, more).
    """
    every, rows = slice(0, captured.samples), slice(0, capture.rows)
    if name in captured.rows:
        yield from contiguous_pieces(captured.rows[name], every, chunks)
        return
    if any(name in layer.parameters for layer in capture.modules.values()):  # never called: no gradient by its rule
        return
    layer = next(layer for layer in capture.layers if name in layer.parameters)
    tiles = captured.factors[layer.parameters[0]]
    if name != layer.parameters[0]:
        for tile in tiles:
            yield from contiguous_pieces(tile[1].sum(1), every, chunks)
        return
    for number, (use, tile) in enumerate(zip(layer.uses, tiles, strict=False)):
        shapes = layer.factors or use.factors
        assert shapes is not None
        assert isinstance(use.rule, OuterRule)
        call = captured.calls[use.number]
        if use.rule.groups(call) > 1:
            yield from _grouped(captured, use, call, shapes, tile, capture.function.sizes[name] * capture.rows, chunks)
        elif shapes.kind == "tokens":
            yield from _looked_up(shapes, tile, rows)
        else:
            known = (name, number)
            yield from _expanded(capture, known, use.rule, call, shapes, tile, chunks, whole_rows=whole_rows)


def contiguous_pieces(values: Tensor, samples: slice, chunks: SketchChunks = HOST_CHUNKS) -> Iterator[GradientPiece]:
    """Whole gradients of a parameter, in its own order, cut into pieces.

    Args:
        values: (samples, rows, numel).
        samples: which samples of the batch they are of.
        chunks: what is worked on at a time.

    Yields:
        Pieces of as many places as are worked on at a time.
    """
    rows, size = values.shape[1:]
    if values.stride(-1) != 1:  # as products of groups may come
        values = values.contiguous()
    for start in range(0, size, chunks.items):
        stop = min(start + chunks.items, size)
        outer = torch.full((1,), start, dtype=torch.int64, device=values.device)
        inner = torch.arange(stop - start, device=values.device)
        yield GradientPiece(samples, slice(0, rows), values[:, :, start:stop], outer, inner, (start, stop), start)


def _expanded(
    capture: Capture,
    whose: tuple[str, int],
    rule: OuterRule,
    call: Call,
    factors: LayerFactors,
    tile: Tile,
    chunks: SketchChunks,
    *,
    whole_rows: bool,
) -> Iterator[GradientPiece]:
    """Pieces expanded into one buffer; ``whose`` is the parameter and the number of its use."""
    gradients = tile[1]
    samples, _, rows, _ = gradients.shape
    # Rows last: pieces that differ in nothing else have the same places, and the same part of a projection.
    parts = sorted(
        pieces(factors, rows, whole_rows=whole_rows, items=chunks.items),
        key=lambda part: (part.channels.start, part.outputs.start, part.rows.start),
    )
    # All at once: small tensors that stay, made between large ones that go, would cut the heap to pieces.
    cut, places = capture.places.get(whose, ([], []))
    if cut != parts:
        places = [_places(rule, call, factors, part, gradients.device) for part in parts]
        capture.places[whose] = parts, places
    buffer = gradients.new_empty(samples * max(part.items(factors) for part in parts))
    for part, (outer, inner) in zip(parts, places, strict=True):
        found = expand_piece(factors, tile, part, buffer, unfolded_bytes=chunks.unfolded_bytes)
        values = found.view(samples, part.rows.stop - part.rows.start, -1)
        whole = part.channels == slice(0, factors.inputs) and type(rule).weight_columns is OuterRule.weight_columns
        start = part.outputs.start * factors.inputs if whole and not rule.transposed else None
        # With the number of the use: two uses of one weight may have its rows and columns the other way round.
        key = (whose[1], part.channels.start, part.channels.stop, part.outputs.start, part.outputs.stop)
        yield GradientPiece(slice(0, samples), part.rows, values, outer, inner, key, start)


def _places(
    rule: OuterRule, call: Call, factors: LayerFactors, part: Piece, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Places in the weight of an expanded piece: outputs first, then taps, then channels."""
    outputs = torch.arange(part.outputs.start, part.outputs.stop, device=device)
    inputs = torch.arange(part.channels.start, part.channels.stop, device=device)
    if factors.window is not None:
        taps = torch.arange(factors.window.taps, device=device)
        inputs = (taps[:, None] * factors.channels + inputs[None]).reshape(-1)
    return rule.weight_columns(call, factors, outputs, inputs)


def _looked_up(factors: LayerFactors, tile: Tile, rows: slice) -> Iterator[GradientPiece]:
    """The rows of a table that each sample looks up, sample by sample; equal ones add up."""
    inputs, gradients = tile[:2]
    width = torch.arange(factors.outputs, device=gradients.device)
    for index in range(len(inputs)):
        there = inputs[index] >= 0
        outer = inputs[index][there].long() * factors.outputs
        values = gradients[index][there].transpose(0, 1).flatten(1)[None]
        if len(outer):
            yield GradientPiece(slice(index, index + 1), rows, values.contiguous(), outer, width, None)


def _grouped(
    captured: Captured, use: Use, call: Call, factors: LayerFactors, tile: Tile, items: int, chunks: SketchChunks
) -> Iterator[GradientPiece]:
    """Weights of layers with groups, expanded whole for some samples at a time."""
    rule = use.rule
    assert isinstance(rule, OuterRule)
    step = rule_samples(items * tile[1].element_size())
    shape = to_samples(call.inputs, use.input_axis, captured.samples).shape[1:]
    for start in range(0, captured.samples, step):
        samples = slice(start, min(start + step, captured.samples))
        inputs, gradients = some_samples(tile, samples)
        windows = rule.unfolded(call, inputs.view(-1, *shape), factors)
        yield from contiguous_pieces(rule.grouped(call, windows, gradients), samples, chunks)
