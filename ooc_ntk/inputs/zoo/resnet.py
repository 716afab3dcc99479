"""Residual networks with the names, shapes and initial values that torchvision gives them."""

from __future__ import annotations

from typing import Final

from torch import Tensor, nn

#: Channels of the four stages before a bottleneck widens them (He et al. 2016, table 1).
_STAGES: Final = (64, 128, 256, 512)


class BasicBlock(nn.Module):
    """Two 3 × 3 convolutions and a shortcut: (samples, inputs, h, w) → (samples, outputs, h/stride, w/stride).

    He et al. 2016, *Deep residual learning for image recognition*, arXiv 1512.03385, figure 5 left.

    Attributes:
        expansion: output channels over the stage's channels.
    """

    expansion: Final = 1

    def __init__(self, inputs: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Add the two convolutions to the shortcut; shapes as in the class."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        activated: Tensor = self.relu(out)
        return activated


class Bottleneck(nn.Module):
    """1 × 1, 3 × 3 and 1 × 1 convolutions and a shortcut: (samples, inputs, h, w) → (samples, 4·planes, h', w').

    He et al. 2016, arXiv 1512.03385, figure 5 right, with the stride at the 3 × 3 convolution ("v1.5"), as
    torchvision has it; with groups it is the block of ResNeXt (Xie et al. 2017, arXiv 1611.05431, figure 3c).

    Attributes:
        expansion: output channels over the stage's channels.
    """

    expansion: Final = 4

    def __init__(
        self, inputs: int, planes: int, stride: int, downsample: nn.Module | None, groups: int, group_width: int
    ) -> None:
        super().__init__()
        width = planes * group_width // 64 * groups
        outputs = planes * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Add the three convolutions to the shortcut; shapes as in the class."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        activated: Tensor = self.relu(out)
        return activated


class ResNet(nn.Module):
    """A residual network: (samples, channels, height, width), float32 → (samples, classes).

    He et al. 2016, arXiv 1512.03385. Names, shapes, the order of construction and the initial values (He et al. 2015,
    arXiv 1502.01852, normal by fan-out) are those of torchvision, so that one seed gives the same bits and files of
    weights can be exchanged.

    Args:
        depths: blocks of each of the four stages.
        bottleneck: three convolutions in a block instead of two.
        classes: outputs.
        channels: input channels.
        groups: of the 3 × 3 convolutions of a bottleneck.
        group_width: channels of one group in the first stage.
        cifar: a 3 × 3 first convolution of stride 1 instead of 7 × 7 of stride 2; the max-pooling stays.
    """

    def __init__(
        self,
        depths: tuple[int, int, int, int],
        *,
        bottleneck: bool,
        classes: int = 1000,
        channels: int = 3,
        groups: int = 1,
        group_width: int = 64,
        cifar: bool = False,
    ) -> None:
        super().__init__()
        self._bottleneck = bottleneck
        self._groups, self._group_width = groups, group_width
        kernel, stride = (3, 1) if cifar else (7, 2)
        self.conv1 = nn.Conv2d(channels, _STAGES[0], kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(_STAGES[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self._width = _STAGES[0]
        self.layer1 = self._stage(_STAGES[0], depths[0], 1)
        self.layer2 = self._stage(_STAGES[1], depths[1], 2)
        self.layer3 = self._stage(_STAGES[2], depths[2], 2)
        self.layer4 = self._stage(_STAGES[3], depths[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self._width, classes)
        for module in self.modules():  # a second draw over the first one: the stream of numbers is torchvision's
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stage(self, planes: int, depth: int, stride: int) -> nn.Sequential:
        """Blocks of one stage; the first one halves the image and widens."""
        blocks: list[nn.Module] = []
        for index in range(depth):
            step = stride if index == 0 else 1
            outputs = planes * (Bottleneck if self._bottleneck else BasicBlock).expansion
            downsample: nn.Module | None = None
            if step != 1 or self._width != outputs:
                downsample = nn.Sequential(
                    nn.Conv2d(self._width, outputs, 1, step, bias=False), nn.BatchNorm2d(outputs)
                )
            if self._bottleneck:
                blocks.append(Bottleneck(self._width, planes, step, downsample, self._groups, self._group_width))
            else:
                blocks.append(BasicBlock(self._width, planes, step, downsample))
            self._width = outputs
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (samples, classes) of images (samples, channels, height, width)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def resnet18(classes: int = 1000, channels: int = 3) -> ResNet:
    """ResNet-18 of torchvision: (samples, channels, height, width) → (samples, classes); He et al. 2016."""
    return ResNet((2, 2, 2, 2), bottleneck=False, classes=classes, channels=channels)


def resnet34(classes: int = 1000, channels: int = 3) -> ResNet:
    """ResNet-34 of torchvision: (samples, channels, height, width) → (samples, classes); He et al. 2016."""
    return ResNet((3, 4, 6, 3), bottleneck=False, classes=classes, channels=channels)


def resnet50(classes: int = 1000, channels: int = 3) -> ResNet:
    """ResNet-50 of torchvision: (samples, channels, height, width) → (samples, classes); He et al. 2016."""
    return ResNet((3, 4, 6, 3), bottleneck=True, classes=classes, channels=channels)


def resnet101(classes: int = 1000, channels: int = 3) -> ResNet:
    """ResNet-101 of torchvision: (samples, channels, height, width) → (samples, classes); He et al. 2016."""
    return ResNet((3, 4, 23, 3), bottleneck=True, classes=classes, channels=channels)


def resnext101_32x8d(classes: int = 1000, channels: int = 3) -> ResNet:
    """ResNeXt-101 32×8d of torchvision: (samples, channels, height, width) → (samples, classes); Xie et al. 2017."""
    return ResNet((3, 4, 23, 3), bottleneck=True, classes=classes, channels=channels, groups=32, group_width=8)


def resnet18_cifar(classes: int = 10, channels: int = 3) -> ResNet:
    """ResNet-18 for 32 × 32 images: (samples, channels, height, width) → (samples, classes).

    The network of huyvnphan's PyTorch_CIFAR10, which projection_ntk (Engel et al. 2023, arXiv 2305.14585) studies: the
    first convolution is 3 × 3 of stride 1, everything else is torchvision's ResNet-18, max-pooling included.
    """
    return ResNet((2, 2, 2, 2), bottleneck=False, classes=classes, channels=channels, cifar=True)
