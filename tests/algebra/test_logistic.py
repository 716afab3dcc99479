"""Kernel logistic regression, one pass an iteration: against SciPy on the dense problem, scikit-learn on features."""

import re

import numpy as np
import pytest
import scipy.optimize
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import ooc_ntk
from ooc_ntk.algebra import dense, logistic
from ooc_ntk.algebra.kernel import Kernel
from ooc_ntk.compute.machine import resident_bytes
from ooc_ntk.errors import BudgetError, InputError
from tests.cases import digits

CLASSES, ROWS = 4, 80

pytestmark = pytest.mark.usefixtures("one_thread")


def features():
    data = load_digits(n_class=CLASSES)
    return data.data[:ROWS] / 16, data.target[:ROWS]


def entries(name):
    x, _ = features()
    if name == "full rank":
        return np.exp(-((x[:, None] - x) ** 2).sum(-1) / 4)
    return x @ x.T  # of rank 64 at most


def as_kernel(matrix):
    return Kernel.of_array(".", matrix, matrix.diagonal(), matrix.shape[1], len(matrix) - matrix.shape[1])


def soft(scores):
    found = np.exp(scores - scores.max(1, keepdims=True))
    return found / found.sum(1, keepdims=True)


def objective(matrix, targets, ridge, coefficients, bias):
    """The loss, written down from its definition."""
    scores = matrix @ coefficients + bias
    chances = np.log(soft(scores))
    return -(targets * chances).sum() + 0.5 * ridge * np.trace(coefficients.T @ matrix @ coefficients)


def least(matrix, targets, ridge):
    """The least loss by L-BFGS in float64, over the coordinates of the kernel's square root."""
    values, vectors = np.linalg.eigh(matrix)
    root = vectors * np.sqrt(np.maximum(values, 0))
    rows, classes = targets.shape

    def loss(flat):
        inner, bias = flat[: rows * classes].reshape(rows, classes), flat[rows * classes :]
        scores = root @ inner + bias
        rest = soft(scores) - targets
        shifted = scores - scores.max(1, keepdims=True)
        value = (np.log(np.exp(shifted).sum(1)) - (targets * shifted).sum(1)).sum() + 0.5 * ridge * (inner**2).sum()
        return value, np.concatenate([(root.T @ rest + ridge * inner).ravel(), rest.sum(0)])

    start = np.zeros(rows * classes + classes)
    options = {"maxiter": 20_000, "maxfun": 40_000, "ftol": 1e-15, "gtol": 1e-9}
    return scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options=options).fun


def one_hot():
    return np.eye(CLASSES)[features()[1]]


def probabilities():
    return soft(3 * np.random.default_rng(0).normal(size=(ROWS, CLASSES)))


@pytest.mark.parametrize("ratio", [1e-1, 1e-3])
@pytest.mark.parametrize("targets", [one_hot, probabilities], ids=["labels", "probabilities"])
@pytest.mark.parametrize("name", ["full rank", "low rank"])
def test_the_loss_is_the_least_one(name, targets, ratio):
    matrix, wanted = entries(name), targets()
    ridge = ratio * matrix.diagonal().mean()
    found = as_kernel(matrix).logistic(wanted, ridge, tolerance=1e-8)
    best = least(matrix, wanted, ridge)
    assert found.converged
    assert found.loss == pytest.approx(best, rel=1e-6)
    assert found.loss == pytest.approx(objective(matrix, wanted, ridge, found.coefficients, found.bias), rel=1e-10)
    np.testing.assert_allclose(found.train_scores, matrix @ found.coefficients + found.bias, atol=1e-9)
    assert (found.ridge, found.ridge_ratio) == (ridge, pytest.approx(ratio))
    assert found.gradient < 1e-3
    np.testing.assert_allclose(found.bias.sum(), 0, atol=1e-10)
    np.testing.assert_allclose(found.coefficients.sum(1), 0, atol=1e-8)
    # Where the gradient is 0: the coefficients are the residuals over the ridge, and the bias balances the classes.
    np.testing.assert_allclose((soft(found.train_scores) - wanted).sum(0), 0, atol=1e-6)


def test_as_scikit_learn_does_on_features():
    x, labels = features()
    ridge = 0.05
    oracle = LogisticRegression(C=1 / ridge, tol=1e-10, max_iter=10_000).fit(x, labels)
    matrix = x @ x.T
    found = as_kernel(matrix).logistic(labels, ridge, tolerance=1e-10)
    wanted = oracle.decision_function(x)
    np.testing.assert_allclose(
        found.train_scores - found.train_scores.mean(1, keepdims=True),
        wanted - wanted.mean(1, keepdims=True),
        atol=1e-4,
    )
    np.testing.assert_allclose(soft(found.train_scores), oracle.predict_proba(x), atol=1e-5)


def test_the_gap_is_the_duality_gap_at_every_step():
    """Against the dual objective ``Σ_i H(P_i) − tr((Y − P)ᵀ K (Y − P))/(2·ridge)`` from its definition."""
    matrix, wanted = entries("full rank"), one_hot()
    ridge = 1e-2
    best = least(matrix, wanted, ridge)
    for steps in (1, 2, 4, 8):
        found = as_kernel(matrix).logistic(wanted, ridge, max_iterations=steps, tolerance=1e-14)
        assert (found.converged, found.iterations, found.passes) == (False, steps, steps + 1)
        chances = soft(found.train_scores)
        rest = wanted - chances
        np.testing.assert_allclose(rest.sum(0), 0, atol=1e-7)  # feasible in the dual
        dual = -(chances * np.log(chances)).sum() - np.trace(rest.T @ matrix @ rest) / (2 * ridge)
        assert found.loss - found.gap == pytest.approx(dual, rel=1e-7)
        assert 0 < found.loss - best <= found.gap


@pytest.mark.parametrize("ratio", [1e-1, 1e-3, 1e-5])
def test_few_passes_whatever_the_ridge_and_without_a_preconditioner(ratio):
    """Böhning's bound ``K/2 + ridge``, solved exactly, takes more of them: why none is an argument."""
    matrix, wanted = entries("full rank"), one_hot()
    ridge = ratio * matrix.diagonal().mean()
    found = as_kernel(matrix).logistic(wanted, ridge)
    assert found.converged
    assert found.passes <= 30
    bound = np.linalg.inv(matrix / 2 + ridge * np.eye(ROWS))
    assert _preconditioned_passes(matrix, wanted, ridge, bound, found.loss * (1 + 1e-4)) > found.passes


def _preconditioned_passes(matrix, targets, ridge, inverse, wanted_loss):
    """Passes of the same descent with a preconditioner, until the loss is no larger than wanted."""
    fit = logistic._Fit(targets, ridge, np.zeros_like(targets), np.zeros_like(targets), np.log(targets.mean(0)))
    direction = before = np.zeros_like(targets)
    slope_before = np.inf
    for passes in range(1000):
        loss, gradient = fit.gradient()
        if loss <= wanted_loss:
            return passes
        moved = inverse @ gradient
        slope = np.vdot(gradient, matrix @ moved)
        turn = max(0.0, slope - np.vdot(before, matrix @ moved)) / slope_before
        direction = turn * direction - moved
        if np.vdot(direction, matrix @ gradient) >= 0:
            direction = -moved
        before, slope_before = gradient, slope
        fit.step(direction, matrix @ direction)
    return passes


@pytest.fixture(scope="module")
def stored(memory_folder, rates):
    """The trace kernel of a small network in tiles of 12: 60 train and 10 test digits of 4 classes."""
    images, labels = digits(CLASSES)
    module = ooc_ntk.Job("mlp,width=8", (images[:60], labels[:60])).module()
    job = ooc_ntk.Job(module, (images[:60], labels[:60]), test=(images[60:70], labels[60:70]), device="cpu")
    budget = ooc_ntk.Budget(host="16GiB", device="16GiB", disk="1GiB")
    plan = ooc_ntk.plan(job, budget, preferences=ooc_ntk.Preferences(tile_samples=12), rates=rates)
    return ooc_ntk.run(job, memory_folder / "logistic", plan=plan, progress=False), labels[:60].numpy()


def test_tiles_on_disk_and_views_give_what_arrays_give(stored, monkeypatch):
    kernel, labels = stored
    assert kernel.chunk_rows == 12
    whole = np.asarray(kernel, dtype=np.float64)
    calls = []
    monkeypatch.setattr(
        Kernel, "matmat", lambda self, x, **options: calls.append(1) or super(Kernel, self).matmat(x, **options)
    )
    for view, matrix in ((kernel, whole[:60]), (kernel.cosine(), kernel.cosine()[:60])):
        ridge = 1e-3 * matrix.diagonal().mean()
        calls.clear()
        found = view.logistic(labels, ridge)
        if view is kernel:
            assert len(calls) == found.passes
        oracle = as_kernel(matrix).logistic(labels, ridge)
        np.testing.assert_allclose(found.train_scores, oracle.train_scores, atol=1e-6)
        assert found.loss == pytest.approx(objective(matrix, np.eye(4)[labels], ridge, found.coefficients, found.bias))


def test_a_constant_kernel_is_fitted_by_the_bias_alone():
    labels = features()[1]
    found = as_kernel(np.ones((ROWS, ROWS))).logistic(labels, 1.0)
    assert (found.converged, found.passes) == (True, 1)
    shares = np.bincount(labels) / ROWS
    np.testing.assert_allclose(soft(found.train_scores), np.tile(shares, (ROWS, 1)), rtol=1e-12)


def test_rounding_errors_end_the_descent_and_are_said():
    """A kernel with a negative eigenvalue has no such loss: what is returned does not count as converged."""
    matrix = entries("low rank") - 0.5 * np.eye(ROWS)
    found = as_kernel(matrix).logistic(features()[1], 1e-4, tolerance=1e-12)
    assert not found.converged
    assert np.isfinite(found.train_scores).all()


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        (np.zeros(ROWS - 1, int), {}, rf"targets must be {ROWS} class labels.*got shape \({ROWS - 1},\)"),
        (np.zeros((ROWS, 2, 2)), {}, r"got shape \(80, 2, 2\)"),
        (np.zeros(ROWS), {}, "class labels must be whole numbers, got float64"),
        (np.arange(ROWS) - 1, {}, "label -1 is out of range"),
        (np.arange(ROWS), {"classes": 5}, "label 5 is out of range: labels run from 0 to 4"),
        (np.full((ROWS, 4), 0.3), {}, "must be probabilities"),
        (np.full((ROWS, 4), 0.25), {"classes": 3}, "4 columns for 3 classes"),
        (np.full((ROWS, 4), np.nan), {}, "must be probabilities"),
        (np.zeros(ROWS, int), {}, "needs at least 2 classes, got 1"),
        (np.arange(ROWS) % 3, {"classes": 4}, "class 3 is no train sample's.*no finite value.*--targets outputs"),
        (np.arange(ROWS) % 4, {"ridge": 0.0}, "must be above 0 and finite, got 0"),
        (np.arange(ROWS) % 4, {"ridge": np.nan}, "must be above 0 and finite, got nan"),
        (np.arange(ROWS) % 4, {"tolerance": 0.0}, "tolerance must be between 0 and 1, got 0"),
        (np.arange(ROWS) % 4, {"max_iterations": 0}, "max_iterations must be at least 1, got 0"),
    ],
)
def test_bad_inputs(targets, options, message):
    with pytest.raises(InputError, match=message):
        as_kernel(entries("full rank")).logistic(targets, **{"ridge": 1.0, **options})


def test_arrays_that_do_not_fit_are_refused_before_a_pass(monkeypatch):
    kernel, labels = as_kernel(entries("full rank")), features()[1]
    before = resident_bytes()
    with pytest.raises(
        BudgetError, match=r"80 rows × 4 classes needs .*; 0 B were allowed: .* the process holds"
    ) as refused:
        kernel.logistic(labels, 1.0, budget=ooc_ntk.Budget(host=before))
    enough = re.search("a host budget of (.*) would do", str(refused.value)).group(1)
    assert kernel.logistic(labels, 1.0, budget=ooc_ntk.Budget(host=enough)).converged
    monkeypatch.setattr(dense, "free_host_bytes", lambda: 1000)
    with pytest.raises(BudgetError, match="800 B are free to use"):
        kernel.logistic(labels, 1.0)


def test_labels_that_are_numbers_of_something_else_are_refused():
    labels = np.arange(ROWS) * 10**9
    with pytest.raises(InputError, match="labels of 79,000,000,001 classes are not made into columns, at most 2,000"):
        as_kernel(entries("full rank")).logistic(labels, 1.0)
