"""The networks for ImageNet beside torchvision 0.29.1 (torch 2.13.0): what is recorded here was computed with it."""

import hashlib
from dataclasses import dataclass

import pytest
import torch

from ooc_ntk.inputs.zoo import efficientnet, resnet
from ooc_ntk.inputs.zoo.build import build_model

pytestmark = pytest.mark.usefixtures("one_thread")

FACTORIES = {
    "resnet18": resnet.resnet18,
    "resnet34": resnet.resnet34,
    "resnet50": resnet.resnet50,
    "resnet101": resnet.resnet101,
    "resnext101_32x8d": resnet.resnext101_32x8d,
    "efficientnet_b7": efficientnet.EfficientNetB7,
}


@dataclass(frozen=True)
class Truth:
    """What torchvision gives after ``torch.manual_seed(438)``.

    Attributes:
        parameters: number of them.
        layout: first half of the SHA-256 of one line ``name shape dtype`` for each entry of the state dict, in order.
        bits: the same of the bytes of all parameters, where torch's vectorised normal numbers are used.
        total: sum of all parameters, in float64.
        head: the same digest of weight and bias of ``nn.Linear(width, 1)``, drawn after the network.
        head_values: its first two weights and its bias.
        logits: the first three for one image, ``linspace(-1, 1)`` as (1, 3, 64, 64), in eval mode and float64.
    """

    parameters: int
    layout: str
    bits: str
    total: float
    head: str
    head_values: tuple[float, float, float]
    logits: tuple[float, float, float]


TORCHVISION = {
    "resnet18": Truth(
        11_689_512,
        "83bdb4312863bd2151a34e026dbb9e23",
        "339a115aec50003605c8f9c34129a84f",
        4756.554,
        "4fb3143d489835090a202b05a7483de7",
        (-0.008689842, 0.031382132, 0.001247652),
        (0.04326223630779227, -0.05300831599373933, -0.022799509936920787),
    ),
    "resnet34": Truth(
        21_797_672,
        "1525cbc40f69e662a7a84201e2e0f17d",
        "b7e55f6e7ecb7d072fa2a48cb524adf1",
        8657.265,
        "9c39cc04be29199fbf6923a76e9d9699",
        (-0.013555222, 0.007892087, -0.019537278),
        (0.23952557738573843, 1.7456658211141036, 2.3417592052102987),
    ),
    "resnet50": Truth(
        25_557_032,
        "5d60825a9441af04821edf49e2fc0047",
        "005fbf18876133f01529b8d1704f40ea",
        26615.445,
        "21fe673fb2a3f0c4ecabe4c847d74140",
        (0.008716361, -0.012223165, 0.018240349),
        (-2.145655451433057, 2.0692389038334853, -1.3592246039476992),
    ),
    "resnet101": Truth(
        44_549_160,
        "e41584d3aa048b4a18d1e413801c1edf",
        "482a22435f544950ca9bf3dd23d5dbe4",
        52091.429,
        "01113519948e1a09e302f257a4549ce3",
        (0.020256262, 0.002449240, -0.013690263),
        (202.65355022902554, -84.38819301415356, 149.21148997153944),
    ),
    "resnext101_32x8d": Truth(
        88_791_336,
        "555c9e6822ebca57ab4a14986dae9b5f",
        "0baada7e72347b7add5b2ed3737ce6ec",
        101500.784,
        "286cb75d07e961c9ff77699662a46ca1",
        (-0.015503271, 0.008444300, -0.015980905),
        (0.019094490036665277, 0.005939310046040199, 0.005942781001982761),
    ),
    "efficientnet_b7": Truth(
        66_347_960,
        "da37560756466e954b86af294b9b26e4",
        "9de4f673e9467912c20d646534b3a0ad",
        155576.012,
        "f09d1334176dc84fb0987806c128b5be",
        (0.014893529, -0.019734288, 0.015073072),
        (-5.576667955653567e-16, -1.8520760318691892e-16, 2.370668499489378e-16),
    ),
}

#: Without these instructions torch draws by other formulas: the same numbers, other last bits.
VECTORISED = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def digest(pieces):
    made = hashlib.sha256()
    for piece in pieces:
        made.update(piece)
    return made.hexdigest()[:32]


def parameter_bits(module):
    return digest(parameter.detach().numpy().tobytes() for parameter in module.parameters())


@pytest.mark.parametrize("name", TORCHVISION)
def test_names_shapes_and_order_are_those_of_torchvision(name):
    with torch.device("meta"):
        model = FACTORIES[name]()
    assert sum(parameter.numel() for parameter in model.parameters()) == TORCHVISION[name].parameters
    lines = (f"{key} {tuple(value.shape)} {value.dtype}\n" for key, value in model.state_dict().items())
    assert digest(line.encode() for line in lines) == TORCHVISION[name].layout


@pytest.mark.parametrize("name", TORCHVISION)
def test_a_seed_gives_the_values_and_logits_of_torchvision(name):
    truth = TORCHVISION[name]
    model = build_model(f"{name},seed=438")
    total = sum(parameter.detach().double().sum().item() for parameter in model.parameters())
    assert total == pytest.approx(truth.total, rel=1e-5)
    if not VECTORISED:
        pytest.skip("bits were recorded with AVX2, which this processor or build of torch lacks")
    assert parameter_bits(model) == truth.bits
    image = torch.linspace(-1, 1, 3 * 64 * 64, dtype=torch.float64).reshape(1, 3, 64, 64)
    with torch.no_grad():
        logits = model.double()(image)
    assert logits.shape == (1, 1000)
    assert logits[0, :3].tolist() == pytest.approx(truth.logits, rel=1e-8, abs=0)


@pytest.mark.parametrize("name", TORCHVISION)
def test_the_single_output_is_drawn_after_the_whole_network(name):
    model = build_model(f"{name},head=1")
    head = model.classifier[1] if name == "efficientnet_b7" else model.fc
    assert head.weight.shape == (1, head.in_features)
    values = [*head.weight[0, :2].tolist(), head.bias.item()]
    assert values == pytest.approx(TORCHVISION[name].head_values, abs=3e-8)
    assert parameter_bits(head) == TORCHVISION[name].head or not VECTORISED
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 1)


def test_the_cifar_network_differs_from_resnet18_in_its_first_convolution_and_its_classes_alone():
    with torch.device("meta"):
        ours, plain = resnet.resnet18_cifar(), resnet.resnet18(classes=10)
    assert sum(parameter.numel() for parameter in ours.parameters()) == 11_173_962
    ours_shapes, plain_shapes = (
        {key: tuple(value.shape) for key, value in model.state_dict().items()} for model in (ours, plain)
    )
    assert list(ours_shapes) == list(plain_shapes)
    assert [key for key in ours_shapes if ours_shapes[key] != plain_shapes[key]] == ["conv1.weight"]
    assert ours_shapes["conv1.weight"] == (64, 3, 3, 3)
    sizes = {}
    for name in ("conv1", "maxpool", "layer4"):
        ours.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: sizes.update({name: out.shape[-1]})
        )
    ours.eval()(torch.empty(1, 3, 32, 32, device="meta"))
    assert sizes == {"conv1": 32, "maxpool": 16, "layer4": 2}


def test_batch_norms_of_efficientnet_have_the_constants_of_its_weights():
    with torch.device("meta"):
        model = efficientnet.EfficientNetB7()
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 1e-2)}
    assert model.classifier[0].p == 0.5


def test_stochastic_depth_drops_whole_samples_in_training_alone():
    layer = efficientnet.StochasticDepth(0.25)
    x = torch.ones(4000, 2, 1, 1)
    assert layer.eval()(x) is x
    out = layer.train()(x).flatten(1)
    assert torch.equal(out[:, 0], out[:, 1])
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert out.mean().item() == pytest.approx(1, abs=0.03)
    with torch.device("meta"):
        drops = [
            module.probability
            for module in efficientnet.EfficientNetB7().modules()
            if isinstance(module, efficientnet.StochasticDepth)
        ]
    assert len(drops) == 55
    assert drops == pytest.approx([0.2 * index / 55 for index in range(55)])
