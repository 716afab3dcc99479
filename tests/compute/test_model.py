"""Models before anything is derived: mode, parameters, digest, smoothness."""

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import nn

from ooc_ntk.compute.model import (
    check_finite_state,
    check_mode,
    choose_parameters,
    is_smooth,
    model_digest,
    parameter_blocks,
)
from ooc_ntk.errors import InputError, NonFiniteError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3))
        self.conv1 = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.head = nn.Linear(8, 3)


EVERY = ["shift", "conv1.weight", "conv1.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("patterns", "wanted"),
    [
        (None, EVERY),
        (["*"], EVERY),
        (["*.weight"], ["conv1.weight", "norm.weight", "head.weight"]),
        (["head.*", "conv1.*"], ["conv1.weight", "conv1.bias", "head.weight", "head.bias"]),
        (["!norm.*"], [name for name in EVERY if not name.startswith("norm")]),
        (["!*.bias", "!shift"], ["conv1.weight", "norm.weight", "head.weight"]),
        (["*.weight", "!conv?.*"], ["norm.weight", "head.weight"]),
        (["shift"], ["shift"]),
    ],
)
def test_patterns_choose_in_the_models_order(patterns, wanted):
    assert list(choose_parameters(Net(), patterns)) == wanted


def test_an_unknown_pattern_suggests_a_name():
    with pytest.raises(InputError, match=r"unknown parameter or pattern 'heads.weight'; did you mean 'head.weight'"):
        choose_parameters(Net(), ["heads.weight"])
    with pytest.raises(InputError, match="unknown parameter or pattern"):
        choose_parameters(Net(), ["!layer4.*"])


def test_frozen_parameters_never_count():
    net = Net()
    net.conv1.requires_grad_(False)
    assert list(choose_parameters(net, ["conv1.*", "head.*"])) == ["head.weight", "head.bias"]
    net.requires_grad_(False)
    with pytest.raises(InputError, match="all 7 of them are frozen"):
        choose_parameters(net, None)


def test_nothing_left():
    with pytest.raises(InputError, match="no parameters are left"):
        choose_parameters(nn.Tanh(), None)
    with pytest.raises(InputError, match=r"no parameters are left.*head\.\*, !head\.\*"):
        choose_parameters(Net(), ["head.*", "!head.*"])


def test_integer_and_complex_parameters_are_refused():
    net = Net()
    net.table = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    with pytest.raises(InputError, match=r"'table' is torch.int64.*'!table'"):
        choose_parameters(net, None)
    assert "table" not in choose_parameters(net, ["!table"])
    net.table = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(InputError, match="complex64"):
        choose_parameters(net, None)


def test_blocks_are_layers():
    net = Net()
    blocks = parameter_blocks(net, choose_parameters(net, ["!norm.bias"]))
    assert [(block.name, block.parameters, block.start, block.stop) for block in blocks] == [
        ("", ("shift",), 0, 3),
        ("conv1", ("conv1.weight", "conv1.bias"), 3, 23),
        ("norm", ("norm.weight",), 23, 25),
        ("head", ("head.weight", "head.bias"), 25, 52),
    ]


class TestDigest:
    def test_equal_for_equal_models(self):
        net = Net()
        assert model_digest(copy.deepcopy(net)) == model_digest(net)
        assert len(model_digest(net)) == 32

    def test_changes_with_what_the_model_computes(self):
        torch.manual_seed(1)
        net = Net()
        digests = {"net": model_digest(net)}
        changed = copy.deepcopy(net)
        changed.head.bias.data[0] = torch.nextafter(changed.head.bias.data[0], torch.tensor(9.0))
        digests["one bit of a weight"] = model_digest(changed)
        changed = copy.deepcopy(net)
        changed.norm.running_mean[1] += 1e-3
        digests["a running mean"] = model_digest(changed)
        changed = copy.deepcopy(net)
        changed.conv1.stride = (2, 2)
        digests["a stride"] = model_digest(changed)
        changed = copy.deepcopy(net)
        changed.head.requires_grad_(False)
        digests["a frozen layer"] = model_digest(changed)
        digests["double"] = model_digest(copy.deepcopy(net).double())
        digests["an activation"] = model_digest(nn.Sequential(net, nn.Tanh()))
        digests["another activation"] = model_digest(nn.Sequential(net, nn.GELU()))
        assert len(set(digests.values())) == len(digests), digests


class TestMode:
    @pytest.mark.parametrize(
        ("module", "message"),
        [
            (
                nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)),
                r"1 \(BatchNorm1d\) is in training mode.*model.eval\(\)",
            ),
            (nn.Sequential(nn.Dropout(0.1)), r"0 \(Dropout\) drops at random.*p = 0.1.*model.eval\(\)"),
            (nn.Sequential(nn.Dropout2d(0.5)), "drops at random"),
            (nn.TransformerEncoderLayer(8, 2, 8, dropout=0.1), "drops at random"),
            (nn.MultiheadAttention(8, 2, dropout=0.2), r"the model \(MultiheadAttention\) drops at random"),
            (nn.LSTM(3, 3, 2, dropout=0.5), "drops at random"),
        ],
    )
    def test_training_mode_is_refused(self, module, message):
        with pytest.raises(InputError, match=message):
            check_mode(module.train())
        check_mode(module.eval())

    def test_one_layer_left_in_training_mode_is_found(self):
        net = Net().eval()
        net.norm.train()
        with pytest.raises(InputError, match=r"norm \(BatchNorm2d\)"):
            check_mode(net)

    def test_what_does_no_harm_in_training_mode(self):
        check_mode(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.0), nn.LayerNorm(3), nn.InstanceNorm2d(3)).train())

    def test_batch_norm_without_statistics_is_refused_even_in_eval_mode(self):
        with pytest.raises(InputError, match=r"keeps no running statistics.*track_running_stats=True"):
            check_mode(nn.BatchNorm1d(3, track_running_stats=False).eval())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_named(value):
    net = Net()
    check_finite_state(net)
    net.norm.running_var[1] = value
    with pytest.raises(NonFiniteError, match=r"'norm.running_var' holds 1 NaN or infinite value of 2"):
        check_finite_state(net)


X = torch.linspace(0.1, 2.0, 24).reshape(1, 2, 3, 4)

SMOOTH = {
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
    "softplus": F.softplus,
    "sigmoid": torch.sigmoid,
    "softmax": lambda x: x.softmax(1),
    "mean": lambda x: x.mean((2, 3)),
    "average pool": lambda x: F.adaptive_avg_pool2d(x, 1),
    "logsumexp": lambda x: x.logsumexp(1),
    "layer norm": lambda x: F.layer_norm(x, (4,)),
    "minus": lambda x: -x - 1,
}
KINKED = {
    "relu": F.relu,
    "relu in place": lambda x: F.relu_(x * 1),
    "relu6": F.relu6,
    "leaky relu": F.leaky_relu,
    "prelu": lambda x: F.prelu(x, torch.tensor([0.1])),
    "hardtanh": F.hardtanh,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "threshold": lambda x: F.threshold(x, 0.5, 0),
    "softshrink": F.softshrink,
    "max pool": lambda x: F.max_pool2d(x, 2),
    "adaptive max pool": lambda x: F.adaptive_max_pool2d(x, 1),
    "max": lambda x: x.max(2).values,
    "max of all": lambda x: x.max(),
    "amax": lambda x: x.amax((2, 3)),
    "amin": lambda x: x.amin(3),
    "maximum": lambda x: torch.maximum(x, x.flip(3)),
    "minimum": lambda x: torch.minimum(x, x.flip(3)),
    "abs": torch.abs,
    "clamp": lambda x: x.clamp(min=0.5),
    "clip": lambda x: torch.clip(x, 0.5, 1),
    "sort": lambda x: x.sort(3).values,
    "topk": lambda x: x.topk(2, 3).values,
    "median": lambda x: x.median(3).values,
}


def behind(operation):
    weight = torch.ones((), requires_grad=True)
    return torch.tanh(operation(weight * X).sum())


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_operations(name):
    assert is_smooth(behind(SMOOTH[name]))


@pytest.mark.parametrize("name", KINKED)
def test_operations_that_rounding_can_flip(name):
    assert not is_smooth(behind(KINKED[name]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_large_weights_are_finite_though_a_sum_of_their_own_type_is_not(dtype):
    net = nn.Linear(8, 2, dtype=dtype)
    with torch.no_grad():
        net.weight.fill_(torch.finfo(dtype).max)
    check_finite_state(net)
    with torch.no_grad():
        net.weight[0, 0], net.weight[0, 1] = torch.inf, -torch.inf
    with pytest.raises(NonFiniteError, match="'weight' holds 2 NaN or infinite values of 16"):
        check_finite_state(net)
