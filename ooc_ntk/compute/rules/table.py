"""The table of rules, by the torch function that a layer calls: those of every module of this folder.

A module names its rules in ``RULES``. Rules by module class are in :mod:`~ooc_ntk.compute.rules.modules`; a module of
this folder may have some of those as well, by its decorator :func:`layer_rule`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, Final

from ooc_ntk.registry import modules_of

from .base import Rule
from .modules import forget_layer_rule, layer_rule, module_rule, registered_rules

__all__ = ["RULES", "forget_layer_rule", "layer_rule", "module_rule", "registered_rules"]


def _rules(folder: str) -> Iterator[Rule]:
    """The rules of a folder's modules; this module is one of them."""
    for name in modules_of(folder):
        if f"{folder}.{name}" != __name__:
            yield from getattr(import_module(f"{folder}.{name}"), "RULES", ())


#: The rule of every torch function that has one.
RULES: Final[Mapping[Callable[..., Any], Rule]] = {
    function: rule for rule in _rules(__name__.rpartition(".")[0]) for function in rule.functions
}
