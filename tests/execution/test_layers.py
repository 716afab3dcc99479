"""Layer rules end to end against the float64 oracle: every layer, way to use it, representation and kernel."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import nn
from torch.utils.checkpoint import checkpoint

import ooc_ntk
from tests import oracle, zoo
from tests.cases import FLOAT64, PROBABILITY, SMOOTH, Branching, digits
from tests.zoo import NAMES, TEST, TRAIN, TRAPS, zoo_case

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

#: Kernel and forced representation; None leaves the choice to the plan. Those that miss are there in float64.
COMBINATIONS = [
    ("trace", None),
    ("trace", "factored"),
    ("full", "dense"),
    ("full", "factored"),
    ("full", "pairwise"),
]

#: Convolutions, a tied embedding with attention, a recurrent layer, and parameters without a rule.
FEW = ("mobilenet", "gpt", "lstm", "uncovered")

_COMPUTED: dict[tuple[str, str, str | None, str], ooc_ntk.Kernel] = {}


def _kernel(name, kind, representation, compute, precision="float32"):
    """The kernel of a case in the layout that the plan chooses, computed once."""
    key = name, kind, representation, precision
    if key not in _COMPUTED:
        job = zoo_case(name).job(kernel=kind, precision=precision)
        _COMPUTED[key] = compute(job, **({} if representation is None else {"representation": representation}))
    return _COMPUTED[key]


def _check(found, name, kind="trace", bound=None):
    """Entries and diagonal of a kernel with test rows against the oracle."""
    bound = bound or zoo_case(name).bound
    assert oracle.error(found, zoo.kernel(name, kind)) <= bound
    diagonal = oracle.kernel(zoo.jacobian(name), TRAIN + TEST, kind).diagonal()
    assert found.diagonal().shape == diagonal.shape
    assert oracle.error(found.diagonal(), diagonal) <= bound


@pytest.mark.parametrize("name", [*NAMES, *TRAPS])
def test_every_parameter_has_a_part_in_the_oracle(name):
    """Or a rule that leaves it out would go unnoticed."""
    rows, start = np.square(zoo.jacobian(name)).sum((0, 1)), 0
    for key, parameter in zoo_case(name).module.named_parameters():
        if parameter.requires_grad:
            share = rows[start : start + parameter.numel()].sum() / rows.sum()
            start += parameter.numel()
            if key.partition(".")[0] in ("never", "nowhere"):
                assert share == 0
            else:
                assert share > 1e-5, key
    assert start == len(rows)


@pytest.mark.parametrize(("kind", "representation"), COMBINATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_layers(name, kind, representation, compute):
    found = _kernel(name, kind, representation, compute)
    _check(found, name, kind)
    assert found.plan.tolerance >= oracle.error(found, zoo.kernel(name, kind))


@pytest.mark.parametrize(("kind", "representation"), [("full", None), ("trace", "pairwise")])
@pytest.mark.parametrize("name", NAMES)
def test_layers_in_float64(name, kind, representation, compute):
    found = _kernel(name, kind, representation, compute, "float64")
    assert found.dtype == np.float64
    _check(found, name, kind, FLOAT64)


@pytest.mark.parametrize(("kind", "representation"), [("trace", None), ("full", "pairwise")])
@pytest.mark.parametrize("name", TRAPS)
def test_ways_to_use_a_layer(name, kind, representation, compute):
    _check(_kernel(name, kind, representation, compute, "float64"), name, kind, FLOAT64)


@pytest.mark.parametrize(
    ("kind", "representation"), [("pseudo", None), ("pseudo", "pairwise"), ("output:1", "factored"), ("trace", "dense")]
)
@pytest.mark.parametrize("name", FEW)
def test_other_kernels(name, kind, representation, compute):
    _check(_kernel(name, kind, representation, compute), name, kind)


@pytest.mark.parametrize("options", [{}, {"representation": "factored", "dataflow": "spill"}], ids=["chosen", "spill"])
@pytest.mark.parametrize("name", FEW)
def test_layers_in_bf16(name, options, compute):
    """Tiles rounded to 8 bits, held in memory and on disk; within what the plan tolerates, and not by chance exact."""
    found = compute(zoo_case(name).job(kernel="trace", precision="bf16"), tile_samples=7, **options)
    error = oracle.error(found, zoo.kernel(name, "trace"))
    assert 1e-5 < error <= found.plan.tolerance == 1e-2


@pytest.mark.parametrize("name", ["uncovered", "mobilenet"])
@pytest.mark.parametrize("samples", [1, 2])
def test_rows_by_rules_are_expanded_some_samples_at_a_time(name, samples, compute, monkeypatch):
    """Alone and beside rows by torch.func, which come in groups of their own."""
    given = []

    def few(sample_bytes):
        given.append(sample_bytes)
        return samples

    monkeypatch.setattr("ooc_ntk.execution.rows.rule_samples", few)
    found = compute(zoo_case(name).job(kernel="trace", precision="float64"), representation="dense")
    assert given
    _check(found, name, "trace", FLOAT64)


@pytest.mark.parametrize("name", [*NAMES, *TRAPS])
def test_blocks_say_where_they_come_from(name, compute):
    chosen = zoo_case(name)
    plan = _kernel(name, "trace", None, compute, "float64" if name in TRAPS else "float32").plan
    # A layer of which a rule covers a part is a block per parameter.
    layers = {
        block.name: {block.name, *(name.rpartition(".")[0] for name in block.parameters)} for block in plan.blocks
    }
    assert chosen.functional | chosen.either <= set().union(*layers.values())
    for block in plan.blocks:
        assert block.source in ("rule", "torch.func")
        assert bool(block.reason) == (block.source == "torch.func"), block
        if not layers[block.name] & chosen.either:
            assert block.source == ("torch.func" if layers[block.name] & chosen.functional else "rule"), block
    for missed in chosen.functional:
        assert any(missed in note for note in plan.notes), plan.notes
    if all(block.source == "rule" for block in plan.blocks):
        assert not any("torch.func" in note for note in plan.notes), plan.notes


#: Of one block each of a case: what it is held as under 'dense', 'factored' and 'pairwise', and how it is contracted.
FACTORED = (("dense", "gemm"), ("factored", "gemm"), ("factored", "pairwise"))
TOKENS = (("dense", "gemm"), ("tokens", "matching"), ("tokens", "matching"))
DENSE = (("dense", "gemm"),) * 3


@pytest.mark.parametrize(
    ("name", "block", "wanted"),
    [
        ("bypass", "layer", FACTORED),
        ("bypass", "conv", FACTORED),
        ("bypass", "norm", DENSE),
        ("mobilenet", "6", FACTORED),
        ("mobilenet", "1", DENSE),
        ("gpt", "places", TOKENS),
        ("gpt", "up", FACTORED),
        ("gpt", "norm1", DENSE),
        ("gpt-flattened", "qkv", FACTORED),
        ("bags", "each", TOKENS),
        ("uncovered", "middle", FACTORED),
        ("uncovered", "pairs", DENSE),
    ],
)
def test_a_representation_is_forced_where_the_block_allows_it(name, block, wanted, compute):
    for representation, expected in zip(("dense", "factored", "pairwise"), wanted, strict=True):
        plan = _kernel(name, "full", representation, compute).plan
        (found,) = (entry for entry in plan.blocks if entry.name == block)
        assert (found.representation, found.contraction) == expected, representation


LAYOUTS = {
    "resident": {"dataflow": "resident", "tile_samples": 7},
    "spill": {"dataflow": "spill", "tile_samples": 7, "span_columns": 500},
    "recompute": {"dataflow": "recompute", "passes": 2, "tile_samples": 7},
}


@pytest.mark.parametrize(
    ("layout", "kind", "representation"),
    [
        ("resident", "trace", None),
        ("spill", "trace", "factored"),
        ("spill", "full", "pairwise"),
        ("recompute", "full", "factored"),
        ("recompute", "trace", "pairwise"),
    ],
)
@pytest.mark.parametrize("name", FEW)
def test_tiles_that_hold_train_and_test_samples(name, layout, kind, representation, compute):
    preferences = {**LAYOUTS[layout], **({} if representation is None else {"representation": representation})}
    assert TRAIN % 7, "a tile must hold train and test samples"
    assert (TRAIN + TEST) % 7, "the last tile must be padded"
    found = compute(zoo_case(name).job(kernel=kind), **preferences)
    assert found.plan.dataflow == layout
    assert len(found.plan.passes) == LAYOUTS[layout].get("passes", 1)
    _check(found, name, kind)


@pytest.mark.parametrize("name", FEW)
def test_the_square_alone_is_symmetric(name, compute):
    found = compute(zoo_case(name).job(test=False), representation="pairwise", tile_samples=4)
    assert found.shape == (TRAIN, TRAIN)
    entries = np.asarray(found)
    assert np.array_equal(entries, entries.T)
    assert oracle.error(found, zoo.kernel(name)[:TRAIN]) <= zoo_case(name).bound


@pytest.mark.parametrize(("kind", "representation"), [("trace", "pairwise"), ("full", "factored")])
@pytest.mark.parametrize("name", ["resnet", "gpt", "norms"])
def test_cosine(name, kind, representation, compute):
    job = zoo_case(name).job(kernel=kind, normalize="cosine")
    found = compute(job, representation=representation, tile_samples=7)
    bound = zoo_case(name).bound
    assert oracle.error(found, zoo.kernel(name, kind, normalize="cosine")) <= bound
    np.testing.assert_allclose(np.asarray(found)[: found.shape[1]].diagonal(), 1, atol=bound)
    # The stored diagonal stays that of the kernel before it was normalised.
    diagonal = oracle.kernel(zoo.jacobian(name), TRAIN + TEST, kind).diagonal()
    assert oracle.error(found.diagonal(), diagonal) <= bound


@pytest.mark.parametrize("name", ["resnet", "vit", "gpt", "lstm", "bags", "uncovered"])
def test_without_layer_rules_the_kernel_is_the_same(name, compute):
    found = compute(zoo_case(name).job(), layer_rules=False)
    assert {(block.source, block.representation) for block in found.plan.blocks} == {("torch.func", "dense")}
    _check(found, name)
    other = np.asarray(_kernel(name, "trace", None, compute), dtype=np.float64)
    assert oracle.error(found, other) <= zoo_case(name).bound


@pytest.mark.parametrize("outputs", ["loss", "margin"])
@pytest.mark.parametrize("name", ["resnet", "lstm"])
def test_output_functions(name, outputs, compute):
    found = compute(zoo_case(name).job(outputs=outputs), representation="pairwise")
    assert oracle.error(found, zoo.kernel(name, outputs=outputs)) <= PROBABILITY


@pytest.mark.parametrize(
    ("name", "batch_size"),
    [
        ("gpt", 6),  # as many samples as tokens: a table of positions looks like a batch
        ("gpt-flattened", 6),
        ("gpt-flattened", 1),  # position ids of one row look like a batch, too
        ("vit-sequence-first", 17),  # beyond the samples there are
        ("vit-sequence-first", 16),
        ("conv1d", 4),  # as many samples as channels
        ("cross-attention", 5),  # as many samples as keys
        ("shared", 8),
        ("twice", 3),
    ],
)
def test_batches_as_large_as_another_dimension(name, batch_size, compute):
    found = compute(zoo_case(name).job(kernel="full", precision="float64"), batch_size=batch_size)
    _check(found, name, "full", FLOAT64)


@pytest.mark.parametrize(
    ("name", "patterns"),
    [
        ("mobilenet", "*.weight"),
        ("gpt", ["*.bias", "places.*"]),
        ("vit", ["!*.bias", "!position"]),
        ("lstm", ["reader.weight_hh_l0*", "reader.bias_ih_l1", "head.bias"]),
        ("cross-attention", ["across.*_proj_weight", "within.in_proj_bias", "packed.out_proj.weight"]),
    ],
)
def test_chosen_parameters(name, patterns, compute):
    chosen = zoo_case(name)
    found = compute(chosen.job(kernel="full", parameters=patterns, precision="float64"), tile_samples=7)
    names = [key for block in found.plan.blocks for key in block.parameters]
    assert 0 < len(names) < len(list(chosen.module.parameters()))
    wanted = oracle.kernel(oracle.jacobian(chosen.module, chosen.inputs, names=names), TRAIN, "full")
    assert oracle.error(found, wanted) <= FLOAT64
    assert {block.source for block in found.plan.blocks} == {"rule"}


@pytest.mark.parametrize("name", ["resnet", "cross-attention", "uncovered", "in-place"])
def test_a_run_leaves_the_model_and_torch_alone(name, compute):
    chosen = zoo_case(name)
    state = {key: value.clone() for key, value in chosen.module.state_dict().items()}
    inputs = chosen.inputs.clone() if isinstance(chosen.inputs, torch.Tensor) else None
    wanted = [parameter.requires_grad for parameter in chosen.module.parameters()]
    functions = [F.linear, F.conv2d, F.layer_norm, nn.Linear.forward, nn.MultiheadAttention.forward]
    compute(chosen.job(), representation="pairwise")
    assert functions == [F.linear, F.conv2d, F.layer_norm, nn.Linear.forward, nn.MultiheadAttention.forward]
    assert not chosen.module.training
    assert all(torch.equal(value, state[key]) for key, value in chosen.module.state_dict().items())
    assert [parameter.requires_grad for parameter in chosen.module.parameters()] == wanted
    assert all(parameter.grad is None for parameter in chosen.module.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in chosen.module.modules())
    assert not any("forward" in vars(part) for part in chosen.module.modules())
    if inputs is not None:
        assert torch.equal(chosen.inputs, inputs)


class Overwritten(nn.Module):
    """Writes over what a layer read; ``allowed`` is the same function as autograd wants it."""

    def __init__(self, allowed: bool) -> None:
        super().__init__()
        self.allowed = allowed
        self.first = nn.Linear(64, 8)
        self.second = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x.flatten(1))
        y = self.second(x)
        if self.allowed:
            x = x + 1
        else:
            x += 1
        return self.head(torch.tanh(x * y))


class Checkpointed(nn.Module):
    """Calls a layer again in the backward pass; ``allowed`` does not."""

    def __init__(self, allowed: bool) -> None:
        super().__init__()
        self.allowed = allowed
        self.first = nn.Linear(64, 8)
        self.second = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.tanh(self.first(x.flatten(1)))
        return self.head(self.between(x) if self.allowed else checkpoint(self.between, x, use_reentrant=False))

    def between(self, x):
        return torch.tanh(self.second(x))


@pytest.mark.parametrize("representation", [None, "pairwise"])
@pytest.mark.parametrize(("kind", "refusal"), [(Overwritten, "inplace operation"), (Checkpointed, "checkpoint")])
def test_what_autograd_refuses_is_refused_or_right(kind, refusal, representation, compute):
    """Never silently wrong."""
    module, twin = kind(allowed=False).eval(), kind(allowed=True).eval()
    twin.load_state_dict(module.state_dict())
    images = digits()[0][:TRAIN]
    preferences = {} if representation is None else {"representation": representation}
    try:
        found = compute(ooc_ntk.Job(model=module, train=images, device="cpu"), **preferences)
    except (ooc_ntk.OocNtkError, RuntimeError) as error:
        said = str(error)
    else:
        assert oracle.error(found, oracle.kernel(oracle.jacobian(twin, images), TRAIN)) <= SMOOTH
        return
    assert refusal in said, said


@pytest.mark.parametrize("representation", [None, "pairwise"])
def test_a_model_that_branches_on_its_data_takes_the_loop_as_a_whole(representation, compute):
    torch.manual_seed(6)
    module, images = Branching().eval(), digits()[0][:16]
    bright = images.flatten(1).mean(1) > 0.3
    assert bright.any()
    assert not bright.all()
    preferences = {} if representation is None else {"representation": representation}
    found = compute(ooc_ntk.Job(model=module, train=images, kernel="full", device="cpu"), **preferences)
    assert found.plan.method == "loop"
    assert {block.source for block in found.plan.blocks} == {"torch.func"}
    assert {block.representation for block in found.plan.blocks} == {"dense"}
    assert all(block.reason for block in found.plan.blocks)
    assert oracle.error(found, oracle.kernel(oracle.jacobian(module, images), 16, "full")) <= SMOOTH


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("representation", [None, "factored", "pairwise"])
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu(name, representation, compute):
    preferences = {} if representation is None else {"representation": representation}
    found = compute(zoo_case(name).job(kernel="full", device="cuda"), tile_samples=7, **preferences)
    assert found.plan.promised.device_bytes > 0
    assert oracle.error(found, zoo.kernel(name, "full")) <= zoo_case(name).bound
