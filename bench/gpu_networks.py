"""Networks and random data of ``bench.gpu_exact`` by spec, so that a run goes on in another process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Final

import torch
from torch import Tensor, nn

import ooc_ntk
from bench.models import SEED, ResNet18  # by its own name: specs load this module by import path
from ooc_ntk.inputs.zoo.build import build_model


@dataclass(frozen=True)
class Subject:
    """A network with its data.

    Attributes:
        title: for tables.
        model: spec of its factory.
        train: spec of its train data, without a slice.
        test: the same of its test data, None where it has none.
        size: train and test samples of the whole kernel.
        samples: numbers of train samples that are tried, smallest first.
        judged: whether the bars of seconds are for its whole kernel.
    """

    title: str
    model: str
    train: str
    test: str | None
    size: tuple[int, int]
    samples: tuple[int, ...]
    judged: bool = False

    def job(self, train: int, test: int, precision: str, device: str) -> ooc_ntk.Job:
        """The job of the trace kernel on the first samples."""
        tested = self.test is not None and test > 0
        return ooc_ntk.Job(
            model=self.model,
            train=f"{self.train}[0:{train}]",
            test=f"{self.test}[0:{test}]" if tested else None,
            precision=precision,
            device=device,
        )


def _seeded(model: type[nn.Module], *arguments: int) -> nn.Module:
    torch.manual_seed(SEED)
    return model(*arguments).eval()


@cache
def _images(count: int, size: int, seed: int) -> Tensor:
    """Random images, (count, 3, size, size) float32, about as normalised photographs are spread."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def network32() -> nn.Module:
    """ResNet-18 for 32×32 images: a 3×3 stem and no pooling, so that its last stage has 4 × 4 positions."""
    return _seeded(ResNet18, 64, 10)


def single32() -> nn.Module:
    """The same with one output."""
    return _seeded(ResNet18, 64, 1)


def train32() -> Tensor:
    """As many samples as CIFAR-10 has."""
    return _images(50_000, 32, 1)


def test32() -> Tensor:
    """As many test samples."""
    return _images(10_000, 32, 2)


def network224() -> nn.Module:
    """ResNet-18 for 224×224 images, of ten outputs."""
    return build_model("resnet18,classes=10")


def train224() -> Tensor:
    """2,048 images of 224 × 224."""
    return _images(2_048, 224, 3)


def small_network() -> nn.Module:
    """The same kind of network in the size of tests."""
    return _seeded(ResNet18, 4, 3)


def small_train() -> Tensor:
    """48 images of 8 × 8."""
    return _images(48, 8, 1)


def small_test() -> Tensor:
    """12 images of 8 × 8."""
    return _images(12, 8, 2)


def small_wide() -> Tensor:
    """12 images of 16 × 16."""
    return _images(12, 16, 3)


_HERE: Final = "bench.gpu_networks:"

#: What is measured, in full size and in that of tests.
SUBJECTS: Final = (
    Subject(
        "ResNet-18, 32×32, 1 output",
        f"{_HERE}single32",
        f"{_HERE}train32",
        f"{_HERE}test32",
        (50_000, 10_000),
        (512, 1024, 2048, 4096, 8192, 16_384, 32_768),
        judged=True,
    ),
    Subject(
        "ResNet-18, 32×32, 10 outputs",
        f"{_HERE}network32",
        f"{_HERE}train32",
        f"{_HERE}test32",
        (50_000, 10_000),
        (512, 1024, 2048, 4096, 8192, 16_384),
    ),
    Subject(
        "ResNet-18, 224×224, 10 outputs",
        f"{_HERE}network224",
        f"{_HERE}train224",
        None,
        (2_048, 0),
        (64, 128, 256, 512, 1024, 2048),
    ),
)
SMALL_SUBJECTS: Final = (
    Subject(
        "small ResNet, 8×8, 3 outputs",
        f"{_HERE}small_network",
        f"{_HERE}small_train",
        f"{_HERE}small_test",
        (48, 12),
        (8, 16),
    ),
    Subject("small ResNet, 16×16, 3 outputs", f"{_HERE}small_network", f"{_HERE}small_wide", None, (12, 0), (6,)),
)
