"""``ooc-ntk surrogate`` as a user types it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import ooc_ntk
from ooc_ntk.report import surrogates as shown

NETS = """
import torch
from sklearn.datasets import load_digits


def trained():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
    data = load_digits()
    images, labels = torch.tensor(data.images[:100], dtype=torch.float32) / 16, torch.tensor(data.target[:100])
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(30):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
    return net
"""

JOB = ("--model", "nets.py:trained", "--train", "digits[0:100]", "--test", "digits[100:140]", "--device", "cpu")

pytestmark = pytest.mark.usefixtures("one_thread", "frozen")


def test_table_files_and_picture(cli):
    assert cli("run", *JOB, "--out", "r", "--quiet").exit_code == 0
    result = cli("surrogate", "r")
    assert result.exit_code == 0, result.output
    for phrase in ("of 40 test samples right", "trace", "embedding:*", "conjugate", "network − surrogate", "passes"):
        assert phrase in result.output
    folder = Path("r/surrogate")
    assert (folder / "surrogate.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "surrogate.npz").exists()
    stored = json.loads((folder / "surrogate.json").read_text())
    assert len(stored["surrogates"]) == 6
    assert ooc_ntk.open(folder / "embedding-all").shape == (140, 100)
    before = (folder / "conjugate" / "plan.json").stat().st_mtime_ns
    again = cli("surrogate", "r", "--json")  # the baselines are there: the figures are the same
    assert json.loads(again.stdout) == stored
    assert (folder / "conjugate" / "plan.json").stat().st_mtime_ns == before
    assert cli("verify", "r").exit_code == 0  # what is in the folder is no part of the run
    assert cli("run", "--out", "r", "--quiet").exit_code == 0


def test_kinds_targets_and_ridge(cli):
    assert cli("run", *JOB, "--out", "r", "--quiet").exit_code == 0
    chosen = ("--kind", "logistic", "--targets", "outputs", "--ridge-ratio", "0.01", "--json")
    result = cli("surrogate", "r", *chosen, "--no-baselines")
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["surrogates"]
    assert (found["kernel"], found["kind"], found["targets"], found["ridge_ratio"]) == (
        "trace",
        "logistic",
        "outputs",
        0.01,
    )
    assert not Path("r/surrogate/conjugate").exists()
    quiet = cli("surrogate", "r", "--baseline", "conjugate", "--kind", "ridge", "-q")
    assert (quiet.exit_code, quiet.output) == (0, "")
    assert len(json.loads(Path("r/surrogate/surrogate.json").read_text())["surrogates"]) == 2


def test_without_matplotlib_the_picture_is_left_out_and_that_is_said(cli, monkeypatch):
    assert cli("run", *JOB, "--out", "r", "--quiet").exit_code == 0
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    result = cli("surrogate", "r", "--no-baselines", "--kind", "ridge")
    assert result.exit_code == 0, result.output
    assert "no picture: python -m pip install 'ooc-ntk[plots]'" in result.output
    assert not Path("r/surrogate/surrogate.png").exists()


def test_a_run_that_has_grown_gets_baselines_of_its_samples(cli):
    assert cli("run", *JOB, "--out", "r", "--quiet").exit_code == 0
    chosen = ("--kind", "ridge", "--baseline", "conjugate")
    assert cli("surrogate", "r", *chosen, "-q").exit_code == 0
    assert cli("extend", "r", "--train", "digits[150:170]", "-q").exit_code == 0
    result = cli("surrogate", "r", *chosen)
    assert result.exit_code == 0, result.output
    assert "deleting r/surrogate/conjugate, a baseline of the samples that the run had before" in result.output
    assert ooc_ntk.open("r/surrogate/conjugate").shape == (160, 120)
    assert "deleting" not in cli("surrogate", "r", *chosen).output


def test_wrong_inputs_are_one_line(cli):
    assert cli("run", *JOB, "--out", "r", "--quiet").exit_code == 0
    for arguments, words in (
        (("r", "--kind", "ridges"), "unknown kind of surrogate 'ridges'; did you mean 'ridge'?"),
        (("r", "--baseline", "conjugat"), "did you mean 'conjugate'?"),
        (("r", "--baseline", "conjugate", "--no-baselines"), "leave one of them out"),
        (("r", "--ridge-ratio", "0"), "ridge ratio must be above 0"),
        (("r", "--targets", "label"), "did you mean 'labels'?"),
        (("nowhere",), "holds no run"),
    ):
        result = cli("surrogate", *arguments)
        assert (result.exit_code, words in result.output) == (2, True), result.output
    assert not Path("r/surrogate").exists()


def test_a_run_of_a_live_model_needs_the_model(cli):
    sys.path.insert(0, ".")
    try:
        import nets

        job = ooc_ntk.Job(nets.trained().eval(), "digits[0:100]", test="digits[100:140]", device="cpu")
    finally:
        sys.path.remove(".")
        del sys.modules["nets"]
    ooc_ntk.run(job, "r", progress=False)
    result = cli("surrogate", "r", "--no-baselines")
    assert result.exit_code == 2
    assert "give the model, for example --model" in result.output
    result = cli("surrogate", "r", "--no-baselines", "--model", "nets.py:trained")
    assert result.exit_code == 0, result.output


def test_ticks_of_probabilities_are_few_and_inside():
    for low, high in ((-30.0, 40.0), (-3.0, 6.0), (-0.5, 0.5), (2.0, 3.0), (0.0, 0.0)):
        ticks = shown.log_odds_ticks(low, high)
        assert len(ticks) <= shown.TICKS
        assert all(low <= tick <= high for tick in ticks)
    wide = shown.log_odds_ticks(-30.0, 40.0)
    assert list(wide.values()) == ["10⁻⁸", "0.5", "1−10⁻⁸", "1−10⁻¹⁶"]
    assert list(wide) == pytest.approx([np.log(1e-8), 0, -np.log(1e-8), -np.log(1e-16)], abs=1e-6)
