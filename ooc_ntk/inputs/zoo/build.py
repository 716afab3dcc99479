"""``build_model``: a network from its name and options, with seeded initial values or weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import Tensor, nn

from ooc_ntk.errors import InputError, unknown_name
from ooc_ntk.inputs.options import NamedSpec, check_keys, parse_named, whole_number
from ooc_ntk.inputs.weights import apply_weights

from . import fitting, resnet, small
from .efficientnet import EfficientNetB7
from .extras import LIBRARIES, build_extra
from .fitting import SampleShape
from .names import ALIASES, HEAD_SEED, IMAGENET, SMALL, canonical_name, model_names
from .pretrained import pretrained_weights
from .seeding import seeded
from .vit import VisionTransformer

#: Images up to this size get the small-image form of ``vit_tiny``: patches of 4 × 4 pixels and 10 classes.
_SMALL_IMAGE: Final = 64
_IMAGENET_CLASSES: Final = 1000
_FEW_CLASSES: Final = 10

#: From (spec, shape of a sample) to a call that makes the network; options are read before anything is drawn.
_Reader = Callable[[NamedSpec, SampleShape | None], Callable[[], nn.Module]]


@dataclass(frozen=True)
class _Network:
    """How one network is built: its own options, the module that gives its logits, and its reader."""

    options: tuple[str, ...]
    head: str
    read: _Reader


def _imagenet(factory: Callable[[int, int], nn.Module], head: str) -> _Network:
    """A network made for ImageNet."""

    def read(spec: NamedSpec, shape: SampleShape | None) -> Callable[[], nn.Module]:
        classes = whole_number(spec, "classes", _IMAGENET_CLASSES)
        channels = fitting.channels(spec, shape, 3, fixed=True)
        return lambda: factory(classes, channels)

    return _Network(("classes", "channels", "pretrained"), head, read)


def _resnet18_cifar(spec: NamedSpec, shape: SampleShape | None) -> Callable[[], nn.Module]:
    """Read the options of ``resnet18_cifar``."""
    classes = whole_number(spec, "classes", _FEW_CLASSES)
    channels = fitting.channels(spec, shape, 3, fixed=False)
    return lambda: resnet.resnet18_cifar(classes, channels)


def _mlp(spec: NamedSpec, shape: SampleShape | None) -> Callable[[], nn.Module]:
    """Read the options of ``mlp``."""
    inputs = fitting.inputs(spec, shape, 784)
    width = whole_number(spec, "width", 512)
    depth = whole_number(spec, "depth", 2, 0, 1000)
    classes = whole_number(spec, "classes", _FEW_CLASSES)
    activation = fitting.one_of(spec, "activation", small.ACTIVATIONS)
    return lambda: small.Mlp(inputs, width, depth, classes, activation)


def _lenet(spec: NamedSpec, shape: SampleShape | None) -> Callable[[], nn.Module]:
    """Read the options of ``lenet``."""
    size = fitting.size(spec, shape, 28)
    if size < small.LENET_SMALLEST:
        raise InputError(
            f"model {str(spec)!r} needs images of {small.LENET_SMALLEST} × {small.LENET_SMALLEST} pixels at least, got "
            f"{size} × {size}; enlarge them, or use mlp"
        )
    channels = fitting.channels(spec, shape, 1, fixed=False)
    classes = whole_number(spec, "classes", _FEW_CLASSES)
    activation = fitting.one_of(spec, "activation", small.ACTIVATIONS)
    pool = fitting.one_of(spec, "pool", small.POOLINGS)
    return lambda: small.LeNet(size, channels, classes, activation, pool)


def _vit_tiny(spec: NamedSpec, shape: SampleShape | None) -> Callable[[], nn.Module]:
    """Read the options of ``vit_tiny``."""
    size = fitting.size(spec, shape, 224)
    few = size <= _SMALL_IMAGE
    patch = whole_number(spec, "patch", 4 if few else 16)
    if size % patch:
        raise InputError(
            f"model {str(spec)!r} cuts images into patches of {patch} × {patch} pixels, and images of {size} × {size} "
            f"pixels are no multiple of that; give another patch=, a divisor of {size}"
        )
    channels = fitting.channels(spec, shape, 3, fixed=False)
    classes = whole_number(spec, "classes", _FEW_CLASSES if few else _IMAGENET_CLASSES)
    return lambda: VisionTransformer(size, patch, channels=channels, classes=classes)


_FACTORIES: Final[dict[str, Callable[[int, int], nn.Module]]] = {
    "resnet18": resnet.resnet18,
    "resnet34": resnet.resnet34,
    "resnet50": resnet.resnet50,
    "resnet101": resnet.resnet101,
    "resnext101_32x8d": resnet.resnext101_32x8d,
    "efficientnet_b7": EfficientNetB7,
}

_NETWORKS: Final = {name: _imagenet(_FACTORIES[name], network.head) for name, network in IMAGENET.items()} | {
    "resnet18_cifar": _Network(("classes", "channels"), SMALL["resnet18_cifar"], _resnet18_cifar),
    "mlp": _Network(("width", "depth", "inputs", "classes", "activation"), SMALL["mlp"], _mlp),
    "lenet": _Network(("size", "channels", "classes", "activation", "pool"), SMALL["lenet"], _lenet),
    "vit_tiny": _Network(("patch", "size", "channels", "classes"), SMALL["vit_tiny"], _vit_tiny),
}


def build_model(
    text: str,
    *,
    weights: Mapping[str, Tensor] | None = None,
    sample_shape: SampleShape | None = None,
    base: Path | None = None,
) -> nn.Module:
    """Build the model that a name with options stands for.

    Args:
        text: the name of a network with options, ``resnet18,classes=10,seed=3``; one of the names of empirical-ntks,
            such as ``resnet-18_init``; or ``torchvision:``, ``timm:`` or ``hf:`` and a name there. Every network of
            this package takes ``classes``; ``seed`` (0, or 438 with ``head``); ``head=1``, which replaces the last
            layer by one with a single output, drawn after the whole network from the same stream, as empirical-ntks
            does; and ``head_seed``, which draws that layer from a seed of its own. The networks for ImageNet take
            ``pretrained=1``; the others what their shapes need.
        weights: tensors by name to put into the model; with ``head=1`` the layer that is replaced must be among them,
            or the new one with its single output.
        sample_shape: of one sample without the batch axis; fills in the sizes that the text leaves open
            (of the networks of this package; models of libraries are built as the text says).
        base: folder that a relative path after ``hf:`` is relative to; None is the current one.

    Returns:
        The model, in eval mode, on the CPU. The state of torch's random numbers is what it was before.

    Raises:
        InputError: for a name or an option that is not known or wrong, options that do not fit the samples, weights
            that do not belong to the model, or a library or weights that are missing.
    """
    if text.partition(":")[0].strip() == "hf":
        from ooc_ntk.inputs.text.models import build_text_model  # needed for these names alone

        return build_text_model(text, weights=weights, base=base).eval()
    spec = parse_named(text, "model")
    if spec.name in LIBRARIES:
        return build_extra(spec, weights).eval()
    name = canonical_name(spec.name)
    if name is None:
        raise unknown_name("model", spec.name, model_names())
    if spec.part:
        raise InputError(
            f"model {text!r} has ':{spec.part}' after the name {name}, which takes none; write options after a comma, "
            f"for example {name},classes=10"
        )
    if name in ALIASES:
        if spec.options:
            raise InputError(
                f"model {text!r}: {name} is fixed and takes no options; it stands for {ALIASES[name]}, so write that "
                "and change it"
            )
        spec = parse_named(ALIASES[name], "model")
        name = spec.name
    return _build(_NETWORKS[name], spec, name, weights, sample_shape).eval()


def _build(
    network: _Network, spec: NamedSpec, name: str, weights: Mapping[str, Tensor] | None, shape: SampleShape | None
) -> nn.Module:
    """Build a network of this package: construct, draw the head, load; the order of the draws decides the bits."""
    check_keys(spec, (*network.options, "seed", "head", "head_seed"), "model")
    make = network.read(spec, shape)
    head = whole_number(spec, "head", 0, 0, 1)
    seed = whole_number(spec, "seed", HEAD_SEED if head else 0, 0)
    if not head and "head_seed" in dict(spec.options):
        raise InputError(f"model {str(spec)!r} gives head_seed without head=1; add head=1, or drop head_seed")
    head_seed = whole_number(spec, "head_seed", 0, 0) if "head_seed" in dict(spec.options) else None
    pretrained = whole_number(spec, "pretrained", 0, 0, 1)
    if weights is None and pretrained:
        weights = pretrained_weights(name)
    with seeded(seed):
        model = make()
        last = _scalar_head(model, network.head, head_seed) if head else None
    early = last is not None and weights is not None and _outputs(weights, network.head) == 1
    if last is not None and early:
        model.set_submodule(network.head, last)
    if weights is not None:
        apply_weights(model, weights)
    if last is not None and not early:
        model.set_submodule(network.head, last)
    return model


def _scalar_head(model: nn.Module, head: str, seed: int | None) -> nn.Linear:
    """Draw a last layer with one output from the stream as it stands, or from a seed of its own."""
    width = model.get_submodule(head).in_features
    assert isinstance(width, int)
    if seed is None:
        return nn.Linear(width, 1)
    with seeded(seed):
        return nn.Linear(width, 1)


def _outputs(weights: Mapping[str, Tensor], head: str) -> int | None:
    """Outputs of the last layer in a state dict, or None if it has none such."""
    weight = weights.get(f"{head}.weight")
    return None if weight is None or weight.dim() != 2 else len(weight)
