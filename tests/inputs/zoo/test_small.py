import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import nn

from ooc_ntk.inputs.zoo.build import build_model
from ooc_ntk.inputs.zoo.small import LENET_SMALLEST, LeNet, Mlp

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("name", "function"), [("relu", torch.relu), ("tanh", torch.tanh), ("gelu", F.gelu)])
def test_mlp_is_its_formula(name, function):
    model = build_model(f"mlp,width=5,depth=2,inputs=12,classes=3,activation={name}")
    state = model.state_dict()
    x = torch.randn(4, 3, 2, 2)
    out = x.reshape(4, 12)
    for layer in ("fc1", "fc2"):
        out = function(out @ state[f"{layer}.weight"].T + state[f"{layer}.bias"])
    torch.testing.assert_close(model(x), out @ state["head.weight"].T + state["head.bias"])
    assert list(state) == [f"{layer}.{kind}" for layer in ("fc1", "fc2", "head") for kind in ("weight", "bias")]


def test_mlp_without_hidden_layers_is_linear():
    model = Mlp(6, 99, 0, 2)
    assert [type(layer) for layer in model] == [nn.Flatten, nn.Linear]
    assert model(torch.zeros(3, 2, 3)).shape == (3, 2)


def test_lenet_has_the_widths_of_the_paper():
    model = build_model("lenet")
    assert sum(parameter.numel() for parameter in model.parameters()) == 61_706
    assert [tuple(value.shape) for key, value in model.state_dict().items() if key.endswith("weight")] == [
        (6, 1, 5, 5),
        (16, 6, 5, 5),
        (120, 400),
        (84, 120),
        (10, 84),
    ]


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_lenet_is_its_formula(pool):
    model = build_model(f"lenet,activation=tanh,pool={pool}")
    state = model.state_dict()
    pooled = {"max": F.max_pool2d, "avg": F.avg_pool2d}[pool]
    x = torch.randn(2, 1, 28, 28)
    out = pooled(torch.tanh(F.conv2d(F.pad(x, (2, 2, 2, 2)), state["conv1.weight"], state["conv1.bias"])), 2)
    out = pooled(torch.tanh(F.conv2d(out, state["conv2.weight"], state["conv2.bias"])), 2).reshape(2, -1)
    for layer in ("fc1", "fc2"):
        out = torch.tanh(F.linear(out, state[f"{layer}.weight"], state[f"{layer}.bias"]))
    torch.testing.assert_close(model(x), F.linear(out, state["fc3.weight"], state["fc3.bias"]))


@pytest.mark.parametrize("size", [LENET_SMALLEST, 13, 28, 31, 32, 33, 64])
def test_lenet_takes_every_size_from_the_smallest_on(size):
    with torch.device("meta"):
        assert LeNet(size)(torch.empty(2, 1, size, size)).shape == (2, 10)
