"""The benchmark of the kernel's algebra runs, and what it compares agrees. Nothing is timed."""

import doctest
import re
from pathlib import Path

import pytest
import torch

from bench import algebra, algebra_kernels, algebra_large, bars
from ooc_ntk.compute.machine import limited_threads
from ooc_ntk.compute.rates import rates_path
from ooc_ntk.planning.rates import MachineRates


@pytest.fixture(autouse=True)
def _calibrated(rates: MachineRates) -> None:
    with limited_threads(1):  # more threads than free cores would make tiny products take minutes
        rates_path("cpu").write_text(rates.to_json())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def run(capsys: pytest.CaptureFixture[str], folder: Path, parts: str) -> str:
    algebra.main(["--smoke", "--threads", "1", "--folder", str(folder), "--parts", parts])
    return capsys.readouterr().out


def figure(text: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} = (\S+?)(;|$)", text, re.MULTILINE)
    assert found is not None, (name, text)
    return float(found[1])


def test_solutions_are_those_of_scipy(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    text = run(capsys, folder, "equal,iterations")
    assert figure(text, "largest error of coefficients") < algebra.COEFFICIENTS_BAR
    assert figure(text, "largest error of GCV and leave-one-out") < algebra.GCV_BAR
    assert figure(text, "largest error of the top 10 eigenvalues") < algebra.EIGENVALUES_BAR
    assert text.count("share inside its 95% bars, 2 seeds × 4 ridges") == 3
    assert 0 < figure(text, "steps / our plain steps, 10 targets, largest") < 1
    assert 0 < figure(text, "steps / SciPy's plain steps, 1 target, largest") < 1
    assert "MISSED" not in text  # in smoke size nothing is judged


def test_regression_has_a_row_for_every_ridge(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    text = run(capsys, folder, "regression")
    assert len(re.findall(r"^  1\.0e-0[0-6]|^  1\.0e\+00|^  \d\.\de-0\d", text, re.MULTILINE)) == 5
    assert text.count("*") == 4  # the least of three columns, and what the star means
    assert figure(text, "test error at GCV's ridge / least") >= 1
    assert figure(text, "test error at leave-one-out's ridge / least") >= 1


def test_large_kernels_are_solved_as_dask_does(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    text = run(capsys, folder, "large")
    agreed = re.search(r"our coefficients differ by (\S+)$", text, re.MULTILINE)
    assert agreed is not None
    assert float(agreed[1]) < 1e-6  # of a residual of 1e-8
    for row in ("seconds", "peak, MiB", "read, MiB", "disk floor, s", "larger floor, s", "seconds / larger floor"):
        assert re.search(rf"^  {re.escape(row)} +\S+ +\S+$", text, re.MULTILINE), row
    assert figure(text, "seconds / larger floor") > 0


def test_cholesky_on_disk_has_several_blocks(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    text = run(capsys, folder, "tiles")
    found = re.search(r"N/edge = (\S+)\), residual (\S+)$", text, re.MULTILINE)
    assert found is not None
    assert float(found[1]) > 1
    assert float(found[2]) < 1e-6
    assert figure(text, "bytes moved / bound") >= 1


def test_shifted_digits_are_all_different() -> None:
    images, labels = algebra_kernels.shifted_digits(10_040)
    assert torch.equal(labels[:40], labels[5_000:5_040])
    assert not torch.equal(images[:40], images[5_000:5_040])
    assert len(images[::100].unique(dim=0)) == len(images[::100])


@pytest.mark.parametrize("module", [algebra_large, bars])
def test_examples_of_docstrings(module: object) -> None:
    found = doctest.testmod(module)  # type: ignore[arg-type]
    assert found.attempted
    assert not found.failed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "equals"], "--parts: equals is none of equal, iterations, large, tiles, regression"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        algebra.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
