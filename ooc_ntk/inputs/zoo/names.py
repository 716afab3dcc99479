"""Names of models, known without torch: for completion, and to tell a name from a file or an import path."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from ooc_ntk.inputs.options import plain_name

#: Seed of the networks of empirical-ntks and of the one output they end in (Wei et al. 2022, arXiv 2203.06176).
HEAD_SEED: Final = 438

#: Libraries whose models are named ``library:name``.
PREFIXES: Final = ("torchvision", "timm", "hf")


@dataclass(frozen=True)
class ImageNetNetwork:
    """A network of torchvision's, made for ImageNet: three channels, 1,000 classes.

    Attributes:
        alias: its name in empirical-ntks, before ``_init`` and ``_pretrained``.
        head: module that gives the logits.
        url: of torchvision's first weights (``IMAGENET1K_V1``), which ``pretrained=True`` used to mean.
    """

    alias: str
    head: str
    url: str

    @property
    def file(self) -> str:
        """Name of the file of weights, as torch.hub keeps it."""
        return self.url.rpartition("/")[2]


_SITE: Final = "https://download.pytorch.org/models/"

#: The networks made for ImageNet, by torchvision's names.
IMAGENET: Final = {
    "resnet18": ImageNetNetwork("resnet-18", "fc", _SITE + "resnet18-f37072fd.pth"),
    "resnet34": ImageNetNetwork("resnet-34", "fc", _SITE + "resnet34-b627a593.pth"),
    "resnet50": ImageNetNetwork("resnet-50", "fc", _SITE + "resnet50-0676ba61.pth"),
    "resnet101": ImageNetNetwork("resnet-101", "fc", _SITE + "resnet101-63fe2227.pth"),
    "resnext101_32x8d": ImageNetNetwork("resnext-101-32x8d", "fc", _SITE + "resnext101_32x8d-8ba56ff5.pth"),
    "efficientnet_b7": ImageNetNetwork(
        "efficientnet-b7", "classifier.1", _SITE + "efficientnet_b7_lukemelas-c5b4e57e.pth"
    ),
}

#: The other networks, with the module that gives their logits.
SMALL: Final = {"resnet18_cifar": "fc", "mlp": "head", "lenet": "fc3", "vit_tiny": "head"}

#: What an alias stands for: empirical-ntks' names, as text of a model.
ALIASES: Final = {
    f"{network.alias}_{state}": f"{name}{',pretrained=1' if state == 'pretrained' else ''},head=1,seed={HEAD_SEED}"
    for name, network in IMAGENET.items()
    for state in ("init", "pretrained")
}

_PLAIN: Final = {plain_name(name): name for name in (*IMAGENET, *SMALL, *ALIASES)}


def canonical_name(name: str) -> str | None:
    """The name as this package writes it, or None if it is not one of its own.

    >>> canonical_name("ResNet-18"), canonical_name("resnet18_init"), canonical_name("resnet19")
    ('resnet18', 'resnet-18_init', None)
    """
    return _PLAIN.get(plain_name(name)) if re.fullmatch(r"[A-Za-z0-9_\- ]+", name) else None


def is_model_name(text: str) -> bool:
    """Whether a text names a model, rather than a factory in a file or a package; options may follow the name.

    A name of this package takes no colon, so that ``mlp:build`` stays a factory in a module ``mlp``; after
    ``torchvision:``, ``timm:`` and ``hf:`` everything is a name.

    >>> [is_model_name(text) for text in ("resnet18,classes=10", "ResNet-18_init", "timm:vit_tiny_patch16_224")]
    [True, True, True]
    >>> [is_model_name(text) for text in ("nets.cnn:build", "nets.py:build", "mlp:build", "./mlp", "")]
    [False, False, False, False, False]
    """
    head = text.partition(",")[0].strip()
    prefix, colon, name = head.partition(":")
    if colon:
        return prefix in PREFIXES and bool(name)
    return canonical_name(head) is not None


def model_names() -> list[str]:
    """Every name, for completion: networks, aliases, then the prefixes of libraries.

    >>> model_names()[:2], model_names()[-3:]
    (['resnet18', 'resnet34'], ['torchvision:', 'timm:', 'hf:'])
    """
    return [*IMAGENET, *SMALL, *ALIASES, *(f"{prefix}:" for prefix in PREFIXES)]
