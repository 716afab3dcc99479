"""Pairwise contraction on a device in one step from two Gram matrices, by a kernel of Triton (optional).

Unfused, a convolution's elementwise steps read and write matrices of (pixels · samples)² elements some twenty times
(counted for 3 × 3 taps); the kernel reads both once and writes the result alone. Whether it wins is timed on the device
when a job is measured, and kept in the plan, so that a run gives the same bits wherever it goes on.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, Final

import torch
from torch import Tensor

from ooc_ntk.extras import is_installed, missing
from ooc_ntk.planning.factors import LayerFactors, Window

#: Elements of a Gram matrix up to which the kernel counts positions in 32 bits.
_MOST_ITEMS: Final = 2**31


def can_fuse(factors: LayerFactors, device: str | torch.device) -> bool:
    """Whether the kernel may contract a block there: on a CUDA device with Triton, which torch's builds for CUDA bring.

    Args:
        factors: shapes of the factors.
        device: torch device or its name.
    """
    several = factors.kind != "tokens" and factors.positions > 1
    return several and torch.device(device).type == "cuda" and is_installed("triton")


def load_fused() -> Any:
    """The module of the kernel.

    Raises:
        InputError: if Triton is not installed.
    """
    if not is_installed("triton"):
        raise missing("triton", "the plan contracts layers by a kernel that", "make a new plan in another --out")
    return importlib.import_module("ooc_ntk.compute.fused_triton")  # the only module that imports Triton


def gram_window(factors: LayerFactors) -> Window:
    """Geometry by which positions meet elements of the inputs' Gram matrix: one tap where it is not of pixels.

    >>> gram_window(LayerFactors("linear", 6, 5, 4)).output
    (6,)
    """
    if factors.window is not None and factors.by_pixels:
        return factors.window
    return Window((factors.positions,), (1,), (1,), (1,), (0,), (0,))


def sum_windows(
    inputs: Tensor, gradients: Tensor, factors: LayerFactors, rows: int, columns: int, entries: int
) -> Tensor:
    """``Σ_{s,t}`` of the gradients' Gram matrix times the sum over taps of the inputs' one.

    Products along a diagonal of positions are added up in float32 (float64 for float64), diagonals in float64.

    Args:
        inputs: (pixels · rows, pixels · columns), or positions in place of pixels; on the device, contiguous.
        gradients: (positions · rows · entries, positions · columns · entries), of the same dtype.
        factors: shapes of the factors.
        rows: samples of the rows.
        columns: samples of the columns.
        entries: kernel rows per sample.

    Returns:
        (rows · entries, columns · entries), float32 or float64.

    Raises:
        InputError: if Triton is not installed.
    """
    assert max(inputs.shape[0], gradients.shape[0], *inputs.shape[1:], *gradients.shape[1:]) < _MOST_ITEMS
    kind = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    out = torch.empty(rows * entries, columns * entries, dtype=kind, device=inputs.device)
    window = gram_window(factors)
    kernel = load_fused()
    # Triton launches on the current device.
    with torch.cuda.device_of(inputs):  # type: ignore[no-untyped-call]
        kernel.sum_pairs(inputs, gradients, out, window, rows, columns, entries, bias=factors.bias)
    return out
