"""Spectra against NumPy in float64: every method, kind of kernel and view; ill-conditioned, degenerate, restarted."""

import warnings

import numpy as np
import pytest
import torch
from scipy.linalg import eigh as scipy_eigh

import ooc_ntk
from ooc_ntk.algebra import dense as dense_module
from ooc_ntk.algebra import eigen, krylov
from ooc_ntk.algebra.entries import ArrayEntries, FeatureEntries
from ooc_ntk.algebra.kernel import Kernel
from ooc_ntk.algebra.krylov import smallest_basis
from ooc_ntk.errors import BudgetError, InputError
from tests.cases import digits, smooth_mlp

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = 320


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("spectrum")


def run(folder, name, rates, samples=SAMPLES, tile=70, **options):
    images, labels = digits()
    job = ooc_ntk.Job(
        smooth_mlp().eval(),
        (images[:samples], labels[:samples]),
        images[samples : samples + 9],
        device="cpu",
        **options,
    )
    preferences = ooc_ntk.Preferences(tile_samples=tile, features_only=name == "features")
    budget = ooc_ntk.Budget(host="16GiB", device="16GiB", disk="1GiB")
    plan = ooc_ntk.plan(job, budget, preferences=preferences, rates=rates)
    return ooc_ntk.run(job, folder / name, plan=plan, progress=False)


@pytest.fixture(scope="module")
def kernels(folder, rates, frozen):
    torch.manual_seed(3)
    return {
        "exact": run(folder, "exact", rates, tile=80, by="layer"),
        "projected": run(folder, "projected", rates, projection="sjlt:1024"),
        "features": run(folder, "features", rates, projection="sjlt:512"),
        "full": run(folder, "full", rates, samples=32, tile=7, kernel="full"),
        "double": run(folder, "double", rates, precision="float64"),
    }


def square(kernel) -> np.ndarray:
    """The train square in float64: of features their product, which no rounding of entries disturbs."""
    if isinstance(kernel.entries, FeatureEntries):
        features = kernel.features
        rows = features.read(range(features.train_samples)).reshape(features.train_samples, -1).astype(np.float64)
        return rows @ rows.T / features.divisor
    size = kernel.shape[1]
    found = np.asarray(kernel, dtype=np.float64)[:size]
    return np.tril(found) + np.tril(found, -1).T


def synthetic(values, *, rows=0, seed=0) -> tuple[Kernel, np.ndarray]:
    """A kernel with a known spectrum, in memory."""
    size = len(values)
    vectors = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]
    matrix = (vectors * np.asarray(values, dtype=float)) @ vectors.T
    matrix = (matrix + matrix.T) / 2
    return Kernel.of_array("memory", matrix, matrix.diagonal().copy(), size, rows), matrix


def check(found, matrix: np.ndarray, tolerance: float = 1e-9) -> None:
    """Values, orthonormal vectors and honest residuals; small eigenvalues only as far as float64 tells them."""
    k = len(found.values)
    wanted = np.linalg.eigvalsh(matrix)[::-1][:k]
    scale = wanted[0] if matrix.any() else 1.0
    assert (np.abs(found.values - wanted) <= tolerance * np.abs(wanted) + 1e-13 * scale).all()
    assert (np.diff(found.values) <= 1e-14 * scale).all()
    np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(k), atol=1e-11)
    true = np.linalg.norm((matrix @ found.vectors - found.vectors * found.values) / scale, axis=0)
    np.testing.assert_allclose(found.residuals, true, atol=1e-12)
    assert found.converged
    assert found.trace == pytest.approx(np.trace(matrix), rel=1e-6)
    if matrix.any():
        assert found.explained == pytest.approx(found.values.sum() / np.trace(matrix), rel=1e-6)


@pytest.mark.parametrize("method", ["full", "krylov", "lobpcg"])
@pytest.mark.parametrize("name", ["exact", "projected", "features", "full", "double"])
def test_the_first_fifty_of_every_kind(name, method, kernels):
    kernel = kernels[name]
    found = kernel.eigh(50, method=method)
    check(found, square(kernel))
    assert (found.method, found.size, found.complete, len(found)) == (method, SAMPLES, False, 50)


@pytest.mark.parametrize("method", ["full", "krylov"])
@pytest.mark.parametrize("view", ["cosine", "centered", "both"])
@pytest.mark.parametrize("name", ["exact", "features"])
def test_views(name, view, method, kernels):
    kernel, matrix = kernels[name], square(kernels[name])
    seen = kernel if view == "centered" else kernel.cosine()
    if view != "centered":
        roots = np.sqrt(kernel.sample_diagonal()[:SAMPLES])
        matrix = matrix / roots[:, None] / roots
    if view != "cosine":
        seen = seen.centered()
        centring = np.eye(SAMPLES) - 1 / SAMPLES
        matrix = centring @ matrix @ centring
    check(seen.eigh(30, method=method), matrix)


def test_a_layer_answers_as_a_kernel_does(kernels):
    kernel = kernels["exact"]
    layer = kernel.layer(kernel.layers[0])
    matrix = square(layer)
    check(layer.eigh(20, method="krylov"), matrix)
    check(layer.centered().eigh(20), matrix - matrix.mean(0) - matrix.mean(1)[:, None] + matrix.mean())
    x = np.random.default_rng(0).normal(size=(SAMPLES, 3))
    np.testing.assert_allclose(layer.matmat(x), matrix @ x, rtol=1e-10, atol=1e-8)
    np.testing.assert_allclose(layer.matmat(x, rows="test"), np.asarray(layer, np.float64)[SAMPLES:] @ x, atol=1e-6)
    with pytest.raises(InputError, match="no cosines of a layer of a run with test rows"):
        layer.cosine()


def test_all_of_it_unpacks_as_values_and_vectors(kernels):
    kernel = kernels["exact"]
    values, vectors = kernel.eigh()
    matrix = square(kernel)
    np.testing.assert_allclose((vectors * values) @ vectors.T, matrix, atol=1e-11 * np.abs(matrix).max())
    found = kernel.eigh()
    check(found, matrix)
    assert (found.complete, found.method) == (True, "full")
    assert found.explained == pytest.approx(1.0)
    assert repr(found).startswith("<Spectrum 320 of 320 eigenpairs by full, 100.0% of the trace, ")


RANKS = np.arange(1, 401)

SPECTRA = {
    "inverse": RANKS**-1.0,
    "slow": RANKS**-0.5,
    "exponential": np.exp(-RANKS / 4.0),
    "ill-conditioned": 10.0 ** -np.linspace(0, 18, 400),
    "one outlier": np.append(1e6, RANKS[:-1] ** -1.5),
    "rank 20": np.append(np.linspace(2, 1, 20), np.zeros(380)),
    "rank 55": np.append(np.linspace(2, 1, 55), np.zeros(345)),
    "identity": np.ones(400),
    "multiple": np.append(np.full(70, 5.0), RANKS[:330] ** -1.0),
    "pairs": np.repeat(RANKS[:200] ** -1.0, 2),
    "zero": np.zeros(400),
    "tiny": 1e-200 * RANKS**-1.0,
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("method", ["full", "krylov", "lobpcg", "restarted"])
def test_spectra_that_are_hard(name, method):
    kernel, matrix = synthetic(SPECTRA[name])
    memory = None
    if method == "restarted":
        least = smallest_basis(400, 50)
        memory = krylov.basis_bytes(400, 50, least) + kernel.entries.buffer_bytes
    found = kernel.eigh(50, method="krylov" if method == "restarted" else method, memory=memory)
    check(found, matrix)


@pytest.mark.parametrize("size", [1, 2, 3, 11, 30, 61])
@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_small_kernels_by_blocks(size, share):
    """Blocks that are wider than what is left, up to a basis of everything."""
    kernel, matrix = synthetic(np.linspace(3, 1, size))
    k = max(1, int(share * size))
    check(kernel.eigh(k, method="krylov"), matrix)


def test_restarts_keep_the_memory_and_find_the_same(kernels, monkeypatch):
    kernel = kernels["exact"]
    restarts = []
    restart = krylov._Basis.restart
    monkeypatch.setattr(krylov._Basis, "restart", lambda self, keep: restarts.append(keep) or restart(self, keep))
    columns = smallest_basis(SAMPLES, 50)
    memory = krylov.basis_bytes(SAMPLES, 50, columns) + kernel.entries.buffer_bytes
    found = kernel.eigh(50, method="krylov", memory=memory)
    assert len(restarts) >= 3
    check(found, square(kernel))
    assert found.passes > kernel.eigh(50, method="krylov").passes


def test_more_than_the_largest_block(monkeypatch):
    monkeypatch.setattr(krylov, "LARGEST_BLOCK", 16)
    kernel, matrix = synthetic(RANKS**-1.0)
    check(kernel.eigh(90, method="krylov"), matrix)
    with pytest.raises(BudgetError, match=r"90 eigenpairs of 400 rows, a basis of 122 vectors, needs"):
        kernel.eigh(90, method="krylov", memory=krylov.basis_bytes(400, 90, 100) + kernel.entries.buffer_bytes)


def test_every_step_is_one_pass_for_the_whole_block(kernels):
    kernel = kernels["exact"]
    told = []
    before = kernel.entries.bytes_read
    found = kernel.eigh(50, method="krylov", advance=told.append)
    passes = (kernel.entries.bytes_read - before) / (10 * 80 * 80 * 4)  # 10 tiles on and below the diagonal
    assert found.passes == len(told) == round(passes) == told[-1].passes
    assert found.passes <= 12
    assert told[-1].converged == told[-1].wanted == 50
    assert told[-1].residual <= 1
    assert told[0].converged < 50


def test_the_seed_decides(kernels):
    kernel = kernels["exact"]
    first, again, other = (kernel.eigh(10, method="krylov", seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first.vectors, again.vectors)
    assert not np.array_equal(first.vectors, other.vectors)
    np.testing.assert_allclose(first.values, other.values, rtol=1e-12)


def test_auto_is_full_where_it_is_small_and_fits(kernels, monkeypatch):
    kernel = kernels["exact"]
    assert kernel.eigh(5).method == "full"
    monkeypatch.setattr(eigen, "SMALL", 100)
    assert kernel.eigh(5).method == "krylov"
    assert kernel.eigh(100).method == "full"  # much of it
    monkeypatch.setattr(eigen, "SMALL", 10_000)
    least = krylov.basis_bytes(SAMPLES, 5, smallest_basis(SAMPLES, 5)) + kernel.entries.buffer_bytes
    assert kernel.eigh(5, memory=least).method == "krylov"


@pytest.mark.parametrize(
    ("k", "options", "message"),
    [
        (0, {}, "k must be a whole number from 1 to 320, the rows of the train square, got 0"),
        (321, {}, "from 1 to 320.*got 321"),
        (2.5, {}, "got 2.5"),
        (True, {}, "got True"),
        (None, {"method": "krylov"}, "method 'krylov' finds leading eigenpairs; say how many: k=50"),
        (5, {"method": "krilov"}, "unknown method 'krilov'; did you mean 'krylov'"),
        (5, {"tolerance": 0.0}, "tolerance must be above 0 and below 1.*got 0.0"),
        (5, {"tolerance": float("nan")}, "tolerance must be above 0"),
        (80, {"method": "lobpcg"}, "LOBPCG finds at most one in 5 of the eigenpairs, 64 of 320, got k=80"),
        (5, {"memory": "much"}, "cannot read 'much' as a size"),
    ],
    ids=str,
)
def test_bad_input(k, options, message, kernels):
    with pytest.raises(InputError, match=message):
        kernels["exact"].eigh(k, **options)


def test_what_does_not_fit_says_what_would(kernels, monkeypatch):
    kernel = kernels["exact"]
    with pytest.raises(
        BudgetError, match=r"320 × 320 numbers, needs .*1.0 MiB were allowed: ask for the leading .*k=50"
    ):
        kernel.eigh(memory="1MiB")
    with pytest.raises(BudgetError, match="use method='krylov'"):
        kernel.eigh(9, method="full", memory="1MiB")
    with pytest.raises(BudgetError, match=r"a basis of .* vectors, needs .*; 300 KiB were allowed"):
        kernel.eigh(9, memory="300KiB")
    for memory in (1, "200KiB"):
        with pytest.raises(
            BudgetError, match=r"LOBPCG of 9 eigenpairs of 320 rows needs .*; (1 B|200 KiB) were allowed"
        ):
            kernel.eigh(9, method="lobpcg", memory=memory)
    monkeypatch.setattr(dense_module, "free_host_bytes", lambda: 1000)
    with pytest.raises(BudgetError, match="800 B are free to use"):
        kernel.eigh()


@pytest.mark.parametrize("method", ["krylov", "lobpcg"])
def test_too_few_passes_are_a_warning_that_says_how_far_it_got(method, monkeypatch):
    monkeypatch.setattr(eigen, "MAX_PASSES", 3)
    kernel, matrix = synthetic(SPECTRA["slow"])
    with pytest.warns(RuntimeWarning, match=r"of 50 eigenpairs are not within the tolerance of 1e-08 after \d+ passes"):
        found = kernel.eigh(50, method=method)
    assert not found.converged
    assert 0 <= found.within_tolerance < 50
    true = np.linalg.norm(matrix @ found.vectors - found.vectors * found.values, axis=0)
    np.testing.assert_allclose(found.residuals * found.values[0], true, atol=1e-12)
    # A value is no further from a true one than its residual.
    every = np.linalg.eigvalsh(matrix)
    assert (np.abs(found.values[:, None] - every).min(1) <= true + 1e-14).all()


def test_a_looser_tolerance_takes_fewer_passes():
    kernel, _ = synthetic(SPECTRA["inverse"])
    loose, tight = (kernel.eigh(50, method="krylov", tolerance=each) for each in (1e-2, 1e-10))
    assert loose.passes < tight.passes
    assert loose.residuals.max() > tight.residuals.max()


def test_indefinite_squares_come_out_as_they_are():
    """Entries that are rounded may make a kernel indefinite; the leading values are still the largest ones."""
    kernel, matrix = synthetic(np.append(RANKS[:390] ** -1.0, np.full(10, -1e-7)))
    check(kernel.eigh(20, method="krylov"), matrix)
    assert kernel.eigh().values[-1] == pytest.approx(-1e-7, rel=1e-6)


def test_full_by_either_driver(monkeypatch):
    kernel, matrix = synthetic(SPECTRA["inverse"])
    for share in (0.0, 2.0):  # all by divide and conquer; some by MRRR
        monkeypatch.setattr(eigen, "EVERY_SHARE", share)
        check(kernel.eigh(60, method="full"), matrix)
        check(kernel.eigh(), matrix)


def exact_law(alpha, size=400):
    return synthetic(RANKS[:size] ** -alpha)[0]


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.3])
def test_the_decay_of_a_power_law(alpha):
    found = exact_law(alpha).eigh().decay()
    assert found.value == pytest.approx(alpha, abs=1e-8)
    assert found.error < 1e-8
    assert found.r2 == pytest.approx(1.0)
    assert found.window == (11, 100)
    assert found.scale == pytest.approx(1.0)
    np.testing.assert_allclose(found.at(np.array([1, 10])), [1, 10**-alpha], rtol=1e-6)


def test_the_decay_and_its_error_are_those_of_least_squares():
    from scipy.stats import linregress

    noise = np.exp(0.1 * np.random.default_rng(0).normal(size=400))
    spectrum = synthetic(np.sort(RANKS**-1.2 * noise)[::-1])[0].eigh(80)
    found = spectrum.decay((5, 60))
    wanted = linregress(np.log(np.arange(5, 61)), np.log(spectrum.values[4:60]))
    assert found.value == pytest.approx(-wanted.slope)
    assert found.error == pytest.approx(wanted.stderr)
    assert found.r2 == pytest.approx(wanted.rvalue**2)
    assert found.window == (5, 60)


def test_a_fit_leaves_out_what_is_rounding():
    values = np.append(RANKS[:60] ** -1.0, np.full(340, 1e-17))
    assert synthetic(values)[0].eigh(200).decay().window == (7, 60)


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ((0, 10), r"from 1 to 50, the first one smaller, got \(0, 10\)"),
        ((10, 51), "from 1 to 50"),
        ((10, 10), "the first one smaller"),
        ((10, 11), "needs 3 ranks at least, got 2"),
        ((10,), "a window is its first and its last rank"),
        (7, "a window is its first and its last rank"),
    ],
    ids=str,
)
def test_bad_windows(window, message):
    with pytest.raises(InputError, match=message):
        exact_law(1.0).eigh(50).decay(window)


def test_too_few_eigenvalues_for_a_law():
    with pytest.raises(InputError, match="needs 3 ranks at least, got 2 that are above rounding"):
        exact_law(1.0).eigh(2).decay()
    with pytest.raises(
        InputError, match=r"a power law of the eigenvalues ends before rank \d+, where it is not positive"
    ):
        synthetic(SPECTRA["rank 20"])[0].eigh(method="full").decay((10, 400))


def test_alignment_is_the_energy_along_eigenvectors(kernels):
    kernel, y = kernels["exact"], np.random.default_rng(0).normal(size=(SAMPLES, 3))
    _, vectors = scipy_eigh(square(kernel))
    wanted = ((vectors[:, ::-1].T @ y) ** 2).sum(1) / (y**2).sum()
    whole, part = kernel.eigh().alignment(y), kernel.eigh(40).alignment(y)
    np.testing.assert_allclose(whole.shares[:100], wanted[:100], atol=1e-8)
    np.testing.assert_allclose(part.shares, wanted[:40], atol=1e-10)
    assert whole.cumulative[-1] == pytest.approx(1.0)
    np.testing.assert_allclose(whole.tail, np.append(np.cumsum(whole.shares[::-1])[::-1][1:], 0.0), atol=1e-14)
    np.testing.assert_allclose(part.tail, whole.tail[:40], atol=1e-10)
    one = kernel.eigh(40).alignment(y[:, 0])
    np.testing.assert_allclose(one.shares, (vectors[:, ::-1].T[:40] @ y[:, 0]) ** 2 / (y[:, 0] ** 2).sum(), atol=1e-10)


@pytest.mark.parametrize("k", [None, 120])
def test_the_target_exponent_of_a_power_law(k):
    """Energy ``i^−β − (i+1)^−β`` along eigenvector i, and the rest along the last, leaves ``(i+1)^−β`` beyond it."""
    beta = 0.7
    spectrum = exact_law(1.4).eigh(k)
    whole = exact_law(1.4).eigh()
    energy = RANKS**-beta - (RANKS + 1.0) ** -beta
    energy[-1] = RANKS[-1] ** -beta
    y = whole.vectors @ np.sqrt(energy)
    tail = (np.arange(5, 91) + 1.0) ** -beta
    slope = np.polyfit(np.log(np.arange(5, 91)), np.log(tail), 1)[0]
    assert spectrum.target_exponent(y, (5, 90)).value == pytest.approx(-slope, rel=1e-6)


def test_a_target_that_ends_is_fitted_to_where_it_ends():
    spectrum = exact_law(1.0).eigh(100)
    y = spectrum.vectors[:, :40] @ np.ones(40)
    first, last = spectrum.target_exponent(y).window
    assert (first, last) == (4, 39)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.ones(321), r"y must have 320 rows.*got shape \(321,\)"),
        (np.ones((320, 1, 1)), "must have 320 rows"),
        (np.zeros(320), "y is zero everywhere"),
        (np.full(320, np.inf), "y holds NaN or infinity"),
    ],
    ids=["long", "deep", "zero", "infinite"],
)
def test_bad_targets(y, message, kernels):
    spectrum = kernels["exact"].eigh(5)
    for ask in (spectrum.alignment, spectrum.target_exponent):
        with pytest.raises(InputError, match=message):
            ask(y)


@pytest.mark.parametrize("name", ["inverse", "slow", "one outlier", "rank 55", "identity", "pairs"])
@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 1.0, 100.0])
def test_the_effective_dimension_and_its_bounds(name, ridge):
    kernel, matrix = synthetic(SPECTRA[name])
    wanted = np.trace(np.linalg.solve(matrix + ridge * np.eye(400), matrix))
    lower, upper = kernel.eigh().effective_dimension(ridge)
    assert lower == upper == pytest.approx(wanted, rel=1e-6)
    part = kernel.eigh(60, method="full")
    bounds = part.effective_dimension(ridge)
    assert bounds.lower <= wanted * (1 + 1e-6)
    assert wanted <= bounds.upper * (1 + 1e-6)
    known = (part.values.clip(0) / (part.values.clip(0) + ridge)).sum()
    rest, last = part.trace - part.values.sum(), part.values[-1]
    assert known <= bounds.lower
    assert bounds.upper <= known + min(max(rest, 0) / ridge, 340 * last / (last + ridge)) * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize("ridge", [0.0, -1.0, np.nan, np.inf])
def test_a_ridge_must_be_positive(ridge):
    with pytest.raises(InputError, match="must be above 0, got"):
        exact_law(1.0).eigh(5).effective_dimension(ridge)


def test_nothing_warns_without_reason(kernels):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels["exact"].eigh(20, method="lobpcg")


def test_of_an_array_in_memory():
    entries = ArrayEntries(np.eye(3))
    assert eigen.fits_whole(entries)
    assert not eigen.fits_whole(entries, 10)
