"""EfficientNet-B7 with the names, shapes and initial values that torchvision gives it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

#: Stages of EfficientNet-B0 (Tan and Le 2019, table 1): expansion, kernel, stride, input and output channels, blocks.
_BASE: Final = (
    (1, 3, 1, 32, 16, 1),
    (6, 3, 2, 16, 24, 2),
    (6, 5, 2, 24, 40, 2),
    (6, 3, 2, 40, 80, 3),
    (6, 5, 1, 80, 112, 3),
    (6, 5, 2, 112, 192, 4),
    (6, 3, 1, 192, 320, 1),
)
#: B7 is B0 twice as wide and 3.1 times as deep (the authors' published coefficients).
_WIDER: Final = 2.0
_DEEPER: Final = 3.1
#: Probability with which the last block is dropped in training; it falls to 0 linearly towards the first.
_DROP_BLOCK: Final = 0.2
_DROP_FEATURE: Final = 0.5
#: Of the norm layers, as TensorFlow's weights and torchvision's B5 to B7 have them; torch's own are 1e-5 and 0.1.
_EPS: Final = 1e-3
_MOMENTUM: Final = 1e-2


def widened(channels: int) -> int:
    """Channels of B7 where B0 has the given number: twice as many, a multiple of 8, never less than 90% of it.

    >>> [widened(channels) for channels in (32, 40, 112, 320)]
    [64, 80, 224, 640]
    """
    wanted = channels * _WIDER
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * wanted else rounded + 8


@dataclass(frozen=True)
class BlockShape:
    """What one block is made of.

    Attributes:
        expansion: channels inside over input channels.
        kernel: side of the depthwise kernel, pixels.
        stride: of the depthwise convolution.
        inputs: input channels.
        outputs: output channels.
    """

    expansion: int
    kernel: int
    stride: int
    inputs: int
    outputs: int


class ConvNorm(nn.Sequential):
    """Convolution without a bias, batch norm and SiLU: (samples, inputs, h, w) → (samples, outputs, h', w').

    Args:
        inputs: input channels.
        outputs: output channels.
        kernel: side of the kernel; the border is padded to keep the size at stride 1.
        stride: of the convolution.
        groups: of the convolution.
        activate: whether SiLU follows.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1, activate: bool = True
    ) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs, eps=_EPS, momentum=_MOMENTUM),
        ]
        super().__init__(*layers, *([nn.SiLU(inplace=True)] if activate else []))


class SqueezeExcitation(nn.Module):
    """Scales every channel by a number in (0, 1) made from all channel means: (samples, channels, h, w) → the same.

    Hu et al. 2018, *Squeeze-and-excitation networks*, arXiv 1709.01507, with SiLU and 1 × 1 convolutions.
    """

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.activation = nn.SiLU(inplace=True)
        self.scale_activation = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels; shapes as in the class."""
        scale: Tensor = self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x)))))
        return scale * x


class StochasticDepth(nn.Module):
    """Sets whole samples to zero at random in training; the identity in eval mode: any shape → the same.

    Huang et al. 2016, *Deep networks with stochastic depth*, arXiv 1603.09382.

    Args:
        probability: with which a sample is set to zero, below 1; the others are scaled up by 1/(1 − probability).
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """Drop samples along the first axis, in training only."""
        if not self.training or self.probability == 0:
            return x
        kept = 1 - self.probability
        noise = torch.empty((len(x), *[1] * (x.dim() - 1)), dtype=x.dtype, device=x.device)
        return x * noise.bernoulli_(kept).div_(kept)


class MBConv(nn.Module):
    """Inverted residual block with squeeze-excitation: (samples, inputs, h, w) → (samples, outputs, h', w').

    Sandler et al. 2018, arXiv 1801.04381; Tan and Le 2019, arXiv 1905.11946.
    """

    def __init__(self, shape: BlockShape, drop: float) -> None:
        super().__init__()
        self._residual = shape.stride == 1 and shape.inputs == shape.outputs
        inside = shape.inputs * shape.expansion
        layers: list[nn.Module] = [] if shape.expansion == 1 else [ConvNorm(shape.inputs, inside, 1)]
        layers.append(ConvNorm(inside, inside, shape.kernel, stride=shape.stride, groups=inside))
        layers.append(SqueezeExcitation(inside, max(1, shape.inputs // 4)))
        layers.append(ConvNorm(inside, shape.outputs, 1, activate=False))
        self.block = nn.Sequential(*layers)
        self.stochastic_depth = StochasticDepth(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block, with a shortcut where the shapes allow it; shapes as in the class."""
        out: Tensor = self.block(x)
        if self._residual:
            out = self.stochastic_depth(out)
            out += x
        return out


class EfficientNetB7(nn.Module):
    """EfficientNet-B7: (samples, channels, height, width), float32 → (samples, classes).

    Tan and Le 2019, *EfficientNet: rethinking model scaling for convolutional neural networks*, arXiv 1905.11946.
    Names, shapes, order of construction and initial values are those of torchvision's ``efficientnet_b7``.

    Args:
        classes: outputs.
        channels: input channels.
    """

    def __init__(self, classes: int = 1000, channels: int = 3) -> None:
        super().__init__()
        stages: list[nn.Module] = [ConvNorm(channels, widened(_BASE[0][3]), 3, stride=2)]
        depths = [math.ceil(blocks * _DEEPER) for *_, blocks in _BASE]
        made = 0
        for (expansion, kernel, stride, inputs, outputs, _), depth in zip(_BASE, depths, strict=True):
            wide = widened(outputs)
            blocks: list[nn.Module] = []
            for index in range(depth):
                first = index == 0
                shape = BlockShape(expansion, kernel, stride if first else 1, widened(inputs) if first else wide, wide)
                blocks.append(MBConv(shape, _DROP_BLOCK * made / sum(depths)))
                made += 1
            stages.append(nn.Sequential(*blocks))
        last = widened(_BASE[-1][4])
        stages.append(ConvNorm(last, 4 * last, 1))
        self.features = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(_DROP_FEATURE, inplace=True), nn.Linear(4 * last, classes))
        for module in self.modules():
            _initialise(module)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (samples, classes) of images (samples, channels, height, width)."""
        logits: Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return logits


def _initialise(module: nn.Module) -> None:
    """Draw the values of one layer again: normal by fan-out for convolutions, uniform for the classifier."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        bound = 1 / math.sqrt(module.out_features)
        nn.init.uniform_(module.weight, -bound, bound)
        nn.init.zeros_(module.bias)
