"""Calling the layer rules that users register for modules of their own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ooc_ntk.errors import InputError

from .jacobian import ModelFunction
from .rules.table import module_rule


class _ModuleCall(nn.Module):
    """Calls a user's rule with the module's parameters replaced."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: tuple[Tensor, ...], gradient: Tensor) -> Mapping[str, Tensor]:
        rule = module_rule(self.layer)
        assert rule is not None
        return rule(self.layer, inputs, gradient)


def whose_rule(function: ModelFunction, name: str) -> str:
    """A user's rule in words: the module's name and class."""
    return f"the layer rule of {name or 'the model'!r} ({type(function.module.get_submodule(name)).__name__})"


def user_gradients(
    function: ModelFunction, name: str, inputs: tuple[Tensor, ...], gradient: Tensor
) -> Mapping[str, Tensor]:
    """What a user's rule says of a module's parameters.

    Args:
        function: model and chosen parameters.
        name: name of the module.
        inputs: its positional inputs, each (samples, ...).
        gradient: gradient of its output for one Jacobian row of every sample, (samples, ...).

    Returns:
        Gradients by the parameters' names within the module, as the rule gave them: their shapes are not checked.

    Raises:
        InputError: if it fails or returns no mapping.
    """
    module = function.module.get_submodule(name)
    prefix = f"{name}." if name else ""
    state = {**function.parameters, **function.buffers}
    own = {f"layer.{key[len(prefix) :]}": value for key, value in state.items() if key.startswith(prefix)}
    try:
        with torch.no_grad():
            found = functional_call(_ModuleCall(module), own, (inputs, gradient))
    except Exception as error:
        raise InputError(f"{whose_rule(function, name)} failed ({type(error).__name__}: {error})") from error
    if not isinstance(found, Mapping):
        raise InputError(
            f"{whose_rule(function, name)} must return a dict from parameter names to gradients, "
            f"got {type(found).__name__}"
        )
    return found
