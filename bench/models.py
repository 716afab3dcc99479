"""What is measured: networks with seeded weights and data, each in full and in smoke size, at several sample counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from .inputs import Inputs
from .sentences import minilm, missing_packages, small_bert, tokenised

#: Seed of every model and every data set.
SEED = 0


def mlp(inputs: int, width: int, outputs: int) -> nn.Module:
    """A network of two hidden layers of ``width`` ReLUs."""
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
    )


def convolutional() -> nn.Module:
    """A small convolutional network with 10 outputs for 28×28 digits."""
    torch.manual_seed(SEED)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
    ).eval()


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch norm and a shortcut (He et al. 2016)."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (samples, inputs, h, w) to (samples, channels, h / stride, w / stride)."""
        hidden = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 with the stem for 32×32 images: one 3×3 convolution, no pooling."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.stages = nn.Sequential(
            *(
                BasicBlock(widths[stage] if first else widths[stage + 1], widths[stage + 1], stride)
                for stage in range(4)
                for first, stride in ((True, 1 if stage == 0 else 2), (False, 1))
            )
        )
        self.head = nn.Linear(8 * width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map (samples, 3, h, w) to (samples, outputs)."""
        hidden = self.stages(F.relu(self.norm(self.stem(x))))
        return self.head(hidden.mean((2, 3)))


class ViT(nn.Module):
    """Vision transformer over 4×4 patches with a class token, of torch's own encoder layers."""

    def __init__(self, image: int, width: int, depth: int, heads: int, outputs: int) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * 4 * 4, width)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, (image // 4) ** 2 + 1, width))
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    d_model=width,
                    nhead=heads,
                    dim_feedforward=4 * width,
                    dropout=0.0,
                    activation="gelu",
                    batch_first=True,
                    norm_first=True,
                )
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map (samples, 3, image, image) to (samples, outputs)."""
        samples, channels, height, width = x.shape
        patches = x.reshape(samples, channels, height // 4, 4, width // 4, 4).permute(0, 2, 4, 1, 3, 5)
        tokens = self.embed(patches.reshape(samples, -1, channels * 16))
        hidden = torch.cat([self.token.expand(samples, -1, -1), tokens], 1) + self.position
        return self.head(self.norm(self.layers(hidden))[:, 0])


def images(*shape: int) -> Callable[[int], Inputs]:
    """A maker of seeded normal samples of one shape."""
    return lambda samples: torch.randn(samples, *shape, generator=torch.Generator().manual_seed(SEED))


@dataclass(frozen=True)
class Size:
    """One size of a workload.

    Attributes:
        model: makes the network.
        data: makes so many samples.
        samples: numbers of samples unless asked otherwise, smallest first.
    """

    model: Callable[[], nn.Module]
    data: Callable[[int], Inputs]
    samples: tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    """A network and its data.

    Attributes:
        title: what it is, for the table.
        full: the size that counts.
        smoke: the size of tests.
        missing: tells which packages it needs and does not find.
    """

    title: str
    full: Size
    smoke: Size
    missing: Callable[[], tuple[str, ...]] = tuple

    def size(self, smoke: bool) -> Size:
        """The full or the smoke size."""
        return self.smoke if smoke else self.full


#: Workloads by name.
WORKLOADS = {
    "mlp": Workload(
        "MLP 784-1024-1024-10",
        Size(lambda: mlp(784, 1024, 10), images(784), (128, 2048)),
        Size(lambda: mlp(20, 24, 3), images(20), (6, 12)),
    ),
    "small-mlp": Workload(
        "MLP 784-128-128-10",
        Size(lambda: mlp(784, 128, 10), images(784), (64, 512)),
        Size(lambda: mlp(20, 8, 3), images(20), (6,)),
    ),
    "small-cnn": Workload(
        "CNN of three convolutions, 28×28 images, 10 outputs",
        Size(convolutional, images(1, 28, 28), (64, 512)),
        Size(convolutional, images(1, 28, 28), (6,)),
    ),
    "resnet18": Workload(
        "ResNet-18, 32×32 stem, width 64",
        Size(lambda: ResNet18(64, 1), images(3, 32, 32), (128, 512)),
        Size(lambda: ResNet18(4, 1), images(3, 8, 8), (5, 10)),
    ),
    "resnet18-c10": Workload(
        "ResNet-18, 32×32 stem, width 64, 10 outputs",
        Size(lambda: ResNet18(64, 10), images(3, 32, 32), (128,)),
        Size(lambda: ResNet18(4, 3), images(3, 8, 8), (6,)),
    ),
    "vit": Workload(
        "ViT d=192, depth 6, 65 tokens, nn.TransformerEncoderLayer",
        Size(lambda: ViT(32, 192, 6, 3, 10), images(3, 32, 32), (64, 256)),
        Size(lambda: ViT(8, 12, 2, 3, 3), images(3, 8, 8), (5, 9)),
    ),
    "minilm": Workload(
        "all-MiniLM-L6-v2, sentences of 64 tokens, mean pooling",
        Size(lambda: minilm(2), lambda samples: tokenised(samples, 64), (128,)),
        Size(lambda: small_bert(2), lambda samples: tokenised(samples, 16), (6,)),
        missing_packages,
    ),
}


def build(name: str, samples: int, smoke: bool) -> tuple[nn.Module, Inputs]:
    """Build a workload, the same in every process.

    Args:
        name: of the workload.
        samples: number of samples.
        smoke: whether to take the smoke size.

    Returns:
        The network in eval mode and its data (samples, ...), both float32 on the CPU; tokens are integers.
    """
    size = WORKLOADS[name].size(smoke)
    torch.manual_seed(SEED)
    model = size.model().eval()
    return model, size.data(samples)
