"""Paths, generalised cross-validation and leave-one-out against their definitions in float64; error bars hold."""

import numpy as np
import pytest

import ooc_ntk
from ooc_ntk.algebra import path as path_module
from ooc_ntk.algebra.entries import ArrayEntries
from ooc_ntk.algebra.gcv import _leave_one_out
from ooc_ntk.errors import BudgetError, InputError
from tests.algebra.stored import Given, gram, in_memory, on_disk

SIZE = 160
RIDGES = np.array([3e-2, 1e-4, 1e-3, 1.0])


@pytest.fixture(scope="module")
def matrix():
    """Eigenvalues i^-1.5, and rows of different lengths."""
    scale = np.random.default_rng(5).uniform(0.5, 2.0, SIZE)
    return gram(SIZE, decay=1.5) * np.outer(scale, scale)


@pytest.fixture(scope="module")
def kernel(matrix, tmp_path_factory):
    return on_disk(tmp_path_factory.mktemp("kernel"), matrix, SIZE, 64)


def targets(count=3):
    return np.random.default_rng(3).standard_normal((SIZE, count))


def by_definition(matrix, y, ridge):
    """GCV, leave-one-out, train error and effective dimension as they are defined."""
    size = len(matrix)
    smoother = matrix @ np.linalg.inv(matrix + ridge * np.eye(size))
    left = y - smoother @ y
    gcv = (left**2).mean() / (1 - np.trace(smoother) / size) ** 2
    return gcv, left_out(matrix, y, ridge), (left**2).mean(), np.trace(smoother)


def left_out(matrix, y, ridge):
    """Leave-one-out error by refitting without each sample."""
    size, out = len(matrix), []
    for each in range(size):
        rest = np.delete(np.arange(size), each)
        solved = np.linalg.solve(matrix[np.ix_(rest, rest)] + ridge * np.eye(size - 1), y[rest])
        out.append(y[each] - matrix[each, rest] @ solved)
    return np.mean(np.square(out))


@pytest.mark.parametrize("count", [0, 3])
def test_exact_from_the_spectrum(count, kernel, matrix):
    y = targets()[:, 0] if count == 0 else targets(count)
    found = kernel.gcv(y, RIDGES)
    assert (found.method, found.probes, found.path.spectrum) == ("spectrum", 0, None)
    wanted = np.array([by_definition(matrix, y, ridge) for ridge in RIDGES]).T
    for name, values in zip(("gcv", "loo", "train", "effective_dimension"), wanted, strict=True):
        np.testing.assert_allclose(getattr(found, name), values, rtol=1e-8, err_msg=name)
    for name in ("gcv_error", "loo_error", "effective_dimension_error"):
        assert not getattr(found, name).any()
    assert found.best == np.argmin(wanted[0])
    assert found.best_ridge == RIDGES[found.best]
    assert found.solution.ridge == found.best_ridge
    for ridge, solution in zip(RIDGES, found.path.solutions, strict=True):
        np.testing.assert_allclose(
            solution.coefficients, np.linalg.solve(matrix + ridge * np.eye(SIZE), y), rtol=1e-8, atol=1e-9
        )
        assert solution.residual < 1e-9
    assert found.path.coefficients.shape == (4, *y.shape)
    assert found.figures()["best_ridge"] == found.best_ridge


def test_without_a_ridge_both_are_their_limits(kernel, matrix):
    found, y = kernel.gcv(targets(), [0.0]), targets()
    inverse = np.linalg.inv(matrix)
    assert found.gcv[0] == pytest.approx(((inverse @ y) ** 2).mean() / (np.trace(inverse) / SIZE) ** 2, rel=1e-6)
    assert found.loo[0] == pytest.approx(left_out(matrix, y, 0.0), rel=1e-6)
    assert found.train[0] == 0


@pytest.mark.parametrize("rank", [0, 25, None])
def test_estimates_hold_the_exact_values_in_their_bars(rank, kernel):
    """Of 40 seeds × 4 ridges at least 85% (95% are promised, and seeds are few)."""
    y = targets()
    exact, held, seeds = kernel.gcv(y, RIDGES), dict.fromkeys(("gcv", "loo", "effective_dimension"), 0), 40
    for seed in range(seeds):
        found = kernel.gcv(y, RIDGES, method="cg", probes=8, rank=rank, seed=seed)
        assert (found.method, found.probes) == ("cg", 8)
        np.testing.assert_allclose(found.train, exact.train, rtol=1e-6)
        for name in held:
            error = getattr(found, f"{name}_error")
            assert (error >= 0).all()
            held[name] += int(
                (abs(getattr(found, name) - getattr(exact, name)) <= error + 1e-9 * abs(getattr(exact, name))).sum()
            )
    for name, count in held.items():
        assert count >= 0.85 * seeds * len(RIDGES), (name, count)


def test_bars_shrink_with_the_preconditioner_and_with_probes(kernel):
    y = targets()

    def bar(**how):
        return np.mean([kernel.gcv(y, [1e-2], method="cg", seed=seed, **how).gcv_error[0] for seed in range(5)])

    plain, fast, many = bar(probes=8, rank=0), bar(probes=8, rank=60), bar(probes=64, rank=0)
    assert fast < plain / 1.5
    assert many < plain / 1.8


def test_ridges_share_passes(kernel):
    """All targets, probes and ridges: as many passes as the slowest ridge takes alone."""
    path = kernel.ridge_path(targets(), RIDGES, method="cg")
    alone = [kernel.solve(targets(), ridge, method="cg", rank=path[0].rank) for ridge in RIDGES]
    assert path.passes <= max(each.iterations for each in alone) + 2
    for one, other in zip(path.solutions, alone, strict=True):
        np.testing.assert_allclose(one.coefficients, other.coefficients, rtol=1e-6, atol=1e-8)
    assert [each.ridge for each in path.solutions] == list(RIDGES)
    assert len(path) == 4


def test_groups_of_ridges_where_memory_is_short(kernel, monkeypatch):
    whole = kernel.ridge_path(targets(), RIDGES, method="cg")
    monkeypatch.setattr(path_module, "free_bytes", lambda options: 8 * SIZE * 3 * 6)
    apart = kernel.ridge_path(targets(), RIDGES, method="cg")
    assert apart.passes > whole.passes
    np.testing.assert_allclose(apart.coefficients, whole.coefficients, rtol=1e-6, atol=1e-8)


def test_what_is_left_out_decides_the_way(kernel, monkeypatch):
    assert kernel.ridge_path(targets(), RIDGES)[0].method == "spectrum"
    monkeypatch.setattr(path_module, "SPECTRUM_ROWS", 100)
    assert kernel.ridge_path(targets(), RIDGES)[0].method == "cg"
    assert kernel.ridge_path(targets(), [0.0, 1.0])[0].method == "spectrum", "nothing preconditions a ridge of 0"
    with pytest.raises(BudgetError, match="the solutions of 4 ridges for 3 targets.*fewer ridges"):
        kernel.ridge_path(targets(), RIDGES, method="spectrum", budget=ooc_ntk.Budget(host="1MiB"))
    monkeypatch.setattr(path_module, "free_bytes", lambda options: 30_000)
    with pytest.raises(BudgetError, match="the full spectrum.*use method='cg'"):
        kernel.ridge_path(targets(), RIDGES, method="spectrum")


def without_each(features, y, ridge, *, groups):
    """Mean squared error of groups of rows left out one by one, kernel and targets centred anew each time."""
    errors = []
    for group in groups:
        rest = np.setdiff1d(np.arange(len(y)), group)
        middle, mean = features[rest].mean(0), y[rest].mean(0)
        inner, outer = features[rest] - middle, features[group] - middle
        solved = np.linalg.solve(inner @ inner.T + ridge * np.eye(len(rest)), y[rest] - mean)
        errors.append(((y[group] - mean - outer @ (inner.T @ solved)) ** 2).mean())
    return np.mean(errors)


@pytest.mark.parametrize("method", ["spectrum", "cg"])
def test_a_centred_view_refits_the_mean_with_every_sample_left_out(method):
    random = np.random.default_rng(2)
    features = random.standard_normal((40, 60)) + 3.0
    y = features[:, :2] @ random.standard_normal((2, 3)) + random.standard_normal((40, 3)) + 5.0
    kernel = in_memory(features @ features.T, 40)
    found = kernel.centered().gcv(y, [1e-3, 1.0, 100.0], method=method, probes=64)
    for ridge, loo, gcv in zip(found.ridges, found.loo, found.gcv, strict=True):
        assert loo == pytest.approx(without_each(features, y, ridge, groups=np.arange(40)[:, None]), rel=1e-6)
        centred = features - features.mean(0)
        # What the smoother leaves, by singular values: 1 less its trace would lose the digits that are compared.
        directions, sizes, _ = np.linalg.svd(centred)
        kept = ridge / (sizes[:39] ** 2 + ridge)  # the last direction is the mean's, of size zero
        left = directions[:, :39] * kept @ directions[:, :39].T @ (y - y.mean(0))
        wanted = (left**2).mean() / (kept.sum() / 40) ** 2
        assert gcv == pytest.approx(wanted, rel=1e-6 if method == "spectrum" else 0.5)
    with pytest.raises(InputError, match="centred kernel, which is singular"):
        kernel.centered().gcv(y, [0.0])


@pytest.mark.parametrize("method", ["spectrum", "cg"])
def test_of_a_full_kernel_a_sample_is_left_out_with_all_its_rows(method):
    """12 samples of 3 rows, which are alike within a sample."""
    random = np.random.default_rng(2)
    features = np.repeat(random.standard_normal((12, 50)), 3, axis=0) + 0.3 * random.standard_normal((36, 50))
    y = features[:, :4] @ random.standard_normal((4, 2)) + 0.1 * random.standard_normal((36, 2))
    kernel = Given(ArrayEntries(features @ features.T), np.zeros(36), rows=3)
    found = kernel.gcv(y, [1e-2, 10.0], method=method, probes=64)
    for ridge, loo in zip(found.ridges, found.loo, strict=True):
        errors = []
        for group in np.arange(36).reshape(12, 3):
            rest = np.setdiff1d(np.arange(36), group)
            square = features[rest] @ features[rest].T + ridge * np.eye(33)
            errors.append(
                ((y[group] - features[group] @ features[rest].T @ np.linalg.solve(square, y[rest])) ** 2).mean()
            )
        assert loo == pytest.approx(np.mean(errors), rel=1e-6)


def test_a_tail_far_above_the_ridge_does_not_drown_the_trace():
    """Eigenvalues 1/i and a ridge of 1e-4 of the mean: what the preconditioner leaves is known by its mean."""
    kernel = in_memory(gram(400, decay=1.0), 400)
    mean = float(kernel.entries.diagonal().mean())
    y, held = np.random.default_rng(1).standard_normal((400, 3)), 0
    exact = kernel.gcv(y, [1e-4 * mean])
    for seed in range(20):
        found = kernel.gcv(y, [1e-4 * mean], method="cg", probes=8, rank=40, seed=seed)
        assert found.gcv[0] > 0
        assert 0 < found.gcv_error[0] < exact.gcv[0]
        assert 0 <= found.effective_dimension[0] <= 400
        held += int(abs(found.gcv[0] - exact.gcv[0]) <= found.gcv_error[0])
    assert held >= 16


def test_a_spectrum_that_is_there_is_used(kernel):
    spectrum = kernel.eigh(method="full")
    found, wanted = (kernel.gcv(targets(), RIDGES, spectrum=each) for each in (spectrum, None))
    np.testing.assert_allclose(found.gcv, wanted.gcv, rtol=1e-9)
    np.testing.assert_allclose(found.loo, wanted.loo, rtol=1e-9)
    path = kernel.ridge_path(targets(), RIDGES, spectrum=spectrum)
    np.testing.assert_allclose(path.coefficients, wanted.path.coefficients, rtol=1e-8, atol=1e-9)
    with pytest.raises(InputError, match="holds 5 eigenpairs"):
        kernel.gcv(targets(), RIDGES, spectrum=kernel.eigh(5))


def test_no_errors_left_out_of_targets_that_are_zero():
    assert _leave_one_out(np.zeros(3), np.zeros(9), np.arange(3)) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("ridges", "more", "message"),
    [
        ([], {}, "ridges must be a list of numbers"),
        ([[1.0]], {}, "ridges must be a list of numbers"),
        (["a"], {}, "ridges must be numbers"),
        ([1.0, -2.0], {}, "ridge must be at least 0, got -2"),
        ([1.0], {"probes": 1}, "probes must be at least 2"),
        ([1.0], {"method": "tiles"}, "unknown method 'tiles'"),
        ([0.0], {"method": "cg", "rank": 0}, "GCV from probes needs ridges above 0"),
    ],
)
def test_bad_input(ridges, more, message, kernel):
    with pytest.raises(InputError, match=message):
        kernel.gcv(targets(), ridges, **more)


@pytest.mark.parametrize("method", ["spectrum", "cg"])
def test_ridges_that_do_not_suffice_are_left_out(method):
    """A little below zero, as kernels in float32 are: only those ridges fail, and an error says so if all do."""
    factor = np.random.default_rng(0).standard_normal((30, 5))
    matrix = factor @ factor.T - 1e-3 * np.eye(30)
    kernel, y = in_memory(matrix, 30), np.random.default_rng(1).standard_normal((30, 2))
    found = kernel.gcv(y, [1e-4, 1.0, 5e-4, 10.0], method=method)
    assert found.dropped == (1e-4, 5e-4)
    assert list(found.ridges) == [1.0, 10.0]
    assert len(found.path) == len(found.gcv) == 2
    np.testing.assert_allclose(found.solution.coefficients, np.linalg.solve(matrix + found.best_ridge * np.eye(30), y))
    with pytest.raises(InputError, match="not positive definite.*smallest ridge"):
        kernel.gcv(y, [1e-4, 5e-4], method=method)
    with pytest.raises(InputError, match="not positive definite.*smallest ridge"):
        kernel.ridge_path(y, [1e-4, 1.0], method=method)
