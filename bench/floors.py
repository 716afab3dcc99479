"""What no engine of this kind can go below, measured without it: the passes that every way needs, and the products.

A kernel takes at least one forward and C backward passes to the layer outputs, and the FLOPs of its contraction at the
machine's best rate. The dense floor counts the products of the whole Jacobian, the representation floor those of the
engine's plan: it shows what the engine adds to its own choice.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg.blas import ssyrk
from torch import Tensor, nn

from .inputs import Inputs, call, count_outputs, count_parameters, count_samples, take
from .models import SEED

#: Batch sizes of the capture; the fastest counts.
BATCHES = (32, 64, 128)

#: Most numbers in the matrix whose product is timed: 1 GiB of float32, so wide that a wider one is no faster (guessed).
PRODUCT_NUMBERS = 2**28

#: Products timed; the first warms up and the fastest counts.
PRODUCTS = 3


@dataclass(frozen=True)
class Floors:
    """What was measured for one workload and sample count.

    Attributes:
        capture_seconds: one forward and C backward passes over all samples.
        capture_batch: batch size of the fastest.
        flops_per_second: of one float32 ``ssyrk``, N·N·K counted, as one triangle of ``X Xᵀ`` takes.
        product_columns: K, its columns.
    """

    capture_seconds: float
    capture_batch: int
    flops_per_second: float
    product_columns: int

    def seconds(self, flops: int) -> float:
        """The floor for a contraction of so many FLOPs."""
        return self.capture_seconds + flops / self.flops_per_second


def measure_floors(model: nn.Module, inputs: Inputs) -> Floors:
    """Measure both parts of the floors.

    Args:
        model: in eval mode; its parameters no longer require gradients afterwards.
        inputs: (samples, ...), float32.

    Returns:
        The floors.
    """
    samples, outputs = count_samples(inputs), count_outputs(model, inputs)
    columns = max(1, min(outputs * count_parameters(model), PRODUCT_NUMBERS // samples))
    batches = sorted({min(batch, samples) for batch in BATCHES})
    capture_seconds(model, take(inputs, slice(0, batches[0])), batches[0])
    captures = {batch: capture_seconds(model, inputs, batch) for batch in batches}
    fastest = min(captures, key=captures.__getitem__)
    return Floors(captures[fastest], fastest, product_rate(samples, columns), columns)


def capture_seconds(model: nn.Module, inputs: Inputs, batch: int) -> float:
    """Seconds of one forward and C backward passes over all samples, in batches; gradients are dropped.

    Args:
        model: in eval mode; its parameters no longer require gradients afterwards.
        inputs: (samples, ...).
        batch: samples per batch.

    Returns:
        Wall-clock seconds.
    """
    model.requires_grad_(False)
    start = time.perf_counter()
    with _watched(model) as begun:
        for first in range(0, count_samples(inputs), batch):
            begun.clear()
            chosen = take(inputs, slice(first, first + batch))
            if isinstance(chosen, Tensor):
                chosen = chosen.detach().requires_grad_()
                begun.append(chosen)
            logits = call(model, chosen)
            outputs = logits.shape[1]
            for output in range(outputs):
                torch.autograd.grad(logits[:, output].sum(), begun[0], retain_graph=output < outputs - 1)
    return time.perf_counter() - start


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[Tensor]]:
    """Where the backward passes of a batch end: its samples, or the first embedding of its tokens, which hooks add."""
    begun: list[Tensor] = []

    def begin(module: nn.Module, arguments: tuple[object, ...], output: Tensor) -> None:  # noqa: ARG001 - torch's hook
        if not begun:
            begun.append(output.requires_grad_())

    hooks = [part.register_forward_hook(begin) for part in model.modules() if isinstance(part, nn.Embedding)]
    try:
        yield begun
    finally:
        for hook in hooks:
            hook.remove()


def product_rate(samples: int, columns: int) -> float:
    """FLOPs per second, N·N·K counted, of ``X Xᵀ`` in float32 by BLAS, which computes one triangle.

    Args:
        samples: rows of X.
        columns: columns of X.

    Returns:
        The rate of the fastest product.
    """
    rows = np.random.default_rng(SEED).standard_normal((samples, columns), dtype=np.float32)
    fastest = float("inf")
    for _ in range(PRODUCTS):
        start = time.perf_counter()
        ssyrk(1.0, rows.T, trans=1)  # the transposed view is in Fortran's order, so that nothing is copied
        fastest = min(fastest, time.perf_counter() - start)
    return samples * samples * columns / fastest
