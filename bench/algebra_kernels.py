"""Kernels of real digits that ``bench.algebra`` solves with, computed once by the engine and kept in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import ooc_ntk
from ooc_ntk import demo

from .contenders import DEVICE

#: Digits of ``mnist5k``, and how far they are shifted, in pixels, along both axes.
DIGITS: Final = 5_000
SHIFT: Final = 2

#: Host memory within which kernels are computed; solving has budgets of its own.
HOST: Final = "4GiB"


@dataclass(frozen=True)
class Problem:
    """A kernel of digits with its targets.

    Attributes:
        kernel: train digits first.
        targets: (train, 10) float64, one-hot less a tenth.
        labels: (train + test,) of all rows.
        accuracy: share of the test digits that the network itself gets right; NaN without test digits.
    """

    kernel: ooc_ntk.Kernel
    targets: NDArray[np.float64]
    labels: NDArray[np.int64]
    accuracy: float = float("nan")

    @property
    def mean_diagonal(self) -> float:
        """Mean diagonal of the train square, which ridges are given in."""
        return float(self.kernel.diagonal()[: self.kernel.train_samples].mean())


def one_hot(labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Targets of labels, (samples, 10), with the mean over the classes taken out."""
    return np.eye(10)[labels] - 0.1


@cache
def _digits() -> tuple[Tensor, Tensor]:
    return demo.digits(0, DIGITS)


def shifted_digits(count: int) -> tuple[Tensor, Tensor]:
    """Digits, then the same shifted: no two of these images are the same, as a digit never gets one shift twice.

    Args:
        count: at most 25 times :data:`DIGITS`.

    Returns:
        Images (count, 784) and labels (count,).
    """
    images, labels = _digits()
    edge, shifts = images.shape[-1], (2 * SHIFT + 1) ** 2
    padded = nn.functional.pad(images[:, 0], (SHIFT,) * 4, value=float(images.min()))
    # The first shift of every digit is none, the others come in an order of its own.
    ranks = torch.rand(DIGITS, shifts, generator=torch.Generator().manual_seed(0))
    ranks[:, shifts // 2] = -1.0
    order = ranks.argsort(1)
    found = torch.empty(count, edge * edge)
    for row in range(count):
        digit, shift = row % DIGITS, int(order[row % DIGITS, row // DIGITS])
        top, left = divmod(shift, 2 * SHIFT + 1)
        found[row] = padded[digit, top : top + edge, left : left + edge].reshape(-1)
    return found, labels.repeat(-(-count // DIGITS))[:count]


def trained_mlp(images: Tensor, labels: Tensor, epochs: int = 2) -> nn.Module:
    """An MLP 784-256-10 after some epochs, from a seed, in eval mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(images.shape[1], 256), nn.ReLU(), nn.Linear(256, 10))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    return model.eval()


def mlp_problem(folder: Path, samples: int) -> Problem:
    """The trace kernel of the MLP, trained on the digits, on so many shifted ones, stored in float32."""
    path = folder / f"mlp-{samples}"
    images, labels = shifted_digits(samples)
    kernel = _finished(path)
    if kernel is None:
        print(f"computing the kernel of {samples:,} digits, which is not counted", flush=True)
        job = ooc_ntk.Job(trained_mlp(*shifted_digits(DIGITS)), images, kernel="trace", device=DEVICE)
        kernel = ooc_ntk.run(job, path, budget=ooc_ntk.Budget(host=HOST), progress=False)
    known = labels.numpy()
    return Problem(kernel, one_hot(known), known)


def cnn_problem(folder: Path, train: int, test: int, epochs: int = 4) -> Problem:
    """The trace kernel of the demonstration's CNN, trained on 4,000 digits.

    In float64, so that no rounding of entries moves its smallest eigenvalues.
    """
    weights = folder / f"cnn-{epochs}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    if not weights.exists():
        demo.train(weights, epochs)
    path = folder / f"cnn-{train}-{test}-{epochs}"
    place, first = "ooc_ntk.demo:network", demo.TRAIN_SAMPLES
    job = ooc_ntk.Job(
        place,
        f"mnist5k[0:{train}]",
        f"mnist5k[{first}:{first + test}]",
        weights=weights,
        precision="float64",
        device=DEVICE,
    )
    kernel = _finished(path)
    if kernel is None:
        kernel = ooc_ntk.run(job, path, budget=ooc_ntk.Budget(host=HOST), progress=False)
    images, labels = demo.digits(first, first + test)
    with torch.no_grad():
        model = ooc_ntk.Job(place, "mnist5k[0:1]", weights=weights).module()
        accuracy = float((model(images).argmax(1) == labels).float().mean())
    known = torch.cat([demo.digits(0, train)[1], labels]).numpy()
    return Problem(kernel, one_hot(known[:train]), known, accuracy)


def _finished(path: Path) -> ooc_ntk.Kernel | None:
    """The kernel of a folder, if its run is finished."""
    try:
        return ooc_ntk.open(path)
    except ooc_ntk.OocNtkError:
        return None
