"""Small seeded networks over real digits, as they are and trained: what accuracy is measured on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from sklearn.datasets import load_digits
from torch import Tensor, nn

import ooc_ntk

#: Relative Frobenius error that is allowed end to end (the issue's 'Must reach').
SMOOTH, KINKED, FLOAT64, PROBABILITY = 2e-6, 5e-5, 1e-12, 1e-5

#: Train and test samples of every case.
TRAIN, TEST = 26, 7


class Attention(nn.Module):
    """Eight tokens (rows of a digit), hand-written attention, layer norm, then torch's own encoder layer."""

    def __init__(self, classes: int, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.position = nn.Parameter(0.1 * torch.randn(8, width))
        self.embed = nn.Linear(8, width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.encoder = nn.TransformerEncoderLayer(width, heads, 24, dropout=0.1, activation="gelu", batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.reshape(-1, 8, 8)) + self.position
        samples, tokens, width = x.shape
        parts = self.qkv(self.norm(x)).reshape(samples, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(*parts)
        x = x + self.mix(found.transpose(1, 2).reshape(samples, tokens, width))
        return self.head(self.encoder(x).mean(1))


class Branching(nn.Module):
    """Chooses its path by its data, which vmap refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 12)
        self.bright = nn.Linear(12, 3)
        self.dark = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x.reshape(len(x), -1)))
        if x.mean() > 0.3:
            return self.bright(hidden)
        return self.dark(hidden)


class TiedTokens(nn.Module):
    """An embedding that is tied to the output layer, on integer tokens."""

    def __init__(self, words: int = 9, width: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.middle = nn.Linear(width, width)
        self.output = nn.Linear(width, words, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(torch.tanh(self.middle(self.embedding(tokens).mean(1))))


class TwoInputs(nn.Module):
    """Takes an image and a few numbers, by position or by name."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Linear(64, 8)
        self.extra = nn.Linear(5, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, image: Tensor, extra: Tensor) -> Tensor:
        return self.head(torch.tanh(self.image(image.reshape(len(image), -1)) * torch.sigmoid(self.extra(extra))))


def smooth_mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 10))


def relu_mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 20), nn.ReLU(), nn.Linear(20, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


@dataclass(frozen=True)
class Case:
    """A network with data.

    Attributes:
        name: for the test's id.
        module: in eval mode.
        train: images (samples, 1, 8, 8).
        labels: of the train images.
        test: images.
        test_labels: of the test images.
        bound: relative error allowed for logits in float32.
    """

    name: str
    module: nn.Module
    train: Tensor
    labels: Tensor
    test: Tensor
    test_labels: Tensor
    bound: float

    @property
    def images(self) -> Tensor:
        return torch.cat([self.train, self.test])

    @property
    def targets(self) -> Tensor:
        return torch.cat([self.labels, self.test_labels])

    def job(self, *, test: bool = True, **options: object) -> ooc_ntk.Job:
        return ooc_ntk.Job(
            model=self.module,
            train=(self.train, self.labels),
            test=(self.test, self.test_labels) if test else None,
            **{"device": "cpu", **options},
        )


@functools.cache
def digits(classes: int = 10) -> tuple[Tensor, Tensor]:
    """Real digits of the first ``classes`` classes, (samples, 1, 8, 8) float32 in 0..1, with labels."""
    data = load_digits(n_class=classes)
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(1))
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    return images[order], torch.tensor(data.target)[order]


_MAKERS: dict[str, tuple[Callable[[], nn.Module], int, float]] = {
    "smooth-mlp": (smooth_mlp, 10, SMOOTH),
    "relu-mlp": (relu_mlp, 10, KINKED),
    "cnn": (cnn, 10, KINKED),
    "attention": (lambda: Attention(4), 4, SMOOTH),
}

NAMES = tuple(_MAKERS)


@functools.cache
def case(name: str, *, trained: bool = False) -> Case:
    """One of :data:`NAMES`; the same object every time, as no test may change it."""
    make, classes, bound = _MAKERS[name]
    images, labels = digits(classes)
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(7)
        module = make()
        for start in range(0, 320, 32):  # running statistics that are not 0 and 1
            module(images[start : start + 32])
        if trained:
            _train(module, images[:320], labels[:320])
    module.eval()
    stop = TRAIN + TEST
    return Case(name, module, images[:TRAIN], labels[:TRAIN], images[TRAIN:stop], labels[TRAIN:stop], bound)


def _train(module: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Train until the network is sure of itself, which is where ``1 − p`` loses its digits."""
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    for _ in range(400):
        optimizer.zero_grad()
        value = F.cross_entropy(module(images), labels)
        value.backward()
        optimizer.step()
        if value.item() < 2e-3:
            break
    optimizer.zero_grad(set_to_none=True)
