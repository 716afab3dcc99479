"""Convolutions of one to three dimensions and transposed ones; modules pad themselves where not with zeros."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

from ooc_ntk.compute.unfold import unfold_windows
from ooc_ntk.planning.factors import LayerFactors, Window

from .base import Call, Functions, OuterRule, Signature


def _each(value: Any, dims: int) -> tuple[int, ...]:
    """An integer or a sequence, one value per dimension."""
    if isinstance(value, int):
        return (value,) * dims
    found = tuple(int(entry) for entry in value)
    return found * dims if len(found) == 1 else found


def _padding(value: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Zeros before and after every dimension; ``same`` pads one more behind where the total is odd."""
    dims = len(kernel)
    if value == "valid":
        return (0,) * dims, (0,) * dims
    if value == "same":
        total = tuple(d * (k - 1) for k, d in zip(kernel, dilation, strict=True))
        before = tuple(t // 2 for t in total)
        return before, tuple(t - b for t, b in zip(total, before, strict=True))
    both = _each(value, dims)
    return both, both


class Convolution(OuterRule):
    """``conv(x, W)``: inputs are held as pixels, channels last; A are the windows of the kernel, channels last too."""

    functions: ClassVar[Functions] = (F.conv1d, F.conv2d, F.conv3d)
    signature: ClassVar[Signature] = (
        ("input", None),
        ("weight", None),
        ("bias", None),
        ("stride", 1),
        ("padding", 0),
        ("dilation", 1),
        ("groups", 1),
    )

    def window(self, call: Call, inputs: Tensor) -> Window:
        """Geometry of a call on (samples, ..., channels, *size) inputs."""
        kernel = tuple(call.arguments["weight"].shape[2:])
        dims = len(kernel)
        dilation = _each(call.arguments["dilation"], dims)
        before, after = _padding(call.arguments["padding"], kernel, dilation)
        return Window(
            size=tuple(inputs.shape[-dims:]),
            kernel=kernel,
            stride=_each(call.arguments["stride"], dims),
            dilation=dilation,
            before=before,
            after=after,
        )

    def groups(self, call: Call) -> int:
        """Groups of channels."""
        return int(call.arguments["groups"])

    def factors(self, call: Call, inputs: Tensor, output: Tensor) -> LayerFactors:
        """See :class:`OuterRule`; several images per sample are unfolded at once."""
        window, weight = self.window(call, inputs), call.arguments["weight"]
        images = inputs[0].numel() // (window.pixels * inputs.shape[-1 - len(window.size)])
        positions = images * math.prod(window.output)
        length, outputs, bias = weight[0].numel(), output.shape[-1 - len(window.size)], call.bias is not None
        if images == 1 and self.groups(call) == 1:
            if window.taps == 1 and not any(window.before) and not any(window.after):
                return LayerFactors("linear", positions, length, outputs, bias, channels_first=True)
            return LayerFactors("convolution", positions, length, outputs, bias, window, channels_first=True)
        return LayerFactors("linear", positions, length, outputs, bias)

    def hold(self, call: Call, inputs: Tensor, factors: LayerFactors) -> Tensor:
        """See :class:`OuterRule`."""
        window = self.window(call, inputs)
        if factors.window is not None:
            return inputs.movedim(1, -1)
        if window.taps == 1 and self.groups(call) == 1 and inputs.ndim == 2 + len(window.size):
            steps = tuple(slice(None, None, step) for step in window.stride)
            return inputs.movedim(1, -1)[(slice(None), *steps)]
        return self.unfolded(call, inputs, factors).reshape(inputs.shape[0], -1)

    def unfolded(self, call: Call, inputs: Tensor, factors: LayerFactors) -> Tensor:
        """Windows of every image: (samples, positions, taps · channels)."""
        del factors
        window = self.window(call, inputs)
        dims = len(window.size)
        images = inputs.reshape(-1, *inputs.shape[-1 - dims :]).movedim(1, -1).contiguous()
        found = unfold_windows(images, window)
        return found.view(inputs.shape[0], -1, found.shape[-2] * found.shape[-1])

    def weight_order(self, call: Call, gradients: Tensor) -> Tensor:
        """Windows are (taps, channels), the weight is (outputs, channels, taps)."""
        samples, rows, outputs, inputs = gradients.shape
        taps = math.prod(call.arguments["weight"].shape[2:])
        return gradients.view(samples, rows, outputs, taps, inputs // taps).transpose(3, 4).flatten(2)

    def weight_columns(
        self, call: Call, factors: LayerFactors, outputs: Tensor, inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See :class:`OuterRule`; tap t of channel c is input ``t · channels + c`` of a window."""
        taps = math.prod(call.arguments["weight"].shape[2:])
        channels = factors.inputs // taps
        return super().weight_columns(call, factors, outputs, inputs % channels * taps + inputs // channels)

    def grouped(self, call: Call, inputs: Tensor, gradients: Tensor) -> Tensor:
        """See :class:`OuterRule`; windows are (taps, groups · channels)."""
        groups, taps = self.groups(call), math.prod(call.arguments["weight"].shape[2:])
        samples, positions, rows, outputs = gradients.shape
        a = inputs.view(samples, positions, taps, groups, -1)
        g = gradients.view(samples, positions, rows, groups, outputs // groups)
        return torch.einsum("nskgc,nsrgb->nrgbck", a, g).flatten(2)

    def gradient(self, call: Call, inputs: Tensor, gradient: Tensor) -> Tensor:
        """See :class:`OuterRule`."""
        del inputs
        dims = call.arguments["weight"].ndim - 2
        return gradient.movedim(-1 - dims, -1)


class TransposedConvolution(OuterRule):
    """``conv_transpose(x, W)``: A = x, G = the windows of the output gradient that every input pixel spreads to."""

    functions: ClassVar[Functions] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
    signature: ClassVar[Signature] = (
        ("input", None),
        ("weight", None),
        ("bias", None),
        ("stride", 1),
        ("padding", 0),
        ("output_padding", 0),
        ("groups", 1),
        ("dilation", 1),
    )
    transposed = True
    shares_bias = False

    def groups(self, call: Call) -> int:
        """Groups of channels."""
        return int(call.arguments["groups"])

    def covers(self, call: Call) -> str:
        """See :class:`Rule`."""
        return "" if call.inputs.ndim == call.arguments["weight"].ndim else "its input has no samples"

    def factors(self, call: Call, inputs: Tensor, output: Tensor) -> LayerFactors:
        """See :class:`OuterRule`."""
        del output
        weight = call.arguments["weight"]
        outputs = self.groups(call) * weight[0].numel()
        return LayerFactors("linear", math.prod(inputs.shape[2:]), weight.shape[0], outputs)

    def hold(self, call: Call, inputs: Tensor, factors: LayerFactors) -> Tensor:
        """See :class:`OuterRule`."""
        del call, factors
        return inputs.movedim(1, -1)

    def gradient(self, call: Call, inputs: Tensor, gradient: Tensor) -> Tensor:
        """Windows of the output gradient, (samples, input pixels, channels, taps), the weight's order."""
        weight = call.arguments["weight"]
        kernel = tuple(weight.shape[2:])
        dims, size = len(kernel), tuple(inputs.shape[2:])
        stride, dilation = _each(call.arguments["stride"], dims), _each(call.arguments["dilation"], dims)
        before = _each(call.arguments["padding"], dims)
        there = tuple(gradient.shape[2:])
        # Behind, as much as the last input pixel's window needs (negative where output_padding adds unused pixels).
        reach = ((n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(size, stride, dilation, kernel, strict=True))
        after = tuple(r - t - b for r, t, b in zip(reach, there, before, strict=True))
        window = Window(there, kernel, stride, dilation, before, after)
        return unfold_windows(gradient.movedim(1, -1).contiguous(), window).transpose(2, 3)

    def bias_gradient(self, call: Call, inputs: Tensor, gradient: Tensor) -> Tensor:
        """See :class:`OuterRule`."""
        del call, inputs
        return gradient.flatten(2).sum(2)

    def grouped(self, call: Call, inputs: Tensor, gradients: Tensor) -> Tensor:
        """See :class:`OuterRule`; gradients are (groups, channels, taps)."""
        groups = self.groups(call)
        samples, positions, rows, outputs = gradients.shape
        a = inputs.view(samples, positions, groups, -1)
        g = gradients.view(samples, positions, rows, groups, outputs // groups)
        return torch.einsum("nsgc,nsrgb->nrgcb", a, g).flatten(2)


#: The rules of this module.
RULES: Final = (Convolution(), TransposedConvolution())
