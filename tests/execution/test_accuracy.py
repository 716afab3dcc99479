"""End to end against the float64 oracle: every kernel, output function, model, dataflow and tile size."""

import dataclasses
import json

import dask
import numpy as np
import pytest
import torch
import zarr
from torch import nn

import ooc_ntk
from tests import oracle
from tests.cases import FLOAT64, NAMES, PROBABILITY, SMOOTH, TEST, TRAIN, Branching, TiedTokens, TwoInputs, case, digits

KINDS = ("trace", "pseudo", "output:2", "full")

#: Contraction from identical gradients.
CONTRACTION = 5e-7


def first_and_square(output, target):
    """A function of the user's: two outputs per sample."""
    return torch.stack([output[0] - output[1], output.square().sum()])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_logits(name, kind, compute):
    chosen = case(name)
    found = compute(chosen.job(kernel=kind))
    wanted = oracle.kernel(oracle.case_jacobian(name), TRAIN, kind)
    assert oracle.error(found, wanted) <= chosen.bound
    assert found.plan.tolerance >= oracle.error(found, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_the_square_alone(name, compute):
    found = compute(case(name).job(test=False), tile_samples=10)
    assert found.shape == (TRAIN, TRAIN)
    wanted = oracle.kernel(oracle.case_jacobian(name)[:TRAIN], TRAIN)
    assert oracle.error(found, wanted) <= case(name).bound
    entries = np.asarray(found)
    assert np.array_equal(entries, entries.T)


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "full") for name in NAMES), *(("attention", k) for k in KINDS[:3])]
)
def test_float64(name, kind, compute):
    found = compute(case(name).job(kernel=kind, precision="float64"), tile_samples=9)
    assert found.dtype == np.float64
    assert oracle.error(found, oracle.kernel(oracle.case_jacobian(name), TRAIN, kind)) <= FLOAT64


@pytest.mark.parametrize("outputs", ["loss", "margin"])
@pytest.mark.parametrize("name", NAMES)
def test_trained_probabilities(name, outputs, compute):
    chosen = case(name, trained=True)
    with torch.no_grad():
        sure = chosen.module(chosen.train).softmax(1).gather(1, chosen.labels[:, None])
    assert sure.median() > 0.99, "the network must be sure, or no digits cancel"
    found = compute(chosen.job(outputs=outputs))
    wanted = oracle.kernel(oracle.case_jacobian(name, trained=True, outputs=outputs), TRAIN)
    assert oracle.error(found, wanted) <= PROBABILITY


@pytest.mark.parametrize("method", ["loop", "vmap"])
@pytest.mark.parametrize("outputs", ["loss", "margin", first_and_square])
def test_output_functions_in_float64(outputs, method, compute):
    found = compute(case("attention", trained=True).job(outputs=outputs, kernel="full", precision="float64"), method)
    rows = oracle.case_jacobian("attention", trained=True, outputs=outputs)
    assert found.plan.outputs == rows.shape[1]
    assert oracle.error(found, oracle.kernel(rows, TRAIN, "full")) <= FLOAT64


def test_output_of_a_users_function(compute):
    found = compute(case("smooth-mlp").job(outputs=first_and_square, kernel="output:1"))
    rows = oracle.case_jacobian("smooth-mlp", outputs=first_and_square)
    assert oracle.error(found, oracle.kernel(rows, TRAIN, "output:1")) <= SMOOTH


@pytest.mark.parametrize("kind", KINDS)
def test_mean_divides_by_the_outputs(kind, compute):
    found = compute(case("attention").job(kernel=kind, scale="mean"), tile_samples=11)
    rows = oracle.case_jacobian("attention")
    assert rows.shape[1] == 4
    assert oracle.error(found, oracle.kernel(rows, TRAIN, kind, scale="mean")) <= SMOOTH
    diagonal = oracle.kernel(rows, TRAIN + TEST, kind, scale="mean").diagonal()
    assert oracle.error(found.diagonal(), diagonal) <= SMOOTH


@pytest.mark.parametrize(
    ("kind", "preferences"),
    [
        *((kind, {"tile_samples": 10}) for kind in KINDS),
        ("trace", {"dataflow": "recompute", "passes": 3, "tile_samples": 10}),
    ],
)
def test_cosine(kind, preferences, compute):
    found = compute(case("smooth-mlp").job(kernel=kind, normalize="cosine", scale="mean"), **preferences)
    rows = oracle.case_jacobian("smooth-mlp")
    assert oracle.error(found, oracle.kernel(rows, TRAIN, kind, normalize="cosine")) <= SMOOTH
    square = np.asarray(found)[: found.shape[1]]
    np.testing.assert_allclose(square.diagonal(), 1, atol=SMOOTH)
    # The stored diagonal stays that of the kernel before it was normalised.
    assert oracle.error(found.diagonal(), oracle.kernel(rows, TRAIN + TEST, kind, "mean").diagonal()) <= SMOOTH


def test_cosine_of_a_sample_without_gradient_is_zero(compute):
    images = digits()[0][:9].flatten(1).clone()
    images[4] = 0
    found = compute(
        ooc_ntk.Job(model=nn.Linear(64, 3, bias=False).eval(), train=images, normalize="cosine", device="cpu"),
        tile_samples=4,
    )
    entries = np.asarray(found)
    assert (entries[4] == 0).all()
    assert (entries[:, 4] == 0).all()
    assert (np.delete(entries.diagonal(), 4) > 0.99).all()
    assert found.diagonal()[4] == 0


@pytest.mark.parametrize("name", ["cnn", "attention"])
def test_the_diagonal(name, compute):
    found = compute(case(name).job(), tile_samples=10)
    wanted = oracle.kernel(oracle.case_jacobian(name), TRAIN + TEST).diagonal()
    assert found.diagonal().shape == (TRAIN + TEST,)
    assert oracle.error(found.diagonal(), wanted) <= case(name).bound
    np.testing.assert_allclose(found.diagonal()[:TRAIN], np.asarray(found)[:TRAIN].diagonal(), rtol=1e-6)


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ("1.*", ["1.weight", "1.bias"]),
        ("!5.*", ["1.weight", "1.bias", "3.weight", "3.bias"]),
        (["*.weight", "!3.*"], ["1.weight", "5.weight"]),
        (["5.*", "1.bias"], ["1.bias", "5.weight", "5.bias"]),
    ],
)
def test_chosen_parameters_give_the_kernel_of_their_columns(patterns, names, compute):
    chosen = case("smooth-mlp")
    found = compute(chosen.job(parameters=patterns), tile_samples=12)
    rows = oracle.jacobian(chosen.module, chosen.images, names=names)
    assert found.plan.columns == rows.shape[2]
    assert oracle.error(found, oracle.kernel(rows, TRAIN)) <= SMOOTH
    assert oracle.error(found, oracle.kernel(oracle.case_jacobian("smooth-mlp"), TRAIN)) > 1e-3


def test_frozen_layers_are_left_out(compute):
    torch.manual_seed(3)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    module[1].requires_grad_(False)
    images = digits()[0][:14]
    found = compute(ooc_ntk.Job(model=module, train=images, device="cpu"))
    assert found.plan.columns == 8 * 4 + 4
    assert any("frozen" in note for note in found.plan.notes)
    rows = oracle.jacobian(module, images, names=["3.weight", "3.bias"])
    assert oracle.error(found, oracle.kernel(rows, 14)) <= SMOOTH
    assert [parameter.requires_grad for parameter in module.parameters()] == [False, False, True, True]


@pytest.mark.parametrize("method", ["loop", "vmap"])
@pytest.mark.parametrize("how", ["by name", "by position"])
def test_models_of_two_inputs(how, method, compute):
    torch.manual_seed(4)
    module, images = TwoInputs().eval(), digits()[0][:17]
    extra = torch.randn(17, 5)
    if how == "by name":
        train, test = {"image": images[:12], "extra": extra[:12]}, {"image": images[12:], "extra": extra[12:]}
        inputs = {"image": images, "extra": extra}
    else:
        train, test = ((images[:12], extra[:12]), None), ((images[12:], extra[12:]), None)
        inputs = (images, extra)
    job = ooc_ntk.Job(model=module, train=train, test=test, kernel="full", device="cpu")
    found = compute(job, method, tile_samples=5)
    assert oracle.error(found, oracle.kernel(oracle.jacobian(module, inputs), 12, "full")) <= SMOOTH


@pytest.mark.parametrize("method", ["loop", "vmap"])
def test_a_tied_embedding_counts_both_uses(method, compute):
    torch.manual_seed(5)
    module, tokens = TiedTokens().eval(), torch.randint(0, 9, (15, 4))
    found = compute(ooc_ntk.Job(model=module, train=tokens[:11], test=tokens[11:], device="cpu"), method)
    rows = oracle.jacobian(module, tokens)
    assert found.plan.columns == rows.shape[2] == 9 * 6 + 6 * 6 + 6
    assert oracle.error(found, oracle.kernel(rows, 11)) <= SMOOTH


def test_a_model_that_vmap_refuses_takes_the_loop(compute):
    torch.manual_seed(6)
    module, images = Branching().eval(), digits()[0][:16]
    bright = images.flatten(1).mean(1) > 0.3
    assert bright.any()
    assert not bright.all()
    found = compute(ooc_ntk.Job(model=module, train=images, kernel="full", device="cpu"), batch_size=5)
    assert found.plan.method == "loop"
    (note,) = (note for note in found.plan.notes if "vmap refused" in note)
    assert "data-dependent control flow" in note
    assert note in str(found.plan)
    assert oracle.error(found, oracle.kernel(oracle.jacobian(module, images), 16, "full")) <= SMOOTH


_RESIDENT: dict[str, tuple[np.ndarray, np.ndarray]] = {}


def _resident(kind, compute):
    """Kernel and diagonal of the simplest layout, computed once."""
    if kind not in _RESIDENT:
        found = compute(case("smooth-mlp").job(kernel=kind), "loop", dataflow="resident", tile_samples=64)
        _RESIDENT[kind] = np.asarray(found, dtype=np.float64), found.diagonal()
    return _RESIDENT[kind]


LAYOUTS = {
    "resident, one tile": {"dataflow": "resident", "tile_samples": 64},
    "resident, straddling": {"dataflow": "resident", "tile_samples": 10, "span_columns": 333},
    "resident, four by four": {"dataflow": "resident", "tile_samples": 4, "span_columns": 2000},
    "spill, even": {"dataflow": "spill", "tile_samples": 13, "span_columns": 512},
    "spill, straddling": {"dataflow": "spill", "tile_samples": 7, "span_columns": 500},
    "spill, wide": {"dataflow": "spill", "tile_samples": 32, "span_columns": 10**6},
    "recompute, 2 passes": {"dataflow": "recompute", "passes": 2, "tile_samples": 8, "span_columns": 300},
    "recompute, 5 passes": {"dataflow": "recompute", "passes": 5, "tile_samples": 10, "span_columns": 191},
}


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        *(("trace", layout) for layout in LAYOUTS),
        *(("full", layout) for layout in ("resident, straddling", "spill, straddling", "recompute, 5 passes")),
    ],
)
def test_every_dataflow_and_tile_size_gives_the_same_kernel(layout, kind, compute):
    chosen, preferences = case("smooth-mlp"), LAYOUTS[layout]
    tile = preferences["tile_samples"]
    if "straddling" in layout:
        assert TRAIN % tile, "a tile must hold train and test samples"
        assert (TRAIN + TEST) % tile, "the last tile must be padded"
    found = compute(chosen.job(kernel=kind), "loop", **preferences)
    assert found.plan.dataflow == preferences["dataflow"]
    assert len(found.plan.passes) == preferences.get("passes", 1)
    wanted = oracle.kernel(oracle.case_jacobian("smooth-mlp"), TRAIN, kind)
    assert oracle.error(found, wanted) <= chosen.bound
    same, diagonal = _resident(kind, compute)
    assert oracle.error(found, same) <= CONTRACTION
    assert oracle.error(found.diagonal(), diagonal) <= CONTRACTION


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_batch_size_changes_nothing_beyond_rounding(batch_size, compute):
    chosen = case("attention")
    found = compute(chosen.job(kernel="full"), "vmap", batch_size, tile_samples=9)
    assert oracle.error(found, oracle.kernel(oracle.case_jacobian("attention"), TRAIN, "full")) <= SMOOTH


@pytest.mark.parametrize("name", NAMES)
def test_loop_and_vmap_agree(name, compute):
    chosen = case(name)
    loop, vmapped = (compute(chosen.job(kernel="full"), method) for method in ("loop", "vmap"))
    assert (loop.plan.method, vmapped.plan.method) == ("loop", "vmap")
    assert oracle.error(loop, np.asarray(vmapped, dtype=np.float64)) <= chosen.bound


def test_dask_and_plain_zarr_read_what_the_kernel_reads(compute):
    found = compute(case("attention").job(kernel="full"), tile_samples=7)
    entries = np.asarray(found)
    assert np.isfinite(entries).all()
    plain = zarr.open_array(found.path / "kernel.zarr", mode="r")
    assert np.array_equal(plain[:], entries)
    lazy = found.dask()
    assert lazy.chunks[0][0] == plain.chunks[0] == 7 * 4
    assert np.array_equal(lazy.compute(scheduler="sync"), entries)
    with dask.config.set(scheduler="sync"):
        assert np.array_equal(np.asarray(lazy[3:9, ::5]), entries[3:9, ::5])


def test_a_missing_tile_reads_as_nan_in_plain_zarr(compute):
    found = compute(case("smooth-mlp").job(), tile_samples=7)
    (found.path / "kernel.zarr/c/1/0").unlink()
    entries = zarr.open_array(found.path / "kernel.zarr", mode="r")[:]
    assert np.isnan(entries[7:14, :7]).all()
    assert np.isnan(entries).sum() == 49


def test_the_kernel_carries_its_provenance(compute):
    found = compute(case("attention").job(kernel="full", scale="mean", normalize="cosine", seed=5), tile_samples=11)
    plan, there = found.plan, dict(zarr.open_array(found.path / "kernel.zarr", mode="r").attrs)
    assert there["plan_digest"] == plan.digest
    assert there["job_digests"].keys() == {"model", "data", "kernel"}
    assert there["versions"]["torch"] == torch.__version__
    wanted = {
        "kernel": "full",
        "scale": "mean",
        "normalize": "cosine",
        "precision": "float32",
        "train_samples": TRAIN,
        "test_samples": TEST,
        "outputs": 4,
        "entries_per_sample": 4,
        "seed": 5,
    }
    assert {name: there[name] for name in wanted} == wanted
    assert json.loads((found.path / "plan.json").read_text())["digest"] == plan.digest


def test_a_run_leaves_the_model_alone(compute):
    chosen = case("cnn")
    before = {name: value.clone() for name, value in chosen.module.state_dict().items()}
    compute(chosen.job())
    assert not chosen.module.training
    assert all(torch.equal(value, before[name]) for name, value in chosen.module.state_dict().items())
    assert all(parameter.grad is None for parameter in chosen.module.parameters())


@pytest.mark.parametrize(("outputs", "bound"), [("logits", SMOOTH), ("loss", PROBABILITY)])
def test_the_plan_promises_the_tolerance_that_was_measured_for(outputs, bound, compute):
    found = compute(case("attention", trained=True).job(outputs=outputs))
    assert found.plan.tolerance == bound


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("dataflow", ["resident", "spill", "recompute"])
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu(name, dataflow, compute):
    chosen = case(name)
    job = dataclasses.replace(chosen.job(kernel="full"), device="cuda")
    found = compute(job, dataflow=dataflow, tile_samples=10, span_columns=300)
    assert found.plan.promised.device_bytes > 0
    wanted = oracle.kernel(oracle.case_jacobian(name), TRAIN, "full")
    assert oracle.error(found, wanted) <= chosen.bound
