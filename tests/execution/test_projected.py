"""Projected runs end to end: features against ``J·R`` by definition, the same bits, promises, errors and audits."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from torch import nn

import ooc_ntk
from ooc_ntk.api import BudgetError, Observer
from ooc_ntk.compute.projection.entries import Outer, dense_columns
from ooc_ntk.compute.projection.sketch import Sketch
from ooc_ntk.errors import IncompleteRunError, InputError, RunInterrupted
from ooc_ntk.execution.audit_features import FeatureReference
from ooc_ntk.planning.memory import DEVICE_CHUNKS, SketchChunks
from ooc_ntk.planning.projection import KINDS
from ooc_ntk.storage.manifest import Manifest
from tests import oracle, zoo
from tests.cases import FLOAT64, NAMES, TRAIN, Branching, TiedTokens, case, digits
from tests.rates import RATES
from tests.zoo import zoo_case

KERNELS = ("trace", "pseudo", "output:3", "full")

#: Features from gradients in float32, and everything made of the same features (the brief's 'must reach').
CLOSE = 1e-6

#: Columns: blocks of 40 and 5 rows, no power of two, and more than one counter of the dense kinds.
DIM = 160

BUDGET = ooc_ntk.Budget(host="16GiB", device="16GiB", disk="1GiB")

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tmp_path(memory_path):
    return memory_path


def widened(array: np.ndarray) -> np.ndarray:
    """float64; bf16 comes as its bits."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array.copy()).view(torch.bfloat16).double().numpy()
    return array.astype(np.float64)


def stored(kernel: ooc_ntk.Kernel) -> np.ndarray:
    """Features as they are on disk, (samples, rows, dim) float64, read by plain Zarr."""
    plan = kernel.plan
    array = np.asarray(zarr.open_array(kernel.path / "features.zarr", mode="r")[:])
    assert array.shape == (plan.samples * plan.rows_per_sample, plan.projection.dim)
    return widened(array).reshape(plan.samples, plan.rows_per_sample, -1)


def places(module: nn.Module, chosen) -> np.ndarray:
    """Global indices of some parameters: all parameters count, whatever is chosen."""
    found, position = [], 0
    for name, parameter in module.named_parameters():
        if chosen(name):
            found.append(np.arange(position, position + parameter.numel()))
        position += parameter.numel()
    return np.concatenate(found)


def matrix(plan: ooc_ntk.Plan, module: nn.Module, chosen=lambda name: True) -> np.ndarray:
    """R of a plan by its definition, (parameters, dim) float64."""
    position, outers = 0, []
    for name, parameter in module.named_parameters():
        if name in plan.structured:
            outers.append(Outer(position, *parameter.shape))
        position += parameter.numel()
    return dense_columns(plan.projection, places(module, chosen), np.arange(plan.projection.dim), outers)


def rows_of(jacobian: np.ndarray, kernel: str) -> np.ndarray:
    """Jacobian rows that a kernel is made of."""
    if kernel == "pseudo":
        return jacobian.sum(1, keepdims=True)
    return jacobian[:, [int(kernel[7:])]] if kernel.startswith("output:") else jacobian


def of_features(features: np.ndarray, plan: ooc_ntk.Plan) -> np.ndarray:
    """The kernel that a run's features stand for."""
    kind = "full" if plan.kernel == "full" else "trace"
    divisor = plan.outputs if plan.scale == "mean" and plan.normalize is None else 1
    return oracle.kernel(features, plan.train_samples, kind, normalize=plan.normalize) / divisor


def check(kernel, jacobian: np.ndarray, module: nn.Module, bound: float = CLOSE, chosen=lambda name: True):
    """Features are ``J·R``, the kernel and its diagonal are theirs."""
    plan = kernel.plan
    features = stored(kernel)
    wanted = rows_of(jacobian, plan.kernel) @ matrix(plan, module, chosen)
    assert oracle.error(features, wanted) <= bound
    own = max(CLOSE, bound) if plan.precision != "float64" else bound
    assert oracle.error(kernel, of_features(features, plan)) <= own
    divisor = plan.outputs if plan.scale == "mean" else 1
    norms = np.square(features).sum(2)
    diagonal = (norms.reshape(-1) if plan.kernel == "full" else norms.sum(1)) / divisor
    assert oracle.error(kernel.diagonal(), diagonal) <= own
    return features


def projection(kind: str = "sjlt", dim: int = DIM, **more) -> ooc_ntk.Projection:
    return ooc_ntk.Projection(kind, dim, **more)


# --- features are J·R ------------------------------------------------------------------------------------------------


#: Every kind with every kernel on one network; on the others every kind, with every kernel in turn.
COMBINATIONS = [
    (name, kind, kernel)
    for place, name in enumerate(NAMES)
    for number, kind in enumerate(KINDS)
    for turn, kernel in enumerate(KERNELS)
    if name == "attention" or (number + turn + place) % len(KERNELS) == 0
]


@pytest.mark.parametrize(("name", "kind", "kernel"), COMBINATIONS)
def test_features_are_the_projected_jacobian(name, kind, kernel, compute):
    chosen = case(name)
    found = compute(chosen.job(kernel=kernel, projection=projection(kind, seed=3)), tile_samples=10, span_columns=64)
    assert bool(found.plan.structured) == (kind == "tensorsketch")
    check(found, oracle.case_jacobian(name), chosen.module)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sjlt", {"scale": "mean"}),
        ("gaussian", {"normalize": "cosine"}),
        ("shift", {"normalize": "cosine", "scale": "mean", "kernel": "full"}),
        ("tensorsketch", {"scale": "mean", "kernel": "full"}),
        ("rademacher", {"scale": "mean", "kernel": "pseudo"}),
        *((kind, {"precision": "float64"}) for kind in ("sjlt", "gaussian", "tensorsketch")),
        ("sjlt", {"precision": "float64", "kernel": "full", "normalize": "cosine"}),
        *((kind, {"precision": "bf16"}) for kind in ("shift", "rademacher", "tensorsketch")),
        ("sjlt", {"precision": "bf16", "kernel": "full"}),
        ("sjlt", {"precision": "bf16x3", "kernel": "full"}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value.values()),
)
def test_scale_normalisation_and_precision(options, kind, compute):
    chosen = case("attention")
    found = compute(chosen.job(projection=projection(kind, seed=2**40 + 5), **options), tile_samples=8)
    bound = {"float64": FLOAT64, "bf16": 1e-2, "bf16x3": 1e-5}.get(options.get("precision"), CLOSE)
    check(found, oracle.case_jacobian("attention"), chosen.module, bound)
    dtype = zarr.open_array(found.path / "features.zarr", mode="r").dtype
    assert dtype == {"float64": np.float64, "bf16": np.uint16}.get(options.get("precision"), np.float32)
    assert found.plan.tolerance >= bound or options.get("precision") is None


def test_bf16_rounds_nothing_but_the_features_themselves(compute):
    found = compute(case("smooth-mlp").job(projection=projection(), precision="bf16"))
    exact = oracle.case_jacobian("smooth-mlp") @ matrix(found.plan, case("smooth-mlp").module)
    error = oracle.error(stored(found), exact)
    assert 5e-4 < error < 2.0**-8  # half a unit of 8 bits, on average a third of it
    attributes = dict(zarr.open_array(found.path / "features.zarr", mode="r").attrs)
    assert attributes["logical_dtype"] == "bfloat16"


@pytest.mark.parametrize(("kind", "outputs"), [("sjlt", "loss"), ("gaussian", "margin"), ("tensorsketch", "margin")])
def test_output_functions(kind, outputs, compute):
    chosen = case("attention")
    found = compute(chosen.job(outputs=outputs, projection=projection(kind)), tile_samples=9)
    check(found, oracle.case_jacobian("attention", outputs=outputs), chosen.module)


@pytest.mark.parametrize(
    ("kind", "method", "batch_size"),
    [
        ("sjlt", "loop", 7),
        ("sjlt", "vmap", 4),
        ("shift", "vmap", 100),
        ("rademacher", "loop", 7),
        ("gaussian", "vmap", 4),
        ("tensorsketch", "loop", 7),
    ],
)
def test_without_layer_rules(kind, method, batch_size, compute):
    chosen = case("attention")
    found = compute(
        chosen.job(kernel="full", projection=projection(kind)), method, batch_size, tile_samples=10, span_columns=50
    )
    assert {block.source for block in found.plan.blocks} == {"torch.func"}
    assert found.plan.structured == ()
    check(found, oracle.case_jacobian("attention"), chosen.module)


@pytest.mark.parametrize(
    ("patterns", "kind"),
    [
        *(("encoder.*", kind) for kind in ("shift", "gaussian", "tensorsketch")),
        (["!encoder.*", "!qkv.weight"], "sjlt"),
        (["!encoder.*", "!qkv.weight"], "tensorsketch"),
        (["head.bias", "mix.*"], "shift"),
    ],
    ids=str,
)
def test_chosen_parameters_keep_their_global_indices(patterns, kind, compute):
    chosen = case("attention")
    parts = [patterns] if isinstance(patterns, str) else patterns

    def inside(name):
        wanted = [part for part in parts if not part.startswith("!")]
        out = [part[1:] for part in parts if part.startswith("!")]
        match = [name.startswith(part.rstrip("*")) for part in wanted] or [True]
        return any(match) and not any(name.startswith(part.rstrip("*")) for part in out)

    job = chosen.job(parameters=patterns, projection=projection(kind, 128, nonzeros=8 if kind == "tensorsketch" else 0))
    jacobian = oracle.case_jacobian("attention")[:, :, places(chosen.module, inside)]
    check(compute(job, tile_samples=12), jacobian, chosen.module, chosen=inside)


@pytest.mark.parametrize(
    ("kind", "layer_rules"), [*((kind, True) for kind in ("sjlt", "gaussian", "tensorsketch")), ("shift", False)]
)
def test_features_of_a_subset_and_of_the_rest_add_up(kind, layer_rules, compute):
    chosen, patterns = case("smooth-mlp"), (None, "3.*", "!3.*")
    # Weights of the same place, whether they are large enough for a tensor sketch of their factors or not.
    jobs = [chosen.job(parameters=part, projection=projection(kind, DIM, seed=9)) for part in patterns]
    whole, one, rest = (compute(job, tile_samples=10, layer_rules=layer_rules) for job in jobs)
    assert oracle.error(stored(one) + stored(rest), stored(whole)) <= CLOSE
    assert oracle.error(stored(rest), stored(whole)) > 1e-2


def test_frozen_parameters_count(compute):
    torch.manual_seed(3)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 20)).eval()
    module[1].requires_grad_(False)
    images = digits()[0][:14]
    found = compute(ooc_ntk.Job(model=module, train=images, projection="sjlt:64", device="cpu"))
    jacobian = oracle.jacobian(module, images, names=["3.weight", "3.bias"])
    check(found, jacobian, module, chosen=lambda name: name.startswith("3."))


class Doubled(nn.Module):
    """Adds the mean of the batch: alone, a sample is doubled."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 4))

    def forward(self, x):
        return self.net(x + x.mean(0))


@pytest.mark.parametrize("kind", ["sjlt", "tensorsketch"])
def test_samples_that_depend_on_their_batch_are_projected_alone(kind, compute):
    torch.manual_seed(2)
    module, images = Doubled().eval(), digits()[0][:15]
    job = ooc_ntk.Job(
        model=module,
        train=images[:11],
        test=images[11:],
        projection=projection(kind, 64 if kind != "tensorsketch" else 128),
        allow_batch_dependence=True,
        device="cpu",
    )
    found = compute(job, tile_samples=4)
    assert found.plan.batch_size == 1
    check(found, oracle.jacobian(module, images), module)


@pytest.mark.parametrize(
    ("kind", "kernel"), [*((kind, "trace") for kind in ("shift", "rademacher", "tensorsketch")), ("sjlt", "full")]
)
def test_tokens_and_a_tied_embedding(kernel, kind, compute):
    torch.manual_seed(5)
    module, tokens = TiedTokens(60, 12).eval(), torch.randint(0, 60, (15, 6))
    job = ooc_ntk.Job(
        model=module,
        train=tokens[:11],
        test=tokens[11:],
        kernel=kernel,
        projection=projection(kind),
        device="cpu",
    )
    check(compute(job, tile_samples=6), oracle.jacobian(module, tokens), module)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mobilenet", "sjlt"),
        ("gpt", "tensorsketch"),
        ("bags", "sjlt"),
        ("bare", "shift"),
        ("twice", "tensorsketch"),
        ("uncovered", "sjlt"),
        ("uncovered", "tensorsketch"),
        ("frozen", "sjlt"),
        ("tied matrix", "sjlt"),
        ("lstm", "gaussian"),
        ("unused", "shift"),
    ],
)
def test_layers_of_the_zoo(name, kind, compute):
    chosen = zoo_case(name)
    module = chosen.module
    trained = {key for key, value in module.named_parameters() if value.requires_grad}
    size = sum(value.numel() for key, value in module.named_parameters() if key in trained)
    # Two to four times fewer columns than the smaller networks have parameters, so that weights are taken from factors.
    small = projection(kind, 32, nonzeros=8) if kind == "tensorsketch" else projection(kind, min(64, size // 8 * 4))
    found = compute(chosen.job(kernel="full", projection=small), tile_samples=7)
    check(found, zoo.jacobian(name), module, max(CLOSE, chosen.bound), chosen=lambda key: key in trained)
    if name == "uncovered":
        assert {block.source for block in found.plan.blocks} == {"rule", "torch.func"}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_device_works_on_at_a_time_gives_the_same_features(kind, compute, monkeypatch):
    """The sizes of a device, on the CPU: pieces and what is kept are all that differs."""
    job = case("cnn").job(projection=projection(kind, seed=3))
    here = stored(compute(job, tile_samples=10, batch_size=4))
    monkeypatch.setattr(SketchChunks, "of", staticmethod(lambda device: DEVICE_CHUNKS))
    there = stored(compute(job, tile_samples=10, batch_size=4))
    assert oracle.error(there, here) <= CLOSE


def test_a_model_that_vmap_refuses(compute):
    torch.manual_seed(6)
    module, images = Branching().eval(), digits()[0][:16]
    found = compute(ooc_ntk.Job(model=module, train=images, projection="sjlt:64", device="cpu"), batch_size=5)
    check(found, oracle.jacobian(module, images), module)


@pytest.mark.parametrize(("name", "kernel"), [("smooth-mlp", "full"), ("attention", "trace")])
def test_a_tensor_sketch_from_factors_is_that_from_gradients(name, kernel, tmp_path, rates):
    chosen = case(name)
    job = chosen.job(kernel=kernel, projection=projection("tensorsketch", seed=2))
    plan = ooc_ntk.plan(job, BUDGET, preferences=ooc_ntk.Preferences(tile_samples=12), rates=rates)
    assert plan.structured
    ways = {way: dataclasses.replace(plan, from_factors=way) for way in (plan.structured, ())}
    assert len({each.digest for each in ways.values()}) == 2
    for number, each in enumerate(ways.values()):
        found = ooc_ntk.run(job, tmp_path / str(number), plan=each, progress=False)
        check(found, oracle.case_jacobian(name), chosen.module)


@pytest.mark.parametrize("kind", ["sjlt", "gaussian", "tensorsketch"])
def test_the_torch_backend_projects_with_the_same_matrix(kind, compute):
    chosen = case("smooth-mlp")
    found = compute(chosen.job(projection=projection(kind, backend="torch", seed=11), kernel="full"))
    assert found.plan.projection.backend == "torch"
    check(found, oracle.case_jacobian("smooth-mlp"), chosen.module)


def test_the_features_carry_their_provenance(compute):
    found = compute(case("smooth-mlp").job(projection=projection(seed=5), scale="mean"))
    there = dict(zarr.open_array(found.path / "features.zarr", mode="r").attrs)
    assert there["projection"] == "sjlt 160 seed 5 nonzeros 4"
    assert there["plan_digest"] == found.plan.digest
    assert there["parameters"] == found.plan.columns == 2130
    assert len(there["sketch"]) == 32
    heavy = zarr.open_array(found.path / "heavy.zarr", mode="r")
    assert tuple(heavy.attrs["parameters"]) == found.plan.heavy
    rows = oracle.case_jacobian("smooth-mlp")[:, :, list(found.plan.heavy)]
    assert oracle.error(np.asarray(heavy[:]).reshape(rows.shape), rows) <= CLOSE


# --- the same bits ---------------------------------------------------------------------------------------------------


ARRAYS = ("features.zarr/c", "heavy.zarr/c", "kernel.zarr/c", "diagonal/c")


def bits(out: Path) -> dict[str, bytes]:
    """Every chunk of every array of a run."""
    found = {
        path.relative_to(out).as_posix(): path.read_bytes()
        for array in ARRAYS
        for path in sorted((out / array).rglob("*"))
        if path.is_file()
    }
    assert any(name.startswith("features.zarr/c") for name in found)
    return found


def seeded_job(kind: str = "sjlt", **options) -> ooc_ntk.Job:
    return case("smooth-mlp").job(kernel="full", normalize="cosine", projection=projection(kind, seed=4), **options)


def tiled_plan(kind: str = "sjlt", features_only: bool = False, **options) -> ooc_ntk.Plan:
    preferences = ooc_ntk.Preferences(tile_samples=5, span_columns=64, features_only=features_only)
    plan = ooc_ntk.plan(seeded_job(kind, batch_size=2, **options), BUDGET, preferences=preferences, rates=RATES)
    assert plan.sample_grid.row_tiles == 7
    return plan


def run_plan(plan: ooc_ntk.Plan, out: Path, scheduler: str = "serial", progress=False, kind: str = "sjlt") -> Path:
    ooc_ntk.run(seeded_job(kind, batch_size=2), out, plan=plan, scheduler=scheduler, progress=progress)
    return out


@pytest.mark.parametrize("kind", ["sjlt", "gaussian", "tensorsketch"])
def test_both_schedulers_write_the_same_bits(kind, tmp_path):
    plan = tiled_plan(kind)
    runs = [run_plan(plan, tmp_path / str(n), how, kind=kind) for n, how in enumerate(("serial", "threads", "threads"))]
    first, *others = (bits(out) for out in runs)
    assert ("heavy.zarr/c/0/0" in first) == (kind in ("sjlt", "shift", "rademacher"))
    assert all(other == first for other in others)


@pytest.mark.parametrize(
    ("scheduler", "phase", "after", "features_only"),
    [("serial", "rows", 9, False), ("threads", "kernel", 7, False), ("threads", "rows", 26, True)],
)
def test_an_interrupted_run_goes_on_to_the_same_bits(scheduler, phase, after, features_only, tmp_path):
    plan = tiled_plan(features_only=features_only)
    done = {"rows": 0.0, "kernel": 0.0}

    def advance(what, amount):
        done[what] += amount
        if done[phase] >= after:
            os.kill(os.getpid(), signal.SIGINT)

    out = tmp_path / "run"
    with pytest.raises(RunInterrupted, match="the same command goes on"):
        run_plan(plan, out, scheduler, Observer(advance=advance))
    info = ooc_ntk.info(out)
    assert not info.finished
    assert info.expected_error == plan.expected_error
    with pytest.raises(IncompleteRunError, match="not finished"):
        ooc_ntk.open(out)
    before = {path: path.stat().st_ino for path in (out / "features.zarr").rglob("c/*/*")}
    assert before
    again = ooc_ntk.run(seeded_job(batch_size=2), out, scheduler="serial", progress=False)
    assert all(path.stat().st_ino == number for path, number in before.items()), "finished tiles were made again"
    assert again.plan == plan
    assert bits(out) == bits(run_plan(plan, tmp_path / "reference"))
    assert not [path for path in out.rglob("*") if ".tmp" in path.name or path.name in ("tiles", "pending")]


KILLED = """
import os, signal, sys
from pathlib import Path
import ooc_ntk
from ooc_ntk.api import Observer
from tests.execution.test_projected import run_plan
plan, out, phase, after = ooc_ntk.Plan.load(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], float(sys.argv[4])
done = {"rows": 0.0, "kernel": 0.0}
def advance(what, amount):
    done[what] += amount
    if done[phase] >= after:
        os.kill(os.getpid(), signal.SIGKILL)
run_plan(plan, out, "threads", Observer(advance=advance))
"""


def child(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Run Python in the project's folder."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


@pytest.mark.slow
def test_a_killed_process_leaves_what_goes_on_to_the_same_bits(tmp_path):
    plan, out = tiled_plan(), tmp_path / "run"
    plan.save(tmp_path / "plan.json")
    for phase, after in (("rows", 12), ("kernel", 5)):
        done = child(KILLED, tmp_path / "plan.json", out, phase, after)
        assert done.returncode == -signal.SIGKILL, done.stderr
    tiles = {path: path.stat().st_ino for path in (out / "features.zarr").rglob("c/*/*")}
    assert len(tiles) > 3
    ooc_ntk.run(seeded_job(batch_size=2), out, progress=False)
    assert {path: path.stat().st_ino for path in tiles} == tiles
    assert bits(out) == bits(run_plan(plan, tmp_path / "reference"))
    assert ooc_ntk.verify(out, seeded_job(batch_size=2)).passed


LAYOUTS = [(33, 160, 26), (3, 100, 1), (7, 9, 3)]


@pytest.mark.parametrize(
    ("kind", "layer_rules"), [*((kind, True) for kind in ("sjlt", "rademacher", "tensorsketch")), ("shift", False)]
)
def test_other_tilings_and_batches_agree(kind, layer_rules, compute):
    job = case("attention").job(kernel="trace", projection=projection(kind))
    first = None
    for tile, span, batch in LAYOUTS:
        found = compute(job, batch_size=batch, tile_samples=tile, span_columns=span, layer_rules=layer_rules)
        assert (found.plan.tile_samples, found.plan.span_columns) == (tile, span)
        first = first or (stored(found), np.asarray(found, dtype=np.float64))
        assert oracle.error(stored(found), first[0]) <= CLOSE
        assert oracle.error(found, first[1]) <= CLOSE


# --- features only ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel": "full", "scale": "mean"},
        {"kernel": "full", "normalize": "cosine"},
        {"scale": "mean", "normalize": "cosine"},
        {"precision": "bf16"},
        {"precision": "float64", "kernel": "pseudo", "scale": "mean"},
    ],
    ids=lambda options: " ".join(options.values()) or "trace",
)
def test_features_only_stand_for_the_kernel_of_a_whole_run(options, compute):
    job = case("attention").job(projection=projection("sjlt", 512), **options)
    whole, found = compute(job, tile_samples=10), compute(job, tile_samples=10, features_only=True)
    assert not (found.path / "kernel.zarr").exists()
    assert found.plan.features_only
    assert found.plan.digest != whole.plan.digest
    assert ooc_ntk.info(found.path).finished
    close = 1e-2 if options.get("precision") == "bf16" else CLOSE
    entries = np.asarray(whole, dtype=np.float64)
    assert oracle.error(found, entries) <= close
    assert found.shape == whole.shape == entries.shape
    assert found.dtype == whole.dtype
    rows = np.array([0, 7, 30])
    assert oracle.error(found[rows, 3:9], entries[rows, 3:9]) <= close
    assert oracle.error(found.diagonal(), whole.diagonal()) <= close
    lazy = found.dask()
    assert oracle.error(lazy.compute(scheduler="sync"), entries) <= close
    assert oracle.error(lazy[4:9, ::5].compute(scheduler="sync"), entries[4:9, ::5]) <= close
    targets = torch.randn(entries.shape[1], 3, generator=torch.Generator().manual_seed(1)).numpy()
    ridge = float(entries[: len(targets)].diagonal().mean()) / 10
    solution = found.solve(targets, ridge)
    assert solution.residual <= 1e-6
    assert oracle.error(solution.coefficients, whole.solve(targets, ridge).coefficients) <= 100 * close
    scores = entries[entries.shape[1] :] @ solution.coefficients
    assert oracle.error(found.predict(solution), scores) <= 100 * close
    with pytest.raises(InputError, match="only features were kept"):
        _ = found.zarr
    assert oracle.error(ooc_ntk.open(found.path), entries) <= close
    assert oracle.error(ooc_ntk.open_features(found.path), entries) <= close
    assert oracle.error(ooc_ntk.open_features(whole.path), entries) <= close


def test_a_plan_for_features_only_is_not_one_for_a_kernel(compute, tmp_path, rates):
    job = case("smooth-mlp").job(projection=projection())
    plan = ooc_ntk.plan(job, BUDGET, preferences=ooc_ntk.Preferences(features_only=True), rates=rates)
    assert "no kernel" in str(plan)
    assert plan.promised.disk_bytes < ooc_ntk.plan(job, BUDGET, rates=rates).promised.disk_bytes
    again = compute(job, features_only=True)
    audit = ooc_ntk.verify(again.path, job)
    assert audit.passed, audit.checks
    assert audit.predicted_error is not None
    assert [check.name for check in audit.checks] == [
        "checksums",
        "finite features",
        "features recomputed in float64",
        "residual of the projection",
        "Φᵀv against Rᵀ(Jᵀv)",
    ]


# --- memory ----------------------------------------------------------------------------------------------------------

MEASURED = """
import json, resource, sys
from pathlib import Path
import torch
from torch import nn
import ooc_ntk
out, budget, kind, rules = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] == "rules"
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(64, 700), nn.Tanh(), nn.Linear(700, 700), nn.Tanh(), nn.Linear(700, 10))
data = torch.rand(48, 64, generator=torch.Generator().manual_seed(0))
job = ooc_ntk.Job(model=net, train=data[:40], test=data[40:], projection=f"{kind}:512", device="cpu")
limit = ooc_ntk.Budget(host=budget, disk="2GiB")
plan = ooc_ntk.plan(job, limit, preferences=ooc_ntk.Preferences(layer_rules=rules), out=out.parent)
ooc_ntk.run(job, out, plan=plan, budget=limit, progress=False)
status = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
peak += resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
info = ooc_ntk.info(out)
print(json.dumps({
    "peak": peak, "promised": plan.promised.host_bytes, "info": info.host_bytes, "budget": limit.host,
    "finished": info.finished, "disk": info.disk_bytes, "promised_disk": plan.promised.disk_bytes,
    "jacobian": plan.jacobian_bytes, "terms": dict(plan.host_terms), "batch": plan.batch_size,
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rules"), [("sjlt", "torch.func"), pytest.param("rademacher", "rules", marks=pytest.mark.grid)]
)
def test_peak_stays_below_the_promise(kind, rules, tmp_path):
    done = child(MEASURED, tmp_path / "run", "900MiB", kind, rules, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["jacobian"] > 1.1 * found["budget"]
    assert found["finished"]
    assert found["peak"] <= found["promised"] <= found["budget"]
    assert found["info"] <= found["peak"] * 1.01
    assert found["disk"] <= found["promised_disk"]


def test_a_budget_too_small_for_projecting_is_refused(rates):
    with pytest.raises(BudgetError, match=r"no plan fits.*--host-memory"):
        ooc_ntk.plan(case("smooth-mlp").job(projection=projection()), ooc_ntk.Budget(host="64MiB"), rates=rates)


# --- plans and the error that they expect ----------------------------------------------------------------------------

SEEDS = 30


@functools.cache
def sketched_errors(kind: str, dim: int, kernel: str, structured: tuple[str, ...], nonzeros: int) -> np.ndarray:
    """Relative error of the train square for 30 seeds, from ``J·R`` by definition."""
    chosen = case("smooth-mlp")
    rows = rows_of(oracle.case_jacobian("smooth-mlp")[:TRAIN], kernel)
    exact = oracle.kernel(rows, TRAIN, "full" if kernel == "full" else "trace")
    found = []
    for seed in range(SEEDS):
        outers, position = [], 0
        for name, parameter in chosen.module.named_parameters():
            if name in structured:
                outers.append(Outer(position, *parameter.shape))
            position += parameter.numel()
        wanted = projection(kind, dim, seed=1000 + seed, nonzeros=nonzeros)
        features = rows @ dense_columns(wanted, np.arange(position), np.arange(dim), outers)
        found.append(oracle.error(oracle.kernel(features, TRAIN, "full" if kernel == "full" else "trace"), exact))
    return np.array(found)


def rms(values) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


@pytest.mark.parametrize(("kind", "kernel"), [*((kind, "trace") for kind in KINDS), ("sjlt", "full")])
def test_the_expected_error_is_that_of_many_seeds(kind, kernel, compute):
    job = case("smooth-mlp").job(kernel=kernel, projection=projection(kind))
    found = compute(job)
    plan = found.plan
    real = rms(sketched_errors(kind, DIM, kernel, plan.structured, plan.projection.nonzeros))
    assert plan.expected_error == pytest.approx(real, rel=0.3)
    assert found.expected_error() == pytest.approx(real, rel=0.3)
    # Of the run itself: one of these seeds, up to the spread between them.
    rows = rows_of(oracle.case_jacobian("smooth-mlp"), kernel)
    own = oracle.kernel(rows, TRAIN, "full" if kernel == "full" else "trace")
    square = found.shape[1]
    assert real / 4 < oracle.error(np.asarray(found)[:square], own[:square]) < 4 * real


@pytest.mark.parametrize("normalize", [None, "cosine"])
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_the_expected_error_of_a_full_kernel_of_few_samples(samples, normalize, compute):
    """Most of its entries are of outputs of one sample."""
    chosen, dim = case("smooth-mlp"), 256
    job = ooc_ntk.Job(
        model=chosen.module,
        train=chosen.train[:samples],
        kernel="full",
        normalize=normalize,
        projection=projection("gaussian", dim),
        device="cpu",
    )
    rows = np.concatenate(oracle.case_jacobian("smooth-mlp")[:samples])
    exact = rows @ rows.T
    own = exact.diagonal()
    variance = (own[:, None] * own + exact**2) / dim
    if normalize:
        exact = exact / np.sqrt(own[:, None] * own)
        variance = (1 - exact**2) ** 2 / dim
    wanted = float(np.sqrt(variance.sum()) / np.linalg.norm(exact))
    found = compute(job)
    assert found.plan.expected_error == pytest.approx(wanted, rel=0.25)
    assert found.expected_error() == pytest.approx(wanted, rel=0.25)


def test_the_expected_error_is_that_of_many_runs(compute):
    job = case("relu-mlp").job(test=False)
    exact = oracle.kernel(oracle.case_jacobian("relu-mlp")[:TRAIN], TRAIN)
    errors, expected = [], []
    for seed in range(SEEDS):
        found = compute(dataclasses.replace(job, projection=projection("sjlt", 256, seed=seed)))
        errors.append(oracle.error(found, exact))
        expected += [found.plan.expected_error, found.expected_error()]
    assert np.array(expected) == pytest.approx(rms(errors), rel=0.3)


@pytest.mark.parametrize(
    ("kind", "kernel"), [("shift", "trace"), ("gaussian", "pseudo"), ("tensorsketch", "trace"), ("sjlt", "full")]
)
def test_a_target_error_gets_the_columns_that_it_needs(kind, kernel, rates):
    target = 0.025 if kind == "tensorsketch" else 0.12  # below it, the smallest tensor sketch has a smaller error
    job = case("smooth-mlp").job(kernel=kernel, projection=ooc_ntk.Projection(kind, target_error=target))
    plan = ooc_ntk.plan(job, BUDGET, rates=rates)
    assert plan.projection.target_error is None
    step = max(1, plan.projection.nonzeros)
    assert plan.projection.dim % step == 0
    assert plan.expected_error <= target
    assert plan.expected_error >= 0.8 * target
    errors = sketched_errors(kind, plan.projection.dim, kernel, plan.structured, plan.projection.nonzeros)
    assert rms(errors) == pytest.approx(target, rel=0.3)


def test_a_run_for_a_target_error_goes_on_by_the_same_job(compute, tmp_path):
    job = case("smooth-mlp").job(projection=ooc_ntk.Projection(target_error=0.15))
    found = compute(job)
    again = ooc_ntk.run(job, found.path, progress=False)
    assert again.plan.digest == found.plan.digest
    assert ooc_ntk.verify(found.path, job).passed


def test_the_plan_says_what_projecting_saves(rates):
    plan = ooc_ntk.plan(case("smooth-mlp").job(projection=projection("gaussian", seed=6)), BUDGET, rates=rates)
    text = str(plan)
    (note,) = (note for note in plan.notes if "exact kernel would take" in note)
    assert note in text
    assert "cheaper" in note
    assert f"expected error of {plan.expected_error:.1%}" in note
    assert "gaussian to 160 columns" in text
    assert "seed 6" in text
    assert f"by {plan.projection.backend}" in text
    assert any(entry.layout.startswith("exact: ") for entry in plan.alternatives)
    assert "projected trace kernel" in text


@pytest.mark.parametrize("kind", ["sjlt", "tensorsketch"])
def test_a_projected_plan_survives_json(kind, tmp_path):
    plan = tiled_plan(kind, features_only=True)
    assert ooc_ntk.Plan.from_json(plan.to_json()) == plan
    plan.save(tmp_path / "plan.json")
    loaded = ooc_ntk.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.digest == plan.digest
    assert isinstance(loaded.projection, ooc_ntk.Projection)
    assert loaded.layout == plan.layout


def test_the_digest_covers_what_changes_the_result(rates):
    def digest(preferences=None, **fields) -> str:
        wanted = ooc_ntk.Projection(**{"kind": "sjlt", "dim": 128, "backend": "numba", **fields})
        job = case("smooth-mlp").job(projection=wanted, batch_size=4)
        preferences = preferences or ooc_ntk.Preferences(tile_samples=8, span_columns=32)
        return ooc_ntk.plan(job, BUDGET, preferences=preferences, rates=rates).digest

    base = digest()
    assert digest() == base
    others = [
        digest(seed=1),
        digest(dim=132),
        digest(kind="shift"),
        digest(kind="rademacher"),
        digest(nonzeros=8),
        digest(backend="torch"),
        digest(ooc_ntk.Preferences(tile_samples=8, span_columns=32, features_only=True)),
        digest(ooc_ntk.Preferences(tile_samples=9, span_columns=32)),
    ]
    assert len({base, *others}) == 1 + len(others)
    structured = [digest(kind="tensorsketch", dim=dim, nonzeros=8) for dim in (128, 256)]
    assert len(set(structured)) == 2


# --- audits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "kernel"), [("sjlt", "full"), ("shift", "trace"), ("gaussian", "trace"), ("tensorsketch", "trace")]
)
def test_a_projected_run_verifies(kind, kernel, compute):
    job = case("attention").job(kernel=kernel, projection=projection(kind, seed=8))
    found = compute(job, tile_samples=10)
    audit = ooc_ntk.verify(found.path, job)
    assert audit.passed, audit.checks
    assert {"features recomputed in float64", "residual of the projection"} <= {check.name for check in audit.checks}
    assert audit.predicted_error is not None
    assert audit.relative_error < 4 * audit.predicted_error
    assert audit.predicted_error < 0.5
    assert ooc_ntk.info(found.path).audited["relative_error"] == audit.relative_error


@pytest.mark.parametrize(
    "options",
    [{"normalize": "cosine"}, {"scale": "mean"}, {"precision": "bf16"}, {"precision": "float64"}, {"outputs": "loss"}],
    ids=lambda options: " ".join(options.values()),
)
def test_other_projected_runs_verify(options, compute):
    job = case("attention").job(projection=projection(), **options)
    found = compute(job, tile_samples=10)
    audit = ooc_ntk.verify(found.path, job)
    assert audit.passed, audit.checks
    assert audit.predicted_error > 0


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "damage"),
    [("features.zarr/c/2/1", flip), ("features.zarr/c/6/2", Path.unlink), ("heavy.zarr/c/3/0", flip)],
)
def test_a_damaged_tile_of_features_is_named_and_made_again(file, damage, tmp_path):
    plan = tiled_plan()
    out = run_plan(plan, tmp_path / "run")
    before = bits(out)
    damage(out / file)
    audit = ooc_ntk.verify(out, samples=0)
    (failed,) = (check for check in audit.checks if not check.passed)
    assert failed.name == "checksums"
    assert file in failed.detail
    ooc_ntk.run(seeded_job(batch_size=2), out, progress=False)
    assert bits(out) == before
    assert ooc_ntk.verify(out, seeded_job(batch_size=2)).passed


def test_a_whole_kernel_without_all_features_does_not_open(tmp_path):
    out = run_plan(tiled_plan(), tmp_path / "run")
    # So a run is left that was killed after it had found damaged features.
    manifest = Manifest(out)
    manifest.withdraw(["rows-0-2-0"])
    manifest.close()
    with pytest.raises(IncompleteRunError, match="6 of 7 feature tiles"):
        ooc_ntk.open(out)


@pytest.fixture
def off_scale(monkeypatch):
    """``off_scale(factor)``: an engine that brings features to another scale, kernel and diagonal with them."""
    result = Sketch.result

    def patch(factor: float):
        monkeypatch.setattr(Sketch, "result", lambda self: result(self) * factor)
        return lambda: monkeypatch.setattr(Sketch, "result", result)

    return patch


@pytest.mark.parametrize("features_only", [False, True])
def test_features_off_the_scale_do_not_verify(features_only, off_scale, compute):
    job = case("smooth-mlp").job(projection=projection())
    undo = off_scale((DIM / 2130) ** 0.5)
    found = compute(job, tile_samples=10, features_only=features_only)
    undo()
    audit = ooc_ntk.verify(found.path, job)
    assert not audit.passed
    failed = {check.name for check in audit.checks if not check.passed}
    assert failed == {"features recomputed in float64", "residual of the projection", "Φᵀv against Rᵀ(Jᵀv)"}
    assert audit.relative_error == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("factor", [(DIM / 2130) ** 0.5, 2**0.5, 0.0])
def test_a_projection_off_the_scale_by_definition_fails_by_its_residual_alone(factor, off_scale, compute, monkeypatch):
    job = case("smooth-mlp").job(projection=projection("sjlt", 512))
    undo = off_scale(factor)
    found = compute(job, tile_samples=10)
    undo()
    add = FeatureReference.add
    monkeypatch.setattr(FeatureReference, "add", lambda self, output, values: add(self, output, factor * values))
    audit = ooc_ntk.verify(found.path, job)
    assert [check.name for check in audit.checks if not check.passed] == ["residual of the projection"]


def test_a_kernel_that_is_not_that_of_its_features_does_not_verify(compute, monkeypatch):
    """What is stored of the kernel is wrong, its checksums are not."""
    from ooc_ntk.execution import contraction

    wanted = [name for name in vars(contraction) if name == "divisor"]
    if not wanted:
        pytest.skip("the divisor is not where it was")
    monkeypatch.setattr(contraction, "divisor", lambda plan: 3.0)
    job = case("smooth-mlp").job(projection=projection("sjlt", 1024))
    found = compute(job, tile_samples=10)
    monkeypatch.undo()
    audit = ooc_ntk.verify(found.path, job)
    assert not audit.passed


# --- what is shown ---------------------------------------------------------------------------------------------------

NETS = """
import torch


def small():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 24), torch.nn.Tanh(), torch.nn.Linear(24, 10))
"""

JOB = ("--model", "nets.py:small", "--train", "digits[0:60]", "--test", "digits[60:70]", "--device", "cpu")


def test_the_command_line_plans_runs_shows_and_verifies(cli):
    ran = cli("run", *JOB, "--projection", "sjlt:256", "--projection-seed", 7, "--out", "r")
    assert ran.exit_code == 0, ran.output
    info = ooc_ntk.info("r")
    assert info.plan.projection == ooc_ntk.Projection("sjlt", 256, seed=7, backend=info.plan.projection.backend)
    for phrase in ("sjlt to 256 columns", "seed 7", "of the kernel expected", "the exact kernel would take"):
        assert phrase in ran.output
    before = cli("info", "r")
    (line,) = (line for line in before.output.splitlines() if line.startswith("error of the kernel"))
    assert line.split()[-3:] == [f"{info.expected_error:.2%}", "-", "-"]
    verified = cli("verify", "r")
    assert verified.exit_code == 0, verified.output
    for phrase in ("features recomputed in float64", "residual of the projection", "predicted"):
        assert phrase in verified.output
    after = cli("info", "r")
    audited = json.loads(cli("info", "r", "--json").stdout)
    assert audited["projection"] == {
        "projection": "sjlt 256 seed 7 nonzeros 4",
        "expected_error": info.expected_error,
    }
    (line,) = (line for line in after.output.splitlines() if line.startswith("error of the kernel"))
    seen, predicted = (audited["audit"][name] for name in ("relative_error", "predicted_error"))
    assert line.split()[-3:] == [f"{info.expected_error:.2%}", f"{seen:.2%}", f"{seen / predicted:.2f}"]
    again = cli("run", "--out", "r")
    assert (again.exit_code, "nothing to do" in again.output) == (0, True), again.output


def test_the_command_line_takes_a_target_error(cli):
    planned = cli("plan", *JOB, "--target-error", 0.1, "--save", "plan.json")
    assert planned.exit_code == 0, planned.output
    plan = ooc_ntk.Plan.load("plan.json")
    assert plan.projection.kind == "sjlt"
    assert 0.08 <= plan.expected_error <= 0.1
    assert f"sjlt to {plan.projection.dim:,} columns" in planned.output
    assert f"{plan.expected_error:.2%} of the kernel expected" in planned.output
    other = json.loads(
        cli("plan", *JOB, "--projection", "rademacher", "--target-error", 0.2, "--backend", "torch", "--json").stdout
    )
    assert (other["projection"]["kind"], other["projection"]["backend"]) == ("rademacher", "torch")
    ran = cli("run", *JOB, "--target-error", 0.1, "--plan", "plan.json", "--out", "r", "--quiet")
    assert ran.exit_code == 0, ran.output
    assert ooc_ntk.open("r").plan.digest == plan.digest


def test_the_command_line_keeps_features_only(cli):
    ran = cli("run", *JOB, "--projection", "shift:256", "--features-only", "--out", "r")
    assert ran.exit_code == 0, ran.output
    assert "features: r/features.zarr" in ran.output
    assert "no kernel" in ran.output
    assert not Path("r/kernel.zarr").exists()
    shown = cli("info", "r")
    assert "feature tiles, complete" in shown.output
    assert cli("verify", "r").exit_code == 0
    again = cli("run", "--out", "r", "--features-only")
    assert (again.exit_code, "nothing to do" in again.output) == (0, True), again.output
    assert ooc_ntk.open("r").shape == (70, 60)


def test_a_run_whose_features_are_wrong_exits_with_1(cli, off_scale):
    undo = off_scale(1.5)
    assert cli("run", *JOB, "--projection", "sjlt:256", "--out", "r", "--quiet").exit_code == 0
    undo()
    result = cli("verify", "r")
    assert result.exit_code == 1
    assert "FAILED" in result.output
    assert json.loads(cli("info", "r", "--json").stdout)["audit"]["passed"] is False
