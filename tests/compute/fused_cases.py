"""Blocks that the fused kernel contracts, and what it should give by definition, without Triton."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from ooc_ntk.compute.fused import gram_window
from ooc_ntk.compute.held import as_tile
from ooc_ntk.planning.factors import LayerFactors
from tests.compute.test_contraction import BY_PIXELS, LINEAR, UNFOLDED

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "float64": torch.float64}

#: Jacobian rows per sample.
ROWS = 2


@dataclass(frozen=True)
class FusedCase:
    """A block, its samples, and how it is contracted."""

    factors: LayerFactors
    entries: int = 1
    precision: str = "float32"
    rows: int = 2
    columns: int = 3

    @property
    def shape(self) -> tuple[int, int]:
        """Of the result."""
        return self.rows * self.entries, self.columns * self.entries


CASES = {
    **{f"pixels, {name}": FusedCase(factors) for name, factors in BY_PIXELS.items()},
    "pixels, line, full": FusedCase(BY_PIXELS["line"], ROWS),
    "pixels, two padded sides, full": FusedCase(BY_PIXELS["two padded sides"], ROWS),
    "pixels, line, float64": FusedCase(BY_PIXELS["line"], 1, "float64"),
    "pixels, wide padding, bf16": FusedCase(BY_PIXELS["wide padding"], 1, "bf16"),
    "pixels, line, several programs": FusedCase(BY_PIXELS["line"], rows=5, columns=70),
    "unfolded, strided line": FusedCase(UNFOLDED["strided line"]),
    "positions": FusedCase(LINEAR["positions"]),
    "positions with bias, full": FusedCase(LINEAR["positions with bias"], ROWS),
}

#: Those whose whole contraction is compared, from factors to the result.
WHOLE = ("pixels, square", "pixels, line, full", "pixels, wide padding, bf16", "unfolded, strided line", "positions")


def grams(case: FusedCase) -> tuple[Tensor, Tensor]:
    """Gram matrices of inputs and of gradients, as the kernel is given them."""
    pixels, positions = gram_window(case.factors).pixels, case.factors.positions
    inputs = torch.randn(pixels * case.rows, pixels * case.columns)
    gradients = torch.randn(positions * case.shape[0], positions * case.shape[1])
    return inputs.to(DTYPES[case.precision]), gradients.to(DTYPES[case.precision])


def tiles(case: FusedCase) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Both sides of a block."""

    def side(samples: int) -> tuple[Tensor, ...]:
        inputs = torch.randn(samples, case.factors.input_items).to(DTYPES[case.precision])
        gradients = torch.randn(samples, ROWS * case.factors.gradient_items).to(DTYPES[case.precision])
        return as_tile(case.factors, inputs, gradients, ROWS)

    return side(case.rows), side(case.columns)


def wanted(case: FusedCase, inputs: Tensor, gradients: Tensor) -> Tensor:
    """The sum by definition: every pair of positions, every tap that lies within the input on both sides."""
    window, entries = gram_window(case.factors), case.entries
    pixels = inputs.view(window.pixels, case.rows, window.pixels, case.columns)
    positions = case.factors.positions
    weights = gradients.view(positions, case.rows, entries, positions, case.columns, entries)
    total = torch.zeros(case.rows, entries, case.columns, entries, dtype=inputs.dtype)
    for (s, one), (t, other) in itertools.product(enumerate(itertools.product(*map(range, window.output))), repeat=2):
        product = inputs.new_full((case.rows, case.columns), float(case.factors.bias))
        for tap in itertools.product(*map(range, window.kernel)):
            p, q = (_pixel(window, position, tap) for position in (one, other))
            if p is not None and q is not None:
                product += pixels[p, :, q]
        total += weights[s, :, :, t] * product[:, None, :, None]
    return total.reshape(case.rows * entries, case.columns * entries)


def _pixel(window, position, tap) -> int | None:
    """The pixel of a tap, counted along all dimensions; None where it is padding."""
    found = 0
    for dim, size in enumerate(window.size):
        place = position[dim] * window.stride[dim] + tap[dim] * window.dilation[dim] - window.before[dim]
        if not 0 <= place < size:
            return None
        found = found * size + place
    return found
