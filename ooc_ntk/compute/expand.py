"""Expanding factors into gradients: ``Σ_s G[s] ⊗ A[s]`` for all of a layer, or piece by piece into a reused buffer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from ooc_ntk.planning.factors import LayerFactors
from ooc_ntk.planning.memory import EXPANDED_ITEMS, UNFOLDED_BYTES
from ooc_ntk.planning.tiles import even_size

from .held import Tile, join_digits
from .unfold import unfold_windows

#: Input columns of a convolution's piece at least, where outputs can be split instead: each split unfolds anew.
PIECE_INPUTS: Final = 32

#: Input columns of a linear layer's piece at most (measured at 65 positions: pieces of 192 inputs × 128 outputs 267
#: GFLOP/s, of 32 × 512 outputs 159).
LINEAR_INPUTS: Final = 256


@dataclass(frozen=True)
class Piece:
    """A part of a layer's gradients: some channels of the inputs × some rows × some outputs.

    Attributes:
        channels: input channels; their taps belong to the piece as well.
        rows: Jacobian rows of a sample.
        outputs: outputs.
    """

    channels: slice
    rows: slice
    outputs: slice

    def items(self, factors: LayerFactors) -> int:
        """Elements per sample."""
        taps = factors.window.taps if factors.window is not None else 1
        lengths = (part.stop - part.start for part in (self.channels, self.rows, self.outputs))
        return taps * int(math.prod(lengths))


def pieces(factors: LayerFactors, rows: int, *, whole_rows: bool, items: int = EXPANDED_ITEMS) -> Iterator[Piece]:
    """Cut the gradients of a layer into pieces of about ``items`` elements per sample.

    Args:
        factors: shapes of the factors.
        rows: Jacobian rows per sample.
        whole_rows: whether every piece holds all rows (for a full kernel, whose entries are pairs of them).
        items: elements per sample; a piece has more only if all rows of one output and one channel have.

    Yields:
        Pieces that cover every element once.

    >>> factors = LayerFactors("linear", 65, 192, 576)
    >>> found = list(pieces(factors, 10, whole_rows=False))
    >>> sum((p.rows.stop - p.rows.start) * (p.outputs.stop - p.outputs.start) * (p.channels.stop - p.channels.start)
    ...     for p in found) == 10 * 576 * 192
    True
    """
    taps = factors.window.taps if factors.window is not None else 1
    least = min(factors.channels, max(1, PIECE_INPUTS // taps) if factors.window is not None else LINEAR_INPUTS)
    if whole_rows:
        least = min(least, max(1, items // (rows * taps)))
    # Windows are wide enough for one row at a time (measured at 10 rows: 128 channels at 16 × 16 225 GFLOP/s, 120 with
    # all rows and fewer channels).
    wide = factors.channels if factors.window is not None else least
    row_step = rows if whole_rows else max(1, min(rows, items // (factors.outputs * wide * taps)))
    output_step = even_size(factors.outputs, max(1, items // (row_step * least * taps)))
    channel_step = even_size(factors.channels, max(least, items // (row_step * output_step * taps)))
    channel_step = min(channel_step, _unfolded_channels(factors))
    for c in range(0, factors.channels, channel_step):
        channels = slice(c, min(c + channel_step, factors.channels))
        for r in range(0, rows, row_step):
            for o in range(0, factors.outputs, output_step):
                yield Piece(
                    channels,
                    slice(r, min(r + row_step, rows)),
                    slice(o, min(o + output_step, factors.outputs)),
                )


def _unfolded_channels(factors: LayerFactors, item_bytes: int = 4) -> int:
    """Channels of which the windows of one sample fit :data:`UNFOLDED_BYTES`, at least one."""
    if factors.window is None:
        return factors.channels
    return max(1, UNFOLDED_BYTES // (item_bytes * factors.positions * factors.window.taps))


def rows_first(tile: Tile) -> bool:
    """Whether rows first is the faster order of a product: a tenth, if positions are last in memory, as measured."""
    return tile[1].stride(1) == 1


def expand_piece(
    factors: LayerFactors,
    tile: Tile,
    piece: Piece,
    out: Tensor,
    *,
    by_rows: bool = True,
    unfolded_bytes: int = UNFOLDED_BYTES,
) -> Tensor:
    """Expand one piece into a buffer.

    Args:
        factors: shapes of the factors.
        tile: the factors.
        piece: what to expand.
        out: flat buffer with room for it.
        by_rows: whether the rows of a sample come first; any order will do for a trace kernel, see :func:`rows_first`.
        unfolded_bytes: of the buffer of unfolded inputs (at least one sample's).

    Returns:
        (samples, rows · outputs · channels · taps) of the piece, or (samples, channels · taps · rows · outputs); a view
        of ``out``.
    """
    inputs, gradients = tile[:2]
    samples, positions = gradients.shape[:2]
    taps = factors.window.taps if factors.window is not None else 1
    width = taps * (piece.channels.stop - piece.channels.start)
    chosen = gradients[:, :, piece.rows, piece.outputs].flatten(2)
    height = chosen.shape[2]
    found = out[: samples * height * width]
    found = found.view(samples, height, width) if by_rows else found.view(samples, width, height)

    def multiply(part: slice, windows: Tensor) -> None:
        if by_rows:
            torch.bmm(chosen[part].transpose(1, 2), windows, out=found[part])
        else:
            torch.bmm(windows.transpose(1, 2), chosen[part], out=found[part])

    window = factors.window
    if window is None:
        multiply(slice(0, samples), inputs.view(samples, positions, -1)[:, :, piece.channels])
        if factors.lookups:
            _add_lookups(tile, piece, found, by_rows=by_rows)
        return found.view(samples, -1)
    pixels = inputs.view(samples, *window.size, factors.channels)[..., piece.channels]
    step = max(1, unfolded_bytes // (positions * width * inputs.element_size()))
    unfolded = torch.empty(min(step, samples), positions, taps, width // taps, dtype=inputs.dtype, device=inputs.device)
    for start in range(0, samples, step):
        stop = min(start + step, samples)
        windows = unfold_windows(pixels[start:stop], window, unfolded[: stop - start])
        multiply(slice(start, stop), windows.view(stop - start, positions, width))
    return found.view(samples, -1)


def _add_lookups(tile: Tile, piece: Piece, found: Tensor, *, by_rows: bool) -> None:
    """Add the gradients of the rows that samples look up in the weight of a linear layer."""
    digits, gradients = tile[2:]
    numbers = join_digits(digits)
    here = ((numbers >= piece.outputs.start) & (numbers < piece.outputs.stop)).nonzero()
    if not len(here):
        return
    sample, place = here.unbind(1)
    output = numbers[sample, place] - piece.outputs.start
    values = gradients[:, :, piece.rows, piece.channels][sample, place]
    rows, outputs = values.shape[1], piece.outputs.stop - piece.outputs.start
    if values.dtype == torch.bfloat16:
        # Equal ones are added up in float32 first: in bf16 the sum stops growing at 256 of them.
        different, number = (sample * outputs + output).unique(return_inverse=True)
        total = values.new_zeros(len(different), *values.shape[1:], dtype=torch.float32)
        values = total.index_add_(0, number, values.float()).bfloat16()
        sample, output = different // outputs, different % outputs
    if by_rows:
        every = found.view(len(found), rows, outputs, -1)
        row = torch.arange(rows, device=found.device)
        every.index_put_((sample[:, None], row, output[:, None]), values, accumulate=True)
    else:
        # Samples and outputs are chosen one by one and come first, whatever lies between them.
        every = found.view(len(found), -1, rows, outputs).permute(0, 3, 2, 1)
        every.index_put_((sample, output), values, accumulate=True)


def expand(factors: LayerFactors, tile: Tile) -> Tensor:
    """Expand all of a layer.

    Args:
        factors: shapes of the factors.
        tile: the factors; the inputs of tokens are row numbers, negative where there is no row.

    Returns:
        (samples, rows, outputs, inputs), windows with channels last; for tokens (samples, rows, table rows, outputs).
    """
    inputs, gradients = tile[:2]
    samples, positions, rows, outputs = gradients.shape
    if factors.kind == "tokens":
        found = gradients.new_zeros(samples, factors.inputs, rows, outputs)
        there = (inputs >= 0).view(samples, positions, 1, 1)
        index = inputs.clamp(min=0).long() + factors.inputs * torch.arange(samples, device=inputs.device)[:, None]
        found.view(samples * factors.inputs, rows, outputs).index_add_(
            0, index.reshape(-1), (gradients * there).flatten(0, 1)
        )
        return found.transpose(1, 2)
    out = gradients.new_empty(samples * rows * outputs * factors.inputs)
    step = _unfolded_channels(factors, gradients.element_size())
    if step >= factors.channels:
        whole = Piece(slice(0, factors.channels), slice(0, rows), slice(0, outputs))
        return expand_piece(factors, tile, whole, out).view(samples, rows, outputs, factors.inputs)
    found = out.view(samples, rows, outputs, -1, factors.channels)
    buffer = out.new_empty(out.numel() // factors.channels * step)
    for start in range(0, factors.channels, step):
        piece = Piece(slice(start, min(start + step, factors.channels)), slice(0, rows), slice(0, outputs))
        part = expand_piece(factors, tile, piece, buffer)
        found[..., piece.channels] = part.view(*found.shape[:4], -1)
    return found.view(samples, rows, outputs, factors.inputs)
