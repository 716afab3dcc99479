"""Kernels of any entries: stored in tiles with checksums, or in memory, as operators."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ooc_ntk.algebra.entries import ArrayEntries, Entries, TileEntries
from ooc_ntk.algebra.operator import KernelOperator
from ooc_ntk.storage.arrays import TileArray, open_tile_array
from ooc_ntk.storage.atomic import FileRecord


@dataclass(frozen=True)
class Given(KernelOperator):
    """An operator of given entries."""

    given: Entries
    diagonal_of_all: np.ndarray
    folder: Path | None = None
    rows: int = 1

    @property
    def entries(self) -> Entries:
        return self.given

    @property
    def samples(self) -> tuple[int, int]:
        height, width = self.given.shape
        return width // self.rows, (height - width) // self.rows

    @property
    def workspace(self) -> Path | None:
        return self.folder

    def sample_diagonal(self) -> np.ndarray:
        return self.diagonal_of_all


def gram(train: int, test: int = 0, *, decay: float = 1.0, seed: int = 0) -> np.ndarray:
    """A symmetric matrix of all samples with eigenvalues i^-decay."""
    random = np.random.default_rng(seed)
    vectors, _ = np.linalg.qr(random.standard_normal((train + test, train + test)))
    values = np.arange(1.0, train + test + 1) ** -decay
    found = (vectors * values) @ vectors.T
    return (found + found.T) / 2


def in_memory(matrix: np.ndarray, train: int) -> Given:
    """An operator of a matrix of all samples."""
    return Given(ArrayEntries(matrix[:, :train]), matrix.diagonal().copy())


def on_disk(root: Path, matrix: np.ndarray, train: int, edge: int, dtype: str = "<f8") -> Given:
    """The same in tiles on disk, with checksums."""
    kernel = np.asarray(matrix[:, :train], dtype=dtype)
    array = TileArray(root, "kernel.zarr", kernel.shape, (edge, edge), dtype)
    array.create()
    records: dict[str, FileRecord] = {}
    for i in range(-(-kernel.shape[0] // edge)):
        for j in range(-(-train // edge)):
            path = array.chunk_path((i, j))
            tile = np.ascontiguousarray(kernel[i * edge : (i + 1) * edge, j * edge : (j + 1) * edge])
            staged = array.stage(path, tile)
            records[path] = staged.seal()
            staged.publish()
    entries = TileEntries(root, "kernel.zarr", open_tile_array(root, "kernel.zarr"), records)
    return Given(entries, matrix.diagonal().astype(dtype).astype(np.float64), root)
