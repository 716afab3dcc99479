"""The kernel as an object: indexing, ridge regression, prediction."""

import re
import shutil

import numpy as np
import pytest
import torch
from torch import nn

import ooc_ntk
from ooc_ntk.algebra import ridge as ridge_module
from ooc_ntk.algebra.methods import cholesky
from ooc_ntk.errors import BudgetError, IncompleteRunError, InputError, StorageError
from ooc_ntk.storage.manifest import Manifest
from tests.cases import TEST, TRAIN, case, digits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernel")


def run(job, folder, rates, tile):
    budget = ooc_ntk.Budget(host="16GiB", device="16GiB", disk="1GiB")
    plan = ooc_ntk.plan(job, budget, preferences=ooc_ntk.Preferences(tile_samples=tile), rates=rates)
    return ooc_ntk.run(job, folder, plan=plan, progress=False)


@pytest.fixture(scope="module")
def kernel(folder, rates):
    """33 × 26, in tiles of 10."""
    return run(case("smooth-mlp").job(), folder / "trace", rates, 10)


@pytest.fixture(scope="module")
def full(folder, rates):
    """132 × 104, in tiles of 8 × 4."""
    return run(case("attention").job(kernel="full"), folder / "full", rates, 8)


def test_what_a_kernel_knows(kernel, full):
    assert (kernel.shape, len(kernel), kernel.dtype) == ((TRAIN + TEST, TRAIN), TRAIN + TEST, np.float32)
    assert (full.shape, full.train_samples, full.test_samples) == ((132, 104), TRAIN, TEST)
    assert full.diagonal().shape == (132,)
    assert repr(kernel) == f"<Kernel trace 33 × 26 float32 in {kernel.path}>"
    assert ooc_ntk.open(kernel.path).plan.digest == kernel.plan.digest


INDICES = [
    np.s_[3],
    np.s_[-1],
    np.s_[2, 5],
    np.s_[-2, -3],
    np.s_[4:21],
    np.s_[:, 7],
    np.s_[9:11, 19:21],
    np.s_[::3, 1::4],
    np.s_[-5:],
    np.s_[...],
    np.s_[..., 2],
    np.s_[5:5],
    np.s_[np.int64(3), np.int32(2)],
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_slices_and_integers_as_in_numpy(index, kernel):
    wanted = np.asarray(kernel)[index]
    found = kernel[index]
    assert np.shape(found) == np.shape(wanted)
    assert np.array_equal(found, wanted)


def test_lists_along_both_axes(kernel):
    entries = np.asarray(kernel)
    assert np.array_equal(kernel[[0, 12, 30]], entries[[0, 12, 30]])
    assert np.array_equal(kernel[[1, 11], [2, 3, 25]], entries[np.ix_([1, 11], [2, 3, 25])])
    assert np.array_equal(kernel[np.array([1, 11]), 4:9], entries[[1, 11], 4:9])
    mask = np.arange(len(kernel)) % 4 == 1
    assert np.array_equal(kernel[mask], entries[mask])


@pytest.mark.parametrize("index", [33, (0, 26), (0, 0, 0)])
def test_out_of_range_is_an_index_error(index, kernel):
    with pytest.raises(IndexError):
        kernel[index]


def test_as_an_array(kernel):
    assert np.asarray(kernel, dtype=np.float64).dtype == np.float64
    assert np.array_equal(np.array(kernel), kernel[:])
    with pytest.raises(ValueError, match="without a copy"):
        np.array(kernel, copy=False)


@pytest.mark.parametrize("targets", [(), (3,)])
@pytest.mark.parametrize("which", ["kernel", "full"])
def test_solve_and_predict_as_numpy_does(which, targets, request):
    kernel = request.getfixturevalue(which)
    train = kernel.shape[1]
    y = np.random.default_rng(0).normal(size=(train, *targets))
    entries = np.asarray(kernel, dtype=np.float64)
    ridge = 1e-3 * entries[:train].diagonal().mean()
    solution = kernel.solve(y, ridge)
    wanted = np.linalg.solve(entries[:train] + ridge * np.eye(train), y)
    np.testing.assert_allclose(solution.coefficients, wanted, rtol=1e-7, atol=1e-7 * np.abs(wanted).max())
    assert solution.ridge == ridge
    assert solution.ridge_ratio == pytest.approx(1e-3)
    residual = np.linalg.norm((entries[:train] + ridge * np.eye(train)) @ solution.coefficients - y) / np.linalg.norm(y)
    assert solution.residual < 1e-10
    assert residual < 1e-10
    predicted = kernel.predict(solution)
    assert predicted.shape == (kernel.shape[0] - train, *targets)
    np.testing.assert_allclose(predicted, entries[train:] @ wanted, rtol=1e-6, atol=1e-8 * np.abs(predicted).max())


def test_the_residual_is_measured_not_assumed(kernel, monkeypatch):
    monkeypatch.setattr(cholesky.scipy.linalg, "cho_solve", lambda factor, y, check_finite: np.zeros_like(y))
    assert kernel.solve(np.ones(TRAIN), 1.0).residual == pytest.approx(1.0)


def test_a_large_ridge_shrinks_to_the_targets(kernel):
    y = np.arange(TRAIN, dtype=float)
    np.testing.assert_allclose(kernel.solve(y, 1e12).coefficients, y / 1e12, rtol=1e-6, atol=1e-18)


@pytest.mark.parametrize(
    ("y", "ridge", "message"),
    [
        (np.ones(TRAIN + 1), 1.0, rf"y must have {TRAIN} rows.*got shape \({TRAIN + 1},\)"),
        (np.ones((3, TRAIN)), 1.0, "must have"),
        (np.ones((TRAIN, 1, 1)), 1.0, "must have"),
        (np.float64(3), 1.0, "must have"),
        (np.full(TRAIN, np.nan), 1.0, "y holds NaN or infinity"),
        (np.ones(TRAIN), -1.0, "ridge must be at least 0, got -1"),
        (np.ones(TRAIN), np.nan, "ridge must be at least 0, got nan"),
    ],
)
def test_bad_targets_and_ridges(y, ridge, message, kernel):
    with pytest.raises(InputError, match=message):
        kernel.solve(y, ridge)


def test_a_singular_kernel_without_ridge(folder, rates):
    """Every digit four times: no jitter is added silently, and the message says what to type."""
    images = digits()[0][:6].repeat(4, 1, 1, 1)
    kernel = run(
        ooc_ntk.Job(model=case("smooth-mlp").module, train=images, device="cpu"), folder / "singular", rates, 24
    )
    with pytest.raises(
        InputError, match=r"K \+ 0·I is not positive definite.*smallest ridge that would do is ([0-9.e+-]+);"
    ) as refused:
        kernel.solve(np.ones(24), 0.0)
    told = float(re.search(r"would do is ([0-9.e+-]+);", str(refused.value)).group(1))
    assert kernel.solve(np.ones(24), told).residual < 1e-3, "what is told to do, does"
    mean = np.asarray(kernel).diagonal().mean()
    assert kernel.solve(np.ones(24), 1e-3 * mean).residual < 1e-8


def test_a_kernel_of_zeros_says_what_is_wrong(folder, rates):
    """A sample without gradient leaves nothing to take a millionth of; still no warning and no NaN."""
    job = ooc_ntk.Job(model=nn.Linear(3, 1, bias=False).eval(), train=torch.zeros(4, 3), device="cpu")
    kernel = run(job, folder / "zero", rates, 4)
    with pytest.raises(InputError, match="not positive definite"):
        kernel.solve(np.ones(4), 0.0)
    np.testing.assert_allclose(kernel.solve(np.ones(4), 0.5).coefficients, 2.0)


def test_too_large_for_memory_is_refused_before_any_work(kernel, monkeypatch):
    monkeypatch.setattr(ridge_module, "free_host_bytes", lambda: 1000)
    with pytest.raises(BudgetError, match=r"26 × 26 for 1 right-hand sides by .* needs .* of memory, 0 B are free"):
        kernel.solve(np.ones(TRAIN), 1.0)


def test_a_solution_predicts_with_the_kernel_it_is_of(kernel, full):
    solution = kernel.cosine().solve(np.ones(TRAIN), 1.0)
    assert kernel.cosine().predict(solution).shape == (TEST,)
    for other in (kernel, kernel.cosine().centered()):
        with pytest.raises(InputError, match="of another kernel or view"):
            other.predict(solution)
    with pytest.raises(InputError, match=r"predict takes what solve returned, got ndarray; .*kernel\.matmat"):
        kernel.predict(solution.coefficients)
    path = kernel.ridge_path(np.ones(TRAIN), [1.0, 2.0])
    assert kernel.predict(path[1]).shape == (TEST,)
    assert kernel.predict(kernel.gcv(np.ones(TRAIN), [1.0]).solution).shape == (TEST,)
    assert "cholesky" in repr(solution)
    assert "2 ridges" in repr(path)


def test_a_budget_may_be_a_size(kernel):
    assert kernel.solve(np.ones(TRAIN), 1.0, budget="8GiB").residual < 1e-10
    with pytest.raises(InputError, match="budget must be a Budget or a size"):
        kernel.solve(np.ones(TRAIN), 1.0, budget=[1])


def test_prediction_needs_test_rows(folder, rates):
    kernel = run(case("smooth-mlp").job(test=False), folder / "square", rates, 26)
    with pytest.raises(InputError, match="no test rows; give test data"):
        kernel.predict(kernel.solve(np.ones(TRAIN), 1.0))


def test_opening_what_is_no_finished_run(kernel, tmp_path):
    with pytest.raises(StorageError, match=r"holds no run: there is no plan.json"):
        ooc_ntk.open(tmp_path)
    shutil.copytree(kernel.path, tmp_path / "copy")
    manifest = Manifest(tmp_path / "copy")
    last = kernel.plan.superblocks[-1]
    manifest.withdraw([f"kernel-0-{last.name[0]}-{last.name[1]}"])
    manifest.close()
    left = kernel.plan.tile_count - len(last.tiles)
    with pytest.raises(IncompleteRunError, match=rf"not finished: {left} of 9 kernel tiles"):
        ooc_ntk.open(tmp_path / "copy")
