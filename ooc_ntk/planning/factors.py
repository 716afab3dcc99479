"""Layer factors: the outer-product form of a parameter block, its FLOPs and its bytes (DESIGN: parameter block).

A layer that is linear in its weight has ``∂f_c/∂W (x_i) = Σ_s G_ic[s] ⊗ A_i[s]`` over S positions. What is held of it
are the layer's inputs (before a convolution unfolds them) and the gradients of its outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

#: Bytes of a stored token number.
TOKEN_BYTES: Final = 4

#: Items in which a row number is held beside inputs: its digits to base 256, exact in every dtype.
DIGITS: Final = 3

Kind = Literal["linear", "convolution", "tokens"]


@dataclass(frozen=True)
class Window:
    """Geometry of a convolution whose input is held before unfolding; one entry per spatial dimension.

    Attributes:
        size: spatial size of the input.
        kernel: size of the kernel.
        stride: step between positions.
        dilation: step between taps.
        before: zeros padded in front.
        after: zeros padded behind.
    """

    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def pixels(self) -> int:
        """Pixels of the input."""
        return math.prod(self.size)

    @property
    def taps(self) -> int:
        """Taps of the kernel."""
        return math.prod(self.kernel)

    @property
    def output(self) -> tuple[int, ...]:
        """Spatial size of the output.

        >>> Window((8, 8), (3, 3), (2, 2), (1, 1), (1, 1), (1, 1)).output
        (4, 4)
        """
        padded = (size + a + b for size, a, b in zip(self.size, self.before, self.after, strict=True))
        reach = (d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True))
        return tuple((p - r) // s + 1 for p, r, s in zip(padded, reach, self.stride, strict=True))


@dataclass(frozen=True)
class LayerFactors:
    """Shapes of the factors of one parameter block.

    Attributes:
        kind: ``linear`` (inputs are vectors), ``convolution`` (inputs are pixels, unfolded when contracted) or
            ``tokens`` (inputs are row numbers of the weight).
        positions: positions per sample, all uses of the weight together (S).
        inputs: length of an unfolded input vector (a); for tokens the number of rows of the weight.
        outputs: length of an output gradient (b).
        bias: whether the block has a bias, whose input is 1.
        window: geometry of a convolution.
        matches: different tokens that a pair of samples has in common, as counted in the probe.
        lookups: rows that every sample looks up in the same weight, as an embedding that is tied to a linear layer does
            (linear only). They are held after the positions: numbers of rows with the inputs, gradients of the
            rows, ``inputs`` long, with the gradients.
        channels_first: whether the layer gives its outputs with the positions last in memory, as convolutions do.
    """

    kind: Kind
    positions: int
    inputs: int
    outputs: int
    bias: bool = False
    window: Window | None = None
    matches: float = 0.0
    lookups: int = 0
    channels_first: bool = False

    @property
    def channels(self) -> int:
        """Length of an input vector before unfolding."""
        return self.inputs // self.window.taps if self.window is not None else self.inputs

    @property
    def input_items(self) -> int:
        """Elements held of one sample's inputs.

        >>> LayerFactors("linear", 65, 192, 576).input_items
        12480
        >>> window = Window((4, 4), (3, 3), (1, 1), (1, 1), (1, 1), (1, 1))
        >>> LayerFactors("convolution", 16, 9 * 512, 512, window=window).input_items  # a ninth of the unfolded ones
        8192
        """
        if self.kind == "tokens":
            return self.positions
        pixels = self.window.pixels if self.window is not None else self.positions
        return pixels * self.channels + DIGITS * self.lookups

    @property
    def gradient_items(self) -> int:
        """Elements held of one Jacobian row's output gradients."""
        return self.positions * self.outputs + self.lookups * self.inputs

    @property
    def single(self) -> bool:
        """Whether a sample has one position and looks nothing up, so that a pair of samples is one pair of vectors."""
        return self.positions == 1 and not self.lookups

    @property
    def embedding(self) -> bool:
        """Whether rows of the weight are looked up: it is an embedding, tied to a linear layer or not."""
        return self.kind == "tokens" or self.lookups > 0

    @property
    def columns(self) -> int:
        """Parameters of the block."""
        return (self.inputs + self.bias) * self.outputs

    @property
    def by_pixels(self) -> bool:
        """Whether the inputs' Gram matrix is cheaper taken of pixels and summed over shifts than of unfolded inputs.

        ``A_is·A_jt = Σ_tap x_i[s + tap]·x_j[t + tap]``: pixels² products of c channels instead of S² of taps·c.
        """
        if self.window is None or self.window.taps == 1:
            return False
        return self.window.pixels**2 < self.positions**2 * self.window.taps

    def held_bytes(self, rows: int, item_bytes: int) -> int:
        """Bytes held of one sample with ``rows`` Jacobian rows."""
        inputs = TOKEN_BYTES * self.input_items if self.kind == "tokens" else item_bytes * self.input_items
        return inputs + item_bytes * rows * self.gradient_items

    def expand_flops(self, rows: int) -> int:
        """FLOPs to expand one sample's factors into ``rows`` dense gradients: ``2·S·a·b`` a row (none for tokens).

        Rows that are looked up are added to them, one addition an element.

        >>> LayerFactors("linear", 10, 3, 5).expand_flops(rows=2)
        600
        """
        if self.kind == "tokens":
            return rows * self.gradient_items
        return rows * (2 * self.positions * self.inputs * self.outputs + self.lookups * self.inputs)

    def dense_pair_flops(self, rows: int, entries: int) -> int:
        """FLOPs to contract one pair of samples from dense gradients, ``2·C·a·b`` for a trace kernel."""
        return 2 * self.columns * rows * entries

    def pairwise_pair_flops(self, rows: int, entries: int) -> int:
        """FLOPs to contract one pair of samples from factors: ``2·S²(a + C·b)`` for a trace kernel (DESIGN).

        Tokens: only matching positions count. Convolutions: the cheaper of unfolded inputs and pixels. An embedding
        tied to a linear layer meets it both ways: ``2·2·S·T·C·a`` for T rows looked up, one output of each.

        >>> LayerFactors("linear", 1, 784, 1024).pairwise_pair_flops(rows=10, entries=1)
        22048
        """
        gradients = 2 * rows * entries * self.outputs
        if self.kind == "tokens":
            return int(self.matches * gradients)
        squared = self.positions**2
        if self.by_pixels:
            assert self.window is not None
            inputs = 2 * self.window.pixels**2 * self.channels
        else:
            inputs = 2 * squared * self.inputs
        own = int(self.matches * 2 * rows * entries * self.inputs) if self.lookups else 0
        crossed = 4 * self.positions * self.lookups * rows * (self.inputs + entries)
        return inputs + squared * gradients + own + crossed

    def pairwise_elements(self, entries: int) -> int:
        """Elements per pair of samples that a pairwise contraction multiplies and sums, beside its products."""
        shifts = sum(self.window.kernel) if self.window is not None and self.by_pixels else 0
        return self.positions**2 * (entries**2 + shifts) + 2 * self.positions * self.lookups * entries
