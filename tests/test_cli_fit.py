"""``ooc-ntk fit``: kernel regression from the command line, its ridge by GCV, beside scikit-learn's."""

import json

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge
from torch import nn

import ooc_ntk
from ooc_ntk.errors import InputError
from ooc_ntk.execution.fitting import RIDGE_RATIOS
from tests.cases import digits
from tests.named import command, done, refused

TRAIN, TEST = 120, 40


@pytest.fixture(scope="module")
def run(memory_folder, rates):
    """Digits, trace kernel in float64."""
    job = ooc_ntk.Job("mlp,width=64", f"digits[0:{TRAIN}]", test=f"digits[{TRAIN}:{TRAIN + TEST}]", precision="float64")
    return ooc_ntk.run(job, memory_folder / "fit", progress=False).path


@pytest.fixture(scope="module")
def labels():
    source = ooc_ntk.Job("mlp", f"digits[0:{TRAIN + TEST}]").train_source()
    return source.targets(0, TRAIN + TEST).numpy()


def read(run):
    folder = run / "fit"
    with np.load(folder / "fit.npz") as arrays:
        return json.loads((folder / "fit.json").read_text()), dict(arrays)


def test_labels_are_fitted_with_the_ridge_that_gcv_chooses(run, labels):
    shown = done("fit", run)
    figures, arrays = read(run)
    kernel = np.asarray(ooc_ntk.open(run))
    targets = np.eye(10)[labels] - 0.1
    ridge = KernelRidge(kernel="precomputed", alpha=figures["ridge"]).fit(kernel[:TRAIN], targets[:TRAIN])
    np.testing.assert_allclose(
        arrays["coefficients"], ridge.dual_coef_, rtol=1e-6, atol=1e-9 * abs(ridge.dual_coef_).max()
    )
    predicted = ridge.predict(kernel[TRAIN:])
    np.testing.assert_allclose(arrays["predicted"], predicted, atol=1e-7)
    right = (predicted.argmax(1) == labels[TRAIN:]).mean()
    assert figures["accuracy"] == pytest.approx(right)
    assert f"{right:.2%} right" in shown
    assert figures["test_error"] == pytest.approx(((predicted - targets[TRAIN:]) ** 2).mean())
    curve = figures["curve"]
    assert len(curve["ridges"]) == len(RIDGE_RATIOS)
    assert curve["best_ridge"] == figures["ridge"] == curve["ridges"][int(np.argmin(curve["gcv"]))]
    fitted = ridge.predict(kernel[:TRAIN]).argmax(1) == labels[:TRAIN]
    assert figures["train_accuracy"] == pytest.approx(fitted.mean())
    assert (run / "fit" / "fit.png").stat().st_size > 10_000
    assert "errors over the ridge" in shown
    for name in ("fit.json", "fit.npz", "fit.png"):
        assert name in shown


def test_one_ridge_and_one_method(run, labels):
    figures = json.loads(done("fit", run, "--ridge-ratio", "1e-3", "--method", "cg", "--json"))
    assert (figures["method"], figures["curve"]) == ("cg", None)
    assert figures["ridge_ratio"] == pytest.approx(1e-3)
    assert figures["iterations"] > 0
    assert not done("fit", run, "--ridge", figures["ridge"], "-q")
    again, arrays = read(run)
    assert again["method"] == "cholesky"
    assert again["accuracy"] == figures["accuracy"]
    assert arrays["predicted"].shape == (TEST, 10)


def test_targets_of_a_file_for_train_rows_or_all(run, tmp_path):
    values = np.sin(np.arange(TRAIN + TEST) / 5)
    np.save(tmp_path / "all.npy", values)
    np.save(tmp_path / "train.npy", values[:TRAIN])
    done("fit", run, "--targets", tmp_path / "all.npy", "--ridges", "0.1,1,10,100", "--centered", "--cosine")
    figures, arrays = read(run)
    assert figures["view"] == "cosine centered"
    kernel = ooc_ntk.open(run).cosine().centered()
    mean = values[:TRAIN].mean()
    wanted = kernel.predict(kernel.solve(values[:TRAIN] - mean, figures["ridge"])) + mean
    np.testing.assert_allclose(arrays["predicted"], wanted, atol=1e-8)
    assert figures["test_error"] == pytest.approx(((wanted - values[TRAIN:]) ** 2).mean())
    assert figures["accuracy"] is None
    done("fit", run, "--targets", tmp_path / "train.npy")
    figures, _ = read(run)
    assert figures["test_error"] is None


def test_probes_in_place_of_the_spectrum(run):
    figures = json.loads(done("fit", run, "--method", "cg", "--ridges", "100,1000", "--probes", "4", "--json"))
    assert figures["curve"]["method"] == "cg"
    assert all(error > 0 for error in figures["curve"]["gcv_error"])


def test_a_full_kernel_is_fitted_class_by_class(memory_path, labels):
    job = ooc_ntk.Job("mlp,width=8", "digits[0:40]", test="digits[40:60]", kernel="full", precision="float64")
    kernel = ooc_ntk.run(job, memory_path / "full", progress=False)
    found = ooc_ntk.fit(kernel.path, ridge_ratio=1e-2)
    targets = (np.eye(10)[labels[:40]] - 0.1).reshape(-1)
    square = np.asarray(kernel)[:400]
    ridge = 1e-2 * square.diagonal().mean()
    wanted = np.asarray(kernel)[400:] @ np.linalg.solve(square + ridge * np.eye(400), targets)
    np.testing.assert_allclose(found.predicted, wanted, atol=1e-8)
    assert found.accuracy == pytest.approx((wanted.reshape(20, 10).argmax(1) == labels[40:60]).mean())


def test_live_data_and_no_test_rows(memory_path):
    images, classes = (values[:60] for values in digits(4))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    job = ooc_ntk.Job(model, (images, classes), device="cpu")
    ooc_ntk.run(job, memory_path / "live", progress=False)
    assert "give targets, or its job" in refused("fit", memory_path / "live")
    found = ooc_ntk.fit(memory_path / "live", job=job)
    assert found.predicted is None
    assert found.train_accuracy > 0.9
    np.save(memory_path / "y.npy", torch.nn.functional.one_hot(classes, 4).numpy())
    assert "mean squared error" not in done("fit", memory_path / "live", "--targets", memory_path / "y.npy")
    assert (memory_path / "live" / "fit" / "fit.png").exists()


def test_without_matplotlib_all_but_the_picture(run, monkeypatch):
    from ooc_ntk.report import pictures

    (run / "fit" / "fit.png").unlink(missing_ok=True)
    monkeypatch.setattr(pictures, "can_draw", lambda: False)
    assert "ooc-ntk[plots]" in done("fit", run, "--ridge-ratio", "1e-2")
    assert not (run / "fit" / "fit.png").exists()
    assert (run / "fit" / "fit.json").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--ridge", "1", "--ridge-ratio", "1"), "ridge and ridge_ratio both say what the ridge is"),
        (("--ridge", "-1"), "ridge must be at least 0"),
        (("--ridges", "1,a"), "--ridges takes numbers between commas"),
        (("--ridges", "1,-1"), "ridge must be at least 0, got -1"),
        (("--targets", "nowhere.npy"), "no file of targets nowhere.npy"),
        (("--method", "lu"), "unknown method 'lu'"),
        (("--method", "tiles"), "method 'tiles' solves for one ridge"),
        (("--ridge", "1", "--host-memory", "1MiB"), "raise the host budget"),
    ],
)
def test_bad_input(given, message, run):
    assert message in refused("fit", run, *given)


def test_bad_targets(run, tmp_path):
    for values, message in (
        (np.ones(7), f"targets must have {TRAIN} rows, one per train row of the kernel, or {TRAIN + TEST}"),
        (np.full(TRAIN, np.nan), "the targets hold NaN"),
        (np.full(TRAIN + TEST, np.nan), "the targets hold NaN"),
        (np.array(["a"] * TRAIN), "targets must be an array of numbers"),
    ):
        np.save(tmp_path / "y.npy", values)
        assert message in refused("fit", run, "--targets", tmp_path / "y.npy")
    (tmp_path / "y.npy").write_text("no array")
    assert "no NumPy file of numbers" in refused("fit", run, "--targets", tmp_path / "y.npy")
    with pytest.raises(InputError, match="array of numbers"):
        ooc_ntk.fit(run, [["a"]] * TRAIN)


def test_no_run_and_no_labels(tmp_path, memory_path):
    assert "holds no run" in refused("fit", tmp_path)
    np.save(memory_path / "x.npy", np.random.default_rng(0).standard_normal((9, 5)).astype("f4"))
    job = ("--model", "tests.test_cli_fit:small", "--train", memory_path / "x.npy", "--device", "cpu")
    done("run", *job, "--out", memory_path / "r", "-q")
    assert "have no class labels; give targets" in refused("fit", memory_path / "r")


def small():
    """A network of five inputs."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))


def test_help_says_what_is_kept():
    assert "RUN/fit" in command("fit", "--help").output


def test_ridges_below_the_rounding_of_a_float32_kernel_are_left_out(memory_path):
    """Features of 8 dimensions: a kernel of rank 8, whose rounding has eigenvalues below zero."""
    job = ("--model", "mlp,width=8", "--train", "digits[0:200]", "--test", "digits[200:240]", "--kernel", "embedding")
    done("run", *job, "--device", "cpu", "--out", memory_path / "r", "-q")
    shown = done("fit", memory_path / "r", "--ridges", "0,0.01,1")
    figures, _ = read(memory_path / "r")
    assert figures["curve"]["dropped"] == [0.0]
    assert "left out" in shown
    assert "not positive definite" in shown
    assert figures["ridge"] > max(figures["curve"]["dropped"])
