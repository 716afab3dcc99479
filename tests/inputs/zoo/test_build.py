import pytest
import torch

from ooc_ntk.errors import InputError
from ooc_ntk.inputs.weights import load_weights, save_weights
from ooc_ntk.inputs.zoo import resnet
from ooc_ntk.inputs.zoo.build import build_model
from ooc_ntk.inputs.zoo.names import ALIASES, IMAGENET, SMALL, canonical_name, is_model_name, model_names
from ooc_ntk.inputs.zoo.seeding import seeded
from ooc_ntk.inputs.zoo.small import Mlp

pytestmark = pytest.mark.usefixtures("one_thread")


def same(first, second, *, but=()):
    """Whether two models have the same values under the same names."""
    ours, theirs = first.state_dict(), second.state_dict()
    assert list(ours) == list(theirs)
    return all(torch.equal(ours[key], theirs[key]) for key in ours if not key.startswith(tuple(but) or "/"))


@pytest.fixture(scope="module")
def resnet18_1000():
    """Weights as a file of torchvision has them, of other values than a seed gives."""
    return {key: value.clone() for key, value in build_model("resnet18,seed=99").state_dict().items()}


# --- names and options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["resnet18,classes=7", "ResNet-18,classes=7", "RESNET18 , classes = 7"])
def test_names_are_read_without_regard_to_case_and_dashes(text):
    assert same(build_model(text), build_model("resnet18,classes=7,seed=0"))


def test_seeds_are_kept_apart_and_random_numbers_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (build_model(f"mlp,seed={seed}") for seed in (1, 1, 2))
    with pytest.raises(InputError):
        build_model("resnet18,head=1", weights={"fc.weight": torch.zeros(1, 512)})
    assert torch.equal(torch.rand(3), expected)
    assert same(first, again)
    assert not same(first, other)
    torch.manual_seed(1)
    assert same(first, Mlp(784, 512, 2, 10))


def test_the_state_is_restored_when_construction_fails_and_the_default_device_is_overridden():
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError), seeded(3):
        torch.rand(10) @ torch.rand(11)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.device("meta"):
        assert next(build_model("mlp").parameters()).device.type == "cpu"


@pytest.mark.parametrize("name", [*IMAGENET, *SMALL])
def test_every_network_is_built_in_eval_mode_and_runs(name):
    shape = (1, 28, 28) if name in ("lenet", "mlp") else (3, 32, 32)
    model = build_model(name, sample_shape=shape)
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        logits = model(torch.randn(1, *shape))
    assert logits.shape == (1, 1000 if name in IMAGENET else 10)
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("text", "shape", "layer", "expected"),
    [
        ("resnet18", (3, 64, 64), "conv1", (64, 3, 7, 7)),
        ("resnet18,channels=1", (1, 28, 28), "conv1", (64, 1, 7, 7)),
        ("resnet18_cifar", (1, 28, 28), "conv1", (64, 1, 3, 3)),
        ("mlp,width=4", (1, 8, 8), "fc1", (4, 64)),
        ("mlp,width=4", (5,), "fc1", (4, 5)),
        ("mlp,width=4", None, "fc1", (4, 784)),
        ("lenet", (3, 32, 32), "conv1", (6, 3, 5, 5)),
        ("lenet,size=20", None, "fc1", (120, 144)),
        ("vit_tiny", (1, 28, 28), "patch_embed.proj", (192, 1, 4, 4)),
        ("vit_tiny", (3, 64, 64), "head", (10, 192)),
        ("vit_tiny", (3, 96, 96), "patch_embed.proj", (192, 3, 16, 16)),
        ("vit_tiny", None, "head", (1000, 192)),
        ("vit_tiny,patch=4,size=32,channels=3,classes=10", (3, 32, 32), "head", (10, 192)),
        ("vit_tiny,patch=7", (1, 28, 28), "patch_embed.proj", (192, 1, 7, 7)),
    ],
)
def test_samples_fill_in_what_the_text_leaves_open(text, shape, layer, expected):
    model = build_model(text, sample_shape=shape)
    assert tuple(model.get_submodule(layer).weight.shape) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resnet81", "unknown model 'resnet81'; did you mean 'resnet18'"),
        ("resnet18,clases=3", "unknown option of model 'resnet18' 'clases'; did you mean 'classes'"),
        ("resnet18,size=3", "unknown option of model 'resnet18' 'size'"),
        ("mlp,pretrained=1", "unknown option of model 'mlp' 'pretrained'"),
        ("resnet18:big", "':big' after the name resnet18, which takes none"),
        ("resnet18,classes=0", "classes of 'resnet18,classes=0' must be from 1"),
        ("resnet18,classes=ten", "must be a whole number, got 'ten'"),
        ("resnet18,seed=-1", "seed of 'resnet18,seed=-1' must be from 0"),
        ("resnet18,head=2", "head of 'resnet18,head=2' must be from 0 to 1, got 2"),
        ("resnet18,head_seed=2", "head_seed without head=1"),
        ("resnet-18_init,seed=3", "takes no options; it stands for resnet18,head=1,seed=438"),
        ("mlp,activation=rleu", "unknown value of option activation of model mlp: 'rleu'; did you mean 'relu'"),
        ("lenet,pool=min", "unknown value of option pool of model lenet: 'min'"),
        ("lenet,size=11", "images of 12 × 12 pixels at least, got 11 × 11"),
        ("vit_tiny,size=30", "patches of 4 × 4 pixels, and images of 30 × 30"),
        ("vit_tiny,size=8,patch=16", "patches of 16 × 16 pixels, and images of 8 × 8"),
    ],
)
def test_bad_texts_are_refused_with_a_reason(text, message):
    with pytest.raises(InputError, match=message):
        build_model(text)


@pytest.mark.parametrize(
    ("text", "shape", "message"),
    [
        (
            "resnet18",
            (1, 28, 28),
            r"3 channels.*shape \(1, 28, 28\); add channels=3 to the data.*or channels=1 to the mod",
        ),
        ("resnet-18_init", (1, 28, 28), r"3 channels.*shape \(1, 28, 28\); add channels=3 to the data"),
        ("efficientnet_b7", (2, 8, 8), r"shape \(2, 8, 8\); add channels=2 to the model"),
        ("resnet18,channels=1", (3, 8, 8), r"channels=1 of model.*shape \(3, 8, 8\) have channels=3"),
        ("resnet18", (784,), r"\(channels, height, width\), and the samples have shape \(784,\)"),
        ("resnet18_cifar", (28, 28), r"\(channels, height, width\), and the samples have shape \(28, 28\)"),
        ("lenet", (1, 28, 30), r"square images, and the samples have shape \(1, 28, 30\)"),
        ("vit_tiny", (3, 32, 16), r"square images, and the samples have shape \(3, 32, 16\)"),
        ("lenet", (1, 8, 8), "images of 12 × 12 pixels at least, got 8 × 8"),
        ("vit_tiny,size=32", (3, 64, 64), r"size=32 of model.*have size=64"),
        ("vit_tiny,channels=1", (3, 64, 64), r"channels=1 of model.*have channels=3"),
        ("mlp,inputs=784", (3, 8, 8), r"inputs=784 of model.*shape \(3, 8, 8\) have inputs=192"),
        ("mlp", (3, 0), r"without values, of shape \(3, 0\)"),
    ],
)
def test_samples_that_do_not_fit_are_refused_with_a_reason(text, shape, message):
    with pytest.raises(InputError, match=message):
        build_model(text, sample_shape=shape)


# --- heads and aliases -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alias", [alias for alias in ALIASES if alias.endswith("_init")][:3])
def test_aliases_are_the_construction_of_empirical_ntks(alias):
    torch.manual_seed(438)
    model = getattr(resnet, alias.removesuffix("_init").replace("-", ""))()
    model.fc = torch.nn.Linear(model.fc.in_features, 1)
    assert same(build_model(alias), model)
    assert same(build_model(alias.upper().replace("_", " ")), model)


def test_a_head_is_put_on_every_network():
    for name in SMALL:
        model = build_model(f"{name},head=1")
        assert model.get_submodule(SMALL[name]).out_features == 1
        assert same(build_model(f"{name},seed=438,head=1"), model)
    assert same(build_model("mlp,seed=438"), build_model("mlp"), but=["fc", "head"])


def test_a_seed_of_its_own_changes_the_head_alone():
    first, second = build_model("mlp,head=1,head_seed=1"), build_model("mlp,head=1,head_seed=2")
    assert same(first, second, but=["head"])
    assert not same(first, second)
    torch.manual_seed(1)
    assert torch.equal(first.head.weight, torch.nn.Linear(512, 1).weight)


# --- weights ---------------------------------------------------------------------------------------------------------


def test_weights_survive_a_file(tmp_path):
    made = build_model("lenet,seed=4")
    save_weights(made, tmp_path / "w.safetensors")
    weights = load_weights(tmp_path / "w.safetensors")
    assert same(build_model("lenet", weights=weights), made)
    with pytest.raises(InputError, match=r"of another shape: fc3.weight \(10, 84\), model has \(5, 84\)"):
        build_model("lenet,classes=5", weights=weights)
    with pytest.raises(InputError, match=r"missing: fc1.weight.*unexpected: conv1.weight"):
        build_model("mlp", weights={key: weights[key] for key in ("conv1.weight", "fc2.weight")})


def test_weights_of_1000_classes_are_not_put_into_10(resnet18_1000):
    with pytest.raises(InputError, match=r"fc.weight \(1000, 512\), model has \(10, 512\), fc.bias"):
        build_model("resnet18,classes=10", weights=resnet18_1000)


@pytest.mark.parametrize("text", ["resnet18,head=1", "resnet-18_init", "resnet-18_pretrained"])
def test_with_a_head_weights_are_loaded_before_the_last_layer_is_replaced(resnet18_1000, text):
    model = build_model(text, weights=resnet18_1000)
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in resnet18_1000.items() if not key.startswith("fc."))
    assert same(build_model("resnet18,head=1").fc, model.fc)


def test_weights_of_a_single_output_are_loaded_into_it(resnet18_1000):
    weights = {**resnet18_1000, "fc.weight": torch.full((1, 512), 0.5), "fc.bias": torch.ones(1)}
    state = build_model("resnet18,head=1", weights=weights).state_dict()
    assert all(torch.equal(state[key], value) for key, value in weights.items())
    with pytest.raises(InputError, match=r"fc.weight \(3, 512\), model has \(1000, 512\)"):
        build_model("resnet18,head=1", weights={**weights, "fc.weight": torch.zeros(3, 512), "fc.bias": torch.zeros(3)})
    three = {**weights, "fc.weight": torch.zeros(3, 512), "fc.bias": torch.zeros(3)}
    assert build_model("resnet18,classes=3,head=1", weights=three).fc.out_features == 1


# --- names without torch ---------------------------------------------------------------------------------------------


def test_every_name_is_a_name():
    for name in model_names():
        assert is_model_name(name if not name.endswith(":") else f"{name}x,classes=3")
    assert {canonical_name(name.upper()) for name in ALIASES} == set(ALIASES)
    for text in ("pkg.module:factory", "file.py:factory", "mlp:build", "lenet.py:build", "./mlp", "hf:", "", ",a=1"):
        assert not is_model_name(text)
