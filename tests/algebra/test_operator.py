"""Products with a kernel and its views: every source of entries against NumPy in float64."""

import numpy as np
import pytest
import scipy.sparse.linalg
from sklearn.preprocessing import KernelCenterer

import ooc_ntk
from ooc_ntk.algebra import products
from ooc_ntk.algebra.entries import FeatureEntries, TileEntries
from ooc_ntk.errors import DamagedFileError, InputError
from ooc_ntk.storage import local, stripes
from tests.algebra.stored import gram, in_memory, on_disk
from tests.cases import case

KINDS = {
    "exact": {},
    "float64": {"precision": "float64"},
    "cosine": {"normalize": "cosine"},
    "mean": {"scale": "mean"},
    "full": {"kernel": "full"},
    "projected": {"projection": "sjlt:64"},
    "features": {"projection": "sjlt:64"},
    "features, cosine": {"projection": "sjlt:64", "normalize": "cosine"},
    "features, mean": {"projection": "sjlt:64", "scale": "mean"},
    "features, full": {"projection": "sjlt:64", "kernel": "full"},
}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory, rates):
    """Kernels by name, computed when they are asked for, in tiles that do not divide 26 train and 7 test rows."""
    made = {}

    def get(name):
        if name not in made:
            job = case("smooth-mlp").job(**KINDS[name])
            how = ooc_ntk.Preferences(tile_samples=10, features_only=name.startswith("features"))
            plan = ooc_ntk.plan(job, ooc_ntk.Budget(host="16GiB", disk="1GiB"), preferences=how, rates=rates)
            made[name] = ooc_ntk.run(job, tmp_path_factory.mktemp("run") / "r", plan=plan, progress=False)
        return made[name]

    return get


def vectors(kernel, count=3):
    return np.random.default_rng(0).standard_normal((kernel.shape[1], count))


def dense(kernel):
    """A kernel's entries as its operator sees them, in float64: of features their products, unrounded."""
    entries, found = kernel.entries, np.full(kernel.shape, np.nan)
    for block in entries.blocks(range(kernel.shape[0])):
        found[block.rows.start : block.rows.stop, block.columns.start : block.columns.stop] = block.values
    assert np.isfinite(found).all()
    return found


def error(found, wanted):
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("name", KINDS)
def test_products_as_numpy_forms_them(name, kernels):
    kernel = kernels(name)
    entries, x = dense(kernel), vectors(kernel)
    size = kernel.shape[1]
    assert error(kernel[:].astype(np.float64), entries) < (1e-6 if name.startswith("features") else 1e-15)
    assert error(kernel.matmat(x), entries[:size] @ x) < 1e-13
    assert error(kernel.matmat(x, rows="test"), entries[size:] @ x) < 1e-13
    assert kernel.matmat(x[:, 0]).shape == (size,)
    assert kernel.matmat(x[:, :0]).shape == (size, 0)
    assert error(kernel.entries.diagonal(), entries.diagonal()) < 1e-13
    assert error(kernel.sample_diagonal()[:size], entries.diagonal()) < 1e-6
    some = np.array([kernel.shape[0] - 1, 0, 12, 5])
    assert error(kernel.entries.rows(some), entries[some]) < 1e-13
    assert isinstance(kernel.entries, FeatureEntries if name.startswith("features") else TileEntries)


@pytest.mark.parametrize("name", KINDS)
def test_views_are_what_scikit_learn_makes(name, kernels):
    kernel = kernels(name)
    size, x = kernel.shape[1], vectors(kernel)
    entries, norms = dense(kernel), kernel.sample_diagonal()
    cosines = entries / np.sqrt(norms[:, None] * norms[None, :size])
    centred = KernelCenterer().fit(entries[:size]).transform(entries)
    both = KernelCenterer().fit(cosines[:size]).transform(cosines)
    views = {"cosine": kernel.cosine(), "centred": kernel.centered(), "both": kernel.cosine().centered()}
    for view, wanted in zip(views.values(), (cosines, centred, both), strict=True):
        assert view.shape == kernel.shape
        assert error(np.asarray(view), wanted) < 1e-12
        assert error(dense(view), wanted) < 1e-12
        assert error(view.matmat(x), wanted[:size] @ x) < 1e-11
        assert error(view.matmat(x, rows="test"), wanted[size:] @ x) < 1e-11
        assert error(view.entries.diagonal(), wanted.diagonal()) < 1e-11
        assert error(view.sample_diagonal()[:size], wanted.diagonal()) < 1e-5
        assert error(view[[3, 0], 2:5], wanted[[3, 0], 2:5]) < 1e-11
        assert np.shape(view[-1]) == (size,)
    assert views["both"].centered() is views["both"]
    with pytest.raises(InputError, match="take the cosine first"):
        views["centred"].cosine()


def test_features_that_are_fewer_than_entries_are_multiplied_instead(kernels, monkeypatch):
    """A stored kernel of features: whatever reads less."""
    stored = kernels("projected")
    assert isinstance(stored.entries, TileEntries)
    again = ooc_ntk.open(stored.path)
    monkeypatch.setattr(FeatureEntries, "product_bytes", property(lambda _: 1))
    assert isinstance(again.entries, FeatureEntries)
    x = vectors(stored)
    assert error(again.matmat(x), stored.matmat(x)) < 1e-6


def test_scipy_takes_it_as_an_operator(kernels):
    kernel = kernels("float64")
    size, entries = kernel.shape[1], dense(kernels("float64"))
    operator = kernel.operator()
    assert (operator.shape, operator.dtype) == ((size, size), np.float64)
    x = vectors(kernel)
    assert error(operator @ x, entries[:size] @ x) < 1e-13
    assert error(operator.T @ x[:, 0], entries[:size] @ x[:, 0]) < 1e-13
    wanted = np.linalg.eigvalsh(entries[:size])[-3:]
    assert scipy.sparse.linalg.eigsh(operator, k=3, return_eigenvectors=False) == pytest.approx(wanted, rel=1e-10)
    y = x[:, 0]
    shifted = operator + scipy.sparse.linalg.aslinearoperator(np.eye(size))
    solved, failed = scipy.sparse.linalg.cg(shifted, y, rtol=1e-12)
    assert not failed
    assert error(solved, kernel.solve(y, 1.0).coefficients) < 1e-9
    below, z = kernel.operator("test"), np.random.default_rng(1).standard_normal((kernel.shape[0] - size, 2))
    assert below.shape == (kernel.shape[0] - size, size)
    assert error(below.H @ z, entries[size:].T @ z) < 1e-13
    assert error(below.T @ z[:, 0], entries[size:].T @ z[:, 0]) < 1e-13
    view = kernel.cosine().centered()
    assert error(view.operator("test").H @ z, dense(view)[size:].T @ z) < 1e-12


def test_dask_reads_the_same(kernels):
    kernel = kernels("exact")
    assert np.array_equal(kernel.dask().compute(), kernel[:])


@pytest.mark.parametrize("edge", [5, 7, 64])
@pytest.mark.parametrize("dtype", ["<f4", "<f8"])
def test_tiles_of_any_size_in_stripes_of_any_size(edge, dtype, tmp_path, monkeypatch):
    matrix, train = gram(40, 9), 40
    kernel = on_disk(tmp_path, matrix, train, edge, dtype)
    stored, x = matrix[:, :train].astype(dtype).astype(float), np.random.default_rng(0).standard_normal((train, 2))
    for at_once, scratch in ((1, 8), (500, 8 * 11), (2**20, 2**20)):
        monkeypatch.setattr(stripes, "STRIPE_BYTES", at_once)
        monkeypatch.setattr(products, "SCRATCH_BYTES", scratch)
        assert error(kernel.matmat(x), stored[:train] @ x) < 1e-13
        assert error(kernel.matmat(x, rows="test"), stored[train:] @ x) < 1e-13
        view = kernel.cosine().centered()
        assert error(view.matmat(x), dense(view)[:train] @ x) < 1e-12
        lower = np.full((train, train), np.nan)
        for block in kernel.entries.blocks(range(train), lower=True):
            rows, columns = block.rows, block.columns
            assert block.on_diagonal or columns.stop <= rows.start
            assert np.isnan(lower[rows.start : rows.stop, columns.start : columns.stop]).all(), "an entry came twice"
            lower[rows.start : rows.stop, columns.start : columns.stop] = block.values
        below = np.tril_indices(train)
        assert np.array_equal(lower[below], stored[:train][below])
        count = 0
        for block in kernel.entries.blocks(range(11, 33), columns=range(5, 29)):
            wanted = stored[block.rows.start : block.rows.stop, block.columns.start : block.columns.stop]
            assert np.array_equal(block.values, wanted)
            count += block.values.size
        assert count == 22 * 24


def test_a_pass_reads_the_lower_triangle_alone(tmp_path):
    kernel = on_disk(tmp_path, gram(40), 40, 10)
    kernel.matmat(np.ones(40))
    assert kernel.entries.bytes_read == 10 * 800  # of 16 tiles


def test_a_misread_tile_is_read_again_and_damage_is_refused(tmp_path, monkeypatch):
    kernel = on_disk(tmp_path, gram(40), 40, 10)
    x = np.ones(40)
    wanted, real, left = gram(40) @ x, local.read_at, [1]

    def misread(file, path, target, offset):
        count = real(file, path, target, offset)
        if left:
            left.pop()
            target[7] ^= 255
        return count

    monkeypatch.setattr(local, "read_at", misread)
    assert error(kernel.matmat(x), wanted) < 1e-13
    assert not left
    fresh = on_disk(tmp_path / "other", gram(40), 40, 10)
    path = tmp_path / "other" / "kernel.zarr" / "c" / "2" / "1"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DamagedFileError, match="not what was committed; run again"):
        fresh.matmat(x)


@pytest.mark.parametrize(
    ("x", "rows", "message"),
    [
        (np.ones(5), "train", "x must have 26 rows"),
        (np.ones((26, 1, 1)), "train", "x must have 26 rows"),
        (np.ones(26), "tests", "unknown rows 'tests'; did you mean 'test'"),
    ],
)
def test_bad_vectors(x, rows, message, kernels):
    with pytest.raises(InputError, match=message):
        kernels("exact").matmat(x, rows=rows)


def test_no_such_device(kernels):
    with pytest.raises(InputError, match="cannot multiply on device 'gpu': .*use cpu, cuda"):
        kernels("exact").matmat(np.ones(26), device="gpu")


def test_no_test_rows(tmp_path):
    with pytest.raises(InputError, match="no test rows; give test data"):
        in_memory(gram(5), 5).matmat(np.ones(5), rows="test")


@pytest.mark.gpu
def test_on_a_gpu(kernels):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    for name in KINDS:
        kernel = kernels(name)
        x = vectors(kernel)
        assert error(kernel.matmat(x, device="cuda"), kernel.matmat(x)) < 1e-12
