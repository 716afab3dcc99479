"""Paths, generalised cross-validation and leave-one-out against their definitions in float64; error bars hold."""

import numpy as np
import pytest

import ooc_ntk
from ooc_ntk.algebra import path as path_module
from ooc_ntk.algebra.gcv import _leave_one_out
from ooc_ntk.errors import BudgetError, InputError
from tests.algebra.stored import gram, in_memory, on_disk

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
    """GCV, leave-one-out, train error and effective dimension as they are defined, by refitting without each sample."""
    size = len(matrix)
    smoother = matrix @ np.linalg.inv(matrix + ridge * np.eye(size))
    left = y - smoother @ y
    gcv = (left**2).mean() / (1 - np.trace(smoother) / size) ** 2
    out = []
    for each in range(size):
        rest = np.delete(np.arange(size), each)
        solved = np.linalg.solve(matrix[np.ix_(rest, rest)] + ridge * np.eye(size - 1), y[rest])
        out.append(y[each] - matrix[each, rest] @ solved)
    return gcv, np.mean(np.square(out)), (left**2).mean(), np.trace(smoother)


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
    assert found.loo[0] == pytest.approx(by_definition(matrix, y, 0.0)[1], rel=1e-6)
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
    monkeypatch.setattr(path_module, "_free_bytes", lambda options: 1)
    apart = kernel.ridge_path(targets(), RIDGES, method="cg")
    assert apart.passes > whole.passes
    np.testing.assert_allclose(apart.coefficients, whole.coefficients, rtol=1e-6, atol=1e-8)


def test_what_is_left_out_decides_the_way(kernel, monkeypatch):
    assert kernel.ridge_path(targets(), RIDGES)[0].method == "spectrum"
    monkeypatch.setattr(path_module, "SPECTRUM_ROWS", 100)
    assert kernel.ridge_path(targets(), RIDGES)[0].method == "cg"
    assert kernel.ridge_path(targets(), [0.0, 1.0])[0].method == "spectrum", "nothing preconditions a ridge of 0"
    with pytest.raises(BudgetError, match="the full spectrum.*use method='cg'"):
        kernel.ridge_path(targets(), RIDGES, method="spectrum", budget=ooc_ntk.Budget(host="1MiB"))


def test_views_and_more_rows_than_samples_left_out():
    kernel = in_memory(gram(7), 7)
    found = kernel.centered().gcv(np.arange(7.0), [0.1, 1.0], method="cg", probes=16)
    exact = kernel.centered().gcv(np.arange(7.0), [0.1, 1.0])
    np.testing.assert_allclose(found.loo, exact.loo, rtol=1e-7)
    np.testing.assert_allclose(found.loo_error, 0, atol=1e-12)


def test_no_errors_left_out_of_targets_that_are_zero():
    assert _leave_one_out(np.zeros(9), np.ones(9), np.arange(3), np.ones(3)) == (0.0, 0.0)


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


def test_a_singular_kernel_needs_a_ridge():
    factor = np.random.default_rng(0).standard_normal((30, 5))
    kernel = in_memory(factor @ factor.T, 30)
    with pytest.raises(InputError, match="not positive definite.*smallest ridge"):
        kernel.gcv(np.ones(30), [0.0, 1.0])
