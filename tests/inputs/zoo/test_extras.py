"""torchvision and timm are stood in for: what is tested is what they are asked, and what is made of their answers."""

import enum
import sys
import types

import pytest
import torch
from torch import nn

from ooc_ntk.errors import InputError
from ooc_ntk.inputs.zoo.build import build_model


class Sets(enum.Enum):
    IMAGENET1K_V1 = 1
    IMAGENET1K_V2 = 2
    DEFAULT = 2


@pytest.fixture
def calls(monkeypatch):
    """Both libraries, with one model each that draws from the global stream; what they were called with."""
    made = []

    def create(name, num_classes=1000, **arguments):
        made.append((name, num_classes, arguments))
        if name == "broken":
            raise ValueError("no such size")
        return nn.Sequential(nn.Linear(4, num_classes), nn.Dropout())

    vision = types.ModuleType("torchvision")
    vision.models = types.ModuleType("torchvision.models")
    vision.models.list_models = lambda: ["resnet18", "resnet152", "broken"]
    vision.models.get_model = create
    vision.models.get_model_weights = lambda name: Sets
    timm = types.ModuleType("timm")
    timm.is_model = lambda name: name in ("resnet18", "resnet18.a1_in1k")
    timm.list_models = lambda: ["resnet18", "vit_tiny_patch16_224"]
    timm.create_model = create
    for name, module in (("torchvision", vision), ("torchvision.models", vision.models), ("timm", timm)):
        monkeypatch.setitem(sys.modules, name, module)
    return made


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("torchvision:resnet152", ("resnet152", 1000, {"weights": None})),
        ("torchvision:resnet152,weights=none,classes=3", ("resnet152", 3, {"weights": None})),
        ("torchvision:resnet152,weights=DEFAULT", ("resnet152", 1000, {"weights": Sets.DEFAULT})),
        ("torchvision:resnet152,weights=IMAGENET1K_V1", ("resnet152", 1000, {"weights": Sets.IMAGENET1K_V1})),
        ("timm:resnet18", ("resnet18", 1000, {"pretrained": False})),
        ("timm:resnet18.a1_in1k,pretrained,classes=2", ("resnet18.a1_in1k", 2, {"pretrained": True})),
        ("timm:hf_hub:someone/some-model", ("hf_hub:someone/some-model", 1000, {"pretrained": False})),
    ],
)
def test_libraries_are_asked_for_what_the_text_says(calls, text, call):
    model = build_model(text)
    assert calls == [call]
    assert not any(module.training for module in model.modules())


def test_seeds_and_weights_work_as_for_the_own_networks(calls):
    before = torch.get_rng_state()
    first, second = build_model("timm:resnet18,seed=3"), build_model("torchvision:resnet18,seed=3")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first[0].weight, second[0].weight)
    torch.manual_seed(3)
    assert torch.equal(first[0].weight, nn.Linear(4, 1000).weight)
    loaded = build_model("torchvision:resnet18", weights=first.state_dict())
    assert torch.equal(loaded[0].weight, first[0].weight)
    with pytest.raises(InputError, match=r"0.weight \(1000, 4\), model has \(2, 4\)"):
        build_model("timm:resnet18,classes=2", weights=first.state_dict())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("torchvision:resnet81", "torchvision has no model 'resnet81'.*did you mean resnet18, resnet152"),
        ("torchvision:zzz", "it knows 3, for example resnet18"),
        ("timm:vit_tiny_patch16_223", "timm has no model 'vit_tiny_patch16_223'.*did you mean vit_tiny_patch16_224"),
        ("torchvision:resnet18,weights=IMAGENET1K_V3", "no weights 'IMAGENET1K_V3'.*did you mean IMAGENET1K_V"),
        ("torchvision:resnet18,pretrained=1", "unknown option of model 'torchvision' 'pretrained'"),
        ("timm:resnet18,weights=DEFAULT", "unknown option of model 'timm' 'weights'"),
        ("timm:resnet18,pretrained=2", "pretrained of .* must be from 0 to 1"),
        ("torchvision:broken", "torchvision cannot build 'torchvision:broken': ValueError: no such size"),
        ("timm:", "names no model of timm"),
    ],
)
def test_bad_texts_are_refused_with_a_reason(calls, text, message):
    with pytest.raises(InputError, match=message):
        build_model(text)


@pytest.mark.parametrize("text", ["torchvision:resnet18,weights=DEFAULT", "timm:resnet18,pretrained=1"])
def test_two_sources_of_weights_are_refused(calls, text):
    with pytest.raises(InputError, match="a file of weights is given too; drop"):
        build_model(text, weights={})


@pytest.mark.parametrize(("name", "extra"), [("torchvision", "vision"), ("timm", "timm")])
def test_missing_and_broken_libraries_name_the_extra(monkeypatch, name, extra):
    def fails(error):
        def importing(module):
            raise error

        return importing

    def refused(error):
        with monkeypatch.context() as patch:
            patch.setattr("importlib.import_module", fails(error))
            with pytest.raises(InputError, match=rf"needs {name}.*'ooc-ntk\[{extra}\]'") as raised:
                build_model(f"{name}:resnet18")
        return str(raised.value)

    assert "is not installed" in refused(ModuleNotFoundError(f"No module named {name!r}", name=name))
    broken = refused(RuntimeError("operator torchvision::nms does not exist"))
    assert "cannot be imported here (RuntimeError: operator torchvision::nms does not exist)" in broken
    assert "cannot be imported here" in refused(ModuleNotFoundError("No module named 'yaml'", name="yaml"))


def test_models_of_texts_are_handed_on(monkeypatch, tmp_path):
    module = types.ModuleType("ooc_ntk.inputs.text.models")
    asked = []
    module.build_text_model = lambda text, **rest: asked.append((text, rest)) or nn.Sequential(nn.Dropout()).train()
    monkeypatch.setitem(sys.modules, "ooc_ntk.inputs.text.models", module)
    monkeypatch.setitem(sys.modules, "ooc_ntk.inputs.text", types.ModuleType("ooc_ntk.inputs.text"))
    assert not build_model("hf:some/folder,seed=3", base=tmp_path)[0].training
    assert asked == [("hf:some/folder,seed=3", {"weights": None, "base": tmp_path})]
