import sys
import types

import pytest
import torch

from ooc_ntk.errors import InputError
from ooc_ntk.inputs.zoo.build import build_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of torch.hub, and no torchvision."""
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    return folder


def test_cached_weights_are_taken(cache):
    state = build_model("resnet18,seed=7").state_dict()
    torch.save(state, cache / "resnet18-f37072fd.pth")
    plain = build_model("resnet18,pretrained=1")
    assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items())
    alias = build_model("resnet-18_pretrained")
    assert all(torch.equal(value, state[key]) for key, value in alias.state_dict().items() if not key.startswith("fc."))
    assert torch.equal(alias.fc.weight, build_model("resnet-18_init").fc.weight)
    with pytest.raises(InputError, match=r"fc.weight \(1000, 512\), model has \(10, 512\)"):
        build_model("resnet18,classes=10,pretrained=1")


def test_without_cache_and_torchvision_the_file_and_its_address_are_named(cache):
    with pytest.raises(
        InputError,
        match=r"checkpoints/resnet18-f37072fd.pth does not exist, and torchvision cannot fetch.*"
        r"download https://download.pytorch.org/models/resnet18-f37072fd.pth .*--weights resnet18-f37072fd.pth",
    ):
        build_model("resnet-18_pretrained")


def test_other_weights_of_the_network_are_named_and_not_taken(cache):
    (cache / "resnet50-11ad3fa6.pth").touch()
    (cache / "resnet18-f37072fd.pth").touch()
    with pytest.raises(InputError, match="has only resnet50-11ad3fa6.pth, which are others"):
        build_model("resnet50,pretrained=1")


def test_torchvision_is_asked_for_its_first_weights(cache, monkeypatch):
    state = build_model("resnet18,seed=7").state_dict()
    asked = []

    class Weights:
        def get_state_dict(self, *, progress, check_hash):
            assert check_hash
            return state

    def get_model_weights(name):
        asked.append(name)
        return {"IMAGENET1K_V1": Weights()}

    models = types.SimpleNamespace(get_model_weights=get_model_weights)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    model = build_model("resnet18,pretrained=1")
    assert asked == ["resnet18"]
    assert torch.equal(model.fc.weight, state["fc.weight"])
