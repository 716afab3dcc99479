"""Features as a kernel: indexing, error bars, two runs together, attribution, and files of other programs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import zarr
from torch import nn

import ooc_ntk
from ooc_ntk.algebra import attribution as attribution_module
from ooc_ntk.algebra import features as features_module
from ooc_ntk.algebra.errors import Panel, SketchShape, moments
from ooc_ntk.algebra.features import Features
from ooc_ntk.algebra.kernel import Kernel
from ooc_ntk.errors import BudgetError, InputError, RunConflictError, StorageError
from tests import oracle
from tests.cases import TEST, TRAIN, case

#: Entries of the same features, in float32.
CLOSE = 1e-6

SAMPLES, OUTPUTS, DIM = 19, 3, 48
COLUMNS = 13

#: name: (options of Features, kernel and normalisation of the oracle, divisor).
VARIANTS = {
    "trace": ({}, "trace", None, 1),
    "full": ({"full": True}, "full", None, 1),
    "trace mean": ({"divisor": 3.0}, "trace", None, 3),
    "full mean": ({"full": True, "divisor": 3.0}, "full", None, 3),
    "trace cosine": ({"cosine": True}, "trace", "cosine", 1),
    "full cosine": ({"full": True, "cosine": True, "divisor": 3.0}, "full", "cosine", 1),
}

variants = pytest.mark.parametrize("variant", VARIANTS)


def numbers(dtype=np.float64) -> np.ndarray:
    """(samples, outputs, dim)."""
    return np.random.default_rng(0).standard_normal((SAMPLES, OUTPUTS, DIM)).astype(dtype)


def made(variant: str, dtype=np.float64, **more) -> tuple[Features, np.ndarray]:
    """Features of a variant, and the kernel that they stand for."""
    options, kind, normalize, divisor = VARIANTS[variant]
    rows = numbers(dtype)
    features = Features(
        array=rows.reshape(-1, DIM),
        outputs=OUTPUTS,
        train_samples=COLUMNS,
        test_samples=SAMPLES - COLUMNS,
        shape=SketchShape(DIM),
        **{**options, **more},
    )
    return features, oracle.kernel(rows.astype(np.float64), COLUMNS, kind, normalize=normalize) / divisor


# --- indexing --------------------------------------------------------------------------------------------------------

INDICES = [
    np.s_[3],
    np.s_[-1],
    np.s_[2, 5],
    np.s_[-2, -3],
    np.s_[4:12],
    np.s_[:, 7],
    np.s_[9:11, 2:6],
    np.s_[::3, 1::4],
    np.s_[::-1, ::-2],
    np.s_[15:2:-4],
    np.s_[-5:],
    np.s_[-300:300, 4:-3],
    np.s_[...],
    np.s_[..., 2],
    np.s_[2, ...],
    np.s_[1, 2, ...],
    np.s_[5:5],
    np.s_[np.int64(3), np.int32(2)],
    np.s_[:],
]


@pytest.mark.parametrize("panel_bytes", [None, 8 * OUTPUTS * DIM * 4], ids=["at once", "four samples at a time"])
@variants
def test_slices_and_integers_as_in_numpy(variant, panel_bytes, monkeypatch):
    if panel_bytes:
        monkeypatch.setattr(features_module, "PANEL_BYTES", panel_bytes)
    features, entries = made(variant)
    product = features.kernel()
    assert (product.shape, product.ndim, len(product), product.dtype) == (entries.shape, 2, len(entries), np.float64)
    assert product.shape == features.kernel_shape
    for index in INDICES:
        found, wanted = product[index], entries[index]
        assert np.shape(found) == np.shape(wanted), index
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-10, err_msg=str(index))


@variants
def test_lists_and_masks_along_both_axes(variant):
    features, entries = made(variant)
    product, mask = features.kernel(), np.arange(len(entries)) % 4 == 1
    columns = np.arange(entries.shape[1]) % 3 == 2
    for found, wanted in (
        (product[[0, 12, 5, 5]], entries[[0, 12, 5, 5]]),
        (product[[1, 11], [2, 3, -1]], entries[np.ix_([1, 11], [2, 3, -1])]),
        (product[np.array([1, -2]), 4:9], entries[[1, -2], 4:9]),
        (product[mask], entries[mask]),
        (product[mask, columns], entries[np.ix_(mask, columns)]),
        (product[list(mask), 3], entries[mask, 3]),
        (product[[], :], entries[[], :]),
        (product[4, [2, 0]], entries[4, [2, 0]]),
        (product.oindex[[3, 1], ::2], entries[[3, 1], ::2]),
    ):
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-10)


def test_float32_features_give_float32_entries_summed_in_float64(monkeypatch):
    monkeypatch.setattr(features_module, "SUMMED_COLUMNS", 7)
    features, entries = made("trace", np.float32)
    product = features.kernel()
    assert product.dtype == np.float32
    assert oracle.error(product[:], entries) <= CLOSE


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (19, "19 is out of range"),
        (-20, "-20 is out of range"),
        (np.s_[:, 13], "13 is out of range"),
        (np.s_[0, -14], "-14 is out of range"),
        (([0, 40],), "40 is out of range"),
        (([-40, 3],), "-40 is out of range"),
        (np.s_[0, 0, 0], "two axes"),
        (1.5, "whole numbers"),
        (None, "whole numbers"),
        (np.ones(5, dtype=bool), "19 entries"),
        (np.s_[:, np.ones(19, dtype=bool)], "13 entries"),
    ],
    ids=str,
)
def test_an_index_that_does_not_fit_is_refused(index, message):
    product = made("trace")[0].kernel()
    with pytest.raises(IndexError, match=message):
        product[index]


def test_a_sample_without_gradient_has_cosine_zero():
    rows = numbers()
    rows[4] = 0
    features = dataclasses.replace(made("trace cosine")[0], array=rows.reshape(-1, DIM))
    entries = features.kernel()[:]
    assert np.isfinite(entries).all()
    assert (entries[4] == 0).all()
    assert (entries[:, 4] == 0).all()
    assert (features.errors(np.arange(SAMPLES), np.arange(COLUMNS))[4] == 0).all()


def test_more_than_the_free_memory_is_refused(monkeypatch):
    features, _ = made("trace")
    monkeypatch.setattr(features_module, "free_host_bytes", lambda: 60_000)
    assert features.kernel()[3:5, :2].shape == (2, 2)
    with pytest.raises(BudgetError, match=r"19 samples need .* free to use; ask for fewer rows"):
        features.read(range(SAMPLES))


@variants
def test_the_diagonal_is_that_before_normalisation(variant, monkeypatch):
    monkeypatch.setattr(features_module, "PANEL_BYTES", 8 * OUTPUTS * DIM * 5)
    features, _ = made(variant)
    norms = np.square(numbers()).sum(2)
    wanted = (norms.reshape(-1) if features.full else norms.sum(1)) / features.divisor
    np.testing.assert_allclose(features.diagonal(), wanted, rtol=1e-12)


# --- error bars ------------------------------------------------------------------------------------------------------


def everything(features: Features) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = features.kernel_shape
    return np.arange(rows), np.arange(columns)


def by_formula(rows: np.ndarray) -> np.ndarray:
    """``SE_ij² = (⟨F_ii, F_jj⟩ + tr F_ij²)/K``, entry by entry."""
    blocks = np.einsum("icp,jdp->ijcd", rows, rows)
    found = np.empty(blocks.shape[:2])
    for i in range(len(rows)):
        for j in range(len(rows)):
            found[i, j] = (blocks[i, i] * blocks[j, j]).sum() + np.trace(blocks[i, j] @ blocks[i, j])
    return np.sqrt(found / rows.shape[2])


@pytest.mark.parametrize("panel_bytes", [2**27, 3000])
@pytest.mark.parametrize("variant", ["trace", "full", "trace mean", "full mean"])
def test_errors_are_those_of_the_formula(variant, panel_bytes, monkeypatch):
    monkeypatch.setattr(features_module, "PANEL_BYTES", panel_bytes)
    features, _ = made(variant)
    rows = numbers().reshape(-1, 1, DIM) if features.full else numbers()
    wanted = by_formula(rows)[:, : features.kernel_shape[1]] / features.divisor
    np.testing.assert_allclose(features.errors(*everything(features)), wanted, rtol=1e-10)


@pytest.mark.parametrize("variant", ["trace cosine", "full cosine"])
def test_errors_of_a_cosine(variant):
    features, entries = made(variant)
    found = features.errors(*everything(features))
    square = found[: found.shape[1]]
    np.testing.assert_allclose(square.diagonal(), 0, atol=1e-7)
    np.testing.assert_allclose(square, square.T, rtol=1e-8, atol=1e-9)
    if features.full:  # one row each: the known (1 − ρ²)/√K
        np.testing.assert_allclose(found, (1 - entries**2) / DIM**0.5, rtol=1e-8, atol=1e-8)
    off = ~np.eye(len(square), dtype=bool)
    assert (square[off] > 0).all()


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def computed(memory_folder, rates):
    """``computed(job, features_only=False)``: a run, made once for each name."""
    budget, known = ooc_ntk.Budget(host="16GiB", device="16GiB", disk="1GiB"), {}

    def compute(name: str, job: ooc_ntk.Job | None = None, features_only: bool = False) -> Kernel:
        if name not in known:
            preferences = ooc_ntk.Preferences(tile_samples=10, features_only=features_only)
            plan = ooc_ntk.plan(job, budget, preferences=preferences, rates=rates)
            known[name] = ooc_ntk.run(job, memory_folder / name.replace(" ", "-"), plan=plan, progress=False)
        return known[name]

    return compute


def projected(kind: str = "sjlt", dim: int = 160, seed: int = 0, **more) -> ooc_ntk.Projection:
    return ooc_ntk.Projection(kind, dim, seed, **more)


RUNS = {
    "trace": {"projection": projected()},
    "full": {"projection": projected("gaussian"), "kernel": "full"},
    "mean": {"projection": projected(), "scale": "mean"},
    "cosine": {"projection": projected("shift"), "normalize": "cosine"},
    "cosine of a tensor sketch": {"projection": projected("tensorsketch"), "normalize": "cosine", "scale": "mean"},
    "tensor sketch": {"projection": projected("tensorsketch")},
}


@pytest.fixture(params=RUNS)
def run(request, computed) -> Kernel:
    return computed(request.param, case("attention").job(**RUNS[request.param]))


def test_errors_by_numbers_slices_and_lists(run):
    rows, columns = run.shape
    every = run.errors()
    assert every.shape == (rows, columns)
    assert every.dtype == np.float64
    assert np.isfinite(every).all()
    assert (every >= 0).all()
    for part, index in (
        ((3,), np.s_[[3], :]),
        ((-1, 2), np.s_[-1:, 2:3]),
        ((slice(4, 20, 3), slice(None, None, -2)), np.s_[4:20:3, ::-2]),
        (([5, 1, 1], [0, 9]), np.ix_([5, 1, 1], [0, 9])),
        ((np.arange(rows) % 7 == 2,), np.s_[np.arange(rows) % 7 == 2]),
    ):
        found = run.errors(*part)
        assert found.shape == every[index].shape
        # The error of an entry that is 1 by normalising is what is left of a difference.
        np.testing.assert_allclose(found, every[index], rtol=1e-6, atol=1e-7 * every.max())
    with pytest.raises(IndexError, match="out of range"):
        run.errors(rows)


def test_errors_are_symmetric_and_vanish_where_nothing_is_estimated(run):
    square = run.errors()[: run.shape[1]]
    np.testing.assert_allclose(square, square.T, rtol=1e-6, atol=1e-7 * square.max())
    if run.plan.normalize == "cosine":
        assert square.diagonal().max() <= 1e-6
        assert square.max() < 1
    else:
        assert square.min() > 0


def test_errors_of_a_mean_are_those_of_the_sum_divided(computed):
    total, mean = (computed(name, case("attention").job(**RUNS[name])) for name in ("trace", "mean"))
    assert mean.plan.outputs == 4
    np.testing.assert_allclose(mean.errors(), total.errors() / 4, rtol=1e-6)
    assert mean.expected_error() == pytest.approx(total.expected_error(), rel=1e-6)


def test_errors_hold_the_exact_entries(run):
    """Errors of one R go together, so that not 95% of each run's entries are within two; none are far outside."""
    plan = run.plan
    kind = "full" if plan.kernel == "full" else "trace"
    exact = oracle.kernel(oracle.case_jacobian("attention"), TRAIN, kind, plan.scale, plan.normalize)
    off = np.abs(np.asarray(run, dtype=np.float64) - exact)
    errors = run.errors()
    estimated = errors > 1e-6 * errors.max()
    ratio = off[estimated] / errors[estimated]
    assert 0.3 < np.sqrt(np.mean(np.square(ratio))) < 2.5
    assert ratio.max() < 7


def test_an_exact_kernel_has_no_features_and_no_errors(computed):
    exact = computed("exact", case("smooth-mlp").job())
    for ask in (
        lambda: exact.features,
        lambda: exact.errors(),
        lambda: exact.errors(3, [1]),
        lambda: exact.expected_error(),
        lambda: exact.attribution(1.0),
        lambda: ooc_ntk.open_features(exact.path),
    ):
        with pytest.raises(InputError, match=r"exact kernel: it has no projection.*--projection sjlt:4096"):
            ask()


# --- two runs together -----------------------------------------------------------------------------------------------


def halves(computed, name: str, **options) -> tuple[Kernel, Kernel, Kernel]:
    """A joint run, one of its train samples alone, and one of its test samples alone."""
    chosen = case("smooth-mlp")
    alone = chosen.job(test=False, **options)
    return (
        computed(f"{name} joint", chosen.job(**options)),
        computed(f"{name} train", alone),
        computed(
            f"{name} test", dataclasses.replace(alone, train=(chosen.test, chosen.test_labels)), features_only=True
        ),
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("trace", {"projection": projected()}),
        ("full mean", {"projection": projected("rademacher"), "kernel": "full", "scale": "mean"}),
        ("cosine", {"projection": projected("shift", seed=3), "normalize": "cosine"}),
        ("tensor", {"projection": projected("tensorsketch"), "kernel": "pseudo"}),
    ],
)
def test_two_runs_give_the_kernel_of_a_joint_one(name, options, computed):
    joint, train, test = halves(computed, name, **options)
    found = test.features.cross(train.features)
    split = joint.shape[1]
    assert found.shape == (joint.shape[0] - split, split)
    assert oracle.error(found[:], np.asarray(joint, dtype=np.float64)[split:]) <= CLOSE
    assert oracle.error(found[2, 4:9], np.asarray(joint, dtype=np.float64)[split + 2, 4:9]) <= CLOSE
    square = train.features.cross(train.features)
    assert oracle.error(square[:], np.asarray(joint, dtype=np.float64)[:split]) <= CLOSE


def test_features_of_another_projection_are_refused(computed):
    chosen = case("smooth-mlp")
    base = computed("trace train", chosen.job(test=False, projection=projected()))
    other_model = nn.Sequential(*chosen.module)
    other_model = type(other_model)(*(nn.Linear(64, 24) if n == 1 else m for n, m in enumerate(other_model))).eval()
    others = {
        "seed": {"projection": projected(seed=1)},
        "dim": {"projection": projected(dim=164)},
        "kind": {"projection": projected("shift")},
        "nonzeros": {"projection": projected(nonzeros=8)},
        "parameters": {"projection": projected(), "parameters": "!5.bias"},
        "kernel": {"projection": projected(), "kernel": "full"},
        "row of pseudo": {"projection": projected(), "kernel": "pseudo"},
        "outputs": {"projection": projected(), "outputs": "margin"},
    }
    jobs = {name: chosen.job(test=False, **options) for name, options in others.items()}
    jobs["model"] = dataclasses.replace(chosen.job(test=False, projection=projected()), model=other_model)
    for name, job in jobs.items():
        other = computed(f"other {name}", job, features_only=True)
        for one, two in ((base, other), (other, base)):
            with pytest.raises(RunConflictError, match=r"not features of one projection.*same settings"):
                one.features.cross(two.features)


def test_features_that_say_nothing_of_their_projection_are_refused():
    features, _ = made("trace")
    with pytest.raises(RunConflictError, match="unknown, 48 columns"):
        features.cross(features)


# --- attribution -----------------------------------------------------------------------------------------------------


def scores(rows: np.ndarray, train: int, ridge: float) -> np.ndarray:
    """``Σ_c φ_ic (ΦᵀΦ + λ·I)⁻¹ φ_jc`` by NumPy."""
    flat = rows[:train].reshape(-1, rows.shape[2])
    inverse = np.linalg.inv(flat.T @ flat + ridge * np.eye(rows.shape[2]))
    return np.einsum("icp,pq,jcq->ij", rows, inverse, rows[:train], optimize=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("panel_samples", [1, 3, 100])
@pytest.mark.parametrize("tile", [4, 7, 1024])
def test_attribution_is_that_of_the_formula(tile, panel_samples, dtype, monkeypatch, tmp_path):
    monkeypatch.setattr(attribution_module, "TILE", tile)
    monkeypatch.setattr(features_module, "PANEL_BYTES", 8 * OUTPUTS * DIM * panel_samples)
    features, _ = made("trace", dtype)
    kernel = Kernel.of_features(tmp_path, features)
    found = kernel.attribution(2.5, tmp_path / "scores")
    assert found.shape == (SAMPLES, COLUMNS)
    assert found.dtype == np.float32
    assert oracle.error(found[:], scores(numbers(dtype).astype(np.float64), COLUMNS, 2.5)) <= CLOSE
    plain = zarr.open_array(tmp_path / "scores", mode="r")
    assert plain.chunks == (tile, tile)
    assert plain.attrs["ridge"] == 2.5
    assert not [path for path in tmp_path.rglob("*") if ".tmp" in path.name]


@pytest.mark.parametrize("outputs", [1, 5])
def test_attribution_of_one_and_of_many_outputs(outputs, tmp_path):
    rows = np.random.default_rng(1).standard_normal((30, outputs, 12))
    features = Features(rows.reshape(-1, 12), outputs, 24, 6, SketchShape(12))
    found = Kernel.of_features(tmp_path, features).attribution(0, tmp_path / "scores")
    assert oracle.error(found[:], scores(rows, 24, 0)) <= CLOSE


def test_attribution_of_a_run_lies_in_its_folder_and_is_replaced(computed):
    chosen = case("attention")
    run = computed("attribution", chosen.job(projection=projected("sjlt", 64)))
    features = oracle.case_jacobian("attention") @ _matrix(run, chosen.module)
    for ridge in (1.0, 30.0):
        found = run.attribution(ridge)
        assert Path(str(found.store.root)).is_relative_to(run.path)
        assert (run.path / "attribution.zarr").is_dir()
        assert oracle.error(found[:], scores(features, TRAIN, ridge)) <= 1e-5
    assert ooc_ntk.verify(run.path, chosen.job(projection=projected("sjlt", 64))).passed


def _matrix(run: Kernel, module: nn.Module) -> np.ndarray:
    from ooc_ntk.compute.projection.entries import dense_columns

    size = sum(parameter.numel() for parameter in module.parameters())
    return dense_columns(run.plan.projection, np.arange(size), np.arange(run.plan.projection.dim))


def test_a_matrix_of_too_few_rows_needs_a_ridge(tmp_path):
    features, _ = made("trace")
    few = dataclasses.replace(features, train_samples=5, test_samples=SAMPLES - 5)
    kernel = Kernel.of_features(tmp_path, few)
    with pytest.raises(InputError, match=r"not positive definite.*fewer train rows than columns.*raise the ridge") as e:
        kernel.attribution(0.0, tmp_path / "scores")
    assert not (tmp_path / "scores").exists()
    suggested = float(str(e.value).rsplit(" ", 1)[1])
    found = kernel.attribution(suggested, tmp_path / "scores")
    assert np.isfinite(found[:]).all()


@pytest.mark.parametrize("seed", range(12))
def test_one_row_too_few_is_refused_whatever_rounding_makes_of_it(seed, tmp_path):
    rows = np.random.default_rng(seed).standard_normal((20, 1, 16))
    kernel = Kernel.of_features(tmp_path, Features(rows.reshape(-1, 16), 1, 15, 5, SketchShape(16)))
    with pytest.raises(InputError, match="raise the ridge"):
        kernel.attribution(0.0, tmp_path / "scores")


@pytest.mark.parametrize("ridge", [-1.0, -1e-300, float("nan")])
def test_a_ridge_below_zero_is_refused(ridge, tmp_path):
    kernel = Kernel.of_features(tmp_path, made("trace")[0])
    with pytest.raises(InputError, match="ridge must be at least 0, got"):
        kernel.attribution(ridge, tmp_path / "scores")


def test_attribution_needs_one_number_per_pair_a_folder_and_memory(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="one number per pair"):
        Kernel.of_features(tmp_path, made("full")[0]).attribution(1.0, tmp_path / "scores")
    kernel = Kernel.of_features(tmp_path, made("trace")[0])
    with pytest.raises(InputError, match="out="):
        kernel.attribution(1.0)
    monkeypatch.setattr(attribution_module, "free_host_bytes", lambda: 2**20)
    with pytest.raises(BudgetError, match="48 × 48 numbers.*smaller dim"):
        kernel.attribution(1.0, tmp_path / "scores")


# --- files of other programs -----------------------------------------------------------------------------------------


@pytest.fixture
def rows() -> np.ndarray:
    """(samples, dim) float32."""
    return np.random.default_rng(2).standard_normal((11, 16)).astype(np.float32)


def check_file(kernel: Kernel, rows: np.ndarray, parameters: int, bound: float = CLOSE) -> None:
    wanted = rows.astype(np.float64) @ rows.T.astype(np.float64) * (parameters / rows.shape[1])
    assert kernel.plan is None
    assert oracle.error(kernel, wanted) <= bound
    np.testing.assert_allclose(kernel.diagonal(), wanted.diagonal(), rtol=10 * bound)
    assert oracle.error(kernel[2:5, ::2], wanted[2:5, ::2]) <= bound


def test_a_numpy_file(rows, tmp_path):
    np.save(tmp_path / "features.npy", rows)
    kernel = ooc_ntk.open_features(tmp_path / "features.npy", 500)
    check_file(kernel, rows, 500)
    assert (kernel.shape, kernel.train_samples, kernel.test_samples) == ((11, 11), 11, 0)
    assert "11 × 11 float32" in repr(kernel)
    split = ooc_ntk.open_features(tmp_path / "features.npy", 500, dim=16, samples=11, train=8)
    assert split.shape == (11, 8)
    assert oracle.error(split, np.asarray(kernel, dtype=np.float64)[:, :8]) <= CLOSE
    assert (kernel.errors() > 0).all()
    targets = np.random.default_rng(0).standard_normal(8)
    assert split.predict(split.solve(targets, 10.0)).shape == (3,)
    assert split.attribution(1.0, tmp_path / "scores").shape == (11, 8)
    assert oracle.error(ooc_ntk.open_features(tmp_path / "features.npy"), np.asarray(kernel) / (500 / 16)) <= CLOSE


@pytest.mark.parametrize(("dtype", "bound"), [("float32", CLOSE), ("float16", 2e-3)])
def test_a_memory_map_of_trak(dtype, bound, rows, tmp_path):
    path = tmp_path / "grads.mmap"
    there = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=rows.shape)
    there[:] = rows
    there.flush()
    check_file(ooc_ntk.open_features(path, 300), rows, 300, bound)
    check_file(ooc_ntk.open_features(path, 300, dtype="float64"), rows, 300, bound)  # the header knows better


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 2e-3), ("float32", CLOSE), ("float64", CLOSE)])
def test_a_raw_memory_map(dtype, bound, rows, tmp_path):
    path = tmp_path / "raw.mmap"
    rows.astype(dtype).tofile(path)
    check_file(ooc_ntk.open_features(path, 300, dim=16, dtype=dtype), rows, 300, bound)


@pytest.mark.parametrize("raw", [False, True])
def test_several_outputs_of_a_sample(raw, tmp_path):
    features = np.random.default_rng(3).standard_normal((7, 4, 12)).astype(np.float32)
    if raw:
        features.tofile(tmp_path / "f")
        kernel = ooc_ntk.open_features(tmp_path / "f", dim=12, outputs=4)
    else:
        np.save(tmp_path / "f.npy", features)
        kernel = ooc_ntk.open_features(tmp_path / "f.npy")
    assert oracle.error(kernel, oracle.kernel(features.astype(np.float64), 7)) <= CLOSE


def test_features_as_trak_stores_them_are_unbiased_on_the_exact_scale(tmp_path):
    jacobian = oracle.case_jacobian("smooth-mlp").sum(1)[:8]
    parameters, dim, seeds = jacobian.shape[1], 24, 200
    exact = jacobian @ jacobian.T
    found = []
    for seed in range(seeds):
        signs = np.random.default_rng(seed).choice((-1.0, 1.0), (parameters, dim))
        np.save(tmp_path / "f.npy", (jacobian @ signs / parameters**0.5).astype(np.float32))
        found.append(np.asarray(ooc_ntk.open_features(tmp_path / "f.npy", parameters), dtype=np.float64))
    mean, error = np.mean(found, 0), np.std(found, 0, ddof=1) / seeds**0.5
    assert (np.abs(mean - exact) <= 4 * error).all()
    assert (error < 0.05 * np.sqrt(np.outer(exact.diagonal(), exact.diagonal()))).all()


def test_files_of_one_label_may_be_multiplied(rows, tmp_path):
    for name, part in (("one", rows[:6]), ("two", rows[6:])):
        np.save(tmp_path / f"{name}.npy", part)
    opened = {
        label: [ooc_ntk.open_features(tmp_path / f"{name}.npy", label=label).features for name in ("one", "two")]
        for label in ("a", "b", "")
    }
    wanted = rows[6:].astype(np.float64) @ rows[:6].T
    assert oracle.error(opened["a"][1].cross(opened["a"][0])[:], wanted) <= CLOSE
    for left, right in (
        (opened["a"][1], opened["b"][0]),
        (opened[""][1], opened[""][0]),
        (opened["a"][0], opened[""][1]),
    ):
        with pytest.raises(RunConflictError, match="not features of one projection"):
            left.cross(right)


def bad_files(folder: Path) -> dict[str, Path]:
    values = np.ones((6, 8), dtype=np.float32)
    values.tofile(folder / "raw")
    (folder / "short").write_bytes((folder / "raw").read_bytes()[:-3])
    (folder / "empty").write_bytes(b"")
    np.save(folder / "good.npy", values)
    np.save(folder / "whole.npy", values.astype(np.int32))
    np.save(folder / "flat.npy", values[0])
    np.save(folder / "none.npy", values[:0])
    np.save(folder / "four.npy", values[None, None])
    (folder / "cut.npy").write_bytes((folder / "good.npy").read_bytes()[:-8])
    np.save(folder / "objects.npy", np.array([{}, 1], dtype=object), allow_pickle=True)
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("missing", {}, "there is no file of features .*missing"),
        ("raw", {}, "raw file of 192 bytes; say how many columns it has: dim="),
        ("raw", {"dim": 7}, "192 bytes, which is no multiple of a sample's 28 bytes"),
        ("raw", {"dim": 8, "outputs": 5}, r"no multiple of a sample's 160 bytes \(5 × 8 float32\)"),
        ("raw", {"dim": 8, "dtype": "float128x"}, "dtype 'float128x' is not known"),
        ("raw", {"dim": 8, "dtype": "int32"}, "holds int32; features are float16, float32 or float64"),
        ("raw", {"dim": 8, "samples": 7}, "holds 6 samples of 1 × 8, expected are 7"),
        ("short", {"dim": 8}, "189 bytes, which is no multiple"),
        ("empty", {"dim": 8}, "0 bytes"),
        ("good.npy", {"dim": 16}, "has 8 columns, expected are dim=16"),
        ("good.npy", {"outputs": 4}, "6 rows, which is no multiple of outputs=4"),
        ("good.npy", {"samples": 12}, "holds 6 samples of 1 × 8, expected are 12"),
        ("good.npy", {"train": 7}, "train must be from 1 to the 6 samples"),
        ("good.npy", {"train": 0}, "train must be from 1 to the 6 samples"),
        ("good.npy", {"parameters": 0}, "parameters must be the number of the model's parameters, got 0"),
        ("whole.npy", {}, "holds int32"),
        ("flat.npy", {}, r"shape \(8,\); features are \(samples"),
        ("none.npy", {}, r"shape \(0, 8\)"),
        ("four.npy", {}, r"shape \(1, 1, 6, 8\)"),
        ("cut.npy", {}, "damaged NumPy file"),
        ("objects.npy", {}, "damaged NumPy file|float16, float32 or float64"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(name, options, message, tmp_path):
    path = bad_files(tmp_path).get(name, tmp_path / name)
    with pytest.raises(InputError, match=message):
        ooc_ntk.open_features(path, **options)


@pytest.mark.parametrize("options", [{"dim": 0}, {"dim": -8}, {"dim": 8, "outputs": 0}, {"dim": 8, "outputs": -1}])
@pytest.mark.parametrize("name", ["raw", "good.npy"])
def test_sizes_below_one_are_refused(name, options, tmp_path):
    with pytest.raises(InputError):
        ooc_ntk.open_features(bad_files(tmp_path)[name], **options)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(StorageError, match="holds no run"):
        ooc_ntk.open_features(tmp_path)


def test_a_projected_run_is_opened_by_its_features(computed):
    run = computed("trace", case("attention").job(**RUNS["trace"]))
    kernel = ooc_ntk.open_features(run.path)
    assert (kernel.shape, kernel.train_samples, kernel.test_samples) == (run.shape, TRAIN, TEST)
    assert oracle.error(kernel, np.asarray(run, dtype=np.float64)) <= CLOSE
    assert oracle.error(kernel.diagonal(), run.diagonal()) <= CLOSE
    np.testing.assert_allclose(kernel.errors(2, [1, 3]), run.errors(2, [1, 3]))


def test_scores_replace_nothing_but_scores(tmp_path):
    features, _ = made("trace")
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    kernel = Kernel.of_features(tmp_path, features)
    with pytest.raises(InputError, match="holds no scores"):
        kernel.attribution(1.0, out=folder)
    assert (folder / "mine.txt").read_text() == "mine"
    first = np.asarray(kernel.attribution(1.0, out=tmp_path / "scores")[:])
    second = np.asarray(kernel.attribution(2.0, out=tmp_path / "scores")[:])
    assert not np.allclose(first, second)


@pytest.mark.parametrize("options", [{"divisor": 3.0}, {"cosine": True}, {"full": True}])
def test_kernels_of_other_scales_are_not_crossed(options):
    one, _ = made("trace", sketch="same")
    other, _ = made("trace", sketch="same")
    with pytest.raises(RunConflictError, match="kernels of different kinds"):
        one.cross(dataclasses.replace(other, **options))
    assert one.cross(other).shape == (SAMPLES, COLUMNS)


def test_the_expected_error_of_cosines_is_that_of_many_sketches():
    """Signs of many seeds on real gradients, cosines of the train square."""
    rows = oracle.case_jacobian("relu-mlp")[:TRAIN]
    exact = oracle.kernel(rows, TRAIN, normalize="cosine")
    errors, expected = [], []
    for seed in range(40):
        signs = np.sign(np.random.default_rng(seed).standard_normal((rows.shape[2], 256))) / 16
        sketched = rows @ signs
        features = Features(sketched.reshape(-1, 256), rows.shape[1], TRAIN, 0, SketchShape(256), cosine=True)
        errors.append(oracle.error(features.kernel()[:], exact))
        expected.append(features.expected_error())
    assert np.mean(expected) == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=0.15)
    # Entries themselves have a far larger error: what is promised of cosines is not theirs.
    assert dataclasses.replace(features, cosine=False).expected_error() > 1.2 * np.mean(expected)


@pytest.mark.parametrize("blocks", [0, 8])
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.filterwarnings("error")
def test_features_of_zeros_have_no_error(blocks, cosine):
    shape = SketchShape(64, blocks)
    found = moments(Panel(np.zeros((5, 2, 64)), None), shape, cosine=cosine)
    assert found.error(64, 5) == 0
