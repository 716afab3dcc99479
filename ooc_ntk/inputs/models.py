"""Models from specs: a name such as ``resnet18``, or ``file.py:factory``, with weights from a file."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ooc_ntk.errors import InputError, unknown_name

from .callables import absolute_callable, call_factory, is_callable_spec
from .weights import apply_weights, load_weights, save_weights
from .zoo.names import is_model_name, model_names

__all__ = ["absolute_model", "apply_weights", "is_model_name", "load_model", "load_weights", "save_weights"]


def absolute_model(spec: str, base: Path | None = None) -> str:
    """Write a model spec so that it means the same from any folder, without loading anything.

    Args:
        spec: a model's name with options, or a callable spec.
        base: folder that relative paths are relative to; None is the current one.

    Returns:
        The spec with absolute paths; names and import paths stay as they are.

    Raises:
        InputError: if the text is neither.
    """
    if spec.partition(":")[0].strip() == "hf":
        from .text.models import absolute_text_model  # needed for these names alone

        return absolute_text_model(spec, base)
    if is_model_name(spec):
        return spec.strip()
    name = spec.partition(",")[0].strip()
    if ":" not in name and not is_callable_spec(spec) and "/" not in name and not name.endswith(".py"):
        raise unknown_name("model", name, [*model_names(), "file.py:function", "package.module:function"])
    return absolute_callable(spec, base, "model")


def load_model(
    spec: str,
    *,
    weights: Path | str | None = None,
    base: Path | None = None,
    sample_shape: tuple[int, ...] | None = None,
) -> nn.Module:
    """Build the model that a spec names.

    Args:
        spec: a name with options, such as ``resnet18,classes=10`` (see :func:`ooc_ntk.inputs.zoo.build.build_model`);
            or ``pkg.module:factory`` or ``path/file.py:factory``, a callable without arguments that returns a module,
            or a module itself.
        weights: file with the weights to put into it; None keeps those that it was built with.
        base: folder that relative paths are relative to; None is the current one.
        sample_shape: of one sample without the batch axis, for what a name leaves open.

    Returns:
        The module, in eval mode, on the device where the factory left it.

    Raises:
        InputError: if the spec, the user's code or the weights are wrong, or no module comes out.
    """
    state = None
    if weights is not None:
        state = load_weights(Path.cwd() / (base or ".") / Path(weights).expanduser())
    if is_model_name(spec):
        from .zoo.build import build_model  # needed for names alone

        return build_model(spec, weights=state, sample_shape=sample_shape, base=base)
    model = call_factory(spec, base, "model")
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model {spec!r} gave a {type(model).__name__}, not a torch.nn.Module; name a function that returns one"
        )
    if state is not None:
        apply_weights(model, state)
    return model.eval()
