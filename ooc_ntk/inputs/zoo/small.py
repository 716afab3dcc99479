"""Two small networks: a multilayer perceptron and LeNet-5."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from torch import Tensor, nn

#: Activations by the names that a model's text gives them.
ACTIVATIONS: Final[dict[str, Callable[[], nn.Module]]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}
#: Pooling over 2 × 2 pixels by the names that a model's text gives them.
POOLINGS: Final[dict[str, Callable[[int], nn.Module]]] = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}

#: Images from this size on are not padded: the paper's own input is 32 × 32, of which a digit fills 28 × 28 at most.
LENET_UNPADDED: Final = 32
#: The smallest image that leaves one pixel after both convolutions and poolings.
LENET_SMALLEST: Final = 12


class Mlp(nn.Sequential):
    """Fully connected layers over a flattened sample: (samples, ...) with ``inputs`` values each → (samples, classes).

    Layers ``fc1`` to ``fc<depth>``, each followed by the activation, then ``head``; initial values are torch's own
    (uniform, LeCun et al. 1998, *Efficient BackProp*).

    Args:
        inputs: values of a sample.
        width: of each hidden layer.
        depth: hidden layers; 0 is a linear model.
        classes: outputs.
        activation: one of :data:`ACTIVATIONS`.
    """

    def __init__(self, inputs: int, width: int, depth: int, classes: int, activation: str = "relu") -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        for index in range(1, depth + 1):
            layers[f"fc{index}"] = nn.Linear(inputs if index == 1 else width, width)
            layers[f"act{index}"] = ACTIVATIONS[activation]()
        layers["head"] = nn.Linear(width if depth else inputs, classes)
        super().__init__(layers)


def lenet_pixels(size: int) -> int:
    """Side of the last feature map of LeNet-5 for square images, pixels; below 1 where the images are too small.

    >>> lenet_pixels(28), lenet_pixels(32), lenet_pixels(LENET_SMALLEST), lenet_pixels(LENET_SMALLEST - 1)
    (5, 5, 1, 0)
    """
    inside = size if size < LENET_UNPADDED else size - 4
    return (inside // 2 - 4) // 2


class LeNet(nn.Module):
    """LeNet-5: (samples, channels, size, size), float32 → (samples, classes).

    LeCun et al. 1998, *Gradient-based learning applied to document recognition*: convolutions 5 × 5 to 6 and 16 maps,
    each with pooling over 2 × 2 pixels, then layers of 120 and 84 units. It is the form in common use today, not the
    paper's to the letter: every map of the second convolution sees all six maps, pooling has no weights, the last layer
    is linear instead of radial basis functions, and the activation is ReLU with max-pooling unless asked otherwise
    (``tanh`` and ``avg`` are nearer to the paper). Images below 32 × 32 are padded by 2 pixels at the first
    convolution, so that 28 × 28 gives the paper's 5 × 5 last maps.

    Args:
        size: side of the images, pixels; at least :data:`LENET_SMALLEST`.
        channels: input channels.
        classes: outputs.
        activation: one of :data:`ACTIVATIONS`.
        pool: one of :data:`POOLINGS`.
    """

    def __init__(
        self, size: int = 28, channels: int = 1, classes: int = 10, activation: str = "relu", pool: str = "max"
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 5, padding=2 if size < LENET_UNPADDED else 0)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.pool = POOLINGS[pool](2)
        self.act = ACTIVATIONS[activation]()
        self.fc1 = nn.Linear(16 * lenet_pixels(size) ** 2, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (samples, classes) of images (samples, channels, size, size)."""
        x = self.pool(self.act(self.conv1(x)))
        x = self.pool(self.act(self.conv2(x)))
        x = self.act(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc3(self.act(self.fc2(x)))
        return logits
