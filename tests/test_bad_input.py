"""Every item of bad input: the right error, naming what, got, limit and remedy; nothing is written and nothing lost."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import ooc_ntk
from ooc_ntk.api import BudgetError, InputError, OocNtkError, RunConflictError
from ooc_ntk.errors import DataChangedError, NonFiniteError, RunLockedError, StorageError
from ooc_ntk.storage.directory import RunDirectory

BUDGET = ooc_ntk.Budget("16GiB", disk="1GiB")
SPILL = ooc_ntk.Preferences(dataflow="spill", tile_samples=6, span_columns=40)


pytestmark = pytest.mark.usefixtures("one_thread")


def net(*extra: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), *extra, nn.Tanh(), nn.Linear(8, 3))


def inputs(count: int = 20) -> torch.Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(1))


def poisoned(value: float, sample: int, count: int = 20) -> torch.Tensor:
    data = inputs(count)
    data[sample, 2] = value
    return data


def with_weight(value: float) -> nn.Module:
    model = net()
    with torch.no_grad():
        model[2].weight[1, 3] = value
    return model


class WholeNumbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.table = nn.Parameter(torch.arange(4), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Root(nn.Module):
    """Finite outputs, infinite gradients where an input row is all zero."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.layer(x).square().sum(1, keepdim=True)).sqrt()


class Samples(Dataset):
    def __init__(self, items: list) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> object:
        return self.items[index]


class Augmented(Dataset):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randn(5)


def zero_row(sample: int) -> torch.Tensor:
    data = inputs()
    data[sample] = 0
    return data


def frozen() -> nn.Module:
    return net().requires_grad_(False)


def job(**given) -> ooc_ntk.Job:
    return ooc_ntk.Job(**{"model": net(), "train": inputs(), "device": "cpu", **given})


#: name: (arguments of the job, type of the error, what its message must name).
CASES: dict[str, tuple[Callable[[], dict], type[Exception], list[str]]] = {
    "batch norm in training mode": (
        lambda: {"model": net(nn.BatchNorm1d(8))},
        InputError,
        ["1 (BatchNorm1d)", "training mode", ".eval()"],
    ),
    "dropout in training mode": (
        lambda: {"model": net(nn.Dropout(0.25))},
        InputError,
        ["1 (Dropout)", "0.25", "training mode", ".eval()"],
    ),
    "attention dropout in training mode": (
        lambda: {"model": nn.TransformerEncoderLayer(5, 1, 8, dropout=0.3)},
        InputError,
        ["MultiheadAttention", "0.3", ".eval()"],
    ),
    "batch norm without statistics": (
        lambda: {"model": net(nn.BatchNorm1d(8, track_running_stats=False)).eval()},
        InputError,
        ["1 (BatchNorm1d)", "running statistics", "track_running_stats=True"],
    ),
    "no parameters at all": (lambda: {"model": nn.Flatten()}, InputError, ["no parameters", "there are none"]),
    "all parameters frozen": (
        lambda: {"model": frozen()},
        InputError,
        ["no parameters", "all 4", "requires_grad=False"],
    ),
    "no parameter matches": (
        lambda: {"parameters": "0.wieght"},
        InputError,
        ["parameter or pattern '0.wieght'", "did you mean", "'0.weight'"],
    ),
    "every parameter excluded": (lambda: {"parameters": ["*", "!0.*", "!2.*"]}, InputError, ["no parameters", "!0.*"]),
    "integer parameters": (
        lambda: {"model": WholeNumbers()},
        InputError,
        ["'table'", "torch.int64", "parameters='!table'"],
    ),
    "NaN in the weights": (
        lambda: {"model": with_weight(float("nan"))},
        NonFiniteError,
        ["'2.weight'", "NaN or infinite", "of 24", "checkpoint"],
    ),
    "infinity in the weights": (
        lambda: {"model": with_weight(float("inf"))},
        NonFiniteError,
        ["'2.weight'", "NaN or infinite", "of 24", "checkpoint"],
    ),
    "NaN in the inputs": (
        lambda: {"train": poisoned(float("nan"), 13)},
        NonFiniteError,
        ["inputs", "NaN or infinity", "train sample 13"],
    ),
    "infinity in the test inputs": (
        lambda: {"test": poisoned(float("inf"), 4)},
        NonFiniteError,
        ["inputs", "NaN or infinity", "test sample 4"],
    ),
    "infinite gradients": (
        lambda: {"model": Root(), "train": zero_row(11)},
        NonFiniteError,
        ["gradient", "block 'layer'", "train sample 11", "precision='float64'"],
    ),
    "empty tensor": (lambda: {"train": inputs(0)}, InputError, ["train", "empty", "at least 1 sample"]),
    "empty data set": (lambda: {"train": Samples([])}, InputError, ["train", "empty", "at least 1 sample"]),
    "empty test data": (lambda: {"test": inputs(0)}, InputError, ["test", "empty", "at least 1 sample"]),
    "inputs and labels of unequal length": (
        lambda: {"train": (inputs(), torch.zeros(19, dtype=torch.long))},
        InputError,
        ["train", "20", "19"],
    ),
    "samples of differing shapes": (
        lambda: {"train": Samples([torch.zeros(5)] * 7 + [torch.zeros(6)])},
        InputError,
        ["train sample 7", "(6,)", "(5,)", "resize or pad"],
    ),
    "test data that the model does not take": (lambda: {"test": torch.zeros(3, 7)}, InputError, ["test", "7", "5"]),
    "data that the model does not take": (
        lambda: {"train": torch.zeros(20, 7)},
        InputError,
        ["failed on the first sample", "(1, 7)", "shape and dtype"],
    ),
    "labels missing for loss": (
        lambda: {"outputs": "loss"},
        InputError,
        ["outputs='loss'", "label", "train=(inputs, labels)"],
    ),
    "labels missing for margin": (
        lambda: {"outputs": "margin"},
        InputError,
        ["outputs='margin'", "label", "train=(inputs, labels)"],
    ),
    "labels missing in the test data": (
        lambda: {"train": (inputs(), torch.zeros(20, dtype=torch.long)), "test": inputs(4), "outputs": "loss"},
        InputError,
        ["test", "label"],
    ),
    "a label beyond the classes": (
        lambda: {"train": (inputs(), torch.tensor([0, 1, 2, 3] * 5)), "outputs": "loss"},
        InputError,
        ["3", "label"],
    ),
    "random augmentation": (
        lambda: {"train": Augmented()},
        DataChangedError,
        ["train sample 0", "twice", "random augmentation"],
    ),
    "output out of range": (lambda: {"kernel": "output:3"}, InputError, ["'output:3'", "3 outputs", "0 to 2"]),
    "output without a number": (lambda: {"kernel": "output:last"}, InputError, ["'output:last'", "'output:3'"]),
    "unknown kernel": (lambda: {"kernel": "trase"}, InputError, ["kernel 'trase'", "did you mean 'trace'"]),
    "unknown outputs": (lambda: {"outputs": "logit"}, InputError, ["outputs 'logit'", "did you mean 'logits'"]),
    "unknown scale": (lambda: {"scale": "men"}, InputError, ["scale 'men'", "did you mean 'mean'"]),
    "unknown normalize": (lambda: {"normalize": "cosin"}, InputError, ["normalize 'cosin'", "did you mean 'cosine'"]),
    "unknown precision": (lambda: {"precision": "float23"}, InputError, ["precision 'float23'", "'float32'"]),
    "unknown data": (lambda: {"train": "digit"}, InputError, ["'digit'", "did you mean 'digits'"]),
    "a data file that is not there": (lambda: {"train": "/nowhere/x.npy"}, InputError, ["/nowhere/x.npy"]),
    "unknown device": (lambda: {"device": "gpu"}, InputError, ["'gpu'", "'cuda"]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_job_is_refused_and_no_kernel_is_left(tmp_path, name):
    given, kind, named = CASES[name]
    out = tmp_path / "run"
    with pytest.raises(kind) as error:
        ooc_ntk.run(job(**given()), out, budget=BUDGET, preferences=SPILL, progress=False)
    said = str(error.value)
    assert isinstance(error.value, OocNtkError)
    missing = [text for text in named if text not in said]
    assert missing == [], said
    # What is left is no kernel that could be taken for a result, and nothing half written.
    with pytest.raises(StorageError):
        ooc_ntk.open(out)
    assert [path for path in out.rglob("*") if ".tmp" in path.name] == []
    if name not in LATE:
        assert not (out / "plan.json").exists()


#: What shows only when the sample in question is derived.
LATE = {
    "NaN in the inputs",
    "infinity in the test inputs",
    "infinite gradients",
    "a label beyond the classes",
    "labels missing in the test data",
    "test data that the model does not take",
}


def test_a_model_in_training_mode_without_random_layers_is_taken(tmp_path):
    # Only batch norm and dropout make samples depend on others or on chance.
    model = net(nn.BatchNorm1d(8).eval()).train()
    model[1].eval()
    assert ooc_ntk.run(job(model=model), tmp_path / "run", budget=BUDGET, progress=False).shape == (20, 20)


def test_a_model_that_a_spec_builds_is_put_in_eval_mode_and_the_plan_says_so(tmp_path):
    file = tmp_path / "net.py"
    file.write_text("from torch import nn\ndef make():\n    return nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5))\n")
    plan = ooc_ntk.plan(job(model=f"{file}:make"), BUDGET)
    assert "eval mode" in str(plan)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: ooc_ntk.Preferences(dataflow="spil"), ["dataflow 'spil'", "did you mean 'spill'"]),
        (lambda: ooc_ntk.Preferences(tile_samples=0), ["tile_samples", "at least 1", "0"]),
        (lambda: ooc_ntk.Preferences(dataflow="spill", passes=3), ["'spill'", "passes=3", "dataflow='recompute'"]),
        (lambda: ooc_ntk.Budget(host="16 gigs"), ["'gigs'", "GiB"]),
        (lambda: ooc_ntk.Budget(host="much"), ["'much'", "'16GiB'"]),
        (lambda: ooc_ntk.Budget(host=0), ["at least one byte", "0"]),
        (lambda: ooc_ntk.run(job(), "unused", scheduler="thread"), ["scheduler 'thread'", "'threads'"]),
        (lambda: ooc_ntk.run(job(), "unused", scheduler="host:1"), ["scheduler 'host:1'", "tcp://HOST:PORT"]),
        (lambda: ooc_ntk.run(job(), "unused", scheduler="http://host:1"), ["'http://host:1'", "'tcp://host:8786'"]),
        (lambda: ooc_ntk.run(job(), "unused", scheduler=8786), ["scheduler must be", "'tcp://host:8786'", "got int"]),
        (lambda: ooc_ntk.Preferences(workers=0), ["workers", "at least 1", "0"]),
    ],
)
def test_wrong_settings_are_refused(tmp_path, monkeypatch, call, named):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        call()
    assert [text for text in named if text not in str(error.value)] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("memory", ["host", "disk"])
def test_a_budget_too_small_for_any_plan_says_the_smallest_that_would_do(tmp_path, memory):
    import re

    big = job(train=inputs(300), kernel="full")
    flag = {"host": "--host-memory", "disk": "--disk"}[memory]
    given = {"host": "16GiB", "disk": "1GiB"}
    out = tmp_path / "run"
    with pytest.raises(BudgetError) as error:
        ooc_ntk.run(big, out, budget=ooc_ntk.Budget(**{**given, memory: "1MiB"}), progress=False)
    said = str(error.value)
    assert not (out / "plan.json").exists()
    assert not (out / "manifest").exists()
    assert "1.0 MiB" in said
    if memory == "host":
        assert re.search(rf"{flag} to (\d+)MiB or more", said), said
        return
    found = re.search(rf"{flag} to (\d+MiB) or more", said)
    assert found, said
    assert "largest term is" in said
    size = int(found[1].removesuffix("MiB"))
    # What the message says is enough; one MiB less is not.
    assert ooc_ntk.plan(big, ooc_ntk.Budget(**{**given, memory: f"{size}MiB"})).promised.disk_bytes <= size * 2**20
    with pytest.raises(BudgetError):
        ooc_ntk.plan(big, ooc_ntk.Budget(**{**given, memory: f"{size - 1}MiB"}))


def test_the_smallest_host_budget_that_the_message_names_does(tmp_path):
    import re

    from ooc_ntk.compute.machine import resident_bytes

    plan = ooc_ntk.plan(job(), BUDGET)
    limit = (plan.promised.host_bytes + resident_bytes()) // 2 // 2**20
    for _ in range(3):  # what the process itself holds may grow a little between two plans
        with pytest.raises(BudgetError) as error:
            ooc_ntk.plan(job(), ooc_ntk.Budget(f"{limit}MiB", disk="1GiB"))
        said = str(error.value)
        found = re.search(r"--host-memory to (\d+)MiB or more", said)
        assert found, said
        assert "largest term is" in said
        try:
            again = ooc_ntk.plan(job(), ooc_ntk.Budget(f"{found[1]}MiB", disk="1GiB"))
        except BudgetError:
            continue
        assert again.promised.host_bytes <= int(found[1]) * 2**20
        return
    raise AssertionError(f"the budget that the message names does not do: {said}")


# --- run directories; the cases in depth are in execution/test_resume.py and test_kill.py ----------------------------


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    ooc_ntk.run(job(), out, budget=BUDGET, preferences=SPILL, progress=False)
    return out


def lock(out: Path) -> object:
    held = RunDirectory(out).locked()
    held.__enter__()
    return held


def newer(out: Path) -> None:
    database = sqlite3.connect(out / "manifest")
    database.execute("PRAGMA user_version = 7")
    database.close()


RUNS: dict[str, tuple[Callable[[Path], object], Callable[[], dict], type[Exception], list[str]]] = {
    "another model": (
        lambda out: None,
        lambda: {"model": with_weight(0.125)},
        RunConflictError,
        ["model (there", "--out"],
    ),
    "other data": (lambda out: None, lambda: {"train": inputs(19)}, RunConflictError, ["data (there", "--out"]),
    "another kernel": (
        lambda out: None,
        lambda: {"kernel": "pseudo"},
        RunConflictError,
        ["kernel settings (there", "--out"],
    ),
    "a newer manifest": (newer, dict, StorageError, ["format 7", "up to 1", "upgrade"]),
    "two at once": (lock, dict, RunLockedError, ["another run (process", "--out"]),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_directory_that_cannot_be_used_is_left_as_it_is(tmp_path, finished_run, name):
    prepare, given, kind, named = RUNS[name]
    out = tmp_path / "run"
    shutil.copytree(finished_run, out)
    held = prepare(out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "lock"}
    try:
        with pytest.raises(kind) as error:
            ooc_ntk.run(job(**given()), out, progress=False)
    finally:
        if held is not None:
            held.__exit__(None, None, None)
    assert [text for text in [*named, str(out)] if text not in str(error.value)] == []
    after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "lock"}
    assert after == before


def test_a_damaged_tile_is_named_by_verify_and_computed_again_by_run(tmp_path, finished_run):
    out = tmp_path / "run"
    shutil.copytree(finished_run, out)
    tile = out / "kernel.zarr/c/2/1"
    expected = np.asarray(ooc_ntk.open(out))
    tile.write_bytes(tile.read_bytes()[:-4] + b"\x00\x00\x00\x7f")
    audit = ooc_ntk.verify(out, samples=0)
    assert not audit.passed
    assert "kernel.zarr/c/2/1 differs from its checksum" in audit.checks[0].detail
    assert "run" in audit.checks[0].detail
    assert np.asarray(ooc_ntk.run(job(), out, progress=False)).tobytes() == expected.tobytes()
    assert ooc_ntk.verify(out, job()).passed


def test_an_unfinished_or_missing_run_is_not_opened(tmp_path):
    for verb in (ooc_ntk.open, ooc_ntk.info, ooc_ntk.verify):
        with pytest.raises(StorageError, match=f"{tmp_path} holds no run"):
            verb(tmp_path)
