"""Contraction: products of Jacobian tiles summed into one kernel tile without losing digits to its length."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor

from ooc_ntk.errors import InputError
from ooc_ntk.planning.layout import CONTRACTION_COLUMNS
from ooc_ntk.planning.rates import CALIBRATED_DEPTH, CALIBRATED_EDGES

from .machine import best_seconds

TORCH_DTYPE = {"float32": torch.float32, "tf32": torch.float32, "float64": torch.float64}


#: Tiles with a narrower side than this go through torch's product on a CPU, Gram matrices too: ``ssyrk`` saves nothing
#: there, and a second BLAS beside torch's own threads costs (measured at 128 rows: 87 against 150 GFLOP/s in a run).
SYRK_EDGE: Final = 256

#: Columns per block of such tiles: torch's product sums longer ones with an error above 5e-7 (measured).
SMALL_TILE_COLUMNS: Final = 2048


class KernelAccumulator:
    """Sums ``left @ right.T`` over many column blocks into one kernel tile.

    Blocks of at most :data:`CONTRACTION_COLUMNS` columns are multiplied in the plan's precision and added up in
    float64, so the rounding error does not grow with the number of parameters. On a CPU large products go through
    NumPy's BLAS, which computes a Gram matrix by ``ssyrk`` (half the arithmetic) and, unlike SciPy's wrapper, lets
    other threads run meanwhile. Both buffers are allocated once and reused for every tile.
    """

    def __init__(self, edge: int, precision: str, device: str = "cpu") -> None:
        """Allocate for tiles of up to edge × edge entries.

        Args:
            edge: largest number of kernel rows or columns of a tile.
            precision: ``float32``, ``tf32`` or ``float64``.
            device: torch device string.
        """
        self._on_cpu = torch.device(device).type == "cpu"
        self._device = torch.device(device)
        self._tf32 = precision == "tf32"
        self._sums = torch.empty(edge * edge, dtype=torch.float64, device=device)
        self._products = torch.empty(edge * edge, dtype=TORCH_DTYPE[precision], device=device)
        self._sum, self._product = self._sums, self._products

    def begin(self, rows: int, columns: int) -> None:
        """Start a new tile of rows × columns entries, at zero."""
        self._sum = self._sums[: rows * columns].view(rows, columns).zero_()
        self._product = self._products[: rows * columns].view(rows, columns)

    def add(self, left: Tensor, right: Tensor | None = None) -> None:
        """Add ``left @ right.T`` to the tile.

        Args:
            left: (rows, depth), in the plan's precision, on the host or the device.
            right: (columns, depth); None for the Gram matrix of ``left``.
        """
        if not self._on_cpu:
            left = left.to(self._device, non_blocking=True)
            right = None if right is None else right.to(self._device, non_blocking=True)
        by_numpy = self._on_cpu and min(self._product.shape) >= SYRK_EDGE
        step = CONTRACTION_COLUMNS if by_numpy or not self._on_cpu else SMALL_TILE_COLUMNS
        for start in range(0, left.shape[1], step):
            stop = start + step
            a = left[:, start:stop]
            b = a if right is None else right[:, start:stop]
            if by_numpy:
                np.matmul(a.numpy(), b.numpy().T, out=self._product.numpy())
            else:
                with tf32(self._tf32):
                    torch.mm(a, b.T, out=self._product)
            if self._on_cpu:
                # Ten times faster than torch's addition of mixed dtypes (measured).
                np.add(self._sum.numpy(), self._product.numpy(), out=self._sum.numpy())
            else:
                self._sum += self._product

    def result(self) -> Tensor:
        """The tile so far: (rows, columns) float64 on the host; a view of a buffer that the next tile reuses."""
        return self._sum.cpu()


def squared_norms(rows: np.ndarray) -> np.ndarray:
    """Squared norm of each row of a slab, in float32 blocks added up in float64.

    Args:
        rows: (rows, columns), float32 or float64.

    Returns:
        (rows,) float64. Infinite or NaN where a row is not finite, or where its square overflows.
    """
    total = np.zeros(rows.shape[0])
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, rows.shape[1], CONTRACTION_COLUMNS):
            block = rows[:, start : start + CONTRACTION_COLUMNS]
            total += np.vecdot(block, block)
    return total


def check_precision(precision: str, device: str) -> None:
    """Refuse a precision that the device does not have.

    Raises:
        InputError: for ``tf32`` without CUDA.
    """
    if precision == "tf32" and torch.device(device).type != "cuda":
        raise InputError(f"precision 'tf32' needs a CUDA device, got {device}; use 'float32'")


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 in matrix products; convolutions never use it. Set back after."""
    products, convolutions = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed, False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = products, convolutions


def measure_products(device: str, precisions: tuple[str, ...]) -> tuple[dict[str, dict[int, float]], ...]:
    """Time general and symmetric products at the calibrated edges.

    Args:
        device: torch device string.
        precisions: the precisions to time.

    Returns:
        FLOP/s per precision and edge, of general products and of Gram matrices (whose FLOPs count half).
    """
    general: dict[str, dict[int, float]] = {}
    symmetric: dict[str, dict[int, float]] = {}
    generator = torch.Generator().manual_seed(0)
    for precision in precisions:
        general[precision], symmetric[precision] = {}, {}
        for edge in CALIBRATED_EDGES:
            left = torch.randn(edge, CALIBRATED_DEPTH, generator=generator).to(device, TORCH_DTYPE[precision])
            right = torch.randn(edge, CALIBRATED_DEPTH, generator=generator).to(device, TORCH_DTYPE[precision])
            accumulator = KernelAccumulator(edge, precision, device)
            accumulator.begin(edge, edge)
            flops = 2 * edge * edge * CALIBRATED_DEPTH

            general[precision][edge] = flops / best_seconds(partial(_multiply, accumulator, left, right))
            symmetric[precision][edge] = flops / 2 / best_seconds(partial(_multiply, accumulator, left, None))
        # Noise can only slow a timing down, and a larger tile is not slower than a smaller one.
        for table in (general[precision], symmetric[precision]):
            fastest = 0.0
            for edge in CALIBRATED_EDGES:
                fastest = table[edge] = max(fastest, table[edge])
    return general, symmetric


def _multiply(accumulator: KernelAccumulator, left: Tensor, right: Tensor | None) -> None:
    """One product, waited for."""
    accumulator.add(left, right)
    if left.device.type == "cuda":
        torch.cuda.synchronize(left.device)
