"""How the factors of one layer lie in memory: two matrices, a row per sample, and the tensors that they stand for."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from ooc_ntk.planning.factors import DIGITS, LayerFactors
from ooc_ntk.planning.spans import Contraction

#: Factors of one layer for one tile: inputs (samples, input items) and gradients (samples, positions, rows, outputs);
#: then, for a weight that is looked up as well, the row numbers' digits (samples, lookups, :data:`DIGITS`) and the
#: gradients of these rows (samples, lookups, rows, inputs).
Tile: TypeAlias = tuple[Tensor, ...]

_BASE = 256


def as_tile(
    factors: LayerFactors, inputs: Tensor, gradients: Tensor, rows: int, contraction: Contraction = "pairwise"
) -> Tile:
    """Views of held factors.

    Gradients are held in the order in which they are multiplied: positions first for pairs of them, otherwise as the
    layer gives them, so that those of convolutions are not transposed.

    Args:
        factors: shapes of the factors.
        inputs: (samples, input items).
        gradients: (samples, rows · gradient items).
        rows: Jacobian rows per sample.
        contraction: how they are contracted.

    Returns:
        The tile; nothing is copied.

    >>> tied = LayerFactors("linear", 2, 3, 5, lookups=4)
    >>> held = torch.zeros(7, tied.input_items), torch.zeros(7, 6 * tied.gradient_items)
    >>> [tuple(part.shape) for part in as_tile(tied, *held, rows=6)]
    [(7, 6), (7, 2, 6, 5), (7, 4, 3), (7, 4, 6, 3)]
    """
    samples, positions, lookups = len(inputs), factors.positions, factors.lookups
    if factors.channels_first and contraction == "gemm":
        return inputs, gradients.view(samples, rows, factors.outputs, positions).permute(0, 3, 1, 2)
    if not lookups:
        return inputs, gradients.view(samples, positions, rows, factors.outputs)
    first, second = positions * factors.inputs, positions * rows * factors.outputs
    return (
        inputs[:, :first],
        gradients[:, :second].view(samples, positions, rows, factors.outputs),
        inputs[:, first:].view(samples, lookups, DIGITS),
        gradients[:, second:].view(samples, lookups, rows, factors.inputs),
    )


def some_samples(tile: Tile, samples: slice, rows: slice = slice(None)) -> Tile:
    """Some samples of a tile, and some of their Jacobian rows."""
    return tuple(part[samples, :, rows] if part.ndim == 4 else part[samples] for part in tile)


def split_digits(numbers: Tensor) -> Tensor:
    """Row numbers in digits to base 256, the lowest first: (..., :data:`DIGITS`).

    >>> split_digits(torch.tensor([70_000]))
    tensor([[112,  17,   1]])
    >>> join_digits(split_digits(torch.tensor([0, 255, 256, 70_000])).bfloat16()).tolist()
    [0, 255, 256, 70000]
    """
    return torch.stack([numbers // _BASE**digit % _BASE for digit in range(DIGITS)], -1)


def join_digits(digits: Tensor) -> Tensor:
    """Row numbers from their digits in any dtype, int64."""
    weights = _BASE ** torch.arange(DIGITS, device=digits.device)  # made there: a copy would wait for the device
    return (digits.long() * weights).sum(-1)


#: Rows of a table whose numbers fit the digits.
MOST_ROWS = _BASE**DIGITS
