"""``ooc-ntk spectrum`` as a user types it: the table, the files, the pictures, and what is refused."""

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import ooc_ntk
from ooc_ntk import api
from ooc_ntk.algebra.alignment import LayerAlignment
from ooc_ntk.algebra.summary import MOST_CLASSES, label_targets
from ooc_ntk.compute.machine import resident_bytes
from ooc_ntk.errors import BudgetError, InputError
from ooc_ntk.execution import spectra
from ooc_ntk.report import pictures
from ooc_ntk.report.spectrum import draw_alignment, spectrum_table
from tests.cases import smooth_mlp

NETS = """
import torch


def small():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.Tanh(), torch.nn.Linear(8, 10))
"""

JOB = ("--model", "nets.py:small", "--train", "digits[0:60]", "--device", "cpu", "--quiet")


@pytest.fixture
def run(cli):
    assert cli("run", *JOB, "--out", "r", "--by", "layer", "--scheduler", "serial").exit_code == 0
    return Path("r")


def square(path: Path) -> np.ndarray:
    found = np.asarray(ooc_ntk.open(path), dtype=np.float64)
    found = found[: found.shape[1]]
    return np.tril(found) + np.tril(found, -1).T


def read(path: Path) -> tuple[dict, dict]:
    with np.load(path / "spectrum" / "spectrum.npz") as arrays:
        return json.loads((path / "spectrum" / "spectrum.json").read_text()), dict(arrays)


def test_the_whole_of_a_small_kernel(cli, run):
    result = cli("spectrum", run)
    assert result.exit_code == 0, result.output
    for phrase in (
        "60 of 60 eigenpairs, full",
        "decay",
        "α =",
        "labels of 10 classes",
        "100.00%",
        "pictures: r/spectrum",
    ):
        assert phrase in result.output
    figures, arrays = read(run)
    values, vectors = np.linalg.eigh(square(run))
    np.testing.assert_allclose(figures["values"], values[::-1], atol=1e-12 * values[-1])
    np.testing.assert_allclose(arrays["values"], figures["values"])
    np.testing.assert_allclose((arrays["vectors"] * arrays["values"]) @ arrays["vectors"].T, square(run), atol=1e-9)
    assert arrays["residuals"].max() == pytest.approx(figures["largest_residual"])
    assert figures["trace"] == pytest.approx(np.trace(square(run)))
    labels = np.asarray(ooc_ntk.Job("mlp", "digits[0:60]").train_source().targets(0, 60))
    targets = np.eye(10)[labels] - np.eye(10)[labels].mean(0)
    shares = ((vectors[:, ::-1].T @ targets) ** 2).sum(1) / (targets**2).sum()
    np.testing.assert_allclose(figures["target_shares"][:20], shares[:20], atol=1e-9)
    mean = values.mean()
    for each in figures["effective_dimension"]:
        ridge = each["ratio"] * mean
        assert each["lower"] == each["upper"] == pytest.approx((values.clip(0) / (values.clip(0) + ridge)).sum())
    assert (run / "spectrum" / "spectrum.png").read_bytes().startswith(b"\x89PNG")
    assert not (run / "spectrum" / "cka.png").exists()
    assert ooc_ntk.verify(run).passed


def test_leading_eigenpairs_layers_and_other_runs(cli, run):
    assert cli("run", *JOB, "--out", "q", "--projection", "sjlt:64", "--features-only").exit_code == 0
    result = cli("spectrum", run, "--k", "7", "--layers", "--compare", "q", "--centered", "--method", "krylov")
    assert result.exit_code == 0, result.output
    for phrase in ("7 of 60 eigenpairs, krylov", "float32, centred", "alignment (CKA) of layers", "other runs", " to "):
        assert phrase in result.output
    figures, arrays = read(run)
    centring = np.eye(60) - 1 / 60
    wanted = np.linalg.eigvalsh(centring @ square(run) @ centring)[::-1]
    np.testing.assert_allclose(figures["values"], wanted[:7], rtol=1e-9)
    assert arrays["vectors"].shape == (60, 7)
    kernel = ooc_ntk.open(run)
    assert figures["layers"]["names"] == list(kernel.layers)
    np.testing.assert_allclose(arrays["layer_cka"], kernel.layer_cka().matrix)
    assert figures["runs"] == {"q": pytest.approx(kernel.cka(ooc_ntk.open("q")))}
    assert (run / "spectrum" / "cka.png").read_bytes().startswith(b"\x89PNG")


def test_cosines_and_json(cli, run):
    result = cli("spectrum", run, "--cosine", "-k", "3", "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["kernel"] == "trace, train square 60 × 60 float32, as cosines"
    assert figures["trace"] == pytest.approx(60)
    assert len(figures["values"]) == figures["eigenpairs"] == 3
    assert cli("spectrum", run, "-k", "3", "--quiet").output == ""


def test_targets_from_a_file(cli, run):
    y = np.random.default_rng(0).normal(size=(60, 2))
    np.save("y.npy", y)
    result = cli("spectrum", run, "--targets", "y.npy")
    assert result.exit_code == 0, result.output
    assert "y.npy" in result.output
    _, vectors = np.linalg.eigh(square(run))
    shares = ((vectors[:, ::-1].T @ y) ** 2).sum(1) / (y**2).sum()
    np.testing.assert_allclose(read(run)[0]["target_shares"][:20], shares[:20], atol=1e-8)


def test_without_matplotlib_the_figures_are_there(cli, run, monkeypatch):
    monkeypatch.setattr(pictures, "can_draw", lambda: False)
    result = cli("spectrum", run)
    assert result.exit_code == 0, result.output
    assert "no pictures without matplotlib: python -m pip install 'ooc-ntk[plots]'" in result.output
    assert "figures and eigenvectors: r/spectrum" in result.output
    assert not (run / "spectrum" / "spectrum.png").exists()
    assert read(run)[0]["eigenpairs"] == 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--k", "61"), "k must be a whole number from 1 to 60"),
        (("--k", "3", "--all"), "all eigenpairs were asked for and k=3"),
        (("--method", "krilov"), "did you mean 'krylov'"),
        (("--method", "krylov", "--all"), "say how many: k=50"),
        (("--host-memory", "10KiB", "--all"), "0 B were allowed: ask for the leading eigenpairs alone"),
        (("--host-memory", "10KiB", "-k", "3", "--method", "krylov"), "0 B were allowed: ask for fewer eigenpairs"),
        (("--host-memory", "10KiB", "-k", "3", "--method", "lobpcg"), "0 B were allowed: ask for fewer eigenpairs"),
        (("--targets", "gone.npy"), "there is no file of targets gone.npy"),
        (("--targets", "text.npy"), "text.npy is no NumPy file of numbers"),
        (("--targets", "short.npy"), "targets must have 60 rows"),
        (("--compare", "nowhere"), "nowhere holds no run"),
        (("--compare", "q"), "are kernels of other data"),
        (("--compare", "fewer"), "kernels of 60 and 20 train rows"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, cli, run):
    np.save("short.npy", np.ones(3))
    Path("text.npy").write_text("no numbers")
    for name, data in (("q", "digits[1:61]"), ("fewer", "digits[0:20]")):
        if name in arguments:
            assert cli("run", *JOB, "--train", data, "--out", name).exit_code == 0
    result = cli("spectrum", run, *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert not (run / "spectrum").exists()


def test_other_data_by_wish(cli, run):
    assert cli("run", *JOB, "--train", "digits[1:61]", "--out", "q").exit_code == 0
    assert cli("spectrum", run, "--compare", "q", "--any-data").exit_code == 0
    assert 0 < read(run)[0]["runs"]["q"] < 1


def test_where_labels_are_not_known(cli, run, tmp_path, compute):
    images = torch.rand(20, 1, 8, 8)
    kernel = compute(ooc_ntk.Job(smooth_mlp().eval(), images, device="cpu"))
    result = cli("spectrum", kernel.path)
    assert result.exit_code == 0, result.output
    assert "none: the run in" in result.output
    assert "was made from live Python data" in result.output
    assert "layers" not in result.output
    assert cli("spectrum", kernel.path, "--layers").exit_code == 2


def test_a_full_kernel_takes_labels_by_output(cli):
    assert cli("run", *JOB, "--train", "digits[0:12]", "--kernel", "full", "--out", "r").exit_code == 0
    assert cli("spectrum", "r", "--all").exit_code == 0
    figures, _ = read(Path("r"))
    labels = np.asarray(ooc_ntk.Job("mlp", "digits[0:12]").train_source().targets(0, 12))
    y = (np.eye(10)[labels] - np.eye(10)[labels].mean(0)).reshape(-1)
    _, vectors = np.linalg.eigh(square(Path("r")))
    np.testing.assert_allclose(figures["target_shares"][:9], ((vectors[:, ::-1].T @ y) ** 2 / (y @ y))[:9], atol=1e-6)


def test_targets_of_labels():
    found = label_targets(np.array([2, 7, 2]), 1)
    np.testing.assert_allclose(found, [[1 / 3, -1 / 3], [-2 / 3, 2 / 3], [1 / 3, -1 / 3]])
    np.testing.assert_allclose(label_targets(np.array([0, 2]), 3), [[0.5], [0], [-0.5], [-0.5], [0], [0.5]])
    for labels in (np.zeros(4, dtype=np.int64), np.arange(MOST_CLASSES + 1)):
        with pytest.raises(InputError, match="classes, not of 2 to 2,000; give targets"):
            label_targets(labels, 1)
    with pytest.raises(InputError, match="has 3 outputs per sample and a label is 3; give targets of its 6 rows"):
        label_targets(np.array([0, 3]), 3)


def test_targets_of_labels_that_do_not_fit_are_left_out(cli, run):
    with pytest.raises(BudgetError, match="targets of 4 labels of 2 classes needs 128 B; 100 B were allowed: give"):
        label_targets(np.array([0, 1, 0, 1]), 1, 100)
    kernel = ooc_ntk.open(run)
    assert spectra._targets(kernel, None, None, None)[0].shape == (60, 10)
    found, why = spectra._targets(kernel, None, None, 1000)
    assert found is None
    assert "none: targets of 60 labels of 10 classes needs 9.4 KiB" in why


@pytest.mark.parametrize("options", [{"every": True}, {"k": 3, "method": "krylov"}, {"k": 3, "method": "lobpcg"}])
def test_the_host_budget_that_an_error_names_is_that_of_the_process_and_suffices(options, run):
    with pytest.raises(BudgetError, match="; 0 B were allowed: ask for .*the process holds") as refused:
        api.spectrum(run, budget=ooc_ntk.Budget(host=resident_bytes()), **options)
    assert "-" not in str(refused.value)
    enough = re.search("a host budget of (.*) would do", str(refused.value)).group(1)
    assert len(api.spectrum(run, budget=ooc_ntk.Budget(host=enough), **options).spectrum) == options.get("k", 60)


def test_targets_of_all_rows_are_those_of_the_train_rows(cli):
    assert cli("run", *JOB, "--test", "digits[60:65]", "--out", "tested").exit_code == 0
    y = np.random.default_rng(0).normal(size=65)
    found = api.spectrum("tested", 3, targets=y)
    assert found.targets == "given"
    np.testing.assert_allclose(found.alignment.shares, found.spectrum.alignment(y[:60]).shares)


def test_larger_kernels_take_fifty(cli, run, monkeypatch):
    monkeypatch.setattr(spectra, "WHOLE_ROWS", 59)
    assert len(api.spectrum(run).spectrum) == 50
    assert len(api.spectrum(run, every=True).spectrum) == 60


def test_a_spectrum_that_did_not_converge_says_so(cli, run, monkeypatch):
    from ooc_ntk.algebra import eigen

    monkeypatch.setattr(eigen, "MAX_PASSES", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = cli("spectrum", run, "-k", "20", "--method", "krylov")
    assert result.exit_code == 0, result.output
    assert "eigenpairs are not within the tolerance 1e-08" in result.output


def test_many_layers_are_a_picture(cli, run, tmp_path):
    from dataclasses import replace

    from rich.console import Console

    matrix = np.full((20, 20), 0.5)
    matrix[3] = matrix[:, 3] = np.nan
    names = tuple(f"a.rather.long.name.{index}" for index in range(20))
    found = replace(api.spectrum(run, 3), layers=LayerAlignment(names, matrix))
    console = Console(width=120, record=True)
    console.print(spectrum_table(found))
    assert "alignment (CKA) of 20 layers: see the picture" in console.export_text()
    draw_alignment(tmp_path / "many.png", names, matrix)
    draw_alignment(tmp_path / "few.svg", names[:4], matrix[:4, :4])
    assert (tmp_path / "many.png").stat().st_size > 1000
    assert "<svg" in (tmp_path / "few.svg").read_text()
