"""Projections that cannot be: each refused by name, by the API and by the command line, with nothing left behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import ooc_ntk
from ooc_ntk.api import InputError, RunConflictError
from ooc_ntk.errors import IncompleteRunError, NonFiniteError
from ooc_ntk.execution.pilot import PILOT_SAMPLES
from ooc_ntk.inputs.jobfile import read_job_file

BUDGET = ooc_ntk.Budget("16GiB", device="16GiB", disk="1GiB")

#: Parameters of the network: 5·8 + 8 + 8·3 + 3.
PARAMETERS = 75


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tmp_path(memory_path):
    return memory_path


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).eval()


def inputs(count: int = 20) -> torch.Tensor:
    return torch.rand(count, 5, generator=torch.Generator().manual_seed(1)) + 0.1


def job(projection: object = "sjlt:32", **given) -> ooc_ntk.Job:
    return ooc_ntk.Job(**{"model": net(), "train": inputs(), "device": "cpu", "projection": projection, **given})


NETS = """
import torch
from torch import nn


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def data():
    return torch.rand(20, 5, generator=torch.Generator().manual_seed(1)) + 0.1
"""

JOB = ("--model", "nets.py:net", "--train", "data.npy", "--device", "cpu")


@pytest.fixture
def cli(cli, tmp_path) -> Callable:
    np.save(tmp_path / "data.npy", inputs().numpy())
    return cli


def one_line(result, *named: str) -> None:
    """Exit code 2 and one line that names everything."""
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    (line,) = result.output.strip().splitlines()
    assert line.startswith("error: ")
    for name in named:
        assert name in line


@contextmanager
def unchanged(out: Path):
    def snapshot():
        return {
            path: (path.stat().st_mtime_ns, path.read_bytes())
            for path in out.rglob("*")
            if path.is_file() and path.name != "lock"
        }

    before = snapshot()
    assert before
    yield
    assert snapshot() == before


# --- projections that are none ---------------------------------------------------------------------------------------

#: What is wrong: (text or fields, flags of the command line, what the message must name).
WRONG: dict[str, tuple[Callable[[], object], tuple[str, ...], list[str]]] = {
    "dim of sjlt": (lambda: "sjlt:30", ("--projection", "sjlt:30"), ["multiple of 4", "got 30", "nearest is 32"]),
    "dim of shift": (lambda: "shift:3", ("--projection", "shift:3"), ["at least 16", "got 3", "nearest is 16"]),
    "dim of tensorsketch": (
        lambda: "tensorsketch:100",
        ("--projection", "tensorsketch:100"),
        ["multiple of 32", "at least 128", "nearest is 128"],
    ),
    "no dim": (lambda: "gaussian", ("--projection", "gaussian"), ["needs a size", "gaussian:4096", "--target-error"]),
    "dim of zero": (lambda: "gaussian:0", ("--projection", "gaussian:0"), ["dim", "from 1 on", "got 0"]),
    "kind": (lambda: "sjtl:32", ("--projection", "sjtl:32"), ["unknown projection 'sjtl'", "did you mean 'sjlt'"]),
    "text": (lambda: "sjlt=32", ("--projection", "sjlt=32"), ["cannot read the projection 'sjlt=32'", "sjlt:4096"]),
    "backend": (
        lambda: {"dim": 32, "backend": "nubma"},
        ("--projection", "32", "--backend", "nubma"),
        ["unknown backend 'nubma'", "did you mean 'numba'"],
    ),
    "dim and error": (
        lambda: {"dim": 32, "target_error": 0.1},
        ("--projection", "sjlt:32", "--target-error", "0.1"),
        ["dim=32", "target_error=0.1", "not both"],
    ),
    "error of zero": (lambda: {"target_error": 0.0}, ("--target-error", "0"), ["between 0 and 1", "got 0.0"]),
    "error of one": (lambda: {"target_error": 1.0}, ("--target-error", "1"), ["between 0 and 1", "got 1.0"]),
    "negative error": (lambda: {"target_error": -0.1}, ("--target-error", "-0.1"), ["between 0 and 1", "got -0.1"]),
    "error that is no number": (
        lambda: {"target_error": float("nan")},
        ("--target-error", "nan"),
        ["between 0 and 1", "got nan"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_projection_is_refused(name):
    projection, _, named = WRONG[name]
    with pytest.raises(InputError) as error:
        job(projection())
    for phrase in named:
        assert phrase in str(error.value)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_projection_on_the_command_line(name, cli):
    _, flags, named = WRONG[name]
    one_line(cli("plan", *JOB, *flags), *named)
    one_line(cli("run", *JOB, *flags, "--out", "r"), *named)
    assert not Path("r").exists()


@pytest.mark.parametrize(
    ("projection", "message"),
    [
        ({"dim": 32, "seed": -1}, "seed must be a whole number from 0 on, got -1"),
        ({"dim": 32, "seed": 2**64}, "seed must be a whole number"),
        ({"dim": 32, "seed": True}, "seed must be a whole number"),
        ({"dim": 32.0}, "dim must be a whole number from 1 on, got 32.0"),
        ({"dim": "32"}, "dim must be a whole number"),
        ({"kind": "gaussian", "dim": 32, "nonzeros": 4}, "dense and has no nonzeros, got nonzeros=4"),
        ({"dim": 160, "nonzeros": 40}, "nonzeros must be at most 32, got 40"),
        ({"dimm": 32}, r"unknown key of \[projection\] 'dimm'; did you mean 'dim'"),
        ({"target_error": "small"}, "target_error must"),
        ({"target_error": [0.1]}, "target_error must"),
        (7, r"projection must be text such as 'sjlt:4096' or an ooc_ntk.Projection, got 7"),
        ("", "cannot read the projection ''"),
        (":", "cannot read the projection ':'"),
    ],
    ids=str,
)
def test_wrong_fields_are_refused(projection, message):
    with pytest.raises(InputError, match=message):
        job(projection)


# --- projections that a job has no use for ---------------------------------------------------------------------------

UNFIT: dict[str, tuple[object, tuple[str, ...], list[str]]] = {
    "as many columns as parameters": (
        "gaussian:75",
        ("--projection", "gaussian:75"),
        ["75 columns", "75 parameters", "exact kernel is cheaper", "leave the projection out"],
    ),
    "more columns than parameters": (
        "sjlt:100",
        ("--projection", "sjlt:100"),
        ["100 columns", "75 parameters", "exact kernel is cheaper"],
    ),
    "an error that needs as many columns": (
        {"kind": "sjlt", "target_error": 0.01},
        ("--target-error", "0.01"),
        ["1%", "75 parameters", "exact kernel is cheaper", "larger error"],
    ),
    "cupy on a CPU": (
        {"dim": 32, "backend": "cupy"},
        ("--projection", "sjlt:32", "--backend", "cupy"),
        ["'cupy' does not run on cpu", "'numba'", "'torch'"],
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_projection_that_does_not_fit_the_job_is_refused(name, cli, tmp_path, rates):
    projection, flags, named = UNFIT[name]
    with pytest.raises(InputError) as error:
        ooc_ntk.plan(job(projection), BUDGET, rates=rates)
    for phrase in named:
        assert phrase in str(error.value)
    one_line(cli("plan", *JOB, *flags), *named)
    one_line(cli("run", *JOB, *flags, "--out", "r"), *named)
    assert not (tmp_path / "r" / "plan.json").exists()
    assert not (tmp_path / "r" / "features.zarr").exists()


def test_the_number_of_chosen_parameters_counts(rates):
    with pytest.raises(InputError, match="32 columns is not smaller than the 27 parameters"):
        ooc_ntk.plan(job(parameters="2.*"), BUDGET, rates=rates)
    assert ooc_ntk.plan(job("gaussian:26", parameters="2.*"), BUDGET, rates=rates).columns == 27


HOW: dict[str, tuple[str | None, dict, tuple[str, ...], list[str]]] = {
    "features of an exact kernel": (
        None,
        {"features_only": True},
        ("--features-only",),
        ["features are what a projection gives", "--projection"],
    ),
    "dataflow": (
        "sjlt:32",
        {"dataflow": "resident"},
        ("--projection", "sjlt:32", "--dataflow", "resident"),
        ["one sweep", "leave dataflow"],
    ),
    "recompute": (
        "sjlt:32",
        {"dataflow": "recompute"},
        ("--projection", "sjlt:32", "--dataflow", "recompute"),
        ["one sweep", "leave dataflow"],
    ),
    "representation": (
        "sjlt:32",
        {"representation": "factored"},
        ("--projection", "sjlt:32", "--representation", "factored"),
        ["nothing of the Jacobian is held", "leave representation out"],
    ),
}


@pytest.mark.parametrize("name", HOW)
def test_what_a_projected_job_cannot_follow_is_refused(name, cli, tmp_path, rates):
    projection, preferences, flags, named = HOW[name]
    with pytest.raises(InputError) as error:
        ooc_ntk.plan(job(projection), BUDGET, preferences=ooc_ntk.Preferences(**preferences), rates=rates)
    for phrase in named:
        assert phrase in str(error.value)
    one_line(cli("plan", *JOB, *flags), *named)
    one_line(cli("run", *JOB, *flags, "--out", "r"), *named)
    assert not (tmp_path / "r" / "plan.json").exists()


def test_several_passes_are_refused(rates):
    with pytest.raises(InputError, match="one sweep"):
        ooc_ntk.plan(job(), BUDGET, preferences=ooc_ntk.Preferences(passes=2), rates=rates)


@pytest.mark.parametrize("flags", [("--projection-seed", "3"), ("--backend", "torch")], ids=" ".join)
def test_parts_of_a_projection_without_one_are_refused(flags, cli):
    one_line(cli("plan", *JOB, *flags), f"{flags[0]} belongs to a projection", "--projection sjlt:4096")
    one_line(cli("run", *JOB, *flags, "--out", "r"), f"{flags[0]} belongs to a projection")
    assert not Path("r").exists()


# --- gradients that are not finite -----------------------------------------------------------------------------------


class Root(nn.Module):
    """Finite outputs; where all inputs are 0 gradients are NaN, where the first is 0 they are infinite."""

    def __init__(self, rest: float) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 8, bias=False)
        with torch.no_grad():
            self.layer.weight.fill_(rest)
            self.layer.weight[:, 0] = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).clamp(min=0).sqrt()


def poisoned(what: str, sample: int, count: int) -> torch.Tensor:
    data = inputs(count)
    data[sample, 0] = 0
    if what == "nan":
        data[sample] = 0
    return data


def poisoned_job(what: str, sample: int, count: int = 110, test: bool = False, **given) -> ooc_ntk.Job:
    data = poisoned(what, sample, count)
    model = Root(0.0).eval()
    if test:
        return job("sjlt:16", model=model, train=inputs(20), test=data, **given)
    return job("sjlt:16", model=model, train=data, **given)


def outside_the_pilot(count: int) -> int:
    """A train sample in the middle that no pilot of so many looks at."""
    looked_at = {round(part * (count - 1) / (PILOT_SAMPLES - 1)) for part in range(PILOT_SAMPLES)}
    return next(sample for sample in range(count // 2, count) if sample not in looked_at)


@pytest.mark.parametrize("layer_rules", [True, False])
@pytest.mark.parametrize("features_only", [True, False])
@pytest.mark.parametrize("what", ["nan", "inf"])
def test_a_gradient_that_is_not_finite_names_its_sample(what, features_only, layer_rules, tmp_path, rates):
    sample, tile = outside_the_pilot(110), 8
    wrong = poisoned_job(what, sample)
    preferences = ooc_ntk.Preferences(tile_samples=tile, features_only=features_only, layer_rules=layer_rules)
    plan = ooc_ntk.plan(wrong, BUDGET, preferences=preferences, rates=rates)
    out = tmp_path / "run"
    with pytest.raises(NonFiniteError, match=rf"NaN or infinite in train sample {sample}\b"):
        ooc_ntk.run(wrong, out, plan=plan, progress=False, scheduler="serial")
    tiles = {int(path.parent.name) for path in (out / "features.zarr").rglob("c/*/*")}
    assert tiles == set(range(sample // tile))
    assert not [path for path in out.rglob("*") if ".tmp" in path.name]
    with pytest.raises(IncompleteRunError):
        ooc_ntk.open(out)
    for path in (out / "features.zarr").rglob("c/*/*"):
        assert np.isfinite(np.frombuffer(path.read_bytes(), dtype="<f4")).all()
    with pytest.raises(NonFiniteError, match=rf"train sample {sample}\b"):
        ooc_ntk.run(wrong, out, progress=False, scheduler="serial")


@pytest.mark.parametrize("kind", ["shift:16", "rademacher:24", "gaussian:24"])
def test_other_kinds_name_the_sample_as_well(kind, tmp_path, rates):
    sample = outside_the_pilot(110)
    wrong = dataclasses.replace(poisoned_job("nan", sample), projection=kind)
    plan = ooc_ntk.plan(wrong, BUDGET, rates=rates)
    with pytest.raises(NonFiniteError, match=rf"NaN or infinite in train sample {sample}\b"):
        ooc_ntk.run(wrong, tmp_path / "run", plan=plan, progress=False)


def test_a_test_sample_is_named_as_one(tmp_path, rates):
    wrong = poisoned_job("nan", 7, 12, test=True)
    plan = ooc_ntk.plan(wrong, BUDGET, rates=rates)
    with pytest.raises(NonFiniteError, match=r"test sample 7\b"):
        ooc_ntk.run(wrong, tmp_path / "run", plan=plan, progress=False)


@pytest.mark.parametrize("what", ["nan", "inf"])
def test_a_sample_of_the_pilot_is_named_by_the_plan(what, tmp_path, rates):
    wrong = poisoned_job(what, 11, 20)
    with pytest.raises(InputError, match=r"train sample 11 is NaN or infinite"):
        ooc_ntk.plan(wrong, BUDGET, rates=rates)
    with pytest.raises(InputError, match=r"train sample 11 is NaN or infinite"):
        ooc_ntk.run(wrong, tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "plan.json").exists()


def test_features_beyond_their_precision_are_not_stored_as_infinite(tmp_path, rates):
    """Every gradient is a float32, their sums are not."""
    data = torch.full((110, 40), 0.01)
    sample = outside_the_pilot(110)
    data[sample] = 3e38
    model = nn.Linear(40, 1, bias=False).eval()
    nn.init.constant_(model.weight, 1e-12)
    wrong = job("sjlt:16", model=model, train=data)
    preferences = ooc_ntk.Preferences(features_only=True, tile_samples=110)
    plan = ooc_ntk.plan(wrong, BUDGET, preferences=preferences, rates=rates)
    with pytest.raises(NonFiniteError, match=rf"train sample {sample}\b"):
        ooc_ntk.run(wrong, tmp_path / "run", plan=plan, progress=False)


# --- runs that are there ---------------------------------------------------------------------------------------------


def test_another_projection_is_refused_by_a_run_that_is_there(tmp_path, rates):
    out = tmp_path / "run"
    ooc_ntk.run(job(), out, plan=ooc_ntk.plan(job(), BUDGET, rates=rates), progress=False)
    others = {
        "dim": "sjlt:36",
        "kind": "shift:32",
        "seed": {"dim": 32, "seed": 1},
        "nonzeros": {"dim": 32, "nonzeros": 8},
        "error": {"target_error": 0.5},
        "exact": None,
    }
    for name, other in others.items():
        with unchanged(out), pytest.raises(RunConflictError, match="another job: kernel settings .* differ"):
            ooc_ntk.run(job(other), out, progress=False)
        with pytest.raises(RunConflictError, match="another job"):
            ooc_ntk.verify(out, job(other))
        assert name
    with unchanged(out), pytest.raises(RunConflictError, match="projects by numba, asked for is torch"):
        ooc_ntk.run(job({"dim": 32, "backend": "torch"}), out, progress=False)
    with unchanged(out), pytest.raises(RunConflictError, match="assembles the kernel, asked for are features only"):
        ooc_ntk.run(job(), out, preferences=ooc_ntk.Preferences(features_only=True), progress=False)
    with unchanged(out):
        assert ooc_ntk.run(job(), out, progress=False).shape == (20, 20)


def test_a_plan_of_another_projection_is_refused(tmp_path, rates):
    plan = ooc_ntk.plan(job(), BUDGET, rates=rates)
    for other in ("sjlt:36", {"dim": 32, "seed": 1}, None):
        with pytest.raises(RunConflictError, match="plan was made for another job"):
            ooc_ntk.run(job(other), tmp_path / "run", plan=plan, progress=False)
    preferences = ooc_ntk.Preferences(features_only=True)
    with pytest.raises(RunConflictError, match="assembles the kernel, asked for are features only"):
        ooc_ntk.run(job(), tmp_path / "run", plan=plan, preferences=preferences, progress=False)
    with pytest.raises(RunConflictError, match="projects by numba, asked for is torch"):
        ooc_ntk.run(job({"dim": 32, "backend": "torch"}), tmp_path / "run", plan=plan, progress=False)
    assert not (tmp_path / "run" / "plan.json").exists()


def test_the_command_line_refuses_another_projection(cli):
    assert cli("run", *JOB, "--projection", "sjlt:32", "--out", "r", "--quiet").exit_code == 0
    for flags in (("--projection", "sjlt:36"), ("--projection-seed", "1"), ("--target-error", "0.5")):
        given = (*JOB, "--projection", "sjlt:32") if flags[0] == "--projection-seed" else JOB
        with unchanged(Path("r")):
            one_line(cli("run", *given, *flags, "--out", "r"), "another job", "kernel settings", "nothing was changed")
    with unchanged(Path("r")):
        # Without a model the job of the run itself is meant, and the flags change it.
        one_line(cli("run", "--out", "r", "--projection-seed", "1"), "another job", "kernel settings")
        one_line(cli("run", "--out", "r", "--backend", "torch"), "projects by numba", "leave --backend out")
        one_line(cli("run", "--out", "r", "--features-only"), "assembles the kernel", "leave --features-only out")
        assert cli("run", "--out", "r").exit_code == 0


# --- job files -------------------------------------------------------------------------------------------------------

HEAD = 'model = "nets.py:net"\ntrain = "data.npy"\ndevice = "cpu"\n'


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('projection = "sjlt:32"\n', ooc_ntk.Projection("sjlt", 32)),
        ('projection = "shift:32"\n', ooc_ntk.Projection("shift", 32)),
        ('[projection]\nkind = "gaussian"\ndim = 33\nseed = 7\n', ooc_ntk.Projection("gaussian", 33, 7)),
        (
            '[projection]\ntarget_error = 0.25\nbackend = "torch"\n',
            ooc_ntk.Projection(target_error=0.25, backend="torch"),
        ),
        ("[projection]\ndim = 64\nnonzeros = 8\n", ooc_ntk.Projection("sjlt", 64, nonzeros=8)),
    ],
)
def test_a_job_file_holds_a_projection_as_text_or_as_a_table(text, wanted, cli):
    Path("job.toml").write_text(HEAD + text)
    found = ooc_ntk.Job.from_spec(read_job_file("job.toml").arguments())
    assert found.projection == wanted
    again = ooc_ntk.Job.from_spec({**found.spec(), "model": "nets.py:net"})
    assert again.projection == wanted
    planned = cli("plan", "job.toml", "--projection-seed", "9", "--json")
    assert planned.exit_code == 0, planned.output
    plan = ooc_ntk.Plan.from_json(planned.stdout)
    assert (plan.projection.kind, plan.projection.seed, plan.projection.nonzeros) == (wanted.kind, 9, wanted.nonzeros)
    assert plan.projection.dim == wanted.dim or wanted.dim is None
    other = ooc_ntk.Plan.from_json(cli("plan", "job.toml", "--projection", "rademacher:30", "--json").stdout)
    assert (other.projection.kind, other.projection.dim) == ("rademacher", 30)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[projection]\ndim = 32\nsede = 3\n", ["unknown key of [projection]", "'sede'", "did you mean 'seed'"]),
        ('[projection]\nkind = "sjlt"\n', ["needs a size"]),
        ('[projection]\ndim = "many"\n', ["dim must be a whole number", "'many'"]),
        ('[projection]\ntarget_error = "small"\n', ["target_error"]),
        ("[projection]\ndim = 33\n", ["nearest is 32"]),
        ('projection = "sjlt=32"\n', ["cannot read the projection 'sjlt=32'"]),
        ('projection = "sjtl:32"\n', ["unknown projection 'sjtl'"]),
        ("projection = 32\n", ["projection"]),
        ("projection = true\n", ["projection"]),
    ],
)
def test_a_wrong_projection_in_a_job_file_is_refused(text, named, cli):
    Path("job.toml").write_text(HEAD + text)
    one_line(cli("plan", "job.toml"), *named)


def test_parts_given_by_hand_change_the_projection_of_a_file(cli):
    Path("job.toml").write_text(HEAD + '[projection]\nkind = "gaussian"\ndim = 33\nseed = 7\n')
    found, _ = ooc_ntk.api.describe_job("job.toml", {"target_error": 0.4})
    assert found.projection == ooc_ntk.Projection("gaussian", seed=7, target_error=0.4)
    found, _ = ooc_ntk.api.describe_job("job.toml", {"backend": "torch", "projection_seed": 2})
    assert found.projection == ooc_ntk.Projection("gaussian", 33, seed=2, backend="torch")
    Path("plain.toml").write_text(HEAD)
    one_line(cli("plan", "plain.toml", "--backend", "torch"), "--backend belongs to a projection")
