"""Ridge regression in all its ways against NumPy in float64: kernels stored in tiles, ill-conditioned ones, faults."""

import dataclasses
import os
import platform

import numpy as np
import pytest

import ooc_ntk
from ooc_ntk.algebra import ridge, solvers, tilecholesky
from ooc_ntk.algebra.blockcg import BlockSystem, solve_systems
from ooc_ntk.algebra.precondition import pivoted_cholesky
from ooc_ntk.algebra.products import square_product
from ooc_ntk.algebra.tilecholesky import TileCholesky
from ooc_ntk.errors import BudgetError, InputError, StorageError
from ooc_ntk.planning.solving import tile_cholesky_traffic
from tests.algebra.stored import Given, gram, in_memory, on_disk

SIZE = 150
METHODS = ("cholesky", "cg", "tiles")


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """150 train and 20 test rows in tiles of 64, eigenvalues i^-2."""
    return on_disk(tmp_path_factory.mktemp("kernel"), gram(SIZE, 20, decay=2.0), SIZE, 64)


def targets(count=4, size=SIZE):
    return np.random.default_rng(3).standard_normal((size, count))


def error(found, wanted):
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def reference(kernel, y, ridge):
    square = np.asarray(dense(kernel))
    return np.linalg.solve(square + ridge * np.eye(len(square)), y)


def dense(kernel):
    return kernel.entries.rows(np.arange(kernel.shape[1]))


@pytest.mark.parametrize("ratio", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("view", ["kernel", "cosine", "centred"])
def test_coefficients_as_numpy_has_them(method, ratio, view, kernel):
    seen = {"kernel": lambda: kernel, "cosine": kernel.cosine, "centred": kernel.centered}[view]()
    absolute = ratio * float(seen.entries.diagonal().mean())
    for y in (targets(), targets()[:, 0]):
        found = seen.solve(y, absolute, method=method)
        wanted = reference(seen, y, absolute)
        assert error(found.coefficients, wanted) < 1e-8
        left = y - absolute * found.coefficients - dense(seen) @ found.coefficients
        worst = (np.linalg.norm(left, axis=0) / np.linalg.norm(y, axis=0)).max()
        assert found.residual == pytest.approx(worst, rel=0.1, abs=2e-9)
        assert (found.method, found.ridge) == (method, absolute)
        assert found.ridge_ratio == pytest.approx(ratio)
        assert (found.iterations > 0) == (method == "cg")
        whole = np.concatenate([dense(seen), seen.entries.rows(np.arange(SIZE, SIZE + 20))])
        assert error(seen.predict(found), whole[SIZE:] @ wanted) < 1e-7
        assert error(seen.predict(found, rows="train"), whole[:SIZE] @ wanted) < 1e-7


def test_the_planner_takes_what_fits(kernel):
    absolute = 1e-3
    ample = kernel.solve(targets(), absolute)
    assert ample.method == "cholesky"
    plan = kernel.plan_solve(4)
    assert plan.chosen.method == "cholesky"
    assert "chosen" in str(plan)
    with pytest.raises(BudgetError, match="are free to use.*; raise the host budget to [0-9]+MiB or more"):
        kernel.solve(targets(), absolute, budget=ooc_ntk.Budget(host="1MiB"))


def test_targets_that_depend_on_each_other_or_are_zero(kernel):
    """One-hot labels less their mean add up to zero; a block of them has not full rank."""
    y = np.eye(10)[np.arange(SIZE) % 10] - 0.1
    y = np.concatenate([y, np.zeros((SIZE, 1)), y[:, :1]], axis=1)
    for method in METHODS:
        found = kernel.solve(y, 1e-4, method=method)
        assert error(found.coefficients, reference(kernel, y, 1e-4)) < 1e-8
        assert not found.coefficients[:, 10].any()
    nothing = kernel.solve(np.zeros(SIZE), 1e-4, method="cg")
    assert not nothing.coefficients.any()
    assert nothing.residual == 0


def test_more_targets_than_rows(kernel):
    y = targets(SIZE + 30)
    for method in METHODS:
        assert error(kernel.solve(y, 1e-3, method=method).coefficients, reference(kernel, y, 1e-3)) < 1e-8


# --- conjugate gradients ----------------------------------------------------------------------------------------------


def test_the_preconditioner_saves_most_steps():
    """Eigenvalues i^-2, condition 3e5 with the ridge."""
    matrix = gram(600, decay=2.0, seed=1)
    kernel, y = in_memory(matrix, 600), targets(3, 600)
    plain = kernel.solve(y, 3e-6, method="cg", rank=0)
    fast = kernel.solve(y, 3e-6, method="cg", rank=200)
    assert fast.iterations * 5 <= plain.iterations
    assert (fast.rank, plain.rank) == (200, 0)
    assert error(fast.coefficients, np.linalg.solve(matrix + 3e-6 * np.eye(600), y)) < 1e-8


def test_steps_share_their_passes_over_several_ridges():
    matrix = gram(200, decay=1.5)
    kernel, y, passes = in_memory(matrix, 200), targets(2, 200), []
    preconditioner = pivoted_cholesky(kernel.entries, 60, ridge=1e-4)
    ridges = (1e-4, 1e-2, 1.0)
    systems = [BlockSystem(y, each, preconditioner, 1e-10) for each in ridges]

    def product(x):
        passes.append(x.shape[1])
        return square_product(kernel.entries, x)

    assert solve_systems(product, systems, y, iterations=500) == len(passes)
    assert len(passes) == max(each.iterations for each in systems) + 1
    assert passes[0] == 6
    assert passes[-2] < 6, "what is solved takes no part any more"
    for each, system in zip(ridges, systems, strict=True):
        assert error(system.solution, np.linalg.solve(matrix + each * np.eye(200), y)) < 1e-9


def test_what_does_not_converge_is_refused(kernel):
    with pytest.raises(InputError, match=r"reached a relative residual of .* after 3 steps.*method='tiles'"):
        kernel.solve(targets(), 1e-6, method="cg", rank=0, iterations=3)


def test_what_rounding_leaves_is_no_failure():
    """Condition 1e11: a relative residual of 1e-10 cannot be reached, and the backward error is that of rounding."""
    factor = np.random.default_rng(0).standard_normal((SIZE, 20))
    kernel = in_memory(factor @ factor.T, SIZE)
    found = kernel.solve(targets(), 1e-9, method="cg")
    norm = np.linalg.norm(factor, 2) ** 2 * np.linalg.norm(found.coefficients, axis=0)
    left = targets() - 1e-9 * found.coefficients - factor @ (factor.T @ found.coefficients)
    assert (np.linalg.norm(left, axis=0) < 1e-13 * norm).all()


def test_the_smallest_ridge_by_lanczos(tmp_path, monkeypatch):
    """Where the square is too large for its eigenvalues: a bound, on the safe side, that does."""
    monkeypatch.setattr(solvers, "DENSE_ROWS", 10)
    matrix = gram(SIZE, decay=2.0) - 1e-4 * np.eye(SIZE)
    kernel = on_disk(tmp_path, matrix, SIZE, 64)
    with pytest.raises(InputError, match="not positive definite") as refused:
        kernel.solve(targets(), 1e-6)
    told = float(str(refused.value).split("would do is ")[1].split(";")[0])
    smallest = np.linalg.eigvalsh(matrix)[0]
    assert -smallest <= told < -2 * smallest
    kernel.solve(targets(), told * 1.01)


def test_a_factorisation_takes_over_where_steps_take_longer(kernel, monkeypatch):
    cheap = dataclasses.replace(kernel.plan_solve(4).prices[0], seconds=1e-9)

    def dear(self, entries, count, ridge, real=ridge.SolveOptions.plan):
        plan = real(self, entries, count, ridge)
        chosen = next(price for price in plan.prices if price.method == "cg")
        return dataclasses.replace(plan, chosen=chosen, prices=(cheap, *plan.prices[1:]), fitting=(cheap, chosen))

    monkeypatch.setattr(ridge.SolveOptions, "plan", dear)
    found = kernel.solve(targets(), 1e-7, rank=1)
    assert found.method == "cholesky"
    assert error(found.coefficients, reference(kernel, targets(), 1e-7)) < 1e-8
    assert kernel.solve(targets(), 1e-7, rank=1, method="cg").method == "cg"


def test_an_indefinite_matrix_is_found(tmp_path):
    matrix = gram(SIZE) - 0.01 * np.eye(SIZE)
    kernel = on_disk(tmp_path, matrix, SIZE, 64)
    smallest = np.linalg.eigvalsh(matrix)[0]
    for method in METHODS:
        with pytest.raises(
            InputError, match=rf"smallest eigenvalue of K is {smallest:.3g}.*would do is 0.00"
        ) as refused:
            kernel.solve(targets(), 1e-5, method=method)
        told = float(str(refused.value).split("would do is ")[1].split(";")[0])
        assert told == pytest.approx(-smallest, rel=0.05)
        assert kernel.solve(targets(), 1.05 * told, method=method).residual < 1e-6


def test_a_singular_matrix_is_not_solved_by_rounding(tmp_path):
    """Rank 40: without a ridge there is no solution, even where a factorisation happens to pass."""
    random = np.random.default_rng(0)
    factor = random.standard_normal((SIZE, 40))
    kernel = on_disk(tmp_path, factor @ factor.T, SIZE, 64)
    for method in ("auto", "cholesky", "tiles"):
        with pytest.raises(InputError, match="not positive definite.*smallest ridge that would do is"):
            kernel.solve(targets(), 0.0, method=method)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tolerance": 0.0}, "tolerance is a relative residual between 0 and 1"),
        ({"tolerance": 2.0}, "tolerance is a relative residual"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"rank": -1}, "rank is a number of columns"),
        ({"method": "lu"}, "unknown method 'lu'"),
    ],
)
def test_bad_options(given, message, kernel):
    with pytest.raises(InputError, match=message):
        kernel.solve(targets(), 1.0, **given)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.full(SIZE, np.nan), "NaN or infinity, first in row 0"),
        (np.where(np.arange(SIZE) == 7, np.inf, 0.0), "first in row 7"),
        (np.ones((SIZE, 0)), "no columns"),
        (["a"] * SIZE, "y must be an array of numbers"),
        (np.ones(SIZE) * 1j, "y must be real"),
        (np.ones(SIZE - 1), f"y must have {SIZE} rows"),
    ],
)
def test_bad_targets(y, message, kernel):
    with pytest.raises(InputError, match=message):
        kernel.solve(y, 1.0)


@pytest.mark.parametrize("value", [-1.0, np.inf, np.nan, "1", None, True])
def test_bad_ridges(value, kernel):
    with pytest.raises(InputError, match="ridge must be"):
        kernel.solve(targets(), value)


# --- the preconditioner -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1, 63, 64, 65, SIZE, 2 * SIZE])
def test_a_partial_cholesky_factor_is_what_it_says(rank, kernel):
    found = pivoted_cholesky(kernel.entries, rank)
    square, size = dense(kernel), SIZE
    assert found.rank <= min(rank, size)
    assert found.columns >= found.rank
    vectors = found.basis @ found.rotation
    assert np.abs(vectors.T @ vectors - np.eye(found.rank)).max(initial=0.0) < 1e-12
    near = (vectors * found.values) @ vectors.T
    rest = square - near
    assert np.linalg.eigvalsh(rest)[0] > -1e-13, "what is left is positive"
    assert found.left == pytest.approx(np.trace(rest), abs=1e-12)
    x = targets()
    for power in (-1.0, -0.5, 0.5):
        values, axes = np.linalg.eigh(near + 0.1 * np.eye(size))
        wanted = (axes * values**power) @ axes.T @ x
        assert error(found.apply(x, 0.1, power), wanted) < 1e-11
    inverse = np.linalg.inv(near + 0.1 * np.eye(size))
    assert found.inverse_trace(0.1) == pytest.approx(np.trace(inverse), rel=1e-11)
    assert error(found.inverse_diagonal(0.1), inverse.diagonal()) < 1e-11


def test_columns_come_near_the_best_ones():
    """Within a small factor of the best approximation of that rank, in trace."""
    matrix = gram(400, decay=2.0)
    found = pivoted_cholesky(in_memory(matrix, 400).entries, 60)
    best = np.linalg.eigvalsh(matrix)[: 400 - 60].sum()
    assert found.rank == 60
    assert best <= found.left < 5 * best


def test_it_stops_where_more_pays_nothing(kernel):
    found = pivoted_cholesky(kernel.entries, SIZE, ridge=0.05)
    assert 0.5 * 0.01 * 0.05 * SIZE < found.left <= 0.01 * 0.05 * SIZE
    assert found.rank < SIZE
    factor = np.random.default_rng(0).standard_normal((SIZE, 5))
    assert pivoted_cholesky(in_memory(factor @ factor.T, SIZE).entries, SIZE).rank == 5
    assert pivoted_cholesky(in_memory(np.zeros((9, 9)), 9).entries, 4).rank == 0


def test_no_gram_matrix_has_no_such_diagonal():
    with pytest.raises(InputError, match="no Gram matrix"):
        pivoted_cholesky(in_memory(-np.eye(5), 5).entries, 2)


# --- the factor on disk -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edge", [32, 64, 96, 160, 1600])
def test_blocks_of_any_size(edge, kernel, tmp_path):
    y, told = targets(), []
    with TileCholesky(tmp_path, kernel.entries, edge) as factor:
        before = kernel.entries.bytes_read
        factor.factorise(1e-3, lambda done, total: told.append(done / total))
        read, written = factor.bytes_read, factor.bytes_written
        assert error(factor.solve(y), reference(kernel, y, 1e-3)) < 1e-9
        expected = tile_cholesky_traffic(SIZE, min(edge, 160))
        assert written == expected[1]
        assert read == expected[0]
        assert kernel.entries.bytes_read > before
        stored = ooc_ntk_zarr(factor.path)
        lower = np.tril(np.nan_to_num(stored))
        assert error(lower @ lower.T, dense(kernel) + 1e-3 * np.eye(SIZE)) < 1e-13
        assert factor.io_ratio > 0
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1.0)
    assert not list(tmp_path.iterdir()), "the factor is deleted"


def ooc_ntk_zarr(path):
    import zarr

    return zarr.open_array(path / "factor.zarr", mode="r")[:]


def test_what_a_killed_solution_left_is_swept(kernel, tmp_path):
    """Of processes of this machine that are gone; not of others, of living ones, or what somebody else put there."""
    mark = f"{tilecholesky.PREFIX}{platform.node()}"
    names = {
        "dead": f"{mark}-{2**22 + 1}-a",
        "alive": f"{mark}-{os.getpid()}-b",
        "elsewhere": f"{tilecholesky.PREFIX}elsewhere-{2**22 + 1}-c",
        "thesis": "cholesky-thesis",
    }
    for name in names.values():
        (tmp_path / name).mkdir()
        (tmp_path / name / "strip").write_text("x")
    with TileCholesky(tmp_path, kernel.entries, 64), TileCholesky(tmp_path, kernel.entries, 64) as second:
        second.factorise(1.0, lambda done, total: None)
        assert error(second.solve(targets()), reference(kernel, targets(), 1.0)) < 1e-9
    assert {path.name for path in tmp_path.iterdir()} == set(names.values()) - {names["dead"]}


def test_a_strip_that_is_damaged_or_cannot_be_written_stops_it(kernel, tmp_path, monkeypatch):
    with TileCholesky(tmp_path, kernel.entries, 64) as factor:
        factor.factorise(1e-3, lambda done, total: None)
        strip = next(factor.path.glob("factor.zarr/c/1/2"))
        data = bytearray(strip.read_bytes())
        data[11] ^= 4
        strip.write_bytes(bytes(data))
        with pytest.raises(StorageError, match="not what was committed"):
            factor.solve(targets())
    real = tilecholesky.os.write

    def full(file, data):
        if len(data) > 1000:
            raise OSError(28, "No space left on device")
        return real(file, data)

    monkeypatch.setattr(tilecholesky.os, "write", full)
    with pytest.raises(StorageError, match="the disk is full"):
        Given(kernel.entries, kernel.sample_diagonal(), tmp_path).solve(targets(), 1e-3, method="tiles")
    assert not list(tmp_path.iterdir())


def test_progress_is_told(kernel):
    for method, what in (("cholesky", "factorise"), ("tiles", "factorise"), ("cg", "iterate")):
        told = []
        kernel.solve(targets(), 1e-3, method=method, advance=lambda *each, told=told: told.append(each))
        assert told[-1][0] == what
        assert told[-1][1] == pytest.approx(told[-1][2], rel=0.3)
    assert ridge.describe(kernel.solve(targets(), 1e-3, method="cg")).startswith("cg, ")
