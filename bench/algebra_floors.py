"""What solving cannot go below on a machine, measured without the solver: reading tiles plainly, and products."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

import ooc_ntk
from ooc_ntk.algebra.products import SCRATCH_BYTES
from ooc_ntk.planning.solving import BLOCK_TILES, ROWS_AT_ONCE
from ooc_ntk.storage.arrays import TileArray
from ooc_ntk.storage.reading import forget_pages

#: Bytes of the buffer that is read into, again and again: as much as the solver's (2 to 16 MiB take the same time).
BUFFER_BYTES: Final = 2**22

#: Seconds that a product is repeated for at least, and how often that is done; the fastest counts.
PRODUCT_SECONDS, PRODUCTS = 0.2, 3


def triangle_files(kernel: ooc_ntk.Kernel) -> list[Path]:
    """Files of the tiles on and below the diagonal of a kernel's train square, row by row."""
    stored = kernel.zarr
    tiles = TileArray(kernel.path, "kernel.zarr", stored.shape, stored.chunks, np.dtype(stored.dtype).str)
    (height, width), size = stored.chunks, stored.shape[1]
    return [
        kernel.path / tiles.chunk_path((row, column))
        for row in range(-(-size // height))
        for column in range(-(-min((row + 1) * height, size) // width))
    ]


def read_rate(files: Sequence[Path]) -> float:
    """Bytes/s of reading files one after another into one buffer, by one thread, with no check."""
    buffer = memoryview(np.empty(BUFFER_BYTES, dtype=np.uint8))
    total, start = 0, time.perf_counter()
    for path in files:
        descriptor, offset = os.open(path, os.O_RDONLY), 0
        try:
            while count := os.preadv(descriptor, [buffer], offset):
                offset += count
        finally:
            os.close(descriptor)
        total += offset
    return total / (time.perf_counter() - start)


def best_rate(flops: float, multiply: Callable[[], object]) -> float:
    """FLOP/s of a product that is repeated until its time can be told."""
    multiply()
    fastest = float("inf")
    for _ in range(PRODUCTS):
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < PRODUCT_SECONDS:
            multiply()
            count += 1
        fastest = min(fastest, (time.perf_counter() - start) / count)
    return flops / fastest


def pass_rate(width: int, targets: int) -> float:
    """FLOP/s of a pass: pieces of tiles as wide as these, in float64, times the vectors, from both sides.

    With vectors as columns and as rows; the fastest counts.
    """
    height = max(1, SCRATCH_BYTES // 8 // width)
    block = torch.ones(height, width, dtype=torch.float64)
    right, left = torch.ones(width, targets, dtype=torch.float64), torch.ones(height, targets, dtype=torch.float64)
    down, across = torch.zeros_like(left), torch.zeros_like(right)

    def multiply() -> None:
        down.addmm_(block, right)
        across.addmm_(block.T, left)

    rows, columns = right.T.contiguous(), left.T.contiguous()
    flat_down, flat_across = torch.zeros_like(columns), torch.zeros_like(rows)

    def multiply_rows() -> None:
        flat_down.addmm_(rows, block.T)
        flat_across.addmm_(columns, block)

    flops = 4 * height * width * targets
    return max(best_rate(flops, multiply), best_rate(flops, multiply_rows))


def apply_rate(size: int, rank: int, targets: int) -> float:
    """FLOP/s of applying a preconditioner: its basis, transposed and not, times the vectors.

    By torch and by NumPy, whose BLAS are not the same, and for the basis by rows and by columns; the fastest counts.
    """
    found = 0.0
    for basis in (np.ones((size, rank)), np.ones((size, rank), order="F")):
        given, flops = np.ones((size, targets)), 4 * size * rank * targets
        tensor, vectors = torch.from_numpy(basis), torch.from_numpy(given)
        found = max(found, best_rate(flops, lambda basis=basis, given=given: basis @ (basis.T @ given)))
        found = max(found, best_rate(flops, lambda tensor=tensor, vectors=vectors: tensor @ (tensor.T @ vectors)))
    return found


def build_rate(size: int, rank: int) -> float:
    """FLOP/s of building a preconditioner: rows of its factor times a square of its rank."""
    rows = min(size, ROWS_AT_ONCE)
    factor, square = torch.ones(rows, rank, dtype=torch.float64), torch.ones(rank, rank, dtype=torch.float64)
    return best_rate(2 * rows * rank * rank, lambda: factor @ square)


def tile_product_rate(edge: int) -> float:
    """FLOP/s of Cholesky on disk: a block less the product of two strips."""
    strip = torch.ones(edge, max(1, edge // BLOCK_TILES), dtype=torch.float64)
    block = torch.zeros(edge, edge, dtype=torch.float64)
    return best_rate(2 * edge * edge * strip.shape[1], lambda: block.addmm_(strip, strip.T, alpha=-1))


def measure_floors(kernel: ooc_ntk.Kernel, targets: int, rank: int) -> dict[str, Any]:
    """Rates of reading and of products, and what one pass of the engine is made of.

    Args:
        kernel: the kernel.
        targets: vectors of a product.
        rank: columns of the preconditioner.

    Returns:
        ``read``: bytes/s with the page cache as it is, and dropped; ``rates``: FLOP/s; ``pass``: seconds.
    """
    files, size, rank = triangle_files(kernel), kernel.train_samples, max(rank, 1)
    read = {"as it is": read_rate(files)}
    rates = {
        "pass": pass_rate(int(kernel.zarr.chunks[1]), targets),
        "apply": apply_rate(size, rank, targets),
        "build": build_rate(size, rank),
    }
    stages = _one_pass(kernel, targets)
    for path in files:
        forget_pages(path)
    read["dropped"] = read_rate(files)
    return {"read": read, "rates": rates, "pass": stages}


def _one_pass(kernel: ooc_ntk.Kernel, targets: int) -> dict[str, float]:
    """Seconds of a pass by what is done in it: each stage does what the one before does, and more."""
    entries, size = kernel.entries, kernel.train_samples
    scratch = torch.empty(SCRATCH_BYTES // 8, dtype=torch.float64)

    def blocks(convert: bool) -> None:
        for block in entries.blocks(range(size), lower=True):
            values = torch.from_numpy(block.values)
            step = max(1, scratch.numel() // max(1, values.shape[1]))
            for part in values.split(step) if convert else ():
                scratch[: part.numel()].view(part.shape).copy_(part)

    vectors = np.ones((size, targets))
    stages: dict[str, Callable[[], object]] = {
        "read and checked": lambda: blocks(False),  # tiles are checked when they are read first
        "read": lambda: blocks(False),
        "read and converted": lambda: blocks(True),
        "whole": lambda: kernel.matmat(vectors),
    }
    found = {}
    for name, stage in stages.items():
        start = time.perf_counter()
        stage()
        found[name] = time.perf_counter() - start
    return found
