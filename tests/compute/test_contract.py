"""Contraction keeps its digits however long it is."""

import numpy as np
import pytest
import torch

from ooc_ntk.compute.contract import KernelAccumulator, check_precision
from ooc_ntk.compute.products import multiply
from ooc_ntk.compute.rownorms import squared_norms
from ooc_ntk.errors import InputError

#: Columns of the long products: several contraction blocks, the last one narrower.
COLUMNS = 330_001

#: Relative Frobenius error allowed from identical gradients.
CONTRACTION = 5e-7

DATA = {
    "zero mean": lambda rows: torch.randn(rows, COLUMNS),
    "positive mean": lambda rows: torch.rand(rows, COLUMNS) + 0.5,
    "few large entries": lambda rows: torch.randn(rows, COLUMNS) * torch.rand(COLUMNS).pow(-0.4),
}


def gram(left, right=None, precision="float32"):
    edge = max(len(left), len(left if right is None else right))
    accumulator = KernelAccumulator(edge, precision)
    accumulator.begin(len(left), len(left if right is None else right))
    accumulator.add(left, right)
    found = accumulator.result().clone()
    # Of a tile with itself the lower triangle counts; the engine mirrors it.
    return found if right is not None else found.tril() + found.tril(-1).T


def error(found, wanted):
    assert found.dtype == torch.float64
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kind", DATA)
def test_float32_against_float64(kind):
    left, right = DATA[kind](12), DATA[kind](9)
    exact_left, exact_right = left.double(), right.double()
    assert error(gram(left), exact_left @ exact_left.T) <= CONTRACTION
    assert error(gram(left, right), exact_left @ exact_right.T) <= CONTRACTION


def test_float64():
    left, right = DATA["positive mean"](4).double(), DATA["positive mean"](3).double()
    assert error(gram(left, right, "float64"), left @ right.T) <= 1e-14


def test_the_symmetric_path_equals_the_general_one():
    left = DATA["zero mean"](17)
    symmetric = gram(left)
    assert torch.equal(symmetric, symmetric.T)
    assert error(symmetric, gram(left, left.clone())) <= CONTRACTION


def test_many_blocks_add_up_in_float64():
    """30,000 equal terms: a float32 sum would be off by 1e-5 and more."""
    accumulator = KernelAccumulator(2, "float32")
    accumulator.begin(2, 2)
    piece = torch.full((2, 1), 0.1)
    for _ in range(30_000):
        accumulator.add(piece)
    wanted = torch.full((2, 2), 30_000 * float(np.float32(np.float32(0.1) * np.float32(0.1))), dtype=torch.float64)
    assert error(accumulator.result().tril(), wanted.tril()) <= 1e-10


def test_a_buffer_is_reused_and_begins_at_zero():
    accumulator = KernelAccumulator(4, "float32")
    accumulator.begin(4, 4)
    accumulator.add(torch.full((4, 3), torch.nan))
    assert accumulator.result()[tuple(torch.tril_indices(4, 4))].isnan().all()
    left, right = torch.randn(3, 5), torch.randn(2, 5)
    accumulator.begin(3, 2)
    accumulator.add(left, right)
    accumulator.add(left, right)
    assert accumulator.result().shape == (3, 2)
    assert error(accumulator.result(), 2 * left.double() @ right.double().T) <= CONTRACTION


@pytest.mark.parametrize("kind", DATA)
def test_squared_norms_keep_their_digits(kind):
    rows = DATA[kind](3).numpy()
    found = squared_norms(rows)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, (rows.astype(np.float64) ** 2).sum(1), rtol=CONTRACTION)


def test_squared_norms_show_what_is_not_finite():
    rows = np.ones((4, 5), np.float32)
    rows[1, 2], rows[2, 0], rows[3, 4] = np.nan, np.inf, 1e25
    found = squared_norms(rows)
    assert found[0] == 5
    assert np.isnan(found[1])
    assert found[2] == np.inf
    assert found[3] == np.inf, "the square overflows float32"
    assert squared_norms(rows[3:].astype(np.float64))[0] == pytest.approx(1e50)


def test_tf32_needs_a_gpu():
    with pytest.raises(InputError, match="'tf32' needs a CUDA device, got cpu"):
        check_precision("tf32", "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("kind", DATA)
def test_float32_means_float32_on_a_gpu(kind):
    left, right = DATA[kind](64), DATA[kind](48)
    accumulator = KernelAccumulator(64, "float32", "cuda")
    accumulator.begin(64, 48)
    accumulator.add(left, right)
    assert error(accumulator.result(), left.double() @ right.double().T) <= CONTRACTION


def test_long_products_lose_no_digits():
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(3, 2**22, generator=generator) + 0.5
    wanted = rows.double() @ rows.double().T
    for out in (None, torch.empty(3, 3)):
        found = multiply(rows, rows, out)
        assert float(((found.double() - wanted) / wanted).abs().max()) <= 3e-7
