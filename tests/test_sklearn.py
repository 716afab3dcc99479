"""The scikit-learn face: its own checks, a dense float64 oracle, precomputed kernels, and what it refuses."""

import functools
import pickle
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

import ooc_ntk
from ooc_ntk.algebra.products import PASSES
from ooc_ntk.errors import BudgetError, InputError, RunConflictError, TransientStorageError
from ooc_ntk.sklearn import NTKClassifier, NTKRegressor, NTKTransformer, recipe
from tests import oracle
from tests.cases import SMOOTH, TRAIN, case, digits

pytestmark = pytest.mark.usefixtures("frozen", "one_thread", "_scratch")

RIDGE = 1e-2


@pytest.fixture(scope="module")
def _scratch(memory_folder):
    """Temporary runs in memory: hundreds of them sync their files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(memory_folder))
        yield
    assert not list(memory_folder.glob("ooc-ntk-*")), "a temporary run was left"


# scikit-learn's own checks


@parametrize_with_checks(
    [
        NTKRegressor(),
        NTKClassifier(),
        NTKTransformer(),
        NTKTransformer("mlp,width=32,classes=1", output="features", projection="sjlt:32"),
    ]
)
def test_scikit_learns_checks(estimator, check):
    check(estimator)


# against the dense oracle


@functools.cache
def square(kind="trace", normalize=None):
    """Dense kernel of train and test samples of the case, float64."""
    rows = oracle.case_jacobian("smooth-mlp")
    return oracle.kernel(rows, len(rows), kind, normalize=normalize)


def ridge_oracle(dense, targets, ratio=RIDGE):
    """Predictions for the test samples by a dense float64 solve."""
    train = dense[:TRAIN, :TRAIN]
    mean = targets.mean(0)
    ridge = ratio * train.diagonal().mean() * np.eye(TRAIN)
    return dense[TRAIN:, :TRAIN] @ np.linalg.solve(train + ridge, targets - mean) + mean


def pixels():
    """Train and test images of the case, and targets of the former."""
    chosen = case("smooth-mlp")
    targets = np.random.default_rng(0).normal(size=(TRAIN, 3))
    return chosen.module, chosen.train.numpy(), chosen.test.numpy(), targets


def difference(found, wanted):
    return oracle.error(found, np.asarray(wanted))


@pytest.mark.parametrize(
    ("kind", "normalize"), [("trace", None), ("pseudo", None), ("output:2", None), ("trace", "cosine")]
)
def test_regressor_is_the_dense_solution(kind, normalize):
    model, train, test, targets = pixels()
    estimator = NTKRegressor(model, kernel=kind, normalize=normalize, ridge=RIDGE)
    found = estimator.fit(train, targets).predict(test)
    assert difference(found, ridge_oracle(square(kind, normalize), targets)) < 1e-9
    assert estimator.ridge_ == pytest.approx(RIDGE * square(kind, normalize).diagonal()[:TRAIN].mean(), rel=1e-9)
    assert estimator.sample_shape_ == (1, 8, 8)
    one = NTKRegressor(model, kernel=kind, normalize=normalize, ridge=RIDGE).fit(train, targets[:, 0])
    assert one.predict(test).shape == (len(test),)
    assert difference(one.predict(test), found[:, 0]) < 1e-9


def test_float32_is_near():
    model, train, test, targets = pixels()
    found = NTKRegressor(model, ridge=RIDGE).fit(train, targets).predict(test)
    assert difference(found, ridge_oracle(square(), targets)) < 100 * SMOOTH  # condition of K + ridge·m·I: about 100


def test_classifier_is_the_dense_solution():
    model, train, test, _ = pixels()
    labels = case("smooth-mlp").labels.numpy()
    classes = np.unique(labels)
    names = np.array([f"digit {label}" for label in range(10)])
    estimator = NTKClassifier(model, ridge=RIDGE).fit(train, names[labels])
    wanted = ridge_oracle(square(), np.eye(10)[labels][:, classes])
    assert difference(estimator.decision_function(test), wanted) < 1e-9
    assert (estimator.predict(test) == names[classes[wanted.argmax(1)]]).all()
    assert not hasattr(estimator, "predict_proba")


def test_classifier_of_two_classes():
    model, train, test, _ = pixels()
    even = case("smooth-mlp").labels.numpy() % 2 == 0
    estimator = NTKClassifier(model, ridge=RIDGE).fit(train, even)
    wanted = ridge_oracle(square(), 2.0 * even - 1.0)
    assert difference(estimator.decision_function(test), wanted) < 1e-9
    assert (estimator.predict(test) == (wanted > 0)).all()


@pytest.mark.parametrize("new", [1, 7, TRAIN, TRAIN + 7])
def test_rows_are_those_of_the_oracle_whichever_set_is_larger(new):
    """Fewer new samples than there were in fit, as many, and more."""
    model, train, test, _ = pixels()
    samples = np.concatenate([test, train])[:new]
    dense = np.roll(square(), -TRAIN, axis=0)[:new, :TRAIN]  # test rows first, then train rows
    transformer = NTKTransformer(model).fit(train)
    assert difference(transformer.transform(samples), dense) < 1e-12
    vectors = np.random.default_rng(1).normal(size=(TRAIN, 2))
    assert difference(transformer.recipe_.products(samples, train, vectors), dense @ vectors) < 1e-12


def test_fit_transform_is_the_square_of_the_oracle():
    model, train, _, _ = pixels()
    found = NTKTransformer(model).fit_transform(train)
    assert found.dtype == np.float64
    assert difference(found, square()[:TRAIN, :TRAIN]) < 1e-12


# streaming


def test_predictions_come_in_batches_and_never_hold_the_kernel(monkeypatch):
    model, train, test, targets = pixels()
    monkeypatch.setattr(recipe, "LEAST_BATCH", 4)
    runs = []
    run = ooc_ntk.api.run

    def counted(job, *args, **kwargs):
        runs.append(tuple(len(samples) for samples in (job.train, job.test) if samples is not None))
        return run(job, *args, **kwargs)

    def refused(self, *args, **kwargs):
        raise AssertionError("the kernel was read whole")

    monkeypatch.setattr(recipe.api, "run", counted)
    monkeypatch.setattr(ooc_ntk.Kernel, "__array__", refused)
    monkeypatch.setattr(ooc_ntk.Kernel, "__getitem__", refused)
    estimator = NTKRegressor(model, ridge=RIDGE).fit(train, targets)
    found = estimator.predict(np.concatenate([test, train, test]))
    # At most as many as the fit samples, and the smaller set has the columns.
    assert runs == [(26,), (26, 26), (14, 26)]
    wanted = ridge_oracle(square(), targets)
    assert difference(found[:7], wanted) < 1e-9
    assert difference(found[-7:], wanted) < 1e-9


@pytest.mark.parametrize("times", [1, PASSES])
def test_a_tile_that_was_misread_is_read_again(monkeypatch, times):
    model, train, test, targets = pixels()
    estimator = NTKRegressor(model, ridge=RIDGE).fit(train, targets)
    from ooc_ntk.algebra.entries import TileEntries

    blocks, failures = TileEntries.blocks, [times]

    def failing(self, rows, *, lower=False):
        for block in blocks(self, rows, lower=lower):
            yield block
            if failures[0]:
                failures[0] -= 1
                raise TransientStorageError("misread")

    monkeypatch.setattr(TileEntries, "blocks", failing)
    if times == PASSES:
        with pytest.raises(TransientStorageError, match="misread"):
            estimator.predict(test)
    else:
        assert difference(estimator.predict(test), ridge_oracle(square(), targets)) < 1e-9


def test_an_array_larger_than_memory_is_refused(monkeypatch):
    model, train, test, targets = pixels()
    transformer = NTKTransformer(model).fit(train)
    estimator = NTKRegressor(model).fit(train, targets)
    monkeypatch.setattr(recipe, "free_host_bytes", lambda: 1000)
    with pytest.raises(BudgetError, match=r"7 × 26 for scikit-learn needs 1\.4 KiB .* 800 B are free .* NTKRegressor"):
        transformer.transform(test)
    assert estimator.predict(test).shape == (7, 3)  # streams


# projections


@pytest.mark.parametrize("normalize", [None, "cosine"])
def test_features_make_the_projected_kernel(normalize):
    model, train, test, _ = pixels()
    settings = {"projection": "sjlt:64", "normalize": normalize, "precision": "float64", "random_state": 3}
    features = NTKTransformer(model, output="features", **settings)
    fitted = features.fit_transform(train)
    assert fitted.shape == (TRAIN, 10 * 64)
    assert len(features.get_feature_names_out()) == 640
    kernel = NTKTransformer(model, **settings)
    assert difference(fitted @ fitted.T, kernel.fit_transform(train)) < 1e-12
    assert difference(features.transform(test) @ fitted.T, kernel.transform(test)) < 1e-12
    other = NTKTransformer(model, output="features", **{**settings, "random_state": 4})
    assert difference(other.fit_transform(train), fitted) > 0.5


def test_projected_regressor_is_ridge_regression_on_features(monkeypatch):
    model, train, test, targets = pixels()
    settings = {"projection": ooc_ntk.Projection("sjlt", 32, seed=5), "precision": "float64"}
    estimator = NTKRegressor(model, ridge=RIDGE, **settings).fit(train, targets)
    features = NTKTransformer(model, output="features", **settings).fit(train)
    linear = Ridge(alpha=estimator.ridge_, fit_intercept=False)
    linear.fit(features.transform(train), targets - targets.mean(0))
    wanted = linear.predict(features.transform(test)) + targets.mean(0)
    monkeypatch.setattr(recipe, "LEAST_BATCH", 4)
    assert difference(estimator.predict(np.concatenate([test] * 5)), np.concatenate([wanted] * 5)) < 1e-9
    assert estimator.coef_.shape == (320, 3)
    assert not hasattr(estimator, "X_fit_")
    estimator.set_params(projection=None).fit(train, targets)
    assert not hasattr(estimator, "coef_")
    assert difference(estimator.predict(test), ridge_oracle(square(), targets)) < 1e-9


def test_size_of_a_projection_by_its_error_stays_that_of_fit():
    model, train, test, targets = pixels()
    projection = ooc_ntk.Projection("sjlt", target_error=0.2)
    estimator = NTKRegressor(model, projection=projection).fit(train, targets)
    assert estimator.recipe_.projection.dim == estimator.coef_.shape[0] // 10
    assert estimator.predict(test[:2]).shape == (2, 3)


# with scikit-learn


def test_precomputed_kernel_of_a_run(tmp_path):
    """A kernel that ``ooc_ntk.run`` made, in SVC and KernelRidge."""
    images, labels = (values[:120].numpy() for values in digits(4))
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4)).eval()
    job = ooc_ntk.Job(net, images[:90], test=images[90:], precision="float64")
    kernel = ooc_ntk.run(job, tmp_path / "run", progress=False)
    train, test = kernel[:90], kernel[90:]
    assert SVC(kernel="precomputed").fit(train, labels[:90]).score(test, labels[90:]) > 0.9
    targets = np.eye(4)[labels[:90]]
    alpha = 1e-3 * kernel.sample_diagonal()[:90].mean()
    ridge = KernelRidge(kernel="precomputed", alpha=alpha).fit(train, targets)
    wanted = kernel.predict(kernel.solve(targets, alpha))
    assert difference(ridge.predict(test), wanted) < 1e-8
    classifier = NTKClassifier(net).fit(images[:90], labels[:90])
    assert difference(classifier.decision_function(images[90:]), ridge.predict(test)) < 0.05  # centred, and not


def test_pipelines_with_precomputed_kernels():
    images, labels = (values[:120].numpy() for values in digits(4))
    features = images.reshape(len(images), -1)
    pipeline = make_pipeline(StandardScaler(), NTKTransformer(random_state=0), SVC(kernel="precomputed"))
    search = GridSearchCV(pipeline, {"svc__C": [0.01, 1.0], "ntktransformer__normalize": ["cosine"]}, cv=2)
    search.fit(features[:90], labels[:90])
    assert search.score(features[90:], labels[90:]) > 0.9
    ridge = make_pipeline(NTKTransformer(random_state=0), KernelRidge(kernel="precomputed", alpha=1.0))
    assert ridge.fit(images[:90], np.eye(4)[labels[:90]]).predict(images[90:]).shape == (30, 4)


def test_grid_search_over_ridges_and_models():
    images, labels = (values[:100].numpy() for values in digits(4))
    search = GridSearchCV(
        NTKClassifier(random_state=0), {"ridge": [1e-3, 1e3], "model": ["mlp,width=32,classes=1"]}, cv=2
    )
    search.fit(images[:80], labels[:80])
    assert search.best_params_["ridge"] == 1e-3
    assert search.score(images[80:], labels[80:]) > 0.9


def test_names_of_columns():
    _, train, test, _ = pixels()
    transformer = NTKTransformer(random_state=0).set_output(transform="default").fit(train)
    assert list(transformer.get_feature_names_out())[:2] == ["ntktransformer0", "ntktransformer1"]
    assert transformer.transform(test).shape[1] == len(transformer.get_feature_names_out()) == TRAIN


# models


def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 2))


def test_models_of_every_kind():
    _, train, test, targets = pixels()
    torch.manual_seed(3)
    live = small().eval()
    wanted = NTKRegressor(live).fit(train, targets).predict(test)
    state = torch.get_rng_state()
    assert (NTKRegressor(small, random_state=3).fit(train, targets).predict(test) == wanted).all()
    assert torch.equal(torch.get_rng_state(), state)
    default = NTKRegressor(random_state=2).fit(train, targets)
    named = NTKRegressor("mlp,width=256,classes=1,seed=2").fit(train, targets)
    assert (default.predict(test) == named.predict(test)).all()
    assert str(default.model_.fc1) == "Linear(in_features=64, out_features=256, bias=True)"
    drawn = [NTKRegressor(random_state=np.random.RandomState(seed)).fit(train, targets) for seed in (0, 0, 1)]
    weights = [estimator.model_.fc1.weight for estimator in drawn]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_fitted_estimator_does_not_change_with_the_users_model():
    _, train, test, targets = pixels()
    model = small().eval()
    estimator = NTKRegressor(model, parameters="4.*").fit(train, targets)
    before = estimator.predict(test)
    torch.nn.init.zeros_(model[1].weight)
    assert (estimator.predict(test) == before).all()
    assert (clone(estimator).fit(train, targets).predict(test) != before).any()


def test_whole_numbers_are_tokens_for_an_embedding_alone():
    tokens = np.random.default_rng(0).integers(0, 9, (12, 5))
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(20, 1)).eval()
    assert NTKRegressor(model).fit(tokens, np.arange(12.0)).predict(tokens).shape == (12,)
    found = NTKRegressor(random_state=0).fit(tokens, np.arange(12.0)).predict(tokens)
    assert (found == NTKRegressor(random_state=0).fit(tokens.astype(float), np.arange(12.0)).predict(tokens)).all()


def test_pickled_and_cloned():
    model, train, test, targets = pixels()
    estimator = NTKRegressor(model, ridge=RIDGE).fit(train, targets)
    again = pickle.loads(pickle.dumps(estimator))
    assert (again.predict(test) == estimator.predict(test)).all()
    copied = clone(estimator)
    assert copied.ridge == RIDGE
    with pytest.raises(NotFittedError, match="NTKRegressor"):
        copied.predict(test)


# a run that is kept


def test_a_run_that_is_kept_is_resumed(tmp_path):
    model, train, test, targets = pixels()
    out = tmp_path / "runs" / "fit"
    estimator = NTKRegressor(model, ridge=RIDGE, out=out).fit(train, targets)
    kernel = ooc_ntk.open(out)
    assert kernel.shape == (TRAIN, TRAIN)
    written = kernel.path.joinpath("plan.json").stat().st_mtime_ns
    again = NTKClassifier(model, out=str(out)).fit(train, targets[:, 0] > 0)  # other targets, same kernel
    assert kernel.path.joinpath("plan.json").stat().st_mtime_ns == written
    assert again.predict(test).dtype == bool
    assert difference(NTKTransformer(model, out=out).fit_transform(train), kernel[:]) == 0
    assert difference(estimator.predict(test), ridge_oracle(square(), targets)) < 1e-3
    assert [path.name for path in out.parent.iterdir()] == ["fit"]  # temporary runs beside it are gone
    with pytest.raises(RunConflictError, match="another job"):
        NTKRegressor(model, out=out).fit(train[:20], targets[:20])


def test_features_that_are_kept(tmp_path):
    model, train, _, targets = pixels()
    settings = {"projection": "sjlt:32", "random_state": 0, "out": tmp_path / "run"}
    features = NTKTransformer(model, output="features", **settings).fit_transform(train)
    kept = ooc_ntk.open(tmp_path / "run").features.read(range(TRAIN))
    assert (features == kept.reshape(TRAIN, -1)).all()
    assert NTKRegressor(model, **settings).fit(train, targets).coef_.shape == (320, 3)


@pytest.mark.parametrize(
    ("settings", "what"), [({}, "network"), ({"model": small, "projection": "sjlt:32"}, "projection")]
)
def test_what_is_drawn_anew_cannot_be_kept(tmp_path, settings, what):
    _, train, _, targets = pixels()
    with pytest.raises(InputError, match=f"draws another {what} in every fit.*give random_state=0"):
        NTKRegressor(out=tmp_path / "run", **settings).fit(train, targets)


# bad input

BAD = {
    "negative ridge": ({"ridge": -1.0}, r"ridge must be a number from 0 on.*got -1\.0"),
    "infinite ridge": ({"ridge": np.inf}, "got inf"),
    "ridge of text": ({"ridge": "small"}, "got 'small'"),
    "full kernel": ({"kernel": "full"}, "one per sample; use 'trace'"),
    "unknown kernel": ({"kernel": "trase"}, "did you mean 'trace'"),
    "output that is not there": ({"kernel": "output:10"}, "10"),
    "unknown projection": ({"projection": "sjlx:64"}, "did you mean 'sjlt'"),
    "projection without a size": ({"projection": "sjlt"}, "needs a size"),
    "projection of another type": ({"projection": 64}, "projection must be None.*got 64"),
    "normalize": ({"normalize": "l2"}, "unknown normalize 'l2'"),
    "parameters": ({"parameters": "nothing.*"}, "nothing"),
    "precision": ({"precision": "float16"}, "underflow"),
    "device": ({"device": "tpu"}, "device must be"),
    "host memory": ({"host_memory": "1MiB"}, "1.0 MiB"),
    "model of another type": ({"model": 3}, "model must be None.*got int"),
    "unknown model": ({"model": "mpl"}, "did you mean 'mlp'"),
    "factory of no module": ({"model": dict}, "must return a torch.nn.Module, got dict"),
    "model in training mode": ({"model": small()}, "training mode"),
    "random state": ({"random_state": "seed"}, "cannot be used to seed"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    arguments, message = BAD[name]
    model, train, _, targets = pixels()
    for kind in (NTKRegressor,) if "ridge" in arguments else (NTKRegressor, NTKTransformer):
        with pytest.raises(ValueError, match=message):
            kind(**{"model": model, **arguments}).fit(train, targets)


def test_bad_output_of_a_transformer():
    model, train, _, _ = pixels()
    with pytest.raises(InputError, match="did you mean 'features'"):
        NTKTransformer(model, output="feature").fit(train)
    with pytest.raises(InputError, match="output='features' needs a projection.*sjlt:1024"):
        NTKTransformer(model, output="features").fit(train)


def test_bad_data():
    model, train, test, targets = pixels()
    holed = train.copy()
    holed[3, 0, 2, 2] = np.nan
    for estimator in (NTKRegressor(model), NTKTransformer(model)):
        with pytest.raises(ValueError, match="NaN"):
            estimator.fit(holed, targets)
        fitted = estimator.fit(train, targets)
        use = getattr(fitted, "transform", None) or fitted.predict
        with pytest.raises(ValueError, match="NaN"):
            use(holed)
        with pytest.raises(ValueError, match="expecting 1 features"):
            use(test.reshape(len(test), 8, 8))
        with pytest.raises(InputError, match=r"samples of shape \(1, 8, 7\).*fitted with samples of shape \(1, 8, 8\)"):
            use(test[..., :7])
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        NTKRegressor(model).fit(train, targets[:5])
    with pytest.raises(InputError, match="y holds one class, a;"):
        NTKClassifier(model).fit(train, ["a"] * TRAIN)
    with pytest.raises(ValueError, match="Unknown label type"):
        NTKClassifier(model).fit(train, targets[:, 0])


@pytest.mark.parametrize("kind", [NTKRegressor, NTKTransformer])
def test_samples_of_another_shape_than_the_model_takes(kind):
    model, train, _, targets = pixels()
    with pytest.raises(InputError, match="36.*64"):
        kind(model).fit(train[..., 2:, 2:], targets)
    with pytest.raises(InputError, match="images of shape"):
        kind("lenet").fit(train.reshape(TRAIN, -1), targets)


def test_singular_kernel_without_a_ridge():
    model, train, _, targets = pixels()
    with pytest.raises(InputError, match="not positive definite.*smallest ridge that would do"):
        NTKRegressor(model, ridge=0).fit(np.concatenate([train, train]), np.tile(targets, (2, 1)))


def test_weights_that_are_sketched_otherwise_are_refused():
    model, train, test, targets = pixels()
    estimator = NTKRegressor(model, projection="sjlt:32").fit(train, targets)
    object.__setattr__(estimator.recipe_, "structured", ("1.weight",))
    with pytest.raises(InputError, match="sketches no weights .* and 1.weight for those of fit.*sjlt:1024"):
        estimator.predict(test)


# imports


def _python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_package_stays_light_and_reaches_it_by_name():
    found = _python(
        "import sys, ooc_ntk; print([name for name in ('sklearn', 'numpy', 'torch') if name in sys.modules]); "
        "print(ooc_ntk.sklearn.NTKRegressor.__name__)"
    )
    assert found.stdout.split("\n")[:2] == ["[]", "NTKRegressor"], found.stderr


def test_without_scikit_learn_the_extra_is_named():
    found = _python("import sys; sys.modules['sklearn'] = None\nfrom ooc_ntk.sklearn import NTKRegressor")
    assert found.returncode
    assert found.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: ooc_ntk.sklearn needs scikit-learn, which is not installed; run: "
        "python -m pip install 'ooc-ntk[sklearn]'"
    )
