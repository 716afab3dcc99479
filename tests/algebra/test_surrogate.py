"""Kernel surrogates of a trained network: every figure against NumPy, SciPy and scikit-learn, and what is refused."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from sklearn.linear_model import LinearRegression
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

import ooc_ntk
from ooc_ntk.algebra import surrogate as surrogate_module
from ooc_ntk.algebra.faithfulness import ClassOutputs, log_odds
from ooc_ntk.algebra.surrogate import fit_surrogate
from ooc_ntk.errors import BudgetError, InputError, RunConflictError, StorageError
from ooc_ntk.execution.predictions import class_outputs
from ooc_ntk.execution.prepare import prepare
from ooc_ntk.inputs.text.network import TextNetwork
from tests.cases import case, digits

TRAIN, TEST = 120, 50

pytestmark = pytest.mark.usefixtures("one_thread", "frozen")


def trained(outputs=10):
    """A network that is right of most digits, but not sure of all."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, outputs))
    images, labels = digits()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(module(images[:TRAIN]), labels[:TRAIN]).backward()
        optimizer.step()
    return module.eval()


@pytest.fixture(scope="module")
def network():
    return trained()


def job_of(network, **options):
    images, labels = digits()
    stop = TRAIN + TEST
    data = {"train": (images[:TRAIN], labels[:TRAIN]), "test": (images[TRAIN:stop], labels[TRAIN:stop])}
    return ooc_ntk.Job(network, **{**data, "device": "cpu", **options})


def run(job, folder, rates):
    budget = ooc_ntk.Budget(host="16GiB", device="16GiB", disk="1GiB")
    plan = ooc_ntk.plan(job, budget, preferences=ooc_ntk.Preferences(tile_samples=30), rates=rates)
    return ooc_ntk.run(job, folder, plan=plan, progress=False)


@pytest.fixture(scope="module")
def kernel(network, memory_folder, rates):
    return run(job_of(network), memory_folder / "surrogates", rates)


@pytest.fixture(scope="module")
def outputs(network):
    return class_outputs(prepare(job_of(network)), 32)


def softmax(scores):
    return torch.softmax(torch.from_numpy(scores), 1).numpy()


def own(chances, labels):
    return chances[np.arange(len(labels)), labels]


def test_the_networks_outputs_are_what_it_says(network, outputs):
    images, labels = digits()
    with torch.no_grad():
        wanted = network(images[: TRAIN + TEST]).double().numpy()
    np.testing.assert_allclose(outputs.train_scores, wanted[:TRAIN], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(outputs.test_scores, wanted[TRAIN:], rtol=1e-5, atol=1e-6)
    assert np.array_equal(outputs.train_labels, labels[:TRAIN])
    assert np.array_equal(outputs.test_labels, labels[TRAIN : TRAIN + TEST])
    assert outputs.accuracy == (wanted[TRAIN:].argmax(1) == outputs.test_labels).mean()
    assert 0.7 < outputs.accuracy < outputs.train_accuracy
    single = class_outputs(prepare(job_of(network, allow_batch_dependence=True)), 32)
    np.testing.assert_allclose(single.test_scores, outputs.test_scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("targets", ["labels", "outputs"])
@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_figures_are_those_of_numpy_scipy_and_scikit_learn(kernel, outputs, kind, targets):
    found = fit_surrogate(kernel, outputs, kind, name="trace", targets=targets, ridge_ratio=1e-2, tolerance=1e-9)
    entries = np.asarray(kernel, dtype=np.float64)
    ridge = 1e-2 * entries[:TRAIN].diagonal().mean()
    one_hot = np.eye(10)[outputs.train_labels]
    if kind == "ridge":
        wanted = one_hot if targets == "labels" else outputs.train_scores
        solved = np.linalg.solve(entries[:TRAIN] + ridge * np.eye(TRAIN), wanted - wanted.mean(0))
        np.testing.assert_allclose(found.coefficients, solved, rtol=1e-6, atol=1e-9 * np.abs(solved).max())
        np.testing.assert_allclose(found.bias, wanted.mean(0))
        assert found.solver["residual"] < 1e-10
    else:
        wanted = one_hot if targets == "labels" else softmax(outputs.train_scores)
        # The gradient is 0 just where the coefficients are the residuals over the ridge.
        residuals = wanted - softmax(entries[:TRAIN] @ found.coefficients + found.bias)
        error = ridge * found.coefficients - residuals
        assert np.trace(error.T @ entries[:TRAIN] @ error) / (2 * ridge) < 1e-6
        assert found.solver["converged"]
    assert found.ridge == pytest.approx(ridge)
    np.testing.assert_allclose(found.train_scores, entries[:TRAIN] @ found.coefficients + found.bias, atol=1e-6)
    scores = entries[TRAIN:] @ found.coefficients + found.bias
    np.testing.assert_allclose(found.test_scores, scores, atol=1e-6)
    labels = outputs.test_labels
    mine, theirs = own(softmax(scores), labels), own(softmax(outputs.test_scores), labels)
    np.testing.assert_allclose(found.probability, mine, atol=1e-6)
    np.testing.assert_allclose(found.network_probability, theirs, atol=1e-6)
    assert found.accuracy.value == (scores.argmax(1) == labels).mean()
    assert found.train_accuracy == (found.train_scores.argmax(1) == outputs.train_labels).mean()
    assert found.accuracy_difference.value == pytest.approx(outputs.accuracy - found.accuracy.value)
    assert found.kendall_tau.value == pytest.approx(kendalltau(theirs, mine).statistic, abs=1e-3)
    x, y = np.log(mine / (1 - mine))[:, None], np.log(theirs / (1 - theirs))
    assert found.r_squared.value == pytest.approx(LinearRegression().fit(x, y).score(x, y), abs=1e-6)
    assert found.notes == ()


def test_fitted_to_its_outputs_a_surrogate_is_closer_to_the_network(kernel, outputs):
    by_labels, by_outputs = (
        fit_surrogate(kernel, outputs, "ridge", name="trace", targets=targets) for targets in ("labels", "outputs")
    )
    assert by_outputs.kendall_tau.value > by_labels.kendall_tau.value
    assert by_outputs.r_squared.value > 0.9


def test_standard_errors_are_those_of_shares_and_of_the_seed(kernel, outputs):
    found = fit_surrogate(kernel, outputs, "ridge", name="trace", seed=3)
    share = found.accuracy.value
    assert found.accuracy.error == pytest.approx(np.sqrt(share * (1 - share) / TEST), rel=0.2)
    right, theirs = (scores.argmax(1) == outputs.test_labels for scores in (found.test_scores, outputs.test_scores))
    paired = theirs.astype(float) - right
    assert found.accuracy_difference.error == pytest.approx(paired.std() / np.sqrt(TEST), rel=0.2)
    assert 0 < found.kendall_tau.error < 0.2
    again = fit_surrogate(kernel, outputs, "ridge", name="trace", seed=3)
    other = fit_surrogate(kernel, outputs, "ridge", name="trace", seed=4)
    assert again.kendall_tau == found.kendall_tau != other.kendall_tau


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_the_budget_bounds_the_fit(kind, kernel, outputs):
    with pytest.raises(BudgetError, match="host budget"):
        fit_surrogate(kernel, outputs, kind, name="trace", budget=ooc_ntk.Budget(host="1MiB"))


def test_log_odds_do_not_cancel_where_probabilities_are_one():
    scores = np.array([[50.0, 0.0, 0.0], [80.0, 0.0, 0.0], [0.0, 1.0, 2.0]])
    found = log_odds(scores, np.array([0, 0, 1]))
    chance = np.exp(1) / (1 + np.exp(1) + np.exp(2))
    np.testing.assert_allclose(found, [50 - np.log(2), 80 - np.log(2), np.log(chance / (1 - chance))], rtol=1e-14)


def test_a_network_that_says_the_same_of_all_has_no_tau(kernel, outputs):
    flat = ClassOutputs(
        outputs.train_scores, np.zeros_like(outputs.test_scores), outputs.train_labels, outputs.test_labels
    )
    found = fit_surrogate(kernel, flat, "ridge", name="trace")
    assert np.isnan([found.kendall_tau.value, found.kendall_tau.error, found.r_squared.value]).all()
    assert "the network's probability of the own class is the same for all test samples" in found.notes[0]
    assert np.isfinite(found.accuracy.value)


def test_a_fit_that_stopped_early_says_so(kernel, outputs, monkeypatch):
    solve = surrogate_module.solve_logistic
    monkeypatch.setattr(surrogate_module, "solve_logistic", lambda *args, **o: solve(*args, max_iterations=2, **o))
    found = fit_surrogate(kernel, outputs, "logistic", name="trace")
    assert found.solver["converged"] is False
    assert "stopped after 3 passes, its loss up to" in found.notes[0]


def test_the_verb_runs_baselines_and_keeps_everything(network, kernel):
    job = job_of(network)
    said = []
    found = ooc_ntk.surrogate(kernel.path, job, progress=False, advance=said.append)
    names = ["trace", "embedding:*", "conjugate"]
    assert [each.name for each in found.surrogates] == [f"{k} {kind}" for k in names for kind in ("ridge", "logistic")]
    assert "running the baseline conjugate" in said
    folder = kernel.path / "surrogate"
    figures = json.loads((folder / "surrogate.json").read_text())
    assert figures["network"]["accuracy"] == found.network.accuracy
    assert figures["surrogates"][1]["kendall_tau"]["value"] == found.surrogates[1].kendall_tau.value
    arrays = np.load(folder / "surrogate.npz")
    np.testing.assert_array_equal(arrays["trace.logistic.coefficients"], found.surrogates[1].coefficients)
    np.testing.assert_array_equal(arrays["network.test_scores"], found.network.test_scores)
    assert {each.split(".")[0] for each in arrays.files} == {"network", *names}
    # The conjugate kernel is that of the last layer's input, over its width.
    with torch.no_grad():
        hidden = network[:3](digits()[0][: TRAIN + TEST]).double().numpy()
    conjugate = ooc_ntk.open(folder / "conjugate")
    np.testing.assert_allclose(np.asarray(conjugate), hidden @ hidden[:TRAIN].T / 24, rtol=1e-5, atol=1e-7)
    # With it, the network's outputs are linear: a small ridge finds them again.
    exact = ooc_ntk.surrogate(
        kernel.path, job, kinds=["ridge"], baselines=["conjugate"], targets="outputs", ridge_ratio=1e-5, progress=False
    )
    assert abs(exact.surrogates[1].accuracy_difference.value) < 0.03
    assert exact.surrogates[1].r_squared.value > 0.99


def test_a_projected_run_and_one_of_features(network, memory_folder, rates):
    projected = run(job_of(network, projection="sjlt:256"), memory_folder / "projected", rates)
    found = ooc_ntk.surrogate(projected.path, job_of(network, projection="sjlt:256"), baselines=(), progress=False)
    assert [each.kernel for each in found.surrogates] == ["trace sjlt:256"] * 2
    job = job_of(network, kernel="embedding")
    features = run(job, memory_folder / "features", rates)
    same = ooc_ntk.surrogate(features.path, job, baselines=("embedding",), kinds=["logistic"], progress=False)
    assert [each.name for each in same.surrogates] == ["embedding logistic"]


def test_a_network_of_one_output_tells_two_classes(memory_folder, rates):
    images, labels = digits(2)
    data = {"train": (images[:40], labels[:40]), "test": (images[40:60], labels[40:60])}
    torch.manual_seed(1)
    job = job_of(nn.Sequential(nn.Flatten(), nn.Linear(64, 1)).eval(), **data)
    found = ooc_ntk.surrogate(run(job, memory_folder / "single", rates).path, job, baselines=(), progress=False)
    assert found.network.classes == 2
    assert (found.network.test_scores[:, 0] == 0).all()
    assert [each.accuracy.value for each in found.surrogates] == pytest.approx([1, 1], abs=0.1)


class Encoder(TextNetwork):
    """Stands for a transformer that was read as an encoder: its outputs are an embedding."""

    def __init__(self):
        nn.Module.__init__(self)
        self.task, self.layer = "encoder", nn.Linear(64, 12)

    def forward(self, x):
        return self.layer(x.flatten(1))


def images_of(start, stop, labels="class"):
    images, known = digits()
    part = images[start:stop]
    if labels == "none":
        return part
    return part, {"real": known[start:stop].float(), "far": known[start:stop] + 1}.get(labels, known[start:stop])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test": None}, r"give test data to the job \(--test\)"),
        ({"train": images_of(0, TRAIN, "none"), "test": images_of(TRAIN, TRAIN + TEST)}, "have no class labels"),
        ({"test": images_of(TRAIN, TRAIN + TEST, "none")}, r"test samples \[0:32\] have no class labels"),
        ({"test": images_of(TRAIN, TRAIN + TEST, "real")}, "one whole number a sample.*have float32"),
        ({"test": images_of(TRAIN, TRAIN + TEST, "far")}, "label 10 is out of range: the network tells 10 classes"),
        ({"outputs": "loss"}, "outputs 'loss' may look at each sample's label.*'logits' or 'logprob'"),
        ({"outputs": "margin"}, "outputs 'margin' may look"),
        ({"outputs": lambda z, target: z}, "outputs of a function may look"),
        ({"model": Encoder().eval()}, "read as task=encoder; surrogates need a classifier"),
        ({"model": nn.Sequential(nn.Unflatten(3, (2, 4)), nn.Linear(4, 3)).eval()}, r"returned \(32, 1, 8, 2, 3\)"),
    ],
)
def test_what_has_no_class_outputs(network, options, message):
    options = dict(options)
    with pytest.raises(InputError, match=message):
        class_outputs(prepare(job_of(options.pop("model", network), **options)), 32)


def test_runs_and_names_that_are_refused(network, kernel, outputs, memory_folder, rates):
    job = job_of(network)
    for options, message in (
        ({"kinds": ["lasso"]}, "unknown kind of surrogate 'lasso'"),
        ({"kinds": []}, "no kind of surrogate"),
        ({"baselines": ["embeding"]}, "unknown baseline 'embeding'; did you mean 'embedding"),
        ({"targets": "logits"}, "unknown targets of a surrogate 'logits'"),
        ({"ridge_ratio": 0.0}, "ridge ratio must be above 0 and finite, got 0.0; the default is 0.001"),
    ):
        with pytest.raises(InputError, match=message):
            ooc_ntk.surrogate(kernel.path, job, progress=False, **{"baselines": (), **options})
    with pytest.raises(InputError, match="give the model"):
        ooc_ntk.surrogate(kernel.path, progress=False)
    with pytest.raises(RunConflictError, match="another job: model"):
        ooc_ntk.surrogate(kernel.path, job_of(case("smooth-mlp").module), progress=False)
    with pytest.raises(StorageError, match="holds no run"):
        ooc_ntk.surrogate(memory_folder / "nothing", job)
    fewer = ClassOutputs(outputs.train_scores[:9], outputs.test_scores, outputs.train_labels[:9], outputs.test_labels)
    with pytest.raises(InputError, match="outputs are of 9 train and 50 test samples, the kernel's rows of 120 and 50"):
        fit_surrogate(kernel, fewer, "ridge", name="trace")
    small = {"train": images_of(0, 12), "test": images_of(12, 15)}
    full = run(job_of(network, kernel="full", **small), memory_folder / "full", rates)
    with pytest.raises(InputError, match="one kernel row a sample, and a full kernel has 10"):
        ooc_ntk.surrogate(full.path, job_of(network, kernel="full", **small))
    square = run(job_of(network, **{**small, "test": None}), memory_folder / "square", rates)
    with pytest.raises(InputError, match="no test rows"):
        ooc_ntk.surrogate(square.path, job_of(network, **{**small, "test": None}))
