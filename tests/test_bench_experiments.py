"""The experiments run in tiny sizes, and compare what they say. Nothing is timed, and nothing is judged."""

import doctest
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from bench.algebra_kernels import one_hot
from bench.experiments import __main__ as experiments
from bench.experiments import figures, gcv, neighbours
from bench.experiments.finding import FRESH, TEST_START, Setting
from bench.sentences import missing_packages
from ooc_ntk import demo
from ooc_ntk.compute.machine import limited_threads
from ooc_ntk.compute.rates import rates_path
from ooc_ntk.planning.rates import MachineRates

SMOKE = ("--smoke", "--threads", "1")


@pytest.fixture(autouse=True)
def _calibrated(rates: MachineRates) -> None:
    with limited_threads(1):  # more threads than free cores would make tiny products take minutes
        rates_path("cpu").write_text(rates.to_json())


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("experiments")
    return Setting(folder / "out", folder / "work", smoke=True)


def perform(name: str, setting: Setting, capsys: pytest.CaptureFixture[str]) -> dict:
    """Run an experiment by its command line; figure, record and printed text belong together."""
    places = ("--out", str(setting.out), "--work", str(setting.work))
    (record,) = experiments.main([name, *places, *SMOKE])
    text = capsys.readouterr().out
    assert json.loads((setting.out / f"{name}.json").read_text()) == json.loads(json.dumps(record))
    assert record["agrees"] == "not judged in smoke size"
    assert "Agrees: not judged in" in text.replace("\n", " ")
    assert record["title"] in text
    with Image.open(setting.out / f"{name}.png") as picture:
        assert min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(2**24)) > 10  # not an empty page
    assert (setting.out / f"{name}.png").stat().st_size < 150_000
    return record["numbers"]


def test_residuals_fall_and_are_predicted(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    found = perform("residuals", setting, capsys)
    assert list(found["slopes"]) == ["sjlt"]
    assert all(slope < 0 for slope in found["slopes"].values())
    assert len(found["residuals"]) == 8  # two kernels, plain and cosine, two dims
    assert 0.3 < found["predicted_over_observed"]["least"] <= found["predicted_over_observed"]["most"] < 3
    assert sum(found["tails"].values()) == sum(found["standardised_tails"].values()) == 4


def test_surrogates_of_every_kernel(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    found = perform("surrogates", setting, capsys)["surrogates"]
    labels = ["trNTK", "trNTK, not normalised", "pNTK", "projected trNTK", "projected pNTK", "embedding", "conjugate"]
    assert list(found) == labels
    assert found["projected pNTK"]["kernel"] == "pseudo sjlt:128"
    assert found["embedding"]["kernel"] == "embedding:*"
    for each in found.values():
        assert each["kind"] == "logistic"
        assert -1 <= each["kendall_tau"]["value"] <= 1
        assert each["solver"]["converged"]
    assert found["trNTK"]["kendall_tau"] != found["trNTK, not normalised"]["kendall_tau"]
    # A random kernel of as many columns would not come so near to the exact one.
    assert abs(found["trNTK"]["kendall_tau"]["value"] - found["projected trNTK"]["kendall_tau"]["value"]) < 0.15


def test_neighbours_by_every_kernel(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    found = perform("neighbours", setting, capsys)
    assert found["shared_with_trace"]["trNTK"] == 1
    assert found["shared_with_trace"]["projected trNTK"] > 0.6
    assert found["same_class"]["trNTK"]["all_k"] > 3 * found["same_class"]["trNTK"]["by_chance"]
    shown = [[row["index"] for row in rows] for rows in found["shown"].values()]
    assert all(rows == shown[0] for rows in shown)  # one line a kernel, the same test digits in each
    assert all(len(row["neighbours"]) == neighbours.NEAREST for row in found["shown"]["pNTK"])


def test_gcv_beside_the_risk(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    found = perform("gcv", setting, capsys)
    for curves in found["curves"].values():
        assert [each["samples"] for each in curves] == [40, 80]
        assert all(each["risk_at_gcv_over_least"] >= 1 for each in curves)
    # Of the initial network no digit is known to it, and leave-one-out has no bias: 80 digits leave this much noise.
    assert abs(found["median_off"]["initial network"]["loo"]) < 0.3


def test_curves_of_a_part_of_a_kernel_are_their_definitions(setting: Setting) -> None:
    whole = setting.digits_kernel(trained=False, fresh=True)
    kernel = gcv.leading(whole, 30)
    matrix = np.asarray(whole, dtype=np.float64)
    square, rows = matrix[:30, :30], matrix[setting.train_samples :, :30]
    assert kernel.samples == (30, setting.test_samples)
    assert np.array_equal(np.asarray(kernel), np.concatenate([square, rows]))
    known = [demo.digits(first, first + count)[1].numpy() for first, count in ((FRESH, 30), (TEST_START, 40))]
    targets, wanted = (one_hot(labels) for labels in known)
    ratios = np.array([1e-3, 1e-1])
    found = gcv.curve(kernel, np.concatenate(known), ratios)
    for number, ridge in enumerate(ratios * np.diag(square).mean()):
        inverse = np.linalg.inv(square + ridge * np.eye(30))
        solved = inverse @ targets
        assert np.isclose(found.gcv[number], (solved**2).mean() / np.diag(inverse).mean() ** 2)
        assert np.isclose(found.loo[number], ((solved / np.diag(inverse)[:, None]) ** 2).mean())
        assert np.isclose(found.risk[number], ((rows @ solved - wanted) ** 2).mean())


def test_spectra_of_both_networks(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    found = perform("spectra", setting, capsys)
    assert len(found["decay"]) == (1 if missing_packages() else 2)
    for pair in found["eigenvalues"].values():
        for values in pair.values():
            assert (np.diff(values) <= 0).all()
            assert abs(values[-1]) < 1e-6 * values[0]  # what is centred has one direction less
    assert 0 < found["labels_in_first"]["trained"]["10"] < 1


def test_networks_of_the_demonstration_by_seed(tmp_path: Path, setting: Setting) -> None:
    drawn = {}
    for name, (epochs, samples, seed) in {"a": (0, 64, 0), "b": (0, 64, 1), "c": (1, 64, 0), "d": (1, 128, 0)}.items():
        demo.train(tmp_path / f"{name}.safetensors", epochs, samples=samples, seed=seed)
        drawn[name] = load_file(tmp_path / f"{name}.safetensors")["0.weight"]
    assert len({tuple(weights.flatten().tolist()) for weights in drawn.values()}) == 4
    initial = load_file(setting.weights(trained=False))["0.weight"]
    assert np.array_equal(initial, drawn["a"])  # the trained one begins where the initial one is


def test_list_and_wrong_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert experiments.main(["--list"]) == []
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(experiments.EXPERIMENTS)
    for arguments, message in (
        (["residual"], "got 'residual'"),
        ([], "give the name of an experiment"),
        (["gcv", "--threads", "0"], "--threads must be at least 1"),
    ):
        with pytest.raises(SystemExit) as stopped:
            experiments.main([*arguments, "--out", str(tmp_path / "none")])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_labels_keep_their_distance() -> None:
    assert doctest.testmod(figures).failed == 0
    places = figures.spread([5.0, 0.0, 0.1, 0.2], 1.0)
    assert np.diff(sorted(places)).min() >= 1 - 1e-9
    assert np.argsort(places).tolist() == [1, 2, 3, 0]
