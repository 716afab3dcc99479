"""Layer-wise kernels: every layer's summand against the oracle, and all of them against the kernel."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import zarr
from torch import nn

import ooc_ntk
from ooc_ntk.errors import BudgetError, InputError
from ooc_ntk.planning.layers import layer_names
from tests import oracle, zoo
from tests.cases import KINKED, SMOOTH, TRAIN, case
from tests.zoo import zoo_case

pytestmark = pytest.mark.usefixtures("one_thread")


def layer_rows(module: nn.Module, rows: np.ndarray) -> dict[str, np.ndarray]:
    """The Jacobian's columns by layer, a layer being the module that owns the parameters."""
    found: dict[str, list[np.ndarray]] = {}
    start = 0
    for name, parameter in module.named_parameters():
        stop = start + parameter.numel()
        found.setdefault(name.rpartition(".")[0] or "(model)", []).append(rows[:, :, start:stop])
        start = stop
    return {name: np.concatenate(parts, axis=2) for name, parts in found.items()}


def check(found: ooc_ntk.Kernel, module: nn.Module, rows: np.ndarray, tolerance: float, kind: str = "trace") -> None:
    whole = oracle.kernel(rows, found.train_samples, kind)
    wanted = {name: oracle.kernel(part, found.train_samples, kind) for name, part in layer_rows(module, rows).items()}
    assert found.layers == tuple(wanted)
    norm = np.linalg.norm(whole)
    for name, part in wanted.items():
        assert np.linalg.norm(np.asarray(found.layer(name), np.float64) - part) <= tolerance * norm, name
    total = sum(np.asarray(found.layer(name), np.float64) for name in found.layers)
    assert np.linalg.norm(total - np.asarray(found, np.float64)) <= 1e-6 * norm


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dataflow": "spill"},
        {"dataflow": "spill", "tile_samples": 9},
        {"dataflow": "resident", "tile_samples": 7, "span_columns": 100},
        {"representation": "dense", "tile_samples": 12, "span_columns": 333},
        {"representation": "pairwise", "tile_samples": 12},
        {"layer_rules": False, "span_columns": 1000},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["trace", "full"])
def test_layers_under_any_plan(kind, settings, compute):
    chosen = case("attention")
    job = chosen.job(kernel=kind, by="layer")
    found = compute(job, **settings)
    check(found, chosen.module, oracle.case_jacobian("attention"), SMOOTH, kind)
    assert ooc_ntk.verify(found.path, job, samples=4).passed


@pytest.mark.parametrize("name", ["resnet", "gpt", "lstm", "mobilenet", "uncovered"])
def test_layers_of_many_kinds(name, compute):
    chosen = zoo_case(name)
    found = compute(chosen.job(by="layer"), dataflow="spill", tile_samples=5)
    check(found, chosen.module, zoo.jacobian(name), KINKED)


def test_a_layer_is_what_a_run_of_its_parameters_gives(compute):
    chosen = case("attention")
    found = compute(chosen.job(by="layer", scale="mean"))
    alone = compute(chosen.job(parameters="encoder.linear1.*", scale="mean"))
    assert oracle.error(found.layer("encoder.linear1"), np.asarray(alone, np.float64)) <= 1e-6
    assert found.layer("encoder.linear1").trace() == pytest.approx(
        float(np.trace(alone[:TRAIN].astype(float))), rel=1e-6
    )


def test_info_shows_what_every_layer_adds(compute):
    from rich.console import Console

    from ooc_ntk.report.tables import info_table

    chosen = case("attention")
    found = compute(chosen.job(by="layer"), tile_samples=9)
    info = ooc_ntk.info(found.path)
    wanted = {
        name: float(np.trace(oracle.kernel(part, TRAIN)[:TRAIN]))
        for name, part in layer_rows(chosen.module, oracle.case_jacobian("attention")).items()
    }
    assert info.layer_traces == pytest.approx(wanted, rel=1e-5)
    console = Console(width=120, record=True)
    console.print(info_table(info))
    (line,) = [line for line in console.export_text().splitlines() if line.startswith("encoder.linear1")]
    assert f"{wanted['encoder.linear1'] / sum(wanted.values()):.1%}" in line


def test_with_a_narrow_head(compute):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 17)).eval()
    images = case("smooth-mlp").images
    found = compute(ooc_ntk.Job(module, images[:TRAIN], images[TRAIN:], by="layer"))
    assert found.plan.head is not None
    check(found, module, oracle.jacobian(module, images), SMOOTH)


def test_reading_a_layer(compute):
    chosen = case("attention")
    found = compute(chosen.job(by="layer"), tile_samples=10)
    layer = found.layer("head")
    whole = np.asarray(layer)
    assert whole.shape == layer.shape == found.shape
    assert (layer[3:9, :5] == whole[3:9, :5]).all()
    assert (layer[[30, 2], [1, 25]] == whole[np.ix_([30, 2], [1, 25])]).all()
    assert (layer.dask().compute() == whole).all()
    stored = zarr.open_array(found.path / "layers.zarr", mode="r")
    assert stored.attrs["layers"] == list(found.layers)
    assert (stored[found.layers.index("head")] == whole).all()
    with pytest.raises(InputError, match="unknown layer 'haed'; did you mean 'head'"):
        found.layer("haed")
    with pytest.raises(InputError, match="keeps no kernels of single layers; run the job with by='layer'"):
        compute(chosen.job()).layer("head")


def test_stopped_and_resumed_with_the_same_bits(tmp_path, rates):
    chosen = case("attention")
    job = chosen.job(by="layer")
    preferences = ooc_ntk.Preferences(dataflow="spill", tile_samples=9)
    plan = ooc_ntk.plan(job, ooc_ntk.Budget(host="4GiB", disk="1GiB"), preferences=preferences, rates=rates)
    whole = ooc_ntk.run(job, tmp_path / "whole", plan=plan, progress=False)

    class StopHereError(Exception):
        pass

    seen = 0.0

    def advance(phase: str, amount: float) -> None:
        nonlocal seen
        seen += amount if phase == "kernel" else 0
        if seen > 3.5:
            raise StopHereError

    with pytest.raises(StopHereError):
        ooc_ntk.run(
            job, tmp_path / "again", plan=plan, scheduler="serial", progress=ooc_ntk.api.Observer(advance=advance)
        )
    assert not list((tmp_path / "again").glob("layers.zarr/**/*.tmp-*"))
    again = ooc_ntk.run(job, tmp_path / "again", progress=False)
    for name in whole.layers:
        assert (np.asarray(whole.layer(name)) == np.asarray(again.layer(name))).all()


def test_a_damaged_layer_is_found_and_made_again(compute, tmp_path):
    chosen = case("attention")
    job = chosen.job(by="layer")
    found = compute(job, tile_samples=10)
    name = found.layers[2]
    before = np.asarray(found.layer(name))
    chunk = found.path / "layers.zarr" / "c" / "2" / "1" / "0"
    content = bytearray(chunk.read_bytes())
    content[8] ^= 255
    chunk.write_bytes(bytes(content))
    audit = ooc_ntk.verify(found.path, job)
    assert not audit.passed
    assert "layers.zarr/c/2/1/0" in audit.checks[0].detail
    again = ooc_ntk.run(job, found.path, progress=False)
    assert (np.asarray(again.layer(name)) == before).all()
    assert ooc_ntk.verify(found.path, job).passed


def test_verify_sees_a_wrong_layer_behind_right_checksums(compute, monkeypatch):
    from ooc_ntk.execution import contraction

    stage = contraction._stage_layer

    def swapped(context, task, layer, part):
        return stage(context, task, {0: 1, 1: 0}.get(layer, layer), part)

    monkeypatch.setattr(contraction, "_stage_layer", swapped)
    job = case("attention").job(by="layer")
    checks = {check.name: check.passed for check in ooc_ntk.verify(compute(job).path, job).checks}
    assert checks["layers add up"]  # two layers in each other's place still do
    assert not checks["layers recomputed in float64"]


def test_the_plan_counts_them(rates):
    chosen = case("attention")
    budget = ooc_ntk.Budget(host="4GiB", disk="1GiB")
    one, many = (ooc_ntk.plan(chosen.job(by=by), budget, rates=rates) for by in (None, "layer"))
    layers = len(layer_names(many.blocks))
    assert many.promised.disk_bytes >= one.promised.disk_bytes + layers * one.kernel_bytes
    assert f"its summands by {layers} layers" in str(many)
    assert many.digest != one.digest
    assert ooc_ntk.Plan.from_json(many.to_json()) == many
    assert not any(entry.dataflow == "recompute" for entry in many.alternatives)
    with pytest.raises(BudgetError, match=r"of disk .* Raise --disk"):
        ooc_ntk.plan(chosen.job(by="layer"), ooc_ntk.Budget(host="4GiB", disk=one.promised.disk_bytes), rates=rates)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"by": "block"}, "unknown by 'block'"),
        ({"by": "layer", "normalize": "cosine"}, "leave normalize out, or by='layer'"),
        ({"by": "layer", "projection": "sjlt:64"}, "leave projection out, or by='layer'"),
    ],
)
def test_what_has_no_summands(settings, message):
    with pytest.raises(InputError, match=message):
        case("attention").job(**settings)


def test_one_pass_only(rates):
    for preferences in (ooc_ntk.Preferences(dataflow="recompute"), ooc_ntk.Preferences(passes=2)):
        with pytest.raises(InputError, match="layer-wise kernels are made in one pass"):
            ooc_ntk.plan(case("attention").job(by="layer"), preferences=preferences, rates=rates)


def test_the_model_is_not_touched(compute):
    chosen = case("attention")
    before = copy.deepcopy(chosen.module.state_dict())
    compute(chosen.job(by="layer"))
    assert all(torch.equal(value, before[name]) for name, value in chosen.module.state_dict().items())
