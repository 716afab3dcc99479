"""The train square in memory: the lower triangle as stored, mirrored, refused where it does not fit."""

import numpy as np
import pytest

from ooc_ntk.algebra import dense as dense_module
from ooc_ntk.algebra.dense import dense_square, square_bytes
from ooc_ntk.algebra.entries import ArrayEntries, Block, ViewEntries
from ooc_ntk.errors import BudgetError, TransientStorageError


def symmetric(size: int, rows: int | None = None) -> np.ndarray:
    found = np.random.default_rng(0).normal(size=(rows or size, size)).astype(np.float32)
    found[:size] += found[:size].T.copy()
    return found


@pytest.mark.parametrize("size", [1, 7, 255, 256, 257, 600])
def test_the_square_is_read_and_mirrored(size):
    matrix = symmetric(size, size + 3)
    found = dense_square(ArrayEntries(matrix))
    assert found.dtype == np.float64
    assert found.flags.c_contiguous
    assert np.array_equal(found, matrix[:size])


def test_only_the_lower_triangle_counts(monkeypatch):
    """Entries that are computed on demand need not be symmetric to the last bit."""
    monkeypatch.setattr(dense_module, "MIRRORED", 16)
    matrix = np.random.default_rng(0).normal(size=(100, 100))
    found = dense_square(ArrayEntries(matrix))
    assert np.array_equal(np.tril(found), np.tril(matrix))
    assert np.array_equal(found, found.T)


def test_of_a_view():
    matrix = symmetric(50)
    means = matrix.astype(np.float64).mean(1)
    found = dense_square(ViewEntries(ArrayEntries(matrix), None, means))
    centring = np.eye(50) - 1 / 50
    np.testing.assert_allclose(found, centring @ matrix @ centring, atol=1e-6)


def test_what_does_not_fit_is_refused_before_it_is_read(monkeypatch):
    entries = ArrayEntries(symmetric(100))
    monkeypatch.setattr(dense_module, "free_host_bytes", lambda: 10_000)
    monkeypatch.setattr(entries, "blocks", None)
    with pytest.raises(BudgetError, match=r"solving, 100 × 100 numbers, needs .*7.8 KiB are free to use: take less"):
        dense_square(entries, what="solving", remedy="take less")
    with pytest.raises(BudgetError, match="needs 23.6 MiB; 16.1 MiB were allowed"):
        dense_square(entries, copies=100.0, memory=square_bytes(entries))


class Flaky(ArrayEntries):
    """Misreads, and hands out what must be dropped before it says so."""

    def __init__(self, array: np.ndarray, failures: int) -> None:
        super().__init__(array)
        self.failures = failures

    def blocks(self, rows: range, *, lower: bool = False):
        for block in super().blocks(rows, lower=lower):
            if self.failures:
                self.failures -= 1
                yield Block(block.rows, block.columns, block.values + 1)
                raise TransientStorageError("misread")
            yield block


def test_a_misread_tile_is_read_again():
    matrix = symmetric(30)
    assert np.array_equal(dense_square(Flaky(matrix, 2)), matrix)
    with pytest.raises(TransientStorageError):
        dense_square(Flaky(matrix, 3))
