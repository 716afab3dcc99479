"""The kernel of the fused pairwise contraction: the only module that imports Triton.

Every program sums a few rows and columns of the result by itself and adds nothing atomically, so that two runs give the
same bits. Pairs of positions are taken along diagonals: pairs as far apart meet pixels as far apart, so that the taps
of neighbouring pairs read the same elements again, from the first-level cache, while they are still there.
"""

from __future__ import annotations

import os
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from ooc_ntk.planning.factors import Window

from . import taps

#: Triton's interpreter, on a CPU, calls plain functions as they are.
_INTERPRETED: Final = os.environ.get("TRITON_INTERPRET") == "1"
_lowest_tap = taps.lowest_tap if _INTERPRETED else triton.jit(taps.lowest_tap)
_tap_count = taps.tap_count if _INTERPRETED else triton.jit(taps.tap_count)

#: Rows and columns of the result that a program sums, with so many warps: 256 bytes of each Gram row, two elements a
#: thread (guessed).
_ROWS: Final = 4
_COLUMNS: Final = 64
_OPTIONS: Final = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit  # type: ignore[untyped-decorator]
def _sum_pairs(  # type: ignore[no-untyped-def]  # Triton reads annotations itself
    inputs,
    gradients,
    out,
    rows,
    columns,
    BIAS: tl.constexpr,
    ENTRIES: tl.constexpr,
    OUT0: tl.constexpr,
    OUT1: tl.constexpr,
    OUT2: tl.constexpr,
    SIZE0: tl.constexpr,
    SIZE1: tl.constexpr,
    SIZE2: tl.constexpr,
    TAPS0: tl.constexpr,
    TAPS1: tl.constexpr,
    TAPS2: tl.constexpr,
    STRIDE0: tl.constexpr,
    STRIDE1: tl.constexpr,
    STRIDE2: tl.constexpr,
    APART0: tl.constexpr,
    APART1: tl.constexpr,
    APART2: tl.constexpr,
    BEFORE0: tl.constexpr,
    BEFORE1: tl.constexpr,
    BEFORE2: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUMMED: tl.constexpr,
):
    """Sum ``gradients[s, t] · (BIAS + Σ_taps inputs[s + tap, t + tap])`` over all pairs of positions.

    ``inputs`` are (pixels, rows, pixels, columns), ``gradients`` (positions, rows, ENTRIES, positions, columns,
    ENTRIES), and ``out`` (rows, ENTRIES, columns, ENTRIES), which is set. What follows them is the geometry, see
    :class:`Window`: OUT0 positions along the first dimension, and so on. A program sums ROWS × COLUMNS entries of the
    result, along a diagonal in the type SUMMED.
    """
    height = rows * ENTRIES
    width = columns * ENTRIES
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within = (row < height)[:, None] & (column < width)[None, :]
    gradient_step = tl.cast(width, tl.int64) * (OUT0 * OUT1 * OUT2)  # from one row of a Gram matrix to the next
    input_step = tl.cast(columns, tl.int64) * (SIZE0 * SIZE1 * SIZE2)
    gradients += tl.cast(row, tl.int64)[:, None] * gradient_step + column[None, :]
    inputs += tl.cast(row // ENTRIES, tl.int64)[:, None] * input_step + (column // ENTRIES)[None, :]
    gradient_step *= height  # from one position to the next
    input_step *= rows
    total = tl.zeros([ROWS, COLUMNS], tl.float64)
    for d0 in range(1 - OUT0, OUT0):
        for d1 in range(1 - OUT1, OUT1):
            for d2 in range(1 - OUT2, OUT2):
                diagonal = tl.zeros([ROWS, COLUMNS], SUMMED)
                for s0 in range(max(0, -d0), min(OUT0, OUT0 - d0)):
                    low0 = _lowest_tap(min(s0, s0 + d0), STRIDE0, APART0, BEFORE0)
                    high0 = _tap_count(max(s0, s0 + d0), TAPS0, SIZE0, STRIDE0, APART0, BEFORE0)
                    for s1 in range(max(0, -d1), min(OUT1, OUT1 - d1)):
                        low1 = _lowest_tap(min(s1, s1 + d1), STRIDE1, APART1, BEFORE1)
                        high1 = _tap_count(max(s1, s1 + d1), TAPS1, SIZE1, STRIDE1, APART1, BEFORE1)
                        for s2 in range(max(0, -d2), min(OUT2, OUT2 - d2)):
                            low2 = _lowest_tap(min(s2, s2 + d2), STRIDE2, APART2, BEFORE2)
                            high2 = _tap_count(max(s2, s2 + d2), TAPS2, SIZE2, STRIDE2, APART2, BEFORE2)
                            product = tl.full([ROWS, COLUMNS], BIAS, SUMMED)
                            for k0 in range(low0, high0):
                                p0 = s0 * STRIDE0 + k0 * APART0 - BEFORE0
                                for k1 in range(low1, high1):
                                    p1 = s1 * STRIDE1 + k1 * APART1 - BEFORE1
                                    for k2 in tl.static_range(TAPS2):
                                        p2 = s2 * STRIDE2 + k2 * APART2 - BEFORE2
                                        p = (p0 * SIZE1 + p1) * SIZE2 + p2
                                        q = p + (d0 * STRIDE0 * SIZE1 + d1 * STRIDE1) * SIZE2 + d2 * STRIDE2
                                        place = inputs + p * input_step + q * columns
                                        tap = tl.full([ROWS, COLUMNS], k2, tl.int32)
                                        there = within & (tap >= low2) & (tap < high2)
                                        product += tl.load(place, mask=there, other=0.0).to(SUMMED)
                            s = (s0 * OUT1 + s1) * OUT2 + s2
                            t = s + (d0 * OUT1 + d1) * OUT2 + d2
                            place = gradients + s * gradient_step + t * width
                            diagonal += tl.load(place, mask=within, other=0.0).to(SUMMED) * product
                total += diagonal.to(tl.float64)
    out += tl.cast(row, tl.int64)[:, None] * width + column[None, :]
    tl.store(out, total.to(out.dtype.element_ty), mask=within)


def sum_pairs(
    inputs: Tensor, gradients: Tensor, out: Tensor, window: Window, rows: int, columns: int, entries: int, *, bias: bool
) -> None:
    """Launch the kernel; see :func:`ooc_ntk.compute.fused.sum_windows`."""
    constants = constants_of(window, rows, columns, entries, inputs.dtype, bias=bias)
    grid = (triton.cdiv(rows * entries, constants["ROWS"]), triton.cdiv(columns * entries, constants["COLUMNS"]))
    _sum_pairs[grid](inputs, gradients, out, rows, columns, **constants, **_OPTIONS)


def constants_of(
    window: Window, rows: int, columns: int, entries: int, dtype: torch.dtype, *, bias: bool
) -> dict[str, Any]:
    """What the kernel is compiled for."""
    found: dict[str, Any] = {"BIAS": int(bias), "ENTRIES": entries}
    for name, values, filled in (
        ("OUT", window.output, 1),
        ("SIZE", window.size, 1),
        ("TAPS", window.kernel, 1),
        ("STRIDE", window.stride, 1),
        ("APART", window.dilation, 1),
        ("BEFORE", window.before, 0),
    ):
        # Dimensions that are not there come first, so that the last one is that along which taps are unrolled.
        for dim, value in enumerate((filled,) * (3 - len(values)) + tuple(values)):
            found[f"{name}{dim}"] = value
    found["ROWS"] = min(_ROWS, triton.next_power_of_2(rows * entries))
    found["COLUMNS"] = min(_COLUMNS, triton.next_power_of_2(columns * entries))
    found["SUMMED"] = tl.float64 if dtype == torch.float64 else tl.float32
    return found
