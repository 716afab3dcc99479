"""Rules by module class: those that users and plugins register for modules of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor, nn

from ooc_ntk.errors import InputError
from ooc_ntk.registry import load_plugins

#: A user's rule: from (module, its positional inputs, the gradient of its output) to the gradients of its own
#: parameters by name, each (samples, *shape).
ModuleRule = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Mapping[str, Tensor]]

_MODULE_RULES: dict[type[nn.Module], ModuleRule] = {}

_AnyRule = TypeVar("_AnyRule", bound=ModuleRule)


def layer_rule(kind: type[nn.Module]) -> Callable[[_AnyRule], _AnyRule]:
    """Register a rule for a module class of one's own, as a decorator.

    The function gets the module, the tuple of its positional inputs, each (samples, ...), and the gradient of its
    output, (samples, ...). It returns the gradient of each of the module's own parameters by name, (samples, *shape):
    one gradient per sample, not their sum. Before it is used it is compared with autograd on a few samples; a rule that
    disagrees is refused with both numbers.

    Args:
        kind: the module class; instances of subclasses are not covered.

    Returns:
        The decorator.

    Raises:
        InputError: if ``kind`` is no module class.

    >>> class Scale(nn.Module):
    ...     pass
    >>> @layer_rule(Scale)
    ... def scale_rule(module, inputs, output_gradient):
    ...     return {"weight": inputs[0] * output_gradient}
    >>> forget_layer_rule(Scale)
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise InputError(f"a layer rule is registered for a class of torch.nn.Module, got {kind!r}")

    def register(rule: _AnyRule) -> _AnyRule:
        _MODULE_RULES[kind] = rule
        return rule

    return register


def forget_layer_rule(kind: type[nn.Module]) -> None:
    """Take back what :func:`layer_rule` registered for a class, if anything."""
    _MODULE_RULES.pop(kind, None)


def module_rule(module: nn.Module) -> ModuleRule | None:
    """The user's rule of a module, if there is one."""
    load_plugins()
    return _MODULE_RULES.get(type(module))


def registered_rules() -> dict[type[nn.Module], ModuleRule]:
    """Every rule that users have registered, by module class."""
    load_plugins()
    return dict(_MODULE_RULES)
