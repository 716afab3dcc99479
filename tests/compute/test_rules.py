"""Every layer rule by itself, in float64, against per-sample gradients of torch.func (autograd where vmap has none)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, jacrev, vmap

from ooc_ntk.compute.capture import Capture
from ooc_ntk.compute.discover import find_structure
from ooc_ntk.compute.held import as_tile
from ooc_ntk.compute.jacobian import ModelBatch, ModelFunction
from ooc_ntk.compute.model import choose_parameters
from ooc_ntk.compute.outputs import OutputRows
from ooc_ntk.compute.rules.base import Call
from ooc_ntk.compute.rules.elements import InstanceNorm
from ooc_ntk.compute.rules.recurrent import STEPS, recurrent_weights, write_out
from ooc_ntk.compute.rules.table import RULES, forget_layer_rule, layer_rule, module_rule, registered_rules
from tests import oracle
from tests.zoo import Conv1D

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

#: Samples of every case: more than the three that the structure is found from. Rows per sample.
SAMPLES, OUTPUTS = 5, 3


class Around(nn.Module):
    """A layer and fixed outputs of everything that it returns: only the layer has parameters.

    The outputs are no linear function of the layer's, so that a sample's gradient depends on its own values.
    """

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args):
        found = self.layer(*args)
        flat = torch.tanh(found).reshape(len(args[0]), -1)
        mix = torch.sin(1.7 * torch.arange(flat.shape[1] * OUTPUTS, dtype=flat.dtype)).view(-1, OUTPUTS)
        return flat @ (mix / math.sqrt(flat.shape[1]))


class Called(nn.Module):
    """Calls a function with one weight."""

    def __init__(self, function, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape))
        self.function = function

    def forward(self, x):
        return self.function(x, self.weight)


def prepared(layer, *, frozen=()):
    """A model around a layer, in float64, nothing of it at a value where a wrong factor would not show."""
    module = Around(layer).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        for name, buffer in module.named_buffers():
            if "running" in name:
                buffer += torch.rand_like(buffer)
    for name in frozen:
        module.get_parameter(f"layer.{name}").requires_grad_(False)
    return module


def function_of(module):
    return ModelFunction(module, choose_parameters(module, None), OutputRows.of("logits", "trace"), "float64", "cpu")


def by_rules(module, *args, wanted=slice(None), rows=slice(None)):
    """Gradients by rules alone: (samples, rows, numel) by name; with the structure that they were found by."""
    function, batch = function_of(module), ModelBatch(args, {}, None)
    structure = find_structure(function, batch)
    assert structure.reasons == {}
    assert set(structure.layers) == set(function.names)
    capture = Capture(function, structure, function.names, OUTPUTS)
    captured = capture.run(batch)
    return {name: capture.dense(captured, name, wanted, rows) for name in function.names}, structure


def by_torch_func(module, *args):
    """The same by vmap over samples of the reverse-mode Jacobian of one sample."""
    chosen = {name: value.detach() for name, value in module.named_parameters() if value.requires_grad}
    others = {name: value.detach() for name, value in module.named_parameters() if not value.requires_grad}
    buffers = dict(module.named_buffers())

    def one(parameters, *single):
        return functional_call(module, {**others, **buffers, **parameters}, tuple(value[None] for value in single))[0]

    found = vmap(jacrev(one), in_dims=(None, *(0 for _ in args)))(chosen, *args)
    return {name: value.flatten(2) for name, value in found.items()}


def by_loop(module, *args):
    """The same sample by sample, for functions that vmap has no rule for."""
    chosen = {name: value for name, value in module.named_parameters() if value.requires_grad}
    every = torch.from_numpy(oracle.jacobian(module, args, names=tuple(chosen)))
    parts = every.split([value.numel() for value in chosen.values()], 2)
    return dict(zip(chosen, parts, strict=True))


def check(layer, *args, reference=by_torch_func, frozen=(), drawn=False):
    """Compare all gradients of a layer; returns the structure. Windows of a drawn geometry may see only zeros."""
    module = prepared(layer, frozen=frozen)
    found, structure = by_rules(module, *args)
    wanted = reference(module, *args)
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert drawn or value.norm() > 1e-3, f"{name} has no part in the outputs"
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: name + text)
    return structure


def images(channels, *size):
    return torch.randn(SAMPLES, channels, *size, dtype=torch.float64)


def vectors(*shape):
    return torch.randn(SAMPLES, *shape, dtype=torch.float64)


def tokens(*shape, words=7):
    """With a token that comes twice in every sample, and without one that never comes."""
    found = torch.randint(0, words - 1, (SAMPLES, *shape))
    found[..., 0] = found[..., -1] = 2
    return found


# --- linear ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 1, 3)])
def test_linear_with_any_leading_dimensions(leading, bias):
    structure = check(nn.Linear(6, 5, bias=bias), vectors(*leading, 6))
    layer = structure.layers["layer.weight"]
    assert layer.parameters == (("layer.weight", "layer.bias") if bias else ("layer.weight",))
    assert (layer.kind, layer.factors.kind, layer.factors.bias) == ("outer", "linear", bias)
    assert (layer.factors.positions, layer.factors.inputs, layer.factors.outputs) == (math.prod(leading), 6, 5)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("leading", [(), (2, 3)])
def test_linear_of_which_a_part_is_frozen(leading, frozen):
    structure = check(nn.Linear(6, 5), vectors(*leading, 6), frozen=(frozen,))
    (layer,) = structure.layers.values()
    assert layer.kind == ("bias" if frozen == "weight" else "outer")


@pytest.mark.parametrize("leading", [(), (4,), (2, 3)])
def test_a_product_with_the_weight_the_other_way_round(leading):
    """``torch.addmm``, as the Conv1D of GPT-2 calls it: all tokens of all samples in one row."""
    structure = check(Conv1D(5, 6), vectors(*leading, 6))
    layer = structure.layers["layer.weight"]
    assert layer.parameters == ("layer.weight", "layer.bias")
    assert layer.factors.positions == math.prod(leading)
    assert layer.uses[0].rule is RULES[torch.addmm]


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_such_a_product_of_which_a_part_is_frozen(frozen):
    check(Conv1D(5, 6), vectors(4, 6), frozen=(frozen,))


# --- convolutions ----------------------------------------------------------------------------------------------------

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
SIZES = {1: (9,), 2: (6, 7), 3: (4, 5, 3)}

#: Of a kernel of 2 to 3 by 2 to 3 taps.
GEOMETRIES = {
    "plain": {},
    "stride": {"stride": 2},
    "padded": {"padding": 1},
    "strided and padded": {"stride": 2, "padding": 1},
    "dilated": {"dilation": 2, "padding": 2},
    "no bias": {"bias": False, "padding": 1},
    "two groups": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4, "out_channels": 4, "padding": 1},
    "depthwise times two": {"groups": 4, "out_channels": 8, "bias": False},
    "same": {"padding": "same"},
    "same and dilated": {"padding": "same", "dilation": 2},
    "valid": {"padding": "valid", "stride": 2},
    "one tap": {"kernel_size": 1},
    "one tap, strided": {"kernel_size": 1, "stride": 2},
    "one tap, padded": {"kernel_size": 1, "padding": 1},
    "one tap, groups": {"kernel_size": 1, "groups": 2},
    "stride leaves a border": {"kernel_size": 2, "stride": 3},
    **{mode: {"padding": 1, "padding_mode": mode} for mode in ("reflect", "replicate", "circular")},
    **{f"same, {mode}": {"padding": "same", "padding_mode": mode} for mode in ("reflect", "replicate", "circular")},
    "circular, strided, groups": {"padding": 1, "padding_mode": "circular", "stride": 2, "groups": 2},
}


@pytest.mark.parametrize("kernel_size", [2, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dims", CONVOLUTIONS)
def test_convolutions(dims, geometry, kernel_size):
    options = {"in_channels": 4, "out_channels": 6, "kernel_size": kernel_size, **GEOMETRIES[geometry]}
    structure = check(CONVOLUTIONS[dims](**options), images(4, *SIZES[dims]))
    layer = structure.layers["layer.weight"]
    if options.get("groups", 1) > 1:
        assert layer.factors is None, "a layer with groups is only ever dense"
    elif options["kernel_size"] == 1 and "padding" not in options:
        assert layer.factors.kind == "linear"
    else:
        assert layer.factors.kind == "convolution"
        assert layer.factors.window.kernel == (options["kernel_size"],) * dims


@st.composite
def _convolutions(draw):
    """Any convolution of another geometry along each dimension, with the size of its input."""
    dims = draw(st.integers(1, 3))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, stride, dilation = each(1, 4 - (dims == 3)), each(1, 3), each(1, 2)
    groups = draw(st.sampled_from([1, 1, 2]))
    padding = draw(st.sampled_from(["same", "valid", "given"]))
    if padding == "given":
        padding = each(0, 3)
    elif padding == "same":
        stride = (1,) * dims
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = tuple(length + draw(st.integers(0, 2)) for length in reach)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return dims, size, {"kernel_size": kernel, "bias": draw(st.booleans()), **options}


@settings(max_examples=60, deadline=None)
@given(drawn=_convolutions())
def test_convolutions_of_any_geometry(drawn):
    dims, size, options = drawn
    torch.manual_seed(0)
    check(CONVOLUTIONS[dims](2, 4, **options), images(2, *size), drawn=True)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_convolutions_of_which_a_part_is_frozen(kind, frozen):
    check(kind(3, 4, 3, stride=2), images(3, 6, 7), frozen=(frozen,))


class Frames(nn.Module):
    """Applies a layer to every frame of a sample, frames merged into samples."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.layer = None, layer

    def forward(self, x):
        return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2, "groups": 3}, {"bias": False}, {"kernel_size": 1}])
def test_a_convolution_of_several_images_per_sample(options):
    check(Frames(nn.Conv2d(3, 6, **{"kernel_size": 3, **options})), vectors(2, 3, 5, 6))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2},
        {"stride": 2, "padding": 1},
        {"stride": 2, "padding": 1, "output_padding": 1},
        {"stride": 3, "output_padding": 2},
        {"dilation": 2, "padding": 2},
        {"stride": 2, "dilation": 3, "output_padding": 1, "padding": 1},
        {"groups": 2},
        {"groups": 2, "stride": 2, "padding": 1, "output_padding": 1, "bias": False},
        {"groups": 4, "out_channels": 4},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 2, "stride": 3},
        {"padding": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("dims", TRANSPOSED)
def test_transposed_convolutions(dims, options):
    given_options = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, **options}
    structure = check(TRANSPOSED[dims](**given_options), images(4, *SIZES[dims]))
    layer = structure.layers["layer.weight"]
    assert (layer.factors is None) == ("groups" in options)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), dims=st.integers(1, 3), groups=st.sampled_from([1, 2]), bias=st.booleans())
def test_transposed_convolutions_of_any_geometry(data, dims, groups, bias):
    def each(low, high):
        return tuple(data.draw(st.integers(low, high)) for _ in range(dims))

    kernel, stride, dilation, size = each(1, 3), each(1, 3), each(1, 2), each(2, 4)
    # torch wants at least one output pixel, and less padding behind than a step in either sense.
    padding = tuple(
        min(data.draw(st.integers(0, 2)), ((n - 1) * s + d * (k - 1)) // 2)
        for n, s, d, k in zip(size, stride, dilation, kernel, strict=True)
    )
    behind = tuple(data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    torch.manual_seed(0)
    layer = TRANSPOSED[dims](2, 4, kernel, stride, padding, behind, groups, bias, dilation)
    check(layer, images(2, *size), drawn=True)


# --- embeddings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [None, 0, 2, -1, -5])
@pytest.mark.parametrize("shape", [(1,), (6,), (2, 3)])
def test_embedding(shape, padding):
    structure = check(nn.Embedding(7, 4, padding_idx=padding), tokens(*shape, 3))
    factors = structure.layers["layer.weight"].factors
    assert (factors.kind, factors.positions, factors.inputs) == ("tokens", 3 * math.prod(shape), 7)


def test_an_embedding_of_one_token_per_sample():
    check(nn.Embedding(7, 4), torch.tensor([3, 0, 6, 3, 1]))


@pytest.mark.parametrize("padding", [0, 2, -1, -5])
@pytest.mark.parametrize("function", [F.embedding, F.embedding_bag])
def test_padding_that_is_counted_from_the_end(function, padding):
    """The modules count it from the front, their functions take both."""
    layer = Called(lambda rows, weight: function(rows, weight, padding_idx=padding), 7, 4)
    check(layer, tokens(6), reference=by_loop)


class Weighted(nn.Module):
    """A sum of rows with a weight for each, as ``per_sample_weights`` has it."""

    def __init__(self, **options):
        super().__init__()
        self.bag = nn.EmbeddingBag(7, 4, mode="sum", **options)

    def forward(self, rows, weights):
        return self.bag(rows, per_sample_weights=weights)


@pytest.mark.parametrize("padding", [None, 2, -2])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags(mode, padding):
    found = tokens(6)
    if padding == 2:
        found[1] = 2  # a bag of nothing but padding
    structure = check(nn.EmbeddingBag(7, 4, mode=mode, padding_idx=padding), found, reference=by_loop)
    assert structure.layers["layer.weight"].factors.kind == "tokens"


@pytest.mark.parametrize("padding", [None, 2])
def test_bags_with_weights(padding):
    check(Weighted(padding_idx=padding), tokens(6), vectors(6), reference=by_loop)


# --- norms and other elementwise layers ------------------------------------------------------------------------------

#: Torch's own vmap fails on the reverse pass of PReLU, and cannot change running statistics in place.
NOT_BY_VMAP = (nn.PReLU, nn.InstanceNorm2d)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(4), (4,)),
        (nn.BatchNorm1d(4), (4, 6)),
        (nn.BatchNorm2d(4, eps=0.1), (4, 3, 5)),
        (nn.BatchNorm3d(4), (4, 2, 3, 2)),
        (nn.LayerNorm(6), (6,)),
        (nn.LayerNorm(6, eps=0.1), (3, 6)),
        (nn.LayerNorm((3, 4)), (3, 4)),
        (nn.LayerNorm((3, 4)), (2, 5, 3, 4)),
        (nn.LayerNorm(6, bias=False), (2, 3, 6)),
        (nn.GroupNorm(2, 4), (4,)),
        (nn.GroupNorm(2, 4, eps=0.1), (4, 6)),
        (nn.GroupNorm(1, 4), (4, 3, 5)),
        (nn.GroupNorm(4, 4), (4, 2, 3, 2)),
        (nn.RMSNorm(6), (6,)),
        (nn.RMSNorm(6, eps=0.1), (3, 6)),
        (nn.RMSNorm((3, 4)), (2, 3, 4)),
        (nn.InstanceNorm1d(4, affine=True), (4, 6)),
        (nn.InstanceNorm2d(4, affine=True, eps=0.1), (4, 3, 5)),
        (nn.InstanceNorm3d(4, affine=True), (4, 2, 3, 2)),
        (nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (4, 3, 5)),
        (nn.PReLU(), (6,)),
        (nn.PReLU(), (4, 3, 5)),
        (nn.PReLU(4), (4,)),
        (nn.PReLU(4), (4, 6)),
        (nn.PReLU(4), (4, 3, 5)),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_elementwise_layers(layer, shape):
    reference = by_loop if isinstance(layer, NOT_BY_VMAP) else by_torch_func
    structure = check(layer, 0.5 + vectors(*shape), reference=reference)
    assert {name.rpartition(".")[2]: found.kind for name, found in structure.layers.items()} == {
        name: name if name == "bias" else "weight" for name, _ in layer.named_parameters()
    }
    assert all(found.factors is None for found in structure.layers.values()), "they are only ever dense"


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.BatchNorm2d(4), (4, 3, 5)), (nn.LayerNorm(6), (3, 6)), (nn.GroupNorm(2, 4), (4, 3, 5))]
)
def test_elementwise_layers_of_which_a_part_is_frozen(layer, shape, frozen):
    for parameter in layer.parameters():
        parameter.requires_grad_(True)
    check(layer, vectors(*shape), frozen=(frozen,))


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), nn.PReLU(4), nn.PReLU()],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_elementwise_layers_of_several_images_per_sample(layer):
    check(Frames(layer), vectors(2, 4, 3, 5), reference=by_loop if isinstance(layer, NOT_BY_VMAP) else by_torch_func)


@pytest.mark.parametrize("training", [True, False])
def test_the_instance_norm_rule_leaves_running_statistics_alone(training):
    x, weight, mean, variance = vectors(4, 6), torch.ones(4).double(), torch.zeros(4).double(), torch.ones(4).double()
    before = mean.clone(), variance.clone()
    given_arguments = {"input": x, "running_mean": mean, "running_var": variance, "weight": weight, "bias": None}
    call = Call(x, weight, None, {**given_arguments, "use_input_stats": training, "momentum": 0.1, "eps": 1e-5})
    found = InstanceNorm().scaled(call, x)
    wanted = (x - x.mean(2, keepdim=True)) / (x.var(2, correction=0, keepdim=True) + 1e-5).sqrt() if training else x
    torch.testing.assert_close(found, wanted, rtol=1e-5 if not training else 1e-12, atol=1e-12)
    assert torch.equal(mean, before[0])
    assert torch.equal(variance, before[1])


# --- recurrent layers ------------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """All outputs and last states of a recurrent layer, one row per sample, whichever way round it takes them."""

    def __init__(self, kind, **options):
        super().__init__()
        self.reader = kind(4, 3, **options)
        self.first = options.get("batch_first", False)

    def forward(self, x):
        outputs, states = self.reader(x if self.first else x.transpose(0, 1))
        outputs = outputs if self.first else outputs.transpose(0, 1)
        states = states if isinstance(states, tuple) else (states,)
        return torch.cat([outputs.flatten(1), *(state.transpose(0, 1).flatten(1) for state in states)], 1)


RECURRENT = {
    "lstm": (nn.LSTM, {}),
    "gru": (nn.GRU, {}),
    "tanh": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
}
VARIANTS = {
    "plain": {},
    "samples first": {"batch_first": True},
    "both ways": {"bidirectional": True},
    "two layers": {"num_layers": 2},
    "no bias": {"bias": False},
    "everything": {"batch_first": True, "bidirectional": True, "num_layers": 2, "bias": False},
    "everything with bias": {"bidirectional": True, "num_layers": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers(name, variant):
    kind, options = RECURRENT[name]
    structure = check(Reader(kind, **options, **VARIANTS[variant]), vectors(5, 4), reference=by_loop)
    for name, layer in structure.layers.items():
        if ".bias" in name:  # biases do not follow their own weights
            assert layer.kind == "bias"
        else:
            assert (layer.kind, layer.factors.positions) == ("outer", 5), "one position per step"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_written_out_are_the_same_function(name, variant):
    kind, options = RECURRENT[name]
    layer = kind(4, 3, **options, **VARIANTS[variant]).double()
    directions = layer.num_layers * (2 if layer.bidirectional else 1)
    states = [torch.randn(directions, SAMPLES, 3, dtype=torch.float64) for _ in range(2)]
    function = {"lstm": torch.lstm, "gru": torch.gru, "tanh": torch.rnn_tanh, "relu": torch.rnn_relu}[name]
    given_states = states if name == "lstm" else states[0]
    x = vectors(5, 4) if layer.batch_first else vectors(5, 4).transpose(0, 1)
    tail = (layer.bias, layer.num_layers, 0.0, False, layer.bidirectional, layer.batch_first)
    args = (x, given_states, layer._flat_weights, *tail)
    assert function in STEPS
    assert recurrent_weights(args) is layer._flat_weights
    with torch.no_grad():
        found, wanted = write_out(function, args), function(*args)
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_what_is_not_written_out():
    projected = nn.LSTM(4, 3, proj_size=2)
    plain = nn.LSTM(4, 3)
    tail = (True, 1, 0.0, False, False, False)
    x = torch.randn(5, SAMPLES, 4)
    assert recurrent_weights((x, None, projected._flat_weights, *tail)) is None
    assert recurrent_weights((x[:, 0], None, plain._flat_weights, *tail)) is None, "a sequence without samples"
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.full((SAMPLES,), 5))
    assert recurrent_weights((packed.data, packed.batch_sizes, None, plain._flat_weights, *tail[:-1])) is None


# --- what a rule refuses ---------------------------------------------------------------------------------------------


class Offsets(nn.Module):
    """Bags one after the other, with the place where each begins."""

    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(7, 4, mode="sum")

    def forward(self, rows):
        return self.bag(rows.flatten(), torch.arange(0, rows.numel(), rows.shape[1]))


def _scaled_product(**factors):
    return Called(lambda x, weight: torch.addmm(x.new_zeros(5), x, weight, **factors), 4, 5)


REFUSED = {
    "max_norm": (lambda: nn.Embedding(7, 4, max_norm=0.5), True, "max_norm changes the weight"),
    "frequency": (lambda: nn.Embedding(7, 4, scale_grad_by_freq=True), True, "scale_grad_by_freq scales"),
    "bag, max_norm": (lambda: nn.EmbeddingBag(7, 4, max_norm=0.5), True, "max_norm changes the weight"),
    "bag, frequency": (lambda: nn.EmbeddingBag(7, 4, scale_grad_by_freq=True), True, "scale_grad_by_freq scales"),
    "bag, maximum": (lambda: nn.EmbeddingBag(7, 4, mode="max"), True, "'max' takes one element"),
    "bag, offsets": (Offsets, True, "given by offsets"),
    "alpha": (lambda: _scaled_product(alpha=2), False, "scaled by alpha or beta"),
    "beta": (lambda: _scaled_product(beta=0.5), False, "scaled by alpha or beta"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_calls_that_no_rule_covers(name):
    make, whole, reason = REFUSED[name]
    module = Around(make()).double().eval()
    function = function_of(module)
    structure = find_structure(function, ModelBatch((tokens(6) if whole else vectors(4),), {}, None))
    assert structure.layers == {}
    (said,) = structure.reasons.values()
    assert reason in said


def test_a_batch_norm_that_normalises_by_the_batch_is_not_covered():
    x, ones = vectors(4, 3), torch.ones(4).double()
    rule = RULES[F.batch_norm]

    def said(training, mean):
        arguments = {"running_mean": mean, "running_var": mean, "training": training}
        return rule.covers(Call(x, ones, ones, arguments))

    assert said(True, ones) == said(False, None) == "it normalises by the batch"
    assert said(False, ones) == ""


def test_a_transposed_convolution_of_one_image_without_samples_is_not_covered():
    rule, weight = RULES[F.conv_transpose2d], torch.randn(3, 4, 2, 2)
    assert rule.covers(Call(torch.randn(3, 5, 5), weight, None, {"weight": weight})) == "its input has no samples"
    assert rule.covers(Call(torch.randn(2, 3, 5, 5), weight, None, {"weight": weight})) == ""


# --- the table, and what comes out of a capture ----------------------------------------------------------------------


@pytest.mark.parametrize("rule", dict.fromkeys(RULES.values()), ids=lambda rule: type(rule).__name__)
def test_arguments_are_found_by_place_and_by_name(rule):
    names = [name for name, _ in rule.signature]
    assert {"input", "weight"} <= set(names)
    placed = rule.bind(tuple(names), {})
    # torch.addmm has names of its own for what is multiplied and added.
    torchs = {"bias": "input", "input": "mat1", "weight": "mat2"} if torch.addmm in rule.functions else {}
    assert placed == rule.bind((), {torchs.get(name, name): name for name in names}) == {name: name for name in names}
    assert rule.bind((names[0],), {names[-1]: 3}) == {**dict(rule.signature), names[0]: names[0], names[-1]: 3}


def test_a_users_rule_is_of_one_class_only():
    class Mine(nn.Identity):
        pass

    class Derived(Mine):
        pass

    def rule(module, inputs, output_gradient):
        return {}

    before = registered_rules()
    assert layer_rule(Mine)(rule) is rule
    try:
        assert module_rule(Mine()) is rule
        assert module_rule(Derived()) is None
        assert registered_rules() == {**before, Mine: rule}
    finally:
        forget_layer_rule(Mine)
    forget_layer_rule(Mine)
    assert registered_rules() == before


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 5), (3, 6)),
        (nn.Conv2d(4, 4, 3, padding=1), (4, 5, 6)),
        (nn.Conv2d(4, 4, 3, groups=2), (4, 5, 6)),
        (nn.ConvTranspose2d(4, 3, 2), (4, 3, 3)),
        (nn.GroupNorm(2, 4), (4, 3, 5)),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_some_samples_and_rows(layer, shape):
    module, x = prepared(layer), vectors(*shape)
    every = by_torch_func(module, x)
    found, _ = by_rules(module, x, wanted=slice(1, 4), rows=slice(2, 3))
    for name, value in every.items():
        torch.testing.assert_close(found[name], value[1:4, 2:3], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chosen", [[0], [2, 0], [1]])
def test_some_rows_are_derived_alone(chosen):
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm, self.conv = nn.Linear(6, 6), nn.LayerNorm(6), nn.Conv1d(3, 2, 3, groups=1)

        def forward(self, x):
            return self.conv(torch.tanh(self.norm(self.linear(x))))

    module, x = prepared(Three()), vectors(3, 6)
    function, batch = function_of(module), ModelBatch((x,), {}, None)
    capture = Capture(function, find_structure(function, batch), function.names, OUTPUTS, chosen)
    captured = capture.run(batch)
    for name, value in by_torch_func(module, x).items():
        found = capture.dense(captured, name, slice(None))
        torch.testing.assert_close(found, value[:, chosen], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "data"),
    [
        (nn.Linear(6, 5), vectors(3, 6)),
        (nn.Conv2d(3, 4, 3, padding=1), vectors(3, 5, 6)),
        (nn.Embedding(7, 4), tokens(6)),
    ],
    ids=["linear", "convolution", "tokens"],
)
@pytest.mark.parametrize("contraction", ["pairwise", "gemm"])
def test_factors_go_where_they_are_wanted(layer, data, contraction):
    """Every element of a given destination is written, though it held something before."""
    module = prepared(layer)
    function, batch = function_of(module), ModelBatch((data,), {}, None)
    structure = find_structure(function, batch)
    capture = Capture(function, structure, function.names, OUTPUTS)
    factors = structure.layers["layer.weight"].factors
    kind = torch.int32 if factors.kind == "tokens" else torch.float64
    held = torch.full((SAMPLES, factors.input_items), -77, dtype=kind)
    gradients = torch.full((SAMPLES, OUTPUTS * factors.gradient_items), torch.nan, dtype=torch.float64)
    captured = capture.run(batch, {"layer.weight": as_tile(factors, held, gradients, OUTPUTS, contraction)}.get)
    (found,) = captured.factors["layer.weight"]
    assert [part.data_ptr() for part in found] == [held.data_ptr(), gradients.data_ptr()]
    assert not (held == -77).any()
    assert not gradients.isnan().any()
    for name, value in by_torch_func(module, data).items():
        torch.testing.assert_close(capture.dense(captured, name, slice(None)), value, rtol=1e-10, atol=1e-12)
