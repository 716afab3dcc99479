import pytest
import torch
from torch import nn

from ooc_ntk.errors import InputError
from ooc_ntk.inputs.models import load_model, save_weights

FILE = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2))

net = build()

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

def number():
    return 3

def sized(width):
    return nn.Linear(width, 1)

def fails():
    raise OSError("no such checkpoint")
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "nets.py").write_text(FILE)
    return tmp_path


@pytest.mark.parametrize("name", ["build", "net", "Net"])
def test_factories_instances_and_classes_give_a_model_in_eval_mode(folder, name):
    model = load_model(f"nets.py:{name}", base=folder)
    assert isinstance(model, nn.Module)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_weights_are_put_in(folder, ending):
    other = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2))
    path = folder / f"w.{ending}"
    if ending == "pt":
        torch.save(other.state_dict(), path)
    else:
        save_weights(other, path)
    for weights in (path, str(path), f"w.{ending}"):
        model = load_model("nets.py:build", weights=weights, base=folder)
        assert all(torch.equal(model.state_dict()[name], value) for name, value in other.state_dict().items())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nets.py:number", "gave a int, not a torch.nn.Module"),
        ("nets.py:sized", "without arguments"),
        ("nets.py:fails", "OSError: no such checkpoint"),
        ("nets.py:biuld", "did you mean 'build'"),
        ("nets.py", "no function name"),
        ("nowhere.py:build", r"model: there is no file /.*nowhere.py"),
    ],
)
def test_bad_models_are_refused_with_a_reason(folder, spec, message):
    with pytest.raises(InputError, match=message):
        load_model(spec, base=folder)
