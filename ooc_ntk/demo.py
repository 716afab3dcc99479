"""The demonstration: train a small network on real digits, compute its kernel under a small budget, and use it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from . import api
from .inputs.weights import save_weights

#: Samples of ``mnist5k`` that train the network and make the kernel's columns; the rest are test samples.
TRAIN_SAMPLES: Final = 4000
TEST_SAMPLES: Final = 1000

#: Eigenvalues that are found (a choice: enough to see how they decay).
EIGENPAIRS: Final = 50


def network() -> nn.Module:
    """A small convolutional network for 28 × 28 digits, untrained: (samples, 1, 28, 28) → (samples, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 10),
    )


@dataclass(frozen=True)
class Scores:
    """Accuracies on the test digits.

    Attributes:
        network: of the trained network.
        kernel: of kernel regression with the network's own kernel, the ridge chosen by GCV.
        ridge_ratio: that ridge over the mean diagonal.
        surrogate: of kernel regression with a small fixed ridge, as a surrogate of the network.
        alike: Kendall's τ-b between the network's and the surrogate's probability of each digit's own class.
    """

    network: float
    kernel: float
    ridge_ratio: float
    surrogate: float
    alike: float


def digits(start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Digits of ``mnist5k``: images (samples, 1, 28, 28) and labels (samples,)."""
    source = api.Job(network(), f"mnist5k[{start}:{stop}]").train_source()
    samples = source.fetch(0, len(source))
    if samples.targets is None:
        raise api.InputError("mnist5k has no labels")
    return samples.args[0], samples.targets


def train(
    weights: Path,
    epochs: int = 4,
    say: Callable[[str], None] = lambda text: None,  # noqa: ARG005
    *,
    samples: int = TRAIN_SAMPLES,
    seed: int = 0,
) -> None:
    """Train the network and save its weights.

    Args:
        weights: file to write, ``.safetensors``.
        epochs: passes over the train digits; 0 saves the network as it is drawn.
        say: told the loss after each epoch.
        samples: digits that it is trained on, the first ones.
        seed: of the first weights and of the order of digits.
    """
    torch.manual_seed(seed)
    model = network()
    images, labels = digits(0, samples)
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    for epoch in range(epochs):
        total = 0.0
        order = torch.randperm(samples)
        for start in range(0, samples, 64):
            batch = order[start : start + 64]
            value = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimiser.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            total += float(value.detach()) * len(batch)
        say(f"epoch {epoch + 1} of {epochs}: loss {total / samples:.3f}")
    save_weights(model, weights)


def job(weights: Path, train_samples: int = TRAIN_SAMPLES, test_samples: int = TEST_SAMPLES) -> api.Job:
    """The demonstration's job: trace kernel of the trained network, train digits × (train + test) digits."""
    return api.Job(
        model="ooc_ntk.demo:network",
        weights=weights,
        train=f"mnist5k[0:{train_samples}]",
        test=f"mnist5k[{TRAIN_SAMPLES}:{TRAIN_SAMPLES + test_samples}]",
        kernel="trace",
    )


def use(run: Path, job: api.Job, say: Callable[[str], None] = lambda text: None) -> Scores:  # noqa: ARG005
    """Use the kernel: regression, surrogate, spectrum, nearest digits. All is kept in the run, for its report.

    Args:
        run: directory of the finished run.
        job: its job.
        say: told what is done.

    Returns:
        Accuracies.
    """
    say("kernel regression on the labels, its ridge by GCV")
    fit = api.fit(run, job=job)
    say("kernel regression as a surrogate of the network")
    report = api.surrogate(run, job, kinds=("ridge",), baselines=(), progress=False)
    say(f"the {EIGENPAIRS} largest eigenvalues, and the most similar digits")
    api.spectrum(run, EIGENPAIRS, job=job)
    api.nearest(run, 5, job=job)
    surrogate = report.surrogates[0]
    return Scores(
        network=report.network.accuracy,
        kernel=fit.accuracy or 0.0,
        ridge_ratio=fit.solution.ridge_ratio,
        surrogate=surrogate.accuracy.value,
        alike=surrogate.kendall_tau.value,
    )
