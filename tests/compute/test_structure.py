"""What a model looks like to layer rules: its calls, where they have their samples, what must not be believed."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ooc_ntk.compute import check
from ooc_ntk.compute.capture import Capture
from ooc_ntk.compute.check import checked_structure, with_matches
from ooc_ntk.compute.discover import find_structure
from ooc_ntk.compute.held import as_tile
from ooc_ntk.compute.intercept import Interceptor, module_hooks
from ooc_ntk.compute.jacobian import ModelBatch, ModelFunction
from ooc_ntk.compute.model import choose_parameters, parameter_blocks
from ooc_ntk.compute.outputs import OutputRows
from ooc_ntk.compute.rules.table import RULES, forget_layer_rule, layer_rule
from ooc_ntk.compute.structure import (
    SampleAxis,
    Structure,
    count_matches,
    identities,
    leads,
    repeated,
    to_samples,
)
from ooc_ntk.errors import InputError
from tests import oracle

SAMPLES, WIDTH, OUTPUTS = 6, 5, 3


class Net(nn.Module):
    """A layer in the middle that is used in some way, given as a function of the model and its hidden values."""

    def __init__(self, between, layer=None, **parameters):
        super().__init__()
        self.enter, self.layer = nn.Linear(WIDTH, 6), nn.Linear(6, 6) if layer is None else layer
        self.head = nn.Linear(6, OUTPUTS)
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))
        self.between = between

    def forward(self, x):
        return self.head(torch.tanh(self.between(self, torch.tanh(self.enter(x)))))


def inputs(samples=SAMPLES):
    return torch.randn(samples, WIDTH, dtype=torch.float64)


def batch_of(*values):
    return ModelBatch(values, {}, None)


def function_of(module, precision="float64"):
    names = choose_parameters(module, None)
    return ModelFunction(module, names, OutputRows.of("logits", "trace"), precision, "cpu")


def found(module, *data, spread=None, **options):
    """The structure of a model, from samples of its own or given ones."""
    batch = batch_of(*(data or (inputs(),)))
    return find_structure(function_of(module.double().eval()), batch, spread, **options)


def checked(module, *data, spread=None):
    """The structure of a model, compared with autograd."""
    batch = batch_of(*(data or (inputs(),)))
    function = function_of(module.double().eval())
    return checked_structure(function, find_structure(function, batch, spread), batch, OUTPUTS)


def agrees(module, *data, names=None):
    """Compare what rules derive (of all they cover, or of some parameters) with autograd; returns the structure."""
    data = data or (inputs(),)
    function = function_of(module.double().eval())
    structure = find_structure(function, batch_of(*data))
    names = list(structure.layers) if names is None else names
    capture = Capture(function, structure, names, OUTPUTS)
    captured = capture.run(batch_of(*data))
    every = oracle.jacobian(module, data, names=names)
    rows = torch.cat([capture.dense(captured, name, slice(None)) for name in names], 2)
    torch.testing.assert_close(rows, torch.from_numpy(every), rtol=1e-10, atol=1e-13)
    return structure


# --- where samples are -----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(1, 4),
    positions=st.integers(1, 4),
    rest=st.lists(st.integers(1, 3), max_size=2),
    before=st.integers(0, 2),
    fastest=st.booleans(),
)
def test_tensors_are_brought_to_samples(samples, positions, rest, before, fastest):
    """Whatever stands before the axis, and whether samples or positions run fastest in it."""
    shape = (samples, positions, *rest)
    wanted = torch.arange(torch.Size(shape).numel()).view(shape)
    merged = (wanted.transpose(0, 1) if fastest else wanted).flatten(0, 1)
    index = min(before, len(rest))
    value = merged.movedim(0, index)
    given_back = to_samples(value, SampleAxis(index, fastest), samples)
    assert torch.equal(given_back, wanted if positions > 1 else wanted.squeeze(1))


def test_what_all_samples_share_is_given_to_each():
    value = torch.arange(6.0).view(2, 3)
    assert torch.equal(to_samples(value, None, 4), value.expand(4, 2, 3))
    assert torch.equal(to_samples(value[None], None, 4), value.expand(4, 2, 3)), "an axis of length 1 stands for them"
    assert [leads(torch.ones(shape)) for shape in ((1, 3), (2, 3), (1,), ())] == [True, False, False, False]
    assert to_samples(torch.ones(1), None, 4).shape == (4, 1), "a vector of length 1 is a value, not an axis"


def test_a_batch_of_as_many_samples_as_are_wanted():
    batch = ModelBatch((torch.arange(2),), {"other": torch.arange(4).view(2, 2)}, torch.tensor([5, 6]))
    three = repeated(batch, 3)
    assert three.args[0].tolist() == [0, 1, 0]
    assert three.kwargs["other"].tolist() == [[0, 1], [2, 3], [0, 1]]
    assert three.targets.tolist() == [5, 6, 5]
    assert len(repeated(batch, 1)) == 1


def _tokens(x):
    """Four tokens: (samples, 4, 6)."""
    return torch.stack([x, x.roll(1, 1), x.square(), -x], 1)


LAYOUTS = {
    "samples first": (lambda m, x: m.layer(_tokens(x)).prod(1), SampleAxis(0)),
    "time first": (lambda m, x: m.layer(_tokens(x).transpose(0, 1)).prod(0), SampleAxis(1)),
    "samples third": (lambda m, x: m.layer(_tokens(x).unflatten(1, (2, 2)).permute(1, 2, 0, 3)).prod(1).prod(0), None),
    "all tokens in a row": (lambda m, x: m.layer(_tokens(x).flatten(0, 1)).view(-1, 4, 6).prod(1), SampleAxis(0)),
    "all tokens in a row, samples fastest": (
        lambda m, x: m.layer(_tokens(x).transpose(0, 1).flatten(0, 1)).view(4, -1, 6).prod(0),
        SampleAxis(0, fastest=True),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_sample_axis_is_found(name):
    between, axis = LAYOUTS[name]
    structure = agrees(Net(between))
    assert structure.reasons == {}
    (use,) = structure.layers["layer.weight"].uses
    axis = SampleAxis(2) if axis is None else axis
    assert (use.input_axis, use.output_axis) == (axis, axis)
    assert structure.layers["layer.weight"].factors.positions == 4


@pytest.mark.parametrize("length", [2, 3])
def test_the_sample_axis_is_found_where_time_is_as_long_as_the_batches_that_are_tried(length):
    structure = agrees(Net(lambda m, x: m.layer(torch.stack([x, x.square(), -x][:length])).prod(0)))
    assert structure.layers["layer.weight"].uses[0].input_axis == SampleAxis(1)


def test_samples_that_are_all_the_same():
    """One sample, over and over, tells as much of the layout as three different ones."""
    for name, (between, axis) in LAYOUTS.items():
        structure = found(Net(between), inputs(1))
        assert structure.reasons == {}, name
        assert structure.layers["layer.weight"].uses[0].input_axis == (SampleAxis(2) if axis is None else axis), name


def test_a_layer_that_sees_nothing_of_the_samples():
    """As relative positions do: the gradient of its output differs between samples all the same."""
    positions = torch.linspace(-1, 1, 6, dtype=torch.float64)[:, None]
    module = Net(lambda m, x: x * m.layer(positions).squeeze(-1), nn.Linear(1, 1))
    structure = agrees(module)
    (use,) = structure.layers["layer.weight"].uses
    assert (use.input_axis, use.output_axis) == (None, None)


ELSEWHERE = {
    "samples reversed": (lambda m, x: m.layer(x.flip(0)).flip(0), "in their order"),
    "two views, half a batch apart": (
        lambda m, x: torch.stack(m.layer(torch.cat([x, x.flip(1)])).chunk(2)).prod(0),
        None,
    ),
    "sample by sample": (lambda m, x: torch.stack([m.layer(row) for row in x]), "not called alike"),
    "one row more than samples": (lambda m, x: m.layer(torch.cat([x, x[:1]]))[:-1], "not clear which axis"),
    "every pair of samples": (lambda m, x: m.layer(x[:, None] + x[None]).diagonal().T, "not clear which axis"),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_layouts_that_are_refused_or_understood(name):
    between, reason = ELSEWHERE[name]
    module = Net(between)
    if reason is None:
        assert agrees(module).reasons == {}
        return
    structure = found(module)
    assert "layer.weight" not in structure.layers
    assert reason in structure.reasons["layer.weight"]
    # A bias may still be given a sample axis of its own, where that is right.
    rest = list(checked(module).layers)
    assert rest == [] or agrees(module, names=rest)


def _sorted_by_size(m, x):
    """A layer between sorting and putting back, as models have it that pack sequences by length."""
    order = x[:, 0].argsort(descending=True)
    return m.layer(x[order])[order.argsort()]


def _largest_first(module, x):
    """Samples in the order in which the layer of :func:`_sorted_by_size` sees them."""
    with torch.no_grad():
        return x[torch.tanh(module.enter(x))[:, 0].argsort(descending=True)]


@pytest.mark.parametrize("order", [(0, 2, 1), (1, 0, 2), (2, 1, 0), (1, 2, 0)])
def test_a_layer_that_sees_samples_in_an_order_of_their_own(order):
    """The first sample may be in its place and others not."""
    module = Net(_sorted_by_size).double()
    x = _largest_first(module, inputs(3))[torch.tensor(order)]
    structure = found(module, x)
    assert "layer.weight" not in structure.layers
    assert "in their order" in structure.reasons["layer.weight"]
    assert "layer.bias" not in checked(module, x).layers, "nor does its bias have a sample axis in their order"


@pytest.mark.parametrize("backwards", [False, True])
def test_a_layer_that_sorts_samples_which_are_sorted_already(backwards):
    """All over the data they are in their order, but for two that no probe looks at."""
    module = Net(_sorted_by_size).double()
    x = _largest_first(module, inputs(40))
    x = x.flip(0) if backwards else x
    spread = x[torch.tensor([0, 8, 16, 23, 31, 39])]
    structure = found(module, x[:3], spread=batch_of(spread))
    assert "in their order" in structure.reasons["layer.weight"]


def test_a_layer_that_sees_later_samples_in_an_order_of_their_own():
    """The first three are in order by chance; samples all over the data are not."""
    module = Net(_sorted_by_size).double()
    x = _largest_first(module, inputs(9))
    spread = batch_of(x[torch.tensor([0, 5, 3, 8, 1, 2])])
    assert {"layer.weight", "layer.bias"}.isdisjoint(checked(module, x[:3], spread=spread).layers)


# --- uses of a parameter ---------------------------------------------------------------------------------------------


def test_the_calls_of_a_plain_model():
    structure = agrees(Net(lambda m, x: m.layer(x)))
    assert structure.branches == ()
    names = ("enter.weight", "enter.bias", "layer.weight", "layer.bias", "head.weight", "head.bias")
    assert tuple(structure.layers) == names
    assert [structure.layers[name].uses[0].number for name in names] == [0, 0, 1, 1, 2, 2]
    assert structure.layers["layer.weight"] is structure.layers["layer.bias"]
    assert not any(use.changed for layer in structure.layers.values() for use in layer.uses)


def test_a_layer_that_is_called_twice_has_two_uses():
    structure = agrees(Net(lambda m, x: m.layer(torch.tanh(m.layer(x)))))
    layer = structure.layers["layer.weight"]
    assert [use.number for use in layer.uses] == [1, 2]
    assert layer.parameters == ("layer.weight", "layer.bias")
    assert (layer.kind, layer.factors.positions, layer.factors.bias) == ("outer", 2, True)


def test_uses_of_different_length_stand_one_after_the_other():
    structure = agrees(Net(lambda m, x: m.layer(_tokens(x)).mean(1) * m.layer(x) + m.layer(_tokens(x)[:, :2]).sum(1)))
    layer = structure.layers["layer.weight"]
    assert [use.factors.positions for use in layer.uses] == [4, 1, 2]
    assert layer.factors.positions == 7


def test_a_weight_that_is_used_without_its_bias_as_well():
    structure = agrees(Net(lambda m, x: m.layer(x) + F.linear(x.square(), m.layer.weight)))
    weight, bias = structure.layers["layer.weight"], structure.layers["layer.bias"]
    assert (weight.parameters, weight.kind, len(weight.uses)) == (("layer.weight",), "outer", 2)
    assert (bias.parameters, bias.kind, len(bias.uses)) == (("layer.bias",), "bias", 1)


def test_a_bias_that_two_layers_share():
    module = Net(lambda m, x: m.layer(x) + F.linear(x.square(), m.other, m.layer.bias), other=torch.randn(6, 6))
    structure = agrees(module)
    assert structure.layers["layer.weight"].parameters == ("layer.weight",)
    assert len(structure.layers["layer.bias"].uses) == 2
    assert len(structure.layers["other"].uses) == 1


def test_a_convolution_that_is_called_at_two_sizes():
    def twice(m, x):
        line = m.layer(x[:, None])
        return line.mean(1) * m.layer(line[:, :1, ::2].contiguous()).mean((1, 2))[:, None]

    structure = agrees(Net(twice, nn.Conv1d(1, 2, 3, padding=1)))
    layer = structure.layers["layer.weight"]
    assert [use.factors.positions for use in layer.uses] == [6, 3]
    assert (layer.factors.kind, layer.factors.positions, layer.factors.window) == ("linear", 9, None)


def test_a_grouped_convolution_that_is_called_twice():
    module = Net(
        lambda m, x: m.layer(torch.tanh(m.layer(x.view(-1, 2, 3)))).flatten(1), nn.Conv1d(2, 2, 3, 1, 1, groups=2)
    )
    structure = agrees(module)
    assert structure.layers["layer.weight"].factors is None
    assert len(structure.layers["layer.weight"].uses) == 2


def test_an_embedding_that_is_also_the_output_layer():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(OUTPUTS, 4)
            self.middle = nn.Linear(4, 4)

        def forward(self, tokens):
            return F.linear(torch.tanh(self.middle(self.words(tokens))).mean(1), self.words.weight)

    structure = agrees(Tied(), torch.randint(0, OUTPUTS, (SAMPLES, 5)))
    layer = structure.layers["words.weight"]
    assert [type(use.rule).__name__ for use in layer.uses] == ["Embedding", "Linear"]
    factors = layer.factors
    assert (factors.kind, factors.positions, factors.lookups) == ("linear", 1, 5)
    assert (factors.inputs, factors.outputs) == (4, OUTPUTS)


def test_an_embedding_with_padding_that_is_called_twice_and_is_the_output_layer_of_every_position():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(OUTPUTS, 4, padding_idx=1)
            self.head = nn.Linear(4, OUTPUTS)
            self.head.weight = self.words.weight

        def forward(self, tokens):
            hidden = torch.tanh(self.words(tokens)) * self.words(tokens[:, :1])
            return self.head(hidden).exp().mean(1) + self.head(hidden[:, 0])

    structure = agrees(Tied(), torch.randint(0, OUTPUTS, (SAMPLES, 5)))
    factors = structure.layers["words.weight"].factors
    assert (factors.kind, factors.positions, factors.lookups) == ("linear", 6, 6)
    assert structure.layers["head.bias"].kind == "bias"


def test_an_embedding_and_a_bag_of_the_same_rows():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.bag = nn.Embedding(7, 4), nn.EmbeddingBag(7, 4)
            self.bag.weight = self.words.weight
            self.head = nn.Linear(4, OUTPUTS)

        def forward(self, tokens):
            return self.head(torch.tanh(self.bag(tokens)) * self.words(tokens[:, 0]))

    factors = agrees(Both(), torch.randint(0, 7, (SAMPLES, 5))).layers["words.weight"].factors
    assert (factors.kind, factors.positions) == ("tokens", 6)


def test_an_embedding_that_is_also_a_layer_the_other_way_round_is_dense():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(6, 4), nn.Linear(4, OUTPUTS)

        def forward(self, tokens):
            scores = torch.tanh(self.words(tokens).mean(1).repeat(1, 2)[:, :6])
            return self.head(torch.addmm(self.head.weight.new_zeros(4), scores, self.words.weight))

    structure = agrees(Turned(), torch.randint(0, 6, (SAMPLES, 5)))
    assert structure.layers["words.weight"].factors is None


def test_an_embedding_that_is_called_twice():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(7, 4), nn.Linear(4, OUTPUTS)

        def forward(self, tokens):
            return self.head(torch.tanh(self.words(tokens)).mean(1) * self.words(tokens[:, 0]))

    structure = agrees(Two(), torch.randint(0, 7, (SAMPLES, 5)))
    factors = structure.layers["words.weight"].factors
    assert (factors.kind, factors.positions) == ("tokens", 6)


def test_a_norm_that_is_called_twice():
    structure = agrees(Net(lambda m, x: m.layer(torch.tanh(m.layer(x))), nn.LayerNorm(6)))
    assert [structure.layers[f"layer.{name}"].kind for name in ("weight", "bias")] == ["weight", "bias"]
    assert len(structure.layers["layer.weight"].uses) == 2


def test_modules_that_share_a_parameter():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))

    structure = agrees(Net(lambda m, x: m.layer(x), Pair()))
    assert len(structure.layers["layer.first.weight"].uses) == 2
    assert structure.layers["layer.first.weight"].parameters == ("layer.first.weight",), "each use has its own bias"
    assert [structure.layers[f"layer.{name}.bias"].kind for name in ("first", "second")] == ["bias", "bias"]


# --- bare parameters -------------------------------------------------------------------------------------------------

BARE = {
    "gain": (torch.randn(6), lambda m, x: m.layer(x) * m.bare, True),
    "shift of tokens": (torch.randn(4, 6), lambda m, x: (_tokens(x) + m.bare).prod(1), True),
    "one axis for samples": (torch.randn(1, 4, 6), lambda m, x: (_tokens(x) + m.bare).prod(1), True),
    "class token": (
        torch.randn(1, 1, 6),
        lambda m, x: torch.cat([m.bare.expand(len(x), -1, -1), _tokens(x)], 1).prod(1),
        True,
    ),
    "matrix": (torch.randn(6, 6), lambda m, x: x @ m.bare, False),
    "sum": (torch.randn(6), lambda m, x: x * m.bare.sum(), False),
    "scalar": (torch.tensor(0.7), lambda m, x: x / m.bare, False),
}


@pytest.mark.parametrize("name", BARE)
def test_a_bare_parameter_is_given_a_sample_axis_where_the_model_takes_it(name):
    value, between, shared = BARE[name]
    module = Net(between, bare=value)
    structure = found(module)
    assert ("bare" in structure.layers) == shared
    if not shared:
        assert "bare" in structure.reasons
        return
    assert structure.layers["bare"].kind == "shared"
    assert structure.layers["bare"].uses == ()
    agrees(module, names=["bare", "enter.weight", "head.bias"])


def test_a_bare_parameter_that_takes_a_sample_axis_in_another_meaning_is_found_by_the_check():
    """With as many samples as it has rows, a product with it would still have the right shape."""
    module = Net(lambda m, x: x * torch.softmax(m.bare, 0), bare=torch.randn(6))
    structure = checked(module)
    assert "bare" not in structure.layers
    assert {"enter.weight", "head.weight"} <= set(structure.layers)


# --- data-dependent models -------------------------------------------------------------------------------------------

MIXED = {
    "mean": lambda m, x: m.layer(x - 0.5 * x.mean(0)),
    "neighbour": lambda m, x: m.layer(x + 0.1 * x.roll(1, 0)),
    "norm": lambda m, x: m.layer(x / (1 + x.norm())),
    "attention": lambda m, x: m.layer((x @ x.T).softmax(1) @ x),
}


@pytest.mark.parametrize("name", MIXED)
def test_a_batch_dependent_model_is_refused_with_the_measured_difference(name):
    module, x = Net(MIXED[name]).double(), inputs(3)
    with torch.no_grad():
        apart = torch.cat([module(row[None]) for row in x])
        difference = float(((module(x) - apart).abs().amax(1) / apart.abs().amax(1)).max())
    with pytest.raises(InputError, match="change with its batch mates") as error:
        found(module, x)
    (measured, allowed) = re.search(r"by (\S+) of its largest output, allowed (\S+)\)", str(error.value)).groups()
    assert float(measured) == pytest.approx(difference, rel=0.05)
    assert float(allowed) == 1e-3 < difference
    assert "--allow-batch-dependence" in str(error.value)


@pytest.mark.parametrize("name", MIXED)
def test_it_is_taken_where_batches_hold_one_sample(name):
    module, x = Net(MIXED[name]).double(), inputs()
    function = function_of(module)
    structure = find_structure(function, batch_of(x), single=True)
    structure = checked_structure(function, structure, batch_of(x[:1]), OUTPUTS)
    assert set(structure.layers) == set(function.names)
    names = list(structure.layers)
    capture = Capture(function, structure, names, OUTPUTS)
    for row in x:
        captured = capture.run(batch_of(row[None]))
        rows = torch.cat([capture.dense(captured, name, slice(None)) for name in names], 2)
        wanted = torch.from_numpy(oracle.jacobian(module, row[None], names=names))
        torch.testing.assert_close(rows, wanted, rtol=1e-10, atol=1e-13)


def test_dependence_of_small_outputs_is_found_beside_large_ones():
    module = Net(lambda m, x: x * (1 + 0.5 * torch.sin(7 * x.mean(0)))).double()
    module.head.bias.data.zero_()
    x = inputs(3)
    with torch.no_grad():
        module.enter.bias.zero_()
        x[1:] *= 1e-3
    with pytest.raises(InputError, match="change with its batch mates"):
        found(module, x)


def test_rounding_is_no_dependence():
    module = Net(lambda m, x: m.layer(x + 1e-9 * x.mean(0)))
    assert found(module).reasons == {}


def _branch(m, x):
    return m.layer(x) if x.mean() > 0 else x.square()


def test_a_branching_model_whose_samples_go_different_ways():
    module = Net(_branch).double()
    x = inputs(12)
    with torch.no_grad():
        ways = torch.tanh(module.enter(x)).mean(1) > 0
    assert ways.any()
    assert not ways.all()
    mixed = torch.cat([x[ways][:2], x[~ways][:1]])
    structure = found(module, mixed)
    assert structure.layers == {}
    assert set(structure.reasons) == {name for name, _ in module.named_parameters()}
    assert all("branches on its data" in reason for reason in structure.reasons.values())


def test_a_branching_model_whose_first_samples_all_go_one_way():
    """The others, spread over the data, show it."""
    module, x = Net(_branch).double(), inputs(24)
    with torch.no_grad():
        ways = torch.tanh(module.enter(x)).mean(1) > 0
    structure = found(module, x[ways][:3])
    assert "layer.weight" in structure.layers, "three samples of one way look like any model"
    assert structure.branches == (True,)
    structure = found(module, x[ways][:3], spread=batch_of(torch.cat([x[ways][:3], x[~ways][:2]])))
    assert structure.layers == {}
    assert all("branches on its data" in reason for reason in structure.reasons.values())


def test_a_branch_that_changes_nothing():
    def between(m, x):
        if bool((x > 9).any()):
            x = x.clone()
        return m.layer(x)

    structure = agrees(Net(between))
    assert structure.branches == (False,)
    assert structure.reasons == {}


def test_a_model_that_takes_single_samples_only():
    def between(m, x):
        if len(x) > 1:
            raise RuntimeError("one at a time")
        return m.layer(x)

    structure = found(Net(between))
    assert structure.layers == {}
    assert set(structure.reasons.values()) == {"the model does not take batches (RuntimeError)"}


def test_a_model_that_maps_over_its_samples_itself():
    """What runs inside vmap has no values to look at."""
    module = Net(lambda m, x: torch.func.vmap(m.layer)(x))
    structure = checked(module)
    assert {name for name, _ in module.named_parameters()} <= set(structure.layers) | set(structure.reasons)
    rest = list(structure.layers)
    assert rest == [] or agrees(module, names=rest)


@pytest.mark.parametrize("other", [(), (0,), (0, 1, 1), (0, 0), (1, 0), (1, 1, 0, 0)], ids=str)
def test_a_batch_that_goes_another_way_is_refused_by_the_capture(other):
    """What a few samples did not show: never silently wrong."""

    way = [0, 1]
    layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def between(m, x):
        for index in way:
            x = torch.tanh(m.layer[index](x))
        return x

    module = Net(between, layers).double()
    function, batch = function_of(module), batch_of(inputs())
    structure = find_structure(function, batch)
    capture = Capture(function, structure, function.names, OUTPUTS)
    capture.run(batch)
    way[:] = other
    with pytest.raises(InputError, match="other layers for these samples"):
        capture.run(batch)


# --- in place --------------------------------------------------------------------------------------------------------

IN_PLACE = {
    "relu": lambda m, x: F.relu(m.layer(x), inplace=True),
    "method": lambda m, x: m.layer(x).mul_(0.5).tanh_(),
    "addition": lambda m, x: m.layer(x).add_(x).sigmoid_(),
    "residual": lambda m, x: _added(m.layer(x), x),
    "part": lambda m, x: _scaled_part(m.layer(x)),
    "tokens": lambda m, x: F.relu(m.layer(_tokens(x)), inplace=True).mean(1),
    "norm": lambda m, x: F.layer_norm(x, (6,), m.layer.weight[0], m.layer.bias).relu_(),
}


def _added(y, x):
    y += x
    return y * y


def _scaled_part(y):
    y[:, :2] *= 3
    y[:, 2] = 0
    return y


@pytest.mark.parametrize("name", IN_PLACE)
def test_outputs_that_are_changed_in_place(name):
    """Gradients are those of the layer's output as it was, not of what became of it."""
    structure = agrees(Net(IN_PLACE[name]))
    assert ("layer.weight" in structure.layers) == (name != "norm")


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(6), nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.PReLU(6)], ids=repr)
def test_outputs_of_elementwise_layers_that_are_changed_in_place(layer):
    agrees(Net(lambda m, x: F.relu(m.layer(x), inplace=True), layer))


def test_inputs_that_are_changed_in_place_later():
    """Where autograd does not need what the layer read, as only its bias learns."""

    def between(m, x):
        y = x * 1.5
        shifted = torch.tanh(m.layer(y))
        y += 1
        return shifted + y

    module = Net(between)
    module.layer.weight.requires_grad_(False)
    structure = agrees(module)
    assert structure.layers["layer.bias"].uses[0].changed
    assert not structure.layers["head.weight"].uses[0].changed


def test_the_models_own_tensors_stay_as_they_are():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.InstanceNorm1d(2, affine=True, track_running_stats=True)

        def forward(self, x):
            return self.norm(x.view(-1, 2, 3)).flatten(1)

    module = Net(lambda m, x: m.layer(x), Counting()).double().train()  # admitted: samples do not see each other
    before = {name: value.clone() for name, value in module.state_dict().items()}
    function = function_of(module)
    structure = find_structure(function, batch_of(inputs()))
    Capture(function, structure, function.names, OUTPUTS).run(batch_of(inputs()))
    changed = [name for name, value in module.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == []


# --- what is not believed --------------------------------------------------------------------------------------------

BYPASSES = {
    "used by its function alone": (lambda m, x: F.linear(x, m.layer.weight, m.layer.bias), "rule", ""),
    "a copy": (lambda m, x: F.linear(x, 2 * m.layer.weight, m.layer.bias), "torch.func", "no layer rule covers mul()"),
    "a part": (lambda m, x: F.linear(x, m.layer.weight[:, :], m.layer.bias), "torch.func", "no layer rule"),
    "a product": (lambda m, x: x @ m.layer.weight.T + m.layer.bias, "torch.func", "no layer rule"),
    "and a penalty": (
        lambda m, x: m.layer(x) * m.layer.weight.square().mean(),
        "torch.func",
        "no layer rule covers",
    ),
    "and a copy": (
        lambda m, x: m.layer(x) + F.linear(x, 0.5 * m.layer.weight),
        "torch.func",
        "no layer rule covers",
    ),
    "behind a detached output": (
        lambda m, x: m.layer(x).detach() + F.linear(x, m.layer.weight * 1, m.layer.bias * 1),
        "torch.func",
        "no layer rule covers mul()",
    ),
}


@pytest.mark.parametrize("name", BYPASSES)
def test_a_layer_that_is_bypassed(name):
    between, source, reason = BYPASSES[name]
    module = Net(between).double()
    function, batch = function_of(module), batch_of(inputs())
    structure = checked_structure(function, find_structure(function, batch), batch, OUTPUTS)
    assert ("layer.weight" in structure.layers) == (source == "rule")
    assert reason in structure.reasons.get("layer.weight", "")
    assert {"enter.weight", "enter.bias", "head.weight", "head.bias"} <= set(structure.layers), "the others stay"
    (block,) = (b for b in parameter_blocks(module, function.names, structure) if "layer.weight" in b.parameters)
    assert block.source == source
    assert reason in block.reason


def test_a_rule_that_is_wrong_for_a_call_is_found_out(monkeypatch):
    """Any mistake of a rule, here one by a fifth of a percent, sends its layer to torch.func, with both norms."""
    module = Net(lambda m, x: m.layer(x), nn.LayerNorm(6)).double()
    function, batch = function_of(module), batch_of(inputs())
    structure = find_structure(function, batch)
    assert set(checked_structure(function, structure, batch, OUTPUTS).layers) == set(function.names)
    rule = RULES[F.layer_norm]
    scaled = type(rule).scaled
    monkeypatch.setattr(type(rule), "scaled", lambda self, call, inputs: 1.002 * scaled(self, call, inputs))
    less = checked_structure(function, structure, batch, OUTPUTS)
    assert set(function.names) - set(less.layers) == {"layer.weight"}
    reason = less.reasons["layer.weight"]
    norms = [float(number) for number in re.findall(r"\d+\.\d+", reason)]
    assert norms[0] == pytest.approx(1.002 * norms[1], rel=0.01)


class Attention(nn.Module):
    """As BERT has it, query, key and value apart: softmax does not see the key's bias, whose gradient is zero."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.head = (nn.Linear(8, size) for size in (8, 8, 8, OUTPUTS))

    def forward(self, x):
        found = F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        return self.head(found.mean(1))


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("seed", range(3))
def test_a_gradient_of_nothing_but_rounding_is_no_disagreement(seed, precision):
    torch.manual_seed(seed)
    dtype = getattr(torch, precision)
    module, x = Attention().to(dtype), torch.randn(2, 5, 8, dtype=dtype)
    function, batch = function_of(module, precision), batch_of(x)
    structure = checked_structure(function, find_structure(function, batch), batch, OUTPUTS)
    assert structure.reasons == {}
    assert "key.weight" in structure.layers


@pytest.mark.parametrize("factor", [1.0, 1.02])
def test_what_rounding_may_explain_is_looked_at_in_float64(factor, monkeypatch):
    """Samples alone and in a batch may be rounded differently, and a ReLU turns over; a wrong rule stays wrong."""
    monkeypatch.setitem(check.ALLOWED, torch.float32, float("nan"))  # as if it had happened to every layer
    module = Net(lambda m, x: F.relu(m.layer(x)), nn.LayerNorm(6))
    function, batch = function_of(module, "float32"), batch_of(inputs().float())
    structure = find_structure(function, batch)
    rule = RULES[F.layer_norm]
    scaled = type(rule).scaled
    monkeypatch.setattr(type(rule), "scaled", lambda self, call, inputs: factor * scaled(self, call, inputs))
    compared = []
    double = check._double_disagreements
    monkeypatch.setattr(check, "_double_disagreements", lambda *given: compared.append(given) or double(*given))
    found = checked_structure(function, structure, batch, OUTPUTS)
    assert compared, "float32 does not do"
    assert set(found.reasons) == (set() if factor == 1.0 else {"layer.weight"})


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("size", [1e-38, 1e-20, 1.0, 1e20, 3e38])
def test_squares_of_gradients_have_the_range_of_float64(size, precision):
    """A single product in float32 would lose those of small numbers and be infinite for large ones."""
    value = torch.tensor([0.6, -0.8], dtype=getattr(torch, precision)) * size
    assert check._square(value) == pytest.approx((value.double() ** 2).sum().item(), rel=1e-6)
    assert check._difference(value, torch.zeros_like(value)) == pytest.approx(check._square(value))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_where_autograds_is_differs_without_bound(bad):
    found, wanted = torch.tensor([bad, 1.0]), torch.tensor([2.0, 1.0])
    assert check._difference(found, wanted) == float("inf")
    assert check._difference(found, found) == 0.0, "autograd's is no better"
    largest = torch.full((3,), 3e38)
    assert check._difference(largest, -largest) == float("inf"), "each is finite, and they are not alike"


def test_a_model_that_does_not_run_in_float64_is_judged_in_float32(monkeypatch):
    monkeypatch.setitem(check.ALLOWED, torch.float32, float("nan"))
    module = Net(lambda m, x: m.layer(x.float()), nn.Linear(6, 6))
    function, batch = function_of(module, "float32"), batch_of(inputs().float())
    assert checked_structure(function, find_structure(function, batch), batch, OUTPUTS).reasons


def test_a_row_that_no_output_depends_on_has_no_gradient():
    """Rows of a buffer that no backward pass reached are zero, not what the memory held before."""
    module = Net(lambda m, x: m.layer(x))

    class Head(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return torch.stack([y[:, 0], torch.zeros_like(y[:, 1]), y[:, 2].detach()], 1)

    module.head = Head(6, OUTPUTS)
    structure = agrees(module)
    assert set(structure.layers) == {name for name, _ in module.named_parameters()}


def test_a_layer_whose_output_goes_nowhere_has_no_gradient():
    def between(m, x):
        m.layer(x)
        return x

    module = Net(between).double()
    function, batch = function_of(module), batch_of(inputs())
    structure = find_structure(function, batch)
    factors = structure.layers["layer.weight"].factors
    held = torch.empty(SAMPLES, factors.input_items, dtype=torch.float64)
    gradients = torch.full((SAMPLES, OUTPUTS * factors.gradient_items), torch.nan, dtype=torch.float64)
    capture = Capture(function, structure, function.names, OUTPUTS)
    captured = capture.run(batch, {"layer.weight": as_tile(factors, held, gradients, OUTPUTS)}.get)
    assert (gradients == 0).all()
    assert (capture.dense(captured, "layer.weight", slice(None)) == 0).all()
    assert capture.dense(captured, "enter.weight", slice(None)).abs().sum() > 0


def test_parameters_without_a_use():
    """They have a gradient of zero, which torch.func knows as well."""
    module = Net(lambda m, x: x)
    module.never = nn.Embedding(4, 2)
    structure = checked(module)
    assert {"never.weight", "layer.weight", "layer.bias"} <= set(structure.layers) | set(structure.reasons)
    agrees(module, names=list(structure.layers))


def test_a_structure_without_some_parameters_leaves_out_what_is_derived_with_them():
    structure = found(Net(lambda m, x: m.layer(x)))
    less = structure.without({"layer.bias": "because", "elsewhere": "no"})
    assert set(structure.layers) - set(less.layers) == {"layer.weight", "layer.bias"}
    assert less.reasons == {"layer.bias": "because", "layer.weight": "because", "elsewhere": "no"}
    assert structure.reasons == {}
    assert isinstance(less, Structure)


# --- the interceptor -------------------------------------------------------------------------------------------------


def test_calls_are_found_by_the_identity_of_their_tensors():
    layer, other = nn.Linear(3, 2), nn.Linear(3, 2)
    names = {id(layer.weight): "mine", id(layer.bias): "its bias"}
    calls = []

    def on_call(number, rule, call, output):
        calls.append((number, rule, call))
        return output + 1

    x = torch.randn(4, 3)
    with Interceptor(names, on_call) as mode:
        result = layer(x)
        other(x)
        F.linear(x, other.weight, layer.bias)
        F.linear(input=x, weight=layer.weight)
        F.linear(x, layer.weight.detach())
        torch.relu(x)
    assert torch.equal(result, F.linear(x, layer.weight, layer.bias) + 1), "what it returns takes the output's place"
    assert [number for number, _, _ in calls] == [0, 1, 2]
    assert mode.calls == 3
    assert all(rule is RULES[F.linear] for _, rule, _ in calls)
    known = [(call.weight is not None, call.bias is not None) for _, _, call in calls]
    assert known == [(True, True), (False, True), (True, False)]
    assert all(call.inputs.data_ptr() == x.data_ptr() for _, _, call in calls)


def test_the_interceptor_holds_no_graph():
    layer, calls = nn.Linear(3, 2), []
    x = torch.randn(4, 3, requires_grad=True) * 2
    with Interceptor({id(layer.weight): "w"}, lambda number, rule, call, output: calls.append(call) or output):
        layer(x)
    assert not calls[0].inputs.requires_grad
    assert calls[0].weight is layer.weight


def test_what_a_model_asks_of_its_tensors_is_noted():
    x = torch.tensor([1.0, 2.0])
    with Interceptor({}, lambda number, rule, call, output: output) as mode:
        if x.sum() > 2:
            float(x[0])
        x[1].item()
        int(x[0])
        x.tolist()
        torch.nonzero(x)
        x.shape[0] + len(x)
    assert mode.branches[:4] == [True, 1.0, 2.0, 1]
    assert len(mode.branches) == 6


def test_functions_without_a_rule_are_named():
    weight = nn.Parameter(torch.randn(3, 3))
    with Interceptor({id(weight): "w"}, lambda number, rule, call, output: output) as mode:
        torch.tanh(weight)
        weight.square()
    assert mode.elsewhere == {"w": "tanh()"}, "the first one"


@pytest.mark.parametrize(
    ("use", "wanted"),
    [
        (lambda w: w.T, ".T"),
        (lambda w: w[:2], "[...]"),
        (lambda w: F.linear(w, torch.eye(3)), "linear() with it as the input"),
        (lambda w: (w.shape, w.dtype, w.ndim, len(w), w.data, w.grad, w.is_leaf, w.size(0)), None),
    ],
    ids=["turned", "rows", "input", "harmless"],
)
def test_what_hands_a_weight_on_is_named_and_what_only_looks_at_it_is_not(use, wanted):
    weight = nn.Parameter(torch.randn(3, 3))
    with Interceptor({id(weight): "w"}, lambda number, rule, call, output: output) as mode:
        use(weight)
    assert mode.elsewhere == ({} if wanted is None else {"w": wanted})


@pytest.mark.parametrize("different", ["none", "keys", "values", "all"])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_projections_of_attention_between_different_sequences(different, bias):
    """The packed weight is used whole, once per different input, of whose outputs only a part has gradients."""

    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = nn.MultiheadAttention(4, 2, batch_first=True, bias=bias)
            self.head = nn.Linear(4, OUTPUTS)

        def forward(self, x):
            query, key, value = x[:, :3], x[:, 2:6], x[:, 3:7]
            chosen = {
                "none": (query, query, query),
                "keys": (query, key, key),
                "values": (query, query, value[:, :3]),
                "all": (query, key, value),
            }[different]
            return self.head(torch.tanh(self.attend(*chosen, need_weights=False)[0]).mean(1))

    structure = agrees(Between(), torch.randn(SAMPLES, 7, 4, dtype=torch.float64))
    layer = structure.layers["attend.in_proj_weight"]
    # Modules with samples first turn every input but one that is given as all of them, or as keys and values.
    assert len(layer.uses) == {"none": 1, "keys": 2, "values": 3, "all": 3}[different]
    assert layer.factors is not None
    assert ("attend.in_proj_bias" in layer.parameters) == bias


def test_attention_is_seen_through_the_function_that_its_module_calls():
    layer = nn.MultiheadAttention(4, 2, batch_first=True)
    names = {id(value): name for name, value in layer.named_parameters()}
    seen = []

    def on_call(number, rule, call, output):
        seen.append(names[id(call.weight)])
        return output

    x = torch.randn(3, 5, 4, requires_grad=True)
    with Interceptor(names, on_call):
        found_output, _ = layer(x, x, x, need_weights=False)
    assert seen == ["in_proj_weight", "out_proj.weight"]
    torch.testing.assert_close(found_output, layer(x, x, x, need_weights=False)[0])
    assert F.has_torch_function((x,)) is False, "torch.nn.functional is as it was"


def test_a_product_whose_arguments_have_names():
    """``torch.addmm`` calls its arguments otherwise than the rule does."""
    shift = torch.randn(6)
    forms = [
        lambda m, x: torch.addmm(m.shift, x, m.matrix),
        lambda m, x: torch.addmm(m.shift, mat1=x, mat2=m.matrix),
        lambda m, x: torch.addmm(input=m.shift, mat1=x, mat2=m.matrix),
    ]
    for form in forms:
        module = Net(form, shift=shift, matrix=torch.randn(6, 6))
        function = function_of(module.double())
        batch = batch_of(inputs())
        structure = checked_structure(function, find_structure(function, batch), batch, OUTPUTS)
        assert {"enter.weight", "head.weight"} <= set(structure.layers)
        agrees(module, names=[name for name in function.names if name in structure.layers])


@pytest.mark.parametrize("shape", [(1,), (1, 6), (1, 1), (6,)])
def test_a_bias_that_is_broadcast(shape):
    """It is no bias of the layer's: derived by a rule of its own or by torch.func, but never wrongly or not at all."""
    module = Net(lambda m, x: torch.addmm(m.shift, x, m.matrix), matrix=torch.randn(6, 6), shift=torch.randn(shape))
    structure = checked(module)
    assert set(structure.layers) | set(structure.reasons) >= {name for name, _ in module.named_parameters()}
    agrees(module, names=list(structure.layers))


def test_hooks_of_modules_with_a_users_rule():
    class Mine(nn.Linear):
        pass

    layer_rule(Mine)(lambda module, inputs, gradient: {})
    try:
        module = Net(lambda m, x: m.layer(x), Mine(6, 6)).double()
        called = []

        def on_module(name, given_inputs, output):
            called.append((name, given_inputs[0].shape))
            return output * 0

        with module_hooks(module, on_module):
            result = module(inputs())
        assert called == [("layer", (SAMPLES, 6))]
        torch.testing.assert_close(result, module.head.bias.expand(SAMPLES, -1))
        module(inputs())
        assert len(called) == 1, "hooks are taken away"
        function = function_of(module)
        assert set(identities(function).values()) == {"enter.weight", "enter.bias", "head.weight", "head.bias"}
        structure = find_structure(function, batch_of(inputs()))
        layer = structure.layers["layer.weight"]
        assert (layer.kind, layer.module, layer.parameters) == ("module", "layer", ("layer.weight", "layer.bias"))
    finally:
        forget_layer_rule(Mine)


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_samples_of_another_length_than_the_first_are_refused_by_their_layer():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.conv = nn.Linear(4, OUTPUTS), nn.Conv1d(4, 4, 3)

        def forward(self, x):
            return self.layer(torch.tanh(self.conv(x)).transpose(1, 2)).mean(1)

    function = function_of(Mean().double())
    structure = find_structure(function, batch_of(torch.randn(3, 4, 7, dtype=torch.float64)))
    capture = Capture(function, structure, function.names, OUTPUTS)
    wanted = r"conv.weight sees 6 positions of 12 inputs and 4 outputs out of an input of 8 instead of 5 positions"
    with pytest.raises(InputError, match=wanted):
        capture.run(batch_of(torch.randn(3, 4, 8, dtype=torch.float64)))


def test_matches_are_counted_between_different_samples():
    tokens = torch.tensor([[0, 0, 1], [0, 2, -1], [-1, 1, 1]])
    wanted = {(0, 1): 1, (0, 2): 1, (1, 2): 0}  # a sample's equal tokens are added up before they are multiplied
    assert count_matches(tokens) == pytest.approx(sum(wanted.values()) / 3)
    assert count_matches(tokens[:1]) == 2, "a single sample has its own tokens"
    assert count_matches(torch.full((4, 2), -1)) == 0


def test_blocks_of_embeddings_learn_their_matches():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(7, 4, padding_idx=0), nn.Linear(4, OUTPUTS)

        def forward(self, tokens):
            return self.head(torch.tanh(self.words(tokens)).mean(1))

    tokens = torch.randint(0, 7, (SAMPLES, 5))
    module = Words().double()
    function, batch = function_of(module), batch_of(tokens)
    structure = find_structure(function, batch)
    batches = [batch_of(part) for part in tokens.split(2)]
    blocks = with_matches(parameter_blocks(module, function.names, structure), function, structure, batches, OUTPUTS)
    assert blocks[0].factors.matches == pytest.approx(count_matches(tokens.masked_fill(tokens == 0, -1)))
    assert blocks[0].factors.matches > 0, "also between samples of different batches"
    assert blocks[1].factors.matches == 0
