"""What a machine with a GPU allows: its own products at the shapes of a plan, copies to and fro, and its disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from ooc_ntk.compute.contract import tf32
from ooc_ntk.planning.layout import CONTRACTION_COLUMNS
from ooc_ntk.storage.diskrate import measure_disk

from .floors import capture_seconds
from .models import SEED

#: Repeats of a time, after one that warms up; the fastest counts.
REPEATS: Final = 5

#: Numbers of one side of a product at most: 1 GiB of float32.
SIDE_NUMBERS: Final = 2**28

#: Products of bf16 that make one in bf16x3: high × high, high × low and low × high.
THREE: Final = 3

_DTYPES: Final = {"float64": torch.float64, "bf16": torch.bfloat16, "bf16x3": torch.bfloat16}


def wait_for(device: str) -> None:
    """Wait until a device has done what it was given."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def best_of(work: Callable[[], object], device: str, repeats: int = REPEATS) -> float:
    """Seconds of the fastest of several runs, after one that warms up."""
    work()
    best = float("inf")
    for _ in range(repeats):
        wait_for(device)
        start = time.perf_counter()
        work()
        wait_for(device)
        best = min(best, time.perf_counter() - start)
    return best


@cache
def product_rate(precision: str, edge: int, device: str, columns: int = CONTRACTION_COLUMNS) -> float:
    """FLOP/s of the device's own product of two (edge, columns) matrices, 2·edge²·columns counted.

    In bf16x3 it is three products of bf16 matrices, with results in float32 on a device, all of which count, as plans
    count them.

    Args:
        precision: name of a precision.
        edge: rows of both.
        device: torch device string.
        columns: at most so many, fewer where a side would have more than :data:`SIDE_NUMBERS` numbers.
    """
    columns = max(1, min(columns, SIDE_NUMBERS // edge))
    generator = torch.Generator(device).manual_seed(SEED)
    dtype = _DTYPES.get(precision, torch.float32)
    left, right = (torch.randn(edge, columns, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty(edge, edge, dtype=dtype, device=device)

    def multiply() -> None:
        if precision != "bf16x3":
            torch.mm(left, right.T, out=out)
            return
        for _ in range(THREE):
            if device == "cpu":
                torch.mm(left, right.T, out=out)
            else:
                torch.mm(left, right.T, out_dtype=torch.float32)

    with tf32(precision == "tf32"):
        products = THREE if precision == "bf16x3" else 1
        return products * 2 * edge * edge * columns / best_of(multiply, device)


@dataclass(frozen=True)
class Ways:
    """Rates of the ways that bytes go, in bytes/s; 0 where there is no such way.

    Attributes:
        there: from page-locked host memory to the device.
        back: from the device to page-locked host memory.
        write: to the disk, synced.
        read: from the disk.
    """

    there: float
    back: float
    write: float
    read: float


def measure_ways(device: str, folder: Path, numbers: int = 2**26) -> Ways:
    """Time copies and the disk.

    Args:
        device: torch device string.
        folder: on the disk that is meant.
        numbers: float32 numbers that are copied.
    """
    disk = measure_disk(folder)
    if device == "cpu":
        return Ways(0.0, 0.0, disk.write, disk.read)
    host = torch.ones(numbers, pin_memory=True)
    there = torch.empty(numbers, device=device)
    size = 4 * numbers
    return Ways(
        size / best_of(lambda: there.copy_(host, non_blocking=True), device),
        size / best_of(lambda: host.copy_(there, non_blocking=True), device),
        disk.write,
        disk.read,
    )


def capture_rate(model: torch.nn.Module, inputs: Tensor, batch: int, device: str) -> float:
    """Samples/s of one forward and C backward passes without the engine, gradients dropped.

    Args:
        model: a network, which is moved to the device and back.
        inputs: samples to take, on the CPU.
        batch: samples per batch.
        device: torch device string.
    """
    model, there = model.to(device), inputs.to(device)
    try:
        with tf32(False):
            seconds = best_of(lambda: capture_seconds(model, there, batch), device, 2)
    finally:
        model.to("cpu")
    return len(inputs) / seconds
