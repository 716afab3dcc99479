"""Squared norms of Jacobian rows, from dense gradients and from factors."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

from ooc_ntk.planning.factors import LayerFactors
from ooc_ntk.planning.layout import CONTRACTION_COLUMNS

from .expand import expand_piece, pieces
from .held import Tile, some_samples
from .unfold import unfold_windows


def squared_norms(rows: np.ndarray) -> np.ndarray:
    """Squared norm of each row of a slab, in float32 blocks added up in float64.

    Args:
        rows: (rows, columns), float32 or float64.

    Returns:
        (rows,) float64. Infinite or NaN where a row is not finite, or where its square overflows.
    """
    total = np.zeros(rows.shape[0])
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, rows.shape[1], CONTRACTION_COLUMNS):
            block = rows[:, start : start + CONTRACTION_COLUMNS]
            total += np.vecdot(block, block)
    return total


#: Samples whose norms are taken together, so that their expanded pieces stay within a few MiB.
NORM_SAMPLES: Final = 32


def factor_norms(factors: LayerFactors, tile: Tile) -> Tensor:
    """Squared norms of the gradients that factors stand for, by expanding them or by pairs of positions.

    Args:
        factors: shapes of the factors.
        tile: the factors.

    Returns:
        (samples, rows) float64.
    """
    inputs, gradients = tile[:2]
    samples, positions, rows, outputs = gradients.shape
    if samples > NORM_SAMPLES:
        groups = [slice(start, start + NORM_SAMPLES) for start in range(0, samples, NORM_SAMPLES)]
        return torch.cat([factor_norms(factors, some_samples(tile, group)) for group in groups])
    total = torch.zeros(samples, rows, dtype=torch.float64, device=gradients.device)
    by_pairs = positions**2 * (factors.inputs + rows * outputs) < positions * factors.inputs * outputs * rows
    if factors.kind != "tokens" and (factors.lookups or not by_pairs):
        parts = list(pieces(factors, rows, whole_rows=True))
        buffer = gradients.new_empty(samples * max(piece.items(factors) for piece in parts))
        for piece in parts:
            found = expand_piece(factors, tile, piece, buffer).view(samples, rows, -1)
            total += found.square().sum(2, dtype=torch.float64)
        if factors.bias:
            total += gradients.sum(1).square().sum(2, dtype=torch.float64)
        return total
    for start in range(samples):
        own, one = gradients[start].transpose(0, 1), inputs[start : start + 1]
        if factors.kind == "tokens":
            same = (one == one.T) & (one.T >= 0)
            products = same.to(own.dtype)
        else:
            window = factors.window
            if window is None:
                flat = one.view(positions, -1)
            else:
                flat = unfold_windows(one.view(1, *window.size, factors.channels), window).view(positions, -1)
            products = flat @ flat.T
            if factors.bias:
                products = products + 1
        total[start] = ((own @ own.transpose(1, 2)) * products).sum((1, 2), dtype=torch.float64)
    return total
