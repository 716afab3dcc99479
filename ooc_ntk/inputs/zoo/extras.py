"""Models of torchvision and timm by their own names: ``torchvision:NAME,...`` and ``timm:NAME,...``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Final

from torch import Tensor, nn

from ooc_ntk.errors import InputError
from ooc_ntk.extras import require
from ooc_ntk.inputs.options import NamedSpec, check_keys, whole_number
from ooc_ntk.inputs.weights import apply_weights

from .seeding import seeded

#: Libraries whose models have names of their own.
LIBRARIES: Final = ("torchvision", "timm")

_SUGGESTED: Final = 5  # near names shown: these libraries have hundreds


def build_extra(spec: NamedSpec, weights: Mapping[str, Tensor] | None) -> nn.Module:
    """Build a model of a library.

    Args:
        spec: ``torchvision:NAME`` with the options ``weights`` (``none``, ``DEFAULT`` or a name of a set of weights),
            ``classes`` and ``seed``; or ``timm:NAME`` with ``pretrained``, ``classes`` and ``seed``. ``classes`` is
            left to the library if it is not given, ``seed`` is 0.
        weights: tensors by name to put into it, or None.

    Returns:
        The model, on the CPU.

    Raises:
        InputError: if the library is missing or broken, has no such model, cannot build it, or the weights do not
            belong to it or are asked for twice.
    """
    build = {"torchvision": _torchvision, "timm": _timm}[spec.name]
    own = {"torchvision": "weights", "timm": "pretrained"}[spec.name]
    check_keys(spec, (own, "classes", "seed"), "model")
    if not spec.part:
        raise InputError(f"model {str(spec)!r} names no model of {spec.name}; write for example {spec.name}:resnet18")
    asked = dict(spec.options).get(own, "").lower() not in ("", "none", "0")
    if weights is not None and asked:
        raise InputError(
            f"model {str(spec)!r} asks for weights of {spec.name}, and a file of weights is given too; drop "
            f"{own}={dict(spec.options)[own]} or the file"
        )
    with seeded(whole_number(spec, "seed", 0, 0)):
        model = build(spec)
    if weights is not None:
        apply_weights(model, weights)
    return model


def _torchvision(spec: NamedSpec) -> nn.Module:
    """Build a model of torchvision."""
    models = _library(spec.name, "torchvision.models")
    names = list(models.list_models())
    if spec.part not in names:
        raise _unknown(spec, "model", spec.part, names)
    chosen = dict(spec.options).get("weights", "none")
    arguments: dict[str, object] = {"weights": None}
    if chosen.lower() != "none":
        sets = models.get_model_weights(spec.part)
        if chosen not in sets.__members__:
            raise _unknown(spec, "weights", chosen, ["none", *sets.__members__])
        arguments["weights"] = sets[chosen]
    if "classes" in dict(spec.options):
        arguments["num_classes"] = whole_number(spec, "classes", 1)
    return _called(spec, models.get_model, arguments)


def _timm(spec: NamedSpec) -> nn.Module:
    """Build a model of timm."""
    timm = _library(spec.name, "timm")
    if not spec.part.startswith(("hf_hub:", "hf-hub:")) and not timm.is_model(spec.part):
        raise _unknown(spec, "model", spec.part, timm.list_models())
    arguments: dict[str, object] = {"pretrained": bool(whole_number(spec, "pretrained", 0, 0, 1))}
    if "classes" in dict(spec.options):
        arguments["num_classes"] = whole_number(spec, "classes", 1)
    return _called(spec, timm.create_model, arguments)


def _library(name: str, module: str) -> ModuleType:
    """Import a library when it is needed; an installation that is broken raises other errors than a missing one."""
    return require(module, f"a model {name}:...", "install releases of torch and torchvision that belong together")


def _called(spec: NamedSpec, factory: object, arguments: Mapping[str, object]) -> nn.Module:
    """Call a library's factory; whatever it raises becomes an error that names the spec."""
    try:
        model = factory(spec.part, **arguments)  # type: ignore[operator]
    except Exception as error:
        raise InputError(
            f"{spec.name} cannot build {str(spec)!r}: {type(error).__name__}: {error}; change the options, or build it "
            "in a function of your own and name that, file.py:function"
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{spec.name} gave a {type(model).__name__} for {str(spec)!r}, not a torch.nn.Module")
    return model


def _unknown(spec: NamedSpec, what: str, got: str, known: Iterable[str]) -> InputError:
    """The error for a name that a library does not know, with near names only."""
    names = list(known)
    near = difflib.get_close_matches(got, names, n=_SUGGESTED, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"it knows {len(names)}, for example {', '.join(names[:3])}"
    return InputError(f"{spec.name} has no {what} {got!r} for {str(spec)!r}; {hint}")
